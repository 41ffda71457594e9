"""
Over-sample features instead of images
======================================

The last layer of a trained network is replaced by a logistic regression on its embeddings: as they
are, over-sampled, and with Gaussian draws around the class means. Between an encoder and a
classifier is where imbalanced-learn's samplers belong.
"""

# %%
# A network, trained on long-tailed digits.

import matplotlib.pyplot as plt
import numpy as np
import torch
from imblearn.over_sampling import RandomOverSampler
from imblearn.pipeline import make_pipeline
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, recall_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader, TensorDataset

from sklearn_medimb import BalancedBatchSampler, BalancedVirtualFeatures, SoftmaxClassifier
from sklearn_medimb.datasets import make_long_tailed

X, y = load_digits(return_X_y=True)
X = X.reshape(-1, 8, 8)
X, X_test, y, y_test = train_test_split(X, y, test_size=0.5, stratify=y, random_state=0)
X, y = make_long_tailed(X, y, imbalance_ratio=50, random_state=0)
network = SoftmaxClassifier(max_epochs=20, random_state=0).fit(X, y)

# %%
# Its embeddings go through four pipelines that differ in the sampler alone.

train, held_out = network.transform(X), network.transform(X_test)
scores = {"network": network.predict(X_test)}
virtual = {"replace": True, "random_state": 0}
for name, sampler in {
    "plain head": "passthrough",
    "oversampled head": RandomOverSampler(random_state=0),
    "virtual features": BalancedVirtualFeatures(**virtual),
    "own covariance": BalancedVirtualFeatures(covariance="full", **virtual),
}.items():
    head = LogisticRegression(C=0.01, max_iter=1000)
    pipeline = make_pipeline(StandardScaler(), sampler, head).fit(train, y)
    scores[name] = pipeline.predict(held_out)

tail = np.argsort(np.bincount(y))[:3]
print(f"{'':18}{'balanced acc.':>14}{'tail recall':>13}")
shown = {}
for name, predicted in scores.items():
    accuracy = balanced_accuracy_score(y_test, predicted)
    recall = recall_score(y_test, predicted, average=None, zero_division=0)[tail].mean()
    shown[name] = accuracy, recall
    print(f"{name:18}{accuracy:14.3f}{recall:13.3f}")

# %%
# A class of few rows has no covariance of its own worth the name: "own covariance" takes it
# nonetheless, as published, "virtual features" leans on that of all classes.

fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
places = np.arange(len(shown))
colours = "#0072B2", "#E69F00"
for shift, column, name in ((-0.2, 0, "all"), (0.2, 1, "rarest three")):
    values = [value[column] for value in shown.values()]
    ax.barh(places + shift, values, 0.38, label=name, color=colours[column])
ax.set_yticks(places, list(shown))
ax.invert_yaxis()
ax.set(xlabel="mean recall", xlim=(0, 1))
ax.legend(title="classes", loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %%
# Who writes a training loop in torch has balanced batches from the same place.

loader = DataLoader(
    TensorDataset(torch.from_numpy(train), torch.from_numpy(y)),
    batch_sampler=BalancedBatchSampler(y, plan="pk", batch_size=16, random_state=0),
)
_, labels = next(iter(loader))
print(f"a P x K batch: {labels.tolist()}")
