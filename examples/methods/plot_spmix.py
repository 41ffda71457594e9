"""
SPMix: where neither image is salient, they may mix
===================================================

A rare image keeps its label and its lesion. Patch by patch, saliency decides how much of a partner,
usually of a frequent class, may enter.
"""

# %%
# Synthetic lesions of three kinds.

from collections import Counter

import matplotlib.pyplot as plt
import numpy as np

from sklearn_medimb import SaliencyMap, SPMixDisplay, SPMixSampler
from sklearn_medimb.datasets import make_lesions

data = make_lesions([60, 25, 8], image_size=96, difficulty=0.3, random_state=0)
y = np.asarray(data.target_names)[data.target]
print(f"{len(y)} images: {dict(Counter(y.tolist()))}")

# %%
# The sampler makes the classes equally large. On real skin, where lesions are dark, say so:
# ``polarity="dark"``.

sampler = SPMixSampler(random_state=0)
X_new, y_new = sampler.fit_resample(data.images, y, groups=data.groups)
print(f"{len(y_new)} images: {dict(Counter(y_new.tolist()))}")
shares = sampler.ratio_[sampler.ratio_ < 1]  # the others are copies
print(f"share of the base: {shares.min():.2f} to {shares.max():.2f}")

# %%
# Four of the new images: base, its saliency, partner, its saliency, share of the base, result.

SPMixDisplay.from_sampler(sampler, data.images, y)
plt.show()

# %%
# The maps alone are a transformer.

maps = SaliencyMap().fit_transform(X_new[-100:])
print(f"mean saliency of the newest images: {maps.mean():.2f}")
