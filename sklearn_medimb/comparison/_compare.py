"""Classifiers on the same folds, nothing done twice."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from joblib import parallel_config
from sklearn.base import clone, is_classifier
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.utils import _safe_indexing, check_consistent_length
from sklearn.utils.validation import _num_samples

from sklearn_medimb._data.containers import one_column
from sklearn_medimb._data.files import wrap_dataset
from sklearn_medimb._data.rows import group_codes
from sklearn_medimb._machine.jobs import run_jobs
from sklearn_medimb._training.digests import digest_of
from sklearn_medimb.comparison._result import Comparison
from sklearn_medimb.decisions._base import takes_groups
from sklearn_medimb.metrics import Interval, metric_interval, paired_difference
from sklearn_medimb.metrics._labels import labels_of

Metric = Callable[[np.ndarray, np.ndarray], float]
_ANSWERS = "predicted", "fit_seconds", "predict_seconds"


def compare_methods(
    estimators: Mapping[str, Any] | Sequence[Any],
    X: Any,
    y: Any,
    *,
    groups: Any = None,
    cv: Any = 5,
    metrics: Mapping[str, Metric] | None = None,
    baseline: str | None = None,
    level: float = 0.95,
    n_jobs: int | None = None,
    folder: str | Path | None = None,
    random_state: Any = 0,
    verbose: int = 0,
) -> Comparison:
    """Compare classifiers on the same folds, with intervals and differences by patients.

    Each classifier is fitted to the training part of each fold and predicts the rest. The scores
    are of the predictions of all folds together, so that a class of a few images counts as a
    whole. An interval says how much a score would change with other patients; it does not know
    that other folds, or seeds, train other networks.

    Parameters
    ----------
    estimators : dict from str to classifier, or list of classifiers
        Not fitted; in a list, names are those of their classes. :func:`common_methods` has many.
    X : array-like or lazy sequence of n images
        Images, in any form that the classifiers take.
    y : array-like of shape (n,)
        Classes.
    groups : array-like of shape (n,), default=None
        Patient of each image: patients are kept whole, by folds, by the classifiers' own
        validation, and in the intervals.
    cv : int, splitter, or iterable of (train, test), default=5
        An int makes stratified folds, drawn by `random_state`. No image may be tested twice.
    metrics : dict from str to callable, default=None
        ``metric(y_true, y_pred)`` of labels. None takes balanced accuracy, macro F1, the geometric
        mean of the recalls, and the recall of the rarest class.
    baseline : str, default=None
        The method whose differences to the others are given; None takes the first.
    level : float, default=0.95
        Coverage of the intervals.
    n_jobs : int, default=None
        Processes, as in joblib.
    folder : path-like, default=None
        Where the result of each fold is kept, so that a run that was killed, or has one more
        method, does no fold again. A result counts only for the same images, labels, folds and
        parameters. Classifiers without a fixed ``random_state`` are given `random_state`.
    random_state : int, default=0
        Draws the folds, and seeds classifiers that have no seed of their own.
    verbose : int, default=0
        1 shows progress.

    Returns
    -------
    comparison : Comparison
        Prints as a table; ``plot()`` draws it, ``to_frame()`` makes it a DataFrame.

    Raises
    ------
    ValueError
        If two methods have one name, `baseline` is none of them, a fold tests an image twice, or
        every method fails. A method that fails in a fold is left out with a warning.

    Examples
    --------
    >>> from sklearn_medimb import MetricTwoStageClassifier, SoftmaxClassifier
    >>> from sklearn_medimb.comparison import compare_methods
    >>> from sklearn_medimb.datasets import make_lesions
    >>> data = make_lesions([24, 9], image_size=16, random_state=0)
    >>> methods = [SoftmaxClassifier(max_epochs=1), MetricTwoStageClassifier(max_epochs=1)]
    >>> found = compare_methods(methods, data.images, data.target, cv=3)
    >>> sorted(found.names)
    ['MetricTwoStageClassifier', 'SoftmaxClassifier']
    """
    named = _named(estimators, random_state)
    baseline = next(iter(named)) if baseline is None else str(baseline)
    if baseline not in named:
        raise ValueError(f"baseline={baseline!r} must be one of {list(named)}.")
    X, labels = wrap_dataset(one_column(X)), labels_of(y, "y")
    if _num_samples(X) != len(labels):
        raise ValueError(f"X holds {_num_samples(X)} images, y {len(labels)} labels.")
    patients = None if groups is None else group_codes(groups, labels)
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"y holds one class only, {classes.tolist()}.")
    folds = _folds(cv, labels, patients, random_state)
    rows = np.concatenate([test for _, test in folds])
    order = np.argsort(rows)
    truth = codes[rows][order]
    if metrics is None:
        chosen = _default_metrics(classes, truth)
    else:
        chosen = _checked(metrics, classes[truth])
    if not isinstance(level, Real) or not 0 < level < 1:
        raise ValueError(f"level={level!r} must lie between 0 and 1.")

    jobs = {
        (name, k): (estimator, X, labels, patients, train, test, classes)
        for name, estimator in named.items()
        for k, (train, test) in enumerate(folds)
    }
    path_of = None
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        data = digest_of((X, labels, patients), "X", "folder")
        marks = {name: digest_of(made, name, "folder") for name, made in named.items()}
        paths = {
            (name, k): Path(folder) / f"{_slug(name)}-{_mark(data, marks[name], folds[k])}.json"
            for name, k in jobs
        }
        path_of = paths.__getitem__
    with parallel_config(n_jobs=n_jobs) if n_jobs is not None else parallel_config():
        results, errors = run_jobs(
            _fitted_and_asked, jobs, path_of, needs=_ANSWERS, show=verbose > 0
        )
    failures = {name: f"in fold {k}: {why}" for (name, k), why in reversed(errors.items())}
    for name, why in failures.items():
        warnings.warn(f"{name} is left out, for it failed {why}", stacklevel=2)
    names = [name for name in named if name not in failures]
    if not names:
        raise ValueError(f"Every method failed; the first one {next(iter(failures.values()))}")
    if baseline not in names:
        raise ValueError(f"The baseline, {baseline}, failed {failures[baseline]}")

    who = None if patients is None else patients[rows][order]

    def together(name: str, what: str) -> np.ndarray:
        parts = [np.asarray(results[name, k][what]) for k in range(len(folds))]
        return np.concatenate(parts)[order]

    answers = {name: together(name, "predicted").astype(int) for name in names}
    predicted = {name: classes[answer] for name, answer in answers.items()}
    asked, known = truth, np.arange(len(classes))
    if metrics is not None:  # which are asked about the labels themselves
        asked, answers, known = classes[truth], predicted, classes
    proba = {name: together(name, "proba") for name in names if "proba" in results[name, 0]}
    how: dict[str, Any] = {"groups": who, "labels": known}
    shared = 1 - (1 - level) / max(1, len(names) - 1)
    scores, differences = {}, {}
    for metric, of in chosen.items():
        scores[metric] = {
            name: metric_interval(of, asked, answers[name], level=level, **how) for name in names
        }
        differences[metric] = {
            name: Interval(0.0, 0.0, 0.0) if name == baseline else paired_difference(
                of, asked, answers[name], answers[baseline], level=shared, **how
            )
            for name in names
        }  # fmt: skip
    first = scores[next(iter(chosen))]
    seconds = {
        what: {
            name: float(np.mean([results[name, k][what] for k in range(len(folds))]))
            for name in names
        }
        for what in ("fit_seconds", "predict_seconds")
    }
    return Comparison(
        names=sorted(names, key=lambda name: -first[name].score),
        scores=scores,
        differences=differences,
        baseline=baseline,
        y_true=classes[truth],
        predictions=predicted,
        probabilities=proba,
        classes=classes,
        rows=rows[order],
        folds=folds,
        estimators={name: named[name] for name in names},
        failures=failures,
        level=level,
        n_images=len(rows),
        n_patients=None if who is None else len(np.unique(who)),
        **seconds,
    )


def _named(estimators: Any, seed: Any) -> dict[str, Any]:
    """Clones by name; those without a seed are given one."""
    if isinstance(estimators, Mapping):
        pairs = list(estimators.items())
    else:
        pairs = [(type(made).__name__, made) for made in estimators]
    if not pairs:
        raise ValueError("estimators is empty: there is nothing to compare.")
    named: dict[str, Any] = {}
    for name, estimator in ((str(name), estimator) for name, estimator in pairs):
        if name in named:
            raise ValueError(f"Two methods are called {name}: pass a dict with names of your own.")
        if isinstance(estimator, type) or not is_classifier(estimator):
            raise TypeError(f"estimators: {name}={estimator!r} is no classifier.")
        made = clone(estimator)
        params = made.get_params()
        unset = [k for k, v in params.items() if k.split("__")[-1] == "random_state" and v is None]
        named[name] = made.set_params(**dict.fromkeys(unset, seed))
    return named


def _folds(
    cv: Any, y: np.ndarray, groups: np.ndarray | None, seed: Any
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Training and test rows; no row is tested twice, and no patient is on both sides."""
    if isinstance(cv, Integral):
        kind = StratifiedKFold if groups is None else StratifiedGroupKFold
        cv = kind(cv, shuffle=True, random_state=seed)
    rows = np.arange(len(y))
    with warnings.catch_warnings():  # what keeps patients whole is checked below
        warnings.filterwarnings("ignore", "The groups parameter is ignored")
        try:
            found: Iterable[Any] = cv if isinstance(cv, Iterable) else cv.split(rows, y, groups)
            folds = [(rows[train], rows[test]) for train, test in found]
        except (AttributeError, TypeError, IndexError) as error:
            raise ValueError(
                f"cv={cv!r} must be a number, a splitter, or pairs of rows: {error}"
            ) from error
    tested, times = np.unique(np.concatenate([test for _, test in folds]), return_counts=True)
    if (times > 1).any():
        raise ValueError(f"cv tests row {tested[times > 1][0]} of X twice: pass folds.")
    for k, (train, test) in enumerate(folds):
        if np.intersect1d(train, test).size:
            raise ValueError(f"cv: fold {k} tests rows that it trains on.")
        if groups is not None and np.intersect1d(groups[train], groups[test]).size:
            raise ValueError(f"cv: fold {k} tests patients that it trains on.")
        if lacking := sorted(set(y.tolist()) - set(y[train].tolist())):
            raise ValueError(
                f"cv: fold {k} trains on no image of {lacking}: take fewer folds, or leave out "
                f"classes of one {'image' if groups is None else 'patient'}."
            )
    return folds


def _checked(metrics: Any, y: np.ndarray) -> dict[str, Metric]:
    """Metrics that answer: what fails on the labels themselves would fail after all the work."""
    if not isinstance(metrics, Mapping) or not metrics:
        raise ValueError(f"metrics={metrics!r} must be a dict of names and functions.")
    for name, of in metrics.items():
        try:
            score = float(of(y, y))
        except Exception as error:
            raise ValueError(
                f"metrics: {name}={of!r} must give a number for (y_true, y_pred), but fails on the "
                f"labels as their own predictions: {type(error).__name__}: {error}"
            ) from error
        if not np.isfinite(score):
            raise ValueError(f"metrics: {name} is {score} of labels as their own predictions.")
    return {str(name): of for name, of in metrics.items()}


def _default_metrics(classes: np.ndarray, tested: np.ndarray) -> dict[str, Metric]:
    """Metrics of codes: thousands of samples are asked about, and tables of counts are fast."""
    n_classes, seen = len(classes), np.unique(tested, return_counts=True)
    rarest = int(seen[0][seen[1].argmin()])

    def of_table(measure: Callable[[np.ndarray], float]) -> Metric:
        def metric(y: np.ndarray, predicted: np.ndarray) -> float:
            table = np.bincount(n_classes * y + predicted, minlength=n_classes**2)
            return float(measure(table.reshape(n_classes, n_classes)))

        return metric

    def recalls(table: np.ndarray) -> np.ndarray:
        size = table.sum(axis=1)
        return table.diagonal()[size > 0] / size[size > 0]

    def macro_f1(table: np.ndarray) -> float:
        both = table.sum(axis=0) + table.sum(axis=1)
        return float((2 * table.diagonal()[both > 0] / both[both > 0]).mean())

    def of_rarest(table: np.ndarray) -> float:
        size = table[rarest].sum()
        return table[rarest, rarest] / size if size else np.nan

    def geometric_mean(table: np.ndarray) -> float:
        found = recalls(table)
        return float(found.prod() ** (1 / len(found)))

    return {
        "balanced accuracy": of_table(lambda table: recalls(table).mean()),
        "macro F1": of_table(macro_f1),
        "geometric mean": of_table(geometric_mean),
        f"recall of {classes[rarest]}": of_table(of_rarest),
    }


def fitted_on(
    rows: np.ndarray, estimator: Any, X: Any, y: np.ndarray, groups: np.ndarray | None
) -> Any:
    """Clone, fitted to some rows; told of patients where it can take them."""
    given = {}
    if groups is not None and takes_groups(estimator):
        given["groups"] = groups[rows]
    return clone(estimator).fit(_safe_indexing(X, rows), y[rows], **given)


def _fitted_and_asked(
    estimator: Any,
    X: Any,
    y: np.ndarray,
    groups: np.ndarray | None,
    train: np.ndarray,
    test: np.ndarray,
    classes: np.ndarray,
) -> dict[str, Any]:
    """Predictions of a fold, and how long they took."""
    start = time.perf_counter()
    made = fitted_on(train, estimator, X, y, groups)
    fitted, images = time.perf_counter(), _safe_indexing(X, test)
    result: dict[str, Any] = {}
    if hasattr(made, "predict_proba"):
        proba = np.zeros((len(test), len(classes)))
        proba[:, _codes(made.classes_, classes, "knows")] = _probabilities(made, images)
        result["proba"] = proba.tolist()
    asked = time.perf_counter()
    predicted = np.asarray(made.predict(images))
    check_consistent_length(predicted, test)
    codes = _codes(predicted, classes, "predicts")
    return {
        **result,
        "predicted": codes.tolist(),
        "fit_seconds": fitted - start,
        "predict_seconds": time.perf_counter() - asked,
    }


def _codes(labels: np.ndarray, classes: np.ndarray, what: str) -> np.ndarray:
    codes = np.searchsorted(classes, labels).clip(max=len(classes) - 1)
    if (strange := classes[codes] != labels).any():
        raise ValueError(f"it {what} {labels[strange].tolist()[0]!r}, which y does not hold")
    return codes


def _probabilities(made: Any, images: Any) -> np.ndarray:
    proba = np.asarray(made.predict_proba(images), dtype=np.float64)
    shape = _num_samples(images), len(made.classes_)
    if proba.shape != shape:
        raise ValueError(f"its predict_proba has shape {proba.shape}, not {shape}")
    good = (proba >= 0).all(axis=1) & (np.abs(proba.sum(axis=1) - 1) <= 1e-3)
    if not good.all():
        raise ValueError(f"its predict_proba gives {proba[~good][0].tolist()}")
    return proba


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name[:40])


def _mark(data: bytes, method: bytes, fold: tuple[np.ndarray, np.ndarray]) -> str:
    return digest_of((data, method, *fold), "cv", "folder").hex()[:20]
