"""The advice, in words."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from numbers import Real
from typing import Any

from sklearn_medimb.comparison._candidates import AMIMV, Way
from sklearn_medimb.comparison._reading import Data
from sklearn_medimb.comparison._result import Comparison
from sklearn_medimb.comparison._rule import MARGIN
from sklearn_medimb.comparison._trial import N_FOLDS

HOW = {
    "scratch": "from scratch",
    "frozen": "a head on the frozen start",
    "pretrained": "fine-tuned from the start",
}
UNITS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), 3600),
}
PATIENTS_OF_THE_SEARCH = (
    "Its inner search, of C, does not keep patients whole: with "
    "set_params(gridsearchcv__cv=StratifiedGroupKFold(3)) and "
    "fit(X, y, gridsearchcv__groups=patients) it does."
)


def as_seconds(budget: Any) -> float:
    """Seconds of a budget, in words or as a number."""
    wrong = (
        f'budget={budget!r} must be a positive number of seconds, or text such as "30 s", '
        '"2 minutes" or "1 hour".'
    )
    if isinstance(budget, str):
        found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]+)\s*", budget.lower())
        if found is None or found[2] not in UNITS:
            raise ValueError(wrong)
        seconds = float(found[1]) * UNITS[found[2]]
    elif isinstance(budget, Real) and not isinstance(budget, bool):
        seconds = float(budget)
    else:
        raise TypeError(wrong)
    if not 0 < seconds < math.inf:
        raise ValueError(wrong)
    return seconds


def in_words(seconds: float) -> str:
    """As 0.4 s, 12 s, 3 min, 1.5 h, 30 h."""
    if seconds < 90:
        return f"{seconds:.1g} s" if seconds < 1 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.2g} h" if hours < 10 else f"{hours:.0f} h"


class Advice:
    """What :func:`recommend` advises; prints as a page.

    Attributes
    ----------
    estimator : classifier
        Not fitted.
    method, regime : str
        Its name in the table; "scratch", "frozen" or "pretrained".
    seconds : float
        What its fit will take, roughly: a factor of 2 is no surprise, and so is none of a machine
        unlike that of the bench.
    score : float
        Balanced accuracy that evidence lets one expect, or that of the trial.
    spread : float
        Deviation of this between sets of the bench.
    reason : str
        Why, in sentences.
    notes : list of str
        What else to know.
    table : list of dict
        A row for each candidate, the best first: ``method``, ``regime``, ``seconds``, ``score``
        (of the evidence), ``fits`` the budget, ``inner`` (score of the trial, None without),
        ``note`` (why it was left out).
    comparison : Comparison or None
        The trial.
    """

    estimator: Any
    method: str
    regime: str
    seconds: float
    score: float
    spread: float
    reason: str
    notes: list[str]
    table: list[dict[str, Any]]
    comparison: Comparison | None

    def __init__(self, **found: Any) -> None:
        vars(self).update(found)

    def to_frame(self) -> Any:
        """The table as a pandas.DataFrame, a row for each candidate.

        Returns
        -------
        frame : pandas.DataFrame
            With the columns of `table`.
        """
        import pandas as pd

        return pd.DataFrame(self.table)

    def __str__(self) -> str:
        lines = [["method", "how", "seconds", "evidence", "trial", "note"]]
        for row in self.table:
            if not row["note"] and row["method"] == self.method and row["regime"] == self.regime:
                row = {**row, "note": "<- this one"}
            inner = "" if row["inner"] is None else f"{row['inner']:.3f}"
            seconds = f"{row['seconds']:.{0 if row['seconds'] >= 1 else 1}f}"
            numbers = [seconds, f"{row['score']:.3f}", inner, row["note"]]
            lines.append([row["method"], HOW[row["regime"]], *numbers])
        kept = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:])]
        lines = [[line[i] for i in kept] for line in lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in lines]
        return "\n".join([self.reason, *self.notes, "", *(row.rstrip() for row in rows)])

    __repr__ = __str__


def reason(
    method: str, way: Way, scores: Mapping[str, float], data: Data, budget: float, start: Any
) -> str:
    """Why, in sentences; `scores` are those that were chosen by."""
    row, how = way.within[method], HOW[way.regime]
    if way.regime != "scratch":
        how += f", {start if isinstance(start, str) else type(start).__name__}"
    others = sorted((name for name in scores if name != method), key=lambda name: -scores[name])
    told = ", ".join(f"{name} ({scores[name] - scores[method]:+.3f})" for name in others[:3])
    text = [
        f"Take {method}, {how}.",
        f"For {data.told(way.spatial)}:",
        _of_the_bench(method, way) if row["inner"] is None else _of_the_trial(row, scores, data),
        f"A fit takes about {in_words(row['seconds'])}, of {in_words(budget)}.",
        f"Next: {told}." if told else "Nothing else of the kind is within the budget.",
        _with_more_time(row, way),
    ]
    return " ".join(filter(None, text))


def _of_the_bench(method: str, way: Way) -> str:
    score, spread = way.evidence[method]
    return (
        "on the sets of the bench that are nearest, it has a balanced accuracy of "
        f"{score:.2f}, from {max(score - spread, 0):.2f} to {min(score + spread, 1):.2f} by set."
    )


def _of_the_trial(row: Mapping[str, Any], scores: Mapping[str, float], data: Data) -> str:
    whole = "" if data.patients is None else " of whole patients"
    text = (
        f"tried out on {N_FOLDS} folds{whole}, it has a balanced accuracy of "
        f"{row['inner']:.2f} (evidence: {row['score']:.2f})"
    )
    text += f", flattered as the best of {len(scores)} on them." if len(scores) > 1 else "."
    n_classes = len(data.classes)
    guess = 1 / n_classes
    error = math.sqrt((guess * (1 - guess) / data.counts).sum()) / n_classes
    if row["inner"] < guess + 2 * error:
        text += " That is hardly better than guessing: no method of the trial is of use."
    return text


def _with_more_time(row: Mapping[str, Any], way: Way) -> str:
    least = row["score"] + MARGIN
    for better in way.rows:  # the best first
        if not better["fits"] and better["score"] > least:
            return (
                f"With more time: {better['method']} ({better['score'] - row['score']:+.3f} by "
                f"evidence), about {in_words(better['seconds'])}."
            )
    return ""


def about_unlabelled(method: str, n: int) -> str:
    """What becomes of the images that have no label."""
    if method == AMIMV:
        return f"The {n} images without a label (-1) serve its pre-training: fit it to all."
    return (
        f"The {n} images without a label (-1) are left out, fit it to y != -1: in the bench "
        "pre-training on images of one's own brought nothing that could be told from noise."
    )
