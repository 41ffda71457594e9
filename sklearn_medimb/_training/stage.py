"""Courses of training, and what is trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from skorch.callbacks import Callback
from torch import nn

from sklearn_medimb._data.cached import CachedImages
from sklearn_medimb._data.images import Images
from sklearn_medimb._training.criterion import Criterion


@dataclass(frozen=True)
class Stage:
    """One course of training: what is minimised, on which batches, for how long.

    `weight_decay` takes the place of the estimator's. The backbone learns at ``backbone_lr * lr``,
    each of its stages at `layer_decay` times the rate of the next. With `ema` the running mean of
    the weights is kept. `forward` takes the place of the network's own forward pass: (network,
    batch) to its output. `optimizer` holds skorch's parameters of another optimiser than the
    estimator's. Where `validated` is False no validation score decides on the stage's epochs. Where
    `on_encoded` the trunk is frozen and batches hold what it made of images. `before` is called
    when the stage begins, `after` when it has ended.
    """

    criterion: Criterion
    batches: Iterable[Any]
    n_epochs: int
    steps_per_epoch: int
    lr: float
    lr_schedule: str
    weight_decay: float | None = None
    backbone_lr: float = 1.0
    layer_decay: float = 1.0
    ema: float | None = None
    name: str = ""
    callbacks: tuple[Callback, ...] = ()
    forward: Callable[[nn.Module, Any], Any] | None = None
    optimizer: dict[str, Any] | None = None
    validated: bool = True
    on_encoded: bool = False
    before: Callable[[], None] | None = None
    after: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.criterion, Criterion):
            raise TypeError(
                f"A stage minimises a sklearn_medimb.base.Criterion, not a "
                f"{type(self.criterion).__name__}: let its class inherit from it."
            )


@dataclass
class TrainingSet:
    """Validated training data: row numbers into `images`, with one class and weight per row.

    Class -1 means: no label. `origin` has their row numbers among the caller's images, -1 for those
    that a sampler made; None where these are `rows`. `natural` is the set as it was before the
    sampler, `unlabelled` further rows that have no class, `unlabelled_groups` their patients.
    """

    images: Images
    rows: np.ndarray
    y: np.ndarray
    weight: np.ndarray | None = None
    origin: np.ndarray | None = None
    natural: TrainingSet | None = None
    unlabelled: np.ndarray | None = None
    unlabelled_groups: np.ndarray | None = None

    @property
    def all_rows(self) -> np.ndarray:
        """Rows with and without a label."""
        return self.rows if self.unlabelled is None else np.r_[self.rows, self.unlabelled]

    def forget(self) -> None:
        """Let go of what a backbone made of the images."""
        for part in (self, self.natural):
            if part is not None and isinstance(part.images, CachedImages):
                part.images.forget()

    def class_mass(self, n_classes: int) -> np.ndarray:
        """Summed weight of each class, shape (n_classes,).

        A class that this portion lacks, which only partial_fit and warm starts allow, counts as
        one sample: no prior, weight or margin may become infinite.
        """
        mass = np.bincount(self.y, self.weight, minlength=n_classes).astype(np.float64)
        return np.where(mass > 0, mass, 1.0)

    def label_mass(self, n_classes: int) -> np.ndarray:
        """One-hot label of each row times its weight, shape (n, n_classes)."""
        mass = np.eye(n_classes)[self.y]
        return mass if self.weight is None else mass * self.weight[:, None]

    def without_labels(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows for label-free training, with and without labels, and their classes, else -1."""
        natural = self if self.natural is None else self.natural
        y = np.full(len(natural.all_rows), -1)
        y[: len(natural.y)] = natural.y
        return natural.all_rows, y
