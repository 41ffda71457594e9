"""Networks that were trained before, on real images of 128 pixels: methods and levers.

    python benchmarks/pretrained.py FOLDER --out results.csv [--sets busi ...] [--methods cssn ...]
        [--levers] [--inner] [--folds 3] [--jobs 2]

FOLDER holds the nine ``.npz`` sets of `SETS`. A row of the table is one method on one fold of one
set; rows that are there already are not computed again, so that a run that was killed goes on. At
the end the means over folds are printed, and the mean over sets.

Protocol: of sets with more than 900 images a part with the same shares of classes, patients whole;
three folds that keep patients whole (`StratifiedGroupKFold`), at most 600 training images. With
``--inner`` the outer test rows are left alone: three quarters of each training part are trained
on, the last quarter is scored. Defaults are chosen on these, never on the test rows. Every method
has its default but for what its row in `METHODS` or `LEVERS` says; the baseline, logistic
regression with class weights on standardised frozen features, chooses its C in three inner folds.
"""

from __future__ import annotations

import argparse
import csv
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_medimb import (
    CSSNClassifier,
    LMDClassifier,
    MetricTwoStageClassifier,
    PretrainedFeatures,
    SoftmaxClassifier,
    SPMixClassifier,
)

SETS = {
    "brain": "brain_tumor_mri", "ph2": "ph2_dermoscopy", "wbc": "wbc_two_sites",
    "dr": "dr_maculopathy", "busi": "busi", "herlev": "herlev_papsmear", "covid": "covid_cxr",
    "iq_oth": "iq_othnccd_ct", "dementia": "dementia_mri",
}  # fmt: skip
COLUMNS = ("set", "fold", "rows", "method", "balanced_accuracy", "fit_seconds", "n_train")
START = {"backbone": "efficientnet_lite0", "image_size": 128, "random_state": 0}


def baseline(**params: Any) -> Any:
    """Balanced logistic regression on frozen features."""
    head = LogisticRegression(class_weight="balanced", max_iter=300, tol=1e-3)
    grid = {"logisticregression__C": [3e-4, 3e-3, 3e-2]}
    head = GridSearchCV(
        make_pipeline(StandardScaler(), head), grid, cv=3, scoring="balanced_accuracy"
    )
    return make_pipeline(PretrainedFeatures(image_size=128, **params), head)


adjusted = partial(SoftmaxClassifier, loss="logit_adjusted", **START)
tuned = partial(adjusted, fine_tune="head_first")

METHODS: dict[str, Callable[[], Any]] = {
    "baseline": baseline,
    "baseline, last layer, one view": partial(baseline, at_all_depths=False, n_views=1),
    "logit adjustment": adjusted,
    "CSSN": partial(CSSNClassifier, **START),
    "metric two-stage": partial(MetricTwoStageClassifier, **START),
    "LMD": partial(LMDClassifier, **START),
    "SPMix": partial(SPMixClassifier, **START),
    "from scratch": partial(
        SoftmaxClassifier, loss="logit_adjusted", image_size=128, random_state=0
    ),
}
LEVERS: dict[str, Callable[[], Any]] = {
    "frozen": partial(adjusted, fine_tune="frozen"),
    "head first": tuned,
    "all at once": partial(adjusted, fine_tune="full"),
    "last 3 stages": partial(adjusted, fine_tune=3),
    "10 epochs": partial(tuned, max_epochs=10),
    "20 epochs": partial(tuned, max_epochs=20),
    "backbone rate 0.1": partial(tuned, backbone_lr=0.1),
    "backbone rate 1": partial(tuned, backbone_lr=1.0),
    "last weights": partial(tuned, ema=None),
    "augment light": partial(tuned, augment="light"),
    "one view": partial(tuned, n_views=1),
    "eight views": partial(tuned, n_views=8),
    "224 px": partial(tuned, image_size=224),
}


def load(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, classes and patients, at most 900 of them, in random order."""
    with np.load(folder / f"{SETS[name]}.npz", allow_pickle=False) as archive:
        X, y = archive["images"], archive["grade" if name == "dr" else "labels"].ravel()
        keys = [key for key in ("groups", "dup_groups") if key in archive.files]
        groups = archive[keys[0]] if keys else np.arange(len(y))
    y = np.unique(y, return_inverse=True)[1]
    frequent = np.bincount(y)[y] >= 6
    X, y, groups = X[frequent], y[frequent], np.unique(groups[frequent], return_inverse=True)[1]
    y, rng = np.unique(y, return_inverse=True)[1], np.random.default_rng(0)
    if len(y) > 900:
        order, taken = rng.permutation(groups.max() + 1).argsort(), []
        for k in np.unique(y):
            rows = np.flatnonzero(y == k)
            rows = rows[order[groups[rows]].argsort(kind="stable")]
            taken.append(rows[: max(12, round(900 * len(rows) / len(y)))])
        rows = np.concatenate(taken)
        X, y, groups = X[rows], y[rows], groups[rows]
    order = rng.permutation(len(y))
    return X[order], y[order], groups[order]


def run(folder: Path, name: str, fold: int, inner: bool, method: str) -> dict[str, Any]:
    """Train and score one method on one fold."""
    X, y, groups = load(folder, name)
    folds = StratifiedGroupKFold(3, shuffle=True, random_state=0)
    train, test = list(folds.split(X, y, groups))[fold]
    if len(train) > 600:
        train = np.random.default_rng(0).permutation(train)[:600]
    if inner:
        folds = StratifiedGroupKFold(4, shuffle=True, random_state=1)
        a, b = next(folds.split(train, y[train], groups[train]))
        train, test = train[a], train[b]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        model = (METHODS | LEVERS)[method]().fit(X[train], y[train])
        seconds = time.perf_counter() - start
        score = balanced_accuracy_score(y[test], model.predict(X[test]))
    which = "inner" if inner else "test"
    values = (name, fold, which, method, round(score, 4), round(seconds, 1), len(train))
    return dict(zip(COLUMNS, values, strict=True))


def read(out: Path) -> list[dict[str, str]]:
    """Rows of a table; none where there is no table."""
    if not out.exists():
        return []
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def report(rows: list[dict[str, str]]) -> None:
    """Print means over folds, and over sets with the standard error of the folds' means."""
    names = [name for name in SETS if any(row["set"] == name for row in rows)]
    print("| method |", " | ".join(names), "| mean | s |")
    print("|--" * (len(names) + 3) + "|")
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        scores = {(r["set"], r["fold"]): float(r["balanced_accuracy"]) for r in own}
        cells = [np.mean([v for (s, _), v in scores.items() if s == name]) for name in names]
        folds = sorted({fold for _, fold in scores})
        of_folds = [np.mean([v for (_, f), v in scores.items() if f == fold]) for fold in folds]
        spread = np.std(of_folds, ddof=1) / len(folds) ** 0.5 if len(folds) > 1 else np.nan
        seconds = np.mean([float(row["fit_seconds"]) for row in own])
        line = " | ".join(f"{cell:.3f}" for cell in cells)
        print(f"| {method} | {line} | {np.mean(cells):.3f} ± {spread:.3f} | {seconds:.0f} |")


def main() -> None:
    """Run what is missing, row by row, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of .npz files")
    parser.add_argument("--out", type=Path, default=Path("pretrained.csv"), help="table")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *LEVERS], default=None)
    parser.add_argument("--levers", action="store_true", help="the levers in place of the methods")
    parser.add_argument("--inner", action="store_true", help="leave the test rows alone")
    parser.add_argument("--folds", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    args = parser.parse_args()
    rows, which = read(args.out), "inner" if args.inner else "test"
    done = {(r["set"], int(r["fold"]), r["rows"], r["method"]) for r in rows}
    todo = [
        (args.folder, name, fold, args.inner, method)
        for fold in range(args.folds)
        for method in args.methods or (LEVERS if args.levers else METHODS)
        for name in args.sets
        if (name, fold, which, method) not in done
    ]
    is_new = not args.out.exists()
    with args.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        pool = Parallel(args.jobs, return_as="generator_unordered")
        for row in pool(delayed(run)(*job) for job in todo):
            writer.writerow(row)
            file.flush()
    report([row for row in read(args.out) if row["rows"] == which])


if __name__ == "__main__":
    main()
