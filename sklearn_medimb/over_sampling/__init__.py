"""imbalanced-learn samplers for images and for embeddings.

Imports `_data`, `_machine`, `_parameters`, `mixing`, `saliency`.
"""

from sklearn_medimb.over_sampling._spmix import SPMixSampler
from sklearn_medimb.over_sampling._virtual_features import BalancedVirtualFeatures

__all__ = ["BalancedVirtualFeatures", "SPMixSampler"]
