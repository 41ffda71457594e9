"""What a comparison found: a table, a sentence, a figure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sklearn_medimb.inspection._figure import COLOURS, new_axes, written
from sklearn_medimb.metrics import Interval


class Comparison:
    """What :func:`compare_methods` found.

    Attributes
    ----------
    names : list of str
        Methods, the best first by the first metric.
    scores : dict from metric to dict from method to Interval
        Of the predictions of all folds together.
    differences : dict from metric to dict from method to Interval
        Method minus `baseline`, on the same images. Together, over all methods, the intervals of a
        metric hold with the level that was asked for (Bonferroni).
    baseline : str
        What the others are compared with.
    fit_seconds, predict_seconds : dict from method to float
        Mean over folds.
    y_true : ndarray of shape (n_tested,)
        Labels of the images in `rows`.
    predictions : dict from method to ndarray of shape (n_tested,)
        Of the images in `rows`, each made by a classifier that has not seen them.
    probabilities : dict from method to ndarray of shape (n_tested, K)
        Where a method gives them; columns follow `classes`.
    classes : ndarray of shape (K,)
        Labels.
    rows : ndarray of int of shape (n_tested,)
        The rows of X that were tested.
    folds : list of (ndarray of int, ndarray of int)
        Training and test rows.
    estimators : dict from method to classifier
        Not fitted, with their seeds.
    failures : dict from method to str
        Why a method is not among `names`.
    level : float
        Coverage of the intervals.
    n_images, n_patients : int
        What was tested; patients are None where `groups` was not given.
    """

    names: list[str]
    scores: dict[str, dict[str, Interval]]
    differences: dict[str, dict[str, Interval]]
    baseline: str
    fit_seconds: dict[str, float]
    predict_seconds: dict[str, float]
    y_true: np.ndarray
    predictions: dict[str, np.ndarray]
    probabilities: dict[str, np.ndarray]
    classes: np.ndarray
    rows: np.ndarray
    folds: list[tuple[np.ndarray, np.ndarray]]
    estimators: dict[str, Any]
    failures: dict[str, str]
    level: float
    n_images: int
    n_patients: int | None

    def __init__(self, **found: Any) -> None:
        vars(self).update(found)

    def records(self) -> list[dict[str, Any]]:
        """Rows of the table, as dicts of numbers.

        Returns
        -------
        records : list of dict
            ``method``; of each metric its score, ``(low)``, ``(high)``, and the same of the
            difference; ``fit_seconds`` and ``predict_seconds``.
        """
        table = []
        for name in self.names:
            row: dict[str, Any] = {"method": name}
            for metric, found in self.scores.items():
                parts = {"": found[name], f" - {self.baseline}": self.differences[metric][name]}
                for what, (score, low, high) in parts.items():
                    row[f"{metric}{what}"] = score
                    row[f"{metric}{what} (low)"] = low
                    row[f"{metric}{what} (high)"] = high
            row["fit_seconds"] = self.fit_seconds[name]
            row["predict_seconds"] = self.predict_seconds[name]
            table.append(row)
        return table

    def to_frame(self) -> Any:
        """The table as a pandas.DataFrame, a row for each method.

        Returns
        -------
        frame : pandas.DataFrame
            With the columns of :meth:`records`.
        """
        import pandas as pd

        return pd.DataFrame(self.records()).set_index("method")

    def finding(self) -> str:
        """In a sentence, who leads and whether by more than chance.

        Returns
        -------
        finding : str
            By the first metric, against the baseline.
        """
        return self._finding(str)

    def _finding(self, say: Callable[[str], str]) -> str:
        metric, found = next(iter(self.scores.items()))
        best = self.names[0]
        lead = f"{say(best)} leads: {_text(found[best])}"
        if best == self.baseline:
            return f"{lead}; no method is ahead of it"
        difference = self.differences[metric][best]
        sure = difference.low > 0
        words = "ahead of" if sure else "not told apart from"
        return f"{lead}; {words} {say(self.baseline)}, {_text(difference, signed=True)}"

    def __str__(self) -> str:
        head = ["method"]
        for metric in self.scores:
            head += [metric, f"- {self.baseline}"]
        lines = [[*head, "fit [s]"]]
        for name in self.names:
            cells = [name]
            for metric, found in self.scores.items():
                difference = self.differences[metric][name]
                own = "" if name == self.baseline else _text(difference, signed=True)
                cells += [_text(found[name]), own]
            lines.append([*cells, f"{self.fit_seconds[name]:.1f}"])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in lines]
        tested = f"{self.n_images} images"
        if self.n_patients is not None:
            tested += f" of {self.n_patients} patients"
        about = f"{tested}, each tested once; intervals of {100 * self.level:g} %"
        failed = [f"{name} failed: {why}" for name, why in self.failures.items()]
        return "\n".join(row.rstrip() for row in [*rows, "", about, self.finding(), *failed])

    __repr__ = __str__

    def plot(self, metric: str | None = None, *, ax: Any = None) -> Any:
        """Draw the scores with their intervals, the best on top.

        Parameters
        ----------
        metric : str, default=None
            Name of a metric; None takes the first.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        ax : matplotlib Axes
            Drawn. Filled: what is told apart from the baseline.
        """
        chosen = next(iter(self.scores)) if metric is None else metric
        if chosen not in self.scores:
            raise ValueError(f"metric={metric!r} must be one of {list(self.scores)}.")
        found, apart = self.scores[chosen], self.differences[chosen]
        ax = new_axes(self, ax, (6.8, 0.34 * len(self.names) + 1.6))
        for place, name in enumerate(self.names):
            score, low, high = found[name]
            colour = COLOURS[0] if name != self.baseline else COLOURS[1]
            is_apart = name != self.baseline and (apart[name].low > 0 or apart[name].high < 0)
            ax.errorbar(
                score, place, xerr=[[max(score - low, 0)], [max(high - score, 0)]], fmt="o",
                color=colour, mfc=colour if is_apart or name == self.baseline else "white",
                capsize=3, lw=1.2, ms=6,
            )  # fmt: skip
        ax.axvline(found[self.baseline].score, color=COLOURS[1], lw=0.8, ls=":")
        ax.set_yticks(range(len(self.names)), map(written, self.names), fontsize=9)
        ax.invert_yaxis()
        ax.set_xlabel(f"{written(chosen)}, with its {100 * self.level:g} % interval")
        said = self._finding(written).replace("; ", "\n")
        title = said if metric is None else written(chosen)
        ax.set_title(title, loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        return ax


def _text(interval: Interval, *, signed: bool = False) -> str:
    """As .71 [.65, .78]."""
    score, low, high = (_number(float(part), signed) for part in interval)
    return f"{score} [{low}, {high}]"


def _number(value: float, signed: bool) -> str:
    return f"{value:+.2f}" if signed else f"{value:.2f}".removeprefix("0")
