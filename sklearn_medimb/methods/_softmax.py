"""The baseline to beat: one network, one softmax, and every classical loss for imbalance."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import _fit_context
from sklearn.utils._param_validation import Interval, StrOptions

from sklearn_medimb._data.batches import Batches
from sklearn_medimb._data.plans import class_balanced, shuffled
from sklearn_medimb._training.stage import TrainingSet
from sklearn_medimb.base._docs import shared_parameters
from sklearn_medimb.base._one_stage import OneStageClassifier


class MixedBatches:
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

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        rng = self.batches.rng
        b = self.alpha if self.partners is None else 1.0
        partners = None if self.partners is None else iter(self.partners)
        for images, mass in self.batches:
            if partners is None:
                order = torch.from_numpy(rng.permutation(len(images))).to(images.device)
                others, other_mass = images[order], mass[order]
            else:
                others, other_mass = (part[: len(images)] for part in next(partners))
            share = torch.from_numpy(rng.beta(self.alpha, b, len(images)))
            share = share.to(images.device, images.dtype)
            column = share.view(-1, *[1] * (images.ndim - 1))
            yield (
                torch.lerp(images, others, column),
                torch.lerp(mass, other_mass, share.unsqueeze(1)),
            )


@shared_parameters
class SoftmaxClassifier(OneStageClassifier):
    """A network with a softmax head and the classical remedies for class imbalance.

    The strong baseline of the package: whatever a paper promises has to beat this one with the same
    backbone, augmentation and optimiser.

    Parameters
    ----------
    {backbone}

    {pretrain}

    loss : {{"cross_entropy", "focal", "class_balanced", "ldam", "balanced_softmax", \
"logit_adjusted"}}, default="cross_entropy"
        "focal" [1]_; "class_balanced": cross-entropy weighted by effective numbers [2]_; "ldam":
        label-distribution-aware margins on a cosine head, with deferred re-weighting [3]_;
        "balanced_softmax" [4]_; "logit_adjusted" [5]_.

    class_weight : dict, "balanced" or None, default=None
        Weights of the classes, on top of `loss`; only their ratios matter.

    focal_gamma : float, default=2.0
        Focusing exponent of the focal loss.

    beta : float, default=0.999
        Of the effective numbers, for "class_balanced" and re-weighting.

    max_margin : float, default=0.5
        Largest LDAM margin, in cosine units.

    tau : float, default=1.0
        Strength of "logit_adjusted".

    post_hoc_tau : float, default=0.0
        Subtracts ``post_hoc_tau * log(prior)`` from the logits at predict [5]_; use it with
        ``loss="cross_entropy"``, where 1 aims at balanced accuracy.

    reweight_after : float, "auto" or None, default="auto"
        Share of the steps after which effective-number class weights switch on (deferred
        re-weighting). "auto": 0.5 with "ldam", never otherwise. The paper's 0.8 comes where the
        one-cycle schedule has little learning rate left to act with: on digits cut to 100 to 3
        images a class (eight seeds, balanced accuracy on images held out) 120 steps with 0.5, 0.8
        and None score .75, .65 and .61; after 780 steps 0.5 and 0.8 are level at .92.

    mixup : {{"mixup", "balanced"}} or None, default=None
        Mix samples and labels; "balanced" mixes each batch with a class-balanced one [6]_.

    mixup_alpha : float, default=0.2
        Of the Beta distribution behind the mixing shares.

    batch_size : int, default=64
        Images per step.

    {training}

    Attributes
    ----------
    {attributes}

    class_prior_ : ndarray of shape (n_classes,)
        Class shares of the training rows, as they were resampled, weighted and mixed.

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

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **OneStageClassifier._parameter_constraints,
        "mixup": [StrOptions({"mixup", "balanced"}), None],
        "mixup_alpha": [Interval(Real, 0, None, closed="neither")],
    }

    def __init__(
        self,
        backbone: Any = "auto",
        *,
        pretrain: Any = None,
        loss: str = "cross_entropy",
        class_weight: Any = None,
        focal_gamma: float = 2.0,
        beta: float = 0.999,
        max_margin: float = 0.5,
        tau: float = 1.0,
        post_hoc_tau: float = 0.0,
        reweight_after: Any = "auto",
        mixup: str | None = None,
        mixup_alpha: float = 0.2,
        max_epochs: Any = "auto",
        batch_size: int = 64,
        lr: float = 2e-3,
        weight_decay: float = 1e-2,
        lr_schedule: str = "one_cycle",
        augment: Any = "medical",
        sampler: Any = None,
        early_stopping: bool = False,
        validation_fraction: float = 0.2,
        n_iter_no_change: int = 10,
        scoring: Any = "balanced_accuracy",
        callbacks: list[Any] | None = None,
        checkpoint_dir: Any = None,
        image_shape: tuple[int, ...] | None = None,
        data_format: str = "auto",
        spatial_dims: int | None = None,
        device: Any = "auto",
        precision: str = "auto",
        compile: bool = False,
        warm_start: bool = False,
        net_params: dict[str, Any] | None = None,
        random_state: Any = None,
        verbose: Any = 0,
    ) -> None:
        self.backbone = backbone
        self.pretrain = pretrain
        self.loss = loss
        self.class_weight = class_weight
        self.focal_gamma = focal_gamma
        self.beta = beta
        self.max_margin = max_margin
        self.tau = tau
        self.post_hoc_tau = post_hoc_tau
        self.reweight_after = reweight_after
        self.mixup = mixup
        self.mixup_alpha = mixup_alpha
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.lr_schedule = lr_schedule
        self.augment = augment
        self.sampler = sampler
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.scoring = scoring
        self.callbacks = callbacks
        self.checkpoint_dir = checkpoint_dir
        self.image_shape = image_shape
        self.data_format = data_format
        self.spatial_dims = spatial_dims
        self.device = device
        self.precision = precision
        self.compile = compile
        self.warm_start = warm_start
        self.net_params = net_params
        self.random_state = random_state
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(
        self, X: Any, y: Any, *, sample_weight: Any = None, groups: Any = None
    ) -> SoftmaxClassifier:
        """Train the network.

        Parameters
        ----------
        X : array-like or lazy sequence of n images
            Images in any layout of the package's README, uint8 or float.
        y : array-like of shape (n,)
            Class labels: numbers or strings, at least two classes.
        sample_weight : array-like of shape (n,), default=None
            Non-negative weights; only their ratios matter.
        groups : array-like of shape (n,), default=None
            Patient of each image: the inner validation split keeps every group whole.

        Returns
        -------
        self : SoftmaxClassifier
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
    ) -> SoftmaxClassifier:
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
        self : SoftmaxClassifier
            The classifier so far.
        """
        return self._fit(X, y, sample_weight=sample_weight, classes=classes, partial=True)

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

    def _make_batches(self, train: TrainingSet, **common: Any) -> Any:
        n, n_classes = len(train.y), len(self.classes_)
        mass = torch.as_tensor(
            train.label_mass(n_classes), dtype=self.net_.dtype, device=self.net_.device
        )
        args = (train.images, train.rows, mass)
        plain = Batches(*args, lambda rng: shuffled(n, self.batch_size, rng), **common)
        if self.mixup is None:
            return plain
        if self.mixup == "mixup":
            return MixedBatches(plain, self.mixup_alpha)
        size, steps = min(self.batch_size, n), self._steps_per_epoch(n)
        balanced = plain.with_plan(lambda rng: class_balanced(train.y, size, steps, rng))
        return MixedBatches(plain, self.mixup_alpha, balanced)
