"""Read MedMNIST-style archives."""

from __future__ import annotations

import math
import os
import zipfile
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.utils import Bunch

from sklearn_medimb._data.pixel_scale import FOLD, on_one_scale, scale_of

SPLITS = ("train", "val", "test")
# Images shrink to a tenth at most, blank ones to a thousandth; what is larger and shrinks more than
# that is there to fill the memory.
_MAX_RATIO, _MAX_BYTES = 200, 2**28
_MAX_CLASSES = 2**16


def load_npz(
    path: str | os.PathLike[str], split: str = "all", *, image_size: int | None = None
) -> Bunch:
    """Load a MedMNIST-style ``.npz`` file.

    Understood are the keys of MedMNIST (``train_images``, ``train_labels``, ``val_...``,
    ``test_...``) [1]_ and of archives without splits (``images``, ``labels``), with optional
    ``class_names`` and ``groups``. Nothing in the file is executed, and arrays of other names or
    splits are not read.

    Parameters
    ----------
    path : path-like
        The file.
    split : {"all", "train", "val", "test"}, default="all"
        Which part to load; "all" joins the parts that are there.
    image_size : int, default=None
        Reduce every side of the images to this many pixels by averaging areas.

    Returns
    -------
    data : :class:`~sklearn.utils.Bunch`
        ``images`` (n, ...) in their own dtype, ``target`` (n,) of int, ``target_names`` (K,) of
        str, ``groups`` (n,) or None, ``split`` (n,) of str or None. A split of uint8 beside one of
        floats in [0, 1] becomes such floats.

    Raises
    ------
    ValueError
        If the file is no such archive, holds no such split, its arrays do not fit together or
        would grow more than 200-fold beyond 256 MB, or its images are smaller than `image_size`;
        also if splits that are to be joined differ in the scale of their pixels, or only some have
        groups.

    References
    ----------
    .. [1] J. Yang et al., "MedMNIST v2", Scientific Data, 2023.
    """
    if split not in ("all", *SPLITS):
        raise ValueError(f'split={split!r} must be "all", "train", "val" or "test".')
    is_whole = isinstance(image_size, Integral) and not isinstance(image_size, bool)
    if image_size is not None and not (is_whole and image_size > 0):
        raise ValueError(f"image_size={image_size!r} must be a whole number above 0, or None.")
    arrays = _read(Path(path), split)
    parts = {k.removesuffix("images"): v for k, v in arrays.items() if k.endswith("images")}
    for name, part in parts.items():
        if part.ndim < 2 or part.dtype.kind not in "buif":
            raise ValueError(
                f"{str(path)!r} holds {name}images of shape {part.shape} and dtype {part.dtype}: "
                "they are no images."
            )
    lengths = [len(part) for part in parts.values()]
    if not sum(lengths):
        raise ValueError(f"{str(path)!r} holds 0 images.")
    shapes = {f"{name}images": part.shape[1:] for name, part in parts.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"{str(path)!r} holds images of different shapes, {shapes}: load one split at a time."
        )

    def join(what: str) -> np.ndarray | None:
        names = [name + what for name in parts]
        lacking = [name for name in names if name not in arrays]
        if lacking and (what == "labels" or len(lacking) == len(names)):
            return None
        if lacking:
            raise ValueError(
                f"{str(path)!r} holds {sorted(set(names) - set(lacking))}, but not {lacking}: load "
                "one split at a time."
            )
        for name, length in zip(names, lengths, strict=True):
            if arrays[name].shape[:1] != (length,):
                raise ValueError(
                    f"{str(path)!r} holds {length} images, but {name} of shape "
                    f"{arrays[name].shape}."
                )
        return np.concatenate([arrays[name] for name in names])

    labels = join("labels")
    if labels is None:
        raise ValueError(f"{str(path)!r} holds images without labels.")
    labels = labels.reshape(len(labels), -1)
    if labels.shape[1] != 1:
        raise ValueError(
            f"{str(path)!r} has {labels.shape[1]} labels per image; one class each is needed."
        )
    target = _class_numbers(labels[:, 0])
    if target is None:
        raise ValueError(f"{str(path)!r} has labels that are not whole numbers from 0.")
    if target.max() >= _MAX_CLASSES:
        raise ValueError(f"{str(path)!r} has labels up to {target.max()}: count classes from 0.")
    names = arrays.get("class_names", np.arange(target.max() + 1).astype(str))
    if names.ndim != 1 or len(names) <= target.max():
        raise ValueError(
            f"{str(path)!r} has class_names of shape {names.shape}, but labels up to "
            f"{target.max()}."
        )
    images = _joined(path, parts)
    return Bunch(
        images=images if image_size is None else _reduce(images, image_size),
        target=target,
        target_names=names.astype(str),
        groups=join("groups"),
        split=None if "" in parts else np.repeat([name[:-1] for name in parts], lengths),
    )


def _joined(path: str | os.PathLike[str], parts: dict[str, np.ndarray]) -> np.ndarray:
    """Join the images of several splits on one scale of pixels."""
    dtypes = {part.dtype for part in parts.values()}
    if len(parts) == 1 or dtypes in ({np.dtype(np.uint8)}, {np.dtype(bool)}):
        return np.concatenate(list(parts.values()))
    described, heights = [], {}
    for name, part in parts.items():
        squares = [np.square(image, dtype=np.float64).mean() for image in part if image.size]
        peak = max(-float(part.min(initial=0)), float(part.max(initial=0)))
        described.append(f"{name}images of {part.dtype} up to {peak:g}")
        if squares and peak > 0:  # a blank split has no scale
            heights[name] = peak, float(np.sqrt(np.mean(squares)))
    apart = f"{str(path)!r} holds {', '.join(described)}: load one split at a time"
    if len({scale_of(dtype) for dtype in dtypes}) > 1:
        floats = [dtype for dtype in dtypes if dtype.kind == "f"]
        small = all(dtype.itemsize <= 4 for dtype in floats)
        try:
            images = [image for part in parts.values() for image in part]
            return np.stack(on_one_scale(images, float_dtype=np.float32 if small else np.float64))
        except ValueError as error:
            raise ValueError(f"{apart}, and bring them to one scale. ({error})") from error
    columns = list(zip(*heights.values(), strict=True))  # of peaks, and of levels
    if columns and all(max(column) > FOLD * min(column) for column in columns):
        raise ValueError(f"{apart}, and bring them to one scale.")
    return np.concatenate(list(parts.values()))


def _read(path: Path, split: str) -> dict[str, np.ndarray]:
    """Read the arrays that are needed, images first."""
    damage = f"path={str(path)!r} is no .npz archive of plain arrays"
    with path.open("rb") as file:
        try:
            archive = zipfile.ZipFile(file)
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            for member in members.values():
                archive.open(member).close()  # the directory and the members must agree
        except Exception as error:
            raise ValueError(f"{damage}.") from error
        if {"images", "labels"} <= members.keys():
            if split != "all":
                raise ValueError(
                    f'{str(path)!r} has no splits: use split="all" and split it yourself.'
                )
            prefixes = [""]
        else:
            wanted = SPLITS if split == "all" else (split,)
            prefixes = [f"{name}_" for name in wanted if f"{name}_images" in members]
        if not prefixes:
            raise ValueError(
                f"{str(path)!r} holds neither images and labels nor those of split={split!r}; its "
                f"arrays are {sorted(members)}."
            )
        names = [prefix + what for what in ("images", "labels", "groups") for prefix in prefixes]
        arrays = {}
        for name in [*names, "class_names"]:
            if name not in members:
                continue
            try:
                arrays[name] = _array(archive, members[name])
            except Exception as error:  # damage shows in zipfile, zlib or NumPy, each its own way
                raise ValueError(f"{damage}: {name} cannot be read ({error}).") from error
    return arrays


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """Read one array, after a check that it is as large as its header says."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        readers: Any = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, _, dtype = readers[version](file)
        n_bytes = member.file_size - file.tell()
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != n_bytes:
        raise ValueError(f"it has {n_bytes} bytes, which are not {shape} of {dtype}")
    if n_bytes > max(_MAX_BYTES, _MAX_RATIO * member.compress_size):
        raise ValueError(f"its {member.compress_size} bytes would become {n_bytes}")
    with archive.open(member) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _class_numbers(labels: np.ndarray) -> np.ndarray | None:
    """Return labels as integers, or None where some are not whole numbers from 0."""
    if labels.dtype.kind not in "buif":
        return None
    with np.errstate(invalid="ignore"):  # of NaN, which then differs from what it became
        numbers = labels.astype(np.int64)
    return numbers if ((numbers == labels) & (numbers >= 0)).all() else None


def _reduce(images: np.ndarray, size: int, block: int = 256) -> np.ndarray:
    """Average areas down to `size` pixels a side; channels, if any, come last."""
    colour = images.ndim > 3 and images.shape[-1] in (1, 3, 4)
    sides = images.shape[1:-1] if colour else images.shape[1:]
    if len(sides) not in (2, 3):
        raise ValueError(
            f"image_size={size} needs images of two or three axes, gray or with the channels last; "
            f"these have shape {images.shape[1:]}."
        )
    if min(sides) < size:
        raise ValueError(f"image_size={size} exceeds the images' own size, {sides}.")
    pool: Any = F.adaptive_avg_pool2d if len(sides) == 2 else F.adaptive_avg_pool3d
    reduced = []
    for start in range(0, len(images), block):
        part = torch.from_numpy(images[start : start + block]).float()
        part = part.movedim(-1, 1) if colour else part.unsqueeze(1)
        part = pool(part, size)
        reduced.append((part.movedim(1, -1) if colour else part[:, 0]).numpy())
    result = np.concatenate(reduced)
    return np.rint(result).astype(images.dtype) if images.dtype.kind in "ui" else result
