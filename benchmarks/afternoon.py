"""What a practitioner writes in an afternoon: a plain CNN and a training loop, nothing of ours.

Four 3 x 3 blocks of 32, 64, 128 and 256 channels with batch normalisation, ReLU and three poolings,
the mean, dropout of 0.2; flips on both axes; AdamW at 2e-3, weight decay 1e-3, one cycle, 40 epochs
of batches of 64, logit-adjusted cross-entropy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, ClassifierMixin
from torch import nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def network(n_channels: int, n_classes: int, dims: int, width: int) -> nn.Sequential:
    """Blocks, mean, dropout, linear layer."""
    convolution, norm, pool, mean = (
        (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d)
        if dims == 2
        else (nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d, nn.AdaptiveAvgPool3d)
    )
    layers: list[nn.Module] = []
    for i in range(4):
        n_out = width * 2**i
        layers += [convolution(n_channels, n_out, 3, padding=1), norm(n_out), nn.ReLU()]
        layers += [pool(2, ceil_mode=True)] if i < 3 else [mean(1), nn.Flatten()]
        n_channels = n_out
    return nn.Sequential(*layers, nn.Dropout(0.2), nn.Linear(n_channels, n_classes))


class AfternoonCNN(ClassifierMixin, BaseEstimator):
    """The plain network.

    Parameters
    ----------
    max_epochs : int, default=40
        Passes over the images.
    spatial_dims : int, default=2
        2, or 3 for volumes.
    random_state : int, default=0
        Seed of torch's default generators.
    """

    def __init__(self, max_epochs: int = 40, spatial_dims: int = 2, random_state: int = 0) -> None:
        self.max_epochs = max_epochs
        self.spatial_dims = spatial_dims
        self.random_state = random_state

    def _tensor(self, X: Any) -> torch.Tensor:
        images = torch.as_tensor(np.asarray(X)).float() / 255
        if images.ndim == self.spatial_dims + 1:
            return images[:, None].to(DEVICE)
        return images.movedim(-1, 1).to(DEVICE)  # channels come last

    def fit(self, X: Any, y: Any) -> AfternoonCNN:
        """Train it."""
        torch.manual_seed(self.random_state)
        self.classes_, codes = np.unique(y, return_inverse=True)
        images, labels = self._tensor(X), torch.as_tensor(codes, device=DEVICE)
        axes = (0, *range(2, images.ndim))
        self.scale_ = images.mean(axes, keepdim=True), images.std(axes, keepdim=True)
        images = (images - self.scale_[0]) / self.scale_[1]
        log_prior = torch.bincount(labels).div(len(labels)).log()
        width = 32 if self.spatial_dims == 2 else 16
        net = network(images.shape[1], len(self.classes_), self.spatial_dims, width).to(DEVICE)
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-3)
        n_steps = self.max_epochs * -(-len(images) // 64)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=n_steps)
        for _ in range(self.max_epochs):
            for rows in torch.randperm(len(images), device=DEVICE).split(64):
                batch = images[rows]
                for axis in (-1, -2):
                    flipped = torch.rand(len(rows), device=DEVICE) < 0.5
                    flipped = flipped.view(-1, *[1] * (batch.ndim - 1))
                    batch = torch.where(flipped, batch.flip(axis), batch)
                loss = F.cross_entropy(net(batch) + log_prior, labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        self.net_ = net.eval()
        return self

    @torch.no_grad()
    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities (n, n_classes)."""
        images = (self._tensor(X) - self.scale_[0]) / self.scale_[1]
        parts = [self.net_(part).softmax(dim=1).double().cpu() for part in images.split(512)]
        return torch.cat(parts).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Likeliest class of each image."""
        return self.classes_[self.predict_proba(X).argmax(axis=1)]
