"""Golden numbers: every loss on fixed small inputs, by the paper's formula in plain NumPy.

Each row has the package's loss, the formula written out a second time, and the number that both
give. A change of either shows.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sklearn_medimb import losses, metric_losses
from sklearn_medimb.methods._amimv import thresholded_contrastive
from sklearn_medimb.methods._cssn import CSSNLoss, PairScores, soft_log_target
from sklearn_medimb.methods._lmd import (
    batch_relation_loss,
    channel_relation_loss,
    distribution_consistency,
    generalized_cross_entropy,
    mahalanobis,
    probability_consistency_loss,
)
from sklearn_medimb.methods._self_supervised import barlow_twins, negative_cosine, nt_xent, vicreg
from sklearn_medimb.methods._tailboost import gpaco_loss, supcon_with_memory
from sklearn_medimb.mixing import spmix_ratio

COUNTS = np.array([100.0, 30.0, 4.0])
PRIOR = COUNTS / COUNTS.sum()
Y = np.array([0, 1, 2, 0, 1])
ONE_HOT = np.eye(3)[Y]
Z = 2 * np.sin(np.arange(15.0)).reshape(5, 3)  # logits
Z_2 = 2 * np.cos(np.arange(15.0)).reshape(5, 3)
A, B = np.sin(1 + np.arange(20.0) ** 1.5).reshape(5, 4), np.cos(np.arange(20.0)).reshape(5, 4)
E = A / np.linalg.norm(A, axis=1, keepdims=True)  # unit embeddings
MAP_1, MAP_2 = (np.abs(part).reshape(1, 4, 4) for part in (np.sin(np.arange(16)), A.ravel()[:16]))


def t(*arrays):
    tensors = tuple(torch.from_numpy(np.asarray(array)) for array in arrays)
    return tensors if len(tensors) > 1 else tensors[0]


def softmax(z):
    powers = np.exp(z - z.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def of_labels(costs):
    """Mean of what each sample's label pays."""
    return (costs * t(ONE_HOT)).sum() / len(Y)


def pays(p):
    """Mean of -log p_y."""
    return -np.log(p[np.arange(len(Y)), Y]).mean()


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def drw():
    """LDAM with effective-number weights, divided by the sum of the weights of all rows."""
    weight = losses.effective_number_weights(t(COUNTS), 0.999)
    rows = t(np.bincount(Y).astype(float))
    weight = losses.of_unit_mean(weight, rows)
    margins = 30 * losses.ldam_margins(t(COUNTS))
    costs = lambda z: losses.ldam(z, margins)  # noqa: E731
    return losses.LabelLoss(costs, torch.ones(3), weight, switch=0)(t(Z), t(ONE_HOT))


def ldam_costs():
    margins = COUNTS**-0.25
    margins *= 0.5 / margins.max()
    p = softmax(Z - 30 * margins * ONE_HOT)
    return -np.log(p[np.arange(5), Y])


def drw_formula():
    weight = ((1 - 0.999) / (1 - 0.999**COUNTS))[Y]
    return (weight * ldam_costs()).sum() / weight.sum()


def gpaco_formula():
    u, a = E @ E.T / 0.2, Z + np.log(PRIOR)
    total = 0.0
    for i in range(5):
        others = [j for j in range(5) if j != i]
        positive = [j for j in others if Y[j] == Y[i]]
        log_d = np.log(np.exp(a[i]).sum() + sum(np.exp(u[i, j]) for j in others))
        inner = (a[i, Y[i]] - log_d) + 0.05 * sum(u[i, j] - log_d for j in positive)
        total -= inner / (1 + 0.05 * len(positive)) / 5
    return total


def supcon_formula(temperature):
    u, costs = E @ E.T / temperature, []
    for i in range(5):
        others = [j for j in range(5) if j != i]
        log_sum = np.log(sum(np.exp(u[i, j]) for j in others))
        positive = [j for j in others if Y[j] == Y[i]]
        if positive:
            costs.append(np.mean([log_sum - u[i, j] for j in positive]))
    return np.mean(costs)


def triplet_formula():
    d, by_class = np.linalg.norm(E[:, None] - E[None], axis=2), {}
    for i in range(5):
        positive = [d[i, j] for j in range(5) if j != i and Y[j] == Y[i]]
        if positive:
            nearest = min(d[i, j] for j in range(5) if Y[j] != Y[i])
            by_class.setdefault(Y[i], []).append(np.log1p(np.exp(max(positive) - nearest)))
    return np.mean([np.mean(costs) for costs in by_class.values()])


def multi_similarity_formula():
    cos, total = E @ E.T, 0.0
    for i in range(5):
        positive = [cos[i, j] for j in range(5) if j != i and Y[j] == Y[i]]
        negative = [cos[i, j] for j in range(5) if Y[j] != Y[i]]
        hard_p = [c for c in positive if c - 0.1 < max(negative)]
        hard_n = [c for c in negative if c + 0.1 > min(positive, default=np.inf)]
        total += np.log1p(sum(np.exp(-2 * (c - 0.5)) for c in hard_p)) / 2
        total += np.log1p(sum(np.exp(50 * (c - 0.5)) for c in hard_n)) / 50
    return total / 5


def contrastive_formula():
    d = np.linalg.norm(E[:, None] - E[None], axis=2)
    same = (Y[:, None] == Y) & ~np.eye(5, dtype=bool)
    return (d[same] ** 2).mean() + (np.maximum(0, 1 - d[Y[:, None] != Y]) ** 2).mean()


PROXIES = unit(np.cos(np.arange(12.0) ** 2).reshape(3, 4))


def proxy_anchor():
    loss = metric_losses.ProxyAnchor(3, 4).double()
    with torch.no_grad():
        loss.proxies.copy_(t(PROXIES))
    return loss(*t(E, Y))


def proxy_anchor_formula():
    s, pull, push = E @ PROXIES.T, [], []
    for k in range(3):
        pull.append(np.log1p(np.exp(-32 * (s[k == Y, k] - 0.1)).sum()))
        push.append(np.log1p(np.exp(32 * (s[k != Y, k] + 0.1)).sum()))
    return np.mean(pull) + np.mean(push)


def class_centers():
    loss = metric_losses.ClassCenterTriplet(3, 4).double()
    return loss(*t(E, Y))


def class_centers_formula():
    centers = unit(np.stack([E[k == Y].mean(axis=0) for k in range(3)]))
    d = np.linalg.norm(E[:, None] - centers[None], axis=2)
    costs = [max(0, d[i, y] - np.delete(d[i], y).min() + 0.3) for i, y in enumerate(Y)]
    return np.mean(
        [np.mean([c for c, y in zip(costs, Y, strict=True) if y == k]) for k in range(3)]
    )


def unit_rows_difference(a, b):
    return ((unit(a) - unit(b)) ** 2).sum()


MEANS = np.stack([np.sin(k + np.arange(4.0)) for k in range(3)])
COVARIANCES = np.stack([np.eye(4) * (1 + k) + 0.3 for k in range(3)])
WHITENING = np.stack([np.linalg.cholesky(np.linalg.inv(c)).T for c in COVARIANCES])


def distances_formula():
    return np.array(
        [
            [(a - m) @ np.linalg.inv(c) @ (a - m) for m, c in zip(MEANS, COVARIANCES, strict=True)]
            for a in A
        ]
    )


def fdc(kind):
    return distribution_consistency(mahalanobis(*t(A, MEANS, WHITENING)), t(Y), 4, kind)


def fdc_formula(kind):
    m, total = distances_formula(), 0.0
    for i, y in enumerate(Y):
        own, others = m[i, y], np.delete(m[i], y)
        paper = (own - others.mean()) / 4
        total += paper if kind == "paper" else max(0, 1 + (own - others.min()) / 4)
    return total / 5


def amimv_formula():
    z, total = unit(np.concatenate([A, B])), 0.0
    s = z @ z.T
    kept = (np.abs(s) >= 0.1) & (np.abs(s) <= 0.9)
    for u in range(10):
        others = [v for v in range(10) if v != u]
        den = sum(kept[u, v] * np.exp(s[u, v] / 0.3) for v in others)
        partner = (u + 5) % 10
        total += kept[u, partner] * np.exp(s[u, partner] / 0.3) / den / 10
    return -np.log(total)


def nt_xent_formula():
    z = unit(np.concatenate([A, B]))
    powers = np.exp(z @ z.T / 0.5) * ~np.eye(10, dtype=bool)
    return -np.mean([np.log(powers[i, (i + 5) % 10] / powers[i].sum()) for i in range(10)])


def barlow_formula():
    a, b = ((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) for x in (A, B))
    c = a.T @ b / 5
    return ((1 - np.diag(c)) ** 2).sum() + 5e-3 * ((c**2).sum() - (np.diag(c) ** 2).sum())


def vicreg_formula():
    variance = covariance = 0.0
    for x in (A, B):
        c = np.cov(x, rowvar=False)
        variance += np.maximum(0, 1 - np.sqrt(np.diag(c) + 1e-4)).mean() / 2
        covariance += ((c**2).sum() - (np.diag(c) ** 2).sum()) / 4
    return 25 * ((A - B) ** 2).mean() + 25 * variance + covariance


def ratio_formula(merge):
    cells = lambda m: m.reshape(2, 2, 2, 2).mean(axis=(1, 3))  # noqa: E731
    one, two = MAP_1[0], MAP_2[0]
    if merge == "pixel":
        return cells(np.minimum(0.8, np.maximum(one, two)))
    one, two = (cells(m) for m in (one, two))
    one, two = (0.5 + 0.5 * (m - m.min()) / (m.max() - m.min()) for m in (one, two))
    return np.minimum(0.8, np.maximum(one, two))


MIXED = 0.3 * ONE_HOT + 0.7 * ONE_HOT[[2, 0, 1, 4, 3]]


PAIRS = 1.5 * np.sin(np.arange(25.0) ** 1.3).reshape(5, 5)  # z of all ordered pairs
COSINES = 0.95 * np.cos(np.arange(25.0) ** 1.2).reshape(5, 5)  # k
SAME = (Y[:, None] == Y).astype(float)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def soft_targets():
    return SAME * (1 - np.log2(2**0.7 - (2**0.7 - 1) * sigmoid(PAIRS)))


def cssn(w, link, *, balance=False, aux=0.0):
    loss = CSSNLoss(
        soft_ratio=0.7, class_loss_weight=w, class_link=link, balance_pairs=balance, aux_weight=aux
    )
    logits = t(np.concatenate([Z, Z_2])) if aux else None
    return loss(PairScores(*t(PAIRS, COSINES), logits), t(Y))


def cssn_formula(w, link, *, balance=False, aux=0.0):
    def bce(q, target):
        return -(target * np.log(q) + (1 - target) * np.log(1 - q))

    q = (1 + COSINES) / 2 if link == "affine" else sigmoid(sigmoid(COSINES))
    costs = (1 - w) * bce(sigmoid(PAIRS), SAME) + w * bce(q, soft_targets())
    weight = np.where(SAME, 0.5 / SAME.mean(), 0.5 / (1 - SAME).mean()) if balance else 1.0
    p = softmax(np.concatenate([Z, Z_2]))
    return (weight * costs).mean() - aux * np.log(p[np.arange(10), np.tile(Y, 2)]).mean()


GOLDEN = {
    "cross-entropy": (
        lambda: of_labels(losses.cross_entropy(t(Z))),
        lambda: pays(softmax(Z)),
        1.3353753752209427,
    ),
    "focal": (
        lambda: of_labels(losses.focal(t(Z))),
        lambda: np.mean([-((1 - p) ** 2) * np.log(p) for p in softmax(Z)[np.arange(5), Y]]),
        0.9219264434939399,
    ),
    "class-balanced": (
        lambda: of_labels(
            losses.cross_entropy(t(Z)) * losses.effective_number_weights(t(COUNTS), 0.999)
        ),
        lambda: (
            (w := (1 - 0.999) / (1 - 0.999**COUNTS))
            @ (-np.log(softmax(Z)) * ONE_HOT).sum(axis=0)
            * 3
            / w.sum()
            / 5
        ),
        0.5361589281921731,
    ),
    "LDAM": (
        lambda: of_labels(losses.ldam(t(Z), 30 * losses.ldam_margins(t(COUNTS)))),
        lambda: ldam_costs().mean(),
        9.997689705453482,
    ),
    "LDAM-DRW": (drw, drw_formula, 13.251827235737263),
    "balanced softmax": (
        lambda: of_labels(losses.logit_adjusted(t(Z), t(PRIOR).log())),
        lambda: pays(COUNTS * np.exp(Z) / (COUNTS * np.exp(Z)).sum(axis=1, keepdims=True)),
        1.3436132753042656,
    ),
    "logit adjustment": (
        lambda: of_labels(losses.logit_adjusted(t(Z), t(PRIOR).log(), tau=0.5)),
        lambda: pays(softmax(Z + 0.5 * np.log(PRIOR))),
        1.2300227448393737,
    ),
    "mixed labels": (
        lambda: losses.LabelLoss(losses.cross_entropy, torch.ones(3))(t(Z), t(MIXED)),
        lambda: -(MIXED * np.log(softmax(Z))).sum() / 5,
        1.4580241304483514,
    ),
    "GPaCo": (
        lambda: gpaco_loss(*t(Z, E @ E.T / 0.2, Y, Y, np.log(PRIOR))),
        gpaco_formula,
        3.3692035026169256,
    ),
    "SupCon beside a memory": (
        lambda: supcon_with_memory(*t(E @ E.T / 0.2, Y, Y)),
        lambda: supcon_formula(0.2),
        3.388049978861397,
    ),
    "SupCon": (
        lambda: metric_losses.supcon(*t(E, Y)),
        lambda: supcon_formula(0.1),
        6.181932426579649,
    ),
    "triplet": (lambda: metric_losses.triplet(*t(E, Y)), triplet_formula, 0.9073672829300614),
    "class centres": (class_centers, class_centers_formula, 0.09563979614951469),
    "multi-similarity": (
        lambda: metric_losses.multi_similarity(*t(E, Y)),
        multi_similarity_formula,
        0.6259067222195303,
    ),
    "contrastive": (
        lambda: metric_losses.contrastive(*t(E, Y)),
        contrastive_formula,
        2.4590671176107266,
    ),
    "proxy anchor": (proxy_anchor, proxy_anchor_formula, 34.34004431213406),
    "RRL, batch": (
        lambda: batch_relation_loss(*t(A, B)),
        lambda: unit_rows_difference(A @ A.T, B @ B.T) / 5,
        1.1586079328764198,
    ),
    "RRL, channels": (
        lambda: channel_relation_loss(*t(A, B)),
        lambda: unit_rows_difference(A.T @ A, B.T @ B) / 4,
        0.5111783224201254,
    ),
    "RRL, probabilities": (
        lambda: probability_consistency_loss(*t(Z, Z_2)),
        lambda: (softmax(Z_2) * np.log(softmax(Z_2) / softmax(Z))).sum() / 5,
        1.4363165629131436,
    ),
    "generalised cross-entropy": (
        lambda: generalized_cross_entropy(t(Z), t(Y), 0.7),
        lambda: ((1 - softmax(Z)[np.arange(5), Y] ** 0.7) / 0.7).mean(),
        0.7514742351759537,
    ),
    "FDC, paper": (lambda: fdc("paper"), lambda: fdc_formula("paper"), 0.17066195938043727),
    "FDC, margin": (lambda: fdc("margin"), lambda: fdc_formula("margin"), 1.2950496524294972),
    "MIMV and AMIMV": (
        lambda: thresholded_contrastive(*t(A, B)),
        amimv_formula,
        2.3086489754155077,
    ),
    "NT-Xent": (lambda: nt_xent(*t(A, B), 0.5), nt_xent_formula, 2.784973973211488),
    "Barlow Twins": (lambda: barlow_twins(*t(A, B)), barlow_formula, 4.815675271476761),
    "VICReg": (lambda: vicreg(*t(A, B)), vicreg_formula, 33.34280776045277),
    "BYOL and SimSiam": (
        lambda: 1 + (negative_cosine(*t(A, B)) + negative_cosine(*t(B, A))) / 2,
        lambda: 1 - (unit(A) * unit(B)).sum(axis=1).mean(),
        1.0936923016273863,
    ),
    "SPMix ratio, code": (
        lambda: spmix_ratio(*t(MAP_1, MAP_2), 2)[0],
        lambda: ratio_formula("patch"),
        [[0.8, 0.5], [0.8, 0.8]],
    ),
    "SPMix ratio, paper": (
        lambda: spmix_ratio(*t(MAP_1, MAP_2), 2, merge="pixel")[0],
        lambda: ratio_formula("pixel"),
        [[0.7892006238269821, 0.4693805262443955], [0.6731238427187323, 0.7625719600392793]],
    ),
    "CSSN, soft target": (
        lambda: soft_log_target(*t(SAME, sigmoid(PAIRS)))[0],
        lambda: soft_targets()[0],
        [0.6079547678861732, 0.0, 0.0, 0.4254236073505093, 0.0],
    ),
    "CSSN, patch branch": (
        lambda: cssn(0, "affine"),
        lambda: cssn_formula(0, "affine"),
        0.9867923270847645,
    ),
    "CSSN, class branch": (
        lambda: cssn(1, "affine"),
        lambda: cssn_formula(1, "affine"),
        0.86553840684473,
    ),
    "CSSN, double sigmoid": (
        lambda: cssn(1, "double_sigmoid"),
        lambda: cssn_formula(1, "double_sigmoid"),
        0.8650929631433371,
    ),
    "CSSN, published": (
        lambda: cssn(0.01, "double_sigmoid"),
        lambda: cssn_formula(0.01, "double_sigmoid"),
        0.9855753334453502,
    ),
    "CSSN, ours": (
        lambda: cssn(0.5, "affine", balance=True, aux=2.0),
        lambda: cssn_formula(0.5, "affine", balance=True, aux=2.0),
        3.8878510212389648,
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_numbers(name):
    ours, formula, number = GOLDEN[name]
    np.testing.assert_allclose(formula(), number, rtol=1e-9)
    np.testing.assert_allclose(ours().numpy(force=True), number, rtol=1e-9)
