"""
Several images of a patient: what a leak looks like in numbers
==============================================================

Images of a patient resemble one another, whatever their class. Folds that cut through patients test
on people who were trained on, and so does a validation split that does.
"""

# %%
# Synthetic lesions, four images of each patient. Half of the patients are set aside first: every
# other number claims to foretell the score on them. It is one draw of few patients, so that numbers
# move by some hundredths with ``random_state``.

import matplotlib.pyplot as plt
import numpy as np
import sklearn
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import (
    GridSearchCV,
    StratifiedGroupKFold,
    StratifiedKFold,
    cross_validate,
)

from sklearn_medimb import SoftmaxClassifier
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.datasets import make_lesions

data = make_lesions([480, 240], image_size=16, images_per_patient=4, difficulty=0.0, random_state=0)
halves = StratifiedGroupKFold(2, shuffle=True, random_state=0)
known, new = next(halves.split(data.images, data.target, data.groups))
X, y, groups = data.images[known], data.target[known], data.groups[known]
X_new, y_new = data.images[new], data.target[new]
print(f"{len(y)} images of {len(np.unique(groups))} patients, {len(y_new)} of new ones")

# %%
# The same classifier, in folds that cut patients and in folds of whole ones.

common = {
    "backbone": ConvNet(widths=(16, 32, 32)),
    "class_weight": "balanced",
    "lr": 1e-2,
    "augment": "none",
    "random_state": 0,
}
clf = SoftmaxClassifier(max_epochs=25, **common)
stopped = SoftmaxClassifier(max_epochs=25, early_stopping=True, **common)
scoring = "balanced_accuracy"
cut = StratifiedKFold(3, shuffle=True, random_state=0)
whole = StratifiedGroupKFold(3, shuffle=True, random_state=0)

sklearn.set_config(enable_metadata_routing=True)
routed = {"params": {"groups": groups}, "scoring": scoring}
rows = {
    "folds that cut patients": cross_validate(clf, X, y, cv=cut, scoring=scoring),
    "folds of whole patients": cross_validate(
        clf.set_fit_request(groups=False), X, y, cv=whole, **routed
    ),
}
scores = {name: done["test_score"].mean() for name, done in rows.items()}

# %%
# Early stopping believes its own validation split: with ``groups`` it keeps patients whole.

deaf, heard = sklearn.clone(stopped).fit(X, y), stopped.fit(X, y, groups=groups)
scores["validation split that cuts patients"] = deaf.best_score_
scores["validation split of whole patients"] = heard.best_score_

# %%
# From end to end: one argument reaches the outer folds, those of the search, and the validation
# split of every fit in it. Without ``set_fit_request`` scikit-learn would refuse. (Fewer epochs,
# since there are fifteen fits.)

inner = SoftmaxClassifier(max_epochs=15, early_stopping=True, **common)
search = GridSearchCV(
    inner.set_fit_request(groups=True),
    {"weight_decay": [1e-2, 1e-1]},
    cv=StratifiedGroupKFold(2, shuffle=True, random_state=0),
    scoring=scoring,
)
done = cross_validate(search, X, y, cv=whole, **routed)
scores["nested search, groups routed"] = done["test_score"].mean()
sklearn.set_config(enable_metadata_routing=False)

# %%
# And the truth.

scores["new patients"] = balanced_accuracy_score(y_new, clf.fit(X, y).predict(X_new))
scores["new patients, stopped early"] = balanced_accuracy_score(y_new, heard.predict(X_new))
print(f"{'':36} balanced acc.")
for name, score in scores.items():
    print(f"{name:36} {score:13.3f}")

figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
colours = ["#D55E00" if "cut" in name else "#0072B2" for name in scores]
bars = axes.barh(list(scores), list(scores.values()), color=colours)
axes.bar_label(bars, fmt="%.2f", label_type="center", color="white")
axes.axvline(scores["new patients"], color="black", linestyle=":")
axes.set(xlim=(0, 1.1), xlabel="balanced accuracy (dotted: on new patients)")
axes.invert_yaxis()
plt.show()
