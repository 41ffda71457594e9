"""Data sets: readers, and makers of imbalance.

Imports `_data`.
"""

from sklearn_medimb._data.containers import DatasetImages, MappedImages
from sklearn_medimb._data.resize import Resize
from sklearn_medimb.datasets._lesions import make_lesions
from sklearn_medimb.datasets._long_tail import make_long_tailed
from sklearn_medimb.datasets._npz import load_npz

__all__ = [
    "DatasetImages",
    "MappedImages",
    "Resize",
    "load_npz",
    "make_lesions",
    "make_long_tailed",
]
