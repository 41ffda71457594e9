"""Errors of calibration."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.utils import check_consistent_length, column_or_1d
from sklearn.utils.multiclass import unique_labels

from sklearn_medimb.metrics._labels import labels_of


def expected_calibration_error(
    y_true: Any,
    y_proba: Any,
    *,
    labels: Any = None,
    n_bins: int = 15,
    strategy: str = "uniform",
    class_wise: bool = False,
) -> float:
    """Mean distance between confidence and accuracy, over bins of confidence.

    ::

        ECE = sum over bins b of |b| / n * | accuracy(b) - mean confidence(b) |

    Parameters
    ----------
    y_true : array-like of shape (n,)
        True labels.
    y_proba : array-like of shape (n, n_classes) or (n,)
        Probabilities; one column is that of the greater of two labels, however `labels` lists them.
    labels : array-like of shape (n_classes,), default=None
        Labels of the columns; None takes those of `y_true`, sorted.
    n_bins : int, default=15
        Bins of confidence.
    strategy : {"uniform", "quantile"}, default="uniform"
        Bins of equal width, or of equally many samples.
    class_wise : bool, default=False
        False looks at the predicted class of each sample. True looks at each class against the
        rest, and gives the mean over classes, so that rare classes count.

    Returns
    -------
    error : float
        From 0 to 1.

    Raises
    ------
    ValueError
        If the columns are not probabilities, or do not fit the labels, or a row of `y_true` has no
        label.

    References
    ----------
    C. Guo et al., "On calibration of modern neural networks", ICML 2017. Class-wise: M. Kull et
    al., "Beyond temperature scaling", NeurIPS 2019.
    """
    y_true, proba, labels = probabilities_of(y_true, y_proba, labels)
    if n_bins < 1:
        raise ValueError(f"n_bins={n_bins} must be at least 1.")
    if strategy not in ("uniform", "quantile"):
        raise ValueError(f'strategy={strategy!r} must be "uniform" or "quantile".')
    hits = y_true[:, np.newaxis] == np.asarray(labels)
    if not class_wise:
        rows, top = np.arange(len(proba)), proba.argmax(axis=1)
        return _calibration_error(hits[rows, top], proba[rows, top], n_bins, strategy)
    errors = [
        _calibration_error(hits[:, k], proba[:, k], n_bins, strategy) for k in range(len(labels))
    ]
    return float(np.mean(errors))


def probabilities_of(
    y_true: Any, y_proba: Any, labels: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read labels and probabilities, as :func:`expected_calibration_error` takes them.

    Returns
    -------
    y_true : ndarray of shape (n,)
        True labels.
    proba : ndarray of float64 of shape (n, n_classes)
        Probabilities.
    labels : ndarray of shape (n_classes,)
        Labels of the columns.
    """
    y_true = labels_of(y_true, "y_true")
    proba = np.asarray(y_proba, dtype=np.float64)
    check_consistent_length(y_true, proba)
    labels = unique_labels(y_true) if labels is None else column_or_1d(labels)
    if len(set(labels.tolist())) < len(labels):
        raise ValueError(f"labels={labels.tolist()} holds a label twice.")
    if proba.ndim == 1:
        proba, labels = np.column_stack([1 - proba, proba]), np.sort(labels)
    if proba.shape[1] != len(labels):
        raise ValueError(
            f"y_proba has {proba.shape[1]} columns for {len(labels)} labels: pass labels=... where "
            "y_true lacks some."
        )
    if not (proba >= -1e-9).all() or not np.allclose(proba.sum(axis=1), 1, atol=1e-4):
        raise ValueError("y_proba must hold probabilities: rows of numbers >= 0 that sum to 1.")
    if unknown := sorted(set(y_true.tolist()) - set(np.asarray(labels).tolist())):
        raise ValueError(f"y_true holds {unknown}, which are not among labels.")
    return y_true, proba, np.asarray(labels)


def _calibration_error(
    hit: np.ndarray, confidence: np.ndarray, n_bins: int, strategy: str
) -> float:
    if strategy == "uniform":
        bins = np.minimum((confidence.clip(0, 1) * n_bins).astype(int), n_bins - 1)
    else:
        edges = np.quantile(confidence, np.arange(1, n_bins) / n_bins)
        bins = np.searchsorted(edges, confidence, side="right")
    gaps = np.bincount(bins, hit - confidence, minlength=n_bins)
    return float(np.abs(gaps).sum() / len(hit))
