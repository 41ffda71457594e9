"""Displays show what was found, and change with it."""

from __future__ import annotations

import subprocess
import sys
import time

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_medimb import (
    CSSNClassifier,
    LMDClassifier,
    PretrainedFeatures,
    SoftmaxClassifier,
    SSLEncoder,
)
from sklearn_medimb.backbones import ConvNet, ViT
from sklearn_medimb.datasets import make_lesions
from sklearn_medimb.inspection import (
    CalibrationByClassDisplay,
    CoverageDisplay,
    EmbeddingDisplay,
    RecallByClassDisplay,
    SaliencyDisplay,
    SimilarityEvidenceDisplay,
    TrainingCurveDisplay,
    grad_cam,
)
from sklearn_medimb.metrics import expected_calibration_error, metric_interval
from tests.helpers import make_blobs


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def spots():
    """Images with one bright spot each, left or right, and where it is."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], [40, 20])
    X = rng.integers(0, 60, (60, 1, 24, 24), dtype=np.uint8)
    masks = np.zeros((60, 24, 24), dtype=bool)
    for image, mask, label in zip(X, masks, y, strict=True):
        top, left = rng.integers(2, 16, 2)
        mask[top : top + 6, left : left + 6] = True
        image[0, mask] = 230
        image[0, top : top + 6 : 2 if label else 7, left : left + 6] = 90  # striped, or plain
    return X, np.array(["plain", "striped"])[y], masks


@pytest.fixture(scope="module")
def clf(spots):
    X, y, _ = spots
    how = {"max_epochs": 25, "batch_size": 16, "lr": 5e-3, "augment": "none"}
    how |= {"precision": "float32", "random_state": 0}
    return SoftmaxClassifier(ConvNet(widths=(16, 32)), loss="logit_adjusted", **how).fit(X, y)


@pytest.fixture(scope="module")
def cssn(spots):
    X, y, _ = spots
    return CSSNClassifier(
        ConvNet(widths=(8, 16)), max_epochs=4, augment="none", random_state=0
    ).fit(X, y)  # fmt: skip


# ---------------------------------------------------------------- Grad-CAM


def test_maps_are_where_the_classes_differ(clf, spots):
    X, y, masks = spots
    assert (clf.predict(X) == y).mean() > 0.9
    maps = grad_cam(clf, X, "striped")[y == "striped"]
    inside = np.array([m[mask].mean() for m, mask in zip(maps, masks[y == "striped"], strict=True)])
    outside = np.array(
        [m[~mask].mean() for m, mask in zip(maps, masks[y == "striped"], strict=True)]
    )
    assert (inside > 2 * outside).mean() > 0.9


def test_maps_equal_the_formula(clf, spots):
    X = spots[0][:3]
    module = clf.net_.module_.eval()
    kept = []
    handle = module.trunk.backbone.register_forward_hook(lambda m, a, out: kept.append(out))
    batch = clf._preprocessor()(torch.from_numpy(X)).requires_grad_()
    logits = module(batch).logits
    handle.remove()
    odds = logits[:, 1] - logits[:, 0]
    (slope,) = torch.autograd.grad(odds.sum(), kept[0])
    wanted = (slope.mean(dim=(2, 3))[:, :, None, None] * kept[0]).sum(dim=1).relu()
    sides = wanted.shape[1:]
    found = torch.from_numpy(grad_cam(clf, X, "striped"))
    step = 24 // sides[0]
    # Between the centres of the places the map is bilinear.
    wanted = torch.nn.functional.interpolate(wanted[:, None], (24, 24), mode="bilinear")[:, 0]
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-6)
    assert step > 1


def test_maps_change_with_the_image_the_class_and_the_weights(clf, spots):
    X, y, _ = spots
    maps = grad_cam(clf, X[:12])
    r = np.corrcoef(maps.reshape(12, -1))
    assert np.median(r[np.triu_indices(12, 1)]) < 0.5
    assert not np.allclose(grad_cam(clf, X[:4], "plain"), grad_cam(clf, X[:4], "striped"))
    np.testing.assert_array_equal(grad_cam(clf, X[:12], clf.predict(X[:12])), maps)
    other = SoftmaxClassifier(ConvNet(widths=(16, 32)), max_epochs=1, random_state=1).fit(X, y)
    assert not np.allclose(grad_cam(other, X[:12]), maps)
    np.testing.assert_array_equal(grad_cam(clf, X[:12]), maps)  # and nothing else did


def test_a_map_depends_on_its_image_alone_and_leaves_no_trace(clf, spots):
    X = spots[0][:20]
    before = clf.predict_proba(X)
    slopes = [None if p.grad is None else p.grad.clone() for p in clf.net_.module_.parameters()]
    n_hooks = sum(len(m._forward_hooks) for m in clf.net_.module_.modules())
    np.testing.assert_allclose(grad_cam(clf, X)[17:], grad_cam(clf, X[17:]), atol=1e-5)
    assert sum(len(m._forward_hooks) for m in clf.net_.module_.modules()) == n_hooks
    for slope, p in zip(slopes, clf.net_.module_.parameters(), strict=True):
        assert p.grad is None if slope is None else torch.equal(p.grad, slope)
    np.testing.assert_array_equal(clf.predict_proba(X), before)


@pytest.mark.parametrize(
    ("make", "volumes"),
    [
        (lambda **how: CSSNClassifier(ConvNet(widths=(4, 8)), **how), False),
        (lambda **how: LMDClassifier(ConvNet(widths=(4, 8)), n_rounds=2, **how), False),
        (lambda **how: SoftmaxClassifier(ViT(4, 16, 1, 2), **how), False),
        (lambda **how: SoftmaxClassifier("resnet18", image_size=32, **how), False),
        (lambda **how: SoftmaxClassifier(ConvNet(widths=(4, 8)), spatial_dims=3, **how), True),
    ],
    ids=["comparison", "two stages", "tokens", "resized", "volumes"],
)  # fmt: skip
def test_every_kind_of_network_has_maps(make, volumes):
    X, y = make_blobs((10, 5))
    X = np.repeat(X[:, :1], 12, axis=1) if volumes else X
    clf = make(max_epochs=1, batch_size=8, random_state=0).fit(X, y)
    maps = grad_cam(clf, X[:5])
    sides = (32, 32) if clf.image_size else X.shape[1 if volumes else 2 :]
    assert maps.shape == (5, *sides)
    assert np.isfinite(maps).all()
    assert (maps >= 0).all()
    per_class = [grad_cam(clf, X[:5], label).reshape(5, -1) for label in clf.classes_]
    assert np.max(per_class) > 0
    assert np.abs(np.diff(np.concatenate(per_class), axis=0)).max() > 0
    display = SaliencyDisplay.from_estimator(clf, X[:5], y=y[:5])
    assert display.axes_.shape == (2, 5)


@pytest.mark.parametrize(
    ("what", "error", "match"),
    [
        (lambda clf, X: grad_cam(clf, X, "none such"), ValueError, r"holds \['none such'\]"),
        (lambda clf, X: grad_cam(clf, X, ["plain"] * 2), ValueError, "2 entries for 4"),
        (lambda clf, X: grad_cam(clf, X, [["plain"] * 2] * 4), ValueError, "8 entries for 4"),
        (
            lambda clf, X: SaliencyDisplay.from_estimator(clf, X, y=["plain"] * 3),
            ValueError,
            "y has 3 entries for 4",
        ),
        (lambda clf, X: grad_cam(PretrainedFeatures(), X), TypeError, "must be an image class"),
        (lambda clf, X: SaliencyDisplay.from_estimator(clf, np.repeat(X, 7, 0)), ValueError, "28"),
        (
            lambda clf, X: SimilarityEvidenceDisplay.from_estimator(clf, X, supports=X),
            TypeError,
            "CSSNClassifier, not a SoftmaxClassifier",
        ),
    ],
)
def test_what_has_no_maps_is_refused(what, error, match, clf, spots):
    with pytest.raises(error, match=match):
        what(clf, spots[0][:4])


def test_maps_of_pairs_are_those_of_the_image():
    X, y = make_blobs((10, 5))
    pairs = np.stack([X[:, 0], X[:, 0] // 2], axis=1)
    clf = CSSNClassifier(
        ConvNet(widths=(4, 8)), reference="paired", precision="float32", max_epochs=1
    ).fit(pairs, y)  # fmt: skip
    kept = []
    handle = clf.net_.module_.trunk.backbone.register_forward_hook(
        lambda m, a, out: kept.append(out)
    )
    batch = clf._preprocessor()(torch.from_numpy(pairs[:4])).requires_grad_()
    logits = clf._score_function(in_chunks=False)(batch)
    handle.remove()
    (slope,) = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), kept[0])
    wanted = (slope.mean(dim=(2, 3))[:, :, None, None] * kept[0]).sum(dim=1).relu()[:4]
    wanted = torch.nn.functional.interpolate(wanted[:, None], X.shape[2:], mode="bilinear")[:, 0]
    found = torch.from_numpy(grad_cam(clf, pairs[:4], clf.classes_[1]))
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-3, atol=1e-5)


def test_vectors_have_no_maps():
    X = np.random.default_rng(0).normal(size=(20, 6))
    clf = SoftmaxClassifier(max_epochs=1, random_state=0).fit(X, np.arange(20) % 2)
    with pytest.raises(ValueError, match="no layer with places"):
        grad_cam(clf, X)


# ---------------------------------------------------------------- evidence


def test_evidence_shows_query_neighbours_and_boxes(cssn, spots):
    X, y, _ = spots
    rows = [0, 1, 59]
    shown = SimilarityEvidenceDisplay.from_estimator(cssn, X[rows], supports=X, y=y[rows])
    assert shown.axes_.shape == (3, 4)
    evidence = cssn.explain(X[rows], 1, supports=X)
    for i, row in enumerate(shown.axes_):
        for k in range(2):
            drawn = row[2 + k].images[0].get_array()
            np.testing.assert_allclose(drawn, X[evidence.indices[i, k, 0], 0] / 255, atol=1e-6)
            (box,) = row[2 + k].patches
            (top, bottom), (left, right) = evidence.support_boxes[i, k, 0]
            assert box.get_xy() == (left - 0.5, top - 0.5)
            assert (box.get_width(), box.get_height()) == (right - left, bottom - top)
        assert len(row[0].patches) == 2
        heat = row[1].images[1].get_array()
        np.testing.assert_allclose(heat, evidence.to_pixels(evidence.maps[i]), atol=1e-5)
    titles = [row[0].get_title(loc="left") for row in shown.axes_]
    words = [
        "right" if a == b else f"is {b}" for a, b in zip(evidence.predicted, y[rows], strict=True)
    ]
    assert all(word in title for word, title in zip(words, titles, strict=True))


def test_a_row_of_axes_as_pyplot_gives_it(cssn, clf, spots):
    X = spots[0]
    row, column = plt.subplots(1, 4)[1], plt.subplots(2, 1)[1]
    shown = SimilarityEvidenceDisplay.from_estimator(cssn, X[:1], supports=X, axes=row)
    assert shown.axes_[0, 3] is row[3]
    assert SaliencyDisplay.from_estimator(clf, X[:1], axes=column).axes_[1, 0] is column[1]
    with pytest.raises(ValueError, match=r"axes has shape \(4,\); it must be \(2, 2\)"):
        SaliencyDisplay.from_estimator(clf, X[:2], axes=row)


def test_of_many_classes_those_most_alike_are_shown():
    rng = np.random.default_rng(0)
    X, y = rng.integers(0, 255, (27, 1, 12, 12), dtype=np.uint8), np.arange(27) % 9
    clf = CSSNClassifier(ConvNet(widths=(4, 8)), max_epochs=1, random_state=0).fit(X, y)
    shown = SimilarityEvidenceDisplay.from_estimator(clf, X[:9], supports=X, y=y[:9])
    assert shown.axes_.shape == (9, 8)
    for i, row in enumerate(shown.axes_):
        named = [int(ax.get_title(loc="left").partition(":")[0]) for ax in row[2:]]
        own = {shown.evidence.predicted[i], i}
        order = np.argsort(-shown.evidence.scores[i, :, 0], kind="stable").tolist()
        others = [k for k in order if k not in own][: 6 - len(own)]
        assert named == sorted([*own, *others])


def test_too_many_queries_are_refused(cssn, spots):
    with pytest.raises(ValueError, match="at most 12"):
        SimilarityEvidenceDisplay.from_estimator(cssn, spots[0], supports=spots[0])


# ---------------------------------------------------------------- recalls


def test_recalls_run_from_head_to_tail_with_their_intervals():
    rng = np.random.default_rng(0)
    y = rng.choice(["b", "a", "c"], 80, p=[0.6, 0.3, 0.1])
    p = np.where(rng.random(80) < 0.7, y, "b")
    counts, groups = {"a": 30, "b": 500, "c": 4}, np.arange(80) // 2
    shown = RecallByClassDisplay.from_predictions(y, p, train_counts=counts, groups=groups)
    assert shown.classes.tolist() == ["b", "a", "c"]
    assert shown.n_train.tolist() == [500, 30, 4]
    bars = [bar.get_width() for bar in shown.ax_.patches]
    np.testing.assert_allclose(bars, [(p == y)[y == k].mean() for k in "bac"])
    share = lambda y, p: (p == y)[y == "c"].mean() if (y == "c").any() else np.nan  # noqa: E731
    _, low, high = metric_interval(share, y, p, groups=groups)
    np.testing.assert_allclose((shown.low[2], shown.high[2]), (low, high), atol=0.02)
    assert "(c, 4)" in shown.ax_.get_title(loc="left")


def test_recalls_of_a_classifier_use_its_own_counts(clf, spots):
    X, y, _ = spots
    _, ax = plt.subplots()
    shown = RecallByClassDisplay.from_estimator(clf, X, y, ax=ax)
    assert shown.ax_ is ax
    assert shown.n_train.tolist() == [40, 20]
    with pytest.raises(ValueError, match=r"lacks the classes \['striped'\]"):
        RecallByClassDisplay.from_predictions(y, y, train_counts={"plain": 3})


def test_recalls_of_sixty_classes_come_at_once_and_of_one_image_too():
    y = np.repeat([f"class {k}" for k in range(60)], 5)
    p = np.where(np.arange(300) % 5, y, "class 0")
    start = time.perf_counter()
    shown = RecallByClassDisplay.from_predictions(y, p, train_counts=y)
    assert time.perf_counter() - start < 20  # minutes, where all classes were asked at once
    np.testing.assert_allclose(shown.recall[1:], 0.8)
    low, high = metric_interval(lambda y, p: (y == p).mean(), y[5:10], p[5:10])[1:]
    np.testing.assert_allclose(shown.low[1:], low, atol=1e-3)
    np.testing.assert_allclose(shown.high[1:], high, atol=1e-3)
    one = RecallByClassDisplay.from_predictions(
        ["a"] * 9 + ["b"], ["a"] * 10, train_counts={"a": 5, "b": 2}
    )
    assert one.recall[1] == one.low[1] == 0 < one.high[1] < 1
    with pytest.raises(ValueError, match="y_true holds strings, y_pred numbers"):
        RecallByClassDisplay.from_predictions(["1", "0"], [1, 0], train_counts=["1", "0"])


# ---------------------------------------------------------------- training


def test_curves_are_the_history_and_stages_are_marked():
    data = make_lesions([30, 12], image_size=16, random_state=0)
    clf = LMDClassifier(
        ConvNet(widths=(4, 8)), max_epochs=3, n_rounds=3, early_stopping=True, random_state=0
    ).fit(data.images, data.target)  # fmt: skip
    shown = TrainingCurveDisplay.from_estimator(clf)
    lines = [line for line in shown.ax_.lines if line.get_linestyle() == "-"]
    drawn = np.concatenate([line.get_ydata() for line in lines])
    np.testing.assert_allclose(drawn, [row["train_loss"] for row in clf.history_])
    assert [text.get_text() for text in shown.ax_.texts] == ["stage one", "stage two"]
    scores = [row["valid_score"] for row in clf.history_]
    np.testing.assert_allclose(shown.score_ax_.lines[0].get_ydata(), scores)
    assert f"{max(scores):.2f}" in shown.ax_.get_title(loc="left")


def test_what_was_not_trained_has_no_curve(spots):
    with pytest.raises(TypeError, match="not a Pipeline: of a pipeline or a search, pass"):
        TrainingCurveDisplay.from_estimator(make_pipeline(StandardScaler()).fit(np.eye(3)))
    with pytest.raises(ValueError, match="no epochs"):
        TrainingCurveDisplay.from_estimator(
            PretrainedFeatures(ConvNet(widths=(4, 8)), device="cpu").fit(spots[0])
        )


# ---------------------------------------------------------------- calibration, embedding


def test_calibration_is_that_of_each_class():
    rng = np.random.default_rng(0)
    proba = rng.dirichlet([1, 1, 1], 4000)
    y = np.array(["a", "b", "c"])[(proba.cumsum(1) > rng.random((4000, 1))).argmax(1)]
    shown = CalibrationByClassDisplay.from_predictions(y, proba, classes=["a", "b", "c"])
    assert shown.errors.max() < 0.03
    for given, came in zip(shown.predicted, shown.observed, strict=True):
        np.testing.assert_allclose(given, came, atol=0.08)
    bent = proba**3 / (proba**3).sum(1, keepdims=True)
    worse = CalibrationByClassDisplay.from_predictions(y, bent, classes=["a", "b", "c"])
    assert worse.errors.min() > 0.1
    mean = expected_calibration_error(y, bent, n_bins=8, strategy="quantile", class_wise=True)
    assert worse.errors.mean() == pytest.approx(mean, abs=1e-12)


def test_calibration_of_a_classifier(clf, spots):
    shown = CalibrationByClassDisplay.from_estimator(clf, *spots[:2])
    assert shown.classes.tolist() == ["plain", "striped"]
    with pytest.raises(ValueError, match="columns"):
        CalibrationByClassDisplay.from_predictions([0, 1], [[1, 0], [0, 1]], classes=[0, 1, 2])


def test_coverage_is_the_curve(clf, spots):
    X, y, _ = spots
    proba = np.random.default_rng(0).dirichlet([1, 1], 60)
    shown = CoverageDisplay.from_predictions(y, proba)
    wrong = clf.classes_[proba.argmax(1)] != y
    order = np.argsort(-proba.max(1))
    np.testing.assert_allclose(shown.error, wrong[order].cumsum() / np.arange(1, 61))
    drawn = shown.ax_.lines[0]
    np.testing.assert_allclose(drawn.get_ydata(), shown.error)
    share = f"{100 * wrong[order][:30].mean():.0f} % of the most certain half"
    assert shown.ax_.get_title(loc="left").endswith(share)
    assert CoverageDisplay.from_estimator(clf, X, y).error[-1] == (clf.predict(X) != y).mean()


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_embedding_says_whose_neighbours_are_whose(method, spots):
    rng = np.random.default_rng(0)
    y = np.repeat([3, 7, 9], [30, 15, 6])
    features = rng.normal(size=(51, 8)) + 20 * np.eye(8)[y % 5]
    shown = EmbeddingDisplay.from_features(features, y, method=method)
    assert shown.points.shape == (51, 2)
    assert shown.purity[9] == 1  # near nobody else
    mixed = EmbeddingDisplay.from_features(rng.normal(size=(51, 8)), y, method=method)
    assert mixed.purity[9] < 0.7
    assert "9" in mixed.ax_.get_title(loc="left")


def test_embedding_of_an_encoder_and_of_one_feature(spots):
    X, y, _ = spots
    encoder = SSLEncoder("byol", backbone=ConvNet(widths=(4, 8)), max_epochs=1, random_state=0).fit(
        X
    )
    assert EmbeddingDisplay.from_estimator(encoder, X, y).points.shape == (60, 2)
    one = EmbeddingDisplay.from_features(np.arange(9.0)[:, None], np.arange(9) // 5)
    assert one.points.shape == (9, 2)
    for features, match in (([[1.0]] * 2, "n >= 3"), (np.zeros((4, 2, 2)), "must be")):
        with pytest.raises(ValueError, match=match):
            EmbeddingDisplay.from_features(features, [0, 1] * (len(features) // 2))
    with pytest.raises(ValueError, match="method="):
        EmbeddingDisplay.from_features(np.eye(4), [0, 1, 0, 1], method="umap")


def test_labels_of_a_table_and_a_class_of_one_image():
    y = np.array(["common"] * 6 + ["rare"] * 3 + ["lone"], dtype=object)
    shown = EmbeddingDisplay.from_features(np.random.default_rng(0).normal(size=(10, 4)), y)
    assert np.isnan(shown.purity["lone"])  # which has no neighbour of its class
    assert "lone" not in shown.ax_.get_title(loc="left")
    assert "lone (1)" in [text.get_text() for text in shown.ax_.get_legend().get_texts()]
    alone = EmbeddingDisplay.from_features(np.eye(3), list("abc"))
    assert alone.ax_.get_title(loc="left") == "No class has two images"


@pytest.mark.parametrize("label", ["$\\foo$", "a$b$", "_hidden", "two\nlines", "long " * 60, ""])
def test_any_label_is_written_as_it_is(label, clf, spots):
    y = np.array(["a"] * 8 + [label] * 4)
    counts, proba = {"a": 8, label: 4}, np.full((12, 2), 0.5)
    features = np.random.default_rng(0).normal(size=(12, 4))
    shown = [
        RecallByClassDisplay.from_predictions(y, y, train_counts=counts),
        CalibrationByClassDisplay.from_predictions(y, proba, classes=np.unique(y)),
        EmbeddingDisplay.from_features(features, y),
    ]
    for one in shown:
        one.figure_.canvas.draw()  # nothing fails, nothing collapses
    for one in shown[1:]:
        assert len(one.ax_.get_legend().get_texts()) == 2
    ticks = [text.get_text().partition("\n")[0] for text in shown[0].ax_.get_yticklabels()]
    assert ticks[0] == "a"
    assert len(ticks[1]) < 40
    texts = [ax.get_title(loc="left") for ax in shown[1].figure_.axes]
    assert all(text.count("\n") == 0 for text in texts)


def test_legends_of_many_classes_name_the_worst():
    classes = np.array([f"class {k:02}" for k in range(40)])
    y, rng = np.repeat(classes, 3), np.random.default_rng(0)
    proba = rng.dirichlet(np.ones(40), 120)
    shown = CalibrationByClassDisplay.from_predictions(y, proba, classes=classes)
    names = [text.get_text().partition(":")[0] for text in shown.ax_.get_legend().get_texts()]
    assert set(names) == set(classes[np.argsort(-shown.errors, kind="stable")[:8]])
    marks = EmbeddingDisplay.from_features(rng.normal(size=(120, 3)), y).ax_.collections
    looks = {(m.get_facecolor().tobytes(), m.get_paths()[0].vertices.tobytes()) for m in marks}
    assert len(looks) == 40


def test_without_matplotlib_the_error_names_the_command():
    code = (
        "import sys; sys.modules['matplotlib'] = None; sys.modules['matplotlib.pyplot'] = None\n"
        "from sklearn_medimb.inspection import RecallByClassDisplay\n"
        "try: RecallByClassDisplay.from_predictions([0, 1], [0, 1], train_counts=[0, 1])\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 'pip install "sklearn_medimb[plot]"' in done.stdout
