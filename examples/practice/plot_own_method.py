"""
A method of one's own: LogitNorm beside cross-entropy
=====================================================

The class below is all that :doc:`/write_your_own_method` asks for. On synthetic lesions it is
compared with the plain network, and shown where its confidence comes out otherwise.
"""

# %%
# A loss, and an estimator of it. One line declares the parameter.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from sklearn_medimb import SoftmaxClassifier
from sklearn_medimb.base import above, parameter
from sklearn_medimb.datasets import make_lesions
from sklearn_medimb.losses import Loss, cross_entropy
from sklearn_medimb.metrics import expected_calibration_error


class LogitNormLoss(Loss):
    """Cross-entropy of logits of length 1 [1]_.

    Parameters
    ----------
    temperature
        What they are divided by.

    References
    ----------
    .. [1] H. Wei et al., "Mitigating neural network overconfidence with logit normalization",
       ICML 2022, eq. 5.
    """

    temperature: float = parameter(above(0), default=0.1, search=(0.02, 1.0, "log"))

    def costs(self, logits, constants):
        """Cost of each sample under each label, (n, K)."""
        length = logits.norm(dim=1, keepdim=True).clamp_min(1e-7)
        return cross_entropy(logits / (self.temperature * length))


class LogitNormClassifier(SoftmaxClassifier):
    """A network that learns from the direction of its logits alone.

    Parameters
    ----------
    temperature
        Of the logits of length 1.
    """

    temperature: float = parameter(above(0), default=0.1, search=(0.02, 1.0, "log"))

    def _make_loss(self):
        return LogitNormLoss(temperature=self.temperature)


# %%
# It works wherever the others do: here in a cross-validation.

data = make_lesions((240, 1, 1, 60), image_size=16, difficulty=0.0, random_state=0)
kept = np.isin(data.target, (0, 3))  # round ones and, one in five, star-shaped ones
X, y = data.images[kept], data.target[kept]
folds = StratifiedKFold(3, shuffle=True, random_state=0)

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
print(f"{'':16} balanced acc.   calibration error")
for classifier in (SoftmaxClassifier, LogitNormClassifier):
    clf = classifier(max_epochs=40, random_state=0)
    proba = cross_val_predict(clf, X, y, cv=folds, method="predict_proba")
    name = classifier.__name__.removesuffix("Classifier")
    score = balanced_accuracy_score(y, np.unique(y)[proba.argmax(axis=1)])
    print(f"{name:16} {score:13.3f} {expected_calibration_error(y, proba):19.3f}")
    axes.hist(proba.max(axis=1), bins=20, range=(0, 1), histtype="step", lw=2, label=name)
axes.set(xlabel="largest probability", ylabel="images", title="Confidence on images held out")
axes.legend()
plt.show()
