"""Passes over images that several steps share."""

from __future__ import annotations

import torch
from torch import Tensor


def per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (images.ndim - 1))


def channel_mean(images: Tensor) -> Tensor:
    return images.mean(dim=tuple(range(2, images.ndim)), keepdim=True)


def is_fused(images: Tensor) -> bool:
    # On a CPU loops over several broadcast terms, and those for two extremes, are not vectorised:
    # more and simpler passes are many times faster.
    return not images.is_cpu


def addcmul(offset: Tensor, images: Tensor, gain: Tensor, *, in_place: bool = False) -> Tensor:
    if is_fused(images):
        return torch.addcmul(offset, images, gain)
    return images.mul_(gain).add_(offset) if in_place else images * gain + offset
