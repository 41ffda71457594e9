"""From index plans to device batches.

A *plan* says which rows meet in which step; :class:`Batches` turns a plan into tensors on the
device. Plans are lists of index arrays, drawn once per epoch from one NumPy generator, so that no
Python runs per sample.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from imblearn.over_sampling import RandomOverSampler
from imblearn.under_sampling import RandomUnderSampler
from sklearn.base import clone
from sklearn.utils import check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from torch.utils.data import Sampler

from sklearn_medimb.augment import Augmentation
from sklearn_medimb._data.images import Images, to_unit_scale
from sklearn_medimb._machine.randomness import redirected

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
        y = column_or_1d(y)
        if not len(y):
            raise ValueError("y is empty: there is nothing to draw batches from.")
        check_classification_targets(y)
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
        _, labels = sampler.fit_resample(X, self.labels[self.y])
        rows = getattr(sampler, "sample_indices_", None)
        if rows is None or len(rows) != len(labels):
            raise ValueError(
                f"sampler={type(sampler).__name__} makes new rows: batches need one that selects "
                "or repeats rows, such as RandomOverSampler or RandomUnderSampler."
            )
        return np.asarray(rows, dtype=np.intp)


def image_format(n_axes: int, channels_last: bool) -> torch.memory_format:
    """Memory format of tensors with so many axes; only (n, C, *spatial) can be channels-last."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d} if channels_last else {}
    return last.get(n_axes, torch.contiguous_format)


class Preprocessor:
    """uint8 or float rows to normalised, optionally augmented, device batches.

    Parameters
    ----------
    mean, std : ndarray of shape (C,)
        The fitted channel statistics.
    dtype : torch.dtype
        float32 or float64.
    device : torch.device
        Where the batches go.
    channels_last : bool
        Memory format of image batches.
    """

    def __init__(
        self,
        mean: np.ndarray,
        std: np.ndarray,
        *,
        dtype: torch.dtype,
        device: torch.device,
        channels_last: bool = False,
    ) -> None:
        self.mean = torch.as_tensor(mean, dtype=dtype, device=device)
        self.std = torch.as_tensor(std, dtype=dtype, device=device)
        self.dtype = dtype
        self.device = device
        self.channels_last = channels_last

    def upload(self, rows: torch.Tensor) -> torch.Tensor:
        """Send rows to the device in their own dtype: uint8 is a quarter of the traffic."""
        if self.device.type == "cuda":
            return rows.pin_memory().to(self.device, non_blocking=True)
        return rows.to(self.device)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Apply ``(x - mean) / std`` per channel."""
        per_channel = (1, -1, *[1] * (images.ndim - 2))
        images = images.sub(self.mean.view(per_channel)).div_(self.std.view(per_channel))
        return images.contiguous(memory_format=image_format(images.ndim, self.channels_last))

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Whole path without augmentation, as used at predict."""
        return self.normalise(to_unit_scale(self.upload(rows), self.dtype))


class Batches:
    """One training epoch per iteration: pairs ``(images, targets)`` on the device.

    Parameters
    ----------
    images : Images
        All images of the caller.
    rows : ndarray of int
        The training rows among them; plans count within `rows`.
    targets : tensor
        One target per training row, on the device.
    plan : callable
        ``plan(rng)`` gives the epoch's index arrays.
    preprocess : Preprocessor
        Normalisation and device.
    views : sequence of Augmentation
        Each gives one copy of a batch, all stacked along the first axis.
    rng : numpy.random.Generator
        For the plans.
    generator : torch.Generator
        For the augmentation, on the device.
    """

    # One resident copy on an accelerator may take this share of its free memory.
    resident_share = 0.5

    def __init__(
        self,
        images: Images,
        rows: np.ndarray,
        targets: torch.Tensor,
        plan: Plan,
        preprocess: Preprocessor,
        views: Sequence[Augmentation],
        *,
        rng: np.random.Generator,
        generator: torch.Generator,
    ) -> None:
        self.images = images
        self.rows = rows
        self.targets = targets
        self.plan = plan
        self.preprocess = preprocess
        self.views = views
        self.rng = rng
        self.generator = generator
        self.resident = self._resident_copy()

    def _resident_copy(self) -> torch.Tensor | None:
        """All training rows on the accelerator, in their stored dtype, where they fit."""
        device = self.preprocess.device
        if device.type != "cuda" or not self.images.in_blocks:
            return None
        n_bytes = (
            len(self.rows) * int(np.prod(self.images.image_shape)) * self.images.dtype.itemsize
        )
        free, _ = torch.cuda.mem_get_info(device)
        if n_bytes > self.resident_share * free:
            return None
        resident, done = None, 0
        for part in np.array_split(self.rows, max(1, n_bytes // 2**26)):
            block = self.images.rows(part)
            if resident is None:
                resident = torch.empty(
                    (len(self.rows), *block.shape[1:]), dtype=block.dtype, device=device
                )
            resident[done : done + len(block)] = block.to(device)
            done += len(block)
        return resident

    def with_plan(self, plan: Plan) -> Batches:
        """Batches of the same images by another plan; nothing is copied."""
        other = copy.copy(self)
        other.plan = plan
        return other

    def with_views(self, *views: Augmentation) -> Batches:
        """Batches of the same images by the same plan in other views."""
        other = copy.copy(self)
        other.views = views
        return other

    def gather(self, picks: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Images of some training rows on the unit scale, and their targets, on the device."""
        index = self.preprocess.upload(torch.from_numpy(picks))
        if self.resident is not None:
            raw = self.resident[index]
        else:
            # Items of a data set, which the caller's own code makes, may be drawn anew each time.
            with redirected(self.images.lazy):
                raw = self.images.rows(self.rows[picks])
            raw = self.preprocess.upload(raw)
        return to_unit_scale(raw, self.preprocess.dtype), self.targets[index]

    def draw(self, images: torch.Tensor, augmentation: Augmentation) -> dict[str, Any] | None:
        """What `augmentation` will do to images; None where they stay as they are."""
        # Vectors are not augmented. Of the caller's own augmentations, draw and apply are asked.
        if images.ndim < 4 or getattr(augmentation, "is_identity", False):
            return None
        with redirected(not isinstance(augmentation, Augmentation)):
            return augmentation.draw(len(images), tuple(images.shape[1:]), self.generator)

    def view(self, images: torch.Tensor, augmentation: Augmentation) -> torch.Tensor:
        """One augmented copy of images, still on the unit scale."""
        params = self.draw(images, augmentation)
        if params is None:
            return images
        with redirected(not isinstance(augmentation, Augmentation)):
            return augmentation.apply(images, params)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for picks in self.plan(self.rng):
            images, targets = self.gather(picks)
            views = [self.view(images, augmentation) for augmentation in self.views]
            stacked = views[0] if len(views) == 1 else torch.cat(views)
            yield self.preprocess.normalise(stacked), targets
