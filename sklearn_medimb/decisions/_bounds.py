"""How many of those who must be found may be missed, if a share of them is to be promised.

Of n scores of the ill the k-th smallest is a threshold at which the true sensitivity is at least
``1 - p`` with probability ``P(Bin(n, p) >= k)``, whatever the distribution of scores: a tolerance
limit of Wilks [1]_, and the order statistic of the umbrella algorithm of Tong, Feng and Zhao [2]_.

Images of a patient resemble one another, so that n of them say less than n patients would. As in
the intervals of Korn and Graubard [3]_ they count as ``n / deff`` independent ones: `deff` is by
how much the variance of the share of missed images exceeds the binomial one, where the share is the
permitted one. It is estimated between patients; as few patients are missed there, an upper bound is
taken, by a chi-squared distribution with as many degrees of freedom as patients are missed.
No `deff` exceeds ``sum n_i^2 / sum n_i``, with which images of a patient are found all or none.

References
----------
.. [1] S. S. Wilks, "Determination of sample sizes for setting tolerance limits", Annals of
   Mathematical Statistics 1941.
.. [2] X. Tong, Y. Feng and A. Zhao, "Neyman-Pearson classification algorithms and NP receiver
   operating characteristics", Science Advances 2018.
.. [3] E. L. Korn and B. I. Graubard, "Confidence intervals for proportions with small expected
   number of positive counts estimated from survey data", Survey Methodology 1998.
"""

from __future__ import annotations

import numpy as np
from scipy import special, stats

DOUBT = 0.2  # that the design effect exceeds its bound


class TooFewError(ValueError):
    """No threshold can be promised: `largest` is the share that can be, `needed` what it takes."""

    def __init__(self, n: float, largest: float, needed: int) -> None:
        super().__init__(n, largest, needed)
        self.n, self.largest, self.needed = n, largest, needed


def misses_allowed(
    order: np.ndarray, share: float, confidence: float | None, groups: np.ndarray | None
) -> int:
    """How many of the lowest scores may lie below the threshold.

    Parameters
    ----------
    order : ndarray of int of shape (n,)
        Rows of those who must be found, by rising score.
    share : float
        Of them that may be missed, in truth.
    confidence : float or None
        That the true share is no greater; None permits as many as that here.
    groups : ndarray of int of shape (n_rows,) or None
        Patient of each row, from 0.

    Returns
    -------
    n_misses : int
        The score after these is the threshold.

    Raises
    ------
    TooFewError
        If not even the lowest of all scores will do.
    """
    n = len(order)
    if confidence is None:
        return min(int(share * n + 1e-9), n - 1)
    n_least = n_effective = float(n)
    if groups is not None:
        permitted = np.arange(n) < max(round(share * n), 1)
        n_least, n_effective = independent_images(permitted, groups[order])
    if (1 - share) ** n_least > 1 - confidence:
        needed = int(np.ceil(np.log(1 - confidence) / np.log(1 - share)))
        raise TooFewError(n_least, (1 - confidence) ** (1 / n_least), needed)
    missed = np.arange(n) * (n_effective / n)
    return int((confidence_of(missed, n_effective, share) >= confidence).sum()) - 1


def confidence_of(missed: np.ndarray, n: float, share: float) -> np.ndarray:
    """Confidence that no more than `share` are missed in truth, where `missed` of `n` are."""
    return special.betainc(missed + 1, np.maximum(n - missed, 1e-9), share)


def independent_images(missed: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """Independent images that these count as, at the least and by their design effect.

    Parameters
    ----------
    missed : ndarray of bool of shape (n,)
        Images that are missed; where none are, or all, nothing tells how much patients matter.
    groups : ndarray of int of shape (n,)
        Patient of each image.

    Returns
    -------
    n_least, n_effective : float
        With images of a patient that are missed all or none, and as estimated.
    """
    n, p = len(missed), missed.mean()
    patients = np.unique(groups, return_inverse=True)[1]
    sizes, of_patient = np.bincount(patients), np.bincount(patients, missed)
    most, m = (sizes**2).sum() / n, len(sizes)
    if not 0 < p < 1 or m < 2:
        return n / most, n / most
    variance = m / (m - 1) * ((of_patient - p * sizes) ** 2).sum() / n**2
    n_missed = int((of_patient > 0).sum())
    deff = variance / (p * (1 - p) / n) * n_missed / stats.chi2.ppf(DOUBT, n_missed)
    return n / most, n / float(np.clip(deff, 1, most))
