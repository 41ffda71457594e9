"""The life of one fit, shared by every estimator of the package that trains a network."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import nn

from sklearn_medimb._data.batches import Context, Untouched
from sklearn_medimb._data.cached import CachedImages
from sklearn_medimb._data.files import ImageFiles
from sklearn_medimb._data.images import Images, channel_statistics, check_pixel_range, read_images
from sklearn_medimb._data.pixel_scale import UNIT_MAX
from sklearn_medimb._data.plans import n_batches
from sklearn_medimb._data.resize import resolve_size
from sklearn_medimb._machine import distributed
from sklearn_medimb._machine.fitted import all_or_nothing
from sklearn_medimb._machine.gpu_queue import ALL_MEMORY, waiting_for_memory
from sklearn_medimb._machine.graphs import can_replay
from sklearn_medimb._machine.randomness import Draws, drawing_from, make_generator, redirected
from sklearn_medimb._machine.runtime import (
    in_blocks,
    inference_block,
    is_out_of_memory,
    one_thread_in_workers,
    resolve_device,
)
from sklearn_medimb._training.callbacks import BestEpoch, SklearnCallbacks, resolve_callbacks
from sklearn_medimb._training.checkpoint import Checkpoint, data_digest, fingerprint
from sklearn_medimb._training.criterion import Criterion
from sklearn_medimb._training.memory import Recall, remembering, resolve_memory
from sklearn_medimb._training.net import Net
from sklearn_medimb._training.network import Standardised, passing
from sklearn_medimb._training.stage import Stage, TrainingSet
from sklearn_medimb.augment import resolve_augmentation, symmetries
from sklearn_medimb.backbones import classifier_head
from sklearn_medimb.base._course import Trains

# Pixels of training images that a CPU tunes a network of elsewhere on in about ten minutes.
_MOST_TUNED = 500 * 224**2


@dataclass
class Fit:
    """One call of ``fit`` under way."""

    X: Any
    y: Any
    partial: bool
    previous: Net | None
    data: TrainingSet
    groups: np.ndarray | None
    device: torch.device
    checkpoint: Checkpoint | None
    rng: np.random.Generator
    generator: torch.Generator
    draws: Draws


def stages_trained(fine_tune: Any) -> int | None:
    """How many stages at the end of a backbone learn, by `fine_tune`; None: all that may."""
    return None if isinstance(fine_tune, str) else int(fine_tune)


class BaseImageEstimator(Trains):
    """Common ground of classifiers and encoders: training, embedding, persistence.

    A kind of estimator says what its training data are (`_check_training`, `_training_rows`), a
    method supplies its network (`_make_network`) and lists its courses of training (`_stages`).
    What only training needs belongs to the criterion: its parameters are trained, and it is gone
    afterwards.
    """

    # ---------------------------------------------------------------- what a method supplies

    # Of what is trained on a backbone with weights of elsewhere, while that stays as it is: weight
    # decay, and how many times as many steps.
    _decay_when_held: float | None = None
    _patience_when_held = 1

    # Whether a head that was tuned with its backbone, on augmented images, is trained once more on
    # images as they are: these are another distribution.
    _ends_with_head = False

    def _stages(self, train: TrainingSet, n_epochs: int, context: Context) -> list[Stage]:
        """Courses of training, one after another on the same network."""
        raise NotImplementedError

    def _steps_per_epoch(self, n_samples: int) -> int:
        """Batches of an epoch, for the schedule of the learning rate."""
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

    def _pretraining(self, train: TrainingSet, context: Context) -> list[Stage]:
        """Courses of training before the method's own, on a fresh network."""
        return []

    def _n_epochs(self, n_samples: int, *, on_encoded: bool = False) -> int:
        raise NotImplementedError

    def _doubts(self, train: TrainingSet) -> str | None:
        """What a caller should know of how well training ended."""
        return None

    # ---------------------------------------------------------------- one fit

    def _fit(self, X: Any, y: Any = None, *, partial: bool = False, **given: Any) -> Any:
        """Validate, split, resample, build, train, and keep what inference needs."""
        with all_or_nothing(self), one_thread_in_workers():
            fit = self._prepare(X, y, partial, given)
            with drawing_from(fit.draws), ExitStack() as memory:
                with redirected():  # initial weights, of networks from outside too
                    train, stages, best = self._build(fit, memory)
                self._run(fit, train, stages, best)
                doubts = None if partial else self._doubts(train)
        if doubts is not None:  # said when nothing can be lost
            warnings.warn(doubts, ConvergenceWarning, stacklevel=4)
        return self

    def _prepare(self, X: Any, y: Any, partial: bool, given: dict[str, Any]) -> Fit:
        """Validate everything, find an earlier state of the same fit, choose the seed."""
        self._check_parameters()
        if isinstance(self.backbone, nn.Module) and (head := classifier_head(self.backbone)):
            warnings.warn(
                f"backbone={type(self.backbone).__name__} ends in a classifier, {head}, whose "
                f"scores are no features: take it off first (backbone.{head} = "
                "torch.nn.Identity()).",
                stacklevel=5,
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
        self.random_seed_ = seed
        sources = np.random.default_rng(seed), make_generator(seed, device), Draws(seed, device)
        return Fit(X, y, partial, previous, data, groups, device, checkpoint, *sources)

    def _build(
        self, fit: Fit, memory: ExitStack
    ) -> tuple[TrainingSet, list[Stage], BestEpoch | None]:
        """Split the rows, make the net and the stages; wait for memory on the device."""
        fresh = fit.previous is None
        chosen = self._chosen_fine_tuning(fit)
        self.fine_tune_ = chosen if isinstance(chosen, str) else int(chosen)  # also of NumPy
        train, held = self._training_rows(fit.data, fit.groups, fit.rng, fit.partial)
        if fresh:
            self._normalise(train)
        self.net_ = self._make_net(fit.device, fit.previous)
        trunk = self.net_.module_.trunk
        trunk.keeps_statistics = self._has_known_start
        trunk.hold(stages_trained(self.fine_tune_))
        if distributed.world_size() == 1:  # a launcher has given the others their GPUs
            memory.enter_context(
                waiting_for_memory(fit.device, lambda: self._training_bytes(train))
            )
        context = Context(self._preprocessor(), self._views(), fit.rng, fit.generator)
        stages = self._pretraining(train, context) if self._begins(fit) else []
        own, train = self._own_stages(fit, train, context, stages)
        if fit.partial:
            own = [replace(own[0], lr_schedule="constant"), *own[1:]]
        if self.net_.last_criterion is not None:
            for stage in own:
                stage.criterion.go_on(self.net_.last_criterion)
        return train, stages + own, self._best_epoch(fit.X, fit.y, held, train)

    def _own_stages(
        self, fit: Fit, train: TrainingSet, context: Context, before: list[Stage]
    ) -> tuple[list[Stage], TrainingSet]:
        """Courses of the method: on what the frozen backbone makes of images, on these, or both.

        With them comes the training set of the last one. What the backbone makes of images is
        looked at when it will not change any more, after the courses `before`.
        """
        n, n_epochs = len(train.rows), 1 if fit.partial else self._n_epochs(len(train.rows))
        on_encoded = self.fine_tune_ in ("frozen", "head_first")
        encoded = self._encoded(train) if on_encoded else train
        others = self._decay_of_held if self._holds_backbone else {}
        if self._holds_backbone and fit.previous is None:
            settle = partial(self._standardise, encoded)
            if before:
                before[-1] = replace(before[-1], after=settle)
            else:
                settle()
        if not on_encoded:
            return self._averaging(self._stages(train, n_epochs, context), **others), train
        frozen = replace(context, preprocess=Untouched(context.preprocess))
        if self.fine_tune_ == "head_first":
            n_epochs = self._n_epochs(n, on_encoded=True)
        with self.net_.module_.trunk.wholly_held():
            first = self._stages(encoded, n_epochs, frozen)
        first = [replace(stage, on_encoded=True, **others) for stage in first]
        if self.fine_tune_ == "frozen":
            return first, encoded
        first = [
            replace(stage, name=f"head, {stage.name}".rstrip(", "), validated=False)
            for stage in first
        ]
        tuned = self._averaging(self._stages(train, self._n_epochs(n), context))
        last = self._head_again(train, tuned, n_epochs, frozen)
        return first + tuned + last, train

    def _head_again(
        self, train: TrainingSet, tuned: list[Stage], n_epochs: int, context: Context
    ) -> list[Stage]:
        """Courses of the head alone after those that `tuned` everything, on images as they are."""
        if not self._ends_with_head or not self._has_known_start or self._holds_backbone:
            return []
        encoded = self._encoded(train, recalled=False)  # by the tuned backbone, when it is asked
        if isinstance(self.net_.module_.head, nn.Linear):
            tuned[-1] = replace(tuned[-1], after=partial(self._standardise, encoded))
        with self.net_.module_.trunk.wholly_held():
            stages = self._stages(encoded, self._patience_when_held * n_epochs, context)
        how = {"name": "head again", "on_encoded": True, "validated": False}
        return [replace(stage, **(self._decay_of_held | how)) for stage in stages]

    @property
    def _decay_of_held(self) -> dict[str, Any]:
        """Weight decay of a head on weights of elsewhere that stay, where nobody chose another."""
        chosen = self.weight_decay != "auto" or self.net_params
        return {} if chosen else {"weight_decay": self._decay_when_held}

    def _standardise(self, train: TrainingSet) -> None:
        """Let the network standardise its features as those of the training images are spread.

        What a linear head makes of them stays the same.
        """
        module = self.net_.module_
        scale = getattr(module, "scale", None)
        if not isinstance(scale, Standardised):
            return
        features = self._map_views(train.images, module.features, train.rows)
        scale.settle(features.flatten(0, 1))
        head = module.head
        if isinstance(head, nn.Linear):
            with torch.no_grad():
                head.bias.add_(head.weight @ scale.mean)
                head.weight.mul_(scale.deviation)

    def _averaging(self, stages: list[Stage], **others: Any) -> list[Stage]:
        """Have the weights averaged where a backbone with weights of elsewhere is tuned."""
        if self.ema == "auto" and self._has_known_start and not self._holds_backbone:
            others["ema"] = 0.98
        return [replace(stage, **others) for stage in stages]

    def _encoded(self, train: TrainingSet, recalled: bool = True) -> TrainingSet:
        """Give the same images as the backbone, which will not change, leaves them.

        Where it is one that other fits have too, what it made of them before may be `recalled`.
        """
        images = self._encoded_images(train.images, train.all_rows, recalled=recalled)
        natural = train.natural
        if natural is not None:
            known = images if natural.images is train.images else None
            encoded = self._encoded_images(natural.images, natural.all_rows, known, recalled)
            natural = replace(natural, images=encoded)
        return replace(train, images=images, natural=natural)

    def _encoded_images(
        self,
        images: Images,
        rows: np.ndarray,
        known: CachedImages | None = None,
        recalled: bool = True,
    ) -> CachedImages:
        """Give some rows of images as the backbone leaves them; those that are known are there."""
        encode = partial(self._encode_once, images, recalled=recalled)
        return CachedImages(images, rows, encode, self.n_views_, known)

    def _encode_once(
        self, images: Images, rows: np.ndarray | None = None, recalled: bool = True
    ) -> torch.Tensor:
        """Let the backbone encode images in each view, or recall what it made of them before."""
        module, recall = self.net_.module_, None
        encode = getattr(module, "encoded", module.trunk)
        if recalled and self.memory is not None:
            how = self._preprocessor(), self._symmetries()
            recall = remembering(self.memory, module, encode, *how)
        return self._map_views(images, encode, rows, recall)

    def _symmetries(self) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        """Views of an image that predictions average."""
        n = self.n_views
        if n == "auto":
            n = 4 if self._has_known_start else 1
        augment = self.augment[0] if isinstance(self.augment, tuple) else self.augment
        return symmetries(resolve_augmentation(augment), self.image_shape_, n)

    @property
    def n_views_(self) -> int:
        """Views of an image that predictions average."""
        return len(self._symmetries())

    def _begins(self, fit: Fit) -> bool:
        """Whether this fit begins with weights that no fit has trained, and trains them."""
        return fit.previous is None and not fit.partial and self.net_.module_.trunk.learns

    def _run(
        self, fit: Fit, train: TrainingSet, stages: list[Stage], best: BestEpoch | None
    ) -> None:
        """Train, and keep what inference needs."""
        if fit.checkpoint is not None:
            fit.checkpoint.attach(
                seed=self.random_seed_, rng=fit.rng, generator=fit.generator, draws=fit.draws
            )
        reporter, optimizer = None, None
        if not fit.partial and hasattr(self, "_init_callback_context"):
            reporter = SklearnCallbacks(self, fit.X, fit.y, partial(self._state_so_far, train))
        if fit.partial and fit.previous is not None:
            optimizer = fit.previous.optimizer_state("constant")
        with self._settling(stages, train) if self._begins(fit) else nullcontext():
            self._train(stages, best, fit.checkpoint, reporter, optimizer)
        train.images.conclude()
        self._set_fitted(self._inference_state(train))
        if reporter is not None:
            reporter.finish()
        if fit.checkpoint is not None and self.net_.complete:
            fit.checkpoint.remove()

    def _state_so_far(self, train: TrainingSet) -> dict[str, Any]:
        """What inference would need now."""
        state = self._inference_state(train)
        if not self.net_.module_.trunk.given_encoded:  # it may go on learning
            train.forget()
        return state

    def _check_parameters(self) -> None:
        """Refuse what `_parameter_constraints` cannot express."""
        if isinstance(self.fine_tune, bool):
            raise ValueError(
                f"fine_tune={self.fine_tune} says too little: choose one of "
                '"auto", "full", "head_first", "frozen", or a number of stages.'
            )
        resolve_size(self.image_size)
        resolve_callbacks(self.callbacks, self)
        resolve_memory(self.memory)
        start = self._start
        if start is not None and not start._was_fitted:
            name = type(start).__name__
            raise ValueError(
                f"backbone={name}(...) is not fitted: fit it first. To pre-train on the images of "
                f"this fit, pass an encoder as pretrain={name}(...)."
            )

    def _continues(self, partial: bool) -> bool:
        """Whether this call goes on from the present weights."""
        return self.__sklearn_is_fitted__() and (partial or self.warm_start)

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
        if can_replay(torch.device(self.net_.device)):  # recorded steps have memory of their own
            activations, weights = 2 * activations, weights + weights // 5
        return resident + 5 * weights + activations

    def _most_images(self, train: TrainingSet) -> int:
        """Images of a step of the most demanding stage."""
        return self._images_per_step(len(train.rows))

    def _given_statistics(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean and deviation by which channels are normalised, where the images do not say it."""
        how, peak = self.normalize, self.pixel_range_
        on_unit_scale = peak == "uint8" or (isinstance(peak, float) and peak <= UNIT_MAX)
        if how == "auto":
            start = self._known_start if on_unit_scale else None
            how = "data" if start is None or start.mean is None else (start.mean, start.std)
        if how == "data":
            return None
        if not on_unit_scale:
            raise ValueError(
                f"normalize={how!r} is for uint8 and floats in [0, 1], but X goes up to "
                f'{self.pixel_range_:g}: bring X to that scale, or leave normalize="auto".'
            )
        return channel_pair(IMAGENET if how == "imagenet" else how, self.image_shape_[0])

    def _chosen_fine_tuning(self, fit: Fit) -> str | int:
        """How the backbone is trained, with "auto" resolved."""
        chosen = self.fine_tune
        if chosen == "auto" and self._has_known_start:
            n_pixels = self.n_samples_fit_ * math.prod(self.image_shape_[1:])
            in_minutes = fit.device.type == "cuda" or n_pixels <= _MOST_TUNED
            tuned = in_minutes and self._recipe.gains_from_tuning
            chosen = "head_first" if tuned else "frozen"
        elif chosen == "auto":
            chosen = "full"
        if chosen == "head_first" and (fit.partial or fit.previous is not None):
            return "full"  # the head is there
        return chosen

    def _normalise(self, train: TrainingSet) -> None:
        """Set the channel statistics: of the training rows, of a start, or those given."""
        start = self._start
        if start is None:
            mean, std = channel_statistics(
                train.images,
                train.rows,
                train.weight,
                block=inference_block(train.images.image_shape, torch.device("cpu")),
            )
            if self.pixel_range_ is None:
                self.pixel_range_ = train.images.peak
            self.pixel_mean_, self.pixel_std_ = self._given_statistics() or (mean, std)
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
        self.pixel_mean_ = start.pixel_mean_.copy()
        self.pixel_std_ = start.pixel_std_.copy()
        if self.pixel_range_ is None:
            self.pixel_range_ = 1.0 if start.pixel_range_ == "uint8" else start.pixel_range_

    def _stage(
        self, criterion: Criterion, batches: Any, n_epochs: int, n_steps: int, **others: Any
    ) -> Stage:
        """Course of training at the rates of the constructor."""
        rates = {
            "lr": self.lr,
            "lr_schedule": self.lr_schedule,
            "backbone_lr": self._backbone_share,
            "layer_decay": self.layer_decay,
            "ema": None if self.ema == "auto" else self.ema,
        }
        return Stage(criterion, batches, n_epochs, n_steps, **{**rates, **others})

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
            image_size=self.image_size,
        )
        if reset:
            self.input_shape_ = images.layout.shape
            files = images.data if isinstance(images.data, ImageFiles) else None
            self.file_options_ = None if files is None else files.options
        check_pixel_range(self, images, reset=reset)
        return images

    def _map(
        self,
        images: Images,
        forward: Callable[[torch.Tensor], Any],
        rows: np.ndarray | None = None,
        recall: Recall | None = None,
    ) -> Any:
        """Apply `forward` to images, in evaluation mode and in blocks; stays on the device.

        It gives a tensor with a row for each image, or a tuple of such tensors. Where `recall`
        knows what it gave for a block, it is not asked.
        """
        module, prepare = self.net_.module_, self._preprocessor()
        encoded = isinstance(images, CachedImages)
        if encoded:
            prepare = Untouched(prepare)
        module.eval()
        block = inference_block(images.image_shape, prepare.device)
        rows = np.arange(len(images)) if rows is None else rows
        n = len(rows)
        if len(images.image_shape) == 1:
            # Matrix products of other sizes round otherwise: with whole blocks only, the result
            # for one row of vectors does not depend on the rows beside it.
            rows = np.pad(rows, (0, -n % block), mode="edge")

        def compute(part: slice) -> Any:
            pixels = images.rows(rows[part])
            if recall is None:
                return forward(prepare(pixels))
            return recall(pixels, lambda: forward(prepare(pixels)))

        with torch.inference_mode(), one_thread_in_workers(), passing(module, encoded):
            result = in_blocks(len(rows), block, compute)
        images.conclude()
        parts = result if isinstance(result, tuple) else (result,)
        parts = tuple(part[:n] for part in parts)
        for part in parts:
            self._refuse_non_finite(part, rows)
        return parts if isinstance(result, tuple) else parts[0]

    def _map_views(
        self,
        images: Images,
        forward: Callable[[torch.Tensor], Any],
        rows: np.ndarray | None = None,
        recall: Recall | None = None,
    ) -> Any:
        """Apply `forward` to each view that predictions average; images are read once for all.

        As `_map`, with an axis of views after the first one.
        """
        if isinstance(images, CachedImages):
            parts = [images.in_view(k) for k in range(images.n_views)]
            return _stacked([self._map(part, forward, rows) for part in parts])
        views = self._symmetries()
        return self._map(
            images, lambda batch: _stacked([forward(view(batch)) for view in views]), rows, recall
        )

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
        features = self._map_views(self._read(X), self.net_.module_.features)
        return features.mean(dim=1).cpu().numpy()

    @property
    def backbone_(self) -> nn.Module:
        """Copy of the trained backbone, on the CPU."""
        check_is_fitted(self)
        return copy.deepcopy(self.net_.module_.trunk.backbone).cpu().eval()

    @property
    def _n_features_out(self) -> int:
        return self.net_.module_.n_features

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        tags.input_tags.three_d_array = True
        tags.transformer_tags.preserves_dtype = []
        return tags


def _stacked(views: list[Any]) -> Any:
    """What a function gives for each view, a tensor or a tuple of them, along axis 1."""
    if isinstance(views[0], tuple):
        return tuple(torch.stack(parts, dim=1) for parts in zip(*views, strict=True))
    return torch.stack(views, dim=1)


# Of ImageNet's training images, red, green and blue.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def channel_pair(given: Any, n_channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each channel; gray images have the mean of those of red, green, blue.

    Parameters
    ----------
    given : pair of float or of sequences of float
        Mean and standard deviation.
    n_channels : int
        Channels of the images.
    """
    try:
        mean, std = (np.atleast_1d(np.asarray(part, dtype=np.float64)) for part in given)
        if n_channels == 1 and len(mean) == 3:
            mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)
        if np.ptp(mean) == 0 == np.ptp(std):
            mean, std = mean[:1], std[:1]
        mean, std = (np.broadcast_to(part, n_channels).copy() for part in (mean, std))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"normalize={given!r} must be a mean and a standard deviation, one or one per channel, "
            f"of which there are {n_channels}."
        ) from error
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise ValueError(f"normalize={given!r} must be finite, with standard deviations above 0.")
    return mean, std


def _mixed(seed: int, n_epochs: int) -> int:
    """Another seed for training that goes on after `n_epochs`."""
    return int(np.random.SeedSequence([seed, n_epochs]).generate_state(1)[0] % 2**31)
