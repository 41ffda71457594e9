"""Paired differences of contestants, with intervals: `registration.md` says how they are read.

By patients where the predictions of a run are at hand: patients of each set are drawn again, the
same ones for all contestants, and balanced accuracies of the pooled folds averaged over sets.
(`metrics.paired_difference` gives the interval of one set; its mean over sets needs draws that all
contestants share.) By sets in any case: mean differences of the sets, and Student's t.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

N_DRAWS = 2000
# What tells rows of the table apart, and what those were made with that lack a column.
KEY = ("regime", "suite", "start", "rows", "data", "cut", "size", "seed", "method", "hardware")
FORMERLY = {"regime": "scratch", "suite": "core", "start": "", "rows": "test", "size": "all"}
Rows = list[dict[str, Any]]
Answers = dict[tuple[str, ...], dict[str, list[Any]]]  # what was predicted, by job
IMAGES = ("rows", "patients", "true")  # what is said there of the images


class Effect(NamedTuple):
    """A mean, or a mean difference, its interval of 95 %, and p of its being 0."""

    mean: float
    low: float
    high: float
    p: float


def holm(p: dict[Any, float]) -> dict[Any, float]:
    """Adjusted p of a family of hypotheses (Holm, 1979)."""
    adjusted, worst = {}, 0.0
    for k, name in enumerate(sorted(p, key=p.__getitem__)):
        worst = max(worst, min(1.0, (len(p) - k) * p[name]))
        adjusted[name] = worst
    return adjusted


# ---------------------------------------------------------------- by sets


def of_sets(rows: Rows, method: str, measure: str = "balanced_accuracy") -> dict[str, float]:
    """Mean over cuts and seeds of each set."""
    values = defaultdict(list)
    for row in rows:
        if row["method"] == method:
            values[row["data"]].append(row[measure])
    return {data: float(np.mean(of)) for data, of in values.items()}


def of_gains(gain: np.ndarray) -> Effect | None:
    """Mean of what sets gain, by Student's t; of one set nothing is known about others."""
    if len(gain) < 2:
        return None
    mean, error = gain.mean(), gain.std(ddof=1) / len(gain) ** 0.5
    if error == 0:
        return Effect(mean, mean, mean, float(mean == 0))
    t = stats.t(len(gain) - 1)
    return Effect(mean, *(mean + error * t.ppf([0.025, 0.975])), 2 * t.sf(abs(mean / error)))


def by_sets(rows: Rows, one: str, other: str) -> Effect | None:
    """Difference of two contestants on the same cells, about further sets."""
    a, b = of_sets(rows, one), of_sets(rows, other)
    return of_gains(np.array([a[data] - b[data] for data in a]))


# ---------------------------------------------------------------- by patients


def tested(folder: Path) -> Answers:
    """What was predicted for each image, by job, as far as files in the folder tell."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if "tested" in result:
            found[_key({**FORMERLY, **result})] = result["tested"]
    return found


def in_short(tested: dict[str, list[Any]]) -> dict[str, str]:
    """What was predicted, as text, and what tells the images from others."""
    codes = [str(int(code)) for code in tested["predicted"]]
    text = ("" if max(map(len, codes)) == 1 else " ").join(codes)
    return {"tested": _short([tested[what] for what in IMAGES]), "predicted": text}


def in_full(short: dict[str, str], images: dict[str, list[Any]]) -> dict[str, list[Any]] | None:
    """What was predicted for each of these images; None where it was for others."""
    if _short([images[what] for what in IMAGES]) != short["tested"]:
        return None
    text = short["predicted"]
    codes = list(text) if len(text) == len(images["true"]) else text.split()
    return {**images, "predicted": [int(code) for code in codes]}


def drawn(rows: Rows, answers: Answers) -> dict[str, dict[str, np.ndarray]]:
    """Balanced accuracy of each contestant on each set: as it is, then of patients drawn again.

    Of contestants whose predictions are all there.
    """
    cells = defaultdict(list)
    for row in rows:
        cells[row["method"], row["data"]].append(row)
    lacking = {row["method"] for row in rows if _key(row) not in answers}
    scores: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for data in sorted({row["data"] for row in rows}):
        first: dict[tuple[Any, Any], Any] = {}
        weights = patients = None
        for method in sorted({row["method"] for row in rows} - lacking):
            own = {(row["cut"], row["seed"]): answers[_key(row)] for row in cells[method, data]}
            first = first or own
            if any(
                own[cell][what] != first[cell][what] for cell in own for what in ("rows", "true")
            ):
                raise ValueError(f"{method} was tested on other images of {data} than the others.")
            if weights is None:
                patients = np.unique(np.concatenate([of["patients"] for of in own.values()]))
                n, rng = len(patients), np.random.default_rng(0)
                weights = np.vstack([np.ones(n), rng.multinomial(n, [1 / n] * n, size=N_DRAWS)])
            of_cuts = []
            for cut in sorted({cut for cut, _ in own}, key=str):
                part = [of for (c, _), of in own.items() if c == cut]
                true, predicted, who = (
                    np.concatenate([of[what] for of in part])
                    for what in ("true", "predicted", "patients")
                )
                classes, codes = np.unique(true, return_inverse=True)
                size = np.zeros((2, len(patients), len(classes)))
                np.add.at(size[0], (np.searchsorted(patients, who), codes), 1)
                np.add.at(size[1], (np.searchsorted(patients, who), codes), predicted == true)
                seen, found = weights @ size
                recall = np.divide(found, seen, out=np.full_like(seen, np.nan), where=seen > 0)
                of_cuts.append(np.nanmean(recall, axis=1))
            scores[method][data] = np.mean(of_cuts, axis=0)
    return dict(scores)


def effect(draws: np.ndarray) -> Effect:
    """Of what was observed, first, and drawn again."""
    mean, error = draws[0], draws[1:].std(ddof=1)
    p = 2 * stats.norm.sf(abs(mean) / error) if error > 0 else float(mean == 0)
    return Effect(float(mean), *np.quantile(draws[1:], [0.025, 0.975]).tolist(), float(p))


def by_patients(
    rows: Rows, answers: Answers, pairs: Iterable[tuple[str, str]], parts: dict[str, set[str]]
) -> dict[tuple[str, str, str], Effect]:
    """Means of contestants, and differences of pairs, over parts of the sets."""
    scores = drawn(rows, answers)
    effects = {}
    for part, sets in parts.items():
        mean = {
            method: np.mean([of[data] for data in of if data in sets], axis=0)
            for method, of in scores.items()
            if sets & of.keys()
        }
        effects |= {(method, "", part): effect(of) for method, of in mean.items()}
        for one, other in pairs:
            if {one, other} <= mean.keys():
                effects[one, other, part] = effect(mean[one] - mean[other])
    return effects


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(
        str(int(row[name])) if isinstance(row[name], float) else str(row[name]) for name in KEY
    )


def _short(what: list[Any]) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:12]


# ---------------------------------------------------------------- kept beside the table

VALUES = ("mean", "low", "high", "p")
COLUMNS = ("chapter", "method", "baseline", "sets", "table", *VALUES)


Digests = dict[tuple[str, str, str], str]  # by chapter and the one or two compared


def digest(rows: Rows, method: str) -> str:
    """Tell a contestant's scores from those of another table."""
    scores = sorted(
        (row["data"], str(row["cut"]), row["seed"], row["balanced_accuracy"])
        for row in rows
        if row["method"] == method
    )
    return _short(scores)


def write(path: Path, effects: dict[tuple[str, ...], Effect], digests: Digests) -> None:
    """Keep them: a page can then be made without the predictions."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for key, of in effects.items():
            writer.writerow([*key, digests[key[:3]], *of])


def read(path: Path, digests: Digests) -> dict[tuple[str, ...], Effect]:
    """Read what was kept, as far as it is of the table at hand."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for row in rows:
        key = row["chapter"], row["method"], row["baseline"], row["sets"]
        if row["table"] == digests.get(key[:3]):
            found[key] = Effect(*(float(row[name]) for name in VALUES))
    return found
