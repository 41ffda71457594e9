"""Measures against explicit formulas, on random and degenerate input; coverage of intervals."""

from __future__ import annotations

import itertools
import math
import pickle
import warnings
from functools import cache, partial

import numpy as np
import pandas as pd
import pytest
from imblearn.metrics import geometric_mean_score
from imblearn.over_sampling import RandomOverSampler
from imblearn.pipeline import make_pipeline as resampled
from scipy.stats import binom, binomtest, norm, rankdata
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import make_classification
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import (
    BaggingClassifier,
    RandomForestClassifier,
    StackingClassifier,
    VotingClassifier,
)
from sklearn.exceptions import NotFittedError
from sklearn.feature_selection import RFE
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    classification_report,
    cohen_kappa_score,
    confusion_matrix,
    f1_score,
    get_scorer,
    log_loss,
    matthews_corrcoef,
    mean_absolute_error,
    precision_score,
    r2_score,
    recall_score,
    roc_auc_score,
    root_mean_squared_error,
    top_k_accuracy_score,
)
from sklearn.model_selection import (
    FixedThresholdClassifier,
    GridSearchCV,
    TunedThresholdClassifierCV,
    cross_validate,
)
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.semi_supervised import SelfTrainingClassifier

from benchmarks import interval_coverage
from sklearn_medimb import CSSNClassifier, SoftmaxClassifier
from sklearn_medimb.metrics import (
    expected_calibration_error,
    head_tail_gap,
    metric_interval,
    negative_predictive_value,
    paired_difference,
    positive_predictive_value,
    scorer_difference,
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


@pytest.mark.parametrize("count", [np.nan, -5, 2.5, np.inf, "3", None, True, pd.NA], ids=repr)
@pytest.mark.parametrize("read", [dict, lambda counts: pd.Series(counts, name="count")])
def test_counts_are_whole_numbers(count, read):
    counts = read({0: count, 1: 5, 2: 3})
    if isinstance(counts, pd.Series) and counts.dtype == object:  # it might hold labels
        counts = counts.to_dict()
    with pytest.raises(ValueError, match=r"train_counts must hold whole numbers >= 0, not \{0: "):
        shot_recall([0, 1, 2], [0, 1, 2], counts)


def test_rows_without_a_label_are_named():
    y, masked = [0, 1, 1, 2], np.ma.array([0, 1, 1, 2], mask=[0, 0, 1, 0])
    for lacking in (masked, [0, 1, None, 2], [0, 1, np.nan, 2], pd.Series([0, 1, pd.NA, 2])):
        with pytest.raises(ValueError, match="y_true has no entry in row 2"):
            shot_recall(lacking, y, y)
        with pytest.raises(ValueError, match="y_pred has no entry in row 2"):
            shot_recall(y, lacking, y)
        with pytest.raises(ValueError, match="train_counts has no entry in row 2"):
            shot_recall(y, y, lacking)
        with pytest.raises(ValueError, match="y_true has no entry in row 2"):
            expected_calibration_error(lacking, np.eye(3)[y])


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


def test_one_column_is_that_of_the_greater_label_in_whatever_order():
    y = np.array(["pos", "neg", "pos", "pos"])
    column = np.where(y == "pos", 0.9, 0.1)
    for labels in (None, ["neg", "pos"], ["pos", "neg"]):
        for class_wise in (False, True):
            found = expected_calibration_error(y, column, labels=labels, class_wise=class_wise)
            assert found == pytest.approx(0.1)
    columns = np.column_stack([column, 1 - column])
    assert expected_calibration_error(y, columns, labels=["pos", "neg"]) == pytest.approx(0.1)


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
        ([0, 1], [[0.5, 0.5, 0]] * 2, {"labels": [0, 1, 1]}, "a label twice"),
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
        scorer = scorers(name, train_counts=y[:60])[name]
        found = scorer_interval(
            fitted, X[60:], y[60:], scoring=scorer, n_resamples=20, random_state=0
        )
        assert found.score == pytest.approx(scorer(fitted, X[60:], y[60:]))


def test_wider_level_gives_a_wider_interval():
    y, p = predictions()
    wide, narrow = (metric_interval(accuracy_score, y, p, level=level) for level in (0.95, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize("n", [5, 20])
def test_interval_of_a_proportion_is_that_of_wilson(n):
    y = np.repeat([1, 0], [n, 30])
    for hits in range(n + 1):
        p = np.repeat([1, 0], [hits, n + 30 - hits])
        wanted = binomtest(hits, n).proportion_ci(method="wilson")
        for metric in (recall_score, lambda y, p: (p[y == 1] == 1).mean()):
            found = metric_interval(metric, y, p)
            np.testing.assert_allclose(found, [hits / n, *wanted], atol=2e-3)


@pytest.mark.parametrize("label", [1, 0, 7, "a", True])
def test_interval_where_all_is_right_and_one_label_is_seen(label):
    y = np.array([label] * 5)
    found = metric_interval(accuracy_score, y, y)
    np.testing.assert_allclose(found, [1, 0.566, 1], atol=2e-3)


def test_interval_where_all_agree_counts_patients():
    y = np.repeat([1, 0], [30, 60])
    for p, wanted in ((y, [1, 0.722, 1]), (0 * y, [0, 0, 0.278])):
        found = metric_interval(recall_score, y, p, groups=np.arange(90) // 3)
        np.testing.assert_allclose(found, wanted, atol=2e-3)  # Wilson's of 10 of 10


@pytest.mark.parametrize(
    "metric",
    [balanced_accuracy_score, precision_score, f1_score, cohen_kappa_score, matthews_corrcoef],
)
def test_no_perfect_score_is_certain(metric):
    y = np.repeat([1, 0], [5, 60])
    score, low, high = metric_interval(metric, y, y)
    assert score == high == 1
    assert 0.5 < low < 0.85


def test_scores_that_part_the_classes_are_not_certain_to():
    y = np.repeat([1, 0], [5, 60])
    score, low, high = metric_interval(roc_auc_score, y, y + np.linspace(0, 0.9, 65))
    assert score == high == 1
    assert 0.6 < low < 0.9


@cache
def interval_of_hits(metric, sizes, hits):
    y = np.repeat(np.arange(len(sizes)), sizes)
    wrong = np.where(y == 0, 1, 0)
    place = np.arange(len(y)) - np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
    return metric_interval(metric, y, np.where(place < np.take(hits, y), y, wrong))


def enumerated(metric, sizes, rates, truth):
    """Exact probability that the interval lies below the truth, covers it, lies above it.

    Of each class `sizes` samples are predicted rightly at `rates`; others are called another class.
    """
    chances = np.zeros(3)
    for hits in itertools.product(*(range(n + 1) for n in sizes)):
        chance = math.prod(binom.pmf(hits, sizes, rates))
        if chance < 5e-3:
            continue
        _, low, high = interval_of_hits(metric, sizes, hits)
        chances[int(truth > high + 1e-4) - int(truth < low - 1e-4) + 1] += chance
    return chances / chances.sum()


def recall_of_1(y, predicted):
    return (predicted[y == 1] == 1).mean()


@pytest.mark.parametrize("n", [5, 10])
@pytest.mark.parametrize("p", [0.5, 0.8, 0.95])
def test_coverage_of_a_recall_is_that_of_wilson(n, p):
    below, covered, above = enumerated(recall_of_1, (1, n), (1.0, p), p)
    hits = np.arange(n + 1)
    ends = [binomtest(int(k), n).proportion_ci(method="wilson") for k in hits]
    inside = np.array([one.low - 1e-4 <= p <= one.high + 1e-4 for one in ends])
    assert covered == pytest.approx(binom.pmf(hits, n, p)[inside].sum(), abs=0.01)
    assert below < 0.1
    assert above < 0.25  # five of five, or none of them, say little


def recalls_of(y, p):
    return np.array([(p[y == k] == k).mean() for k in np.unique(y)])


def geometric_mean(y, p):
    return float(np.prod(recalls_of(y, p)) ** (1 / len(np.unique(y))))


def least_recall(y, p):
    return float(recalls_of(y, p).min())


@pytest.mark.parametrize(
    ("metric", "sizes", "rates", "least"),
    [
        (geometric_mean, (30, 10, 3), (1.0, 0.1, 0.2), 0.95),
        (geometric_mean, (5, 5), (0.9, 0.2), 0.93),
        (least_recall, (5, 10), (0.9, 0.2), 0.93),
        (least_recall, (5, 5, 5), (0.8, 0.2, 0.2), 0.8),  # the docstring says so
    ],
)
def test_coverage_near_the_least_value(metric, sizes, rates, least):
    product = math.prod(rates) ** (1 / len(rates))
    truth = product if metric is geometric_mean else min(rates)
    below, covered, above = enumerated(metric, sizes, rates, truth)
    assert covered >= least
    assert max(below, above) < 1 - least + 0.01


@pytest.mark.parametrize("n", [5, 10])
@pytest.mark.parametrize("p", interval_coverage.RATES)
def test_intervals_of_recalls_in_simulated_studies(n, p):
    """A short run of the benchmark, of patients, cell by cell."""
    rng = np.random.default_rng(n)
    drawn = [interval_coverage.recalls(rng, n, p, 0.6) for _ in range(60)]
    below = sum(truth < one.low - 1e-4 for one, truth in drawn)
    above = sum(truth > one.high + 1e-4 for one, truth in drawn)
    # Few patients, often all right: Wilson's own coverage goes down to .90.
    assert below + above <= binom.ppf(0.999, 60, 0.1)
    assert below <= binom.ppf(0.999, 60, 0.025)


def test_interval_of_an_array_is_that_of_each_entry():
    y, p = predictions(n_classes=3)
    groups = np.arange(len(y)) // 2
    for given in (None, groups):
        every = metric_interval(partial(recall_score, average=None), y, p, groups=given)
        assert all(part.shape == (3,) for part in every)
        for k in range(3):
            alone = metric_interval(
                partial(recall_score, labels=[k], average="macro"), y, p, groups=given
            )
            np.testing.assert_allclose([part[k] for part in every], alone, atol=1e-3)
    table = partial(confusion_matrix, normalize="true")
    assert metric_interval(table, y, p).high.shape == (3, 3)
    shots = metric_interval(partial(shot_recall, train_counts={0: 9, 1: 5, 2: 5}), y, p)
    assert np.isnan(shots.low).tolist() == [False, True, False]


def test_a_class_always_found_among_the_guesses_is_not_certain_to_be():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2, 3], [50, 50, 50, 5])
    proba = np.eye(4)[y] * 0.4 + rng.dirichlet(np.ones(4), 155) * 0.6
    score, low, high = metric_interval(partial(top_k_accuracy_score, k=3), y, proba)
    assert score == high == 1
    np.testing.assert_allclose(low, 155 / (155 + 1.96**2), atol=3e-3)  # Wilson's


def test_a_loss_without_bound_has_a_finite_interval():
    y = np.repeat([0, 1, 2], 20)
    proba = np.array([[0.8, 0.2, 0.0], [0.2, 0.8, 0.0], [0.1, 0.0, 0.9]])[y]
    score, low, high = metric_interval(
        lambda y, p: -np.log(p[np.arange(len(y)), y]).mean(), y, proba
    )
    assert low < score < high < 1


def test_many_classes_leave_few_guesses_of_what_was_not_seen():
    y = np.repeat(np.arange(40), 5)
    recalls = metric_interval(partial(recall_score, average=None), y, y, n_resamples=50)
    np.testing.assert_allclose(recalls.low, np.full(40, 0.566), atol=2e-3)


def test_many_samples_are_put_together_at_random():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], [500, 60])
    s = y + rng.normal(size=len(y))
    full = metric_interval(roc_auc_score, y, s, n_resamples=600)
    one, again, other = (
        metric_interval(roc_auc_score, y, s, n_resamples=100, random_state=seed)
        for seed in (0, 0, 1)
    )
    assert one == again != other
    np.testing.assert_allclose(one, full, atol=0.02)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (partial(classification_report, output_dict=True), "classification_report returned a dict"),
        (classification_report, "returned a str"),
        (confusion_matrix, "confusion_matrix grows with the number of samples"),
        (lambda y, p: math.nan, "<lambda> is NaN"),
    ],
)
def test_what_has_no_interval_is_named(metric, message):
    y, p = predictions()
    with pytest.raises(ValueError, match=message):
        metric_interval(metric, y, p)


@pytest.fixture(scope="module")
def rare():
    """A classifier of three classes, and test samples with three of the last."""
    X, y = make_classification(
        600, n_classes=3, n_informative=6, weights=[0.8, 0.17], flip_y=0.05, random_state=0
    )
    fitted = LogisticRegression(max_iter=500).fit(X[:300], y[:300])
    X, y = X[300:400], y[300:400]
    kept = np.concatenate([np.flatnonzero(y < 2), np.flatnonzero(y == 2)[:3]])
    return fitted, X[kept], y[kept]


@pytest.mark.parametrize(
    "name",
    [
        "roc_auc_ovr",
        "roc_auc_ovo",
        "neg_log_loss",
        "top_k_accuracy",
        "average_precision",
        "f1_macro",
        *scorers(),
    ],
)
def test_a_class_of_three_never_goes_missing(rare, name):
    clf, X, y = rare
    scorer = scorers(name, train_counts=y)[name]
    how = {"groups": np.arange(len(y)) // 2}
    if name in ("roc_auc_ovo", "average_precision"):
        how["n_resamples"] = 500  # a straight line: its bends are looked for in roc_auc_ovr
    score, low, high = scorer_interval(clf, X, y, scoring=scorer, **how)
    assert score == pytest.approx(scorer(clf, X, y))
    assert low < score < high


def test_calibration_error_with_a_class_of_three_has_an_interval(rare):
    clf, X, y = rare
    for class_wise in (False, True):
        metric = partial(expected_calibration_error, class_wise=class_wise)
        score, low, high = metric_interval(metric, y, clf.predict_proba(X))
        assert low < score < high


@pytest.mark.filterwarnings("ignore:Only one class is present", "ignore:No positive class")
def test_a_class_that_the_samples_lack(rare):
    clf, X, y = rare
    X, y = X[y < 2], y[y < 2]
    for name in ("neg_log_loss", "top_k_accuracy", "neg_calibration_error"):
        score, low, high = scorer_interval(clf, X, y, scoring=name)
        assert low < score <= high
    assert scorer_interval(clf, X, y, scoring="neg_log_loss").score == pytest.approx(
        -log_loss(y, clf.predict_proba(X), labels=[0, 1, 2])
    )
    for name in ("roc_auc_ovr", "average_precision"):
        with pytest.raises(ValueError, match=r"The true labels lack \[2\]"):
            scorer_interval(clf, X, y, scoring=name)


def test_only_fitted_classifiers_have_scorer_intervals(rare, tiny, blobs):
    clf, X, y = rare
    for unfitted in (LogisticRegression(), SoftmaxClassifier(), CSSNClassifier()):
        with pytest.raises(NotFittedError, match=f"This {type(unfitted).__name__} instance"):
            scorer_interval(unfitted, X, y)
        with pytest.raises(NotFittedError):
            scorer_difference(clf, unfitted, X, y)
    with pytest.raises(TypeError, match="LinearRegression has no classes_"):
        scorer_interval(LinearRegression().fit(X, y), X, y, scoring="r2")
    with pytest.raises(ValueError, match="one scorer"):
        scorer_interval(clf, X, y, scoring=["accuracy", "f1_macro"])


def test_the_own_score_is_the_estimators_own(rare, tiny, blobs):
    clf, X, y = rare
    search = GridSearchCV(clf, {"C": [1.0]}, scoring="f1_macro", cv=3)
    pipeline = make_pipeline(StandardScaler(), clf)
    for estimator in (search, pipeline):
        estimator.fit(X, y)
        assert scorer_interval(estimator, X, y).score == pytest.approx(estimator.score(X, y))

    class Proud(LogisticRegression):
        def score(self, X, y, sample_weight=None):
            return 1.0

    with pytest.raises(ValueError, match="score of Proud is not its accuracy"):
        scorer_interval(Proud().fit(X, y), X, y)

    images, labels = blobs
    trained = SoftmaxClassifier(**tiny).fit(images, labels)
    rows = np.concatenate([np.flatnonzero(labels == k)[:8] for k in range(3)])
    found = scorer_interval(trained, images[rows], labels[rows], scoring="few_shot_recall")
    assert found.score == scorers()["few_shot_recall"](trained, images[rows], labels[rows])


SCALES = [
    lambda s: s / 10,
    lambda s: s + 0.001,
    lambda s: 7 * s - 3,
    lambda s: 0.9 * s + 0.05,
    lambda s: s.astype(int) if (s == np.rint(s)).all() else s,
]


@pytest.fixture(scope="module")
def binary():
    """Two classes; whole scores, grades, scores of 0 and 1, and such that find every case."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], [40, 12])
    zero_one = np.where(rng.random(52) < 0.85, y, 1 - y).astype(float)
    return y, {
        "whole": np.rint(3 * y + rng.normal(3, 1.5, 52)),
        "grades": np.clip(np.rint(1.5 * y + rng.normal(2.5, 1, 52)), 1, 5),
        "zero_one": zero_one,
        "all_found": np.where(y == 1, 1.0, zero_one),
        "all_right": y.astype(float),
        "constant": np.ones(52),
    }


def area(y, s):
    """The area under the curve of the greater label; a few times as fast as scikit-learn's."""
    of_greater = y == max(set(y.tolist()))
    n = np.bincount(of_greater, minlength=2)
    return (rankdata(s)[of_greater].sum() - n[1] * (n[1] + 1) / 2) / (n[0] * n[1])


KINDS = ["whole", "grades", "zero_one", "all_found"]


# What follows compares intervals with one another: few samples tell them apart as well.
brief_interval = partial(metric_interval, n_resamples=200)
brief_difference = partial(paired_difference, n_resamples=200)


def metric_of(kind, y, s):
    """The metric to ask about scores of this kind, and its interval: that of scikit-learn's."""
    wanted = brief_interval(roc_auc_score, y, s)
    np.testing.assert_allclose(brief_interval(area, y, s), wanted, atol=1e-9)
    return (roc_auc_score if kind == "zero_one" else area), wanted


@pytest.mark.parametrize("scores", [*KINDS, "all_right"])
def test_scores_need_not_be_broken_numbers(binary, scores):
    y, s = binary[0], binary[1][scores]
    metric, wanted = metric_of(scores, y, s)
    assert 0 < wanted.low < wanted.score
    other = np.random.default_rng(1).permutation(s)
    difference = brief_difference(metric, y, s, other)
    for scale in SCALES:
        np.testing.assert_allclose(brief_interval(metric, y, scale(s)), wanted, atol=1e-6)
        found = brief_difference(metric, y, scale(s), scale(other))
        np.testing.assert_allclose(found, difference, atol=1e-6)
    broken = s + np.random.default_rng(2).normal(size=52) * 1e-9
    found = brief_interval(lambda y, s: metric(y, np.round(s, 6)), y, broken)
    np.testing.assert_allclose(found, wanted, atol=1e-4)  # units that no score tells apart


@pytest.mark.parametrize("scores", [*KINDS, "constant"])
@pytest.mark.parametrize("dtype", [float, int])
def test_names_of_classes_do_not_matter_to_scores(binary, scores, dtype):
    y, s = binary[0], binary[1][scores].astype(dtype)
    metric, wanted = metric_of(scores, y, s)
    for names in (["ben", "mal"], [False, True], [5, 7], [0.0, 0.5]):
        if names == [0.0, 0.5]:  # no classes for scikit-learn
            found = brief_interval(lambda y, s: metric(y > 0, s), np.array(names)[y], s)
        else:
            found = brief_interval(metric, np.array(names)[y], s)
        np.testing.assert_allclose(found, wanted, atol=1e-9)
    named = np.array(["ben", "mal"])[y].astype(object)
    found = brief_difference(metric, named, s, binary[1]["whole"])
    np.testing.assert_allclose(found, brief_difference(metric, y, s, binary[1]["whole"]), atol=1e-9)


def mean_error(y, p):
    return np.abs(y - p).mean()


def root_mean_square(y, p):
    return ((y - p) ** 2).mean() ** 0.5


def share_explained(y, p):
    return 1 - ((y - p) ** 2).sum() / ((y - y.mean()) ** 2).sum()


@pytest.mark.parametrize("kind", ["ages", "grades", "counts"])
@pytest.mark.parametrize(
    ("of_sklearn", "metric"),
    [
        (mean_absolute_error, mean_error),
        (root_mean_squared_error, root_mean_square),
        (r2_score, share_explained),
    ],
)
def test_errors_of_whole_numbers_are_those_of_shifted_ones(kind, of_sklearn, metric):
    rng = np.random.default_rng(0)
    y = {
        "ages": rng.integers(30, 80, 120),
        "grades": rng.integers(1, 6, 120),
        "counts": rng.poisson(1.5, 120).clip(max=6),
    }[kind]
    a, b = (y + rng.integers(-2, high, 120) for high in (3, 4))
    wanted = metric_interval(of_sklearn, y, a)
    np.testing.assert_allclose(metric_interval(metric, y, a), wanted, atol=1e-5)
    if kind == "ages":
        assert wanted.high - wanted.low < 0.4 * abs(wanted.score)
    difference = paired_difference(metric, y, a, b)
    for scale, unit in (
        (lambda v: v.astype(float), 1),
        (lambda v: v + 0.5, 1),
        (lambda v: v - 17, 1),
        (lambda v: v / 8, 8),
    ):
        unit = 1 if of_sklearn is r2_score else unit
        found = np.multiply(metric_interval(metric, scale(y), scale(a)), unit)
        np.testing.assert_allclose(found, wanted, atol=1e-4)
        found = np.multiply(paired_difference(metric, scale(y), scale(a), scale(b)), unit)
        np.testing.assert_allclose(found, difference, atol=1e-4)


def share_above(y, s, threshold):
    return (s[y == 1] >= threshold).mean()


def test_what_compares_numbers_has_labels_whatever_the_predictions():
    y = np.repeat([0, 1], [60, 5])
    for metric, p in (
        (lambda y, p: (p[y == 0] == 1).mean(), y),  # none of 60
        (lambda y, p: (p[y == 0] == 1).mean(), 0 * y),
        (lambda y, p: (p[y == 0] != 0).mean(), y.astype(float)),
        (lambda y, p: np.bincount(2 * y + p, minlength=4)[1] / (y == 0).sum(), y),
    ):
        found = metric_interval(metric, y, p)
        np.testing.assert_allclose(
            found, [0, 0, binomtest(0, 60).proportion_ci(method="wilson").high], atol=2e-3
        )
    rare = np.repeat([1, 0], [5, 60])
    for threshold in (0.5, 0.2, 1.0):  # which no score reaches
        found = metric_interval(partial(share_above, threshold=threshold), rare, 0.0 * rare)
        wilson = binomtest(0, 5).proportion_ci(method="wilson")
        np.testing.assert_allclose(found, [0, 0, wilson.high], atol=2e-3)
    many = np.arange(90) // 2  # of 45 classes two each, which are no ages
    found = metric_interval(share_right, many, many)
    np.testing.assert_allclose(found, [1, 90 / (90 + 1.96**2), 1], atol=5e-3)


def test_the_caller_may_say_what_numbers_are():
    rng = np.random.default_rng(0)
    y = rng.integers(1, 6, 100)
    s = y + rng.normal(size=100)
    plain = metric_interval(mean_absolute_error, y, s, labels=[])
    broken = metric_interval(mean_absolute_error, y + rng.random(100) * 1e-9, s)
    np.testing.assert_allclose(plain, broken, atol=1e-8)
    graded = metric_interval(mean_absolute_error, y, s)
    assert graded.low < graded.high != plain.high
    assert graded == metric_interval(mean_absolute_error, y, s, labels=[5, 4, 3, 2, 1])
    few = np.array([1, 2, 3] * 2)  # too few to be grades
    assert metric_interval(mean_absolute_error, few, few).high == 0
    assert metric_interval(mean_absolute_error, few, few, labels=[1, 2, 3]).high > 0
    more = metric_interval(mean_absolute_error, few, few, labels=[1, 2, 3, 30])
    assert more.score == 0
    for call in (metric_interval, lambda *args, **more: paired_difference(*args, args[-1], **more)):
        with pytest.raises(ValueError, match=r"y_true holds \[3\], which are not among labels"):
            call(accuracy_score, few, few, labels=[1, 2])
        with pytest.raises(ValueError, match="y_true has shape"):
            call(share_right, few.reshape(3, 2), few.reshape(3, 2), labels=[1, 2, 3])


@pytest.mark.parametrize(
    ("y", "p", "message"),
    [
        (np.ma.array([0, 1, 1], mask=[0, 1, 0]), [0, 1, 1], "y_true has no entry in row 1"),
        ([0, 1, 1], np.ma.array([0, 1, 1], mask=[0, 0, 1]), "pred.* has no entry in row 2"),
        ([0, None, 1], [0, 1, 1], "y_true has no entry in row 1"),
        ([0, 1, np.nan], [0, 1, 1], "y_true has no entry in row 2"),
        ([0, 1, 1], [[0, 1], [0.5, 0.5], [np.nan, 1]], "pred.* has no entry in row 2"),
        (np.ma.array(np.eye(3), mask=np.eye(3, k=1)), np.eye(3), "y_true has no entry in row 0"),
        ([0, 1, 1], ["0", "1", "1"], "y_true holds a number, .*pred.* a string"),
        (np.array([0, "1", 1], dtype=object), [0, 1, 1], "numbers or strings, not both"),
    ],
)
def test_intervals_refuse_missing_entries_and_mixed_kinds(y, p, message):
    def metric(y, p):
        return 0.5

    with pytest.raises(ValueError, match=message):
        metric_interval(metric, y, p)
    with pytest.raises(ValueError, match=message):
        paired_difference(metric, y, p, p)


class Proud(LogisticRegression):
    """Its own score is not accuracy, though on even classes it is as great."""

    def score(self, X, y, sample_weight=None):
        return balanced_accuracy_score(y, self.predict(X))


def own_score(estimator, X, y):
    return estimator.score(X, y)


@pytest.mark.parametrize("scoring", [None, own_score])
def test_own_scores_in_all_that_wraps_a_classifier(rare, scoring):
    clf, X, y = rare
    weighted = partial(GridSearchCV, clf, {"C": [1.0]}, cv=2)
    several = {"f1_macro": "f1_macro", "accuracy": "accuracy"}
    for estimator in (
        clf,
        FrozenEstimator(clf),
        weighted(scoring="f1_macro"),
        weighted(scoring="neg_log_loss"),
        weighted(scoring=several, refit="f1_macro"),
        weighted(scoring=own_score),
        weighted(),
        make_pipeline(StandardScaler(), weighted(scoring="f1_macro")),
        FrozenEstimator(make_pipeline(StandardScaler(), clf).fit(X, y)),
        RFE(clf, n_features_to_select=5),
    ):
        estimator.fit(X, y)
        # Which score it is does not depend on how closely the ends are looked for.
        found = scorer_interval(estimator, X, y, scoring=scoring, n_resamples=100)
        assert found.low < found.score == pytest.approx(estimator.score(X, y))
        same = scorer_difference(estimator, estimator, X, y, scoring=scoring, n_resamples=100)
        assert same.low < same.score == 0 < same.high
    even = np.concatenate([np.flatnonzero(y == k)[:3] for k in range(3)])
    proud = Proud(max_iter=500).fit(X, y)
    assert proud.score(X[even], y[even]) == pytest.approx((proud.predict(X) == y)[even].mean())
    for estimator in (
        proud,
        FrozenEstimator(proud),
        make_pipeline(StandardScaler(), proud).fit(X, y),
        GridSearchCV(proud, {"C": [1.0]}, cv=2, scoring=own_score).fit(X, y),
        GridSearchCV(proud, {"C": [1.0]}, cv=2).fit(X, y),
    ):
        with pytest.raises(ValueError, match="score of Proud is not its accuracy: pass scoring="):
            scorer_interval(estimator, X[even], y[even], scoring=scoring)


def test_a_frozen_classifier_is_scored_as_it_is(rare):
    clf, X, y = rare
    for scoring in ("accuracy", "roc_auc_ovr", "neg_log_loss"):
        wanted = scorer_interval(clf, X, y, scoring=scoring)
        assert scorer_interval(FrozenEstimator(FrozenEstimator(clf)), X, y, scoring=scoring) == (
            wanted
        )
    with pytest.raises(AttributeError, match="predict_log_proba of LogisticRegression cannot"):
        scorer_interval(clf, X, y, scoring=lambda e, X, y: e.predict_log_proba(X).mean())


# ---------------------------------------------------------------- differences


def test_equal_predictions_differ_by_nothing_but_chance(rare):
    y, p = predictions(n=60, n_classes=2)
    score, low, high = paired_difference(accuracy_score, y, p, p)
    assert score == 0
    tango = 1.96**2 / (60 + 1.96**2)
    np.testing.assert_allclose([low, high], [-tango, tango], atol=2e-3)
    score, low, high = paired_difference(accuracy_score, y, p, p, groups=np.arange(60) // 2)
    assert (score, -low) == (0, pytest.approx(high))
    assert high > 0
    clf, X, y = rare
    for name in ("f1_macro", "roc_auc_ovr"):
        score, low, high = scorer_difference(clf, clf, X, y, scoring=name)
        assert low < score == 0 < high


def test_a_pair_knows_more_than_two_intervals():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300)
    b = np.where(rng.random(300) < 0.7, y, (y + 1) % 3)
    a = np.where(rng.random(300) < 0.2, y, b)  # the same, but for what it mends
    score, low, high = paired_difference(accuracy_score, y, a, b)
    assert score == accuracy_score(y, a) - accuracy_score(y, b)
    assert 0 < low < score < high
    alone_a, alone_b = (metric_interval(accuracy_score, y, one) for one in (a, b))
    assert alone_a.low < alone_b.high
    back = paired_difference(accuracy_score, y, b, a)
    np.testing.assert_allclose(back, [-score, -high, -low], atol=1e-3)
    recalls = paired_difference(partial(recall_score, average=None), y, a, b)
    assert recalls.low.shape == (3,)


def test_differences_in_simulated_studies():
    missed = {"below": 0, "above": 0}
    rng = np.random.default_rng(0)
    for _ in range(100):
        groups = np.arange(180) // 3
        y = rng.integers(0, 2, 60)[groups]
        ease = rng.normal(size=60)[groups] * 0.6 + rng.normal(size=180) * 0.8
        a, b = (
            np.where(0.8 * ease + 0.6 * rng.normal(size=180) < norm.ppf(share), y, 1 - y)
            for share in (0.85, 0.75)
        )
        found = paired_difference(share_right, y, a, b, groups=groups)
        missed["below"] += found.low > 0.1
        missed["above"] += found.high < 0.1
    assert abs(sum(missed.values()) / 100 - 0.05) < 3 * math.sqrt(0.95 * 0.05 / 100)
    assert max(missed.values()) <= binom.ppf(0.999, 100, 0.025)


@pytest.mark.parametrize(("n", "p"), [(5, 0.5), (5, 0.9), (10, 0.95), (20, 0.7)])
def test_small_differences_in_simulated_studies(n, p):
    rng = np.random.default_rng(n)
    drawn = [interval_coverage.differences(rng, n, p, 0.0) for _ in range(25)]
    for side in (
        sum(truth < one.low - 1e-4 for one, truth in drawn),
        sum(truth > one.high + 1e-4 for one, truth in drawn),
    ):
        assert side <= binom.ppf(0.999, 25, 0.025)


@pytest.mark.parametrize("metric", [geometric_mean_score, geometric_mean, least_recall])
def test_where_every_rare_class_is_missed_the_score_may_yet_be_above_0(metric):
    y = np.repeat([0, 1, 2], [30, 10, 3])
    score, low, high = metric_interval(metric, y, 0 * y)
    assert score == low == 0
    # The best that Pearson's test does not reject, by its own optimum: .3996 and .2281.
    assert high == pytest.approx(0.228 if metric is least_recall else 0.3996, abs=0.012)
    score, low, high = paired_difference(metric, y, 0 * y, 0 * y)
    assert low < score == 0 < high
    two = np.repeat([0, 1], [40, 8])
    _, low, high = metric_interval(metric, two, 0 * two)
    alone = binomtest(0, 8).proportion_ci(method="wilson").high
    assert low == 0
    assert high == pytest.approx(alone if metric is least_recall else alone**0.5, abs=6e-3)


def test_a_scorer_whose_recalls_are_all_0_but_one_is_not_certain():
    X, y = np.zeros((48, 1)), np.repeat([0, 1], [40, 8])
    scored = scorer_interval(DummyClassifier().fit(X, y), X, y, scoring="geometric_mean")
    assert scored.low == scored.score == 0
    assert 0.5 < scored.high < 0.6


def test_a_slope_that_vanishes_in_a_part_of_a_score_is_seen():
    y = np.repeat([0, 1, 2], [30, 10, 3])
    alone = metric_interval(accuracy_score, y, 0 * y)
    both = metric_interval(lambda y, p: (y == p).mean() + geometric_mean(y, p), y, 0 * y)
    assert both.high > alone.high + 0.3


BOUNDED = [
    precision_score,
    recall_score,
    f1_score,
    balanced_accuracy_score,
    geometric_mean_score,
    matthews_corrcoef,
]


@pytest.mark.parametrize("metric", BOUNDED)
def test_no_bound_is_beyond_what_data_can_give(metric):
    rng = np.random.default_rng(0)
    least = -1 if metric is matthews_corrcoef else 0
    for n in (3, 17):
        for share in (0.0, 0.9, 1.0):
            y = np.repeat([1, 0], [n, 60])
            p = np.where(rng.random(len(y)) < share, y, 1 - y)
            score, low, high = metric_interval(metric, y, p)
            assert least <= low <= score <= high <= 1


def test_difference_of_models_predicts_once_each_and_equals_that_of_predictions(rare):
    _, X, y = rare

    class Counting(LogisticRegression):
        calls = 0

        def predict(self, X):
            Counting.calls += 1
            return super().predict(X)

    a, b = Counting(C=10.0).fit(X[::2], y[::2]), Counting(C=0.01).fit(X[::2], y[::2])
    found = scorer_difference(a, b, X, y, scoring="balanced_accuracy")
    assert Counting.calls == 2
    assert found == paired_difference(balanced_accuracy_score, y, a.predict(X), b.predict(X))
    with pytest.raises(TypeError, match="scorer_difference"):
        paired_difference(a, b, X, y)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"level": 1.0}, "level=1.0"),
        ({"n_resamples": 0}, "n_resamples=0"),
        ({"groups": [1, 1, 1]}, "two groups"),
        ({"groups": [1, 2]}, "one entry per image"),
        ({"groups": ["a", "", "b"]}, "groups has no entry in row 1"),
        ({"groups": [1, 2, None]}, "groups has no entry in row 2"),
    ],
)
def test_intervals_refuse_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        metric_interval(accuracy_score, [0, 1, 1], [0, 1, 0], **call)
    with pytest.raises(ValueError, match=message):
        paired_difference(accuracy_score, [0, 1, 1], [0, 1, 0], [0, 1, 1], **call)


# ---------------------------------------------------------------- scorers


def test_scorers_by_name_in_cross_validation_and_search():
    X, y = make_classification(
        150, n_classes=3, n_informative=5, weights=[0.7, 0.2], random_state=0
    )
    scoring = scorers("balanced_accuracy", *scorers(), train_counts=y)
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


@pytest.mark.parametrize("as_text", [False, True])
def test_scorers_of_a_disease_are_bayes_formula(as_text):
    X, y = make_classification(300, weights=[0.7], random_state=0)
    positive = "ill" if as_text else None
    y = np.array(["well", "ill"])[y] if as_text else y
    clf = LogisticRegression().fit(X[:200], y[:200])
    X, y = X[200:], y[200:]
    ill, called = (one == ("ill" if as_text else 1) for one in (y, clf.predict(X)))
    se, sp = called[ill].mean(), (~called[~ill]).mean()
    wanted = {
        "sensitivity": se,
        "specificity": sp,
        "ppv": 0.01 * se / (0.01 * se + 0.99 * (1 - sp)),
        "npv": 0.99 * sp / (0.99 * sp + 0.01 * (1 - se)),
    }
    made = scorers(*wanted, positive=positive, prevalence=0.01)
    for name, scorer in pickle.loads(pickle.dumps(made)).items():
        assert scorer(clf, X, y) == pytest.approx(wanted[name], rel=1e-12)
    assert scorers("sensitivity", positive=positive)["sensitivity"](clf, X, y) == se
    own = {"positive": positive}
    found = scorers("ppv", "npv", **own)  # at the frequency of these samples
    assert found["ppv"](clf, X, y) == pytest.approx(ill[called].mean(), rel=1e-12)
    assert found["npv"](clf, X, y) == pytest.approx((~ill[~called]).mean(), rel=1e-12)
    p = clf.predict(X)
    assert positive_predictive_value(y, p, prevalence=0.01, **own) == made["ppv"](clf, X, y)
    assert negative_predictive_value(y, p, prevalence=0.01, **own) == made["npv"](clf, X, y)
    assert wanted["ppv"] == pytest.approx(scorer_interval(clf, X, y, scoring=made["ppv"]).score)


def test_a_disease_may_have_several_labels_and_samples_may_lack_it():
    y = ["naevus", "melanoma", "carcinoma", "naevus"]
    predicted = ["naevus", "carcinoma", "naevus", "naevus"]
    malignant = {"positive": ["melanoma", "carcinoma"]}
    clf = LogisticRegression().fit(np.eye(4), y)
    score = scorers("sensitivity", "specificity", "ppv", "npv", **malignant)
    assert positive_predictive_value(y, predicted, **malignant) == 1
    assert negative_predictive_value(y, predicted, **malignant) == pytest.approx(2 / 3)
    found = {name: one(clf, np.eye(4)[[0, 3]], ["naevus"] * 2) for name, one in score.items()}
    assert np.isnan(found["sensitivity"])
    assert found["specificity"] == 1
    assert np.isnan(found["ppv"])
    assert np.isnan(positive_predictive_value([0, 1], [0, 0], prevalence=0.1))


@pytest.mark.parametrize("prevalence", [0, 1, -0.1, 2, "few", np.nan, [0.1]])
def test_prevalence_is_a_share(prevalence):
    with pytest.raises(ValueError, match=r"prevalence=.* must be a number between 0 and 1"):
        scorers("ppv", prevalence=prevalence)
    with pytest.raises(ValueError, match=r"prevalence=.* must be a number between 0 and 1"):
        positive_predictive_value([0, 1], [0, 1], prevalence=prevalence)


def test_disease_has_to_be_said_of_texts_and_of_many_classes():
    with pytest.raises(ValueError, match=r"positive=None.* which of the labels \['a', 'b'\]"):
        positive_predictive_value(["a", "b"], ["a", "a"])
    with pytest.raises(ValueError, match=r"which of the labels \[0, 1, 2\]"):
        negative_predictive_value([0, 1], [2, 1])
    with pytest.raises(ValueError, match=r"positive='c' names \['c'\]"):
        positive_predictive_value(["a", "b"], ["a", "a"], positive="c")
    with pytest.raises(ValueError, match="y_true has no entry in row 1"):
        positive_predictive_value([0, None], [0, 1])


def test_scorers_use_the_class_counts_of_training(tiny, blobs):
    X, y = blobs
    clf = SoftmaxClassifier(**tiny).fit(X, y)
    np.testing.assert_array_equal(clf.class_counts_, np.bincount(y))
    balanced = np.concatenate([np.flatnonzero(y == k)[:8] for k in range(3)])
    found = scorers("few_shot_recall")["few_shot_recall"](clf, X[balanced], y[balanced])
    wanted = shot_recall(y[balanced], clf.predict(X[balanced]), y).few
    assert found == wanted
    assert np.isfinite(found)


class Counting(LogisticRegression):
    """A classifier that knows, as this package's do, what it was fitted on."""

    def fit(self, X, y, sample_weight=None):
        super().fit(X, y, sample_weight)
        kept = y if sample_weight is None else y[sample_weight > 0]
        self.class_counts_ = np.unique(kept, return_counts=True)[1]
        return self


SHOTS = scorers("few_shot_recall", "neg_head_tail_gap")


@pytest.fixture(scope="module")
def natural():
    """Long-tailed training images, and a test set that is balanced, or tailed the other way."""
    X, y = make_classification(
        900, n_classes=3, n_informative=6, flip_y=0.1, class_sep=0.7, random_state=0
    )
    names = np.array(["mel", "bcc", "nev"])  # sorted otherwise
    rows = [np.flatnonzero(y == k) for k in range(3)]
    train = np.concatenate([one[:n] for one, n in zip(rows, (200, 60, 30), strict=True)])
    test = np.concatenate([one[200 : 200 + n] for one, n in zip(rows, (10, 30, 60), strict=True)])
    return X[train], names[y[train]], X[test], names[y[test]]


def frozen(clf, X, y):
    return FrozenEstimator(clf.fit(X, y))


@pytest.mark.parametrize(
    "make",
    [
        lambda clf, X, y: clf,
        lambda clf, X, y: make_pipeline(StandardScaler(), clf),
        lambda clf, X, y: GridSearchCV(clf, {"C": [0.1, 1.0]}, cv=2),
        lambda clf, X, y: GridSearchCV(
            make_pipeline(StandardScaler(), clf), {"counting__C": [0.1, 1.0]}, cv=2
        ),
        lambda clf, X, y: CalibratedClassifierCV(clf, cv=3),
        lambda clf, X, y: CalibratedClassifierCV(clf, cv=3, ensemble=False),
        lambda clf, X, y: CalibratedClassifierCV(frozen(clf, X, y)),
        frozen,
        lambda clf, X, y: frozen(make_pipeline(StandardScaler(), clf), X, y),
        lambda clf, X, y: VotingClassifier([("one", clf), ("other", clone(clf))]),
        lambda clf, X, y: StackingClassifier([("one", clf)], cv=2),
        lambda clf, X, y: RFE(clf, n_features_to_select=12),
    ],
)
def test_counts_are_those_of_training_wherever_the_classifier_is(natural, make):
    X, y, X_test, y_test = natural
    clf = make(Counting(max_iter=500), X, y).fit(X, y)
    for name, measure in (
        ("few_shot_recall", lambda *args: shot_recall(*args).few),
        ("neg_head_tail_gap", lambda *args: -head_tail_gap(*args)),
    ):
        wanted = measure(y_test, clf.predict(X_test), y)
        assert wanted != measure(y_test, clf.predict(X_test), y_test)
        assert SHOTS[name](clf, X_test, y_test) == wanted
        assert scorer_interval(clf, X_test, y_test, scoring=name, n_resamples=50).score == wanted


def test_counts_of_a_classifier_with_a_threshold(natural):
    X, y, X_test, y_test = natural
    X, y, X_test, y_test = (
        X[y != "nev"],
        y[y != "nev"],
        X_test[y_test != "nev"],
        y_test[y_test != "nev"],
    )
    fitted = Counting().fit(X, y)
    for clf in (
        FixedThresholdClassifier(clone(fitted), threshold=0.3).fit(X, y),
        FixedThresholdClassifier(FrozenEstimator(fitted), threshold=0.3),
        TunedThresholdClassifierCV(clone(fitted), cv=2).fit(X, y),
        OneVsRestClassifier(clone(fitted)).fit(X, y),
    ):
        wanted = shot_recall(y_test, clf.predict(X_test), y).few
        assert SHOTS["few_shot_recall"](clf, X_test, y_test) == wanted


@pytest.mark.filterwarnings("ignore:y contains no unlabeled")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogisticRegression(), "LogisticRegression does not tell"),
        (lambda: make_pipeline(StandardScaler(), LogisticRegression()), "Logistic.*train_counts="),
        (lambda: resampled(RandomOverSampler(random_state=0), Counting()), "for it resamples"),
        (
            lambda: BaggingClassifier(Counting(), n_estimators=3, random_state=0),
            "Bagging.*its members",
        ),
        (lambda: OneVsRestClassifier(Counting()), "OneVsRest.*its members"),
        (lambda: SelfTrainingClassifier(Counting()), "for it made labels itself"),
        (lambda: RandomForestClassifier(3), "DecisionTreeClassifier does not tell"),
    ],
)
def test_unknown_counts_of_training_are_not_those_of_the_test_set(natural, make, message):
    X, y, X_test, y_test = natural
    clf = make().fit(X, y.astype(object))
    told = scorers(*SHOTS, train_counts=y)
    for name, scorer in SHOTS.items():
        with pytest.raises(ValueError, match=message):
            scorer(clf, X_test, y_test)
        with pytest.raises(ValueError, match=message):
            scorer_interval(clf, X_test, y_test, scoring=name)
        assert np.isfinite(told[name](clf, X_test, y_test))


def test_further_portions_and_fits_are_counted(tiny):
    rng = np.random.default_rng(0)

    def portion(*n):
        return rng.random((sum(n), 1, 8, 8)).astype(np.float32), np.repeat([0, 1], n)

    clf = SoftmaxClassifier(**tiny)
    clf.partial_fit(*portion(3, 20))
    for _ in range(5):
        clf.partial_fit(*portion(18, 2))
    assert clf.class_counts_.tolist() == [93, 30]
    with pytest.raises(ValueError, match="not among"):
        clf.partial_fit(portion(2, 2)[0], [0, 1, 2, 2])
    assert clf.class_counts_.tolist() == [93, 30]
    clf.set_params(warm_start=True).fit(*portion(4, 12))
    assert clf.class_counts_.tolist() == [4, 12]  # of the latest fit
    assert clf.partial_fit(*portion(9, 1)).class_counts_.tolist() == [13, 13]
    assert clf.set_params(warm_start=False).fit(*portion(5, 6)).class_counts_.tolist() == [5, 6]


def test_class_missing_from_training_does_not_break_the_scorers():
    X, y = make_classification(90, n_classes=3, n_informative=5, random_state=0)
    clf = LogisticRegression(max_iter=300).fit(X[y < 2], y[y < 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scorer in scorers("neg_calibration_error", "few_shot_recall", train_counts=y).values():
            scorer(clf, X, y)


def test_classes_that_training_lacked_are_confident_errors():
    X, y = make_classification(
        900, n_classes=3, n_informative=6, class_sep=2.0, flip_y=0, random_state=0
    )
    clf = LogisticRegression(max_iter=300).fit(X[y < 2], y[y < 2])
    hits, confidence = clf.predict(X) == y, clf.predict_proba(X).max(axis=1)
    edges = np.linspace(0, 1, 16)
    found = scorers()["neg_calibration_error"](clf, X, y)
    assert found == pytest.approx(-slow_calibration(hits, confidence, edges))
    assert found < -0.2
    padded = np.column_stack([clf.predict_proba(X), np.zeros(len(X))])
    by_class = [slow_calibration(y == k, padded[:, k], edges) for k in range(3)]
    found = scorers()["neg_class_wise_calibration_error"](clf, X, y)
    assert found == pytest.approx(-np.mean(by_class))
    seen = y < 2
    assert scorers()["neg_calibration_error"](clf, X[seen], y[seen]) == (
        -expected_calibration_error(y[seen], clf.predict_proba(X[seen]))
    )


@pytest.mark.parametrize("name", ["few_shot_recall", "neg_head_tail_gap", *list(scorers())[-2:]])
def test_labels_of_another_kind_are_no_classes_that_training_lacked(natural, name):
    X, y = natural[0], np.unique(natural[1], return_inverse=True)[1]
    clf = Counting(max_iter=300).fit(X, y)
    for score in (scorers()[name], partial(scorer_interval, scoring=name)):
        with pytest.raises(ValueError, match=r"y holds '\d', the classifier knows \[0, 1, 2\]"):
            score(clf, X, y.astype(str))
    with pytest.raises(ValueError, match="y has no entry in row 3"):
        scorers()[name](clf, X, np.where(np.arange(len(y)) == 3, np.nan, y))
