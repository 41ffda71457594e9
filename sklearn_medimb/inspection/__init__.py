"""Pictures: what the methods do, what they found, and how well.

Each has ``from_estimator`` or ``from_predictions``, takes axes of the caller, has colours that
colour-blind readers tell apart, and a title that says what it shows.

Imports `_data`, `_machine`, `decisions`, `metrics`, `mixing`, `over_sampling`, `saliency`.
"""

from sklearn_medimb.inspection._calibration import CalibrationByClassDisplay
from sklearn_medimb.inspection._coverage import CoverageDisplay
from sklearn_medimb.inspection._embedding import EmbeddingDisplay
from sklearn_medimb.inspection._evidence import SimilarityEvidenceDisplay
from sklearn_medimb.inspection._recalls import RecallByClassDisplay
from sklearn_medimb.inspection._saliency import SaliencyDisplay, grad_cam
from sklearn_medimb.inspection._spmix import SPMixDisplay
from sklearn_medimb.inspection._training import TrainingCurveDisplay

__all__ = [
    "CalibrationByClassDisplay",
    "CoverageDisplay",
    "EmbeddingDisplay",
    "RecallByClassDisplay",
    "SPMixDisplay",
    "SaliencyDisplay",
    "SimilarityEvidenceDisplay",
    "TrainingCurveDisplay",
    "grad_cam",
]
