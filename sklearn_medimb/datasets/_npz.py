"""Read MedMNIST-style archives."""

from __future__ import annotations

import os
import zipfile
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.utils import Bunch

SPLITS = ("train", "val", "test")


def load_npz(
    path: str | os.PathLike[str], split: str = "all", *, image_size: int | None = None
) -> Bunch:
    """Load a MedMNIST-style ``.npz`` file.

    Understood are the keys of MedMNIST (``train_images``, ``train_labels``, ``val_...``,
    ``test_...``) [1]_ and of archives without splits (``images``, ``labels``), with optional
    ``class_names`` and ``groups``. Nothing in the file is executed.

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
        str, ``groups`` (n,) or None, ``split`` (n,) of str or None.

    Raises
    ------
    ValueError
        If the file is no such archive, holds no such split, or its images are smaller than
        `image_size`.

    References
    ----------
    .. [1] J. Yang et al., "MedMNIST v2", Scientific Data, 2023.
    """
    if split not in ("all", *SPLITS):
        raise ValueError(f'split={split!r} must be "all", "train", "val" or "test".')
    try:
        archive = np.load(path, allow_pickle=False)
        arrays = {name: archive[name] for name in archive.files}
    except (ValueError, zipfile.BadZipFile, AttributeError, EOFError) as error:
        raise ValueError(f"path={str(path)!r} is no .npz archive of plain arrays.") from error

    if "images" in arrays and "labels" in arrays:
        if split != "all":
            raise ValueError(f'{str(path)!r} has no splits: use split="all" and split it yourself.')
        parts = {"": arrays["images"]}
    else:
        wanted = SPLITS if split == "all" else (split,)
        parts = {f"{name}_": arrays.get(f"{name}_images") for name in wanted}
        parts = {name: part for name, part in parts.items() if part is not None}
        if not parts:
            raise ValueError(
                f"{str(path)!r} holds neither images and labels nor those of split={split!r}; its "
                f"arrays are {sorted(arrays)}."
            )

    def join(what: str) -> np.ndarray | None:
        found = [arrays.get(name + what) for name in parts]
        return None if any(part is None for part in found) else np.concatenate(found)

    images, target = join("images"), join("labels")
    if target is None:
        raise ValueError(f"{str(path)!r} holds images without labels.")
    target = target.reshape(len(target), -1)
    if target.shape[1] != 1:
        raise ValueError(
            f"{str(path)!r} has {target.shape[1]} labels per image; one class each is needed."
        )
    target = target[:, 0].astype(np.int64)
    names = arrays.get("class_names", np.arange(target.max() + 1).astype(str))
    lengths = [len(part) for part in parts.values()]
    return Bunch(
        images=images if image_size is None else _reduce(images, image_size),
        target=target,
        target_names=np.asarray(names).astype(str),
        groups=join("groups"),
        split=None if "" in parts else np.repeat([name[:-1] for name in parts], lengths),
    )


def _reduce(images: np.ndarray, size: int, block: int = 256) -> np.ndarray:
    """Average areas down to `size` pixels a side; channels, if any, come last."""
    colour = images.ndim > 3 and images.shape[-1] in (1, 3, 4)
    sides = images.shape[1:-1] if colour else images.shape[1:]
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
