"""Parameters that decide the network, changed after a fit: no silence, and nothing is lost."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from torch import nn

from sklearn_medimb import CSSNClassifier, SoftmaxClassifier, SPMixClassifier, SSLEncoder
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.persistence import save
from tests.helpers import make_blobs

X, Y = make_blobs()
SMALL = {
    "max_epochs": 1,
    "batch_size": 32,
    "random_state": 0,
}
CHANGES = {
    "backbone by name": (SoftmaxClassifier, {"backbone": "vit"}),
    "backbone": (SoftmaxClassifier, {"backbone": ConvNet(widths=(4, 9))}),
    "backbone inside": (SoftmaxClassifier, {"backbone__widths": (4, 9)}),
    "backbone of one's own": (
        SoftmaxClassifier,
        {"backbone": nn.Sequential(nn.Flatten(), nn.Linear(432, 8))},
    ),
    "loss": (SoftmaxClassifier, {"loss": "ldam"}),
    "encoder": (SSLEncoder, {"backbone": ConvNet(widths=(9,))}),
    "n_tokens": (CSSNClassifier, {"n_tokens": 4}),
    "reference": (CSSNClassifier, {"reference": "self"}),
    "lam": (CSSNClassifier, {"lam": 0.123}),
    "dropout": (CSSNClassifier, {"dropout": 0.321}),
}


def fitted(Classifier, **params):
    clf = Classifier(**{**SMALL, "backbone": ConvNet(widths=(4, 8)), **params})
    return clf.fit(X) if Classifier is SSLEncoder else clf.fit(X, Y)


def answer(estimator):
    return getattr(estimator, "predict_proba", estimator.transform)(X)


@pytest.mark.parametrize(("Classifier", "change"), CHANGES.values(), ids=CHANGES)
def test_further_training_refuses_another_network(Classifier, change):
    clf = fitted(Classifier, warm_start=True)
    before = answer(clf)
    clf.set_params(**change)
    name = next(iter(change)).split("__")[0]
    wanted = "weights of its own" if "Sequential" in str(change) else "another network"
    for train in (clf.fit, clf.partial_fit) if hasattr(clf, "partial_fit") else (clf.fit,):
        with pytest.raises(ValueError, match=rf"(?s)^{name}=.* {wanted}.*warm_start=False"):
            train(X, Y)
    np.testing.assert_array_equal(answer(clf), before)
    assert clf.set_params(warm_start=False).fit(X, Y).n_iter_ == 1


@pytest.mark.parametrize(("Classifier", "change"), CHANGES.values(), ids=CHANGES)
def test_copies_keep_the_trained_network(Classifier, change):
    clf = fitted(Classifier)
    before = answer(clf)
    clf.set_params(**change)
    for again in (pickle.loads(pickle.dumps(clf)), copy.deepcopy(clf)):
        np.testing.assert_array_equal(answer(again), before)
        assert repr(again.get_params()) == repr(clf.get_params()) or "own" in str(change)
        twice = pickle.loads(pickle.dumps(again))
        np.testing.assert_array_equal(answer(twice), before)
        with pytest.raises(ValueError, match=r"another network|weights of its own"):
            twice.set_params(warm_start=True).fit(X, Y)


def test_a_file_is_refused_or_keeps_the_network(tmp_path):
    clf = fitted(SoftmaxClassifier).set_params(backbone__widths=(4, 9))
    with pytest.raises(ValueError):
        save(clf, tmp_path / "model")
    save(clf.set_params(backbone__widths=(4, 8), max_epochs=7), tmp_path / "model")


@pytest.mark.parametrize("Classifier", [SoftmaxClassifier, SPMixClassifier, CSSNClassifier])
def test_other_parameters_may_change(Classifier):
    clf = fitted(Classifier, warm_start=True)
    clf.set_params(max_epochs=2, lr=1e-4, augment="none", net_params={}, verbose=0)
    assert clf.fit(X, Y).n_iter_ == 3
    assert "_made_from" not in clf.__getstate__()


def test_a_recipe_with_the_same_shapes_is_the_same_network():
    clf = fitted(SoftmaxClassifier, warm_start=True)
    assert clf.set_params(backbone=ConvNet(widths=(4, 8))).fit(X, Y).n_iter_ == 2


def test_weights_of_another_start_are_refused():
    encoder, clf = fitted(SSLEncoder), fitted(SoftmaxClassifier, warm_start=True)
    for change in ({"backbone": encoder}, {"pretrain": encoder}):
        given = {name: clf.get_params()[name] for name in change}
        with pytest.raises(ValueError, match="SSLEncoder brings weights"):
            clf.set_params(**change).fit(X, Y)
        clf.set_params(**given)
    begun = fitted(SoftmaxClassifier, backbone=encoder, warm_start=True)
    assert begun.fit(X, Y).n_iter_ == 2
    assert pickle.loads(pickle.dumps(begun)).fit(X, Y).n_iter_ == 3
