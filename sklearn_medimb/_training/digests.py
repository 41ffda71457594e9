"""Digests of objects: the same in every process for what computes the same, and else another.

A parameter may be any object: an augmentation with a state, a lambda that scores. Pickle tells
functions apart by their names and `repr` objects by their addresses; here functions are their code
with everything it refers to, and objects are their class and their state. What is installed counts
as its name and version, down to which code of one's own is followed.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import platform
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import numpy as np
import torch

import sklearn_medimb

# Of a class: what Python itself writes, and what is no part of what it computes.
_BOOKKEEPING = {
    "__dict__", "__weakref__", "__module__", "__qualname__", "__doc__", "__annotations__",
    "__annotate__", "__annotate_func__", "__annotations_cache__", "__static_attributes__",
    "__firstlineno__", "__slotnames__", "__abstractmethods__", "_abc_impl", "__parameters__",
    "__orig_bases__", "__dataclass_fields__", "__dataclass_params__",
}  # fmt: skip
_HOOKS = {name for name in vars(torch.nn.Module()) if "_hooks" in name}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...))
_BY_NAME = (GetSetDescriptorType, MemberDescriptorType, BuiltinFunctionType, np.ufunc)


def digest_of(value: Any, name: str, needed_by: str = "checkpoint_dir") -> bytes:
    """Digest of a parameter.

    Parameters
    ----------
    value : object
        Anything.
    name : str
        What errors call it.
    needed_by : str, default="checkpoint_dir"
        Parameter that asks for digests.

    Raises
    ------
    ValueError
        If its state is out of reach: a lock, an open file, an object of C without pickle.
    """
    try:
        return _Describer()(value)
    except Exception as error:  # objects refuse to be pickled in many ways
        shown = repr(value)
        if len(shown) > 200:  # that of a network has a line for each layer
            shown = f"{type(value).__name__}(...)"
        raise ValueError(
            f"{needed_by}: {name}={shown} cannot be told from another one by its state "
            f"({type(error).__name__}: {error}), so what was kept could be taken for another's. "
            f"Set {needed_by}=None, or {name} to what pickle can write."
        ) from error


class _Describer:
    """Digests of values; what is met twice is described once."""

    def __init__(self) -> None:
        self.done: dict[int, bytes] = {}
        self.kept: list[Any] = []  # an address is one object's as long as that lives
        self.open: dict[int, int] = {}

    def __call__(self, value: Any) -> bytes:
        if type(value) in _PLAIN:
            return _hashed(type(value).__name__, repr(value))
        key = id(value)
        if key in self.open:  # it contains itself
            return _hashed("above", str(self.open[key]))
        if key not in self.done:
            self.open[key] = len(self.open)
            digest = _hashed(*self.parts(value))
            del self.open[key]
            self.done[key] = digest
            self.kept.append(value)
        return self.done[key]

    def all(self, values: Iterable[Any]) -> Iterator[bytes]:
        """Digests of several values, one after another."""
        return map(self, values)

    def parts(self, value: Any) -> Iterator[Any]:
        """Texts and buffers that make up a value."""
        kind = type(value)
        yield kind.__name__
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            yield from (value.dtype.str, repr(value.dtype.descr), repr(value.shape))
            yield np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        elif isinstance(value, np.ndarray):
            yield from (repr(value.shape), *self.all(value.ravel().tolist()))
        elif isinstance(value, torch.Tensor):
            plain = value.detach().cpu().contiguous().reshape(-1)
            yield f"{value.dtype} {tuple(value.shape)} {value.requires_grad}"
            yield plain.view(torch.uint8).numpy()
        elif isinstance(value, torch.Generator):
            yield self(value.get_state())
        elif isinstance(value, (torch.dtype, torch.device, np.dtype, PurePath)):
            yield repr(value)
        elif kind in (list, tuple):
            yield from self.all(value)
        elif kind in (set, frozenset):
            yield from sorted(self.all(value))
        elif kind in (dict, MappingProxyType):
            for key, item in value.items():
                yield from (self(key), self(item))
        elif isinstance(value, CodeType):
            yield from self.code(value)
        elif isinstance(value, FunctionType):
            installed = is_installed(value.__module__)
            yield from [self.named(value)] if installed else self.function(value)
        elif isinstance(value, MethodType):
            yield from self.all((value.__func__, value.__self__))
        elif isinstance(value, ModuleType):
            yield from (value.__name__, _version(value.__name__) or "")
        elif isinstance(value, type):
            installed = is_installed(value.__module__)
            yield from [self.named(value)] if installed else self.class_(value)
        elif isinstance(value, functools.partial):  # its __dict__ is made when it is asked for
            yield from self.all((value.func, value.args, value.keywords, vars(value)))
        elif isinstance(value, property):
            yield from self.all((value.fget, value.fset, value.fdel))
        elif isinstance(value, (classmethod, staticmethod)):
            yield self(value.__func__)
        elif isinstance(value, functools.cached_property):
            yield self(value.func)
        elif isinstance(value, _BY_NAME):
            yield self.named(value)
            own = getattr(value, "__self__", None)
            yield self(None if isinstance(own, ModuleType) else own)
        elif hasattr(value, "iloc"):  # a table or a column of one, without its numbering of rows
            columns = value.items() if value.ndim == 2 else [(value.name, value)]
            for name, column in columns:
                yield from self.all((name, str(column.dtype), column.to_numpy()))
        else:
            yield from self.state(value)

    def named(self, value: Any) -> bytes:
        """What is installed: its name and the version of its package."""
        module = getattr(value, "__module__", None) or "builtins"
        name = getattr(value, "__qualname__", value.__name__)
        return _hashed(module, name, _version(module) or "")

    def state(self, value: Any) -> Iterator[Any]:
        """Any other object: what pickle would need to make it anew."""
        made = value.__reduce_ex__(4)
        if isinstance(made, str):  # there is one of it
            yield from (made, self(type(value)))
            return
        made = (*made, None, None, None)[:5]
        if isinstance(value, torch.nn.Module) and isinstance(made[2], dict):
            made = (*made[:2], _with_numbered_hooks(made[2]), *made[3:])
        yield from self.all((*made[:3], [*made[3]] if made[3] else None))
        yield self([*made[4]] if made[4] else None)

    def function(self, value: FunctionType) -> Iterator[bytes]:
        """A function of one's own: code, defaults, and the values that it refers to."""
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_set(cell)]
        yield from self.all((value.__code__, value.__defaults__, value.__kwdefaults__, cells))
        yield self(vars(value))
        names = _names(value.__code__)
        for name in sorted(_globals(value.__code__)):
            if name in value.__globals__:
                yield self(name)
                yield from self.used(value.__globals__[name], names)

    def used(self, value: Any, names: set[str]) -> Iterator[bytes]:
        """A global value; of a module of one's own, what is used of it."""
        if not isinstance(value, ModuleType) or is_installed(value.__name__):
            yield self(value)
            return
        if id(value) not in self.open:
            self.open[id(value)] = len(self.open)
            for name in sorted(names & vars(value).keys()):
                yield from (self(name), *self.used(vars(value)[name], names))
            del self.open[id(value)]

    def code(self, value: CodeType) -> Iterator[Any]:
        """Compiled code, wherever in a file it stands."""
        yield value.co_code
        yield getattr(value, "co_exceptiontable", b"")
        numbers = value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount
        yield from self.all((*numbers, value.co_flags, value.co_consts, value.co_names))
        yield from self.all((value.co_varnames, value.co_freevars, value.co_cellvars))

    def class_(self, value: type) -> Iterator[bytes]:
        """A class of one's own: bases, methods, attributes."""
        yield self(value.__qualname__)
        yield from self.all((type(value), *value.__bases__))
        for name, item in vars(value).items():
            if name not in _BOOKKEEPING:
                yield from (self(name), self(item))


def _with_numbered_hooks(state: dict[str, Any]) -> dict[str, Any]:
    """State of a module whose hooks have their order as keys: torch counts those of a process."""
    found = {name: state[name] for name in _HOOKS & state.keys() if state[name]}
    order = {key: k for k, key in enumerate(sorted({key for h in found.values() for key in h}))}
    return state | {
        name: {order[key]: hook for key, hook in hooks.items()} for name, hooks in found.items()
    }


def _hashed(*parts: Any) -> bytes:
    """Digest of several texts and buffers, each preceded by its length."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


@functools.cache
def _version(module: Any) -> str | None:
    """Version of the package that a module belongs to; None for code of one's own."""
    if not isinstance(module, str):  # compiled classes may have a descriptor there
        return None
    top = module.partition(".")[0]
    if top == "sklearn_medimb":
        return sklearn_medimb.__version__
    if top in sys.stdlib_module_names:
        return platform.python_version()
    package = sys.modules.get(top)
    place = Path(getattr(package, "__file__", None) or "")
    if {"site-packages", "dist-packages"} & set(place.parts):
        return str(getattr(package, "__version__", ""))
    return None


def is_installed(module: str | None) -> bool:
    """Whether a module belongs to Python or to an installed package."""
    return _version(module) is not None


def _is_set(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _names(code: CodeType) -> set[str]:
    return {name for part in _nested(code) for name in part.co_names}


def _globals(code: CodeType) -> set[str]:
    """Names of global values that code reads."""
    return {
        step.argval
        for part in _nested(code)
        for step in dis.get_instructions(part)
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
