"""Weights of a start that an installed package holds: files may name them by their digest."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sklearn_medimb._machine.randomness import seeded
from sklearn_medimb.backbones import Backbone


def _place(estimator: Any) -> str:
    """What the names of the weights begin with that may be those of a start."""
    return f"{'start' if getattr(estimator, 'keeps_start_', False) else 'trunk'}.backbone."


def start_weights(estimator: Any) -> tuple[str, dict[str, np.ndarray]] | None:
    """Digest and weights of the start of an estimator's backbone, by their names in the network.

    None where there is no start, or one that would have to be fetched. The weights are as they were
    published, for images of as many channels as they were trained on.

    Raises
    ------
    ImportError
        If the package that holds them is not installed; its attribute `name` is that package.
    ValueError
        If it holds other weights.
    """
    recipe = estimator._recipe
    if not isinstance(recipe, Backbone):
        return None
    with seeded(0, torch.device("cpu")):
        weights = recipe.installed_weights()
    if weights is None or recipe.start is None:
        return None
    named = {f"{_place(estimator)}{name}": value.numpy() for name, value in weights.items()}
    return recipe.start.digest, named


def kept_of_start(estimator: Any, weights: dict[str, np.ndarray]) -> tuple[str, set[str]] | None:
    """Digest of the start that a network has kept to the bit, and the names of its weights.

    A first layer that was made to fit other channels is not among the names.
    """
    keeps = getattr(estimator, "keeps_start_", False)
    if not keeps and getattr(estimator, "fine_tune_", None) != "frozen":
        return None
    try:
        start = start_weights(estimator)
    except (ImportError, ValueError):  # not at hand: the file holds everything
        return None
    if start is None:
        return None
    digest, own = start
    same = {k: v for k, v in own.items() if k in weights and v.shape == weights[k].shape}
    is_kept = all(
        v.dtype == weights[k].dtype and v.tobytes() == weights[k].tobytes() for k, v in same.items()
    )
    return (digest, set(same)) if same and is_kept else None


def restored(estimator: Any, weights: dict[str, np.ndarray], digest: Any) -> dict[str, np.ndarray]:
    """Weights of a network, with those that a file names by the digest of their start.

    Raises
    ------
    ImportError
        If the package that holds them is not installed.
    ValueError
        If it holds others, or there is no such start.
    """
    try:
        start = start_weights(estimator)
    except ImportError as error:
        raise ImportError(
            f"its network has the weights {digest}, which are in the package {error.name} "
            f"(pip install {str(error.name).replace('_', '-')}); files of save(..., whole=True) "
            "need no package."
        ) from error
    found, own = start or ("no such weights", {})
    if found != digest:
        raise ValueError(
            f"its network has the weights {digest}, but "
            f"{type(estimator).__name__} begins with {found}: save it with whole=True where it "
            "was written."
        )
    return own | weights
