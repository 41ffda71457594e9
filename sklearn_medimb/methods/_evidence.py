"""Evidence by occlusion: what a score loses where part of an image is taken away."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch

from sklearn_medimb._machine.runtime import in_blocks
from sklearn_medimb.backbones import pooled_grid


class Places:
    """A grid of boxes that tile an image.

    Parameters
    ----------
    image_shape : tuple of int
        ``(C, *spatial)`` or ``(d,)``, whose places are ranges of features.
    n_places : int
        Largest number of boxes, at least 2.

    Attributes
    ----------
    grid : tuple of int
        Number of boxes along each axis.
    boxes : ndarray of int of shape (*grid, n_axes, 2)
        Start and stop along each axis.
    numbers : ndarray of int of shape spatial
        Which box holds each pixel, in raster order.
    """

    def __init__(self, image_shape: tuple[int, ...], n_places: int) -> None:
        if not isinstance(n_places, Integral) or n_places < 2:
            raise ValueError(f"n_places={n_places!r} must be an integer of at least 2.")
        sides = image_shape[1:] or image_shape
        self.grid: tuple[int, ...] = pooled_grid(sides, n_places)
        edges = [np.arange(n + 1) * side // n for side, n in zip(sides, self.grid, strict=True)]
        starts = np.stack(np.meshgrid(*[edge[:-1] for edge in edges], indexing="ij"), axis=-1)
        stops = np.stack(np.meshgrid(*[edge[1:] for edge in edges], indexing="ij"), axis=-1)
        self.boxes = np.stack([starts, stops], axis=-1)
        numbers = np.arange(len(self)).reshape(self.grid)
        for axis, edge in enumerate(edges):
            numbers = np.repeat(numbers, np.diff(edge), axis=axis)
        self.numbers: np.ndarray = numbers

    def __len__(self) -> int:
        return math.prod(self.grid)

    def without_each(
        self,
        images: torch.Tensor,
        block: int,
        score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Score images without each of their places.

        What is taken away becomes the image's own mean of that channel, so that its brightness and
        colour stay what they were; a feature becomes the mean of the training rows.

        Parameters
        ----------
        images : tensor of shape (n, C, *spatial) or (n, d)
            Normalised images.
        block : int
            Images to score at a time.
        score : callable
            From images (b, ...) and the rows of `images` that they come from, (b,), to a tensor
            (b, ...).

        Returns
        -------
        scores : tensor of shape (n, len(self), ...)
            What `score` says.
        """
        if images.ndim > 2:
            fill = images.mean(dim=tuple(range(2, images.ndim)), keepdim=True)
        else:
            fill = torch.zeros_like(images)
        numbers = torch.as_tensor(self.numbers, device=images.device)
        lead = (-1,) + (1,) * (images.ndim - 1)

        def some(part: slice) -> torch.Tensor:
            picks = torch.arange(part.start, part.stop, device=images.device)
            row, place = picks // len(self), picks % len(self)
            gone = numbers == place.view(lead)
            return score(torch.where(gone, fill[row], images[row]), row)

        return in_blocks(len(images) * len(self), block, some).unflatten(0, (-1, len(self)))


@dataclass(frozen=True, eq=False, repr=False)
class Evidence:
    """What :meth:`CSSNClassifier.explain` measured, for n queries.

    K is the number of classes, m that of neighbours, a the number of spatial axes (1 for feature
    vectors), ``grid`` the number of places along each axis. A map says for every place by how much
    a score, in log-odds, falls where the place is replaced with the image's mean colour: above 0
    the place speaks for the score, below 0 against it.

    Attributes
    ----------
    classes : ndarray of shape (K,)
        Labels of axis 1 of what follows.
    predicted : ndarray of shape (n,)
        What `predict` says.
    log_odds : ndarray of shape (n,)
        Of the predicted class against all others, as `predict_proba` has it.
    maps : ndarray of shape (n, *grid)
        By how much ``log_odds`` falls without each place of the query.
    places : ndarray of int of shape (*grid, a, 2)
        Start and stop of each place along each axis, in pixels of the caller's images.
    indices : ndarray of int of shape (n, K, m)
        The supports of each class that resemble the query most, as rows of X, most alike first.
        -1 for an image that `sampler` made, and where a class has fewer supports than m: there
        `scores` is NaN.
    scores : ndarray of shape (n, K, m)
        Probability that query and support are of one class, descending.
    query_maps : ndarray of shape (n, K, m, *grid)
        By how much the log-odds of that probability fall without each place of the query.
    support_maps : ndarray of shape (n, K, m, *grid) or None
        The same for the places of the support; NaN where there is no image. None without
        `supports`.

    Notes
    -----
    A query with its map and its strongest place, in matplotlib::

        ax.imshow(X[i])
        ax.imshow(evidence.to_pixels(evidence.maps[i]), cmap="coolwarm", norm=CenteredNorm(),
                  alpha=0.5)
        (top, bottom), (left, right) = evidence.boxes[i]
        ax.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False))
    """

    classes: np.ndarray
    predicted: np.ndarray
    log_odds: np.ndarray
    maps: np.ndarray
    places: np.ndarray
    indices: np.ndarray
    scores: np.ndarray
    query_maps: np.ndarray
    support_maps: np.ndarray | None

    def __repr__(self) -> str:
        grid = " x ".join(map(str, self.places.shape[:-2]))
        maps = "no maps of the supports" if self.support_maps is None else "maps of both"
        return (
            f"Evidence({len(self.predicted)} queries, {grid} places, {self.indices.shape[2]} "
            f"nearest supports of each of {len(self.classes)} classes, {maps})"
        )

    @property
    def _axes(self) -> tuple[int, ...]:
        return tuple(range(self.places.ndim - 2))

    @property
    def boxes(self) -> np.ndarray:
        """Strongest place of each query, (n, a, 2): start and stop along each axis."""
        return self._strongest(self.maps)

    @property
    def query_boxes(self) -> np.ndarray:
        """Place of the query that makes it most like each neighbour, (n, K, m, a, 2)."""
        return self._strongest(self.query_maps)

    @property
    def support_boxes(self) -> np.ndarray | None:
        """Place of each neighbour that makes the query most like it, (n, K, m, a, 2).

        -1 where there is no image; None without `supports`.
        """
        return None if self.support_maps is None else self._strongest(self.support_maps)

    def _strongest(self, maps: np.ndarray) -> np.ndarray:
        flat = maps.reshape(*maps.shape[: maps.ndim - len(self._axes)], -1)
        known = ~np.isnan(flat[..., 0])
        boxes = self.places.reshape(-1, *self.places.shape[-2:])[flat.argmax(axis=-1)]
        return np.where(known[..., np.newaxis, np.newaxis], boxes, -1)

    def to_pixels(self, maps: np.ndarray) -> np.ndarray:
        """Spread maps over the pixels of their places, to lay them over an image.

        Parameters
        ----------
        maps : ndarray of shape (..., *grid)
            Such as ``maps``, ``query_maps[i]``.

        Returns
        -------
        maps : ndarray of shape (..., *spatial)
            Each pixel has the value of its place.
        """
        for axis in self._axes:
            first = tuple(slice(None) if other == axis else 0 for other in self._axes)
            lengths = np.diff(self.places[first][:, axis])[:, 0]
            maps = np.repeat(maps, lengths, axis=maps.ndim - len(self._axes) + axis)
        return maps
