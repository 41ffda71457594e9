"""What ``X`` may be, and which axis is which.

The only file that knows how callers store images. Everywhere else a batch is a tensor of shape
``(n, C, *spatial)`` (images, volumes) or ``(n, d)`` (feature vectors).
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
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
FOLD = 16.0  # a change of scale: nearer to 255 than to 1, on a log scale
BROKEN = 1e6  # so many times the typical largest value of an image is no pixel


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
    peak : float, default=0.0
        Largest absolute value of floats, as far as they have been read.
    scale : PixelScale, default=None
        What lazy floats must agree with as they are read.
    """

    def __init__(
        self,
        data: Any,
        layout: Layout,
        dtype: np.dtype,
        *,
        peak: float = 0.0,
        scale: PixelScale | None = None,
    ) -> None:
        self.data = data
        self.layout = layout
        self.dtype = dtype
        self.peak = peak
        self.scale = scale
        self.lazy = not isinstance(data, np.ndarray)
        self.in_blocks = isinstance(data, (np.ndarray, MappedImages))
        self._first: tuple[int, np.dtype] | None = None  # row and dtype read first

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
        else:
            images = [self._announced(_one_image(self.data, int(row)), row) for row in rows]
            block = np.stack(images)
        if self.lazy:
            block, peak = _cast(block, self.dtype, names=rows)
            self.peak = max(self.peak, peak)
            if self.scale is not None:
                self.scale.check(block, rows, peak)
        return self.layout.canonical(torch.from_numpy(block))

    def holding(self, data: Any, layout: Layout) -> Images:
        """Give other rows of the same images, or mixes of them, the same bounds."""
        return Images(data, layout, self.dtype, peak=self.peak, scale=self.scale)

    def conclude(self) -> None:
        """Refuse lazy images, all of them read by now, that are on a darker scale throughout."""
        if self.scale is not None:
            self.scale.conclude()

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
        first, known = self._first = self._first or (row, image.dtype)
        if _kind(known) != _kind(image.dtype):
            raise ValueError(
                f"X mixes images whose scales may differ: row {first} has dtype {known}, row {row} "
                f"has dtype {image.dtype}. Bring them to one dtype."
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
    are read. PIL images are read as gray, RGB or RGBA, whatever their mode.

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
        return as_pixel_array(item)


class MappedImages(_ImageRows):
    """The images of a ``.npy`` file, left on disk and read batch by batch: an ``X`` for every tool.

    A selection of rows, as cross-validation makes it, copies no image, and what travels to another
    process is the path and the row numbers: all workers of a search share the pages of one file.
    Machines of a cluster need the file at the same place. A file that was replaced by another one
    since, or cut, is refused as soon as it is noticed: shape, dtype and some of its bytes must be
    what they were.

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

    _mapped: tuple[tuple[int, ...], np.ndarray] | None = None
    _seal: tuple[Any, ...] | None = None

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path).absolute()
        array = self._array
        if array.ndim < 3 or not len(array):
            raise ValueError(
                f"{str(self.path)!r} holds an array of shape {array.shape}, not images: (n, H, W), "
                "(n, C, H, W), ..."
            )
        self.rows = np.arange(len(array))
        self.dtype = array.dtype
        self._image_shape = array.shape[1:]

    @property
    def _array(self) -> np.ndarray:
        """The file, mapped anew where it is not the one that was mapped last."""
        status = self.path.stat()
        version = status.st_ino, status.st_size, status.st_mtime_ns
        if self._mapped is None or self._mapped[0] != version:
            array = _map_file(self.path)
            seal = _seal(array)
            if self._seal not in (None, seal):
                raise ValueError(
                    f"{str(self.path)!r} is not the file that it was: it holds {array.dtype} of "
                    f"shape {array.shape} now. Make a new MappedImages of it."
                )
            self._mapped, self._seal = (version, array), seal
        return self._mapped[1]

    def __repr__(self) -> str:
        return f"MappedImages({str(self.path)!r}, shape={self.shape}, dtype={self.dtype})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_mapped"}

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


def _map_file(path: Path) -> np.ndarray:
    """Map the array in a ``.npy`` file, whatever its header claims."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # a header that makes no sense shows in many ways
        raise ValueError(f"{str(path)!r} is no .npy file of images: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(
            f"{str(path)!r} is an archive: numpy.save the array of images in it to a .npy file."
        )
    return array


def _seal(array: np.ndarray, n_places: int = 16, n_bytes: int = 4096) -> tuple[Any, ...]:
    """Shape, dtype, and a digest of some bytes of a contiguous array: what tells files apart.

    A file's time does not: copies on other machines have another one.
    """
    digest = hashlib.blake2b(digest_size=16)
    flat = array.ravel(order="K").view(np.uint8)
    for start in np.linspace(0, max(len(flat) - n_bytes, 0), n_places).astype(int):
        digest.update(flat[start : start + n_bytes].tobytes())
    return array.shape, array.dtype.str, array.flags.c_contiguous, digest.digest()


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
        return as_pixel_array(data[row])
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
        If `X` is empty, ragged, ambiguous, not finite, of another shape than in ``fit``, or mixes
        images whose scales differ.
    TypeError
        If `X` is sparse, not numeric, or a data set that can only be iterated.
    """
    _refuse_mixed_columns(X, image_shape)
    X = as_array(wrap_dataset(X), float_dtype)
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
    peak = 0.0
    if not is_lazy(X):
        X, peak = _cast(X, dtype)
    return Images(X, layout, dtype, peak=peak)


def warn_of_flat_images(estimator: Any, images: Images) -> None:
    """Warn where rows are read as images of height one: most such calls forgot `image_shape`."""
    if len(images.image_shape) == 1:
        warnings.warn(
            f"{type(estimator).__name__} reads the rows of a 2-D X as images of height 1: set "
            "image_shape=(H, W) or (C, H, W) if they are flattened images.",
            stacklevel=3,
        )


def as_array(X: Any, float_dtype: type[np.floating] | None = None) -> Any:
    """Turn tensors and lists of images into arrays, on one scale; leave the rest to scikit-learn.

    Parameters
    ----------
    X : object
        An object array or a column of a table whose entries are images counts as a list of them.
    float_dtype : {numpy.float32, numpy.float64} or None, default=None
        dtype of uint8 images that stand beside floats; None is float64.

    Returns
    -------
    X : ndarray or the object given
        See :func:`on_one_scale`.
    """
    given = _from_torch(X)
    X = as_list(given)
    if not (isinstance(X, (list, tuple)) and len(X)):
        return given
    if not (isinstance(X[0], (list, tuple)) or is_image(X[0])):
        return given
    images = [_one_image(X, row) for row in range(len(X))]
    shapes = [image.shape for image in images]
    odd = next((row for row, shape in enumerate(shapes) if shape != shapes[0]), None)
    if odd is not None:
        if _is_picture(X[0]) and _is_picture(X[odd]) and X[0].mode != X[odd].mode:
            raise ValueError(
                f"X is a list of images of different modes: row 0 is {X[0].mode}, row {odd} is "
                f"{X[odd].mode}. Convert them to one mode first."
            )
        raise ValueError(
            f"X is a list of images of different sizes: row 0 has shape {shapes[0]}, row {odd} "
            f"has shape {shapes[odd]}. Resize them to one size first."
        )
    plain = [isinstance(entry, (list, tuple)) and not holds_images(entry) for entry in X]
    return on_one_scale(images, plain, float_dtype)


def as_list(X: Any) -> Any:
    """Take an object array, or a column of a table, for the list of its entries; leave the rest."""
    is_array = isinstance(X, np.ndarray) or hasattr(X, "iloc")
    return list(X) if is_array and X.ndim != 2 and X.dtype.kind == "O" else X


def on_one_scale(
    images: Sequence[np.ndarray],
    plain: Sequence[bool] | None = None,
    float_dtype: type[np.floating] | None = None,
    name: str = "row",
) -> np.ndarray:
    """Stack images, each of them on the scale that its own dtype has.

    uint8 counts as [0, 1] and so does bool; other numbers are taken as they are. uint8 and bool
    may stand beside one another, and beside floats within [0, 1]; what else is mixed would be
    images on different scales. Floats of any width, or whole numbers of any other width than
    uint8, may stand beside one another.

    Parameters
    ----------
    images : sequence of ndarray
        Of one shape.
    plain : sequence of bool, default=None
        Which of them come from Python's numbers, of which whole ones count as floats.
    float_dtype : {numpy.float32, numpy.float64} or None, default=None
        dtype of uint8 images that stand beside floats; None is float64.
    name : str, default="row"
        What errors call one of the images.

    Returns
    -------
    stacked : ndarray
        uint8 where that loses nothing.

    Raises
    ------
    ValueError
        If the scales differ; the message names the rows.
    """
    if len({image.dtype for image in images}) == 1:
        return np.stack(images)
    kinds = [_kind(image.dtype) for image in images]
    if plain is not None:
        kinds = ["float" if p and k == "whole" else k for p, k in zip(plain, kinds, strict=True)]
    if len(set(kinds)) == 1:
        return np.stack(images)

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
        return np.stack(
            [levels[i] if k == "uint8" else i for i, k in zip(images, kinds, strict=True)]
        )
    return np.stack(
        [i if k == "uint8" else i * np.uint8(255) for i, k in zip(images, kinds, strict=True)]
    )


def _kind(dtype: Any) -> str:
    """What an image's dtype says of its scale: uint8 and bool count as [0, 1]."""
    if dtype == np.uint8:
        return "uint8"
    return {"b": "bool", "i": "whole", "u": "whole", "f": "float"}.get(dtype.kind, "other")


def _refuse_mixed_columns(X: Any, image_shape: Sequence[int] | None) -> None:
    """Refuse a table of pixels some of whose columns are uint8: an array of it is on no scale."""
    if image_shape is None or not (hasattr(X, "dtypes") and hasattr(X, "iloc")):
        return
    kinds = [_kind(getattr(dtype, "numpy_dtype", dtype)) for dtype in X.dtypes]
    if len(set(kinds)) > 1 and set(kinds) & {"uint8", "whole"}:
        odd = next(column for column, kind in enumerate(kinds) if kind != kinds[0])
        raise ValueError(
            f"X mixes columns whose scales may differ: {X.columns[0]} has dtype "
            f"{X.dtypes.iloc[0]}, {X.columns[odd]} has dtype {X.dtypes.iloc[odd]}. Bring X to one "
            "dtype."
        )


def is_image(image: Any) -> bool:
    """Whether an entry of a list is an array, a tensor or a PIL image."""
    if isinstance(image, np.generic):  # a number
        return False
    return hasattr(image, "shape") or hasattr(image, "__array_interface__")


def _is_picture(image: Any) -> bool:
    """Whether this is a PIL image, without asking for Pillow."""
    return isinstance(getattr(image, "mode", None), str) and hasattr(image, "convert")


def holds_images(entry: Any) -> bool:
    """Whether this is a list or tuple of images, such as a pair, and not of plain numbers."""
    return (
        isinstance(entry, (list, tuple))
        and len(entry) > 0
        and any(is_image(part) or holds_images(part) for part in (entry[0], entry[-1]))
    )


def as_pixel_array(image: Any) -> np.ndarray:
    """Read one image, or a pair of them: an array, a tensor, a PIL image, nested numbers."""
    if isinstance(image, np.ndarray) and image.dtype.kind != "O":
        return image
    image = _from_torch(image)
    if _is_picture(image):
        return _from_pillow(image)
    if isinstance(image, np.ndarray) and image.dtype.kind == "O":
        image = image.tolist()
    if holds_images(image):
        return on_one_scale([as_pixel_array(part) for part in image], name="image")
    return np.asarray(image)


def _from_pillow(image: Any) -> np.ndarray:
    """Read a PIL image: gray, RGB and RGBA as they are, what only codes colours as RGB.

    The numbers of a palette, and of inks or hues, are no intensities.
    """
    mode = image.mode
    if mode in ("1", "L", "LA", "RGB", "RGBA", "I", "F") or mode.startswith("I;16"):
        return np.asarray(image)
    clear = mode in ("PA", "RGBa") or "transparency" in image.info
    try:
        return np.asarray(image.convert("RGBA" if clear else "RGB"))
    except ValueError as error:
        raise ValueError(f"a PIL image of mode {mode} cannot be read as RGB: {error}") from error


def _from_torch(X: Any) -> Any:
    """Turn a tensor into an array; leave everything else."""
    if not isinstance(X, torch.Tensor):
        return X
    X = X.detach().cpu()
    return (X.float() if X.dtype == torch.bfloat16 else X).numpy()


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


def as_pixels(batch: torch.Tensor) -> torch.Tensor:
    """Read feature vectors (n, d) as images of height one, (n, 1, 1, d); images stay."""
    return batch[:, None, None] if batch.ndim == 2 else batch


def to_unit_scale(batch: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert a batch to floats; uint8 images become [0, 1]."""
    if batch.dtype == torch.uint8:
        return batch.to(dtype).div_(255.0)
    return batch.to(dtype)
