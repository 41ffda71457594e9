"""Losses of a short training of every method, as they were written down once.

Whoever changes them on purpose writes them anew, by
``python -m tests.methods.test_losses_of_training``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sklearn_medimb import (
    AMIMVClassifier,
    AMIMVEncoder,
    CSSNClassifier,
    LMDClassifier,
    MetricTwoStageClassifier,
    SoftmaxClassifier,
    SPMixClassifier,
    SSLEncoder,
)
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.methods import Contrast
from tests.helpers import make_blobs

FILE = Path(__file__).with_suffix(".json")
SMALL = {
    "backbone": ConvNet(widths=(4, 8)),
    "max_epochs": 2,
    "batch_size": 16,
    "precision": "float64",
    "device": "cpu",
    "random_state": 0,
}
SUPCON = Contrast("supcon", projection_dim=8, hidden=16, key_momentum=0.9)
TRAININGS = {
    "softmax": SoftmaxClassifier(**SMALL),
    "softmax, LDAM": SoftmaxClassifier(**SMALL, loss="ldam"),
    "softmax, balanced mixup": SoftmaxClassifier(**SMALL, mixup="balanced"),
    "CSSN": CSSNClassifier(**SMALL),
    "metric": MetricTwoStageClassifier(**SMALL),
    "LMD": LMDClassifier(**SMALL, n_rounds=2),
    "SPMix": SPMixClassifier(**SMALL),
    "SPMix, supcon": SPMixClassifier(**SMALL, contrast=SUPCON, pairing="code"),
    "AMIMV": AMIMVEncoder(**SMALL),
    "AMIMV, fine-tuned": AMIMVClassifier(
        **SMALL, pretrain=AMIMVEncoder(max_epochs=1), fine_tune="full"
    ),
    **{
        method: SSLEncoder(method, **SMALL)
        for method in ("simclr", "moco", "byol", "simsiam", "barlow_twins", "vicreg")
    },
}


def losses(name: str) -> list[float]:
    X, y = make_blobs()
    history = TRAININGS[name].fit(X, y).history_
    return [row["train_loss"] for row in history]


@pytest.mark.parametrize("name", TRAININGS)
def test_trainings_go_as_they_went(name):
    assert losses(name) == pytest.approx(json.loads(FILE.read_text())[name], rel=1e-6)


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: losses(name) for name in TRAININGS}, indent=1) + "\n")
