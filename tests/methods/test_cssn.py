"""Invariants of CSSN, each against a slow explicit formula or as an effect."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score

from sklearn_medimb import CSSNClassifier
from sklearn_medimb.backbones import ConvNet, ViT
from sklearn_medimb.methods import SupportBank
from sklearn_medimb.methods._cssn import (
    CSSNHead,
    CSSNLoss,
    CSSNNetwork,
    PairScores,
    class_cosines,
    soft_log_target,
)
from tests.helpers import make_blobs


def make_head(n_tokens=16, width=32, **params):
    torch.manual_seed(0)
    return CSSNHead(n_tokens, width, **params).double().eval()


def make_loss(**params):
    settings = {
        "soft_ratio": 0.7,
        "class_loss_weight": 0.1,
        "class_link": "affine",
        "balance_pairs": False,
        "aux_weight": 0.0,
    }
    return CSSNLoss(**{**settings, **params})


class TestSoftLogTarget:
    def test_end_points(self):
        one, zero = torch.ones(1), torch.zeros(1)
        assert soft_log_target(one, one, 0.7).item() == pytest.approx(1)
        assert soft_log_target(one, zero, 0.7).item() == pytest.approx(0.3)
        assert soft_log_target(one, zero, 1.0).item() == pytest.approx(0)

    def test_known_values(self):
        p = torch.tensor([0, 0.25, 0.5, 0.75, 1.0])
        expected = [0.300, 0.446, 0.608, 0.791, 1]
        assert soft_log_target(torch.ones(5), p).tolist() == pytest.approx(expected, abs=5e-4)

    def test_negatives_are_zero(self):
        assert not soft_log_target(torch.zeros(9), torch.linspace(0, 1, 9)).any()

    @pytest.mark.parametrize("soft_ratio", [0.1, 0.5, 0.7, 1.0])
    def test_rises_and_is_convex(self, soft_ratio):
        p = torch.linspace(0, 1, 101, dtype=torch.float64)
        t = soft_log_target(torch.ones_like(p), p, soft_ratio)
        assert torch.isfinite(t).all()
        assert (t.diff() > 0).all()
        assert (t.diff().diff() > 0).all()

    def test_ratio_zero_gives_hard_targets(self):
        same = torch.tensor([0.0, 1, 1, 0])
        assert torch.equal(soft_log_target(same, torch.rand(4), 0.0), same)

    def test_no_gradient_into_p(self):
        p = torch.rand(4, requires_grad=True)
        assert not soft_log_target(torch.ones(4), p).requires_grad


class TestHead:
    def test_parameter_count_is_the_published_one(self):
        count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
        head = CSSNHead(196, 384)
        assert count(head) == 2_734_189
        assert count(head.scorer) == 2_459_137

    @pytest.mark.parametrize("n_tokens", [4, 7, 16, 49, 64, 196])
    def test_shapes(self, n_tokens):
        head = CSSNHead(n_tokens, 24).eval()
        patches, embedding, _ = head(torch.randn(3, 1 + n_tokens, 24))
        assert patches.shape == (3, n_tokens // 2, 24)
        assert embedding.shape == (3, 24)
        assert head.patch_logits(head.similarity_maps(patches, patches[:2])).shape == (3, 2)

    @pytest.mark.parametrize("gate", [True, False])
    @pytest.mark.parametrize("n_tokens", [16, 9])
    @torch.no_grad()
    def test_pair_logit_equals_the_ten_steps(self, n_tokens, gate):
        head = make_head(n_tokens, gate=gate)
        generator = torch.Generator().manual_seed(1)
        T, R = torch.randn(2, 1 + n_tokens, 32, dtype=torch.float64, generator=generator)

        def encode(tokens, reference):
            tokens = head.context_norm(tokens + head.context(tokens.mean(0)))
            reference = head.context_norm(reference + head.context(reference.mean(0)))
            c, patches, other = tokens[0], tokens[1:], reference[1:]
            if gate:
                other = head.mix_norm(head.mix(other.T)).T
                patches = head.fuse_norm(head.fuse(patches * other))
            rows = []
            for patch in patches:
                row = patch + 3.0 * c
                row = row / math.sqrt((row**2).sum())
                rows.append(row - row.mean())
            return torch.stack(rows), head.embed(c)

        F_q, G_q = encode(T, T)
        F_s, G_s = encode(R, R)
        assert F_q.mean(dim=1).abs().max() < 1e-12
        assert F_q.norm(dim=1).max() <= 1 + 1e-12
        M = F.avg_pool2d((F_q @ F_s.T)[None, None], kernel_size=2, stride=2)[0, 0]
        z = head.scorer((M**2).reshape(1, -1)).item()
        k = F.cosine_similarity(G_q, G_s, dim=0).item()

        patches, embedding, _ = head(torch.stack([T, R]))
        logits = head.patch_logits(head.similarity_maps(patches, patches))
        assert logits[0, 1].item() == pytest.approx(z, rel=1e-9)
        assert class_cosines(embedding, embedding)[0, 1].item() == pytest.approx(k, rel=1e-9)

    def test_reference_changes_patches_but_not_class_embedding(self):
        head = make_head()
        tokens, other = torch.randn(2, 3, 17, 32, dtype=torch.float64)
        alone, paired = head(tokens), head(tokens, other)
        assert not torch.allclose(alone.patches, paired.patches)
        assert torch.equal(alone.embedding, paired.embedding)
        assert torch.equal(alone.patches, head(tokens, tokens).patches)

    def test_class_cosine_bounds(self):
        embedding = torch.randn(20, 8, dtype=torch.float64)
        k = class_cosines(embedding, embedding)
        assert k.abs().max() <= 1 + 1e-12
        assert torch.allclose(k.diagonal(), torch.ones(20, dtype=torch.float64))

    def test_order_of_a_pair_matters(self):
        head = make_head()
        patches, _, _ = head(torch.randn(4, 17, 32, dtype=torch.float64))
        z = head.patch_logits(head.similarity_maps(patches, patches))
        assert not torch.allclose(z, z.T)


class TestLoss:
    def scores(self, n=6, seed=0, n_classes=None):
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(n, n, generator=generator, dtype=torch.float64)
        k = torch.rand(n, n, generator=generator, dtype=torch.float64) * 1.9 - 0.95
        logits = None
        if n_classes:
            logits = torch.randn(2 * n, n_classes, generator=generator, dtype=torch.float64)
        return PairScores(z, k, logits)

    @pytest.mark.parametrize("class_link", ["affine", "double_sigmoid"])
    @pytest.mark.parametrize("balance", [True, False])
    @pytest.mark.parametrize("w", [0.0, 0.1, 1.0])
    def test_value_equals_explicit_loop(self, class_link, balance, w):
        y = torch.tensor([0, 0, 1, 2, 1, 0])
        scores = self.scores(n_classes=3)
        loss = make_loss(
            class_loss_weight=w, class_link=class_link, balance_pairs=balance, aux_weight=0.5
        )(scores, y)

        def sigmoid(x):
            return 1 / (1 + math.exp(-x))

        def bce(q, t):
            return -(t * math.log(q) + (1 - t) * math.log(1 - q))

        pairs = list(product(range(6), repeat=2))
        n_positive = sum(int(y[i] == y[j]) for i, j in pairs)
        assert n_positive == 3**2 + 2**2 + 1**2
        total = 0.0
        for i, j in pairs:
            same = int(y[i] == y[j])
            p = sigmoid(scores.z[i, j].item())
            t = same * (1 - math.log2(2**0.7 - (2**0.7 - 1) * p))
            k = scores.k[i, j].item()
            q = (1 + k) / 2 if class_link == "affine" else sigmoid(sigmoid(k))
            if class_link == "double_sigmoid":
                assert 0.5668 <= q <= 0.6751
            weight = 1.0
            if balance:
                weight = 0.5 * len(pairs) / (n_positive if same else len(pairs) - n_positive)
            total += weight * ((1 - w) * bce(p, same) + w * bce(q, t)) / len(pairs)
        cross_entropy = 0.0
        for row, label in enumerate([*y, *y]):
            z = scores.logits[row]
            cross_entropy += (z.exp().sum().log() - z[label]).item() / 12
        assert loss.item() == pytest.approx(total + 0.5 * cross_entropy, rel=1e-9)

    def test_balanced_pairs_weigh_half_each(self):
        target = (torch.rand(12, 12) < 0.2).double()
        weight = make_loss(balance_pairs=True).pair_weights(target)
        assert (weight * target).sum().item() == pytest.approx(72)
        assert weight.mean().item() == pytest.approx(1)

    @pytest.mark.parametrize("balance", [True, False])
    def test_one_class_batch_stays_finite(self, balance):
        loss = make_loss(balance_pairs=balance)(self.scores(4), torch.zeros(4, dtype=torch.long))
        assert torch.isfinite(loss)

    @pytest.mark.parametrize("w", [0.0, 1.0])
    def test_gradients_reach_only_the_branch_that_is_weighted(self, w):
        head = make_head()
        patches, embedding, _ = head(torch.randn(6, 17, 32, dtype=torch.float64))
        z = head.patch_logits(head.similarity_maps(patches[:3], patches[3:]))
        k = class_cosines(embedding[:3], embedding[3:])
        make_loss(class_loss_weight=w)(PairScores(z, k, None), torch.tensor([0, 0, 1])).backward()

        def reached(module):
            return any(p.grad is not None and p.grad.any() for p in module.parameters())

        assert reached(head.scorer) == (w == 0)
        assert reached(head.embed) == (w == 1)


class TestTraining:
    def test_step_scores_all_ordered_pairs_from_two_views_each(self, tiny, blobs):
        X, y = blobs
        clf = CSSNClassifier(**tiny).fit(X, y)
        module, sizes = clf.net_.module_, []
        handle = module.trunk.register_forward_hook(lambda m, a, out: sizes.append(len(out)))
        scores = module(torch.randn(32, 3, 12, 12, device=clf.net_.device))
        handle.remove()
        assert sizes == [32]
        assert scores.z.shape == scores.k.shape == (16, 16)

    def test_fresh_views_per_pair_encode_two_n_squared(self, tiny, blobs, monkeypatch):
        X, y = blobs
        clf = CSSNClassifier(**{**tiny, "batch_size": 4, "max_epochs": 1}, pair_view="pair")
        sizes = []
        forward = CSSNNetwork.forward

        def counting(self, views):
            sizes.append(len(views))
            return forward(self, views)

        monkeypatch.setattr(CSSNNetwork, "forward", counting)
        clf.fit(X, y)
        assert set(sizes) == {2 * 4**2}

    def test_pair_and_image_views_agree_where_views_do_not_differ(self, tiny, blobs):
        # Without augmentation and dropout both ways score the same pairs.
        X, y = blobs
        fitted = CSSNClassifier(**tiny, augment="none", dropout=0.0, precision="float64").fit(X, y)
        module = fitted.net_.module_.eval()
        images = fitted._preprocessor()(torch.from_numpy(X[:5]))
        z = module(torch.cat([images, images])).z
        module.paired_views = True
        q, s = np.repeat(np.arange(5), 5), np.tile(np.arange(5), 5)
        paired = module(torch.cat([images[q], images[s]])).z
        module.paired_views = False
        assert torch.allclose(z.flatten(), paired)

    @pytest.mark.parametrize("channels", [1, 3])
    def test_overfits_sixteen_separable_images(self, channels):
        X, y = make_blobs((8, 8), channels=channels)
        clf = CSSNClassifier(
            ConvNet(widths=(16, 32)), max_epochs=60, augment="none", random_state=0
        ).fit(X, y)
        assert balanced_accuracy_score(y, clf.predict(X)) == 1.0

    def test_learns_a_tail_class(self):
        X, y = make_blobs((60, 20, 6), seed=1)
        X_test, y_test = make_blobs((20, 20, 20), seed=2)
        clf = CSSNClassifier(
            ConvNet(widths=(16, 32)), max_epochs=30, augment="none", random_state=0
        ).fit(X, y)
        assert balanced_accuracy_score(y_test, clf.predict(X_test)) > 0.9

    def test_head_learning_rate_applies_to_the_head_only(self, tiny, blobs):
        clf = CSSNClassifier(**tiny, lr=1e-2, backbone_lr=1e-3, lr_schedule="constant").fit(*blobs)
        module, groups = clf.net_.module_, clf.net_.optimizer_.param_groups

        def rates(*parts):
            wanted = {id(p) for part in parts for p in part.parameters()}
            return {g["lr"] for g in groups for p in g["params"] if id(p) in wanted}

        assert rates(module.trunk) == {1e-5}
        assert rates(module.head, module.classifier) == {1e-2}

    def test_published_settings(self):
        clf = CSSNClassifier.published(bank=SupportBank(n=3))
        assert isinstance(clf.backbone, ViT)
        assert clf.get_params()["backbone__width"] == 384
        assert (clf.batch_size, clf.pair_view, clf.class_link) == (8, "pair", "double_sigmoid")
        assert (clf.class_loss_weight, clf.aux_weight, clf.bank.n) == (0.01, 0.0, 3)

    def test_published_settings_run(self, blobs):
        small = ViT(patch_size=4, width=24, depth=1, n_heads=2)
        clf = CSSNClassifier.published(backbone=small, max_epochs=1, random_state=0)
        assert clf.fit(*blobs).predict_proba(blobs[0][:4]).shape == (4, 3)


class TestPaired:
    def data(self):
        # The class is visible only in the change between the two images of a case.
        rng = np.random.default_rng(0)
        y = rng.permutation(np.repeat([0, 1], [24, 16]))
        before = rng.integers(60, 120, (40, 1, 12, 12))
        after = before.copy()
        after[y == 1, :, 3:9, 3:9] += 100
        return np.stack([before, after], axis=1).astype(np.uint8), y

    def test_uses_the_second_image(self):
        X, y = self.data()
        clf = CSSNClassifier(
            ConvNet(widths=(8, 16)), reference="paired", max_epochs=40, augment="none",
            random_state=0,
        ).fit(X, y)  # fmt: skip
        assert clf.image_shape_ == (2, 12, 12)
        assert balanced_accuracy_score(y, clf.predict(X)) > 0.95
        without = X.copy()
        without[:, 1] = without[:, 0]
        assert balanced_accuracy_score(y, clf.predict(without)) < 0.7

    def test_layouts_agree(self, tiny):
        X, y = self.data()
        X = np.concatenate([X, X, X], axis=2)  # three channels
        fit = lambda X, **p: CSSNClassifier(**tiny, reference="paired", **p).fit(X, y)  # noqa: E731
        first = fit(X).predict_proba(X)
        last = np.moveaxis(X, 2, -1)
        assert np.allclose(fit(last).predict_proba(last), first)
        flat = X.reshape(len(X), -1)
        assert np.allclose(fit(flat, image_shape=(2, 3, 12, 12)).predict_proba(flat), first)


class TestSupports:
    @pytest.fixture
    def fitted(self, tiny, blobs):
        return CSSNClassifier(
            **tiny, bank=SupportBank(n=4, n_draws=3), decision="patch", reference="self"
        ).fit(*blobs)

    def test_bank_holds_each_class_and_names_its_rows(self, fitted, blobs):
        _, y = blobs
        assert np.array_equal(y[fitted.support_indices_], fitted.support_labels_)
        for label in fitted.classes_:
            members = fitted.support_labels_ == label
            assert 4 <= members.sum() <= 12
            assert fitted.support_weights_[members].sum() == pytest.approx(1)

    def test_scores_are_the_mean_over_draws_of_pair_probabilities(self, fitted, blobs):
        X, _ = blobs
        for row in range(3):
            for column, label in enumerate(fitted.classes_):
                chosen = fitted.support_labels_ == label
                supports = X[fitted.support_indices_[chosen]]
                p = fitted.pair_proba(np.repeat(X[row : row + 1], len(supports), 0), supports)
                expected = (p * fitted.support_weights_[chosen]).sum()
                assert fitted.similarity(X)[row, column] == pytest.approx(expected, rel=1e-4)

    def test_probabilities_are_shares_of_similarity(self, fitted, blobs):
        similarity = fitted.similarity(blobs[0])
        share = similarity / similarity.sum(axis=1, keepdims=True)
        assert np.allclose(fitted.predict_proba(blobs[0]), share)

    @pytest.mark.parametrize("strategy", ["random", "all", "medoid"])
    def test_strategies(self, tiny, blobs, strategy):
        X, y = blobs
        clf = CSSNClassifier(**tiny, bank=SupportBank(strategy, n=5)).fit(X, y)
        counts = [int((clf.support_labels_ == k).sum()) for k in range(3)]
        if strategy == "all":
            assert counts == [36, 16, 8]
        elif strategy == "medoid":
            assert counts == [5, 5, 5]

    def test_combined_decision_multiplies_by_the_auxiliary_probability(self, fitted, blobs):
        X, _ = blobs
        with torch.no_grad():
            logits = fitted.net_.module_.classifier(fitted._encode(fitted._read(X)).token)
        product = fitted.similarity(X) * logits.softmax(dim=1).cpu().numpy()
        fitted.set_params(decision="auto")
        expected = product / product.sum(axis=1, keepdims=True)
        assert np.allclose(fitted.predict_proba(X), expected, atol=1e-6)
        two = CSSNClassifier(fitted.backbone, max_epochs=1, random_state=0, decision="auto").fit(
            *make_blobs((9, 5))
        )
        share = two.similarity(X) / two.similarity(X).sum(axis=1, keepdims=True)
        assert np.allclose(two.predict_proba(X), share)  # no auxiliary classifier there

    def test_duplicated_supports_change_nothing(self, fitted, blobs):
        before = fitted.predict_proba(blobs[0])
        tail = fitted.support_labels_ == 2
        for name in ("indices", "codes", "weights", "patches", "embeddings"):
            bank = getattr(fitted, f"support_{name}_")
            if name == "weights":
                bank = np.where(tail, bank / 2, bank)
            setattr(fitted, f"support_{name}_", np.concatenate([bank, bank[tail]]))
        assert np.allclose(fitted.predict_proba(blobs[0]), before)

    def test_relabelling_supports_permutes_columns(self, fitted, blobs):
        before = fitted.similarity(blobs[0])
        fitted.support_codes_ = (fitted.support_codes_ + 1) % 3
        assert np.allclose(fitted.similarity(blobs[0]), np.roll(before, 1, axis=1))

    def test_each_query_is_encoded_once_and_supports_never_again(self, fitted, blobs):
        encoded = []
        handle = fitted.net_.module_.trunk.register_forward_hook(
            lambda module, args, out: encoded.append(len(out))
        )
        fitted.predict(blobs[0])
        fitted.similarity(blobs[0][:7])
        handle.remove()
        assert sum(encoded) == 60 + 7

    def test_chunks_do_not_change_scores(self, fitted, blobs):
        whole = fitted.similarity(blobs[0])
        fitted._chunk_elements = 1  # one query at a time
        assert np.allclose(fitted.similarity(blobs[0]), whole, atol=1e-6)

    def test_symmetric(self, tiny, blobs):
        X, y = blobs
        plain = CSSNClassifier(**tiny).fit(X, y)
        symmetric = CSSNClassifier(**tiny, symmetric=True).fit(X, y)
        a, b = X[:10], X[10:20]
        assert not np.allclose(plain.pair_proba(a, b), plain.pair_proba(b, a))
        assert np.allclose(symmetric.pair_proba(a, b), symmetric.pair_proba(b, a))

    def test_single_sample_class_supports_itself(self, tiny):
        X, y = make_blobs((20, 1))
        clf = CSSNClassifier(**tiny).fit(X, y)
        assert (clf.support_labels_ == 1).sum() == 1
        assert np.isfinite(clf.predict_proba(X)).all()


@pytest.mark.parametrize("bank", [SupportBank("near"), SupportBank(n=0), SupportBank(n_draws=0)])
def test_banks_that_cannot_be_are_refused(bank):
    X, y = np.zeros((4, 16, 16), dtype=np.uint8), [0, 0, 1, 1]
    with pytest.raises(ValueError, match="SupportBank"):
        CSSNClassifier(bank=bank).fit(X, y)
