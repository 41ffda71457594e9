"""AMIMV: loss and target against explicit formulas, views of each pairing, both estimators."""

from __future__ import annotations

import io
import math
import pickle

import joblib
import numpy as np
import pytest
import torch
from imblearn.over_sampling import RandomOverSampler
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.svm import LinearSVC

from sklearn_medimb import AMIMVClassifier, AMIMVEncoder, SoftmaxClassifier
from sklearn_medimb._training.objectives import EncodedViews, encode
from sklearn_medimb._training.views import ViewBatches
from sklearn_medimb.augment import Augmentation, resolve_augmentation
from sklearn_medimb.backbones import as_features
from sklearn_medimb.base._encoder import PRETRAINING
from sklearn_medimb.methods._amimv import (
    PAIRINGS,
    AMIMVObjective,
    asymmetric,
    thresholded_contrastive,
)
from sklearn_medimb.rebalance import HEADS, ClassifierRetraining, NearestClassMean
from tests.helpers import (
    SMALL,
    Add,
    CrashAfter,
    EpochsRun,
    Files,
    Starts,
    Watch,
    all_equal,
    backbone_state,
    make_batches,
    make_blobs,
    noise_images,
    numbered,
    same_arrays,
    small_network,
    snapshot,
    spy_on_rows,
    stages,
)

BAND = (0.1, 0.9)
TINY = {**SMALL, "projection_dim": 16}
EACH_PAIRING = pytest.mark.parametrize("pairing", PAIRINGS)


@pytest.fixture(scope="module")
def data():
    return make_blobs()


@pytest.fixture(scope="module")
def encoder(data):
    return AMIMVEncoder(**TINY).fit(data[0])


# ---------------------------------------------------------------- loss


def positives(n, d, cosine=0.5, seed=0):
    """Random rows and others at about the given cosine to them, float64."""
    generator = torch.Generator().manual_seed(seed)
    z1, noise = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    return z1, cosine * z1 + math.sqrt(1 - cosine**2) * noise


def loss_by_loops(z1, z2, temperature, thresholds, exact=False):
    """-log mean_u keep E_{u,u'} / sum_{v != u} keep E_{u,v}, number by number."""
    rows = torch.cat([z1, z2]).tolist()
    n = len(rows)

    def kept(u, v):
        dot = sum(a * b for a, b in zip(rows[u], rows[v], strict=True))
        cosine = dot / math.hypot(*rows[u]) / math.hypot(*rows[v])
        keep = thresholds is None or thresholds[0] <= abs(cosine) <= thresholds[1]
        return keep * math.exp(cosine / temperature)

    total = 0.0
    for u in range(n):
        positive = kept(u, (u + n // 2) % n)
        among = sum(kept(u, v) for v in range(n) if v != u)
        if exact:
            among += kept(u, u) - math.exp(1 / temperature)
        total += positive / among if positive else 0.0
    return -math.log(max(total / n, 1e-8))


@pytest.mark.parametrize("n", [2, 5, 9])
@pytest.mark.parametrize("thresholds", [None, BAND, (0.3, 0.6), (0.0, 1.0), (0.0, 0.7)])
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_loss_equals_explicit_double_loop(n, thresholds, temperature):
    z1, z2 = positives(n, 6)
    value = thresholded_contrastive(z1, z2, temperature, thresholds).item()
    assert value == pytest.approx(loss_by_loops(z1, z2, temperature, thresholds), rel=1e-12)


def test_without_thresholds_the_loss_is_minus_the_log_of_the_mean_softmax():
    z1, z2 = positives(7, 5)
    z = torch.nn.functional.normalize(torch.cat([z1, z2]))
    logits = (z @ z.T / 0.3).fill_diagonal_(-torch.inf)
    rho = logits.softmax(dim=1)[torch.arange(14), torch.arange(14).roll(7)]
    value = thresholded_contrastive(z1, z2, 0.3, None)
    assert value.item() == pytest.approx(-math.log(rho.mean()), rel=1e-12)
    assert value.item() < -rho.log().mean().item()  # not the mean of the logs


def awkward_rows(kind, n):
    if kind == "random":
        return torch.randn(2, n, 128, generator=torch.Generator().manual_seed(0))
    if kind == "identical":
        return torch.ones(2, n, 4)
    if kind == "orthogonal":
        return torch.eye(2 * n).view(2, n, 2 * n)
    return torch.zeros(2, n, 4)


@pytest.mark.parametrize("n", [2, 8, 64])
@pytest.mark.parametrize("kind", ["random", "identical", "orthogonal", "zero"])
@pytest.mark.parametrize("thresholds", [None, BAND])
def test_loss_is_never_negative_and_always_finite(n, kind, thresholds):
    z1, z2 = (view.clone().requires_grad_() for view in awkward_rows(kind, n))
    loss = thresholded_contrastive(z1, z2, 0.3, thresholds)
    loss.backward()
    assert 0 <= loss.item() <= -math.log(1e-8) + 1e-4
    assert torch.isfinite(z1.grad).all()
    assert torch.isfinite(z2.grad).all()
    if kind == "random":
        return
    if thresholds is None:  # no row is nearer than another
        assert loss.item() == pytest.approx(math.log(2 * n - 1), rel=1e-5)
    else:  # nothing is left to look at
        assert loss.item() == pytest.approx(-math.log(1e-8), rel=1e-5)
        assert not z1.grad.any()
        assert not z2.grad.any()


def test_loss_does_not_see_the_order_of_anchors_the_lengths_or_which_branch_is_which():
    z1, z2 = positives(8, 6)
    value = thresholded_contrastive(z1, z2).item()
    order = torch.tensor([3, 1, 7, 0, 2, 4, 6, 5])
    lengths = torch.rand(2, 8, 1, generator=torch.Generator().manual_seed(1)).double() * 9 + 0.1
    assert thresholded_contrastive(z1[order], z2[order]).item() == pytest.approx(value, rel=1e-12)
    longer = thresholded_contrastive(lengths[0] * z1, lengths[1] * z2).item()
    assert longer == pytest.approx(value, rel=1e-12)
    assert thresholded_contrastive(z2, z1).item() == pytest.approx(value, rel=1e-12)
    assert thresholded_contrastive(z1[order], z2).item() != pytest.approx(value, rel=1e-3)


def loss_and_slope(cosine):
    """Loss and its derivative as one positive's cosine changes and all other cosines stay."""
    c = torch.tensor(cosine, dtype=torch.float64, requires_grad=True)
    s = 0.2  # share of a direction in which the pair meets the other rows
    inner = (c - s) / (1 - s)
    zero, root = torch.zeros((), dtype=torch.float64), math.sqrt(1 - s)
    share = torch.full((), math.sqrt(s), dtype=torch.float64)
    one = torch.stack([zero + root, zero, share, zero])
    two = torch.stack([root * inner, root * (1 - inner**2).sqrt(), share, zero])
    others = torch.tensor([[0.0, 0, 1, 0.3], [0, 0, 1, -0.9]], dtype=torch.float64)
    loss = thresholded_contrastive(torch.stack([one, others[0]]), torch.stack([two, others[1]]))
    loss.backward()
    return loss.item(), c.grad.item()


def test_a_positive_that_is_too_much_or_too_little_alike_has_no_gradient():
    for cosine in (0.91, 0.99, 0.05, -0.05):
        assert loss_and_slope(cosine)[1] == pytest.approx(0, abs=1e-12)
    assert loss_and_slope(0.91)[0] == pytest.approx(loss_and_slope(0.99)[0], rel=1e-12)
    assert loss_and_slope(0.89)[1] < -0.1


def test_a_higher_cosine_of_a_positive_inside_the_band_lowers_the_loss():
    losses, slopes = zip(*(loss_and_slope(c) for c in np.linspace(0.12, 0.88, 20)), strict=True)
    assert (np.diff(losses) < 0).all()
    assert max(slopes) < 0


def test_the_published_loss_equals_its_formula_where_it_is_sane():
    z1, z2 = positives(8, 6)
    value = thresholded_contrastive(z1, z2, 5.0, BAND, exact_mimv=True).item()
    expected = loss_by_loops(z1, z2, 5.0, BAND, exact=True)
    assert value == pytest.approx(expected, rel=1e-12)
    # Without hi the subtraction is right.
    for thresholds in (None, (0.0, 1.01)):
        repaired = thresholded_contrastive(z1, z2, 0.3, thresholds).item()
        exact = thresholded_contrastive(z1, z2, 0.3, thresholds, exact_mimv=True).item()
        assert exact == pytest.approx(repaired, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_published_loss_is_nan_in_small_batches_and_agrees_in_large_ones(seed):
    z1, z2 = positives(16, 128, seed=seed)
    assert math.isnan(thresholded_contrastive(z1, z2, exact_mimv=True))
    assert thresholded_contrastive(z1, z2).item() > 0
    z1, z2 = positives(512, 128, seed=seed)
    exact = thresholded_contrastive(z1, z2, exact_mimv=True).item()
    assert exact == pytest.approx(thresholded_contrastive(z1, z2).item(), rel=0.025)


def test_loss_and_gradient_stay_finite_at_low_temperatures():
    z = torch.cat(positives(8, 16)).float().requires_grad_()
    loss = thresholded_contrastive(*z.chunk(2), temperature=0.01)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z.grad).all()


def test_projections_that_are_not_numbers_do_not_pass_for_a_loss():
    z1, z2 = positives(4, 3)
    assert math.isnan(thresholded_contrastive(z1 * torch.nan, z2 * torch.nan))


# ---------------------------------------------------------------- objective


def make(network, **params):
    torch.manual_seed(1)
    settings = {
        "projection_dim": 6, "temperature": 0.3, "thresholds": None, "exact_mimv": False,
        "momentum": 0.9, **params,
    }  # fmt: skip
    return AMIMVObjective(network, network.n_features, **settings).double()


def views(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    online, target = torch.rand(2, 2 * n, 1, 12, 12, generator=generator).double()
    return {"online": online, "target": target}


def test_projections_of_anchor_and_partner_are_added_in_both_branches():
    network = small_network().eval()
    objective = make(network, thresholds=BAND).eval()
    with torch.no_grad():  # the branches are to differ
        for p in objective.target.parameters():
            p *= 0.9
    branches = views(5)
    loss = objective(encode(network, branches, 2, 2), torch.zeros(5))
    with torch.no_grad():
        online = [objective.projector(network(image[None]))[0] for image in branches["online"]]
        target = [objective.project_target(image[None])[0] for image in branches["target"]]
    z1 = torch.stack([online[i] + online[5 + i] for i in range(5)])
    z2 = torch.stack([target[i] + target[5 + i] for i in range(5)])
    assert loss.item() == pytest.approx(loss_by_loops(z1, z2, 0.3, BAND), rel=1e-9)
    cosine = torch.cosine_similarity(z1, z2).mean()
    assert objective.terms["positive_cosine"].item() == pytest.approx(cosine.item())


def test_the_projector_has_two_hidden_layers_of_the_features_width_and_ends_in_a_norm():
    objective = make(small_network(), projection_dim=128)
    kinds = [type(layer).__name__ for layer in objective.projector]
    hidden = ["Linear", "BatchNorm1d", "ReLU"]
    assert kinds == [*hidden, *hidden, "Linear", "BatchNorm1d"]
    sizes = [m.weight.shape for m in objective.projector if isinstance(m, torch.nn.Linear)]
    assert sizes == [(8, 8), (8, 8), (128, 8)]


def test_gradients_reach_the_online_branch_alone():
    network = small_network()
    objective = make(network)
    branches = {k: v.requires_grad_() for k, v in views(5).items()}
    objective(encode(network, branches, 2, 2), torch.zeros(5)).backward()
    trained = [*network.parameters(), *objective.projector.parameters()]
    assert all(p.grad.abs().sum() > 0 for p in trained)
    assert all(p.grad is None for p in objective.target.parameters())
    assert branches["online"].grad.abs().sum() > 0
    assert branches["target"].grad is None


def test_the_target_is_not_in_the_optimiser(data):
    seen = []

    def look(net):
        moved = {id(p) for group in net.optimizer_.param_groups for p in group["params"]}
        seen.append(moved & {id(p) for p in net.criterion_.target.parameters()})
        assert moved == {
            id(p) for part in (net.module_, net.criterion_.projector) for p in part.parameters()
        }

    AMIMVEncoder(**TINY, callbacks=[Starts(look)]).fit(data[0])
    assert seen == [set()]


def parameters(net):
    """Online and target parameters, in the same order."""
    loss = net.criterion_
    online = [*net.module_.trunk.parameters(), *loss.projector.parameters()]
    target = [*loss.target["trunk"].parameters(), *loss.target["projector"].parameters()]
    return snapshot(online), snapshot(target)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_the_target_moves_by_the_rule_and_before_each_forward_pass(momentum, data, monkeypatch):
    begun, seen, done = [], [], []

    class Look(Watch):
        def on_batch_begin(self, net, **kwargs):
            begun.append(parameters(net))

    forward = AMIMVObjective.forward

    def spying(self, encoded, _):
        parts = self.target["trunk"], self.target["projector"]
        seen.append(snapshot(p for part in parts for p in part.parameters()))
        return forward(self, encoded, _)

    monkeypatch.setattr(AMIMVObjective, "forward", spying)
    look = Look(step=lambda net: done.append(parameters(net)[1]))
    params = {**TINY, "precision": "float64", "momentum": momentum, "callbacks": [look]}
    AMIMVEncoder(**params).fit(data[0])
    assert len(begun) == len(seen) == 8
    k = begun[0][0]  # it starts as a copy
    for (q, moved), in_forward, after in zip(begun, seen, done, strict=True):
        k = [momentum * old + (1 - momentum) * new for old, new in zip(k, q, strict=True)]
        for value, wanted in zip(moved, k, strict=True):
            assert torch.allclose(value, wanted, rtol=0, atol=1e-14)
        assert all_equal(in_forward, moved)
        assert all_equal(after, moved)
    assert all_equal(begun[-1][1], begun[0][1]) == (momentum == 1)
    assert all_equal(begun[-1][1], begun[-1][0]) == (momentum == 0)


def test_batch_statistics_of_the_target_are_its_own():
    network = small_network()
    objective = make(network)
    twin = pickle.loads(pickle.dumps(objective.target))
    branches = views(5)
    objective(encode(network, branches, 2, 2), torch.zeros(5))
    for view in branches["target"].chunk(2):  # one after the other
        twin["projector"](as_features(twin["trunk"](view)))
    assert all_equal(objective.target.buffers(), twin.buffers())
    online = [*network.trunk.buffers(), *objective.projector.buffers()]
    own = [*objective.target["trunk"].buffers(), *objective.target["projector"].buffers()]
    before = snapshot(own)
    assert not all_equal(own, online)
    objective.before_step(network)
    assert all_equal(own, before)  # parameters follow, statistics do not


def test_steps_without_a_positive_are_counted_and_have_no_gradient():
    features = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).double()
    network = small_network()
    objective = make(network)
    features.requires_grad_()
    encoded = EncodedViews(list(features.chunk(2)), list(views(4)["target"].chunk(2)))
    for thresholds, counted, has_gradient in (
        (None, 0, True),
        ((0.9998, 0.9999), 1, False),
        (BAND, 1, True),
        ((0.9998, 0.9999), 2, False),
    ):
        objective.thresholds, features.grad = thresholds, None
        objective(encoded, torch.zeros(4)).backward()
        assert objective.n_skipped.item() == counted
        assert features.grad.any() == has_gradient
    assert objective.n_steps.item() == 4


# ---------------------------------------------------------------- skipped steps, bad parameters


def test_a_fit_that_keeps_no_positive_warns_and_learns_nothing(data):
    began = []
    look = Starts(lambda net: began.append(snapshot(net.module_.parameters())))
    encoder = AMIMVEncoder(
        **TINY, thresholds=(0.998, 0.999), weight_decay=0.0, callbacks=[look]
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"In 8 of 8 steps the thresholds \(0.998, 0.999\) left"):
        encoder.fit(data[0])
    assert encoder.n_skipped_steps_ == 8
    assert all_equal(began[0], encoder.net_.module_.parameters())
    assert [row["train_loss"] for row in encoder.history_] == pytest.approx([-math.log(1e-8)] * 2)


def test_a_classifier_tells_of_skipped_steps_too(data):
    pretrain = AMIMVEncoder(max_epochs=2, batch_size=16, thresholds=(0.998, 0.999))
    with pytest.warns(UserWarning, match="In 8 of 8 steps the thresholds"):
        SoftmaxClassifier(**SMALL, pretrain=pretrain).fit(*data)


@pytest.mark.parametrize(("n_skipped", "warns"), [(0, False), (5, False), (6, True)])
def test_more_than_one_step_in_twenty_gives_a_warning(n_skipped, warns, data):
    encoder = AMIMVEncoder(**TINY).fit(data[0])
    assert encoder.n_skipped_steps_ == 0
    encoder.net_.criterion_.n_skipped.fill_(n_skipped)
    encoder.net_.criterion_.n_steps.fill_(100)
    assert bool(encoder.net_.criterion_.complaints()) == warns


@pytest.mark.parametrize(
    "thresholds",
    [
        (0.1,), (0.1, 0.5, 0.9), (0.9, 0.1), (0.5, 0.5), (-0.1, 0.9), (0.1, 1.1), (0.1, np.nan),
        ("low", "high"), (None, 0.9), 0.9, "auto",
    ],
)  # fmt: skip
def test_wrong_thresholds_are_named(thresholds, data):
    with pytest.raises(ValueError, match="thresholds"):
        AMIMVEncoder(**TINY, thresholds=thresholds).fit(data[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pairing", "both"), ("temperature", 0), ("momentum", 1.1), ("projection_dim", 0),
        ("batch_size", 1), ("augment", "hard"), ("augment", ("light",) * 3), ("max_epochs", 0),
        ("backbone", "resnet"),
    ],
)  # fmt: skip
def test_wrong_parameters_are_named(name, value, data):
    with pytest.raises(ValueError, match=name):
        AMIMVEncoder(**{**TINY, name: value}).fit(data[0])


def test_the_published_loss_ends_a_fit_in_the_error_for_nan(data):
    params = {**TINY, "batch_size": 4}
    encoder = AMIMVEncoder(**params, exact_mimv_loss=True)
    with pytest.raises(ValueError, match=r"training loss became (nan|inf)"):
        encoder.fit(data[0])


def test_diverging_training_says_so(data):
    with pytest.raises(ValueError, match="lower lr"):
        AMIMVEncoder(**TINY, lr=1e30, lr_schedule="constant").fit(data[0])


# ---------------------------------------------------------------- views of each pairing

A1, A2 = 100, 1000  # marks of the two kinds of hard view
ONLINE_AND_TARGET = {
    "mimv": ([("x", 0), ("y", A1)], [("x", A1), ("y", 0)]),
    "asym_aug": ([("x", 0), ("y", A1)], [("x", A2), ("y", 0)]),
    "source_target": ([("x", A1), ("y", A1)], [("x", 0), ("y", 0)]),
    "weak_strong": ([("x", 0), ("y", A1)], [("x", 0), ("y", 0)]),  # a weak view has no mark
}


def view_batches(array, pairing, augment):
    encoder = AMIMVEncoder(pairing=pairing, augment=augment)
    return ViewBatches(make_batches(array), encoder._view_set())


@EACH_PAIRING
def test_views_go_where_the_pairing_says(pairing):
    expected = dict(zip(("online", "target"), ONLINE_AND_TARGET[pairing], strict=True))
    distinct = 0
    for branches, targets in view_batches(numbered(50), pairing, (Add(A1), Add(A2))):
        y = branches["target"][len(targets) :, 0, 0, 0]  # clean in each of them
        images = {"x": targets.float(), "y": y}
        distinct += (images["x"] != y).sum().item()
        for branch, wanted in expected.items():
            wanted = torch.cat([images[image] + mark for image, mark in wanted])
            assert torch.allclose(branches[branch].mean(dim=(1, 2, 3)), wanted, atol=1e-3)
    assert distinct > 40


def kinds(branch, pairing):
    """Views of a branch: which image, clean, weak, or hard of the first or second kind."""
    views = vars(AMIMVEncoder(pairing=pairing, augment=(Add(A1), Add(A2)))._view_set())[branch]
    return sorted((image, getattr(how, "value", str(how))) for image, how in views)


@EACH_PAIRING
def test_mimv_is_symmetric_under_exchange_of_images_and_branches_and_the_others_are_not(pairing):
    exchanged = sorted((1 - image, how) for image, how in kinds("target", pairing))
    assert (exchanged == kinds("online", pairing)) == (pairing == "mimv")


def test_asymmetric_views_are_always_and_rarely_blurred():
    a1, a2 = (how for view in vars(AMIMVEncoder()._view_set()).values() for _, how in view
              if not how.is_identity)  # fmt: skip
    base = resolve_augmentation("contrastive").get_params()
    assert a1.get_params() == base | {"blur_probability": 1.0}
    assert a2.get_params() == base | {"blur_probability": 0.1, "gamma": 0.4}
    assert asymmetric(Augmentation(gamma=0.7))[1].gamma == 0.7
    own = Add(1)  # of a caller's own kind there is one
    assert asymmetric(own) == (own, own)
    given = Augmentation(blur=1.0)
    asymmetric(given)
    assert given.blur_probability == 0.5


def test_of_one_hard_view_asym_aug_makes_two_and_mimv_does_not():
    for pairing, n_kinds in (("mimv", 1), ("asym_aug", 2)):
        views = AMIMVEncoder(pairing=pairing, augment="mimv")._view_set()
        hard = [how for _, how in views.online + views.target if not how.is_identity]
        assert len({str(how) for how in hard}) == n_kinds


def test_target_views_of_source_target_are_the_images_themselves():
    array = noise_images(12)
    for _ in range(2):
        for branches, targets in view_batches(array, "source_target", "contrastive"):
            x, y = branches["target"].chunk(2)
            assert torch.equal(x, torch.from_numpy(array[targets.numpy()]))
            originals = {image.tobytes() for image in array}
            assert {image.numpy().tobytes() for image in y} <= originals
            online = {image.numpy().tobytes() for image in branches["online"].contiguous()}
            assert not online & originals


def test_the_weak_view_is_the_light_one():
    array = noise_images(12)
    (branches, targets), *_ = view_batches(array, "weak_strong", "contrastive")
    weak, y = branches["target"].chunk(2)
    originals = torch.from_numpy(array[targets.numpy()])
    assert not torch.equal(weak, originals)
    assert torch.isin(y, torch.from_numpy(array)).all()
    ((_, how), _) = AMIMVEncoder(pairing="weak_strong")._view_set().target
    assert how.get_params() == resolve_augmentation("light").get_params()


def test_the_weak_view_flips_nothing_that_the_hard_one_does_not():
    ((_, how), _) = AMIMVEncoder(pairing="weak_strong", augment="chest")._view_set().target
    params = resolve_augmentation("light").get_params()
    assert how.get_params() == params | {"horizontal_flip": 0.0}


@EACH_PAIRING
def test_a_step_encodes_four_images_per_anchor(pairing, data, monkeypatch):
    shapes = []

    def spying(network, branches, **n_views):
        shapes.append({name: tuple(images.shape) for name, images in branches.items()})
        assert n_views == {"n_online": 2, "n_target": 2}  # each passes alone, as in MIMV's code
        return encode(network, branches, **n_views)

    monkeypatch.setattr("sklearn_medimb.base._encoder.encode", spying)
    encoder = AMIMVEncoder(**{**TINY, "max_epochs": 1}, pairing=pairing).fit(data[0])
    assert shapes == [{"online": (30, 3, 12, 12), "target": (30, 3, 12, 12)}] * 4
    assert encoder.transform(data[0]).shape == (60, 8)


# ---------------------------------------------------------------- the encoder


def test_labels_are_ignored_and_fits_repeat_bit_for_bit(data):
    X, y = data
    state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    one = AMIMVEncoder(**TINY).fit(X, y)
    for labels in (np.random.default_rng(0).permutation(y), None):
        other = AMIMVEncoder(**TINY).fit(X, labels)
        assert same_arrays(one.weights_, other.weights_)
    assert np.array_equal(np.random.get_state()[1], state[0])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), state[1])
    assert not same_arrays(
        one.weights_, AMIMVEncoder(**{**TINY, "random_state": 1}).fit(X).weights_
    )


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_transform_is_deterministic_and_independent_of_the_batch(precision, data):
    X, _ = data
    encoder = AMIMVEncoder(**TINY, precision=precision).fit(X)
    features = encoder.transform(X)
    assert features.shape == (60, 8)
    assert features.dtype == precision
    assert np.array_equal(encoder.transform(X), features)
    alone = np.concatenate([encoder.transform(X[[i]]) for i in range(7)])
    assert np.allclose(alone, features[:7], rtol=0, atol=1e-5 if precision == "float32" else 1e-12)
    assert encoder.get_feature_names_out().tolist() == [f"amimvencoder{i}" for i in range(8)]
    assert np.array_equal(clone(encoder).fit_transform(X), features)


def test_clone_pickle_and_joblib_keep_the_encoder_and_no_tensor(data, encoder):
    X, _ = data
    features = encoder.transform(X)
    buffer = io.BytesIO()
    joblib.dump(encoder, buffer)
    buffer.seek(0)
    for loaded in (pickle.loads(pickle.dumps(encoder)), joblib.load(buffer)):
        assert np.array_equal(loaded.transform(X), features)
        assert loaded.history_ == encoder.history_
        assert loaded.n_skipped_steps_ == 0
    assert clone(encoder).get_params(deep=False).keys() == encoder.get_params(deep=False).keys()
    assert not hasattr(clone(encoder), "net_")

    def parts(value):
        yield value
        inside = value.values() if isinstance(value, dict) else value
        for part in inside if isinstance(value, (dict, list, tuple)) else ():
            yield from parts(part)

    odd = [v for v in parts(encoder.__getstate__()) if type(v).__module__.startswith("torch")]
    assert not odd
    assert not [name for name in encoder.weights_ if "target" in name or "projector" in name]


@EACH_PAIRING
def test_a_crashed_fit_resumes_to_the_same_result(pairing, data, tmp_path):
    X, y = data
    params = {**TINY, "max_epochs": 3, "pairing": pairing}
    whole = AMIMVEncoder(**params).fit(X, y)
    params["checkpoint_dir"] = tmp_path
    with pytest.raises(RuntimeError, match="power cut"):
        AMIMVEncoder(**params, callbacks=[CrashAfter(2)]).fit(X, y)
    count = EpochsRun()
    resumed = AMIMVEncoder(**params, callbacks=[count]).fit(X, y)
    assert count.epochs == [3]
    assert same_arrays(resumed.weights_, whole.weights_)
    assert resumed.n_skipped_steps_ == whole.n_skipped_steps_
    for row, wanted in zip(resumed.history_, whole.history_, strict=True):
        assert row | {"dur": 0} == wanted | {"dur": 0}
    assert not list(tmp_path.iterdir())


def test_partial_fit_trains_an_epoch_and_goes_on_with_its_projector_and_target(data):
    X, _ = data
    encoder = AMIMVEncoder(**TINY).partial_fit(X[:30])
    assert encoder.n_iter_ == 1
    mean, left, began = encoder.pixel_mean_, parameters(encoder.net_), []
    look = Starts(lambda net: began.append((parameters(net), net.lr, net.schedule)))
    encoder.set_params(callbacks=[look]).partial_fit(X[30:])
    for part, wanted in zip(began[0][0], left, strict=True):
        assert all_equal(part, wanted)
    assert began[0][1:] == (2e-3, "constant")
    assert encoder.n_iter_ == 2
    assert np.array_equal(encoder.pixel_mean_, mean)
    loaded = pickle.loads(pickle.dumps(encoder.set_params(callbacks=None)))
    began.clear()
    loaded.set_params(callbacks=[look]).partial_fit(X[:30])  # only the encoder was stored
    n_backbone = len(list(loaded.backbone_.parameters()))
    assert all_equal(began[0][0][0][:n_backbone], encoder.net_.module_.parameters())
    assert not all_equal(began[0][0][0], parameters(encoder.net_)[0])


def test_the_projection_may_change_between_portions(data):
    encoder = AMIMVEncoder(**TINY).partial_fit(data[0])
    encoder.set_params(projection_dim=4).partial_fit(data[0])  # a larger one reads foreign memory
    optimiser = encoder.net_.optimizer_
    for p, state in optimiser.state.items():
        assert state["exp_avg"].shape == p.shape


def test_a_warm_start_goes_on_and_a_cold_one_does_not(data):
    X, _ = data
    encoder = AMIMVEncoder(**TINY, warm_start=True).fit(X)
    left, began = parameters(encoder.net_), []
    look = Starts(lambda net: began.append(parameters(net)))
    encoder.set_params(callbacks=[look]).fit(X)
    assert all_equal(began[0][0], left[0])
    assert all_equal(began[0][1], left[1])
    assert encoder.n_iter_ == 4
    assert encoder.set_params(warm_start=False).fit(X).n_iter_ == 2
    assert not all_equal(began[1][0], left[0])


def test_one_image_is_too_few(data):
    with pytest.raises(ValueError, match=r"at least 2 images .*n_samples=1"):
        AMIMVEncoder(**TINY).fit(data[0][:1])


@pytest.mark.filterwarnings("ignore:The features have all but collapsed")
@pytest.mark.parametrize("n", [2, 3, 9])
def test_fewer_images_than_a_batch_are_one_batch(n, data):
    steps = []
    look = Watch(step=lambda net: steps.append(1))
    encoder = AMIMVEncoder(**TINY, thresholds=None, callbacks=[look]).fit(data[0][:n])
    assert len(steps) == 2  # one an epoch
    assert np.isfinite(encoder.transform(data[0])).all()
    assert all(np.isfinite(row["train_loss"]) for row in encoder.history_)


@pytest.mark.parametrize("kind", ["gray", "volumes", "vectors", "floats", "channels last"])
def test_every_kind_of_image_is_read(kind, data):
    X, y = data
    X, params = {
        "gray": (X[:, 0], {}),
        "volumes": (np.stack([X[:, 0]] * 6, axis=1), {"spatial_dims": 3}),
        "vectors": (X.reshape(60, -1)[:, :40].astype(float), {"backbone": "mlp"}),
        "floats": (X / 255, {}),
        "channels last": (np.moveaxis(X, 1, -1), {}),
    }[kind]
    encoder = AMIMVEncoder(**{**TINY, **params}).fit(X, y)
    features = encoder.transform(X)
    assert features.shape == (60, encoder._n_features_out)
    assert features.std(axis=0).max() > 0
    assert len(encoder.history_) == 2
    assert encoder.n_skipped_steps_ == 0


@pytest.mark.parametrize("kind", ["files", "dataset"])
def test_images_on_disk_and_data_sets_train_like_arrays(kind, data, encoder, tmp_path):
    X, y = data
    lazy = Files(tmp_path, X)
    if kind == "dataset":
        lazy = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(y))
    one = AMIMVEncoder(**TINY).fit(lazy)
    assert same_arrays(one.weights_, encoder.weights_)
    assert np.array_equal(one.transform(lazy), encoder.transform(X))


def test_training_makes_the_views_agree(data):
    augment = Augmentation(noise=0.3, noise_probability=1)
    params = {"augment": augment, "max_epochs": 10, "lr": 1e-2, "thresholds": None}
    X = np.kron(np.random.default_rng(2).random((64, 3, 3, 3)), np.ones((4, 4))).astype(np.float32)
    history = AMIMVEncoder(**{**TINY, **params}).fit(X).history_
    cosines = [row["train_positive_cosine"] for row in history]
    assert cosines[-1] > cosines[0] + 0.2
    assert history[-1]["train_loss"] < 0.9 * history[0]["train_loss"]
    assert history[-1]["effective_rank"] > 3


def test_published_settings(data):
    params = AMIMVEncoder.published().get_params()
    expected = {
        "backbone": "resnet18", "pairing": "mimv", "augment": "mimv", "batch_size": 1024,
        "max_epochs": 400, "lr": 3.0, "weight_decay": 1e-4, "momentum": 0.9, "temperature": 0.3,
        "thresholds": BAND, "projection_dim": 128, "exact_mimv_loss": False,
    }  # fmt: skip
    assert {name: params[name] for name in expected} == expected
    small = AMIMVEncoder.published(**SMALL)
    assert small.batch_size == 16
    optimiser = small.fit(data[0]).net_.optimizer_
    assert isinstance(optimiser, torch.optim.SGD)
    assert optimiser.param_groups[0]["momentum"] == 0.9
    assert optimiser.param_groups[0]["weight_decay"] == 1e-4


def test_auto_epochs_aim_at_600_steps_and_20_epochs_at_least(data):
    encoder = AMIMVEncoder(batch_size=16)
    encoder.image_shape_ = (3, 12, 12)
    assert encoder._n_epochs(60) == 150  # of 4 steps
    assert encoder._n_epochs(16 * 1000) == 20
    encoder.image_shape_ = (40,)  # vectors settle sooner
    assert encoder._n_epochs(60) == 50


# ---------------------------------------------------------------- the classifier


def half(y):
    """Every other row has no label."""
    return np.where(np.arange(len(y)) % 2, -1, y)


def make_classifier(**params):
    pretrain = AMIMVEncoder(max_epochs=1, batch_size=16, projection_dim=16)
    return AMIMVClassifier(**{**SMALL, "pretrain": pretrain, **params})


class Counting(LogisticRegression):
    """Remembers what it was fitted on."""

    def fit(self, X, y):
        self.X_, self.y_ = X, y
        return super().fit(X, y)


@pytest.mark.parametrize("fine_tune", ["frozen", "full"])
def test_unlabelled_rows_serve_pre_training_only(fine_tune, data, monkeypatch):
    X, y = data
    some, seen, trained = half(y), spy_on_rows(monkeypatch), set()

    class Look(Watch):
        def on_batch_begin(self, net, batch, **kwargs):
            if net.stage != PRETRAINING:
                trained.update(image.numpy().tobytes() for image in batch[0].contiguous())

    params = {"fine_tune": fine_tune, "augment": "none", "precision": "float32"}
    clf = make_classifier(**params, head=Counting(max_iter=5000), callbacks=[Look()]).fit(X, some)
    ((_, rows),) = seen
    assert sorted(rows.tolist()) == list(range(60))
    assert np.array_equal(clf.head_.y_, y[some >= 0])
    assert np.allclose(clf.head_.X_, clf.transform(X[some >= 0]), atol=1e-5)
    prepared = clf._preprocessor()(torch.from_numpy(X[some >= 0]))
    labelled = {image.numpy().tobytes() for image in prepared.contiguous()}
    assert trained == (labelled if fine_tune == "full" else set())
    assert stages(clf) == [PRETRAINING] + [""] * (2 if fine_tune == "full" else 0)
    assert clf.class_counts_.tolist() == np.bincount(y[some >= 0]).tolist()


def test_what_unlabelled_images_show_counts(data):
    X, y = data
    some, other = half(y), X.copy()
    other[some == -1] = other[some == -1][:, :, ::-1]
    one, two = (make_classifier().fit(images, some) for images in (X, other))
    assert not np.array_equal(one.transform(X), two.transform(X))
    without = make_classifier().fit(X[some >= 0], y[some >= 0])
    assert not np.array_equal(one.transform(X), without.transform(X))


@pytest.mark.parametrize("kind", [int, float, np.int8, object, list])
def test_labels_are_numbers_or_strings_with_the_number_minus_one(kind, data):
    X, y = data
    expected = make_classifier().fit(X, half(y))
    names = np.array(["benign", "melanoma", "nevus"])
    if kind is object:
        labels = names[y].astype(object)
        labels[half(y) == -1] = -1
    else:
        labels = half(y).tolist() if kind is list else half(y).astype(kind)
    clf = make_classifier().fit(X, labels)
    wanted = names if kind is object else np.array([0, 1, 2])
    assert np.array_equal(clf.classes_, wanted)
    assert np.array_equal(clf.predict(X), wanted[expected.predict(X)])
    assert np.array_equal(clf.predict_proba(X), expected.predict_proba(X))


@pytest.mark.parametrize("kind", [str, object])
def test_the_text_minus_one_is_no_label(kind, data):
    X, y = data
    labels = np.where(half(y) == -1, "-1", np.array(["a", "b", "c"])[y]).astype(kind)
    with pytest.raises(ValueError, match="y holds the text '-1'"):
        make_classifier().fit(X, labels)


def test_too_few_labels_are_refused(data):
    X, y = data
    with pytest.raises(ValueError, match="y is -1 everywhere"):
        make_classifier().fit(X, np.full(60, -1))
    with pytest.raises(ValueError, match="at least 2 classes in y, but found 1 class"):
        make_classifier().fit(X, np.where(y == 0, 0, -1))
    with pytest.raises(ValueError, match=r"y has no label in row \d+ \(\d+ rows in all\): use -1"):
        make_classifier().fit(X, np.where(y == 0, np.nan, half(y)))


def test_minus_one_and_one_are_two_classes_with_a_warning(data):
    X, y = data
    sides = np.where(y == 0, -1, 1)
    with pytest.warns(UserWarning, match="y holds -1 and 1 only: they are read as two classes"):
        clf = make_classifier().fit(X, sides)
    assert clf.classes_.tolist() == [-1, 1]
    assert clf.class_counts_.tolist() == [36, 24]
    expected = make_classifier().fit(X, (sides + 1) // 2)  # no warning
    assert np.array_equal(clf.predict_proba(X), expected.predict_proba(X))


def test_a_class_without_a_label_is_refused_where_classes_says_so(data):
    X, y = data
    some = np.where(y == 2, -1, y)
    assert make_classifier().fit(X, some).classes_.tolist() == [0, 1]
    assert make_classifier().fit(X, some, classes=[0, 1]).classes_.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"Classes .*2.* occur only without labels"):
        make_classifier().fit(X, some, classes=[0, 1, 2])


def test_messages_name_classes_as_the_caller_wrote_them(data):
    X, y = data
    with pytest.raises(ValueError, match=r"Classes \[2\] occur only without labels"):
        make_classifier().fit(X, np.where(y == 2, -1, y), classes=[0, 1, 2])
    with pytest.raises(ValueError, match=r"y holds classes \[2\] that classes=\[0, 1\] lacks"):
        make_classifier().fit(X, y, classes=[0, 1])


def test_a_label_that_classes_lacks_is_refused(data):
    X, y = data
    with pytest.raises(ValueError, match="classes"):
        make_classifier().fit(X, y, classes=[0, 1])


@pytest.mark.parametrize("head", sorted(HEADS))
def test_heads_by_name_are_fitted_to_the_features_of_the_labelled_images(head, data):
    X, y = data
    labelled = half(y) >= 0
    clf = make_classifier(head=head, precision="float64").fit(X, half(y))
    expected = HEADS[head]()
    if "random_state" in expected.get_params():
        expected.set_params(random_state=clf.random_seed_)
    expected.fit(clf.transform(X[labelled]), y[labelled])
    assert np.allclose(clf.predict_proba(X), expected.predict_proba(clf.transform(X)), atol=1e-6)
    assert type(clf.head_) is type(expected)


@pytest.mark.parametrize("head", [LogisticRegression(C=0.5), LinearSVC(), NearestClassMean()])
def test_any_classifier_is_a_head(head, data):
    X, y = data
    labelled = half(y) >= 0
    clf = make_classifier(head=head, precision="float64").fit(X, half(y))
    features = clf.transform(X)
    expected = clone(head)
    if "random_state" in expected.get_params():
        expected.set_params(random_state=clf.random_seed_)
    expected.fit(features[labelled], y[labelled])
    assert np.array_equal(clf.predict(X), expected.predict(features))
    assert not hasattr(head, "classes_")
    loaded = pickle.loads(pickle.dumps(clf))
    assert np.array_equal(loaded.predict(X), clf.predict(X))


def test_the_default_head_is_balanced_and_unknown_ones_are_named(data):
    X, y = data
    assert isinstance(make_classifier().fit(X, y).head_, ClassifierRetraining)
    with pytest.raises(ValueError, match="head='balanced' must be one of"):
        make_classifier(head="balanced").fit(X, y)


def test_fine_tuning_trains_the_network_and_is_left_out_otherwise(data):
    X, y = data
    frozen = make_classifier(lr=1e-2).fit(X, half(y))
    tuned = make_classifier(lr=1e-2, fine_tune="full").fit(X, half(y))
    assert stages(frozen) == [PRETRAINING]
    assert stages(tuned) == [PRETRAINING, "", ""]
    one, two = backbone_state(frozen), backbone_state(tuned)
    assert not any(np.array_equal(one[k], two[k]) for k in one if k.endswith("weight"))
    assert tuned.history_[-1]["train_loss"] < tuned.history_[1]["train_loss"]


def test_early_stopping_holds_out_labelled_rows_of_whole_groups(data):
    X, y = data
    some, groups, held = half(y), np.arange(60) // 3, []
    place = {image.tobytes(): row for row, image in enumerate(X)}

    def scoring(estimator, X_held, y_held):
        held.append([place[image.tobytes()] for image in X_held])
        assert np.array_equal(y[held[-1]], y_held)
        return 0.5

    params = {"fine_tune": "full", "early_stopping": True, "scoring": scoring}
    make_classifier(**params, head=Counting(max_iter=5000)).fit(X, some)
    assert len(held[0]) == 6  # a fifth of the labelled rows
    assert (some[held[0]] >= 0).all()
    held.clear()
    head = make_classifier(**params, head=Counting(max_iter=5000)).fit(X, some, groups=groups).head_
    kept = [row for row in np.flatnonzero(some >= 0) if row not in held[0]]
    assert not set(groups[kept]) & set(groups[held[0]])
    assert len(head.y_) == len(kept)


def test_unlabelled_images_of_patients_held_out_are_held_out_too(data, monkeypatch):
    X, y = data
    groups, held, seen = np.arange(60) // 3, [], spy_on_rows(monkeypatch)
    place = {image.tobytes(): row for row, image in enumerate(X)}

    def scoring(estimator, X_held, y_held):
        held.extend(place[image.tobytes()] for image in X_held)
        return 0.5

    params = {"fine_tune": "full", "early_stopping": True, "scoring": scoring}
    make_classifier(**params).fit(X, half(y), groups=groups)
    assert not set(groups[held]) & set(groups[seen[0][1]])


def test_without_fine_tuning_nothing_is_held_out(data):
    X, y = data

    def scoring(estimator, X_held, y_held):
        raise AssertionError("there is no epoch to choose")

    clf = make_classifier(early_stopping=True, scoring=scoring, head=Counting(max_iter=5000))
    assert len(clf.fit(X, half(y)).head_.y_) == 30
    assert not hasattr(clf, "best_score_")


def test_the_sampler_resamples_fine_tuning_and_neither_pre_training_nor_the_head(data, monkeypatch):
    X, y = data
    seen = spy_on_rows(monkeypatch)
    clf = make_classifier(
        fine_tune="full", sampler=RandomOverSampler(), head=Counting(max_iter=5000)
    ).fit(X, half(y))  # fmt: skip
    assert sorted(seen[0][1].tolist()) == list(range(60))
    assert sorted(clf.head_.y_) == sorted(y[half(y) >= 0])
    assert np.allclose(clf.class_prior_, 1 / 3)


@pytest.mark.parametrize("parameter", ["pretrain", "backbone"])
def test_a_fitted_encoder_is_taken_as_it_is(parameter, data, encoder):
    X, y = data
    before = encoder.weights_
    params = {"pretrain": None, parameter: encoder}
    clf = make_classifier(**params, head="ncm").fit(X, half(y))
    assert clf.history_ == []
    assert same_arrays(backbone_state(clf), backbone_state(encoder))
    assert np.array_equal(clf.transform(X), encoder.transform(X))
    assert same_arrays(encoder.weights_, before)
    assert np.array_equal(clone(clf).fit(X, half(y)).predict_proba(X), clf.predict_proba(X))


def test_without_pretrain_and_fine_tuning_the_backbone_stays_as_given(data):
    X, y = data
    given = SoftmaxClassifier(**SMALL).fit(X, y)
    clf = make_classifier(pretrain=None, backbone=given.backbone_).fit(X, half(y))
    assert same_arrays(backbone_state(clf), backbone_state(given))


def test_a_warm_start_keeps_the_network_and_makes_another_head(data):
    X, y = data
    clf = make_classifier(warm_start=True).fit(X, half(y))
    features = clf.transform(X)
    clf.fit(X, y)
    assert np.array_equal(clf.transform(X), features)
    assert stages(clf) == [PRETRAINING]
    clf.refit_head(X, half(y), rebalance="ncm")
    assert isinstance(clf.head_, NearestClassMean)
    assert np.array_equal(clf.transform(X), features)


def test_a_crash_in_pre_training_or_fine_tuning_resumes_to_the_same_result(data, tmp_path):
    X, y = data
    whole = make_classifier(fine_tune="full").fit(X, half(y))
    for epoch in (1, 2):
        params = {"fine_tune": "full", "checkpoint_dir": tmp_path}
        with pytest.raises(RuntimeError, match="power cut"):
            make_classifier(**params, callbacks=[CrashAfter(epoch)]).fit(X, half(y))
        resumed = make_classifier(**params).fit(X, half(y))
        assert same_arrays(resumed.weights_, whole.weights_)
        assert np.array_equal(resumed.predict_proba(X), whole.predict_proba(X))


def test_cross_validation_and_search_over_parameters_of_the_encoder(data):
    X, y = data
    scores = cross_val_score(make_classifier(), X, y, cv=2, scoring="balanced_accuracy")
    assert scores.shape == (2,)
    grid = {"pretrain__momentum": [0.5, 0.99], "head": ["crt", "ncm"]}
    search = GridSearchCV(make_classifier(), grid, cv=2, error_score="raise").fit(X, y)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.best_estimator_.pretrain.momentum == search.best_params_["pretrain__momentum"]


def test_few_labels_suffice_where_the_backbone_sees_the_classes(data):
    X, y = make_blobs((60, 30, 15), seed=1)
    X_test, y_test = make_blobs((30, 30, 30), seed=2)
    few = np.where(np.arange(len(y)) % 3, -1, y)
    augment = Augmentation(noise=0.2, noise_probability=1)  # flips would hide the class
    pretrain = AMIMVEncoder(max_epochs=10, batch_size=16, lr=1e-2, augment=augment)
    clf = make_classifier(
        pretrain=pretrain, fine_tune="full", max_epochs=10, lr=1e-2, augment=augment
    ).fit(X, few)  # fmt: skip
    assert clf.score(X_test, y_test) > 0.8


def test_other_classifiers_warn_of_labels_that_look_missing():
    X, y = make_blobs()
    some = np.where(np.arange(len(y)) % 2, y, -1)
    with pytest.warns(UserWarning, match="takes y = -1 for a class"):
        SoftmaxClassifier(max_epochs=1, random_state=0).fit(X, some)
    SoftmaxClassifier(max_epochs=1, random_state=0).fit(X, np.where(y > 0, 1, -1))  # two classes
