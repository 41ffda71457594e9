"""TailBoost: contrast with class centres beside the labels.

J. Wei et al., "TailBoost: tail-synthetic learning for boosting long-tailed skin cancer image
classification", Sensors 26(11), 3343, 2026; the contrast is GPaCo, J. Cui et al., IEEE TPAMI 2023.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator
from torch import nn

from sklearn_medimb._parameters import (
    Declaring,
    above,
    at_least,
    integers,
    one_of,
    parameter,
    within,
)
from sklearn_medimb._training.criterion import Criterion
from sklearn_medimb._training.momentum import KeyQueue, follow
from sklearn_medimb._training.network import SoftmaxNetwork
from sklearn_medimb._training.objectives import perceptron
from sklearn_medimb.losses import LabelLoss

# ---------------------------------------------------------------- contrast


def gpaco_loss(
    logits: torch.Tensor,
    similarity: torch.Tensor,
    y: torch.Tensor,
    y_candidates: torch.Tensor,
    log_prior: torch.Tensor,
    *,
    w_con: float = 0.05,
    gamma: float = 1.0,
    beta: float = 1.0,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Generalised parametric contrastive loss: class centres and samples in one softmax [1]_.

    With ``a_ic = s_ic + log(pi_c)`` and ``D_i = sum_c exp(a_ic) + gamma sum_j exp(u_ij)``, j over
    all candidates but i itself and P_i those of class y_i,

        L_i = -[beta (a_{i,y_i} - log D_i) + w sum_{j in P_i} (u_ij - log D_i)] / (beta + w |P_i|).

    With w = gamma = 0 it is the balanced softmax cross-entropy.

    Parameters
    ----------
    logits : tensor of shape (N, K)
        s, of the anchors.
    similarity : tensor of shape (N, M)
        u, cosines over temperature between anchors and candidates, of which the first N are the
        anchors themselves.
    y, y_candidates : tensor of int of shape (N,) and (M,)
        Classes.
    log_prior : tensor of shape (K,)
        log(pi), of the classes as they are drawn.
    w_con, gamma, beta : float
        w, gamma and beta.
    weight : tensor of shape (K,), default=None
        Class weights of the anchors.

    References
    ----------
    .. [1] J. Cui et al., "Generalized parametric contrastive learning", IEEE TPAMI 2023.
    """
    itself = torch.eye(*similarity.shape, dtype=torch.bool, device=similarity.device)
    positive = (y.unsqueeze(1) == y_candidates) & ~itself
    centres = logits + log_prior
    log_d = centres.logsumexp(dim=1)
    if gamma:
        others = (similarity + math.log(gamma)).masked_fill(itself, -torch.inf)
        log_d = torch.cat([centres, others], dim=1).logsumexp(dim=1)
    own = centres.gather(1, y.unsqueeze(1)).squeeze(1) - log_d
    pairs = torch.where(positive, similarity - log_d.unsqueeze(1), 0).sum(dim=1)
    n_positive = positive.sum(dim=1).to(logits.dtype)
    costs = -(beta * own + w_con * pairs) / (beta + w_con * n_positive)
    return (costs if weight is None else costs * weight[y]).mean()


def supcon_with_memory(
    similarity: torch.Tensor, y: torch.Tensor, y_candidates: torch.Tensor
) -> torch.Tensor:
    """Supervised contrastive loss of anchors against candidates, their own rows left out.

    Parameters
    ----------
    similarity, y, y_candidates
        As in :func:`gpaco_loss`.
    """
    itself = torch.eye(*similarity.shape, dtype=torch.bool, device=similarity.device)
    positive = (y.unsqueeze(1) == y_candidates) & ~itself
    lowest = torch.finfo(similarity.dtype).min
    log_p = similarity - similarity.masked_fill(itself, lowest).logsumexp(dim=1, keepdim=True)
    n_positive = positive.sum(dim=1)
    costs = -torch.where(positive, log_p, 0).sum(dim=1) / n_positive.clamp_min(1)
    return costs.sum() / (n_positive > 0).sum().clamp_min(1)


class Contrast(Declaring, BaseEstimator):
    """Contrast of two views beside the labels: how, and how much.

    Parameters
    ----------
    kind
        GPaCo, where class centres, corrected by class frequency, and samples share one softmax, or
        the supervised contrastive loss.
    weight
        Weight of the contrast.
    gamma
        Weight of the samples in the denominator of "gpaco".
    temperature
        Of the cosines.
    queue_size
        Keys of past steps to contrast with; "auto" is 4 per image, at most 8192.
    projection_dim
        Size of the projections; published: 256.
    hidden
        Size of the layers before them; published: 4096.
    key_momentum
        m of a separate key encoder, as in the SPMix article; None encodes both views alike.
    """

    kind: str = parameter(one_of("gpaco", "supcon"), default="gpaco", positional=True)
    weight: float = parameter(at_least(0), default=0.05, search=(0.01, 1.0, "log"))
    gamma: float = parameter(at_least(0), default=1.0, search=(0.1, 2.0))
    temperature: float = parameter(above(0), default=0.2, search=(0.05, 1.0, "log"))
    queue_size: Any = parameter(
        integers(0), one_of("auto"), default="auto", search=["auto", 0, 1024, 8192]
    )
    projection_dim: int = parameter(integers(1), default=128, search=(64, 512, "log"))
    hidden: int = parameter(integers(1), default=512, search=(256, 4096, "log"))
    key_momentum: float | None = parameter(
        within(0, 1), None, default=None, search=[None, 0.9, 0.99, 0.999]
    )


def resolve_contrast(contrast: Any) -> Contrast | None:
    """Turn what a user may pass as `contrast` into its settings."""
    return Contrast(contrast) if isinstance(contrast, str) else contrast


def kind_of_contrast(contrast: Any) -> str | None:
    """Which contrast it is, by name."""
    return getattr(resolve_contrast(contrast), "kind", None)


class ContrastLoss(Criterion):
    """Labels and contrast of two views; owns projector, predictor, queue and key encoder.

    Queries are ``q = predictor(projector(h))`` of the first view, keys ``k = projector(h)`` of the
    second, both of length 1. Without a key encoder both views are anchors and gradients flow
    through both; with one (PaCo) only queries are.

    Parameters
    ----------
    network : SoftmaxNetwork
        Copied where there is a key encoder.
    contrast : Contrast
        Its settings.
    label_loss : LabelLoss
        (logits, masses) to a scalar, of "supcon"; "gpaco" takes its class weights.
    log_prior : tensor of shape (n_classes,)
        Of the classes as they are drawn, for "gpaco".
    n_images : int
        Training images, which limit the queue.
    """

    log_prior: torch.Tensor

    def __init__(
        self,
        network: SoftmaxNetwork,
        contrast: Contrast,
        label_loss: LabelLoss,
        log_prior: torch.Tensor,
        *,
        n_images: int,
    ) -> None:
        super().__init__()
        self.contrast = contrast
        self.label_loss = label_loss
        d, hidden, dim = network.n_features, contrast.hidden, contrast.projection_dim
        self.projector = perceptron([d, hidden, hidden, dim], last_norm=True, affine=False)
        self.predictor = perceptron([dim, hidden, dim], last_norm=True, affine=False)
        size = contrast.queue_size
        self.queue = KeyQueue(min(8192, 4 * n_images) if size == "auto" else size, dim)
        self.register_buffer("log_prior", log_prior)
        if contrast.key_momentum is not None:
            encoders = {"network": network, "projector": self.projector}
            self.key_encoder = nn.ModuleDict({k: copy.deepcopy(v) for k, v in encoders.items()})
            self.key_encoder.requires_grad_(False)

    def go_on(self, last: dict[str, Any]) -> None:
        """Take over what an earlier fit learned beside the network, where it is of this shape."""
        learned = ("projector", "predictor", "queue")
        own = {k: v for k, v in self.state_dict().items() if k.split(".")[0] in learned}
        tensors = {k: v.shape for k, v in own.items() if isinstance(v, torch.Tensor)}
        if all(k in last and last[k].shape == shape for k, shape in tensors.items()):
            self.load_state_dict({k: last[k] for k in own}, strict=False)

    def forward(self, output: Any, mass: torch.Tensor) -> torch.Tensor:
        """Loss of a batch of B bases."""
        y = mass.argmax(dim=1)
        logits, features = output.logits, output.features
        if self.contrast.key_momentum is None:
            h_q, h_k = features.chunk(2)
            keys = F.normalize(self.projector(h_k))
            n_views = 2
        else:
            h_q, n_views = features, 1
            with torch.no_grad():
                views = {k.removeprefix("key_"): v for k, v in output.keys.items()}
                h_k = self.key_encoder["network"](**views).features
                keys = F.normalize(self.key_encoder["projector"](h_k))
        queries = F.normalize(self.predictor(self.projector(h_q)))
        empty = ~self.queue.filled()
        candidates = torch.cat([queries, keys, self.queue.keys])
        y_candidates = torch.cat([y, y, self.queue.labels.masked_fill(empty, -1)])
        anchors = candidates[: n_views * len(y)]
        similarity = anchors @ candidates.T / self.contrast.temperature
        similarity = similarity.masked_fill(F.pad(empty, (2 * len(y), 0)), -torch.inf)
        y_anchors = y.repeat(n_views)
        if self.contrast.kind == "gpaco":
            loss = gpaco_loss(
                logits,
                similarity,
                y_anchors,
                y_candidates,
                self.log_prior,
                w_con=self.contrast.weight,
                gamma=self.contrast.gamma,
                weight=self.label_loss.next_weight(),
            )
        else:
            label = self.label_loss(logits, mass.repeat(n_views, 1))
            contrast = supcon_with_memory(similarity, y_anchors, y_candidates)
            self.terms = {"label": label, "contrast": contrast}
            loss = label + self.contrast.weight * contrast
        self.queue.push(keys.detach(), y)
        return loss

    def start_from(self, network: nn.Module) -> None:
        """Begin with a key encoder that is a copy of the network."""
        if self.contrast.key_momentum is not None:
            self.key_encoder["network"].load_state_dict(network.state_dict())

    def before_step(self, network: nn.Module) -> None:
        """Move the key encoder."""
        if self.contrast.key_momentum is not None:
            follow(self.key_encoder["network"], network, 1 - self.contrast.key_momentum)
            follow(self.key_encoder["projector"], self.projector, 1 - self.contrast.key_momentum)
