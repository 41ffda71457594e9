"""CSSN: classification as comparison with a bank of labelled support images.

X. Gao et al., "Cross-Supervision Similarity Network for Medical Image Classification on Imbalanced
Small Datasets", IEEE Transactions on Medical Imaging, 2026, doi 10.1109/TMI.2026.3656364.

The file reads as the method does: the loss, the head, the network, the estimator. Symbols are the
paper's: n images a step, L patch tokens of width C, z(q, s) the pair logit of the patch branch, p
its sigmoid, k(q, s) the cosine of the class branch, y_qs = 1 for two images of one class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_consistent_length, check_is_fitted
from torch import nn

from sklearn_medimb._data.batches import Batches, Context
from sklearn_medimb._data.images import Images
from sklearn_medimb._data.plans import class_balanced
from sklearn_medimb._machine.randomness import Dropout
from sklearn_medimb._machine.runtime import in_blocks, inference_block, one_thread_in_workers
from sklearn_medimb._parameters import (
    Declaring,
    at_least,
    integers,
    learned,
    one_of,
    parameter,
    within,
)
from sklearn_medimb._training.criterion import Criterion
from sklearn_medimb._training.network import Trunk
from sklearn_medimb._training.stage import TrainingSet
from sklearn_medimb.backbones import as_tokens
from sklearn_medimb.base._classifier import BaseImageClassifier
from sklearn_medimb.methods._evidence import Evidence, Places


def soft_log_target(same: torch.Tensor, p: torch.Tensor, soft_ratio: float = 0.7) -> torch.Tensor:
    """Soft logarithmic target of the class branch.

    ``t(y, p) = y (1 - log2(2^r - (2^r - 1) p))``: a positive pair is asked for no more certainty
    than its patches have reached. t(1, 0) = 1 - r, t(1, 1) = 1, t(0, p) = 0.

    Parameters
    ----------
    same : tensor
        y, 1 for pairs of one class, else 0.
    p : tensor of the same shape
        Patch-branch probability; no gradient flows into it.
    soft_ratio : float, default=0.7
        r; 0 gives hard targets.

    Returns
    -------
    target : tensor of the same shape
        Values in [0, 1].
    """
    top = 2.0**soft_ratio
    return same * (1 - torch.log2(top - (top - 1) * p.detach()))


class Mlp(nn.Sequential):
    """Linear, GELU, dropout, linear."""

    def __init__(self, width_in: int, hidden: int, width_out: int, dropout: float) -> None:
        super().__init__(
            nn.Linear(width_in, hidden),
            nn.GELU(),
            Dropout(dropout),
            nn.Linear(hidden, width_out),
        )


class EncodedImages(NamedTuple):
    """Images as the comparison sees them.

    Pooled patches (n, L // 2, C), class embedding (n, C), and the backbone's class token (n, C).
    """

    patches: torch.Tensor
    embedding: torch.Tensor
    token: torch.Tensor


class CSSNHead(nn.Module):
    """From tokens to pair scores.

    Per image, with class token c and patches P (rows of T), and R those of the reference image:

    1. ``T <- LN(T + MLP(mean of T))``, the context of the whole image;
    2. split into c and P;
    3. ``R <- LN(MLP(R^T))^T``, mixing the reference's patches;
    4. ``P <- LN(MLP(P * R))``, the gate;
    5. ``F = P + lam c``;
    6. each row of F to unit norm, then centred over its channels.

    Per pair:

    7. ``M = F_q F_s^T``;
    8. M averaged over 2 x 2 blocks;
    9. ``z = MLP(M^2)``, squared elementwise: the logit of the patch branch;
    10. ``k = cos(G(c_q), G(c_s))`` with an MLP G: the class branch.

    Parameters
    ----------
    n_tokens : int
        L, patch tokens per image, at least 4.
    width : int
        C, token width.
    lam : float, default=3.0
        Weight of the class token added to every patch.
    dropout : float, default=0.1
        Inside every MLP.
    gate : bool, default=True
        Whether patches are fused with those of a reference image.
    """

    def __init__(
        self,
        n_tokens: int,
        width: int,
        *,
        lam: float = 3.0,
        dropout: float = 0.1,
        gate: bool = True,
    ) -> None:
        super().__init__()
        self.lam = lam
        self.gate = gate
        self.context = Mlp(width, max(width // 4, 1), width, dropout)
        self.context_norm = nn.LayerNorm(width)
        if gate:
            self.mix = Mlp(n_tokens, 128, n_tokens, dropout)
            self.mix_norm = nn.LayerNorm(n_tokens)
            self.fuse = Mlp(width, 96, width, dropout)
            self.fuse_norm = nn.LayerNorm(width)
        self.scorer = Mlp((n_tokens // 2) ** 2, 256, 1, dropout)
        self.embed = Mlp(width, 96, width, dropout)

    def with_context(self, tokens: torch.Tensor) -> torch.Tensor:
        """Step 1: add what the mean over all tokens says to each of them."""
        return self.context_norm(tokens + self.context(tokens.mean(dim=1, keepdim=True)))

    def forward(self, tokens: torch.Tensor, reference: torch.Tensor | None = None) -> EncodedImages:
        """Encode images once, for any number of comparisons.

        Parameters
        ----------
        tokens : tensor of shape (n, 1 + L, C)
            Class token, then patch tokens.
        reference : tensor of the same shape, default=None
            Tokens of the registered second image; None takes the image itself.

        Returns
        -------
        encoded : EncodedImages
            Pooled patches, class embedding, class token.
        """
        raw, tokens = tokens[:, 0], self.with_context(tokens)
        class_token, patches = tokens[:, :1], tokens[:, 1:]  # step 2
        if self.gate:
            other = tokens if reference is None else self.with_context(reference)
            other = self.mix_norm(self.mix(other[:, 1:].transpose(1, 2))).transpose(1, 2)  # step 3
            patches = self.fuse_norm(self.fuse(patches * other))  # step 4
        patches = patches + self.lam * class_token  # step 5
        patches = F.normalize(patches, dim=2)  # step 6, in this order
        patches = patches - patches.mean(dim=2, keepdim=True)
        # Steps 7 and 8: the mean over a 2 x 2 block of inner products is the inner product of the
        # two pair means, so pooling neighbours first gives the same at a quarter of the cost.
        even = patches[:, : patches.shape[1] // 2 * 2]
        pooled = even.unflatten(1, (-1, 2)).mean(dim=2)
        return EncodedImages(pooled, self.embed(class_token[:, 0]), raw)

    def similarity_maps(self, queries: torch.Tensor, supports: torch.Tensor) -> torch.Tensor:
        """Pooled patch-to-patch similarities M of all pairs: (n_q, n_s, L // 2, L // 2)."""
        return torch.einsum("qlc,smc->qslm", queries, supports)

    def patch_logits(self, maps: torch.Tensor) -> torch.Tensor:
        """Step 9: z, one logit per similarity map."""
        return self.scorer(maps.square().flatten(-2)).squeeze(-1)


def class_cosines(queries: torch.Tensor, supports: torch.Tensor) -> torch.Tensor:
    """Step 10: k of all pairs, (n_q, n_s), from class embeddings."""
    return F.normalize(queries, dim=1) @ F.normalize(supports, dim=1).T


class PairScores(NamedTuple):
    """z and k of the pairs of a step, and the auxiliary class logits of its views."""

    z: torch.Tensor
    k: torch.Tensor
    logits: torch.Tensor | None


class CSSNNetwork(nn.Module):
    """Backbone, head, and where asked a linear classifier on the class token.

    In training a batch holds two views of each of n images, queries first, and every query meets
    every support: n^2 ordered pairs from 2 n encodings. With ``paired_views`` it holds 2 n^2 views,
    a fresh one for each member of each pair, as published.
    """

    def __init__(
        self,
        trunk: Trunk,
        *,
        max_tokens: int,
        reference: str,
        n_classes: int,
        auxiliary: bool,
        paired_views: bool,
        **head: Any,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.max_tokens = max_tokens
        self.reference = reference
        self.paired_views = paired_views
        _, n_tokens, self.n_features = as_tokens(trunk.probe(), max_tokens).shape
        if n_tokens < 5:
            raise ValueError(
                f"CSSN compares at least 4 patch tokens, but backbone gives {n_tokens - 1} for "
                f"images of shape {trunk.input_shape}: use larger images or a backbone that "
                "reduces them less."
            )
        self.head = CSSNHead(n_tokens - 1, self.n_features, gate=reference != "none", **head)
        self.classifier = nn.Linear(self.n_features, n_classes) if auxiliary else None

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Tokens of shape (n, 1 + L, C)."""
        return as_tokens(self.trunk(images), self.max_tokens)

    @property
    def encoded(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """From images to their tokens; of pairs those of both images, one after the other."""
        paired = self.reference == "paired"
        return partial(_tokens_of, self.trunk, max_tokens=self.max_tokens, paired=paired)

    def encode(self, images: torch.Tensor) -> EncodedImages:
        """Encode images, or pairs of them: a pair lies in the channels."""
        if self.reference != "paired":
            return self.head(self.tokens(images))
        return self.head(*self.tokens(torch.cat(images.chunk(2, dim=1))).chunk(2))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Class token with context, shape (n, C)."""
        images = images.chunk(2, dim=1)[0] if self.reference == "paired" else images
        return self.head.with_context(self.tokens(images))[:, 0]

    def forward(self, views: torch.Tensor) -> PairScores:
        """Score the pairs of a training step: z and k of shape (n, n), or (n^2,)."""
        encoded = self.encode(views)
        queries, supports = encoded.patches.chunk(2)
        c_q, c_s = encoded.embedding.chunk(2)
        if self.paired_views:
            z = self.head.patch_logits(queries @ supports.transpose(1, 2))
            k = F.cosine_similarity(c_q, c_s)
        else:
            z = self.head.patch_logits(self.head.similarity_maps(queries, supports))
            k = class_cosines(c_q, c_s)
        logits = None if self.classifier is None else self.classifier(encoded.token)
        return PairScores(z, k, logits)


def _tokens_of(
    trunk: Trunk, images: torch.Tensor, *, max_tokens: int, paired: bool
) -> torch.Tensor:
    pair = images.chunk(2, dim=1) if paired else (images,)
    return torch.cat([as_tokens(trunk(image), max_tokens) for image in pair], dim=1)


class CSSNLoss(Criterion):
    """``(1 - w) BCE(p, y) + w BCE(q, t(y, p)) + aux CE``, averaged over pairs.

    Parameters
    ----------
    soft_ratio : float
        r of :func:`soft_log_target`.
    class_loss_weight : float
        w.
    class_link : {"affine", "double_sigmoid"}
        From the cosine k to the probability q: ``(1 + k) / 2``, or the published
        ``sigmoid(sigmoid(k))``, which can only reach 0.567 to 0.675.
    balance_pairs : bool
        Whether the positive and the negative pairs of a step weigh the same in total.
    aux_weight : float
        Weight of cross-entropy on the class token.
    """

    def __init__(
        self,
        *,
        soft_ratio: float,
        class_loss_weight: float,
        class_link: str,
        balance_pairs: bool,
        aux_weight: float,
    ) -> None:
        super().__init__()
        self.soft_ratio = soft_ratio
        self.class_loss_weight = class_loss_weight
        self.class_link = class_link
        self.balance_pairs = balance_pairs
        self.aux_weight = aux_weight

    def forward(self, scores: PairScores, y: torch.Tensor) -> torch.Tensor:
        """Loss of a step.

        Parameters
        ----------
        scores : PairScores
            Output of the network.
        y : tensor of int, shape (n,), or (2 n^2,) with paired views
            Class of each image or view.
        """
        queries, supports = y.chunk(2) if scores.z.ndim == 1 else (y.unsqueeze(1), y)
        same = queries == supports
        target = same.to(scores.z.dtype)
        weight = self.pair_weights(target)
        patch = F.binary_cross_entropy_with_logits(scores.z, target, weight)
        soft = soft_log_target(target, scores.z.sigmoid(), self.soft_ratio)
        if self.class_link == "affine":
            q = ((1 + scores.k) / 2).clamp(1e-4, 1 - 1e-4)
            # Written out: torch's function stops with an obscure error where q is NaN.
            cosine = -(weight * (soft * q.log() + (1 - soft) * (1 - q).log())).mean()
        else:
            cosine = F.binary_cross_entropy_with_logits(scores.k.sigmoid(), soft, weight)
        loss = (1 - self.class_loss_weight) * patch + self.class_loss_weight * cosine
        if scores.logits is not None:
            labels = y.repeat(len(scores.logits) // len(y))
            loss = loss + self.aux_weight * F.cross_entropy(scores.logits, labels)
        return loss

    def pair_weights(self, target: torch.Tensor) -> torch.Tensor:
        """Weights of mean 1: equal, or such that positive and negative pairs have a half each."""
        if not self.balance_pairs:
            return torch.ones_like(target)
        positive = target.mean().clamp(1e-6, 1 - 1e-6)
        return 0.5 * (target / positive + (1 - target) / (1 - positive))


STRATEGIES = ("random", "all", "medoid")


class SupportBank(Declaring, BaseEstimator):
    """Which training images of a class are its supports.

    Parameters
    ----------
    strategy
        Random draws, every training image, or the images closest to their class's mean embedding.
    n
        Supports per class and draw; a smaller class gives all its images. "all" knows no limit.
    n_draws
        Random draws that are averaged.
    """

    strategy: str = parameter(one_of(*STRATEGIES), default="random", positional=True)
    n: int = parameter(integers(1), default=10, search=(3, 30))
    n_draws: int = parameter(integers(1), default=5, search=(1, 10))

    def choose(
        self, members: np.ndarray, embedding: torch.Tensor | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choose among the rows of a class.

        Parameters
        ----------
        members : ndarray of int
            Its rows.
        embedding : tensor of shape (n_rows, d) or None
            Class embeddings of all rows, for "medoid".
        rng : numpy.random.Generator
            For random draws.

        Returns
        -------
        rows : ndarray of int
            The supports among them.
        weights : ndarray of float
            Share of each in the mean score of the class.
        """
        n = min(self.n, len(members))
        counts = np.ones(len(members), dtype=int)
        if self.strategy == "random":
            # The mean over draws of a draw's mean score is a weighted mean over their union.
            draws = [rng.choice(members, n, replace=False) for _ in range(self.n_draws)]
            members, counts = np.unique(draws, return_counts=True)
        elif self.strategy == "medoid":
            assert embedding is not None
            centre = embedding[members].mean(dim=0, keepdim=True)
            nearness = class_cosines(embedding[members], centre)[:, 0]
            members, counts = members[nearness.topk(n).indices.cpu().numpy()], counts[:n]
        return members, counts / counts.sum()


def resolve_bank(bank: Any) -> SupportBank:
    """Turn what a user may pass as `bank` into its settings."""
    return SupportBank(bank) if isinstance(bank, str) else bank


def _log_odds(scores: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Log-odds of one class against all others, from log scores (n, n_classes) up to a constant."""
    others = scores.scatter(1, label[:, None], -torch.inf).logsumexp(dim=1)
    return scores.gather(1, label[:, None])[:, 0] - others


class CSSNClassifier(BaseImageClassifier):
    """Cross-Supervision Similarity Network: classify by comparing with labelled supports.

    One binary scorer learns "same class?" on all ordered pairs of a class-balanced batch; an image
    gets the class whose support images it resembles most. The class prior enters neither training
    nor decision, which is why the method suits small, imbalanced sets with few classes.

    Parameters
    ----------
    lam
        Weight of the class token added to each patch.
    soft_ratio
        Softness r of the class branch's target; 0 gives hard targets.
    class_loss_weight
        Weight w of the class branch; published: 0.01.
    class_link
        How the class cosine becomes a probability; "double_sigmoid" is the published form.
    reference
        Second image fused into the patches: none, the image itself (published for single images; it
        takes time and changed nothing we measured), or a registered one (before and after
        treatment, say): "paired" reads X as ``(n, 2, ...)``, image and reference stacked.
    n_tokens
        Upper limit of patch tokens per image; more are pooled. The published network has 196.
    dropout
        In the head; published: 0.1, which takes time and changed nothing we measured.
    pair_weighting
        "balanced" gives positive and negative pairs the same total weight, which matters with more
        than two classes; None is published.
    aux_weight
        Weight of an auxiliary cross-entropy on the class token; "auto": 2 for more than two
        classes, else 0.
    decision
        "patch": the class of highest mean patch probability, as published; "combined": times the
        probability of the auxiliary classifier; "auto": combined where there is one.
    pair_view
        Augment each image twice per step, once as query and once as support, or afresh for every
        member of every pair: 2 n or the published 2 n^2 encodings for the same n^2 pairs.
    bank
        Which training images are supports: "random" draws, "all", or those closest to their class's
        mean ("medoid"); or a :class:`~sklearn_medimb.methods.SupportBank`, which says how many.
    symmetric
        Whether to average z(q, s) and z(s, q) at predict.
    batch_size
        n, images per step; "auto" is 32 (16 for vectors), at least two per class. Below 16 training
        from scratch fails: there are too few pairs.

    Attributes
    ----------
    support_indices_
        Rows of X in the support bank, once for each view that predictions average. Images that
        `sampler` made are supports, with the number -1, only where their class has no others.
    support_codes_
        Their classes, as positions in ``classes_``.
    support_weights_
        Share of each support in its class's mean score.
    support_patches_
        Their pooled patches.
    support_embeddings_
        Their class embeddings.

    See Also
    --------
    SoftmaxClassifier : The same network with a softmax head and the classical losses.

    Notes
    -----
    Stated by the paper's abstract and the authors' code: the head, the pairs, the losses, the
    inference by summed patch scores. Ours: any backbone, two views per image instead of two per
    pair, mean instead of sum over supports, averaged support draws, balanced pair weights, w = 0.5,
    and for more than two classes an auxiliary classifier in loss and decision, without which
    training from scratch falls behind cross-entropy there. The gate with the image itself brought
    nothing that we could measure; `published` has it as it was. On real images CSSN was ahead of
    plain cross-entropy and level with the same network under oversampling, class weights or logit
    adjustment: compare them. Label-free pre-training on the same images (`pretrain`) did
    not help either: with time to spare, raise `max_epochs`.
    Probabilities are shares of similarity, not calibrated. There is no ``sample_weight`` and no
    ``class_weight``: batches and supports are balanced by class. There is no ``partial_fit``: the
    support bank needs all classes' images at once; ``warm_start`` goes on from present weights.

    References
    ----------
    .. [1] X. Gao et al., "Cross-Supervision Similarity Network for Medical Image Classification on
       Imbalanced Small Datasets", IEEE Trans. Medical Imaging, 2026.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_medimb import CSSNClassifier
    >>> X, y = load_digits(n_class=2, return_X_y=True)
    >>> clf = CSSNClassifier(image_shape=(8, 8), max_epochs=2, random_state=0).fit(X[:200], y[:200])
    >>> clf.similarity(X[200:]).shape
    (160, 2)
    """

    lam: float = parameter(at_least(0), default=3.0, search=(0.3, 10.0, "log"))
    soft_ratio: float = parameter(within(0, 1), default=0.7, search=(0.0, 1.0))
    class_loss_weight: float = parameter(within(0, 1), default=0.5, search=(0.01, 0.9))
    class_link: str = parameter(one_of("affine", "double_sigmoid"), default="affine", search=True)
    reference: str = parameter(
        one_of("none", "self", "paired"), default="none", search=["none", "self"]
    )
    n_tokens: int = parameter(integers(4), default=16, search=(4, 64, "log"))
    dropout: float = parameter(within(0, 1, closed="left"), default=0.0, search=(0.0, 0.5))
    pair_weighting: str | None = parameter(
        one_of("balanced"), None, default="balanced", search=True
    )
    aux_weight: Any = parameter(
        at_least(0), one_of("auto"), default="auto", search=["auto", 0.0, 0.5, 2.0]
    )
    decision: str = parameter(one_of("auto", "patch", "combined"), default="auto", search=True)
    pair_view: str = parameter(one_of("image", "pair"), default="image")
    bank: Any = parameter(
        one_of(*STRATEGIES),
        SupportBank,
        default="random",
        kind='{"random", "all", "medoid"} or SupportBank',
        search=list(STRATEGIES),
    )
    symmetric: bool = parameter("boolean", default=False, search=True)
    batch_size: Any = parameter(
        integers(2), one_of("auto"), default="auto", search=["auto", 16, 32, 64]
    )

    support_indices_: np.ndarray = learned("ndarray of int of shape (n_supports,)", predicts=True)
    support_codes_: np.ndarray = learned("ndarray of int of shape (n_supports,)", predicts=True)
    support_weights_: np.ndarray = learned("ndarray of float of shape (n_supports,)", predicts=True)
    support_patches_: np.ndarray = learned(
        "ndarray of float of shape (n_supports, L // 2, C)", predicts=True
    )
    support_embeddings_: np.ndarray = learned(
        "ndarray of float of shape (n_supports, C)", predicts=True
    )

    # Elements of similarity maps in memory at a time, at predict.
    _chunk_elements = 2**23

    @classmethod
    def published(cls, **params: Any) -> CSSNClassifier:
        """Make a classifier with the settings of the authors' code.

        ViT-S/16 at 224 pixels with stochastic depth 0.5, 8 images a step, fresh views for every
        pair, w = 0.01, the double sigmoid, 196 tokens, Adam at 1e-5 (backbone) and 1e-3 (head)
        over 70 epochs, one draw of 10 supports per class. It presumes pre-trained weights:
        ``published(backbone=ViT.small(drop_path=0.5, weights=path))``, or a backbone that has them,
        such as "efficientnet_lite0", all of whose weights are then trained.

        What differs: batches are class-balanced exactly, theirs on average (weighted draws with
        replacement), and no image comes twice before all of its class came once; epochs have the
        nearest number of whole batches, theirs drop an incomplete last one. Cosine annealing ends
        at 0, theirs at a fifth of the rate. Rotation acts on every image, theirs on 7 of 10;
        contrast, saturation and brightness vary evenly, with the spread of theirs, which change 4
        images of 10; brightness shifts, theirs multiplies. Channels are normalised by the training
        images, theirs by mean 0.46 and deviation 0.1582, and grey images keep their one channel,
        theirs have three. Image and reference are one pass where they are the same image, theirs
        two with dropout of their own. The score is the mean over a class's supports, theirs the
        sum: the same where all classes have 10 images. The last epoch is kept, theirs the best on
        the data that is tested on. Supports are drawn from the seed; their test values are means
        over five such draws: ``bank=SupportBank(n_draws=5)`` averages the scores instead.

        Parameters
        ----------
        **params
            Further constructor parameters; they take precedence.

        Returns
        -------
        classifier : CSSNClassifier
            Not fitted.
        """
        from sklearn_medimb.augment import Augmentation
        from sklearn_medimb.backbones import ViT

        settings: dict[str, Any] = {
            "backbone": ViT.small(drop_path=0.5),
            "class_loss_weight": 0.01,
            "class_link": "double_sigmoid",
            "reference": "self",
            "n_tokens": 196,
            "dropout": 0.1,
            "pair_weighting": None,
            "aux_weight": 0.0,
            "pair_view": "pair",
            "bank": SupportBank(n_draws=1),
            "augment": Augmentation(
                horizontal_flip=0.5,
                vertical_flip=0.5,
                rotation=10.0,
                saturation=0.3,
                contrast=0.3,
                brightness=0.15,
            ),
            "batch_size": 8,
            "max_epochs": 70,
            "lr": 1e-3,
            "fine_tune": "full",
            "backbone_lr": 0.01,
            "ema": None,
            "n_views": 1,
            "weight_decay": 1e-3,
            "lr_schedule": "cosine",
            "precision": "float32",
            "net_params": {"optimizer": torch.optim.Adam},
        }
        return cls(**{**settings, **params})

    # ---------------------------------------------------------------- network, loss, batches

    def _auxiliary_weight(self) -> float:
        if self.aux_weight == "auto":
            return 0.0 if len(self.classes_) == 2 else 2.0
        return self.aux_weight

    _patience_when_held = 1  # its head is a network of its own
    _decay_when_held = None

    def _check_parameters(self) -> None:
        super()._check_parameters()
        resolve_bank(self.bank)._validate_params()
        if self.reference == "paired" and self.pretrain is not None:
            raise ValueError(
                'reference="paired" stacks two images, which encoders do not read: pre-train on '
                "single images and pass the fitted encoder's backbone_ as backbone=."
            )

    def _make_network(self, trunk: Callable[..., Trunk]) -> nn.Module:
        channels, *sides = self.image_shape_
        paired = self.reference == "paired"
        return CSSNNetwork(
            trunk((channels // 2, *sides)) if paired else trunk(),
            max_tokens=self.n_tokens,
            reference=self.reference,
            n_classes=len(self.classes_),
            auxiliary=self._auxiliary_weight() > 0,
            paired_views=self.pair_view == "pair",
            lam=self.lam,
            dropout=self.dropout,
        )

    def _make_criterion(self, train: TrainingSet, n_steps: int) -> Criterion:
        return CSSNLoss(
            soft_ratio=self.soft_ratio,
            class_loss_weight=self.class_loss_weight,
            class_link=self.class_link,
            balance_pairs=self.pair_weighting == "balanced",
            aux_weight=self._auxiliary_weight(),
        )

    def _n_images(self) -> int:
        """n: images per step."""
        if self.batch_size != "auto":
            return self.batch_size
        n = 16 if len(self.image_shape_) == 1 else 32
        return max(n, 2 * len(self.classes_))

    def _steps_per_epoch(self, n_samples: int) -> int:
        return max(1, round(n_samples / self._n_images()))

    def _images_per_step(self, n_samples: int) -> int:
        n = min(self._n_images(), n_samples)
        n_views = 2 * n**2 if self.pair_view == "pair" else 2 * n
        return 2 * n_views if self.reference == "paired" else n_views

    def _make_batches(self, train: TrainingSet, context: Context) -> Batches:
        n = min(self._n_images(), len(train.y))
        n_batches = self._steps_per_epoch(len(train.y))
        pairwise = self.pair_view == "pair"

        def plan(rng: np.random.Generator) -> list[np.ndarray]:
            batches = class_balanced(train.y, n, n_batches, rng)
            if pairwise:  # every member of every ordered pair, queries first
                return [np.concatenate([np.repeat(b, len(b)), np.tile(b, len(b))]) for b in batches]
            return batches

        y = torch.as_tensor(train.y, device=self.net_.device)
        context = replace(context, views=context.views * (1 if pairwise else 2))
        return Batches(train.images, train.rows, y, plan, context)

    # ---------------------------------------------------------------- support bank

    def _inference_state(self, train: TrainingSet) -> dict[str, Any]:
        """Choose the supports and encode each of them once."""
        rng = np.random.default_rng(self.random_seed_)
        origin = train.rows if train.origin is None else train.origin
        bank = resolve_bank(self.bank)
        embedding = None
        if bank.strategy == "medoid":
            embedding = self._encode(train.images, train.rows).embedding
        chosen = []
        for label in range(len(self.classes_)):
            members = np.flatnonzero(train.y == label)
            if (origin[members] >= 0).any():  # images of patients rather than made ones
                members = members[origin[members] >= 0]
            chosen.append(bank.choose(members, embedding, rng))
        rows, weights = (np.concatenate(parts) for parts in zip(*chosen, strict=True))
        views = self._map_views(train.images, self.net_.module_.encode, train.rows[rows])
        n_views = views[0].shape[1]
        encoded = EncodedImages(*(part.transpose(0, 1).flatten(0, 1) for part in views))
        rows = np.tile(rows, n_views)
        return {
            "support_indices_": origin[rows],
            "support_codes_": train.y[rows],
            "support_weights_": np.tile(weights, n_views) / n_views,
            "support_patches_": encoded.patches.contiguous().cpu().numpy(),
            "support_embeddings_": encoded.embedding.contiguous().cpu().numpy(),
        }

    def _encode(self, images: Images, rows: np.ndarray | None = None) -> EncodedImages:
        """Encode images, or some of their rows, each once."""
        return EncodedImages(*self._map(images, self.net_.module_.encode, rows))

    def _check_learned(self, *, tries: bool = True) -> None:
        """Refuse fitted arrays that do not fit together; every class must have supports."""
        super()._check_learned(tries=tries)
        if set(self.support_codes_.tolist()) != set(range(len(self.classes_))):
            raise ValueError("support_codes_ must hold the number of each class, and no other.")

    @property
    def support_labels_(self) -> np.ndarray:
        """Class of each support."""
        return self.classes_[self.support_codes_]

    def _bank(self) -> torch.Tensor:
        """Pooled patches of the supports, on the device of the network."""
        return torch.tensor(self.support_patches_, dtype=self.net_.dtype, device=self.net_.device)

    # ---------------------------------------------------------------- comparison

    def _pair_logits(self, queries: torch.Tensor, supports: torch.Tensor) -> torch.Tensor:
        """Give z of all pairs of encoded patches, (n_q, n_s)."""
        return self._map_logits(self.net_.module_.head.similarity_maps(queries, supports))

    def _map_logits(self, maps: torch.Tensor) -> torch.Tensor:
        """Give z of similarity maps; the swapped pair's map is the transposed one."""
        head = self.net_.module_.head
        z = head.patch_logits(maps)
        return (z + head.patch_logits(maps.transpose(-2, -1))) / 2 if self.symmetric else z

    def _chunk_rows(self, n_maps: int) -> int:
        """How many rows, with so many similarity maps each, fit in memory at a time."""
        return max(1, self._chunk_elements // (n_maps * self.support_patches_.shape[1] ** 2))

    def _comparison(
        self, *, in_chunks: bool = True, combined: bool | None = None
    ) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Map from images to class scores, z of the pairs with all supports, and patches.

        A class score is the log similarity, plus the auxiliary classifier's log-probability where
        it takes part.
        """
        module, bank = self.net_.module_, self._bank()
        if combined is None:
            combined = module.classifier is not None and self.decision != "patch"
        shares = torch.as_tensor(
            np.log(self.support_weights_), dtype=bank.dtype, device=bank.device
        )
        members = [
            torch.as_tensor(np.flatnonzero(self.support_codes_ == k), device=bank.device)
            for k in range(len(self.classes_))
        ]

        def forward(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            encoded = module.encode(batch)
            chunks = (encoded.patches,)
            if in_chunks:
                chunks = encoded.patches.split(self._chunk_rows(len(bank)))
            z = torch.cat([self._pair_logits(part, bank) for part in chunks])
            log_p = F.logsigmoid(z) + shares
            scores = torch.stack([log_p[:, rows].logsumexp(1) for rows in members], 1)
            if combined:
                scores = scores + F.log_softmax(module.classifier(encoded.token), dim=1)
            return scores, z, encoded.patches

        return forward

    def _score_function(
        self, *, in_chunks: bool = True, combined: bool | None = None
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Log similarity, plus the auxiliary classifier's log-probability where it takes part."""
        forward = self._comparison(in_chunks=in_chunks, combined=combined)
        return lambda batch: forward(batch)[0]

    def similarity(self, X: Any) -> np.ndarray:
        """Mean probability of being of one class with each class's supports.

        Parameters
        ----------
        X : array-like or lazy sequence of n images
            In any layout that ``fit`` accepts.

        Returns
        -------
        similarity : ndarray of shape (n, n_classes)
            Values in (0, 1); rows need not sum to 1. With ``decision="patch"`` `predict` takes the
            largest.
        """
        check_is_fitted(self)
        log_p = self._map_views(self._read(X), self._score_function(combined=False))
        return log_p.double().exp().mean(dim=1).cpu().numpy()

    def pair_proba(self, XA: Any, XB: Any) -> np.ndarray:
        """Probability that the i-th image of `XA` and the i-th of `XB` are of one class.

        Parameters
        ----------
        XA, XB : array-like or lazy sequences of n images
            In any layout that ``fit`` accepts.

        Returns
        -------
        p : ndarray of shape (n,)
            ``sigmoid(z(a_i, b_i))``; not symmetric unless ``symmetric=True``.
        """
        maps = self._maps_of_pairs(XA, XB)
        with torch.inference_mode(), one_thread_in_workers():
            return self._map_logits(maps).sigmoid().cpu().numpy()

    def patch_similarity(self, XA: Any, XB: Any) -> np.ndarray:
        """Similarities M of the patches of the i-th image of `XA` with those of the i-th of `XB`.

        What the published scorer reads, squared (steps 7 to 9 of the paper's head). It shows what
        the comparison is made of, not why it came out so: every patch holds `lam` times the class
        token, so that M is nearly one number for images of one class, and the scorer's gradient
        times M looks the same whatever the image. It is a fingerprint of the network. For evidence
        use :meth:`explain`.

        Parameters
        ----------
        XA, XB : array-like or lazy sequences of n images
            In any layout that ``fit`` accepts.

        Returns
        -------
        maps : ndarray of shape (n, L // 2, L // 2)
            Patches of `XA` on axis 1, of `XB` on axis 2. Patch i is the mean of the tokens 2 i and
            2 i + 1 of the backbone's grid, pooled to `n_tokens` at most, in raster order.
        """
        return self._maps_of_pairs(XA, XB).cpu().numpy()

    def _maps_of_pairs(self, XA: Any, XB: Any) -> torch.Tensor:
        check_is_fitted(self)
        a, b = (self._encode(self._read(X)).patches for X in (XA, XB))
        check_consistent_length(a, b)
        with torch.inference_mode(), one_thread_in_workers():
            return a @ b.transpose(1, 2)

    def explain(
        self, X: Any, n_neighbors: int = 3, *, supports: Any = None, n_places: int = 100
    ) -> Evidence:
        """Which supports speak for and against each query's class, and which places of the images.

        Occlusion [1]_: a grid of boxes tiles the image, each box in turn is replaced with the
        image's own mean colour (vectors: the training mean), and the image is classified anew. A
        place counts by how much the log-odds of the predicted class fall, exactly as `predict`
        computes them, and those of each neighbour likewise. So the maps depend on the image and
        on all weights. They say what the classifier uses, not what a disease looks like; and
        two places that can stand in for one another are both small. With `image_size`, boxes are
        in pixels of the resized image.

        Parameters
        ----------
        X : array-like or lazy sequence of n images
            The queries, in any layout that ``fit`` accepts.
        n_neighbors : int, default=3
            m, supports of each class.
        supports : array-like or lazy sequence of images, default=None
            X of ``fit``, all its rows: the classifier keeps no images. Only those of the
            neighbours are read. None leaves out the maps of the supports.
        n_places : int, default=100
            Largest number of boxes: 10 x 10 for squares, 4 x 4 x 4 for cubes. An image takes as
            many forward passes; finer boxes find smaller things, and miss what none of them alone
            changes.

        Returns
        -------
        evidence : Evidence
            Maps, boxes in pixels, and neighbours of each class.

        Raises
        ------
        ValueError
            If a parameter is out of range, or `supports` are not the images of ``fit``.

        References
        ----------
        .. [1] M. D. Zeiler, R. Fergus, "Visualizing and understanding convolutional networks",
           ECCV 2014, section 4.2.

        Examples
        --------
        >>> from sklearn_medimb import CSSNClassifier
        >>> from sklearn_medimb.datasets import make_lesions
        >>> data = make_lesions([12, 6], image_size=16, random_state=0)
        >>> clf = CSSNClassifier(max_epochs=1, random_state=0).fit(data.images, data.target)
        >>> evidence = clf.explain(data.images[:4], supports=data.images)
        >>> evidence
        Evidence(4 queries, 10 x 10 places, 3 nearest supports of each of 2 classes, maps of both)
        >>> evidence.boxes.shape, evidence.support_boxes.shape
        ((4, 2, 2), (4, 2, 3, 2, 2))
        """
        check_is_fitted(self)
        most = np.bincount(self.support_codes_).max()
        if not isinstance(n_neighbors, Integral) or not 1 <= n_neighbors <= most:
            raise ValueError(
                f"n_neighbors={n_neighbors!r} must be an integer from 1 to the number of supports "
                f"of a class, {most}."
            )
        images, places = self._read(X), Places(self.image_shape_, n_places)
        bank_images = None if supports is None else self._read(supports)
        compare, members = self._comparison(), self._members()
        block = inference_block(self.image_shape_, torch.device(self.net_.device))

        def measure(batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
            scores, z, patches = compare(batch)
            best = scores.argmax(dim=1)
            near_z, near = z[:, None].masked_fill(~members, -torch.inf).topk(n_neighbors)
            present = near_z.isfinite()
            near_z = near_z.where(present, 0.0)

            def left(images: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
                scores, z, _ = compare(images)
                log_odds = _log_odds(scores, best[rows])
                return torch.cat([log_odds[:, None], z.gather(1, near.flatten(1)[rows])], dim=1)

            log_odds = _log_odds(scores, best)
            whole = torch.cat([log_odds[:, None], near_z.flatten(1)], dim=1)
            falls = whole[..., None] - places.without_each(batch, block, left).transpose(1, 2)
            near_falls = falls[:, 1:].unflatten(1, near.shape[1:])
            return best, log_odds, falls[:, 0], near, near_z, present, near_falls, patches

        measured = self._map(images, measure)
        best, log_odds, falls, near, near_z, present, near_falls, patches = measured
        indices = np.where(present.cpu().numpy(), self.support_indices_[near.cpu().numpy()], -1)
        support_maps = None
        if bank_images is not None:
            known = torch.as_tensor(indices >= 0, device=near.device)
            with torch.inference_mode(), one_thread_in_workers():
                support_maps = self._support_falls(bank_images, places, patches, near, known)
        as_maps = lambda falls: falls.unflatten(-1, places.grid).cpu().numpy()  # noqa: E731
        return Evidence(
            classes=self.classes_,
            predicted=self.classes_[best.cpu().numpy()],
            log_odds=log_odds.cpu().numpy(),
            maps=as_maps(falls),
            places=places.boxes,
            indices=indices,
            scores=near_z.sigmoid().where(present, torch.nan).cpu().numpy(),
            query_maps=as_maps(near_falls.where(present[..., None], torch.nan)),
            support_maps=None if support_maps is None else as_maps(support_maps),
        )

    def _members(self) -> torch.Tensor:
        """Supports of each class, (n_classes, n_supports); of a repeated row the first one only."""
        _, first = np.unique(self.support_indices_, return_index=True)
        distinct = self.support_indices_ < 0
        distinct[first] = True
        members = (self.support_codes_ == np.arange(len(self.classes_))[:, None]) & distinct
        return torch.as_tensor(members, device=self.net_.device)

    def _support_falls(
        self,
        images: Images,
        places: Places,
        queries: torch.Tensor,
        near: torch.Tensor,
        known: torch.Tensor,
    ) -> torch.Tensor:
        """By how much z falls without each place of the support, (n, K, m, n_places).

        `near` (n, K, m) numbers supports, `known` says which of these are images of `images`.
        Every support is encoded once, for all the queries that it is near.
        """
        falls = queries.new_full((near.numel(), len(places)), torch.nan)
        pairs = known.flatten().nonzero()[:, 0]
        supports, which = near.flatten()[pairs].unique(return_inverse=True)
        pairs, which = pairs[which.argsort(stable=True)], which.sort().values
        rows = self.support_indices_[supports.cpu().numpy()]
        ends = torch.searchsorted(which, torch.arange(len(rows) + 1, device=which.device)).tolist()
        if rows.max(initial=-1) >= len(images):
            raise ValueError(
                f"supports holds {len(images)} images, but support {rows.max()} is a neighbour: "
                "pass the X of fit, with all its rows."
            )
        prepare, encode, bank = self._preprocessor(), self.net_.module_.encode, self._bank()
        block = inference_block(self.image_shape_, prepare.device)

        def measure(part: slice) -> torch.Tensor:
            batch = prepare(images.rows(rows[part]))
            whole = encode(batch).patches
            stored = bank[supports[part]]
            odd = (whole - stored).flatten(1).norm(dim=1) > 0.1 * stored.flatten(1).norm(dim=1)
            if odd.any():  # bfloat16 elsewhere moves patches by .02, another image by .3
                row = rows[part][odd.cpu().numpy()][0]
                raise ValueError(
                    f"supports[{row}] is not the image that this classifier compares with: pass "
                    "the X of fit, with all its rows in their order."
                )
            without = places.without_each(batch, block, lambda some, _: encode(some).patches)
            without = torch.cat([whole[:, None], without], dim=1)
            own = slice(ends[part.start], ends[part.stop])
            query, support = pairs[own] // near[0].numel(), which[own] - part.start
            size = self._chunk_rows(without.shape[1])
            z = torch.cat(
                [
                    self._map_logits(torch.einsum("ilc,ipmc->iplm", queries[q], without[s]))
                    for q, s in zip(query.split(size), support.split(size), strict=True)
                ]
            )
            return z[:, :1] - z[:, 1:]

        if len(rows):
            falls[pairs] = in_blocks(len(rows), block, measure)
        return falls.view(*near.shape, len(places))
