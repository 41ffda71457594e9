"""Make a balanced, or less imbalanced, set long-tailed."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from sklearn.utils import (
    _safe_indexing,
    assert_all_finite,
    check_consistent_length,
    check_random_state,
)

from sklearn_medimb._data.labels import read_labels, warn_of_marks


def make_long_tailed(
    X: Any,
    y: Any,
    imbalance_ratio: float = 10.0,
    kind: str = "exponential",
    random_state: Any = None,
    *,
    n_samples: int | None = None,
    class_order: Sequence[Any] | None = None,
    return_indices: bool = False,
) -> tuple[Any, ...]:
    """Draw a long-tailed subset without replacement.

    With K classes ordered from head to tail, class k keeps a number of images proportional to
    ``imbalance_ratio ** (-k / (K - 1))`` ("exponential") or, in the second half of the classes,
    ``1 / imbalance_ratio`` ("step") [1]_. The whole profile is scaled to the largest set that `X`
    can fill, or to `n_samples`.

    Parameters
    ----------
    X : array-like or lazy sequence of n samples
        Images or feature vectors.
    y : array-like of shape (n,)
        Their classes.
    imbalance_ratio : float, default=10.0
        Size of the largest class over that of the smallest, at least 1.
    kind : {"exponential", "step"}, default="exponential"
        Course of the class sizes.
    random_state : int, RandomState or None, default=None
        Chooses the images.
    n_samples : int, default=None
        Size of the subset; None keeps as many images as the profile allows.
    class_order : sequence of labels, default=None
        Classes from head to tail; None sorts by frequency.
    return_indices : bool, default=False
        Whether to return the chosen rows as well.

    Returns
    -------
    X, y : same types as given
        The subset, in the order of the original rows.
    indices : ndarray of int
        Its rows; only with ``return_indices=True``.

    Raises
    ------
    ValueError
        If a parameter is out of range, or a class has too few images for the profile.

    References
    ----------
    .. [1] K. Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss",
       NeurIPS 2019, section 4.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_medimb.datasets import make_long_tailed
    >>> X, y = load_digits(n_class=4, return_X_y=True)
    >>> _, y_tail = make_long_tailed(X, y, imbalance_ratio=8, random_state=0)
    >>> np.bincount(y_tail).tolist()
    [46, 92, 23, 183]
    """
    check_consistent_length(X, y)
    labels = read_labels(y)
    warn_of_marks("make_long_tailed", labels)
    assert_all_finite(labels, input_name="y")
    is_number = isinstance(imbalance_ratio, Real) and not isinstance(imbalance_ratio, bool)
    if not is_number or not 1 <= imbalance_ratio < np.inf:
        raise ValueError(
            f"imbalance_ratio={imbalance_ratio!r} must be a number of at least 1, and finite."
        )
    if kind not in ("exponential", "step"):
        raise ValueError(f'kind={kind!r} must be "exponential" or "step".')
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"y holds one class only, {classes.tolist()}: nothing to imbalance.")
    order = np.argsort(-counts, kind="stable")
    if class_order is not None:
        if sorted(np.asarray(class_order).tolist()) != classes.tolist():
            raise ValueError(f"class_order must name each class of y once: {classes.tolist()}.")
        order = np.searchsorted(classes, np.asarray(class_order))
    position = np.empty(len(classes))
    position[order] = np.arange(len(classes)) / (len(classes) - 1)
    exponent = position if kind == "exponential" else (position >= 0.5).astype(float)
    profile = float(imbalance_ratio) ** -exponent

    sizes = np.maximum(np.round(profile * (counts / profile).min()).astype(int), 1)
    if n_samples is not None:
        if not isinstance(n_samples, Integral) or n_samples < len(classes):
            raise ValueError(f"n_samples={n_samples!r} must be an integer >= {len(classes)}.")
        if n_samples > sizes.sum():
            raise ValueError(
                f"n_samples={n_samples} is more than the {sizes.sum()} images that "
                f"imbalance_ratio={imbalance_ratio} allows with class sizes {counts.tolist()}."
            )
        sizes = _apportion(n_samples, profile, counts)

    rng = check_random_state(random_state)
    rows = np.sort(
        np.concatenate(
            [
                rng.choice(np.flatnonzero(labels == label), size, replace=False)
                for label, size in zip(classes, sizes, strict=True)
            ]
        )
    )
    subset = (_safe_indexing(X, rows), _safe_indexing(y, rows))
    return (*subset, rows) if return_indices else subset


def _apportion(total: int, profile: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sizes that add up to `total`, from 1 to `counts`, by largest remainder from `profile`."""
    exact = total * profile / profile.sum()
    sizes = np.clip(np.floor(exact).astype(int), 1, counts)
    while missing := total - sizes.sum():  # at most one step per class, up or down
        step = np.sign(missing)
        movable = sizes < counts if step > 0 else sizes > 1
        sizes[np.where(movable, step * (exact - sizes), -np.inf).argmax()] += step
    return sizes
