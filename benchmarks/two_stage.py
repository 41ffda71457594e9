"""Two-stage methods on real medical images: what each stage brings.

One backbone, augmentation, optimiser and number of epochs in all for every row; every seed is
reported. A stage one is trained once and gets its heads by ``refit_head``, so that rows which share
it differ in stage two alone. Nothing is selected on the test images: defaults were chosen on
validation splits of training parts.

    python benchmarks/two_stage.py FOLDER [--sets retina cells pneumonia] [--seeds 0 1 2]

FOLDER holds ``dr_maculopathy.npz``, ``herlev_papsmear.npz`` and ``pneumoniamnist.npz``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from imblearn.over_sampling import RandomOverSampler
from joblib import Parallel, delayed
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold

from sklearn_medimb import LMDClassifier, MetricTwoStageClassifier, SoftmaxClassifier
from sklearn_medimb.datasets import load_npz

Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def fold(X: np.ndarray, y: np.ndarray, groups: np.ndarray, seed: int) -> Split:
    """A quarter as test fold, drawn by the seed; groups stay whole."""
    folds = StratifiedGroupKFold(4, shuffle=True, random_state=seed)
    train, test = next(folds.split(X, y, groups))
    return X[train], y[train], X[test], y[test]


def retina(folder: Path, seed: int) -> Split:
    """Six grades of diabetic retinopathy, 276 : 7; a patient stays on one side."""
    with np.load(folder / "dr_maculopathy.npz", allow_pickle=False) as archive:
        grade = archive["grade"].astype(int)
    data = load_npz(folder / "dr_maculopathy.npz", image_size=32)
    return fold(data.images, grade, data.groups, seed)


def cells(folder: Path, seed: int) -> Split:
    """Seven classes of cells; an acquisition stays on one side."""
    data = load_npz(folder / "herlev_papsmear.npz", image_size=32)
    return fold(data.images, data.target, data.groups, seed)


def pneumonia(folder: Path, seed: int) -> Split:  # noqa: ARG001
    """The long-tailed training part, 388 : 3,494, and the official test images, for every seed."""
    path = folder / "pneumoniamnist.npz"
    with np.load(path, allow_pickle=False) as archive:
        rows = archive["lt_train_index"]
    train, test = load_npz(path, split="train"), load_npz(path, split="test")
    return train.images[rows], train.target[rows], test.images, test.target


SETS: dict[str, Callable[[Path, int], Split]] = {
    "retina": retina,
    "cells": cells,
    "pneumonia": pneumonia,
}
HEADS = ("none", "crt", "lws", "tau_norm", "ncm", "balanced_softmax", "logit_adjust", "virtual")


def plain_epochs(y: np.ndarray) -> int:
    """Default number of epochs of the plain network on these labels."""
    n_steps = 180 + 60 * len(np.unique(y))
    return max(10, -(-n_steps // -(-len(y) // 64)))


def fits(y: np.ndarray, seed: int) -> dict[str, tuple[Any, tuple[str, ...]]]:
    """Stages one, and the heads that each of them gets."""
    n, n_rounds = plain_epochs(y), LMDClassifier().n_rounds
    counts = np.bincount(y)
    balanced = max(1, round(n * len(y) / (len(counts) * counts.max())))  # the same number of steps
    common = {"random_state": seed}
    return {
        "oversampling": (
            SoftmaxClassifier(sampler=RandomOverSampler(), max_epochs=balanced, **common),
            (),
        ),
        "logit adjustment": (SoftmaxClassifier(loss="logit_adjusted", max_epochs=n, **common), ()),
        "CE": (MetricTwoStageClassifier(metric_weight=0, max_epochs=n, **common), HEADS),
        "metric": (MetricTwoStageClassifier(max_epochs=n, **common), HEADS),
        "RRL": (LMDClassifier(stages="rrl", max_epochs=n, **common), HEADS),
        "LMD": (LMDClassifier(max_epochs=n - n_rounds + 1, **common), ()),
    }


def run(name: str, folder: Path, seed: int, label: str) -> list[list[Any]]:
    """Train one stage one and test it with all its heads."""
    X, y, X_test, y_test = SETS[name](folder, seed)
    classifier, heads = fits(y, seed)[label]
    start = time.perf_counter()
    classifier.fit(X, y)
    duration = time.perf_counter() - start
    rows = []
    for head in heads or (None,):
        if head is not None:
            classifier.refit_head(X, y, rebalance=head)
        score = balanced_accuracy_score(y_test, classifier.predict(X_test))
        method = label if head is None else f"{label} + {head}"
        rows.append([name, seed, method, round(float(score), 4), round(duration, 1)])
    return rows


def show(rows: list[list[Any]]) -> Iterator[str]:
    """One line per method, one column per set: mean and spread over seeds."""
    table: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, _, method, score, _ in rows:
        table[method][name].append(score)
    names = list(dict.fromkeys(row[0] for row in rows))
    yield "| method | " + " | ".join(names) + " | mean |"
    yield "|--" * (len(names) + 2) + "|"
    for method, scores in table.items():
        cells = [f"{np.mean(scores[n]):.3f} ± {np.std(scores[n]):.3f}" for n in names]
        mean = np.mean([np.mean(scores[n]) for n in names])
        yield f"| {method} | " + " | ".join(cells) + f" | {mean:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="local processes")
    parser.add_argument("--log", type=Path, help="append one JSON line per row; done ones are kept")
    args = parser.parse_args()
    rows: list[list[Any]] = []
    if args.log is not None and args.log.exists():
        rows = [json.loads(line) for line in args.log.read_text().splitlines()]
    done = {(name, seed, method.partition(" + ")[0]) for name, seed, method, *_ in rows}
    labels = list(fits(np.array([0, 1]), 0))
    todo = [
        (name, args.folder, seed, label)
        for seed in args.seeds
        for name in args.sets
        for label in labels
        if (name, seed, label) not in done
    ]
    for part in Parallel(args.jobs, return_as="generator")(delayed(run)(*job) for job in todo):
        for row in part:
            print(json.dumps(row), flush=True)
            if args.log is not None:
                with args.log.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        rows += part
    print("\nbalanced accuracy, mean and spread over seeds", *show(rows), sep="\n")


if __name__ == "__main__":
    main()
