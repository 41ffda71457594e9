"""The measures as scorers."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
from imblearn.metrics import geometric_mean_score
from sklearn.metrics import (
    get_scorer,
    get_scorer_names,
    make_scorer,
)

from sklearn_medimb.metrics._calibration import expected_calibration_error
from sklearn_medimb.metrics._recalls import head_tail_gap, shot_recall


def scorer_name(metric: Any) -> str:
    """What a user calls a metric or scorer."""
    if metric is None or isinstance(metric, str):
        return f"scoring={metric!r}"
    while isinstance(metric, partial):
        metric = metric.func
    return getattr(metric, "__name__", None) or repr(metric)


def with_labels(scorer: Any, classes: np.ndarray) -> Any:
    """Tell a scorer of probabilities the classes of their columns, lest it take those in y.

    Scorers of predicted labels, and those that do not ask, stay as they are.

    Parameters
    ----------
    scorer : callable
        Of scikit-learn's kind.
    classes : ndarray of shape (n_classes,)
        Classes of the classifier.

    Returns
    -------
    scorer : callable
        A copy that knows them.
    """
    known = getattr(scorer, "__dict__", {})
    if known.get("_response_method", "predict") == "predict" or (
        "labels" not in signature(known["_score_func"]).parameters
    ):
        return scorer
    scorer = copy(scorer)
    vars(scorer)["_kwargs"] = {"labels": classes, **known["_kwargs"]}
    return scorer


# ---------------------------------------------------------------- scorers


def _by_shot(estimator: Any, X: Any, y: Any, *, measure: Callable[..., float]) -> float:
    """Score by the class counts that the classifier was fitted on, if it tells; else those of y."""
    counts = getattr(estimator, "class_counts_", None)
    if counts is not None:
        counts = dict(zip(estimator.classes_.tolist(), np.asarray(counts).tolist(), strict=True))
        counts = {label: counts.get(label, 0) for label in {*counts, *np.unique(y).tolist()}}
    return measure(y, estimator.predict(X), y if counts is None else counts)


def _few(*args: Any) -> float:
    return shot_recall(*args).few


def _neg_gap(*args: Any) -> float:
    return -head_tail_gap(*args)


def _calibration(estimator: Any, X: Any, y: Any, *, class_wise: bool) -> float:
    proba, classes = estimator.predict_proba(X), estimator.classes_
    known = np.isin(y, classes)  # a class missing from the training fold has no column
    return -expected_calibration_error(
        np.asarray(y)[known], proba[known], labels=classes, class_wise=class_wise
    )


_SCORERS: dict[str, Any] = {
    "geometric_mean": make_scorer(geometric_mean_score),
    "few_shot_recall": partial(_by_shot, measure=_few),
    "neg_head_tail_gap": partial(_by_shot, measure=_neg_gap),
    "neg_calibration_error": partial(_calibration, class_wise=False),
    "neg_class_wise_calibration_error": partial(_calibration, class_wise=True),
}


def scorers(*names: str) -> dict[str, Any]:
    """Scorers by name, for ``scoring=`` of cross_validate and searches.

    Parameters
    ----------
    *names : str
        Names that scikit-learn knows, such as "balanced_accuracy", and "geometric_mean",
        "few_shot_recall", "neg_head_tail_gap", "neg_calibration_error",
        "neg_class_wise_calibration_error". None given: all of the latter.

    Returns
    -------
    scorers : dict from name to callable
        Greater is better.

    Raises
    ------
    ValueError
        If a name is unknown.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.model_selection import cross_validate
    >>> from sklearn_medimb.metrics import scorers
    >>> X, y = load_iris(return_X_y=True)
    >>> scoring = scorers("balanced_accuracy", "neg_calibration_error")
    >>> results = cross_validate(LogisticRegression(max_iter=500), X, y, scoring=scoring)
    >>> bool(results["test_neg_calibration_error"].mean() > -0.2)
    True
    """
    known = set(get_scorer_names()) | set(_SCORERS)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"Unknown scorers {unknown}: choose among {sorted(known)}.")
    return {
        name: _SCORERS[name] if name in _SCORERS else get_scorer(name) for name in names or _SCORERS
    }
