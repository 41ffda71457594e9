"""SPMix and TailBoost: pairs, the mix inside a network, contrast, and what a fit does with them."""

from __future__ import annotations

import copy
import math
import pickle
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from imblearn.over_sampling import RandomOverSampler
from sklearn.base import clone
from skorch.callbacks import Callback
from torch import nn

from sklearn_medimb import SoftmaxClassifier, SPMixClassifier, SSLEncoder
from sklearn_medimb._data.plans import class_balanced, shuffled
from sklearn_medimb._training.network import Trunk
from sklearn_medimb._training.stage import TrainingSet
from sklearn_medimb.augment import Augmentation
from sklearn_medimb.backbones import MLP, ConvNet, HybridViT, ResNet, ViT
from sklearn_medimb.datasets import make_lesions
from sklearn_medimb.losses import LabelLoss, cross_entropy, logit_adjusted
from sklearn_medimb.methods import Contrast
from sklearn_medimb.methods._spmix import MixedOutput, MixingNetwork, default_layer
from sklearn_medimb.methods._spmix_pairs import MixedViews, Partners, pooled
from sklearn_medimb.methods._tailboost import ContrastLoss, gpaco_loss, supcon_with_memory
from sklearn_medimb.metric_losses import supcon
from sklearn_medimb.mixing import spmix_ratio
from sklearn_medimb.saliency import SaliencyMap, fine_grained
from tests.helpers import CrashAfter, make_batches, make_blobs

TINY_VIT = ViT(patch_size=4, width=12, depth=1, n_heads=2, drop_path=0)
TINY_HYBRID = HybridViT(
    resnet_depth=18, n_stages=2, stem_width=4, width=12, depth=1, n_heads=2, drop_path=0
)
TINY_RESNET = ResNet(18, width=4)
TINY_CONV = ConvNet(widths=(4, 8))


def contrast(kind="gpaco", **params):
    """A small contrast of two views, as a parameter."""
    return {"contrast": Contrast(kind, projection_dim=8, hidden=16, **params)}


CONTRAST = contrast()


def small(**params):
    """A classifier that trains in a fraction of a second."""
    settings = {
        "backbone": TINY_CONV,
        "max_epochs": 2,
        "batch_size": 16,
        "augment": "none",
        "precision": "float64",
        "random_state": 0,
    }
    return SPMixClassifier(**{**settings, **params})


def noise(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def watched(clf, X, y, look):
    """Fit, and call look(net, batch) at the start of each step."""

    class Spy(Callback):
        def on_batch_begin(self, net, batch=None, **kwargs):
            look(net, batch)

    return clf.set_params(callbacks=[Spy()]).fit(X, y)


def batches_of(clf, X, y):
    """The batches of a fit."""
    seen = []
    watched(clf, X, y, lambda net, batch: seen.append(batch))
    return seen


def marked(counts=(36, 16, 8), size=12):
    """Noise images whose first pixel tells their row, and their classes."""
    X, y = make_blobs(counts, size=size)
    X[:, :, 0, 0] = np.arange(len(X))[:, None]
    return X, y


def rows_of(clf, images):
    """Rows of marked images, from a batch as the network gets it."""
    corner = images[:, 0, 0, 0].numpy() * clf.pixel_std_[0] + clf.pixel_mean_[0]
    return np.rint(255 * corner).astype(int)


def pool_of(clf, batch):
    """Rows that `partners` points to: those of the batch, and those that came along."""
    rows = rows_of(clf, batch["images"])
    return np.concatenate([rows, rows_of(clf, batch["others"])]) if "others" in batch else rows


def assert_same_weights(one, two):
    assert one.weights_.keys() == two.weights_.keys()
    for name, value in one.weights_.items():
        np.testing.assert_array_equal(value, two.weights_[name], err_msg=name)


def differ(one, two):
    return any(not np.array_equal(v, two.weights_[k]) for k, v in one.weights_.items())


# ---------------------------------------------------------------- losses, one pair at a time


def explicit_gpaco(
    logits, u, y, y_candidates, log_prior, *, w_con=0.05, gamma=1.0, beta=1.0, weight=None
):
    costs = []
    for i, label in enumerate(y.tolist()):
        a = [float(s + p) for s, p in zip(logits[i], log_prior, strict=True)]
        others = [j for j in range(u.shape[1]) if j != i]
        positives = [j for j in others if y_candidates[j] == label]
        log_d = math.log(
            sum(math.exp(value) for value in a)
            + gamma * sum(math.exp(float(u[i, j])) for j in others)
        )
        total = beta * (a[label] - log_d)
        for j in positives:
            total += w_con * (float(u[i, j]) - log_d)
        cost = -total / (beta + w_con * len(positives))
        costs.append(cost if weight is None else cost * float(weight[label]))
    return sum(costs) / len(costs)


def explicit_supcon(u, y, y_candidates):
    costs = []
    for i, label in enumerate(y.tolist()):
        others = [j for j in range(u.shape[1]) if j != i]
        positives = [j for j in others if y_candidates[j] == label]
        if positives:
            log_sum = math.log(sum(math.exp(float(u[i, j])) for j in others))
            costs.append(sum(log_sum - float(u[i, j]) for j in positives) / len(positives))
    return sum(costs) / len(costs)


def contrast_problem(seed=0, n_anchors=6, n_others=9, n_classes=4):
    """Logits, similarities, classes of anchors and candidates, log-prior; class 3 is nowhere."""
    rng = np.random.default_rng(seed)
    n = n_anchors + n_others
    z = F.normalize(torch.from_numpy(rng.normal(size=(n, 5))))
    y = torch.from_numpy(rng.integers(0, n_classes - 1, n))
    prior = torch.from_numpy(rng.dirichlet(np.ones(n_classes)))
    logits = torch.from_numpy(rng.normal(size=(n_anchors, n_classes)))
    return logits, z[:n_anchors] @ z.T / 0.2, y[:n_anchors], y, prior.log()


CONSTANTS = [
    {},
    {"w_con": 0.0},
    {"gamma": 0.0},
    {"w_con": 1.0, "gamma": 0.3},
    {"w_con": 0.2, "gamma": 2.5, "beta": 0.4},
    {"w_con": 0.5, "beta": 3.0},
]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("constants", CONSTANTS, ids=str)
@pytest.mark.parametrize("n_others", [0, 9])
def test_gpaco_is_its_definition(constants, weighted, n_others):
    for seed in range(3):
        problem = contrast_problem(seed, n_others=n_others)
        weight = noise(4, seed=seed) + 0.1 if weighted else None
        expected = explicit_gpaco(*problem, **constants, weight=weight)
        found = gpaco_loss(*problem, **constants, weight=weight)
        assert found.item() == pytest.approx(expected, rel=1e-11)


def test_gpaco_has_the_published_constants_by_default():
    problem = contrast_problem()
    published = gpaco_loss(*problem, w_con=0.05, gamma=1.0, beta=1.0)
    assert gpaco_loss(*problem) == published


def test_gpaco_without_samples_is_balanced_softmax():
    logits, u, y, y_candidates, log_prior = contrast_problem()
    weight = noise(4) + 0.1
    options = {"w_con": 0.0, "gamma": 0.0}
    own = logit_adjusted(logits, log_prior).gather(1, y[:, None])[:, 0]
    found = gpaco_loss(logits, u, y, y_candidates, log_prior, **options)
    assert found.item() == pytest.approx(own.mean().item(), rel=1e-14)
    label_loss = LabelLoss(lambda z: logit_adjusted(z, log_prior), weight)
    expected = label_loss(logits, torch.eye(4, dtype=torch.float64)[y]).item()
    found = gpaco_loss(logits, u, y, y_candidates, log_prior, **options, weight=weight)
    assert found.item() == pytest.approx(expected, rel=1e-14)
    flat = torch.full((4,), 0.25, dtype=torch.float64).log()
    found = gpaco_loss(logits, u, y, y_candidates, flat, **options)
    assert found.item() == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-14)


@pytest.mark.parametrize("kind", ["gpaco", "supcon"])
def test_contrast_does_not_see_the_order_of_the_queue_or_of_the_batch(kind):
    logits, u, y, y_candidates, log_prior = contrast_problem()

    def loss(logits, u, y, y_candidates):
        if kind == "gpaco":
            return gpaco_loss(logits, u, y, y_candidates, log_prior, w_con=0.5).item()
        return supcon_with_memory(u, y, y_candidates).item()

    value = loss(logits, u, y, y_candidates)
    batch, queue = torch.tensor([3, 0, 5, 1, 4, 2]), torch.arange(6, 15).flip(0)
    order = torch.cat([torch.arange(6), queue])
    assert loss(logits, u[:, order], y, y_candidates[order]) == pytest.approx(value, rel=1e-13)
    order = torch.cat([batch, torch.arange(6, 15)])
    shuffled = logits[batch], u[batch][:, order], y[batch], y_candidates[order]
    assert loss(*shuffled) == pytest.approx(value, rel=1e-13)
    wrong = torch.roll(y_candidates, 1)
    wrong[:6] = y
    assert loss(logits, u, y, wrong) != pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("kind", ["gpaco", "supcon"])
def test_an_anchor_is_neither_its_own_positive_nor_its_own_negative(kind):
    logits, u, y, y_candidates, log_prior = contrast_problem()
    other = u.clone()
    other[range(6), range(6)] = torch.linspace(-30, 30, 6, dtype=torch.float64)
    values = [
        gpaco_loss(logits, s, y, y_candidates, log_prior)
        if kind == "gpaco"
        else supcon_with_memory(s, y, y_candidates)
        for s in (u, other)
    ]
    assert values[0] == values[1]


@pytest.mark.parametrize("kind", ["gpaco", "supcon"])
def test_contrast_pulls_positives_and_pushes_negatives(kind):
    logits, u, y, y_candidates, log_prior = contrast_problem()
    u = u.requires_grad_()
    if kind == "gpaco":
        gpaco_loss(logits, u, y, y_candidates, log_prior, w_con=1.0).backward()
    else:
        supcon_with_memory(u, y, y_candidates).backward()
    itself = torch.eye(6, 15, dtype=torch.bool)
    negative = y[:, None] != y_candidates
    assert (u.grad[itself] == 0).all()
    assert (u.grad[negative] > 0).all()
    for i in range(6):  # the farthest positive is pulled
        positives = u[i].detach().masked_fill(negative[i] | itself[i], torch.inf)
        assert u.grad[i, positives.argmin()] < 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_contrast_of_classes_without_positives_is_finite(dtype):
    logits = torch.zeros(3, 3, dtype=dtype, requires_grad=True)
    u = torch.tensor([[5.0, -5, 0], [0, 5, 5], [1, 2, 5]], dtype=dtype, requires_grad=True)
    y = torch.arange(3)
    prior = torch.full((3,), 1 / 3, dtype=dtype).log()
    found = gpaco_loss(logits, u, y, y, prior)
    expected = explicit_gpaco(logits.detach(), u.detach(), y, y, prior)
    assert found.item() == pytest.approx(expected, rel=1e-6)
    assert supcon_with_memory(u, y, y) == 0
    (found + supcon_with_memory(u, y, y)).backward()
    assert torch.isfinite(u.grad).all()
    # One image alone has no candidate at all.
    assert torch.isfinite(gpaco_loss(logits[:1], u[:1, :1], y[:1], y[:1], prior))
    assert supcon_with_memory(u[:1, :1], y[:1], y[:1]) == 0


def test_supcon_with_memory_is_its_definition():
    for seed in range(4):
        for n_others in (0, 9):
            _, u, y, y_candidates, _ = contrast_problem(seed, n_others=n_others)
            found = supcon_with_memory(u, y, y_candidates).item()
            assert found == pytest.approx(explicit_supcon(u, y, y_candidates), rel=1e-12)


def test_supcon_leaves_out_anchors_without_positives():
    _, u, y, y_candidates, _ = contrast_problem()
    y, y_candidates = y.clone(), y_candidates.clone()
    y[2] = y_candidates[2] = 3  # alone
    kept = [0, 1, 3, 4, 5]
    order = [*kept, *range(6, 15), 2]
    expected = supcon_with_memory(u[kept][:, order], y[kept], y_candidates[order])
    assert supcon_with_memory(u, y, y_candidates).item() == pytest.approx(expected.item())


def test_supcon_without_memory_is_the_metric_loss():
    for seed in range(4):
        rng = np.random.default_rng(seed)
        e = F.normalize(torch.from_numpy(rng.normal(size=(12, 4))))
        y = torch.from_numpy(rng.integers(0, 4, 12))
        found = supcon_with_memory(e @ e.T / 0.1, y, y)
        assert found.item() == pytest.approx(supcon(e, y, 0.1).item(), rel=1e-13)


# ---------------------------------------------------------------- contrast of two views


def network(backbone=TINY_CONV, layer="auto", shape=(3, 12, 12)):
    """Float64 network in evaluation mode."""
    torch.manual_seed(0)
    trunk = Trunk(backbone.build(shape), shape, autocast=None)
    return MixingNetwork(trunk, lambda n_features: nn.Linear(n_features, 3), layer).double().eval()


LOG_PRIOR = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
WEIGHT = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


def contrast_loss(net, kind="gpaco", *, key_momentum=None, queue_size=0, w_con=0.3, **params):
    torch.manual_seed(1)
    label_loss = LabelLoss(cross_entropy, WEIGHT)
    settings = Contrast(
        kind, weight=w_con, gamma=0.7, temperature=0.2, projection_dim=6, hidden=10,
        queue_size=queue_size, key_momentum=key_momentum, **params,
    )  # fmt: skip
    return ContrastLoss(net, settings, label_loss, LOG_PRIOR, n_images=60).double()


def output(n=5, seed=0, keys=None):
    """Features and logits of two views as leaves of the graph, and one-hot labels."""
    n_views = 2 if keys is None else 1
    features = noise(n_views * n, 8, seed=seed).requires_grad_()
    logits = noise(n_views * n, 3, seed=seed + 1).requires_grad_()
    y = torch.arange(n) % 3
    return MixedOutput(features, logits, keys or {}), torch.eye(3, dtype=torch.float64)[y]


@pytest.mark.parametrize("kind", ["gpaco", "supcon"])
@pytest.mark.parametrize("queue_size", [0, 7, 100])
def test_contrast_loss_is_its_definition_over_several_steps(kind, queue_size):
    loss = contrast_loss(network(), kind, queue_size=queue_size)
    twin = contrast_loss(network(), kind)
    memory = deque(maxlen=queue_size)
    for step in range(4):
        out, mass = output(seed=10 * step)
        found = loss(out, mass).item()
        h_q, h_k = out.features.detach().chunk(2)
        logits = out.logits.detach()
        q = F.normalize(twin.predictor(twin.projector(h_q)))
        k = F.normalize(twin.projector(h_k))
        y = mass.argmax(1)
        z = torch.cat([q, k, *[key[None] for key, _ in memory]]).detach()
        y_candidates = torch.cat([y, y, torch.tensor([label for _, label in memory]).long()])
        u, y_anchors = z[:10] @ z.T / 0.2, y.repeat(2)
        if kind == "gpaco":
            constants = {"w_con": 0.3, "gamma": 0.7, "weight": WEIGHT}
            expected = explicit_gpaco(logits, u, y_anchors, y_candidates, LOG_PRIOR, **constants)
        else:
            costs = F.cross_entropy(logits, y_anchors, reduction="none")
            label = (costs * WEIGHT[y_anchors]).mean().item()
            contrast = explicit_supcon(u, y_anchors, y_candidates)
            expected = label + 0.3 * contrast
            assert loss.terms["label"].item() == pytest.approx(label, rel=1e-10)
            assert loss.terms["contrast"].item() == pytest.approx(contrast, rel=1e-10)
        assert found == pytest.approx(expected, rel=1e-11)
        memory.extend(zip(k.detach(), y.tolist(), strict=True))
        assert loss.queue.filled().sum() == len(memory)


@pytest.mark.parametrize("kind", ["gpaco", "supcon"])
def test_both_views_get_gradients_and_key_logits_train_the_head(kind):
    # Published: no gradient through keys, and their anchors scored with the logits of the queries.
    out, mass = output()
    loss = contrast_loss(network(), kind)
    value = loss(out, mass)
    value.backward()
    for gradient in (*out.features.grad, *out.logits.grad):
        assert gradient.abs().max() > 1e-6
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.parameters())
    for part in (slice(5), slice(5, 10)):
        logits = out.logits.detach().clone()
        logits[part, 0] += 1
        assert loss(out._replace(logits=logits), mass).item() != pytest.approx(value.item())


@pytest.mark.parametrize("kind", ["gpaco", "supcon"])
def test_encoder_and_head_learn_from_the_key_view_alone(kind):
    net, images = network().train(), noise(10, 3, 12, 12)
    features = net.features(images)
    h_q, h_k = features.chunk(2)
    features = torch.cat([h_q.detach(), h_k])
    out = MixedOutput(features, torch.cat([net.head(h_q).detach(), net.head(h_k)]), {})
    contrast_loss(net, kind)(out, output()[1]).backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


def test_queue_holds_detached_keys_of_their_classes():
    loss = contrast_loss(network(), queue_size=8)
    out, mass = output()
    keys = F.normalize(copy.deepcopy(loss).projector(out.features[5:])).detach()
    loss(out, mass).backward()
    filled = loss.queue.filled()
    stored, labels = loss.queue.keys[filled], loss.queue.labels[filled]
    assert stored.grad_fn is None
    assert not stored.requires_grad
    torch.testing.assert_close(stored, keys)
    assert torch.equal(labels, mass.argmax(1))
    first = out.features.grad.clone()
    again, mass = output(seed=5)
    loss(again, mass).backward()  # the graph of the first step is gone
    assert torch.equal(out.features.grad, first)


def test_remembered_keys_attract_queries_of_their_class():
    out, mass = output()
    loss = contrast_loss(network(), queue_size=5)
    with torch.no_grad():
        queries = F.normalize(loss.predictor(loss.projector(out.features[:5])))
    values = []
    for keys in (queries, -queries):
        loss.queue.push(keys, mass.argmax(1))
        values.append(loss(out, mass).item())
    assert values[0] + 0.1 < values[1]


def test_places_of_the_queue_that_nothing_has_filled_have_no_influence(blobs):
    X, y = blobs
    X, y = X[:10], np.arange(10) % 2
    params = {"batch_size": 5, "max_epochs": 1}
    one, two, none = (
        small(**params, **contrast(weight=1.0, queue_size=size)).fit(X, y) for size in (10, 1000, 0)
    )
    assert_same_weights(one, two)
    assert one.history_[0]["train_loss"] == two.history_[0]["train_loss"]
    assert differ(one, none)
    assert two.net_.criterion_.queue.filled().sum() == 10


def test_auto_queue_holds_four_keys_an_image(blobs):
    clf = small(**CONTRAST, max_epochs=1).fit(*blobs)
    assert clf.net_.criterion_.queue.size == 240


# ---------------------------------------------------------------- key encoder


def test_only_queries_are_anchors_beside_a_key_encoder():
    net = network()
    loss = contrast_loss(net, key_momentum=0.9, queue_size=7)
    with torch.no_grad():  # elsewhere than the network, so that the two can be told apart
        for p in loss.key_encoder.parameters():
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype))
    images = noise(5, 3, 12, 12)
    out, mass = output(keys={"key_images": images})
    explicit, y = copy.deepcopy(loss), mass.argmax(1)
    value = loss(out, mass)
    q = F.normalize(explicit.predictor(explicit.projector(out.features.detach())))
    h_k = explicit.key_encoder["network"](images).features
    k = F.normalize(explicit.key_encoder["projector"](h_k))
    z = torch.cat([q, k]).detach()
    expected = explicit_gpaco(
        out.logits.detach(), z[:5] @ z.T / 0.2, y, y.repeat(2), LOG_PRIOR,
        w_con=0.3, gamma=0.7, weight=WEIGHT,
    )  # fmt: skip
    assert value.item() == pytest.approx(expected, rel=1e-11)
    value.backward()
    assert (out.features.grad.abs().amax(1) > 0).all()
    assert all(p.grad is None for p in loss.key_encoder.parameters())
    torch.testing.assert_close(loss.queue.keys[loss.queue.filled()], k.detach())
    assert not any(p.requires_grad for p in loss.key_encoder.parameters())


@pytest.mark.parametrize("layer", ["auto", None])
def test_key_view_is_mixed_with_the_same_partners(layer):
    net = network(layer=layer)
    views = noise(2, 6, 3, 12, 12)
    ratio, partners = noise(2, 2, *net.grid), torch.tensor([4, 0])
    out = net(views[0], ratio[0], partners, key_images=views[1], key_ratio=ratio[1])
    assert out.features.shape == (6, 8)
    keys = {name.removeprefix("key_"): value for name, value in out.keys.items()}
    torch.testing.assert_close(net(**keys).features, net(views[1], ratio[1], partners).features)
    assert not torch.allclose(net(**keys).features[:2], net(views[1]).features[:2])


@pytest.mark.parametrize("momentum", [0.0, 0.6, 1.0])
def test_key_encoder_is_the_running_mean_of_the_network(momentum, blobs):
    X, y = blobs
    queries, keys = [], []

    def snapshot(net):
        modules = {"network": net.module_, "projector": net.criterion_.projector}
        return {
            f"{part}.{name}": p.detach().clone()
            for part, module in modules.items()
            for name, p in module.named_parameters()
        }

    def look(net, batch):
        queries.append(snapshot(net))
        encoder = net.criterion_.key_encoder
        keys.append({name: p.detach().clone() for name, p in encoder.named_parameters()})

    clf = watched(small(**contrast(key_momentum=momentum), lr=0.05), X, y, look)
    assert keys[0].keys() == queries[0].keys()
    expected = queries[0]
    for q, k in zip(queries, keys, strict=True):
        expected = {name: momentum * expected[name] + (1 - momentum) * q[name] for name in q}
        for name, value in k.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-14)
    moved = [(keys[-1][n] - keys[0][n]).abs().max() > 1e-3 for n in keys[0]]
    assert any(moved) == (momentum < 1)

    encoder = clf.net_.criterion_.key_encoder
    trained = {id(p) for group in clf.net_.optimizer_.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in encoder.parameters()}
    assert {id(p) for p in clf.net_.criterion_.predictor.parameters()} <= trained
    assert all(p.grad is None for p in encoder.parameters())


def test_key_encoder_sees_the_second_view(blobs):
    params = {**contrast(key_momentum=0.9), "mix_prob": 1.0}
    clf = small(**params, augment=Augmentation(horizontal_flip=0.5))
    alike = []
    for batch, mass in batches_of(clf, *blobs):
        assert len(batch["ratio"]) == len(batch["key_ratio"]) == len(batch["partners"]) == 16
        assert len(mass) == len(batch["images"]) == 16
        for one, two in zip(batch["images"], batch["key_images"], strict=True):
            alike.append(torch.equal(one, two))
            assert alike[-1] or torch.equal(one.flip(2), two)
    assert 0.35 < np.mean(alike) < 0.65


# ---------------------------------------------------------------- the mix inside a network


def slow_mix(rows, ratio, partners, patch):
    """Rows of one view, the first ones mixed with others, pixel by pixel."""
    mixed = rows.clone()
    for i, j in enumerate(partners.tolist()):
        for place in np.ndindex(*rows.shape[2:]):
            r = ratio[(i, *[x // p for x, p in zip(place, patch, strict=True)])]
            at = (slice(None), *place)
            mixed[(i, *at)] = r * rows[(i, *at)] + (1 - r) * rows[(j, *at)]
    return mixed


def entering(module, call):
    """What enters a module during a call."""
    seen = []
    with module.register_forward_pre_hook(lambda _m, args: seen.append(args[0])):
        call()
    assert len(seen) == 1
    return seen[0]


@pytest.mark.parametrize("n_views", [1, 2])
@pytest.mark.parametrize(
    ("shape", "patch"),
    [((3, 28, 28), (2, 2)), ((1, 12, 20), (1, 1)), ((2, 43, 50), (3, 3)), ((1, 6, 9, 8), (1,) * 3)],
)
def test_images_are_mixed_pixel_by_pixel(shape, patch, n_views):
    net = network(layer=None, shape=shape)
    assert net.patch == patch
    assert net.grid == tuple(-(-s // p) for s, p in zip(shape[1:], patch, strict=True))
    images = noise(n_views * 5, *shape)
    ratio, partners = noise(n_views * 2, *net.grid), torch.tensor([3, 0])
    found = entering(net.trunk, lambda: net(images, ratio, partners))
    views = zip(images.chunk(n_views), ratio.chunk(n_views), strict=True)
    expected = torch.cat([slow_mix(x, r, partners, patch) for x, r in views])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_vectors_are_mixed_entry_by_entry():
    net = network(MLP((8,)), layer=None, shape=(5,))
    assert net.grid == (1, 5)
    rows, ratio, partners = noise(4, 5), noise(2, 1, 5), torch.tensor([2, 3])
    found = entering(net.trunk, lambda: net(rows, ratio, partners))
    r = ratio[:, 0]
    torch.testing.assert_close(found[:2], r * rows[:2] + (1 - r) * rows[2:])
    assert torch.equal(found[2:], rows[2:])


LAYERS = [
    (TINY_VIT, "patch_embed"),
    (TINY_VIT, "patch_embed.proj"),
    (TINY_HYBRID, "patch_embed"),
    (TINY_HYBRID, "patch_embed.resnet.layer1"),
    (TINY_RESNET, "layer1"),
    (TINY_RESNET, "layer2"),
    (TINY_CONV, "0"),
    (TINY_CONV, "1.0"),
]


@pytest.mark.parametrize("n_views", [1, 2])
@pytest.mark.parametrize(("backbone", "layer"), LAYERS, ids=str)
def test_what_a_layer_gives_is_mixed(backbone, layer, n_views):
    net = network(backbone, layer, shape=(3, 12, 20))
    images = noise(n_views * 4, 3, 12, 20)
    plain, seen = [], []
    module = net.trunk.backbone.get_submodule(layer)
    with module.register_forward_hook(lambda _m, _args, out: plain.append(out)):
        net(images)
    ratio, partners = noise(n_views * 3, *net.grid), torch.tensor([1, 3, 0])
    # The last hook sees what the rest of the network gets.
    mix = net.mix
    net.mix = lambda *args, **how: seen.append(mix(*args, **how)) or seen[-1]
    mixed = net(images, ratio, partners).features
    del net.mix
    views = zip(plain[0].chunk(n_views), ratio.chunk(n_views), strict=True)
    expected = []
    for x, r in views:
        share = r.flatten(1)[..., None] if x.ndim == 3 else r[:, None]
        first = share * x[:3] + (1 - share) * x[partners]
        expected += [first, x[3:]]
    torch.testing.assert_close(seen[0], torch.cat(expected), rtol=0, atol=1e-13)
    unmixed = net(images).features
    for view, before in zip(mixed.chunk(n_views), unmixed.chunk(n_views), strict=True):
        torch.testing.assert_close(view[3:], before[3:])
        assert ((view[:3] - before[:3]).abs().amax(1) > 1e-6).all()


def test_tokens_are_mixed_before_positions_and_class_token():
    net = network(TINY_VIT)
    vit = net.trunk.backbone
    with torch.no_grad():
        vit.pos_embed.normal_()
        vit.cls_token.normal_()
    images, ratio, partners = noise(4, 3, 12, 12), noise(2, 3, 3), torch.tensor([2, 0])
    embedded = vit.patch_embed(images)
    r = ratio.flatten(1)[..., None]
    tokens = torch.cat([r * embedded[:2] + (1 - r) * embedded[partners], embedded[2:]])
    expected = torch.cat([vit.cls_token.expand(4, -1, -1), tokens], 1) + vit.pos_embed
    found = entering(vit.drop, lambda: net(images, ratio, partners))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("backbone", "patch", "commutes"),
    [(TINY_VIT, 4, True), (TINY_HYBRID, 2, False), (TINY_CONV, 2, False)],
    ids=["vit", "hybrid", "conv"],
)
def test_mixing_tokens_is_mixing_images_where_the_embedding_is_linear(backbone, patch, commutes):
    net = network(backbone)
    assert net.grid == (12 // patch,) * 2
    images, ratio, partners = noise(4, 3, 12, 12), noise(2, *net.grid), torch.tensor([3, 0])
    inside = net(images, ratio, partners).features
    outside = net(slow_mix(images, ratio, partners, (patch, patch))).features
    if commutes:
        torch.testing.assert_close(inside, outside, rtol=0, atol=1e-12)
    else:
        assert (inside - outside)[:2].abs().amax(1).min() > 1e-4
        torch.testing.assert_close(inside[2:], outside[2:])


@pytest.mark.parametrize(
    ("backbone", "layer"), [(TINY_VIT, "auto"), (TINY_CONV, "auto"), (TINY_CONV, None)]
)
def test_mixing_with_oneself_changes_nothing(backbone, layer):
    net = network(backbone, layer)
    images, ratio = noise(3, 3, 12, 12), noise(6, *net.grid)
    rows = images.repeat(2, 1, 1, 1)  # each with its twin
    partners = torch.tensor([3, 4, 5, 0, 1, 2])
    torch.testing.assert_close(net(rows, ratio, partners).features, net(rows).features)
    module = nn.Identity() if layer is None else net.trunk.backbone.get_submodule(net.layer)
    out = module(rows)
    assert torch.equal(net.mix(out, ratio, partners, 6), out)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_extreme_shares_are_the_partner_and_the_base(share):
    net = network()
    images, partners = noise(4, 3, 12, 12), torch.tensor([3, 0, 1])
    ratio = torch.full((3, *net.grid), share, dtype=torch.float64)
    found, plain = net(images, ratio, partners).features, net(images).features
    expected = torch.cat([plain[:3] if share else plain[partners], plain[3:]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("backbone", "layer"),
    [(TINY_VIT, "auto"), (TINY_HYBRID, "auto"), (TINY_CONV, "auto"), (TINY_CONV, None)],
)
def test_gradients_reach_base_and_partner(backbone, layer):
    net = network(backbone, layer)
    images, partners = noise(5, 3, 12, 12).requires_grad_(), torch.tensor([3])
    ratio = noise(1, *net.grid)
    (gradient,) = torch.autograd.grad(net(images, ratio, partners).features[0, 0], images)
    reached = gradient.flatten(1).abs().amax(1) > 0
    assert reached.tolist() == [True, False, False, True, False]


@pytest.mark.parametrize("layer", ["auto", None])
def test_mixing_leaves_images_shares_and_network_as_they_were(layer):
    net = network(layer=layer)
    images, ratio, partners = noise(4, 3, 12, 12), noise(2, *net.grid), torch.tensor([3, 0])
    copies = images.clone(), ratio.clone(), partners.clone()
    plain = net(images).features
    net(images, ratio, partners)
    assert all(map(torch.equal, (images, ratio, partners), copies))
    assert torch.equal(net(images).features, plain)
    assert not any(module._forward_hooks for module in net.modules())


def test_the_hook_is_gone_after_an_error_too():
    net = network()
    images, ratio = noise(4, 3, 12, 12), noise(2, 5, 5)  # another grid
    with pytest.raises(ValueError, match="grid"):
        net(images, ratio, torch.tensor([3, 0]))
    assert not any(module._forward_hooks for module in net.modules())
    assert net(images).features.shape == (4, 8)


@pytest.mark.parametrize(
    ("backbone", "layer", "grid"),
    [
        (TINY_VIT, "patch_embed", (3, 3)),
        (TINY_HYBRID, "patch_embed", (6, 6)),
        (TINY_RESNET, "layer3", (3, 3)),
        (ConvNet(widths=(4, 4, 4, 4, 4)), "2", (6, 6)),
        (ConvNet(widths=(4, 4, 4)), "1", (6, 6)),
        (TINY_CONV, "0", (6, 6)),
        (ConvNet(widths=(4,)), "0", (12, 12)),
    ],
    ids=["vit", "hybrid", "resnet", "conv 5", "conv 3", "conv 2", "conv 1"],
)
def test_auto_takes_tokens_or_the_third_stage_but_not_the_last_block(backbone, layer, grid):
    assert default_layer(backbone.build((3, 12, 12))) == layer
    net = network(backbone)
    assert (net.layer, net.grid) == (layer, grid)


def test_volumes_are_mixed_on_a_grid_of_three_axes():
    vit = ViT(patch_size=(2, 4, 3), width=12, depth=1, n_heads=2, drop_path=0)
    net = network(vit, shape=(1, 8, 8, 9))
    assert net.grid == (4, 2, 3)
    images, ratio, partners = noise(4, 1, 8, 8, 9), noise(2, 4, 2, 3), torch.tensor([3, 0])
    outside = net(slow_mix(images, ratio, partners, (2, 4, 3))).features
    torch.testing.assert_close(net(images, ratio, partners).features, outside)


@pytest.mark.parametrize(
    ("backbone", "layer", "message"),
    [
        (TINY_CONV, "layer1", r"mix_layer='layer1' is no layer of Sequential, which has \['0'"),
        (TINY_VIT, "blocks.7", "mix_layer='blocks.7' is no layer"),
        (TINY_VIT, "blocks.0", r"mix_layer='blocks.0' gives \(1, 10, 12\), which is neither"),
        (MLP((8,)), "1", r"mix_layer='1' gives \(1, 8\), which is neither a map"),
        (MLP((8,)), "auto", 'mix_layer="auto" knows no layer of Sequential.* level="image"'),
    ],
)
def test_layers_that_cannot_be_mixed_get_a_clear_error(backbone, layer, message, blobs):
    clf = small(backbone=backbone, mix_layer=layer)
    with pytest.raises(ValueError, match=message):
        clf.fit(*blobs)
    assert not hasattr(clf, "net_")


def test_networks_without_a_layer_to_mix_at_mix_images(blobs):
    X, y = blobs
    clf = small(backbone=MLP((8,)), level="image", mix_prob=1.0).fit(X, y)
    assert differ(clf, small(backbone=MLP((8,)), level="image", mix_prob=0.0).fit(X, y))


# ---------------------------------------------------------------- partners and views


ISIC_2018 = np.array([1088, 6782, 483, 289, 1075, 70, 99])  # MEL NV BCC AKIEC BKL DF VASC


@pytest.mark.parametrize("size", [4, 16, 64])
@pytest.mark.parametrize("pairing", ["paper", "code"])
def test_classes_are_partners_as_often_as_published_whatever_the_batch(pairing, size):
    """A batch of 16 natural images hardly ever holds a rare class: then one is brought along."""
    y = np.repeat(np.arange(7), ISIC_2018)
    rng = np.random.default_rng(0)
    if pairing == "code":
        plan, share = shuffled(len(y), size, rng, 1), np.full(7, 1 / 7)
    else:
        plan, share = class_balanced(y, size, len(y) // size, rng), ISIC_2018 / len(y)
    drawn, pairs = Partners(np.arange(len(y)), y, share), []
    for picks in plan:
        partners, others = drawn.draw(picks, len(picks), rng)
        pairs.append((picks, np.concatenate([picks, others])[partners]))
    bases, partners = (np.concatenate(rows) for rows in zip(*pairs, strict=True))
    assert (bases != partners).all()
    # The class of the partner tells nothing of that of the base.
    for classes in (range(7), *([k] for k in range(7))):
        chosen = np.isin(y[bases], classes)
        spread = np.sqrt(share * (1 - share) / chosen.sum())
        found = np.bincount(y[partners[chosen]], minlength=7) / chosen.sum()
        # Partners of one batch that are the same image are not independent draws.
        assert (np.abs(found - share) < 5 * spread + 1 / chosen.sum()).all()
    rarest = np.bincount(partners[y[partners] == 5], minlength=len(y))[y == 5]
    assert (rarest > 0).all() or pairing == "paper"


def test_partners_come_from_the_batch_where_it_has_their_class():
    y = np.repeat([0, 1, 2], [40, 20, 6])
    picks = np.array([0, 1, 2, 50, 51])
    drawn, rng = Partners(np.arange(66), y, np.ones(3)), np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        partners, others = drawn.draw(picks, 5, rng)
        assert (y[others] == 2).all()
        assert sorted(partners[partners >= 5]) == list(range(5, 5 + len(others)))
        seen |= set(others.tolist())
    assert seen == set(range(60, 66))


def test_an_image_is_not_its_own_partner_however_often_it_was_repeated():
    rows, y = np.array([7, 3, 7, 5, 7, 9, 8]), np.array([1, 0, 1, 0, 1, 2, 1])
    rng = np.random.default_rng(0)
    drawn, partners_of = Partners(rows, y, np.ones(3)), {}
    for _ in range(300):
        picks = rng.permutation(6)  # all but the second image of class 1
        partners, others = drawn.draw(picks, 6, rng)
        found = rows[np.concatenate([picks, others])[partners]]
        assert (found != rows[picks]).all()
        for own, other in zip(rows[picks].tolist(), found.tolist(), strict=True):
            partners_of.setdefault(own, set()).add(other)
    assert partners_of == {7: {3, 5, 8, 9}, 3: {5, 7, 9}, 5: {3, 7, 9}, 9: {3, 5, 7}}


def test_only_the_first_rows_get_partners_and_the_draws_are_the_generator_s():
    drawn = Partners(np.arange(5), np.array([0, 0, 1, 1, 2]), np.ones(3))
    one, two, other = (
        [np.concatenate(drawn.draw(np.arange(4), 3, rng)) for _ in range(20)]
        for rng in (np.random.default_rng(seed) for seed in (0, 0, 1))
    )
    assert {len(drawn.draw(np.arange(4), 3, np.random.default_rng(0))[0])} == {3}
    assert all(map(np.array_equal, one, two))
    assert not all(map(np.array_equal, one, other))
    partners, others = drawn.draw(np.arange(5), 0, np.random.default_rng(0))
    assert len(partners) == len(others) == 0


def mixed_views(array, maps=None, *, y=None, seen=None, apart=False, mix_prob=1.0, **params):
    """Views of images, by default their own saliency maps; `seen` gets what the ratio is of."""
    n = len(array)

    def ratio(s_t, s_h):
        if seen is not None:
            seen.append((s_t, s_h))
        return (s_t + s_h) / 2

    return MixedViews(
        make_batches(array, **params),
        Partners(np.arange(n), np.arange(n) % 2 if y is None else y, np.ones(2)),
        torch.from_numpy(array[:, 0] if maps is None else maps),
        mix_prob=mix_prob,
        ratio=ratio,
        apart=apart,
    )


def gray(n=10, size=12):
    return np.random.default_rng(0).integers(0, 256, (n, 1, size, size), dtype=np.uint8)


def views_of(batch, n_views):
    """Of each view the images, the shares, and the images that `partners` points to."""
    views = []
    for i in range(n_views):
        if "key_images" in batch:
            part = {
                name: batch.get(("", "key_")[i] + name) for name in ("images", "ratio", "others")
            }
        else:
            names = {"images", "ratio", "others"} & set(batch)
            part = {name: batch[name].chunk(n_views)[i] for name in names}
        lending = [part["images"], part.get("others")]
        pool = torch.cat([images for images in lending if images is not None])
        views.append((part["images"], part["ratio"], pool))
    return views


GEOMETRY = {"horizontal_flip": 0.5, "vertical_flip": 0.5, "rotation": 40.0, "translate": 0.2}
TONES = {"brightness": 0.3, "contrast": 0.4, "gamma": 0.3, "blur": 1.0, "noise": 0.1, "cutout": 0.5}


@pytest.mark.parametrize(
    "params",
    [{}, {"horizontal_flip": 1.0}, {"horizontal_flip": 0.5, "vertical_flip": 0.5}, GEOMETRY],
    ids=["none", "flip", "flips", "warps"],
)
@pytest.mark.parametrize(("n_views", "apart"), [(1, False), (2, False), (2, True)])
def test_maps_move_with_their_images(params, n_views, apart):
    """The maps are the images, so that what the ratio is made of can be read from the batch."""
    array, seen, augment = gray(), [], Augmentation(**params)
    views = mixed_views(array, seen=seen, n_views=n_views, apart=apart, augment=augment)
    for batch, rows in views:
        parts = zip(views_of(batch, n_views), seen[-n_views:], strict=True)
        for (images, ratio, pool), (s_t, s_h) in parts:
            assert torch.equal(s_t, images[:, 0])
            assert torch.equal(s_h, pool[batch["partners"], 0])
            assert torch.equal(ratio, (s_t + s_h) / 2)
            plain = torch.from_numpy(array[rows.numpy()]).float() / 255
            assert torch.equal(images, plain) == (not params)


@pytest.mark.parametrize("apart", [False, True])
def test_every_view_is_augmented_afresh(apart):
    for batch, _ in mixed_views(gray(), n_views=2, apart=apart, augment=Augmentation(**GEOMETRY)):
        (one, *_), (two, *_) = views_of(batch, 2)
        assert ((one - two).flatten(1).abs().amax(1) > 0.05).all()


def test_colours_and_noise_leave_the_maps_alone():
    runs = []
    for params in (GEOMETRY, {**GEOMETRY, **TONES}):
        # The draws of an operation do not depend on the others.
        seen, one_batch = [], {"plan": lambda rng: [np.arange(6)]}
        augment = Augmentation(**params)
        ((batch, _),) = mixed_views(gray(6), seen=seen, augment=augment, **one_batch)
        runs.append((batch["images"][:, 0], *seen[0]))
    (plain, *maps), (toned, *toned_maps) = runs
    assert all(map(torch.equal, maps, toned_maps))
    assert ((plain - toned).flatten(1).abs().amax(1) > 0.02).all()


def test_coarse_maps_move_as_fine_images_do():
    array = np.kron(gray(10, 6), np.ones((1, 1, 2, 2), dtype=np.uint8))
    seen = []
    augment = Augmentation(horizontal_flip=0.5, vertical_flip=0.5)
    for batch, _ in mixed_views(array, array[:, 0, ::2, ::2], seen=seen, augment=augment):
        assert torch.equal(seen[-1][0], batch["images"][:, 0, ::2, ::2])


def test_images_and_maps_are_never_changed():
    array = gray()
    before, augment = array.copy(), Augmentation(**GEOMETRY, **TONES)
    views = mixed_views(array, augment=augment, n_views=2)
    maps = views.maps.clone()
    list(views)
    list(views)
    np.testing.assert_array_equal(array, before)
    assert torch.equal(views.maps, maps)


@pytest.mark.parametrize("mix_prob", [0.0, 0.1, 0.3, 0.5, 1.0])
def test_mix_prob_is_the_share_of_bases_on_average(mix_prob):
    views = mixed_views(gray(), mix_prob=mix_prob, plan=lambda rng: [np.arange(5)] * 2000)
    sizes, firsts = [], []
    for batch, rows in views:
        sizes.append(len(batch.get("partners", ())))
        assert len(batch["images"]) == len(rows) == 5
        assert len(batch.get("ratio", ())) == sizes[-1]
        assert sorted(rows.tolist()) == list(range(5))
        firsts += rows[: sizes[-1]].tolist()
    assert set(sizes) <= {math.floor(5 * mix_prob), math.ceil(5 * mix_prob)}
    assert np.mean(sizes) == pytest.approx(5 * mix_prob, abs=0.09)
    if 0 < mix_prob < 1:  # every image has its turn
        assert np.bincount(firsts, minlength=5).min() > 0.75 * 2000 * mix_prob


def test_an_image_alone_in_its_batch_is_mixed_with_one_that_comes_along():
    array, seen = gray(), []
    views = mixed_views(array, seen=seen, plan=lambda rng: [np.array([3])], n_views=2)
    for batch, rows in views:
        assert rows.tolist() == [3]
        assert batch["partners"].tolist() == [1]
        assert len(batch["images"]) == len(batch["others"]) == len(batch["ratio"]) == 2
        for other, (_, s_h) in zip(batch["others"], seen, strict=True):
            assert torch.equal(other, s_h)
            assert not torch.equal(other, batch["images"][0])


@pytest.mark.parametrize("apart", [False, True])
def test_images_that_come_along_are_moved_as_their_maps_and_only_lend(apart):
    array, y, seen = gray(12), np.array([0] * 10 + [1] * 2), []
    plan = lambda rng: [np.arange(5)] * 4  # noqa: E731
    augment = Augmentation(**GEOMETRY)
    views = mixed_views(array, y=y, seen=seen, plan=plan, n_views=2, apart=apart, augment=augment)
    for batch, rows in views:
        assert sorted(rows.tolist()) == list(range(5))
        for (images, _, pool), (_, s_h) in zip(views_of(batch, 2), seen[-2:], strict=True):
            assert len(images) == 5 < len(pool)
            assert torch.equal(pool[batch["partners"], 0], s_h)


@pytest.mark.parametrize("n_views", [1, 2])
@pytest.mark.parametrize(
    ("backbone", "layer"), [(TINY_VIT, "auto"), (TINY_CONV, "auto"), (TINY_CONV, None)]
)
def test_partners_from_outside_the_batch_are_mixed_in_and_end_there(backbone, layer, n_views):
    net = network(backbone, layer)
    views = noise(n_views, 6, 3, 12, 12)  # four images, and two that only lend
    images, others = (part.flatten(0, 1) for part in (views[:, :4], views[:, 4:]))
    ratio, partners = noise(n_views * 3, *net.grid), torch.tensor([5, 2, 4])
    found = net(images, ratio, partners, others).features
    assert len(found) == n_views * 4
    inside = net(views.flatten(0, 1), ratio, partners).features  # the same, all in the batch
    expected = torch.cat([view[:4] for view in inside.chunk(n_views)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_targets_are_the_bases_and_classes_decide_on_partners():
    array, y = gray(12), np.array([0] * 11 + [1])
    views = mixed_views(array, y=y, plan=lambda rng: [np.arange(12)] * 50)
    rare = []
    for batch, rows in views:
        assert torch.equal(batch["images"], torch.from_numpy(array[rows.numpy()]).float() / 255)
        rare += (y[rows.numpy()][batch["partners"].numpy()] == 1).tolist()
    assert 0.42 < np.mean(rare) < 0.55  # half of the partners, but its own


# ---------------------------------------------------------------- pairing in a fit


@pytest.mark.parametrize("pairing", ["paper", "code"])
def test_pairing_decides_on_bases_and_partners(pairing):
    X, y = marked()
    clf = small(pairing=pairing, mix_prob=1.0, max_epochs=10, device="cpu")
    bases, partners = [], []
    for batch, mass in batches_of(clf, X, y):
        rows = rows_of(clf, batch["images"])
        np.testing.assert_array_equal(mass.numpy(), np.eye(3)[y[rows]])  # no label is mixed
        bases.append(np.bincount(y[rows], minlength=3))
        partners += y[pool_of(clf, batch)[batch["partners"].numpy()]].tolist()
    shares = np.bincount(partners) / len(partners)
    if pairing == "paper":
        assert {tuple(sorted(counts)) for counts in bases} == {(5, 5, 6)}
        np.testing.assert_allclose(shares, [0.6, 16 / 60, 8 / 60], atol=0.06)
        np.testing.assert_allclose(clf.class_prior_, 1 / 3)
    else:
        np.testing.assert_array_equal(np.sum(bases, axis=0), [360, 160, 80])
        np.testing.assert_allclose(shares, 1 / 3, atol=0.07)
        np.testing.assert_allclose(clf.class_prior_, [0.6, 16 / 60, 8 / 60])


@pytest.mark.parametrize(
    "params",
    [
        {},
        pytest.param({"pairing": "code", "sampler": RandomOverSampler(random_state=0)}),
    ],
    ids=["rare", "copied"],
)
def test_a_partner_is_another_image(params):
    X, y = marked((20, 2))
    clf = small(**params, mix_prob=1.0, max_epochs=20, device="cpu")
    for batch, _ in batches_of(clf, X, y):
        rows, pool = rows_of(clf, batch["images"]), pool_of(clf, batch)
        assert (pool[batch["partners"].numpy()] != rows).all()


def test_class_frequencies_in_the_loss_are_those_of_the_bases(blobs):
    X, y = blobs
    flat = [small(loss=loss).fit(X, y) for loss in ("cross_entropy", "balanced_softmax")]
    for name, value in flat[0].weights_.items():
        np.testing.assert_allclose(value, flat[1].weights_[name], rtol=0, atol=1e-7)
    natural = [
        small(loss=loss, pairing="code").fit(X, y) for loss in ("cross_entropy", "balanced_softmax")
    ]
    assert np.abs(natural[0].weights_["head.bias"] - natural[1].weights_["head.bias"]).max() > 1e-4
    weighted = small(class_weight="balanced").fit(X, y)
    assert_same_weights(weighted, flat[0])
    assert differ(small(class_weight="balanced", pairing="code").fit(X, y), natural[0])


@pytest.mark.parametrize("pairing", ["paper", "code"])
def test_class_centres_are_corrected_by_the_frequencies_of_the_bases(pairing, blobs):
    clf = small(**CONTRAST, pairing=pairing, max_epochs=1, device="cpu").fit(*blobs)
    prior = [1 / 3] * 3 if pairing == "paper" else [0.6, 16 / 60, 8 / 60]
    np.testing.assert_allclose(clf.net_.criterion_.log_prior.exp(), prior)
    np.testing.assert_allclose(clf.class_prior_, prior)


@pytest.mark.parametrize("params", [{"pairing": "code"}, {"batch_size": 2}], ids=str)
def test_the_estimate_of_memory_counts_what_may_come_along(params, blobs):
    encoded, estimate = [], []

    def look(net, batch):
        images = batch[0]
        encoded.append(len(images["images"]) + len(images.get("others", ())))
        estimate.append(clf._images_per_step(60))

    clf = small(**{"batch_size": 8, "mix_prob": 1.0, "max_epochs": 4, **params})
    watched(clf, *blobs, look)
    assert clf.batch_size < max(encoded) <= estimate[0] == 2 * clf.batch_size


# ---------------------------------------------------------------- saliency in a fit


def test_ratio_of_a_batch_is_that_of_its_images():
    X, y = marked()
    clf = small(mix_prob=1.0, floor=0.2, cap=0.9, device="cpu")
    batches = batches_of(clf, X, y)
    grid = clf.net_.module_.grid
    maps = pooled(fine_grained(torch.from_numpy(X).double() / 255), grid)
    assert grid == (6, 6)
    for batch, _ in batches:
        rows = rows_of(clf, batch["images"])
        s_t, s_h = maps[rows], maps[pool_of(clf, batch)[batch["partners"].numpy()]]
        expected = spmix_ratio(s_t, s_h, floor=0.2, cap=0.9)
        torch.testing.assert_close(batch["ratio"], expected, rtol=0, atol=0.01)  # maps are uint8


def slow_ratio(s_t, s_h, cell, *, cap, floor, merge, partner_saliency):
    """Cell by cell, of maps whose sides the cells divide."""

    def cells(maps):
        n, height, width = maps.shape
        return maps.reshape(n, height // cell, cell, width // cell, cell).mean((2, 4))

    def stretched(maps):
        low, high = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
        return (maps - low) / (high - low)

    both = [s_t, s_h] if partner_saliency else [s_t, s_t]
    if merge == "patch":
        a, b = (floor + (1 - floor) * stretched(cells(maps)) for maps in both)
        return np.minimum(cap, np.maximum(a, b))
    a, b = (floor + (1 - floor) * maps for maps in both)
    return cells(np.minimum(cap, np.maximum(a, b)))


@pytest.mark.parametrize("merge", ["patch", "pixel"])
@pytest.mark.parametrize("partner_saliency", [True, False])
@pytest.mark.parametrize(("cap", "floor"), [(0.8, None), (0.6, 0.3), (1.0, 0.0)])
def test_options_of_the_ratio(merge, partner_saliency, cap, floor):
    clf = small(merge=merge, partner_saliency=partner_saliency, cap=cap, floor=floor)
    s_t, s_h = noise(3, 12, 12), noise(3, 12, 12, seed=1)
    if floor is None:
        floor = 0.5 if merge == "patch" else 0.0
    expected = slow_ratio(
        s_t.numpy(), s_h.numpy(), 2,
        cap=cap, floor=floor, merge=merge, partner_saliency=partner_saliency,
    )  # fmt: skip
    np.testing.assert_allclose(clf._ratio(s_t, s_h, (6, 6)), expected, atol=1e-14)


def test_maps_are_computed_once_for_each_image():
    X, y = make_blobs()
    n_seen, calls = [], []

    def detector(images):
        n_seen.append(len(images))
        calls.append(images.clone())
        return images[:, 0]

    clf = small(saliency=detector, mix_prob=1.0, max_epochs=3, early_stopping=True)
    clf.fit(X, y)
    n_train = sum(n_seen)
    assert n_train == 60 - 12  # of the training rows
    assert calls[0].dtype == torch.float64
    clf.predict(X)
    clf.transform(X)
    assert sum(n_seen) == n_train


def test_a_given_detector_decides_on_the_share():
    X, y = make_blobs()

    def left_half(images):
        maps = torch.zeros_like(images[:, 0])
        maps[..., :6] = 1
        return maps

    for batch, _ in batches_of(small(saliency=left_half, mix_prob=1.0, device="cpu"), X, y):
        expected = torch.tensor([0.8] * 3 + [0.5] * 3).double().expand(16, 6, 6)
        torch.testing.assert_close(batch["ratio"], expected)


@pytest.mark.parametrize(
    ("augment", "expected"),
    [
        (Augmentation(horizontal_flip=1.0), lambda ratio: ratio.flip(2)),
        (Augmentation(vertical_flip=1.0), lambda ratio: ratio.flip(1)),
        (Augmentation(**{**TONES, "noise": 0.0}), lambda ratio: ratio),
    ],
    ids=["left-right", "up-down", "colours"],
)
@pytest.mark.parametrize("merge", ["patch", "pixel"])
def test_shares_flip_with_the_images_and_ignore_colours(augment, expected, merge, blobs):
    plain = batches_of(small(merge=merge, mix_prob=1.0), *blobs)
    moved = batches_of(small(merge=merge, mix_prob=1.0, augment=augment), *blobs)
    for (one, _), (two, _) in zip(plain, moved, strict=True):
        assert torch.equal(one["partners"], two["partners"])
        torch.testing.assert_close(two["ratio"], expected(one["ratio"]), rtol=0, atol=1e-12)
        assert not torch.allclose(one["images"], two["images"])


def test_polarity_and_mask_reach_the_detector():
    data = make_lesions([10, 10], image_size=32, random_state=0)
    X = data.images.copy()
    X[:, :, :6] = 0  # a black border
    maps = {}
    for params in ({"polarity": "dark"}, {"polarity": "bright"}, {"mask": "auto"}, {}):
        clf = small(saliency=SaliencyMap(**params), max_epochs=1).fit(X, data.target)
        train = TrainingSet(clf._read(X), np.arange(20), data.target)
        maps[str(params)] = clf._maps(train, (16, 16)).double() / 255
    dark, bright, masked, plain = maps.values()
    lesion = torch.from_numpy(data.masks)
    assert dark[lesion].mean() > bright[lesion].mean() + 0.1
    assert masked[:, :, :5].max() == 0
    assert plain[:, :, :6].max() > 0.1


@pytest.mark.parametrize("backbone", [TINY_CONV, TINY_VIT, TINY_RESNET], ids=str)
@pytest.mark.parametrize("merge", ["patch", "pixel"])
def test_maps_are_kept_no_finer_than_the_mix_can_use(backbone, merge, blobs):
    X, y = blobs
    clf = small(backbone=backbone, merge=merge, max_epochs=1, device="cpu").fit(X, y)
    grid = clf.net_.module_.grid
    maps = clf._maps(TrainingSet(clf._read(X), np.arange(60), y), grid)
    assert maps.dtype == torch.uint8
    fine = 12 if merge == "pixel" else min(12, 2 * grid[0])
    assert maps.shape == (60, fine, fine)
    whole = fine_grained(torch.from_numpy(X).double() / 255)
    torch.testing.assert_close(maps / 255.0, pooled(whole, (fine, fine)).float(), rtol=0, atol=0.03)


@pytest.mark.parametrize("layer", ["layer1", "layer2", "layer3"])
def test_shares_have_the_grid_of_the_stage(layer, blobs):
    clf = small(backbone=TINY_RESNET, mix_layer=layer, max_epochs=1, mix_prob=1.0)
    shapes = {tuple(batch["ratio"].shape) for batch, _ in batches_of(clf, *blobs)}
    side = {"layer1": 12, "layer2": 6, "layer3": 3}[layer]
    assert shapes == {(16, side, side)}


def test_lesions_prevail_over_background():
    data = make_lesions([20, 20], image_size=32, difficulty=0.3, random_state=0)
    clf = small(saliency=SaliencyMap(polarity="dark"), max_epochs=1, device="cpu").fit(
        data.images, data.target
    )
    grid = clf.net_.module_.grid
    maps = clf._maps(TrainingSet(clf._read(data.images), np.arange(40), data.target), grid)
    base, partner = np.flatnonzero(data.target == 1), np.flatnonzero(data.target == 0)
    ratio = clf._ratio(maps[base] / 255, maps[partner] / 255, grid).numpy()
    covered = data.masks.reshape(40, 16, 2, 16, 2).mean((2, 4))
    own, other = covered[base], covered[partner]
    background = ratio[(own < 0.1) & (other < 0.1)].mean()
    assert ratio[own > 0.9].mean() >= background + 0.05
    assert ratio[(own < 0.1) & (other > 0.9)].mean() >= background + 0.05


# ---------------------------------------------------------------- estimator


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"loss": "balanced_softmax", "augment": "strong"},
        {"loss": "ldam", "augment": "medical", "precision": "float32"},
        {"loss": "focal", "class_weight": "balanced", "level": "image"},
        {"loss": "class_balanced", "early_stopping": True, "backbone": TINY_VIT},
    ],
    ids=str,
)
def test_without_mixing_it_is_the_softmax_classifier(params, blobs):
    X, y = blobs

    def never(images):
        raise AssertionError("no map is needed")

    plain = {k: v for k, v in small(**params).get_params(deep=False).items() if k != "level"}
    known = SoftmaxClassifier().get_params(deep=False)
    baseline = SoftmaxClassifier(**{k: v for k, v in plain.items() if k in known}).fit(X, y)
    clf = small(**params, pairing="code", mix_prob=0.0, saliency=never).fit(X, y)
    assert_same_weights(clf, baseline)
    np.testing.assert_array_equal(clf.predict_proba(X), baseline.predict_proba(X))
    assert differ(small(**params, pairing="code", mix_prob=1.0).fit(X, y), baseline)


@pytest.mark.parametrize("params", [{}, CONTRAST, contrast(key_momentum=0.9)], ids=str)
def test_predictions_do_not_depend_on_the_company(params, blobs, monkeypatch):
    X, y = blobs
    clf = small(**params, mix_prob=1.0).fit(X, y)

    def never(*args, **kwargs):
        raise AssertionError("saliency at predict")

    monkeypatch.setattr("sklearn_medimb.methods._spmix.saliency_maps", never)
    monkeypatch.setattr(MixingNetwork, "mix", never)
    proba = clf.predict_proba(X)
    np.testing.assert_array_equal(clf.predict_proba(X), proba)
    for i in range(3):
        np.testing.assert_allclose(clf.predict_proba(X[i : i + 1])[0], proba[i], atol=1e-12)
    order = np.random.default_rng(0).permutation(60)
    np.testing.assert_allclose(clf.predict_proba(X[order]), proba[order], atol=1e-12)
    again = pickle.loads(pickle.dumps(clf.set_params(callbacks=None)))
    np.testing.assert_array_equal(again.predict_proba(X), proba)


def test_clones_fit_alike_and_labels_may_be_texts(blobs):
    X, y = blobs
    names = np.array(["nevus", "melanoma", "keratosis"])[y]
    clf = small(**CONTRAST, augment="strong").fit(X, names)
    assert_same_weights(clone(clf).fit(X, names), clf)
    assert differ(clone(clf).set_params(random_state=1).fit(X, names), clf)
    assert set(clf.predict(X)) <= set(names)


def test_contrast_leaves_nothing_behind(blobs):
    X, y = blobs
    clf = small(**contrast(key_momentum=0.9)).fit(X, y)
    plain = small().fit(X, y)
    assert clf.weights_.keys() == plain.weights_.keys()
    assert [v.shape for v in clf.weights_.values()] == [v.shape for v in plain.weights_.values()]


def test_history_tells_labels_and_contrast_apart(blobs):
    clf = small(**contrast("supcon", weight=0.7)).fit(*blobs)
    for row in clf.history_:
        total = row["train_label"] + 0.7 * row["train_contrast"]
        assert row["train_loss"] == pytest.approx(total)
        assert row["train_contrast"] > 0


def test_supcon_keeps_the_label_loss(blobs):
    X, y = blobs
    params = contrast("supcon")
    clf = small(**params, loss="ldam").fit(X, y)
    assert "head.bias" not in clf.weights_  # cosines
    one, two = (small(**params, loss=loss).fit(X, y) for loss in ("focal", "cross_entropy"))
    assert differ(one, two)


def test_every_constant_of_the_contrast_matters(blobs):
    X, y = blobs
    base = small(**CONTRAST).fit(X, y)
    for params in ({"weight": 1.0}, {"gamma": 0.1}, {"temperature": 1.0}, {"queue_size": 3}):
        assert differ(small(**contrast(**params)).fit(X, y), base), params
    criterion = base.net_.criterion_
    assert criterion.projector[0].weight.shape == (16, 8)
    assert criterion.queue.keys.shape[1] == 8


@pytest.mark.parametrize("kind", [None, "supcon", "gpaco"])
def test_training_learns(kind, blobs):
    X, y = blobs
    params = {"backbone": ConvNet(widths=(8, 16)), "lr": 2e-2}
    params |= {} if kind is None else contrast(kind)
    # The samples in the softmax of GPaCo leave little to the class centres at first.
    clf = small(**params, max_epochs=30 if kind == "gpaco" else 10).fit(X, y)
    assert clf.score(X, y) > 0.9


def test_tailboost_is_a_preset():
    clf = SPMixClassifier.tailboost()
    assert isinstance(clf.backbone, HybridViT)
    assert (clf.pairing, clf.mix_prob) == ("code", 1.0)
    how = clf.contrast
    assert (how.kind, how.weight, how.gamma, how.temperature) == ("gpaco", 0.05, 1.0, 0.2)
    assert (how.projection_dim, how.hidden) == (256, 4096)
    assert (clf.backbone.width, clf.backbone.depth, clf.backbone.resnet_depth) == (768, 8, 50)
    assert (clf.lr, clf.weight_decay, clf.max_epochs, clf.batch_size) == (5e-6, 0.1, 500, 16)
    assert clone(clf).get_params()["contrast__kind"] == "gpaco"
    assert SPMixClassifier.tailboost(mix_prob=0.3, lr=1e-3).get_params()["mix_prob"] == 0.3


def test_a_small_tailboost_trains(blobs):
    X, y = blobs
    clf = SPMixClassifier.tailboost(
        backbone=TINY_HYBRID, batch_size=8, max_epochs=1, lr=1e-3,
        **CONTRAST, random_state=0,
    )  # fmt: skip
    start = []
    watched(clf, X, y, lambda net, _: start or start.append(copy.deepcopy(net.module_)))
    assert clf.net_.module_.layer == "patch_embed"
    assert all(row["train_loss"] > 0 for row in clf.history_)
    before = dict(start[0].named_parameters())
    for name, value in clf.net_.module_.named_parameters():
        assert not torch.equal(value, before[name]), name
    np.testing.assert_allclose(clf.predict_proba(X).sum(1), 1)


@pytest.mark.parametrize(
    "params",
    [
        {},
        contrast(queue_size=50),
        contrast(queue_size=500, key_momentum=0.7),
        {**contrast("supcon"), "early_stopping": True},
    ],
    ids=["plain", "gpaco", "keys", "supcon"],
)
def test_a_resumed_fit_equals_an_undisturbed_one(params, blobs, tmp_path):
    X, y = blobs
    params = {**params, "max_epochs": 4, "augment": "strong", "precision": "float32"}
    whole = small(**params).fit(X, y)
    with pytest.raises(RuntimeError, match="power cut"):
        small(**params, checkpoint_dir=tmp_path, callbacks=[CrashAfter(2)]).fit(X, y)
    resumed = small(**params, checkpoint_dir=tmp_path).fit(X, y)
    assert_same_weights(resumed, whole)
    assert [r["train_loss"] for r in resumed.history_] == [r["train_loss"] for r in whole.history_]
    one, two = (clf.net_.criterion_.state_dict() for clf in (resumed, whole))
    assert one.keys() == two.keys()
    for name, value in one.items():
        same = torch.equal(value, two[name]) if torch.is_tensor(value) else value == two[name]
        assert same, name
    if "queue_size" in params:
        assert resumed.net_.criterion_.queue.n_seen == 4 * 64


def test_warm_start_goes_on_with_mixing(blobs):
    """With the weights, the projector, and the keys in the queue."""
    X, y = blobs
    starts = []

    class Look(Callback):
        def on_train_begin(self, net, **kwargs):
            starts.append(copy.deepcopy((net.criterion_.state_dict(), net.module_.state_dict())))

    params = {"warm_start": True, "callbacks": [Look()], "device": "cpu"}
    clf = small(**contrast(key_momentum=0.9), **params).fit(X, y)
    learned, weights = copy.deepcopy((clf.net_.criterion_.state_dict(), clf._network_weights()))
    clf.fit(X, y)
    assert clf.n_iter_ == 4
    assert starts[1][0]["queue.n_seen"] == learned["queue.n_seen"] > 0
    for name in ("queue.keys", "projector.0.weight", "predictor.0.weight"):
        torch.testing.assert_close(starts[1][0][name], learned[name], rtol=0, atol=1e-6)
    for name, weight in weights.items():
        np.testing.assert_array_equal(starts[1][1][name].numpy(), weight)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"contrast": "gpaco", "loss": "focal"}, "takes the place of loss='focal'"),
        ({"contrast": "gpaco", "loss": "ldam"}, 'choose contrast="supcon"'),
        ({"compile": True}, 'compile=True .* level="image"'),
        ({"contrast": "moco"}, "'contrast' parameter"),
        ({"pairing": "natural"}, "'pairing' parameter"),
        ({"mix_prob": 1.5}, "'mix_prob' parameter"),
        ({"cap": -0.1}, "'cap' parameter"),
        (contrast(temperature=0.0), "'temperature' parameter"),
        (contrast(queue_size=-1), "'queue_size' parameter"),
        (contrast(key_momentum=1.5), "'key_momentum' parameter"),
        ({"saliency": "canny"}, "'saliency' parameter"),
        ({"saliency": lambda images: images}, "saliency"),
        ({"mix_layer": None}, "'mix_layer' parameter"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_wrong_parameters_get_a_clear_error(params, message, blobs):
    clf = small(**params)
    with pytest.raises(ValueError, match=message):
        clf.fit(*blobs)
    assert not hasattr(clf, "net_")


@pytest.mark.parametrize("params", [{"level": "image"}, {"mix_prob": 0.0}], ids=str)
def test_networks_without_a_mix_inside_may_be_compiled(params):
    small(compile=True, **params)._check_parameters()


def test_there_are_no_sample_weights(blobs):
    with pytest.raises(TypeError, match="sample_weight"):
        small().fit(*blobs, sample_weight=np.ones(60))


@pytest.mark.parametrize("params", [{"batch_size": 1}, {"batch_size": 2, "pairing": "code"}])
def test_a_batch_of_one_image_can_be_contrasted(params, blobs):
    X = blobs[0]
    clf = small(**CONTRAST, **params, max_epochs=1).fit(X[:5], [0, 1, 0, 1, 0])
    assert np.isfinite(clf.predict_proba(X)).all()


def test_key_encoder_starts_from_the_pretrained_network(blobs):
    gaps = []

    def look(net, batch):
        keys = getattr(net.criterion_, "key_encoder", None)
        if keys is not None and not gaps:
            pairs = zip(keys["network"].parameters(), net.module_.parameters(), strict=True)
            gaps.append(max((k - q).abs().max().item() for k, q in pairs))

    encoder = SSLEncoder(max_epochs=1, batch_size=16, lr=0.05)
    watched(small(**contrast(key_momentum=0.99), pretrain=encoder, max_epochs=1), *blobs, look)
    assert gaps == [0.0]
