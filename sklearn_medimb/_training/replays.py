"""Steps of training that a GPU replays.

Of each kind of step, one for each shape that an order has, the first few are taken as they are; the
next is recorded, from the order of a batch to the moved weights. From then on the host does nothing
for a step but copy its order and its learning rates to the device and start it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from skorch.callbacks import Callback
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sklearn_medimb._data.batches import BatchSource
from sklearn_medimb._machine import distributed
from sklearn_medimb._machine.graphs import Obstacles, Recorder
from sklearn_medimb._machine.randomness import current_draws
from sklearn_medimb._training.network import Trunk
from sklearn_medimb._training.steps import Steps

# A kind of step is taken so often before it is recorded: what is made once is there by then.
WARM_UP = 3
# Kinds of steps that are recorded at most.
MOST_KINDS = 32
_OF_BATCHES = ("on_batch_begin", "on_grad_computed", "on_batch_end")
# Of weights and of optimisers.
_HOOKS = (
    "_backward_hooks",
    "_post_accumulate_grad_hooks",
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
)
_PLAIN = (bool, int, float, str, type(None))


class _Kind(NamedTuple):
    """A recorded step, the places that it reads its order and rates from, and what it gives."""

    replay: Callable[[], None]
    places: list[torch.Tensor]
    n_targets: int
    terms: list[str]


class ReplayedSteps(Steps):
    """The steps of one stage, replayed where that comes to the same.

    Parameters
    ----------
    net, source
        As for :class:`Steps`.
    callbacks : iterable of Callback
        All that hear of the training.
    """

    recorder: Recorder | None = None

    def __init__(self, net: Any, source: Any, callbacks: Iterable[Callback]) -> None:
        super().__init__(net, source)
        self.callbacks = list(callbacks)
        self.counts: dict[Any, int] = {}
        self.known: dict[Any, _Kind] = {}
        self.states: dict[Any, int] = {}  # by what they are; a number is quick to compare
        self.rates: Iterator[torch.Tensor] = iter(())
        self.reason = self._obstacle()
        if self.reason is None:
            self.recorder = Recorder(torch.device(net.device), self._generators())

    # ---------------------------------------------------------------- what can be replayed

    def _obstacle(self) -> str | None:
        """Why these steps cannot be replayed, as far as that is known beforehand."""
        net, optimizer = self.net, self.net.optimizer_
        if not isinstance(self.source, BatchSource):
            return "the batches come from code that gives no orders"
        if distributed.world_size() > 1:
            return "several processes train together"
        if net.compile:
            return "compile=True"
        of_torch = type(optimizer).__module__.startswith("torch.optim.")
        fused = all(group.get("fused") for group in optimizer.param_groups)
        if not (of_torch and fused):
            return f"{type(optimizer).__name__} is not torch's, or not its fused form"
        for callback in self.callbacks:
            cls = type(callback)
            looks = [n for n in _OF_BATCHES if getattr(cls, n) is not getattr(Callback, n)]
            if looks and not cls.__module__.startswith("sklearn_medimb."):
                return f"the callback {cls.__name__} hears of every batch"
        for part in (*self._parts(), *self._weights(), optimizer):
            if any(not _is_of_torch(hook) for hook in _hooks(part)):
                return f"{type(part).__name__} has hooks"
            if getattr(part, "_compiled_call_impl", None) is not None:
                return f"{type(part).__name__} is compiled"
            if isinstance(part, Trunk) and part.micro_batch is not None:
                return "memory ran out"
        return None

    def _weights(self) -> Iterator[torch.Tensor]:
        for whole in (self.net.module_, self.net.criterion_):
            yield from whole.parameters()

    def _tensors(self) -> list[torch.Tensor]:
        """All weights and buffers."""
        return [*self._weights(), *(b for part in self._parts() for b in part.buffers(False))]

    def _generators(self) -> list[torch.Generator]:
        """All that a step draws from."""
        draws = current_draws()
        return [self.source.generator, *(() if draws is None else draws.generators.values())]

    def _state(self) -> int:
        """What a step is recorded for, as a number: all that Python decides, and where tensors lie.

        Between two epochs a callback may freeze layers, thaw them, or change a setting.
        """
        settings = [
            {k: v for k, v in group.items() if k not in ("params", "lr")}
            for group in self.net.optimizer_.param_groups
        ]
        trained = tuple(weight.requires_grad for weight in self._weights())
        now = trained, self._places(), repr(settings), repr(self._plain_state())
        return self.states.setdefault(now, len(self.states))

    def _places(self) -> tuple[int, ...]:
        """Where the tensors of all modules lie: a step that puts another one there goes astray."""
        held = [value for part in self._parts() for value in vars(part).values()]
        held += self._tensors()
        return tuple(value.data_ptr() for value in held if isinstance(value, torch.Tensor))

    def _plain_state(self) -> list[dict[str, Any]]:
        """Numbers and texts of all modules: a step that changes one counts in Python."""

        def is_plain(value: Any) -> bool:
            return isinstance(value, _PLAIN) or (
                isinstance(value, tuple) and all(map(is_plain, value))
            )

        return [
            {k: v for k, v in vars(part).items() if k != "training" and is_plain(v)}
            for part in self._parts()
        ]

    # ---------------------------------------------------------------- an epoch

    @contextmanager
    def epoch(self) -> Iterator[None]:
        """Begin to count anew; inside the block steps may be replayed."""
        recorder = self.recorder
        if recorder is not None and (reason := self._obstacle()) is not None:
            self.stop_recording(reason)
        if self.recorder is not None:
            self.state, self.rates = self._state(), self._rates()
        # Also after it has stopped: autograd remembers the stream of what is there.
        with super().epoch(), nullcontext() if recorder is None else recorder.beside():
            yield

    def _rates(self) -> Iterator[torch.Tensor]:
        """Learning rates (n_groups,) of each step of the coming epoch, on the device."""
        net, schedule = self.net, self.net.scheduler
        table = [[group["lr"] for group in net.optimizer_.param_groups]]
        for k in range(1, net.steps_per_epoch):
            factors = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            table.append([base * factor(schedule.last_epoch + k) for base, factor in factors])
        rates = torch.tensor(table, dtype=torch.float32).pin_memory()
        return iter(rates.to(net.device, non_blocking=True))

    def take(self, order: Any) -> int:
        """Take a step, or replay one."""
        rates = next(self.rates, None)
        if self.recorder is None or rates is None:
            return self._taken(order)
        leaves, form = tree_flatten(order)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        what = [(v.shape, v.dtype) if isinstance(v, torch.Tensor) else v for v in leaves]
        if odd := [v for v in leaves if not isinstance(v, (torch.Tensor, *_PLAIN))]:
            self.stop_recording(f"an order holds a {type(odd[0]).__name__}")
            return self._taken(order)
        kind = self.state, str(form), tuple(what)
        count = self.counts[kind] = self.counts.get(kind, 0) + 1
        if kind not in self.known:
            if count < WARM_UP or len(self.known) == MOST_KINDS:
                return self._taken(order)
            if count == WARM_UP:
                return self._watched(order)
            own = [v.clone() if isinstance(v, torch.Tensor) else v for v in leaves]
            if not self._record(kind, tree_unflatten(own, form), rates.clone()):
                return self._taken(order)
        recorded = self.known[kind]
        torch._foreach_copy_(recorded.places, [*tensors, rates])
        recorded.replay()
        self.n_replayed += 1
        self.terms |= dict.fromkeys(recorded.terms)
        self.net.notify("on_batch_end", batch=None, training=True)
        return recorded.n_targets

    def _taken(self, order: Any) -> int:
        """Take a step as it comes, at the rates that a replay would have."""
        for group in self.net.optimizer_.param_groups:
            group["lr"] = float(np.float32(group["lr"]))
        return super().take(order)

    def _watched(self, order: Any) -> int:
        """Take a step, and look whether a recording would do the same."""
        before, places = self._plain_state(), self._places()
        with Obstacles() as obstacles:
            n = self._taken(order)
        if self.recorder is None:  # memory ran out
            return n
        if obstacles.found is not None:
            self.stop_recording(obstacles.found)
        elif before != self._plain_state():
            self.stop_recording("a module counts steps in Python")
        elif places != self._places():
            self.stop_recording("a module puts another tensor in the place of one")
        return n

    # ---------------------------------------------------------------- recording

    def _record(self, kind: Any, order: Any, rates: torch.Tensor) -> bool:
        """Record the step for one kind of order; False where that failed."""
        net, known = self.net, list(self.totals)
        n_targets, terms = 0, {}

        def work() -> None:
            nonlocal n_targets, terms
            before, self.terms = self.terms, {}
            batch = self.make(order)
            net.criterion_.before_step(net.module_)
            step = net.train_step(batch)
            self._conclude(batch, step)
            n_targets, terms, self.terms = len(batch[1]), self.terms, before
            if list(self.totals) != known:
                raise RuntimeError("it has terms that it had not before")

        assert self.recorder is not None
        trusted = any(other[:2] == kind[:2] for other in self.known)
        try:
            with self._rates_from(rates):
                replay = self.recorder.record(work)
            is_same = trusted or self._is_same(work, replay)
        except Exception as error:
            self.totals = {name: self.totals[name] for name in known}
            cause = str(error.__context__ or error).partition("\n")[0]
            self.stop_recording(f"recording it failed: {cause}")
            return False
        finally:
            net.criterion_.terms = {}
        if not is_same:
            self.stop_recording("a replay came to another result")
            return False
        tensors = [leaf for leaf in tree_flatten(order)[0] if isinstance(leaf, torch.Tensor)]
        self.known[kind] = _Kind(replay, [*tensors, rates], n_targets, list(terms))
        return True

    @torch.no_grad()
    def _is_same(self, work: Callable[[], None], replay: Callable[[], None]) -> bool:
        """Whether a replay does what the step itself does; then all is as it was.

        Some kernels add in any order, and where a gradient is nothing but rounding Adam takes a
        step of full length this way or that: so few of the weights may go elsewhere.
        """
        net, average = self.net, self.net.average
        weights = [w for _, w in net.get_all_learnable_params() if w.requires_grad]
        kept = self._tensors()
        kept += [v for own in net.optimizer_.state.values() for v in own.values()]
        kept += [*self.totals.values(), *(() if average is None else average.tensors())]
        before, random = [v.clone() for v in kept], [g.get_state() for g in self._generators()]
        start, ways = self.totals["loss"].clone(), []
        for way in (work, replay):
            try:
                with torch.enable_grad():
                    way()
                ways.append(([weight.clone() for weight in weights], self.totals["loss"] - start))
            finally:
                torch._foreach_copy_(kept, before)
                for generator, state in zip(self._generators(), random, strict=True):
                    generator.set_state(state)
        (taken, loss), (replayed, other_loss) = ways
        moved, apart = (
            torch.stack([(a - b).norm() for a, b in zip(taken, others, strict=True)]).norm()
            for others in (weights, replayed)
        )
        same_loss = (loss - other_loss).abs() <= 1e-2 * loss.abs()
        return bool(same_loss & (apart <= 0.5 * moved))

    @contextmanager
    def _rates_from(self, rates: torch.Tensor) -> Iterator[None]:
        """Let the optimiser read its learning rates on the device."""
        groups = self.net.optimizer_.param_groups
        before = [dict(group) for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
            if "capturable" in group:
                group["capturable"] = True
        try:
            yield
        finally:
            for group, own in zip(groups, before, strict=True):
                group.update({name: own[name] for name in ("lr", "capturable") if name in own})

    def stop_recording(self, reason: str) -> None:
        """Take all further steps one by one."""
        self.reason, self.recorder = reason, None
        self._forget()

    def _forget(self) -> None:
        """Let go of recordings, and of gradients that lie in their memory."""
        if self.known:
            self.net.optimizer_.zero_grad(set_to_none=True)
        self.known.clear()

    def _need_less(self, n_images: int) -> bool:
        """Give back the memory of recordings; if there are none, see fewer images at a time."""
        has_recordings = bool(self.known)
        self.stop_recording("memory ran out")
        return has_recordings or super()._need_less(n_images)

    def close(self) -> None:
        """Leave no recording behind."""
        self._forget()
        reason, n_replayed, n_kinds = self.reason, self.n_replayed, len(self.counts)
        super().close()
        self.reason, self.n_replayed, self.n_kinds = reason, n_replayed, n_kinds


def _hooks(part: Any) -> Iterator[Any]:
    """What is called along with a module, a weight or an optimiser."""
    names: Iterable[str] = _HOOKS
    if isinstance(part, nn.Module):
        names = [k for k in vars(part) if k.endswith("_hooks") and "state_dict" not in k]
    for name in names:
        hooks = getattr(part, name, None)
        yield from hooks.values() if isinstance(hooks, dict) else ()


def _is_of_torch(hook: Any) -> bool:
    return getattr(hook, "__module__", "").startswith("torch.")
