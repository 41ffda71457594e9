"""The machine under a fit: device, precision, seeds, threads and files."""

from __future__ import annotations

import inspect
import math
import multiprocessing
import os
import shutil
import signal
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from filelock import FileLock, Timeout

from sklearn_medimb._machine.distributed import launched, local_rank


def resolve_device(device: str | torch.device, *, fall_back: bool = False) -> torch.device:
    """Turn ``device=`` into a torch device; "auto" takes a CUDA GPU where there is one.

    Of the processes that ``torchrun`` started, each takes the GPU of its number.

    Parameters
    ----------
    device : str or torch.device
        "auto" or any name that torch knows.
    fall_back : bool, default=False
        Whether an absent GPU becomes the CPU, with a warning, instead of an error: a model trained
        elsewhere must load here.

    Returns
    -------
    device : torch.device
        A device of this machine.

    Raises
    ------
    ValueError
        If torch does not know the name or this machine lacks the device.
    """
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if str(device) == "cuda" and launched():
        device = f"cuda:{local_rank()}"
    try:
        resolved = torch.device(device)
        torch.empty(0, device="cpu" if resolved.type == "cuda" else resolved)
    except Exception as error:
        raise ValueError(
            f'device={str(device)!r} cannot be used: choose "auto", "cpu" or "cuda" ({error}).'
        ) from error
    if resolved.type == "meta":
        raise ValueError('device="meta" holds no data: choose "auto", "cpu" or "cuda".')
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if resolved.type == "cuda" and (resolved.index or 0) >= n_gpus:
        if not fall_back:
            one_each = launched() and n_gpus > 0
            remedy = (
                'start one process on each, or set device="cpu"'
                if one_each
                else ('set device="auto"')
            )
            raise ValueError(
                f"device={str(device)!r}: this machine has {n_gpus} CUDA GPUs; {remedy}."
            )
        warnings.warn(
            f"device={str(device)!r} is not on this machine: using the CPU.", stacklevel=3
        )
        return torch.device("cpu")
    return resolved


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a computation failed for want of memory, on a GPU or on the CPU."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def in_blocks(n: int, block: int, compute: Callable[[slice], Any]) -> Any:
    """Compute something for n rows in blocks, in smaller ones where memory runs out.

    Parameters
    ----------
    n, block : int
        Rows in all, and at a time.
    compute : callable
        From a slice of the rows to a tensor, or a tuple of tensors, with these rows.

    Returns
    -------
    result : tensor or tuple of tensors
        With all n rows.
    """
    parts: list[Any] = []
    done = 0
    while done < n:
        try:
            parts.append(compute(slice(done, min(done + block, n))))
            done += block
        except RuntimeError as error:
            if not is_out_of_memory(error) or block == 1:
                raise
            block //= 2
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))
    return torch.cat(parts)


def has_native_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices itself (AMX or AVX-512-BF16 on CPUs)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        tests = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(getattr(torch.cpu, test, bool)() for test in tests)
    return False


def resolve_precision(
    precision: str, device: torch.device, n_axes: int
) -> tuple[torch.dtype, torch.dtype | None]:
    """Turn ``precision=`` into the dtype of the weights and that of autocast.

    "auto" runs the backbone of image networks in bfloat16 where the hardware does so natively:
    ``benchmarks/precision.py`` shows equal balanced accuracy in less time. Vectors stay in float32.

    Parameters
    ----------
    precision : {"auto", "float32", "bf16", "float64"}
        The constructor parameter.
    device : torch.device
        Where the network runs.
    n_axes : int
        Axes of one sample; 1 means feature vectors.

    Returns
    -------
    dtype, autocast : torch.dtype, torch.dtype or None
        Precision of weights, heads and losses; precision of the backbone's arithmetic.
    """
    if precision == "float64":
        return torch.float64, None
    if precision == "bf16" or (precision == "auto" and n_axes > 1 and has_native_bf16(device)):
        return torch.float32, torch.bfloat16
    return torch.float32, None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a draft, which takes the place of a file at the end of the block.

    A crash leaves the old file or the new one, never half of either; an error leaves the old one,
    and names the file. Several threads and processes may write to one path: the last one wins.

    The draft lies beside the file in a folder of its own, locked as long as its writer lives. What
    writers that died have left is removed by the next one.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{str(path.parent)!r}, for {path.name!r}, is no directory.")
    for left in path.parent.glob(f".{escape(path.name)}.*.tmp"):
        with suppress(Timeout, OSError), FileLock(left / "lock").acquire(timeout=0):
            shutil.rmtree(left, ignore_errors=True)
    folder, lock = _own_folder(path)
    try:
        draft = folder / path.name
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(path)
        with suppress(OSError):  # not every file system knows folders that are synchronised
            _synchronise(path.parent)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # such as a full disk
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def _own_folder(path: Path) -> tuple[Path, FileLock]:
    """Make a folder beside a file, and lock it."""
    while True:
        folder = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
        folder.mkdir()
        lock = FileLock(folder / "lock")
        try:
            lock.acquire()
        except (FileNotFoundError, FileExistsError):
            continue  # another writer took it for a dead one's before it was locked
        except OSError:  # a file system without locks: there nobody can remove it either
            return folder, lock
        if Path(lock.lock_file).exists():
            return folder, lock


def _synchronise(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def noting_interrupts() -> Iterator[Callable[[], bool]]:
    """Give a function that tells whether Ctrl-C was pressed inside the block.

    skorch's callbacks end a training by raising what Ctrl-C raises; only the signal tells them
    apart. It goes on to whoever handled it before.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield lambda: False  # signals are for the main thread
        return
    pressed = []

    def note(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, handler)


def is_one_of_many() -> bool:
    """Whether a search, a cross-validation, an ensemble or a worker process is calling.

    What it would do with an estimator whose training was cut short is to score it as any other.
    """
    callers = {"joblib", "multiprocessing", "optuna"}
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] not in callers:
        frame = frame.f_back
    return frame is not None


if hasattr(os, "register_at_fork"):
    # torch's threads are not copied by a fork: a child that asked for more than one would wait for
    # the others for ever, be it in a matrix product or in the copy of a tensor.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


@contextmanager
def one_thread_in_workers() -> Iterator[None]:
    """Use one torch thread inside worker processes (joblib, multiprocessing).

    Two processes with two threads each on two cores run several times slower than with one each:
    the threads' busy-waiting starves the other process.
    """
    n_threads = torch.get_num_threads()
    if multiprocessing.parent_process() is None or n_threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def inference_block(shape: tuple[int, ...], device: torch.device) -> int:
    """Images per forward pass at predict: enough to fill the cores, few enough to stay in cache."""
    if len(shape) == 1:
        return 256
    n_pixels = math.prod(shape[1:])
    if device.type == "cuda":
        return min(max(2**24 // n_pixels, 32), 1024)
    return min(max(2**18 // n_pixels, 4), 512)


def pixel_block(shape: tuple[int, ...], device: torch.device) -> int:
    """Images at a time for work pixel by pixel, which needs many times their memory."""
    n_pixels = math.prod(shape[1:]) if len(shape) > 1 else shape[0]
    return max(1, (2**24 if device.type == "cuda" else 2**18) // n_pixels)
