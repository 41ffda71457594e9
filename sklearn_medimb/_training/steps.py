"""Steps of a course of training: from the order of a batch to the moved weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sklearn_medimb._data.batches import BatchSource
from sklearn_medimb._machine import distributed
from sklearn_medimb._machine.graphs import empty_cache
from sklearn_medimb._machine.randomness import current_draws
from sklearn_medimb._machine.runtime import is_out_of_memory
from sklearn_medimb._training.network import trunks_of


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


class Steps:
    """The steps of one stage, taken one by one.

    Parameters
    ----------
    net : Net
        It says what a step does to a batch: ``net.train_step(batch)``.
    source : BatchSource or iterable
        Where batches come from.

    Attributes
    ----------
    reason : str or None
        Why steps are taken one by one where the device could replay them.
    n_replayed : int
        Steps that were replayed.
    """

    reason: str | None = None
    n_replayed = 0

    def __init__(self, net: Any, source: Any) -> None:
        self.net, self.source = net, source
        self.make: Callable[[Any], Any] = getattr(source, "make", lambda batch: batch)
        self.totals: dict[str, torch.Tensor] = {}

    @contextmanager
    def epoch(self) -> Iterator[None]:
        """Begin to count anew."""
        for total in self.totals.values():
            total.zero_()
        self.terms: dict[str, None] = {}  # of this epoch
        self.memory = _State(self.net.module_, self.net.criterion_)
        yield

    def orders(self) -> Iterator[Any]:
        """Orders of one more epoch; of a source that knows none the batches themselves."""
        source = self.source
        return source.orders() if isinstance(source, BatchSource) else iter(source)

    def take(self, order: Any) -> int:
        """Take a step; gives the number of its targets."""
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
        # Without the graphs that they come from, which would live until the next step.
        net.criterion_.terms = {k: v.detach() for k, v in net.criterion_.terms.items()}
        for name, value in {"loss": step["loss"].detach(), **net.criterion_.terms}.items():
            self.terms[name] = None
            if name in self.totals:
                self.totals[name].add_(value, alpha=n)
            else:
                self.totals[name] = value * n
        net.criterion_.after_step(net.module_)
        if net.average is not None:
            net.average.after_step(net.module_)

    def sums(self) -> dict[str, float]:
        """Loss and terms, summed over the images of the epoch; waits for the device, once."""
        totals = [self.totals[name].double() for name in self.terms]
        return dict(zip(self.terms, torch.stack(totals).tolist(), strict=True)) if totals else {}

    def close(self) -> None:
        """Let go of what was trained, and on what."""
        vars(self).clear()

    def _parts(self) -> Iterator[nn.Module]:
        """All modules of network and criterion."""
        for whole in (self.net.module_, self.net.criterion_):
            yield from whole.modules()

    # ---------------------------------------------------------------- memory

    def _within_memory(self, batch: Any) -> Any:
        """Take a step; where memory runs out, take it again with half as many images at a time."""
        while True:
            try:
                return self.net.train_step(batch)
            except RuntimeError as error:
                if not is_out_of_memory(error) or not self._need_less(len(batch[1])):
                    raise
            # Only now, outside of the handler, nothing refers to the tensors of the failed step.
            self.net.optimizer_.zero_grad(set_to_none=True)
            moments = self.net.optimizer_.state
            most = max((len(own) for own in moments.values()), default=0)
            for weight in [weight for weight, own in moments.items() if len(own) < most]:
                del moments[weight]  # memory ran out while they were made
            self.memory.restore()
            empty_cache()

    def _need_less(self, n_images: int) -> bool:
        """Need less memory from now on; False where that is not possible."""
        return self._halve_parts(n_images)

    def _halve_parts(self, n_images: int) -> bool:
        """Let backbones see fewer images at a time; False where that is not possible.

        It is not where the images of a batch mix inside the network, and not where several
        processes train together: the others would go on.
        """
        trunks = trunks_of(self.net.module_, self.net.criterion_)
        first = all(trunk.micro_batch is None for trunk in trunks)
        size = min((trunk.micro_batch or n_images for trunk in trunks), default=1) // 2
        if size < 1 or not all(t.divisible for t in trunks) or distributed.world_size() > 1:
            return False
        for trunk in trunks:
            trunk.micro_batch = size
        if first:
            warnings.warn(
                f"Memory ran out in a training step of {n_images} images: from here on the "
                f"backbone sees at most {size} at a time, or fewer, and each of them twice. Losses "
                "and gradients remain those of whole batches; a smaller batch_size is faster.",
                stacklevel=2,
            )
        return True
