"""The scale of pixels: uint8, [0, 1] or an own one, and the gate that keeps them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

UNIT_MAX = 1.5  # floats up to here may be pixels scaled to [0, 1], with some overshoot
ABSURD = 1e30  # of this size is no pixel, whatever the others are: files mark missing ones so
BRIGHT = 64.0  # floats from here are on no scale on which uint8 counts as [0, 1]
FOLD = 16.0  # a change of scale: nearer to 255 than to 1, on a log scale


def on_one_scale(
    images: Sequence[np.ndarray],
    plain: Sequence[bool] | None = None,
    float_dtype: type[np.floating] | None = None,
    name: str = "row",
) -> Sequence[np.ndarray]:
    """Bring images of several dtypes to one scale: that which its own dtype has.

    uint8 counts as [0, 1] and so does bool; other numbers are taken as they are. uint8 and bool
    may stand beside one another, and beside floats within [0, 1]; what else is mixed would be
    images on different scales. Floats of any width, or whole numbers of any other width than
    uint8, may stand beside one another.

    Parameters
    ----------
    images : sequence of ndarray
        Of any shapes.
    plain : sequence of bool, default=None
        Which of them come from Python's numbers, of which whole ones count as floats.
    float_dtype : {numpy.float32, numpy.float64} or None, default=None
        dtype of uint8 images that stand beside floats; None is float64.
    name : str, default="row"
        What errors call one of the images.

    Returns
    -------
    images : sequence of ndarray
        uint8 where that loses nothing; those given where they are on one scale.

    Raises
    ------
    ValueError
        If the scales differ; the message names the rows.
    """
    if len({image.dtype for image in images}) == 1:
        return images
    kinds = [scale_of(image.dtype) for image in images]
    if plain is not None:
        kinds = ["float" if p and k == "whole" else k for p, k in zip(plain, kinds, strict=True)]
    if len(set(kinds)) == 1:
        return images

    def described(row: int) -> str:
        return f"{name} {row} has dtype {images[row].dtype}"

    unknown = next((kind for kind in ("other", "whole") if kind in kinds), None)
    if unknown is not None:
        row = kinds.index(unknown)
        other = next(k for k, kind in enumerate(kinds) if kind != unknown)
        raise ValueError(
            f"X mixes images whose scales may differ: {described(row)}, {described(other)}. Only "
            "uint8, bool and floats in [0, 1] have one scale: bring X to one dtype."
        )
    unit = next(k for k, kind in enumerate(kinds) if kind in ("uint8", "bool"))
    for row, (image, kind) in enumerate(zip(images, kinds, strict=True)):
        # Rounding may exceed the bounds; NaN passes, to be reported as such.
        if kind == "float" and image.size and (image.min() < -1e-5 or image.max() > 1 + 1e-5):
            raise ValueError(
                f"X mixes images whose scales may differ: {described(unit)} and counts as [0, 1], "
                f"{described(row)} and values from {image.min():g} to {image.max():g}. Bring them "
                "to one dtype, or the floats to [0, 1]."
            )
    if "float" in kinds:
        levels = (np.arange(256) / 255).astype(float_dtype or np.float64)
        return [levels[i] if k == "uint8" else i for i, k in zip(images, kinds, strict=True)]
    return [i if k == "uint8" else i * np.uint8(255) for i, k in zip(images, kinds, strict=True)]


def scale_of(dtype: Any) -> str:
    """What an image's dtype says of its scale: uint8 and bool count as [0, 1]."""
    if dtype == np.uint8:
        return "uint8"
    return {"b": "bool", "i": "whole", "u": "whole", "f": "float"}.get(dtype.kind, "other")


@dataclass
class PixelScale:
    """The scale of the images of ``fit``, from which others must not differ 255-fold.

    A row is refused where its largest value and its root mean square are both far above those of
    ``fit``: a hot pixel, or an image brighter than all, exceeds one of them only. Darker images may
    be black ones: they are refused where no row of the call has a value near the mean square of
    ``fit``, and not all are blank.

    Attributes
    ----------
    name : str
        The estimator.
    peak : float
        Largest absolute value in ``fit``; 1 for uint8.
    level : float
        Root mean square in ``fit``; 0 for feature vectors, which have no common scale.
    unit : bool
        Whether ``fit`` saw uint8: floats must then be on the scale [0, 1].
    """

    name: str
    peak: float
    level: float
    unit: bool
    _dark: str | None = None
    _bright_enough: bool = False

    def check(self, images: np.ndarray, rows: np.ndarray, peak: float) -> None:
        """Check images (n, ...), floats up to `peak` or uint8; `rows` are their names."""
        if images.dtype == np.uint8:
            images = images / 255
            peak = float(images.max(initial=0))
        limit = UNIT_MAX if self.unit else FOLD * self.peak
        if peak > limit:
            for row, image in zip(rows, images, strict=True):
                self._refuse_bright(image, int(row), limit)
        if not FOLD * peak < self.level:
            self._bright_enough = True
        elif self._dark is None and not self._bright_enough:
            varied = (row for row, i in zip(rows, images, strict=True) if i.min() < i.max())
            if (row := next(varied, None)) is not None:
                self._dark = f"X holds floats up to {peak:g} (see row {row})"

    def conclude(self) -> None:
        """Refuse images that are too dark, once all have been seen."""
        if self._dark is None or self._bright_enough:
            return
        raise ValueError(
            f"{self._dark}, but {self.name} was fitted on images "
            f"{'that count as [0, 1]' if self.unit else f'of floats up to {self.peak:g}'}, about "
            f"{self.level:g} in the mean: bring X to their scale."
        )

    def _refuse_bright(self, image: np.ndarray, row: int, limit: float) -> None:
        high = max(-float(image.min()), float(image.max()))
        if high <= limit:
            return
        if self.unit:
            raise ValueError(
                f"X holds floats up to {high:g} (see row {row}), but {self.name} was fitted on "
                "uint8 images, which count as [0, 1]: pass uint8, or divide X by 255."
            )
        if np.sqrt(np.square(image, dtype=np.float64).mean()) > FOLD * self.level:
            raise ValueError(
                f"X holds floats up to {high:g} (see row {row}), but {self.name} was fitted on "
                f"floats up to {self.peak:g}: bring X to their scale."
            )


@dataclass
class OneScale:
    """What only the rows of one call together show: that some were divided by 255, others not.

    A row counts as divided where all its values are multiples of 1/255 between 0 and 1, more than
    `LEVELS` of them. Where pixels were interpolated since, it must be many rows: a quarter within
    [0, 1] with fractions, a quarter far above, nothing below 0, and 255 or so between their root
    mean squares. All else is let pass: images may be black, standardised or in Hounsfield units.

    Attributes
    ----------
    bright : tuple of int and float, or None
        A row that was not divided, and its largest value.
    divided : int or None
        A row that was.
    """

    bright: tuple[int, float] | None = None
    divided: int | None = None

    def check(self, images: np.ndarray, rows: np.ndarray, peak: float, more: bool) -> None:
        """Check floats (n, ...) up to `peak`; `rows` are their names, `more` rows may follow."""
        if peak >= ABSURD:
            row = next(k for k, image in enumerate(images) if np.abs(image).max() >= ABSURD)
            raise ValueError(
                f"X holds a value of size {peak:g} in row {rows[row]}: replace the pixels that "
                "mark missing values."
            )
        if peak < BRIGHT and self.bright is None:
            if more and self.divided is None:
                self.divided = self._first_divided(images, rows, *_glance(images))
            return
        some, low, high = _glance(images)
        if peak >= BRIGHT and self.bright is None:
            k = int(high.argmax())
            self.bright = int(rows[k]), float(images[k].max())
        if self.divided is None:
            self.divided = self._first_divided(images, rows, some, low, high)
        if self.divided is None:
            self.divided = _many_divided(some, low, high, rows)
        if self.divided is not None and self.bright is not None:
            row, high_value = self.bright
            raise ValueError(
                f"X mixes images whose scales may differ: row {self.divided} holds floats in "
                f"[0, 1], as if divided by 255, row {row} floats up to {high_value:g}. Bring X to "
                "one scale."
            )

    @staticmethod
    def _first_divided(
        images: np.ndarray, rows: np.ndarray, some: np.ndarray, low: np.ndarray, high: np.ndarray
    ) -> int | None:
        for k in np.flatnonzero((low >= 0) & (high > 0) & (high <= _ONE)):
            if _of_255(some[k]) and _of_255(images[k]):
                image = images[k]
                levels = np.unique(np.rint(image * 255))
                if image.min() >= 0 and image.max() <= _ONE and len(levels) > LEVELS:
                    return int(rows[k])
        return None


_ONE = 1 + 1e-5
LEVELS = 20  # fewer are found in means of few pixels of 0 and 1 too


def _glance(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Some pixels of each image, not copied, their least and their largest value."""
    some = images[(slice(None), *(slice(None, None, max(1, n // 16)) for n in images.shape[1:]))]
    axes = tuple(range(1, some.ndim))
    return some, some.min(axis=axes), some.max(axis=axes)


def _of_255(image: np.ndarray) -> bool:
    """Whether all values are multiples of 1/255, as far as half precision tells."""
    levels = image * 255
    return bool((np.abs(levels - np.rint(levels)) < 0.1).all())


def _many_divided(
    some: np.ndarray, low: np.ndarray, high: np.ndarray, rows: np.ndarray
) -> int | None:
    """First of many rows that differ 255-fold from many others; None where there are none."""
    dim, bright = (high > 0.5) & (high <= _ONE), high >= BRIGHT
    if low.min() < 0 or 4 * min(dim.sum(), bright.sum()) < len(rows):
        return None
    axes = tuple(range(1, some.ndim))
    level = np.sqrt(np.square(some, dtype=np.float64).mean(axis=axes))
    dim &= (some != np.rint(some)).any(axis=axes)
    some_dim = some[dim][:8]
    if 4 * dim.sum() < len(rows) or min(len(np.unique(image)) for image in some_dim) <= LEVELS:
        return None
    fold = np.median(level[bright]) / np.median(level[dim])
    return int(rows[dim.argmax()]) if 255 / 3 < fold < 255 * 3 else None


def to_unit_scale(batch: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert a batch to floats; uint8 images become [0, 1]."""
    if batch.dtype == torch.uint8:
        return batch.to(dtype).div_(255.0)
    return batch.to(dtype)
