"""Every loss against the formula of its paper, one sample at a time."""

from __future__ import annotations

import io
import math
from functools import partial

import numpy as np
import pytest
import torch
from imblearn.over_sampling import RandomOverSampler
from skorch.callbacks import Callback

from sklearn_medimb import (
    AMIMVClassifier,
    LMDClassifier,
    MetricTwoStageClassifier,
    SoftmaxClassifier,
    SPMixClassifier,
    losses,
)
from sklearn_medimb._data.batches import Batches, Context, Preprocessor
from sklearn_medimb._data.images import Images
from sklearn_medimb._data.layout import infer_layout
from sklearn_medimb._data.plans import class_balanced, shuffled
from sklearn_medimb.augment import Augmentation
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.base import CosineHead
from sklearn_medimb.losses import (
    LOSSES,
    ClassBalancedLoss,
    CrossEntropyLoss,
    FocalLoss,
    LabelLoss,
    LDAMLoss,
)
from sklearn_medimb.methods import Contrast
from sklearn_medimb.methods._softmax import MixedBatches

COUNTS = [100.0, 30.0, 4.0, 1.0]
MASS = torch.tensor(COUNTS, dtype=torch.float64)
LOG_PRIOR = (MASS / MASS.sum()).log()


def logits(n=7, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, len(COUNTS), generator=generator, dtype=torch.float64)


def softmax(z):
    top = max(z)
    powers = [math.exp(v - top) for v in z]
    return [v / sum(powers) for v in powers]


def explicit(z, formula):
    """Cost of every sample for every label, in plain Python."""
    return np.array([[formula(row, k) for k in range(len(row))] for row in z.tolist()])


def assert_costs(got, z, formula, rtol=1e-10):
    np.testing.assert_allclose(got.numpy(), explicit(z, formula), rtol=rtol, atol=1e-12)


# ---------------------------------------------------------------- costs


def test_cross_entropy():
    z = logits()
    assert_costs(losses.cross_entropy(z), z, lambda row, k: -math.log(softmax(row)[k]))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_focal(gamma):
    z = logits()

    def formula(row, k):
        p = softmax(row)[k]
        return -((1 - p) ** gamma) * math.log(p)

    assert_costs(losses.focal(z, gamma), z, formula, rtol=1e-9)


def test_focal_without_gamma_is_cross_entropy():
    torch.testing.assert_close(losses.focal(logits(), 0.0), losses.cross_entropy(logits()))
    assert (losses.focal(logits(), 1.0) < losses.cross_entropy(logits())).all()


def test_focal_default_is_two():
    assert torch.equal(losses.focal(logits()), losses.focal(logits(), 2.0))


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_logit_adjusted(tau):
    """Menon et al., eq. 10: log(1 + sum over j of (prior_j / prior_k)^tau exp(z_j - z_k))."""
    z = logits()
    prior = [n / sum(COUNTS) for n in COUNTS]

    def formula(row, k):
        others = (
            (prior[j] / prior[k]) ** tau * math.exp(row[j] - row[k])
            for j in range(len(row))
            if j != k
        )
        return math.log(1 + sum(others))

    assert_costs(losses.logit_adjusted(z, LOG_PRIOR, tau), z, formula)


def test_balanced_softmax_is_logit_adjustment_with_tau_one():
    """Ren et al., eq. 4: n_k exp(z_k) over the sum of n_j exp(z_j)."""
    z = logits()

    def formula(row, k):
        powers = [n * math.exp(v) for n, v in zip(COUNTS, row, strict=True)]
        return -math.log(powers[k] / sum(powers))

    assert_costs(losses.logit_adjusted(z, LOG_PRIOR), z, formula)


def test_no_adjustment_without_tau_or_imbalance():
    z = logits()
    torch.testing.assert_close(losses.logit_adjusted(z, LOG_PRIOR, 0.0), losses.cross_entropy(z))
    flat = torch.full_like(LOG_PRIOR, -math.log(len(COUNTS)))
    torch.testing.assert_close(losses.logit_adjusted(z, flat, 1.7), losses.cross_entropy(z))


def test_ldam():
    """Cao et al., eq. 13: the margin leaves the own logit only."""
    z = logits()
    margins = [0.3, 0.7, 1.1, 2.0]

    def formula(row, k):
        own = row[k] - margins[k]
        others = sum(math.exp(v) for j, v in enumerate(row) if j != k)
        return -math.log(math.exp(own) / (math.exp(own) + others))

    got = losses.ldam(z, torch.tensor(margins, dtype=torch.float64))
    assert_costs(got, z, formula)


def test_ldam_without_margin_is_cross_entropy():
    z = logits()
    torch.testing.assert_close(losses.ldam(z, torch.zeros_like(MASS)), losses.cross_entropy(z))


@pytest.mark.parametrize("label", range(4))
def test_margin_of_a_class_touches_that_label_only(label):
    z = logits()
    margins = torch.full_like(MASS, 0.5)
    before = losses.ldam(z, margins)
    margins[label] += 1
    after = losses.ldam(z, margins)
    others = [k for k in range(4) if k != label]
    assert torch.equal(after[:, others], before[:, others])
    assert (after[:, label] > before[:, label]).all()


@pytest.mark.parametrize("max_margin", [0.1, 0.5])
def test_ldam_margins(max_margin):
    expected = np.array([n**-0.25 for n in COUNTS])
    expected *= max_margin / expected.max()
    got = losses.ldam_margins(MASS, max_margin)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)
    assert got.argmax() == 3  # the rarest class
    assert got.max() == max_margin
    # Only the ratios of the counts matter.
    torch.testing.assert_close(losses.ldam_margins(7 * MASS, max_margin), got)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.9999])
def test_effective_number_weights(beta):
    raw = np.array([1 / sum(beta**i for i in range(int(n))) for n in COUNTS])  # 1 + beta + ...
    expected = raw * len(raw) / raw.sum()
    got = losses.effective_number_weights(MASS, beta)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(got.sum(), len(COUNTS))


def test_limits_of_beta():
    alike = losses.effective_number_weights(MASS, 0.0)
    np.testing.assert_allclose(alike.numpy(), 1.0)
    inverse = 1 / np.array(COUNTS)
    nearly = losses.effective_number_weights(MASS, 1 - 1e-9)
    np.testing.assert_allclose(nearly.numpy(), inverse * 4 / inverse.sum(), rtol=1e-4)


ALL_COSTS = {
    "cross_entropy": losses.cross_entropy,
    **{f"focal {g}": partial(losses.focal, gamma=g) for g in (0.0, 0.5, 1.0, 2.0)},
    "logit_adjusted": partial(losses.logit_adjusted, log_prior=LOG_PRIOR, tau=2.0),
    "ldam": partial(losses.ldam, margins=15 * losses.ldam_margins(MASS)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [30.0, 1e4])
@pytest.mark.parametrize("name", ALL_COSTS)
def test_gradients_are_finite_at_extreme_logits(name, scale, dtype):
    z = scale * torch.tensor([[1, -1, 0, 0], [-1, 1, 1, 1], [0, 0, 0, 0], [1, 0, -1, 0.5]])
    z = z.to(dtype).requires_grad_()
    costs = ALL_COSTS[name]
    if isinstance(costs, partial):
        keywords = {k: v.to(dtype) if torch.is_tensor(v) else v for k, v in costs.keywords.items()}
        costs = partial(costs.func, **keywords)
    value = costs(z)
    assert torch.isfinite(value).all()
    assert (value >= 0).all()
    value.sum().backward()
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("name", ALL_COSTS)
def test_gradients_by_finite_differences(name):
    z = logits(3, scale=1.0).requires_grad_()
    assert torch.autograd.gradcheck(ALL_COSTS[name], (z,))


@pytest.mark.parametrize("name", ALL_COSTS)
def test_costs_of_one_sample_do_not_depend_on_the_others(name):
    z = logits()
    together = ALL_COSTS[name](z)
    alone = torch.cat([ALL_COSTS[name](row[None]) for row in z])
    torch.testing.assert_close(together, alone)


def test_cosine_head():
    head = CosineHead(5, 3).double()
    features = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = head(features).detach().numpy()
    weight = head.weight.detach().numpy()
    for i, f in enumerate(features.numpy()):
        for k, w in enumerate(weight):
            cosine = f @ w / math.sqrt((f @ f) * (w @ w))
            assert got[i, k] == pytest.approx(30 * cosine)
    np.testing.assert_allclose(head(100 * features).detach().numpy(), got)


# ---------------------------------------------------------------- LabelLoss

WEIGHT = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
LATE = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)


def soft_mass(n=7, seed=1):
    """Soft labels times sample weights."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.dirichlet(np.ones(4), n) * rng.random((n, 1)) * 2)


def explicit_loss(z, mass, weight):
    total = 0.0
    for row, masses in zip(z.tolist(), mass.tolist(), strict=True):
        p = softmax(row)
        total += sum(
            m * w * -math.log(q) for m, w, q in zip(masses, weight.tolist(), p, strict=True)
        )
    return total / len(z)


def test_label_loss_of_soft_labels():
    z, mass = logits(), soft_mass()
    loss = LabelLoss(losses.cross_entropy, WEIGHT)
    assert float(loss(z, mass)) == pytest.approx(explicit_loss(z, mass, WEIGHT), rel=1e-12)


def test_label_loss_of_hard_labels_is_torch_s():
    z, y = logits(), torch.tensor([0, 1, 2, 3, 0, 2, 1])
    mass = torch.eye(4, dtype=torch.float64)[y]
    plain = LabelLoss(losses.cross_entropy, torch.ones(4, dtype=torch.float64))(z, mass)
    torch.testing.assert_close(plain, torch.nn.functional.cross_entropy(z, y))
    smooth = 0.9 * mass + 0.1 / 4
    torch.testing.assert_close(
        LabelLoss(losses.cross_entropy, torch.ones(4, dtype=torch.float64))(z, smooth),
        torch.nn.functional.cross_entropy(z, y, label_smoothing=0.1),
    )


def test_mixed_label_pays_the_mixture_of_both():
    z, first, second = logits(), soft_mass(seed=1), soft_mass(seed=2)
    loss = LabelLoss(losses.focal, WEIGHT)
    mixed = loss(z, 0.3 * first + 0.7 * second)
    torch.testing.assert_close(mixed, 0.3 * loss(z, first) + 0.7 * loss(z, second))


def test_deferred_weights_switch_at_their_step():
    z, mass = logits(), soft_mass()
    loss = LabelLoss(losses.cross_entropy, WEIGHT, LATE, switch=3)
    got = [float(loss(z, mass)) for _ in range(6)]
    early, late = explicit_loss(z, mass, WEIGHT), explicit_loss(z, mass, LATE)
    assert early != pytest.approx(late)
    assert got == pytest.approx([early] * 3 + [late] * 3)


def test_weights_that_never_switch():
    z, mass = logits(), soft_mass()
    loss = LabelLoss(losses.cross_entropy, WEIGHT)
    assert len({float(loss(z, mass)) for _ in range(4)}) == 1


def test_deferred_weights_from_the_first_step():
    z, mass = logits(), soft_mass()
    loss = LabelLoss(losses.cross_entropy, WEIGHT, LATE, switch=0)
    assert float(loss(z, mass)) == pytest.approx(explicit_loss(z, mass, LATE))


@pytest.mark.parametrize("n_before", [0, 2, 5])
def test_a_restored_loss_switches_on_time(n_before):
    z, mass = logits(), soft_mass()
    loss = LabelLoss(losses.cross_entropy, WEIGHT, LATE, switch=3)
    for _ in range(n_before):
        loss(z, mass)
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    restored = LabelLoss(losses.cross_entropy, torch.zeros_like(WEIGHT), torch.zeros_like(LATE), 3)
    restored.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(4):
        assert float(restored(z, mass)) == float(loss(z, mass))


def class_shades(counts=(24, 10, 4), seed=0):
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(len(counts)), counts)
    X = rng.integers(0, 60, (len(y), 8, 8)) + 60 * y[:, None, None]
    return X.astype(np.uint8), y


def fit(X, y, partly=False, **params):
    params = {"device": "cpu", "precision": "float32", "max_epochs": 5, **params}
    clf = SoftmaxClassifier(ConvNet((4, 8)), augment="none", batch_size=8, random_state=0, **params)
    return clf.partial_fit(X, y, classes=[0, 1, 2]) if partly else clf.fit(X, y)


@pytest.mark.parametrize(
    ("loss", "switch"),
    [
        (LDAMLoss(beta=0.99), 12),
        (LDAMLoss(reweight_after=None), None),
        ("cross_entropy", None),
        (CrossEntropyLoss(reweight_after=0.5, beta=0.99), 12),
        (FocalLoss(reweight_after=0.0, beta=0.99), 0),
        (ClassBalancedLoss(beta=0.99), 0),
    ],
    ids=str,
)
def test_the_fit_switches_where_asked(loss, switch):
    """25 steps: 5 epochs of 5 batches."""
    clf = fit(*class_shades(), loss=loss)
    criterion = clf.net_.criterion_.label_loss
    assert criterion.step == (0 if switch is None else 25)
    effective = of_unit_mean([24.0, 10.0, 4.0], beta=0.99)
    if switch is None:
        assert criterion.late_weight is None
        torch.testing.assert_close(criterion.weight, torch.ones(3))
    else:
        assert criterion.switch == switch
        torch.testing.assert_close(criterion.weight, torch.ones(3))
        torch.testing.assert_close(criterion.late_weight, effective)


def of_unit_mean(counts, beta=0.999, times=None):
    """Effective-number weights, times others, whose mean over the rows is 1."""
    counts = np.array(counts)
    raw = (1 - beta) / (1 - beta**counts) * (1 if times is None else np.array(times))
    return torch.tensor(raw * counts.sum() / (raw @ counts), dtype=torch.float32)


def test_class_weights_multiply():
    clf = fit(*class_shades(), class_weight={0: 1.0, 1: 2.0, 2: 3.0}, loss="class_balanced")
    expected = of_unit_mean([24.0, 10.0, 4.0], times=[1.0, 2.0, 3.0])
    torch.testing.assert_close(clf.net_.criterion_.label_loss.late_weight, expected)


def test_balanced_class_weights():
    clf = fit(*class_shades(), class_weight="balanced")
    expected = torch.tensor([38 / (3 * n) for n in (24, 10, 4)])
    torch.testing.assert_close(clf.net_.criterion_.label_loss.weight, expected)


# ---------------------------------------------------------------- the scale of class weights


def test_ten_classes_of_100_to_3_keep_the_step_at_the_switch():
    """Weights that sum to K, as effective numbers come, are .325 on average over these rows."""
    counts = np.round(100 * 0.03 ** (np.arange(10) / 9)).astype(int)
    X, y = class_shades(counts)
    clf = fit(X // 5, y, loss="ldam", max_epochs=2)
    late = clf.net_.criterion_.label_loss.late_weight.numpy().astype(float)
    assert late[y].mean() == pytest.approx(1, abs=1e-6)
    mass = torch.from_numpy(counts.astype(float))
    published = losses.effective_number_weights(mass, 0.999).numpy()
    assert published[y].mean() == pytest.approx(0.325, abs=0.001)
    # The authors' code divides each batch by the sum of its weights: of all rows, the same number.
    z = torch.randn(len(y), 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight, codes = torch.from_numpy(published), torch.from_numpy(y)
    theirs = torch.nn.functional.cross_entropy(z, codes, weight)
    ours = LabelLoss(losses.cross_entropy, torch.from_numpy(late))
    assert ours(z, torch.eye(10)[codes]).item() == pytest.approx(theirs.item(), rel=1e-6)


REWEIGHTED = [
    {"loss": "ldam"},
    {"loss": CrossEntropyLoss(reweight_after=0.5)},
    {"loss": ClassBalancedLoss(beta=0.9)},
    {"loss": "ldam", "class_weight": "balanced"},
    {"loss": FocalLoss(reweight_after=0.2), "class_weight": {0: 1e-6, 1: 3e-6, 2: 9e-6}},
    {"loss": "ldam", "mixup": "mixup"},
    {"loss": "ldam", "mixup": "balanced", "mixup_alpha": 2.0},
    {"loss": "class_balanced", "sampler": RandomOverSampler(sampling_strategy={2: 12})},
]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("params", REWEIGHTED, ids=str)
def test_what_a_batch_holds_weighs_1_on_average_before_and_after_the_switch(params, weighted):
    X, y = class_shades()
    rng = np.random.default_rng(0)
    weight = rng.uniform(0.2, 2, len(y)) if weighted else None
    seen = []

    class Spy(Callback):
        def on_batch_begin(self, net, batch=None, **kwargs):
            seen.append(batch[1].numpy().copy())

    n_epochs = 150 if "mixup" in params else 1  # but for mixup each row comes once an epoch
    params = {"device": "cpu", "precision": "float32", "max_epochs": n_epochs, **params}
    clf = SoftmaxClassifier(
        ConvNet((2,)), augment="none", batch_size=20, random_state=0, callbacks=[Spy()], **params
    ).fit(X, y, sample_weight=weight)
    mass, criterion = np.concatenate(seen), clf.net_.criterion_.label_loss
    for weights in (criterion.weight, criterion.late_weight):
        if weights is not None:
            unweighted = mass.sum(axis=1).mean()
            assert (mass @ weights.numpy()).mean() == pytest.approx(unweighted, rel=0.01)


def test_the_mean_is_over_the_rows_of_a_portion():
    """A class that a portion lacks has no rows: it has no say in the scale."""
    X, y = class_shades()
    clf = fit(X[y < 2], y[y < 2], partly=True, class_weight="balanced", loss="class_balanced")
    weight = clf.net_.criterion_.label_loss.weight.numpy()
    assert weight[y[y < 2]].mean() == pytest.approx(1, abs=1e-6)
    clf.partial_fit(X, y)
    assert clf.net_.criterion_.label_loss.weight.numpy()[y].mean() == pytest.approx(1, abs=1e-6)


def test_unit_mean_of_a_class_that_weighs_nothing():
    mass, weight = torch.tensor([3.0, 0, 5]), torch.tensor([0.0, 2, 0])
    assert torch.equal(losses.of_unit_mean(weight, mass), weight)
    with pytest.raises(ValueError, match="class_weight is 0 for every class"):
        fit(*class_shades(), class_weight={0: 0, 1: 0, 2: 0})


def sgd(**params):
    return {"optimizer": torch.optim.SGD, **params}


SCALED = {
    "softmax": lambda **p: SoftmaxClassifier(**p),
    "softmax, reweighted": lambda **p: SoftmaxClassifier(**p, loss="ldam"),
    "spmix": lambda **p: SPMixClassifier(**p, pairing="code"),
    "spmix, supcon": lambda **p: SPMixClassifier(**p, contrast=Contrast("supcon", weight=1.0)),
    "spmix, gpaco": lambda **p: SPMixClassifier(**p, contrast="gpaco", pairing="code"),
    "metric two-stage": lambda **p: MetricTwoStageClassifier(**p, metric_weight=1.0),
    "lmd": lambda **p: LMDClassifier(**p, relation_start=0.0, n_rounds=2),
    "amimv": lambda **p: AMIMVClassifier(**p, pretrain=None, fine_tune="full"),
}


@pytest.mark.parametrize("scale", [1e-9, 1e6])
@pytest.mark.parametrize("optimizer", [{}, sgd()], ids=["adamw", "sgd"])
@pytest.mark.parametrize("name", SCALED)
def test_only_the_ratios_of_class_weights_matter(name, optimizer, scale):
    """Else 1e-9 leaves weight decay alone at work, and 1e6 outweighs every other term."""
    X, y = class_shades((24, 12, 6))
    ratios = {0: 1.0, 1: 2.0, 2: 5.0}
    proba = []
    for factor in (1.0, scale):
        clf = SCALED[name](
            backbone=ConvNet((4,)), max_epochs=4, batch_size=16, augment="none", device="cpu",
            precision="float64", weight_decay=0.1, lr=1e-2, net_params=optimizer, random_state=0,
            class_weight={k: factor * w for k, w in ratios.items()},
        )  # fmt: skip
        proba.append(clf.fit(X, y).predict_proba(X))
    np.testing.assert_allclose(*proba, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("contrast", ["gpaco", "supcon", None])
def test_deferred_weights_switch_beside_a_contrast_too(contrast):
    X, y = class_shades()
    params = {"contrast": contrast, "pairing": "code", "mix_prob": 0.0, "max_epochs": 4}
    common = {"batch_size": 19, "augment": "none", "precision": "float64", "random_state": 0}
    early, late = (
        SPMixClassifier(
            ConvNet((4,)), **params, **common, loss=CrossEntropyLoss(reweight_after=after)
        ).fit(X, y)
        for after in (None, 0.5)
    )
    values = [[row["train_loss"] for row in clf.history_] for clf in (early, late)]
    assert values[0][:2] == values[1][:2]
    assert values[0][2] != values[1][2]


ABSENT = [
    *({"loss": loss} for loss in LOSSES),
    {"class_weight": "balanced"},
    {"loss": CrossEntropyLoss(reweight_after=0.0)},
    {"mixup": "balanced"},
    {"post_hoc_tau": 1.0},
]


@pytest.mark.parametrize("params", ABSENT, ids=str)
def test_a_portion_without_one_of_the_classes(params):
    """partial_fit may meet the rare class later: its share is 0 so far, not its loss NaN."""
    X, y = class_shades()
    clf = fit(X[y < 2], y[y < 2], partly=True, **params)
    assert np.isfinite(clf.history_[-1]["train_loss"])
    proba = clf.predict_proba(X)
    assert np.isfinite(proba).all()
    np.testing.assert_allclose(proba.sum(axis=1), 1, rtol=1e-6)
    clf.partial_fit(X, y)
    assert np.isfinite(clf.predict_proba(X)).all()


# ---------------------------------------------------------------- MixedBatches

TAIL = np.repeat([0, 1, 2], [80, 16, 4])


def batches_of(plan, rng, y=TAIL, weight=None):
    """Image i holds i everywhere; its target is the one-hot label times the weight."""
    array = np.broadcast_to(np.arange(len(y), dtype=np.float32)[:, None, None], (len(y), 4, 4))
    array = array.copy()
    mass = np.eye(3, dtype=np.float32)[y]
    mass *= 1 if weight is None else weight[:, None]
    return Batches(
        Images(array, infer_layout(array.shape), array.dtype),
        np.arange(len(y)),
        torch.from_numpy(mass.astype(np.float32)),
        plan,
        Context(
            Preprocessor(np.zeros(1), np.ones(1), dtype=torch.float32, device=torch.device("cpu")),
            (Augmentation(),),
            rng,
            torch.Generator().manual_seed(0),
        ),
    )


def mixed(kind, alpha=1.0, seed=0, size=10, weight=None):
    rng = np.random.default_rng(seed)
    n = len(TAIL)
    plain = batches_of(lambda rng: shuffled(n, size, rng), rng, weight=weight)
    if kind == "mixup":
        return MixedBatches(plain, alpha)
    steps = -(-n // size)
    partners = batches_of(lambda rng: class_balanced(TAIL, size, steps, rng), rng, weight=weight)
    return MixedBatches(plain, alpha, partners)


BOTH = pytest.mark.parametrize("kind", ["mixup", "balanced"])


@BOTH
def test_mixing_preserves_the_mass_of_each_row(kind):
    for images, mass in mixed(kind):
        assert images.dtype == mass.dtype == torch.float32
        torch.testing.assert_close(mass.sum(dim=1), torch.ones(len(images)))
        assert (mass >= 0).all()


@BOTH
def test_images_and_masses_mix_alike(kind):
    """Each image is constant, so its shade tells the mixture of rows that its label must show."""
    weight = np.ones(len(TAIL), np.float32)
    weight[TAIL == 2] = 5.0
    generator = mixed(kind, weight=weight)
    seen = []
    others = []

    def remember(batches, shades):
        moved = batches.moved
        batches.moved = lambda images, *how: (
            shades.append(images[:, 0, 0, 0].numpy().copy()) or moved(images, *how)
        )

    remember(generator.batches, seen)
    if generator.partners is not None:
        remember(generator.partners, others)
    eye = np.eye(3)
    checked = 0
    for images, mass in generator:
        own = seen[-1]
        values = images[:, 0, 0, 0].numpy()
        assert (images == images[:, :1, :1, :1]).all()  # one share for the whole image
        partners = own if generator.partners is None else others[-1][: len(own)]
        for i, (value, got) in enumerate(zip(values, mass.numpy(), strict=True)):
            # The partner is one of the rows it could be; for one of them shade and mass agree.
            candidates = partners if generator.partners is None else partners[i : i + 1]
            matches = []
            for other in candidates:
                share = 0.0 if other == own[i] else (value - own[i]) / (other - own[i])
                if -1e-4 <= share <= 1 + 1e-4:
                    rows = np.array([own[i], other]).astype(int)
                    expected = np.array([1 - share, share]) @ (weight[rows, None] * eye[TAIL[rows]])
                    matches.append(np.allclose(got, expected, atol=1e-3))
            assert any(matches)
            checked += 1
    assert checked == len(TAIL)


def test_balanced_mixup_raises_the_mass_of_the_tail():
    """By E[lambda] = alpha / (alpha + 1) of the way from the prior to balance."""
    prior = np.bincount(TAIL) / len(TAIL)
    for alpha in (0.2, 1.0, 3.0):
        batches = mixed("balanced", alpha)
        share = np.mean(
            [torch.cat([m for _, m in batches]).double().mean(dim=0).numpy() for _ in range(40)],
            axis=0,
        )
        expected = prior + alpha / (alpha + 1) * (1 / 3 - prior)
        np.testing.assert_allclose(share, expected, atol=0.02)
        assert share[2] > prior[2] * 1.5


def test_plain_mixup_keeps_the_prior():
    batches = mixed("mixup", 1.0)
    share = np.mean(
        [torch.cat([m for _, m in batches]).double().mean(dim=0).numpy() for _ in range(40)], axis=0
    )
    np.testing.assert_allclose(share, np.bincount(TAIL) / len(TAIL), atol=0.02)


def test_balanced_partners_come_from_beyond_the_batch():
    """Its partners are drawn from all rows, not from the batch itself."""
    rng = np.random.default_rng(0)
    head = [np.arange(20)]  # the batch: head class only
    tail = [np.arange(80, 100)]
    batches = MixedBatches(
        batches_of(lambda rng: head, rng), 1.0, batches_of(lambda rng: tail, rng)
    )
    ((images, mass),) = batches
    assert (mass[:, 1:].sum(dim=1) > 0).all()
    assert (images[:, 0, 0, 0] > torch.arange(20)).all()


@pytest.mark.parametrize("size", [10, 25])
def test_plain_mixup_mixes_different_rows(size):
    """A batch whose every row met itself would not be mixed at all."""
    batches = mixed("mixup", 1.0, size=size)
    n_mixed = n_batches = 0
    for images, _ in batches:
        shades = images[:, 0, 0, 0]
        n_mixed += bool(((shades - shades.round()).abs() > 1e-4).any())
        n_batches += 1
    assert n_mixed == n_batches


@BOTH
def test_small_alpha_hardly_mixes(kind):
    shares = torch.cat([mass.max(dim=1).values for _, mass in mixed(kind, 1e-3)])
    assert (shares > 0.999).float().mean() > 0.95


@BOTH
def test_same_seed_same_mixture(kind):
    for (a, m), (b, n) in zip(mixed(kind), mixed(kind), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(m, n)


@BOTH
def test_as_many_rows_as_without_mixing(kind):
    """Uneven batches as well: 100 rows in batches of 9 or 8."""
    sizes = [len(images) for images, _ in mixed(kind, size=9)]
    assert sum(sizes) == 100
    assert set(sizes) <= {8, 9}


def test_mixed_vectors():
    rng = np.random.default_rng(0)
    X = rng.random((30, 5))
    y = np.arange(30) % 3
    for kind in ("mixup", "balanced"):
        clf = SoftmaxClassifier("mlp", mixup=kind, max_epochs=2, device="cpu", random_state=0)
        assert np.isfinite(clf.fit(X, y).history_[-1]["train_loss"])
