"""Views that show the same thing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain, combinations
from typing import Any

import torch
from torch import Tensor

from sklearn_medimb.augment._geometry import FLIPS


def symmetries(
    augmentation: Any, image_shape: tuple[int, ...], n: int
) -> list[Callable[[Tensor], Tensor]]:
    """Views of images that, by what an augmentation does, are images of the same thing.

    First images as they are; then, as far as its probabilities are above 0, each flip; where
    squares are flipped both ways, quarter turns; and flips along several axes.

    Parameters
    ----------
    augmentation : Augmentation
        Any object; one without the parameters of :class:`Augmentation` is taken to flip nothing.
    image_shape : tuple of int
        Shape of one image, ``(C, *spatial)``; vectors have but one view.
    n : int
        Most views.

    Returns
    -------
    views : list of callable
        Each maps a batch (B, C, *spatial) to one of the same shape, exactly.

    Examples
    --------
    >>> from sklearn_medimb.augment import resolve_augmentation, symmetries
    >>> len(symmetries(resolve_augmentation("medical"), (3, 32, 32), 8))
    8
    >>> len(symmetries(resolve_augmentation("light"), (3, 32, 32), 8))
    2
    """
    sides = image_shape[1:]
    axes = [
        axis
        for name, axis in FLIPS.items()
        if getattr(augmentation, name, 0.0) and -axis <= len(sides)
    ]
    several = chain.from_iterable(combinations(axes, k) for k in range(1, len(axes) + 1))
    flips = [partial(torch.flip, dims=dims) for dims in several]
    turns: list[Callable[[Tensor], Tensor]] = []
    if {-1, -2} <= set(axes) and sides[-1] == sides[-2]:
        turns = [partial(torch.rot90, k=k, dims=(-2, -1)) for k in (1, 3)]
        turns += [partial(_turned_and_flipped, dims=[axis]) for axis in (-1, -2)]
    one, more = flips[: len(axes)], flips[len(axes) :]
    views: list[Callable[[Tensor], Tensor]] = [_as_it_is, *one, *turns[:1], *more, *turns[1:]]
    return views[:n]


def _as_it_is(images: Tensor) -> Tensor:
    return images


def _turned_and_flipped(images: Tensor, dims: list[int]) -> Tensor:
    return torch.rot90(images, 1, (-2, -1)).flip(dims)
