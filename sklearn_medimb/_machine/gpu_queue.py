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
from filelock import FileLock, Timeout

from sklearn_medimb._machine.graphs import empty_cache

# Beside what is counted: the CUDA context of a process, and the libraries' workspace.
OVERHEAD = 2**30
# More than any GPU has: of a fit that runs when it is alone.
ALL_MEMORY = 2**62
# What of a GPU is handed out.
SHARE = 0.9

_waited: ContextVar[bool] = ContextVar("_waited", default=False)


class MemoryQueue:
    """Reservations of one device's memory, kept as locked files that any process can see.

    Who comes first is served first. A process that dies, even by SIGKILL, loses its locks and with
    them its place or its memory. One that needs more than there is waits until it is alone, and
    then tries.

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
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex}.{n_bytes}"
        place, memory = (FileLock(self.folder / f"{name}.{kind}") for kind in ("waits", "held"))
        with FileLock(self.folder / "queue.lock"):  # who looks would take it for one of the dead
            place.acquire(timeout=0)
        with _kept(place):
            while not self._admit(place, memory, n_bytes):
                time.sleep(self.poll)
        with _kept(memory):
            yield

    def _admit(self, place: FileLock, memory: FileLock, n_bytes: int) -> bool:
        """Take the memory, if it is there and nobody waits longer."""
        with FileLock(self.folder / "queue.lock"):
            for path in sorted(self.folder.glob("*.waits")):
                if path == Path(place.lock_file):
                    break
                if _is_alive(path):
                    return False
            held = [path for path in self.folder.glob("*.held") if _is_alive(path)]
            taken = sum(int(path.suffixes[-2][1:]) for path in held)
            if held and taken + n_bytes > self.capacity:
                return False
            memory.acquire(timeout=0)
            return True


@contextmanager
def _kept(lock: FileLock) -> Iterator[None]:
    """Hold a lock inside the block, and leave no file behind."""
    try:
        lock.acquire(timeout=0)  # a second time, for one that is held
        yield
    finally:
        lock.release(force=True)
        Path(lock.lock_file).unlink(missing_ok=True)


def _is_alive(path: Path) -> bool:
    """Whether a process still holds this lock; the file of one that is gone is removed."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    path.unlink(missing_ok=True)
    return False


@contextmanager
def waiting_for_memory(device: torch.device, n_bytes: Callable[[], int]) -> Iterator[None]:
    """Wait until a GPU has memory to spare, and hold it inside the block.

    Nothing happens on other devices, and for a fit inside another one. The queue is that of one
    user on one machine (and of one TMPDIR).

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
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"sklearn_medimb-{user}" / str(properties.uuid)
    queue = MemoryQueue(folder, int(SHARE * properties.total_memory))
    token = _waited.set(True)
    try:
        with queue.reserve(n_bytes() + OVERHEAD):
            try:
                yield
            finally:
                empty_cache()  # before the next one counts on it
    finally:
        _waited.reset(token)
