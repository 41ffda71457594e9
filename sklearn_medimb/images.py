"""What ``X`` may be, and which axis is which.

The only file that knows how callers store images. Everywhere else a batch is a tensor of shape
``(n, C, *spatial)`` (images, volumes) or ``(n, d)`` (feature vectors).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.utils import check_array
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _num_samples, validate_data
from torch.utils.data import Dataset, IterableDataset

CHANNEL_COUNTS = (1, 3, 4)  # what an axis of channels may look like when nobody says
INPUT_CONSTRAINTS: dict[str, list[Any]] = {
    "image_shape": [None, tuple, list],
    "data_format": [StrOptions({"auto", "channels_first", "channels_last"})],
    "spatial_dims": [None, Interval(Integral, 2, 3, closed="both")],
}
UNIT_MAX = 1.5  # floats up to here may be pixels scaled to [0, 1], with some overshoot


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


def is_lazy(X: Any) -> bool:
    """Whether `X` is a container that loads images on demand.

    It has ``__len__``, ``__getitem__``, ``shape``, ``ndim`` and ``dtype`` and is no array in
    memory. ``X[i]`` with an integer returns one image; for cross-validation, ``X[rows]`` with an
    index array, alone or in a tuple before ``...``, returns another such container.
    """
    if isinstance(X, (np.ndarray, torch.Tensor, list, tuple)) or hasattr(X, "iloc"):
        return False
    if sparse.issparse(X):
        return False
    names = ("__len__", "__getitem__", "shape", "ndim", "dtype")
    return all(hasattr(X, name) for name in names) and X.ndim > 2


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
    """

    def __init__(self, data: Any, layout: Layout, dtype: np.dtype) -> None:
        self.data = data
        self.layout = layout
        self.dtype = dtype
        self.lazy = not isinstance(data, np.ndarray)
        self.in_blocks = isinstance(data, (np.ndarray, MappedImages))

    def __len__(self) -> int:
        return len(self.data)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one canonical image."""
        return self.layout.shape

    def rows(self, rows: np.ndarray) -> torch.Tensor:
        """Read some rows: a CPU tensor ``(n, C, *spatial)`` in the stored dtype."""
        if self.in_blocks:
            # A block copy: NumPy's take is faster here than torch's fancy indexing, and the copy is
            # writable even where the caller's array is a read-only memory map.
            block = self.data.take(rows, axis=0)
            if self.lazy:
                block = _cast(block, self.dtype, names=rows)
        else:
            images = [self._announced(_one_image(self.data, int(row)), row) for row in rows]
            block = _cast(np.stack(images), self.dtype, names=rows)
        return self.layout.canonical(torch.from_numpy(block))

    def _announced(self, image: np.ndarray, row: int) -> np.ndarray:
        """Pass an image on if it is what the container announces."""
        shape, dtype = tuple(self.data.shape[1:]), np.dtype(self.data.dtype)
        # uint8 is divided by 255 and nothing else is, so that neither may stand in for the other.
        same_kind = image.dtype.kind in "buif" and (image.dtype == np.uint8) == (dtype == np.uint8)
        if image.shape != shape or not same_kind:
            raise ValueError(
                f"X announces images of shape {shape} and dtype {dtype}, but row {row} has shape "
                f"{image.shape} and dtype {image.dtype}."
            )
        return image


class _ImageRows:
    """Some rows of a source of images, in some order."""

    rows: np.ndarray
    dtype: np.dtype
    _image_shape: tuple[int, ...]

    def _read(self, row: int) -> Any:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole, as if it were an array."""
        return (len(self.rows), *self._image_shape)

    @property
    def ndim(self) -> int:
        """Number of axes of the whole."""
        return len(self.shape)

    def __getitem__(self, key: Any) -> Any:
        rows = self.rows[_row_key(key)]
        if np.ndim(rows):
            subset = copy(self)
            subset.rows = rows
            return subset
        return self._read(int(rows))


class ExtendedImages(_ImageRows):
    """A lazy container followed by images in memory, as a lazy container.

    Parameters
    ----------
    data : lazy sequence of n images
        Read on demand.
    extra : ndarray of shape (n_extra, ...)
        Images of the same shape and dtype.
    rows : ndarray of int, default=None
        Which of the n + n_extra images, in which order; None for all.
    """

    def __init__(self, data: Any, extra: np.ndarray, rows: np.ndarray | None = None) -> None:
        self.data = data
        self.extra = extra
        self.rows = np.arange(len(data) + len(extra)) if rows is None else rows
        self.dtype = extra.dtype
        self._image_shape = extra.shape[1:]

    def _read(self, row: int) -> Any:
        n = len(self.data)
        return self.data[row] if row < n else self.extra[row - n]


class DatasetImages(_ImageRows):
    """The images of a torch data set, read on demand: an ``X`` for every estimator.

    An item is an image (array, tensor, PIL image), a tuple or list that begins with one, or a
    mapping with the key "image". Labels in the items are ignored: pass them as ``y``. All images
    must have the shape of the first, whether they are uint8 included, which is checked as they
    are read.

    ``X[i]`` reads an image; a slice, mask or index array gives a further container, so that
    scikit-learn's cross-validation reads nothing it does not need.

    Parameters
    ----------
    dataset : torch.utils.data.Dataset
        A map-style data set, with ``__len__`` and ``__getitem__``. Estimators wrap one by
        themselves; tools that index ``X`` (``cross_val_score``) need it wrapped.

    Attributes
    ----------
    rows : ndarray of int
        The items of the data set that are the images, in this order.
    dtype : numpy.dtype
        That of the first item.

    Raises
    ------
    TypeError
        If the data set can only be iterated.
    ValueError
        If it is empty, or its first item holds no image.

    Examples
    --------
    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> from sklearn_medimb.datasets import DatasetImages
    >>> X = DatasetImages(TensorDataset(torch.zeros(5, 3, 8, 8), torch.arange(5)))
    >>> X.shape, X[[0, 2]].shape
    ((5, 3, 8, 8), (2, 3, 8, 8))
    """

    def __init__(self, dataset: Any) -> None:
        has_rows = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if isinstance(dataset, IterableDataset) or not has_rows:
            raise TypeError(
                f"{type(dataset).__name__} has no numbered items, but images are read by their "
                "number: pass a map-style data set, with __len__ and __getitem__."
            )
        if len(dataset) < 1:
            raise ValueError(
                "Found array with 0 sample(s) while a minimum of 1 is required: the data set is "
                "empty."
            )
        self.dataset = dataset
        self.rows = np.arange(len(dataset))
        first = _one_image(self, 0)
        self.dtype = first.dtype
        self._image_shape = first.shape

    def _read(self, row: int) -> np.ndarray:
        item = self.dataset[row]
        if isinstance(item, Mapping):
            item = item.get("image")
        elif isinstance(item, (tuple, list)) and len(item):
            item = item[0]
        if not is_image(item):
            raise TypeError(
                "an item must be an image, a tuple that begins with one, or a dict with the key "
                f'"image"; the place of the image holds {type(item).__name__}'
            )
        return np.asarray(_from_torch(item))


class MappedImages(_ImageRows):
    """The images of a ``.npy`` file, left on disk and read batch by batch: an ``X`` for every tool.

    A selection of rows, as cross-validation makes it, copies no image, and what travels to another
    process is the path and the row numbers: all workers of a search share the pages of one file.
    Machines of a cluster need the file at the same place.

    ``X[i]`` reads an image; a slice, mask or index array gives a further container.

    Parameters
    ----------
    path : path-like
        File that ``numpy.save`` wrote, of an array of n images: at least three axes.

    Attributes
    ----------
    rows : ndarray of int
        The rows of the file that are the images, in this order.
    dtype : numpy.dtype
        That of the file.

    Raises
    ------
    ValueError
        If the file holds no array of images.

    Examples
    --------
    >>> import tempfile, pathlib, numpy as np
    >>> from sklearn_medimb.datasets import MappedImages
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "images.npy"
    >>> np.save(path, np.zeros((5, 3, 8, 8), dtype=np.uint8))
    >>> X = MappedImages(path)
    >>> X.shape, X[[0, 2]].shape
    ((5, 3, 8, 8), (2, 3, 8, 8))
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path).absolute()
        try:
            array = self._array
        except (ValueError, EOFError) as error:
            raise ValueError(f"{str(self.path)!r} is no .npy file of images: {error}") from error
        if not isinstance(array, np.ndarray):
            raise ValueError(
                f"{str(self.path)!r} is an archive: numpy.save the array of images in it to a "
                ".npy file."
            )
        if array.ndim < 3 or not len(array):
            raise ValueError(
                f"{str(self.path)!r} holds an array of shape {array.shape}, not images: (n, H, W), "
                "(n, C, H, W), ..."
            )
        self.rows = np.arange(len(array))
        self.dtype = array.dtype
        self._image_shape = array.shape[1:]

    @cached_property
    def _array(self) -> np.ndarray:
        return np.load(self.path, mmap_mode="r", allow_pickle=False)

    def __repr__(self) -> str:
        return f"MappedImages({str(self.path)!r}, shape={self.shape}, dtype={self.dtype})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_array"}

    def take(self, rows: np.ndarray, axis: int = 0) -> np.ndarray:
        """Read several images at once.

        Parameters
        ----------
        rows : ndarray of int
            Which of the images.
        axis : {0}
            As in NumPy.

        Returns
        -------
        images : ndarray of shape (len(rows), ...)
            A copy, in memory.
        """
        if axis != 0:
            raise ValueError(f"axis={axis}: images are taken along axis 0.")
        return np.asarray(self._array.take(self.rows[rows], axis=0))

    def _read(self, row: int) -> np.ndarray:
        return np.asarray(self._array[row])


def wrap_dataset(X: Any) -> Any:
    """Turn a torch data set into a lazy sequence, unless it is one; leave everything else."""
    is_sequence = all(hasattr(X, name) for name in ("shape", "ndim", "dtype"))
    return DatasetImages(X) if isinstance(X, Dataset) and not is_sequence else X


def _row_key(key: Any) -> Any:
    """Reduce ``X[rows, ...]``, which is how scikit-learn indexes, to its rows."""
    if not isinstance(key, tuple):
        return key
    if key[1:] != (Ellipsis,):
        raise IndexError("A lazy container of images is indexed by rows only.")
    return key[0]


def _one_image(data: Any, row: int) -> np.ndarray:
    try:
        return np.asarray(_from_torch(data[row]))
    except Exception as error:
        raise ValueError(f"Row {row} of X could not be read: {error!r}.") from error


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
) -> Images:
    """Validate `X` for `estimator` and find its axes.

    Parameters
    ----------
    estimator : estimator instance
        Receives `n_features_in_` and `feature_names_in_` when `reset`; otherwise its
        `image_shape_`, where it has one, is what images must have.
    X : array-like, DataFrame, torch tensor or Dataset, list of arrays, or lazy sequence
        See the package's README for the accepted shapes.
    reset : bool
        True in ``fit``.
    image_shape, data_format, spatial_dims, paired
        As in :func:`infer_layout`.
    float_dtype : {numpy.float32, numpy.float64} or None
        What everything that is not uint8 is read as; None keeps the dtype of `X`.

    Returns
    -------
    images : Images
        The images, not copied where they are uint8 or already of `float_dtype`.

    Raises
    ------
    ValueError
        If `X` is empty, ragged, ambiguous, not finite, or of another shape than in ``fit``.
    TypeError
        If `X` is sparse, not numeric, or a data set that can only be iterated.
    """
    X = as_array(wrap_dataset(X))
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
    if reset:
        if X.ndim > 2:  # validate_data saw two axes at most
            estimator.__dict__.pop("feature_names_in_", None)
        estimator.n_features_in_ = math.prod(layout.shape)
    elif layout.shape != tuple(getattr(estimator, "image_shape_", layout.shape)):
        raise ValueError(
            f"X holds images of shape {layout.shape} (channels first), but "
            f"{type(estimator).__name__} was fitted on images of shape "
            f"{tuple(estimator.image_shape_)}: resize or crop X, or check data_format."
        )
    if np.dtype(X.dtype).kind not in "buif":
        raise ValueError(f"X of dtype {X.dtype} cannot be read as images.")
    dtype = np.dtype(X.dtype if X.dtype == np.uint8 or float_dtype is None else float_dtype)
    if dtype.itemsize > 8:
        raise ValueError(f"X of dtype {dtype} cannot be read as images: convert it to float64.")
    dtype = dtype.newbyteorder("=")
    return Images(X if is_lazy(X) else _cast(X, dtype), layout, dtype)


def warn_of_flat_images(estimator: Any, images: Images) -> None:
    """Warn where rows are read as images of height one: most such calls forgot `image_shape`."""
    if len(images.image_shape) == 1:
        warnings.warn(
            f"{type(estimator).__name__} reads the rows of a 2-D X as images of height 1: set "
            "image_shape=(H, W) or (C, H, W) if they are flattened images.",
            stacklevel=3,
        )


def as_array(X: Any) -> Any:
    """Turn tensors and lists of images into arrays; leave everything else to scikit-learn."""
    X = _from_torch(X)
    if not (isinstance(X, (list, tuple)) and len(X)):
        return X
    if not (isinstance(X[0], (list, tuple)) or is_image(X[0])):
        return X
    images = [_one_image(X, row) for row in range(len(X))]
    shapes = [image.shape for image in images]
    odd = next((row for row, shape in enumerate(shapes) if shape != shapes[0]), None)
    if odd is not None:
        raise ValueError(
            f"X is a list of images of different sizes: row 0 has shape {shapes[0]}, row {odd} "
            f"has shape {shapes[odd]}. Resize them to one size first."
        )
    return np.stack(images)


def is_image(image: Any) -> bool:
    """Whether an entry of a list is an array, a tensor or a PIL image."""
    return hasattr(image, "shape") or hasattr(image, "__array_interface__")


def _from_torch(X: Any) -> Any:
    """Turn a tensor into an array; leave everything else."""
    if not isinstance(X, torch.Tensor):
        return X
    X = X.detach().cpu()
    return (X.float() if X.dtype == torch.bfloat16 else X).numpy()


def _cast(X: np.ndarray, dtype: np.dtype, names: np.ndarray | None = None) -> np.ndarray:
    """Bring images to the dtype of the batches; raise, naming the row, where one is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        cast = X.astype(dtype, copy=False)
        # The sum is one pass without a boolean copy; it may overflow where no value does.
        if dtype.kind != "f" or np.isfinite(cast.sum(dtype=np.float64)):
            return cast
    for row, (image, given) in enumerate(zip(cast, X, strict=True)):
        if not np.isfinite(image).all():
            what = f"a value too large for {dtype}" if np.isfinite(given).all() else "infinity"
            what = "NaN" if np.isnan(given).any() else what
            where = row if names is None else names[row]
            raise ValueError(f"Input X contains {what}: see row {where}.")
    return cast


def check_pixel_range(estimator: Any, images: Images, *, reset: bool) -> None:
    """Refuse images that are 255 times brighter or darker than those of ``fit``.

    uint8 is divided by 255, floats are taken as they are: one may follow the other only where the
    floats are on the scale [0, 1]. `pixel_range_` is "uint8", the largest float, or None where that
    does not matter (feature vectors) or is unknown (floats in a lazy container).
    """
    pixels: str | float | None = None
    if images.dtype == np.uint8:
        pixels = "uint8"
    elif len(images.image_shape) > 1 and not images.lazy:
        pixels = float(images.data.max())
    if reset:
        estimator.pixel_range_ = pixels
        return
    fitted = estimator.pixel_range_
    name = type(estimator).__name__
    if fitted == "uint8" and isinstance(pixels, float) and pixels > UNIT_MAX:
        raise ValueError(
            f"X holds floats up to {pixels:g}, but {name} was fitted on uint8 images, which count "
            "as [0, 1]: pass uint8, or divide X by 255."
        )
    if pixels == "uint8" and isinstance(fitted, float) and fitted > UNIT_MAX:
        raise ValueError(
            f"X is uint8, which counts as [0, 1], but {name} was fitted on floats up to "
            f"{fitted:g}: convert X with X.astype(float) if these were not divided by 255 either."
        )


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
    """
    total = square = 0.0
    weights = np.ones(len(rows)) if weights is None else np.asarray(weights, dtype=np.float64)
    axes = tuple(range(2, len(images.image_shape) + 1))
    # The variance is taken around a first guess, so that large offsets do not cancel.
    shift: Any = None
    for start in range(0, len(rows), block):
        part = slice(start, start + block)
        batch = to_unit_scale(images.rows(rows[part]), torch.float64).numpy()
        if shift is None:
            shift = batch.mean(axis=(0, *axes), keepdims=True)
        batch = batch - shift
        total = total + weights[part] @ batch.mean(axis=axes)
        square = square + weights[part] @ (batch**2).mean(axis=axes)
    mean = total / weights.sum()
    variance = np.maximum(square / weights.sum() - mean**2, 0.0)
    mean = mean + shift.ravel()
    constant = variance <= 1e-12 * np.maximum(mean**2, 1e-12)
    return mean, np.where(constant, 1.0, np.sqrt(variance))


def as_pixels(batch: torch.Tensor) -> torch.Tensor:
    """Read feature vectors (n, d) as images of height one, (n, 1, 1, d); images stay."""
    return batch[:, None, None] if batch.ndim == 2 else batch


def to_unit_scale(batch: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert a batch to floats; uint8 images become [0, 1]."""
    if batch.dtype == torch.uint8:
        return batch.to(dtype).div_(255.0)
    return batch.to(dtype)
