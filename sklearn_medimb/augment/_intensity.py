"""What values pixels have: colour, tone, blur."""

from __future__ import annotations

import cmath
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sklearn_medimb.augment._passes import addcmul, channel_mean, is_fused, per_image

TONE = ("gamma", "contrast", "brightness")
_LUMA = (0.299, 0.587, 0.114)


def colour_constants(is_turned: bool) -> dict[str, list[float]]:
    # Of a matrix of colours, with the luma of what it gives in a fourth row. Three numbers that sum
    # to 1, as those of each row do, are a third plus a wave, whose phase a turn adds to.
    if not is_turned:
        identity = [float(i == j) for i in range(3) for j in range(3)]
        return {"rows": [*identity, *_LUMA], "luma": [*_LUMA]}
    third = 2 * math.pi / 3
    wave = sum(weight * cmath.exp(-1j * third * k) for k, weight in enumerate(_LUMA))
    phases = [0.0, -third, -2 * third, cmath.phase(wave)]
    return {
        "rows": [phase + third * k for phase in phases for k in range(3)],
        "size": [2 / 3, 2 / 3, 2 / 3, 2 / 3 * abs(wave)],
        "mean": [1 / 3],
        "luma": [*_LUMA],
    }


def colour_matrix(u: Tensor, drop: Tensor | None, constants: dict[str, Tensor]) -> Tensor:
    # Written out, as products of matrices would be rounded to TF32 where a user allows it,
    # and greys take a tint. All factors map grey to itself, and so does what is composed.
    factor, turn, _ = u[:, :, None, None].unbind(dim=1)
    colour = constants["rows"].reshape(4, 3)
    if "mean" in constants:
        waves = torch.cos(colour + turn)
        colour = torch.addcmul(constants["mean"], waves, constants["size"][:, None])
    colour = torch.lerp(constants["luma"], colour, factor)
    colour, grey = colour.split([3, 1], dim=1)
    return colour if drop is None else torch.where(drop[:, :, None], grey, colour)


def recolour(images: Tensor, matrices: Tensor) -> Tensor:
    # One channel of the input at a time, for all of the output. As fast as a product of matrices,
    # and neither TF32 nor the size of the batch changes a bit of it.
    weights = matrices.reshape(*matrices.shape, *[1] * (images.ndim - 2)).unbind(dim=2)
    channels = images.split(1, dim=1)
    out = weights[0] * channels[0]
    for weight, channel in zip(weights[1:], channels[1:], strict=True):
        out.addcmul_(weight, channel)
    return out


def extremes(images: Tensor) -> tuple[Tensor, Tensor]:
    # The lowest value and the span. Constants of the image: no gradient runs through them.
    images = images.detach()
    if is_fused(images):
        low, high = (per_image(end, images) for end in images.flatten(1).aminmax(dim=1))
    else:
        dims = tuple(range(1, images.ndim))
        low, high = images.amin(dim=dims, keepdim=True), images.amax(dim=dims, keepdim=True)
    return low, high - low


def change_tone(images: Tensor, tone: dict[str, Tensor], *, fresh: bool, clip: bool) -> Tensor:
    # Contrast, undoing the rescaling of gamma, and brightness are all of the form `offset + gain *
    # image`: gathered first, they cost one pass together. `fresh` images may be written to.
    gain = offset = None
    if "gamma" in tone:
        images = images.sub_(tone["low"]) if fresh else images - tone["low"]
        # Not 0, where the power would have an infinite slope. Without `clip` values are in [0, 1]
        # but for rounding, which is left above 1 where it does no harm; in an image of but one
        # value it is all there is.
        tiny = torch.finfo(images.dtype).tiny
        images = images.div_(tone["span"].clamp(min=tiny)).clamp_(min=tiny, max=1 if clip else 2)
        images, fresh = images.pow_(tone["gamma"]), True
    if "contrast" in tone:
        mean = channel_mean(images.detach())
        if is_fused(images):
            images, fresh = torch.lerp(mean, images, tone["contrast"]), True
        else:
            gain = tone["contrast"]
            offset = torch.addcmul(mean, mean, gain, value=-1)
    if "gamma" in tone:
        low, span = tone["low"], tone["span"]
        gain = span if gain is None else gain * span
        offset = low if offset is None else torch.addcmul(low, offset, span)
    if "brightness" in tone:
        shift = tone["brightness"], tone["span"]
        offset = torch.mul(*shift) if offset is None else torch.addcmul(offset, *shift)
    if offset is None:
        return images
    if gain is None:
        return images.add_(offset) if fresh else images + offset
    # The gradient of the power needs its result.
    return addcmul(offset, images, gain, in_place=fresh and not images.requires_grad)


def blur(images: Tensor, kernels: Tensor) -> Tensor:
    # The images of the batch are the channels, so that each has its own kernel. Rows are blurred;
    # with all pixels in one row, of which those at a stride are neighbours, so is any other axis.
    n, _, *sides = images.shape
    taps = kernels.shape[1]
    padding = taps // 2
    out = F.pad(images, [padding] * (2 * len(sides)), mode="replicate")
    stride = 1
    for side in reversed(sides):
        rows = out.reshape(1, n, -1, stride * (side + 2 * padding))
        out = F.conv2d(rows, kernels.reshape(n, 1, 1, taps), groups=n, dilation=(1, stride))
        stride *= side
    return out.reshape(images.shape)
