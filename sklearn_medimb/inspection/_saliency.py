"""Which places of an image a network's score depends on: Grad-CAM."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.utils.validation import _num_samples, check_is_fitted
from torch import nn

from sklearn_medimb._machine.runtime import one_thread_in_workers
from sklearn_medimb.inspection._figure import (
    grid_of_axes,
    percent,
    pictures_of,
    show,
    verdict,
    written,
)
from sklearn_medimb.metrics._labels import labels_of

_MAX_IMAGES = 24
_BLOCK = 16


def grad_cam(estimator: Any, X: Any, target: Any = None) -> np.ndarray:
    """Where the last map of features in a network speaks for a class: Grad-CAM [1]_.

    ``max(0, sum_c a_c A_c)`` with the maps A_c of the last layer that has places, and a_c the mean
    over the places of the gradient of the class's log-odds by A_c. The map is coarse: it has as
    many places as that layer. It depends on the image and on all weights, from the head down to
    that layer [2]_; it says what the network uses, not what a disease looks like. Where the start
    stays beside a tuned backbone (`keep_start`), the sum is over the maps of both.

    Parameters
    ----------
    estimator : image classifier of this package
        Fitted, with a network.
    X : array-like or lazy sequence of n images
        In any layout that ``fit`` accepts. Of pairs the image is asked about, not its reference.
    target : label or array-like of shape (n,), default=None
        Class whose score is asked about; None takes the predicted one of each image.

    Returns
    -------
    maps : ndarray of shape (n, *spatial)
        Of the size that the network sees, bilinear between the places; values >= 0, in units of
        log-odds.

    Raises
    ------
    TypeError
        If the estimator is no image classifier.
    ValueError
        If `target` is no class, or the network has no layer with places.

    References
    ----------
    .. [1] R. R. Selvaraju et al., "Grad-CAM: visual explanations from deep networks via
       gradient-based localization", ICCV 2017, equations 1 and 2.
    .. [2] J. Adebayo et al., "Sanity checks for saliency maps", NeurIPS 2018.

    Examples
    --------
    >>> from sklearn_medimb import SoftmaxClassifier
    >>> from sklearn_medimb.datasets import make_lesions
    >>> from sklearn_medimb.inspection import grad_cam
    >>> data = make_lesions([12, 6], image_size=16, random_state=0)
    >>> clf = SoftmaxClassifier(max_epochs=1, random_state=0).fit(data.images, data.target)
    >>> grad_cam(clf, data.images[:3]).shape
    (3, 16, 16)
    """
    if not hasattr(estimator, "_score_function"):
        raise TypeError(
            f"estimator must be an image classifier of this package, not a "
            f"{type(estimator).__name__}: of a pipeline or a search, pass the classifier within."
        )
    check_is_fitted(estimator)
    images, classes = estimator._read(X), estimator.classes_
    n, codes = len(images), None
    if target is not None:
        wanted = np.asarray(target)
        wanted = np.full(n, target, dtype=wanted.dtype) if wanted.ndim == 0 else wanted
        if wanted.shape != (n,):
            raise ValueError(f"target has {wanted.size} entries for {n} images.")
        if strangers := sorted(set(wanted.tolist()) - set(classes.tolist())):
            raise ValueError(f"target holds {strangers}; the classes are {classes.tolist()}.")
        codes = torch.from_numpy(np.searchsorted(classes, wanted))
    module = estimator.net_.module_.eval()
    prepare, score = estimator._preprocessor(), estimator._score_function(in_chunks=False)
    maps = []
    with one_thread_in_workers(), _Recorder(module) as recorder, torch.enable_grad():
        for rows in np.array_split(np.arange(n), max(1, math.ceil(n / _BLOCK))):
            batch = prepare(images.rows(rows)).requires_grad_()
            recorder.n_read = len(batch) * (2 if images.layout.paired else 1)
            scores = score(batch).float()
            best = scores.argmax(dim=1) if codes is None else codes[rows].to(scores.device)
            chosen = F.one_hot(best, scores.shape[1]).bool()
            others = scores.masked_fill(chosen, -torch.inf).logsumexp(dim=1)
            odds = scores.gather(1, best[:, None])[:, 0] - others
            parts = [_spoken(*part) for part in recorder.last_maps(odds.sum(), batch)]
            found = torch.stack(parts).sum(dim=0).relu().float()
            mode = "bilinear" if found.ndim == 4 else "trilinear"
            found = F.interpolate(found, batch.shape[2:], mode=mode, align_corners=False)
            maps.append(found[:, 0].detach().cpu().numpy())
    return np.concatenate(maps)


def _spoken(features: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Sum of the maps, each times its mean gradient over the places."""
    share = slope.flatten(2).mean(dim=2).view(*slope.shape[:2], *[1] * (slope.ndim - 2))
    return (share * features).sum(dim=1, keepdim=True)


class _Recorder:
    """Keeps what within trunks has places: maps, and tokens of a grid."""

    def __init__(self, network: Any) -> None:
        self.trunks = [network.trunk, *filter(None, [getattr(network, "start", None)])]
        self.kept: list[list[torch.Tensor]] = [[] for _ in self.trunks]
        self.n_read = 0  # images that a trunk is given at a time

    def __enter__(self) -> _Recorder:
        self.handles = [
            part.register_forward_hook(partial(self._keep, kept))
            for trunk, kept in zip(self.trunks, self.kept, strict=True)
            for part in trunk.modules()
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _keep(self, kept: list[torch.Tensor], module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.requires_grad:
            is_map = output.ndim >= 4 and math.prod(output.shape[2:]) > 1
            if is_map or (output.ndim == 3 and output.shape[1] > 1):
                kept.append(output)

    def last_maps(
        self, score: torch.Tensor, batch: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each trunk the last map whose places the score depends on, and the gradient by it.

        Where only the token of the class is read in the end, the places speak one block before.
        """
        found: list[Any] = []
        for kept in self.kept:
            maps = [values for values in reversed(kept) if len(values) == self.n_read]
            kept.clear()
            slopes: Any = ()
            if maps:
                slopes = torch.autograd.grad(score, maps, allow_unused=True, retain_graph=True)
            for values, slope in zip(maps, slopes, strict=True):
                if slope is None or (by := _as_map(slope, batch)) is None or not by.any():
                    continue
                found.append((_as_map(values.detach(), batch), by))
                break
        if found:
            return found
        raise ValueError(
            f"{type(self.trunks[0].backbone).__name__} has no layer with places, whose gradient "
            "Grad-CAM needs."
        )


def _as_map(values: torch.Tensor, batch: torch.Tensor) -> torch.Tensor | None:
    """Values as (B, C, *places), of pairs those of the images; None where there are no places."""
    values = values[: len(batch)]  # references are stacked behind
    if values.ndim >= 4:
        return values if values.ndim == batch.ndim else None
    sides, n = batch.shape[2:], values.shape[1]
    # Tokens of patches come last, after those of the class and registers.
    stride = max(1, round((math.prod(sides) / n) ** (1 / len(sides))))
    while math.prod(max(1, side // stride) for side in sides) > n:
        stride += 1
    grid = [max(1, side // stride) for side in sides]
    return values[:, n - math.prod(grid) :].transpose(1, 2).unflatten(2, grid)


class SaliencyDisplay:
    """Images of a network classifier under the maps of their class: Grad-CAM.

    Make one with :meth:`from_estimator`. For a :class:`~sklearn_medimb.CSSNClassifier`
    :class:`SimilarityEvidenceDisplay` says more.

    Parameters
    ----------
    images : ndarray of shape (n, H, W) or (n, H, W, 3)
        Pictures with values in [0, 1]; of volumes the middle slice.
    maps : ndarray of shape (n, H, W)
        Values >= 0.
    titles : list of str
        One for each image.

    Attributes
    ----------
    axes_ : ndarray of matplotlib Axes of shape (2, n)
        Images above, maps below.
    figure_ : matplotlib Figure
        The figure.

    See Also
    --------
    grad_cam : The maps.

    Examples
    --------
    >>> from sklearn_medimb import SoftmaxClassifier
    >>> from sklearn_medimb.datasets import make_lesions
    >>> from sklearn_medimb.inspection import SaliencyDisplay
    >>> data = make_lesions([12, 6], image_size=16, random_state=0)
    >>> clf = SoftmaxClassifier(max_epochs=1, random_state=0).fit(data.images, data.target)
    >>> SaliencyDisplay.from_estimator(clf, data.images[:3]).axes_.shape
    (2, 3)
    """

    def __init__(self, *, images: np.ndarray, maps: np.ndarray, titles: list[str]) -> None:
        self.images = images
        self.maps = maps
        self.titles = titles

    @classmethod
    def from_estimator(
        cls, estimator: Any, X: Any, *, y: Any = None, target: Any = None, axes: Any = None
    ) -> SaliencyDisplay:
        """Draw the maps of some images.

        Parameters
        ----------
        estimator : image classifier of this package
            Fitted.
        X : array-like or lazy sequence of n images
            At most 24.
        y : array-like of shape (n,), default=None
            Their classes, for the titles.
        target : label or array-like of shape (n,), default=None
            As in :func:`grad_cam`.
        axes : array-like of matplotlib Axes of shape (2, n), default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : SaliencyDisplay
            Drawn.

        Raises
        ------
        ValueError
            If there are more than 24 images, or as :func:`grad_cam`.
        """
        if (n := _num_samples(X)) > _MAX_IMAGES:
            raise ValueError(f"X holds {n} images: pass those to be shown, at most {_MAX_IMAGES}.")
        labels = None if y is None else labels_of(y, "y")
        if labels is not None and len(labels) != n:
            raise ValueError(f"y has {len(labels)} entries for {n} images.")
        maps = grad_cam(estimator, X, target)
        maps = maps if maps.ndim == 3 else maps[:, maps.shape[1] // 2]
        proba = estimator.predict_proba(X)
        best = estimator.classes_[proba.argmax(axis=1)]
        sure = proba.max(axis=1)
        titles = [f"{written(k)}, {percent(p)}" for k, p in zip(best, sure, strict=True)]
        if labels is not None:
            ends = [verdict(*pair) for pair in zip(best, labels, strict=True)]
            titles = ["\n".join(pair) for pair in zip(titles, ends, strict=True)]
        return cls(images=pictures_of(estimator, X), maps=maps, titles=titles).plot(axes)

    def plot(self, axes: Any = None) -> SaliencyDisplay:
        """Draw.

        Parameters
        ----------
        axes : array-like of matplotlib Axes of shape (2, n), default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : SaliencyDisplay
            This object.
        """
        axes = grid_of_axes(self, axes, (2, len(self.images)))
        rows = zip(axes.T, self.images, self.maps, self.titles, strict=True)
        for (above, below), picture, heat, title in rows:
            show(above, picture)
            above.set_title(title, fontsize=9, loc="left")
            show(below, picture)
            top = max(float(heat.max()), 1e-12)
            below.imshow(heat / top, cmap="inferno", vmin=0, vmax=1, alpha=0.55)
        self.axes_, self.figure_ = axes, axes[0, 0].figure
        return self
