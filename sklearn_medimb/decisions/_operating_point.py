"""A threshold that keeps a promise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from numbers import Real
from typing import Any, ClassVar

import numpy as np
from sklearn.base import _fit_context, clone
from sklearn.utils._param_validation import Interval as Range
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from sklearn_medimb.decisions._base import (
    ThresholdClassifier,
    has,
    out_of_fold,
    scores_by_class,
    split_patients,
)
from sklearn_medimb.decisions._bounds import TooFewError, misses_allowed
from sklearn_medimb.metrics import Interval, metric_interval
from sklearn_medimb.metrics._sides import check_prevalence, positive_classes, rates

LEVEL = 0.95  # of intervals, where no confidence is given


class OperatingPoint(ThresholdClassifier):
    """Classifier that finds a promised share of the ill, and no more false alarms than that takes.

    The threshold is chosen on predictions for patients whom the classifier has not seen, by
    cross-validation; then the classifier is fitted on everything. With `min_sensitivity` it is
    so low that sensitivity on further patients is as promised with the stated confidence, whatever
    the distribution of scores: the bound is that of an order statistic [1]_ [2]_. An estimated
    threshold without it misses what it aims at half of the time.

    Parameters
    ----------
    estimator : classifier
        With ``predict_proba``, or for two classes with ``decision_function``. Several images of a
        patient: see `groups` of ``fit``. A :class:`~sklearn.frozen.FrozenEstimator` is taken as
        it is, fitted on other patients, and needs no cross-validation.
    min_sensitivity : float, default=None
        Share of the ill to be found; exactly one of this and the two that follow is given.
    min_specificity : float, default=None
        Share of the well to be left in peace.
    cost : (float, float), default=None
        Of a missed positive and of a false alarm: the threshold is that of the least mean cost at
        `prevalence`, without a promise.
    prevalence : float, default=None
        Share of the ill where the classifier is to be used, which predictive values and `cost`
        depend on; None is that in `y`.
    positive : label or collection of labels, default=None
        The disease; all other labels are the other side. None takes the greater one of two
        numbers, and refuses texts, whose order says nothing.
    confidence : float, default=0.95
        That the promise is kept, and level of the intervals. None takes the threshold that these
        data ask for, without a promise, and intervals of .95.
    cv : int, splitter or iterable, default=5
        Folds; each sample is tested once. A number makes stratified ones, of whole patients where
        `groups` are given.
    random_state : int, RandomState or None, default=None
        Shuffles the folds that a number makes.
    n_jobs : int, default=None
        Folds that are fitted at a time.

    Attributes
    ----------
    threshold_ : float
        Of the summed probability of the positive labels (or of the score): positive from there on.
    sensitivity_, specificity_ : Interval
        ``score``, ``low`` and ``high`` on the predictions for unseen patients, two-sided: ``low``
        may lie a little below what is promised, which is a bound to one side.
    ppv_, npv_ : Interval
        Positive and negative predictive value at ``prevalence_``, by Bayes' formula.
    prevalence_ : float
        Share of the ill that they hold for.
    positive_ : ndarray
        The labels that are the disease.
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
    sklearn.model_selection.TunedThresholdClassifierCV : Maximises a score of two classes.
    PriorShift : Brings probabilities to the true frequencies.

    Notes
    -----
    A promise takes ill patients: 59 for a sensitivity of .95 with a confidence of .95, since of
    fewer all may be found by chance. Where there are too few ``fit`` refuses, and says what can be
    promised. It does not settle for less: a threshold that looks as if it kept a promise is worse
    than none.

    Images of one patient count as fewer: by an upper bound of their design effect, at most as
    one patient [3]_. The sensitivity promised is that of images, of patients like these.

    The promise is exact for a frozen classifier and samples that do not depend on one another. By
    cross-validation it supposes that the scores of the last fit, on everything, are distributed as
    those of the folds. Where a classifier would still gain from more samples the last fit is the
    better one: in simulations the promise was kept, but the intervals were about the folds. With
    60 features of 100 ill and 300 well that of specificity covered the last fit's in 55 % with 5
    folds, in 92 % with 20: take more folds there.

    ``predict`` gives the most probable label of the side that is decided on: with two labels, that
    one. Weights given to ``fit`` reach the classifier only; the threshold counts each sample once.

    References
    ----------
    .. [1] S. S. Wilks, "Determination of sample sizes for setting tolerance limits", Annals of
       Mathematical Statistics 1941.
    .. [2] X. Tong, Y. Feng and A. Zhao, "Neyman-Pearson classification algorithms and NP receiver
       operating characteristics", Science Advances 2018.
    .. [3] E. L. Korn and B. I. Graubard, "Confidence intervals for proportions with small expected
       number of positive counts estimated from survey data", Survey Methodology 1998.

    Examples
    --------
    >>> from sklearn.datasets import make_classification
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn_medimb.decisions import OperatingPoint
    >>> X, y = make_classification(1000, weights=[0.8], class_sep=0.8, random_state=0)
    >>> clf = OperatingPoint(
    ...     LogisticRegression(), min_sensitivity=0.9, prevalence=0.02, random_state=0
    ... ).fit(X, y)
    >>> f"{clf.sensitivity_.score:.2f}, at 2 % ill {clf.ppv_.score:.3f} of the positives are"
    '0.94, at 2 % ill 0.109 of the positives are'
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **ThresholdClassifier._parameter_constraints,
        "min_sensitivity": [Range(Real, 0, 1, closed="neither"), None],
        "min_specificity": [Range(Real, 0, 1, closed="neither"), None],
        "cost": "no_validation",
        "prevalence": "no_validation",  # as of the metrics, whose error says why
        "positive": "no_validation",
    }

    def __init__(
        self,
        estimator: Any,
        *,
        min_sensitivity: float | None = None,
        min_specificity: float | None = None,
        cost: Sequence[float] | None = None,
        prevalence: float | None = None,
        positive: Any = None,
        confidence: float | None = 0.95,
        cv: Any = 5,
        random_state: Any = None,
        n_jobs: int | None = None,
    ) -> None:
        self.estimator = estimator
        self.min_sensitivity = min_sensitivity
        self.min_specificity = min_specificity
        self.cost = cost
        self.prevalence = prevalence
        self.positive = positive
        self.confidence = confidence
        self.cv = cv
        self.random_state = random_state
        self.n_jobs = n_jobs

    @_fit_context(prefer_skip_nested_validation=False)
    def fit(self, X: Any, y: Any, groups: Any = None, **fit_params: Any) -> OperatingPoint:
        """Choose the threshold on unseen patients, then fit the classifier on everything.

        Parameters
        ----------
        X : array-like or lazy sequence of n samples
            What the classifier takes.
        y : array-like of shape (n,)
            Labels.
        groups : array-like of shape (n,), default=None
            Patient of each sample: none is in training and test, and the promise is about further
            patients. They also reach the classifier's ``fit`` if it takes them.
        **fit_params : dict
            For the classifier's ``fit``.

        Returns
        -------
        self : OperatingPoint
            The fitted classifier.

        Raises
        ------
        ValueError
            If parameters contradict one another or the labels, or if there are too few samples for
            the promise.
        """
        cost = self._check_aim()
        X, y, classes = self._read(X, y)
        mask = positive_classes(classes, self.positive)
        ill = np.isin(y, classes[mask])
        prevalence = ill.mean() if self.prevalence is None else check_prevalence(self.prevalence)
        params = self._routed({"groups": groups, **fit_params})
        splits, codes = split_patients(self.estimator, self.cv, y, groups, self.random_state)
        for k, (train, _) in enumerate(splits):
            if ill[train].all() or not ill[train].any():
                side = "negative" if ill[train].all() else "positive"
                raise ValueError(
                    f"cv={self.cv!r} leaves fold {k} no {side} sample to train on: take other "
                    "folds, of patients of whom several have one."
                )
        # Before all the work: too few samples are too few whatever their scores.
        self._threshold(ill.astype(np.float64), ill, codes, prevalence, cost)
        score = partial(_positive_score, positives=classes[mask])
        scores = out_of_fold(self.estimator, X, y, splits, params, self.n_jobs, score)
        threshold = self._threshold(scores, ill, codes, prevalence, cost)
        found = metric_interval(
            partial(_all_rates, prevalence=prevalence),
            ill,
            scores >= threshold,
            labels=[False, True],
            groups=codes,
            level=self.confidence or LEVEL,
        )
        self._keep(clone(self.estimator).fit(X, y, **params))
        self.threshold_ = threshold
        self.sensitivity_, self.specificity_, self.ppv_, self.npv_ = (
            Interval(*map(float, one)) for one in zip(*found, strict=True)
        )
        self.prevalence_ = float(prevalence)
        self.positive_ = classes[mask]
        return self

    def _check_aim(self) -> np.ndarray | None:
        """Return both costs, if these are the aim."""
        names = ("min_sensitivity", "min_specificity", "cost")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"Give exactly one of min_sensitivity, min_specificity and cost, not "
                f"{' and '.join(given) or 'none'}."
            )
        if self.cost is None:
            return None
        try:
            cost = np.asarray(self.cost, dtype=np.float64)
        except (TypeError, ValueError):
            cost = np.empty(0)
        if cost.shape != (2,) or not (np.isfinite(cost) & (cost > 0)).all():
            raise ValueError(
                f"cost={self.cost!r} must be two numbers above 0: of a missed positive and of a "
                "false alarm."
            )
        return cost

    def _threshold(
        self,
        scores: np.ndarray,
        ill: np.ndarray,
        groups: np.ndarray | None,
        prevalence: float,
        cost: np.ndarray | None,
    ) -> float:
        if cost is not None:
            return _cheapest(scores, ill, prevalence * cost[0], (1 - prevalence) * cost[1])
        name = "min_sensitivity" if self.min_specificity is None else "min_specificity"
        # Specificity is the sensitivity of the mirrored question.
        sign, rows = (1, ill) if self.min_specificity is None else (-1, ~ill)
        rows = np.flatnonzero(rows)
        order = rows[np.argsort(sign * scores[rows], kind="stable")]
        promised = getattr(self, name)
        try:
            n_missed = misses_allowed(order, 1 - promised, self.confidence, groups)
        except TooFewError as few:
            side = "positive" if sign > 0 else "negative"
            of = "samples" if groups is None else "patients, as which these images count"
            raise ValueError(
                f"{name}={promised} cannot be promised with confidence={self.confidence} on "
                f"{few.n:.0f} {side} {of}: at most {few.largest:.3f} can; it takes {few.needed}. "
                f"Lower {name} or confidence, or pass confidence=None, for a threshold that "
                "promises nothing."
            ) from None
        last = scores[order[n_missed]]
        return float(last if sign > 0 else np.nextafter(last, np.inf))

    def predict(self, X: Any) -> np.ndarray:
        """Predict the most probable label of the side that the threshold decides on.

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
        scores = scores_by_class(self.estimator_, X)
        mask = np.isin(self.classes_, self.positive_)
        called = scores[:, mask].sum(axis=1) >= self.threshold_
        own_side = mask == called[:, np.newaxis]
        return self.classes_[np.where(own_side, scores, -np.inf).argmax(axis=1)]

    @available_if(has("decision_function"))
    def decision_function(self, X: Any) -> np.ndarray:
        """Scores of the wrapped classifier, as it gives them.

        Parameters
        ----------
        X : array-like or lazy sequence of n samples
            What the wrapped classifier takes.

        Returns
        -------
        scores : ndarray of shape (n,) or (n, n_classes)
            Of the greater label where there are two.
        """
        check_is_fitted(self)
        return self.estimator_.decision_function(X)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        if self.positive is None:
            tags.classifier_tags.multi_class = False
        return tags


def _positive_score(estimator: Any, X: Any, positives: np.ndarray) -> np.ndarray:
    scores = scores_by_class(estimator, X)
    return scores[:, np.isin(estimator.classes_, positives)].sum(axis=1)


def _all_rates(ill: np.ndarray, called: np.ndarray, prevalence: float) -> list[float]:
    return list(rates(ill.astype(bool), called.astype(bool), prevalence).values())


def _cheapest(scores: np.ndarray, ill: np.ndarray, missed: float, alarm: float) -> float:
    """Threshold of the least mean cost; of several the most sensitive one."""
    thresholds = np.append(np.unique(scores), np.inf)
    below = np.searchsorted(np.sort(scores[ill]), thresholds)
    above = (~ill).sum() - np.searchsorted(np.sort(scores[~ill]), thresholds)
    costs = missed * below / ill.sum() + alarm * above / (~ill).sum()
    return float(thresholds[(costs <= costs.min() * (1 + 1e-12)).argmax()])
