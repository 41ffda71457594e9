"""What the measures are given: labels or numbers, none of them missing."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.utils import column_or_1d

from sklearn_medimb._data.rows import missing_entries


def entries(values: Any, name: str) -> np.ndarray:
    """Return an array, or refuse what has rows without an entry.

    Parameters
    ----------
    values : array-like of shape (n,) or (n, n_columns)
        Labels, numbers or scores.
    name : str
        The parameter, for errors.

    Returns
    -------
    values : ndarray
        Of the same shape.

    Raises
    ------
    ValueError
        If an entry is missing (None, NaN, NaT, NA, masked).
    """
    array = np.asarray(values)
    if array.dtype.kind == "f" and not np.ma.isMaskedArray(values):
        missing = np.isnan(array)
    elif array.ndim:
        missing = missing_entries(values)
    else:
        missing = np.zeros(1, dtype=bool)
    if missing.any():
        row = int(missing.argmax()) // max(missing.size // max(len(array), 1), 1)
        raise ValueError(f"{name} has no entry in row {row}: leave such rows out.")
    return array


def labels_of(values: Any, name: str) -> np.ndarray:
    """One column of labels, as `entries` gives them."""
    return column_or_1d(entries(values, name))


def refuse_strangers(y: np.ndarray, known: np.ndarray) -> None:
    """Refuse true labels none of which the classifier knows: they are of another kind."""
    if len(y) and not set(y.tolist()) & set(known.tolist()):
        raise ValueError(
            f"y holds {y.tolist()[0]!r}, the classifier knows {known.tolist()}, and none of these "
            "is in y: give y in the labels that it was fitted on."
        )
