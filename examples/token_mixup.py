"""SPMix inside the network: rare lesions keep their patches, skin is borrowed.

Trains on synthetic lesions (or on the images of a ``.npz`` file) with class-balanced batches, with
SPMix on top, and with TailBoost's contrast, and shows what the layers mixed::

    python examples/token_mixup.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold

from sklearn_medimb import SPMixClassifier, SPMixSampler
from sklearn_medimb.datasets import load_npz, make_lesions
from sklearn_medimb.inspection import SPMixDisplay
from sklearn_medimb.metrics import shot_recall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("npz", nargs="?", help="MedMNIST-style archive; default: lesions")
    parser.add_argument("--figure", type=Path, default=Path("token_mixup.png"))
    args = parser.parse_args()

    if args.npz:
        data = load_npz(args.npz)
        groups = np.arange(len(data.target)) if data.groups is None else data.groups
        halves = StratifiedGroupKFold(2, shuffle=True, random_state=0)
        train, test = next(halves.split(data.images, data.target, groups))
        X, y, X_test, y_test = (
            data.images[train], data.target[train], data.images[test], data.target[test]
        )  # fmt: skip
    else:
        made = make_lesions((200, 60, 20, 8), image_size=24, difficulty=0.2, random_state=0)
        held = make_lesions(400, image_size=24, difficulty=0.2, random_state=1)
        seen = np.isin(held.target, np.unique(made.target))
        X, y, X_test, y_test = made.images, made.target, held.images[seen], held.target[seen]

    common = {"max_epochs": 15, "random_state": 0, "verbose": 1}
    rows = {
        "balanced batches": SPMixClassifier(mix_prob=0.0, **common),
        "SPMix": SPMixClassifier(**common),
        "SPMix + GPaCo": SPMixClassifier(contrast="gpaco", **common),
    }
    print(f"{'':20} balanced acc.   tail recall")
    for name, classifier in rows.items():
        predicted = classifier.fit(X, y).predict(X_test)
        few = shot_recall(y_test, predicted, y).few
        print(f"{name:20} {balanced_accuracy_score(y_test, predicted):13.3f} {few:13.3f}")

    mpl.use("Agg")
    sampler = SPMixSampler(mix_prob=1.0, random_state=0)  # the image form of the same shares
    display = SPMixDisplay.from_sampler(sampler, X, y)
    display.figure_.savefig(args.figure, dpi=150)
    print(f"\nfigure: {args.figure}")


if __name__ == "__main__":
    main()
