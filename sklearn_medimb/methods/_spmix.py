"""SPMix and TailBoost: saliency-guided mixing of patches inside the network.

J. Wei et al., "Saliency-guided and Patch-based Mixup for Long-tailed Skin Cancer Image
Classification", arXiv 2406.10801, 2024; its extension TailBoost is Sensors 26(11), 3343, 2026.

A rare image keeps its label and what is salient; common background is borrowed, patch by patch,
from a partner:

    r = min(cap, max(s_t, s_h)),    mixed_i = r_i e_i(x_t) + (1 - r_i) e_i(x_h)

with saliency s and the embedding e_i of patch i. TailBoost adds supervised contrast with class
centres (GPaCo). The file reads so: mixing network, estimator; pairs are in
`_spmix_pairs`, contrast in `_tailboost`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from sklearn_medimb._data.batches import Context
from sklearn_medimb._data.cached import CachedImages
from sklearn_medimb._data.images import warn_of_flat_images
from sklearn_medimb._data.layout import as_pixels
from sklearn_medimb._data.plans import class_balanced, n_batches, shuffled
from sklearn_medimb._parameters import one_of, parameter, within
from sklearn_medimb._training.criterion import Criterion, LabelCriterion
from sklearn_medimb._training.network import SoftmaxNetwork, Trunk
from sklearn_medimb._training.stage import TrainingSet
from sklearn_medimb.base._one_stage import OneStageClassifier
from sklearn_medimb.losses import LOSSES, CrossEntropyLoss, resolve_loss
from sklearn_medimb.methods._spmix_pairs import MixedViews, Partners, pooled
from sklearn_medimb.methods._tailboost import (
    Contrast,
    ContrastLoss,
    kind_of_contrast,
    resolve_contrast,
)
from sklearn_medimb.mixing import spmix, spmix_ratio
from sklearn_medimb.saliency import DETECTORS, SaliencyMap, maps_of, saliency_maps

# ---------------------------------------------------------------- mixing network


class MixedOutput(NamedTuple):
    """Features and logits of the mixed images; the key view as it came, for a key encoder."""

    features: torch.Tensor
    logits: torch.Tensor
    keys: dict[str, torch.Tensor]


class MixingNetwork(SoftmaxNetwork):
    """Softmax network that mixes images with partners at the output of one of its layers.

    Parameters
    ----------
    trunk : Trunk
        The backbone.
    head : callable
        Number of features to a head.
    layer : str or None
        Name of the backbone's layer, "auto", or None to mix the images themselves.
    standardised : bool, default=False
        Whether features will be standardised.
    """

    def __init__(
        self,
        trunk: Trunk,
        head: Callable[[int], nn.Module],
        layer: str | None,
        standardised: bool = False,
    ) -> None:
        super().__init__(trunk, head, standardised=standardised)
        self.layer = default_layer(trunk.backbone) if layer == "auto" else layer
        self.encoded_grid = tuple(trunk.probe().shape[2:])  # of a frozen trunk its output is mixed
        trunk.divisible = self.layer is None
        sides = as_pixels(torch.empty(1, *trunk.input_shape)).shape[2:]
        self.patch: tuple[int, ...] = (1,) * len(sides)
        if self.layer is None:  # about 14 patches along the shorter side, as published
            self.patch = tuple(min(max(1, round(min(sides[-2:]) / 14)), side) for side in sides)
            self.grid = tuple(-(-s // p) for s, p in zip(sides, self.patch, strict=True))
        else:
            self.grid = self._grid(self.layer, tuple(sides))

    @property
    def encoded(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Whole output of the trunk, which is then mixed in the place of an inner layer's."""
        return self.trunk

    def _grid(self, layer: str, sides: tuple[int, ...]) -> tuple[int, ...]:
        """Patches along each axis of what the layer gives."""
        backbone, seen = self.trunk.backbone, []
        try:
            module = backbone.get_submodule(layer)
        except AttributeError:
            names = [name for name, _ in backbone.named_children()]
            raise ValueError(
                f"mix_layer={layer!r} is no layer of {type(backbone).__name__}, which has {names}; "
                'choose one, or level="image".'
            ) from None
        with module.register_forward_hook(lambda _m, _args, out: seen.append(out)):
            self.trunk.probe()
        if len(seen) > 1:
            raise ValueError(f"mix_layer={layer!r} runs {len(seen)} times: choose another layer.")
        shape = tuple(seen[0].shape) if seen and isinstance(seen[0], torch.Tensor) else ()
        if len(shape) in (4, 5):
            return shape[2:]
        grid = getattr(backbone, "grid", None) or _nearest_grid(shape[1], sides) if shape else None
        if len(shape) == 3 and grid and math.prod(grid) == shape[1]:
            return tuple(grid)
        raise ValueError(
            f"mix_layer={layer!r} gives {shape or 'no tensor'}, which is neither a map (n, C, H, "
            'W) nor a grid of tokens (n, L, C): choose another layer, or level="image".'
        )

    def forward(  # type: ignore[override]
        self,
        images: torch.Tensor,
        ratio: torch.Tensor | None = None,
        partners: torch.Tensor | None = None,
        others: torch.Tensor | None = None,
        **keys: torch.Tensor,
    ) -> MixedOutput:
        """Features and logits; images without a share, at predict all, pass unmixed."""
        if keys and partners is not None:
            keys["key_partners"] = partners
        if ratio is None or partners is None:
            features = self.features(images)
        else:
            rows = images if others is None else torch.cat([images, others])
            mix = partial(self.mix, ratio=ratio, partners=partners, n=len(images))
            if self.layer is None or self.trunk.given_encoded:
                features = self.features(mix(rows))
            else:
                layer = self.trunk.backbone.get_submodule(self.layer)
                with layer.register_forward_hook(lambda _m, _args, out: mix(out)):
                    features = self.features(rows)
        return MixedOutput(features, self.head(features), keys)

    def mix(
        self, rows: torch.Tensor, ratio: torch.Tensor, partners: torch.Tensor, n: int
    ) -> torch.Tensor:
        """Mix the first m images of each view with their partners in the same view.

        What comes after the n images of all views, those that only lend, ends here.
        """
        n_views, n_mixed = len(ratio) // len(partners), len(partners)
        how = self.patch, self.grid
        if self.trunk.given_encoded:
            how = (1,) * len(self.encoded_grid), self.encoded_grid
        parts: list[torch.Tensor] = []
        views = rows[:n].chunk(n_views), rows[n:].tensor_split(n_views), ratio.chunk(n_views)
        for x, others, r in zip(*views, strict=True):
            x_h = (torch.cat([x, others]) if len(others) else x)[partners]
            parts += [_mixed(x[:n_mixed], x_h, r, *how), x[n_mixed:]]
        return torch.cat(parts)


def _mixed(
    x_t: torch.Tensor,
    x_h: torch.Tensor,
    ratio: torch.Tensor,
    patch: tuple[int, ...],
    grid: tuple[int, ...],
) -> torch.Tensor:
    if x_t.ndim == 3 and len(grid) > 1 and x_t.shape[1] == math.prod(grid):  # tokens
        return spmix(x_t, x_h, ratio)
    pixels = spmix(as_pixels(x_t), as_pixels(x_h), ratio, patch)
    return pixels.view_as(x_t) if x_t.ndim == 2 else pixels


def _nearest_grid(n: int, sides: tuple[int, ...]) -> tuple[int, ...] | None:
    """Grid (h, w) of n tokens whose aspect is that of a 2-D image."""
    if len(sides) != 2:
        return None
    grids = [(h, n // h) for h in range(1, n + 1) if n % h == 0]
    aspect = math.log(sides[0] / sides[1])
    return min(grids, key=lambda grid: abs(math.log(grid[0] / grid[1]) - aspect))


def default_layer(backbone: nn.Module) -> str:
    """Where to mix unless told: patch tokens, else the third stage of a convolutional network.

    The published hybrid mixes after the third stage of a ResNet; of a stack with fewer blocks the
    last but one is taken.
    """
    children = dict(backbone.named_children())
    for name in ("patch_embed", "layer3"):
        if name in children:
            return name
    if isinstance(stages := children.get("stages"), nn.Sequential) and len(stages) > 4:
        return f"stages.{len(stages) - 3}"  # of an EfficientNet: the last at stride 16
    if isinstance(backbone, nn.Sequential) and not isinstance(backbone[0], nn.Flatten):
        return list(children)[min(2, max(len(backbone) - 2, 0))]
    raise ValueError(
        f'mix_layer="auto" knows no layer of {type(backbone).__name__} to mix at: name one of '
        f'{list(children)}, or choose level="image".'
    )


# ---------------------------------------------------------------- the estimator


class SPMixClassifier(OneStageClassifier):
    """A network that mixes rare images with others inside, patch by patch, as saliency allows.

    Batches are drawn evenly from all classes, and partners as often as their classes are in the
    data. Where either is salient the base prevails, elsewhere the partner enters; the label is that
    of the base [1]_. At predict nothing is mixed and no saliency is computed.

    Parameters
    ----------
    pairing
        "paper": class-balanced bases, natural partners. "code", the published direction: natural
        bases, class-balanced partners; then `loss` has to make up for the imbalance.
    level
        Mix inside the network, as published, or the images themselves.
    mix_layer
        Layer of the backbone after which tokens or maps are mixed; "auto": the patch embedding of a
        ViT or hybrid, before positions and class token, or the third stage of a conv net or ResNet.
    mix_prob
        Share of the bases that are mixed; 1 is published, but then training never sees an image as
        it will be at predict.
    cap
        Largest share of a base.
    floor
        Smallest share; None: that of :class:`~sklearn_medimb.SPMixSampler`.
    merge
        Whether saliency is averaged over patches before or after it is merged.
    partner_saliency
        Whether the partner's saliency counts too.
    saliency
        Where an image is salient: a detector by name, with its defaults, or a
        :class:`~sklearn_medimb.SaliencyMap`, such as ``SaliencyMap(polarity="dark")``.
    contrast
        Contrast of two views beside the labels, by name or as a
        :class:`~sklearn_medimb.methods.Contrast`: supervised contrastive loss [3]_, or GPaCo [4]_,
        where class centres, corrected by class frequency, and samples share one softmax. "gpaco"
        takes the place of `loss`.
    batch_size
        Images per step; with contrast at least 2.
    loss
        As in :class:`~sklearn_medimb.SoftmaxClassifier`; class frequencies in it are those of the
        bases, which are equal with ``pairing="paper"``.

    See Also
    --------
    SPMixSampler : The image form, as an imbalanced-learn sampler.
    SoftmaxClassifier : The same network and losses without mixing.

    Notes
    -----
    Partners come from the same batch where it holds another image of their class: there they are
    encoded anyway, so that mixing costs next to nothing at any layer. Of classes that the batch
    lacks one is brought along and encoded up to the mix; the published code does so for every
    image. No class is a partner more or less often than `pairing` says, but for that of a base that
    has no other image. Saliency maps are
    computed once per training image, kept at twice the resolution of the mix, and moved by the same
    flips and warps as their images (an augmentation of one's own must name its draws as
    :class:`~sklearn_medimb.augment.Augmentation` does). There is no ``sample_weight`` and no
    ``partial_fit``: bases are drawn by class.
    On synthetic lesions (``benchmarks/spmix_lesions.py``) it gains a little on class-balanced
    batches, more with ``SaliencyMap(polarity="dark")``, which suits lesions darker than their
    surround; on real images (``benchmarks/spmix_real.py``) it is level with them. cap and floor
    were not tuned.
    Images are clipped to their quantiles of 0.5 % and 99.5 % before their maps are computed, so
    that a finding that covers less stands out less than in :class:`SaliencyMap` of uint8 images.
    Where the layer has a single patch, the share is the floor everywhere: plain mixup.
    As ``r <= cap < 1`` a part of the partner's lesion enters too. The article names neither the
    saliency detector nor cap and floor; the values are those of the published code, which pairs the
    other way round, scores keys with the logits of queries, and starts its queue with random
    vectors: the first is an option here, the others are mended.

    References
    ----------
    .. [1] J. Wei et al., "Saliency-guided and Patch-based Mixup for Long-tailed Skin Cancer Image
       Classification", arXiv 2406.10801, 2024.
    .. [2] J. Wei et al., "TailBoost: tail-synthetic learning for boosting long-tailed skin cancer
       image classification", Sensors 26(11), 3343, 2026.
    .. [3] P. Khosla et al., "Supervised contrastive learning", NeurIPS 2020.
    .. [4] J. Cui et al., "Generalized parametric contrastive learning", IEEE TPAMI 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn_medimb import SPMixClassifier
    >>> rng = np.random.default_rng(0)
    >>> X = rng.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    >>> y = np.array(["nevus"] * 20 + ["melanoma"] * 4)
    >>> clf = SPMixClassifier(max_epochs=2, random_state=0).fit(X, y)
    >>> clf.class_prior_
    array([0.5, 0.5])
    """

    pairing: str = parameter(one_of("paper", "code"), default="paper", search=True)
    level: str = parameter(one_of("token", "image"), default="token", search=True)
    mix_layer: str = parameter(str, default="auto")
    mix_prob: float = parameter(within(0, 1), default=0.5, search=(0.0, 1.0))
    cap: float = parameter(within(0, 1), default=0.8, search=(0.5, 1.0))
    floor: float | None = parameter(within(0, 1), None, default=None, search=[None, 0.0, 0.25, 0.5])
    merge: str = parameter(one_of("patch", "pixel"), default="patch", search=True)
    partner_saliency: bool = parameter("boolean", default=True, search=True)
    saliency: Any = parameter(
        one_of(*DETECTORS),
        SaliencyMap,
        callable,
        default="fine_grained",
        kind='{"fine_grained", "spectral_residual", "center"}, SaliencyMap or callable',
        search=list(DETECTORS),
    )
    contrast: Any = parameter(
        one_of("gpaco", "supcon"),
        Contrast,
        None,
        default=None,
        kind='{"gpaco", "supcon"}, Contrast or None',
    )
    loss: Any = parameter(
        *OneStageClassifier._parameter_constraints["loss"],
        default="cross_entropy",
        kind="str, Loss or callable",
        search=lambda clf: None if kind_of_contrast(clf.contrast) == "gpaco" else list(LOSSES),
    )

    @classmethod
    def tailboost(cls, **params: Any) -> SPMixClassifier:
        """Make TailBoost (2026): a hybrid ViT, GPaCo and SPMix, close to its code.

        ResNet-50 up to stride 16 before eight transformer blocks of width 768, projections of
        256, 16 images a step, AdamW at 5e-6 with a weight decay of 0.1 over 500 epochs of cosine
        annealing, every image mixed, natural bases with class-balanced partners from all training
        images. It presumes pre-trained weights and images of 224 pixels; for training from scratch
        raise `lr`. Another backbone, such as "efficientnet_lite0", is trained likewise, all of its
        weights at `lr`.

        What differs: their convolutional part is a ResNet-50-D with ImageNet weights, ours a plain
        ResNet-50 without any; a warm-up of ten epochs is left out; both views are "strong", where
        theirs are RandAugment and a hard crop with colours; pixels are normalised by the training
        images, not by the statistics of ISIC2018, and there is no centre crop at predict; maps get
        no noise; `precision` is chosen by the hardware, not float16; the two views pass the network
        together, so that batch normalisation sees both; the last epoch is kept, theirs is the best
        on the test images. The queue starts empty, not with random vectors, and holds 4 keys per
        image where these are fewer than 8,192. Keys are scored by their own logits, not by those of
        the queries.

        Parameters
        ----------
        **params
            Further constructor parameters; they take precedence.

        Returns
        -------
        classifier : SPMixClassifier
            Not fitted.
        """
        from sklearn_medimb.backbones import HybridViT

        settings: dict[str, Any] = {
            "backbone": HybridViT.small(),
            "pairing": "code",
            "mix_prob": 1.0,
            "contrast": Contrast("gpaco", projection_dim=256, hidden=4096),
            "fine_tune": "full",
            "backbone_lr": 1.0,
            "ema": None,
            "n_views": 1,
            "augment": "strong",
            "max_epochs": 500,
            "batch_size": 16,
            "lr": 5e-6,
            "weight_decay": 0.1,
            "lr_schedule": "cosine",
        }
        return cls(**{**settings, **params})

    def _check_parameters(self) -> None:
        super()._check_parameters()
        plain = type(resolve_loss(self.loss)) is CrossEntropyLoss or self.loss == "balanced_softmax"
        if kind_of_contrast(self.contrast) == "gpaco" and not plain:
            raise ValueError(
                f'contrast="gpaco" takes the place of loss={self.loss!r}: leave loss as it is, or '
                'choose contrast="supcon".'
            )
        if isinstance(self.contrast, Contrast):
            self.contrast._validate_params()
        if isinstance(self.saliency, SaliencyMap):
            self.saliency._validate_params()
        if self.compile and self.mix_prob and self.level == "token":
            raise ValueError(
                "compile=True fixes the layers that tokens are mixed between: set compile=False or "
                'level="image".'
            )

    # ---------------------------------------------------------------- network, loss, batches

    @property
    def _has_key_encoder(self) -> bool:
        contrast = resolve_contrast(self.contrast)
        return contrast is not None and contrast.key_momentum is not None

    @property
    def _least(self) -> int:
        """Images that a batch must have: projections are normalised over it."""
        return 1 if self.contrast is None else 2

    def _steps_per_epoch(self, n_samples: int) -> int:
        return n_batches(n_samples, max(self.batch_size, self._least), self._least)

    def _images_per_step(self, n_samples: int) -> int:
        n_images = super()._images_per_step(n_samples)
        # Balanced batches of this size hold every class: none has to be brought along.
        has_all = self.pairing == "paper" and min(self.batch_size, n_samples) >= len(self.classes_)
        return n_images if has_all or self.level == "image" else 2 * n_images

    def _views(self) -> tuple[Any, ...]:
        return super()._views() * (1 if self.contrast is None else 2)

    def _make_network(self, trunk: Callable[..., Trunk]) -> nn.Module:
        layer = self.mix_layer if self.level == "token" and len(self.image_shape_) > 1 else None
        return MixingNetwork(trunk(), self._make_head, layer, self._has_known_start)

    def _class_mass(self, train: TrainingSet) -> np.ndarray:
        mass = super()._class_mass(train)
        if self.pairing == "code":
            return mass
        present = np.bincount(train.y, minlength=len(mass)) > 0
        return np.where(present, mass.sum() / len(mass), mass)

    def _make_criterion(self, train: TrainingSet, n_steps: int) -> Criterion:
        label_loss = self._label_loss(train, n_steps)
        contrast = resolve_contrast(self.contrast)
        if contrast is None:
            return LabelCriterion(label_loss)
        prior = torch.from_numpy(self._class_mass(train) / self._class_mass(train).sum())
        return ContrastLoss(
            self.net_.module_, contrast, label_loss, prior.log(), n_images=len(train.y)
        )

    def _make_batches(self, train: TrainingSet, context: Context) -> Any:
        n, y = len(train.y), train.y
        steps = self._steps_per_epoch(n)
        size = min(max(self.batch_size, self._least), n)
        natural = np.bincount(y, minlength=len(self.classes_)).astype(float)

        def plan(rng: np.random.Generator) -> list[np.ndarray]:
            if self.pairing == "code":
                return shuffled(n, size, rng, self._least)
            return class_balanced(y, size, steps, rng)

        encoded, network = isinstance(train.images, CachedImages), self.net_.module_
        grid = network.encoded_grid if encoded else network.grid
        if not grid:
            raise ValueError(
                f"fine_tune={self.fine_tune_!r} mixes what the frozen backbone gives, and "
                f"{type(network.trunk.backbone).__name__} gives no map (n, C, H, W): choose "
                'fine_tune="full".'
            )
        return MixedViews(
            self._label_batches(train, plan, context),
            Partners(train.rows, y, np.ones_like(natural) if self.pairing == "code" else natural),
            self._maps(train, grid) if self.mix_prob else torch.empty(0),
            mix_prob=self.mix_prob,
            ratio=lambda s_t, s_h: self._ratio(s_t, s_h, grid),
            apart=self._has_key_encoder,
        )

    def _maps(self, train: TrainingSet, grid: tuple[int, ...]) -> torch.Tensor:
        """Saliency of the training rows, as fine as the mix can use; uint8, on the device."""
        warn_of_flat_images(self, train.images)
        device = torch.device(self.net_.device)
        how = self.saliency
        if not isinstance(how, SaliencyMap):
            how = SaliencyMap(how)

        def detect(images: torch.Tensor) -> torch.Tensor:
            found = saliency_maps(images, how.saliency, polarity=how.polarity, mask=how.mask)
            sides = tuple(found.shape[1:])
            if self.merge == "patch":
                sides = tuple(min(2 * g, side) for g, side in zip(grid, sides, strict=True))
            return pooled(found, sides).mul(255).round().to(torch.uint8)

        precision = self.net_.dtype
        images = train.images
        if isinstance(images, CachedImages):
            images = images.images
        found = maps_of(images, train.rows, detect, device, dtype=precision, clip=True)
        return found.to(device)

    def _ratio(self, s_t: torch.Tensor, s_h: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        """Share of the bases on the grid of the mix."""
        if self.merge == "patch":
            s_t, s_h = pooled(s_t, grid), pooled(s_h, grid)
        ratio = spmix_ratio(
            s_t,
            s_h,
            cap=self.cap,
            floor=self.floor,
            merge=self.merge,
            partner_saliency=self.partner_saliency,
        )
        return pooled(ratio, grid)
