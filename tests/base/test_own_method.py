"""A method from outside the package, as the page on it writes one."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from contextlib import suppress
from pathlib import Path
from unittest import SkipTest

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import estimator_checks_generator

from sklearn_medimb import SoftmaxClassifier, SPMixClassifier
from sklearn_medimb.backbones import MLP, ConvNet
from sklearn_medimb.losses import FocalLoss, Loss
from sklearn_medimb.onnx import export_onnx
from sklearn_medimb.persistence import load, save
from sklearn_medimb.tuning import search_space, suggest
from sklearn_medimb.utils.estimator_checks import check_image_estimator

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "write_your_own_method.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def imported(name, source, tmp_path):
    path = tmp_path / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Modules of the page's first and second piece of code."""
    folder = tmp_path_factory.mktemp("page")
    names = ["page_function", "page_class", "page_more"]
    blocks = [BLOCKS[0], BLOCKS[1], BLOCKS[-1]]
    yield [imported(*pair, folder) for pair in zip(names, blocks, strict=True)]
    for name in names:
        del sys.modules[name]


SMALL = {"backbone": ConvNet(widths=(8,)), "batch_size": 16, "random_state": 0}


def test_the_classes_take_forty_lines_docstrings_and_imports_included():
    assert len(BLOCKS[1].splitlines()) <= 40
    example = (ROOT / "examples" / "practice" / "plot_own_method.py").read_text()
    bodies = [
        ast.dump(node)
        for source in (BLOCKS[1], example)
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "LogitNormClassifier"
    ]
    assert "_make_loss" in bodies[0]
    assert "_make_loss" in bodies[1]


def test_its_loss_is_the_formula(page):
    logits, y = torch.randn(7, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    costs = page[1].LogitNormLoss(temperature=0.2).costs(logits, None)
    expected = F.cross_entropy(F.normalize(logits) / 0.2, y, reduction="none")
    torch.testing.assert_close(costs.gather(1, y[:, None])[:, 0], expected)


def test_function_object_and_class_train_alike(page, blobs):
    X, y = blobs
    function, classes, _ = page
    common = {**SMALL, "max_epochs": 2, "precision": "float64"}
    weight = np.random.default_rng(0).random(len(y))
    fitted = [
        clf.fit(X, y, sample_weight=weight)
        for clf in (
            SoftmaxClassifier(**common, loss=function.logit_norm, class_weight="balanced"),
            SoftmaxClassifier(**common, loss=classes.LogitNormLoss(), class_weight="balanced"),
            classes.LogitNormClassifier(**common, class_weight="balanced"),
        )
    ]
    plain = SoftmaxClassifier(**common, class_weight="balanced").fit(X, y, sample_weight=weight)
    first, *others = (clf.predict_proba(X) for clf in fitted)
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-9)
    assert not np.allclose(plain.predict_proba(X), first, atol=1e-3)


def test_the_parameter_matters(page, blobs):
    one, two = (
        page[1].LogitNormClassifier(**SMALL, max_epochs=2, temperature=t).fit(*blobs)
        for t in (0.1, 1.0)
    )
    assert one.history_[0]["train_loss"] != two.history_[0]["train_loss"]


@pytest.mark.parametrize("mixup", ["mixup", "balanced"])
def test_functions_see_mixed_labels_one_at_a_time(mixup, blobs):
    def focal(logits, labels, class_counts):
        own = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
        return -((1 - own.exp()) ** 2) * own

    common = {**SMALL, "max_epochs": 2, "mixup": mixup, "precision": "float64"}
    ours, theirs = (
        SoftmaxClassifier(**common, loss=loss).fit(*blobs).predict_proba(blobs[0])
        for loss in (focal, FocalLoss(gamma=2.0))
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_functions_see_the_class_counts(blobs):
    X, y = blobs
    seen = []

    def loss(logits, labels, class_counts):
        seen.append(class_counts)
        return F.cross_entropy(logits + class_counts.log(), labels, reduction="none")

    adjusted = SoftmaxClassifier(**SMALL, max_epochs=2, loss=loss, precision="float64").fit(X, y)
    assert seen[0].tolist() == np.bincount(y).tolist()
    named = SoftmaxClassifier(
        **SMALL, max_epochs=2, loss="logit_adjusted", precision="float64"
    ).fit(X, y)
    np.testing.assert_allclose(adjusted.predict_proba(X), named.predict_proba(X), rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda logits, labels, counts: logits.sum(), r"loss must give one cost per sample"),
        (lambda logits, labels, counts: logits, r"loss must give one cost per sample"),
        (FocalLoss, "loss=FocalLoss is a class: pass an instance"),
    ],
)
@pytest.mark.parametrize("cls", [SoftmaxClassifier, SPMixClassifier])
def test_what_is_no_loss_is_refused(cls, loss, message, blobs):
    clf = cls(**SMALL, max_epochs=1, loss=loss)
    with pytest.raises((ValueError, TypeError), match=message):
        clf.fit(*blobs)
    assert not hasattr(clf, "net_")


def test_it_passes_the_image_checks(page):
    check_image_estimator(
        page[1].LogitNormClassifier(ConvNet(widths=(4, 8)), max_epochs=2, batch_size=8)
    )


def test_it_passes_the_checks_of_scikit_learn(page):
    clf = page[1].LogitNormClassifier(
        backbone=MLP(hidden=(16,)), max_epochs=40, precision="float64", random_state=0
    )
    for estimator, check in estimator_checks_generator(clf):
        with suppress(SkipTest):
            check(estimator)


def test_it_is_searched(page, blobs):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    clf = page[1].LogitNormClassifier(**SMALL, max_epochs=1)
    grid = GridSearchCV(clf, {"temperature": [0.05, 0.5]}, cv=2).fit(*blobs)
    assert grid.best_params_["temperature"] in (0.05, 0.5)
    space = search_space(page[1].LogitNormClassifier)
    assert (space["temperature"].low, space["temperature"].high) == (0.02, 1.0)
    study = optuna.create_study()
    study.optimize(lambda t: clf.set_params(**suggest(t, {"temperature": space["temperature"]}))
                   .fit(*blobs).score(*blobs), n_trials=2)  # fmt: skip
    assert len(study.trials) == 2
    nested = search_space(SoftmaxClassifier(loss=page[1].LogitNormLoss()))
    assert nested["loss__temperature"] == space["temperature"]


def test_it_is_saved_loaded_and_exported(page, blobs, tmp_path):
    pytest.importorskip("safetensors")
    X, y = blobs
    Mine = page[1].LogitNormClassifier
    clf = Mine(**SMALL, max_epochs=1, precision="float32").fit(X, y)
    save(clf, tmp_path / "model")
    with pytest.raises(ValueError, match="LogitNormClassifier"):
        load(tmp_path / "model")
    back = load(tmp_path / "model", trusted=[Mine])
    np.testing.assert_array_equal(back.predict_proba(X), clf.predict_proba(X))
    onnxruntime = pytest.importorskip("onnxruntime")
    export_onnx(clf, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(["probabilities"], {"images": X.astype(np.float32)})
    np.testing.assert_allclose(found, clf.predict_proba(X), rtol=1e-4, atol=1e-5)


def test_more_than_a_loss(page, blobs):
    X, y = blobs
    more = page[2]
    balanced = more.BalancedBatches(**SMALL, max_epochs=2).fit(X, y)
    np.testing.assert_allclose(balanced.class_prior_, [1 / 3] * 3)
    plain = SoftmaxClassifier(**SMALL, max_epochs=2).fit(X, y)
    assert not np.allclose(balanced.predict_proba(X), plain.predict_proba(X))
    free, short = (
        more.ShortFeaturesClassifier(**SMALL, max_epochs=5, lr=1e-2, penalty=p).fit(X, y)
        for p in (0.0, 1.0)
    )
    assert {"train_label", "train_length"} <= free.history_[-1].keys()
    assert short.history_[-1]["train_length"] < free.history_[-1]["train_length"]
    assert (short.transform(X) ** 2).mean() < (free.transform(X) ** 2).mean()


class Unannounced(SoftmaxClassifier):
    """Twice as many batches as the schedule knows of."""

    def _make_batches(self, train, context):
        rows = np.arange(len(train.y))
        return self._label_batches(train, lambda rng: [rows[:10], rows[10:]] * 4, context)


class Once(SoftmaxClassifier):
    """Batches that are there for one epoch."""

    def _make_batches(self, train, context):
        return iter(list(super()._make_batches(train, context)))


class Modular(SoftmaxClassifier):
    """A criterion of another kind."""

    def _make_criterion(self, train, n_steps):
        return torch.nn.CrossEntropyLoss()


class Short(Loss):
    """One cost a sample."""

    def costs(self, logits, constants):
        """Sum over classes."""
        return logits.sum(dim=1)


@pytest.mark.parametrize(
    ("clf", "error", "message"),
    [
        (Unannounced(**SMALL), ValueError, "An epoch has 8 batches, .*planned for 4"),
        (Once(**SMALL, max_epochs=2), ValueError, "An epoch has 0 batches"),
        (Modular(**SMALL), TypeError, "A stage minimises a sklearn_medimb.base.Criterion"),
        (SoftmaxClassifier(**SMALL, loss=Short()), ValueError, "cost of each sample under each"),
    ],
    ids=["length", "generator", "criterion", "costs"],
)
def test_mistakes_of_authors_are_named(clf, error, message, blobs):
    with pytest.raises(error, match=message):
        clf.fit(*blobs)
    assert not hasattr(clf, "net_")
