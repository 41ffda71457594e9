"""What images, labels and patients say before any of them is learned from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.utils.multiclass import check_classification_targets

from sklearn_medimb._data.containers import is_lazy
from sklearn_medimb._data.files import wrap_dataset
from sklearn_medimb._data.images import as_array, read_images
from sklearn_medimb._data.labels import is_mark, read_labels
from sklearn_medimb._data.rows import group_codes
from sklearn_medimb.augment import resolve_augmentation
from sklearn_medimb.methods import SoftmaxClassifier

SIDE = 128  # pixels a side: that of the evidence of starts; larger images come to it
N_LOOKED_AT = 64  # images that are read for their size, where nothing else says it


class Data(NamedTuple):
    """What is read from the images and labels."""

    rows: np.ndarray  # with a label
    labels: np.ndarray  # of these
    patients: np.ndarray | None
    n_without: int
    classes: np.ndarray
    counts: np.ndarray
    shape: tuple[int, ...]  # channels, and the largest sides that were seen
    several_sizes: bool
    surely_of_one: bool  # size, every image of them
    in_one_array: bool

    @property
    def dims(self) -> int:
        """Spatial axes of an image; 0 of a vector."""
        return len(self.shape) - 1

    @property
    def ratio(self) -> float:
        return float(self.counts.max() / self.counts.min())

    def told(self, spatial: Sequence[int]) -> str:
        """In words, with the sides that images come to."""
        what = "feature vectors" if len(self.shape) == 1 else "images"
        size = "any size" if self.several_sizes else " x ".join(map(str, self.shape))
        if self.several_sizes or (len(self.shape) > 1 and tuple(spatial) != self.shape[1:]):
            size += f", brought to {' x '.join(map(str, spatial))}"
        rarest = self.classes[self.counts.argmin()]
        ratio = float(f"{self.ratio:.2g}")
        text = (
            f"{len(self.rows)} labelled {what} of {size}, "
            f"{len(self.classes)} classes, the rarest ({rarest}) with {self.counts.min()} "
            f"(1 : {ratio:g})"
        )
        if self.n_without:
            text += f", {self.n_without} without a label"
        if self.patients is not None:
            text += f", {len(np.unique(self.patients))} patients"
        return text


def read(X: Any, y: Any, groups: Any, params: Mapping[str, Any]) -> Data:
    """Labels in full, of the images what `params`, of networks, make of them."""
    reader = SoftmaxClassifier(**params)
    reader._validate_params()
    reader._check_parameters()
    resolve_augmentation(reader.augment)
    y = read_labels(y, mixed=True)
    patients = None if groups is None else group_codes(groups, y)
    known = ~is_mark(y)
    if len(set(y[known].tolist())) < 2:  # then -1 is a class
        known[:] = True
    labels = read_labels(y[known], name="y" if known.all() else "y without -1")
    if labels.dtype == object and not known.all():  # mixed with the number -1 so far
        labels = np.asarray(labels.tolist())
    check_classification_targets(labels)
    X = as_array(wrap_dataset(X), of_any_size=True)
    if is_lazy(X) and reader.image_size is None:
        reader.image_size = SIDE  # whatever their size
    names = "image_shape", "data_format", "spatial_dims", "image_size"
    images = read_images(reader, X, reset=True, **{name: getattr(reader, name) for name in names})
    if len(images) != len(y):
        raise ValueError(f"X holds {len(images)} images, y {len(y)} labels.")
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"y holds one class only, {classes.tolist()}.")
    sizes = images.sizes(N_LOOKED_AT)
    return Data(
        rows=np.flatnonzero(known),
        labels=labels,
        patients=None if patients is None else patients[known],
        n_without=int((~known).sum()),
        classes=classes,
        counts=counts,
        shape=(images.layout.shape[0], *map(max, zip(*sizes, strict=True))),
        several_sizes=len(sizes) > 1,
        surely_of_one=images.in_blocks,
        in_one_array=not images.lazy,
    )
