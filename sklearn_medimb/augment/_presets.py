"""Augmentations by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sklearn_medimb.augment._augmentation import Augmentation
from sklearn_medimb.augment._geometry import FLIPS

_MEDICAL = {
    "horizontal_flip": 0.5,
    "vertical_flip": 0.5,
    "depth_flip": 0.5,
    "rotation": 15.0,
    "tilt": 5.0,
    "scale": 0.15,
    "translate": 0.08,
    "gamma": 0.2,
    "contrast": 0.2,
    "brightness": 0.2,
    # To warp all of them takes more steps to learn than it gives; to warp none forgets small sets.
    "warp_probability": 0.5,
}
_STRONG = _MEDICAL | {
    "warp_probability": 1.0,
    "rotation": 180.0,
    "tilt": 15.0,
    "crop": 0.6,
    "blur": 1.0,
    "noise": 0.05,
    "cutout": 0.3,
}
_VIEWS = {
    "horizontal_flip": 0.5,
    "blur": 1.0,
    "contrast": 0.4,
    "brightness": 0.2,
    "hue": 0.1,
    "grayscale": 0.2,
}

AUGMENTATIONS: dict[str, Callable[[], Augmentation]] = {
    "none": Augmentation,
    "light": partial(
        Augmentation,
        horizontal_flip=0.5,
        rotation=10.0,
        scale=0.1,
        translate=0.05,
        contrast=0.1,
        brightness=0.1,
    ),
    "medical": partial(Augmentation, **_MEDICAL),
    # A heart is on the left: mirrored, a film of the chest is one of another disease.
    "chest": partial(Augmentation, **{k: v for k, v in _MEDICAL.items() if k not in FLIPS}),
    "strong": partial(Augmentation, **_STRONG),
    "contrastive": partial(
        Augmentation, **_VIEWS, vertical_flip=0.5, depth_flip=0.5, crop=0.45, saturation=0.2
    ),
    # The smallest window has 0.08 of the area.
    "mimv": partial(Augmentation, **_VIEWS, crop=0.28, saturation=0.4),
}
"""Presets: what to call, without arguments, for a new augmentation of that name."""


def resolve_augmentation(augment: str | Augmentation | None) -> Augmentation:
    """Turn what a user may pass as `augment` into an augmentation.

    Parameters
    ----------
    augment : {"none", "light", "medical", "chest", "strong", "contrastive", "mimv"}, \
            Augmentation or None
        A preset; None stands for "none". "medical" flips along every axis, "chest" is the same
        without flips, for images whose left is not their right; "contrastive" and "mimv" are hard
        views for self-supervised pre-training. Any object with the methods `draw` and `apply` of
        :class:`Augmentation` is returned as it is.

    Returns
    -------
    augmentation : Augmentation
        A new instance for a preset, otherwise `augment` itself.
    """
    if augment is None:
        augment = "none"
    presets = ", ".join(map(repr, AUGMENTATIONS))
    if isinstance(augment, str):
        if augment not in AUGMENTATIONS:
            raise ValueError(f"augment must be one of {presets}, got {augment!r}.")
        return AUGMENTATIONS[augment]()
    methods = (getattr(augment, name, None) for name in ("draw", "apply"))
    if isinstance(augment, type) or not all(map(callable, methods)):
        raise TypeError(
            f"augment must be one of {presets}, None, or an object with the methods draw and "
            f"apply such as Augmentation(), got {augment!r}."
        )
    return augment
