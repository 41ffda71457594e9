"""
Mix rare images with others, inside the network
===============================================

SPMix keeps the patches of a rare lesion and borrows the rest. Here it is compared with the
class-balanced batches that it rests on, and told that lesions are dark.
"""

# %%
# Four kinds of synthetic lesions, the rarest with eight images.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.metrics import balanced_accuracy_score

from sklearn_medimb import SaliencyMap, SPMixClassifier
from sklearn_medimb.datasets import make_lesions
from sklearn_medimb.metrics import shot_recall

train = make_lesions((200, 60, 20, 8), image_size=24, difficulty=0.0, random_state=0)
test = make_lesions((100, 100, 100, 100), image_size=24, difficulty=0.0, random_state=1)

# %%
# The same network, steps and seed.

common = {"max_epochs": 25, "random_state": 0}
rows = {
    "balanced batches": SPMixClassifier(mix_prob=0.0, **common),
    "SPMix": SPMixClassifier(**common),
    "SPMix, dark lesions": SPMixClassifier(saliency=SaliencyMap(polarity="dark"), **common),
}
scores = {}
print(f"{'':20} balanced acc.   tail recall")
for name, classifier in rows.items():
    predicted = classifier.fit(train.images, train.target).predict(test.images)
    few = shot_recall(test.target, predicted, train.target).few
    scores[name] = balanced_accuracy_score(test.target, predicted), few
    print(f"{name:20} {scores[name][0]:13.3f} {few:13.3f}")

# %%
# One seed of one small set: the differences are within its noise. What was measured over several
# seeds and sets is on the page of the method.

figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
place = np.arange(len(scores))
for shift, column, label, colour in (
    (-0.2, 0, "balanced accuracy", "#0072B2"),
    (0.2, 1, "recall of rare classes", "#E69F00"),
):
    axes.barh(place + shift, [s[column] for s in scores.values()], 0.38, label=label, color=colour)
axes.set(yticks=place, yticklabels=list(scores), xlim=(0, 1), xlabel="on held-out images")
axes.invert_yaxis()
axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
plt.show()
