"""How numbers and names stand on the page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import numpy as np
from differences import Effect, by_sets
from report_rows import Chapter, cell_of

INTERVALS = (
    "Intervals of 95 %: by patients, about further patients of these sets; by sets, about further "
    "sets."
)
SHOWN = '"shown" asks for p below .05 and for the interval of the confirming sets alone.'


def spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}".replace("0.", ".")
    return f"{np.mean(values):.3f} ± {np.std(values):.3f}".replace("0.", ".")


def as_line(values: list[str]) -> str:
    return "| " + " | ".join(values) + " |"


def counted(things: Collection[Any], name: str) -> str:
    return f"{len(things)} {name}" + "s" * (len(things) != 1)


def spelt(data: str) -> str:
    return data.replace("_", " ")


def short(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".").rstrip("0")


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("0.", ".").replace("-", "\N{MINUS SIGN}")


def interval(of: Effect) -> str:
    return f"[{signed(of.low)}, {signed(of.high)}]"


def states(chapter: Chapter) -> list[str]:
    """Say so where contestants on the same images were run at different states of the code."""
    of_cells, of_methods = defaultdict(set), defaultdict(set)
    for row in chapter.rows:
        of_cells[cell_of(row), row["seed"]].add(row["commit"])
        of_methods[row["method"]].add(row["commit"])
    if all(len(commits) == 1 for commits in of_cells.values()):
        return []
    alike = defaultdict(list)
    for name, commits in sorted(of_methods.items()):
        alike[", ".join(sorted(commits))].append(name)
    groups = sorted(alike.items(), key=lambda item: len(item[1]))
    said = [f"{', '.join(names)} at {at}" for at, names in groups]
    if len(groups) > 1 and len(groups[-1][1]) > 3:
        said[-1] = f"the others at {groups[-1][0]}"
    n_states = len(set().union(*of_methods.values()))
    return [
        "",
        f"Contestants were run at {n_states} states of the code: {'; '.join(said)}. So what is "
        "between them may be the code, and defaults of today may be others.",
    ]


def footer(chapter: Chapter) -> str:
    rows, (clock, unit) = chapter.rows, chapter.clock
    hardware, versions, commits = (
        ", ".join(sorted({str(row[name]) for row in rows}))
        for name in ("hardware", "versions", "commit")
    )
    hours = sum(row[clock] + row["predict_seconds"] for row in rows) / 3600
    return f"{len(rows)} fits, {hours:.1f} hours{unit[1:]}; {hardware}; {versions}; {commits}."


def compared(
    chapter: Chapter, pair: tuple[str, str], adjusted: dict[tuple[str, str], float]
) -> list[str]:
    """Difference of two, intervals, adjusted p, confirming sets, and whether a gain is shown."""
    found, how = chapter.effect(*pair)
    alone, p = chapter.effect(*pair, "confirmed")[0], adjusted.get(pair)
    over_sets = by_sets(chapter.rows_of("all", pair), *pair)
    return [
        signed(found.mean),
        interval(found),
        how,
        "" if p is None else f"{p:.3f}",
        interval(over_sets) if over_sets else "",
        f"{signed(alone.mean)} {interval(alone)}" if alone else "",
        "" if p is None else "yes" if chapter.is_shown(*pair, adjusted) else "no",
    ]
