"""A search in several processes over images on disk holds no copies of them."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from joblib.externals.loky import get_reusable_executor
from sklearn.model_selection import GridSearchCV

from sklearn_medimb import SoftmaxClassifier
from sklearn_medimb.datasets import MappedImages

psutil = pytest.importorskip("psutil", reason="needs the extra: dask")


class PeakOfCopies:
    """Largest sum, over this process and its children, of memory that no file backs; in bytes."""

    def __enter__(self):
        self.peak, self.done = 0, False
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.done = True
        self.thread.join()

    def watch(self):
        own = psutil.Process(os.getpid())
        while not self.done:
            total = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    status = Path(f"/proc/{process.pid}/status").read_text()
                except OSError:  # it ended meanwhile
                    continue
                if found := re.search(r"RssAnon:\s+(\d+) kB", status):
                    total += 1024 * int(found[1])
            self.peak = max(self.peak, total)
            time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_of_a_search_share_the_images_on_disk(tmp_path):
    """The same search over the array copies it: what is measured can grow."""
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (1_600, 3, 160, 160), dtype=np.uint8)
    y = np.arange(len(X)) % 2
    np.save(tmp_path / "images.npy", X)
    size = X.nbytes
    del X
    backbone = torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Conv2d(3, 4, 3))
    classifier = SoftmaxClassifier(backbone, max_epochs=1, batch_size=16, augment=None)
    search = GridSearchCV(classifier, {"lr": [1e-3]}, cv=2, refit=False, n_jobs=2, scoring=score)

    def peak(X):
        with PeakOfCopies() as watch:
            search.fit(X, y[: len(X)])
        return watch.peak

    # Eight steps in each fold: what the network needs is reached.
    few = peak(MappedImages(tmp_path / "images.npy")[:256])
    assert peak(MappedImages(tmp_path / "images.npy")) - few < 0.5 * size
    assert peak(np.load(tmp_path / "images.npy")) - few > 1.5 * size
    get_reusable_executor().shutdown(wait=True)


def score(estimator, X, y):
    """A few rows only: scoring is not what is measured."""
    return float((estimator.predict(X[:20]) == y[:20]).mean())
