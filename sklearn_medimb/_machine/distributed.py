"""Several processes, one training: each encodes its share of a batch, all learn from the whole.

Every process draws the same batches from the same seeds. The backbone, where the time goes, sees
only the process's own share of a batch; its features are then gathered, and head and loss are
computed on all of them everywhere. So a loss over the pairs of a batch (comparison, contrast) is
that of the whole batch; averaging the losses of the shares, as is done elsewhere, would drop the
pairs between them.
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def launched() -> bool:
    """Whether a launcher such as ``torchrun`` started this process as one of several."""
    if multiprocessing.parent_process() is not None:  # a worker of joblib inherits the variables
        return False
    if os.environ.get("SKLEARN_MEDIMB_DISTRIBUTED") == "0":  # each process trains on its own
        return False
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def local_rank() -> int:
    """Number of this process on its machine, which is that of its GPU; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", 0)) if launched() else 0


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if launched() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files and shows progress."""
    return world_size() == 1 or dist.get_rank() == 0


def join(device: torch.device) -> None:
    """Meet the other processes of the launcher; nothing happens without one."""
    if launched() and not dist.is_initialized():
        # Its functions' defaults are the group there is at its import, and would keep that group,
        # with its threads, beyond `_leave`: threads which the end of Python then aborts.
        importlib.import_module("torch.distributed.nn.functional")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group()  # gloo for the CPU, and nccl where there are GPUs
        atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def agree(seed: int, digest: str) -> int:
    """Seed of the first process, after a check that all were given the same data.

    Parameters
    ----------
    seed : int
        Seed that this process would take.
    digest : str
        Of what must be equal everywhere.

    Raises
    ------
    ValueError
        If the processes hold different data.
    """
    seen: list[Any] = [None] * world_size()
    dist.all_gather_object(seen, (seed, digest))
    if len({theirs for _, theirs in seen}) > 1:
        raise ValueError(
            "The processes of this training were given different X or y: pass the whole training "
            "set in each; every process takes its own share of each batch. To train apart, set the "
            "environment variable SKLEARN_MEDIMB_DISTRIBUTED=0."
        )
    return seen[0][0]


def by_main(function: Callable[[], Any]) -> Any:
    """What the first process gets from a call, or the exception it raises, in all of them."""
    if world_size() == 1:
        return function()
    answer: list[Any] = [None, None]
    if is_main():
        try:
            answer[0] = function()
        except Exception as error:  # the others wait for an answer
            answer[1] = error
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def of_main(number: float) -> float:
    """The first process's value of a number on which a decision rests, lest they part ways."""
    return by_main(lambda: number)


@torch.no_grad()
def share_weights(module: nn.Module) -> None:
    """Begin with the first process's weights: those of a module from outside came unseeded."""
    if world_size() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, 0)


class _Gather(torch.autograd.Function):
    """Rows of all processes, in order of rank.

    What follows is computed alike everywhere, so that the gradient of one's own rows is at hand;
    it is multiplied by the number of processes because `average_gradients` divides by it.
    """

    @staticmethod
    def forward(_ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.chunk(world_size())[dist.get_rank()] * world_size()


def share_out(encode: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Encode this process's share of a batch, and gather the others'.

    Parameters
    ----------
    encode : callable
        Images to one output row per image.
    images : tensor of shape (n, ...)
        The same in every process.

    Returns
    -------
    output : tensor of shape (n, ...)
        As of ``encode(images)``, with gradients towards the own share.
    """
    size, n = world_size(), len(images)
    if size == 1:
        return encode(images)
    share = -(-n // size)  # the last shares are filled up with the last image
    rows = torch.arange(share, device=images.device) + dist.get_rank() * share
    return _Gather.apply(encode(images[rows.clamp_(max=n - 1)]).contiguous())[:n]


def _average(tensors: Iterable[Tensor]) -> None:
    own = list(tensors)
    if not own:
        return
    flat = torch.cat([tensor.flatten() for tensor in own])
    dist.all_reduce(flat)
    flat /= world_size()
    parts = flat.split([tensor.numel() for tensor in own])
    for tensor, mean in zip(own, parts, strict=True):
        tensor.copy_(mean.view(tensor.shape))


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Make gradients equal everywhere: those of the whole batch."""
    if world_size() > 1:
        _average(p.grad for p in parameters if p.grad is not None)


@torch.no_grad()
def average_buffers(module: nn.Module) -> None:
    """Make running statistics equal everywhere; each process saw its own share of the batches."""
    if world_size() > 1:
        _average(buffer for buffer in module.buffers() if buffer.is_floating_point())
