"""What wraps a classifier: fits that pass on what belongs to it, and answers of unseen patients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import sklearn
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, check_cv
from sklearn.pipeline import Pipeline
from sklearn.utils import _safe_indexing, assert_all_finite, get_tags
from sklearn.utils._param_validation import HasMethods
from sklearn.utils._param_validation import Interval as Range
from sklearn.utils.metadata_routing import (
    MetadataRouter,
    MethodMapping,
    process_routing,
)
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import (
    _check_method_params,
    check_consistent_length,
    check_is_fitted,
    has_fit_parameter,
    indexable,
)

from sklearn_medimb._data.labels import is_mark, read_labels
from sklearn_medimb._data.rows import group_codes
from sklearn_medimb._pages import Documented

Splits = list[tuple[np.ndarray, np.ndarray]]


def has(method: str) -> Callable[[Any], bool]:
    """Whether the wrapped classifier has a method, fitted or not."""

    def check(self: Any) -> bool:
        getattr(getattr(self, "estimator_", self.estimator), method)  # its own error names it
        return True

    return check


class WrappedClassifier(ClassifierMixin, MetaEstimatorMixin, Documented, BaseEstimator):
    """Base of classifiers that decide by another one's probabilities.

    A subclass fits a clone, ``estimator_``, and sets ``classes_``. Metadata of ``fit`` go to the
    other classifier: by its requests where metadata routing is enabled, else as they are.
    """

    estimator: Any

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "estimator": [
            HasMethods(["fit", "predict_proba"]),
            HasMethods(["fit", "decision_function"]),
        ],
    }

    def _read(self, X: Any, y: Any) -> tuple[Any, np.ndarray, np.ndarray]:
        """Return X as it is, labels, at least two, and classes: a frozen classifier's, or these."""
        if y is None:
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is None."
            )
        check_consistent_length(X, y)
        unlabelled = takes_unlabelled(self.estimator)
        y = read_labels(y, warn=True, mixed=unlabelled)
        if unlabelled and (marks := is_mark(y)).any():
            raise ValueError(
                f"{type(self).__name__} counts images whose class is known, but y holds "
                f"{y[marks.argmax()]!r}, no label, in row {marks.argmax()}: fit the classifier to "
                "all rows, and pass FrozenEstimator(classifier) with labelled ones that it has not "
                "seen."
            )
        assert_all_finite(y, input_name="y")
        check_classification_targets(y)
        classes = np.unique(y)
        if len(classes) < 2:
            raise ValueError(
                f"{type(self).__name__} needs at least 2 classes in y, but found "
                f"{len(classes)} class: {classes.tolist()}."
            )
        if isinstance(self.estimator, FrozenEstimator):
            check_is_fitted(self.estimator)
            known = self.estimator.classes_
            if strangers := sorted(set(classes.tolist()) - set(known.tolist())):
                raise ValueError(
                    f"y holds {strangers}, but the frozen estimator knows {known.tolist()}: give y "
                    "in the labels that it was fitted on."
                )
            classes = known
        (X,) = indexable(X)
        return X, y, classes

    def _keep(self, fitted: Any) -> None:
        """Keep what is fitted."""
        self.estimator_ = fitted
        self.classes_ = fitted.classes_
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(fitted, name):
                setattr(self, name, getattr(fitted, name))

    def _routed(self, params: dict[str, Any]) -> dict[str, Any]:
        """Metadata for ``fit`` of the other classifier; patients only if it can take them."""
        params = {key: value for key, value in params.items() if value is not None}
        if sklearn.get_config()["enable_metadata_routing"]:
            return process_routing(self, "fit", **params).estimator.fit
        if "groups" in params and not takes_groups(self.estimator):
            del params["groups"]
        return params

    @available_if(has("predict_proba"))
    def predict_proba(self, X: Any) -> np.ndarray:
        """Predict class probabilities: those of the wrapped classifier.

        Parameters
        ----------
        X : array-like or lazy sequence of n samples
            What the wrapped classifier takes.

        Returns
        -------
        proba : ndarray of shape (n, n_classes)
            Columns follow ``classes_``.
        """
        check_is_fitted(self)
        return self.estimator_.predict_proba(X)

    def get_metadata_routing(self) -> MetadataRouter:
        """Tell which metadata ``fit`` takes and hands on.

        Returns
        -------
        routing : MetadataRouter
            For scikit-learn.
        """
        return (
            MetadataRouter(owner=self)
            .add_self_request(self)
            .add(
                estimator=self.estimator,
                method_mapping=MethodMapping().add(caller="fit", callee="fit"),
            )
        )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        inner = get_tags(self.estimator)
        tags.input_tags = inner.input_tags
        if inner.classifier_tags is not None:
            tags.classifier_tags.multi_class = inner.classifier_tags.multi_class
        return tags


class ThresholdClassifier(WrappedClassifier):
    """Base of classifiers whose threshold is chosen on answers for unseen patients."""

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **WrappedClassifier._parameter_constraints,
        "confidence": [Range(Real, 0, 1, closed="neither"), None],
        "cv": ["cv_object"],
        "random_state": ["random_state"],
        "n_jobs": [Integral, None],
    }
    # Whose images they are matters here whatever the classifier asks for.
    __metadata_request__fit: ClassVar[dict[str, Any]] = {"groups": True}


def takes_groups(estimator: Any) -> bool:
    """Whether the ``fit`` of a classifier, or of one that it wraps, is told of patients."""
    while isinstance(estimator, WrappedClassifier):
        estimator = estimator.estimator
    return has_fit_parameter(estimator, "groups")


def takes_unlabelled(estimator: Any) -> bool:
    """Whether a classifier, or the one within it, learns from rows without a label."""
    if isinstance(estimator, Pipeline):
        return takes_unlabelled(estimator.steps[-1][1])
    if (inner := getattr(estimator, "estimator", None)) is not None:
        return takes_unlabelled(inner)
    return bool(getattr(estimator, "_takes_unlabelled", False))


# ---------------------------------------------------------------- answers of unseen patients


def scores_by_class(estimator: Any, X: Any) -> np.ndarray:
    """Probabilities of a fitted classifier; of two classes its scores if it has no probabilities.

    Parameters
    ----------
    estimator : classifier
        Fitted.
    X : array-like or lazy sequence of n samples
        What it takes.

    Returns
    -------
    scores : ndarray of float64 of shape (n, n_classes)
        Finite.

    Raises
    ------
    ValueError
        If a score is NaN or infinite, columns are not those of the classes, or there are more
        classes than scores tell apart.
    """
    name = "predict_proba" if hasattr(estimator, "predict_proba") else "decision_function"
    scores = np.asarray(getattr(estimator, name)(X), dtype=np.float64)
    if not np.isfinite(scores).all():
        row = np.flatnonzero(~np.isfinite(scores.reshape(len(scores), -1)).all(axis=1))[0]
        raise ValueError(
            f"{name} of {type(estimator).__name__} gives {scores[row].tolist()} for row {row} of "
            "X: no decision can be made of it."
        )
    if scores.ndim == 2 and scores.shape[1] != len(estimator.classes_):
        raise ValueError(
            f"{name} of {type(estimator).__name__} gives {scores.shape[1]} columns for the classes "
            f"{np.asarray(estimator.classes_).tolist()}."
        )
    if scores.ndim == 1:
        return np.column_stack([-scores, scores])
    if name != "predict_proba":
        raise ValueError(
            f"{type(estimator).__name__} has no predict_proba: of {scores.shape[1]} classes its "
            "scores cannot be added up. Wrap it into CalibratedClassifierCV."
        )
    return scores


def split_patients(
    estimator: Any, cv: Any, y: np.ndarray, groups: Any, random_state: Any
) -> tuple[Splits, np.ndarray | None]:
    """Splits of which each row is tested once, and no patient in training and test.

    Parameters
    ----------
    estimator : classifier
        One that is frozen has seen none of the rows: there is nothing to split.
    cv : int, splitter or iterable of splits
        A number makes stratified folds, of whole patients where they are known.
    y : ndarray of shape (n,)
        Labels.
    groups : array-like of shape (n,) or None
        Patients.
    random_state : int, RandomState or None
        Shuffles the folds that a number makes.

    Returns
    -------
    splits : list of (train, test)
        Row numbers.
    groups : ndarray of int of shape (n,) or None
        Numbers of patients, from 0.
    """
    codes = None if groups is None else group_codes(groups, y)
    rows = np.arange(len(y))
    if isinstance(estimator, FrozenEstimator):
        return [(rows, rows)], codes
    if isinstance(cv, (int, np.integer)):
        folds = StratifiedKFold if codes is None else StratifiedGroupKFold
        cv = folds(int(cv), shuffle=True, random_state=random_state)
    with warnings.catch_warnings():  # whether it minds patients is seen below
        warnings.filterwarnings("ignore", "The groups parameter is ignored")
        splits = list(check_cv(cv, y, classifier=True).split(rows, y, codes))
    splits = [(rows[train], rows[test]) for train, test in splits]  # of masks, too
    tested = np.bincount(np.concatenate([test for _, test in splits]), minlength=len(y))
    if (tested != 1).any():
        row = int((tested != 1).argmax())
        raise ValueError(f"cv tests row {row} {tested[row]} times: each must be tested once.")
    for k, (train, test) in enumerate(splits):
        if codes is not None and np.isin(codes[test], codes[train]).any():
            raise ValueError(
                f"cv cuts patients: fold {k} trains on some whom it tests. Pass a number, or "
                "StratifiedGroupKFold."
            )
    return splits, codes


def out_of_fold(
    estimator: Any,
    X: Any,
    y: np.ndarray,
    splits: Splits,
    params: dict[str, Any],
    n_jobs: int | None,
    answer: Callable[[Any, Any], np.ndarray],
) -> np.ndarray:
    """Answers to every row by a clone that was fitted without it.

    Unlike :func:`sklearn.model_selection.cross_val_predict` it shows the clones labels as they are,
    of which ``class_weight={label: weight}`` and the like speak.

    Parameters
    ----------
    estimator : classifier
        Cloned for each fold.
    X : array-like or lazy sequence of n samples
        All samples.
    y : ndarray of shape (n,)
        Labels.
    splits : list of (train, test)
        Row numbers, each tested once.
    params : dict
        For ``fit``; those with an entry for each row are split.
    n_jobs : int or None
        Folds at a time.
    answer : callable
        ``answer(fitted, X)``, an array with an entry for each row.

    Returns
    -------
    answers : ndarray of shape (n, ...)
        In the order of the rows.
    """
    parts = Parallel(n_jobs=n_jobs)(
        delayed(_fold)(clone(estimator), X, y, train, test, params, answer)
        for train, test in splits
    )
    order = np.concatenate([test for _, test in splits])
    answers = np.concatenate(parts)
    found = np.empty_like(answers)
    found[order] = answers
    return found


def _fold(
    estimator: Any,
    X: Any,
    y: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    params: dict[str, Any],
    answer: Callable[[Any, Any], np.ndarray],
) -> np.ndarray:
    params = _check_method_params(X, params, indices=train)
    estimator.fit(_safe_indexing(X, train), y[train], **params)
    return answer(estimator, _safe_indexing(X, test))
