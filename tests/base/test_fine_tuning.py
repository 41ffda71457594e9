"""Networks that were trained elsewhere: frozen, head first, in part; their statistics and views."""

from __future__ import annotations

import pickle
import weakref
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from imblearn.over_sampling import RandomOverSampler
from imblearn.under_sampling import RandomUnderSampler
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from skorch.callbacks import Callback, GradientNormClipping
from torch import nn

from sklearn_medimb import AMIMVEncoder, SSLEncoder
from sklearn_medimb._data.cached import CachedImages
from sklearn_medimb._training.callback_state import WATCHERS
from sklearn_medimb._training.network import Trunk
from sklearn_medimb.backbones import ConvNet, Start, stages_of
from sklearn_medimb.base import OneStageClassifier
from sklearn_medimb.inspection import grad_cam
from sklearn_medimb.methods import Contrast
from sklearn_medimb.persistence import load, save
from sklearn_medimb.rebalance import HEADS, LogitAdjustment
from tests.estimators import CLASSIFIERS, SUPERVISED, WITH_ALL_STAGES
from tests.helpers import CrashAfter


class Started(ConvNet):
    """A small network that passes for one with weights of elsewhere."""

    @property
    def start(self):
        return Start(mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3), image_size=16, digest="test")


BACKBONE = Started(widths=(4, 8))
TINY = {"backbone": BACKBONE, "max_epochs": 2, "batch_size": 16, "random_state": 0}
MORE = {"LMDClassifier": {"n_rounds": 2}}


def make(name, **params):
    return SUPERVISED[name](**{**TINY, **MORE.get(name, {}), **params})


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (36, 16, 16, 3), dtype=np.uint8)
    y = np.repeat(["common", "rare"], [24, 12])
    X[y == "rare"] //= 2
    return X, y


class Passes:
    """Counts the images that trunks encode."""

    def __init__(self, monkeypatch):
        self.training = self.inference = 0
        encode = Trunk._encode

        def counted(trunk, images):
            if trunk.training:
                self.training += len(images)
            else:
                self.inference += len(images)
            return encode(trunk, images)

        monkeypatch.setattr(Trunk, "_encode", counted)


def state(clf):
    return {k: v.clone() for k, v in clf.net_.module_.trunk.state_dict().items()}


@pytest.mark.parametrize("name", sorted(SUPERVISED))
def test_frozen_networks_keep_every_bit_and_encode_each_image_once(name, data, monkeypatch):
    X, y = data
    passes = Passes(monkeypatch)
    made = []
    make_net = SUPERVISED[name]._make_net

    def kept(self, *args, **kwargs):
        net = make_net(self, *args, **kwargs)
        made.append({k: v.clone() for k, v in net.module_.trunk.state_dict().items()})
        return net

    monkeypatch.setattr(SUPERVISED[name], "_make_net", kept)
    clf = make(name, fine_tune="frozen", max_epochs=5).fit(X, y)
    for key, value in state(clf).items():
        assert torch.equal(value, made[0][key]), key
    assert all(p.grad is None for p in clf.net_.module_.trunk.parameters())
    assert passes.training == 0
    n_blank = passes.inference - len(X) * clf.n_views_
    assert 0 <= n_blank < 20  # of one blank image each, for shapes
    assert len(clf.history_) >= 5
    assert clf.fine_tune_ == "frozen"
    before = clf.predict_proba(X)
    np.testing.assert_allclose(pickle.loads(pickle.dumps(clf)).predict_proba(X), before, rtol=1e-6)


@pytest.mark.parametrize("sampler", [RandomOverSampler, RandomUnderSampler])
@pytest.mark.parametrize("name", sorted(SUPERVISED))
def test_each_image_is_encoded_once_whatever_is_made_of_it(name, sampler, data, monkeypatch):
    """Rows of a sampler, of heads and of validation, in every epoch."""
    X, y = data
    passes = Passes(monkeypatch)
    params = {"early_stopping": True, "scoring": lambda clf, X, y: clf.score(X, y)}
    clf = make(name, fine_tune="frozen", max_epochs=4, sampler=sampler(), **params).fit(X, y)
    assert len(clf.history_) >= 4
    n_blank = passes.inference - len(X) * clf.n_views_
    if sampler is RandomOverSampler or name in ("LMDClassifier", "MetricTwoStageClassifier"):
        assert 0 <= n_blank < 20
    else:  # what no head asks for stays out
        assert n_blank < 0
    assert "_validation" not in vars(clf)


@pytest.mark.parametrize("name", sorted(SUPERVISED))
def test_encoded_validation_rows_score_as_their_images(name, data):
    X, y = data
    found = []

    def score(clf, X, y):
        copied = X.copy()  # of another array nothing is known
        for method in ("predict_proba", "decision_function"):
            one, other = (getattr(clf, method)(given) for given in (X, copied))
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)
        assert (clf.predict(X) == clf.predict(copied)).all()
        found.append(float(one.sum()))
        return found[-1]

    params = {"early_stopping": True, "scoring": score, "precision": "float64"}
    make(name, fine_tune="frozen", max_epochs=3, **params).fit(X, y)
    assert len(found) >= 3


class Look(Callback):
    """After each epoch its stage, and whether what images were encoded to is still there."""

    what: ClassVar[list] = []
    seen: ClassVar[list] = []

    def on_epoch_end(self, net, **kwargs):
        self.seen.append((net.history[-1].get("stage", ""), any(ref() for ref in self.what)))


WATCHERS.add(Look)


def test_what_the_head_learned_from_is_gone_when_everything_is_trained(data, monkeypatch):
    X, y = data
    encoded = CachedImages._encoded

    def kept(images):
        Look.what.append(weakref.ref(images))
        return encoded(images)

    monkeypatch.setattr(CachedImages, "_encoded", kept)
    make("SoftmaxClassifier", fine_tune="head_first", callbacks=[Look()]).fit(X, y)
    assert all(stage.startswith("head") == held for stage, held in Look.seen)
    stages = list(dict.fromkeys(stage for stage, _ in Look.seen))
    assert stages == ["head", "", "head again"]
    assert {held for _, held in Look.seen} == {True, False}


@pytest.mark.parametrize("name", sorted(SUPERVISED))
def test_a_head_comes_first_and_then_everything_moves(name, data, monkeypatch):
    X, y = data
    passes = Passes(monkeypatch)
    clf = make(name, fine_tune="head_first").fit(X, y)
    assert clf.fine_tune_ == "head_first"
    stages = [str(row.get("stage")) for row in clf.history_]
    again = [k for k, stage in enumerate(stages) if stage == "head again"]
    first = [k for k, stage in enumerate(stages) if stage.startswith("head") and k not in again]
    assert first == list(range(len(first)))
    n_tuned = len(stages) - len(first) - len(again)
    assert len(first) >= 10
    assert n_tuned > 0
    assert again == list(range(len(first) + n_tuned, len(stages)))
    assert bool(again) == issubclass(SUPERVISED[name], OneStageClassifier)
    assert passes.training > 0
    start = clone(clf).set_params(fine_tune="frozen").fit(X, y)
    moved = [
        not torch.equal(a, b)
        for a, b in zip(state(clf).values(), state(start).values(), strict=True)
    ]
    assert any(moved)


class Modes(Callback):
    """After each step its stage, and whether the last layer of the backbone is in training."""

    def __init__(self, found):
        self.found = found

    def on_batch_end(self, net, **kwargs):
        *_, last = net.module_.trunk.backbone.modules()
        self.found.append((net.stage, last.training))


def test_layers_of_a_held_backbone_stay_in_evaluation_mode(data, monkeypatch):
    """Nothing walks through them in each step."""
    walks, train = [], nn.ReLU.train
    monkeypatch.setattr(nn.ReLU, "train", lambda *args: walks.append(args) or train(*args))
    found = []
    clf = make("SoftmaxClassifier", backbone=ConvNet(widths=(4, 8)), fine_tune="head_first")
    clf.set_params(callbacks=[Modes(found)], early_stopping=True).fit(*data)
    assert all(training == (stage != "head") for stage, training in found)
    assert {training for _, training in found} == {True, False}
    for seen in (walks, found):
        seen.clear()
    clf.set_params(fine_tune="frozen", max_epochs=40).fit(*data)
    assert len(found) > 2 * len(walks) > 0
    assert not any(training for _, training in found)


@pytest.mark.parametrize("kind", ["gpaco", "supcon"])
def test_a_copy_of_the_network_that_a_loss_holds_is_given_what_is_encoded(kind, data, monkeypatch):
    passes, name = Passes(monkeypatch), "SPMixClassifier"
    monkeypatch.setattr(SUPERVISED[name], "_n_epochs", lambda *args, **kwargs: 1)
    contrast = Contrast(kind, key_momentum=0.9, projection_dim=4, hidden=8)
    clf = make(name, contrast=contrast, fine_tune="frozen", n_views=2).fit(*data)
    assert passes.training == 0
    assert passes.inference < 3 * len(data[0])  # two views of each, and blank images
    clf.set_params(fine_tune="head_first").fit(*data)
    assert passes.training  # both copies go on with images


def test_rates_of_zero_are_frozen_to_rounding(data):
    X, y = data
    params = {"n_views": 1, "augment": "none", "precision": "float64", "max_epochs": 4}
    frozen = make("SoftmaxClassifier", **params, fine_tune="frozen").fit(X, y)
    still = make("SoftmaxClassifier", **params, fine_tune="full", backbone_lr=0).fit(X, y)
    np.testing.assert_allclose(frozen.predict_proba(X), still.predict_proba(X), atol=1e-9)
    for a, b in zip(state(frozen).values(), state(still).values(), strict=True):
        assert torch.equal(a, b)


def test_only_the_last_stages_are_trained(data):
    X, y = data
    frozen = make("SoftmaxClassifier", fine_tune="frozen").fit(X, y)
    clf = make("SoftmaxClassifier", fine_tune=1, max_epochs=4).fit(X, y)
    stages = stages_of(clf.net_.module_.trunk.backbone)
    then = stages_of(frozen.net_.module_.trunk.backbone)
    weighty = [k for k, stage in enumerate(stages) if any(True for _ in stage.parameters())]
    assert len(weighty) > 1
    for k, (now, before) in enumerate(zip(stages, then, strict=True)):
        pairs = zip(now.parameters(), before.parameters(), strict=True)
        moved = any(not torch.equal(a, b) for a, b in pairs)
        assert moved == (k == len(stages) - 1 and k in weighty)


def test_statistics_of_a_start_are_kept(data):
    X, y = data
    clf = make("SoftmaxClassifier", fine_tune="full", max_epochs=3).fit(X, y)
    norms = [m for m in clf.net_.module_.trunk.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(int(m.num_batches_tracked) == 0 for m in norms)
    plain = make("SoftmaxClassifier", backbone=ConvNet(widths=(4, 8)), max_epochs=3).fit(X, y)
    norms = [m for m in plain.net_.module_.trunk.modules() if isinstance(m, nn.BatchNorm2d)]
    assert plain.fine_tune_ == "full"
    assert all(int(m.num_batches_tracked) > 0 for m in norms)


@pytest.mark.parametrize("name", sorted(SUPERVISED))
def test_predictions_are_means_over_views(name, data):
    X, y = data
    clf = make(name, fine_tune="frozen", precision="float64").fit(X, y)
    assert clf.n_views_ == 4
    views = [X, X[:, :, ::-1], X[:, ::-1], np.rot90(X, 1, (1, 2))]
    several = clf.predict_proba(X)
    embedded = clf.transform(X)
    clf.set_params(n_views=1)
    assert clf.n_views_ == 1
    parts = [clf.predict_proba(np.ascontiguousarray(view)) for view in views]
    np.testing.assert_allclose(several, np.mean(parts, axis=0), atol=1e-9)
    parts = [clf.transform(np.ascontiguousarray(view)) for view in views]
    np.testing.assert_allclose(embedded, np.mean(parts, axis=0), atol=1e-9)
    assert not np.allclose(several, clf.predict_proba(X))


def test_views_of_a_symmetric_image_change_nothing(data):
    X, y = data
    clf = make("SoftmaxClassifier", fine_tune="frozen", precision="float64").fit(X, y)
    part = np.maximum(X, X[:, ::-1])
    part = np.maximum(part, part[:, :, ::-1])
    part = np.maximum(part, part.transpose(0, 2, 1, 3))
    several = clf.predict_proba(part)
    np.testing.assert_allclose(several, clf.set_params(n_views=1).predict_proba(part), atol=1e-9)


def test_views_are_those_that_the_augmentation_says_are_harmless(data):
    X, y = data
    clf = make("SoftmaxClassifier", fine_tune="frozen", n_views=8, augment="light").fit(X, y)
    assert clf.n_views_ == 2  # it flips left and right alone
    clf = make("SoftmaxClassifier", fine_tune="frozen", n_views=8, augment="none").fit(X, y)
    assert clf.n_views_ == 1
    clf = make("SoftmaxClassifier", fine_tune="frozen", n_views=8).fit(X[:, :12], y)
    assert clf.n_views_ == 4  # quarter turns are for squares


@pytest.mark.parametrize("name", sorted(SUPERVISED))
def test_training_resumes_in_either_course(name, data, tmp_path):
    X, y = data
    whole = make(name, fine_tune="head_first", max_epochs=2).fit(X, y)
    n_first = sum(str(row.get("stage")).startswith("head") for row in whole.history_)
    params = {"fine_tune": "head_first", "max_epochs": 2, "checkpoint_dir": tmp_path}
    for n_epochs in (2, n_first + 1):
        with pytest.raises(RuntimeError):
            make(name, **params, callbacks=[CrashAfter(n_epochs)]).fit(X, y)
    again = make(name, **params).fit(X, y)
    np.testing.assert_array_equal(again.predict_proba(X), whole.predict_proba(X))


@pytest.mark.parametrize("name", sorted(SUPERVISED))
def test_files_and_early_stopping(name, data, tmp_path):
    X, y = data
    clf = make(name, fine_tune="frozen", early_stopping=True, max_epochs=3).fit(X, y)
    assert [row for row in clf.history_ if "valid_score" in row]
    save(clf, tmp_path / "model")
    back = load(tmp_path / "model", trusted=[Started])
    np.testing.assert_allclose(back.predict_proba(X), clf.predict_proba(X), rtol=1e-5, atol=1e-7)
    assert back.fine_tune_ == "frozen"


@pytest.mark.parametrize(
    ("normalize", "mean", "std"),
    [
        ("auto", (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)),
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ((0.1, 0.2), (0.1,) * 3, (0.2,) * 3),
        (([0.1, 0.2, 0.3], 0.5), (0.1, 0.2, 0.3), (0.5,) * 3),
    ],
)
def test_channels_are_normalised_as_asked(normalize, mean, std, data):
    X, y = data
    for pixels in (X, X / 255):
        clf = make("SoftmaxClassifier", normalize=normalize, fine_tune="frozen").fit(pixels, y)
        np.testing.assert_allclose(clf.pixel_mean_, mean)
        np.testing.assert_allclose(clf.pixel_std_, std)


def test_gray_images_have_the_mean_of_the_channels(data):
    X, y = data
    clf = make("SoftmaxClassifier", fine_tune="frozen").fit(X[..., 0], y)
    np.testing.assert_allclose(clf.pixel_mean_, [0.4])
    np.testing.assert_allclose(clf.pixel_std_, [0.25])


def test_images_on_another_scale_are_normalised_by_themselves(data):
    X, y = data
    clf = make("SoftmaxClassifier", fine_tune="frozen").fit(X * 10.0 - 500, y)
    np.testing.assert_allclose(clf.pixel_mean_, (X * 10.0 - 500).mean(axis=(0, 1, 2)))
    clf = make("SoftmaxClassifier", fine_tune="frozen", normalize="data").fit(X, y)
    np.testing.assert_allclose(clf.pixel_mean_, X.mean(axis=(0, 1, 2)) / 255)
    with pytest.raises(ValueError, match="normalize="):
        make("SoftmaxClassifier", normalize="imagenet").fit(X * 10.0, y)


@pytest.mark.parametrize(
    "normalize", [(0, 0), (0, -1), (0, 1, 2), ([0, 1], 1), ("a", 1), (np.nan, 1)]
)
def test_statistics_that_cannot_be_are_refused(normalize, data):
    X, y = data
    with pytest.raises(ValueError, match="normalize="):
        make("SoftmaxClassifier", normalize=normalize).fit(X, y)


@pytest.mark.parametrize("fine_tune", [True, False, 0, "head", 1.5])
def test_other_words_are_refused(fine_tune, data):
    with pytest.raises(ValueError, match="fine_tune"):
        make("SoftmaxClassifier", fine_tune=fine_tune).fit(*data)


def test_encoders_have_no_head_to_train(data):
    X, _ = data
    for fine_tune in ("frozen", "head_first"):
        with pytest.raises(ValueError, match="fine_tune"):
            SSLEncoder(backbone=BACKBONE, fine_tune=fine_tune).fit(X)
    encoder = SSLEncoder(backbone=BACKBONE, max_epochs=1, batch_size=16, random_state=0).fit(X)
    assert encoder.fine_tune_ == "full"


class Watched(Callback):
    """Weights after each step."""

    def __init__(self):
        self.weights = []

    def on_batch_end(self, net, **kwargs):
        self.weights.append(net.module_.head.weight.detach().clone())


WATCHERS.add(Watched)


def test_mean_weights_equal_their_formula(data):
    X, y = data
    params = {"fine_tune": "full", "max_epochs": 3, "precision": "float64"}
    watched = Watched()
    clf = make("SoftmaxClassifier", **params, ema=0.5, callbacks=[watched]).fit(X, y)
    steps = clf.net_.callbacks_[-1][1].weights
    mean = steps[0]
    for t, weight in enumerate(steps[1:], 1):
        share = min(1 - 1 / (t + 1), 0.5)
        mean = share * mean + (1 - share) * weight
    assert len(steps) == 9
    torch.testing.assert_close(clf.net_.module_.head.weight.detach(), mean)
    assert not torch.equal(mean, steps[-1])
    plain = make("SoftmaxClassifier", **params, ema=None).fit(X, y)
    torch.testing.assert_close(plain.net_.module_.head.weight.detach(), steps[-1])


def test_mean_weights_are_scored_and_resumed(data, tmp_path):
    X, y = data
    params = {"ema": 0.9, "max_epochs": 4, "early_stopping": True}
    whole = make("SoftmaxClassifier", **params).fit(X, y)
    last = make("SoftmaxClassifier", **{**params, "ema": None}).fit(X, y)
    scores = [row["valid_score"] for row in whole.history_ if "valid_score" in row]
    assert len(scores) == 4
    assert not np.allclose(whole.predict_proba(X), last.predict_proba(X))
    params |= {"checkpoint_dir": tmp_path}
    n_first = len(whole.history_) - 4
    with pytest.raises(RuntimeError):
        make("SoftmaxClassifier", **params, callbacks=[CrashAfter(n_first + 2)]).fit(X, y)
    again = make("SoftmaxClassifier", **params).fit(X, y)
    np.testing.assert_array_equal(again.predict_proba(X), whole.predict_proba(X))


def test_early_layers_learn_more_slowly(data):
    X, y = data
    clf = make("SoftmaxClassifier", fine_tune="full", lr_schedule="constant", layer_decay=0.5)
    clf.set_params(lr=0.01, backbone_lr=0.1).fit(X, y)
    trunk = clf.net_.module_.trunk
    rates = {id(w): g["lr"] for g in clf.net_.optimizer_.param_groups for w in g["params"]}
    stages = stages_of(trunk.backbone)
    for k, stage in enumerate(reversed(stages)):
        for weight in stage.parameters():
            assert rates[id(weight)] == pytest.approx(0.01 * 0.1 * 0.5**k)
    assert rates[id(clf.net_.module_.head.weight)] == 0.01
    assert len(rates) == len(list(clf.net_.module_.parameters()))


def test_rates_are_set_in_one_place(data):
    groups = {"optimizer__param_groups": [("trunk.*", {"lr": 1e-5})]}
    with pytest.raises(ValueError, match="backbone_lr"):
        make("SoftmaxClassifier", net_params=groups).fit(*data)
    make("SoftmaxClassifier", net_params=groups, backbone_lr=1, fine_tune="full").fit(*data)


class Norms(Callback):
    """Notes down the norm of all gradients of each step, and the stage that it is part of."""

    def __init__(self, found):
        self.found = found

    def on_grad_computed(self, net, named_parameters, **kwargs):
        gradients = [p.grad for _, p in named_parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
        self.found.setdefault(net.stage, []).append(float(norm))


class Afterwards(Norms):
    """Of another name: skorch calls callbacks of the same one together."""


@pytest.mark.parametrize("name", sorted(WITH_ALL_STAGES))
def test_gradients_are_clipped_in_every_stage(name, data, monkeypatch):
    before, after = {}, {}
    callbacks = [Norms(before), GradientNormClipping(1e-3), Afterwards(after)]
    clf = WITH_ALL_STAGES[name]().set_params(backbone=BACKBONE, callbacks=callbacks)
    if name in SUPERVISED:
        pretrain = SSLEncoder("byol", max_epochs=1, batch_size=32)
        clf.set_params(pretrain=pretrain, fine_tune="head_first")
    monkeypatch.setattr(type(clf), "_n_epochs", lambda *args, **kwargs: 1)
    clf.fit(*data)
    stages = {row.get("stage", "") for row in clf.history_}
    assert before.keys() == after.keys() == stages
    if name in SUPERVISED:  # without labels, the head, everything
        assert len(stages) >= 3
    for stage, norms in before.items():
        assert max(norms) > 1e-3
        assert max(after[stage]) <= 1.001e-3
        assert len(after[stage]) == len(norms)


def test_further_training_keeps_the_head(data):
    X, y = data
    clf = make("SoftmaxClassifier", warm_start=True).fit(X, y)
    n = len(clf.history_)
    clf.fit(X, y)
    assert [row.get("stage") for row in clf.history_[n:]] == [None] * 2


def test_a_number_of_stages_may_be_one_of_numpy(data):
    X, y = data
    one, other = (make("SoftmaxClassifier", fine_tune=n).fit(X, y) for n in (1, np.int64(1)))
    assert type(other.fine_tune_) is int
    for name, weight in state(one).items():
        assert torch.equal(state(other)[name], weight), name


def test_pre_training_moves_every_stage_whatever_labels_train_afterwards(data, tmp_path):
    X, y = data
    encoder = AMIMVEncoder(max_epochs=2, batch_size=16)
    how = {"backbone": ConvNet(widths=(4, 8, 8)), "pretrain": encoder}
    longer = state(make("SoftmaxClassifier", fine_tune=1, **how, max_epochs=4).fit(X, y))
    untrained = state(make("SoftmaxClassifier", fine_tune=1, **how | {"pretrain": None}).fit(X, y))
    clf = make("SoftmaxClassifier", fine_tune=1, **how).fit(X, y)
    how |= {"fine_tune": 1, "checkpoint_dir": tmp_path}
    for n_epochs in (1, 3):  # in the course without labels, and in that with them
        with pytest.raises(RuntimeError, match="power cut"):
            make("SoftmaxClassifier", **how, callbacks=[CrashAfter(n_epochs)]).fit(X, y)
    resumed = make("SoftmaxClassifier", **how).fit(X, y)
    stages = stages_of(clf.net_.module_.trunk.backbone)
    last = {id(weight) for weight in stages[-1].parameters()}
    names = {n for n, p in clf.net_.module_.trunk.named_parameters() if id(p) not in last}
    assert len(names) > 2
    for name, weight in state(clf).items():
        assert torch.equal(weight, state(resumed)[name]), name
        if name in names:  # as the encoder left them
            assert torch.equal(weight, longer[name]), name
            assert not torch.equal(weight, untrained[name]), name


def test_the_head_of_a_frozen_start_has_its_weight_decay_in_further_fits(data):
    X, y = data
    clf = make("SoftmaxClassifier", fine_tune="frozen", warm_start=True)
    for fit in (clf.fit, clf.fit, clf.partial_fit):
        fit(X, y)
        assert {group["weight_decay"] for group in clf.net_.optimizer_.param_groups} == {2.0}
    clf = pickle.loads(pickle.dumps(clf)).partial_fit(X, y)
    assert {group["weight_decay"] for group in clf.net_.optimizer_.param_groups} == {2.0}


def test_portions_train_a_frozen_network(data):
    X, y = data
    clf = make("SoftmaxClassifier", fine_tune="frozen")
    for _ in range(3):
        clf.partial_fit(X, y, classes=np.unique(y))
    assert len(clf.history_) == 3


def test_what_is_trained_of_a_start_is_chosen_by_start_and_device(data):
    def chosen(backbone, device, n=501, side=224):
        clf = make("SoftmaxClassifier", backbone=backbone)
        clf.n_samples_fit_, clf.image_shape_ = n, (3, side, side)
        fit = SimpleNamespace(device=torch.device(device), partial=False, previous=None)
        return clf._chosen_fine_tuning(fit)

    class Transformer(Started):
        gains_from_tuning = False

    assert (chosen(BACKBONE, "cpu"), chosen(BACKBONE, "cuda")) == ("frozen", "head_first")
    assert (chosen(Transformer(), "cuda"), chosen("conv", "cuda")) == ("frozen", "full")
    assert chosen(BACKBONE, "cpu", n=500) == "head_first"
    assert chosen(BACKBONE, "cpu", n=1500, side=128) == "head_first"
    assert chosen(BACKBONE, "cpu", n=1600, side=128) == "frozen"
    assert make("SoftmaxClassifier", device="cpu").fit(*data).fine_tune_ == "head_first"


def test_frozen_features_are_standardised(data):
    X, y = data
    seen = []

    class Look(Watched):
        def on_train_begin(self, net, **kwargs):
            seen.append(net.module_.head.weight.detach().abs().max().item())

    clf = make("SoftmaxClassifier", fine_tune="frozen", callbacks=[Look()])
    WATCHERS.add(Look)
    features = clf.fit(X, y)._map_views(clf._read(X), clf.net_.module_.features)
    spread, mean = torch.std_mean(features.flatten(0, 1), dim=0, correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-4, rtol=0)
    assert ((spread - 1).abs() < 1e-3).float().mean() > 0.9
    assert seen == [0.0]
    rates = [group["weight_decay"] for group in clf.net_.optimizer_.param_groups]
    assert set(rates) == {2.0}


def test_the_weights_of_a_tuned_start_are_averaged(data):
    seen = []
    params = {"fine_tune": "full", "callbacks": [Watched()], "precision": "float64"}
    for ema in ("auto", 0.98, None):
        clf = make("SoftmaxClassifier", ema=ema, **params).fit(*data)
        seen.append(clf.net_.module_.head.weight.detach())
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_fifteen_epochs_go_through_a_start(data):
    clf = make("SoftmaxClassifier", fine_tune="head_first", max_epochs="auto").fit(*data)
    stages = [row.get("stage") for row in clf.history_]
    assert stages.count(None) == 15
    assert stages.count("head") >= 10
    assert stages.count("head again") == 4 * stages.count("head")


class Ends(Watched):
    """Decay, statistics and scores of the network when an epoch of a stage has begun."""

    seen: ClassVar[list] = []

    def on_epoch_begin(self, net, **kwargs):
        decays = {group["weight_decay"] for group in net.optimizer_.param_groups}
        weights = {k: v.clone() for k, v in net.module_.trunk.state_dict().items()}
        self.seen.append((net.stage, decays, weights))


WATCHERS.add(Ends)


def test_a_head_learns_again_on_what_the_tuned_backbone_makes_of_images(data):
    X, y = data
    Ends.seen.clear()
    clf = make("SoftmaxClassifier", fine_tune="head_first", callbacks=[Ends()]).fit(X, y)
    decays = {stage: decay for stage, decay, _ in Ends.seen}
    assert decays == {"head": {0.01}, "": {0.01}, "head again": {2.0}}
    trunks = [trunk for stage, _, trunk in Ends.seen if stage == "head again"]
    trunks.append(clf.net_.module_.trunk.state_dict())
    assert all(torch.equal(trunks[0][key], trunk[key]) for trunk in trunks for key in trunk)
    features = clf._map_views(clf._read(X), clf.net_.module_.features)
    spread, mean = torch.std_mean(features.flatten(0, 1), dim=0, correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-4, rtol=0)
    assert ((spread - 1).abs() < 1e-3).float().mean() > 0.9


def test_a_head_begins_again_where_it_was(data):
    """Standardised features change nothing yet: an interrupted fit loses nothing by them."""

    class Stop(Callback):
        def on_epoch_begin(self, net, **kwargs):
            if net.stage == "head again":
                raise KeyboardInterrupt

    WATCHERS.add(Stop)
    X, y = data
    params = {"fine_tune": "head_first", "precision": "float64", "ema": None}
    stopped = make("SoftmaxClassifier", **params, callbacks=[Stop()]).fit(X, y)
    assert stopped.history_[-1].get("stage") != "head again"
    assert (stopped.net_.module_.scale.deviation != 1).any()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OneStageClassifier, "_ends_with_head", False)
        before = make("SoftmaxClassifier", **params).fit(X, y)
    assert (before.net_.module_.scale.deviation == 1).all()
    np.testing.assert_allclose(
        stopped.decision_function(X), before.decision_function(X), rtol=1e-9, atol=1e-9
    )


def test_callbacks_that_look_while_the_head_comes_first_change_nothing(data):
    """Both backbones see the images then, though the head is given what was encoded."""
    pytest.importorskip("sklearn.callback", reason="scikit-learn has no callbacks before 1.9.")
    from sklearn.callback import ScoringMonitor

    X, y = data
    plain, watched = (
        make("MetricTwoStageClassifier", fine_tune="head_first", rebalance="auto") for _ in range(2)
    )
    watched.set_callbacks(ScoringMonitor(scoring="accuracy"))
    before, after = (clf.fit(X, y).predict_proba(X) for clf in (plain, watched))
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("name", ["AMIMVClassifier", "CSSNClassifier"])
def test_callbacks_that_look_at_pre_training_change_nothing(name, data):
    """What they see of a network that learns on is not taken for what it becomes."""
    pytest.importorskip("sklearn.callback", reason="scikit-learn has no callbacks before 1.9.")
    from sklearn.callback import ScoringMonitor

    X, y = data
    params = {**TINY, "backbone": ConvNet(widths=(4, 8)), "fine_tune": "frozen"}
    encoder = AMIMVEncoder(max_epochs=3, batch_size=8)
    plain, watched = (CLASSIFIERS[name](**params, pretrain=encoder) for _ in range(2))
    watched.set_callbacks(ScoringMonitor(scoring="accuracy"))
    before, after = (clf.fit(X, y).predict_proba(X) for clf in (plain, watched))
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("fine_tune", ["frozen", "head_first", "full", 1])
def test_the_head_on_a_start_is_another_one(data, fine_tune):
    clf = make("MetricTwoStageClassifier", fine_tune=fine_tune, rebalance="auto").fit(*data)
    assert type(clf.head_).__name__ == "BalancedSoftmax"


def test_the_head_from_scratch_is_fitted_to_gaussians(data):
    params = {**TINY, "backbone": ConvNet(widths=(4, 8)), "fine_tune": "full"}
    clf = CLASSIFIERS["MetricTwoStageClassifier"](**params, rebalance="auto").fit(*data)
    assert type(clf.head_).__name__ == "VirtualFeatureCalibration"


# ---------------------------------------------------------------- the start beside what it became


@pytest.fixture(scope="module")
def beside(data):
    params = {"fine_tune": "head_first", "rebalance": "auto", "precision": "float32"}
    return make("MetricTwoStageClassifier", **params).fit(*data)


# These read what the head of stage one has read.
ADJUSTING = ["lws", "tau_norm", "logit_adjust", "none", LogitAdjustment(tau=0.5)]


def halves(clf, X):
    return np.split(clf.transform(X), 2, axis=1)


def test_stage_two_reads_the_start_beside_what_was_learned(data, beside):
    """As it was before the first step, to the bit; and either half says something."""
    X, y = data
    assert beside.keeps_start_
    held = make("MetricTwoStageClassifier", fine_tune="frozen", precision="float32").fit(X, y)
    begun, module = held.net_.module_, beside.net_.module_
    for key, value in begun.trunk.state_dict().items():
        assert torch.equal(module.start.state_dict()[key], value), key
    learned, kept = halves(beside, X)
    plain = held.transform(X) * begun.scale.deviation.numpy() + begun.scale.mean.numpy()
    np.testing.assert_allclose(kept, plain, rtol=1e-4, atol=1e-6)
    assert (np.abs(learned - kept).max(axis=0) > 1e-3).any()
    assert not any(weight.requires_grad for weight in module.start.parameters())
    assert beside.head_.coef_.shape == (2, 2 * kept.shape[1])
    for half in (slice(None, kept.shape[1]), slice(kept.shape[1], None)):
        changed = pickle.loads(pickle.dumps(beside))
        changed.head_.coef_[:, half] = 0
        assert np.abs(changed.decision_function(X) - beside.decision_function(X)).max() > 1e-3


@pytest.mark.parametrize(
    "params",
    [
        {"fine_tune": "full"},
        {"fine_tune": "frozen"},
        {"fine_tune": 1},
        {"fine_tune": "head_first", "keep_start": False},
        {"fine_tune": "head_first", "backbone_lr": 0.0},
        {"fine_tune": "head_first", "backbone": ConvNet(widths=(4, 8))},
        {"fine_tune": "head_first", "pretrain": AMIMVEncoder(max_epochs=1, batch_size=8)},
        *({"fine_tune": "head_first", "rebalance": head} for head in ADJUSTING),
    ],
    ids=str,
)
def test_only_a_start_whose_head_came_first_stays_beside(params, data):
    clf = make("MetricTwoStageClassifier", **params).fit(*data)
    assert not clf.keeps_start_
    assert not hasattr(clf.net_.module_, "start")
    assert clf.transform(data[0]).shape[1] == clf.net_.module_.head.in_features


@pytest.mark.parametrize("head", [*HEADS, LogisticRegression()], ids=str)
def test_a_start_that_stays_is_read(head, data):
    """Or it does not stay. Without cross-entropy in stage one there is no head to adjust."""
    for ce_weight in (1.0, 0.0):
        params = {"fine_tune": "head_first", "rebalance": head, "ce_weight": ce_weight}
        clf = make("MetricTwoStageClassifier", **params).fit(*data)
        assert clf.keeps_start_ == (ce_weight == 0 or head not in ADJUSTING)
        beyond = clf.head_.coef_[:, clf.net_.module_.head.in_features :]
        assert beyond.any() == clf.keeps_start_


def test_weights_that_pretraining_changes_before_the_head_do_not_stay(data):
    X, y = data
    encoder = AMIMVEncoder(backbone=BACKBONE, max_epochs=1, batch_size=8, random_state=0).fit(X)
    for pretrain, keeps in ((None, True), (AMIMVEncoder(max_epochs=1, batch_size=8), False)):
        params = {"fine_tune": "head_first", "backbone": encoder, "pretrain": pretrain}
        clf = make("MetricTwoStageClassifier", **params).fit(X, y)
        assert clf.keeps_start_ == keeps


def test_maps_of_what_speaks_for_a_class_are_of_both(data, beside):
    """The same where either network takes the place of the other."""
    X, _ = data
    changed = pickle.loads(pickle.dumps(beside))
    weights = beside.weights_
    for name in [name for name in weights if name.startswith("trunk.")]:
        other = name.replace("trunk.", "start.", 1)
        weights[name], weights[other] = weights[other], weights[name]
    weights["head_coef_"] = np.roll(weights["head_coef_"], len(weights["head_coef_"].T) // 2, 1)
    changed.weights_ = weights
    np.testing.assert_allclose(changed.predict_proba(X), beside.predict_proba(X), rtol=1e-4)
    maps = grad_cam(beside, X, target="rare")
    assert maps.any()
    np.testing.assert_allclose(grad_cam(changed, X, target="rare"), maps, rtol=1e-3, atol=1e-5)


def test_a_start_that_stays_is_copied_written_and_left_alone(data, beside, tmp_path):
    X, _ = data
    expected = beside.predict_proba(X)
    save(beside, tmp_path / "model")
    back = load(tmp_path / "model", trusted=[Started])
    np.testing.assert_allclose(back.predict_proba(X), expected, rtol=1e-5, atol=1e-7)
    copied = pickle.loads(pickle.dumps(beside))
    np.testing.assert_array_equal(copied.predict_proba(X), expected)
    before = {k: v.clone() for k, v in copied.net_.module_.start.state_dict().items()}
    tuned = copied.net_.module_.trunk.backbone.state_dict()
    first = next(name for name in tuned if name.endswith("weight"))
    was = tuned[first].clone()
    for how, chosen in (("auto", "full"), ("frozen", 0)):
        copied.set_params(fine_tune=how, warm_start=True).fit(*data)
        assert (copied.fine_tune_, copied.keeps_start_) == (chosen, True)
        for key, value in copied.net_.module_.start.state_dict().items():
            assert torch.equal(value, before[key]), key
        moved = not torch.equal(copied.net_.module_.trunk.backbone.state_dict()[first], was)
        assert moved == (how == "auto")
        was = copied.net_.module_.trunk.backbone.state_dict()[first].clone()
    copied.set_params(fine_tune="full", warm_start=False).fit(*data)
    assert not copied.keeps_start_


def test_what_was_fitted_before_there_was_a_choice_goes_on(data):
    params = {"fine_tune": "full", "rebalance": "auto", "warm_start": True}
    clf = make("MetricTwoStageClassifier", **params).fit(*data)
    del clf.keeps_start_
    clf = pickle.loads(pickle.dumps(clf)).set_params(fine_tune="frozen").fit(*data)
    assert clf.fine_tune_ == "frozen"
    assert not hasattr(clf.net_.module_, "start")


def test_heads_that_begin_with_that_of_stage_one_know_the_learned_half(data, beside):
    clf = pickle.loads(pickle.dumps(beside))
    n = clf.net_.module_.head.in_features
    clf.refit_head(*data, rebalance="tau_norm")
    assert clf.head_.coef_[:, :n].any()
    assert not clf.head_.coef_[:, n:].any()
    clf.refit_head(*data, rebalance="crt")
    assert clf.head_.coef_[:, n:].any()


def test_exported_graphs_read_both(data, beside, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    from sklearn_medimb.onnx import export_onnx

    export_onnx(beside, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    images = data[0].transpose(0, 3, 1, 2).astype(np.float32)
    found = session.run(None, {"images": images})[0]
    np.testing.assert_allclose(found, beside.predict_proba(data[0]), atol=1e-5)
