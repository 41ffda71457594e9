"""Estimators to trees of data."""

from __future__ import annotations

import math
from inspect import Parameter, isclass, signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator

from sklearn_medimb.base._image_estimator import BaseImageEstimator
from sklearn_medimb.persistence._format import (
    ARCHITECTURE,
    NUMBERS,
    class_names,
    is_fitted_attribute,
    is_outside,
    name_of,
)
from sklearn_medimb.persistence._starts import kept_of_start

# ---------------------------------------------------------------- estimators as trees of data


class Writer:
    """Turn an estimator into JSON values, with arrays apart.

    Numbers, texts and lists are themselves, all else an object with one key: what it is. `whole` is
    the estimator that is written; `outside` gathers its classes from other packages, by name. Where
    `by_digest`, weights that a frozen backbone has kept of its start are left out.
    """

    def __init__(self, whole: Any = None, *, by_digest: bool = False) -> None:
        self.whole = whole
        self.by_digest = by_digest
        self.tensors: dict[str, np.ndarray] = {}
        self.outside: dict[str, type] = {}

    def name(self, cls: Any) -> str | None:
        """Name of a class, None if there is none for it."""
        name = name_of(cls)
        if name is not None and cls not in class_names():
            self.outside[name] = cls
        return name

    def encode(self, value: Any, place: str) -> Any:
        """One value; `place` is what errors call it."""
        if value is None or isinstance(value, (bool, int)):
            return value
        if isinstance(value, str):
            return str(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": str(value)}
        if isinstance(value, np.generic) and value.dtype.name in NUMBERS:
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
        if isclass(value) and (name := self.name(value)):
            return {"class": name}
        if isinstance(value, BaseEstimator) and self.name(type(value)):
            started = isinstance(value, BaseImageEstimator) and value._was_fitted
            return self.estimator(value, place, "architecture" if started else "none")
        local = is_outside(value) or is_outside(type(value))
        first = "move its class to the top level of a module, or " if local else ""
        raise ValueError(
            f"{place}={value!r} cannot be written as data: {first}{self.advice(place)}."
        )

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
        if value.dtype.name not in NUMBERS:
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
        given, state = value.get_params(deep=False), value.__getstate__()
        params = {k: state.get(k, v) for k, v in given.items()}  # as a pickle has them
        state = {k: v for k, v in state.items() if k not in params}
        state.pop("_skl_callbacks", None)  # they watch fits
        if wanted == "architecture":
            state = {name: state[name] for name in ARCHITECTURE if name in state}
        inside = f"{place}__" if place else ""
        tree: dict[str, Any] = {
            "class": self.name(type(value)),
            "params": {k: self.encode(v, f"{inside}{k}") for k, v in params.items()},
        }
        if wanted != "none":
            tree["requests"] = _requests(state.pop("_metadata_request", None))
            if odd := [name for name in state if not is_fitted_attribute(name, type(value))]:
                made = vars(type(value)(**params))  # it may set parameters of the class it extends
                for name in [k for k in odd if k in made and repr(made[k]) == repr(state[k])]:
                    odd.remove(name)
                    del state[name]
            if odd:
                raise ValueError(
                    f"{type(value).__name__} keeps what it learned in {odd}, which cannot be "
                    "written as data: use skops, pickle or joblib."
                )
            if self.by_digest and "_weights" in state:
                weights = state["_weights"]
                if (kept := kept_of_start(value, weights)) is not None:
                    tree["start"], names = kept
                    state["_weights"] = {k: v for k, v in weights.items() if k not in names}
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
        if isinstance(value, BaseEstimator) and self.name(type(value)):
            return self.estimator(value, place, "all")
        try:
            return self.encode(value, place)
        except ValueError as error:
            raise ValueError(
                f"{place}, a {type(value).__name__} that was learned, cannot be written as data: "
                "use skops, pickle or joblib."
            ) from error


def _requests(requests: Any) -> dict[str, Any]:
    """Metadata that an estimator asks for, by method."""
    methods = vars(requests) if requests is not None else {}
    return {
        name: dict(method.requests)
        for name, method in methods.items()
        if getattr(method, "requests", None)
    }
