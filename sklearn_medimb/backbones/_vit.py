"""Vision transformers in 2-D and 3-D."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from os import PathLike
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sklearn_medimb._machine.randomness import Dropout, keep_mask
from sklearn_medimb.backbones._base import Backbone, check_int, check_ints, check_option, check_rate
from sklearn_medimb.backbones._conv import CONV
from sklearn_medimb.backbones._resnet import ResNet
from sklearn_medimb.backbones._stages import stages_of


class _Transformer(Backbone):
    """Recipe of a vision transformer, but for what turns an image into tokens."""

    width: int
    depth: int
    n_heads: int
    mlp_ratio: float
    dropout: float
    drop_path: float
    qkv_bias: bool

    def _build(self, channels: int, spatial: tuple[int, ...]) -> nn.Module:
        width, depth = check_int(self.width, "width"), check_int(self.depth, "depth")
        n_heads = check_int(self.n_heads, "n_heads")
        if width % n_heads:
            raise ValueError(f"n_heads={n_heads} must divide width={width}.")
        hidden = width * self.mlp_ratio if isinstance(self.mlp_ratio, Real) else 0
        if not 1 <= hidden < math.inf:
            raise ValueError(f"mlp_ratio must be a positive number, got {self.mlp_ratio!r}.")
        dropout = check_rate(self.dropout, "dropout")
        drop_path = check_rate(self.drop_path, "drop_path")
        qkv_bias = check_option(self.qkv_bias, "qkv_bias", [True, False])
        patch_embed, grid = self._patch_embed(channels, spatial, width)
        return _ViT(
            patch_embed,
            spatial,
            grid,
            width,
            n_heads,
            int(hidden),
            dropout,
            (drop_path * i / max(1, depth - 1) for i in range(depth)),
            qkv_bias,
        )

    def _patch_embed(
        self, channels: int, spatial: tuple[int, ...], width: int
    ) -> tuple[nn.Module, tuple[int, ...]]:
        """Make the module from images to tokens (n, L, width), and tell the sides of their grid."""
        raise NotImplementedError


class ViT(_Transformer):
    r"""Vision transformer [1]_; returns class token and patch tokens, (n, 1+L, width).

    Every block is :math:`x \leftarrow x + \mathrm{attn}(\mathrm{norm}(x))`, then
    :math:`x \leftarrow x + \mathrm{mlp}(\mathrm{norm}(x))`; a last normalisation follows.
    Position embeddings are learned. The names of its layers are the common ones
    (``patch_embed.proj``, ``blocks.0.attn.qkv``), so public files of weights fit, those of
    self-supervised pre-training [3]_ [4]_ among them: see :meth:`small`.

    Parameters
    ----------
    patch_size : int, sequence of int or "auto", default="auto"
        Side of a patch in pixels, or one per axis. "auto": the smallest for which an image has
        at most 64 patches (28 gives 4 and 49 patches, 32 gives 4 and 64, 8x8x8 gives 2 and 64).
        Images whose sides are no multiples of it are padded with zeros at their far ends.
    width : int, default=192
        Size of a token.
    depth : int, default=6
        Number of blocks.
    n_heads : int, default=3
        Heads of attention; a divisor of ``width``.
    mlp_ratio : float, default=4
        Hidden width of a block's perceptron, in units of ``width``.
    dropout : float, default=0.0
        Rate in [0, 1) of dropout on the embedded tokens and within the blocks.
    drop_path : float, default=0.1
        Rate in [0, 1) at which the last block leaves out a branch for a sample in training
        (stochastic depth [2]_); it rises linearly from 0 at the first block.
    qkv_bias : bool, default=True
        Whether queries, keys and values have a bias.
    weights : str, path-like or None, default=None
        Local file of weights.

    References
    ----------
    .. [1] Dosovitskiy, A., et al. "An image is worth 16x16 words: transformers for image
       recognition at scale." ICLR, 2021.
    .. [2] Huang, G., et al. "Deep networks with stochastic depth." ECCV, 2016.
    .. [3] Caron, M., et al. "Emerging properties in self-supervised vision transformers."
       ICCV, 2021.
    .. [4] Zhou, J., et al. "iBOT: image BERT pre-training with online tokenizer." ICLR, 2022.
    """

    _search_space: ClassVar[dict[str, Any]] = {
        "width": [96, 192, 384],
        "depth": (2, 12),
        "mlp_ratio": (2, 4),
        "dropout": (0.0, 0.3),
        "drop_path": (0.0, 0.3),
    }

    def __init__(
        self,
        patch_size: int | Sequence[int] | str = "auto",
        width: int = 192,
        depth: int = 6,
        n_heads: int = 3,
        mlp_ratio: float = 4,
        dropout: float = 0.0,
        drop_path: float = 0.1,
        qkv_bias: bool = True,
        weights: str | PathLike[str] | None = None,
    ) -> None:
        self.patch_size = patch_size
        self.width = width
        self.depth = depth
        self.n_heads = n_heads
        self.mlp_ratio = mlp_ratio
        self.dropout = dropout
        self.drop_path = drop_path
        self.qkv_bias = qkv_bias
        self.weights = weights

    @classmethod
    def small(cls, patch_size: int | Sequence[int] | str = 16, **params: Any) -> ViT:
        """Make the recipe of a ViT-S: width 384, depth 12, 6 heads.

        Parameters
        ----------
        patch_size : int, sequence of int or "auto", default=16
            As in the constructor.
        **params : dict
            Other parameters of the constructor.

        Returns
        -------
        backbone : ViT
            The recipe.
        """
        return cls(**{"patch_size": patch_size, "width": 384, "depth": 12, "n_heads": 6, **params})

    def _patch_embed(
        self, channels: int, spatial: tuple[int, ...], width: int
    ) -> tuple[nn.Module, tuple[int, ...]]:
        patch = self._patch(spatial)
        grid = tuple(-(-side // p) for side, p in zip(spatial, patch, strict=True))
        return _PatchEmbed(channels, spatial, patch, width), grid

    def _patch(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(self.patch_size, str):
            check_option(self.patch_size, "patch_size", ["auto"])
            sizes = range(1, max(spatial) + 1)
            return (next(p for p in sizes if _n_patches(spatial, p) <= 64),) * len(spatial)
        if not hasattr(self.patch_size, "__iter__"):
            return (check_int(self.patch_size, "patch_size"),) * len(spatial)
        patch = check_ints(self.patch_size, "patch_size")
        if len(patch) != len(spatial):
            raise ValueError(
                f"patch_size={patch} has {len(patch)} sides, the images have {len(spatial)} axes."
            )
        return patch


class HybridViT(_Transformer):
    """Vision transformer on the map of a ResNet [1]_; returns (n, 1+L, width) like :class:`ViT`.

    The first stages of a :class:`ResNet` take the place of the patches: every place of their map,
    brought to ``width`` channels by a 1x1 convolution, is a token. Convolutions have built in what
    a transformer must learn: that neighbouring pixels belong together.

    Parameters
    ----------
    resnet_depth : {18, 34, 50}, default=18
        Depth of the ResNet whose stages are taken.
    n_stages : int, default=3
        Number of its stages, 1 to 4. Each after the first halves the sides of the map: with three
        there are 49 tokens for 28x28 pixels and 196 for 224x224.
    stem : {"auto", "small", "large"}, default="auto"
        Stem of the ResNet.
    stem_width : int, default=64
        Channels of the stem.
    width : int, default=192
        Size of a token.
    depth : int, default=6
        Number of transformer blocks.
    n_heads : int, default=3
        Heads of attention; a divisor of ``width``.
    mlp_ratio : float, default=4
        Hidden width of a block's perceptron, in units of ``width``.
    dropout : float, default=0.0
        Rate in [0, 1) of dropout on the embedded tokens and within the blocks.
    drop_path : float, default=0.1
        Rate in [0, 1) at which the last block leaves out a branch for a sample in training;
        it rises linearly from 0 at the first block.
    qkv_bias : bool, default=True
        Whether queries, keys and values have a bias.
    weights : str, path-like or None, default=None
        Local file of weights.

    References
    ----------
    .. [1] Dosovitskiy, A., et al. "An image is worth 16x16 words: transformers for image
       recognition at scale." ICLR, 2021. Section 3.1, hybrid architecture.
    """

    _search_space: ClassVar[dict[str, Any]] = {
        **ViT._search_space,
        "resnet_depth": [18, 34, 50],
        "n_stages": (2, 4),
    }

    def __init__(
        self,
        resnet_depth: int = 18,
        n_stages: int = 3,
        stem: str = "auto",
        stem_width: int = 64,
        width: int = 192,
        depth: int = 6,
        n_heads: int = 3,
        mlp_ratio: float = 4,
        dropout: float = 0.0,
        drop_path: float = 0.1,
        qkv_bias: bool = True,
        weights: str | PathLike[str] | None = None,
    ) -> None:
        self.resnet_depth = resnet_depth
        self.n_stages = n_stages
        self.stem = stem
        self.stem_width = stem_width
        self.width = width
        self.depth = depth
        self.n_heads = n_heads
        self.mlp_ratio = mlp_ratio
        self.dropout = dropout
        self.drop_path = drop_path
        self.qkv_bias = qkv_bias
        self.weights = weights

    @classmethod
    def small(cls, **params: Any) -> HybridViT:
        """Make the recipe of the network of TailBoost [1]_, but for its stem.

        Three stages of a ResNet-50 (a token per 16x16 pixels with the large stem), width 768,
        depth 8, 8 heads, a perceptron of 3 x width, no branch left out. The published stages are
        those of a ResNet-50-D; here they are a plain ResNet-50's, so its weights do not fit.

        Parameters
        ----------
        **params : dict
            Other parameters of the constructor.

        Returns
        -------
        backbone : HybridViT
            The recipe.

        References
        ----------
        .. [1] Wei, T., Huang, Y., Lin, L., Cheng, P., & Tang, X. "TailBoost: tail-synthetic
           learning for boosting long-tailed skin cancer image classification." Sensors 26(11),
           3343, 2026.
        """
        shape = {"resnet_depth": 50, "width": 768, "depth": 8, "n_heads": 8, "mlp_ratio": 3}
        return cls(**{**shape, "drop_path": 0.0, **params})

    def _patch_embed(
        self, channels: int, spatial: tuple[int, ...], width: int
    ) -> tuple[nn.Module, tuple[int, ...]]:
        n_stages = check_option(check_int(self.n_stages, "n_stages"), "n_stages", [1, 2, 3, 4])
        resnet = ResNet(
            check_option(self.resnet_depth, "resnet_depth", [18, 34, 50]),
            self.stem,
            check_int(self.stem_width, "stem_width"),
        ).build((channels, *spatial))
        for i in range(n_stages + 1, 5):
            setattr(resnet, f"layer{i}", nn.Identity())
        # Which stages stride is the ResNet's own business: a blank image tells what comes out.
        # Evaluation mode leaves its statistics alone.
        with torch.no_grad():
            n_maps, *grid = resnet.eval()(torch.zeros(1, channels, *spatial)).shape[1:]
        return _MapEmbed(resnet.train(), n_maps, len(grid), width), tuple(grid)


def _n_patches(spatial: tuple[int, ...], patch: int) -> int:
    return math.prod(-(-side // patch) for side in spatial)


class _ViT(nn.Module):
    def __init__(
        self,
        patch_embed: nn.Module,
        spatial: tuple[int, ...],
        grid: tuple[int, ...],
        width: int,
        n_heads: int,
        hidden: int,
        dropout: float,
        drop_paths: Iterable[float],
        qkv_bias: bool,
    ) -> None:
        super().__init__()
        self.spatial = spatial
        self.grid = grid
        self.patch_embed = patch_embed
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + math.prod(self.grid), width))
        self.drop = Dropout(dropout)
        self.blocks = nn.Sequential(
            *(_Block(width, n_heads, hidden, dropout, rate, qkv_bias) for rate in drop_paths)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

        # The patch projection keeps torch's own scale, which follows the size of a patch; 0.02
        # would drown small patches in the position embedding.
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[2:]) != self.spatial:
            raise ValueError(
                f"backbone was built for images of {self.spatial} pixels, got {tuple(x.shape[2:])}."
            )
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.norm(self.blocks(self.drop(x)))

    def stages(self) -> list[nn.Module]:
        """What makes the tokens, in parts; with the last go positions and the class token."""
        *first, last = stages_of(self.patch_embed)
        tokens = nn.ParameterList([self.cls_token, self.pos_embed])
        return [*first, nn.ModuleList([last, tokens]), *self.blocks, self.norm]


class _PatchEmbed(nn.Module):
    def __init__(
        self, channels: int, spatial: tuple[int, ...], patch: tuple[int, ...], width: int
    ) -> None:
        super().__init__()
        conv: Callable[..., nn.Module] = CONV[len(spatial)]
        self.proj = conv(channels, width, patch, stride=patch)
        # F.pad counts from the last axis, (before, after) for each.
        ends = [-side % p for side, p in zip(spatial, patch, strict=True)]
        self.padding = tuple(n for end in reversed(ends) for n in (0, end))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.pad(x, self.padding)).flatten(2).transpose(1, 2)


class _MapEmbed(nn.Module):
    def __init__(self, resnet: nn.Module, n_maps: int, dims: int, width: int) -> None:
        super().__init__()
        conv: Callable[..., nn.Module] = CONV[dims]
        self.resnet = resnet
        self.proj = conv(n_maps, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.resnet(x)).flatten(2).transpose(1, 2)


class _Block(nn.Module):
    def __init__(
        self,
        width: int,
        n_heads: int,
        hidden: int,
        dropout: float,
        drop_path: float,
        qkv_bias: bool,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, n_heads, dropout, qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _MLP(width, hidden, dropout)
        self.drop_path = _DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class _Attention(nn.Module):
    def __init__(self, width: int, n_heads: int, dropout: float, qkv_bias: bool) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.drop = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        # (n, T, 3 x heads x c) -> three of (n, heads, T, c)
        q, k, v = self.qkv(x).unflatten(2, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.training and self.drop.p > 0:  # fused kernels would draw for themselves
            shares = F.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2), dim=-1)
            x = self.drop(shares) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.drop(self.proj(x.transpose(1, 2).flatten(2)))


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class _DropPath(nn.Module):
    """In training, zero for a share ``rate`` of the samples; the others keep the mean right."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        return x * keep_mask(x, (len(x),) + (1,) * (x.ndim - 1), self.rate)
