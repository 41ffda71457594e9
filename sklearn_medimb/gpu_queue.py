"""Fits in several processes that share a GPU wait for memory, instead of dying for want of it."""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from filelock import FileLock, Timeout  # installed with torch

# Beside what is counted: the CUDA context of a process, and the libraries' workspace.
OVERHEAD = 2**30
# What of a GPU is handed out.
SHARE = 0.9

_waited: ContextVar[bool] = ContextVar("_waited", default=False)


class MemoryQueue:
    """Reservations of one device's memory, kept as locked files that any process can see.

    A process that dies, even by SIGKILL, loses its locks and with them its reservations. One that
    needs more than there is waits until it is alone, and then tries.

    Parameters
    ----------
    folder : path-like
        Where the reservations are; one per device.
    capacity : int
        Bytes to hand out.
    poll : float, default=0.1
        Seconds between two looks at the queue.
    """

    def __init__(self, folder: str | os.PathLike[str], capacity: int, *, poll: float = 0.1) -> None:
        self.folder = Path(folder)
        self.capacity = capacity
        self.poll = poll

    @contextmanager
    def reserve(self, n_bytes: int) -> Iterator[None]:
        """Hold `n_bytes` inside the block; wait for them first."""
        self.folder.mkdir(parents=True, exist_ok=True)
        own = FileLock(self.folder / f"{uuid.uuid4().hex}.{n_bytes}.held")
        while not self._admit(own, n_bytes):
            time.sleep(self.poll)
        try:
            yield
        finally:
            own.release()
            Path(own.lock_file).unlink(missing_ok=True)

    def _admit(self, own: FileLock, n_bytes: int) -> bool:
        with FileLock(self.folder / "queue.lock"):
            taken = [size for path in self.folder.glob("*.held") if (size := _held(path))]
            if taken and sum(taken) + n_bytes > self.capacity:
                return False
            own.acquire(timeout=0)
            return True


def _held(path: Path) -> int:
    """Bytes of a reservation; 0, and the file removed, where its process is gone."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return int(path.suffixes[-2][1:])
    lock.release()
    path.unlink(missing_ok=True)
    return 0


@contextmanager
def turn(device: torch.device, n_bytes: Callable[[], int]) -> Iterator[None]:
    """Wait until a GPU has memory to spare, and hold it inside the block.

    Nothing happens on other devices, and for a fit inside another one.

    Parameters
    ----------
    device : torch.device
        Where the fit runs.
    n_bytes : callable
        Gives what it needs at most; asked on GPUs only.
    """
    if device.type != "cuda" or _waited.get():
        yield
        return
    properties = torch.cuda.get_device_properties(device)
    user = getattr(os, "getuid", int)()
    folder = Path(tempfile.gettempdir()) / f"sklearn_medimb-{user}" / str(properties.uuid)
    queue = MemoryQueue(folder, int(SHARE * properties.total_memory))
    token = _waited.set(True)
    try:
        with queue.reserve(n_bytes() + OVERHEAD):
            yield
    finally:
        _waited.reset(token)
