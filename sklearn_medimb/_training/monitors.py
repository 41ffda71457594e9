"""Watching features for collapse."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from skorch.callbacks import Callback

# ---------------------------------------------------------------- monitors


def feature_std(features: np.ndarray) -> float:
    """Spread of unit-length features: 1 where they fill the sphere evenly, 0 where they collapsed.

    The mean over dimensions of the standard deviation, times the root of their number [1]_.

    Parameters
    ----------
    features : ndarray of shape (n, d)
        Features.

    References
    ----------
    .. [1] X. Chen, K. He, "Exploring simple Siamese representation learning", CVPR 2021, fig. 2.
    """
    length = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.where(length > 0, length, 1)
    return float(unit.std(axis=0).mean() * np.sqrt(features.shape[1]))


def effective_rank(features: np.ndarray) -> float:
    """Number of directions in which features vary: exp of the entropy of the singular values [1]_.

    Parameters
    ----------
    features : ndarray of shape (n, d)
        Features; they are centred first.

    References
    ----------
    .. [1] O. Roy, M. Vetterli, "The effective rank: a measure of effective dimensionality",
       EUSIPCO 2007.
    """
    centred = features - features.mean(axis=0)
    values = np.linalg.svd(centred, compute_uv=False)
    total = values.sum()
    if not total > 0:
        return 0.0
    share = values[values > 0] / total
    return float(np.exp(-(share * np.log(share)).sum()))


def knn_score(features: np.ndarray, y: np.ndarray, n_neighbors: int = 1) -> float:
    """Balanced accuracy of each row's class among its nearest other rows, by cosine.

    Parameters
    ----------
    features : ndarray of shape (n, d)
        Features.
    y : ndarray of int of shape (n,)
        Classes.
    n_neighbors : int, default=1
        Neighbours, at most n - 1. More than one would outvote classes of few rows.
    """
    probe = KNeighborsClassifier(min(n_neighbors, len(y) - 1), metric="cosine").fit(features, y)
    return float(balanced_accuracy_score(y, probe.predict(None)))


class Monitor(Callback):
    """Watch the features of some training images after each epoch; training never sees it.

    Parameters
    ----------
    embed : callable
        Row numbers to features.
    y : ndarray of int of shape (n,)
        Class of each row, -1 where unknown: with two classes or more there is a kNN score.
    n_epochs : int
        Of the training; of more than 100, about a hundred are looked at, and the last one.
    """

    may_stop = False
    n_rows = 256
    n_probed = 1000

    def __init__(
        self, embed: Callable[[np.ndarray], np.ndarray], y: np.ndarray, n_epochs: int
    ) -> None:
        self.embed = embed
        self.every = -(-n_epochs // 100)
        self.rows = _evenly(np.arange(len(y)), self.n_rows)
        known = np.flatnonzero(y >= 0)
        known = known[np.argsort(y[known], kind="stable")]
        self.probed = _evenly(known, self.n_probed)
        self.y = y
        if len(np.unique(y[self.probed])) < 2:
            self.probed = self.probed[:0]

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        """Look, at most about a hundred times."""
        if len(net.history) % self.every == 0:
            self.look(net)

    def on_train_end(self, net: Any, **kwargs: Any) -> None:
        """Look at what has become of the features; warn where it is nothing."""
        if not len(net.history):
            return
        if "feature_std" not in net.history[-1]:
            self.look(net)
        messages = net.criterion_.complaints()
        spread, rank = net.history[-1, ("feature_std", "effective_rank")]
        # Three images span two directions at most, whatever was learned.
        if spread < 0.01 or (rank < 1.2 and len(self.rows) > 3):
            messages.append(
                f"The features have all but collapsed (feature_std={spread:.3g}, "
                f"effective_rank={rank:.3g}): lower lr, or choose other views."
            )
        for message in messages:
            warnings.warn(message, stacklevel=2)

    def look(self, net: Any) -> None:
        """Record `feature_std`, `effective_rank`, and `knn_score` where classes are known."""
        features = self.embed(np.concatenate([self.rows, self.probed]))
        watched, probed = np.split(features, [len(self.rows)])
        net.history.record("feature_std", feature_std(watched))
        net.history.record("effective_rank", effective_rank(watched))
        if len(probed):
            net.history.record("knn_score", knn_score(probed, self.y[self.probed]))


def _evenly(rows: np.ndarray, n: int) -> np.ndarray:
    """At most n of the rows, evenly spaced."""
    return rows if len(rows) <= n else rows[np.linspace(0, len(rows) - 1, n).astype(int)]
