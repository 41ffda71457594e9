"""A trial of the first methods by evidence, on folds of these images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.utils import _safe_indexing

from sklearn_medimb._data.files import wrap_dataset
from sklearn_medimb.comparison._candidates import Way
from sklearn_medimb.comparison._compare import compare_methods
from sklearn_medimb.comparison._reading import Data
from sklearn_medimb.comparison._result import Comparison

N_FOLDS = 3
SHORT_LIST = 4  # methods at most


def check_folds(data: Data) -> None:
    """Refuse a trial where a class cannot be in all folds."""
    who = np.arange(len(data.rows)) if data.patients is None else data.patients
    for label in data.classes.tolist():
        n = len(np.unique(who[data.labels == label]))
        if n < N_FOLDS:
            what = "image" if data.patients is None else "patient"
            raise ValueError(
                f"try_out=True: class {label!r} of y has {n} {what}{'s' if n > 1 else ''}, and "
                f"{N_FOLDS} folds need as many: leave the class out, or try_out=False."
            )


def trial_seconds(fits: Sequence[float]) -> float:
    """What a trial of methods takes, and a fit: each of N_FOLDS is to all rows but one fold."""
    return (N_FOLDS - 1) * sum(fits) + max(fits)


def short_list(listed: Mapping[str, Mapping[str, Any]], seconds: float) -> list[str]:
    """The first by evidence whose trial is within the budget: two or more, or none."""
    names: list[str] = []
    for name in sorted(listed, key=lambda name: -listed[name]["score"]):
        others = sorted(row["seconds"] for other, row in listed.items() if other != name)
        # The first leaves room for a second.
        beside = [listed[other]["seconds"] for other in names] or others[:1]
        fits = beside and trial_seconds([*beside, listed[name]["seconds"]]) <= seconds
        if fits and len(names) < SHORT_LIST:
            names.append(name)
    return names


def tried_out(way: Way, names: Sequence[str], X: Any, data: Data, seed: Any) -> Comparison:
    """Compare methods on the images with a label; scores and failures go to the table's rows."""
    images = _safe_indexing(wrap_dataset(X), data.rows) if data.n_without else X
    found = compare_methods(
        {name: way.estimators[name] for name in names}, images, data.labels,
        groups=data.patients, cv=N_FOLDS, baseline=names[0], random_state=seed,
    )  # fmt: skip
    for name, why in found.failures.items():
        way.within[name]["note"] = f"failed {why}"
    for name in found.names:
        way.within[name]["inner"] = found.scores["balanced accuracy"][name].score
    return found
