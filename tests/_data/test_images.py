"""Which axis is which, which dtype is kept, and what is never copied."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import BaseEstimator
from sklearn.model_selection import cross_val_score
from sklearn.utils import _safe_indexing
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from sklearn_medimb import SoftmaxClassifier, datasets
from sklearn_medimb._data.containers import DatasetImages, is_lazy
from sklearn_medimb._data.files import wrap_dataset
from sklearn_medimb._data.images import Images, channel_statistics, read_images
from sklearn_medimb._data.layout import Layout, infer_layout
from sklearn_medimb._data.pixel_scale import to_unit_scale
from sklearn_medimb.backbones import ConvNet
from tests.helpers import Items

U8, F32, F64 = np.dtype(np.uint8), np.dtype(np.float32), np.dtype(np.float64)


def images_of(array, **layout):
    return Images(array, infer_layout(array.shape, **layout), array.dtype)


class Lazy:
    """Images loaded one at a time; counts what it loads."""

    def __init__(self, images, *, dtype=None, shape=None):
        self.images = images
        self.shape = shape or images.shape
        self.ndim = len(self.shape)
        self.dtype = np.dtype(dtype or images.dtype)
        self.loaded = []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        self.loaded.append(int(row))
        return self.images[row]


class Broken(Lazy):
    """One image is not what it should be."""

    def __init__(self, images, bad_row, bad_image, **params):
        super().__init__(images, **params)
        self.bad_row, self.bad_image = bad_row, bad_image

    def __getitem__(self, row):
        if row != self.bad_row:
            return super().__getitem__(row)
        if self.bad_image is None:
            raise OSError("file is gone")
        return self.bad_image


# ---------------------------------------------------------------- infer_layout

LAST, FIRST = {"data_format": "channels_last"}, {"data_format": "channels_first"}
VOLUME, FLAT2D, PAIR = {"spatial_dims": 3}, {"spatial_dims": 2}, {"paired": True}

LAYOUTS = [
    # (shape of X, parameters, canonical shape of one image)
    ((5, 12), {}, (12,)),
    ((5, 1), {}, (1,)),
    ((5, 12), FIRST, (12,)),
    ((5, 12), LAST, (12,)),
    # flattened images
    ((5, 12), {"image_shape": (3, 4)}, (1, 3, 4)),
    ((5, 12), {"image_shape": [3, 4]}, (1, 3, 4)),
    ((5, 12), {"image_shape": (1, 3, 4), **FIRST}, (1, 3, 4)),
    ((5, 60), {"image_shape": (3, 4, 5)}, (3, 4, 5)),
    ((5, 60), {"image_shape": (4, 5, 3), **LAST}, (3, 4, 5)),
    ((5, 90), {"image_shape": (5, 6, 3)}, (3, 5, 6)),
    ((5, 210), {"image_shape": (5, 6, 7), **VOLUME}, (1, 5, 6, 7)),
    ((5, 210), {"image_shape": (1, 5, 6, 7)}, (1, 5, 6, 7)),
    ((5, 630), {"image_shape": (5, 6, 7, 3)}, (3, 5, 6, 7)),
    # gray
    ((5, 6, 7), {}, (1, 6, 7)),
    ((5, 6, 7), LAST, (1, 6, 7)),
    ((5, 3, 4), {}, (1, 3, 4)),
    ((5, 1, 1), {}, (1, 1, 1)),
    ((5, 6, 7), {"image_shape": (6, 7)}, (1, 6, 7)),
    # one of the ends looks like channels
    ((5, 3, 8, 9), {}, (3, 8, 9)),
    ((5, 1, 8, 9), {}, (1, 8, 9)),
    ((5, 4, 8, 9), {}, (4, 8, 9)),
    ((5, 8, 9, 3), {}, (3, 8, 9)),
    ((5, 8, 9, 1), {}, (1, 8, 9)),
    ((5, 8, 9, 4), {}, (4, 8, 9)),
    ((5, 8, 9, 3), FLAT2D, (3, 8, 9)),
    # neither does: the first, if it is no longer than a side
    ((5, 2, 8, 9), {}, (2, 8, 9)),
    ((5, 7, 8, 8), {}, (7, 8, 8)),
    ((5, 8, 8, 8), None, "ambiguous.*side.*spatial_dims=3"),
    ((5, 9, 8, 8), None, "ambiguous.*side.*data_format"),
    ((5, 8, 9, 2), None, "ambiguous.*side.*data_format"),
    # both do
    ((5, 3, 8, 3), None, "ambiguous.*both.*data_format"),
    ((5, 1, 8, 4), None, "ambiguous.*both.*data_format"),
    ((5, 4, 4, 4), None, "ambiguous.*both.*data_format"),
    ((5, 3, 8, 3), FIRST, (3, 8, 3)),
    ((5, 3, 8, 3), LAST, (3, 3, 8)),
    ((5, 9, 8, 8), FIRST, (9, 8, 8)),
    ((5, 9, 8, 7), LAST, (7, 9, 8)),
    ((5, 3, 8, 9), LAST, (9, 3, 8)),
    # volumes
    ((5, 6, 7, 8), VOLUME, (1, 6, 7, 8)),
    ((5, 3, 7, 8), VOLUME, (1, 3, 7, 8)),
    ((5, 6, 7, 3), {**VOLUME, **LAST}, (1, 6, 7, 3)),
    ((5, 1, 6, 7, 8), {}, (1, 6, 7, 8)),
    ((5, 2, 6, 7, 8), {}, (2, 6, 7, 8)),
    ((5, 6, 7, 8, 3), {}, (3, 6, 7, 8)),
    ((5, 1, 6, 7, 8), VOLUME, (1, 6, 7, 8)),
    ((5, 6, 7, 8, 2), LAST, (2, 6, 7, 8)),
    ((5, 1, 6, 7, 1), None, "ambiguous.*both"),
    ((5, 9, 6, 7, 8), None, "ambiguous.*side"),
    # pairs
    ((5, 2, 6, 7), PAIR, (2, 6, 7)),
    ((5, 2, 3, 6, 7), PAIR, (6, 6, 7)),
    ((5, 2, 6, 7, 3), PAIR, (6, 6, 7)),
    ((5, 2, 6, 7, 5), {**PAIR, **LAST}, (10, 6, 7)),
    ((5, 2, 6, 7, 8), {**PAIR, **VOLUME}, (2, 6, 7, 8)),
    ((5, 2, 1, 6, 7, 8), PAIR, (2, 6, 7, 8)),
    ((5, 84), {**PAIR, "image_shape": (2, 6, 7)}, (2, 6, 7)),
    ((5, 84), PAIR, r'reference="paired" needs X of shape \(n, 2'),
    ((5, 6, 7), PAIR, r'reference="paired" needs X of shape \(n, 2'),
    ((5, 3, 6, 7), PAIR, r'reference="paired" needs X of shape \(n, 2'),
    ((5, 2, 7), PAIR, r'reference="paired" needs X of shape \(n, 2'),
    ((5, 2, 3, 6, 3), PAIR, "ambiguous"),
    # wrong
    ((5, 12), {"image_shape": (3, 5)}, r"image_shape=\(3, 5\) holds 15 values.* hold 12"),
    ((5, 12), {"image_shape": (12,)}, "1 axes.*image_shape"),
    ((5, 12), {"image_shape": ()}, "image_shape"),
    ((5, 12), {"image_shape": (0, 12)}, "image_shape|empty axis"),
    ((5, 12), {"image_shape": (-3, -4)}, "image_shape"),
    ((5, 6, 7), {"image_shape": (7, 6)}, r"image_shape=\(7, 6\) disagrees.*\(6, 7\)"),
    ((5, 6, 7), {"image_shape": (1, 6, 7)}, "leave image_shape=None"),
    ((5, 6, 7), VOLUME, "2 axes.*set spatial_dims"),
    ((5, 1, 6, 7, 8), FLAT2D, "4 axes.*set spatial_dims"),
    ((5, 1, 1, 6, 7, 8), {}, "5 axes"),
    ((5, 0, 7), {}, "empty axis"),
    ((5, 3, 8, 0), FIRST, "empty axis"),
]


@pytest.mark.parametrize(("shape", "params", "expected"), LAYOUTS, ids=str)
def test_infer_layout(shape, params, expected):
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            infer_layout(shape, **(params or {}))
        return
    layout = infer_layout(shape, **params)
    assert layout.shape == expected
    batch = torch.zeros(shape)
    assert tuple(layout.canonical(batch).shape) == (shape[0], *expected)


def numbered(*shape):
    return np.arange(np.prod(shape)).reshape(shape)


CANONICAL = {
    "vectors": ((5, 12), {}, lambda x: x),
    "gray": ((5, 6, 7), {}, lambda x: x[:, None]),
    "flat gray": ((5, 42), {"image_shape": (6, 7)}, lambda x: x.reshape(5, 1, 6, 7)),
    "first": ((5, 3, 6, 7), {}, lambda x: x),
    "last": ((5, 6, 7, 3), {}, lambda x: x.transpose(0, 3, 1, 2)),
    "flat last": (
        (5, 126),
        {"image_shape": (6, 7, 3)},
        lambda x: x.reshape(5, 6, 7, 3).transpose(0, 3, 1, 2),
    ),
    "volume": ((5, 6, 7, 8), VOLUME, lambda x: x[:, None]),
    "volume last": ((5, 6, 7, 8, 3), {}, lambda x: x.transpose(0, 4, 1, 2, 3)),
    "pair": ((5, 2, 6, 7), PAIR, lambda x: x),
    "pair first": (
        (5, 2, 3, 6, 7),
        PAIR,
        lambda x: np.concatenate([x[:, 0], x[:, 1]], axis=1),
    ),
    "pair last": (
        (5, 2, 6, 7, 3),
        PAIR,
        lambda x: np.concatenate([x[:, 0], x[:, 1]], axis=3).transpose(0, 3, 1, 2),
    ),
    "pair of volumes": (
        (5, 2, 4, 6, 7, 8),
        {**PAIR, **FIRST},
        lambda x: np.concatenate([x[:, 0], x[:, 1]], axis=1),
    ),
    "pair of volumes last": (
        (5, 2, 6, 7, 8, 3),
        PAIR,
        lambda x: np.concatenate([x[:, 0], x[:, 1]], axis=4).transpose(0, 4, 1, 2, 3),
    ),
    "flat pair": (
        (5, 84),
        {**PAIR, "image_shape": (2, 6, 7)},
        lambda x: x.reshape(5, 2, 6, 7),
    ),
}


@pytest.mark.parametrize("case", CANONICAL)
def test_canonical_is_the_explicit_transpose(case):
    shape, params, explicit = CANONICAL[case]
    array = numbered(*shape)
    got = infer_layout(shape, **params).canonical(torch.from_numpy(array))
    np.testing.assert_array_equal(got.numpy(), explicit(array))


@pytest.mark.parametrize("case", ["gray", "first", "last", "volume", "pair first"])
def test_canonical_is_a_view(case):
    shape, params, _ = CANONICAL[case]
    batch = torch.from_numpy(numbered(*shape))
    got = infer_layout(shape, **params).canonical(batch)
    assert got.untyped_storage().data_ptr() == batch.untyped_storage().data_ptr()


def test_layouts_give_the_same_predictions():
    """Whoever stores the same images otherwise gets the same model."""
    rng = np.random.default_rng(0)
    last = rng.integers(0, 256, (18, 8, 9, 3), dtype=np.uint8)
    first = np.ascontiguousarray(last.transpose(0, 3, 1, 2))
    y = np.arange(18) % 3
    params = {
        "backbone": ConvNet((4, 8)),
        "max_epochs": 2,
        "precision": "float32",
        "device": "cpu",
        "random_state": 0,
    }
    expected = SoftmaxClassifier(**params).fit(first, y).predict_proba(first)
    stored = [
        (last, {}),
        (last.reshape(18, -1), {"image_shape": (8, 9, 3)}),
        (first.reshape(18, -1), {"image_shape": (3, 8, 9)}),
        (list(last), {}),
        (Lazy(last), {}),
        (torch.from_numpy(first), {}),
    ]
    for images, extra in stored:
        clf = SoftmaxClassifier(**params, **extra).fit(images, y)
        np.testing.assert_array_equal(clf.predict_proba(images), expected)


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("rows", [[0], [3, 1, 1, 4], []])
def test_rows_of_an_array(rows, dtype):
    array = numbered(5, 6, 7, 3).astype(dtype)
    batch = images_of(array).rows(np.array(rows, dtype=int))
    assert batch.dtype == torch.from_numpy(array).dtype
    np.testing.assert_array_equal(batch.numpy(), array[rows].transpose(0, 3, 1, 2))


def test_rows_are_a_copy():
    array = numbered(5, 6, 7).astype(np.uint8)
    before = array.copy()
    images_of(array).rows(np.arange(5)).zero_()
    np.testing.assert_array_equal(array, before)


def test_rows_of_a_read_only_memory_map(tmp_path):
    array = numbered(5, 6, 7).astype(np.uint8)
    np.save(tmp_path / "x.npy", array)
    stored = np.load(tmp_path / "x.npy", mmap_mode="r")
    images = read_images(BaseEstimator(), stored, reset=True)
    assert np.shares_memory(images.data, stored)
    batch = images.rows(np.array([4, 2]))
    np.testing.assert_array_equal(batch[:, 0].numpy(), array[[4, 2]])
    batch.zero_()  # writable, without touching the file
    np.testing.assert_array_equal(stored, array)


def test_lazy_rows_are_read_when_asked_for_only():
    array = numbered(5, 6, 7).astype(np.uint8)
    lazy = Lazy(array)
    images = read_images(BaseEstimator(), lazy, reset=True)
    assert images.lazy
    assert len(images) == 5
    assert lazy.loaded == []
    batch = images.rows(np.array([4, 2, 4]))
    np.testing.assert_array_equal(batch[:, 0].numpy(), array[[4, 2, 4]])
    assert lazy.loaded == [4, 2, 4]


def test_lazy_floats_become_the_dtype_of_the_batches():
    array = numbered(5, 6, 7).astype(np.float64)
    images = read_images(BaseEstimator(), Lazy(array), reset=True)
    assert images.rows(np.arange(2)).dtype == torch.float32
    images = read_images(BaseEstimator(), Lazy(array), reset=True, float_dtype=np.float64)
    assert images.rows(np.arange(2)).dtype == torch.float64


NOT_LAZY = {
    "array": np.zeros((2, 3, 4)),
    "tensor": torch.zeros(2, 3, 4),
    "list": [np.zeros((3, 4))] * 2,
    "tuple": (np.zeros((3, 4)),) * 2,
    "frame": pd.DataFrame(np.zeros((2, 3))),
    "two axes": Lazy(np.zeros((2, 3))),
    "no dtype": type("NoDtype", (), {"shape": (2, 3, 4), "ndim": 3, "__len__": lambda s: 2})(),
}


@pytest.mark.parametrize("case", NOT_LAZY)
def test_is_not_lazy(case):
    assert not is_lazy(NOT_LAZY[case])


def test_is_lazy():
    assert is_lazy(Lazy(np.zeros((2, 3, 4))))


BROKEN = {
    "unreadable": (None, "Row 7 of X could not be read.*file is gone"),
    "NaN": (np.full((6, 7), np.nan), "NaN: see row 7"),
    "infinite": (np.full((6, 7), -np.inf), "infinity: see row 7"),
    "another size": (np.zeros((6, 8)), "(?i)rows? 7"),
    "another rank": (np.zeros((1, 6, 7)), "(?i)rows? 7"),
    "no image": (np.array(None), "(?i)rows? 7"),
    "text": (np.full((6, 7), "a"), "(?i)rows? 7|dtype"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("rows", [[7], [3, 7, 8]], ids=str)
def test_broken_lazy_row_is_named(case, rows):
    image, match = BROKEN[case]
    images = images_of(Broken(np.zeros((9, 6, 7), np.float32), 7, image))
    with pytest.raises(ValueError, match=match):
        images.rows(np.array(rows))
    assert images.rows(np.array([3, 8])).shape == (2, 1, 6, 7)


def test_lazy_shape_must_be_true():
    images = images_of(Lazy(np.zeros((9, 6, 7)), shape=(9, 8, 8)))
    with pytest.raises(ValueError, match=r"announces images of shape \(8, 8\).*row 2.*\(6, 7\)"):
        images.rows(np.array([2, 5]))


def test_lazy_uint8_must_be_true():
    """Floats in [0, 1] behind an announced uint8 would all be rounded down to 0."""
    lazy = Lazy(np.random.default_rng(0).random((9, 6, 7)), dtype=np.uint8)
    images = read_images(BaseEstimator(), lazy, reset=True)
    with pytest.raises(ValueError, match="dtype"):
        images.rows(np.arange(3))


@pytest.mark.parametrize("dtype", [complex, "U1", object])
def test_lazy_dtype_must_be_a_number(dtype):
    lazy = Lazy(np.zeros((9, 6, 7)).astype(dtype))
    with pytest.raises(ValueError, match="dtype"):
        read_images(BaseEstimator(), lazy, reset=True)


# ---------------------------------------------------------------- dtypes and containers


@pytest.mark.parametrize(
    ("dtype", "float_dtype", "expected"),
    [
        (np.uint8, np.float32, U8),
        (np.uint8, np.float64, U8),
        (np.float32, np.float32, F32),
        (np.float32, np.float64, F64),
        (np.float64, np.float32, F32),
        (np.float64, np.float64, F64),
        (np.float16, np.float32, F32),
        (np.int8, np.float32, F32),
        (np.int16, np.float32, F32),
        (np.uint16, np.float32, F32),
        (np.int64, np.float64, F64),
        (np.bool_, np.float32, F32),
        (">f4", np.float32, F32),
        (">i2", np.float32, F32),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(5, 12), (5, 3, 4), (5, 3, 6, 7)], ids=str)
def test_dtype(shape, dtype, float_dtype, expected):
    array = (numbered(*shape) % 100).astype(dtype)
    images = read_images(BaseEstimator(), array, reset=True, float_dtype=float_dtype)
    assert images.dtype == expected
    assert images.data.dtype == expected
    assert images.data.dtype.isnative
    batch = images.rows(np.arange(5))
    np.testing.assert_array_equal(batch.reshape(shape).numpy(), array.astype(float))


@pytest.mark.parametrize("shape", [(5, 12), (5, 3, 4), (5, 3, 6, 7), (5, 1, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_no_copy(shape, dtype):
    array = numbered(*shape).astype(dtype)
    images = read_images(BaseEstimator(), array, reset=True)
    assert np.shares_memory(images.data, array)


def test_no_copy_of_float64_where_that_is_asked_for():
    array = numbered(5, 6, 7).astype(np.float64)
    images = read_images(BaseEstimator(), array, reset=True, float_dtype=np.float64)
    assert np.shares_memory(images.data, array)


def test_no_copy_of_a_tensor():
    tensor = torch.arange(210, dtype=torch.uint8).reshape(5, 6, 7)
    images = read_images(BaseEstimator(), tensor, reset=True)
    assert np.shares_memory(images.data, tensor.numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int32, torch.bool])
def test_tensor_dtypes(dtype):
    tensor = (torch.arange(210).reshape(5, 6, 7) % 97).to(dtype)
    images = read_images(BaseEstimator(), tensor, reset=True)
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images.data, tensor.float().numpy())


def test_tensor_that_requires_a_gradient():
    tensor = torch.rand(5, 6, 7, requires_grad=True)
    images = read_images(BaseEstimator(), tensor, reset=True)
    np.testing.assert_array_equal(images.data, tensor.detach().numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_list_of_tensors(dtype):
    tensors = list((torch.arange(210).reshape(5, 6, 7) % 97).to(dtype))
    images = read_images(BaseEstimator(), tensors, reset=True)
    assert images.dtype == (np.uint8 if dtype == torch.uint8 else np.float32)
    np.testing.assert_array_equal(images.data, torch.stack(tensors).float().numpy())


def test_list_of_images_keeps_uint8():
    array = numbered(5, 6, 7).astype(np.uint8)
    images = read_images(BaseEstimator(), list(array), reset=True)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images.data, array)


def test_nested_lists():
    """An array-like is an array-like."""
    array = numbered(5, 6, 7)
    images = read_images(BaseEstimator(), array.tolist(), reset=True)
    assert images.image_shape == (1, 6, 7)
    np.testing.assert_array_equal(images.data, array)


@pytest.mark.parametrize("what", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 3, 4])
@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 3, 6, 7)], ids=str)
def test_non_finite_row_is_named(shape, row, what):
    array = numbered(*shape).astype(np.float32)
    array[row].flat[-1] = what
    word = "NaN" if np.isnan(what) else "infinity"
    with pytest.raises(ValueError, match=f"X contains {word}: see row {row}"):
        read_images(BaseEstimator(), array, reset=True)


def test_first_of_several_non_finite_rows_is_named():
    array = numbered(5, 6, 7).astype(np.float64)
    array[2, 0, 0], array[3, 0, 0], array[4] = np.inf, -np.inf, np.nan
    with pytest.raises(ValueError, match="infinity: see row 2"):
        read_images(BaseEstimator(), array, reset=True)


def test_sum_beyond_the_range_is_not_infinity():
    array = np.full((5, 6, 7), 1.7e308)
    with pytest.raises(ValueError, match=r"size 1.7e\+308 in row 0"):
        read_images(BaseEstimator(), array, reset=True, float_dtype=np.float64)


class Fitted(BaseEstimator):
    """Stands for an estimator: what read_images leaves on it."""

    def read(self, X, **params):
        images = read_images(self, X, reset=True, **params)
        self.image_shape_ = images.image_shape
        return self


def test_feature_names_are_kept():
    names = [f"pixel{i}" for i in range(12)]
    frame = pd.DataFrame(numbered(5, 12), columns=names)
    estimator = Fitted().read(frame, image_shape=(3, 4))
    np.testing.assert_array_equal(estimator.feature_names_in_, names)
    assert estimator.n_features_in_ == 12
    read_images(estimator, frame, reset=False, image_shape=(3, 4))
    with pytest.raises(ValueError, match="feature names"):
        read_images(estimator, frame[names[::-1]], reset=False, image_shape=(3, 4))


def test_feature_names_of_an_earlier_fit_are_forgotten():
    frame = pd.DataFrame(numbered(5, 12), columns=[f"pixel{i}" for i in range(12)])
    estimator = Fitted().read(frame).read(numbered(5, 3, 4))
    assert not hasattr(estimator, "feature_names_in_")


@pytest.mark.parametrize("shape", [(5, 12), (5, 3, 4), (5, 3, 6, 7), (5, 6, 7, 3)], ids=str)
def test_n_features_in_counts_the_values_of_an_image(shape):
    assert Fitted().read(numbered(*shape)).n_features_in_ == np.prod(shape[1:])


def test_another_shape_than_in_fit():
    estimator = Fitted().read(numbered(5, 6, 7))
    with pytest.raises(ValueError, match=r"\(1, 7, 6\).*fitted on.*\(1, 6, 7\)"):
        read_images(estimator, numbered(5, 7, 6), reset=False)
    # The same canonical shape in another layout is fine.
    assert read_images(estimator, numbered(5, 6, 7, 1), reset=False).image_shape == (1, 6, 7)


# ---------------------------------------------------------------- channel_statistics


def per_channel(array, weights, d):
    """Weighted mean and standard deviation, the long way."""
    array = array.astype(np.float64) / (255 if array.dtype == np.uint8 else 1)
    values = np.moveaxis(array, 1, 0).reshape(d, len(array), -1)
    full = np.broadcast_to(weights[:, None], values.shape[1:])
    mean = np.array([np.average(v, weights=full) for v in values])
    variance = [np.average((v - m) ** 2, weights=full) for v, m in zip(values, mean, strict=True)]
    return mean, np.sqrt(variance)


@pytest.mark.parametrize("shape", [(50, 4), (50, 3, 5, 6), (50, 2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_channel_statistics(shape, dtype, weighted):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, shape).astype(dtype)
    rows = rng.permutation(50)[:37]
    weights = rng.random(37) if weighted else None
    images = Images(array, Layout(shape[1:]), array.dtype)
    mean, std = channel_statistics(images, rows, weights)
    assert mean.dtype == std.dtype == np.float64
    expected = per_channel(array[rows], np.ones(37) if weights is None else weights, shape[1])
    np.testing.assert_allclose(mean, expected[0], rtol=1e-10)
    np.testing.assert_allclose(std, expected[1], rtol=1e-10)


@pytest.mark.parametrize("block", [1, 2, 36, 37, 38, 512])
def test_channel_statistics_do_not_depend_on_blocks(block):
    rng = np.random.default_rng(0)
    images = images_of(rng.random((37, 3, 5, 6)))
    weights = rng.random(37)
    got = channel_statistics(images, np.arange(37), weights, block=block)
    expected = per_channel(images.data, weights, 3)
    np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_integer_weights_count_rows():
    rng = np.random.default_rng(0)
    images = images_of(rng.random((6, 3, 5, 6)))
    counts = np.array([1, 2, 3, 1, 4, 1])
    weighted = channel_statistics(images, np.arange(6), counts)
    repeated = channel_statistics(images, np.repeat(np.arange(6), counts))
    np.testing.assert_allclose(weighted, repeated, rtol=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e6])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_constant_channel(value, dtype):
    array = np.random.default_rng(0).random((700, 2, 5, 6)).astype(dtype)
    array[:, 1] = value
    mean, std = channel_statistics(images_of(array, **FIRST), np.arange(700))
    np.testing.assert_allclose(mean[1], dtype(value), rtol=1e-6)
    assert std[1] == 1.0
    np.testing.assert_allclose(std[0], array[:, 0].std(), rtol=1e-3)


def test_constant_uint8():
    images = images_of(np.full((9, 5, 6), 51, np.uint8))
    mean, std = channel_statistics(images, np.arange(9))
    np.testing.assert_allclose(mean, 0.2)
    np.testing.assert_array_equal(std, 1.0)


@pytest.mark.parametrize("offset", [1024.0, -1e4, 1e5])
def test_large_offsets_do_not_cancel(offset):
    noise = np.random.default_rng(0).normal(0, 0.3, (600, 1, 5, 6))
    mean, std = channel_statistics(images_of(noise + offset), np.arange(600), block=64)
    np.testing.assert_allclose(mean, offset + noise.mean(), rtol=1e-12)
    np.testing.assert_allclose(std, noise.std(), rtol=1e-7)


def test_offset_that_drifts_with_the_rows():
    """The first block is no good guess of the mean of the others."""
    array = np.linspace(0, 1e4, 600)[:, None, None, None] * np.ones((1, 1, 5, 6))
    mean, std = channel_statistics(images_of(array), np.arange(600), block=16)
    np.testing.assert_allclose(mean, array.mean(), rtol=1e-12)
    np.testing.assert_allclose(std, array.std(), rtol=1e-10)


def test_only_the_given_rows_count():
    array = np.random.default_rng(0).random((20, 1, 5, 6))
    rows = np.arange(0, 20, 2)
    expected = channel_statistics(images_of(array), rows)
    array[1::2] = 1e9
    np.testing.assert_array_equal(channel_statistics(images_of(array), rows), expected)


def test_lazy_statistics():
    array = np.random.default_rng(0).integers(0, 256, (20, 5, 6), dtype=np.uint8)
    lazy = read_images(BaseEstimator(), Lazy(array), reset=True)
    np.testing.assert_array_equal(
        channel_statistics(lazy, np.arange(20)),
        channel_statistics(images_of(array), np.arange(20)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_unit_scale(dtype):
    values = torch.arange(256, dtype=torch.uint8)
    got = to_unit_scale(values, dtype)
    assert got.dtype == dtype
    np.testing.assert_allclose(got.numpy(), np.arange(256) / 255, rtol=1e-6)
    floats = torch.tensor([-3.0, 0.5, 300.0])
    np.testing.assert_array_equal(to_unit_scale(floats, dtype).numpy(), floats.numpy())


def test_every_image_of_every_layout_once():
    """Rows and layout commute: reading one by one or all together is the same."""
    for (shape, params, _), rows in itertools.product(CANONICAL.values(), [[4, 0, 2]]):
        array = numbered(*shape).astype(np.float32)
        images = images_of(array, **params)
        together = images.rows(np.array(rows))
        single = torch.cat([images.rows(np.array([row])) for row in rows])
        assert torch.equal(together, single)


# ---------------------------------------------------------------- torch data sets


class Stream(IterableDataset):
    def __iter__(self):
        return iter(np.zeros((5, 8, 9, 3), np.uint8))


class LongStream(Stream):
    def __len__(self):
        return 5


class Endless(Dataset):
    def __getitem__(self, row):
        return np.zeros((8, 9, 3), np.uint8)


def pil(image):
    return pytest.importorskip("PIL.Image", reason="Pillow is not installed").fromarray(image)


FORMS = {
    "image": lambda image, label: image,
    "tuple": lambda image, label: (image, label),
    "list": lambda image, label: [image, label, "a name"],
    "dict": lambda image, label: {"label": label, "image": image},
    "tensor": lambda image, label: torch.from_numpy(image),
    "tuple of tensors": lambda image, label: (torch.from_numpy(image), torch.tensor(label)),
    "PIL": lambda image, label: pil(image),
    "tuple of PIL": lambda image, label: (pil(image), label),
}


@pytest.fixture
def coloured():
    return np.random.default_rng(0).integers(0, 256, (18, 8, 9, 3), dtype=np.uint8)


def tiny(**params):
    fixed = {"max_epochs": 2, "batch_size": 8, "device": "cpu", "random_state": 0}
    return SoftmaxClassifier(ConvNet(widths=(4, 8)), precision="float32", **fixed, **params)


@pytest.mark.parametrize("form", FORMS)
def test_data_set_is_read_like_the_array(form, coloured):
    y = np.arange(18) % 3
    expected = tiny().fit(coloured, y).predict_proba(coloured)
    data = Items(coloured, FORMS[form])
    for X in (data, DatasetImages(data)):
        clf = tiny().fit(X, y)
        np.testing.assert_array_equal(clf.predict_proba(X), expected)
        np.testing.assert_array_equal(clf.predict_proba(coloured), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
def test_data_set_announces_what_it_holds(dtype):
    tensor = (torch.arange(360).reshape(5, 3, 4, 6) % 97).to(dtype)
    X = DatasetImages(TensorDataset(tensor, torch.arange(5)))
    assert is_lazy(X)
    assert (X.shape, X.ndim, len(X)) == ((5, 3, 4, 6), 4, 5)
    assert X.dtype == (tensor.float() if dtype == torch.bfloat16 else tensor).numpy().dtype
    np.testing.assert_array_equal(X[3], tensor[3].float().numpy())
    images = read_images(BaseEstimator(), TensorDataset(tensor), reset=True)
    np.testing.assert_array_equal(images.rows(np.array([4, 0])), tensor[[4, 0]].float())


def test_data_set_is_read_when_asked_for_only(coloured):
    data = Items(coloured)
    images = read_images(BaseEstimator(), data, reset=True)
    assert data.loaded == [0]  # what an image looks like
    images.rows(np.array([4, 2, 4]))
    assert data.loaded == [0, 4, 2, 4]


ROW_KEYS = {
    "array": np.array([4, 0, -1]),
    "list": [4, 0],
    "none": np.array([], dtype=int),
    "mask": np.arange(18) % 5 == 0,
    "slice": slice(12, 2, -3),
    "repeated": np.array([2, 2]),
}


@pytest.mark.parametrize("ellipsis", [False, True])
@pytest.mark.parametrize("case", ROW_KEYS)
def test_rows_of_a_data_set(case, ellipsis, coloured):
    data, key = Items(coloured), ROW_KEYS[case]
    X = DatasetImages(data)
    part = X[key, ...] if ellipsis else X[key]
    safe = _safe_indexing(X, key)
    assert data.loaded == [0]
    for subset in (part, safe):
        assert isinstance(subset, DatasetImages)
        assert (subset.shape, subset.dtype) == (coloured[key].shape, coloured.dtype)
        for row, image in enumerate(coloured[key]):
            np.testing.assert_array_equal(subset[row], image)
    np.testing.assert_array_equal(part[:2][:1].rows, np.arange(18)[key][:1])
    assert len(X) == 18


def test_one_row_of_a_data_set(coloured):
    X = DatasetImages(Items(coloured))
    for row in (3, np.int64(3), -15):
        np.testing.assert_array_equal(X[row], coloured[3])
    np.testing.assert_array_equal(_safe_indexing(X, 3), coloured[3])
    with pytest.raises(IndexError):
        X[18]
    for key in [(0, 0), (slice(3), 0), (0, 0, ...)]:
        with pytest.raises(IndexError, match="rows only"):
            X[key]


def test_data_set_in_cross_validation(coloured):
    y = np.arange(18) % 3
    expected = cross_val_score(tiny(), coloured, y, cv=3, error_score="raise")
    X = DatasetImages(Items(coloured))
    np.testing.assert_array_equal(
        cross_val_score(tiny(), X, y, cv=3, error_score="raise"), expected
    )


def test_data_set_with_early_stopping(coloured):
    y = np.arange(18) % 3
    params = {"early_stopping": True, "validation_fraction": 0.3}
    expected = tiny(**params).fit(coloured, y).predict_proba(coloured)
    X = DatasetImages(Items(coloured))
    np.testing.assert_array_equal(tiny(**params).fit(X, y).predict_proba(X), expected)


def test_data_set_can_be_pickled(coloured):
    assert datasets.DatasetImages is DatasetImages
    X = DatasetImages(TensorDataset(torch.from_numpy(coloured)))[[5, 3]]
    again = pickle.loads(pickle.dumps(X))
    assert (again.shape, again.dtype) == (X.shape, X.dtype)
    np.testing.assert_array_equal(again[1], coloured[3])


@pytest.mark.parametrize("form", ["tuple", "dict", "tuple of tensors", "tuple of PIL"])
@pytest.mark.parametrize(
    ("odd", "match"),
    [(np.zeros((8, 7, 3), np.uint8), r"row 7 has shape \(8, 7, 3\)"),
     (np.zeros((8, 9), np.uint8), r"row 7 has shape \(8, 9\)")],
)  # fmt: skip
def test_odd_image_of_a_data_set_is_named(odd, match, form, coloured):
    images = [odd if row == 7 else image for row, image in enumerate(coloured)]
    with pytest.raises(ValueError, match=rf"announces images of shape \(8, 9, 3\).*{match}"):
        tiny().fit(Items(images, FORMS[form]), np.arange(18) % 3)


def test_floats_among_uint8_of_a_data_set_are_named(coloured):
    images = [image / 255 if row == 7 else image for row, image in enumerate(coloured)]
    with pytest.raises(ValueError, match=r"dtype uint8, but row 7 .*float64"):
        tiny().fit(Items(images), np.arange(18) % 3)


@pytest.mark.parametrize(
    "item",
    [3, "image.png", None, (), (3, np.zeros((8, 9))), {"picture": np.zeros((8, 9))}],
    ids=str,
)
def test_item_without_an_image_is_named(item, coloured):
    for bad in (0, 7):
        data = Items(coloured, lambda image, label: image)
        data.images = [item if row == bad else image for row, image in enumerate(coloured)]
        with pytest.raises(ValueError, match=rf'Row {bad} of X .*key "image"; the place .* holds'):
            read_images(BaseEstimator(), data, reset=True).rows(np.arange(18))


@pytest.mark.parametrize("data", [Stream(), LongStream(), Endless()])
def test_data_set_without_numbered_items(data):
    for read in (DatasetImages, lambda X: tiny().fit(X, [0, 1, 0, 1, 0])):
        with pytest.raises(TypeError, match=rf"{type(data).__name__}.*map-style"):
            read(data)


def test_empty_data_set():
    with pytest.raises(ValueError, match=r"0 sample\(s\).*empty"):
        tiny().fit(Items(np.zeros((0, 8, 9, 3))), [])


@pytest.mark.parametrize("params", [{}, {"image_shape": (3, 4)}], ids=str)
def test_data_set_of_vectors(params):
    rows = numbered(5, 12).astype(np.float32)
    for X in (TensorDataset(torch.from_numpy(rows)), DatasetImages(Items(rows))):
        images = read_images(BaseEstimator(), X, reset=True, **params)
        assert not images.lazy
        np.testing.assert_array_equal(images.rows(np.arange(5)).reshape(5, 12), rows)


def test_data_set_that_is_a_lazy_sequence_stays_as_it_is(coloured):
    class Both(Lazy, Dataset):
        pass

    X = Both(coloured)
    assert read_images(BaseEstimator(), X, reset=True).data is X


def test_wrapping_is_for_data_sets_only():
    for X in ([1, 2], np.zeros((2, 3)), pd.DataFrame(np.zeros((2, 3))), Lazy(np.zeros((2, 3, 4)))):
        assert wrap_dataset(X) is X
