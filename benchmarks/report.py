"""Turn results.csv of compare.py into a page and figures.

    python benchmarks/report.py benchmarks/results.csv [--out benchmarks]

Writes ``RESULTS.md`` and ``figures/*.png`` beside it. The same table gives the same page.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
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
# What each paper's method adds to, all else being equal.
RELATIVES = {
    "CSSN": "oversampling",
    "SPMix": "oversampling",
    "SPMix sampler": "oversampling",
    "metric two-stage": "cRT",
    "LMD": "cRT",
    "AMIMV": "cRT",
}
PAPERS = tuple(RELATIVES)
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
        rows = list(csv.DictReader(file))
    for row in rows:
        for name, value in row.items():
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
    """Rows of the training sets and seeds that every method was run on: the same draws for all."""
    runs = defaultdict(set)
    for row in rows:
        runs[row["method"]].add((*_cell(row), row["seed"]))
    common = set.intersection(*runs.values())
    return [row for row in rows if (*_cell(row), row["seed"]) in common]


def means(table: Table, cells: list[tuple[str, str]]) -> dict[str, np.ndarray]:
    return {name: np.array([np.mean(of[cell]) for cell in cells]) for name, of in table.items()}


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


def time_figure(scores: dict[str, np.ndarray], seconds: dict[str, np.ndarray], path: Path) -> None:
    """Balanced accuracy against time to fit."""
    fig, ax = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    ax.set_xscale("log")
    points = {name: (np.median(seconds[name]), scores[name].mean()) for name in scores}
    for name, (x, y) in points.items():
        ax.plot(x, y, "o", color=COLOURS[3 if name in PAPERS else 0])
    for label, colour in {"a paper's method": COLOURS[3], "classical": COLOURS[0]}.items():
        ax.plot([], [], "o", color=colour, label=label)
    ax.legend(fontsize=8, loc="lower left")
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
    ax.set_xlabel("median seconds to fit, one core")
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


def page(rows: list[dict[str, Any]]) -> str:
    table = gather(rows, "balanced_accuracy")
    cells = sorted({_cell(row) for row in rows})
    scores = means(table, cells)
    order = ranks(scores)
    distance = critical_difference(len(order), len(cells))
    names = sorted(order, key=order.get)
    best = names[0]
    alike = [name for name in names if order[name] - order[best] < distance]
    seeds = sorted({int(row["seed"]) for row in rows})
    sets = sorted({data for data, _ in cells})
    small = [c for c in cells if 2 < _ratio(rows, c) < 12 and _classes(rows, c) == 2]
    plural = "s" if len(seeds) > 1 else ""
    lines = [
        "# Results",
        "",
        f"{len(names)} methods on {len(cells)} training sets ({len(sets)} collections, as they "
        f"are and cut to larger imbalance ratios), {len(seeds)} seed{plural}, images of 28 pixels "
        "(volumes: 8), at most 500 of them to train on.",
        "",
        f"**What does not beat its baseline.** {_losers(scores, names)}By rank, {len(alike)} "
        f"methods cannot be told from the best ({best}) at the 5 % level.{_relatives(scores)}",
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
    lines += [*_summary(rows, names, order, cells), "", ROWS]
    lines += [
        "",
        "![Mean ranks](figures/ranks.png)",
        "",
        "![Accuracy and time](figures/time.png)",
        "",
        "![Gain and imbalance](figures/ratio.png)",
        "",
        "## Balanced accuracy, each training set",
        "",
        "Mean ± standard deviation over seeds, where there are several; the best of a column is "
        "bold.",
        "",
    ]
    lines += _details(table, cells, names)
    hardware, versions, commits = (
        ", ".join(sorted({str(row[name]) for row in rows}))
        for name in ("hardware", "versions", "commit")
    )
    hours = sum(row["fit_seconds"] + row["predict_seconds"] for row in rows) / 3600
    lines += [
        "",
        f"{len(rows)} fits, {hours:.1f} hours of one core; {hardware}; {versions}; {commits}.",
        "",
        "Rerun: `python benchmarks/compare.py FOLDER --suite core --out results --jobs 2`, "
        "then `python benchmarks/report.py results/results.csv`.",
    ]
    return "\n".join(lines) + "\n"


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


def _relatives(scores: dict[str, np.ndarray]) -> str:
    """Each paper's method against its plain relative, where both are there."""
    parts = []
    for name, plain in RELATIVES.items():
        if {name, plain} <= set(scores):
            gain = scores[name] - scores[plain]
            error = gain.std() / np.sqrt(len(gain))
            parts.append(f"{name} {gain.mean():+.3f} ± {error:.3f} ({plain})")
    return f" Against what they add to: {', '.join(parts)}." if parts else ""


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
) -> list[str]:
    """All measures, mean over training sets."""
    columns = {title: means(gather(rows, name), cells) for name, title in MEASURES.items()}
    seconds = means(gather(rows, "fit_seconds"), cells)
    head = ["method", "mean rank", *columns, "fit, median s"]
    lines = ["| " + " | ".join(head) + " |", "|--" * len(head) + "|"]
    for name in names:
        values = [_shown(of[name]) for of in columns.values()]
        line = [name, f"{order[name]:.1f}", *values, f"{np.median(seconds[name]):.1f}"]
        lines.append("| " + " | ".join(line) + " |")
    return lines


def _shown(values: np.ndarray) -> str:
    return f"{np.nanmean(values):.3f}" if np.isfinite(values).any() else ""


def _details(table: Table, cells: list[tuple[str, str]], names: list[str]) -> list[str]:
    """Make one table per collection: methods by cuts."""
    lines = []
    for data in sorted({data for data, _ in cells}):
        cuts = sorted((cut for d, cut in cells if d == data), key=_places)
        lines += [f"### {data.replace('_', ' ')}", "", "| method | " + " | ".join(cuts) + " |"]
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
    args = parser.parse_args()
    rows = shared(read(args.table))
    (args.out / "figures").mkdir(parents=True, exist_ok=True)
    (args.out / "RESULTS.md").write_text(page(rows))
    table = gather(rows, "balanced_accuracy")
    cells = sorted({_cell(row) for row in rows})
    scores = means(table, cells)
    order = ranks(scores)
    figures = args.out / "figures"
    rank_figure(order, critical_difference(len(order), len(cells)), figures / "ranks.png")
    time_figure(scores, means(gather(rows, "fit_seconds"), cells), figures / "time.png")
    ratio_figure(rows, order, figures / "ratio.png")
    print(f"page: {args.out / 'RESULTS.md'}")


if __name__ == "__main__":
    main()
