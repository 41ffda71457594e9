"""Which labels are the disease, and what its frequency makes of a positive result."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any

import numpy as np
from sklearn.utils import check_consistent_length

from sklearn_medimb.metrics._labels import labels_of


def positive_classes(classes: np.ndarray, positive: Any) -> np.ndarray:
    """Find the labels that are the disease.

    Parameters
    ----------
    classes : ndarray of shape (n_classes,)
        All labels, ascending.
    positive : label, collection of labels or None
        The disease. None takes the greater one of two numbers or truth values; what texts mean
        their order does not tell.

    Returns
    -------
    mask : ndarray of bool of shape (n_classes,)
        Neither all nor none.

    Raises
    ------
    ValueError
        If `positive` has to be said, is unknown, or leaves no label on one side.
    """
    known = classes.tolist()
    if positive is None:
        if len(known) != 2 or any(isinstance(label, str) for label in known):
            raise ValueError(
                "Only binary classification is supported by positive=None, and of numbers: say "
                f"which of the labels {known} are the disease, such as positive={known[-1]!r}."
            )
        return np.array([False, True])
    is_one = isinstance(positive, str) or not isinstance(positive, Iterable)
    wanted = [positive] if is_one else list(positive)
    mask = np.array([label in wanted for label in known], dtype=bool)
    if unknown := [label for label in wanted if label not in known]:
        raise ValueError(f"positive={positive!r} names {unknown}, which are not among {known}.")
    if mask.all() or not mask.any():
        raise ValueError(f"positive={positive!r} must name some of the labels {known}, not all.")
    return mask


def check_prevalence(prevalence: Any) -> float:
    """Refuse what is no share of the ill among all: 0 and 1 leave nothing to tell apart."""
    if not isinstance(prevalence, Real) or not 0 < float(prevalence) < 1:
        raise ValueError(f"prevalence={prevalence!r} must be a number between 0 and 1.")
    return float(prevalence)


def predictive_values(
    sensitivity: float, specificity: float, prevalence: float
) -> tuple[float, float]:
    """Chance that a positive is ill, and that a negative is well, by Bayes' formula.

    NaN where nobody is called positive, or negative.
    """
    found, alarms = prevalence * sensitivity, (1 - prevalence) * (1 - specificity)
    missed, cleared = prevalence * (1 - sensitivity), (1 - prevalence) * specificity
    with np.errstate(invalid="ignore"):
        ppv = np.float64(found) / (found + alarms)
        npv = np.float64(cleared) / (cleared + missed)
    return float(ppv), float(npv)


def rates(ill: np.ndarray, called: np.ndarray, prevalence: float | None) -> dict[str, float]:
    """Sensitivity, specificity and predictive values; NaN where nobody is there to ask.

    Parameters
    ----------
    ill, called : ndarray of bool of shape (n,)
        Who has the disease, and who is said to.
    prevalence : float or None
        Share of the ill where the test is to be used; None is that of `ill`.
    """
    n_ill, n_well = ill.sum(), (~ill).sum()
    sensitivity = float((ill & called).sum() / n_ill) if n_ill else np.nan
    specificity = float((~ill & ~called).sum() / n_well) if n_well else np.nan
    prevalence = n_ill / len(ill) if prevalence is None else check_prevalence(prevalence)
    ppv, npv = predictive_values(sensitivity, specificity, prevalence)
    return {"sensitivity": sensitivity, "specificity": specificity, "ppv": ppv, "npv": npv}


def side_rates(
    y_true: Any, y_pred: Any, positive: Any, prevalence: float | None, known: Any = ()
) -> dict[str, float]:
    """`rates` of labels, of which `known` are some that may occur."""
    y, predicted = labels_of(y_true, "y_true"), labels_of(y_pred, "y_pred")
    check_consistent_length(y, predicted)
    if not len(y):
        raise ValueError("y_true is empty.")
    labels = [set(one.tolist()) for one in (y, predicted, np.asarray(known))]
    classes = np.array(sorted(set().union(*labels)), dtype=object)
    wanted = classes[positive_classes(classes, positive)].tolist()
    ill, called = (
        np.array([one in wanted for one in v.tolist()], dtype=bool) for v in (y, predicted)
    )
    return rates(ill, called, prevalence)


def positive_predictive_value(
    y_true: Any, y_pred: Any, *, positive: Any = None, prevalence: float | None = None
) -> float:
    """Share of the ill among those whom the test calls ill, at the true frequency of the disease.

    :func:`sklearn.metrics.precision_score` holds for the mixture in `y_true`. Where that is
    enriched, as data for training are, it promises too much: at a sensitivity and a specificity
    of .9 half of the positives are ill if 1 in 10 is, and 1 in 12 if 1 in 100 is.

    Parameters
    ----------
    y_true, y_pred : array-like of shape (n,)
        Labels.
    positive : label or collection of labels, default=None
        The disease; all other labels are the other side. None takes the greater one of two
        numbers, and refuses texts.
    prevalence : float, default=None
        Share of the ill where the test is to be used, above 0 and below 1; None is that in
        `y_true`.

    Returns
    -------
    value : float
        NaN where nobody is called ill, or `y_true` lacks a side.

    Raises
    ------
    ValueError
        If `positive` or `prevalence` cannot mean what they say.

    Examples
    --------
    >>> from sklearn_medimb.metrics import positive_predictive_value
    >>> y_true, y_pred = [1] * 10 + [0] * 10, [1] * 9 + [0] * 10 + [1]
    >>> float(round(positive_predictive_value(y_true, y_pred, prevalence=0.01), 3))
    0.083
    """
    return side_rates(y_true, y_pred, positive, prevalence)["ppv"]


def negative_predictive_value(
    y_true: Any, y_pred: Any, *, positive: Any = None, prevalence: float | None = None
) -> float:
    """Share of the well among those whom the test calls well, at the true frequency of the disease.

    Parameters
    ----------
    y_true, y_pred, positive, prevalence
        As in :func:`positive_predictive_value`.

    Returns
    -------
    value : float
        NaN where nobody is called well, or `y_true` lacks a side.

    Raises
    ------
    ValueError
        As in :func:`positive_predictive_value`.

    Examples
    --------
    >>> from sklearn_medimb.metrics import negative_predictive_value
    >>> y_true, y_pred = [1] * 10 + [0] * 10, [1] * 9 + [0] * 10 + [1]
    >>> float(round(negative_predictive_value(y_true, y_pred, prevalence=0.01), 4))
    0.9989
    """
    return side_rates(y_true, y_pred, positive, prevalence)["npv"]
