"""The heads of decoupling: fitted anew, or made from the head of stage one."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.utils._param_validation import Interval

from sklearn_medimb._parameters import above, learned, parameter
from sklearn_medimb.rebalance._base import (
    BalancingHead,
    Linear,
    PenalisedHead,
    RebalancedHead,
    Rows,
    check_convergence,
    with_example,
)

_FINITE = Interval(Real, None, None, closed="neither")


@with_example
class ClassifierRetraining(BalancingHead):
    """cRT: a head fitted anew, all classes weighing the same [1]_.

    References
    ----------
    .. [1] B. Kang et al., "Decoupling representation and classifier for long-tailed recognition",
       ICLR 2020, section 4.2.
    """

    def _solve(self, rows: Rows, start: Linear | None) -> Linear:
        return self._softmax_regression(rows.balanced(self._cost()))


@with_example
class LearnableWeightScaling(PenalisedHead):
    """LWS: the given logits, each times a factor learned with all classes weighing the same [1]_.

    ``logit_k <- s_k (w_k x + b_k)``, the factor multiplying the offset as well, as in the authors'
    code; s starts at 1.

    Parameters
    ----------
    alpha
        L2 penalty of the class vectors where no head is given, as in
        :class:`ClassifierRetraining`. It also draws the factors towards 1.

    Attributes
    ----------
    scale_
        The factors s.

    References
    ----------
    .. [1] B. Kang et al., "Decoupling representation and classifier for long-tailed recognition",
       ICLR 2020, section 4.4.
    """

    scale_: np.ndarray = learned("ndarray of shape (n_classes,)")

    _keeps_given = True

    def _solve(self, rows: Rows, start: Linear | None) -> Linear:
        head = start or self._softmax_regression(rows)
        rows = rows.balanced()
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
        check_convergence(found)
        self.scale_ = found.x
        self.n_iter_ += found.nit
        return Linear(head.coef * self.scale_[:, np.newaxis], head.intercept * self.scale_)


@with_example
class TauNormalization(PenalisedHead):
    """tau-norm: the given class vectors, divided by a power of their norms [1]_.

    ``logit_k <- (w_k x + b_k) / |w_k|^tau``: vectors of rare classes are shorter. Nothing is
    trained. The paper drops the offsets; here they are divided too, and tau = 0 changes nothing.

    Parameters
    ----------
    tau
        0 changes nothing, 1 makes all vectors equally long. The paper chooses it on validation data
        in [0, 2].
    alpha
        L2 penalty of the class vectors, as in :class:`ClassifierRetraining`; unused where a head
        is given.

    References
    ----------
    .. [1] B. Kang et al., "Decoupling representation and classifier for long-tailed recognition",
       ICLR 2020, section 4.3.
    """

    tau: float = parameter(_FINITE, default=1.0, search=(0.0, 2.0), positional=True)

    _keeps_given = True

    def _solve(self, rows: Rows, start: Linear | None) -> Linear:
        head = start or self._softmax_regression(rows)
        norm = np.linalg.norm(head.coef, axis=1)
        norm = np.where(norm > 0, norm, 1)
        return Linear(head.coef / norm[:, np.newaxis] ** self.tau, head.intercept / norm**self.tau)


@with_example
class NearestClassMean(RebalancedHead):
    """NCM: cosine of a feature vector with the mean vector of each class [1]_.

    Parameters
    ----------
    temperature
        `decision_function` is the cosine divided by it.

    References
    ----------
    .. [1] B. Kang et al., "Decoupling representation and classifier for long-tailed recognition",
       ICLR 2020, section 4.1.
    """

    temperature: float = parameter(
        above(0), default=0.1, search=(0.01, 1.0, "log"), positional=True
    )

    def _solve(self, rows: Rows, start: Linear | None) -> Linear:
        members = np.eye(rows.n_classes)[rows.codes] * rows.weight[:, np.newaxis]
        means = members.T @ rows.X / rows.prior[:, np.newaxis]
        return Linear(_unit(means) / self.temperature, np.zeros(rows.n_classes))

    def _logits(self, X: Any, head: Linear | None = None) -> Any:
        return super()._logits(_unit(X), head)


@with_example
class LogitAdjustment(PenalisedHead):
    """Post-hoc logit adjustment: the given logits minus ``tau`` times the log of the prior [1]_.

    Parameters
    ----------
    tau
        Strength; 1 aims at balanced accuracy, 0 leaves the head as it is.
    alpha
        L2 penalty of the class vectors, as in :class:`ClassifierRetraining`; unused where a head
        is given.

    References
    ----------
    .. [1] A. K. Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, eq. 9.
    """

    tau: float = parameter(_FINITE, default=1.0, search=(0.0, 2.0), positional=True)

    _keeps_given = True

    def _solve(self, rows: Rows, start: Linear | None) -> Linear:
        head = start or self._softmax_regression(rows)
        prior = rows.prior if head.prior is None else head.prior
        return Linear(head.coef, head.intercept - self.tau * np.log(prior))


@with_example
class BalancedSoftmax(BalancingHead):
    """Balanced softmax: a head fitted anew under ``logit + log(prior)`` [1]_.

    The offsets of a linear head are free of penalty and absorb the prior. So the minimum is that of
    plain logistic regression with the log of the prior taken off: post-hoc logit adjustment of a
    head that was fitted to convergence.

    References
    ----------
    .. [1] J. Ren et al., "Balanced meta-softmax for long-tailed visual recognition", NeurIPS 2020,
       eq. 4.
    """

    def _solve(self, rows: Rows, start: Linear | None) -> Linear:
        head, cost = self._softmax_regression(rows), self._cost().clip(min=1e-300)
        return Linear(head.coef, head.intercept + np.log(cost / rows.prior))


def _unit(vectors: Any) -> Any:
    """Vectors of length 1, of NumPy or torch; zero stays zero."""
    norm = (vectors * vectors).sum(axis=1, keepdims=True) ** 0.5
    return vectors / (norm + (norm == 0))
