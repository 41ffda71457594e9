"""What happens around an epoch: progress, validation, checkpoints, scikit-learn's callbacks."""

from __future__ import annotations

import math
import sys
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from sklearn.base import clone
from skorch.callbacks import Callback, MlflowLogger, TensorBoard

from sklearn_medimb.checkpoint import Checkpoint
from sklearn_medimb.distributed import is_main, of_main


class ProgressBar(Callback):
    """A bar over all steps of a fit: loss, validation score and time left."""

    may_stop = False

    def __init__(self, label: str, n_steps: int) -> None:
        self.label = label
        self.n_steps = n_steps

    def on_train_begin(self, net: Any, **kwargs: Any) -> None:
        """Open the bar."""
        from tqdm.auto import tqdm  # installed with skorch

        self.bar_ = tqdm(total=self.n_steps, desc=self.label, unit="step", file=sys.stderr)

    def on_batch_end(self, net: Any, **kwargs: Any) -> None:
        """Advance; no number is read from the device here."""
        self.bar_.update()

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        """Show what the epoch brought."""
        last = net.history[-1]
        shown = {"epoch": last["epoch"], "loss": f"{last['train_loss']:.4f}"}
        if "valid_score" in last:
            shown["score"] = f"{last['valid_score']:.3f}"
        self.bar_.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """Close the bar, also when training failed."""
        if hasattr(self, "bar_"):
            self.bar_.close()


class RunLogger(Callback):
    """One of skorch's loggers by name, opened when training begins: each fit is a run of its own.

    Parameters
    ----------
    name : {"tensorboard", "mlflow"}
        TensorBoard writes below ``runs/`` in the working directory; MLflow to the tracking server
        and experiment that are set, with the estimator's parameters.
    estimator : estimator
        What is trained.
    """

    may_stop = False

    def __init__(self, name: str, estimator: Any) -> None:
        self.name = name
        self.estimator = estimator

    def on_train_begin(self, net: Any, **kwargs: Any) -> None:
        """Open the run; later courses of the same fit go on with it."""
        if not hasattr(self, "logger_"):
            logger = LOGGERS[self.name](self.estimator)
            logger.set_params(keys_ignored="stage")  # a text
            self.logger_ = logger.initialize()
        self.logger_.on_train_begin(net, **kwargs)

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        """Log the numbers of the epoch."""
        self.logger_.on_epoch_end(net, **kwargs)

    def on_train_end(self, net: Any, **kwargs: Any) -> None:
        """Write everything out."""
        self.logger_.on_train_end(net, **kwargs)

    def fail(self) -> None:
        """End the run of a fit that raised."""
        logger = getattr(self, "logger_", None)
        if isinstance(logger, MlflowLogger):
            logger.client_.set_terminated(logger.run_.info.run_id, "FAILED")
        elif logger is not None:
            logger.writer.close()


def _tensorboard(estimator: Any) -> Callback:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError('callbacks="tensorboard" needs: pip install tensorboard') from error
    now = datetime.now().astimezone()
    name = f"{type(estimator).__name__}-{now:%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
    return TensorBoard(SummaryWriter(str(Path("runs") / name)))


def _mlflow(estimator: Any) -> Callback:
    try:
        import mlflow
    except ImportError as error:
        raise ImportError('callbacks="mlflow" needs: pip install mlflow') from error
    name = type(estimator).__name__
    run = mlflow.start_run(run_name=name, nested=mlflow.active_run() is not None)
    mlflow.log_params({k: str(v)[:500] for k, v in estimator.get_params(deep=False).items()})
    mlflow.end_run("RUNNING")  # no longer the one that the caller's own calls go to
    return MlflowLogger(run, create_artifact=False)


LOGGERS: dict[str, Callable[[Any], Callback]] = {"tensorboard": _tensorboard, "mlflow": _mlflow}


def resolve_callbacks(given: str | list[Any] | None, estimator: Any) -> list[Callback]:
    """Turn ``callbacks=`` into fresh callbacks for one fit.

    Parameters
    ----------
    given : str, list of str and callbacks, or None
        Names are those of `LOGGERS`; callbacks are cloned.
    estimator : estimator
        What is about to be trained.

    Raises
    ------
    ValueError
        If a name is not known.
    TypeError
        If something else is no callback of skorch.
    """
    made: list[Callback] = []
    for item in [given] if isinstance(given, str) else given or []:
        if isinstance(item, str):
            if item not in LOGGERS:
                raise ValueError(f"callbacks={item!r} must be one of {sorted(LOGGERS)}.")
            if is_main():  # one of several processes writes
                made.append(RunLogger(item, estimator))
            continue
        callback = clone(item, safe=False)
        if not isinstance(callback, Callback):
            raise TypeError(
                f"callbacks must hold names or instances of skorch.callbacks.Callback: {item!r}."
            )
        made.append(callback)
    return made


class BestEpoch(Callback):
    """Score the validation rows after each epoch and keep the weights of the best one.

    Equal scores count as better, since the later epoch has seen more and a small validation set
    knows few distinct scores; only a rise resets the patience.

    Parameters
    ----------
    score : callable
        Gives the score of the network as it is now.
    patience : int
        Epochs without a rise after which `wants_to_stop` turns true.
    """

    may_stop = False

    def __init__(self, score: Callable[[], float], patience: int) -> None:
        self.score = score
        self.patience = patience
        self.best_score = -math.inf
        self.n_stale = 0
        self.weights: dict[str, Any] = {}

    @property
    def wants_to_stop(self) -> bool:
        """Whether training should stop."""
        return self.n_stale >= self.patience

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        """Score, record, remember."""
        score = of_main(self.score())
        net.history.record("valid_score", score)
        self.n_stale = 0 if score > self.best_score else self.n_stale + 1
        if score >= self.best_score:
            self.best_score = score
            state = net.module_.state_dict()
            self.weights = {name: value.detach().cpu().clone() for name, value in state.items()}

    def restore(self, net: Any) -> None:
        """Give the best epoch's weights back."""
        if self.weights:
            net.module_.load_state_dict(self.weights)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on."""
        return {k: v for k, v in vars(self).items() if k not in ("score", "patience")}


class SaveCheckpoint(Callback):
    """Write the checkpoint after each epoch."""

    may_stop = False

    def __init__(self, checkpoint: Checkpoint, best: BestEpoch | None) -> None:
        self.checkpoint = checkpoint
        self.best = best

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        """Save."""
        self.checkpoint.save(net, self.best)


class StopWhenAsked(Callback):
    """End the training, after everything else of the epoch is done."""

    def __init__(self, askers: list[BestEpoch | SklearnCallbacks]) -> None:
        self.askers = askers

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        """Stop as skorch's own callbacks do."""
        if any(callback.wants_to_stop for callback in self.askers):
            raise KeyboardInterrupt


class SklearnCallbacks(Callback):
    """Report each epoch to scikit-learn's callbacks (1.9 or later) as one task of the fit.

    Parameters
    ----------
    estimator : estimator
        Must have a root context already.
    X, y : array-like
        The caller's training data, handed to the callbacks.
    inference_state : callable
        Gives the fitted attributes of this moment; called only for callbacks that ask for a fitted
        estimator.
    """

    may_stop = False
    wants_to_stop = False

    def __init__(
        self, estimator: Any, X: Any, y: Any, inference_state: Callable[[], dict[str, Any]]
    ) -> None:
        self.estimator = estimator
        self.task = {"estimator": estimator, "X": X, "y": y}
        self.inference_state = inference_state

    def begin(self, n_epochs: int) -> None:
        """Begin the fit."""
        self.root_ = self.estimator._init_callback_context(max_subtasks=n_epochs)
        self.root_.call_on_fit_task_begin(**self.task)

    def on_epoch_begin(self, net: Any, **kwargs: Any) -> None:
        """Begin one epoch."""
        self.epoch_ = self.root_.subcontext(task_name="epoch")
        self.epoch_.call_on_fit_task_begin(
            **self.task, reconstruction_attributes=self.inference_state
        )

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        """End one epoch; a callback may ask to stop."""
        asked = self.epoch_.call_on_fit_task_end(
            **self.task, reconstruction_attributes=self.inference_state
        )
        self.wants_to_stop = bool(asked)

    def finish(self) -> None:
        """End the fit, once the estimator is final."""
        self.root_.call_on_fit_task_end(**self.task, reconstruction_attributes=self.inference_state)
