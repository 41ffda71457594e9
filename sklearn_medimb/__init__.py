"""Imbalanced medical image classification, the scikit-learn way."""

from sklearn_medimb.batches import BalancedBatchSampler
from sklearn_medimb.cssn import CSSNClassifier
from sklearn_medimb.inspection import SPMixDisplay
from sklearn_medimb.over_sampling import BalancedVirtualFeatures, SPMixSampler
from sklearn_medimb.saliency import SaliencyMap
from sklearn_medimb.softmax import SoftmaxClassifier

__all__ = [
    "BalancedBatchSampler",
    "BalancedVirtualFeatures",
    "CSSNClassifier",
    "SPMixDisplay",
    "SPMixSampler",
    "SaliencyMap",
    "SoftmaxClassifier",
]
__version__ = "0.1.0.dev0"
