"""Batched, replayable augmentation of 2-D and 3-D medical images.

An :class:`Augmentation` works in two steps: `draw` takes every random decision for a batch
from an explicit generator, and `apply` is a pure function of the images and of those draws.
Both treat the whole batch at once, on its device, and never wait for a value to come back
from it.

Imports `_parameters`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator
from torch import Tensor

from sklearn_medimb._parameters import Declaring, parameter, within

__all__ = ["AUGMENTATIONS", "Augmentation", "geometry", "resolve_augmentation", "symmetries"]

_WARPS = ("rotation", "tilt", "shear", "scale", "translate", "crop")
_SOMETIMES = ("blur", "noise", "cutout")
_COLOURS = ("saturation", "hue", "grayscale")
# Flips and the axis they reverse, counted from the last.
_FLIPS = {"horizontal_flip": -1, "vertical_flip": -2, "depth_flip": -3}

# Uniform numbers drawn for each image, whatever is switched on: an operation that is turned on
# or tuned leaves the draws of the others as they were, and so does a larger batch. Colours came
# later: they have a table of their own, drawn last, so that this one keeps its width.
_UNIFORMS = {
    "flip": 3,
    "angles": 3,
    "shear": 1,
    "scale": 1,
    "translate": 3,
    "crop": 4,
    "tone": 3,
    "blur": 2,
    "noise": 2,
    "cutout": 7,
}


_SHARE = within(0.0, 1.0)


class Augmentation(Declaring, BaseEstimator):
    """Random flips, warps, blur, colour, tone, noise and cutout for a batch of images.

    Images are floating-point tensors of shape ``(B, C, H, W)`` or ``(B, C, D, H, W)``, with any
    number of channels and values in any range. Each image gets its own draw, which all its
    channels share. The defaults change nothing.

    Operations run in the order of the parameters below. All warps are composed with the flips
    into one affine map and sampled once (linearly, mirrored beyond the border); flips alone are
    exact. Likewise all changes of colour are one matrix. Intensities are not clipped afterwards.

    Parameters
    ----------
    horizontal_flip
        Probability of reversing the last axis (W).
    vertical_flip
        Probability of reversing the axis before (H).
    depth_flip
        Probability of reversing D. Ignored for 2-D images.
    rotation
        Largest rotation in the H-W plane, in degrees; drawn from ``[-rotation, rotation]``. It
        is a rotation in pixels, also when the image is not square.
    tilt
        Largest rotation of a volume out of the H-W plane, about the H and the W axis, in
        degrees. Voxels are taken to be cubes. Ignored for 2-D images.
    shear
        Largest shear along W, in degrees.
    scale
        Zoom as a fraction: the factor lies between ``1 / (1 + scale)`` and ``1 + scale``, drawn
        evenly on a log scale.
    translate
        Largest shift along each axis, as a fraction of its side.
    crop
        Smallest fraction of each side kept by a random crop, which is resized to the full
        image. 1.0 keeps everything.
    blur
        Largest standard deviation of a Gaussian blur, in pixels.
    blur_probability
        Probability that an image is blurred.
    saturation
        Largest relative change of the distance to the grey of the same luma. This and the next
        two are for images of three channels, red, green and blue; others ignore them, and greys
        remain as they are.
    hue
        Largest rotation of the colours about the grey axis, in turns of the colour circle: a
        third of a turn makes red green, green blue and blue red.
    grayscale
        Probability of replacing all three channels with the luma.
    gamma
        Largest ``|log(g)|`` of the power ``g`` applied to the image rescaled to [0, 1] by its
        own extremes, and then scaled back. Colours that were moved beyond the extremes are
        clipped to them first.
    contrast
        Largest relative change of the distance to the mean of the channel.
    brightness
        Largest shift, as a fraction of the intensity range (max - min) of the image.
    noise
        Largest standard deviation of Gaussian noise, as a fraction of the intensity range of
        the image. The noise is the same in all channels, so that a grey image stored in three
        channels remains grey.
    noise_probability
        Probability that noise is added to an image.
    cutout
        Largest side of a box filled with the mean of the channel, as a fraction of each side.
    cutout_probability
        Probability that a box is cut out of an image.

    Notes
    -----
    The intensity range is that of the image as given, over all its channels. Parameters are
    checked by `draw`.

    Examples
    --------
    >>> import torch
    >>> augment = Augmentation(horizontal_flip=0.5, rotation=15)
    >>> generator = torch.Generator().manual_seed(0)
    >>> augment(torch.rand(8, 3, 32, 32), generator).shape
    torch.Size([8, 3, 32, 32])
    """

    horizontal_flip: float = parameter(_SHARE, default=0.0, search=[0.0, 0.5])
    vertical_flip: float = parameter(_SHARE, default=0.0, search=[0.0, 0.5])
    depth_flip: float = parameter(_SHARE, default=0.0)
    rotation: float = parameter(within(0.0, 180.0), default=0.0, search=(0.0, 180.0))
    tilt: float = parameter(within(0.0, 180.0), default=0.0)
    shear: float = parameter(within(0.0, 60.0), default=0.0, search=(0.0, 15.0))
    scale: float = parameter(_SHARE, default=0.0, search=(0.0, 0.3))
    translate: float = parameter(_SHARE, default=0.0, search=(0.0, 0.2))
    crop: float = parameter(within(0.05, 1.0), default=1.0, search=(0.4, 1.0))
    blur: float = parameter(within(0.0, 32.0), default=0.0, search=(0.0, 2.0))
    blur_probability: float = parameter(_SHARE, default=0.5)
    saturation: float = parameter(_SHARE, default=0.0, search=(0.0, 0.4))
    hue: float = parameter(within(0.0, 0.5), default=0.0, search=(0.0, 0.1))
    grayscale: float = parameter(_SHARE, default=0.0)
    gamma: float = parameter(within(0.0, 3.0), default=0.0, search=(0.0, 0.5))
    contrast: float = parameter(_SHARE, default=0.0, search=(0.0, 0.5))
    brightness: float = parameter(_SHARE, default=0.0, search=(0.0, 0.5))
    noise: float = parameter(_SHARE, default=0.0, search=(0.0, 0.1))
    noise_probability: float = parameter(_SHARE, default=0.5)
    cutout: float = parameter(_SHARE, default=0.0, search=(0.0, 0.4))
    cutout_probability: float = parameter(_SHARE, default=0.5)

    @property
    def is_identity(self) -> bool:
        """Whether no image is ever changed."""
        return not any(self._is_on(name) for name in self._declared if "probability" not in name)

    def draw(
        self, n: int, image_shape: tuple[int, ...], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Draw everything that is random for a batch.

        Parameters
        ----------
        n : int
            Number of images.
        image_shape : tuple of int
            Shape of one image, ``(C, H, W)`` or ``(C, D, H, W)``.
        generator : torch.Generator
            Source of randomness, and the only one.

        Returns
        -------
        params : dict of str to Tensor
            One float32 tensor of first dimension `n`, on the device of the generator, for each
            step that is switched on: ``affine`` (n, d, d + 1), or the flips (n,) when nothing
            else moves pixels; ``blur`` (n, taps); ``colour`` (n, 3, 3); ``gamma``, ``contrast``
            and ``brightness`` (n,); ``noise`` (n, 1, H, W) or (n, 1, D, H, W); ``cutout``
            (n, d, 2). Here d is the number of spatial dimensions.
        """
        self._check()
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {generator!r}.")
        spatial = tuple(image_shape[1:])
        if len(spatial) not in (2, 3):
            raise ValueError(
                f"image_shape must be (C, H, W) or (C, D, H, W), got {tuple(image_shape)}."
            )
        if self.is_identity:
            return {}

        size = (n, sum(_UNIFORMS.values()))
        table = torch.rand(size, generator=generator, device=generator.device)
        u = dict(zip(_UNIFORMS, table.split(list(_UNIFORMS.values()), dim=1), strict=True))
        params = self._draw_geometry(u, spatial)

        if self._is_on("blur"):
            sigma = self.blur * u["blur"][:, 1] * (u["blur"][:, 0] < self.blur_probability)
            params["blur"] = _gaussian_kernels(sigma, radius=math.ceil(3 * self.blur))
        gamma, contrast, brightness = (2 * u["tone"] - 1).unbind(dim=1)
        if self._is_on("gamma"):
            params["gamma"] = torch.exp(self.gamma * gamma)
        if self._is_on("contrast"):
            params["contrast"] = 1 + self.contrast * contrast
        if self._is_on("brightness"):
            params["brightness"] = self.brightness * brightness
        if self._is_on("noise"):
            std = self.noise * u["noise"][:, 1] * (u["noise"][:, 0] < self.noise_probability)
            field = torch.randn((n, 1, *spatial), generator=generator, device=generator.device)
            params["noise"] = field.mul_(_per_image(std, field))
        if self._is_on("cutout"):
            selected = u["cutout"][:, :1] < self.cutout_probability
            length, place = u["cutout"][:, 1:].split(3, dim=1)
            params["cutout"] = _boxes(spatial, self.cutout * length * selected, place)
        if any(self._is_on(name) for name in _COLOURS):
            size = (n, len(_COLOURS))
            table = torch.rand(size, generator=generator, device=generator.device)
            params["colour"] = self._draw_colour(table)
        return params

    def apply(self, images: Tensor, params: dict[str, Tensor]) -> Tensor:
        """Apply what was drawn, to the batch it was drawn for or to another one.

        Parameters
        ----------
        images : Tensor of shape (B, C, H, W) or (B, C, D, H, W)
            Images with the batch and spatial sizes given to `draw`; the number of channels may
            differ.
        params : dict of str to Tensor
            What `draw` returned. It may be a part of it: without the intensity steps, say, for
            a batch of masks.

        Returns
        -------
        augmented : Tensor
            New images of the same shape, dtype and device; `images` itself if there is
            nothing to do.
        """
        _check_batch(images, params)
        if images.shape[1] != 3:
            params = {k: v for k, v in params.items() if k != "colour"}
        if not params or not images.numel():
            return images
        params = {k: v.to(images, non_blocking=images.is_cuda) for k, v in params.items()}
        out = images

        if "affine" in params:
            out = _warp(out, params["affine"])
        for name, axis in _FLIPS.items():
            if name in params:
                out = torch.where(_per_image(params[name], out) > 0, out.flip(axis), out)
        if "blur" in params:
            out = _blur(out, params["blur"])
        if "colour" in params:
            out = _recolour(out, params["colour"])

        # Linear sampling and blur stay within the extremes of the image, so that those of the
        # input hold, and gamma always meets values in [0, 1]. A colour matrix may leave them:
        # more saturated than the image was, or rotated out of the cube. Then gamma clips.
        tone = {k: _per_image(params[k], out) for k in _TONE if k in params}
        if "noise" in params or tone.keys() & {"gamma", "brightness"}:
            low, span = _extremes(images)
            tone |= {"low": low, "span": span}
        # In place, as fresh memory costs more than the arithmetic; but never in the input.
        if out is images and (tone or "noise" in params):
            out = images.clone()
        if tone.keys() & set(_TONE):
            out = _change_tone_(out, clip="colour" in params, **tone)
        if "noise" in params:
            out = out.add_(params["noise"] * span)
        if "cutout" in params:
            inside = _inside(params["cutout"], out.shape[2:])
            out = torch.where(inside, _channel_mean(out), out)
        return out.contiguous(memory_format=_memory_format(images))

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Draw and apply at once.

        Parameters
        ----------
        images : Tensor of shape (B, C, H, W) or (B, C, D, H, W)
            Images to augment.
        generator : torch.Generator
            Source of randomness.

        Returns
        -------
        augmented : Tensor
            New images of the same shape, dtype and device.
        """
        return self.apply(images, self.draw(images.shape[0], images.shape[1:], generator))

    def _is_on(self, name: str) -> bool:
        probability = getattr(self, f"{name}_probability") if name in _SOMETIMES else 1.0
        return getattr(self, name) != self._declared[name].default and probability != 0

    def _check(self) -> None:
        for name, (interval,) in self._parameter_constraints.items():
            value, low, high = getattr(self, name), interval.left, interval.right
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            # Written so that NaN fails as well.
            if not (is_number and low <= value <= high):
                raise ValueError(f"{name} must be a number in [{low}, {high}], got {value!r}.")

    def _draw_geometry(self, u: dict[str, Tensor], spatial: tuple[int, ...]) -> dict[str, Tensor]:
        dims = len(spatial)
        flips = {
            name: u["flip"][:, i] < getattr(self, name)
            for i, name in enumerate(_FLIPS)
            if i < dims and self._is_on(name)
        }
        if not any(self._is_on(name) for name in _WARPS if dims == 3 or name != "tilt"):
            return {name: flip.float() for name, flip in flips.items()}

        turn, *tilts = torch.deg2rad(2 * u["angles"] - 1).unbind(dim=1)
        kept = 1 - (1 - self.crop) * u["crop"][:, :1]
        zoom = torch.exp(math.log1p(self.scale) * (2 * u["scale"] - 1)) / kept
        # In half sides, the unit of the sampling grid.
        shift = 2 * self.translate * (2 * u["translate"][:, :dims] - 1)
        shift = shift + (1 - kept) * (2 * u["crop"][:, 1 : 1 + dims] - 1)
        sign = torch.ones_like(shift)
        for name, flip in flips.items():
            sign[:, -1 - _FLIPS[name]] -= 2 * flip
        affine = affine_matrix(
            spatial,
            angles=[self.rotation * turn, *(self.tilt * tilt for tilt in tilts)],
            shear=torch.deg2rad(self.shear * (2 * u["shear"][:, 0] - 1)),
            zoom=zoom[:, 0],
            shift=shift,
            sign=sign,
        )
        return {"affine": affine}

    def _draw_colour(self, u: Tensor) -> Tensor:
        # Written out, as products of matrices would be rounded to TF32 where a user allows it,
        # and greys take a tint. All factors map grey to itself, and so does what is composed.
        saturation, turn, drop = u[:, :, None, None].unbind(dim=1)
        luma = torch.tensor(_LUMA).to(u.device, non_blocking=True)
        colour = torch.eye(3, device=u.device).expand(len(u), 3, 3)
        if self._is_on("hue"):
            colour = _hue_matrices(self.hue * (2 * turn - 1))
        if self._is_on("saturation"):
            factor = 1 + self.saturation * (2 * saturation - 1)
            colour = factor * colour + (1 - factor) * luma
        if self._is_on("grayscale"):
            grey = (luma[:, None] * colour).sum(dim=1, keepdim=True)
            colour = torch.where(drop < self.grayscale, grey, colour)
        return colour


def geometry(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the draws for a batch those that move pixels: for masks and maps of the same images.

    Parameters
    ----------
    params : dict of str to Tensor
        What `draw` returned.

    Returns
    -------
    params : dict of str to Tensor
        A part of it. Affine maps are in units of half sides, so that the maps may be coarser.
    """
    return {name: value for name, value in params.items() if name in {"affine", *_FLIPS}}


# Geometry


def affine_matrix(
    spatial: tuple[int, ...],
    angles: list[Tensor],
    shear: Tensor,
    zoom: Tensor,
    shift: Tensor,
    sign: Tensor,
) -> Tensor:
    """Compose one affine map per image, from places in the output to places in the input.

    Places are in the coordinates of the sampling grid: x, y, z for W, H, D, from -1 at one
    border to 1 at the other.

    Parameters
    ----------
    spatial : tuple of int
        Sides of the image, (H, W) or (D, H, W).
    angles : list of Tensor of shape (n,)
        Angles in radians in the planes x-y, x-z and y-z; the last two are for volumes only. In
        the first, a positive angle turns the picture counterclockwise.
    shear : Tensor of shape (n,)
        Shear along x, in radians.
    zoom : Tensor of shape (n,)
        Magnification.
    shift : Tensor of shape (n, d)
        Place in the input of the centre of the output.
    sign : Tensor of shape (n, d)
        -1 for an axis to flip, otherwise 1.

    Returns
    -------
    affine : Tensor of shape (n, d, d + 1)
        Linear part and, in the last column, shift.
    """
    sides = spatial[::-1]
    dims = len(sides)
    eye = torch.eye(dims, device=zoom.device).expand(len(zoom), dims, dims)

    linear = eye.clone()
    linear[:, 0, 1] = torch.tan(shear)
    for angle, (i, j) in zip(angles, [(0, 1), (0, 2), (1, 2)][: 2 * dims - 3], strict=False):
        turn = eye.clone()
        turn[:, i, i] = turn[:, j, j] = torch.cos(angle)
        turn[:, j, i] = torch.sin(angle)
        turn[:, i, j] = -turn[:, j, i]
        linear = turn @ linear
    # So far in pixels: a step of 1 in the grid is half a side, of its own length for each axis.
    aspect = torch.tensor([[float(b) / a for b in sides] for a in sides])
    linear = linear * aspect.to(zoom.device, non_blocking=True) / zoom[:, None, None]
    return torch.cat([linear, shift[:, :, None]], dim=2) * sign[:, :, None]


def _warp(images: Tensor, affine: Tensor) -> Tensor:
    # The grid is a sum of one vector per axis. Kept as planes it takes a single pass over its
    # full size, which is many times faster than multiplying every point by its matrix.
    dims = affine.shape[1]
    columns = affine.reshape(len(affine), dims, dims + 1, *[1] * dims).unbind(dim=2)
    grid = columns[-1]
    for axis in reversed(range(dims)):
        side = images.shape[-1 - axis]
        centres = torch.arange(1 - side, side, 2, device=grid.device, dtype=grid.dtype) / side
        grid = grid + columns[axis] * centres.reshape(-1, *[1] * axis)
    return F.grid_sample(
        images,
        grid.movedim(1, -1),
        mode="bilinear",
        padding_mode="reflection",
        align_corners=False,
    )


def _boxes(spatial: tuple[int, ...], fraction: Tensor, place: Tensor) -> Tensor:
    bounds = []
    for axis, side in enumerate(spatial):
        length = torch.ceil(side * fraction[:, axis])
        start = torch.floor(place[:, axis] * (side - length + 1))
        bounds.append(torch.stack([start, start + length], dim=1))
    return torch.stack(bounds, dim=1)


def _inside(boxes: Tensor, spatial: tuple[int, ...]) -> Tensor:
    inside = boxes.new_ones((), dtype=torch.bool)
    for axis, side in enumerate(spatial):
        index = torch.arange(side, device=boxes.device)
        start, stop = boxes[:, axis, :, None].unbind(dim=1)
        hit = (start <= index) & (index < stop)
        shape = [1] * len(spatial)
        shape[axis] = side
        inside = inside & hit.reshape(-1, 1, *shape)
    return inside


# Intensity

_TONE = ("gamma", "contrast", "brightness")
_LUMA = (0.299, 0.587, 0.114)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (images.ndim - 1))


def _channel_mean(images: Tensor) -> Tensor:
    return images.mean(dim=tuple(range(2, images.ndim)), keepdim=True)


def _extremes(images: Tensor) -> tuple[Tensor, Tensor]:
    # Constants of the image: no gradient runs through them.
    images = images.detach()
    dims = tuple(range(1, images.ndim))
    low = images.amin(dim=dims, keepdim=True)
    return low, images.amax(dim=dims, keepdim=True) - low


def _hue_matrices(turns: Tensor) -> Tensor:
    # A rotation about the grey axis is circulant. Its rows sum to 1.
    channel = torch.arange(3, device=turns.device)
    third = (channel - channel[:, None]) / 3
    return (1 + 2 * torch.cos(2 * math.pi * (turns + third))) / 3


def _recolour(images: Tensor, matrices: Tensor) -> Tensor:
    # One channel of the input at a time, for all of the output. As fast as a product of matrices,
    # and neither TF32 nor the size of the batch changes a bit of it.
    weights = matrices.reshape(*matrices.shape, *[1] * (images.ndim - 2)).unbind(dim=2)
    channels = images.split(1, dim=1)
    out = weights[0] * channels[0]
    for weight, channel in zip(weights[1:], channels[1:], strict=True):
        out.addcmul_(weight, channel)
    return out


def _change_tone_(
    images: Tensor,
    *,
    clip: bool = False,
    gamma: Tensor | None = None,
    contrast: Tensor | None = None,
    brightness: Tensor | None = None,
    low: Tensor | None = None,
    span: Tensor | None = None,
) -> Tensor:
    # In place, hence the underscore. Undoing the rescaling of gamma, contrast and brightness are
    # all of the form `gain * image + offset`: gathered first, they cost two passes together.
    # `low` and `span` come with gamma and with brightness. Without `clip` values are in [0, 1]
    # but for rounding, which is left above 1 where it does no harm.
    gain = images.new_ones((len(images), *[1] * (images.ndim - 1)))
    offset = torch.zeros_like(gain)
    if gamma is not None:
        assert low is not None
        assert span is not None
        unit = images.sub_(low).div_(torch.where(span > 0, span, 1))
        # Not 0, where the power would have an infinite slope.
        tiny = torch.finfo(unit.dtype).tiny
        images = unit.clamp_(min=tiny, max=1 if clip else None).pow_(gamma)
        gain, offset = span, low
    if contrast is not None:
        offset = offset + (1 - contrast) * gain * _channel_mean(images.detach())
        gain = gain * contrast
    if brightness is not None:
        assert span is not None
        offset = offset + brightness * span
    # The gradient of the power needs its result.
    images = images * gain if images.requires_grad else images.mul_(gain)
    return images.add_(offset)


def _gaussian_kernels(sigma: Tensor, radius: int) -> Tensor:
    # With the smallest width all weights but the central one underflow to exactly 0.
    steps = torch.arange(-radius, radius + 1, device=sigma.device)
    weights = torch.exp(-0.5 * (steps / sigma.clamp(min=1e-2)[:, None]) ** 2)
    return weights / weights.sum(dim=1, keepdim=True)


def _blur(images: Tensor, kernels: Tensor) -> Tensor:
    # One group per channel of each image lets every image have its own kernel.
    n, channels, *spatial = images.shape
    taps, dims, groups = kernels.shape[1], len(spatial), n * channels
    convolve = F.conv2d if dims == 2 else F.conv3d
    weights = kernels.repeat_interleave(channels, dim=0)
    out = images.reshape(1, groups, *spatial)
    for axis in range(dims):
        shape = [1] * dims
        shape[axis] = taps
        padding = [0] * (2 * dims)
        padding[2 * (dims - 1 - axis)] = padding[2 * (dims - 1 - axis) + 1] = taps // 2
        padded = F.pad(out, padding, mode="replicate")
        out = convolve(padded, weights.reshape(groups, 1, *shape), groups=groups)
    return out.reshape(images.shape)


# Checks and presets


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


_MEDICAL = {
    "horizontal_flip": 0.5,
    "vertical_flip": 0.5,
    "depth_flip": 0.5,
    "rotation": 15.0,
    "tilt": 5.0,
    "scale": 0.15,
    "translate": 0.08,
    "gamma": 0.2,
    "contrast": 0.2,
    "brightness": 0.2,
}
_STRONG = _MEDICAL | {
    "rotation": 180.0,
    "tilt": 15.0,
    "crop": 0.6,
    "blur": 1.0,
    "noise": 0.05,
    "cutout": 0.3,
}
_VIEWS = {
    "horizontal_flip": 0.5,
    "blur": 1.0,
    "contrast": 0.4,
    "brightness": 0.2,
    "hue": 0.1,
    "grayscale": 0.2,
}

AUGMENTATIONS: dict[str, Callable[[], Augmentation]] = {
    "none": Augmentation,
    "light": partial(
        Augmentation,
        horizontal_flip=0.5,
        rotation=10.0,
        scale=0.1,
        translate=0.05,
        contrast=0.1,
        brightness=0.1,
    ),
    "medical": partial(Augmentation, **_MEDICAL),
    # A heart is on the left: mirrored, a film of the chest is one of another disease.
    "chest": partial(Augmentation, **{k: v for k, v in _MEDICAL.items() if k not in _FLIPS}),
    "strong": partial(Augmentation, **_STRONG),
    "contrastive": partial(
        Augmentation, **_VIEWS, vertical_flip=0.5, depth_flip=0.5, crop=0.45, saturation=0.2
    ),
    # The smallest window has 0.08 of the area.
    "mimv": partial(Augmentation, **_VIEWS, crop=0.28, saturation=0.4),
}
"""Presets: what to call, without arguments, for a new augmentation of that name."""


def resolve_augmentation(augment: str | Augmentation | None) -> Augmentation:
    """Turn what a user may pass as `augment` into an augmentation.

    Parameters
    ----------
    augment : {"none", "light", "medical", "chest", "strong", "contrastive", "mimv"}, \
            Augmentation or None
        A preset; None stands for "none". "medical" flips along every axis, "chest" is the same
        without flips, for images whose left is not their right; "contrastive" and "mimv" are hard
        views for self-supervised pre-training. Any object with the methods `draw` and `apply` of
        :class:`Augmentation` is returned as it is.

    Returns
    -------
    augmentation : Augmentation
        A new instance for a preset, otherwise `augment` itself.
    """
    if augment is None:
        augment = "none"
    presets = ", ".join(map(repr, AUGMENTATIONS))
    if isinstance(augment, str):
        if augment not in AUGMENTATIONS:
            raise ValueError(f"augment must be one of {presets}, got {augment!r}.")
        return AUGMENTATIONS[augment]()
    methods = (getattr(augment, name, None) for name in ("draw", "apply"))
    if isinstance(augment, type) or not all(map(callable, methods)):
        raise TypeError(
            f"augment must be one of {presets}, None, or an object with the methods draw and "
            f"apply such as Augmentation(), got {augment!r}."
        )
    return augment


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
        for name, axis in _FLIPS.items()
        if getattr(augmentation, name, 0.0) and -axis <= len(sides)
    ]
    flips = [[axis for k, axis in enumerate(axes) if 2**k & bits] for bits in range(2 ** len(axes))]
    flips.sort(key=len)
    single, several = flips[1 : 1 + len(axes)], flips[1 + len(axes) :]
    views: list[Callable[[Tensor], Tensor]] = [_as_it_is]
    views += [partial(torch.flip, dims=dims) for dims in single]
    turned: list[Callable[[Tensor], Tensor]] = []
    if {-1, -2} <= set(axes) and sides[-1] == sides[-2]:
        quarter, three = (partial(torch.rot90, k=k, dims=(-2, -1)) for k in (1, 3))
        turned = [quarter, three]
        turned += [partial(_turned_and_flipped, dims=[axis]) for axis in (-1, -2)]
    views += turned[:1]
    views += [partial(torch.flip, dims=dims) for dims in several]
    return (views + turned[1:])[:n]


def _as_it_is(images: Tensor) -> Tensor:
    return images


def _turned_and_flipped(images: Tensor, dims: list[int]) -> Tensor:
    return torch.rot90(images, 1, (-2, -1)).flip(dims)
