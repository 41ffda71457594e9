"""What the heads share: validated rows, logistic regression, decision and probabilities."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from numbers import Real
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from scipy.special import log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from sklearn_medimb._data.labels import read_labels, warn_of_marks
from sklearn_medimb._machine.fitted import all_or_nothing
from sklearn_medimb._machine.runtime import one_thread_in_workers
from sklearn_medimb.losses import class_weights


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

    coef: Any
    intercept: Any
    prior: Any = None

    def __call__(self, X: Any) -> Any:
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
        """Bring features to mean 0 and deviation 1."""
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

    _search_space: ClassVar[dict[str, Any]] = {
        "alpha": (1e-3, 10.0, "log"),
        "tau": (0.0, 2.0),
        "class_weight": [None, "balanced"],
    }
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "alpha": [Interval(Real, 0, None, closed="neither")],
        "tau": [Interval(Real, None, None, closed="neither")],
        "class_weight": [dict, StrOptions({"balanced"}), None],
    }

    def _cost(self, classes: np.ndarray) -> np.ndarray:
        """Share of each class in a balanced loss: equal, or as `class_weight` says."""
        weight = getattr(self, "class_weight", None)
        cost = class_weights(None if weight == "balanced" else weight, classes, classes)
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
        with all_or_nothing(self), one_thread_in_workers():
            if y is not None:
                y = read_labels(y, warn=True)
            X, y = validate_data(self, X, y, dtype=np.float64)
            check_classification_targets(y)
            weight = _check_sample_weight(
                sample_weight, X, dtype=np.float64, ensure_non_negative=True
            )
            kept = weight > 0  # rows of weight 0 are as if absent
            X, y, weight = X[kept], y[kept], weight[kept]
            warn_of_marks(type(self).__name__, y)
            classes, codes = np.unique(y, return_inverse=True)
            if len(classes) < 2:
                raise ValueError(
                    f"{type(self).__name__} needs samples of at least 2 classes in y, but found "
                    f"{len(classes)} class: {classes.tolist()}."
                )
            rows = Rows(X, codes, weight / weight.sum(), len(classes))
            start, self.n_iter_ = _check_start(coef_init, intercept_init, prior_init, rows), 0
            self.classes_ = classes
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

    def _logits(self, X: Any, head: Linear | None = None) -> Any:
        """Logits of validated features, of NumPy or torch as `head` is."""
        return (head or Linear(self.coef_, self.intercept_))(X)

    def torch_logits(
        self, dtype: torch.dtype, device: torch.device | str
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """`logits` as a function of tensors, for networks that end in this head.

        Parameters
        ----------
        dtype : torch.dtype
            Of the features and of the arithmetic.
        device : torch.device or str
            Where the features are.

        Returns
        -------
        logits : callable
            Features (n, n_features) to logits (n, n_classes); nothing is validated.
        """
        check_is_fitted(self)
        arrays = (self.coef_, self.intercept_)
        head = Linear(*(torch.tensor(array, dtype=dtype, device=device) for array in arrays))
        return lambda features: self._logits(features, head)

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


def documented(cls: type) -> type:
    """Fill in what the heads' docstrings share."""
    parts = {"alpha": _ALPHA, "class_weight": _CLASS_WEIGHT, "attributes": _ATTRIBUTES}
    cls.__doc__ = (cls.__doc__ or "").format(**parts, example=_EXAMPLE.format(name=cls.__name__))
    return cls


def check_convergence(found: Any) -> None:
    """Warn where scipy's `minimize` ran out of iterations."""
    if found.status == 1:
        warnings.warn(
            f"The head was not found within {found.nit} iterations: raise alpha.",
            ConvergenceWarning,
            stacklevel=4,
        )


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
