"""What label-free encoders share: views of images, objectives, monitors, the life of a fit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from sklearn.base import _fit_context, clone
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.utils import check_consistent_length, column_or_1d
from sklearn.utils._param_validation import HasMethods, Interval
from sklearn.utils.multiclass import type_of_target
from skorch.callbacks import Callback
from torch import nn

from sklearn_medimb.augment import resolve_augmentation
from sklearn_medimb.backbones import as_features
from sklearn_medimb.base._image_estimator import BaseImageEstimator, Stage, TrainingSet
from sklearn_medimb._data.batches import Batches, n_batches, shuffled
from sklearn_medimb._training.momentum import follow
from sklearn_medimb._training.net import Trunk
from sklearn_medimb._data.rows import missing_entries

PRETRAINING = "pre-training"

# ---------------------------------------------------------------- views


@dataclass
class Views:
    """Which views a step needs: pairs (image, augmentation) for the online and the target branch.

    Image 0 is the anchor; 1, where it occurs, is a partner drawn uniformly, with replacement and
    without regard to labels, from all training images.
    """

    online: list[tuple[int, Any]]
    target: list[tuple[int, Any]]

    @property
    def n_images(self) -> int:
        """Images that meet in one view set."""
        return 1 + max(image for image, _ in self.online + self.target)


class ViewBatches:
    """Batches of views: per step B anchors, each view stacked along the first axis.

    Images are augmented; of feature vectors a share of the entries is taken from other rows [1]_.

    References
    ----------
    .. [1] D. Bahri et al., "SCARF: self-supervised contrastive learning using random feature
       corruption", ICLR 2022.
    """

    corrupted = 0.3

    def __init__(self, batches: Batches, views: Views) -> None:
        self.batches = batches
        self.views = views

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        batches, n = self.batches, len(self.batches.rows)
        n_partners = self.views.n_images - 1
        for anchors in batches.plan(batches.rng):
            size = (n_partners, len(anchors))
            picks = np.concatenate([anchors, batches.rng.integers(n, size=size).ravel()])
            images, targets = batches.gather(picks)
            parts = images.chunk(1 + n_partners)
            branches = {
                name: batches.preprocess.normalise(
                    torch.cat([self._view(parts[image], how) for image, how in views])
                )
                for name, views in vars(self.views).items()
                if views
            }
            yield branches, targets[: len(anchors)]

    def _view(self, images: torch.Tensor, augmentation: Any) -> torch.Tensor:
        if images.ndim > 2 or getattr(augmentation, "is_identity", False):
            return self.batches.view(images, augmentation)
        draw: dict[str, Any] = {"generator": self.batches.generator, "device": images.device}
        other = images[torch.randperm(len(images), **draw)]
        return torch.where(torch.rand(images.shape, **draw) < self.corrupted, other, images)


# ---------------------------------------------------------------- objectives


def perceptron(widths: list[int], *, last_norm: bool, affine: bool = True) -> nn.Sequential:
    """Linear layers with batch normalisation and ReLU between them.

    Parameters
    ----------
    widths : list of int
        Of the input and of each layer.
    last_norm, affine : bool
        Whether normalisation follows the last layer too, and has scale and shift there.
    """
    layers: list[nn.Module] = []
    for i, (n_in, n_out) in enumerate(pairwise(widths), 2):
        is_last = i == len(widths)
        layers.append(nn.Linear(n_in, n_out, bias=is_last and not last_norm))
        if not is_last:
            layers += [nn.BatchNorm1d(n_out), nn.ReLU()]
        elif last_norm:
            layers.append(nn.BatchNorm1d(n_out, affine=affine))
    return nn.Sequential(*layers)


class Encoded(NamedTuple):
    """Features (B, d) of each online view; the images of each target view as they came."""

    features: list[torch.Tensor]
    target: list[torch.Tensor]


def encode(
    network: Any, branches: dict[str, torch.Tensor], n_online: int, n_target: int
) -> Encoded:
    """Forward pass of pre-training: of any network of the package only the backbone.

    Each view passes alone, so that batch normalisation sees one kind of view at a time.
    """
    online = branches["online"].chunk(n_online)
    target = branches["target"].chunk(n_target) if n_target else ()
    return Encoded([as_features(network.trunk(view)) for view in online], list(target))


class Objective(nn.Module):
    """A self-supervised loss; owns what only training needs.

    The online views pass the network one by one, or `jointly`, as a method's authors have them.

    Parameters
    ----------
    network : nn.Module
        Has the backbone as `trunk`.
    projector : nn.Module
        From features to the space of the loss.
    momentum : float or None, default=None
        m of the target branch, ``k <- m k + (1 - m) q`` before each forward pass, parameters only;
        None has no target branch.
    """

    jointly = False

    def __init__(self, network: Any, projector: nn.Module, momentum: float | None = None) -> None:
        super().__init__()
        self.projector = projector
        self.momentum = momentum
        self.terms: dict[str, torch.Tensor] = {}
        if momentum is not None:
            online = {"trunk": network.trunk, "projector": projector}
            self.target = nn.ModuleDict({k: copy.deepcopy(v) for k, v in online.items()})
            self.target.requires_grad_(False)

    def project_target(self, images: torch.Tensor) -> torch.Tensor:
        """Projections of a target view: no gradient, batch statistics of its own."""
        with torch.no_grad():
            return self.target["projector"](as_features(self.target["trunk"](images)))

    def complaints(self) -> list[str]:
        """What the user should know about the training that was."""
        return []

    def update_target(self, network: Any) -> None:
        """Move the target branch."""
        if self.momentum is None:
            return
        follow(self.target["trunk"], network.trunk, 1 - self.momentum)
        follow(self.target["projector"], self.projector, 1 - self.momentum)


class UpdateTarget(Callback):
    """Move the target branch at the start of each step, with the weights that the step sees."""

    may_stop = False

    def on_batch_begin(self, net: Any, **kwargs: Any) -> None:
        """Average."""
        net.criterion_.update_target(net.module_)


# ---------------------------------------------------------------- monitors


def feature_std(features: np.ndarray) -> float:
    """Spread of unit-length features: 1 where they fill the sphere evenly, 0 where they collapsed.

    The mean over dimensions of the standard deviation, times the root of their number [1]_.

    Parameters
    ----------
    features : ndarray of shape (n, d)
        Features.

    References
    ----------
    .. [1] X. Chen, K. He, "Exploring simple Siamese representation learning", CVPR 2021, fig. 2.
    """
    length = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.where(length > 0, length, 1)
    return float(unit.std(axis=0).mean() * np.sqrt(features.shape[1]))


def effective_rank(features: np.ndarray) -> float:
    """Number of directions in which features vary: exp of the entropy of the singular values [1]_.

    Parameters
    ----------
    features : ndarray of shape (n, d)
        Features; they are centred first.

    References
    ----------
    .. [1] O. Roy, M. Vetterli, "The effective rank: a measure of effective dimensionality",
       EUSIPCO 2007.
    """
    centred = features - features.mean(axis=0)
    values = np.linalg.svd(centred, compute_uv=False)
    total = values.sum()
    if not total > 0:
        return 0.0
    share = values[values > 0] / total
    return float(np.exp(-(share * np.log(share)).sum()))


def knn_score(features: np.ndarray, y: np.ndarray, n_neighbors: int = 1) -> float:
    """Balanced accuracy of each row's class among its nearest other rows, by cosine.

    Parameters
    ----------
    features : ndarray of shape (n, d)
        Features.
    y : ndarray of int of shape (n,)
        Classes.
    n_neighbors : int, default=1
        Neighbours, at most n - 1. More than one would outvote classes of few rows.
    """
    probe = KNeighborsClassifier(min(n_neighbors, len(y) - 1), metric="cosine").fit(features, y)
    return float(balanced_accuracy_score(y, probe.predict(None)))


class Monitor(Callback):
    """Watch the features of some training images after each epoch; training never sees it.

    Parameters
    ----------
    embed : callable
        Row numbers to features.
    y : ndarray of int of shape (n,)
        Class of each row, -1 where unknown: with two classes or more there is a kNN score.
    n_epochs : int
        Of the training; of more than 100, about a hundred are looked at, and the last one.
    """

    may_stop = False
    n_rows = 256
    n_probed = 1000

    def __init__(
        self, embed: Callable[[np.ndarray], np.ndarray], y: np.ndarray, n_epochs: int
    ) -> None:
        self.embed = embed
        self.every = -(-n_epochs // 100)
        self.rows = _evenly(np.arange(len(y)), self.n_rows)
        known = np.flatnonzero(y >= 0)
        known = known[np.argsort(y[known], kind="stable")]
        self.probed = _evenly(known, self.n_probed)
        self.y = y
        if len(np.unique(y[self.probed])) < 2:
            self.probed = self.probed[:0]

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        """Look, at most about a hundred times."""
        if len(net.history) % self.every == 0:
            self.look(net)

    def on_train_end(self, net: Any, **kwargs: Any) -> None:
        """Look at what has become of the features; warn where it is nothing."""
        if not len(net.history):
            return
        if "feature_std" not in net.history[-1]:
            self.look(net)
        messages = net.criterion_.complaints()
        spread, rank = net.history[-1, ("feature_std", "effective_rank")]
        # Three images span two directions at most, whatever was learned.
        if spread < 0.01 or (rank < 1.2 and len(self.rows) > 3):
            messages.append(
                f"The features have all but collapsed (feature_std={spread:.3g}, "
                f"effective_rank={rank:.3g}): lower lr, or choose other views."
            )
        for message in messages:
            warnings.warn(message, stacklevel=2)

    def look(self, net: Any) -> None:
        """Record `feature_std`, `effective_rank`, and `knn_score` where classes are known."""
        features = self.embed(np.concatenate([self.rows, self.probed]))
        watched, probed = np.split(features, [len(self.rows)])
        net.history.record("feature_std", feature_std(watched))
        net.history.record("effective_rank", effective_rank(watched))
        if len(probed):
            net.history.record("knn_score", knn_score(probed, self.y[self.probed]))


def _evenly(rows: np.ndarray, n: int) -> np.ndarray:
    """At most n of the rows, evenly spaced."""
    return rows if len(rows) <= n else rows[np.linspace(0, len(rows) - 1, n).astype(int)]


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


class BaseImageEncoder(BaseImageEstimator):
    """Common ground of the label-free encoders: transformers of images into features.

    A method supplies its loss (`_objective`) and the views it needs (`_view_set`).
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **BaseImageEstimator._parameter_constraints,
        "batch_size": [Interval(Integral, 2, None, closed="left")],
        "augment": [str, HasMethods(["draw", "apply"]), tuple],
        "projection_dim": [Interval(Integral, 1, None, closed="left")],
    }

    # Where max_epochs="auto": steps to aim at, and the least number of epochs.
    _auto_steps, _auto_epochs = 600, 20

    # ---------------------------------------------------------------- what a method supplies

    def _objective(self, network: nn.Module, n_features: int) -> Objective:
        raise NotImplementedError

    def _view_set(self) -> Views:
        raise NotImplementedError

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any = None) -> BaseImageEncoder:
        """Train the encoder.

        Parameters
        ----------
        X : array-like, lazy sequence or torch Dataset of n images
            Images in any layout of the package's README, uint8 or float; at least 2.
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
    def partial_fit(self, X: Any, y: Any = None) -> BaseImageEncoder:
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
        images = self._read(X, reset=fresh)
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

    def _n_epochs(self, n_samples: int) -> int:
        """Epochs to train; "auto" gives small sets enough steps."""
        if self.max_epochs != "auto":
            return self.max_epochs
        n_steps = self._auto_steps if len(self.image_shape_) > 1 else self._auto_steps // 3
        return max(self._auto_epochs, -(-n_steps // self._steps_per_epoch(n_samples)))

    def _stages(self, train: TrainingSet, n_epochs: int, **common: Any) -> list[Stage]:
        if not self.net_.module_.trunk.learns:
            raise ValueError(
                f"There is nothing to train for {type(self).__name__}: all parameters of backbone "
                "are frozen (requires_grad=False)."
            )
        stage = self.pretraining(self, train, n_epochs, **common)
        last = self.net_.last_criterion
        if last is not None and _shapes(last) == _shapes(stage.criterion.state_dict()):
            stage.criterion.load_state_dict(last)  # further training goes on from its projector
        return [stage]

    def pretraining(
        self,
        owner: BaseImageEstimator,
        train: TrainingSet,
        n_epochs: int | None = None,
        **common: Any,
    ) -> Stage:
        """Course of label-free training of an estimator's backbone.

        Parameters
        ----------
        owner : estimator
            Whose network is trained: this encoder, or a classifier that starts with it.
        train : TrainingSet
            Its natural rows and its unlabelled ones are used; classes are for the kNN score alone.
        n_epochs : int or None, default=None
            None takes this encoder's own `max_epochs`.
        **common
            Preprocessing and generators of the fit.

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
            **common,
        )
        width = as_features(net.module_.trunk.probe()).shape[1]
        objective = self._objective(net.module_, width).to(net.device, net.dtype)
        views = self._view_set()
        n_online = 1 if objective.jointly else len(views.online)

        def embed(which: np.ndarray) -> np.ndarray:
            def forward(images: torch.Tensor) -> torch.Tensor:
                return as_features(net.module_.trunk(images))

            return owner._map(natural.images, forward, rows[which]).double().cpu().numpy()

        self.image_shape_, params = owner.image_shape_, self._net_params()
        n_epochs = self._n_epochs(n) if n_epochs is None else n_epochs
        return Stage(
            objective,
            ViewBatches(batches, views),
            n_epochs,
            self._steps_per_epoch(n),
            self.lr,
            self.lr_schedule,
            PRETRAINING,
            callbacks=(UpdateTarget(), Monitor(embed, y, n_epochs)),
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
    y = column_or_1d(y, warn=True)
    check_consistent_length(images.data, y)
    known = ~missing
    known[known] = y[known] != -1
    labels = np.asarray(y[known].tolist()) if y.dtype == object else y[known]
    codes = unknown.copy()
    try:  # labels that are no classes are left alone: they would not be used anyway
        finite = labels.dtype.kind != "f" or np.isfinite(labels).all()
        if len(labels) and finite and type_of_target(labels) in ("binary", "multiclass"):
            codes[known] = np.unique(labels, return_inverse=True)[1]
    except (TypeError, ValueError):
        return unknown
    return codes


def _shapes(state: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, "shape", None) for name, value in state.items()}


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
