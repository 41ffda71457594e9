"""Saliency-guided patch mixup: pure functions on pictures and on tokens.

J. Wei et al., "Saliency-guided and Patch-based Mixup for Long-tailed Skin Cancer Image
Classification", arXiv 2406.10801, 2024. The tail picture keeps its label; patch by patch, saliency
decides how much of a partner, usually of a head class, may enter:

    r = min(cap, max(s_t, s_h)),    mixed_i = r_i x_t,i + (1 - r_i) x_h,i

with the saliency s of both pictures and i counting patches. What is salient in either picture is
taken from the tail picture; common background is borrowed.

Imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


def patch_means(maps: torch.Tensor, patch_size: int | Sequence[int]) -> torch.Tensor:
    """Mean saliency of each patch.

    Parameters
    ----------
    maps : tensor of shape (n, *spatial)
        2-D or 3-D.
    patch_size : int or sequence of int
        Sides of a patch in pixels, one per axis; a map that they do not divide is mirrored beyond
        its end.

    Returns
    -------
    means : tensor of shape (n, *grid)
        One value per patch.
    """
    patches = _per_axis(patch_size, maps.shape[1:])
    if max(patches) == 1:
        return maps
    lacks = [-side % patch for side, patch in zip(maps.shape[1:], patches, strict=True)]
    batch = maps.unsqueeze(1)
    if any(lacks):
        batch = F.pad(batch, [pad for lack in reversed(lacks) for pad in (0, lack)], mode="reflect")
    pool = F.avg_pool2d if len(patches) == 2 else F.avg_pool3d
    return pool(batch, patches)[:, 0]


def spmix_ratio(
    s_t: torch.Tensor,
    s_h: torch.Tensor,
    patch_size: int | Sequence[int] = 1,
    *,
    cap: float = 0.8,
    floor: float | None = None,
    merge: str = "patch",
    normalize: bool | None = None,
    partner_saliency: bool = True,
    min_contrast: float = 1e-3,
) -> torch.Tensor:
    """Share of the tail picture in each patch of the mix.

    Parameters
    ----------
    s_t, s_h : tensor of shape (n, *spatial)
        Saliency of the tail pictures and of their partners, in [0, 1]; 2-D or 3-D.
    patch_size : int or sequence of int, default=1
        Sides of a patch in pixels, one per axis; 1 for maps that hold one value per token.
    cap : float, default=0.8
        Upper bound of the share, the paper's alpha: 1 - cap of the partner enters everywhere.
    floor : float or None, default=None
        Share where neither picture is salient; None is 0.5 with ``merge="patch"`` and 0 with
        ``merge="pixel"``, as published in each case.
    merge : {"patch", "pixel"}, default="patch"
        "patch" takes each picture's patch scores, then the larger, then the cap: the authors'
        code. "pixel" takes the larger and the cap pixel by pixel, then the mean over each patch:
        the paper's formula.
    normalize : bool or None, default=None
        Whether each picture's saliency is stretched to [0, 1]; None does with ``merge="patch"``.
    partner_saliency : bool, default=True
        False looks at the tail picture alone, an ablation.
    min_contrast : float, default=1e-3
        Maps with a narrower range count as not salient anywhere when stretched.

    Returns
    -------
    ratio : tensor of shape (n, *grid)
        Values in [min(floor, cap), cap].
    """
    if merge not in ("patch", "pixel"):
        raise ValueError(f'merge={merge!r} must be "patch" or "pixel".')
    if s_t.shape != s_h.shape:
        raise ValueError(f"s_t and s_h differ in shape: {tuple(s_t.shape)}, {tuple(s_h.shape)}.")
    in_patches = merge == "patch"
    floor = (0.5 if in_patches else 0.0) if floor is None else floor
    normalize = in_patches if normalize is None else normalize

    def score(maps: torch.Tensor) -> torch.Tensor:
        if in_patches:
            maps = patch_means(maps, patch_size)
        if normalize:
            axes = tuple(range(1, maps.ndim))
            low, high = maps.amin(axes, keepdim=True), maps.amax(axes, keepdim=True)
            contrast = high - low
            maps = torch.where(contrast < min_contrast, 0, (maps - low) / contrast)
        return floor + (1 - floor) * maps

    ratio = score(s_t)
    if partner_saliency:
        ratio = torch.maximum(ratio, score(s_h))
    ratio = ratio.clamp(max=cap)
    return ratio if in_patches else patch_means(ratio, patch_size)


def spmix(
    x_t: torch.Tensor,
    x_h: torch.Tensor,
    ratio: torch.Tensor,
    patch_size: int | Sequence[int] | None = None,
) -> torch.Tensor:
    """Mix pictures or tokens: ``r x_t + (1 - r) x_h``.

    Mixing pictures and then embedding their patches linearly is mixing the embedded patches; with
    any other embedding the two differ.

    Parameters
    ----------
    x_t, x_h : tensor of shape (n, C, *spatial) or (n, L, C)
        Tail pictures and partners: pictures or feature maps where `patch_size` is given, tokens
        where it is None. Neither is changed.
    ratio : tensor of shape (n, *grid)
        Share of `x_t` in each patch; for tokens in the order of their patches.
    patch_size : int or sequence of int, default=None
        Sides of a patch in pixels of `x_t`, one per axis.

    Returns
    -------
    mixed : tensor
        Shape and dtype of `x_t`; gradients flow to both.
    """
    if patch_size is None:
        share = ratio.flatten(1).unsqueeze(-1)
    else:
        share = expand_ratio(ratio, patch_size, x_t.shape[2:]).unsqueeze(1)
    return torch.lerp(x_h, x_t, share.to(x_t.dtype))


def expand_ratio(
    ratio: torch.Tensor, patch_size: int | Sequence[int], sides: Sequence[int]
) -> torch.Tensor:
    """Give each pixel the value of its patch.

    Parameters
    ----------
    ratio : tensor of shape (n, *grid)
        One value per patch.
    patch_size : int or sequence of int
        Sides of a patch.
    sides : sequence of int
        Spatial shape of the pictures; a last patch that leaves the picture is cut.

    Returns
    -------
    expanded : tensor of shape (n, *sides)
        Constant within each patch.
    """
    patches = _per_axis(patch_size, sides)
    grid = tuple(-(-side // patch) for side, patch in zip(sides, patches, strict=True))
    if tuple(ratio.shape[1:]) != grid:
        raise ValueError(
            f"ratio has a grid of {tuple(ratio.shape[1:])}; patches of {tuple(patches)} on "
            f"{tuple(sides)} pixels make {grid}."
        )
    for axis, (patch, side) in enumerate(zip(patches, sides, strict=True), 1):
        place = torch.arange(side, device=ratio.device) // patch
        ratio = ratio.index_select(axis, place)
    return ratio


def _per_axis(patch_size: int | Sequence[int], sides: Sequence[int]) -> list[int]:
    """One patch side per axis, none larger than the picture."""
    given: Any = patch_size
    if isinstance(given, (int, np.integer)):
        given = [given] * len(sides)
    patches = [int(patch) for patch in given]
    if len(patches) != len(sides) or min(patches) < 1:
        raise ValueError(
            f"patch_size={patch_size} must be a whole number above 0 for each of the axes "
            f"{tuple(sides)}."
        )
    return [min(patch, side) for patch, side in zip(patches, sides, strict=True)]
