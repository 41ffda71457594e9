"""Rebalanced heads: each against its objective written out, and the invariants of rebalancing."""

from __future__ import annotations

import math
from functools import partial
from inspect import signature

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from sklearn.base import BaseEstimator, clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_medimb import (
    BalancedSoftmax,
    ClassifierRetraining,
    LearnableWeightScaling,
    LogitAdjustment,
    NearestClassMean,
    TauNormalization,
    VirtualFeatureCalibration,
)
from sklearn_medimb.over_sampling._virtual_features import ClassGaussians
from sklearn_medimb.rebalance import HEADS, resolve_head
from sklearn_medimb.rebalance._base import Rows, softmax_regression
from sklearn_medimb.rebalance._virtual import expected_cross_entropy_bound
from tests.gaussians import KINDS, long_tailed_gaussians

ALL = pytest.mark.parametrize("name", HEADS)
WEIGHABLE = [name for name in HEADS if name != "virtual"]
KEEPING = ["lws", "tau_norm", "logit_adjust", "none"]
COSTED = [ClassifierRetraining, BalancedSoftmax, VirtualFeatureCalibration]


def tail(counts=(30, 12, 5), d=4, seed=0, spread=1.5):
    """Overlapping Gaussian classes with features of different scale and offset."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    X = rng.normal(size=(len(y), d)) + spread * rng.normal(size=(len(counts), d))[y]
    return X * np.geomspace(0.1, 10, d) + np.linspace(-5, 5, d), y


def given(n_classes=3, d=4, seed=1):
    """A head of stage one."""
    rng = np.random.default_rng(seed)
    return {
        "coef_init": rng.normal(size=(n_classes, d)),
        "intercept_init": rng.normal(size=n_classes),
    }


# ---------------------------------------------------------------- objectives, one row at a time


def standardised(X, weight):
    mean = sum(w * x for w, x in zip(weight, X, strict=True))
    variance = sum(w * (x - mean) ** 2 for w, x in zip(weight, X, strict=True))
    return (X - mean) / np.sqrt(variance), mean, np.sqrt(variance)


def cost_of(z, k):
    """Cross-entropy of one row of logits."""
    top = max(z)
    return math.log(sum(math.exp(v - top) for v in z)) + top - z[k]


def objective(theta, Z, y, weight, alpha, n_classes, shift=None):
    """``sum_i w_i CE_i + alpha / 2 |W|^2``; `shift` is added to the logits."""
    d = Z.shape[1]
    W, b = theta[: n_classes * d].reshape(n_classes, d), theta[n_classes * d :]
    shift = np.zeros(n_classes) if shift is None else shift
    total = sum(
        w * cost_of((W @ z + b + shift).tolist(), k) for w, z, k in zip(weight, Z, y, strict=True)
    )
    return total + alpha / 2 * sum(v * v for v in W.ravel().tolist())


def minimum(X, y, weight, alpha, n_classes, shift=None):
    """Head on the features themselves, with numerical gradients only."""
    Z, mean, std = standardised(X, weight)
    start = np.zeros(n_classes * (X.shape[1] + 1))
    args = (Z, y, weight, alpha, n_classes, shift)
    found = minimize(objective, start, args, method="L-BFGS-B", jac="3-point", tol=1e-14)
    W = found.x[: n_classes * X.shape[1]].reshape(n_classes, -1) / std
    return W, found.x[n_classes * X.shape[1] :] - W @ mean


def assert_same_head(head, coef, intercept, tol=1e-4):
    """Up to a common offset, which no softmax shows; relative to the largest coefficient."""
    np.testing.assert_allclose(head.coef_, coef, atol=tol * np.abs(coef).max())
    offsets = head.intercept_ - head.intercept_.mean(), intercept - intercept.mean()
    np.testing.assert_allclose(*offsets, atol=tol * max(np.abs(offsets[1]).max(), 1))


def balanced_weights(y, cost=None):
    counts = np.bincount(y)
    cost = np.ones(len(counts)) if cost is None else np.array(cost, float)
    return (cost / cost.sum() / counts)[y]


@pytest.mark.parametrize("alpha", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("counts", [(18, 7), (18, 9, 5)], ids=["K=2", "K=3"])
def test_softmax_regression_solves_its_objective(counts, alpha):
    X, y = tail(counts)
    weight = np.random.default_rng(2).random(len(y)) + 0.1
    weight /= weight.sum()
    head, n_iter = softmax_regression(Rows(X, y, weight, len(counts)), alpha)
    coef, intercept = minimum(X, y, weight, alpha, len(counts))
    model = ClassifierRetraining()
    model.coef_, model.intercept_ = head.coef, head.intercept
    assert_same_head(model, coef, intercept)
    assert n_iter > 0


@pytest.mark.parametrize("counts", [(40, 15), (40, 15, 6), (30, 20, 10, 5)])
def test_gradient_of_the_objective_is_zero_at_the_solution(counts):
    X, y = tail(counts)
    n_classes, alpha = len(counts), 0.1
    weight = np.random.default_rng(2).random(len(y))
    weight /= weight.sum()
    head, _ = softmax_regression(Rows(X, y, weight, n_classes), alpha)
    Z, mean, std = standardised(X, weight)
    W, b = head.coef * std, head.intercept + head.coef @ mean
    by_coef, by_intercept = alpha * W, np.zeros(n_classes)
    for w, z, k in zip(weight, Z, y, strict=True):
        powers = np.exp(W @ z + b)
        p = powers / powers.sum() - np.eye(n_classes)[k]
        by_coef = by_coef + w * np.outer(p, z)
        by_intercept += w * p
    assert np.abs(by_coef).max() < 2e-6
    assert np.abs(by_intercept).max() < 2e-6
    assert np.abs(W).max() > 0.1  # it is a solution, not the empty head


# ---------------------------------------------------------------- crt


@pytest.mark.parametrize("counts", [(24, 8), (24, 9, 5)], ids=["K=2", "K=3"])
def test_crt_is_the_minimum_of_the_class_balanced_loss(counts):
    X, y = tail(counts)
    head = ClassifierRetraining(alpha=0.2).fit(X, y)
    assert_same_head(head, *minimum(X, y, balanced_weights(y), 0.2, len(counts)))


def test_crt_with_costs_is_the_minimum_of_the_costed_loss():
    X, y = tail((24, 9, 5))
    head = ClassifierRetraining(class_weight={0: 1.0, 1: 4.0, 2: 0.5}).fit(X, y)
    assert_same_head(head, *minimum(X, y, balanced_weights(y, [1, 4, 0.5]), 0.1, 3))


def test_crt_forgets_the_head_of_stage_one():
    X, y = tail()
    plain = ClassifierRetraining().fit(X, y)
    for seed in (1, 2):
        other = ClassifierRetraining().fit(X, y, **given(seed=seed))
        assert np.array_equal(other.coef_, plain.coef_)
        assert np.array_equal(other.intercept_, plain.intercept_)


@pytest.mark.parametrize("times", [2, 5])
def test_crt_does_not_see_how_often_a_class_is_there(times):
    X, y = tail()
    rows = np.concatenate([np.arange(len(y)), *[np.flatnonzero(y == 1)] * (times - 1)])
    one, two = (ClassifierRetraining().fit(X[part], y[part]) for part in (slice(None), rows))
    assert_same_head(two, one.coef_, one.intercept_)
    # Plain logistic regression does see it.
    one, two = (LogitAdjustment(tau=0.0).fit(X[part], y[part]) for part in (slice(None), rows))
    assert np.abs(one.predict_proba(X) - two.predict_proba(X)).max() > 0.02


# ---------------------------------------------------------------- lws


def test_lws_changes_nothing_but_the_scale_of_the_logits():
    X, y = tail()
    start = given()
    head = LearnableWeightScaling().fit(X, y, **start)
    ratio = head.coef_ / start["coef_init"]
    np.testing.assert_allclose(ratio, np.tile(head.scale_[:, np.newaxis], 4), rtol=1e-12)
    np.testing.assert_allclose(head.intercept_, head.scale_ * start["intercept_init"], rtol=1e-12)
    assert np.abs(head.scale_ - 1).max() > 0.1
    expected = head.scale_ * (X @ start["coef_init"].T + start["intercept_init"])
    np.testing.assert_allclose(head.decision_function(X), expected)


def scaled_loss(scale, logits, y, alpha):
    """Class-balanced cross-entropy of scaled logits, and the penalty that draws to 1."""
    weight = balanced_weights(y)
    total = sum(
        w * cost_of([s * v for s, v in zip(scale, z, strict=True)], k)
        for w, z, k in zip(weight, logits.tolist(), y, strict=True)
    )
    return total + alpha / 2 * sum((s - 1) ** 2 for s in scale)


def slopes(function, at, step=1e-5):
    """Central differences."""
    eye = np.eye(len(at)) * step
    return np.array([(function(at + e) - function(at - e)) / (2 * step) for e in eye])


@pytest.mark.parametrize("alpha", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_lws_scales_are_the_minimum_of_the_balanced_loss(n_classes, alpha):
    X, y = tail((30, 12, 5)[:n_classes])
    X, start = StandardScaler().fit_transform(X), given(n_classes)
    logits = X @ start["coef_init"].T + start["intercept_init"]
    head = LearnableWeightScaling(alpha=alpha).fit(X, y, **start)
    loss = partial(scaled_loss, logits=logits, y=y, alpha=alpha)
    assert np.abs(slopes(loss, head.scale_)).max() < 1e-4
    assert np.abs(slopes(loss, np.ones(n_classes))).max() > 0.01
    assert loss(head.scale_) < loss(np.ones(n_classes))


def test_a_strong_penalty_leaves_the_scales_at_one():
    X, y = tail()
    head = LearnableWeightScaling(alpha=1e8).fit(X, y, **given())
    np.testing.assert_allclose(head.scale_, 1, atol=1e-5)


# ---------------------------------------------------------------- tau_norm


def test_tau_zero_leaves_the_given_head_bit_for_bit():
    X, y = tail()
    start = given()
    for head in (TauNormalization(0.0), LogitAdjustment(0.0), resolve_head("none")):
        head.fit(X, y, **start)
        assert np.array_equal(head.coef_, start["coef_init"])
        assert np.array_equal(head.intercept_, start["intercept_init"])
        assert head.n_iter_ == 0


@pytest.mark.parametrize("tau", [-0.5, 0.3, 1.0, 2.0])
def test_tau_norm_is_its_formula(tau):
    X, y = tail()
    start = given()
    head = TauNormalization(tau).fit(X, y, **start)
    for k, (w, b) in enumerate(zip(*start.values(), strict=True)):
        norm = math.sqrt(sum(v * v for v in w)) ** tau
        np.testing.assert_allclose(head.coef_[k], [v / norm for v in w], rtol=1e-12)
        assert head.intercept_[k] == pytest.approx(b / norm, rel=1e-12)


def test_tau_one_makes_all_class_vectors_equally_long():
    X, y = tail((200, 30, 5))
    before = TauNormalization(0.0).fit(X, y)
    after = TauNormalization(1.0).fit(X, y)
    norms = np.linalg.norm(before.coef_, axis=1)
    assert norms.max() > 1.1 * norms.min()
    np.testing.assert_allclose(np.linalg.norm(after.coef_, axis=1), 1, rtol=1e-12)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_a_class_vector_of_zeros_stays_finite(tau):
    X, y = tail()
    start = given()
    start["coef_init"][1] = 0
    head = TauNormalization(tau).fit(X, y, **start)
    assert np.isfinite(head.predict_proba(X)).all()
    assert np.isfinite(head.coef_).all()
    assert np.isfinite(head.intercept_).all()


# ---------------------------------------------------------------- ncm


def test_ncm_is_the_class_of_the_largest_cosine():
    X, y = tail((20, 9, 1))
    head = NearestClassMean(temperature=0.3).fit(X, y)
    means = [X[y == k].mean(axis=0) for k in range(3)]
    cosines = np.array(
        [[x @ m / math.sqrt((x @ x) * (m @ m)) for m in means] for x in X],
    )
    np.testing.assert_allclose(head.decision_function(X), cosines / 0.3, rtol=1e-10)
    np.testing.assert_array_equal(head.predict(X), cosines.argmax(axis=1))


def test_ncm_ignores_the_length_of_a_row_at_predict():
    X, y = tail()
    head = NearestClassMean().fit(X, y)
    scaled = X * np.random.default_rng(0).uniform(1e-3, 1e3, (len(X), 1))
    np.testing.assert_allclose(head.predict_proba(scaled), head.predict_proba(X), rtol=1e-9)


def test_ncm_of_a_row_of_zeros_is_undecided():
    X, y = tail()
    proba = NearestClassMean().fit(X, y).predict_proba(np.zeros((1, 4)))
    np.testing.assert_allclose(proba, 1 / 3)


def test_ncm_ignores_the_size_of_the_classes():
    X, y = tail()
    rows = np.concatenate([np.arange(len(y)), *[np.flatnonzero(y == 0)] * 9])
    one, two = NearestClassMean().fit(X, y), NearestClassMean().fit(X[rows], y[rows])
    np.testing.assert_allclose(one.coef_, two.coef_, rtol=1e-12)


# ---------------------------------------------------------------- logit_adjust, balanced_softmax


@pytest.mark.parametrize("tau", [0.5, 1.0, -1.0])
def test_logit_adjustment_is_its_formula(tau):
    X, y = tail()
    start = given()
    head = LogitAdjustment(tau).fit(X, y, **start)
    assert np.array_equal(head.coef_, start["coef_init"])
    for k, b in enumerate(start["intercept_init"]):
        share = sum(label == k for label in y) / len(y)
        assert head.intercept_[k] == pytest.approx(b - tau * math.log(share), rel=1e-12)


def test_none_is_the_given_head_or_plain_logistic_regression():
    X, y = tail()
    start = given()
    logits = X @ start["coef_init"].T + start["intercept_init"]
    np.testing.assert_array_equal(resolve_head("none").fit(X, y, **start).logits(X), logits)
    weight = np.full(len(y), 1 / len(y))
    assert_same_head(resolve_head("none").fit(X, y), *minimum(X, y, weight, 0.1, 3))


@pytest.mark.parametrize("counts", [(24, 8), (24, 9, 5)], ids=["K=2", "K=3"])
def test_balanced_softmax_is_the_minimum_of_its_loss(counts):
    """Ren et al., eq. 4: cross-entropy of z + log(prior), found without the shortcut."""
    X, y = tail(counts)
    weight = np.full(len(y), 1 / len(y))
    log_prior = np.log(np.array(counts) / sum(counts))
    expected = minimum(X, y, weight, 0.1, len(counts), shift=log_prior)
    assert_same_head(BalancedSoftmax().fit(X, y), *expected)


def test_balanced_softmax_is_logit_adjustment_of_a_converged_head():
    X, y = tail()
    one = BalancedSoftmax(alpha=0.3).fit(X, y)
    two = LogitAdjustment(alpha=0.3).fit(X, y)
    np.testing.assert_allclose(one.predict_proba(X), two.predict_proba(X), rtol=1e-9)
    # Unlike that one it does not keep a given head.
    three = BalancedSoftmax(alpha=0.3).fit(X, y, **given())
    assert np.array_equal(one.coef_, three.coef_)


# ---------------------------------------------------------------- virtual: the bound


def gaussians(n_classes=3, d=4, seed=0, size=1.0):
    """A head, means, covariance matrices, and what multiplies by them."""
    rng = np.random.default_rng(seed)
    coef, intercept = rng.normal(size=(n_classes, d)), rng.normal(size=n_classes)
    means = rng.normal(size=(n_classes, d))
    sigmas = []
    for n_rows in (2, d, 0, 7)[:n_classes]:
        rows = math.sqrt(size) * 0.5 * rng.normal(size=(n_rows, d))
        sigmas.append(rows.T @ rows + np.diag(size * rng.uniform(0, 0.5, d) * (n_rows != d)))
    products = [lambda vectors, sigma=sigma: vectors @ sigma for sigma in sigmas]
    cost = rng.dirichlet(np.ones(n_classes))
    return coef, intercept, means, products, sigmas, cost


def explicit_bound(coef, intercept, means, sigmas, cost):
    total = 0.0
    for k, (mean, sigma) in enumerate(zip(means, sigmas, strict=True)):
        powers = 0.0
        for j in range(len(coef)):
            d = coef[j] - coef[k]
            powers += math.exp(d @ mean + intercept[j] - intercept[k] + d @ sigma @ d / 2)
        total += cost[k] * math.log(powers)
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n_classes", [2, 3, 4])
def test_bound_and_its_gradient(n_classes, seed):
    coef, intercept, means, products, sigmas, cost = gaussians(n_classes, seed=seed)
    value, *gradient = expected_cross_entropy_bound(coef, intercept, means, products, cost)
    assert value == pytest.approx(explicit_bound(coef, intercept, means, sigmas, cost), rel=1e-10)

    def of(flat):
        W, b = flat[: coef.size].reshape(coef.shape), flat[coef.size :]
        return explicit_bound(W, b, means, sigmas, cost)

    expected = slopes(of, np.concatenate([coef.ravel(), intercept]))
    found = np.concatenate([part.ravel() for part in gradient])
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


def drawn_cross_entropy(coef, intercept, means, sigmas, cost, n=200_000):
    """Monte Carlo, with its standard error."""
    rng = np.random.default_rng(0)
    value, variance = 0.0, 0.0
    for k, (mean, sigma) in enumerate(zip(means, sigmas, strict=True)):
        logits = rng.multivariate_normal(mean, sigma, n, method="eigh") @ coef.T + intercept
        costs = np.log(np.exp(logits - logits[:, [k]]).sum(axis=1))
        value += cost[k] * costs.mean()
        variance += cost[k] ** 2 * costs.var() / n
    return value, math.sqrt(variance)


def test_bound_lies_above_the_expected_cross_entropy_and_meets_it_at_small_covariance():
    gaps = []
    for size in (1.0, 0.1, 0.01):
        coef, intercept, means, products, sigmas, cost = gaussians(size=size)
        bound, *_ = expected_cross_entropy_bound(coef, intercept, means, products, cost)
        drawn, error = drawn_cross_entropy(coef, intercept, means, sigmas, cost)
        assert bound > drawn - 4 * error
        gaps.append(bound - drawn)
    assert gaps[0] > 0.05  # it is a bound, not the value
    assert gaps[0] > 3 * gaps[1] > 0
    assert abs(gaps[2]) < 0.005


def test_bound_without_variance_is_cross_entropy_at_the_means():
    coef, intercept, means, _, _, cost = gaussians()
    nothing = [np.zeros_like] * 3
    value, *_ = expected_cross_entropy_bound(coef, intercept, means, nothing, cost)
    logits = means @ coef.T + intercept
    expected = sum(c * cost_of(z, k) for k, (c, z) in enumerate(zip(cost, logits, strict=True)))
    assert value == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------- virtual: the head


@pytest.mark.parametrize("covariance", KINDS)
def test_virtual_head_is_the_minimum_of_the_bound(covariance):
    X, y = tail()
    head = VirtualFeatureCalibration(covariance=covariance, alpha=0.05).fit(X, y)
    Z, mean, std = standardised(X, np.full(len(y), 1 / len(y)))
    classes = ClassGaussians(Z, y, covariance=covariance, eps=1e-2)
    sigmas = [rows.T @ rows + np.diag(v) for rows, v in map(classes.factor, range(3))]
    means = [Z[y == k].mean(axis=0) for k in range(3)]

    def loss(flat):
        W, b = flat[:12].reshape(3, 4), flat[12:]
        return explicit_bound(W, b, means, sigmas, [1 / 3] * 3) + 0.05 / 2 * (W**2).sum()

    at = np.concatenate([(head.coef_ * std).ravel(), head.intercept_ + head.coef_ @ mean])
    assert np.abs(slopes(loss, at)).max() < 2e-4
    assert np.abs(slopes(loss, 0 * at)).max() > 0.1


@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_classes_without_variance_are_fitted_at_their_means(covariance):
    """Then there is nothing virtual: the head is that of the rows themselves."""
    means = np.random.default_rng(0).normal(size=(3, 4))
    y = np.repeat([0, 1, 2], 5)
    virtual = VirtualFeatureCalibration(covariance=covariance, eps=0.0).fit(means[y], y)
    retrained = ClassifierRetraining().fit(means[y], y)
    assert_same_head(virtual, retrained.coef_, retrained.intercept_, tol=1e-3)


def test_virtual_head_does_not_depend_on_where_it_starts():
    X, y = tail()
    one = VirtualFeatureCalibration().fit(X, y)
    two = VirtualFeatureCalibration().fit(X, y, **given())
    np.testing.assert_allclose(one.predict_proba(X), two.predict_proba(X), atol=1e-3)


def test_draws_and_bound_agree():
    """With the published number of draws: few features take many steps."""
    X, y = tail((80, 30, 12), spread=3.0)
    analytic = VirtualFeatureCalibration().fit(X, y)
    sampled = VirtualFeatureCalibration("sampled", n_per_class=50_000, random_state=0).fit(X, y)
    assert (analytic.predict(X) == sampled.predict(X)).mean() > 0.97
    assert np.abs(analytic.predict_proba(X) - sampled.predict_proba(X)).max() < 0.1
    elsewhere = np.random.default_rng(1).permuted(np.tile(X, (10, 1)), axis=0)
    assert (analytic.predict(elsewhere) == sampled.predict(elsewhere)).mean() > 0.93


def test_draws_are_seeded():
    X, y = tail()
    options = {"m_step": "sampled", "n_per_class": 300}
    one, two, other = (
        VirtualFeatureCalibration(**options, random_state=seed).fit(X, y).coef_
        for seed in (1, 1, 2)
    )
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


def test_draws_start_from_the_given_head():
    """A start at the minimum ends nearer to it than one from zero."""
    X, y = tail()
    best = VirtualFeatureCalibration().fit(X, y)
    start = {"coef_init": best.coef_, "intercept_init": best.intercept_}
    head = VirtualFeatureCalibration("sampled", n_per_class=200, random_state=0)
    ends = [head.fit(X, y, **given).coef_ for given in ({}, start)]
    assert head.n_iter_ == 100
    away = [np.linalg.norm(end - best.coef_) for end in ends]
    assert away[1] < away[0]


def test_virtual_head_beats_plain_training_and_shrinkage_the_own_covariance():
    """The method's experiment: 500 : 150 : 50 : 15 : 5 samples in 128 dimensions."""
    scores = {"plain": [], "full": [], "shrunk": []}
    for seed in range(3):
        X, y, X_test, y_test = long_tailed_gaussians(seed)
        heads = {name: VirtualFeatureCalibration(covariance=name) for name in ("full", "shrunk")}
        for name, head in {"plain": LogitAdjustment(tau=0.0), **heads}.items():
            predicted = head.fit(X, y).predict(X_test)
            scores[name].append(balanced_accuracy_score(y_test, predicted))
    plain, own, shrunk = (np.mean(values) for values in scores.values())
    assert own >= plain + 0.05
    assert shrunk >= plain + 0.05
    assert shrunk >= own


# ---------------------------------------------------------------- class_weight


SAMPLED = partial(VirtualFeatureCalibration, "sampled", random_state=0)


@pytest.mark.parametrize("Head", [*COSTED, SAMPLED])
@pytest.mark.parametrize("costly", [0, 2])
def test_a_costly_class_is_predicted_more_often(Head, costly):
    X, y = tail((40, 40, 40), spread=0.7)
    shares = [
        (Head(class_weight=weight).fit(X, y).predict(X) == costly).mean()
        for weight in ({costly: 0.1}, None, {costly: 10.0})
    ]
    assert shares[0] < shares[1] - 0.05
    assert shares[1] < shares[2] - 0.05


@pytest.mark.parametrize("Head", COSTED)
def test_scale_of_costs_and_the_word_balanced_change_nothing(Head):
    X, y = tail()
    plain = Head().fit(X, y)
    for weight in ("balanced", {0: 7.0, 1: 7.0, 2: 7.0}):
        other = Head(class_weight=weight).fit(X, y)
        np.testing.assert_allclose(other.predict_proba(X), plain.predict_proba(X), atol=1e-6)


def test_costs_shift_the_offsets_of_balanced_softmax():
    """Cost-sensitive decisions of a calibrated head: log-odds move by the log of the cost ratio."""
    X, y = tail()
    plain, costed = BalancedSoftmax().fit(X, y), BalancedSoftmax(class_weight={2: 5.0}).fit(X, y)
    shift = costed.logits(X) - plain.logits(X)
    np.testing.assert_allclose(shift[:, 2] - shift[:, 0], math.log(5), rtol=1e-9)
    np.testing.assert_allclose(shift[:, 1] - shift[:, 0], 0, atol=1e-9)


@pytest.mark.parametrize("Head", COSTED)
def test_costs_go_by_label(Head):
    X, y = tail()
    names = np.array(["nevus", "keratosis", "melanoma"])[y]  # not in alphabetical order
    one = Head(class_weight={2: 9.0}).fit(X, y)
    two = Head(class_weight={"melanoma": 9.0}).fit(X, names)
    order = np.searchsorted(two.classes_, ["nevus", "keratosis", "melanoma"])
    np.testing.assert_allclose(one.predict_proba(X), two.predict_proba(X)[:, order], atol=1e-3)


@pytest.mark.parametrize("Head", COSTED)
def test_a_class_of_no_cost_is_not_predicted(Head):
    X, y = tail()
    head = Head(class_weight={0: 0.0}).fit(X, y)
    assert np.isfinite(head.predict_proba(X)).all()
    assert (head.predict(X) == 0).mean() < 0.1 < (Head().fit(X, y).predict(X) == 0).mean()


@pytest.mark.parametrize("Head", COSTED)
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({0: 0, 1: 0, 2: 0}, "class_weight is 0 for every class"),
        ({0: 1, 7: 2}, r"\[7\] that y lacks"),
        ({0: -1}, "non-negative"),
        ({0: np.inf}, "non-negative"),
        ("equal", "'class_weight' parameter"),
    ],
    ids=str,
)
def test_wrong_costs(Head, weight, message):
    with pytest.raises(ValueError, match=message):
        Head(class_weight=weight).fit(*tail())


# ---------------------------------------------------------------- sample_weight


@pytest.mark.parametrize("start", [{}, given()], ids=["alone", "given"])
@pytest.mark.parametrize("name", WEIGHABLE)
def test_a_weight_is_a_number_of_rows(name, start):
    X, y = tail()
    times = np.random.default_rng(3).integers(0, 4, len(y))
    times[[np.flatnonzero(y == k)[0] for k in range(3)]] = 1
    rows = np.repeat(np.arange(len(y)), times)
    weighted = resolve_head(name).fit(X, y, sample_weight=times, **start)
    repeated = resolve_head(name).fit(X[rows], y[rows], **start)
    assert_same_head(weighted, repeated.coef_, repeated.intercept_)
    assert weighted.loss_ == pytest.approx(repeated.loss_, rel=1e-4)
    # Not only by chance: weights do act, but where the given head is the result.
    if not start or name not in ("tau_norm", "none"):
        plain = resolve_head(name).fit(X, y, **start)
        gap = np.abs(plain.predict_proba(X) - weighted.predict_proba(X)).max()
        assert gap > 1e-3


@pytest.mark.parametrize("name", WEIGHABLE)
def test_rows_of_no_weight_are_as_if_absent(name):
    X, y = tail()
    X_odd = np.vstack([X, np.full((3, 4), 1e6)])
    y_odd = np.append(y, [0, 1, 7])  # one of them is of a class of its own
    weight = np.append(np.full(len(y), 0.25), [0, 0, 0])
    one = resolve_head(name).fit(X, y)
    two = resolve_head(name).fit(X_odd, y_odd, sample_weight=weight)
    assert two.classes_.tolist() == [0, 1, 2]
    np.testing.assert_allclose(two.predict_proba(X), one.predict_proba(X), rtol=1e-6)


@pytest.mark.parametrize("name", WEIGHABLE)
def test_weights_must_leave_two_classes(name):
    X, y = tail()
    with pytest.raises(ValueError, match=r"at least 2 classes.*1 class: \[1\]"):
        resolve_head(name).fit(X, y, sample_weight=np.where(y == 1, 1, 0))
    with pytest.raises(ValueError, match=r"at least 2 classes|non-zero"):
        resolve_head(name).fit(X, y, sample_weight=np.zeros(len(y)))


def test_negative_weights_are_refused():
    X, y = tail()
    with pytest.raises(ValueError, match=r"[Nn]egative"):
        ClassifierRetraining().fit(X, y, sample_weight=np.where(y == 0, -1, 1))


def test_virtual_head_takes_no_weights():
    assert "sample_weight" not in signature(VirtualFeatureCalibration.fit).parameters
    for name in WEIGHABLE:
        assert "sample_weight" in signature(resolve_head(name).fit).parameters


# ---------------------------------------------------------------- what all heads share


@ALL
@pytest.mark.parametrize("n_classes", [2, 3])
def test_scores_probabilities_and_labels_fit_together(name, n_classes):
    X, y = tail((30, 12, 5)[:n_classes])
    labels = np.array(["b", "c", "a"])[y]
    head = resolve_head(name).fit(X, labels, **given(n_classes))
    assert head.classes_.tolist() == sorted(set(labels.tolist()))
    proba, scores = head.predict_proba(X), head.decision_function(X)
    np.testing.assert_allclose(proba.sum(axis=1), 1, rtol=1e-12)
    if n_classes == 2:
        np.testing.assert_allclose(scores, np.log(proba[:, 1] / proba[:, 0]), rtol=1e-6, atol=1e-9)
        assert scores.shape == (len(X),)
    else:
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        np.testing.assert_allclose(powers / powers.sum(axis=1, keepdims=True), proba, rtol=1e-9)
    np.testing.assert_array_equal(head.predict(X), head.classes_[proba.argmax(axis=1)])
    assert head.coef_.shape == (n_classes, 4)


@ALL
def test_strings_are_learned_as_numbers_are(name):
    X, y = tail()
    names = np.array(["a", "b", "c"])[y]
    one, two = resolve_head(name).fit(X, y), resolve_head(name).fit(X, names)
    np.testing.assert_array_equal(np.array(["a", "b", "c"])[one.predict(X)], two.predict(X))
    assert np.array_equal(one.coef_, two.coef_)


@ALL
def test_loss_is_the_balanced_cross_entropy_of_the_training_rows(name):
    X, y = tail()
    head = resolve_head(name).fit(X, y, **given())
    expected = sum(
        w * cost_of(z, k) for w, z, k in zip(balanced_weights(y), head.logits(X), y, strict=True)
    )
    assert head.loss_ == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", ["crt", "balanced_softmax", "virtual"])
def test_a_head_that_is_fitted_anew_ignores_scale_and_offset_of_features(name):
    X, y = tail()
    A, b = np.geomspace(1e-4, 1e4, 4), np.array([1e3, 0, -1, 5])
    one, two = resolve_head(name).fit(X, y), resolve_head(name).fit(X * A + b, y)
    np.testing.assert_allclose(two.predict_proba(X * A + b), one.predict_proba(X), atol=1e-4)


@pytest.mark.parametrize("name", ["crt", "balanced_softmax", "virtual", "logit_adjust"])
def test_rebalancing_finds_the_tail(name):
    X, y, X_test, y_test = long_tailed_gaussians(0, counts=(300, 30, 10), d=20)
    plain = balanced_accuracy_score(y_test, resolve_head("none").fit(X, y).predict(X_test))
    found = balanced_accuracy_score(y_test, resolve_head(name).fit(X, y).predict(X_test))
    assert found > plain + 0.1


@ALL
def test_dataframe_columns_are_checked(name):
    X, y = tail()
    frame = pd.DataFrame(X, columns=list("abcd"))
    head = resolve_head(name).fit(frame, y)
    assert head.feature_names_in_.tolist() == list("abcd")
    with pytest.raises(ValueError, match="feature names"):
        head.predict(frame[list("dcba")])
    with pytest.raises(ValueError, match="4 features"):
        resolve_head(name).fit(X, y).predict(X[:, :3])


@ALL
def test_not_fitted(name):
    with pytest.raises(NotFittedError):
        resolve_head(name).predict(np.zeros((1, 4)))


@ALL
def test_clones_and_input_are_left_alone(name):
    X, y = tail()
    head, start = resolve_head(name), given()
    before = X.copy(), y.copy(), start["coef_init"].copy(), start["intercept_init"].copy()
    params = head.get_params()
    head.fit(X, y, **start)
    assert head.get_params() == params
    assert clone(head).get_params() == params
    for one, two in zip(before, (X, y, *start.values()), strict=True):
        assert np.array_equal(one, two)


@pytest.mark.parametrize("name", KEEPING)
def test_a_fitted_head_shares_no_memory_with_the_given_one(name):
    start = given()
    head = resolve_head(name).fit(*tail(), **start)
    assert not np.shares_memory(head.coef_, start["coef_init"])
    assert not np.shares_memory(head.intercept_, start["intercept_init"])


@ALL
def test_wrong_shapes_of_a_given_head_are_named(name):
    X, y = tail()
    wrong = [
        {"coef_init": np.zeros((2, 4))},
        {"coef_init": np.zeros((3, 5))},
        {"coef_init": np.zeros(4)},
        {"coef_init": np.zeros((3, 4)), "intercept_init": np.zeros(2)},
    ]
    for start in wrong:
        shape = np.shape(start.get("intercept_init", start["coef_init"]))
        with pytest.raises(ValueError, match=r"\(3, 4\) and \(3,\)") as caught:
            resolve_head(name).fit(X, y, **start)
        assert str(shape) in str(caught.value)


@ALL
def test_offsets_need_class_vectors(name):
    with pytest.raises(ValueError, match="was given without coef_init"):
        resolve_head(name).fit(*tail(), intercept_init=np.zeros(3))


@pytest.mark.parametrize("name", KEEPING)
def test_offsets_of_a_given_head_default_to_zero(name):
    X, y = tail()
    coef = given()["coef_init"]
    one = resolve_head(name).fit(X, y, coef_init=coef)
    two = resolve_head(name).fit(X, y, coef_init=coef.tolist(), intercept_init=[0, 0, 0])
    np.testing.assert_array_equal(one.logits(X), two.logits(X))


@ALL
def test_one_class_is_refused(name):
    with pytest.raises(ValueError, match=r"at least 2 classes.*1 class: \[0\]"):
        resolve_head(name).fit(np.eye(4), np.zeros(4, int))


@ALL
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_must_be_finite(name, bad):
    X, y = tail()
    X[3, 1] = bad
    with pytest.raises(ValueError, match=r"NaN|infinity"):
        resolve_head(name).fit(X, y)


@pytest.mark.parametrize(
    "head",
    [
        ClassifierRetraining(alpha=0.0),
        LearnableWeightScaling(alpha=-1),
        TauNormalization(tau="auto"),
        NearestClassMean(temperature=0),
        LogitAdjustment(tau=np.inf),
        BalancedSoftmax(alpha=None),
        VirtualFeatureCalibration("exact"),
        VirtualFeatureCalibration(covariance="own"),
        VirtualFeatureCalibration(eps=-0.1),
        VirtualFeatureCalibration(n_per_class=0),
    ],
    ids=str,
)
def test_wrong_parameters(head):
    with pytest.raises(ValueError, match="parameter of"):
        head.fit(*tail())


# ---------------------------------------------------------------- degenerate features


@pytest.mark.parametrize("name", ["crt", "balanced_softmax", "logit_adjust", "virtual", "none"])
def test_constant_columns_do_nothing(name):
    X, y = tail()
    more = np.hstack([X, np.tile([0.1, 0.0, 1e7], (len(X), 1))])
    head = resolve_head(name)
    if name == "virtual":  # the shrinkage of "shrunk" counts features
        head.set_params(covariance="tied")
    one, two = clone(head).fit(X, y), clone(head).fit(more, y)
    np.testing.assert_allclose(two.predict_proba(more), one.predict_proba(X), atol=1e-4)
    np.testing.assert_allclose(two.coef_[:, 4:], 0, atol=1e-9)


@ALL
@pytest.mark.parametrize("value", [0.0, 0.3, -1e8])
def test_features_that_are_all_constant(name, value):
    y = np.repeat([0, 1, 2], [12, 5, 3])
    X = np.full((20, 3), value)
    proba = resolve_head(name).fit(X, y).predict_proba(X)
    assert np.isfinite(proba).all()


@ALL
def test_many_more_features_than_rows(name):
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], [6, 3, 1])
    X = rng.normal(size=(10, 2000)) + np.eye(3)[y] @ rng.normal(size=(3, 2000))
    head = resolve_head(name).fit(X, y)
    assert np.isfinite(head.coef_).all()
    np.testing.assert_array_equal(head.predict(X), y)


@ALL
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_extreme_scales_stay_finite(name, scale):
    X, y = tail()
    head = resolve_head(name).fit(scale * X, y)
    assert np.isfinite(head.predict_proba(scale * X)).all()


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 1e3])
@pytest.mark.parametrize("Head", [*COSTED, LearnableWeightScaling, TauNormalization])
def test_separable_classes_converge_at_any_penalty(Head, alpha):
    X, y = tail(spread=20.0)
    head = Head(alpha=alpha).fit(X, y)  # a warning would be an error
    assert np.isfinite(head.predict_proba(X)).all()
    if alpha < 1:
        assert head.score(X, y) == 1


# ---------------------------------------------------------------- resolve_head


@ALL
def test_names_give_new_unfitted_heads(name):
    head, other = resolve_head(name), resolve_head(name)
    assert head is not other
    assert not hasattr(head, "coef_")
    assert type(head) is type(other)
    if name == "none":
        assert head.get_params() == LogitAdjustment(tau=0.0).get_params()


def test_the_module_lists_every_name():
    from sklearn_medimb import rebalance

    assert all(f'"{name}"' in rebalance.__doc__ for name in HEADS)


def test_unknown_names_are_told_the_known_ones():
    with pytest.raises(ValueError, match=r"rebalance='smote' must be one of") as caught:
        resolve_head("smote")
    assert all(repr(name) in str(caught.value) for name in HEADS)


@pytest.mark.parametrize(
    "odd", [ClassifierRetraining, LogisticRegression, None, 3, StandardScaler()]
)
def test_what_is_no_classifier_is_refused(odd):
    with pytest.raises(TypeError, match=r"must be one of .* or a scikit-learn classifier"):
        resolve_head(odd)


@pytest.mark.parametrize(
    "classifier",
    [
        LogisticRegression(C=0.3),
        RandomForestClassifier(7),
        ClassifierRetraining(alpha=3.0),
        make_pipeline(StandardScaler(), LogisticRegression()),
    ],
    ids=lambda c: type(c).__name__,
)
def test_classifiers_are_cloned(classifier):
    classifier = clone(classifier).fit(*tail())
    head = resolve_head(classifier)
    assert head is not classifier
    assert repr(head) == repr(classifier)
    with pytest.raises(NotFittedError):
        head.predict(tail()[0])
    classifier.predict(tail()[0])  # the caller's stays fitted


# ---------------------------------------------------------------- in scikit-learn's machinery


@pytest.mark.parametrize(
    ("head", "grid"),
    [
        (ClassifierRetraining(), {"alpha": [0.01, 1.0]}),
        (LearnableWeightScaling(), {"alpha": [0.01, 1.0]}),
        (TauNormalization(), {"tau": [0.0, 0.5, 1.0]}),
        (NearestClassMean(), {"temperature": [0.1, 1.0]}),
        (LogitAdjustment(), {"tau": [0.0, 0.5, 1.0]}),
        (BalancedSoftmax(), {"alpha": [0.01, 1.0]}),
        (VirtualFeatureCalibration(), {"alpha": [0.01, 1.0], "covariance": ["tied", "diag"]}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_in_a_pipeline_and_a_search(head, grid):
    X, y = tail((60, 20, 9))
    names = np.array(["a", "b", "c"])[y]
    prefix = type(head).__name__.lower()
    search = GridSearchCV(
        make_pipeline(StandardScaler(), head),
        {f"{prefix}__{key}": values for key, values in grid.items()},
        scoring=["balanced_accuracy", "neg_log_loss"],
        refit="balanced_accuracy",
        cv=3,
        error_score="raise",
    ).fit(X, names)
    assert search.best_score_ > 0.6
    assert set(search.predict(X)) == {"a", "b", "c"}
    # The searched parameter does something.
    assert np.ptp(search.cv_results_["mean_test_neg_log_loss"]) > 1e-3


def test_tau_is_found_by_search():
    """Adjustment serves balanced accuracy, none serves accuracy: a search tells them apart."""
    X, y = tail((300, 60, 20), spread=0.6)
    grid, best = {"tau": [0.0, 1.0]}, {}
    for scoring in ("accuracy", "balanced_accuracy"):
        search = GridSearchCV(LogitAdjustment(), grid, scoring=scoring, cv=3).fit(X, y)
        best[scoring] = search.best_params_["tau"]
    assert best == {"accuracy": 0.0, "balanced_accuracy": 1.0}


def test_weights_are_routed_to_a_head_in_a_pipeline():
    X, y = tail()
    weight = np.where(y == 0, 5.0, 1.0)
    pipeline = make_pipeline(StandardScaler(), LogitAdjustment(tau=0.0))
    pipeline.fit(X, y, logitadjustment__sample_weight=weight)
    head = LogitAdjustment(tau=0.0).fit(StandardScaler().fit_transform(X), y, weight)
    np.testing.assert_array_equal(pipeline[-1].coef_, head.coef_)


def test_heads_are_estimators():
    for name in HEADS:
        head = resolve_head(name)
        assert isinstance(head, BaseEstimator)
        assert head.__sklearn_tags__().estimator_type == "classifier"
