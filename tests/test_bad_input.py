"""Bad calls: the right exception, a message that says what to mend, and nothing half-fitted."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from imblearn.over_sampling import SMOTE, RandomOverSampler
from scipy import sparse
from sklearn.exceptions import DataConversionWarning, NotFittedError
from sklearn.utils._param_validation import InvalidParameterError
from skorch.callbacks import Callback
from torch import nn

from sklearn_medimb import (
    AMIMVClassifier,
    CSSNClassifier,
    SoftmaxClassifier,
    SPMixClassifier,
    SSLEncoder,
)
from sklearn_medimb._training.callback_state import WATCHERS
from sklearn_medimb.augment import Augmentation
from sklearn_medimb.backbones import ConvNet, ResNet
from sklearn_medimb.datasets import load_npz, make_long_tailed
from sklearn_medimb.losses import (
    ClassBalancedLoss,
    CrossEntropyLoss,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
)
from tests.estimators import CLASSIFIERS, IMAGE_ESTIMATORS, taken

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (24, 8, 8), dtype=np.uint8)
FLAT = X.reshape(24, -1)
FLOAT = X.astype(np.float64)
Y = np.arange(24) % 3
ONES = np.ones(24)


EACH = pytest.mark.parametrize("cls", CLASSIFIERS.values(), ids=CLASSIFIERS)
EACH_ESTIMATOR = pytest.mark.parametrize("cls", IMAGE_ESTIMATORS.values(), ids=IMAGE_ESTIMATORS)


def make(cls=SoftmaxClassifier, **params):
    tiny = {
        "backbone": ConvNet(widths=(4, 8)),
        "max_epochs": 1,
        "device": "cpu",
        "precision": "float32",
        "random_state": 0,
    }
    if cls is CSSNClassifier:
        tiny["n_tokens"] = 4
    if cls is AMIMVClassifier:
        tiny |= {"pretrain": None, "fine_tune": "full"}
    return cls(**{**taken(cls, tiny), **params})


def fitted_attributes(clf):
    return [name for name in vars(clf) if name.endswith("_") and not name.startswith("_")]


def assert_not_fitted(clf):
    assert fitted_attributes(clf) == []
    with pytest.raises(NotFittedError):
        getattr(clf, "predict", clf.transform)(X)


def assert_refuses(clf, error, match, X=X, y=Y, **fit):
    with pytest.raises(error, match=match):
        clf.fit(X, y, **fit)
    assert_not_fitted(clf)


class Lazy:
    """Images loaded one at a time."""

    def __init__(self, images):
        self.images, self.shape, self.ndim = images, images.shape, images.ndim
        self.dtype = images.dtype

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        key = key[0] if isinstance(key, tuple) else key
        return Lazy(self.images[key]) if np.ndim(key) else self.images[key]


# ---------------------------------------------------------------- constructor parameters

SHARED = [
    ("backbone", 3),
    ("backbone", None),
    ("max_epochs", 0),
    ("max_epochs", "all"),
    ("max_epochs", 1.5),
    ("batch_size", 0),
    ("batch_size", 16.0),
    ("lr", 0),
    ("lr", np.nan),
    ("lr", np.inf),
    ("lr", "fast"),
    ("weight_decay", -1e-3),
    ("lr_schedule", "step"),
    ("augment", 3),
    ("augment", lambda x: x),
    ("sampler", object()),
    ("sampler", "smote"),
    ("early_stopping", "yes"),
    ("early_stopping", 1),
    ("validation_fraction", 0.0),
    ("validation_fraction", 1.0),
    ("n_iter_no_change", 0),
    ("scoring", "balanced"),
    ("scoring", None),
    ("callbacks", 42),
    ("checkpoint_dir", 3),
    ("memory", 3),
    ("image_shape", "8x8"),
    ("data_format", "NCHW"),
    ("spatial_dims", 1),
    ("spatial_dims", 4),
    ("device", 0),
    ("precision", "float16"),
    ("compile", "yes"),
    ("warm_start", "yes"),
    ("net_params", ["lr"]),
    ("random_state", -1),
    ("random_state", np.random.default_rng(0)),
    ("verbose", -1),
]
SOFTMAX = [
    ("loss", "hinge"),
    ("class_weight", "auto"),
    ("class_weight", [1, 2, 3]),
    ("post_hoc_tau", -0.1),
    ("mixup", "cutmix"),
    ("mixup_alpha", 0),
]
CSSN = [
    ("lam", -1),
    ("lam", np.inf),
    ("soft_ratio", 1.5),
    ("class_loss_weight", -0.1),
    ("class_link", "sigmoid"),
    ("reference", "other"),
    ("n_tokens", 3),
    ("dropout", 1.0),
    ("pair_weighting", "inverse"),
    ("aux_weight", -1),
    ("pair_view", "both"),
    ("bank", "nearest"),
    ("symmetric", 2),
    ("backbone_lr", -1),
    ("batch_size", 1),
]
PARAMETERS = [
    (cls, *pair)
    for cls in IMAGE_ESTIMATORS.values()
    for pair in SHARED + {SoftmaxClassifier: SOFTMAX, CSSNClassifier: CSSN}.get(cls, [])
    if pair[0] in cls().get_params(deep=False)
]


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    PARAMETERS,
    ids=[f"{c.__name__}-{n}-{i}" for i, (c, n, _) in enumerate(PARAMETERS)],
)
def test_parameter_out_of_range(cls, name, value):
    match = f"'{name}' parameter of {cls.__name__}"
    assert_refuses(make(cls, **{name: value}), InvalidParameterError, match)


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (FocalLoss(gamma=-1), "gamma"),
        (ClassBalancedLoss(beta=1.0), "beta"),
        (LDAMLoss(max_margin=0), "max_margin"),
        (LogitAdjustedLoss(tau=-1), "tau"),
        (CrossEntropyLoss(reweight_after=2), "reweight_after"),
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", [SoftmaxClassifier, SPMixClassifier])
def test_parameter_of_a_loss_out_of_range(cls, loss, name):
    match = f"'{name}' parameter of {type(loss).__name__}"
    assert_refuses(make(cls, loss=loss), InvalidParameterError, match)


@pytest.mark.parametrize(("name", "value"), SHARED + SOFTMAX)
def test_partial_fit_checks_parameters_too(name, value):
    clf = make(**{name: value})
    with pytest.raises(InvalidParameterError, match=f"'{name}' parameter"):
        clf.partial_fit(X, Y)
    assert_not_fitted(clf)


class NoTensor(nn.Module):
    def forward(self, x):
        return x, x


class Scalar(nn.Module):
    def forward(self, x):
        return x.sum()


class NeedsWidth(nn.Module):
    def __init__(self, width):
        super().__init__()


BACKBONES = {
    "unknown name": ("resnet99", ValueError, "backbone='resnet99' is unknown.*resnet18"),
    "no module": (dict, TypeError, "backbone must be a name.*dict"),
    "class that needs arguments": (
        NeedsWidth,
        ValueError,
        r"backbone: NeedsWidth\(\) failed.*width",
    ),
    "output no tensor": (NoTensor(), ValueError, "backbone must return a tensor.*tuple"),
    "output a scalar": (Scalar(), ValueError, r"backbone must return a tensor.*shape \(\)"),
    "refuses the image": (nn.Linear(3, 4), ValueError, r"backbone=Linear failed.*\(1, 8, 8\)"),
    "depth": (ResNet(depth=19), ValueError, "depth must be one of.*19"),
    "no widths": (ConvNet(widths=()), ValueError, "widths must be"),
    "negative width": (ConvNet(widths=(4, -1)), ValueError, "widths must be"),
    "weights of no file": (ConvNet((4,), weights="missing.pt"), FileNotFoundError, "missing.pt"),
}


@EACH_ESTIMATOR
@pytest.mark.parametrize("case", BACKBONES)
def test_backbone(cls, case):
    backbone, error, match = BACKBONES[case]
    assert_refuses(make(cls, backbone=backbone), error, match)


def test_image_backbone_on_vectors():
    assert_refuses(make(), ValueError, "backbone ConvNet works on 2-D images.*64,", X=FLAT)


# ---------------------------------------------------------------- X


def spoilt(images, row, value):
    images = images.astype(np.float64)
    images[row].flat[0] = value
    return images


def array_of_arrays(odd):
    array = np.empty(24, dtype=object)
    array[:] = [image[:5] if row == odd else image for row, image in enumerate(X)]
    return array


def channels(*shape):
    return np.random.default_rng(1).random((24, *shape))


IMAGES = {
    "wrong product": (
        FLAT,
        {"image_shape": (8, 9)},
        ValueError,
        r"image_shape=\(8, 9\) holds 72.*64",
    ),
    "rank 0": (FLAT, {"image_shape": ()}, ValueError, r"image_shape=\(\)"),
    "rank 1": (FLAT, {"image_shape": (64,)}, ValueError, r"1 axes.*image_shape"),
    "rank 5": (FLAT, {"image_shape": (1, 1, 1, 8, 8)}, ValueError, r"5 axes.*image_shape"),
    "against n-D X": (X, {"image_shape": (1, 8, 8)}, ValueError, "image_shape=.*disagrees with X"),
    "negative sides": (FLAT, {"image_shape": (-8, -8)}, ValueError, "image_shape"),
    "fractional side": (FLAT, {"image_shape": (8.5, 8)}, (ValueError, TypeError), "image_shape"),
    "letters": (FLAT, {"image_shape": ("a", 8)}, (ValueError, TypeError), "image_shape"),
    "3 and 3 channels": (channels(3, 8, 3), {}, ValueError, "ambiguous.*both.*data_format"),
    "12 channels": (channels(12, 8, 8), {}, ValueError, "ambiguous.*side.*data_format"),
    "volume as 2-D": (channels(1, 8, 8, 8), {"spatial_dims": 2}, ValueError, "set spatial_dims"),
    "image as 3-D": (X, {"spatial_dims": 3}, ValueError, "set spatial_dims"),
    "1-D": (X[:, 0, 0], {}, ValueError, "Expected 2D array, got 1D"),
    "6-D": (channels(1, 1, 2, 4, 4), {}, ValueError, "X have 5 axes"),
    "None": (None, {}, ValueError, "Expected 2D array"),
    "a path": ("images/", {}, ValueError, "Expected 2D array"),
    "zero side": (np.zeros((24, 0, 8)), {}, ValueError, r"empty axis.*\(0, 8\)"),
    "zero channels": (np.zeros((24, 0, 8, 8)), {}, ValueError, r"empty axis|ambiguous"),
    "zero features": (np.zeros((24, 0)), {}, ValueError, r"0 feature\(s\)"),
    "ragged arrays": ([*X[:20], X[0, :5], *X[:3]], {}, ValueError, r"row 20 has shape \(5, 8\)"),
    "ragged tensors": (
        [*torch.from_numpy(X[:20]), torch.zeros(8, 7), *X[:3]],
        {},
        ValueError,
        r"row 20 has shape \(8, 7\)",
    ),
    "ragged lists": ([*FLAT[:20].tolist(), [1, 2], *FLAT[:3].tolist()], {}, ValueError, "row 20"),
    "a missing image": ([*X[:20], None, *X[:3]], {}, ValueError, "row 20"),
    "array of arrays": (array_of_arrays(20), {}, ValueError, r"row 20 has shape \(5, 8\)"),
    "objects": (np.array([["a"] * 8] * 24, dtype=object), {}, ValueError, "'a'"),
    "strings": (X.astype(str), {}, ValueError, "bytes/strings"),
    "flat strings": (FLAT.astype(str), {}, ValueError, "bytes/strings"),
    "complex": (X.astype(complex), {}, ValueError, "Complex data not supported"),
    "dates": (X.astype("datetime64[s]"), {}, ValueError, "dtype datetime64"),
    "sparse": (sparse.csr_matrix(FLAT), {}, TypeError, "Sparse data was passed for X"),
    "NaN": (spoilt(X, 5, np.nan), {}, ValueError, "X contains NaN: see row 5"),
    "infinity": (spoilt(X, 7, np.inf), {}, ValueError, "X contains infinity: see row 7"),
    "minus infinity": (spoilt(X, 8, -np.inf), {}, ValueError, "X contains infinity: see row 8"),
    "both infinities": (
        spoilt(spoilt(X, 9, -np.inf), 11, np.inf),
        {},
        ValueError,
        "X contains infinity: see row 9",
    ),
    "NaN in flat images": (
        spoilt(FLAT, 5, np.nan),
        {"image_shape": (8, 8)},
        ValueError,
        "(?s)X contains NaN.*row 5",
    ),
    "beyond float32": (spoilt(X, 3, 1e300), {}, ValueError, "row 3"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_images(case):
    images, params, error, match = IMAGES[case]
    assert_refuses(make(**params), error, match, X=images)


@EACH_ESTIMATOR
@pytest.mark.parametrize(
    "case", ["NaN", "ragged arrays", "wrong product", "3 and 3 channels", "6-D"]
)
def test_images_of_every_estimator(cls, case):
    images, params, error, match = IMAGES[case]
    assert_refuses(make(cls, **params), error, match, X=images)


@EACH_ESTIMATOR
def test_no_images(cls):
    assert_refuses(make(cls), ValueError, r"0 sample\(s\)", X=X[:0], y=Y[:0])


# ---------------------------------------------------------------- y, weights, groups

LABELS = {
    "None": (None, ValueError, "y to be passed"),
    "NaN": (np.where(Y == 1, np.nan, Y), ValueError, "row 1 .8 rows in all.*AMIMVClassifier"),
    "continuous": (Y + 0.5, ValueError, "Unknown label type: continuous"),
    "one-hot": (np.eye(3)[Y], ValueError, "y should be a 1d array"),
    "scalar": (np.array(3), ValueError, "y should be a 1d array"),
    "short": (Y[:-1], ValueError, r"inconsistent numbers of samples: \[24, 23\]"),
    "empty": ([], ValueError, r"inconsistent numbers of samples: \[24, 0\]"),
    "one class": (np.zeros(24), ValueError, r"at least 2 classes in y, but found 1 class: \[0"),
    "a missing label": (
        np.array(["a", "b", None] * 8, dtype=object),
        (TypeError, ValueError),
        r"\by\b",
    ),
    "mixed types": (np.array(["a", 1] * 12, dtype=object), (TypeError, ValueError), r"\by\b"),
}


@EACH
@pytest.mark.parametrize("case", LABELS)
def test_labels(cls, case):
    y, error, match = LABELS[case]
    if cls is AMIMVClassifier and case == "NaN":
        match = match.replace("AMIMVClassifier", "use -1")
    assert_refuses(make(cls), error, match, y=y)


NO_LABEL = {
    "None": lambda: [*"abc" * 7, "a", None, None],
    "NaN in a list of texts": lambda: [*"abc" * 7, "a", np.nan, np.nan],
    "NaN in a list": lambda: [*[0, 1, 2] * 7, 0, np.nan, np.nan],
    "float16": lambda: np.append(Y[:22], [np.nan, np.nan]).astype(np.float16),
    "masked": lambda: np.ma.MaskedArray(Y, np.arange(24) >= 22),
    "object": lambda: np.array([*Y[:22], None, np.nan], dtype=object),
    "Int64": lambda: pandas().Series([*Y[:22], None, None], dtype="Int64"),
    "Float64": lambda: pandas().array([*Y[:22], None, None], dtype="Float64"),
    "string": lambda: pandas().Series([*"abc" * 7, "a", None, None], dtype="string"),
    "category": lambda: pandas().Series([*"abc" * 7, "a", None, None], dtype="category"),
    "boolean": lambda: pandas().Series([True, False] * 11 + [None] * 2, dtype="boolean"),
    "NA": lambda: pandas().Series([*Y[:22], pandas().NA, pandas().NaT], dtype=object),
    "column": lambda: np.append(Y[:22], [np.nan, np.nan]).reshape(-1, 1),
}


def pandas():
    return pytest.importorskip("pandas")


@EACH
@pytest.mark.parametrize("case", NO_LABEL)
def test_rows_without_a_label(cls, case):
    advice = "use -1" if cls is AMIMVClassifier else "leave such images out, or give .* -1 in AMIMV"
    match = rf"y has no label in row 22 \(2 rows in all\): {advice}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataConversionWarning)
        assert_refuses(make(cls), ValueError, match, y=NO_LABEL[case]())


@pytest.mark.parametrize("case", NO_LABEL)
def test_encoders_take_rows_without_a_label_for_unknown(case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataConversionWarning)
        unknown = SSLEncoder(**ENCODER).fit(X, NO_LABEL[case]())
    assert "knn_score" in unknown.history_[0]


ENCODER = {"backbone": ConvNet(widths=(4, 8)), "max_epochs": 1, "random_state": 0}


WEIGHTS = {
    "negative": (np.where(Y == 0, -1.0, 1.0), "Negative values.*sample_weight"),
    "short": (np.ones(3), r"sample_weight.shape == \(3,\)"),
    "2-D": (np.ones((24, 2)), "(?i)sample.weights must be 1D"),
    "zero": (np.zeros(24), "(?i)sample.weight.*zero"),
    "NaN": (np.where(Y == 0, np.nan, 1.0), "sample_weight contains NaN"),
    "infinite": (np.where(Y == 0, np.inf, 1.0), "sample_weight contains infinity"),
    "on one class only": ((Y == 0).astype(float), "at least 2 classes"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_sample_weight(case):
    weight, match = WEIGHTS[case]
    assert_refuses(make(), ValueError, match, sample_weight=weight)


def test_cssn_takes_no_sample_weight():
    assert_refuses(make(CSSNClassifier), TypeError, "sample_weight", sample_weight=ONES)


CLASS_WEIGHTS = {
    "class missing": {0: 1.0, 7: 2.0},
    "class too many": {0: 1.0, 1: 1.0, 2: 1.0, 7: 2.0},
    "negative": {0: -1.0, 1: 1.0, 2: 1.0},
    "NaN": {0: np.nan, 1: 1.0, 2: 1.0},
    "text": {0: "heavy", 1: 1.0, 2: 1.0},
}


@pytest.mark.parametrize("case", CLASS_WEIGHTS)
def test_class_weight(case):
    assert_refuses(make(class_weight=CLASS_WEIGHTS[case]), ValueError, "class_weight")


GROUPS = {
    "short": (np.arange(5), ValueError, "groups"),
    "2-D": (np.zeros((24, 2)), ValueError, "groups"),
    "one group": (np.zeros(24), ValueError, "groups holds a single group"),
    "a class in one group": (
        Y,
        ValueError,
        "some class lies within one group.*early_stopping=False",
    ),
}


@EACH
@pytest.mark.parametrize("case", GROUPS)
def test_groups(cls, case):
    groups, error, match = GROUPS[case]
    assert_refuses(make(cls, early_stopping=True), error, match, groups=groups)


# ---------------------------------------------------------------- combinations


def minority_of_two():
    return np.r_[np.zeros(22, int), 1, 1]


COMBINATIONS = {
    "one sample per class": (
        {"early_stopping": True},
        {"X": X[:3], "y": Y[:3]},
        ValueError,
        "early_stopping=False",
    ),
    "scorer of another kind": (
        {"early_stopping": True, "scoring": "roc_auc"},
        {},
        ValueError,
        "multi_class",
    ),
    "scorer with another signature": (
        {"early_stopping": True, "scoring": lambda estimator: 1.0},
        {},
        TypeError,
        "positional argument",
    ),
    "scorer that gives NaN": (
        {"early_stopping": True, "scoring": lambda estimator, X, y: np.nan},
        {},
        ValueError,
        "scoring",
    ),
    "sampler class": ({"sampler": RandomOverSampler}, {}, TypeError, "sampler"),
    "too few neighbours": (
        {"sampler": SMOTE()},
        {"y": minority_of_two()},
        ValueError,
        "n_neighbors",
    ),
    "made rows have no weight": (
        {"sampler": SMOTE()},
        {"sample_weight": ONES},
        ValueError,
        "sampler=SMOTE.*sample_weight",
    ),
    "sampler reads lazy images": (
        {"sampler": SMOTE()},
        {"X": Lazy(X)},
        ValueError,
        "sampler=SMOTE.*RandomOverSampler",
    ),
    "smoothed copies of lazy images": (
        {"sampler": RandomOverSampler(shrinkage=1.0)},
        {"X": Lazy(X)},
        ValueError,
        "sampler=RandomOverSampler needs every image in memory",
    ),
    "unknown GPU": ({"device": "cuda:99"}, {}, ValueError, 'device=.cuda:99.*device="auto"'),
    "unknown device": ({"device": "nonsense"}, {}, ValueError, "device='nonsense' cannot be used"),
    "device without data": ({"device": "meta"}, {}, ValueError, "device"),
    "unknown preset": ({"augment": "heavy"}, {}, ValueError, "augment must be one of.*'heavy'"),
    "rotation out of range": (
        {"augment": Augmentation(rotation=999)},
        {},
        ValueError,
        "rotation must be",
    ),
    "augmentation class": ({"augment": Augmentation}, {}, TypeError, "augment must be"),
    "callback of no kind": ({"callbacks": [42]}, {}, (TypeError, ValueError), "callbacks"),
    "misspelt net parameter": (
        {"net_params": {"optimiser": torch.optim.SGD}},
        {},
        ValueError,
        "optimiser",
    ),
    "net parameter that is ours": (
        {"net_params": {"module": nn.Linear}},
        {},
        (TypeError, ValueError),
        "net_params",
    ),
    "diverging": (
        {"lr": 1e30, "max_epochs": 5, "augment": None},
        {},
        ValueError,
        r"loss became (nan|inf).*lower lr \(now 1e\+30\)",
    ),
}


@pytest.mark.parametrize("case", COMBINATIONS)
def test_combination(case):
    params, call, error, match = COMBINATIONS[case]
    assert_refuses(make(**params), error, match, **call)


def test_no_gpu_here():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without GPU")
    assert_refuses(make(device="cuda"), ValueError, 'device=.cuda.*0 CUDA GPUs.*"auto"')


@EACH
def test_index_sampler_on_lazy_images_is_fine(cls):
    clf = make(cls, sampler=RandomOverSampler()).fit(Lazy(X), minority_of_two())
    assert clf.predict(Lazy(X)).shape == (24,)


PAIRED = {
    "gray images": X,
    "flat images": FLAT,
    "three images a case": channels(3, 8, 8),
}


@pytest.mark.parametrize("case", PAIRED)
def test_paired_reference_needs_pairs(case):
    clf = make(CSSNClassifier, reference="paired")
    assert_refuses(clf, ValueError, r'reference="paired" needs X of shape \(n, 2', X=PAIRED[case])


TOKENS = {
    "one token": (X, nn.AdaptiveAvgPool2d(1), "at least 4 patch tokens, but backbone gives 1"),
    "three tokens": (X, nn.AdaptiveAvgPool2d((1, 3)), "at least 4 .* but backbone gives 3"),
    "three features": (FLAT, nn.Linear(64, 3), "backbone returns 3 features"),
    "17 features": (FLAT, nn.Linear(64, 17), "backbone returns 17 features"),
}


@pytest.mark.parametrize("case", TOKENS)
def test_cssn_needs_four_tokens(case):
    images, module, match = TOKENS[case]
    assert_refuses(make(CSSNClassifier, backbone=module), ValueError, match, X=images)


# ---------------------------------------------------------------- checkpoints


class Crash(Callback):
    """The machine fails in the second epoch."""

    def on_epoch_end(self, net, **kwargs):
        if len(net.history) == 2:
            raise RuntimeError("out of power")


WATCHERS.add(Crash)  # a fit may end without it


def left_checkpoint(directory, **params):
    """What a crashed fit leaves."""
    params = {"max_epochs": 3, "checkpoint_dir": directory, **params}
    clf = make(**params, callbacks=[Crash()])
    with pytest.raises(RuntimeError, match="out of power"):
        clf.fit(X, Y)
    assert_not_fitted(clf)
    (path,) = directory.glob("*.checkpoint")
    return path


@pytest.mark.parametrize("below", ["", "folder"])
def test_checkpoint_dir_is_a_file(tmp_path, below):
    path = tmp_path / "file"
    path.write_text("")
    assert_refuses(make(checkpoint_dir=path / below), (ValueError, OSError), "checkpoint_dir")


@pytest.mark.parametrize("below", ["", "folder"])
def test_memory_is_a_file(tmp_path, below):
    path = tmp_path / "file"
    path.write_text("")
    assert_refuses(make(memory=str(path / below)), ValueError, "memory=.*cannot be used as a dir")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:1],
        lambda data: data[:100],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-5],
        lambda data: bytes(500),
        lambda data: b"hello world",
        lambda data: b"\x55" * 16 + data[16:],
        lambda data: data[:-200] + b"\x55" * 16 + data[-184:],
    ],
    ids=["empty", "byte", "head", "half", "tail", "zeros", "text", "start", "directory"],
)
def test_damaged_checkpoint(tmp_path, damage):
    path = left_checkpoint(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    clf = make(max_epochs=3, checkpoint_dir=tmp_path)
    assert_refuses(clf, ValueError, f"checkpoint is damaged.*{path.name}.*checkpoint_dir")


@pytest.mark.parametrize("content", ["tensor", "list", "nothing else"])
def test_checkpoint_of_other_content(tmp_path, content):
    path = left_checkpoint(tmp_path)
    contents = {
        "tensor": torch.zeros(3),
        "list": [1],
        "nothing else": {"format": 1, "token": path.stem},
    }
    torch.save(contents[content], path)
    clf = make(max_epochs=3, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=f"checkpoint is damaged.*{path.name}"):
        clf.fit(X, Y)
    assert_not_fitted(clf)


def test_foreign_checkpoint(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    path = left_checkpoint(tmp_path / "a")
    left_checkpoint(tmp_path / "b", lr=0.01).replace(path)
    clf = make(max_epochs=3, checkpoint_dir=tmp_path / "a")
    assert_refuses(clf, ValueError, "belongs to another fit.*Delete.*checkpoint_dir")


def test_sound_checkpoint_is_taken(tmp_path):
    """Without damage the same call succeeds: the tests above fail for the right reason."""
    path = left_checkpoint(tmp_path)
    clf = make(max_epochs=3, checkpoint_dir=tmp_path).fit(X, Y)
    assert len(clf.history_) == 3
    assert not path.exists()


# ---------------------------------------------------------------- a model that exists already


@pytest.fixture(
    params=CLASSIFIERS.values(),
    ids=CLASSIFIERS,
)
def model(request):
    return make(request.param).fit(X, Y)


REFITS = {
    "images with NaN": ({}, spoilt(X, 5, np.nan), Y, "see row 5"),
    "one class": ({}, X, np.zeros(24), "at least 2 classes"),
    "labels missing": ({}, X, None, "y to be passed"),
    "other size and one class": ({}, X[:, :6, :6], np.zeros(24), "at least 2 classes"),
    "backbone": ({"backbone": "nope"}, X, Y, "backbone='nope'"),
    "parameter": ({"lr": -1}, X, Y, "'lr' parameter"),
    "augmentation": ({"augment": Augmentation(rotation=999)}, X, Y, "rotation must be"),
    "sampler": ({"sampler": SMOTE()}, X, minority_of_two(), "n_neighbors"),
    "diverging": ({"lr": 1e38, "max_epochs": 5, "augment": None}, X, Y * 10, "lower lr"),
    "crash": ({"callbacks": [Crash()], "max_epochs": 3}, X[:, :6, :6], Y + 5, "out of power"),
}


@pytest.mark.parametrize("case", REFITS)
def test_failed_refit_leaves_the_model(model, case):
    params, images, y, match = REFITS[case]
    before, proba = model.get_params(deep=False), model.predict_proba(X)
    attributes = set(fitted_attributes(model))
    with pytest.raises((ValueError, RuntimeError), match=match):
        model.set_params(**params).fit(images, y)
    model.set_params(**before)
    assert set(fitted_attributes(model)) == attributes
    np.testing.assert_array_equal(model.predict_proba(X), proba)
    np.testing.assert_array_equal(model.classes_, [0, 1, 2])
    assert model.image_shape_ == (1, 8, 8)


class FailsLater:
    """Breaks in the second step of a fit."""

    def draw(self, n, image_shape, generator):
        return {}

    def apply(self, images, params):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls > 2:
            raise RuntimeError("no more")
        return images


@pytest.mark.parametrize("how", ["partial_fit", "warm_start"])
def test_failure_in_the_middle_of_more_training_leaves_the_model(how):
    model = make(batch_size=8, warm_start=how == "warm_start", lr=0.1).fit(X, Y)
    proba, n_epochs = model.predict_proba(X), len(model.history_)
    model.set_params(augment=FailsLater())
    with pytest.raises(RuntimeError, match="no more"):
        (model.fit if how == "warm_start" else model.partial_fit)(X, Y)
    np.testing.assert_array_equal(model.predict_proba(X), proba)
    assert len(model.history_) == n_epochs
    # The next call goes on from there.
    model.set_params(augment=None)
    (model.fit if how == "warm_start" else model.partial_fit)(X, Y)
    assert len(model.history_) == n_epochs + 1


def test_partial_fit_with_a_new_class():
    model = make().partial_fit(X, Y)
    proba = model.predict_proba(X)
    with pytest.raises(ValueError, match=r"y holds classes \[3\].*classes=\.\.\."):
        model.partial_fit(X, Y + 1)
    np.testing.assert_array_equal(model.predict_proba(X), proba)


def test_partial_fit_with_incomplete_classes():
    clf = make()
    with pytest.raises(ValueError, match=r"classes \[2\] that are not among \[0, 1\]"):
        clf.partial_fit(X, Y, classes=[0, 1])
    assert_not_fitted(clf)
    with pytest.raises(ValueError, match="at least 2 classes"):
        clf.partial_fit(X, Y, classes=[0])
    assert_not_fitted(clf)


@EACH
def test_warm_start_with_a_new_class(cls):
    model = make(cls, warm_start=True).fit(X, Y)
    proba = model.predict_proba(X)
    with pytest.raises(ValueError, match=r"classes \[3\].*warm_start=False"):
        model.fit(X, Y + 1)
    np.testing.assert_array_equal(model.predict_proba(X), proba)


def test_warm_start_with_another_size():
    model = make(warm_start=True).fit(X, Y)
    with pytest.raises(ValueError, match=r"shape \(1, 6, 6\).*fitted on.*\(1, 8, 8\)"):
        model.fit(X[:, :6, :6], Y)


OTHER_IMAGES = {
    "size": (X[:, :6, :6], r"shape \(1, 6, 6\).*fitted on images of shape \(1, 8, 8\)"),
    "channels": (channels(3, 8, 8), r"shape \(3, 8, 8\).*fitted on images of shape \(1, 8, 8\)"),
    "flat": (FLAT, r"shape \(64,\).*\(1, 8, 8\)"),
    "another length": (FLAT[:, :10], "10 features, but .* expecting 64"),
    "a single image": (X[0], "8 features, but .* expecting 64"),
    "none": (X[:0], r"0 sample\(s\)"),
    "NaN": (spoilt(X, 5, np.nan), "NaN: see row 5"),
}


@pytest.mark.parametrize("case", OTHER_IMAGES)
def test_predict_refuses(model, case):
    images, match = OTHER_IMAGES[case]
    methods = [model.predict, model.predict_proba, model.decision_function, model.transform]
    if isinstance(model, CSSNClassifier):
        methods += [model.similarity, model.explain]
    for method in methods:
        with pytest.raises(ValueError, match=match):
            method(images)


def test_floats_up_to_255_after_uint8_training(model):
    """They would be read as 255 times too bright."""
    with pytest.raises((ValueError, UserWarning), match="uint8"):
        model.predict(FLOAT)


def test_uint8_after_training_on_floats_up_to_255():
    """They would be read as 255 times too dark."""
    model = make().fit(FLOAT, Y)
    with pytest.raises((ValueError, UserWarning), match="uint8"):
        model.predict(X)


def test_unit_floats_after_uint8_training(model):
    """These are what the network knows, so they pass."""
    np.testing.assert_allclose(
        model.predict_proba(FLOAT / 255), model.predict_proba(X), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("n_neighbors", [0, -1, 25, 1.5, "3"])
def test_explain_neighbours(n_neighbors):
    model = make(CSSNClassifier).fit(X, Y)
    assert len(model.support_indices_) == 24
    with pytest.raises((ValueError, TypeError), match="n_neighbors"):
        model.explain(X, n_neighbors)


def test_compare_different_lengths():
    model = make(CSSNClassifier).fit(X, Y)
    with pytest.raises(ValueError, match=r"inconsistent numbers of samples: \[3, 2\]"):
        model.pair_proba(X[:3], X[:2])


@pytest.mark.parametrize(
    "method",
    ["predict", "predict_proba", "decision_function", "transform", "similarity", "explain"],
)
def test_nothing_works_before_fit(method):
    with pytest.raises(NotFittedError, match="CSSNClassifier instance is not fitted"):
        getattr(CSSNClassifier(), method)(X)


def test_no_weights_before_fit():
    with pytest.raises(NotFittedError):
        _ = SoftmaxClassifier().weights_


# ---------------------------------------------------------------- data sets

Y_TAIL = np.repeat([0, 1, 2], [10, 8, 6])
TAILS = {
    "ratio below one": ({"imbalance_ratio": 0.5}, Y_TAIL, "imbalance_ratio=0.5"),
    "ratio NaN": ({"imbalance_ratio": np.nan}, Y_TAIL, "imbalance_ratio"),
    "ratio infinite": ({"imbalance_ratio": np.inf}, Y_TAIL, "imbalance_ratio"),
    "kind": ({"kind": "linear"}, Y_TAIL, "kind='linear'"),
    "fewer images than classes": ({"n_samples": 2}, Y_TAIL, "n_samples=2"),
    "fractional size": ({"n_samples": 9.5}, Y_TAIL, "n_samples=9.5"),
    "too large": ({"n_samples": 24}, Y_TAIL, r"n_samples=24 is more than.*\[10, 8, 6\]"),
    "class left out": ({"class_order": [0, 1]}, Y_TAIL, "class_order must name each class"),
    "class twice": ({"class_order": [0, 1, 1, 2]}, Y_TAIL, "class_order must name each class"),
    "unknown class": ({"class_order": [0, 1, 5]}, Y_TAIL, "class_order must name each class"),
    "one class": ({}, np.zeros(24, int), "y holds one class only"),
    "another length": ({}, Y_TAIL[:-1], r"inconsistent numbers of samples: \[24, 23\]"),
    "one-hot": ({}, np.eye(3)[Y_TAIL], "1d array"),
    "NaN": ({}, np.where(Y_TAIL == 1, np.nan, Y_TAIL), "y has no label in row 10 .8 rows in all"),
    "seed": ({"random_state": "a"}, Y_TAIL, "seed"),
}


@pytest.mark.parametrize("case", TAILS)
def test_make_long_tailed(case):
    params, y, match = TAILS[case]
    with pytest.raises(ValueError, match=match):
        make_long_tailed(X, y, **params)


@pytest.mark.parametrize("size", [0, -1, 2.5, "4", 9])
def test_load_npz_image_size(tmp_path, size):
    np.savez(tmp_path / "a.npz", images=X, labels=Y)
    with pytest.raises((ValueError, TypeError), match="image_size"):
        load_npz(tmp_path / "a.npz", image_size=size)


def test_load_npz_split(tmp_path):
    with pytest.raises(ValueError, match="split='dev'"):
        load_npz(tmp_path / "a.npz", "dev")
