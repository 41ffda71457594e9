"""Random numbers of a fit: its own generators, whatever thread it runs in.

torch's default generators belong to the whole process. Two fits in two threads would take each
other's numbers, and the caller's. So a fit neither draws from them nor sets them: layers of this
package ask for :func:`generator_of` the fit that runs in their thread, and code from outside, which
knows the default generators only, runs inside :func:`redirected`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

_thread = threading.local()


def make_generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Give a generator of its own stream on a device."""
    return torch.Generator(device).manual_seed(seed)


class Draws:
    """Where a fit draws initial weights and the noise of training from.

    Parameters
    ----------
    seed : int
        Of the generators: one on the CPU, where networks are made, and one on the device.
    device : torch.device
        Where the network is trained.
    """

    # Copies may draw in a backward pass, where a forward pass is computed once more.
    repeats = False

    def __init__(self, seed: int, device: torch.device) -> None:
        places = {"cpu": torch.device("cpu"), device.type: device}
        self.generators = {kind: make_generator(seed, place) for kind, place in places.items()}

    def get_state(self) -> dict[str, Tensor]:
        """State of each generator, by kind of device."""
        return {kind: generator.get_state() for kind, generator in self.generators.items()}

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Go on where `get_state` was called."""
        for kind, generator in self.generators.items():
            generator.set_state(state[kind])

    def copy(self) -> Draws:
        """Draws of the same numbers again."""
        other = object.__new__(Draws)
        other.generators = {
            kind: make_generator(0, generator.device) for kind, generator in self.generators.items()
        }
        other.set_state(self.get_state())
        other.repeats = True
        return other

    def generator(self, device: torch.device) -> torch.Generator | None:
        """Generator of a kind of device; None where nothing is drawn, as on "meta".

        Raises
        ------
        RuntimeError
            In a backward pass that repeats a forward pass without having kept what that drew.
        """
        # Gradients are off in a backward pass, also where a hook adds noise to them.
        again = torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled()
        if again and not self.repeats:
            raise RuntimeError(
                "The network computes its forward pass a second time in the backward pass, and "
                "would draw other random numbers than in the first: switch off its checkpointing "
                "of activations, or its dropout."
            )
        return self.generators.get(device.type)


def current_draws() -> Draws | None:
    """Of the fit that runs in this thread, if there is one."""
    return getattr(_thread, "draws", None)


@contextmanager
def drawing_from(draws: Draws | None) -> Iterator[None]:
    """Make these the draws of this thread inside the block."""
    before = current_draws()
    _thread.draws = draws
    try:
        yield
    finally:
        _thread.draws = before


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[Draws]:
    """Give the block draws of its own; code from outside that it runs takes them too."""
    draws = Draws(seed, device)
    with drawing_from(draws), redirected():
        yield draws


def generator_on(device: torch.device) -> torch.Generator | None:
    """Give the generator for noise on a device; None, torch's default one, outside of a fit."""
    draws = current_draws()
    return None if draws is None else draws.generator(device)


# ---------------------------------------------------------------- layers


def keep_mask(like: Tensor, shape: tuple[int, ...], rate: float) -> Tensor:
    """Zeros for a share `rate` of the places, ``1 / (1 - rate)`` elsewhere; as float as `like`."""
    draw = torch.ops.sklearn_medimb.keep_mask if torch.compiler.is_compiling() else _keep_mask
    return draw(like.detach(), shape, rate)


def _keep_mask(like: Tensor, shape: tuple[int, ...], rate: float) -> Tensor:
    mask = like.new_empty(shape)
    return mask.bernoulli_(1 - rate, generator=generator_on(like.device)).div_(1 - rate)


# A compiled graph, which holds no generators, calls it as a whole. It takes two calls that are
# given the same for one, and draws once: so each is given the tensor that it is for.
torch.library.define(
    "sklearn_medimb::keep_mask",
    "(Tensor like, SymInt[] shape, float rate) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded,),
)
torch.library.impl("sklearn_medimb::keep_mask", "CompositeExplicitAutograd")(_keep_mask)


@torch.library.register_fake("sklearn_medimb::keep_mask")
def _blank_mask(like: Tensor, shape: tuple[int, ...], _: float) -> Tensor:
    return like.new_empty(shape)


class Dropout(nn.Dropout):
    """torch's, with the draws of the fit."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop entries, in training."""
        if not self.training or self.p == 0:
            return x
        return x * keep_mask(x, x.shape, self.p)


# ---------------------------------------------------------------- code from outside


def may_draw(*modules: nn.Module) -> bool:
    """Whether a forward pass in training may take numbers from torch's default generators.

    Layers of this package do not. Of torch's own it is known which do; any other class may.
    """
    return any(_may_draw(part) for module in modules for part in module.modules())


def _may_draw(module: nn.Module) -> bool:
    home = type(module).__module__
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    if hooked or not home.startswith(("sklearn_medimb.", "torch.nn.modules.")):
        return True
    if isinstance(module, Dropout):
        return False
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return module.dropout > 0
    return isinstance(module, (nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d))


@contextmanager
def redirected(needed: bool = True) -> Iterator[None]:
    """Let whatever runs in this thread draw from the fit's generators instead of torch's default.

    Each operation costs some 5 to 15 microseconds more, and nothing inside is compiled, so that the
    block is left alone where this is not `needed`.
    """
    if not needed:
        yield
        return
    with _PlainAttention(), _Redirection(current_draws()):
        yield


class _PlainAttention(TorchFunctionMode):
    """Attention with dropout by way of its matrix: fused kernels draw for themselves on a GPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            rate = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
            if rate > 0:
                return torch.ops.aten._scaled_dot_product_attention_math(*args, **kwargs)[0]
        if func is F.multi_head_attention_forward and not kwargs.get("need_weights", True):
            return func(*args, **{**kwargs, "need_weights": True})[0], None
        return func(*args, **kwargs)


class _Redirection(TorchDispatchMode):
    """Pass the fit's generator to every operation that draws and was given none.

    Parameters
    ----------
    draws : Draws or None
        Of the fit, for threads that torch starts for it; of a thread of its own its own count.
    """

    def __init__(self, draws: Draws | None) -> None:
        super().__init__()
        self.draws = draws

    # torch's own, without the flags that they set for all threads.
    def __enter__(self) -> _Redirection:
        _push_mode(self)
        return self

    def __exit__(self, *_: object) -> None:
        _pop_mode()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        draws = (current_draws() or self.draws) if _is_random(func) else None
        if draws is None:
            return func(*args, **kwargs)
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        if given.get("generator") is not None or _rate(func, given) == 0:
            return func(*args, **kwargs)
        generator = draws.generator(_device(given))
        if generator is None:
            return func(*args, **kwargs)
        own_way = _OWN_WAYS.get(func._overloadpacket)
        if own_way is not None:
            return own_way(generator, **given)
        with self:
            decomposed = func.decompose(*args, **kwargs)
        if decomposed is not NotImplemented:  # in inference mode
            return decomposed
        taker = _taking_generator(func)
        if taker is None:
            raise RuntimeError(
                f"The network calls {func}, which draws random numbers but takes no generator, so "
                "that no seed decides on them: set the dropout of that layer to 0."
            )
        return taker(**given, generator=generator)


@cache
def _is_random(func: Any) -> bool:
    names = {argument.name for argument in func._schema.arguments}
    return "generator" in names or torch.Tag.nondeterministic_seeded in func.tags


@cache
def _taking_generator(func: Any) -> Any:
    """Operation itself, or its overload that differs by taking a generator; None without one."""

    def signature(func: Any) -> list[tuple[str, str]]:
        return [(argument.name, str(argument.type)) for argument in func._schema.arguments]

    packet = func._overloadpacket
    for taker in (func, *(getattr(packet, name) for name in packet.overloads())):
        others = [argument for argument in signature(taker) if argument[0] != "generator"]
        if len(others) < len(signature(taker)) and others == [
            argument for argument in signature(func) if argument[0] != "generator"
        ]:
            return taker
    return None


def _rate(func: Any, given: dict[str, Any]) -> float | None:
    """Rate of dropout in a fused operation; None for operations of other kinds."""
    defaults = {argument.name: argument.default_value for argument in func._schema.arguments}
    return next(((defaults | given)[k] for k in ("dropout_p", "dropout") if k in defaults), None)


def _device(given: dict[str, Any]) -> torch.device:
    """Where an operation draws."""
    if given.get("device") is not None:
        return torch.device(given["device"])
    tensors = (value for value in given.values() if isinstance(value, Tensor))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _dropout(
    generator: torch.Generator, input: Tensor, p: float, train: bool | None
) -> tuple[Tensor, Tensor]:
    kept = torch.empty_like(input, dtype=torch.bool).bernoulli_(
        1 - p if train else 1.0, generator=generator
    )
    return input * kept * (1 / (1 - p) if train and p < 1 else 1.0), kept


def _filled_like(fill: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def draw(generator: torch.Generator, self: Tensor, **options: Any) -> Tensor:
        bounds = [int(options.pop(name)) for name in ("low", "high") if name in options]
        return fill(torch.empty_like(self, **options), *bounds, generator=generator)

    return draw


# Operations without a generator, in this version of torch or an older one.
_OWN_WAYS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.native_dropout: _dropout,
    torch.ops.aten.rand_like: _filled_like(Tensor.uniform_),
    torch.ops.aten.randn_like: _filled_like(Tensor.normal_),
    torch.ops.aten.randint_like: _filled_like(Tensor.random_),
}
