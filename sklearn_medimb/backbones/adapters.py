"""Networks of MONAI and timm as backbones; both packages are optional."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from difflib import get_close_matches
from os import PathLike
from typing import Any, ClassVar, get_type_hints

import torch
from torch import Tensor, nn

from sklearn_medimb.backbones._base import Backbone
from sklearn_medimb.backbones._weights import load_weights

# The head of a classifier is recognised by this number of outputs, like no inner width.
_N_CLASSES = 97


class MonaiBackbone(Backbone):
    """A classifier of ``monai.networks.nets`` [1]_ without its head.

    The network is called with what its signature knows of: the number of spatial axes and
    channels, the size of the image, and ``pretrained=False``. Its trunk is taken by one rule:

    - if it has ``features``, a layer or a method (DenseNet, SENet), the map that this returns;
    - otherwise its output with the last linear layer replaced by the identity (EfficientNet),
      or never made where the signature has ``feed_forward`` (ResNet): features, not a map.

    Parameters
    ----------
    name : str
        Such as "DenseNet121", "resnet18" or "EfficientNetBN".
    params : mapping or None, default=None
        Further arguments of the network, such as ``{"model_name": "efficientnet-b0"}``.
    weights : str, path-like or None, default=None
        Local file of weights, with the names of the network itself.

    References
    ----------
    .. [1] Cardoso, M. J., et al. "MONAI: an open-source framework for deep learning in
       healthcare." arXiv:2211.02701, 2022.
    """

    def __init__(
        self,
        name: str,
        params: Mapping[str, Any] | None = None,
        weights: str | PathLike[str] | None = None,
    ) -> None:
        self.name = name
        self.params = params
        self.weights = weights

    def _build(self, channels: int, spatial: tuple[int, ...]) -> nn.Module:
        params = _own_params(self.params)
        try:
            from monai.networks import nets
        except ImportError as error:
            raise ImportError(
                f"backbone monai:{self.name} needs the package monai (pip install monai)."
            ) from error
        make = getattr(nets, str(self.name), None)
        if not (inspect.isclass(make) and issubclass(make, nn.Module)) and not (
            inspect.isfunction(make) and make.__module__.startswith("monai.networks.nets.")
        ):
            raise _unknown(self.name, dir(nets), "monai.networks.nets")

        known = _signature(make)
        if "spatial_dims" not in known and len(spatial) != 2:
            raise ValueError(f"input_shape: monai:{self.name} works on 2-D images only.")
        offered = {
            "spatial_dims": len(spatial),
            "in_channels": channels,
            "n_input_channels": channels,
            "img_size": spatial,
            "num_classes": _N_CLASSES,
            "out_channels": _N_CLASSES,
            "pretrained": False,
            "feed_forward": False,
            "classification": True,  # a transformer without it has no class token
            "post_activation": None,
        }
        try:
            net = make(**{k: v for k, v in offered.items() if k in known} | params)
        except Exception as error:
            raise ValueError(f"params: monai:{self.name} cannot be made: {error}") from error
        head = [
            (parent, child)
            for parent in net.modules()
            for child, layer in parent.named_children()
            if isinstance(layer, nn.Linear) and layer.out_features == _N_CLASSES
        ]
        if head:
            setattr(*head[-1], nn.Identity())
        elif "feed_forward" not in known:
            raise ValueError(f"name: monai:{self.name} is no classifier with a head to take off.")
        return _MonaiTrunk(net)

    def _load(self, module: nn.Module) -> None:
        load_weights(module.get_submodule("net"), self.weights)


class TimmBackbone(Backbone):
    """A network of timm [1]_ without its head; its weights are never downloaded.

    What ``forward_features`` returns is brought to the contract: channels first, and exactly
    one token, the class token or else the mean, before the patch tokens.

    Parameters
    ----------
    name : str
        A name of ``timm.list_models()``, such as "convnext_tiny".
    params : mapping or None, default=None
        Further arguments of ``timm.create_model``. Transformers need ``{"img_size": ...}``
        where the images are of another size than theirs.
    weights : str, path-like or None, default=None
        Local file of weights, with the names of the network itself.

    References
    ----------
    .. [1] Wightman, R. "PyTorch image models." https://github.com/huggingface/pytorch-image-models
    """

    spatial_dims: ClassVar[tuple[int, ...]] = (2,)

    def __init__(
        self,
        name: str,
        params: Mapping[str, Any] | None = None,
        weights: str | PathLike[str] | None = None,
    ) -> None:
        self.name = name
        self.params = params
        self.weights = weights

    def _build(self, channels: int, spatial: tuple[int, ...]) -> nn.Module:
        params = _own_params(self.params)
        try:
            import timm
        except Exception as error:  # timm imports torchvision, which fails in its own ways
            raise ImportError(
                f"backbone timm:{self.name} needs the package timm and a torchvision that fits "
                f"torch {torch.__version__} (pip install timm)."
            ) from error
        if self.name not in (names := timm.list_models()):
            raise _unknown(self.name, names, "timm")
        fixed = {"pretrained": False, "in_chans": channels, "num_classes": 0}
        try:
            return _TimmTrunk(timm.create_model(self.name, **fixed | params))
        except Exception as error:
            raise ValueError(f"params: timm:{self.name} cannot be made: {error}") from error

    def _load(self, module: nn.Module) -> None:
        load_weights(module.get_submodule("net"), self.weights)


class _MonaiTrunk(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        out = getattr(self.net, "features", self.net)(x)
        return out[0] if isinstance(out, tuple) else out


class _TimmTrunk(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net: Any = net  # a module with the methods of timm's

    def forward(self, x: Tensor) -> Tensor:
        out = self.net.forward_features(x)
        if out.ndim == 4 and getattr(self.net, "output_fmt", "NCHW") == "NHWC":
            return out.movedim(-1, 1)
        if out.ndim == 3:
            n_first = getattr(self.net, "num_prefix_tokens", 1)
            first = out[:, :1] if n_first else out.mean(1, keepdim=True)
            return torch.cat([first, out[:, n_first:]], 1)
        return out


# Arguments of monai and timm by which a network fetches its weights.
_DOWNLOADS = re.compile(r"^pretrained$|^weights$|checkpoint|url|pretrained_(model|path|cfg)")


def _own_params(params: Mapping[str, Any] | None) -> dict[str, Any]:
    if params is not None and not isinstance(params, Mapping):
        raise ValueError(f"params must be a mapping of arguments or None, got {params!r}.")
    own = dict(params or {})
    if any(own[name] for name in own if _DOWNLOADS.search(name)):
        raise ValueError("params: nothing is downloaded; give a local file as weights instead.")
    return own


def _signature(make: Any) -> set[str]:
    """Names of all arguments, those passed on through ``**kwargs`` to a parent included."""
    if not inspect.isclass(make):
        parent = get_type_hints(make).get("return")
        own = set(inspect.signature(make).parameters)
        return own | _signature(parent) if inspect.isclass(parent) else own
    names: set[str] = set()
    for parent in make.__mro__:
        if "__init__" in vars(parent):
            parameters = inspect.signature(vars(parent)["__init__"]).parameters.values()
            names |= {p.name for p in parameters}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return names


def _unknown(name: Any, names: list[str], package: str) -> ValueError:
    close = get_close_matches(str(name), names, n=5)
    hint = f"; did you mean {', '.join(close)}?" if close else "."
    return ValueError(f"name: {package} has no network {name!r}{hint}")
