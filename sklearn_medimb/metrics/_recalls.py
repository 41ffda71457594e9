"""Recalls of frequent and of rare classes."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from sklearn.metrics import recall_score
from sklearn.utils import check_consistent_length

from sklearn_medimb.metrics._labels import labels_of

Counts = Mapping[Any, int] | Any


class ShotRecall(NamedTuple):
    """Mean recall over the frequent, the middle and the rare classes; NaN for an empty group."""

    many: float
    medium: float
    few: float


def shot_recall(
    y_true: Any,
    y_pred: Any,
    train_counts: Counts,
    *,
    thresholds: tuple[int, int] | None = None,
) -> ShotRecall:
    """Mean recall of the classes with many, a medium number of, and few training images.

    Parameters
    ----------
    y_true, y_pred : array-like of shape (n,)
        True and predicted labels.
    train_counts : dict or pandas.Series from label to int, or array-like of labels
        Training images of each class, as ``y_train.value_counts()`` gives them, or the training
        labels themselves.
    thresholds : (int, int), default=None
        A class has few images below the first and many above the second, as (20, 100) in the
        literature on long tails. None makes thirds of the classes, by rank; classes of equal size
        stay together.

    Returns
    -------
    recall : ShotRecall
        ``many``, ``medium`` and ``few``. A group without classes in `y_true` is NaN, not 0.

    Raises
    ------
    ValueError
        If `y_true` holds a class that `train_counts` lacks, a Series can be read both as counts
        and as labels, counts are not whole numbers >= 0, or a row has no label.

    References
    ----------
    Z. Liu et al., "Large-scale long-tailed recognition in an open world", CVPR 2019.

    Examples
    --------
    >>> from sklearn_medimb.metrics import shot_recall
    >>> shot_recall([0, 0, 1, 2, 2], [0, 0, 0, 2, 1], {0: 300, 1: 50, 2: 5})
    ShotRecall(many=1.0, medium=0.0, few=0.5)
    """
    y_true, y_pred = labels_of(y_true, "y_true"), labels_of(y_pred, "y_pred")
    check_consistent_length(y_true, y_pred)
    classes = np.unique(y_true)
    counts = class_counts(train_counts, set(classes.tolist()))
    if missing := [label for label in classes.tolist() if label not in counts]:
        raise ValueError(
            f"train_counts lacks the classes {missing} of y_true: pass {{label: count}}, or the "
            "training labels."
        )
    recalls = recall_score(y_true, y_pred, labels=classes, average=None, zero_division=0)
    sizes = np.array([counts[label] for label in classes.tolist()])
    if thresholds is None:
        # Rank among all training classes; ties share the mean rank and so stay together.
        every = np.array(list(counts.values()))
        below, equal = (every < sizes[:, None]).sum(1), (every == sizes[:, None]).sum(1)
        place = (below + (equal - 1) / 2) / max(len(every) - 1, 1)
        few, many = place < 1 / 3, place > 2 / 3
    else:
        low, high = thresholds
        if low > high:
            raise ValueError(f"thresholds={thresholds} must be (few, many) with few <= many.")
        few, many = sizes < low, sizes > high
    groups = (many, ~(many | few), few)
    return ShotRecall(*(float(recalls[g].mean()) if g.any() else float("nan") for g in groups))


def head_tail_gap(
    y_true: Any,
    y_pred: Any,
    train_counts: Counts,
    *,
    thresholds: tuple[int, int] | None = None,
) -> float:
    """Mean recall of the frequent classes minus that of the rare ones.

    Parameters
    ----------
    y_true, y_pred, train_counts, thresholds
        As in :func:`shot_recall`.

    Returns
    -------
    gap : float
        From -1 to 1; 0 where rare classes fare as well as frequent ones. NaN where either group is
        empty.
    """
    recall = shot_recall(y_true, y_pred, train_counts, thresholds=thresholds)
    return recall.many - recall.few


def class_counts(train_counts: Counts, classes: set[Any]) -> dict[Any, int]:
    """Training images of each class; `classes` are those to be found in it."""
    if all(hasattr(train_counts, name) for name in ("index", "name", "to_dict")):  # pandas.Series
        train_counts = _unambiguous(train_counts, classes)
    if isinstance(train_counts, Mapping):
        counted = dict(train_counts)
        if odd := {label: n for label, n in counted.items() if not _is_count(n)}:
            raise ValueError(f"train_counts must hold whole numbers >= 0, not {odd}.")
        return counted
    labels, counts = np.unique(labels_of(train_counts, "train_counts"), return_counts=True)
    return dict(zip(labels.tolist(), counts.tolist(), strict=True))


def _is_count(value: Any) -> bool:
    number = isinstance(value, Real) and not isinstance(value, (bool, np.bool_))
    return number and value >= 0 and float(value).is_integer()


def _unambiguous(series: Any, classes: set[Any]) -> Any:
    """Counts of a pandas.Series as a dict, or its labels as an array, whichever it holds."""
    index, values = series.index.tolist(), series.tolist()
    numeric = getattr(series.dtype, "kind", "O") in "iuf"
    counted = numeric and classes <= set(index) and len(set(index)) == len(index)
    if series.name in ("count", "proportion") and counted:  # what value_counts() calls its result
        labelled = False
    else:
        # Where numbers of rows happen to be labels too, there are others beside them.
        labelled = classes <= set(values)
        counted = counted and not (labelled and not set(index) <= set(values))
    if counted and labelled:
        raise ValueError(
            "train_counts may be counts by label or labels by row: pass its to_dict() or its "
            "to_numpy()."
        )
    if not counted:
        return series.to_numpy()
    return dict(zip(index, values, strict=True))
