"""``image_size=`` of every public estimator with a network: as if X had been resized before."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from imblearn.over_sampling import SMOTE, RandomOverSampler
from sklearn.base import clone
from sklearn.model_selection import cross_val_score

from sklearn_medimb import CSSNClassifier, SoftmaxClassifier, SPMixSampler, SSLEncoder
from sklearn_medimb._data.resize import resample
from sklearn_medimb.datasets import DatasetImages, MappedImages, Resize
from sklearn_medimb.tuning import search_space
from sklearn_medimb.utils.estimator_checks import LazyImages
from tests.estimators import IMAGE_ESTIMATORS, TINY
from tests.helpers import CrashAfter, Items

pytestmark = [
    pytest.mark.filterwarnings("ignore:The features have all but collapsed"),
    pytest.mark.filterwarnings("ignore:Classes .* have one training image"),
]
Y = np.array([0] * 12 + [1] * 7 + [2] * 5)


def several_sizes(shape=(3, 10, 12), dtype=np.uint8):
    """Images whose brightness is their class, no two axes of which are alike."""
    rng = np.random.default_rng(0)
    sides = rng.integers(8, 26, (len(Y), len(shape) - 1))
    images = [
        (rng.integers(0, 120, (shape[0], *side)) + 60 * label).astype(np.uint8)
        for side, label in zip(sides, Y, strict=True)
    ]
    return images if dtype == np.uint8 else [(image / 255).astype(dtype) for image in images]


def resized(images, size, aspect="stretch"):
    parts = [resample(torch.from_numpy(image)[None], size, aspect) for image in images]
    return torch.cat(parts).numpy()


def tiny(name, **params):
    return IMAGE_ESTIMATORS[name](**{**TINY[name], "random_state": 0, **params})


def answers(estimator, X):
    if hasattr(estimator, "predict_proba"):
        return np.hstack([estimator.predict_proba(X), estimator.transform(X)])
    return estimator.transform(X)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("name", IMAGE_ESTIMATORS)
def test_several_sizes_are_what_they_are_resized(name, dtype):
    images = several_sizes(dtype=dtype)
    before = resized(images, (10, 12))
    expected = answers(tiny(name).fit(before, Y), before)
    fitted = tiny(name, image_size=(10, 12)).fit(images, Y)
    assert fitted.image_shape_ == (3, 10, 12)
    assert fitted.input_shape_ == images[0].shape
    assert np.array_equal(answers(fitted, images), expected)
    assert np.array_equal(answers(fitted, before), expected)
    data_set = Items(images)
    lazy = tiny(name, image_size=(10, 12)).fit(data_set, Y)
    assert np.array_equal(answers(lazy, data_set), expected)
    assert np.array_equal(answers(lazy, images[:5]), answers(fitted, images)[:5])


@pytest.mark.parametrize("aspect", ["pad", "crop"])
def test_aspect(aspect):
    images = several_sizes()
    before = resized(images, (12, 12), aspect)
    fitted = tiny("SoftmaxClassifier", image_size=Resize(12, aspect)).fit(images, Y)
    plain = tiny("SoftmaxClassifier").fit(before, Y)
    assert np.array_equal(answers(fitted, images), answers(plain, before))
    stretched = resized(images, (12, 12))
    assert not np.array_equal(before, stretched)


def test_volumes():
    volumes = [volume[0] for volume in several_sizes((1, 6, 8, 10))]
    before = resized([volume[None] for volume in volumes], (6, 8, 10))
    fitted = tiny("CSSNClassifier", image_size=(6, 8, 10), spatial_dims=3).fit(volumes, Y)
    plain = tiny("CSSNClassifier").fit(before, Y)
    assert np.array_equal(answers(fitted, volumes), answers(plain, before))


def test_pairs():
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(0, 120, (2, 3, *side)) + 60 * y).astype(np.uint8)
        for side, y in zip(rng.integers(8, 20, (len(Y), 2)), Y, strict=True)
    ]
    folded = [pair.reshape(6, *pair.shape[2:]) for pair in pairs]
    before = resized(folded, (10, 12)).reshape(len(Y), 2, 3, 10, 12)
    fitted = tiny("CSSNClassifier", image_size=(10, 12), reference="paired").fit(pairs, Y)
    plain = tiny("CSSNClassifier", reference="paired").fit(before, Y)
    assert np.array_equal(answers(fitted, pairs), answers(plain, before))


@pytest.mark.parametrize("kind", ["channels last", "gray", "flat", "mapped", "lazy", "table"])
def test_one_other_size_in_every_container(kind, tmp_path):
    array = resized(several_sizes(), (15, 18))
    params = {}
    if kind == "channels last":
        X = np.moveaxis(array, 1, -1)
    elif kind == "gray":
        array = array[:, :1]
        X = array[:, 0]
    elif kind == "flat":
        X, params = array.reshape(len(array), -1), {"image_shape": (3, 15, 18)}
    elif kind == "mapped":
        np.save(tmp_path / "images.npy", array)
        X = MappedImages(tmp_path / "images.npy")
    elif kind == "lazy":
        X = LazyImages(array)
    else:
        pd = pytest.importorskip("pandas")
        X = pd.DataFrame({"image": list(array)})
    before = resized(array, (10, 12))
    expected = answers(tiny("SoftmaxClassifier").fit(before, Y), before)
    fitted = tiny("SoftmaxClassifier", image_size=(10, 12), **params).fit(X, Y)
    assert np.array_equal(answers(fitted, X), expected)
    assert fitted.n_features_in_ == np.prod(array.shape[1:])


def test_later_images_may_have_any_size():
    array = resized(several_sizes(), (15, 18))
    fitted = tiny("SoftmaxClassifier", image_size=12).fit(array, Y)
    for X in (resized(array, (31, 9)), list(array), several_sizes()):
        assert fitted.predict(X).shape == Y.shape
    with pytest.raises(
        ValueError, match=r"\(1, 15, 18\), \(1, 12, 12\) by image_size=12 .*\(3, 12"
    ):
        fitted.predict(array[:, :1])


def test_vectors_have_no_size():
    with pytest.raises(ValueError, match=r"image_size=8 is for images.*image_shape"):
        SoftmaxClassifier(image_size=8).fit(np.random.default_rng(0).random((24, 30)), Y)


@pytest.mark.parametrize("size", [0, -1, 4097, 7.5, "large", (8,), (8, 8, 8), (8, 0), [8, 8, 8]])
@pytest.mark.parametrize("name", ["SoftmaxClassifier", "SSLEncoder"])
def test_what_is_no_size_is_refused_by_name(name, size):
    with pytest.raises(ValueError, match="image_size"):
        tiny(name, image_size=size).fit(several_sizes(), Y)


# ---------------------------------------------------------------- the rest of an estimator's life


def test_early_stopping_and_cross_validation():
    images = several_sizes()
    params = {"early_stopping": True, "scoring": "accuracy"}
    before = resized(images, (10, 12))
    scores = [
        cross_val_score(tiny("SoftmaxClassifier", **params, **size), X, Y, cv=2).tolist()
        for X, size in (
            (images, {"image_size": (10, 12)}),
            (DatasetImages(Items(images)), {"image_size": (10, 12)}),
            (before, {}),
        )
    ]
    assert scores[0] == scores[1] == scores[2]


@pytest.mark.parametrize(
    "sampler",
    [
        SMOTE(k_neighbors=2, random_state=0),
        RandomOverSampler(random_state=0),
        SPMixSampler(patch_size=4, random_state=0),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_samplers_inside_see_what_the_network_sees(sampler):
    images = several_sizes()
    before = resized(images, (10, 12))
    expected = answers(tiny("SoftmaxClassifier", sampler=sampler).fit(before, Y), before)
    fitted = tiny("SoftmaxClassifier", sampler=sampler, image_size=(10, 12))
    assert np.array_equal(answers(clone(fitted).fit(images, Y), images), expected)
    if not isinstance(sampler, SMOTE):  # which reads no lazy images
        lazy = clone(fitted).fit(Items(images), Y)
        assert np.array_equal(answers(lazy, images), expected)


def test_clone_pickle_and_files(tmp_path):
    images = several_sizes()
    fitted = tiny("CSSNClassifier", image_size=Resize((10, 12), "pad")).fit(images, Y)
    expected = answers(fitted, images)
    assert np.array_equal(answers(pickle.loads(pickle.dumps(fitted)), images), expected)
    assert np.array_equal(answers(clone(fitted).fit(images, Y), images), expected)
    pytest.importorskip("safetensors")
    from sklearn_medimb.persistence import load, save

    save(fitted, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert np.array_equal(answers(loaded, images), expected)
    assert loaded.image_size.get_params() == {"size": (10, 12), "aspect": "pad"}
    assert loaded.input_shape_ == images[0].shape


@pytest.mark.parametrize(
    "forgery", [(3, 2**20, 8), (1, 8, 8), (3, 8), [3, 15, 18], (3, 15.0, 18), (3, 5, 18)]
)
def test_forged_input_shapes_are_refused(forgery, tmp_path):
    pytest.importorskip("safetensors")
    from sklearn_medimb.persistence import load, save
    from tests.forgery import forged, set_state

    array = resized(several_sizes(), (15, 18))
    path = tmp_path / "model"
    save(tiny("SoftmaxClassifier", image_size=12).fit(array, Y), path)
    node = {"tuple": list(forgery)} if isinstance(forgery, tuple) else forgery
    forged(path, set_state("input_shape_", node))
    with pytest.raises(ValueError, match=r"input_shape_|n_features_in_"):
        load(path)


def test_no_search_range():
    assert "image_size" not in search_space(SoftmaxClassifier())
    assert "image_size__size" in SoftmaxClassifier(image_size=Resize(8)).get_params()


@pytest.mark.parametrize("name", ["SoftmaxClassifier", "SSLEncoder"])
def test_further_training_at_another_size_is_refused(name):
    images = several_sizes()
    fitted = tiny(name, image_size=12, warm_start=True).fit(images, Y)
    before = answers(fitted, images)
    fitted.set_params(image_size=14)
    for call in (lambda: fitted.fit(images, Y), lambda: fitted.transform(images)):
        with pytest.raises(ValueError, match=r"\(3, 14, 14\) by image_size=14 .*\(3, 12, 12\)"):
            call()
    fitted.set_params(image_size=12)
    assert np.array_equal(answers(fitted, images), before)
    n = fitted.n_iter_
    assert fitted.fit(resized(images, (20, 17)), Y).n_iter_ > n


def test_a_fitted_start_has_a_size_of_its_own():
    images = several_sizes()
    encoder = tiny("SSLEncoder", image_size=12).fit(images)
    fitted = tiny("SoftmaxClassifier", backbone=encoder, image_size=16).fit(images, Y)
    assert fitted.image_shape_ == (3, 16, 16)


def test_checkpoints_tell_sizes_apart(tmp_path):
    images = several_sizes()
    names = set()
    for size in (10, 12, Resize(12, "pad")):
        clf = tiny("SoftmaxClassifier", image_size=size, checkpoint_dir=tmp_path)
        with pytest.raises(RuntimeError, match="power cut"):
            clf.set_params(callbacks=[CrashAfter(1)]).fit(images, Y)
        names |= {path.name for path in tmp_path.iterdir()}
    assert len(names) == 3


def test_a_resumed_fit_is_the_same(tmp_path):
    images = several_sizes()
    expected = answers(tiny("SoftmaxClassifier", image_size=12).fit(images, Y), images)
    clf = tiny("SoftmaxClassifier", image_size=12, checkpoint_dir=tmp_path)
    with pytest.raises(RuntimeError, match="power cut"):
        clone(clf).set_params(callbacks=[CrashAfter(1)]).fit(images, Y)
    assert np.array_equal(answers(clf.fit(images, Y), images), expected)


def test_memory_of_training_is_that_of_resized_images():
    array = resized(several_sizes(), (40, 48))
    needs = []
    for X, params in ((array, {"image_size": (10, 12)}), (resized(array, (10, 12)), {})):
        clf = tiny("SoftmaxClassifier", **params).fit(X, Y)
        train, _ = clf._check_training(X, Y, fresh=False)
        needs.append(clf._training_bytes(train))
    assert needs[0] == needs[1]


def test_explanations_are_in_pixels_of_the_resized_image():
    images = several_sizes()
    clf = tiny("CSSNClassifier", image_size=(10, 12)).fit(images, Y)
    evidence = clf.explain(images[:3], supports=images, n_places=9)
    assert (evidence.boxes[..., 1].reshape(-1, 2).max(axis=0) <= [10, 12]).all()
    before = resized(images, (10, 12))
    same = tiny("CSSNClassifier").fit(before, Y).explain(before[:3], supports=before, n_places=9)
    assert np.array_equal(evidence.maps, same.maps)


def test_images_in_memory_are_resized_once(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "sklearn_medimb._data.images.resample",
        lambda images, *args: calls.append(len(images)) or resample(images, *args),
    )
    tiny("SoftmaxClassifier", image_size=12, max_epochs=5).fit(several_sizes(), Y)
    assert sum(calls) == len(Y)


def test_encoders_take_several_sizes_without_labels():
    images = several_sizes()
    assert SSLEncoder(**TINY["SSLEncoder"], image_size=12).fit(images).transform(images).ndim == 2


def test_graphs_resize(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    from sklearn_medimb.onnx import export_onnx

    def answer(classifier, images, **params):
        export_onnx(classifier, tmp_path / "model.onnx", **params)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        return session.run(None, {"images": images.astype(np.float32)})[0]

    array = resized(several_sizes(), (15, 18))
    precise = {"precision": "float32"}
    clf = CSSNClassifier(**TINY["CSSNClassifier"], image_size=Resize((10, 12), "pad"), **precise)
    clf.fit(array, Y)
    np.testing.assert_allclose(answer(clf, array), clf.predict_proba(array), atol=1e-5)
    other = resized(array, (9, 21))
    found = answer(clf, other, image_shape=(3, 9, 21))
    np.testing.assert_allclose(found, clf.predict_proba(other), atol=1e-5)
    with pytest.raises(ValueError, match=r"\(1, 15, 18\) do not come to \(3, 10, 12\)"):
        export_onnx(clf, tmp_path / "model.onnx", image_shape=(1, 15, 18))
    floats = (array[:, 0] / 255).astype(np.float32)
    clf = SoftmaxClassifier(**TINY["SoftmaxClassifier"], image_size=12, **precise).fit(floats, Y)
    np.testing.assert_allclose(answer(clf, floats[:, None]), clf.predict_proba(floats), atol=1e-5)
