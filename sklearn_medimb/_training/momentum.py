"""What is kept of past steps: slowly moving copies of a network, a queue of keys."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def follow(
    follower: nn.Module, original: nn.Module, share: float, *, buffers: bool = False
) -> None:
    """Move the parameters of a copy a share of the way to those of the original.

    Parameters
    ----------
    follower, original : nn.Module
        Of the same architecture; `follower` is changed in place.
    share : float
        1 - m for a momentum m.
    buffers : bool, default=False
        Whether running means of normalisation layers follow too.
    """
    old: list[Tensor] = list(follower.parameters())
    new: list[Tensor] = list(original.parameters())
    if buffers:
        old += [buffer for buffer in follower.buffers() if buffer.is_floating_point()]
        new += [buffer for buffer in original.buffers() if buffer.is_floating_point()]
    torch._foreach_lerp_(old, new, share)


class WeightAverage:
    """Running mean of the weights of a network, which predicts in its place.

    ``theta' <- a_t theta' + (1 - a_t) theta`` after step t = 0, 1, ..., of running statistics too,
    with ``a_t = min(1 - 1 / (t + 1), decay)``: at first it is the mean of all steps.

    Parameters
    ----------
    network : nn.Module
        Its copy is the mean.
    decay : float
        Largest share of the old mean.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.mean = copy.deepcopy(network).requires_grad_(False)
        self.decay = decay
        self.n_steps = 0

    def after_step(self, network: nn.Module) -> None:
        """Follow the network."""
        share = 1 - min(1 - 1 / (self.n_steps + 1), self.decay)
        follow(self.mean, network, share, buffers=True)
        self.n_steps += 1

    @contextmanager
    def in_place_of(self, network: nn.Module) -> Iterator[None]:
        """Let the network have the mean weights for a while."""
        self._exchange(network)
        try:
            yield
        finally:
            self._exchange(network)

    @torch.no_grad()
    def _exchange(self, network: nn.Module) -> None:
        for one, other in zip(
            chain(network.parameters(), network.buffers()),
            chain(self.mean.parameters(), self.mean.buffers()),
            strict=True,
        ):
            one.data, other.data = other.data, one.data

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit needs to average on."""
        return {"n_steps": self.n_steps, "mean": self.mean.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from such a state."""
        self.n_steps = state["n_steps"]
        self.mean.load_state_dict(state["mean"])


class KeyQueue(nn.Module):
    """The latest keys and their classes: a ring that starts empty.

    Parameters
    ----------
    size : int
        Largest number of keys; 0 keeps none.
    dim : int
        Length of a key.
    """

    keys: Tensor
    labels: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.size = size
        self.n_seen = 0
        self.register_buffer("keys", torch.zeros(size, dim))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.long))

    def __len__(self) -> int:
        return min(self.n_seen, self.size)

    def filled(self) -> tuple[Tensor, Tensor]:
        """Keys (m, dim) and classes (m,) of the places that were filled, in no order."""
        return self.keys[: len(self)], self.labels[: len(self)]

    @torch.no_grad()
    def push(self, keys: Tensor, labels: Tensor | None = None) -> None:
        """Store keys in place of the oldest ones; of more keys than places the last ones stay."""
        if not self.size:
            return
        n_given = len(keys)
        if labels is None:
            labels = torch.zeros(n_given, dtype=torch.long, device=keys.device)
        keys, labels = keys[-self.size :], labels[-self.size :]
        start = (self.n_seen + n_given - len(keys)) % self.size
        first = min(len(keys), self.size - start)  # before the ring closes
        for ring, new in ((self.keys, keys), (self.labels, labels)):
            ring[start : start + first] = new[:first].to(ring.dtype)
            ring[: len(new) - first] = new[first:].to(ring.dtype)
        self.n_seen += n_given

    def get_extra_state(self) -> dict[str, Any]:
        """How many keys came, so that a resumed fit goes on in the same place."""
        return {"n_seen": self.n_seen}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on counting from there."""
        self.n_seen = state["n_seen"]
