"""
LMD: a head that learns from what a rare class could have been
==============================================================

LMD shapes features by the relations between images, then calibrates head and features in turns:
the M-step draws virtual features around each class mean, as many of each class, and fits the head
to them; the E-step goes on with the features under that head. The picture shows the M-step in two
dimensions.
"""

# %%
# Features of three classes, 200, 40 and 6 of them.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.linear_model import LogisticRegression

from sklearn_medimb import BalancedVirtualFeatures, LMDClassifier
from sklearn_medimb.datasets import make_lesions

rng = np.random.default_rng(0)
counts = (200, 40, 6)
means = np.array([[0, 0], [2.2, 0.6], [0.6, 2.2]])
shape = np.array([[0.9, 0.3], [0.3, 0.5]])
features = np.concatenate(
    [rng.multivariate_normal(mean, shape, n) for mean, n in zip(means, counts, strict=True)]
)
labels = np.repeat([0, 1, 2], counts)

# %%
# Left: a head on the features as they are gives the rare class little room. Right: on virtual ones.

virtual = BalancedVirtualFeatures(replace=True, n_per_class=300, random_state=0)
drawn, drawn_labels = virtual.fit_resample(features, labels)
colours = np.array(["#0072B2", "#E69F00", "#D55E00"])
grid = np.stack(np.meshgrid(np.linspace(-3, 5, 200), np.linspace(-2.5, 4.5, 200)), axis=-1)
figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
for ax, (name, rows, own) in zip(
    axes,
    [("features", features, labels), ("virtual features", drawn, drawn_labels)],
    strict=True,
):
    head = LogisticRegression().fit(rows, own)
    areas = head.predict(grid.reshape(-1, 2)).reshape(200, 200)
    ax.contourf(
        grid[..., 0], grid[..., 1], areas, levels=[-0.5, 0.5, 1.5, 2.5], colors=colours, alpha=0.2
    )
    ax.scatter(*rows.T, s=8, c=colours[own], alpha=0.6)
    ax.scatter(*features[labels == 2].T, s=60, c=colours[2], edgecolors="black")
    ax.set(title=name, xlabel="feature 1")
axes[0].set_ylabel("feature 2")
plt.show()

# %%
# The whole method is an estimator like any other; ``n_rounds`` is how often the two take turns.

data = make_lesions((80, 30, 8), image_size=24, difficulty=0.0, random_state=0)
lmd = LMDClassifier(max_epochs=12, n_rounds=2, random_state=0).fit(data.images, data.target)
print("entries of its history:", len(lmd.history_))
