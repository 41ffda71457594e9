"""Convolutions on every CPU: at each set of instructions that this machine can emulate.

A fault of a library's kernel kills the process or spoils memory beside a buffer, so that each set
runs in a process of its own, through the path that training takes: images from `Preprocessor`,
layers in a `Trunk`.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_medimb._data.batches import Preprocessor
from sklearn_medimb._training.network import Trunk, may_be_channels_last
from sklearn_medimb.backbones import ConvNet, EfficientNetLite, HybridViT, ResNet, ViT

# oneDNN's sets, from old machines to new ones, and ATen's: the machine's own but for the oldest.
SETS = {"AVX2": "AVX2", "AVX-512": "AVX512_CORE", "BF16": "AVX512_CORE_BF16", "all": "ALL"}
ATEN = {"AVX2": "avx2"}
# Without instructions for bfloat16, the sum over a kernel is rounded at each step.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 4e-2}


def shapes():
    """(dims, input channels, output channels, kernel, stride, groups, size)."""
    for n_in in range(1, 18):  # layers that shrink a map without looking around
        yield from ((2, n_in, n_out, 1, 2, 1, 8) for n_out in (1, 8, 17))
        yield 2, n_in, 18 - n_in, 1, 3, 1, 9
        yield 3, n_in, 18 - n_in, 1, 2, 1, 6
    pairs = itertools.product((2, 3, 5, 7), (1, 2, 3))
    for first, (kernel, stride) in enumerate(pairs):
        yield from ((2, n, 18 - n, kernel, stride, 1, 8) for n in range(1 + first % 3, 18, 3))
    for first, (kernel, stride) in enumerate(itertools.product((2, 3), (1, 2))):
        yield from ((3, n, 18 - n, kernel, stride, 1, 5) for n in range(1 + first, 18, 4))
    for n, kernel, stride in itertools.product((2, 4, 8), (1, 3), (1, 2)):
        yield 2, n, n, kernel, stride, n, 8  # depthwise
        yield 2, n, 2 * n, kernel, stride, 2, 8


def deviation(dims, n_in, n_out, kernel, stride, groups, size, dtype, autocast):
    """Largest relative difference from plain float64, of output and gradients."""
    kind = (nn.Conv2d, nn.Conv3d)[dims - 2]
    generator = torch.Generator().manual_seed(0)

    def draw(shape):
        """Numbers that bfloat16 holds exactly: only arithmetic may round."""
        return (torch.rand(shape, generator=generator) - 0.5).bfloat16().double()

    layer = kind(n_in, n_out, kernel, stride=stride, groups=groups, padding=kernel // 2)
    exact = kind(n_in, n_out, kernel, stride=stride, groups=groups, padding=kernel // 2).double()
    exact.load_state_dict({name: draw(value.shape) for name, value in layer.state_dict().items()})
    layer.load_state_dict(exact.state_dict())
    shape = (n_in, *[size] * dims)
    trunk = Trunk(layer, shape, autocast=autocast).to(dtype)
    zero, one = np.zeros(n_in), np.ones(n_in)
    prepare = Preprocessor(
        zero, one, dtype=dtype, device=torch.device("cpu"), channels_last=trunk.channels_last
    )
    rows = draw((2, *shape))
    images = prepare.normalise(rows.to(dtype)).requires_grad_()
    plain = rows.clone().requires_grad_()
    output, expected = trunk(images), exact(plain)
    weight = draw(expected.shape)
    (output * weight.to(output.dtype)).sum().backward()
    (expected * weight).sum().backward()
    pairs = [(output, expected), (images.grad, plain.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(layer.parameters(), exact.parameters(), strict=True)]
    return max(float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in pairs)


def run(every=1):
    """What a process does for one set; any difference or death is the parent's to report."""
    for number, shape in enumerate(shapes()):
        if number % every:
            continue
        arithmetics = [(torch.float32, None)]
        if number % 3 == 0:
            arithmetics += [(torch.float32, torch.bfloat16), (torch.float64, None)]
        for dtype, autocast in arithmetics:
            print(shape, dtype, autocast, flush=True)  # the last line, if it dies
            error = deviation(*shape, dtype, autocast)
            assert error < TOLERANCE[autocast or dtype], error


def run_each(names):
    """One child for each set: oneDNN, unlike ATen, looks for its own when it is first used."""
    torch.set_num_threads(1)
    for name in names:
        child = os.fork()
        if not child:
            os.environ["ONEDNN_MAX_CPU_ISA"] = SETS[name]
            # The fault that is known is one of AVX2; of the others a third is looked at.
            run(1 if name == "AVX2" else 3)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(f"{name}: {os.waitstatus_to_exitcode(status)}", flush=True)


@pytest.fixture(scope="module")
def answers():
    """What the children of a process with one of ATen's sets say, which takes long to start."""

    @cache
    def answer(aten):
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
            # Where glibc has it: who writes past the end of a buffer is told when it is freed.
            "LD_PRELOAD": "libc_malloc_debug.so.0",
            "MALLOC_CHECK_": "3",
        }
        if aten:
            env["ATEN_CPU_CAPABILITY"] = aten
        names = [name for name in SETS if ATEN.get(name) == aten]
        code = f"from tests._machine.test_instructions import run_each; run_each({names})"
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)

    return answer


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("name", SETS)
def test_convolutions_are_right_on_every_cpu(name, answers):
    answer = answers(ATEN.get(name))
    before, ended, _ = answer.stdout.partition(f"{name}: ")
    code = answer.stdout[len(before + ended) :].splitlines()[:1]
    assert code == ["0"], f"{before.splitlines()[-1:]}: {code}\n{answer.stderr[-2000:]}"


@pytest.mark.parametrize(
    ("layer", "safe"),
    [
        (nn.Conv2d(4, 8, 1, stride=2), False),
        (nn.Conv2d(4, 8, 1, stride=(1, 2)), False),
        (nn.Conv3d(7, 8, 1, stride=2), False),
        (nn.ConvTranspose2d(8, 4, 1, stride=2), False),
        (nn.Conv2d(8, 4, 1, stride=2), True),
        (nn.Conv2d(4, 8, 1), True),
        (nn.Conv2d(3, 8, 3, stride=2), True),
        (nn.ConvTranspose2d(4, 8, 1, stride=2), True),
    ],
)
def test_narrow_strided_layers_stay_out_of_channels_last(layer, safe):
    assert may_be_channels_last(nn.Sequential(nn.Conv2d(3, 8, 3), layer)) == safe
    given = layer.to(memory_format=torch.channels_last if layer.weight.ndim == 4 else None)
    trunk = Trunk(nn.Sequential(given), (3, *[9] * (layer.weight.ndim - 2)), autocast=None)
    assert trunk.channels_last == safe
    assert safe or all(weight.is_contiguous() for weight in trunk.parameters())


def test_weights_of_unknown_layers_may_be_strided():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8, 4, 1, 1))

    assert not may_be_channels_last(Own())


def test_the_packages_own_networks_are_channels_last():
    for backbone in (ConvNet(), ResNet(), ViT(), HybridViT(), EfficientNetLite(weights=None)):
        assert may_be_channels_last(backbone.build((3, 32, 32)))
    assert not may_be_channels_last(HybridViT(stem_width=4).build((3, 32, 32)))
