"""Turn results.csv of compare.py into a page and figures.

    python benchmarks/report.py benchmarks/results.csv [--out benchmarks] [--inner]

Writes ``RESULTS.md`` and ``figures/*.png`` beside it: a chapter for each regime, start and kind of
hardware that the table has test rows of, since ranks and seconds of two kinds are not put together.
Where the predictions of a run lie beside the table, in ``jobs``, differences by patients come from
them and are kept in ``differences.csv``, from which they are read where there are none. The same
table gives the same page.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

import differences
import matplotlib as mpl
import numpy as np
from differences import FORMERLY, Effect
from scipy import stats

mpl.use("Agg")
import matplotlib.pyplot as plt

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
# A method, and what is left of it without its own idea.
ABLATIONS = {
    "CSSN - auxiliary": "CSSN",
    "SPMix uniform": "SPMix",
    "SPMix unmixed": "SPMix",
    "LMD - relations": "LMD",
    "LMD - E-step": "LMD",
    "metric two-stage - metric": "metric two-stage",
    "AMIMV - continued": "AMIMV continued",
}
CHOSEN_ON = {"brain_tumor_mri", "ph2_dermoscopy", "wbc_two_sites", "dr_maculopathy", "busi"}
CONFIRMED = {"herlev_papsmear", "covid_cxr", "iq_othnccd_ct", "dementia_mri"}
# On inner rows of which the augmentation from scratch was chosen.
AUGMENTED = {
    "wbc_two_sites", "busi", "herlev_papsmear", "pneumoniamnist", "bccd_cells", "dementia_mri",
}  # fmt: skip
LEAST, BEST = 0.01, 0.02  # defaults are to lose no more to it, and the best to gain that much
BELOW = 0.02  # what is said to be below the better baseline of a set
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
ROWS = (
    "Rows: all networks have one backbone, augmentation, optimiser and number of steps. cRT is "
    '`MetricTwoStageClassifier(metric_weight=0, rebalance="crt")`, metric two-stage and LMD the '
    "defaults of `MetricTwoStageClassifier` and `LMDClassifier`, CSSN that of `CSSNClassifier`; "
    "virtual features is `SoftmaxClassifier`, `StandardScaler`, `BalancedVirtualFeatures` and "
    "`LogisticRegression` in a pipeline; SPMix is `SPMixClassifier`, SPMix sampler "
    "`SoftmaxClassifier(sampler=SPMixSampler())`; AMIMV is `AMIMVClassifier`, whose encoder never "
    "sees a label and stays frozen under a balanced linear head. "
    "Balanced softmax and logit adjustment of strength 1 are the same loss under two names."
)
Table = dict[str, dict[tuple[str, str], list[float]]]  # method -> (data, cut) -> one value a seed

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000"]


def read(path: Path) -> list[dict[str, Any]]:
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


def gather(rows: list[dict[str, Any]], measure: str) -> Table:
    table: Table = defaultdict(lambda: defaultdict(list))
    for row in rows:
        table[row["method"]][_cell(row)].append(row.get(measure, float("nan")))
    return table


def shared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the training sets and seeds that every method was run on: the same draws for all.

    Methods that have less than half of the cells of the fullest are left out.
    """
    runs = defaultdict(set)
    for row in rows:
        runs[row["method"]].add((*_cell(row), row["seed"]))
    enough = max(map(len, runs.values()), default=0) / 2
    full = {method: cells for method, cells in runs.items() if len(cells) >= enough}
    common = set.intersection(*full.values()) if full else set()
    return [row for row in rows if row["method"] in full and (*_cell(row), row["seed"]) in common]


@dataclasses.dataclass
class Chapter:
    """Rows that may be ranked together: one regime, suite, start and kind of hardware."""

    name: str  # of its figures and its rows in differences.csv
    title: str
    rows: list[dict[str, Any]]
    left_out: list[str]
    effects: dict[tuple[str, str, str], Effect] = dataclasses.field(default_factory=dict)

    @property
    def regime(self) -> str:
        return self.rows[0]["regime"]

    @property
    def is_defaults(self) -> bool:
        return (self.regime, self.rows[0]["suite"]) == ("scratch", "defaults")

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
        """Who is compared with whom: with the baselines, and with what is left of a method."""
        has = set(self.contestants)
        of_baselines = [(one, other) for other in self.references for one in has - {other}]
        of_ideas = [(whole, part) for part, whole in ABLATIONS.items()]
        return sorted(pair for pair in of_baselines + of_ideas if has >= set(pair))

    def parts(self) -> dict[str, set[str]]:
        """All sets, and those that confirm: all, where defaults were chosen on none of them."""
        sets = {row["data"] for row in self.rows}
        if self.is_defaults:
            return {"all": sets, "confirmed": sets - AUGMENTED}
        return {"all": sets, "confirmed": sets & CONFIRMED if sets & CHOSEN_ON else sets}

    def rows_of(self, part: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["data"] in self.parts()[part]]

    def effect(self, one: str, other: str, part: str = "all") -> tuple[Effect | None, str]:
        """Difference of two, and whether its interval is by patients, by sets or unknown."""
        if (one, other, part) in self.effects:
            return self.effects[one, other, part], "patients"
        found = differences.by_sets(self.rows_of(part), one, other)
        return found, "sets" if found else ""


def chapters(rows: list[dict[str, Any]], part: str = "test") -> list[Chapter]:
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
        elif suite != "core":
            title += f" ({suite})"
        if len({other[2] for other in alike}) > 1:
            title += f", {start}"
        if len({other[3] for other in alike}) > 1:
            title += f", {hardware}"
            name += "-" + "".join(c if c.isalnum() else "-" for c in hardware)
        if part == "inner":
            title, name = title + ", inner rows", name + "-inner"
        here = {row["method"] for row in own}
        made.append(Chapter(name, title, own, sorted({r["method"] for r in found[key]} - here)))
    return made


def means(table: Table, cells: list[tuple[str, str]]) -> dict[str, np.ndarray]:
    return {name: np.array([np.mean(of[cell]) for cell in cells]) for name, of in table.items()}


def of_collections(
    rows: list[dict[str, Any]], measure: str = "balanced_accuracy"
) -> dict[str, np.ndarray]:
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


# ---------------------------------------------------------------- figures


def rank_figure(order: dict[str, float], distance: float, path: Path) -> None:
    """Mean ranks with the critical difference: methods joined by a bar are not told apart."""
    names = sorted(order, key=order.get)
    fig, ax = plt.subplots(figsize=(7, 0.28 * len(names) + 1.1), layout="constrained")
    places = np.arange(len(names))
    values = np.array([order[name] for name in names])
    ax.hlines(places, values - distance / 2, values + distance / 2, color="#56B4E9", linewidth=5)
    ax.plot(values, places, "o", color="#0072B2")
    ax.axvline(values[0] + distance / 2, color="0.6", linestyle=":", linewidth=1)
    ax.set_yticks(places, names)
    ax.invert_yaxis()
    ax.set_xlabel(
        "mean rank of balanced accuracy, 1 is best; what bars that overlap\n"
        f"differ by is below the critical difference, {distance:.1f} (Nemenyi, 5 %)"
    )
    fig.savefig(path, dpi=140, metadata={"Software": None})
    plt.close(fig)


def time_figure(
    scores: dict[str, np.ndarray], seconds: dict[str, np.ndarray], unit: str, path: Path
) -> None:
    """Balanced accuracy against time to fit."""
    fig, ax = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    ax.set_xscale("log")
    points = {name: (np.median(seconds[name]), scores[name].mean()) for name in scores}
    for name, (x, y) in points.items():
        ax.plot(x, y, "o", color=COLOURS[3 if name in PAPERS else 0])
    for label, colour in {"a paper's method": COLOURS[3], "classical": COLOURS[0]}.items():
        ax.plot([], [], "o", color=colour, label=label)
    ax.legend(fontsize=8, loc="best")
    # The networks take about equally long: their names go into a column, evenly apart.
    slow = max(x for x, _ in points.values())
    column = sorted((n for n, (x, _) in points.items() if x > slow / 4), key=lambda n: points[n][1])
    low, high = ax.get_ylim()
    heights = np.array([points[name][1] for name in column])
    gap = (high - low) / 21
    for _ in range(200):  # push neighbours apart until none overlap
        close = np.diff(heights) < gap
        heights[:-1][close] -= gap / 10
        heights[1:][close] += gap / 10
    for name, height in zip(column, heights, strict=True):
        style = {"arrowstyle": "-", "color": "0.7", "linewidth": 0.6}
        ax.annotate(
            name, points[name], (slow * 2, height), fontsize=8, va="center", arrowprops=style
        )
    for name in set(points) - set(column):
        ax.annotate(f"  {name}", points[name], fontsize=8, va="center")
    ax.set_xlim(min(x for x, _ in points.values()) / 2, slow * 12)
    ax.set_ylim(min(low, heights.min() - gap), max(high, heights.max() + gap))
    ax.set_xlabel(f"median time to fit ({unit})")
    ax.set_ylabel("mean balanced accuracy")
    fig.savefig(path, dpi=140, metadata={"Software": None})
    plt.close(fig)


def ratio_figure(rows: list[dict[str, Any]], order: dict[str, float], path: Path) -> None:
    """Gain over plain cross-entropy against the imbalance of the training set."""
    ranked = sorted(order, key=order.get)
    others = [name for name in ranked if name not in {*PAPERS, PLAIN, BASELINE}][:2]
    shown = [name for name in ranked if name in {*PAPERS, BASELINE, *others}]
    plain = {
        (row["data"], row["cut"], row["seed"]): row["balanced_accuracy"]
        for row in rows
        if row["method"] == PLAIN
    }
    edges = [1, 5, 15]
    names = ["below 5", "5 to 15", "above 15"]
    fig, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for k, method in enumerate(shown):
        gains = defaultdict(list)
        for row in rows:
            key = row["data"], row["cut"], row["seed"]
            if row["method"] == method and key in plain:
                place = int(np.searchsorted(edges, row["imbalance_ratio"], side="right")) - 1
                gains[place].append(row["balanced_accuracy"] - plain[key])
        x = np.array(sorted(gains))
        y = np.array([np.mean(gains[p]) for p in x])
        error = np.array([np.std(gains[p]) / np.sqrt(len(gains[p])) for p in x])
        colour = COLOURS[k % len(COLOURS)]
        ax.errorbar(x + 0.05 * (k - 2), y, error, fmt="o-", color=colour, label=method, capsize=2)
    ax.axhline(0, color="0.5", linewidth=1)
    ax.set_xticks(range(len(names)), names)
    ax.set_xlabel("largest class / smallest class of the training images")
    ax.set_ylabel("balanced accuracy,\ngain over cross-entropy (s.e.)")
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    fig.savefig(path, dpi=140, metadata={"Software": None})
    plt.close(fig)


# ---------------------------------------------------------------- page


def spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}".replace("0.", ".")
    return f"{np.mean(values):.3f} ± {np.std(values):.3f}".replace("0.", ".")


def page(found: list[Chapter]) -> str:
    """All chapters, after what a user takes from them."""
    lines = ["# Results", ""]
    for chapter in found:
        lines += [advice(chapter), ""]
    for chapter in found:
        make = from_scratch if chapter.regime == "scratch" else of_start
        make = of_defaults if chapter.is_defaults else make
        first, *more = make(chapter)
        lines += [f"## {chapter.title}", "", first, *_states(chapter), *more, ""]
    lines += [
        "## Rerun",
        "",
        "`python benchmarks/compare.py FOLDER --regime frozen --suite core --out results --jobs 2` "
        "(or `pretrained`, or `scratch`), then `python benchmarks/report.py results/results.csv`. "
        "Rows of different kinds of hardware are never ranked together: each has its chapter.",
    ]
    return "\n".join(lines) + "\n"


def advice(chapter: Chapter) -> str:
    """What to take, what it gains and costs, and where it does not help."""
    rows, cells = chapter.rows, sorted({_cell(row) for row in chapter.rows})
    table = gather(rows, "balanced_accuracy")
    order = ranks(of_collections(rows))
    whole = [name for name in sorted(order, key=order.get) if name not in ABLATIONS]
    clock, unit = chapter.clock
    best, seconds = whole[0], means(gather(rows, clock), cells)
    baselines = [name for name in chapter.references if name in order]
    others = [name for name in baselines if name != best]
    cost = f"{np.median(seconds[best]):.0f} {unit} to fit"
    if others:
        more = ", ".join(f"{name} {np.median(seconds[name]):.0f} s" for name in others)
        cost += f" ({more})"
    text = (
        f"**{chapter.title}: take {best}.** Of {len(order)} contestants it is first by mean rank "
        f"({order[best]:.1f}; mean balanced accuracy {_mean(table, cells, best):.3f}), {cost}."
    )
    gains = [f"over {name} {_worded(*chapter.effect(best, name))}" for name in others]
    if gains:
        text += f" It gains {'; '.join(gains)}"
        text += " (intervals of 95 %; of the first of many a gain is flattered)."
    if others:
        of = {name: differences.of_sets(rows, name) for name in (best, *others)}
        behind = [
            f"{_plain(data)} ({_signed(of[best][data] - max(of[o][data] for o in others))})"
            for data in of[best]
            if of[best][data] < max(of[o][data] for o in others) - BELOW
        ]
        what = "the better of these" if len(others) > 1 else others[0]
        text += (
            f" It is more than {_short(BELOW)} below {what} on {', '.join(behind)}."
            if behind
            else f" On no set is it more than {_short(BELOW)} below {what}."
        )
    return text + _who_gains(chapter, others or baselines)


def _who_gains(chapter: Chapter, others: list[str]) -> str:
    """Which methods of the papers are shown to be ahead of a baseline; the rest are not."""
    text = ""
    papers = [name for name in PAPERS if name in chapter.contestants]
    for other in others if chapter.regime != "scratch" else []:
        adjusted = _adjusted(chapter, [(name, other) for name in papers])
        shown = [name for name, _ in adjusted if _shown_to_gain(chapter, name, other, adjusted)]
        rest = [name for name in papers if name not in shown]
        if shown:
            text += f" Shown to be ahead of {other}: {', '.join(shown)}"
            text += f"; not shown: {', '.join(rest)}." if rest else "."
        elif rest:
            text += f" None of {', '.join(rest)} is shown to be ahead of {other}."
    return text


def _adjusted(chapter: Chapter, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """Holm's p of a family of pairs, as far as they have one."""
    found = {pair: chapter.effect(*pair)[0] for pair in pairs}
    return differences.holm({pair: of.p for pair, of in found.items() if of is not None})


def _shown_to_gain(
    chapter: Chapter, one: str, other: str, adjusted: dict[tuple[str, str], float]
) -> bool:
    """As registered: adjusted p below 5 % on all sets, and the confirming ones alone say so."""
    alone = chapter.effect(one, other, "confirmed")[0]
    ahead = chapter.effect(one, other)[0]
    return bool(
        ahead and alone and ahead.mean > 0 and alone.low > 0 and adjusted[one, other] < 0.05
    )


def of_start(chapter: Chapter) -> list[str]:
    """Chapter on networks that began with a known start."""
    rows, cells = chapter.rows, sorted({_cell(row) for row in chapter.rows})
    table = gather(rows, "balanced_accuracy")
    order = ranks(of_collections(rows))
    names, row = sorted(order, key=order.get), rows[0]
    n_train = sorted(int(r["n_train"]) for r in rows)
    lines = [
        f"{_many(set(names), 'contestant')} on {_many({data for data, _ in cells}, 'set')}, "
        f"{_many({r['seed'] for r in rows}, 'fold')} with patients whole, {n_train[0]} to "
        f"{n_train[-1]} training images of {row['image_size']:.0f} pixels; the start is "
        f"{row['start']}; {row['hardware']}. What was to be compared was written down "
        "before the runs (`benchmarks/registration.md`).",
        "",
    ]
    if chapter.left_out:
        lines += [f"Not run on enough of them: {', '.join(chapter.left_out)}.", ""]
    for kind, title in (("ranks", "Mean ranks"), ("time", "Accuracy and time")):
        lines += [f"![{title}](figures/{kind}-{chapter.name}.png)", ""]
    lines += [*_summary(rows, names, order, cells, chapter), ""]
    lines += _compared(chapter, names)
    lines += ["### Balanced accuracy, each set", "", SPREAD, "", *_by_set(table, cells, names)]
    return [*lines, "", _footer(chapter)]


def _compared(chapter: Chapter, names: list[str]) -> list[str]:
    """Tables of differences: to each baseline, and of each method to what is left of it."""
    has, lines = set(chapter.contestants), []
    head = ["", "difference", "interval", "by", "p (Holm)", "by sets", "confirming sets", "shown"]
    families = {
        f"Against {other}": [(name, other) for name in names if name != other]
        for other in chapter.references
        if other in has
    }
    ideas = [(whole, part) for part, whole in ABLATIONS.items() if {whole, part} <= has]
    if ideas:
        families["Each method against what is left of it without its idea"] = ideas
    for title, pairs in families.items():
        is_idea = pairs == ideas
        family = pairs if is_idea else [pair for pair in pairs if pair[0] in PAPERS]
        adjusted = _adjusted(chapter, family)
        lines += [f"### {title}", "", _line(head), "|--" * len(head) + "|"]
        for one, other in pairs:
            found, how = chapter.effect(one, other)
            alone = chapter.effect(one, other, "confirmed")[0]
            if found is None:
                continue
            p = adjusted.get((one, other))
            shown = p is not None and _shown_to_gain(chapter, one, other, adjusted)
            over_sets = differences.by_sets(chapter.rows, one, other)
            values = [
                f"{one} against {other}" if is_idea else one,
                _signed(found.mean),
                _interval(found),
                how,
                "" if p is None else f"{p:.3f}",
                _interval(over_sets) if over_sets else "",
                f"{_signed(alone.mean)} {_interval(alone)}" if alone else "",
                "yes" if shown else "" if p is None else "no",
            ]
            lines.append(_line(values))
        lines.append("")
    lines += [
        "Intervals of 95 %: by patients, about further patients of these sets; by sets, about "
        "further sets. p is of the first, by Holm over the methods of the papers (of the last "
        'table over all its rows); "shown" asks for p below .05 and for the interval of the '
        "confirming sets alone.",
        "",
    ]
    return lines


def _by_set(table: Table, cells: list[tuple[str, str]], names: list[str]) -> list[str]:
    """Contestants by sets."""
    heads = [_plain(data) + ("" if cut == "natural" else f" {cut}") for data, cut in cells]
    lines = [_line(["method", *heads]), "|--" * (len(heads) + 1) + "|"]
    best = {cell: max(np.mean(table[name][cell]) for name in names) for cell in cells}
    for name in names:
        texts = [spread(table[name][cell]) for cell in cells]
        top = [np.mean(table[name][cell]) == best[cell] for cell in cells]
        texts = [f"**{text}**" if is_top else text for text, is_top in zip(texts, top, strict=True)]
        lines.append(_line([name, *texts]))
    return lines


def _line(values: list[str]) -> str:
    return "| " + " | ".join(values) + " |"


def _mean(table: Table, cells: list[tuple[str, str]], name: str) -> float:
    return float(np.mean([np.mean(table[name][cell]) for cell in cells]))


def _many(things: set[Any], name: str) -> str:
    return f"{len(things)} {name}" + "s" * (len(things) != 1)


def _plain(data: str) -> str:
    return data.replace("_", " ")


def _short(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".").rstrip("0")


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("0.", ".").replace("-", "\N{MINUS SIGN}")


def _interval(of: Effect) -> str:
    return f"[{_signed(of.low)}, {_signed(of.high)}]"


def _worded(of: Effect | None, how: str) -> str:
    return "an unknown amount" if of is None else f"{_signed(of.mean)} {_interval(of)}, by {how}"


def _states(chapter: Chapter) -> list[str]:
    """Say so where contestants on the same images were run at different states of the code."""
    of_cells, of_methods = defaultdict(set), defaultdict(set)
    for row in chapter.rows:
        of_cells[_cell(row), row["seed"]].add(row["commit"])
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


def _footer(chapter: Chapter) -> str:
    rows, (clock, unit) = chapter.rows, chapter.clock
    hardware, versions, commits = (
        ", ".join(sorted({str(row[name]) for row in rows}))
        for name in ("hardware", "versions", "commit")
    )
    hours = sum(row[clock] + row["predict_seconds"] for row in rows) / 3600
    return f"{len(rows)} fits, {hours:.1f} hours{unit[1:]}; {hardware}; {versions}; {commits}."


SPREAD = (
    "Mean ± standard deviation over seeds, where there are several; the best of a column is bold."
)


def from_scratch(chapter: Chapter) -> list[str]:
    """Chapter on networks that saw no image before."""
    rows = chapter.rows
    table = gather(rows, "balanced_accuracy")
    cells = sorted({_cell(row) for row in rows})
    scores = of_collections(rows)
    order = ranks(scores)
    sets = sorted({data for data, _ in cells})
    distance = critical_difference(len(order), len(sets))
    names = sorted(order, key=order.get)
    best = names[0]
    alike = [name for name in names if order[name] - order[best] < distance]
    seeds = sorted({int(row["seed"]) for row in rows})
    small = [c for c in cells if 2 < _ratio(rows, c) < 12 and _classes(rows, c) == 2]
    plural = "s" if len(seeds) > 1 else ""
    lines = [
        f"{len(names)} methods on {len(cells)} training sets ({len(sets)} collections, as they "
        f"are and cut to larger imbalance ratios), {len(seeds)} seed{plural}, images of 28 pixels "
        "(volumes: 8), at most 500 of them to train on. Cuts of a collection share images: ranks "
        "and differences are of collections, over whose cuts scores are averaged first; means of "
        "the table below are over training sets.",
        "",
        f"**What does not beat its baseline.** {_losers(scores, names)}By rank, {len(alike)} "
        f"methods cannot be told from the best ({best}) at the 5 % level.{_relatives(chapter)}",
        "",
    ]
    if small:
        chosen = means(table, small)
        top = sorted(chosen, key=lambda name: -chosen[name].mean())[:4]
        winners = ", ".join(f"{name} ({chosen[name].mean():.3f})" for name in top)
        plain = f"; cross-entropy has {chosen[PLAIN].mean():.3f}" if PLAIN in chosen else ""
        sets_used = ", ".join(f"{data.replace('_', ' ')} {cut}" for data, cut in small)
        lines += [
            "**For two classes, a few hundred images and a ratio up to 1 : 12** (here "
            f"{sets_used}) the first are {winners}{plain}. Differences of .02 are within the noise "
            "of a seed: take the first that suits you.",
            "",
        ]
    lines += [*_summary(rows, names, order, cells, chapter), "", ROWS, ""]
    for kind, title in (
        ("ranks", "Mean ranks"),
        ("time", "Accuracy and time"),
        ("ratio", "Gain and imbalance"),
    ):
        lines += [f"![{title}](figures/{kind}-{chapter.name}.png)", ""]
    lines += ["### Balanced accuracy, each training set", "", SPREAD, ""]
    return [*lines, *_details(table, cells, names), "", _footer(chapter)]


def of_defaults(chapter: Chapter) -> list[str]:
    """Chapter on classifiers without an argument, beside what an afternoon gives."""
    rows, row = chapter.rows, chapter.rows[0]
    table, cells = gather(rows, "balanced_accuracy"), sorted({_cell(row) for row in chapter.rows})
    order = ranks(of_collections(rows))
    names = sorted(order, key=order.get)
    lines = [
        f"{_many(set(names), 'contestant')} on {_many({data for data, _ in cells}, 'set')} as they "
        f"are, {_many({r['seed'] for r in rows}, 'seed')}, images of {row['image_size']:.0f} "
        "pixels (volumes: 16), at most 1,000 of them to train on. Classifiers have no argument but "
        f"the seed, CE and logit adjustment the loss; the {AFTERNOON} (`benchmarks/afternoon.py`) "
        "has its 40 epochs. What was asked is in `benchmarks/registration.md`.",
        "",
    ]
    if chapter.left_out:
        lines += [f"Not run on enough of them: {', '.join(chapter.left_out)}.", ""]
    if AFTERNOON in names:
        lines += [*_beside(chapter, names), ""]
    for kind, title in (("ranks", "Mean ranks"), ("time", "Accuracy and time")):
        lines += [f"![{title}](figures/{kind}-{chapter.name}.png)", ""]
    lines += ["### All measures", "", *_summary(rows, names, order, cells, chapter), ""]
    lines += ["### Balanced accuracy, each set", "", SPREAD, "", *_by_set(table, cells, names)]
    return [*lines, "", _footer(chapter)]


def _beside(chapter: Chapter, names: list[str]) -> list[str]:
    """Table of differences to the afternoon's network, and of time as a multiple of its own."""
    rows, alone = chapter.rows, chapter.rows_of("confirmed")
    scores, seconds = of_collections(rows), of_collections(rows, chapter.clock[0])
    gains = {name: float((scores[name] - scores[AFTERNOON]).mean()) for name in names}
    head = ["", "balanced accuracy", "difference", "by patients", "by sets"]
    head += ["sets not chosen on", "time", f"\N{MINUS SIGN}{_short(LEAST)} or more"]
    lines = [_line(head), "|--" * len(head) + "|"]
    for name in names:
        values = [name, f"{scores[name].mean():.3f}"]
        if name != AFTERNOON:
            of_patients = chapter.effects.get((name, AFTERNOON, "all"))
            of_sets, apart = (differences.by_sets(of, name, AFTERNOON) for of in (rows, alone))
            values += [
                _signed(gains[name]),
                _interval(of_patients) if of_patients else "",
                _interval(of_sets) if of_sets else "",
                f"{_signed(apart.mean)} {_interval(apart)}" if apart else "",
                f"{np.median(seconds[name] / seconds[AFTERNOON]):.2f}",
                "yes" if gains[name] >= -LEAST else "no",
            ]
        lines.append(_line(values + [""] * (len(head) - len(values))))
    untouched = ", ".join(_plain(data) for data in sorted({row["data"] for row in alone}))
    lines += [
        "",
        f"Differences to the {AFTERNOON}, intervals of 95 %. Sets not chosen on: "
        f"{untouched or 'none'}. Time to fit as a multiple of its own, median of the sets.",
    ]
    if best := max(gains.keys() - {AFTERNOON}, key=gains.get, default=None):
        lines[-1] += f" {best} is the best, {_signed(gains[best])}; asked was +{_short(BEST)}."
    return lines


def _losers(scores: dict[str, np.ndarray], names: list[str]) -> str:
    """Who is below the baseline, and below plain cross-entropy, as far as these were run."""
    text = ""
    if BASELINE in scores:
        gains = {name: (scores[name] - scores[BASELINE]).mean() for name in names}
        behind = ", ".join(f"{name} ({gain:+.3f})" for name, gain in gains.items() if gain < 0)
        text = (
            f"Against {BASELINE}, the simplest remedy, mean balanced accuracy is lower for "
            f"{behind or 'none'}. "
        )
    if PLAIN in scores:
        worse = [name for name in names if (scores[name] - scores[PLAIN]).mean() < 0]
        below = f"Below plain cross-entropy: {', '.join(worse)}."
        text += f"{below if worse else 'None falls below plain cross-entropy.'} "
    return text


def _relatives(chapter: Chapter) -> str:
    """Each paper's method against its plain relative, where both are there."""
    parts = []
    for name, plain in RELATIVES.items():
        if {name, plain} <= set(chapter.contestants):
            found = differences.by_sets(chapter.rows, name, plain)
            if found is not None:
                parts.append(f"{name} {_signed(found.mean)} {_interval(found)} ({plain})")
    said = "; ".join(parts)
    return f" Against what they add to (by sets, 95 %, each by itself): {said}." if parts else ""


def _ratio(rows: list[dict[str, Any]], cell: tuple[str, str]) -> float:
    return next(r["imbalance_ratio"] for r in rows if _cell(r) == cell)


def _classes(rows: list[dict[str, Any]], cell: tuple[str, str]) -> int:
    return int(next(r["n_classes"] for r in rows if _cell(r) == cell))


def _cell(row: dict[str, Any]) -> tuple[str, str]:
    return row["data"], row["cut"] if isinstance(row["cut"], str) else f"1 : {row['cut']:.0f}"


def _summary(
    rows: list[dict[str, Any]],
    names: list[str],
    order: dict[str, float],
    cells: list[tuple[str, str]],
    chapter: Chapter,
) -> list[str]:
    """All measures, mean over training sets."""
    columns = {title: means(gather(rows, name), cells) for name, title in MEASURES.items()}
    clock, unit = chapter.clock
    seconds = means(gather(rows, clock), cells)
    predict = means(gather(rows, "predict_seconds"), cells)
    known = {name: chapter.effects.get((name, "", "all")) for name in names}
    intervals = ["interval"] if any(known.values()) else []
    head = ["method", "mean rank", *columns, *intervals, f"fit, median {unit}", "predict"]
    lines = [_line(head), "|--" * len(head) + "|"]
    for name in names:
        values = [_shown(of[name]) for of in columns.values()]
        if intervals:
            of = known[name]
            values.append(f"{_short(of.low)} to {_short(of.high)}" if of else "")
        times = [f"{np.median(of[name]):.1f}" for of in (seconds, predict)]
        lines.append(_line([name, f"{order[name]:.1f}", *values, *times]))
    if intervals:
        lines += ["", "The interval is of balanced accuracy, 95 %, by patients, folds pooled."]
    return lines


def _shown(values: np.ndarray) -> str:
    return f"{np.nanmean(values):.3f}" if np.isfinite(values).any() else ""


def _details(table: Table, cells: list[tuple[str, str]], names: list[str]) -> list[str]:
    """Make one table per collection: methods by cuts."""
    lines = []
    for data in sorted({data for data, _ in cells}):
        cuts = sorted((cut for d, cut in cells if d == data), key=_places)
        lines += [f"#### {_plain(data)}", "", "| method | " + " | ".join(cuts) + " |"]
        lines.append("|--" * (len(cuts) + 1) + "|")
        best = {cut: max(np.mean(table[name][data, cut]) for name in names) for cut in cuts}
        for name in names:
            texts = []
            for cut in cuts:
                text = spread(table[name][data, cut])
                bold = np.mean(table[name][data, cut]) == best[cut]
                texts.append(f"**{text}**" if bold else text)
            lines.append(f"| {name} | " + " | ".join(texts) + " |")
        lines.append("")
    return lines[:-1]


def _places(cut: str) -> int:
    """Order of cuts: as it is, then by ratio."""
    return 0 if cut == "natural" else int(cut.split(":")[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--inner", action="store_true", help="a page of inner rows instead")
    args = parser.parse_args()
    found = chapters(read(args.table), "inner" if args.inner else "test")
    if not found:
        parser.error(f"{args.table} has no rows of this part that contestants share")
    (args.out / "figures").mkdir(parents=True, exist_ok=True)
    know_effects(found, args.table.parent, args.out)
    (args.out / "RESULTS.md").write_text(page(found))
    for chapter in found:
        figures(chapter, args.out / "figures")
    print(f"page: {args.out / 'RESULTS.md'}")


def know_effects(found: list[Chapter], folder: Path, out: Path) -> None:
    """Differences by patients: of the predictions beside the table, else as they were kept."""
    table = {(of.name, m): differences.digest(of.rows, m) for of in found for m in of.contestants}
    known = differences.read(folder / "differences.csv", table)
    if (folder / "jobs").is_dir():
        for chapter in found:
            of = differences.by_patients(
                chapter.rows, folder / "jobs", chapter.pairs(), chapter.parts()
            )
            known |= {(chapter.name, *key): effect for key, effect in of.items()}
    if known:
        differences.write(out / "differences.csv", known, table)
    for chapter in found:
        chapter.effects = {key[1:]: of for key, of in known.items() if key[0] == chapter.name}


def figures(chapter: Chapter, folder: Path) -> None:
    rows, cells = chapter.rows, sorted({_cell(row) for row in chapter.rows})
    scores = means(gather(rows, "balanced_accuracy"), cells)
    order = ranks(of_collections(rows))
    distance = critical_difference(len(order), len({data for data, _ in cells}))
    rank_figure(order, distance, folder / f"ranks-{chapter.name}.png")
    clock, unit = chapter.clock
    seconds = means(gather(rows, clock), cells)
    time_figure(scores, seconds, unit, folder / f"time-{chapter.name}.png")
    if chapter.regime == "scratch" and not chapter.is_defaults:
        ratio_figure(rows, order, folder / f"ratio-{chapter.name}.png")


if __name__ == "__main__":
    main()
