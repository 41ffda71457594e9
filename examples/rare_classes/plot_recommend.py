"""
Which method, for these images, in this time
============================================

:func:`~sklearn_medimb.comparison.recommend` reads what the images are, and answers from the table
of the bench: a classifier, the reason, and what it costs.
"""

# %%
# What the evidence says. It is not fitted yet.

import matplotlib.pyplot as plt
import numpy as np

from sklearn_medimb.comparison import recommend
from sklearn_medimb.datasets import make_lesions

data = make_lesions(
    (120, 2, 2, 40), image_size=16, difficulty=0.0, images_per_patient=2, random_state=0
)
kept = np.isin(data.target, (0, 3))  # round ones and, one in four, star-shaped ones
X, y, patients = data.images[kept], data.target[kept], data.groups[kept]

advice = recommend(X, y, patients, budget="10 minutes", start=False, random_state=0)
print(advice)
print()
print(advice.estimator)

# %%
# With less time another one: evidence is a trade.

print(recommend(X, y, patients, budget="2 s", start=False).reason)

# %%
# Sets differ by more than methods do. So, if there is time, let the first ones show it on these
# images: on folds that keep patients whole, as many as the budget allows. (Fewer epochs here, for
# the sake of the example.)

tried = recommend(
    X, y, patients, budget="25 s", start=False, try_out=True, random_state=0, max_epochs=40
)
print(tried.reason)
tried.comparison.plot()
plt.show()
