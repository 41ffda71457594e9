"""Contestants of compare.py from scratch, by name, and classifiers from outside.

Also what methods are without their own idea, with a start or without.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from afternoon import AfternoonCNN
from imblearn.ensemble import BalancedRandomForestClassifier, EasyEnsembleClassifier
from imblearn.over_sampling import SMOTE, RandomOverSampler
from imblearn.pipeline import make_pipeline
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVC

from sklearn_medimb import (
    AMIMVClassifier,
    AMIMVEncoder,
    BalancedVirtualFeatures,
    CSSNClassifier,
    LMDClassifier,
    MetricTwoStageClassifier,
    SoftmaxClassifier,
    SPMixClassifier,
    SPMixSampler,
)
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.base._classifier import usual_steps


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a method may know before it sees an image."""

    seed: int
    spatial_dims: int
    counts: tuple[int, ...]  # training images of each class
    step_share: float | None  # of the default; None has each network train as long as it likes
    start: Any = None  # backbone that was trained elsewhere, at this size, tuned so, so long
    image_size: int | None = None
    fine_tune: str = "auto"
    max_epochs: int | None = None
    patients: tuple[Any, ...] | None = None  # of the training images, in their order

    @property
    def network(self) -> dict[str, Any]:
        """What all networks share; narrower for volumes, as 3-D kernels cost more."""
        if self.start is not None:
            params = {"backbone": self.start, "image_size": self.image_size}
            params |= {"fine_tune": self.fine_tune, "random_state": self.seed}
            return params if self.max_epochs is None else params | {"max_epochs": self.max_epochs}
        backbone = ConvNet((16, 32, 64, 64)) if self.spatial_dims == 3 else "auto"
        return {
            "backbone": backbone,
            "spatial_dims": self.spatial_dims,
            "random_state": self.seed,
        }

    def epochs(self, steps_per_epoch: int) -> Any:
        """Passes that make the same number of steps for all: a share of the networks' default."""
        if self.step_share is None:
            return "auto"
        n_steps = self.step_share * usual_steps(0, len(self.counts), self.spatial_dims)
        return max(1, round(n_steps / max(1, steps_per_epoch)))

    def folds(self, n: int = 3, seed: int | None = None) -> Any:
        """Stratified folds of the training images: patients whole, where they have several.

        With a seed they are drawn.
        """
        how: dict[str, Any] = {"shuffle": seed is not None, "random_state": seed}
        if self.patients is None or len(set(self.patients)) == len(self.patients):
            return StratifiedKFold(n, **how)
        return WholePatients(self.patients, n, **how)


class WholePatients(StratifiedGroupKFold):
    """Folds of images whose patients it knows, for what asks for folds without naming patients."""

    def __init__(self, patients: Sequence[Any], n_splits: int, **how: Any) -> None:
        super().__init__(n_splits, **how)
        self.patients = patients

    def split(self, X: Any, y: Any = None, groups: Any = None) -> Iterator[Any]:
        return super().split(X, y, self.patients)


def network(*, balanced: bool = False, **params: Any) -> Callable[[Setting], Any]:
    """Make the plain network; `balanced` where a sampler brings all classes to equal size."""

    def make(s: Setting) -> Any:
        n = len(s.counts) * max(s.counts) if balanced else sum(s.counts)
        return SoftmaxClassifier(**params, **s.network, max_epochs=s.epochs(math.ceil(n / 64)))

    return make


def cssn(s: Setting) -> Any:
    """As many steps as the others, of two views of each of 32 images instead of 64 images."""
    epochs = s.epochs(round(sum(s.counts) / max(32, 2 * len(s.counts))))
    return CSSNClassifier(**s.network, max_epochs=epochs)


def metric_two_stage(**params: Any) -> Callable[[Setting], Any]:
    def make(s: Setting) -> Any:
        epochs = s.epochs(math.ceil(sum(s.counts) / 64))
        return MetricTwoStageClassifier(**params, **s.network, max_epochs=epochs)

    return make


def spmix(s: Setting) -> Any:
    return SPMixClassifier(**s.network, max_epochs=s.epochs(math.ceil(sum(s.counts) / 64)))


def amimv(s: Setting) -> Any:
    """As many steps of pre-training, 32 anchors each, as the others take of training."""
    epochs = s.epochs(math.ceil(sum(s.counts) / 32))
    encoder = AMIMVEncoder(max_epochs=epochs, batch_size=32)
    return AMIMVClassifier(**s.network, pretrain=encoder)


def lmd(s: Setting) -> Any:
    """Stage two's epochs count."""
    classifier = LMDClassifier(**s.network)
    if s.step_share is None:
        return classifier
    epochs = s.epochs(math.ceil(sum(s.counts) / 64)) - classifier.n_rounds + 1
    return classifier.set_params(max_epochs=max(1, epochs))


class FewLabels(ClassifierMixin, BaseEstimator):
    """A classifier that is told the class of a tenth of the images, three of each class at least.

    The others are marked -1.
    """

    def __init__(self, estimator: Any, random_state: int | None = None) -> None:
        self.estimator = estimator
        self.random_state = random_state

    def fit(self, X: np.ndarray, y: np.ndarray) -> FewLabels:
        rng, told = np.random.default_rng(self.random_state), np.full(len(y), -1)
        for k in np.unique(y):
            own = rng.permutation(np.flatnonzero(y == k))
            told[own[: max(3, round(len(own) / 10))]] = k
        self.estimator_ = clone(self.estimator).fit(X, told)
        self.classes_ = self.estimator_.classes_
        return self

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        return self.estimator_.predict_proba(X)

    def predict(self, X: np.ndarray) -> np.ndarray:
        return self.estimator_.predict(X)


def few_labels(s: Setting) -> Any:
    return FewLabels(AMIMVClassifier(**s.network), s.seed)


def virtual_features(s: Setting) -> Any:
    return make_pipeline(
        network()(s),
        StandardScaler(),
        BalancedVirtualFeatures(replace=True, random_state=s.seed),
        LogisticRegression(C=0.01, max_iter=1000),
    )


def afternoon(s: Setting) -> Any:
    """Its own number of epochs, or the suite's share of them."""
    epochs = 40 if s.step_share is None else max(1, round(40 * s.step_share))
    return AfternoonCNN(epochs, spatial_dims=s.spatial_dims, random_state=s.seed)


def flat(X: np.ndarray) -> np.ndarray:
    return X.reshape(len(X), -1).astype(np.float32) / 255


def classical(make_steps: Callable[[int, Any], list[Any]]) -> Callable[[Setting], Any]:
    def make(s: Setting) -> Any:
        # SMOTE needs as many neighbours as it interpolates between.
        k = min(5, min(s.counts) - 1)
        smote = SMOTE(k_neighbors=k, random_state=s.seed)
        fallback = RandomOverSampler(random_state=s.seed)
        return make_pipeline(
            FunctionTransformer(flat), *make_steps(s.seed, smote if k else fallback)
        )

    return make


def components(seed: int) -> list[Any]:
    return [StandardScaler(), PCA(0.9, svd_solver="full", whiten=False, random_state=seed)]


METHODS: dict[str, Callable[[Setting], Any]] = {
    "CE": network(),
    "class weights": network(class_weight="balanced"),
    "oversampling": network(sampler=RandomOverSampler(), balanced=True),
    "SPMix sampler": network(sampler=SPMixSampler(), balanced=True),
    "focal": network(loss="focal"),
    "class-balanced": network(loss="class_balanced"),
    "LDAM-DRW": network(loss="ldam"),
    "balanced softmax": network(loss="balanced_softmax"),
    "logit adjustment": network(loss="logit_adjusted"),
    "post-hoc adjustment": network(post_hoc_tau=1.0),
    "mixup": network(mixup="mixup"),
    "balanced mixup": network(mixup="balanced"),
    "CSSN": cssn,
    "cRT": metric_two_stage(metric_weight=0, rebalance="crt"),
    "metric two-stage": metric_two_stage(),
    "LMD": lmd,
    "SPMix": spmix,
    "AMIMV": amimv,
    "virtual features": virtual_features,
    "afternoon CNN": afternoon,
    "balanced forest": classical(
        lambda seed, _: [
            BalancedRandomForestClassifier(
                300, sampling_strategy="all", replacement=True, bootstrap=False, random_state=seed
            )
        ]
    ),
    "EasyEnsemble": classical(
        lambda seed, _: [*components(seed), EasyEnsembleClassifier(20, random_state=seed)]
    ),
    "SMOTE + SVM": classical(lambda seed, smote: [*components(seed), smote, SVC(C=10)]),
    "SMOTE + logistic": classical(
        lambda seed, smote: [*components(seed), smote, LogisticRegression(C=0.01, max_iter=2000)]
    ),
    "boosting": classical(
        lambda seed, _: [
            *components(seed),
            HistGradientBoostingClassifier(class_weight="balanced", random_state=seed),
        ]
    ),
}


def even(images: torch.Tensor, **_: Any) -> torch.Tensor:
    """A map of saliency that knows no place from another: half of each image everywhere."""
    return torch.full_like(images[:, 0], 0.5)


NO_RELATIONS = {"batch_relation_weight": 0, "channel_relation_weight": 0, "consistency_weight": 0}
# What is left of a method without its own idea: the method, and what is set. LMD without E-step
# ends with its stage one. Without pre-training the labelled images alone train the network.
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "CSSN - auxiliary": ("CSSN", {"aux_weight": 0}),
    "metric two-stage - metric": ("metric two-stage", {"metric_weight": 0}),
    "metric two-stage - start": ("metric two-stage", {"keep_start": False}),
    "LMD - relations": ("LMD", NO_RELATIONS),
    "LMD - E-step": ("LMD", {"n_rounds": 1}),
    "SPMix uniform": ("SPMix", {"saliency": even}),
    "SPMix unmixed": ("SPMix", {"mix_prob": 0}),
    "AMIMV - continued": ("AMIMV continued", {"pretrain": None}),
    "AMIMV, a tenth labelled - pretraining": (
        "AMIMV, a tenth labelled", {"estimator__pretrain": None, "estimator__fine_tune": "full"}
    ),
}  # fmt: skip
OF_TUNED = {"metric two-stage - start"}  # which does nothing unless a start is tuned
OF_MANY_CLASSES = {"CSSN - auxiliary"}  # of two CSSN has no auxiliary classifier: it is the same


def without_ideas(methods: dict[str, Callable[[Setting], Any]]) -> dict[str, Any]:
    """What is left of methods without their own idea: of those that have one."""

    def left(method: str, params: dict[str, Any]) -> Callable[[Setting], Any]:
        return lambda s: methods[method](s).set_params(**params)

    return {name: left(*how) for name, how in ABLATIONS.items() if how[0] in methods}


# Of the suite "ideas": each method, and what is left of it.
IDEAS = {name: METHODS[name] for name in ("CSSN", "metric two-stage", "LMD", "SPMix")}
IDEAS["AMIMV, a tenth labelled"] = few_labels
IDEAS |= {name: left for name, left in without_ideas(IDEAS).items() if name not in OF_TUNED}


def outside(place: str) -> type:
    """Class of a classifier, by "module:Class"."""
    module, _, name = place.partition(":")
    if not module or not name:
        raise argparse.ArgumentTypeError(f"{place!r} is not of the form my_module:MyClassifier")
    if (here := str(Path.cwd())) not in sys.path:  # which workers of joblib are given too
        sys.path.append(here)
    try:
        cls = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise argparse.ArgumentTypeError(f"{module} cannot be imported: {error}") from error
    if not isinstance(cls, type) or not hasattr(cls, "fit") or not hasattr(cls, "predict"):
        raise argparse.ArgumentTypeError(f"{module} has no class {name} with fit and predict")
    try:
        cls().get_params()
    except Exception as error:
        raise argparse.ArgumentTypeError(f"{name}().get_params() fails: {error}") from error
    return cls


def made_from(cls: Any, s: Setting) -> Any:
    """Make a classifier from outside like the networks, as far as it has their parameters."""
    known = cls().get_params()
    params = s.network
    if s.start is None:
        batch_size = known.get("batch_size", 64)
        params["max_epochs"] = s.epochs(math.ceil(sum(s.counts) / batch_size))
    return cls(**{name: value for name, value in params.items() if name in known})
