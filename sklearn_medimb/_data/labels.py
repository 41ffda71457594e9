"""Labels: the one gate that they pass, so that what means "no label" becomes no class."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from sklearn.utils import column_or_1d
from sklearn.utils.validation import _num_samples

from sklearn_medimb._data.rows import are_known, as_entries, missing_entries


def label_column(y: Any, *, warn: bool = False) -> np.ndarray:
    """Bring labels into one axis; numbers beside texts in a list stay numbers.

    Parameters
    ----------
    y : array-like of shape (n,) or (n, 1)
        Labels.
    warn : bool, default=False
        Whether to warn of a second axis.
    """
    column = column_or_1d(y, warn=warn)
    if column.dtype.kind not in "US":
        return column
    entries = as_entries(y).ravel()
    return column if all(isinstance(entry, str) for entry in entries.tolist()) else entries


def read_labels(
    y: Any,
    *,
    name: str = "y",
    advice: str = "leave such rows out",
    mixed: bool = False,
    warn: bool = False,
) -> np.ndarray:
    """Validate labels: one for each row, none of them missing.

    Parameters
    ----------
    y : array-like of shape (n,) or (n, 1)
        Labels.
    name, advice : str
        What errors call them, and say about missing ones.
    mixed : bool, default=False
        Whether numbers may stand beside texts.
    warn : bool, default=False
        Whether to warn of a second axis.

    Returns
    -------
    y : ndarray of shape (n,)
        The labels; of dtype object where they are mixed.

    Raises
    ------
    ValueError
        If a label is missing (None, NaN, NaT, NA, masked), or if kinds are mixed.
    """
    column = label_column(y, warn=warn)
    if len(empty := rows_without_entry(y)):
        raise ValueError(
            f"{name} has no label in row {empty[0]} ({len(empty)} rows in all): {advice}."
        )
    if column.dtype == object and not mixed:
        texts = np.array([isinstance(label, str) for label in column.tolist()], dtype=bool)
        if texts.any() and not texts.all():
            rows = texts.argmin(), texts.argmax()
            shown = ", ".join(f"row {row} holds {column[row]!r}" for row in sorted(rows))
            raise ValueError(f"{name} must hold labels of one kind, numbers or strings: {shown}.")
    return column


def rows_without_entry(values: Any) -> np.ndarray:
    """Rows of labels, numbers or scores (n,) or (n, n_columns) in which an entry says nothing."""
    missing = missing_entries(values)
    width = max(missing.size // max(_num_samples(values), 1), 1)
    return np.unique(np.flatnonzero(missing) // width)


def is_mark(y: np.ndarray) -> np.ndarray:
    """Find -1, by value: as a number, or as text such as "-1.0"; it often means "no label".

    Parameters
    ----------
    y : ndarray of shape (n,)
        Labels.

    Returns
    -------
    marks : ndarray of bool of shape (n,)
        For each row.
    """
    if y.dtype.kind in "biuf":
        return np.asarray(y == -1, dtype=bool)
    return np.fromiter(map(_is_mark, y.tolist()), bool, len(y))


def _is_mark(label: Any) -> bool:
    try:
        return label == -1 or (isinstance(label, str) and float(label) == -1)
    except (TypeError, ValueError):
        return False


def warn_of_marks(owner: str, y: np.ndarray) -> None:
    """Warn where -1 stands beside two classes or more, and is about to become one.

    Parameters
    ----------
    owner : str
        Whose labels they are.
    y : ndarray of shape (n,)
        Labels of one kind.
    """
    if are_known() or not (marks := is_mark(y)).any() or len(set(y[~marks].tolist())) < 2:
        return
    warnings.warn(
        f"{owner} takes y = {y[marks.argmax()]} for a class. Where it means that an image has no "
        "label, use AMIMVClassifier, or leave these rows out.",
        stacklevel=3,
    )
