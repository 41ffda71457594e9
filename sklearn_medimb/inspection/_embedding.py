"""Where the classes lie in the space of features."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import recall_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_consistent_length

from sklearn_medimb.inspection._figure import Display, legend, style, written
from sklearn_medimb.metrics._labels import labels_of


class EmbeddingDisplay(Display):
    """Features of images on two axes, by class, the rarest in front.

    Make one with :meth:`from_estimator` or :meth:`from_features`.

    Parameters
    ----------
    points : ndarray of shape (n, 2)
        Places of the images.
    labels : ndarray of shape (n,)
        Their classes.
    purity : dict from label to float
        Of each class, the share of images whose nearest neighbour in the space of all features is
        of the same class; NaN of a class with one image, which has no such neighbour.

    Attributes
    ----------
    ax_ : matplotlib Axes
        The axes.
    figure_ : matplotlib Figure
        The figure.

    Notes
    -----
    Two axes show little of hundreds. What the title says, the nearest neighbours, is of all
    features. Draw images that were not trained on: of those that were, classes always part.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn_medimb.inspection import EmbeddingDisplay
    >>> y = np.repeat(["common", "rare"], [30, 6])
    >>> features = np.random.default_rng(0).normal(size=(36, 5)) + 4 * (y == "rare")[:, np.newaxis]
    >>> EmbeddingDisplay.from_features(features, y).points.shape
    (36, 2)
    """

    _size = (6.2, 5.0)

    def __init__(self, *, points: np.ndarray, labels: np.ndarray, purity: dict[Any, float]) -> None:
        self.points = points
        self.labels = labels
        self.purity = purity

    @classmethod
    def from_features(
        cls, features: Any, y: Any, *, method: str = "pca", random_state: Any = 0, ax: Any = None
    ) -> EmbeddingDisplay:
        """Draw features.

        Parameters
        ----------
        features : array-like of shape (n, d)
            As ``transform`` gives them.
        y : array-like of shape (n,)
            Classes.
        method : {"pca", "tsne"}, default="pca"
            Principal components, or t-SNE, whose distances between groups mean nothing.
        random_state : int, RandomState or None, default=0
            For t-SNE.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : EmbeddingDisplay
            Drawn.

        Raises
        ------
        ValueError
            If the method is unknown, or there are fewer than three images.
        """
        if method not in ("pca", "tsne"):
            raise ValueError(f'method={method!r} must be "pca" or "tsne".')
        labels = labels_of(y, "y")
        features = np.asarray(features, dtype=np.float64)
        check_consistent_length(features, labels)
        if features.ndim != 2 or len(features) < 3:
            raise ValueError(
                f"features has shape {features.shape}; it must be (n, d) with n >= 3 images."
            )
        features = StandardScaler().fit_transform(features)
        codes, counts = np.unique(labels, return_inverse=True, return_counts=True)[1:]
        neighbours = KNeighborsClassifier(1).fit(features, codes)
        nearest = codes[neighbours.kneighbors(return_distance=False)[:, 0]]
        recalls = recall_score(codes, nearest, average=None, labels=np.arange(codes.max() + 1))
        recalls[counts == 1] = np.nan
        purity = dict(zip(np.unique(labels).tolist(), recalls.tolist(), strict=True))
        if features.shape[1] == 1:
            features = np.pad(features, [(0, 0), (0, 1)])
        if method == "pca":
            points = PCA(2, random_state=random_state).fit_transform(features)
        else:
            perplexity = min(30.0, (len(features) - 1) / 3)
            points = TSNE(perplexity=perplexity, random_state=random_state).fit_transform(features)
        return cls(points=points, labels=labels, purity=purity).plot(ax)

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: Any,
        *,
        method: str = "pca",
        random_state: Any = 0,
        ax: Any = None,
    ) -> EmbeddingDisplay:
        """Draw the features of a fitted image classifier, encoder, or any transformer.

        Parameters
        ----------
        estimator : estimator with ``transform``
            Fitted.
        X : array-like or lazy sequence of n images
            Images that it has not seen.
        y : array-like of shape (n,)
            Their classes.
        method, random_state, ax
            As in :meth:`from_features`.

        Returns
        -------
        display : EmbeddingDisplay
            Drawn.
        """
        return cls.from_features(
            estimator.transform(X), y, method=method, random_state=random_state, ax=ax
        )

    def _draw(self, ax: Any) -> None:
        classes, counts = np.unique(self.labels, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        for k, label in zip(order, classes[order].tolist(), strict=True):  # the rarest in front
            own = self.labels == label
            size = 18 if counts[k] == counts.max() else 34
            pure = self.purity[label]
            name = f"{written(label)} ({counts[k]})" + ("" if np.isnan(pure) else f": {pure:.2f}")
            ax.scatter(
                *self.points[own].T, s=size, alpha=0.8, lw=0.4, ec="white", label=name, **style(k)
            )
        legend(ax, len(classes), title="class (images): pure", title_fontsize=8)
        ax.set_xticks([])
        ax.set_yticks([])
        several = {label: share for label, share in self.purity.items() if not np.isnan(share)}
        title = "No class has two images"
        if several:
            worst, share = min(several.items(), key=lambda pair: pair[1])
            name = written(worst)
            title = f"The nearest image to one of {name} is of {name} in {100 * share:.0f} %"
        ax.set_title(title, loc="left", fontsize=10)
        ax.spines[:].set_color("0.8")
