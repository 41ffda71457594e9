"""Metric losses: similar embeddings for one class, different ones for different classes.

All take embeddings e (n, m), which they expect at unit length, and class codes (n,), and give a
scalar. D is the Euclidean distance, cos the inner product. Where a batch holds nothing to compare
(one class, or no class twice) losses that compare positives with negatives are 0, with a gradient
of 0; "contrastive" and "proxy_anchor" have terms for each alone.

Imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances of all pairs of unit vectors, (n_a, n_b).

    The square root is kept off 0, where its slope is infinite.
    """
    return (2 - 2 * a @ b.T).clamp_min(1e-12).sqrt()


def pairs(y: Tensor) -> tuple[Tensor, Tensor]:
    """Masks (n, n) of pairs of one class, a sample and itself left out, and of other classes."""
    same = y.unsqueeze(1) == y
    return same & ~torch.eye(len(y), dtype=torch.bool, device=y.device), ~same


def class_mean(costs: Tensor, y: Tensor, valid: Tensor) -> Tensor:
    """Mean over classes of the mean cost of their valid samples; classes without one are left out.

    However often a class is in the batch, it weighs the same.
    """
    same = (y.unsqueeze(1) == y) & valid
    n_valid = same.sum(dim=1)  # of the own class of each sample
    weight = valid / n_valid.clamp_min(1).to(costs.dtype)
    n_classes = weight.sum()
    return (torch.where(valid, costs, 0.0) * weight).sum() / n_classes.clamp_min(1)


def triplet(e: Tensor, y: Tensor, margin: float | str = "soft", mining: str = "hard") -> Tensor:
    """Class-balanced triplet loss [1]_.

    ``l(a) = log(1 + exp(d_p - d_n))`` or, with a margin, ``max(0, d_p - d_n + margin)``, averaged
    within each class and then over classes.

    Parameters
    ----------
    e : tensor of shape (n, m)
        Unit embeddings.
    y : tensor of int of shape (n,)
        Classes.
    margin : float or "soft", default="soft"
        Margin of the hinge, or the soft margin.
    mining : {"hard", "semihard", "all"}, default="hard"
        "hard": d_p is the largest distance within the class, d_n the smallest to another class.
        "semihard": d_n is the smallest one beyond d_p, or the largest of all if there is none.
        "all": the mean over every triplet.

    References
    ----------
    .. [1] A. Hermans, L. Beyer, B. Leibe, "In defense of the triplet loss for person
       re-identification", arXiv 1703.07737, 2017, eq. 5.
    """
    d = distances(e, e)
    positive, negative = pairs(y)
    valid = positive.any(dim=1) & negative.any(dim=1)
    if mining == "all":
        gap = d.unsqueeze(2) - d.unsqueeze(1)  # [a, p, n]
        triplets = (positive.unsqueeze(2) & negative.unsqueeze(1)).to(d.dtype)
        costs = (hinge(gap, margin) * triplets).sum((1, 2)) / triplets.sum((1, 2)).clamp_min(1)
        return class_mean(costs, y, valid)
    d_p = d.masked_fill(~positive, 0).amax(dim=1)
    if mining == "hard":
        d_n = d.masked_fill(~negative, torch.inf).amin(dim=1)
    else:
        beyond = negative & (d > d_p.unsqueeze(1))
        nearest = d.masked_fill(~beyond, torch.inf).amin(dim=1)
        farthest = d.masked_fill(~negative, 0).amax(dim=1)
        d_n = torch.where(beyond.any(dim=1), nearest, farthest)
    gap = torch.where(valid, d_p - torch.where(valid, d_n, 0.0), 0.0)
    return class_mean(hinge(gap, margin), y, valid)


def hinge(gap: Tensor, margin: float | str) -> Tensor:
    """Cost of a gap ``d_p - d_n``: softplus for "soft", else the hinge."""
    return F.softplus(gap) if isinstance(margin, str) else (gap + margin).clamp_min(0)


def supcon(e: Tensor, y: Tensor, temperature: float = 0.1) -> Tensor:
    """Supervised contrastive loss [1]_.

    ``-1/|P(i)| sum_p log( exp(cos_ip / T) / sum_{a != i} exp(cos_ia / T) )``, averaged over samples
    that have a positive.

    References
    ----------
    .. [1] P. Khosla et al., "Supervised contrastive learning", NeurIPS 2020, eq. 2.
    """
    positive, negative = pairs(y)
    logits = e @ e.T / temperature
    itself = torch.eye(len(y), dtype=torch.bool, device=y.device)
    lowest = torch.finfo(logits.dtype).min  # finite: a sample may be alone
    log_p = logits - logits.masked_fill(itself, lowest).logsumexp(dim=1, keepdim=True)
    n_positive = positive.sum(dim=1)
    costs = -torch.where(positive, log_p, 0.0).sum(dim=1) / n_positive.clamp_min(1)
    return negative.any() * costs.sum() / (n_positive > 0).sum().clamp_min(1)


def multi_similarity(
    e: Tensor,
    y: Tensor,
    alpha: float = 2.0,
    gamma: float = 50.0,
    base: float = 0.5,
    epsilon: float = 0.1,
) -> Tensor:
    """Multi-similarity loss with its own mining of pairs [1]_.

    ``1/alpha log(1 + sum_p exp(-alpha (cos_ip - base))) + 1/gamma log(1 + sum_n exp(gamma (cos_in -
    base)))``, averaged over samples. Pairs that are easy by more than `epsilon` are left out: a
    negative less similar than the least similar positive, a positive more similar than the most
    similar negative.

    References
    ----------
    .. [1] X. Wang et al., "Multi-similarity loss with general pair weighting for deep metric
       learning", CVPR 2019, eqs. 15 and 11, 12.
    """
    cos = e @ e.T
    positive, negative = pairs(y)
    least = cos.masked_fill(~positive, torch.inf).amin(dim=1, keepdim=True)
    most = cos.masked_fill(~negative, -torch.inf).amax(dim=1, keepdim=True)
    positive, negative = positive & (cos - epsilon < most), negative & (cos + epsilon > least)
    pull = log_one_plus_sum(-alpha * (cos - base), positive, dim=1) / alpha
    push = log_one_plus_sum(gamma * (cos - base), negative, dim=1) / gamma
    return (pull + push).mean()


def log_one_plus_sum(exponents: Tensor, mask: Tensor, dim: int) -> Tensor:
    """``log(1 + sum exp(x))`` along an axis, over the entries that the mask keeps."""
    kept = exponents.masked_fill(~mask, -torch.inf)
    zero = kept.new_zeros((len(kept), 1) if dim else (1, kept.shape[1]))
    return torch.cat([zero, kept], dim).logsumexp(dim)


def contrastive(e: Tensor, y: Tensor, margin: float = 1.0) -> Tensor:
    """Contrastive loss: mean ``D^2`` of positive + ``max(0, margin - D)^2`` of negative pairs.

    References
    ----------
    R. Hadsell, S. Chopra, Y. LeCun, "Dimensionality reduction by learning an invariant mapping",
    CVPR 2006, eq. 4.
    """
    d = distances(e, e)
    positive, negative = (mask.to(d.dtype) for mask in pairs(y))
    pull = (d.square() * positive).sum() / positive.sum().clamp_min(1)
    push = ((margin - d).clamp_min(0).square() * negative).sum() / negative.sum().clamp_min(1)
    return pull + push


class ClassCenterTriplet(nn.Module):
    """Triplet loss against class centres [1]_.

    ``l(i) = D(e_i, mu_{y_i}) - min_{c != y_i} D(e_i, mu_c)`` under the hinge or the soft margin,
    averaged within each class and then over classes. Centres are running means of batch means, at
    unit length.

    Parameters
    ----------
    n_classes, width : int
        Number of classes and of embedding dimensions.
    margin : float or "soft", default=0.3
        As in :func:`triplet`.
    momentum : float, default=0.9
        Share of the old centre; the first batch that holds a class sets its centre.
    switch : int, default=0
        Steps of plain batch-hard :func:`triplet` before (the progressive schedule [2]_).

    References
    ----------
    .. [1] W. Lei et al., "Class-center involved triplet loss for skin disease classification on
       imbalanced data", ISBI 2020.
    .. [2] K. Chen et al., "PCCT: progressive class-center triplet loss for imbalanced medical image
       classification", arXiv 2207.04793, 2022.
    """

    def __init__(
        self,
        n_classes: int,
        width: int,
        margin: float | str = 0.3,
        momentum: float = 0.9,
        switch: int = 0,
    ) -> None:
        super().__init__()
        self.centers: Tensor
        self.seen: Tensor
        self.margin = margin
        self.momentum = momentum
        self.switch = switch
        self.step: Tensor
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("centers", torch.zeros(n_classes, width))
        self.register_buffer("seen", torch.zeros(n_classes, dtype=torch.bool))

    def forward(self, e: Tensor, y: Tensor) -> Tensor:
        """Loss of a batch; moves the centres first, through which no gradient flows."""
        self.update(e.detach(), y)
        d = distances(e, self.centers)
        own = F.one_hot(y, len(self.centers)).bool()
        others = self.seen & ~own
        d_p = d.masked_fill(~own, 0).sum(dim=1)
        d_n = d.masked_fill(~others, torch.inf).amin(dim=1)
        valid = others.any(dim=1)
        gap = torch.where(valid, d_p - torch.where(valid, d_n, 0.0), 0.0)
        loss = class_mean(hinge(gap, self.margin), y, valid)
        if not self.switch:
            return loss
        self.step += 1
        return torch.where(self.step > self.switch, loss, triplet(e, y, self.margin))

    @torch.no_grad()
    def update(self, e: Tensor, y: Tensor) -> None:
        """Move the centres of the classes of a batch."""
        members = F.one_hot(y, len(self.centers)).to(e.dtype)
        n = members.sum(dim=0)
        means = F.normalize(members.T @ e)
        share = (1 - self.momentum * self.seen.to(e.dtype)) * (n > 0)
        self.centers.copy_(F.normalize(torch.lerp(self.centers, means, share.unsqueeze(1))))
        self.seen |= n > 0


class ProxyAnchor(nn.Module):
    """Proxy-anchor loss: one learned proxy per class [1]_.

    ``1/|P+| sum_p log(1 + sum_{y_i = p} exp(-s (cos_ip - m))) + 1/|P| sum_p log(1 + sum_{y_i != p}
    exp(s (cos_ip + m)))``, P+ the proxies with a sample in the batch. It needs no pairs: classes of
    one image work.

    Parameters
    ----------
    n_classes, width : int
        Number of classes and of embedding dimensions.
    margin : float, default=0.1
        m.
    scale : float, default=32.0
        s.

    References
    ----------
    .. [1] S. Kim et al., "Proxy anchor loss for deep metric learning", CVPR 2020, eq. 4.
    """

    def __init__(
        self, n_classes: int, width: int, margin: float = 0.1, scale: float = 32.0
    ) -> None:
        super().__init__()
        self.margin = margin
        self.scale = scale
        self.proxies = nn.Parameter(torch.empty(n_classes, width))
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")

    def forward(self, e: Tensor, y: Tensor) -> Tensor:
        """Loss of a batch."""
        cos = e @ F.normalize(self.proxies).T
        own = F.one_hot(y, len(self.proxies)).bool()
        pull = log_one_plus_sum(-self.scale * (cos - self.margin), own, dim=0)
        push = log_one_plus_sum(self.scale * (cos + self.margin), ~own, dim=0)
        return pull.sum() / own.any(dim=0).sum() + push.mean()


METRIC_LOSSES: dict[str, Callable[..., Any]] = {
    "triplet": triplet,
    "class_center_triplet": ClassCenterTriplet,
    "supcon": supcon,
    "multi_similarity": multi_similarity,
    "proxy_anchor": ProxyAnchor,
    "contrastive": contrastive,
}
"""Losses by name: functions of (embeddings, classes), and modules made of (n_classes, width)."""
