"""Several methods on the same images, folds and patients.

Imports `_data`, `_machine`, `_training`, `decisions`, `inspection`, `methods`, `metrics`.
"""

from sklearn_medimb.comparison._compare import compare_methods
from sklearn_medimb.comparison._methods import common_methods
from sklearn_medimb.comparison._result import Comparison

__all__ = ["Comparison", "common_methods", "compare_methods"]
