"""How much of a training step a device computes: busy seconds, kernels and host calls.

Of a course of training some epochs warm up, some are timed, and the last is profiled, since what is
profiled cannot be timed: :class:`Course` does so for any loop, `watched` for the fit of an
estimator. Clock and profile are of epochs, not of what lies between two of them. A process that
has profiled may launch kernels more slowly from then on: time what is compared first.

On CUDA a kernel is what runs on the device, inside of a replayed graph too; busy is where at least
one runs, and copies count as idle. On a CPU a kernel is an operator that computes and is not made
of others that do; busy is where an operator runs. The profiler makes each operator of a CPU slower
by about a microsecond: of tiny networks busy may exceed the step, whose idle share is then 0.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from skorch.callbacks import Callback
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ACTIVITY = ProfilerActivity.CUDA if DEVICE.type == "cuda" else ProfilerActivity.CPU
WARM_UP = 2  # epochs in which kernels are chosen and a step may be captured
N_EPOCHS = WARM_UP + 4

# What the host asks of the device: CUDA's runtime, and its driver, which other compilers call.
LAUNCH = re.compile(r"_*(cu(da)?Launch\w*Kernel|cudaGraphLaunch|cuda(Memcpy|Memset)Async)")


def make_images(n: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Random uint8 images and labels."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, 3, side, side), dtype=np.uint8), np.arange(n) % 2


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - start


class Work(NamedTuple):
    """What a profile holds: seconds in which something was computed, kernels, host calls."""

    busy: float
    kernels: int
    calls: int


def work_of(events: Iterable[Any], device: str = DEVICE.type) -> Work:
    """Sum up the events of a profile."""
    if device == "cuda":
        events = list(events)
        kernels = [
            event
            for event in events
            if event.device_type == DeviceType.CUDA
            and not event.is_user_annotation  # spans kernels and what lies between them
            and not event.name.startswith(("Memcpy", "Memset"))
        ]
        if not kernels:
            raise RuntimeError("The profiler saw no kernels on the device: is CUPTI installed?")
        calls = [e for e in events if e.device_type == DeviceType.CPU and LAUNCH.match(e.name)]
        return Work(union(kernels), len(kernels), len(calls))
    operators = filter(is_operator, events)
    top = [event for event in operators if not any(map(is_operator, ancestors(event)))]
    return Work(union(top), sum(map(n_kernels, top)), len(top))


def union(events: list[Any]) -> float:
    """Seconds in which at least one event lasts: what runs side by side counts once."""
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    total, until = 0.0, -np.inf
    for start, end in spans:
        total += max(end - max(start, until), 0.0)
        until = max(until, end)
    return total / 1e6


def is_operator(event: Any) -> bool:
    return event.name.startswith("aten::")


def ancestors(event: Any) -> Iterator[Any]:
    while (event := event.cpu_parent) is not None:
        yield event


def n_kernels(event: Any) -> int:
    """Operators below one, or itself, that compute and are not made of others that do."""
    below = sum(map(n_kernels, event.cpu_children))
    return below or int(is_operator(event) and computes(event.name))


@cache
def computes(name: str) -> bool:
    """Whether an operator does more than to look at a tensor or to make room for one."""
    name = name.removeprefix("aten::")
    operator = getattr(torch.ops.aten, name, None)
    if name.startswith(("empty", "new_empty", "resize", "_unsafe_view")) or operator is None:
        return False
    for overload in (getattr(operator, name) for name in operator.overloads()):
        aliases = [out.alias_info for out in overload._schema.returns]  # noqa: SLF001
        view = any(alias is not None and not alias.is_write for alias in aliases)
        if view or torch.Tag.inplace_view in overload.tags:
            return False
    return True


class Course:
    """Clock of a course of training.

    Parameters
    ----------
    n_epochs : int
        At least ``WARM_UP + 2``.
    n_steps, n_images : int
        Of an epoch.
    profiled : bool
        Whether to profile the last one.
    name : str
        Of the stage.
    since : float or None
        `time.perf_counter` where all began; None is now.

    Attributes
    ----------
    step, busy : float
        Seconds of a step, and those of it in which something is computed.
    kernels, calls : float
        Number of them in a step; these and `busy` only where it was profiled.
    start : float
        Seconds before the first epoch, and what the warm-up took longer than epochs do.
    """

    def __init__(
        self,
        n_epochs: int,
        n_steps: int,
        n_images: int,
        profiled: bool = True,
        name: str = "",
        since: float | None = None,
    ) -> None:
        if n_epochs < WARM_UP + 2:
            raise ValueError(f"{n_epochs} epochs are too few: take at least {WARM_UP + 2}.")
        self.n_epochs, self.n_steps, self.n_images = n_epochs, n_steps, n_images
        self.profiled, self.name = profiled, name
        self.since = time.perf_counter() if since is None else since
        self.times: list[float] = []

    def begin(self) -> None:
        """Begin an epoch."""
        if self.profiled and len(self.times) == self.n_epochs - 1:
            self.profiler = profile(activities=[ACTIVITY])
            self.profiler.start()
        synchronise()
        self.began = time.perf_counter()
        if not self.times:
            self.start = self.began - self.since

    def end(self) -> None:
        """End an epoch; after the last one all figures are there."""
        synchronise()
        self.times.append(time.perf_counter() - self.began)
        if len(self.times) < self.n_epochs:
            return
        timed = self.times[WARM_UP:]
        if self.profiled:
            self.profiler.stop()
            work = work_of(self.profiler.events())
            self.busy, self.kernels, self.calls = (value / self.n_steps for value in work)
            del self.profiler, timed[-1]
        steady = float(np.median(timed))
        self.start += sum(max(took - steady, 0.0) for took in self.times[:WARM_UP])
        self.step = steady / self.n_steps

    def epochs(self) -> Iterator[None]:
        """Its epochs, one after another."""
        for _ in range(self.n_epochs):
            self.begin()
            yield
            self.end()

    @property
    def idle(self) -> float:
        """Share of a step in which nothing is computed."""
        return max(0.0, 1 - self.busy / self.step)

    def told(self) -> str:
        """What there is to say where it was profiled."""
        per_step = self.n_images / self.n_steps
        return (
            f"{1e3 * self.step:.2f} ms a step, {per_step / self.step:,.0f} images/s, "
            f"{per_step / self.busy:,.0f} if only kernels ran: {self.idle:.0%} idle, "
            f"{self.kernels:.0f} kernels, {self.calls:.0f} host calls"
        )


class Watch(Callback):
    """Clocks each course of a fit; it looks at epochs alone, so that steps may be captured."""

    def __init__(self, since: float, n_images: int, profiled: bool) -> None:
        self.since = since
        self.n_images = n_images
        self.profiled = profiled

    def initialize(self) -> Watch:
        self.courses_: list[Course] = []
        return self

    def on_train_begin(self, net: Any, **kwargs: Any) -> None:
        # Ahead of all that looks at an epoch which has ended.
        net.callbacks_ = sorted(net.callbacks_, key=lambda named: named[1] is not self)
        since = None if self.courses_ else self.since
        sizes = net.max_epochs, net.steps_per_epoch, self.n_images
        self.courses_.append(Course(*sizes, self.profiled, net.stage, since))

    def on_epoch_begin(self, net: Any, **kwargs: Any) -> None:
        self.courses_[-1].begin()

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        self.courses_[-1].end()


def watched(estimator: Any, *data: np.ndarray, profiled: bool = True) -> list[Course]:
    """Fit an estimator that has no callbacks of its own; the courses of its training."""
    watch = Watch(time.perf_counter(), len(data[0]), profiled)
    fitted = estimator.set_params(callbacks=[watch]).fit(*data)
    return next(cb for _, cb in fitted.net_.callbacks_ if isinstance(cb, Watch)).courses_


def measured(function: Callable[[], object], n_images: int) -> Course:
    """Call a function often, and profile it once: a call is an epoch of one step."""
    course = Course(N_EPOCHS, 1, n_images)
    for _ in course.epochs():
        function()
    return course
