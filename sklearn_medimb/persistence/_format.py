"""What a file may name and hold."""

from __future__ import annotations

import hashlib
import importlib
import re
from functools import cache
from inspect import isclass
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator

FORMAT = 1

# Where the classes that a file may name are: estimators, recipes and optimisers, nothing else.
# Predictions of the sklearn ones come from arrays in NumPy; no tree or kernel walks memory there.
MODULES = (
    "sklearn_medimb",
    "sklearn_medimb.augment",
    "sklearn_medimb.backbones",
    "sklearn_medimb.losses",
    "sklearn_medimb.methods",
    "sklearn.discriminant_analysis",
    "sklearn.frozen",
    "sklearn.linear_model",
    "sklearn.naive_bayes",
    "imblearn.combine",
    "imblearn.over_sampling",
    "imblearn.under_sampling",
    "torch.optim",
)
NUMBERS = {
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64",
}  # fmt: skip

_LEARNED = re.compile(r"[A-Za-z]\w*_|_[a-z]\w*")
_REBUILT = {"net_", "_metadata_request"}
# What the architecture of a network depends on beside parameters.
ARCHITECTURE = ("classes_", "image_shape_", "n_samples_fit_")

# What a description may hold: bytes with the list of tensors, characters, estimators; numbers of
# bytes in an array of texts, which take as much room each as the longest; pixels along an axis.
MAX_HEADER, MAX_TEXT, MAX_ESTIMATORS = 2**22, 2**21, 64
MAX_TEXTS, MAX_SIDE = 2**24, 2**16


def safetensors_library() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            'Files need the package safetensors: pip install "sklearn_medimb[persistence]".'
        ) from error
    return safetensors


@cache
def known_classes() -> dict[str, type]:
    """Classes that a file may name."""
    found = {}
    for module in MODULES:
        members = vars(importlib.import_module(module))
        for name in members.get("__all__", members):
            cls = members.get(name)
            if isclass(cls) and issubclass(cls, (BaseEstimator, torch.optim.Optimizer)):
                found[f"{module}.{name}"] = cls
    return found


@cache
def class_names() -> dict[type, str]:
    return {cls: name for name, cls in reversed(known_classes().items())}


def digest_of_file(stamp: dict[str, str], tensors: dict[str, np.ndarray]) -> str:
    """Digest of everything in a file; each part is preceded by its length."""
    digest = hashlib.blake2b(digest_size=32)

    def add(part: Any) -> None:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)

    for name, text in sorted(stamp.items()):
        if name != "digest":
            add(name.encode())
            add(text.encode())
    for name, array in sorted(tensors.items()):
        add(f"{name} {array.dtype.name} {array.shape}".encode())
        add(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def is_fitted_attribute(name: str, cls: type) -> bool:
    """Whether a file may set this attribute: no method or property, no network."""
    return bool(_LEARNED.fullmatch(name)) and name not in _REBUILT and not hasattr(cls, name)
