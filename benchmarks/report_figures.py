"""Figures of the page."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from report_rows import BASELINE, PAPERS, PLAIN

mpl.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000"]


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


class Course(NamedTuple):
    """One axis of the figure of curves, and its lines."""

    label: str
    places: list[float]
    ticks: list[str]
    lines: dict[str, np.ndarray]  # of each method: place, height, and ends of the interval


def curves_figure(by_size: Course, by_ratio: Course, path: Path) -> None:
    """Balanced accuracy against images, and against imbalance; bands are over sets."""
    fig, axes = plt.subplots(1, 2, figsize=(9.5, 4.2), sharey=True, layout="constrained")
    for ax, course in zip(axes, (by_size, by_ratio), strict=True):
        ax.set_xscale("log")
        for colour, (method, ends) in zip(COLOURS, course.lines.items(), strict=False):
            x, y, low, high = ends.T
            ax.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)
            ax.plot(x, y, "o-", color=colour, label=method, markersize=4)
        ax.set_xticks(course.places, course.ticks)
        ax.xaxis.minorticks_off()
        ax.set_xlabel(f"{course.label} (sets)")
        ax.grid(axis="y", color="0.9", linewidth=0.6)
    axes[0].set_ylabel("balanced accuracy")
    fig.legend(
        *axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4
    )
    fig.savefig(path, dpi=140, metadata={"Software": None})
    plt.close(fig)
