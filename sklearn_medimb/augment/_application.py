"""What was drawn, applied to a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from sklearn_medimb.augment._geometry import FLIPS, in_boxes, warp
from sklearn_medimb.augment._intensity import TONE, blur, change_tone, extremes, recolour
from sklearn_medimb.augment._passes import channel_mean, per_image


def apply_draws(images: Tensor, params: dict[str, Tensor]) -> Tensor:
    _check_batch(images, params)
    if images.shape[1] != 3:
        params = {k: v for k, v in params.items() if k != "colour"}
    if not params or not images.numel():
        return images
    params = {k: v.to(images, non_blocking=images.is_cuda) for k, v in params.items()}
    out = images

    if "affine" in params:
        out = warp(out, params["affine"])
    for name, axis in FLIPS.items():
        if name in params:
            out = torch.where(per_image(params[name], out) > 0, out.flip(axis), out)
    if "blur" in params:
        out = blur(out, params["blur"])
    if "colour" in params:
        out = recolour(out, params["colour"])

    # Linear sampling and blur stay within the extremes of the image, so that those of the
    # input hold, and gamma always meets values in [0, 1]. A colour matrix may leave them:
    # more saturated than the image was, or rotated out of the cube. Then gamma clips.
    tone = {k: per_image(params[k], out) for k in TONE if k in params}
    if params.keys() & {"gamma", "brightness", "noise"}:
        tone["low"], tone["span"] = extremes(images)
    if params.keys() & set(TONE):
        out = change_tone(out, tone, fresh=out is not images, clip="colour" in params)
    if "noise" in params:
        # In place, as fresh memory costs more than the arithmetic; but never in the input.
        add = torch.addcmul if out is images else Tensor.addcmul_
        out = add(out, params["noise"], tone["span"])
    if "cutout" in params:
        inside = in_boxes(params["cutout"], out.shape[2:])
        out = torch.where(inside, channel_mean(out), out)
    return out.contiguous(memory_format=_memory_format(images))


def _check_batch(images: Tensor, params: dict[str, Tensor]) -> None:
    if images.ndim not in (4, 5) or not images.is_floating_point():
        raise ValueError(
            "images must be a floating-point tensor of shape (B, C, H, W) or (B, C, D, H, W), "
            f"got {images.dtype} of shape {tuple(images.shape)}."
        )
    for name, value in params.items():
        if len(value) != len(images):
            raise ValueError(f"{name} was drawn for {len(value)} images, got {len(images)}.")


def _memory_format(images: Tensor) -> torch.memory_format:
    last = torch.channels_last if images.ndim == 4 else torch.channels_last_3d
    if images.is_contiguous(memory_format=last) and not images.is_contiguous():
        return last
    return torch.contiguous_format
