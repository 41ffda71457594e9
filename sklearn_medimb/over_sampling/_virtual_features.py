"""Virtual features: Gaussian draws around the class means of embeddings."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.utils import check_random_state

from sklearn_medimb._machine.runtime import one_thread_in_workers
from sklearn_medimb._parameters import Declaring, at_least, integers, learned, one_of, parameter
from sklearn_medimb.over_sampling._base import CheckedOverSampler

_BLOCK = 2**24  # numbers drawn at a time: 64 to 128 MB, of a larger result


class GaussianParameters(Declaring):
    """Which Gaussians stand for the classes.

    Parameters
    ----------
    covariance
        With S_k the covariance of class k, n_k its rows, d the features, W the pooled
        within-class covariance and I the identity:

        - "shrunk": ``(1 - s_k) S_k + s_k W + eps diag(W)`` with ``s_k = d / (n_k + d)``;
        - "full": ``S_k + eps I``, the paper's;
        - "diag": ``diag(S_k) + eps diag(W)``;
        - "tied": ``W + eps diag(W)``.

        A class of one row has no covariance of its own: s_k is 1, or S_k is 0.
    eps
        Added variance: absolute with "full", as published, so that features should be of unit
        scale; else in shares of each feature's variance within classes.
    """

    covariance: str = parameter(
        one_of("shrunk", "full", "diag", "tied"), default="shrunk", search=True
    )
    eps: float = parameter(at_least(0), default=1e-2, search=(1e-3, 1.0, "log"))


class BalancedVirtualFeatures(GaussianParameters, CheckedOverSampler):
    """Over-sampling of embeddings by class-conditional Gaussian draws.

    A new row of class k is drawn from ``N(mu_k, Sigma_k)``, the mean and covariance of the class's
    rows [1]_. It goes between any encoder and any classifier::

        make_pipeline(encoder, BalancedVirtualFeatures(replace=True), LogisticRegression())

    Parameters
    ----------
    replace
        True gives virtual rows only, `n_per_class` of every class whatever `sampling_strategy`
        says: the classifier calibration of the paper. False gives the originals first, then
        virtual rows.
    n_per_class
        Only with ``replace=True``; None is 1,000 or the size of the largest class, whichever is
        more.

    Attributes
    ----------
    classes_
        Class labels.
    means_
        Class means.
    shrinkage_
        s_k: the share of the pooled covariance; 0 for "full" and "diag", 1 for "tied".

    See Also
    --------
    SPMixSampler : Over-sampling of images.

    Notes
    -----
    Draws are combinations of the centred rows with normal coefficients, ``mu_k + sum_i g_i a_i``:
    their covariance is that of the rows, and no d x d matrix is formed or factorised unless there
    are more rows than features. Statistics are float64; draws are float32 where X is, and take its
    dtype (whole numbers are rounded, True and False drawn as 1 and 0).
    As ``sampler=`` of an image classifier it would draw pixels: put it between an encoder and a
    classifier instead.
    The covariance of each class on its own needs tens of rows per class; with fewer, shrinkage
    gains (see the benchmark and tests). There is no transfer between classes in the paper.

    References
    ----------
    .. [1] "LMD" (2025), classifier calibration with virtual features; first in L. Pan et al.,
       "Combat long-tails in medical classification with relation-aware consistency and virtual
       features compensation", MICCAI 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn_medimb import BalancedVirtualFeatures
    >>> rng = np.random.default_rng(0)
    >>> X, y = rng.normal(size=(60, 8)), np.repeat([0, 1], [50, 10])
    >>> X_new, y_new = BalancedVirtualFeatures(random_state=0).fit_resample(X, y)
    >>> np.bincount(y_new).tolist(), bool((X_new[:60] == X).all())
    ([50, 50], True)
    >>> sampler = BalancedVirtualFeatures(replace=True, n_per_class=200, random_state=0)
    >>> np.bincount(sampler.fit_resample(X, y)[1]).tolist()
    [200, 200]
    """

    replace: bool = parameter("boolean", default=False, search=True)
    n_per_class: int | None = parameter(
        integers(1), None, default=None, search=[None, 500, 2000, 5000]
    )

    classes_: np.ndarray = learned("ndarray of shape (n_classes,)")
    means_: np.ndarray = learned("ndarray of float64 of shape (n_classes, n_features)")
    shrinkage_: np.ndarray = learned("ndarray of float64 of shape (n_classes,)")

    def _check_X_y(self, X: Any, y: Any, accept_sparse: Any = None) -> Any:  # noqa: N802
        # Columns of whole numbers, which a DataFrame may hold beside others, are rounded: its
        # conversion back would cut them off, and take every other number for True.
        kinds = [getattr(kind, "kind", "O") for kind in getattr(X, "dtypes", [])]
        self._whole = {kind: np.flatnonzero([k in kind for k in kinds]) for kind in ("b", "ui")}
        return super()._check_X_y(X, y, accept_sparse)

    def _fit_resample(self, X: Any, y: np.ndarray) -> tuple[Any, np.ndarray]:
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        generator = torch.Generator().manual_seed(seed)
        rows = X.toarray() if sparse.issparse(X) else X
        self.classes_, codes, counts = np.unique(y, return_inverse=True, return_counts=True)
        if self.replace:
            n_each = self.n_per_class or max(1000, int(counts.max()))
            self.sampling_strategy_ = dict.fromkeys(self.classes_.tolist(), n_each)
        if (counts == 1).any():
            warnings.warn(
                f"Classes {self.classes_[counts == 1].tolist()} have one row: their covariance is "
                "that of the other classes, or eps alone.",
                stacklevel=4,
            )
        gaussians = ClassGaussians(rows, codes, covariance=self.covariance, eps=self.eps)
        self.means_ = gaussians.means
        self.shrinkage_ = gaussians.shrinkage

        n_kept = 0 if self.replace else len(rows)
        targets = [
            (np.flatnonzero(self.classes_ == k)[0], n) for k, n in self.sampling_strategy_.items()
        ]
        n_new = sum(n for _, n in targets)
        out = np.empty((n_kept + n_new, rows.shape[1]), dtype=rows.dtype)
        out[:n_kept] = rows[:n_kept]
        y_out = np.concatenate([y[:n_kept], *[np.full(n, self.classes_[k]) for k, n in targets]])
        start = n_kept
        with one_thread_in_workers():
            for code, n in targets:
                gaussians.draw(code, out[start : start + n], generator)
                start += n
        for kind, columns in self._whole.items():
            drawn = np.rint(out[n_kept:, columns])
            out[n_kept:, columns] = drawn.clip(0, 1) if kind == "b" else drawn
        return (X.__class__(out) if sparse.issparse(X) else out), y_out.astype(y.dtype)


class ClassGaussians:
    """Mean and covariance of each class, without the covariance matrices where rows are few.

    Parameters
    ----------
    X : ndarray of shape (n, d)
        Rows.
    codes : ndarray of int of shape (n,)
        Class of each, 0 to n_classes - 1, none empty.
    covariance, eps
        As in :class:`BalancedVirtualFeatures`.
    """

    def __init__(self, X: np.ndarray, codes: np.ndarray, *, covariance: str, eps: float) -> None:
        n, d = X.shape
        self.codes, self.counts = codes, np.bincount(codes)
        self.centred = X.astype(np.float64)
        starts = np.cumsum(self.counts) - self.counts
        sums = np.add.reduceat(self.centred[np.argsort(codes, kind="stable")], starts)
        self.means = sums / self.counts[:, np.newaxis]
        self.centred -= self.means[codes]
        # W = centred^T centred / (n - K)
        self.n_within = max(n - len(self.counts), 1)
        self.diagonal = covariance == "diag"
        self.noise = np.full(d, float(eps))
        if covariance != "full":
            self.noise *= np.square(self.centred).sum(axis=0) / self.n_within
        self.shrinkage = np.zeros(len(self.counts))
        if covariance == "shrunk":
            self.shrinkage = np.where(self.counts == 1, 1.0, d / (self.counts + d))
        elif covariance == "tied":
            self.shrinkage += 1

    @cached_property
    def pooled(self) -> np.ndarray:
        """W, of shape (d, d); only where there are more rows than features."""
        return self.centred.T @ self.centred / self.n_within

    def covariance(self, code: int) -> np.ndarray:
        """Sigma_k, of shape (d, d)."""
        share, member = self.shrinkage[code], self.codes == code
        own = self.centred[member]
        own = own * np.sqrt((1 - share) / max(self.counts[code] - 1, 1))
        if self.diagonal:
            return np.diag(np.square(own).sum(axis=0) + self.noise)
        sigma = np.diag(self.noise)
        if share < 1:
            sigma += own.T @ own
        if share > 0:
            sigma += share * self.pooled
        return sigma

    def times(self, code: int) -> Callable[[np.ndarray], np.ndarray]:
        """Product of row vectors with Sigma_k, by the cheaper way."""
        n_rows = self.counts[code] if self.shrinkage[code] == 0 else len(self.centred)
        if self.diagonal or 2 * n_rows <= self.centred.shape[1]:
            rows, noise = self.factor(code)
            return lambda vectors: vectors @ rows.T @ rows + vectors * noise
        sigma = self.covariance(code)
        return lambda vectors: vectors @ sigma

    def factor(self, code: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows B and variances v with ``Sigma_k = B^T B + diag(v)``; B has d rows at most."""
        share, member = self.shrinkage[code], self.codes == code
        weight = member * (1 - share) / max(self.counts[code] - 1, 1)
        if self.diagonal:
            return self.centred[:0], weight @ np.square(self.centred) + self.noise
        taking_part = member if share == 0 else np.ones_like(member)
        if taking_part.sum() <= self.centred.shape[1]:
            weight = weight + share / self.n_within
            return self.centred[taking_part] * np.sqrt(weight[taking_part, np.newaxis]), self.noise
        sigma = self.covariance(code)
        try:
            return np.linalg.cholesky(sigma).T, np.zeros(len(sigma))
        except np.linalg.LinAlgError:  # eps is 0 and some features are linear in others
            values, vectors = np.linalg.eigh(sigma)
            return (vectors * np.sqrt(values.clip(min=0))).T, np.zeros(len(sigma))

    def draw(self, code: int, out: np.ndarray, generator: torch.Generator) -> None:
        """Fill `out`, of shape (n_draws, d), with draws of a class; whole numbers are rounded."""
        whole = out.dtype.kind in "bui"
        dtype = np.dtype(np.float64 if whole or out.dtype.itemsize > 4 else np.float32)
        rows, noise = self.factor(code)
        # The mean is one more row, whose coefficient is always 1.
        rows_and_mean = np.vstack([rows, self.means[code]]).astype(dtype)
        spread = np.sqrt(noise).astype(dtype)
        block = max(1, _BLOCK // out.shape[1])
        for part in np.split(out, range(block, len(out), block)):
            weights = _normal((len(part), len(rows_and_mean)), dtype, generator)
            weights[:, -1] = 1
            draws = part if part.dtype == dtype else np.empty(part.shape, dtype)
            np.matmul(weights, rows_and_mean, out=draws)
            if spread.any():
                extra = _normal(part.shape, dtype, generator)
                extra *= spread
                draws += extra
            if draws is not part:
                part[...] = _rounded(draws, out.dtype) if whole else draws


def _normal(shape: tuple[int, ...], dtype: np.dtype, generator: torch.Generator) -> np.ndarray:
    """Standard normal numbers; torch draws them in less than half of NumPy's time."""
    numbers = np.empty(shape, dtype)
    torch.from_numpy(numbers).normal_(generator=generator)
    return numbers


def _rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Nearest whole numbers that `dtype` holds."""
    low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    return np.rint(values).clip(low, high)
