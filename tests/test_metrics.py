"""Measures against explicit formulas, on random and degenerate input; coverage of intervals."""

from __future__ import annotations

import math
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
from imblearn.metrics import geometric_mean_score
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, get_scorer
from sklearn.model_selection import GridSearchCV, cross_validate

from sklearn_medimb import SoftmaxClassifier
from sklearn_medimb.metrics import (
    expected_calibration_error,
    head_tail_gap,
    metric_interval,
    scorer_interval,
    scorers,
    shot_recall,
)


def predictions(n=200, n_classes=6, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, n_classes, n)
    return y, np.where(rng.random(n) < 0.5, y, rng.integers(0, n_classes, n))


# ---------------------------------------------------------------- recalls by frequency


@pytest.mark.parametrize("seed", range(5))
def test_shot_recall_is_the_mean_recall_of_each_group(seed):
    y, p = predictions(seed=seed)
    counts = {0: 500, 1: 101, 2: 100, 3: 20, 4: 19, 5: 3}
    found = shot_recall(y, p, counts, thresholds=(20, 100))

    def mean_recall(labels):
        return np.mean([(p[y == k] == k).mean() for k in labels])

    np.testing.assert_allclose(found, [mean_recall(g) for g in ([0, 1], [2, 3], [4, 5])])
    thirds = shot_recall(y, p, counts)
    np.testing.assert_allclose(thirds, [mean_recall(g) for g in ([0, 1], [2, 3], [4, 5])])
    assert head_tail_gap(y, p, counts) == thirds.many - thirds.few


def test_shot_recall_takes_training_labels_and_strings():
    y, p = np.array(["a", "b", "c", "c"]), np.array(["a", "b", "c", "a"])
    train = ["a"] * 9 + ["b"] * 4 + ["c"] * 2
    assert shot_recall(y, p, train) == (1.0, 1.0, 0.5)
    assert shot_recall(y, p, np.array(train, dtype=object)) == (1.0, 1.0, 0.5)


@pytest.mark.parametrize(
    ("counts", "thresholds", "wanted"),
    [
        ({0: 50, 1: 50}, (20, 100), (math.nan, 0.75, math.nan)),
        ({0: 50, 1: 50}, None, (math.nan, 0.75, math.nan)),  # equal classes stay together
        ({0: 50, 1: 5}, None, (1.0, math.nan, 0.5)),
        ({0: 50, 1: 5, 2: 1}, None, (1.0, 0.5, math.nan)),  # a class nobody has
        ({0: 500, 1: 300}, (20, 100), (0.75, math.nan, math.nan)),
    ],
)
def test_empty_group_is_nan_and_not_zero(counts, thresholds, wanted):
    found = shot_recall([0, 0, 1, 1], [0, 0, 1, 0], counts, thresholds=thresholds)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("labels", [[0, 1, 2], [3, 1, 2], ["a", "b", "c"]], ids=str)
def test_shot_recall_takes_counts_of_pandas_and_a_column_of_labels(labels):
    y_train = pd.Series(np.repeat(labels, [300, 50, 5]), name="grade").sample(
        frac=1, random_state=0
    )
    y, p = np.array(labels)[[0, 0, 1, 2, 2]], np.array(labels)[[0, 0, 0, 2, 1]]
    for counts in (
        y_train,
        y_train.reset_index(drop=True),
        y_train.to_frame(),
        y_train.astype("category"),
        y_train.value_counts(),
        y_train.value_counts().sort_index().rename(None),
        y_train.groupby(y_train).size(),
        y_train.astype("category").value_counts(),
    ):
        assert shot_recall(y, p, counts) == (1.0, 0.0, 0.5)


def test_shot_recall_refuses_a_series_of_two_meanings_and_shares():
    y = [1, 2]
    with pytest.raises(ValueError, match="counts by label or labels by row"):
        shot_recall(y, y, pd.Series({1: 2, 2: 1}))
    assert shot_recall(y, y, pd.Series([1, 1, 2]).value_counts())[::2] == (1, 1)
    for shares in (pd.Series([1, 1, 2]).value_counts(normalize=True), pd.Series({1: 0.7, 2: 0.3})):
        with pytest.raises(ValueError, match="whole numbers"):
            shot_recall(y, y, shares)
    with pytest.raises(ValueError, match=r"pass \{label: count\}"):
        shot_recall([0, 1], [0, 1], np.array([300, 5]))  # as np.bincount counts


def test_shot_recall_refuses_unknown_classes_and_crossed_thresholds():
    with pytest.raises(ValueError, match=r"lacks the classes \[2\]"):
        shot_recall([0, 2], [0, 0], {0: 3, 1: 4})
    with pytest.raises(ValueError, match="few <= many"):
        shot_recall([0, 1], [0, 0], {0: 3, 1: 4}, thresholds=(100, 20))
    with pytest.raises(ValueError, match="inconsistent"):
        shot_recall([0, 1], [0], {0: 3, 1: 4})


# ---------------------------------------------------------------- calibration


def slow_calibration(hit, confidence, edges):
    """Bin by bin."""
    total = 0.0
    for low, high, last in zip(
        edges[:-1], edges[1:], [False] * (len(edges) - 2) + [True], strict=True
    ):
        inside = (confidence >= low) & ((confidence <= high) if last else (confidence < high))
        if inside.any():
            total += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("n_bins", [1, 5, 15])
@pytest.mark.parametrize("seed", range(3))
def test_calibration_error_is_its_definition(n_bins, seed):
    rng = np.random.default_rng(seed)
    proba = rng.dirichlet(np.ones(4), 300)
    y = rng.integers(0, 4, 300)
    top = proba.argmax(1)
    edges = np.linspace(0, 1, n_bins + 1)
    wanted = slow_calibration(y == top, proba.max(1), edges)
    assert expected_calibration_error(y, proba, n_bins=n_bins) == pytest.approx(wanted)
    by_class = [slow_calibration(y == k, proba[:, k], edges) for k in range(4)]
    found = expected_calibration_error(y, proba, n_bins=n_bins, class_wise=True)
    assert found == pytest.approx(np.mean(by_class))
    quantiles = np.quantile(proba.max(1), np.linspace(0, 1, n_bins + 1))
    wanted = slow_calibration(y == top, proba.max(1), quantiles)
    found = expected_calibration_error(y, proba, n_bins=n_bins, strategy="quantile")
    assert found == pytest.approx(wanted)


def test_calibration_error_at_its_ends():
    y = np.array([0, 1, 1, 0])
    certain = np.eye(2)[y]
    assert expected_calibration_error(y, certain) == 0
    assert expected_calibration_error(y, certain[:, ::-1]) == 1
    assert expected_calibration_error(y, np.full((4, 2), 0.5)) == 0
    assert expected_calibration_error(y, certain[:, 1]) == 0
    assert expected_calibration_error(["b", "b"], [[0.0, 1.0]] * 2, labels=["a", "b"]) == 0


def test_class_wise_error_sees_a_rare_class_that_the_other_misses():
    y = np.repeat([0, 1], [990, 10])
    proba = np.tile([0.99, 0.01], (1000, 1))
    proba[y == 1] = [0.9999, 0.0001]
    proba[:10] = [0.9, 0.1]
    assert expected_calibration_error(y, proba, class_wise=True) > 0


@pytest.mark.parametrize(
    ("y", "proba", "params", "message"),
    [
        ([0, 1], [[0.5, 0.5, 0.0]] * 2, {}, "3 columns for 2 labels"),
        ([0, 1], [[0.5, 0.7]] * 2, {}, "sum to 1"),
        ([0, 1], [[-0.5, 1.5]] * 2, {}, ">= 0"),
        ([0, 1], [[np.nan, 1.0]] * 2, {}, "probabilities"),
        ([0, 2], [[0.5, 0.5]] * 2, {"labels": [0, 1]}, r"holds \[2\]"),
        ([0, 1], [[0.5, 0.5]] * 2, {"n_bins": 0}, "n_bins=0"),
        ([0, 1], [[0.5, 0.5]] * 2, {"strategy": "log"}, "strategy='log'"),
        ([0], [[0.5, 0.5]] * 2, {"labels": [0, 1]}, "inconsistent"),
    ],
)
def test_calibration_error_refuses_wrong_input(y, proba, params, message):
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(y, proba, **params)


# ---------------------------------------------------------------- intervals


def correlated_patients(rng, n_patients=60, per_patient=5):
    """Labels of two classes; whether a prediction is right is correlated within a patient."""
    disease = (rng.random(n_patients) < 0.4).astype(int)
    skill = rng.beta(0.8 * 2, 0.2 * 2, n_patients)  # mean .8, strongly correlated
    groups = np.repeat(np.arange(n_patients), per_patient)
    y = disease[groups]
    right = rng.random(len(groups)) < skill[groups]
    return y, np.where(right, y, 1 - y), groups


def share_right(y, p):
    return (y == p).mean()


def test_clustered_intervals_cover_as_they_claim_and_plain_ones_do_not():
    rng = np.random.default_rng(0)
    covered = {True: [], False: []}
    for run in range(500):
        y, p, groups = correlated_patients(rng)
        for by_patient in (True, False) if run < 100 else (True,):
            interval = metric_interval(
                share_right,
                y,
                p,
                groups=groups if by_patient else None,
                n_resamples=300,
                random_state=run,
            )
            covered[by_patient].append(interval.low <= 0.8 <= interval.high)
    assert 0.93 <= np.mean(covered[True]) <= 0.97
    assert np.mean(covered[False]) < 0.88


def test_interval_of_a_scorer_predicts_once_and_equals_that_of_the_metric():
    X, y = make_classification(120, weights=[0.8], flip_y=0.2, random_state=0)

    class Counting(LogisticRegression):
        calls = 0

        def predict(self, X):
            Counting.calls += 1
            return super().predict(X)

    fitted = Counting().fit(X[:60], y[:60])
    found = scorer_interval(
        fitted, X[60:], y[60:], scoring="balanced_accuracy", n_resamples=99, random_state=0
    )
    assert Counting.calls == 1
    wanted = metric_interval(
        balanced_accuracy_score, y[60:], fitted.predict(X[60:]), n_resamples=99, random_state=0
    )
    assert found == wanted
    assert found.low < found.score < found.high
    assert found.score == get_scorer("balanced_accuracy")(fitted, X[60:], y[60:])
    own = scorer_interval(fitted, X[60:], y[60:], n_resamples=20, random_state=0)
    assert own.score == fitted.score(X[60:], y[60:])
    for name in ("roc_auc", "neg_calibration_error", "few_shot_recall"):
        scorer = scorers(name)[name]
        found = scorer_interval(
            fitted, X[60:], y[60:], scoring=name, n_resamples=20, random_state=0
        )
        assert found.score == pytest.approx(scorer(fitted, X[60:], y[60:]))


def test_wider_level_gives_a_wider_interval_and_certainty_none():
    y, p = predictions()
    wide, narrow = (
        metric_interval(accuracy_score, y, p, level=level, n_resamples=200, random_state=0)
        for level in (0.95, 0.5)
    )
    assert wide.low < narrow.low < narrow.high < wide.high
    assert metric_interval(accuracy_score, y, y, n_resamples=20) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"level": 1.0}, "level=1.0"),
        ({"groups": [1, 1, 1]}, "two groups"),
        ({"groups": [1, 2]}, "one entry per image"),
        ({"groups": ["a", "", "b"]}, "groups has no entry in row 1"),
        ({"groups": [1, 2, None]}, "groups has no entry in row 2"),
    ],
)
def test_intervals_refuse_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        metric_interval(accuracy_score, [0, 1, 1], [0, 1, 0], **call)


# ---------------------------------------------------------------- scorers


def test_scorers_by_name_in_cross_validation_and_search():
    X, y = make_classification(
        150, n_classes=3, n_informative=5, weights=[0.7, 0.2], random_state=0
    )
    scoring = scorers("balanced_accuracy", *scorers())
    clf = LogisticRegression(max_iter=300)
    results = cross_validate(clf, X, y, scoring=scoring, cv=3, error_score="raise")
    assert all(np.isfinite(results[f"test_{name}"]).all() for name in scoring)
    search = GridSearchCV(clf, {"C": [0.1, 1.0]}, scoring=scoring, refit="geometric_mean", cv=3)
    search.fit(X, y)
    fitted = search.best_estimator_
    found = {name: scorer(fitted, X, y) for name, scorer in scoring.items()}
    p, proba = fitted.predict(X), fitted.predict_proba(X)
    assert found["geometric_mean"] == pytest.approx(geometric_mean_score(y, p))
    assert found["few_shot_recall"] == pytest.approx(shot_recall(y, p, y).few)
    assert found["neg_head_tail_gap"] == pytest.approx(-head_tail_gap(y, p, y))
    assert found["neg_calibration_error"] == -expected_calibration_error(y, proba)
    assert pickle.loads(pickle.dumps(scoring)).keys() == scoring.keys()
    with pytest.raises(ValueError, match=r"Unknown scorers \['recal'\]"):
        scorers("recal")


def test_scorers_use_the_class_counts_of_training(tiny, blobs):
    X, y = blobs
    clf = SoftmaxClassifier(**tiny).fit(X, y)
    np.testing.assert_array_equal(clf.class_counts_, np.bincount(y))
    balanced = np.concatenate([np.flatnonzero(y == k)[:8] for k in range(3)])
    found = scorers("few_shot_recall")["few_shot_recall"](clf, X[balanced], y[balanced])
    wanted = shot_recall(y[balanced], clf.predict(X[balanced]), y).few
    assert found == wanted
    assert np.isfinite(found)


def test_class_missing_from_training_does_not_break_the_scorers():
    X, y = make_classification(90, n_classes=3, n_informative=5, random_state=0)
    clf = LogisticRegression(max_iter=300).fit(X[y < 2], y[y < 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scorer in scorers("neg_calibration_error", "few_shot_recall").values():
            scorer(clf, X, y)
