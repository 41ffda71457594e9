"""The seed alone decides, in any thread and process; the caller's generators stay theirs."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sklearn_medimb import SoftmaxClassifier
from sklearn_medimb.backbones import MLP, ConvNet, ViT

from .conftest import make_blobs

VIT = {"patch_size": 4, "width": 16, "depth": 2, "n_heads": 2}


class Foreign(nn.Module):
    """A network that knows torch's default generators only, and draws from them in every way."""

    def __init__(self, in_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 8, 3)
        nn.init.orthogonal_(self.conv.weight)
        self.shift = nn.Parameter(torch.randn(8, 1, 1))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.leaky = nn.RReLU()

    def forward(self, images):
        x = F.dropout2d(self.leaky(self.conv(images) + self.shift), 0.3, self.training)
        if self.training:
            x = x * torch.rand_like(x) + 0.1 * torch.randn(8, 1, 1)
        x = self.block(x.flatten(2).transpose(1, 2))
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.1 if self.training else 0.0)


NETWORKS = {
    "convolutions": ConvNet(widths=(8,)),
    "perceptron with dropout": MLP((16,), dropout=0.2),
    "transformer with dropout and drop path": ViT(**VIT, dropout=0.1, drop_path=0.2),
    "torch's dropout": nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout2d(0.2)),
    "class of modules": Foreign,
}


def global_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


@contextmanager
def someone_draws():
    """Another thread of the caller draws from torch and NumPy all the while; numbers it got."""
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    numbers: list = []
    done = threading.Event()

    def draw():
        while not done.is_set():
            numbers.append((torch.rand(1).item(), np.random.random()))  # noqa: NPY002
            time.sleep(1e-3)  # let the fits have the interpreter

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert len(numbers) > 20
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = zip(torch.rand(len(numbers)).tolist(), np.random.random(len(numbers)), strict=True)  # noqa: NPY002
    assert numbers == list(expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_fits_in_three_threads_equal_the_serial_one(name):
    X, y = make_blobs()

    def fit(_=None):
        clf = SoftmaxClassifier(NETWORKS[name], max_epochs=2, batch_size=16, random_state=0)
        return clf.fit(X, y).weights_

    before = global_states()
    alone = fit()
    assert global_states() == before
    with someone_draws(), ThreadPoolExecutor(3) as threads:
        fits = list(threads.map(fit, range(3)))
    for weights in fits:
        for key, value in weights.items():
            assert np.array_equal(value, alone[key]), key
