"""Everything composes: every public estimator in every tool of the two libraries around it."""

from __future__ import annotations

import inspect
import io
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import joblib
import numpy as np
import pytest
from imblearn.ensemble import BalancedBaggingClassifier
from imblearn.over_sampling import RandomOverSampler
from imblearn.pipeline import make_pipeline as make_imblearn_pipeline
from scipy.stats import loguniform, uniform
from sklearn.base import BaseEstimator, clone, is_classifier
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import BaggingClassifier, StackingClassifier, VotingClassifier
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss, make_scorer, recall_score
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    RandomizedSearchCV,
    StratifiedKFold,
    TunedThresholdClassifierCV,
    cross_val_predict,
    cross_val_score,
    cross_validate,
    learning_curve,
)
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.semi_supervised import SelfTrainingClassifier
from sklearn.utils.validation import has_fit_parameter

from sklearn_medimb import AMIMVEncoder, SoftmaxClassifier, SPMixSampler
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.rebalance import RebalancedHead
from tests.estimators import PUBLIC, SUPERVISED, taken
from tests.helpers import make_blobs

try:
    from sklearn.callback import ScoringMonitor
except ImportError:  # scikit-learn < 1.9
    ScoringMonitor = None

# Four views of an image in an epoch or two teach an encoder little; that is not the matter here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The features have all but collapsed"),
    pytest.mark.filterwarnings("ignore:In .* steps the thresholds"),
]

# -------------------------------------------------------------------- the estimators


@dataclass
class Case:
    """How to make an estimator small, and what a search may try: two values; a distribution."""

    params: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list] = field(default_factory=dict)
    distribution: dict[str, Any] = field(default_factory=dict)


NETWORK = {
    "backbone": ConvNet(widths=(4, 8)),
    "max_epochs": 1,
    "batch_size": 18,
    "augment": "none",
    "precision": "float32",
    "random_state": 0,
}
# A parameter of the backbone inside the estimator, and one of its own.
WIDTHS, LR = {"backbone__widths": [(4, 8), (4,)]}, {"lr": loguniform(1e-4, 1e-1)}
ALPHA = {"alpha": [0.01, 10.0]}, {"alpha": loguniform(1e-3, 1e2)}

CASES = {
    "AMIMVClassifier": Case(
        {
            **NETWORK,
            "pretrain": AMIMVEncoder(max_epochs=1, batch_size=18, augment="none"),
            "fine_tune": "full",
        },
        WIDTHS,
        LR,
    ),
    "AMIMVEncoder": Case({**NETWORK, "augment": "light"}, WIDTHS, LR),
    "BalancedSoftmax": Case({}, *ALPHA),
    "BalancedVirtualFeatures": Case(
        {"random_state": 0}, {"eps": [0.01, 1.0]}, {"eps": loguniform(1e-3, 1e0)}
    ),
    "CSSNClassifier": Case(NETWORK, WIDTHS, LR),
    "ClassifierRetraining": Case({}, *ALPHA),
    "LMDClassifier": Case({**NETWORK, "n_rounds": 2}, WIDTHS, LR),
    "LearnableWeightScaling": Case({}, *ALPHA),
    "LogitAdjustment": Case({}, {"tau": [0.0, 2.0]}, {"tau": uniform(0, 2)}),
    "MetricTwoStageClassifier": Case(NETWORK, WIDTHS, LR),
    "NearestClassMean": Case(
        {}, {"temperature": [0.1, 1.0]}, {"temperature": loguniform(1e-2, 1e1)}
    ),
    "PretrainedFeatures": Case(
        {**taken(PUBLIC["PretrainedFeatures"], NETWORK), "at_all_depths": False},
        WIDTHS,
        {"at_all_depths": [True, False]},
    ),
    "SPMixClassifier": Case(NETWORK, WIDTHS, LR),
    "SPMixSampler": Case(
        {"random_state": 0}, {"mix_prob": [0.1, 1.0]}, {"mix_prob": uniform(0, 1)}
    ),
    "SSLEncoder": Case({**NETWORK, "augment": "light"}, WIDTHS, LR),
    "SaliencyMap": Case(
        {}, {"polarity": ["both", "dark"]}, {"polarity": ["both", "dark", "bright"]}
    ),
    "SoftmaxClassifier": Case(NETWORK, WIDTHS, LR),
    "TauNormalization": Case({}, {"tau": [1.0, 0.0]}, {"tau": uniform(0, 2)}),
    "VirtualFeatureCalibration": Case({}, *ALPHA),
}


class Subject:
    """A public estimator with data of its kind, as the classifier that tools expect.

    What is no classifier is one as part of a pipeline: transformers before logistic regression,
    samplers before what learns from their rows.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.cls = PUBLIC[name]
        self.case = CASES[name]
        # 36 rows of three classes, in an order that puts every class into every fold and portion.
        images, codes = make_blobs((20, 10, 6), size=8, channels=1)
        order = np.argsort(np.argsort(np.argsort(codes, kind="stable") % 6, kind="stable"))
        images, codes = images[order], codes[order]
        self.y = np.array(["common", "middle", "rare"])[codes]
        self.binary = (codes > 0).astype(int)
        draws = np.random.default_rng(0).normal(size=(len(codes), 6))
        vectors = draws + 1.5 * np.eye(6)[codes]
        flat = images.reshape(len(images), -1)
        self.takes_images = "image_shape" in inspect.signature(self.cls).parameters
        self.flat = flat if self.takes_images else vectors
        # A map for each image is no row that a classical model could learn from: these stay flat.
        self.X = images if self.takes_images and not self.is_map else self.flat

    @property
    def is_map(self) -> bool:
        """Whether it turns images into images."""
        return not hasattr(self.cls, "get_feature_names_out") and hasattr(self.cls, "transform")

    def alone(self, *, flat: bool = False) -> Any:
        """The public estimator itself."""
        flattened = self.takes_images and (flat or self.is_map)
        params = {**self.case.params, **({"image_shape": (8, 8)} if flattened else {})}
        return clone(self.cls(**params))  # its backbone is its own

    def model(self, *, flat: bool = False) -> Any:
        """A classifier."""
        alone = self.alone(flat=flat)
        if is_classifier(alone):
            return alone
        behind = LogisticRegression(max_iter=5000)
        if hasattr(alone, "fit_resample"):
            if isinstance(alone, SPMixSampler):
                shape = (8, 8) if flat else None
                behind = clone(SoftmaxClassifier(**NETWORK, image_shape=shape))
            return make_imblearn_pipeline(alone, behind)
        return make_pipeline(alone, behind)

    def part(self, fitted: Any) -> Any:
        """The public estimator in a fitted model."""
        return fitted[0] if isinstance(fitted, Pipeline) else fitted

    def params(self, given: dict[str, Any]) -> dict[str, Any]:
        """Parameters under the names that they have in the model."""
        step = "" if is_classifier(self.alone()) else f"{self.name.lower()}__"
        return {step + name: value for name, value in given.items()}

    @property
    def grid(self) -> dict[str, list]:
        return self.params(self.case.grid)

    def other(self, *, flat: bool = False) -> Any:
        """The model with the second candidate."""
        return self.model(flat=flat).set_params(**{k: v[1] for k, v in self.grid.items()})


def assert_same(one: Any, two: Any, X: np.ndarray) -> None:
    """Demand equal probabilities."""
    np.testing.assert_allclose(one.predict_proba(X), two.predict_proba(X), rtol=1e-4, atol=1e-6)


def differ(one: Any, two: Any, X: np.ndarray) -> bool:
    return not np.allclose(one.predict_proba(X), two.predict_proba(X), rtol=1e-3, atol=1e-5)


# -------------------------------------------------------------------- the tools


def html_repr(subject: Subject) -> None:
    """The page in a notebook names the class; it links to no site, as there is none."""
    html = subject.alone()._repr_html_()
    assert subject.name in html
    assert "readthedocs" not in html
    assert f"Documentation for {subject.name}" not in html


def copies(subject: Subject) -> None:
    """A clone has the parameters and nothing that was learned, and learns the same."""
    model = subject.model().fit(subject.X, subject.y)
    again = clone(model)
    learned = [name for name in vars(subject.part(again)) if name.endswith("_")]
    assert not learned
    assert str(again.get_params()) == str(model.get_params())
    assert_same(again.fit(subject.X, subject.y), model, subject.X)


def scored_by_several(subject: Subject) -> None:
    """`cross_validate`: each scorer has the number that its formula gives by hand."""
    X, y, cv = subject.X, subject.y, StratifiedKFold(2)
    done = cross_validate(
        subject.model(),
        X,
        y,
        cv=cv,
        scoring=["balanced_accuracy", "neg_log_loss", "roc_auc_ovr"],
        return_estimator=True,
        return_train_score=True,
        error_score="raise",
    )
    for fold, (_, test) in enumerate(cv.split(X, y)):
        fitted = done["estimator"][fold]
        predicted, proba = fitted.predict(X[test]), fitted.predict_proba(X[test])
        assert set(predicted) <= set(y)
        by_hand = balanced_accuracy_score(y[test], predicted)
        assert done["test_balanced_accuracy"][fold] == pytest.approx(by_hand)
        assert done["test_neg_log_loss"][fold] == pytest.approx(-log_loss(y[test], proba), rel=1e-4)
    assert set(done) >= {"train_balanced_accuracy", "train_neg_log_loss", "train_roc_auc_ovr"}


def predicted_across_folds(subject: Subject) -> None:
    """`cross_val_predict`: each row by the model that has not seen it."""
    X, y, cv = subject.X, subject.y, StratifiedKFold(2)
    proba = cross_val_predict(subject.model(), X, y, cv=cv, method="predict_proba")
    np.testing.assert_allclose(proba.sum(axis=1), 1, rtol=1e-5)
    train, test = next(cv.split(X, y))
    by_hand = subject.model().fit(X[train], y[train]).predict_proba(X[test])
    np.testing.assert_allclose(proba[test], by_hand, rtol=1e-4, atol=1e-6)


def in_parallel(subject: Subject) -> None:
    """Two processes give the scores of one."""
    args = {"cv": 2, "scoring": "neg_log_loss", "error_score": "raise"}
    serial = cross_val_score(subject.model(), subject.X, subject.y, **args)
    assert len(set(serial)) == 2
    parallel = cross_val_score(subject.model(), subject.X, subject.y, n_jobs=2, **args)
    np.testing.assert_allclose(parallel, serial, rtol=1e-6)


def _assert_search(subject: Subject, search: Any, last: Any = slice(None)) -> None:
    """The winner is what the scores say, and what was fitted anew with its parameters."""
    results = search.cv_results_
    scores = results["mean_test_score"][last]
    assert np.ptp(scores) > 0, "The candidates score the same: the parameter is not used."
    winner = results["params"][last][int(np.argmax(scores))]
    assert search.best_params_ == winner
    by_hand = subject.model().set_params(**winner).fit(subject.X, subject.y)
    assert_same(search, by_hand, subject.X)
    assert set(search.predict(subject.X)) <= set(subject.y)


SEARCH = {"cv": 2, "scoring": "neg_log_loss", "error_score": "raise"}


def grid_search(subject: Subject) -> None:
    """Both candidates, of a parameter inside the backbone where there is one."""
    search = GridSearchCV(subject.model(), subject.grid, **SEARCH).fit(subject.X, subject.y)
    assert len(search.cv_results_["params"]) == 2
    _assert_search(subject, search)
    if "backbone__widths" in subject.case.grid:
        embedding = subject.part(search.best_estimator_).transform(subject.X)
        assert embedding.shape[1] == next(iter(search.best_params_.values()))[-1]


def random_search(subject: Subject) -> None:
    """Draws come from the distribution and are all tried."""
    distribution = subject.params(subject.case.distribution)
    search = RandomizedSearchCV(
        subject.model(), distribution, n_iter=2, random_state=0, **SEARCH
    ).fit(subject.X, subject.y)
    (name, given), *_ = distribution.items()
    drawn = [params[name] for params in search.cv_results_["params"]]
    assert len(set(drawn)) == 2
    if isinstance(given, list):
        assert set(drawn) <= set(given)
    else:
        low, high = given.support()
        assert all(low <= value <= high for value in drawn)
    _assert_search(subject, search)


def halving_search(subject: Subject) -> None:
    """Two candidates on half of the rows, then the better one on all."""
    n = len(subject.binary)
    search = HalvingGridSearchCV(
        subject.model(),
        subject.grid,
        factor=2,
        min_resources=n // 2,
        max_resources=n,
        aggressive_elimination=False,
        random_state=0,
        **SEARCH,
    ).fit(subject.X, subject.binary)
    assert search.n_resources_ == [n // 2, n]
    assert search.n_candidates_ == [2, 1]
    results = search.cv_results_
    better = results["params"][int(np.argmax(results["mean_test_score"][:2]))]
    assert search.best_params_ == better
    by_hand = subject.model().set_params(**better).fit(subject.X, subject.binary)
    assert_same(search, by_hand, subject.X)


def halving_search_over_epochs(subject: Subject) -> None:
    """Epochs as the resource: the survivor, and it alone, trains for longer."""
    trained: list[tuple[int, int]] = []

    def score(fitted: Any, X: Any, y: Any) -> float:
        part = subject.part(fitted)
        trained.append((part.max_epochs, part.n_iter_))
        return -log_loss(y, fitted.predict_proba(X))

    resource = next(iter(subject.params({"max_epochs": None})))
    search = HalvingGridSearchCV(
        subject.model(),
        subject.grid,
        resource=resource,
        factor=2,
        min_resources=1,
        max_resources=2,
        cv=2,
        scoring=score,
        error_score="raise",
    ).fit(subject.X, subject.binary)
    assert search.cv_results_["n_resources"].tolist() == [1, 1, 2]
    short, long = ({n for epochs, n in trained if epochs == e} for e in (1, 2))
    assert max(short) < min(long)
    assert subject.part(search.best_estimator_).max_epochs == 2


def stacking(subject: Subject) -> None:
    """The final estimator learns from probabilities of models that did not see the rows."""
    X, y = subject.X, subject.y
    stack = StackingClassifier([("net", subject.model())], LogisticRegression(), cv=2).fit(X, y)
    assert stack.stack_method_ == ["predict_proba"]
    proba = stack.named_estimators_["net"].predict_proba(X)
    np.testing.assert_allclose(stack.transform(X), proba, rtol=1e-6)
    unseen = cross_val_predict(subject.model(), X, y, cv=2, method="predict_proba")
    by_hand = LogisticRegression().fit(unseen, y)
    np.testing.assert_allclose(stack.final_estimator_.coef_, by_hand.coef_, rtol=1e-3, atol=1e-4)
    assert set(stack.predict(X)) <= set(y)


def voting(subject: Subject) -> None:
    """The mean of two members that differ."""
    X, y = subject.X, subject.y
    members = [("one", subject.model()), ("two", subject.other())]
    vote = VotingClassifier(members, voting="soft").fit(X, y)
    one, two = vote.estimators_
    assert differ(one, two, X)
    mean = (one.predict_proba(X) + two.predict_proba(X)) / 2
    np.testing.assert_allclose(vote.predict_proba(X), mean, rtol=1e-6)
    np.testing.assert_array_equal(vote.predict(X), np.unique(y)[mean.argmax(axis=1)])


def bagging(subject: Subject) -> None:
    """Each member has learned from its own rows, and from no other."""
    X, y = subject.flat, subject.y
    bag = BaggingClassifier(
        subject.model(flat=True), n_estimators=2, max_samples=0.75, bootstrap=False, random_state=0
    ).fit(X, y)
    codes = np.unique(y, return_inverse=True)[1]
    first, second = bag.estimators_samples_
    assert set(first) != set(second)
    assert len(set(first)) == len(first) == 27
    if has_fit_parameter(bag.estimator, "sample_weight"):
        first.sort()  # the other rows have weight 0: the order is that of X
    by_hand = clone(bag.estimators_[0]).fit(X[first], codes[first])
    assert_same(bag.estimators_[0], by_hand, X)
    mean = np.mean([member.predict_proba(X) for member in bag.estimators_], axis=0)
    np.testing.assert_allclose(bag.predict_proba(X), mean, rtol=1e-6)
    assert set(bag.predict(X)) <= set(y)


def balanced_bagging(subject: Subject) -> None:
    """Each member has learned from as many rows of each class."""
    X, y = subject.flat, subject.binary
    bag = BalancedBaggingClassifier(subject.model(flat=True), n_estimators=2, random_state=0)
    bag.fit(X, y)
    member = bag.estimators_[0]
    drawn = bag.estimators_samples_[0][member[0].sample_indices_]
    assert len(set(np.bincount(y[drawn]))) == 1
    assert len(drawn) < len(y)
    by_hand = clone(member[-1]).fit(X[drawn], y[drawn])
    assert_same(member[-1], by_hand, X)
    mean = np.mean([each.predict_proba(X) for each in bag.estimators_], axis=0)
    np.testing.assert_allclose(bag.predict_proba(X), mean, rtol=1e-6)


def self_training(subject: Subject) -> None:
    """The four rows that the model is surest of get its label, and are learned."""
    X, y = subject.flat, subject.binary
    some = np.where(np.arange(len(y)) % 3 == 0, -1, y)
    trained = SelfTrainingClassifier(
        subject.model(flat=True), criterion="k_best", k_best=4, max_iter=1
    ).fit(X, some)
    known = some != -1
    before = subject.model(flat=True).fit(X[known], y[known])
    proba = before.predict_proba(X[~known])
    surest = np.flatnonzero(~known)[np.argsort(proba.max(axis=1))[-4:]]
    assert set(np.flatnonzero(trained.labeled_iter_ == 1)) == set(surest)
    np.testing.assert_array_equal(trained.transduction_[surest], before.predict(X[surest]))
    np.testing.assert_array_equal(trained.transduction_[known], y[known])
    now = np.r_[np.flatnonzero(known), surest]
    now.sort()
    by_hand = subject.model(flat=True).fit(X[now], trained.transduction_[now])
    assert_same(trained.estimator_, by_hand, X)


def calibration(subject: Subject) -> None:
    """Probabilities are those of a sigmoid on the scores of the model that all rows trained."""
    X, y = subject.X, subject.binary
    calibrated = CalibratedClassifierCV(subject.model(), cv=2, ensemble=False).fit(X, y)
    proba = calibrated.predict_proba(X)
    np.testing.assert_allclose(proba.sum(axis=1), 1, rtol=1e-6)
    (only,) = calibrated.calibrated_classifiers_
    raw = subject.model().fit(X, y)
    by_hand = only.calibrators[0].predict(raw.decision_function(X))
    np.testing.assert_allclose(proba[:, 1], by_hand, rtol=1e-3, atol=1e-5)
    assert not np.allclose(proba, raw.predict_proba(X), atol=1e-3)
    several = CalibratedClassifierCV(subject.model(), cv=2).fit(X, subject.y)
    assert len(several.calibrated_classifiers_) == 2
    np.testing.assert_allclose(several.predict_proba(X).sum(axis=1), 1, rtol=1e-6)


def tuned_threshold(subject: Subject) -> None:
    """What is asked for moves the threshold, and the threshold decides."""
    X, y = subject.X, subject.binary
    fitted = subject.model().fit(X, y)
    thresholds = {}
    for label in (0, 1):

        def recall(truth: np.ndarray, predicted: np.ndarray, label: int = label) -> float:
            return recall_score(truth, predicted, pos_label=label)

        tuned = TunedThresholdClassifierCV(
            fitted, scoring=make_scorer(recall), thresholds=20, cv="prefit", refit=False
        )
        tuned.fit(X, y)
        thresholds[label] = tuned.best_threshold_
        by_hand = (fitted.predict_proba(X)[:, 1] >= tuned.best_threshold_).astype(int)
        np.testing.assert_array_equal(tuned.predict(X), by_hand)
        assert recall(y, tuned.predict(X)) >= max(0.9, recall(y, fitted.predict(X)))
    assert thresholds[1] < thresholds[0]

    crossed = TunedThresholdClassifierCV(
        subject.model(), cv=2, thresholds=20, store_cv_results=True
    ).fit(X, y)
    best = int(np.argmax(crossed.cv_results_["scores"]))
    assert crossed.best_threshold_ == crossed.cv_results_["thresholds"][best]
    assert_same(crossed.estimator_, fitted, X)


def curve_of_learning(subject: Subject) -> None:
    """`learning_curve`: half of each training part, then all of it."""
    X, y, cv = subject.X, subject.binary, StratifiedKFold(2)
    sizes, train_scores, test_scores = learning_curve(
        subject.model(),
        X,
        y,
        train_sizes=[0.5, 1.0],
        cv=cv,
        scoring="neg_log_loss",
        error_score="raise",
    )
    assert sizes.tolist() == [9, 18]
    assert train_scores.shape == test_scores.shape == (2, 2)
    train, test = next(cv.split(X, y))
    by_hand = subject.model().fit(X[train[:9]], y[train[:9]])
    expected = -log_loss(y[test], by_hand.predict_proba(X[test]))
    assert test_scores[0, 0] == pytest.approx(expected, rel=1e-4)
    assert test_scores[0, 0] != test_scores[1, 0]


def importance_of_embeddings(subject: Subject) -> None:
    """`permutation_importance` speaks of features: what is constant has none, others have."""
    y = subject.y
    alone = subject.alone()
    if hasattr(alone, "transform"):
        embedding = alone.fit(subject.X, y).transform(subject.X)
        model = LogisticRegression(C=100, max_iter=5000)
    else:
        embedding, model = subject.X, subject.model()
    model.fit(embedding, y)
    found = permutation_importance(
        model, embedding, y, scoring="neg_log_loss", n_repeats=3, random_state=0
    )
    assert found.importances.shape == (embedding.shape[1], 3)
    moving = embedding.std(axis=0) > 0
    np.testing.assert_allclose(found.importances[~moving], 0, atol=1e-9)
    assert found.importances_mean[moving].max() > 1e-3


def pandas_output(subject: Subject) -> None:
    """`set_output`: named columns, which the next step of a pipeline knows too."""
    pd = pytest.importorskip("pandas")
    alone = subject.alone().set_output(transform="pandas")
    frame = alone.fit(subject.X, subject.y).transform(subject.X)
    assert isinstance(frame, pd.DataFrame)
    names = [f"{subject.name.lower()}{number}" for number in range(frame.shape[1])]
    assert frame.columns.tolist() == alone.get_feature_names_out().tolist() == names
    plain = subject.alone().fit(subject.X, subject.y).transform(subject.X)
    np.testing.assert_allclose(frame.to_numpy(), plain, rtol=1e-5, atol=1e-6)
    pipe = make_pipeline(subject.alone(), LogisticRegression(max_iter=5000))
    pipe.set_output(transform="pandas").fit(subject.X, subject.y)
    assert pipe[-1].feature_names_in_.tolist() == names


def behind_a_transformer(subject: Subject) -> None:
    """Pipeline: it sees what the step before it made, in training and afterwards."""
    X, y = subject.X, subject.y

    def mirror(X: np.ndarray) -> np.ndarray:
        return X[..., ::-1].copy()

    pipe = make_pipeline(FunctionTransformer(mirror), subject.model()).fit(X, y)
    by_hand = subject.model().fit(mirror(X), y)
    np.testing.assert_allclose(
        pipe.predict_proba(X), by_hand.predict_proba(mirror(X)), rtol=1e-4, atol=1e-6
    )
    assert set(pipe.predict(X)) <= set(y)


def behind_a_sampler(subject: Subject) -> None:
    """imbalanced-learn's pipeline: the rows that the sampler gave are learned, not scored."""
    X, y = subject.flat, subject.y
    model = subject.model(flat=True)
    if hasattr(subject.cls, "fit_resample"):  # its model is such a pipeline
        pipe, sampler, behind = model, model[0], model[-1]
    else:
        pipe, sampler, behind = None, RandomOverSampler(random_state=0), model
        pipe = make_imblearn_pipeline(sampler, behind)
    resampled = clone(sampler).fit_resample(X, y)
    assert len(set(Counter(resampled[1]).values())) == 1
    assert len(resampled[1]) > len(y)
    pipe.fit(X, y)
    assert_same(pipe, clone(behind).fit(*resampled), X)
    assert differ(pipe, clone(behind).fit(X, y), X)
    n_scored = []

    def score(fitted: Any, X: Any, y: Any) -> float:
        n_scored.append(len(y))
        return -log_loss(y, fitted.predict_proba(X))

    cross_val_score(pipe, X, y, cv=2, scoring=score, error_score="raise")
    assert n_scored == [18, 18]


def behind_mixed_images(subject: Subject) -> None:
    """Images that SPMixSampler made are learned, in their own layout."""
    X, y = subject.X, subject.y
    sampler = SPMixSampler(random_state=0)
    pipe = make_imblearn_pipeline(sampler, subject.model()).fit(X, y)
    assert subject.part(pipe[-1]).n_samples_fit_ == 3 * Counter(y)["common"]
    assert_same(pipe, subject.model().fit(*clone(sampler).fit_resample(X, y)), X)


def _spread(fitted: Any, X: Any, y: Any) -> float:
    return float(fitted.transform(X).std())


def scoring_monitor(subject: Subject) -> None:
    """scikit-learn's monitor scores every epoch of every fit of a search."""
    if ScoringMonitor is None:
        pytest.skip("scikit-learn has no callbacks before 1.9.")
    monitor = ScoringMonitor(scoring=lambda *args: {"spread": _spread(*args)})
    model = subject.model()
    part = subject.part(model).set_callbacks(monitor)
    part.set_params(**taken(subject.cls, {"max_epochs": 2}))
    search = GridSearchCV(model, subject.grid, **SEARCH).fit(subject.X, subject.y)
    rows = monitor.get_logs().data
    fits = [row for row in rows if row["task_name"] == "fit"]
    epochs = [row for row in rows if row["task_name"] == "epoch"]
    assert len(fits) == 2 * 2 + 1  # candidates, folds, and the winner
    part = subject.part(search.best_estimator_)
    for fit in fits:
        own = [row for row in epochs if row["parent_task_id_path"] == fit["task_id_path"]]
        assert [row["task_id"] for row in own] == list(range(part.n_iter_))
        assert own[-1]["spread"] == pytest.approx(fit["spread"])
        assert len({row["spread"] for row in own}) > 1
    last = max(fits, key=lambda row: row["task_id_path"][1])
    assert last["spread"] == pytest.approx(_spread(part, subject.X, subject.y))


class TaskPaths:
    """A callback that hands itself down, as scikit-learn's progress bar does."""

    max_propagation_depth = None

    def __init__(self) -> None:
        self.paths: list[tuple[str, ...]] = []

    def setup(self, estimator: Any, context: Any) -> None:
        pass

    def teardown(self, estimator: Any, context: Any) -> None:
        pass

    def on_fit_task_begin(self, estimator: Any, context: Any) -> None:
        path = [context.task_name]
        while (context := context.parent) is not None:
            path.insert(0, context.task_name)
        self.paths.append(tuple(path))

    def on_fit_task_end(self, estimator: Any, context: Any) -> None:
        pass


def callback_of_a_search(subject: Subject) -> None:
    """A callback that is given to a search reaches every epoch below it."""
    if ScoringMonitor is None:
        pytest.skip("scikit-learn has no callbacks before 1.9.")
    path = TaskPaths()
    search = GridSearchCV(subject.model(), subject.grid, **SEARCH).set_callbacks(path)
    search.fit(subject.X, subject.y)
    n_epochs = subject.part(search.best_estimator_).n_iter_
    epochs = Counter(names[:2] for names in path.paths if names[-1] == "epoch")
    assert epochs == {("fit", "search"): 2 * 2 * n_epochs, ("fit", "fit"): n_epochs}


TOOLS: dict[str, Callable[[Subject], None]] = {
    "GridSearchCV": grid_search,
    "HalvingGridSearchCV": halving_search,
    "HalvingGridSearchCV-epochs": halving_search_over_epochs,
    "RandomizedSearchCV": random_search,
    "cross_validate": scored_by_several,
    "cross_val_predict": predicted_across_folds,
    "n_jobs": in_parallel,
    "StackingClassifier": stacking,
    "VotingClassifier": voting,
    "BaggingClassifier": bagging,
    "BalancedBaggingClassifier": balanced_bagging,
    "SelfTrainingClassifier": self_training,
    "CalibratedClassifierCV": calibration,
    "TunedThresholdClassifierCV": tuned_threshold,
    "permutation_importance": importance_of_embeddings,
    "learning_curve": curve_of_learning,
    "set_output": pandas_output,
    "html_repr": html_repr,
    "clone": copies,
    "Pipeline": behind_a_transformer,
    "imblearn.Pipeline": behind_a_sampler,
    "imblearn.Pipeline-SPMixSampler": behind_mixed_images,
    "ScoringMonitor": scoring_monitor,
    "callback_of_a_search": callback_of_a_search,
}


def _is_network(cls: type[BaseEstimator]) -> bool:
    """Whether it trains a network on images, in epochs."""
    return "max_epochs" in inspect.signature(cls).parameters


# Pairs that would mean nothing: a rule and its reason for each tool that has such.
EXCLUDED: dict[str, Callable[[type[BaseEstimator]], bool]] = {
    # Heads are solved to their minimum; maps and samplers do not learn: there are no epochs.
    "HalvingGridSearchCV-epochs": lambda cls: not _is_network(cls),
    "ScoringMonitor": lambda cls: not _is_network(cls),
    "callback_of_a_search": lambda cls: not _is_network(cls),
    # Only what transforms has an output; a map's pixels have no names.
    "set_output": lambda cls: not hasattr(cls(), "set_output"),
    # New images are no features. (Heads, and virtual features, work on features as they are.)
    "permutation_importance": lambda cls: cls is SPMixSampler,
    # It makes images, which heads and virtual features do not take; maps learn nothing from them;
    # it would be its own forerunner.
    "imblearn.Pipeline-SPMixSampler": lambda cls: not _is_network(cls),
}

PAIRS = [
    (name, tool)
    for name, cls in PUBLIC.items()
    for tool in TOOLS
    if not (tool in EXCLUDED and EXCLUDED[tool](cls))
]


@pytest.mark.parametrize(("name", "tool"), PAIRS, ids=[f"{n}-{t}" for n, t in PAIRS])
def test_composes(name, tool):
    TOOLS[tool](Subject(name))


def test_every_estimator_has_a_case():
    public = set(PUBLIC)
    missing, stale = public - set(CASES), set(CASES) - public
    assert not missing, f"{sorted(missing)} are public: give each a row in CASES of this file."
    assert not stale, f"{sorted(stale)} are no longer public: remove their rows from CASES."


def test_no_pair_is_absent():
    """Image classifiers go through everything, and nothing is excluded for all."""
    assert set(EXCLUDED) <= set(TOOLS)
    met = {tool: {name for name, other in PAIRS if other == tool} for tool in TOOLS}
    assert all(met.values())
    for name, cls in PUBLIC.items():
        if hasattr(cls, "predict") and not issubclass(cls, RebalancedHead):
            assert all(name in names for names in met.values()), name


EACH = pytest.mark.parametrize("Classifier", SUPERVISED.values(), ids=SUPERVISED)


@pytest.fixture
def data():
    return make_blobs((24, 12), channels=3)


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


def test_progress_bar_shows_the_epochs_of_a_search(capsys):
    pytest.importorskip("sklearn.callback", reason="scikit-learn has no callbacks before 1.9.")
    pytest.importorskip("rich")
    from sklearn.callback import ProgressBar

    subject = Subject("SoftmaxClassifier")
    search = GridSearchCV(subject.model(), subject.grid, cv=2)
    search.set_callbacks(ProgressBar(max_propagation_depth=None)).fit(subject.X, subject.y)
    shown = capsys.readouterr().out
    assert "GridSearchCV" in shown
    assert shown.count("SoftmaxClassifier") >= 5
