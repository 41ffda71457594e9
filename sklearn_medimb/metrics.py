"""Measures of imbalanced classification that scikit-learn and imbalanced-learn lack.

Balanced accuracy, macro-F1 and AUROC are in :mod:`sklearn.metrics`; sensitivity, specificity and
the geometric mean in :mod:`imblearn.metrics`. Here are recalls of frequent and rare classes, errors
of calibration, and intervals that know that images of a patient resemble one another.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from imblearn.metrics import geometric_mean_score
from scipy import stats
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import check_scoring, get_scorer, get_scorer_names, make_scorer, recall_score
from sklearn.utils import check_consistent_length, check_random_state, column_or_1d
from sklearn.utils.multiclass import unique_labels

from sklearn_medimb.rows import group_codes

Counts = Mapping[Any, int] | Any


class ShotRecall(NamedTuple):
    """Mean recall over the frequent, the middle and the rare classes; NaN for an empty group."""

    many: float
    medium: float
    few: float


def shot_recall(
    y_true: Any,
    y_pred: Any,
    train_counts: Counts,
    *,
    thresholds: tuple[int, int] | None = None,
) -> ShotRecall:
    """Mean recall of the classes with many, a medium number of, and few training images.

    Parameters
    ----------
    y_true, y_pred : array-like of shape (n,)
        True and predicted labels.
    train_counts : dict or pandas.Series from label to int, or array-like of labels
        Training images of each class, as ``y_train.value_counts()`` gives them, or the training
        labels themselves.
    thresholds : (int, int), default=None
        A class has few images below the first and many above the second, as (20, 100) in the
        literature on long tails. None makes thirds of the classes, by rank; classes of equal size
        stay together.

    Returns
    -------
    recall : ShotRecall
        ``many``, ``medium`` and ``few``. A group without classes in `y_true` is NaN, not 0.

    Raises
    ------
    ValueError
        If `y_true` holds a class that `train_counts` lacks, or a Series can be read both as counts
        and as labels.

    References
    ----------
    Z. Liu et al., "Large-scale long-tailed recognition in an open world", CVPR 2019.

    Examples
    --------
    >>> from sklearn_medimb.metrics import shot_recall
    >>> shot_recall([0, 0, 1, 2, 2], [0, 0, 0, 2, 1], {0: 300, 1: 50, 2: 5})
    ShotRecall(many=1.0, medium=0.0, few=0.5)
    """
    y_true, y_pred = column_or_1d(y_true), column_or_1d(y_pred)
    check_consistent_length(y_true, y_pred)
    classes = np.unique(y_true)
    counts = _class_counts(train_counts, set(classes.tolist()))
    if missing := [label for label in classes.tolist() if label not in counts]:
        raise ValueError(
            f"train_counts lacks the classes {missing} of y_true: pass {{label: count}}, or the "
            "training labels."
        )
    recalls = recall_score(y_true, y_pred, labels=classes, average=None, zero_division=0)
    sizes = np.array([counts[label] for label in classes.tolist()])
    if thresholds is None:
        # Rank among all training classes; ties share the mean rank and so stay together.
        every = np.array(list(counts.values()))
        below, equal = (every < sizes[:, None]).sum(1), (every == sizes[:, None]).sum(1)
        place = (below + (equal - 1) / 2) / max(len(every) - 1, 1)
        few, many = place < 1 / 3, place > 2 / 3
    else:
        low, high = thresholds
        if low > high:
            raise ValueError(f"thresholds={thresholds} must be (few, many) with few <= many.")
        few, many = sizes < low, sizes > high
    groups = (many, ~(many | few), few)
    return ShotRecall(*(float(recalls[g].mean()) if g.any() else float("nan") for g in groups))


def head_tail_gap(
    y_true: Any,
    y_pred: Any,
    train_counts: Counts,
    *,
    thresholds: tuple[int, int] | None = None,
) -> float:
    """Mean recall of the frequent classes minus that of the rare ones.

    Parameters
    ----------
    y_true, y_pred, train_counts, thresholds
        As in :func:`shot_recall`.

    Returns
    -------
    gap : float
        From -1 to 1; 0 where rare classes fare as well as frequent ones. NaN where either group is
        empty.
    """
    recall = shot_recall(y_true, y_pred, train_counts, thresholds=thresholds)
    return recall.many - recall.few


def _class_counts(train_counts: Counts, classes: set[Any]) -> dict[Any, int]:
    """Training images of each class; `classes` are those to be found in it."""
    if all(hasattr(train_counts, name) for name in ("index", "name", "to_dict")):  # pandas.Series
        train_counts = _unambiguous(train_counts, classes)
    if isinstance(train_counts, Mapping):
        return dict(train_counts)
    labels, counts = np.unique(column_or_1d(train_counts), return_counts=True)
    return dict(zip(labels.tolist(), counts.tolist(), strict=True))


def _unambiguous(series: Any, classes: set[Any]) -> Any:
    """Counts of a pandas.Series as a dict, or its labels as an array, whichever it holds."""
    index, values = series.index.tolist(), series.tolist()
    numeric = getattr(series.dtype, "kind", "O") in "iuf"
    counted = numeric and classes <= set(index) and len(set(index)) == len(index)
    if series.name in ("count", "proportion") and counted:  # what value_counts() calls its result
        labelled = False
    else:
        # Where numbers of rows happen to be labels too, there are others beside them.
        labelled = classes <= set(values)
        counted = counted and not (labelled and not set(index) <= set(values))
    if counted and labelled:
        raise ValueError(
            "train_counts may be counts by label or labels by row: pass its to_dict() or its "
            "to_numpy()."
        )
    if not counted:
        return series.to_numpy()
    if not all(float(value).is_integer() and value >= 0 for value in values):
        raise ValueError(f"train_counts must hold whole numbers >= 0, not {values}.")
    return dict(zip(index, values, strict=True))


def expected_calibration_error(
    y_true: Any,
    y_proba: Any,
    *,
    labels: Any = None,
    n_bins: int = 15,
    strategy: str = "uniform",
    class_wise: bool = False,
) -> float:
    """Mean distance between confidence and accuracy, over bins of confidence.

        ECE = sum over bins b of |b| / n * | accuracy(b) - mean confidence(b) |

    Parameters
    ----------
    y_true : array-like of shape (n,)
        True labels.
    y_proba : array-like of shape (n, n_classes) or (n,)
        Probabilities; one column is that of the greater of two labels.
    labels : array-like of shape (n_classes,), default=None
        Labels of the columns; None takes those of `y_true`, sorted.
    n_bins : int, default=15
        Bins of confidence.
    strategy : {"uniform", "quantile"}, default="uniform"
        Bins of equal width, or of equally many samples.
    class_wise : bool, default=False
        False looks at the predicted class of each sample. True looks at each class against the
        rest, and gives the mean over classes, so that rare classes count.

    Returns
    -------
    error : float
        From 0 to 1.

    Raises
    ------
    ValueError
        If the columns are not probabilities, or do not fit the labels.

    References
    ----------
    C. Guo et al., "On calibration of modern neural networks", ICML 2017. Class-wise: M. Kull et
    al., "Beyond temperature scaling", NeurIPS 2019.
    """
    y_true = column_or_1d(y_true)
    proba = np.asarray(y_proba, dtype=np.float64)
    check_consistent_length(y_true, proba)
    labels = unique_labels(y_true) if labels is None else column_or_1d(labels)
    if proba.ndim == 1:
        proba = np.column_stack([1 - proba, proba])
    if proba.shape[1] != len(labels):
        raise ValueError(
            f"y_proba has {proba.shape[1]} columns for {len(labels)} labels: pass labels=... where "
            "y_true lacks some."
        )
    if not (proba >= -1e-9).all() or not np.allclose(proba.sum(axis=1), 1, atol=1e-4):
        raise ValueError("y_proba must hold probabilities: rows of numbers >= 0 that sum to 1.")
    if unknown := sorted(set(y_true.tolist()) - set(np.asarray(labels).tolist())):
        raise ValueError(f"y_true holds {unknown}, which are not among labels.")
    if n_bins < 1:
        raise ValueError(f"n_bins={n_bins} must be at least 1.")
    if strategy not in ("uniform", "quantile"):
        raise ValueError(f'strategy={strategy!r} must be "uniform" or "quantile".')
    hits = y_true[:, np.newaxis] == np.asarray(labels)
    if not class_wise:
        rows, top = np.arange(len(proba)), proba.argmax(axis=1)
        return _calibration_error(hits[rows, top], proba[rows, top], n_bins, strategy)
    errors = [
        _calibration_error(hits[:, k], proba[:, k], n_bins, strategy) for k in range(len(labels))
    ]
    return float(np.mean(errors))


def _calibration_error(
    hit: np.ndarray, confidence: np.ndarray, n_bins: int, strategy: str
) -> float:
    if strategy == "uniform":
        bins = np.minimum((confidence.clip(0, 1) * n_bins).astype(int), n_bins - 1)
    else:
        edges = np.quantile(confidence, np.arange(1, n_bins) / n_bins)
        bins = np.searchsorted(edges, confidence, side="right")
    gaps = np.bincount(bins, hit - confidence, minlength=n_bins)
    return float(np.abs(gaps).sum() / len(hit))


# ---------------------------------------------------------------- intervals


class Interval(NamedTuple):
    """A score and its confidence interval."""

    score: float
    low: float
    high: float


def metric_interval(
    metric: Callable[[np.ndarray, np.ndarray], float],
    y_true: Any,
    y_pred: Any,
    *,
    groups: Any = None,
    level: float = 0.95,
    n_resamples: int = 1000,
    random_state: Any = None,
) -> Interval:
    """Bootstrap a metric, by patients where they are known.

    Parameters
    ----------
    metric : callable
        ``metric(y_true, y_pred)``, such as :func:`sklearn.metrics.balanced_accuracy_score`.
    y_true : array-like of shape (n,)
        True labels.
    y_pred : array-like of shape (n,) or (n, n_classes)
        What `metric` compares them with: labels or probabilities.
    groups : array-like of shape (n,), default=None
        Patient of each sample: patients are drawn instead of samples, with all their samples.
        Without them, correlated samples make the interval too narrow.
    level : float, default=0.95
        Wanted coverage.
    n_resamples : int, default=1000
        Bootstrap draws.
    random_state : int, RandomState or None, default=None
        Seeds the draws.

    Returns
    -------
    interval : Interval
        Score of all samples, and the bias-corrected and accelerated interval. Where the score is
        the same in every draw, both ends are that score.

    References
    ----------
    B. Efron, "Better bootstrap confidence intervals", JASA 1987. Clusters: C. Field and A. Welsh,
    "Bootstrapping clustered data", JRSS B 2007.
    """
    y_true, y_pred = np.asarray(y_true), np.asarray(y_pred)
    check_consistent_length(y_true, y_pred)
    return _interval(
        lambda rows: metric(y_true[rows], y_pred[rows]),
        y_true,
        groups,
        level,
        n_resamples,
        random_state,
    )


def scorer_interval(
    estimator: Any,
    X: Any,
    y: Any,
    *,
    scoring: Any = None,
    groups: Any = None,
    level: float = 0.95,
    n_resamples: int = 1000,
    random_state: Any = None,
) -> Interval:
    """Bootstrap a scorer of a fitted classifier, which predicts each sample once.

    Parameters
    ----------
    estimator : classifier
        Fitted.
    X : array-like or lazy sequence of n samples
        Samples that it was not fitted on.
    y : array-like of shape (n,)
        Their labels.
    scoring : str, callable or None, default=None
        A scorer, or its name, of scikit-learn or of :func:`scorers`; None is the classifier's own
        ``score``.
    groups, level, n_resamples, random_state
        As in :func:`metric_interval`.

    Returns
    -------
    interval : Interval
        Score and its interval.
    """
    y = column_or_1d(y)
    check_consistent_length(X, y)
    answered = _Answered(estimator, X)
    scorer = scorers(scoring)[scoring] if isinstance(scoring, str) else scoring
    scorer = check_scoring(estimator, scorer)
    return _interval(
        lambda rows: scorer(answered, rows, y[rows]),
        y,
        groups,
        level,
        n_resamples,
        random_state,
    )


class _Answered(ClassifierMixin, BaseEstimator):
    """A classifier that has predicted all of X, asked again by row numbers."""

    def __init__(self, estimator: Any, X: Any) -> None:
        self.estimator = estimator
        self.X = X
        self.classes_ = estimator.classes_
        self._answers: dict[str, np.ndarray] = {}

    def __getattr__(self, name: str) -> Any:
        if name not in ("predict", "predict_proba", "decision_function"):
            raise AttributeError(name)
        method = getattr(self.estimator, name)

        def answer(rows: np.ndarray) -> np.ndarray:
            if name not in self._answers:
                self._answers[name] = method(self.X)
            return self._answers[name][rows]

        answer.__name__ = name  # scikit-learn asks for it
        return answer


def _interval(
    score_of: Callable[[np.ndarray], float],
    y: np.ndarray,
    groups: Any,
    level: float,
    n_resamples: int,
    random_state: Any,
) -> Interval:
    """Bootstrap a function of row numbers."""
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1.")
    clusters, n_units = None, len(y)
    if groups is not None:
        codes = group_codes(groups, y)
        sizes = np.bincount(codes)
        clusters = np.split(np.argsort(codes, kind="stable"), np.cumsum(sizes)[:-1])
        n_units = len(clusters)
    if n_units < 2:
        raise ValueError("An interval needs at least two samples, or two groups.")
    units = np.arange(n_units)

    def statistic(drawn: np.ndarray) -> float:
        rows = drawn if clusters is None else np.concatenate([clusters[k] for k in drawn])
        return score_of(rows)

    seed = check_random_state(random_state).randint(2**31 - 1)
    with warnings.catch_warnings(), np.errstate(all="ignore"):  # BCa divides by the spread
        warnings.filterwarnings("ignore", "y_pred contains classes not in y_true")
        warnings.filterwarnings("ignore", category=stats.DegenerateDataWarning)
        score = float(statistic(units))
        result = stats.bootstrap(
            (units,),
            statistic,
            n_resamples=n_resamples,
            confidence_level=level,
            method="BCa",
            vectorized=False,
            rng=np.random.default_rng(seed),
        )
    low, high = result.confidence_interval
    draws = result.bootstrap_distribution
    if np.ptp(draws) == 0:
        return Interval(score, score, score)
    if np.isnan([low, high]).any():  # BCa is undefined: the score lies at an end of all draws
        low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(score, float(low), float(high))


# ---------------------------------------------------------------- scorers


def _by_shot(estimator: Any, X: Any, y: Any, *, measure: Callable[..., float]) -> float:
    """Score by the class counts that the classifier was fitted on, if it tells; else those of y."""
    counts = getattr(estimator, "class_counts_", None)
    if counts is not None:
        counts = dict(zip(estimator.classes_.tolist(), np.asarray(counts).tolist(), strict=True))
        counts = {label: counts.get(label, 0) for label in {*counts, *np.unique(y).tolist()}}
    return measure(y, estimator.predict(X), y if counts is None else counts)


def _few(*args: Any) -> float:
    return shot_recall(*args).few


def _neg_gap(*args: Any) -> float:
    return -head_tail_gap(*args)


def _calibration(estimator: Any, X: Any, y: Any, *, class_wise: bool) -> float:
    proba, classes = estimator.predict_proba(X), estimator.classes_
    known = np.isin(y, classes)  # a class missing from the training fold has no column
    return -expected_calibration_error(
        np.asarray(y)[known], proba[known], labels=classes, class_wise=class_wise
    )


_SCORERS: dict[str, Any] = {
    "geometric_mean": make_scorer(geometric_mean_score),
    "few_shot_recall": partial(_by_shot, measure=_few),
    "neg_head_tail_gap": partial(_by_shot, measure=_neg_gap),
    "neg_calibration_error": partial(_calibration, class_wise=False),
    "neg_class_wise_calibration_error": partial(_calibration, class_wise=True),
}


def scorers(*names: str) -> dict[str, Any]:
    """Scorers by name, for ``scoring=`` of cross_validate and searches.

    Parameters
    ----------
    *names : str
        Names that scikit-learn knows, such as "balanced_accuracy", and "geometric_mean",
        "few_shot_recall", "neg_head_tail_gap", "neg_calibration_error",
        "neg_class_wise_calibration_error". None given: all of the latter.

    Returns
    -------
    scorers : dict from name to callable
        Greater is better.

    Raises
    ------
    ValueError
        If a name is unknown.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.model_selection import cross_validate
    >>> from sklearn_medimb.metrics import scorers
    >>> X, y = load_iris(return_X_y=True)
    >>> scoring = scorers("balanced_accuracy", "neg_calibration_error")
    >>> results = cross_validate(LogisticRegression(max_iter=500), X, y, scoring=scoring)
    >>> bool(results["test_neg_calibration_error"].mean() > -0.2)
    True
    """
    known = set(get_scorer_names()) | set(_SCORERS)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"Unknown scorers {unknown}: choose among {sorted(known)}.")
    return {
        name: _SCORERS[name] if name in _SCORERS else get_scorer(name) for name in names or _SCORERS
    }
