"""
Train the features once, then choose the head
=============================================

Most of what helps rare classes is a rebalanced head. A two-stage classifier trains its network
once; every head of stage two is then a matter of a moment, because the features stay as they are.
LMD goes on from there: it alternates between head and features.
"""

# %%
# Digits, made long-tailed: the rarest class has one fiftieth of the images of the first. No image
# of the test half is seen before the end.

import time

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import train_test_split

from sklearn_medimb import (
    BalancedSoftmax,
    ClassifierRetraining,
    LearnableWeightScaling,
    LMDClassifier,
    LogitAdjustment,
    MetricTwoStageClassifier,
    NearestClassMean,
    TauNormalization,
    VirtualFeatureCalibration,
)
from sklearn_medimb.datasets import make_long_tailed
from sklearn_medimb.metrics import shot_recall

X, y = load_digits(return_X_y=True)
X = X.reshape(-1, 8, 8)
X, X_test, y, y_test = train_test_split(X, y, test_size=0.5, stratify=y, random_state=0)
X, y = make_long_tailed(X, y, imbalance_ratio=50, random_state=0)
print("images of each class:", np.bincount(y))

# %%
# Stage one: a network whose features a metric loss shapes.

common = {"max_epochs": 25, "augment": "light", "random_state": 0}
start = time.perf_counter()
metric = MetricTwoStageClassifier(**common).fit(X, y)
print(f"stage one with the triplet loss: {time.perf_counter() - start:.1f} s")

# %%
# Stage two, eight times: ``refit_head`` leaves the network alone.

HEADS = {
    "stage one": "none",
    "cRT": ClassifierRetraining(),
    "LWS": LearnableWeightScaling(),
    "tau-norm": TauNormalization(tau=1.0),
    "nearest class mean": NearestClassMean(),
    "balanced softmax": BalancedSoftmax(),
    "logit adjustment": LogitAdjustment(),
    "virtual features": VirtualFeatureCalibration(),
}
rows = {}


def test(name, classifier, seconds):
    """Note down the scores on the test half."""
    predicted = classifier.predict(X_test)
    few = shot_recall(y_test, predicted, y).few
    rows[name] = balanced_accuracy_score(y_test, predicted), few, seconds


for name, head in HEADS.items():
    start = time.perf_counter()
    metric.refit_head(X, y, rebalance=head)
    test(f"metric + {name}", metric, time.perf_counter() - start)
start = time.perf_counter()
lmd = LMDClassifier(**common).fit(X, y)
test("LMD", lmd, time.perf_counter() - start)

print(f"{'':30} balanced acc.   tail recall   seconds")
for name, (score, few, seconds) in rows.items():
    print(f"{name:30} {score:13.3f} {few:13.3f} {seconds:9.2f}")

# %%
# The head of stage one misses the rare classes; most heads of stage two find them.

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
place = np.arange(len(rows))
for shift, values, label, colour in (
    (-0.2, [row[0] for row in rows.values()], "balanced accuracy", "#0072B2"),
    (0.2, [row[1] for row in rows.values()], "recall of rare classes", "#E69F00"),
):
    axes.barh(place + shift, values, 0.38, label=label, color=colour)
axes.set(yticks=place, yticklabels=list(rows), xlim=(0, 1), xlabel="on held-out images")
axes.invert_yaxis()
axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
plt.show()
