"""Intervals that know that images of a patient resemble one another."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import accuracy_score, check_scoring, get_scorer
from sklearn.metrics._scorer import _PassthroughScorer
from sklearn.pipeline import Pipeline
from sklearn.utils import check_consistent_length
from sklearn.utils.validation import _num_samples, check_is_fitted

from sklearn_medimb._data.rows import group_codes
from sklearn_medimb.metrics._labels import (
    are_labels,
    classes_in,
    entries,
    kind_of_entries,
    labels_of,
    refuse_strangers,
)
from sklearn_medimb.metrics._score_intervals import Interval, as_numbers, profile_interval
from sklearn_medimb.metrics._scorers import StandIn, scorer_name, scorers, with_labels

# ---------------------------------------------------------------- intervals


def metric_interval(
    metric: Callable[[np.ndarray, np.ndarray], Any],
    y_true: Any,
    y_pred: Any,
    *,
    labels: Any = None,
    groups: Any = None,
    level: float = 0.95,
    n_resamples: int = 1000,
    random_state: Any = None,
) -> Interval:
    """Confidence interval of a metric, by patients where they are known.

    It is a score interval: for a recall Wilson's, [.57, 1] where five of five are found, and the
    same idea for every other metric (`sklearn_medimb.metrics._score_intervals`).

    Parameters
    ----------
    metric : callable
        ``metric(y_true, y_pred)``, such as :func:`sklearn.metrics.balanced_accuracy_score`, that
        gives a number or an array of them, such as the recall of each class.
    y_true : array-like of shape (n,) or (n, n_outputs)
        True labels, or numbers.
    y_pred : array-like of shape (n,) or (n, n_classes)
        What `metric` compares them with: labels or probabilities.
        Labels that no sample has stand in for those that were not seen: a metric compares labels,
        ``(p[y == 1] == 1).mean()``, and does not add them up, ``p[y == 1].mean()``.
    labels : array-like of shape (n_classes,), default=None
        Labels that `y_true` and predictions may hold. An empty list says that they hold numbers,
        as ages; None finds out, see Notes.
    groups : array-like of shape (n,), default=None
        Patient of each sample: the interval then is about further patients, with all their
        samples. Without them, correlated samples make it too narrow.
    level : float, default=0.95
        Wanted coverage.
    n_resamples : int, default=1000
        The metric is computed at most a few times as often, on slightly changed samples. Where
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
        If the metric gives no numbers, or NaN, or an entry is missing or of another kind.

    Notes
    -----
    Strings and truth values are labels. Whether whole numbers are labels the metric decides, for it
    is also asked about numbers that are drawn together. They are labels where it compares them, so
    that it jumps, as an accuracy, or fails. They are numbers or scores where it changes in
    proportion, as a mean absolute error of ages, or not at all, as an area under a curve, for which
    0 and 1 are scores like any others. True values of at most ten kinds that occur five times on
    average, as grades do, are labels in any case.

    Of samples that were not seen the interval supposes no more than that they may be predicted as
    any label, or, where `y_pred` holds scores, as an average sample of another class is.

    Near its least value a product of recalls, such as the geometric mean, is covered more often
    than `level` says. A minimum of recalls that are about equal is covered less often, the more so
    the fewer samples: of five each about .85 where .95 is wanted, since the least of several shares
    is too low in the mean. No bound is beyond what the metric can be on any samples.

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
    y, column = entries(y_true, "y_true"), _Column(y_pred, "y_pred")
    how = _How(groups, level, n_resamples, random_state)
    name = scorer_name(metric)
    return _interval(
        lambda y, rows: metric(y, column[rows]), y, [column], how, name, metric, labels
    )


def paired_difference(
    metric: Callable[[np.ndarray, np.ndarray], Any],
    y_true: Any,
    pred_a: Any,
    pred_b: Any,
    *,
    labels: Any = None,
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
    metric, y_true, labels, groups, level, n_resamples, random_state
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
    y, a, b = entries(y_true, "y_true"), _Column(pred_a, "pred_a"), _Column(pred_b, "pred_b")
    how = _How(groups, level, n_resamples, random_state)
    name = scorer_name(metric)

    def score(y: np.ndarray, of_a: np.ndarray, of_b: np.ndarray) -> Any:
        return _minus(metric(y, a[of_a]), metric(y, b[of_b]), name)

    return _interval(score, y, [a, b], how, name, metric, labels)


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
        ``score``: a search's scorer, or accuracy.
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
        As in :func:`metric_interval`, if the scorer needs a class that `y` lacks, or if the
        classifier's own score is asked for and is another one.
    """
    y = labels_of(y, "y")
    answered = _Answered(estimator, X, y)
    scorer = _scorer(answered, scoring)
    how = _How(groups, level, n_resamples, random_state)
    return _interval(
        lambda y, rows: scorer(answered, rows, y), y, [answered], how, scorer_name(scoring)
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
    y = labels_of(y, "y")
    a, b = _Answered(estimator_a, X, y), _Answered(estimator_b, X, y)
    score_a, score_b = _scorer(a, scoring), _scorer(b, scoring)
    how = _How(groups, level, n_resamples, random_state)
    name = scorer_name(scoring)

    def score(y: np.ndarray, of_a: np.ndarray, of_b: np.ndarray) -> Any:
        return _minus(score_a(a, of_a, y), score_b(b, of_b, y), name)

    return _interval(score, y, [a, b], how, name)


class _How(NamedTuple):
    """What all four functions are told of the interval itself."""

    groups: Any
    level: float
    n_resamples: int
    random_state: Any


def _interval(
    score: Callable[..., Any],
    y: Any,
    columns: list[Any],
    how: _How,
    name: str,
    metric: Any = None,
    labels: Any = None,
) -> Interval:
    """Interval of ``score(y[rows], rows, ...)``, with the rows of each column of predictions.

    A column may also be asked for what it would hold of a sample that it did not see: beyond the
    last row it has three more for each label, see `_with_unseen`. Where a `metric` is asked, it
    also tells labels from numbers; true values of a scorer are labels.
    """
    check_consistent_length(y, *columns)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y.ravel()
    n, every = len(y), np.arange(len(y))
    units = every if how.groups is None else group_codes(how.groups, np.empty(n))
    known = {label for column in columns for label in column.labels.tolist()}
    lacking = known - set(y.ravel().tolist())
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
    if metric is None:
        classes = np.unique(y)
    else:
        classes = classes_in(y, labels, metric, [column.values for column in columns])
    if len(classes):
        given = classes if labels is None else labels_of(labels, "labels")
        for column in columns:
            if metric is not None:
                column.settle(metric, y, given)
        labels = np.unique(np.concatenate([given, *(column.labels for column in columns)]))
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
        seen = [column.codes() for column in columns]
        if all(code is not None for code in seen):
            cells = np.unique(np.column_stack([codes, *seen]), axis=0, return_inverse=True)[1]
            cells = cells.ravel()

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
        level=how.level,
        n_resamples=how.n_resamples,
        random_state=how.random_state,
        name=name,
    )


def _another(label: Any) -> Any:
    """A second label where there is one only."""
    if isinstance(label, str):
        return "not " + label
    return type(label)(not label) if isinstance(label, (bool, int, float)) else label


def _minus(a: Any, b: Any, name: str) -> Any:
    return as_numbers(a, name) - as_numbers(b, name)


def _with_unseen(values: np.ndarray, labels: np.ndarray, y: np.ndarray | None) -> np.ndarray:
    """Scores of every sample, and of three that nobody saw for each label.

    The first has the mean scores of a sample with that label, as one of another class may have
    them. The second has the best that any sample got for it. The third is the first but for the
    probability of the label, which is exchanged for the smallest, so that it counts as an error
    however many guesses are allowed. Of predicted labels, which need no `y`, the three are each
    label, itself and another.
    """
    if y is None:
        return np.concatenate([values, labels, labels, np.roll(labels, -1)])
    those = [values[y == label] if (y == label).any() else values for label in labels]
    mean = _tied(np.array([rows.mean(axis=0) for rows in those]), values)
    best, worst = values[np.full(len(labels), values.argmin() if values.ndim == 1 else 0)], mean
    if values.ndim == 1:  # scores of the greatest label
        best[-1] = values.max()
    elif values.shape[1:] == labels.shape:
        each, least = np.arange(len(labels)), mean.argmin(axis=1)
        best, worst = values[values.argmax(axis=0)], mean.copy()
        worst[each, each], worst[each, least] = mean[each, least], mean[each, each]
    return np.concatenate([values, mean, best, worst])


def _tied(means: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Means, equal to a score where they are so but for rounding: rankings count ties."""
    near = 1e-9 * np.ptp(values)
    for mean, scores in zip(np.atleast_2d(means.T), np.atleast_2d(values.T), strict=True):
        scores = np.sort(scores)
        one = scores[np.searchsorted(scores, mean - near).clip(max=len(scores) - 1)]
        mean[:] = np.where(np.abs(one - mean) <= near, one, mean)
    return means


def _codes(values: np.ndarray) -> np.ndarray | None:
    """Equal numbers for equal predictions."""
    return np.unique(values, return_inverse=True)[1] if values.ndim == 1 else None


class _Column:
    """Predictions of every sample."""

    def __init__(self, values: Any, name: str) -> None:
        values, self.name = entries(values, name), name
        self.values = values.ravel() if values.shape[1:] == (1,) else values
        self.are_labels = values.dtype.kind == "U"  # what else is, the metric tells
        self.labels = np.unique(self.values) if self.are_labels else self.values[:0].ravel()
        self.extended = self.values

    def settle(self, metric: Any, y: np.ndarray, classes: np.ndarray) -> None:
        self.are_labels = are_labels(metric, y, self.values, classes, self.name)
        self.labels = np.unique(self.values) if self.are_labels else classes[:0]

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self.extended[rows]

    def extend(self, labels: np.ndarray, y: np.ndarray) -> None:
        self.extended = _with_unseen(self.values, labels, None if self.are_labels else y)

    def codes(self) -> np.ndarray | None:
        return _codes(self.values)


class _Answered(StandIn, ClassifierMixin, BaseEstimator):
    """A classifier that has predicted all of X, asked again by row numbers."""

    def __init__(self, estimator: Any, X: Any, y: np.ndarray) -> None:
        check_is_fitted(estimator)
        while isinstance(estimator, FrozenEstimator):
            estimator = estimator.estimator
        if not isinstance(getattr(estimator, "classes_", None), np.ndarray):
            raise TypeError(
                f"{type(estimator).__name__} has no classes_: only fitted classifiers are scored "
                "here. metric_interval takes any predictions."
            )
        self.estimator = estimator
        self.X = X
        self.y = y
        self.scored = estimator  # whose own score is asked for
        self.classes_ = self.labels = estimator.classes_
        self.answers: dict[str, np.ndarray] = {}
        self.extended: dict[str, np.ndarray] = {}
        self.own: tuple[Any, _Answered] | None = None
        check_consistent_length(self, y)
        kind_of_entries(y, "y")
        refuse_strangers(y, self.classes_)

    def score(self, rows: np.ndarray, y: np.ndarray) -> float:
        """Score as the estimator's own ``score``, which would take numbers of rows for samples."""
        if self.own is None:
            self.own = _own_scorer(self)
        scorer, answered = self.own
        return scorer(answered, rows, y)

    def __len__(self) -> int:
        return _num_samples(self.X)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        found = getattr(self.estimator, name)
        if name not in ("predict", "predict_proba", "decision_function"):
            if callable(found):
                raise AttributeError(
                    f"{name} of {type(self.estimator).__name__} cannot be called here: it would "
                    "take numbers of rows for samples."
                )
            return found

        def answer(rows: np.ndarray) -> np.ndarray:
            if name not in self.answers:
                self.answers[name] = np.asarray(found(self.X))
            return self.extended.get(name, self.answers[name])[rows]

        answer.__name__ = name  # scikit-learn asks for it
        return answer

    def extend(self, labels: np.ndarray, y: np.ndarray) -> None:
        for name, values in self.answers.items():
            self.extended[name] = _with_unseen(values, labels, None if name == "predict" else y)

    def codes(self) -> np.ndarray | None:
        return _codes(*self.answers.values()) if len(self.answers) == 1 else None


def _scorer(answered: _Answered, scoring: Any) -> Any:
    """The scorer that is meant, which knows every class of the classifier."""
    if isinstance(scoring, (list, tuple, set, dict)):
        raise ValueError(f"scoring={scoring!r}: an interval is that of one scorer.")
    scorer = scorers(scoring)[scoring] if isinstance(scoring, str) else scoring
    return with_labels(check_scoring(answered.estimator, scorer), answered.classes_)


def _own_scorer(answered: _Answered) -> tuple[Any, _Answered]:
    """Scorer that the estimator's own ``score`` is, a search's or accuracy, and whom it asks."""
    estimator = answered.scored
    while True:
        scorer = getattr(estimator, "scorer_", None)
        if isinstance(estimator, FrozenEstimator):
            estimator = estimator.estimator
        elif isinstance(estimator, Pipeline):
            estimator = estimator.steps[-1][1]
        elif isinstance(scorer, _PassthroughScorer):  # of a search without scoring=
            estimator = estimator.best_estimator_
        else:
            break
    if isinstance(scorer, dict) and hasattr(estimator, "best_estimator_"):
        scorer = scorer[estimator.refit]
    if callable(scorer):
        inner = copy(answered)  # the scorer may ask for the own score in turn
        inner.scored, inner.own = estimator.best_estimator_, None
        return with_labels(scorer, answered.classes_), inner
    if getattr(type(estimator), "score", None) is not ClassifierMixin.score:
        # What equals accuracy for labels at random, most of one class, is accuracy.
        n, n_classes = len(answered), len(answered.classes_)
        random = (np.random.default_rng(0).random(n) ** 2 * n_classes).astype(int)
        predicted = answered.predict(np.arange(n))
        for y in (answered.y, answered.classes_[random]):
            if not np.isclose(answered.scored.score(answered.X, y), accuracy_score(y, predicted)):
                raise ValueError(
                    f"The score of {type(estimator).__name__} is not its accuracy: pass scoring=..."
                )
    return get_scorer("accuracy"), answered
