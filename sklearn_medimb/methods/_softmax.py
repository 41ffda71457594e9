"""The baseline to beat: one network, one softmax, and every classical loss for imbalance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.base import _fit_context

from sklearn_medimb._data.batches import Batches, BatchSource, Context
from sklearn_medimb._data.plans import class_balanced
from sklearn_medimb._parameters import above, one_of, parameter
from sklearn_medimb._training.stage import TrainingSet
from sklearn_medimb.base._one_stage import OneStageClassifier

if TYPE_CHECKING:
    from typing import Self


class MixedBatches(BatchSource):
    """Convex combinations of samples and of their label masses.

    Plain mixup [1]_ mixes a batch with itself in another order; balanced mixup [2]_ mixes it with a
    second, class-balanced draw, the balanced side weighing ``lambda ~ Beta(alpha, 1)``.

    Parameters
    ----------
    batches : Batches
        Where the samples come from.
    alpha : float
        Of the Beta distribution.
    partners : Batches, default=None
        The balanced draw; None mixes within the batch.

    References
    ----------
    .. [1] H. Zhang et al., "mixup: beyond empirical risk minimization", ICLR 2018.
    .. [2] A. Galdran et al., "Balanced-MixUp for highly imbalanced medical image classification",
       MICCAI 2021, eq. 4.
    """

    def __init__(self, batches: Batches, alpha: float, partners: Batches | None = None) -> None:
        self.batches = batches
        self.alpha = alpha
        self.partners = partners
        self.generator = batches.generator

    def orders(self) -> Iterator[dict[str, Any]]:
        """Two orders a step, or one and another order of the same batch; and the shares."""
        batches, rng = self.batches, self.batches.rng
        b = self.alpha if self.partners is None else 1.0
        partners = None if self.partners is None else self.partners.orders()
        for own in batches.orders():
            n = len(own["index"])
            if partners is None:
                order = {"own": own, "others": batches.upload(rng.permutation(n))}
            else:
                order = {"own": own, "partners": next(partners)}
            share = batches.upload(rng.beta(self.alpha, b, n))
            yield order | {"share": share.to(batches.preprocess.dtype)}

    def make(self, order: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the mixed images and their masses."""
        images, mass = self.batches.make(order["own"])
        if self.partners is None:
            others, other_mass = images[order["others"]], mass[order["others"]]
        else:
            others, other_mass = (
                part[: len(images)] for part in self.partners.make(order["partners"])
            )
        share = order["share"]
        column = share.view(-1, *[1] * (images.ndim - 1))
        return (
            torch.lerp(images, others, column),
            torch.lerp(mass, other_mass, share.unsqueeze(1)),
        )


class SoftmaxClassifier(OneStageClassifier):
    """A network with a softmax head and the classical remedies for class imbalance.

    The strong baseline of the package: whatever a paper promises has to beat this one with the same
    backbone, augmentation and optimiser.

    Parameters
    ----------
    mixup
        Mix samples and labels; "balanced" mixes each batch with a class-balanced one (A. Galdran et
        al., MICCAI 2021).
    mixup_alpha
        Of the Beta distribution behind the mixing shares.

    See Also
    --------
    sklearn_medimb.CSSNClassifier : Classification by comparison with a support bank.
    imblearn.ensemble.BalancedRandomForestClassifier : A baseline without a network.

    References
    ----------
    .. [1] T.-Y. Lin et al., "Focal loss for dense object detection", ICCV 2017.
    .. [2] Y. Cui et al., "Class-balanced loss based on effective number of samples", CVPR 2019.
    .. [3] K. Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss",
       NeurIPS 2019.
    .. [4] J. Ren et al., "Balanced meta-softmax for long-tailed visual recognition", NeurIPS 2020.
    .. [5] A. K. Menon et al., "Long-tail learning via logit adjustment", ICLR 2021.
    .. [6] A. Galdran et al., "Balanced-MixUp for highly imbalanced medical image classification",
       MICCAI 2021.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_medimb import SoftmaxClassifier
    >>> X, y = load_digits(n_class=3, return_X_y=True)
    >>> clf = SoftmaxClassifier(image_shape=(8, 8), loss="balanced_softmax", max_epochs=3,
    ...                         random_state=0)
    >>> clf.fit(X[:300], y[:300]).predict(X[300:]).shape
    (237,)
    """

    mixup: str | None = parameter(one_of("mixup", "balanced"), None, default=None, search=True)
    mixup_alpha: float = parameter(above(0), default=0.2, search=(0.05, 2.0, "log"))

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, *, sample_weight: Any = None, groups: Any = None) -> Self:
        """Train the network.

        Parameters
        ----------
        X : array-like or lazy sequence of n images
            Images in any layout of the package's guide, uint8 or float.
        y : array-like of shape (n,)
            Class labels: numbers or strings, at least two classes.
        sample_weight : array-like of shape (n,), default=None
            Non-negative weights; only their ratios matter.
        groups : array-like of shape (n,), default=None
            Patient of each image: the inner validation split keeps every group whole.

        Returns
        -------
        self : estimator
            The fitted classifier.

        Raises
        ------
        ValueError
            If the input is wrong or ambiguous; the message names the parameter or row to mend.
        """
        return self._fit(X, y, sample_weight=sample_weight, groups=groups)

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(
        self, X: Any, y: Any, classes: Any = None, *, sample_weight: Any = None
    ) -> Self:
        """Train one more epoch on the given images, at a constant learning rate.

        Parameters
        ----------
        X : array-like or lazy sequence of n images
            A portion of the training images. The first portion decides the normalisation.
        y : array-like of shape (n,)
            Their labels.
        classes : array-like of shape (n_classes,), default=None
            All classes; needed in the first call unless `y` holds them all.
        sample_weight : array-like of shape (n,), default=None
            Non-negative weights.

        Returns
        -------
        self : estimator
            The classifier so far.
        """
        before = None
        if self.__sklearn_is_fitted__():
            before = self.class_counts_, self.class_prior_
        self._fit(X, y, sample_weight=sample_weight, classes=classes, partial=True)
        if before is not None:
            portions = before, (self.class_counts_, self.class_prior_)
            self.class_counts_ = before[0] + self.class_counts_
            self.class_prior_ = _prior_of_all(portions)
        return self

    # ---------------------------------------------------------------- batches

    def _class_mass(self, train: TrainingSet) -> np.ndarray:
        mass = super()._class_mass(train)
        if self.mixup != "balanced":
            return mass
        counts = np.bincount(train.y, minlength=len(mass))
        n_classes = np.count_nonzero(counts)
        drawn = mass * len(train.y) / (n_classes * counts.clip(min=1))
        share = self.mixup_alpha / (self.mixup_alpha + 1)  # mean of Beta(alpha, 1)
        return np.where(counts > 0, (1 - share) * mass + share * drawn, mass)

    def _make_batches(self, train: TrainingSet, context: Context) -> Any:
        n, plain = len(train.y), super()._make_batches(train, context)
        if self.mixup is None:
            return plain
        if self.mixup == "mixup":
            return MixedBatches(plain, self.mixup_alpha)
        size, steps = min(self.batch_size, n), self._steps_per_epoch(n)
        balanced = plain.with_plan(lambda rng: class_balanced(train.y, size, steps, rng))
        return MixedBatches(plain, self.mixup_alpha, balanced)


def _prior_of_all(portions: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Class shares of several portions from their class counts and their own shares.

    A class that a portion lacks has the share of one sample there, which is none of its own.
    """
    mass = np.zeros(len(portions[0][0]))
    for counts, prior in portions:
        own = np.where(counts > 0, prior, 0)
        mass += counts.sum() * own / own.sum()
    mass = np.where(mass > 0, mass, 1.0)
    return mass / mass.sum()
