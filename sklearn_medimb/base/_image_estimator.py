"""The life of one fit, shared by every estimator of the package that trains a network."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    clone,
)
from sklearn.frozen import FrozenEstimator
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
from sklearn.utils.validation import check_is_fitted
from skorch.callbacks import Callback
from skorch.history import History
from torch import nn

from sklearn_medimb._data.batches import Preprocessor
from sklearn_medimb._data.images import Images, channel_statistics, check_pixel_range, read_images
from sklearn_medimb._data.layout import INPUT_CONSTRAINTS, Layout
from sklearn_medimb._data.plans import n_batches
from sklearn_medimb._machine import distributed
from sklearn_medimb._machine.gpu_queue import ALL_MEMORY, turn
from sklearn_medimb._machine.randomness import (
    Draws,
    drawing_from,
    make_generator,
    redirected,
    seeded,
)
from sklearn_medimb._machine.runtime import (
    in_blocks,
    inference_block,
    is_one_of_many,
    is_out_of_memory,
    one_thread_in_workers,
    resolve_device,
    resolve_precision,
)
from sklearn_medimb._training.callbacks import (
    BestEpoch,
    ProgressBar,
    SaveCheckpoint,
    SklearnCallbacks,
    StopWhenAsked,
    resolve_callbacks,
)
from sklearn_medimb._training.checkpoint import Checkpoint, data_digest, fingerprint, plain
from sklearn_medimb._training.net import SCHEDULES, Net
from sklearn_medimb._training.network import Trunk
from sklearn_medimb.augment import resolve_augmentation
from sklearn_medimb.backbones import Backbone, classifier_head, make_backbone

try:
    from sklearn.callback import CallbackSupportMixin
except ImportError:  # scikit-learn < 1.9

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stand-in: this scikit-learn has no callbacks."""


from sklearn_medimb._training.stage import Stage, TrainingSet

# What the estimator decides about its skorch net; everything else may come in `net_params`.
_RESERVED = {
    "module", "criterion", "lr", "max_epochs", "callbacks", "train_split", "device", "compile",
    "dataset", "iterator_train", "iterator_valid", "warm_start", "verbose", "batch_size",
    "predict_nonlinearity", "optimizer__lr",
}  # fmt: skip


class BaseImageEstimator(
    CallbackSupportMixin,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    BaseEstimator,
):
    """Common ground of classifiers and encoders: training, embedding, persistence.

    A kind of estimator says what its training data are (`_check_training`, `_training_rows`), a
    method supplies its network (`_make_network`) and lists its courses of training (`_stages`).
    What only training needs belongs to the criterion: its parameters are trained, and it is gone
    afterwards.
    """

    net_: Net
    image_shape_: tuple[int, ...]
    pixel_range_: str | float | None

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "backbone": [str, nn.Module, Backbone, type, FrozenEstimator],
        "max_epochs": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "lr": [Interval(Real, 0, None, closed="neither")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "lr_schedule": [StrOptions(set(SCHEDULES))],
        "augment": [str, None, HasMethods(["draw", "apply"])],
        "callbacks": [None, str, list],
        "checkpoint_dir": [None, str, os.PathLike],
        **INPUT_CONSTRAINTS,
        "device": [str, torch.device],
        "precision": [StrOptions({"auto", "float32", "bf16", "float64"})],
        "compile": ["boolean"],
        "warm_start": ["boolean"],
        "net_params": [None, dict],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    # ---------------------------------------------------------------- what a method supplies

    def _make_network(self, trunk: Callable[..., Trunk]) -> nn.Module:
        raise NotImplementedError

    def _stages(self, train: TrainingSet, n_epochs: int, **common: Any) -> list[Stage]:
        """Courses of training, one after another on the same network."""
        raise NotImplementedError

    def _steps_per_epoch(self, n_samples: int) -> int:
        return n_batches(n_samples, self.batch_size)

    def _images_per_step(self, n_samples: int) -> int:
        """Images that backbones encode in a step of training at most; each view counts as one."""
        return min(self.batch_size, n_samples) * len(self._views())

    def _views(self) -> tuple[Any, ...]:
        """Augmentations: one copy of a batch for each."""
        return (resolve_augmentation(self.augment),)

    def _inference_state(self, train: TrainingSet) -> dict[str, Any]:
        """Fitted attributes, beyond the network, that inference needs; made from it."""
        return {}

    def _optimizer_groups(self) -> list[tuple[str, dict[str, Any]]]:
        """Parameter groups for the optimiser, as skorch's ``optimizer__param_groups``."""
        return []

    # ---------------------------------------------------------------- what a kind supplies

    def _check_training(
        self, X: Any, y: Any, *, fresh: bool, **given: Any
    ) -> tuple[TrainingSet, np.ndarray | None]:
        """Turn the caller's arguments into a training set and patients; set what they decide."""
        raise NotImplementedError

    def _training_rows(
        self,
        data: TrainingSet,
        groups: np.ndarray | None,
        rng: np.random.Generator,
        partial: bool,
    ) -> tuple[TrainingSet, np.ndarray | None]:
        """Training set and validation rows."""
        return data, None

    def _best_epoch(
        self, X: Any, y: Any, held: np.ndarray | None, train: TrainingSet
    ) -> BestEpoch | None:
        """Keeper of the epoch that does best on the validation rows."""
        return None

    def _pretraining(self, train: TrainingSet, **common: Any) -> list[Stage]:
        """Courses of training before the method's own, on a fresh network."""
        return []

    def _n_epochs(self, n_samples: int) -> int:
        raise NotImplementedError

    # ---------------------------------------------------------------- one fit

    def _check_parameters(self) -> None:
        """Refuse what `_parameter_constraints` cannot express."""
        resolve_callbacks(self.callbacks, self)
        start = self._start
        if start is not None and not start._was_fitted:
            name = type(start).__name__
            raise ValueError(
                f"backbone={name}(...) is not fitted: fit it first. To pre-train on the images of "
                f"this fit, pass an encoder as pretrain={name}(...)."
            )

    @property
    def _brings_weights(self) -> bool:
        """Whether the backbone is a module, or a recipe with a file of weights."""
        given = self.backbone
        return isinstance(given, nn.Module) or getattr(given, "weights", None) is not None

    @property
    def _start(self) -> BaseImageEstimator | None:
        """Fitted estimator whose backbone, and normalisation, training begins with."""
        given = self.backbone
        if isinstance(given, FrozenEstimator):
            given = given.estimator
        return given if isinstance(given, BaseImageEstimator) else None

    def _fit(self, X: Any, y: Any = None, *, partial: bool = False, **given: Any) -> Any:
        """Validate, split, resample, build, train, and keep what inference needs."""
        with _all_or_nothing(self), one_thread_in_workers():
            self._check_parameters()
            if isinstance(self.backbone, nn.Module) and (head := classifier_head(self.backbone)):
                warnings.warn(
                    f"backbone={type(self.backbone).__name__} ends in a classifier, {head}, whose "
                    f"scores are no features: take it off first (backbone.{head} = "
                    "torch.nn.Identity()).",
                    stacklevel=4,
                )
            previous = self.net_ if self._continues(partial) else None
            fresh = previous is None
            data, groups = self._check_training(X, y, fresh=fresh, **given)
            device = resolve_device(self.device)
            distributed.join(device)

            several, checkpoint = distributed.world_size() > 1, None
            saves = self.checkpoint_dir is not None and not partial
            given_data = ""
            if saves or several:
                labels = data.y, data.weight, groups, data.unlabelled, data.unlabelled_groups
                given_data = data_digest(data.images, data.rows, *labels)
            if saves:
                token = fingerprint(self, device, {} if fresh else self.weights_, given_data)
                checkpoint = Checkpoint(self.checkpoint_dir, token).open()
            seed = int(check_random_state(self.random_state).randint(2**31 - 1))
            if checkpoint is not None and checkpoint.seed is not None:
                seed = checkpoint.seed
            elif previous is not None:  # further training must not repeat the first one's draws
                seed = _mixed(seed, len(previous.history))
            if several:
                seed = distributed.agree(seed, given_data)
            rng = np.random.default_rng(seed)
            generator, draws = make_generator(seed, device), Draws(seed, device)
            self.random_seed_ = seed

            with drawing_from(draws), ExitStack() as memory:
                with redirected():  # initial weights, of networks from outside too
                    train, held = self._training_rows(data, groups, rng, partial)
                    if fresh:
                        self._normalise(train)
                    self.net_ = self._make_net(device, previous)
                    if distributed.world_size() == 1:  # a launcher has given the others their GPUs
                        memory.enter_context(turn(device, lambda: self._training_bytes(train)))
                    common = {
                        "preprocess": self._preprocessor(),
                        "views": self._views(),
                        "rng": rng,
                        "generator": generator,
                    }
                    n_epochs = 1 if partial else self._n_epochs(len(train.rows))
                    begins = fresh and not partial and self.net_.module_.trunk.learns
                    stages = self._pretraining(train, **common) if begins else []
                    stages += self._stages(train, n_epochs, **common)
                    if partial:
                        stages[0].lr_schedule = "constant"
                    best = self._best_epoch(X, y, held, train)
                if checkpoint is not None:
                    checkpoint.attach(seed=seed, rng=rng, generator=generator, draws=draws)
                reporter = None
                if not partial and hasattr(self, "_init_callback_context"):
                    reporter = SklearnCallbacks(self, X, y, lambda: self._inference_state(train))
                optimizer = previous.optimizer_state("constant") if partial and previous else None
                with self._settling(stages) if begins else nullcontext():
                    self._train(stages, best, checkpoint, reporter, optimizer)
                train.images.conclude()
                self._set_fitted(self._inference_state(train))
                if reporter is not None:
                    reporter.finish()
                if checkpoint is not None and self.net_.complete:
                    checkpoint.remove()
        return self

    def _training_bytes(self, train: TrainingSet) -> int:
        """Memory that training needs at most: images, weights with moments, activations."""
        module, images = self.net_.module_, train.images
        resident = len(train.rows) * math.prod(images.image_shape) * images.dtype.itemsize
        weights = sum(weight.nbytes for weight in module.state_dict().values())
        try:  # backward makes a gradient beside each activation
            activations = 2 * self._most_images(train) * module.trunk.activation_bytes()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return ALL_MEMORY  # others are there: it tries when it is alone
        return resident + 5 * weights + activations

    def _most_images(self, train: TrainingSet) -> int:
        """Images of a step of the most demanding stage."""
        return self._images_per_step(len(train.rows))

    def _normalise(self, train: TrainingSet) -> None:
        """Set the channel statistics: of the training rows, or those of a fitted start."""
        start = self._start
        if start is None:
            self.pixel_mean_, self.pixel_std_ = channel_statistics(
                train.images,
                train.rows,
                train.weight,
                block=inference_block(train.images.image_shape, torch.device("cpu")),
            )
            if self.pixel_range_ is None:
                self.pixel_range_ = train.images.peak
            return
        if not start.__sklearn_is_fitted__():
            raise ValueError(
                f"The weights of the {type(start).__name__} that this estimator began with are not "
                "in the file it came from: pass the fitted one again as backbone= or pretrain=."
            )
        theirs, ours = start.image_shape_, self.image_shape_
        if (len(theirs), theirs[0]) != (len(ours), ours[0]):
            raise ValueError(
                f"backbone={type(start).__name__} was fitted on images of shape {theirs} (channels "
                f"first) and cannot read images of shape {ours}."
            )
        check_pixel_range(start, train.images, reset=False)
        self.pixel_mean_, self.pixel_std_ = start.pixel_mean_.copy(), start.pixel_std_.copy()
        if self.pixel_range_ is None:
            self.pixel_range_ = 1.0 if start.pixel_range_ == "uint8" else start.pixel_range_

    def _train(
        self,
        stages: list[Stage],
        best: BestEpoch | None,
        checkpoint: Checkpoint | None,
        reporter: SklearnCallbacks | None,
        optimizer: dict[str, Any] | None,
    ) -> None:
        """Run the stages, one after another, until one is interrupted."""
        net, n_before = self.net_, len(self.net_.history)
        n_epochs = n_before + sum(stage.n_epochs for stage in stages)
        if reporter is not None:
            reporter.begin(n_epochs - n_before)
        first = 0
        if checkpoint is not None:
            first = checkpoint.first_stage([stage.n_epochs for stage in stages])
        for number, stage in enumerate(stages[first:], first):
            scorer = best if stage.validated else None
            try:
                self._run_stage(number, stage, scorer, checkpoint, reporter, optimizer)
            except KeyboardInterrupt:  # outside of an epoch, where skorch catches it
                net.complete = False
            if scorer is not None:
                scorer.restore(net)
                self.best_score_ = scorer.best_score
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
        net.stage, net.stage_forward = stage.name, stage.forward
        net.criterion_ = stage.criterion.to(net.device, net.dtype)
        start_from: Any = getattr(stage.criterion, "start_from", None)
        if start_from is not None:
            start_from(net.module_)
        distributed.share_weights(net.module_)
        distributed.share_weights(net.criterion_)
        n_steps = stage.n_epochs * stage.steps_per_epoch
        net.start_schedule(stage.lr_schedule, n_steps, stage.lr, stage.optimizer)
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
            SaveCheckpoint(checkpoint, scorer) if checkpoint is not None and main else None,
            reporter,
        ]
        if self.verbose and main:
            label = f"{type(self).__name__} {stage.name}".rstrip()
            callbacks.append(ProgressBar(label, n_left * stage.steps_per_epoch))
        net.run(
            stage.batches,
            n_left,
            [cb for cb in callbacks if cb is not None],
            stop,
            validated=scorer is not None,
        )

    @contextmanager
    def _settling(self, stages: list[Stage]) -> Iterator[None]:
        """Warn where a given backbone's weights have left its running statistics behind."""
        trunk: Trunk = self.net_.module_.trunk
        n_steps = sum(stage.n_epochs * stage.steps_per_epoch for stage in stages)
        left = trunk.statistics_left(n_steps) if self._brings_weights else 0.0
        if left < 0.05:
            yield
            return
        before = [parameter.detach().clone() for parameter in trunk.parameters()]
        yield
        after = [parameter.detach() for parameter in trunk.parameters()]
        moved = sum(float((b - a).square().sum()) for b, a in zip(before, after, strict=True))
        if moved > 0.01**2 * sum(float(b.square().sum()) for b in before):
            warnings.warn(
                f"backbone={type(self.backbone).__name__}: its weights have moved, but after "
                f"{n_steps} steps {left:.0%} of its running statistics are still those that it "
                "came with, and predictions rest on them. Raise the momentum of its batch "
                "normalisation, train longer (max_epochs), or freeze these layers "
                "(requires_grad_(False)).",
                stacklevel=6,
            )

    def _continues(self, partial: bool) -> bool:
        """Whether this call goes on from the present weights."""
        return self.__sklearn_is_fitted__() and (partial or self.warm_start)

    def _set_fitted(self, attributes: dict[str, Any]) -> None:
        for name, value in attributes.items():
            setattr(self, name, value)

    # ---------------------------------------------------------------- the network

    def _make_net(
        self,
        device: torch.device,
        previous: Net | None = None,
        *,
        pretrained: bool = True,
        module: Any = None,
    ) -> Net:
        """Make the skorch net: network (unless it is given), optimiser, callbacks.

        A previous net passes on a copy of its network and its history, so that it stays as it was
        should training fail.
        """
        dtype, autocast = resolve_precision(self.precision, device, len(self.image_shape_))
        pretrained = pretrained and module is None
        callbacks = resolve_callbacks(self.callbacks, self) if pretrained else []
        if previous is not None:
            module = copy.deepcopy(previous.module_).to(device, dtype)
        elif module is None:
            module = self._network(device, dtype, pretrained)
        module.trunk.autocast = autocast
        net = Net(
            module=module,
            criterion=nn.Identity(),  # the method's loss follows with the training set
            lr=self.lr,
            callbacks=callbacks or None,
            train_split=None,
            device=str(device),
            compile=self.compile,
            verbose=int(self.verbose),
            **self._net_params(),
        )
        net.dtype = dtype
        net.initialize()
        if previous is not None:
            net.history_ = copy.deepcopy(previous.history_)
            if hasattr(previous, "criterion_"):
                net.last_criterion = previous.criterion_.state_dict()
        return net

    def _net_params(self) -> dict[str, Any]:
        """Further parameters of the skorch net: the caller's, and the optimiser."""
        params = {"optimizer": torch.optim.AdamW, **(self.net_params or {})}
        if reserved := sorted(k for k in params if {k, k.split("__")[0]} & _RESERVED):
            raise ValueError(
                f"net_params must not hold {reserved}: the estimator sets them itself."
            )
        if params["optimizer"] is torch.optim.AdamW:
            params.setdefault("optimizer__fused", True)
        params.setdefault("optimizer__weight_decay", self.weight_decay)
        if groups := self._optimizer_groups():
            params.setdefault("optimizer__param_groups", groups)
        return params

    def _network(self, device: torch.device, dtype: torch.dtype, pretrained: bool) -> nn.Module:
        """Make the method's module around the chosen backbone, on the device."""
        _, autocast = resolve_precision(self.precision, device, len(self.image_shape_))
        if on_meta := device.type == "meta":  # shapes alone
            autocast = None
        start, backbone = self._start, self.backbone
        if start is not None and pretrained:
            backbone = start.backbone_
        elif start is not None:  # its weights are not wanted, and a file has none
            module: Any = start._network(device, dtype, pretrained)
            backbone = module.trunk.backbone
        if hasattr(backbone, "trunk"):
            raise ValueError(
                f"backbone={type(backbone).__name__} is a whole network of this package: pass the "
                "fitted estimator."
            )
        if not pretrained and isinstance(backbone, Backbone):
            backbone = clone(backbone).set_params(weights=None)

        def trunk(input_shape: tuple[int, ...] = self.image_shape_) -> Trunk:
            module = make_backbone(backbone, input_shape, self.n_samples_fit_)
            module = module.to("meta" if on_meta else "cpu").float()
            return Trunk(module, input_shape, autocast=autocast)

        return self._make_network(trunk).to(device, dtype)

    def _preprocessor(self) -> Preprocessor:
        """Normalisation on the device of the network."""
        return Preprocessor(
            self.pixel_mean_,
            self.pixel_std_,
            dtype=self.net_.dtype,
            device=torch.device(self.net_.device),
            channels_last=self.net_.module_.trunk.channels_last,
        )

    # ---------------------------------------------------------------- inference

    def _read(self, X: Any, *, reset: bool = False) -> Images:
        """Validate images of a call."""
        images = read_images(
            self,
            X,
            reset=reset,
            image_shape=self.image_shape,
            data_format=self.data_format,
            spatial_dims=self.spatial_dims,
            paired=getattr(self, "reference", None) == "paired",
            float_dtype=np.float64 if self.precision == "float64" else np.float32,
        )
        check_pixel_range(self, images, reset=reset)
        return images

    def _map(
        self,
        images: Images,
        forward: Callable[[torch.Tensor], Any],
        rows: np.ndarray | None = None,
    ) -> Any:
        """Apply `forward` to images, in evaluation mode and in blocks; stays on the device.

        It gives a tensor with a row for each image, or a tuple of such tensors.
        """
        module, prepare = self.net_.module_, self._preprocessor()
        module.eval()
        block = inference_block(images.image_shape, prepare.device)
        rows = np.arange(len(images)) if rows is None else rows
        n = len(rows)
        if len(images.image_shape) == 1:
            # Matrix products of other sizes round otherwise: with whole blocks only, the result
            # for one row of vectors does not depend on the rows beside it.
            rows = np.pad(rows, (0, -n % block), mode="edge")
        with torch.inference_mode(), one_thread_in_workers():
            result = in_blocks(
                len(rows), block, lambda part: forward(prepare(images.rows(rows[part])))
            )
        images.conclude()
        parts = result if isinstance(result, tuple) else (result,)
        parts = tuple(part[:n] for part in parts)
        for part in parts:
            self._refuse_non_finite(part, rows)
        return parts if isinstance(result, tuple) else parts[0]

    def _refuse_non_finite(self, result: torch.Tensor, rows: np.ndarray) -> None:
        """Refuse output that no answer can be made of; one look for all rows."""
        if torch.isfinite(result.sum()):
            return
        odd = (~torch.isfinite(result.flatten(1)).all(dim=1)).nonzero()
        if len(odd):  # else the sum overflows, no value does
            raise ValueError(
                f"{type(self).__name__} gives NaN or infinity for row {rows[int(odd[0])]} of X: "
                "its values are too large for the network, or the weights of the network have "
                "diverged in training (lower lr)."
            )

    def transform(self, X: Any) -> np.ndarray:
        """Embed images with the trained backbone.

        Parameters
        ----------
        X : array-like or lazy sequence of n images
            In any layout that ``fit`` accepts.

        Returns
        -------
        embedding : ndarray of shape (n, n_features_out)
            Features before the classification head.
        """
        check_is_fitted(self)
        images = self._read(X)
        return self._map(images, self.net_.module_.features).cpu().numpy()

    @property
    def backbone_(self) -> nn.Module:
        """Copy of the trained backbone, on the CPU."""
        check_is_fitted(self)
        return copy.deepcopy(self.net_.module_.trunk.backbone).cpu().eval()

    @property
    def _n_features_out(self) -> int:
        return self.net_.module_.n_features

    # ---------------------------------------------------------------- copies, persistence, tags

    def __sklearn_clone__(self) -> Any:
        """Clone; a fitted estimator to begin with stays fitted, and shares what it learned."""
        copied = super().__sklearn_clone__()
        for name, value in self.get_params(deep=False).items():
            if isinstance(value, BaseImageEstimator) and value._was_fitted:
                kept = object.__new__(type(value))
                kept.__dict__.update(vars(value))  # its parameters can be set; nothing is trained
                setattr(copied, name, kept)
        return copied

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "net_")

    @property
    def _was_fitted(self) -> bool:
        """Whether it is fitted, or was, when a file was written that leaves out its weights."""
        return hasattr(self, "image_shape_")

    # Kind of dtype, first size (C channels, K classes, S supports) and axes of fitted arrays.
    _array_kinds: ClassVar[dict[str, tuple[str, str, int]]] = {
        "pixel_mean_": ("f", "C", 1),
        "pixel_std_": ("f", "C", 1),
    }

    def _sizes(self) -> dict[str, int]:
        """Sizes that fitted arrays must have, by letter."""
        return {"C": self.image_shape_[0]}

    def _answer(self, images: Images) -> tuple[np.ndarray, int]:
        """What predictions come from, and how many numbers it has per image."""
        module = self.net_.module_
        return self._map(images, module.features).cpu().numpy(), module.n_features

    def _check_learned(self, *, tries: bool = True) -> None:
        """Refuse fitted arrays that do not fit together: there must be an answer for blank input.

        Parameters
        ----------
        tries : bool, default=True
            Whether to ask for that answer, which takes memory and time.

        Raises
        ------
        ValueError
            If one has another size or kind of numbers, or is not finite.
        """
        sizes = self._sizes()
        for name, (kinds, size, n_axes) in self._array_kinds.items():
            if name not in vars(self):
                continue
            array = vars(self)[name]
            sizes.setdefault(size, len(array))
            if array.ndim != n_axes or array.dtype.kind not in kinds or len(array) != sizes[size]:
                raise ValueError(f"{name} has shape {array.shape} and dtype {array.dtype}.")
        arrays = {name: torch.tensor(getattr(self, name)) for name in self._inference_arrays}
        for name, value in (self.net_.module_.state_dict() | arrays).items():
            if value.is_floating_point() and not value.isfinite().all():
                raise ValueError(f"the weights {name} are not finite.")
        if not (self.pixel_std_ > 0).all():
            raise ValueError("pixel_std_ must be above 0.")
        if self.compile or not tries:  # an answer would compile the network now
            return
        shape = self.image_shape_
        blank = Images(np.zeros((1, *shape), np.float32), Layout(shape), np.dtype(np.float32))
        answer, n_numbers = self._answer(blank)
        check_answer(answer, (1, n_numbers))

    # Fitted arrays that prediction needs beside the network's weights.
    _inference_arrays: ClassVar[tuple[str, ...]] = ("pixel_mean_", "pixel_std_")

    def _network_weights(self) -> dict[str, np.ndarray]:
        state = self.net_.module_.state_dict()
        return {
            name: np.array(value.detach().cpu().numpy(), order="C") for name, value in state.items()
        }

    @property
    def weights_(self) -> dict[str, np.ndarray]:
        """All arrays that predictions come from, by name: what safetensors stores in one call."""
        check_is_fitted(self)
        extra = {name: np.array(getattr(self, name), order="C") for name in self._inference_arrays}
        return {**self._network_weights(), **extra}

    @weights_.setter
    def weights_(self, weights: dict[str, np.ndarray]) -> None:
        check_is_fitted(self)
        weights = {name: np.array(value) for name, value in weights.items()}
        network = self._network_weights()
        arrays = {name: getattr(self, name) for name in self._inference_arrays}
        kinds = {"u": "i"}  # whole numbers are whole numbers

        def differs(name: str, own: np.ndarray) -> bool:
            new = weights[name]
            # A bank may hold another number of supports; `_check_learned` knows what may vary.
            same = new.shape == own.shape if name in network else new.shape[1:] == own.shape[1:]
            return not same or len({kinds.get(a.dtype.kind, a.dtype.kind) for a in (own, new)}) > 1

        expected = network | arrays
        odd = set(weights) ^ set(expected)
        odd |= {name for name, own in expected.items() if name in weights and differs(name, own)}
        if odd:
            raise ValueError(
                f"weights_ of another network cannot be assigned: {sorted(odd)[:5]} differ."
            )
        try:
            self._set_fitted({name: weights.pop(name) for name in arrays})
            self._load(weights)
            self._check_learned()
        except BaseException as error:
            self._set_fitted(arrays)
            self._load(network)
            if not isinstance(error, Exception):
                raise
            raise ValueError(f"weights_ cannot be assigned: {error}") from error

    def _load(self, weights: dict[str, np.ndarray]) -> None:
        state = {name: torch.tensor(value) for name, value in weights.items()}
        self.net_.module_.load_state_dict(state)
        self.net_.module_.eval()

    def __getstate__(self) -> dict[str, Any]:
        """Parameters, scalars and arrays: no tensor, no device, nothing that skops cannot audit."""
        state = super().__getstate__()
        if "net_" in state:
            state = {k: v for k, v in state.items() if k != "net_"}
            state["_weights"] = self._network_weights()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild the network, on whatever device this machine has."""
        state = dict(state)
        weights = state.pop("_weights", None)
        super().__setstate__(state)
        if weights is None:
            return
        device = resolve_device(self.device, fall_back=True)
        with seeded(0, device):
            self.net_ = self._make_net(device, pretrained=False)
        self._load(weights)
        self.net_.history_ = History(getattr(self, "history_", []))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        tags.input_tags.three_d_array = True
        tags.transformer_tags.preserves_dtype = []
        return tags


# Any fitted estimator of the package can be the start of another one.
BaseImageEstimator._parameter_constraints["backbone"].append(BaseImageEstimator)


def check_answer(answer: np.ndarray, shape: tuple[int, int]) -> None:
    """Refuse an answer for blank input that has another shape or is not finite."""
    if answer.shape != shape or not np.isfinite(answer).all():
        raise ValueError(f"its answer for blank input has shape {answer.shape}, or is not finite.")


@contextmanager
def _all_or_nothing(estimator: BaseEstimator) -> Iterator[None]:
    """Give an estimator its fitted attributes back if the block fails."""

    def fitted() -> dict[str, Any]:
        names = [k for k in vars(estimator) if k.endswith("_") and not k.startswith("_")]
        return {name: vars(estimator)[name] for name in names}

    before = fitted()
    try:
        yield
    except BaseException:
        for name in fitted():
            delattr(estimator, name)
        vars(estimator).update(before)
        raise


def _mixed(seed: int, n_epochs: int) -> int:
    """Another seed for training that goes on after `n_epochs`."""
    return int(np.random.SeedSequence([seed, n_epochs]).generate_state(1)[0] % 2**31)
