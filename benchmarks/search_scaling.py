"""What a search over several processes costs: time on a Dask cluster, memory with images on disk.

    python benchmarks/search_scaling.py [--only dask memory] [--megabytes 1000]

- ``dask``: 8 candidates x 3 folds on two local worker processes over the same search in this
  process alone, with all threads and with one. The cluster is up, and each of its workers has
  trained once, before the clock runs. A row shows what Dask's own setting of the allocator costs.
- ``memory``: peak of the proportional set sizes of this process and its workers during a search
  with ``n_jobs=2`` over `MappedImages`, beyond that of the same search over 640 of the
  images; and, for comparison, over the array itself.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import psutil
import torch
from sklearn.model_selection import GridSearchCV

from sklearn_medimb import SoftmaxClassifier
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.datasets import MappedImages, make_lesions

# Dask has its workers hand freed memory back at once. A training step allocates and frees the same
# blocks again and again, so that each is fetched anew, page by page.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": 2**30, "MALLOC_MMAP_THRESHOLD_": 2**30}


class PeakMemory:
    """Largest sum of proportional set sizes of this process and its children, in bytes."""

    def __enter__(self) -> PeakMemory:
        self.peak, self.done = 0, False
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done = True
        self.thread.join()

    def _watch(self) -> None:
        own = psutil.Process(os.getpid())
        while not self.done:
            total = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:  # it ended meanwhile
                    continue
            self.peak = max(self.peak, total)
            time.sleep(0.05)


def small_search(**params: Any) -> GridSearchCV:
    common = {"max_epochs": 1, "batch_size": 32, "random_state": 0}
    classifier = SoftmaxClassifier(ConvNet(widths=(4, 8)), **common)
    return GridSearchCV(classifier, {"lr": [1e-3, 1e-2]}, cv=2, refit=False, **params)


def memory(megabytes: int) -> None:
    n = megabytes * 10**6 // (3 * 128 * 128)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        shape = (n, 3, 128, 128)
        images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        rng = np.random.default_rng(0)
        for start in range(0, n, 512):
            part = images[start : start + 512]
            part[:] = rng.integers(0, 256, part.shape, dtype=np.uint8)
        del images, part
        y = np.arange(n) % 2
        few = 640  # ten batches in each fold: what the network needs is reached
        peaks = {}
        for name, X, labels in (
            ("few", MappedImages(path)[:few], y[:few]),
            ("mapped", MappedImages(path), y),
            ("array", np.load(path), y),
        ):
            with PeakMemory() as watch:
                small_search(n_jobs=2).fit(X, labels)
            peaks[name] = watch.peak
            joblib.externals.loky.get_reusable_executor().shutdown(wait=True)
    size = n * 3 * 128 * 128
    print(f"memory of a search with n_jobs=2 over {size / 1e9:.2f} GB of uint8 images:")
    print(f"  over {few} images: {peaks['few'] / 1e9:.2f} GB")
    for name in ("mapped", "array"):
        extra = peaks[name] - peaks["few"]
        print(f"  {name}: {peaks[name] / 1e9:.2f} GB, {extra / size:.2f} x the images beyond that")


def dask() -> None:
    import dask
    import distributed

    data = make_lesions([200, 60, 30], image_size=32, random_state=0)
    grid = {"lr": [1e-3, 2e-3, 5e-3, 1e-2], "augment": [None, "light"]}
    common = {"max_epochs": 6, "random_state": 0}
    search = GridSearchCV(SoftmaxClassifier(ConvNet(widths=(16, 32, 64)), **common), grid, cv=3)

    def seconds(backend: str) -> float:
        start = time.perf_counter()
        with joblib.parallel_config(backend):
            search.fit(data.images, data.target)
        return time.perf_counter() - start

    name = "distributed.nanny.pre-spawn-environ"
    before, n_threads = dask.config.get(name), torch.get_num_threads()
    print("8 candidates x 3 folds, two Dask workers / this process alone:")
    for label, environ in (("memory kept", KEEP_MEMORY), ("Dask's default", {})):
        ratios = []
        with (
            dask.config.set({name: {**before, **environ}}),
            distributed.LocalCluster(
                n_workers=2, threads_per_worker=1, dashboard_address=None
            ) as cluster,
            distributed.Client(cluster),
        ):
            seconds("dask")
            for _ in range(3):
                alone = seconds("sequential")
                torch.set_num_threads(1)
                single = seconds("sequential")
                torch.set_num_threads(n_threads)
                took = seconds("dask")
                ratios.append((took / alone, took / single))
        for row, what in zip(np.array(ratios).T, (f"{n_threads} threads", "one"), strict=True):
            print(f"  {label}, {what}: {np.median(row):.2f} ({row.min():.2f}-{row.max():.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=("dask", "memory"))
    parser.add_argument("--megabytes", type=int, default=1000)
    args = parser.parse_args()
    wanted = args.only or ("dask", "memory")
    if "dask" in wanted:
        dask()
    if "memory" in wanted:
        memory(args.megabytes)


if __name__ == "__main__":
    main()
