"""Classifiers of the features of a network that stays as it is, which choose their own C."""

from __future__ import annotations

from typing import Any

from imblearn.pipeline import Pipeline, make_pipeline
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from sklearn_medimb.methods import PretrainedFeatures

LOGISTIC_C = [3e-4, 3e-3, 3e-2]
HOW_LONG = {"max_iter": 300, "tol": 1e-3}


def chosen(features: PretrainedFeatures, *steps: Any, cv: Any = 3, **grid: list[float]) -> Pipeline:
    """Features, standardised, then the steps; of the grid, what has the best balanced accuracy.

    `cv` is that of the search, which sees features of the training images in their order.
    """
    pipeline = make_pipeline(StandardScaler(), *steps)
    search = GridSearchCV(pipeline, grid, cv=cv, scoring="balanced_accuracy")
    return make_pipeline(features, search)


def logistic_regression(features: PretrainedFeatures, cv: Any = 3) -> Pipeline:
    """Balanced logistic regression."""
    head = LogisticRegression(class_weight="balanced", **HOW_LONG)
    return chosen(features, head, cv=cv, logisticregression__C=LOGISTIC_C)


def support_vectors(features: PretrainedFeatures, seed: Any, cv: Any = 3) -> Pipeline:
    """Balanced support vector machine."""
    head = SVC(class_weight="balanced", random_state=seed)
    return chosen(features, head, cv=cv, svc__C=[0.1, 1, 10])
