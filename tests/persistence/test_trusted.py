"""Classes from outside of the package: `load` reads them where the caller trusts them."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.svm import SVC

from sklearn_medimb import SoftmaxClassifier
from sklearn_medimb.augment import Augmentation
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.onnx import export_onnx
from sklearn_medimb.persistence import load, save
from tests.forgery import forged, set_class, set_param, set_state
from tests.helpers import make_blobs

pytest.importorskip("safetensors")
X, Y = make_blobs((12, 8, 4))

METHODS = '''
"""Methods of an author outside of the package."""

import json
import os
import subprocess
from os import system

import torch
from sklearn.base import BaseEstimator
from sklearn.svm import SVC
from torch import nn

from sklearn_medimb import SoftmaxClassifier
from sklearn_medimb.backbones import Backbone


class Stem(Backbone):
    """A recipe that needs numbers to build its network."""

    def __init__(self, width=4, dilations=(1, 2), weights=None):
        self.weights = weights
        self.width = width
        self.dilations = dilations

    def _build(self, channels, spatial):
        rate = torch.linspace(0, 0.2, 3)[1].item()
        layers = []
        for dilation in self.dilations:
            layers += [nn.Conv2d(channels, self.width, 3, 2, dilation, dilation), nn.ReLU()]
            channels = self.width
        return nn.Sequential(*layers, nn.Dropout(rate))


class Powered(BaseEstimator):
    """A loss: cross-entropy to a power."""

    def __init__(self, power=1.5):
        self.power = power

    def __call__(self, logits, counts):
        return -logits.log_softmax(1) * self.power


class Descent(torch.optim.SGD):
    """An optimiser."""


class Tempered(SoftmaxClassifier):
    """With a learned temperature, a loss object, and few parameters of its own."""

    _parameter_constraints = {**SoftmaxClassifier._parameter_constraints, "cost": [None, Powered]}

    def __init__(self, backbone="auto", *, cost=None, net_params=None, random_state=None):
        super().__init__(
            backbone,
            max_epochs=1,
            batch_size=16,
            precision="float32",
            net_params=net_params,
            random_state=random_state,
        )
        self.cost = cost

    def _label_loss(self, train, n_steps):
        label_loss = super()._label_loss(train, n_steps)
        if self.cost is not None:
            label_loss.costs = self.cost
        return label_loss

    def _make_head(self, n_features):
        return nn.Sequential(super()._make_head(n_features), Temperature())

    def _inference_state(self, train):
        return {**super()._inference_state(train), "rows_": len(train.rows)}


class Temperature(nn.Module):
    """Divides logits."""

    def __init__(self):
        super().__init__()
        self.log = nn.Parameter(torch.zeros(()))

    def forward(self, logits):
        return logits / self.log.exp()
'''

CHILD = '''
import json, sys
import numpy as np
from sklearn_medimb import SoftmaxClassifier
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.persistence import load, save

def attempt(*trusted):
    try:
        load("model", trusted=trusted)
    except ValueError as error:
        return str(error), "outside_methods" in sys.modules
    return "read", "outside_methods" in sys.modules

seen = [attempt(), attempt("outside_effect")]
X = np.load("images.npy")
by_module = load("model", trusted=["outside_methods"]).predict_proba(X)
import outside_methods as own
by_class = load("model", trusted=[own.Tempered, own.Stem, own.Powered, own.Descent])
np.save("answers.npy", [by_module, by_class.predict_proba(X)])

class Moved(SoftmaxClassifier):
    """Of a program."""

moved = Moved(ConvNet(widths=(4,)), max_epochs=1, random_state=0)
save(moved.fit(X, np.load("labels.npy")), "moved")
load("moved", trusted=[Moved])
print(json.dumps(seen))
'''


class Moved(SoftmaxClassifier):
    """What the child defines in itself."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the author's modules are; it is on the path."""
    folder = tmp_path_factory.mktemp("author")
    (folder / "outside_methods.py").write_text(METHODS)
    (folder / "outside_twin.py").write_text(METHODS)
    (folder / "outside_effect.py").write_text("from pathlib import Path\nPath('effect').touch()\n")
    (folder / "outside_package").mkdir()
    (folder / "outside_package" / "__init__.py").write_text(
        "from ._inside import Descent, Tempered"
    )
    (folder / "outside_package" / "_inside.py").write_text(METHODS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
        for name in [name for name in sys.modules if name.startswith("outside_")]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def own(folder):
    return importlib.import_module("outside_methods")


@pytest.fixture(scope="module")
def fitted(own):
    clf = own.Tempered(
        own.Stem(width=6),
        cost=own.Powered(2.0),
        net_params={"optimizer": own.Descent},
        random_state=0,
    )
    return clf.fit(X, Y)


@pytest.fixture
def path(fitted, tmp_path):
    save(fitted, tmp_path / "model")
    return tmp_path / "model"


def test_it_comes_back_for_callers_who_trust_it(fitted, own, path):
    classes = [own.Tempered, own.Stem, own.Powered, own.Descent]
    for trusted in (["outside_methods"], classes, iter(classes), [*classes, SoftmaxClassifier]):
        loaded = load(path, trusted=trusted)
        assert type(loaded) is own.Tempered
        assert np.array_equal(loaded.predict_proba(X), fitted.predict_proba(X))
        assert repr(loaded) == repr(fitted)
        assert loaded.rows_ == 24
        assert loaded.batch_size == 16
    loaded.fit(X, Y)
    assert np.array_equal(loaded.predict_proba(X), fitted.predict_proba(X))


def test_the_message_says_what_to_write(fitted, own, path):
    told = []
    for _ in range(4):
        with pytest.raises(ValueError, match=r"names the class 'outside_methods\.") as caught:
            load(path, trusted=[getattr(own, name) for name in told])
        assert str(caught.value).startswith(f"{path}: ")
        by_class = re.search(r"load\(path, trusted=\[(\w+)\]\)", str(caught.value))
        assert 'load(path, trusted=["outside_methods"])' in str(caught.value)
        told.append(by_class[1])
    loaded = load(path, trusted=[getattr(own, name) for name in told])
    assert np.array_equal(loaded.predict_proba(X), fitted.predict_proba(X))


def test_a_fresh_process_imports_what_the_caller_names_and_nothing_else(folder, fitted, tmp_path):
    save(fitted, tmp_path / "model")
    np.save(tmp_path / "images.npy", X)
    np.save(tmp_path / "labels.npy", Y)
    (tmp_path / "program.py").write_text(CHILD)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, str(folder)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for message, imported in json.loads(done.stdout.splitlines()[-1]):
        assert message.startswith("model: it names the class 'outside_methods.Tempered'")
        assert not imported
    assert (tmp_path / "effect").exists()  # of the module that the caller named
    for answer in np.load(tmp_path / "answers.npy"):
        assert np.array_equal(answer, fitted.predict_proba(X))

    with pytest.raises(
        ValueError, match=r"'__main__\.Moved'.* load\(path, trusted=\[Moved\]\) rea"
    ):
        load(tmp_path / "moved")
    assert type(load(tmp_path / "moved", trusted=[Moved])) is Moved
    twin = type("Moved", (SoftmaxClassifier,), {"__module__": "elsewhere"})
    with pytest.raises(ValueError, match="__main__"):  # which one is meant?
        load(tmp_path / "moved", trusted=[Moved, twin])


def test_a_refused_file_imports_nothing(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("outside_effect", None)
    for name in ("outside_effect.Tempered", "outside_effect.sub.Tempered"):
        forged(path, set_class(name))
        for trusted in ((), ["outside_methods"]):
            with pytest.raises(ValueError, match="outside_effect"):
                load(path, trusted=trusted)
        assert "outside_effect" not in sys.modules
    assert not Path("effect").exists()


def test_a_package_stands_for_what_it_holds_of_its_own(folder, path, tmp_path):
    package = importlib.import_module("outside_package")
    clf = package.Tempered(ConvNet(widths=(4,)), random_state=0).fit(X, Y)
    save(clf, tmp_path / "own")
    loaded = load(tmp_path / "own", trusted=["outside_package"])
    assert np.array_equal(loaded.predict_proba(X), clf.predict_proba(X))
    clf.set_params(cost=package._inside.Powered())
    save(clf, tmp_path / "own")
    with pytest.raises(ValueError, match=r'trusted=\["outside_package\._inside"\]'):
        load(tmp_path / "own", trusted=["outside_package"])  # it does not hold Powered
    assert load(tmp_path / "own", trusted=["outside_package._inside"]).cost.power == 1.5


def test_the_same_name_in_another_module_is_another_class(own, path):
    twin = importlib.import_module("outside_twin")
    for trusted in (["outside_twin"], [twin.Tempered, twin.Stem, twin.Powered, twin.Descent]):
        with pytest.raises(ValueError, match=r"'outside_methods\.Tempered'"):
            load(path, trusted=trusted)


NO_CLASSES = [
    "os.system",
    "subprocess.Popen",
    "builtins.eval",
    "torch.load",
    "sklearn.svm.SVC",
    "outside_methods.system",
    "outside_methods.os.system",
    "outside_methods.subprocess.Popen",
    "outside_methods.SVC",
    "outside_methods.Temperature",
    "outside_methods.SoftmaxClassifier",
    "outside_methods.Backbone",
    "outside_methods.BaseEstimator",
    "outside_methods.Tempered.fit",
    "outside_methods.gone",
    "outside_methods.",
    ".Tempered",
    "Tempered",
    "a b.c",
    "",
    3,
    ["outside_methods.Tempered"],
]


@pytest.mark.parametrize("name", NO_CLASSES, ids=str)
@pytest.mark.parametrize("edit", [set_class, lambda name: set_param("cost", {"class": name})])
def test_trust_reaches_the_estimators_of_a_module_only(name, edit, path, monkeypatch):
    monkeypatch.setattr("os.system", lambda *args: pytest.fail("was called"))
    forged(path, edit(name))
    with pytest.raises(ValueError, match=r"names the class .* not among those that load makes"):
        load(path, trusted=["outside_methods", "os", "subprocess", "sklearn.svm", "torch"])


FORGERIES = {
    "an optimiser": set_class("outside_methods.Descent"),
    "a recipe": lambda *_: '{"estimator": {"class": "outside_methods.Stem", "params": {}}}',
    "unknown parameter": set_param("lr", 0.1),
    "parameter of another kind": set_param("cost", 3),
    "method": set_state("predict", 1),
    "method of its own": set_state("_label_loss", 1),
    "parameter among what was learned": set_state("lr", 1),
    "net that is data": set_state("net_", 1),
    "no classes": lambda tree, *_: tree["state"].pop("classes_") and None,
    "history of numbers": set_state("history_", [1]),
    "huge network": set_param(
        "backbone", {"estimator": {"class": "outside_methods.Stem", "params": {"width": 2**40}}}
    ),
    "deep network": set_param(
        "backbone",
        {"estimator": {"class": "outside_methods.Stem", "params": {"dilations": [1] * 100_000}}},
    ),
    "many pixels": lambda tree, *_: tree["state"].update(
        image_shape_={"tuple": [3, 60_000, 60_000]},
        input_shape_={"tuple": [3, 60_000, 60_000]},
        n_features_in_=3 * 60_000**2,
    ),
}


@pytest.mark.parametrize("edit", FORGERIES.values(), ids=FORGERIES)
def test_forged_files_are_refused_though_trusted(edit, path):
    forged(path, edit)
    with pytest.raises(ValueError, match="model: "):
        load(path, trusted=["outside_methods"])


@pytest.mark.parametrize(
    ("trusted", "error", "match"),
    [
        ("outside_methods", TypeError, "trusted must be a list"),
        (Moved, TypeError, "trusted must be a list"),
        (None, TypeError, "trusted must be a list"),
        ([Moved()], TypeError, r"trusted holds Moved\(\), which is neither a class nor"),
        ([np.linalg], TypeError, "neither a class nor the name of a module"),
        ([print], TypeError, "neither a class nor the name of a module"),
        ([subprocess.Popen], TypeError, "Popen, which no file holds: it must be an estimator"),
        ([torch.nn.Linear], TypeError, "Linear, which no file holds: it must be an estimator"),
        ([RandomForestClassifier], TypeError, "outside of imblearn, sklearn, sklearn_medimb, tor"),
        ([SVC], TypeError, "of which files hold a fixed list"),
        (["no_such_module"], ImportError, "trusted names 'no_such_module', which cannot be impo"),
        (["outside_methods.Stem"], ImportError, "the name of the module that defines the class"),
    ],
)
def test_trust_of_a_wrong_type_says_what_to_write(trusted, error, match, own, path):
    with pytest.raises(error, match=match):
        load(path, trusted=trusted)


def test_classes_that_no_file_could_name_are_not_saved(own, tmp_path):
    class Local(SoftmaxClassifier):
        """Of a function."""

    small = {"backbone": ConvNet(widths=(4,)), "max_epochs": 1, "random_state": 0}
    with pytest.raises(
        ValueError, match=r"Local is not, or no longer, at the top level of its module"
    ):
        save(Local(**small).fit(X, Y), tmp_path / "model")
    hidden = type("Tempered", (own.Tempered,), {"__module__": "outside_methods"})
    with pytest.raises(ValueError, match="Tempered is not, or no longer"):
        save(hidden(ConvNet(widths=(4,))).fit(X, Y), tmp_path / "model")
    clf = SoftmaxClassifier(**small, augment=type("Mine", (Augmentation,), {})()).fit(X, Y)
    with pytest.raises(
        ValueError, match=r"^augment=.* move its class to the top level of a module"
    ):
        save(clf, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_a_class_sets_beside_its_parameters_is_not_lost(fitted, own, tmp_path):
    clf = own.Tempered(own.Stem(), random_state=0).fit(X, Y)
    clf.post_hoc_tau = 1.0  # its constructor would not say so
    with pytest.raises(ValueError, match=r"Tempered keeps what it learned in \['post_hoc_tau'\]"):
        save(clf, tmp_path / "model")


class Scaled(SoftmaxClassifier):
    """Changes the scores of the network."""

    def _scores(self, images, rows=None):
        return 2 * super()._scores(images, rows)


class Certain(SoftmaxClassifier):
    """Changes the probabilities."""

    def predict_proba(self, X):
        return super().predict_proba(X).round()


@pytest.mark.parametrize("cls", [Scaled, Certain])
def test_a_graph_that_would_predict_otherwise_is_not_written(cls, tmp_path):
    pytest.importorskip("onnx")
    clf = cls(ConvNet(widths=(4,)), max_epochs=1, random_state=0).fit(X, Y)
    with pytest.raises(ValueError, match=f"{cls.__name__} overrides predict_proba, or changes"):
        export_onnx(clf, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_graph_of_it_predicts_the_same(fitted, tmp_path):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    export_onnx(fitted, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {"images": X.astype(np.float32)})
    np.testing.assert_allclose(found, fitted.predict_proba(X), rtol=1e-4, atol=1e-5)
