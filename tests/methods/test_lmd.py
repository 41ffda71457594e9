"""LMD: relations, teacher and calibration against explicit formulas, and what each stage does."""

from __future__ import annotations

import copy
import math
import pickle
from itertools import product

import numpy as np
import pytest
import torch
from imblearn.over_sampling import RandomOverSampler
from sklearn.base import clone
from sklearn.metrics import balanced_accuracy_score, recall_score
from skorch.callbacks import Callback
from torch import nn

from sklearn_medimb import LMDClassifier, SoftmaxClassifier, VirtualFeatureCalibration, losses
from sklearn_medimb._training.network import Trunk
from sklearn_medimb.augment import Augmentation, resolve_augmentation
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.base import Output
from sklearn_medimb.base._two_stage import STAGE_ONE, STAGE_TWO
from sklearn_medimb.methods._lmd import (
    ICCLoss,
    LMDNetwork,
    RRLLoss,
    TwoViewBatches,
    batch_relation_loss,
    channel_relation_loss,
    distribution_consistency,
    flips_of,
    generalized_cross_entropy,
    mahalanobis,
    probability_consistency_loss,
)
from sklearn_medimb.over_sampling._virtual_features import ClassGaussians
from tests.gaussians import KINDS, moments, problem
from tests.helpers import (
    CrashAfter,
    EpochsRun,
    Watch,
    all_equal,
    make_batches,
    make_blobs,
    noise_images,
    numbered,
    same_arrays,
    snapshot,
    two_views,
)

# (B, d): fewer samples than channels and more, one sample, one channel.
SHAPES = pytest.mark.parametrize("shape", [(5, 3), (3, 7), (6, 6), (1, 4), (4, 1)])
FDC = pytest.mark.parametrize("kind", ["margin", "paper"])

NO_RELATIONS = {
    "batch_relation_weight": 0,
    "channel_relation_weight": 0,
    "consistency_weight": 0,
}


def faint_blobs(counts, seed):
    """Blobs under noise: a tail class that is hard to learn."""
    X, y = make_blobs(counts, channels=1, seed=seed)
    noise = np.random.default_rng(seed).normal(80, 37, X.shape)
    return (X / 2 + noise).clip(0, 255).astype(np.uint8), y


def network(clf):
    """State of the network: weights and buffers."""
    return {k: v.cpu().numpy().copy() for k, v in clf.net_.module_.state_dict().items()}


# ---------------------------------------------------------------- relations


def relation_by_loops(z, z_teacher):
    """1/B sum_ij (S_ij / |S_i| - S'_ij / |S'_i|)^2 with S = z z^T."""
    B, d = z.shape

    def similarity(z):
        rows = []
        for i in range(B):
            row = [sum(float(z[i, c] * z[j, c]) for c in range(d)) for j in range(B)]
            length = math.sqrt(sum(value**2 for value in row))
            rows.append([value / length for value in row])
        return rows

    S, S_teacher = similarity(z), similarity(z_teacher)
    return sum((S[i][j] - S_teacher[i][j]) ** 2 for i, j in product(range(B), repeat=2)) / B


@SHAPES
def test_batch_relation_equals_explicit_loop(shape):
    z, z_teacher = two_views(shape)
    expected = relation_by_loops(z, z_teacher)
    assert batch_relation_loss(z, z_teacher).item() == pytest.approx(expected, abs=1e-12)


@SHAPES
def test_channel_relation_equals_explicit_loop(shape):
    # T = z^T z: the same sums with samples and channels swapped, so the factor is 1/d.
    z, z_teacher = two_views(shape)
    expected = relation_by_loops(z.T, z_teacher.T)
    assert channel_relation_loss(z, z_teacher).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shape", [(5, 3), (1, 4), (7, 2)])
def test_consistency_equals_explicit_loop(shape):
    o, o_teacher = two_views(shape, scale=2.0)
    total = 0.0
    for row, row_teacher in zip(o.tolist(), o_teacher.tolist(), strict=True):
        p = [math.exp(v) / sum(map(math.exp, row)) for v in row]
        p_teacher = [math.exp(v) / sum(map(math.exp, row_teacher)) for v in row_teacher]
        for a, b in zip(p, p_teacher, strict=True):
            total += b * (math.log(b) - math.log(a)) / len(o)
    assert probability_consistency_loss(o, o_teacher).item() == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("loss", [batch_relation_loss, channel_relation_loss])
def test_relations_vanish_for_equal_views_and_only_see_directions(loss):
    z, z_teacher = two_views((6, 4))
    assert loss(z, z).item() == 0
    assert loss(z, 3.7 * z).item() == pytest.approx(0, abs=1e-24)
    value = loss(z, z_teacher).item()
    assert value > 0.1
    assert loss(z, 0.01 * z_teacher).item() == pytest.approx(value, rel=1e-9)


def test_batch_relation_does_not_see_rotations_of_feature_space():
    z, z_teacher = two_views((6, 4))
    rotation, _ = torch.linalg.qr(two_views((4, 4), seed=1)[0])
    turned = batch_relation_loss(z, z_teacher @ rotation)
    assert turned.item() == pytest.approx(batch_relation_loss(z, z_teacher).item(), rel=1e-9)
    assert batch_relation_loss(z, z @ rotation).item() == pytest.approx(0, abs=1e-24)


@pytest.mark.parametrize("loss", [batch_relation_loss, channel_relation_loss])
def test_relations_do_not_see_common_permutations_but_see_one_sided_ones(loss):
    z, z_teacher = two_views((6, 4))
    value = loss(z, z_teacher).item()
    samples, channels = torch.tensor([3, 1, 5, 0, 2, 4]), torch.tensor([2, 0, 3, 1])
    assert loss(z[samples], z_teacher[samples]).item() == pytest.approx(value, rel=1e-9)
    common = loss(z[:, channels], z_teacher[:, channels]).item()
    assert common == pytest.approx(value, rel=1e-9)
    one_sided = z[samples] if loss is batch_relation_loss else z[:, channels]
    assert loss(z, one_sided).item() > 0.1


@pytest.mark.parametrize("loss", [batch_relation_loss, channel_relation_loss])
def test_relations_are_at_most_two_for_rectified_features(loss):
    largest = 0.0
    for seed in range(30):
        z, z_teacher = two_views((4, 3), seed).relu() ** 4  # sparse: nearly orthogonal rows
        largest = max(largest, loss(z, z_teacher).item())
    assert 0.5 < largest <= 2


def test_batch_relation_of_equal_samples_with_unrelated_ones():
    # Rows (1, 1) / sqrt(2) against (1, 0) and (0, 1): 2 - sqrt(2) each.
    alike, apart = torch.ones(2, 1, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    assert batch_relation_loss(alike, apart).item() == pytest.approx(2 - math.sqrt(2))


@pytest.mark.parametrize("loss", [batch_relation_loss, channel_relation_loss])
def test_relations_do_not_depend_on_the_batch_size(loss):
    z, z_teacher = two_views((5, 4))
    doubled = loss(z.repeat(2, 1), z_teacher.repeat(2, 1))
    assert doubled.item() == pytest.approx(loss(z, z_teacher).item(), rel=1e-9)


def test_channel_relation_is_a_mean_over_channels():
    z, z_teacher = two_views((5, 4))
    doubled = channel_relation_loss(z.repeat(1, 2), z_teacher.repeat(1, 2))
    assert doubled.item() == pytest.approx(channel_relation_loss(z, z_teacher).item(), rel=1e-9)


def test_one_sample_has_no_batch_relation():
    z, z_teacher = two_views((1, 5))
    assert batch_relation_loss(z, z_teacher).item() == pytest.approx(0, abs=1e-24)
    assert channel_relation_loss(z, z_teacher).item() > 0


@pytest.mark.parametrize("loss", [batch_relation_loss, channel_relation_loss])
@pytest.mark.parametrize("dead", ["sample", "channel", "all"])
def test_dead_features_give_finite_values_and_gradients(loss, dead):
    before = two_views((5, 4))[0].float() + 0.5
    index = {"sample": (2,), "channel": (slice(None), 1), "all": (slice(None),)}[dead]
    before[index] = -1.0
    before.requires_grad_()
    z = before.relu()
    for z_teacher in (z.detach(), two_views((5, 4), seed=3)[1].float()):
        value = loss(z, z_teacher)
        (gradient,) = torch.autograd.grad(value, before, retain_graph=True)
        assert torch.isfinite(value)
        assert gradient.abs().max() < 100


@pytest.mark.parametrize(
    "loss", [batch_relation_loss, channel_relation_loss, probability_consistency_loss]
)
def test_gradients_reach_the_student_alone(loss):
    student, teacher = (view.clone().requires_grad_() for view in two_views((5, 4)))
    loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_consistency_is_zero_for_equal_probabilities_only():
    o, o_teacher = two_views((6, 4))
    shifted = o + torch.arange(6.0, dtype=torch.float64).unsqueeze(1)
    assert probability_consistency_loss(o, shifted).item() == pytest.approx(0, abs=1e-12)
    for seed in range(20):
        assert probability_consistency_loss(*two_views((6, 4), seed)).item() > 0
    nudged = o.clone()
    nudged[3, 2] += 0.01
    assert probability_consistency_loss(o, nudged).item() > 1e-8
    # KL is not symmetric: it is the teacher's probabilities that weigh.
    forward = probability_consistency_loss(o, o_teacher).item()
    assert forward != pytest.approx(probability_consistency_loss(o_teacher, o).item(), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_consistency_stays_finite_for_extreme_logits(dtype):
    o = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]], dtype=dtype)
    for o_teacher in (o, o.flip(1), torch.zeros_like(o), -o):
        student = o.clone().requires_grad_()
        value = probability_consistency_loss(student, o_teacher)
        value.backward()
        assert torch.isfinite(value)
        assert value >= 0
        assert torch.isfinite(student.grad).all()


# ---------------------------------------------------------------- the teacher


def small_network(seed=0):
    """Float64 network with batch normalisation, for 12 x 12 images of one channel."""
    torch.manual_seed(seed)
    shape = (1, 12, 12)
    trunk = Trunk(ConvNet(widths=(4, 8)).build(shape), shape, autocast=None)
    return LMDNetwork(trunk, lambda n_features: nn.Linear(n_features, 3)).double()


def make_rrl_loss(student, *, weights=(1.0, 2.0, 3.0), decay=0.999, teacher_mode="train"):
    label_loss = losses.LabelLoss(losses.cross_entropy, torch.ones(3, dtype=torch.float64))
    return RRLLoss(label_loss, student, weights=weights, decay=decay, teacher_mode=teacher_mode)


def move(student, seed):
    """A step of training, as far as the teacher can tell: other weights and running means."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*student.parameters(), *student.buffers()):
            if tensor.is_floating_point():
                tensor += torch.rand(tensor.shape, generator=generator, dtype=torch.float64)


def running_stats(module):
    return [buffer for buffer in module.buffers() if buffer.is_floating_point()]


def test_teacher_starts_as_a_copy_and_shares_nothing():
    student = small_network()
    loss = make_rrl_loss(student)
    before = snapshot(student.parameters())
    assert all_equal(loss.teacher.parameters(), before)
    move(student, 1)
    assert all_equal(loss.teacher.parameters(), before)
    assert not any(p.requires_grad for p in loss.teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())


def test_teacher_is_an_exact_copy_after_the_first_step():
    student = small_network()
    loss = make_rrl_loss(student)
    move(student, 1)
    loss.after_step(student)
    assert all_equal(loss.teacher.parameters(), student.parameters())
    move(student, 2)
    loss.after_step(student)
    assert not all_equal(loss.teacher.parameters(), student.parameters())


def test_teacher_without_memory_is_always_a_copy():
    student = small_network()
    loss = make_rrl_loss(student, decay=0)
    for step in range(5):
        move(student, step)
        loss.after_step(student)
        assert all_equal(loss.teacher.parameters(), student.parameters())


@pytest.mark.parametrize("decay", [0.999, 0.6])
def test_teacher_is_the_running_mean_of_the_student(decay):
    student = small_network()
    loss = make_rrl_loss(student, decay=decay)
    expected = [torch.zeros_like(p) for p in student.parameters()]
    past = []
    for t in range(8):
        move(student, t)
        loss.after_step(student)
        past.append(snapshot(student.parameters()))
        a = min(1 - 1 / (t + 1), decay)
        expected = [a * old + (1 - a) * new for old, new in zip(expected, past[-1], strict=True)]
        for value, wanted in zip(loss.teacher.parameters(), expected, strict=True):
            assert torch.allclose(value, wanted, rtol=0, atol=1e-12)
    if decay == 0.999:  # the cap is not reached: a plain mean of all students so far
        for value, *students in zip(loss.teacher.parameters(), *past, strict=True):
            assert torch.allclose(value, torch.stack(students).mean(dim=0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("teacher_mode", ["train", "eval"])
def test_running_means_follow_the_student_only_where_the_teacher_uses_them(teacher_mode):
    student = small_network()
    loss = make_rrl_loss(student, teacher_mode=teacher_mode)
    before = snapshot(running_stats(loss.teacher))
    students = []
    for step in range(3):
        move(student, step)
        loss.after_step(student)
        students.append(snapshot(running_stats(student)))
    if teacher_mode == "train":
        assert all_equal(running_stats(loss.teacher), before)
    else:
        for value, *seen in zip(running_stats(loss.teacher), *students, strict=True):
            assert torch.allclose(value, torch.stack(seen).mean(dim=0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("teacher_mode", ["train", "eval"])
def test_teacher_mode_stays_as_asked(teacher_mode):
    loss = make_rrl_loss(small_network(), teacher_mode=teacher_mode)
    loss.train()
    assert loss.training
    assert {m.training for m in loss.teacher.modules()} == {teacher_mode == "train"}
    loss.eval()
    assert {m.training for m in loss.teacher.modules()} == {False}


def test_step_count_travels_with_the_state():
    student = small_network()
    loss = make_rrl_loss(student)
    for step in range(3):
        move(student, step)
        loss.after_step(student)
    other = make_rrl_loss(small_network(1))
    other.load_state_dict(loss.state_dict())
    move(student, 3)
    for one in (loss, other):
        one.after_step(student)
    assert all_equal(loss.teacher.parameters(), other.teacher.parameters())


@pytest.mark.parametrize("teacher_mode", ["train", "eval"])
def test_stage_one_loss_is_the_weighted_sum_of_its_terms(teacher_mode):
    student = small_network()
    loss = make_rrl_loss(student, teacher_mode=teacher_mode).train()
    move(student, 1)
    strong, weak = (view.view(5, 1, 12, 12) for view in two_views((5, 144)))
    y = torch.tensor([0, 1, 2, 0, 1])
    teacher = copy.deepcopy(loss.teacher)
    value = loss(student(strong, weak), torch.eye(3, dtype=torch.float64)[y])

    with torch.no_grad():
        z, o, _ = student(strong)
        z_teacher, o_teacher, _ = teacher(weak)
    expected = {
        "ce": nn.functional.cross_entropy(o, y),
        "batch_relation": relation_by_loops(z, z_teacher),
        "channel_relation": relation_by_loops(z.T, z_teacher.T),
        "consistency": probability_consistency_loss(o, o_teacher),
    }
    expected = {name: float(term) for name, term in expected.items()}
    assert {name: term.item() for name, term in loss.terms.items()} == pytest.approx(expected)
    total = sum(w * term for w, term in zip((1, 1, 2, 3), expected.values(), strict=True))
    assert value.item() == pytest.approx(total)
    value.backward()
    assert all(p.grad is None for p in loss.teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_only_the_running_mean_moves_the_teacher_of_a_fit(tiny, blobs, monkeypatch):
    # Its parameters belong to the criterion, so the optimiser is told of them.
    monkeypatch.setattr(RRLLoss, "after_step", lambda self, student: None)
    seen = []

    def record(net):
        teacher = list(net.criterion_.teacher.parameters())
        assert all(p.grad is None for p in teacher)
        seen.append(snapshot(teacher))

    callbacks = [Watch(record)]
    params = {**tiny, "stages": "rrl", "relation_start": 0, "weight_decay": 0.5}
    clf = LMDClassifier(**params, callbacks=callbacks).fit(*blobs)
    assert len(seen) == 12
    assert all_equal(seen[0], seen[-1])
    assert not all_equal(seen[-1], clf.net_.module_.parameters())


@pytest.mark.parametrize("teacher_mode", ["train", "eval"])
def test_teacher_follows_the_steps_of_a_fit(teacher_mode, tiny, blobs):
    students, teachers, modes = [], [], set()

    def record(net):
        students.append(snapshot(net.module_.parameters()))
        teachers.append(snapshot(net.criterion_.teacher.parameters()))
        modes.add((net.module_.training, net.criterion_.teacher.training))

    params = {**tiny, "stages": "rrl", "teacher_mode": teacher_mode, "precision": "float64"}
    LMDClassifier(**params, callbacks=[Watch(record)]).fit(*blobs)
    assert modes == {(True, teacher_mode == "train")}
    assert all_equal(students[0], teachers[0])
    for value, *past in zip(teachers[-1], *students, strict=True):
        assert torch.allclose(value, torch.stack(past).mean(dim=0), rtol=0, atol=1e-12)


# ---------------------------------------------------------------- when relations begin


def test_before_the_relations_stage_one_is_cross_entropy_bit_for_bit(tiny, blobs):
    never = LMDClassifier(**tiny, stages="rrl", relation_start=1).fit(*blobs)
    without = LMDClassifier(**tiny, stages="rrl", **NO_RELATIONS).fit(*blobs)
    plain = SoftmaxClassifier(**tiny).fit(*blobs)
    assert same_arrays(network(never), network(plain))
    assert same_arrays(network(without), network(plain))
    for clf in (never, without):
        assert [row["train_loss"] for row in clf.stage1_history_] == [
            row["train_loss"] for row in plain.history_
        ]
    # "rrl" keeps the head of stage one.
    assert np.allclose(never.predict_proba(blobs[0]), plain.predict_proba(blobs[0]), atol=1e-6)


@pytest.mark.parametrize(
    ("n_epochs", "share", "start"), [(3, 0, 0), (7, 0.21, 1), (5, 0.5, 2), (4, 0.9, 4), (2, 1, 2)]
)
def test_relations_begin_in_the_epoch_of_their_share(n_epochs, share, start, tiny, blobs):
    assert round(share * n_epochs) == start
    params = {**tiny, "max_epochs": n_epochs, "batch_size": 60, "relation_start": share}
    clf = LMDClassifier(**params, n_rounds=2).fit(*blobs)
    rows = clf.stage1_history_
    assert len(rows) == n_epochs
    names = {"train_batch_relation", "train_channel_relation", "train_consistency"}
    for epoch, row in enumerate(rows):
        assert names & row.keys() == (names if epoch >= start else set())
        if epoch < start:
            assert row["train_loss"] == row["train_ce"]
        else:
            expected = (
                row["train_ce"]
                + clf.batch_relation_weight * row["train_batch_relation"]
                + clf.channel_relation_weight * row["train_channel_relation"]
                + clf.consistency_weight * row["train_consistency"]
            )
            assert row["train_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_warm_start_counts_its_own_epochs(tiny, blobs):
    params = {**tiny, "batch_size": 60, "relation_start": 0.67, "n_rounds": 2}
    clf = LMDClassifier(**params, warm_start=True).fit(*blobs).fit(*blobs)
    stages = [STAGE_ONE] * 3 + [STAGE_TWO]
    assert [row["stage"] for row in clf.history_] == stages * 2
    begun = ["train_batch_relation" in row for row in clf.history_]
    assert begun == [False, False, True, False] * 2


# ---------------------------------------------------------------- views


def test_flips_of_an_augmentation():
    weak = flips_of(resolve_augmentation("strong"))
    assert weak.horizontal_flip == 0.5
    rest = {k: v for k, v in weak.get_params().items() if "flip" not in k}
    assert rest == {k: v for k, v in Augmentation().get_params().items() if "flip" not in k}
    volume = Augmentation(depth_flip=0.3, vertical_flip=0.2, noise=0.1, cutout=0.5)
    assert flips_of(volume).get_params() == (
        Augmentation(depth_flip=0.3, vertical_flip=0.2).get_params()
    )
    assert flips_of(object()).is_identity  # a caller's own augmentation may know no flips


def test_weak_views_come_from_the_start_on_beside_strong_views_of_the_same_images():
    # Image i holds i everywhere, which rotations and flips keep.
    strong, epoch = Augmentation(rotation=90, horizontal_flip=0.5), [0]
    batches = make_batches(numbered(10), augment=strong)
    views = TwoViewBatches(batches, flips_of(strong), epoch=lambda: epoch[0], start=2)
    alone = make_batches(numbered(10), augment=strong)
    for epoch[0] in range(2):  # the weak view has not even taken a random number
        for (inputs, targets), (images, same) in zip(views, alone, strict=True):
            assert inputs.keys() == {"images"}
            assert torch.equal(inputs["images"], images)
            assert torch.equal(targets, same)
    for epoch[0] in (2, 3):
        rows = []
        for inputs, targets in views:
            assert inputs.keys() == {"images", "weak"}
            for view in inputs.values():
                wanted = targets.float().view(-1, 1, 1, 1).expand_as(view)
                assert torch.allclose(view, wanted, atol=1e-4)
            rows += targets.tolist()
        assert sorted(rows) == list(range(10))


def test_the_weak_view_is_flipped_at_most_and_the_strong_view_augmented():
    array, strong = noise_images(40), resolve_augmentation("medical")
    views = TwoViewBatches(make_batches(array, augment=strong), flips_of(strong), lambda: 0, 0)
    expected, _ = next(iter(make_batches(array, augment=strong)))
    assert torch.equal(next(iter(views))[0]["images"], expected)
    used = set()
    for inputs, targets in views:
        originals = torch.from_numpy(array[targets.numpy()])
        flipped = [originals, originals.flip(-1), originals.flip(-2), originals.flip(-1, -2)]
        for i in range(len(targets)):
            (which,) = [
                n for n, one in enumerate(flipped) if torch.equal(one[i], inputs["weak"][i])
            ]
            used.add(which)
            assert not any(torch.equal(one[i], inputs["images"][i]) for one in flipped)
    assert used == {0, 1, 2, 3}


def test_a_fit_shows_both_views_of_each_image(tiny, blobs, monkeypatch):
    X, y = blobs
    seen, forward = [], LMDNetwork.forward

    def spying(self, images, weak=None):
        if weak is not None:
            seen.append((images, weak))
        return forward(self, images, weak)

    monkeypatch.setattr(LMDNetwork, "forward", spying)
    augment = Augmentation(vertical_flip=0.5, noise=0.05, noise_probability=1)
    params = {**tiny, "max_epochs": 1, "relation_start": 0, "stages": "rrl"}
    clf = LMDClassifier(**params, augment=augment).fit(X, y)
    plain = clf._preprocessor()(torch.from_numpy(X))
    choices = torch.cat([plain, plain.flip(-2)]).flatten(1)
    strong, weak = (torch.cat(views).flatten(1) for views in zip(*seen, strict=True))
    to_strong, to_weak = ((view[:, None] - choices).norm(dim=2) for view in (strong, weak))
    rows = to_weak.argmin(dim=1) % 60
    assert to_weak.amin(dim=1).max() < 1e-4
    assert to_strong.amin(dim=1).min() > 0.01  # some noise is faint
    assert torch.equal(to_strong.argmin(dim=1) % 60, rows)
    assert sorted(rows.tolist()) == list(range(60))


def test_relations_make_strong_and_weak_views_of_new_images_agree():
    augment = resolve_augmentation("strong")
    distances = []
    for seed in range(4):
        X, y = faint_blobs((80, 24, 6), seed)
        new = torch.from_numpy(faint_blobs((20, 20, 20), seed + 100)[0]) / 255
        row = []
        for weight in (0, 5):
            clf = LMDClassifier(
                ConvNet(widths=(4, 8)), stages="rrl", batch_relation_weight=weight,
                channel_relation_weight=weight, consistency_weight=0, relation_start=0,
                max_epochs=15, batch_size=16, augment=augment, device="cpu", random_state=seed,
            ).fit(X, y)  # fmt: skip
            generator = torch.Generator().manual_seed(seed)
            normalise, encode = clf._preprocessor().normalise, clf.net_.module_.eval().features
            with torch.no_grad():
                z = encode(normalise(augment(new, generator)))
                z_weak = encode(normalise(flips_of(augment)(new, generator)))
            row.append([f(z, z_weak).item() for f in (batch_relation_loss, channel_relation_loss)])
            assert z.std(dim=0).max() > 0.05  # images have not all become one
        distances.append(row)
    without, related = np.array(distances).transpose(1, 0, 2)  # (seed, loss)
    assert (related[:, 0] < without[:, 0]).all()
    assert related[:, 0].mean() < 0.3 * without[:, 0].mean()
    assert related[:, 1].mean() < 0.8 * without[:, 1].mean()


# ---------------------------------------------------------------- terms of the E-step


@pytest.mark.parametrize("q", [0.0, 0.3, 0.7, 1.0])
def test_generalized_cross_entropy_equals_the_formula(q):
    logits = two_views((6, 4), scale=2.0)[0]
    y = torch.tensor([0, 3, 1, 2, 2, 0])
    total = 0.0
    for row, label in zip(logits.tolist(), y.tolist(), strict=True):
        p = math.exp(row[label]) / sum(map(math.exp, row))
        total += (-math.log(p) if q == 0 else (1 - p**q) / q) / len(y)
    assert generalized_cross_entropy(logits, y, q).item() == pytest.approx(total, rel=1e-12)


def test_generalized_cross_entropy_lies_between_cross_entropy_and_absolute_error():
    logits, y = two_views((6, 4), scale=2.0)[0], torch.tensor([0, 3, 1, 2, 2, 0])
    ce = nn.functional.cross_entropy(logits, y).item()
    absolute = (1 - logits.softmax(dim=1).gather(1, y.unsqueeze(1))).mean().item()
    assert generalized_cross_entropy(logits, y, 0.0).item() == pytest.approx(ce)
    assert generalized_cross_entropy(logits, y, 1e-7).item() == pytest.approx(ce, rel=1e-5)
    assert generalized_cross_entropy(logits, y, 1.0).item() == pytest.approx(absolute)
    values = [generalized_cross_entropy(logits, y, q).item() for q in np.linspace(0, 1, 11)]
    assert (np.diff(values) < 0).all()


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_generalized_cross_entropy_stays_finite_for_extreme_logits(q, dtype):
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [0.0, 0.0]], dtype=dtype, requires_grad=True)
    value = generalized_cross_entropy(logits, torch.tensor([0, 0, 1]), q)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()


def gaussians_of_classes(n_classes=3, d=4, seed=0):
    """Means (K, d) and well-conditioned covariances (K, d, d)."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(n_classes, d, generator=generator, dtype=torch.float64)
    roots = torch.randn(n_classes, d, 2 * d, generator=generator, dtype=torch.float64)
    return means, roots @ roots.transpose(1, 2) / d


def whiten(covariances):
    """P with P^T P = C^-1."""
    return torch.linalg.cholesky(torch.linalg.inv(covariances)).transpose(1, 2)


def test_mahalanobis_equals_the_formula():
    means, covariances = gaussians_of_classes()
    z = two_views((7, 4))[0]
    distance = mahalanobis(z, means, whiten(covariances)).numpy()
    assert distance.shape == (7, 3)
    for i, k in product(range(7), range(3)):
        away = (z[i] - means[k]).numpy()
        expected = away @ np.linalg.inv(covariances[k].numpy()) @ away
        assert distance[i, k] == pytest.approx(expected, rel=1e-9)


@FDC
@pytest.mark.parametrize("n_classes", [2, 3, 5])
@pytest.mark.parametrize("margin", [0.0, 1.0])
def test_distribution_consistency_equals_explicit_loop(kind, n_classes, margin):
    distance = 10 * torch.rand(8, n_classes, generator=torch.Generator().manual_seed(0)).double()
    y, d = torch.arange(8) % n_classes, 3
    total = 0.0
    for row, label in zip(distance.tolist(), y.tolist(), strict=True):
        others = [value for k, value in enumerate(row) if k != label]
        if kind == "paper":
            total += (row[label] - sum(others) / len(others)) / d / 8
        else:
            total += max(0.0, margin + (row[label] - min(others)) / d) / 8
    assert distribution_consistency(distance, y, d, kind, margin).item() == pytest.approx(total)


@FDC
def test_two_classes_repel_from_the_single_other_one(kind):
    distance = torch.tensor([[2.0, 5.0], [7.0, 4.0]], dtype=torch.float64)
    y = torch.tensor([0, 1])
    value = distribution_consistency(distance, y, 2, kind, 10.0).item()
    attraction_minus_repulsion = ((2 - 5) / 2 + (4 - 7) / 2) / 2
    expected = attraction_minus_repulsion + (10 if kind == "margin" else 0)
    assert value == pytest.approx(expected)


def test_the_margin_form_is_bounded_and_the_published_one_is_not():
    y = torch.tensor([0, 1, 2])
    far = 1e6 * (1 - torch.eye(3, dtype=torch.float64))
    assert distribution_consistency(far, y, 4, "margin").item() == 0
    assert distribution_consistency(far, y, 4, "paper").item() == pytest.approx(-1e6 / 4)


@FDC
def test_distribution_consistency_does_not_see_affine_changes(kind):
    means, covariances = gaussians_of_classes()
    z, y = two_views((7, 4))[0], torch.arange(7) % 3
    A, b = two_views((4, 4), seed=5)[0] + 2 * torch.eye(4).double(), two_views((1, 4), seed=6)[0]
    before = mahalanobis(z, means, whiten(covariances))
    after = mahalanobis(z @ A.T + b, means @ A.T + b, whiten(A @ covariances @ A.T))
    assert torch.allclose(before, after, rtol=1e-8)
    one, two = (distribution_consistency(x, y, 4, kind).item() for x in (before, after))
    assert one == pytest.approx(two, rel=1e-8)
    assert abs(one) > 0.01


def make_icc_loss(d, n_classes=3, *, kind="margin", q=0.8, weight=0.05, margin=1.0):
    return ICCLoss(n_classes, d, q=q, kind=kind, weight=weight, margin=margin).double()


def linear_head(d, seed=0, n_classes=3):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n_classes, d)), rng.normal(size=n_classes)


@pytest.mark.parametrize("covariance", KINDS)
def test_m_steps_average_their_statistics_and_keep_the_last_head(covariance):
    loss, rounds = make_icc_loss(4), []
    for seed in range(5):
        X, y = problem((30, 12, 6), d=4, seed=seed)
        rounds.append(moments(X, y, covariance, 0.01))
        coef, intercept = linear_head(4, seed)
        gaussians = ClassGaussians(X, y, covariance=covariance, eps=0.01)
        loss.finish_m_step(coef, intercept, gaussians)

        means, covariances = (np.mean(part, axis=0) for part in zip(*rounds, strict=True))
        assert np.allclose(loss.means.numpy(), means, rtol=0, atol=1e-12)
        assert np.allclose(loss.statistics[1].numpy(), covariances, rtol=0, atol=1e-12)
        assert np.array_equal(loss.coef.numpy(), coef)
        assert np.array_equal(loss.intercept.numpy(), intercept)
        inverse = (loss.whitening.transpose(1, 2) @ loss.whitening).numpy()
        for k in range(3):
            assert np.allclose(inverse[k] @ covariances[k], np.eye(4), rtol=0, atol=1e-7)


@pytest.mark.parametrize("covariance", ["shrunk", "full"])
def test_statistics_of_features_that_move_together_can_be_inverted(covariance):
    """Rounding in single precision would make these matrices indefinite."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], [60, 30, 10])
    X = 0.1 * rng.normal(size=(100, 64)) + 1000 * rng.normal(size=(100, 1))
    loss = ICCLoss(3, 64, q=0.8, kind="margin", weight=0.05, margin=1.0)
    gaussians = ClassGaussians(X, y, covariance=covariance, eps=0)
    loss.finish_m_step(np.zeros((3, 64)), np.zeros(3), gaussians)
    assert loss.whitening.isfinite().all()
    z = torch.from_numpy(X).float()
    distance = mahalanobis(z, loss.means, loss.whitening)
    assert distance.isfinite().all()


def test_features_of_very_different_scale_count_alike():
    X, y = problem((40, 20), d=4)
    scales = np.array([1.0, 1e-3, 1e3, 1.0])
    far = []
    for factor in (np.ones(4), scales):
        loss = make_icc_loss(4, n_classes=2)
        gaussians = ClassGaussians(X * factor, y, covariance="shrunk", eps=0.01)
        loss.finish_m_step(*linear_head(4, n_classes=2), gaussians)
        far.append(mahalanobis(torch.from_numpy(X * factor), loss.means, loss.whitening))
    torch.testing.assert_close(far[0], far[1])


@FDC
def test_e_step_loss_equals_the_formula(kind):
    d, (X, y) = 4, problem((30, 12, 6), d=4)
    loss = make_icc_loss(d, kind=kind, weight=0.3, margin=2.0)
    coef, intercept = linear_head(d)
    loss.finish_m_step(coef, intercept, ClassGaussians(X, y, covariance="tied", eps=0.01))
    means, sigmas = moments(X, y, "tied", 0.01)
    z, labels = X[:9], y[:9]
    label_term = own_term = distribution = 0.0
    for row, k in zip(z, labels, strict=True):
        scores = np.exp(coef @ row + intercept)
        label_term += (1 - (scores[k] / scores.sum()) ** 0.8) / 0.8 / 9
        M = [(row - m) @ np.linalg.inv(C) @ (row - m) for m, C in zip(means, sigmas, strict=True)]
        others = np.delete(M, k)
        own_term += M[k] / d / 9
        if kind == "paper":
            distribution += (M[k] - others.mean()) / d / 9
        else:
            distribution += max(0, 2 + (M[k] - others.min()) / d) / 9
    value = loss(Output(torch.from_numpy(z), None), torch.eye(3)[labels])
    expected = {"label": label_term, "distribution": distribution, "own_distance": own_term}
    terms = {name: term.item() for name, term in loss.terms.items()}
    assert terms == pytest.approx(expected, rel=1e-4)
    assert value.item() == pytest.approx(label_term + 0.3 * distribution, rel=1e-4)
    assert not list(loss.parameters())  # the head is no parameter: nothing could train it


@FDC
def test_the_distribution_term_draws_to_the_own_class_and_away_from_others(kind):
    # In the authors' code the sign is the other way round.
    corners = np.array([[0.0, 4.0], [-4.0, -2.0], [4.0, -2.0]])
    y = np.repeat([0, 1, 2], 50)
    X = np.random.default_rng(0).normal(size=(150, 2)) + corners[y]
    loss = make_icc_loss(2, kind=kind, weight=1.0, margin=10.0)  # the hinge is active
    nothing = np.zeros((3, 2)), np.zeros(3)  # a head without a say: its label term has no slope
    loss.finish_m_step(*nothing, ClassGaussians(X, y, covariance="shrunk", eps=0.01))
    labels = torch.arange(3)
    own = torch.eye(3).bool()
    z = torch.tensor(corners * 0.05, requires_grad=True)  # about as far from every class

    loss(Output(z, None), torch.eye(3)[labels]).backward()
    before = mahalanobis(z.detach(), loss.means, loss.whitening)
    after = mahalanobis(z.detach() - 0.1 * z.grad, loss.means, loss.whitening)
    assert (after[own] < before[own]).all()
    others_before, others_after = (m.masked_fill(own, torch.inf) for m in (before, after))
    if kind == "margin":
        assert (others_after.amin(dim=1) > others_before.amin(dim=1)).all()
    else:
        grown = [m.masked_fill(own, 0).sum(dim=1) for m in (before, after)]
        assert (grown[1] > grown[0]).all()


@pytest.fixture(scope="module")
def stage_one():
    """A float64 network after a short stage one, with its data, images, features and labels."""
    X, y = make_blobs()
    clf = LMDClassifier(
        ConvNet(widths=(8, 16)), stages="rrl", max_epochs=3, batch_size=16, augment="none",
        precision="float64", device="cpu", random_state=0, **NO_RELATIONS,
    ).fit(X, y)  # fmt: skip
    return clf, X, y


@pytest.mark.parametrize("kind", [None, "margin", "paper"])
def test_an_e_step_gives_the_encoder_a_gradient_and_the_head_none(kind, stage_one):
    # kind=None is the label term alone, which has no gradient at all in the authors' code.
    clf, X, y = stage_one
    module = copy.deepcopy(clf.net_.module_).eval()
    images, mass = clf._preprocessor()(torch.from_numpy(X)), torch.eye(3).double()[y]
    features = clf.transform(X)
    loss = make_icc_loss(features.shape[1], kind=kind, weight=1.0, margin=5.0)
    head = VirtualFeatureCalibration().fit(features, y)
    coef, intercept = head.coef_, head.intercept_
    if kind is not None:  # the distribution term alone
        coef, intercept = np.zeros_like(coef), np.zeros_like(intercept)
    gaussians = ClassGaussians(features, y, covariance="shrunk", eps=0.01)
    loss.finish_m_step(coef, intercept, None if kind is None else gaussians)

    before = loss(module(images), mass)
    before.backward()
    assert all(p.grad.abs().sum() > 0 for p in module.trunk.parameters())
    assert all(p.grad is None for p in module.head.parameters())
    with torch.no_grad():
        for p in module.trunk.parameters():
            p -= 1e-4 * p.grad
        assert loss(module(images), mass) < before


# ---------------------------------------------------------------- stage two of a fit


def test_m_step_leaves_the_network_as_it_was(tiny, blobs):
    rrl = LMDClassifier(**tiny, stages="rrl").fit(*blobs)
    both = LMDClassifier(**tiny, n_rounds=1).fit(*blobs)
    assert same_arrays(network(rrl), network(both))
    assert not np.allclose(rrl.head_.coef_, both.head_.coef_)


def test_m_step_is_virtual_feature_calibration_of_the_features(tiny, blobs):
    X, y = blobs
    params = {**tiny, "precision": "float64"}
    rrl = LMDClassifier(**params, stages="rrl").fit(X, y)
    both = LMDClassifier(**params, n_rounds=1, covariance="tied", alpha=0.3).fit(X, y)
    head = VirtualFeatureCalibration(covariance="tied", alpha=0.3).fit(rrl.transform(X), y)
    assert np.allclose(both.head_.coef_, head.coef_, atol=1e-8)
    assert np.allclose(both.predict_proba(X), head.predict_proba(rrl.transform(X)), atol=1e-8)


@pytest.mark.parametrize("m_step", ["analytic", "sampled"])
def test_the_fit_ends_on_an_m_step(m_step, tiny, blobs):
    # In the authors' code the encoder is a step ahead of its head.
    X, y = blobs
    params = {"m_step": m_step, "n_per_class": 200}
    clf = LMDClassifier(**tiny, **params, n_rounds=4, e_step_lr=1e-2, precision="float64")
    features = clf.fit(X, y).transform(X)
    head = VirtualFeatureCalibration(**params, random_state=clf.random_seed_).fit(features, y)
    assert np.allclose(clf.head_.coef_, head.coef_, atol=1e-8)
    assert np.allclose(clf.head_.intercept_, head.intercept_, atol=1e-8)
    assert np.allclose(clf.predict_proba(X), head.predict_proba(features), atol=1e-8)


def test_m_steps_go_on_from_the_last_head_with_draws_of_their_own(tiny, blobs, monkeypatch):
    fit, seen, heads = VirtualFeatureCalibration.fit, [], []

    def spying(self, features, codes, **start):
        seen.append((self.random_state, copy.deepcopy(start.get("coef_init"))))
        heads.append(fit(self, features, codes, **start).coef_)
        return self

    monkeypatch.setattr(VirtualFeatureCalibration, "fit", spying)
    params = {**tiny, "m_step": "sampled", "n_per_class": 100, "n_rounds": 4}
    clf = LMDClassifier(**params).fit(*blobs)
    seeds, starts = zip(*seen, strict=True)
    *rounds, last = starts
    assert len(set(seeds[:-1])) == 3
    assert not rounds[0].any()
    for start, head in zip(rounds[1:], heads, strict=False):
        assert np.allclose(start, head, atol=1e-5)
    # The head to keep depends on the features alone, so that the one that validation scored is it.
    assert last is None
    assert np.array_equal(clf.head_.coef_, heads[-1])


def test_e_step_moves_the_encoder_and_no_head(tiny, blobs):
    epochs = {}

    def record(net):
        if net.stage == STAGE_TWO:
            icc, module = net.criterion_, net.module_
            state = snapshot([icc.coef, icc.intercept, *module.head.parameters()])
            encoder = snapshot(module.trunk.parameters())
            epochs.setdefault(len(net.history), []).append((state, encoder))

    params = {**tiny, "n_rounds": 4, "e_step_lr": 1e-3}
    clf = LMDClassifier(**params, callbacks=[Watch(record)]).fit(*blobs)
    assert [len(steps) for steps in epochs.values()] == [4, 4, 4]
    for steps in epochs.values():
        assert all(all_equal(state, steps[0][0]) for state, _ in steps)
        assert not any(all_equal(steps[i][1], steps[i + 1][1]) for i in range(3))
    first, second, third = (steps[0][0] for steps in epochs.values())
    for one, two in ((first, second), (second, third)):
        assert not torch.equal(one[0], two[0])  # each round has its own head
        assert all_equal(one[2:], two[2:])  # that of stage one is of the past
    rrl = network(LMDClassifier(**tiny, stages="rrl").fit(*blobs))
    after = network(clf)
    assert all(np.array_equal(rrl[k], after[k]) == k.startswith("head.") for k in rrl)


def test_the_label_term_alone_trains_the_encoder(tiny, blobs):
    # No weight decay, so that only a gradient can move a weight.
    params = {**tiny, "weight_decay": 0.0, "e_step_lr": 1e-3}
    start = LMDClassifier(**params, n_rounds=1).fit(*blobs)
    alone = LMDClassifier(**params, n_rounds=2, fdc=None).fit(*blobs)
    weightless = LMDClassifier(**params, n_rounds=2, fdc_weight=0).fit(*blobs)
    trunk = [name for name, _ in start.net_.module_.trunk.named_parameters(prefix="trunk")]
    before, after = network(start), network(alone)
    assert not any(np.array_equal(before[name], after[name]) for name in trunk)
    assert same_arrays(after, network(weightless))
    # No feature is as far from its own class as this, so that the hinge is open.
    both = LMDClassifier(**params, n_rounds=2, fdc_weight=5.0, fdc_margin=1e3).fit(*blobs)
    assert not same_arrays(after, network(both))


def test_statistics_come_from_one_plain_pass_over_the_data(tiny, blobs, monkeypatch):
    # In the authors' code from a class-balanced draw, with replacement.
    X, y = blobs
    passes, heads, in_training, fit = [], [], [], VirtualFeatureCalibration.fit
    forward = LMDNetwork.forward

    class Spy(ClassGaussians):
        def __init__(self, features, codes, **params):
            passes.append((features, codes, clf.transform(X)))
            super().__init__(features, codes, **params)

    def fitting(self, features, codes, **start):
        heads.append((features, codes))
        return fit(self, features, codes, **start)

    def spying(self, images, weak=None):
        in_training.append((self.training, clf.net_.stage, images))
        return forward(self, images, weak)

    monkeypatch.setattr("sklearn_medimb.methods._lmd.ClassGaussians", Spy)
    monkeypatch.setattr(VirtualFeatureCalibration, "fit", fitting)
    monkeypatch.setattr(LMDNetwork, "forward", spying)
    clf = LMDClassifier(**{**tiny, "augment": "strong"}, n_rounds=3, device="cpu")
    clf.fit(X, y)

    assert len(passes) == 2
    assert len(heads) == 3
    for (features, codes, expected), head in zip(passes, heads, strict=False):
        assert np.array_equal(codes, y)
        assert np.array_equal(features, expected)  # in evaluation mode, not augmented
        assert head[0] is features
        assert np.array_equal(head[1], y)
    assert np.array_equal(heads[-1][0], clf.transform(X))
    # The E-step sees each image once a round, not augmented either.
    plain = clf._preprocessor()(torch.from_numpy(X))
    steps = [images for training, stage, images in in_training if stage == STAGE_TWO and training]
    assert len(steps) == 2 * 4
    for epoch in (steps[:4], steps[4:]):
        got = sorted(image.numpy().tobytes() for image in torch.cat(epoch).contiguous())
        assert got == sorted(image.numpy().tobytes() for image in plain.contiguous())


# ---------------------------------------------------------------- calibration of a given encoder


@pytest.mark.filterwarnings("ignore:backbone=Sequential")  # a dozen steps
def test_icc_starts_from_the_encoder_it_is_given(tiny, blobs):
    X, y = blobs
    given = SoftmaxClassifier(**tiny).fit(X, y)
    before = given.weights_
    params = {**tiny, "backbone": given.backbone_, "stages": "icc"}
    one = LMDClassifier(**params, n_rounds=1).fit(X, y)
    assert np.array_equal(one.transform(X), given.transform(X))
    assert one.history_ == one.stage1_history_ == []
    head = VirtualFeatureCalibration().fit(given.transform(X), y)
    assert np.allclose(one.head_.coef_, head.coef_, atol=1e-6)
    many = LMDClassifier(**params, n_rounds=4, e_step_lr=1e-2).fit(X, y)
    assert not np.allclose(many.transform(X), given.transform(X))
    assert [row["stage"] for row in many.history_] == [STAGE_TWO] * 3
    assert same_arrays(given.weights_, before)


# ---------------------------------------------------------------- effects


@pytest.fixture(scope="module")
def effects():
    """Balanced accuracy and recalls of several ways to finish the same networks, three seeds."""
    rows = []
    for seed in range(3):
        X, y = faint_blobs((80, 24, 6), seed)
        X_test, y_test = faint_blobs((60, 60, 60), seed + 100)
        shared = {
            "max_epochs": 15, "batch_size": 16, "lr": 1e-2, "augment": "none", "random_state": seed
        }  # fmt: skip
        params = {"backbone": ConvNet(widths=(8, 16)), **shared, **NO_RELATIONS}
        ce = SoftmaxClassifier(params["backbone"], **shared).fit(X, y)
        row = {
            "ce": ce,
            "rrl": LMDClassifier(**params, stages="rrl"),
            "one": LMDClassifier(**params, n_rounds=1),
            "five": LMDClassifier(**params, n_rounds=5),
            "sampled": LMDClassifier(**params, n_rounds=1, m_step="sampled", n_per_class=20_000),
            "icc": LMDClassifier(**{**params, "backbone": ce.backbone_}, stages="icc", n_rounds=3),
        }
        for clf in row.values():
            predicted = (clf if clf is ce else clf.fit(X, y)).predict(X_test)
            recalls = recall_score(y_test, predicted, average=None)
            rows.append([balanced_accuracy_score(y_test, predicted), *recalls])
    scores = np.array(rows).reshape(3, len(row), 4)
    return {name: scores[:, i] for i, name in enumerate(row)}  # (seed, [balanced, recalls...])


def test_virtual_features_lift_the_tail(effects):
    gain = effects["one"] - effects["rrl"]
    assert (gain[:, 0] >= 0.05).all()
    assert (gain[:, 3] >= 0.1).all()


def test_calibration_of_a_given_encoder_lifts_the_tail(effects):
    gain = effects["icc"] - effects["ce"]
    assert (gain[:, 0] >= 0.05).all()
    assert (gain[:, 3] >= 0.1).all()


def test_e_steps_cost_no_accuracy(effects):
    assert (effects["five"] - effects["one"])[:, 0].mean() >= -0.02


def test_sampled_and_analytic_m_steps_agree(effects):
    assert np.abs(effects["sampled"] - effects["one"])[:, 0].max() < 0.08
    assert np.abs((effects["sampled"] - effects["one"])[:, 0].mean()) < 0.045


def test_the_distribution_term_falls_over_rounds_and_because_of_itself():
    # The bare distance to the own class may well grow, as the label term moves the encoder away
    # from the statistics of past rounds: what counts is the same run without the term.
    own = []
    for seed in range(2):
        X, y = faint_blobs((80, 24, 6), seed)
        without, with_term = (
            LMDClassifier(
                ConvNet(widths=(8, 16)), n_rounds=8, fdc_weight=weight, e_step_lr=1e-3,
                max_epochs=15, batch_size=16, augment="none", random_state=seed, **NO_RELATIONS,
            ).fit(X, y).stage2_history_[:-1]
            for weight in (0, 1)
        )  # fmt: skip
        first, last = (with_term[i]["train_distribution"] for i in (0, -1))
        assert last < 0.7 * first
        assert last < without[-1]["train_distribution"]
        own.append([rows[-1]["train_own_distance"] for rows in (without, with_term)])
    without, with_term = np.mean(own, axis=0)
    assert with_term < without


# ---------------------------------------------------------------- edges


@pytest.mark.filterwarnings("ignore:Classes .* have one training image")
@pytest.mark.parametrize("covariance", KINDS)
@FDC
def test_a_class_of_one_sample(covariance, kind, tiny):
    X, y = make_blobs((20, 8, 1))
    params = {**tiny, "max_epochs": 1, "n_rounds": 3, "covariance": covariance, "fdc": kind}
    clf = LMDClassifier(**params, e_step_lr=1e-2).fit(X, y)
    assert np.isfinite(clf.predict_proba(X)).all()
    assert all(np.isfinite(row["train_loss"]) for row in clf.history_)


@FDC
def test_two_classes(kind, tiny):
    X, y = make_blobs((40, 12))
    y = np.array(["benign", "malign"])[y]
    clf = LMDClassifier(**{**tiny, "max_epochs": 8}, n_rounds=3, fdc=kind).fit(X, y)
    assert clf.head_.coef_.shape == (2, 16)
    assert clf.decision_function(X).shape == (52,)
    assert set(clf.predict(X)) == {"benign", "malign"}


class PartlyDead(nn.Module):
    """Features of which one is always 0, one always 5, and the others are as given."""

    def __init__(self, alive=True):
        super().__init__()
        self.alive = alive
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images):
        z = self.conv(images).relu().mean(dim=(2, 3)) * self.alive
        return torch.cat([z, torch.zeros_like(z[:, :1]), torch.full_like(z[:, :1], 5.0)], dim=1)


@pytest.mark.parametrize("covariance", KINDS)
@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize("m_step", ["analytic", "sampled"])
def test_dead_features(covariance, alive, m_step, tiny, blobs):
    X, y = blobs
    params = {**tiny, "backbone": PartlyDead(alive), "max_epochs": 1, "covariance": covariance}
    clf = LMDClassifier(
        **params, m_step=m_step, n_per_class=100, n_rounds=3, relation_start=0
    ).fit(X, y)  # fmt: skip
    assert np.isfinite(clf.predict_proba(X)).all()
    assert all(np.isfinite(row["train_loss"]) for row in clf.history_)
    assert all(np.isfinite(value).all() for value in clf.weights_.values())


def test_batches_of_one_image(tiny):
    # The relation of one sample with itself is the same in every view.
    X, y = make_blobs((9, 5, 3))
    params = {**tiny, "max_epochs": 1, "batch_size": 1, "relation_start": 0, "n_rounds": 2}
    clf = LMDClassifier(**params, augment="none").fit(X, y)
    (row,) = clf.stage1_history_
    assert row["train_batch_relation"] == pytest.approx(0, abs=1e-6)
    assert np.isfinite(row["train_loss"])


# ---------------------------------------------------------------- published settings


def test_published_settings():
    clf = LMDClassifier.published()
    params = clf.get_params()
    weights = [params[f"{name}_weight"] for name in ("batch_relation", "channel_relation")]
    assert [*weights, clf.consistency_weight] == [2.5, 2.5, 5.0]
    assert (clf.n_rounds, clf.m_step, clf.n_per_class) == (200, "sampled", 50_000)
    assert (clf.covariance, clf.gce_q, clf.fdc, clf.e_step_lr) == ("full", 0.7, "paper", 1e-6)
    assert (clf.max_epochs, clf.batch_size, clf.lr, clf.lr_schedule) == (100, 512, 0.01, "constant")
    assert (clf.ema_decay, clf.teacher_mode, clf.weight_decay) == (0.999, "train", 0.0)
    # Relations are off up to and including the epoch of index 20.
    assert round(clf.relation_start * clf.max_epochs) == 21
    # With distances divided by the 512 features of a ResNet-18, as the code's 1e-4 without.
    assert clf.fdc_weight == 1e-4 * 512
    assert repr(clone(clf).get_params()) == repr(params)
    other = LMDClassifier.published(n_rounds=7, lr=0.1, random_state=3)
    assert (other.n_rounds, other.lr, other.random_state) == (7, 0.1, 3)
    assert other.get_params()["m_step"] == "sampled"


def test_published_settings_run(blobs):
    X, y = blobs
    clf = LMDClassifier.published(
        backbone=ConvNet(widths=(4, 8)), max_epochs=2, n_rounds=2, n_per_class=50, batch_size=16,
        random_state=0,
    ).fit(X, y)  # fmt: skip
    assert isinstance(clf.net_.optimizer_, torch.optim.SGD)
    assert clf.net_.optimizer_.param_groups[0]["momentum"] == 0.9
    assert clf.net_.optimizer_.param_groups[0]["lr"] == 1e-6
    assert clf.n_iter_ == 3
    assert clf.predict_proba(X[:4]).shape == (4, 3)


# ---------------------------------------------------------------- one fit, two stages


def test_history_names_the_stages_and_their_terms(tiny, blobs):
    clf = LMDClassifier(**{**tiny, "relation_start": 0}, n_rounds=4).fit(*blobs)
    one, two = clf.stage1_history_, clf.stage2_history_
    assert [row["stage"] for row in one] == [STAGE_ONE] * 3
    assert [row.get("stage") for row in two] == [STAGE_TWO] * 3 + [None]
    assert clf.history_ == one + two[:-1]
    assert clf.n_iter_ == 6
    terms = {"ce", "batch_relation", "channel_relation", "consistency"}
    for rows, names in ((one, terms), (two[:-1], {"label", "distribution", "own_distance"})):
        for row in rows:
            found = {name.removeprefix("train_") for name in row if name.startswith("train_")}
            assert found == {"loss", *names}
    for row in two[:-1]:
        expected = row["train_label"] + clf.fdc_weight * row["train_distribution"]
        assert row["train_loss"] == pytest.approx(expected, rel=1e-5)
    assert two[-1] == {"loss": clf.head_.loss_, "n_iter": clf.head_.n_iter_}


def test_the_label_term_alone_is_recorded_without_distances(tiny, blobs):
    clf = LMDClassifier(**tiny, fdc=None, n_rounds=2, **NO_RELATIONS).fit(*blobs)
    assert "train_ce" not in clf.stage1_history_[0]
    names = {name for name in clf.stage2_history_[0] if name.startswith("train_")}
    assert names == {"train_loss", "train_label"}


def test_the_progress_bar_names_the_stage(tiny, blobs, capsys):
    LMDClassifier(**tiny, n_rounds=3, verbose=1).fit(*blobs)
    err = capsys.readouterr().err
    for stage, n_steps in ((STAGE_ONE, 12), (STAGE_TWO, 8)):
        assert f"LMDClassifier {stage}" in err
        assert f"{n_steps}/{n_steps}" in err


def test_user_callbacks_see_both_stages(tiny, blobs):
    seen = []
    watch = Watch(
        epoch=lambda net: seen.append((net.stage, type(net.criterion_), len(net.history)))
    )
    LMDClassifier(**tiny, n_rounds=3, callbacks=[watch]).fit(*blobs)
    one = [(STAGE_ONE, RRLLoss, n) for n in (1, 2, 3)]
    assert seen == one + [(STAGE_TWO, ICCLoss, n) for n in (4, 5)]


def test_the_e_step_has_its_own_constant_learning_rate(tiny, blobs):
    rates = []
    record = Watch(lambda net: rates.append(net.optimizer_.param_groups[0]["lr"]))
    params = {**tiny, "n_rounds": 3, "e_step_lr": 1e-5, "callbacks": [record]}
    LMDClassifier(**params).fit(*blobs)
    assert max(rates[:12]) > 1e-3
    assert rates[12:] == pytest.approx([1e-5] * 8)


# The best epoch is in stage one, or in stage two.
SCORES = pytest.mark.parametrize(
    ("scores", "kept"), [([0.2, 0.9, 0.3, 0.5, 0.4, 0.6], 1), ([0.2, 0.5, 0.3, 0.4, 0.9, 0.6], 4)]
)


def fit_to_scores(scores, X, y, **params):
    """A fit of two stages with given validation scores, and the weights as each was given."""
    scripted, snapshots = iter(scores), []

    def scoring(estimator, X_held, y_held):
        assert len(y_held) == 12
        snapshots.append(estimator.weights_)
        return next(scripted)

    params = {**params, "n_rounds": 4, "e_step_lr": 1e-3, "early_stopping": True}
    return LMDClassifier(**params, scoring=scoring).fit(X, y), snapshots


@SCORES
def test_early_stopping_keeps_the_best_epoch_of_both_stages(scores, kept, tiny, blobs):
    clf, snapshots = fit_to_scores(scores, *blobs, **tiny)
    assert [row["valid_score"] for row in clf.history_] == scores
    assert clf.best_score_ == max(scores)
    names = network(clf).keys()
    best, last = ({name: snapshots[i][name] for name in names} for i in (kept, -1))
    assert same_arrays(network(clf), best)
    assert not same_arrays(network(clf), last)


@SCORES
@pytest.mark.parametrize("m_step", ["analytic", "sampled"])
def test_early_stopping_keeps_the_head_that_had_the_best_score(
    m_step, scores, kept, tiny, blobs
):  # fmt: skip
    clf, snapshots = fit_to_scores(scores, *blobs, **tiny, m_step=m_step, n_per_class=300)
    assert np.allclose(clf.head_.coef_, snapshots[kept]["head_coef_"], rtol=1e-6)
    assert np.allclose(clf.head_.intercept_, snapshots[kept]["head_intercept_"], rtol=1e-6)


def test_early_stopping_scores_the_calibrated_head(tiny, blobs):
    X, y = blobs
    clf = LMDClassifier(**{**tiny, "max_epochs": 8}, n_rounds=4, early_stopping=True).fit(X, y)
    scores = [row["valid_score"] for row in clf.history_]
    assert len(scores) == 11
    assert clf.best_score_ == max(scores)


def test_patience_counts_anew_in_stage_two(tiny, blobs):
    scores = iter([0.9, 0.1, 0.1, 0.2, 0.1, 0.1, 0.1])
    clf = LMDClassifier(
        **{**tiny, "max_epochs": 9}, n_rounds=9, early_stopping=True, n_iter_no_change=2,
        scoring=lambda *args: next(scores),
    ).fit(*blobs)  # fmt: skip
    assert [row["stage"] for row in clf.history_] == [STAGE_ONE] * 3 + [STAGE_TWO] * 2
    assert clf.best_score_ == 0.9


def test_pickle_and_weights_hold_no_teacher(tiny, blobs):
    X, y = blobs
    clf = LMDClassifier(**tiny, n_rounds=2).fit(X, y)
    assert not [name for name in clf.weights_ if "teacher" in name]
    plain = SoftmaxClassifier(**tiny).fit(X, y)
    assert network(clf).keys() == network(plain).keys()
    for fitted in (clf, LMDClassifier(**tiny, stages="rrl").fit(X, y)):
        loaded = pickle.loads(pickle.dumps(fitted))
        assert np.array_equal(loaded.predict_proba(X), fitted.predict_proba(X))
        assert loaded.history_ == fitted.history_
        assert len(pickle.dumps(fitted)) < 2 * len(pickle.dumps(plain))
    again = clone(clf).fit(X, y)
    assert same_arrays(again.weights_, clf.weights_)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("stopping", [False, True])
@pytest.mark.parametrize("teacher_mode", ["train", "eval"])
def test_a_fit_resumes_in_either_stage_and_between_them(
    stopping, teacher_mode, tiny, blobs, tmp_path
):
    X, y = blobs
    params = {
        **tiny, "augment": "strong", "early_stopping": stopping, "teacher_mode": teacher_mode,
        "relation_start": 0.34, "n_rounds": 5, "e_step_lr": 1e-3,
    }  # fmt: skip
    whole = LMDClassifier(**params).fit(X, y)
    assert whole.n_iter_ == 7
    params["checkpoint_dir"] = tmp_path
    for epoch in (2, 3, 5):  # in stage one, as stage two begins, in stage two
        with pytest.raises(RuntimeError, match="power cut"):
            LMDClassifier(**params, callbacks=[CrashAfter(epoch)]).fit(X, y)
        assert len(list(tmp_path.iterdir())) == 1
        count = EpochsRun()
        resumed = LMDClassifier(**params, callbacks=[count]).fit(X, y)
        assert count.epochs == list(range(epoch + 1, 8))
        assert same_arrays(resumed.weights_, whole.weights_)
        assert np.array_equal(resumed.predict_proba(X), whole.predict_proba(X))
        for row, wanted in zip(resumed.history_, whole.history_, strict=True):
            assert row | {"dur": 0} == wanted | {"dur": 0}
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["M-step of a round", "last M-step"])
def test_a_fit_resumes_after_a_crash_in_an_m_step(step, tiny, blobs, tmp_path, monkeypatch):
    X, y = blobs
    params = {**tiny, "n_rounds": 4, "e_step_lr": 1e-3, "m_step": "sampled", "n_per_class": 300}
    whole = LMDClassifier(**params).fit(X, y)
    fit, calls = VirtualFeatureCalibration.fit, []

    def crashing(self, features, codes, **start):
        calls.append(1)
        if len(calls) == (3 if step == "M-step of a round" else 4):
            raise RuntimeError("power cut")
        return fit(self, features, codes, **start)

    with monkeypatch.context() as patch:
        patch.setattr(VirtualFeatureCalibration, "fit", crashing)
        with pytest.raises(RuntimeError, match="power cut"):
            LMDClassifier(**params, checkpoint_dir=tmp_path).fit(X, y)
    assert len(list(tmp_path.iterdir())) == 1
    resumed = LMDClassifier(**params, checkpoint_dir=tmp_path).fit(X, y)
    assert same_arrays(resumed.weights_, whole.weights_)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:backbone=Sequential")  # a dozen steps
def test_icc_alone_resumes(tiny, blobs, tmp_path):
    X, y = blobs
    backbone = SoftmaxClassifier(**tiny).fit(X, y).backbone_
    params = {**tiny, "backbone": backbone, "stages": "icc", "n_rounds": 4, "e_step_lr": 1e-3}
    whole = LMDClassifier(**params).fit(X, y)
    params["checkpoint_dir"] = tmp_path
    with pytest.raises(RuntimeError, match="power cut"):
        LMDClassifier(**params, callbacks=[CrashAfter(2)]).fit(X, y)
    resumed = LMDClassifier(**params).fit(X, y)
    assert same_arrays(resumed.weights_, whole.weights_)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:stages=.icc.")
def test_one_m_step_needs_no_epoch(tiny, blobs, tmp_path):
    X, y = blobs
    params = {**tiny, "stages": "icc", "n_rounds": 1, "checkpoint_dir": tmp_path, "verbose": 1}
    clf = LMDClassifier(**params).fit(X, y)
    assert (clf.n_iter_, clf.history_, clf.stage1_history_) == (0, [], [])
    assert clf.stage2_history_ == [{"loss": clf.head_.loss_, "n_iter": clf.head_.n_iter_}]
    assert clf.predict_proba(X).shape == (60, 3)
    with pytest.raises(ValueError, match="early_stopping=True has no epoch to choose"):
        LMDClassifier(**params, early_stopping=True).fit(X, y)
    assert not list(tmp_path.iterdir())


def test_the_teacher_is_not_in_the_optimiser(tiny, blobs):
    seen = []

    class Look(Callback):
        def on_train_begin(self, net, **kwargs):
            moved = {id(p) for group in net.optimizer_.param_groups for p in group["params"]}
            teacher = getattr(net.criterion_, "teacher", None)
            if teacher is not None:
                seen.append(moved & {id(p) for p in teacher.parameters()})
            assert {id(p) for p in net.module_.parameters()} <= moved

    LMDClassifier(**tiny, callbacks=[Look()]).fit(*blobs)
    assert seen == [set()]


def test_repeated_images_are_no_evidence_of_spread(tiny):
    """With oversampling in stage one, class Gaussians and heads still see each image once."""
    X, y = make_blobs((30, 12, 5))
    sampler = RandomOverSampler(random_state=0)
    clf = LMDClassifier(**tiny, sampler=sampler, precision="float64").fit(X, y)
    kept = clf.head_.coef_
    head = VirtualFeatureCalibration(random_state=clf.random_seed_).fit(clf.transform(X), y)
    assert np.allclose(kept, head.coef_, atol=1e-8)
    assert np.allclose(clf.refit_head(X, y).head_.coef_, kept, atol=1e-8)
    assert np.allclose(clf.class_prior_, 1 / 3)


def test_calibration_of_an_untrained_backbone_warns(tiny, blobs):
    with pytest.warns(UserWarning, match="this one was not trained"):
        LMDClassifier(**tiny, stages="icc", n_rounds=1).fit(*blobs)


def test_a_whole_network_is_no_backbone(tiny, blobs):
    given = SoftmaxClassifier(**tiny).fit(*blobs)
    clf = LMDClassifier(**{**tiny, "backbone": given.net_.module_}, stages="icc")
    with pytest.raises(ValueError, match="pass the fitted estimator"):
        clf.fit(*blobs)
