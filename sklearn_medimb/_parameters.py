"""Parameters and fitted attributes, declared once: where a class body names them.

::

    class LogitNormClassifier(SoftmaxClassifier):
        '''Learns from the direction of the logits alone.

Parameters
----------
        temperature
            Of the logits of length 1.
        '''

        temperature: float = parameter(above(0), default=0.04, search=(0.01, 1.0, "log"))

gives the constructor its keyword, scikit-learn its constraint, ``help`` its type, default and text,
and ``search_space`` its range, in this class and in all below it. A class that only changes a
default writes ``lr: float = 1e-4``; ``class Plain(SoftmaxClassifier, without=["lr"])`` has no such
parameter, and its default for a constant. Nothing has to be applied: a class body that cannot mean
what it says is refused when it is read.

Imports `_pages`.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_origin

from sklearn.utils._param_validation import HasMethods, Interval, StrOptions

from sklearn_medimb._pages import Documented

if TYPE_CHECKING or sys.version_info >= (3, 11):
    from typing import dataclass_transform
else:

    def dataclass_transform(**_: Any) -> Callable[[type], type]:
        """Stand-in: what tells type checkers and editors of the constructor."""
        return lambda cls: cls


@dataclass(frozen=True)
class Parameter:
    """A parameter as `parameter` declares it."""

    default: Any
    allowed: tuple[Any, ...] = ("no_validation",)
    kind: str = ""
    search: Any = None
    positional: bool = False
    last: bool = False


@dataclass(frozen=True)
class Learned:
    """A fitted attribute as `learned` declares it."""

    kind: str
    predicts: bool = False


def parameter(
    *allowed: Any,
    default: Any,
    kind: str = "",
    search: Any = None,
    positional: bool = False,
    last: bool = False,
) -> Any:
    """Declare a constructor parameter, in the body of a class.

    Parameters
    ----------
    *allowed : object
        What it may be, as in scikit-learn's ``_parameter_constraints``: types, None, ``callable``,
        "boolean", or the likes of `above`, `one_of` and `integers`.
    default : object
        Its default.
    kind : str
        Its type in ``help``; made from `allowed` unless given.
    search : list, tuple, True, callable or None, default=None
        Where to search: a list of choices, or a tuple of both ends of a range, with "log" as a
        third entry for a logarithmic one; True takes every choice that `allowed` names; or a
        function from the estimator to one of these. None: a search leaves it alone.
    positional : bool, default=False
        Whether it may be given without its name, first.
    last : bool
        Whether it comes after those of the classes below: what concerns the machine and the layout
        of X, which nobody tunes.
    """
    if search is True:
        search = [choice for entry in allowed for choice in _choices(entry)]
    return Parameter(default, allowed or ("no_validation",), kind, search, positional, last)


def learned(
    kind: str,
    *,
    predicts: bool = False,
    init: Literal[False] = False,  # noqa: ARG001
) -> Any:
    """Declare a fitted attribute, in the body of a class.

    Parameters
    ----------
    kind : str
        Its type in ``help``. A text of the form ``"ndarray of float of shape (n_classes, d)"`` is
        also what files, and what is assigned to ``weights_``, are checked by.
    predicts : bool, default=False
        Whether predictions come from it, beside the network's weights.
    init : False
        For type checkers: it is no keyword of the constructor.
    """
    return Learned(kind, predicts)


# ---------------------------------------------------------------- what parameters may be


class Names(StrOptions):
    """Texts, in the order in which they are documented."""

    def __init__(self, *names: str) -> None:
        super().__init__(set(names))
        self.names = names


def _choices(entry: Any) -> list[Any]:
    """Values that an entry of `allowed` names."""
    if isinstance(entry, Names):
        return list(entry.names)
    return [False, True] if entry == "boolean" else [None] if entry is None else []


def one_of(*names: str) -> Names:
    """One of these texts."""
    return Names(*names)


def above(low: float) -> Interval:
    """Numbers above `low`."""
    return Interval(Real, low, None, closed="neither")


def at_least(low: float) -> Interval:
    """Numbers from `low` on."""
    return Interval(Real, low, None, closed="left")


def within(low: float, high: float, closed: str = "both") -> Interval:
    """Numbers between two."""
    return Interval(Real, low, high, closed=closed)


def integers(low: int, high: int | None = None) -> Interval:
    """Whole numbers from `low` on, up to `high`."""
    return Interval(Integral, low, high, closed="left" if high is None else "both")


# ---------------------------------------------------------------- what becomes of them


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(parameter, learned))
class Declaring(Documented):
    """Base of classes whose bodies declare parameters and fitted attributes."""

    _declared: ClassVar[dict[str, Parameter]] = {}
    _learned: ClassVar[dict[str, Learned]] = {}
    _texts: ClassVar[dict[str, str]] = {}
    _parameter_constraints: ClassVar[dict[str, list[Any]]]
    _search_space: ClassVar[dict[str, Any]]
    # What the body of a class itself says.
    _own: ClassVar[dict[str, Any]] = {}
    _without: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, without: Iterable[str] = (), **kwargs: Any) -> None:
        """Read the body of a class.

        Parameters
        ----------
        without : iterable of str
            Parameters of the classes above that mean nothing here: their defaults become constants.
        **kwargs : object
            For other bases.
        """
        super().__init_subclass__(**kwargs)
        _refuse_mixins(cls)
        cls._own, cls._without = _declarations(cls), tuple(without)
        for name in cls._own:
            delattr(cls, name)
        cls._declared, cls._learned = {}, {}
        for base in reversed(cls.__mro__):  # the nearest class has the last word, as in Python
            own = vars(base).get("_own", {})
            parameters = {k: v for k, v in own.items() if isinstance(v, Parameter)}
            if any(declared.positional for declared in parameters.values()):
                cls._declared = {k: replace(v, positional=False) for k, v in cls._declared.items()}
            cls._declared |= parameters
            cls._learned |= {k: v for k, v in own.items() if isinstance(v, Learned)}
            for name in vars(base).get("_without", ()):
                if name not in cls._declared:
                    raise TypeError(f"{cls.__name__}: no class above declares {name!r}.")
                default = cls._declared.pop(name).default
                if base is cls:
                    setattr(cls, name, default)
        constraints = {k: list(v.allowed) for k, v in cls._declared.items()}
        ranges = {k: v.search for k, v in cls._declared.items() if v.search is not None}
        # A class with a constructor of its own may have tables of its own, as scikit-learn does.
        cls._parameter_constraints = constraints | vars(cls).get("_parameter_constraints", {})
        cls._search_space = ranges | vars(cls).get("_search_space", {})
        written = sorted(k for k, v in cls._own.items() if isinstance(v, Parameter))
        if hasattr(cls.__init__, "made") or cls.__init__ is object.__init__:
            cls.__init__ = _constructor(cls)  # type: ignore[method-assign]
        elif written and "__init__" not in vars(cls):
            raise TypeError(
                f"{cls.__name__} declares {written}, but the constructor that it inherits is "
                "written by hand and takes other parameters: write one here too."
            )
        own_texts = _own_texts(cls)
        cls._texts = _known(cls, "_texts") | own_texts
        if vars(cls).get("__doc__"):
            cls.__doc__ = _documented(cls)


def _known(cls: type, table: str) -> dict[str, Any]:
    """What the classes above say."""
    above = reversed(cls.__mro__[1:])
    return {k: v for base in above for k, v in vars(base).get(table, {}).items()}


def _refuse_mixins(cls: type) -> None:
    """Refuse declarations in classes that nothing reads them from."""
    for base in cls.__mro__[1:]:
        declares = [k for k, v in vars(base).items() if isinstance(v, (Parameter, Learned))]
        if declares:
            raise TypeError(
                f"{base.__name__}, a base of {cls.__name__}, declares {declares}, but is no "
                "subclass of Declaring."
            )


def _declarations(cls: type) -> dict[str, Any]:
    """Parameters and fitted attributes that the body of a class declares.

    Raises
    ------
    TypeError
        If an entry looks like a parameter and would silently be none.
    """
    known = _known(cls, "_own")
    found: dict[str, Any] = {}
    annotations = _annotations(cls)
    for name, value in vars(cls).items():
        place, is_field = (
            f"{cls.__name__}.{name}",
            name in annotations and _is_field(annotations[name]),
        )
        if isinstance(value, (Parameter, Learned)):
            if not is_field or name.startswith("_"):
                raise TypeError(f"{place} needs a public name and a type: name: Any = ...")
            found[name] = value
        elif isinstance(known.get(name), Parameter):
            if not is_field:
                raise TypeError(
                    f"{place} = {value!r} would change nothing: write {name}: "
                    f"{type(value).__name__} = ... for another default."
                )
            found[name] = replace(known[name], default=value)
        elif is_field and not name.startswith("_"):
            raise TypeError(
                f"{place} = {value!r} is no parameter so far: write parameter(..., default="
                f"{value!r}), or ClassVar for its type."
            )
    for name, kind in annotations.items():
        if name not in vars(cls) and _is_field(kind) and not name.startswith("_"):
            raise TypeError(
                f"{cls.__name__}.{name} has a type but no value: write parameter(...), "
                "learned(...), or ClassVar[...]."
            )
    return found


def _annotations(of: Any) -> dict[str, Any]:
    """Annotations, as texts where Python 3.14 would evaluate them now."""
    try:
        from annotationlib import Format, get_annotations
    except ImportError:
        return inspect.get_annotations(of)
    return get_annotations(of, format=Format.STRING)


def _is_field(kind: Any) -> bool:
    text = kind if isinstance(kind, str) else ""
    return not ("ClassVar" in text or kind is ClassVar or get_origin(kind) is ClassVar)


def _ordered(cls: type[Declaring]) -> list[tuple[str, Parameter]]:
    """Parameters in the order of the signature."""
    return sorted(cls._declared.items(), key=lambda item: (not item[1].positional, item[1].last))


def _constructor(cls: type[Declaring]) -> Callable[..., None]:
    """``__init__`` that only stores, as scikit-learn has it."""
    kinds = {True: inspect.Parameter.POSITIONAL_OR_KEYWORD, False: inspect.Parameter.KEYWORD_ONLY}
    signature = inspect.Signature(
        [
            inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *(
                inspect.Parameter(name, kinds[declared.positional], default=declared.default)
                for name, declared in _ordered(cls)
            ),
        ]
    )

    def __init__(self: Any, *args: Any, **params: Any) -> None:  # noqa: N807
        try:
            given = signature.bind(self, *args, **params)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}: {error}") from None
        given.apply_defaults()
        for name, value in list(given.arguments.items())[1:]:
            setattr(self, name, value)

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    __init__.made = True  # type: ignore[attr-defined]
    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    __init__.__module__ = cls.__module__
    return __init__


# ---------------------------------------------------------------- help

_SECTION = re.compile(r"^([A-Z][A-Za-z ]+)\n-+\n", re.MULTILINE)


def _documented(cls: type[Declaring]) -> str:
    """Class docstring with sections for all parameters and fitted attributes.

    The text of each is that of the class which declares it, or of one below that says it anew.
    """
    head, sections = _sections(cls)
    for title in ("Parameters", "Attributes"):
        sections.pop(title, None)
    texts, parameters = cls._texts, []
    for name, p in _ordered(cls):
        kind = f"{p.kind or _kind(p.allowed)}, default={_shown(p.default)}"
        parameters.append(_entry(name, kind, texts.get(name, "")))
    attributes = [_entry(k, v.kind, texts.get(k, "")) for k, v in cls._learned.items()]
    attributes += _properties(cls)
    made = {"Parameters": "\n\n".join(parameters), "Attributes": "\n\n".join(attributes)}
    made = {title: body for title, body in made.items() if body} | sections
    return "\n\n".join(
        [head.strip(), *(f"{k}\n{'-' * len(k)}\n{v.strip()}" for k, v in made.items())]
    )


def _sections(cls: type) -> tuple[str, dict[str, str]]:
    """What stands before the first section of a class's own docstring, and its sections."""
    head, *parts = _SECTION.split(inspect.cleandoc(vars(cls).get("__doc__") or ""))
    return head, dict(zip(parts[::2], parts[1::2], strict=True))


def _own_texts(cls: type[Declaring]) -> dict[str, str]:
    """Texts of parameters and fitted attributes in the docstring of a class."""
    _, sections = _sections(cls)
    own = _entries(sections.get("Parameters", "")) | _entries(sections.get("Attributes", ""))
    if unknown := own.keys() - cls._declared.keys() - cls._learned.keys():
        raise TypeError(
            f"The docstring of {cls.__name__} describes {sorted(unknown)}, which no class body "
            "declares."
        )
    return own


def _entries(section: str) -> dict[str, str]:
    """Text of each entry of a section; types and defaults, which are known, are left out."""
    entries: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in section.splitlines():
        if line.strip() and not line[0].isspace():
            lines = []
            entries |= {name.strip(): lines for name in line.split(":")[0].split(",")}
        else:
            lines.append(line)
    return {name: inspect.cleandoc("\n".join(["", *lines])) for name, lines in entries.items()}


def _entry(name: str, kind: str, text: str) -> str:
    return f"{name} : {kind}\n{textwrap.indent(text, '    ')}".rstrip()


def _properties(cls: type) -> list[str]:
    """Entries of fitted attributes that are computed when asked for."""
    found: dict[str, property] = {}
    for base in reversed(cls.__mro__):
        members = {k: v for k, v in vars(base).items() if isinstance(v, property)}
        found |= {k: v for k, v in members.items() if k.endswith("_") and not k.startswith("_")}
    entries = []
    for name, member in found.items():
        kind = str(_annotations(member.fget).get("return", "object"))
        entries.append(_entry(name, kind.replace("np.", ""), (member.__doc__ or "").strip()))
    return entries


_WORDS = {
    "boolean": "bool",
    "random_state": "int or RandomState",
    "verbose": "int",
    "no_validation": "object",
}


def _kind(allowed: tuple[Any, ...]) -> str:
    """What a parameter may be, in words."""
    words: list[str] = []
    for entry in allowed:
        word = _word(entry)
        if word not in words:
            words.append(word)
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" or {words[-1]}"


def _word(entry: Any) -> str:
    if isinstance(entry, Names):
        shown = ", ".join(f'"{name}"' for name in entry.names)
        return shown if len(entry.names) == 1 else f"{{{shown}}}"
    if isinstance(entry, Interval):
        return "int" if entry.type is Integral else "float"
    if isinstance(entry, HasMethods):
        return f"object with {' and '.join(entry.methods)}"
    if isinstance(entry, str):
        return _WORDS[entry]
    return "callable" if entry is callable else getattr(entry, "__name__", str(entry))


def _shown(default: Any) -> str:
    return f'"{default}"' if isinstance(default, str) else repr(default)


_ARRAY = re.compile(r"ndarray of (int|float) of shape \(([^)]*)\)")


def array_form(attribute: Learned) -> tuple[str, str, int] | None:
    """Kinds of dtype, name of the first size and number of axes that an array must have."""
    found = _ARRAY.match(attribute.kind)
    if found is None:
        return None
    sizes = [size.strip() for size in found[2].split(",") if size.strip()]
    return {"int": "iu", "float": "f"}[found[1]], sizes[0], len(sizes)
