"""
CSSN: an image has the class that it resembles
==============================================

CSSN learns one question: are these two images of the same class? From n images it has n x n pairs
to learn from, and a rare class is in many of them. A new image gets the class whose support images
it resembles most, with as many supports of each class as of any other.
"""

# %%
# Two kinds of synthetic lesions, one in six of the rare kind.

import matplotlib.pyplot as plt
import numpy as np

from sklearn_medimb import CSSNClassifier
from sklearn_medimb.datasets import make_lesions
from sklearn_medimb.inspection import SimilarityEvidenceDisplay

train = make_lesions((120, 20), image_size=32, difficulty=0.0, random_state=0)
test = make_lesions((5, 5), image_size=32, difficulty=0.0, random_state=1)
clf = CSSNClassifier(max_epochs=15, random_state=0).fit(train.images, train.target)

# %%
# Ten new images against eight supports of each class: the probability that a pair is of one class.
# The column on the right has the means that decide.

supports = np.concatenate([np.flatnonzero(train.target == kind)[:8] for kind in (0, 1)])
order = np.argsort(test.target, kind="stable")
queries = test.images[order]
rows, columns = np.meshgrid(np.arange(10), supports, indexing="ij")
same = clf.pair_proba(queries[rows.ravel()], train.images[columns.ravel()]).reshape(rows.shape)

figure, axes = plt.subplots(11, 17, figsize=(9, 5.6), gridspec_kw={"wspace": 0.05, "hspace": 0.05})
for ax in axes.ravel():
    ax.set(xticks=[], yticks=[])
    ax.set_frame_on(False)
for ax, row in zip(axes[0, 1:], supports, strict=True):
    ax.imshow(train.images[row])
for ax, query in zip(axes[1:, 0], queries, strict=True):
    ax.imshow(query)
box = figure.add_subplot(axes[0, 0].get_gridspec()[1:, 1:])
drawn = box.imshow(same, cmap="cividis", vmin=0, vmax=1, aspect="auto")
box.axvline(7.5, color="white", linewidth=3)
box.axhline(4.5, color="white", linewidth=3)
box.set(xticks=[3.5, 11.5], xticklabels=["8 supports, frequent", "8 supports, rare"], yticks=[])
figure.colorbar(drawn, ax=[*axes.ravel(), box], label="probability of one class", shrink=0.8)
plt.show()

# %%
# What is seen, and where: each query, the places that speak for its class, the nearest supports.

SimilarityEvidenceDisplay.from_estimator(
    clf, queries[[0, 9]], supports=train.images, y=test.target[order][[0, 9]]
)
plt.show()
