"""Which rows train and which validate; resampling comes after that split, never before."""

from __future__ import annotations

from typing import Any

import numpy as np
from imblearn.over_sampling import RandomOverSampler
from imblearn.under_sampling import RandomUnderSampler
from sklearn.base import clone
from sklearn.model_selection import StratifiedGroupKFold

from sklearn_medimb.images import Images


def validation_split(
    y: np.ndarray,
    fraction: float,
    groups: np.ndarray | None,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Stratified split of row numbers that keeps every class, and every group whole.

    Without groups each class gives up its share of rows, at least one where it has two, never its
    last one. With groups, whole groups move.

    Parameters
    ----------
    y : ndarray of int of shape (n,)
        Encoded classes.
    fraction : float
        Share of the rows to validate on.
    groups : ndarray of shape (n,) or None
        Rows of one group (a patient, say) stay together.
    rng : numpy.random.Generator
        Source of randomness.

    Returns
    -------
    train, valid : ndarray of int
        Row numbers, ascending.

    Raises
    ------
    ValueError
        If no split leaves rows on both sides and every class in training.
    """
    if groups is None:
        valid = []
        for label in np.unique(y):
            rows = rng.permutation(np.flatnonzero(y == label))
            n_valid = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
            valid.append(rows[:n_valid])
        valid = np.sort(np.concatenate(valid))
        if not len(valid):
            raise ValueError(
                "No class has two samples: early_stopping needs a validation split, set "
                "early_stopping=False."
            )
        return np.setdiff1d(np.arange(len(y)), valid), valid

    n_groups = len(np.unique(groups))
    n_splits = min(max(2, round(1 / fraction)), n_groups)
    if n_splits < 2:
        raise ValueError("groups holds a single group: no validation split can keep it whole.")
    # StratifiedGroupKFold warns of, and copes with, classes rarer than n_splits.
    folds = StratifiedGroupKFold(
        n_splits, shuffle=True, random_state=int(rng.integers(2**31 - 1))
    ).split(y, _with_enough_members(y, n_splits), groups)
    for train, valid in folds:
        if len(valid) and len(np.unique(y[train])) == len(np.unique(y)):
            return train, valid
    raise ValueError(
        "No grouped validation split keeps every class in training: some class lies within one "
        "group. Set early_stopping=False."
    )


def _with_enough_members(y: np.ndarray, n_splits: int) -> np.ndarray:
    """Merge classes with fewer than `n_splits` rows, which StratifiedGroupKFold would warn of."""
    counts = np.bincount(y)
    merged = np.where(counts[y] < n_splits, len(counts), y)
    return merged if np.bincount(merged)[np.unique(merged)].min() >= n_splits else np.zeros_like(y)


def resample(
    sampler: Any,
    images: Images,
    rows: np.ndarray,
    y: np.ndarray,
    weight: np.ndarray | None,
    seed: int,
) -> tuple[Images, np.ndarray, np.ndarray, np.ndarray | None]:
    """Apply an imbalanced-learn sampler to the training rows.

    Samplers that only repeat or drop rows work on row numbers, so that no image is copied or, in a
    lazy container, read. Others see flattened images.

    Parameters
    ----------
    sampler : imbalanced-learn sampler
        Cloned; an unset ``random_state`` is derived from `seed`.
    images : Images
        All images.
    rows : ndarray of int of shape (n,)
        Training rows among `images`.
    y : ndarray of shape (n,)
        Their classes.
    weight : ndarray of shape (n,) or None
        Their weights.
    seed : int
        Seed for the sampler.

    Returns
    -------
    images, rows, y, weight
        The resampled training set in the same form.

    Raises
    ------
    ValueError
        If the sampler makes new rows and weights were given, or the images are lazy.
    """
    sampler = clone(sampler)
    if getattr(sampler, "random_state", 0) is None:
        sampler.set_params(random_state=seed)
    name = type(sampler).__name__
    if isinstance(sampler, (RandomOverSampler, RandomUnderSampler)) and (
        getattr(sampler, "shrinkage", None) is None
    ):
        picks, y = sampler.fit_resample(np.arange(len(rows)).reshape(-1, 1), y)
        picks = picks.ravel()
        return images, rows[picks], y, None if weight is None else weight[picks]
    if images.lazy:
        raise ValueError(
            f"sampler={name} needs every image in memory: pass X as an array, or use "
            "RandomOverSampler or RandomUnderSampler, which work on a lazy X."
        )
    if weight is not None:
        raise ValueError(
            f"sampler={name} makes rows that no sample_weight belongs to: drop one of the two."
        )
    block = images.data.take(rows, axis=0)
    block, y = sampler.fit_resample(block.reshape(len(rows), -1), y)
    block = np.ascontiguousarray(block, dtype=images.dtype)
    return Images(block, images.layout, images.dtype), np.arange(len(y)), y, None
