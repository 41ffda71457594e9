"""What may be done to images, and what is drawn for a batch."""

from __future__ import annotations

import math
from itertools import accumulate, chain
from numbers import Real

import torch
from sklearn.base import BaseEstimator
from torch import Tensor

from sklearn_medimb._parameters import Declaring, parameter, within
from sklearn_medimb.augment._application import apply_draws
from sklearn_medimb.augment._geometry import FLIPS, affine_matrix
from sklearn_medimb.augment._intensity import colour_constants, colour_matrix
from sklearn_medimb.augment._passes import per_image

_WARPS = ("rotation", "tilt", "shear", "scale", "translate", "crop")
_SOMETIMES = ("blur", "noise", "cutout")
_COLOURS = ("saturation", "hue", "grayscale")
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

        def by_name(table: Tensor) -> dict[str, Tensor]:
            return dict(zip(ranges, table.split(widths, dim=1), strict=True))

        ranges = self._ranges(spatial)
        widths = [len(columns) for columns in ranges.values()]
        n_colours = len(ranges.get("colour", ()))
        table = uniform(sum(widths) - n_colours)
        if self._is_on("noise"):
            field = torch.randn((n, 1, *spatial), generator=generator, device=generator.device)
        if n_colours:
            table = torch.cat([table, uniform(n_colours)], dim=1)
        constants = _on_device(self._constants(spatial, ranges), generator.device)
        table = torch.addcmul(constants["low"], table, constants["width"])

        # On a whole table an operation takes no longer than on a column.
        u, power, hit = by_name(table), {}, {}
        if 0 < self.warp_probability < 1:  # at 0 each of them changes nothing
            first = dict(zip(ranges, accumulate(widths, initial=0), strict=False))
            table[:, first["angles"] : first["tone"]].mul_(u["warp"] < 0)
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
            params["noise"] = field.mul_(per_image(std, field))
        if self._is_on("cutout"):
            length, place = (part[:, : len(spatial)] for part in u["cutout"][:, 1:].split(3, dim=1))
            length = torch.ceil(length * hit["cutout"][:, :1])
            start = torch.floor(place * (constants["room"] - length))
            params["cutout"] = torch.addcmul(
                start[:, :, None], length[:, :, None], constants["ends"]
            )
        if "colour" in u:
            drop = hit["colour"][:, 2:] if self._is_on("grayscale") else None
            params["colour"] = colour_matrix(u["colour"], drop, constants)
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
        return apply_draws(images, params)

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
        kind = "warp" if name in _WARPS else name
        probability = getattr(self, f"{kind}_probability", 1.0)
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
        # and around 0 for a probability, so that as many as it says are negative. As many numbers
        # are drawn whatever is switched on: an operation that is turned on or tuned leaves the
        # draws of the others as they were, and so does a larger batch. Colours, which gray images
        # have none of, have a table of their own, drawn last.
        tilt = _either(math.radians(self.tilt))
        ranges = {
            "flip": [_below(getattr(self, name)) for name in FLIPS],
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
        ranges |= {name: [(0.0, 0.0)] * len(ranges[name]) for name in off}
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
            constants |= colour_constants(self._is_on("hue"))
        return constants

    def _draw_geometry(
        self, u: dict[str, Tensor], power: dict[str, Tensor], spatial: tuple[int, ...]
    ) -> dict[str, Tensor]:
        dims = len(spatial)
        if not any(self._is_on(name) for name in _WARPS if dims == 3 or name != "tilt"):
            flips = dict(zip(FLIPS, (u["flip"][:, :dims] < 0).float().unbind(dim=1), strict=False))
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


def _either(largest: float) -> tuple[float, float]:
    return -largest, largest


def _below(probability: float) -> tuple[float, float]:
    return -probability, 1 - probability


def _on_device(values: dict[str, list[float]], device: torch.device) -> dict[str, Tensor]:
    # Sent along with a kernel, as its arguments. A copy from the host would not be safe in a CUDA
    # graph, which reads the memory again when it is replayed.
    constants = torch.zeros(sum(map(len, values.values())), device=device)
    slots = zip(constants.unbind(), chain(*values.values()), strict=True)
    used = [(slot, value) for slot, value in slots if value]
    torch._foreach_add_([slot for slot, _ in used], [value for _, value in used])
    return dict(zip(values, constants.split([*map(len, values.values())]), strict=True))
