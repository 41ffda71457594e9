"""Measures of imbalanced classification that scikit-learn and imbalanced-learn lack.

Balanced accuracy, macro-F1 and AUROC are in :mod:`sklearn.metrics`; sensitivity, specificity and
the geometric mean in :mod:`imblearn.metrics`. Here are recalls of frequent and rare classes, errors
of calibration, and intervals that know that images of a patient resemble one another.

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

__all__ = [
    "Interval",
    "ShotRecall",
    "expected_calibration_error",
    "head_tail_gap",
    "metric_interval",
    "paired_difference",
    "scorer_difference",
    "scorer_interval",
    "scorer_name",
    "scorers",
    "shot_recall",
    "with_labels",
]
