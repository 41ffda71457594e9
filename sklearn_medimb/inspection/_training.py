"""How a training went."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

from sklearn_medimb.inspection._figure import COLOURS, Display


class TrainingCurveDisplay(Display):
    """Training loss of every epoch, its score on validation rows, and the stages.

    Make one with :meth:`from_estimator`.

    Parameters
    ----------
    history : list of dict
        Epochs, as ``history_`` of an estimator has them.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes of the loss.
    score_ax_ : matplotlib Axes or None
        Axes of the score, where there is one.
    figure_ : matplotlib Figure
        The figure.

    Examples
    --------
    >>> from sklearn_medimb import SoftmaxClassifier
    >>> from sklearn_medimb.datasets import make_lesions
    >>> from sklearn_medimb.inspection import TrainingCurveDisplay
    >>> data = make_lesions([12, 6], image_size=16, random_state=0)
    >>> clf = SoftmaxClassifier(max_epochs=3, random_state=0).fit(data.images, data.target)
    >>> TrainingCurveDisplay.from_estimator(clf).ax_.get_xlabel()
    'epoch'
    """

    def __init__(self, history: list[dict[str, Any]]) -> None:
        self.history = history

    @classmethod
    def from_estimator(cls, estimator: Any, *, ax: Any = None) -> TrainingCurveDisplay:
        """Draw the training of a fitted image classifier or encoder.

        Parameters
        ----------
        estimator : image classifier or encoder
            Fitted.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : TrainingCurveDisplay
            Drawn.

        Raises
        ------
        TypeError
            If the estimator keeps no history.
        ValueError
            If nothing was trained epoch by epoch.
        """
        check_is_fitted(estimator)
        if not hasattr(estimator, "history_"):
            raise TypeError(
                f"estimator must be of this package, not a {type(estimator).__name__}: of a "
                "pipeline or a search, pass the estimator within."
            )
        history = [row for row in estimator.history_ if "train_loss" in row]
        if not history:
            raise ValueError(f"{type(estimator).__name__} has no epochs: nothing was trained.")
        return cls(history).plot(ax)

    def _draw(self, ax: Any) -> None:
        epochs = np.arange(1, len(self.history) + 1)
        marker = "o" if len(epochs) < 25 else None
        # Losses of different stages are no one curve.
        start = 0
        for stage, rows in groupby(self.history, lambda row: row.get("stage")):
            losses = [row["train_loss"] for row in rows]
            part = slice(start, start + len(losses))
            ax.plot(epochs[part], losses, color=COLOURS[0], marker=marker, ms=3)
            if start:
                ax.axvline(start + 0.5, color="0.6", lw=1, ls=":")
            if stage:
                ax.annotate(
                    stage, (start + 0.6, 1), xycoords=("data", "axes fraction"), va="bottom",
                    fontsize=8, color="0.3",
                )  # fmt: skip
            start += len(losses)
        ax.set_xlabel("epoch")
        ax.set_ylabel("training loss", color=COLOURS[0])
        ax.spines["top"].set_visible(False)
        ax.set_xlim(0.5, len(epochs) + 0.5)
        ax.xaxis.get_major_locator().set_params(integer=True)
        self.score_ax_ = None
        scores = np.array([row.get("valid_score", np.nan) for row in self.history], dtype=float)
        title = f"Training loss went from {self._loss(0)} to {self._loss(-1)}"
        if np.isfinite(scores).any():
            best = int(np.nanargmax(scores))
            twin = ax.twinx()
            twin.plot(epochs, scores, color=COLOURS[1], marker="s", ms=3, ls="--")
            twin.plot(epochs[best], scores[best], "o", ms=9, mfc="none", color=COLOURS[1])
            twin.set_ylabel("validation score", color=COLOURS[1])
            twin.spines["top"].set_visible(False)
            self.score_ax_ = twin
            title = f"Best validation score, {scores[best]:.2f}, in epoch {best + 1}"
        ax.set_title(title, loc="left", fontsize=10, pad=16)

    def _loss(self, epoch: int) -> str:
        return f"{self.history[epoch]['train_loss']:.3g}"
