"""Train the features once, then choose the head: two-stage classifiers.

A metric loss shapes the features of long-tailed digits (or of the images of a ``.npz`` file) in
stage one; every head of stage two is then tried on them in a moment, without training the network
again. LMD goes on from there: it alternates between head and features::

    python examples/two_stage.py
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib as mpl
import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold

from sklearn_medimb import (
    BalancedSoftmax,
    ClassifierRetraining,
    LearnableWeightScaling,
    LMDClassifier,
    LogitAdjustment,
    MetricTwoStageClassifier,
    NearestClassMean,
    TauNormalization,
    VirtualFeatureCalibration,
)
from sklearn_medimb.datasets import load_npz, make_long_tailed
from sklearn_medimb.metrics import shot_recall

HEADS = {
    "stage one": "none",
    "cRT": ClassifierRetraining(),
    "LWS": LearnableWeightScaling(),
    "tau-norm": TauNormalization(tau=1.0),
    "nearest class mean": NearestClassMean(),
    "balanced softmax": BalancedSoftmax(),
    "logit adjustment": LogitAdjustment(),
    "virtual features": VirtualFeatureCalibration(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("npz", nargs="?", help="MedMNIST-style archive; default: digits")
    parser.add_argument("--figure", type=Path, default=Path("two_stage.png"))
    args = parser.parse_args()

    if args.npz:
        data = load_npz(args.npz)
        X, y = data.images, data.target
    else:
        X, y = load_digits(return_X_y=True)
        X = X.reshape(-1, 8, 8)
    patients = data.groups if args.npz else None
    patients = np.arange(len(y)) if patients is None else patients
    halves = StratifiedGroupKFold(2, shuffle=True, random_state=0)  # no patient in both
    train, test_rows = next(halves.split(X, y, patients))
    X, y, X_test, y_test = X[train], y[train], X[test_rows], y[test_rows]
    if not args.npz:
        X, y = make_long_tailed(X, y, imbalance_ratio=50, random_state=0)

    common = {"max_epochs": 25, "augment": "light", "random_state": 0, "verbose": 1}
    rows = {}

    def test(name: str, classifier: object, seconds: float) -> None:
        predicted = classifier.predict(X_test)
        few = shot_recall(y_test, predicted, y).few
        rows[name] = balanced_accuracy_score(y_test, predicted), few, seconds

    start = time.perf_counter()
    metric = MetricTwoStageClassifier(**common).fit(X, y)
    duration = time.perf_counter() - start
    for name, head in HEADS.items():
        start = time.perf_counter()
        metric.refit_head(X, y, rebalance=head)
        test(f"metric + {name}", metric, time.perf_counter() - start)
    start = time.perf_counter()
    lmd = LMDClassifier(**common).fit(X, y)
    test("LMD", lmd, time.perf_counter() - start)

    print(f"stage one with the triplet loss: {duration:.1f} s\n")
    print(f"{'':30} balanced acc.   tail recall   seconds")
    for name, (score, few, seconds) in rows.items():
        print(f"{name:30} {score:13.3f} {few:13.3f} {seconds:9.2f}")

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    place = np.arange(len(rows))
    for shift, values, label, colour in (
        (-0.2, [row[0] for row in rows.values()], "balanced accuracy", "#0072B2"),
        (0.2, [row[1] for row in rows.values()], "recall of rare classes", "#E69F00"),
    ):
        axes.barh(place + shift, values, 0.38, label=label, color=colour)
    axes.set(yticks=place, yticklabels=list(rows), xlim=(0, 1), xlabel="on held-out images")
    axes.invert_yaxis()
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    figure.savefig(args.figure, dpi=150)
    print(f"\nfigure: {args.figure}")


if __name__ == "__main__":
    main()
