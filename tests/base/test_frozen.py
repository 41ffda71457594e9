"""Frozen means frozen: what has ``requires_grad=False`` is not moved by any part of a fit."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

from sklearn_medimb import LMDClassifier, SoftmaxClassifier, SSLEncoder
from sklearn_medimb._training.network import Trunk
from sklearn_medimb.backbones import ConvNet, classifier_head
from tests.estimators import WITH_ALL_STAGES
from tests.helpers import make_blobs


def given_module(*, freeze=0, momentum=0.5, seed=0):
    """A network that has seen images, with its first `freeze` blocks frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=momentum)),
            nn.Sequential(nn.ReLU(), nn.Dropout(0.1), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16, momentum=momentum, affine=False)),
            nn.Sequential(nn.ReLU(), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16, momentum=momentum)),
        )
        for _ in range(3):
            module(3 + 2 * torch.randn(16, 3, 12, 12))
    for block in module[:freeze]:
        block.requires_grad_(False)
    return module


def backbone_of(estimator):
    return {k: v.cpu() for k, v in estimator.net_.module_.trunk.backbone.state_dict().items()}


def small(name, module):
    params = {"backbone": module, "max_epochs": 3, "weight_decay": 0.1}
    if name == "SPMixClassifier":
        params["level"] = "image"
    return WITH_ALL_STAGES[name]().set_params(**params)


def assert_kept(estimator, module, n_frozen):
    for name, value in backbone_of(estimator).items():
        if int(name[0]) < n_frozen:
            assert torch.equal(value, module.state_dict()[name]), name
        elif "weight" in name:
            assert not torch.equal(value, module.state_dict()[name]), name
    flags = dict(estimator.net_.module_.trunk.backbone.named_parameters())
    assert all(p.requires_grad == (int(k[0]) >= n_frozen) for k, p in flags.items())


@pytest.mark.parametrize("name", WITH_ALL_STAGES)
def test_a_frozen_part_stays_to_the_bit(name, blobs):
    X, y = blobs
    module = given_module(freeze=3)
    before = copy.deepcopy(module.state_dict())
    clf = small(name, module).fit(X, y)
    assert_kept(clf, module, 3)
    assert_kept(copy.deepcopy(clf), module, 3)
    loaded = pickle.loads(pickle.dumps(clf)).set_params(warm_start=True, max_epochs=1)
    assert_kept(loaded, module, 3)
    assert_kept(
        loaded.partial_fit(X, y) if hasattr(clf, "partial_fit") else loaded.fit(X, y), module, 3
    )
    assert [p.requires_grad for p in clone(clf).backbone.parameters()] == [
        p.requires_grad for p in module.parameters()
    ]
    assert all(torch.equal(value, before[k]) for k, value in module.state_dict().items())


@pytest.mark.parametrize("name", WITH_ALL_STAGES)
def test_a_frozen_backbone_makes_a_linear_probe(name, blobs):
    module = given_module(freeze=4)
    if name.endswith("Encoder"):
        with pytest.raises(ValueError, match="nothing to train"):
            small(name, module).fit(*blobs)
        return
    clf = small(name, module).fit(*blobs)
    assert_kept(clf, module, 4)
    assert "pre-training" not in {row.get("stage") for row in clf.history_}
    assert not hasattr(clf, "stage2_history_") or len(clf.stage2_history_) == 1  # no E-step


def test_a_fitted_start_stays_frozen(blobs):
    module = given_module(freeze=3)
    encoder = SSLEncoder(backbone=module, max_epochs=8, random_state=0).fit(blobs[0])
    clf = LMDClassifier(backbone=encoder, max_epochs=2, n_rounds=2, random_state=0).fit(*blobs)
    assert_kept(clf, module, 3)
    assert_kept(pickle.loads(pickle.dumps(clf)), module, 3)


class Scaled(nn.Module):
    """Divides by a running scale, as layers of one's own may."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x):
        if self.training:
            self.scale.lerp_(x.std(), 0.5)
        return self.weight * x / self.scale


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_of_ones_own_keep_their_statistics(frozen):
    layer = Scaled().requires_grad_(not frozen)
    trunk = Trunk(nn.Sequential(layer, nn.Linear(2, 2), nn.Dropout()), (2,), autocast=None)
    copied = copy.deepcopy(trunk)
    for each in (trunk, copied):
        own, _, dropout = each.train().backbone
        each(torch.randn(8, 2))
        assert (own.scale == 1).item() == frozen
        assert dropout.training
        assert each.training


class TestStatistics:
    def fit(self, module, **params):
        params = {"max_epochs": 4, "batch_size": 16, "random_state": 0} | params
        return SoftmaxClassifier(backbone=module, **params).fit(*make_blobs())

    def test_that_cannot_settle_are_told(self):
        with pytest.warns(UserWarning, match=r"after 16 steps 85% of its running .*max_epochs.*fr"):
            self.fit(given_module(momentum=0.01))

    @pytest.mark.parametrize(
        "params",
        [
            {"momentum": 0.3},
            {"momentum": None},  # averages all steps
            {"momentum": 0.01, "freeze": 4},
        ],
    )
    def test_that_settle_are_not(self, params):
        clf = self.fit(given_module(**params))
        clf.set_params(warm_start=True, max_epochs=1).fit(*make_blobs())

    @pytest.mark.parametrize("lr", [1e-7, 3e-5])
    def test_of_other_images_are_told_even_if_weights_hardly_move(self, lr):
        """Predictions rest on them, however little is learned."""
        with pytest.warns(UserWarning, match=r"'3.2' are 1\.\d standard deviations off"):
            self.fit(given_module(momentum=0.01), lr=lr)

    @pytest.mark.parametrize("lr", [1e-7, 3e-5])
    def test_of_the_same_images_are_not(self, lr):
        module, (X, _) = given_module(momentum=0.3), make_blobs()
        images = torch.tensor(X, dtype=torch.float32).reshape(len(X), *X.shape[1:])
        images = images if images.shape[1] == 3 else images.movedim(-1, 1)
        images = (images - images.mean((0, 2, 3), True)) / images.std((0, 2, 3), keepdim=True)
        for _ in range(20):
            module(images)
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 0.01
        before = copy.deepcopy(module.state_dict())
        clf = self.fit(module, lr=lr)
        after = backbone_of(clf)
        for name in before:  # 16 steps at 0.01, and nothing of the comparison
            if name.endswith("running_mean"):
                np.testing.assert_allclose(after[name], before[name], atol=0.1)
            if name.endswith("tracked"):
                assert after[name] == before[name] + 16

    def test_of_a_new_network_are_not(self):
        self.fit(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=0.01)))

    def test_of_a_recipe_with_weights(self, tmp_path):
        recipe = ConvNet(widths=(8, 16))
        module = recipe.build((3, 12, 12))
        for _ in range(9):
            module(3 + 20 * torch.randn(16, 3, 12, 12))
        torch.save(module.state_dict(), tmp_path / "start.pt")
        recipe.set_params(weights=tmp_path / "start.pt")
        with pytest.warns(
            UserWarning, match="backbone=ConvNet: after 16 steps 19% of its running statistics"
        ):
            self.fit(recipe)


class Whole(nn.Module):
    def __init__(self, name, n_outputs, num_classes=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        setattr(self, name, nn.Linear(8, n_outputs))
        self.name = name
        if num_classes is not None:
            self.num_classes = num_classes

    def forward(self, x):
        return getattr(self, self.name)(self.conv(x).mean((-2, -1)))


@pytest.mark.parametrize(
    ("module", "is_one"),
    [
        (Whole("fc", 1000), True),
        (Whole("head", 7, num_classes=7), True),
        (Whole("classifier", 7), True),
        (Whole("fc", 64), False),  # an embedding
        (Whole("projection", 1000), False),
        (Whole("projection", 7, num_classes=7), True),
        (Whole("last_linear", 7), True),
        (Whole("_fc", 1000), True),
        (Whole("logits", 21841), True),
        (nn.Sequential(nn.Flatten(), nn.Linear(432, 1000)), False),
        (ConvNet().build((3, 12, 12)), False),
    ],
)
def test_a_whole_classifier_is_told(module, is_one, tiny, blobs):
    assert (classifier_head(module) is not None) == is_one
    clf = SoftmaxClassifier(**{**tiny, "backbone": module, "max_epochs": 1})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        clf.fit(*blobs)
    texts = [str(w.message) for w in told]
    assert [("ends in a classifier" in text) for text in texts] == [True] * is_one
    if is_one:
        assert f"backbone.{module.name} = torch.nn.Identity()" in texts[0]
        assert told[0].filename == __file__
        setattr(module, module.name, nn.Identity())
        clf.fit(*blobs)
        assert np.isfinite(clf.transform(blobs[0])).all()


def squeezed(n_outputs=1000, *tail):
    """The end of a SqueezeNet."""
    tail = tail or (nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    module = nn.Sequential()
    module.add_module("features", nn.Conv2d(3, 8, 3))
    module.add_module("classifier", nn.Sequential(nn.Dropout(), nn.Conv2d(8, n_outputs, 1), *tail))
    return module


def ending(**layers):
    module = nn.Sequential()
    module.add_module("features", nn.Flatten())
    for name, layer in layers.items():
        module.add_module(name, layer)
    return module


VGG = (nn.Linear(4, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout())


@pytest.mark.parametrize(
    ("module", "head"),
    [
        (squeezed(), "classifier[1]"),
        (squeezed(64), None),  # a map of features
        (squeezed(1000, nn.Identity()), None),
        (ending(classifier=nn.Sequential(*VGG, nn.Linear(4096, 1000))), "classifier[6]"),
        (ending(classifier=nn.Sequential(*VGG, nn.Identity())), None),
        (ending(classifier=nn.Sequential(*VGG)), None),  # cut off
        (ending(class_layers=nn.Sequential(OrderedDict(out=nn.Linear(4, 7)))), "class_layers.out"),
        (
            ending(classification_head=nn.Sequential(nn.Linear(4, 7), nn.Tanh())),
            "classification_head[0]",
        ),
        (ending(fc=nn.Identity()), None),
        (nn.Sequential(), None),
    ],
)
def test_layers_by_which_libraries_classify(module, head):
    assert classifier_head(module) == head
