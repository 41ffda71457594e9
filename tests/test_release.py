"""What goes out with a version agrees with itself: metadata, citation, pins, what to contribute."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import sklearn_medimb
from tests.estimators import PUBLIC

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project():
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def citation():
    return pytest.importorskip("yaml").safe_load((ROOT / "CITATION.cff").read_text())


def requirements(project):
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    found = [Requirement(text) for texts in lists for text in texts]
    return {canonicalize_name(r.name): r for r in found if r.name != "sklearn_medimb"}


def test_the_changelog_and_the_citation_are_of_this_version(citation):
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert first == str(citation["version"]) == sklearn_medimb.__version__


def test_the_citation_names_the_papers_that_the_docstrings_name(citation):
    assert len(citation["references"]) == 6  # five methods, and TailBoost
    for paper in citation["references"]:
        first = paper["authors"][0]
        for name in paper["notes"].split(", "):
            doc = PUBLIC[name].__doc__ or ""
            text = re.sub(r"\s+", " ", doc).lower()
            assert str(paper["year"]) in text, name
            if name != "BalancedVirtualFeatures":
                assert paper["title"].lower() in text, name
                assert f"{first['given-names']} {first['family-names']}".lower() in text, name


def test_pins_are_what_the_package_allows(project):
    allowed, n_checked = requirements(project), 0
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            wanted = allowed.get(canonicalize_name(name))
            n_checked += wanted is not None
            assert wanted is None or wanted.specifier.contains(version), line
    assert n_checked > 15


def test_every_requirement_has_a_floor(project):
    bare = [name for name, r in requirements(project).items() if ">=" not in str(r.specifier)]
    assert bare == ["einops"]  # of MONAI's networks, whatever version these take


def test_versions_of_python_are_those_that_are_promised(project):
    least = re.fullmatch(r">=3\.(\d+)", project["requires-python"])[1]
    told = [c.rpartition("3.")[2] for c in project["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert told[0] == least
    assert f"Python 3.{least} or later" in (ROOT / "README.md").read_text()


def test_contributing_is_true():
    text, readme = ((ROOT / name).read_text() for name in ("CONTRIBUTING.md", "README.md"))
    commands = re.findall(r"```bash\n(python3 -m venv .*)\n```", text)
    assert len(commands) == 2
    assert all(command in readme for command in commands)
    for line in re.findall(r"^\| (`.*?) \|", text, re.M):
        first, *others = re.findall(r"`([\w/]+/)`", line)
        folder = ROOT / first
        for place in [folder, *[folder.parent / other for other in others]]:
            assert place.is_dir() or (ROOT / place.name).is_dir(), place
    for name in re.findall(r"`((?:tests|docs)/[\w./]+)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md"])
def test_links_of_pages_lead_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text())
    assert all((ROOT / link).exists() for link in links)
