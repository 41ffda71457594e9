"""What the page on the papers says is so: names, tests and settings of its table exist."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.base import BaseEstimator

from sklearn_medimb import (
    AMIMVEncoder,
    CSSNClassifier,
    LMDClassifier,
    MetricTwoStageClassifier,
    SPMixClassifier,
    augment,
    backbones,
    datasets,
    methods,
    metric_losses,
    metrics,
    over_sampling,
    saliency,
)
from sklearn_medimb.methods._tailboost import gpaco_loss

ROOT = Path(__file__).parents[1]
PAPERS = {
    "CSSN": CSSNClassifier,
    "AMIMV": AMIMVEncoder,
    "Metric two-stage": MetricTwoStageClassifier,
    "LMD": LMDClassifier,
    "SPMix, TailBoost": SPMixClassifier,
}
MODULES = [augment, backbones, datasets, methods, metric_losses, metrics, over_sampling, saliency]
NAMES = {"torch": torch, "gpaco_loss": gpaco_loss} | {
    k: v for module in MODULES for k, v in vars(module).items()
}


def load_renderer() -> Any:
    spec = importlib.util.spec_from_file_location("fidelity_page", ROOT / "docs" / "fidelity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGE = load_renderer()
ROWS = PAGE.rows()


# ---------------------------------------------------------------- what a row must be


@cache
def definitions(path: Path) -> set[str]:
    """Dotted names of the functions and classes of a file."""
    found = set()

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + child.name)
                if isinstance(child, ast.ClassDef):
                    walk(child, prefix + child.name + ".")

    walk(ast.parse(path.read_text()), "")
    return found


def check_place(place: str, folder: str) -> None:
    """A file and a name in it."""
    path, _, name = place.partition("::")
    assert path.startswith(folder), place
    assert (ROOT / path).is_file(), f"{place}: there is no such file"
    assert name.replace("::", ".") in definitions(ROOT / path), f"{place}: no such name in the file"


def check_cells(row: dict[str, str]) -> None:
    """Nothing is left open: what is not here says so and why, all else names code and test."""
    for column in ("paper", "element", "source", "deviation"):
        assert row[column].strip(), f"{row['element']}: {column} is empty"
    absent = row["deviation"].startswith("Not here")
    assert row["paper"] in PAPERS
    assert bool(row["ours"]) != absent, f"{row['element']}: ours, or why it is not here"
    assert row["test"] or absent, f"{row['element']}: no test pins it"
    assert row["deviation"].endswith("."), row["element"]


def check_setting(text: str) -> None:
    """A call that is accepted, and equals the default and the presets that it names."""
    found = re.fullmatch(r"(\w+)\((.*)\)(?:: ([\w, ]+))?", text)
    assert found, f"{text} is no call"
    make = NAMES[found[1]]
    given = eval(f"dict({found[2]})", NAMES)
    assert given, f"{text} sets nothing"
    if inspect.isclass(make):
        made = make(**given)
        if hasattr(make, "_parameter_constraints"):
            made._validate_params()
    else:
        inspect.signature(make).bind_partial(**given)
    for word in found[3].split(", ") if found[3] else []:
        assert word in ("default", "published", "tailboost"), text
        if word != "default":
            values = getattr(make, word)().get_params(deep=False)
        else:
            defaults = inspect.signature(make).parameters.items()
            values = {name: parameter.default for name, parameter in defaults}
        for name, value in given.items():
            assert same(values[name], value), f"{text}: {name} is {values[name]!r} ({word})"


def same(one: Any, other: Any) -> bool:
    if isinstance(one, BaseEstimator):
        one, other = (
            {"": type(x), **(x.get_params() if isinstance(x, BaseEstimator) else {})}
            for x in (one, other)
        )
        nested = [k for k, v in one.items() if isinstance(v, BaseEstimator)]
        return {k: v for k, v in one.items() if k not in nested} == {
            k: v for k, v in other.items() if k not in nested
        }
    return type(one) is type(other) and one == other


def check(row: dict[str, str]) -> None:
    check_cells(row)
    for place in PAGE.parts(row["ours"]):
        check_place(place, "sklearn_medimb/")
    for place in PAGE.parts(row["test"]):
        check_place(place, "tests/")
        assert place.rpartition("::")[2].startswith("test_"), f"{place} is no test"
    for setting in PAGE.parts(row["setting"]):
        check_setting(setting)


# ---------------------------------------------------------------- and is


@pytest.mark.parametrize(
    "row", ROWS, ids=[f"{row['paper']}: {row['element'][:40]}" for row in ROWS]
)
def test_files_names_tests_and_settings_exist(row):
    check(row)


def test_every_paper_has_rows_and_says_what_is_not_here():
    elements = [(row["paper"], row["element"]) for row in ROWS]
    assert len(set(elements)) == len(elements)
    for paper in PAPERS:
        absent = [r["deviation"].startswith("Not here") for r in ROWS if r["paper"] == paper]
        assert any(absent), paper
        assert not all(absent), paper


@pytest.mark.parametrize("paper", PAPERS)
def test_every_parameter_of_a_method_has_a_source(paper):
    """A parameter that a method's class declares is of the paper, or a row says that it is ours."""
    cls = PAPERS[paper]
    own = set(vars(cls)["__annotations__"]) & set(inspect.signature(cls).parameters)
    told = "; ".join(row["setting"] for row in ROWS if row["paper"] == paper)
    assert own
    assert not sorted(name for name in own if not re.search(rf"\b{name}=", told))


def test_the_page_has_the_tables_of_the_file():
    page = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- rows of (.+?) -->", page)) == set(PAPERS)
    assert PAGE.with_tables(page, ROWS) == page, "run: python docs/fidelity.py"


def test_another_row_is_another_page():
    page = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    changed = [{**ROWS[0], "deviation": "Something else."}, *ROWS[1:]]
    assert PAGE.with_tables(page, changed) != page


SOUND = next(row for row in ROWS if "soft_log_target" in row["ours"] and row["setting"])


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("paper", "Another paper"),
        ("element", ""),
        ("source", " "),
        ("deviation", ""),
        ("deviation", "Not here: but it is."),
        ("ours", ""),
        ("ours", "sklearn_medimb/methods/_cssn.py::soft_target"),
        ("ours", "sklearn_medimb/methods/_css.py::soft_log_target"),
        ("ours", "sklearn_medimb/methods/_cssn.py::CSSNHead.backward"),
        ("test", ""),
        ("test", "tests/methods/test_cssn.py::test_known_values"),
        ("test", "tests/methods/test_cssn.py::TestSoftLogTarget"),
        ("test", "tests/methods/test_golden.py::cssn_formula"),
        ("setting", "soft_ratio=0.7"),
        ("setting", "CSSNClassifier(softness=0.7)"),
        ("setting", "CSSNClassifier(soft_ratio=1.7)"),
        ("setting", "CSSNClassifier(soft_ratio=0.6): default"),
        ("setting", "CSSNClassifier(soft_ratio=0.6): published"),
        ("setting", "CSSNClassifier(soft_ratio=0.7): tuned"),
        ("setting", "CSSNClassifier(bank=SupportBank(n=11)): published"),
        ("setting", 'CSSNClassifier(bank="random"): published'),
        ("setting", "gpaco_loss(w_con=0.5): default"),
        ("setting", "gpaco_loss(omega=0.05): default"),
    ],
)
def test_a_row_that_is_not_so_is_noticed(column, value):
    check(SOUND)
    with pytest.raises((AssertionError, TypeError, ValueError)):
        check({**SOUND, column: value})
