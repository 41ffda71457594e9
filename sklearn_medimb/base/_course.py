"""The course of training: stages, one after another, and what is around their epochs."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from skorch.callbacks import Callback

from sklearn_medimb._machine import distributed
from sklearn_medimb._machine.runtime import is_one_of_many
from sklearn_medimb._training.callbacks import (
    BestEpoch,
    ProgressBar,
    SaveCheckpoint,
    SklearnCallbacks,
    StopWhenAsked,
)
from sklearn_medimb._training.checkpoint import Checkpoint, plain
from sklearn_medimb._training.momentum import WeightAverage
from sklearn_medimb._training.network import Trunk, trunks_of
from sklearn_medimb._training.settled import MISFIT, misfit
from sklearn_medimb._training.stage import Stage, TrainingSet
from sklearn_medimb.base._weights import KeepsWeights


class Trains(KeepsWeights):
    """Part of :class:`BaseImageEstimator`: runs stages on its net."""

    def _train(
        self,
        stages: list[Stage],
        best: BestEpoch | None,
        checkpoint: Checkpoint | None,
        reporter: SklearnCallbacks | None,
        optimizer: dict[str, Any] | None,
    ) -> None:
        """Run the stages, one after another, until one is interrupted; each is let go of then."""
        net, n_before = self.net_, len(self.net_.history)
        n_epochs = n_before + sum(stage.n_epochs for stage in stages)
        if reporter is not None:
            reporter.begin(n_epochs - n_before)
        first = 0
        if checkpoint is not None:
            first = checkpoint.first_stage([stage.n_epochs for stage in stages])
        numbers = range(first, len(stages))
        del stages[:first]
        for number in numbers:
            stage = stages.pop(0)
            scorer = best if stage.validated else None
            try:
                self._run_stage(number, stage, scorer, checkpoint, reporter, optimizer)
            except KeyboardInterrupt:  # outside of an epoch, where skorch catches it
                net.complete = False
            if net.average is not None:
                net.module_.load_state_dict(net.average.mean.state_dict())
                net.average = None
            if scorer is not None:
                scorer.restore(net)
                self.best_score_ = scorer.best_score
            if stage.after is not None:
                stage.after()
            if not net.complete:
                if len(net.history) == n_before or is_one_of_many():
                    raise KeyboardInterrupt
                name = f" ({stage.name})" if stage.name else ""
                warnings.warn(
                    f"Training was interrupted in epoch {len(net.history)} of {n_epochs}{name}; "
                    "the estimator keeps what it learned so far.",
                    stacklevel=5,
                )
            if not net.complete or (reporter is not None and reporter.wants_to_stop):
                break
        net.module_.eval()
        self.history_ = [plain(row) for row in net.history]
        self.n_iter_ = len(self.history_)

    def _run_stage(
        self,
        number: int,
        stage: Stage,
        scorer: BestEpoch | None,
        checkpoint: Checkpoint | None,
        reporter: SklearnCallbacks | None,
        optimizer: dict[str, Any] | None,
    ) -> None:
        """Run one stage, with everything around its epochs."""
        main = distributed.is_main()
        net, stop = self.net_, StopWhenAsked([cb for cb in (scorer, reporter) if cb is not None])
        if stage.before is not None:
            stage.before()
        net.stage, net.stage_forward = stage.name, stage.forward
        net.criterion_ = stage.criterion.to(net.device, net.dtype)
        stage.criterion.start_from(net.module_)
        distributed.share_weights(net.module_)
        distributed.share_weights(net.criterion_)
        net.steps_per_epoch = stage.steps_per_epoch
        n_steps = stage.n_epochs * stage.steps_per_epoch
        names = "backbone_lr", "layer_decay", "weight_decay"
        rates = {name: getattr(stage, name) for name in names}
        net.start_schedule(stage.lr_schedule, n_steps, stage.lr, stage.optimizer, **rates)
        if stage.ema is not None:
            net.average = WeightAverage(net.module_, stage.ema)
        if optimizer is not None:
            net.resume_optimizer(optimizer)
        if scorer is not None:
            scorer.n_stale = 0
        n_left = stage.n_epochs
        if checkpoint is not None:
            n_left -= checkpoint.begin_stage(number, net, scorer)
        if scorer is not None and scorer.wants_to_stop:  # it crashed after its last epoch
            n_left = 0
        callbacks: list[Callback | None] = [
            scorer,
            *stage.callbacks,
            reporter,
        ]
        last: list[Callback] = [stop]
        if checkpoint is not None:
            last.insert(0, SaveCheckpoint(checkpoint, scorer, main))
        if self.verbose and main:
            how = "(frozen backbone)" if stage.on_encoded else ""
            label = " ".join(filter(None, [type(self).__name__, stage.name, how]))
            callbacks.append(ProgressBar(label, n_left * stage.steps_per_epoch))
        with ExitStack() as held:
            for trunk in trunks_of(net.module_, net.criterion_):
                held.enter_context(trunk.wholly_held(stage.on_encoded))
                held.enter_context(trunk.passing(stage.on_encoded))
            net.run(
                stage.batches,
                n_left,
                [cb for cb in callbacks if cb is not None],
                last,
                validated=scorer is not None,
            )
        reason = net.steps.reason
        if self.verbose and main and reason not in (None, net.told):
            print(f"Steps are taken one by one: {reason}.", file=sys.stderr)  # noqa: T201
            net.told = reason

    @contextmanager
    def _settling(self, stages: list[Stage], train: TrainingSet) -> Iterator[None]:
        """Warn where the running statistics of a given backbone do not fit the training images."""
        trunk: Trunk = self.net_.module_.trunk
        through = [stage for stage in stages if not stage.on_encoded]
        n_steps = sum(stage.n_epochs * stage.steps_per_epoch for stage in through)
        left = trunk.statistics_left(n_steps) if self._brings_weights else 0.0
        yield
        if left < 0.05 or not n_steps:  # without a step the network is wanted as it is
            return
        layer, size = misfit(trunk, train.images, train.rows, self._preprocessor())
        if size > MISFIT:
            warnings.warn(
                f"backbone={type(self.backbone).__name__}: after {n_steps} steps {left:.0%} of its "
                "running statistics are still those that it came with, and predictions rest on "
                f"them: those of its layer {layer!r} are {size:.1f} standard deviations off those "
                "of the training images. Raise the momentum of its batch normalisation, train "
                "longer (max_epochs), or freeze these layers (requires_grad_(False)).",
                stacklevel=6,
            )
