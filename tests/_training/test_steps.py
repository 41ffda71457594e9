"""Steps that a GPU records and replays, on a simulated one.

A recording there holds operations and the places they read and write, nothing of Python: what
would be frozen on a GPU is frozen here.
"""

from __future__ import annotations

import gc
import pickle
import random

import numpy as np
import pytest
import torch
from sklearn.base import clone
from skorch.callbacks import Callback
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sklearn_medimb import AMIMVEncoder, SoftmaxClassifier
from sklearn_medimb._data.batches import Batches
from sklearn_medimb._machine import graphs
from sklearn_medimb._machine.randomness import Dropout
from sklearn_medimb._training import replays
from sklearn_medimb._training.net import Net
from sklearn_medimb._training.steps import Steps
from sklearn_medimb.augment import Augmentation
from sklearn_medimb.backbones import MLP, ConvNet
from sklearn_medimb.base import Criterion
from sklearn_medimb.methods import Contrast
from tests.estimators import PUBLIC, TRAINED
from tests.simulated_cuda import SimulatedCuda, SimulatedGraph

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="looks into the simulation"),
    pytest.mark.filterwarnings("ignore:The features have all but collapsed"),
    pytest.mark.filterwarnings("ignore:In .* steps the thresholds"),
]

RNG = np.random.default_rng(0)
Y = np.repeat([0, 1, 2], [12, 8, 4])
X = RNG.integers(0, 255, (len(Y), 3, 12, 12), dtype=np.uint8)
SMALL = {
    "backbone": ConvNet(widths=(4, 8)),
    "batch_size": 8,
    "max_epochs": 2,
    "precision": "float64",
    "random_state": 0,
}


@pytest.fixture
def fit(monkeypatch):
    """Fit a copy, recorded or not; gives what the steps of each of its stages came to."""

    def run(estimator, X=X, y=Y, *, record, **given):
        seen, close = [], replays.ReplayedSteps.close

        def look(self):
            if hasattr(self.source, "generator"):
                drawn = self.source.generator.get_state().tolist()
                kinds = len(self.counts)
                seen.append((self.reason, self.n_replayed, kinds, drawn))
            close(self)

        with monkeypatch.context() as patch, SimulatedCuda():
            patch.setattr(replays, "WARM_UP", 2 if record else 10**9)
            patch.setattr(replays.ReplayedSteps, "close", look)
            patch.setattr(graphs, "_failed", [])
            fitted = clone(estimator).fit(X, y, **given)
            return fitted.weights_, fitted.history_, seen

    return run


@pytest.fixture
def both(fit):
    """Fit recorded and not: all is the same. What the stages of the first came to."""

    def run(estimator, X=X, y=Y, *, atol=1e-6, **given):
        plain, expected, before = fit(estimator, X, y, record=False, **given)
        recorded, history, seen = fit(estimator, X, y, record=True, **given)
        assert {replayed for _, replayed, _, _ in before} == {0}
        for name, weights in plain.items():
            np.testing.assert_allclose(recorded[name], weights, rtol=0, atol=atol)
        for one, other in zip(history, expected, strict=True):
            assert one.keys() == other.keys()
            assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
        assert [drawn for *_, drawn in seen] == [drawn for *_, drawn in before]
        return [stage[:3] for stage in seen]

    return run


# One row per way to train: each public estimator by default, and what changes its steps.
WAYS = {
    **{name: (name, {}) for name in TRAINED},
    "dropout": ("SoftmaxClassifier", {"backbone": nn.Sequential(nn.Conv2d(3, 4, 3), Dropout(0.3))}),
    "torch's dropout": (
        "SoftmaxClassifier", {"backbone": nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.3))},
    ),
    "noise drawn in the step": ("SoftmaxClassifier", {"augment": "strong"}),
    "mixup": ("SoftmaxClassifier", {"mixup": "mixup"}),
    "balanced mixup": ("SoftmaxClassifier", {"mixup": "balanced"}),
    "weights that change": ("SoftmaxClassifier", {"loss": "ldam"}),
    "running mean": ("SoftmaxClassifier", {"ema": 0.9, "early_stopping": True}),
    "rates by layer": ("SoftmaxClassifier", {"backbone_lr": 0.3, "layer_decay": 0.5}),
    "SGD": (
        "SoftmaxClassifier",
        {"net_params": {"optimizer": torch.optim.SGD, "optimizer__momentum": 0.9}},
    ),
    "pairs": ("CSSNClassifier", {"pair_view": "pair", "batch_size": 6}),
    "relations late": ("LMDClassifier", {"relation_start": 0.5, "max_epochs": 4}),
    "class centres": (
        "MetricTwoStageClassifier", {"metric_loss": "class_center_triplet", "batch_size": 9},
    ),
    "tokens": ("SPMixClassifier", {"contrast": "gpaco", "batch_size": 9}),
    "key encoder": (
        "SPMixClassifier", {"contrast": Contrast("supcon", key_momentum=0.9), "batch_size": 9},
    ),
    "moco": ("SSLEncoder", {"method": "moco"}),
    "byol": ("SSLEncoder", {"method": "byol"}),
    "vectors": ("SoftmaxClassifier", {"backbone": MLP((8,))}),
    "pre-trained vectors": ("SSLEncoder", {"backbone": MLP((8,))}),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_replayed_steps_do_what_steps_do(way, both):
    """To the rounding of a learning rate to float32; and with the same random numbers."""
    name, params = WAYS[way]
    own = {k: v for k, v in SMALL.items() if k in PUBLIC[name]().get_params()}
    estimator = PUBLIC[name](**{**own, **params})
    if name == "AMIMVClassifier":
        estimator.set_params(pretrain=AMIMVEncoder(**own))
    images = X.reshape(len(X), -1)[:, ::9].astype(np.float32) if "vectors" in way else X
    y = Y if name not in ("SSLEncoder", "AMIMVEncoder") else None
    for reason, n_replayed, _ in both(estimator, images, y):
        assert reason is None
        assert n_replayed > 0


# ---------------------------------------------------------------- what cannot be replayed


class Counts(nn.Module):
    """Drops every other step what it is given: it counts in Python."""

    def __init__(self):
        super().__init__()
        self.layer, self.n = nn.Conv2d(3, 4, 3), 0

    def forward(self, x):
        self.n += self.training
        return self.layer(x) * (1 + self.n % 2)


class Hides(Counts):
    """Counts where nobody looks."""

    def __init__(self):
        super().__init__()
        self.seen = [0]

    def forward(self, x):
        self.seen[0] += self.training
        return self.layer(x) * (1 + 3 * (self.seen[0] % 2))


class Asks(nn.Module):
    """Looks at a value, and goes one of two ways."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = self.layer(x)
        return y if y.sum() > 0 else -y


class Chance(Asks):
    """Asks Python's generator."""

    def forward(self, x):
        return self.layer(x) * (1 + (random.random() < 0.5))


class Masks(Asks):
    """Asks for the places where something is so."""

    def forward(self, x):
        y = self.layer(x)
        y[y < 0] = 0
        return y


class Constants(Asks):
    """Makes a tensor of numbers of the host."""

    def forward(self, x):
        return self.layer(x) * torch.tensor([1.0, 2.0, 1.0, 2.0], device=x.device)[:, None, None]


class Replaces(Asks):
    """Puts another tensor in the place of a buffer, as a running mean is at times written."""

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(4, dtype=torch.float64))

    def forward(self, x):
        y = self.layer(x)
        self.center = 0.9 * self.center + 0.1 * y.detach().mean(dim=(0, 2, 3))
        return y - self.center[:, None, None]


class Remembers(Asks):
    """Keeps what it gave last, several tensors at once."""

    def forward(self, x):
        self.last = x, self.layer(x)
        return self.last[1]


class HostNumber(Asks):
    """Multiplies by a number that lies on the host."""

    def __init__(self):
        super().__init__()
        self.n = [torch.ones((), dtype=torch.float64)]

    def forward(self, x):
        return self.layer(x) * self.n[0]


class HooksLate(Callback):
    """Registers a hook when training has begun."""

    def on_train_begin(self, net, **kwargs):
        layer = next(m for m in net.module_.modules() if isinstance(m, nn.Conv2d))
        layer.register_forward_hook(lambda module, inputs, output: output * 2)


def hooked():
    layer = nn.Conv2d(3, 4, 3)
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    return nn.Sequential(layer)


class Watch(Callback):
    """Hears of every batch."""

    def on_batch_end(self, net, batch=None, **kwargs):
        assert len(batch[1])


class CountingCriterion(Criterion):
    """Counts its steps in Python."""

    def __init__(self, label_criterion):
        super().__init__()
        self.label_criterion, self.n = label_criterion, 0

    def forward(self, output, mass):
        self.n += 1
        return self.label_criterion(output, mass) * (1 + self.n % 2)


class WithCounting(SoftmaxClassifier):
    def _make_criterion(self, train, n_steps):
        return CountingCriterion(super()._make_criterion(train, n_steps))


class Listed(SoftmaxClassifier):
    """Batches that are no orders."""

    def _make_batches(self, train, context):
        source = super()._make_batches(train, context)
        return _Plain(source)


class _Plain:
    def __init__(self, source):
        self.source = source

    def __iter__(self):
        return iter(self.source)


OBSTACLES = {
    "counter": (SoftmaxClassifier, {"backbone": Counts()}, "counts steps in Python"),
    "hidden counter": (SoftmaxClassifier, {"backbone": Hides()}, "came to another result"),
    "value": (SoftmaxClassifier, {"backbone": Asks()}, "waits for the device"),
    "chance": (SoftmaxClassifier, {"backbone": Chance()}, "random numbers on the host"),
    "mask": (SoftmaxClassifier, {"backbone": Masks()}, "with a mask"),
    "constants": (SoftmaxClassifier, {"backbone": Constants()}, "between host and device"),
    "buffer": (SoftmaxClassifier, {"backbone": Replaces()}, "another tensor in the place"),
    "number": (SoftmaxClassifier, {"backbone": HostNumber()}, "number of the host"),
    "late hook": (SoftmaxClassifier, {"callbacks": [HooksLate()]}, "has hooks"),
    "hook": (SoftmaxClassifier, {"backbone": hooked()}, "has hooks"),
    "callback": (SoftmaxClassifier, {"callbacks": [Watch()]}, "Watch hears of every batch"),
    "optimiser": (
        SoftmaxClassifier, {"net_params": {"optimizer": torch.optim.RMSprop}}, "RMSprop",
    ),
    "criterion": (WithCounting, {}, "counts steps in Python"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OBSTACLES)
def test_what_cannot_be_replayed_is_taken_step_by_step(kind, fit, capfd):
    """The result is that of steps; the reason is said, once."""
    cls, params, reason = OBSTACLES[kind]
    estimator = cls(**{**SMALL, **params}, verbose=1)
    plain, *_ = fit(estimator, record=False)
    capfd.readouterr()
    random.seed(0)
    recorded, _, ((found, n_replayed, *_),) = fit(estimator, record=True)
    assert reason in found
    assert n_replayed == 0
    assert capfd.readouterr().err.count(f"Steps are taken one by one: {found}") == 1
    if kind not in ("chance", "hidden counter"):  # they are counted on meanwhile
        for name, weights in plain.items():
            np.testing.assert_array_equal(recorded[name], weights)


def test_batches_that_are_no_orders_are_taken_as_they_are(monkeypatch):
    with SimulatedCuda():
        clf = Listed(**SMALL).fit(X, Y)
        assert "no orders" in clf.net_.steps.reason
        assert len(clf.history_) == SMALL["max_epochs"]


def test_a_module_may_keep_tensors_that_no_step_reads(both):
    ((reason, n_replayed, _),) = both(SoftmaxClassifier(**{**SMALL, "backbone": Remembers()}))
    assert reason is None
    assert n_replayed > 0


class Anneal(Callback):
    """Changes a number of the network from epoch to epoch."""

    def on_epoch_begin(self, net, **kwargs):
        net.module_.trunk.backbone[0].gain = 1 / len(net.history)


class Gain(Asks):
    gain = 1.0

    def forward(self, x):
        return self.layer(x) * self.gain


def test_numbers_that_a_callback_changes_count_from_then_on(both):
    backbone = nn.Sequential(Gain())
    estimator = SoftmaxClassifier(**{**SMALL, "backbone": backbone}, callbacks=[Anneal()])
    ((reason, n_replayed, n_kinds),) = both(estimator)
    assert (reason, n_kinds) == (None, 2)
    assert n_replayed == 2


def test_orders_hold_tensors_and_plain_constants(fit, monkeypatch):
    orders = Batches.orders
    monkeypatch.setattr(
        Batches, "orders", lambda self: (o | {"odd": np.zeros(2)} for o in orders(self))
    )
    _, history, ((reason, n_replayed, *_),) = fit(SoftmaxClassifier(**SMALL), record=True)
    assert (reason, n_replayed) == ("an order holds a ndarray", 0)
    assert len(history) == 2


def test_a_recording_that_cuda_refuses_is_the_last_of_the_process(fit, monkeypatch):
    """Allocators of some versions do not recover from it."""
    monkeypatch.setattr(graphs, "_obstacle", lambda *_: None)
    estimator = SoftmaxClassifier(**{**SMALL, "backbone": Asks()})
    plain, *_ = fit(estimator, record=False)
    recorded, _, ((reason, n_replayed, *_),) = fit(estimator, record=True)
    assert "not permitted" in reason
    assert n_replayed == 0
    for name, weights in plain.items():
        np.testing.assert_array_equal(recorded[name], weights)
    monkeypatch.setattr(graphs, "_failed", ["one"])
    assert not graphs.can_replay(torch.device("cuda"))


def test_a_recording_that_fails_leaves_all_as_it_was(fit, monkeypatch):
    """Operations fail that nobody foresaw; what was drawn for the recording is drawn again."""
    estimator = SoftmaxClassifier(
        **{**SMALL, "backbone": nn.Sequential(nn.Conv2d(3, 4, 3), Dropout(0.3))}
    )
    plain, expected, before = fit(estimator, record=False)
    add, n_added = SimulatedGraph.add, []

    def fail(self, func, *args):
        n_added.append(func)
        if len(n_added) == 60:
            raise RuntimeError("operation failed due to a previous error during capture")
        return add(self, func, *args)

    monkeypatch.setattr(SimulatedGraph, "add", fail)
    recorded, history, seen = fit(estimator, record=True)
    assert "recording it failed" in seen[0][0]
    assert [row["train_loss"] for row in history] == [row["train_loss"] for row in expected]
    assert [s[3] for s in seen] == [s[3] for s in before]
    for name, weights in plain.items():
        np.testing.assert_array_equal(recorded[name], weights)


def test_batches_of_two_sizes_are_two_recordings(both):
    """24 images in batches of at most 5: 4 of 5 and one of 4."""
    ((reason, _, n_kinds),) = both(SoftmaxClassifier(**{**SMALL, "batch_size": 5}))
    assert (reason, n_kinds) == (None, 2)


class Thaw(Callback):
    """Freezes the backbone for the first two epochs."""

    def on_epoch_begin(self, net, **kwargs):
        for weight in net.module_.trunk.parameters():
            weight.requires_grad_(len(net.history) > 2)


def test_layers_that_a_callback_thaws_are_trained_from_then_on(both):
    estimator = SoftmaxClassifier(**{**SMALL, "max_epochs": 5}, callbacks=[Thaw()])
    ((reason, n_replayed, n_kinds),) = both(estimator)
    assert (reason, n_kinds) == (None, 2)
    assert n_replayed == 5 * 3 - 2 * 2


def test_recordings_give_back_their_memory_before_batches_are_cut(fit, monkeypatch):
    """What runs out of memory beside them is tried again without them."""
    train_step, n_taken = Net.train_step, []

    def fail(self, batch, **kwargs):
        n_taken.append(self.steps.n_replayed)
        if self.steps.n_replayed and not torch.is_tensor(getattr(self, "failed", None)):
            self.failed = torch.zeros(())
            raise torch.cuda.OutOfMemoryError("out of memory (simulated)")
        return train_step(self, batch, **kwargs)

    monkeypatch.setattr(Net, "train_step", fail)
    estimator = SoftmaxClassifier(**{**SMALL, "batch_size": 5, "max_epochs": 3})
    _, history, ((reason, n_replayed, *_),) = fit(estimator, record=True)  # warns of nothing
    assert reason == "memory ran out"
    assert n_replayed > 0
    assert len(history) == 3


def test_memory_that_runs_out_ends_replaying(fit, monkeypatch):
    """And steps go on in parts of a batch."""
    taken, n_steps = Steps.take, []

    def fail(self, order):
        n_steps.append(order)
        if len(n_steps) == 2:
            with pytest.warns(UserWarning, match="Memory ran out"):
                self._need_less(8)
        return taken(self, order)

    monkeypatch.setattr(Steps, "take", fail)
    _, history, ((reason, n_replayed, *_),) = fit(SoftmaxClassifier(**SMALL), record=True)
    assert (reason, n_replayed) == ("memory ran out", 0)
    assert len(history) == SMALL["max_epochs"]


def test_nothing_of_a_recording_is_left(monkeypatch):
    monkeypatch.setattr(replays, "WARM_UP", 2)
    with SimulatedCuda():
        clf = SoftmaxClassifier(**SMALL).fit(X, Y)
        assert clf.net_.steps.n_replayed > 0
        assert all(weight.grad is None for weight in clf.net_.module_.parameters())
        gc.collect()
        assert not [graph for graph in SimulatedGraph.live if graph.operations]
        before = clf.predict_proba(X)
        twin = pickle.loads(pickle.dumps(clf))
        np.testing.assert_array_equal(twin.predict_proba(X), before)
        assert clone(clf).fit(X, Y).net_.steps.n_replayed > 0
        clf.partial_fit(X, Y)
        twin.set_params(warm_start=True).fit(X, Y)
        rate = clf.net_.optimizer_.param_groups[0]
        assert isinstance(rate["lr"], float)
        assert not rate.get("capturable")


def test_a_crash_between_replayed_epochs_changes_nothing(fit, tmp_path):
    class Crash(Callback):
        def on_epoch_end(self, net, **kwargs):
            if len(net.history) == 2:
                raise RuntimeError("power cut")

    estimator = SoftmaxClassifier(**SMALL, ema=0.9)
    whole, expected, _ = fit(estimator, record=True)
    saved = clone(estimator).set_params(checkpoint_dir=tmp_path)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(clone(saved).set_params(callbacks=[Crash()]), record=True)
    resumed, history, _ = fit(saved, record=True)
    assert [row["train_loss"] for row in history] == [row["train_loss"] for row in expected]
    for name, weights in whole.items():
        np.testing.assert_allclose(resumed[name], weights, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- what the host does


class Calls(TorchDispatchMode):
    """Counts what Python asks for."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name", ["SoftmaxClassifier", "CSSNClassifier", "LMDClassifier", "AMIMVEncoder"]
)
def test_the_host_does_next_to_nothing_for_a_replayed_step(name, monkeypatch):
    """A tenth of the calls of a step that is taken, at most; augmentation included."""
    calls, take = {}, replays.ReplayedSteps.take

    def count(self, order):
        with Calls() as found:
            n_before = self.n_replayed
            n = take(self, order)
        calls.setdefault(self.n_replayed > n_before, []).append(found.n)
        return n

    monkeypatch.setattr(replays.ReplayedSteps, "take", count)
    own = {k: v for k, v in SMALL.items() if k in PUBLIC[name]().get_params()}
    with SimulatedCuda():
        PUBLIC[name](**own).fit(X, Y)
    recorded, replayed = max(calls[True]), min(calls[True])
    assert replayed * 10 < min(calls[False])
    assert recorded > replayed  # the first of a kind was recorded then
    assert np.median(calls[True]) == replayed


def test_an_explicit_augmentation_is_drawn_in_the_step(both):
    """As any object with draw and apply is, whose draws are nobody's business."""

    class Own:
        def draw(self, n, image_shape, generator):
            return {"shift": torch.rand(n, 1, 1, 1, generator=generator, device=generator.device)}

        def apply(self, images, params):
            return images + params["shift"].to(images.dtype)

        def __repr__(self):
            return "Own()"

    ((reason, n_replayed, _),) = both(SoftmaxClassifier(**{**SMALL, "augment": Own()}))
    assert reason is None
    assert n_replayed > 0


def test_compact_draws_are_taken_ahead_and_noise_is_not():
    assert Augmentation(rotation=3, blur=1.0, hue=0.1).is_compact
    assert not Augmentation(noise=0.1).is_compact
