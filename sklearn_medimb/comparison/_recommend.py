"""What to take for these images, by evidence of the bench, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.utils import check_random_state

from sklearn_medimb._machine.runtime import resolve_device
from sklearn_medimb.comparison._advice import (
    PATIENTS_OF_THE_SEARCH,
    Advice,
    about_unlabelled,
    as_seconds,
    in_words,
    reason,
)
from sklearn_medimb.comparison._candidates import FROZEN_LR, FROZEN_SVM, Way, ways_of
from sklearn_medimb.comparison._methods import common_methods
from sklearn_medimb.comparison._reading import read
from sklearn_medimb.comparison._rule import choose
from sklearn_medimb.comparison._start import start_of
from sklearn_medimb.comparison._trial import check_folds, short_list, trial_seconds, tried_out


def recommend(
    X: Any,
    y: Any,
    groups: Any = None,
    *,
    budget: str | float = "2 minutes",
    start: Any = None,
    device: Any = "auto",
    try_out: bool = False,
    random_state: Any = None,
    **params: Any,
) -> Advice:
    """Recommend a classifier for these images, and say why and at what cost.

    The bench of this package has a table of methods on training sets. Of each method it takes the
    mean score over these sets, those weighing most that are nearest in number of images, number of
    classes and imbalance. The time of a fit is that of the bench, scaled by images, pixels and
    steps. Among the methods whose fit takes no longer than `budget` the one with the highest score
    is advised, or one within .005 of it that takes half its time or less. With a start its network
    is tuned, if it gains from that; where no such fit is within the budget the start is frozen, and
    after that left out.

    Large images come to 128 pixels along their longest side, volumes to 32; with a start all images
    come to 128 x 128. Of images that are read on demand up to 64 are looked at for their size.

    Parameters
    ----------
    X : array-like or lazy sequence of n images
        Images, in any form that the classifiers take, or feature vectors.
    y : array-like of shape (n,)
        Classes. Beside two classes or more, the number -1 says that an image has no label.
    groups : array-like of shape (n,), default=None
        Patient of each image: the trial keeps patients whole.
    budget : str or float, default="2 minutes"
        Of one fit, with `try_out` of the trial and the fit: "30 s", "1 hour", or seconds.
    start : str, Backbone, torch.nn.Module, fitted encoder, False or None, default=None
        What networks begin with, as `backbone` of the classifiers. None is "efficientnet_lite0"
        for images in 2-D if its weights are installed; False, or "scratch", begins at random.
    device : str or torch.device, default="auto"
        Where it will be trained.
    try_out : bool, default=False
        Whether the best by evidence are compared on three folds of these images first, as far as
        the budget goes; then the better one there is advised. Where no two trials with the start
        are within the budget, those of the next cheaper way are made.
    random_state : int, RandomState instance or None, default=None
        Of the estimator, and of the trial.
    **params
        What all networks share, such as ``spatial_dims=3``; not `pretrain` and `sampler`, in which
        methods differ. With ``memory=folder`` methods on a frozen start, classifiers of its
        features too, share what it makes of the training images of a fold; CSSN and SPMix, which
        need something else of it, have it encode them for themselves.

    Returns
    -------
    advice : Advice
        Prints as a page; ``advice.estimator`` is not fitted.

    Raises
    ------
    ValueError
        If the input is wrong or ambiguous, no method is within the budget, or a class has too few
        images, or patients, for the trial.
    TypeError
        If `budget`, `start` or `try_out` is none of these things, or networks do not share one of
        `params`.
    ImportError
        If the weights of a named start are not installed.

    Notes
    -----
    Sets differ by more than methods do, and first places by little more than chance: what the rule
    loses against the best, on sets that it has not seen, is in :doc:`/guide/choosing`.
    Scores are of at most 600 training images, from scratch of 28 pixels. The rows from scratch were
    made with earlier defaults, every image warped and half of the steps: those of today differ.
    The score of a trial is that of its winner, and so flattered.

    Examples
    --------
    >>> from sklearn_medimb.comparison import recommend
    >>> from sklearn_medimb.datasets import make_lesions
    >>> data = make_lesions([60, 9], image_size=16, random_state=0)
    >>> advice = recommend(data.images, data.target, budget="1 minute", start=False)
    >>> clf = advice.estimator
    >>> advice.seconds < 60
    True
    """
    seconds = as_seconds(budget)
    _check_parameters(params, try_out)
    check_random_state(random_state)
    data = read(X, y, groups, params)
    where = resolve_device(device)
    begins, note = start_of(start, data.dims)
    notes = [note] if note else []
    if data.dims == 0:
        notes.append("The bench has images only: for feature vectors its order is a guess.")
    shared = {"random_state": random_state, **({} if device == "auto" else {"device": device})}
    ways = ways_of(begins, data, where, seconds, shared, params)
    table = [row for way in ways for row in way.rows]
    _refuse_too_little(table, budget)
    if try_out:
        check_folds(data)
    way, names = _first_within(ways, seconds, budget, try_out)
    notes += _about_ways(ways, way, seconds, try_out)

    comparison = tried_out(way, names, X, data, random_state) if try_out else None
    by = "score" if comparison is None else "inner"
    scores = {name: row[by] for name, row in way.within.items() if row[by] is not None}
    method = choose(scores, {name: row["seconds"] for name, row in way.within.items()})
    if data.n_without:
        notes.append(about_unlabelled(method, data.n_without))
    if data.patients is not None and method in (FROZEN_LR, FROZEN_SVM):
        notes.append(PATIENTS_OF_THE_SEARCH)
    return Advice(
        estimator=way.estimators[method],
        method=method,
        regime=way.regime,
        seconds=way.within[method]["seconds"],
        score=scores[method],
        spread=way.evidence[method].spread,
        reason=reason(method, way, scores, data, seconds, begins),
        notes=notes,
        table=table,
        comparison=comparison,
    )


def _check_parameters(params: Mapping[str, Any], try_out: Any) -> None:
    """Refuse what no method takes, or not every one of them."""
    if taken := sorted({"backbone", "fine_tune"} & set(params)):
        raise ValueError(f"{taken[0]}: start= says with which network to begin, and how.")
    of_each = [set(one.get_params(deep=False)) for one in common_methods().values()]
    shared_by_all = set.intersection(*of_each) - {"pretrain", "sampler"}  # by which some differ
    if odd := sorted(set(params) - shared_by_all):
        raise TypeError(
            f"{odd[0]}= is nothing that all methods share: set it on the advised estimator, if it "
            "has it."
        )
    if not isinstance(try_out, (bool, np.bool_)):
        raise TypeError(f"try_out={try_out!r} must be True or False.")


def _refuse_too_little(table: Sequence[Mapping[str, Any]], budget: Any) -> None:
    """Refuse a budget that no fit is within."""
    if not any(row["fits"] for row in table):
        cheapest = min(table, key=lambda row: row["seconds"])
        raise ValueError(
            f"budget={budget!r}: no fit is that fast; {cheapest['method']} needs about "
            f"{in_words(cheapest['seconds'])}."
        )


def _first_within(
    ways: Sequence[Way], seconds: float, budget: Any, try_out: bool
) -> tuple[Way, list[str]]:
    """First way of which a fit, or a trial, is within the budget, and the methods of it."""
    for way in ways:
        if names := short_list(way.within, seconds) if try_out else [*way.within]:
            return way, names
    pairs = [sorted(row["seconds"] for row in way.rows)[:2] for way in ways if len(way.rows) > 1]
    raise ValueError(
        f"budget={budget!r} is too little to try two methods out: about "
        f"{in_words(min(map(trial_seconds, pairs)))} and more; raise it, or try_out=False."
    )


def _about_ways(ways: Sequence[Way], taken: Way, seconds: float, try_out: bool) -> list[str]:
    """What to know where there are several."""
    if len(ways) == 1:
        return []
    notes = ["Each way rests on sets of its own: compare evidence within a way only."]
    if taken is not ways[0]:
        first = "tuning" if ways[0].regime == "pretrained" else "encoding by the start"
        first = f"trying out {first}" if try_out else first
        notes.append(f"{first.capitalize()} takes longer than {in_words(seconds)}.")
    return notes
