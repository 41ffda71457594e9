"""Whether the running statistics of batch normalisation are those of the training images."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from sklearn_medimb._data.images import Images
from sklearn_medimb._training.network import BATCH_NORMS, Trunk

MISFIT = 0.3  # standard deviations; those of 64 images differ by less from those of all


class Misfit(NamedTuple):
    """The layer whose running statistics fit worst, and by how many standard deviations."""

    layer: str
    size: float


def misfit(trunk: Trunk, images: Images, rows: np.ndarray, prepare: Any, n: int = 64) -> Misfit:
    """How far the running statistics of a backbone are from those of some training images.

    Training normalises with the statistics of the batch, prediction with the running ones: what
    lies between them is what predictions are off. Both the shift and the logarithm of the ratio of
    the standard deviations count, as root mean square over the channels of a layer.

    Parameters
    ----------
    trunk : Trunk
        Keeps its statistics; afterwards it is in the mode that it was in.
    images : Images
        Where to read.
    rows : ndarray of int
        The training rows.
    prepare : callable
        Normalises a batch.
    n : int, default=64
        How many of the rows are looked at, at most.

    Returns
    -------
    misfit : Misfit
        Of size 0 where there is nothing to compare.
    """
    frozen = {id(layer) for layer in trunk.frozen}
    layers = {
        name: layer
        for name, layer in trunk.backbone.named_modules()
        if isinstance(layer, BATCH_NORMS)
        and layer.running_mean is not None
        and id(layer) not in frozen
    }
    some = np.unique(rows[np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(int)])
    if not layers or len(some) < 2:
        return Misfit("", 0.0)
    before = {name: _statistics(layer) for name, layer in layers.items()}
    buffers = [(b, b.clone()) for layer in layers.values() for b in layer.buffers()]
    momenta, training = {name: layer.momentum for name, layer in layers.items()}, trunk.training
    trunk.eval()
    try:
        for layer in layers.values():
            layer.training, layer.momentum = True, 1.0  # they become those of the batch
        with torch.no_grad():
            trunk(prepare(images.rows(some)))
        there = {name: _statistics(layer) for name, layer in layers.items()}
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)
        for name, layer in layers.items():
            layer.momentum = momenta[name]
        trunk.train(training)
    return max((Misfit(name, _distance(before[name], there[name])) for name in layers),
               key=lambda one: one.size)  # fmt: skip


def _statistics(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.running_mean.double().clone(), layer.running_var.double() + layer.eps


def _distance(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> float:
    shift = (a[0] - b[0]).square() / torch.maximum(a[1], b[1])
    ratio = (a[1] / b[1]).log() / 2
    return float(torch.maximum(shift.mean(), ratio.square().mean()).sqrt())
