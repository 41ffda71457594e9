"""Steps that a GPU records and replays, on a simulated one.

A recording there holds operations and the places they read and write, nothing of Python: what
would be frozen on a GPU is frozen here.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

from sklearn_medimb import AMIMVEncoder
from sklearn_medimb._machine.randomness import Dropout
from sklearn_medimb._training import steps
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.methods._tailboost import Contrast
from tests.estimators import PUBLIC
from tests.simulated_cuda import SimulatedCuda
from tests.test_cuda import NETWORKS

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="looks into the simulation"),
    pytest.mark.filterwarnings("ignore:The features have all but collapsed"),
    pytest.mark.filterwarnings("ignore:In .* steps the thresholds"),
]

RNG = np.random.default_rng(0)
Y = np.repeat([0, 1, 2], [30, 12, 8])
X = RNG.integers(0, 255, (len(Y), 3, 12, 12), dtype=np.uint8)
SMALL = {
    "backbone": ConvNet(widths=(4, 8)),
    "batch_size": 10,
    "max_epochs": 3,
    "precision": "float64",
    "random_state": 0,
}


@pytest.fixture
def fit(monkeypatch):
    """Fit a copy, recorded or not; gives what the steps of each of its stages came to."""

    def run(estimator, X=X, y=Y, *, record, **given):
        seen, close = [], steps.Steps.close

        def look(self):
            if hasattr(self.source, "generator"):
                drawn = self.source.generator.get_state().tolist()
                kinds = len(self.counts)
                seen.append((self.reason, self.n_replayed, kinds, drawn))
            close(self)

        with monkeypatch.context() as patch, SimulatedCuda():
            patch.setattr(steps, "WARM_UP", 2 if record else 10**9)
            patch.setattr(steps.Steps, "close", look)
            fitted = clone(estimator).fit(X, y, **given)
            return fitted.weights_, fitted.history_, seen

    return run


@pytest.fixture
def both(fit):
    """Fit recorded and not: all is the same. What the stages of the first came to."""

    def run(estimator, X=X, y=Y, *, atol=1e-6, **given):
        plain, expected, before = fit(estimator, X, y, record=False, **given)
        recorded, history, seen = fit(estimator, X, y, record=True, **given)
        assert {replayed for _, replayed, _, _ in before} == {0}
        for name, weights in plain.items():
            np.testing.assert_allclose(recorded[name], weights, rtol=0, atol=atol)
        for one, other in zip(history, expected, strict=True):
            assert one.keys() == other.keys()
            assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
        assert [drawn for *_, drawn in seen] == [drawn for *_, drawn in before]
        return [stage[:3] for stage in seen]

    return run


# One row per way to train: each public estimator by default, and what changes its steps.
WAYS = {
    **{name: (name, {}) for name in NETWORKS if name != "PretrainedFeatures"},
    "dropout": ("SoftmaxClassifier", {"backbone": nn.Sequential(nn.Conv2d(3, 4, 3), Dropout(0.3))}),
    "torch's dropout": (
        "SoftmaxClassifier", {"backbone": nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.3))},
    ),
    "noise drawn in the step": ("SoftmaxClassifier", {"augment": "strong"}),
    "mixup": ("SoftmaxClassifier", {"mixup": "mixup"}),
    "balanced mixup": ("SoftmaxClassifier", {"mixup": "balanced"}),
    "weights that change": ("SoftmaxClassifier", {"loss": "ldam"}),
    "running mean": ("SoftmaxClassifier", {"ema": 0.9, "early_stopping": True}),
    "rates by layer": ("SoftmaxClassifier", {"backbone_lr": 0.3, "layer_decay": 0.5}),
    "SGD": (
        "SoftmaxClassifier",
        {"net_params": {"optimizer": torch.optim.SGD, "optimizer__momentum": 0.9}},
    ),
    "pairs": ("CSSNClassifier", {"pair_view": "pair", "batch_size": 6}),
    "relations late": ("LMDClassifier", {"relation_start": 0.5, "max_epochs": 6}),
    "class centres": (
        "MetricTwoStageClassifier", {"metric_loss": "class_center_triplet", "batch_size": 12},
    ),
    "tokens": ("SPMixClassifier", {"contrast": "gpaco", "batch_size": 12}),
    "key encoder": (
        "SPMixClassifier", {"contrast": Contrast("supcon", key_momentum=0.9), "batch_size": 12},
    ),
    "moco": ("SSLEncoder", {"method": "moco"}),
    "byol": ("SSLEncoder", {"method": "byol"}),
    "vectors": ("SoftmaxClassifier", {"backbone": "auto"}),
    "pre-trained vectors": ("SSLEncoder", {"backbone": "auto"}),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_replayed_steps_do_what_steps_do(way, both):
    """To the rounding of a learning rate to float32; and with the same random numbers."""
    name, params = WAYS[way]
    own = {k: v for k, v in SMALL.items() if k in PUBLIC[name]().get_params()}
    estimator = PUBLIC[name](**{**own, **params})
    if name == "AMIMVClassifier":
        estimator.set_params(pretrain=AMIMVEncoder(**own))
    images = X.reshape(len(X), -1)[:, ::9].astype(np.float32) if "vectors" in way else X
    y = Y if name not in ("SSLEncoder", "AMIMVEncoder") else None
    for reason, n_replayed, _ in both(estimator, images, y):
        assert reason is None
        assert n_replayed > 0
