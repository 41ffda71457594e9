"""Everything composes: cross-validation, searches, ensembles, calibration, pipelines, on images."""

from __future__ import annotations

import io
import pickle

import joblib
import numpy as np
import pytest
import sklearn
from imblearn.over_sampling import RandomOverSampler
from imblearn.pipeline import make_pipeline as make_imblearn_pipeline
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import BaggingClassifier, StackingClassifier, VotingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    TunedThresholdClassifierCV,
    cross_val_predict,
    cross_val_score,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from sklearn_medimb import (
    CSSNClassifier,
    LMDClassifier,
    MetricTwoStageClassifier,
    SoftmaxClassifier,
)
from sklearn_medimb.backbones import ConvNet
from tests.conftest import make_blobs

EACH = pytest.mark.parametrize(
    "Classifier",
    [SoftmaxClassifier, CSSNClassifier, MetricTwoStageClassifier, LMDClassifier],
)


@pytest.fixture
def data():
    return make_blobs((24, 12), channels=3)


@EACH
def test_cross_val_score_and_predict(Classifier, tiny, data):
    X, y = data
    scores = cross_val_score(Classifier(**tiny), X, y, cv=3, scoring="balanced_accuracy")
    assert scores.shape == (3,)
    proba = cross_val_predict(Classifier(**tiny), X, y, cv=3, method="predict_proba")
    assert np.allclose(proba.sum(axis=1), 1)


@EACH
def test_parallel_scores_equal_serial_ones(Classifier, tiny, data):
    X, y = data
    serial = cross_val_score(Classifier(**tiny), X, y, cv=2)
    assert np.array_equal(cross_val_score(Classifier(**tiny), X, y, cv=2, n_jobs=2), serial)


@EACH
def test_grid_search_over_lr_and_a_backbone_parameter(Classifier, tiny, data):
    grid = {"lr": [1e-3, 1e-2], "backbone__widths": [(4,), (4, 8)]}
    search = GridSearchCV(Classifier(**tiny), grid, cv=2, error_score="raise").fit(*data)
    assert len(search.cv_results_["params"]) == 4
    best = search.best_estimator_
    assert best.backbone.widths == search.best_params_["backbone__widths"]
    assert search.predict(data[0]).shape == (36,)


@EACH
def test_calibration_threshold_voting_stacking(Classifier, tiny, data):
    X, y = data
    clf = Classifier(**tiny)
    for meta in (
        CalibratedClassifierCV(clf, cv=2),
        TunedThresholdClassifierCV(clf, cv=2),
        VotingClassifier([("a", clf), ("b", clone(clf).set_params(random_state=1))], voting="soft"),
        StackingClassifier([("a", clf)], LogisticRegression(), cv=2),
    ):
        assert meta.fit(X, y).predict(X).shape == y.shape


@EACH
def test_flat_images_serve_stock_tools(Classifier, tiny, data):
    X, y = data
    flat = X.reshape(len(X), -1)
    clf = Classifier(**tiny, image_shape=(3, 12, 12))
    assert BaggingClassifier(clf, n_estimators=2, random_state=0).fit(flat, y).score(flat, y) > 0
    assert make_pipeline(StandardScaler(), clf).fit(flat, y).predict(flat).shape == y.shape
    pipe = make_imblearn_pipeline(RandomOverSampler(random_state=0), clf)
    assert pipe.fit(flat, y).predict(flat).shape == y.shape


@EACH
def test_imblearn_pipeline_on_images(Classifier, tiny, data):
    X, y = data
    pipe = make_imblearn_pipeline(FunctionTransformer(lambda X: X[:, :, ::-1]), Classifier(**tiny))
    assert cross_val_score(pipe, X, y, cv=2).shape == (2,)


@EACH
def test_embeddings_feed_a_classical_classifier(Classifier, tiny, data):
    X, y = data
    pipe = make_pipeline(Classifier(**tiny), LogisticRegression())
    assert pipe.fit(X, y).score(X, y) > 0.5
    assert Classifier(**tiny).set_output(transform="pandas").fit_transform(X, y).shape[0] == 36


@EACH
def test_groups_travel_through_routing(Classifier, tiny, data):
    X, y = data
    groups = np.arange(len(y)) // 3
    held = []

    def scoring(estimator, X_held, y_held):
        held.append(X_held)
        return 0.0

    with sklearn.config_context(enable_metadata_routing=True):
        clf = Classifier(**tiny, early_stopping=True, scoring=scoring).set_fit_request(groups=True)
        cross_val_score(clf, X, y, cv=GroupKFold(3), params={"groups": groups})
    group_of = {image.tobytes(): group for image, group in zip(X, groups, strict=True)}
    for images in held:
        seen = [group_of[image.tobytes()] for image in images]
        assert len(seen) == 3 * len(set(seen))  # groups came whole


@EACH
def test_saved_and_loaded(Classifier, tiny, data, tmp_path):
    X, y = data
    clf = Classifier(**tiny).fit(X, y)
    expected = clf.predict_proba(X)
    joblib.dump(clf, tmp_path / "clf.joblib")
    for loaded in (pickle.loads(pickle.dumps(clf)), joblib.load(tmp_path / "clf.joblib")):
        assert np.array_equal(loaded.predict_proba(X), expected)


@EACH
def test_skops_trusts_our_classes_only(Classifier, tiny, data):
    skops = pytest.importorskip("skops.io")
    X, y = data
    clf = Classifier(**tiny).fit(X, y)
    stored = skops.dumps(clf)
    untrusted = skops.get_untrusted_types(data=stored)
    assert all(name.startswith("sklearn_medimb.") for name in untrusted)
    loaded = skops.load(io.BytesIO(stored), trusted=untrusted)
    assert np.array_equal(loaded.predict_proba(X), clf.predict_proba(X))


@EACH
def test_safetensors_in_one_call(Classifier, tiny, data, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    X, y = data
    clf = Classifier(**tiny).fit(X, y)
    safetensors.save_file(clf.weights_, tmp_path / "weights.safetensors")
    loaded = safetensors.load_file(tmp_path / "weights.safetensors")
    assert all(np.array_equal(loaded[name], value) for name, value in clf.weights_.items())


def test_nested_backbone_parameters_are_listed():
    params = SoftmaxClassifier(backbone=ConvNet(widths=(4, 8))).get_params()
    assert params["backbone__widths"] == (4, 8)
