"""The public estimators by kind, derived from what the package exports, and small ones of each."""

from __future__ import annotations

from typing import Any

from imblearn.base import BaseSampler
from sklearn.base import BaseEstimator

import sklearn_medimb
from sklearn_medimb import (
    AMIMVClassifier,
    AMIMVEncoder,
    CSSNClassifier,
    LMDClassifier,
    MetricTwoStageClassifier,
    SoftmaxClassifier,
    SPMixClassifier,
    SSLEncoder,
)
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.base._classifier import BaseImageClassifier
from sklearn_medimb.base._image_estimator import BaseImageEstimator
from sklearn_medimb.rebalance import RebalancedHead


def public(base: type = object) -> dict[str, type]:
    """Public classes below a base class, by name."""
    exported = {name: getattr(sklearn_medimb, name) for name in sklearn_medimb.__all__}
    return {
        name: cls
        for name, cls in exported.items()
        if isinstance(cls, type) and issubclass(cls, base)
    }


PUBLIC = public(BaseEstimator)
IMAGE_ESTIMATORS = public(BaseImageEstimator)
CLASSIFIERS = public(BaseImageClassifier)
# Those that learn from labels alone: the other one pre-trains at length where nothing is said.
SUPERVISED = {name: cls for name, cls in CLASSIFIERS.items() if name != "AMIMVClassifier"}
ENCODERS = {name: cls for name, cls in IMAGE_ESTIMATORS.items() if name not in CLASSIFIERS}
SAMPLERS = public(BaseSampler)
# Those that train, and so have epochs.
TRAINED = {name: cls for name, cls in IMAGE_ESTIMATORS.items() if "max_epochs" in cls._declared}
HEADS = public(RebalancedHead)


def taken(cls: type, params: dict[str, Any]) -> dict[str, Any]:
    """Parameters that a class has, of some that most have."""
    return {name: value for name, value in params.items() if name in cls._declared}


# What default settings are to a test where the class's own are for images of real size.
DEFAULTS = {"PretrainedFeatures": {"backbone": "auto"}}


def by_default(name: str, **params: Any) -> Any:
    """Make a public class as its default settings have it, as far as tiny images allow."""
    return getattr(sklearn_medimb, name)(**{**DEFAULTS.get(name, {}), **params})


SHARED = {"backbone": ConvNet(widths=(4, 8)), "max_epochs": 2, "batch_size": 8}

# One row per public estimator: what makes it small and fast on images. None is for those that do
# not take images.
TINY: dict[str, dict | None] = {
    "AMIMVClassifier": {
        **SHARED,
        "pretrain": AMIMVEncoder(max_epochs=1, batch_size=8),
        "fine_tune": "full",
    },
    "AMIMVEncoder": SHARED,
    "BalancedSoftmax": None,
    "BalancedVirtualFeatures": None,
    "CSSNClassifier": SHARED,
    "ClassifierRetraining": None,
    "LMDClassifier": {**SHARED, "n_rounds": 2},
    "LearnableWeightScaling": None,
    "LogitAdjustment": None,
    "MetricTwoStageClassifier": SHARED,
    "NearestClassMean": None,
    "PretrainedFeatures": {"backbone": ConvNet(widths=(4, 8))},
    "SPMixClassifier": SHARED,
    "SPMixSampler": {},
    "SSLEncoder": SHARED,
    "SaliencyMap": {},
    "SoftmaxClassifier": SHARED,
    "TauNormalization": None,
    "VirtualFeatureCalibration": None,
}

SMALL = {
    "backbone": ConvNet(widths=(8, 16)),
    "max_epochs": 2,
    "batch_size": 32,
    "random_state": 0,
}
ENCODER = SSLEncoder("byol", max_epochs=2, batch_size=32)

# Every image estimator that trains, with all the stages that it can have.
WITH_ALL_STAGES = {
    "AMIMVClassifier": lambda: AMIMVClassifier(
        **SMALL, pretrain=AMIMVEncoder(max_epochs=2, batch_size=32), fine_tune="full"
    ),
    "AMIMVEncoder": lambda: AMIMVEncoder(**SMALL),
    "CSSNClassifier": lambda: CSSNClassifier(**SMALL, pretrain=ENCODER),
    "LMDClassifier": lambda: LMDClassifier(**SMALL, pretrain=ENCODER, n_rounds=3),
    "MetricTwoStageClassifier": lambda: MetricTwoStageClassifier(**SMALL, pretrain=ENCODER),
    "SPMixClassifier": lambda: SPMixClassifier(**SMALL, pretrain=ENCODER),
    "SSLEncoder": lambda: SSLEncoder(**SMALL),
    "SoftmaxClassifier": lambda: SoftmaxClassifier(**SMALL, pretrain=ENCODER),
}
