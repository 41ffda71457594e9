"""What a file may name and hold."""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections import Counter
from collections.abc import Iterable
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
    "sklearn_medimb.datasets",
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
# Of their packages these are all; classes of other packages the caller of `load` may trust.
PACKAGES = sorted({module.partition(".")[0] for module in MODULES})
KINDS = (BaseEstimator, torch.optim.Optimizer)
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
            if isclass(cls) and issubclass(cls, KINDS):
                found[f"{module}.{name}"] = cls
    return found


@cache
def class_names() -> dict[type, str]:
    return {cls: name for name, cls in reversed(known_classes().items())}


def is_outside(cls: Any) -> bool:
    """Whether it is a class that a file holds for callers who trust it."""
    return (
        isclass(cls) and issubclass(cls, KINDS) and cls.__module__.partition(".")[0] not in PACKAGES
    )


def outside_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def name_of(cls: Any) -> str | None:
    """Name of a class in files; None for what they cannot hold."""
    if cls in class_names():
        return class_names()[cls]
    module = sys.modules.get(cls.__module__) if is_outside(cls) else None
    has_it = module is not None and vars(module).get(cls.__qualname__) is cls
    return outside_name(cls) if has_it else None


def trusted_classes(trusted: Iterable[type | str]) -> dict[str, type]:
    """Classes that a caller trusts, by the names that files have for them.

    Modules are imported because the caller names them; what a file names is only looked up here.
    """
    if isinstance(trusted, (str, bytes)) or not isinstance(trusted, Iterable):
        raise TypeError(
            f"trusted must be a list of classes and names of modules, not {trusted!r}: write "
            'trusted=[MyClassifier] or trusted=["my_module"].'
        )
    found, given = {}, []
    for item in trusted:
        if isinstance(item, str):
            try:
                members = vars(importlib.import_module(item)).values()
            except ImportError as error:
                raise ImportError(
                    f"trusted names {item!r}, which cannot be imported as a module ({error}): pass "
                    "the name of the module that defines the class, or the class itself."
                ) from error
            of_it = [cls for cls in members if is_outside(cls)]
            inside = [cls for cls in of_it if f"{cls.__module__}.".startswith(f"{item}.")]
            found.update({outside_name(cls): cls for cls in inside})
        elif is_outside(item):
            given.append(item)
        elif not isclass(item):
            raise TypeError(
                f"trusted holds {item!r}, which is neither a class nor the name of a module: write "
                'trusted=[MyClassifier] or trusted=["my_module"].'
            )
        elif item not in class_names():
            raise TypeError(
                f"trusted holds {item.__name__}, which no file holds: it must be an estimator (a "
                "subclass of sklearn.base.BaseEstimator) or an optimiser of torch, and from "
                f"outside of {', '.join(PACKAGES)}, of which files hold a fixed list."
            )
    # What a program defined in itself may come from a module where it is loaded.
    alike = Counter(cls.__qualname__ for cls in given)
    moved = {f"__main__.{cls.__qualname__}": cls for cls in given if alike[cls.__qualname__] == 1}
    return moved | found | {outside_name(cls): cls for cls in given}


def refusal(name: Any) -> str:
    """Why a file may not name this class, and what callers write who trust it; imports nothing."""
    why = f"it names the class {name!r}, which is not among those that load makes"
    module, _, cls = name.rpartition(".") if isinstance(name, str) else ("", "", "")
    imported = sys.modules.get(module)
    is_none = imported is not None and not is_outside(vars(imported).get(cls))
    if (
        not all(part.isidentifier() for part in [*module.split("."), cls])
        or module.partition(".")[0] in PACKAGES
        or (is_none and module != "__main__")
    ):
        return f"{why}."
    by_module = "" if module == "__main__" else f' or load(path, trusted=["{module}"])'
    return f"{why} unasked: if you trust its code, load(path, trusted=[{cls}]){by_module} reads it."


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
