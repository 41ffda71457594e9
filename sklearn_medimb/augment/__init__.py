"""Batched, replayable augmentation of 2-D and 3-D medical images.

An :class:`Augmentation` works in two steps: `draw` takes every random decision for a batch
from an explicit generator, and `apply` is a pure function of the images and of those draws.
Both treat the whole batch at once, on its device, and never wait for a value to come back
from it. Nor do they send any: constants are made there, so that a CUDA graph may hold both.
Small images are over before the next kernel starts, so that kernels are what is saved.

Imports `_parameters`.
"""

from sklearn_medimb.augment._augmentation import Augmentation
from sklearn_medimb.augment._geometry import geometry
from sklearn_medimb.augment._presets import AUGMENTATIONS, resolve_augmentation
from sklearn_medimb.augment._symmetries import symmetries

__all__ = ["AUGMENTATIONS", "Augmentation", "geometry", "resolve_augmentation", "symmetries"]
