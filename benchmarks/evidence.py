"""What `recommend` knows: a small table from that of compare.py, and what its rule would have lost.

    python benchmarks/evidence.py [TABLE ...]            writes the table of the package
    python benchmarks/evidence.py [TABLE ...] --regret   prints regrets, and writes nothing

A row of the package's table is a method that it can make on a training set (data, cut), mean over
seeds. It counts where it has all the seeds that logit adjustment has there. All rows are of one
kind of hardware: seconds are told in its own, and scores as differences to logit adjustment, which
would be those between kinds too. ``starts.csv`` has the regimes that `compare.py` has not run yet:
rows of its suite "core" take their place.

Regret: of each training set, the score of the best method less that of the chosen one, where the
rule knows the other *sets* alone (all cuts of a set are left out). The best of many noisy means is
above its truth; so the regret is also told against the method that is best on half of the seeds,
both scored on the other half.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sklearn_medimb.base._classifier import TUNING_EPOCHS
from sklearn_medimb.comparison._candidates import METHODS
from sklearn_medimb.comparison._rule import REFERENCE, Row, choose, expected

HERE = Path(__file__).parent
TABLES = [HERE / "results.csv", HERE / "starts.csv"]
OUT = HERE.parent / "sklearn_medimb" / "comparison" / "_evidence.csv"
NAMES = {
    "CE": "cross-entropy", "oversampling": "over-sampling", "focal": "focal loss",
    "class-balanced": "class-balanced loss", "LDAM-DRW": "LDAM",
}  # fmt: skip
NO_NETWORKS = {
    "balanced forest", "EasyEnsemble", "SMOTE + SVM", "SMOTE + logistic", "boosting",
    "frozen LR, views + depths", "frozen SVM",
}  # fmt: skip
# Of a suite: pixels a side, in 2-D and 3-D, and the share of the networks' default steps. Of those
# of a regime that have rows the first counts.
SUITES = {
    "scratch": {"core": ((28, 8), 0.5)},
    "frozen": {"core": ((128,), 1.0), "defaults": ((128,), 1.0)},
    "pretrained": {"core": ((96,), 5 / TUNING_EPOCHS), "defaults": ((128,), 1.0)},
}

# What rows have that may stand beside one another.
USUAL = {
    "rows": "test", "size": "all", "start": "efficientnet_lite0", "hardware": "2 cores x86_64",
}  # fmt: skip


class Cell(NamedTuple):
    """A method on a training set: what it had, by seed."""

    about: Row  # means over seeds
    by_seed: dict[str, float]


def cells(paths: Sequence[Path]) -> list[Cell]:
    """Methods on training sets, each with all the seeds of logit adjustment.

    Tables that say of one fit two things are refused.
    """
    rows = [row for path in paths for row in _table(path)]
    suites = {
        regime: next((name for name in known if _has(rows, regime, name)), None)
        for regime, known in SUITES.items()
    }
    found: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        if row["suite"] == suites[row["regime"]]:
            key = row["regime"], row["data"], row["cut"], NAMES.get(row["method"], row["method"])
            if row["seed"] in found.setdefault(key, {}):
                raise ValueError(f"The tables have two rows of {' '.join(key)}, seed {row['seed']}")
            found[key][row["seed"]] = row
    made = []
    for (regime, data, cut, method), of in found.items():
        seeds = set(found.get((regime, data, cut, REFERENCE), {}))
        if seeds and seeds <= set(of):
            how = SUITES[regime][suites[regime] or ""]
            own = {seed: of[seed] for seed in sorted(seeds)}
            made.append(_cell((regime, data, cut, method), own, *how))
    return sorted(made)


def _table(path: Path) -> list[dict[str, str]]:
    """Rows on test images, of whole training parts, the usual start, and the usual hardware."""
    with path.open(newline="") as file:
        rows = [{**row, "regime": row.get("regime") or "scratch"} for row in csv.DictReader(file)]
    return [
        row
        for row in rows
        if all((row.get(name) or usual) == usual for name, usual in USUAL.items())
    ]


def _has(rows: Sequence[dict[str, str]], regime: str, suite: str) -> bool:
    return any(row["regime"] == regime and row["suite"] == suite for row in rows)


def _cell(
    key: tuple[str, str, str, str], rows: dict[str, dict[str, str]], sides: tuple[int, ...],
    share: float,
) -> Cell:  # fmt: skip
    def mean(name: str) -> float:
        return float(np.mean([float(row[name]) for row in rows.values()]))

    dims = 3 if "3d" in key[1] else 2
    fastest = min(float(row["fit_seconds"]) for row in rows.values())
    about = Row(
        *key, round(mean("n_train")), round(mean("n_classes")),
        round(max(mean("imbalance_ratio"), 1.0), 2), sides[dims - 2], dims,
        round(mean("balanced_accuracy"), 4),
        round(fastest / (1 if key[3] in NO_NETWORKS else share), 2),
    )  # fmt: skip
    return Cell(about, {seed: float(row["balanced_accuracy"]) for seed, row in rows.items()})


def write(made: Sequence[Cell], out: Path = OUT) -> None:
    """Write the table of the package."""
    with out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(list(Row.__annotations__))
        writer.writerows(cell.about for cell in made if cell.about.method in METHODS)


# ---------------------------------------------------------------- regret

Rule = Callable[[list[Row], Row], str]


def nearest(others: list[Row], own: Row) -> str:
    """The rule of the package, without a budget."""
    found = expected(others, own.n_train, own.n_classes, own.imbalance_ratio)
    scores = {name: one.score for name, one in found.items()}
    seconds = {
        name: float(np.median([row.seconds for row in others if row.method == name]))
        for name in scores
    }
    return choose(scores, seconds)


def best_mean(others: list[Row], _: Row) -> str:
    """One method for all: the best over the other sets."""
    means: dict[str, dict[str, list[float]]] = {}
    for row in others:
        means.setdefault(row.method, {}).setdefault(row.data, []).append(row.score)
    complete = max(len(of) for of in means.values())
    means = {name: of for name, of in means.items() if len(of) == complete}
    return max(
        means, key=lambda name: np.mean([np.mean(scores) for scores in means[name].values()])
    )


def regrets(made: Sequence[Cell], rule: Rule) -> np.ndarray:
    """By training set: regret, and regret against the choice by half of the seeds."""
    tables: dict[tuple[str, str], dict[str, Cell]] = {}
    for cell in made:
        tables.setdefault((cell.about.data, cell.about.cut), {})[cell.about.method] = cell
    lost = []
    for (data, _), of in tables.items():
        known = [cell.about for cell in made if cell.about.method in METHODS]
        others = [row for row in known if row.data != data]
        chosen = rule(others, of[REFERENCE].about)
        if chosen not in of:  # it was not run there
            continue
        whole = max(cell.about.score for cell in of.values()) - of[chosen].about.score
        seeds, halves = sorted(of[REFERENCE].by_seed), []
        for part in (seeds[::2], seeds[1::2]):
            rest = [seed for seed in seeds if seed not in part]
            if part and rest:
                best = max(of, key=lambda name: _mean(of[name], part))
                halves.append(_mean(of[best], rest) - _mean(of[chosen], rest))
        lost.append((whole, np.mean(halves) if halves else np.nan))
    return np.array(lost)


def _mean(cell: Cell, seeds: Sequence[str]) -> float:
    return float(np.mean([cell.by_seed[seed] for seed in seeds]))


def report(made: Sequence[Cell]) -> str:
    """Regrets as a Markdown table."""
    lines = [
        "| regime (sets, training sets) | rule | mean | worst | mean, half the seeds | worst |",
        "|--|--|--|--|--|--|",
    ]
    for regime in dict.fromkeys(cell.about.regime for cell in made):
        own = [cell for cell in made if cell.about.regime == regime]
        rules: dict[str, Any] = {"recommend": nearest, "best mean of the other sets": best_mean}
        for name in (REFERENCE, "cRT", "metric two-stage", "LMD", "CSSN"):
            if len({c.about.data for c in own if c.about.method == name}) == len(
                {c.about.data for c in own}
            ):
                rules[f"always {name}"] = lambda *_, name=name: name
        for words, rule in rules.items():
            lost = regrets(own, rule)
            sizes = f"{len({c.about.data for c in own})}, {len(lost)}"
            numbers = [*_ends(lost[:, 0]), *_ends(lost[:, 1])]
            lines.append(f"| {regime} ({sizes}) | {words} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def _ends(lost: np.ndarray) -> list[str]:
    known = lost[~np.isnan(lost)]
    return [f"{known.mean():+.3f}", f"{known.max():+.3f}"] if len(known) else ["", ""]


def main() -> None:
    """Write the table, or print regrets."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tables", nargs="*", type=Path, default=TABLES, help="of compare.py")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--regret", action="store_true", help="print regrets, and write nothing")
    args = parser.parse_args()
    made = cells(args.tables)
    if not made:
        parser.error(f"argument tables: no row of logit adjustment has {USUAL}")
    if args.regret:
        print(report(made))
    else:
        write(made, args.out)
        print(f"{len(made)} rows: {args.out}")


if __name__ == "__main__":
    main()
