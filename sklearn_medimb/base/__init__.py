"""What every estimator shares, and what a method of one's own is made of.

Imports `_data`, `_machine`, `_parameters`, `_training`, `augment`, `backbones`, `losses`,
`metrics`, `rebalance`.
"""

from sklearn_medimb._data.batches import Batches, BatchSource, Context
from sklearn_medimb._data.plans import class_balanced, pk, shuffled
from sklearn_medimb._parameters import (
    Declaring,
    above,
    at_least,
    integers,
    learned,
    one_of,
    parameter,
    within,
)
from sklearn_medimb._training.criterion import Criterion, LabelCriterion
from sklearn_medimb._training.network import Output, SoftmaxNetwork, Trunk
from sklearn_medimb._training.objectives import EncodedViews, Objective, perceptron
from sklearn_medimb._training.stage import Stage, TrainingSet
from sklearn_medimb._training.views import Views
from sklearn_medimb.base._classifier import BaseImageClassifier
from sklearn_medimb.base._encoder import BaseImageEncoder
from sklearn_medimb.base._image_estimator import BaseImageEstimator
from sklearn_medimb.base._one_stage import CosineHead, OneStageClassifier
from sklearn_medimb.base._two_stage import TwoStageClassifier

__all__ = [
    "BaseImageClassifier",
    "BaseImageEncoder",
    "BaseImageEstimator",
    "BatchSource",
    "Batches",
    "Context",
    "CosineHead",
    "Criterion",
    "Declaring",
    "EncodedViews",
    "LabelCriterion",
    "Objective",
    "OneStageClassifier",
    "Output",
    "SoftmaxNetwork",
    "Stage",
    "TrainingSet",
    "Trunk",
    "TwoStageClassifier",
    "Views",
    "above",
    "at_least",
    "class_balanced",
    "integers",
    "learned",
    "one_of",
    "parameter",
    "perceptron",
    "pk",
    "shuffled",
    "within",
]
