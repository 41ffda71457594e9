"""
Few labels, many images: pre-train without labels
=================================================

Of long-tailed digits one in ten has a label. AMIMV and SimCLR learn from all of them; a head learns
from the labelled ones. The same encoder then starts CSSN. The baseline to try first is a network
that was trained on ImageNet.
"""

# %%
# Labels that are missing are -1.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_medimb import (
    AMIMVClassifier,
    AMIMVEncoder,
    CSSNClassifier,
    PretrainedFeatures,
    SoftmaxClassifier,
    SSLEncoder,
)
from sklearn_medimb.datasets import make_long_tailed

X, y = load_digits(return_X_y=True)
X = X.reshape(-1, 8, 8)
X, X_test, y, y_test = train_test_split(X, y, test_size=0.5, stratify=y, random_state=0)
X, y = make_long_tailed(X, y, imbalance_ratio=10, random_state=0)
rng = np.random.default_rng(0)
some = np.full(len(y), -1)
for label in np.unique(y):
    own = rng.permutation(np.flatnonzero(y == label))
    some[own[: max(2, len(own) // 10)]] = label
known = some >= 0
print(f"{known.sum()} of {len(y)} images have a label")

# %%
# Two encoders; the labels that are there serve a probe alone, which tells how training goes.
# Digits must not be flipped, hence "light".

common = {"max_epochs": 40, "augment": "light", "random_state": 0}
amimv = AMIMVEncoder(**common).fit(X, some)
simclr = SSLEncoder("simclr", **common).fit(X, some)

# %%
# What comes of them. ``PretrainedFeatures`` needs ``pip install "sklearn_medimb[pretrained]"``.

rows = {
    "labelled images alone": SoftmaxClassifier(
        class_weight="balanced", augment="light", max_epochs=20, random_state=0
    ).fit(X[known], y[known]),
    "random features + head": AMIMVClassifier(pretrain=None, random_state=0).fit(X, some),
    "SimCLR + head": AMIMVClassifier(pretrain=simclr, random_state=0).fit(X, some),
    "AMIMV + head": AMIMVClassifier(pretrain=amimv, random_state=0).fit(X, some),
    "CSSN from AMIMV": CSSNClassifier(
        backbone=amimv, augment="light", max_epochs=20, random_state=0
    ).fit(X[known], y[known]),
}
try:
    features = PretrainedFeatures(image_size=64, augment="none")
    regression = LogisticRegression(C=0.01, class_weight="balanced", max_iter=1000)
    rows["ImageNet's + regression"] = make_pipeline(features, StandardScaler(), regression).fit(
        X[known], y[known]
    )
except ImportError as error:
    print(error)
scores = {name: balanced_accuracy_score(y_test, clf.predict(X_test)) for name, clf in rows.items()}
print(f"{'':30} balanced acc.")
for name, score in scores.items():
    print(f"{name:30} {score:13.3f}")

# %%
# Left: what the probe saw while the encoders trained. Right: what came of it.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for name, encoder, colour in (("AMIMV", amimv, "#0072B2"), ("SimCLR", simclr, "#E69F00")):
    left.plot([row["knn_score"] for row in encoder.history_], label=name, color=colour)
left.set(xlabel="epoch of pre-training", ylabel="kNN probe (balanced acc.)", ylim=(0, 1))
left.legend(frameon=False)
right.barh(list(scores), list(scores.values()), color="#0072B2")
right.set(xlim=(0, 1), xlabel="balanced accuracy on held-out images")
right.invert_yaxis()
plt.show()
