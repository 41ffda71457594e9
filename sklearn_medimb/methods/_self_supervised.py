"""The neighbours that AMIMV is compared with: six self-supervised methods on one engine.

Each is an `Objective` whose views are two augmentations of one
image: two of the online branch, or one of each of two branches. As in the authors' code the two
views of a branch pass the network one after the other, in SimCLR together: batch normalisation
tells the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sklearn_medimb._parameters import above, one_of, parameter, within
from sklearn_medimb._training.momentum import KeyQueue
from sklearn_medimb._training.objectives import EncodedViews, Objective, perceptron
from sklearn_medimb._training.views import Views
from sklearn_medimb.base._encoder import ENCODERS, BaseImageEncoder


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy: find the other view among 2 B - 1 rows.

    Parameters
    ----------
    z1, z2 : tensor of shape (B, d)
        Projections of the two views.
    temperature : float
        Of the cosines.
    """
    z = F.normalize(torch.cat([z1, z2]))
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    other = torch.arange(len(z), device=z.device).roll(len(z1))
    return F.cross_entropy(logits, other)


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Mean negative cosine of predictions and targets of shape (B, d); targets have no gradient."""
    return -F.cosine_similarity(p, z.detach()).mean()


def barlow_twins(z1: Tensor, z2: Tensor, redundancy_weight: float = 5e-3) -> Tensor:
    """``sum_i (1 - C_ii)^2 + w sum_{i != j} C_ij^2``, C the cross-correlation of two views.

    Parameters
    ----------
    z1, z2 : tensor of shape (B, d)
        Projections.
    redundancy_weight : float, default=5e-3
        w.
    """
    c = F.batch_norm(z1, None, None, training=True).T @ F.batch_norm(z2, None, None, training=True)
    c = c / len(z1)
    diagonal = c.diagonal()
    off = c.square().sum() - diagonal.square().sum()
    return (1 - diagonal).square().sum() + redundancy_weight * off


def vicreg(
    z1: Tensor,
    z2: Tensor,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
) -> Tensor:
    """Agreement of two views, a standard deviation of 1 in each dimension, no covariance.

    Parameters
    ----------
    z1, z2 : tensor of shape (B, d)
        Projections, B >= 2.
    invariance_weight, variance_weight, covariance_weight : float
        Of the three terms.
    """
    variance = covariance = torch.zeros((), device=z1.device, dtype=z1.dtype)
    for z in (z1, z2):
        variance = variance + F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean() / 2
        centred = z - z.mean(dim=0)
        c = centred.T @ centred / (len(z) - 1)
        covariance = covariance + (c.square().sum() - c.diagonal().square().sum()) / z.shape[1]
    return (
        invariance_weight * F.mse_loss(z1, z2)
        + variance_weight * variance
        + covariance_weight * covariance
    )


# ---------------------------------------------------------------- methods


class SimCLR(Objective):
    """A simple framework for contrastive learning: both views online, all others negative."""

    target_views = 0
    jointly = True

    def __init__(
        self, network: nn.Module, d: int, dim: int, temperature: float, momentum: float
    ) -> None:
        super().__init__(network, perceptron([d, d, dim], last_norm=False))
        self.temperature = temperature

    def forward(self, encoded: EncodedViews, targets: Tensor) -> Tensor:
        """Loss of a batch."""
        (features,) = encoded.features
        z1, z2 = self.projector(features).chunk(2)
        return nt_xent(z1, z2, self.temperature)


class MoCo(Objective):
    """Momentum contrast, version 2: queries online, keys of the target branch, a queue of keys."""

    target_views = 1
    queue_size = 4096

    def __init__(
        self, network: nn.Module, d: int, dim: int, temperature: float, momentum: float
    ) -> None:
        super().__init__(network, perceptron([d, d, dim], last_norm=False), momentum)
        self.temperature = temperature
        self.queue = KeyQueue(self.queue_size, dim)

    def forward(self, encoded: EncodedViews, targets: Tensor) -> Tensor:
        """Loss of a batch; the negatives are the queue, and the other keys of the batch."""
        (features,), (target,) = encoded
        q = F.normalize(self.projector(features))
        k = F.normalize(self.project_target(target))
        known = torch.cat([k.new_ones(len(k), dtype=torch.bool), self.queue.filled()])
        keys = torch.cat([k, self.queue.keys])
        self.queue.push(k)
        logits = (q @ keys.T / self.temperature).masked_fill(~known, -torch.inf)
        return F.cross_entropy(logits, torch.arange(len(q), device=q.device))


class BYOL(Objective):
    """Bootstrap your own latent: each view predicts the target branch's projection of the other."""

    target_views = 2

    def __init__(
        self, network: nn.Module, d: int, dim: int, temperature: float, momentum: float
    ) -> None:
        super().__init__(network, perceptron([d, 2 * d, dim], last_norm=False), momentum)
        self.predictor = perceptron([dim, 2 * d, dim], last_norm=False)

    def forward(self, encoded: EncodedViews, targets: Tensor) -> Tensor:
        """Loss of a batch: squared distance of unit vectors, up to constants."""
        p1, p2 = (self.predictor(self.projector(features)) for features in encoded.features)
        z1, z2 = map(self.project_target, encoded.target)
        return 1 + (negative_cosine(p1, z2) + negative_cosine(p2, z1)) / 2


class SimSiam(Objective):
    """Simple Siamese networks: as BYOL, with the online projection, cut off, as the target."""

    target_views = 0

    def __init__(
        self, network: nn.Module, d: int, dim: int, temperature: float, momentum: float
    ) -> None:
        super().__init__(network, perceptron([d, d, d, dim], last_norm=True, affine=False))
        self.predictor = perceptron([dim, max(dim // 4, 1), dim], last_norm=False)

    def forward(self, encoded: EncodedViews, targets: Tensor) -> Tensor:
        """Loss of a batch."""
        z1, z2 = map(self.projector, encoded.features)
        p1, p2 = map(self.predictor, (z1, z2))
        return 1 + (negative_cosine(p1, z2) + negative_cosine(p2, z1)) / 2


class BarlowTwins(Objective):
    """Self-supervised learning via redundancy reduction."""

    target_views = 0

    def __init__(
        self, network: nn.Module, d: int, dim: int, temperature: float, momentum: float
    ) -> None:
        super().__init__(network, perceptron([d, 2 * d, 2 * d, 4 * dim], last_norm=False))

    def forward(self, encoded: EncodedViews, targets: Tensor) -> Tensor:
        """Loss of a batch."""
        return barlow_twins(*map(self.projector, encoded.features))


class VICReg(BarlowTwins):
    """Variance-invariance-covariance regularisation, of the same projections."""

    def forward(self, encoded: EncodedViews, targets: Tensor) -> Tensor:
        """Loss of a batch."""
        return vicreg(*map(self.projector, encoded.features))


METHODS: dict[str, Callable[..., Any]] = {
    "simclr": SimCLR,
    "moco": MoCo,
    "byol": BYOL,
    "simsiam": SimSiam,
    "barlow_twins": BarlowTwins,
    "vicreg": VICReg,
}


class SSLEncoder(BaseImageEncoder):
    """Label-free encoder by one of six self-supervised methods.

    Two augmentations of an image are to be alike, and something keeps all images from becoming
    alike: other images, a predictor and a slower copy, or decorrelation.

    Parameters
    ----------
    method
        SimCLR [1]_, MoCo v2 [2]_, BYOL [3]_, SimSiam [4]_, Barlow Twins [5]_ or VICReg [6]_.
    projection_dim
        Size of the projections; "barlow_twins" and "vicreg", which need wide ones, take four times
        as much.
    temperature
        Of the cosines, in "simclr" and "moco".
    momentum
        m of the target branch, in "moco" and "byol".

    See Also
    --------
    AMIMVEncoder : Multi-image multi-view self-supervision for imbalanced pools.

    Notes
    -----
    The losses are the papers', and so is what batch normalisation sees at once: a view, in SimCLR
    both; projectors follow the width of the backbone, for the small
    networks and sets that this package is for. MoCo takes the other keys of a batch as negatives
    too, so that its queue of 4,096 keys can start empty.

    References
    ----------
    .. [1] T. Chen et al., "A simple framework for contrastive learning of visual representations",
       ICML 2020, eq. 1.
    .. [2] X. Chen et al., "Improved baselines with momentum contrastive learning",
       arXiv 2003.04297, 2020.
    .. [3] J.-B. Grill et al., "Bootstrap your own latent", NeurIPS 2020, eq. 2.
    .. [4] X. Chen, K. He, "Exploring simple Siamese representation learning", CVPR 2021, eq. 4.
    .. [5] J. Zbontar et al., "Barlow Twins: self-supervised learning via redundancy reduction",
       ICML 2021, eq. 1.
    .. [6] A. Bardes et al., "VICReg: variance-invariance-covariance regularization for
       self-supervised learning", ICLR 2022, eq. 6.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_medimb import SSLEncoder
    >>> X, _ = load_digits(return_X_y=True)
    >>> encoder = SSLEncoder("byol", image_shape=(8, 8), max_epochs=1, random_state=0).fit(X[:200])
    >>> encoder.transform(X[200:210]).shape
    (10, 128)
    """

    method: str = parameter(one_of(*METHODS), default="simclr", search=True, positional=True)
    temperature: float = parameter(above(0), default=0.2, search=(0.05, 1.0, "log"))
    momentum: float = parameter(within(0, 1), default=0.99, search=(0.9, 0.999))

    def _objective(self, network: nn.Module, n_features: int) -> Objective:
        make = METHODS[self.method]
        return make(network, n_features, self.projection_dim, self.temperature, self.momentum)

    def _view_set(self) -> Views:
        views = [(0, augment) for augment in self._augmentations()]
        n_target = METHODS[self.method].target_views  # type: ignore[attr-defined]
        return {0: Views(views, []), 1: Views(views[:1], views[1:]), 2: Views(views, views)}[
            n_target
        ]


def _named(method: str) -> Callable[[], SSLEncoder]:
    return lambda: SSLEncoder(method)


ENCODERS.update({method: _named(method) for method in METHODS})
