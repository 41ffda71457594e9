"""What the measures are given: labels or numbers, none of them missing.

Whether numbers happen to be whole does not say what they are: ages are whole, and grades, and
scores of 0 and 1. The metric tells: where numbers are drawn together, one that computes with them
changes in proportion, one that ranks them not at all, and one that compares them jumps, or fails.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from sklearn.utils import column_or_1d

from sklearn_medimb._data.labels import rows_without_entry
from sklearn_medimb._data.rows import kind_of_entry

Metric = Callable[[np.ndarray, np.ndarray], Any]
FEW = 10  # values that numbers have at most which are grades, each five times on average


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
    if array.ndim:
        is_plain = array.dtype.kind == "f" and not np.ma.isMaskedArray(values)  # also of a list
        rows = rows_without_entry(array if is_plain else values)
        if len(rows):
            raise ValueError(f"{name} has no entry in row {rows[0]}: leave such rows out.")
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


def kind_of_entries(values: np.ndarray, name: str) -> str:
    """What an array holds, "number" (also truth values), "string" or other; refuse a mixture."""
    if values.dtype.kind != "O":
        of_dtype = {**dict.fromkeys("biuf", "number"), "U": "string", "S": "bytes"}
        return of_dtype.get(values.dtype.kind, values.dtype.name)
    kinds = [
        "number" if isinstance(entry, (bool, np.bool_)) else kind_of_entry(entry)
        for entry in values.ravel().tolist()
    ]
    if odd := [row for row, kind in enumerate(kinds) if kind != kinds[0]]:
        raise ValueError(
            f"{name} must hold numbers or strings, not both: row 0 is a {kinds[0]}, row {odd[0]} a "
            f"{kinds[odd[0]]}."
        )
    return kinds[0] if kinds else "number"


def classes_in(y: np.ndarray, labels: Any, metric: Metric, predictions: list[Any]) -> np.ndarray:
    """Labels that true values hold: none where they are numbers.

    Parameters
    ----------
    y : ndarray of shape (n,) or (n, n_outputs)
        True labels, or numbers.
    labels : array-like or None
        What the caller says.
    metric : callable
        ``metric(y_true, y_pred)``, asked where numbers may be either.
    predictions : list of ndarray
        What it is asked about.

    Returns
    -------
    classes : ndarray of shape (n_classes,)
        Sorted.
    """
    kind, none = kind_of_entries(y, "y_true"), y[:0].ravel()
    if labels is not None:
        labels = labels_of(labels, "labels")
        if not len(labels):
            return none
        if y.ndim != 1:
            raise ValueError(f"y_true has shape {y.shape}: labels are for one column of labels.")
        if odd := [label for label in np.unique(y).tolist() if label not in set(labels.tolist())]:
            raise ValueError(f"y_true holds {odd}, which are not among labels.")
        return np.unique(y)
    if y.ndim != 1 or y.dtype.kind in "cmM":
        return none
    values = np.unique(y)
    if kind != "number" or y.dtype.kind == "b":
        return values
    if len(values) <= FEW and len(y) >= 5 * len(values):
        return values
    if not _are_whole(values):
        return none
    asked = [(partial(_of_true, metric, p), y) for p in [*predictions, y]]
    return values if len(values) <= 2 or _minds(asked, values) else none


def are_labels(
    metric: Metric, y: np.ndarray, values: np.ndarray, classes: np.ndarray, name: str
) -> bool:
    """Whether predictions are labels, and not scores.

    Parameters
    ----------
    metric : callable
        ``metric(y_true, y_pred)``, asked where numbers may be either.
    y : ndarray of shape (n,)
        True labels.
    values : ndarray of shape (n,) or (n, n_classes)
        Predictions.
    classes : ndarray of shape (n_classes,)
        Labels in `y`, or that may be.
    name : str
        The parameter that `values` is, for errors.

    Returns
    -------
    labels : bool
        Whether they are.
    """
    if values.ndim != 1 or not len(classes):
        return False
    kind, of_y = kind_of_entries(values, name), kind_of_entries(y, "y_true")
    if kind != "number":
        if kind != of_y:
            raise ValueError(
                f"y_true holds a {of_y}, {name} a {kind}: give both in the same labels."
            )
        return True
    found = np.unique(values)
    both_whole = of_y == "number" and _are_whole(found) and _are_whole(classes)
    if of_y != "number" or not (both_whole or np.isin(found, classes).all()):
        return False
    every = np.union1d(classes, found)
    some = every[np.linspace(0, len(every) - 1, min(len(every), FEW)).astype(int)]
    # A recall does not mind where it is 0: besides the predictions it is asked about right ones,
    # and about every label for every sample.
    tiled = np.tile(y, len(some))
    asked: list[tuple[Callable[..., Any], np.ndarray]] = [
        (lambda v: metric(y, v), values),
        (lambda v: metric(y, v), y),
        (lambda v: metric(tiled, v), np.repeat(some, len(y))),
    ]
    return _minds(asked, every)


def _are_whole(values: np.ndarray) -> bool:
    numbers = values.astype(np.float64)
    return bool((numbers == np.rint(numbers)).all())


def _of_true(metric: Metric, predictions: np.ndarray, y: np.ndarray) -> Any:
    return metric(y, predictions)


def _minds(asked: Sequence[tuple[Callable[..., Any], np.ndarray]], values: np.ndarray) -> bool:
    """Whether any score compares numbers with labels or thresholds, and does not use them as such.

    All are drawn towards a point between the least and the greatest of the values, so that their
    order stays. What changes in proportion, or not at all, computes with the numbers or ranks them;
    what jumps, or fails, compares them.
    """
    low, high = float(values[0]), float(values[-1])
    if low == high:
        low, high = (0.0, 1.0) if low in (0, 1) else (low, low + 1)
    point = low + (np.sqrt(2) - 1) * (high - low)  # not a value itself
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for score, numbers in asked:
            try:
                given = np.asarray(score(numbers), dtype=np.float64)
            except Exception:  # noqa: S112  # not for these numbers anyway
                continue
            numbers, changes = numbers.astype(np.float64), []
            for share in (0.9, 1e-3, 1e-5):
                try:
                    found = np.asarray(score(numbers + share * (point - numbers)), dtype=np.float64)
                except Exception:
                    return True
                if found.shape != given.shape or (np.isnan(found) != np.isnan(given)).any():
                    return True
                changes.append(np.where(found == given, 0, np.abs(found - given)))
            much, little, least = changes
            none = 1e-9 * np.abs(given) + 1e-12
            jumps = (least > little / 10 + none) | ((little <= none) & (much > none))
            if jumps.any():
                return True
    return False
