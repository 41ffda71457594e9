"""Which axis is which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
import torch

from sklearn_medimb._parameters import Declaring, integers, one_of, parameter

CHANNEL_COUNTS = (1, 3, 4)  # what an axis of channels may look like when nobody says


class InputParameters(Declaring):
    """How X holds images, and which device takes them.

    Parameters
    ----------
    image_shape
        Shape of one image where X holds flattened ones: ``(H, W)``, ``(C, H, W)``, ``(C, D, H,
        W)``.
    data_format
        Where the channel axis is.
    spatial_dims
        3 reads 4-D X as gray volumes ``(n, D, H, W)``.
    device
        "auto" takes a CUDA GPU where there is one.
    """

    image_shape: Any = parameter(
        None, tuple, list, default=None, kind="tuple of int or None", last=True
    )
    data_format: str = parameter(
        one_of("auto", "channels_first", "channels_last"), default="auto", last=True
    )
    spatial_dims: int | None = parameter(
        None, integers(2, 3), default=None, kind="{2, 3} or None", last=True
    )
    device: Any = parameter(
        str, torch.device, default="auto", kind="str or torch.device", last=True
    )


@dataclass(frozen=True)
class Layout:
    """How one caller's array maps to ``(n, C, *spatial)``.

    Attributes
    ----------
    view : tuple of int
        Shape of one sample once flat rows are unfolded and a missing channel axis is added.
    channels_last : bool
        Whether the last axis of `view` holds the channels.
    paired : bool
        Whether axis 0 of `view` counts two registered images of one case. The pair is folded into
        the channels, ``(2 C, *spatial)``, so that every geometric operation treats both alike.
    """

    view: tuple[int, ...]
    channels_last: bool = False
    paired: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample in canonical order: ``(C, *spatial)`` or ``(d,)``."""
        image = self.view[1:] if self.paired else self.view
        if self.channels_last:
            image = (image[-1], *image[:-1])
        return (2 * image[0], *image[1:]) if self.paired else image

    def of(self, shape: tuple[int, ...]) -> Layout:
        """Layout of images of another size, whose axes mean the same.

        Raises
        ------
        ValueError
            If they do not: the number of axes, of channels or of images of a case is another.
        """
        missing = len(self.view) - len(shape)  # gray images may come without an axis of channels
        at = int(self.paired)
        other = replace(self, view=(*shape[:at], *(1,) * missing, *shape[at:]))
        same = len(other.view) == len(self.view) and other.view[:at] == self.view[:at]
        if not same or 0 in shape or other.shape[0] != self.shape[0]:
            raise ValueError("axes or channels differ.")
        return other

    def canonical(self, batch: torch.Tensor) -> torch.Tensor:
        """Bring a batch in the caller's layout to ``(n, C, *spatial)``; a view where possible."""
        batch = batch.reshape(len(batch), *self.view)
        if self.channels_last:
            batch = batch.movedim(-1, 2 if self.paired else 1)
        return batch.flatten(1, 2) if self.paired else batch

    def restore(self, batch: np.ndarray) -> np.ndarray:
        """Bring images ``(n, C, *spatial)`` to ``(n, *view)``; not for pairs."""
        return np.moveaxis(batch, 1, -1) if self.channels_last else batch


def infer_layout(
    shape: Sequence[int],
    *,
    image_shape: Sequence[int] | None = None,
    data_format: str = "auto",
    spatial_dims: int | None = None,
    paired: bool = False,
) -> Layout:
    """Read the axes of an array of images from its shape.

    Parameters
    ----------
    shape : sequence of int
        Shape of the whole array, samples first.
    image_shape : sequence of int, default=None
        Shape of one image, for arrays that hold flattened images: ``(H, W)``, ``(C, H, W)``,
        ``(D, H, W)`` with ``spatial_dims=3``, ``(C, D, H, W)``, or the same with the channels last.
    data_format : {"auto", "channels_first", "channels_last"}, default="auto"
        Where the channel axis is. "auto" takes the last axis if its length is 1, 3 or 4 and the
        first one's is not, otherwise the first; what could be either is refused.
    spatial_dims : {2, 3}, default=None
        Number of spatial axes; None reads 3-D and 4-D arrays as images, 5-D arrays as volumes.
    paired : bool, default=False
        Whether axis 1 counts the two registered images of a case.

    Returns
    -------
    layout : Layout
        The mapping of one sample's axes.

    Raises
    ------
    ValueError
        If the shape is ambiguous or wrong; the message names the parameter to set.
    """
    sample = tuple(int(side) for side in shape[1:])
    if image_shape is not None:
        if not all(isinstance(side, Integral) and side > 0 for side in image_shape):
            raise ValueError(f"image_shape={image_shape} must hold whole numbers above 0.")
        image_shape = tuple(int(side) for side in image_shape)
        if len(sample) == 1 and math.prod(image_shape) != sample[0]:
            raise ValueError(
                f"image_shape={image_shape} holds {math.prod(image_shape)} values, but the rows of "
                f"X hold {sample[0]}: set image_shape to the shape of one image."
            )
        if len(sample) > 1 and sample != image_shape:
            raise ValueError(
                f"image_shape={image_shape} disagrees with X, whose samples have shape {sample}: "
                "leave image_shape=None for X that is not flattened."
            )
        sample = image_shape
    elif len(sample) == 1 and not paired:
        return Layout(sample)
    if 0 in sample:
        raise ValueError(
            f"Found an image with an empty axis: the samples of X have shape {sample}."
        )

    if paired:
        if len(sample) < 3 or sample[0] != 2:
            raise ValueError(
                'reference="paired" needs X of shape (n, 2, ...): the image and its registered '
                f"reference, stacked on axis 1. The samples of X have shape {sample}."
            )
        image = _read_axes(sample[1:], data_format, spatial_dims)
        return Layout((2, *image.view), image.channels_last, paired=True)
    return _read_axes(sample, data_format, spatial_dims)


def _read_axes(sample: tuple[int, ...], data_format: str, spatial_dims: int | None) -> Layout:
    """Find the channel axis of one image of shape `sample`."""
    n_axes = len(sample)
    dims = spatial_dims or (3 if n_axes == 4 else 2)
    if n_axes not in (dims, dims + 1):
        raise ValueError(
            f"The samples of X have {n_axes} axes, shape {sample}; spatial_dims={spatial_dims} "
            f"reads {dims} or {dims + 1}: set spatial_dims, or image_shape for flattened images."
        )
    if n_axes == dims:  # gray
        return Layout((1, *sample))
    if data_format == "auto":
        first, last = sample[0] in CHANNEL_COUNTS, sample[-1] in CHANNEL_COUNTS
        if first and last:
            why = "both its first and its last axis could be the channels"
        elif not first and not last and sample[0] >= min(sample[1:]):
            why = f"its first axis ({sample[0]}) is no shorter than a side"
        else:
            return Layout(sample, channels_last=last)
        raise ValueError(
            f"The layout of X is ambiguous: in samples of shape {sample}, {why}. Set data_format="
            '"channels_first" or "channels_last", or spatial_dims=3 for gray volumes.'
        )
    return Layout(sample, channels_last=data_format == "channels_last")


def as_pixels(batch: torch.Tensor) -> torch.Tensor:
    """Read feature vectors (n, d) as images of height one, (n, 1, 1, d); images stay."""
    return batch[:, None, None] if batch.ndim == 2 else batch
