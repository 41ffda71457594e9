"""What there is to choose from: methods, begun in each way, with their cost and their evidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from imblearn.ensemble import BalancedRandomForestClassifier
from imblearn.pipeline import make_pipeline
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from sklearn_medimb._data.images import as_array
from sklearn_medimb.backbones import ConvNet, recipe_of
from sklearn_medimb.base import BaseImageEstimator
from sklearn_medimb.base._classifier import usual_steps
from sklearn_medimb.comparison._features import logistic_regression, support_vectors
from sklearn_medimb.comparison._methods import common_methods
from sklearn_medimb.comparison._reading import SIDE, Data
from sklearn_medimb.comparison._rule import CUDA, FOREST, Expected, evidence, expected, factor, work
from sklearn_medimb.methods import (
    AMIMVClassifier,
    AMIMVEncoder,
    PretrainedFeatures,
    SoftmaxClassifier,
)
from sklearn_medimb.over_sampling import BalancedVirtualFeatures

FROZEN_LR, FROZEN_SVM = "frozen LR, views + depths", "frozen SVM"
AMIMV, VIRTUAL = "AMIMV", "virtual features"
METHODS = (*common_methods(), AMIMV, VIRTUAL, FOREST, FROZEN_LR, FROZEN_SVM)


class Way(NamedTuple):
    """How methods begin, and those for which the bench has evidence of it, the best first."""

    regime: str
    spatial: tuple[int, ...]  # sides of an image as the networks see it
    evidence: dict[str, Expected]  # by method
    estimators: dict[str, Any]  # by method, not fitted
    rows: list[dict[str, Any]]  # of the table

    @property
    def within(self) -> dict[str, dict[str, Any]]:
        """Rows of what fits the budget, by method."""
        return {row["method"]: row for row in self.rows if row["fits"]}


def ways_of(
    begins: Any,
    data: Data,
    device: torch.device,
    budget: float,
    shared: Mapping[str, Any],
    params: Mapping[str, Any],
) -> list[Way]:
    """Each way, the first choice first; what networks share, and `params`, which have the say."""
    on_gpu = device.type == "cuda"
    found = []
    for regime in _regimes(begins):
        given = {**shared, **_of_regime(regime, begins, data), **params}
        found.append(_way(regime, data, given, on_gpu, budget))
    return found


def _regimes(begins: Any) -> list[str]:
    """Tuning a start, where that pays, before it stays as it is, and that before none."""
    if begins is None:
        return ["scratch"]
    tunes = getattr(recipe_of(begins), "gains_from_tuning", True)
    return ["pretrained", "frozen", "scratch"] if tunes else ["frozen", "scratch"]


def _of_regime(regime: str, begins: Any, data: Data) -> dict[str, Any]:
    """What networks are given so that they begin so."""
    params = _size(regime, data) if data.dims else {}
    if regime == "scratch":  # volumes as in the bench
        return params | ({"backbone": ConvNet((16, 32, 64, 64))} if data.dims == 3 else {})
    if isinstance(begins, BaseImageEstimator):  # it knows images of its own size
        alone = begins.image_size is None and not data.surely_of_one
        params["image_size"] = begins.image_shape_[1:] if alone else begins.image_size
    fine_tune = "frozen" if regime == "frozen" else "head_first"
    return params | {"backbone": begins, "fine_tune": fine_tune}


def _way(regime: str, data: Data, shared: dict[str, Any], on_gpu: bool, budget: float) -> Way:
    """Of the methods that can be made, those with evidence."""
    known = [row for row in evidence() if row.regime == regime]
    n, n_classes = len(data.rows), len(data.classes)
    spatial = _spatial(shared.get("image_size"), data.shape)
    steps = {k: shared[k] for k in ("max_epochs", "batch_size") if shared.get(k, "auto") != "auto"}
    estimators, found = made(regime, shared, data), expected(known, n, n_classes, data.ratio)
    rows: list[dict[str, Any]] = []
    for name in (name for name in found if name in estimators):
        cost = work(name, regime, n, n_classes, spatial, **steps) * factor(known, name)
        cost /= CUDA if on_gpu and name != FOREST else 1
        rows.append(
            {
                "method": name, "regime": regime, "seconds": cost, "score": found[name].score,
                "fits": cost <= budget, "inner": None,
                "note": "" if cost <= budget else "over the budget",
            }
        )  # fmt: skip
    rows.sort(key=lambda row: -row["score"])
    return Way(regime, spatial, found, estimators, rows)


# ---------------------------------------------------------------- methods


def made(regime: str, shared: dict[str, Any], data: Data) -> dict[str, Any]:
    """Methods by name, not fitted."""
    methods = common_methods(**shared)
    if regime == "scratch":
        methods |= _from_scratch(shared, data)
    if regime == "frozen" and data.counts.min() >= 3:  # of each class one in every inner fold
        features = PretrainedFeatures()
        names = features.get_params(deep=False)
        features.set_params(**{name: value for name, value in shared.items() if name in names})
        methods[FROZEN_LR] = logistic_regression(features)
        methods[FROZEN_SVM] = support_vectors(features, shared["random_state"])
    return methods


def _from_scratch(shared: dict[str, Any], data: Data) -> dict[str, Any]:
    """What needs no start, beside the networks."""
    # As in the bench: as many steps without labels as the networks have with labels.
    n_steps = usual_steps(len(data.rows), len(data.classes), data.dims)
    per_epoch = -(-(len(data.rows) + data.n_without) // 32)
    epochs = shared.get("max_epochs", "auto")
    epochs = max(1, round(n_steps / per_epoch)) if epochs == "auto" else epochs
    encoder = AMIMVEncoder(max_epochs=epochs, batch_size=32)
    seed = shared["random_state"]
    methods = {
        AMIMV: AMIMVClassifier(**shared, pretrain=encoder),
        VIRTUAL: make_pipeline(
            SoftmaxClassifier(**shared),
            StandardScaler(),
            BalancedVirtualFeatures(replace=True, random_state=seed),
            LogisticRegression(C=0.01, max_iter=1000),
        ),
    }
    if data.in_one_array:
        forest = BalancedRandomForestClassifier(
            300, sampling_strategy="all", replacement=True, bootstrap=False, random_state=seed
        )
        methods[FOREST] = make_pipeline(FunctionTransformer(flattened), forest)
    return methods


def flattened(X: Any) -> np.ndarray:
    """Images as rows of numbers."""
    return np.asarray(as_array(X)).reshape(len(X), -1)


# ---------------------------------------------------------------- sizes


def _size(regime: str, data: Data) -> dict[str, Any]:
    """To which size images come: for a start that of the evidence; else large ones down."""
    sides = data.shape[1:]
    if regime != "scratch" and len(sides) == 2:
        return {"image_size": SIDE}
    most = SIDE if len(sides) == 2 else SIDE // 4
    if data.several_sizes:
        return {"image_size": min(most, max(sides))}
    if data.surely_of_one and max(sides) <= most:
        return {}
    share = min(1, most / max(sides))
    return {"image_size": tuple(max(1, round(side * share)) for side in sides)}


def _spatial(image_size: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sides of an image as the network sees it; the length of a vector."""
    if len(shape) == 1 or image_size is None:
        return shape[-1:] if len(shape) == 1 else shape[1:]
    size = getattr(image_size, "size", image_size)
    return tuple(size) if isinstance(size, (tuple, list)) else (size,) * (len(shape) - 1)
