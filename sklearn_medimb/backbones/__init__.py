"""Network trunks for images and vectors.

**A backbone is any** :class:`torch.nn.Module`; **what it returns is read by its shape**:
(n, d) are features, (n, 1+L, C) a class token and patch tokens, (n, C, H, W) and (n, C, D, H, W)
a map. :func:`as_features` and :func:`as_tokens` do the reading, :func:`make_backbone` makes the
network from a name, a recipe (:class:`Backbone`) or a module of one's own. Where the weights come
from elsewhere, :attr:`Backbone.start` says what they were trained on. :func:`stages_of` cuts a
network into parts from input to output, :func:`pyramid_of` reads it at several depths.

Imports `_machine`, `_pages`.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from sklearn_medimb.backbones._adapters import MonaiBackbone, TimmBackbone
from sklearn_medimb.backbones._base import (
    Backbone,
    Start,
    as_features,
    as_tokens,
    check_input_shape,
    pooled_grid,
)
from sklearn_medimb.backbones._conv import MLP, ConvNet
from sklearn_medimb.backbones._efficientnet_lite import EfficientNetLite
from sklearn_medimb.backbones._resnet import ResNet
from sklearn_medimb.backbones._stages import pyramid_of, stages_of
from sklearn_medimb.backbones._transformers import TransformersBackbone
from sklearn_medimb.backbones._vit import HybridViT, ViT
from sklearn_medimb.backbones._weights import load_weights

__all__ = [
    "BACKBONES",
    "MLP",
    "Backbone",
    "ConvNet",
    "EfficientNetLite",
    "HybridViT",
    "MonaiBackbone",
    "ResNet",
    "Start",
    "TimmBackbone",
    "TransformersBackbone",
    "ViT",
    "as_features",
    "as_tokens",
    "classifier_head",
    "load_weights",
    "make_backbone",
    "pooled_grid",
    "pyramid_of",
    "recipe_of",
    "stages_of",
]

#: Name to recipe: each value, called with the recipe's parameters if any, returns it.
BACKBONES: dict[str, Callable[..., Backbone]] = {
    "mlp": MLP,
    "conv": ConvNet,
    "resnet18": partial(ResNet, depth=18),
    "resnet34": partial(ResNet, depth=34),
    "resnet50": partial(ResNet, depth=50),
    "vit": ViT,
    "vit_small": ViT.small,
    "hybrid_vit": HybridViT,
    "efficientnet_lite0": EfficientNetLite,
    "efficientnet_lite1": partial(EfficientNetLite, 1),
    "efficientnet_lite2": partial(EfficientNetLite, 2),
}

_ADAPTERS: dict[str, Callable[[str], Backbone]] = {
    "monai": MonaiBackbone,
    "timm": TimmBackbone,
    "hf": TransformersBackbone,
}


def make_backbone(
    backbone: Any, input_shape: Sequence[int], n_samples: int | None = None
) -> nn.Module:
    """Make a trunk for one kind of input.

    Parameters
    ----------
    backbone : str, Backbone, torch.nn.Module, or a class of either
        - "auto": an :class:`MLP` for vectors; for images a :class:`ConvNet`, or a ResNet-18
          where there are at least 5000 samples and the smallest side has at least 48 pixels;
        - a name of ``BACKBONES``, "monai:<name>" or "timm:<name>" with random weights, or
          "hf:<repository or local folder>" with those that are there, as in
          :class:`TransformersBackbone`;
        - a :class:`Backbone` or a class of them;
        - a class of modules: called with ``in_channels`` and ``spatial_dims``, each only where
          its signature has that name;
        - a module: copied, so one's own is never trained.
    input_shape : sequence of int
        Shape of one sample: (d,), (C, H, W) or (C, D, H, W), in pixels.
    n_samples : int or None, default=None
        Number of training samples, for "auto" only; None counts as few.

    Returns
    -------
    module : torch.nn.Module
        A new module; unless copied or loaded, its weights are drawn from torch's default
        generator, which seeds must be given to first; inside of a fit from that of the fit.

    Raises
    ------
    TypeError
        If ``backbone`` is none of these things.
    ValueError
        For an unknown name, a class that cannot be called so, or a shape that does not fit.
    ImportError
        If a package the name asks for is not installed.
    """
    shape = check_input_shape(input_shape)
    if isinstance(backbone, nn.Module):
        return copy.deepcopy(backbone)
    is_auto = isinstance(backbone, str) and backbone == "auto"
    backbone = recipe_of(_auto(shape, n_samples) if is_auto else backbone)
    if isinstance(backbone, Backbone):
        return backbone.build(shape)
    if inspect.isclass(backbone) and issubclass(backbone, nn.Module):
        offered = {"in_channels": shape[0], "spatial_dims": len(shape) - 1}
        known = inspect.signature(backbone).parameters
        return _called(backbone, {k: v for k, v in offered.items() if k in known})
    raise TypeError(
        "backbone must be a name, a Backbone, a torch.nn.Module, or a class of either, "
        f"got {backbone!r}."
    )


def recipe_of(backbone: Any) -> Any:
    """Give the recipe that a name or a class stands for.

    Parameters
    ----------
    backbone : str, Backbone, torch.nn.Module, or a class of either
        As in :func:`make_backbone`.

    Returns
    -------
    backbone : Backbone or object
        What is no name or class of a recipe, and "auto", comes back as it is.

    Raises
    ------
    ValueError
        For an unknown name, or a class that cannot be called without parameters.
    """
    if isinstance(backbone, str) and backbone != "auto":
        return _named(backbone)
    if inspect.isclass(backbone) and issubclass(backbone, Backbone):
        return _called(backbone, {})
    return backbone


def check_described(backbone: Any) -> None:
    """Refuse a backbone from a file that could do more than build a network.

    Parameters
    ----------
    backbone : str, Backbone or other
        As in `make_backbone`.

    Raises
    ------
    ValueError
        If it is a network of another package that could fetch something, or has parameters that
        are not plain.
    """
    backbone = recipe_of(backbone)
    if isinstance(backbone, Backbone):
        backbone.check_described()


def classifier_head(module: nn.Module) -> str | None:
    """Layer by which a module is a whole classifier; None where none is recognised.

    It is a linear layer, or a convolution of one pixel, that comes last but for an activation or
    pooling. It is known by a name that libraries give to classifiers and to nothing else, or by
    the number of its outputs: that of the module's ``num_classes`` whatever its name, or of
    ImageNet's classes under a name such as ``fc``. A layer of one's own that tells neither, as in
    ``nn.Sequential(..., nn.Linear(8, 1000))``, may as well be an embedding: it is not recognised.

    Parameters
    ----------
    module : torch.nn.Module
        A backbone of one's own.

    Returns
    -------
    layer : str or None
        As it is written after ``module.``, such as ``"classifier[1]"``.
    """
    leaves = [(name, layer) for name, layer in module.named_modules() if not any(layer.children())]
    if not leaves or isinstance(leaves[-1][1], nn.Identity):  # it was taken off
        return None
    weighty = (k for k, (_, one) in enumerate(leaves) if any(True for _ in one.parameters()))
    place = max(weighty, default=-1)
    name, last = leaves[place]
    parts = set(name.split("."))
    if isinstance(last, nn.Linear):
        n_outputs = last.out_features
    elif isinstance(last, (nn.Conv2d, nn.Conv3d)) and set(last.kernel_size) == {1}:
        n_outputs = last.out_channels
    else:
        return None
    own = getattr(module, "num_classes", None)
    is_one = isinstance(own, int) and n_outputs == own
    is_one |= bool(parts & _HEADS) and n_outputs in _IMAGENET
    # What is left of such a head where its last layer was cut off ends in ReLU or dropout.
    ends = all(isinstance(one, _SQUASHING) for _, one in leaves[place + 1 :])
    is_one |= bool(parts & _SURELY_HEADS) and ends and isinstance(last, nn.Linear)
    return re.sub(r"\.(\d+)", r"[\1]", name) if is_one else None


_SURELY_HEADS = {
    "classifier", "heads", "class_layers", "last_linear", "classification_head",
}  # fmt: skip
_HEADS = {*_SURELY_HEADS, "fc", "_fc", "head", "logits", "head_fc"}
_IMAGENET = {1000, 1001, 21841, 21843}
_SQUASHING = (nn.Softmax, nn.LogSoftmax, nn.Sigmoid, nn.Tanh)


def _auto(shape: tuple[int, ...], n_samples: int | None) -> str:
    if len(shape) == 1:
        return "mlp"
    # A deep network pays only where there is something to see and enough to learn it from.
    return "resnet18" if (n_samples or 0) >= 5000 and min(shape[1:]) >= 48 else "conv"


def _named(name: str) -> Backbone:
    package, colon, rest = name.partition(":")
    if colon and rest and package in _ADAPTERS:
        return _ADAPTERS[package](rest)
    if name in BACKBONES:
        return BACKBONES[name]()
    names = ", ".join(["auto", *BACKBONES, *(f"{package}:<name>" for package in _ADAPTERS)])
    raise ValueError(f"backbone={name!r} is unknown; the names are {names}.")


def _called(cls: type, params: dict[str, Any]) -> Any:
    try:
        return cls(**params)
    except Exception as error:
        call = ", ".join(f"{k}={v}" for k, v in params.items())
        raise ValueError(
            f"backbone: {cls.__name__}({call}) failed ({type(error).__name__}: {error}); "
            "give an instance instead of the class."
        ) from error
