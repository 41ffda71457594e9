"""What self-supervised losses are made of."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from sklearn_medimb._training.criterion import Criterion
from sklearn_medimb._training.momentum import follow
from sklearn_medimb.backbones import as_features


def perceptron(widths: list[int], *, last_norm: bool, affine: bool = True) -> nn.Sequential:
    """Linear layers with batch normalisation and ReLU between them.

    Parameters
    ----------
    widths : list of int
        Of the input and of each layer.
    last_norm, affine : bool
        Whether normalisation follows the last layer too, and has scale and shift there.
    """
    layers: list[nn.Module] = []
    for i, (n_in, n_out) in enumerate(pairwise(widths), 2):
        is_last = i == len(widths)
        layers.append(nn.Linear(n_in, n_out, bias=is_last and not last_norm))
        if not is_last:
            layers += [nn.BatchNorm1d(n_out), nn.ReLU()]
        elif last_norm:
            layers.append(nn.BatchNorm1d(n_out, affine=affine))
    return nn.Sequential(*layers)


class EncodedViews(NamedTuple):
    """Features (B, d) of each online view; the images of each target view as they came."""

    features: list[torch.Tensor]
    target: list[torch.Tensor]


def encode(
    network: Any, branches: dict[str, torch.Tensor], n_online: int, n_target: int
) -> EncodedViews:
    """Forward pass of pre-training: of any network of the package only the backbone.

    Each view passes alone, so that batch normalisation sees one kind of view at a time.
    """
    online = branches["online"].chunk(n_online)
    target = branches["target"].chunk(n_target) if n_target else ()
    return EncodedViews([as_features(network.trunk(view)) for view in online], list(target))


class Objective(Criterion):
    """A self-supervised loss; owns what only training needs.

    The online views pass the network one by one, or `jointly`, as a method's authors have them.

    Parameters
    ----------
    network : nn.Module
        Has the backbone as `trunk`.
    projector : nn.Module
        From features to the space of the loss.
    momentum : float or None, default=None
        m of the target branch, ``k <- m k + (1 - m) q`` before each forward pass, parameters only;
        None has no target branch.
    """

    jointly = False

    def __init__(self, network: Any, projector: nn.Module, momentum: float | None = None) -> None:
        super().__init__()
        self.projector = projector
        self.momentum = momentum
        if momentum is not None:
            online = {"trunk": network.trunk, "projector": projector}
            self.target = nn.ModuleDict({k: copy.deepcopy(v) for k, v in online.items()})
            self.target.requires_grad_(False)

    def project_target(self, images: torch.Tensor) -> torch.Tensor:
        """Projections of a target view: no gradient, batch statistics of its own."""
        with torch.no_grad():
            return self.target["projector"](as_features(self.target["trunk"](images)))

    def go_on(self, last: dict[str, Any]) -> None:
        """Go on from an earlier projector, if it is of this shape."""
        if _shapes(last) == _shapes(self.state_dict()):
            self.load_state_dict(last)

    def before_step(self, network: Any) -> None:
        """Move the target branch."""
        if self.momentum is None:
            return
        follow(self.target["trunk"], network.trunk, 1 - self.momentum)
        follow(self.target["projector"], self.projector, 1 - self.momentum)


def _shapes(state: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, "shape", None) for name, value in state.items()}
