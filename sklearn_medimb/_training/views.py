"""Views of images for label-free training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sklearn_medimb._data.batches import Batches

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


class ViewBatches:
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

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        batches, n = self.batches, len(self.batches.rows)
        n_partners = self.views.n_images - 1
        for anchors, following in batches.planned():
            size = (n_partners, len(anchors))
            picks = np.concatenate([anchors, batches.rng.integers(n, size=size).ravel()])
            images, targets = batches.gather(picks)
            batches.expect(following)
            parts = images.chunk(1 + n_partners)
            branches = {
                name: batches.preprocess.normalise(
                    torch.cat([self._view(parts[image], how) for image, how in views])
                )
                for name, views in vars(self.views).items()
                if views
            }
            yield branches, targets[: len(anchors)]

    def _view(self, images: torch.Tensor, augmentation: Any) -> torch.Tensor:
        if images.ndim > 2 or getattr(augmentation, "is_identity", False):
            return self.batches.view(images, augmentation)
        draw: dict[str, Any] = {"generator": self.batches.generator, "device": images.device}
        other = images[torch.randperm(len(images), **draw)]
        return torch.where(torch.rand(images.shape, **draw) < self.corrupted, other, images)
