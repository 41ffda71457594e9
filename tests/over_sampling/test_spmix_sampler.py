"""SPMixSampler: counts, pairs, pixels, layouts, lazy input, patients, and inside estimators."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
from imblearn.pipeline import make_pipeline
from sklearn import config_context
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, StratifiedKFold

from sklearn_medimb import SaliencyMap, SoftmaxClassifier, SPMixSampler
from sklearn_medimb._data.containers import is_lazy
from sklearn_medimb._data.rows import resample
from sklearn_medimb.mixing import spmix, spmix_ratio
from sklearn_medimb.saliency import fine_grained
from sklearn_medimb.utils.estimator_checks import LazyImages


def problem(counts=(20, 8, 3), sides=(12, 10), channels=3, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    return rng.integers(0, 256, (len(y), *sides, channels), dtype=np.uint8), y


def by_hand(sampler, X, floor=None, merge="patch", **options):
    """The new images, one at a time, from the pairs that the sampler drew."""
    new = []
    for i, j in zip(sampler.sample_indices_, sampler.partner_indices_, strict=True):
        pair = torch.from_numpy(X[[i, j]]).movedim(-1, 1).double()
        maps = fine_grained(pair / 255)
        patch = sampler.patch_size_
        ratio = spmix_ratio(maps[:1], maps[1:], patch, floor=floor, merge=merge, **options)
        new.append(spmix(pair[:1], pair[1:], ratio, patch)[0].movedim(0, -1).numpy())
    return np.array(new)


@pytest.mark.parametrize("merge", ["patch", "pixel"])
@pytest.mark.parametrize("patch_size", ["auto", 3, (4, 5)])
def test_new_images_are_mixes_and_originals_stay(merge, patch_size):
    X, y = problem()
    before = X.copy()
    sampler = SPMixSampler(merge=merge, patch_size=patch_size, mix_prob=1, random_state=0)
    X_new, y_new = sampler.fit_resample(X, y)
    np.testing.assert_array_equal(X, before)
    np.testing.assert_array_equal(X_new[: len(X)], X)
    np.testing.assert_array_equal(y_new[: len(y)], y)
    assert X_new.dtype == np.uint8
    np.testing.assert_array_equal(np.bincount(y_new), [20, 20, 20])
    np.testing.assert_array_equal(y_new[len(y) :], y[sampler.sample_indices_])
    wanted = by_hand(sampler, X, merge=merge)
    assert np.abs(X_new[len(X) :] - wanted).max() <= 0.5 + 1e-3  # rounded, not cut off
    assert np.abs(X_new[len(X) :] - X[sampler.sample_indices_].astype(float)).mean() > 5


def test_ratio_lies_between_floor_and_cap():
    X, y = problem()
    sampler = SPMixSampler(mix_prob=1, random_state=0).fit(X, y)
    assert not hasattr(sampler, "ratio_")
    sampler.fit_resample(X, y)
    assert sampler.ratio_.shape == (29, 12, 10)
    assert sampler.ratio_.min() >= 0.5
    assert sampler.ratio_.max() <= np.float32(0.8)
    other = SPMixSampler(cap=0.6, floor=0.1, patch_size=4, mix_prob=1, random_state=0)
    other.fit_resample(X, y)
    assert other.ratio_.shape == (29, 3, 3)
    assert 0.1 <= other.ratio_.min() < 0.5
    assert other.ratio_.max() == np.float32(0.6)


def test_mix_prob_is_the_share_of_mixed_images_and_the_others_are_copies():
    X, y = problem((400, 30), sides=(5, 5))
    sampler = SPMixSampler(mix_prob=0.3, random_state=0)
    X_new, _ = sampler.fit_resample(X, y)
    copied = (sampler.ratio_ == 1).all(axis=(1, 2))
    assert abs(copied.mean() - 0.7) < 0.1
    same = (X_new[len(X) :] == X[sampler.sample_indices_]).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(same, copied)
    assert sampler.ratio_[~copied].max() <= np.float32(0.8)
    none = SPMixSampler(mix_prob=0, random_state=0)
    X_new, _ = none.fit_resample(X, y)
    np.testing.assert_array_equal(X_new[len(X) :], X[none.sample_indices_])


def test_copies_read_no_partner():
    X, y = problem((30, 4))
    lazy = LazyImages(X)
    sampler = SPMixSampler(mix_prob=0, random_state=0)
    sampler.fit_resample(lazy, y)
    assert lazy.n_reads == 4


def test_partner_saliency_can_be_left_out():
    X, y = problem()
    sampler = SPMixSampler(partner_saliency=False, mix_prob=1, random_state=0)
    X_new, _ = sampler.fit_resample(X, y)
    wanted = by_hand(sampler, X, partner_saliency=False)
    assert np.abs(X_new[len(X) :] - wanted).max() <= 0.5 + 1e-3


@pytest.mark.parametrize(
    ("partners", "allowed"),
    [
        ("head", {1: {0}, 2: {0, 1}}),
        ("majority", {1: {0}, 2: {0}}),
        ("other", {1: {0, 2}, 2: {0, 1}}),
        ("any", {1: {0, 1, 2}, 2: {0, 1, 2}}),
    ],
)
def test_partners_come_from_where_they_should(partners, allowed):
    X, y = problem((60, 30, 6))
    sampler = SPMixSampler(partners=partners, random_state=0)
    sampler.fit_resample(X, y)
    assert (sampler.sample_indices_ != sampler.partner_indices_).all()
    for label, classes in allowed.items():
        of_class = y[sampler.sample_indices_] == label
        assert set(y[sampler.partner_indices_[of_class]]) == classes


def test_partners_are_drawn_evenly_and_bases_take_turns():
    X, y = problem((40, 5), sides=(2, 2))
    sampler = SPMixSampler(sampling_strategy={1: 4005}, random_state=0)
    with pytest.warns(UserWarning, match="class 1 becomes the base of about 800"):
        sampler.fit_resample(X, y)
    bases = np.bincount(sampler.sample_indices_, minlength=45)[y == 1]
    np.testing.assert_array_equal(bases, 800)
    partners = np.bincount(sampler.partner_indices_, minlength=45)[y == 0]
    assert abs(partners - 100).max() < 5 * 10


def test_without_a_more_frequent_class_another_one_serves():
    X, y = problem((6, 6))
    sampler = SPMixSampler(sampling_strategy={0: 10}, random_state=0)
    sampler.fit_resample(X, y)
    assert set(y[sampler.partner_indices_]) == {1}
    sampler.set_params(partners="majority", sampling_strategy={1: 9})
    sampler.fit_resample(X, y)
    assert set(y[sampler.partner_indices_]) == {0}


def test_class_of_one_image_is_its_own_base_each_time():
    X, y = problem((9, 1))
    sampler = SPMixSampler(random_state=0)
    X_new, y_new = sampler.fit_resample(X, y)
    assert set(sampler.sample_indices_) == set(np.flatnonzero(y == 1))
    assert len(np.unique(X_new[len(X) :].reshape(8, -1), axis=0)) > 1
    np.testing.assert_array_equal(np.bincount(y_new), [9, 9])


@pytest.mark.parametrize(
    ("strategy", "counts"),
    [
        ("auto", [20, 20, 20]),
        ("minority", [20, 8, 20]),
        ("not minority", [20, 20, 3]),
        ("all", [20, 20, 20]),
        ({2: 7}, [20, 8, 7]),
        ({0: 25, 1: 8}, [25, 8, 3]),
        (lambda y: {1: 11}, [20, 11, 3]),
    ],
)
def test_sampling_strategy_is_met_exactly(strategy, counts):
    X, y = problem()
    _, y_new = SPMixSampler(sampling_strategy=strategy, random_state=0).fit_resample(X, y)
    np.testing.assert_array_equal(np.bincount(y_new), counts)


def test_float_strategy_for_two_classes():
    X, y = problem((20, 5))
    _, y_new = SPMixSampler(sampling_strategy=0.5, random_state=0).fit_resample(X, y)
    np.testing.assert_array_equal(np.bincount(y_new), [20, 10])


def test_balanced_input_gains_nothing():
    X, y = problem((7, 7))
    sampler = SPMixSampler(random_state=0)
    X_new, y_new = sampler.fit_resample(X, y)
    np.testing.assert_array_equal(X_new, X)
    np.testing.assert_array_equal(y_new, y)
    assert X_new is not X
    assert sampler.sample_indices_.shape == sampler.partner_indices_.shape == (0,)
    assert sampler.ratio_.shape == (0, 12, 10)


def test_random_state_decides_everything():
    X, y = problem()
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    one, two, other = (SPMixSampler(random_state=seed).fit_resample(X, y)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(state, np.random.get_state()[1])  # noqa: NPY002


# ---------------------------------------------------------------- layouts and dtypes


def test_every_layout_gives_the_same_images():
    X, y = problem()
    wanted, _ = SPMixSampler(random_state=0).fit_resample(X, y)
    first = np.ascontiguousarray(np.moveaxis(X, -1, 1))
    found, _ = SPMixSampler(random_state=0).fit_resample(first, y)
    np.testing.assert_array_equal(np.moveaxis(found, 1, -1), wanted)
    flat = SPMixSampler(image_shape=(12, 10, 3), random_state=0)
    found, _ = flat.fit_resample(X.reshape(len(X), -1), y)
    np.testing.assert_array_equal(found, wanted.reshape(len(wanted), -1))
    assert flat.n_features_in_ == 360
    for other in (list(X), torch.from_numpy(X)):
        found, _ = SPMixSampler(random_state=0).fit_resample(other, y)
        np.testing.assert_array_equal(found, wanted)


def test_gray_and_volumes():
    X, y = problem()
    gray = X[..., 0]
    found, _ = SPMixSampler(random_state=0).fit_resample(gray, y)
    one, _ = SPMixSampler(random_state=0).fit_resample(gray[..., None], y)
    np.testing.assert_array_equal(found, one[..., 0])
    volumes = np.random.default_rng(0).random((len(y), 5, 6, 7)).astype(np.float32)
    sampler = SPMixSampler(spatial_dims=3, patch_size=(2, 3, 3), random_state=0)
    found, _ = sampler.fit_resample(volumes, y)
    assert found.shape == (60, 5, 6, 7)
    assert sampler.ratio_.shape == (29, 3, 2, 3)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32, np.float64, bool])
def test_dtype_is_kept(dtype):
    X, y = problem()
    X = (
        X > 128
        if dtype is bool
        else X.astype(dtype) * (100 if np.dtype(dtype).itemsize == 2 else 1)
    )
    found, _ = SPMixSampler(random_state=0).fit_resample(X, y)
    assert found.dtype == dtype
    assert found.min() >= X.min()
    assert found.max() <= X.max()


def test_string_labels():
    X, y = problem()
    names = np.array(["nevus", "melanoma", "keratosis"], dtype=object)[y]
    sampler = SPMixSampler(random_state=0)
    _, y_new = sampler.fit_resample(X, names)
    assert (y_new == "melanoma").sum() == 20
    assert sampler.sampling_strategy_ == {"keratosis": 17, "melanoma": 12}


@pytest.mark.parametrize("size", [(2, 2), (1, 3), (1, 1)])
def test_image_smaller_than_a_patch_is_one_patch(size):
    X, y = problem(sides=size, channels=1)
    sampler = SPMixSampler(patch_size=4, mix_prob=1, random_state=0, data_format="channels_last")
    with pytest.warns(UserWarning, match=r"patch_size=4 is larger than the images"):
        X_new, _ = sampler.fit_resample(X, y)
    np.testing.assert_array_equal(sampler.ratio_, np.full((29, 1, 1), 0.5, np.float32))
    pair = X[[sampler.sample_indices_, sampler.partner_indices_]].astype(float).mean(0)
    assert np.abs(X_new[len(X) :] - pair).max() <= 0.5


def test_constant_images_mix_at_the_floor():
    _, y = problem()
    X = np.full((len(y), 12, 12), 10, np.uint8)
    X[y == 0] = 30
    sampler = SPMixSampler(mix_prob=1, random_state=0, partners="majority")
    X_new, _ = sampler.fit_resample(X, y)
    assert (sampler.ratio_ == 0.5).all()
    assert (X_new[len(X) :] == 20).all()


# ---------------------------------------------------------------- maps, lazy input, patients


def test_given_maps_decide():
    X, y = problem()
    maps = np.zeros((len(X), 12, 10), bool)
    maps[:, :6, :5] = True
    sampler = SPMixSampler(patch_size=(6, 5), mix_prob=1, random_state=0)
    sampler.fit_resample(X, y, maps=maps)
    np.testing.assert_allclose(sampler.ratio_, np.tile([[[0.8, 0.5], [0.5, 0.5]]], (29, 1, 1)))
    np.testing.assert_allclose(
        sampler.fit_resample(X, y, maps=maps.astype(np.uint8) * 255)[0],
        sampler.fit_resample(X, y, maps=maps.astype(float))[0],
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda maps: maps[..., None],
        lambda maps: maps[:, None],
        lambda maps: maps.reshape(len(maps), -1),
        lambda maps: 255 * maps.astype(np.int64),
        lambda maps: torch.from_numpy(maps),
        list,
    ],
)
def test_maps_come_in_many_forms(change):
    X, y = problem()
    maps = np.zeros((len(X), 12, 10), bool)
    maps[:, 3:9, 2:7] = True
    wanted, _ = SPMixSampler(random_state=0).fit_resample(X, y, maps=maps)
    found, _ = SPMixSampler(random_state=0).fit_resample(X, y, maps=change(maps))
    np.testing.assert_array_equal(found, wanted)


def test_maps_of_the_transformer_are_those_of_the_sampler():
    X, y = problem()
    flat, shape = X.reshape(len(X), -1), (12, 10, 3)
    maps = SaliencyMap(image_shape=shape).fit_transform(flat)
    wanted, _ = SPMixSampler(image_shape=shape, random_state=0).fit_resample(flat, y)
    found, _ = SPMixSampler(image_shape=shape, random_state=0).fit_resample(flat, y, maps=maps)
    np.testing.assert_array_equal(found, wanted)
    pixel = {"merge": "pixel", "image_shape": shape, "random_state": 0}
    wanted, _ = SPMixSampler(**pixel).fit_resample(flat, y)
    found, _ = SPMixSampler(**pixel).fit_resample(flat, y, maps=maps)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    "params",
    [
        {"polarity": "dark"},
        {"polarity": "bright"},
        {"mask": "auto"},
        {"saliency": "center"},
        {"saliency": "spectral_residual"},
    ],
)
def test_where_saliency_comes_from_reaches_the_mix(params):
    X, y = problem((20, 8), sides=(24, 24), channels=1)
    X[:, :4], X[:, 10:14, 10:14] = 0, X[:, 10:14, 10:14] // 3
    X = X[..., 0]
    sampler = SPMixSampler(**params, mix_prob=1, random_state=0)
    sampler.fit_resample(X, y)
    maps = SaliencyMap(**params).fit_transform(X)
    ratio = spmix_ratio(
        torch.from_numpy(maps[sampler.sample_indices_]),
        torch.from_numpy(maps[sampler.partner_indices_]),
        sampler.patch_size_,
    )
    np.testing.assert_allclose(sampler.ratio_, ratio, atol=1e-6)
    plain = SPMixSampler(mix_prob=1, random_state=0)
    plain.fit_resample(X, y)
    assert not np.allclose(plain.ratio_, sampler.ratio_)


@pytest.mark.parametrize("dtype", [">u2", ">i2", ">f4", ">f8"])
def test_byte_order_does_not_matter(dtype):
    X, y = problem()
    wanted, _ = SPMixSampler(random_state=0).fit_resample(X.astype(dtype[1:]), y)
    found, _ = SPMixSampler(random_state=0).fit_resample(X.astype(dtype), y)
    np.testing.assert_array_equal(found, wanted)


def test_list_of_pil_images():
    image = pytest.importorskip("PIL.Image")
    X, y = problem()
    wanted, _ = SPMixSampler(random_state=0).fit_resample(X, y)
    found, _ = SPMixSampler(random_state=0).fit_resample([image.fromarray(x) for x in X], y)
    np.testing.assert_array_equal(found, wanted)


def test_thin_volumes_need_no_warning():
    X, y = problem((8, 4), sides=(40, 40), channels=1)
    thin = np.repeat(X[:, None, :, :, 0], 2, axis=1)
    sampler = SPMixSampler(spatial_dims=3, random_state=0)
    sampler.fit_resample(thin, y)
    assert sampler.patch_size_ == (2, 3, 3)


def test_callable_saliency_sees_unit_images():
    seen = []

    def detect(images):
        seen.append((float(images.max()), images.shape[1:]))
        return images[:, 0]

    X, y = problem()
    SPMixSampler(saliency=detect, random_state=0).fit_resample(X, y)
    assert max(top for top, _ in seen) <= 1
    assert seen[0][1] == (3, 12, 10)


def test_lazy_input_stays_lazy_and_only_mixed_images_are_read():
    X, y = problem((30, 10, 2))
    wanted, y_wanted = SPMixSampler(
        sampling_strategy={2: 6}, mix_prob=1, random_state=0, partners="majority"
    ).fit_resample(X, y)
    lazy = LazyImages(X)
    sampler = SPMixSampler(
        sampling_strategy={2: 6}, mix_prob=1, random_state=0, partners="majority"
    )
    X_new, y_new = sampler.fit_resample(lazy, y)
    used = np.unique([sampler.sample_indices_, sampler.partner_indices_])
    assert lazy.n_reads == 2 * len(used)  # once for the map, once for the mix
    assert not lazy.was_converted
    assert is_lazy(X_new)
    assert X_new.shape == wanted.shape
    assert X_new.dtype == wanted.dtype
    np.testing.assert_array_equal(y_new, y_wanted)
    np.testing.assert_array_equal(np.stack([X_new[i] for i in range(len(X_new))]), wanted)
    part = X_new[np.array([45, 3, 0]), ...][1:]
    assert part.shape == (2, 12, 10, 3)
    np.testing.assert_array_equal(part[0], X[3])
    with pytest.raises(IndexError):
        X_new[len(wanted)]
    with pytest.raises(IndexError, match="by rows only"):
        X_new[2, 3]


def test_patients_are_not_mixed_with_themselves():
    X, y = problem((40, 12))
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 4, len(y)).astype(str)
    sampler = SPMixSampler(sampling_strategy={1: 400}, random_state=0)
    sampler.fit_resample(X, y, groups=groups)
    assert (groups[sampler.sample_indices_] != groups[sampler.partner_indices_]).all()
    per_row = np.bincount(sampler.partner_indices_, minlength=len(y))
    assert (per_row[y == 0] > 0).all()
    sampler.fit_resample(X, y)
    assert (groups[sampler.sample_indices_] == groups[sampler.partner_indices_]).any()


def test_patient_who_owns_the_head_class_gets_another_partner():
    X, y = problem((10, 4, 2))
    groups = np.where(y == 1, 1, 0)  # one patient has all of classes 0 and 2
    sampler = SPMixSampler(sampling_strategy={2: 8}, random_state=0, partners="majority")
    sampler.fit_resample(X, y, groups=groups)
    assert set(y[sampler.partner_indices_]) == {1}
    with pytest.raises(ValueError, match="groups names a single patient"):
        sampler.fit_resample(X, y, groups=np.zeros(len(y)))


def test_groups_are_routed_through_a_pipeline(tiny):
    X, y = problem((24, 8, 6))
    groups = np.arange(len(y)) // 2
    sampler = Recorder(random_state=0)
    with config_context(enable_metadata_routing=True):
        pipeline = make_pipeline(
            sampler.set_fit_resample_request(groups=True),
            SoftmaxClassifier(**tiny).set_fit_request(groups=False, sample_weight=False),
        )
        pipeline.fit(X, y, groups=groups)
    np.testing.assert_array_equal(pipeline[0].groups_, groups)


class Recorder(SPMixSampler):
    """Keeps what it was given."""

    seen: ClassVar[list] = []

    def fit_resample(self, X, y, *, groups=None, maps=None):
        self.seen.append((X.shape, X.dtype, groups))
        self.groups_, self.shape_, self.dtype_ = groups, X.shape, X.dtype
        return super().fit_resample(X, y, groups=groups, maps=maps)


# ---------------------------------------------------------------- composition


def test_pipeline_inside_a_grid_search(tiny):
    X, y = problem((24, 12, 8))
    pipeline = make_pipeline(Recorder(random_state=0), SoftmaxClassifier(**tiny))
    search = GridSearchCV(
        pipeline,
        {"recorder__cap": [0.6, 0.8], "recorder__partners": ["head", "any"]},
        cv=StratifiedKFold(2),
        error_score="raise",
    ).fit(X, y)
    best = search.best_estimator_
    assert best[0].dtype_ == np.uint8
    assert best[0].shape_ == X.shape
    assert best[1].pixel_range_ == "uint8"
    assert search.predict(X).shape == y.shape


@pytest.mark.parametrize("layout", ["last", "first", "gray", "flat", "volume"])
def test_estimators_hand_their_images_over_as_they_are(layout, tiny):
    X, y = problem((24, 8, 6), sides=(8, 8))
    groups = np.arange(len(y)) // 2
    params = {}
    if layout == "first":
        X = np.moveaxis(X, -1, 1)
    elif layout == "gray":
        X = X[..., 0]
    elif layout == "flat":
        X, params = X.reshape(len(X), -1), {"image_shape": (8, 8, 3)}
    elif layout == "volume":
        X, params = np.repeat(X[..., :1], 8, axis=-1), {"spatial_dims": 3}
    clf = SoftmaxClassifier(**tiny, **params, sampler=Recorder(), early_stopping=True)
    Recorder.seen.clear()
    clf.fit(X, y, groups=groups)
    ((shape, dtype, patients),) = Recorder.seen
    sides = {"gray": (1, 8, 8), "volume": (1, 8, 8, 8)}.get(layout, (3, 8, 8))
    assert shape[1:] == sides
    assert dtype == np.uint8
    assert len(patients) == shape[0] < len(y)  # after the validation split
    assert not hasattr(clf.sampler, "ratio_")  # the parameter is cloned


def test_resample_keeps_patients_apart_and_uint8_whole():
    X, y = problem((24, 8, 6), sides=(8, 8))
    clf = SoftmaxClassifier()
    images = clf._read(X, reset=True)
    groups = np.arange(len(y)) // 3
    rows = np.arange(0, len(y), 2)
    new, picks, labels, weight, origin = resample(
        SPMixSampler(), images, rows, y[rows], None, 0, groups=groups[rows]
    )
    assert weight is None
    assert new.dtype == np.uint8
    assert new.image_shape == (3, 8, 8)
    np.testing.assert_array_equal(new.rows(np.arange(len(rows))), images.rows(rows), strict=True)
    counts = np.bincount(labels)
    assert len(set(counts)) == 1
    np.testing.assert_array_equal(picks, np.arange(counts.sum()))
    np.testing.assert_array_equal(origin[: len(rows)], rows)
    assert (origin[len(rows) :] == -1).all()


def test_estimator_with_sampler_reads_a_lazy_x(tiny):
    X, y = problem((24, 8, 6), sides=(8, 8))
    params = {**tiny, "sampler": SPMixSampler(random_state=0)}
    eager = SoftmaxClassifier(**params).fit(X, y)
    lazy = LazyImages(X)
    late = SoftmaxClassifier(**params).fit(lazy, y)
    assert not lazy.was_converted
    np.testing.assert_allclose(eager.predict_proba(X), late.predict_proba(X), atol=1e-5)


def test_sampler_changes_what_the_network_sees(tiny):
    X, y = problem((24, 8, 6), sides=(8, 8))
    plain = SoftmaxClassifier(**tiny).fit(X, y)
    mixed = SoftmaxClassifier(**tiny, sampler=SPMixSampler()).fit(X, y)
    assert not np.allclose(plain.predict_proba(X), mixed.predict_proba(X))


# ---------------------------------------------------------------- bad input

GOOD_X, GOOD_Y = problem((6, 3))
BAD = {
    "cap above 1": ({"cap": 1.2}, {}, "'cap' parameter"),
    "mix_prob above 1": ({"mix_prob": 2}, {}, "'mix_prob' parameter"),
    "negative floor": ({"floor": -0.1}, {}, "'floor' parameter"),
    "patch of 0": ({"patch_size": 0}, {}, "'patch_size' parameter"),
    "patch of one axis": ({"patch_size": (2,)}, {}, r"patch_size=\(2,\) must hold"),
    "fractional patch": ({"patch_size": (2, 2.5)}, {}, "patch_size"),
    "unknown merge": ({"merge": "token"}, {}, "'merge' parameter"),
    "unknown saliency": ({"saliency": "sobel"}, {}, "'saliency' parameter"),
    "maps as a parameter": ({"saliency": np.ones((9, 12, 10))}, {}, "'saliency' parameter"),
    "unknown polarity": ({"polarity": "gray"}, {}, "'polarity' parameter"),
    "unknown mask": ({"mask": "black"}, {}, "'mask' parameter"),
    "unknown partners": ({"partners": "tail"}, {}, "'partners' parameter"),
    "unknown strategy": ({"sampling_strategy": "tail"}, {}, "sampling_strategy"),
    "shrinking strategy": ({"sampling_strategy": {1: 2}}, {}, "greater or equal"),
    "absent class": ({"sampling_strategy": {5: 9}}, {}, "not present"),
    "wrong image_shape": ({"image_shape": (5, 5)}, {}, "image_shape"),
    "unknown device": ({"device": "tpu9"}, {}, "device='tpu9'"),
    "one class": ({}, {"y": np.zeros(9)}, "more than 1 class"),
    "NaN": ({}, {"X": np.where(GOOD_X[3, 0, 0, 0] == GOOD_X, np.nan, 1.0)}, "NaN.*row"),
    "short y": ({}, {"y": GOOD_Y[:5]}, "inconsistent numbers"),
    "short groups": ({}, {"groups": [1, 2]}, r"groups has shape \(2,\)"),
    "short maps": ({}, {"maps": np.ones((2, 12, 10))}, r"maps has maps of shape \(2, 12, 10\)"),
    "maps above 1": ({}, {"maps": np.full((9, 12, 10), 1.5)}, "maps must give finite maps"),
    "ragged list": ({}, {"X": [np.zeros((4, 4))] * 8 + [np.zeros((4, 5))]}, "row 8"),
    "continuous y": ({}, {"y": np.linspace(0, 1, 9)}, "Unknown label type"),
}


@pytest.mark.parametrize(("params", "call", "message"), BAD.values(), ids=BAD)
def test_bad_input_gets_a_clear_error(params, call, message):
    sampler = SPMixSampler(**{"random_state": 0, **params})
    with pytest.raises(ValueError, match=message):
        sampler.fit_resample(**{"X": GOOD_X, "y": GOOD_Y, **call})
    assert not hasattr(sampler, "ratio_")


def test_weights_are_refused_beside_a_sampler_of_new_images(tiny):
    X, y = problem((6, 3))
    clf = SoftmaxClassifier(**tiny, sampler=SPMixSampler())
    with pytest.raises(ValueError, match="sample_weight"):
        clf.fit(X, y, sample_weight=np.ones(9))


def test_clone_keeps_a_callable():
    sampler = SPMixSampler(saliency=fine_grained, cap=0.7)
    assert clone(sampler).get_params() == sampler.get_params()
