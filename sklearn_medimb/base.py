"""The life of one fit, shared by every classifier of the package."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.special import softmax
from sklearn.base import (
    BaseEstimator,
    ClassifierMixin,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    clone,
)
from sklearn.metrics import check_scoring, get_scorer_names
from sklearn.utils import _safe_indexing, check_consistent_length, check_random_state, column_or_1d
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, assert_all_finite, check_is_fitted
from skorch.callbacks import Callback
from skorch.history import History
from torch import nn

from sklearn_medimb.augment import resolve_augmentation
from sklearn_medimb.backbones import Backbone, make_backbone
from sklearn_medimb.batches import Batches, Preprocessor
from sklearn_medimb.callbacks import (
    BestEpoch,
    ProgressBar,
    SaveCheckpoint,
    SklearnCallbacks,
    StopWhenAsked,
)
from sklearn_medimb.checkpoint import Checkpoint, fingerprint, plain
from sklearn_medimb.images import (
    INPUT_CONSTRAINTS,
    Images,
    channel_statistics,
    check_pixel_range,
    read_images,
)
from sklearn_medimb.net import SCHEDULES, Net, Trunk
from sklearn_medimb.rows import group_codes, resample, validation_split
from sklearn_medimb.runtime import (
    inference_block,
    one_thread_in_workers,
    resolve_device,
    resolve_precision,
    seeded,
)

try:
    from sklearn.callback import CallbackSupportMixin
except ImportError:  # scikit-learn < 1.9

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stand-in: this scikit-learn has no callbacks."""


# What the estimator decides about its skorch net; everything else may come in `net_params`.
_RESERVED = {
    "module", "criterion", "lr", "max_epochs", "callbacks", "train_split", "device", "compile",
    "dataset", "iterator_train", "iterator_valid", "warm_start", "verbose", "batch_size",
    "predict_nonlinearity", "optimizer__lr",
}  # fmt: skip


@dataclass
class Stage:
    """One course of training: what is minimised, on which batches, for how long."""

    criterion: nn.Module
    batches: Iterable[Any]
    n_epochs: int
    steps_per_epoch: int
    lr: float
    lr_schedule: str
    name: str = ""
    callbacks: tuple[Callback, ...] = ()


@dataclass
class TrainingSet:
    """Validated training data: row numbers into `images`, with one class and weight per row.

    `origin` has their row numbers among the caller's images, -1 for those that a sampler made; None
    where these are `rows`. `natural` is the set as it was before the sampler.
    """

    images: Images
    rows: np.ndarray
    y: np.ndarray
    weight: np.ndarray | None = None
    origin: np.ndarray | None = None
    natural: TrainingSet | None = None

    def class_mass(self, n_classes: int) -> np.ndarray:
        """Summed weight of each class, shape (n_classes,).

        A class that this portion lacks, which only partial_fit and warm starts allow, counts as
        one sample: no prior, weight or margin may become infinite.
        """
        mass = np.bincount(self.y, self.weight, minlength=n_classes).astype(np.float64)
        return np.where(mass > 0, mass, 1.0)

    def label_mass(self, n_classes: int) -> np.ndarray:
        """One-hot label of each row times its weight, shape (n, n_classes)."""
        mass = np.eye(n_classes)[self.y]
        return mass if self.weight is None else mass * self.weight[:, None]


class BaseImageClassifier(
    CallbackSupportMixin,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    ClassifierMixin,
    BaseEstimator,
):
    """Common ground of the image classifiers: validation, training, inference, persistence.

    A method supplies its network (`_make_network`), its loss (`_make_criterion`), its batches
    (`_make_batches`) and its class scores (`_scores`); one that trains in several stages lists them
    (`_stages`). What only training needs belongs to the criterion: its parameters are trained, and
    it is gone afterwards.
    """

    net_: Net
    classes_: np.ndarray
    image_shape_: tuple[int, ...]

    _doc_link_module = "sklearn_medimb"
    _doc_link_template = "https://sklearn-medimb.readthedocs.io/{estimator_module}.{estimator_name}"

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "backbone": [str, nn.Module, Backbone, type],
        "max_epochs": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "lr": [Interval(Real, 0, None, closed="neither")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "lr_schedule": [StrOptions(set(SCHEDULES))],
        "augment": [str, None, HasMethods(["draw", "apply"])],
        "sampler": [None, HasMethods(["fit_resample"])],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "scoring": [StrOptions(set(get_scorer_names())), callable],
        "callbacks": [None, list],
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

    def _make_criterion(self, train: TrainingSet, n_steps: int) -> nn.Module:
        raise NotImplementedError

    def _make_batches(self, train: TrainingSet, **common: Any) -> Batches:
        raise NotImplementedError

    def _steps_per_epoch(self, n_samples: int) -> int:
        raise NotImplementedError

    def _stages(self, train: TrainingSet, n_epochs: int, **common: Any) -> list[Stage]:
        """Courses of training, one after another on the same network."""
        n_steps = self._steps_per_epoch(len(train.rows))
        return [
            Stage(
                self._make_criterion(train, n_epochs * n_steps),
                self._make_batches(train, **common),
                n_epochs,
                n_steps,
                self.lr,
                self.lr_schedule,
            )
        ]

    def _scores(self, images: Images) -> np.ndarray:
        """Log-scale class scores, shape (n, n_classes): their softmax is `predict_proba`."""
        raise NotImplementedError

    def _inference_state(self, train: TrainingSet) -> dict[str, Any]:
        """Fitted attributes, beyond the network, that prediction needs; made from it."""
        return {}

    def _optimizer_groups(self) -> list[tuple[str, dict[str, Any]]]:
        """Parameter groups for the optimiser, as skorch's ``optimizer__param_groups``."""
        return []

    # ---------------------------------------------------------------- one fit

    def _check_parameters(self) -> None:
        """Refuse what `_parameter_constraints` cannot express."""
        if isinstance(self.sampler, type):
            raise TypeError(
                f"sampler={self.sampler.__name__} is a class: pass an instance, "
                f"{self.sampler.__name__}()."
            )

    def _fit(
        self,
        X: Any,
        y: Any,
        *,
        sample_weight: Any = None,
        groups: Any = None,
        classes: Any = None,
        partial: bool = False,
    ) -> Any:
        """Validate, split, resample, build, train, and keep what prediction needs."""
        with _all_or_nothing(self), one_thread_in_workers():
            self._check_parameters()
            previous = self.net_ if self._continues(partial) else None
            fresh = previous is None
            data, groups = self._check_training(X, y, sample_weight, groups, classes, fresh)
            device = resolve_device(self.device)

            checkpoint = None
            if self.checkpoint_dir is not None and not partial:
                start = {} if fresh else self._network_weights()
                token = fingerprint(self, device, start, data.images, data.y, data.weight, groups)
                checkpoint = Checkpoint(self.checkpoint_dir, token).open()
            seed = int(check_random_state(self.random_state).randint(2**31 - 1))
            if checkpoint is not None and checkpoint.seed is not None:
                seed = checkpoint.seed
            elif previous is not None:  # further training must not repeat the first one's draws
                seed = _mixed(seed, len(previous.history))
            rng = np.random.default_rng(seed)
            generator = torch.Generator(device).manual_seed(seed)
            self.random_seed_ = seed

            with seeded(seed, device):
                train, held = self._training_rows(data, groups, rng, partial)
                if fresh:
                    self.pixel_mean_, self.pixel_std_ = channel_statistics(
                        train.images,
                        train.rows,
                        train.weight,
                        block=inference_block(train.images.image_shape, torch.device("cpu")),
                    )
                self.net_ = self._make_net(device, previous)
                stages = self._stages(
                    train,
                    1 if partial else self._n_epochs(len(train.rows)),
                    preprocess=self._preprocessor(),
                    views=(resolve_augmentation(self.augment),),
                    rng=rng,
                    generator=generator,
                )
                if partial:
                    stages[0].lr_schedule = "constant"
                score = None if held is None else self._validation_score(X, y, held, train)
                best = None if score is None else BestEpoch(score, self.n_iter_no_change)
                if checkpoint is not None:
                    checkpoint.attach(seed=seed, rng=rng, generator=generator)
                reporter = None
                if not partial and hasattr(self, "_init_callback_context"):
                    reporter = SklearnCallbacks(self, X, y, lambda: self._inference_state(train))
                optimizer = previous.optimizer_state("constant") if partial and previous else None
                self._train(stages, best, checkpoint, reporter, optimizer)
                self._set_fitted(self._inference_state(train))
                if checkpoint is not None and self.net_.complete:
                    checkpoint.remove()
                if reporter is not None:
                    reporter.finish()
        return self

    def _train(
        self,
        stages: list[Stage],
        best: BestEpoch | None,
        checkpoint: Checkpoint | None,
        reporter: SklearnCallbacks | None,
        optimizer: dict[str, Any] | None,
    ) -> None:
        """Run the stages, with everything around their epochs."""
        net, stop = self.net_, StopWhenAsked([cb for cb in (best, reporter) if cb is not None])
        first = 0 if checkpoint is None else checkpoint.stage
        if reporter is not None:
            reporter.begin(sum(stage.n_epochs for stage in stages))
        for number, stage in enumerate(stages[first:], first):
            net.stage = stage.name
            net.criterion_ = stage.criterion.to(net.device, net.dtype)
            net.start_schedule(stage.lr_schedule, stage.n_epochs * stage.steps_per_epoch, stage.lr)
            if optimizer is not None:
                net.optimizer_.load_state_dict(optimizer)
            if best is not None:
                best.n_stale = 0
            n_left = stage.n_epochs
            if checkpoint is not None:
                n_left -= checkpoint.begin_stage(number, net, best)
            if best is not None and best.wants_to_stop:  # it crashed after its last epoch
                n_left = 0
            callbacks: list[Callback | None] = [
                best,
                *stage.callbacks,
                None if checkpoint is None else SaveCheckpoint(checkpoint, best),
                reporter,
            ]
            if self.verbose:
                label = f"{type(self).__name__} {stage.name}".rstrip()
                callbacks.append(ProgressBar(label, n_left * stage.steps_per_epoch))
            net.run(stage.batches, n_left, [cb for cb in callbacks if cb is not None], stop)
            if best is not None:
                best.restore(net)
                self.best_score_ = best.best_score
            if not net.complete or (reporter is not None and reporter.wants_to_stop):
                break
        net.module_.eval()
        self.history_ = [plain(row) for row in net.history]
        self.n_iter_ = len(self.history_)

    def _training_rows(
        self,
        data: TrainingSet,
        groups: np.ndarray | None,
        rng: np.random.Generator,
        partial: bool,
    ) -> tuple[TrainingSet, np.ndarray | None]:
        """Hold out the validation rows, then, and only then, resample the others."""
        train, held = data, None
        if self.early_stopping and not partial:
            kept, held = validation_split(data.y, self.validation_fraction, groups, rng)
            weight = None if data.weight is None else data.weight[kept]
            groups = None if groups is None else groups[kept]
            train = TrainingSet(data.images, data.rows[kept], data.y[kept], weight)
            held = data.rows[held]
        if self.sampler is not None:
            seed = int(rng.integers(2**31 - 1))
            parts = (train.images, train.rows, train.y, train.weight)
            drawn = resample(self.sampler, *parts, seed, classes=self.classes_, groups=groups)
            train = TrainingSet(*drawn, natural=train)
        if train.weight is not None:  # the scale of weights carries no meaning
            train.weight = train.weight * (len(train.weight) / train.weight.sum())
        return train, held

    def _validation_score(
        self, X: Any, y: Any, held: np.ndarray, train: TrainingSet
    ) -> Callable[[], float]:
        """Score of the network as it is now, on the held-out rows."""
        X_held, y_held = _safe_indexing(X, held), _safe_indexing(y, held)
        scorer = check_scoring(self, self.scoring)

        def score() -> float:
            self._set_fitted(self._inference_state(train))
            with warnings.catch_warnings():  # a class with one sample is never held out
                warnings.filterwarnings("ignore", "y_pred contains classes not in y_true")
                value = float(scorer(self, X_held, y_held))
            if np.isnan(value):
                raise ValueError(
                    f"scoring={self.scoring!r} gave NaN on the {len(y_held)} validation images: "
                    "choose another scorer, or raise validation_fraction."
                )
            return value

        return score

    def _continues(self, partial: bool) -> bool:
        """Whether this call goes on from the present weights."""
        return self.__sklearn_is_fitted__() and (partial or self.warm_start)

    def _check_training(
        self, X: Any, y: Any, sample_weight: Any, groups: Any, classes: Any, fresh: bool
    ) -> tuple[TrainingSet, np.ndarray | None]:
        """Turn the caller's arguments into a training set; set the attributes they decide."""
        images = self._read(X, reset=fresh)
        if y is None:
            raise ValueError(
                f"This {type(self).__name__} estimator requires y to be passed, but the target y "
                "is None."
            )
        y = column_or_1d(y, warn=True)
        try:
            if y.dtype.kind in "fO":
                assert_all_finite(y, input_name="y")
            check_classification_targets(y)
            np.unique(y)
        except TypeError as error:
            raise ValueError(
                f"y must hold labels of one kind, numbers or strings: {error}"
            ) from error
        check_consistent_length(images.data, y)
        rows = np.arange(len(images))
        if groups is not None:
            groups = group_codes(groups, y)
        if sample_weight is not None:
            sample_weight = _check_sample_weight(
                sample_weight, y, dtype=np.float64, ensure_non_negative=True
            )
            rows = np.flatnonzero(sample_weight)  # rows of weight 0 are as if absent
            if not len(rows):
                raise ValueError("Every sample_weight is zero.")
            y, sample_weight = y[rows], sample_weight[rows]
            groups = None if groups is None else groups[rows]

        known = np.unique(y if classes is None else classes)
        if fresh:
            if len(known) < 2:
                raise ValueError(
                    f"{type(self).__name__} needs samples of at least 2 classes in y, but found "
                    f"{len(known)} class: {known.tolist()}."
                )
            self.classes_ = known
            self.image_shape_ = images.image_shape
            self.n_samples_fit_ = len(rows)
        odd = np.setdiff1d(np.concatenate([known, np.unique(y)]), self.classes_)
        if len(odd):
            raise ValueError(
                f"y holds classes {odd.tolist()} that are not among {self.classes_.tolist()}: fit "
                "anew (warm_start=False), or pass every class in the first call of partial_fit "
                "(classes=...)."
            )
        encoded = np.searchsorted(self.classes_, y)
        if fresh:
            self.class_counts_ = np.bincount(encoded, minlength=len(self.classes_))
        return TrainingSet(images, rows, encoded, sample_weight), groups

    def _set_fitted(self, attributes: dict[str, Any]) -> None:
        for name, value in attributes.items():
            setattr(self, name, value)

    # ---------------------------------------------------------------- the network

    def _make_net(
        self, device: torch.device, previous: Net | None = None, *, pretrained: bool = True
    ) -> Net:
        """Make the skorch net: network, optimiser, callbacks.

        A previous net passes on a copy of its network and its history, so that it stays as it was
        should training fail.
        """
        dtype, autocast = resolve_precision(self.precision, device, len(self.image_shape_))
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
        callbacks = [clone(cb, safe=False) for cb in self.callbacks or []]
        if odd := [cb for cb in callbacks if not isinstance(cb, Callback)]:
            raise TypeError(f"callbacks must hold instances of skorch.callbacks.Callback: {odd}.")
        if previous is None:
            module = self._network(device, dtype, pretrained)
        else:
            module = copy.deepcopy(previous.module_).to(device, dtype)
            module.trunk.autocast = autocast
        net = Net(
            module=module,
            criterion=nn.Identity(),  # the method's loss follows with the training set
            lr=self.lr,
            callbacks=callbacks or None,
            train_split=None,
            device=str(device),
            compile=self.compile,
            verbose=0,
            **params,
        )
        net.dtype = dtype
        net.initialize()
        if previous is not None:
            net.history_ = copy.deepcopy(previous.history_)
        return net

    def _network(self, device: torch.device, dtype: torch.dtype, pretrained: bool) -> nn.Module:
        """Make the method's module around the chosen backbone, on the device."""
        _, autocast = resolve_precision(self.precision, device, len(self.image_shape_))
        backbone = self.backbone
        if hasattr(backbone, "trunk"):
            raise ValueError(
                f"backbone={type(backbone).__name__} is a whole network of this package: pass the "
                "fitted estimator's backbone_."
            )
        if not pretrained and isinstance(backbone, Backbone):
            backbone = clone(backbone).set_params(weights=None)

        def trunk(input_shape: tuple[int, ...] = self.image_shape_) -> Trunk:
            module = make_backbone(backbone, input_shape, self.n_samples_fit_).cpu().float()
            return Trunk(module, input_shape, autocast=autocast)

        return self._make_network(trunk).to(device, dtype)

    def _preprocessor(self) -> Preprocessor:
        """Normalisation on the device of the network."""
        return Preprocessor(
            self.pixel_mean_,
            self.pixel_std_,
            dtype=self.net_.dtype,
            device=torch.device(self.net_.device),
            channels_last=len(self.image_shape_) > 2,
        )

    def _n_epochs(self, n_samples: int) -> int:
        """Epochs to train; "auto" gives small sets enough steps and large ones ten epochs."""
        if self.max_epochs != "auto":
            return self.max_epochs
        n_steps = 180 + 60 * min(len(self.classes_), 17)
        if len(self.image_shape_) == 1:  # an MLP on vectors settles sooner
            n_steps //= 3
        return max(10, -(-n_steps // self._steps_per_epoch(n_samples)))

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
        forward: Callable[[torch.Tensor], torch.Tensor],
        rows: np.ndarray | None = None,
    ) -> torch.Tensor:
        """Apply `forward` to images, in evaluation mode and in blocks; stays on the device."""
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
            parts = [
                forward(prepare(images.rows(rows[start : start + block])))
                for start in range(0, len(rows), block)
            ]
        return torch.cat(parts)[:n]

    def decision_function(self, X: Any) -> np.ndarray:
        """Class scores on a log scale.

        Parameters
        ----------
        X : array-like or lazy sequence of n images
            In any layout that ``fit`` accepts.

        Returns
        -------
        scores : ndarray of shape (n,) or (n, n_classes)
            Two classes: log-odds of ``classes_[1]``. They rank as `predict_proba`.
        """
        check_is_fitted(self)
        scores = self._scores(self._read(X))
        return scores[:, 1] - scores[:, 0] if len(self.classes_) == 2 else scores

    def predict_proba(self, X: Any) -> np.ndarray:
        """Class probabilities.

        Parameters
        ----------
        X : array-like or lazy sequence of n images
            In any layout that ``fit`` accepts.

        Returns
        -------
        proba : ndarray of shape (n, n_classes)
            Rows sum to 1; columns follow ``classes_``.
        """
        check_is_fitted(self)
        return softmax(self._scores(self._read(X)), axis=1)

    def predict(self, X: Any) -> np.ndarray:
        """Most probable class of each image.

        Parameters
        ----------
        X : array-like or lazy sequence of n images
            In any layout that ``fit`` accepts.

        Returns
        -------
        y : ndarray of shape (n,)
            Labels from ``classes_``.
        """
        check_is_fitted(self)
        return self.classes_[self._scores(self._read(X)).argmax(axis=1)]

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
        """Copy of the trained backbone; another estimator starts from it with ``backbone=``."""
        check_is_fitted(self)
        return copy.deepcopy(self.net_.module_.trunk.backbone).cpu().eval()

    @property
    def _n_features_out(self) -> int:
        return self.net_.module_.n_features

    # ---------------------------------------------------------------- persistence and tags

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "net_")

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
        expected = self._network_weights()
        # The bank of CSSN may hold another number of supports; everything else must fit.
        odd = set(weights) ^ (set(expected) | set(self._inference_arrays))
        odd |= {k for k in set(expected) & set(weights) if expected[k].shape != weights[k].shape}
        if odd:
            raise ValueError(
                f"weights_ of another network cannot be assigned: {sorted(odd)[:5]} differ."
            )
        self._set_fitted({name: weights.pop(name) for name in self._inference_arrays})
        self._load(weights)

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
