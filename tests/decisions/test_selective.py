"""Who refuses the least certain errs less on the rest, and as little as promised."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import sklearn
from scipy import stats
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.datasets import make_classification
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_validate
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import estimator_checks_generator

from sklearn_medimb import SoftmaxClassifier
from sklearn_medimb.decisions import SelectiveClassifier, _selective, coverage_curve
from sklearn_medimb.metrics import Interval


class Calibrated(ClassifierMixin, BaseEstimator):
    """Says of a number between 0 and 1 that it is the chance of class 1, which is true."""

    classes_ = np.array([0, 1])

    def fit(self, X, y):
        return self

    def __sklearn_is_fitted__(self):
        return True

    def predict_proba(self, X):
        return np.hstack([1 - X, X])

    def predict(self, X):
        return (X[:, 0] > 0.5).astype(int)


KNOWN = FrozenEstimator(Calibrated())


@pytest.fixture
def without_intervals(monkeypatch):
    """What takes most of the time, where it is not asked for."""
    nothing = Interval(*np.zeros((3, 2)))
    monkeypatch.setattr(_selective, "metric_interval", lambda *_, **__: nothing)


def true_error(threshold):
    """Of uniform chances beyond a threshold: mean of 1 - p over p in [t, 1]."""
    return (1 - threshold) / 2


def study(rng, n, images=1):
    """Images of a patient have one chance, and one label."""
    x = rng.random(n)[np.arange(n * images) // images]
    y = (rng.random(n)[np.arange(n * images) // images] < x).astype(int)
    return x[:, np.newaxis], y


def test_curve_is_that_of_every_threshold():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 200)
    proba = rng.dirichlet(np.ones(3), 200).round(1)
    proba /= proba.sum(axis=1, keepdims=True)
    curve = coverage_curve(y, proba)
    certainty, wrong = proba.max(axis=1), proba.argmax(axis=1) != y
    assert curve.coverage[-1] == 1
    assert (np.diff(curve.threshold) < 0).all()
    for coverage, error, threshold in zip(*curve[:3], strict=True):
        decided = certainty >= threshold
        assert coverage == pytest.approx(decided.mean())
        assert error == pytest.approx(wrong[decided].mean())
    order = np.argsort(-certainty[::-1], kind="stable")
    distinct = coverage_curve(y[::-1], proba[::-1])
    assert distinct.area == pytest.approx(curve.area)
    risks = wrong[::-1][order].cumsum() / np.arange(1, 201)
    assert curve.area == pytest.approx(risks.mean(), abs=0.05)
    assert coverage_curve(["a", "b"], [0.2, 0.9]).area == 0
    names = coverage_curve(np.array(["a", "b", "c"])[y], proba)
    np.testing.assert_array_equal(names.error, curve.error)
    with pytest.raises(ValueError, match="must hold probabilities"):
        coverage_curve([0, 1], [[0.5, 0.6], [0.5, 0.5]])


@pytest.mark.parametrize(("images", "studies"), [(1, 300), (2, 100)])
def test_error_is_kept_in_simulated_studies(images, studies, without_intervals):
    rng = np.random.default_rng(0)
    clf = SelectiveClassifier(KNOWN, max_error=0.15)
    t = []
    for _ in range(studies):
        X, y = study(rng, 1200, images)
        groups = np.arange(len(y)) // images if images > 1 else None
        t.append(clf.fit(X, y, groups=groups).threshold_)
    t = np.maximum(t, 0.5)
    assert (true_error(np.array(t)) <= 0.15).mean() >= stats.binom.ppf(
        1e-3, studies, 0.95
    ) / studies
    assert true_error(np.mean(t)) > 0.08  # not by refusing everyone


def test_intervals_of_coverage_and_error_cover():
    rng = np.random.default_rng(0)
    clf = SelectiveClassifier(KNOWN, max_error=0.15, confidence=0.95)
    found = []
    for _ in range(30):
        clf.fit(*study(rng, 1500))
        t = max(clf.threshold_, 0.5)
        coverage, error = 2 * (1 - t), true_error(t)
        found.append(
            [
                clf.coverage_.low <= coverage <= clf.coverage_.high,
                clf.error_.low <= error <= clf.error_.high,
            ]
        )
    assert (np.mean(found, axis=0) > 0.85).all()


def test_coverage_is_as_asked_and_the_rest_errs_more():
    X, y = make_classification(900, n_classes=3, n_informative=5, random_state=0)
    y = np.array(["a", "b", "c"])[y]
    clf = SelectiveClassifier(LogisticRegression(max_iter=500), coverage=0.6, random_state=0)
    clf.fit(X[:600], y[:600])
    assert clf.coverage_.score == pytest.approx(0.6, abs=2e-3)
    X, y = X[600:], y[600:]
    accepted = clf.accepts(X)
    assert 0.5 < accepted.mean() < 0.7
    assert clf.score(X[accepted], y[accepted]) > clf.score(X, y) + 0.05
    np.testing.assert_array_equal(clf.predict(X), clf.estimator_.predict(X))
    np.testing.assert_array_equal(accepted, clf.predict_proba(X).max(axis=1) >= clf.threshold_)
    assert clf.set_params(coverage=1.0).fit(X, y).accepts(X).mean() > 0.98
    loaded = pickle.loads(pickle.dumps(clf))
    np.testing.assert_array_equal(loaded.accepts(X), clf.accepts(X))


def test_scores_without_probabilities_and_networks(tiny, blobs):
    X, y = make_classification(300, random_state=0)
    clf = SelectiveClassifier(LinearSVC(), coverage=0.5, random_state=0).fit(X, y)
    assert 0.4 < clf.accepts(X).mean() < 0.6
    X, y = blobs
    net = SoftmaxClassifier(**tiny, early_stopping=True)
    clf = SelectiveClassifier(net, coverage=0.5, cv=2, random_state=0)
    clf.fit(X, y, groups=np.arange(len(y)) // 2)
    assert clf.accepts(X).dtype == bool


def test_patients_are_routed():
    X, y = make_classification(300, random_state=0)
    groups = np.arange(300) // 3
    with sklearn.config_context(enable_metadata_routing=True):
        clf = SelectiveClassifier(LogisticRegression(), coverage=0.7, random_state=0)
        done = cross_validate(
            clf, X, y, cv=GroupKFold(3), params={"groups": groups}, return_estimator=True,
            return_indices=True,
        )  # fmt: skip
    train = done["indices"]["train"][0]
    wanted = clone(clf).fit(X[train], y[train], groups=groups[train])
    assert done["estimator"][0].threshold_ == wanted.threshold_


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "exactly one of coverage and max_error"),
        ({"coverage": 0.5, "max_error": 0.1}, "exactly one of coverage and max_error"),
        ({"coverage": 0}, "'coverage' parameter"),
        ({"max_error": 1}, "'max_error' parameter"),
        ({"max_error": 0.001}, r"max_error=0\.001 is not certain"),
    ],
)
def test_refuses_what_cannot_be(params, message):
    X, y = make_classification(100, random_state=0)
    clf = SelectiveClassifier(LogisticRegression(), **params)
    with pytest.raises(ValueError, match=message):
        clf.fit(X, y)
    assert not hasattr(clf, "estimator_")


def test_scikit_learn_checks(without_intervals):
    clf = SelectiveClassifier(LogisticRegression(), coverage=0.8, cv=2, random_state=0)
    for estimator, check in estimator_checks_generator(clf):
        if check.func.__name__ != "check_array_api_input":
            check(estimator)
