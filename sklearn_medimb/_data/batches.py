"""From plans to tensors on the device."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


class BatchSource(ABC):
    """Batches of a training epoch, in two halves.

    What is chosen for a step, on the host, is its order: tensors on the device, and constants, in
    dicts and tuples. What is made of an order, on the device, is its batch. The second half depends
    on nothing but the order and what lies on the device, and never waits: a GPU can replay it.
    """

    generator: torch.Generator

    @abstractmethod
    def orders(self) -> Iterator[Any]:
        """Give the order of each step of one more epoch."""

    @abstractmethod
    def make(self, order: Any) -> tuple[Any, torch.Tensor]:
        """Make the batch that an order asks for."""

    def __iter__(self) -> Iterator[tuple[Any, torch.Tensor]]:
        return map(self.make, self.orders())


class Batches(BatchSource):
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
        self.encoded = isinstance(images, CachedImages)
        self.resident = self._resident_copy()

    def _resident_copy(self) -> torch.Tensor | None:
        """All training rows on the accelerator, in their stored dtype, where they fit."""
        device = self.preprocess.device
        if device.type != "cuda" or not self.images.in_blocks or self.encoded:
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

    def orders(self) -> Iterator[dict[str, Any]]:
        """Rows of each step, and what each view does to them."""
        plan = list(self.plan(self.rng))
        for order, views in zip(self.gathered(plan), self.drawn(plan), strict=True):
            yield order | {"views": views}

    def make(self, order: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Make normalised images, each view stacked along the first axis, and their targets."""
        images, targets = self.taken(order)
        views = [
            self.moved(images, augmentation, params)
            for augmentation, params in zip(self.views, order["views"], strict=True)
        ]
        stacked = views[0] if len(views) == 1 else torch.cat(views)
        return self.preprocess.normalise(stacked), targets

    def gathered(self, plan: Sequence[np.ndarray]) -> Iterator[dict[str, torch.Tensor]]:
        """Say for each step where its images are, and read those that are not on the device."""
        for k, picks in enumerate(plan):
            order = {"index": self.upload(picks)}
            if isinstance(self.images, CachedImages):
                order["places"] = self.images.places(self.rows[picks])
            elif self.resident is None:
                # Items of a data set, which the caller's own code makes, may be drawn anew.
                with redirected(self.images.lazy):
                    pixels = self.images.rows(self.rows[picks])
                order["pixels"] = self.preprocess.upload(pixels)
                if k + 1 < len(plan):  # files are decoded during a step
                    self.images.expect(self.rows[plan[k + 1]])
            yield order

    def upload(self, numbers: np.ndarray) -> torch.Tensor:
        """Send numbers to the device."""
        return self.preprocess.upload(torch.from_numpy(numbers))

    def taken(self, order: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images of an order on the unit scale and their targets.

        What a network has encoded comes as places: each view looks there for itself.
        """
        index = order["index"]
        targets = self.targets[index]
        if "places" in order:
            return order["places"], targets
        pixels = order["pixels"] if self.resident is None else self.resident[index]
        return to_unit_scale(pixels, self.preprocess.dtype), targets

    def drawn(self, plan: Sequence[np.ndarray]) -> Iterator[list[Any]]:
        """What each view will do to the images of each step, drawn ahead for the whole epoch.

        What is drawn in the step itself, fields of noise and whatever an augmentation of the
        caller's own draws, has the settings of the augmentation in its place.
        """
        sizes = [len(picks) for picks in plan]
        columns = [self._drawn(sizes, augmentation) for augmentation in self.views]
        return map(list, zip(*columns, strict=True))

    def _drawn(self, sizes: list[int], augmentation: Any) -> Sequence[Any]:
        if self._stays(augmentation):
            return [{}] * len(sizes)
        if not (self.encoded or getattr(augmentation, "is_compact", False)):
            return [repr(augmentation)] * len(sizes)
        params = self._draw(sum(sizes), augmentation)
        parts = {name: values.split(sizes) for name, values in params.items()}
        return [{name: parts[name][k] for name in parts} for k in range(len(sizes))]

    def _stays(self, augmentation: Any) -> bool:
        """Whether images stay as they are; vectors do."""
        still = getattr(augmentation, "is_identity", False)
        return not self.encoded and (still or len(self.images.image_shape) < 3)

    def _draw(self, n: int, augmentation: Any) -> dict[str, torch.Tensor]:
        """What `augmentation` will do to so many images."""
        if isinstance(self.images, CachedImages):  # they have their own views
            n_views = 1 if getattr(augmentation, "is_identity", False) else self.images.n_views
            how: dict[str, Any] = {"generator": self.generator, "device": self.generator.device}
            return {"view": torch.randint(n_views, (n,), **how)}
        # Of the caller's own augmentations, draw and apply are asked.
        with redirected(not isinstance(augmentation, Augmentation)):
            return augmentation.draw(n, self.images.image_shape, self.generator)

    def in_step(
        self, images: torch.Tensor, augmentation: Any, params: dict[str, torch.Tensor] | str
    ) -> dict[str, torch.Tensor]:
        """What was drawn for images of a step, or is drawn now."""
        return self._draw(len(images), augmentation) if isinstance(params, str) else params

    def moved(
        self, images: torch.Tensor, augmentation: Any, params: dict[str, torch.Tensor] | str
    ) -> torch.Tensor:
        """Images as `augmentation` changes them, by what was drawn."""
        if self._stays(augmentation):
            return images
        params = self.in_step(images, augmentation, params)
        if isinstance(self.images, CachedImages):
            return self.images.views[images, params["view"]]
        with redirected(not isinstance(augmentation, Augmentation)):
            return augmentation.apply(images, params)
