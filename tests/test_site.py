"""The site, without building it: its API is complete, its links lead somewhere."""

from __future__ import annotations

import importlib
import pkgutil
import re
from email.message import Message
from pathlib import Path

import numpy as np
import pytest
from sklearn.base import BaseEstimator

import sklearn_medimb
from sklearn_medimb import _pages

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "auto_examples" not in path.parts)
ENTRY = re.compile(r"^\.\. (currentmodule|data):: (\S+)$|^   (\w+)$", re.M)


def listed() -> dict[str, set[str]]:
    """Names that docs/api.rst lists, by module: each has a page, or an entry of its own."""
    found, module = {}, ""
    for directive, argument, name in ENTRY.findall((DOCS / "api.rst").read_text()):
        if directive == "currentmodule":
            module = argument
        else:
            found.setdefault(module, set()).add(name or argument)
    return found


def public_modules() -> dict[str, object]:
    """Modules whose path has no underscore, by name."""
    walked = pkgutil.walk_packages(sklearn_medimb.__path__, "sklearn_medimb.")
    names = ["sklearn_medimb", *(module.name for module in walked)]
    public = [name for name in names if not any(p.startswith("_") for p in name.split("."))]
    return {name: importlib.import_module(name) for name in public}


def names_of(module) -> set[str]:
    """What is public in a module: what it lists, or else defines."""
    defined = {
        k for k, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__
    }
    return set(getattr(module, "__all__", ())) or {k for k in defined if not k.startswith("_")}


def test_the_api_has_every_public_name():
    found = listed()
    for name, module in public_modules().items():
        top = {k for k in names_of(module) & found["sklearn_medimb"] if k in sklearn_medimb.__all__}
        expected = names_of(module) - (top if name != "sklearn_medimb" else set())
        assert found.get(name, set()) == expected, name


@pytest.fixture
def published(monkeypatch):
    """The site has an address."""
    monkeypatch.setattr(_pages, "site", lambda: "https://documentation.example/medimb")


def test_the_address_of_the_site_is_that_of_the_package(monkeypatch):
    urls = ["CSSN, https://doi.org/1", "Documentation, https://documentation.example/medimb/"]
    for given, expected in ((urls, "https://documentation.example/medimb"), (urls[:1], "")):
        message = Message()
        for url in given:
            message["Project-URL"] = url
        monkeypatch.setattr(_pages, "metadata", lambda _, message=message: message)
        assert _pages.site.__wrapped__() == expected


def test_estimators_link_to_pages_of_the_site(published):
    pages = {f"{module}.{name}" for module, names in listed().items() for name in names}
    linked = set()
    for module in public_modules().values():
        for name in names_of(module):
            cls = getattr(module, name)
            if isinstance(cls, type) and issubclass(cls, BaseEstimator):
                link = cls._get_doc_link(cls.__new__(cls))
                page = re.fullmatch(r"https://\S+/(latest|v[\d.]+)/api/(\S+)\.html", link)
                assert page, (cls, link)
                assert page[2] in pages
                assert ("dev" in sklearn_medimb.__version__) == (page[1] == "latest")
                linked.add(page[2])
    assert {f"sklearn_medimb.{name}" for name in ("CSSNClassifier", "datasets.Resize")} <= linked


def test_pictures_of_estimators_link_to_their_page(published):
    clf = sklearn_medimb.CSSNClassifier()
    assert clf._get_doc_link() in clf._repr_html_()
    mine = type("Mine", (sklearn_medimb.SoftmaxClassifier,), {"__module__": "elsewhere"})
    assert not mine()._get_doc_link()


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *PAGES], ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_lead_somewhere(page):
    text = re.sub(r"```(python|bash)\n.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, heading = target.partition("#")
        if target.startswith(("http", "#")):
            continue
        assert (page.parent / path).exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", (page.parent / path).read_text(), re.M)
            assert heading in [title.lower().replace(" ", "-") for title in titles], target
    for folder, example in re.findall(r"/auto_examples/(\w+)/images/sphx_glr_(\w+)_\d+", text):
        assert (ROOT / "examples" / folder / f"{example}.py").exists(), example
    for place in re.findall(r"\{include\} (\S+)", text):
        assert (page.parent / place).exists(), place
    names = {f"{module}.{name}" for module, listing in listed().items() for name in listing}
    assert set(re.findall(r"\{py:class\}`(\S+)`", text)) <= names


def test_every_page_can_be_reached():
    entries = {"index"}
    for page in [*PAGES, DOCS / "api.rst"]:
        for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.S):
            entries |= {line.split("<")[-1].strip(" >") for line in block.splitlines()}
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in PAGES} - {"README"}
    assert pages <= entries
    assert {"api", "auto_examples/index"} <= entries


def test_every_example_is_in_a_group_of_the_gallery():
    conf = (DOCS / "conf.py").read_text()
    folders = {path.parent.name for path in (ROOT / "examples").glob("*/plot_*.py")}
    for folder in folders:
        assert f'"{folder}"' in conf
        assert (ROOT / "examples" / folder / "GALLERY_HEADER.rst").exists()
    for path in (ROOT / "examples").rglob("plot_*.py"):
        assert path.parent.name in folders
        assert re.match(r'"""\n.+\n=+\n', path.read_text()), path
        assert path.read_text().count("\n# %%\n") >= 2, path


def test_the_page_to_start_with_runs(tmp_path, monkeypatch):
    """Its code, with few small images and two methods instead of fourteen; files are made."""
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", (DOCS / "start.md").read_text(), re.S)
    arrays, folder, classifier, validation, comparison = code
    made = {}
    exec(arrays.replace("[150, 70, 30, 14], image_size=32", "[12, 12], image_size=12"), made)
    for row, (picture, label) in enumerate(zip(made["X"], made["y"], strict=True)):
        place = tmp_path / "scans" / label
        place.mkdir(parents=True, exist_ok=True)
        np.save(place / f"p{made['patients'][row]}_{row}.npy", picture)
    names = {}
    exec(folder.replace("image_size=128", "image_size=12"), names)
    assert sorted(names["y"]) == sorted(made["y"])
    assert len(set(names["patients"])) == len(set(made["patients"]))
    exec(classifier.replace("(random_state=0)", "(random_state=0, max_epochs=1)"), names)
    exec(validation.replace("StratifiedGroupKFold(4", "StratifiedGroupKFold(2"), names)
    two = "{k: m for k, m in common_methods(max_epochs=1).items() if k in ('LDAM', 'cRT')}"
    exec(comparison.replace("common_methods(),", f"{two},"), names)
    assert "cRT" in str(names["found"])
    assert "<img" in (tmp_path / "report.html").read_text()
