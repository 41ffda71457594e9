"""Whether probabilities of each class come true."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.utils import check_consistent_length

from sklearn_medimb.inspection._figure import MOST_NAMED, Display, legend, style, written
from sklearn_medimb.metrics import expected_calibration_error
from sklearn_medimb.metrics._labels import labels_of


class CalibrationByClassDisplay(Display):
    """How often a class is right where it was given a probability, for each class.

    Make one with :meth:`from_estimator` or :meth:`from_predictions`.

    Parameters
    ----------
    classes : ndarray of shape (K,)
        Labels.
    predicted, observed, n : list of K ndarray
        Of each class and bin that is not empty: mean probability, share of the images that are of
        the class, and number of images.
    errors : ndarray of shape (K,)
        Calibration error of each class against the rest.

    Attributes
    ----------
    ax_ : matplotlib Axes
        The axes.
    figure_ : matplotlib Figure
        The figure.

    See Also
    --------
    sklearn_medimb.metrics.expected_calibration_error : The errors.

    Notes
    -----
    Methods that balance the classes give probabilities for classes that are equally frequent: on
    images in their natural frequencies such a class lies below the diagonal.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn_medimb.inspection import CalibrationByClassDisplay
    >>> y, p = np.repeat([0, 1], [30, 10]), np.linspace(0.05, 0.9, 40)
    >>> proba = np.column_stack([1 - p, p])
    >>> display = CalibrationByClassDisplay.from_predictions(y, proba, classes=[0, 1])
    >>> len(display.errors)
    2
    """

    _size = (5.2, 5.2)

    def __init__(
        self,
        *,
        classes: np.ndarray,
        predicted: list[np.ndarray],
        observed: list[np.ndarray],
        n: list[np.ndarray],
        errors: np.ndarray,
    ) -> None:
        self.classes = classes
        self.predicted = predicted
        self.observed = observed
        self.n = n
        self.errors = errors

    @classmethod
    def from_predictions(
        cls, y_true: Any, y_proba: Any, *, classes: Any, n_bins: int = 8, ax: Any = None
    ) -> CalibrationByClassDisplay:
        """Draw the calibration of probabilities.

        Parameters
        ----------
        y_true : array-like of shape (n,)
            True labels.
        y_proba : array-like of shape (n, K)
            Probabilities.
        classes : array-like of shape (K,)
            Labels of the columns.
        n_bins : int, default=8
            Bins of equally many images.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : CalibrationByClassDisplay
            Drawn.

        Raises
        ------
        ValueError
            If the columns are no probabilities of `classes`.
        """
        y_true, proba = labels_of(y_true, "y_true"), np.asarray(y_proba, dtype=np.float64)
        check_consistent_length(y_true, proba)
        classes = np.asarray(classes)
        how: dict[str, Any] = {"n_bins": n_bins, "strategy": "quantile"}
        expected_calibration_error(y_true, proba, labels=classes, **how)  # checks them
        parts: dict[str, list[Any]] = {"predicted": [], "observed": [], "n": []}
        errors = []
        for label, p in zip(classes.tolist(), proba.T, strict=True):
            hit = y_true == label
            errors.append(
                expected_calibration_error(
                    hit, np.column_stack([1 - p, p]), labels=[False, True], class_wise=True, **how
                )
            )
            order = np.array_split(np.argsort(p, kind="stable"), min(n_bins, len(p)))
            parts["predicted"].append(np.array([p[rows].mean() for rows in order]))
            parts["observed"].append(np.array([hit[rows].mean() for rows in order]))
            parts["n"].append(np.array([len(rows) for rows in order]))
        return cls(classes=classes, errors=np.array(errors), **parts).plot(ax)

    @classmethod
    def from_estimator(
        cls, estimator: Any, X: Any, y: Any, *, n_bins: int = 8, ax: Any = None
    ) -> CalibrationByClassDisplay:
        """Draw the calibration of a fitted classifier.

        Parameters
        ----------
        estimator : classifier
            Fitted, with ``predict_proba``.
        X : array-like or lazy sequence of n images
            Images that it has not seen.
        y : array-like of shape (n,)
            Their classes.
        n_bins, ax
            As in :meth:`from_predictions`.

        Returns
        -------
        display : CalibrationByClassDisplay
            Drawn.
        """
        proba = estimator.predict_proba(X)
        return cls.from_predictions(y, proba, classes=estimator.classes_, n_bins=n_bins, ax=ax)

    def _draw(self, ax: Any) -> None:
        ax.plot([0, 1], [0, 1], color="0.6", lw=1, ls=":")
        named = np.sort(np.argsort(-self.errors, kind="stable")[:MOST_NAMED])
        for k in np.setdiff1d(np.arange(len(self.classes)), named):
            ax.plot(self.predicted[k], self.observed[k], color="0.8", lw=0.8, zorder=1)
        for place, k in enumerate(named):
            name = f"{written(self.classes[k])}: error {self.errors[k]:.2f}"
            ax.plot(
                self.predicted[k], self.observed[k], ms=5, lw=1.4, label=name, **style(place)
            )  # fmt: skip
        ax.set_xlabel("probability that was given")
        ax.set_ylabel("share that it was")
        ax.set_xlim(-0.02, 1.02)
        ax.set_ylim(-0.02, 1.02)
        ax.set_aspect("equal")
        rest = len(self.classes) - len(named)
        title = f"the least true; gray: {rest} more" if rest else None
        legend(ax, len(named), loc="upper left", title=title, title_fontsize=8)
        worst = int(self.errors.argmax())
        ax.set_title(
            f"Least true: {written(self.classes[worst])}, by {self.errors[worst]:.2f} on average",
            loc="left",
            fontsize=10,
        )
        ax.spines[["top", "right"]].set_visible(False)
