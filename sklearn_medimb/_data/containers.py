"""What X may be: arrays, lists, data sets, memory-mapped files, images of other libraries."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from copy import copy
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch.utils.data import IterableDataset

from sklearn_medimb._data.pixel_scale import on_one_scale


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


def is_in_blocks(X: Any) -> bool:
    """Whether `take` of a container reads several images of one size at once."""
    return isinstance(X, ImageRows) and X.one_size


class ImageRows:
    """Some rows of a source of images, in some order."""

    one_size = False  # whether `take` reads several at once
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


class ExtendedImages(ImageRows):
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


class ImageList(ImageRows):
    """Images of several sizes, in memory.

    Parameters
    ----------
    images : list of ndarray
        With the same number of axes.
    """

    def __init__(self, images: list[np.ndarray]) -> None:
        self.images = images
        self.rows = np.arange(len(images))
        self.dtype = np.result_type(*{image.dtype for image in images})
        self._image_shape = images[0].shape

    def _read(self, row: int) -> np.ndarray:
        return self.images[row]


class DatasetImages(ImageRows):
    """The images of a data set, read on demand: an ``X`` for every estimator.

    Of torch, and with it of MONAI, or of Hugging Face's ``datasets``. An item is an image (array,
    tensor, PIL image), a tuple or list that begins with one, or a
    mapping with the key "image". Labels in the items are ignored: pass them as ``y``. All images
    must have the shape of the first (with ``image_size=``, the number of channels), whether they
    are uint8 included, which is checked as they are read. PIL images are read as gray, RGB or
    RGBA, whatever their mode.

    ``X[i]`` reads an image; a slice, mask or index array gives a further container, so that
    scikit-learn's cross-validation reads nothing it does not need.

    Parameters
    ----------
    dataset : torch.utils.data.Dataset or datasets.Dataset
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
        first = one_image(self, 0)
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


class MappedImages(ImageRows):
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

    one_size = True
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


def _row_key(key: Any) -> Any:
    """Reduce ``X[rows, ...]``, which is how scikit-learn indexes, to its rows."""
    if not isinstance(key, tuple):
        return key
    if key[1:] != (Ellipsis,):
        raise IndexError("A lazy container of images is indexed by rows only.")
    return key[0]


def one_image(data: Any, row: int) -> np.ndarray:
    try:
        return as_pixel_array(data[row])
    except Exception as error:
        raise ValueError(f"Row {row} of X could not be read: {error!r}.") from error


def as_list(X: Any) -> Any:
    """Take an object array, or a column of a table, for the list of its entries; leave the rest."""
    is_array = isinstance(X, np.ndarray) or hasattr(X, "iloc")
    return list(X) if is_array and X.ndim != 2 and X.dtype.kind == "O" else X


def one_column(X: Any) -> Any:
    """Take the column of a table that holds images; leave every other object.

    Raises
    ------
    ValueError
        If the table has further columns.
    """
    is_array = isinstance(X, np.ndarray) and X.dtype.kind == "O"
    if getattr(X, "ndim", 0) != 2 or not (is_array or hasattr(X, "iloc")) or not len(X):
        return X
    first = X[0] if is_array else [X.iloc[0, k] for k in range(X.shape[1])]
    if len(first) == 1 and is_path(first[0]):
        return X[:, 0] if is_array else X.iloc[:, 0]
    holding = [k for k, entry in enumerate(first) if is_image(entry) or isinstance(entry, list)]
    if not holding:
        return X
    if X.shape[1] == 1:
        return X[:, 0] if is_array else X.iloc[:, 0]
    name = holding[0] if is_array else X.columns[holding[0]]
    raise ValueError(
        f"X is a table of {X.shape[1]} columns, of which column {name!r} holds images: pass that "
        "column alone."
    )


def is_image(image: Any) -> bool:
    """Whether an entry of a list is an array, a tensor or a PIL image."""
    if isinstance(image, np.generic):  # a number
        return False
    return hasattr(image, "shape") or hasattr(image, "__array_interface__")


def is_path(entry: Any) -> bool:
    """Whether an entry of a list is the path of a file."""
    return isinstance(entry, (str, PathLike))


def is_picture(image: Any) -> bool:
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
    image = from_torch(image)
    if is_picture(image):
        return _from_pillow(image)
    if isinstance(image, np.ndarray) and image.dtype.kind == "O":
        image = image.tolist()
    if holds_images(image):
        return np.stack(on_one_scale([as_pixel_array(part) for part in image], name="image"))
    return np.asarray(image)


def _from_pillow(image: Any) -> np.ndarray:
    """Read a PIL image: gray, RGB and RGBA as they are, what only codes colours as RGB.

    The numbers of a palette, and of inks or hues, are no intensities.
    """
    mode = image.mode
    if mode in ("1", "L", "RGB", "RGBA", "I", "F") or mode.startswith("I;16"):
        return np.asarray(image)
    clear = mode in ("LA", "La", "PA", "RGBa") or "transparency" in image.info
    try:
        image = image.convert("LA") if mode == "La" else image
        return np.asarray(image.convert("RGBA" if clear else "RGB"))
    except ValueError as error:
        raise ValueError(f"a PIL image of mode {mode} cannot be read as RGB: {error}") from error


def from_torch(X: Any) -> Any:
    """Turn a tensor into an array; leave everything else."""
    if not isinstance(X, torch.Tensor):
        return X
    X = X.detach().cpu()
    return (X.float() if X.dtype == torch.bfloat16 else X).numpy()
