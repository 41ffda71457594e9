"""The validation split, and resampling after it."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from imblearn import FunctionSampler
from imblearn.over_sampling import SMOTE, RandomOverSampler
from imblearn.over_sampling.base import BaseOverSampler
from imblearn.pipeline import Pipeline
from imblearn.under_sampling import (
    EditedNearestNeighbours,
    NearMiss,
    RandomUnderSampler,
    TomekLinks,
)
from sklearn.base import BaseEstimator

from sklearn_medimb import CSSNClassifier, SoftmaxClassifier, SPMixSampler
from sklearn_medimb._data.images import Images
from sklearn_medimb._data.layout import infer_layout
from sklearn_medimb._data.rows import group_codes, validation_split
from sklearn_medimb._data.rows import resample as resample_with_origin
from sklearn_medimb.backbones import ConvNet
from tests.estimators import SUPERVISED


def rng(seed=0):
    return np.random.default_rng(seed)


def assert_partition(train, valid, n):
    assert np.all(np.diff(train) > 0)
    assert np.all(np.diff(valid) > 0)
    np.testing.assert_array_equal(np.sort(np.r_[train, valid]), np.arange(n))
    assert len(valid) > 0


# ---------------------------------------------------------------- validation_split


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5, 0.75])
@pytest.mark.parametrize("seed", range(3))
def test_every_class_gives_its_share(fraction, seed):
    counts = np.array([400, 100, 20])
    y = rng(9).permutation(np.repeat([0, 1, 2], counts))
    train, valid = validation_split(y, fraction, None, rng(seed))
    assert_partition(train, valid, len(y))
    np.testing.assert_array_equal(np.bincount(y[valid]), counts * fraction)


def test_small_classes_give_one_but_never_the_last():
    y = np.repeat([0, 1, 2, 3], [20, 3, 2, 1])
    for fraction in (0.01, 0.2, 0.99):
        train, valid = validation_split(y, fraction, None, rng())
        assert_partition(train, valid, len(y))
        n_valid = np.bincount(y[valid], minlength=4)
        assert (n_valid[:3] >= 1).all()
        assert n_valid[3] == 0
        assert (np.bincount(y[train], minlength=4) >= 1).all()


def test_split_depends_on_the_generator_only():
    y = np.repeat([0, 1], [40, 10])
    one, two, other = (validation_split(y, 0.2, None, rng(seed))[1] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


def test_every_row_is_held_out_sometimes():
    y = np.repeat([0, 1], [12, 4])
    generator, seen = rng(), set()
    for _ in range(100):
        seen |= set(validation_split(y, 0.25, None, generator)[1].tolist())
    assert seen == set(range(16))


def test_no_split_of_single_samples():
    with pytest.raises(ValueError, match=r"No class has two samples.*early_stopping=False"):
        validation_split(np.arange(5), 0.2, None, rng())


def random_groups(seed):
    """A random grouped problem of at least two classes and two groups."""
    r = rng(seed)
    n = int(r.integers(6, 40))
    groups = r.integers(0, r.integers(2, 10), n)
    if seed % 3 == 0:  # patients mostly have one diagnosis
        y = groups % r.integers(2, 4)
        flip = r.random(n) < 0.2
        y[flip] = r.integers(0, 2, flip.sum())
    else:
        y = r.integers(0, r.integers(2, 5), n)
    y, groups = (np.unique(a, return_inverse=True)[1] for a in (y, groups))
    groups[:2], y[:2] = [0, 1], [0, 1]
    return y, groups, r.choice([0.1, 0.2, 0.34, 0.5]), r


@pytest.mark.parametrize("seed", range(150))
def test_groups_never_straddle(seed):
    y, groups, fraction, r = random_groups(seed)
    # A split exists just where some group can leave without taking a class along.
    possible = any(set(y[groups != g]) == set(y) for g in set(groups))
    if not possible:
        with pytest.raises(ValueError, match=r"grouped validation split.*early_stopping=False"):
            validation_split(y, fraction, groups, r)
        return
    train, valid = validation_split(y, fraction, groups, r)
    assert_partition(train, valid, len(y))
    assert not set(groups[train]) & set(groups[valid])
    assert set(y[train]) == set(y)


@pytest.mark.parametrize(
    ("y", "groups"),
    [
        ([1, 0, 1, 1], [0, 1, 2, 0]),
        ([0, 2, 1, 0], [1, 0, 1, 2]),
        ([2, 0, 2, 1], [2, 1, 0, 3]),
        ([0, 0, 2, 1, 2], [2, 2, 1, 0, 3]),
    ],
    ids=str,
)
def test_a_split_is_found_where_one_exists(y, groups):
    """Some group can leave, whichever folds are drawn first."""
    y, groups = np.array(y), np.array(groups)
    for seed in range(10):
        train, valid = validation_split(y, 0.5, groups, rng(seed))
        assert set(y[train]) == set(y)
        assert not set(groups[train]) & set(groups[valid])


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.25, 0.4, 0.75])
def test_share_of_groups(fraction):
    y = rng(3).integers(0, 2, 200)
    _, valid = validation_split(y, fraction, np.arange(200) // 2, rng())
    assert abs(len(valid) / 200 - fraction) < 0.06


def test_grouped_split_is_stratified():
    groups = np.arange(300) // 3
    y = (groups % 10 == 0).astype(int)
    _, valid = validation_split(y, 0.2, groups, rng())
    assert abs(y[valid].mean() - 0.1) < 0.03


def test_rare_classes_do_not_spoil_a_grouped_split():
    """A class with fewer rows than there would be folds."""
    y = np.r_[np.zeros(40, int), 1, 1]
    groups = np.r_[np.arange(40) // 2, 20, 21]
    for seed in range(10):
        train, valid = validation_split(y, 0.1, groups, rng(seed))
        assert_partition(train, valid, len(y))
        assert set(y[train]) == {0, 1}


def test_single_group():
    with pytest.raises(ValueError, match="groups holds a single group"):
        validation_split(np.array([0, 1, 0, 1]), 0.2, np.zeros(4, int), rng())


def test_class_within_one_group():
    y = np.array([0, 0, 1, 1, 2, 2])
    with pytest.raises(ValueError, match="some class lies within one group"):
        validation_split(y, 0.2, y, rng())


# ---------------------------------------------------------------- resample

Y = np.repeat([0, 1, 2], [20, 8, 4])


class Lazy:
    """Refuses to be read."""

    def __init__(self, shape):
        self.shape, self.ndim, self.dtype = shape, len(shape), np.dtype(np.uint8)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, row):
        raise AssertionError("read")


def images_of(array):
    return Images(array, infer_layout(array.shape), array.dtype)


def numbered_images(n=40):
    """Image i holds i everywhere."""
    return images_of(np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None], (n, 4, 5)).copy())


ROWS = rng(5).permutation(40)[: len(Y)]


@pytest.mark.parametrize(
    ("sampler", "counts"),
    [
        (RandomOverSampler(), [20, 20, 20]),
        (RandomUnderSampler(), [4, 4, 4]),
        (RandomOverSampler(sampling_strategy={2: 9}), [20, 8, 9]),
        (RandomUnderSampler(sampling_strategy={0: 5}), [5, 8, 4]),
    ],
    ids=["over", "under", "over dict", "under dict"],
)
def test_index_samplers_move_numbers_only(sampler, counts):
    images = numbered_images()
    weight = rng(1).random(len(Y))
    got, rows, y, new_weight = resample(sampler, images, ROWS, Y, weight, 0)
    assert got is images
    np.testing.assert_array_equal(np.bincount(y), counts)
    # Each row keeps its class and its weight.
    position = {row: i for i, row in enumerate(ROWS)}
    picks = np.array([position[row] for row in rows])
    np.testing.assert_array_equal(y, Y[picks])
    np.testing.assert_array_equal(new_weight, weight[picks])
    if "Under" in type(sampler).__name__:
        assert len(set(rows)) == len(rows)
    else:
        assert set(rows) == set(ROWS)


@pytest.mark.parametrize("sampler", [RandomOverSampler(), RandomUnderSampler()])
def test_index_samplers_read_no_lazy_image(sampler):
    images = images_of(Lazy((40, 4, 5)))
    _, rows, y, weight = resample(sampler, images, ROWS, Y, None, 0)
    assert weight is None
    assert len(np.unique(np.bincount(y))) == 1
    assert set(rows) <= set(ROWS)


def made(images, y, sampler=None, seed=0):
    """Rows that a sampler added."""
    sampler = sampler or SMOTE(k_neighbors=3)
    got, rows, new_y, weight = resample(sampler, images, np.arange(len(y)), y, None, seed)
    assert weight is None
    np.testing.assert_array_equal(rows, np.arange(len(new_y)))
    assert len(got) == len(new_y)
    np.testing.assert_array_equal(got.data[: len(y)], images.data.reshape(len(y), -1))
    np.testing.assert_array_equal(new_y[: len(y)], y)
    return got, new_y[len(y) :]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_smote_keeps_layout_and_dtype(dtype):
    array = rng().integers(0, 256, (32, 6, 5, 3)).astype(dtype)
    images = images_of(array)
    got, y = made(images, Y)
    np.testing.assert_array_equal(np.bincount(y), [0, 12, 16])
    assert got.dtype == got.data.dtype == dtype
    assert got.image_shape == images.image_shape == (3, 6, 5)
    # The originals are read as before, through the same axes.
    some = np.array([3, 30])
    np.testing.assert_array_equal(got.rows(some).numpy(), images.rows(some).numpy())


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_smote_interpolates(dtype):
    """What is made between dark images is dark: no value wraps around."""
    majority = rng().integers(0, 256, (30, 4, 5))
    minority = rng(1).integers(10, 21, (8, 4, 5))
    array = np.concatenate([majority, minority]).astype(dtype)
    got, y = made(images_of(array), np.repeat([0, 1], [30, 8]))
    assert (y == 1).all()
    new = got.data[38:]
    assert len(new) == 22
    assert new.min() >= 10
    assert new.max() <= 20


def test_smote_rounds_to_the_nearest_grey():
    """Truncation would darken what is made by half a grey level on average."""
    array = np.concatenate([np.zeros((120, 4, 5)), rng().integers(0, 256, (12, 4, 5))])
    y = np.repeat([0, 1], [120, 12])
    exact, _ = made(images_of(array), y)
    rounded, _ = made(images_of(array.astype(np.uint8)), y)
    difference = rounded.data[132:].astype(float) - exact.data[132:]
    assert np.abs(difference).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("sampler", [NearMiss(), TomekLinks(sampling_strategy="all")])
def test_selecting_samplers_return_given_images(sampler):
    centre = rng(2).integers(0, 200, (3, 4, 5))
    array = (centre[Y] + rng().integers(0, 50, (32, 4, 5))).astype(np.float32)
    got, rows, y, _ = resample(sampler, images_of(array), np.arange(32), Y, None, 0)
    assert len(rows) == len(y) == len(got)
    known = {image.tobytes(): label for image, label in zip(array, Y, strict=True)}
    assert [known[image.tobytes()] for image in got.data] == y.tolist()


def test_sampler_sees_the_training_rows_only():
    array = rng().random((40, 4, 5))
    array[np.setdiff1d(np.arange(40), ROWS)] = 1e6
    got, *_ = resample(SMOTE(k_neighbors=3), images_of(array), ROWS, Y, None, 0)
    assert got.data.max() <= 1


def test_unset_random_state_comes_from_the_seed():
    images = numbered_images()

    def rows(sampler, seed):
        return resample(sampler, images, ROWS, Y, None, seed)[1].tolist()

    sampler = RandomOverSampler()
    assert rows(sampler, 1) == rows(sampler, 1)
    assert rows(sampler, 1) != rows(sampler, 2)
    assert sampler.random_state is None
    fixed = RandomOverSampler(random_state=3)
    assert rows(fixed, 1) == rows(fixed, 2)
    assert not hasattr(sampler, "sampling_strategy_")


def test_global_random_state_is_untouched():
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    made(images_of(rng().random((32, 4, 5))), Y)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@pytest.mark.parametrize("sampler", [SMOTE(), RandomOverSampler(shrinkage=0.5)])
def test_made_rows_refuse_weights_and_lazy_images(sampler):
    name = type(sampler).__name__
    with pytest.raises(ValueError, match=f"sampler={name} makes rows.*sample_weight"):
        resample(sampler, numbered_images(), ROWS, Y, np.ones(len(Y)), 0)
    with pytest.raises(ValueError, match=f"sampler={name} needs every image in memory"):
        resample(sampler, images_of(Lazy((40, 4, 5))), ROWS, Y, None, 0)


def test_shrinkage_makes_new_images():
    images = images_of(rng().random((32, 4, 5)))
    got, _ = made(images, Y, RandomOverSampler(shrinkage=1.0))
    assert len(np.unique(got.data, axis=0)) == len(got)


# ---------------------------------------------------------------- through the classifier


def tiny(cls=SoftmaxClassifier, **params):
    params = {"device": "cpu", "precision": "float32", "random_state": 0, **params}
    return cls(ConvNet((4, 8)), max_epochs=1, augment="none", **params)


@pytest.mark.parametrize("cls", SUPERVISED.values(), ids=SUPERVISED)
@pytest.mark.parametrize("sampler", [RandomOverSampler(), SMOTE(k_neighbors=2)])
@pytest.mark.parametrize("grouped", [False, True])
def test_no_validation_image_is_trained_on(cls, sampler, grouped, monkeypatch):
    """Sampled after the split: what validates was in no training batch, not even as a copy."""
    X = np.full((60, 8, 8), 0.0, dtype=np.float32)
    X += rng().permutation(60)[:, None, None]  # each image has its own grey
    y = np.repeat([0, 1, 2], [36, 14, 10])
    groups = np.arange(60) // 2 if grouped else None
    trained, validated = [], []

    def batches_of(self, train, context):
        trained.append(train.images.rows(train.rows)[:, 0, 0, 0].numpy())
        counts.append(np.bincount(train.y))
        return make_batches(self, train, context)

    def scorer(estimator, X, y):
        validated.append(X[:, 0, 0])
        return 0.0

    counts = []
    make_batches = cls._make_batches
    monkeypatch.setattr(cls, "_make_batches", batches_of)
    tiny(cls, sampler=sampler, early_stopping=True, scoring=scorer).fit(X, y, groups=groups)
    (greys,), held = trained, validated[0]
    assert len(held) >= 6
    assert len(set(counts[0])) == 1  # it was resampled
    assert not set(greys.tolist()) & set(held.tolist())
    originals = set(greys.tolist()) & set(X[:, 0, 0].tolist())
    if isinstance(sampler, RandomOverSampler):
        assert len(originals) + len(held) == 60
    # The validation rows themselves are those of the data: none is resampled.
    assert len(set(held.tolist())) == len(held)
    assert set(held.tolist()) <= set(X[:, 0, 0].tolist())


def test_sampling_strategy_speaks_of_the_labels():
    """A dict of class sizes has the caller's labels, not our numbers 0, 1, 2."""
    X = rng().integers(0, 256, (32, 8, 8), dtype=np.uint8)
    sampler = RandomOverSampler(sampling_strategy={"rare": 28})
    clf = tiny(sampler=sampler).fit(X, np.array(["common", "middle", "rare"])[Y])
    np.testing.assert_allclose(clf.class_prior_, np.array([20, 8, 28]) / 56)


def test_sampling_strategy_of_shifted_labels():
    """With labels 1, 2, 3 the class 2 is the second one."""
    X = rng().integers(0, 256, (32, 8, 8), dtype=np.uint8)
    clf = tiny(sampler=RandomOverSampler(sampling_strategy={2: 28})).fit(X, Y + 1)
    np.testing.assert_allclose(clf.class_prior_, np.array([20, 28, 4]) / 52)


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize(
    "sampler",
    [RandomOverSampler(), RandomUnderSampler(), SMOTE(k_neighbors=2), SPMixSampler()],
    ids=lambda sampler: type(sampler).__name__,
)
def test_supports_of_resampled_training_are_rows_of_the_data(sampler, early_stopping):
    X = rng().integers(0, 256, (32, 8, 8), dtype=np.uint8)
    order = rng().permutation(32)
    X, y = X[order], Y[order]
    clf = tiny(CSSNClassifier, sampler=sampler, n_tokens=4, early_stopping=early_stopping)
    clf.fit(X, y)
    np.testing.assert_array_equal(y[clf.support_indices_], clf.support_labels_)
    assert (clf.support_indices_ >= 0).all()
    found = clf.explain(X[:3]).indices
    assert set(found.ravel()) <= set(clf.support_indices_)


@pytest.mark.parametrize(
    ("sampler", "made"),
    [(SMOTE(k_neighbors=2), 28), (EditedNearestNeighbours(n_neighbors=1), 0), (SPMixSampler(), 28)],
    ids=lambda value: type(value).__name__,
)
def test_origin_names_the_rows_that_came_through(sampler, made):
    array = rng().integers(0, 256, (32, 4, 5), dtype=np.uint8)
    images = images_of(array)
    rows = np.arange(31, -1, -1)
    found, picks, y, _, origin = resample_with_origin(sampler, images, rows, Y[rows], None, 0)
    assert (origin < 0).sum() == made
    kept = origin >= 0
    np.testing.assert_array_equal(found.rows(picks[kept]), images.rows(origin[kept]))
    np.testing.assert_array_equal(y[kept], Y[origin[kept]])


def test_pipeline_that_holds_a_sampler_of_images_is_refused():
    steps = Pipeline([("mix", SPMixSampler()), ("drop", RandomUnderSampler())])
    X = rng().integers(0, 256, (32, 8, 8), dtype=np.uint8)
    with pytest.raises(ValueError, match="holds a sampler of images"):
        tiny(sampler=steps).fit(X, Y)


def test_seed_reaches_the_steps_of_a_pipeline():
    steps = Pipeline([("over", SMOTE(k_neighbors=2)), ("drop", RandomUnderSampler())])
    images = images_of(rng().integers(0, 256, (32, 4, 5), dtype=np.uint8))
    one, two, other = (
        resample(steps, images, np.arange(32), Y, None, seed)[0].data for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


NAT = np.array(["2020-01-01", "NaT", "2020-01-02"], dtype="datetime64[ns]")


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([1, 2], r"shape \(2,\)"),
        ([1.0, np.nan, 2.0], "row 1"),
        (np.array([1.0, np.nan, 2.0]), "row 1"),
        (["a", "b", None], "row 2"),
        (["a", np.nan, "b"], "row 1"),
        (np.array(["a", np.nan, "b"]), "row 1"),  # NumPy made it text
        (np.array([b"a", b"", b"b"]), "row 1"),
        (["a", "b", " "], "row 2"),
        (np.array(["a", np.nan, None], dtype=object).astype(str), "row 1"),
        (np.array([pd.NA, "b", "c"], dtype=object), "row 0"),
        ([1, pd.NaT, 2], "row 1"),
        (NAT, "row 1"),
        (NAT - NAT[0], "row 1"),
        (pd.Series(NAT), "row 1"),
        (pd.Series(NAT).dt.tz_localize("UTC"), "row 1"),
        (pd.Series([1, None, 2], dtype="Int64"), "row 1"),
        (pd.Series(["a", None, "b"], dtype="string"), "row 1"),
        (pd.Series(["a", None, "b"], dtype="category"), "row 1"),
        (pd.DataFrame({"patient": ["a", None, "b"]}), "row 1"),
        (np.ma.masked_equal([1, 0, 2], 0), "row 1"),
        ([1, Decimal("NaN"), 2], "row 1"),
        ([1, Decimal("sNaN"), 2], "row 1"),
        (np.array([1, "b", 2], dtype=object), "not both: row 0 is a number, row 1 a string"),
        ([1, "b", 2], "row 1 a string"),
        ([True, 1, 2], "row 0 is a bool, row 1 a number"),
        ([{}, {}, {}], "numbers, strings or dates"),
    ],
    ids=repr,
)
def test_missing_and_mixed_patients_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        group_codes(groups, np.zeros(3))


@pytest.mark.parametrize(
    "groups",
    [
        [["b"], ["a"], ["b"]],
        [2, 1.0, 2.0],
        np.array([2.0, 1.0, 2.0]),
        np.array([2, Decimal(1), np.float32(2)], dtype=object),
        pd.Series(["b", "a", "b"], index=[7, 8, 9]),
        pd.Series([2, 1, 2], dtype="Int64"),
        pd.to_datetime(pd.Series(["2021-01-01", "2020-01-01", "2021-01-01"])),
        NAT[[2, 0, 2]],
        np.ma.masked_equal([2, 1, 2], 7),
        [True, False, True],
    ],
    ids=repr,
)
def test_patients_are_numbered(groups):
    np.testing.assert_array_equal(group_codes(groups, np.zeros(3)), [1, 0, 1])


def resample(*args, **kwargs):
    return resample_with_origin(*args, **kwargs)[:4]


# ---------------------------------------------------------------- what a sampler returns


def by(function, **given):
    return FunctionSampler(func=function, validate=False, **given)


class Nothing(BaseEstimator):
    def fit_resample(self, X, y):
        return None


class Images3(BaseEstimator):
    """A sampler of images that changes their scale."""

    def __init__(self, data_format="auto", image_shape=None, spatial_dims=None):
        self.data_format = data_format
        self.image_shape = image_shape
        self.spatial_dims = spatial_dims

    def fit_resample(self, X, y):
        return X / 255, y


def relabelled(X, y):
    y = y.copy()
    y[5] = 1
    return X, y


class Relabels(BaseOverSampler):
    def _fit_resample(self, X, y):
        return relabelled(X, y)


RETURNS = {
    "a class removed": (by(lambda X, y: (X[y < 2], y[y < 2])), r"no row of the classes \[2\]"),
    "nothing left": (by(lambda X, y: (X[:0], y[:0])), r"no row of the classes \[0, 1, 2\]"),
    "nothing": (Nothing(), "returned NoneType, not X and y"),
    "other labels": (by(lambda X, y: (X, y + 7)), "did not get: 7, 8, 9"),
    "changed labels": (Relabels(), "changes labels: row 5 of X"),
    "labels of two axes": (by(lambda X, y: (X, np.eye(3)[y])), "labels of shape"),
    "another scale": (by(lambda X, y: (X / 255, y)), "changes the scale of X"),
    "images of another scale": (Images3(), "changes the scale of X"),
    "NaN": (by(lambda X, y: (np.where(X > 200, np.nan, X), y)), "NaN or infinity: see its row"),
    "fewer columns": (by(lambda X, y: (X[:, 1:], y)), r"rows of shape \(48,\)"),
    "texts": (by(lambda X, y: (X.astype(str), y)), "returned <U"),
    "fewer rows": (by(lambda X, y: (X[1:], y)), "returned 59 rows and 60 labels"),
    "neighbours": (
        EditedNearestNeighbours(sampling_strategy="all", kind_sel="all", n_neighbors=9),
        "no row of the classes",
    ),
}


@pytest.mark.parametrize(("sampler", "message"), RETURNS.values(), ids=RETURNS)
def test_what_a_sampler_returns_is_checked(sampler, message, tiny):
    y = np.repeat([0, 1, 2], [40, 14, 6])
    X = rng().integers(0, 256, (60, 6, 8), dtype=np.uint8)
    clf = SoftmaxClassifier(**tiny, sampler=sampler)
    with pytest.raises(ValueError, match=f"sampler={type(sampler).__name__} .*{message}"):
        clf.fit(X, y)


def test_a_random_sampler_must_leave_every_class():
    y = np.repeat([0, 1, 2], [40, 14, 6])
    sampler = RandomUnderSampler(sampling_strategy={2: 0})
    with pytest.raises(ValueError, match=r"sampler=RandomUnderSampler .*classes \[2\]"):
        SoftmaxClassifier(sampler=sampler).fit(np.zeros((60, 8, 8), dtype=np.uint8), y)


def test_a_sampler_that_returns_its_input_changes_nothing(tiny, blobs):
    plain = SoftmaxClassifier(**tiny).fit(*blobs)
    same = SoftmaxClassifier(**tiny, sampler=by(lambda X, y: (X, y))).fit(*blobs)
    assert same.class_prior_.tolist() == plain.class_prior_.tolist()
    np.testing.assert_array_equal(same.pixel_mean_, plain.pixel_mean_)
