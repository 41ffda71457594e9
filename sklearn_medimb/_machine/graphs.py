"""Work of a GPU that is recorded once and then replayed, without Python between its kernels.

What was recorded runs on the same addresses each time: it reads what lies there then. So whatever
changes from one replay to the next has to be a tensor, at a fixed place, on the device.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

from sklearn_medimb._machine.randomness import current_draws

# Operations whose result the host waits for: a number, or a shape that depends on values.
_WAITING = {
    "_local_scalar_dense", "_unique", "_unique2", "bincount", "equal", "histc", "is_nonzero",
    "linalg_eig", "linalg_eigvals", "linalg_lstsq", "masked_select", "nonzero", "unique_dim",
    "unique_consecutive", "_linalg_eigh", "_linalg_svd", "_linalg_solve_ex", "repeat_interleave",
}  # fmt: skip
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


# A device records for one thread at a time, and nobody may wait for all of it meanwhile.
_alone = threading.RLock()
_of_thread = threading.local()
# Recordings that failed inside of CUDA: the allocators of some versions refer to them for ever.
_failed: list[Any] = []


def can_replay(device: torch.device) -> bool:
    """Whether a device replays what was recorded, with the draws of given generators."""
    known = hasattr(torch.cuda.CUDAGraph, "register_generator_state")
    return device.type == "cuda" and known and not _failed


def empty_cache() -> None:
    """Give cached memory of the GPU back, if there is one, when nothing is being recorded."""
    if torch.cuda.is_available():
        with _alone:
            torch.cuda.empty_cache()


def _stream_of_thread(device: torch.device) -> Any:
    """One stream for all recordings of a thread: torch has few, and gives them out in turn."""
    streams = _of_thread.__dict__.setdefault("streams", {})
    if str(device) not in streams:
        streams[str(device)] = torch.cuda.Stream(device)
    return streams[str(device)]


class Recorder:
    """Records work on one GPU: all of it shares a stream and memory.

    Parameters
    ----------
    device : torch.device
        The GPU.
    generators : iterable of torch.Generator
        Whatever the work draws from: a replay draws on, as the work itself would.
    """

    def __init__(self, device: torch.device, generators: Iterable[torch.Generator]) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device(device.type, index)
        self.generators = [g for g in generators if g.device.type == device.type]
        self.stream = _stream_of_thread(self.device)
        self.pool: Any = torch.cuda.graph_pool_handle()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Run the block on the stream of the recordings; what comes after it waits for it.

        Autograd remembers on which stream a gradient was last added up: that must be this one.
        """
        outside = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            outside.wait_stream(self.stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record some work, which is not done thereby, and give what does it.

        Raises
        ------
        RuntimeError
            If something in it cannot be recorded; nothing more is recorded in this process if CUDA
            found it out.
        """
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        with _alone:
            try:
                with torch.cuda.graph(
                    graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
                ):
                    work()
            except BaseException:
                self._give_up(graph)
                raise

        def replay() -> None:
            with _alone:  # a generator that two graphs share counts for one at a time
                graph.replay()

        return replay

    def _give_up(self, graph: Any) -> None:
        """Drop a recording that failed."""
        try:
            graph.pool()
        except RuntimeError:
            _failed.append(graph)
        else:  # it ended as it should, only the work did not
            graph.reset()
            return
        # Its memory still takes all that is allocated, and its generators themselves for recorded.
        native = torch._C  # noqa: SLF001
        ends = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")
        for end in [getattr(native, name) for name in ends if hasattr(native, name)][:1]:
            with suppress(RuntimeError):
                end(self.device.index, self.pool)
        for generator in (*self.generators, torch.cuda.default_generators[self.device.index]):
            generator.graphsafe_set_state(generator.clone_state())


class Obstacles(TorchDispatchMode):
    """Looks, while the block runs, for what a recording of it would miss or could not hold.

    Attributes
    ----------
    found : str or None
        The first one, in words.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: str | None = None
        self.constants: list[torch.Tensor] = []  # that torch itself makes of numbers in the code

    # torch's own, without the flags that they set for all threads.
    def __enter__(self) -> Obstacles:
        self.python = _python_draws()
        _push_mode(self)
        return self

    def __exit__(self, *_: object) -> None:
        _pop_mode()
        if self.found is None and self.python != _python_draws():
            self.found = "it draws random numbers on the host"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.found is None:
            self.found = _obstacle(func, args, kwargs or {}, self.constants)
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.scalar_tensor.default:
            self.constants.append(out)
        return out


def _python_draws() -> Any:
    """State of every generator of the host that code may draw from."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    draws = current_draws()
    own = [] if draws is None else [draws.generators["cpu"]]
    states = [g.get_state().numpy().tobytes() for g in (torch.default_generator, *own)]
    return random.getstate(), name, np.asarray(keys).tobytes(), rest, states


def _obstacle(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], constants: list[torch.Tensor]
) -> str | None:
    """What keeps one operation from being recorded."""
    name = func.name().split("::")[1].split(".")[0]
    flat: list[torch.Tensor] = []
    for value in (*args, *kwargs.values()):
        parts = value if isinstance(value, (list, tuple)) else (value,)
        flat += [part for part in parts if isinstance(part, torch.Tensor)]
    flat = [part for part in flat if not any(part is constant for constant in constants)]
    there = [part.is_cuda for part in flat]
    to = kwargs.get("device")
    away = to is not None and torch.device(to).type == "cuda" and flat and not all(there)
    away = away or (name == "lift_fresh" and any(there))  # torch.tensor: numbers of the host
    if not any(there) and not away:
        return None
    copies = name in ("_to_copy", "copy_", "_foreach_copy_")
    if away or (copies and not all(there)) or (copies and to is not None and _is_host(to)):
        return f"it copies between host and device ({name})"
    if name in _WAITING:
        return f"it waits for the device ({name})"
    if name in _INDEXING:
        places = [place for place in args[1] if place is not None]
        if any(place.dtype in (torch.bool, torch.uint8) for place in places):
            return f"it waits for the device ({name} with a mask)"
        if not all(place.is_cuda for place in places):
            return f"it copies between host and device ({name})"
    elif not copies and not all(there):
        return f"it reads a number of the host ({name})"
    return None


def _is_host(device: Any) -> bool:
    return torch.device(device).type == "cpu"
