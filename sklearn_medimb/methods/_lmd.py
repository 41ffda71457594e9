"""LMD: relation-aware representation learning, then iterative classifier calibration.

Z. Pan et al., "Long-tailed Medical Diagnosis with Relation-aware Representation Learning and
Iterative Classifier Calibration", Computers in Biology and Medicine 188, 2025, 109772
(arXiv 2502.03238); its predecessor is MRC-VFC, MICCAI 2023.

The file reads as the method does: the relations of stage one (RRL), the terms of stage two (ICC),
the estimator. Symbols are the paper's: z = g(x) features (B, d) of the strong view, z' those of the
teacher on the weak view, o = f(z) logits, mu_k and Sigma_k the Gaussian of class k.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import nn

from sklearn_medimb._data.batches import Batches, BatchSource, Context
from sklearn_medimb._parameters import above, at_least, integers, one_of, parameter, within
from sklearn_medimb._training.criterion import Criterion, LabelCriterion
from sklearn_medimb._training.momentum import RunningMean, follow
from sklearn_medimb._training.network import Output, SoftmaxNetwork
from sklearn_medimb._training.stage import Stage, TrainingSet
from sklearn_medimb.augment import Augmentation
from sklearn_medimb.base._two_stage import STAGE_ONE, STAGE_TWO, TwoStageClassifier
from sklearn_medimb.over_sampling._virtual_features import ClassGaussians
from sklearn_medimb.rebalance import VirtualFeatureCalibration

# ---------------------------------------------------------------- stage one: relations


def _unit_rows(matrix: torch.Tensor) -> torch.Tensor:
    """Rows of length 1; a row of zeros stays zero."""
    return matrix / matrix.norm(dim=1, keepdim=True).clamp_min(1e-12)


def batch_relation_loss(z: torch.Tensor, z_teacher: torch.Tensor) -> torch.Tensor:
    """Ask whether samples resemble one another alike in both views.

    ``1/B |S(z) - S(z')|^2`` with ``S(z) = z z^T``, rows scaled to length 1 as in the authors' code;
    the paper's formula has no scaling.

    Parameters
    ----------
    z, z_teacher : tensor of shape (B, d)
        Features of the student and, without gradient, of the teacher.
    """
    z_teacher = z_teacher.detach()
    difference = _unit_rows(z @ z.T) - _unit_rows(z_teacher @ z_teacher.T)
    return difference.square().sum() / len(z)


def channel_relation_loss(z: torch.Tensor, z_teacher: torch.Tensor) -> torch.Tensor:
    """Ask whether channels go together alike in both views.

    ``1/d |T(z) - T(z')|^2`` with ``T(z) = z^T z``, rows scaled to length 1. The authors' code has
    1/B, which in their runs was the same number; with 1/d the batch size does not matter.

    Parameters
    ----------
    z, z_teacher : tensor of shape (B, d)
        Features of the student and, without gradient, of the teacher.
    """
    return batch_relation_loss(z.T, z_teacher.T)


def probability_consistency_loss(o: torch.Tensor, o_teacher: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of the student's class probabilities from the teacher's.

    Parameters
    ----------
    o, o_teacher : tensor of shape (B, K)
        Logits of the student and, without gradient, of the teacher.
    """
    log_p, log_teacher = o.log_softmax(dim=1), o_teacher.detach().log_softmax(dim=1)
    return F.kl_div(log_p, log_teacher, reduction="batchmean", log_target=True)


class TwoViewOutput(NamedTuple):
    """Features and logits of the strong view; the weak view as it came, for the teacher."""

    features: torch.Tensor
    logits: torch.Tensor
    weak: torch.Tensor | None


class LMDNetwork(SoftmaxNetwork):
    """Encoder g and linear head f; the weak view passes by."""

    def forward(  # type: ignore[override]
        self, images: torch.Tensor, weak: torch.Tensor | None = None
    ) -> TwoViewOutput:
        """Features and logits of the strong view."""
        return TwoViewOutput(*super().forward(images), weak)


class RRLLoss(Criterion):
    """``CE + l1 L_batch + l2 L_channel + l3 L_prob``; owns the teacher, which training alone needs.

    The teacher is the running mean of the student: ``theta' <- a_t theta' + (1 - a_t) theta`` with
    ``a_t = min(1 - 1 / (t + 1), decay)`` after step t = 0, 1, ...

    Parameters
    ----------
    label_loss : nn.Module
        (logits, one-hot masses) to a scalar.
    student : nn.Module
        The network; the teacher starts as its copy.
    weights : tuple of float
        l1, l2, l3.
    decay : float
        Largest share of the old teacher.
    teacher_mode : {"train", "eval"}
        Whether the teacher normalises with batch statistics, as published, or with running means,
        which then follow the student's.
    """

    def __init__(
        self,
        label_loss: nn.Module,
        student: nn.Module,
        *,
        weights: tuple[float, float, float],
        decay: float,
        teacher_mode: str,
    ) -> None:
        super().__init__()
        self.label_loss = label_loss
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.weights = weights
        self.shares = RunningMean(decay)
        self.teacher_mode = teacher_mode

    def train(self, mode: bool = True) -> RRLLoss:
        """Switch the mode; the teacher keeps its own."""
        super().train(mode)
        self.teacher.train(mode and self.teacher_mode == "train")
        return self

    def forward(self, output: TwoViewOutput, mass: torch.Tensor) -> torch.Tensor:
        """Loss of a batch; cross-entropy alone where there is no weak view yet."""
        ce = self.label_loss(output.logits, mass)
        self.terms = {"ce": ce}
        if output.weak is None:
            return ce
        with torch.no_grad():
            teacher = self.teacher(output.weak)
        self.terms |= {
            "batch_relation": batch_relation_loss(output.features, teacher.features),
            "channel_relation": channel_relation_loss(output.features, teacher.features),
            "consistency": probability_consistency_loss(output.logits, teacher.logits),
        }
        _, *relations = self.terms.values()
        return ce + sum(w * term for w, term in zip(self.weights, relations, strict=True))

    def start_from(self, student: nn.Module) -> None:
        """Begin as a copy of the student."""
        self.teacher.load_state_dict(student.state_dict())

    def after_step(self, student: nn.Module) -> None:
        """Move the teacher after a step."""
        share = self.shares.next_share()
        follow(self.teacher, student, share, buffers=self.teacher_mode == "eval")


class TwoViewBatches(BatchSource):
    """Strong views, and from epoch `start` on weak views of the same images beside them."""

    def __init__(
        self, batches: Batches, weak: Augmentation, epoch: Callable[[], int], start: int
    ) -> None:
        self.strong = batches
        self.both = batches.with_views(*batches.views, weak)
        self.epoch = epoch
        self.start = start
        self.generator = batches.generator

    def orders(self) -> Iterator[dict[str, Any]]:
        """Orders of one view or of two."""
        kind = "strong" if self.epoch() < self.start else "both"
        return ({kind: order} for order in getattr(self, kind).orders())

    def make(self, order: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Make the strong view, and the weak one where the teacher needs it."""
        if "strong" in order:
            images, mass = self.strong.make(order["strong"])
            return {"images": images}, mass
        views, mass = self.both.make(order["both"])
        strong, weak = views.chunk(2)
        return {"images": strong, "weak": weak}, mass


def generalized_cross_entropy(logits: torch.Tensor, y: torch.Tensor, q: float) -> torch.Tensor:
    """``mean (1 - p_y^q) / q`` [1]_: cross-entropy for q -> 0, the absolute error for q = 1.

    Parameters
    ----------
    logits : tensor of shape (B, K)
        Class scores.
    y : tensor of int of shape (B,)
        Classes.
    q : float
        In [0, 1]; larger is more tolerant of wrong labels.

    References
    ----------
    .. [1] Z. Zhang, M. Sabuncu, "Generalized cross entropy loss for training deep neural networks
       with noisy labels", NeurIPS 2018, eq. 6.
    """
    log_p = logits.log_softmax(dim=1).gather(1, y.unsqueeze(1))
    return (-log_p if q == 0 else -torch.expm1(q * log_p) / q).mean()


def mahalanobis(z: torch.Tensor, means: torch.Tensor, whitening: torch.Tensor) -> torch.Tensor:
    """``M_k(z) = (z - m_k)^T C_k^-1 (z - m_k)``, shape (B, K).

    Parameters
    ----------
    z : tensor of shape (B, d)
        Features.
    means : tensor of shape (K, d)
        m.
    whitening : tensor of shape (K, d, d)
        P_k with ``P_k^T P_k = C_k^-1``.
    """
    away = z.unsqueeze(0) - means.unsqueeze(1)  # (K, B, d)
    return (away @ whitening.transpose(1, 2)).square().sum(dim=2).T


def distribution_consistency(
    distance: torch.Tensor, y: torch.Tensor, d: int, kind: str = "margin", margin: float = 1.0
) -> torch.Tensor:
    """Feature distribution consistency: near to the own class, far from the others.

    "paper": attraction minus repulsion, ``mean_i (M_{y_i} - mean_{k != y_i} M_k) / d``, which has
    no lower bound. "margin": ``mean_i max(0, margin + (M_{y_i} - min_{k != y_i} M_k) / d)``.

    Parameters
    ----------
    distance : tensor of shape (B, K)
        M, from :func:`mahalanobis`.
    y : tensor of int of shape (B,)
        Classes.
    d : int
        Number of features: M of a sample of its own class is about d.
    kind : {"margin", "paper"}, default="margin"
        Which form.
    margin : float, default=1.0
        Of "margin".
    """
    own = F.one_hot(y, distance.shape[1]).bool()
    attraction = distance.gather(1, y.unsqueeze(1)).squeeze(1)
    if kind == "paper":
        repulsion = distance.masked_fill(own, 0).sum(dim=1) / (distance.shape[1] - 1)
        return ((attraction - repulsion) / d).mean()
    nearest = distance.masked_fill(own, torch.inf).amin(dim=1)
    return (margin + (attraction - nearest) / d).clamp_min(0).mean()


class ICCLoss(Criterion):
    """The E-step's loss: ``GCE(f(g(x)), y) + w FDC(g(x), y; m, C)`` with the head f frozen.

    It holds what an M-step leaves: the head, and the running means m and C of the class statistics,
    ``a_j = min(1 - 1 / (j + 1), 0.999)`` in round j.

    Parameters
    ----------
    n_classes, d : int
        Number of classes and features.
    q : float
        Of the generalised cross-entropy.
    kind : {"margin", "paper"} or None
        Of the distribution term.
    weight, margin : float
        w, and the margin of "margin".
    """

    round: torch.Tensor
    means: torch.Tensor
    whitening: torch.Tensor
    coef: torch.Tensor
    intercept: torch.Tensor

    def __init__(
        self,
        n_classes: int,
        d: int,
        *,
        q: float,
        kind: str | None,
        weight: float,
        margin: float,
    ) -> None:
        super().__init__()
        self.q = q
        self.kind = kind
        self.weight = weight
        self.margin = margin
        self.register_buffer("round", torch.zeros((), dtype=torch.long))
        self.register_buffer("coef", torch.zeros(n_classes, d))
        self.register_buffer("intercept", torch.zeros(n_classes))
        size = 0 if kind is None else d
        # m and C, in float64 on the CPU; the first M-step replaces them.
        shapes = [] if kind is None else [(n_classes, d), (n_classes, d, d)]
        self.statistics = tuple(torch.zeros(shape, dtype=torch.float64) for shape in shapes)
        self.register_buffer("means", torch.zeros(n_classes, size))
        self.register_buffer("whitening", torch.zeros(n_classes, size, size))

    @torch.no_grad()
    def finish_m_step(
        self, coef: np.ndarray, intercept: np.ndarray, gaussians: ClassGaussians | None
    ) -> None:
        """Take over the head of an M-step, and average the statistics it came from."""
        self.coef.copy_(torch.from_numpy(coef))
        self.intercept.copy_(torch.from_numpy(intercept))
        share = 1 - min(1 - 1 / (int(self.round) + 1), 0.999)
        self.round += 1
        if gaussians is None:
            return
        sigma = np.stack([gaussians.covariance(k) for k in range(len(coef))])
        new = torch.from_numpy(gaussians.means), torch.from_numpy(sigma)
        self.statistics = tuple(
            torch.lerp(old, own, share) for old, own in zip(self.statistics, new, strict=True)
        )
        means, covariances = self.statistics
        self.means.copy_(means)
        # Each C is inverted once, not at each step.
        self.whitening.copy_(torch.stack([_whitening(c) for c in covariances]))

    def forward(self, output: Output, mass: torch.Tensor) -> torch.Tensor:
        """Loss of a batch: gradients reach the encoder through the head, not the head."""
        y, z = mass.argmax(dim=1), output.features
        label = generalized_cross_entropy(F.linear(z, self.coef, self.intercept), y, self.q)
        self.terms = {"label": label}
        if self.kind is None:
            return label
        d = z.shape[1]
        distance = mahalanobis(z, self.means, self.whitening)
        term = distribution_consistency(distance, y, d, self.kind, self.margin)
        own = distance.detach().gather(1, y.unsqueeze(1)).mean() / d
        self.terms |= {"distribution": term, "own_distance": own}
        return label + self.weight * term

    def get_extra_state(self) -> dict[str, Any]:
        """Statistics, so that a resumed fit averages on."""
        return {"statistics": list(self.statistics)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from these statistics."""
        self.statistics = tuple(state["statistics"])


def _whitening(covariance: torch.Tensor) -> torch.Tensor:
    """P with ``P^T P = C^-1``, where directions that hardly vary are given a little.

    Features are scaled to variance 1 first; one that does not vary at all counts for nothing.
    """
    variance = covariance.diagonal()
    varies = variance > 1e-20 * variance.mean()
    scale = torch.where(varies, variance, torch.inf).sqrt()
    correlation = covariance / scale.outer(scale)
    try:
        values, vectors = torch.linalg.eigh(correlation)
    except torch.linalg.LinAlgError:  # many values are the same: the slower way always gets there
        found = scipy.linalg.eigh(correlation.cpu().numpy(), driver="ev")
        values, vectors = (torch.from_numpy(part).to(covariance.device) for part in found)
    return (vectors / values.clamp_min(1e-6).sqrt()).T / scale


class RoundBatches(BatchSource):
    """One round of calibration per epoch: the M-step, then the batches of the E-step."""

    def __init__(self, batches: Batches, m_step: Callable[[], None]) -> None:
        self.batches = batches
        self.m_step = m_step
        self.generator = batches.generator

    def orders(self) -> Iterator[Any]:
        """Take the M-step, then give the orders of the E-step."""
        self.m_step()
        yield from self.batches.orders()

    def make(self, order: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Make a batch of the E-step."""
        return self.batches.make(order)


# ---------------------------------------------------------------- the estimator


_M_STEP = VirtualFeatureCalibration._parameter_constraints


class LMDClassifier(TwoStageClassifier):
    """Relation-aware representation learning (RRL), then iterative classifier calibration (ICC).

    Stage one trains encoder and head on the data as they are, and asks the strong view to keep the
    relations that a slowly moving teacher sees in the weak view: between samples, channels and
    classes. Stage two alternates: the M-step fits a new head to Gaussians around the class means,
    all classes weighing the same; the E-step fine-tunes the encoder through that frozen head. It
    ends with an M-step [1]_.

    Parameters
    ----------
    stages
        "rrl" keeps the head of stage one. "icc" calibrates the backbone as given: with
        ``backbone=fitted`` that of any fitted estimator. In a cross-validation that backbone has
        seen the test folds unless it was trained without them.
    batch_relation_weight
        l1.
    channel_relation_weight
        l2.
    consistency_weight
        l3. With all three 0 stage one is plain cross-entropy.
    relation_start
        Share of stage one's epochs before the relations switch on.
    ema_decay
        Largest share of the old teacher in its running mean.
    teacher_mode
        Whether the teacher's batch normalisation uses batch statistics, as published, or running
        means.
    n_rounds
        Rounds of stage two (published: 200). The last is an M-step alone, so 1 means: no E-step.
    m_step
        Closed-form bound of the expected loss, or virtual features; see
        :class:`~sklearn_medimb.VirtualFeatureCalibration`.
    n_per_class
        Virtual features per class; only with "sampled".
    covariance
        Of the class Gaussians, see :class:`~sklearn_medimb.BalancedVirtualFeatures`.
    eps
        Added variance, see there.
    alpha
        L2 penalty of the head.
    gce_q
        q of the E-step's generalised cross-entropy; 0 is cross-entropy.
    fdc
        Feature distribution consistency: bounded, as published, or none.
    fdc_weight
        Its weight w; distances are divided by the number of features.
    fdc_margin
        Margin of "margin".
    e_step_lr
        Learning rate of the E-step, constant.

    See Also
    --------
    sklearn_medimb.VirtualFeatureCalibration : The M-step alone, on any features.
    sklearn_medimb.BalancedVirtualFeatures : Virtual features as a sampler.

    Notes
    -----
    The weak view has only the flips of `augment`. `max_epochs` counts those of stage one. Class
    Gaussians are those of the images before any `sampler`, each once.

    After stage two the encoder has moved away from the head of stage one: in ``refit_head``,
    "none", "lws", "tau_norm" and "logit_adjust" then begin with logistic regression. Pixels are
    normalised by the statistics of the images given, also with a backbone trained elsewhere.

    There is no `sample_weight`: relations within a batch and class Gaussians give it no exact
    meaning.

    In the authors' public code the label term of the E-step has no gradient and the distribution
    term the opposite sign; both are mended here. Published weights (:meth:`published`) were tuned
    for a pre-trained ResNet-18 and hurt small networks trained from scratch.

    References
    ----------
    .. [1] Z. Pan et al., "Long-tailed medical diagnosis with relation-aware representation learning
       and iterative classifier calibration", Computers in Biology and Medicine 188, 2025.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_medimb import LMDClassifier
    >>> X, y = load_digits(n_class=3, return_X_y=True)
    >>> clf = LMDClassifier(image_shape=(8, 8), max_epochs=3, n_rounds=2, random_state=0)
    >>> clf.fit(X[:300], y[:300]).predict(X[300:]).shape
    (237,)
    """

    stages: str = parameter(one_of("both", "rrl", "icc"), default="both")
    batch_relation_weight: float = parameter(at_least(0), default=1.0, search=(0.0, 3.0))
    channel_relation_weight: float = parameter(at_least(0), default=1.0, search=(0.0, 3.0))
    consistency_weight: float = parameter(at_least(0), default=0.5, search=(0.0, 3.0))
    relation_start: float = parameter(within(0, 1), default=0.21, search=(0.0, 0.5))
    ema_decay: float = parameter(within(0, 1), default=0.999, search=[0.9, 0.99, 0.999])
    teacher_mode: str = parameter(one_of("train", "eval"), default="train", search=True)
    n_rounds: int = parameter(integers(1), default=5, search=(1, 20))
    m_step: str = parameter(
        *_M_STEP["m_step"],
        default="analytic",
        kind='{"analytic", "sampled"}',
        search=["analytic", "sampled"],
    )
    n_per_class: int = parameter(*_M_STEP["n_per_class"], default=5000, search=(500, 20_000, "log"))
    covariance: str = parameter(
        *_M_STEP["covariance"],
        default="shrunk",
        kind='{"shrunk", "full", "diag", "tied"}',
        search=["shrunk", "full", "diag", "tied"],
    )
    eps: float = parameter(*_M_STEP["eps"], default=1e-2, search=(1e-3, 1.0, "log"))
    alpha: float = parameter(*_M_STEP["alpha"], default=0.1, search=(1e-3, 10.0, "log"))
    gce_q: float = parameter(within(0, 1), default=0.8, search=(0.0, 1.0))
    fdc: str | None = parameter(one_of("margin", "paper"), None, default="margin", search=True)
    fdc_weight: float = parameter(at_least(0), default=0.05, search=(0.005, 0.5, "log"))
    fdc_margin: float = parameter(at_least(0), default=1.0, search=(0.25, 4.0, "log"))
    e_step_lr: float = parameter(above(0), default=1e-4, search=(1e-5, 1e-3, "log"))

    @classmethod
    def published(cls, **params: Any) -> LMDClassifier:
        """Make a classifier with the settings of the authors' code.

        ResNet-18, SGD at 0.01 over 100 epochs of batches of 512 (four processes of 128, with
        features and batch normalisation across them), relation weights 2.5, 2.5 and 5 (10, 10 and 5
        on the four processes act so), 200 rounds of 50,000 virtual features per class with each
        class's own covariance. It presumes pre-trained weights:
        ``published(backbone=ResNet(depth=18, weights=path))``, or a backbone that has them, such as
        "efficientnet_lite0", all of whose weights are then trained. The weight of the distribution
        term is their 1e-4 times the 512 features of a ResNet-18, as distances are divided by the
        number of features; for a backbone of d features pass ``fdc_weight=1e-4 * d``.

        What differs: the E-step has the gradient and the sign that the paper's figure shows; it too
        has 512 images a step, theirs 128, and no weight decay, theirs 1e-4, which at its rate of
        1e-6 shrinks the weights by a few parts in 100,000 over all rounds. Class statistics are of
        the images, each once; theirs are of class-balanced draws with replacement. The M-step
        standardises features and takes steps of Adam at 0.01, falling, where theirs are of SGD at
        1e-5. Stage two ends on an M-step, theirs on an E-step. The strong view is ours, pixels are
        normalised by the training images, not by the statistics of ImageNet, and incomplete batches
        are not dropped.

        Parameters
        ----------
        **params
            Further constructor parameters; they take precedence.

        Returns
        -------
        classifier : LMDClassifier
            Not fitted.
        """
        settings: dict[str, Any] = {
            "backbone": "resnet18",
            "batch_relation_weight": 2.5,
            "channel_relation_weight": 2.5,
            "consistency_weight": 5.0,
            "n_rounds": 200,
            "m_step": "sampled",
            "n_per_class": 50_000,
            "covariance": "full",
            "alpha": 1e-4,
            "gce_q": 0.7,
            "fdc": "paper",
            "fdc_weight": 1e-4 * 512,
            "e_step_lr": 1e-6,
            "fine_tune": "full",
            "backbone_lr": 1.0,
            "ema": None,
            "n_views": 1,
            "augment": "strong",
            "max_epochs": 100,
            "batch_size": 512,
            "lr": 0.01,
            "lr_schedule": "constant",
            "weight_decay": 0.0,
            "net_params": {"optimizer": torch.optim.SGD, "optimizer__momentum": 0.9},
        }
        return cls(**{**settings, **params})

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.early_stopping and self.stages == "icc" and self.n_rounds == 1:
            raise ValueError(
                'early_stopping=True has no epoch to choose: stages="icc" with n_rounds=1 trains '
                "the head alone."
            )
        trained = self._brings_weights or self._start is not None or self.pretrain is not None
        if self.stages == "icc" and not trained and not self._continues(partial=False):
            warnings.warn(
                'stages="icc" calibrates the backbone as it is, and this one was not trained: pass '
                "a fitted estimator as backbone=, or one with weights.",
                stacklevel=4,
            )

    def _make_network(self, trunk: Callable[..., Any]) -> nn.Module:
        n_classes, known = len(self.classes_), self._has_known_start
        return LMDNetwork(
            trunk(),
            lambda n_features: nn.Linear(n_features, n_classes),
            at_all_depths=known,
            standardised=known,
        )

    def _images_per_step(self, n_samples: int) -> int:
        return 2 * super()._images_per_step(n_samples)  # with the weak views, for the teacher

    def _stages(self, train: TrainingSet, n_epochs: int, context: Context) -> list[Stage]:
        n_steps, batches = self._steps_per_epoch(len(train.y)), self._make_batches(train, context)
        stages = []
        if self.stages != "icc":
            stages.append(self._rrl(train, batches, n_epochs, n_steps))
        # The E-step trains the backbone alone.
        learns = self.net_.module_.trunk.learns and self._backbone_share > 0
        if self.stages != "rrl" and self.n_rounds > 1 and learns:
            stages.append(self._icc(train, batches, n_steps))
        return stages

    # ---------------------------------------------------------------- stage one

    def _rrl(self, train: TrainingSet, batches: Batches, n_epochs: int, n_steps: int) -> Stage:
        """Relation-aware representation learning."""
        label_loss = self._label_loss(train)
        weights = self.batch_relation_weight, self.channel_relation_weight, self.consistency_weight
        if not (any(weights) and self.net_.module_.trunk.learns):  # features that stay agree
            criterion = LabelCriterion(label_loss)
            return self._stage(criterion, batches, n_epochs, n_steps, name=STAGE_ONE)
        net = self.net_
        loss = RRLLoss(
            label_loss,
            net.module_,
            weights=weights,
            decay=self.ema_decay,
            teacher_mode=self.teacher_mode,
        )

        def n_epochs_seen() -> int:
            return sum(row.get("stage") == STAGE_ONE for row in net.history)

        before = n_epochs_seen()  # by an earlier fit, where this one goes on from it
        views = TwoViewBatches(
            batches,
            flips_of(batches.views[0]),
            epoch=lambda: n_epochs_seen() - 1 - before,
            start=round(self.relation_start * n_epochs),
        )
        return self._stage(loss, views, n_epochs, n_steps, name=STAGE_ONE)

    # ---------------------------------------------------------------- stage two

    def _head(self) -> Any:
        if self.stages == "rrl":
            return "none"
        names = "m_step", "n_per_class", "covariance", "eps", "alpha"
        return VirtualFeatureCalibration(**{name: getattr(self, name) for name in names})

    def _stage_one_head(self) -> dict[str, Any]:
        # Where the encoder has moved since, the head of stage one no longer fits it.
        return super()._stage_one_head() if self.stages == "rrl" else {}

    def _icc(self, train: TrainingSet, batches: Batches, n_steps: int) -> Stage:
        """Rounds of M-step and E-step, but for the last M-step, which makes the head to keep."""
        loss = ICCLoss(
            len(self.classes_),
            self.net_.module_.n_features,
            q=self.gce_q,
            kind=self.fdc,
            weight=self.fdc_weight,
            margin=self.fdc_margin,
        )

        natural = train if train.natural is None else train.natural

        def m_step() -> None:
            features, head = self._features(natural.images, natural.rows), self._head()
            head.set_params(random_state=self.random_seed_ + int(loss.round))  # draws of its own
            last = {"coef_init": loss.coef, "intercept_init": loss.intercept}
            start = {name: value.cpu().numpy() for name, value in last.items()}
            head = self._fit_head(head, features, natural.y, start)
            gaussians = None
            if self.fdc is not None:
                gaussians = ClassGaussians(
                    features, natural.y, covariance=self.covariance, eps=self.eps
                )
            loss.finish_m_step(head.coef_, head.intercept_, gaussians)

        return Stage(
            loss,
            RoundBatches(batches.with_views(Augmentation()), m_step),
            self.n_rounds - 1,
            n_steps,
            lr=self.e_step_lr,
            lr_schedule="constant",
            name=STAGE_TWO,
        )


def flips_of(augmentation: Any) -> Augmentation:
    """Of an augmentation only its flips."""
    names = ("horizontal_flip", "vertical_flip", "depth_flip")
    return Augmentation(**{name: getattr(augmentation, name, 0.0) for name in names})
