"""Forged files: `load` fetches nothing, calls nothing that they name, and stays small and quick."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_medimb import CSSNClassifier, NearestClassMean, SoftmaxClassifier, SSLEncoder
from sklearn_medimb.backbones import (
    MLP,
    ConvNet,
    HybridViT,
    MonaiBackbone,
    ResNet,
    TimmBackbone,
    ViT,
)
from sklearn_medimb.persistence import load, save
from sklearn_medimb.persistence._format import safetensors_library
from tests.forgery import forged, set_state
from tests.helpers import make_blobs

pytest.importorskip("safetensors")
X, Y = make_blobs((12, 8, 4))
SMALL = {
    "backbone": ConvNet(widths=(4, 8)),
    "max_epochs": 1,
    "batch_size": 16,
    "random_state": 0,
    "precision": "float32",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Files of small estimators, by name."""
    folder = tmp_path_factory.mktemp("saved")
    estimators = {
        "softmax": SoftmaxClassifier(**SMALL).fit(X, Y),
        "cssn": CSSNClassifier(**{**SMALL, "backbone": ConvNet(widths=(1,))}, n_tokens=4).fit(X, Y),
        "encoder": SSLEncoder(**SMALL).fit(X),
        "head": NearestClassMean().fit(X.reshape(len(X), -1), Y),
        "vectors": SoftmaxClassifier(**{**SMALL, "backbone": "auto"}).fit(X[:, 0, 0], Y),
    }
    for name, estimator in estimators.items():
        save(estimator, folder / name)
    return folder


def recipe(name, /, **params):
    return {"estimator": {"class": f"sklearn_medimb.backbones.{name}", "params": params}}


def with_backbone(value):
    return lambda tree, *_: tree["params"].update(backbone=value)


def with_image_shape(*shape, more=lambda tree: None):
    def edit(tree, *_):
        shape_ = {"tuple": list(shape)}
        n = int(np.prod(shape, dtype=object))
        tree["state"].update(image_shape_=shape_, input_shape_=shape_, n_features_in_=n)
        more(tree)

    return edit


def texts(n, longest):
    def edit(tree, *_):
        tree["state"]["classes_"] = {"texts": ["U", [n], ["a" * longest, *map(str, range(n - 1))]]}

    return edit


def many_texts(tree, *_):
    one = {"texts": ["U", [2000], ["a" * 1000, *[""] * 1999]]}
    tree["params"]["class_weight"] = {"dict": [[i, one] for i in range(100)]}


def many_classes(tree, tensors, _):
    tensors["classes_"] = np.arange(1_000_000)


def long_history(n):
    return lambda tree, *_: tree["state"].update(history_=[{"dict": [["epoch", 1]]}] * n)


def nested_estimators(tree, *_):
    inner = recipe("ConvNet")
    for _ in range(200):
        inner = {
            "estimator": {
                "class": "sklearn_medimb.SoftmaxClassifier",
                "params": {"backbone": inner},
            }
        }
    tree["params"]["backbone"] = inner


def many_estimators(tree, *_):
    tree["params"]["class_weight"] = [recipe("ViT") for _ in range(20_000)]


def with_a_start(shape):
    """Architecture of a fitted start, whose weights are never in a file."""

    def edit(tree, *_):
        tree["params"]["backbone"] = {
            "estimator": {
                "class": "sklearn_medimb.SSLEncoder",
                "params": {"backbone": recipe("ConvNet", widths=[4, 8])},
                "requests": {},
                "state": {"image_shape_": {"tuple": shape}, "n_samples_fit_": 24},
            }
        }

    return edit


def weights_within(tree, *_):
    """A head that is a whole network."""
    tree["state"]["head_"] = {"estimator": json.loads(json.dumps(tree))}


def large_bank(tree, tensors, _):
    n = 100_000
    tensors["support_patches_"] = np.zeros((n, 4, 1), np.float32)
    for name in list(tensors):
        if name.startswith("support_") and name != "support_patches_":
            array = tensors[name]
            tensors[name] = np.resize(array, (n, *array.shape[1:])).astype(array.dtype)


VIT = {"width": 16, "depth": 1, "n_heads": 2}
# Estimator, change, whether the file is refused: a small file of many pixels is a right one.
FORGERIES = {
    "one long text of 20,000": ("softmax", texts(20_000, 3000), True),
    "two million characters": ("softmax", texts(2, 1_900_000), True),
    "many arrays of texts": ("softmax", many_texts, True),
    "a million classes": ("softmax", many_classes, True),
    "10,000 epochs": ("softmax", long_history(10_000), False),
    "100,000 epochs": ("softmax", long_history(100_000), True),
    "a million lists": ("softmax", lambda *_: "[" + "[]," * 690_000 + "[]]", True),
    "lists in lists": ("softmax", lambda *_: "[" + "[[]]," * 400_000 + "[]]", True),
    "lists in tuples": (
        "softmax",
        set_state("extra_", [{"tuple": [[]]}] * 100_000),
        False,
    ),
    "400 estimators within each other": ("softmax", nested_estimators, True),
    "20,000 estimators": ("softmax", many_estimators, True),
    "weights within": ("softmax", weights_within, True),
    "many pixels": ("softmax", with_image_shape(3, 10_000, 10_000), False),
    "many pixels of an encoder": ("encoder", with_image_shape(3, 60_000, 60_000), False),
    "too many pixels": ("softmax", with_image_shape(3, 10**9, 1), True),
    "more pixels than numbers": ("softmax", with_image_shape(3, 10**30, 10**30), True),
    "a start of many pixels": ("softmax", with_a_start([3, 10**9, 10**9]), True),
    "many pixels, few patches": (
        "softmax",
        with_image_shape(3, 60_000, 60_000, more=with_backbone(recipe("ViT", **VIT))),
        True,
    ),
    "many pixels, resnet": (
        "softmax",
        with_image_shape(3, 9000, 9000, more=with_backbone(recipe("ResNet"))),
        True,
    ),
    "many channels": ("softmax", with_image_shape(10**9, 12, 12), True),
    "many features": ("vectors", with_image_shape(10**12), True),
    "wide conv": ("softmax", with_backbone(recipe("ConvNet", widths=[2**20, 2**20])), True),
    "deep conv": ("softmax", with_backbone(recipe("ConvNet", widths=[1] * 500_000)), True),
    "deep mlp": ("softmax", with_backbone(recipe("MLP", hidden=[1] * 500_000)), True),
    "wide mlp": ("softmax", with_backbone(recipe("MLP", hidden=[2**40])), True),
    "wide vit": ("softmax", with_backbone(recipe("ViT", width=2**20, n_heads=1)), True),
    "vit of 10**6": ("softmax", with_backbone(recipe("ViT", **{**VIT, "depth": 10**6})), True),
    "vit of 10**9": ("softmax", with_backbone(recipe("ViT", **{**VIT, "depth": 10**9})), True),
    "vit of small patches": (
        "softmax",
        with_image_shape(
            3, 9000, 9000, more=with_backbone(recipe("ViT", **{**VIT, "patch_size": 1}))
        ),
        True,
    ),
    "vit of large perceptrons": (
        "softmax",
        with_backbone(recipe("ViT", **{**VIT, "mlp_ratio": 1e12})),
        True,
    ),
    "hybrid": ("softmax", with_backbone(recipe("HybridViT", stem_width=10**5)), True),
    "resnet": ("softmax", with_backbone(recipe("ResNet", width=10**6)), True),
    "a bank of 100,000": ("cssn", large_bank, False),
    "features of a head": ("head", set_state("n_features_in_", 10**11), True),
}

MEASURE = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from sklearn_medimb.persistence import load
torch.set_num_threads(1)

def memory(name):
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if name in x]
    return int(line.split()[1]) / 1024

paths, seen = json.loads(sys.argv[2]), []
for path in paths:
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak counts anew
    before, start, error = memory("VmRSS"), time.process_time(), None
    try:
        load(path)
    except ValueError as caught:
        error = str(caught)
    seen.append([memory("VmHWM") - before, time.process_time() - start, error])
print(json.dumps(seen[1:]))
"""


def test_memory_and_time_are_bounded(saved, tmp_path):
    """One child loads all; its peak grows by at most 256 MB and the file with each."""
    paths = [saved / "softmax"]
    for number, (name, edit, _) in enumerate(FORGERIES.values()):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes((saved / name).read_bytes())
        forged(paths[-1], edit)
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process is measured on Linux")
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", MEASURE, root]
    done = subprocess.run(
        [*command, json.dumps(list(map(str, paths)))], check=True, capture_output=True
    )
    found = json.loads(done.stdout.decode().splitlines()[-1])
    for path, seen, (what, case) in zip(paths[1:], found, FORGERIES.items(), strict=True):
        growth, seconds, error = seen
        print(f"{what}: {growth:.0f} MB, {seconds:.2f} s, {error}")
        assert growth <= 256 + path.stat().st_size / 2**20, what
        assert seconds <= 2, what
        assert (error is not None) == case[2], (what, error)
        assert error is None or error.startswith(f"{path}: "), what


def test_a_long_header_is_not_read(saved, tmp_path):
    data = (saved / "softmax").read_bytes()
    with (tmp_path / "model").open("wb") as file:
        file.write(struct.pack("<Q", 2**27) + data[8:])
        file.truncate(2**27 + 8)
    with pytest.raises(ValueError, match="header is too long"):
        load(tmp_path / "model")


def test_what_is_said_twice_is_refused(saved, tmp_path):
    path = tmp_path / "model"
    path.write_bytes((saved / "softmax").read_bytes())
    with safetensors_library().safe_open(path, framework="numpy") as file:
        text = file.metadata()["estimator"]
    forged(path, lambda *_: text.replace('"lr":', '"lr":0.5,"lr":', 1))
    with pytest.raises(ValueError, match="says the same thing twice"):
        load(path)


def test_save_refuses_what_load_would_not_read(tmp_path):
    clf = SoftmaxClassifier(**SMALL).fit(X, Y)
    clf.history_ = clf.history_ * 100_000
    with pytest.raises(ValueError, match="Shorten history_"):
        save(clf, tmp_path / "model")
    clf.history_ = clf.history_[-1000:]
    save(clf, tmp_path / "model")
    assert len(load(tmp_path / "model").history_) == 1000


# -------------------------------------------------------------------- what is rebuilt


BACKBONES = [
    ConvNet(widths=(4, 8)),
    MLP(hidden=(8, 4)),
    ResNet(width=2),
    ResNet(depth=50, width=2),
    ViT(width=8, depth=2, n_heads=2),
    HybridViT(stem_width=8, width=8, depth=1, n_heads=2, n_stages=1),
    "vit",
    ConvNet,
]


@pytest.mark.parametrize("backbone", BACKBONES, ids=str)
@pytest.mark.parametrize("precision", ["float64", "bf16"])
def test_every_network_comes_back_without_a_draw(backbone, precision, tmp_path):
    params = {**SMALL, "backbone": backbone, "precision": precision}
    saved = SoftmaxClassifier(**params).fit(X, Y)
    save(saved, tmp_path / "model")
    before = torch.get_rng_state()
    loaded = load(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(loaded.predict_proba(X), saved.predict_proba(X))
    for weight, own in zip(
        loaded.net_.module_.parameters(), saved.net_.module_.parameters(), strict=True
    ):
        assert weight.stride() == own.stride()
        assert weight.requires_grad == own.requires_grad
    assert loaded.net_.module_.trunk.autocast == saved.net_.module_.trunk.autocast


def test_volumes_and_pairs_come_back(tmp_path):
    volumes = np.random.default_rng(0).integers(0, 255, (24, 1, 6, 6, 6), dtype=np.uint8)
    for clf, images in (
        (SoftmaxClassifier(**SMALL), volumes),
        (CSSNClassifier(**SMALL, reference="paired"), np.stack([X, X[::-1]], axis=1)),
    ):
        clf.fit(images, Y)
        save(clf, tmp_path / "model")
        loaded = load(tmp_path / "model")
        assert np.array_equal(loaded.predict_proba(images), clf.predict_proba(images))


def test_other_threads_build_what_they_want(saved, monkeypatch):
    """Layers are counted by hooks of torch that see those of every thread."""
    import threading

    from sklearn_medimb.persistence import _rebuilding as rebuilding

    made, count = [], rebuilding._Budget.watching

    def elsewhere():
        for _ in range(3000):
            made.append(nn.ReLU())
            nn.Sequential(made[-1])

    class Slow(rebuilding._Budget):
        def watching(self):
            context = count(self)
            context.__enter__()
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            context.__exit__(None, None, None)
            return count(self)

    monkeypatch.setattr(rebuilding, "_Budget", Slow)
    assert load(saved / "softmax").n_iter_ == 1
    assert len(made) == 3000


# -------------------------------------------------------------------- adapters


CALLS: list[str] = []


class Small(nn.Module):
    """A classifier with the interface of MONAI's."""

    def __init__(self, spatial_dims, in_channels, num_classes, pretrained=False, act="relu", k=3):
        super().__init__()
        CALLS.append(f"{type(self).__name__} pretrained={pretrained}")
        self.conv = nn.Conv2d(in_channels, 6, k, padding=k // 2)
        self.fc = nn.Linear(6, num_classes)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))


class DenseNet121(Small):
    """An allowed name."""


class ResNet_(Small):
    """What MONAI's functions of residual networks make."""

    def __init__(self, block, layers, block_inplanes, spatial_dims, n_input_channels, num_classes,
                 feed_forward=True):  # fmt: skip
        assert (block, layers, len(block_inplanes)) == ("basic", [2, 2, 2, 2], 4)
        super().__init__(spatial_dims, n_input_channels, num_classes)


class Transchex(Small):
    """It fetches, and takes a name of a repository."""

    def __init__(self, spatial_dims, in_channels, num_classes, path_or_repo_id="bert"):
        super().__init__(spatial_dims, in_channels, num_classes)
        CALLS.append("fetched")


class Tabled(Small):
    """One that keeps what a state dict leaves out, and needs numbers to be made."""

    def __init__(self, *args, **params):
        super().__init__(*args, **params)
        self.register_buffer("table", torch.arange(6.0), persistent=False)
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]

    def forward(self, x):
        return self.fc((self.conv(x).relu() + self.table[:, None, None]).mean((2, 3)))


def get_pretrained_resnet_medicalnet(*args, **kwargs):
    CALLS.append("fetched")


def resnet18(*args, **kwargs):
    CALLS.append("a function was called")


@pytest.fixture
def monai(monkeypatch):
    CALLS.clear()
    nets = types.SimpleNamespace(
        DenseNet121=DenseNet121,
        ResNet=ResNet_,
        SENet154=Tabled,
        Transchex=Transchex,
        NewNet=Small,
        get_pretrained_resnet_medicalnet=get_pretrained_resnet_medicalnet,
        resnet18=resnet18,
    )
    monkeypatch.setitem(sys.modules, "monai", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "monai.networks", types.SimpleNamespace(nets=nets))


@pytest.mark.parametrize(
    "backbone",
    [
        "monai:DenseNet121",
        "monai:resnet18",
        MonaiBackbone("DenseNet121", {"k": 5, "act": "gelu", "pretrained": False}),
        MonaiBackbone("SENet154"),
    ],
    ids=str,
)
def test_networks_of_monai_come_back(backbone, monai, tmp_path):
    saved = SoftmaxClassifier(**{**SMALL, "backbone": backbone}).fit(X, Y)
    save(saved, tmp_path / "model")
    CALLS.clear()
    loaded = load(tmp_path / "model")
    assert set(CALLS) <= {f"{n} pretrained=False" for n in ("DenseNet121", "ResNet_", "Tabled")}
    assert np.array_equal(loaded.predict_proba(X), saved.predict_proba(X))


FETCHING = {
    "function": recipe("MonaiBackbone", name="get_pretrained_resnet_medicalnet"),
    "function by name": "monai:get_pretrained_resnet_medicalnet",
    "class that fetches": recipe("MonaiBackbone", name="Transchex"),
    "its repository": recipe(
        "MonaiBackbone", name="Transchex", params={"dict": [["path_or_repo_id", "a/b"]]}
    ),
    "class that nobody has read": "monai:NewNet",
    "pretrained": recipe(
        "MonaiBackbone", name="DenseNet121", params={"dict": [["pretrained", True]]}
    ),
    "pretrained path": recipe(
        "MonaiBackbone", name="DenseNet121", params={"dict": [["pretrained", "/etc/passwd"]]}
    ),
    "address": recipe(
        "MonaiBackbone", name="DenseNet121", params={"dict": [["act", "https://a.b/c"]]}
    ),
    "path": recipe("MonaiBackbone", name="DenseNet121", params={"dict": [["act", "/etc/x"]]}),
    "class": recipe(
        "MonaiBackbone",
        name="DenseNet121",
        params={"dict": [["act", {"class": "torch.optim.SGD"}]]},
    ),
    "large number": recipe("MonaiBackbone", name="DenseNet121", params={"dict": [["k", 10**9]]}),
    "many numbers": recipe("MonaiBackbone", name="DenseNet121", params={"dict": [["k", [3] * 99]]}),
    "deep": recipe("MonaiBackbone", name="DenseNet121", params={"dict": [["k", [[[[[3]]]]]]]}),
    "wide": recipe("MonaiBackbone", name="DenseNet121", params={"dict": [["k", 60_001]]}),
    "name that is no text": recipe("MonaiBackbone", name=["DenseNet121"]),
    "module": "monai:os",
    "timm hub": recipe("TimmBackbone", name="hf_hub:a/b"),
    "timm folder": "timm:local-dir:/tmp",
    "timm checkpoint": recipe(
        "TimmBackbone", name="cnn", params={"dict": [["checkpoint_path", "/tmp/x.pth"]]}
    ),
    "timm pretrained": recipe("TimmBackbone", name="cnn", params={"dict": [["pretrained", True]]}),
    "timm configuration": recipe(
        "TimmBackbone", name="cnn", params={"dict": [["pretrained_cfg", {"dict": [["file", "x"]]}]]}
    ),
    "timm, another network": "timm:cnn",
    "repository": "hf:a/b",
    "repository's folder": "hf:/tmp",
    "repository without a configuration": recipe("TransformersBackbone", name="a/b"),
    "repository of a detector": recipe(
        "TransformersBackbone", name="a/b", params={"dict": [["model_type", "detr"]]}
    ),
    "repository with a path": recipe(
        "TransformersBackbone",
        name="a/b",
        params={"dict": [["model_type", "vit"], ["hidden_act", "../x"]]},
    ),
}


@pytest.fixture
def timm(monkeypatch):
    def create_model(name, pretrained, in_chans, num_classes, **params):
        CALLS.append(f"timm {name} pretrained={pretrained} {params}")
        net = nn.Sequential(nn.Conv2d(in_chans, params.get("width", 6), 3, padding=1))
        net.forward_features = net.forward
        return net

    fake = types.SimpleNamespace(
        create_model=create_model, list_models=lambda: ["cnn", "hf_hub:a/b"]
    )
    monkeypatch.setitem(sys.modules, "timm", fake)
    CALLS.clear()


# Why each is refused: by its name, by a parameter, or, where it may be made, by what it then is.
UNKNOWN = r"is not among the networks that a file may name"
PARAMETER = r"params: a network from a file is not made with "
ANOTHER = r"of another network: .* differ\."
REASONS = {
    "pretrained": PARAMETER + r"\{'pretrained': True\}",
    "pretrained path": PARAMETER + r"\{'pretrained': '/etc/passwd'\}",
    "address": PARAMETER + "'https://a.b/c'",
    "path": PARAMETER + "'/etc/x'",
    "class": PARAMETER + "<class 'torch.optim",
    "large number": PARAMETER + "1000000000",
    "many numbers": PARAMETER + r"\[3, 3",
    "deep": PARAMETER + r"\[\[3",
    "wide": ANOTHER,
    "timm hub": PARAMETER + "'hf_hub:a/b'",
    "timm folder": PARAMETER + "'local-dir:/tmp'",
    "timm checkpoint": PARAMETER + r"\{'checkpoint_path'",
    "timm pretrained": PARAMETER + r"\{'pretrained': True\}",
    "timm configuration": PARAMETER + r"\{'pretrained_cfg'",
    "timm, another network": ANOTHER,
    "repository with a path": PARAMETER + "'../x'",
}


@pytest.mark.parametrize("case", FETCHING)
def test_nothing_is_fetched_and_nothing_called(case, monai, timm, saved, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *args: CALLS.append("connected"))
    path = tmp_path / "model"
    path.write_bytes((saved / "softmax").read_bytes())
    forged(path, with_backbone(FETCHING[case]))
    start = time.process_time()
    with pytest.raises(ValueError, match="model: .*" + f"(?:{REASONS.get(case, UNKNOWN)})"):
        load(path)
    assert time.process_time() - start < 2
    allowed = ("DenseNet121 pretrained=False", "timm cnn pretrained=False {}")
    assert set(CALLS) <= set(allowed)


def test_networks_of_timm_come_back(timm, tmp_path):
    backbone = TimmBackbone("cnn", {"width": 4, "drop_path_rate": 0.1, "img_size": (12, 12)})
    saved = SoftmaxClassifier(**{**SMALL, "backbone": backbone}).fit(X, Y)
    save(saved, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert np.array_equal(loaded.predict_proba(X), saved.predict_proba(X))
    assert all("pretrained=False" in call for call in CALLS)


def test_weights_that_training_began_with_are_not_opened(tmp_path):
    path = tmp_path / "start.pt"
    torch.save(ConvNet(widths=(4, 8)).build((3, 12, 12)).state_dict(), path)
    backbone = ConvNet(widths=(4, 8), weights=path)
    saved = SoftmaxClassifier(**{**SMALL, "backbone": backbone}).fit(X, Y)
    path.unlink()
    save(saved, tmp_path / "model")
    assert load(tmp_path / "model").backbone.weights == path
    assert np.array_equal(load(tmp_path / "model").predict_proba(X), saved.predict_proba(X))


def test_networks_that_may_fetch_are_not_made_by_name(monai):
    """Nor in `fit`: a name gives a class, or one of the residual networks."""
    for name in ("get_pretrained_resnet_medicalnet", "sys"):
        with pytest.raises(ValueError, match=f"has no network '{name}'"):
            MonaiBackbone(name).build((3, 12, 12))
    with pytest.raises(ValueError, match="nothing is downloaded"):
        MonaiBackbone("Transchex", {"path_or_repo_id": "a/b"}).build((3, 12, 12))
    assert not CALLS
