"""From plans to tensors on the device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

from sklearn_medimb._data.cached import CachedImages
from sklearn_medimb._data.images import Images
from sklearn_medimb._data.pixel_scale import to_unit_scale
from sklearn_medimb._data.plans import Plan
from sklearn_medimb._machine.randomness import redirected
from sklearn_medimb.augment import Augmentation


def image_format(n_axes: int, channels_last: bool) -> torch.memory_format:
    """Memory format of tensors with so many axes; only (n, C, *spatial) can be channels-last."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d} if channels_last else {}
    return last.get(n_axes, torch.contiguous_format)


class Preprocessor:
    """uint8 or float rows to normalised, optionally augmented, device batches.

    Parameters
    ----------
    mean, std : ndarray of shape (C,)
        The fitted channel statistics.
    dtype : torch.dtype
        float32 or float64.
    device : torch.device
        Where the batches go.
    channels_last : bool
        Memory format of image batches.
    """

    def __init__(
        self,
        mean: np.ndarray,
        std: np.ndarray,
        *,
        dtype: torch.dtype,
        device: torch.device,
        channels_last: bool = False,
    ) -> None:
        self.mean = torch.as_tensor(mean, dtype=dtype, device=device)
        self.std = torch.as_tensor(std, dtype=dtype, device=device)
        self.dtype = dtype
        self.device = device
        self.channels_last = channels_last

    def upload(self, rows: torch.Tensor) -> torch.Tensor:
        """Send rows to the device in their own dtype: uint8 is a quarter of the traffic."""
        if self.device.type == "cuda":
            return rows.pin_memory().to(self.device, non_blocking=True)
        return rows.to(self.device)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Apply ``(x - mean) / std`` per channel."""
        per_channel = (1, -1, *[1] * (images.ndim - 2))
        images = images.sub(self.mean.view(per_channel)).div_(self.std.view(per_channel))
        return images.contiguous(memory_format=image_format(images.ndim, self.channels_last))

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Whole path without augmentation, as used at predict."""
        return self.normalise(to_unit_scale(self.upload(rows), self.dtype))


class Untouched(Preprocessor):
    """For what a network has encoded already."""

    def __init__(self, like: Preprocessor) -> None:
        self.__dict__.update(vars(like))

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Leave it as it is."""
        return images

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Leave it where it is."""
        return rows


@dataclass(frozen=True)
class Context:
    """What all batches of a fit have in common.

    Attributes
    ----------
    preprocess : Preprocessor
        Normalisation and device.
    views : tuple of Augmentation
        Each gives one copy of a batch, all stacked along the first axis.
    rng : numpy.random.Generator
        For the plans.
    generator : torch.Generator
        For the augmentation, on the device.
    """

    preprocess: Preprocessor
    views: tuple[Any, ...]
    rng: np.random.Generator
    generator: torch.Generator


class Batches:
    """One training epoch per iteration: pairs ``(images, targets)`` on the device.

    Parameters
    ----------
    images : Images
        All images of the caller.
    rows : ndarray of int
        The training rows among them; plans count within `rows`.
    targets : tensor
        One target per training row, on the device.
    plan : callable
        ``plan(rng)`` gives the epoch's index arrays.
    context : Context
        How they become tensors.
    """

    # One resident copy on an accelerator may take this share of its free memory.
    resident_share = 0.5

    def __init__(
        self,
        images: Images,
        rows: np.ndarray,
        targets: torch.Tensor,
        plan: Plan,
        context: Context,
    ) -> None:
        self.images = images
        self.rows = rows
        self.targets = targets
        self.plan = plan
        self.preprocess = context.preprocess
        self.views = context.views
        self.rng = context.rng
        self.generator = context.generator
        self.resident = self._resident_copy()

    def _resident_copy(self) -> torch.Tensor | None:
        """All training rows on the accelerator, in their stored dtype, where they fit."""
        device = self.preprocess.device
        encoded = isinstance(self.images, CachedImages)
        if device.type != "cuda" or not self.images.in_blocks or encoded:
            return None
        n_bytes = (
            len(self.rows) * int(np.prod(self.images.image_shape)) * self.images.dtype.itemsize
        )
        free, _ = torch.cuda.mem_get_info(device)
        if n_bytes > self.resident_share * free:
            return None
        resident, done = None, 0
        for part in np.array_split(self.rows, max(1, n_bytes // 2**26)):
            block = self.images.rows(part)
            if resident is None:
                resident = torch.empty(
                    (len(self.rows), *block.shape[1:]), dtype=block.dtype, device=device
                )
            resident[done : done + len(block)] = block.to(device)
            done += len(block)
        return resident

    def with_plan(self, plan: Plan) -> Batches:
        """Batches of the same images by another plan; nothing is copied."""
        other = copy.copy(self)
        other.plan = plan
        return other

    def with_views(self, *views: Augmentation) -> Batches:
        """Batches of the same images by the same plan in other views."""
        other = copy.copy(self)
        other.views = views
        return other

    def gather(self, picks: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Images of some training rows on the unit scale, and their targets, on the device."""
        index = self.preprocess.upload(torch.from_numpy(picks))
        if isinstance(self.images, CachedImages):
            return self.images.in_every_view(self.rows[picks]), self.targets[index]
        if self.resident is not None:
            raw = self.resident[index]
        else:
            # Items of a data set, which the caller's own code makes, may be drawn anew each time.
            with redirected(self.images.lazy):
                raw = self.images.rows(self.rows[picks])
            raw = self.preprocess.upload(raw)
        return to_unit_scale(raw, self.preprocess.dtype), self.targets[index]

    def planned(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Training rows of each step of an epoch, and those of the one that follows."""
        plan = list(self.plan(self.rng))
        return zip_longest(plan, plan[1:])

    def expect(self, picks: np.ndarray | None) -> None:
        """Say which training rows will be gathered next: files are decoded during a step."""
        if (
            picks is not None
            and self.resident is None
            and not isinstance(self.images, CachedImages)
        ):
            self.images.expect(self.rows[picks])

    def draw(self, images: torch.Tensor, augmentation: Augmentation) -> dict[str, Any] | None:
        """What `augmentation` will do to images; None where they stay as they are."""
        # Vectors are not augmented. Of the caller's own augmentations, draw and apply are asked.
        still = getattr(augmentation, "is_identity", False)
        if isinstance(self.images, CachedImages):
            n_views = 1 if still else self.images.n_views
            how: dict[str, Any] = {"generator": self.generator, "device": self.generator.device}
            return {"view": torch.randint(n_views, (len(images),), **how)}
        if images.ndim < 4 or still:
            return None
        with redirected(not isinstance(augmentation, Augmentation)):
            return augmentation.draw(len(images), tuple(images.shape[1:]), self.generator)

    def view(self, images: torch.Tensor, augmentation: Augmentation) -> torch.Tensor:
        """One augmented copy of images, still on the unit scale."""
        return self.moved(images, augmentation, self.draw(images, augmentation))

    def moved(
        self, images: torch.Tensor, augmentation: Augmentation, params: dict[str, Any] | None
    ) -> torch.Tensor:
        """Images as `augmentation` changes them, by what was drawn."""
        if params is None:
            return images
        if isinstance(self.images, CachedImages):
            index = torch.arange(len(images), device=images.device)
            return images[index, params["view"].to(images.device)]
        with redirected(not isinstance(augmentation, Augmentation)):
            return augmentation.apply(images, params)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for picks, following in self.planned():
            images, targets = self.gather(picks)
            self.expect(following)
            views = [self.view(images, augmentation) for augmentation in self.views]
            stacked = views[0] if len(views) == 1 else torch.cat(views)
            yield self.preprocess.normalise(stacked), targets
