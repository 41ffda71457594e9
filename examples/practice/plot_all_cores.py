"""
All cores, one copy of the images
=================================

A search over folds and settings is many fits that know nothing of one another. ``n_jobs`` spreads
them over cores; ``MappedImages`` leaves the images in one file, so that what travels with a fit is
a path and all workers share one copy.
"""

# %%
# Long-tailed digits, in a file.

import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV

from sklearn_medimb import SoftmaxClassifier
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.datasets import MappedImages, make_long_tailed

X, y = load_digits(return_X_y=True)
images = (X.reshape(-1, 8, 8) * 15).astype(np.uint8)
images, y = make_long_tailed(images, y, imbalance_ratio=20, random_state=0)
folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
path = Path(folder.name) / "images.npy"
np.save(path, images)

# %%
# Four candidates, three folds, two workers.

clf = SoftmaxClassifier(ConvNet((16, 32)), max_epochs=8, augment="none", random_state=0)
grid = {"lr": [3e-3, 1e-2], "loss": ["cross_entropy", "logit_adjusted"]}
search = GridSearchCV(clf, grid, cv=3, scoring="balanced_accuracy", n_jobs=2)
start = time.perf_counter()
search.fit(MappedImages(path), y)
print(f"{time.perf_counter() - start:.0f} s, best: {search.best_params_}")

# %%
# Several machines take one more line, ``with joblib.parallel_config("dask"): search.fit(...)``,
# and one network is trained by several GPUs under ``torchrun``, with the script as it is. Both are
# in ``examples/many_machines.py``: see :doc:`/guide/machines`.

losses = search.cv_results_["param_loss"].astype(str)
figure, ax = plt.subplots(figsize=(6, 2.8), layout="constrained")
labels = [
    f"{loss}, lr {lr}" for loss, lr in zip(losses, search.cv_results_["param_lr"], strict=True)
]
ax.barh(
    labels,
    search.cv_results_["mean_test_score"],
    xerr=search.cv_results_["std_test_score"],
    color=["#E69F00" if loss == "cross_entropy" else "#0072B2" for loss in losses],
)
ax.axvline(0.1, color="black", linestyle=":")
ax.set(xlim=(0, 1), xlabel="balanced accuracy over the folds (dotted: guessing)")
plt.show()
folder.cleanup()
