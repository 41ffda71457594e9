"""Plans, normalisation and device batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from imblearn.over_sampling import SMOTE, RandomOverSampler
from imblearn.under_sampling import NearMiss, RandomUnderSampler
from torch.utils.data import DataLoader, TensorDataset

from sklearn_medimb import BalancedBatchSampler, SoftmaxClassifier
from sklearn_medimb._data.batches import Preprocessor
from sklearn_medimb._data.plans import class_balanced, pk, shuffled
from sklearn_medimb.augment import AUGMENTATIONS, Augmentation
from sklearn_medimb.backbones import ConvNet
from tests.helpers import images_of, make_batches, noise_images, numbered

CPU = torch.device("cpu")


def rng(seed=0):
    return np.random.default_rng(seed)


# ---------------------------------------------------------------- shuffled


@pytest.mark.parametrize(
    ("n_rows", "batch_size"),
    [(1, 1), (1, 8), (8, 8), (9, 8), (17, 4), (100, 7), (5000, 64), (7, 1)],
)
def test_shuffled_covers_each_row_once(n_rows, batch_size):
    plan = shuffled(n_rows, batch_size, rng())
    np.testing.assert_array_equal(np.sort(np.concatenate(plan)), np.arange(n_rows))
    sizes = [len(batch) for batch in plan]
    assert len(plan) == -(-n_rows // batch_size)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


def test_shuffled_shuffles():
    generator = rng()
    one, two = (np.concatenate(shuffled(100, 10, generator)) for _ in range(2))
    assert not np.array_equal(one, two)
    assert not np.array_equal(one, np.arange(100))
    np.testing.assert_array_equal(one, np.concatenate(shuffled(100, 10, rng())))


# ---------------------------------------------------------------- class_balanced

PLANS = [
    # rows per class, batch size, batches
    ([50, 20, 3], 9, 6),
    ([50, 20, 3], 4, 9),
    ([50, 20, 3], 8, 9),
    ([50, 20, 3], 10, 9),
    ([30, 1], 8, 5),
    ([30, 1], 7, 5),
    ([5, 5, 5, 5, 5], 3, 10),
    ([9, 8, 7, 6, 5, 4, 3, 2, 1, 1, 1], 4, 14),
    ([4, 4], 1, 6),
    ([2, 3, 4, 5, 6, 7, 8], 5, 1),
]


def balanced_problem(counts, seed):
    return rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


@pytest.mark.parametrize(("counts", "batch_size", "n_batches"), PLANS)
def test_class_counts_differ_by_at_most_one(counts, batch_size, n_batches):
    for seed in range(10):
        y = balanced_problem(counts, seed)
        plan = class_balanced(y, batch_size, n_batches, rng(seed))
        assert [len(batch) for batch in plan] == [batch_size] * n_batches
        for batch in plan:
            per_class = np.bincount(y[batch], minlength=len(counts))
            assert per_class.max() - per_class.min() <= 1


@pytest.mark.parametrize(("counts", "batch_size", "n_batches"), PLANS)
def test_class_counts_of_the_epoch_differ_by_at_most_one(counts, batch_size, n_batches):
    for seed in range(10):
        y = balanced_problem(counts, seed)
        rows = np.concatenate(class_balanced(y, batch_size, n_batches, rng(seed)))
        per_class = np.bincount(y[rows], minlength=len(counts))
        assert per_class.max() - per_class.min() <= 1


@pytest.mark.parametrize(("counts", "batch_size", "n_batches"), PLANS)
def test_a_deck_is_used_up_before_it_is_shuffled_again(counts, batch_size, n_batches):
    y = balanced_problem(counts, 1)
    rows = np.concatenate(class_balanced(y, batch_size, n_batches, rng()))
    for label, count in enumerate(counts):
        drawn = rows[y[rows] == label]
        for start in range(0, len(drawn), count):
            deck = drawn[start : start + count]
            assert len(set(deck.tolist())) == len(deck)


def test_the_tail_is_covered():
    """Every image of the rare classes appears where the draws suffice."""
    y = balanced_problem([90, 12, 5], 0)
    rows = np.concatenate(class_balanced(y, 12, 4, rng()))  # 16 draws per class
    assert set(np.flatnonzero(y > 0)) <= set(rows)


def test_more_classes_than_a_batch_holds():
    y = balanced_problem([3] * 20, 0)
    for seed in range(5):
        plan = class_balanced(y, 6, 10, rng(seed))
        for batch in plan:
            assert len(set(y[batch])) == 6
        # Within four batches (24 draws) every class has had its turn.
        assert set(y[np.concatenate(plan[:4])]) == set(range(20))


def test_no_class_is_favoured_in_uneven_batches():
    y = balanced_problem([10, 10, 10], 0)
    generator, extra = rng(), np.zeros(3)
    for _ in range(300):
        extra += np.bincount(y[class_balanced(y, 4, 1, generator)[0]], minlength=3) - 1
    assert extra.sum() == 300
    assert extra.min() > 70


def test_class_balanced_depends_on_the_generator_only():
    y = balanced_problem([20, 5], 0)
    one, two, other = (np.concatenate(class_balanced(y, 4, 5, rng(s))) for s in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


# ---------------------------------------------------------------- Preprocessor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4, 5), (6, 3, 2, 4, 5)], ids=str)
@pytest.mark.parametrize("stored", [np.uint8, np.float32])
def test_preprocessor(shape, stored, dtype):
    rows = rng().integers(0, 256, shape).astype(stored)
    mean, std = np.array([0.1, 0.5, 3.0]), np.array([0.2, 1.0, 7.0])
    prepare = Preprocessor(mean, std, dtype=dtype, device=CPU, channels_last=True)
    got = prepare(torch.from_numpy(rows.copy()))
    values = rows / 255.0 if stored == np.uint8 else rows.astype(np.float64)
    column = (1, 3, *[1] * (len(shape) - 2))
    expected = (values - mean.reshape(column)) / std.reshape(column)
    assert got.dtype == dtype
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_preprocessor_leaves_its_input():
    rows = torch.rand(6, 3, 4, 5)
    before = rows.clone()
    Preprocessor(np.ones(3), np.ones(3), dtype=torch.float32, device=CPU)(rows)
    assert torch.equal(rows, before)


@pytest.mark.parametrize(
    ("shape", "last"),
    [((6, 3, 4, 5), torch.channels_last), ((6, 3, 2, 4, 5), torch.channels_last_3d)],
)
def test_memory_format(shape, last):
    rows = torch.rand(shape)
    one, zero = np.ones(3), np.zeros(3)
    there = Preprocessor(zero, one, dtype=torch.float32, device=CPU, channels_last=True)(rows)
    here = Preprocessor(zero, one, dtype=torch.float32, device=CPU)(rows)
    assert there.is_contiguous(memory_format=last)
    assert here.is_contiguous()
    assert torch.equal(there, here)


# ---------------------------------------------------------------- Batches


def test_images_and_targets_stay_together():
    rows = np.array([7, 2, 9, 4, 0, 1])
    seen = []
    for images, targets in make_batches(numbered(), rows=rows):
        assert torch.equal(images[:, 0, 0, 0], targets.float())
        seen += targets.tolist()
    assert sorted(seen) == sorted(rows)


def test_plans_count_within_the_rows():
    rows = np.array([7, 2, 9, 4])
    batches = make_batches(
        numbered(), rows=rows, plan=lambda rng: [np.array([3, 0]), np.array([1])]
    )
    got = [images[:, 0, 0, 0].tolist() for images, _ in batches]
    assert got == [[4, 7], [2]]


def test_each_epoch_has_its_own_plan():
    batches = make_batches(numbered(40))
    one, two = (torch.cat([targets for _, targets in batches]) for _ in range(2))
    assert not torch.equal(one, two)
    assert torch.equal(one.sort().values, two.sort().values)


@pytest.mark.parametrize("n_views", [1, 2, 3])
def test_views(n_views):
    """Each view holds the same rows in the same order, augmented on its own."""
    array = noise_images()
    plain = list(make_batches(array, n_views=n_views))
    changed = list(make_batches(array, n_views=n_views, augment="strong"))
    assert len(plain) == 3
    for (images, targets), (augmented, same) in zip(plain, changed, strict=True):
        assert torch.equal(targets, same)
        assert len(images) == len(augmented) == n_views * len(targets)
        views = images.chunk(n_views)
        for view in views:
            np.testing.assert_array_equal(view.numpy(), array[targets.numpy()])
        views = augmented.chunk(n_views)
        for i, view in enumerate(views):
            different = (view - torch.from_numpy(array[targets.numpy()])).abs().amax(dim=(1, 2, 3))
            assert (different > 1).all()
            for other in views[:i]:
                assert ((view - other).abs().amax(dim=(1, 2, 3)) > 1).all()


@pytest.mark.parametrize("augment", ["none", "light", "medical", "chest", "strong"])
def test_same_seed_same_batches(augment):
    array = noise_images()
    one, two = (list(make_batches(array, augment=augment, n_views=2)) for _ in range(2))
    for (a, t), (b, s) in zip(one, two, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(t, s)


def test_other_seed_other_batches():
    array = noise_images()
    fixed = lambda rng: [np.arange(10)]  # noqa: E731
    one, two = (
        next(iter(make_batches(array, augment="medical", seed=seed, plan=fixed)))[0]
        for seed in (0, 1)
    )
    assert not torch.allclose(one, two)


def test_global_generators_are_untouched():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(make_batches(noise_images(), augment="strong", n_views=2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("augment", ["none", "medical"])
def test_uint8_is_float_over_255(augment):
    array = noise_images(dtype=np.uint8)
    batches = make_batches(array, augment=augment)
    reference = make_batches((array / 255).astype(np.float32), augment=augment)
    for (a, _), (b, _) in zip(batches, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_augmented_then_normalised():
    """Augmentation works on the original scale, normalisation follows."""
    array = noise_images(dtype=np.uint8)
    mean, std = np.array([0.4, 0.5, 0.6]), np.array([0.1, 0.2, 0.3])
    augment = AUGMENTATIONS["medical"]()
    batches = make_batches(array, augment=augment, plan=lambda rng: [np.arange(10)])
    batches.preprocess = Preprocessor(mean, std, dtype=torch.float32, device=CPU)
    ((got, _),) = batches
    raw = augment(torch.from_numpy(array).float() / 255, torch.Generator().manual_seed(0))
    expected = (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)


def test_the_caller_s_images_are_never_changed():
    for dtype in (np.uint8, np.float32):
        array = noise_images(dtype=dtype)
        before = array.copy()
        for images, _ in make_batches(array, augment="strong"):
            images.zero_()
        np.testing.assert_array_equal(array, before)


def test_vectors_are_not_augmented():
    array = rng().random((10, 6)).astype(np.float32)
    images = images_of(array)
    assert images.image_shape == (6,)
    batches = make_batches(array, augment="strong")
    for got, targets in batches:
        np.testing.assert_array_equal(got.numpy(), array[targets.numpy()])


class OnlyDrawAndApply:
    """The least that `augment` may be, as the constructor's documentation says."""

    def draw(self, n, image_shape, generator):
        return {"shift": torch.rand(n, generator=generator)}

    def apply(self, images, params):
        return images + params["shift"].view(-1, 1, 1, 1)


def test_own_augmentation_with_draw_and_apply():
    X = noise_images(12)
    clf = SoftmaxClassifier(
        ConvNet((4, 8)), max_epochs=1, augment=OnlyDrawAndApply(), device="cpu", random_state=0
    )
    assert clf.fit(X, np.arange(12) % 2).predict(X).shape == (12,)


class Counting(Augmentation):
    """Adds 1 to the first view it makes, 2 to the second, and so on."""

    @property
    def is_identity(self):
        return False

    def apply(self, images, params):
        self.n_views = getattr(self, "n_views", 0) + 1
        return images + self.n_views


def test_every_view_is_one_call_for_the_whole_batch():
    augment = Counting()
    sizes = []
    for images, targets in make_batches(numbered(), augment=augment, n_views=2):
        first, second = images[:, 0, 0, 0].chunk(2)
        assert torch.equal(second - first, torch.ones(len(targets)))
        sizes.append(len(targets))
    assert augment.n_views == 2 * len(sizes)


# ---------------------------------------------------------------- P x K


@pytest.mark.parametrize(
    ("counts", "n_classes", "n_per_class", "n_batches"),
    [([50, 20, 3], 2, 4, 9), ([50, 20, 3], 3, 5, 4), ([9, 1, 1, 4], 3, 2, 7), ([5, 5], 1, 3, 4)],
)
def test_pk_batches_hold_k_rows_of_p_classes(counts, n_classes, n_per_class, n_batches):
    for seed in range(10):
        y = balanced_problem(counts, seed)
        plan = pk(y, n_classes, n_per_class, n_batches, rng(seed))
        assert len(plan) == n_batches
        turns = np.zeros(len(counts), dtype=int)
        for batch in plan:
            blocks = batch.reshape(n_classes, n_per_class)
            assert (y[blocks] == y[blocks[:, :1]]).all()
            assert len(set(y[blocks[:, 0]])) == n_classes
            for block in blocks:
                assert len(set(block)) == min(n_per_class, counts[y[block[0]]])
            turns[y[blocks[:, 0]]] += 1
        assert turns.max() - turns.min() <= 1
        times = np.bincount(np.concatenate(plan), minlength=len(y))
        for label in range(len(counts)):
            own = times[y == label]
            assert own.max() - own.min() <= 1 or counts[label] < n_per_class


# ---------------------------------------------------------------- BalancedBatchSampler


def test_batch_sampler_feeds_a_loader_and_covers_the_tail():
    y = np.random.default_rng(0).permutation(np.repeat(["a", "b", "c"], [80, 15, 5]))
    data = TensorDataset(torch.arange(100))
    batches = BalancedBatchSampler(y, batch_size=9, random_state=0)
    loader = DataLoader(data, batch_sampler=batches)
    assert len(loader) == 12
    rows = [batch.numpy() for (batch,) in loader]
    for batch in rows:
        assert sorted(y[batch]) == ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    seen = set(np.concatenate(rows))
    assert set(np.flatnonzero(y != "a")) <= seen
    assert len(seen & set(np.flatnonzero(y == "a"))) == 36


@pytest.mark.parametrize(
    "params",
    [{}, {"plan": "pk"}, {"sampler": RandomOverSampler()}, {"sampler": RandomUnderSampler()}],
)
def test_batch_sampler_draws_each_epoch_anew_from_one_seed(params):
    y = np.repeat([0, 1, 2], [40, 12, 6])
    batches = BalancedBatchSampler(y, batch_size=12, random_state=3, **params)
    again = BalancedBatchSampler(y, batch_size=12, random_state=3, **params)
    first, second = list(batches), list(batches)
    assert len(first) == len(batches)
    assert first != second
    assert list(again) == first
    again.set_epoch(0)
    assert list(again) == first
    assert list(again) == second
    other = BalancedBatchSampler(y, batch_size=12, random_state=4, **params)
    assert list(other) != first


def test_batch_sampler_turns_a_selecting_sampler_into_batches():
    y = np.repeat([0, 1, 2], [40, 12, 6])
    rows = np.concatenate(list(BalancedBatchSampler(y, RandomUnderSampler(), batch_size=5)))
    assert len(rows) == 18
    assert len(set(rows)) == 18
    np.testing.assert_array_equal(np.bincount(y[rows]), [6, 6, 6])
    assert set(range(52, 58)) <= set(rows)  # the tail, whole
    rows = np.concatenate(
        list(BalancedBatchSampler(y, RandomOverSampler(random_state=0), batch_size=7))
    )
    np.testing.assert_array_equal(np.bincount(y[rows]), [40, 40, 40])
    assert set(rows) == set(range(58))


def test_batch_sampler_with_pk_plan():
    y = np.repeat([0, 1, 2, 3], [40, 12, 6, 3])
    batches = BalancedBatchSampler(y, plan="pk", batch_size=13, n_per_class=3, random_state=0)
    assert batches.batch_size == 12
    for batch in batches:
        np.testing.assert_array_equal(np.bincount(y[batch]), [3, 3, 3, 3])


@pytest.mark.parametrize(
    ("y", "params", "message"),
    [
        ([0, 1], {"batch_size": 0}, "batch_size=0"),
        ([0, 1], {"batch_size": 2.5}, "batch_size=2.5"),
        ([0, 1], {"n_per_class": 0}, "n_per_class=0"),
        ([0, 1], {"n_batches": -1}, "n_batches=-1"),
        ([0, 1], {"n_batches": 0}, "n_batches=0"),
        ([0, 1], {"sampler": NearMiss()}, "NearMiss looks at features"),
        ([0.5, 1.2], {}, "continuous"),
        ([0, 1], {"plan": "random"}, "plan='random'"),
        ([0, 1], {"plan": "pk", "batch_size": 3}, "batch_size=3 holds no class"),
        ([], {}, "y is empty"),
        ([[0, 1], [1, 0]], {}, "1d array"),
    ],
)
def test_batch_sampler_refuses_bad_input(y, params, message):
    with pytest.raises(ValueError, match=message):
        BalancedBatchSampler(y, **params)


def test_batch_sampler_refuses_a_sampler_that_makes_rows():
    y = np.repeat([0, 1], [40, 12])
    batches = BalancedBatchSampler(y, SMOTE(), X=np.random.default_rng(0).random((52, 2)))
    with pytest.raises(ValueError, match="SMOTE makes new rows"):
        list(batches)


def test_batch_sampler_takes_only_samplers():
    with pytest.raises(TypeError, match="sampler=16"):
        BalancedBatchSampler([0, 1], 16)


def test_batch_sampler_shows_features_to_samplers_that_look_at_them():
    y = np.repeat([0, 1], [40, 12])
    X = np.random.default_rng(0).normal(size=(52, 3))
    rows = np.concatenate(list(BalancedBatchSampler(y, NearMiss(), X=X)))
    wanted = NearMiss()
    wanted.fit_resample(X, y)
    assert sorted(rows) == sorted(wanted.sample_indices_)


@pytest.mark.parametrize("plan", ["class_balanced", "pk"])
@pytest.mark.parametrize(
    ("counts", "batch_size"),
    [([12] + [7] * 12, 32), ([4] * 16 + [1] * 4, 16), ([80, 15, 5], 9), ([300, 2], 8)],
)
def test_each_epoch_covers_the_tail(plan, counts, batch_size):
    for seed in range(5):
        y = balanced_problem(counts, seed)
        batches = BalancedBatchSampler(y, plan=plan, batch_size=batch_size, random_state=seed)
        for _ in range(2):
            seen = set(np.concatenate(list(batches)))
            small = np.bincount(y)[y] <= len(y) / len(counts)
            assert set(np.flatnonzero(small)) <= seen
            assert set(y[list(seen)]) == set(y)
