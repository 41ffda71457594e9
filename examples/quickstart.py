"""Compare CSSN with a plain network and classical imbalance methods, in one command.

Without an argument, on scikit-learn's handwritten digits made long-tailed. With the path of a
MedMNIST-style ``.npz`` file, on its images::

    python examples/quickstart.py
    python examples/quickstart.py ph2_dermoscopy.npz --positive melanoma

It trains five classifiers on the same images, prints their scores on images none of them has seen,
and saves a figure. Everything is chosen beforehand: nothing is tuned on the test images.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from imblearn.ensemble import BalancedRandomForestClassifier
from imblearn.metrics import geometric_mean_score
from imblearn.over_sampling import RandomOverSampler
from sklearn.datasets import load_digits
from sklearn.metrics import balanced_accuracy_score, f1_score, recall_score
from sklearn.model_selection import StratifiedGroupKFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from sklearn_medimb import CSSNClassifier, SoftmaxClassifier
from sklearn_medimb.datasets import load_npz, make_long_tailed

SCORES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "balanced acc.": balanced_accuracy_score,
    "macro-F1": lambda y, p: f1_score(y, p, average="macro"),
    "G-mean": geometric_mean_score,
    "worst recall": lambda y, p: recall_score(y, p, average=None, zero_division=0).min(),
}


def digits() -> tuple[np.ndarray, ...]:
    """Real 8 x 8 images that scikit-learn ships, made long-tailed for training."""
    X, y = load_digits(return_X_y=True)
    X = X.reshape(-1, 8, 8)
    X_train, X_test, y_train, y_test = train_test_split(
        X, y, test_size=0.5, stratify=y, random_state=0
    )
    X_train, y_train = make_long_tailed(X_train, y_train, imbalance_ratio=15, random_state=0)
    return X_train, y_train, X_test, y_test, np.unique(y).astype(str)


def archive(args: argparse.Namespace) -> tuple[np.ndarray, ...]:
    """Images of an .npz file: its own split, or a stratified one that keeps patients whole."""
    data = load_npz(args.npz)
    n_classes = 2 if args.positive else len(data.target_names)
    size = args.image_size or (48 if n_classes <= 3 else 32)
    if min(data.images.shape[1:3]) > size:
        data = load_npz(args.npz, image_size=size)
    X, y, names = data.images, data.target, data.target_names
    if args.positive:
        if args.positive not in names:
            raise SystemExit(f"--positive must be one of {', '.join(names)}")
        y = (names[y] == args.positive).astype(int)
        names = np.array([f"not {args.positive}", args.positive])
    if data.split is not None:
        train, test = np.flatnonzero(data.split == "train"), np.flatnonzero(data.split == "test")
    elif data.groups is not None:
        folds = StratifiedGroupKFold(4, shuffle=True, random_state=0)
        train, test = next(folds.split(X, y, data.groups))
    else:
        train, test = train_test_split(
            np.arange(len(y)), test_size=0.25, stratify=y, random_state=0
        )
    share = min(args.max_images / len(train), 1.0)  # the same of each class, at least four images
    rng = np.random.default_rng(0)
    train = np.concatenate(
        [rng.permutation(rows)[: max(round(share * len(rows)), 4)] for rows in by_class(train, y)]
    )
    return X[train], y[train], X[test], y[test], names


def by_class(rows: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """Rows of each class."""
    return [rows[y[rows] == label] for label in np.unique(y[rows])]


def methods(augment: str, volumes: bool, verbose: int) -> dict[str, Any]:
    """Five classifiers with the same backbone, augmentation and optimiser where they have one."""
    common: dict[str, Any] = {"augment": augment, "random_state": 0, "verbose": verbose}
    common["spatial_dims"] = 3 if volumes else None
    flat = FunctionTransformer(lambda X: X.reshape(len(X), -1))
    forest = BalancedRandomForestClassifier(
        300, sampling_strategy="all", replacement=True, bootstrap=False, random_state=0
    )
    return {
        "CSSN": CSSNClassifier(**common),
        "network": SoftmaxClassifier(**common),
        "network, class weights": SoftmaxClassifier(class_weight="balanced", **common),
        "network, oversampling": SoftmaxClassifier(sampler=RandomOverSampler(), **common),
        "balanced random forest": make_pipeline(flat, forest),
    }


def draw(rows: dict[str, Any], recalls: dict[str, np.ndarray], names: Any, path: Path) -> None:
    """Draw balanced accuracy by method, and recall by class and method."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    labels = list(rows)
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4), layout="constrained", width_ratios=[1, 1.3]
    )
    values = [rows[label]["balanced acc."] for label in labels]
    colours = ["tab:blue"] + ["tab:gray"] * (len(labels) - 1)
    bars = left.barh(labels, values, color=colours)
    left.bar_label(bars, fmt="%.3f", padding=3)
    left.set(xlim=(0, 1.25), xlabel="balanced accuracy on unseen images")
    left.invert_yaxis()
    image = right.imshow(np.array([recalls[k] for k in labels]), vmin=0, vmax=1, aspect="auto")
    right.set(yticks=range(len(labels)), yticklabels=labels, xticks=range(len(names)))
    right.set_xticklabels(names, rotation=30, ha="right")
    right.set_xlabel("class (training images)")
    for row, label in enumerate(labels):
        for column, value in enumerate(recalls[label]):
            right.text(
                column, row, f"{value:.2f}", ha="center", va="center",
                color="white" if value < 0.6 else "black", fontsize=8,
            )  # fmt: skip
    fig.colorbar(image, label="recall")
    fig.savefig(path, dpi=120)


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "npz", nargs="?", help="MedMNIST-style file; default: scikit-learn's digits"
    )
    parser.add_argument("--positive", help="class to tell from all others, by name")
    parser.add_argument(
        "--image-size", type=int, help="pixels a side; default 48, or 32 from 4 classes"
    )
    parser.add_argument("--max-images", type=int, default=600, help="training images at most")
    parser.add_argument("--figure", type=Path, default=Path("quickstart.png"))
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args()

    X_train, y_train, X_test, y_test, names = archive(args) if args.npz else digits()
    counts = np.bincount(y_train, minlength=len(names))
    print(
        f"training on {len(y_train)} images of shape {X_train.shape[1:]}, testing on {len(y_test)}"
    )
    print("training images per class:", dict(zip(names.tolist(), counts.tolist(), strict=True)))

    # A mirrored digit is no digit: only medical images are flipped.
    augment = "medical" if args.npz else "none"
    rows: dict[str, dict[str, float]] = {}
    recalls = {}
    volumes = X_train.ndim == 4 and X_train.shape[-1] not in (1, 3, 4)
    for label, classifier in methods(augment, volumes, verbose=0 if args.quiet else 1).items():
        start = time.perf_counter()
        classifier.fit(X_train, y_train)
        fitted = time.perf_counter()
        predicted = classifier.predict(X_test)
        done = time.perf_counter()
        rows[label] = {score: f(y_test, predicted) for score, f in SCORES.items()}
        rows[label] |= {"fit s": fitted - start, "predict s": done - fitted}
        recalls[label] = recall_score(
            y_test, predicted, average=None, labels=np.arange(len(names)), zero_division=0
        )

    columns = list(next(iter(rows.values())))
    print("\n" + " " * 24 + "".join(f"{column:>15}" for column in columns))
    for label, row in rows.items():
        cells = "".join(
            f"{row[c]:15.2f}" if c.endswith(" s") else f"{row[c]:15.3f}" for c in columns
        )
        print(f"{label:24}{cells}")
    ticks = [f"{name}\n({count})" for name, count in zip(names, counts, strict=True)]
    draw(rows, recalls, ticks, args.figure)
    print(f"\nfigure: {args.figure}", file=sys.stderr)


if __name__ == "__main__":
    main()
