"""Probabilities at true frequencies are those of Bayes' formula."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from scipy import stats
from sklearn.base import clone
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.svm import LinearSVC
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.estimator_checks import estimator_checks_generator

from sklearn_medimb import SoftmaxClassifier
from sklearn_medimb.decisions import OperatingPoint, PriorShift, shift_prior


@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_formula_on_a_mixture_whose_densities_are_known(n_classes):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 1)) * 3
    density = stats.norm.pdf(x, loc=np.arange(n_classes), scale=1 + 0.2 * np.arange(n_classes))
    before, after = rng.dirichlet(np.ones(n_classes), size=2)

    def posterior(prior):
        joint = density * prior
        return joint / joint.sum(axis=1, keepdims=True)

    found = shift_prior(posterior(before), train_prior=before, prevalence=after)
    np.testing.assert_allclose(found, posterior(after), rtol=1e-12, atol=1e-15)
    found = shift_prior(posterior(np.full(n_classes, 1 / n_classes)), train_prior="balanced",
                        prevalence=after)  # fmt: skip
    np.testing.assert_allclose(found, posterior(after), rtol=1e-12, atol=1e-15)
    back = shift_prior(found, train_prior=after, prevalence=before)
    np.testing.assert_allclose(back, posterior(before), rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_zeros_and_ones_stay(dtype):
    proba = np.array([[0, 1], [1, 0], [1e-30, 1], [0.5, 0.5]], dtype=dtype)
    found = shift_prior(proba, train_prior="balanced", prevalence=1e-9)
    assert found.dtype == dtype
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[:2], proba[:2])
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
    assert found[3, 1] == pytest.approx(1e-9)


def test_balanced_classifier_is_brought_to_the_frequencies_of_its_training():
    X, y = make_classification(2000, weights=[0.9], class_sep=0.7, random_state=0)
    natural = LogisticRegression().fit(X, y).predict_proba(X)[:, 1]
    balanced = LogisticRegression(class_weight="balanced")
    clf = PriorShift(balanced, prevalence=float(y.mean())).fit(X, y)
    assert balanced.fit(X, y).predict_proba(X)[:, 1].mean() > 0.15
    assert np.abs(clf.predict_proba(X)[:, 1] - natural).mean() < 0.02
    # The other way: a natural one, asked as where all are equally frequent.
    clf = PriorShift(LogisticRegression(), prevalence=0.5, train_prior="training").fit(X, y)
    assert np.abs(clf.predict_proba(X) - balanced.predict_proba(X)).mean() < 0.05
    assert (clf.predict(X) == clf.predict_proba(X).argmax(axis=1)).all()


def test_labels_are_those_of_the_dicts():
    X, y = make_classification(300, n_classes=3, n_informative=4, random_state=0)
    y = np.array(["scar", "ill", "well"])[y]
    prevalence = {"well": 0.9, "ill": 0.01, "scar": 0.09}
    before = {"well": 0.2, "ill": 0.3, "scar": 0.5}
    clf = PriorShift(LogisticRegression(), prevalence, train_prior=before).fit(X, y)
    inner = clf.estimator_.predict_proba(X)  # ill, scar, well
    wanted = inner * np.array([0.01 / 0.3, 0.09 / 0.5, 0.9 / 0.2])
    wanted /= wanted.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(clf.predict_proba(X), wanted, rtol=1e-12)
    assert (clf.predict(X) == "well").mean() > 0.7
    two = PriorShift(LogisticRegression(), 0.01, positive="ill").fit(
        X, np.where(y == "ill", y, "-")
    )
    np.testing.assert_allclose(two.prevalence_, [0.99, 0.01])


def test_composes_with_networks_searches_and_operating_points(tiny, blobs, tmp_path):
    X, y = blobs
    groups = np.arange(len(y)) // 2
    shares = {0: 0.8, 1: 0.15, 2: 0.05}
    clf = PriorShift(SoftmaxClassifier(**tiny), shares)
    point = OperatingPoint(clf, min_sensitivity=0.5, confidence=0.8, positive=[1, 2], cv=2)
    point.set_params(random_state=0, estimator__estimator__early_stopping=True)
    point.fit(X, y, groups=groups)  # the network's validation split knows them, or it would warn
    assert point.predict_proba(X).shape == (len(y), 3)
    loaded = pickle.loads(pickle.dumps(point))
    np.testing.assert_array_equal(loaded.predict(X), point.predict(X))
    vectors = X.reshape(len(X), -1) / 255
    search = GridSearchCV(
        PriorShift(LogisticRegression(), shares), {"estimator__C": [0.1, 1]}, cv=2
    ).fit(vectors, y)
    np.testing.assert_allclose(search.predict_proba(vectors).sum(axis=1), 1)


@pytest.mark.parametrize(
    ("prevalence", "params", "message"),
    [
        (0, {}, "prevalence=0 must be a number between 0 and 1"),
        (1.2, {}, r"prevalence=1\.2 must be"),
        (None, {}, "prevalence=None must be"),
        ({0: 0.5, 2: 0.5}, {}, r"prevalence names \[0, 2\], but y holds \[0, 1\]"),
        ({0: 0.5, 1: 0.6}, {}, "prevalence=.* all of them 1"),
        ({0: 0.0, 1: 1.0}, {}, "prevalence=.* between 0 and 1"),
        ({0: "a", 1: 1.0}, {}, "prevalence=.* between 0 and 1"),
        (0.1, {"train_prior": {0: 1}}, r"train_prior names \[0\]"),
        (0.1, {"train_prior": "equal"}, "'train_prior' parameter"),
        (0.1, {"positive": "ill"}, "positive='ill' names"),
    ],
)
def test_refuses_shares_that_are_none(prevalence, params, message):
    X, y = make_classification(60, random_state=0)
    clf = PriorShift(LogisticRegression(), prevalence, **params)
    with pytest.raises(ValueError, match=message):
        clf.fit(X, y)
    assert not hasattr(clf, "classes_")


def test_refuses_one_number_for_many_classes_or_texts():
    X, y = make_classification(90, n_classes=3, n_informative=4, random_state=0)
    with pytest.raises(ValueError, match=r"one number, prevalence=0\.1: pass .* for the 3 classes"):
        PriorShift(LogisticRegression(), 0.1).fit(X, y)
    with pytest.raises(ValueError, match=r"positive=None.* which of the labels"):
        PriorShift(LogisticRegression(), 0.1).fit(X, np.where(y > 0, "ill", "well"))


@pytest.mark.parametrize(
    ("proba", "params", "message"),
    [
        ([[0.2, 0.2]], {"train_prior": "balanced", "prevalence": 0.1}, "no probabilities in row 0"),
        ([[np.nan, 1]], {"train_prior": "balanced", "prevalence": 0.1}, "proba contains NaN"),
        ([[-0.5, 1.5]], {"train_prior": "balanced", "prevalence": 0.1}, "row 0"),
        ([[0.5, 0.5]], {"train_prior": [1, 0], "prevalence": 0.1}, "train_prior=.* each of the 2"),
        ([[0.5, 0.3, 0.2]], {"train_prior": "balanced", "prevalence": 0.1}, "each of the 3"),
    ],
)
def test_formula_refuses_what_are_no_probabilities(proba, params, message):
    with pytest.raises(ValueError, match=message):
        shift_prior(proba, **params)


def test_needs_probabilities():
    X, y = make_classification(60, random_state=0)
    with pytest.raises(ValueError, match="'estimator' parameter"):
        PriorShift(LinearSVC(), 0.1).fit(X, y)


def test_scikit_learn_checks():
    """All but texts, of which nobody says which the share is of, and three classes of which."""
    against = {"check_classifiers_classes", "check_array_api_input"}
    clf = PriorShift(LogisticRegression(), 0.5)
    for estimator, check in estimator_checks_generator(clf):
        if check.func.__name__ not in against:
            check(clone(estimator))


def test_shares_of_training_are_weighed_as_the_images_were():
    X, y = make_classification(1000, weights=[0.9], random_state=0)
    weight = compute_sample_weight("balanced", y)
    how = {"prevalence": float(y.mean()), "train_prior": "training"}
    clf = PriorShift(LogisticRegression(), **how).fit(X, y, sample_weight=weight)
    np.testing.assert_allclose(clf.train_prior_, [0.5, 0.5])
    assert clf.predict_proba(X)[:, 1].mean() == pytest.approx(y.mean(), abs=0.03)
    plain = PriorShift(LogisticRegression(), **how).fit(X, y)
    np.testing.assert_allclose(plain.train_prior_, [1 - y.mean(), y.mean()])


class Forgetful(LogisticRegression):
    """Takes label 9 for none."""

    def fit(self, X, y):
        return super().fit(X[y != 9], y[y != 9])


def test_shares_of_a_class_that_the_classifier_does_not_know_are_refused():
    X, y = make_classification(60, n_classes=3, n_informative=4, random_state=0)
    y[y == 2] = 9
    clf = PriorShift(Forgetful(), prevalence={0: 0.5, 1: 0.4, 9: 0.1})
    with pytest.raises(ValueError, match=r"y holds \[0, 1, 9\], but the classifier knows \[0, 1\]"):
        clf.fit(X, y)
    assert not hasattr(clf, "estimator_")
