"""Small networks: a perceptron for vectors and a plain stack of convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, are_deterministic_algorithms_enabled, nn

from sklearn_medimb._machine.randomness import Dropout
from sklearn_medimb.backbones._base import Backbone, check_ints, check_option, check_rate


class MaxPool3d(nn.MaxPool3d):
    """Maximum over cubes; on request one of planes and then one of depths, whatever the device.

    Older torch has no deterministic gradient of the whole on CUDA. Of equal values the first one
    has it either way.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Pool volumes (n, C, D, H, W)."""
        if not are_deterministic_algorithms_enabled():
            return super().forward(x)
        k: Any = self.kernel_size
        s: Any = self.stride
        p: Any = self.padding
        planes = F.max_pool2d(x.transpose(1, 2).flatten(0, 1), k, s, p)  # channels-last stay so
        columns = planes.unflatten(0, (len(x), x.shape[2])).transpose(1, 2)
        pooled = F.max_pool2d(columns.flatten(3), (k, 1), (s, 1), (p, 0))
        return pooled.unflatten(3, planes.shape[2:])


CONV = {2: nn.Conv2d, 3: nn.Conv3d}
NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX_POOL = {2: nn.MaxPool2d, 3: MaxPool3d}

_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


def init_convolutions(module: nn.Module) -> nn.Module:
    """Draw all convolutions of a rectifier network from He's normal distribution [1]_.

    Parameters
    ----------
    module : torch.nn.Module
        Changed in place: weights of variance 2 / (outputs x kernel places).

    Returns
    -------
    module : torch.nn.Module
        The same module.

    References
    ----------
    .. [1] He, K., Zhang, X., Ren, S., & Sun, J. "Delving deep into rectifiers: surpassing
       human-level performance on ImageNet classification." ICCV, 2015.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return module


class MLP(Backbone):
    """Multilayer perceptron: (n, d) to (n, hidden[-1]); images are flattened first.

    There is no batch normalisation: what a sample gets depends on this sample alone, so a
    sample of weight two and the same sample given twice are exactly the same.

    Parameters
    ----------
    hidden : sequence of int, default=(256, 256)
        Widths of the layers.
    activation : {"relu", "gelu", "tanh"}, default="relu"
        Follows every layer.
    dropout : float, default=0.0
        Rate in [0, 1) of dropout after every activation.
    weights : str, path-like or None, default=None
        Local file of weights.
    """

    spatial_dims: ClassVar[tuple[int, ...]] = (0, 2, 3)

    _search_space: ClassVar[dict[str, Any]] = {
        "activation": ["relu", "gelu", "tanh"],
        "dropout": (0.0, 0.5),
    }

    def __init__(
        self,
        hidden: Sequence[int] = (256, 256),
        activation: str = "relu",
        dropout: float = 0.0,
        weights: str | PathLike[str] | None = None,
    ) -> None:
        self.hidden = hidden
        self.activation = activation
        self.dropout = dropout
        self.weights = weights

    def _build(self, channels: int, spatial: tuple[int, ...]) -> nn.Module:
        hidden = check_ints(self.hidden, "hidden")
        check_option(self.activation, "activation", list(_ACTIVATIONS))
        dropout = check_rate(self.dropout, "dropout")
        width = channels * math.prod(spatial)
        layers: list[nn.Module] = [nn.Flatten(1)]
        for new_width in hidden:
            layers += [nn.Linear(width, new_width), _ACTIVATIONS[self.activation]()]
            if dropout > 0:
                layers.append(Dropout(dropout))
            width = new_width
        return nn.Sequential(*layers)


class ConvNet(Backbone):
    """Stack of 3x3 convolutions, each with batch normalisation and ReLU; returns the map.

    Made for small images: 2x2 max-pooling follows a block, the last one excepted, only while
    the smallest side stays at least 4 (28 to 14 to 7; 48 to 24 to 12 to 6), so any side works,
    even 1. Where the smallest side is at least 96 the first convolution has stride 2. 3-D
    images get the same in 3-D.

    Parameters
    ----------
    widths : sequence of int, default=(32, 64, 128, 128)
        Channels of the blocks.
    weights : str, path-like or None, default=None
        Local file of weights.
    """

    def __init__(
        self,
        widths: Sequence[int] = (32, 64, 128, 128),
        weights: str | PathLike[str] | None = None,
    ) -> None:
        self.widths = widths
        self.weights = weights

    def _build(self, channels: int, spatial: tuple[int, ...]) -> nn.Module:
        widths, dims, side = check_ints(self.widths, "widths"), len(spatial), min(spatial)
        net = nn.Sequential()
        for i, width in enumerate(widths):
            stride = 2 if i == 0 and side >= 96 else 1
            block = nn.Sequential(
                CONV[dims](channels, width, 3, stride=stride, padding=1, bias=False),
                NORM[dims](width),
                nn.ReLU(),
            )
            side = -(-side // stride)
            if i + 1 < len(widths) and side // 2 >= 4:
                block.append(MAX_POOL[dims](2))
                side //= 2
            net.append(block)
            channels = width
        return init_convolutions(net)
