"""What the bench knows of methods: the rule that `recommend` goes by, and what a fit costs."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, get_type_hints

import numpy as np

from sklearn_medimb.base._classifier import TUNING_EPOCHS, usual_steps

REFERENCE = "logit adjustment"  # whose scores the others' are told against
MARGIN = 0.005  # what is nearer than this is level
MIN_SETS = 3  # sets of the bench without which a method has no evidence
CUDA = 10  # times as fast as a core: 14,600 images of 28 pixels a second (H100), beside 1,250
FOREST = "balanced forest"


class Row(NamedTuple):
    """A method on a training set of the bench; its score is a mean over seeds."""

    regime: str
    data: str
    cut: str
    method: str
    n_train: int
    n_classes: int
    imbalance_ratio: float
    side: int
    spatial_dims: int
    score: float  # balanced accuracy
    seconds: float  # of the fastest seed, with the default steps


@cache
def evidence() -> tuple[Row, ...]:
    """Table of the bench, as ``benchmarks/evidence.py`` writes it."""
    with Path(__file__).with_name("_evidence.csv").open(newline="") as file:
        kinds = get_type_hints(Row)
        return tuple(
            Row(**{name: kinds[name](value) for name, value in row.items()})
            for row in csv.DictReader(file)
        )


# ---------------------------------------------------------------- the rule


class Expected(NamedTuple):
    """What evidence says of a method."""

    score: float  # balanced accuracy
    spread: float  # deviation between sets


def expected(
    rows: Iterable[Row], n_train: int, n_classes: int, imbalance_ratio: float
) -> dict[str, Expected]:
    """Mean scores on training sets of one regime, the nearest weighing most.

    Nearness is ``exp(-d^2 / 2)``, d the distance of the logs of the three numbers; the cuts of a
    set share its weight. One set's weight goes to the mean over all sets, however far. What is
    averaged is the difference to `REFERENCE` on the same training set, since sets differ by more
    than methods do.
    """
    sets: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        sets.setdefault((row.data, row.cut), {})[row.method] = row
    tables = [of for of in sets.values() if REFERENCE in of]
    if not tables:
        return {}
    known = [of[REFERENCE] for of in tables]
    n_cuts = Counter(row.data for row in known)
    share = np.array([1 / n_cuts[row.data] for row in known])
    facts = np.log([(row.n_train, row.n_classes, row.imbalance_ratio) for row in known])
    own = np.log([n_train, n_classes, imbalance_ratio])
    near = share * np.exp(-((facts - own) ** 2).sum(axis=1) / 2)

    def mean(values: np.ndarray, there: np.ndarray) -> float:
        everywhere = np.average(values[there], weights=share[there])
        return float((near[there] @ values[there] + everywhere) / (near[there].sum() + 1))

    base, found = np.array([row.score for row in known]), {}
    all_of_them = np.ones(len(known), dtype=bool)
    centre = mean(base, all_of_them)
    spread = math.sqrt(mean((base - centre) ** 2, all_of_them))
    for method in dict.fromkeys(name for of in tables for name in of):
        there = np.array([method in of for of in tables])
        if len({row.data for row, known_ in zip(known, there, strict=True) if known_}) >= MIN_SETS:
            scores = np.array([of[method].score if method in of else 0.0 for of in tables])
            found[method] = Expected(centre + mean(scores - base, there), spread)
    return found


def choose(scores: Mapping[str, float], seconds: Mapping[str, float]) -> str:
    """The method with the highest score, or one that is level with it in half its time or less."""
    best = max(scores, key=lambda name: (scores[name], -seconds[name]))
    level = [
        name
        for name, score in scores.items()
        if score >= scores[best] - MARGIN and seconds[name] <= seconds[best] / 2
    ]
    return min(level, key=lambda name: seconds[name], default=best)


# ---------------------------------------------------------------- cost


def work(
    method: str,
    regime: str,
    n: int,
    n_classes: int,
    spatial: Sequence[int],
    max_epochs: int | None = None,
    batch_size: int = 64,
) -> float:
    """Seconds of a fit, on one core, up to a factor that the method has.

    Networks from scratch cost by steps, images of a step and pixels, which the first convolution
    thins out from 96 pixels on; a start by the encoding of four views, the head's steps, and,
    where it is tuned, epochs.
    """
    n_pixels = math.prod(spatial)
    if method == FOREST:
        return n * math.sqrt(n_pixels) + 8000  # even of few images there are 300 trees
    per_epoch = -(-n // batch_size)
    dims = len(spatial) if len(spatial) > 1 else 0
    usual = usual_steps(n if regime == "scratch" else 0, n_classes, dims)
    n_epochs = max_epochs or max(10, -(-usual // per_epoch))
    n_steps = per_epoch * n_epochs
    if regime == "scratch":
        if dims and min(spatial) >= 96:
            n_pixels //= 2**dims
        return 6e-7 * n_steps * min(n, batch_size) * (n_pixels + 300)
    seconds = 8e-7 * n * n_pixels + 0.01 * n_steps
    if regime == "pretrained":
        seconds += 1.7e-6 * (max_epochs or TUNING_EPOCHS) * n * n_pixels
    return seconds


def factor(rows: Iterable[Row], method: str) -> float:
    """What the fits of the bench took, over their work.

    The lower quartile, since other programs on its machine only made fits slower.
    """
    ratios = [
        row.seconds
        / work(method, row.regime, row.n_train, row.n_classes, (row.side,) * row.spatial_dims)
        for row in rows
        if row.method == method
    ]
    return float(np.quantile(ratios, 0.25))
