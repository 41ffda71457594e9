"""From probabilities to decisions: thresholds that keep a promise, true frequencies, refusals.

Imports `_data`, `metrics`.
"""

from sklearn_medimb.decisions._operating_point import OperatingPoint
from sklearn_medimb.decisions._prior import PriorShift, shift_prior

__all__ = ["OperatingPoint", "PriorShift", "shift_prior"]
