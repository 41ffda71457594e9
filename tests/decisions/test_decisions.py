"""What all of the room share: calibration before them, documents, examples."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import sklearn
from sklearn.base import BaseEstimator
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline

from sklearn_medimb import AMIMVClassifier, SoftmaxClassifier, decisions
from sklearn_medimb.decisions import OperatingPoint, PriorShift, SelectiveClassifier

ROOT = Path(__file__).parents[2]
CLASSES = {
    name: cls
    for name, cls in vars(decisions).items()
    if isinstance(cls, type) and issubclass(cls, BaseEstimator)
}
FITTED = {
    "OperatingPoint": lambda clf: OperatingPoint(clf, cost=(1, 1)),
    "PriorShift": lambda clf: PriorShift(clf, 0.1),
    "SelectiveClassifier": lambda clf: SelectiveClassifier(clf, coverage=0.5),
}
HAS_TEMPERATURE = tuple(map(int, sklearn.__version__.split(".")[:2])) >= (1, 8)


@pytest.fixture
def patients():
    """Forty features of noise, three like images of each patient, and a classifier too sure."""
    rng = np.random.default_rng(0)
    y = np.repeat(rng.integers(0, 2, 100), 3)
    X = np.repeat(rng.normal(size=(100, 40)), 3, axis=0) + 0.1 * rng.normal(size=(300, 40))
    X[:, :2] += y[:, np.newaxis]
    return X, np.array(["ill", "well"])[1 - y], np.arange(300) // 3


@pytest.mark.skipif(not HAS_TEMPERATURE, reason="scikit-learn has temperatures from 1.8 on")
def test_temperature_by_patients_mends_probabilities_and_by_images_does_not(patients):
    X, y, groups = patients
    train, test = next(StratifiedGroupKFold(2).split(X, y, groups))
    clf = LogisticRegression(C=100, max_iter=2000)
    folds = list(StratifiedGroupKFold(5).split(X[train], y[train], groups[train]))
    cut = StratifiedKFold(5, shuffle=True, random_state=0)
    fit = {"method": "temperature", "ensemble": False}

    def loss(clf):
        return log_loss(y[test], clf.fit(X[train], y[train]).predict_proba(X[test]))

    by_patients = loss(CalibratedClassifierCV(clf, cv=folds, **fit))
    assert by_patients < 0.5 * loss(clf)
    assert by_patients < 0.5 * loss(CalibratedClassifierCV(clf, cv=cut, **fit))


@pytest.mark.skipif(not HAS_TEMPERATURE, reason="scikit-learn has temperatures from 1.8 on")
def test_calibration_takes_patients_to_networks_and_goes_on_to_decisions(tiny):
    rng = np.random.default_rng(0)
    y = np.repeat(["benign", "malignant"], [40, 20])
    X = rng.integers(0, 100, (60, 12, 12)).astype(np.uint8)
    X[y == "malignant", :6] += 60
    groups = np.arange(60) // 2
    net = SoftmaxClassifier(**tiny, early_stopping=True)  # which would warn without its patients
    with sklearn.config_context(enable_metadata_routing=True):
        calibrated = CalibratedClassifierCV(
            net.set_fit_request(groups=True), method="temperature", cv=StratifiedGroupKFold(2)
        ).fit(X, y, groups=groups)
        shares = {"benign": 0.99, "malignant": 0.01}
        clf = PriorShift(FrozenEstimator(calibrated), shares, train_prior="training")
        point = OperatingPoint(clf, min_sensitivity=0.5, positive="malignant", cv=2)
        point.fit(X, y, groups=groups)
    before, after = calibrated.predict_proba(X), point.predict_proba(X)
    ratio = np.log(after[:, 1] / after[:, 0]) - np.log(before[:, 1] / before[:, 0])
    np.testing.assert_allclose(ratio, np.log(0.01 / 0.99 / 0.5), rtol=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_class_is_documented_and_has_an_example(name):
    cls = CLASSES[name]
    assert "References\n" in cls.__doc__
    assert ">>> " in cls.__doc__
    for place in (
        "docs/reference.md",
        "CHANGELOG.md",
        "examples/decisions/plot_operating_point.py",
    ):
        assert name in (ROOT / place).read_text(), place
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 30)
    fitted = FITTED[name](LogisticRegression()).fit(rng.normal(size=(60, 2)) + y[:, np.newaxis], y)
    assert not set(fitted.get_params(deep=False)) - set(cls._parameter_constraints)
    attributes = {a for a in vars(fitted) if a.endswith("_") and not a.startswith("_")}
    for documented in [*inspect.signature(cls).parameters, *attributes]:
        assert re.search(rf"^ *(\w+, )*{documented}(, \w+)* : ", cls.__doc__, re.M), documented


@pytest.mark.parametrize("name", CLASSES)
def test_labels_are_those_of_the_frozen_classifier(name):
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], 20)
    X = rng.normal(size=(60, 2)) + y[:, np.newaxis]
    known = FrozenEstimator(LogisticRegression().fit(X, y))
    make = {
        "OperatingPoint": lambda: OperatingPoint(known, cost=(1, 1), positive=[1, 2]),
        "PriorShift": lambda: PriorShift(known, {0: 0.8, 1: 0.1, 2: 0.1}),
        "SelectiveClassifier": lambda: SelectiveClassifier(known, coverage=0.5),
    }[name]
    with pytest.raises(ValueError, match=r"y holds \['a', 'b', 'c'\], but the frozen estimator"):
        make().fit(X, np.array(["a", "b", "c"])[y])
    fitted = make().fit(X[:40], y[:40])  # who lacks a class is told of it
    assert fitted.predict_proba(X).shape == (60, 3)
    assert set(fitted.predict(X)) <= {0, 1, 2}


@pytest.mark.parametrize("name", sorted(FITTED))
@pytest.mark.parametrize("y", [[0, 1, -1], np.array(["well", "ill", -1], dtype=object)])
@pytest.mark.parametrize("within", [lambda clf: clf, lambda clf: make_pipeline(clf)])
def test_images_without_a_label_are_not_counted_as_a_class(name, y, within):
    clf = within(AMIMVClassifier(pretrain=None, max_epochs=1))
    y, X = np.tile(y, 8), np.zeros((24, 8, 8), dtype=np.uint8)
    with pytest.raises(
        ValueError, match=r"holds .*-1.*, no label, in row 2: fit .*FrozenEstimator"
    ):
        FITTED[name](clf).fit(X, y)
