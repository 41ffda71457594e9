"""Detectors of what is salient, as published."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F

from sklearn_medimb._machine.runtime import pixel_block

Detector = Callable[..., torch.Tensor]

LUMA = (0.299, 0.587, 0.114)
POLARITIES = ("both", "dark", "bright")
RADII = (12, 24, 48, 28, 56, 112)  # pixels, for images whose shorter side has 450


def intensity(images: torch.Tensor) -> torch.Tensor:
    """Gray images of shape ``(n, *spatial)``: luma of three channels, else the mean over them."""
    if images.shape[1] != 3:
        return images.mean(dim=1)
    red, green, blue = images.unbind(dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def _over_pixels(reduce: Callable[..., torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Reduce each image to one number, shaped to combine with the images."""
    return reduce(images, tuple(range(1, images.ndim)), keepdim=True)


def _over_maximum(maps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Divide each map by its maximum; one that never exceeds `noise` is rounding only: zero."""
    top = _over_pixels(torch.amax, maps)
    return torch.where(top > noise, maps / top, 0)


def _rounding(gray: torch.Tensor) -> torch.Tensor:
    """What arithmetic on these intensities cannot resolve, per image."""
    return 64 * torch.finfo(gray.dtype).eps * _over_pixels(torch.amax, gray.abs())


def _in_blocks(detect: Detector) -> Detector:
    """Check the input of a detector, and give it as many images at a time as stay in cache."""

    @wraps(detect)
    def detect_all(
        images: torch.Tensor, *, valid: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        shape = (len(images), *images.shape[2:])
        if images.ndim not in (4, 5):
            raise ValueError(
                f"images has shape {tuple(images.shape)}; it must be (n, C, H, W) or "
                "(n, C, D, H, W)."
            )
        if valid is not None and tuple(valid.shape) != shape:
            raise ValueError(f"valid has shape {tuple(valid.shape)}; it must be {shape}.")
        if images.dtype not in (torch.float32, torch.float64):
            images = images.float()
        block = pixel_block(tuple(images.shape[1:]), images.device)
        parts = images.split(block)
        masks = [None] * len(parts) if valid is None else valid.split(block)
        maps = []
        for part, mask in zip(parts, masks, strict=True):
            if not torch.isfinite(part.sum()):  # in cache, and no mask of booleans
                raise ValueError("images holds NaN or infinity.")
            maps.append(detect(part, valid=mask, **options))
        return torch.cat(maps)

    return detect_all


def _filled(gray: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Give pixels outside the valid region the mean of those inside, so that nothing leaks in."""
    if valid is None:
        return gray
    inside = valid.to(gray.dtype)
    total = _over_pixels(torch.sum, inside).clamp(min=1)
    return torch.where(valid, gray, _over_pixels(torch.sum, gray * inside) / total)


# ---------------------------------------------------------------- detectors


@_in_blocks
def fine_grained(
    images: torch.Tensor,
    *,
    polarity: str = "both",
    reference_size: float | None = 450.0,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Centre against surround, at six scales [1]_.

    After a slight blur each pixel g is compared with m_r, the mean over the box of radius r around
    it, itself left out:

        On = sum_r max(0, g - m_r),  Off = sum_r max(0, m_r - g),
        map = min(1, On / max(On) + Off / max(Off)).

    Parameters
    ----------
    images : tensor of shape (n, C, H, W) or (n, C, D, H, W)
        Floats on any scale.
    polarity : {"both", "dark", "bright"}, default="both"
        "dark" keeps Off alone (lesions darker than their surround), "bright" On alone.
    reference_size : float or None, default=450
        The published radii, 12 to 112 pixels, belong to images whose shorter side has this many.
        They are scaled with ``min(H, W)``, along the depth with ``min(D, H, W)``, to 1 at least.
        None takes them as they are.
    valid : tensor of bool, shape (n, *spatial), default=None
        Pixels outside enter no mean and no maximum, and have saliency 0; in the blur the mean of
        those inside stands for them.

    Returns
    -------
    maps : tensor of shape (n, *spatial)
        Values in [0, 1].

    References
    ----------
    .. [1] S. Montabone and A. Soto, "Human detection using a mobile platform and novel features
       derived from a visual saliency mechanism", Image and Vision Computing 28, 2010. Here boxes
       are symmetric and all arithmetic is float; OpenCV's integer version correlates above .99.
    """
    if polarity not in POLARITIES:
        raise ValueError(f"polarity={polarity!r} must be one of {POLARITIES}.")
    gray = intensity(images)
    noise = _rounding(gray)
    gray = _filled(gray, valid)
    gray = gray - _over_pixels(torch.mean, gray)  # sums around zero round less
    for axis in range(1, gray.ndim):
        gray = _blur(_blur(gray, axis), axis)
    inside = torch.ones_like(gray[:1]) if valid is None else valid.to(gray.dtype)
    if valid is not None:
        gray = gray * inside

    radii = _radii(gray.shape[1:], reference_size)
    reach = tuple(max(along) for along in zip(*radii, strict=True))
    sums, counts = _BoxSums(gray, reach), _BoxSums(inside, reach)
    magnitude, signed = torch.zeros_like(gray), torch.zeros_like(gray)
    for radius, times in Counter(radii).items():
        n_pixels = counts(radius)
        # g - m = (n g - sum over the box) / (n - 1)
        share = times / (n_pixels - 1).clamp_(min=1)
        difference = torch.addcmul(gray * (n_pixels * share), sums(radius), share, value=-1)
        signed += difference
        magnitude += difference.abs_()
    if valid is not None:
        magnitude, signed = magnitude * inside, signed * inside
    # max(0, d) = (|d| + d) / 2, whose half the maximum takes out.
    maps = torch.zeros_like(gray)
    if polarity != "dark":
        maps += _over_maximum(magnitude + signed, noise)
    if polarity != "bright":
        maps += _over_maximum(magnitude - signed, noise)
    return maps.clamp_(max=1)


def _radii(sides: Sequence[int], reference_size: float | None) -> list[tuple[int, ...]]:
    """The six radii along each axis."""
    in_plane = min(sides[-2:])
    shorter = [min(in_plane, side) for side in sides[:-2]] + [in_plane] * 2

    def scaled(radius: int, short: int) -> int:
        return radius if reference_size is None else max(1, round(radius * short / reference_size))

    return [
        tuple(min(side, scaled(r, short)) for side, short in zip(sides, shorter, strict=True))
        for r in RADII
    ]


class _BoxSums:
    """Sums over boxes of any radius up to `reach`, cut at the edges, from one integral image."""

    def __init__(self, values: torch.Tensor, reach: tuple[int, ...]) -> None:
        self.sides = values.shape[1:]
        self.reach = reach
        for axis in range(1, values.ndim):
            values = _running_sum(values, axis)
        # Zeros before and the last value after stand in for boxes that leave the image.
        before = [pad for r in reversed(reach) for pad in (r + 1, 0)]
        after = [pad for r in reversed(reach) for pad in (0, r)]
        self.integral = F.pad(F.pad(values, before)[None], after, mode="replicate")[0]

    def __call__(self, radius: tuple[int, ...]) -> torch.Tensor:
        sums = self.integral
        for axis, (side, reach, r) in enumerate(
            zip(self.sides, self.reach, radius, strict=True), 1
        ):
            sums = sums.narrow(axis, reach + r + 1, side) - sums.narrow(axis, reach - r, side)
        return sums


def _running_sum(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Cumulative sum; torch's has no deterministic kernel on CUDA."""
    if not values.is_cuda:
        return values.cumsum(axis)
    side = values.shape[axis]
    until = torch.ones(side, side, dtype=values.dtype, device=values.device).triu()
    return (values.movedim(axis, -1) @ until).movedim(-1, axis)


def _blur(images: torch.Tensor, axis: int) -> torch.Tensor:
    """Binomial blur (1, 2, 1) / 4 along an axis, mirrored at the edge pixels."""
    side = images.shape[axis]
    edge = min(1, side - 1)
    first, last = images.narrow(axis, edge, 1), images.narrow(axis, side - 1 - edge, 1)
    wide = torch.cat([first, images, last], dim=axis)
    outer = wide.narrow(axis, 0, side) + wide.narrow(axis, 2, side)
    return outer.mul_(0.25).add_(images, alpha=0.5)


@_in_blocks
def spectral_residual(
    images: torch.Tensor, *, size: int = 64, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """What is unexpected in the log amplitude spectrum [1]_.

    With A the log amplitudes of the image at `size` pixels a side, the residual is
    ``R = A - mean of A over 3 x 3 frequencies``, and the map ``|IFFT(exp(R) exp(i phase))|``,
    blurred (sigma 8, five pixels wide), squared, and divided by its maximum.

    Parameters
    ----------
    images : tensor of shape (n, C, H, W) or (n, C, D, H, W)
        Floats on any scale.
    size : int, default=64
        Side of the spectrum.
    valid : tensor of bool, shape (n, *spatial), default=None
        Pixels outside are set to the mean of those inside, and have saliency 0.

    Returns
    -------
    maps : tensor of shape (n, *spatial)
        Values in [0, 1].

    References
    ----------
    .. [1] X. Hou and L. Zhang, "Saliency detection: a spectral residual approach", CVPR 2007.
    """
    if size < 3:
        raise ValueError(f"size={size} must be at least 3.")
    gray = intensity(images)
    noise = _rounding(gray)
    gray = _filled(gray, valid)
    low = _over_pixels(torch.amin, gray)
    contrast = _over_pixels(torch.amax, gray) - low
    gray = (gray - low) / torch.where(contrast > noise, contrast, 1)

    mode = "bilinear" if gray.ndim == 3 else "trilinear"
    axes = tuple(range(1, gray.ndim))
    small = F.interpolate(gray[:, None], size=[size] * len(axes), mode=mode)[:, 0]
    spectrum = torch.fft.fftn(small, dim=axes)
    amplitude = spectrum.abs().clamp(min=torch.finfo(gray.dtype).eps)
    expected = amplitude.log()
    offsets = torch.arange(-2, 3, dtype=gray.dtype, device=gray.device)
    window = torch.exp(-(offsets**2) / (2 * 8.0**2))
    for axis in axes:
        expected = _convolve(expected, window.new_full((3,), 1 / 3), axis)
    maps = torch.fft.ifftn(spectrum / expected.exp(), dim=axes).abs()
    for axis in axes:
        maps = _convolve(maps, window / window.sum(), axis)
    maps = F.interpolate(maps.square()[:, None], size=gray.shape[1:], mode=mode)[:, 0]
    maps = maps if valid is None else maps * valid
    return torch.where(contrast > noise, _over_maximum(maps, torch.zeros_like(contrast)), 0)


def _convolve(images: torch.Tensor, window: torch.Tensor, axis: int) -> torch.Tensor:
    """Convolve along an axis of at least three pixels, mirrored at the edge pixels."""
    n, side = len(window) // 2, images.shape[axis]
    places = torch.arange(-n, side + n, device=images.device).abs()
    places = side - 1 - (side - 1 - places).abs()
    wide = images.index_select(axis, places)
    parts = (wide.narrow(axis, k, side) * weight for k, weight in enumerate(window))
    return sum(parts, torch.zeros_like(images))


@_in_blocks
def center(images: torch.Tensor, *, valid: torch.Tensor | None = None) -> torch.Tensor:
    """A fixed prior: lesions are photographed in the middle.

    Parameters
    ----------
    images : tensor of shape (n, C, H, W) or (n, C, D, H, W)
        Floats; only their shape matters, and whether they are constant.
    valid : tensor of bool, shape (n, *spatial), default=None
        Pixels outside have saliency 0.

    Returns
    -------
    maps : tensor of shape (n, *spatial)
        A Gaussian bump: 1 in the middle, exp(-2) half-way along each edge.
    """
    gray = intensity(images)
    square = torch.zeros_like(gray[0])
    for axis, side in enumerate(square.shape):
        place = (torch.arange(side, dtype=gray.dtype, device=gray.device) * 2 + 1 - side) / side
        square += place.square().view(-1, *[1] * (square.ndim - 1 - axis))
    contrast = _over_pixels(torch.amax, gray) - _over_pixels(torch.amin, gray)
    maps = torch.where(contrast > _rounding(gray), torch.exp(-2 * square), 0)
    return maps if valid is None else maps * valid


DETECTORS: dict[str, Detector] = {
    "fine_grained": fine_grained,
    "spectral_residual": spectral_residual,
    "center": center,
}


# ---------------------------------------------------------------- any source of maps


def valid_region(images: torch.Tensor, threshold: float = 0.05) -> torch.Tensor:
    """Field of view: everything but black borders, as fundus cameras and dermoscopes leave them.

    Parameters
    ----------
    images : tensor of shape (n, C, *spatial)
        Floats.
    threshold : float, default=0.05
        Share of an image's intensity range, from its minimum, that counts as black.

    Returns
    -------
    valid : tensor of bool, shape (n, *spatial)
        False where, along some axis, only black lies between a pixel and an edge of the image. A
        constant image is valid as a whole.
    """
    gray = intensity(images)
    low, high = _over_pixels(torch.amin, gray), _over_pixels(torch.amax, gray)
    bright = (gray > low + threshold * (high - low)).to(torch.uint8)
    valid = torch.ones_like(bright)
    for axis in range(1, gray.ndim):
        valid *= bright.cummax(axis).values
        valid *= bright.flip(axis).cummax(axis).values.flip(axis)
    return valid.bool() | (low == high)
