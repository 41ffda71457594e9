"""The measures as scorers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
from imblearn.metrics import geometric_mean_score
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import get_scorer, get_scorer_names, make_scorer
from sklearn.model_selection import FixedThresholdClassifier
from sklearn.pipeline import Pipeline

from sklearn_medimb.metrics._calibration import expected_calibration_error
from sklearn_medimb.metrics._labels import labels_of, refuse_strangers
from sklearn_medimb.metrics._recalls import Counts, head_tail_gap, shot_recall
from sklearn_medimb.metrics._sides import check_prevalence, side_rates


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


# ---------------------------------------------------------------- counts of training


class StandIn:
    """What answers for a fitted classifier, `estimator`."""

    estimator: Any


def training_counts(estimator: Any) -> dict[Any, int]:
    """Images of each class that a classifier, or the one within it, was fitted on.

    Parameters
    ----------
    estimator : classifier
        Fitted. A pipeline is asked for its last step, a search for its best estimator, other
        meta-estimators for the one they fitted. Of a calibrated classifier whose members left out a
        fold each it is the sum over them, in the order of the training images.

    Returns
    -------
    counts : dict from label to int
        Of every class in ``classes_``.

    Raises
    ------
    ValueError
        If it does not tell, or what it tells are not the training images.
    """
    if isinstance(estimator, (StandIn, FrozenEstimator)):
        return training_counts(estimator.estimator)
    if (counts := getattr(estimator, "class_counts_", None)) is not None:
        return dict(zip(estimator.classes_.tolist(), np.asarray(counts).tolist(), strict=True))
    if isinstance(estimator, Pipeline):
        if any(hasattr(step, "fit_resample") for _, step in estimator.steps):
            raise _untold(estimator, ", for it resamples them")
        return training_counts(estimator.steps[-1][1])
    if hasattr(estimator, "best_estimator_"):
        return training_counts(estimator.best_estimator_)
    if hasattr(estimator, "calibrated_classifiers_"):
        every = _of_members(estimator, (one.estimator for one in estimator.calibrated_classifiers_))
        labels = estimator.classes_.tolist()
        return {label: sum(counts.get(label, 0) for counts in every) for label in labels}
    if hasattr(estimator, "estimators_"):
        members = estimator.estimators_
        every = _of_members(
            estimator, members.ravel() if isinstance(members, np.ndarray) else members
        )
        if set(every[0]) != set(estimator.classes_.tolist()) or any(
            counts != every[0] for counts in every
        ):
            raise _untold(estimator, ", for its members were trained on other labels or images")
        return every[0]
    if hasattr(estimator, "estimator_"):
        if hasattr(estimator, "labeled_iter_"):
            raise _untold(estimator, ", for it made labels itself")
        return training_counts(estimator.estimator_)
    if isinstance(estimator, FixedThresholdClassifier):  # of one that was fitted before
        return training_counts(estimator.estimator)
    raise _untold(estimator, "")


def _of_members(estimator: Any, members: Iterable[Any]) -> list[dict[Any, int]]:
    """Counts of each member, by the labels of the whole: members may have been given codes."""
    labels = estimator.classes_.tolist()
    every = []
    for member in members:
        counts = training_counts(member)
        if list(counts) == list(range(len(labels))):
            counts = dict(zip(labels, counts.values(), strict=True))
        every.append(counts)
    return every


def _untold(estimator: Any, why: str) -> ValueError:
    return ValueError(
        f"{type(estimator).__name__} does not tell how many images of each class it was trained "
        f"on{why}: pass them, scorers(..., train_counts=y_train)."
    )


# ---------------------------------------------------------------- scorers


def _by_shot(
    estimator: Any,
    X: Any,
    y: Any,
    *,
    measure: Callable[..., float],
    train_counts: Counts | None = None,
) -> float:
    """Score by the class counts of training, never by those of y."""
    y = labels_of(y, "y")
    refuse_strangers(y, estimator.classes_)
    if train_counts is None:
        counts = training_counts(estimator)
        train_counts = {label: counts.get(label, 0) for label in {*counts, *y.tolist()}}
    return measure(y, estimator.predict(X), train_counts)


def _few(*args: Any) -> float:
    return shot_recall(*args).few


def _neg_gap(*args: Any) -> float:
    return -head_tail_gap(*args)


def _calibration(estimator: Any, X: Any, y: Any, *, class_wise: bool) -> float:
    y, proba = labels_of(y, "y"), np.asarray(estimator.predict_proba(X))
    refuse_strangers(y, estimator.classes_)
    labels = list(dict.fromkeys([*estimator.classes_.tolist(), *y.tolist()]))
    # A class that training lacked was given no probability: confident errors.
    proba = np.pad(proba, [(0, 0), (0, len(labels) - proba.shape[1])])
    return -expected_calibration_error(
        y, proba, labels=np.array(labels, dtype=object), class_wise=class_wise
    )


def _of_sides(
    estimator: Any,
    X: Any,
    y: Any,
    *,
    measure: str,
    positive: Any = None,
    prevalence: float | None = None,
) -> float:
    """Score of one side against the other; the classifier knows labels that y may lack."""
    y = labels_of(y, "y")
    refuse_strangers(y, estimator.classes_)
    return side_rates(y, estimator.predict(X), positive, prevalence, estimator.classes_)[measure]


_SCORERS: dict[str, Any] = {
    "geometric_mean": make_scorer(geometric_mean_score),
    "few_shot_recall": partial(_by_shot, measure=_few),
    "neg_head_tail_gap": partial(_by_shot, measure=_neg_gap),
    "neg_calibration_error": partial(_calibration, class_wise=False),
    "neg_class_wise_calibration_error": partial(_calibration, class_wise=True),
}
_SIDES: dict[str, Any] = {
    name: partial(_of_sides, measure=name) for name in ("sensitivity", "specificity", "ppv", "npv")
}


def scorers(
    *names: str,
    train_counts: Counts | None = None,
    positive: Any = None,
    prevalence: float | None = None,
) -> dict[str, Any]:
    """Scorers by name, for ``scoring=`` of cross_validate and searches.

    Parameters
    ----------
    *names : str
        Names that scikit-learn knows, such as "balanced_accuracy", and "geometric_mean",
        "few_shot_recall", "neg_head_tail_gap", "neg_calibration_error",
        "neg_class_wise_calibration_error". None given: all of the latter. Of a disease against all
        else: "sensitivity", "specificity", and the predictive values "ppv" and "npv".
    train_counts : dict or pandas.Series from label to int, or array-like of labels, default=None
        For "few_shot_recall" and "neg_head_tail_gap", as in :func:`shot_recall`. None takes
        ``class_counts_`` of the classifier, also of one within a pipeline, a search or another
        meta-estimator; those of scikit-learn have none.
    positive : label or collection of labels, default=None
        The disease. None takes the greater one of two numbers, and refuses texts.
    prevalence : float, default=None
        Share of the ill that "ppv" and "npv" are to hold for; None is that of the samples scored.

    Returns
    -------
    scorers : dict from name to callable
        Greater is better. Classes that training lacked count: as rare ones, and as errors of what
        was predicted for them. A sensitivity without an ill sample, or another share of nobody, is
        NaN.

    Raises
    ------
    ValueError
        If a name is unknown, or `prevalence` no share.

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
    known = set(get_scorer_names()) | set(_SCORERS) | set(_SIDES)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"Unknown scorers {unknown}: choose among {sorted(known)}.")
    if prevalence is not None:
        check_prevalence(prevalence)
    of_shots = {} if train_counts is None else {"train_counts": train_counts}
    of_sides = {"positive": positive, "prevalence": prevalence}
    made = {}
    for name in names or _SCORERS:
        scorer = _SCORERS.get(name) or _SIDES.get(name) or get_scorer(name)
        own = of_sides if name in _SIDES else of_shots
        is_ours = name in _SIDES or getattr(scorer, "func", None) is _by_shot
        made[name] = partial(scorer, **own) if is_ours and own else scorer
    return made
