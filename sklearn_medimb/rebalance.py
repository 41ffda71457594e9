"""Stage two of two-stage methods: rebalanced linear heads on features.

Decoupling [1]_ trains a network on the data as they are, then rebalances its classifier with the
features frozen. Each head here is a small scikit-learn classifier on features, for use behind any
encoder, and what ``rebalance=`` of a two-stage estimator names:

==================  ==================================  ==========================================
name                class                               head
==================  ==================================  ==========================================
"crt"               :class:`ClassifierRetraining`       fitted anew, all classes weighing the same
"lws"               :class:`LearnableWeightScaling`     one factor per class on the given logits
"tau_norm"          :class:`TauNormalization`           class vectors divided by their norms
"ncm"               :class:`NearestClassMean`           cosine with the class means
"balanced_softmax"  :class:`BalancedSoftmax`            fitted anew, with the class prior added
"logit_adjust"      :class:`LogitAdjustment`            given logits minus the log of the prior
"virtual"           :class:`VirtualFeatureCalibration`  fitted to Gaussians of the classes
"none"              ``LogitAdjustment(tau=0)``          the given head as it is
==================  ==================================  ==========================================

"Given" is the head of stage one, ``coef_init`` and ``intercept_init`` of ``fit``. Without them a
head that needs one begins with multinomial logistic regression.

With the features frozen every one of these problems is small and convex. They are solved to their
minimum instead of by a few epochs of gradient steps: no learning rate, no sampling noise. Sampling
classes at equal rates has, in expectation, the loss that weighs classes equally; that is minimised.

References
----------
.. [1] B. Kang et al., "Decoupling representation and classifier for long-tailed recognition",
   ICLR 2020.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, _fit_context, clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from threadpoolctl import threadpool_limits

from sklearn_medimb.losses import class_weights
from sklearn_medimb.over_sampling._virtual_features import ClassGaussians
from sklearn_medimb.runtime import one_thread_in_workers


class Rows(NamedTuple):
    """Validated features: values (n, d), class codes (n,), weights (n,) that sum to 1."""

    X: np.ndarray
    codes: np.ndarray
    weight: np.ndarray
    n_classes: int

    @property
    def prior(self) -> np.ndarray:
        """Share of each class."""
        return np.bincount(self.codes, self.weight, self.n_classes)

    def balanced(self, cost: np.ndarray) -> Rows:
        """Classes of the given total weights, which sum to 1."""
        return self._replace(weight=self.weight * (cost / self.prior)[self.codes])


class Linear(NamedTuple):
    """A linear head: class vectors (K, d), offsets (K,), and the class shares behind it (K,)."""

    coef: np.ndarray
    intercept: np.ndarray
    prior: np.ndarray | None = None

    def __call__(self, X: np.ndarray) -> np.ndarray:
        """Class scores, shape (n, K)."""
        return X @ self.coef.T + self.intercept


class Scale:
    """Standardisation of features, and its inverse on a linear head."""

    def __init__(self, rows: Rows) -> None:
        self.mean = rows.weight @ rows.X
        variance = rows.weight @ np.square(rows.X - self.mean)
        # A constant column has, by rounding, a variance of about the square of its last digit.
        constant = variance <= 1e-24 * np.square(self.mean) + np.finfo(np.float64).tiny
        self.std = np.where(constant, 1.0, np.sqrt(variance))

    def apply(self, X: np.ndarray) -> np.ndarray:
        """Standardise."""
        return (X - self.mean) / self.std

    def undo(self, head: Linear) -> Linear:
        """Turn a head on standardised features into one on the features themselves."""
        coef = head.coef / self.std
        return Linear(coef, head.intercept - coef @ self.mean)

    def carry(self, head: Linear) -> Linear:
        """Turn a head on features into one on standardised features."""
        return Linear(head.coef * self.std, head.intercept + head.coef @ self.mean)


def softmax_regression(rows: Rows, alpha: float) -> tuple[Linear, int]:
    """Multinomial logistic regression on standardised features.

    Minimises ``sum_i weight_i CE_i + alpha / 2 |W|^2`` over class vectors and free intercepts.

    Returns
    -------
    head : Linear
        On the features themselves.
    n_iter : int
        Iterations of the solver.
    """
    scale = Scale(rows)
    # For two classes scikit-learn fits one vector, the difference of two opposite ones: its square
    # is twice the sum of theirs.
    C = (2 if rows.n_classes == 2 else 1) / alpha
    model = LogisticRegression(C=C, tol=1e-6, max_iter=2000)
    model.fit(scale.apply(rows.X), rows.codes, sample_weight=rows.weight)
    coef, intercept = model.coef_, model.intercept_
    if rows.n_classes == 2:
        coef, intercept = (np.concatenate([-part, part]) / 2 for part in (coef, intercept))
    return scale.undo(Linear(coef, intercept)), int(model.n_iter_.max())


class RebalancedHead(ClassifierMixin, BaseEstimator):
    """Common ground of the heads: validation, decision, probabilities."""

    coef_: np.ndarray
    intercept_: np.ndarray
    classes_: np.ndarray

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "alpha": [Interval(Real, 0, None, closed="neither")],
        "tau": [Interval(Real, None, None, closed="neither")],
        "class_weight": [dict, StrOptions({"balanced"}), None],
    }

    def _cost(self, classes: np.ndarray) -> np.ndarray:
        """Share of each class in a balanced loss: equal, or as `class_weight` says."""
        weight = getattr(self, "class_weight", None)
        cost = class_weights(None if weight == "balanced" else weight, classes, classes)
        if not cost.any():
            raise ValueError("class_weight is 0 for every class.")
        return cost / cost.sum()

    def _solve(self, rows: Rows, start: Linear | None) -> Linear:
        """Find the head; sets `n_iter_`."""
        raise NotImplementedError

    def _start(self, rows: Rows, start: Linear | None) -> Linear:
        """Return the head to work on: the given one, or logistic regression."""
        if start is not None:
            return start
        head, self.n_iter_ = softmax_regression(rows, self.alpha)
        return head

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        *,
        coef_init: Any = None,
        intercept_init: Any = None,
        prior_init: Any = None,
    ) -> RebalancedHead:
        """Fit the head to features.

        Parameters
        ----------
        X : array-like of shape (n, n_features)
            Features.
        y : array-like of shape (n,)
            Class labels, at least two classes.
        sample_weight : array-like of shape (n,), default=None
            Non-negative weights; a weight of 2 is as two equal rows.
        coef_init : array-like of shape (n_classes, n_features), default=None
            Class vectors of the head of stage one, in the order of the sorted labels.
        intercept_init : array-like of shape (n_classes,), default=None
            Its offsets; None is zero.
        prior_init : array-like of shape (n_classes,), default=None
            Class shares that it was trained with, weights included; None takes those of `y`.

        Returns
        -------
        self : RebalancedHead
            The fitted head.

        Raises
        ------
        ValueError
            If `y` has one class only, or the given head does not fit the classes and features.
        """
        return self._fit(X, y, sample_weight, coef_init, intercept_init, prior_init)

    def _fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any,
        coef_init: Any,
        intercept_init: Any,
        prior_init: Any = None,
    ) -> RebalancedHead:
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        kept = weight > 0  # rows of weight 0 are as if absent
        X, y, weight = X[kept], y[kept], weight[kept]
        classes, codes = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(
                f"{type(self).__name__} needs samples of at least 2 classes in y, but found "
                f"{len(classes)} class: {classes.tolist()}."
            )
        rows = Rows(X, codes, weight / weight.sum(), len(classes))
        start, self.n_iter_ = _check_start(coef_init, intercept_init, prior_init, rows), 0
        self.classes_ = classes
        with one_thread_in_workers():
            self.coef_, self.intercept_, _ = self._solve(rows, start)
        costs = -log_softmax(self._logits(X), axis=1)[np.arange(len(X)), codes]
        equal = np.full(len(classes), 1 / len(classes))
        self.loss_ = float(rows.balanced(equal).weight @ costs)
        return self

    def logits(self, X: Any) -> np.ndarray:
        """Class scores on a log scale, also for two classes one per class.

        Parameters
        ----------
        X : array-like of shape (n, n_features)
            Features.

        Returns
        -------
        logits : ndarray of shape (n, n_classes)
            Their softmax is `predict_proba`.
        """
        check_is_fitted(self)
        return self._logits(validate_data(self, X, reset=False, dtype=np.float64))

    def _logits(self, X: np.ndarray) -> np.ndarray:
        return Linear(self.coef_, self.intercept_)(X)

    def decision_function(self, X: Any) -> np.ndarray:
        """Class scores on a log scale.

        Parameters
        ----------
        X : array-like of shape (n, n_features)
            Features.

        Returns
        -------
        scores : ndarray of shape (n,) or (n, n_classes)
            Two classes: log-odds of ``classes_[1]``.
        """
        logits = self.logits(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: Any) -> np.ndarray:
        """Class probabilities: of heads that balance, for classes that are equally frequent.

        Parameters
        ----------
        X : array-like of shape (n, n_features)
            Features.

        Returns
        -------
        proba : ndarray of shape (n, n_classes)
            Rows sum to 1; columns follow ``classes_``.
        """
        return softmax(self.logits(X), axis=1)

    def predict(self, X: Any) -> np.ndarray:
        """Most probable class of each row.

        Parameters
        ----------
        X : array-like of shape (n, n_features)
            Features.

        Returns
        -------
        y : ndarray of shape (n,)
            Labels from ``classes_``.
        """
        best = self.logits(X).argmax(axis=1)
        return self.classes_[best]


_ATTRIBUTES = """coef_ : ndarray of shape (n_classes, n_features)
        Class vectors; two classes have two of them.

    intercept_ : ndarray of shape (n_classes,)
        Offsets.

    classes_ : ndarray of shape (n_classes,)
        Class labels.

    loss_ : float
        Cross-entropy of the training rows, all classes weighing the same.

    n_iter_ : int
        Iterations of the solver; 0 where there is a formula.

    n_features_in_ : int
        Number of features.

    feature_names_in_ : ndarray of shape (n_features_in_,)
        Column names where X was a DataFrame."""

_ALPHA = """alpha : float, default=0.1
        L2 penalty of the class vectors, ``alpha / 2 |W|^2`` beside the mean loss, on features
        standardised by their own mean and deviation."""

_CLASS_WEIGHT = """class_weight : dict, "balanced" or None, default=None
        Weights of the classes in the balanced loss; None and "balanced" are equal ones."""

_EXAMPLE = """>>> import numpy as np
    >>> from sklearn_medimb import {name}
    >>> rng = np.random.default_rng(0)
    >>> y = np.repeat([0, 1, 2], [80, 20, 5])
    >>> X = rng.normal(size=(105, 8)) + 2 * np.eye(8)[y]
    >>> head = {name}().fit(X, y)
    >>> head.predict_proba(X).shape
    (105, 3)"""


def _documented(cls: type) -> type:
    """Fill in what the heads' docstrings share."""
    parts = {"alpha": _ALPHA, "class_weight": _CLASS_WEIGHT, "attributes": _ATTRIBUTES}
    cls.__doc__ = (cls.__doc__ or "").format(**parts, example=_EXAMPLE.format(name=cls.__name__))
    return cls


@_documented
class ClassifierRetraining(RebalancedHead):
    """cRT: a head fitted anew, all classes weighing the same [1]_.

    Parameters
    ----------
    {alpha}

    {class_weight}

    Attributes
    ----------
    {attributes}

    References
    ----------
    .. [1] B. Kang et al., "Decoupling representation and classifier for long-tailed recognition",
       ICLR 2020, section 4.2.

    Examples
    --------
    {example}
    """

    def __init__(self, alpha: float = 0.1, *, class_weight: Any = None) -> None:
        self.alpha = alpha
        self.class_weight = class_weight

    def _solve(self, rows: Rows, start: Linear | None) -> Linear:
        balanced = rows.balanced(self._cost(self.classes_))
        head, self.n_iter_ = softmax_regression(balanced, self.alpha)
        return head


@_documented
class LearnableWeightScaling(RebalancedHead):
    """LWS: the given logits, each times a factor learned with all classes weighing the same [1]_.

    ``logit_k <- s_k (w_k x + b_k)``, the factor multiplying the offset as well, as in the authors'
    code; s starts at 1.

    Parameters
    ----------
    {alpha} It also draws the factors towards 1.

    Attributes
    ----------
    {attributes}

    scale_ : ndarray of shape (n_classes,)
        The factors s.

    References
    ----------
    .. [1] B. Kang et al., "Decoupling representation and classifier for long-tailed recognition",
       ICLR 2020, section 4.4.

    Examples
    --------
    {example}
    """

    def __init__(self, alpha: float = 0.1) -> None:
        self.alpha = alpha

    def _solve(self, rows: Rows, start: Linear | None) -> Linear:
        head = self._start(rows, start)
        rows = rows.balanced(self._cost(self.classes_))
        logits, one_hot = head(rows.X), np.eye(rows.n_classes)[rows.codes]

        def loss(scale: np.ndarray) -> tuple[float, np.ndarray]:
            log_p = log_softmax(scale * logits, axis=1)
            residual = rows.weight[:, np.newaxis] * (np.exp(log_p) - one_hot)
            away = scale - 1
            return (
                -rows.weight @ (log_p * one_hot).sum(axis=1) + self.alpha / 2 * away @ away,
                (residual * logits).sum(axis=0) + self.alpha * away,
            )

        found = minimize(loss, np.ones(rows.n_classes), jac=True, method="L-BFGS-B")
        _check_convergence(found)
        self.scale_, self.n_iter_ = found.x, self.n_iter_ + found.nit
        return Linear(head.coef * self.scale_[:, np.newaxis], head.intercept * self.scale_)


@_documented
class TauNormalization(RebalancedHead):
    """tau-norm: the given class vectors, divided by a power of their norms [1]_.

    ``logit_k <- (w_k x + b_k) / |w_k|^tau``: vectors of rare classes are shorter. Nothing is
    trained. The paper drops the offsets; here they are divided too, and tau = 0 changes nothing.

    Parameters
    ----------
    tau : float, default=1.0
        0 changes nothing, 1 makes all vectors equally long. The paper chooses it on validation data
        in [0, 2].

    {alpha} Unused where a head is given.

    Attributes
    ----------
    {attributes}

    References
    ----------
    .. [1] B. Kang et al., "Decoupling representation and classifier for long-tailed recognition",
       ICLR 2020, section 4.3.

    Examples
    --------
    {example}
    """

    def __init__(self, tau: float = 1.0, *, alpha: float = 0.1) -> None:
        self.tau = tau
        self.alpha = alpha

    def _solve(self, rows: Rows, start: Linear | None) -> Linear:
        head = self._start(rows, start)
        norm = np.linalg.norm(head.coef, axis=1)
        norm = np.where(norm > 0, norm, 1)
        return Linear(head.coef / norm[:, np.newaxis] ** self.tau, head.intercept / norm**self.tau)


@_documented
class NearestClassMean(RebalancedHead):
    """NCM: cosine of a feature vector with the mean vector of each class [1]_.

    Parameters
    ----------
    temperature : float, default=0.1
        `decision_function` is the cosine divided by it.

    Attributes
    ----------
    {attributes}

    References
    ----------
    .. [1] B. Kang et al., "Decoupling representation and classifier for long-tailed recognition",
       ICLR 2020, section 4.1.

    Examples
    --------
    {example}
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "temperature": [Interval(Real, 0, None, closed="neither")],
    }

    def __init__(self, temperature: float = 0.1) -> None:
        self.temperature = temperature

    def _solve(self, rows: Rows, start: Linear | None) -> Linear:
        members = np.eye(rows.n_classes)[rows.codes] * rows.weight[:, np.newaxis]
        means = members.T @ rows.X / rows.prior[:, np.newaxis]
        return Linear(_unit(means) / self.temperature, np.zeros(rows.n_classes))

    def _logits(self, X: np.ndarray) -> np.ndarray:
        return super()._logits(_unit(X))


@_documented
class LogitAdjustment(RebalancedHead):
    """Post-hoc logit adjustment: the given logits minus ``tau`` times the log of the prior [1]_.

    Parameters
    ----------
    tau : float, default=1.0
        Strength; 1 aims at balanced accuracy, 0 leaves the head as it is.

    {alpha} Unused where a head is given.

    Attributes
    ----------
    {attributes}

    References
    ----------
    .. [1] A. K. Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, eq. 9.

    Examples
    --------
    {example}
    """

    def __init__(self, tau: float = 1.0, *, alpha: float = 0.1) -> None:
        self.tau = tau
        self.alpha = alpha

    def _solve(self, rows: Rows, start: Linear | None) -> Linear:
        head = self._start(rows, start)
        prior = rows.prior if head.prior is None else head.prior
        return Linear(head.coef, head.intercept - self.tau * np.log(prior))


@_documented
class BalancedSoftmax(RebalancedHead):
    """Balanced softmax: a head fitted anew under ``logit + log(prior)`` [1]_.

    The offsets of a linear head are free of penalty and absorb the prior. So the minimum is that of
    plain logistic regression with the log of the prior taken off: post-hoc logit adjustment of a
    head that was fitted to convergence.

    Parameters
    ----------
    {alpha}

    {class_weight}

    Attributes
    ----------
    {attributes}

    References
    ----------
    .. [1] J. Ren et al., "Balanced meta-softmax for long-tailed visual recognition", NeurIPS 2020,
       eq. 4.

    Examples
    --------
    {example}
    """

    def __init__(self, alpha: float = 0.1, *, class_weight: Any = None) -> None:
        self.alpha = alpha
        self.class_weight = class_weight

    def _solve(self, rows: Rows, start: Linear | None) -> Linear:
        head, cost = self._start(rows, None), self._cost(self.classes_).clip(min=1e-300)
        return Linear(head.coef, head.intercept + np.log(cost / rows.prior))


@_documented
class VirtualFeatureCalibration(RebalancedHead):
    """A head fitted to Gaussians around the class means, all classes weighing the same [1]_.

    The published method draws virtual features and trains on them. In the limit of infinitely many
    draws their mean cross-entropy has a closed-form upper bound [2]_, by Jensen's inequality::

        E_k CE <= log sum_j exp(d_kj mu_k + b_j - b_k + d_kj Sigma_k d_kj / 2),  d_kj = w_j - w_k

    which is convex and needs no draws: ``m_step="analytic"``.

    Parameters
    ----------
    m_step : {{"analytic", "sampled"}}, default="analytic"
        The bound, or gradient steps on drawn features.

    n_per_class : int, default=5000
        Draws per class; only with "sampled" (published: 50,000).

    covariance : {{"shrunk", "full", "diag", "tied"}}, default="shrunk"
        As in :class:`~sklearn_medimb.BalancedVirtualFeatures`.

    eps : float, default=1e-2
        Added variance, as there; features are standardised before.

    {alpha}

    {class_weight}

    random_state : int, RandomState or None, default=None
        Seeds the draws.

    Attributes
    ----------
    {attributes}

    See Also
    --------
    BalancedVirtualFeatures : The draws as a sampler, for any other classifier.

    References
    ----------
    .. [1] Z. Pan et al., "Long-tailed medical diagnosis with relation-aware representation learning
       and iterative classifier calibration", Computers in Biology and Medicine 188, 2025.
    .. [2] Y. Wang et al., "Implicit semantic data augmentation for deep networks", NeurIPS 2019,
       proposition 1.

    Examples
    --------
    {example}
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **RebalancedHead._parameter_constraints,
        "m_step": [StrOptions({"analytic", "sampled"})],
        "n_per_class": [Interval(Integral, 1, None, closed="left")],
        "covariance": [StrOptions({"shrunk", "full", "diag", "tied"})],
        "eps": [Interval(Real, 0, None, closed="left")],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        m_step: str = "analytic",
        *,
        n_per_class: int = 5000,
        covariance: str = "shrunk",
        eps: float = 1e-2,
        alpha: float = 0.1,
        class_weight: Any = None,
        random_state: Any = None,
    ) -> None:
        self.m_step = m_step
        self.n_per_class = n_per_class
        self.covariance = covariance
        self.eps = eps
        self.alpha = alpha
        self.class_weight = class_weight
        self.random_state = random_state

    # Draws and shrinkage count rows: there is no sample_weight.
    @_fit_context(prefer_skip_nested_validation=True)
    def fit(
        self,
        X: Any,
        y: Any,
        *,
        coef_init: Any = None,
        intercept_init: Any = None,
        prior_init: Any = None,
    ) -> VirtualFeatureCalibration:
        """Fit the head to features.

        Parameters
        ----------
        X : array-like of shape (n, n_features)
            Features.
        y : array-like of shape (n,)
            Class labels, at least two classes.
        coef_init : array-like of shape (n_classes, n_features), default=None
            Class vectors to start from, in the order of the sorted labels.
        intercept_init : array-like of shape (n_classes,), default=None
            Offsets to start from; None is zero.
        prior_init : array-like of shape (n_classes,), default=None
            Plays no part: all classes weigh the same.

        Returns
        -------
        self : VirtualFeatureCalibration
            The fitted head.
        """
        self._fit(X, y, None, coef_init, intercept_init, prior_init)
        return self

    def _solve(self, rows: Rows, start: Linear | None) -> Linear:
        scale, (d, n_classes) = Scale(rows), (rows.X.shape[1], rows.n_classes)
        cost = self._cost(self.classes_)
        gaussians = ClassGaussians(
            scale.apply(rows.X), rows.codes, covariance=self.covariance, eps=self.eps
        )
        if start is None:
            start = Linear(np.zeros((n_classes, d)), np.zeros(n_classes))
        else:
            start = scale.carry(start)
        if self.m_step == "analytic":
            head, self.n_iter_ = _minimise_bound(gaussians, cost, self.alpha, start)
        else:
            seed = int(check_random_state(self.random_state).randint(2**31 - 1))
            head, self.n_iter_ = _train_on_draws(
                gaussians, cost, self.n_per_class, self.alpha, start, seed
            )
        return scale.undo(head)


def expected_cross_entropy_bound(
    coef: np.ndarray,
    intercept: np.ndarray,
    means: np.ndarray,
    covariances: Sequence[Callable[[np.ndarray], np.ndarray]],
    cost: np.ndarray,
) -> tuple[float, np.ndarray, np.ndarray]:
    """Upper bound of the cross-entropy expected under class Gaussians, and its gradient.

    Parameters
    ----------
    coef : ndarray of shape (K, d)
        Class vectors w.
    intercept : ndarray of shape (K,)
        Offsets b.
    means : ndarray of shape (K, d)
        Class means mu.
    covariances : sequence of K callables
        Each multiplies row vectors (K, d) by Sigma_k.
    cost : ndarray of shape (K,)
        Weights of the classes, which sum to 1.

    Returns
    -------
    bound : float
        Weighted mean over classes.
    coef_gradient, intercept_gradient : ndarray
        Of the shapes of `coef` and `intercept`.
    """
    bound, by_coef, by_intercept = 0.0, np.zeros_like(coef), np.zeros_like(intercept)
    for k, (mean, times_sigma) in enumerate(zip(means, covariances, strict=True)):
        difference = coef - coef[k]
        spread = times_sigma(difference)
        logits = difference @ mean + intercept - intercept[k]
        logits += 0.5 * (spread * difference).sum(axis=1)
        top = logits.max()
        p = np.exp(logits - top)
        bound += cost[k] * (top + np.log(p.sum()))
        p *= cost[k] / p.sum()
        slope = p[:, np.newaxis] * (mean + spread)
        slope[k] -= slope.sum(axis=0)
        by_coef += slope
        p[k] -= cost[k]
        by_intercept += p
    return bound, by_coef, by_intercept


def _minimise_bound(
    gaussians: ClassGaussians, cost: np.ndarray, alpha: float, start: Linear
) -> tuple[Linear, int]:
    """Minimise the bound plus ``alpha / 2 |W|^2`` by L-BFGS."""
    shape = start.coef.shape
    covariances = [gaussians.times(k) for k in range(shape[0])]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        coef, intercept = flat[: start.coef.size].reshape(shape), flat[start.coef.size :]
        bound, by_coef, by_intercept = expected_cross_entropy_bound(
            coef, intercept, gaussians.means, covariances, cost
        )
        gradient = np.concatenate([(by_coef + alpha * coef).ravel(), by_intercept])
        return bound + alpha / 2 * np.square(coef).sum(), gradient

    with threadpool_limits(1, user_api="blas"):  # more threads only wait for one another here
        found = minimize(
            loss,
            np.concatenate([start.coef.ravel(), start.intercept]),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 500, "gtol": 1e-6, "ftol": 1e-10},
        )
    _check_convergence(found)
    return Linear(found.x[: start.coef.size].reshape(shape), found.x[start.coef.size :]), found.nit


def _train_on_draws(
    gaussians: ClassGaussians,
    cost: np.ndarray,
    n_per_class: int,
    alpha: float,
    start: Linear,
    seed: int,
) -> tuple[Linear, int]:
    """Adam at a falling rate on draws: as many steps as they fill, or 100 if that is more.

    A step takes equally many draws of each class. The classes share their standard normal numbers:
    each class has its own Gaussian still, at a fraction of the price.
    """
    generator = torch.Generator().manual_seed(seed)
    # Class vectors and offsets in one matrix (d + 1, K); each draw ends with a 1.
    head = np.vstack([start.coef.T, start.intercept]).astype(np.float32)
    penalty = np.full_like(head, alpha)
    penalty[-1] = 0
    (d, n_classes), size = gaussians.means.T.shape, max(1, 256 // len(head.T))
    factors = [
        tuple(part.astype(np.float32) for part in (mean, rows, np.sqrt(variance)))
        for k, mean in enumerate(gaussians.means)
        for rows, variance in [gaussians.factor(k)]
    ]
    n_steps = max(100, -(-n_per_class // size))
    per_block = max(1, 1024 // size)
    numbers, noise = torch.empty(2, per_block * size, d)
    draws = np.ones((n_classes, per_block * size, d + 1), dtype=np.float32)
    codes = np.repeat(np.arange(n_classes), size)
    target = np.eye(n_classes, dtype=np.float32)[codes]
    share = (cost[codes] / size).astype(np.float32)[:, np.newaxis]
    adam = Adam(head)
    for i in range(n_steps):
        if i % per_block == 0:
            numbers.normal_(generator=generator)
            if any(spread.any() for *_, spread in factors):
                noise.normal_(generator=generator)
            for drawn, (mean, rows, spread) in zip(draws, factors, strict=True):
                drawn[:, :d] = numbers.numpy()[:, : len(rows)] @ rows
                drawn[:, :d] += mean
                if spread.any():
                    drawn[:, :d] += noise.numpy() * spread
        place = i % per_block * size
        batch = draws[:, place : place + size].reshape(-1, d + 1)
        residual = (softmax(batch @ head, axis=1) - target) * share
        adam.step(batch.T @ residual + penalty * head, lr=0.01 * (1 - i / n_steps))
    return Linear(head[:-1].T.astype(np.float64), head[-1].astype(np.float64)), n_steps


class Adam:
    """Adam [1]_ on one NumPy array, in place.

    References
    ----------
    .. [1] D. Kingma, J. Ba, "Adam: a method for stochastic optimization", ICLR 2015.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self.mean, self.square = np.zeros_like(values), np.zeros_like(values)
        self.n_steps = 0

    def step(self, gradient: np.ndarray, lr: float) -> None:
        """Move against the gradient."""
        self.n_steps += 1
        self.mean += 0.1 * (gradient - self.mean)
        self.square += 0.001 * (np.square(gradient) - self.square)
        mean, square = self.mean / (1 - 0.9**self.n_steps), self.square / (1 - 0.999**self.n_steps)
        self.values -= lr * mean / (np.sqrt(square) + 1e-8)


def _check_convergence(found: Any) -> None:
    if found.status == 1:
        warnings.warn(
            f"The head was not found within {found.nit} iterations: raise alpha.",
            ConvergenceWarning,
            stacklevel=4,
        )


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1; zero stays zero."""
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norm > 0, norm, 1)


def _check_start(coef: Any, intercept: Any, prior: Any, rows: Rows) -> Linear | None:
    """Validate the head of stage one."""
    if coef is None:
        if intercept is not None or prior is not None:
            raise ValueError("intercept_init or prior_init was given without coef_init.")
        return None
    shape = (rows.n_classes, rows.X.shape[1])
    coef = np.array(coef, dtype=np.float64)
    intercept = np.zeros(shape[0]) if intercept is None else np.array(intercept, dtype=np.float64)
    if coef.shape != shape or intercept.shape != shape[:1]:
        raise ValueError(
            f"coef_init and intercept_init must have shapes {shape} and {shape[:1]} for these "
            f"classes and features, got {coef.shape} and {intercept.shape}."
        )
    if prior is not None:
        prior = np.array(prior, dtype=np.float64)
        if prior.shape != shape[:1] or not (prior > 0).all():
            raise ValueError(f"prior_init must hold {shape[0]} numbers above 0, got {prior}.")
        prior /= prior.sum()
    return Linear(coef, intercept, prior)


HEADS: dict[str, Callable[[], RebalancedHead]] = {
    "crt": ClassifierRetraining,
    "lws": LearnableWeightScaling,
    "tau_norm": TauNormalization,
    "ncm": NearestClassMean,
    "balanced_softmax": BalancedSoftmax,
    "logit_adjust": LogitAdjustment,
    "virtual": VirtualFeatureCalibration,
    "none": lambda: LogitAdjustment(tau=0.0),
}
"""Heads by name."""


def resolve_head(rebalance: Any) -> Any:
    """Turn what a user may pass as `rebalance` into an unfitted head.

    Parameters
    ----------
    rebalance : str or classifier
        A name of ``HEADS``, or any scikit-learn classifier on features.

    Returns
    -------
    head : classifier
        A new one, not fitted.

    Raises
    ------
    ValueError
        If the name is unknown.
    TypeError
        If it is no classifier.
    """
    if isinstance(rebalance, str):
        if rebalance not in HEADS:
            raise ValueError(f"rebalance={rebalance!r} must be one of {list(HEADS)}.")
        return HEADS[rebalance]()
    scores = hasattr(rebalance, "predict_proba") or hasattr(rebalance, "decision_function")
    if isinstance(rebalance, type) or not (hasattr(rebalance, "fit") and scores):
        raise TypeError(
            f"rebalance={rebalance!r} must be one of {list(HEADS)} or a scikit-learn classifier "
            "with predict_proba or decision_function, such as ClassifierRetraining(alpha=1.0)."
        )
    return clone(rebalance)
