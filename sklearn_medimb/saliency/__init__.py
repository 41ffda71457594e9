"""Where an image catches the eye: pure functions from images to maps in [0, 1].

Images are tensors of shape ``(n, C, H, W)`` or ``(n, C, D, H, W)``, maps ``(n, H, W)`` or
``(n, D, H, W)``. Everything is batched, on the device of the images, and free of scale: ``a x + b``
has the map of ``x``, so uint8, [0, 1] and Hounsfield units need no rescaling. A constant image has
nothing salient: its map is zero.

Imports `_data`, `_machine`, `_parameters`.
"""

from sklearn_medimb.saliency._detectors import (
    DETECTORS,
    POLARITIES,
    Detector,
    center,
    fine_grained,
    intensity,
    spectral_residual,
    valid_region,
)
from sklearn_medimb.saliency._maps import SaliencyMap, as_maps, check_maps, maps_of, saliency_maps

__all__ = [
    "DETECTORS",
    "POLARITIES",
    "Detector",
    "SaliencyMap",
    "as_maps",
    "center",
    "check_maps",
    "fine_grained",
    "intensity",
    "maps_of",
    "saliency_maps",
    "spectral_residual",
    "valid_region",
]
