"""The skorch net inside every estimator.

skorch keeps its ladder (``fit_loop``, ``run_single_epoch``, ``train_step``, ``infer``,
``get_loss``), its callbacks and its history; what changes is where batches come from and that
nothing waits for the device inside an epoch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from skorch import NeuralNet
from skorch.callbacks import Callback, EpochTimer
from torch import nn

from sklearn_medimb._data.batches import Batches
from sklearn_medimb._machine import distributed
from sklearn_medimb._machine.graphs import can_replay
from sklearn_medimb._machine.randomness import may_draw, redirected
from sklearn_medimb._machine.runtime import noting_interrupts
from sklearn_medimb._training.callbacks import check_patterns, explain_missing
from sklearn_medimb._training.momentum import WeightAverage
from sklearn_medimb._training.replays import ReplayedSteps
from sklearn_medimb._training.steps import Steps

SCHEDULES = ("one_cycle", "cosine", "constant")


def learning_rate_factor(schedule: str, step: int, n_steps: int, warm_up: float = 0.3) -> float:
    """Share of the peak learning rate at a step.

    "one_cycle" [1]_ rises along a half cosine from 1/25 to 1 during the first `warm_up` of the
    steps and falls along another to nearly 0; "cosine" only falls; "constant" stays at 1.

    References
    ----------
    .. [1] L. N. Smith, N. Topin, "Super-convergence: very fast training of neural networks using
       large learning rates", 2019.
    """
    if schedule == "constant":
        return 1.0
    done = min(step / max(n_steps - 1, 1), 1.0)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if done < warm_up:
        start = 1 / 25
        return start + (1 - start) * 0.5 * (1 - math.cos(math.pi * done / warm_up))
    return 1e-4 + (1 - 1e-4) * 0.5 * (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up)))


class Net(NeuralNet):
    """A skorch net that trains on :class:`~sklearn_medimb._data.batches.Batches`.

    ``infer`` and ``get_loss`` are skorch's: ``criterion_(module_(images), targets)``, unless a
    stage has a forward pass of its own. The history receives one ``train_loss`` per epoch, and the
    means of the criterion's ``terms`` where it has this dict of tensors.

    Parameters
    ----------
    *args, **kwargs
        As for :class:`skorch.NeuralNet`.
    """

    schedule: str | None = None
    steps_per_epoch = 0
    stage = ""
    last_criterion: dict[str, Any] | None = None
    stage_forward: Callable[[nn.Module, Any], Any] | None = None
    stopped_by_callback = False
    complete = True
    began = False
    average: WeightAverage | None = None  # of the weights, in the present stage
    steps: Steps  # of the present stage, or the last one
    told: str | None = None  # why the user knows that steps are not replayed
    from_outside = False  # whether a step may ask torch's default generators for numbers
    callbacks_: list[tuple[str, Callback]]
    user_callbacks: list[Callback]
    made_from: dict[str, Any]  # parameters of the estimator that the network was made from
    dtype: torch.dtype

    @property
    def _default_callbacks(self) -> list[tuple[str, Callback]]:
        # skorch's own record and print every batch, which waits for the device each time.
        return [("epoch_timer", EpochTimer())]

    def get_split_datasets(self, X: Batches, y: None = None, **params: Any) -> tuple[Batches, None]:
        """Pass the batches through: the estimator split the rows before."""
        return X, None

    def get_iterator(self, dataset: Batches, training: bool = False) -> Batches:
        """Pass the batches through: they draw a new plan each time they are iterated."""
        return dataset

    def get_all_learnable_params(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what the optimiser may move; a teacher that only follows is not among it.

        Parameters of the network that are frozen are: they have no gradient, and so stay, and a
        callback may unfreeze them.
        """
        followers = {id(p) for p in self.criterion_.parameters() if not p.requires_grad}
        for name, parameter in super().get_all_learnable_params():
            if id(parameter) not in followers:
                yield name, parameter

    def infer(self, x: Any, **fit_params: Any) -> Any:
        """Forward pass of the present stage."""
        if self.stage_forward is None:
            return super().infer(x, **fit_params)
        return self.stage_forward(self.module_, x)

    def get_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Loss of a batch, which something that is trained must move."""
        loss = super().get_loss(*args, **kwargs)
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError(
                "There is nothing to train: all parameters that the loss depends on are frozen "
                "(requires_grad=False)."
            )
        return loss

    def start_schedule(
        self,
        schedule: str,
        n_steps: int,
        lr: float,
        optimizer: dict[str, Any] | None = None,
        backbone_lr: float = 1.0,
        layer_decay: float = 1.0,
        weight_decay: float | None = None,
    ) -> None:
        """Begin a course of `n_steps` with a fresh optimiser at peak rate `lr`.

        `optimizer` holds skorch's parameters of another optimiser for this course alone,
        `backbone_lr` the backbone's share of the rate, `layer_decay` by how much each of its stages
        has less than the one after it, `weight_decay` another one than the estimator's.
        """
        self.lr, self.schedule = lr, schedule
        attributes: dict[str, Any] = self.__dict__
        own = {k: v for k, v in attributes.items() if k.split("__")[0] == "optimizer"}
        given = dict(own if optimizer is None else optimizer)
        if weight_decay is not None:
            given["optimizer__weight_decay"] = weight_decay
        if (backbone_lr, layer_decay) != (1, 1):
            shares = self.module_.trunk.shares(backbone_lr, layer_decay)
            groups = [(f"trunk.{name}", {"lr": share * lr}) for name, share in shares.items()]
            given["optimizer__param_groups"] = groups
        for name in own:
            del attributes[name]
        attributes.update(given)
        self.initialize_optimizer()
        for name in given:
            del attributes[name]
        attributes.update(own)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer_, partial(learning_rate_factor, schedule, n_steps=n_steps)
        )

    def notify(self, method_name: str, **kwargs: Any) -> None:
        """Call the callbacks; remember whether one of them decided to end the training.

        skorch's callbacks stop by raising what Ctrl-C raises; our own, but for the one that is
        there to stop, only pass on the user's.
        """
        getattr(self, method_name)(self, **kwargs)
        for _, callback in self.callbacks_:
            try:
                getattr(callback, method_name)(self, **kwargs)
            except KeyboardInterrupt:
                self.stopped_by_callback = getattr(callback, "may_stop", True)
                raise
            except KeyError as error:
                if type(callback).__module__.startswith("sklearn_medimb."):
                    raise
                raise explain_missing(callback, error, self.history) from error

    def torch_compile(self, module: nn.Module, name: str) -> nn.Module:
        """Compile the backbone, in place: the names of the weights stay as they are."""
        trunk = getattr(module, "trunk", None)
        if self.compile and trunk is not None:
            trunk.backbone.compile()
        return module

    def optimizer_state(self, schedule: str) -> dict[str, Any] | None:
        """State to go on from, if the last course of training had this schedule."""
        return copy.deepcopy(self.optimizer_.state_dict()) if self.schedule == schedule else None

    def resume_optimizer(self, state: dict[str, Any]) -> None:
        """Go on with the moments of an earlier optimiser, if they are of these parameters."""
        parameters = [p for group in self.optimizer_.param_groups for p in group["params"]]
        sizes = [len(group["params"]) for group in state["param_groups"]]
        fits = sum(sizes) == len(parameters) and all(
            value.shape in ((), parameters[i].shape)
            for i, moments in state["state"].items()
            for value in moments.values()
            if isinstance(value, torch.Tensor)
        )
        if fits:  # its moments; rates and penalties are those of now
            settings = self.optimizer_.state_dict()["param_groups"]
            self.optimizer_.load_state_dict({**state, "param_groups": settings})

    def run(
        self,
        batches: Iterable[Any],
        n_epochs: int,
        callbacks: list[Callback],
        last: list[Callback],
        *,
        validated: bool = True,
    ) -> None:
        """Train for some epochs with extra callbacks: before the user's, and `last` after them.

        Where there is no validation score, callbacks of the user that watch one are left out.
        `complete` is False afterwards if the user interrupted, in whichever epoch.
        """
        own = self.callbacks_
        timer, *users = own
        if not validated:
            users = [u for u in users if not str(getattr(u[1], "monitor", "")).startswith("valid")]
        if not self.began:
            names = [name for name, _ in self.get_all_learnable_params()]
            for _, user in users:
                check_patterns(user, names)
            self.began = True
        first, final = ([(type(cb).__name__, cb) for cb in part] for part in (callbacks, last))
        self.user_callbacks = [callback for _, callback in own[1:]]
        self.callbacks_ = [timer, *first, *users, *final]
        self.max_epochs, self.stopped_by_callback, self.complete = n_epochs, False, False
        self.from_outside = may_draw(self.module_, self.criterion_) or not type(
            self.optimizer_
        ).__module__.startswith("torch.optim.")
        self.steps = Steps(self, batches)
        if can_replay(torch.device(self.device)):
            self.steps = ReplayedSteps(self, batches, [cb for _, cb in self.callbacks_])
        try:
            with noting_interrupts() as pressed:
                self.partial_fit(batches)
                self.complete |= self.stopped_by_callback and not pressed()
        except BaseException:
            for _, user in users:
                getattr(user, "fail", lambda: None)()
            raise
        finally:
            self.steps.close()
            self.callbacks_ = own
            for callback in callbacks:
                getattr(callback, "close", lambda: None)()

    def fit_loop(self, *args: Any, **kwargs: Any) -> Net:
        """Train for `max_epochs`; Ctrl-C leaves it before it is complete."""
        super().fit_loop(*args, **kwargs)
        self.complete = True
        return self

    def train_step(self, batch: Any, **fit_params: Any) -> Any:
        """Take a step, backward pass included, with the draws of the fit."""
        with redirected(self.from_outside):
            return super().train_step(batch, **fit_params)

    def train_step_single(self, batch: Any, **fit_params: Any) -> Any:
        """Forward and backward pass; processes that train together then agree on the gradients."""
        step = super().train_step_single(batch, **fit_params)
        distributed.average_gradients(p for _, p in self.get_all_learnable_params())
        return step

    def run_single_epoch(
        self, iterator: Batches | None, training: bool, prefix: str, step_fn: Any, **fit_params: Any
    ) -> None:
        """Train one epoch; the loss is summed on the device and read once at its end."""
        if iterator is None:
            return
        if self.stage:
            self.history.record("stage", self.stage)
        trunk = self.module_.trunk
        if not trunk.given_encoded:
            trunk.keep_frozen()  # a callback may freeze layers, or thaw them
        count = n_steps = 0
        steps = self.steps
        with steps.epoch():
            for order in steps.orders():
                count += steps.take(order)
                self.scheduler.step()
                n_steps += 1
        if n_steps != self.steps_per_epoch:
            raise ValueError(
                f"An epoch has {n_steps} batches, where the learning rate was planned for "
                f"{self.steps_per_epoch}: let _steps_per_epoch say how many there are, and batches "
                "begin anew each time that they are iterated."
            )
        distributed.average_buffers(self.module_)
        distributed.average_buffers(self.criterion_)
        for name, total in steps.sums().items():
            self.history.record(f"{prefix}_{name}", distributed.of_main(total / count))
        loss = self.history[-1, f"{prefix}_loss"]
        if not math.isfinite(loss):
            raise ValueError(
                f"The training loss became {loss} in epoch {len(self.history)}: lower lr "
                f"(now {self.lr}) or check X for extreme values."
            )
