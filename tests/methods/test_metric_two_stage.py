"""Metric losses against their formulas; what the two stages train, keep and leave alone."""

from __future__ import annotations

import copy
import io
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from imblearn.over_sampling import RandomOverSampler
from scipy.special import logsumexp
from sklearn.base import clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from skorch.callbacks import Callback
from torch import nn

from sklearn_medimb import ClassifierRetraining, MetricTwoStageClassifier, SoftmaxClassifier
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.base import Output
from sklearn_medimb.losses import LabelLoss, cross_entropy
from sklearn_medimb.methods._metric_two_stage import MetricStageLoss
from sklearn_medimb.metric_losses import (
    METRIC_LOSSES,
    ClassCenterTriplet,
    ProxyAnchor,
    contrastive,
    distances,
    multi_similarity,
    supcon,
    triplet,
)
from sklearn_medimb.rebalance import HEADS
from tests.helpers import CrashAfter, make_blobs

PAIR_LOSSES = {
    "triplet hard": triplet,
    "triplet hard 0.3": partial(triplet, margin=0.3),
    "triplet semihard": partial(triplet, mining="semihard"),
    "triplet semihard 0.3": partial(triplet, margin=0.3, mining="semihard"),
    "triplet all": partial(triplet, mining="all"),
    "triplet all 0.3": partial(triplet, margin=0.3, mining="all"),
    "supcon": supcon,
    "multi_similarity": multi_similarity,
    "contrastive": contrastive,
}
EVERY_PAIR_LOSS = pytest.mark.parametrize("name", PAIR_LOSSES)
SEEDS = pytest.mark.parametrize("seed", range(4))


def embeddings(seed=0, counts=(6, 3, 2, 1), width=5, spread=1.0):
    """Unit vectors around class centres; the last class has one sample, so no positive."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    e = rng.normal(size=(len(counts), width))[y] + spread * rng.normal(size=(len(y), width))
    return F.normalize(torch.from_numpy(e)), torch.from_numpy(y)


# ---------------------------------------------------------------- formulas, one sample at a time


def cosine(a, b):
    return sum(u * v for u, v in zip(a, b, strict=True))


def distance(a, b):
    return math.sqrt(sum((u - v) ** 2 for u, v in zip(a, b, strict=True)))


def cost_of_gap(gap, margin):
    return math.log(1 + math.exp(gap)) if margin == "soft" else max(0.0, gap + margin)


def mean(values):
    return sum(values) / len(values)


def class_balanced_mean(costs):
    """Of (class, cost) pairs."""
    classes = {label for label, _ in costs}
    return mean([mean([cost for label, cost in costs if label == k]) for k in classes])


def triplet_costs(e, y, margin, mining):
    """(class, cost) of every anchor that has a positive and a negative."""
    e, y, costs = e.tolist(), y.tolist(), []
    for i, anchor in enumerate(e):
        d = [distance(anchor, other) for other in e]
        positives = [d[j] for j in range(len(e)) if y[j] == y[i] and j != i]
        negatives = [d[j] for j in range(len(e)) if y[j] != y[i]]
        if not positives or not negatives:
            continue
        if mining == "all":
            cost = mean([cost_of_gap(p - n, margin) for p in positives for n in negatives])
        else:
            d_p = max(positives)
            beyond = [n for n in negatives if n > d_p]
            nearest = min(beyond) if beyond else max(negatives)
            cost = cost_of_gap(d_p - (min(negatives) if mining == "hard" else nearest), margin)
        costs.append((y[i], cost))
    return costs


def explicit_supcon(e, y, temperature=0.1):
    e, y, costs = e.tolist(), y.tolist(), []
    for i in range(len(e)):
        others = [j for j in range(len(e)) if j != i]
        positives = [j for j in others if y[j] == y[i]]
        if positives:
            total = logsumexp([cosine(e[i], e[j]) / temperature for j in others])
            costs.append(mean([total - cosine(e[i], e[j]) / temperature for j in positives]))
    return mean(costs)


def explicit_multi_similarity(e, y, alpha=2.0, gamma=50.0, base=0.5, epsilon=0.1):
    e, y, costs = e.tolist(), y.tolist(), []
    for i in range(len(e)):
        positives = [cosine(e[i], e[j]) for j in range(len(e)) if y[j] == y[i] and j != i]
        negatives = [cosine(e[i], e[j]) for j in range(len(e)) if y[j] != y[i]]
        hard_p = [s for s in positives if negatives and s - epsilon < max(negatives)]
        hard_n = [s for s in negatives if positives and s + epsilon > min(positives)]
        pull = math.log(1 + sum(math.exp(-alpha * (s - base)) for s in hard_p)) / alpha
        push = math.log(1 + sum(math.exp(gamma * (s - base)) for s in hard_n)) / gamma
        costs.append(pull + push)
    return mean(costs)


def explicit_contrastive(e, y, margin=1.0):
    e, y, n = e.tolist(), y.tolist(), len(e)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    same = [distance(e[i], e[j]) ** 2 for i, j in pairs if y[i] == y[j]]
    other = [max(0, margin - distance(e[i], e[j])) ** 2 for i, j in pairs if y[i] != y[j]]
    return mean(same) + mean(other)


def explicit_proxy_anchor(e, y, proxies, margin=0.1, scale=32.0):
    e, y, pull, push = e.tolist(), y.tolist(), [], []
    for k, proxy in enumerate(proxies.tolist()):
        norm = math.sqrt(cosine(proxy, proxy))
        s = [cosine(v, proxy) / norm for v in e]
        own = [math.exp(-scale * (v - margin)) for v, label in zip(s, y, strict=True) if label == k]
        others = [
            math.exp(scale * (v + margin)) for v, label in zip(s, y, strict=True) if label != k
        ]
        if own:
            pull.append(math.log(1 + sum(own)))
        push.append(math.log(1 + sum(others)))
    return mean(pull) + mean(push)


class ExplicitCenters:
    """Class-centre triplet loss with centres in a dict."""

    def __init__(self, margin, momentum):
        self.margin, self.momentum, self.centers = margin, momentum, {}

    def __call__(self, e, y):
        e, y = e.numpy(), y.tolist()
        for k in set(y):
            new = self.unit(
                np.mean([v for v, label in zip(e, y, strict=True) if label == k], axis=0)
            )
            if k in self.centers:
                new = self.unit(self.momentum * self.centers[k] + (1 - self.momentum) * new)
            self.centers[k] = new
        costs = []
        for v, label in zip(e, y, strict=True):
            d = {k: max(distance(v, c), 1e-6) for k, c in self.centers.items()}  # kept off 0
            own = d.pop(label)
            if d:
                costs.append((label, cost_of_gap(own - min(d.values()), self.margin)))
        return class_balanced_mean(costs) if costs else 0.0

    @staticmethod
    def unit(v):
        return v / math.sqrt(v @ v)


@SEEDS
@pytest.mark.parametrize("spread", [0.2, 1.0])
@pytest.mark.parametrize("margin", ["soft", 0.3, 0.0, 5.0])
@pytest.mark.parametrize("mining", ["hard", "semihard", "all"])
def test_triplet(mining, margin, spread, seed):
    e, y = embeddings(seed, spread=spread)
    expected = class_balanced_mean(triplet_costs(e, y, margin, mining))
    assert float(triplet(e, y, margin, mining)) == pytest.approx(expected, rel=1e-10)


def test_triplet_mines_hard_negatives_by_default_with_a_soft_margin():
    e, y = embeddings()
    assert float(triplet(e, y)) == float(triplet(e, y, "soft", "hard"))
    minings = {float(triplet(e, y, mining=mining)) for mining in ("hard", "semihard", "all")}
    assert len(minings) == 3


@SEEDS
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_supcon(temperature, seed):
    e, y = embeddings(seed)
    expected = explicit_supcon(e, y, temperature)
    assert float(supcon(e, y, temperature)) == pytest.approx(expected, rel=1e-10)


@SEEDS
@pytest.mark.parametrize("spread", [0.05, 0.3, 1.0])  # few, some, many pairs are hard
def test_multi_similarity(spread, seed):
    e, y = embeddings(seed, spread=spread)
    expected = explicit_multi_similarity(e, y)
    assert float(multi_similarity(e, y)) == pytest.approx(expected, rel=1e-10, abs=1e-14)
    options = {"alpha": 1.0, "gamma": 10.0, "base": 0.2, "epsilon": 0.5}
    expected = explicit_multi_similarity(e, y, **options)
    assert float(multi_similarity(e, y, **options)) == pytest.approx(expected, rel=1e-10, abs=1e-14)


@SEEDS
@pytest.mark.parametrize("margin", [0.3, 1.0, 1.9])
def test_contrastive(margin, seed):
    e, y = embeddings(seed)
    expected = explicit_contrastive(e, y, margin)
    assert float(contrastive(e, y, margin)) == pytest.approx(expected, rel=1e-10)


@SEEDS
@pytest.mark.parametrize("options", [{}, {"margin": 0.3, "scale": 8.0}], ids=str)
def test_proxy_anchor(options, seed):
    e, y = embeddings(seed)
    torch.manual_seed(seed)
    loss = ProxyAnchor(6, 5, **options).double()  # two classes are not in the batch
    expected = explicit_proxy_anchor(e, y, loss.proxies, **options)
    assert loss(e, y).item() == pytest.approx(expected, rel=1e-10)


@SEEDS
@pytest.mark.parametrize("momentum", [0.9, 0.5])
@pytest.mark.parametrize("margin", ["soft", 0.3])
def test_class_center_triplet(margin, momentum, seed):
    """Centres move first; those of classes that no batch has held yet are nobody's negative."""
    loss = ClassCenterTriplet(5, 5, margin, momentum).double()
    explicit = ExplicitCenters(margin, momentum)
    for step in range(4):
        e, y = embeddings(10 * seed + step)
        if step == 0:
            e, y = e[y < 2], y[y < 2]
        if step == 2:
            e, y = e[y > 0], y[y > 0]
        assert float(loss(e, y)) == pytest.approx(explicit(e, y), rel=1e-10)
        for k, center in explicit.centers.items():
            np.testing.assert_allclose(loss.centers[k].numpy(), center, rtol=1e-10)
    assert loss.seen.tolist() == [True] * 4 + [False]
    assert not loss.centers[4].any()


def test_defaults_of_class_centers():
    e, y = embeddings()
    default, named = (
        ClassCenterTriplet(4, 5).double(),
        ClassCenterTriplet(4, 5, 0.3, 0.9, 0).double(),
    )
    for _ in range(2):
        assert float(default(e, y)) == float(named(e, y))


def test_no_gradient_flows_through_the_centers():
    e, y = embeddings(counts=(6, 3, 2, 2))
    loss = ClassCenterTriplet(4, 5, margin=5.0, momentum=0.0).double()
    e.requires_grad_()
    loss(e, y).backward()
    centers = loss.centers.clone()
    # The same loss, at centres that are constants.
    again = e.detach().clone().requires_grad_()
    d = (again.unsqueeze(1) - centers).square().sum(dim=2).sqrt()
    own = F.one_hot(y, 4).bool()
    gap = d[own] - d.masked_fill(own, torch.inf).amin(dim=1) + 5
    class_shares = 1 / (4 * torch.bincount(y)[y].double())
    (gap * class_shares).sum().backward()
    # Off the sphere the two distances differ: compare along it.
    for one in (e, again):
        one.grad -= (one.grad * one.detach()).sum(dim=1, keepdim=True) * one.detach()
    torch.testing.assert_close(e.grad, again.grad, rtol=1e-6, atol=1e-8)
    assert not loss.centers.requires_grad


# ---------------------------------------------------------------- four points, by hand

SQUARE = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]], dtype=torch.float64)
TWO = torch.tensor([0, 0, 1, 1])
ROOT = math.sqrt(2)


def soft(gap):
    return math.log(1 + math.exp(gap))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # Every point has its positive and one negative at sqrt(2), the other negative at 2.
        (triplet, math.log(2)),
        (partial(triplet, margin=0.3), 0.3),
        (partial(triplet, mining="semihard"), soft(ROOT - 2)),
        (partial(triplet, mining="semihard", margin=2 - ROOT), 0.0),
        (partial(triplet, mining="all"), (math.log(2) + soft(ROOT - 2)) / 2),
        (partial(triplet, mining="all", margin=1.0), (1 + ROOT - 1) / 2),
        (partial(supcon, temperature=1.0), math.log(2 + math.exp(-1))),
        (multi_similarity, soft(1) / 2 + soft(-25) / 50),
        (contrastive, 2.0),
        (partial(contrastive, margin=2.0), 2 + (2 - ROOT) ** 2 / 2),
    ],
)
def test_four_points(loss, expected):
    assert float(loss(SQUARE, TWO)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_four_points_and_two_proxies():
    loss = ProxyAnchor(2, 2, margin=0.1, scale=2.0).double()
    loss.proxies.data = torch.tensor([[3.0, 0], [-0.5, 0]], dtype=torch.float64)
    # Each proxy has cosines 1 and 0 with its own class, -1 and 0 with the other.
    pull = math.log(1 + math.exp(-2 * 0.9) + math.exp(-2 * -0.1))
    push = math.log(1 + math.exp(2 * -0.9) + math.exp(2 * 0.1))
    assert loss(SQUARE, TWO).item() == pytest.approx(pull + push, rel=1e-9)


def test_four_points_and_two_centers():
    loss = ClassCenterTriplet(2, 2, margin=2.0).double()
    gap = math.sqrt(2 - ROOT) - math.sqrt(2 + ROOT)  # centres are on the diagonal
    assert float(loss(SQUARE, TWO)) == pytest.approx(2 + gap, rel=1e-9)
    np.testing.assert_allclose(loss.centers.numpy(), np.array([[1, 1], [-1, -1]]) / ROOT)


# ---------------------------------------------------------------- invariants


def test_hinge_is_zero_once_the_negative_is_far_enough():
    e = torch.tensor([[1.0, 0], [0.8, 0.6], [-1, 0]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 0, 1])
    d_p, d_n = distance([1, 0], [0.8, 0.6]), distance([0.8, 0.6], [-1, 0])
    assert triplet(e, y, margin=d_n - d_p - 1e-3).item() == 0
    loss = triplet(e, y, margin=d_n - d_p + 1e-3)  # one of the two anchors is within the margin
    assert loss.item() == pytest.approx(0.0005, rel=1e-6)


@pytest.mark.parametrize("mining", ["hard", "semihard", "all"])
@pytest.mark.parametrize("margin", ["soft", 0.5])
def test_triplet_gradient_pulls_the_positive_and_pushes_the_negative(margin, mining):
    angles = torch.tensor([0.0, 40.0, -50.0], dtype=torch.float64).deg2rad().requires_grad_()
    y = torch.tensor([0, 0, 1])

    def at(angles):
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    (slope,) = torch.autograd.grad(triplet(at(angles), y, margin, mining), angles)
    before, after = (distances(at(a), at(a)) for a in (angles, angles - 1e-3 * slope))
    assert after[0, 1] < before[0, 1]
    assert after[0, 2] > before[0, 2]


@pytest.mark.parametrize("margin", ["soft", 0.3])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_batch_hard_triplets_do_not_see_how_often_a_class_is_there(label, margin):
    e, y = embeddings(counts=(5, 3, 2))
    rows = torch.cat([torch.arange(len(y)), torch.nonzero(y == label).ravel()])
    once, twice = triplet(e, y, margin), triplet(e[rows], y[rows], margin)
    torch.testing.assert_close(twice, once)
    # A plain mean over anchors does.
    plain = [mean([c for _, c in triplet_costs(e[r], y[r], margin, "hard")]) for r in (..., rows)]
    assert plain[0] != pytest.approx(plain[1], rel=1e-3)


@pytest.mark.parametrize("seed", range(2))
def test_class_centers_do_not_see_how_often_a_class_is_there(seed):
    e, y = embeddings(seed)
    rows = torch.cat([torch.arange(len(y)), torch.nonzero(y == 0).ravel()])
    once, twice = (ClassCenterTriplet(4, 5).double()(e[r], y[r]) for r in (..., rows))
    torch.testing.assert_close(twice, once)


def turned(width=5, seed=0):
    matrix = np.random.default_rng(seed).normal(size=(width, width))
    return torch.from_numpy(np.linalg.qr(matrix)[0])


@EVERY_PAIR_LOSS
@pytest.mark.parametrize("seed", range(2))
def test_rotation_and_order_of_the_batch_change_nothing(name, seed):
    loss, (e, y) = PAIR_LOSSES[name], embeddings(seed)
    before = loss(e, y)
    torch.testing.assert_close(loss(e @ turned(), y), before)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(y)))
    torch.testing.assert_close(loss(e[order], y[order]), before)
    torch.testing.assert_close(loss(e, 3 - y), before)  # nor do the names of the classes
    assert float(before) > 0


def test_rotation_of_embeddings_proxies_and_centers_changes_nothing():
    e, y = embeddings()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    anchor = ProxyAnchor(4, 5).double()
    before = anchor(e, y)
    torch.testing.assert_close(anchor(e[order], y[order]), before)
    anchor.proxies.data = anchor.proxies.data @ turned()
    torch.testing.assert_close(anchor(e @ turned(), y), before)
    for rows, matrix in ((order, torch.eye(5).double()), (torch.arange(len(y)), turned())):
        one, two = ClassCenterTriplet(4, 5).double(), ClassCenterTriplet(4, 5).double()
        for _ in range(2):
            torch.testing.assert_close(two(e[rows] @ matrix, y[rows]), one(e, y))


def loss_and_slope(loss, e, y, dtype=torch.float64):
    """Through the normalisation, as in training."""
    z = e.to(dtype).clone().requires_grad_()
    value = loss(F.normalize(z), y)
    value.backward()
    return value.item(), z.grad


NOTHING_TO_COMPARE = {
    "one class": torch.zeros(6, dtype=torch.long),
    "no class twice": torch.arange(6),
}


@pytest.mark.parametrize("case", NOTHING_TO_COMPARE)
@pytest.mark.parametrize("name", [name for name in PAIR_LOSSES if name != "contrastive"])
def test_nothing_to_compare_is_no_loss(name, case):
    e, _ = embeddings(counts=(6,))
    value, slope = loss_and_slope(PAIR_LOSSES[name], e, NOTHING_TO_COMPARE[case])
    assert value == 0
    assert not slope.any()  # NaN would count as true


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_single_embedding_is_no_loss(name):
    value, slope = loss_and_slope(PAIR_LOSSES[name], torch.ones(1, 5), torch.tensor([2]))
    assert value == 0
    assert not slope.any()


def test_contrastive_leaves_out_the_term_that_has_no_pairs():
    e, _ = embeddings(counts=(6,))
    d = distances(e, e)[~torch.eye(6, dtype=torch.bool)]
    one, each = NOTHING_TO_COMPARE.values()
    torch.testing.assert_close(contrastive(e, one), d.square().mean())
    torch.testing.assert_close(contrastive(e, each, 1.5), (1.5 - d).clamp_min(0).square().mean())


def test_class_centers_need_another_class():
    e, _ = embeddings(counts=(6,))
    loss = ClassCenterTriplet(4, 5, margin=9.0).double()
    one, each = NOTHING_TO_COMPARE.values()
    value, slope = loss_and_slope(loss, e, one)
    assert value == 0
    assert not slope.any()
    value, _ = loss_and_slope(loss, e[:4], each[:4])  # classes of one sample are enough
    assert value > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("y", [TWO, torch.zeros(4).long(), torch.arange(4)], ids=str)
@pytest.mark.parametrize("name", [*PAIR_LOSSES, "class_center_triplet", "proxy_anchor"])
def test_identical_embeddings_give_finite_values_and_no_slope_between_them(name, y, dtype):
    torch.manual_seed(0)
    modules = {"class_center_triplet": ClassCenterTriplet, "proxy_anchor": ProxyAnchor}
    loss = PAIR_LOSSES[name] if name in PAIR_LOSSES else modules[name](4, 5).to(dtype)
    point = torch.tensor([[0.3, -0.1, 0.7, 0.2, 0.4]])
    value, slope = loss_and_slope(loss, point.expand(4, 5), y, dtype)
    assert math.isfinite(value)
    assert torch.isfinite(slope).all()
    if name != "proxy_anchor":  # proxies are elsewhere and do pull
        assert slope.abs().max() < 0.01


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_classes_collapsed_to_points_have_finite_slopes(name):
    """What training aims at: the distance to the positives is 0, where a root has no slope."""
    e = SQUARE[TWO].float()
    value, slope = loss_and_slope(PAIR_LOSSES[name], e, TWO, torch.float32)
    assert math.isfinite(value)
    assert torch.isfinite(slope).all()


@EVERY_PAIR_LOSS
def test_lower_precision_gives_nearly_the_same(name):
    e, y = embeddings()
    one, two = PAIR_LOSSES[name](e, y), PAIR_LOSSES[name](e.float(), y)
    assert two.dtype == torch.float32
    assert float(two) == pytest.approx(float(one), rel=1e-4)


def test_extreme_scales_stay_finite():
    e, y = SQUARE.float().requires_grad_(), torch.tensor([0, 1, 0, 1])  # as wrong as can be
    for loss in (partial(supcon, temperature=1e-3), partial(multi_similarity, gamma=1e4)):
        (slope,) = torch.autograd.grad(loss(e, y), e)
        assert torch.isfinite(slope).all()
    loss = ProxyAnchor(2, 2, scale=1e4)
    (slope,) = torch.autograd.grad(loss(e, y), e)
    assert torch.isfinite(slope).all()


# ---------------------------------------------------------------- another library's losses


@SEEDS
@pytest.mark.parametrize("spread", [0.5, 1.0])
def test_losses_equal_those_of_pytorch_metric_learning(spread, seed):
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    e, y = embeddings(seed, spread=spread)
    torch.testing.assert_close(supcon(e, y), pml.SupConLoss()(e, y))
    hard = miners.MultiSimilarityMiner()(e, y)
    assert max(map(len, hard)) > 1  # their loss takes a single pair for none
    torch.testing.assert_close(multi_similarity(e, y), pml.MultiSimilarityLoss()(e, y, hard))
    loss, theirs = ProxyAnchor(6, 5).double(), pml.ProxyAnchorLoss(6, 5)
    theirs.proxies.data = loss.proxies.detach().clone()
    torch.testing.assert_close(loss(e, y), theirs(e, y))


def test_a_loss_of_pytorch_metric_learning_plugs_in(tiny, blobs):
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    X, y = blobs
    clf = MetricTwoStageClassifier(**tiny, metric_loss=pml.TripletMarginLoss()).fit(X, y)
    assert all(row["train_metric"] > 0 for row in clf.stage1_history_)
    loaded = pickle.loads(pickle.dumps(clf))
    np.testing.assert_array_equal(loaded.predict_proba(X), clf.predict_proba(X))


# ---------------------------------------------------------------- the loss of stage one


def stage_loss(metric=triplet, n_metric=4, projection=None, ce_weight=0.7, metric_weight=0.3):
    return MetricStageLoss(
        LabelLoss(cross_entropy, torch.ones(3, dtype=torch.float64)),
        metric,
        nn.Identity() if projection is None else projection,
        ce_weight=ce_weight,
        metric_weight=metric_weight,
        n_metric=n_metric,
    )


def output_and_mass(n=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(n, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 0, 1, 0, 2, 0, 1, 1, 2, 2])[:n]
    return Output(features, logits), F.one_hot(y, 3).double(), y


@pytest.mark.parametrize("n_metric", [4, 6])
def test_cross_entropy_reads_the_first_rows_and_the_metric_loss_the_last(n_metric):
    output, mass, y = output_and_mass()
    criterion = stage_loss(n_metric=n_metric)
    loss = criterion(output, mass)
    n = 10 - n_metric
    ce = F.cross_entropy(output.logits[:n], y[:n])
    metric = triplet(F.normalize(output.features[n:]), y[n:])
    torch.testing.assert_close(loss, 0.7 * ce + 0.3 * metric)
    torch.testing.assert_close(criterion.terms, {"ce": ce, "metric": metric})
    loss.backward()
    assert output.logits.grad[:n].all()
    assert not output.logits.grad[n:].any()
    assert not output.features.grad[:n].any()
    assert output.features.grad[n:].any(dim=1).all()


def test_both_terms_read_a_shared_batch():
    output, mass, y = output_and_mass()
    loss = stage_loss(n_metric=None)(output, mass)
    ce, metric = F.cross_entropy(output.logits, y), triplet(F.normalize(output.features), y)
    torch.testing.assert_close(loss, 0.7 * ce + 0.3 * metric)


def test_embeddings_are_projected_and_of_unit_length():
    output, mass, y = output_and_mass()
    projection = nn.Linear(5, 3).double()
    seen = []

    def metric(e, labels):
        seen.append((e, labels))
        return e.sum()

    stage_loss(metric, projection=projection)(output, mass)
    ((e, labels),) = seen
    torch.testing.assert_close(e, F.normalize(projection(output.features[6:])))
    torch.testing.assert_close(labels, y[6:])


def test_a_progressive_loss_is_the_triplet_loss_and_then_that_of_the_centers():
    loss, centers = ClassCenterTriplet(4, 5, switch=3).double(), ClassCenterTriplet(4, 5).double()
    for step in range(6):
        e, y = embeddings(step)
        late = centers(e, y)  # they move from the first step on
        expected = triplet(e, y, 0.3) if step < 3 else late
        assert float(loss(e, y)) == float(expected)
        assert float(late) != pytest.approx(float(triplet(e, y, 0.3)))


@pytest.mark.parametrize("n_before", [0, 1, 2, 4])
@pytest.mark.parametrize("kind", ["centers", "proxies"])
def test_a_restored_stage_goes_on_as_it_would_have(kind, n_before):
    def make(seed):
        torch.manual_seed(seed)
        metric = ClassCenterTriplet(3, 4, switch=2) if kind == "centers" else ProxyAnchor(3, 4)
        return stage_loss(metric, projection=nn.Linear(5, 4)).double()

    one, two = make(0), make(1)
    for seed in range(n_before):
        one(*output_and_mass(seed=seed)[:2])
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    two.load_state_dict(torch.load(file, weights_only=True))
    for seed in range(n_before, n_before + 4):
        output, mass, _ = output_and_mass(seed=seed)
        assert one(output, mass).item() == two(output, mass).item()
    assert make(1)(output, mass).item() != two(output, mass).item()


# ---------------------------------------------------------------- the estimator


def small(**params):
    """Quick and exact: two blocks, no augmentation, float64."""
    fixed = {
        "backbone": ConvNet(widths=(4, 8)),
        "max_epochs": 3,
        "batch_size": 16,
        "augment": "none",
        "precision": "float64",
        "device": "cpu",
        "rebalance": "crt",
        "random_state": 0,
    }
    return MetricTwoStageClassifier(**{**fixed, **params})


class Batches(Callback):
    """Keep the batches of a fit, as copies."""

    seen: list = []  # noqa: RUF012

    def on_batch_begin(self, net, batch=None, **kwargs):
        self.seen.append(tuple(part.detach().clone() for part in batch))


@pytest.fixture
def spy():
    Batches.seen = []
    return Batches


def state(clf):
    return {name: value.clone() for name, value in clf.net_.module_.state_dict().items()}


def assert_same_state(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def test_without_metric_weight_it_is_plain_decoupling(blobs):
    X, y = blobs
    params = {"augment": "medical", "class_weight": "balanced"}
    clf = small(metric_weight=0.0, **params).fit(X, y)
    names = set(SoftmaxClassifier().get_params())
    shared = {k: v for k, v in clf.get_params(deep=False).items() if k in names}
    plain = SoftmaxClassifier(**shared).fit(X, y)
    assert_same_state(state(clf), state(plain))
    assert [row["train_loss"] for row in clf.history_] == [
        row["train_loss"] for row in plain.history_
    ]
    features = plain.transform(X)
    assert features.dtype == np.float64
    head = ClassifierRetraining().fit(features, y)
    np.testing.assert_array_equal(clf.head_.coef_, head.coef_)
    np.testing.assert_array_equal(clf.head_.intercept_, head.intercept_)
    np.testing.assert_array_equal(clf.predict_proba(X), head.predict_proba(features))
    # And with the head of stage one nothing at all is left of the second stage.
    clf.refit_head(X, y, rebalance="none")
    np.testing.assert_allclose(clf.predict_proba(X), plain.predict_proba(X), rtol=1e-9)


@pytest.mark.parametrize("metric_batch", ["balanced", "shared"])
def test_the_metric_loss_changes_the_network(metric_batch, blobs):
    one, two = (small(metric_weight=w, metric_batch=metric_batch).fit(*blobs) for w in (0.0, 0.3))
    assert not np.allclose(one.transform(blobs[0]), two.transform(blobs[0]), rtol=0.01)


@pytest.mark.parametrize("name", HEADS)
def test_stage_two_leaves_the_network_as_it_is(name, blobs):
    X, y = blobs
    clf = small(augment="medical").fit(X, y)
    before, features, scores = state(clf), clf.transform(X), clf.decision_function(X)
    params, history = clf.get_params(), copy.deepcopy(clf.history_)
    assert any("running_mean" in key for key in before)
    assert clf.refit_head(X, y, rebalance=name) is clf
    assert_same_state(state(clf), before)
    np.testing.assert_array_equal(clf.transform(X), features)
    assert clf.get_params() == params
    assert clf.history_ == history
    assert repr(clf.head_.__class__) == repr(HEADS[name]().__class__)
    same = np.array_equal(clf.decision_function(X), scores)
    assert same if name == "crt" else not same  # crt is what it had


@pytest.mark.parametrize("name", HEADS)
def test_a_refitted_head_is_the_one_that_fit_would_have_made(name, blobs):
    X, y = blobs
    fitted = small(rebalance=name, metric_loss="supcon").fit(X, y)
    refitted = small(metric_loss="supcon").fit(X, y).refit_head(X, y, rebalance=name)
    np.testing.assert_array_equal(fitted.decision_function(X), refitted.decision_function(X))
    fitted.refit_head(X, y)  # the constructor's choice
    np.testing.assert_array_equal(fitted.decision_function(X), refitted.decision_function(X))


def test_heads_are_fitted_to_features_of_unaugmented_images_in_evaluation_mode(blobs):
    X, y = blobs
    clf = small(augment="strong", precision="auto").fit(X, y)
    head = ClassifierRetraining().fit(clf.transform(X).astype(np.float64), y)
    np.testing.assert_array_equal(clf.head_.coef_, head.coef_)
    assert not clf.net_.module_.training


@pytest.mark.parametrize("name", ["lws", "tau_norm", "logit_adjust"])
def test_heads_that_keep_stage_one_start_from_its_head(name, blobs):
    X, y = blobs
    clf = small(rebalance=name).fit(X, y)
    linear = clf.net_.module_.head
    start = {"coef_init": linear.weight, "intercept_init": linear.bias}
    start = {key: value.detach().numpy() for key, value in start.items()}
    head = HEADS[name]().fit(clf.transform(X), y, **start)
    np.testing.assert_allclose(clf.class_prior_, np.bincount(y) / len(y))
    np.testing.assert_allclose(clf.decision_function(X), head.decision_function(clf.transform(X)))


@pytest.mark.parametrize("labels", [np.array([1, 2, 7]), np.array(["a", "b", "c"])])
def test_class_weights_of_a_head_are_those_of_the_caller_s_labels(labels, blobs):
    X, codes = blobs
    y = labels[codes]
    clf = small().fit(X, y)
    for head in (ClassifierRetraining(), LogisticRegression()):
        head.set_params(class_weight={labels[0]: 1e-4, labels[1]: 1e4, labels[2]: 1e-4})
        assert (clf.refit_head(X, y, rebalance=head).predict(X) == labels[1]).mean() > 0.9


def test_logit_adjustment_takes_off_the_prior_that_stage_one_learned(blobs):
    """With balanced weights or rows the head of stage one holds no prior to take off."""
    X, y = blobs
    for params in ({"class_weight": "balanced"}, {"sampler": RandomOverSampler(random_state=0)}):
        clf = small(rebalance="logit_adjust", **params).fit(X, y)
        np.testing.assert_allclose(clf.class_prior_, 1 / 3)
        adjusted = clf.predict_proba(X)
        plain = clf.refit_head(X, y, rebalance="none").predict_proba(X)
        np.testing.assert_allclose(adjusted, plain, atol=1e-8)


def test_a_refit_that_fails_leaves_the_head(blobs):
    X, y = blobs
    clf = small().fit(X, y)
    head, before = clf.head_, clf.predict_proba(X)
    calls = [
        ((X[y != 1], y[y != 1], "crt"), ValueError, r"y lacks the classes \[1\]"),
        ((X, np.where(y == 1, 5, y), "crt"), ValueError, r"\[5\] that are not among \[0, 1, 2\]"),
        ((X, y, "smote"), ValueError, "must be one of"),
        ((X, y, LogisticRegression), TypeError, "scikit-learn classifier"),
        ((X, y, LinearRegression()), TypeError, "with predict_proba or decision_function"),
        ((X, y[:-1], "crt"), ValueError, "inconsistent numbers"),
        ((X[:, :, :6], y, "crt"), ValueError, r"images of shape \(3, 6, 12\)"),
    ]
    for (images, labels, name), error, message in calls:
        with pytest.raises(error, match=message):
            clf.refit_head(images, labels, rebalance=name)
        assert clf.head_ is head
    np.testing.assert_array_equal(clf.predict_proba(X), before)


def test_a_head_can_be_refitted_only_after_a_fit(blobs):
    with pytest.raises(NotFittedError):
        small().refit_head(*blobs)


# ---------------------------------------------------------------- stage one: batches and gradients


def test_a_balanced_batch_follows_the_instance_rows(spy, blobs):
    X, y = blobs
    small(p_classes=2, k_samples=3, max_epochs=2, callbacks=[spy()]).fit(X, y)
    joined, spy.seen = spy.seen, []
    small(metric_weight=0.0, max_epochs=2, callbacks=[spy()]).fit(X, y)
    plain = spy.seen
    assert len(joined) == len(plain) == 8
    covered = sum(mass[:-6].sum(dim=0) for _, mass in joined[:4])
    assert covered.tolist() == [36, 16, 8]  # each row once an epoch
    for (images, mass), (other_images, other_mass) in zip(joined[:4], plain[:4], strict=True):
        assert len(images) == len(mass) == len(other_images) + 6
        assert torch.equal(images[:-6], other_images)
        assert torch.equal(mass[:-6], other_mass)
    rows = {image.numpy().tobytes(): k for image, k in _by_image(plain[:4])}
    appearances = np.zeros(3)
    for images, mass in joined:
        classes, counts = mass[-6:].argmax(dim=1).unique(return_counts=True)
        assert counts.tolist() == [3, 3]
        appearances[classes] += 1
        # Images and labels belong together, and no image is twice in a batch.
        keys = [image.numpy().tobytes() for image in images[-6:]]
        assert len(set(keys)) == 6
        assert [rows[key] for key in keys] == mass[-6:].argmax(dim=1).tolist()
    assert appearances.max() - appearances.min() <= 2


def _by_image(batches):
    for images, mass in batches:
        yield from zip(images, mass.argmax(dim=1).tolist(), strict=True)


def test_there_are_at_most_as_many_classes_in_a_batch_as_there_are(spy, blobs):
    small(callbacks=[spy()]).fit(*blobs)  # the default asks for 8 classes, 4 of each
    for _, mass in spy.seen:
        assert mass[-12:].sum(dim=0).tolist() == [4, 4, 4]
        assert len(mass) == 15 + 12


def test_a_shared_batch_has_the_instance_rows_only(spy, blobs):
    clf = small(metric_batch="shared", callbacks=[spy()]).fit(*blobs)
    assert [len(mass) for _, mass in spy.seen] == [15] * 12
    assert sum(mass.sum(dim=0) for _, mass in spy.seen[:4]).tolist() == [36, 16, 8]
    assert clf.net_.criterion_.n_metric is None


@pytest.mark.parametrize("loss", METRIC_LOSSES)
@pytest.mark.parametrize("metric_head", ["mlp", "identity"])
def test_the_slope_of_the_metric_loss_reaches_the_backbone(loss, metric_head, blobs):
    X, y = blobs
    params = {"metric_loss": loss, "metric_head": metric_head, "max_epochs": 1}
    clf = small(ce_weight=0.0, margin=1.0 if loss == "contrastive" else None, **params).fit(X, y)
    module, criterion = clf.net_.module_.train(), clf.net_.criterion_
    module.zero_grad()
    images = clf._preprocessor()(torch.from_numpy(X[:40]))
    criterion(module(images), F.one_hot(torch.from_numpy(y[:40]), 3).double()).backward()
    convolution = next(module.trunk.parameters())
    assert torch.isfinite(convolution.grad).all()
    assert convolution.grad.abs().max() > 1e-9
    assert not module.head.weight.grad.any()  # cross-entropy weighs nothing
    # The same in the fit itself: with nothing but the metric loss the backbone has moved.
    still = small(lr=1e-12, **params).fit(X, y)
    before, after = (next(c.net_.module_.trunk.parameters()) for c in (still, clf))
    assert (before - after).abs().max() > 1e-4


@pytest.mark.parametrize("weights", [(1.0, 0.3), (0.5, 2.0), (0.0, 1.0)])
def test_history_has_the_terms_of_stage_one_and_the_head_of_stage_two(weights, blobs):
    ce_weight, metric_weight = weights
    clf = small(ce_weight=ce_weight, metric_weight=metric_weight).fit(*blobs)
    assert clf.stage1_history_ == clf.history_
    assert [row["epoch"] for row in clf.stage1_history_] == [1, 2, 3]
    for row in clf.stage1_history_:
        expected = ce_weight * row["train_ce"] + metric_weight * row["train_metric"]
        assert row["train_loss"] == pytest.approx(expected)
        assert min(row["train_ce"], row["train_metric"]) > 0
    (head,) = clf.stage2_history_
    assert head == {"loss": clf.head_.loss_, "n_iter": clf.head_.n_iter_}
    proba = clf.predict_proba(blobs[0])[np.arange(60), blobs[1]]
    balanced = np.mean([-np.log(proba[blobs[1] == k]).mean() for k in range(3)])
    assert head["loss"] == pytest.approx(balanced)
    clf.refit_head(*blobs, rebalance="ncm")
    assert clf.stage2_history_ == [{"loss": clf.head_.loss_, "n_iter": 0}]


def test_plain_decoupling_has_no_terms(blobs):
    clf = small(metric_weight=0.0).fit(*blobs)
    assert not {"train_ce", "train_metric"} & set(clf.history_[0])


@pytest.mark.parametrize("loss", ["triplet", "supcon", "class_center_triplet"])
def test_features_of_a_class_come_closer_together(loss):
    """Within-class over between-class scatter of new images, as unit vectors."""

    def scatter(clf, X, y):
        v = clf.transform(X)
        v = v / np.linalg.norm(v, axis=1, keepdims=True)
        means = np.stack([v[y == k].mean(axis=0) for k in range(3)])
        return np.square(v - means[y]).sum() / np.square(means[y] - v.mean(axis=0)).sum()

    ratios = {0.0: [], 1e-6: [], 1.0: []}  # the middle one sees the same batches as the last
    for seed in range(2):
        X, y = make_blobs(seed=seed)
        new = make_blobs((40, 40, 40), seed=100 + seed)
        for weight, found in ratios.items():
            clf = small(
                metric_loss=loss, metric_weight=weight, metric_head="identity",
                backbone=ConvNet((8, 16)), max_epochs=12, lr=1e-2, precision="float32",
                random_state=seed,
            )  # fmt: skip
            found.append(scatter(clf.fit(X, y), *new))
    none, control, metric = map(np.mean, ratios.values())
    assert metric < 0.7 * none
    assert metric < 0.8 * control


@pytest.mark.parametrize("n_epochs", [2, 3])
def test_class_centers_take_over_after_half_the_steps(n_epochs, blobs):
    clf = small(metric_loss="class_center_triplet", max_epochs=n_epochs).fit(*blobs)
    metric = clf.net_.criterion_.metric
    assert metric.switch == 4 * n_epochs // 2
    assert metric.step == 4 * n_epochs
    assert metric.seen.all()
    torch.testing.assert_close(metric.centers.norm(dim=1), torch.ones(3).double())


@pytest.mark.parametrize("mining", ["hard", "semihard", "all"])
@pytest.mark.parametrize("loss", METRIC_LOSSES)
def test_margins_and_mining_reach_the_loss(loss, mining, blobs):
    e, y = embeddings(counts=(6, 4, 2), width=8)

    def value(**params):
        params = {"metric_loss": loss, "metric_head": "identity", "max_epochs": 1, **params}
        metric = small(mining=mining, **params).fit(*blobs).net_.criterion_.metric
        if loss == "class_center_triplet":
            metric.seen.zero_()
            metric.step.fill_(99)
        return metric(e, y).item(), metric

    default, metric = value()
    expected = {
        "triplet": lambda: triplet(e, y, "soft", mining),
        "class_center_triplet": lambda: ClassCenterTriplet(3, 8, "soft").double()(e, y),
        "supcon": lambda: supcon(e, y),
        "multi_similarity": lambda: multi_similarity(e, y),
        "proxy_anchor": lambda: explicit_proxy_anchor(e, y, metric.proxies),
        "contrastive": lambda: contrastive(e, y),
    }[loss]()
    assert default == pytest.approx(float(expected), rel=1e-9)
    if loss in ("supcon", "multi_similarity"):
        return
    given, metric = value(margin=0.4)
    expected = {
        "triplet": lambda: triplet(e, y, 0.4, mining),
        "class_center_triplet": lambda: ClassCenterTriplet(3, 8, 0.4).double()(e, y),
        "proxy_anchor": lambda: explicit_proxy_anchor(e, y, metric.proxies, 0.4),
        "contrastive": lambda: contrastive(e, y, 0.4),
    }[loss]()
    assert given == pytest.approx(float(expected), rel=1e-9)
    assert given != pytest.approx(default)


# ---------------------------------------------------------------- what is trained, what is kept


class AtStart(Callback):
    """The criterion as it is before the first step."""

    criterion = None

    def on_train_begin(self, net, **kwargs):
        type(self).criterion = copy.deepcopy(net.criterion_)


def test_proxies_and_projection_are_trained_and_then_dropped(blobs):
    X, y = blobs
    clf = small(metric_loss="proxy_anchor", callbacks=[AtStart()]).fit(X, y)
    before = dict(AtStart.criterion.named_parameters())
    after = dict(clf.net_.criterion_.named_parameters())
    assert sorted(before) == [
        "metric.proxies",
        *(f"projection.{i}.{part}" for i in (0, 2) for part in ("bias", "weight")),
    ]
    for name, value in before.items():
        assert (after[name] - value).abs().max() > 1e-4, name
    assert after["metric.proxies"].shape == (3, 128)
    parts = ("trunk.", "head.", "pixel_", "head_")
    assert all(name.startswith(parts) for name in clf.weights_)
    # A wider projection makes the pickle no larger.
    wider = small(metric_loss="proxy_anchor", embedding_dim=512).fit(X, y)
    sizes = [len(pickle.dumps(c.set_params(callbacks=None))) for c in (clf, wider)]
    assert abs(sizes[0] - sizes[1]) < 200


def test_the_identity_head_compares_the_features_themselves(blobs):
    clf = small(metric_loss="proxy_anchor", metric_head="identity").fit(*blobs)
    assert isinstance(clf.net_.criterion_.projection, nn.Identity)
    assert clf.net_.criterion_.metric.proxies.shape == (3, 8)


class Learned(nn.Module):
    """A loss of the user, with a parameter and a buffer."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, e, y):
        self.calls += 1
        return supcon(e, y, 1.0) * self.temperature.square() + (self.temperature - 1).square()


def test_a_user_s_loss_is_trained_as_a_copy(blobs):
    loss = Learned()
    before = copy.deepcopy(loss.state_dict())
    clf = small(metric_loss=loss).fit(*blobs)
    copied = clf.net_.criterion_.metric
    assert copied is not loss
    assert clf.metric_loss is loss
    assert copied.calls == 12
    assert copied.temperature != loss.temperature
    assert loss.temperature.grad is None
    assert loss.temperature.dtype == torch.float32
    for name, value in before.items():
        assert torch.equal(loss.state_dict()[name], value)


def test_any_callable_is_a_metric_loss(blobs):
    shapes = set()

    def metric(e, y):
        shapes.add((tuple(e.shape), tuple(y.shape), y.dtype, e.dtype))
        torch.testing.assert_close(e.norm(dim=1), torch.ones(len(e)).double())
        return triplet(e, y)

    one, two = small(metric_loss=metric).fit(*blobs), small(metric_loss="triplet").fit(*blobs)
    assert shapes == {((12, 128), (12,), torch.int64, torch.float64)}
    assert_same_state(state(one), state(two))


@pytest.mark.parametrize("rebalance", ["crt", "ncm", "virtual", RandomForestClassifier(5)], ids=str)
def test_pickles_predict_alike_and_take_another_head(rebalance, blobs):
    X, y = blobs
    clf = small(rebalance=rebalance, metric_loss=Learned()).fit(X, y)
    loaded = pickle.loads(pickle.dumps(clf))
    np.testing.assert_array_equal(loaded.predict_proba(X), clf.predict_proba(X))
    assert loaded.stage1_history_ == clf.stage1_history_
    assert loaded.stage2_history_ == clf.stage2_history_
    for one in (loaded, clf):
        one.refit_head(X, y, rebalance="lws")
    np.testing.assert_array_equal(loaded.predict_proba(X), clf.predict_proba(X))


def test_weights_carry_the_head(blobs):
    X, y = blobs
    one, two = small().fit(X, y), small(random_state=1).fit(X // 2, y)
    assert {"head_coef_", "head_intercept_"} <= set(one.weights_)
    assert not np.array_equal(one.decision_function(X), two.decision_function(X))
    two.weights_ = one.weights_
    np.testing.assert_array_equal(one.decision_function(X), two.decision_function(X))
    for value in one.weights_.values():  # copies
        value[...] = 0
    np.testing.assert_array_equal(one.decision_function(X), two.decision_function(X))


def test_clones_fit_alike(blobs):
    X, y = blobs
    clf = small(metric_loss=Learned(), rebalance=ClassifierRetraining(alpha=0.5)).fit(X, y)
    copied = clone(clf)
    assert copied.get_params()["rebalance__alpha"] == 0.5
    assert not hasattr(copied, "head_")
    assert copied.metric_loss is not clf.metric_loss
    np.testing.assert_array_equal(copied.fit(X, y).predict_proba(X), clf.predict_proba(X))
    other = clone(clf).set_params(random_state=1).fit(X, y)
    assert not np.array_equal(other.predict_proba(X), clf.predict_proba(X))


@pytest.mark.parametrize(
    "params",
    [
        {"metric_loss": "class_center_triplet"},
        {"metric_loss": "proxy_anchor", "early_stopping": True},
        {"metric_loss": "supcon", "rebalance": "virtual", "metric_batch": "shared"},
        {"metric_loss": Learned(), "rebalance": RandomForestClassifier(5)},
    ],
    ids=str,
)
@pytest.mark.parametrize("crash", [1, 4])
def test_a_resumed_fit_equals_an_undisturbed_one(params, crash, blobs, tmp_path):
    X, y = blobs
    params = {"max_epochs": 6, "augment": "strong", "precision": "float32", **params}
    whole = small(**params).fit(X, y)
    crashing = small(**params, checkpoint_dir=tmp_path, callbacks=[CrashAfter(crash)])
    with pytest.raises(RuntimeError, match="power cut"):
        crashing.fit(X, y)
    assert not hasattr(crashing, "head_")
    assert len(list(tmp_path.iterdir())) == 1
    resumed = small(**params, checkpoint_dir=tmp_path).fit(X, y)
    assert whole.weights_.keys() == resumed.weights_.keys()
    for name, value in whole.weights_.items():
        assert np.array_equal(value, resumed.weights_[name]), name
    np.testing.assert_array_equal(resumed.predict_proba(X), whole.predict_proba(X))
    for one, two in zip(whole.stage1_history_, resumed.stage1_history_, strict=True):
        assert one["train_metric"] == two["train_metric"]
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- stage two: heads and costs


class Doubtful(LinearRegression):
    """A regressor: predict alone."""


def test_a_head_without_scores_is_refused(blobs):
    clf = small(rebalance=Doubtful())
    with pytest.raises(TypeError, match=r"Doubtful\(\) must be .* predict_proba or decision"):
        clf.fit(*blobs)
    assert not hasattr(clf, "head_")
    assert not hasattr(clf, "net_")


def learned(**params):
    """Trained long enough to know the blobs."""
    return small(backbone=ConvNet((8, 16)), max_epochs=15, lr=5e-2, **params)


@pytest.mark.parametrize(
    "head",
    [
        RandomForestClassifier(20),
        LogisticRegression(C=0.5),
        SVC(),
        make_pipeline(StandardScaler(), LogisticRegression()),
        ClassifierRetraining(alpha=5.0),
    ],
    ids=lambda head: type(head).__name__,
)
@pytest.mark.parametrize("n_classes", [2, 3])
def test_any_classifier_is_a_head(head, n_classes):
    X, y = make_blobs((36, 16, 8)[:n_classes])
    names = np.array(["nevus", "melanoma", "keratosis"])[y]
    before = repr(head), vars(head).copy()
    clf = learned(rebalance=head).fit(X, names)
    assert (repr(head), vars(head)) == before  # a clone was fitted
    assert clf.head_ is not head
    proba = clf.predict_proba(X)
    np.testing.assert_allclose(proba.sum(axis=1), 1, rtol=1e-9)
    np.testing.assert_array_equal(clf.predict(X), clf.classes_[proba.argmax(axis=1)])
    np.testing.assert_array_equal(clf.head_.predict(clf.transform(X)), clf.predict(X))
    if hasattr(head, "predict_proba"):
        expected = clf.head_.predict_proba(clf.transform(X))
        np.testing.assert_allclose(proba, expected, rtol=1e-6, atol=1e-12)
    assert clf.decision_function(X).shape == ((len(X),) if n_classes == 2 else (len(X), 3))
    assert clf.score(X, names) > 0.9
    loaded = pickle.loads(pickle.dumps(clf))
    np.testing.assert_array_equal(loaded.predict_proba(X), proba)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("n_classes", [2, 3])
def test_every_named_head_learns_strings(name, n_classes):
    X, y = make_blobs((36, 16, 8)[:n_classes])
    names = np.array(["b", "c", "a"])[y]
    clf = learned(rebalance=name).fit(X, names)
    proba = clf.predict_proba(X)
    np.testing.assert_allclose(proba.sum(axis=1), 1, rtol=1e-9)
    assert clf.classes_.tolist() == sorted(set(names.tolist()))
    assert clf.score(X, names) > 0.9


@pytest.mark.parametrize("head", ["virtual", RandomForestClassifier(5)], ids=str)
def test_unseeded_heads_take_the_seed_of_the_fit(head, blobs):
    X, y = blobs
    one, two = (small(rebalance=head).fit(X, y) for _ in range(2))
    assert one.head_.random_state == one.random_seed_
    np.testing.assert_array_equal(one.predict_proba(X), two.predict_proba(X))
    seeded = small(rebalance=RandomForestClassifier(5, random_state=7)).fit(X, y)
    assert seeded.head_.random_state == 7


@pytest.mark.parametrize("rebalance", ["crt", "virtual", "balanced_softmax", "none"])
@pytest.mark.parametrize("costly", [0, 2])
def test_class_weights_move_the_decision(rebalance, costly):
    X, y = make_blobs((20, 20, 20))
    X = (X // 4 + np.random.default_rng(0).integers(0, 180, X.shape)).astype(np.uint8)  # hard
    names = np.array(["b", "c", "a"])[y]
    label = "bca"[costly]
    shares = []
    for weight in (0.02, 50.0):
        clf = small(rebalance=rebalance, class_weight={label: weight}, max_epochs=6, lr=1e-2)
        clf.fit(X, names)
        shares.append(clf.predict_proba(X)[:, clf.classes_.tolist().index(label)].mean())
        if rebalance != "none":
            assert clf.head_.class_weight == {label: weight}
    assert shares[0] + 0.3 < shares[1]


def test_class_weights_of_a_given_head_have_precedence(blobs):
    own = ClassifierRetraining(class_weight={0: 3.0})
    clf = small(rebalance=own, class_weight={2: 5.0}).fit(*blobs)
    assert clf.head_.class_weight == {0: 3.0}
    other = ClassifierRetraining()
    clf = small(rebalance=other, class_weight={2: 5.0}).fit(*blobs)
    assert clf.head_.class_weight == {2: 5.0}
    assert other.class_weight is None
    assert small(class_weight="balanced").fit(*blobs).head_.class_weight is None


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"ce_weight": 0.0, "metric_weight": 0.0}, ValueError, "both 0"),
        ({"metric_loss": ProxyAnchor}, TypeError, r"is a class: pass an instance, ProxyAnchor\(\)"),
        ({"metric_loss": "triplets"}, ValueError, "'metric_loss' parameter"),
        ({"metric_loss": "contrastive", "margin": "soft"}, ValueError, "margin='soft' is for"),
        ({"metric_loss": "proxy_anchor", "margin": "soft"}, ValueError, "margin='soft' is for"),
        ({"metric_loss": "supcon", "margin": 0.2}, ValueError, "margin=0.2 is for"),
        ({"margin": -0.1}, ValueError, "'margin' parameter"),
        ({"metric_weight": -1.0}, ValueError, "'metric_weight' parameter"),
        ({"k_samples": 1}, ValueError, "'k_samples' parameter"),
        ({"p_classes": 1}, ValueError, "'p_classes' parameter"),
        ({"embedding_dim": 0}, ValueError, "'embedding_dim' parameter"),
        ({"rebalance": "smote"}, ValueError, "rebalance='smote' must be one of"),
        ({"rebalance": ClassifierRetraining}, (TypeError, ValueError), "rebalance"),
        ({"rebalance": None}, (TypeError, ValueError), "rebalance"),
        ({"class_weight": {7: 1.0}}, ValueError, r"\[7\] that y lacks"),
        ({"class_weight": {0: -1.0}}, ValueError, "non-negative"),
    ],
    ids=str,
)
def test_wrong_parameters_get_a_clear_error(params, error, message, blobs):
    clf = small(**params)
    with pytest.raises(error, match=message):
        clf.fit(*blobs)
    assert not hasattr(clf, "net_")


@pytest.mark.parametrize("name", list(HEADS))
def test_the_metric_loss_alone_is_enough(name, blobs):
    """Heads that need a given one do not take that of stage one, which nothing has trained."""
    X, y = blobs
    clf = small(ce_weight=0.0, rebalance=name, max_epochs=10, lr=1e-2).fit(X, y)
    assert clf.score(X, y) > 0.9
    assert clf.refit_head(X, y, rebalance=name).score(X, y) > 0.9


# ---------------------------------------------------------------- validation rows, odd data


def test_validation_rows_keep_patients_whole_and_out_of_the_head(blobs):
    X, y = blobs
    groups = np.char.add("patient ", (np.arange(60) // 2).astype(str))
    held = []

    def scoring(estimator, X_held, y_held):
        held.append(X_held)
        return estimator.score(X_held, y_held)

    clf = small(early_stopping=True, max_epochs=6, scoring=scoring).fit(X, y, groups=groups)
    keys = {image.tobytes() for image in held[0]}
    out = np.array([image.tobytes() in keys for image in X])
    assert 0 < out.sum() < 30
    assert not set(groups[out]) & set(groups[~out])
    assert all(len(part) == out.sum() for part in held)
    # The kept network scored the best, with a head that had not seen these rows.
    assert clf.best_score_ == max(row["valid_score"] for row in clf.stage1_history_)
    assert clf.score(X[out], y[out]) == clf.best_score_
    head = ClassifierRetraining().fit(clf.transform(X[~out]), y[~out])
    np.testing.assert_allclose(clf.head_.coef_, head.coef_, rtol=1e-9)


def test_early_stopping_with_a_classifier_of_scikit_learn(blobs):
    clf = small(early_stopping=True, rebalance=LogisticRegression(), n_iter_no_change=1)
    clf.set_params(max_epochs=30, scoring=lambda *args: 0.5).fit(*blobs)
    assert clf.n_iter_ == 2
    np.testing.assert_allclose(clf.predict_proba(blobs[0]).sum(axis=1), 1)


@pytest.mark.parametrize("loss", METRIC_LOSSES)
def test_a_class_of_one_image(loss):
    """It is K times in its batch, here without augmentation: distances of 0 everywhere."""
    X, y = make_blobs((20, 6, 1))
    with pytest.warns(UserWarning, match=r"Classes \[2\] have one training image"):
        clf = small(metric_loss=loss).fit(X, y)
    assert all(np.isfinite(row["train_loss"]) for row in clf.history_)
    assert np.isfinite(clf.predict_proba(X)).all()


def test_two_classes(blobs):
    X, y = blobs
    X, y = X[y < 2], y[y < 2]
    clf = small().fit(X, y)
    scores, proba = clf.decision_function(X), clf.predict_proba(X)
    assert scores.shape == (52,)
    np.testing.assert_allclose(scores, np.log(proba[:, 1] / proba[:, 0]))


@pytest.mark.parametrize("rebalance", ["crt", LogisticRegression()], ids=str)
def test_further_training_without_one_of_the_classes_is_refused(rebalance, blobs):
    """A head of the classes that are left would number them anew."""
    X, y = blobs
    clf = small(warm_start=True, rebalance=rebalance).fit(X, y)
    before = clf.predict_proba(X)
    with pytest.raises(ValueError, match=r"lacks the classes \[1\]"):
        clf.fit(X[y != 1], y[y != 1])
    np.testing.assert_array_equal(clf.predict_proba(X), before)


def test_warm_start_goes_on_from_the_network(blobs):
    X, y = blobs
    clf = small(warm_start=True).fit(X, y)
    first = clf.history_[-1]["train_ce"]
    clf.fit(X, y)
    assert clf.n_iter_ == 6
    assert clf.history_[-1]["train_ce"] < first


def test_there_are_no_sample_weights(blobs):
    with pytest.raises(TypeError, match="sample_weight"):
        small().fit(*blobs, sample_weight=np.ones(60))


def test_another_head_is_no_other_training(tiny, blobs):
    X, y = blobs
    clf = MetricTwoStageClassifier(**tiny).fit(X, y)
    counts = clf.class_counts_.copy()
    rows = np.concatenate(
        [np.flatnonzero(y == label)[: 2 + k] for k, label in enumerate(clf.classes_)]
    )
    clf.refit_head(X[rows], y[rows])
    np.testing.assert_array_equal(clf.class_counts_, counts)
