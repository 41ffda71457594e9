"""Thresholds keep what they promise, and refuse what they cannot."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import sklearn
from scipy import stats
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.datasets import make_classification
from sklearn.ensemble import RandomForestClassifier
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    StratifiedGroupKFold,
    StratifiedKFold,
    cross_validate,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import estimator_checks_generator

from sklearn_medimb import SoftmaxClassifier
from sklearn_medimb.decisions import OperatingPoint, PriorShift, _operating_point
from sklearn_medimb.decisions._bounds import confidence_of
from sklearn_medimb.metrics import Interval, scorers
from sklearn_medimb.utils.estimator_checks import LazyImages

STUDIES = 300
# What 300 studies that keep a promise with .95 fall below once in a thousand times.
LEAST = stats.binom.ppf(1e-3, STUDIES, 0.95) / STUDIES


class FirstColumn(ClassifierMixin, BaseEstimator):
    """Its score is the first column: 0 on average for the well, 2 for the ill, deviation 1."""

    classes_ = np.array([0, 1])

    def fit(self, X, y):
        return self

    def __sklearn_is_fitted__(self):
        return True

    def decision_function(self, X):
        return X[:, 0]

    def predict(self, X):
        return (X[:, 0] > 1).astype(int)


KNOWN = FrozenEstimator(FirstColumn())


def study(rng, n_ill, n_well, images=1, rho=0.0, hard=0.0):
    """Scores of patients; a share of them is 3 lower in all images of the patient."""
    y = np.repeat([0, 1], [n_well, n_ill])
    patient = np.arange(len(y)) // images
    X = np.sqrt(rho) * rng.normal(size=len(y))[patient]
    X += np.sqrt(1 - rho) * rng.normal(size=len(y)) + 2 * y
    X -= 3 * (rng.random(len(y)) < hard)[patient]
    return X[:, np.newaxis], y, patient if images > 1 else None


@pytest.fixture
def without_intervals(monkeypatch):
    """Studies by the hundred need their thresholds only."""
    nothing = Interval(*np.zeros((3, 4)))
    monkeypatch.setattr(_operating_point, "metric_interval", lambda *_, **__: nothing)


@pytest.fixture
def binary():
    return make_classification(600, weights=[0.75], class_sep=0.8, random_state=0)


# ---------------------------------------------------------------- promises


@pytest.mark.parametrize(
    ("aim", "n_ill", "n_well"),
    [
        ({"min_sensitivity": 0.95}, 59, 100),
        ({"min_sensitivity": 0.9}, 150, 100),
        ({"min_sensitivity": 0.8}, 40, 100),
        ({"min_specificity": 0.9}, 40, 150),
    ],
)
def test_promise_holds_in_simulated_studies(aim, n_ill, n_well, without_intervals):
    rng = np.random.default_rng(0)
    clf = OperatingPoint(KNOWN, **aim)
    t = np.array([clf.fit(*study(rng, n_ill, n_well)[:2]).threshold_ for _ in range(STUDIES)])
    true = stats.norm.sf(t - 2) if "min_sensitivity" in aim else stats.norm.cdf(t)
    kept = (true >= next(iter(aim.values()))).mean()
    assert kept >= LEAST
    assert kept < 0.995  # no more caution than whole numbers of patients ask for


def test_threshold_without_a_promise_misses_its_aim_half_of_the_time(without_intervals):
    rng = np.random.default_rng(0)
    clf = OperatingPoint(KNOWN, min_sensitivity=0.9, confidence=None)
    t = [clf.fit(*study(rng, 100, 50)[:2]).threshold_ for _ in range(STUDIES)]
    assert 0.35 < (stats.norm.sf(np.array(t) - 2) >= 0.9).mean() < 0.65


@pytest.mark.parametrize(
    ("promised", "images", "rho", "hard"),
    [(0.9, 4, 0.95, 0.0), (0.95, 4, 0.3, 0.0), (0.9, 4, 0.2, 0.05)],
)
def test_promise_holds_with_several_images_of_a_patient(
    promised, images, rho, hard, without_intervals
):
    rng = np.random.default_rng(0)
    clf = OperatingPoint(KNOWN, min_sensitivity=promised)
    t, plain = [], []
    for _ in range(STUDIES):
        X, y, groups = study(rng, 100 * images, 20 * images, images, rho, hard)
        t.append(clf.fit(X, y, groups=groups).threshold_)
        if rho > 0.9:
            plain.append(clf.fit(X, y).threshold_)

    def kept(t):
        t = np.array(t) - 2
        return ((1 - hard) * stats.norm.sf(t) + hard * stats.norm.sf(t + 3) >= promised).mean()

    assert kept(t) >= LEAST
    if rho > 0.9:
        assert kept(plain) < 0.88  # what one gets who counts images as patients


def test_promise_holds_for_a_classifier_of_its_own_folds(without_intervals):
    rng = np.random.default_rng(0)
    clf = OperatingPoint(LogisticRegression(), min_sensitivity=0.9, random_state=0)
    kept = []
    for _ in range(60):
        y = np.repeat([0, 1], [150, 60])
        X = rng.normal(size=(210, 4)) + 1.2 * y[:, np.newaxis]
        clf.fit(X, y)
        w, b = clf.estimator_.coef_[0], clf.estimator_.intercept_[0]
        cut = np.log(clf.threshold_ / (1 - clf.threshold_)) - b
        kept.append(stats.norm.sf((cut - 1.2 * w.sum()) / np.linalg.norm(w)) >= 0.9)
    assert np.mean(kept) >= stats.binom.ppf(1e-3, 60, 0.95) / 60


def test_bound_is_the_binomial_tail():
    missed = np.arange(20)
    wanted = stats.binom.sf(missed, 200, 0.1)  # that more than these are missed
    np.testing.assert_allclose(confidence_of(missed, 200, 0.1), wanted, rtol=1e-10)


def test_patients_with_one_image_each_are_samples():
    X, y, _ = study(np.random.default_rng(0), 100, 100)
    clf = OperatingPoint(KNOWN, min_sensitivity=0.9)
    assert clf.fit(X, y).threshold_ == clf.fit(X, y, groups=np.arange(200)).threshold_


def test_intervals_cover_in_simulated_studies():
    rng = np.random.default_rng(0)
    clf = OperatingPoint(KNOWN, min_sensitivity=0.9, prevalence=0.05)
    found = []
    for _ in range(100):
        clf.fit(*study(rng, 200, 400)[:2])
        se, sp = stats.norm.sf(clf.threshold_ - 2), stats.norm.cdf(clf.threshold_)
        ppv = 0.05 * se / (0.05 * se + 0.95 * (1 - sp))
        npv = 0.95 * sp / (0.95 * sp + 0.05 * (1 - se))
        true = {"sensitivity_": se, "specificity_": sp, "ppv_": ppv, "npv_": npv}
        found.append([getattr(clf, k).low <= v <= getattr(clf, k).high for k, v in true.items()])
    assert 0.93 <= np.mean(found) <= 0.97
    assert (np.mean(found, axis=0) > 0.9).all()


def test_rates_are_those_of_the_threshold(binary):
    X, y = binary
    rng = np.random.default_rng(0)
    X, y, _ = study(rng, 100, 200)
    clf = OperatingPoint(KNOWN, min_sensitivity=0.9, prevalence=0.1).fit(X, y)
    se = (X[y == 1] >= clf.threshold_).mean()
    sp = (X[y == 0] < clf.threshold_).mean()
    assert clf.sensitivity_.score == pytest.approx(se, rel=1e-12)
    assert clf.specificity_.score == pytest.approx(sp, rel=1e-12)
    wanted = 0.1 * se / (0.1 * se + 0.9 * (1 - sp))
    assert clf.ppv_.score == pytest.approx(wanted, rel=1e-12)
    wanted = 0.9 * sp / (0.9 * sp + 0.1 * (1 - se))
    assert clf.npv_.score == pytest.approx(wanted, rel=1e-12)
    np.testing.assert_array_equal(clf.predict(X), (X[:, 0] >= clf.threshold_).astype(int))
    assert clf.fit(X, y).prevalence_ == 0.1


def test_least_cost_is_that_of_trying_all_thresholds():
    X, y, _ = study(np.random.default_rng(0), 40, 160)
    clf = OperatingPoint(KNOWN, cost=(20, 1), prevalence=0.03).fit(X, y)

    def cost(t):
        missed, alarms = (X[y == 1] < t).mean(), (X[y == 0] >= t).mean()
        return 20 * 0.03 * missed + 0.97 * alarms

    assert cost(clf.threshold_) == pytest.approx(min(map(cost, [*X[:, 0], np.inf])))
    dear = OperatingPoint(KNOWN, cost=(2000, 1), prevalence=0.03).fit(X, y)
    assert dear.threshold_ < clf.threshold_
    X[0] = 99  # of someone who is well
    cheap = OperatingPoint(KNOWN, cost=(0.01, 1), prevalence=0.03).fit(X, y)
    assert not cheap.predict(X).any()
    assert np.isnan(cheap.ppv_.score)


def test_ties_err_on_the_safe_side():
    X = np.repeat([0.0, 1.0, 2.0], [40, 30, 30])[:, np.newaxis]
    y = np.repeat([0, 1, 0, 1], [35, 5, 30, 30])
    X = X[np.argsort(y, kind="stable")]
    y = np.sort(y)
    clf = OperatingPoint(KNOWN, min_sensitivity=0.6).fit(X, y)
    assert clf.sensitivity_.score >= 0.6
    strict = OperatingPoint(KNOWN, min_specificity=0.4).fit(X, y)
    assert strict.specificity_.score >= 0.4


# ---------------------------------------------------------------- labels, classifiers, tools


def test_side_of_several_labels_predicts_the_most_probable_of_it():
    X, y = make_classification(900, n_classes=4, n_informative=6, random_state=0)
    y = np.array(["naevus", "keratosis", "melanoma", "carcinoma"])[y]
    clf = OperatingPoint(
        LogisticRegression(),
        min_sensitivity=0.9,
        positive=["melanoma", "carcinoma"],
        random_state=0,
    ).fit(X, y)
    proba, predicted = clf.predict_proba(X), clf.predict(X)
    malignant = np.isin(clf.classes_, ["melanoma", "carcinoma"])
    called = proba[:, malignant].sum(axis=1) >= clf.threshold_
    np.testing.assert_array_equal(np.isin(predicted, clf.classes_[malignant]), called)
    of_side = clf.classes_[malignant][proba[:, malignant].argmax(axis=1)]
    np.testing.assert_array_equal(predicted[called], of_side[called])
    assert set(predicted) == set(y)
    scoring = scorers("sensitivity", "balanced_accuracy", positive=["melanoma", "carcinoma"])
    done = cross_validate(clf, X, y, scoring=scoring, cv=3, error_score="raise")
    assert done["test_sensitivity"].mean() > 0.85


def test_either_label_may_be_the_disease(binary):
    X, y = binary
    names = np.array(["ill", "well"])[y]
    clf = OperatingPoint(LogisticRegression(), min_sensitivity=0.8, random_state=0)
    mirrored = clone(clf).set_params(positive="ill").fit(X, names)
    assert mirrored.sensitivity_ == clone(clf).set_params(positive=0).fit(X, y).sensitivity_
    assert (mirrored.predict(X)[names == "ill"] == "ill").mean() > 0.75
    scores = OperatingPoint(LinearSVC(), min_sensitivity=0.8, positive=0, random_state=0).fit(X, y)
    assert (scores.predict(X)[y == 0] == 0).mean() > 0.75


def test_classifier_sees_labels_as_they_are(binary):
    X, y = binary
    names = np.array(["benign", "malignant"])[y]
    weights = {"benign": 1, "malignant": 9}
    clf = OperatingPoint(
        PriorShift(LogisticRegression(class_weight=weights), {"benign": 0.99, "malignant": 0.01}),
        min_sensitivity=0.8,
        positive="malignant",
    ).fit(X, names)
    assert set(clf.predict(X)) == {"benign", "malignant"}


def test_no_patient_is_in_training_and_test(binary):
    X, y = binary
    groups = np.arange(len(y)) // 3
    seen = []

    class Spy(LogisticRegression):
        def fit(self, X, y, groups=None):
            seen.append(set(np.asarray(groups).tolist()))
            return super().fit(X, y)

    OperatingPoint(Spy(), min_sensitivity=0.7, cv=3).fit(X, y, groups=groups)
    assert len(seen) == 4
    assert seen[-1] == set(groups.tolist())
    assert len(seen[0] | seen[1] | seen[2]) == 200
    assert not seen[0] & seen[1] & seen[2]


def test_composes_with_scikit_learn(binary):
    X, y = binary
    made = make_pipeline(StandardScaler(), RandomForestClassifier(10, random_state=0))
    clf = OperatingPoint(made, min_sensitivity=0.8, cv=3, random_state=0, n_jobs=1)
    search = GridSearchCV(
        clf,
        {"estimator__randomforestclassifier__max_depth": [2, 5]},
        scoring=scorers("specificity", "sensitivity"),
        refit="specificity",
        cv=2,
    ).fit(X, y)
    loaded = pickle.loads(pickle.dumps(search.best_estimator_))
    np.testing.assert_array_equal(loaded.predict(X), search.predict(X))
    assert loaded.n_features_in_ == X.shape[1]
    again = clone(clf).fit(X, y)
    assert again.threshold_ == clone(clf).fit(X, y).threshold_


def test_patients_are_routed(binary):
    X, y = binary
    groups = np.arange(len(y)) // 3
    with sklearn.config_context(enable_metadata_routing=True):
        clf = OperatingPoint(LogisticRegression(), min_sensitivity=0.7, random_state=0)
        done = cross_validate(
            clf,
            X,
            y,
            cv=GroupKFold(3),
            params={"groups": groups},
            return_estimator=True,
            return_indices=True,
            error_score="raise",
        )
        for fitted, train in zip(done["estimator"], done["indices"]["train"], strict=True):
            wanted = clone(clf).fit(X[train], y[train], groups=groups[train])
            assert fitted.threshold_ == wanted.threshold_
            assert wanted.threshold_ != clone(clf).fit(X[train], y[train]).threshold_


def test_images_and_lazy_images(tiny):
    rng = np.random.default_rng(0)
    y = np.repeat(["benign", "malignant"], [30, 20])
    X = rng.integers(0, 100, (50, 12, 12)).astype(np.uint8)
    X[y == "malignant", :6] += 100
    groups = np.arange(50) // 2
    net = SoftmaxClassifier(**tiny, early_stopping=True)
    clf = OperatingPoint(
        net, min_sensitivity=0.6, confidence=0.9, positive="malignant", cv=2, random_state=0
    ).fit(X, y, groups=groups)
    assert clf.sensitivity_.score >= 0.6
    lazy = LazyImages(X)
    found = clone(clf).fit(lazy, y, groups=groups)
    np.testing.assert_array_equal(found.predict(lazy), clf.predict(X))
    assert not lazy.was_converted


def test_scikit_learn_checks(without_intervals):
    """All but two: a threshold that is not .5, and texts, of which nobody says which is ill."""
    clf = OperatingPoint(
        LogisticRegression(), min_sensitivity=0.9, confidence=None, cv=2, random_state=0
    )
    against = {
        "check_classifiers_train": "predict is to differ from the greater probability",
        "check_classifiers_classes": "positive= has to be said of texts",
        "check_array_api_input": "needs SCIPY_ARRAY_API",
    }
    failed = []
    for estimator, check in estimator_checks_generator(clf):
        name = check.func.__name__
        if name not in against:
            check(estimator)
            continue
        try:
            check(clone(estimator))
        except Exception:
            failed.append(name)
    assert {"check_classifiers_train", "check_classifiers_classes"} <= set(failed)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "exactly one of min_sensitivity, min_specificity and cost, not none"),
        ({"min_sensitivity": 0.9, "cost": (1, 1)}, "not min_sensitivity and cost"),
        ({"min_sensitivity": 1}, "'min_sensitivity' parameter"),
        ({"cost": (1, 0)}, "cost=.* two numbers above 0"),
        ({"cost": (1,)}, "cost=.* two numbers above 0"),
        ({"cost": ("dear", 1)}, "cost=.* two numbers above 0"),
        ({"cost": (1, 1), "prevalence": 0}, "prevalence=0 must be a number between 0 and 1"),
        ({"cost": (1, 1), "prevalence": 1.5}, r"prevalence=1\.5 must be"),
        ({"cost": (1, 1), "prevalence": np.nan}, "prevalence=nan must be"),
        ({"cost": (1, 1), "prevalence": "0.1"}, "prevalence='0.1' must be"),
        ({"cost": (1, 1), "positive": 2}, r"positive=2 names \[2\], which are not among \[0, 1\]"),
        ({"cost": (1, 1), "positive": [0, 1]}, "not all"),
        ({"cost": (1, 1), "positive": []}, "must name some"),
        ({"min_sensitivity": 0.99}, r"min_sensitivity=0\.99 .* 152 positive samples: .* 0\.980"),
        ({"min_specificity": 0.999}, r"min_specificity=0\.999 .* negative samples: .* takes 2995"),
        ({"cost": (1, 1), "cv": [([0, 1, 500], [2])]}, "cv tests row 0 0 times"),
        ({"cost": (1, 1), "confidence": 1.0}, "'confidence' parameter"),
    ],
)
def test_refuses_what_cannot_be(params, message, binary):
    X, y = binary
    clf = OperatingPoint(LogisticRegression(), **params)
    with pytest.raises(ValueError, match=message):
        clf.fit(X, y)
    assert not hasattr(clf, "estimator_")


def test_refuses_few_patients_however_many_images():
    X, y, groups = study(np.random.default_rng(0), 400, 400, images=10)
    clf = OperatingPoint(KNOWN, min_sensitivity=0.95)
    clf.fit(X, y)
    with pytest.raises(ValueError, match=r"40 positive patients.* at most 0\.928 can; it takes 59"):
        clf.fit(X, y, groups=groups)
    assert clf.set_params(min_sensitivity=0.92).fit(X, y, groups=groups).sensitivity_.score > 0.92


def test_refuses_texts_of_which_nobody_says_which_is_ill(binary):
    X, y = binary
    with pytest.raises(ValueError, match=r"positive=None.* which of the labels \['a', 'b'\]"):
        OperatingPoint(LogisticRegression(), cost=(1, 1)).fit(X, np.array(["a", "b"])[y])


def test_refuses_bad_data(binary):
    X, y = binary
    clf = OperatingPoint(LogisticRegression(), cost=(1, 1))
    with pytest.raises(ValueError, match=r"at least 2 classes in y, but found 1 class: \[0\]"):
        clf.fit(X, np.zeros(len(y), dtype=int))
    with pytest.raises(ValueError, match="y has no label in row 3"):
        clf.fit(X, np.where(np.arange(len(y)) == 3, np.nan, y))
    with pytest.raises(ValueError, match="groups has no entry in row 0"):
        clf.fit(X, y, groups=[None, *range(len(y) - 1)])
    groups = np.arange(len(y)) // 3
    with pytest.raises(ValueError, match="cv cuts patients"):
        clf.set_params(cv=StratifiedKFold(3)).fit(X, y, groups=groups)
    clf.set_params(cv=StratifiedGroupKFold(3)).fit(X, y, groups=groups)
    order = np.argsort(y, kind="stable")
    n_well = len(y) - y.sum()
    first = [(order[n_well:], order[:n_well]), (order[:n_well], order[n_well:])]
    with pytest.raises(ValueError, match="leaves fold 0 no negative sample to train on"):
        clf.set_params(cv=first).fit(X, y)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_refuses_probabilities_that_are_none(binary):
    X, y = binary

    class Broken(LogisticRegression):
        def predict_proba(self, X):
            proba = super().predict_proba(X)
            proba[1] = np.nan
            return proba

    with pytest.raises(ValueError, match=r"predict_proba of Broken gives \[nan, nan\] for row 1"):
        OperatingPoint(Broken(), cost=(1, 1)).fit(X, y)


def test_refuses_classes_that_scores_do_not_tell_apart():
    X, y = make_classification(200, n_classes=3, n_informative=4, random_state=0)
    with pytest.raises(ValueError, match="LinearSVC has no predict_proba"):
        OperatingPoint(LinearSVC(), cost=(1, 1), positive=2).fit(X, y)


def test_weights_reach_the_classifier(binary):
    X, y = binary
    weight = np.where(y == 1, 20.0, 1.0)
    clf = OperatingPoint(LogisticRegression(), min_sensitivity=0.8, random_state=0)
    heavy = clone(clf).fit(X, y, sample_weight=weight)
    assert heavy.predict_proba(X)[:, 1].mean() > clf.fit(X, y).predict_proba(X)[:, 1].mean() + 0.1
    assert heavy.sensitivity_.score == pytest.approx(clf.sensitivity_.score, abs=0.03)


def test_columns_that_are_not_those_of_the_classes_are_refused():
    class Narrow(LogisticRegression):
        def predict_proba(self, X):
            return super().predict_proba(X)[:, :1]

    X, y = np.arange(40.0)[:, np.newaxis], np.arange(40) % 2
    with pytest.raises(ValueError, match=r"Narrow gives 1 columns for the classes \[0, 1\]"):
        OperatingPoint(Narrow(), cost=(1, 1)).fit(X, y)
