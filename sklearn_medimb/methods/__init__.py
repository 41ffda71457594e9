"""The methods: one paper, one file, readable beside the paper.

Imports `_data`, `_machine`, `_parameters`, `_training`, `augment`, `backbones`, `base`, `losses`,
`metric_losses`, `mixing`, `over_sampling`, `rebalance`, `saliency`.
"""

from sklearn_medimb.methods._amimv import AMIMVClassifier, AMIMVEncoder
from sklearn_medimb.methods._cssn import CSSNClassifier, SupportBank
from sklearn_medimb.methods._lmd import LMDClassifier
from sklearn_medimb.methods._metric_two_stage import MetricTwoStageClassifier
from sklearn_medimb.methods._pretrained_features import PretrainedFeatures
from sklearn_medimb.methods._self_supervised import SSLEncoder
from sklearn_medimb.methods._softmax import SoftmaxClassifier
from sklearn_medimb.methods._spmix import SPMixClassifier
from sklearn_medimb.methods._tailboost import Contrast

__all__ = [
    "AMIMVClassifier",
    "AMIMVEncoder",
    "CSSNClassifier",
    "Contrast",
    "LMDClassifier",
    "MetricTwoStageClassifier",
    "PretrainedFeatures",
    "SPMixClassifier",
    "SSLEncoder",
    "SoftmaxClassifier",
    "SupportBank",
]
