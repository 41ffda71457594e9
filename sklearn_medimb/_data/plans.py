"""Plans: which rows meet in which step.

A plan is a list of index arrays, drawn once per epoch from one NumPy generator, so that no Python
runs per sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from numbers import Integral
from typing import Any

import numpy as np
from imblearn.over_sampling import RandomOverSampler
from imblearn.under_sampling import RandomUnderSampler
from sklearn.base import clone
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from torch.utils.data import Sampler

from sklearn_medimb._data.labels import read_labels, warn_of_marks
from sklearn_medimb._data.rows import known_labels

Plan = Callable[[np.random.Generator], list[np.ndarray]]


def n_batches(n_rows: int, batch_size: int, at_least: int = 1) -> int:
    """Batches of nearly equal size that cover all rows, none with fewer than `at_least`."""
    return max(1, min(-(-n_rows // batch_size), n_rows // at_least))


def shuffled(
    n_rows: int, batch_size: int, rng: np.random.Generator, at_least: int = 1
) -> list[np.ndarray]:
    """Each row once per epoch, in batches of nearly equal size, `at_least` rows in each.

    Near-equal sizes (79 batches of 63 or 64 rows rather than 78 of 64 and one of 8) spare batch
    normalisation the tiny last batch. All rows together are one batch where they fit.
    """
    n = n_batches(n_rows, batch_size, at_least)
    return [np.arange(n_rows)] if n == 1 else np.array_split(rng.permutation(n_rows), n)


def class_balanced(
    y: np.ndarray, batch_size: int, n_batches: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Batches with equally many rows of each class.

    A batch holds ``batch_size // n_classes`` rows of every class; the places left over go to
    different classes, which take turns. So class counts differ by at most one, within a batch and
    over all of them. The rows of a class take turns as well: none is drawn again before all were
    drawn once, and none is twice in a batch unless its class has fewer rows than places.

    Parameters
    ----------
    y : ndarray of int of shape (n_rows,)
        Class of each row.
    batch_size, n_batches : int
        Size of the plan.
    rng : numpy.random.Generator
        Source of randomness.

    Returns
    -------
    plan : list of n_batches ndarrays of shape (batch_size,)
        Row numbers. A batch begins with a row of every class, in random order, then comes the
        second of every class and so on, so that its parts are balanced too.
    """
    classes = np.unique(y)
    n_each, n_left = divmod(batch_size, len(classes))
    rounds = rng.permuted(np.tile(classes, (n_batches * n_each, 1)), axis=1)
    left = _deal(classes, np.full(n_batches, n_left), rng)
    turns = np.hstack(
        [rounds.reshape(n_batches, n_each * len(classes)), left.reshape(n_batches, n_left)]
    )
    rows = np.empty(turns.shape, dtype=np.intp)
    for label in classes:
        places = turns == label
        rows[places] = _deal(np.flatnonzero(y == label), places.sum(axis=1), rng)
    return list(rows)


def _deal(cards: np.ndarray, hands: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Deal hands of given sizes, one after another, from a deck that is reshuffled when used up."""
    dealt, deck = [cards[:0]], cards[:0]
    for size in hands[hands > 0]:
        if size > len(deck):
            n_decks = -(-(size - len(deck)) // len(cards))
            fresh = rng.permuted(np.tile(cards, (n_decks, 1)), axis=1)
            # The rest of the old deck opens this hand: the new one has those cards at its bottom.
            fresh[0] = fresh[0][np.argsort(np.isin(fresh[0], deck), kind="stable")]
            deck = np.concatenate([deck, fresh.ravel()])
        dealt.append(deck[:size])
        deck = deck[size:]
    return np.concatenate(dealt)


def pk(
    y: np.ndarray,
    n_classes: int,
    n_per_class: int,
    n_batches: int,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """P x K batches for metric learning: K rows of each of P classes.

    Classes take turns, and so do the rows of a class: every class is in as many batches as any
    other, but for one, and none of its rows comes again before all came once. A row is twice in a
    batch only where its class has fewer than K rows.

    Parameters
    ----------
    y : ndarray of int of shape (n_rows,)
        Class of each row.
    n_classes, n_per_class : int
        P, at most the number of classes in `y`, and K.
    n_batches : int
        Length of the plan.
    rng : numpy.random.Generator
        Source of randomness.

    Returns
    -------
    plan : list of n_batches ndarrays of shape (P K,)
        Row numbers, class by class.
    """
    classes = np.unique(y)
    turns = _deal(classes, np.full(n_batches, n_classes), rng)
    rows = np.empty((len(turns), n_per_class), dtype=np.intp)
    for label in classes:
        hands = np.full((turns == label).sum(), n_per_class)
        rows[turns == label] = _deal(np.flatnonzero(y == label), hands, rng).reshape(
            -1, n_per_class
        )
    return list(rows.reshape(n_batches, -1))


class BalancedBatchSampler(Sampler[list[int]]):
    """Balanced batches for a :class:`torch.utils.data.DataLoader`.

    ``DataLoader(dataset, batch_sampler=BalancedBatchSampler(y))``: class-balanced batches, P x K
    batches, or batches of what an imbalanced-learn sampler selects. Batches are drawn anew for
    each epoch from `random_state` and the number of the epoch.

    Each epoch covers the tail: all rows of every class that is no larger than the average one.

    Parameters
    ----------
    y : array-like of shape (n,)
        Class labels of the data set, numbers or strings.
    sampler : imbalanced-learn sampler or None, default=None
        One that selects or repeats rows: its selection, shuffled, is the epoch. None takes `plan`.
    X : array-like of shape (n, n_features), default=None
        Features for samplers that look at them, such as ``NearMiss``; random ones need none.
    plan : {"class_balanced", "pk"}, default="class_balanced"
        "class_balanced" fills each batch with equally many rows of every class, as near as
        `batch_size` allows; "pk" takes `n_per_class` rows of ``batch_size // n_per_class`` classes.
    batch_size : int, default=32
        Rows per batch; with "pk" at most as many as all classes together give.
    n_per_class : int, default=4
        K of "pk".
    n_batches : int or None, default=None
        Batches per epoch; None is about one pass over the data, with "pk" as many as the tail
        needs. Unused with `sampler`.
    random_state : int, RandomState or None, default=None
        Seeds all epochs.

    References
    ----------
    P x K batches: A. Hermans, L. Beyer, B. Leibe, "In defense of the triplet loss for person
    re-identification", arXiv 1703.07737, 2017.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn_medimb import BalancedBatchSampler
    >>> y = np.repeat(["nevus", "melanoma"], [90, 10])
    >>> batches = BalancedBatchSampler(y, batch_size=8, random_state=0)
    >>> len(batches), [(y[batch] == "melanoma").sum().item() for batch in batches][:4]
    (13, [4, 4, 4, 4])
    """

    def __init__(
        self,
        y: Any,
        sampler: Any = None,
        *,
        X: Any = None,
        plan: str = "class_balanced",
        batch_size: int = 32,
        n_per_class: int = 4,
        n_batches: int | None = None,
        random_state: Any = None,
    ) -> None:
        numbers = {"batch_size": batch_size, "n_per_class": n_per_class}
        if n_batches is not None:
            numbers["n_batches"] = n_batches
        for name, value in numbers.items():
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number above 0.")
        if sampler is not None and not hasattr(sampler, "fit_resample"):
            raise TypeError(f"sampler={sampler!r} must be an imbalanced-learn sampler.")
        blind = isinstance(sampler, (RandomOverSampler, RandomUnderSampler))
        if sampler is not None and X is None and not blind:
            raise ValueError(
                f"sampler={type(sampler).__name__} looks at features: pass X=..., or take "
                "RandomOverSampler or RandomUnderSampler."
            )
        if plan not in ("class_balanced", "pk"):
            raise ValueError(f'plan={plan!r} must be "class_balanced" or "pk".')
        if plan == "pk" and batch_size < n_per_class:
            raise ValueError(
                f"batch_size={batch_size} holds no class of n_per_class={n_per_class} rows."
            )
        y = read_labels(y)
        if not len(y):
            raise ValueError("y is empty: there is nothing to draw batches from.")
        check_classification_targets(y)
        warn_of_marks(type(self).__name__, y)
        self.labels, self.y = np.unique(y, return_inverse=True)
        self.sampler = sampler
        self.X = X
        self.plan = plan
        self.n_per_class = n_per_class
        if plan == "pk":
            batch_size = n_per_class * min(batch_size // n_per_class, len(self.labels))
        self.batch_size = batch_size
        self.n_batches = n_batches or -(-len(y) // batch_size)
        if plan == "pk" and n_batches is None:
            # A class of average size, n / C rows, needs n / (C K) turns; each batch gives P of C.
            turns = -(-(len(y) // len(self.labels)) // n_per_class)
            n_classes = batch_size // n_per_class
            self.n_batches = -(-max(turns, 1) * len(self.labels) // n_classes)
        self.seed = int(check_random_state(random_state).randint(2**31 - 1))
        self.epoch = 0
        self._batches: tuple[int, list[np.ndarray]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches come next; without this call each pass is the next one.

        Parameters
        ----------
        epoch : int
            Number of the epoch, from 0.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n_batches if self.sampler is None else len(self._drawn())

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._drawn()
        self.epoch += 1
        yield from (batch.tolist() for batch in batches)

    def _drawn(self) -> list[np.ndarray]:
        """Batches of the present epoch, drawn once."""
        if self._batches is None or self._batches[0] != self.epoch:
            self._batches = self.epoch, self._draw(np.random.default_rng([self.seed, self.epoch]))
        return self._batches[1]

    def _draw(self, rng: np.random.Generator) -> list[np.ndarray]:
        if self.sampler is not None:
            rows = self._selected(int(rng.integers(2**31 - 1)))
            picks = shuffled(len(rows), self.batch_size, rng)
            return [rows[pick] for pick in picks]
        if self.plan == "pk":
            n_classes = self.batch_size // self.n_per_class
            return pk(self.y, n_classes, self.n_per_class, self.n_batches, rng)
        return class_balanced(self.y, self.batch_size, self.n_batches, rng)

    def _selected(self, seed: int) -> np.ndarray:
        """Rows that the imbalanced-learn sampler keeps or repeats."""
        sampler = clone(self.sampler)
        if "random_state" in sampler.get_params(deep=False):
            sampler.set_params(random_state=seed)
        X = np.zeros((len(self.y), 1)) if self.X is None else self.X
        with known_labels():
            _, labels = sampler.fit_resample(X, self.labels[self.y])
        rows = getattr(sampler, "sample_indices_", None)
        if rows is None or len(rows) != len(labels):
            raise ValueError(
                f"sampler={type(sampler).__name__} makes new rows: batches need one that selects "
                "or repeats rows, such as RandomOverSampler or RandomUnderSampler."
            )
        return np.asarray(rows, dtype=np.intp)
