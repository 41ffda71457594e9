"""Recall of every class, from the most frequent one to the rarest."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.utils import check_consistent_length

from sklearn_medimb.inspection._figure import COLOURS, Display, written
from sklearn_medimb.metrics import metric_interval
from sklearn_medimb.metrics._labels import kind_of_entries, labels_of
from sklearn_medimb.metrics._recalls import class_counts
from sklearn_medimb.metrics._scorers import training_counts


class RecallByClassDisplay(Display):
    r"""Recall of each class with its interval, head to tail.

    Make one with :meth:`from_estimator` or :meth:`from_predictions`.

    Parameters
    ----------
    classes : ndarray of shape (K,)
        Labels, most frequent first.
    recall, low, high : ndarray of shape (K,)
        Share that is found of each class, and the bounds of its interval.
    n_train, n_test : ndarray of int of shape (K,)
        Images of each class.
    level : float, default=0.95
        Coverage of the intervals.

    Attributes
    ----------
    ax_ : matplotlib Axes
        The axes.
    figure_ : matplotlib Figure
        The figure.

    See Also
    --------
    sklearn_medimb.metrics.metric_interval : The intervals: Wilson's, by patients with `groups`.

    Examples
    --------
    >>> from sklearn_medimb.inspection import RecallByClassDisplay
    >>> y_true, y_pred = [0] * 20 + [1] * 5, [0] * 18 + [1] * 5 + [0] * 2
    >>> display = RecallByClassDisplay.from_predictions(y_true, y_pred, train_counts={0: 80, 1: 9})
    >>> display.ax_.get_title(loc="left")
    'Recall falls from .90 (0, 80 training images)\nto .60 (1, 9)'
    """

    def __init__(
        self,
        *,
        classes: np.ndarray,
        recall: np.ndarray,
        low: np.ndarray,
        high: np.ndarray,
        n_train: np.ndarray,
        n_test: np.ndarray,
        level: float = 0.95,
    ) -> None:
        self.classes = classes
        self.recall = recall
        self.low = low
        self.high = high
        self.n_train = n_train
        self.n_test = n_test
        self.level = level

    @classmethod
    def from_predictions(
        cls,
        y_true: Any,
        y_pred: Any,
        *,
        train_counts: Any,
        groups: Any = None,
        level: float = 0.95,
        ax: Any = None,
    ) -> RecallByClassDisplay:
        """Draw the recalls of predictions.

        Parameters
        ----------
        y_true, y_pred : array-like of shape (n,)
            True and predicted labels.
        train_counts : dict or pandas.Series from label to int, or array-like of labels
            As in :func:`~sklearn_medimb.metrics.shot_recall`.
        groups : array-like of shape (n,), default=None
            Patient of each image: the intervals are about further patients.
        level : float, default=0.95
            Coverage of the intervals.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : RecallByClassDisplay
            Drawn.

        Raises
        ------
        ValueError
            If `train_counts` lacks a class of `y_true`, or a row has no label.
        """
        y_true, y_pred = labels_of(y_true, "y_true"), labels_of(y_pred, "y_pred")
        check_consistent_length(y_true, y_pred)
        kinds = kind_of_entries(y_true, "y_true"), kind_of_entries(y_pred, "y_pred")
        if kinds[0] != kinds[1]:
            raise ValueError("y_true holds {}s, y_pred {}s: labels are of one kind.".format(*kinds))
        classes, n_test = np.unique(y_true, return_counts=True)
        counts = class_counts(train_counts, set(classes.tolist()))
        if missing := [label for label in classes.tolist() if label not in counts]:
            raise ValueError(f"train_counts lacks the classes {missing} of y_true.")
        n_train = np.array([counts[label] for label in classes.tolist()])
        order = np.argsort(-n_train, kind="stable")
        # Of a class against the rest: of many classes at once a search through all images would
        # ask which of the others each might be taken for.
        found = []
        for label in classes[order]:
            own = (y_true == label).astype(int)
            hit = own * (y_pred == label)
            found.append(
                metric_interval(_recall, own, hit, labels=[0, 1], groups=groups, level=level)
            )
        score, low, high = np.array(found).T
        return cls(
            classes=classes[order],
            recall=score,
            low=low,
            high=high,
            n_train=n_train[order],
            n_test=n_test[order],
            level=level,
        ).plot(ax)

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: Any,
        *,
        train_counts: Any = None,
        groups: Any = None,
        level: float = 0.95,
        ax: Any = None,
    ) -> RecallByClassDisplay:
        """Draw the recalls of a fitted classifier.

        Parameters
        ----------
        estimator : classifier
            Fitted.
        X : array-like or lazy sequence of n images
            Images that it has not seen.
        y : array-like of shape (n,)
            Their classes.
        train_counts : dict, pandas.Series or array-like, default=None
            None asks the classifier, or the one within a pipeline or a search.
        groups, level, ax
            As in :meth:`from_predictions`.

        Returns
        -------
        display : RecallByClassDisplay
            Drawn.

        Raises
        ------
        ValueError
            If the classifier does not tell what it was trained on, and `train_counts` is None.
        """
        counts = training_counts(estimator) if train_counts is None else train_counts
        return cls.from_predictions(
            y, estimator.predict(X), train_counts=counts, groups=groups, level=level, ax=ax
        )

    @property
    def _size(self) -> tuple[float, float]:
        return 6.8, 0.42 * len(self.classes) + 1.5

    def _draw(self, ax: Any) -> None:
        n = len(self.classes)
        places, rare = np.arange(n), self.n_train < self.n_train.max()
        colours = np.where(rare, COLOURS[1], COLOURS[0])
        ax.barh(places, self.recall, color=colours, height=0.62)
        reach = np.stack([self.recall - self.low, self.high - self.recall]).clip(min=0)
        ax.errorbar(self.recall, places, xerr=reach, fmt="none", ecolor="black", capsize=3, lw=1.2)
        names = [f"{written(k)}\n{a} train, {b} test" for k, a, b in self._rows()]
        ax.set_yticks(places, names, fontsize=8)
        ax.set_ylim(n - 0.5, -0.5)
        ax.set_xlim(0, 1)
        ax.set_xlabel(f"recall, with its {100 * self.level:g} % interval")
        ax.set_title(self._finding(), loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)

    def _rows(self) -> Any:
        return zip(self.classes.tolist(), self.n_train, self.n_test, strict=True)

    def _finding(self) -> str:
        head, tail = self.recall[0], self.recall[-1]
        words = "falls from" if tail < head else "rises from" if tail > head else "is equal, from"
        first, last = written(self.classes[0]), written(self.classes[-1])
        return (
            f"Recall {words} {_short(head)} ({first}, {self.n_train[0]} training images)\n"
            f"to {_short(tail)} ({last}, {self.n_train[-1]})"
        )


def _recall(own: np.ndarray, hit: np.ndarray) -> float:
    return float((hit[own == 1] == 1).mean()) if own.any() else np.nan


def _short(share: float) -> str:
    """As .90, the way tables write it."""
    return f"{share:.2f}".removeprefix("0")
