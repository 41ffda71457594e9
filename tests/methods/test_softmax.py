"""SoftmaxClassifier: each remedy has the effect that its paper claims."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from imblearn.over_sampling import SMOTE, RandomOverSampler
from imblearn.under_sampling import RandomUnderSampler
from sklearn.metrics import balanced_accuracy_score, recall_score

from sklearn_medimb import SoftmaxClassifier
from sklearn_medimb.backbones import MLP, ConvNet
from sklearn_medimb.losses import LOSSES, CrossEntropyLoss, LogitAdjustedLoss
from tests.helpers import make_blobs


def overlapping(n_head=300, n_tail=20, seed=0):
    """Two Gaussian classes that overlap: the prior decides between them."""
    rng = np.random.default_rng(seed)
    y = np.repeat([0, 1], [n_head, n_tail])
    return rng.normal(size=(len(y), 4)) + 1.2 * y[:, None], y


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns(loss, blobs):
    X, y = blobs
    X = X // 3 + 50 * y[:, None, None, None].astype(np.uint8)  # pooled features see shades
    clf = SoftmaxClassifier(
        ConvNet(widths=(8, 16)), loss=loss, max_epochs=30, batch_size=16, augment="none",
        random_state=0,
    ).fit(X, y)  # fmt: skip
    assert balanced_accuracy_score(y, clf.predict(X)) > 0.95


@pytest.mark.parametrize(
    "remedy",
    [
        {"class_weight": "balanced"},
        {"class_weight": {0: 1, 1: 15}},
        {"loss": "class_balanced"},
        {"loss": "balanced_softmax"},
        {"loss": "logit_adjusted"},
        {"loss": "ldam"},
        {"post_hoc_tau": 1.0},
        {"loss": CrossEntropyLoss(reweight_after=0.5)},
        {"sampler": RandomOverSampler()},
        {"sampler": RandomUnderSampler()},
        {"sampler": SMOTE()},
        {"mixup": "balanced", "mixup_alpha": 0.4},
    ],
    ids=str,
)
def test_remedies_raise_the_recall_of_the_tail(remedy):
    X, y = overlapping()
    X_test, y_test = overlapping(500, 500, seed=1)
    recall = lambda clf: recall_score(y_test, clf.fit(X, y).predict(X_test))  # noqa: E731
    # A small network, which cannot simply memorise the repeated rows of the tail.
    common = {"backbone": MLP(hidden=(16,)), "lr": 1e-2, "max_epochs": 30, "random_state": 0}
    plain = recall(SoftmaxClassifier(**common))
    assert recall(SoftmaxClassifier(**remedy, **common)) > plain + 0.1


def test_balanced_softmax_is_logit_adjustment_with_tau_one():
    X, y = overlapping()
    one = SoftmaxClassifier(loss="balanced_softmax", max_epochs=3, random_state=0).fit(X, y)
    two = SoftmaxClassifier(loss=LogitAdjustedLoss(tau=1.0), max_epochs=3, random_state=0).fit(X, y)
    assert np.array_equal(one.predict_proba(X), two.predict_proba(X))


def test_post_hoc_adjustment_equals_formula():
    X, y = overlapping()
    plain = SoftmaxClassifier(max_epochs=3, random_state=0).fit(X, y)
    adjusted = SoftmaxClassifier(max_epochs=3, random_state=0, post_hoc_tau=0.7).fit(X, y)
    shift = 0.7 * np.log((300 / 320) / (20 / 320))
    expected = plain.decision_function(X) + shift
    assert np.allclose(adjusted.decision_function(X), expected)


def test_mixup_changes_training_and_keeps_label_mass(tiny, blobs):
    X, y = blobs
    plain = SoftmaxClassifier(**tiny).fit(X, y)
    mixed = SoftmaxClassifier(**tiny, mixup="mixup", mixup_alpha=1.0).fit(X, y)
    assert not np.allclose(plain.predict_proba(X), mixed.predict_proba(X))


def test_sample_weights_equal_repeated_rows_with_images(blobs):
    # One full batch, no augmentation, no batch norm: the weighted loss is the repeated one.
    X, y = blobs
    weight = np.random.default_rng(0).integers(0, 3, len(y))
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
    common = {
        "backbone": net,
        "precision": "float64",
        "augment": "none",
        "batch_size": 256,
        "max_epochs": 5,
        "random_state": 0,
    }
    weighted = SoftmaxClassifier(**common).fit(X, y, sample_weight=weight)
    repeated = SoftmaxClassifier(**common).fit(np.repeat(X, weight, 0), np.repeat(y, weight))
    assert np.allclose(weighted.predict_proba(X), repeated.predict_proba(X), atol=1e-9)


def test_sampler_acts_after_the_validation_split():
    # Every training row carries its number in its first feature; the scorer sees what is held out.
    X, y = overlapping(60, 12)
    X[:, 0] = np.arange(len(X))
    held, trained = [], []

    def scoring(estimator, X_held, y_held):
        held.append(X_held[:, 0])
        return 0.0

    class Recording(RandomOverSampler):
        def fit_resample(self, X, y, **params):
            X_new, y_new = super().fit_resample(X, y, **params)
            trained.append((len(X), len(X_new), np.bincount(y_new)))
            return X_new, y_new

    clf = SoftmaxClassifier(
        sampler=Recording(), early_stopping=True, scoring=scoring, max_epochs=2, random_state=0
    ).fit(X, y)
    n_before, n_after, counts = trained[0]
    assert n_before == len(X) - len(held[0])
    assert n_after > n_before
    assert counts[0] == counts[1]
    assert clf.n_iter_ == 2


def test_ldam_head_is_a_scaled_cosine(tiny, blobs):
    X, y = blobs
    clf = SoftmaxClassifier(**tiny, loss="ldam").fit(X, y)
    assert np.abs(clf.decision_function(X)).max() <= 30 + 1e-4


def test_transform_gives_features_that_the_head_reads(tiny):
    X, y = make_blobs()
    clf = SoftmaxClassifier(**tiny).fit(X, y)
    features = clf.transform(X)
    assert features.shape == (60, 16)
    head = clf.net_.module_.head
    logits = features @ head.weight.detach().cpu().numpy().T + head.bias.detach().cpu().numpy()
    assert np.allclose(logits, clf.decision_function(X), atol=1e-4)
    assert clf.get_feature_names_out()[0] == "softmaxclassifier0"
