"""What one-stage classifiers share: a softmax head under one of the classical losses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.utils._param_validation import Interval, StrOptions
from torch import nn

from sklearn_medimb import losses
from sklearn_medimb._training.network import SoftmaxNetwork, Trunk
from sklearn_medimb._training.stage import TrainingSet
from sklearn_medimb.base._classifier import BaseImageClassifier
from sklearn_medimb.losses import LabelLoss, class_weights, of_unit_mean

LOSSES = (
    "cross_entropy",
    "focal",
    "class_balanced",
    "ldam",
    "balanced_softmax",
    "logit_adjusted",
)


class CosineHead(nn.Module):
    """Scaled cosines between features and class vectors, as LDAM needs them."""

    scale = 30.0

    def __init__(self, n_features: int, n_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_classes, n_features))
        nn.init.normal_(self.weight)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits of shape (n, n_classes), within ``+-scale``."""
        return self.scale * F.linear(F.normalize(features), F.normalize(self.weight))


class OneStageClassifier(BaseImageClassifier):
    """A network with a softmax head, trained at once by the loss that `loss` names.

    A method supplies its batches (`_make_batches`); where these show classes in other shares than
    the training rows have, also those (`_class_mass`).
    """

    class_prior_: np.ndarray

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **BaseImageClassifier._parameter_constraints,
        "loss": [StrOptions(set(LOSSES))],
        "class_weight": [dict, StrOptions({"balanced"}), None],
        "focal_gamma": [Interval(Real, 0, None, closed="left")],
        "beta": [Interval(Real, 0, 1, closed="left")],
        "max_margin": [Interval(Real, 0, None, closed="neither")],
        "tau": [Interval(Real, 0, None, closed="left")],
        "post_hoc_tau": [Interval(Real, 0, None, closed="left")],
        "reweight_after": [StrOptions({"auto"}), Interval(Real, 0, 1, closed="both"), None],
    }

    _array_kinds: ClassVar[dict[str, tuple[str, str, int]]] = {
        **BaseImageClassifier._array_kinds,
        "class_prior_": ("f", "K", 1),
    }
    _inference_arrays: ClassVar[tuple[str, ...]] = (
        *BaseImageClassifier._inference_arrays,
        "class_prior_",
    )

    def _class_mass(self, train: TrainingSet) -> np.ndarray:
        """Weight of each class in the batches, shape (n_classes,)."""
        return train.class_mass(len(self.classes_))

    def _make_network(self, trunk: Callable[..., Trunk]) -> nn.Module:
        return SoftmaxNetwork(trunk(), self._make_head)

    def _make_head(self, n_features: int) -> nn.Module:
        head = CosineHead if self.loss == "ldam" else nn.Linear
        return head(n_features, len(self.classes_))

    def _make_criterion(self, train: TrainingSet, n_steps: int) -> nn.Module:
        return self._label_loss(train, n_steps)

    def _label_loss(self, train: TrainingSet, n_steps: int) -> LabelLoss:
        class_mass = self._class_mass(train)
        mass = torch.from_numpy(class_mass)
        in_rows = mass * torch.from_numpy(np.isin(np.arange(len(mass)), train.y))
        effective = losses.effective_number_weights(mass, self.beta)
        weight = torch.from_numpy(class_weights(self.class_weight, self.classes_, class_mass))
        late = None
        reweight_after = self.reweight_after
        if reweight_after == "auto":
            reweight_after = 0.5 if self.loss == "ldam" else None
        if self.loss == "class_balanced":
            weight = weight * effective
        elif reweight_after is not None:
            late = of_unit_mean(weight * effective, in_rows)
        switch = 0 if late is None else round(reweight_after * n_steps)
        return LabelLoss(self._label_costs(mass), of_unit_mean(weight, in_rows), late, switch)

    def _label_costs(self, mass: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Choose the formula."""
        if self.loss in ("cross_entropy", "class_balanced"):
            return losses.cross_entropy
        if self.loss == "focal":
            return partial(losses.focal, gamma=self.focal_gamma)
        device, dtype = self.net_.device, self.net_.dtype
        if self.loss == "ldam":
            margins = CosineHead.scale * losses.ldam_margins(mass, self.max_margin)
            return partial(losses.ldam, margins=margins.to(device, dtype))
        log_prior = (mass / mass.sum()).log().to(device, dtype)
        tau = 1.0 if self.loss == "balanced_softmax" else self.tau
        return partial(losses.logit_adjusted, log_prior=log_prior, tau=tau)

    def _inference_state(self, train: TrainingSet) -> dict[str, Any]:
        mass = self._class_mass(train)
        return {"class_prior_": mass / mass.sum()}

    def _score_function(self, *, in_chunks: bool = True) -> Callable[[torch.Tensor], torch.Tensor]:
        module, offset = self.net_.module_, torch.zeros(())
        if self.post_hoc_tau:
            offset = torch.as_tensor(self.post_hoc_tau * np.log(self.class_prior_))
        offset = offset.to(self.net_.dtype).to(self.net_.device)
        return lambda batch: module.head(module.features(batch)) - offset
