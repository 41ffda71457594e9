"""Networks of MONAI and timm as backbones; both packages are optional."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from difflib import get_close_matches
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sklearn_medimb.backbones._base import Backbone, Start
from sklearn_medimb.backbones._weights import load_weights

# MONAI makes these by functions, which can also fetch weights; here they are what they make.
_RESNETS = {
    "resnet10": ("basic", [1, 1, 1, 1]),
    "resnet18": ("basic", [2, 2, 2, 2]),
    "resnet34": ("basic", [3, 4, 6, 3]),
    "resnet50": ("bottleneck", [3, 4, 6, 3]),
    "resnet101": ("bottleneck", [3, 4, 23, 3]),
    "resnet152": ("bottleneck", [3, 8, 36, 3]),
    "resnet200": ("bottleneck", [3, 24, 36, 3]),
}
# Networks of MONAI, in small letters, that a file may name: with plain parameters they only build.
_DESCRIBED = {
    "densenet", "densenet121", "densenet169", "densenet201", "densenet264", "efficientnetbn",
    "resnet", "senet", "senet154", "seresnet50", "seresnet101", "seresnet152", "seresnext50",
    "seresnext101", "vit", *_RESNETS,
}  # fmt: skip
# The head of a classifier is recognised by this number of outputs, like no inner width.
_N_CLASSES = 97


class _Named(Backbone):
    """A network that another package makes by its name."""

    def __init__(
        self,
        name: str,
        params: Mapping[str, Any] | None = None,
        weights: str | PathLike[str] | None = None,
    ) -> None:
        self.name = name
        self.params = params
        self.weights = weights


class MonaiBackbone(_Named):
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

    def _build(self, channels: int, spatial: tuple[int, ...]) -> nn.Module:
        params = own_params(self.params)
        try:
            from monai.networks import nets
        except ImportError as error:
            raise ImportError(
                f"backbone monai:{self.name} needs the package monai (pip install monai)."
            ) from error
        name = str(self.name)
        make = getattr(nets, "ResNet" if name in _RESNETS else name, None)
        if not (inspect.isclass(make) and issubclass(make, nn.Module)):
            classes = [name for name, made in vars(nets).items() if inspect.isclass(made)]
            raise _unknown(self.name, [*_RESNETS, *classes], "monai.networks.nets")
        if name in _RESNETS:
            block, layers = _RESNETS[name]
            shape: dict[str, Any] = {
                "block": block,
                "layers": layers,
                "block_inplanes": [64, 128, 256, 512],
            }
            params = shape | params

        known = _signature(make)
        if "spatial_dims" not in known and len(spatial) != 2:
            raise ValueError(f"backbone monai:{self.name} works on 2-D images only.")
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

    def check_described(self) -> None:
        """Refuse all but some classes of MONAI, and all but plain parameters."""
        if not isinstance(self.name, str) or self.name.lower() not in _DESCRIBED:
            raise ValueError(
                f"backbone=MonaiBackbone({self.name!r}) is not among the networks that a file may "
                "name, since others can fetch files: use pickle or joblib."
            )
        refuse_unless_plain(self.params)


class TimmBackbone(_Named):
    """A network of timm [1]_ without its head.

    What ``forward_features`` returns is brought to the contract: channels first, and exactly
    one token, the class token or else the mean, before the patch tokens.

    Parameters
    ----------
    name : str
        A name of ``timm.list_models()``, such as "convnext_tiny"; which weights it has may follow
        after a point, as in "convnext_tiny.in12k".
    params : mapping or None, default=None
        Further arguments of ``timm.create_model``. Transformers need ``{"img_size": ...}``
        where the images are of another size than theirs.
    weights : "pretrained", str, path-like or None, default=None
        "pretrained": those that timm has for this name; it downloads them to its own cache, unless
        they are there. Otherwise a local file of weights, with the names of the network itself, or
        None for random ones; then nothing is downloaded.

    References
    ----------
    .. [1] Wightman, R. "PyTorch image models." https://github.com/huggingface/pytorch-image-models
    """

    spatial_dims: ClassVar[tuple[int, ...]] = (2,)

    @property
    def has_start(self) -> bool:
        """Whether the weights are those that timm has for the name."""
        return self._is_pretrained

    @property
    def start(self) -> Start | None:
        """What timm says of its weights; None for what it does not say."""
        if not self._is_pretrained:
            return None
        config = self._library().get_pretrained_cfg(self.name)
        mean, std, size = (getattr(config, k, None) for k in ("mean", "std", "input_size"))
        source = getattr(config, "hf_hub_id", None) or getattr(config, "url", None)
        return Start(
            mean and tuple(mean),
            std and tuple(std),
            size and size[-1],
            f"timm:{self.name} {source}",
        )

    @property
    def _is_pretrained(self) -> bool:
        return isinstance(self.weights, str) and self.weights == "pretrained"

    def _library(self) -> Any:
        try:
            import timm
        except Exception as error:  # timm imports torchvision, which fails in its own ways
            raise ImportError(
                f"backbone timm:{self.name} needs the package timm and a torchvision that fits "
                f"torch {torch.__version__} (pip install timm)."
            ) from error
        if str(self.name).partition(".")[0] not in (names := timm.list_models()):
            raise _unknown(self.name, names, "timm")
        return timm

    def _build(self, channels: int, spatial: tuple[int, ...]) -> nn.Module:
        params, timm = own_params(self.params), self._library()
        fixed = {"pretrained": self._is_pretrained, "in_chans": channels, "num_classes": 0}
        try:
            return _TimmTrunk(timm.create_model(self.name, **fixed | params))
        except Exception as error:
            given = "weights='pretrained', or params" if self._is_pretrained else "params"
            raise ValueError(f"{given}: timm:{self.name} cannot be made: {error}") from error

    def _load(self, module: nn.Module) -> None:
        if not self._is_pretrained:
            load_weights(module.get_submodule("net"), self.weights)

    def check_described(self) -> None:
        """Refuse names beside those of timm's own list, and all but plain parameters."""
        name = self.name.split(".") if isinstance(self.name, str) else self.name
        refuse_unless_plain({"name": name})
        refuse_unless_plain(self.params)


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


# Arguments of monai and timm by which a network fetches its weights or opens files.
_FETCHES = re.compile(
    r"^pretrained$|pretrained_(model|path|cfg)|^weights$|checkpoint|url|repo|hub|cache_dir|file"
    r"|^path|(?<!drop)_path$"
)
_WORD = re.compile(r"[A-Za-z][\w-]{,39}")


def own_params(params: Mapping[str, Any] | None) -> dict[str, Any]:
    if params is not None and not isinstance(params, Mapping):
        raise ValueError(f"params must be a mapping of arguments or None, got {params!r}.")
    own = dict(params or {})
    if any(own[name] for name in own if _FETCHES.search(name)):
        raise ValueError("params: nothing is downloaded; give a local file as weights instead.")
    return {name: value for name, value in own.items() if not _FETCHES.search(name)}


def refuse_unless_plain(value: Any, depth: int = 4) -> None:
    """Refuse parameters from a file that are more than numbers, words, and short lists of them."""
    if isinstance(value, Mapping):
        plain = all(
            isinstance(name, str) and not (given and _FETCHES.search(name))
            for name, given in value.items()
        )
        inside = [*value, *value.values()]
    elif isinstance(value, (list, tuple)):
        plain, inside = True, [*value]
    else:
        plain, inside = value is None or isinstance(value, bool), []
        if isinstance(value, (int, float)):
            plain = abs(value) <= 2**16  # False for NaN
        elif isinstance(value, str):
            plain = _WORD.fullmatch(value) is not None
    if not plain or len(inside) > 64 or depth == 0:
        raise ValueError(f"params: a network from a file is not made with {value!r:.80}.")
    for item in inside:
        refuse_unless_plain(item, depth - 1)


def _signature(make: type) -> set[str]:
    """Names of all arguments, those passed on through ``**kwargs`` to a parent included."""
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
