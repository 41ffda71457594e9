"""Data sets: readers, and makers of imbalance.

Imports `_data`.
"""

from sklearn_medimb._data.containers import DatasetImages, MappedImages
from sklearn_medimb._data.files import ImageFiles
from sklearn_medimb._data.resize import Resize
from sklearn_medimb.datasets._folders import from_folder, from_table
from sklearn_medimb.datasets._lesions import make_lesions
from sklearn_medimb.datasets._long_tail import make_long_tailed
from sklearn_medimb.datasets._npz import load_npz

__all__ = [
    "DatasetImages",
    "ImageFiles",
    "MappedImages",
    "Resize",
    "from_folder",
    "from_table",
    "load_npz",
    "make_lesions",
    "make_long_tailed",
]
