from __future__ import annotations

import hashlib
import importlib
import json
import pickle
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

from sklearn_medimb import CSSNClassifier, SoftmaxClassifier
from sklearn_medimb.backbones import (
    TimmBackbone,
    TransformersBackbone,
    make_backbone,
    recipe_of,
    stages_of,
)
from sklearn_medimb.persistence import load, save
from tests.helpers import make_blobs

PROCESSOR = {
    "do_center_crop": True, "crop_size": {"height": 16, "width": 16}, "size": {"shortest_edge": 20},
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.3],
}  # fmt: skip


# ------------------------------------------------------------------------------ stand-in


class FakeNet(nn.Module):
    """A network of patches of 4 pixels, with `n_first` tokens before theirs."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        if config.has_class_token:
            self.cls_token = nn.Parameter(torch.randn(1, 1, 3))
        self.registers = nn.Parameter(torch.randn(1, config.num_register_tokens, 3))
        self.proj = nn.Conv2d(config.num_channels, 3, 4, 4)
        self.pooler = nn.Linear(3, 3)

    def forward(self, pixel_values, interpolate_pos_encoding=False):
        assert interpolate_pos_encoding
        out = self.proj(pixel_values)
        if self.config.returns != "map":
            first = [self.registers] if self.config.num_register_tokens else []
            first = [self.cls_token, *first] if self.config.has_class_token else first
            patches = out.flatten(2).transpose(1, 2)
            out = torch.cat([*(part.expand(len(out), -1, -1) for part in first), patches], 1)
            out = out[:, 1:] if self.config.returns == "fewer" else out
        return types.SimpleNamespace(last_hidden_state=out, pooler_output=self.pooler(out[:, 0]))


class TwoTowers(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.text_model = nn.Linear(2, 2)
        self.vision_model = FakeNet(config.vision_config)


class FakeConfig(types.SimpleNamespace):
    def to_diff_dict(self):
        return {**vars(self), "id2label": {0: "a"}, "_name_or_path": "x", "transformers_version": 5}


def fake_config(**fields):
    default = {"model_type": "vit", "num_channels": 3, "patch_size": 4, "num_register_tokens": 0}
    return FakeConfig(**{**default, "has_class_token": True, "returns": "tokens", **fields})


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in of transformers, with repositories by name, and what was asked of it."""
    repos, calls, missing = {}, [], []

    class AutoConfig:
        @staticmethod
        def from_pretrained(name, *, trust_remote_code, local_files_only=False):
            calls.append(("config", name, local_files_only))
            assert not trust_remote_code
            if name not in repos:
                raise OSError(f"{name} is not a local folder")
            return repos[name]

        @staticmethod
        def for_model(kind, **fields):
            return fake_config(model_type=kind, **fields)

    class AutoModel:
        @staticmethod
        def from_config(config):
            return FakeNet(config)

        @staticmethod
        def from_pretrained(name, *, config, trust_remote_code, **options):
            calls.append(("weights", name, options.pop("local_files_only", False)))
            assert options == {"use_safetensors": True, "output_loading_info": True}
            assert not trust_remote_code
            torch.manual_seed(3)
            net = TwoTowers(config) if hasattr(config, "vision_config") else FakeNet(config)
            return net, {"missing_keys": set(missing)}

    def cached_file(name, filename, local_files_only=False):
        calls.append((filename, name, local_files_only))
        if (tmp_path / filename).is_file():
            return str(tmp_path / filename)
        gone = "offline" in name
        raise OSError("no connection" if gone else f"{name} does not appear to have {filename}")

    fake = types.ModuleType("transformers")
    fake.AutoConfig, fake.AutoModel = AutoConfig, AutoModel
    fake.utils = types.ModuleType("transformers.utils")
    fake.utils.cached_file = cached_file
    monkeypatch.setitem(sys.modules, "transformers", fake)
    monkeypatch.setitem(sys.modules, "transformers.utils", fake.utils)
    return types.SimpleNamespace(repos=repos, calls=calls, missing=missing, folder=tmp_path)


@pytest.mark.parametrize("n_registers", [0, 2])
@pytest.mark.parametrize("has_class_token", [False, True])
def test_tokens_are_brought_to_the_contract(has_class_token, n_registers, hub):
    hub.repos["a/b"] = fake_config(has_class_token=has_class_token, num_register_tokens=n_registers)
    trunk = make_backbone("hf:a/b", (3, 8, 12))
    x = torch.randn(2, 3, 8, 12)
    patches = trunk.net.proj(x).flatten(2).transpose(1, 2)
    first = trunk.net.cls_token[:, 0].expand(2, 3) if has_class_token else patches.mean(1)
    out = trunk(x)
    torch.testing.assert_close(out[:, 0], first)
    assert torch.equal(out[:, 1:], patches)
    assert isinstance(trunk.net.pooler, nn.Identity)
    assert trunk(torch.randn(1, 3, 16, 16)).shape == (1, 17, 3)


def test_maps_and_towers(hub):
    hub.repos["map"] = fake_config(returns="map")
    hub.repos["clip"] = FakeConfig(model_type="clip", vision_config=fake_config(returns="map"))
    x = torch.randn(2, 3, 8, 12)
    for name in ("map", "clip"):
        trunk = make_backbone(f"hf:{name}", (3, 8, 12))
        assert torch.equal(trunk(x), trunk.net.proj(x))
        assert "text_model" not in str(trunk)


def test_tokens_that_nobody_knows_are_refused(hub):
    hub.repos["a/b"] = fake_config(returns="fewer")
    with pytest.raises(ValueError, match="returns 4 tokens, of which 4 should be those of patches"):
        make_backbone("hf:a/b", (3, 8, 8))(torch.ones(1, 3, 8, 8))


def test_gray_images_are_repeated(hub):
    hub.repos["a/b"] = fake_config()
    gray = torch.randn(2, 1, 8, 8)
    own, three = (make_backbone("hf:a/b", (c, 8, 8)) for c in (1, 3))
    assert torch.equal(own(gray), three(gray.expand(-1, 3, -1, -1)))
    with pytest.raises(ValueError, match=r"hf:a/b .* 3 channels, or gray.*input_shape has 2"):
        make_backbone("hf:a/b", (2, 8, 8))
    with pytest.raises(ValueError, match="input_shape"):
        make_backbone("hf:a/b", (1, 8, 8, 8))


def test_only_who_asks_for_weights_fetches(hub):
    hub.repos["a/b"] = fake_config()
    TransformersBackbone("a/b", weights=None).build((3, 8, 8))
    assert hub.calls == [("config", "a/b", True)]
    hub.calls.clear()
    recipe = TransformersBackbone("c/d", None, {"model_type": "vit", "num_register_tokens": 2})
    assert recipe.build((3, 8, 8)).net.registers.shape[1] == 2
    assert not hub.calls
    assert recipe.start is None
    assert not recipe.has_start
    assert recipe_of("hf:a/b").has_start
    assert not hub.calls
    make_backbone("hf:a/b", (3, 8, 8))
    assert hub.calls == [("config", "a/b", False), ("weights", "a/b", False)]


def test_local_weights_have_the_names_of_the_network(hub):
    hub.repos["a/b"] = fake_config()
    net = make_backbone("hf:a/b", (3, 8, 8))
    torch.save(net.net.state_dict(), hub.folder / "w.pt")
    again = TransformersBackbone("a/b", hub.folder / "w.pt").build((3, 8, 8))
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in again.state_dict().items())


def test_fields_of_the_configuration_can_be_set(hub):
    hub.repos["a/b"] = fake_config()
    for weights in (None, "pretrained"):
        net = TransformersBackbone("a/b", weights, {"num_register_tokens": 5}).build((3, 8, 8))
        assert net.net.registers.shape[1] == 5
        with pytest.raises(ValueError, match=r"params: .* hf:a/b has no fields \['depht'\]"):
            TransformersBackbone("a/b", weights, {"depht": 5}).build((3, 8, 8))
    with pytest.raises(ValueError, match="params: hf:a/b is 'vit', not 'swin'"):
        TransformersBackbone("a/b", params={"model_type": "swin"}).build((3, 8, 8))
    with pytest.raises(ValueError, match="params must be a mapping"):
        TransformersBackbone("a/b", params=3).build((3, 8, 8))


def test_what_is_absent_is_named(hub, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"hf:x/y: no configuration .*none could"):
        make_backbone("hf:x/y", (3, 8, 8))
    hub.repos["a/b"] = fake_config()
    hub.missing.append("pooler.weight")  # which is not wanted
    make_backbone("hf:a/b", (3, 8, 8))
    hub.missing.append("proj.weight")
    with pytest.raises(ValueError, match=r"weights='pretrained'.* lack weights.*: proj\.weight"):
        make_backbone("hf:a/b", (3, 8, 8))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"hf:a/b needs .*pip install transformers"):
        make_backbone("hf:a/b", (3, 8, 8))


def test_start_is_what_the_image_processor_says(hub):
    recipe = recipe_of("hf:a/b")
    assert recipe.start == (None, None, None, "hf:a/b")
    (hub.folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (hub.folder / "model.safetensors").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    expected = ((0.4, 0.5, 0.6), (0.2, 0.2, 0.3), 16, f"hf:a/b sha256:{digest}")
    assert recipe.start == expected
    for file, _, local in hub.calls:  # what was not fetched with the weights is not fetched now
        assert local == file.startswith("model")
    for changed, mean, side in [
        ({"do_center_crop": False}, expected[0], 20),
        ({"do_normalize": False}, (0.0, 0.0, 0.0), 16),
        ({"rescale_factor": 1 / 127.5}, None, 16),
        ({"do_rescale": False}, None, 16),
        ({"image_mean": None}, None, 16),
        ({"do_center_crop": False, "size": 24}, expected[0], 24),
    ]:
        text = json.dumps(PROCESSOR | changed)
        (hub.folder / "preprocessor_config.json").write_text(text)
        start = recipe.start
        assert (start.mean, start.image_size) == (mean, side)
    (hub.folder / "preprocessor_config.json").unlink()
    (hub.folder / "processor_config.json").write_text(json.dumps({"image_processor": PROCESSOR}))
    assert recipe.start == expected
    (hub.folder / "processor_config.json").unlink()
    nobody_knows = r"preprocessor_config.*unless normalize"
    with pytest.raises(FileNotFoundError, match=nobody_knows):
        assert recipe_of("hf:offline").start


def test_weights_in_parts_have_a_digest_each(hub):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (hub.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (hub.folder / "model-1.safetensors").write_bytes(b"1")
    assert recipe_of("hf:a/b").start.digest == "hf:a/b"
    (hub.folder / "model-2.safetensors").write_bytes(b"2")
    assert recipe_of("hf:a/b").start.digest.count(" sha256:") == 2


def test_estimators_need_the_repository_to_fit_only(hub, tmp_path):
    hub.repos["a/b"] = fake_config(num_register_tokens=1)
    (hub.folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    X, y = make_blobs(counts=(4, 3), size=8)
    clf = SoftmaxClassifier(backbone="hf:a/b", max_epochs=1, random_state=0).fit(X, y)
    assert clf.fine_tune_ == "frozen"  # "auto", of a transformer
    assert clf.n_views_ == 4
    assert clf.pixel_mean_.tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert clone(clf).backbone == "hf:a/b"
    proba = clf.predict_proba(X)
    hub.repos.clear()
    hub.calls.clear()
    again = pickle.loads(pickle.dumps(clf))
    for other in (again, pickle.loads(pickle.dumps(again))):
        assert np.array_equal(other.predict_proba(X), proba)
        assert other.backbone.get_params() == {
            "name": "a/b", "weights": "pretrained", "params": vars(fake_config()) | {
                "num_register_tokens": 1}}  # fmt: skip
    assert not hub.calls


def test_a_pickle_keeps_the_network_when_parameters_came_after_the_fit(hub):
    hub.repos["a/b"] = fake_config()
    X, y = make_blobs(counts=(4, 3), size=8)
    clf = SoftmaxClassifier(backbone="hf:a/b", max_epochs=1, random_state=0).fit(X, y)
    weights = clf.weights_
    hub.repos.clear()
    for params in ({"lr": 1.0}, {"backbone": "conv"}):
        again = pickle.loads(pickle.dumps(clf.set_params(**params)))
        assert isinstance(again.backbone, str) == ("backbone" in params)
        assert all(np.array_equal(v, weights[k]) for k, v in again.weights_.items())


@pytest.mark.parametrize(
    "params",
    [None, {}, {"model_type": "detr"}, {"model_type": 3}, {"model_type": "vit", "a": "b/c"},
     {"model_type": "vit", "backbone": {"url": "x"}}, {"model_type": "vit", "weights": "imagenet"}],
    ids=str,
)  # fmt: skip
def test_files_describe_whole_configurations_of_known_networks(params):
    with pytest.raises(ValueError, match="file"):
        TransformersBackbone("a/b", "pretrained", params).check_described()
    TransformersBackbone("a/b", None, {"model_type": "vit", "depth": 3}).check_described()


# --------------------------------------------------------------------------------- timm


def test_timm_fetches_when_asked(monkeypatch):
    calls = []

    def create_model(name, **params):
        calls.append((name, params["pretrained"]))
        if name == "other":
            raise RuntimeError("no connection")
        net = nn.Sequential(nn.Conv2d(params["in_chans"], 4, 3))
        net.forward_features = net.forward
        return net

    config = types.SimpleNamespace(
        mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3), input_size=(3, 96, 96), hf_hub_id="timm/x",
        url="",
    )  # fmt: skip
    fake = types.SimpleNamespace(
        create_model=create_model,
        list_models=lambda: ["cnn", "other"],
        get_pretrained_cfg=lambda _: config,
    )
    monkeypatch.setitem(sys.modules, "timm", fake)
    make_backbone("timm:cnn", (1, 8, 8))
    recipe = TimmBackbone("cnn.in1k", weights="pretrained")
    recipe.build((1, 8, 8))
    assert calls == [("cnn", False), ("cnn.in1k", True)]
    assert recipe.start == ((0.4, 0.5, 0.6), (0.2, 0.2, 0.3), 96, "timm:cnn.in1k timm/x")
    assert TimmBackbone("cnn").start is None
    assert not recipe_of("timm:cnn").has_start
    recipe.check_described()
    with pytest.raises(ValueError, match=r"weights='pretrained', or params: .*no connection"):
        TimmBackbone("other", weights="pretrained").build((1, 8, 8))

    X, y = make_blobs(counts=(4, 3), size=12)
    clf = SoftmaxClassifier(backbone=recipe, max_epochs=1, random_state=0).fit(X, y)
    assert clf.fine_tune_ == "head_first"
    assert clf.pixel_mean_.tolist() == pytest.approx([0.4, 0.5, 0.6])
    calls.clear()
    again = pickle.loads(pickle.dumps(clf))
    monkeypatch.setitem(sys.modules, "timm", None)
    assert np.array_equal(again.predict_proba(X), clf.predict_proba(X))
    assert calls == [("cnn.in1k", False)]


# ------------------------------------------------------------------------- the real library

SMALL_VIT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
SMALL_TEXT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
TOWERS = {"text_config": SMALL_TEXT, "vision_config": SMALL_VIT}
REAL = {
    "ViTModel": ("ViTConfig", SMALL_VIT),
    "ViTForImageClassification": ("ViTConfig", SMALL_VIT),
    "Dinov2Model": ("Dinov2Config", SMALL_VIT),
    "Dinov2WithRegistersModel": (
        "Dinov2WithRegistersConfig",
        SMALL_VIT | {"num_register_tokens": 3},
    ),
    "DINOv3ViTModel": ("DINOv3ViTConfig", SMALL_VIT | {"num_register_tokens": 2}),
    "DeiTModel": ("DeiTConfig", SMALL_VIT),
    "CLIPModel": ("CLIPConfig", TOWERS | {"projection_dim": 8}),
    "SiglipModel": ("SiglipConfig", TOWERS),
    "SwinModel": (
        "SwinConfig",
        {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    ),
    "ConvNextModel": (
        "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2},
    ),
    "ResNetModel": (
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    ),
}


def real(kind, folder):
    """A network of random weights, saved by transformers itself."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    library = importlib.import_module("transformers")
    config, params = REAL[kind]
    if not hasattr(library, kind):
        pytest.skip(f"this transformers has no {kind}")
    torch.manual_seed(0)
    net = getattr(library, kind)(getattr(library, config)(**params)).eval()
    net.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return net


@pytest.mark.parametrize("kind", REAL)
def test_networks_of_transformers(kind, tmp_path):
    net = real(kind, tmp_path)
    trunk = make_backbone(f"hf:{tmp_path}", (3, 32, 32)).eval()
    x = torch.randn(2, 3, 32, 32)
    base = getattr(net, "vision_model", getattr(net, "vit", net))
    options = {} if kind.startswith(("Dino", "DINO", "Conv", "Res")) else {
        "interpolate_pos_encoding": True}  # fmt: skip
    with torch.no_grad():
        out, expected = trunk(x), base(x, **options).last_hidden_state
    if expected.ndim == 4:
        assert out.shape == (2, 16, 4, 4)
        torch.testing.assert_close(out, expected)
    else:
        assert out.shape == (2, 17, 16)
        torch.testing.assert_close(out[:, 1:], expected[:, -16:])
        torch.testing.assert_close(
            out[:, 0], expected[:, 0] if expected.shape[1] > 16 else expected.mean(1)
        )
    stages = [[id(p) for p in stage.parameters()] for stage in stages_of(trunk)]
    assert sorted(one for ids in stages for one in ids) == sorted(map(id, trunk.parameters()))
    assert len(stages) >= 3
    assert min(map(len, stages)) > 0
    start = recipe_of(f"hf:{tmp_path}").start
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert start == ((0.4, 0.5, 0.6), (0.2, 0.2, 0.3), 16, f"hf:{tmp_path} sha256:{digest}")


@pytest.mark.parametrize(
    ("method", "kind", "fine_tune"),
    [(SoftmaxClassifier, "Dinov2Model", "frozen"), (SoftmaxClassifier, "CLIPModel", "head_first"),
     (SoftmaxClassifier, "ConvNextModel", "frozen"), (CSSNClassifier, "DINOv3ViTModel", "frozen")],
)  # fmt: skip
def test_classifiers_on_networks_of_transformers(method, kind, fine_tune, tmp_path):
    folder = tmp_path / "net"
    real(kind, folder)
    X, y = make_blobs(counts=(8, 5), size=32, channels=1)
    clf = method(
        backbone=f"hf:{folder}", fine_tune=fine_tune, max_epochs=1, n_views=1, random_state=0
    ).fit(X, y)
    trained = clf.backbone_.state_dict()
    given = make_backbone(f"hf:{folder}", (1, 32, 32)).state_dict()
    assert all(torch.equal(v, given[k]) for k, v in trained.items()) == (fine_tune == "frozen")
    proba = clf.predict_proba(X)
    save(clf, tmp_path / "model")
    shutil.move(folder, tmp_path / "gone")
    for other in (load(tmp_path / "model"), pickle.loads(pickle.dumps(clf))):
        assert np.array_equal(other.predict_proba(X), proba)
    save(other, tmp_path / "again")
    with pytest.raises(FileNotFoundError, match=f"hf:{folder}"):
        other.fit(X, y)
    shutil.move(tmp_path / "gone", folder)
    np.testing.assert_allclose(other.fit(X, y).predict_proba(X), proba, atol=1e-5)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    net = real("ViTModel", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="safetensors weights"):
        make_backbone(f"hf:{tmp_path}", (3, 32, 32))
    TransformersBackbone(tmp_path, weights=None).build((3, 32, 32))


def test_an_absent_repository_is_named(monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("connected"))
    with pytest.raises(FileNotFoundError, match="hf:nobody/nothing: no configuration"):
        TransformersBackbone("nobody/nothing", weights=None).build((3, 32, 32))
