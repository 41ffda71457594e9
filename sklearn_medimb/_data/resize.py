"""Images of any size to one: antialiased bicubic, a matrix product for each axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator

from sklearn_medimb._pages import Documented

MAX_SIDE = 4096  # pixels along an axis of what a network sees
MAX_PIXELS = MAX_SIDE**2

ASPECTS = ("stretch", "pad", "crop")


class Resize(Documented, BaseEstimator):
    """A size that all images come to, and how: what ``image_size=`` of the estimators takes.

    Antialiased bicubic interpolation, as Pillow's ``Image.resize`` with ``BICUBIC`` has it. What
    exceeds the range of a channel of the image is clipped to it.

    Parameters
    ----------
    size : int or tuple of int
        Pixels along each spatial axis, or one number for all of them; at most 4096.
    aspect : {"stretch", "pad", "crop"}, default="stretch"
        Where the sides of an image have another ratio. "stretch": each axis by its own factor.
        "pad": the whole image, in the middle; what is left on two sides repeats its outermost
        pixels. "crop": the largest part from its middle that has this ratio.

    Examples
    --------
    >>> from sklearn_medimb import SoftmaxClassifier
    >>> from sklearn_medimb.datasets import Resize
    >>> SoftmaxClassifier(image_size=Resize((96, 128), aspect="pad")).image_size.aspect
    'pad'
    """

    def __init__(self, size: int | tuple[int, ...], aspect: str = "stretch") -> None:
        self.size = size
        self.aspect = aspect


def resolve_size(image_size: Any) -> Resize | None:
    """Turn what a user may pass as `image_size` into a Resize; None stays.

    Raises
    ------
    ValueError
        If a side is not a whole number from 1 to 4096, or all together make too many pixels.
    """
    if image_size is None:
        return None
    resize = image_size if isinstance(image_size, Resize) else Resize(image_size)
    sides = resize.size if isinstance(resize.size, (tuple, list)) else (resize.size,)
    good = [isinstance(side, Integral) and not isinstance(side, bool) for side in sides]
    if not sides or not all(good) or not all(1 <= side <= MAX_SIDE for side in sides):
        raise ValueError(
            f"image_size={image_size!r} must hold whole numbers from 1 to {MAX_SIDE}: one for all "
            "spatial axes, or one for each."
        )
    if resize.aspect not in ASPECTS:
        raise ValueError(f"image_size: aspect={resize.aspect!r} must be one of {ASPECTS}.")
    return resize


def resized_shape(shape: tuple[int, ...], resize: Resize | None) -> tuple[int, ...]:
    """Shape of an image ``(C, *spatial)`` once it has its size.

    Raises
    ------
    ValueError
        If the image has another number of spatial axes, or none.
    """
    if resize is None:
        return shape
    n_axes = len(shape) - 1
    if not n_axes:
        raise ValueError(
            f"image_size={resize.size} is for images, but X holds feature vectors: set image_shape "
            "if they are flattened images, or image_size=None."
        )
    size = resize.size
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size,) * n_axes
    if len(sides) != n_axes:
        raise ValueError(
            f"image_size={resize.size} names {len(sides)} sides, but the images of X have {n_axes} "
            f"spatial axes: their shape is {shape} (channels first)."
        )
    if math.prod(sides) > MAX_PIXELS:
        raise ValueError(f"image_size={resize.size} makes more than {MAX_PIXELS} pixels of X.")
    return shape[0], *(int(side) for side in sides)


def resample(images: torch.Tensor, size: Sequence[int], aspect: str = "stretch") -> torch.Tensor:
    """Bring images of one size to another.

    The result of an image depends on no other one, to the bit on the CPU.

    Parameters
    ----------
    images : tensor of shape (n, C, *spatial)
        uint8 or floats.
    size : sequence of int
        Pixels along each spatial axis.
    aspect : {"stretch", "pad", "crop"}, default="stretch"
        As in :class:`Resize`.

    Returns
    -------
    resized : tensor of shape (n, C, *size)
        Of the dtype of `images`; `images` themselves where they have this size. uint8 is rounded
        and clipped after each axis, as Pillow does, and in its order: the last axis first, unless
        the one before it loses more than twice as many pixels. Of floats every channel of an image
        stays within its range.
    """
    sides = tuple(images.shape[2:])
    if sides == tuple(size):
        return images
    whole = images.dtype == torch.uint8
    pixels = images if images.dtype == torch.float64 else images.float()
    kind = "float64" if pixels.dtype == torch.float64 else "float32"
    weights = [
        None if matrix is None else torch.from_numpy(matrix).to(images.device)
        for matrix in axis_weights(sides, tuple(size), aspect, kind)
    ]
    return combine(pixels, weights, whole=whole).to(images.dtype)


def combine(
    images: torch.Tensor, weights: Sequence[torch.Tensor | None], *, whole: bool
) -> torch.Tensor:
    """Apply the weights of each axis to floats.

    Parameters
    ----------
    images : tensor of shape (n, C, *spatial)
        floats.
    weights : sequence of tensor of shape (size, side) or None
        One for each spatial axis; None leaves it alone.
    whole : bool
        Whether they are whole numbers from 0 to 255, and are to remain so.

    Returns
    -------
    combined : tensor of shape (n, C, *size)
        floats.
    """
    axes = tuple(range(2, images.ndim))
    fewer = [0 if m is None else m.shape[1] - m.shape[0] for m in weights]
    order = list(reversed(axes))
    if len(order) > 1 and fewer[-2] > 2 * max(fewer[-1], 0):
        order[:2] = order[1::-1]
    pixels = images
    for axis in order:
        matrix = weights[axis - 2]
        if matrix is None:
            continue
        pixels = _along(pixels, matrix, axis)
        if whole:
            pixels = pixels.round_().clamp_(0, 255)
    if whole:
        return pixels
    low, high = images.amin(axes, keepdim=True), images.amax(axes, keepdim=True)
    return torch.minimum(torch.maximum(pixels, low), high)


def _along(images: torch.Tensor, matrix: torch.Tensor, axis: int) -> torch.Tensor:
    """Multiply one axis with a matrix.

    One product for each image, or each of its rows: those of a larger one would be rounded in
    another way, depending on how many images there are.
    """
    n, before, after = images.shape[0], images.shape[1:axis], images.shape[axis + 1 :]
    size, side = matrix.shape
    if axis == images.ndim - 1:
        factor = matrix.T.expand(n, side, size)
        product = images.reshape(n, math.prod(before), side).bmm(factor)
    else:
        parts = images.reshape(n * math.prod(before), side, math.prod(after))
        product = matrix.expand(n * math.prod(before), size, side).bmm(parts)
    return product.reshape(n, *before, size, *after)


def axis_weights(
    sides: tuple[int, ...], size: tuple[int, ...], aspect: str, kind: str = "float32"
) -> list[np.ndarray | None]:
    """Find what each pixel of the result takes from those of the image, axis by axis.

    Parameters
    ----------
    sides, size : tuple of int
        Pixels along each axis, before and after.
    aspect : {"stretch", "pad", "crop"}
        As in :class:`Resize`.
    kind : {"float32", "float64"}
        dtype of the weights.

    Returns
    -------
    weights : list of ndarray of shape (size, side) or None
        Rows sum to 1; None where nothing changes along an axis. Not to be written to.
    """
    folds = [new / old for new, old in zip(size, sides, strict=True)]
    weights: list[np.ndarray | None] = []
    for side, new in zip(sides, size, strict=True):
        begin, extent, n = 0.0, float(side), new
        if aspect == "pad":
            n = min(new, max(1, round(side * min(folds))))
        elif aspect == "crop":
            extent = min(extent, new / max(folds))
            begin = (side - extent) / 2
        if n == new == side and extent == side:
            weights.append(None)
            continue
        weights.append(_bicubic(side, begin, extent, n, new, kind))
    return weights


@lru_cache(maxsize=32)
def _bicubic(side: int, begin: float, extent: float, n: int, size: int, kind: str) -> np.ndarray:
    """Weights (size, side) of n pixels that tile the interval from `begin`, of length `extent`.

    They come to lie in the middle of `size` pixels; the outermost ones are repeated.

    Keys' kernel with a = -0.5, as wide as four pixels, or four new ones where these are larger;
    at the edges what is left of it counts as the whole.
    """
    scale = extent / n
    wide = max(scale, 1.0)
    centres = begin + (np.arange(n) + 0.5) * scale
    first = np.maximum((centres - 2 * wide + 0.5).astype(int), 0)
    stop = np.minimum((centres + 2 * wide + 0.5).astype(int), side)
    columns = first[:, None] + np.arange((stop - first).max())
    x = np.abs(columns + 0.5 - centres[:, None]) / wide
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    values = np.where(x < 1, near, np.where(x < 2, far, 0.0)) * (columns < stop[:, None])
    values /= values.sum(axis=1, keepdims=True)
    weights = np.zeros((n, side + columns.shape[1]))  # what lies beyond the edge is 0
    np.put_along_axis(weights, columns, values, axis=1)
    places = (np.arange(size) - (size - n) // 2).clip(0, n - 1)
    return weights[places, :side].astype(kind)
