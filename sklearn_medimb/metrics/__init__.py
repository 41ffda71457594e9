"""Measures of imbalanced classification that scikit-learn and imbalanced-learn lack.

Balanced accuracy, macro-F1 and AUROC are in :mod:`sklearn.metrics`; sensitivity, specificity and
the geometric mean in :mod:`imblearn.metrics`. Here are recalls of frequent and rare classes, errors
of calibration, predictive values at the true frequency of a disease, and intervals that know that
images of a patient resemble one another.

Imports `_data`.
"""

from sklearn_medimb.metrics._calibration import expected_calibration_error
from sklearn_medimb.metrics._intervals import (
    metric_interval,
    paired_difference,
    scorer_difference,
    scorer_interval,
)
from sklearn_medimb.metrics._recalls import ShotRecall, head_tail_gap, shot_recall
from sklearn_medimb.metrics._score_intervals import Interval
from sklearn_medimb.metrics._scorers import scorer_name, scorers, with_labels
from sklearn_medimb.metrics._sides import (
    negative_predictive_value,
    positive_predictive_value,
)

__all__ = [
    "Interval",
    "ShotRecall",
    "expected_calibration_error",
    "head_tail_gap",
    "metric_interval",
    "negative_predictive_value",
    "paired_difference",
    "positive_predictive_value",
    "scorer_difference",
    "scorer_interval",
    "scorer_name",
    "scorers",
    "shot_recall",
    "with_labels",
]
