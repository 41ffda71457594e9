"""Vectors of Gaussian classes, and what is known of them."""

from __future__ import annotations

import numpy as np

# How BalancedVirtualFeatures may estimate covariances.
KINDS = ["shrunk", "full", "diag", "tied"]


def problem(counts=(30, 12, 4), d=6, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    basis = rng.normal(size=(d, d))
    return rng.normal(size=(len(y), d)) @ basis + 3 * rng.normal(size=(len(counts), d))[y], y


def moments(X, y, covariance, eps):
    """Means and covariances as the docstring defines them."""
    n, d = X.shape
    classes = np.unique(y)
    means = np.stack([X[y == k].mean(axis=0) for k in classes])
    own = [
        np.cov(X[y == k].T, ddof=1).reshape(d, d) if (y == k).sum() > 1 else np.zeros((d, d))
        for k in classes
    ]
    within = sum((np.sum(y == k) - 1) * S for k, S in zip(classes, own, strict=True))
    within = within / (n - len(classes))
    extra = eps * np.diag(np.ones(d) if covariance == "full" else np.diag(within))
    sigmas = []
    for k, S in zip(classes, own, strict=True):
        n_k = (y == k).sum()
        s = 1 if n_k == 1 else d / (n_k + d)
        sigmas.append(
            {
                "shrunk": (1 - s) * S + s * within,
                "full": S,
                "diag": np.diag(np.diag(S)),
                "tied": within,
            }[covariance]
            + extra
        )
    return means, sigmas


def long_tailed_gaussians(seed, counts=(500, 150, 50, 15, 5), d=128):
    """Classes with one anisotropic covariance, as many as `counts`, and a balanced test set."""
    rng = np.random.default_rng(seed)
    scales = np.exp(rng.normal(scale=0.8, size=d))
    means = rng.normal(size=(len(counts), d)) * 0.32

    def draw(y):
        return means[y] + rng.normal(size=(len(y), d)) * scales * 0.6

    y, y_test = np.repeat(np.arange(len(counts)), counts), np.repeat(np.arange(len(counts)), 400)
    return draw(y), y, draw(y_test), y_test
