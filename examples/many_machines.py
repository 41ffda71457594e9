"""One script, from one core to several machines.

On scikit-learn's digits made long-tailed, a loss that knows the class sizes finds the rare ones.
Alone, it searches in this process. With ``--dask`` the search runs on a Dask cluster: two workers
on this machine, or those of a scheduler; the images stay in a file that the workers share, so that
what travels with a task is a path. Under ``torchrun`` several processes train one network, each
encoding its share of every batch, on a GPU of its own where there are GPUs::

    python examples/many_machines.py
    python examples/many_machines.py --dask
    python examples/many_machines.py --dask tcp://scheduler:8786 --folder /on/all/machines
    torchrun --nproc-per-node 2 examples/many_machines.py --fit
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import joblib
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV

from sklearn_medimb import SoftmaxClassifier
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.datasets import MappedImages, make_long_tailed

# Dask has its workers hand freed memory back at once; training, which needs it again in the next
# step, is slower for it. Workers of a cluster get these as environment variables.
KEEP_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": 2**30,
    "MALLOC_MMAP_THRESHOLD_": 2**30,
    "OMP_NUM_THREADS": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dask", nargs="?", const="local", help="address of a scheduler")
    parser.add_argument("--folder", type=Path, help="for the images, seen by all workers")
    parser.add_argument("--fit", action="store_true", help="one fit instead of a search")
    args = parser.parse_args()

    X, y = load_digits(return_X_y=True)
    images = (X.reshape(-1, 8, 8) * 15).astype(np.uint8)
    images, y = make_long_tailed(images, y, imbalance_ratio=20, random_state=0)
    clf = SoftmaxClassifier(ConvNet((16, 32)), max_epochs=8, augment="none", random_state=0)
    if args.fit:
        clf.fit(images, y)
        rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        print(f"process {rank} of {size}: last loss {clf.history_[-1]['train_loss']:.6f}")
        return

    grid = {"lr": [3e-3, 1e-2], "loss": ["cross_entropy", "logit_adjusted"]}
    search = GridSearchCV(clf, grid, cv=3, scoring="balanced_accuracy")
    with ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        np.save(folder / "images.npy", images)
        if args.dask:
            import dask
            from distributed import Client

            dask.config.set({"distributed.nanny.pre-spawn-environ": KEEP_MEMORY})
            local = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
            client = Client(**local) if args.dask == "local" else Client(args.dask)
            stack.enter_context(client)
            stack.enter_context(joblib.parallel_config("dask"))
        start = time.perf_counter()
        search.fit(MappedImages(folder / "images.npy"), y)
    took = time.perf_counter() - start
    print(f"best of {len(search.cv_results_['params'])}: {search.best_params_}")
    for loss in grid["loss"]:
        scores = search.cv_results_["mean_test_score"][search.cv_results_["param_loss"] == loss]
        print(f"  {loss}: balanced accuracy {scores.max():.2f}, where guessing has 0.10")
    print(f"{took:.0f} s")


if __name__ == "__main__":
    main()
