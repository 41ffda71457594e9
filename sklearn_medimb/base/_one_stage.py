"""What one-stage classifiers share: a softmax head under one of the classical losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sklearn_medimb._parameters import at_least, learned, one_of, parameter
from sklearn_medimb._training.criterion import Criterion, LabelCriterion
from sklearn_medimb._training.stage import TrainingSet
from sklearn_medimb.base._classifier import BaseImageClassifier
from sklearn_medimb.losses import (
    LOSSES,
    LabelLoss,
    LDAMLoss,
    Loss,
    class_weights,
    effective_number_weights,
    of_unit_mean,
    resolve_loss,
)


class CosineHead(nn.Module):
    """Scaled cosines between features and class vectors, as LDAM needs them."""

    scale = LDAMLoss.scale

    def __init__(self, n_features: int, n_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_classes, n_features))
        nn.init.normal_(self.weight)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits of shape (n, n_classes), within ``+-scale``."""
        return self.scale * F.linear(F.normalize(features), F.normalize(self.weight))


class OneStageClassifier(BaseImageClassifier):
    """A network with a softmax head, trained at once by the loss that `loss` names.

    A method supplies its loss (`_make_loss`) or its batches (`_make_batches`); where these show
    classes in other shares than the training rows have, also those (`_class_mass`).

    Parameters
    ----------
    loss
        By name, with its defaults, or an object of :mod:`sklearn_medimb.losses`, whose parameters
        are searchable, such as ``loss__gamma`` of ``FocalLoss()``. "focal": easy samples pay less;
        "class_balanced": cross-entropy weighted by effective numbers; "ldam":
        label-distribution-aware margins on a cosine head, with deferred re-weighting;
        "balanced_softmax" and "logit_adjusted" are one. A callable of one's own maps (logits (n,
        K), labels (n,), class counts (K,)) to n costs.
    class_weight
        Weights of the classes, on top of `loss`; only their ratios matter.
    post_hoc_tau
        Subtracts ``post_hoc_tau * log(prior)`` from the logits at predict (A. K. Menon et al., ICLR
        2021); use it with ``loss="cross_entropy"``, where 1 aims at balanced accuracy.

    Attributes
    ----------
    class_prior_
        Class shares in training: of the rows as they are resampled, weighted and mixed.
    """

    loss: Any = parameter(
        one_of(*LOSSES),
        Loss,
        callable,
        default="cross_entropy",
        kind='{"cross_entropy", "focal", "class_balanced", "ldam", "balanced_softmax", '
        '"logit_adjusted"}, Loss or callable',
        search=list(LOSSES),
    )
    class_weight: Any = parameter(dict, one_of("balanced"), None, default=None, search=True)
    post_hoc_tau: float = parameter(at_least(0), default=0.0, search=(0.0, 2.0))

    _ends_with_head = True

    class_prior_: np.ndarray = learned("ndarray of float of shape (n_classes,)", predicts=True)

    def _check_parameters(self) -> None:
        super()._check_parameters()
        self._make_loss()

    def _make_loss(self) -> Loss:
        """Loss of the logits; by default what `loss` names."""
        return resolve_loss(self.loss)

    def _class_mass(self, train: TrainingSet) -> np.ndarray:
        """Weight of each class in the batches, shape (n_classes,)."""
        return train.class_mass(len(self.classes_))

    def _make_head(self, n_features: int) -> nn.Module:
        head = CosineHead if self._make_loss().on_cosines else nn.Linear
        return head(n_features, len(self.classes_))

    def _make_criterion(self, train: TrainingSet, n_steps: int) -> Criterion:
        return LabelCriterion(self._label_loss(train, n_steps))

    def _label_loss(self, train: TrainingSet, n_steps: int) -> LabelLoss:
        loss, class_mass = self._make_loss(), self._class_mass(train)
        mass = torch.from_numpy(class_mass)
        in_rows = mass * torch.from_numpy(np.isin(np.arange(len(mass)), train.y))
        weight = torch.from_numpy(class_weights(self.class_weight, self.classes_, class_mass))
        late, switch = None, 0
        if loss.reweight_after is not None:
            late = of_unit_mean(weight * effective_number_weights(mass, loss.beta), in_rows)
            switch = round(loss.reweight_after * n_steps)
        weight = of_unit_mean(weight, in_rows)
        return LabelLoss(loss.costs, weight, late, switch, loss.constants(mass))

    def _inference_state(self, train: TrainingSet) -> dict[str, Any]:
        mass = self._class_mass(train)
        return {"class_prior_": mass / mass.sum()}

    def _score_function(self, *, in_chunks: bool = True) -> Callable[[torch.Tensor], torch.Tensor]:
        logits, offset = super()._score_function(in_chunks=in_chunks), torch.zeros(())
        if self.post_hoc_tau:
            offset = torch.as_tensor(self.post_hoc_tau * np.log(self.class_prior_))
        offset = offset.to(self.net_.dtype).to(self.net_.device)
        return lambda batch: logits(batch) - offset
