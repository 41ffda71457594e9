"""Imbalanced medical image classification, the scikit-learn way."""

from sklearn_medimb.cssn import CSSNClassifier
from sklearn_medimb.softmax import SoftmaxClassifier

__all__ = ["CSSNClassifier", "SoftmaxClassifier"]
__version__ = "0.1.0.dev0"
