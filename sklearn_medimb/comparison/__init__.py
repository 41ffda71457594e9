"""Several methods on the same images, folds and patients, and advice which to take.

Imports `_data`, `_machine`, `_training`, `augment`, `backbones`, `base`, `decisions`, `inspection`,
`methods`, `metrics`, `over_sampling`.
"""

from sklearn_medimb.comparison._advice import Advice
from sklearn_medimb.comparison._compare import compare_methods
from sklearn_medimb.comparison._methods import common_methods
from sklearn_medimb.comparison._recommend import recommend
from sklearn_medimb.comparison._result import Comparison

__all__ = ["Advice", "Comparison", "common_methods", "compare_methods", "recommend"]
