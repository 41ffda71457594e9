"""Views of images for label-free training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sklearn_medimb._data.batches import Batches, BatchSource

# ---------------------------------------------------------------- views


@dataclass
class Views:
    """Which views a step needs: pairs (image, augmentation) for the online and the target branch.

    Image 0 is the anchor; 1, where it occurs, is a partner drawn uniformly, with replacement and
    without regard to labels, from all training images.
    """

    online: list[tuple[int, Any]]
    target: list[tuple[int, Any]]

    @property
    def n_images(self) -> int:
        """Images that meet in one view set."""
        return 1 + max(image for image, _ in self.online + self.target)


class ViewBatches(BatchSource):
    """Batches of views: per step B anchors, each view stacked along the first axis.

    Images are augmented; of feature vectors a share of the entries is taken from other rows [1]_.

    References
    ----------
    .. [1] D. Bahri et al., "SCARF: self-supervised contrastive learning using random feature
       corruption", ICLR 2022.
    """

    corrupted = 0.3

    def __init__(self, batches: Batches, views: Views) -> None:
        self.batches = batches
        self.views = views
        self.generator = batches.generator

    def orders(self) -> Iterator[dict[str, Any]]:
        """Anchors and partners of each step, and what each view does to them."""
        batches, n = self.batches, len(self.batches.rows)
        anchors = list(batches.plan(batches.rng))
        sizes = [(self.views.n_images - 1, len(picks)) for picks in anchors]
        others = [batches.rng.integers(n, size=size).ravel() for size in sizes]
        plan = [np.concatenate(pair) for pair in zip(anchors, others, strict=True)]
        branches = {name: views for name, views in vars(self.views).items() if views}
        drawn = {
            name: batches.with_views(*(how for _, how in views)).drawn(anchors)
            for name, views in branches.items()
        }
        for order in batches.gathered(plan):
            yield order | {name: next(drawn[name]) for name in branches}

    def make(self, order: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Make the views of both branches."""
        batches = self.batches
        images, targets = batches.taken(order)
        parts = images.chunk(self.views.n_images)
        branches = {
            name: batches.preprocess.normalise(
                torch.cat(
                    [
                        self._view(parts[image], how, params)
                        for (image, how), params in zip(views, order[name], strict=True)
                    ]
                )
            )
            for name, views in vars(self.views).items()
            if views
        }
        return branches, targets[: len(parts[0])]

    def _view(self, images: torch.Tensor, augmentation: Any, params: Any) -> torch.Tensor:
        if len(self.batches.images.image_shape) > 1 or getattr(augmentation, "is_identity", False):
            return self.batches.moved(images, augmentation, params)
        draw: dict[str, Any] = {"generator": self.generator, "device": images.device}
        other = images[torch.randperm(len(images), **draw)]
        return torch.where(torch.rand(images.shape, **draw) < self.corrupted, other, images)
