"""Rows of the table by what may be compared, and what follows from them."""

from __future__ import annotations

import csv
import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import differences
import numpy as np
from contestants import ABLATIONS, OF_MANY_CLASSES
from differences import FORMERLY, Effect, Rows
from scipy import stats

MEASURES = {
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    "macro_auroc": "macro-AUROC",
    "few_recall": "recall of rare classes",
    "calibration_error": "calibration error",
}
BASELINE = "logit adjustment"
PLAIN = "CE"
FEATURES = "frozen LR, views + depths"
AFTERNOON = "afternoon CNN"  # beside which the suite "defaults" has classifiers as they are
CHOSEN_ON = {"brain_tumor_mri", "ph2_dermoscopy", "wbc_two_sites", "dr_maculopathy", "busi"}
CONFIRMED = {"herlev_papsmear", "covid_cxr", "iq_othnccd_ct", "dementia_mri"}
# On inner rows of which the augmentation from scratch was chosen.
AUGMENTED = {
    "wbc_two_sites", "busi", "herlev_papsmear", "pneumoniamnist", "bccd_cells", "dementia_mri",
}  # fmt: skip
# What each paper's method adds to, all else being equal.
RELATIVES = {
    "CSSN": "oversampling",
    "SPMix": "oversampling",
    "SPMix sampler": "oversampling",
    "metric two-stage": "cRT",
    "LMD": "cRT",
    "AMIMV": "cRT",
}
PAPERS = (*RELATIVES, "AMIMV continued")
REGIMES = {
    "frozen": "On a frozen start",
    "pretrained": "Tuning a start",
    "scratch": "From scratch",
}
DEFAULTS = "From scratch, as they are, beside an afternoon's CNN"
TEXT = {*FORMERLY, "data", "method", "hardware", "versions", "commit", "fine_tune"}
LEVEL = 0.05  # of tests
Table = dict[str, dict[tuple[str, str], list[float]]]  # method -> (data, cut) -> one value a seed


def read(path: Path) -> Rows:
    with path.open() as file:
        rows = [FORMERLY | row for row in csv.DictReader(file)]
    for row in rows:
        for name, value in row.items():
            if name in TEXT:
                continue
            try:
                row[name] = float(value)
            except (TypeError, ValueError):
                row[name] = float("nan") if value == "" else value
    return rows


def gather(rows: Rows, measure: str) -> Table:
    table: Table = defaultdict(lambda: defaultdict(list))
    for row in rows:
        table[row["method"]][cell_of(row)].append(row.get(measure, float("nan")))
    return table


def runs(rows: Rows) -> dict[str, set[Any]]:
    """Training sets and seeds that each method was run on."""
    found = defaultdict(set)
    for row in rows:
        found[row["method"]].add((*cell_of(row), row["seed"]))
    return found


def shared(rows: Rows) -> Rows:
    """Rows of the training sets and seeds that every method was run on: the same draws for all.

    Methods that have less than half of the cells of the fullest are left out, and so are those
    without their idea that lack one which the others share.
    """
    cells = runs(rows)
    enough = max(map(len, cells.values()), default=0) / 2
    full = {method: of for method, of in cells.items() if len(of) >= enough}
    whole = [of for method, of in full.items() if method not in ABLATIONS]
    common = set.intersection(*(whole or full.values()))
    kept = {method for method, of in full.items() if of >= common}
    return [row for row in rows if row["method"] in kept and (*cell_of(row), row["seed"]) in common]


def of_both(rows: Rows, one: str, other: str) -> Rows:
    """Rows of two methods on the training sets and seeds that both were run on."""
    cells = runs(rows)
    common = cells[one] & cells[other]
    return [
        row
        for row in rows
        if row["method"] in (one, other) and (*cell_of(row), row["seed"]) in common
        if row["n_classes"] > 2 or other not in OF_MANY_CLASSES
    ]


@dataclasses.dataclass
class Chapter:
    """Rows that may be compared: one regime, suite, start and kind of hardware."""

    name: str  # of its figures and its rows in differences.csv
    title: str
    rows: Rows  # shared by the contestants, who may be ranked
    left_out: list[str]
    ideas: dict[tuple[str, str], Rows]  # of a method and of what is left of it without its idea
    effects: dict[tuple[str, str, str], Effect] = dataclasses.field(default_factory=dict)

    @property
    def regime(self) -> str:
        return self.rows[0]["regime"]

    @property
    def suite(self) -> str:
        return self.rows[0]["suite"]

    @property
    def key(self) -> tuple[str, str]:
        return self.regime, self.suite

    @property
    def is_ranked(self) -> bool:
        return self.suite not in ("curves", "ideas")

    @property
    def is_defaults(self) -> bool:
        return self.key == ("scratch", "defaults")

    @property
    def references(self) -> tuple[str, ...]:
        return (AFTERNOON,) if self.is_defaults else (BASELINE, FEATURES)

    @property
    def clock(self) -> tuple[str, str]:
        """Column of the time to fit, and its unit.

        Seconds of the processor where all rows have them: who ran beside it makes no difference.
        Beside a GPU they are not what a fit takes.
        """
        known = all(row.get("fit_cpu_seconds", np.nan) >= 0 for row in self.rows)
        if known and "," not in self.rows[0]["hardware"]:
            return "fit_cpu_seconds", "s of a core"
        return "fit_seconds", "s"

    @property
    def contestants(self) -> list[str]:
        return sorted({row["method"] for row in self.rows})

    def pairs(self) -> list[tuple[str, str]]:
        """Who is compared with the baselines."""
        has = set(self.contestants)
        return sorted((one, other) for other in has & {*self.references} for one in has - {other})

    def parts(self) -> dict[str, set[str]]:
        """All sets, and those that confirm: all, where defaults were chosen on none of them."""
        sets = {row["data"] for rows in (self.rows, *self.ideas.values()) for row in rows}
        if self.regime == "scratch" and self.suite in ("defaults", "ideas"):
            return {"all": sets, "confirmed": sets - AUGMENTED}
        return {"all": sets, "confirmed": sets & CONFIRMED if sets & CHOSEN_ON else sets}

    def rows_of(self, part: str, pair: tuple[str, str] | None = None) -> Rows:
        """Rows of a part of the sets, on which all, or two, are compared."""
        rows = self.ideas.get(pair, self.rows) if pair else self.rows
        return [row for row in rows if row["data"] in self.parts()[part]]

    def effect(self, one: str, other: str, part: str = "all") -> tuple[Effect | None, str]:
        """Difference of two, and whether its interval is by patients, by sets or unknown."""
        if (one, other, part) in self.effects:
            return self.effects[one, other, part], "patients"
        found = differences.by_sets(self.rows_of(part, (one, other)), one, other)
        return found, "sets" if found else ""

    def adjusted(self, pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], float]:
        """Holm's p of a family of pairs, as far as they have one."""
        found = {pair: self.effect(*pair)[0] for pair in pairs}
        return differences.holm({pair: of.p for pair, of in found.items() if of is not None})

    def is_shown(self, one: str, other: str, adjusted: dict[tuple[str, str], float]) -> bool:
        """As registered: adjusted p below 5 % on all sets, and the confirming ones say so alone."""
        alone = self.effect(one, other, "confirmed")[0]
        ahead = self.effect(one, other)[0]
        return bool(
            ahead and alone and ahead.mean > 0 and alone.low > 0 and adjusted[one, other] < LEVEL
        )

    def know_effects(self, answers: differences.Answers) -> None:
        """Differences by patients, as far as predictions are at hand."""
        if self.is_ranked:
            pairs = self.pairs()
            self.effects |= differences.by_patients(self.rows, answers, pairs, self.parts())
        for pair, rows in self.ideas.items():
            found = differences.by_patients(rows, answers, [pair], self.parts())
            self.effects |= {key: of for key, of in found.items() if key[:2] == pair}

    def digests(self) -> dict[tuple[str, str], str]:
        """Of the scores that means and differences are of, what tells them from others."""
        pairs = [(one, "") for one in self.contestants] + self.pairs()
        rows_of = dict.fromkeys(pairs, self.rows) | self.ideas
        return {
            pair: " ".join(differences.digest(rows, name) for name in pair if name)
            for pair, rows in rows_of.items()
        }


def chapters(rows: Rows, part: str = "test") -> list[Chapter]:
    """Rows of a part, by what may be ranked together; from scratch last."""
    found = defaultdict(list)
    for row in rows:
        if row["rows"] == part:
            found[tuple(row[name] for name in ("regime", "suite", "start", "hardware"))].append(row)
    made: list[Chapter] = []
    places = list(REGIMES)
    for key in sorted(found, key=lambda key: (places.index(key[0]), key[1:])):
        regime, suite, start, hardware = key
        alike = [other for other in found if other[0] == regime]
        own = shared(found[key])
        if not own:
            continue
        name, title = "-".join(word for word in (regime, suite, start) if word), REGIMES[regime]
        if (regime, suite) == ("scratch", "defaults"):
            title = DEFAULTS
        elif suite not in ("core", "curves", "ideas"):
            title += f" ({suite})"
        if len({other[2] for other in alike}) > 1:
            title += f", {start}"
        if len({other[3] for other in alike}) > 1:
            title += f", {hardware}"
            name += "-" + "".join(c if c.isalnum() else "-" for c in hardware)
        if part == "inner":
            title, name = title + ", inner rows", name + "-inner"
        here, there = ({row["method"] for row in of} for of in (own, found[key]))
        ideas = {
            (whole, left): of_both(found[key], whole, left)
            for left, (whole, _) in ABLATIONS.items()
            if {whole, left} <= there
        }
        ideas = {pair: of for pair, of in ideas.items() if of}
        made.append(Chapter(name, title, own, sorted(there - here), ideas))
    return made


def means(table: Table, cells: list[tuple[str, str]]) -> dict[str, np.ndarray]:
    return {name: np.array([np.mean(of[cell]) for cell in cells]) for name, of in table.items()}


def of_collections(rows: Rows, measure: str = "balanced_accuracy") -> dict[str, np.ndarray]:
    """Mean of each method on each collection, whose cuts share images and so count once."""
    methods = {row["method"] for row in rows}
    found = {name: differences.of_sets(rows, name, measure) for name in methods}
    sets = sorted({row["data"] for row in rows})
    return {name: np.array([of[data] for data in sets]) for name, of in sorted(found.items())}


def ranks(scores: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean rank of each method over data sets; 1 is best."""
    matrix = np.column_stack(list(scores.values()))
    ranked = stats.rankdata(-matrix, axis=1)
    return dict(zip(scores, ranked.mean(axis=0).tolist(), strict=True))


def critical_difference(n_methods: int, n_sets: int, level: float = 0.05) -> float:
    """Nemenyi's distance of mean ranks (Demsar, JMLR 2006)."""
    q = stats.studentized_range.ppf(1 - level, n_methods, np.inf) / np.sqrt(2)
    return float(q * np.sqrt(n_methods * (n_methods + 1) / (6 * n_sets)))


def cell_of(row: dict[str, Any]) -> tuple[str, str]:
    """Set, and how its training images were drawn."""
    if row["size"] != "all":
        return row["data"], f"{row['size']} images"
    return row["data"], row["cut"] if isinstance(row["cut"], str) else f"1 : {row['cut']:.0f}"
