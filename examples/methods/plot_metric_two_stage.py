"""
Metric two-stage: shape the features, then rebalance the head
=============================================================

Stage one trains the network on the images as they are, with a metric loss that pulls images of a
class together and others apart. Stage two fits a new head to the features, in which all classes
weigh the same.
"""

# %%
# Long-tailed digits; four classes, for the eye.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import train_test_split

from sklearn_medimb import MetricTwoStageClassifier
from sklearn_medimb.datasets import make_long_tailed
from sklearn_medimb.inspection import EmbeddingDisplay

X, y = load_digits(n_class=4, return_X_y=True)
X = X.reshape(-1, 8, 8)
X, X_test, y, y_test = train_test_split(X, y, test_size=0.5, stratify=y, random_state=0)
X, y = make_long_tailed(X, y, imbalance_ratio=20, random_state=0)
print("images of each class:", np.bincount(y))

# %%
# The same stage one without and with the metric loss; features of images that were not trained on.

figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for ax, (name, weight) in zip(
    axes, {"cross-entropy": 0.0, "metric loss": 1.0}.items(), strict=True
):
    clf = MetricTwoStageClassifier(
        metric_weight=weight, max_epochs=12, augment="light", random_state=0
    ).fit(X, y)
    EmbeddingDisplay.from_estimator(clf, X_test, y_test, ax=ax)
    ax.set_title(f"{name}: {ax.get_title(loc='left').lower()}", loc="left", fontsize=9)
    after = balanced_accuracy_score(y_test, clf.predict(X_test))
    clf.refit_head(X, y, rebalance="none")
    before = balanced_accuracy_score(y_test, clf.predict(X_test))
    print(f"{name:14} balanced accuracy {before:.3f} after stage one, {after:.3f} after stage two")
plt.show()
