"""What a stage of training minimises."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Criterion(nn.Module):
    """A loss, and whatever else only training needs: its parameters are trained, then it is gone.

    A subclass writes ``forward(output, targets)``: the network's output and the batch's targets to
    a scalar. The rest is there for those that have more to say.

    Attributes
    ----------
    terms : dict of str to tensor
        Parts of the latest loss by name. The history has their means of each epoch, as
        ``train_<name>``.

    Notes
    -----
    What predictions need belongs in the network, by `_make_network` or `_make_head`: of the best
    epoch of early stopping the network is kept, not the criterion. Numbers that are no tensors,
    such as counters of rounds, survive a crash through torch's own ``get_extra_state`` and
    ``set_extra_state``. Where a GPU can, it replays steps without Python: what changes from step to
    step, a counter too, is best a buffer. One that is a number is noticed, and steps are then taken
    one by one, which is slower. A copy of the network that only follows it has
    ``requires_grad_(False)``: it is no part of what the optimiser moves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.terms: dict[str, torch.Tensor] = {}

    def start_from(self, network: nn.Module) -> None:
        """Look at the network as it is when the stage begins."""

    def go_on(self, last: dict[str, Any]) -> None:
        """Take over what an earlier fit, which this one goes on from, left in its last criterion.

        Parameters
        ----------
        last : dict
            State of that criterion; it may be of another kind.
        """

    def before_step(self, network: nn.Module) -> None:
        """Follow the network, with the weights that the coming step sees."""

    def after_step(self, network: nn.Module) -> None:
        """Follow the network after a step of the optimiser."""

    def complaints(self) -> list[str]:
        """What the user should know about the training that was."""
        return []


class LabelCriterion(Criterion):
    """A loss of the logits alone.

    Parameters
    ----------
    label_loss : nn.Module
        (logits, label masses) to a scalar.
    """

    def __init__(self, label_loss: nn.Module) -> None:
        super().__init__()
        self.label_loss = label_loss

    def forward(self, output: Any, mass: torch.Tensor) -> torch.Tensor:
        """Loss of a batch."""
        return self.label_loss(output.logits, mass)
