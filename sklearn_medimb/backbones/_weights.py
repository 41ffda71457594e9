"""Weights from a local file into a trunk."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NESTS = ("state_dict", "model", "teacher", "student")
_PREFIXES = ("module.", "backbone.", "encoder.")


def load_weights(
    module: nn.Module,
    path: str | os.PathLike[str],
    names: Mapping[str, str] | None = None,
) -> None:
    """Load the weights of a local file into a module, in place.

    Names and shapes must be those of the module, with these allowances:

    - the state dict may lie under "state_dict", "model", "teacher" or "student" (the first of
      these), and its names may begin with "module.", "backbone." or "encoder.";
    - names outside the module's own children (a classification head) are ignored; a name the
      module lacks *inside* one of its children is an error, for it is another architecture
      (a ResNet-34 file holds all the names of a ResNet-18);
    - position embeddings of a ViT are interpolated to its grid: bicubic in 2-D, trilinear in
      3-D, from a square (cubic) grid;
    - a first convolution for 3 channels fits any other number C: its mean over the channels,
      repeated C times and multiplied by 3/C, so that C equal channels give what three gave.

    Parameters
    ----------
    module : torch.nn.Module
        Changed only if the file fits as a whole.
    path : str or path-like
        A ``.safetensors`` file, or else a file of ``torch.save`` with tensors and plain
        containers only: nothing in it is executed.
    names : mapping of str to str or None, default=None
        Names that a file may have for layers of the module, and the module's own.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file cannot be read or does not fit the module.
    ImportError
        If the file is a ``.safetensors`` file and that package is not installed.
    """
    where = f"weights={os.fspath(path)!r}" if isinstance(path, (str, os.PathLike)) else None
    if where is None:
        raise ValueError(f"weights must be the path of a local file, got {path!r}.")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{where}: there is no such file.")

    own = module.state_dict()
    given = _renamed(_state_dict(_read(Path(path), where), where), own, names or {})
    # Counters of batches are absent from older files and no part of what the network computes.
    missing = [k for k in own if k not in given and not k.endswith("num_batches_tracked")]
    left = [k for k in given if k not in own]
    children = {name.split(".")[0] for name in own}
    strange = [k for k in left if "." in k and k.split(".")[0] in children]
    if missing or strange:
        raise ValueError(
            f"{where} holds another architecture than {type(module).__name__}: "
            f"missing {_some(missing)}; not of this network: {_some(strange or left)}."
        )
    first_conv = next((k for k, v in own.items() if v.ndim >= 4), None)
    fitted = {
        k: _fit(k, given[k], own[k], k == first_conv, getattr(module, "grid", None), where)
        for k in own
        if k in given
    }
    module.load_state_dict(fitted, strict=False)


def _read(path: Path, where: str) -> Any:
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(
                f"{where}: reading this file needs the package safetensors "
                "(pip install safetensors)."
            ) from error
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files fail in many ways, all of them mean the same
        raise ValueError(
            f"{where} cannot be read: it is damaged, or holds more than tensors and plain "
            "containers (then save its state dict alone)."
        ) from error


def _state_dict(content: Any, where: str) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        nested = [content[k] for k in _NESTS if isinstance(content.get(k), Mapping)]
        if not nested:
            break
        content = nested[0]
    if isinstance(content, Mapping):
        state = {k: v for k, v in content.items() if isinstance(v, Tensor)}
        if state:
            return state
    raise ValueError(f"{where} holds no state dict (names and tensors).")


def _renamed(
    state: dict[str, Tensor], own: Mapping[str, Tensor], names: Mapping[str, str]
) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    # Shortest first: where two names end up the same, the one with fewer prefixes counts.
    for name in sorted(state, key=len):
        key = name
        while key not in own and key.startswith(_PREFIXES):
            key = key.split(".", 1)[1]
        layer, dot, last = key.rpartition(".")
        key = names.get(layer, layer) + dot + last
        renamed.setdefault(key, state[name])
    return renamed


def _fit(
    name: str,
    given: Tensor,
    own: Tensor,
    is_first_conv: bool,
    grid: tuple[int, ...] | None,
    where: str,
) -> Tensor:
    a, b = tuple(given.shape), tuple(own.shape)
    if a == b:
        return given
    if name == "pos_embed" and grid is not None and given.ndim == 3 and a[2] == b[2]:
        return _interpolated(given, grid, where)
    if is_first_conv and a[:1] + a[2:] == b[:1] + b[2:]:
        if a[1] == 3:
            return given.mean(1, keepdim=True).expand(b).clone() * (3 / b[1])
        raise ValueError(
            f"{where} was made for images of {a[1]} channels, these have {b[1]}: give images "
            f"of {a[1]} channels, or weights for 3 or {b[1]}."
        )
    raise ValueError(
        f"{where} holds another architecture: {name} has shape {a}, the network needs {b}."
    )


def _interpolated(pos_embed: Tensor, grid: tuple[int, ...], where: str) -> Tensor:
    n_old = pos_embed.shape[1] - 1
    side = round(max(n_old, 0) ** (1 / len(grid)))
    if n_old < 1 or side ** len(grid) != n_old:
        raise ValueError(
            f"{where}: pos_embed has {n_old} places, no {'square' if len(grid) == 2 else 'cube'}, "
            "so it cannot be interpolated to another grid."
        )
    old = pos_embed[:, 1:].transpose(1, 2).unflatten(2, (side,) * len(grid))
    mode = "bicubic" if len(grid) == 2 else "trilinear"
    new = F.interpolate(old.float(), size=grid, mode=mode, align_corners=False).to(old.dtype)
    return torch.cat([pos_embed[:, :1], new.flatten(2).transpose(1, 2)], 1)


def _some(names: Iterable[str], n: int = 6) -> str:
    names = list(names)
    text = ", ".join(names[:n]) or "none"
    return text + (f" and {len(names) - n} more" if len(names) > n else "")
