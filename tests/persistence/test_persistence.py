"""Files of fitted estimators: the same estimator comes back, or a ValueError that says why not."""

from __future__ import annotations

import ast
import io
import json
import pickle
import re
import struct
import sys
import zipfile
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from imblearn.over_sampling import SMOTE, RandomOverSampler
from scipy.special import softmax
from sklearn import config_context
from sklearn.base import BaseEstimator, clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from skorch.callbacks import GradientNormClipping
from torch import nn

import sklearn_medimb
from sklearn_medimb import (
    AMIMVClassifier,
    AMIMVEncoder,
    BalancedVirtualFeatures,
    CSSNClassifier,
    LMDClassifier,
    NearestClassMean,
    SaliencyMap,
    SoftmaxClassifier,
    SPMixSampler,
    SSLEncoder,
    VirtualFeatureCalibration,
)
from sklearn_medimb.augment import Augmentation
from sklearn_medimb.backbones import ConvNet, ViT
from sklearn_medimb.base._two_stage import head_logits, torch_head
from sklearn_medimb.onnx import export_onnx
from sklearn_medimb.persistence import load, save
from sklearn_medimb.persistence._format import known_classes
from sklearn_medimb.persistence._reading import Reader
from sklearn_medimb.persistence._writing import Writer
from sklearn_medimb.rebalance import HEADS, resolve_head
from tests.estimators import CLASSIFIERS, IMAGE_ESTIMATORS, PUBLIC, TRAINED, taken
from tests.forgery import forged, set_class, set_param, set_state
from tests.helpers import make_blobs

safetensors = pytest.importorskip("safetensors")
pytestmark = [
    pytest.mark.filterwarnings("ignore:The features have all but collapsed"),
    pytest.mark.filterwarnings("ignore:Classes .* have one training image"),
]

SMALL = {
    "backbone": ConvNet(widths=(4, 8)),
    "max_epochs": 1,
    "batch_size": 16,
    "random_state": 0,
    "precision": "float32",
}
# What a class needs beyond that to be small; a new public class need not be here.
OTHERS = {
    "AMIMVClassifier": {"pretrain": AMIMVEncoder(max_epochs=1, batch_size=16), "fine_tune": "full"},
    "LMDClassifier": {"n_rounds": 2},
}
TRANSFORMER = ViT(width=16, depth=1, n_heads=2)
X, Y = make_blobs((12, 8, 4))


def small(name, **params):
    cls = IMAGE_ESTIMATORS[name]
    return cls(**{**taken(cls, SMALL), **OTHERS.get(name, {}), **params})


@pytest.fixture(scope="module")
def fitted():
    """Fitted estimators by name; tests copy them before they change them."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = small(name).fit(X, Y)
        return made[name]

    return get


@pytest.fixture(scope="module")
def encoder(fitted):
    return fitted("SSLEncoder")


def answer(estimator, images=X):
    if hasattr(estimator, "predict_proba"):
        return estimator.predict_proba(images)
    return estimator.transform(images)


def names_in(folder):
    return [path.name for path in folder.iterdir()]


def through(estimator, tmp_path):
    save(estimator, tmp_path / "estimator.safetensors")
    return load(tmp_path / "estimator.safetensors")


def assert_same(found, expected):
    """Equal values of equal types, NaN included."""
    assert type(found) is type(expected)
    if isinstance(expected, BaseEstimator):
        assert_same(found.get_params(), expected.get_params())
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    else:
        np.testing.assert_equal(found, expected)


# -------------------------------------------------------------------- what comes back


@pytest.mark.parametrize("name", IMAGE_ESTIMATORS)
def test_the_same_estimator_comes_back(name, fitted, tmp_path):
    saved = fitted(name)
    loaded = through(saved, tmp_path)
    assert np.array_equal(answer(loaded), answer(saved))
    assert np.array_equal(loaded.transform(X), saved.transform(X))
    assert_same(loaded.get_params(), saved.get_params())
    assert repr(loaded) == repr(saved)
    assert loaded._repr_html_()
    assert_same(clone(loaded).get_params(), saved.get_params())
    learned = [{k for k in vars(e) if k.endswith("_")} for e in (loaded, saved)]
    assert learned[0] == learned[1]
    assert_same(loaded.history_, saved.history_)
    assert names_in(tmp_path) == ["estimator.safetensors"]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (name, how)
        for name in TRAINED
        for how in ("fit", "warm_start", "partial_fit")
        if how == "warm_start" or hasattr(TRAINED[name], how)
    ],
)
def test_training_goes_on_as_after_unpickling(name, how, fitted, tmp_path):
    copies = pickle.loads(pickle.dumps(fitted(name))), through(fitted(name), tmp_path)
    for estimator in copies:
        if how == "partial_fit":
            estimator.partial_fit(X, Y)
        else:
            estimator.set_params(warm_start=how == "warm_start").fit(X, Y)
    assert np.array_equal(answer(copies[0]), answer(copies[1]))
    assert not np.array_equal(answer(copies[0]), answer(fitted(name))) or how == "fit"


@pytest.mark.parametrize("name", IMAGE_ESTIMATORS)
def test_a_file_is_hardly_larger_than_the_weights(name, tmp_path):
    estimator = small(name, backbone=ConvNet(widths=(32, 64, 128))).fit(X, Y)
    save(estimator, tmp_path / "model")
    weights = safetensors.numpy.load_file(tmp_path / "model")  # nothing else is needed to read them
    for key, value in estimator._network_weights().items():
        assert np.array_equal(weights[key], value)
    n_bytes = sum(array.nbytes for array in estimator.weights_.values())
    assert (tmp_path / "model").stat().st_size <= 1.1 * n_bytes


def test_every_public_class_can_be_named_in_a_file():
    public = set(PUBLIC.values())
    assert public <= set(known_classes().values())
    assert len(IMAGE_ESTIMATORS) >= 8


@pytest.mark.parametrize(
    "estimator",
    [
        NearestClassMean(),
        VirtualFeatureCalibration(class_weight={0: 1.0, 1: 2.0, 2: 3.0}),
        BalancedVirtualFeatures(random_state=0),
        SPMixSampler(random_state=0),
        SaliencyMap(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_heads_samplers_and_transformers_come_back(estimator, tmp_path):
    flat = X.reshape(len(X), -1)
    images = isinstance(estimator, (SPMixSampler, SaliencyMap))
    data = X if images else flat
    if hasattr(estimator, "fit_resample"):
        estimator.fit_resample(data, Y)
    else:
        estimator.fit(data, Y)
    loaded = through(estimator, tmp_path)
    assert_same(loaded.get_params(), estimator.get_params())
    assert vars(loaded).keys() == vars(estimator).keys()
    if not hasattr(estimator, "fit_resample"):
        assert np.array_equal(answer(loaded, data), answer(estimator, data))
    else:
        assert np.array_equal(loaded.fit_resample(data, Y)[0], estimator.fit_resample(data, Y)[0])


PARAMETERS = {
    "optimiser": {"net_params": {"optimizer": torch.optim.SGD, "optimizer__momentum": 0.9}},
    "weights of classes": {"class_weight": {0: np.float32(1), np.int64(1): 2.5, 2: 3}},
    "sampler": {"sampler": SMOTE(k_neighbors=2, random_state=0), "image_shape": [3, 12, 12]},
    "sampler of a dict": {"sampler": RandomOverSampler(sampling_strategy={2: 10})},
    "augmentation": {"augment": Augmentation(brightness=0.2)},
    "path and device": {"checkpoint_dir": Path("somewhere"), "device": torch.device("cpu")},
    "class of backbones": {"backbone": ConvNet},
    "transformer": {"backbone": TRANSFORMER},
    "numbers of NumPy": {"lr": np.float64(0.01), "batch_size": np.int32(16)},
    "early stopping": {"early_stopping": True, "n_iter_no_change": 2},
}


@pytest.mark.parametrize("params", PARAMETERS.values(), ids=PARAMETERS)
def test_parameters_of_every_kind_come_back(params, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = small("SoftmaxClassifier", **params).fit(X, Y)
    loaded = through(saved, tmp_path)
    expected = saved.get_params()
    if "lr" in params:
        expected["lr"] = 0.01  # np.float64 is a float
    assert_same(loaded.get_params(), expected)
    assert np.array_equal(answer(loaded), answer(saved))


def test_values_of_every_kind_come_back():
    values = [None, True, -3, 1e-300, "é\n", b"\x00", [1, (2, [])], {1: {"a": ()}}, 10**30]
    values += [float("nan"), float("inf"), -float("inf"), np.float32(0.1), np.bool_(True)]
    values += [np.array(3.5), np.zeros((0, 2)), np.array(["b", "ab"]), np.array([b"x"])]
    values += [np.array(["a", 1, None], dtype=object), np.asfortranarray(np.ones((2, 3)))]
    values += [np.arange(4).astype(kind) for kind in ("u1", "i2", "u4", "f2", "f4", "f8", "?")]
    writer = Writer()
    tree = json.loads(json.dumps(writer.encode(values, "value"), allow_nan=False))
    stored = safetensors.numpy.load(safetensors.numpy.save(writer.tensors))
    found = Reader(stored).decode(tree)
    assert_same(found, values)
    for one, other in zip(found, values, strict=True):
        if isinstance(other, np.ndarray):
            assert one.dtype.kind == other.dtype.kind
            assert one.flags.f_contiguous == other.flags.f_contiguous


@pytest.mark.filterwarnings("ignore:SoftmaxClassifier takes y = -1.0 for a class")
@pytest.mark.parametrize("labels", [["b", "a", "c"], [True, False, True], [7.0, -1.0, 3.0]])
def test_labels_of_every_kind_come_back(labels, tmp_path):
    y = np.array(labels)[Y]
    saved = small("SoftmaxClassifier").fit(X, y)
    loaded = through(saved, tmp_path)
    assert np.array_equal(loaded.predict(X), saved.predict(X))
    assert loaded.classes_.dtype == saved.classes_.dtype


@pytest.mark.parametrize("head", [LogisticRegression(), GaussianNB(), "ncm"])
def test_heads_come_back_with_what_they_learned(head, tmp_path):
    saved = small("MetricTwoStageClassifier", rebalance=head).fit(X, Y)
    loaded = through(saved, tmp_path)
    assert type(loaded.head_) is type(saved.head_)
    assert np.array_equal(answer(loaded), answer(saved))


def test_output_and_routing_settings_come_back(fitted, tmp_path):
    with config_context(enable_metadata_routing=True):
        saved = pickle.loads(pickle.dumps(fitted("SoftmaxClassifier")))
        saved.set_output(transform="pandas").set_fit_request(groups=True, sample_weight="w")
        loaded = through(saved, tmp_path)
        assert str(loaded.get_metadata_routing()) == str(saved.get_metadata_routing())
    assert type(loaded.transform(X)).__name__ == "DataFrame"


def test_a_gpu_model_serves_on_a_cpu(fitted, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    saved = pickle.loads(pickle.dumps(fitted("SoftmaxClassifier"))).set_params(device="cuda")
    with pytest.warns(UserWarning, match="using the CPU"):
        loaded = through(saved, tmp_path)
    assert loaded.device == "cuda"
    assert np.array_equal(answer(loaded), answer(fitted("SoftmaxClassifier")))


# -------------------------------------------------------------------- a fitted start

STARTS = {
    "backbone": lambda encoder: SoftmaxClassifier(**{**SMALL, "backbone": encoder}),
    "frozen": lambda encoder: SoftmaxClassifier(**{**SMALL, "backbone": FrozenEstimator(encoder)}),
    "pretrain": lambda encoder: LMDClassifier(**SMALL, pretrain=encoder, n_rounds=2),
    "AMIMV": lambda encoder: AMIMVClassifier(**SMALL, pretrain=encoder),
    "encoder": lambda encoder: AMIMVEncoder(**{**SMALL, "backbone": encoder}),
}


@pytest.fixture(scope="module")
def large_encoder():
    return SSLEncoder(**{**SMALL, "backbone": ConvNet(widths=(32, 64, 128))}).fit(X)


@pytest.mark.parametrize("make", STARTS.values(), ids=STARTS)
class TestStart:
    def test_its_weights_are_not_in_the_file(self, make, large_encoder, tmp_path):
        saved = make(large_encoder).fit(X, Y)
        loaded = through(saved, tmp_path)
        assert np.array_equal(answer(loaded), answer(saved))
        assert_same(loaded.get_params(), saved.get_params())
        n_bytes = sum(array.nbytes for array in saved.weights_.values())
        assert (tmp_path / "estimator.safetensors").stat().st_size <= 1.1 * n_bytes
        again = through(loaded, tmp_path)
        assert np.array_equal(answer(again), answer(saved))

    def test_only_a_fit_from_the_start_asks_for_it(self, make, encoder, tmp_path):
        saved = make(encoder).fit(X, Y)
        loaded = through(saved, tmp_path)
        copied = pickle.loads(pickle.dumps(loaded))
        for estimator in (loaded, copied, clone(loaded)):
            with pytest.raises(ValueError, match=r"weights of the SSLEncoder .* not in the file"):
                estimator.fit(X, Y)
        assert np.array_equal(answer(loaded), answer(saved))
        copies = loaded, pickle.loads(pickle.dumps(saved))
        for estimator in copies:
            estimator.set_params(warm_start=True).fit(X, Y)
        assert np.array_equal(answer(copies[0]), answer(copies[1]))
        assert not np.array_equal(answer(copies[0]), answer(saved)) or "AMIMVC" in repr(saved)


def test_a_chain_of_starts_comes_back(encoder, tmp_path):
    middle = small("CSSNClassifier", backbone=encoder).fit(X, Y)
    saved = small("SoftmaxClassifier", backbone=middle).fit(X, Y)
    assert np.array_equal(answer(through(saved, tmp_path)), answer(saved))


# -------------------------------------------------------------------- what save refuses


def test_what_is_no_data_is_refused_by_name(tmp_path):
    def case(match, **params):
        estimator = small("MetricTwoStageClassifier", **params).fit(X, Y)
        with pytest.raises(ValueError, match=match):
            save(estimator, tmp_path / "model")
        return estimator

    case(
        r"^scoring=<function .* set_params\(scoring='balanced_accuracy'\)",
        scoring=lambda e, X, y: 0.0,
    )
    case(r"^backbone=Sequential", backbone=nn.Sequential(nn.Flatten(), nn.Linear(432, 16)))
    callbacks = [GradientNormClipping(1.0)]
    estimator = case(r"^callbacks=<skorch", callbacks=callbacks)
    save(estimator.set_params(callbacks=None), tmp_path / "model")
    (tmp_path / "model").unlink()
    strategy = {"sampling_strategy": lambda y: {2: 9}}
    case("^sampler__sampling_strategy=<function", sampler=RandomOverSampler(**strategy))
    case(r"^rebalance=RandomForest", rebalance=RandomForestClassifier(2))
    case(r"^rebalance=KNeighbors", rebalance=KNeighborsClassifier(2))
    estimator = small("MetricTwoStageClassifier").fit(X, Y)
    estimator.refit_head(X, Y, rebalance=RandomForestClassifier(2))
    with pytest.raises(ValueError, match=r"^head_, a RandomForestClassifier .* skops"):
        save(estimator, tmp_path / "model")
    pipeline = make_pipeline(small("SoftmaxClassifier")).fit(X, Y)
    with pytest.raises(ValueError, match=r"Pipeline is no estimator of sklearn_medimb: .*a step"):
        save(pipeline, tmp_path / "model")
    with pytest.raises(NotFittedError):
        save(SoftmaxClassifier(), tmp_path / "model")
    assert not names_in(tmp_path)


NO_DATA = {
    "scoring": {"scoring": lambda estimator, X, y: 0.0, "early_stopping": True},
    "augment": {"augment": type("Own", (Augmentation,), {})(brightness=0.1)},
    "callbacks": {"callbacks": [GradientNormClipping(1.0)]},
    "net_params": {"net_params": {"optimizer": type("Own", (torch.optim.Adam,), {})}},
    "random_state": {"random_state": np.random.RandomState(0)},
    "sampler__sampling_strategy": {
        "sampler": RandomOverSampler(sampling_strategy=lambda y: {2: 9})
    },
    "class_weight": {"class_weight": {0: 1.0, 1: 1.0, 2: np.longdouble(2)}},
}


@pytest.mark.parametrize(("place", "params"), NO_DATA.items(), ids=NO_DATA)
def test_what_the_message_says_works(place, params, tmp_path):
    saved = small("SoftmaxClassifier", **params).fit(X, Y)
    with pytest.raises(ValueError, match=rf"^{place}=.* set_params\(") as caught:
        save(saved, tmp_path / "model")
    told = re.search(r"set_params\((\w+)=(.*)\), the default", str(caught.value))
    saved.set_params(**{told[1]: ast.literal_eval(told[2])})
    assert np.array_equal(answer(through(saved, tmp_path)), answer(saved))


def test_what_the_message_says_of_one_s_own_network_works(tmp_path):
    saved = small("SoftmaxClassifier", backbone=nn.Sequential(nn.Flatten(), nn.Linear(432, 16)))
    saved.fit(X, Y)
    with pytest.raises(
        ValueError, match=r"(?s)^backbone=.* pickle and joblib .*export_onnx"
    ) as caught:
        save(saved, tmp_path / "model")
    assert "None" not in str(caught.value)
    assert not names_in(tmp_path)
    assert np.array_equal(answer(pickle.loads(pickle.dumps(saved))), answer(saved))
    joblib.dump(saved, tmp_path / "model.joblib")
    assert np.array_equal(answer(joblib.load(tmp_path / "model.joblib")), answer(saved))
    (tmp_path / "model.joblib").unlink()
    found, _ = onnx_answer(saved, X, tmp_path)
    np.testing.assert_allclose(found, answer(saved), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["backbone", "pretrain"])
def test_one_s_own_network_within_a_start_is_named(start, tmp_path):
    module = nn.Sequential(nn.Flatten(), nn.Linear(432, 16))
    encoder = SSLEncoder(**{**SMALL, "backbone": module}).fit(X)
    saved = SoftmaxClassifier(**{**SMALL, start: encoder}).fit(X, Y)
    with pytest.raises(ValueError, match=rf"(?s)^{start}__backbone=.* pickle and joblib"):
        save(saved, tmp_path / "model")


@pytest.mark.parametrize(
    "params", [{"backbone": ConvNet(widths=(4, 9))}, {"precision": "float64"}, {"lr": -1}]
)
def test_parameters_that_no_longer_fit_are_refused(params, fitted, tmp_path):
    """A file that could not be read back never takes the place of one that can."""
    path = tmp_path / "model"
    save(fitted("SoftmaxClassifier"), path)
    before = path.read_bytes()
    changed = pickle.loads(pickle.dumps(fitted("SoftmaxClassifier"))).set_params(**params)
    with pytest.raises(ValueError, match="SoftmaxClassifier cannot be restored from a file"):
        save(changed, path)
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["model"]


def test_packages_that_are_missing_are_named(fitted, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    for call in (lambda p: save(fitted("SoftmaxClassifier"), p), load):
        with pytest.raises(ImportError, match=r"sklearn_medimb\[persistence\]"):
            call(tmp_path / "model")
    with pytest.raises(ImportError, match=r"sklearn_medimb\[onnx\]"):
        export_onnx(fitted("SoftmaxClassifier"), tmp_path / "model")


# -------------------------------------------------------------------- versions


@pytest.fixture
def path(fitted, tmp_path):
    save(fitted("SoftmaxClassifier"), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_another_format_names_the_version_that_wrote_it(path):
    forged(path, lambda tree, tensors, stamp: stamp.update(sklearn_medimb_format="2"))
    own = re.escape(sklearn_medimb.__version__)
    with pytest.raises(ValueError, match=rf"format 2, of sklearn_medimb {own};.*reads format 1"):
        load(path)


@pytest.mark.parametrize("version", ["0.1.0.dev0", "7.0.0"])
def test_another_version_of_this_format_warns(version, path, fitted):
    forged(path, lambda tree, tensors, stamp: stamp.update(sklearn_medimb=version))
    with pytest.warns(UserWarning, match=f"written by sklearn_medimb {re.escape(version)}"):
        loaded = load(path)
    assert np.array_equal(answer(loaded), answer(fitted("SoftmaxClassifier")))


def test_a_parameter_that_a_newer_version_added_has_its_default(path):
    forged(path, lambda tree, *_: tree["params"].pop("mixup_alpha") and None)
    assert load(path).mixup_alpha == 0.2


# -------------------------------------------------------------------- files that are not ours


class Payload:
    """Pickled, it creates a file when it is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("schema.json", '{"__class__": "Popen", "__module__": "subprocess"}')
    return buffer.getvalue()


def flipped(data, place):
    changed = bytearray(data)
    changed[place] ^= 0x10
    return bytes(changed)


def with_header(header, data=b""):
    return struct.pack("<Q", len(header)) + header + data


def header_end(data):
    return 8 + struct.unpack("<Q", data[:8])[0]


DAMAGE = {
    "empty": lambda data: b"",
    "seven bytes": lambda data: data[:7],
    "length only": lambda data: data[:8],
    "half a header": lambda data: data[: header_end(data) // 2],
    "header only": lambda data: data[: header_end(data)],
    "half the weights": lambda data: data[: (header_end(data) + len(data)) // 2],
    "last byte lost": lambda data: data[:-1],
    "a byte more": lambda data: data + b"\0",
    "twice": lambda data: data + data,
    "bit in the length": lambda data: flipped(data, 1),
    "bit in the header": lambda data: flipped(data, 40),
    "bit in the middle of the header": lambda data: flipped(data, header_end(data) // 2),
    "bit in the first weight": lambda data: flipped(data, header_end(data)),
    "bit in the last weight": lambda data: flipped(data, -1),
    "number of a parameter": lambda data: data.replace(b"0.002", b"0.003", 1),
    "weights swapped": lambda data: data[: header_end(data)] + data[header_end(data) :][::-1],
    "giant header": lambda data: struct.pack("<Q", 2**62) + data[8:],
    "negative header": lambda data: b"\xff" * 8 + data[8:],
    "header of another size": lambda data: struct.pack("<Q", len(data) - 8) + data[8:],
    "no JSON": lambda data: with_header(b"x" * 64),
    "deep JSON": lambda data: with_header(b"[" * 100_000),
    "pickle": lambda data: pickle.dumps(Payload()),
    "pickle after a header": lambda data: with_header(b"{}", pickle.dumps(Payload())),
    "zip": lambda data: zipped(),
    "text": lambda data: b"import os\n" * 100,
    "zeros": lambda data: bytes(len(data)),
    "noise": lambda data: np.random.default_rng(0).bytes(len(data)),
    "safetensors of others": lambda data: safetensors.numpy.save({"w": np.ones(3)}),
    "metadata of others": lambda data: safetensors.numpy.save({"w": np.ones(3)}, {"format": "pt"}),
    "no digest": lambda data: data.replace(b'"digest"', b'"digits"', 1),
}


def assert_refused(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    with pytest.raises(ValueError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert type(caught.value) is ValueError
    assert not Path("executed").exists()


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_and_foreign_files_are_refused(damage, path, monkeypatch):
    data = path.read_bytes()
    assert damage(data) != data
    path.write_bytes(damage(data))
    assert_refused(path, monkeypatch)


def nested(depth):
    return lambda tree, *_: "[" * depth + "]" * depth


def set_tensor(name, change):
    def edit(tree, tensors, stamp):
        tensors[name] = np.ascontiguousarray(change(tensors[name]))

    return edit


def with_nan(array):
    array = array.copy()
    array.flat[0] = np.nan
    return array


WEIGHT = "trunk.backbone.0.0.weight"
FORGERIES = {
    "null": lambda *_: "null",
    "a number": lambda *_: "3",
    "a text": lambda *_: '"SoftmaxClassifier"',
    "a list": lambda *_: "[]",
    "an empty object": lambda *_: "{}",
    "half a JSON": lambda *_: '{"estimator": {',
    "two tags": lambda *_: '{"estimator": {}, "dict": []}',
    "an array alone": lambda *_: json.dumps({"array": WEIGHT}),
    "an empty estimator": lambda *_: '{"estimator": {}}',
    "a class alone": lambda *_: '{"class": "torch.optim.SGD"}',
    "a backbone": lambda *_: (
        '{"estimator": {"class": "sklearn_medimb.backbones.ConvNet", "params": {}}}'
    ),
    "100 levels": nested(100),
    "10,000 levels": nested(10_000),
    "a million levels": nested(1_000_000),
    "os.system": set_class("os.system"),
    "subprocess.Popen": set_class("subprocess.Popen"),
    "an optimiser": set_class("torch.optim.SGD"),
    "a function of the list's modules": set_class("sklearn.linear_model.ridge_regression"),
    "another module": set_class("sklearn.ensemble.RandomForestClassifier"),
    "a private name": set_class("sklearn_medimb.persistence._reading.Reader"),
    "a class that is no text": set_class(["sklearn_medimb.SoftmaxClassifier"]),
    "another class": set_class("sklearn_medimb.CSSNClassifier"),
    "an encoder": set_class("sklearn_medimb.SSLEncoder"),
    "unknown parameter": set_param("command", "touch executed"),
    "parameter of another type": set_param("lr", "fast"),
    "parameter out of range": set_param("batch_size", -1),
    "popen as a scorer": set_param("scoring", {"class": "subprocess.Popen"}),
    "unknown tag": set_param("scoring", {"import": "os"}),
    "unhashable key": set_param("class_weight", {"dict": [[[1], 2]]}),
    "no float": set_param("lr", {"float": "1e5"}),
    "odd number": set_param("lr", {"number": ["object", 1]}),
    "unknown device": set_param("device", {"device": "moon"}),
    "module of another package": set_param("backbone", "timm:../../evil"),
    "other network": set_param("backbone", "vit"),
    "huge network": set_param(
        "backbone",
        {
            "estimator": {
                "class": "sklearn_medimb.backbones.ConvNet",
                "params": {"widths": [10**13]},
            }
        },
    ),
    "negative network": set_param(
        "backbone",
        {
            "estimator": {
                "class": "sklearn_medimb.backbones.ConvNet",
                "params": {"widths": [-4, 8]},
            }
        },
    ),
    "net that is data": set_state("net_", 1),
    "method": set_state("predict", 1),
    "property": set_state("weights_", 1),
    "dunder": set_state("__class__", "x"),
    "private attribute": set_state("_start", 1),
    "state that is a list": lambda tree, *_: tree.update(state=[1]),
    "parameters that are a text": lambda tree, *_: tree.update(params="lr"),
    "no state": lambda tree, *_: tree.pop("state") and None,
    "no weights": lambda tree, *_: tree["state"].pop("_weights") and None,
    "weights that are a list": set_state("_weights", [1, 2]),
    "no classes": lambda tree, *_: tree["state"].pop("classes_") and None,
    "no number of features": lambda tree, *_: tree["state"].pop("n_features_in_") and None,
    "no mean": lambda tree, *_: tree["state"].pop("pixel_mean_") and None,
    "no history": lambda tree, *_: tree["state"].pop("history_") and None,
    "image shape of text": set_state("image_shape_", {"tuple": ["3", "12", "12"]}),
    "image shape of two": set_state("image_shape_", {"tuple": [3, 12]}),
    "image shape below 1": set_state("image_shape_", {"tuple": [3, -12, 12]}),
    "history of numbers": set_state("history_", [1, 2]),
    "classes of text": set_state("classes_", "ab"),
    "epochs of text": set_state("n_iter_", "1"),
    "array twice": lambda tree, *_: tree["state"].update(odd_=tree["state"]["pixel_mean_"]),
    "request of an unknown method": lambda tree, *_: tree.update(requests={"x": {"y": True}}),
    "missing array": lambda tree, tensors, _: tensors.pop(WEIGHT) is None or None,
    "array too many": lambda tree, tensors, _: tensors.update(more=np.ones(2)),
    "weights of another shape": set_tensor(WEIGHT, lambda a: a[:, :2]),
    "weights of another order": set_tensor(WEIGHT, lambda a: a.transpose(1, 0, 2, 3)),
    "weights of another dtype": set_tensor(WEIGHT, lambda a: a.astype(np.float64)),
    "whole weights": set_tensor(WEIGHT, lambda a: a.astype(np.int8)),
    "weights of NaN": set_tensor(WEIGHT, with_nan),
    "mean of NaN": set_tensor("pixel_mean_", with_nan),
    "mean of one channel": set_tensor("pixel_mean_", lambda a: a[:1]),
    "mean of whole numbers": set_tensor("pixel_mean_", lambda a: a.astype(int)),
    "zero deviation": set_tensor("pixel_std_", np.zeros_like),
    "one class": set_tensor("classes_", lambda a: a[:1]),
    "equal classes": set_tensor("classes_", np.zeros_like),
    "a class too many": set_tensor("classes_", lambda a: np.arange(4)),
    "classes in two axes": set_tensor("classes_", lambda a: a[None]),
    "counts of fewer classes": set_tensor("class_counts_", lambda a: a[:2]),
}


@pytest.mark.parametrize("edit", FORGERIES.values(), ids=FORGERIES)
def test_forged_files_are_refused(edit, path, monkeypatch):
    forged(path, edit)
    assert_refused(path, monkeypatch)


@pytest.mark.parametrize("name", ["CSSNClassifier", "MetricTwoStageClassifier"])
def test_parts_that_do_not_fit_together_are_refused(name, fitted, tmp_path, monkeypatch):
    path = tmp_path / "model"
    save(fitted(name), path)
    names = [n for n in safetensors.numpy.load_file(path) if n.startswith(("support_", "head_"))]
    assert names
    for tensor in names:
        save(fitted(name), path)
        forged(path, set_tensor(tensor, lambda a: a[:-1]))
        assert_refused(path, monkeypatch)


def test_a_folder_is_refused_and_a_missing_file_is_missing(tmp_path, monkeypatch):
    assert_refused(tmp_path, monkeypatch)
    with pytest.raises(FileNotFoundError, match="absent"):
        load(tmp_path / "absent")


# -------------------------------------------------------------------- ONNX


def onnx_answer(classifier, images, tmp_path):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    export_onnx(classifier, tmp_path / "model.onnx")
    assert names_in(tmp_path) == ["model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(["probabilities"], {"images": images.astype(np.float32)})
    facts = session.get_modelmeta().custom_metadata_map
    return found, {name: json.loads(fact) for name, fact in facts.items()}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_an_exported_graph_predicts_the_same(name, fitted, tmp_path):
    found, facts = onnx_answer(fitted(name), X, tmp_path)
    np.testing.assert_allclose(found, fitted(name).predict_proba(X), rtol=1e-4, atol=1e-5)
    assert facts == {
        "classes": [0, 1, 2],
        "image_shape": [3, 12, 12],
        "pixels": "0 to 255",
        "estimator": name,
        "sklearn_medimb": sklearn_medimb.__version__,
    }


EXPORTED = {
    "floats, logit adjustment": (SoftmaxClassifier(**SMALL, post_hoc_tau=1.0), X / 255),
    "uint8 vectors": (SoftmaxClassifier(**{**SMALL, "backbone": "auto"}), X[:, 0, 0]),
    "float64": (
        CSSNClassifier(
            **{**SMALL, "backbone": TRANSFORMER, "precision": "float64"}, n_tokens=4, symmetric=True
        ),
        X / 255,
    ),
}


@pytest.mark.parametrize(("classifier", "images"), EXPORTED.values(), ids=EXPORTED)
def test_graphs_of_other_settings(classifier, images, tmp_path):
    classifier = clone(classifier).fit(images, Y)
    found, facts = onnx_answer(classifier, images[:5], tmp_path)
    expected = classifier.predict_proba(images[:5])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert facts["pixels"] == ("0 to 255" if images.dtype == np.uint8 else "as in training")


@pytest.mark.parametrize("head", [*HEADS, LogisticRegression()], ids=str)
@pytest.mark.parametrize("n_classes", [2, 3])
def test_heads_are_the_same_in_torch(head, n_classes):
    rng = np.random.default_rng(0)
    features, y = rng.normal(size=(40, 6)), np.arange(40) % n_classes
    features[:2] = 0
    head = resolve_head(head).fit(features, y)
    found = torch_head(head, torch.float64, "cpu")(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(softmax(found, axis=1), softmax(head_logits(head, features), axis=1))


class ByLength(nn.Module):
    """A backbone whose graph is for one number of images."""

    def forward(self, x):
        return x.flatten(1).expand(len(x), 432)


def test_what_cannot_become_a_graph_is_refused(fitted, encoder, tmp_path):
    pytest.importorskip("onnx")
    classifier = small("MetricTwoStageClassifier", rebalance=RandomForestClassifier(2)).fit(X, Y)
    with pytest.raises(ValueError, match=r"RandomForest.*refit_head"):
        export_onnx(classifier, tmp_path / "model.onnx")
    with pytest.raises(TypeError, match="SSLEncoder is no image classifier"):
        export_onnx(encoder, tmp_path / "model.onnx")
    with pytest.raises(NotFittedError):
        export_onnx(SoftmaxClassifier(), tmp_path / "model.onnx")
    classifier = small("SoftmaxClassifier", backbone=ByLength()).fit(X, Y)
    with pytest.raises(ValueError, match=r"x\.shape\[0\]"):
        export_onnx(classifier, tmp_path / "model.onnx")
    assert not names_in(tmp_path)
