"""Batched, replayable augmentation of 2-D and 3-D medical images.

An :class:`Augmentation` works in two steps: `draw` takes every random decision for a batch
from an explicit generator, and `apply` is a pure function of the images and of those draws.
Both treat the whole batch at once, on its device, and never wait for a value to come back
from it. Nor do they send any: constants are made there, so that a CUDA graph may hold both.
Small images are over before the next kernel starts, so that kernels are what is saved.

Imports `_parameters`.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from functools import partial, reduce
from itertools import accumulate, chain
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
# or tuned leaves the draws of the others as they were, and so does a larger batch. Colours, which
# gray images have none of, have a table of their own, drawn last.
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
    "warp": 1,
}
_ENDS = dict(zip(_UNIFORMS, accumulate(_UNIFORMS.values()), strict=True))
# How an image is warped, from angles to crop, and whether.
_HOW, _WHETHER = slice(_ENDS["flip"], _ENDS["crop"]), slice(_ENDS["cutout"], _ENDS["warp"])

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
    warp_probability
        Probability that an image is warped: rotated, tilted, sheared, zoomed, shifted, cropped. The
        others are flipped at most, and stay as sharp as images are at predict: to sample between
        pixels blurs, small images most.
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
    warp_probability: float = parameter(_SHARE, default=1.0, search=(0.0, 1.0))
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

    @property
    def is_compact(self) -> bool:
        """Whether `draw` gives but a few numbers per image, so that many can be drawn ahead."""
        return not self._is_on("noise")

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

        def uniform(width: int) -> Tensor:
            return torch.rand((n, width), generator=generator, device=generator.device)

        table, ranges = uniform(sum(_UNIFORMS.values())), self._ranges(spatial)
        if self._is_on("noise"):
            field = torch.randn((n, 1, *spatial), generator=generator, device=generator.device)
        if "colour" in ranges:
            table = torch.cat([table, uniform(len(_COLOURS))], dim=1)
        constants = _on_device(self._constants(spatial, ranges), generator.device)
        table = torch.addcmul(constants["low"], table, constants["width"])
        if 0 < self.warp_probability < 1:  # at 0 each of them changes nothing
            table[:, _HOW].mul_(table[:, _WHETHER] < 0)

        def by_name(table: Tensor) -> dict[str, Tensor]:
            parts = table.split([len(columns) for columns in ranges.values()], dim=1)
            return dict(zip(ranges, parts, strict=True))

        # On a whole table an operation takes no longer than on a column.
        u, power, hit = by_name(table), {}, {}
        if self._is_on("scale") or self._is_on("gamma"):
            power = by_name(torch.exp(table))
        if any(self._is_on(name) for name in (*_SOMETIMES, "grayscale")):
            hit = by_name(table < 0)

        params = self._draw_geometry(u, power, spatial)
        if self._is_on("blur"):
            sigma = u["blur"][:, 1:] * hit["blur"][:, :1]
            # With the smallest width all weights but the central one underflow to exactly 0.
            weights = constants["square"] * sigma.clamp(min=1e-2).pow(-2)
            params["blur"] = torch.softmax(weights, dim=1)
        if self._is_on("gamma"):
            params["gamma"] = power["tone"][:, 0]
        if self._is_on("contrast"):
            params["contrast"] = u["tone"][:, 1]
        if self._is_on("brightness"):
            params["brightness"] = u["tone"][:, 2]
        if self._is_on("noise"):
            std = u["noise"][:, 1] * hit["noise"][:, 0]
            params["noise"] = field.mul_(_per_image(std, field))
        if self._is_on("cutout"):
            length, place = (part[:, : len(spatial)] for part in u["cutout"][:, 1:].split(3, dim=1))
            length = torch.ceil(length * hit["cutout"][:, :1])
            start = torch.floor(place * (constants["room"] - length))
            params["cutout"] = torch.addcmul(
                start[:, :, None], length[:, :, None], constants["ends"]
            )
        if "colour" in u:
            drop = hit["colour"][:, 2:] if self._is_on("grayscale") else None
            params["colour"] = self._draw_colour(u["colour"], drop, constants)
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
        if tone.keys() - {"contrast"} or "noise" in params:
            tone["low"], tone["span"] = _extremes(images)
        if tone.keys() & set(_TONE):
            out = _change_tone(out, tone, fresh=out is not images, clip="colour" in params)
        if "noise" in params:
            # In place, as fresh memory costs more than the arithmetic; but never in the input.
            add = torch.addcmul if out is images else Tensor.addcmul_
            out = add(out, params["noise"], tone["span"])
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
        probability = 1.0
        if name in _WARPS:
            probability = self.warp_probability
        elif name in _SOMETIMES:
            probability = getattr(self, f"{name}_probability")
        return getattr(self, name) != self._declared[name].default and probability != 0

    def _check(self) -> None:
        for name, (interval,) in self._parameter_constraints.items():
            value, low, high = getattr(self, name), interval.left, interval.right
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            # Written so that NaN fails as well.
            if not (is_number and low <= value <= high):
                raise ValueError(f"{name} must be a number in [{low}, {high}], got {value!r}.")

    def _ranges(self, spatial: tuple[int, ...]) -> dict[str, list[tuple[float, float]]]:
        # Between which values each uniform number is spread: none for an operation that is off,
        # and around 0 for a probability, so that as many as it says are negative.
        tilt = _either(math.radians(self.tilt))
        ranges = {
            "flip": [_below(getattr(self, name)) for name in _FLIPS],
            "angles": [_either(math.radians(self.rotation)), tilt, tilt],
            "shear": [_either(math.radians(self.shear))],
            "scale": [_either(-math.log1p(self.scale))],
            # In half sides, the unit of the sampling grid.
            "translate": [_either(2 * self.translate)] * 3,
            "crop": [(0.0, 1 - self.crop), *[_either(1.0)] * 3],
            "tone": [
                _either(self.gamma),
                (1 - self.contrast, 1 + self.contrast),
                _either(self.brightness),
            ],
            "blur": [_below(self.blur_probability), (0.0, self.blur)],
            "noise": [_below(self.noise_probability), (0.0, self.noise)],
            "cutout": [
                _below(self.cutout_probability),
                *[(0.0, self.cutout * side) for side in (*spatial, 0)[:3]],
                *[(0.0, 1.0)] * 3,
            ],
            "warp": [_below(self.warp_probability)],
        }
        off = [name for name in ("crop", *_SOMETIMES) if not self._is_on(name)]
        ranges |= {name: [(0.0, 0.0)] * _UNIFORMS[name] for name in off}
        if any(self._is_on(name) for name in _COLOURS):
            saturation = (1 - self.saturation, 1 + self.saturation)
            turn = _either(2 * math.pi * self.hue)
            ranges["colour"] = [saturation, turn, _below(self.grayscale)]
        return ranges

    def _constants(
        self, spatial: tuple[int, ...], ranges: dict[str, list[tuple[float, float]]]
    ) -> dict[str, list[float]]:
        ends = list(chain(*ranges.values()))
        constants = {"low": [low for low, _ in ends], "width": [high - low for low, high in ends]}
        if self._is_on("blur"):
            radius = math.ceil(3 * self.blur)
            constants["square"] = [-0.5 * step**2 for step in range(-radius, radius + 1)]
        if self._is_on("cutout"):
            constants |= {"room": [side + 1.0 for side in spatial], "ends": [0.0, 1.0]}
        if "colour" in ranges:
            constants |= _colour_constants(self._is_on("hue"))
        return constants

    def _draw_geometry(
        self, u: dict[str, Tensor], power: dict[str, Tensor], spatial: tuple[int, ...]
    ) -> dict[str, Tensor]:
        dims = len(spatial)
        if not any(self._is_on(name) for name in _WARPS if dims == 3 or name != "tilt"):
            flips = dict(zip(_FLIPS, (u["flip"][:, :dims] < 0).float().unbind(dim=1), strict=False))
            return {name: flip for name, flip in flips.items() if self._is_on(name)}

        step, shift = power.get("scale"), u["translate"][:, :dims]
        if self._is_on("crop"):
            lost = u["crop"][:, :1]
            step = 1 - lost if step is None else torch.addcmul(step, step, lost, value=-1)
            shift = torch.addcmul(shift, u["crop"][:, 1 : 1 + dims], lost)
        return {
            "affine": affine_matrix(
                spatial,
                angles=u["angles"] if self._is_on("rotation") or self._is_on("tilt") else None,
                shear=u["shear"] if self._is_on("shear") else None,
                step=step,
                shift=shift,
                side=u["flip"],
            )
        }

    def _draw_colour(self, u: Tensor, drop: Tensor | None, constants: dict[str, Tensor]) -> Tensor:
        # Written out, as products of matrices would be rounded to TF32 where a user allows it,
        # and greys take a tint. All factors map grey to itself, and so does what is composed.
        factor, turn, _ = u[:, :, None, None].unbind(dim=1)
        colour = constants["rows"].reshape(4, 3)
        if self._is_on("hue"):
            waves = torch.cos(colour + turn)
            colour = torch.addcmul(constants["mean"], waves, constants["size"][:, None])
        colour = torch.lerp(constants["luma"], colour, factor)
        colour, grey = colour.split([3, 1], dim=1)
        return colour if drop is None else torch.where(drop[:, :, None], grey, colour)


def _either(largest: float) -> tuple[float, float]:
    return -largest, largest


def _below(probability: float) -> tuple[float, float]:
    return -probability, 1 - probability


def _colour_constants(is_turned: bool) -> dict[str, list[float]]:
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


def _on_device(values: dict[str, list[float]], device: torch.device) -> dict[str, Tensor]:
    # Sent along with a kernel, as its arguments. A copy from the host would not be safe in a CUDA
    # graph, which reads the memory again when it is replayed.
    constants = torch.zeros(sum(map(len, values.values())), device=device)
    slots = zip(constants.unbind(), chain(*values.values()), strict=True)
    used = [(slot, value) for slot, value in slots if value]
    torch._foreach_add_([slot for slot, _ in used], [value for _, value in used])
    return dict(zip(values, constants.split([*map(len, values.values())]), strict=True))


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
    angles: Tensor | None,
    shear: Tensor | None,
    step: Tensor | None,
    shift: Tensor,
    side: Tensor,
) -> Tensor:
    """Compose one affine map per image, from places in the output to places in the input.

    Places are in the coordinates of the sampling grid: x, y, z for W, H, D, from -1 at one
    border to 1 at the other.

    Parameters
    ----------
    spatial : tuple of int
        Sides of the image, (H, W) or (D, H, W).
    angles : Tensor of shape (n, 3) or None
        Angles in radians in the planes x-y, x-z and y-z; the last two are for volumes only. In
        the first, a positive angle turns the picture counterclockwise.
    shear : Tensor of shape (n, 1) or None
        Shear along x, in radians.
    step : Tensor of shape (n, 1) or None
        What one pixel of the output spans in the input: the inverse of the magnification.
    shift : Tensor of shape (n, d)
        Place in the input of the centre of the output.
    side : Tensor of shape (n, 3)
        Negative for an axis to flip.

    Returns
    -------
    affine : Tensor of shape (n, d, d + 1)
        Linear part and, in the last column, shift.
    """
    sides = spatial[::-1]
    dims = len(sides)
    eye = torch.eye(dims, device=shift.device)
    one, zero = eye[0, :2]
    if angles is None:
        affine = torch.cat([eye.expand(len(shift), dims, dims), shift[:, :, None]], dim=2)
    else:
        # Products of matrices would be rounded to TF32 where a user allows it, so that theirs is
        # written out. The entries are cosines and sines, of either sign.
        turn = torch.polar(one, angles[:, : 2 * dims - 3])
        back = torch.conj_physical(turn)
        (cos, sin), (_, minus) = (torch.view_as_real(z).unbind(dim=2) for z in (turn, back))
        if dims == 2:
            rows = [cos, minus, shift[:, :1], sin, cos, shift[:, 1:]]
        else:
            # The turn in x-z, then that in y-z.
            pair = torch.view_as_real(turn)[:, 1, :, None] * torch.view_as_real(back)[:, 2, None]
            cc, cs, sc, ss = pair.flatten(1).split(1, dim=1)
            (_, c2, c3), (_, _, s3), (_, m2, _) = (x.split(1, dim=1) for x in (cos, sin, minus))
            x, y, z = shift.split(1, dim=1)
            rows = [c2, zero.expand_as(c2), m2, x, ss, c3, cs, y, sc, s3, cc, z]
        affine = torch.cat(rows, dim=1).reshape(-1, dims, dims + 1)
        if dims == 3:
            # Before them that in x-y: it mixes the first two columns, as complex numbers.
            torch.view_as_complex(affine.reshape(-1, 3, 2, 2))[:, :, 0].mul_(back[:, :1])
    linear = affine[:, :, :dims]
    if shear is not None:
        linear[:, :, 1].addcmul_(linear[:, :, 0], torch.tan(shear))
    # So far in pixels: a step of 1 in the grid is half a side, of its own length for each axis.
    for axis, length in enumerate(sides):
        if length != sides[0]:
            linear[:, axis].mul_(sides[0] / length)
            linear[:, :, axis].mul_(length / sides[0])
    if step is not None:
        linear.mul_(step[:, :, None])
    return affine.mul_(torch.copysign(one, side[:, :dims, None]))


def _warp(images: Tensor, affine: Tensor) -> Tensor:
    # The grid is a sum of one vector per axis. Kept as planes it takes a single pass over its
    # full size, which is many times faster than multiplying every point by its matrix.
    dims = affine.shape[1]
    columns = affine.reshape(len(affine), dims, dims + 1, *[1] * dims).unbind(dim=2)
    linspace = partial(torch.linspace, device=affine.device, dtype=affine.dtype)
    centres = {side: linspace(1 / side - 1, 1 - 1 / side, side) for side in set(images.shape[2:])}
    grid = columns[-1]
    for axis in reversed(range(dims)):
        place = centres[images.shape[-1 - axis]].reshape(-1, *[1] * axis)
        grid = _addcmul(grid, place, columns[axis])
    return F.grid_sample(
        images,
        grid.movedim(1, -1),
        mode="bilinear",
        padding_mode="reflection",
        align_corners=False,
    )


def _inside(boxes: Tensor, spatial: tuple[int, ...]) -> Tensor:
    # Bounds are whole numbers, so that the middle of a pixel is in the box or not.
    middle = torch.arange(0.5, max(spatial), device=boxes.device)
    hit = middle.clamp(boxes[:, :, :1], boxes[:, :, 1:]) == middle
    planes = [
        hit[:, axis, :side].reshape(-1, 1, *[1] * axis, side, *[1] * (len(spatial) - 1 - axis))
        for axis, side in enumerate(spatial)
    ]
    return reduce(torch.logical_and, planes)


# Intensity

_TONE = ("gamma", "contrast", "brightness")
_LUMA = (0.299, 0.587, 0.114)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (images.ndim - 1))


def _channel_mean(images: Tensor) -> Tensor:
    return images.mean(dim=tuple(range(2, images.ndim)), keepdim=True)


def _is_fused(images: Tensor) -> bool:
    # On a CPU loops over several broadcast terms, and those for two extremes, are not vectorised:
    # more and simpler passes are many times faster.
    return not images.is_cpu


def _addcmul(offset: Tensor, images: Tensor, gain: Tensor, *, in_place: bool = False) -> Tensor:
    if _is_fused(images):
        return torch.addcmul(offset, images, gain)
    return images.mul_(gain).add_(offset) if in_place else images * gain + offset


def _extremes(images: Tensor) -> tuple[Tensor, Tensor]:
    # The lowest value and the span. Constants of the image: no gradient runs through them.
    images = images.detach()
    if _is_fused(images):
        low, high = (_per_image(end, images) for end in images.flatten(1).aminmax(dim=1))
    else:
        dims = tuple(range(1, images.ndim))
        low, high = images.amin(dim=dims, keepdim=True), images.amax(dim=dims, keepdim=True)
    return low, high - low


def _recolour(images: Tensor, matrices: Tensor) -> Tensor:
    # One channel of the input at a time, for all of the output. As fast as a product of matrices,
    # and neither TF32 nor the size of the batch changes a bit of it.
    weights = matrices.reshape(*matrices.shape, *[1] * (images.ndim - 2)).unbind(dim=2)
    channels = images.split(1, dim=1)
    out = weights[0] * channels[0]
    for weight, channel in zip(weights[1:], channels[1:], strict=True):
        out.addcmul_(weight, channel)
    return out


def _change_tone(images: Tensor, tone: dict[str, Tensor], *, fresh: bool, clip: bool) -> Tensor:
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
        mean = _channel_mean(images.detach())
        if _is_fused(images):
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
    return _addcmul(offset, images, gain, in_place=fresh and not images.requires_grad)


def _blur(images: Tensor, kernels: Tensor) -> Tensor:
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
    # To warp all of them takes more steps to learn than it gives; to warp none forgets small sets.
    "warp_probability": 0.5,
}
_STRONG = _MEDICAL | {
    "warp_probability": 1.0,
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
