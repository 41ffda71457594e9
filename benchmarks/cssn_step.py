"""CSSN's training step against the published one, and how predict grows with the queries.

The published step augments and encodes every member of every pair afresh: 2 n^2 encodings. Ours
encodes two views of each image, 2 n, and scores the same n^2 pairs.
"""

from __future__ import annotations

import time

import numpy as np
from skorch.callbacks import Callback

from sklearn_medimb import CSSNClassifier
from sklearn_medimb.backbones import ConvNet


class StepTimes(Callback):
    """Seconds from the end of one step to the end of the next."""

    def on_train_begin(self, net: object, **kwargs: object) -> None:
        self.seconds_: list[float] = []

    def on_epoch_begin(self, net: object, **kwargs: object) -> None:
        self.last_ = time.perf_counter()

    def on_batch_end(self, net: object, **kwargs: object) -> None:
        now = time.perf_counter()
        self.seconds_.append(now - self.last_)
        self.last_ = now


def step_seconds(pair_view: str, X: np.ndarray, y: np.ndarray) -> float:
    """Median time of a step with n = 8."""
    clf = CSSNClassifier(
        ConvNet(), pair_view=pair_view, batch_size=8, max_epochs=2, callbacks=[StepTimes()],
        random_state=0,
    ).fit(X, y)  # fmt: skip
    times = next(cb for _, cb in clf.net_.callbacks_ if isinstance(cb, StepTimes))
    return float(np.median(times.seconds_[2:]))


def main() -> None:
    rng = np.random.default_rng(0)
    X, y = rng.integers(0, 256, (160, 3, 48, 48), dtype=np.uint8), np.arange(160) % 2
    ours, published = step_seconds("image", X, y), step_seconds("pair", X, y)
    print(f"step, n = 8: ours {1e3 * ours:.1f} ms, published {1e3 * published:.1f} ms")
    print(f"published / ours {published / ours:.1f}  (target >= 5)")

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
