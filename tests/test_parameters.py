"""Parameters and fitted attributes that class bodies declare."""

from __future__ import annotations

import inspect
import pickle
from typing import Any, ClassVar

import pytest
from sklearn.base import BaseEstimator, clone
from sklearn.utils._param_validation import InvalidParameterError

from sklearn_medimb import CSSNClassifier, SoftmaxClassifier, SSLEncoder
from sklearn_medimb.base import (
    Declaring,
    OneStageClassifier,
    above,
    at_least,
    integers,
    learned,
    one_of,
    parameter,
    within,
)
from sklearn_medimb.tuning import search_space


class Base(Declaring, BaseEstimator):
    """A base.

    Parameters
    ----------
    trunk
        What comes first.
    rate
        How fast.
    seed
        Where from.

    Attributes
    ----------
    mean_
        The middle.

    Notes
    -----
    A note.
    """

    trunk: Any = parameter(str, None, default="auto", positional=True)
    rate: float = parameter(above(0), default=1e-3, search=(1e-4, 1e-2, "log"))
    seed: Any = parameter("random_state", default=None, kind="int or None", last=True)

    mean_: Any = learned("ndarray of float of shape (n_channels,)", predicts=True)


class Child(Base):
    """A child.

    Parameters
    ----------
    kind : some type, default="some default"
        Which kind.
    """

    kind: str | None = parameter(one_of("one", "two"), None, default="one", search=True)
    n: int = parameter(integers(1, 5), default=2, search=(1, 5))
    rate: float = 0.5

    @property
    def twice_(self) -> float:
        """Two times the middle."""
        return 2 * self.mean_


def test_signature_has_what_all_share_then_ones_own_then_the_machine():
    assert str(inspect.signature(Child)) == (
        "(trunk='auto', *, rate=0.5, kind='one', n=2, seed=None)"
    )
    assert list(Child().get_params()) == sorted(["trunk", "rate", "kind", "n", "seed"])
    names = list(inspect.signature(CSSNClassifier).parameters)
    assert names[:2] == ["backbone", "image_size"]
    assert names.index("fine_tune") < names.index("max_epochs") < names.index("batch_size")
    assert names.index("augment") < names.index("lam") < names.index("device")
    assert list(inspect.signature(SSLEncoder).parameters)[:2] == ["method", "backbone"]


def test_constructor_only_stores():
    given = [1, 2]
    made = Child(given, rate="nonsense", seed=given)
    assert made.trunk is given
    assert made.seed is given
    assert made.rate == "nonsense"
    assert vars(Child()) == {"trunk": "auto", "rate": 0.5, "kind": "one", "n": 2, "seed": None}


@pytest.mark.parametrize(
    ("args", "params", "message"),
    [
        ((), {"rat": 1}, "Child: got an unexpected keyword argument 'rat'"),
        ((1, 2), {}, "Child: too many positional arguments"),
        ((1,), {"trunk": 2}, "Child: multiple values for argument 'trunk'"),
    ],
)
def test_wrong_arguments_are_refused_by_the_name_of_the_class(args, params, message):
    with pytest.raises(TypeError, match=message):
        Child(*args, **params)


def test_clone_set_params_and_pickle():
    made = Child(rate=2.0).set_params(kind=None)
    for copied in (clone(made), pickle.loads(pickle.dumps(made))):
        assert copied.get_params() == made.get_params()


@pytest.mark.parametrize(
    ("params", "name"),
    [({"rate": 0}, "rate"), ({"kind": "three"}, "kind"), ({"n": 6}, "n"), ({"trunk": 3}, "trunk")],
)
def test_constraints_hold_in_classes_below(params, name):
    with pytest.raises(InvalidParameterError, match=f"'{name}' parameter of Child"):
        Child(**params)._validate_params()


def test_help_has_types_defaults_and_texts_of_all():
    doc = Child.__doc__
    assert doc.startswith("A child.\n\nParameters\n----------\ntrunk : str or None, default=")
    for line in (
        'trunk : str or None, default="auto"\n    What comes first.',
        "rate : float, default=0.5\n    How fast.",
        'kind : {"one", "two"} or None, default="one"\n    Which kind.',
        "seed : int or None, default=None\n    Where from.",
        "mean_ : ndarray of float of shape (n_channels,)\n    The middle.",
        "twice_ : float\n    Two times the middle.",
    ):
        assert line in doc
    assert "A note." in Base.__doc__
    assert "A note." not in doc


def test_search_space_is_what_the_parameters_say():
    assert set(search_space(Child)) == {"rate", "kind", "n"} - {"rate"}  # 0.5: chosen on purpose
    assert set(search_space(Child(rate=1e-3))) == {"rate", "kind", "n"}
    assert search_space(Child)["kind"].choices == ("one", "two", None)


def test_a_declaration_leaves_no_attribute_behind():
    assert not hasattr(Child, "mean_")
    assert not hasattr(Child, "rate")


def test_bodies_that_cannot_mean_what_they_say_are_refused():
    with pytest.raises(
        TypeError, match=r"Plain.rate = 2.0 would change nothing: write rate: float"
    ):

        class Plain(Base):
            rate = 2.0

    with pytest.raises(TypeError, match=r"Untyped.size needs a public name and a type"):

        class Untyped(Base):
            size = parameter(at_least(0), default=1)

    with pytest.raises(TypeError, match=r"Bare.size has a type but no value"):

        class Bare(Base):
            size: int

    with pytest.raises(TypeError, match=r"docstring of Misspelt describes \['siez'\]"):

        class Misspelt(Base):
            """Wrong.

            Parameters
            ----------
            siez
                Of it.
            """

            size: int = parameter(integers(0), default=1)


def test_class_variables_methods_and_private_names_are_no_parameters():
    class Other(Base):
        shared: ClassVar[int] = 3
        _private: int = 4

        def method(self):
            return self.shared

    assert set(Other().get_params()) == {"trunk", "rate", "seed"}


def test_a_class_without_a_parameter_has_its_default_for_a_constant():
    class Plain(Child, without=["rate", "n"]):
        """Plain."""

        kind: str | None = "two"

    class Below(Plain):
        n: int = 4

    assert str(inspect.signature(Plain)) == "(trunk='auto', *, kind='two', seed=None)"
    assert (Plain().rate, Plain().n, Below().rate) == (0.5, 2, 0.5)
    assert set(Plain().get_params()) == {"trunk", "kind", "seed"}
    assert "rate : " not in Plain.__doc__
    assert set(search_space(Plain)) == {"kind"}
    assert Below().get_params() == {"trunk": "auto", "kind": "two", "seed": None, "n": 4}
    with pytest.raises(TypeError, match="Plain: got an unexpected keyword argument 'rate'"):
        Plain(rate=1.0)
    with pytest.raises(ValueError, match="Invalid parameter 'rate'"):
        Plain().set_params(rate=1.0)
    Plain()._validate_params()
    assert Child().get_params()["rate"] == 0.5
    with pytest.raises(TypeError, match="Odd: no class above declares 'raet'"):

        class Odd(Child, without=["raet"]):
            pass


def test_a_misspelt_default_is_refused():
    with pytest.raises(TypeError, match=r"Free.rtae = 0.5 is no parameter so far"):

        class Free(Base):
            rtae: float = 0.5


@pytest.mark.parametrize(
    "value", [len, dict, property(lambda self: 1), lambda self: 1], ids=["call", "type", "p", "f"]
)
def test_nothing_of_the_name_of_a_parameter_is_dropped(value):
    with pytest.raises(TypeError, match=r"Other.rate = .* would change nothing"):
        type("Other", (Base,), {"rate": value})


def test_declarations_outside_of_a_declaring_class_are_refused():
    class Mixin:
        c: int = parameter(integers(0), default=4)

    with pytest.raises(TypeError, match=r"Mixin, a base of Mixed, declares \['c'\]"):

        class Mixed(Mixin, Base):
            pass


def test_the_nearest_class_has_the_last_word():
    class Other(Base):
        rate: float = 9.0

    class Third(Base):
        width: int = parameter(integers(0), default=1)

    class Both(Third, Other):
        pass

    assert Both().rate == 9.0
    assert Both().width == 1


def test_constructors_written_by_hand_are_kept():
    class Classical(Base):
        def __init__(self, trunk="auto", size=3):
            super().__init__(trunk, rate=0.1)
            self.size = size

    class Below(Classical):
        pass

    assert Below(size=4).get_params() == {"trunk": "auto", "size": 4}
    with pytest.raises(TypeError, match=r"Mixed declares \['more'\], but the constructor"):

        class Mixed(Classical):
            more: int = parameter(integers(0), default=1)


def test_a_subclass_without_docstring_keeps_that_of_its_parent():
    class Silent(SoftmaxClassifier):
        pass

    assert Silent.__doc__ is None
    assert "mixup_alpha" in inspect.getdoc(Silent)


def test_what_authors_import_is_there():
    assert issubclass(SoftmaxClassifier, OneStageClassifier)
    assert within(0, 1).closed == "both"
