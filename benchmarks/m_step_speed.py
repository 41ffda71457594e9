"""The M-step of LMD's calibration against the published way: NumPy draws through a DataLoader.

    python benchmarks/m_step_speed.py [--repeats 3]

8 classes, 512 features, 5,000 virtual features per class and round. Medians of the repeats; all
sides run in turn, in one process, and start from the same statistics. Balanced accuracy is that of
the heads on fresh draws of the true Gaussians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score
from torch.utils.data import DataLoader, TensorDataset

from sklearn_medimb import VirtualFeatureCalibration

N_CLASSES, D, N_DRAWS = 8, 512, 5000


def published(X: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Own covariance of each class, 5,000 draws, one epoch of SGD in batches of 352."""
    rng = np.random.default_rng(0)
    draws, labels = [], []
    for k in range(N_CLASSES):
        rows = X[y == k]
        covariance = np.cov(rows.T) + 1e-2 * np.eye(D)
        draws.append(rng.multivariate_normal(rows.mean(axis=0), covariance, size=N_DRAWS))
        labels.append(np.full(N_DRAWS, k))
    virtual = TensorDataset(
        torch.from_numpy(np.concatenate(draws)).float(), torch.from_numpy(np.concatenate(labels))
    )
    head = torch.nn.Linear(D, N_CLASSES)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    for batch, targets in DataLoader(virtual, batch_size=352, shuffle=True):
        optimizer.zero_grad()
        F.cross_entropy(head(batch), targets).backward()
        optimizer.step()

    def predict(rows: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return head(torch.from_numpy(rows).float()).argmax(dim=1).numpy()

    return predict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    counts = np.array([1000, 500, 300, 200, 100, 60, 40, 20])
    mixing = rng.normal(size=(D, D)) / np.sqrt(D)
    means = 0.13 * rng.normal(size=(N_CLASSES, D))

    def draw(y: np.ndarray) -> np.ndarray:
        return means[y] + rng.normal(size=(len(y), D)) @ mixing

    y = np.repeat(np.arange(N_CLASSES), counts)
    X, y_test = draw(y), np.repeat(np.arange(N_CLASSES), 500)
    X_test = draw(y_test)

    def ours(m_step: str, covariance: str) -> Callable[[], Callable[[np.ndarray], np.ndarray]]:
        head = VirtualFeatureCalibration(
            m_step, n_per_class=N_DRAWS, covariance=covariance, random_state=0
        )
        return lambda: head.fit(X, y).predict

    sides: dict[str, Callable[[], Callable[[np.ndarray], np.ndarray]]] = {
        "published": lambda: published(X, y),
        "sampled, full": ours("sampled", "full"),
        "sampled, shrunk": ours("sampled", "shrunk"),
        "analytic, full": ours("analytic", "full"),
        "analytic, shrunk": ours("analytic", "shrunk"),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    scores: dict[str, float] = {}
    for repeat in range(args.repeats + 1):  # the first is not counted: fresh memory is slow
        for name, fit in sides.items():
            start = time.perf_counter()
            predict = fit()
            if repeat:
                times[name].append(time.perf_counter() - start)
            scores[name] = balanced_accuracy_score(y_test, predict(X_test))
    base = np.median(times["published"])
    for name, seconds in times.items():
        print(
            f"M-step {name:17} {np.median(seconds):.3f} s, published / this "
            f"{base / np.median(seconds):5.1f}, balanced accuracy {scores[name]:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
