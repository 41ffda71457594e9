"""What a backbone that stays as it is made of images, kept by `memory=` for other fits."""

from __future__ import annotations

import pickle
from typing import ClassVar

import joblib
import numpy as np
import pytest
import torch
from imblearn.over_sampling import RandomOverSampler
from imblearn.under_sampling import RandomUnderSampler
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from torch import nn

from sklearn_medimb import (
    AMIMVEncoder,
    CSSNClassifier,
    LMDClassifier,
    MetricTwoStageClassifier,
    PretrainedFeatures,
    SoftmaxClassifier,
    SPMixClassifier,
    SPMixSampler,
)
from sklearn_medimb._training.network import Trunk
from sklearn_medimb.backbones import ConvNet, Start, as_features
from sklearn_medimb.base import OneStageClassifier, SoftmaxNetwork
from sklearn_medimb.persistence import load, save
from sklearn_medimb.utils.estimator_checks import LazyImages
from tests.estimators import CLASSIFIERS, ENCODERS
from tests.helpers import CrashAfter

RNG = np.random.default_rng(0)
X = RNG.integers(1, 256, (24, 8, 8, 3), dtype=np.uint8)
Y = np.repeat(["common", "rare"], [16, 8])


class Started(ConvNet):
    """A small network that passes for one with weights of elsewhere."""

    @property
    def start(self):
        return Start(mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3), image_size=8, digest="test")


STARTED = Started(widths=(4, 8))
MODULE = ConvNet(widths=(4, 8)).build((3, 8, 8))  # its weights do not hang on random_state
MORE = {
    "AMIMVClassifier": {"pretrain": AMIMVEncoder(max_epochs=1, batch_size=12)},
    "LMDClassifier": {"n_rounds": 2},
}


def make(cls=SoftmaxClassifier, **params):
    params = {"backbone": MODULE, "max_epochs": 1, "batch_size": 12, "n_views": 2} | params
    return cls(**{"fine_tune": "frozen", "random_state": 0, **params})


@pytest.fixture
def encoded(monkeypatch):
    """Counts of images that backbones encode in evaluation mode, blank ones aside."""
    found, encode = [], Trunk._encode

    def spy(trunk, images):
        if not trunk.training and images.any():
            found.append(len(images))
        return encode(trunk, images)

    monkeypatch.setattr(Trunk, "_encode", spy)
    return found


def entries(folder):
    return list(folder.rglob("output.pkl"))


def fitted_twice(clf, folder, encoded, X=X, y=Y):
    """A fit without memory, one that fills it and one that finds all there; with their counts."""
    found = []
    for memory in (None, str(folder), str(folder)):
        encoded.clear()
        found.append(clone(clf).set_params(memory=memory).fit(X, y))
        found[-1].n_encoded = sum(encoded)
    return found


def assert_same(one, other, X=X):
    for name, value in one.weights_.items():
        assert np.array_equal(value, other.weights_[name]), name
    assert np.array_equal(one.predict_proba(X), other.predict_proba(X))
    assert [row["train_loss"] for row in one.history_] == [
        row["train_loss"] for row in other.history_
    ]


# ---------------------------------------------------------------- it is the same, and done once


@pytest.mark.parametrize("fine_tune", ["frozen", "head_first"])
@pytest.mark.parametrize("name", sorted(CLASSIFIERS))
def test_training_images_are_encoded_once_for_all_fits(
    name, fine_tune, encoded, tmp_path, monkeypatch
):
    monkeypatch.setattr(CLASSIFIERS[name], "_n_epochs", lambda *args, **kwargs: 1)
    clf = make(CLASSIFIERS[name], backbone=STARTED, fine_tune=fine_tune, **MORE.get(name, {}))
    plain, first, second = fitted_twice(clf, tmp_path, encoded)
    assert_same(plain, first)
    assert_same(plain, second)
    assert entries(tmp_path)
    assert first.n_encoded == plain.n_encoded
    assert second.n_encoded == plain.n_encoded - 2 * len(X)  # two views of each
    if fine_tune == "frozen" and name != "AMIMVClassifier":  # its encoder looks at images, too
        assert second.n_encoded == 0


@pytest.mark.parametrize("sampler", [RandomOverSampler(), RandomUnderSampler(), SPMixSampler()])
@pytest.mark.parametrize("cls", [SoftmaxClassifier, LMDClassifier])
def test_rows_of_samplers_and_of_validation(cls, sampler, encoded, tmp_path):
    clf = make(cls, sampler=sampler, early_stopping=True)
    plain, first, second = fitted_twice(clf, tmp_path, encoded)
    assert first.n_encoded > second.n_encoded == 0
    assert_same(plain, first)
    assert_same(plain, second)


def test_a_search_encodes_each_fold_once(encoded, tmp_path):
    grid = {"lr": [1e-3, 1e-2], "loss": ["cross_entropy", "focal"]}
    how = {"cv": 2, "error_score": "raise"}
    search = GridSearchCV(make(memory=str(tmp_path)), grid, **how).fit(X, Y)
    # Training images of both folds, all of them for the refit; test images of each candidate.
    assert sum(encoded) == 2 * (len(X) + len(X)) + 2 * 4 * len(X)
    plain = GridSearchCV(make(), grid, **how).fit(X, Y)
    for name in ("mean_test_score", "split0_test_score"):
        assert np.array_equal(search.cv_results_[name], plain.cv_results_[name])
    assert np.array_equal(search.predict_proba(X), plain.predict_proba(X))


def test_processes_share_it(tmp_path):
    grid = {"lr": [1e-3, 3e-3, 1e-2]}
    how = {"cv": 2, "error_score": "raise", "refit": False}
    search = GridSearchCV(make(memory=str(tmp_path)), grid, **how, n_jobs=2).fit(X, Y)
    assert len(entries(tmp_path)) == 2  # one for each fold, whoever wrote it
    plain = GridSearchCV(make(), grid, **how).fit(X, Y)
    name = "mean_test_score"
    np.testing.assert_allclose(search.cv_results_[name], plain.cv_results_[name])


def test_images_in_any_container_are_the_same_images(encoded, tmp_path):
    clf = make(memory=str(tmp_path), normalize=(0.5, 0.2)).fit(X, Y)
    lazy = LazyImages(X)
    first = make(normalize=(0.5, 0.2)).fit(lazy, Y)
    n_reads = lazy.n_reads
    for given in (X, np.ascontiguousarray(X.transpose(0, 3, 1, 2)), list(X), lazy):
        encoded.clear()
        again = clone(clf).fit(given, Y)
        assert not encoded
        assert_same(again, clf)
    assert lazy.n_reads == 2 * n_reads  # to look for them, none is read once more
    assert_same(first, clf)


def test_images_of_several_sizes(encoded, tmp_path):
    images = [RNG.integers(0, 256, (s, s + 1, 3), dtype=np.uint8) for s in (9, 12) * 12]
    plain, _, second = fitted_twice(make(image_size=8), tmp_path, encoded, images)
    assert second.n_encoded == 0
    assert_same(plain, second, images)


def test_vectors(encoded, tmp_path):
    vectors = X.reshape(len(X), -1) / 255
    clf = make(backbone=nn.Sequential(nn.Linear(192, 4), nn.ReLU()))
    plain, _, second = fitted_twice(clf, tmp_path, encoded, vectors)
    assert second.n_encoded == 0
    assert_same(plain, second, vectors)


# ---------------------------------------------------------------- what it is known by


@pytest.mark.parametrize(
    "other",
    [
        make(loss="focal", lr=0.1, weight_decay=0.3, batch_size=8, max_epochs=2, random_state=7),
        make(fine_tune="head_first", checkpoint_dir="unused", class_weight="balanced"),
        make(post_hoc_tau=1.0, warm_start=True, verbose=0, n_iter_no_change=2),
        make(LMDClassifier, n_rounds=2),
        make(MetricTwoStageClassifier),
    ],
    ids=lambda clf: f"{type(clf).__name__}-{clf.fine_tune}-{clf.lr}",
)
def test_what_follows_the_backbone_does_not_matter(other, encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(type(other), "_n_epochs", lambda *args, **kwargs: 1)
    monkeypatch.chdir(tmp_path)
    make(memory="kept").fit(X, Y)
    encoded.clear()
    clone(other).set_params(memory="kept").fit(X, Y[::-1])
    assert not encoded
    assert len(entries(tmp_path)) == 1


@pytest.mark.parametrize(
    ("cls", "params"),
    [(CSSNClassifier, {"lam": 0.5, "soft_ratio": 0.5}), (SPMixClassifier, {"cap": 0.4})],
)
def test_what_other_methods_ask_for_is_their_own(cls, params, encoded, tmp_path):
    memory = {"memory": str(tmp_path)}
    make(**memory).fit(X, Y)
    encoded.clear()
    make(cls, **memory).fit(X, Y)
    assert sum(encoded) == 2 * len(X)
    make(cls, **memory, **params).fit(X, Y)
    assert sum(encoded) == 2 * len(X)


def changed(change):
    module = pickle.loads(pickle.dumps(MODULE))
    with torch.no_grad():
        change(module)
    return {"backbone": module}


def one_pixel(X):
    X = X.copy()
    X[3, 0, 0, 0] -= 1
    return X


def softer(module):
    """Another activation: no weight tells."""
    module[0][2] = nn.Softplus()


@pytest.mark.parametrize(
    ("params", "images"),
    [
        ({}, one_pixel(X)),
        ({}, X[:, ::-1]),
        ({}, X / 255),
        ({}, X[np.r_[1, 0, 2:24]]),
        (changed(lambda m: m[0][0].weight[0, 0, 0, 0].add_(1)), X),
        (changed(lambda m: m[0][1].running_mean[0].add_(1)), X),
        (changed(softer), X),
        ({"image_size": 9}, X),
        ({"n_views": 4}, X),
        ({"augment": "none"}, X),
        ({"normalize": (0.4, 0.3)}, X),
        ({"precision": "float64"}, X),
    ],
    ids=["pixel", "flipped", "floats", "order", "weight", "buffer", "activation", "size", "views",
         "augment", "normalize", "precision"],
)  # fmt: skip
def test_what_differs_is_encoded_anew(params, images, encoded, tmp_path):
    make(memory=str(tmp_path)).fit(X, Y)
    plain, first, second = fitted_twice(make(**params), tmp_path, encoded, images)
    assert first.n_encoded == plain.n_encoded > second.n_encoded == 0
    assert_same(plain, first, images)
    assert_same(plain, second, images)


def test_tokens_as_many_as_are_asked_for(encoded, tmp_path):
    for n_tokens in (4, 16):
        plain, first, _ = fitted_twice(make(CSSNClassifier, n_tokens=n_tokens), tmp_path, encoded)
        assert first.n_encoded == plain.n_encoded > 0
        assert_same(plain, first)


def test_pairs_of_images(encoded, tmp_path):
    pairs = np.stack([X, X[::-1]], axis=1)
    clf = make(CSSNClassifier, reference="paired")
    plain, first, second = fitted_twice(clf, tmp_path, encoded, pairs)
    assert first.n_encoded == plain.n_encoded == 2 * 2 * len(X)
    assert second.n_encoded == 0
    assert_same(plain, second, pairs)


def test_features_of_several_depths_are_others(encoded, tmp_path):
    for at_all_depths in (False, True):
        params = {"at_all_depths": at_all_depths, "n_views": 2, "memory": str(tmp_path)}
        features = PretrainedFeatures(MODULE, **params).fit(X)
        n = 8 if at_all_depths is False else 16
        assert features.transform(X).shape == (len(X), n)
    make(memory=str(tmp_path)).fit(X, Y)
    assert sum(encoded) == 2 * 2 * len(X)


def test_products_of_another_precision_round_otherwise(encoded, tmp_path):
    clf, before = make(memory=str(tmp_path)).fit(X, Y), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        encoded.clear()
        clf.fit(X, Y)
        assert sum(encoded) == 2 * len(X)
    finally:
        torch.set_float32_matmul_precision(before)


def test_another_number_of_threads_rounds_otherwise(encoded, tmp_path):
    n = torch.get_num_threads()
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            encoded.clear()
            make(memory=str(tmp_path)).fit(X, Y)
            assert sum(encoded) == 2 * len(X)
    finally:
        torch.set_num_threads(n)


class Scaled(SoftmaxNetwork):
    """Asks the trunk for something that a number of its own decides on."""

    factor: float

    def encoded(self, images):
        return as_features(self.trunk(images)) * self.factor

    def features(self, images):
        return self.trunk(images) if self.trunk.given_encoded else self.encoded(images)


class ScaledClassifier(OneStageClassifier):
    """A method of one's own."""

    factor: ClassVar[float] = 1.0

    def _make_network(self, trunk):
        network = Scaled(trunk(), self._make_head)
        network.factor = self.factor
        return network


def test_of_networks_of_ones_own_everything_counts(encoded, tmp_path, monkeypatch):
    found = []
    for factor in (1.0, 2.0):
        monkeypatch.setattr(ScaledClassifier, "factor", factor)
        plain, first, second = fitted_twice(make(ScaledClassifier), tmp_path, encoded)
        assert first.n_encoded == plain.n_encoded > second.n_encoded == 0
        assert_same(plain, first)
        assert_same(plain, second)
        found.append(plain.predict_proba(X))
    assert not np.array_equal(*found)


# ---------------------------------------------------------------- a part of nothing else


def test_predictions_keep_nothing(encoded, tmp_path):
    clf = make(memory=str(tmp_path)).fit(X, Y)
    n_entries = len(entries(tmp_path))
    encoded.clear()
    clf.predict_proba(X)
    assert sum(encoded) == 2 * len(X)
    assert len(entries(tmp_path)) == n_entries


def test_a_damaged_entry_is_made_anew(encoded, tmp_path):
    plain = make(memory=str(tmp_path)).fit(X, Y)
    (entry,) = entries(tmp_path)
    entry.write_bytes(entry.read_bytes()[:100])
    encoded.clear()
    again = make(memory=str(tmp_path)).fit(X, Y)
    assert sum(encoded) == 2 * len(X)
    assert_same(again, plain)


def test_checkpoints_do_not_depend_on_it(tmp_path):
    kept, checkpoints = str(tmp_path / "kept"), tmp_path / "checkpoints"
    params = {"checkpoint_dir": checkpoints, "max_epochs": 3}
    for memory in (None, kept, joblib.Memory(kept, verbose=0)):
        with pytest.raises(RuntimeError):
            make(**params, memory=memory, callbacks=[CrashAfter(1)]).fit(X, Y)
        assert len(list(checkpoints.iterdir())) == 1
    assert_same(make(**params, memory=kept).fit(X, Y), make(max_epochs=3).fit(X, Y))


def test_further_training_may_have_another(tmp_path):
    plain, clf = (make(warm_start=True, memory=m) for m in (None, str(tmp_path / "a")))
    plain.fit(X, Y).fit(X, Y)
    clf.fit(X, Y).set_params(memory=joblib.Memory(tmp_path / "b", verbose=0)).fit(X, Y)
    assert_same(clf, plain)
    assert all(entries(tmp_path / name) for name in "ab")


def test_a_path_is_a_folder_too(encoded, tmp_path):
    make(memory=tmp_path).fit(X, Y)
    encoded.clear()
    again = make(memory=str(tmp_path)).fit(X, Y)
    assert not encoded
    features = PretrainedFeatures(MODULE, memory=tmp_path, n_views=2, at_all_depths=False)
    features.fit(X).transform(X)
    assert not encoded
    assert clone(again.set_params(memory=tmp_path)).memory == tmp_path


def test_copies_and_files_know_the_folder_alone(tmp_path):
    pytest.importorskip("safetensors")
    kept = str(tmp_path / "kept")
    clf = make(backbone=STARTED, memory=kept)
    clf.fit(X, Y)
    save(clf, tmp_path / "model")
    for copied in (
        pickle.loads(pickle.dumps(clf)),
        load(tmp_path / "model", trusted=[Started]),
        clone(clf).fit(X, Y),
    ):
        assert copied.memory == kept
        np.testing.assert_allclose(copied.predict_proba(X), clf.predict_proba(X), rtol=1e-5)
    size = len(pickle.dumps(clf))
    assert abs(size - len(pickle.dumps(clf.set_params(memory=None)))) < 2 * len(kept)


@pytest.mark.parametrize("name", sorted(ENCODERS.keys() - {"PretrainedFeatures"}))
def test_encoders_hold_no_backbone(name):
    assert "memory" not in ENCODERS[name]().get_params()
