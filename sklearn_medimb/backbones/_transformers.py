"""Networks of transformers as backbones, with weights of a repository or a local folder."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sklearn_medimb.backbones._adapters import own_params, refuse_unless_plain
from sklearn_medimb.backbones._base import Backbone, Start
from sklearn_medimb.backbones._weights import load_weights

# Kinds of networks that a file may describe: made from plain numbers and words, they only build.
_DESCRIBED = {
    "beit", "clip_vision_model", "convnext", "convnextv2", "data2vec-vision", "deit", "dinov2",
    "dinov2_with_registers", "dinov3_convnext", "dinov3_vit", "efficientnet", "ijepa",
    "mobilenet_v2", "regnet", "resnet", "siglip_vision_model", "swin", "swinv2", "vit", "vit_msn",
}  # fmt: skip
# Fields of a configuration that say where it is from, or what the head meant, not what it is.
_ELSEWHERE = {
    "architectures", "auto_map", "dtype", "id2label", "label2id", "problem_type", "torch_dtype",
    "transformers_version",
}  # fmt: skip
_CLASS_TOKENS = {"cls_token", "class_token", "class_embedding"}
_MISSING = "does not appear to have"  # so transformers' errors say that a repository lacks a file


class TransformersBackbone(Backbone):
    """A network of transformers [1]_ for images, from a repository or a local folder.

    It is what ``AutoModel`` makes: DINOv2, DINOv3, ViT, Swin, ConvNeXt and others; of models of
    images and texts, as CLIP and SigLIP are, the part for images. Of its ``last_hidden_state``
    maps stay as they are, and tokens are brought to the contract: exactly one token, the class
    token or else the mean, before those of the patches; register tokens are dropped. Heads of
    classifiers, and layers that pool tokens into one vector, are left out.

    Gray images are repeated to as many channels as the network was made for. Images of another
    size than the native one are read where the network can interpolate its positions.

    Parameters
    ----------
    name : str or path-like
        Repository of the Hugging Face hub, such as "facebook/dinov2-small", or a local folder.
    weights : "pretrained", str, path-like or None, default="pretrained"
        "pretrained": those of ``name``. Only transformers looks for them, and only files of
        safetensors: in the folder, in its cache or, unless ``HF_HUB_OFFLINE=1`` is set, on the
        hub, from where they are downloaded to the cache. Code from a repository is not run.
        Otherwise a local file, with the names of the network itself, or None for random weights;
        then nothing is downloaded.
    params : mapping or None, default=None
        Fields of the configuration that shall have other values, such as
        ``{"drop_path_rate": 0.1}``. With random weights, fields with "model_type" among them are
        the whole configuration: then ``name`` is only a name.

    References
    ----------
    .. [1] Wolf, T., et al. "Transformers: state-of-the-art natural language processing." EMNLP,
       2020.
    """

    spatial_dims: ClassVar[tuple[int, ...]] = (2,)
    gains_from_tuning: ClassVar[bool] = False

    def __init__(
        self,
        name: str | PathLike[str],
        weights: str | PathLike[str] | None = "pretrained",
        params: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.weights = weights
        self.params = params

    @property
    def has_start(self) -> bool:
        """Whether the weights are those of the repository or folder."""
        return self._is_pretrained

    @property
    def start(self) -> Start | None:
        """What its image processor says; None for what it does not say, or where there is none.

        The digest holds the sha256 of the files of weights where they are on this machine.
        """
        if not self._is_pretrained:
            return None
        processor = self._processor()
        mean, std = _normalisation(processor)
        known = [f"hf:{self.name}", *(f"sha256:{digest}" for digest in self._digests())]
        return Start(mean, std, _side(processor), " ".join(known))

    @property
    def _is_pretrained(self) -> bool:
        return isinstance(self.weights, str) and self.weights == "pretrained"

    def _build(self, channels: int, spatial: tuple[int, ...]) -> nn.Module:
        whole = self._config()
        config = _image_config(whole)
        n_channels = getattr(config, "num_channels", 3)
        if channels not in (1, n_channels):
            raise ValueError(
                f"backbone hf:{self.name} was made for images of {n_channels} channels, or gray "
                f"ones: input_shape has {channels}."
            )
        net = self._pretrained(whole) if self._is_pretrained else self._random(config)
        return _TransformersTrunk(net, n_channels).float()

    def _load(self, module: nn.Module) -> None:
        if not self._is_pretrained:
            load_weights(module.get_submodule("net"), self.weights)

    # ---------------------------------------------------------------- transformers

    def _config(self) -> Any:
        """Configuration of the whole model."""
        params, auto = own_params(self.params), self._library().AutoConfig
        kind = params.pop("model_type", None)
        if kind is not None and not self._is_pretrained:
            try:
                return auto.for_model(kind, **params)
            except Exception as error:
                raise ValueError(
                    f"params: transformers makes no network {kind!r} of them: {error}"
                ) from error
        whole = self._given("configuration", auto)
        config = _image_config(whole)
        if odd := sorted(k for k in params if not hasattr(config, k)):
            raise ValueError(f"params: the configuration of hf:{self.name} has no fields {odd}.")
        if kind not in (None, config.model_type):
            raise ValueError(f"params: hf:{self.name} is {config.model_type!r}, not {kind!r}.")
        for field, value in params.items():
            setattr(config, field, value)
        return whole

    def _random(self, config: Any) -> Any:
        try:
            return _image_part(self._library().AutoModel.from_config(config))
        except Exception as error:
            raise ValueError(f"params: hf:{self.name} cannot be made: {error}") from error

    def _pretrained(self, config: Any) -> Any:
        net, info = self._given(
            "safetensors weights",
            self._library().AutoModel,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
        )
        part = _image_part(net)
        needed = {id(weight) for weight in part.parameters()}
        names = {name for name, weight in net.named_parameters() if id(weight) in needed}
        if missing := sorted(names.intersection(info["missing_keys"])):
            raise ValueError(
                f"weights='pretrained': the files of hf:{self.name} lack weights of a "
                f"{type(net).__name__}: {', '.join(missing[:5])}."
            )
        return part

    def _given(self, what: str, auto: Any, **options: Any) -> Any:
        """What the folder or repository has; none of its code is run."""
        try:
            return auto.from_pretrained(
                str(self.name), trust_remote_code=False, **options, **self._where()
            )
        except OSError as error:
            raise self._absent(what, error) from error
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"backbone hf:{self.name} cannot be made: {error}") from error

    def _processor(self) -> dict[str, Any]:
        """What images are made to before the network; empty where nothing says it."""
        for filename in ("preprocessor_config.json", "processor_config.json"):
            if file := self._file(filename):
                content = json.loads(Path(file).read_text(encoding="utf-8"))
                content = content.get("image_processor", content)
                if "image_mean" in content or "size" in content:
                    return content
        return {}

    def _digests(self) -> list[str]:
        """The sha256 of each file of weights; none where they are not here yet."""
        names, index = ["model.safetensors"], "model.safetensors.index.json"
        if file := self._file(index, local=True):  # large ones come in parts
            names = sorted({*json.loads(Path(file).read_text())["weight_map"].values()})
        files = [self._file(name, local=True) for name in names]
        if not all(files):
            return []
        stats = [(one, one.stat()) for one in (Path(file) for file in files if file)]
        return [_sha256(one, stat.st_size, stat.st_mtime_ns) for one, stat in stats]

    def _file(self, filename: str, local: bool = False) -> str | None:
        """Path of a file of the folder or repository; None where it has no such file."""
        self._library()
        from transformers.utils import cached_file

        where = self._where() | ({"local_files_only": True} if local else {})
        try:
            return cached_file(str(self.name), filename, **where)
        except OSError as error:
            if local or _MISSING in str(error):
                return None
            what = f"{filename}, by which images are normalised unless normalize says how,"
            raise self._absent(what, error) from error

    def _where(self) -> dict[str, Any]:
        """With other weights than those of the repository nothing is fetched from there."""
        return {} if self._is_pretrained else {"local_files_only": True}

    def _library(self) -> Any:
        try:
            import transformers
        except Exception as error:  # it imports much, which fails in many ways
            raise ImportError(
                f"backbone hf:{self.name} needs the package transformers "
                "(pip install transformers)."
            ) from error
        return transformers

    def _absent(self, what: str, error: Exception) -> FileNotFoundError:
        return FileNotFoundError(
            f"backbone hf:{self.name}: no {what} in a local folder of that name or in the cache of "
            f"transformers, and none could be fetched ({type(error).__name__}: {error})."
        )

    # ---------------------------------------------------------------- files

    def described(self, module: nn.Module) -> Backbone:
        """Recipe with the configuration of a network in it, which asks no folder for it."""
        if not isinstance(module, _TransformersTrunk):  # parameters were changed after the fit
            return self
        config = module.net.config.to_diff_dict()
        kept = {k: v for k, v in config.items() if k not in _ELSEWHERE and not k.startswith("_")}
        return type(self)(str(self.name), self.weights, kept)

    def check_described(self) -> None:
        """Refuse all but whole configurations of some kinds of networks."""
        params = self.params if isinstance(self.params, Mapping) else {}
        if not isinstance(kind := params.get("model_type"), str) or kind not in _DESCRIBED:
            raise ValueError(
                f"backbone=TransformersBackbone({self.name!r}) is not among the networks that a "
                "file may name, since others can fetch files: use pickle or joblib."
            )
        refuse_unless_plain(params)


class _TransformersTrunk(nn.Module):
    """Class token and patch tokens, or a map."""

    def __init__(self, net: Any, n_channels: int) -> None:
        super().__init__()
        self.net: Any = net
        self.n_channels = n_channels
        own = {name.rpartition(".")[2] for name, _ in net.named_parameters()}
        self.has_class_token = bool(own & _CLASS_TOKENS)
        self.n_dropped = ("distillation_token" in own) + int(
            getattr(net.config, "num_register_tokens", 0) or 0
        )
        # A hierarchy of stages has fewer tokens at its end than patches.
        patch = None if hasattr(net.config, "depths") else getattr(net.config, "patch_size", None)
        self.patch = (patch, patch) if isinstance(patch, int) else patch
        resizes = "interpolate_pos_encoding" in inspect.signature(net.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if resizes else {}

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            x = x.expand(-1, self.n_channels, *x.shape[2:])
        out = self.net(pixel_values=x, **self.options).last_hidden_state
        if out.ndim != 3:
            return out
        n_first = self.has_class_token + self.n_dropped
        patches = out[:, n_first:]
        if self.patch is not None:
            expected = (x.shape[2] // self.patch[0]) * (x.shape[3] // self.patch[1])
            if patches.shape[1] != expected:
                raise ValueError(
                    f"{type(self.net).__name__} returns {out.shape[1]} tokens, of which "
                    f"{expected} should be those of patches, and {n_first} others."
                )
        first = out[:, :1] if self.has_class_token else patches.mean(1, keepdim=True)
        return torch.cat([first, patches], 1)


def _image_config(config: Any) -> Any:
    """Of a model of images and texts, the configuration of the part for images."""
    return getattr(config, "vision_config", config)


def _image_part(net: Any) -> Any:
    """Of a model of images and texts, the part for images, without what pools its tokens."""
    part = getattr(net, "vision_model", net)
    for name in ("pooler", "head"):
        if isinstance(getattr(part, name, None), nn.Module):
            setattr(part, name, nn.Identity())
    return part


def _normalisation(processor: Mapping[str, Any]) -> tuple[Any, Any]:
    """Mean and deviation on the scale from 0 to 1, or None twice."""
    scale = processor.get("rescale_factor", 1 / 255)
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if not processor.get("do_rescale", True) or abs(scale * 255 - 1) > 1e-3:
        return None, None  # it expects another scale
    if not processor.get("do_normalize", True):
        mean, std = 0.0, 1.0
    if mean is None or std is None:
        return None, None
    pair = [value if isinstance(value, list) else [value] * 3 for value in (mean, std)]
    return tuple(tuple(map(float, values)) for values in pair)  # type: ignore[return-value]


def _side(processor: Mapping[str, Any]) -> int | None:
    """Side of the images that the network is given."""
    sizes = [processor.get("size")]
    if processor.get("do_center_crop"):
        sizes.insert(0, processor.get("crop_size"))
    for size in sizes:
        if isinstance(size, Mapping):
            size = size.get("height", size.get("shortest_edge"))
        if isinstance(size, int):
            return size
    return None


@lru_cache(maxsize=32)
def _sha256(path: Path, _size: int, _changed: int) -> str:
    """Digest of a file, as it was at that time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()
