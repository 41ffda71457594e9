"""What a backbone that stays as it is made of images, kept on disk for whoever asks again."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sklearn.utils.validation import check_memory
from torch import nn

from sklearn_medimb._data.batches import Preprocessor
from sklearn_medimb._machine.runtime import one_thread_in_workers
from sklearn_medimb._training.digests import digest_of

Recall = Callable[[torch.Tensor, Callable[[], torch.Tensor]], torch.Tensor]


def remembering(
    memory: Any,
    network: nn.Module,
    encode: Callable[[torch.Tensor], torch.Tensor],
    prepare: Preprocessor,
    views: list[Callable[[torch.Tensor], torch.Tensor]],
) -> Recall:
    """Make the function that looks for what was made of images before it is made.

    Kept is what depends on the images as they were read, their normalisation and views, the
    backbone, what is asked of it, and how the machine rounds; not on whatever follows: methods that
    ask for the same share it.

    Parameters
    ----------
    memory : path-like or joblib.Memory
        Where it is kept.
    network : nn.Module
        With its `trunk`.
    encode : callable
        From normalised images to what is asked: the trunk, or a partial function of it and of
        settings. Of any other function the whole network counts.
    prepare : Preprocessor
        Normalisation.
    views : list of callable
        Views of each image that are encoded.

    Returns
    -------
    recall : callable
        ``recall(pixels, make)`` gives ``make()``, a tensor, or what it gave for the same pixels.

    Raises
    ------
    ValueError
        If the state of the network cannot be read, or the folder cannot be used.
    """
    trunk: Any = network.trunk
    asked: Any = network
    if encode is trunk:
        asked = None
    elif isinstance(encode, partial) and encode.args == (trunk,):
        asked = encode.func, encode.keywords
    network.eval()
    with trunk.wholly_held(), one_thread_in_workers():
        compiled = getattr(trunk.backbone, "_compiled_call_impl", None) is not None
        how = trunk.autocast, trunk.at_all_depths, prepare.channels_last, compiled
        parts = how, views, prepare.mean, prepare.std, _rounding(prepare.device)
        named = {"backbone": trunk.backbone, "net_": asked, "views": parts}
        known = [digest_of(value, name, "memory") for name, value in named.items()]
    kept = resolve_memory(memory).cache(_kept, ignore=["make"])

    def recall(pixels: torch.Tensor, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        key = digest_of((known, pixels), "X", "memory").hex()
        return kept(key, make).to(prepare.device)

    return recall


def _rounding(device: torch.device) -> tuple[Any, ...]:
    """What decides how numbers are rounded: versions, threads, hardware, and whether in TF32."""
    libraries: Any = torch.backends
    if hasattr(libraries, "fp32_precision"):
        cuda, cudnn, cpu = libraries.cuda.matmul, libraries.cudnn.conv, libraries.mkldnn
        parts = libraries, cuda, cudnn, cpu.matmul, cpu.conv
        allowed = [part.fp32_precision for part in parts]
    else:  # torch < 2.9
        allowed = [torch.get_float32_matmul_precision(), libraries.cudnn.allow_tf32]
    name = libraries.cpu.get_cpu_capability()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return torch.__version__, torch.get_num_threads(), device.type, name, allowed


def resolve_memory(memory: Any) -> Any:
    """Turn what a user may pass as `memory` into joblib's object."""
    try:
        return check_memory(os.fspath(memory) if isinstance(memory, os.PathLike) else memory)
    except OSError as error:
        raise ValueError(f"memory={memory!r} cannot be used as a directory: {error}") from error


def _kept(key: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:  # noqa: ARG001
    """What `make` gives, of which joblib keeps a copy by its key."""
    return make().cpu()
