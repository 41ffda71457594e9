"""Trees of data to estimators, with every step checked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn import config_context
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from skorch.history import History

import sklearn_medimb
from sklearn_medimb._data.reading import as_reading
from sklearn_medimb.backbones import Backbone, check_described
from sklearn_medimb.base._classifier import BaseImageClassifier
from sklearn_medimb.base._image_estimator import BaseImageEstimator
from sklearn_medimb.base._two_stage import head_logits
from sklearn_medimb.base._weights import check_answer
from sklearn_medimb.persistence._format import (
    ARCHITECTURE,
    FORMAT,
    MAX_ESTIMATORS,
    MAX_HEADER,
    MAX_SIDE,
    MAX_TEXT,
    MAX_TEXTS,
    NUMBERS,
    digest_of_file,
    is_fitted_attribute,
    known_classes,
    refusal,
    safetensors_library,
)
from sklearn_medimb.persistence._rebuilding import rebuild
from sklearn_medimb.persistence._starts import restored
from sklearn_medimb.rebalance import RebalancedHead

MAX_PAIRS = 2**22  # numbers that comparing one image with all supports takes, to be tried

_PARTS = {"class", "params", "state", "start", "requests"}  # of an estimator

_TYPES: dict[str, Any] = {
    "classes_": np.ndarray,
    "image_shape_": tuple,
    "n_samples_fit_": int,
    "n_features_in_": int,
    "n_iter_": int,
    "random_seed_": int,
    "split_seed_": int,
    "pixel_range_": (str, float, type(None)),
    "history_": list,
    "best_score_": float,
}


# ---------------------------------------------------------------- and back


class Reader:
    """Rebuild what `Writer` wrote; refuse all else by some exception.

    `trusted` are classes from outside, by name.
    """

    def __init__(
        self, tensors: dict[str, np.ndarray], trusted: dict[str, type] | None = None
    ) -> None:
        self.tensors = dict(tensors)
        self.classes = {**(trusted or {}), **known_classes()}
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
        """Make the value that a node of the tree describes."""
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
        if name not in NUMBERS:
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
        if self.n_texts > MAX_TEXTS:
            raise ValueError("its arrays of texts are too large.")
        array = np.empty(len(items), dtype=object)
        array[:] = [self.decode(item) for item in items]
        return array.reshape(shape).astype({"U": str, "S": bytes, "O": object}[kind])

    def known(self, name: Any) -> type:
        """A class of the list, or a trusted one."""
        if not isinstance(name, str) or name not in self.classes:
            raise ValueError(refusal(name))
        return self.classes[name]

    def estimator(self, tree: Any) -> Any:
        """An estimator with what it learned."""
        self.n_estimators += 1
        if self.n_estimators > MAX_ESTIMATORS:
            raise ValueError(f"it holds more than {MAX_ESTIMATORS} estimators.")
        is_whole = self.n_estimators == 1
        if not {"class", "params"} <= tree.keys() <= _PARTS:
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
        odd = sorted(name for name in state if not is_fitted_attribute(name, cls))
        if odd:
            raise ValueError(f"it sets {odd[:5]}, which {cls.__name__} does not learn.")
        if state:
            weights = state.pop("_weights", None)
            if weights is not None and not (is_whole and isinstance(weights, dict)):
                raise ValueError("it holds weights where none belong.")
            if "start" in tree and weights is None:
                raise ValueError("it names a start where there are no weights.")
            _check_types(cls, state, fitted=weights is not None)
            made.__setstate__({**vars(made), **state})
            if weights is not None:
                if "start" in tree:
                    weights = restored(made, weights, tree["start"])
                self.is_light = rebuild(made, weights)
                made.net_.history_ = History(made.history_)
        with config_context(enable_metadata_routing=True):
            for method, requests in tree.get("requests", {}).items():
                getattr(made, f"set_{method}_request")(**requests)
        return made


def read_file(path: Path, trusted: dict[str, type]) -> tuple[Any, str]:
    """Estimator of a file, and the version that wrote it; any exception means that it is unfit."""
    if path.is_dir():
        raise ValueError("is a directory, not a file.")
    with path.open("rb") as file:
        if int.from_bytes(file.read(8), "little") > MAX_HEADER:
            raise ValueError("its header is too long, or it is no safetensors file.")
    with safetensors_library().safe_open(path, framework="numpy") as file:
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
    if stamp.get("digest") != digest_of_file(stamp, tensors):
        raise ValueError("is damaged or was altered: its digest does not fit its contents.")
    if len(stamp["estimator"]) > MAX_TEXT:
        raise ValueError("its description is too long.")
    reader = Reader(tensors, trusted)
    del tensors
    tree = json.loads(stamp["estimator"], object_pairs_hook=_unique)
    if not isinstance(tree, dict):
        raise ValueError("holds no estimator.")
    estimator = reader.decode(tree)
    if not isinstance(estimator, BaseEstimator) or isinstance(estimator, Backbone):
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


def reason(error: Exception) -> str:
    """What is wrong, for a message that the path begins."""
    if isinstance(error, ValueError) and error.args:
        return str(error)
    return f"cannot be read as an estimator ({type(error).__name__}: {error})."


def _check_types(cls: type, state: dict[str, Any], fitted: bool) -> None:
    """Refuse attributes that an estimator for images could not have learned."""
    if not issubclass(cls, BaseImageEstimator):
        return
    needed = set(ARCHITECTURE)
    if fitted:  # else it is what another estimator began with
        needed |= _TYPES.keys() - {"best_score_", "split_seed_"}  # older files lack the second
    if not issubclass(cls, BaseImageClassifier):
        needed.remove("classes_")
    if missing := sorted(needed - state.keys()):
        raise ValueError(f"it lacks {missing} of {cls.__name__}.")
    types = _TYPES | {k: bool for k, entry in cls._learned.items() if entry.kind == "bool"}
    odd = [k for k, kind in types.items() if k in state and not isinstance(state[k], kind)]
    shape = state["image_shape_"]
    if not all(type(side) is int and side > 0 for side in shape) or max(shape[1:], default=0) > (
        MAX_SIDE
    ):
        odd.append("image_shape_")
    given = state.get("input_shape_", shape)  # files before image_size lack it
    if not (
        isinstance(given, tuple)
        and all(type(side) is int and 0 < side <= MAX_SIDE for side in given[1:])
        and (len(given), given[:1]) == (len(shape), shape[:1])
    ):
        odd.append("input_shape_")
    elif state.get("n_features_in_", n := math.prod(given)) != n:
        odd.append("n_features_in_")
    if (files := state.get("file_options_")) is not None:
        as_reading(**files)  # how files are read, and nothing else: no folder to write to
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
        is_light &= len(bank) * max(bank.shape[1] ** 2, widest) <= MAX_PAIRS
    estimator._check_learned(tries=is_light)
