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
    follower: nn.Module, original: nn.Module, share: float | Tensor, *, buffers: bool = False
) -> None:
    """Move the parameters of a copy a share of the way to those of the original.

    Parameters
    ----------
    follower, original : nn.Module
        Of the same architecture; `follower` is changed in place.
    share : float or tensor of shape ()
        1 - m for a momentum m.
    buffers : bool, default=False
        Whether running means of normalisation layers follow too.
    """
    old: list[Tensor] = list(follower.parameters())
    new: list[Tensor] = list(original.parameters())
    if buffers:
        old += [buffer for buffer in follower.buffers() if buffer.is_floating_point()]
        new += [buffer for buffer in original.buffers() if buffer.is_floating_point()]
    weight: Any = share
    if isinstance(share, Tensor):
        weight = [share.to(old[0].dtype)] * len(old)
    torch._foreach_lerp_(old, new, weight)


class RunningMean(nn.Module):
    """Weights of a running mean of steps, counted on the device: a replayed step counts too.

    Parameters
    ----------
    decay : float
        Largest share of the old mean.
    """

    n_steps: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("n_steps", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def next_share(self) -> Tensor:
        """1 - a_t of step t = 0, 1, ..., with ``a_t = min(1 - 1 / (t + 1), decay)``."""
        self.n_steps += 1
        return (1 / self.n_steps).clamp_min(1 - self.decay)


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
        like = next(network.parameters())
        self.shares = RunningMean(decay).to(like.device, like.dtype)

    def after_step(self, network: nn.Module) -> None:
        """Follow the network."""
        follow(self.mean, network, self.shares.next_share(), buffers=True)

    def tensors(self) -> list[Tensor]:
        """All that a step changes."""
        return [*self.mean.parameters(), *self.mean.buffers(), *self.shares.buffers()]

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
        return {"shares": self.shares.state_dict(), "mean": self.mean.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from such a state."""
        self.shares.load_state_dict(state["shares"])
        self.mean.load_state_dict(state["mean"])


class KeyQueue(nn.Module):
    """The latest keys and their classes: a ring, of which places that were not filled are known.

    Parameters
    ----------
    size : int
        Largest number of keys; 0 keeps none.
    dim : int
        Length of a key.
    """

    keys: Tensor
    labels: Tensor
    n_seen: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("keys", torch.zeros(size, dim))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.long))
        self.register_buffer("n_seen", torch.zeros((), dtype=torch.long))

    def filled(self) -> Tensor:
        """Which places (size,) hold a key."""
        return torch.arange(self.size, device=self.keys.device) < self.n_seen

    @torch.no_grad()
    def push(self, keys: Tensor, labels: Tensor | None = None) -> None:
        """Store keys in place of the oldest ones; of more keys than places the last ones stay."""
        if not self.size:
            return
        n_left_out = max(len(keys) - self.size, 0)
        kept = keys[n_left_out:]
        places = (
            self.n_seen + n_left_out + torch.arange(len(kept), device=keys.device)
        ) % self.size
        self.keys.index_put_((places,), kept.to(self.keys.dtype))
        if labels is not None:
            self.labels.index_put_((places,), labels[n_left_out:])
        self.n_seen += len(keys)
