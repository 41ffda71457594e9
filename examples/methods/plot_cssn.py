"""
CSSN: an image has the class that it resembles
==============================================

CSSN learns one question: are these two images of the same class? From n images it has n x n pairs
to learn from, and a rare class is in many of them. A new image gets the class whose support images
it resembles most, with as many supports of each class as of any other.
"""

# %%
# Round lesions, and star-shaped ones, one in seven.

import matplotlib.pyplot as plt
import numpy as np

from sklearn_medimb import CSSNClassifier
from sklearn_medimb.datasets import make_lesions
from sklearn_medimb.inspection import SimilarityEvidenceDisplay


def round_and_star(n_round, n_star, seed):
    """Lesions of the first and of the fourth kind."""
    made = make_lesions((n_round, 1, 1, n_star), image_size=32, difficulty=0.0, random_state=seed)
    kept = np.isin(made.target, (0, 3))
    return made.images[kept], np.array(made.target_names)[made.target[kept]]


X, y = round_and_star(120, 20, seed=0)
X_new, y_new = round_and_star(5, 5, seed=1)
clf = CSSNClassifier(max_epochs=40, random_state=0).fit(X, y)

# %%
# Ten new images against eight supports of each class: the probability that a pair is of one class.
# The mean over a class is what decides.

supports = np.concatenate([np.flatnonzero(y == kind)[:8] for kind in ("round", "star-shaped")])
order = np.argsort(y_new, kind="stable")
queries = X_new[order]
rows, columns = np.meshgrid(np.arange(10), supports, indexing="ij")
same = clf.pair_proba(queries[rows.ravel()], X[columns.ravel()]).reshape(rows.shape)

figure, axes = plt.subplots(11, 17, figsize=(9, 5.6), gridspec_kw={"wspace": 0.05, "hspace": 0.05})
for ax in axes.ravel():
    ax.set(xticks=[], yticks=[])
    ax.set_frame_on(False)
for ax, row in zip(axes[0, 1:], supports, strict=True):
    ax.imshow(X[row])
for ax, query in zip(axes[1:, 0], queries, strict=True):
    ax.imshow(query)
box = figure.add_subplot(axes[0, 0].get_gridspec()[1:, 1:])
drawn = box.imshow(same, cmap="cividis", vmin=0, vmax=1, aspect="auto")
box.axvline(7.5, color="white", linewidth=3)
box.axhline(4.5, color="white", linewidth=3)
box.set(xticks=[3.5, 11.5], xticklabels=["8 supports, round", "8 supports, star-shaped"], yticks=[])
figure.colorbar(drawn, ax=[*axes.ravel(), box], label="probability of one class", shrink=0.8)
plt.show()

# %%
# What is seen, and where: each query, the places that speak for its class, the nearest supports.

SimilarityEvidenceDisplay.from_estimator(clf, queries[[0, 9]], supports=X, y=y_new[order][[0, 9]])
plt.show()
