"""Fits that share a GPU: none dies, none waits for ever. Memory is simulated on the CPU."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from imblearn.over_sampling import RandomOverSampler
from sklearn.base import clone
from sklearn.model_selection import cross_val_score

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
from sklearn_medimb._machine import gpu_queue
from sklearn_medimb._machine.gpu_queue import MemoryQueue
from sklearn_medimb._training.network import Trunk
from sklearn_medimb._training.steps import Steps
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.base._encoder import BaseImageEncoder
from sklearn_medimb.methods import Contrast
from tests.helpers import make_blobs

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


fork = multiprocessing.get_context("fork")


def fit(folder, number, n_bytes, entered, together, seconds):
    """Stand-in for a fit: notes when it is there, and waits for company if there should be some."""
    entered.put((0, number))  # it is about to ask
    with MemoryQueue(folder, 100, poll=0.01).reserve(n_bytes):
        entered.put((time.monotonic(), number))
        if together is not None:
            together.wait(timeout=30)
        time.sleep(seconds)
        entered.put((time.monotonic(), -number))


def start(folder, number, n_bytes, entered, together=None, seconds=0.1):
    process = fork.Process(target=fit, args=(folder, number, n_bytes, entered, together, seconds))
    process.start()
    return process


@pytest.mark.parametrize(
    ("n_bytes", "at_once"), [(40, 2), (60, 1), (1000, 1)], ids=["half", "most", "too much"]
)
def test_as_many_fits_at_once_as_memory_holds(tmp_path, n_bytes, at_once):
    entered = fork.Queue()
    together = fork.Barrier(2) if at_once == 2 else None  # else nobody would ever leave
    processes = [start(tmp_path, n, n_bytes, entered, together) for n in (1, 2, 3, 4)]
    events = [entered.get(timeout=60) for _ in range(12)]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    running, most = 0, 0
    for _, number in sorted(event for event in events if event[0]):
        running += 1 if number > 0 else -1
        most = max(most, running)
    assert most == at_once
    assert not list(tmp_path.glob("*.held"))


def test_a_killed_fit_gives_its_memory_back(tmp_path):
    entered = fork.Queue()
    first = start(tmp_path, 1, 100, entered, seconds=60)
    assert [entered.get(timeout=30)[1] for _ in range(2)] == [1, 1]
    second = start(tmp_path, 2, 100, entered, seconds=0)
    assert entered.get(timeout=30) == (0, 2)
    time.sleep(0.3)
    assert entered.empty()
    os.kill(first.pid, signal.SIGKILL)
    first.join(timeout=30)
    assert entered.get(timeout=30)[1] == 2
    second.join(timeout=30)
    assert second.exitcode == 0


def test_a_large_fit_is_not_overtaken_for_ever(tmp_path):
    """A small one that comes later and would fit waits behind it."""
    entered = fork.Queue()
    first = start(tmp_path, 1, 60, entered, seconds=1.0)
    assert [entered.get(timeout=30)[1] for _ in range(2)] == [1, 1]
    large = start(tmp_path, 2, 80, entered)
    assert entered.get(timeout=30) == (0, 2)
    while not any(path.name.endswith(".80.waits") for path in tmp_path.iterdir()):
        time.sleep(0.01)  # until it stands in the queue
    small = start(tmp_path, 3, 10, entered)
    events = [entered.get(timeout=30) for _ in range(6)]
    for process in (first, large, small):
        process.join(timeout=30)
    order = [number for when, number in sorted(events) if when and number > 0]
    assert order == [2, 3]


def test_a_failed_fit_gives_its_memory_back(tmp_path):
    queue = MemoryQueue(tmp_path, 100)
    with pytest.raises(KeyError), queue.reserve(100):
        raise KeyError
    with queue.reserve(100):
        assert len(list(tmp_path.glob("*.held"))) == 1


def test_every_fit_on_a_gpu_takes_its_turn(tmp_path, monkeypatch):
    """A GPU is simulated: the device of `turn` alone says "cuda"."""
    properties = SimpleNamespace(uuid="gpu", total_memory=1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(gpu_queue.tempfile, "gettempdir", lambda: str(tmp_path))
    turn, asked = gpu_queue.waiting_for_memory, []

    def on_gpu(device, n_bytes):
        asked.append(n_bytes())
        return turn(torch.device("cuda"), n_bytes)

    held = []

    class Look:
        def __call__(self, estimator, X, y):
            held.append([path.name for path in tmp_path.rglob("*.held")])
            return 0.5

    monkeypatch.setattr("sklearn_medimb.base._image_estimator.waiting_for_memory", on_gpu)
    X, y = make_blobs((360, 160, 80))
    params = {"max_epochs": 1, "device": "cpu", "random_state": 0}
    SoftmaxClassifier(early_stopping=True, scoring=Look(), **params).fit(X, y)
    assert len(asked) == 1
    assert asked[0] > X.nbytes // 2
    assert [len(names) for names in held] == [1]
    assert not list(tmp_path.rglob("*.held"))
    wide = SoftmaxClassifier(batch_size=1024, **params).fit(X, y)
    assert asked[1] > 4 * asked[0]
    assert wide.n_iter_ == 1


PAIR_OF_IMAGES = {"reference": "paired", "spatial_dims": 2, "batch_size": 8}


@pytest.mark.parametrize(
    ("estimator", "n_images"),
    [
        (SoftmaxClassifier(), 60),
        (SoftmaxClassifier(batch_size=16, sampler=RandomOverSampler(random_state=0)), 16),
        (CSSNClassifier(), 2 * 32),
        (CSSNClassifier(batch_size=1000), 2 * 60),
        (CSSNClassifier(pair_view="pair", batch_size=5), 2 * 5**2),
        (CSSNClassifier(**PAIR_OF_IMAGES), 4 * 8),
        (CSSNClassifier(pair_view="pair", **PAIR_OF_IMAGES), 4 * 8**2),
        (LMDClassifier(n_rounds=1), 2 * 60),
        (MetricTwoStageClassifier(), 60 + 3 * 4),
        (MetricTwoStageClassifier(metric_batch="shared"), 60),
        (SPMixClassifier(), 60),
        (SPMixClassifier(contrast="gpaco"), 2 * 60),
        (SPMixClassifier(contrast=Contrast("supcon", key_momentum=0.9), batch_size=16), 2 * 16),
        (AMIMVEncoder(), 4 * 60),
        (SSLEncoder(), 2 * 60),
        (SSLEncoder("moco", batch_size=20), 2 * 20),
        (SSLEncoder("byol", batch_size=20), 4 * 20),
        (AMIMVClassifier(fine_tune="full"), 4 * 60),
        (SoftmaxClassifier(pretrain=SSLEncoder("byol", max_epochs=1, batch_size=8)), 60),
        (CSSNClassifier(pretrain="simclr"), 2 * 60),
    ],
)
def test_the_estimate_counts_every_image_that_backbones_encode(monkeypatch, estimator, n_images):
    """In the most demanding step of a fit: views, partners, teachers, and pre-training."""
    encoded, steps, estimates = [], [], []
    forward, within = Trunk.forward, Steps._within_memory
    monkeypatch.setattr(
        Trunk, "forward", lambda trunk, x: encoded.append(len(x)) or forward(trunk, x)
    )

    def step(*args, **kwargs):
        encoded.clear()
        result = within(*args, **kwargs)
        steps.append(sum(encoded))
        return result

    def on_gpu(device, n_bytes):
        estimates.append(n_bytes())
        return nullcontext()

    monkeypatch.setattr(Steps, "_within_memory", step)
    monkeypatch.setattr("sklearn_medimb.base._image_estimator.waiting_for_memory", on_gpu)
    monkeypatch.setattr(BaseImageEncoder, "_auto_epochs", 1)
    monkeypatch.setattr(BaseImageEncoder, "_auto_steps", 1)
    X, y = make_blobs()
    if getattr(estimator, "reference", None) == "paired":
        X = np.stack([X, X], axis=1)
    tiny = ConvNet((4, 4))
    clf = clone(estimator).set_params(backbone=tiny, max_epochs=1, random_state=0)
    most = clf._most_images
    monkeypatch.setattr(clf, "_most_images", lambda train: estimates.append(most(train)) or 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(The features have all but|In .* steps the thresholds)")
        clf.fit(X, y)
    assert max(steps) == n_images
    assert estimates[0] == n_images
    assert estimates[1] > X.nbytes


def test_nested_fits_do_not_wait_for_their_own_parent(tmp_path, monkeypatch):
    properties = SimpleNamespace(uuid="gpu", total_memory=10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(gpu_queue.tempfile, "gettempdir", lambda: str(tmp_path))
    cuda = torch.device("cuda")
    with (
        gpu_queue.waiting_for_memory(cuda, lambda: 10),
        gpu_queue.waiting_for_memory(cuda, lambda: 10),
    ):
        assert len(list(tmp_path.rglob("*.held"))) == 1
    assert not list(tmp_path.rglob("*.held"))


def test_cpu_fits_never_queue(monkeypatch):
    monkeypatch.setattr(gpu_queue, "MemoryQueue", None)
    with gpu_queue.waiting_for_memory(torch.device("cpu"), lambda: 1 / 0):
        pass


def test_activations_are_counted():
    """One image through conv (27 in) and ReLU: input, and output, stay until backward."""
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
    trunk = Trunk(backbone, (3, 10, 10), autocast=None)
    assert trunk.activation_bytes() == 4 * (3 * 10 * 10 + 8 * 8 * 8)
    twice = torch.nn.Sequential(*backbone, torch.nn.Conv2d(8, 2, 1))  # keeps the same output
    assert Trunk(twice, (3, 10, 10), autocast=None).activation_bytes() == trunk.activation_bytes()


def test_a_lock_left_behind_is_no_reservation(tmp_path):
    left = FileLock(tmp_path / "abc.90.held")
    left.acquire()
    queue = MemoryQueue(tmp_path, 100, poll=0.01)
    assert gpu_queue._is_alive(tmp_path / "abc.90.held")
    left.release()
    (tmp_path / "abc.90.held").touch()
    with queue.reserve(50):
        assert not (tmp_path / "abc.90.held").exists()


# ---------------------------------------------------------------- for real

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
def test_parallel_fits_share_a_gpu():
    X, y = make_blobs((60, 40))
    clf = SoftmaxClassifier(max_epochs=2, device="cuda", random_state=0)
    assert np.isfinite(cross_val_score(clf, X, y, cv=4, n_jobs=4)).all()


@needs_gpu
def test_a_fit_that_runs_out_of_gpu_memory_goes_on_in_parts():
    """2 GB are left to this process; the first layer alone would take more."""
    X = np.random.default_rng(0).integers(0, 256, (256, 3, 224, 224), dtype=np.uint8)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2e9 / total)
    try:
        clf = SoftmaxClassifier(ConvNet((64, 64)), max_epochs=1, batch_size=256, device="cuda")
        with pytest.warns(UserWarning, match="Memory ran out"):
            clf.fit(X, np.arange(256) % 2)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert np.isfinite(clf.history_[0]["train_loss"])
