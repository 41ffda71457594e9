"""A page about a comparison, for readers who do not program.

Imports `_data`, `_machine`, `_training`, `comparison`, `decisions`, `inspection`, `metrics`.
"""

from __future__ import annotations

import base64
import io
import os
import platform
from collections.abc import Sequence
from datetime import date
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.frozen import FrozenEstimator
from sklearn.utils import _safe_indexing
from sklearn.utils.validation import _num_samples

import sklearn_medimb
from sklearn_medimb._data.files import wrap_dataset
from sklearn_medimb._data.rows import group_codes
from sklearn_medimb._machine.runtime import replacing
from sklearn_medimb._training.digests import digest_of
from sklearn_medimb.comparison import Comparison
from sklearn_medimb.comparison._compare import fitted_on
from sklearn_medimb.decisions import OperatingPoint
from sklearn_medimb.inspection import (
    CalibrationByClassDisplay,
    CoverageDisplay,
    RecallByClassDisplay,
    SaliencyDisplay,
    SimilarityEvidenceDisplay,
    TrainingCurveDisplay,
)
from sklearn_medimb.metrics import Interval
from sklearn_medimb.metrics._labels import labels_of

_N_SHOWN = 4  # images of each kind of error

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; background: #fff; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { margin-top: 2.4rem; font-size: 1.25rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; border-bottom: 1px solid #ccc;
  white-space: nowrap; vertical-align: top; }
td.long { white-space: normal; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; }
figcaption, .small { font-size: .85rem; color: #444; }
.lead { font-size: 1.1rem; border-left: 4px solid #0072B2; padding-left: 1rem; }
.warn { border-left: 4px solid #D55E00; padding-left: 1rem; }
"""


class Report:
    """A page of HTML that needs no network.

    Attributes
    ----------
    html : str
        The page.
    operating_point : OperatingPoint or None
        The threshold that it names, where one could be promised.
    """

    def __init__(self, html: str, operating_point: OperatingPoint | None) -> None:
        self.html = html
        self.operating_point = operating_point

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page.

        Parameters
        ----------
        path : path-like
            File; it is written whole or not at all.

        Returns
        -------
        path : Path
            The same.
        """
        with replacing(Path(path)) as draft:
            draft.write_text(self.html, encoding="utf-8")
        return Path(path)

    def _repr_html_(self) -> str:
        page = escape(self.html, quote=True)
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 40rem; border: 0"></iframe>'

    def __repr__(self) -> str:
        return f"Report({len(self.html) / 2**20:.1f} MB of HTML; save(path) writes it)"


def report(
    comparison: Comparison,
    X: Any,
    y: Any,
    *,
    groups: Any = None,
    method: str | None = None,
    positive: Any = None,
    prevalence: float | None = None,
    min_sensitivity: float = 0.95,
    confidence: float = 0.95,
    title: str = "Comparison of classifiers",
    notes: str | Sequence[str] = (),
    not_for: str | Sequence[str] = (),
) -> Report:
    """Make a page about a comparison: data, scores, decisions, errors, limits.

    All figures are of images that the classifier at hand had not seen. One method is shown in
    detail: its recalls, calibration, operating point, and, trained once more on the first fold, the
    evidence for its most confident errors and its nearest misses.

    Parameters
    ----------
    comparison : Comparison
        Of :func:`~sklearn_medimb.comparison.compare_methods`.
    X, y, groups
        What was compared on.
    method : str, default=None
        The method to show in detail; None takes the first of the table.
    positive : label or collection of labels, default=None
        The disease, for the operating point; None takes the rarest class.
    prevalence : float, default=None
        Share of the ill where the classifier is to be used; None is that in `y`.
    min_sensitivity, confidence : float, default=0.95
        What is promised, as in :class:`~sklearn_medimb.decisions.OperatingPoint`.
    title : str
        Heading.
    notes : str or sequence of str, default=()
        What else to say of the data, such as duplicates that were found.
    not_for : str or sequence of str, default=()
        Uses that the page must exclude, beside the usual ones.

    Returns
    -------
    report : Report
        ``save(path)`` writes it.

    Raises
    ------
    ValueError
        If X, y and groups are not those of the comparison, `method` is not in it, or what is
        asked of the operating point makes no sense.

    Examples
    --------
    >>> from sklearn_medimb import CSSNClassifier, SoftmaxClassifier
    >>> from sklearn_medimb.comparison import compare_methods
    >>> from sklearn_medimb.datasets import make_lesions
    >>> from sklearn_medimb.report import report
    >>> data = make_lesions([40, 12], image_size=16, random_state=0)
    >>> methods = [SoftmaxClassifier(max_epochs=2), CSSNClassifier(max_epochs=2)]
    >>> found = compare_methods(methods, data.images, data.target, cv=3)
    >>> page = report(found, data.images, data.target)
    >>> "Confident errors" in page.html
    True
    """
    X, labels = wrap_dataset(X), labels_of(y, "y")
    chosen = comparison.names[0] if method is None else method
    if chosen not in comparison.names:
        raise ValueError(f"method={method!r} must be one of {comparison.names}.")
    if (
        len(labels) <= comparison.rows.max()
        or _num_samples(X) != len(labels)
        or not np.array_equal(np.unique(labels), comparison.classes)
        or not np.array_equal(labels[comparison.rows], comparison.y_true)
    ):
        raise ValueError("X and y must be what was compared on, all of it, in the same order.")
    patients = None if groups is None else group_codes(groups, labels)
    who = None if patients is None else patients[comparison.rows]
    if (None if who is None else len(np.unique(who))) != comparison.n_patients:
        raise ValueError("groups must be what the comparison was given.")
    classes, truth = comparison.classes, comparison.y_true
    seen, counts = np.unique(truth, return_counts=True)
    how = {
        "positive": seen[counts.argmin()] if positive is None else positive,
        "min_sensitivity": min_sensitivity,
        "confidence": confidence,
        "prevalence": prevalence,
    }
    point = None
    if chosen in comparison.probabilities:  # first, for it knows what makes no sense
        proba = comparison.probabilities[chosen]
        decision, point = _decision_section(proba, truth, who, classes, how)

    body = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(comparison.finding())}.</p>']
    body += _data_section(X, labels, patients, comparison, notes)
    body += _scores_section(comparison)
    body += [f"<h2>In detail: {escape(chosen)}</h2>"]
    shown: Any = RecallByClassDisplay.from_predictions(
        truth,
        comparison.predictions[chosen],
        train_counts=labels,
        groups=who,
        level=comparison.level,
    )
    body += [_figure(shown, "Share of each class that is found, the most frequent class on top.")]
    if chosen in comparison.probabilities:
        shown = CalibrationByClassDisplay.from_predictions(truth, proba, classes=classes)
        caption = (
            "How often a class is right where it was given a probability. Methods that balance the "
            "classes give probabilities for classes that are equally frequent."
        )
        body += [_figure(shown, caption)]
        shown = CoverageDisplay.from_predictions(truth, proba, classes=classes)
        body += [_figure(shown, "What it brings to leave the least certain images to a reader.")]
        body += decision
    body += _errors_section(comparison, chosen, X, labels, patients)
    body += _limits_section(patients is not None, not_for)
    body += _facts_section(comparison, X, labels)
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    )
    page = "\n".join(body)
    return Report(
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{page}\n</body></html>\n',
        point,
    )


# ---------------------------------------------------------------- sections


def _data_section(
    X: Any,
    y: np.ndarray,
    patients: np.ndarray | None,
    comparison: Comparison,
    notes: str | Sequence[str],
) -> list[str]:
    classes, counts = np.unique(y, return_counts=True)
    head, rows = ["class", "images", "share"], []
    if patients is not None:
        head.append("patients")
    for label, n in sorted(zip(classes.tolist(), counts, strict=True), key=lambda pair: -pair[1]):
        row = [label, n, f"{100 * n / len(y):.1f} %"]
        if patients is not None:
            row.append(len(np.unique(patients[y == label])))
        rows.append(row)
    shape = tuple(getattr(X, "shape", ()))[1:]
    what = f"{len(y)} images"
    if shape:
        what += f" of shape {' x '.join(map(str, shape))}, {getattr(X, 'dtype', '')}"
    what += f"; the largest class has {counts.max() / counts.min():.1f} times the smallest."
    n_folds = len(comparison.folds)
    if patients is None:
        split = (
            f"Each image was tested once, in {n_folds} folds. Nobody said which images are of the "
            "same patient: if several are, scores are too good and intervals too narrow."
        )
    else:
        per = np.bincount(patients)
        split = (
            f"{len(per)} patients with {per.min()} to {per.max()} images. In each of {n_folds} "
            "folds no patient is on both sides: every image was tested by a classifier that had "
            "not seen its patient. Intervals are about further patients."
        )
    kind = "p" if patients is not None else 'p class="warn"'
    told = [f'<p class="warn">{escape(note)}</p>' for note in _several(notes)]
    return [
        "<h2>The data, as they were understood</h2>",
        f"<p>{escape(what)}</p>",
        _table(head, rows),
        f"<{kind}>{escape(split)}</p>",
        *told,
    ]


def _scores_section(comparison: Comparison) -> list[str]:
    head, rows = ["method"], []
    for metric in comparison.scores:
        head += [metric, f"against {comparison.baseline}"]
    for name in comparison.names:
        row = [name]
        for metric, found in comparison.scores.items():
            difference = comparison.differences[metric][name]
            own = "" if name == comparison.baseline else _interval(difference, "+.2f")
            row += [_interval(found[name]), own]
        rows.append([*row, f"{comparison.fit_seconds[name]:.1f}"])
    caption = (
        f"Filled: told apart from {comparison.baseline}. Intervals of {100 * comparison.level:g} % "
        "say what other patients would change; those of the differences hold together."
    )
    failed = [f"{name} failed {why}" for name, why in comparison.failures.items()]
    return [
        "<h2>Scores</h2>",
        _figure(comparison.plot(), caption),
        _table([*head, "training [s]"], rows),
        *[f'<p class="warn">{escape(text)}</p>' for text in failed],
    ]


class _Told(ClassifierMixin, BaseEstimator):
    """Classifier whose images are the probabilities that another one gave."""

    def __init__(self, classes: Any) -> None:
        self.classes = classes
        self.classes_ = classes

    def fit(self, X: Any, y: Any) -> _Told:
        """Learn nothing."""
        return self

    def predict_proba(self, X: Any) -> Any:
        """Give what was given."""
        return X


def _decision_section(
    proba: np.ndarray,
    truth: np.ndarray,
    who: np.ndarray | None,
    classes: np.ndarray,
    how: dict[str, Any],
) -> tuple[list[str], OperatingPoint | None]:
    disease = " or ".join(map(str, np.ravel(how["positive"])))
    head = f"<h2>A decision: {escape(disease)} or not</h2>"
    point = OperatingPoint(FrozenEstimator(_Told(classes)), **how)
    point._validate_params()
    # Without a promise it fails only for what the caller gave, which is no finding for a page.
    clone(point).set_params(confidence=None).fit(proba, truth, who)
    try:
        point.fit(proba, truth, who)
    except ValueError as error:
        text = "No threshold is given, for no promise could be kept: "
        return [head, f'<p class="warn">{escape(text + str(error))}</p>'], None
    share = f"{100 * how['min_sensitivity']:g} %"
    if how["confidence"] is None:
        kept = f"At least {share} of these images of {disease} are found; nothing is promised."
    else:
        sure = f"With a confidence of {100 * how['confidence']:g} % at least"
        kept = f"{sure} {share} of further images of {disease} are found."
    promise = (
        f"Positive from a probability of {point.threshold_:.3f}. {kept} Predictive values are for "
        f"{100 * point.prevalence_:.3g} % ill."
    )
    words = {
        "sensitivity": "of the ill, found",
        "specificity": "of the well, left in peace",
        "ppv": "of the positives, ill",
        "npv": "of the negatives, well",
    }
    rows = [
        [name, _interval(getattr(point, f"{name}_"), ".3f"), what] for name, what in words.items()
    ]
    return [
        head,
        f"<p>{escape(promise)}</p>",
        _table(["", "estimate [interval]", "share"], rows),
    ], point


def _errors_section(
    comparison: Comparison, name: str, X: Any, y: np.ndarray, patients: np.ndarray | None
) -> list[str]:
    """Evidence of the first fold, whose classifier is trained once more."""
    estimator = comparison.estimators[name]
    if not hasattr(estimator, "_score_function"):
        text = f"{name} is no network of this package: there is no picture of what it looked at."
        return ["<h2>Errors</h2>", f"<p>{escape(text)}</p>"]
    train, test = comparison.folds[0]
    seen = _safe_indexing(X, train)
    estimator = fitted_on(train, estimator, X, y, patients)
    proba = estimator.predict_proba(_safe_indexing(X, test))
    best, own = proba.argmax(axis=1), np.searchsorted(estimator.classes_, y[test])
    margin = proba.max(axis=1) - proba[np.arange(len(test)), own]
    wrong = np.flatnonzero(best != own)
    confident = wrong[np.argsort(-margin[wrong], kind="stable")][:_N_SHOWN]
    near = np.setdiff1d(wrong, confident)
    near = near[np.argsort(margin[near], kind="stable")][:_N_SHOWN]
    text = f"{len(wrong)} of the {len(test)} images of the first fold were taken for another class."
    parts = ["<h2>Errors, and what the network looked at</h2>", f"<p>{escape(text)}</p>"]
    for heading, rows in (("Confident errors", confident), ("Nearest misses", near)):
        if not len(rows):
            parts += [f"<h3>{heading}</h3>", "<p>None.</p>"]
            continue
        images, labels = _safe_indexing(X, test[rows]), y[test[rows]]
        parts.append(f"<h3>{heading}</h3>")
        try:
            parts.append(_evidence(estimator, images, labels, seen))
        except ValueError as error:  # feature vectors, networks without places
            parts.append(f"<p>{escape(f'There is no picture: {error}')}</p>")
    if any("train_loss" in row for row in estimator.history_):
        curve = TrainingCurveDisplay.from_estimator(estimator)
        parts.append(_figure(curve, "How this training went, epoch by epoch."))
    caution = (
        "Such pictures say what the network uses, not what a disease looks like; a place that "
        "looks sensible proves nothing, one that does not is a warning."
    )
    return [*parts, f'<p class="small">{escape(caution)}</p>']


def _evidence(estimator: Any, images: Any, labels: np.ndarray, seen: Any) -> str:
    if hasattr(estimator, "explain"):
        shown: Any = SimilarityEvidenceDisplay.from_estimator(
            estimator, images, supports=seen, y=labels
        )
        return _figure(
            shown,
            "From left to right: the image; places that speak for (red) and against (blue) its "
            "class; the most similar image of each class, and the place that makes it so.",
        )
    shown = SaliencyDisplay.from_estimator(estimator, images, y=labels)
    return _figure(shown, "Above: the image. Below: places that speak for the class it was given.")


def _limits_section(has_patients: bool, not_for: str | Sequence[str]) -> list[str]:
    limits = [
        "Decisions about patients: this is no medical device.",
        "Images of other devices, protocols, hospitals or patients, until it was tested on them.",
        "Images that show none of the classes above: they are given one of them all the same.",
        "Quoting the score of the best of many methods: it is the best by chance, too.",
    ]
    if not has_patients:
        limits.append("Claims about new patients: it is not known which images are of one patient.")
    items = "".join(f"<li>{escape(text)}</li>" for text in [*_several(not_for), *limits])
    return ["<h2>What this must not be used for</h2>", f"<ul>{items}</ul>"]


def _facts_section(comparison: Comparison, X: Any, y: np.ndarray) -> list[str]:
    packages = ("torch", "scikit-learn", "imbalanced-learn", "skorch", "numpy")
    rows = [
        ["made", f"{date.today():%Y-%m-%d}"],  # noqa: DTZ011
        ["sklearn_medimb", sklearn_medimb.__version__],
        ["Python", platform.python_version()],
        *[[name, version(name)] for name in packages],
        ["images and labels", digest_of((X, y), "X", "report").hex()[:32]],
        *[[name, repr(made)] for name, made in comparison.estimators.items()],
    ]
    cells = "".join(
        f'<tr><th>{escape(str(name))}</th><td class="long">{escape(str(value))}</td></tr>'
        for name, value in rows
    )
    return ["<h2>Versions and digests</h2>", f'<div class="scroll"><table>{cells}</table></div>']


# ---------------------------------------------------------------- parts of a page


def _several(texts: str | Sequence[str]) -> Sequence[str]:
    return [texts] if isinstance(texts, str) else texts


def _table(head: list[str], rows: list[list[Any]]) -> str:
    top = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _figure(shown: Any, caption: str) -> str:
    """A display, or axes, as a picture within the page."""
    figure = getattr(shown, "figure_", None) or shown.figure
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    import matplotlib.pyplot as plt

    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="{escape(caption, quote=True)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _interval(found: Interval, form: str = ".2f") -> str:
    score, low, high = (format(float(part), form) for part in found)
    return f"{score} [{low}, {high}]"
