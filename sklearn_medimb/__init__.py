"""Imbalanced medical image classification, the scikit-learn way."""

from sklearn_medimb.batches import BalancedBatchSampler
from sklearn_medimb.cssn import CSSNClassifier
from sklearn_medimb.inspection import SPMixDisplay
from sklearn_medimb.lmd import LMDClassifier
from sklearn_medimb.metric_two_stage import MetricTwoStageClassifier
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
from sklearn_medimb.softmax import SoftmaxClassifier

__all__ = [
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
    "SPMixDisplay",
    "SPMixSampler",
    "SaliencyMap",
    "SoftmaxClassifier",
    "TauNormalization",
    "VirtualFeatureCalibration",
]
__version__ = "0.1.0.dev0"
