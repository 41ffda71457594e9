"""Fitted estimators as files that hold data alone.

One safetensors file: every array under a plain name, so that other tools read the weights, and one
JSON text with the rest, parameters included. Nothing in it is code, and reading it runs none:
classes are looked up in a fixed list, networks are rebuilt from the parameters.

>>> from sklearn_medimb.persistence import load, save
>>> save(classifier, "classifier.safetensors")  # doctest: +SKIP
>>> classifier = load("classifier.safetensors")  # doctest: +SKIP

A file is neither secret nor signed: its digest finds damage, but whoever writes files can write one
that loads, with weights and parameters of their choice. It fetches nothing, calls no function that
the file names, and takes little more memory than the file is long.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable
from functools import cache
from inspect import Parameter, isclass, signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn import config_context
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from skorch.history import History

import sklearn_medimb
from sklearn_medimb.backbones import Backbone, check_described
from sklearn_medimb.base._image_estimator import BaseImageEstimator, check_answer
from sklearn_medimb.base._classifier import BaseImageClassifier
from sklearn_medimb.rebalance import RebalancedHead
from sklearn_medimb.persistence._rebuilding import rebuild
from sklearn_medimb._machine.runtime import replacing
from sklearn_medimb.base._two_stage import head_logits

FORMAT = 1

# Where the classes that a file may name are: estimators, recipes and optimisers, nothing else.
# Predictions of the sklearn ones come from arrays in NumPy; no tree or kernel walks memory there.
_MODULES = (
    "sklearn_medimb",
    "sklearn_medimb.augment",
    "sklearn_medimb.backbones",
    "sklearn.discriminant_analysis",
    "sklearn.frozen",
    "sklearn.linear_model",
    "sklearn.naive_bayes",
    "imblearn.combine",
    "imblearn.over_sampling",
    "imblearn.under_sampling",
    "torch.optim",
)
_NUMBERS = {
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64",
}  # fmt: skip

_LEARNED = re.compile(r"[A-Za-z]\w*_|_[a-z]\w*")
_REBUILT = {"net_", "_metadata_request"}
# What the architecture of a network depends on beside parameters.
_ARCHITECTURE = ("classes_", "image_shape_", "n_samples_fit_")

# What a description may hold: bytes with the list of tensors, characters, estimators; numbers of
# bytes in an array of texts, which take as much room each as the longest; pixels along an axis.
_MAX_HEADER, _MAX_TEXT, _MAX_ESTIMATORS = 2**22, 2**21, 64
_MAX_TEXTS, _MAX_SIDE = 2**24, 2**16
_MAX_PAIRS = 2**22  # numbers that comparing one image with all supports takes, to be tried

_TYPES: dict[str, Any] = {
    "classes_": np.ndarray,
    "image_shape_": tuple,
    "n_samples_fit_": int,
    "n_features_in_": int,
    "n_iter_": int,
    "random_seed_": int,
    "pixel_range_": (str, float, type(None)),
    "history_": list,
    "best_score_": float,
}


def save(estimator: Any, path: str | os.PathLike[str]) -> None:
    """Write a fitted estimator to one file, without pickle.

    Parameters
    ----------
    estimator : estimator of this package
        Fitted. Parameters and head may hold other estimators: those of this package, the linear
        and naive Bayes models of scikit-learn, the samplers of imbalanced-learn.
    path : str or path-like
        File to write, by custom ``*.safetensors``. An older one is replaced at once, when the new
        one is complete and was read back; until then, and in case of an error, it stays.

    Raises
    ------
    sklearn.exceptions.NotFittedError
        If the estimator is not fitted.
    ValueError
        If a parameter or attribute is no data: a function, a module, a callback, an object of
        another package; or if parameters were changed after ``fit`` so that the weights do not fit.
    ImportError
        If safetensors is not installed.
    OSError
        If the file cannot be written, such as on a full disk.

    See Also
    --------
    load : Reads the file.
    sklearn_medimb.onnx.export_onnx : Predictions without this package.

    Notes
    -----
    A fitted estimator that training began with (``backbone=encoder`` or ``pretrain=encoder``) is
    stored as its parameters: predictions, ``partial_fit`` and warm starts do without its weights,
    a ``fit`` from the start asks for them. Pickle and joblib keep everything. Paths among the
    parameters (``checkpoint_dir``, ``weights``) are written as they are. The state of the optimiser
    is not stored, nor is it in a pickle.
    """
    safetensors = _safetensors()
    if not isinstance(estimator, BaseEstimator) or type(estimator) not in _names():
        raise ValueError(
            f"{type(estimator).__name__} is no estimator of sklearn_medimb: save the one inside "
            "(best_estimator_, a step of a pipeline), or use pickle or joblib."
        )
    check_is_fitted(estimator)
    writer = _Writer(estimator)
    tree = writer.estimator(estimator, "", "all")
    stamp = {
        "sklearn_medimb": sklearn_medimb.__version__,
        "sklearn_medimb_format": str(FORMAT),
        "estimator": json.dumps(tree, allow_nan=False, separators=(",", ":")),
    }
    if len(stamp["estimator"]) > _MAX_TEXT:
        raise ValueError(
            f"{type(estimator).__name__} has {len(stamp['estimator'])} characters of parameters "
            f"and history beside its arrays; a file takes {_MAX_TEXT}. Shorten history_, or use "
            "pickle or joblib."
        )
    stamp["digest"] = _digest(stamp, writer.tensors)
    with replacing(Path(path)) as draft:
        try:
            safetensors.numpy.save_file(writer.tensors, draft, metadata=stamp)
        except safetensors.SafetensorError as error:
            raise OSError(f"{os.fspath(path)} cannot be written: {error}") from error
        try:
            _read(draft)
        except Exception as error:
            raise ValueError(
                f"{type(estimator).__name__} cannot be restored from a file: {_reason(error)}"
            ) from error


def load(path: str | os.PathLike[str]) -> Any:
    """Read an estimator that `save` wrote; nothing in the file is executed.

    Parameters
    ----------
    path : str or path-like
        The file.

    Returns
    -------
    estimator : estimator
        It predicts what the saved one did, on whatever device this machine has, and can be trained
        further.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it was not written by `save`, is damaged, or does not describe an estimator of this
        version; the message begins with the path.
    ImportError
        If safetensors is not installed.

    Warns
    -----
    UserWarning
        If another version (major or minor) of the package wrote it: predictions may differ.
    """
    _safetensors()
    if not Path(path).exists():
        raise FileNotFoundError(f"{os.fspath(path)}: there is no such file.")
    try:
        estimator, version = _read(Path(path))
    except Exception as error:  # a file can be wrong in ways that nobody has thought of
        raise ValueError(f"{os.fspath(path)}: {_reason(error)}") from error
    if version.split(".")[:2] != sklearn_medimb.__version__.split(".")[:2]:
        warnings.warn(
            f"{os.fspath(path)} was written by sklearn_medimb {version}; this is "
            f"{sklearn_medimb.__version__}, which may predict otherwise: check it, then save anew.",
            stacklevel=2,
        )
    return estimator


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            'Files need the package safetensors: pip install "sklearn_medimb[persistence]".'
        ) from error
    return safetensors


@cache
def _classes() -> dict[str, type]:
    """Classes that a file may name."""
    found = {}
    for module in _MODULES:
        members = vars(importlib.import_module(module))
        for name in members.get("__all__", members):
            cls = members.get(name)
            if isclass(cls) and issubclass(cls, (BaseEstimator, torch.optim.Optimizer)):
                found[f"{module}.{name}"] = cls
    return found


@cache
def _names() -> dict[type, str]:
    return {cls: name for name, cls in reversed(_classes().items())}


def _digest(stamp: dict[str, str], tensors: dict[str, np.ndarray]) -> str:
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


# ---------------------------------------------------------------- estimators as trees of data


class _Writer:
    """Turn an estimator into JSON values, with arrays apart.

    Numbers, texts and lists are themselves, all else an object with one key: what it is. `whole` is
    the estimator that is written.
    """

    def __init__(self, whole: Any = None) -> None:
        self.whole = whole
        self.tensors: dict[str, np.ndarray] = {}

    def encode(self, value: Any, place: str) -> Any:
        """One value; `place` is what errors call it."""
        if value is None or isinstance(value, (bool, int)):
            return value
        if isinstance(value, str):
            return str(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": str(value)}
        if isinstance(value, np.generic) and value.dtype.name in _NUMBERS:
            return {"number": [value.dtype.name, self.encode(value.item(), place)]}
        if isinstance(value, bytes):
            return {"bytes": value.hex()}
        if isinstance(value, np.ndarray):
            return self.array(value, place)
        if type(value) is list:
            return [self.encode(item, place) for item in value]
        if type(value) is tuple:
            return {"tuple": [self.encode(item, place) for item in value]}
        if isinstance(value, dict):
            items = value.items()
            return {"dict": [[self.encode(k, place), self.encode(v, place)] for k, v in items]}
        if isinstance(value, Path):
            return {"path": str(value)}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isclass(value) and value in _names():
            return {"class": _names()[value]}
        if isinstance(value, BaseEstimator) and type(value) in _names():
            started = isinstance(value, BaseImageEstimator) and value._was_fitted
            return self.estimator(value, place, "architecture" if started else "none")
        raise ValueError(f"{place}={value!r} cannot be written as data: {self.advice(place)}.")

    def advice(self, place: str) -> str:
        """What to do about a value that is no data."""
        *outside, name = place.split("__")
        if name == "backbone":
            return (
                "a network of one's own is code. pickle and joblib keep it; "
                "sklearn_medimb.onnx.export_onnx writes what predictions need of it"
            )
        owner = self.whole
        for part in outside:
            owner = getattr(owner, part, None)
        known = signature(type(owner)).parameters
        default = known[name].default if name in known else Parameter.empty
        if name in ("pretrain", "rebalance") or default is Parameter.empty:  # part of what predicts
            return "use pickle or joblib"
        return (
            f"use pickle or joblib or, since predictions do without it, set_params({place}="
            f"{default!r}), the default"
        )

    def array(self, value: np.ndarray, place: str) -> Any:
        """An array of numbers becomes a tensor, one of texts or objects a list."""
        if value.dtype.name not in _NUMBERS:
            items = [self.encode(item, place) for item in value.ravel().tolist()]
            return {"texts": [value.dtype.kind, list(value.shape), items]}
        name = place
        while name in self.tensors:
            name += "'"
        self.tensors[name] = np.array(value, dtype=value.dtype.newbyteorder("="), order="C")
        # Products of matrices round as the arrays lie in memory.
        columns = value.flags.f_contiguous and not value.flags.c_contiguous
        return {"array by columns" if columns else "array": name}

    def estimator(self, value: BaseEstimator, place: str, wanted: str) -> Any:
        """An estimator: of what it learned everything, the architecture, or nothing."""
        params = value.get_params(deep=False)
        state = {k: v for k, v in value.__getstate__().items() if k not in params}
        state.pop("_skl_callbacks", None)  # they watch fits
        if wanted == "architecture":
            state = {name: state[name] for name in _ARCHITECTURE if name in state}
        inside = f"{place}__" if place else ""
        tree: dict[str, Any] = {
            "class": _names()[type(value)],
            "params": {k: self.encode(v, f"{inside}{k}") for k, v in params.items()},
        }
        if wanted != "none":
            tree["requests"] = _requests(state.pop("_metadata_request", None))
            odd = [name for name in state if not _is_fitted_attribute(name, type(value))]
            if odd:
                raise ValueError(
                    f"{type(value).__name__} keeps what it learned in {odd}, which cannot be "
                    "written as data: use skops, pickle or joblib."
                )
            tree["state"] = {
                name: self.weights(v) if name == "_weights" else self.fitted(v, f"{inside}{name}")
                for name, v in state.items()
            }
        return {"estimator": tree}

    def weights(self, weights: dict[str, np.ndarray]) -> Any:
        """Weights of a network, under their names in it."""
        return {"dict": [[name, self.array(array, name)] for name, array in weights.items()]}

    def fitted(self, value: Any, place: str) -> Any:
        """A fitted attribute; an estimator among them, a head, comes with what it learned."""
        if isinstance(value, BaseEstimator) and type(value) in _names():
            return self.estimator(value, place, "all")
        try:
            return self.encode(value, place)
        except ValueError as error:
            raise ValueError(
                f"{place}, a {type(value).__name__} that was learned, cannot be written as data: "
                "use skops, pickle or joblib."
            ) from error


def _is_fitted_attribute(name: str, cls: type) -> bool:
    """Whether a file may set this attribute: no method or property, no network."""
    return bool(_LEARNED.fullmatch(name)) and name not in _REBUILT and not hasattr(cls, name)


def _requests(requests: Any) -> dict[str, Any]:
    """Metadata that an estimator asks for, by method."""
    methods = vars(requests) if requests is not None else {}
    return {
        name: dict(method.requests)
        for name, method in methods.items()
        if getattr(method, "requests", None)
    }


# ---------------------------------------------------------------- and back


class _Reader:
    """Rebuild what `_Writer` wrote; refuse all else by some exception."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.tensors = dict(tensors)
        self.n_texts = self.n_estimators = 0
        self.is_light = True  # whether an answer of the network may be tried
        self.tags: dict[str, Callable[[Any], Any]] = {
            "float": lambda text: {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[text],
            "number": self.number,
            "bytes": bytes.fromhex,
            "array": self.array,
            "array by columns": lambda name: np.asfortranarray(self.array(name)),
            "texts": self.texts,
            "tuple": lambda items: tuple(self.decode(item) for item in items),
            "dict": lambda items: {self.decode(k): self.decode(v) for k, v in items},
            "path": Path,
            "device": torch.device,
            "class": self.known,
            "estimator": self.estimator,
        }

    def decode(self, node: Any) -> Any:
        """One value."""
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        if isinstance(node, list):
            return [self.decode(item) for item in node]
        if len(node) != 1 or not node.keys() <= self.tags.keys():
            raise ValueError(f"it describes a value by {sorted(node)[:5]}, which means nothing.")
        ((tag, content),) = node.items()
        return self.tags[tag](content)

    def number(self, content: Any) -> Any:
        """A NumPy scalar."""
        name, value = content
        if name not in _NUMBERS:
            raise ValueError(f"{name!r} is no type of numbers.")
        return np.dtype(name).type(float(self.decode(value)) if "float" in name else value)

    def array(self, name: Any) -> np.ndarray:
        """An array of the file; each is used once."""
        if name not in self.tensors:
            raise ValueError(f"the array {name!r} is missing, or used twice.")
        return self.tensors.pop(name)

    def texts(self, content: Any) -> np.ndarray:
        """An array of texts or objects."""
        kind, shape, items = content
        longest = max((len(item) for item in items if isinstance(item, (str, dict))), default=0)
        self.n_texts += len(items) * max(4 * longest, 8)
        if self.n_texts > _MAX_TEXTS:
            raise ValueError("its arrays of texts are too large.")
        array = np.empty(len(items), dtype=object)
        array[:] = [self.decode(item) for item in items]
        return array.reshape(shape).astype({"U": str, "S": bytes, "O": object}[kind])

    def known(self, name: Any) -> type:
        """A class of the list."""
        if not isinstance(name, str) or name not in _classes():
            raise ValueError(
                f"it names the class {name!r}, which is not among those that load makes."
            )
        return _classes()[name]

    def estimator(self, tree: Any) -> Any:
        """An estimator with what it learned."""
        self.n_estimators += 1
        if self.n_estimators > _MAX_ESTIMATORS:
            raise ValueError(f"it holds more than {_MAX_ESTIMATORS} estimators.")
        is_whole = self.n_estimators == 1
        if not {"class", "params"} <= tree.keys() <= {"class", "params", "state", "requests"}:
            raise ValueError(f"it describes an estimator by {sorted(tree)[:5]}.")
        cls, params = self.known(tree["class"]), tree["params"]
        if not issubclass(cls, BaseEstimator):
            raise ValueError(f"{cls.__name__} is no estimator.")
        unknown = sorted(params.keys() - signature(cls).parameters.keys())
        if unknown:
            raise ValueError(
                f"it holds the parameters {unknown[:5]}, which {cls.__name__} does not have."
            )
        made = cls(**{name: self.decode(value) for name, value in params.items()})
        if hasattr(cls, "_parameter_constraints"):
            made._validate_params()
        check_described(getattr(made, "backbone", made))
        state = {name: self.decode(value) for name, value in tree.get("state", {}).items()}
        odd = sorted(name for name in state if not _is_fitted_attribute(name, cls))
        if odd:
            raise ValueError(f"it sets {odd[:5]}, which {cls.__name__} does not learn.")
        if state:
            weights = state.pop("_weights", None)
            if weights is not None and not (is_whole and isinstance(weights, dict)):
                raise ValueError("it holds weights where none belong.")
            _check_types(cls, state, fitted=weights is not None)
            made.__setstate__({**vars(made), **state})
            if weights is not None:
                self.is_light = rebuild(made, weights)
                made.net_.history_ = History(made.history_)
        with config_context(enable_metadata_routing=True):
            for method, requests in tree.get("requests", {}).items():
                getattr(made, f"set_{method}_request")(**requests)
        return made


def _read(path: Path) -> tuple[Any, str]:
    """Estimator of a file, and the version that wrote it; any exception means that it is unfit."""
    if path.is_dir():
        raise ValueError("is a directory, not a file.")
    with path.open("rb") as file:
        if int.from_bytes(file.read(8), "little") > _MAX_HEADER:
            raise ValueError("its header is too long, or it is no safetensors file.")
    with _safetensors().safe_open(path, framework="numpy") as file:
        stamp = file.metadata() or {}
        if not {"sklearn_medimb", "sklearn_medimb_format"} <= stamp.keys():
            raise ValueError("was not written by sklearn_medimb.persistence.save.")
        version = stamp["sklearn_medimb"]
        if stamp["sklearn_medimb_format"] != str(FORMAT):
            raise ValueError(
                f"has format {stamp['sklearn_medimb_format']}, of sklearn_medimb {version}; "
                f"sklearn_medimb {sklearn_medimb.__version__} reads format {FORMAT}: install the "
                "version that wrote it, or fit anew."
            )
        tensors = {name: np.array(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    if stamp.get("digest") != _digest(stamp, tensors):
        raise ValueError("is damaged or was altered: its digest does not fit its contents.")
    if len(stamp["estimator"]) > _MAX_TEXT:
        raise ValueError("its description is too long.")
    reader = _Reader(tensors)
    del tensors
    tree = json.loads(stamp["estimator"], object_pairs_hook=_unique)
    if not isinstance(tree, dict):
        raise ValueError("holds no estimator.")
    estimator = reader.decode(tree)
    if type(estimator) not in _names() or isinstance(estimator, Backbone):
        raise ValueError("holds no estimator.")
    if reader.tensors:
        raise ValueError(f"it holds arrays that nothing refers to: {sorted(reader.tensors)[:5]}.")
    _check_result(estimator, reader.is_light)
    return estimator, version


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose names must differ: readers do not agree on which one counts."""
    found = dict(items)
    if len(found) < len(items):
        raise ValueError("it says the same thing twice.")
    return found


def _reason(error: Exception) -> str:
    """What is wrong, for a message that the path begins."""
    if isinstance(error, ValueError) and error.args:
        return str(error)
    return f"cannot be read as an estimator ({type(error).__name__}: {error})."


def _check_types(cls: type, state: dict[str, Any], fitted: bool) -> None:
    """Refuse attributes that an estimator for images could not have learned."""
    if not issubclass(cls, BaseImageEstimator):
        return
    needed = set(_ARCHITECTURE)
    if fitted:  # else it is what another estimator began with
        needed |= _TYPES.keys() - {"best_score_"}
    if not issubclass(cls, BaseImageClassifier):
        needed.remove("classes_")
    if missing := sorted(needed - state.keys()):
        raise ValueError(f"it lacks {missing} of {cls.__name__}.")
    odd = [k for k, kind in _TYPES.items() if k in state and not isinstance(state[k], kind)]
    shape = state["image_shape_"]
    if not all(type(side) is int and side > 0 for side in shape) or max(shape[1:], default=0) > (
        _MAX_SIDE
    ):
        odd.append("image_shape_")
    elif state.get("n_features_in_", n := math.prod(shape)) != n:
        odd.append("n_features_in_")
    if not all(isinstance(row, dict) for row in state.get("history_", [])):
        odd.append("history_")
    if odd:
        raise ValueError(f"{odd} of {cls.__name__} are not what it learns.")


def _check_result(estimator: Any, is_light: bool) -> None:
    """Refuse a whole estimator whose parts do not fit together: it must answer for blank input."""
    check_is_fitted(estimator)
    if isinstance(estimator, RebalancedHead):
        n_features = estimator.coef_.shape[1]
        if estimator.n_features_in_ != n_features:
            raise ValueError(f"n_features_in_ is not {n_features}.")
        answer = estimator.predict_proba(np.zeros((1, n_features)))
        check_answer(answer, (1, len(estimator.classes_)))
    if not isinstance(estimator, BaseImageEstimator):
        return
    module = estimator.net_.module_
    if isinstance(estimator, BaseImageClassifier):
        classes = estimator.classes_
        if classes.ndim != 1 or len(classes) < 2 or len(np.unique(classes)) != len(classes):
            raise ValueError("classes_ are not at least two different labels.")
        head = vars(estimator).get("head_")
        if head is not None and not np.array_equal(head.classes_, classes):
            raise ValueError("head_ and the estimator have other classes.")
        if head is not None:
            answer = head_logits(head, np.zeros((1, module.n_features)))
            check_answer(answer, (1, len(classes)))
    bank = vars(estimator).get("support_patches_")
    if isinstance(bank, np.ndarray) and bank.ndim == 3:
        widest = max(len(weight) for weight in module.parameters())
        is_light &= len(bank) * max(bank.shape[1] ** 2, widest) <= _MAX_PAIRS
    estimator._check_learned(tries=is_light)
