"""How much the estimator costs over the bare computation: time of fit and predict, and memory.

Prints ratios from one run, for 5,000 images of 28 x 28 x 3, a small conv net, batches of 64:

- fit over the same computation as a bare PyTorch loop at the same precision,
- fit over a stock ``skorch.NeuralNetClassifier`` as a user would write it,
- predict of 10,000 images over the bare forward passes,
- peak memory of fit over the uint8 images and the network,

and of fit and bare loop what the kernels alone would allow, and how much of the time none runs.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from busy import DEVICE, N_EPOCHS, Course, make_images, seconds, synchronise, watched
from skorch import NeuralNetClassifier
from torch import nn

from sklearn_medimb import SoftmaxClassifier
from sklearn_medimb.backbones import Backbone, ConvNet, as_features

BATCH = 64
BLOCK = 1024 if DEVICE.type == "cuda" else 334  # of 28 x 28 in a forward pass, as the estimator's


class Plain(nn.Module):
    """The same network as the estimator's."""

    def __init__(self, sides: tuple[int, int], backbone: Backbone | None = None) -> None:
        super().__init__()
        self.backbone = (backbone or ConvNet()).build((3, *sides)).eval()
        with torch.no_grad():
            n_features = as_features(self.backbone(torch.zeros(1, 3, *sides))).shape[1]
        self.head = nn.Linear(n_features, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(as_features(self.backbone(images)).float())


@cache
def autocast_dtype() -> torch.dtype | None:
    """Precision that the estimator takes by itself on this machine."""
    return estimator(1).fit(*make_images(2, 8)).net_.module_.trunk.autocast


def bare_fit(
    X: np.ndarray,
    y: np.ndarray,
    n_epochs: int,
    backbone: Backbone | None = None,
    course: Course | None = None,
) -> nn.Module:
    """Resident uint8 images, autocast, channels-last, fused AdamW, one-cycle: nothing else."""
    autocast = autocast_dtype()
    net = Plain(X.shape[2:], backbone).to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2, fused=True)
    images, labels = torch.from_numpy(X), torch.from_numpy(y).to(DEVICE)
    if DEVICE.type == "cuda":
        images = images.to(DEVICE)
    n_steps = n_epochs * -(-len(X) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, total_steps=n_steps, cycle_momentum=False
    )
    mean, std = 0.5, 0.29
    net.train()
    for _ in range(n_epochs) if course is None else course.epochs():
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(X))).to(images.device)
        for rows in order.split(BATCH):
            batch = images.index_select(0, rows).to(DEVICE).float().div_(255).sub_(mean).div_(std)
            batch = batch.contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad()
            with torch.autocast(DEVICE.type, autocast, enabled=autocast is not None):
                features = net.backbone(batch)
            logits = net.head(as_features(features.float()))
            nn.functional.cross_entropy(logits, labels[rows.to(DEVICE)]).backward()
            optimizer.step()
            schedule.step()
    synchronise()
    return net


def bare_course(
    X: np.ndarray, y: np.ndarray, backbone: Backbone | None = None, profiled: bool = True
) -> Course:
    """The bare loop by the clock."""
    course = Course(N_EPOCHS, -(-len(X) // BATCH), len(X), profiled)
    bare_fit(X, y, N_EPOCHS, backbone, course)
    return course


def bare_predict(net: nn.Module, X: np.ndarray) -> np.ndarray:
    """Forward passes in blocks, one transfer at the end."""
    autocast = autocast_dtype()
    net.eval()
    images, parts = torch.from_numpy(X), []
    with torch.inference_mode():
        for batch in images.split(BLOCK):
            x = batch.to(DEVICE).float().div_(255).sub_(0.5).div_(0.29)
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast(DEVICE.type, autocast, enabled=autocast is not None):
                features = net.backbone(x)
            parts.append(net.head(as_features(features.float())).argmax(1))
    return torch.cat(parts).cpu().numpy()


def estimator(n_epochs: int) -> SoftmaxClassifier:
    return SoftmaxClassifier(ConvNet(), max_epochs=n_epochs, augment="none", random_state=0)


def stock(n_epochs: int) -> NeuralNetClassifier:
    """What a user writes: floats, the default loader, a validation split and a printed log off."""
    return NeuralNetClassifier(
        Plain,
        module__sides=(28, 28),
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        lr=2e-3,
        max_epochs=n_epochs,
        batch_size=BATCH,
        iterator_train__shuffle=True,
        train_split=None,
        verbose=0,
        device=str(DEVICE),
    )


def times(n_epochs: int, repeats: int) -> None:
    """Alternate the candidates; compare medians of paired ratios."""
    X, y = make_images(5_000, 28)
    X_many, _ = make_images(10_000, 28)
    floats = X.astype(np.float32) / 255
    bare_fit(X, y, 1), estimator(1).fit(X, y), stock(1).fit(floats, y)  # warm up
    fit_bare, fit_stock, predict = [], [], []
    for _ in range(repeats):
        ours = seconds(lambda: estimator(n_epochs).fit(X, y))
        bare = seconds(lambda: bare_fit(X, y, n_epochs))
        theirs = seconds(lambda: stock(n_epochs).fit(floats, y))
        fit_bare.append(ours / bare)
        fit_stock.append(ours / theirs)
        print(f"fit: ours {ours:.2f} s, bare loop {bare:.2f} s, stock skorch {theirs:.2f} s")
    fitted, net = estimator(1).fit(X, y), bare_fit(X, y, 1)
    for _ in range(2 * repeats):
        ours = seconds(lambda: fitted.predict(X_many))
        bare = seconds(lambda: bare_predict(net, X_many))
        predict.append(ours / bare)
    rate = 10_000 / ours
    print(f"device {DEVICE}, backbone in {autocast_dtype() or torch.float32}")
    print(f"fit / bare loop        {np.median(fit_bare):.3f}  (target <= 1.05)")
    print(f"fit / stock skorch     {np.median(fit_stock):.3f}  (target <= 0.5 with AMX)")
    print(f"predict / bare forward {np.median(predict):.3f}  (target <= 1.10), {rate:.0f} images/s")
    (course,), bare = watched(estimator(N_EPOCHS), X, y), bare_course(X, y)
    print(f"fit:       {course.told()}")
    print(f"bare loop: {bare.told()}")


def growth(what: str, n: int, side: int) -> int:
    """Peak resident bytes that `what` adds to a process that has imported everything."""
    command = [sys.executable, __file__, "--child", what, "--images", str(n), "--side", str(side)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def child(what: str, n: int, side: int) -> None:
    small = make_images(20 * BATCH - 1, side)  # two batch shapes, as in a whole epoch
    if what == "fit":
        estimator(1).fit(*make_images(2, 8))  # code that loads lazily
    else:
        bare_fit(*make_images(2, 8), 1)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    before = resident("VmRSS")
    if what == "network":
        bare_fit(*small, 2)
    else:
        estimator(1).fit(*make_images(n, side))
    print(json.dumps(resident("VmHWM") - before))


def resident(what: str) -> int:
    """Bytes of resident memory of this process: now (VmRSS) or at its peak (VmHWM)."""
    (line,) = re.findall(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(line)


def memory(n: int, side: int) -> None:
    array = n * 3 * side**2
    network, fit = growth("network", n, side), growth("fit", n, side)
    print(f"uint8 array {array / 2**20:.0f} MiB, network {network / 2**20:.0f} MiB, ", end="")
    print(f"fit {fit / 2**20:.0f} MiB")
    print(f"peak memory / (array + network) {fit / (array + network):.3f}  (target <= 1.3)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--child", choices=["fit", "network"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.images, args.side)
        return
    times(args.epochs, args.repeats)
    memory(args.images, args.side)


if __name__ == "__main__":
    main()
