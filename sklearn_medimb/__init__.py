"""Imbalanced medical image classification, the scikit-learn way."""

from sklearn_medimb._data.plans import BalancedBatchSampler
from sklearn_medimb.inspection import SPMixDisplay
from sklearn_medimb.methods import (
    AMIMVClassifier,
    AMIMVEncoder,
    CSSNClassifier,
    LMDClassifier,
    MetricTwoStageClassifier,
    PretrainedFeatures,
    SoftmaxClassifier,
    SPMixClassifier,
    SSLEncoder,
)
from sklearn_medimb.over_sampling import BalancedVirtualFeatures, SPMixSampler
from sklearn_medimb.rebalance import (
    BalancedSoftmax,
    ClassifierRetraining,
    LearnableWeightScaling,
    LogitAdjustment,
    NearestClassMean,
    TauNormalization,
    VirtualFeatureCalibration,
)
from sklearn_medimb.saliency import SaliencyMap

__all__ = [
    "AMIMVClassifier",
    "AMIMVEncoder",
    "BalancedBatchSampler",
    "BalancedSoftmax",
    "BalancedVirtualFeatures",
    "CSSNClassifier",
    "ClassifierRetraining",
    "LMDClassifier",
    "LearnableWeightScaling",
    "LogitAdjustment",
    "MetricTwoStageClassifier",
    "NearestClassMean",
    "PretrainedFeatures",
    "SPMixClassifier",
    "SPMixDisplay",
    "SPMixSampler",
    "SSLEncoder",
    "SaliencyMap",
    "SoftmaxClassifier",
    "TauNormalization",
    "VirtualFeatureCalibration",
]
__version__ = "0.2.0"
