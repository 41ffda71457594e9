"""How files become images: what a caller asks for, and what all files have in common."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from sklearn_medimb._data.decoders import decode
from sklearn_medimb._data.headers import BadFileError, Decoded, Header
from sklearn_medimb._data.resize import Resize, resample, resized_shape, resolve_size

MODES = ("auto", "L", "RGB")
LUMA = np.array([19595, 38470, 7471], dtype=np.uint32)  # ITU-R 601, in parts of 65536


@dataclass(frozen=True)
class Reading:
    """How files become images: the options of :class:`ImageFiles`."""

    mode: str = "auto"
    resize: Resize | None = None
    window: tuple[float, float] | None = None
    spacing: tuple[float, ...] | float | None = None
    frames: str | int = "all"

    def shape(self, header: Header) -> tuple[int, ...]:
        """Shape of an image: ``(H, W)``, ``(H, W, 3)`` or ``(C, D, H, W)``."""
        n_channels = 3 if self.mode == "RGB" else 1 if self.mode == "L" else header.channels
        sides = self._at_spacing(header)
        sides = resized_shape((n_channels, *sides), self.resize)[1:]
        if len(sides) == 3:
            return (n_channels, *sides)
        return sides if n_channels == 1 else (*sides, n_channels)

    def _at_spacing(self, header: Header) -> tuple[int, ...]:
        """Sides once pixels are so far apart as is wanted."""
        if self.spacing is None:
            return header.sides
        if header.spacing is None or min(header.spacing) <= 0:
            raise BadFileError(f"does not say how far apart pixels are: spacing={self.spacing}.")
        n = len(header.sides)
        wanted = self.spacing if isinstance(self.spacing, tuple) else (self.spacing,) * n
        if len(wanted) != n:
            raise BadFileError(f"has sides {header.sides}, for which spacing={self.spacing}.")
        triples = zip(header.sides, header.spacing, wanted, strict=True)
        return tuple(max(1, round(side * own / new)) for side, own, new in triples)

    def image(self, header: Header, pixels: np.ndarray) -> np.ndarray:
        """Bring decoded pixels to this mode, spacing and size."""
        volume, resized = len(header.sides) == 3, not (self.spacing is self.resize is None)
        n_channels = {"L": 1, "RGB": 3}.get(self.mode, header.channels)
        if n_channels == header.channels and not volume and not resized:
            return pixels
        shape = self.shape(header)
        if header.colour and self.mode == "L":
            pixels = ((pixels @ LUMA + 0x8000) >> 16).astype(np.uint8)
        elif header.channels == 1 and self.mode == "RGB":
            pixels = np.repeat(pixels[..., None], 3, axis=-1)
        if pixels.ndim == len(header.sides):
            pixels = pixels[..., None]
        pixels = np.moveaxis(pixels, -1, 0)
        if resized:
            tensor = torch.from_numpy(np.array(pixels))[None]
            tensor = resample(tensor, self._at_spacing(header))
            if self.resize is not None:
                size = shape[1:] if volume else shape[:2]
                tensor = resample(tensor, size, self.resize.aspect)
            pixels = tensor[0].numpy()
        return pixels if volume else np.moveaxis(pixels, 0, -1).reshape(shape)

    def options(self) -> dict[str, Any]:
        """Give what makes an :class:`ImageFiles` that reads so."""
        return {
            "mode": self.mode,
            "image_size": self.resize,
            "window": self.window,
            "spacing": self.spacing,
            "frames": self.frames,
        }


# ---------------------------------------------------------------- one file


@contextmanager
def opened(path: str, reading: Reading) -> Iterator[Decoded]:
    """Open a file, read its header, and have whatever goes wrong name the file."""
    try:
        # As quick as it gets: of small pictures, a Path would take as long as the header.
        kind = os.stat(path).st_mode  # noqa: PTH116
        if stat.S_ISDIR(kind):
            raise BadFileError("is a folder: from_folder reads it.")
        if not stat.S_ISREG(kind):
            raise BadFileError("is no file.")
        with open(path, "rb") as file:  # noqa: PTH123
            frames = "all" if reading.frames == "each" else reading.frames
            yield decode(file, window=reading.window, frames=frames)
    except ImportError as error:
        raise ImportError(f"{path!r} {error}") from None
    except MemoryError:
        raise BadFileError(f"{path!r} needs more memory than there is.") from None
    except BadFileError as error:
        raise BadFileError(f"{path!r} {error}") from None
    except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
        why = getattr(error, "strerror", None) or error
        raise BadFileError(f"{path!r} cannot be opened: {why}.") from None


def read_header(path: str, reading: Reading) -> Header:
    """What a file says of its pixels."""
    with opened(path, reading) as (header, _):
        # It must have the spacing, and the axes that size and spacing have.
        reading.shape(header.slice() if reading.frames == "each" else header)
        return header


def read_file(path: str, reading: Reading, dtype: np.dtype, k: int | None = None) -> np.ndarray:
    """Decode a file, or a slice of it."""
    reading = reading if k is None else replace(reading, frames=k)
    with opened(path, reading) as (header, pixels):
        check_kind(header, dtype)
        return reading.image(header, pixels())


def read_slices(path: str, reading: Reading, dtype: np.dtype) -> list[np.ndarray]:
    """Decode a volume, slice by slice."""
    with opened(path, reading) as (header, pixels):
        check_kind(header, dtype)
        return [reading.image(header.slice(), part) for part in pixels()]


def check_kind(header: Header, dtype: np.dtype) -> None:
    if header.whole != (dtype == np.uint8):
        raise BadFileError(f"does not hold {dtype} any more.")


def survey(paths: Sequence[str], reading: Reading) -> list[Header | Exception]:
    """Read the headers of files; what is wrong with a file stands in its place."""

    def look(path: str) -> Header | Exception:
        try:
            return read_header(path, reading)
        except (ValueError, ImportError) as error:
            return error

    return [look(path) for path in paths]  # threads would only wait for Python here


def resolved(reading: Reading, headers: Sequence[Header], paths: Sequence[str]) -> Reading:
    """Choose the mode for all files, and refuse files that do not go together."""

    def differing(kinds: Sequence[Any]) -> tuple[int, str] | None:
        k = next((k for k, kind in enumerate(kinds) if kind != kinds[0]), None)
        return None if k is None else (k, f"row 0 ({paths[0]!r}) and row {k} ({paths[k]!r})")

    if found := differing([len(header.sides) for header in headers]):
        k, names = found
        raise ValueError(
            f"X mixes images and volumes: {names} have sides {headers[0].sides} and "
            f"{headers[k].sides}. frames= takes one slice of each volume."
        )
    if found := differing([header.whole for header in headers]):
        k, names = found
        eight = "values of more than eight bits" if headers[0].whole else "eight bits"
        raise ValueError(
            f"X mixes images whose scales may differ: of {names}, the latter has {eight}. Set "
            "window=(centre, width) to bring all of them to eight bits."
        )
    odd = next((k for k, h in enumerate(headers) if h.channels > 1 and not h.colour), None)
    if odd is not None:
        if found := differing([(header.channels, header.colour) for header in headers]):
            k, names = found
            raise ValueError(
                f"X mixes images of different channels: {names} have {headers[0].channels} and "
                f"{headers[k].channels}."
            )
        if reading.mode != "auto":
            raise ValueError(
                f"mode={reading.mode!r} is for gray and colour, but row {odd} ({paths[odd]!r}) has "
                f"{headers[odd].channels} channels of another kind."
            )
        return reading
    if reading.mode == "auto":
        return replace(reading, mode="RGB" if any(h.colour for h in headers) else "L")
    return reading


# ---------------------------------------------------------------- what the caller passes


def as_reading(mode: Any, image_size: Any, window: Any, spacing: Any, frames: Any) -> Reading:
    """Check the options of :class:`ImageFiles`."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} must be one of {MODES}.")
    if window is not None:
        numbers = isinstance(window, (tuple, list)) and all(_is_finite(part) for part in window)
        if not numbers or len(window) != 2 or not window[1] > 0:
            raise ValueError(f"window={window!r} must be a centre and a width above 0.")
        window = float(window[0]), float(window[1])
    if spacing is not None:
        parts = spacing if isinstance(spacing, (tuple, list)) else (spacing,)
        if not parts or not all(_is_finite(part) and part > 0 for part in parts):
            raise ValueError(f"spacing={spacing!r} must hold millimetres above 0.")
        several = isinstance(spacing, (tuple, list))
        spacing = tuple(float(part) for part in parts) if several else float(spacing)
    whole = isinstance(frames, Integral) and not isinstance(frames, bool) and int(frames) >= 0
    if not whole and frames not in ("all", "middle", "each"):
        raise ValueError(f'frames={frames!r} must be "all", "middle", "each", or a number from 0.')
    frames = int(frames) if whole else frames
    return Reading(mode, resolve_size(image_size), window, spacing, frames)


def _is_finite(number: Any) -> bool:
    return isinstance(number, Real) and not isinstance(number, bool) and math.isfinite(number)
