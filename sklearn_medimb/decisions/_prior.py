"""Probabilities at the true frequencies of the classes."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any, ClassVar

import numpy as np
from sklearn.base import _fit_context, clone
from sklearn.utils import check_array
from sklearn.utils._param_validation import HasMethods, StrOptions
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from sklearn_medimb.decisions._base import WrappedClassifier, has
from sklearn_medimb.metrics._sides import check_prevalence, positive_classes


def shift_prior(proba: Any, *, train_prior: Any, prevalence: Any) -> np.ndarray:
    """Bring class probabilities from one prior to another, by Bayes' formula.

    ``p'(k | x)`` is proportional to ``p(k | x) * prevalence[k] / train_prior[k]``: exact if the
    images of a class look alike in both places and only the classes' frequencies differ [1]_.

    Parameters
    ----------
    proba : array-like of shape (n, n_classes)
        Class probabilities at `train_prior`; those of a row sum to 1.
    train_prior : array-like of shape (n_classes,) or "balanced"
        Class shares that the probabilities belong to; balanced are equal ones.
    prevalence : array-like of shape (n_classes,) or float
        True class shares; of two classes that of the second one.

    Returns
    -------
    proba : ndarray of shape (n, n_classes)
        Rows sum to 1; zeros and ones stay what they are.

    Raises
    ------
    ValueError
        If shares do not lie between 0 and 1 or do not sum to 1, or probabilities are none.

    References
    ----------
    .. [1] M. Saerens, P. Latinne and C. Decaestecker, "Adjusting the outputs of a classifier to new
       a priori probabilities: a simple procedure", Neural Computation 2002.

    Examples
    --------
    >>> from sklearn_medimb.decisions import shift_prior
    >>> shift_prior([[0.1, 0.9]], train_prior="balanced", prevalence=0.01).round(3)
    array([[0.917, 0.083]])
    """
    proba = check_array(proba, dtype=[np.float64, np.float32], input_name="proba")
    if (proba < 0).any() or not np.allclose(proba.sum(axis=1), 1, atol=1e-3):
        row = ((proba < 0).any(axis=1) | (np.abs(proba.sum(axis=1) - 1) > 1e-3)).argmax()
        raise ValueError(f"proba holds no probabilities in row {row}: {proba[row].tolist()}.")
    k = proba.shape[1]
    if isinstance(prevalence, Real) and k == 2:
        prevalence = [1 - check_prevalence(prevalence), prevalence]
    if isinstance(train_prior, str) and train_prior == "balanced":
        train_prior = np.full(k, 1 / k)
    before, after = _shares(train_prior, k, "train_prior"), _shares(prevalence, k, "prevalence")
    shifted = proba.astype(np.float64) * (after / before)
    return (shifted / shifted.sum(axis=1, keepdims=True)).astype(proba.dtype)


def _shares(values: Any, n_classes: int, name: str) -> np.ndarray:
    try:
        shares = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        shares = np.empty(0)
    inside = shares.shape == (n_classes,) and ((shares > 0) & (shares < 1)).all()
    if not inside or abs(shares.sum() - 1) > 1e-6:
        raise ValueError(
            f"{name}={values!r} must give each of the {n_classes} classes a share between 0 and 1, "
            "all of them 1."
        )
    return shares / shares.sum()


class PriorShift(WrappedClassifier):
    """Classifier whose probabilities hold where the classes have their true frequencies.

    What is trained for all classes alike gives a disease that 1 in 100 has the probability .5 where
    it should say .01. Bayes' formula brings it back [1]_, see :func:`shift_prior`.

    Parameters
    ----------
    estimator : classifier
        With ``predict_proba``.
    prevalence : dict from label to float, or float
        True share of each class, all of them 1; of two classes that of `positive`.
    train_prior : "balanced", "training" or dict from label to float, default="balanced"
        Class shares that the classifier's probabilities belong to, see Notes.
    positive : label, default=None
        Of two classes the one that a number as `prevalence` is the share of. None takes the greater
        one of two numbers, and refuses texts.

    Attributes
    ----------
    estimator_ : classifier
        Fitted.
    prevalence_ : ndarray of shape (n_classes,)
        True shares, by ``classes_``.
    train_prior_ : ndarray of shape (n_classes,)
        Shares that the classifier's probabilities belong to, by ``classes_``.
    classes_ : ndarray of shape (n_classes,)
        Labels.
    n_features_in_ : int
        Where ``estimator_`` has it.
    feature_names_in_ : ndarray
        Where ``estimator_`` has it.

    See Also
    --------
    shift_prior : The formula alone.
    OperatingPoint : A threshold that keeps a promise, whatever the prior.

    Notes
    -----
    Equal class shares, "balanced", are what a classifier is taught by ``class_weight="balanced"``,
    by samplers that make or draw classes in equal numbers, by the losses "balanced_softmax" and
    "logit_adjusted", by the balanced heads of :mod:`sklearn_medimb.rebalance`, and so by the
    two-stage classifiers and CSSN as they are by default. Those of `y`, "training", weighed by the
    `sample_weight` of ``fit``, are right for whatever is trained on the images as they are: plain
    cross-entropy, ``LogisticRegression()``, ``rebalance="none"``. What is in between, a sampler
    with another strategy or ``class_weight={...}``, needs its shares as a dict: images of a class
    times their weight. Focal and margin losses give no probabilities of any prior: calibrate them
    first.

    Shares do not mend probabilities that are too sure of themselves. Calibrate first, on
    out-of-fold predictions, and with "training" then: the calibrated ones belong to `y`.

    References
    ----------
    .. [1] M. Saerens, P. Latinne and C. Decaestecker, "Adjusting the outputs of a classifier to new
       a priori probabilities: a simple procedure", Neural Computation 2002.

    Examples
    --------
    >>> from sklearn.datasets import make_classification
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn_medimb.decisions import PriorShift
    >>> X, y = make_classification(1000, weights=[0.8], random_state=0)
    >>> clf = PriorShift(LogisticRegression(class_weight="balanced"), prevalence=0.2).fit(X, y)
    >>> before, after = (one.predict_proba(X)[:, 1].mean() for one in (clf.estimator_, clf))
    >>> f"{before:.2f} -> {after:.2f}"
    '0.25 -> 0.20'
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "estimator": [HasMethods(["fit", "predict_proba"])],
        "prevalence": "no_validation",  # their errors know the classes
        "train_prior": [StrOptions({"balanced", "training"}), Mapping],
        "positive": "no_validation",
    }

    def __init__(
        self,
        estimator: Any,
        prevalence: Any,
        *,
        train_prior: Any = "balanced",
        positive: Any = None,
    ) -> None:
        self.estimator = estimator
        self.prevalence = prevalence
        self.train_prior = train_prior
        self.positive = positive

    @_fit_context(prefer_skip_nested_validation=False)
    def fit(self, X: Any, y: Any, **fit_params: Any) -> PriorShift:
        """Fit the classifier.

        Parameters
        ----------
        X : array-like or lazy sequence of n samples
            What the classifier takes.
        y : array-like of shape (n,)
            Labels.
        **fit_params : dict
            For the classifier's ``fit``; `groups` only if it takes them.

        Returns
        -------
        self : PriorShift
            The fitted classifier.

        Raises
        ------
        ValueError
            If the shares do not belong to the labels.
        """
        X, y, classes = self._read(X, y)
        if isinstance(self.prevalence, Mapping):
            prevalence = _by_label(self.prevalence, classes, "prevalence")
        elif len(classes) == 2:
            share = check_prevalence(self.prevalence)
            prevalence = np.where(positive_classes(classes, self.positive), share, 1 - share)
        else:
            raise ValueError(
                "Only binary classification is supported by one number, "
                f"prevalence={self.prevalence!r}: pass {{label: share}} for the {len(classes)} "
                "classes."
            )
        params = self._routed(fit_params)
        if isinstance(self.train_prior, Mapping):
            before = _by_label(self.train_prior, classes, "train_prior")
        elif self.train_prior == "training":
            weight = params.get("sample_weight")
            shares = [np.average(y == label, weights=weight) for label in classes]
            before = _shares(shares, len(classes), "train_prior")
        else:
            before = np.full(len(classes), 1 / len(classes))
        fitted = clone(self.estimator).fit(X, y, **params)
        if not np.array_equal(fitted.classes_, classes):
            raise ValueError(
                f"y holds {classes.tolist()}, but the classifier knows {fitted.classes_.tolist()}: "
                "leave out rows that it does not take for a class."
            )
        self._keep(fitted)
        self.prevalence_, self.train_prior_ = prevalence, before
        return self

    @available_if(has("predict_proba"))
    def predict_proba(self, X: Any) -> np.ndarray:
        """Predict class probabilities at the true frequencies.

        Parameters
        ----------
        X : array-like or lazy sequence of n samples
            What the classifier takes.

        Returns
        -------
        proba : ndarray of shape (n, n_classes)
            Columns follow ``classes_``.
        """
        check_is_fitted(self)
        return shift_prior(
            self.estimator_.predict_proba(X),
            train_prior=self.train_prior_,
            prevalence=self.prevalence_,
        )

    def predict(self, X: Any) -> np.ndarray:
        """Predict the most probable class at the true frequencies.

        Parameters
        ----------
        X : array-like or lazy sequence of n samples
            What the classifier takes.

        Returns
        -------
        y : ndarray of shape (n,)
            Labels of ``classes_``.
        """
        proba = self.predict_proba(X)
        return self.classes_[proba.argmax(axis=1)]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        if not isinstance(self.prevalence, Mapping):
            tags.classifier_tags.multi_class = False
        return tags


def _by_label(shares: Mapping[Any, float], classes: np.ndarray, name: str) -> np.ndarray:
    if set(shares) != set(classes.tolist()):
        raise ValueError(f"{name} names {sorted(shares, key=str)}, but y holds {classes.tolist()}.")
    return _shares([shares[label] for label in classes.tolist()], len(classes), name)
