"""Validated images of a call, and their statistics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_array
from sklearn.utils.validation import _num_samples, validate_data

from sklearn_medimb._data.containers import (
    ImageList,
    as_list,
    from_torch,
    holds_images,
    is_image,
    is_in_blocks,
    is_lazy,
    is_picture,
    one_column,
    one_image,
)
from sklearn_medimb._data.files import ImageFiles, wrap_dataset
from sklearn_medimb._data.layout import Layout, infer_layout
from sklearn_medimb._data.pixel_scale import (
    FOLD,
    UNIT_MAX,
    OneScale,
    PixelScale,
    on_one_scale,
    scale_of,
    to_unit_scale,
)
from sklearn_medimb._data.resize import Resize, resample, resized_shape, resolve_size

BROKEN = 1e6  # so many times the typical largest value of an image is no pixel
AT_ONCE = 2**20  # values of images of their own size in memory at a time, beside one image


class Images:
    """Rows of images, read batch by batch from wherever the caller keeps them.

    Parameters
    ----------
    data : ndarray or lazy sequence
        The images in the caller's layout.
    layout : Layout
        Its axes.
    dtype : numpy dtype
        dtype of the batches: uint8, float32 or float64.
    peak : float, default=0.0
        Largest absolute value of floats, as far as they have been read.
    scale : PixelScale, default=None
        What lazy floats must agree with as they are read.
    resize : Resize, default=None
        The size that rows come to; None where all have the one of `layout`.
    """

    def __init__(
        self,
        data: Any,
        layout: Layout,
        dtype: np.dtype,
        *,
        peak: float = 0.0,
        scale: PixelScale | None = None,
        resize: Resize | None = None,
    ) -> None:
        self.data = data
        self.layout = layout
        self.dtype = dtype
        self.peak = peak
        self.scale = scale
        self.resize = resize
        self.image_shape = resized_shape(layout.shape, resize)
        self.one_scale = OneScale()
        self.lazy = not isinstance(data, np.ndarray)
        self.in_blocks = not self.lazy or is_in_blocks(data)
        self._first: tuple[int, np.dtype] | None = None  # row and dtype read first

    def __len__(self) -> int:
        return len(self.data)

    def rows(self, rows: np.ndarray) -> torch.Tensor:
        """Read some rows: a CPU tensor ``(n, C, *spatial)`` in the stored dtype."""
        if self.resize is not None:
            return self._resized(rows, self.resize)
        if self.in_blocks:
            # A block copy: NumPy's take is faster here than torch's fancy indexing, and the copy is
            # writable even where the caller's array is a read-only memory map.
            block = self.data.take(rows, axis=0)
        else:
            block = np.stack(list(self._one_by_one(rows)))
        return self.layout.canonical(torch.from_numpy(self._checked(block, rows, self.layout)))

    def _checked(self, block: np.ndarray, rows: np.ndarray, layout: Layout) -> np.ndarray:
        """Images as they were read, in the dtype of the batches; what is lazy is looked at now."""
        if not self.lazy:
            return block
        block, peak = _cast(block, self.dtype, names=rows)
        self.peak = max(self.peak, peak)
        self._check_one_scale(block, rows, peak, layout)
        if self.scale is not None:
            self.scale.check(block, rows, peak)
        return block

    def _resized(self, rows: np.ndarray, resize: Resize) -> torch.Tensor:
        """Read some rows, each brought to its size."""
        kind = torch.from_numpy(np.empty(0, self.dtype)).dtype
        resized = torch.empty((len(rows), *self.image_shape), dtype=kind)
        looks = self.lazy and self.dtype != np.uint8
        some = torch.empty((len(rows), self.image_shape[0], *[16] * len(self.image_shape[1:])))
        for places, block in self._in_own_size(rows):
            layout = self.layout if self.in_blocks else self.layout.of(block.shape[1:])
            block = self._checked(block, rows[places], layout)
            pixels = layout.canonical(torch.from_numpy(block))
            resized[places] = resample(pixels, self.image_shape[1:], resize.aspect)
            if looks:
                some[places] = _grid(pixels, some.shape[2:]).float()
        if looks and len(rows):  # what only many images show, in pixels as they were given
            peak = float(some.abs().max())
            pairs = (2, -1) if self.layout.paired else (-1,)
            layout = Layout((*pairs, *some.shape[2:]), paired=self.layout.paired)
            self._check_one_scale(some.numpy(), rows, peak, layout)
        return resized

    def _in_own_size(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Images of one size, few at a time, and their places in `rows`."""
        if self.in_blocks:
            step = max(1, AT_ONCE // math.prod(self.layout.view))
            for start in range(0, len(rows), step):
                places = np.arange(start, min(start + step, len(rows)))
                yield places, self.data.take(rows[places], axis=0)
            return
        held: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
        n_values = 0
        for place, image in enumerate(self._one_by_one(rows)):
            held.setdefault(image.shape, []).append((place, image))
            n_values += image.size
            if n_values >= AT_ONCE or place == len(rows) - 1:
                for found in held.values():
                    places, images = zip(*found, strict=True)
                    yield np.array(places), np.stack(images)
                held, n_values = {}, 0

    def _one_by_one(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Images of a container, each as it announces them."""
        if isinstance(self.data, ImageFiles):
            found = self.data.stream(rows)
        else:
            found = (one_image(self.data, int(row)) for row in rows)
        return (self._announced(image, row) for row, image in zip(rows, found, strict=True))

    def expect(self, rows: np.ndarray) -> None:
        """Have files begun to be decoded that will be asked for next."""
        if isinstance(self.data, ImageFiles):
            self.data.expect(rows)

    def sizes(self, n_most: int) -> set[tuple[int, ...]]:
        """Sides of the images as they are; of so many at most where they are read for it."""
        if self.in_blocks:
            return {self.layout.shape[1:]}
        if isinstance(self.data, ImageFiles) and self.data.options["spacing"] is None:
            return {sides[1 - len(self.layout.shape) :] for sides in self.data.sizes}  # of headers
        rows = np.arange(len(self))
        if not isinstance(self.data, ImageList):
            rows = np.unique(np.linspace(0, len(self) - 1, n_most).astype(int))
        return {self.layout.of(image.shape).shape[1:] for image in self._one_by_one(rows)}

    def in_memory(self) -> Images:
        """Resize what is in memory once, for all epochs; what is read on demand stays there."""
        if self.resize is None or (self.lazy and not isinstance(self.data, ImageList)):
            return self
        resized = np.empty((len(self), *self.image_shape), self.dtype)
        step = max(1, AT_ONCE // math.prod(self.image_shape))
        for start in range(0, len(self), step):
            part = np.arange(start, min(start + step, len(self)))
            resized[part] = self.rows(part).numpy()
        return self.holding(resized, Layout(self.image_shape))

    def holding(self, data: Any, layout: Layout) -> Images:
        """Give other rows of the same images, or mixes of them, the same bounds."""
        other = Images(data, layout, self.dtype, peak=self.peak, scale=self.scale)
        other.one_scale = self.one_scale
        return other

    def check_one_scale(self) -> None:
        """Refuse images in memory on different scales."""
        self._check_one_scale(self.data, np.arange(len(self)), self.peak, self.layout)

    def _check_one_scale(
        self, block: np.ndarray, rows: np.ndarray, peak: float, layout: Layout
    ) -> None:
        """Refuse rows on different scales; of vectors every entry has its own."""
        if len(self.image_shape) == 1 or self.dtype == np.uint8:
            return
        block = block.reshape(len(block), *layout.view)
        for images in (block[:, 0], block[:, 1]) if layout.paired else (block,):
            self.one_scale.check(images, rows, peak, self.lazy)

    def conclude(self) -> None:
        """Refuse lazy images, all of them read by now, that are on a darker scale throughout."""
        if self.scale is not None:
            self.scale.conclude()

    def _file(self, row: int) -> str:
        return f" ({self.data.path_of(row)!r})" if isinstance(self.data, ImageFiles) else ""

    def _announced(self, image: np.ndarray, row: int) -> np.ndarray:
        """Pass an image on if it is what the container announces."""
        shape, dtype = tuple(self.data.shape[1:]), np.dtype(self.data.dtype)
        # uint8 is divided by 255 and nothing else is, so that neither may stand in for the other.
        same_kind = image.dtype.kind in "buif" and (image.dtype == np.uint8) == (dtype == np.uint8)
        if self.resize is not None and image.shape != shape:
            try:
                self.layout.of(image.shape)
            except ValueError as error:
                raise ValueError(
                    f"Row {row} of X{self._file(row)} has shape {image.shape}, beside images of "
                    f"shape {shape}: image_size brings images to one size, but the order of their "
                    "axes and their channels must be the same (of gray volumes, set "
                    "spatial_dims=3)."
                ) from error
            shape = image.shape
        if image.shape != shape or not same_kind:
            raise ValueError(
                f"X announces images of shape {shape} and dtype {dtype}, but row "
                f"{row}{self._file(row)} has shape {image.shape} and dtype {image.dtype}."
                + (" Images of several sizes need image_size=." if image.shape != shape else "")
            )
        first, known = self._first = self._first or (row, image.dtype)
        if scale_of(known) != scale_of(image.dtype):
            raise ValueError(
                f"X mixes images whose scales may differ: row {first} has dtype {known}, row {row} "
                f"has dtype {image.dtype}. Bring them to one dtype."
            )
        return image


def _grid(images: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Pixels of images ``(n, C, *spatial)`` where a grid of this size meets them."""
    for axis, n in enumerate(size, start=2):
        images = images.index_select(axis, torch.linspace(0, images.shape[axis] - 1, n).long())
    return images


def read_images(
    estimator: Any,
    X: Any,
    *,
    reset: bool,
    image_shape: Sequence[int] | None = None,
    data_format: str = "auto",
    spatial_dims: int | None = None,
    paired: bool = False,
    float_dtype: type[np.floating] | None = np.float32,
    image_size: Any = None,
) -> Images:
    """Validate `X` for `estimator` and find its axes.

    Parameters
    ----------
    estimator : estimator instance
        Receives `n_features_in_` and `feature_names_in_` when `reset`; otherwise its
        `image_shape_`, where it has one, is what images must have.
    X : array-like, DataFrame, torch tensor or Dataset, list of arrays, or lazy sequence
        See the package's guide for the accepted shapes.
    reset : bool
        True in ``fit``.
    image_shape, data_format, spatial_dims, paired
        As in :func:`infer_layout`.
    float_dtype : {numpy.float32, numpy.float64} or None
        What everything that is not uint8 is read as; None keeps the dtype of `X`.
    image_size : int, tuple of int, Resize or None, default=None
        The size that images come to; None refuses images of several sizes.

    Returns
    -------
    images : Images
        The images, not copied where they are uint8 or already of `float_dtype`.

    Raises
    ------
    ValueError
        If `X` is empty, ragged, ambiguous, not finite, of another shape than in ``fit``, or mixes
        images whose scales differ.
    TypeError
        If `X` is sparse, not numeric, or a data set that can only be iterated.
    """
    resize = resolve_size(image_size)
    X = one_column(X)
    _refuse_mixed_columns(X, image_shape)
    options = None if reset else getattr(estimator, "file_options_", None)
    X = as_array(wrap_dataset(X, options), float_dtype, of_any_size=resize is not None)
    if not is_lazy(X) and getattr(X, "ndim", 2) <= 2:
        X = validate_data(estimator, X, reset=reset, dtype="numeric", ensure_all_finite=False)
    elif not is_lazy(X):
        X = check_array(
            X, allow_nd=True, dtype="numeric", ensure_all_finite=False, input_name="X",
            estimator=estimator,
        )  # fmt: skip
    if _num_samples(X) < 1:
        raise ValueError(
            "Found array with 0 sample(s) while a minimum of 1 is required: X is empty."
        )

    layout = infer_layout(
        X.shape,
        image_shape=image_shape,
        data_format=data_format,
        spatial_dims=spatial_dims,
        paired=paired,
    )
    shape = resized_shape(layout.shape, resize)
    if reset:
        if X.ndim > 2:  # validate_data saw two axes at most
            estimator.__dict__.pop("feature_names_in_", None)
        estimator.n_features_in_ = math.prod(layout.shape)
    elif shape != tuple(getattr(estimator, "image_shape_", shape)):
        changed = "" if resize is None else f", {shape} by image_size={resize.size}"
        raise ValueError(
            f"X holds images of shape {layout.shape}{changed} (channels first), but "
            f"{type(estimator).__name__} was fitted on images of shape "
            f"{tuple(estimator.image_shape_)}: resize or crop X, or check data_format."
        )
    if np.dtype(X.dtype).kind not in "buif":
        raise ValueError(f"X of dtype {X.dtype} cannot be read as images.")
    dtype = np.dtype(X.dtype if X.dtype == np.uint8 or float_dtype is None else float_dtype)
    if dtype.itemsize > 8:
        raise ValueError(f"X of dtype {dtype} cannot be read as images: convert it to float64.")
    dtype = dtype.newbyteorder("=")
    peak = 0.0
    if not is_lazy(X):
        X, peak = _cast(X, dtype)
    if shape == layout.shape and (isinstance(X, np.ndarray) or is_in_blocks(X)):
        resize = None
    images = Images(X, layout, dtype, peak=peak, resize=resize)
    if not images.lazy:
        images.check_one_scale()
    return images


def warn_of_flat_images(estimator: Any, images: Images) -> None:
    """Warn where rows are read as images of height one: most such calls forgot `image_shape`."""
    if len(images.image_shape) == 1:
        warnings.warn(
            f"{type(estimator).__name__} reads the rows of a 2-D X as images of height 1: set "
            "image_shape=(H, W) or (C, H, W) if they are flattened images.",
            stacklevel=3,
        )


def as_array(
    X: Any, float_dtype: type[np.floating] | None = None, *, of_any_size: bool = False
) -> Any:
    """Turn tensors and lists of images into arrays, on one scale; leave the rest to scikit-learn.

    Parameters
    ----------
    X : object
        An object array or a column of a table whose entries are images counts as a list of them.
    float_dtype : {numpy.float32, numpy.float64} or None, default=None
        dtype of uint8 images that stand beside floats; None is float64.
    of_any_size : bool, default=False
        Whether images of several sizes may stand beside one another.

    Returns
    -------
    X : ndarray, ImageList where sizes differ, or the object given
        See :func:`on_one_scale`.
    """
    given = from_torch(one_column(X))
    X = as_list(given)
    if not (isinstance(X, (list, tuple)) and len(X)):
        return given
    if not (isinstance(X[0], (list, tuple)) or is_image(X[0])):
        return given
    images = [one_image(X, row) for row in range(len(X))]
    shapes = [image.shape for image in images]
    plain = [isinstance(entry, (list, tuple)) and not holds_images(entry) for entry in X]
    odd = next((row for row, shape in enumerate(shapes) if shape != shapes[0]), None)
    if odd is None:
        return np.stack(on_one_scale(images, plain, float_dtype))
    if of_any_size and len(shapes[0]) > 1:
        n_axes = [len(shape) for shape in shapes]
        if len(set(n_axes)) == 1:
            return ImageList(list(on_one_scale(images, plain, float_dtype)))
        odd = next(row for row, n in enumerate(n_axes) if n != n_axes[0])
    if is_picture(X[0]) and is_picture(X[odd]) and X[0].mode != X[odd].mode:
        raise ValueError(
            f"X is a list of images of different modes: row 0 is {X[0].mode}, row {odd} is "
            f"{X[odd].mode}. Convert them to one mode first."
        )
    raise ValueError(
        f"X is a list of images of different {'numbers of axes' if of_any_size else 'sizes'}: row "
        f"0 has shape {shapes[0]}, row {odd} has shape {shapes[odd]}. "
        + (
            "Bring them to one."
            if of_any_size
            else "Resize them to one size first, or let "
            "image_size= of the classifier or encoder do it."
        )
    )


def _refuse_mixed_columns(X: Any, image_shape: Sequence[int] | None) -> None:
    """Refuse a table of pixels some of whose columns are uint8: an array of it is on no scale."""
    if image_shape is None or not (hasattr(X, "dtypes") and hasattr(X, "iloc")):
        return
    kinds = [scale_of(getattr(dtype, "numpy_dtype", dtype)) for dtype in X.dtypes]
    if len(set(kinds)) > 1 and set(kinds) & {"uint8", "whole"}:
        odd = next(column for column, kind in enumerate(kinds) if kind != kinds[0])
        raise ValueError(
            f"X mixes columns whose scales may differ: {X.columns[0]} has dtype "
            f"{X.dtypes.iloc[0]}, {X.columns[odd]} has dtype {X.dtypes.iloc[odd]}. Bring X to one "
            "dtype."
        )


def _cast(
    X: np.ndarray, dtype: np.dtype, names: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """Bring images to the dtype of the batches; raise, naming the row, where one is not finite.

    With them comes the largest absolute value, 0 for whole numbers.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        cast = X.astype(dtype, copy=False)
        if dtype.kind != "f" or not cast.size:
            return cast, 0.0
        # Two passes without a boolean copy; NaN is passed on by either.
        peak = max(-float(cast.min()), float(cast.max()))
        if np.isfinite(peak):
            return cast, peak
    for row, (image, given) in enumerate(zip(cast, X, strict=True)):
        if not np.isfinite(image).all():
            what = f"a value too large for {dtype}" if np.isfinite(given).all() else "infinity"
            what = "NaN" if np.isnan(given).any() else what
            where = row if names is None else names[row]
            raise ValueError(f"Input X contains {what}: see row {where}.")
    return cast, peak


def check_pixel_range(estimator: Any, images: Images, *, reset: bool) -> None:
    """Refuse images that are 255 times brighter or darker than those of ``fit``.

    uint8 is divided by 255, floats are taken as they are: one may follow the other only where the
    floats are on the scale [0, 1], and floats only those of about the same scale. `pixel_range_` is
    "uint8", or the largest absolute value; None in ``fit`` until lazy floats have been read. What
    is lazy is checked as it is read.
    """
    whole, vectors = images.dtype == np.uint8, len(images.image_shape) == 1
    if reset:
        estimator.pixel_range_ = "uint8" if whole else None if images.lazy else images.peak
        return
    fitted = estimator.pixel_range_
    name = type(estimator).__name__
    if whole and isinstance(fitted, float) and fitted > UNIT_MAX:
        raise ValueError(
            f"X is uint8, which counts as [0, 1], but {name} was fitted on floats up to "
            f"{fitted:g}: convert X with X.astype(float) if these were not divided by 255 either."
        )
    if fitted == "uint8":
        if whole:
            return
    # Features have no common scale; uint8 never exceeds 1.
    elif not fitted or fitted < 0 or vectors or (whole and FOLD * fitted > 1):
        return
    peak = 1.0 if fitted == "uint8" else fitted
    mean, std = estimator.pixel_mean_, estimator.pixel_std_
    level = math.sqrt((mean @ mean + std @ std) / len(mean))
    # The deviation of a constant channel is set to 1, which may exceed every value.
    scale = PixelScale(name, peak, 0.0 if vectors else min(level, peak), fitted == "uint8")
    if images.lazy:
        images.scale = scale
        return
    scale.check(images.data, np.arange(len(images)), images.peak)
    scale.conclude()


def channel_statistics(
    images: Images, rows: np.ndarray, weights: np.ndarray | None = None, block: int = 512
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean and standard deviation of each channel over some rows.

    The one normalisation rule of the package: ``(x - mean) / std`` per channel (per feature for
    vectors), fitted on the training images only, uint8 first divided by 255.

    Parameters
    ----------
    images : Images
        Where to read.
    rows : ndarray of int
        The training rows.
    weights : ndarray of float, default=None
        One weight per row of `rows`.
    block : int, default=512
        Images in memory at a time.

    Returns
    -------
    mean, std : ndarray of shape (C,), float64
        A constant channel has ``std`` 1.

    Raises
    ------
    ValueError
        If one image holds a value so large that all others would look alike beside it.
    """
    total = square = 0.0
    weights = np.ones(len(rows)) if weights is None else np.asarray(weights, dtype=np.float64)
    axes = tuple(range(2, len(images.image_shape) + 1))
    # The variance is taken around a first guess, so that large offsets do not cancel.
    shift: Any = None
    peaks = []
    for start in range(0, len(rows), block):
        part = slice(start, start + block)
        batch = to_unit_scale(images.rows(rows[part]), torch.float64).numpy()
        if axes and images.dtype != np.uint8:
            peaks.append(np.maximum(batch.max(axis=(1, *axes)), -batch.min(axis=(1, *axes))))
        if shift is None:
            shift = batch.mean(axis=(0, *axes), keepdims=True)
        batch = batch - shift
        total = total + weights[part] @ batch.mean(axis=axes)
        square = square + weights[part] @ (batch**2).mean(axis=axes)
    if peaks:
        _refuse_broken(np.concatenate(peaks), rows)
    mean = total / weights.sum()
    variance = np.maximum(square / weights.sum() - mean**2, 0.0)
    mean = mean + shift.ravel()
    constant = variance <= 1e-12 * np.maximum(mean**2, 1e-12)
    return mean, np.where(constant, 1.0, np.sqrt(variance))


def _refuse_broken(peaks: np.ndarray, rows: np.ndarray) -> None:
    """Refuse a pixel beside which all others vanish, as files mark missing ones (3e38, 1e20)."""
    lit = peaks[peaks > 0]
    typical = float(np.median(lit)) if len(lit) else 0.0
    if len(lit) and lit.max() > BROKEN * typical:
        row = peaks.argmax()
        raise ValueError(
            f"X holds a value of size {peaks[row]:g} in row {rows[row]}, where images have about "
            f"{typical:g} at most: replace the pixels that mark missing values."
        )
