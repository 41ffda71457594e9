"""The package as a whole: imports, examples, completeness."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pkgutil
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import joblib
import numpy as np
import optuna
import pytest
import sklearn
from sklearn.base import BaseEstimator

import sklearn_medimb
from sklearn_medimb import AMIMVClassifier, AMIMVEncoder, SPMixSampler
from sklearn_medimb.base._classifier import BaseImageClassifier
from sklearn_medimb.base._encoder import BaseImageEncoder
from sklearn_medimb.rebalance import RebalancedHead
from tests.estimators import by_default, public

PACKAGE = "sklearn_medimb"
ROOT = Path(__file__).parents[1]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").rglob("*.py"))}
PRINTED = {
    "quickstart": [
        "balanced accuracy", "- class weights", "logit adjustment", "metric two-stage", "CSSN",
        "images, each tested once", "open it in a browser",
    ],
    "many_machines": ["best of 4: {'loss': 'logit_adjusted'", "balanced accuracy"],
    "plot_all_cores": ["best: {'loss'"],
    "plot_amimv": ["features: (288, 128)"],
    "plot_cssn": [],
    "plot_deployment": ["after load equal: True", "is refused", "classes as here: 100%"],
    "plot_dicom_to_report": ["80 patients", "each tested once", "report.html"],
    "plot_heads": ["tail recall", "metric + cRT", "metric + virtual features", "LMD"],
    "plot_lmd": ["entries of its history"],
    "plot_metric_two_stage": ["after stage one", "after stage two"],
    "plot_operating_point": [
        "threshold", "on new patients", "operating point", "at the true frequency", "decided",
    ],
    "plot_optuna_search": ["of them pruned", "best balanced accuracy", "weight_decay"],
    "plot_own_method": ["balanced acc.", "calibration error", "LogitNorm"],
    "plot_patient_groups": [
        "folds that cut patients", "validation split of whole patients",
        "nested search, groups routed", "new patients",
    ],
    "plot_pretrained_network": ["from scratch", "frozen", "fitted in"],
    "plot_pretraining": [
        "images have a label", "AMIMV + head", "SimCLR + head", "CSSN from AMIMV",
    ],
    "plot_recommend": ["Take ", "of 10 min", "patients:", "tried out on 3 folds"],
    "plot_smote": ["SMOTE on pixels, before", "validation split"],
    "plot_spmix": ["share of the base: 0.5", "to 0.80"],
    "plot_token_mixup": ["tail recall", "balanced batches", "SPMix, dark lesions"],
    "plot_virtual_features": ["tail recall", "virtual features", "own covariance", "P x K batch"],
}  # fmt: skip
GALLERY = [name for name in EXAMPLES if name.startswith("plot_")]
PUBLIC = list(public())  # also what is no estimator


@pytest.fixture(scope="module")
def imports():
    """Import the dependencies, then the package, in a process of its own; tell the times of both.

    One thread: workers beside it would wait for its others, and it for theirs.
    """
    code = """
import sys, time
times = [time.perf_counter()]
import torch, skorch, imblearn
times.append(time.perf_counter())
import sklearn_medimb
times.append(time.perf_counter())
print(*times, *sys.modules)
"""

    def run():
        command = [sys.executable, "-W", "ignore", "-c", code]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
        start, between, end, *modules = done.stdout.split()
        return (float(end) - float(start)) / (float(between) - float(start)), set(modules)

    first = run()
    return lambda again: run() if again else first


def test_import_leaves_heavy_packages_alone(imports):
    _, loaded = imports(again=False)
    assert "sklearn_medimb" in loaded
    assert not {"optuna", "matplotlib", "dask", "monai", "timm", "skops"} & loaded


def test_import_takes_little_longer_than_its_dependencies(imports):
    assert any(imports(again)[0] < 1.3 for again in (False, True, True))


def rooms() -> dict[str, Path]:
    """Folders and files at the top of the package, by name."""
    found = (ROOT / "sklearn_medimb").iterdir()
    return {path.stem: path for path in found if path.is_dir() or path.suffix == ".py"}


def arrows(room: str) -> set[str]:
    """Other rooms that the files of a room import."""
    path = rooms()[room]
    found = set()
    for file in path.rglob("*.py") if path.is_dir() else [path]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
                named = node.module.split(".")[1:2] or [alias.name for alias in node.names]
                found |= set(named) & set(rooms())
    return found - {room}


def test_floors_have_no_circles():
    """Ground floors know nothing of methods: each room imports from floors below it alone."""
    above = {room: arrows(room) for room in rooms() if room not in ("__init__", "__pycache__")}
    while above:
        floor = {room for room, below in above.items() if not below & set(above)}
        assert floor, f"these rooms import one another: {above}"
        above = {room: below for room, below in above.items() if room not in floor}


@pytest.mark.parametrize("room", sorted(rooms().keys() - {"__init__", "__pycache__"}))
def test_every_room_says_what_it_imports(room):
    doc = importlib.import_module(f"{PACKAGE}.{room}").__doc__
    found = re.search(r"^Imports? (.*?)\.$", doc, re.M | re.S)
    assert found, (
        f"say in the docstring of {room}: Imports `a`, `b`. Or: Imports nothing of the package."
    )
    assert set(re.findall(r"`(\w+)`", found[1])) == arrows(room)


def test_what_has_no_underscore_is_api():
    """In a public folder files have an underscore, and its names are listed."""
    for name, path in rooms().items():
        if path.is_dir() and not name.startswith("_") and name != "utils":
            files = [file.name for file in path.glob("*.py")]
            assert all(file.startswith("_") for file in files), name
            assert importlib.import_module(f"{PACKAGE}.{name}").__all__


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_class_has_an_example_and_a_documented_source(name):
    assert any(name in path.read_text() for path in EXAMPLES.values()), f"no example uses {name}"
    doc = getattr(sklearn_medimb, name).__doc__
    assert "References\n" in doc
    assert ">>> " in doc
    assert name in (ROOT / "docs" / "reference.md").read_text()
    assert name in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", PUBLIC)
def test_every_parameter_and_fitted_attribute_is_documented(name, tiny, blobs):
    cls = getattr(sklearn_medimb, name)
    for parameter in inspect.signature(cls).parameters:
        documented = re.search(rf"^ *(\w+, )*{parameter}(, \w+)* : ", cls.__doc__, re.M)
        assert documented, f"document {parameter}"
    if not issubclass(cls, BaseEstimator):
        return
    estimator, (X, y) = by_default(name), blobs
    if issubclass(cls, RebalancedHead):
        estimator.fit(X.reshape(len(X), -1), y)
    elif hasattr(cls, "predict"):
        estimator.set_params(**tiny, early_stopping=True)
        if cls is AMIMVClassifier:
            estimator.set_params(pretrain=AMIMVEncoder(max_epochs=1), fine_tune="full")
        estimator.fit(X, y)
    elif hasattr(cls, "fit_resample"):
        estimator.fit_resample(X if cls is SPMixSampler else X.reshape(len(X), -1), y)
    elif hasattr(cls, "partial_fit"):
        estimator.set_params(**tiny).fit(X, y)
    else:
        estimator.fit(X)
    for parameter in estimator.get_params(deep=False):
        assert parameter in cls._parameter_constraints, f"constrain {parameter}"
    for attribute in vars(estimator):
        if attribute.endswith("_") and not attribute.startswith("_"):
            assert re.search(rf"\b{attribute}\b", cls.__doc__), f"document {attribute}"


def test_every_module_has_a_docstring():
    for module in pkgutil.walk_packages(sklearn_medimb.__path__, "sklearn_medimb."):
        assert importlib.import_module(module.name).__doc__, module.name


def test_the_quickstart_takes_images_of_a_file(run_briefly, tmp_path):
    pytest.importorskip("matplotlib")
    figure, page = tmp_path / "figure.png", tmp_path / "page.html"
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [30, 14])
    images = rng.integers(0, 120, (44, 12, 12, 3)) + 60 * labels[:, None, None, None]
    np.savez(
        tmp_path / "tiny.npz",
        images=images.astype(np.uint8),
        labels=labels,
        class_names=np.array(["benign", "malignant"]),
    )
    printed, progress = run_briefly(
        "quickstart", tmp_path / "tiny.npz", "--figure", figure, "--page", page
    )
    assert_says("quickstart", printed)
    assert figure.stat().st_size > 10_000
    assert "job" in progress
    assert "<img" in page.read_text()


@pytest.mark.parametrize("name", GALLERY)
def test_examples_run_and_have_a_figure(name, run_briefly):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    printed, _ = run_briefly(name)
    assert_says(name, printed)
    assert pyplot.get_fignums()


def test_many_machines_is_a_command():
    """As a user types it: in a process of its own, which starts others, and in full length."""
    command = [sys.executable, EXAMPLES["many_machines"], "--dask"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    assert_says("many_machines", done.stdout)


def assert_says(name, printed):
    for words in PRINTED[name]:
        assert words in printed


@pytest.fixture
def run_briefly(monkeypatch, capsys):
    """Run an example in this process, with two epochs at most: it is to work, not to convince."""
    for cls in (BaseImageClassifier, BaseImageEncoder):
        plain = cls._n_epochs
        monkeypatch.setattr(cls, "_n_epochs", lambda self, n, plain=plain: min(2, plain(self, n)))
    optimize = optuna.Study.optimize
    monkeypatch.setattr(
        optuna.Study,
        "optimize",
        lambda study, objective, n_trials: optimize(study, objective, min(6, n_trials)),
    )

    def run(name, *arguments):
        path = str(EXAMPLES[name])
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        with (
            warnings.catch_warnings(),
            sklearn.config_context(),
            joblib.parallel_config("sequential"),  # workers would be neither brief nor few
        ):
            warnings.simplefilter("default")  # an example's own affair, as in its own process
            runpy.run_path(path, run_name="__main__")
        return capsys.readouterr()

    yield run
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def test_every_example_is_run():
    assert set(EXAMPLES) == set(PRINTED)


def test_no_test_module_imports_another():
    """What two of them share is a module of its own: each can move, or run, without the other."""
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.name} imports relatively"
                names = [f"{node.module}.{name}" for name in names]
            for name in names:
                own = name.split(".")[0] == "tests"
                modules = [
                    part for part in name.split(".") if part.startswith(("test_", "conftest"))
                ]
                assert not (own and modules), f"{path.name} imports {name}: see tests/helpers.py"


def test_the_first_lines_of_the_readme_run():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    short = code.replace("[150, 70, 30, 14]", "[12, 6]")
    short = short.replace("CSSNClassifier(random_state=0)", "CSSNClassifier(max_epochs=1)")
    assert "max_epochs" in short
    names = {}
    exec(short, names)
    assert names["evidence"].maps.shape[0] == 3


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 7 * 2**10
