"""Image files as X: read on demand, several at a time."""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from sklearn_medimb._data.containers import DatasetImages, ImageRows, as_list, is_path, one_column
from sklearn_medimb._data.disk_cache import read_rows, write_once
from sklearn_medimb._data.headers import Header
from sklearn_medimb._data.reading import (
    as_reading,
    opened,
    read_file,
    read_header,
    read_slices,
    resolved,
    survey,
)

HELD = 2**28  # bytes of decoded images that stay in memory
AHEAD = 2**27  # bytes of images that are decoded before they are asked for


class ImageFiles(ImageRows):
    """Image files, decoded when they are read: an ``X`` for every estimator.

    What a file is, its content says, not its name: PNG, JPEG, TIFF, WebP and whatever else Pillow
    reads, DICOM, NIfTI, ``.npy``. Headers are read at once, pixels when they are needed, several
    files at a time. ``X[i]`` reads an image; a slice, mask or index array gives a further
    container. What travels to other processes are paths and options.

    Pixels are uint8 from 0 to 255 or float32 in the units of the file, one of them for all files,
    and no file is stretched by its own least and largest value:

    - Pictures of eight bits are uint8, those of one bit 0 and 255. Gray of 16 or 32 bits is
      float32; of colours Pillow takes the eight highest bits. The orientation that EXIF has is
      applied, profiles of colour are not; what is transparent lies on black.
    - DICOM: the modality's lookup table or rescaling is applied, MONOCHROME1 is inverted. CT and
      PET remain in their units (HU), float32. Other gray images are shown, as uint8, in the window
      or table of their own header; without one they are uint8 if they have eight bits, and float32
      in the modality's units if they have more. Colours of any kind become RGB. Nothing of a header
      is kept, or told in an error, that says who the patient is.
    - NIfTI: slope and intercept are applied; volumes ``(D, H, W)`` run from feet to head, back to
      front, left to right (the closest canonical orientation, RAS+, with its axes in reverse).
      Several volumes in a file are channels. Of uint8 without scaling they are uint8, else float32.
    - ``.npy``: ``(H, W)``, ``(H, W, C)`` or ``(C, H, W)`` with one or three channels, else a volume
      ``(D, H, W)``. uint8 and bool are uint8, all else is float32; pickles are refused.

    Images are ``(H, W)`` or ``(H, W, 3)``, volumes ``(C, D, H, W)``. Decoding always gives the same
    pixels. The first 256 MB of decoded images stay in the memory of a process.

    Parameters
    ----------
    paths : path-like or sequence of path-like
        The files; a list, an array, or a column of a table.
    mode : {"auto", "L", "RGB"}, default="auto"
        Gray or colour. "auto" is "RGB" if one of the files has colour, else "L". Colour becomes
        gray by the weights of ITU-R 601, and gray three equal channels.
    image_size : int, tuple of int or Resize, default=None
        The size that images come to when they are read; as in the estimators.
    window : tuple of two floats, default=None
        Centre and width of the values, of DICOM after MONOCHROME1 was inverted, that become 0 to
        255, uint8: of DICOM, NIfTI, and of pictures and arrays of more than eight bits. In HU,
        lungs are (-600, 1500), soft tissue is (40, 400).
    spacing : float or tuple of float, default=None
        Millimetres between pixels, ``(D, H, W)`` or ``(H, W)``, that NIfTI and DICOM images are
        brought to, before `image_size`.
    frames : {"all", "middle", "each"} or int, default="all"
        Of files with several frames, pages or slices, all of them as a volume, or one as an image.
        "each": X has a row for each slice, in order. Of NIfTI a volume has to be read for any
        slice; where not all fit into 256 MB, set `cache`.
    cache : path-like, default=None
        Folder that keeps the decoded images of all files in one ``.npy`` file, which the first
        reader writes and all processes share. It is found again as long as paths, sizes, times and
        options are the same; nobody removes it.

    Attributes
    ----------
    paths : list of str
        The file of each image.
    files : ndarray of int
        For each image which of the files that were given it is of.
    sizes : list of tuple of int
        Sides of each image in its file, before `spacing` and `image_size`.
    dtype : numpy.dtype
        uint8 or float32.
    options : dict
        The parameters above but `paths` and `cache`, with "auto" resolved.

    Raises
    ------
    ValueError
        If there is no file, one is no image, damaged or of more than 268 million values, or files
        do not go together. The message has the row and the path.
    ImportError
        If a package is missing: ``pip install "sklearn_medimb[files]"``.

    Examples
    --------
    >>> import tempfile, pathlib, numpy as np
    >>> from sklearn_medimb.datasets import ImageFiles
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for name in "abc":
    ...     np.save(folder / name, np.zeros((8, 6), dtype=np.uint8))
    >>> X = ImageFiles(sorted(folder.glob("*.npy")))
    >>> X.shape, X[[0, 2]].shape, X[1].shape
    ((3, 8, 6), (2, 8, 6), (8, 6))
    """

    def __init__(
        self,
        paths: Any,
        *,
        mode: str = "auto",
        image_size: Any = None,
        window: tuple[float, float] | None = None,
        spacing: float | tuple[float, ...] | None = None,
        frames: str | int = "all",
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        self._paths = path_list(paths)
        reading = as_reading(mode, image_size, window, spacing, frames)
        found = survey(self._paths, reading)
        for row, header in enumerate(found):
            if isinstance(header, Exception):
                kind = ImportError if isinstance(header, ImportError) else ValueError
                raise kind(f"Row {row} of X could not be read: {header}") from None
        headers = [header for header in found if isinstance(header, Header)]
        self._files = np.arange(len(self._paths))
        self._slices: list[int] | None = None
        if frames == "each":
            n_slices = [header.sides[0] if len(header.sides) == 3 else 1 for header in headers]
            self._files = np.repeat(self._files, n_slices)
            self._slices = [k for n in n_slices for k in range(n)]
            self._paths = [self._paths[file] for file in self._files]
            headers = [headers[file].slice() for file in self._files]
        self._reading = resolved(reading, headers, self._paths)
        shapes = {self._reading.shape(header) for header in set(headers)}
        self.one_size = len(shapes) == 1
        self.rows = np.arange(len(self._paths))
        self.dtype = np.dtype(np.uint8 if headers[0].whole else np.float32)
        self._image_shape = self._reading.shape(headers[0])
        self._n_bytes = max(map(math.prod, shapes)) * self.dtype.itemsize  # of the largest image
        self._sizes = [header.sides for header in headers]
        self._memory = _Memory()
        self._version = self._digest()  # other pixels are other data: what was kept is not theirs
        self._cached: Path | None = None
        if cache is not None:
            if not self.one_size:
                raise ValueError(
                    f"cache= keeps images of one size, but these have {len(shapes)}: set "
                    "image_size= of ImageFiles."
                )
            self._cached = Path(cache).absolute() / f"images-{self._version}.npy"

    @property
    def paths(self) -> list[str]:
        """The file of each image."""
        return [self._paths[row] for row in self.rows]

    @property
    def files(self) -> np.ndarray:
        """For each image which of the files that were given it is of."""
        return self._files[self.rows]

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """Sides of each image in its file."""
        return [self._sizes[row] for row in self.rows]

    @property
    def options(self) -> dict[str, Any]:
        """What decides how a file is read."""
        return self._reading.options()

    def __repr__(self) -> str:
        return f"ImageFiles({len(self)} files, shape={self.shape}, dtype={self.dtype})"

    def path_of(self, row: int) -> str:
        """File of a row."""
        return self._paths[self.rows[row]]

    def take(self, rows: np.ndarray, axis: int = 0) -> np.ndarray:
        """Read several images of one size at once.

        Parameters
        ----------
        rows : ndarray of int
            Which of the images.
        axis : {0}
            As in NumPy.

        Returns
        -------
        images : ndarray of shape (len(rows), ...)
            In this order.
        """
        if axis != 0:
            raise ValueError(f"axis={axis}: images are taken along axis 0.")
        rows = np.arange(len(self))[rows]
        if self._cached is not None:
            self._write_cache()
            whole = len(self._paths), *self._image_shape
            return read_rows(self._cached, whole, self.dtype, self.rows[rows])
        images = np.empty((len(rows), *self._image_shape), self.dtype)
        for k, image in enumerate(self.stream(rows)):
            if image.shape != self._image_shape:
                raise ValueError(
                    f"X announces images of shape {self._image_shape}, but "
                    f"row {rows[k]} ({self.path_of(rows[k])!r}) has shape {image.shape}."
                )
            images[k] = image
        return images

    def stream(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Read images one after another, while the next ones are decoded.

        Parameters
        ----------
        rows : ndarray of int
            Which of the images.
        """
        files, step = self.rows[rows].tolist(), self._at_once
        parts = (files[start : start + step] for start in range(0, len(files), step))
        n_ahead = max(1, min(2 * _n_threads(), AHEAD // (step * self._n_bytes)))
        under_way: deque[list[_Begun]] = deque(map(self._begin, islice(parts, n_ahead)))
        row = iter(rows)
        while under_way:
            for future, place in under_way.popleft():
                image, here = future.result()[place], next(row)
                if isinstance(image, Exception):
                    text = f"Row {here} of X could not be read: {image}"
                    raise type(image)(text) from None
                yield image
            under_way.extend(map(self._begin, islice(parts, 1)))

    def expect(self, rows: np.ndarray) -> None:
        """Begin to decode images that will be read next.

        Parameters
        ----------
        rows : ndarray of int
            Which of the images.
        """
        if self._cached is None:
            files, step = self.rows[rows].tolist(), self._at_once
            del files[AHEAD // self._n_bytes :]
            coming: dict[int, _Begun] = {}
            for start in range(0, len(files), step):
                part = files[start : start + step]
                coming.update(zip(part, self._begin(part), strict=True))
            self._memory.coming = os.getpid(), coming

    @property
    def _at_once(self) -> int:
        """Files that a thread takes: of small ones several, or threads wait for each other."""
        most = 16 if self._slices is None else 64
        return max(1, min(most, 2**20 // self._n_bytes))

    def _begin(self, files: list[int]) -> list[_Begun]:
        """Have a thread decode files, unless one does so already."""
        process, coming = self._memory.coming
        if process != os.getpid():  # a forked process has no such threads
            coming = {}
        begun = {file: coming.pop(file) for file in set(files) if file in coming}
        if new := [file for file in dict.fromkeys(files) if file not in begun]:
            future = _pool(os.getpid()).submit(self._decoded, new)
            begun.update({file: (future, place) for place, file in enumerate(new)})
        return [begun[file] for file in files]

    def _decoded(self, files: list[int]) -> list[np.ndarray | Exception]:
        """Images, or what is wrong with a file."""
        found: list[np.ndarray | Exception] = []
        ready: dict[int, np.ndarray] = {}  # slices of a volume that is wanted several times
        for file in files:
            try:
                if self._slices is not None and file not in ready:
                    ready = self._beside(file, files)
                image = ready[file] if file in ready else self._decode(file)
            except (ValueError, ImportError) as error:
                found.append(error)
            else:
                found.append(image)
        return found

    def _decode(self, file: int) -> np.ndarray:
        held = self._memory.images.get(file)
        if held is not None:
            return held
        k = None if self._slices is None else self._slices[file]
        image = read_file(self._paths[file], self._reading, self.dtype, k)
        if self._cached is None:
            self._memory.keep(file, image)
        return image

    def _beside(self, file: int, files: list[int]) -> dict[int, np.ndarray]:
        """All slices of a volume, if it is worth while: several are wanted, or all can be held."""
        assert self._slices is not None
        if file in self._memory.images:
            return {}
        first = file - self._slices[file]
        number = int(self._files[file])
        n = int(np.searchsorted(self._files, number, "right")) - first
        room = self._cached is None and self._memory.n_bytes + n * self._n_bytes <= HELD
        if n == 1 or not (room or sum(first <= other < first + n for other in files) > 1):
            return {}
        images = read_slices(self._paths[file], self._reading, self.dtype)
        if room:
            for k, image in enumerate(images):
                self._memory.keep(first + k, image)
        return dict(enumerate(images, start=first))

    def _read(self, row: int) -> np.ndarray:
        if self._cached is not None:
            self._write_cache()
            whole = len(self._paths), *self._image_shape
            return read_rows(self._cached, whole, self.dtype, np.array([row]))[0]
        return np.array(self._decode(row))

    def _write_cache(self) -> None:
        assert self._cached is not None
        if self._cached.exists():
            return
        if self._digest() != self._version:
            raise ValueError("Files have changed since X was made: make a new ImageFiles of them.")
        every = ImageFiles.__new__(ImageFiles)
        every.__dict__.update(vars(self), rows=np.arange(len(self._paths)))
        write_once(self._cached, every.shape, self.dtype, every.stream(every.rows))

    def _digest(self) -> str:
        """Digest of what decides the pixels of all files."""
        digest = hashlib.blake2b(repr(("1", self._reading)).encode(), digest_size=16)
        for path in self._paths:
            status = os.stat(path)  # noqa: PTH116
            known = os.path.abspath(path), status.st_size, status.st_mtime_ns  # noqa: PTH100
            digest.update(repr(known).encode())
        return digest.hexdigest()


_Begun = tuple[Any, int]  # a Future of several images, and the place of one in it


class _Memory:
    """Decoded images of a process, by the number of the file; no other process gets them."""

    def __init__(self) -> None:
        self.images: dict[int, np.ndarray] = {}
        self.n_bytes = 0
        self.coming: tuple[int, dict[int, _Begun]] = os.getpid(), {}  # what a process expects

    def __reduce__(self) -> Any:
        return _Memory, ()

    def keep(self, file: int, image: np.ndarray) -> None:
        """Hold an image as long as there is room: in random order no rule does better."""
        if self.n_bytes + image.nbytes <= HELD and file not in self.images:
            self.n_bytes += image.nbytes
            self.images[file] = image


def _n_threads() -> int:
    return max(1, min(torch.get_num_threads(), 16))


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:  # noqa: ARG001
    """Threads that decode; a forked process needs its own."""
    return ThreadPoolExecutor(_n_threads(), thread_name_prefix="sklearn_medimb-files")


def broken_files(
    paths: Sequence[str],
    *,
    mode: str = "auto",
    image_size: Any = None,
    window: Any = None,
    spacing: Any = None,
    frames: Any = "all",
) -> dict[int, str]:
    """Decode files, and say for those that cannot be what is wrong with them.

    Parameters
    ----------
    paths : sequence of str
        The files.
    mode, image_size, window, spacing, frames
        As in :class:`ImageFiles`.
    """
    reading = as_reading(mode, image_size, window, spacing, frames)

    def look(path: str) -> str | None:
        try:
            read_header(path, reading)
            with opened(path, reading) as (_, pixels):
                pixels()
        except ValueError as error:
            return str(error)
        return None

    found = enumerate(_pool(os.getpid()).map(look, paths))
    return {row: why for row, why in found if why is not None}


def path_list(paths: Any) -> list[str]:
    """Paths as they are, as strings.

    Raises
    ------
    TypeError
        If an entry is no path.
    ValueError
        If there is none.
    """
    entries = [paths] if is_path(paths) else as_list(one_column(paths))
    entries = list(entries)
    if not entries:
        raise ValueError(
            "Found array with 0 sample(s) while a minimum of 1 is required: there are no paths."
        )
    for row, entry in enumerate(entries):
        if not is_path(entry) or not os.fspath(entry):
            raise TypeError(f"Row {row} of X must be the path of a file, not {entry!r}.")
    return [os.fsdecode(entry) for entry in entries]


def holds_paths(X: Any) -> bool:
    """Whether X is a list, an array or a column of paths."""
    if isinstance(X, np.ndarray) and X.dtype.kind == "U" and X.ndim == 1:
        return len(X) > 0
    X = as_list(X)
    return isinstance(X, (list, tuple)) and len(X) > 0 and is_path(X[0])


def wrap_dataset(X: Any, options: dict[str, Any] | None = None) -> Any:
    """Turn a data set, or paths, into a lazy sequence; leave everything else.

    Parameters
    ----------
    X : object
        What the caller passed. A data set is one of torch, or of Hugging Face's ``datasets``.
    options : dict, default=None
        How files are read.
    """
    if holds_paths(X):
        return ImageFiles(X, **(options or {}))
    is_sequence = all(hasattr(X, name) for name in ("shape", "ndim", "dtype"))
    has_columns = all(hasattr(X, name) for name in ("column_names", "features", "with_format"))
    is_dataset = isinstance(X, Dataset) or has_columns
    return DatasetImages(X) if is_dataset and not is_sequence else X
