"""Confidence intervals of any score, good where it is 0 or 1: Wilson's idea beyond proportions.

A bootstrap draws from what was seen. Where five of five are right, every draw is, and the interval
is a point; Wilson's asks instead which true rates would not be surprised by five of five. Here the
same question is put to any score: among the distributions of units (samples, or patients with all
their samples) that Pearson's test does not reject, the one with the lowest and the one with the
highest score are the ends,

    sum over strata s, units i of  n_s (p_i - q_i)^2 / q_i  <=  z^2,

p_i being the observed and q_i the other distribution within a stratum. Strata are the classes (or
the sets of classes of a patient); their own shares are one further such sum. Where a stratum's
units are right or wrong this is Wilson's interval to the digit; of the difference of two models
that agree everywhere it is Tango's. Each class may also hold units that were not seen: of that
class, but predicted as another one. The score is followed along its least favourable direction,
found by its change when one further unit of each kind is added, so that no class is ever lacking.
Where the score bends, as a minimum or a product of recalls does, directions at the ends found so
far follow.

References
----------
E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
K. A. Baggerly, "Empirical likelihood as a goodness-of-fit measure", Biometrika 1998 (this family).
T. DiCiccio and B. Efron, "Bootstrap confidence intervals", Statistical Science 1996 (least
favourable directions). T. Tango, "Equivalence test and confidence interval for the difference in
proportions for the paired-sample design", Statistics in Medicine 1998.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats
from sklearn.utils import check_random_state

UNSEEN = 1e-5  # share of units that were not seen: none, but a number to divide by
FEWEST_BLOCKS = 50  # of a class, where there are too many samples to look at each
FEWEST_ROWS = 2000  # of which slopes are taken
MOST_STEPS, FEWEST_STEPS, PATIENCE = 12, 4, 2  # of the search where a score bends
FEWEST_LOOKS = 30  # at every kind of unit: where there are more, a straight line will do
TOLERANCE = 1e-3

# Score of predictions `j` beside the true labels of rows `i`; beyond the last row `j` names
# predictions that nobody got, one for each label.
ScoreOf = Callable[[np.ndarray, np.ndarray], Any]
Rows = list[np.ndarray]


class Interval(NamedTuple):
    """A score and its confidence interval: floats, or arrays of one shape."""

    score: Any
    low: Any
    high: Any


@dataclass
class Units:
    """What may be drawn together, of one stratum: `n` units with these rows and predictions."""

    rows: np.ndarray
    predictions: np.ndarray
    stratum: int
    share: float
    n: int = 1
    cost: float = 1.0


def profile_interval(
    score_of: ScoreOf,
    observed: Any,
    *,
    units: np.ndarray,
    classes: np.ndarray,
    cells: np.ndarray | None,
    donors: Any,
    alike: bool,
    level: float,
    n_resamples: int,
    random_state: Any,
    name: str,
) -> Interval:
    """Lowest and highest score among distributions near the observed one.

    Parameters
    ----------
    score_of : callable
        ``score_of(i, j)``: a number, or an array of them.
    observed : float or array-like
        Score of all rows with their own predictions.
    units : ndarray of int of shape (n,)
        Patient of each row, or its own number, from 0.
    classes : ndarray of int of shape (n,)
        Class of each row, from 0.
    cells : ndarray of int of shape (n,) or None
        Rows with equal numbers have the same label and prediction. None where all differ.
    donors : sequence of ndarray of int, or ndarray of int of shape (n_classes, n_donors)
        For each class the predictions `j` that its rows might have got.
    alike : bool
        Whether a patient that was not seen has all samples of a class predicted so, or half.
    level : float
        Wanted coverage.
    n_resamples : int
        About how many changed samples are scored at most; where there are more units they are put
        together at random.
    random_state : int, RandomState or None
        Puts them together.
    name : str
        The metric, for errors.

    Returns
    -------
    interval : Interval
        Of the shape that `score_of` returns.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1.")
    if not n_resamples >= 1:
        raise ValueError(f"n_resamples={n_resamples} must be at least 1.")
    n_units = int(units.max()) + 1 if len(units) else 0
    if n_units < 2:
        raise ValueError("An interval needs at least two samples, or two groups.")
    every = np.arange(len(units))
    observed = as_numbers(observed, name)
    support, sizes = _support(units, classes, cells, donors, alike, n_resamples, random_state)

    def changed(i: list[np.ndarray], j: list[np.ndarray]) -> np.ndarray:
        value = as_numbers(score_of(np.concatenate(i), np.concatenate(j)), name)
        if value.shape != observed.shape or (np.isnan(value) > np.isnan(observed)).any():
            raise ValueError(
                f"{name} gives {value} where one more sample like those of y_true is added, but "
                f"{observed} without it: it has no interval."
            )
        return value.ravel()

    score, z = observed.ravel(), float(stats.norm.ppf((1 + level) / 2))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # the score of all samples has warned already
        added = [changed([every, one.rows], [every, one.predictions]) for one in support]
        # An unseen unit may make a loss infinite; it is none that may be counted with.
        finite = [not np.isinf(one).any() for one in added]
        kept = [one.share > UNSEEN or ok for one, ok in zip(support, finite, strict=True)]
        support, added = list(compress(support, kept)), list(compress(added, kept))
        near = _Neighbourhood(changed, support, sizes, every, score, z)
        if (np.abs(near.of_copies - score) > 0.5 * np.abs(score) + 0.5).any():
            raise ValueError(f"{name} grows with the number of samples: divide by it.")
        near.attained += added
        slopes = (np.array(added) - score) * ((n_units + near.n) / near.n)[:, np.newaxis]
        near.left = 3 * n_resamples
        ends = np.tile(score, (2, 1))
        for k in np.flatnonzero(np.isfinite(score)).tolist():
            for end, sign in enumerate((-1, 1)):
                furthest = sign * near.furthest(k, sign, slopes[:, k])
                ends[end, k] = near.within(furthest, k, sign * slopes[:, k])
    low, high = np.minimum(ends[0], score), np.maximum(ends[1], score)
    if observed.ndim == 0:
        return Interval(float(observed), float(low[0]), float(high[0]))
    return Interval(observed, low.reshape(observed.shape), high.reshape(observed.shape))


def as_numbers(value: Any, name: str) -> np.ndarray:
    """Return a score as an array of floats, or refuse what is none."""
    try:
        if isinstance(value, dict):
            raise TypeError("a dict")
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} returned a {type(value).__name__}: an interval needs a number, or an array of "
            "numbers. Wrap it in a function that picks one."
        ) from error


def _support(
    units: np.ndarray,
    classes: np.ndarray,
    cells: np.ndarray | None,
    donors: Any,
    alike: bool,
    n_resamples: int,
    random_state: Any,
) -> tuple[list[Units], np.ndarray]:
    """Kinds of units that were seen, and that might have been seen; units in each stratum."""
    order = np.argsort(units, kind="stable")
    rows_of = np.split(order, np.cumsum(np.bincount(units))[:-1])
    has = np.zeros((len(rows_of), int(classes.max()) + 1), dtype=bool)
    has[units, classes] = True
    kinds, stratum = np.unique(has, axis=0, return_inverse=True)
    stratum = stratum.ravel()
    blocks: dict[Any, list[int]] = {}
    for unit, rows in enumerate(rows_of):  # units that no score can tell apart
        same = unit if cells is None else tuple(np.sort(cells[rows]).tolist())
        blocks.setdefault((stratum[unit], same), []).append(unit)
    n_strata = np.bincount(stratum)
    support = []
    if len(blocks) <= n_resamples:
        for (s, _), members in blocks.items():
            rows, n = rows_of[members[0]], n_strata[s]
            support.append(Units(rows, rows, s, len(members) / n, cost=n))
    else:
        rng = check_random_state(random_state)
        for s, n in enumerate(n_strata):
            shuffled = rng.permutation(np.flatnonzero(stratum == s))
            n_blocks = max(FEWEST_BLOCKS, round(n_resamples * n / len(rows_of)))
            for block in np.array_split(shuffled, min(n, n_blocks)):
                rows, b = np.concatenate([rows_of[unit] for unit in block]), len(block)
                support.append(Units(rows, rows, s, b / n, n=b, cost=n / b))
    n_each = max(2, n_resamples // max(kinds.sum(), 1))
    sizes = np.array([len(rows) for rows in rows_of])
    for s, kind in enumerate(kinds):
        those = np.flatnonzero(stratum == s)
        middle = those[np.argsort(sizes[those], kind="stable")[len(those) // 2]]
        rows = rows_of[middle]
        for k in np.flatnonzero(kind):
            changes = classes[rows] == k
            if not alike:
                changes &= np.cumsum(changes) <= (changes.sum() + 1) // 2
            for donor in donors[k][:n_each]:
                predictions = np.where(changes, donor, rows)
                support.append(Units(rows, predictions, s, UNSEEN, cost=n_strata[s]))
    support.sort(key=lambda one: one.stratum)
    return support, n_strata


class _Neighbourhood:
    """The distributions of units that Pearson's test does not reject, and their scores.

    Parameters
    ----------
    score_of : callable
        Scores, as a flat array, of lists of rows and of predictions.
    support : list of Units
        What may be drawn.
    sizes : ndarray of int of shape (n_strata,)
        Units that were seen in each stratum.
    every : ndarray of int of shape (n,)
        Rows that were seen.
    score : ndarray of shape (n_scores,)
        Their scores.
    z : float
        Root of what Pearson's sum may be at most.
    """

    def __init__(
        self,
        score_of: Callable[[Rows, Rows], np.ndarray],
        support: list[Units],
        sizes: np.ndarray,
        every: np.ndarray,
        score: np.ndarray,
        z: float,
    ) -> None:
        self.score_of, self.support, self.sizes, self.z = score_of, support, sizes, z
        self.share, self.cost, self.stratum, self.n = (
            np.array([getattr(one, key) for one in support])
            for key in ("share", "cost", "stratum", "n")
        )
        self.seen = self.share * (sizes / sizes.sum())[self.stratum]
        self.score = score
        self.n_units = int(sizes.sum())
        # Copies of the units, in proportion to their shares: a score need not take weights.
        n_rows = int(np.clip(50 * len(every), 20_000, max(200_000, 4 * len(every))))
        self.n_copies = n_rows // len(every) * self.n_units
        self.n_fewer = max(FEWEST_ROWS // len(every), 1) * self.n_units
        many = [np.tile(every, n_rows // len(every))]
        self.of_copies = score_of(many, many)
        self.attained = [score]  # scores that some samples have
        self.left = 0  # how often the metric may yet be computed
        self.inner: tuple[np.ndarray, np.ndarray] | None = None

    def furthest(self, k: int, sign: int, slopes: np.ndarray) -> float:
        """Greatest value of `sign` times score `k`, looked for from its `slopes` at what was seen.

        Where the score is no straight line the search goes on along the slopes that it has at the
        end, and along the mean of all slopes met: at a minimum of several numbers one of them
        changes the score at a time. A product of two zeros has no slope, so that a second search
        begins inside, where nothing is 0.
        """
        first = self._extreme(sign * slopes)
        best, hoped = sign * self._at(first, k, slopes), sign * (first - self.seen) @ slopes
        flat = hoped <= TOLERANCE
        if self.inner is None and (flat or FEWEST_LOOKS * len(self.support) <= self.left):
            self.inner = self._slopes(self._inside())
        if self.inner is None:
            return best
        inside, inner_slopes = sign * self.inner[0][k], self.inner[1][:, k]
        # It is the top that is flat where the score is less inside.
        rises = flat and inside >= best and np.abs(inner_slopes).max() > TOLERANCE
        if flat and not rises:
            return best
        inner = self._extreme(sign * inner_slopes)
        value = sign * self._at(inner, k)
        gain = best - sign * self.score[k]
        straight = value <= best + TOLERANCE and abs(gain - hoped) <= 0.05 * hoped + TOLERANCE
        if straight and not rises:
            return best
        found, mean = first, slopes
        if rises or value > best + TOLERANCE:
            found, mean, best = inner, inner_slopes, max(best, value)
        mean = mean / max(np.abs(mean).max(), 1e-300)
        stale = 0
        for step in range(MOST_STEPS):
            if self.left < len(self.support) and not (rises and step < FEWEST_STEPS):
                break
            slopes = self._slopes(found)[1][:, k]
            slopes = slopes / max(np.abs(slopes).max(), 1e-300)
            mean = mean + (slopes - mean) / (step + 2)
            reached = [self._extreme(sign * one) for one in (slopes, mean)]
            values = [sign * self._at(one, k) for one in reached]
            found = reached[int(np.argmax(values))]
            stale += 1
            if max(values) > best + TOLERANCE:  # what is less is the rounding of copies
                best, stale = max(values), 0
            if stale >= PATIENCE and best > sign * self.score[k] + TOLERANCE:
                break
        return best

    def within(self, value: float, k: int, slopes: np.ndarray) -> float:
        """`value` of score `k`, no further than any samples have it.

        What mends the rounding of copies is a straight line, which may pass the best that data can
        give: where it is beyond all scores met, samples of the best unit of each stratum are asked.
        """
        if not np.min(self.attained, axis=0)[k] <= value <= np.max(self.attained, axis=0)[k]:
            strata = range(len(self.sizes))
            best = [int(np.argmax(np.where(self.stratum == s, slopes, -np.inf))) for s in strata]
            i, j = (
                [
                    np.tile(getattr(self.support[one], key), n)
                    for one, n in zip(best, self.sizes, strict=True)
                ]
                for key in ("rows", "predictions")
            )
            with contextlib.suppress(ValueError):  # a class may be lacking now
                self.attained.append(self.score_of(i, j))
        return float(np.clip(value, *(f(self.attained, axis=0)[k] for f in (np.min, np.max))))

    def _drawn(self, shares: np.ndarray, total: int) -> tuple[np.ndarray, Rows, Rows]:
        """About `total` units in these shares: how many of each, their rows and predictions."""
        copies = np.rint(total * shares / self.n).astype(int)
        copies = np.maximum(copies, self.share > UNSEEN)  # no class is to go missing
        i, j = (
            [np.tile(getattr(one, key), m) for one, m in zip(self.support, copies, strict=True)]
            for key in ("rows", "predictions")
        )
        return copies, i, j

    def _at(self, shares: np.ndarray, k: int, slopes: np.ndarray | None = None) -> float:
        """Score `k` where units have these shares; its slopes mend the rounding of copies."""
        copies, i, j = self._drawn(shares, self.n_copies)
        scores = self.score_of(i, j)
        self.attained.append(scores)
        change = (scores - self.of_copies)[k]
        if slopes is not None:
            change += (shares - copies * self.n / (copies * self.n).sum()) @ slopes
        return float(self.score[k] + change)

    def _slopes(self, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores where units have these shares, and their change with each further unit."""
        self.left -= len(self.support)
        copies, i, j = self._drawn(shares, self.n_fewer)
        scores, size = self.score_of(i, j), (copies * self.n).sum()
        more = [self.score_of([*i, one.rows], [*j, one.predictions]) for one in self.support]
        change = np.nan_to_num(np.array(more) - scores, posinf=0.0, neginf=0.0)
        return scores, change * ((size + self.n) / self.n)[:, np.newaxis]

    def _inside(self) -> np.ndarray:
        """What was seen and, in each stratum, one unit more that is a little of every kind."""
        n, n_kinds = self.sizes[self.stratum], np.bincount(self.stratum)[self.stratum]
        return (self.share * n + 1 / n_kinds) / (n + 1) * n / self.n_units

    def _extreme(self, value: np.ndarray) -> np.ndarray:
        return _extreme(value, self.share, self.cost, self.stratum, self.sizes, self.z)


def _extreme(
    value: np.ndarray,
    share: np.ndarray,
    cost: np.ndarray,
    stratum: np.ndarray,
    sizes: np.ndarray,
    z: float,
) -> np.ndarray:
    """Shares of all units with the greatest mean value that Pearson's test does not reject.

    With a multiplier for the sum of squares and one for each sum of shares to be 1, the extreme is
    q = p / sqrt(1 - (t v - a_s) / n_s) in closed form.
    """
    n_strata, n = len(sizes), sizes.sum()
    of_stratum = sizes / n
    starts = np.searchsorted(stratum, np.arange(n_strata))
    # One more stratum holds the strata themselves.
    p = np.concatenate([share, of_stratum])
    v = np.concatenate([of_stratum[stratum] * value, np.add.reduceat(share * value, starts)])
    c = np.concatenate([cost, np.full(n_strata, n)])
    starts = np.append(starts, len(share))
    of = np.concatenate([stratum, np.full(n_strata, n_strata)])
    v = v - np.add.reduceat(p * v, starts)[of]
    scale = np.abs(v).max()

    def shares(t: float) -> np.ndarray:
        x = t * v - c
        a = np.maximum.reduceat(x + c * p**2, starts)  # left of where the sum is 1
        for _ in range(100):
            root = np.sqrt(np.maximum(a[of] - x, 1e-90) / c)
            total = np.add.reduceat(p / root, starts)
            # Newton's step to where total**-2 is 1, which is nearly straight in a, and concave.
            before, a = a, a + (total**3 - total) / np.add.reduceat(p / (c * root**3), starts)
            if total.max() < 1 + 1e-10 or (a == before).all():
                break
        return p / root

    def excess(log_t: float) -> float:
        q = shares(np.exp(log_t))
        return float(np.log(max((c * (p - q) ** 2 / q).sum(), 1e-300) / z**2))

    low, high = np.log(1e-6 / max(scale, 1e-300)), np.log(1e6 * n / max(scale, 1e-300))
    if scale <= 1e-12 or excess(high) < 0:  # nothing changes the score
        q = p
    else:
        q = shares(np.exp(optimize.brentq(excess, low, high, xtol=1e-6)))
    return q[: len(share)] * q[len(share) :][stratum]
