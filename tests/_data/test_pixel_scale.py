"""One gate where pixels get their scale: by dtype, in every container, mixture and call."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from imblearn.over_sampling import SMOTE
from sklearn.base import BaseEstimator

from sklearn_medimb import (
    AMIMVClassifier,
    CSSNClassifier,
    MetricTwoStageClassifier,
    SaliencyMap,
    SoftmaxClassifier,
    SPMixSampler,
    SSLEncoder,
)
from sklearn_medimb._data.images import read_images
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.datasets import DatasetImages, MappedImages
from tests.estimators import IMAGE_ESTIMATORS, taken
from tests.helpers import Items

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (12, 8, 9), dtype=np.uint8)
UNIT = X / 255
FLOAT = X.astype(float)
Y = np.arange(12) % 3
IMBALANCED = np.repeat([0, 1, 2], [6, 4, 2])
SHARED = {
    "backbone": ConvNet(widths=(4, 8)),
    "max_epochs": 1,
    "batch_size": 8,
    "device": "cpu",
    "precision": "float64",
    "random_state": 0,
}


def make(cls=SoftmaxClassifier, **params):
    if cls is CSSNClassifier:
        params = {"n_tokens": 4, **params}
    if cls is AMIMVClassifier:
        params = {"pretrain": None, "fine_tune": "full", **params}
    return cls(**{**taken(cls, SHARED), **params})


# ---------------------------------------------------------------- containers


class Lazy:
    """Announces what its first image is."""

    def __init__(self, images):
        self.images = images
        self.shape = (len(images), *np.shape(images[0]))
        self.ndim = len(self.shape)
        self.dtype = np.asarray(images[0]).dtype

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        key = key[0] if isinstance(key, tuple) else key
        return Lazy([self.images[k] for k in key]) if np.ndim(key) else self.images[key]


def objects(images):
    array = np.empty(len(images), dtype=object)
    array[:] = images
    return array


LISTS = {
    "list": list,
    "tuple": tuple,
    "tensors": lambda images: [i if i.dtype.kind == "U" else torch.from_numpy(i) for i in images],
    "objects": objects,
    "column": lambda images: pd.DataFrame({"image": objects(images)})["image"],
}
LAZY = {"data set": Items, "wrapped": lambda images: DatasetImages(Items(images)), "lazy": Lazy}


# ---------------------------------------------------------------- mixtures in one X


def mixed(odd, even=X, odd_rows=(3, 5, 8)):
    return [odd[row] if row in odd_rows else even[row] for row in range(len(even))]


MASKS = X > 127
# Images, and the array that they are once each has been converted by hand; None is refused.
MIXTURES = {
    "uint8, float": (mixed(UNIT), UNIT),
    "float, uint8": (mixed(X, UNIT), UNIT),
    "uint8, float32": (
        mixed(UNIT.astype(np.float32)),
        np.stack(mixed(UNIT.astype(np.float32), UNIT)),
    ),
    "uint8, bool": (mixed(MASKS), np.stack(mixed(MASKS * 1.0, UNIT))),
    "bool, float": (mixed(UNIT, MASKS), np.stack(mixed(UNIT, MASKS * 1.0))),
    "uint8, float, bool": (
        mixed(MASKS, mixed(UNIT), (8,)),
        np.stack(mixed(MASKS * 1.0, UNIT, (8,))),
    ),
    "float32, float64": (mixed(FLOAT, FLOAT.astype(np.float32)), FLOAT),
    "int16, int32": (mixed(X.astype(np.int16), X.astype(np.int32)), FLOAT),
    "uint8, uint16": (mixed(X.astype(np.uint16)), None),
    "uint8, int64": (mixed(X.astype(np.int64)), None),
    "uint8, int8": (mixed(X.astype(np.int8)), None),
    "bool, uint16": (mixed(X.astype(np.uint16), MASKS), None),
    "float, uint16": (mixed(X.astype(np.uint16) * 257, UNIT), None),
    "uint8, complex": (mixed(UNIT.astype(complex)), None),
    "uint8, text": (mixed(X.astype(str)), None),
    "uint8, float to 255": (mixed(FLOAT), None),
    "uint8, standardised": (mixed(UNIT - 0.5), None),
    "bool, float to 255": (mixed(FLOAT, MASKS), None),
}
UNIFORM = ("float32, float64", "int16, int32")  # of one scale anyway


def pixels(X, **params):
    images = read_images(BaseEstimator(), X, reset=True, float_dtype=np.float64, **params)
    found = images.rows(np.arange(len(images))).numpy()
    return found / 255 if images.dtype == np.uint8 else found


@pytest.mark.parametrize("container", [*LISTS, *LAZY])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_mixture_is_converted_or_its_row_named(mixture, container):
    images, expected = MIXTURES[mixture]
    if container in LAZY and mixture not in UNIFORM:
        expected = None
    X = {**LISTS, **LAZY}[container](images)
    if expected is None:
        with pytest.raises(ValueError, match=r"(?i)\brow 3\b"):
            pixels(X)
        return
    np.testing.assert_array_equal(pixels(X)[:, 0], expected)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_mixture_in_an_array_of_objects(mixture):
    """NumPy keeps Python's numbers of images of one size: uint8 is not known as such any more."""
    images, expected = MIXTURES[mixture]
    whole = [np.asarray(image).dtype.kind in "iu" for image in images]
    X = np.array(images, dtype=object)
    if mixture in ("uint8, complex", "uint8, text") or (any(whole) and not all(whole)):
        with pytest.raises(ValueError, match=r"\brow 3\b"):
            pixels(X)
    elif expected is not None:
        np.testing.assert_array_equal(pixels(X)[:, 0], np.stack(images))


def test_flattened_images_of_a_list():
    images = [image.ravel() for image in mixed(UNIT)]
    np.testing.assert_array_equal(pixels(images, image_shape=(8, 9))[:, 0], UNIT)
    with pytest.raises(ValueError, match=r"\brow 3\b"):
        pixels([image.ravel() for image in mixed(FLOAT)], image_shape=(8, 9))


def test_table_of_pixels_mixes_columns():
    flat = pd.DataFrame(X.reshape(12, -1))
    with pytest.raises(ValueError, match=r"mixes columns.*7 has dtype float64"):
        pixels(flat.assign(**{"7": 0.5}).rename(columns=str), image_shape=(1, 73))
    np.testing.assert_array_equal(pixels(flat, image_shape=(8, 9))[:, 0], UNIT)


def test_numbers_of_python_are_floats():
    rows = [[1, 2, 3], [0.5, 1, 300], [4, 5, 6]]
    np.testing.assert_array_equal(pixels(rows), rows)
    scalars = [[np.int64(1), np.float64(0.5)], [np.int64(7), np.float64(0.25)]]
    np.testing.assert_array_equal(pixels(scalars), [[1, 0.5], [7, 0.25]])


def test_mixture_within_a_pair_is_named():
    pairs = [(image, UNIT[0]) for image in X]
    np.testing.assert_array_equal(pixels(pairs, paired=True)[:, 1], np.stack([UNIT[0]] * 12))
    pairs[3] = (X[0], FLOAT[0])
    with pytest.raises(
        ValueError, match=r"Row 3 of X could not be read.*image 1 has dtype float64"
    ):
        pixels(pairs, paired=True)


def test_broken_value_in_a_mixture_is_named():
    images = mixed(UNIT)
    images[5] = np.where(np.arange(9) == 2, np.nan, images[5])
    with pytest.raises(ValueError, match="NaN: see row 5"):
        pixels(images)


def test_uint8_in_a_mixture_takes_the_dtype_of_the_batches():
    images = read_images(BaseEstimator(), mixed(UNIT.astype(np.float32)), reset=True)
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images.data, UNIT.astype(np.float32))


# ---------------------------------------------------------------- every call


def probabilities(cls, images, y=Y, **params):
    return make(cls, **params).fit(images, y).predict_proba(UNIT)


def resampled(images):
    sampler = SPMixSampler(mix_prob=1.0, device="cpu", random_state=0)
    return sampler.fit_resample(images, IMBALANCED)[0]


def paired(images):
    """Query and reference of different dtypes in one tuple."""
    other = [UNIT[0] if row == 1 else X[0] for row in range(12)]
    pairs = list(zip(images, other, strict=True))
    if isinstance(images, np.ndarray):
        pairs = np.stack([np.stack([a, UNIT[0]]) for a in images])
    clf = make(CSSNClassifier, reference="paired").fit(pairs, Y)
    return clf.predict_proba(pairs)


FITTED: dict = {}


def fitted(cls=SoftmaxClassifier):
    """One classifier for all calls that only ask."""
    if cls not in FITTED:
        FITTED[cls] = make(cls).fit(UNIT, Y)
    return FITTED[cls]


def continued(images):
    clf = make(warm_start=True).fit(UNIT, Y).partial_fit(images, Y)
    return clf.fit(images, Y).predict_proba(UNIT)


CALLS = {
    "fit": lambda images: probabilities(SoftmaxClassifier, images),
    "early stopping": lambda images: probabilities(
        SoftmaxClassifier, images, early_stopping=True, validation_fraction=0.4
    ),
    "oversampling": lambda images: probabilities(
        SoftmaxClassifier, images, IMBALANCED, sampler=SMOTE(k_neighbors=1)
    ),
    "mixing in training": lambda images: probabilities(
        SoftmaxClassifier, images, IMBALANCED, sampler=SPMixSampler(device="cpu")
    ),
    "partly labelled": lambda images: probabilities(
        AMIMVClassifier, images, np.where(Y == 2, -1, Y), pretrain=None
    ),
    "predict": lambda images: fitted().predict_proba(images),
    "transform": lambda images: fitted().transform(images),
    "pair_proba": lambda images: fitted(CSSNClassifier).pair_proba(images, UNIT),
    "further training": continued,
    "refit_head": lambda images: (
        make(MetricTwoStageClassifier).fit(UNIT, Y).refit_head(images, Y).predict_proba(UNIT)
    ),
    "encoder": lambda images: make(SSLEncoder).fit(images).transform(UNIT),
    "encode": lambda images: fitted(SSLEncoder).transform(images),
    "fitted start": lambda images: probabilities(
        SoftmaxClassifier, images, backbone=fitted(SSLEncoder)
    ),
    "sampler": resampled,
    "saliency": lambda images: SaliencyMap(device="cpu").fit_transform(images),
    "pairs": paired,
}


@pytest.mark.filterwarnings("ignore:The features have all but collapsed")
@pytest.mark.parametrize("call", CALLS)
def test_every_call_converts_mixtures(call):
    np.testing.assert_array_equal(CALLS[call](mixed(UNIT)), CALLS[call](UNIT))


@pytest.mark.parametrize("call", CALLS)
def test_every_call_refuses_what_is_uncertain(call):
    with pytest.raises(ValueError, match=r"(?i)\brow 3\b"):
        CALLS[call](mixed(X.astype(np.uint16)))


def test_data_set_that_mixes_dtypes_is_refused_by_calls():
    for images in (mixed(UNIT), mixed(X.astype(np.uint16), UNIT)):
        for call in ("fit", "encoder", "sampler", "saliency"):
            with pytest.raises(ValueError, match=r"\brow 3\b"):
                CALLS[call](Items(images))


# ---------------------------------------------------------------- maps


def with_maps(maps):
    sampler = SPMixSampler(mix_prob=1.0, device="cpu", random_state=0)
    return sampler.fit_resample(UNIT, IMBALANCED, maps=maps)[0]


MAPS = {
    "bool, uint8": [m if k % 2 else m * np.uint8(255) for k, m in enumerate(MASKS)],
    "bool, 0 and 1": [m if k % 2 else m.astype(np.uint8) for k, m in enumerate(MASKS)],
    "bool, float": [m if k % 2 else m * 1.0 for k, m in enumerate(MASKS)],
    "uint8, float": [m * np.uint8(255) if k % 2 else m * 1.0 for k, m in enumerate(MASKS)],
    "all": [
        (m, m * 1.0, m * np.uint8(255), m.astype(np.int64))[k % 4] for k, m in enumerate(MASKS)
    ],
}


@pytest.mark.parametrize("container", ["list", "tuple", "objects", "tensors"])
@pytest.mark.parametrize("mixture", MAPS)
def test_maps_are_read_by_their_own_dtype(mixture, container):
    np.testing.assert_array_equal(with_maps(LISTS[container](MAPS[mixture])), with_maps(MASKS))


@pytest.mark.parametrize("odd", [MASKS[4].astype(np.uint8), X[4].astype(np.uint16) * 257])
def test_maps_on_another_scale_are_named(odd):
    maps = [odd if row == 4 else m.astype(odd.dtype) * 255 for row, m in enumerate(MASKS)]
    with pytest.raises(ValueError, match="map of row 4"):
        with_maps(np.stack(maps))
    maps[3] = MASKS[3]
    if odd.max() > 1:
        with pytest.raises(ValueError, match="map of row 4"):
            with_maps(maps)


# ---------------------------------------------------------------- pictures


def picture(mode, image):
    module = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    if mode == "1":
        return module.fromarray(image[..., 0] > 127)
    if mode.startswith("I;16"):
        return module.fromarray(np.asarray(image, dtype=np.uint16) * 200)
    if mode == "P":
        return module.fromarray(image).quantize(16)
    return module.fromarray(image).convert(mode)


COLOURED = RNG.integers(0, 256, (12, 8, 9, 3), dtype=np.uint8)
COLOURED[:, :4] //= 8  # so that palettes differ from one image to the next
PICTURES = {
    "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "HSV": "RGB", "RGB": "RGB", "RGBA": "RGBA",
    "L": "L", "1": "L",
}  # fmt: skip


@pytest.mark.parametrize("container", ["list", "tuple", "objects", "column", *LAZY])
@pytest.mark.parametrize("mode", PICTURES)
def test_pictures_are_read_as_intensities(mode, container):
    images = [picture(mode, image) for image in COLOURED]
    expected = np.stack([np.asarray(image.convert(PICTURES[mode])) for image in images]) / 255
    X = {**LISTS, **LAZY}[container](images)
    if container == "lazy" and mode in ("P", "CMYK"):  # it announces another shape
        with pytest.raises(ValueError, match="row 0 has shape"):
            pixels(X)
        return
    found = pixels(X)
    np.testing.assert_array_equal(
        found, np.moveaxis(np.atleast_3d(expected).reshape(12, 8, 9, -1), -1, 1)
    )


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBa"])
def test_modes_with_transparency_are_rgba(mode):
    given = {"La": "LA", "RGBa": "RGBA"}.get(mode, mode)
    images = [picture(given, image) for image in COLOURED]
    expected = np.stack([np.asarray(image.convert("RGBA")) for image in images]) / 255
    found = pixels([image.convert(mode) for image in images])
    np.testing.assert_array_equal(found, np.moveaxis(expected, -1, 1))


@pytest.mark.parametrize("of", [list, lambda images: [image.tolist() for image in images]])
def test_table_of_one_column_of_images(of):
    images = of(X)
    table = pd.DataFrame({"im": images})
    given = np.stack([np.asarray(image) for image in images]) / (1 if of is not list else 255)
    np.testing.assert_array_equal(pixels(table)[:, 0], given)
    clf = make().fit(table, Y)
    expected = make().fit(table["im"], Y).predict_proba(table["im"])
    np.testing.assert_array_equal(clf.predict_proba(table), expected)
    with pytest.raises(ValueError, match="table of 2 columns, of which column 'im' holds images"):
        clf.predict(table.assign(age=1))


def test_palette_with_transparency():
    images = [picture("P", image) for image in COLOURED]
    for image in images:
        image.info["transparency"] = 0
    assert pixels(images).shape == (12, 4, 8, 9)


def test_sixteen_bits_are_whole_numbers():
    images = [picture("I;16", image[..., 0]) for image in COLOURED]
    assert images[0].mode.startswith("I;16")
    np.testing.assert_array_equal(pixels(images)[:, 0], COLOURED[..., 0] * 200.0)
    images[3] = picture("L", COLOURED[3])
    with pytest.raises(ValueError, match=r"row 3\b.*uint8"):
        pixels(images)


@pytest.mark.parametrize("container", ["list", "tuple", "objects", "column"])
@pytest.mark.parametrize(
    ("first", "other"), [("L", "RGB"), ("RGB", "L"), ("RGBA", "RGB"), ("P", "L")]
)
def test_mixed_modes_are_named(first, other, container):
    images = [picture(other if row == 5 else first, image) for row, image in enumerate(COLOURED)]
    with pytest.raises(ValueError, match=f"modes: row 0 is {first}, row 5 is {other}"):
        pixels(LISTS[container](images))


def test_mixed_modes_of_one_meaning():
    images = [picture(("RGB", "P", "CMYK")[k % 3], image) for k, image in enumerate(COLOURED)]
    expected = np.stack([np.asarray(image.convert("RGB")) for image in images])
    np.testing.assert_array_equal(pixels(images), np.moveaxis(expected, -1, 1) / 255)


class Unknown:
    """Quacks like a PIL image of a mode that Pillow cannot convert."""

    mode, size, info = "XYZ", (9, 8), {}
    __array_interface__ = X[0].__array_interface__

    def convert(self, mode):
        raise ValueError(f"conversion from XYZ to {mode} not supported")


@pytest.mark.parametrize("container", [list, objects, Items])
def test_mode_without_a_way_to_rgb_is_named(container):
    images = [Unknown() if row == 3 else image for row, image in enumerate(COLOURED)]
    with pytest.raises(ValueError, match=r"Row 3 of X could not be read.*mode XYZ"):
        pixels(container(images))


# ---------------------------------------------------------------- fit, then another scale


def mapped(images, tmp_path=[]):  # noqa: B006
    """A file per array, in a folder that outlives the call."""
    if not tmp_path:
        tmp_path.append(tempfile.TemporaryDirectory())
    path = Path(tmp_path[0].name) / f"{len(list(Path(tmp_path[0].name).iterdir()))}.npy"
    np.save(path, images)
    return MappedImages(path)


CONTAINERS = {"array": np.asarray, **LISTS, **LAZY, "mapped": mapped}
SHORT = ("array", "lazy", "mapped")
SCALES = {
    "uint8": X,
    "unit": UNIT,
    "float32 unit": UNIT.astype(np.float32),
    "to 255": FLOAT,
    "uint16": X.astype(np.uint16) * 257,
    "/ 255 twice": UNIT / 255,
}
UNCHANGED = (
    {("uint8", "unit"), ("unit", "uint8"), ("float32 unit", "uint8")}
    | {(name, name) for name in SCALES}
    | {
        pair
        for a, b in [("unit", "float32 unit"), ("uint8", "float32 unit")]
        for pair in [(a, b), (b, a)]
    }
)
CLASSIFIERS: dict = {}


def fitted_on(scale, container):
    if (scale, container) not in CLASSIFIERS:
        clf = make().fit(CONTAINERS[container](SCALES[scale]), Y)
        CLASSIFIERS[scale, container] = clf
    return CLASSIFIERS[scale, container]


@pytest.mark.parametrize("at_fit", ["array", "lazy", "mapped"])
@pytest.mark.parametrize("later", SCALES)
@pytest.mark.parametrize("scale", SCALES)
def test_another_scale_than_in_fit(scale, later, at_fit):
    clf = fitted_on(scale, at_fit)
    for at_predict in ("array", "list", "data set", "lazy", "mapped"):
        images = CONTAINERS[at_predict](SCALES[later])
        if (scale, later) in UNCHANGED:
            assert np.isfinite(clf.predict_proba(images)).all()
            continue
        with pytest.raises(ValueError, match="SoftmaxClassifier was fitted on"):
            clf.predict_proba(images)


@pytest.mark.parametrize("container", SHORT)
@pytest.mark.parametrize(
    ("scale", "later"),
    [("uint8", "to 255"), ("unit", "to 255"), ("to 255", "uint8"), ("to 255", "unit")],
)
def test_further_training_on_another_scale(scale, later, container):
    images = CONTAINERS[container](SCALES[later])
    for name, call in {
        "partial_fit": lambda clf: clf.partial_fit(images, Y),
        "warm start": lambda clf: clf.set_params(warm_start=True).fit(images, Y),
        "fitted start": lambda clf: make(backbone=clf).fit(images, Y),
        "with a sampler": lambda clf: make(
            backbone=clf, sampler=SPMixSampler(device="cpu", mix_prob=1.0)
        ).fit(images, IMBALANCED),
    }.items():
        clf = make().fit(SCALES[scale], Y)
        before = clf.predict_proba(SCALES[scale])
        with pytest.raises(ValueError, match="SoftmaxClassifier was fitted on"):
            call(clf)
        np.testing.assert_array_equal(clf.predict_proba(SCALES[scale]), before, err_msg=name)


@pytest.mark.parametrize("container", SHORT)
@pytest.mark.parametrize(
    ("scale", "later"),
    [("to 255", "uint8"), ("uint8", "to 255"), ("unit", "to 255"), ("to 255", "unit")],
)
def test_encoder_of_another_scale(scale, later, container):
    encoder = make(SSLEncoder).fit(CONTAINERS[container](SCALES[scale]))
    images = CONTAINERS[container](SCALES[later])
    for params in ({"backbone": encoder}, {"pretrain": encoder}):
        clf = make(**params)
        with pytest.raises(ValueError, match="SSLEncoder was fitted on"):
            clf.fit(images, Y)
        assert not hasattr(clf, "net_")
    with pytest.raises(ValueError, match="SSLEncoder was fitted on"):
        encoder.transform(images)


def test_refit_head_on_another_scale():
    clf = make(MetricTwoStageClassifier).fit(X, Y)
    head = clf.head_
    for images in (FLOAT, Lazy(FLOAT), mapped(FLOAT)):
        with pytest.raises(ValueError, match="MetricTwoStageClassifier was fitted on"):
            clf.refit_head(images, Y)
    assert clf.head_ is head


@pytest.mark.parametrize("container", SHORT)
def test_range_is_known_of_every_container(container):
    assert fitted_on("to 255", container).pixel_range_ == X.max()
    assert fitted_on("uint8", container).pixel_range_ == "uint8"
    started = make(backbone=fitted_on("to 255", container)).fit(CONTAINERS[container](FLOAT), Y)
    assert started.pixel_range_ == X.max()
    started = make(backbone=fitted_on("uint8", container)).fit(CONTAINERS[container](UNIT), Y)
    assert started.pixel_range_ == 1.0


def test_row_of_another_scale_is_named():
    images = UNIT.copy()
    images[7] *= 255
    for scale in ("uint8", "unit"):
        for container in SHORT:
            with pytest.raises(ValueError, match=r"row 7\b"):
                fitted_on(scale, "array").predict(CONTAINERS[container](images))


VOXELS = RNG.normal(0, 300, (12, 8, 9)).clip(-1000, 1500)  # Hounsfield units
FAITHFUL = {
    "darker": (UNIT, UNIT * 0.2),
    "one black image": (UNIT, np.zeros((1, 8, 9))),
    "one black image after uint8": (X, np.zeros((1, 8, 9))),
    "black images of 0 to 255": (FLOAT, np.zeros((4, 8, 9))),
    "one dark image among others": (FLOAT, np.concatenate([X[:1] % 4, FLOAT[1:]])),
    "overshoot": (X, UNIT * 1.3 - 0.1),
    "brighter than all": (np.where(np.arange(9) == 0, UNIT, 0), np.ones((2, 8, 9))),
    "standardised": ((UNIT - UNIT.mean()) / UNIT.std(), (UNIT[:2] - UNIT.mean()) / UNIT.std()),
    "air": (VOXELS, np.full((1, 8, 9), -1000.0) + RNG.normal(0, 9, (1, 8, 9))),
    "metal": (VOXELS, np.where(np.arange(72).reshape(8, 9) == 5, 30000.0, VOXELS[:3])),
    "a bright sequence": (VOXELS, VOXELS * 4),
    "blank in fit": (np.zeros((12, 8, 9)), UNIT),
}


@pytest.mark.parametrize("container", ["array", "lazy"])
@pytest.mark.parametrize("case", FAITHFUL)
def test_no_false_alarm(case, container):
    known, images = FAITHFUL[case]
    clf = make().fit(CONTAINERS[container](known), Y)
    assert np.isfinite(clf.predict_proba(CONTAINERS[container](images))).all()


def divided(images, rows=slice(1, None, 2)):
    """Some of the images divided by 255, in one call."""
    images = np.array(images, dtype=float)
    images[rows] /= 255
    return images


@pytest.mark.parametrize(
    ("call", "container"),
    [
        *((call, "array") for call in CALLS),
        *(
            (call, container)
            for call in ("fit", "predict", "sampler", "pairs of either")
            for container in ("list", "lazy", "mapped", "column", "data set")
        ),
    ],
)
def test_some_rows_divided_by_255_are_named(call, container):
    images, ask = divided(FLOAT), CALLS.get(call)
    if ask is None:
        images = np.stack([images, FLOAT], axis=1)
        ask = lambda pairs: make(CSSNClassifier, reference="paired").fit(pairs, Y)  # noqa: E731
    images = CONTAINERS[container](list(images))
    with pytest.raises(ValueError, match=r"(?i)\brow [1-9]|image 0 .*uint8|uint8.* image 0"):
        ask(images)


@pytest.mark.parametrize("where", ["all at once", "batch by batch"])
def test_a_row_divided_by_255_is_no_dark_image_beside_bright_ones(where):
    clf, images = fitted_on("to 255", "array"), divided(FLOAT, [4])
    images = images if where == "all at once" else Lazy(images)
    with pytest.raises(ValueError, match=r"row 4 holds floats in \[0, 1\].*row \d+ floats up to 2"):
        clf.predict(images)


def test_interpolated_rows_divided_by_255_are_told_where_they_are_many():
    smooth = (FLOAT + 0.37 * np.roll(FLOAT, 1, axis=1)) / 1.37
    with pytest.raises(ValueError, match="row 1 holds floats in"):
        pixels(divided(smooth))
    pixels(divided(smooth, [1]))  # a dark one, for all that is known


HONEST = {
    "standardised": (RNG.normal(size=(12, 8, 9)) * 100).astype(np.float32),
    "positive, standardised": np.abs(RNG.normal(size=(12, 8, 9))) * np.arange(1, 13)[:, None, None],
    "nearly blank slices": np.where(
        np.arange(12)[:, None, None] % 2, VOXELS, RNG.random((12, 8, 9)) * 0.9 - 0.1
    ),
    "blank slices": VOXELS * (np.arange(12) % 2)[:, None, None],
    "dark frames": np.where(np.arange(12)[:, None, None] % 2, X % 4, FLOAT),
    "darker frames": np.where(np.arange(12)[:, None, None] % 2, X % 2, FLOAT),
    "dark means of colours": np.where(np.arange(12)[:, None, None] % 4, FLOAT, X % 4 / 3),
    "faint noise": np.where(np.arange(12)[:, None, None] % 2, RNG.random((12, 8, 9)) / 9, FLOAT),
    "masks": np.where(np.arange(12)[:, None, None] % 2, MASKS, FLOAT),
}


@pytest.mark.parametrize("container", ["array", "lazy"])
@pytest.mark.parametrize("case", HONEST)
def test_honest_images_are_on_one_scale(case, container):
    images = HONEST[case]
    np.testing.assert_array_equal(pixels(CONTAINERS[container](images))[:, 0], images)


def test_vectors_have_no_common_scale_but_that_of_uint8():
    rows = RNG.random((12, 5)) * [1, 10, 1e3, 1e-3, 1]
    clf = make(backbone="auto").fit(rows, Y)
    assert np.isfinite(clf.predict_proba(rows * 300)).all()
    with pytest.raises(ValueError, match=r"X is uint8.*was fitted on floats up to"):
        clf.predict(rows.astype(np.uint8))
    clf = make(backbone="auto").fit(rows.astype(np.uint8), Y)
    with pytest.raises(ValueError, match=r"was fitted on uint8"):
        clf.predict(rows)


@pytest.mark.parametrize("container", SHORT)
def test_old_models_without_a_range_still_predict(container):
    clf = pickle.loads(pickle.dumps(fitted_on("to 255", "lazy")))
    clf.pixel_range_ = None  # as lazy floats left it
    expected = fitted_on("to 255", "lazy").predict_proba(FLOAT)
    np.testing.assert_array_equal(clf.predict_proba(CONTAINERS[container](FLOAT)), expected)


# ---------------------------------------------------------------- values that are no pixels

ASKS = ("predict", "predict_proba", "decision_function", "transform")


@pytest.mark.parametrize("container", ["array", "lazy", "mapped"])
@pytest.mark.parametrize("cls", IMAGE_ESTIMATORS.values(), ids=IMAGE_ESTIMATORS)
def test_absurd_pixel_is_named(cls, container):
    clf = fitted(cls)
    for value in (3e38, -3e38, 1e30):
        images = UNIT.astype(np.float32)
        images[7, 2, 3] = value
        images = CONTAINERS[container](images)
        asks = [name for name in (*ASKS, "similarity", "explain") if hasattr(clf, name)]
        for name in asks:
            with pytest.raises(ValueError, match=r"\brow 7\b"):
                getattr(clf, name)(images)
        if cls is CSSNClassifier:
            for pair in ((UNIT, images), (images, UNIT)):
                with pytest.raises(ValueError, match=r"\brow 7\b"):
                    clf.pair_proba(*pair)


def test_absurd_pixel_in_a_map_is_named():
    images = UNIT.astype(np.float32)
    images[7, 2, 3] = 3e38
    for lazy in (Lazy(images), mapped(images)):
        with pytest.raises(ValueError, match="row 7"):
            resampled(lazy)
    with pytest.raises(ValueError, match="row 7"):
        SaliencyMap(device="cpu").fit_transform(images)
    with pytest.raises(ValueError, match="row 7"):
        resampled(images)


def test_absurd_value_of_a_vector_is_named():
    rows = RNG.random((12, 5))
    clf = make(backbone="auto", precision="float32").fit(rows, Y)
    rows[7, 2] = 3e38
    for ask in ASKS:
        with pytest.raises(ValueError, match=r"\brow 7\b"):
            getattr(clf, ask)(rows)


def test_weights_that_have_diverged_are_no_answer():
    clf = make().fit(UNIT, Y)
    for weight in clf.net_.module_.parameters():
        weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"row 0 .*diverged"):
        clf.predict(UNIT)


@pytest.mark.parametrize("container", ["array", "lazy", "mapped"])
@pytest.mark.parametrize("value", [3e38, -3.4e38, 1e20])
@pytest.mark.parametrize("cls", [SoftmaxClassifier, SSLEncoder])
def test_mark_of_missing_pixels_in_fit_is_named(cls, value, container):
    images = UNIT.astype(np.float32)
    images[7, 2, 3] = value
    clf = make(cls)
    with pytest.raises(ValueError, match=r"\brow 7\b"):
        clf.fit(CONTAINERS[container](images), Y)
    assert not hasattr(clf, "net_")


# ---------------------------------------------------------------- files that change


def in_worker(X):
    """What another process sees, and what it then predicts on."""
    return pickle.loads(pickle.dumps(X))


REPLACED = {
    "dtype": UNIT,
    "byte order": X.astype(">u2"),
    "axes": np.ascontiguousarray(X.transpose(0, 2, 1)),
    "memory order": np.asfortranarray(X),
    "more rows": np.concatenate([X, X]),
    "fewer rows": X[:5],
    "other images": X[::-1],
    "no images": np.zeros(3),
}


@pytest.mark.parametrize("where", ["same process", "worker"])
@pytest.mark.parametrize("case", REPLACED)
def test_file_replaced_by_another_is_refused(case, where, tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, X)
    images = MappedImages(path)[2:]
    clf = fitted_on("uint8", "array")
    clf.predict(images)
    np.save(tmp_path / "other.npy", REPLACED[case])
    (tmp_path / "other.npy").replace(path)
    images = images if where == "same process" else in_worker(images)
    for ask in (clf.predict, lambda images: images[0], lambda images: images.take([0])):
        with pytest.raises(ValueError, match=r"images\.npy.*is not the file that it was"):
            ask(images)


def test_file_overwritten_in_place_is_refused(tmp_path):
    """The pages that are mapped show the new bytes, behind the old dtype."""
    path = tmp_path / "images.npy"
    np.save(path, X)
    images = MappedImages(path)
    np.save(path, UNIT)
    with pytest.raises(ValueError, match="is not the file that it was: it holds float64"):
        images.take(np.arange(3))


def test_file_written_anew_as_it_was_is_the_same(tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, X)
    images = MappedImages(path)
    np.save(tmp_path / "other.npy", X)
    (tmp_path / "other.npy").replace(path)
    for same in (images, in_worker(images)):
        np.testing.assert_array_equal(same.take(np.arange(12)), X)


@pytest.mark.parametrize(
    "shape",
    [(-1, 8, 8), (-1, -8, 8), (2**40, 2**40, 8), (12, -8, -9), (2**63, 1, 1), (10**30, 8, 8)],
)
def test_header_that_makes_no_sense(shape, tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, X)
    body = path.read_bytes()
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    forged = body[:8] + len(header).to_bytes(2, "little") + header.encode() + X.tobytes()
    path.write_bytes(forged)
    with pytest.raises(ValueError, match=r"images\.npy.*is no \.npy file of images"):
        MappedImages(path)
