"""Measures of imbalanced classification that scikit-learn and imbalanced-learn lack.

Balanced accuracy, macro-F1 and AUROC are in :mod:`sklearn.metrics`; sensitivity, specificity and
the geometric mean in :mod:`imblearn.metrics`. Here are recalls of frequent and rare classes, errors
of calibration, and intervals that know that images of a patient resemble one another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import numpy as np
from imblearn.metrics import geometric_mean_score
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import (
    accuracy_score,
    check_scoring,
    get_scorer,
    get_scorer_names,
    make_scorer,
    recall_score,
)
from sklearn.utils import check_consistent_length, column_or_1d
from sklearn.utils.multiclass import unique_labels
from sklearn.utils.validation import _num_samples, check_is_fitted

from sklearn_medimb.metrics._score_test import Interval, as_numbers, profile_interval
from sklearn_medimb._data.rows import group_codes

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


def metric_interval(
    metric: Callable[[np.ndarray, np.ndarray], Any],
    y_true: Any,
    y_pred: Any,
    *,
    groups: Any = None,
    level: float = 0.95,
    n_resamples: int = 1000,
    random_state: Any = None,
) -> Interval:
    """Confidence interval of a metric, by patients where they are known.

    It is a score interval: for a recall Wilson's, [.57, 1] where five of five are found, and the
    same idea for every other metric (:mod:`sklearn_medimb.metrics._score_test`).

    Parameters
    ----------
    metric : callable
        ``metric(y_true, y_pred)``, such as :func:`sklearn.metrics.balanced_accuracy_score`, that
        gives a number or an array of them, such as the recall of each class.
    y_true : array-like of shape (n,) or (n, n_outputs)
        True labels, or numbers.
    y_pred : array-like of shape (n,) or (n, n_classes)
        What `metric` compares them with: labels or probabilities.
    groups : array-like of shape (n,), default=None
        Patient of each sample: the interval then is about further patients, with all their
        samples. Without them, correlated samples make it too narrow.
    level : float, default=0.95
        Wanted coverage.
    n_resamples : int, default=1000
        The metric is computed at most about twice as often, on slightly changed samples. Where
        more samples differ, they are put together at random.
    random_state : int, RandomState or None, default=None
        Puts them together; else nothing is random.

    Returns
    -------
    interval : Interval
        ``score`` of all samples, ``low`` and ``high``: floats, or arrays of the metric's shape.

    Raises
    ------
    ValueError
        If the metric gives no numbers, or NaN, or a patient is unknown.

    Notes
    -----
    Of samples that were not seen the interval supposes no more than that they may be predicted as
    any label, or, where `y_pred` holds scores, as an average sample of another class is.

    References
    ----------
    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA
    1927; K. A. Baggerly, "Empirical likelihood as a goodness-of-fit measure", Biometrika 1998.

    Examples
    --------
    >>> from sklearn.metrics import recall_score
    >>> from sklearn_medimb.metrics import metric_interval
    >>> y_true, y_pred = [1] * 5 + [0] * 95, [1] * 5 + [0] * 95
    >>> interval = metric_interval(recall_score, y_true, y_pred)
    >>> f"{interval.score:.2f} [{interval.low:.2f}, {interval.high:.2f}]"
    '1.00 [0.57, 1.00]'
    """
    column = _Column(y_pred)
    return _interval(
        lambda y, rows: metric(y, column[rows]),
        y_true,
        [column],
        groups,
        level,
        n_resamples,
        random_state,
        scorer_name(metric),
    )


def paired_difference(
    metric: Callable[[np.ndarray, np.ndarray], Any],
    y_true: Any,
    pred_a: Any,
    pred_b: Any,
    *,
    groups: Any = None,
    level: float = 0.95,
    n_resamples: int = 1000,
    random_state: Any = None,
) -> Interval:
    """Difference of a metric between two predictions of the same samples, A minus B.

    Two intervals that overlap may still differ: models mostly fail on the same images. Here both
    are asked about the same samples, or patients.

    Parameters
    ----------
    metric, y_true, groups, level, n_resamples, random_state
        As in :func:`metric_interval`.
    pred_a, pred_b : array-like of shape (n,) or (n, n_classes)
        Labels or probabilities of either model.

    Returns
    -------
    interval : Interval
        ``score`` is ``metric(y_true, pred_a) - metric(y_true, pred_b)``. For shares of right
        answers the interval is that of Tango, not of zero width where both agree everywhere.

    Raises
    ------
    ValueError
        As in :func:`metric_interval`.

    References
    ----------
    T. Tango, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", Statistics in Medicine 1998.

    Examples
    --------
    >>> from sklearn.metrics import accuracy_score
    >>> from sklearn_medimb.metrics import paired_difference
    >>> y_true = [0, 1] * 20
    >>> interval = paired_difference(accuracy_score, y_true, y_true, [0] * 40)
    >>> f"{interval.score:.2f} [{interval.low:.2f}, {interval.high:.2f}]"
    '0.50 [0.32, 0.65]'
    """
    if hasattr(metric, "fit"):
        raise TypeError(
            "paired_difference compares predictions; scorer_difference compares models."
        )
    a, b = _Column(pred_a), _Column(pred_b)
    return _interval(
        lambda y, of_a, of_b: _minus(metric(y, a[of_a]), metric(y, b[of_b]), scorer_name(metric)),
        y_true,
        [a, b],
        groups,
        level,
        n_resamples,
        random_state,
        scorer_name(metric),
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
    """Confidence interval of a scorer of a fitted classifier, which predicts each sample once.

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

    Raises
    ------
    NotFittedError
        If the classifier is not fitted.
    ValueError
        As in :func:`metric_interval`, or if the scorer needs a class that `y` lacks.
    """
    y = column_or_1d(y)
    answered = _Answered(estimator, X)
    scorer = _scorer(answered, scoring, y)
    return _interval(
        lambda y, rows: scorer(answered, rows, y),
        y,
        [answered],
        groups,
        level,
        n_resamples,
        random_state,
        scorer_name(scoring),
    )


def scorer_difference(
    estimator_a: Any,
    estimator_b: Any,
    X: Any,
    y: Any,
    *,
    scoring: Any = None,
    groups: Any = None,
    level: float = 0.95,
    n_resamples: int = 1000,
    random_state: Any = None,
) -> Interval:
    """Difference of a scorer between two fitted classifiers on the same samples, A minus B.

    Parameters
    ----------
    estimator_a, estimator_b : classifier
        Fitted. Each predicts each sample once.
    X, y, scoring, groups, level, n_resamples, random_state
        As in :func:`scorer_interval`.

    Returns
    -------
    interval : Interval
        As of :func:`paired_difference`.

    Raises
    ------
    NotFittedError
        If a classifier is not fitted.
    ValueError
        As in :func:`scorer_interval`.
    """
    y = column_or_1d(y)
    a, b = _Answered(estimator_a, X), _Answered(estimator_b, X)
    score_a, score_b = _scorer(a, scoring, y), _scorer(b, scoring, y)
    return _interval(
        lambda y, of_a, of_b: _minus(
            score_a(a, of_a, y), score_b(b, of_b, y), scorer_name(scoring)
        ),
        y,
        [a, b],
        groups,
        level,
        n_resamples,
        random_state,
        scorer_name(scoring),
    )


def _interval(
    score: Callable[..., Any],
    y: Any,
    columns: list[Any],
    groups: Any,
    level: float,
    n_resamples: int,
    random_state: Any,
    name: str,
) -> Interval:
    """Interval of ``score(y[rows], rows, ...)``, with the rows of each column of predictions.

    A column may also be asked for what it would hold of a sample that it did not see: beyond the
    last row it has three more for each label, see `_with_unseen`.
    """
    y = np.asarray(y)
    check_consistent_length(y, *columns)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y.ravel()
    n, every = len(y), np.arange(len(y))
    units = every if groups is None else group_codes(groups, np.empty(n))
    classes = np.unique(y) if _are_labels(y) else y[:0]
    known = {label for column in columns for label in column.labels.tolist()}
    lacking = known - set(classes.tolist())
    hint = f" (The true labels lack {sorted(lacking)}.)" if lacking else ""
    try:
        observed = as_numbers(score(y, *[every] * len(columns)), name)
    except ValueError as error:
        if not hint:
            raise
        raise ValueError(f"{error}{hint}") from error
    if np.isnan(observed).all():
        raise ValueError(f"{name} is NaN on these samples: there is no interval.{hint}")
    cells: np.ndarray | None = None
    donors: Any = [every[:0]]
    codes = np.zeros(n, dtype=int)
    n_labels = 1
    if len(classes):
        labels = np.unique(np.concatenate([classes, *(column.labels for column in columns)]))
        if len(labels) == 1:
            labels = np.unique(np.append(labels, _another(labels.tolist()[0])))
        n_labels = len(labels)
        for column in columns:
            column.extend(labels, y)
        codes = np.searchsorted(classes, y)
        own = np.searchsorted(labels, classes)[:, np.newaxis]
        others = (own + np.arange(1, n_labels)) % n_labels
        best, wrong = own + n_labels, np.concatenate([own + 2 * n_labels, others], axis=1)
        donors = n + np.concatenate([best, wrong], axis=1)
        if len(columns) == 2:  # one of the two is right
            pairs = 3 * n_labels * best + wrong, 3 * n_labels * wrong + best
            donors = n + np.stack(pairs, axis=2).reshape(len(own), -1)
        seen = [column.codes(labels) for column in columns]
        if all(code is not None for code in seen):
            cells = codes
            for code in seen:
                cells = cells * n_labels + code

    def score_of(i: np.ndarray, j: np.ndarray) -> Any:
        if len(columns) == 1:
            return score(y[i], j)
        both = np.divmod(j - n, 3 * n_labels)
        return score(y[i], *(np.where(j < n, j, n + one) for one in both))

    return profile_interval(
        score_of,
        observed,
        units=units,
        classes=codes,
        cells=cells,
        donors=donors,
        alike=len(columns) == 1,
        level=level,
        n_resamples=n_resamples,
        random_state=random_state,
        name=name,
    )


def _are_labels(values: np.ndarray) -> bool:
    """Whether an array holds classes, not numbers."""
    if values.ndim != 1 or values.dtype.kind == "c":
        return False
    return values.dtype.kind != "f" or bool((values == np.rint(values)).all())


def _another(label: Any) -> Any:
    """A second label where there is one only."""
    if isinstance(label, str):
        return "not " + label
    return type(label)(not label) if isinstance(label, (bool, int, float)) else label


def _minus(a: Any, b: Any, name: str) -> Any:
    return as_numbers(a, name) - as_numbers(b, name)


def scorer_name(metric: Any) -> str:
    """What a user calls a metric or scorer."""
    if metric is None or isinstance(metric, str):
        return f"scoring={metric!r}"
    while isinstance(metric, partial):
        metric = metric.func
    return getattr(metric, "__name__", None) or repr(metric)


def _with_unseen_labels(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """As `_with_unseen` of predicted labels, where these are each label, itself and another."""
    return np.concatenate([values, labels, labels, np.roll(labels, -1)])


def _with_unseen(values: np.ndarray, labels: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Scores of every sample, and of three that nobody saw for each label.

    The first has the mean scores of a sample with that label, as one of another class may have
    them. The second has the best that any sample got for it. The third is the first but for the
    probability of the label, which is exchanged for the smallest, so that it counts as an error
    however many guesses are allowed.
    """
    those = [values[y == label] if (y == label).any() else values for label in labels]
    mean = np.array([rows.mean(axis=0) for rows in those])
    best, worst = values[np.full(len(labels), values.argmin() if values.ndim == 1 else 0)], mean
    if values.ndim == 1:  # scores of the greatest label
        best[-1] = values.max()
    elif values.shape[1:] == labels.shape:
        each, least = np.arange(len(labels)), mean.argmin(axis=1)
        best, worst = values[values.argmax(axis=0)], mean.copy()
        worst[each, each], worst[each, least] = mean[each, least], mean[each, each]
    return np.concatenate([values, mean, best, worst])


class _Column:
    """Predictions of every sample."""

    def __init__(self, values: Any) -> None:
        values = np.asarray(values)
        self.values = values.ravel() if values.shape[1:] == (1,) else values
        self.are_labels = _are_labels(self.values)
        self.labels = np.unique(self.values) if self.are_labels else self.values[:0].ravel()
        self.extended = self.values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self.extended[rows]

    def extend(self, labels: np.ndarray, y: np.ndarray) -> None:
        if self.are_labels:
            self.extended = _with_unseen_labels(self.values, labels)
        else:
            self.extended = _with_unseen(self.values, labels, y)

    def codes(self, labels: np.ndarray) -> np.ndarray | None:
        return np.searchsorted(labels, self.values) if self.are_labels else None


class _Answered(ClassifierMixin, BaseEstimator):
    """A classifier that has predicted all of X, asked again by row numbers."""

    def __init__(self, estimator: Any, X: Any) -> None:
        check_is_fitted(estimator)
        if not isinstance(getattr(estimator, "classes_", None), np.ndarray):
            raise TypeError(
                f"{type(estimator).__name__} has no classes_: only fitted classifiers are scored "
                "here. metric_interval takes any predictions."
            )
        self.estimator = estimator
        self.X = X
        self.classes_ = self.labels = estimator.classes_
        self.answers: dict[str, np.ndarray] = {}
        self.extended: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return _num_samples(self.X)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        found = getattr(self.estimator, name)
        if name not in ("predict", "predict_proba", "decision_function"):
            if callable(found):  # it would take numbers of rows for samples
                raise AttributeError(name)
            return found

        def answer(rows: np.ndarray) -> np.ndarray:
            if name not in self.answers:
                self.answers[name] = np.asarray(found(self.X))
            return self.extended.get(name, self.answers[name])[rows]

        answer.__name__ = name  # scikit-learn asks for it
        return answer

    def extend(self, labels: np.ndarray, y: np.ndarray) -> None:
        for name, values in self.answers.items():
            self.extended[name] = (
                _with_unseen_labels(values, labels)
                if name == "predict"
                else _with_unseen(values, labels, y)
            )

    def codes(self, labels: np.ndarray) -> np.ndarray | None:
        if set(self.answers) != {"predict"}:
            return None
        return np.searchsorted(labels, self.answers["predict"])


def _scorer(answered: _Answered, scoring: Any, y: np.ndarray) -> Any:
    """The scorer that is meant, which knows every class of the classifier."""
    check_consistent_length(answered, y)
    estimator = answered.estimator
    if isinstance(scoring, (list, tuple, set, dict)):
        raise ValueError(f"scoring={scoring!r}: an interval is that of one scorer.")
    own = type(estimator).score
    if scoring is None and callable(getattr(estimator, "scorer_", None)):
        scoring = estimator.scorer_  # of a search
    elif scoring is None and own is not ClassifierMixin.score:
        accuracy = accuracy_score(y, answered.predict(np.arange(len(y))))
        if not np.isclose(estimator.score(answered.X, y), accuracy):
            raise ValueError(
                f"The score of {type(estimator).__name__} is not its accuracy: pass scoring=..."
            )
    scorer = scorers(scoring)[scoring] if isinstance(scoring, str) else scoring
    return with_labels(check_scoring(estimator, scorer), answered.classes_)


def with_labels(scorer: Any, classes: np.ndarray) -> Any:
    """Tell a scorer of probabilities the classes of their columns, lest it take those in y.

    Scorers of predicted labels, and those that do not ask, stay as they are.

    Parameters
    ----------
    scorer : callable
        Of scikit-learn's kind.
    classes : ndarray of shape (n_classes,)
        Classes of the classifier.

    Returns
    -------
    scorer : callable
        A copy that knows them.
    """
    known = getattr(scorer, "__dict__", {})
    if known.get("_response_method", "predict") == "predict" or (
        "labels" not in signature(known["_score_func"]).parameters
    ):
        return scorer
    scorer = copy(scorer)
    vars(scorer)["_kwargs"] = {"labels": classes, **known["_kwargs"]}
    return scorer


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
