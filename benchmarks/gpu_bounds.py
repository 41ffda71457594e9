"""What training on a GPU is held to, in one run: a step waits for kernels, not for Python.

    python benchmarks/gpu_bounds.py [--tiny]

The first table has one line per bound: figure, bound, what was measured, whether it holds, and
`start`, the seconds that the fit needed before its steps were as fast as they become (reading,
capture, choice of kernels), which are in no figure but CSSN's whole fit. An epoch of the second
stage of LMD has an M-step in it. The second table says how a step grows.

Bounds are those of a GPU of the class of an H100: on a CPU, or with the tiny networks and images of
--tiny, nothing is judged. The exit code is 1 where a bound does not hold. The bare loop is that of
training_speed.py: eager, at the same precision.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from busy import DEVICE, N_EPOCHS, Course, make_images, measured, seconds, watched
from sklearn.base import clone
from training_speed import bare_course

from sklearn_medimb import (
    AMIMVEncoder,
    CSSNClassifier,
    LMDClassifier,
    MetricTwoStageClassifier,
    SoftmaxClassifier,
    SPMixClassifier,
    SSLEncoder,
)
from sklearn_medimb.backbones import Backbone, ConvNet, EfficientNetLite, ResNet
from sklearn_medimb.methods._cssn import SupportBank
from sklearn_medimb.methods._self_supervised import METHODS as SSL_METHODS

RESNET, CONV, LITE = ResNet(18), ConvNet(), EfficientNetLite(0, weights=None)
PLAIN, MEDICAL = SoftmaxClassifier(augment="none"), SoftmaxClassifier(augment="medical")
MANY, FEW = 5_000, 2_000  # images: no multiple of a batch, the last one is short
CLASSIFIERS = (
    SoftmaxClassifier(),
    CSSNClassifier(),
    LMDClassifier(n_rounds=N_EPOCHS + 1),  # so many rounds are epochs of its second stage
    MetricTwoStageClassifier(),
    SPMixClassifier(),
)
ENCODERS = (AMIMVEncoder(), *map(SSLEncoder, SSL_METHODS))
ENCODER_TYPES = tuple(map(type, ENCODERS))
GROWTH = {
    "n": (1_000, 4_000, 16_000),
    "side": (32, 64, 128, 224),
    "batch_size": (16, 64, 256, 1024),
    "n_classes": (2, 8, 32),
    "supports": (3, 10, 30, 100),
}


class Row(NamedTuple):
    """A line of the table; `of` is the course of training that was measured."""

    figure: str
    bound: float
    measured: float
    of: Course | None = None


class Bench:
    """Fits by the clock, of real or of tiny size."""

    def __init__(self, tiny: bool) -> None:
        self.tiny = tiny

    def images(self, n: int, side: int) -> tuple[np.ndarray, np.ndarray]:
        return make_images(72, 8) if self.tiny else make_images(n, side)

    def network(self, backbone: Backbone) -> Backbone:
        return ConvNet(widths=(4, 8)) if self.tiny else backbone

    def fit(
        self,
        estimator: Any,
        backbone: Backbone,
        n: int,
        side: int,
        n_classes: int = 2,
        profiled: bool = True,
    ) -> list[Course]:
        """Courses of the fit of an estimator, with labels where it takes any."""
        X, _ = self.images(n, side)
        params = {"backbone": self.network(backbone), "max_epochs": N_EPOCHS, "random_state": 0}
        y = [] if isinstance(estimator, ENCODER_TYPES) else [np.arange(len(X)) % n_classes]
        return watched(clone(estimator).set_params(**params), X, *y, profiled=profiled)

    def rows(self) -> Iterator[Row]:
        """Whatever is held to a bound."""
        # What is compared comes first: a process that has profiled launches more slowly.
        yield self.whole_fit()
        timed = {"n": MANY, "profiled": False}
        for name, backbone, side, bound in (
            ("conv net", CONV, 28, 0.5),
            ("EfficientNet-Lite0", LITE, 128, 0.5),
            ("ResNet-18", RESNET, 64, 0.35),
        ):
            (ours,) = self.fit(PLAIN, backbone, side=side, **timed)
            X, y = self.images(MANY, side)
            bare = bare_course(X, y, self.network(backbone), profiled=False)
            yield Row(f"fit / bare loop, {name}, {side} px", bound, ours.step / bare.step, ours)
        (medical,) = self.fit(MEDICAL, RESNET, side=64, **timed)
        added = medical.step / ours.step - 1
        yield Row("medical augmentation adds, ResNet-18, 64 px", 0.12, added, medical)
        for side, n, bound in ((64, MANY, 0.25), (224, FEW, 0.10)):
            (course,) = self.fit(PLAIN, RESNET, n, side)
            yield Row(f"idle share, ResNet-18, {side} px", bound, course.idle, course)
        for estimator in (*CLASSIFIERS, *ENCODERS):
            name = f"{type(estimator).__name__} {getattr(estimator, 'method', '')}"
            for course in self.fit(estimator, RESNET, FEW, 64):
                figure = " ".join(f"step / its kernels, {name} {course.name}".split())
                yield Row(figure, 1.25, course.step / course.busy, course)

    def whole_fit(self) -> Row:
        """CSSN as it comes, all in; an epoch more than the steps asked for where they do not fit.

        A fit of one epoch goes before: what a process does once is not the method's.
        """
        X, y = self.images(FEW, 64)
        n_steps = 4 if self.tiny else 300
        per_epoch = CSSNClassifier(max_epochs=1, random_state=0).fit(X, y).net_.steps_per_epoch
        clf = CSSNClassifier(max_epochs=-(-n_steps // per_epoch), random_state=0)
        took = seconds(lambda: clf.fit(X, y))
        return Row(f"CSSN, {FEW:,} images of 64 px, {n_steps} steps, s", 3.0, took)

    def grown(self, what: str, size: int) -> str:
        """What a step is like where one thing has this size: CSSN's for classes and supports."""
        if what == "supports":  # which training does not know
            X, y = self.images(1_000, 64)
            params = {"backbone": self.network(CONV), "max_epochs": 1, "random_state": 0}
            clf = CSSNClassifier(bank=SupportBank(n=size), **params).fit(X, y)
            return f"{measured(lambda: clf.predict(X), len(X)).told()} (a step is a predict)"
        estimator, backbone = PLAIN, RESNET
        given = {"n": 4_096 if what == "batch_size" else 1_000, "side": 64, what: size}
        if what == "batch_size":
            estimator = clone(PLAIN).set_params(batch_size=given.pop(what))
        elif what == "n_classes":
            estimator, backbone = CSSNClassifier(), CONV
        (course,) = self.fit(estimator, backbone, **given)
        return course.told()


def failures(rows: Iterable[Row], judged: bool) -> int:
    """Print the table, each line when it is there; the number of bounds that do not hold."""
    print(f"{'figure':56} {'bound':>6} {'measured':>9} {'start, s':>9} {'holds':>6}")
    failed = 0
    for row in rows:
        start = "-" if row.of is None else f"{row.of.start:.2f}"
        holds = row.measured <= row.bound
        verdict = ("NO", "yes")[holds] if judged else "-"
        line = f"{row.figure:56} {row.bound:6.2f} {row.measured:9.3f} {start:>9} {verdict:>6}"
        print(line, flush=True)
        failed += judged and not holds
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="see each line work; judge nothing")
    args = parser.parse_args()
    bench, on_gpu = Bench(args.tiny), DEVICE.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{name}, torch {torch.__version__}{', tiny: names are not sizes' * args.tiny}\n")
    failed = failures(bench.rows(), judged=on_gpu and not args.tiny)
    print()
    for what, sizes in GROWTH.items():
        for size in sizes[: 1 if args.tiny else None]:
            print(f"{what:10} {size:6}  {bench.grown(what, size)}", flush=True)
    sys.exit(int(failed > 0))


if __name__ == "__main__":
    main()
