"""What refusing the least certain images brings."""

from __future__ import annotations

from typing import Any

import numpy as np

from sklearn_medimb.decisions import coverage_curve
from sklearn_medimb.inspection._figure import COLOURS, Display


class CoverageDisplay(Display):
    """Share of wrong answers among the images that a classifier is most certain of.

    Make one with :meth:`from_estimator` or :meth:`from_predictions`.

    Parameters
    ----------
    coverage : ndarray of shape (n,)
        Share of the images that are answered, ascending.
    error : ndarray of shape (n,)
        Share of wrong answers among them.
    area : float
        Under the curve.

    Attributes
    ----------
    ax_ : matplotlib Axes
        The axes.
    figure_ : matplotlib Figure
        The figure.

    See Also
    --------
    sklearn_medimb.decisions.SelectiveClassifier : Refuses the least certain.

    Examples
    --------
    >>> from sklearn_medimb.inspection import CoverageDisplay
    >>> display = CoverageDisplay.from_predictions([0, 1, 1, 0], [0.1, 0.9, 0.8, 0.6])
    >>> display.ax_.get_title(loc="left")
    'Errors are 25 % of all images, 0 % of the most certain half'
    """

    def __init__(self, *, coverage: np.ndarray, error: np.ndarray, area: float) -> None:
        self.coverage = coverage
        self.error = error
        self.area = area

    @classmethod
    def from_predictions(
        cls, y_true: Any, y_proba: Any, *, classes: Any = None, ax: Any = None
    ) -> CoverageDisplay:
        """Draw the curve of probabilities.

        Parameters
        ----------
        y_true : array-like of shape (n,)
            True labels.
        y_proba : array-like of shape (n, K) or (n,)
            Probabilities, as in :func:`~sklearn_medimb.decisions.coverage_curve`.
        classes : array-like of shape (K,), default=None
            Labels of the columns; None takes those of `y_true`, sorted.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : CoverageDisplay
            Drawn.
        """
        curve = coverage_curve(y_true, y_proba, labels=classes)
        return cls(coverage=curve.coverage, error=curve.error, area=curve.area).plot(ax)

    @classmethod
    def from_estimator(cls, estimator: Any, X: Any, y: Any, *, ax: Any = None) -> CoverageDisplay:
        """Draw the curve of a fitted classifier.

        Parameters
        ----------
        estimator : classifier
            Fitted, with ``predict_proba``.
        X : array-like or lazy sequence of n images
            Images that it has not seen.
        y : array-like of shape (n,)
            Their classes.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : CoverageDisplay
            Drawn.
        """
        proba = estimator.predict_proba(X)
        return cls.from_predictions(y, proba, classes=estimator.classes_, ax=ax)

    def _draw(self, ax: Any) -> None:
        ax.step(self.coverage, self.error, where="pre", color=COLOURS[0], lw=1.6)
        ax.axhline(self.error[-1], color="0.6", lw=1, ls=":")
        ax.set_xlabel("share of images that are answered, the most certain first")
        ax.set_ylabel("share of wrong answers among them")
        ax.set_xlim(0, 1)
        ax.set_ylim(bottom=0)
        half = self.error[np.searchsorted(self.coverage, 0.5 - 1e-9)]
        ax.set_title(
            f"Errors are {100 * self.error[-1]:.0f} % of all images, {100 * half:.0f} % of the "
            "most certain half",
            loc="left",
            fontsize=10,
        )
        ax.spines[["top", "right"]].set_visible(False)
