"""Saliency against OpenCV's per-image calls, virtual features against NumPy's Gaussian.

    python benchmarks/sampler_speed.py [--repeats 3]

Medians of the repeats; both sides of each ratio run in turn, in one process. OpenCV needs
``pip install opencv-contrib-python-headless``.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import torch

from sklearn_medimb import BalancedVirtualFeatures
from sklearn_medimb.datasets import make_lesions
from sklearn_medimb.saliency import fine_grained, spectral_residual


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median time of a call, after one that is not counted: fresh memory is slow."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def saliency(repeats: int) -> None:
    import cv2

    images = make_lesions(1000, image_size=128, random_state=0).images
    batch = torch.from_numpy(images).movedim(-1, 1)
    for name, detect, theirs in (
        ("fine-grained", fine_grained, cv2.saliency.StaticSaliencyFineGrained_create()),
        (
            "spectral residual",
            spectral_residual,
            cv2.saliency.StaticSaliencySpectralResidual_create(),
        ),
    ):
        opencv = seconds(lambda t=theirs: [t.computeSaliency(image) for image in images], repeats)
        ours = seconds(lambda d=detect: d(batch.float()), repeats)
        print(
            f"{name:18} 1,000 images of 128 x 128: ours {ours:.2f} s, OpenCV {opencv:.2f} s, "
            f"ours / OpenCV {ours / opencv:.2f}",
            flush=True,
        )


def virtual_features(d: int, repeats: int) -> None:
    """10 classes of 200 rows, 5,000 draws of each."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(d, d)) / np.sqrt(d)
    X, y = (rng.normal(size=(2000, d)) @ mixing).astype(np.float32), np.repeat(np.arange(10), 200)
    classes = [X[y == k].astype(np.float64) for k in range(10)]

    def numpy() -> None:
        for rows in classes:
            rng.multivariate_normal(rows.mean(axis=0), np.cov(rows.T), size=5000)

    def legacy() -> None:
        for rows in classes:
            np.random.multivariate_normal(rows.mean(axis=0), np.cov(rows.T), size=5000)  # noqa: NPY002

    reference = {"np.random.multivariate_normal": legacy, "Generator.multivariate_normal": numpy}
    theirs = {}
    for name, run in reference.items():
        start = time.perf_counter()
        run()
        theirs[name] = time.perf_counter() - start
    for covariance, eps in (("full", 0.0), ("full", 1e-2), ("shrunk", 1e-2), ("diag", 1e-2)):
        sampler = BalancedVirtualFeatures(
            replace=True, n_per_class=5000, covariance=covariance, eps=eps, random_state=0
        )
        ours = seconds(lambda s=sampler: s.fit_resample(X, y), repeats)
        ratios = ", ".join(f"{name} / ours {t / ours:.0f}" for name, t in theirs.items())
        print(f"d = {d:4} {covariance:6} eps {eps:4}: ours {ours:.2f} s, {ratios}", flush=True)
    tracemalloc.start()
    V, _ = sampler.set_params(covariance="full", eps=0.0).fit_resample(X, y)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"d = {d:4} peak NumPy memory / output {peak / V.nbytes:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    try:
        saliency(args.repeats)
    except ImportError:
        print("OpenCV is not installed: saliency is not compared.")
    for d in (512, 2048):
        virtual_features(d, args.repeats)


if __name__ == "__main__":
    main()
