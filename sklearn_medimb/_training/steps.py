"""Steps of a course of training: taken one by one, or where a GPU can, recorded and replayed.

A step is everything from the order of a batch to the moved weights: gathering, augmentation,
forward and backward pass, optimiser, running means. Of each kind of step, one for each shape that
an order has, the first few are taken as they are; the next is recorded, and from then on the host
does nothing for a step but copy its order and its learning rates to the device and start it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from skorch.callbacks import Callback
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sklearn_medimb._data.batches import BatchSource
from sklearn_medimb._machine import distributed
from sklearn_medimb._machine.graphs import Obstacles, Recorder, can_replay
from sklearn_medimb._machine.randomness import current_draws
from sklearn_medimb._machine.runtime import is_out_of_memory
from sklearn_medimb._training.network import Trunk

# A kind of step is taken so often before it is recorded: what is made once is there by then.
WARM_UP = 3
# Kinds of steps that are recorded at most.
MOST_KINDS = 32
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_BATCHES = ("on_batch_begin", "on_grad_computed", "on_batch_end")


class _State:
    """What a forward pass changes: running statistics, queues, counters, random numbers.

    Parameters
    ----------
    *modules : nn.Module
        Network and criterion.
    """

    def __init__(self, *modules: nn.Module) -> None:
        parts = [part for module in modules for part in module.modules()]
        buffers = [buffer for module in modules for buffer in module.buffers()]
        dtypes = {buffer.dtype for buffer in buffers}  # of one dtype they are copied in one call
        self.buffers = [[b for b in buffers if b.dtype == dtype] for dtype in dtypes]
        self.copies = [[buffer.clone() for buffer in group] for group in self.buffers]
        plain = nn.Module.get_extra_state
        self.counting = [part for part in parts if type(part).get_extra_state is not plain]
        self.draws = current_draws()

    @torch.no_grad()
    def remember(self) -> None:
        """Keep it as it is before a step."""
        for copies, buffers in zip(self.copies, self.buffers, strict=True):
            torch._foreach_copy_(copies, buffers)
        self.counters = [part.get_extra_state() for part in self.counting]
        if self.draws is not None:
            self.random = self.draws.get_state()

    @torch.no_grad()
    def restore(self) -> None:
        """Put it back after a step that failed."""
        for copies, buffers in zip(self.copies, self.buffers, strict=True):
            for copied, buffer in zip(copies, buffers, strict=True):
                buffer.data.copy_(copied)
        for part, counter in zip(self.counting, self.counters, strict=True):
            part.set_extra_state(counter)
        if self.draws is not None:
            self.draws.set_state(self.random)


class _Kind(NamedTuple):
    """A recorded step, the places that it reads its order and rates from, and its batch's size."""

    replay: Callable[[], None]
    places: list[torch.Tensor]
    n_targets: int
    terms: list[str]


class Steps:
    """The steps of one stage.

    Parameters
    ----------
    net : Net
        It says what a step does to a batch: ``net.train_step(batch)``.
    source : BatchSource or iterable
        Where batches come from.
    callbacks : list of Callback
        All that hear of the training.

    Attributes
    ----------
    reason : str or None
        Why steps are taken one by one where the device could replay them.
    n_replayed : int
        Steps that were replayed.
    """

    def __init__(self, net: Any, source: Any, callbacks: Iterable[Callback]) -> None:
        self.net, self.source = net, source
        self.make = source.make if isinstance(source, BatchSource) else lambda batch: batch
        self.totals: dict[str, torch.Tensor] = {}
        self.counts: dict[Any, int] = {}
        self.known: dict[Any, _Kind] = {}
        self.n_replayed = 0
        self.recorder: Recorder | None = None
        self.reason: str | None = None
        if can_replay(torch.device(net.device)):
            self.reason = self._obstacle(callbacks)
            if self.reason is not None:
                return
            draws = current_draws()
            own = () if draws is None else draws.generators.values()
            self.recorder = Recorder(torch.device(net.device), [source.generator, *own])

    # ---------------------------------------------------------------- what can be replayed

    def _obstacle(self, callbacks: Iterable[Callback]) -> str | None:
        """Why these steps cannot be replayed, as far as that is known before the first."""
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
        for callback in callbacks:
            cls = type(callback)
            looks = [n for n in _OF_BATCHES if getattr(cls, n) is not getattr(Callback, n)]
            if looks and not cls.__module__.startswith("sklearn_medimb."):
                return f"the callback {cls.__name__} hears of every batch"
        for part in self._parts():
            hooks = [hook for kind in _HOOKS for hook in vars(part)[kind].values()]
            if any(not getattr(hook, "__module__", "").startswith("torch.") for hook in hooks):
                return f"{type(part).__name__} has hooks"
            if isinstance(part, Trunk) and part.micro_batch is not None:
                return "memory ran out"
        return None

    def _parts(self) -> Iterator[nn.Module]:
        for whole in (self.net.module_, self.net.criterion_):
            yield from whole.modules()

    def _state(self) -> Any:
        """What a recorded step was recorded for: weights that lie where they lay, and are trained.

        A callback may freeze layers between two epochs, thaw them, or set other rates.
        """
        weights = [
            (weight.data_ptr(), weight.requires_grad)
            for whole in (self.net.module_, self.net.criterion_)
            for weight in whole.parameters()
        ]
        settings = [
            tuple((k, v) for k, v in group.items() if k not in ("params", "lr"))
            for group in self.net.optimizer_.param_groups
        ]
        return tuple(weights), repr(settings)

    def _plain_state(self) -> list[dict[str, Any]]:
        """Numbers and texts of all modules: a step that changes one counts in Python."""
        plain = (int, float, str, tuple, type(None))
        return [
            {k: v for k, v in vars(part).items() if isinstance(v, plain) and k != "training"}
            for part in self._parts()
        ]

    # ---------------------------------------------------------------- an epoch

    @contextmanager
    def epoch(self) -> Iterator[None]:
        """Begin to count anew; inside the block steps may be replayed."""
        for total in self.totals.values():
            total.zero_()
        self.terms: dict[str, None] = {}  # of this epoch
        self.memory = _State(self.net.module_, self.net.criterion_)
        self.state = None if self.recorder is None else self._state()
        self.rates = iter(()) if self.recorder is None else self._rates()
        with nullcontext() if self.recorder is None else self.recorder.beside():
            yield

    def orders(self) -> Iterator[Any]:
        """Orders of one more epoch."""
        source = self.source
        return source.orders() if isinstance(source, BatchSource) else iter(source)

    def _rates(self) -> Iterator[torch.Tensor]:
        """Learning rates (n_groups,) of each step of the coming epoch, on the device."""
        net = self.net
        schedule = net.scheduler
        table = [[group["lr"] for group in net.optimizer_.param_groups]]
        for k in range(1, net.steps_per_epoch):
            factors = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            table.append([base * factor(schedule.last_epoch + k) for base, factor in factors])
        rates = torch.tensor(table, dtype=torch.float32).pin_memory()
        return iter(rates.to(net.device, non_blocking=True))

    def take(self, order: Any) -> int:
        """Take a step; gives the number of its targets."""
        rates = next(self.rates, None)
        if self.recorder is None or rates is None:
            return self._taken(order)
        leaves, form = tree_flatten(order)
        is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        what = [
            (leaf.shape, leaf.dtype) if there else leaf
            for leaf, there in zip(leaves, is_tensor, strict=True)
        ]
        kind = self.state, str(form), tuple(what)
        count = self.counts[kind] = self.counts.get(kind, 0) + 1
        if kind not in self.known:
            if count < WARM_UP or len(self.known) == MOST_KINDS:
                return self._taken(order)
            if count == WARM_UP:
                return self._watched(order)
            own = [
                leaf.clone() if there else leaf
                for leaf, there in zip(leaves, is_tensor, strict=True)
            ]
            if not self._record(kind, tree_unflatten(own, form), rates.clone()):
                return self._taken(order)
        recorded = self.known[kind]
        given = [leaf for leaf, there in zip(leaves, is_tensor, strict=True) if there]
        torch._foreach_copy_(recorded.places, [*given, rates])
        recorded.replay()
        self.n_replayed += 1
        self.terms |= dict.fromkeys(recorded.terms)
        self.net.notify("on_batch_end", batch=None, training=True)
        return recorded.n_targets

    def _taken(self, order: Any) -> int:
        """Take a step as it comes."""
        net, batch = self.net, self.make(order)
        net.criterion_.before_step(net.module_)
        net.notify("on_batch_begin", batch=batch, training=True)
        self.memory.remember()
        step = self._within_memory(batch)
        self._conclude(batch, step)
        net.notify("on_batch_end", batch=batch, training=True, **step)
        return len(batch[1])

    def _conclude(self, batch: Any, step: dict[str, Any]) -> None:
        """Sum what the step gave, and let followers follow."""
        net, n = self.net, len(batch[1])
        for name, value in {"loss": step["loss"], **net.criterion_.terms}.items():
            self.terms[name] = None
            if name in self.totals:
                self.totals[name].add_(value.detach(), alpha=n)
            else:
                self.totals[name] = value.detach() * n
        net.criterion_.after_step(net.module_)
        if net.average is not None:
            net.average.after_step(net.module_)

    def sums(self) -> dict[str, float]:
        """Loss and terms, summed over the images of the epoch; waits for the device, once."""
        totals = [self.totals[name].double() for name in self.terms]
        return dict(zip(self.terms, torch.stack(totals).tolist(), strict=True)) if totals else {}

    # ---------------------------------------------------------------- recording

    def _watched(self, order: Any) -> int:
        """Take a step, and look whether a recording would do the same."""
        before = self._plain_state()
        with Obstacles() as obstacles:
            n = self._taken(order)
        if self.recorder is None:  # memory ran out
            return n
        if obstacles.found is not None:
            self.stop_recording(obstacles.found)
        elif before != self._plain_state():
            self.stop_recording("a module counts steps in Python")
        return n

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
        try:
            with self._rates_from(rates):
                replay = self.recorder.record(work)
            is_same = bool(self.known) or self._is_same(work, replay)
        except Exception as error:
            self.totals = {name: self.totals[name] for name in known}
            self.stop_recording(f"recording it failed: {error}")
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
        net = self.net
        weights = [w for _, w in net.get_all_learnable_params() if w.requires_grad]
        kept = [v for part in (net.module_, net.criterion_) for v in part.parameters()]
        kept += [v for part in (net.module_, net.criterion_) for v in part.buffers()]
        kept += [v for own in net.optimizer_.state.values() for v in own.values()]
        kept += [*self.totals.values(), *(net.average.tensors() if net.average else ())]
        before, ways, random = [value.clone() for value in kept], [], self._random()
        start = self.totals["loss"].clone()
        for way in (work, replay):
            try:
                with torch.enable_grad():
                    way()
                ways.append(([weight.clone() for weight in weights], self.totals["loss"] - start))
            finally:
                torch._foreach_copy_(kept, before)
                for generator, state in random:
                    generator.set_state(state)
        (taken, loss), (replayed, other_loss) = ways
        moved, apart = (
            torch.stack([(a - b).norm() for a, b in zip(taken, others, strict=True)]).norm()
            for others in (weights, replayed)
        )
        same_loss = (loss - other_loss).abs() <= 1e-2 * loss.abs()
        return bool(same_loss & (apart <= 0.5 * moved))

    def _random(self) -> list[tuple[torch.Generator, torch.Tensor]]:
        """State of every generator that a step draws from."""
        draws = current_draws()
        own = [] if draws is None else [*draws.generators.values()]
        return [(generator, generator.get_state()) for generator in (self.source.generator, *own)]

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

    def close(self) -> None:
        """Leave no recording behind, nor what was trained on."""
        self._forget()
        for name in ("recorder", "source", "make", "memory", "net", "totals", "counts", "rates"):
            vars(self).pop(name, None)

    # ---------------------------------------------------------------- memory

    def _within_memory(self, batch: Any) -> Any:
        """Take a step; where memory runs out, take it again with half as many images at a time."""
        while True:
            try:
                return self.net.train_step(batch)
            except RuntimeError as error:
                if not is_out_of_memory(error) or not self._halve_parts(len(batch[1])):
                    raise
            # Only now, outside of the handler, nothing refers to the tensors of the failed step.
            self.net.optimizer_.zero_grad(set_to_none=True)
            moments = self.net.optimizer_.state
            most = max((len(own) for own in moments.values()), default=0)
            for weight in [weight for weight, own in moments.items() if len(own) < most]:
                del moments[weight]  # memory ran out while they were made
            self.memory.restore()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _halve_parts(self, n_images: int) -> bool:
        """Let backbones see fewer images at a time; False where that is not possible.

        It is not where the images of a batch mix inside the network, and not where several
        processes train together: the others would go on.
        """
        trunks = [
            module
            for whole in (self.net.module_, self.net.criterion_)
            for module in whole.modules()
            if isinstance(module, Trunk)
        ]
        first = all(trunk.micro_batch is None for trunk in trunks)
        size = min((trunk.micro_batch or n_images for trunk in trunks), default=1) // 2
        if size < 1 or not all(t.divisible for t in trunks) or distributed.world_size() > 1:
            return False
        for trunk in trunks:
            trunk.micro_batch = size
        self.stop_recording("memory ran out")
        if first:
            warnings.warn(
                f"Memory ran out in a training step of {n_images} images: from here on the "
                f"backbone sees at most {size} at a time, or fewer, and each of them twice. Losses "
                "and gradients remain those of whole batches; a smaller batch_size is faster.",
                stacklevel=2,
            )
        return True
