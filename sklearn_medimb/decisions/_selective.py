"""Refusing the least certain."""

from __future__ import annotations

from functools import partial
from numbers import Real
from typing import Any, ClassVar, NamedTuple

import numpy as np
from sklearn.base import _fit_context, clone
from sklearn.utils._param_validation import Interval as Range
from sklearn.utils.validation import check_is_fitted

from sklearn_medimb.decisions._base import (
    ThresholdClassifier,
    out_of_fold,
    scores_by_class,
    split_patients,
)
from sklearn_medimb.decisions._bounds import confidence_of, independent_images
from sklearn_medimb.metrics import Interval, metric_interval
from sklearn_medimb.metrics._calibration import probabilities_of

LEVEL = 0.95  # of intervals, where no confidence is given
N_COVERAGES = 20  # that are tried for max_error, each with its share of the doubt


class CoverageCurve(NamedTuple):
    """Errors among the most certain: arrays of shape (n_thresholds,), by rising coverage."""

    coverage: np.ndarray
    error: np.ndarray
    threshold: np.ndarray
    area: float


def coverage_curve(y_true: Any, y_proba: Any, *, labels: Any = None) -> CoverageCurve:
    """Share of wrong answers among those that are certain enough, for every threshold.

    Parameters
    ----------
    y_true : array-like of shape (n,)
        True labels.
    y_proba : array-like of shape (n, n_classes) or (n,)
        Probabilities for patients that the classifier has not seen; one column is that of the
        greater of two labels.
    labels : array-like of shape (n_classes,), default=None
        Labels of the columns; None takes those of `y_true`, sorted.

    Returns
    -------
    curve : CoverageCurve
        ``coverage``, the share of samples whose greatest probability is at least ``threshold``;
        ``error``, the share of wrong answers among them; ``area`` under the error over coverage
        [1]_, 0 for a classifier that is never wrong.

    Raises
    ------
    ValueError
        If the columns are no probabilities, or do not fit the labels.

    References
    ----------
    .. [1] Y. Geifman, G. Uziel and R. El-Yaniv, "Bias-reduced uncertainty estimation for deep
       neural classifiers", ICLR 2019.

    Examples
    --------
    >>> from sklearn_medimb.decisions import coverage_curve
    >>> curve = coverage_curve([0, 1, 1, 0], [0.1, 0.9, 0.8, 0.6])
    >>> curve.coverage, curve.error
    (array([0.5 , 0.75, 1.  ]), array([0.  , 0.  , 0.25]))
    """
    y, proba, labels = probabilities_of(y_true, y_proba, labels)
    wrong = labels[proba.argmax(axis=1)] != y
    return _curve(proba.max(axis=1), wrong)


def _curve(certainty: np.ndarray, wrong: np.ndarray) -> CoverageCurve:
    order = np.argsort(-certainty, kind="stable")
    threshold = certainty[order]
    last = np.flatnonzero(np.append(np.diff(threshold) != 0, True))  # of equally certain ones
    coverage = (last + 1) / len(order)
    error = wrong[order].cumsum()[last] / (last + 1)
    area = float((error * np.diff(coverage, prepend=0)).sum())
    return CoverageCurve(coverage, error, threshold[last], area)


class SelectiveClassifier(ThresholdClassifier):
    """Classifier that says of which images it is too uncertain to decide.

    Certain enough is what gets a greatest probability from ``threshold_`` on, chosen on predictions
    for patients whom the classifier has not seen. ``accepts`` tells; ``predict`` stays as it is, so
    that scorers, which know no refusals, can be asked about all images and about the accepted::

        accepted = clf.accepts(X)
        clf.score(X[accepted], y[accepted]), accepted.mean()

    Parameters
    ----------
    estimator : classifier
        With ``predict_proba``, or for two classes with ``decision_function``.
    coverage : float, default=None
        Share of images to be decided; exactly one of this and `max_error` is given.
    max_error : float, default=None
        Share of wrong answers that the decided images may have, in truth and with `confidence`; as
        many images are decided as that allows.
    confidence : float, default=0.95
        That `max_error` is kept, and level of the intervals. None takes what these data ask for,
        without a promise, and intervals of .95.
    cv : int, splitter or iterable, default=5
        As of :class:`OperatingPoint`.
    random_state : int, RandomState or None, default=None
        Shuffles the folds that a number makes.
    n_jobs : int, default=None
        Folds that are fitted at a time.

    Attributes
    ----------
    threshold_ : float
        Least certainty of what is decided: the greatest probability (or distance from 0).
    coverage_, error_ : Interval
        ``score``, ``low`` and ``high`` of the share that is decided, and of wrong answers in it, on
        the predictions for unseen patients.
    curve_ : CoverageCurve
        Of them, for every threshold.
    estimator_ : classifier
        Fitted on everything.
    classes_ : ndarray of shape (n_classes,)
        Labels.
    n_features_in_ : int
        Where ``estimator_`` has it.
    feature_names_in_ : ndarray
        Where ``estimator_`` has it.

    See Also
    --------
    coverage_curve : Errors at every coverage.

    Notes
    -----
    Of 20 coverages the largest is taken at which no more errors than `max_error` are in doubt by a
    binomial bound, each with a 20th of the doubt, as Geifman and El-Yaniv [1]_ do. Several images
    of a patient count as fewer, as in :class:`OperatingPoint`. A rare class has less certain
    images, and may be refused most: look at ``clf.accepts(X[y == rare])``.

    References
    ----------
    .. [1] Y. Geifman and R. El-Yaniv, "Selective classification for deep neural networks",
       NeurIPS 2017.

    Examples
    --------
    >>> from sklearn.datasets import make_classification
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn_medimb.decisions import SelectiveClassifier
    >>> X, y = make_classification(1000, class_sep=0.8, random_state=0)
    >>> clf = SelectiveClassifier(LogisticRegression(), coverage=0.7, random_state=0).fit(X, y)
    >>> accepted = clf.accepts(X)
    >>> f"{clf.score(X, y):.2f} of all, {clf.score(X[accepted], y[accepted]):.2f} of 7 in 10"
    '0.92 of all, 0.97 of 7 in 10'
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **ThresholdClassifier._parameter_constraints,
        "coverage": [Range(Real, 0, 1, closed="right"), None],
        "max_error": [Range(Real, 0, 1, closed="neither"), None],
    }

    def __init__(
        self,
        estimator: Any,
        *,
        coverage: float | None = None,
        max_error: float | None = None,
        confidence: float | None = 0.95,
        cv: Any = 5,
        random_state: Any = None,
        n_jobs: int | None = None,
    ) -> None:
        self.estimator = estimator
        self.coverage = coverage
        self.max_error = max_error
        self.confidence = confidence
        self.cv = cv
        self.random_state = random_state
        self.n_jobs = n_jobs

    @_fit_context(prefer_skip_nested_validation=False)
    def fit(self, X: Any, y: Any, groups: Any = None, **fit_params: Any) -> SelectiveClassifier:
        """Choose the threshold on unseen patients, then fit the classifier on everything.

        Parameters
        ----------
        X : array-like or lazy sequence of n samples
            What the classifier takes.
        y : array-like of shape (n,)
            Labels.
        groups : array-like of shape (n,), default=None
            Patient of each sample, as in :class:`OperatingPoint`.
        **fit_params : dict
            For the classifier's ``fit``.

        Returns
        -------
        self : SelectiveClassifier
            The fitted classifier.

        Raises
        ------
        ValueError
            If not exactly one aim is given, or `max_error` cannot be kept.
        """
        if (self.coverage is None) == (self.max_error is None):
            raise ValueError("Give exactly one of coverage and max_error.")
        X, y, classes = self._read(X, y)
        params = self._routed({"groups": groups, **fit_params})
        splits, codes = split_patients(self.estimator, self.cv, y, groups, self.random_state)
        answer = partial(_certainty_and_class, classes=classes)
        answers = out_of_fold(self.estimator, X, y, splits, params, self.n_jobs, answer)
        certainty, wrong = answers[:, 0], answers[:, 1] != np.searchsorted(classes, y)
        curve = _curve(certainty, wrong)
        if self.max_error is not None:
            threshold = self._most_decided(self.max_error, curve, certainty, wrong, codes)
        elif self.coverage is not None:
            threshold = curve.threshold[np.searchsorted(curve.coverage, self.coverage - 1e-9)]
        found = metric_interval(
            _coverage_and_error,
            wrong,
            certainty >= threshold,
            labels=[False, True],
            groups=codes,
            level=self.confidence or LEVEL,
        )
        self._keep(clone(self.estimator).fit(X, y, **params))
        self.threshold_, self.curve_ = float(threshold), curve
        self.coverage_, self.error_ = (
            Interval(*map(float, one)) for one in zip(*found, strict=True)
        )
        return self

    def _most_decided(
        self,
        max_error: float,
        curve: CoverageCurve,
        certainty: np.ndarray,
        wrong: np.ndarray,
        groups: np.ndarray | None,
    ) -> float:
        if self.confidence is None:
            kept = np.flatnonzero(curve.error <= max_error)
        else:
            doubt = (1 - self.confidence) / N_COVERAGES
            tried = np.searchsorted(curve.coverage, np.linspace(0, 1, N_COVERAGES + 1)[1:] - 1e-9)
            kept = np.array([], dtype=int)
            for one in tried[::-1]:
                decided = certainty >= curve.threshold[one]
                n = float(decided.sum())
                if groups is not None:
                    n = independent_images(wrong[decided], groups[decided])[1]
                errors = np.array(curve.error[one] * n)
                if confidence_of(errors, n, max_error) >= 1 - doubt:
                    kept = np.array([one])
                    break
        if not len(kept):
            of = "kept" if self.confidence is None else "certain"
            raise ValueError(
                f"max_error={max_error} is not {of} (confidence={self.confidence}) on "
                f"{len(wrong)} samples for any share of them: raise max_error, lower confidence, "
                "or give coverage instead."
            )
        return float(curve.threshold[kept[-1]])

    def accepts(self, X: Any) -> np.ndarray:
        """Tell which samples are certain enough to be decided.

        Parameters
        ----------
        X : array-like or lazy sequence of n samples
            What the classifier takes.

        Returns
        -------
        mask : ndarray of bool of shape (n,)
            False where a person should look.
        """
        check_is_fitted(self)
        return scores_by_class(self.estimator_, X).max(axis=1) >= self.threshold_

    def predict(self, X: Any) -> np.ndarray:
        """Predict the most probable class, also where it is too uncertain to be relied on.

        Parameters
        ----------
        X : array-like or lazy sequence of n samples
            What the classifier takes.

        Returns
        -------
        y : ndarray of shape (n,)
            Labels of ``classes_``.
        """
        check_is_fitted(self)
        return self.classes_[scores_by_class(self.estimator_, X).argmax(axis=1)]


def _certainty_and_class(estimator: Any, X: Any, classes: np.ndarray) -> np.ndarray:
    """Greatest score of each sample, and the number of its label, as floats."""
    scores = scores_by_class(estimator, X)
    numbers = np.searchsorted(classes, estimator.classes_)  # a fold may lack a class
    return np.column_stack([scores.max(axis=1), numbers[scores.argmax(axis=1)]])


def _coverage_and_error(wrong: np.ndarray, decided: np.ndarray) -> list[float]:
    wrong, decided = wrong.astype(bool), decided.astype(bool)
    n = decided.sum()
    return [float(decided.mean()), float((wrong & decided).sum() / n) if n else np.nan]
