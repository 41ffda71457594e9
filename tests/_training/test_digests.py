"""Whether a fit goes on from a checkpoint: only one that would compute the same."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from skorch.callbacks import Callback, EarlyStopping, Freezer, GradientNormClipping, PrintLog
from torch import nn
from torch.utils.data import TensorDataset

from sklearn_medimb import AMIMVClassifier, AMIMVEncoder, SoftmaxClassifier, SPMixSampler
from sklearn_medimb._data.images import read_images
from sklearn_medimb._training.callback_state import WATCHERS
from sklearn_medimb._training.checkpoint import data_digest, fingerprint
from sklearn_medimb._training.digests import digest_of
from sklearn_medimb.augment import Augmentation
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.datasets import DatasetImages, MappedImages
from tests.helpers import CrashAfter, make_blobs

X, Y = make_blobs((40, 24, 16))
SMALL = {
    "backbone": ConvNet(widths=(4, 8)),
    "max_epochs": 4,
    "batch_size": 32,
    "random_state": 0,
    "precision": "float32",
    "augment": "none",
}


SEEN: list[int] = []


class Count(Callback):
    """It watches which epochs ran."""

    def on_epoch_end(self, net, **kwargs):
        SEEN.append(len(net.history))


WATCHERS.add(Count)


def crash(folder, params, X=X, y=Y, **given):
    """A fit that leaves a checkpoint after its second epoch."""
    clf = SoftmaxClassifier(**{**SMALL, **params}, checkpoint_dir=folder)
    clf.set_params(callbacks=[*(clf.callbacks or []), CrashAfter(2)])
    with pytest.raises(RuntimeError, match="power cut"):
        clf.fit(X, y, **given)


def n_epochs(folder, params, X=X, y=Y):
    """How many epochs of four a fit runs."""
    clf = SoftmaxClassifier(**{**SMALL, **params}, checkpoint_dir=folder)
    SEEN.clear()
    clf.set_params(callbacks=[*(clf.callbacks or []), Count()]).fit(X, y)
    return len(SEEN)


# -------------------------------------------------------------------- parameters


class Strength:
    """An augmentation of one's own."""

    def __init__(self, strength, **more):
        self.strength = strength
        vars(self).update(more)

    def draw(self, n, image_shape, generator):
        return {}

    def apply(self, images, params):
        return images * float(np.ravel(self.strength)[0])


class Slotted(Strength):
    __slots__ = ("hidden",)


def weaker(strength):
    """A class of the same name whose method differs."""

    def apply(self, images, params):
        return images * np.mean(self.strength) - strength

    return type("Strength", (Strength,), {"apply": apply})(1.0)


def slotted(value):
    made = Slotted(1.0)
    made.hidden = value
    return made


def score(estimator, X, y, bonus=0.0):
    return estimator.score(X, y) + bonus


FACTOR = 1.0


def closure(bonus):
    return lambda estimator, X, y: estimator.score(X, y) + bonus


def with_global(value):
    """A function whose global differs, as after an edit of the script."""
    scope = {"FACTOR": value}
    exec("def f(estimator, X, y): return FACTOR * estimator.score(X, y)", scope)
    return scope["f"]


def with_helper(value):
    scope = {}
    code = f"def helper(s): return {value} * s\ndef f(e, X, y): return helper(e.score(X, y))"
    exec(code, scope)
    return scope["f"]


class Scorer:
    def __init__(self, bonus):
        self.bonus = bonus

    def __call__(self, estimator, X, y):
        return estimator.score(X, y) + self.bonus

    def score(self, estimator, X, y):
        return self(estimator, X, y)


def seeded_module(seed, **changes):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Flatten(), nn.Linear(432, 16), nn.ReLU())
    for name, value in changes.items():
        setattr(module[2], name, value)
    return module


def optimizer(eps):
    return {"optimizer": torch.optim.Adam, "optimizer__eps": eps}


STOP = {"early_stopping": True}
OTHER = {
    "strength": [{"augment": Strength(s)} for s in (1.0, 0.5)],
    "strength within a dict": [{"augment": Strength(1.0, a={"b": [s]})} for s in (1, 2)],
    "strength in an array": [{"augment": Strength(np.array([1.0, s]))} for s in (1, 2)],
    "strength in a tensor": [{"augment": Strength(torch.tensor([1.0, s]))} for s in (1, 2)],
    "strength in an array of objects": [
        {"augment": Strength(1.0, a=np.array([s, None], dtype=object))} for s in (1, 2)
    ],
    "strength in a slot": [{"augment": slotted(s)} for s in (1, 2)],
    "strength of an object inside": [
        {"augment": Strength(1.0, a=SimpleNamespace(b=s))} for s in (1, 2)
    ],
    "method of the class": [{"augment": weaker(s)} for s in (0.0, 0.1)],
    "own augmentation": [{"augment": Augmentation(brightness=s)} for s in (0.1, 0.2)],
    "body of a lambda": [
        {**STOP, "scoring": lambda e, X, y: e.score(X, y)},
        {**STOP, "scoring": lambda e, X, y: 1 - e.score(X, y)},
    ],
    "constant of a lambda": [
        {**STOP, "scoring": lambda e, X, y: e.score(X, y) + 1},
        {**STOP, "scoring": lambda e, X, y: e.score(X, y) + 2},
    ],
    "name in a lambda": [
        {**STOP, "scoring": lambda e, X, y: e.score(X, y)},
        {**STOP, "scoring": lambda e, X, y: e.predict(X).mean()},
    ],
    "lambda in a lambda": [
        {**STOP, "scoring": lambda e, X, y: (lambda s: s + 1)(e.score(X, y))},
        {**STOP, "scoring": lambda e, X, y: (lambda s: s - 1)(e.score(X, y))},
    ],
    "closure": [{**STOP, "scoring": closure(b)} for b in (0.0, 0.5)],
    "partial": [{**STOP, "scoring": functools.partial(score, bonus=b)} for b in (0.0, 0.5)],
    "global": [{**STOP, "scoring": with_global(v)} for v in (1.0, 2.0)],
    "helper": [{**STOP, "scoring": with_helper(v)} for v in (1.0, 2.0)],
    "callable object": [{**STOP, "scoring": Scorer(b)} for b in (0.0, 0.5)],
    "bound method": [{**STOP, "scoring": Scorer(b).score} for b in (0.0, 0.5)],
    "weights of a module": [{"backbone": seeded_module(s)} for s in (0, 1)],
    "setting of a module": [{"backbone": seeded_module(0, inplace=b)} for b in (False, True)],
    "setting of the optimiser": [{"net_params": optimizer(e)} for e in (1e-8, 1e-4)],
    "nested parameter": [{"backbone": ConvNet(widths=(4, w))} for w in (8, 9)],
    "callback that clips": [{"callbacks": [GradientNormClipping(g)]} for g in (0.1, 1.0)],
    "callback or none": [{"callbacks": [Freezer("*.bias")]}, {}],
    "callback that stops": [{"callbacks": [EarlyStopping("train_loss", p)]} for p in (5, 6)],
}


@pytest.mark.parametrize(("crashed", "resumed"), OTHER.values(), ids=OTHER)
def test_another_fit_is_another(crashed, resumed, tmp_path):
    crash(tmp_path, crashed)
    crash(tmp_path, resumed)
    assert len(list(tmp_path.iterdir())) == 2
    crash(tmp_path, crashed)
    assert len(list(tmp_path.iterdir())) == 2


def test_another_fit_starts_afresh(tmp_path):
    params = [{**STOP, "augment": Strength(s), "scoring": closure(s)} for s in (1.0, 0.5)]
    alone = SoftmaxClassifier(**{**SMALL, **params[1]}).fit(X, Y)
    crash(tmp_path, params[0])
    clf = SoftmaxClassifier(**{**SMALL, **params[1]}, checkpoint_dir=tmp_path).fit(X, Y)
    assert np.array_equal(clf.predict_proba(X), alone.predict_proba(X))


class Clip(Callback):
    """A callback of one's own that changes training."""

    def __init__(self, at):
        self.at = at

    def on_epoch_begin(self, net, **kwargs):
        for group in net.optimizer_.param_groups:
            group["weight_decay"] = self.at


class Through(Clip):
    def on_epoch_begin(self, net, **kwargs):
        self.through(net)

    def through(self, net):
        super().on_epoch_begin(net)


@pytest.mark.parametrize("cls", [Clip, Through])
def test_a_callback_of_one_s_own_that_reaches_the_network_counts(cls, tmp_path):
    crash(tmp_path, {"callbacks": [cls(0.1)]})
    assert n_epochs(tmp_path, {"callbacks": [cls(0.2)]}) == 4
    assert n_epochs(tmp_path, {"callbacks": [cls(0.1)]}) == 2


def by_global(strength):
    scope = {"__name__": "mine", "Callback": Callback, "OWN": Strength(strength)}
    code = (
        "class C(Callback):\n def on_epoch_begin(self, net, **k): OWN.strength *= len(net.history)"
    )
    exec(code, scope)
    return scope["C"]()


def by_closure(strength):
    class Curriculum(Callback):
        def on_epoch_begin(self, net, **kwargs):
            own.strength *= len(net.history)

    own = Strength(strength)
    return Curriculum()


def by_attribute(strength):
    class Curriculum(Callback):
        def on_epoch_begin(self, net, **kwargs):
            self.own.strength *= len(net.history)

    made = Curriculum()
    made.own = Strength(strength)
    return made


def by_raising(strength):
    class Stop(Callback):
        def on_epoch_end(self, net, **kwargs):
            if len(net.history) > own:
                raise KeyboardInterrupt

    own = strength
    return Stop()


@pytest.mark.parametrize("make", [by_global, by_closure, by_attribute, by_raising])
def test_a_callback_that_reaches_training_by_another_way_counts(make):
    estimator = SoftmaxClassifier(**SMALL)
    estimator.image_shape_ = X.shape[1:]
    tokens = [
        fingerprint(estimator.set_params(callbacks=[make(s)]), torch.device("cpu"), {}, "")
        for s in (1.0, 2.0, 1.0)
    ]
    assert tokens[0] == tokens[2] != tokens[1]


SAME = {
    "strength": lambda: {"augment": Strength(0.5, a={"b": {1, 2, "c"}}, seen=np.ones(3))},
    "lambda": lambda: {**STOP, "scoring": lambda e, X, y: e.score(X, y) + FACTOR},
    "partial": lambda: {**STOP, "scoring": functools.partial(score, bonus=1)},
    "object": lambda: {**STOP, "scoring": Scorer(np.float32(0.5))},
    "module": lambda: {"backbone": seeded_module(0)},
    "clipping": lambda: {"callbacks": [GradientNormClipping(0.1)]},
    "clipping of one's own": lambda: {"callbacks": [Clip(0.1)]},
    "generator": lambda: {"random_state": np.random.RandomState(3)},
    "sampler of images": lambda: {"sampler": SPMixSampler()},
}


@pytest.mark.parametrize("make", SAME.values(), ids=SAME)
def test_the_same_fit_goes_on(make, tmp_path):
    """Parameters are made anew, as after a crash."""
    crash(tmp_path, make())
    assert n_epochs(tmp_path, make()) == 2


def test_loggers_do_not_count(tmp_path):
    crash(tmp_path, {})
    assert n_epochs(tmp_path, {"callbacks": [PrintLog(sink=lambda line: None)]}) == 2


class Own(SoftmaxClassifier):
    def _n_epochs(self, n_samples):
        return 5


def test_a_subclass_is_another_estimator(tmp_path):
    first = SoftmaxClassifier(**SMALL, checkpoint_dir=tmp_path)
    other = type("SoftmaxClassifier", (Own,), {})(**SMALL, checkpoint_dir=tmp_path)
    for clf in (first, other):
        with pytest.raises(RuntimeError, match="power cut"):
            clf.set_params(callbacks=[CrashAfter(2)]).fit(X, Y)
    assert len(list(tmp_path.iterdir())) == 2


# -------------------------------------------------------------------- what cannot be told apart


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("augment", {"augment": Strength(threading.Lock())}),
        ("augment", {"augment": Strength(n for n in range(3))}),
        ("scoring", {**STOP, "scoring": closure(threading.Lock())}),
        ("callbacks", {"callbacks": [Clip(threading.Lock())]}),
    ],
    ids=["lock", "generator", "lock in a closure", "lock in a callback"],
)
def test_what_has_no_state_to_read_is_refused_by_name(name, params, tmp_path):
    with pytest.raises(ValueError, match=rf"^checkpoint_dir: {name}=.* checkpoint_dir=None"):
        SoftmaxClassifier(**{**SMALL, **params}, checkpoint_dir=tmp_path).fit(X, Y)
    assert not list(tmp_path.iterdir())


def test_a_large_object_is_named_by_its_class(tmp_path):
    backbone = torch.nn.Sequential(*[torch.nn.Conv2d(3, 3, 1) for _ in range(9)])
    backbone.lock = (n for n in range(3))
    with pytest.raises(
        ValueError, match=r"^x: backbone=Sequential\(\.\.\.\) cannot be told"
    ) as told:
        digest_of(backbone, "backbone", "x")
    assert len(str(told.value)) < 300


def hooked(*, first, flags=True):
    """A module with two hooks, after so many of other modules."""
    for _ in range(first):
        torch.nn.ReLU().register_forward_hook(print)
    module = torch.nn.ReLU()
    module.register_forward_pre_hook(closure(1), with_kwargs=flags)
    module.register_forward_pre_hook(closure(2), with_kwargs=not flags)
    module.register_forward_hook(closure(3))
    return digest_of(module, "x")


def test_hooks_count_and_their_number_in_the_process_does_not():
    assert hooked(first=0) == hooked(first=3)
    assert (
        len({hooked(first=0), hooked(first=0, flags=False), digest_of(torch.nn.ReLU(), "x")}) == 3
    )


def test_an_object_that_contains_itself():
    loop, other = [1], [2]
    loop.append(loop)
    other.append(other)
    assert digest_of(loop, "x") != digest_of(other, "x")


def test_the_digest_is_the_same_in_every_process():
    code = """
import sys, json
sys.path.insert(0, sys.argv[1])
from tests._training.test_digests import SAME, OTHER
from sklearn_medimb._training.digests import digest_of
values = [make() for make in SAME.values()] + [v for pair in OTHER.values() for v in pair]
print(json.dumps([digest_of(value, "value").hex() for value in values]))
"""
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", code, root]
    env = {**os.environ, "PYTHONHASHSEED": "1"}  # another one than here
    there = subprocess.run(command, env=env, check=True, capture_output=True).stdout
    values = [make() for make in SAME.values()] + [v for pair in OTHER.values() for v in pair]
    here = [digest_of(value, "value").hex() for value in values]
    assert json.loads(there) == here
    assert len(set(here)) > 40


# -------------------------------------------------------------------- data


class Items:
    """A lazy container of one's own."""

    def __init__(self, images):
        self.images = images
        self.shape, self.ndim, self.dtype = images.shape, images.ndim, images.dtype

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return self.images[row]


def mapped(images, tmp_path):
    np.save(tmp_path / "images.npy", images)
    return MappedImages(tmp_path / "images.npy")


CONTAINERS = {
    "array": lambda images, folder: images,
    "lazy": lambda images, folder: Items(images),
    "dataset": lambda images, folder: DatasetImages(TensorDataset(torch.from_numpy(images))),
    "file": mapped,
}


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
@pytest.mark.parametrize("rows", [range(16, 80), [17]], ids=["64 of 80", "one"])
def test_other_images_are_another_fit(make, rows, tmp_path):
    other, folder = X.copy(), tmp_path / "checkpoints"
    other[list(rows)] = 255 - other[list(rows)]
    crash(folder, {}, make(X, tmp_path))
    assert n_epochs(folder, {}, make(other, tmp_path)) == 4
    assert n_epochs(folder, {}, make(X, tmp_path)) == 2


def test_one_pixel_of_a_large_array_counts():
    images = np.zeros((3000, 3, 64, 64), dtype=np.uint8)

    def digest():
        return data_digest(read_images(SoftmaxClassifier(), images, reset=True), np.arange(3000))

    before = digest()
    assert digest() == before
    images[1234, 1, 17, 5] = 1
    assert digest() != before


def changed(values, *rows):
    values = values.copy()
    values[list(rows)] = values[list(rows[::-1])]
    return values


def test_labels_weights_and_rows_of_no_weight_count(tmp_path):
    weight = np.ones(len(Y))
    first, second = np.flatnonzero(Y == 0)[:2]
    without = [np.where(np.arange(len(Y)) == row, 0.0, weight) for row in (first, second)]
    crash(tmp_path, {})
    crash(tmp_path, {}, y=changed(Y, np.argmin(Y), np.argmax(Y)))
    crash(tmp_path, {}, y=np.array(["b", "c", "d"])[Y])
    for given in (weight * 2, *without):
        crash(tmp_path, {}, sample_weight=given)
    assert len(list(tmp_path.iterdir())) == 6


def test_patients_of_unlabelled_rows_count(tmp_path):
    y, groups = np.where(np.arange(len(Y)) < 8, -1, Y), np.arange(len(Y))
    encoder = AMIMVEncoder(max_epochs=2, batch_size=32)
    params = {**SMALL, "checkpoint_dir": tmp_path, "callbacks": [CrashAfter(1)]}
    clf = AMIMVClassifier(**params, pretrain=encoder)
    for patients in (groups, np.where(groups < 4, 0, groups), np.where(groups < 5, 0, groups)):
        with pytest.raises(RuntimeError, match="power cut"):
            clf.fit(X, y, groups=patients)
    assert len(list(tmp_path.iterdir())) == 3
