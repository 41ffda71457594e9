"""bfloat16 against float32: balanced accuracy and time, on real images.

``precision="auto"`` takes bfloat16 where the hardware multiplies it natively; this shows that
balanced accuracy does not suffer. Without an argument it trains on scikit-learn's digits, with the
path of a MedMNIST-style file on draws of 300 of its training images at 1 : 9, validated on others.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import train_test_split

from sklearn_medimb import CSSNClassifier, SoftmaxClassifier
from sklearn_medimb.datasets import load_npz, make_long_tailed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("npz", nargs="?")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    if args.npz:
        data = load_npz(args.npz, split="train")
        X, y, ratio, augment = data.images, data.target, 9, "medical"
    else:
        X, y = load_digits(return_X_y=True)
        X, ratio, augment = np.kron(X.reshape(-1, 8, 8), np.ones((3, 3))), 15, "none"
        X = (X * 15.9).astype(np.uint8)
    for Classifier in (SoftmaxClassifier, CSSNClassifier):
        found: dict[str, list[tuple[float, float]]] = {"float32": [], "bf16": []}
        for seed in args.seeds:
            X_train, X_valid, y_train, y_valid = train_test_split(
                X, y, test_size=0.3, stratify=y, random_state=seed
            )
            X_train, y_train = make_long_tailed(
                X_train, y_train, ratio, random_state=seed, n_samples=300
            )
            for precision, results in found.items():
                start = time.perf_counter()
                clf = Classifier(precision=precision, augment=augment, random_state=seed)
                clf.fit(X_train, y_train)
                duration = time.perf_counter() - start
                score = balanced_accuracy_score(y_valid, clf.predict(X_valid))
                results.append((score, duration))
        means = {k: np.mean(v, axis=0) for k, v in found.items()}
        difference = np.array(found["bf16"])[:, 0] - np.array(found["float32"])[:, 0]
        print(
            f"{Classifier.__name__}: balanced accuracy float32 {means['float32'][0]:.3f}, "
            f"bf16 {means['bf16'][0]:.3f} (per seed {np.round(difference, 3).tolist()}), "
            f"time bf16 / float32 {means['bf16'][1] / means['float32'][1]:.2f}"
        )


if __name__ == "__main__":
    main()
