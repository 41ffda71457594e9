"""What the speed benchmarks count, and that each line of the GPU's bounds can be measured."""

from __future__ import annotations

import importlib
import math
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from skorch.callbacks import Callback
from torch.autograd import DeviceType

from sklearn_medimb import SSLEncoder
from sklearn_medimb._training.monitors import Monitor
from tests import simulated_cuda
from tests.estimators import SHARED

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Import one of the benchmarks, which import one another by name."""
    if simulated_cuda.current is not None:
        pytest.skip("the profiler sees real devices alone")
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def event(name, start, end, device=DeviceType.CUDA, annotation=False):
    """An event of a profile, in microseconds."""
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, end=end),
        device_type=device,
        is_user_annotation=annotation,
    )


def test_kernels_side_by_side_are_busy_once(load):
    host = DeviceType.CPU
    work = load("busy").work_of(
        [
            event("gemm", 10, 20),
            event("relu", 15, 30),  # on another stream
            event("inside", 16, 18),
            event("norm", 50, 60),
            event("Optimizer.step", 0, 100, annotation=True),
            event("Memcpy HtoD (Pinned -> Device)", 70, 90),
            event("Memset (Device)", 30, 50),
            event("cudaLaunchKernel", 0, 1, host),
            event("__cudaLaunchKernelExC", 1, 2, host),
            event("cuLaunchKernelEx", 2, 3, host),
            event("cudaGraphLaunch", 3, 4, host),
            event("cudaMemcpyAsync", 4, 5, host),
            event("cudaStreamSynchronize", 5, 99, host),
            event("aten::relu", 0, 2, host),
        ],
        "cuda",
    )
    assert work.busy == pytest.approx(30e-6)
    assert (work.kernels, work.calls) == (4, 5)


def test_a_device_that_was_not_seen_is_not_called_idle(load):
    with pytest.raises(RuntimeError, match="saw no kernels"):
        load("busy").work_of([event("cudaLaunchKernel", 0, 1, DeviceType.CPU)], "cuda")


def test_operators_that_compute_are_kernels_of_a_cpu(load):
    busy = load("busy")
    x = torch.ones(20, 30, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        y = torch.relu(x.t() + 1).reshape(-1).to(torch.float32)
        torch.empty(3)
    work = busy.work_of(profiler.events(), "cpu")
    # The sum, what is positive of it, and the copy that reshape makes of columns.
    assert (work.kernels, work.calls) == (3, 6)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        y.sum().backward()
        took = time.perf_counter() - start
    backward = busy.work_of(profiler.events(), "cpu")
    assert backward.kernels >= 3  # the sum, a one to begin with, and where the input was positive
    assert 0 < backward.busy <= took


def test_what_lies_between_epochs_is_not_in_a_step(load, blobs, monkeypatch):
    busy = load("busy")
    monkeypatch.setattr(Monitor, "on_epoch_end", lambda *args, **kwargs: time.sleep(0.3))
    encoder = SSLEncoder(**{**SHARED, "max_epochs": busy.N_EPOCHS}, random_state=0)
    (course,) = busy.watched(encoder, blobs[0])
    assert len(course.times) == busy.N_EPOCHS
    assert course.step * course.n_steps < 0.3
    assert course.n_images == len(blobs[0])
    assert course.kernels > 20
    # Who looks at single batches would keep steps from being captured.
    assert busy.Watch.on_batch_begin is Callback.on_batch_begin
    assert busy.Watch.on_batch_end is Callback.on_batch_end


def test_too_few_epochs_are_refused(load):
    busy = load("busy")
    with pytest.raises(ValueError, match="too few"):
        busy.Course(busy.WARM_UP + 1, 1, 1)


def test_each_bound_can_be_measured(load, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_bounds.py", "--tiny"])
    bounds = load("gpu_bounds")
    with pytest.raises(SystemExit) as ended:
        bounds.main()
    assert ended.value.code == 0  # nothing is judged
    table, growth = capsys.readouterr().out.split("\n\n")[1:]
    rows = [re.split(r"\s{2,}", line) for line in table.splitlines()[1:]]
    assert all(math.isfinite(float(measured)) for _, _, measured, *_ in rows)
    assert {row[-1] for row in rows} == {"-"}
    figures = [row[0] for row in rows]
    for kind in (*bounds.CLASSIFIERS, *bounds.ENCODERS):
        assert any(type(kind).__name__ in figure for figure in figures)
    n_methods = len(bounds.CLASSIFIERS) + 1 + len(bounds.ENCODERS)  # LMD has two stages
    assert len(rows) == 1 + 3 + 1 + 2 + n_methods
    assert len(growth.splitlines()) == len(bounds.GROWTH)


def test_a_bound_that_does_not_hold_is_told(load, capsys):
    bounds = load("gpu_bounds")
    rows = [bounds.Row("good", 1.0, 0.9), bounds.Row("bad", 1.0, 1.1)]
    assert bounds.failures(rows, judged=True) == 1
    good, bad = capsys.readouterr().out.splitlines()[1:]
    assert good.endswith("yes")
    assert bad.endswith("NO")
    assert bounds.failures(rows, judged=False) == 0
