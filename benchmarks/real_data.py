"""CSSN against the same network with classical remedies, on real medical images.

Stratified folds, one backbone, augmentation, optimiser and number of steps for all; every seed is
reported. "CE, CSSN's time" is plain cross-entropy trained for as long as CSSN took. Nothing here
is selected on the test images: defaults were chosen on validation splits of the training parts.

    python benchmarks/real_data.py FOLDER [--sets ph2 brain pneumonia herlev] [--seeds 0 1 2]

FOLDER holds ``ph2_dermoscopy.npz``, ``brain_tumor_mri.npz``, ``pneumoniamnist.npz`` and
``herlev_papsmear.npz`` in MedMNIST style.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from imblearn.over_sampling import RandomOverSampler
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from sklearn_medimb import CSSNClassifier, SoftmaxClassifier
from sklearn_medimb.datasets import load_npz, make_long_tailed

Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def folds(X: np.ndarray, y: np.ndarray, seed: int, groups: Any = None) -> Iterator[Split]:
    """Quarters as test folds; groups stay whole."""
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    for train, test in kind(4, shuffle=True, random_state=seed).split(X, y, groups):
        yield X[train], y[train], X[test], y[test]


def ph2(folder: Path, seed: int) -> Iterator[Split]:
    """Melanoma against the rest, 40 : 160."""
    data = load_npz(folder / "ph2_dermoscopy.npz", image_size=48)
    yield from folds(data.images, (data.target == 2).astype(int), seed)


def brain(folder: Path, seed: int) -> Iterator[Split]:
    """Tumour or not; training parts cut to 1 : 9, identical files on one side."""
    with np.load(folder / "brain_tumor_mri.npz", allow_pickle=False) as archive:
        twins = archive["dup_groups"]
    data = load_npz(folder / "brain_tumor_mri.npz", image_size=48)
    for X, y, X_test, y_test in folds(data.images, data.target, seed, twins):
        X_cut, y_cut = make_long_tailed(X, y, imbalance_ratio=9, random_state=seed)
        yield X_cut, y_cut, X_test, y_test


def pneumonia(folder: Path, seed: int) -> Iterator[Split]:
    """Four draws of 300 training images at 1 : 9, tested on the official test images."""
    train = load_npz(folder / "pneumoniamnist.npz", split="train")
    test = load_npz(folder / "pneumoniamnist.npz", split="test")
    for fold in range(4):
        X, y = make_long_tailed(
            train.images, train.target, 9, random_state=100 * seed + fold, n_samples=300
        )
        yield X, y, test.images, test.target


def herlev(folder: Path, seed: int) -> Iterator[Split]:
    """Seven classes of cells; an acquisition stays on one side."""
    data = load_npz(folder / "herlev_papsmear.npz", image_size=32)
    yield from folds(data.images, data.target, seed, data.groups)


SETS: dict[str, Callable[[Path, int], Iterator[Split]]] = {
    "ph2": ph2,
    "brain": brain,
    "pneumonia": pneumonia,
    "herlev": herlev,
}
METHODS: dict[str, Callable[[int], Any]] = {
    "CE": lambda seed: SoftmaxClassifier(random_state=seed),
    "class weights": lambda seed: SoftmaxClassifier(class_weight="balanced", random_state=seed),
    "oversampling": lambda seed: SoftmaxClassifier(sampler=RandomOverSampler(), random_state=seed),
    "logit adjustment": lambda seed: SoftmaxClassifier(loss="logit_adjusted", random_state=seed),
    "CSSN": lambda seed: CSSNClassifier(random_state=seed),
}


def test(classifier: Any, split: Split) -> tuple[float, float]:
    """Balanced accuracy on the test images, and seconds of fit."""
    X, y, X_test, y_test = split
    start = time.perf_counter()
    classifier.fit(X, y)
    duration = time.perf_counter() - start
    return balanced_accuracy_score(y_test, classifier.predict(X_test)), duration


def test_all(split: Split, seed: int) -> Iterator[tuple[str, float, float]]:
    """All methods on one split, CE once more with CSSN's time."""
    times = {}
    for label, make in METHODS.items():
        classifier = make(seed)
        score, times[label] = test(classifier, split)
        if label == "CE":
            n_epochs = classifier.n_iter_
        yield label, score, times[label]
    longer = round(max(times["CSSN"] / times["CE"], 1.0) * n_epochs)
    yield "CE, CSSN's time", *test(SoftmaxClassifier(max_epochs=longer, random_state=seed), split)


def run(name: str, folder: Path, seeds: list[int], n_folds: int, log: Path | None) -> None:
    """Train and test all methods on one set; print mean and spread over seeds."""
    scores, times = defaultdict(lambda: defaultdict(list)), defaultdict(list)
    for seed in seeds:
        for fold, split in enumerate(islice(SETS[name](folder, seed), n_folds)):
            for label, score, duration in test_all(split, seed):
                scores[label][seed].append(score)
                times[label].append(duration)
                line = json.dumps([name, seed, fold, label, round(score, 4), round(duration, 1)])
                print(line, flush=True)
                if log is not None:
                    with log.open("a") as file:
                        file.write(line + "\n")
    print(f"\n{name}: balanced accuracy, mean over folds; mean and spread over {len(seeds)} seeds")
    for label, by_seed in scores.items():
        means = [np.mean(values) for values in by_seed.values()]
        shown = " ".join(f"{value:.3f}" for value in means)
        print(
            f"{label:18} {np.mean(means):.3f} +- {np.std(means):.3f}   per seed {shown}   "
            f"fit {np.mean(times[label]):.1f} s"
        )
    print(f"CSSN's time over CE's: {np.sum(times['CSSN']) / np.sum(times['CE']):.2f}\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folds", type=int, default=4, help="of four, per seed")
    parser.add_argument("--log", type=Path, help="append one JSON line per fit")
    args = parser.parse_args()
    for name in args.sets:
        run(name, args.folder, args.seeds, args.folds, args.log)


if __name__ == "__main__":
    main()
