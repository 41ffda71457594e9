"""
Why not SMOTE before a network
==============================

SMOTE draws new rows between neighbours. Between two images of a lesion lies a double exposure.
And whatever is drawn before the validation split puts children of one image on both sides of it:
the split then promises more than a new patient will see.
"""

# %%
# Synthetic lesions, of four kinds, the rarest with ten images.

import matplotlib.pyplot as plt
import numpy as np
from imblearn.over_sampling import SMOTE, RandomOverSampler
from sklearn.metrics import balanced_accuracy_score, pairwise_distances

from sklearn_medimb import SoftmaxClassifier
from sklearn_medimb.datasets import make_lesions

sizes = (150, 60, 24, 10)
train = make_lesions(sizes, image_size=24, difficulty=0.0, random_state=0)
test = make_lesions((100, 100, 100, 100), image_size=24, difficulty=0.0, random_state=1)
X, y = train.images, train.target

# %%
# What SMOTE makes of the rarest class, on pixels: those that are farthest from any image. (As
# floats: of ``uint8`` it takes differences that wrap around.)

pixels = X.reshape(len(X), -1) / 255
more, y_more = SMOTE(k_neighbors=5, random_state=0).fit_resample(pixels, y)
X_more = (more.reshape(-1, *X.shape[1:]) * 255).astype(np.uint8)
made = np.flatnonzero(y_more == 3)[(y == 3).sum() :]
far = pairwise_distances(more[made], pixels[y == 3]).min(axis=1)
figure, axes = plt.subplots(2, 6, figsize=(8, 3), layout="constrained")
for row, (name, pictures) in zip(
    axes, {"images": X[y == 3], "SMOTE": X_more[made[np.argsort(-far)]]}.items(), strict=True
):
    for ax, picture in zip(row, pictures, strict=False):
        ax.imshow(picture)
        ax.set(xticks=[], yticks=[])
    row[0].set_ylabel(name)
plt.show()

# %%
# The same network and about the same number of steps, with early stopping, which believes its own
# validation split. ``sampler=`` draws after that split.

common = {"early_stopping": True, "n_iter_no_change": 60, "random_state": 0}
short, long = {**common, "max_epochs": 24}, {**common, "max_epochs": 60}
methods = {
    "as it is": (SoftmaxClassifier(**long), X, y),
    "logit adjustment": (SoftmaxClassifier(loss="logit_adjusted", **long), X, y),
    "repeated, by sampler=": (SoftmaxClassifier(sampler=RandomOverSampler(), **short), X, y),
    "SMOTE on pixels, before": (SoftmaxClassifier(**short), X_more, y_more),
}
believed, true = [], []
for name, (clf, images, labels) in methods.items():
    clf.fit(images, labels)
    believed.append(clf.best_score_)
    true.append(balanced_accuracy_score(test.target, clf.predict(test.images)))
    print(f"{name:26} validation split {believed[-1]:.2f}, new images {true[-1]:.2f}")

# %%
# A sampler belongs into ``sampler=``, which is applied after the split, or between an encoder and
# a classifier (:ref:`sphx_glr_auto_examples_rare_classes_plot_virtual_features.py`).

figure, ax = plt.subplots(figsize=(7, 3), layout="constrained")
place = np.arange(len(methods))
ax.barh(place - 0.2, believed, 0.38, color="#D55E00", label="on its validation split")
ax.barh(place + 0.2, true, 0.38, color="#0072B2", label="on new images")
ax.set(yticks=place, yticklabels=list(methods), xlim=(0, 1), xlabel="balanced accuracy")
ax.invert_yaxis()
ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
plt.show()
