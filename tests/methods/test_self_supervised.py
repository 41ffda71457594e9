"""SSLEncoder: six losses against explicit formulas, targets, queue, and training."""

from __future__ import annotations

import math
import pickle
from itertools import product

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch.nn.functional import normalize

from sklearn_medimb import SSLEncoder
from sklearn_medimb._training.objectives import EncodedViews, encode
from sklearn_medimb.augment import Augmentation
from sklearn_medimb.methods._self_supervised import (
    METHODS,
    BarlowTwins,
    MoCo,
    SimCLR,
    VICReg,
    barlow_twins,
    negative_cosine,
    nt_xent,
    vicreg,
)
from tests.helpers import (
    SMALL,
    Add,
    CrashAfter,
    EpochsRun,
    Starts,
    all_equal,
    backbone_state,
    make_blobs,
    same_arrays,
    small_network,
    snapshot,
    two_views,
    values,
)

EACH = pytest.mark.parametrize("method", sorted(METHODS))
SHAPES = pytest.mark.parametrize("shape", [(2, 3), (5, 3), (4, 7)])


@pytest.fixture(scope="module")
def data():
    return make_blobs()


def fitted(method, X, y=None, **params):
    return SSLEncoder(method, **{**SMALL, "projection_dim": 16, **params}).fit(X, y)


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


# ---------------------------------------------------------------- losses


@SHAPES
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_nt_xent_equals_explicit_loop(shape, temperature):
    z1, z2 = two_views(shape)
    z, n, total = torch.cat([z1, z2]), len(z1), 0.0
    for i in range(2 * n):
        terms = {
            j: math.exp(cosine(z[i], z[j]) / temperature) for j in range(2 * n) if j != i
        }  # all but itself
        total -= math.log(terms[(i + n) % (2 * n)] / sum(terms.values())) / (2 * n)
    assert nt_xent(z1, z2, temperature).item() == pytest.approx(total, rel=1e-12)


def test_nt_xent_of_rows_that_are_all_alike_is_that_of_a_guess():
    z = torch.ones(4, 3, dtype=torch.float64)
    assert nt_xent(z, 2 * z, 0.2).item() == pytest.approx(math.log(7))
    apart = torch.eye(4, dtype=torch.float64)
    assert nt_xent(apart, apart, 0.01).item() == pytest.approx(0, abs=1e-12)


def test_negative_cosine_equals_explicit_loop_and_spares_targets():
    p, z = (view.clone().requires_grad_() for view in two_views((5, 3)))
    value = negative_cosine(p, z)
    expected = -sum(cosine(a, b) for a, b in zip(p.detach(), z.detach(), strict=True)) / 5
    assert value.item() == pytest.approx(expected, rel=1e-12)
    value.backward()
    assert p.grad.abs().sum() > 0
    assert z.grad is None


@SHAPES
def test_barlow_twins_equals_explicit_loop(shape):
    z1, z2 = two_views(shape)
    n, d = shape

    def standardised(z):
        columns = z.T.tolist()
        means = [sum(column) / n for column in columns]
        stds = [
            math.sqrt(sum((v - m) ** 2 for v in column) / n + 1e-5)
            for column, m in zip(columns, means, strict=True)
        ]
        return [
            [(v - m) / s for v in column] for column, m, s in zip(columns, means, stds, strict=True)
        ]

    a, b, total = standardised(z1), standardised(z2), 0.0
    for i, j in product(range(d), repeat=2):
        c = sum(u * v for u, v in zip(a[i], b[j], strict=True)) / n
        total += (1 - c) ** 2 if i == j else 0.25 * c**2
    assert barlow_twins(z1, z2, 0.25).item() == pytest.approx(total, rel=1e-9)


@SHAPES
def test_vicreg_equals_explicit_loop(shape):
    z1, z2 = two_views(shape, scale=0.7)
    n, d = shape
    invariance = sum(float(a - b) ** 2 for a, b in zip(z1.ravel(), z2.ravel(), strict=True))
    variance = covariance = 0.0
    for z in (z1, z2):
        C = np.cov(z.numpy(), rowvar=False)
        variance += sum(max(0, 1 - math.sqrt(C[j, j] + 1e-4)) for j in range(d)) / d / 2
        covariance += sum(C[i, j] ** 2 for i, j in product(range(d), repeat=2) if i != j) / d
    expected = 2 * invariance / (n * d) + 3 * variance + 5 * covariance
    assert vicreg(z1, z2, 2, 3, 5).item() == pytest.approx(expected, rel=1e-9)
    assert variance > 0


def test_decorrelating_losses_are_lowest_for_equal_and_uncorrelated_views():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    z = torch.linalg.qr(z - z.mean(dim=0))[0] * math.sqrt(49)  # no covariance, variance 1
    z = z - z.mean(dim=0)
    assert barlow_twins(z, z).item() == pytest.approx(0, abs=1e-6)
    assert vicreg(z, z).item() == pytest.approx(0, abs=1e-6)
    alike = z[:, :1].expand(-1, 6)  # agrees as well, but all dimensions say the same
    assert barlow_twins(alike, alike).item() == pytest.approx(5e-3 * 30, rel=1e-3)
    assert vicreg(alike, alike).item() == pytest.approx(2 * 5, rel=1e-3)
    collapsed = torch.zeros_like(z)
    assert vicreg(collapsed, collapsed).item() == pytest.approx(25 * (1 - 0.01))


# ---------------------------------------------------------------- objectives


def make(method, network, m=0.9, dim=4):
    torch.manual_seed(1)
    return METHODS[method](network, network.n_features, dim, 0.2, m).double()


def images(n, seed=0):
    return torch.rand(n, 1, 12, 12, generator=torch.Generator().manual_seed(seed)).double()


def encoded(method, network, branches):
    """What the objective of a method gets of branches in as many views as the method has."""
    n_online = 1 if method in ("simclr", "moco") else 2
    return encode(network, branches, n_online, METHODS[method].target_views)


def step(method, network, objective, seed=0):
    """Loss of six images; gradients are left in both."""
    online, target = images(12, seed), images(12, seed + 1)
    branches = {
        0: {"online": online},
        1: {"online": online[:6], "target": target[:6]},
        2: {"online": online, "target": target},
    }[METHODS[method].target_views]
    loss = objective(encoded(method, network, branches), torch.zeros(6))
    loss.backward()
    return loss


@EACH
def test_gradients_reach_all_that_is_trained_and_nothing_else(method):
    network = small_network()
    objective = make(method, network)
    step(method, network, objective)
    assert all(p.grad.abs().sum() > 0 for p in network.parameters())
    trained = {name for name, p in objective.named_parameters() if p.requires_grad}
    assert not any(name.startswith("target.") for name in trained)
    for name, p in objective.named_parameters():
        assert (p.grad is not None) == (name in trained), name
    assert hasattr(objective, "target") == (method in ("moco", "byol"))


@pytest.mark.parametrize("method", ["moco", "byol"])
def test_the_target_begins_as_a_copy_and_follows(method):
    network = small_network()
    objective = make(method, network, m=0.75)
    target, projector = objective.target["trunk"], objective.target["projector"]
    assert all_equal(target.parameters(), network.trunk.parameters())
    assert all_equal(projector.parameters(), objective.projector.parameters())
    before = snapshot([*target.parameters(), *projector.parameters()])
    with torch.no_grad():
        for p in (*network.parameters(), *objective.projector.parameters()):
            p += 1
    assert all_equal([*target.parameters(), *projector.parameters()], before)
    objective.before_step(network)
    for new, old in zip([*target.parameters(), *projector.parameters()], before, strict=True):
        assert torch.allclose(new, old + 0.25, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["moco", "byol"])
def test_the_target_is_not_in_the_optimiser(method, data):
    seen = []

    def look(net):
        moved = {id(p) for group in net.optimizer_.param_groups for p in group["params"]}
        seen.append(moved & {id(p) for p in net.criterion_.target.parameters()})
        assert {id(p) for p in net.criterion_.projector.parameters()} <= moved
        assert {id(p) for p in net.module_.parameters()} <= moved

    fitted(method, data[0], callbacks=[Starts(look)])
    assert seen == [set()]


def unit_projections(network, objective, features, target):
    q = normalize(objective.projector(features))
    return q.detach(), normalize(objective.project_target(target))


def test_moco_finds_its_key_among_those_of_the_batch_and_of_the_queue():
    network = small_network()
    objective = make("moco", network).eval()  # no batch statistics: calls repeat
    network.eval()
    past = []
    for seed in range(3):
        both = encoded("moco", network, {"online": images(5, seed), "target": images(5, seed + 9)})
        (features,), (target,) = both
        q, k = unit_projections(network, objective, features, target)
        keys = torch.cat([k, *past])
        total = 0.0
        for i in range(5):
            scores = [math.exp(float(q[i] @ key) / 0.2) for key in keys]
            total -= math.log(scores[i] / sum(scores)) / 5
        loss = objective(both, torch.zeros(5))
        assert loss.item() == pytest.approx(total, rel=1e-9)
        past.append(k)
        assert objective.queue.filled().sum() == 5 * (seed + 1)  # it starts empty
    assert torch.equal(objective.queue.keys[objective.queue.filled()], torch.cat(past))


def test_places_of_the_queue_that_were_not_filled_have_no_influence():
    losses = []
    for fill in (0.0, 1e6):
        network = small_network()
        objective = make("moco", network)
        objective.queue.keys.fill_(fill)
        losses.append([step("moco", network, objective, seed).item() for seed in range(3)])
    assert losses[0] == losses[1]


def test_a_full_queue_forgets_the_oldest_keys(monkeypatch):
    monkeypatch.setattr(MoCo, "queue_size", 8)
    network = small_network()
    objective = make("moco", network)
    kept = []
    push = objective.queue.push
    monkeypatch.setattr(objective.queue, "push", lambda k: kept.append(k) or push(k))
    for seed in range(3):
        step("moco", network, objective, seed)
    assert objective.queue.filled().all()
    held = {tuple(row) for row in objective.queue.keys.tolist()}
    assert held == {tuple(row) for row in torch.cat(kept)[-8:].tolist()}
    other = make("moco", small_network())
    other.load_state_dict(objective.state_dict())
    assert other.queue.n_seen == 18


def test_byol_predicts_the_other_view_of_the_target_branch():
    network = small_network()
    objective = make("byol", network).eval()
    network.eval()
    both = encoded("byol", network, {"online": images(8), "target": images(8, 1)})
    p = objective.predictor(objective.projector(torch.cat(both.features))).detach()
    z = objective.project_target(torch.cat(both.target))
    distances = [
        (normalize(p[i], dim=0) - normalize(z[(i + 4) % 8], dim=0)).square().sum() for i in range(8)
    ]
    expected = float(sum(distances)) / 16  # half of the mean squared distance
    loss = objective(both, torch.zeros(4))
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_simsiam_stops_the_gradient_of_its_targets():
    torch.manual_seed(0)
    network = small_network()
    objective = make("simsiam", network)
    features = torch.rand(8, network.n_features, dtype=torch.float64, requires_grad=True)
    halves = features.chunk(2)
    value = objective(EncodedViews(list(halves), []), torch.zeros(4))
    (gradient,) = torch.autograd.grad(value, features)
    z1, z2 = (objective.projector(half) for half in halves)
    p1, p2 = objective.predictor(z1), objective.predictor(z2)
    cosines = torch.cosine_similarity(p1, z2.detach()) + torch.cosine_similarity(p2, z1.detach())
    assert value.item() == pytest.approx(1 - cosines.mean().item() / 2)
    (expected,) = torch.autograd.grad(1 - cosines.mean() / 2, features)
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-12)
    z1, z2 = (objective.projector(half) for half in halves)
    p1, p2 = objective.predictor(z1), objective.predictor(z2)
    through = torch.cosine_similarity(p1, z2) + torch.cosine_similarity(p2, z1)
    (other,) = torch.autograd.grad(1 - through.mean() / 2, features)
    assert not torch.allclose(gradient, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "cls", "loss"),
    [
        ("simclr", SimCLR, lambda z1, z2: nt_xent(z1, z2, 0.2)),
        ("barlow_twins", BarlowTwins, barlow_twins),
        ("vicreg", VICReg, vicreg),
    ],
)
def test_methods_without_a_target_compare_the_two_halves_of_the_batch(method, cls, loss):
    network = small_network()
    objective = make(method, network)
    assert isinstance(objective, cls)
    x = images(12)
    if method == "simclr":
        z1, z2 = objective.projector(network(x)).chunk(2)
    else:
        z1, z2 = (objective.projector(network(half)) for half in x.chunk(2))
    assert z1.shape == (6, 4 if method == "simclr" else 16)
    value = objective(encoded(method, network, {"online": x}), torch.zeros(6))
    assert value.item() == pytest.approx(loss(z1, z2).item(), rel=1e-9)


def batch_normalised(x, running, norms):
    """Slow batch norm without scale and shift: of this batch alone; keeps count of the passes."""
    norms.append(len(x))
    mean, variance = x.mean(axis=0), x.var(axis=0)
    running["mean"] = 0.9 * running["mean"] + 0.1 * mean
    return (x - mean) / np.sqrt(variance + 1e-5)


@EACH
def test_batch_normalisation_sees_what_the_authors_code_shows_it(method):
    """The two views are of unlike kinds: normalised together they give another loss than apart."""
    network = torch.nn.Module()
    network.trunk = torch.nn.BatchNorm1d(6).double().train()
    network.n_features = 6
    objective = make(method, network)
    rng = np.random.default_rng(0)
    n_target = METHODS[method].target_views
    views = [rng.normal(k, 1 + k, size=(5, 6)) for k in range(4)]
    online, target = ([views[0]], [views[1]]) if n_target == 1 else (views[:2], views[2:])
    branches = {"online": torch.from_numpy(np.concatenate(online))}
    if n_target:
        branches["target"] = torch.from_numpy(np.concatenate(target))
    objective.before_step(network)
    value = objective(encoded(method, network, branches), torch.zeros(5)).item()

    norms, running = [], {"mean": np.zeros(6)}
    if method == "simclr":
        h = np.split(batch_normalised(np.concatenate(online), running, norms), 2)
    else:
        h = [batch_normalised(view, running, norms) for view in online]
    torch.testing.assert_close(network.trunk.running_mean.numpy(), running["mean"])
    assert network.trunk.num_batches_tracked == len(norms)
    aside = {"mean": np.zeros(6)}
    k = [batch_normalised(view, aside, []) for view in target[:n_target]]

    def perceptron(layers, x):
        layers = list(layers)
        while layers:
            layer = layers.pop(0)
            if isinstance(layer, torch.nn.Linear):
                bias = 0 if layer.bias is None else layer.bias.detach().numpy()
                x = x @ layer.weight.detach().numpy().T + bias
            elif isinstance(layer, torch.nn.ReLU):
                x = np.maximum(x, 0)
            else:
                x = batch_normalised(x, {"mean": 0}, [])
                if layer.affine:
                    x = x * layer.weight.detach().numpy() + layer.bias.detach().numpy()
        return x

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    if method == "simclr":
        z = np.split(perceptron(objective.projector, np.concatenate(h)), 2)
        expected = nt_xent(*map(torch.from_numpy, z), 0.2).item()
    elif method == "moco":
        q = unit(perceptron(objective.projector, h[0]))
        keys = unit(perceptron(objective.target["projector"], k[0]))
        scores = np.exp(q @ keys.T / 0.2)
        expected = -np.log(np.diag(scores) / scores.sum(axis=1)).mean()
    elif method in ("byol", "simsiam"):
        z = [perceptron(objective.projector, x) for x in h]
        p = [unit(perceptron(objective.predictor, x)) for x in z]
        if method == "byol":
            z = [perceptron(objective.target["projector"], x) for x in k]
        expected = 1 - ((p[0] * unit(z[1])).sum(1) + (p[1] * unit(z[0])).sum(1)).mean() / 2
    else:
        loss = barlow_twins if method == "barlow_twins" else vicreg
        z = [torch.from_numpy(perceptron(objective.projector, x)) for x in h]
        expected = loss(*z).item()
    assert value == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------- views


@pytest.mark.filterwarnings("ignore:The features have all but collapsed")
@EACH
def test_two_views_of_each_image_go_where_the_method_wants_them(method, monkeypatch):
    X = np.broadcast_to(np.arange(60.0)[:, None, None], (60, 12, 12)).copy()
    seen, anchors = [], []

    def spying(network, branches, **n_views):
        scale, shift = encoder.pixel_std_[0], encoder.pixel_mean_[0]
        seen.append({k: (v * scale + shift).round() for k, v in branches.items()})
        n_target = METHODS[method].target_views
        n_online = 1 if method in ("simclr", "moco") else 2
        assert n_views == {"n_online": n_online, "n_target": n_target}
        return encode(network, branches, **n_views)

    monkeypatch.setattr("sklearn_medimb.base._encoder.encode", spying)
    params = {**SMALL, "max_epochs": 1, "precision": "float64"}
    encoder = SSLEncoder(method, **params, augment=(Add(100), Add(1000)))
    encoder.fit(X)
    for images_seen in seen:
        branches = {k: values(v) for k, v in images_seen.items()}
        online = branches["online"]
        x = online[online < 200] - 100
        both = torch.cat([x + 100, x + 1000])
        expected = {
            0: {"online": both},
            1: {"online": x + 100, "target": x + 1000},
            2: {"online": both, "target": both},
        }[METHODS[method].target_views]
        assert branches.keys() == expected.keys()
        assert all(torch.equal(branches[k], expected[k]) for k in expected)
        anchors += x.tolist()
    assert sorted(anchors) == list(range(60))


# ---------------------------------------------------------------- training


def found_again(encoder, X, augment):
    """Share of images whose one view is nearest to their other view."""
    generator = torch.Generator().manual_seed(0)
    views = [augment(torch.from_numpy(X), generator).clip(0, 1.5) for _ in range(2)]
    one, two = (normalize(torch.from_numpy(encoder.transform(view))) for view in views)
    return ((one @ two.T).argmax(dim=1) == torch.arange(len(X))).float().mean().item()


@EACH
def test_every_method_learns(method, monkeypatch):
    monkeypatch.setattr(MoCo, "queue_size", 64)  # full after the first epoch
    X = np.kron(np.random.default_rng(2).random((64, 3, 3, 3)), np.ones((4, 4))).astype(np.float32)
    augment = Augmentation(noise=0.3, noise_probability=1)
    params = {"random_state": 2, "augment": augment}
    encoder = fitted(method, X, **params, max_epochs=15 if method == "moco" else 10, lr=1e-2)
    losses = [row["train_loss"] for row in encoder.history_]
    assert np.mean(losses[-2:]) < 0.9 * losses[1 if method == "moco" else 0]
    assert encoder.history_[-1]["effective_rank"] > 3
    if method in ("byol", "simsiam"):  # without negatives ten epochs do not suffice
        return
    before = fitted(method, X, **params, max_epochs=1, lr=1e-9)
    assert found_again(encoder, X, augment) > found_again(before, X, augment) + 0.2


@EACH
def test_labels_are_ignored_and_fits_repeat_bit_for_bit(method, data):
    X, y = data
    state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    one = fitted(method, X, y)
    two = fitted(method, X, np.random.default_rng(0).permutation(y))
    three = fitted(method, X)
    for other in (two, three):
        assert same_arrays(one.weights_, other.weights_)
        assert all_equal(one.net_.criterion_.parameters(), other.net_.criterion_.parameters())
    assert [r["knn_score"] for r in one.history_] != [r["knn_score"] for r in two.history_]
    assert np.array_equal(np.random.get_state()[1], state[0])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), state[1])
    assert not same_arrays(one.weights_, fitted(method, X, random_state=1).weights_)


@EACH
def test_a_crashed_fit_resumes_to_the_same_result(method, data, tmp_path):
    X, _ = data
    whole = fitted(method, X, max_epochs=3)
    with pytest.raises(RuntimeError, match="power cut"):
        fitted(method, X, max_epochs=3, checkpoint_dir=tmp_path, callbacks=[CrashAfter(2)])
    count = EpochsRun()
    resumed = fitted(method, X, max_epochs=3, checkpoint_dir=tmp_path, callbacks=[count])
    assert count.epochs == [3]
    assert same_arrays(resumed.weights_, whole.weights_)
    for row, wanted in zip(resumed.history_, whole.history_, strict=True):
        assert row | {"dur": 0} == wanted | {"dur": 0}
    assert not list(tmp_path.iterdir())


def everything(net):
    """Weights and buffers of the network and of what only training needs."""
    modules = net.module_, net.criterion_
    return [tensor for m in modules for tensor in (*m.parameters(), *m.buffers())]


@EACH
def test_further_portions_go_on_from_the_projector_the_target_and_the_queue(method, data):
    X, _ = data
    encoder = SSLEncoder(method, **SMALL, projection_dim=16).partial_fit(X[:30])
    left, began = snapshot(everything(encoder.net_)), []
    look = Starts(lambda net: began.append(snapshot(everything(net))))
    encoder.set_params(callbacks=[look]).partial_fit(X[30:])
    assert all_equal(began[0], left)
    assert encoder.n_iter_ == 2
    if method == "moco":
        assert encoder.net_.criterion_.queue.n_seen == 60
    loaded = pickle.loads(pickle.dumps(encoder.set_params(callbacks=None)))
    assert loaded.partial_fit(X).n_iter_ == 3  # with a new projector


def test_the_method_may_change_between_portions(data):
    encoder = SSLEncoder("simclr", **SMALL).partial_fit(data[0])
    assert encoder.set_params(method="byol").partial_fit(data[0]).n_iter_ == 2


def test_an_unknown_method_is_answered_with_the_names(data):
    with pytest.raises(ValueError, match=r"'method' parameter of SSLEncoder.*simclr"):
        SSLEncoder("simlcr").fit(data[0])


@EACH
def test_diverging_training_says_so(method, data):
    with pytest.raises(ValueError, match="lower lr"):
        fitted(method, data[0], lr=1e30, lr_schedule="constant")


@EACH
def test_clones_and_pickles_give_the_same_features(method, data):
    X, _ = data
    encoder = fitted(method, X, max_epochs=1)
    features = encoder.transform(X)
    assert features.shape == (60, 8)
    assert features.dtype == np.float32
    loaded = pickle.loads(pickle.dumps(encoder))
    assert np.array_equal(loaded.transform(X), features)
    assert same_arrays(backbone_state(clone(encoder).fit(X)), backbone_state(encoder))
    assert not [name for name in encoder.weights_ if "target" in name or "projector" in name]
