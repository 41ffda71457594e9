"""CSSN's training step against the published one, and how predict grows with the queries.

The published step augments and encodes every member of every pair afresh: 2 n^2 encodings. Ours
encodes two views of each image, 2 n, and scores the same n^2 pairs.
"""

from __future__ import annotations

import time

import numpy as np
from busy import N_EPOCHS, Course, watched

from sklearn_medimb import CSSNClassifier
from sklearn_medimb.backbones import ConvNet


def course(pair_view: str, X: np.ndarray, y: np.ndarray) -> Course:
    """Steps with n = 8, by the clock."""
    clf = CSSNClassifier(
        ConvNet(), pair_view=pair_view, batch_size=8, max_epochs=N_EPOCHS, random_state=0
    )
    return watched(clf, X, y)[0]


def main() -> None:
    rng = np.random.default_rng(0)
    X, y = rng.integers(0, 256, (160, 3, 48, 48), dtype=np.uint8), np.arange(160) % 2
    ours, published = course("image", X, y), course("pair", X, y)
    print(f"n = 8: ours      {ours.told()}")
    print(f"       published {published.told()}")
    print(f"published / ours {published.step / ours.step:.1f}  (target >= 5)")

    clf = CSSNClassifier(ConvNet(), max_epochs=1, random_state=0).fit(X, y)
    many = rng.integers(0, 256, (4_000, 3, 48, 48), dtype=np.uint8)
    clf.predict(many[:200])
    per_query = {}
    for n in (500, 1_000, 2_000, 4_000):
        start = time.perf_counter()
        clf.predict(many[:n])
        per_query[n] = 1e3 * (time.perf_counter() - start) / n
    print("predict, ms per query:", {n: round(ms, 3) for n, ms in per_query.items()})


if __name__ == "__main__":
    main()
