"""A CUDA device for machines without one: what runs on it computes on the CPU and obeys its rules.

A tensor of the simulated device is a wrapper whose content lies in a CPU tensor. Every operation is
seen by the dispatcher: it unwraps, refuses tensors of two devices as CUDA does, takes its random
numbers from the device's own generator, counts the memory and the synchronisations, and wraps.

A recording (``torch.cuda.graph``) keeps the operations, not what they computed: a replay does them
again on the same memory, without the Python around them. Whatever a real one would refuse, or read
from the host's memory later, is refused.

What it does not show: rounding, speed and determinism of CUDA's kernels, what they refuse where the
CPU's do not, asynchronous errors, several streams or devices, and ``torch.compile``. Autocast
rounds what it rounds on the CPU. C++ code that asks a tensor for its device itself is told "cpu".
Threads that start inside the context see the device too, one operation at a time; those that are
older do not.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch.optim import optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from sklearn_medimb._machine import graphs

CUDA = torch.device("cuda:0")
aten = torch.ops.aten

# Copies between devices; of an index, as with CUDA, places may come from the CPU.
CROSSING = {aten.copy_.default, aten._foreach_copy_.default, aten._foreach_copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
INDEXING |= {aten._index_put_impl_.default, aten._unsafe_index.Tensor}
# Whose result the host must wait for: a number, or a shape that depends on values.
WAITING = {
    "_local_scalar_dense", "bincount", "equal", "is_nonzero", "masked_select", "nonzero", "item",
    "_unique2", "unique_dim", "unique_consecutive", "histc", "linalg_eigh", "_linalg_eigh",
}  # fmt: skip

# Without a deterministic kernel (torch.use_deterministic_algorithms lists them); that of
# max_pool3d newer torch has.
NONDETERMINISTIC = {
    "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "avg_pool3d_backward",
    "adaptive_max_pool2d_backward", "bincount", "cumsum", "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward", "grid_sampler_2d_backward", "grid_sampler_3d_backward",
    "histc", "kthvalue", "max_pool3d_with_indices_backward", "max_unpool2d", "max_unpool3d",
    "nll_loss2d_forward", "put_",
    "reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward",
    "upsample_bicubic2d_backward", "upsample_bilinear2d_backward", "upsample_linear1d_backward",
    "upsample_trilinear3d_backward",
}  # fmt: skip

current: SimulatedCuda | None = None


class _Block:
    """Memory of one storage: there as long as a tensor that looks into it."""

    def __init__(self, device: SimulatedCuda, n_bytes: int) -> None:
        self.device, self.n_bytes = device, n_bytes
        if device.used + n_bytes > device.memory:
            self.n_bytes = 0
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {n_bytes} bytes. (simulated)"
            )
        device.used += n_bytes
        device.most_used = max(device.used, device.most_used)

    def __del__(self) -> None:
        self.device.used -= self.n_bytes


class CudaTensor(torch.Tensor):
    """A tensor of the simulated device; `content` is on the CPU."""

    content: torch.Tensor

    @staticmethod
    def __new__(cls, content: torch.Tensor, device: SimulatedCuda) -> CudaTensor:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            content.size(),
            strides=content.stride(),
            storage_offset=content.storage_offset(),
            dtype=content.dtype,
            layout=content.layout,
        )
        self.content = content
        self.block = device.block(content)
        return self

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.content.data_ptr()

    def __repr__(self) -> str:
        return f"{self.content!r} on {CUDA}"

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def cpu(self) -> torch.Tensor:
        return self.to("cpu")

    def cuda(self, *args: Any, **kwargs: Any) -> CudaTensor:
        return self

    def pin_memory(self, *args: Any) -> Any:
        raise RuntimeError(
            "cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned"
        )

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _to(self, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> CudaTensor:
        if id(self) not in memo:
            copied = self.detach().clone().requires_grad_(self.requires_grad)
            copied.grad = None if self.grad is None else self.grad.__deepcopy__(memo)
            if getattr(self, "_is_param", False):
                copied._is_param = True
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: int) -> Any:
        if current is not None and current.saving:  # torch.load finds it, and may map it to the CPU
            return self.content.clone().__reduce_ex__(protocol)
        return _of_a_gpu, (self.content.clone(),)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to:
            return _to(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if current is None:
            raise RuntimeError("A tensor of the simulated CUDA device outlived it.")
        return current.run(func, args, kwargs or {})


def _of_a_gpu(content: torch.Tensor) -> torch.Tensor:
    if current is None:
        raise RuntimeError("Attempting to deserialize object on a CUDA device (simulated).")
    return content.to(CUDA)


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``tensor.to(...)``, where C++ would take the device of a wrapper for the CPU."""
    if other := [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]:
        kwargs = {k: v for k, v in kwargs.items() if not isinstance(v, torch.Tensor)}
        kwargs |= {"dtype": other[0].dtype, "device": other[0].device}
        args = ()
    copied = kwargs.pop("copy", False)
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    device = tensor.device if device is None else device
    device = CUDA if device.type == "cuda" else device
    dtype = tensor.dtype if dtype is None else dtype
    if device.type == tensor.device.type:
        fits = memory_format is None or tensor.is_contiguous(memory_format=memory_format)
        if dtype == tensor.dtype and fits and not copied:
            return tensor
    if memory_format is None:
        memory_format = torch.preserve_format
    assert current is not None
    current.moving = True
    try:
        return aten._to_copy.default(
            tensor,
            dtype=dtype,
            device=device,
            non_blocking=non_blocking,
            memory_format=memory_format,
        )
    finally:
        current.moving = False


class _Moves(TorchFunctionMode):
    """Moves to the device that C++ would make itself."""

    makers: ClassVar[set[Any]] = {torch.tensor, torch.as_tensor, torch.asarray}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to:
            return _to(*args, **kwargs)
        if func is torch.Tensor.cuda:
            return _to(args[0], CUDA)
        if func is F.one_hot and isinstance(args[0], CudaTensor):  # it asks for a range beside it
            codes, n_classes = (*args, *kwargs.values())
            return (codes.unsqueeze(-1) == torch.arange(n_classes, device=CUDA)).long()
        if func not in self.makers:
            return func(*args, **kwargs)
        data, device = args[0], kwargs.pop("device", None)
        if isinstance(data, CudaTensor) and func is not torch.tensor:
            return _to(data, device=device or CUDA, dtype=kwargs.get("dtype"))
        made = func(data, *args[1:], **kwargs)
        return made if device is None else _to(made, device)


class _AnyGenerator(type(torch.Generator)):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, torch._C.Generator)


class CudaGenerator(torch.Generator, metaclass=_AnyGenerator):
    """A generator of the simulated device; it takes the place of ``torch.Generator`` there."""

    numbers: ClassVar[Any] = weakref.WeakKeyDictionary()

    def __new__(cls, device: Any = "cpu") -> Any:
        if torch.device(device).type != "cuda":
            return torch._C.Generator(device)
        self = super().__new__(cls, "cpu")
        # The dispatcher may show another Python object of the same generator.
        cls.numbers[self] = self._cdata
        return self

    def clone_state(self) -> Any:
        return CudaGenerator("cuda").set_state(self.get_state())

    def graphsafe_set_state(self, other: Any) -> Any:
        return self.set_state(other.get_state())

    device = property(lambda self: torch.device("cuda", 0))


class SimulatedGraph:
    """What ``torch.cuda.CUDAGraph`` is on the simulated device."""

    live: ClassVar[Any] = weakref.WeakSet()

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.generators: list[torch.Generator] = []
        self.n_replays = 0
        self.ended = self.invalid = False
        self.live.add(self)

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    def pool(self) -> Any:
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return (0, 1)

    def reset(self) -> None:
        self.operations.clear()

    def begin(self, device: SimulatedCuda) -> None:
        self.device, self.before = device, {}
        generators = [*self.generators, device.default_generator]
        self.states = [(generator, generator.get_state()) for generator in generators]
        device.recording = self

    def end(self) -> None:
        """Nothing was computed: memory and generators are as they were."""
        self.device.recording = None
        for content, copied in self.before.values():
            content.copy_(copied)
        for generator, state in self.states:
            generator.set_state(state)
        for *_, made in self.operations:  # memory that nothing has written to
            for content in made:
                if content.is_floating_point():
                    content.fill_(torch.nan)
        if self.invalid:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.ended = True

    def add(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Note an operation; what it gives has a place from now on."""
        given = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, torch.Tensor)]
        names = [argument.name for argument in func._schema.arguments]
        for argument in func._schema.arguments:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if not (writes or argument.name.startswith("running_")):  # unsaid in old schemas
                continue
            place = names.index(argument.name)
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(tensor, torch.Tensor):
                    whole = _whole(tensor)
                    self.before.setdefault(whole.data_ptr(), (whole, whole.clone()))
        out = func(*args, **kwargs)
        if any(
            r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
        ):
            return out  # a view
        fresh = {id(tensor) for tensor in given}
        made = [
            a for a in tree_flatten(out)[0] if isinstance(a, torch.Tensor) and id(a) not in fresh
        ]
        self.operations.append((func, args, kwargs, made))
        return out

    def replay(self) -> None:
        assert self.device.recording is None
        self.n_replays += 1
        with torch.profiler.record_function("replay"), torch._C._DisableTorchDispatch():
            for func, args, kwargs, made in self.operations:
                given = {id(a) for a in tree_flatten((args, kwargs))[0]}
                with self.device._randomness(func, tree_flatten((args, kwargs))[0]):
                    out = func(*args, **kwargs)
                again = [
                    a for a in tree_flatten(out)[0]
                    if isinstance(a, torch.Tensor) and id(a) not in given
                ]  # fmt: skip
                for place, value in zip(made, again, strict=True):
                    place.copy_(value)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of the storage that a tensor looks into, as bytes."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


class _OfThread(TorchDispatchMode):
    """Shows a device to a further thread: modes are known to the one that entered them."""

    def __init__(self, simulated: SimulatedCuda) -> None:
        super().__init__()
        self.simulated = simulated

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.simulated.run(func, args, kwargs or {})


class SimulatedCuda(TorchDispatchMode):
    """Context in which torch has one CUDA device.

    Parameters
    ----------
    memory : int, default=2**36
        Bytes of the device: beyond them ``torch.OutOfMemoryError`` is raised.

    Attributes
    ----------
    used, most_used : int
        Bytes that its tensors take, now and at most.
    waits : list of str
        Operations for which the host waited for the device.
    """

    def __init__(self, memory: int = 2**36) -> None:
        super().__init__()
        self.memory = memory
        self.used = self.most_used = 0
        self.waits: list[str] = []
        self.flags = threading.local()
        self.lock = threading.RLock()  # random numbers come from a generator that all share
        self.blocks: Any = weakref.WeakValueDictionary()
        self.default_generator = CudaGenerator("cuda")
        self.default_generator.manual_seed(0)

    # ---------------------------------------------------------------- the device

    @property
    def moving(self) -> bool:
        """Whether this thread moves a tensor."""
        return getattr(self.flags, "moving", False)

    @moving.setter
    def moving(self, value: bool) -> None:
        self.flags.moving = value

    @property
    def recording(self) -> SimulatedGraph | None:
        """What this thread records."""
        return getattr(self.flags, "recording", None)

    @recording.setter
    def recording(self, value: SimulatedGraph | None) -> None:
        self.flags.recording = value

    @property
    def saving(self) -> bool:
        """Whether this thread writes tensors to a file."""
        return getattr(self.flags, "saving", False)

    @saving.setter
    def saving(self, value: bool) -> None:
        self.flags.saving = value

    def block(self, content: torch.Tensor) -> _Block:
        storage = content.untyped_storage()
        key = storage._cdata
        found = self.blocks.get(key)
        if found is None or found.n_bytes != storage.nbytes():
            found = self.blocks[key] = _Block(self, storage.nbytes())
        return found

    def wrap(self, content: Any) -> Any:
        return CudaTensor(content, self) if isinstance(content, torch.Tensor) else content

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Do what a kernel of the device would do."""
        with self.lock:
            if torch.is_inference_mode_enabled():  # wrappers are views of tensors from outside too
                with torch.inference_mode(False), torch.no_grad():
                    return self._run(func, args, kwargs)
            return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        flat, spec = tree_flatten((args, kwargs))
        ours = [a for a in flat if isinstance(a, CudaTensor)]
        devices = [a for a in flat if isinstance(a, torch.device)]
        target = "cuda" if ours else "cpu"
        if devices and (self.moving or not ours):  # else C++ asked a wrapper for its device
            target = devices[-1].type
        if not ours and target != "cuda":
            return func(*args, **kwargs)
        others = [a for a in flat if isinstance(a, torch.Tensor) and not isinstance(a, CudaTensor)]
        name = func._schema.name.split("::")[1]
        moves = func in CROSSING or self.moving or bool(devices)
        if func in CROSSING:
            target = "cuda" if isinstance(args[0], (CudaTensor, list)) else "cpu"
        self._check(func, args, ours, others, moves)
        if torch.are_deterministic_algorithms_enabled():
            self._check_determinism(name, args)
        crosses = moves and (bool(others) or (bool(ours) and target != "cuda"))
        waits = name in WAITING or (crosses and not self._non_blocking(func, args, kwargs))
        if func in INDEXING:
            places = [place for place in args[1] if place is not None]
            waits |= not all(isinstance(place, CudaTensor) for place in places)
            waits |= any(place.dtype in (torch.bool, torch.uint8) for place in places)
        if waits:
            self.waits.append(str(func))
        if self.recording is not None and (waits or crosses):
            self.recording.invalid = True
            raise RuntimeError(f"operation not permitted when stream is capturing ({func})")

        content = [
            a.content if isinstance(a, CudaTensor)
            else torch.device("cpu") if isinstance(a, torch.device) and a.type == "cuda"
            else a
            for a in flat
        ]  # fmt: skip
        pinned = kwargs.get("pin_memory")
        new_args, new_kwargs = tree_unflatten(content, spec)
        if pinned:
            new_kwargs["pin_memory"] = False
        with self._randomness(func, flat):
            if self.recording is None:
                out = func(*new_args, **new_kwargs)
            else:
                out = self.recording.add(func, new_args, new_kwargs)
        if crosses and name != "copy_" and isinstance(out, torch.Tensor):
            given = {a.untyped_storage()._cdata for a in content if isinstance(a, torch.Tensor)}
            if out.untyped_storage()._cdata in given:
                out = out.clone()
        if target != "cuda":
            return args[0] if name == "copy_" else out
        known = {id(a.content): a for a in ours}
        return tree_map(lambda a: known[id(a)] if id(a) in known else self.wrap(a), out)

    def _check(self, func: Any, args: Any, ours: Any, others: Any, moves: bool) -> None:
        if moves or not ours:
            return
        if func in INDEXING and isinstance(args[0], CudaTensor):
            if len(args) > 2 and not isinstance(args[2], CudaTensor) and args[2].ndim:
                raise self._mixed(func)
            return
        if any(other.ndim for other in others):
            raise self._mixed(func)

    @staticmethod
    def _check_determinism(name: str, args: Any) -> None:
        exact = name == "cumsum" and not args[0].is_floating_point()
        if name in NONDETERMINISTIC and not exact:
            raise RuntimeError(f"{name} does not have a deterministic implementation (simulated)")

    @staticmethod
    def _mixed(func: Any) -> RuntimeError:
        return RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
            f"and cpu! (simulated, {func})"
        )

    @staticmethod
    def _non_blocking(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        if "non_blocking" in kwargs:
            return bool(kwargs["non_blocking"])
        names = [argument.name for argument in func._schema.arguments]
        place = names.index("non_blocking") if "non_blocking" in names else len(args)
        return bool(args[place]) if place < len(args) else False

    @contextlib.contextmanager
    def _randomness(self, func: Any, flat: list[Any]) -> Any:
        """Draw from the device's own generator, given or default."""
        given = [a for a in flat if isinstance(a, torch.Generator)]
        if given and self.recording is not None:
            known = {generator._cdata for generator in self.recording.generators}
            if given[0]._cdata not in known:
                self.recording.invalid = True
                raise RuntimeError("an unexpected CUDA generator used during capture (simulated)")
        if given and given[0]._cdata not in CudaGenerator.numbers.values():
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if given or torch.Tag.nondeterministic_seeded not in func.tags:
            yield
            return
        before = torch.default_generator.get_state()
        torch.default_generator.set_state(self.default_generator.get_state())
        try:
            yield
        finally:
            self.default_generator.set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(before)

    # ---------------------------------------------------------------- torch.cuda

    def __enter__(self) -> SimulatedCuda:
        global current
        generator, autocast, save = self.default_generator, torch.autocast, torch.save
        group_by_device = optimizer._group_tensors_by_device_and_dtype

        def autocast_(device_type: str, *args: Any, **kwargs: Any) -> Any:
            return autocast("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

        def save_(*args: Any, **kwargs: Any) -> None:
            self.saving = True
            try:
                save(*args, **kwargs)
            finally:
                self.saving = False

        def pin_memory(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
            return tensor.clone()

        def synchronize(*args: Any) -> None:
            self.waits.append("synchronize")

        @contextlib.contextmanager
        def graph(recorded: SimulatedGraph, **kwargs: Any) -> Any:
            recorded.begin(self)
            try:
                yield
            finally:
                recorded.end()

        def grouped(lists: Any, with_indices: bool = False) -> Any:
            """By devices as C++ would see them, were they real."""
            found = group_by_device(lists, with_indices)
            return {
                (CUDA if isinstance(tensors[0][0], CudaTensor) else device, dtype): (tensors, where)
                for (device, dtype), (tensors, where) in found.items()
            }

        def stream(*args: Any) -> Any:
            return SimpleNamespace(wait_stream=lambda other: None)

        properties = SimpleNamespace(
            name="Simulated", uuid="simulated", total_memory=self.memory, major=9, minor=0
        )
        cuda = {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "_lazy_init": lambda: None,
            "_initialized": True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_name": lambda *_: "Simulated",
            "get_device_properties": lambda *_: properties,
            "get_device_capability": lambda *_: (9, 0),
            "mem_get_info": lambda *_: (self.memory - self.used, self.memory),
            "memory_allocated": lambda *_: self.used,
            "max_memory_allocated": lambda *_: self.most_used,
            "empty_cache": lambda: None,
            "synchronize": synchronize,
            "device": lambda *_: contextlib.nullcontext(),
            "CUDAGraph": SimulatedGraph,
            "graph_pool_handle": lambda: (0, 1),
            "graph": graph,
            "Stream": stream,
            "current_stream": stream,
            "stream": lambda _: contextlib.nullcontext(),
            "default_generators": (generator,),
            "set_device": lambda *_: None,
            "get_rng_state": lambda *_: generator.get_state(),
            "set_rng_state": lambda state, *_: generator.set_state(state),
            "manual_seed": generator.manual_seed,
            "manual_seed_all": generator.manual_seed,
        }
        self.patches = contextlib.ExitStack()
        for name, value in cuda.items():
            self.patches.enter_context(mock.patch.object(torch.cuda, name, value))
        for name, value in {
            "Generator": CudaGenerator, "autocast": autocast_, "save": save_,
        }.items():  # fmt: skip
            self.patches.enter_context(mock.patch.object(torch, name, value))
        self.patches.enter_context(mock.patch.object(torch.Tensor, "pin_memory", pin_memory))
        self.patches.enter_context(mock.patch.object(torch.amp, "autocast", autocast_))
        self.patches.enter_context(
            mock.patch.object(optimizer, "_group_tensors_by_device_and_dtype", grouped)
        )
        # C++ that asks a wrapper for its device is told "cpu": only what moves goes there.
        is_host = graphs._is_host
        moves_to_host = mock.patch.object(graphs, "_is_host", lambda d: self.moving and is_host(d))
        self.patches.enter_context(moves_to_host)
        # A parameter cannot become a wrapper in place: the module gets a new one.
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self.patches.callback(
            torch.__future__.set_overwrite_module_params_on_conversion, overwrites
        )
        lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        self.patches.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        self.patches.callback(self._leave, current)
        current = self
        run, device = threading.Thread.run, self

        def run_with_device(thread: threading.Thread) -> None:
            torch._C._set_only_lift_cpu_tensors(True)
            with _Moves(), _OfThread(device):
                run(thread)

        self.patches.enter_context(mock.patch.object(threading.Thread, "run", run_with_device))
        self.patches.enter_context(_Moves())
        super().__enter__()
        return self

    @contextlib.contextmanager
    def paused(self) -> Any:
        """The machine without the device, inside the block."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def _leave(self, previous: SimulatedCuda | None) -> None:
        global current
        current = previous

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self.patches.close()
