"""What the heads share: validated rows, logistic regression, decision and probabilities."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from sklearn_medimb._data.labels import read_labels, warn_of_marks
from sklearn_medimb._machine.fitted import all_or_nothing
from sklearn_medimb._machine.runtime import one_thread_in_workers
from sklearn_medimb._parameters import Declaring, above, learned, one_of, parameter
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

    def balanced(self, cost: Any = None) -> Rows:
        """Classes of the given total weights, which sum to 1; None is equal ones."""
        cost = 1 / self.n_classes if cost is None else cost
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
    """Head of multinomial logistic regression, and the iterations of its solver.

    Minimises ``sum_i weight_i CE_i + alpha / 2 |W|^2`` over class vectors and free intercepts, on
    standardised features; the head is one on the features themselves.
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


class RebalancedHead(ClassifierMixin, Declaring, BaseEstimator):
    """Common ground of the heads: validation, decision, probabilities.

    Attributes
    ----------
    coef_
        Class vectors; two classes have two of them.
    intercept_
        Offsets.
    classes_
        Class labels.
    loss_
        Cross-entropy of the training rows, all classes weighing the same.
    n_iter_
        Iterations of the solver; 0 where there is a formula.
    n_features_in_
        Number of features.
    feature_names_in_
        Column names where X was a DataFrame.
    """

    coef_: np.ndarray = learned("ndarray of shape (n_classes, n_features)")
    intercept_: np.ndarray = learned("ndarray of shape (n_classes,)")
    classes_: np.ndarray = learned("ndarray of shape (n_classes,)")
    loss_: float = learned("float")
    n_iter_: int = learned("int")
    n_features_in_: int = learned("int")
    feature_names_in_: np.ndarray = learned("ndarray of shape (`n_features_in_`,)")

    # Whether a given head reads what it has read before: of other features it learns nothing.
    _keeps_given = False

    def _solve(self, rows: Rows, start: Linear | None) -> Linear:
        """Find the head; sets `n_iter_`."""
        raise NotImplementedError

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

    def _fit(self, X: Any, y: Any, sample_weight: Any, *given: Any) -> RebalancedHead:
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
            start, self.n_iter_ = _given_head(rows, *given), 0
            self.classes_ = classes
            self.coef_, self.intercept_, _ = self._solve(rows, start)
            costs = -log_softmax(self._logits(X), axis=1)[np.arange(len(X)), codes]
            self.loss_ = float(rows.balanced().weight @ costs)
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


class PenalisedHead(RebalancedHead):
    """A head that has, or may begin with, logistic regression.

    Parameters
    ----------
    alpha
        L2 penalty of the class vectors, ``alpha / 2 |W|^2`` beside the mean loss, on features
        standardised by their own mean and deviation.
    """

    alpha: float = parameter(above(0), default=0.1, search=(1e-3, 10.0, "log"), positional=True)

    def _softmax_regression(self, rows: Rows) -> Linear:
        """Fit a head to the rows as they are weighted."""
        head, self.n_iter_ = softmax_regression(rows, self.alpha)
        return head


class BalancingHead(PenalisedHead):
    """A head fitted anew, to a loss that weighs the classes.

    Parameters
    ----------
    class_weight
        Weights of the classes in the balanced loss; None and "balanced" are equal ones.
    """

    class_weight: Any = parameter(
        dict, one_of("balanced"), None, default=None, search=[None, "balanced"]
    )

    def _cost(self) -> np.ndarray:
        """Share of each class in the loss."""
        weight = None if self.class_weight == "balanced" else self.class_weight
        cost = class_weights(weight, self.classes_, self.classes_)
        return cost / cost.sum()


def with_example(cls: type) -> type:
    """Add the same example to the docstring of each head."""
    cls.__doc__ = f"""{cls.__doc__}

Examples
--------
>>> import numpy as np
>>> from sklearn_medimb import {cls.__name__}
>>> rng = np.random.default_rng(0)
>>> y = np.repeat([0, 1, 2], [80, 20, 5])
>>> X = rng.normal(size=(105, 8)) + 2 * np.eye(8)[y]
>>> head = {cls.__name__}().fit(X, y)
>>> head.predict_proba(X).shape
(105, 3)
"""
    return cls


def check_convergence(found: Any) -> None:
    """Warn where scipy's `minimize` ran out of iterations."""
    if found.status == 1:
        warnings.warn(
            f"The head was not found within {found.nit} iterations: raise alpha.",
            ConvergenceWarning,
            stacklevel=4,
        )


def _given_head(rows: Rows, coef: Any, intercept: Any, prior: Any) -> Linear | None:
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
