"""Label-free pre-training on real medical images: what it brings, and which settings.

    python benchmarks/pretraining.py FOLDER --study labels [--seeds 0 1 2] [--jobs 2]

- ``labels``: a linear head (cRT) on frozen AMIMV features with 5 %, 10 % and all labels, against a
  random encoder, SimCLR with the same steps, and networks trained on the labelled images alone.
- ``cssn``: CSSN from a pre-trained backbone against CSSN from scratch trained as long in all.
- ``defaults``: pairing, thresholds and momentum, scored on validation rows of the training part;
  test images are not touched.

Training parts have at most 600 images of 28 or 32 pixels; a quarter is the test fold, drawn by the
seed with patients whole, or the official test part. Each result is appended to ``--out`` as one
line of JSON; a run that was killed goes on where it was. The summary is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold, train_test_split

from sklearn_medimb import (
    AMIMVClassifier,
    AMIMVEncoder,
    CSSNClassifier,
    MetricTwoStageClassifier,
    SSLEncoder,
)
from sklearn_medimb.datasets import load_npz

SETS = {
    "labels": ("bccd_cells", "pneumoniamnist", "herlev_papsmear"),
    "defaults": ("pneumoniamnist", "herlev_papsmear"),
    "cssn": ("ph2_dermoscopy", "brain_tumor_mri", "herlev_papsmear"),
}
N_TRAIN, N_TEST, FRACTIONS = 600, 1000, (0.05, 0.1, 1.0)
Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def load(folder: Path, name: str, seed: int) -> Split:
    """Training and test images, at most 600 and 1,000."""
    rng = np.random.default_rng(seed)
    path = folder / f"{name}.npz"
    if name in ("bccd_cells", "pneumoniamnist"):
        train, test = load_npz(path, split="train"), load_npz(path, split="test")
        X, y, X_test, y_test = train.images, train.target, test.images, test.target
    else:
        data = load_npz(path, image_size=32)
        y = (data.target == 2).astype(int) if name == "ph2_dermoscopy" else data.target
        groups = np.arange(len(y)) if data.groups is None else data.groups
        folds = StratifiedGroupKFold(4, shuffle=True, random_state=seed)
        a, b = next(folds.split(data.images, y, groups))
        X, y, X_test, y_test = data.images[a], y[a], data.images[b], y[b]
    if len(y) > N_TRAIN:
        rows, _ = train_test_split(np.arange(len(y)), train_size=N_TRAIN, stratify=y,
                                   random_state=seed)  # fmt: skip
        X, y = X[rows], y[rows]
    some = rng.permutation(len(y_test))[:N_TEST]
    return X, y, X_test[some], y_test[some]


def labelled(y: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """`y` with -1 for all but a share of each class, two images of each at least."""
    rng = np.random.default_rng(seed)
    kept = np.full(len(y), -1)
    for label in np.unique(y):
        own = rng.permutation(np.flatnonzero(y == label))
        kept[own[: max(2, round(fraction * len(own)))]] = label
    return kept


def score(classifier: Any, X: np.ndarray, y: np.ndarray) -> float:
    return float(balanced_accuracy_score(y, classifier.predict(X)))


def head(encoder: Any, X: np.ndarray, y: np.ndarray, seed: int) -> AMIMVClassifier:
    """Balanced linear head on the features of a fitted encoder, or of a random network."""
    return AMIMVClassifier(pretrain=encoder, random_state=seed).fit(X, y)


def study_labels(split: Split, seed: int, n_epochs: int) -> dict[str, Any]:
    X, y, X_test, y_test = split
    common = {"max_epochs": n_epochs, "random_state": seed}
    encoders = {
        "random": None,
        "AMIMV": AMIMVEncoder(**common).fit(X),
        "SimCLR": SSLEncoder("simclr", **common).fit(X),
    }
    rows = {}
    for fraction in FRACTIONS:
        some = labelled(y, fraction, seed)
        known = some >= 0
        for name, encoder in encoders.items():
            rows[f"{name} {fraction:g}"] = score(head(encoder, X, some, seed), X_test, y_test)
        tuned = AMIMVClassifier(pretrain=encoders["AMIMV"], fine_tune="full", random_state=seed)
        scratch = {
            "CE + cRT": MetricTwoStageClassifier(
                metric_weight=0, rebalance="crt", random_state=seed
            ),
            "AMIMV fine-tuned": tuned,
        }
        for name, classifier in scratch.items():
            fitted = classifier.fit(X[known], y[known])
            rows[f"{name} {fraction:g}"] = score(fitted, X_test, y_test)
    return rows


def study_defaults(split: Split, seed: int, n_epochs: int) -> dict[str, Any]:
    X, y, _, _ = split
    a, b = train_test_split(np.arange(len(y)), test_size=0.3, stratify=y, random_state=seed)
    common = {"max_epochs": n_epochs, "random_state": seed}
    slow = {"momentum": 0.99, **common}
    variants = {
        **{f"{p}, m .99": AMIMVEncoder(pairing=p, **slow)
           for p in ("asym_aug", "mimv", "source_target", "weak_strong")},
        "asym_aug, m .9": AMIMVEncoder(momentum=0.9, **common),
        "asym_aug, m .99, no thresholds": AMIMVEncoder(thresholds=None, **slow),
        "SimCLR": SSLEncoder("simclr", **common),
    }  # fmt: skip
    rows = {}
    for name, encoder in variants.items():
        encoder.fit(X[a])
        for fraction in (0.1, 1.0):
            some = labelled(y[a], fraction, seed)
            rows[f"{name} {fraction:g}"] = score(head(encoder, X[a], some, seed), X[b], y[b])
    return rows


def study_cssn(split: Split, seed: int, n_epochs: int) -> dict[str, Any]:
    X, y, X_test, y_test = split

    def timed(classifier: Any) -> tuple[float, float, Any]:
        start = time.perf_counter()
        classifier.fit(X, y)
        took = time.perf_counter() - start
        return score(classifier, X_test, y_test), took, classifier

    rows: dict[str, Any] = {}
    rows["scratch"], short, fitted = timed(CSSNClassifier(random_state=seed))
    for name, encoder in {
        "AMIMV": AMIMVEncoder(max_epochs=n_epochs),
        "SimCLR": SSLEncoder("simclr", max_epochs=n_epochs),
    }.items():
        classifier = CSSNClassifier(pretrain=encoder, random_state=seed)
        rows[f"from {name}"], took, _ = timed(classifier)
        epochs = round(fitted.n_iter_ * took / short)
        long = CSSNClassifier(max_epochs=epochs, random_state=seed)
        rows[f"scratch, time of {name}"], spent, _ = timed(long)
        rows[f"seconds of {name} / scratch"] = took / spent
    return rows


STUDIES = {"labels": study_labels, "defaults": study_defaults, "cssn": study_cssn}


def run(study: str, folder: Path, name: str, seed: int, n_steps: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    split = load(folder, name, seed)
    n_epochs = round(n_steps / -(-len(split[1]) // 128))
    return {
        "study": study,
        "set": name,
        "seed": seed,
        "n_steps": n_steps,
        "scores": STUDIES[study](split, seed, n_epochs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--study", choices=STUDIES, default="labels")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200, help="of pre-training")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("pretraining.jsonl"))
    args = parser.parse_args()

    lines = args.out.read_text().splitlines() if args.out.exists() else []
    key = ("study", "set", "seed", "n_steps")
    done = {tuple(row[k] for k in key): row for row in map(json.loads, lines)}
    wanted = [
        (args.study, name, seed, args.steps) for seed in args.seeds for name in SETS[args.study]
    ]
    left = [job for job in wanted if job not in done]
    tasks = (
        delayed(run)(study, args.folder, name, seed, steps) for study, name, seed, steps in left
    )
    for row in Parallel(args.jobs, return_as="generator_unordered")(tasks):
        done[tuple(row[k] for k in key)] = row
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row["set"], row["seed"], {k: round(v, 3) for k, v in row["scores"].items()})

    table: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for job in wanted:
        for method, value in done[job]["scores"].items():
            table[method][job[1]].append(value)
    print("\n" + " ".join(f"{name:>18}" for name in ("", *SETS[args.study], "mean")))
    for method, sets in table.items():
        cells = [f"{np.mean(v):.3f} +- {np.std(v):.3f}" for v in sets.values()]
        mean = np.mean([np.mean(v) for v in sets.values()])
        print(f"{method:30}" + " ".join(f"{cell:>18}" for cell in [*cells, f"{mean:.3f}"]))


if __name__ == "__main__":
    main()
