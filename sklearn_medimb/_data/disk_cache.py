"""Decoded images in one file on disk: built once, read by every process."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from sklearn_medimb._machine.runtime import replacing


def write_once(
    path: Path, shape: tuple[int, ...], dtype: np.dtype, images: Iterable[np.ndarray]
) -> None:
    """Write an array to a ``.npy`` file, image by image, unless it is there.

    Of several processes one writes and the others wait. A crash leaves nothing of it.

    Parameters
    ----------
    path : Path
        The file.
    shape : tuple of int
        Of all images together.
    dtype : numpy dtype
        Of them.
    images : iterable of ndarray
        Asked for one after another, and only by the process that writes.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if path.exists():
            return
        header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        with replacing(path) as draft, draft.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for image in images:
                file.write(np.ascontiguousarray(image).data)


def read_rows(path: Path, shape: tuple[int, ...], dtype: np.dtype, rows: np.ndarray) -> np.ndarray:
    """Read images of a file that `write_once` wrote.

    Read and not mapped: the pages are the system's, which all processes share, and none of them
    holds the file as its own memory.

    Parameters
    ----------
    path : Path
        The file.
    shape, dtype
        Of all images together.
    rows : ndarray of int
        Which of them.

    Returns
    -------
    images : ndarray of shape (len(rows), ...)
        In memory.

    Raises
    ------
    ValueError
        If the file is shorter than it was.
    """
    images = np.empty((len(rows), *shape[1:]), dtype)
    flat: Any = memoryview(images.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    n_bytes = images[:1].nbytes
    with path.open("rb", buffering=0) as file:
        start = file.seek(0, 2) - shape[0] * n_bytes
        for k, row in enumerate(rows.tolist()):
            file.seek(start + row * n_bytes)
            if start < 0 or file.readinto(flat[k * n_bytes : (k + 1) * n_bytes]) != n_bytes:
                raise ValueError(f"{str(path)!r} is cut off: remove it, to have it made anew.")
    return images
