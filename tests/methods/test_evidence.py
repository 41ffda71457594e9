"""Evidence: it depends on image and weights, finds a planted lesion, and says where things are."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from imblearn.base import BaseSampler
from scipy.stats import spearmanr
from torch import nn

from sklearn_medimb import CSSNClassifier
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.datasets import MappedImages, make_lesions
from sklearn_medimb.methods import SupportBank
from sklearn_medimb.methods._evidence import Places
from sklearn_medimb.persistence import load, save
from tests.helpers import make_blobs


def round_or_starry(n, seed):
    """Lesions of two kinds and where they are."""
    data = make_lesions([n, 1, 1, 1, 1, 1, 1, n], image_size=24, difficulty=0, random_state=seed)
    kept = np.isin(data.target, [0, 7])
    return data.images[kept], data.target[kept], data.masks[kept]


@pytest.fixture(scope="module")
def lesions():
    X, y, _ = round_or_starry(100, 2)
    clf = CSSNClassifier(
        ConvNet(widths=(16, 32, 64)), max_epochs=20, lr=5e-3, augment="none",
        precision="float32", random_state=2,
    ).fit(X, y)  # fmt: skip
    X_test, y_test, masks = round_or_starry(40, 102)
    right = clf.predict(X_test) == y_test
    assert right.mean() > 0.9
    X_test, masks = X_test[right], masks[right]
    return clf, X, X_test, masks, clf.explain(X_test, supports=X)


def between_images(maps):
    """Median correlation of the maps of different images."""
    r = np.corrcoef(maps.reshape(len(maps), -1))
    return np.median(r[np.triu_indices(len(r), 1)])


def centre(boxes):
    return tuple(np.moveaxis(boxes.mean(axis=-1).astype(int), -1, 0))


class TestEvidenceIsEvidence:
    def test_maps_of_different_images_differ(self, lesions):
        evidence = lesions[-1]
        assert between_images(evidence.maps) < 0.4
        nearest = evidence.query_maps[:, :, 0]
        assert between_images(nearest.reshape(-1, *nearest.shape[2:])) < 0.4

    def test_noise_has_another_map(self, lesions):
        clf, _, X, _, evidence = lesions
        noise = np.random.default_rng(0).integers(0, 256, X[:20].shape, dtype=np.uint8)
        own = clf.explain(noise).maps.reshape(20, -1)
        r = np.corrcoef(own, evidence.maps[:20].reshape(20, -1))[:20, 20:]
        assert np.median(r) < 0.4

    def test_weights_drawn_anew_from_the_top_change_the_map(self, lesions):
        # Sanity check of Adebayo et al. (NeurIPS 2018): each layer shuffled, and all above it.
        clf, X_train, X, _, evidence = lesions
        shuffled = copy.deepcopy(clf)
        module = shuffled.net_.module_
        head = [module.head.scorer, module.head.context]
        rng, likeness = torch.Generator().manual_seed(0), []
        for part in [*head, *reversed(module.trunk.backbone)]:
            with torch.no_grad():
                for weight in part.parameters():
                    order = torch.randperm(weight.numel(), generator=rng)
                    weight.copy_(weight.flatten()[order].view_as(weight))
            bank = shuffled._encode(shuffled._read(X_train), shuffled.support_indices_)
            shuffled.support_patches_ = bank.patches.numpy()
            maps = shuffled.explain(X[:12]).maps
            pairs = zip(maps, evidence.maps[:12], strict=True)
            r = [spearmanr(a.ravel(), b.ravel()).statistic for a, b in pairs]
            likeness.append(np.median(r))
        assert likeness[0] < 0.95  # the scorer alone: it reads little but how alike a pair is
        assert max(likeness[1:]) < 0.6
        assert likeness[-1] < 0.3

    def test_strongest_place_lies_on_the_lesion(self, lesions):
        _, _, _, masks, evidence = lesions
        chance = masks.mean()
        assert chance < 0.16
        hits = masks[(np.arange(len(masks)), *centre(evidence.boxes))]
        assert hits.mean() >= 0.7

    def test_places_of_supports_lie_on_their_lesions(self, lesions):
        clf, *_, evidence = lesions
        _, _, masks = round_or_starry(100, 2)
        own = np.searchsorted(clf.classes_, evidence.predicted)
        rows = evidence.indices[np.arange(len(own)), own, 0]
        boxes = evidence.support_boxes[np.arange(len(own)), own, 0]
        assert masks[(rows, *centre(boxes))].mean() >= 0.6

    def test_deleting_the_strongest_places_lowers_the_score_fastest(self, lesions):
        clf, _, X, _, evidence = lesions
        pixels = X.astype(np.float32) / 255
        mean = pixels.mean(axis=(1, 2), keepdims=True)
        strength = evidence.to_pixels(evidence.maps)
        rng = np.random.default_rng(0)
        n_places = evidence.maps[0].size
        order = evidence.to_pixels(
            rng.permuted(np.tile(np.arange(n_places), (len(X), 1)), axis=1).reshape(
                evidence.maps.shape
            )
        )
        sign = np.where(evidence.predicted == clf.classes_[1], 1, -1)
        for n in (2, 5, 10):
            cut = np.sort(evidence.maps.reshape(len(X), -1), axis=1)[:, -n, None, None]
            strongest = np.where((strength >= cut)[..., None], mean, pixels)
            random = np.where((order < n)[..., None], mean, pixels)
            left, chance = (sign * clf.decision_function(some) for some in (strongest, random))
            assert left.mean() < chance.mean() - 0.2


class TestWhatIsMeasured:
    """Against one prediction at a time."""

    @pytest.fixture
    def fitted(self, tiny, blobs):
        return CSSNClassifier(**tiny, bank=SupportBank(n=4, n_draws=2)).fit(*blobs)

    @pytest.mark.parametrize("decision", ["patch", "combined"])
    @pytest.mark.parametrize("symmetric", [False, True])
    def test_a_place_counts_what_the_decision_loses_without_it(
        self, fitted, blobs, decision, symmetric
    ):
        X, _ = blobs
        fitted.set_params(decision=decision, symmetric=symmetric)
        evidence = fitted.explain(X[:4], 2, supports=X, n_places=9)
        assert evidence.maps.shape == (4, 3, 3)
        pixels = X.astype(np.float32) / 255

        def without(row, box):
            image = pixels[row].copy()
            (top, bottom), (left, right) = box
            image[:, top:bottom, left:right] = image.mean(axis=(1, 2), keepdims=True)
            return image[None]

        def logit(p):
            return np.log(p / (1 - p))

        for row in range(4):
            own = np.searchsorted(fitted.classes_, evidence.predicted[row])
            odds = logit(fitted.predict_proba(X[row : row + 1])[0, own])
            assert evidence.log_odds[row] == pytest.approx(odds, abs=1e-4)
            image, box = pixels[row : row + 1], evidence.places[1, 2]
            left = logit(fitted.predict_proba(without(row, box))[0, own])
            assert evidence.maps[row, 1, 2] == pytest.approx(odds - left, abs=1e-4)
            for k, m in np.ndindex(3, 2):
                near = evidence.indices[row, k, m]
                z = logit(fitted.pair_proba(image, pixels[near][None]))[0]
                fall = z - logit(fitted.pair_proba(without(row, box), pixels[near][None]))[0]
                assert evidence.query_maps[row, k, m, 1, 2] == pytest.approx(fall, abs=1e-3)
                fall = z - logit(fitted.pair_proba(image, without(near, box)))[0]
                assert evidence.support_maps[row, k, m, 1, 2] == pytest.approx(fall, abs=1e-3)

    def test_nearest_supports_of_each_class(self, fitted, blobs):
        X, y = blobs
        evidence = fitted.explain(X[:5], n_neighbors=4)
        assert evidence.indices.shape == evidence.scores.shape == (5, 3, 4)
        assert np.array_equal(evidence.classes, fitted.classes_)
        assert np.array_equal(evidence.predicted, fitted.predict(X[:5]))
        for row, k in np.ndindex(5, 3):
            near = evidence.indices[row, k]
            assert (y[near] == k).all()
            assert len(set(near)) == 4
            members = np.unique(fitted.support_indices_[fitted.support_codes_ == k])
            p = fitted.pair_proba(np.repeat(X[row : row + 1], len(members), 0), X[members])
            assert evidence.scores[row, k] == pytest.approx(np.sort(p)[::-1][:4], abs=1e-5)

    def test_the_published_maps_are_at_hand(self, fitted, blobs):
        X, _ = blobs
        M = fitted.patch_similarity(X[:3], X[3:6])
        assert M.shape == (3, 8, 8)
        with torch.no_grad():
            z = fitted._map_logits(torch.from_numpy(M)).sigmoid().numpy()
        assert np.allclose(z, fitted.pair_proba(X[:3], X[3:6]), atol=1e-5)

    def test_a_repeated_image_is_one_neighbour(self, tiny, blobs):
        from imblearn.over_sampling import RandomOverSampler

        X, _ = blobs
        evidence = CSSNClassifier(**tiny, sampler=RandomOverSampler()).fit(*blobs).explain(X[:9])
        assert all(len(set(near)) == 3 for near in evidence.indices.reshape(-1, 3))

    def test_a_class_with_few_supports_leaves_places_empty(self, tiny):
        X, y = make_blobs((20, 2))
        evidence = CSSNClassifier(**tiny).fit(X, y).explain(X[:4], 3, supports=X)
        assert (evidence.indices[:, 1, 2] == -1).all()
        assert np.isnan(evidence.scores[:, 1, 2]).all()
        assert np.isnan(evidence.support_maps[:, 1, 2]).all()
        assert (evidence.support_boxes[:, 1, 2] == -1).all()
        assert np.isfinite(evidence.support_maps[:, 1, :2]).all()

    def test_made_supports_have_scores_but_no_image(self, tiny, blobs):
        class Made(BaseSampler):
            """Puts another image in the place of each."""

            _sampling_type = "over-sampling"

            def _fit_resample(self, X, y):
                return 255 - X, y

        X, y = blobs
        clf = CSSNClassifier(**tiny, sampler=Made()).fit(X, y)
        assert (clf.support_indices_ == -1).all()
        evidence = clf.explain(X[:3], supports=X)
        assert np.isfinite(evidence.scores).all()
        assert np.isfinite(evidence.query_maps).all()
        assert (evidence.indices == -1).all()
        assert np.isnan(evidence.support_maps).all()


class Corners(nn.Module):
    """A network that sees one corner of the image: its receptive field is known."""

    def __init__(self):
        super().__init__()
        self.project = nn.Conv2d(1, 8, 3, stride=3)

    def forward(self, images):
        seen = torch.zeros_like(images)
        seen[..., :6, -6:] = images[..., :6, -6:]
        return self.project(seen)


LAYOUTS = {
    "gray": lambda X: X[:, 0],
    "channels last": lambda X: np.moveaxis(X, 1, -1),
    "list": list,
    "float": lambda X: X.astype(np.float32) / 255,
}


class TestWhere:
    def test_places_tile_the_image(self):
        for shape, n in (((3, 23, 31), 100), ((1, 9, 10, 12), 64), ((37,), 10), ((2, 1, 4), 100)):
            places = Places(shape, n)
            sides = shape[1:] or shape
            seen = np.zeros(sides, dtype=int)
            for place in np.ndindex(places.grid):
                box = places.boxes[place]
                assert (box[:, 0] < box[:, 1]).all()
                seen[tuple(slice(*ends) for ends in box)] += 1
            assert (seen == 1).all()
            assert len(places) == np.prod(places.grid) <= n

    def test_only_what_the_network_sees_is_evidence(self):
        X, y = np.random.default_rng(0).random((40, 18, 24)).astype(np.float32), np.arange(40) % 2
        X[:, :6, -6:] += y[:, None, None] / 2
        clf = CSSNClassifier(Corners(), max_epochs=2, augment="none", random_state=0).fit(X, y)
        evidence = clf.explain(X[:6], supports=X)
        for maps in (evidence.maps, evidence.query_maps, evidence.support_maps):
            seen = evidence.to_pixels(np.abs(maps).reshape(-1, *evidence.maps.shape[1:]))
            # What is hidden changes the mean colour of nothing that the network sees.
            assert (seen[:, :6, -6:] > 1e-6).any()
            places = np.abs(maps).reshape(-1, *evidence.maps.shape[1:])
            hidden = (evidence.places[..., 0, 0] >= 6) | (evidence.places[..., 1, 1] <= 18)
            assert places[:, hidden].max() < 1e-5

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts_agree(self, tiny, layout):
        X, y = make_blobs((20, 10), size=12)
        X = X[..., :9]  # 12 rows, 9 columns
        X[:, 1:] = X[:, :1]
        base = CSSNClassifier(**tiny).fit(X, y).explain(X[:3], supports=X)
        other = LAYOUTS[layout](X)
        found = CSSNClassifier(**tiny).fit(other, y).explain(other[:3], supports=other)
        assert np.array_equal(found.places, base.places)
        assert found.places[..., 0, 1].max() == 12
        assert found.places[..., 1, 1].max() == 9
        assert found.maps.shape == base.maps.shape
        if layout != "gray":
            assert np.allclose(found.maps, base.maps, atol=1e-4)
            assert np.allclose(found.support_maps, base.support_maps, atol=1e-4)

    def test_volumes_have_boxes_of_three_axes(self, tiny):
        X = np.random.default_rng(0).integers(0, 256, (24, 8, 10, 12), dtype=np.uint8)
        clf = CSSNClassifier(**tiny, spatial_dims=3).fit(X, np.arange(24) % 2)
        evidence = clf.explain(X[:2], supports=X)
        assert evidence.boxes.shape == (2, 3, 2)
        assert evidence.support_boxes.shape == (2, 2, 3, 3, 2)
        assert evidence.to_pixels(evidence.maps).shape == (2, 8, 10, 12)
        assert np.array_equal(evidence.places.reshape(-1, 3, 2).max(axis=0)[:, 1], [8, 10, 12])

    def test_vectors_have_ranges_of_features(self):
        rng = np.random.default_rng(0)
        y = np.arange(80) % 2
        X = rng.normal(size=(80, 20))
        X[:, 13] += 4 * y
        clf = CSSNClassifier(max_epochs=20, random_state=0).fit(X, y)
        evidence = clf.explain(X[:30], supports=X)
        assert evidence.maps.shape == (30, 20)
        assert (evidence.boxes[:, 0, 0] == 13).mean() > 0.8
        alone = clf.explain(X[4:5])
        assert np.array_equal(alone.maps[0], evidence.maps[4])

    def test_a_pair_is_occluded_at_one_place_in_both_images(self, tiny):
        rng = np.random.default_rng(0)
        X, y = rng.integers(0, 256, (30, 2, 12, 12), dtype=np.uint8), np.arange(30) % 2
        clf = CSSNClassifier(**tiny, reference="paired").fit(X, y)
        evidence = clf.explain(X[:2], supports=X, n_places=9)
        pixels = X[:1].astype(np.float32) / 255
        pixels[..., :4, 8:] = pixels.mean(axis=(2, 3), keepdims=True)
        p, left = clf.predict_proba(X[:1])[0].max(), clf.predict_proba(pixels)[0]
        left = left[np.searchsorted(clf.classes_, evidence.predicted[0])]
        fall = np.log(p / (1 - p)) - np.log(left / (1 - left))
        assert evidence.maps[0, 0, 2] == pytest.approx(fall, abs=1e-4)
        assert evidence.support_boxes.shape == (2, 2, 3, 2, 2)

    def test_lazy_images(self, tiny, blobs, tmp_path):
        X, y = blobs
        np.save(tmp_path / "X.npy", X)
        clf = CSSNClassifier(**tiny).fit(X, y)
        lazy = MappedImages(tmp_path / "X.npy")
        kept, read = clf.explain(X[:5], supports=X), clf.explain(lazy[:5], supports=lazy)
        assert np.array_equal(kept.maps, read.maps)
        assert np.array_equal(kept.support_maps, read.support_maps)


class TestHowItBehaves:
    @pytest.fixture
    def fitted(self, tiny, blobs):
        return CSSNClassifier(**tiny).fit(*blobs)

    def test_copies_explain_equally(self, fitted, blobs, tmp_path):
        X, _ = blobs
        save(fitted, tmp_path / "model.safetensors")
        evidence = fitted.explain(X[:4], supports=X)
        for other in (load(tmp_path / "model.safetensors"), pickle.loads(pickle.dumps(fitted))):
            again = other.explain(X[:4], supports=X)
            for name, value in vars(evidence).items():
                assert np.array_equal(getattr(again, name), value, equal_nan=value.dtype != object)

    def test_nothing_else_changes(self, fitted, blobs):
        X, _ = blobs
        before = pickle.dumps(fitted)
        state = torch.random.get_rng_state()
        first, second = fitted.explain(X[:4], supports=X), fitted.explain(X[:4], supports=X)
        assert np.array_equal(first.support_maps, second.support_maps)
        assert np.array_equal(first.maps, second.maps)
        assert pickle.dumps(fitted) == before
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        module = fitted.net_.module_
        assert not module.training
        assert not any(p.is_inference() for p in module.parameters())

    def test_chunks_and_blocks_change_nothing(self, fitted, blobs, monkeypatch):
        X, _ = blobs
        whole = fitted.explain(X[:4], supports=X, n_places=9)
        fitted._chunk_elements = 1
        monkeypatch.setattr("sklearn_medimb.methods._cssn.inference_block", lambda *a: 3)
        small = fitted.explain(X[:4], supports=X, n_places=9)
        assert np.allclose(small.maps, whole.maps, atol=1e-4)
        assert np.allclose(small.support_maps, whole.support_maps, atol=1e-4)

    def test_less_memory_means_smaller_blocks(self, fitted, blobs, monkeypatch):
        X, _ = blobs
        whole, sizes = fitted.explain(X[:2], supports=X), []
        encode = type(fitted.net_.module_).encode

        def scarce(self, images):
            if len(images) > 40:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            sizes.append(len(images))
            return encode(self, images)

        monkeypatch.setattr(type(fitted.net_.module_), "encode", scarce)
        small = fitted.explain(X[:2], supports=X)
        assert max(sizes) <= 40
        assert np.allclose(small.maps, whole.maps, atol=1e-4)

    def test_each_image_is_encoded_once_a_place(self, fitted, blobs):
        X, _ = blobs
        encoded = []
        handle = fitted.net_.module_.trunk.register_forward_hook(
            lambda module, args, out: encoded.append(len(out))
        )
        evidence = fitted.explain(X[:7], supports=X, n_places=16)
        handle.remove()
        assert sum(encoded) == (7 + len(np.unique(evidence.indices))) * (1 + 16)
        assert len(encoded) <= 6

    def test_other_images_than_those_of_fit_are_refused(self, fitted, blobs):
        X, _ = blobs
        with pytest.raises(ValueError, match=r"supports\[\d+\] is not the image .* X of fit"):
            fitted.explain(X[:3], supports=X[::-1])
        with pytest.raises(ValueError, match=r"supports holds 5 images, .* X of fit"):
            fitted.explain(X[:3], supports=X[:5])
        with pytest.raises(ValueError, match="fitted on images of shape"):
            fitted.explain(X[:3], supports=X[..., :8])

    @pytest.mark.parametrize("n_places", [1, 0, -3, 2.5, "9", None])
    def test_number_of_places(self, fitted, blobs, n_places):
        with pytest.raises(ValueError, match="n_places="):
            fitted.explain(blobs[0][:2], n_places=n_places)

    def test_short_repr(self, fitted, blobs):
        X, _ = blobs
        assert repr(fitted.explain(X[:5])) == (
            "Evidence(5 queries, 10 x 10 places, 3 nearest supports of each of 3 classes, no maps "
            "of the supports)"
        )
        assert repr(fitted.explain(X[:1], 2, supports=X, n_places=9)) == (
            "Evidence(1 queries, 3 x 3 places, 2 nearest supports of each of 3 classes, maps of "
            "both)"
        )
        assert fitted.explain(X[:2]).support_boxes is None
