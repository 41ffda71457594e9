"""Rebalance a trained network's classifier: virtual features, and balanced batches.

A network is trained on long-tailed digits (or the images of a ``.npz`` file). Then its last layer
is replaced by a logistic regression on its embeddings: as they are, oversampled, and with
class-conditional Gaussian draws. For those who write their own training loop in torch, the last
lines draw balanced batches::

    python examples/virtual_features.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from imblearn.over_sampling import RandomOverSampler
from imblearn.pipeline import make_pipeline
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, recall_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader, TensorDataset

from sklearn_medimb import BalancedBatchSampler, BalancedVirtualFeatures, SoftmaxClassifier
from sklearn_medimb.datasets import load_npz, make_long_tailed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("npz", nargs="?", help="MedMNIST-style archive; default: digits")
    parser.add_argument("--figure", type=Path, default=Path("virtual_features.png"))
    args = parser.parse_args()

    if args.npz:
        data = load_npz(args.npz)
        X, y = data.images, data.target
    else:
        X, y = load_digits(return_X_y=True)
        X = X.reshape(-1, 8, 8)
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.5, stratify=y, random_state=0)
    if not args.npz:
        X, y = make_long_tailed(X, y, imbalance_ratio=50, random_state=0)

    network = SoftmaxClassifier(max_epochs=20, random_state=0, verbose=1).fit(X, y)
    train, test = network.transform(X), network.transform(X_test)
    scores = {"network": network.predict(X_test)}
    virtual = {"replace": True, "random_state": 0}
    for name, sampler in {
        "plain head": "passthrough",
        "oversampled head": RandomOverSampler(random_state=0),
        "virtual features": BalancedVirtualFeatures(**virtual),
        "own covariance": BalancedVirtualFeatures(covariance="full", **virtual),
    }.items():
        head = LogisticRegression(C=0.01, max_iter=1000)
        pipeline = make_pipeline(StandardScaler(), sampler, head).fit(train, y)
        scores[name] = pipeline.predict(test)

    tail = np.argsort(np.bincount(y))[: max(1, len(np.unique(y)) // 3)]
    print(f"{'':18}{'balanced acc.':>14}{'tail recall':>13}")
    shown = {}
    for name, predicted in scores.items():
        accuracy = balanced_accuracy_score(y_test, predicted)
        recall = recall_score(y_test, predicted, average=None, zero_division=0)[tail].mean()
        shown[name] = accuracy, recall
        print(f"{name:18}{accuracy:14.3f}{recall:13.3f}")

    loader = DataLoader(
        TensorDataset(torch.from_numpy(train), torch.from_numpy(y)),
        batch_sampler=BalancedBatchSampler(y, plan="pk", batch_size=16, random_state=0),
    )
    _, labels = next(iter(loader))
    print(f"a P x K batch: {labels.tolist()}")

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
    places = np.arange(len(shown))
    for shift, (name, column) in zip((-0.2, 0.2), {"all": 0, "tail": 1}.items(), strict=True):
        ax.barh(places + shift, [value[column] for value in shown.values()], 0.38, label=name)
    ax.set_yticks(places, list(shown))
    ax.invert_yaxis()
    ax.set_xlabel("mean recall")
    ax.set_xlim(0, 1)
    ax.legend(title="classes", loc="center left", bbox_to_anchor=(1, 0.5))
    fig.savefig(args.figure, dpi=150)
    print(f"figure: {args.figure}")


if __name__ == "__main__":
    main()
