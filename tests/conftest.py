"""Small images and networks for every test."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two processes with two threads each starve one another: one each, before any library counts
    # cores, and for all that they start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib as mpl
import numpy as np
import pytest
import torch

from sklearn_medimb.backbones import ConvNet
from tests.helpers import make_blobs
from tests.simulated_cuda import SimulatedCuda

mpl.use("Agg")
if torch.cuda.is_available():  # the same fit twice is compared to the bit
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture
def tiny() -> dict:
    """Constructor parameters of a network that trains in well under a second."""
    return {
        "backbone": ConvNet(widths=(8, 16)),
        "max_epochs": 3,
        "batch_size": 16,
        "random_state": 0,
    }


@pytest.fixture
def blobs() -> tuple[np.ndarray, np.ndarray]:
    """60 uint8 images of three classes, 36 : 16 : 8; the class is the place of a bright spot."""
    return make_blobs()


def pytest_addoption(parser):
    parser.addoption(
        "--simulate-cuda",
        action="store_true",
        help="run the tests with a simulated CUDA device, which device='auto' then takes",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Neighbours stay in one worker, which makes their fixtures once, and none idles at the end."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(autouse=True, scope="session")
def _simulated_cuda(request):
    if request.config.getoption("--simulate-cuda"):
        torch.use_deterministic_algorithms(True)
        with SimulatedCuda():
            yield
    else:
        yield
