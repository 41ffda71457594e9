"""A module of another package, without its head and with its own normalisation, as the guide has
it for torchxrayvision; a stand-in with the form of its networks, which reads -1024 to 1024."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_medimb import PretrainedFeatures, SoftmaxClassifier


class ChestNet(nn.Module):
    """One channel from -1024 to 1024 to scores of 18 diseases."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(8, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
        )
        self.classifier = nn.Linear(16, 18)

    def features2(self, x):
        return self.features(x).relu().mean((2, 3))

    def forward(self, x):
        return self.classifier(self.features2(x))


def scaled(images):
    """What the network was trained on: uint8 (n, H, W) to (n, 1, H, W)."""
    return torch.tensor((2 * (images[:, None] / 255) - 1) * 1024, dtype=torch.float32)


@pytest.fixture
def films():
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (24, 32, 32), dtype=np.uint8)
    y = np.repeat([0, 1], [16, 8])
    X[y == 1, :, :16] //= 4  # of one side alone
    return X, y


@pytest.fixture
def net(films):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ChestNet()
        for _ in range(50):
            net(scaled(films[0]))
    return net.eval()


PARAMS = {"normalize": (0.5, 1 / 2048), "augment": "chest", "precision": "float32"}


def test_it_reads_pixels_on_its_own_scale(films, net):
    X, _ = films
    X[0, 0, :2] = 0, 255
    seen = []
    net.features[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].aminmax()))
    backbone = nn.Sequential(net.features, nn.ReLU())
    features = PretrainedFeatures(backbone, n_views=8, at_all_depths=False, **PARAMS).fit(X)
    found = features.transform(X)
    low, high = (torch.stack(values) for values in zip(*seen, strict=True))
    assert (float(low.min()), float(high.max())) == (-1024, 1024)
    with torch.no_grad():
        expected = net.features2(scaled(X))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert features.n_views_ == 1  # a mirror image is another film


def test_classifiers_train_on_it(films, net):
    X, y = films
    backbone = nn.Sequential(net.features, nn.ReLU())
    params = {**PARAMS, "max_epochs": 20, "batch_size": 8, "random_state": 0, "lr": 0.05}
    for fine_tune in ("frozen", "head_first"):
        clf = SoftmaxClassifier(backbone, fine_tune=fine_tune, backbone_lr=0.1, **params)
        assert clf.fit(X, y).score(X, y) == 1
    with pytest.warns(UserWarning, match="ends in a classifier, classifier.*take it off"):
        SoftmaxClassifier(net, fine_tune="frozen", **{**params, "max_epochs": 1}).fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SoftmaxClassifier(backbone, fine_tune="frozen", **{**params, "max_epochs": 1}).fit(X, y)
