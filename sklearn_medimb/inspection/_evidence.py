"""CSSN's evidence: a query, the nearest support of every class, and the places that speak."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.utils.validation import _num_samples

from sklearn_medimb.inspection._figure import (
    COLOURS,
    grid_of_axes,
    percent,
    pictures_of,
    pyplot,
    show,
    verdict,
    written,
)
from sklearn_medimb.metrics._labels import labels_of

_MAX_QUERIES = 12
_MAX_CLASSES = 6  # whose supports stand beside a query: of more, those most alike, and its own


class SimilarityEvidenceDisplay:
    """Each query with the places that speak for its class, beside the nearest support of each.

    Make one with :meth:`from_estimator`. Of a query: the picture, then the picture under its map,
    where red places speak for the predicted class and blue ones against it. Of a support: the
    place that makes it most like the query, and the probability that both are of one class. Boxes
    of the predicted class are drawn in full lines, those of the others dashed.

    Parameters
    ----------
    queries : ndarray of shape (n, H, W) or (n, H, W, 3)
        Pictures with values in [0, 1]; of volumes the middle slice.
    supports : ndarray of shape (n, K, H, W) or (n, K, H, W, 3)
        Nearest support of each class; NaN where there is none.
    evidence : Evidence
        Of :meth:`sklearn_medimb.CSSNClassifier.explain`.
    probability : ndarray of shape (n,)
        Of the predicted class.
    labels : ndarray of shape (n,), default=None
        True classes.

    Attributes
    ----------
    axes_ : ndarray of matplotlib Axes of shape (n, 2 + min(K, 6))
        The axes; of more than six classes each query has the predicted one, its own,
        and those that it is most like.
    figure_ : matplotlib Figure
        The figure.

    References
    ----------
    X. Gao et al., "Cross-Supervision Similarity Network for Medical Image Classification on
    Imbalanced Small Datasets", IEEE Trans. Medical Imaging, 2026. The maps are ours: see
    :meth:`sklearn_medimb.CSSNClassifier.explain`.

    Examples
    --------
    >>> from sklearn_medimb import CSSNClassifier
    >>> from sklearn_medimb.datasets import make_lesions
    >>> from sklearn_medimb.inspection import SimilarityEvidenceDisplay
    >>> data = make_lesions([12, 6], image_size=16, random_state=0)
    >>> X, y = data.images, data.target
    >>> clf = CSSNClassifier(max_epochs=1, random_state=0).fit(X, y)
    >>> display = SimilarityEvidenceDisplay.from_estimator(clf, X[:2], supports=X, y=y[:2])
    >>> display.axes_.shape
    (2, 4)
    """

    def __init__(
        self,
        *,
        queries: np.ndarray,
        supports: np.ndarray,
        evidence: Any,
        probability: np.ndarray,
        labels: np.ndarray | None = None,
    ) -> None:
        self.queries = queries
        self.supports = supports
        self.evidence = evidence
        self.probability = probability
        self.labels = labels

    @classmethod
    def from_estimator(
        cls, estimator: Any, X: Any, *, supports: Any, y: Any = None, axes: Any = None
    ) -> SimilarityEvidenceDisplay:
        """Draw the evidence for some images.

        Parameters
        ----------
        estimator : CSSNClassifier
            Fitted.
        X : array-like or lazy sequence of n images
            The queries, at most 12.
        supports : array-like or lazy sequence of images
            X of ``fit``, all its rows: the classifier keeps no images.
        y : array-like of shape (n,), default=None
            Classes of the queries, for the titles.
        axes : array-like of matplotlib Axes of shape (n, 2 + min(K, 6)), default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : SimilarityEvidenceDisplay
            Drawn.

        Raises
        ------
        TypeError
            If the estimator does not compare images with supports.
        ValueError
            If there are more than 12 queries, they are feature vectors, or `supports` are not the
            images of ``fit``.
        """
        if not hasattr(estimator, "explain"):
            raise TypeError(
                f"estimator must be a CSSNClassifier, not a {type(estimator).__name__}: others "
                "have SaliencyDisplay."
            )
        if (n := _num_samples(X)) > _MAX_QUERIES:
            raise ValueError(f"X holds {n} images: pass those to be shown, at most {_MAX_QUERIES}.")
        labels = None if y is None else labels_of(y, "y")
        if labels is not None and len(labels) != n:
            raise ValueError(f"y has {len(labels)} entries for {n} images.")
        queries = pictures_of(estimator, X)
        evidence = estimator.explain(X, 1, supports=supports)
        nearest = evidence.indices[:, :, 0]
        shown = pictures_of(estimator, supports, nearest.clip(min=0).ravel())
        shown = shown.reshape(*nearest.shape, *shown.shape[1:])
        shown[nearest < 0] = np.nan
        return cls(
            queries=queries,
            supports=shown,
            evidence=evidence,
            probability=estimator.predict_proba(X).max(axis=1),
            labels=labels,
        ).plot(axes)

    def plot(self, axes: Any = None) -> SimilarityEvidenceDisplay:
        """Draw.

        Parameters
        ----------
        axes : array-like of matplotlib Axes of shape (n, 2 + min(K, 6)), default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : SimilarityEvidenceDisplay
            This object.
        """
        pyplot(self)
        from matplotlib.colors import CenteredNorm

        evidence, n = self.evidence, len(self.queries)
        names = [written(label) for label in evidence.classes.tolist()]
        n_shown = min(len(names), _MAX_CLASSES)
        axes = grid_of_axes(self, axes, (n, 2 + n_shown))
        for i, row in enumerate(axes):
            show(row[0], self.queries[i])
            predicted = evidence.predicted[i]
            row[0].set_title(self._said(i), fontsize=9, loc="left")
            show(row[1], self.queries[i])
            heat = _slice(evidence.to_pixels(evidence.maps[i]))
            row[1].imshow(heat, cmap="coolwarm", norm=CenteredNorm(), alpha=0.5)
            _box(row[1], evidence.boxes[i], "black", "-")
            row[1].set_title(f"speaks for {written(predicted)}", fontsize=9, loc="left")
            alike = np.nan_to_num(evidence.scores[i, :, 0], nan=-1)
            alike[evidence.classes == predicted] = np.inf
            if self.labels is not None:
                alike[evidence.classes == self.labels[i]] = np.inf
            alike = np.argsort(-alike, kind="stable")
            for ax, k in zip(row[2:], np.sort(alike[:n_shown]), strict=True):
                name, score = names[k], evidence.scores[i, k, 0]
                own = evidence.classes[k] == predicted
                if np.isnan(score) or np.isnan(self.supports[i, k]).any():
                    ax.set_axis_off()
                    title = f"{name}: image not at hand" if np.isfinite(score) else f"no {name}"
                    ax.set_title(title, fontsize=9, loc="left")
                    continue
                show(ax, self.supports[i, k])
                colour, line = (COLOURS[1], "-") if own else (COLOURS[4], "--")
                if evidence.support_maps is not None:
                    _box(ax, evidence.support_boxes[i, k, 0], colour, line)
                _box(row[0], evidence.query_boxes[i, k, 0], colour, line)
                how = {"fontsize": 9, "loc": "left", "weight": "bold" if own else "normal"}
                ax.set_title(f"{name}: alike {percent(score)}", **how)
        self.axes_, self.figure_ = axes, axes[0, 0].figure
        return self

    def _said(self, i: int) -> str:
        """What was predicted, how surely, and whether it is so."""
        predicted = self.evidence.predicted[i]
        text = f"{written(predicted)}, {percent(self.probability[i])}"
        if self.labels is None:
            return text
        return f"{text}\n{verdict(predicted, self.labels[i])}"


def _slice(values: np.ndarray) -> np.ndarray:
    """The middle slice of what covers a volume."""
    return values[len(values) // 2] if values.ndim == 3 else values


def _box(ax: Any, box: np.ndarray, colour: str, line: str) -> None:
    """Outline of a place, (a, 2): start and stop along each axis; of volumes the last two."""
    from matplotlib.patches import Rectangle

    (top, bottom), (left, right) = box[-2:]
    ax.add_patch(
        Rectangle(
            (left - 0.5, top - 0.5), right - left, bottom - top, fill=False, ec=colour, ls=line,
            lw=1.6,
        )
    )  # fmt: skip
