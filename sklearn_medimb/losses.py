"""Classification losses for imbalanced data, as costs per label.

Every function maps logits ``(n, K)`` to costs ``(n, K)``: entry ``[i, k]`` is what sample i pays if
its label is k. One formula then serves hard labels, soft labels, sample and class weights alike::

    loss = mean_i sum_k mass[i, k] * class_weight[k] * costs[i, k]

where ``mass[i]`` is the one-hot (or mixed) label of sample i times its weight.

Imports `_parameters`.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from sklearn_medimb._parameters import Declaring, above, at_least, parameter, within


def cross_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Cost of each label under cross-entropy, ``-log softmax(z)_k``."""
    return -F.log_softmax(logits, dim=1)


def focal(logits: torch.Tensor, gamma: float = 2.0) -> torch.Tensor:
    """Focal cost [1]_, ``-(1 - p_k)^gamma log p_k``: easy samples pay less.

    Parameters
    ----------
    logits : tensor of shape (n, K)
        Class scores.
    gamma : float, default=2.0
        0 is cross-entropy.

    References
    ----------
    .. [1] T.-Y. Lin et al., "Focal loss for dense object detection", ICCV 2017, eq. 4.
    """
    log_p = F.log_softmax(logits, dim=1)
    # At p = 1 the power has, for gamma < 1, an infinite slope: infinity times 0 would be NaN.
    rest = (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny)
    return -(rest**gamma) * log_p


def logit_adjusted(logits: torch.Tensor, log_prior: torch.Tensor, tau: float = 1.0) -> torch.Tensor:
    """Cross-entropy of ``z + tau log(prior)`` [1]_; with ``tau=1`` it is balanced softmax [2]_.

    Parameters
    ----------
    logits : tensor of shape (n, K)
        Class scores.
    log_prior : tensor of shape (K,)
        Log of the class shares in training.
    tau : float, default=1.0
        Strength of the adjustment.

    References
    ----------
    .. [1] A. K. Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, eq. 10.
    .. [2] J. Ren et al., "Balanced meta-softmax for long-tailed visual recognition", NeurIPS 2020,
       eq. 4.
    """
    return cross_entropy(logits + tau * log_prior)


def ldam(logits: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with a class-dependent margin on the label's own logit [1]_.

    Parameters
    ----------
    logits : tensor of shape (n, K)
        Scaled cosines, as :class:`~sklearn_medimb.base.CosineHead` gives them.
    margins : tensor of shape (K,)
        What is taken off logit k where k is the label, on the scale of the logits.

    References
    ----------
    .. [1] K. Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss",
       NeurIPS 2019, eq. 13.
    """
    # [i, k, :] holds the logits that sample i has if its label is k.
    if_label = logits.unsqueeze(1) - torch.diag(margins)
    return -F.log_softmax(if_label, dim=2).diagonal(dim1=1, dim2=2)


def ldam_margins(class_mass: torch.Tensor, max_margin: float = 0.5) -> torch.Tensor:
    """Margins proportional to ``n_k^(-1/4)``, the largest one being `max_margin`.

    Parameters
    ----------
    class_mass : tensor of shape (K,)
        Training samples (or summed weights) per class.
    max_margin : float, default=0.5
        Margin of the rarest class, in cosine units.
    """
    margins = class_mass ** (-1 / 4)
    return margins * (max_margin / margins.max())


def effective_number_weights(class_mass: torch.Tensor, beta: float = 0.999) -> torch.Tensor:
    """Class weights by effective numbers of samples [1]_, ``(1 - beta) / (1 - beta^n_k)``.

    Parameters
    ----------
    class_mass : tensor of shape (K,)
        Training samples (or summed weights) per class.
    beta : float, default=0.999
        0 weighs all classes alike, 1 (in the limit) by inverse frequency.

    Returns
    -------
    weights : tensor of shape (K,)
        They sum to K.

    References
    ----------
    .. [1] Y. Cui et al., "Class-balanced loss based on effective number of samples", CVPR 2019,
       eq. 2.
    """
    weights = (1 - beta) / (1 - beta**class_mass)
    return weights * (len(weights) / weights.sum())


def class_weights(
    class_weight: dict[Any, float] | str | None, classes: np.ndarray, class_mass: np.ndarray
) -> np.ndarray:
    """Turn the constructor parameter `class_weight` into one weight per class.

    Parameters
    ----------
    class_weight : dict, "balanced" or None
        As in scikit-learn.
    classes : ndarray of shape (K,)
        The caller's labels, ascending.
    class_mass : ndarray of shape (K,)
        Training samples (or summed weights) per class.

    Raises
    ------
    ValueError
        If a weight is negative or not finite, every weight is 0, or a class is not among `classes`.
    """
    if class_weight == "balanced":
        return class_mass.sum() / (len(class_mass) * class_mass)
    if isinstance(class_weight, dict):
        weights = list(class_weight.values())
        if not all(isinstance(w, Real) and 0 <= float(w) < np.inf for w in weights):
            raise ValueError(f"class_weight must hold non-negative numbers, got {weights}.")
        if unknown := [k for k in class_weight if k not in set(classes.tolist())]:
            raise ValueError(
                f"class_weight names classes {unknown} that y lacks: it holds {classes.tolist()}."
            )
    weight = compute_class_weight(class_weight, classes=classes, y=classes)
    if not weight.any():
        raise ValueError("class_weight is 0 for every class.")
    return weight


def of_unit_mean(weight: torch.Tensor, class_mass: torch.Tensor) -> torch.Tensor:
    """Class weights scaled so that a training row weighs 1 on average.

    Only the ratios of class weights carry meaning. Their scale would be one of the learning rate,
    or of the label loss beside another term.

    Parameters
    ----------
    weight : tensor of shape (K,)
        Class weights.
    class_mass : tensor of shape (K,)
        Training samples (or summed weights) per class, 0 where there are none.
    """
    total = class_mass @ weight
    return weight * (class_mass.sum() / total) if total > 0 else weight


class LabelLoss(nn.Module):
    """``mean_i sum_k mass[i, k] w[k] costs[i, k]``, with `w` changing once where asked.

    Parameters
    ----------
    costs : callable
        Logits (n, K) to costs (n, K).
    weight : tensor of shape (K,)
        Class weights from the first step on, of unit mean over the training rows.
    late_weight : tensor of shape (K,), default=None
        Class weights from step `switch` on (deferred re-weighting), of unit mean too: a loss that
        shrank at the switch would shrink the step.
    switch : int, default=0
        That step.
    constants : tensor of shape (K,), default=None
        Second argument of `costs`, where it has one.
    """

    def __init__(
        self,
        costs: Callable[..., torch.Tensor],
        weight: torch.Tensor,
        late_weight: torch.Tensor | None = None,
        switch: int = 0,
        constants: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.weight: torch.Tensor
        self.late_weight: torch.Tensor | None
        self.constants: torch.Tensor | None
        self.costs = costs
        self.switch = switch
        self.step: torch.Tensor
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("weight", weight)
        self.register_buffer("late_weight", late_weight)
        self.register_buffer("constants", constants)

    def forward(self, logits: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        """Loss of one batch."""
        constants = () if self.constants is None else (self.constants,)
        costs = self.costs(logits, *constants)
        if costs.shape != logits.shape:
            raise ValueError(
                f"A loss must give the cost of each sample under each label, shape "
                f"{tuple(logits.shape)}, but gave {tuple(costs.shape)}."
            )
        return (mass * self.next_weight() * costs).sum() / len(logits)

    def next_weight(self) -> torch.Tensor:
        """Class weights of the next step, which is counted, on the device."""
        if self.late_weight is None:
            return self.weight
        weight = torch.where(self.step < self.switch, self.weight, self.late_weight)
        self.step += 1
        return weight


# ---------------------------------------------------------------- losses by name


class Loss(Declaring, BaseEstimator):
    """A classification loss, made for the class counts of a training set.

    A subclass writes `costs`, and `constants` where these depend on the counts.

    Parameters
    ----------
    beta
        Of the effective numbers by which classes are re-weighted.
    reweight_after
        Share of the steps after which class weights by effective numbers switch on (deferred
        re-weighting); None: never.
    """

    beta: float = parameter(
        within(0, 1, closed="left"), default=0.999, search=[0.9, 0.99, 0.999, 0.9999]
    )
    reweight_after: float | None = parameter(
        within(0, 1), None, default=None, search=[None, 0.0, 0.5, 0.8]
    )

    # Whether it works on scaled cosines of features and class vectors.
    on_cosines: ClassVar[bool] = False

    def constants(self, class_mass: torch.Tensor) -> torch.Tensor:
        """What `costs` needs of the training samples (or summed weights) per class, shape (K,)."""
        return class_mass

    def costs(self, logits: torch.Tensor, constants: torch.Tensor) -> torch.Tensor:
        """Cost of each sample under each label.

        Parameters
        ----------
        logits : tensor of shape (n, K)
            Class scores.
        constants : tensor of shape (K,)
            As `constants` gives them.

        Returns
        -------
        costs : tensor of shape (n, K)
            Entry ``[i, k]`` is what sample i pays if its label is k.
        """
        raise NotImplementedError


class CrossEntropyLoss(Loss):
    """Cross-entropy: minus the log of the probability of the label."""

    def costs(self, logits: torch.Tensor, constants: torch.Tensor) -> torch.Tensor:
        """Costs of `cross_entropy`, which needs no constants."""
        return cross_entropy(logits)


class FocalLoss(Loss):
    """Focal loss: easy samples pay less; see `focal`.

    Parameters
    ----------
    gamma
        Focusing exponent; 0 is cross-entropy.
    """

    gamma: float = parameter(at_least(0), default=2.0, search=(0.5, 5.0))

    def costs(self, logits: torch.Tensor, constants: torch.Tensor) -> torch.Tensor:
        """Costs of `focal` with this exponent."""
        return focal(logits, self.gamma)


class ClassBalancedLoss(CrossEntropyLoss):
    """Cross-entropy weighted by effective numbers; see `effective_number_weights`."""

    reweight_after: float | None = 0.0


class LDAMLoss(Loss):
    """Label-distribution-aware margins on a cosine head, with deferred re-weighting; see `ldam`.

    The paper re-weights after 0.8 of the steps. That comes where the one-cycle schedule has little
    learning rate left to act with: on digits cut to 100 to 3 images a class 0.5 was better in short
    trainings and level in long ones.

    Parameters
    ----------
    max_margin
        Margin of the rarest class, in cosine units.
    """

    max_margin: float = parameter(above(0), default=0.5, search=(0.1, 1.0))
    reweight_after: float | None = 0.5

    on_cosines = True
    scale: ClassVar[float] = 30.0

    def constants(self, class_mass: torch.Tensor) -> torch.Tensor:
        """Margins on the scale of the logits."""
        return self.scale * ldam_margins(class_mass, self.max_margin)

    def costs(self, logits: torch.Tensor, constants: torch.Tensor) -> torch.Tensor:
        """Costs of `ldam` with these margins."""
        return ldam(logits, constants)


class LogitAdjustedLoss(Loss):
    """Cross-entropy of logits shifted by the log of the class shares; see `logit_adjusted`.

    Parameters
    ----------
    tau
        Strength of the shift.
    """

    tau: float = parameter(at_least(0), default=1.0, search=(0.0, 2.0))

    def constants(self, class_mass: torch.Tensor) -> torch.Tensor:
        """Log of the class shares."""
        return (class_mass / class_mass.sum()).log()

    def costs(self, logits: torch.Tensor, constants: torch.Tensor) -> torch.Tensor:
        """Costs of `logit_adjusted` with this log prior."""
        return logit_adjusted(logits, constants, self.tau)


class _CalledLoss(Loss):
    """A function from (logits, labels, class counts) to one cost per sample."""

    function: Any = parameter(default=None)

    def costs(self, logits: torch.Tensor, constants: torch.Tensor) -> torch.Tensor:
        """Ask for the costs under each label in turn: labels may be soft, or mixed."""
        n, n_classes = logits.shape
        labels = torch.arange(n_classes, device=logits.device).unsqueeze(1).expand(-1, n)
        columns = [self.function(logits, label, constants) for label in labels]
        if not all(isinstance(c, torch.Tensor) and c.shape == (n,) for c in columns):
            raise ValueError(
                f"loss must give one cost per sample, a tensor of shape ({n},), but gave "
                f"{getattr(columns[0], 'shape', columns[0])}."
            )
        return torch.stack(columns, dim=1)


#: Losses by the name that ``loss=`` takes.
LOSSES: dict[str, type[Loss]] = {
    "cross_entropy": CrossEntropyLoss,
    "focal": FocalLoss,
    "class_balanced": ClassBalancedLoss,
    "ldam": LDAMLoss,
    "balanced_softmax": LogitAdjustedLoss,
    "logit_adjusted": LogitAdjustedLoss,
}


def resolve_loss(loss: Any) -> Loss:
    """Turn what a user may pass as `loss` into a loss.

    Parameters
    ----------
    loss : str, Loss or callable
        A name of ``LOSSES`` takes its defaults.

    Raises
    ------
    TypeError
        If it is a class.
    ValueError
        If a parameter of the loss is out of range.
    """
    if isinstance(loss, type):
        raise TypeError(f"loss={loss.__name__} is a class: pass an instance, {loss.__name__}().")
    if isinstance(loss, str):
        return LOSSES[loss]()
    if not isinstance(loss, Loss):
        return _CalledLoss(function=loss)
    loss._validate_params()
    return loss
