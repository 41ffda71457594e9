"""
From probabilities to decisions
===============================

A network that was taught all classes alike calls half of the doubtful images ill. A clinic wants
to know something else: at which threshold are .9 of the ill found, how sure is that, how many of
the positives are ill where 1 in 50 is, and which images should a person look at?
"""

# %%
# Synthetic lesions, two images of each patient; the last kind is the disease. Half of the patients
# are set aside, to see what became of the promise.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import StratifiedGroupKFold

from sklearn_medimb import SoftmaxClassifier
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.datasets import make_lesions
from sklearn_medimb.decisions import OperatingPoint, PriorShift, SelectiveClassifier
from sklearn_medimb.metrics import scorers

PREVALENCE = 0.02  # where the classifier is to be used

data = make_lesions(
    [200, 200, 200, 240], image_size=16, images_per_patient=2, difficulty=0.0, random_state=0
)
names = np.where(data.target == 3, "ill", "well")
halves = StratifiedGroupKFold(2, shuffle=True, random_state=0)
known, new = next(halves.split(data.images, names, data.groups))
X, y, groups = data.images[known], names[known], data.groups[known]
X_new, y_new = data.images[new], names[new]
print(f"{len(y)} images, {(y == 'ill').sum()} of them ill; {len(y_new)} of new patients")

# %%
# A threshold that finds 90 % of the ill, with a confidence of 95 %, chosen on predictions for
# patients whom the classifier has not seen.

clf = SoftmaxClassifier(
    backbone=ConvNet(widths=(16, 32, 32)),
    max_epochs=20,
    class_weight="balanced",
    lr=1e-2,
    augment="none",
    random_state=0,
)
point = OperatingPoint(
    clf, min_sensitivity=0.9, positive="ill", prevalence=PREVALENCE, cv=4, random_state=0
)
point.fit(X, y, groups=groups)
print(f"threshold {point.threshold_:.3f}, on patients unseen in cross-validation:")
for name in ("sensitivity", "specificity", "ppv", "npv"):
    found = getattr(point, f"{name}_")
    print(f"{name:12} {found.score:.3f} [{found.low:.3f}, {found.high:.3f}]")

# %%
# Was it kept?

scoring = scorers("sensitivity", "specificity", "ppv", positive="ill", prevalence=PREVALENCE)
print(f"{'on new patients':22}" + "".join(f"{name:>12}" for name in scoring))
for name, one in {"threshold of .5": point.estimator_, "operating point": point}.items():
    scores = [scorer(one, X_new, y_new) for scorer in scoring.values()]
    print(f"{name:22}" + "".join(f"{score:12.3f}" for score in scores))

# %%
# Probabilities at the true frequency of the disease. The network is fitted: it stays as it is.

fitted = FrozenEstimator(point.estimator_)
shifted = PriorShift(fitted, prevalence=PREVALENCE, positive="ill").fit(X, y)
column = shifted.classes_.tolist().index("ill")
taught, true = (one.predict_proba(X_new)[:, column] for one in (fitted, shifted))
row = np.abs(taught - 0.9).argmin()
print(f"what was {taught[row]:.2f} is {true[row]:.2f} at the true frequency")

# %%
# Which images should a person look at? The least certain fifth.

selective = SelectiveClassifier(clf, coverage=0.8, cv=4, random_state=0)
selective.fit(X, y, groups=groups)
decided = selective.accepts(X_new)
right = selective.predict(X_new) == y_new
print(f"decided {decided.mean():.2f}: {right[decided].mean():.3f} right, all {right.mean():.3f}")

# %%
# Left: the threshold lies where few of the ill are. Right: the fewer are decided, the fewer errors.

figure, (left, other) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
bins = np.linspace(0, 1, 31)
for side, colour in {"well": "#0072B2", "ill": "#D55E00"}.items():
    left.hist(taught[y_new == side], bins, density=True, alpha=0.6, color=colour, label=side)
left.axvline(point.threshold_, color="black", linestyle="--", label="operating point")
left.set(xlabel="probability of ill, new patients", yticks=[])
left.legend()
curve = selective.curve_
other.plot(curve.coverage, curve.error, color="#0072B2")
other.axvline(0.8, color="black", linestyle="--")
other.set(xlabel="coverage", ylabel="error among the decided", xlim=(0, 1), ylim=(0, None))
plt.show()
