"""Every method on every data set: a resumable list of jobs, and a tidy table.

    python benchmarks/compare.py FOLDER --regime scratch|frozen|pretrained --suite core
        [--methods ...] [--data ...] [--seeds ...] [--inner] [--start NAME] [--out results]
        [--jobs 2 | --dask ADDRESS]

FOLDER holds ``.npz`` files. A job is one method on one data set, cut, size and seed. Its result is
a file of its own, written whole or not at all, so that a run which was killed goes on where it was;
it also says what was predicted for each image and patient tested. At the end, or with ``--table``,
``results.csv`` is written from these files; jobs that it holds already count as done, if they ran
on the same kind of hardware. Beside it ``predictions.csv`` has the predicted classes as short text,
which outlasts the files: with FOLDER the images, classes and patients they are of are found again.
``report.py`` turns both into a page.

"scratch" takes all MedMNIST-style sets of the folder and synthetic lesions, at 28 pixels: the
official test images where there are some, else a stratified fold that keeps patients whole, drawn
anew for each seed; training parts as they are, and cut to imbalance ratios of 10, 50 and 100 where
that leaves enough images. All networks have the same backbone, augmentation, optimiser and number
of steps (in the core suite half of their default). "defaults" is of 32 pixels and has classifiers
as they are without an argument beside the afternoon CNN, which takes about as long; "ideas" has
each method of the papers, and what is left of it without its own idea, on up to 400 images.

"frozen" and "pretrained" take nine sets, and networks that begin with the weights of `--start`:
these stay as they are, at 128 pixels, or are tuned. Tuning's core suite has what two cores do in
some hours (96 pixels, 200 images, 5 epochs, two folds), "large" is for a GPU (128 pixels, 600
images, default epochs, three folds), and "levers" has the settings of one method. Frozen "curves"
trains seven methods on one fold: on parts of 50 to 400 images, each within the next, on all of
them, and on cuts to ratios of 5 to 100. Of sets with more than 900 images a part with the same
shares of classes; classes of six images or more; three folds that keep patients whole, which are
the seeds. ``--data`` may name any file with ``images`` and ``labels``.

With ``--inner`` the test rows are left alone: three quarters of each training part are trained on,
the last quarter is scored. Defaults are chosen on these. Nothing is selected here: every method has
its default or the setting that its literature advises; baselines with a knob choose it in inner
folds of what they are given, patients whole.

``--method my_module:MyClassifier`` adds a classifier of one's own, from the current directory or an
installed package, under the name of its class. Of `backbone`, `spatial_dims`, `max_epochs`,
`random_state`, and with a start `image_size` and `fine_tune`, it is given what it has; the rest is
its default. What is finished stays: after a change of the class use another ``--out``.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from functools import cache, partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from contestants import IDEAS, OF_MANY_CLASSES, Setting, made_from, outside
from contestants import METHODS as SCRATCH
from contestants_pretrained import FROZEN, LARGE, LEVERS, STARTS, TUNED
from differences import FORMERLY, KEY, Answers, in_full, in_short
from imblearn.metrics import geometric_mean_score
from joblib import parallel_config
from sklearn.metrics import balanced_accuracy_score, f1_score, recall_score, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.utils import Bunch

from sklearn_medimb._machine.jobs import read_result, run_jobs
from sklearn_medimb.datasets import load_npz, make_lesions, make_long_tailed
from sklearn_medimb.metrics import expected_calibration_error, head_tail_gap, shot_recall

# ---------------------------------------------------------------- data and jobs


@dataclasses.dataclass(frozen=True)
class Suite:
    """How large and how many."""

    image_size: int
    volume_size: int
    max_train: int
    max_test: int
    step_share: float | None  # of the usual steps of networks from scratch; None: each its own
    seeds: tuple[int, ...]
    cuts: tuple[int | None, ...]
    methods: tuple[str, ...]
    data: tuple[str, ...] | None = None  # None takes every file of the folder
    start: str = ""  # what networks begin with; "" is nothing
    fine_tune: str = "auto"
    max_epochs: int | None = None  # of networks with a start; None is their default
    max_images: int = 900  # of a set, with a start
    sizes: tuple[int, ...] = ()  # of parts of the uncut training images, beside `cuts` of them all

    @property
    def drawn(self) -> list[tuple[int | None, int | None]]:
        """Cut and size of each training set: not both."""
        return [*((cut, None) for cut in self.cuts), *((None, size) for size in self.sizes)]


SETS = (
    "brain_tumor_mri", "ph2_dermoscopy", "wbc_two_sites", "dr_maculopathy", "busi",
    "herlev_papsmear", "covid_cxr", "iq_othnccd_ct", "dementia_mri",
)  # fmt: skip
LABELS = {"dr_maculopathy": "grade"}  # instead of "labels"
METHODS = {"scratch": SCRATCH | IDEAS, "frozen": FROZEN, "pretrained": LARGE | LEVERS}
LITE0 = "efficientnet_lite0"
FOLDS = (0, 1, 2)
UNCUT = (None,)
SUITES = {
    ("scratch", "core"): Suite(
        28, 8, 500, 1000, 0.5, (0, 1), (None, 10, 50, 100), tuple(SCRATCH)
    ),
    ("scratch", "defaults"): Suite(
        32, 16, 1000, 1000, None, (0, 1), UNCUT,
        ("afternoon CNN", "CE", "logit adjustment", "metric two-stage", "LMD", "SPMix", "CSSN"),
    ),
    ("scratch", "ideas"): Suite(32, 16, 400, 1000, None, (0, 1), UNCUT, tuple(IDEAS)),
    ("scratch", "smoke"): Suite(
        12,
        8,
        90,
        90,
        0.2,
        (0,),
        (None, 10),
        ("CE", "logit adjustment", "CSSN", "SMOTE + SVM", "boosting"),
        ("lesions",),
    ),
    ("frozen", "core"): Suite(
        128, 0, 600, 900, 1, FOLDS, UNCUT, tuple(FROZEN), SETS, LITE0, "frozen"
    ),
    ("frozen", "curves"): Suite(
        128, 0, 600, 900, 1, FOLDS[:1], (None, 5, 10, 20, 50, 100),
        ("CE", "logit adjustment", "frozen LR, views + depths", "metric two-stage", "LMD", "CSSN",
         "SPMix"),
        SETS, LITE0, "frozen", sizes=(50, 100, 200, 400),
    ),
    ("frozen", "smoke"): Suite(
        24, 0, 80, 60, 1, (0,), (5,), tuple(FROZEN), ("lesions",), "untrained", "frozen", 2, 200
    ),
    ("pretrained", "core"): Suite(
        96, 0, 200, 900, 1, FOLDS, UNCUT, tuple(TUNED), SETS, LITE0, "head_first", 5
    ),
    ("pretrained", "large"): Suite(
        128, 0, 600, 900, 1, FOLDS, UNCUT, tuple(LARGE), SETS, LITE0, "head_first"
    ),
    ("pretrained", "smoke"): Suite(
        24, 0, 80, 60, 1, (0,), (5,), tuple(LARGE), ("lesions",), "untrained", "head_first", 1, 200
    ),
    ("pretrained", "levers"): Suite(
        128, 0, 600, 900, 1, FOLDS, UNCUT, tuple(LEVERS), SETS, LITE0, "head_first"
    ),
}  # fmt: skip
MIN_RAREST = 4  # training images that a cut, or a part, must leave of the rarest class
LEAST_MORE = 1.25  # times the images of a part are in the whole, at least


@dataclasses.dataclass(frozen=True)
class Job:
    """One method on one data set, cut, size and seed: what tells rows of the table apart."""

    regime: str
    suite: str
    start: str
    rows: str  # scored: of the "test" part, or of an "inner" part of the training images
    data: str
    cut: int | None
    size: int | None
    seed: int
    method: str
    hardware: str

    @property
    def row(self) -> dict[str, Any]:
        """Its columns of the table."""
        of = dataclasses.asdict(self)
        return {**of, "cut": self.cut or "natural", "size": self.size or "all"}

    @property
    def slug(self) -> str:
        of = dataclasses.asdict(self)
        of["size"] = self.size and f"{self.size} images"
        words = " ".join(str(value) for value in of.values() if value not in (None, ""))
        return "".join(c if c.isalnum() else "-" for c in words)


@cache
def load(folder: str | None, name: str, suite: Suite) -> Bunch:
    """Images, classes, patients and official test rows of a data set."""
    if name == "lesions":
        data = make_lesions(
            2000,
            image_size=suite.image_size,
            difficulty=0.2,
            images_per_patient=2,
            random_state=0,
        )
        data = Bunch(**data, split=None, spatial_dims=2, parts={})
        return capped(data, suite.max_images) if suite.start else data
    path = Path(folder or "") / f"{name}.npz"
    if suite.start:
        return capped(read_images(path), suite.max_images)
    with np.load(path, allow_pickle=False) as archive:
        keys = set(archive.files)
        key = "images" if "images" in keys else "train_images"
        shape = archive[key].shape
        volumes = len(shape) == 4 and shape[-1] not in (1, 3, 4)
        twins = archive["dup_groups"] if "dup_groups" in keys else None
    size = suite.volume_size if volumes else suite.image_size
    data = load_npz(path, image_size=size if min(shape[1:3]) > size else None)
    if data.groups is None:
        data.groups = twins  # identical files count as one patient
    data.spatial_dims = 3 if volumes else 2
    data.parts = {}  # by seed: all methods and cuts of a process share them
    return data


def read_images(path: Path) -> Bunch:
    """Images of a file at their own size, with classes and patients: networks resize them."""
    with np.load(path, allow_pickle=False) as archive:
        images, y = archive["images"], archive[LABELS.get(path.stem, "labels")].ravel()
        keys = [key for key in ("groups", "dup_groups") if key in archive.files]
        groups = archive[keys[0]] if keys else None
    return Bunch(images=images, target=y, groups=groups, split=None, spatial_dims=2, parts={})


def capped(data: Bunch, n: int) -> Bunch:
    """At most about `n` images of classes with six or more, in random order."""
    y = np.unique(data.target, return_inverse=True)[1]
    rows = np.flatnonzero(np.bincount(y)[y] >= 6)
    y = np.unique(y[rows], return_inverse=True)[1]
    groups = np.arange(len(data.target)) if data.groups is None else data.groups
    groups, rng = np.unique(groups[rows], return_inverse=True)[1], np.random.default_rng(0)
    if len(y) > n:
        kept = draw(y, groups, n, rng, least=12)
        rows, y, groups = rows[kept], y[kept], groups[kept]
    order = rng.permutation(len(y))
    rows, y, groups = rows[order], y[order], groups[order]
    given = {"images": data.images[rows], "target": y, "groups": groups, "rows": rows}
    return Bunch(**{**data, **given})


def draw(
    y: np.ndarray, groups: np.ndarray, n: int, rng: np.random.Generator, *, least: int
) -> np.ndarray:
    """About `n` rows: the same share of each class, but `least` of it where it has as many.

    Of each class they are those of some patients, the last of whom may lose a part. Fewer are among
    more, of generators in one state.
    """
    patients = np.unique(groups, return_inverse=True)[1]
    order, taken = rng.permutation(patients.max() + 1).argsort(), []
    for k in np.unique(y):
        own = np.flatnonzero(y == k)
        own = own[order[patients[own]].argsort(kind="stable")]
        taken.append(own[: max(least, round(n * len(own) / len(y)))])
    return np.concatenate(taken)


def parts(data: Bunch, suite: Suite, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training and of the test part, all of them."""
    y = data.target
    if data.split is not None:
        return np.flatnonzero(data.split == "train"), np.flatnonzero(data.split == "test")
    if suite.start:
        folds = StratifiedGroupKFold(len(FOLDS), shuffle=True, random_state=0)
        return list(folds.split(y, y, data.groups))[seed]
    kind = StratifiedKFold if data.groups is None else StratifiedGroupKFold
    return next(kind(4, shuffle=True, random_state=seed).split(y, y, data.groups))


def split(
    data: Bunch,
    suite: Suite,
    cut: int | None,
    seed: int,
    *,
    size: int | None = None,
    inner: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train and to test on; the test rows do not depend on cut and size.

    `inner` leaves the test rows alone: a quarter of the training rows is tested on. The size is
    that of what is left to train on.
    """
    y = data.target
    if seed not in data.parts:
        data.parts[seed] = parts(data, suite, seed)
    train, test = data.parts[seed]
    rng = np.random.default_rng(seed)
    test = np.sort(rng.permutation(test)[: suite.max_test])
    if cut is not None:
        options = {"imbalance_ratio": cut, "random_state": seed, "return_indices": True}
        rows = make_long_tailed(train, y[train], **options)[2]
        if len(rows) > suite.max_train:
            rows = make_long_tailed(train, y[train], **options, n_samples=suite.max_train)[2]
        train = train[rows]
    elif len(train) > suite.max_train:  # the same share of every class, four images at least
        share = suite.max_train / len(train)
        own = [rng.permutation(train[y[train] == k]) for k in np.unique(y[train])]
        train = np.concatenate([rows[: max(4, round(share * len(rows)))] for rows in own])
    train = np.sort(train)
    patients = train if data.groups is None else data.groups[train]
    if inner:
        folds = StratifiedGroupKFold(4, shuffle=True, random_state=1)
        fitted, scored = next(folds.split(train, y[train], patients))
        train, test, patients = train[fitted], train[scored], patients[fitted]
    if size is not None:
        own = np.random.default_rng(seed)
        train = np.sort(train[draw(y[train], patients, size, own, least=MIN_RAREST)])
    return train, test


def images_of(data: Bunch, test: np.ndarray) -> dict[str, list[Any]]:
    """What tells the images tested from others: rows, patients and classes."""
    return {
        "rows": data.get("rows", np.arange(len(data.target)))[test].tolist(),
        "patients": (test if data.groups is None else data.groups[test]).tolist(),
        "true": data.target[test].tolist(),
    }


def allows(
    data: Bunch, suite: Suite, cut: int | None, size: int | None, seed: int, *, inner: bool
) -> bool:
    """Whether the training images are enough for this cut or size, and not as it asks already."""
    if cut is not None:
        counts = np.bincount(data.target[split(data, suite, None, seed)[0]])
        if counts.max() / counts[counts > 0].min() >= cut:
            return False
    try:
        train, _ = split(data, suite, cut, seed, inner=inner)
    except ValueError:
        return False  # too few images for this ratio
    left = np.bincount(data.target[train])
    if cut is not None and (left[left > 0].min() < MIN_RAREST or len(train) < 60):
        return False
    return size is None or len(train) >= LEAST_MORE * size


def names(folder: Path | None, suite: Suite) -> list[str]:
    """Data sets of a suite: image archives of the folder, and the lesions."""
    if suite.data is not None:
        return list(suite.data)
    found = []
    for path in sorted(folder.glob("*.npz")) if folder else []:
        with np.load(path, allow_pickle=False) as archive:
            if {"images", "train_images"} & set(archive.files) and not path.stem.endswith("_64"):
                found.append(path.stem)
    return [*found, "lesions"]


def jobs(args: argparse.Namespace, folder: str | None) -> Iterator[Job]:
    """All jobs, seed by seed, so that a run cut short has whole rounds."""
    suite = SUITES[args.regime, args.suite]
    start = args.start or suite.start
    rows = "inner" if args.inner else "test"
    hardware = circumstances()["hardware"]
    methods = *(args.methods or suite.methods), *(cls.__name__ for cls in args.method)
    for seed in suite.seeds if args.seeds is None else args.seeds:
        for name in args.data or names(args.folder, suite):
            data = load(folder, name, suite)
            n_classes = len(np.unique(data.target[split(data, suite, None, seed)[0]]))
            own = [name for name in methods if n_classes > 2 or name not in OF_MANY_CLASSES]
            where = args.regime, args.suite, start, rows, name
            for cut, size in suite.drawn:
                if allows(data, suite, cut, size, seed, inner=args.inner):
                    for method in own:
                        yield Job(*where, cut, size, seed, method, hardware)


# ---------------------------------------------------------------- one job


def measures(
    predicted: np.ndarray,
    proba: np.ndarray,
    classes: np.ndarray,
    y: np.ndarray,
    y_train: np.ndarray,
    *,
    calibrated: bool,
) -> dict[str, float]:
    """All scores of predicted classes and probabilities, or scores that are none."""
    shots = shot_recall(y, predicted, y_train)
    scores = {
        "balanced_accuracy": balanced_accuracy_score(y, predicted),
        "macro_f1": f1_score(y, predicted, average="macro"),
        "geometric_mean": geometric_mean_score(y, predicted),
        "many_recall": shots.many,
        "few_recall": shots.few,
        "head_tail_gap": head_tail_gap(y, predicted, y_train),
    }
    if calibrated:
        scores["calibration_error"] = expected_calibration_error(y, proba, labels=classes)
        scores["class_wise_calibration_error"] = expected_calibration_error(
            y, proba, labels=classes, class_wise=True
        )
    if proba.ndim == 1:
        scores["macro_auroc"] = roc_auc_score(y, proba)
    else:  # one class against the rest, for each class that the test part holds
        areas = [
            roc_auc_score(y == k, proba[:, i]) for i, k in enumerate(classes) if (y == k).any()
        ]
        scores["macro_auroc"] = float(np.mean(areas))
    return {name: round(float(value), 6) for name, value in scores.items()}


def peak_memory(reset: bool = False) -> float:
    """Largest resident memory of this process since the last reset, in MB; NaN if unknown."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return math.nan


def run(job: Job, folder: str | None, cls: type | None = None) -> dict[str, Any]:
    """Train and test one method; what came out, with all that a reader may ask.

    `cls` is that of a classifier from outside.
    """
    warnings.filterwarnings("ignore")
    suite = SUITES[job.regime, job.suite]
    data = load(folder, job.data, suite)
    inner = job.rows == "inner"
    train, test = split(data, suite, job.cut, job.seed, size=job.size, inner=inner)
    X, y, counts = data.images[train], data.target[train], np.bincount(data.target[train])
    counts = counts[counts > 0]
    setting = Setting(
        job.seed,
        data.spatial_dims,
        tuple(counts.tolist()),
        suite.step_share,
        STARTS.get(job.start, job.start or None),
        suite.image_size,
        suite.fine_tune,
        suite.max_epochs,
        None if data.groups is None else tuple(data.groups[train].tolist()),
    )
    make = METHODS[job.regime][job.method] if cls is None else partial(made_from, cls)
    classifier = make(setting)
    peak_memory(reset=True)
    start, busy = time.perf_counter(), time.process_time()
    classifier.fit(X, y)
    fitted, busy = time.perf_counter(), time.process_time() - busy
    predicted = classifier.predict(data.images[test])
    done = time.perf_counter()
    calibrated = hasattr(classifier, "predict_proba")
    of_images = classifier.predict_proba if calibrated else classifier.decision_function
    proba, classes = of_images(data.images[test]), classifier.classes_
    scores = measures(predicted, proba, classes, data.target[test], y, calibrated=calibrated)
    return {
        **job.row,
        "n_train": len(train),
        "n_test": len(test),
        "n_classes": len(counts),
        "n_rarest": int(counts.min()),
        "imbalance_ratio": round(float(counts.max() / counts.min()), 2),
        "image_size": suite.image_size,
        "n_epochs": getattr(classifier, "n_iter_", ""),
        "fine_tune": getattr(classifier, "fine_tune_", ""),
        **scores,
        "fit_seconds": round(fitted - start, 2),
        "fit_cpu_seconds": round(busy, 2),  # what it takes of an idle core, whoever ran beside it
        "predict_seconds": round(done - fitted, 3),
        "peak_mb": round(peak_memory(), 1),
        "tested": {
            **images_of(data, test),
            "predicted": np.asarray(predicted).tolist(),
            "classes": np.asarray(classes).tolist(),
            "scores": np.round(proba, 4).tolist(),
        },
    }


# ---------------------------------------------------------------- all jobs


def circumstances() -> dict[str, str]:
    """Commit, versions and hardware."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    packages = ("torch", "scikit-learn", "imbalanced-learn", "skorch", "numpy")
    return {
        "commit": commit or "unknown",
        "versions": " ".join(f"{name} {version(name)}" for name in packages),
        "hardware": f"{os.cpu_count()} cores {platform.machine()}{_gpu()}",
    }


def _gpu() -> str:
    import torch

    return f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""


def read_table(path: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """Rows of an earlier table, by job: they count as done too."""
    if not path.exists():
        return {}
    with path.open() as file:
        rows = [{**FORMERLY, **row} for row in csv.DictReader(file)]
    return {_key(row): row for row in rows}


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def write_table(folder: Path) -> Path:
    """Gather the files of all jobs, and what tables held before, in an order of its own."""
    table, kept = folder / "results.csv", folder / "predictions.csv"
    rows, predictions = read_table(table), read_table(kept)
    for path in sorted(folder.glob("jobs/*.json")):
        result = read_result(path)
        if result is not None:
            tested = result.pop("tested", None)
            result = {**FORMERLY, **result}
            key = _key(result)
            rows[key] = result
            predictions.pop(key, None)
            if tested:
                predictions[key] = {**dict(zip(KEY, key, strict=True)), **in_short(tested)}
    if predictions:
        _write(kept, predictions)
    _write(table, rows)
    return table


def _write(path: Path, rows: dict[tuple[str, ...], dict[str, Any]]) -> None:
    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        numbers = "cut", "size"
        return tuple(str(row[name]).zfill(8 * (name in numbers)) for name in KEY)

    ordered = sorted(rows.values(), key=place)
    columns = list(dict.fromkeys(name for row in ordered for name in (*KEY, *row)))
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(ordered)
    temporary.replace(path)


def remembered(table: Path, folder: str) -> Answers:
    """What was predicted, by the text beside a table, for the images of a folder."""
    rows, short, found = read_table(table), read_table(table.with_name("predictions.csv")), {}
    keys = sorted(rows.keys() & short.keys())
    for cell, alike in groupby(keys, lambda key: key[: KEY.index("method")]):
        regime, name, _, part, data, *drawn, seed = cell
        cut, size = (int(text) if text.isdecimal() else None for text in drawn)
        suite, inner = SUITES[regime, name], part == "inner"
        own = load(folder, data, suite)
        images = images_of(own, split(own, suite, cut, int(seed), size=size, inner=inner)[1])
        for key in alike:
            tested = in_full(short[key], images)
            if tested is None:
                raise ValueError(f"{folder} has other images of {data} than predictions.csv is of.")
            true, predicted = tested["true"], tested["predicted"]
            score = recall_score(true, predicted, labels=np.unique(true), average="macro")
            if abs(score - float(rows[key]["balanced_accuracy"])) > 1e-6:
                raise ValueError(f"predictions.csv and {table.name} are of two runs of {key}.")
            found[key] = tested
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="of .npz files; none: lesions only")
    parser.add_argument("--regime", choices=list(METHODS), default="scratch")
    parser.add_argument("--suite", choices=sorted({name for _, name in SUITES}), default="smoke")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--jobs", type=int, default=1, help="local processes")
    parser.add_argument("--dask", metavar="ADDRESS", help="scheduler of a Dask cluster")
    parser.add_argument("--data", nargs="+", help="only these sets")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these methods")
    parser.add_argument(
        "--method",
        action="append",
        default=[],
        type=outside,
        metavar="MODULE:CLASS",
        help="also a classifier of one's own; may be repeated, and Dask's workers must have it too",
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="only these seeds")
    parser.add_argument("--start", metavar="NAME", help="backbone with weights of elsewhere")
    parser.add_argument("--inner", action="store_true", help="leave the test rows alone")
    parser.add_argument("--table", action="store_true", help="only gather what is there")
    args = parser.parse_args()
    if (args.regime, args.suite) not in SUITES:
        parser.error(f"argument --suite: {args.regime} has no {args.suite}")
    known = METHODS[args.regime]
    for name in args.methods or []:
        if name not in known:
            parser.error(f"argument --methods: {name!r} is none of {list(known)}")
    own = [cls.__name__ for cls in args.method]
    if len(set(own)) < len(own):
        parser.error("argument --method: two classes have the same name")
    for name in own:
        if name in known:
            parser.error(f"argument --method: {name}: a method of the comparison is called so")
    if args.regime == "scratch" and args.start:
        parser.error("argument --start: scratch has none")
    if args.regime != "scratch" and set(args.seeds or []) - set(FOLDS):
        parser.error(f"argument --seeds: these are folds, {list(FOLDS)}")

    (args.out / "jobs").mkdir(parents=True, exist_ok=True)
    if not args.table:
        folder = None if args.folder is None else str(args.folder.resolve())
        failed = run_all(args, folder)
        for job, reason in failed:
            print(f"FAILED {job.slug}: {reason}", file=sys.stderr)
    print(f"table: {write_table(args.out)}")


def run_all(args: argparse.Namespace, folder: str | None) -> list[tuple[Job, str]]:
    """Run what is not done yet; return what failed."""
    own = {cls.__name__: cls for cls in args.method}
    path_of = {job: args.out / "jobs" / f"{job.slug}.json" for job in jobs(args, folder)}
    known = read_table(args.out / "results.csv")
    missing = [job for job in path_of if _key(job.row) not in known]
    n_done = len(path_of) - sum(read_result(path_of[job]) is None for job in missing)
    print(f"{len(path_of)} jobs, {n_done} of them done", flush=True)
    backend: dict[str, Any] = {"n_jobs": args.jobs}
    if args.dask:
        from dask.distributed import Client

        client = Client(args.dask)
        for name in (
            "afternoon",
            "contestants",
            "contestants_pretrained",
            "differences",
            "compare",
        ):
            client.upload_file(str(Path(__file__).with_name(f"{name}.py")))
        backend = {"backend": "dask", "n_jobs": sum(client.nthreads().values())}
    arguments = {job: (job, folder, own.get(job.method)) for job in missing}
    with parallel_config(**backend):
        _, failed = run_jobs(
            run,
            arguments,
            path_of.__getitem__,
            needs=["balanced_accuracy"],
            facts=circumstances(),
            show=True,
        )
    return list(failed.items())


if __name__ == "__main__":
    # Workers find functions by the name of their module, which `__main__` is not.
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    import compare

    compare.main()
