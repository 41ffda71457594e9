"""A head fitted to Gaussians of the classes: the M-step of LMD's calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from sklearn.base import _fit_context
from sklearn.utils import check_random_state
from threadpoolctl import threadpool_limits

from sklearn_medimb._parameters import integers, one_of, parameter
from sklearn_medimb.over_sampling._virtual_features import ClassGaussians, GaussianParameters
from sklearn_medimb.rebalance._base import (
    BalancingHead,
    Linear,
    Rows,
    Scale,
    check_convergence,
    with_example,
)


@with_example
class VirtualFeatureCalibration(GaussianParameters, BalancingHead):
    """A head fitted to Gaussians around the class means, all classes weighing the same [1]_.

    The published method draws virtual features and trains on them. In the limit of infinitely many
    draws their mean cross-entropy has a closed-form upper bound [2]_, by Jensen's inequality::

        E_k CE <= log sum_j exp(d_kj mu_k + b_j - b_k + d_kj Sigma_k d_kj / 2),  d_kj = w_j - w_k

    which is convex and needs no draws: ``m_step="analytic"``.

    Parameters
    ----------
    m_step
        The bound, or gradient steps on drawn features.
    n_per_class
        Draws per class; only with "sampled" (published: 50,000).
    eps
        Added variance, as in :class:`~sklearn_medimb.BalancedVirtualFeatures`; features are
        standardised before.
    random_state
        Seeds the draws.

    See Also
    --------
    BalancedVirtualFeatures : The draws as a sampler, for any other classifier.

    References
    ----------
    .. [1] Z. Pan et al., "Long-tailed medical diagnosis with relation-aware representation learning
       and iterative classifier calibration", Computers in Biology and Medicine 188, 2025.
    .. [2] Y. Wang et al., "Implicit semantic data augmentation for deep networks", NeurIPS 2019,
       proposition 1.
    """

    m_step: str = parameter(
        one_of("analytic", "sampled"), default="analytic", search=True, positional=True
    )
    n_per_class: int = parameter(integers(1), default=5000, search=(500, 20_000, "log"))
    random_state: Any = parameter(
        "random_state", default=None, kind="int, RandomState or None", last=True
    )

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
        cost = self._cost()
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
    check_convergence(found)
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
    # Class vectors and offsets in one matrix (d + 1, K).
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
    draws = np.empty((n_classes, per_block * size, d), dtype=np.float32)
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
                np.matmul(numbers.numpy()[:, : len(rows)], rows, out=drawn)
                drawn += mean
                if spread.any():
                    drawn += noise.numpy() * spread
        place = i % per_block * size
        batch = draws[:, place : place + size].reshape(-1, d)
        p = batch @ head[:-1] + head[-1]
        p = np.exp(p - p.max(axis=1, keepdims=True))
        residual = (p / p.sum(axis=1, keepdims=True) - target) * share
        gradient = np.vstack([batch.T @ residual, residual.sum(axis=0)]) + penalty * head
        adam.step(gradient, lr=0.01 * (1 - i / n_steps))
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
