"""From probabilities to decisions: thresholds that keep a promise, true frequencies, refusals.

All wrap any classifier of scikit-learn's kind, and one another. What they choose they choose on
predictions for patients whom the classifier has not seen: ``fit(X, y, groups=patients)``.

Probabilities that are too sure of themselves need nothing new: scikit-learn (from 1.8 on) divides
their logarithms by one temperature [1]_, fitted on out-of-fold predictions, of whole patients if
its folds are::

    folds = list(StratifiedGroupKFold(5).split(X, y, patients))
    calibrated = CalibratedClassifierCV(clf, method="temperature", cv=folds).fit(X, y)

or, with ``sklearn.set_config(enable_metadata_routing=True)`` and within other searches and folds::

    calibrated = CalibratedClassifierCV(
        clf.set_fit_request(groups=True), method="temperature", cv=StratifiedGroupKFold(5)
    ).fit(X, y, groups=patients)

Then ``PriorShift(calibrated, prevalence, train_prior="training")`` speaks of the true frequencies,
and ``OperatingPoint(calibrated, ...)`` decides.

References
----------
.. [1] C. Guo et al., "On calibration of modern neural networks", ICML 2017.

Imports `_data`, `_pages`, `metrics`.
"""

from sklearn_medimb.decisions._operating_point import OperatingPoint
from sklearn_medimb.decisions._prior import PriorShift, shift_prior
from sklearn_medimb.decisions._selective import (
    CoverageCurve,
    SelectiveClassifier,
    coverage_curve,
)

__all__ = [
    "CoverageCurve",
    "OperatingPoint",
    "PriorShift",
    "SelectiveClassifier",
    "coverage_curve",
    "shift_prior",
]
