"""Which rows train and which validate; resampling comes after that split, never before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import date
from inspect import signature
from numbers import Number
from typing import Any

import numpy as np
from imblearn.over_sampling import RandomOverSampler
from imblearn.over_sampling.base import BaseOverSampler
from imblearn.under_sampling import RandomUnderSampler
from sklearn.base import clone

from sklearn_medimb._data.containers import ExtendedImages, ImageRows
from sklearn_medimb._data.images import Images
from sklearn_medimb._data.layout import Layout
from sklearn_medimb._data.pixel_scale import FOLD

_KNOWN: ContextVar[bool] = ContextVar("labels that have passed the gate", default=False)


@contextmanager
def known_labels() -> Iterator[None]:
    """Labels that are handed on within the block were warned of before."""
    token = _KNOWN.set(True)
    try:
        yield
    finally:
        _KNOWN.reset(token)


def are_known() -> bool:
    """Whether labels come from such a block."""
    return _KNOWN.get()


def group_codes(groups: Any, y: np.ndarray) -> np.ndarray:
    """Number the patients; the one place where patients are read.

    Parameters
    ----------
    groups : array-like of shape (n,)
        Patient of each image: numbers, strings or dates. Numbers compare by value: 1 and 1.0 are
        one patient.
    y : ndarray of shape (n,)
        The labels, whose shape it must have.

    Returns
    -------
    codes : ndarray of int of shape (n,)
        From 0.

    Raises
    ------
    ValueError
        If an entry is missing (None, NaN, NaT, NA, masked, blank, or one of these as text), since
        unknown patients are not one patient, or if kinds are mixed.
    """
    missing = missing_entries(groups, texts=True)
    groups = as_entries(groups)
    if groups.ndim == 2 and groups.shape[1] == 1:
        groups = groups.ravel()
    if groups.shape != y.shape:
        raise ValueError(
            f"groups has shape {groups.shape}; it needs one entry per image, {y.shape}. (After a "
            "resampler in a pipeline there are more images than patients' entries: put the "
            "resampler into sampler=.)"
        )
    if missing.any():
        raise ValueError(
            f"groups has no entry in row {missing.argmax()}: give each unknown patient one of its "
            "own."
        )
    if groups.dtype.kind in "mM":
        kinds = np.full(len(groups), "date")
    else:
        kinds = np.array([kind_of_entry(entry) for entry in groups.tolist()])
    if (other := kinds != kinds[:1]).any():
        row = other.argmax()
        raise ValueError(
            f"groups must hold patients of one kind, numbers or strings, not both: row 0 is a "
            f"{kinds[0]}, row {row} a {kinds[row]}."
        )
    try:
        return np.unique(groups, return_inverse=True)[1]
    except TypeError as error:
        raise ValueError(f"groups must hold numbers, strings or dates: {error}") from error


def missing_entries(values: Any, *, texts: bool = False) -> np.ndarray:
    """Find the entries that say nothing: None, NaN, NaT, NA, masked.

    Parameters
    ----------
    values : array-like
        Labels or patients, in one column or row.
    texts : bool, default=False
        Whether blanks, and these as `str` writes them, say nothing either. A class may have such a
        name.

    Returns
    -------
    missing : ndarray of bool of shape (n,)
        For each entry.
    """
    entries = as_entries(values).ravel()
    if entries.dtype.kind in "mM":
        missing = np.isnat(entries)
    elif entries.dtype.kind in "biu":
        missing = np.zeros(len(entries), dtype=bool)
    elif entries.dtype.kind in "fc":
        missing = np.isnan(entries)
    else:
        found = (_is_missing(entry, texts) for entry in entries.tolist())
        missing = np.fromiter(found, bool, len(entries))
    if np.ma.isMaskedArray(values):
        missing |= np.ma.getmaskarray(values).ravel()
    return missing


def as_entries(values: Any) -> np.ndarray:
    """An array, by way of objects for lists: beside strings NumPy would write NaN as text."""
    return np.asarray(values, dtype=None if hasattr(values, "__array__") else object)


def _is_missing(entry: Any, texts: bool) -> bool:
    if isinstance(entry, (str, bytes)):
        text = entry if isinstance(entry, str) else entry.decode(errors="replace")
        return texts and text.strip().lower() in ("", "nan", "nat", "none", "<na>")
    try:
        return entry is None or entry is np.ma.masked or bool(entry != entry)
    except (TypeError, ValueError, ArithmeticError):  # pandas.NA, Decimal("sNaN") do not compare
        return True


def kind_of_entry(entry: Any) -> str:
    """What may be compared with one another."""
    if isinstance(entry, Number) and not isinstance(entry, bool):
        return "number"
    if isinstance(entry, (date, np.datetime64)):
        return "date"
    return "string" if isinstance(entry, str) else type(entry).__name__


def carries_groups(images: Images) -> bool:
    """Whether a lazy container, or the data set in it, has `groups`: one entry for each of its own.

    They are only noticed, not used: a container that a split has cut may still carry all of them.
    """
    data = images.data
    owners = (data, getattr(data, "dataset", None)) if images.lazy else ()
    for owner in owners:
        groups: Any = getattr(owner, "groups", None)
        if owner is not None and hasattr(groups, "__len__") and len(groups) == len(owner):
            return True
    return False


def takes_groups(sampler: Any) -> bool:
    """Whether a sampler sees images, and minds whose they are."""
    return (
        hasattr(sampler, "data_format") and "groups" in signature(sampler.fit_resample).parameters
    )


def validation_split(
    y: np.ndarray,
    fraction: float,
    groups: np.ndarray | None,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Stratified split of row numbers that keeps every class, and every group whole.

    Each class gives up its share of rows, at least one where it has two, never its last one. With
    groups the shares are aimed at only: going through the groups in random order, each is held out
    that brings the shares nearer and leaves every class in training. Where none does, because all
    are too large, the one that misses the shares least is held out.

    Parameters
    ----------
    y : ndarray of int of shape (n,)
        Encoded classes.
    fraction : float
        Share of the rows to validate on.
    groups : ndarray of shape (n,) or None
        Rows of one group (a patient, say) stay together.
    rng : numpy.random.Generator
        Source of randomness.

    Returns
    -------
    train, valid : ndarray of int
        Row numbers, ascending.

    Raises
    ------
    ValueError
        If no split leaves rows on both sides and every class in training.
    """
    _, y, n_rows = np.unique(y, return_inverse=True, return_counts=True)
    wanted = np.clip(np.round(fraction * n_rows).astype(int), 1, n_rows - 1)
    if not wanted.any():
        raise ValueError(
            "No class has two samples: early_stopping needs a validation split, set "
            "early_stopping=False."
        )
    if groups is None:
        valid = np.concatenate(
            [
                rng.permutation(np.flatnonzero(y == label))[:n_valid]
                for label, n_valid in enumerate(wanted)
            ]
        )
    else:
        valid = np.flatnonzero(_groups_to_hold_out(y, n_rows, wanted, groups, rng))
    return np.setdiff1d(np.arange(len(y)), valid), np.sort(valid)


def _groups_to_hold_out(
    y: np.ndarray,
    n_rows: np.ndarray,
    wanted: np.ndarray,
    groups: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Mask of the rows whose groups together come near `wanted` rows of each class."""
    names, groups = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise ValueError("groups holds a single group: no validation split can keep it whole.")
    table = np.zeros((len(names), len(n_rows)), dtype=int)  # rows of each group and class
    np.add.at(table, (groups, y), 1)

    def miss(held: np.ndarray) -> float:
        return float(((held - wanted) ** 2 / n_rows).sum())

    order = rng.permutation(len(names))
    chosen, held = [], np.zeros_like(n_rows)
    for group in order:
        more = held + table[group]
        if (more < n_rows).all() and miss(more) < miss(held):
            chosen.append(group)
            held = more
    if not chosen:
        possible = [group for group in order if (table[group] < n_rows).all()]
        if not possible:
            raise ValueError(
                "No grouped validation split keeps every class in training: some class lies within "
                "one group. Set early_stopping=False."
            )
        chosen = [min(possible, key=lambda group: miss(table[group]))]
    return np.isin(groups, chosen)


def resample(
    sampler: Any,
    images: Images,
    rows: np.ndarray,
    y: np.ndarray,
    weight: np.ndarray | None,
    seed: int,
    *,
    classes: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> tuple[Images, np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """Apply an imbalanced-learn sampler to the training rows.

    Samplers that only repeat or drop rows work on row numbers, so that no image is copied or, in a
    lazy container, read. Samplers of images, which have a parameter `data_format`, see images,
    lazy ones included, and `groups` where they take them. Others see flattened images.

    Parameters
    ----------
    sampler : imbalanced-learn sampler
        Cloned; an unset ``random_state`` is derived from `seed`.
    images : Images
        All images.
    rows : ndarray of int of shape (n,)
        Training rows among `images`.
    y : ndarray of int of shape (n,)
        Their encoded classes.
    weight : ndarray of shape (n,) or None
        Their weights.
    seed : int
        Seed for the sampler.
    classes : ndarray of shape (n_classes,), default=None
        The caller's labels, ascending, of which ``sampling_strategy={label: n}`` speaks; None
        where `y` holds these labels itself.
    groups : ndarray of shape (n,), default=None
        Patient of each row.

    Returns
    -------
    images, rows, y, weight
        The resampled training set in the same form.
    origin : ndarray of int
        Row of the caller's images that each one is, -1 for made ones.

    Raises
    ------
    ValueError
        If the sampler makes new rows and weights were given, or the images are lazy; if it returns
        other classes, rows of another shape or scale, or values that are not finite.
    """
    sampler = clone(sampler)
    params = sampler.get_params()
    unset = [k for k, v in params.items() if k.split("__")[-1] == "random_state" and v is None]
    sampler.set_params(**dict.fromkeys(unset, seed))
    name = type(sampler).__name__
    labels = y if classes is None else classes[y]
    if isinstance(sampler, (RandomOverSampler, RandomUnderSampler)) and (
        getattr(sampler, "shrinkage", None) is None
    ):
        picks, _ = _resampled(sampler, np.arange(len(rows)).reshape(-1, 1), labels)
        picks = picks.ravel()
        kept = None if weight is None else weight[picks]
        return images, rows[picks], y[picks], kept, rows[picks]
    if weight is not None:
        raise ValueError(
            f"sampler={name} makes rows that no sample_weight belongs to: drop one of the two."
        )
    if any(key.endswith("__data_format") for key in params):
        raise ValueError(
            f"sampler={name} holds a sampler of images among its steps, where only flattened ones "
            "arrive: pass that sampler alone."
        )
    given = labels
    if "data_format" in params:
        metadata = {} if groups is None or not takes_groups(sampler) else {"groups": groups}
        images, labels = _resample_images(sampler, images, rows, labels, metadata)
    elif images.lazy:
        raise ValueError(
            f"sampler={name} needs every image in memory: pass X as an array, or use SPMixSampler, "
            "RandomOverSampler or RandomUnderSampler, which work on a lazy X."
        )
    else:
        block = images.data.take(rows, axis=0).reshape(len(rows), -1)
        whole = images.dtype == np.uint8  # differences of uint8 would wrap around
        before = block.astype(np.float32) if whole else block
        block, labels = _resampled(sampler, before, labels)
        block = _checked_pixels(name, before, block)
        block = np.rint(block).clip(0, 255) if whole else block
        block = np.ascontiguousarray(block, dtype=images.dtype)
        images = images.holding(block, images.layout)
    if len(labels) != len(images):
        raise ValueError(f"sampler={name} returned {len(images)} rows and {len(labels)} labels.")
    origin = _origin(sampler, rows, len(labels))
    known = np.flatnonzero(origin >= 0)
    order = np.argsort(rows)
    changed = labels[known] != given[order[np.searchsorted(rows, origin[known], sorter=order)]]
    if changed.any():
        row = known[changed.argmax()]
        raise ValueError(
            f"sampler={name} changes labels: row {origin[row]} of X comes back as {labels[row]!r}."
        )
    y = labels if classes is None else np.searchsorted(classes, labels)
    return images, np.arange(len(y)), y, None, origin


def _resampled(sampler: Any, X: Any, labels: np.ndarray, **metadata: Any) -> tuple[Any, np.ndarray]:
    """Apply a sampler; refuse labels that add a class or lose one, which no fit would notice."""
    name = type(sampler).__name__
    with known_labels():
        made = sampler.fit_resample(X, labels, **metadata)
    if not isinstance(made, (tuple, list)) or len(made) != 2:
        raise ValueError(f"sampler={name} returned {type(made).__name__}, not X and y.")
    drawn, y = made[0], np.asarray(made[1])
    if y.ndim != 1:
        raise ValueError(f"sampler={name} returned labels of shape {y.shape}.")
    known, found = set(labels.tolist()), set(y.tolist())
    if odd := sorted(map(repr, found - known)):
        raise ValueError(
            f"sampler={name} returned labels that it did not get: {', '.join(odd[:5])}."
        )
    if lost := sorted(known - found):
        raise ValueError(
            f"sampler={name} leaves no row of the classes {lost}, which then cannot be learned: "
            "choose another sampling_strategy."
        )
    return drawn, y


def _checked_pixels(name: str, before: np.ndarray, after: Any) -> np.ndarray:
    """Refuse rows of a sampler that are no images like those it got."""
    after = np.asarray(after.toarray() if hasattr(after, "toarray") else after)
    if after.dtype.kind not in "buif" or after.shape[1:] != before.shape[1:]:
        raise ValueError(
            f"sampler={name} got rows of shape {before.shape[1:]}, and returned {after.dtype} of "
            f"shape {after.shape[1:]}."
        )
    finite = np.isfinite(after.reshape(len(after), -1)).all(axis=1)
    if not finite.all():
        raise ValueError(f"sampler={name} returned NaN or infinity: see its row {finite.argmin()}.")
    heights = [(np.abs(part).max(initial=0), _level(part)) for part in (before, after)]
    peaks, levels = zip(*heights, strict=True)
    if all(max(pair) > FOLD * min(pair) for pair in (peaks, levels)):
        raise ValueError(
            f"sampler={name} changes the scale of X: it got values up to {peaks[0]:g} and returned "
            f"values up to {peaks[1]:g}, but predictions do without it."
        )
    return after


def _level(images: np.ndarray) -> float:
    """Root mean square of all values."""
    if not images.size:
        return 0.0
    return float(np.sqrt(np.mean([np.square(i, dtype=np.float64).mean() for i in images])))


def _origin(sampler: Any, rows: np.ndarray, n: int) -> np.ndarray:
    """Where each of the n resampled rows comes from, as far as the sampler tells; else -1."""
    chosen = getattr(sampler, "sample_indices_", None)
    origin = np.full(n, -1)
    if chosen is not None and len(chosen) == n:
        origin[:] = rows[np.asarray(chosen, dtype=int)]
    elif isinstance(sampler, BaseOverSampler) and not getattr(sampler, "replace", False):
        origin[: len(rows)] = rows  # originals come first
    return origin


def _resample_images(
    sampler: Any,
    images: Images,
    rows: np.ndarray,
    labels: np.ndarray,
    metadata: dict[str, np.ndarray],
) -> tuple[Images, np.ndarray]:
    """Let a sampler of images see them as they are, and tell it where their axes are."""
    X: Any
    shape, layout, data = images.image_shape, images.layout, images.data
    if images.lazy and layout.paired:
        raise ValueError(
            f"sampler={type(sampler).__name__} does not read lazy pairs: pass X as an array."
        )
    if images.resize is not None:
        data, layout = _ResizedImages(images), Layout(shape)
    if images.lazy:
        X = ExtendedImages(data, np.empty((0, *data.shape[1:]), data.dtype), rows)
    else:
        X, layout = images.rows(rows).numpy(), Layout(shape)
    sampler.set_params(image_shape=None)
    if len(shape) > 1:
        sampler.set_params(
            data_format="channels_last" if layout.channels_last else "channels_first",
            spatial_dims=len(shape) - 1,
        )
    drawn, labels = _resampled(sampler, X, labels, **metadata)
    if not images.lazy:
        name = type(sampler).__name__
        drawn = np.ascontiguousarray(_checked_pixels(name, X, drawn), dtype=images.dtype)
    return images.holding(drawn, layout), labels


class _ResizedImages(ImageRows):
    """Lazy images, each of them brought to its size as it is read."""

    def __init__(self, images: Images) -> None:
        self.images = images
        self.rows = np.arange(len(images))
        self.dtype = images.dtype
        self._image_shape = images.image_shape

    def _read(self, row: int) -> np.ndarray:
        return self.images.rows(np.array([row]))[0].numpy()
