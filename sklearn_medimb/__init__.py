"""Imbalanced medical image classification, the scikit-learn way."""

from sklearn_medimb.methods._amimv import AMIMVClassifier, AMIMVEncoder
from sklearn_medimb._data.batches import BalancedBatchSampler
from sklearn_medimb.methods._cssn import CSSNClassifier
from sklearn_medimb.inspection import SPMixDisplay
from sklearn_medimb.methods._lmd import LMDClassifier
from sklearn_medimb.methods._metric_two_stage import MetricTwoStageClassifier
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
from sklearn_medimb.methods._self_supervised import SSLEncoder
from sklearn_medimb.methods._softmax import SoftmaxClassifier
from sklearn_medimb.methods._spmix import SPMixClassifier

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
    "SPMixClassifier",
    "SPMixDisplay",
    "SPMixSampler",
    "SSLEncoder",
    "SaliencyMap",
    "SoftmaxClassifier",
    "TauNormalization",
    "VirtualFeatureCalibration",
]
__version__ = "0.1.0.dev0"
