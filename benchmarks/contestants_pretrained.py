"""Contestants of compare.py that begin with a network trained elsewhere: frozen, and tuned.

Each has its defaults but for what its row says. Baselines of scikit-learn encode the images
themselves, so that seconds to fit are those of a user; their C is chosen in three inner folds,
patients whole.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from contestants import OF_TUNED, Setting, without_ideas
from imblearn.ensemble import BalancedRandomForestClassifier
from imblearn.over_sampling import RandomOverSampler
from imblearn.pipeline import make_pipeline
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.linear_model import LogisticRegression

from sklearn_medimb import (
    AMIMVClassifier,
    AMIMVEncoder,
    BalancedVirtualFeatures,
    CSSNClassifier,
    LMDClassifier,
    MetricTwoStageClassifier,
    PretrainedFeatures,
    SoftmaxClassifier,
    SPMixClassifier,
)
from sklearn_medimb.backbones import ConvNet, Start
from sklearn_medimb.base._classifier import TUNING_EPOCHS
from sklearn_medimb.comparison._features import (
    HOW_LONG,
    LOGISTIC_C,
    chosen,
    logistic_regression,
    support_vectors,
)

Contestant = Callable[[Setting], Any]


class Untrained(ConvNet):
    """A tiny network that passes for one with weights of elsewhere: for tests of the bench."""

    @property
    def start(self) -> Start:
        return Start(mean=(0.5,) * 3, std=(0.25,) * 3, image_size=24, digest="untrained")


STARTS: dict[str, Any] = {"untrained": Untrained(widths=(4, 8))}  # others are names of backbones


class FoldEnsemble(ClassifierMixin, BaseEstimator):
    """Mean of the probabilities of several fits, each without one fold of the images."""

    def __init__(self, estimator: Any, folds: Any) -> None:
        self.estimator = estimator
        self.folds = folds

    def fit(self, X: np.ndarray, y: np.ndarray) -> FoldEnsemble:
        self.classes_ = np.unique(y)
        self.members_ = [clone(self.estimator).fit(X[a], y[a]) for a, _ in self.folds.split(X, y)]
        return self

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        mean = np.zeros((len(X), len(self.classes_)))
        for member in self.members_:  # one may have been shown no image of a rare class
            columns = np.searchsorted(self.classes_, member.classes_)
            mean[:, columns] += member.predict_proba(X) / len(self.members_)
        return mean

    def predict(self, X: np.ndarray) -> np.ndarray:
        return self.classes_[self.predict_proba(X).argmax(axis=1)]


# ---------------------------------------------------------------- networks


def network(cls: Any, **params: Any) -> Contestant:
    """Make one on the start; what `params` say comes before what all share."""
    return lambda s: cls(**{**s.network, **params})


softmax = partial(network, SoftmaxClassifier)
adjusted = partial(softmax, loss="logit_adjusted")


def from_scratch(s: Setting) -> Any:
    """The same images, and a network of this package that has seen none before."""
    more = {} if s.max_epochs is None else {"max_epochs": s.max_epochs}
    return SoftmaxClassifier(
        loss="logit_adjusted", image_size=s.image_size, random_state=s.seed, **more
    )


def ensemble(s: Setting) -> Any:
    return FoldEnsemble(adjusted()(s), s.folds(5, s.seed))


def amimv(s: Setting) -> Any:
    """As many epochs without labels as the labelled images then have; its head is on the frozen."""
    encoder = AMIMVEncoder(max_epochs=s.max_epochs or TUNING_EPOCHS, batch_size=32)
    return AMIMVClassifier(**{**s.network, "fine_tune": "frozen"}, pretrain=encoder)


METHODS: dict[str, Contestant] = {
    "logit adjustment": adjusted(),
    "CE": softmax(),
    "cRT": network(MetricTwoStageClassifier, metric_weight=0, rebalance="crt", keep_start=False),
    "metric two-stage": network(MetricTwoStageClassifier),
    "LMD": network(LMDClassifier),
    "CSSN": network(CSSNClassifier),
    "SPMix": network(SPMixClassifier),
}


# ---------------------------------------------------------------- classifiers of features


def features(s: Setting, **params: Any) -> PretrainedFeatures:
    given = {"backbone": s.start, "image_size": s.image_size, "random_state": s.seed}
    return PretrainedFeatures(**given, **params)


def logistic(**params: Any) -> Contestant:
    """Balanced logistic regression."""
    return lambda s: logistic_regression(features(s, **params), s.folds())


def svm(s: Setting) -> Any:
    return support_vectors(features(s), s.seed, s.folds())


def forest(s: Setting) -> Any:
    params = {"sampling_strategy": "all", "replacement": True, "bootstrap": False}
    return make_pipeline(
        features(s), BalancedRandomForestClassifier(300, **params, random_state=s.seed)
    )


def virtual_features(s: Setting) -> Any:
    sampler = BalancedVirtualFeatures(replace=True, random_state=s.seed)
    head = LogisticRegression(**HOW_LONG)
    return chosen(features(s), sampler, head, cv=s.folds(), logisticregression__C=LOGISTIC_C)


# ---------------------------------------------------------------- by name

LEFT = without_ideas(METHODS)
# These do nothing on a network that stays as it is: they shape features.
SHAPING = {"metric two-stage - metric", "LMD - relations", "LMD - E-step", *OF_TUNED}
FROZEN: dict[str, Contestant] = {
    "frozen LR": logistic(at_all_depths=False, n_views=1),
    "frozen LR, views + depths": logistic(),
    "frozen SVM": svm,
    "frozen forest": forest,
    "frozen virtual features": virtual_features,
    **METHODS,
    "class weights": softmax(class_weight="balanced"),
    **{name: LEFT[name] for name in LEFT if name not in SHAPING},
    "logit adjustment, one view": adjusted(n_views=1),
    "logit adjustment, 5-fold ensemble": ensemble,
}
# What `fine_tune="auto"` does here, the head first, is LP-FT: so "CE" and "logit adjustment" are.
TUNED: dict[str, Contestant] = {
    **METHODS,
    "class-balanced batches": softmax(sampler=RandomOverSampler()),
    "full": adjusted(fine_tune="full"),
    "CE, full": softmax(fine_tune="full"),
    "EMA off": adjusted(ema=None),
    "one view": adjusted(n_views=1),
    "frozen": adjusted(fine_tune="frozen"),
    "frozen LR, views + depths": logistic(),
    "AMIMV continued": amimv,
    **LEFT,
    **without_ideas({"AMIMV continued": amimv}),
}
LARGE: dict[str, Contestant] = {**TUNED, "from scratch": from_scratch}
LEVERS: dict[str, Contestant] = {
    "frozen": adjusted(fine_tune="frozen"),
    "head first": adjusted(),
    "all at once": adjusted(fine_tune="full"),
    "last 3 stages": adjusted(fine_tune=3),
    "10 epochs": adjusted(max_epochs=10),
    "20 epochs": adjusted(max_epochs=20),
    "backbone rate 0.1": adjusted(backbone_lr=0.1),
    "backbone rate 1": adjusted(backbone_lr=1.0),
    "last weights": adjusted(ema=None),
    "augment light": adjusted(augment="light"),
    "one view": adjusted(n_views=1),
    "eight views": adjusted(n_views=8),
    "224 px": adjusted(image_size=224),
}
