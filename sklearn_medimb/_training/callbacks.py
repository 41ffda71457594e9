"""What happens around an epoch: progress, validation, checkpoints, scikit-learn's callbacks."""

from __future__ import annotations

import copy
import math
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sklearn.base import clone
from skorch.callbacks import (
    BatchScoring,
    Callback,
    EpochScoring,
    InputShapeSetter,
    LoadInitState,
    LRScheduler,
    MlflowLogger,
    NeptuneLogger,
    ParamMapper,
    PassthroughScoring,
    PrintLog,
    SacredLogger,
    TensorBoard,
    TrainEndCheckpoint,
    WandbLogger,
)
from skorch.callbacks import Checkpoint as SkorchCheckpoint
from skorch.callbacks import ProgressBar as SkorchProgressBar

from sklearn_medimb._machine.distributed import is_main, of_main
from sklearn_medimb._training.checkpoint import Checkpoint


class ProgressBar(Callback):
    """Loss, validation score and time left of a stage: a bar, or where nobody watches, some lines.

    A bar is redrawn in place, which takes a terminal or a notebook. A file or a pipe gets a line
    after the first epoch and after each tenth of the steps, and one where training ends.
    """

    may_stop = False

    def __init__(self, label: str, n_steps: int) -> None:
        self.label = label
        self.n_steps = n_steps

    def on_train_begin(self, net: Any, **kwargs: Any) -> None:
        """Open the bar."""
        from tqdm.auto import tqdm  # installed with skorch

        notebook = any(cls.__name__ == "tqdm_notebook" for cls in tqdm.__mro__)
        self.in_place_ = notebook or sys.stderr.isatty()
        self.n_done_ = 0
        self.tenth_ = -1
        self.line_ = ""
        self.start_ = time.monotonic()
        if self.in_place_:
            self.bar_ = tqdm(total=self.n_steps, desc=self.label, unit="step", file=sys.stderr)

    def on_batch_end(self, net: Any, **kwargs: Any) -> None:
        """Advance; no number is read from the device here."""
        self.n_done_ += 1
        if self.in_place_:
            self.bar_.update()

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        """Show what the epoch brought."""
        last = net.history[-1]
        shown = {"epoch": last["epoch"], "loss": f"{last['train_loss']:.4f}"}
        if "valid_score" in last:
            shown["score"] = f"{last['valid_score']:.3f}"
        if self.in_place_:
            self.bar_.set_postfix(shown, refresh=False)
            return
        seconds = time.monotonic() - self.start_
        left = seconds * (self.n_steps / self.n_done_ - 1)
        numbers = ", ".join(f"{name}={value}" for name, value in shown.items())
        times = f"{timedelta(seconds=round(seconds))}<{timedelta(seconds=round(left))}"
        self.line_ = f"{self.label}: {self.n_done_}/{self.n_steps} steps [{times}, {numbers}]"
        if 10 * self.n_done_ // self.n_steps > self.tenth_:
            self.tenth_ = 10 * self.n_done_ // self.n_steps
            self._write()

    def _write(self) -> None:
        if self.line_:
            print(self.line_, file=sys.stderr, flush=True)  # noqa: T201
        self.line_ = ""

    def close(self) -> None:
        """End with what came last, also when training failed."""
        if hasattr(self, "bar_"):
            self.bar_.close()
        elif hasattr(self, "line_"):
            self._write()


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


# Callbacks of skorch for which an estimator has a way of its own, and what cannot work here.
_REFUSED: dict[type[Callback], str] = {
    EpochScoring: 'early_stopping=True with scoring=..., which records "valid_score"',
    BatchScoring: 'early_stopping=True with scoring=..., which records "valid_score"',
    PassthroughScoring: "net.history.record(name, value) in on_epoch_end of a callback of your own",
    LRScheduler: "lr_schedule=...",
    SkorchCheckpoint: "checkpoint_dir=... to survive crashes, early_stopping=True to keep the best "
    "epoch, sklearn_medimb.persistence.save to keep the result",
    TrainEndCheckpoint: "sklearn_medimb.persistence.save(estimator, path) after fit",
    LoadInitState: "checkpoint_dir=... to resume, or warm_start=True",
    InputShapeSetter: "a backbone that is a class or a recipe: it is made for the shape of X",
}
# They log every number of an epoch; the name of its stage is none.
_NUMBER_LOGGERS = (MlflowLogger, NeptuneLogger, SacredLogger, TensorBoard, WandbLogger)


def _instead(callback: Callback, estimator: Any) -> str | None:
    """What to use instead of a callback that would fail, or do nothing, with this estimator."""
    for cls, instead in _REFUSED.items():
        if isinstance(callback, cls):
            return instead
    if isinstance(callback, SkorchProgressBar) and callback.batches_per_epoch == "auto":
        return "verbose=1"
    if isinstance(callback, PrintLog) and callback.sink is print and not estimator.verbose:
        return "verbose=1, with which it prints, or PrintLog(sink=...)"
    if isinstance(callback, WandbLogger) and callback.save_model:
        return "WandbLogger(..., save_model=False): there is no validation loss to save by"
    if isinstance(callback, NeptuneLogger) and callback.close_after_train:
        return "NeptuneLogger(..., close_after_train=False): a fit may have several stages"
    monitor = getattr(callback, "monitor", None)
    if not isinstance(monitor, str):
        return None
    if monitor == "valid_score":
        if not getattr(estimator, "_holds_out", bool)():
            return 'early_stopping=True, for a "valid_score", or monitor="train_loss"'
        if getattr(callback, "lower_is_better", False):
            return "lower_is_better=False: of scores, the higher is the better"
    elif monitor.startswith("valid_") or monitor.endswith("_best"):
        return (
            f'monitor="train_loss" for {monitor!r}, which is not recorded, or early_stopping=True '
            "with scoring=..."
        )
    return None


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
        If a name is not known, or a callback does not work with the estimator; the message says
        what to use instead.
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
        if not isinstance(item, Callback):
            raise TypeError(
                f"callbacks must hold names or instances of skorch.callbacks.Callback: {item!r}."
            )
        if instead := _instead(item, estimator):
            raise ValueError(
                f"callbacks: {type(item).__name__} does not work in {type(estimator).__name__}: "
                f"use {instead}."
            )
        made.append(_fresh(item))
    return made


def _fresh(callback: Callback) -> Callback:
    """Copy a callback of the user, so that no fit changes it; what it writes to is shared."""
    if hasattr(callback, "__sklearn_clone__"):
        return clone(callback)
    try:
        fresh = type(callback)(**callback.get_params(deep=False))
    except TypeError:  # it has more attributes than parameters
        fresh = copy.copy(callback)
    if isinstance(fresh, _NUMBER_LOGGERS):
        ignored = fresh.keys_ignored or []
        fresh.keys_ignored = [*([ignored] if isinstance(ignored, str) else ignored), "stage"]
    return fresh


def check_patterns(callback: Callback, names: list[str]) -> None:
    """Refuse a callback that freezes or changes parameters, but finds none.

    Parameters
    ----------
    callback : Callback
        Of the user.
    names : list of str
        Names of the parameters that are trained.

    Raises
    ------
    ValueError
        If none of its patterns fits a name.
    """
    if not isinstance(callback, ParamMapper):
        return
    if not any(callback.filter_parameters(callback.patterns, [(name, None) for name in names])):
        parts = sorted({".".join(name.split(".")[:2]) + ".*" for name in names})
        raise ValueError(
            f"callbacks: the patterns {callback.patterns} of {type(callback).__name__} fit no "
            f"parameter; there are {', '.join(parts)}."
        )


def explain_missing(callback: Callback, error: KeyError, history: Any) -> Exception:
    """What to raise where a callback of the user asked the history for what it does not hold."""
    row = history[-1] if len(history) else {}
    names = sorted(name for name in row if name != "batches")
    return ValueError(
        f"callbacks: {type(callback).__name__} failed with KeyError({error}). The history has "
        f"{names} here, and nothing of single batches. A validation score, valid_score, comes with "
        "early_stopping=True."
    )


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
        mean = net.average
        with nullcontext() if mean is None else mean.in_place_of(net.module_):
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
    """Write the checkpoint after each epoch, when the user's callbacks are done with it.

    Parameters
    ----------
    checkpoint : Checkpoint
        Of the fit.
    best : BestEpoch or None
        Its keeper of the best epoch.
    writes : bool
        Whether this process writes; all of them go on from what was read.
    """

    may_stop = False

    def __init__(self, checkpoint: Checkpoint, best: BestEpoch | None, writes: bool) -> None:
        self.checkpoint = checkpoint
        self.best = best
        self.writes = writes

    def on_train_begin(self, net: Any, **kwargs: Any) -> None:
        """Let the user's callbacks go on."""
        self.checkpoint.begin_callbacks(net)

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        """Write what a resumed fit would need."""
        if self.writes:
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
