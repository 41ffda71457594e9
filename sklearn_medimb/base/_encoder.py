"""What label-free encoders add to the common ground: views, objectives, monitors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.base import _fit_context, clone
from sklearn.utils import check_consistent_length
from sklearn.utils._param_validation import HasMethods
from sklearn.utils.multiclass import type_of_target
from torch import nn

from sklearn_medimb._data.batches import Batches, Context
from sklearn_medimb._data.labels import is_mark, label_column
from sklearn_medimb._data.plans import n_batches, shuffled
from sklearn_medimb._data.rows import missing_entries
from sklearn_medimb._parameters import integers, learned, parameter
from sklearn_medimb._training.monitors import Monitor
from sklearn_medimb._training.network import Trunk
from sklearn_medimb._training.objectives import Objective, encode
from sklearn_medimb._training.stage import Stage, TrainingSet
from sklearn_medimb._training.views import ViewBatches, Views
from sklearn_medimb.augment import resolve_augmentation
from sklearn_medimb.backbones import as_features
from sklearn_medimb.base._image_estimator import BaseImageEstimator, Fit

if TYPE_CHECKING:
    from typing import Self

PRETRAINING = "pre-training"


# ---------------------------------------------------------------- the estimator


class EncoderNetwork(nn.Module):
    """A backbone and nothing else."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk
        self.n_features = as_features(trunk.probe()).shape[1]

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Embedding of shape (n, n_features)."""
        return as_features(self.trunk(images))

    forward = features


class BaseImageEncoder(BaseImageEstimator, without=["memory"]):
    """Common ground of the label-free encoders: transformers of images into features.

    A method supplies its loss (`_objective`) and the views it needs (`_view_set`).

    Parameters
    ----------
    projection_dim
        Size of the projections.
    max_epochs
        Passes over the training images. "auto" aims at 600 steps, and at least 20 epochs.
    batch_size
        Anchors per step.
    augment
        Hard views; a pair gives the two kinds of a method that has two. "contrastive" flips both
        ways. Of feature vectors a view has three in ten entries from other rows.

    Attributes
    ----------
    history_
        Per epoch: number, seconds (``dur``), ``train_loss`` and further ``train_<term>``, the
        collapse monitors ``feature_std`` (1: features fill the sphere, 0: collapsed) and
        ``effective_rank``, and with labels ``knn_score``.
    """

    projection_dim: int = parameter(integers(1), default=128, search=(64, 512, "log"))
    batch_size: int = parameter(integers(2), default=128, search=(32, 256, "log"))
    weight_decay: Any = 1e-4
    augment: Any = parameter(
        str,
        HasMethods(["draw", "apply"]),
        tuple,
        default="contrastive",
        kind="str, Augmentation or a pair of these",
        search=["strong", "contrastive", "mimv"],
    )

    history_: list[dict[str, Any]] = learned("list of dict")

    # Where max_epochs="auto": steps to aim at, and the least number of epochs.
    _auto_steps, _auto_epochs = 600, 20

    # ---------------------------------------------------------------- what a method supplies

    def _objective(self, network: nn.Module, n_features: int) -> Objective:
        raise NotImplementedError

    def _view_set(self) -> Views:
        raise NotImplementedError

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any = None) -> Self:
        """Train the encoder.

        Parameters
        ----------
        X : array-like, lazy sequence or torch Dataset of n images
            Images in any layout of the package's guide, uint8 or float; at least 2.
        y : array-like of shape (n,), default=None
            Not used for training. Where it holds classes (-1 for unknown ones), the history has
            the balanced accuracy of a nearest-neighbour probe.

        Returns
        -------
        self : encoder
            The fitted encoder.

        Raises
        ------
        ValueError
            If the input is wrong or ambiguous; the message names the parameter or row to mend.
        """
        return self._fit(X, y)

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any = None) -> Self:
        """Train one more epoch on the given images, at a constant learning rate.

        Parameters
        ----------
        X : array-like, lazy sequence or torch Dataset of n images
            A portion of the images. The first portion decides the normalisation.
        y : array-like of shape (n,), default=None
            As in ``fit``.

        Returns
        -------
        self : encoder
            The encoder so far.
        """
        return self._fit(X, y, partial=True)

    # ---------------------------------------------------------------- training

    def _check_parameters(self) -> None:
        super()._check_parameters()
        self._augmentations()
        if self.fine_tune in ("frozen", "head_first"):
            raise ValueError(
                f"fine_tune={self.fine_tune!r} leaves {type(self).__name__} nothing to train: it "
                'has no head. Choose "full", or a number of stages.'
            )

    def _chosen_fine_tuning(self, fit: Fit) -> str | int:
        return "full" if self.fine_tune == "auto" else self.fine_tune

    def _augmentations(self) -> tuple[Any, Any]:
        """The two kinds of hard view."""
        given = self.augment if isinstance(self.augment, tuple) else (self.augment,) * 2
        if len(given) != 2:
            raise ValueError(
                f"augment holds {len(given)} augmentations: give one, or a pair of them."
            )
        first, second = (resolve_augmentation(augment) for augment in given)
        return first, second

    def _views(self) -> tuple[Any, ...]:
        return ()  # each method draws its own

    def _check_training(  # type: ignore[override]
        self, X: Any, y: Any, *, fresh: bool
    ) -> tuple[TrainingSet, np.ndarray | None]:
        images = self._read(X, reset=fresh).in_memory()
        if len(images) < 2:
            raise ValueError(
                f"{type(self).__name__} needs at least 2 images to tell apart, but found 1 sample: "
                "n_samples=1."
            )
        if fresh:
            self.image_shape_ = images.image_shape
            self.n_samples_fit_ = len(images)
        return TrainingSet(images, np.arange(len(images)), _codes(y, images)), None

    def _make_network(self, trunk: Callable[..., Trunk]) -> nn.Module:
        return EncoderNetwork(trunk())

    def _steps_per_epoch(self, n_samples: int) -> int:
        return n_batches(n_samples, self.batch_size, at_least=2)

    def _images_per_step(self, n_samples: int) -> int:
        views = self._view_set()
        n_views = len(views.online) + len(views.target)
        return n_views * min(self.batch_size, n_samples)

    def _n_epochs(self, n_samples: int, *, on_encoded: bool = False) -> int:
        """Epochs to train; "auto" gives small sets enough steps."""
        if self.max_epochs != "auto":
            return self.max_epochs
        n_steps = self._auto_steps if len(self.image_shape_) > 1 else self._auto_steps // 3
        return max(self._auto_epochs, -(-n_steps // self._steps_per_epoch(n_samples)))

    def _stages(self, train: TrainingSet, n_epochs: int, context: Context) -> list[Stage]:
        if not self.net_.module_.trunk.learns:
            raise ValueError(
                f"There is nothing to train for {type(self).__name__}: all parameters of backbone "
                "are frozen (requires_grad=False)."
            )
        return [self.pretraining(self, train, context, n_epochs)]

    def pretraining(
        self,
        owner: BaseImageEstimator,
        train: TrainingSet,
        context: Context,
        n_epochs: int | None = None,
    ) -> Stage:
        """Course of label-free training of an estimator's backbone.

        Parameters
        ----------
        owner : estimator
            Whose network is trained: this encoder, or a classifier that starts with it.
        train : TrainingSet
            Its natural rows and its unlabelled ones are used; classes are for the kNN score alone.
        context : Context
            Preprocessing and generators of the fit.
        n_epochs : int or None, default=None
            None takes this encoder's own `max_epochs`.

        Returns
        -------
        stage : Stage
            To be run on the owner's net.
        """
        net = owner.net_
        natural = train if train.natural is None else train.natural
        rows, y = train.without_labels()
        n = len(rows)
        batches = Batches(
            natural.images,
            rows,
            torch.zeros(n, device=net.device),
            lambda rng: shuffled(n, self.batch_size, rng, at_least=2),
            context,
        )
        width = as_features(net.module_.trunk.probe()).shape[1]
        objective = self._objective(net.module_, width).to(net.device, net.dtype)
        views = self._view_set()
        n_online = 1 if objective.jointly else len(views.online)

        def embed(which: np.ndarray) -> np.ndarray:
            def forward(images: torch.Tensor) -> torch.Tensor:
                return as_features(net.module_.trunk(images))

            return owner._map(natural.images, forward, rows[which]).double().cpu().numpy()

        self.image_shape_ = owner.image_shape_
        params = self._net_params()
        n_epochs = self._n_epochs(n) if n_epochs is None else n_epochs
        return self._stage(
            objective,
            ViewBatches(batches, views),
            n_epochs,
            self._steps_per_epoch(n),
            name=PRETRAINING,
            backbone_lr=self._share_of_rate(owner._has_known_start),
            callbacks=(Monitor(embed, y, n_epochs),),
            forward=partial(encode, n_online=n_online, n_target=len(views.target)),
            optimizer={k: v for k, v in params.items() if k.split("__")[0] == "optimizer"},
            validated=False,
        )


def _codes(y: Any, images: Any) -> np.ndarray:
    """Classes for the kNN score; -1 everywhere where `y` holds none."""
    unknown = np.full(len(images), -1)
    if y is None:
        return unknown
    missing = missing_entries(y)
    y = label_column(y, warn=True)
    check_consistent_length(images.data, y)
    known = ~missing
    known[known] = ~is_mark(y[known])
    labels = np.asarray(y[known].tolist()) if y.dtype == object else y[known]
    codes = unknown.copy()
    try:  # labels that are no classes are left alone: they would not be used anyway
        finite = labels.dtype.kind != "f" or np.isfinite(labels).all()
        if len(labels) and finite and type_of_target(labels) in ("binary", "multiclass"):
            codes[known] = np.unique(labels, return_inverse=True)[1]
    except (TypeError, ValueError):
        return unknown
    return codes


# ---------------------------------------------------------------- by name

#: Encoders by the name that ``pretrain=`` takes; each method adds its own.
ENCODERS: dict[str, Callable[[], BaseImageEncoder]] = {}


def resolve_encoder(pretrain: Any) -> BaseImageEncoder:
    """Turn what a user may pass as `pretrain` into an encoder.

    Parameters
    ----------
    pretrain : str or encoder
        A name of ``ENCODERS`` or an encoder, whose parameters are taken and which is not changed.

    Returns
    -------
    encoder : BaseImageEncoder
        Not fitted.
    """
    if isinstance(pretrain, str):
        if pretrain not in ENCODERS:
            raise ValueError(
                f"pretrain={pretrain!r} is unknown; the names are {', '.join(sorted(ENCODERS))}."
            )
        return ENCODERS[pretrain]()
    encoder = clone(pretrain)
    encoder._validate_params()
    encoder._check_parameters()
    return encoder
