"""The chapter on how much there is with how many images, and how imbalanced they are."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import differences
import numpy as np
from differences import Effect, Rows
from report_figures import Course
from report_rows import BASELINE, Chapter
from report_words import as_line, counted, footer, interval, short, signed, states

TITLE = "## How much with how many images, and how imbalanced"
FEWEST = 3  # sets that a point of the figure is of


class Point(NamedTuple):
    """Training sets that were drawn alike, one of each collection that allows it."""

    value: float  # images, or ratio; NaN of all images as they are
    words: str
    rows: Rows

    @property
    def n_sets(self) -> int:
        return len({row["data"] for row in self.rows})

    def scores(self, method: str) -> dict[str, float]:
        return differences.of_sets(self.rows, method)


def points(chapter: Chapter) -> tuple[list[Point], list[Point]]:
    """By images, up to all of them, and by imbalance, from all images as they are."""
    found: dict[tuple[str, str], Rows] = {}
    for row in chapter.rows:
        cut = "" if row["cut"] == "natural" else f"{row['cut']:.0f}"
        found.setdefault((row["size"].replace("all", ""), cut), []).append(row)
    whole = found.pop(("", ""), [])
    sizes = sorted(
        Point(int(size), f"{size} images", rows) for (size, _), rows in found.items() if size
    )
    cuts = sorted(Point(int(cut), f"1 : {cut}", rows) for (_, cut), rows in found.items() if cut)
    return (
        [*sizes, Point(np.nan, "all images", whole)],
        [Point(np.nan, "as they are", whole), *cuts],
    )


def change(method: str, one: Point, other: Point) -> Effect | None:
    """From one point to another, over the sets that have both."""
    a, b = one.scores(method), other.scores(method)
    return differences.of_gains(np.array([b[data] - a[data] for data in a if data in b]))


# ---------------------------------------------------------------- figure


def courses(chapter: Chapter) -> list[Course]:
    """By images and by imbalance: from the mean over all sets the changes that sets have."""
    sizes, cuts = points(chapter)
    made = []
    for axis, whole, label in (
        (sizes, sizes[-1], "training images"),
        (cuts, cuts[0], "smallest class : largest class"),
    ):
        shown = [point for point in axis if point.n_sets >= FEWEST or point is whole]
        place = {point.words: point.value for point in shown}
        others = [point.value for point in shown if point is not whole] or [1]
        place[whole.words] = 2 * max(others) if axis is sizes else min(others) / 2
        lines = {}
        for method in chapter.contestants:
            level = float(np.mean([*whole.scores(method).values()]))
            ends = []
            for point in shown:
                of = change(method, whole, point) if point is not whole else Effect(0, 0, 0, 1)
                ends.append([place[point.words], *(level + end for end in of[:3])])
            lines[method] = np.array(ends)
        ticks = [f"{point.words.removesuffix(' images')}\n({point.n_sets})" for point in shown]
        made.append(Course(label, [*place.values()], ticks, lines))
    return made


# ---------------------------------------------------------------- page


def of_curves(found: list[Chapter]) -> list[str]:
    """One figure, what it says, and tables, of each start and kind of hardware."""
    lines: list[str] = []
    for chapter in found:
        if chapter.suite != "curves":
            continue
        sizes, cuts = points(chapter)
        row, n_folds = chapter.rows[0], counted({r["seed"] for r in chapter.rows}, "fold")
        lines += [
            TITLE if not lines else "",
            "",
            f"{chapter.title}: {counted(chapter.contestants, 'contestant')}, "
            f"{n_folds}, {row['image_size']:.0f} pixels; the start is {row['start']}; "
            f"{row['hardware']}. {_said(chapter, sizes, cuts)}",
            *states(chapter),
            "",
            f"![By images and by imbalance](figures/curves-{chapter.name}.png)",
            "",
            "The figure starts from the mean over all sets, trained on all images as they are, and "
            "draws the mean changes to it over the sets that have a size or a ratio (how many, in "
            "brackets), with intervals over sets, 95 %. Parts are nested and have the classes' "
            "shares; a cut has fewer images, too. Test images are the same. Nothing here is "
            "tested (`benchmarks/registration.md`).",
        ]
        for axis in (sizes, cuts):
            lines += ["", *_table(chapter, axis)]
        lines += ["", footer(chapter)]
    return lines


def _said(chapter: Chapter, sizes: list[Point], cuts: list[Point]) -> str:
    """What more images and less imbalance change, who is first where, and who is apart."""
    methods, whole = chapter.contestants, cuts[0]
    base = BASELINE if BASELINE in methods else methods[0]
    few, cut = (
        [point for point in axis if point.n_sets >= FEWEST] for axis in (sizes[:-1], cuts[1:])
    )
    steps = {f"from {p.words} to all": (p, whole) for p in (*few[:1], *few[1:][-1:])}
    steps |= {f"from images as they are to {p.words}": (whole, p) for p in cut[-1:]}
    changes = [_changed(change(base, *step), words, step) for words, step in steps.items()]
    text = f"**{base} changes** {'; '.join(changes)}. " if changes else ""
    first, apart = defaultdict(list), defaultdict(list)
    for point in (*sizes, *cuts[1:]):
        mean = {name: np.mean([*point.scores(name).values()]) for name in methods}
        first[max(mean, key=mean.__getitem__)].append(point.words)
        for name in methods:
            of = differences.by_sets(point.rows, name, base)
            if of is not None and of.low * of.high > 0:
                apart[name, "ahead" if of.mean > 0 else "behind"].append(of.mean)
    leads = "; ".join(f"{name} ({', '.join(where)})" for name, where in first.items())
    n_points = len(sizes) + len(cuts) - 1
    said = "; ".join(
        f"{name} {where} at {len(means)} ({signed(min(means))} to {signed(max(means))})"
        for (name, where), means in sorted(apart.items())
    )
    return (
        f"{text}First by mean: {leads}. Of {n_points} points, the interval of the difference to "
        f"{base} excludes 0 for {said or 'nobody at any'}."
    )


def _changed(of: Effect | None, words: str, step: tuple[Point, Point]) -> str:
    both = set.intersection(*({row["data"] for row in point.rows} for point in step))
    return f"{words} by {signed(of.mean)} {interval(of)} ({counted(both, 'set')})" if of else words


def _table(chapter: Chapter, axis: list[Point]) -> list[str]:
    """Mean of each contestant at each point, and its difference to the reference."""
    head = [f"{point.words} ({counted({r['data'] for r in point.rows}, 'set')})" for point in axis]
    lines = [as_line(["mean", *head]), "|--" * (len(head) + 1) + "|"]
    for name in chapter.contestants:
        cells = []
        for point in axis:
            scores = np.array([*point.scores(name).values()])
            of = differences.of_gains(scores)
            ends = f" [{short(of.low)}, {short(of.high)}]" if of else ""
            cells.append(f"{scores.mean():.3f}{ends}")
        lines.append(as_line([name, *cells]))
    if BASELINE not in chapter.contestants:
        return lines
    lines += ["", as_line([f"difference to {BASELINE}", *head]), "|--" * (len(head) + 1) + "|"]
    for name in (name for name in chapter.contestants if name != BASELINE):
        found = [differences.by_sets(point.rows, name, BASELINE) for point in axis]
        lines.append(
            as_line([name, *(f"{signed(of.mean)} {interval(of)}" if of else "" for of in found)])
        )
    return lines
