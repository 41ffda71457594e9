"""What the header of an image file says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

Window = tuple[float, float]


class BadFileError(ValueError):
    """A file that is no image, or a damaged one; its text follows the name of the file."""


@dataclass(frozen=True)
class Header:
    """What a file says of its pixels before they are decoded.

    Attributes
    ----------
    sides : tuple of int
        ``(H, W)`` or ``(D, H, W)``.
    channels : int
        1, or how many the pixels have on a last axis.
    whole : bool
        Whether pixels are uint8, from 0 to 255; else float32, in the units of the file.
    colour : bool
        Whether the channels are red, green and blue.
    spacing : tuple of float or None
        Millimetres from pixel to pixel along each side, where the file says so.
    """

    sides: tuple[int, ...]
    channels: int
    whole: bool
    colour: bool = False
    spacing: tuple[float, ...] | None = None

    def slice(self) -> Header:
        """What one slice of a volume has."""
        return replace(self, sides=self.sides[-2:], spacing=self.spacing and self.spacing[-2:])


Decoded = tuple[Header, Callable[[], np.ndarray]]
