"""Training in several processes: what one process alone would learn."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from sklearn_medimb import (
    AMIMVClassifier,
    AMIMVEncoder,
    CSSNClassifier,
    LMDClassifier,
    MetricTwoStageClassifier,
    SoftmaxClassifier,
    SPMixClassifier,
    SSLEncoder,
)
from sklearn_medimb.backbones import ViT
from sklearn_medimb.methods import Contrast
from tests.helpers import make_blobs

# Layer normalisation: the statistics of batch normalisation belong to each process's share.
COMMON = {
    "backbone": ViT(patch_size=4, width=16, depth=1, n_heads=2, drop_path=0.0),
    "max_epochs": 2,
    "batch_size": 16,  # four batches of 15: shares of 8, one of them filled up
    "precision": "float64",
    "device": "cpu",  # there may be fewer GPUs than processes
    "random_state": 0,
}


def estimators(folder):
    unseeded = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.ReLU())
    if os.environ.get("RANK") == "0":
        torch.save(unseeded.state_dict(), folder / "unseeded.pt")
    elif "RANK" not in os.environ:  # alone, afterwards: what the first process had
        unseeded.load_state_dict(torch.load(folder / "unseeded.pt"))
    return {
        "own network": SoftmaxClassifier(**{**COMMON, "backbone": unseeded}),
        "checkpoint": SoftmaxClassifier(checkpoint_dir=folder / "checkpoints", **COMMON),
        "the same": SoftmaxClassifier(checkpoint_dir=folder / "checkpoints", **COMMON),
        "two stages": MetricTwoStageClassifier(rebalance="crt", **COMMON),
        "relations": LMDClassifier(n_rounds=1, **COMMON),
        "label-free": AMIMVClassifier(pretrain=SSLEncoder("moco", max_epochs=1), **COMMON),
        "network": SoftmaxClassifier(**COMMON),
        "pairs": CSSNClassifier(**COMMON),
        "mixing": SPMixClassifier(**COMMON),
        "mixing images": SPMixClassifier(level="image", contrast="gpaco", **COMMON),
        "teacher": AMIMVEncoder(**COMMON),
        "validated": SoftmaxClassifier(early_stopping=True, **COMMON),
    }


def train(folder):
    """Losses and weights of each estimator; run by every process."""
    X, y = make_blobs()
    results = {}
    for name, estimator in estimators(folder).items():
        estimator.fit(X, y)
        results[name] = {
            "losses": [row["train_loss"] for row in estimator.history_],
            "weights": [float(np.abs(w).sum()) for w in estimator.weights_.values()],
        }
    return results


def launch(code, folder, n_processes=2):
    script = folder / "script.py"
    script.write_text(code)
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc-per-node={n_processes}", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, env=env, start_new_session=True, **pipes)
    try:
        _, errors = process.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what a launcher that hangs has started
    return process.returncode, errors


TWO = """
import atexit, json, os, pathlib, sys

folder = pathlib.Path(__file__).parent


@atexit.register  # before torch's and ours, so that it is called last
def note_threads():
    names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    (folder / f"{os.environ['RANK']}-threads.json").write_text(json.dumps(names))


import torch.distributed as dist
import sklearn_medimb._machine.distributed
from sklearn_medimb import SoftmaxClassifier
from tests._machine.test_distributed import train
from tests.helpers import make_blobs

sizes = []
share_out = sklearn_medimb._machine.distributed.share_out
sklearn_medimb._machine.distributed.share_out = lambda encode, images: share_out(
    lambda own: (sizes.append((len(own), len(images))), encode(own))[1], images
)
results = train(folder)
assert dist.get_world_size() == 2
results["sizes"] = sorted(set(sizes))

X, y = make_blobs()
rank = int(os.environ["RANK"])
(folder / f"{rank}.json").write_text(json.dumps(results))
told = []
clf = SoftmaxClassifier(max_epochs=1, device="cpu")
for images, labels in ((X[rank::2], y[rank::2]), (255 - X if rank else X, y)):
    try:
        clf.fit(images, labels)
    except ValueError as error:
        told.append(str(error))
os.environ["SKLEARN_MEDIMB_DISTRIBUTED"] = "0"
if rank:
    clf.fit(X[rank::2], y[rank::2])
    told.append(int(clf.n_samples_fit_))
(folder / f"{rank}-told.json").write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes wrote, which is asked about twice: to start them takes long."""
    folder = tmp_path_factory.mktemp("two")
    code, errors = launch(TWO, folder)
    assert code == 0, errors[-3000:]
    return folder


def test_two_processes_learn_what_one_does(two):
    """Also over pairs of images that lie in different shares, and with a momentum teacher."""
    first, second = (json.loads((two / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert [8, 15] in first["sizes"]
    assert not list((two / "checkpoints").iterdir())
    alone = train(two)
    for name, result in alone.items():
        for what, values in result.items():
            # A bias before batch normalisation has no gradient but rounding.
            np.testing.assert_allclose(
                first[name][what], values, rtol=1e-9, atol=1e-6, err_msg=name
            )


def test_processes_with_different_data_are_told_and_may_train_apart(two):
    """Also where only the pixels differ."""
    for rank, n_apart in ((0, []), (1, [30])):
        first, second, *apart = json.loads((two / f"{rank}-told.json").read_text())
        assert "pass the whole training set in each" in first
        assert "pass the whole training set in each" in second
        assert apart == n_apart


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are listed by /proc")
def test_no_thread_of_the_group_is_left_when_python_ends(two):
    """One that is gets aborted at times, and the launcher then ends the others."""
    for rank in (0, 1):
        names = json.loads((two / f"{rank}-threads.json").read_text())
        assert not [name for name in names if "gloo" in name]


class Hungry(torch.nn.Module):
    """A backbone without room for the activations of more than `room` images."""

    def __init__(self, room, when="forward"):
        super().__init__()
        self.room = room
        self.when = when
        self.layer = torch.nn.Conv2d(3, 8, 3, stride=2)
        self.norm = torch.nn.GroupNorm(2, 8)
        self.seen = []

    def forward(self, images):
        if self.training:
            self.seen.append(len(images))
        too_many = torch.is_grad_enabled() and len(images) > self.room
        if too_many and self.when == "forward":
            run_out()
        features = self.norm(self.layer(images)).relu()
        if too_many and self.when == "backward":
            features.register_hook(run_out)
        return features


def run_out(*args):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize(
    ("Classifier", "params"),
    [
        (SoftmaxClassifier, {}),
        (CSSNClassifier, {}),
        (SPMixClassifier, {"level": "image", "contrast": Contrast(key_momentum=0.9)}),
    ],
    ids=["network", "pairs", "queue"],
)
def test_out_of_memory_halves_what_the_backbone_sees(Classifier, params, when):
    """Losses over pairs of images stay those of the whole batch; nothing is queued twice."""
    X, y = make_blobs()
    common = {"max_epochs": 2, "batch_size": 32, "precision": "float64", "random_state": 0}
    common |= params
    torch.manual_seed(0)
    plenty, scarce = Hungry(10**6), Hungry(7, when)
    scarce.load_state_dict(plenty.state_dict())
    plain = Classifier(plenty, **common).fit(X, y)
    with pytest.warns(UserWarning, match="Memory ran out in a training step") as caught:
        frugal = Classifier(scarce, **common).fit(X, y)
    assert len([w for w in caught if "Memory ran out" in str(w.message)]) == 1
    sizes = frugal.net_.module_.trunk.backbone.seen
    assert max(sizes) > 7
    if "contrast" not in params:  # what has no gradient needs no parts
        assert max(sizes[len(sizes) // 2 :]) <= 7  # it stays with what it found
    assert [row["train_loss"] for row in frugal.history_] == pytest.approx(
        [row["train_loss"] for row in plain.history_], rel=1e-9
    )
    for name, weight in plain.weights_.items():
        np.testing.assert_allclose(frugal.weights_[name], weight, rtol=1e-6, atol=1e-9)


def test_running_statistics_move_once_per_part():
    """The second pass over a part must not move them again."""
    from sklearn_medimb._training.network import Trunk

    trunks = []
    for micro_batch in (None, 6):
        torch.manual_seed(0)
        backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        trunk = Trunk(backbone, (3, 8, 8), autocast=None)
        trunk.micro_batch = micro_batch
        trunks.append(trunk)
    torch.manual_seed(1)
    images = torch.rand(12, 3, 8, 8)
    whole, parts = trunks
    for half in images.chunk(2):
        whole(half).square().sum().backward()
    parts(images).square().sum().backward()
    for name, value in whole.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(parts.state_dict()[name], value)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_memory_may_run_out_while_the_optimiser_makes_its_moments(monkeypatch):
    X, y = make_blobs()
    common = {"max_epochs": 2, "augment": None, "random_state": 0}
    plain = SoftmaxClassifier(**common).fit(X, y)
    zeros_like, calls = torch.zeros_like, []

    def scarce(*args, **kwargs):
        calls.append(args)
        return run_out() if len(calls) == 4 else zeros_like(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros_like", scarce)
    with pytest.warns(UserWarning, match="Memory ran out"):
        frugal = SoftmaxClassifier(**common).fit(X, y)
    assert frugal.history_[0]["train_loss"] == pytest.approx(plain.history_[0]["train_loss"], 0.05)


def test_memory_may_run_out_in_a_compiled_network(monkeypatch):
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module: compiled(module, backend="aot_eager")
    )
    X, y = make_blobs()
    params = {"compile": True, "max_epochs": 1, "batch_size": 32, "random_state": 0}
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="Memory ran out"):
        SoftmaxClassifier(Hungry(7, "backward"), **params).fit(X, y)


def test_prediction_goes_on_in_smaller_blocks(monkeypatch):
    X, y = make_blobs()
    clf = SoftmaxClassifier(max_epochs=1, random_state=0).fit(X, y)
    expected = clf.predict_proba(X)
    forward = clf.net_.module_.trunk.backbone.forward
    clf.net_.module_.trunk.backbone.forward = lambda images: (
        run_out() if len(images) > 9 else forward(images)
    )
    np.testing.assert_allclose(clf.predict_proba(X), expected, atol=1e-6)


def test_out_of_memory_with_a_single_image_is_an_error():
    X, y = make_blobs()
    with (
        pytest.warns(UserWarning, match="Memory ran out"),
        pytest.raises(torch.OutOfMemoryError, match="out of memory"),
    ):
        SoftmaxClassifier(Hungry(0), max_epochs=1, random_state=0).fit(X, y)
