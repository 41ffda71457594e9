"""A refused fit leaves an estimator as it was: not fitted, or fitted by the fit before."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.exceptions import NotFittedError

from sklearn_medimb import (
    BalancedVirtualFeatures,
    ClassifierRetraining,
    MetricTwoStageClassifier,
    SaliencyMap,
    SPMixSampler,
)
from sklearn_medimb.rebalance import HEADS, resolve_head

RNG = np.random.default_rng(0)
VECTORS, CLASSES = RNG.normal(size=(60, 5)), np.arange(60) % 3
IMAGES = RNG.integers(0, 256, (60, 8, 8), dtype=np.uint8)
TAIL = np.repeat([0, 1, 2], [40, 15, 5])


def fitted(estimator):
    """What it has learned, by value."""
    return {k: np.array(v).tolist() for k, v in vars(estimator).items() if k.endswith("_")}


def with_unknown_weight(head):
    return head.set_params(class_weight={"d": 1.0})


def fails_late(head, monkeypatch):
    """Let the solver fail, after everything else is known."""

    def solve(*args):
        head.n_iter_, head.scale_ = 7, 7
        raise ValueError("late")

    monkeypatch.setattr(head, "_solve", solve, raising=True)
    return head


@pytest.mark.parametrize("name", HEADS)
def test_heads(name, monkeypatch):
    head = resolve_head(name)
    with pytest.raises(ValueError, match="2 classes"):
        head.fit(VECTORS, np.zeros(60))
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="late"):
        fails_late(head, patch).fit(VECTORS, CLASSES)
    assert fitted(head) == {}
    with pytest.raises(NotFittedError):
        head.predict(VECTORS)
    before = fitted(head.fit(VECTORS, CLASSES))
    labels = np.array(["c", "b", "a"])[CLASSES]
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="late"):
        fails_late(head, patch).fit(VECTORS[:, :2], labels)
    assert fitted(head) == before
    assert set(head.predict(VECTORS)) == {0, 1, 2}


def test_a_head_after_a_class_weight_of_unknown_classes():
    head = ClassifierRetraining().fit(VECTORS, CLASSES)
    before = fitted(head)
    with pytest.raises(ValueError, match="class_weight"):
        with_unknown_weight(head).fit(VECTORS, np.array(["c", "b", "a"])[CLASSES])
    assert fitted(head) == before


@pytest.mark.parametrize(
    ("sampler", "X", "worse"),
    [
        (SPMixSampler(random_state=0), IMAGES, {"patch_size": (2, 2, 2)}),
        (BalancedVirtualFeatures(random_state=0), VECTORS, {"sampling_strategy": {9: 3}}),
    ],
)
def test_samplers(sampler, X, worse):
    kept = {name: sampler.get_params()[name] for name in worse}
    for method in ("fit_resample", "fit"):
        with pytest.raises(ValueError):
            sampler.set_params(**worse).fit_resample(X, TAIL)
        assert fitted(sampler) == {}
        with pytest.raises(ValueError):
            getattr(sampler, method)(X, np.zeros(60, dtype=int))
        assert fitted(sampler) == {}
    sampler.set_params(**kept).fit_resample(X, TAIL)
    before = fitted(sampler)
    with pytest.raises(ValueError):
        sampler.set_params(**worse).fit_resample(X[:, 1:], TAIL[::-1])
    with pytest.raises(ValueError):
        sampler.set_params(sampling_strategy={9: 3}).fit(X[:, 1:], TAIL[::-1])
    assert fitted(sampler) == before


def test_saliency_map(monkeypatch):
    maps = SaliencyMap().fit(IMAGES)
    before = fitted(maps)

    def warn(*args):
        raise UserWarning("made an error")

    monkeypatch.setattr("sklearn_medimb.saliency._maps.warn_of_flat_images", warn)
    with pytest.raises(UserWarning):
        maps.fit(IMAGES[:, 1:])
    assert fitted(maps) == before


def test_refit_head(tiny, blobs):
    X, y = blobs
    clf = MetricTwoStageClassifier(**tiny).fit(X, y)
    before = {k: v for k, v in vars(clf).items() if k.endswith("_")}
    with pytest.raises(ValueError):
        clf.refit_head(X, y, rebalance=ClassifierRetraining(class_weight={"d": 1.0}))
    assert all(vars(clf)[name] is value for name, value in before.items())


def test_ctrl_c_counts_as_a_failure(monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    head = ClassifierRetraining()
    monkeypatch.setattr(head, "_solve", stop)
    with pytest.raises(KeyboardInterrupt):
        head.fit(VECTORS, CLASSES)
    assert fitted(head) == {}
