"""Residual networks in 2-D and 3-D."""

from __future__ import annotations

from os import PathLike
from typing import Any, ClassVar

from torch import Tensor, nn

from sklearn_medimb.backbones._base import Backbone, check_int, check_option
from sklearn_medimb.backbones._conv import CONV, MAX_POOL, NORM, init_convolutions

_STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class ResNet(Backbone):
    """Residual network [1]_; returns the last map, of 8 x width (depth 50: 32 x width) channels.

    The names of its layers are the common ones (``conv1``, ``layer1.0.bn1``,
    ``layer2.0.downsample.0``), so public 2-D files of weights fit when ``width=64`` and
    ``stem="large"``. The stride of a bottleneck is at its 3x3 convolution, as in these files.

    Parameters
    ----------
    depth : {18, 34, 50}, default=18
        Number of layers; 18 and 34 have basic blocks, 50 has bottlenecks.
    stem : {"auto", "small", "large"}, default="auto"
        "small": a 3x3 convolution of stride 1; "large": 7x7 of stride 2, then 3x3 max-pooling
        of stride 2; "auto": small where the smallest side is under 64 pixels.
    width : int, default=64
        Channels of the stem; the stages have 1, 2, 4 and 8 times as many.
    weights : str, path-like or None, default=None
        Local file of weights.

    Notes
    -----
    A stage that would make the smallest side of the map less than 2 is not strided; this
    changes no weight's shape.

    References
    ----------
    .. [1] He, K., Zhang, X., Ren, S., & Sun, J. "Deep residual learning for image
       recognition." CVPR, 2016.
    """

    _search_space: ClassVar[dict[str, Any]] = {"depth": [18, 34, 50], "width": (16, 64, "log")}

    def __init__(
        self,
        depth: int = 18,
        stem: str = "auto",
        width: int = 64,
        weights: str | PathLike[str] | None = None,
    ) -> None:
        self.depth = depth
        self.stem = stem
        self.width = width
        self.weights = weights

    def _build(self, channels: int, spatial: tuple[int, ...]) -> nn.Module:
        check_option(self.depth, "depth", list(_STAGES))
        stem = check_option(self.stem, "stem", ["auto", "small", "large"])
        if stem == "auto":
            stem = "small" if min(spatial) < 64 else "large"
        return _ResNet(channels, spatial, self.depth, stem, check_int(self.width, "width"))


class _ResNet(nn.Sequential):
    def __init__(
        self, channels: int, spatial: tuple[int, ...], depth: int, stem: str, width: int
    ) -> None:
        super().__init__()
        dims, side = len(spatial), min(spatial)
        block = _Bottleneck if depth == 50 else _Basic
        if stem == "small":
            self.conv1 = CONV[dims](channels, width, 3, padding=1, bias=False)
        else:
            self.conv1 = CONV[dims](channels, width, 7, stride=2, padding=3, bias=False)
            side = _halved(_halved(side))
        self.bn1 = NORM[dims](width)
        self.relu = nn.ReLU()
        self.maxpool = MAX_POOL[dims](3, stride=2, padding=1) if stem == "large" else nn.Identity()

        stages, n_in = [], width
        for i, n_blocks in enumerate(_STAGES[depth]):
            stride = 2 if i > 0 and _halved(side) >= 2 else 1
            side = _halved(side) if stride == 2 else side
            stage = nn.Sequential()
            for j in range(n_blocks):
                stage.append(block(dims, n_in, width * 2**i, stride if j == 0 else 1))
                n_in = width * 2**i * block.expansion
            stages.append(stage)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        init_convolutions(self)


class _Block(nn.Module):
    """y = relu(x + f(x)), x projected by a 1x1 convolution where the shapes differ."""

    expansion = 1

    def __init__(self, dims: int, n_in: int, width: int, stride: int) -> None:
        super().__init__()
        n_out = width * self.expansion
        self.relu = nn.ReLU()
        self.downsample = None
        if stride != 1 or n_in != n_out:
            self.downsample = nn.Sequential(
                CONV[dims](n_in, n_out, 1, stride=stride, bias=False), NORM[dims](n_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.residual(x) + shortcut)

    def residual(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class _Basic(_Block):
    def __init__(self, dims: int, n_in: int, width: int, stride: int) -> None:
        super().__init__(dims, n_in, width, stride)
        self.conv1 = CONV[dims](n_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = NORM[dims](width)
        self.conv2 = CONV[dims](width, width, 3, padding=1, bias=False)
        self.bn2 = NORM[dims](width)

    def residual(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))


class _Bottleneck(_Block):
    expansion = 4

    def __init__(self, dims: int, n_in: int, width: int, stride: int) -> None:
        super().__init__(dims, n_in, width, stride)
        self.conv1 = CONV[dims](n_in, width, 1, bias=False)
        self.bn1 = NORM[dims](width)
        self.conv2 = CONV[dims](width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = NORM[dims](width)
        self.conv3 = CONV[dims](width, 4 * width, 1, bias=False)
        self.bn3 = NORM[dims](4 * width)

    def residual(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.bn3(self.conv3(self.relu(self.bn2(self.conv2(x)))))


def _halved(side: int) -> int:
    """Side after a padded layer of odd kernel and stride 2."""
    return -(-side // 2)
