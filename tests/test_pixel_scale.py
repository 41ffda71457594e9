"""One gate where pixels get their scale: by dtype, in every container, mixture and call."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from imblearn.over_sampling import SMOTE
from sklearn.base import BaseEstimator
from torch.utils.data import Dataset

from sklearn_medimb import (
    AMIMVClassifier,
    CSSNClassifier,
    MetricTwoStageClassifier,
    SaliencyMap,
    SoftmaxClassifier,
    SPMixSampler,
    SSLEncoder,
)
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.datasets import DatasetImages
from sklearn_medimb.images import read_images

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
    return cls(**{**SHARED, **params})


# ---------------------------------------------------------------- containers


class Items(Dataset):
    """A map-style data set."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return self.images[row], 0


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
    "tensors": lambda images: [torch.from_numpy(image) for image in images],
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
    if any(whole) and not all(whole):
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
    "compare": lambda images: fitted(CSSNClassifier).compare(images, UNIT),
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
