"""What classifiers add to the common ground: labels, validation, class scores."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import sklearn
import torch
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin, _fit_context
from sklearn.metrics import check_scoring, get_scorer_names
from sklearn.utils import _safe_indexing, check_consistent_length
from sklearn.utils._param_validation import HasMethods, StrOptions
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, assert_all_finite, check_is_fitted
from torch import nn

from sklearn_medimb._data.batches import Batches, Context
from sklearn_medimb._data.cached import CachedImages
from sklearn_medimb._data.files import wrap_dataset
from sklearn_medimb._data.images import Images
from sklearn_medimb._data.labels import read_labels, warn_of_marks
from sklearn_medimb._data.plans import Plan, shuffled
from sklearn_medimb._data.rows import (
    carries_groups,
    group_codes,
    resample,
    takes_groups,
    validation_split,
)
from sklearn_medimb._machine import distributed
from sklearn_medimb._parameters import integers, learned, parameter, within
from sklearn_medimb._training.callbacks import BestEpoch
from sklearn_medimb._training.criterion import Criterion
from sklearn_medimb._training.network import SoftmaxNetwork, Trunk
from sklearn_medimb._training.stage import Stage, TrainingSet
from sklearn_medimb.base._encoder import BaseImageEncoder, resolve_encoder
from sklearn_medimb.base._image_estimator import BaseImageEstimator, stages_trained
from sklearn_medimb.metrics import scorer_name, with_labels

if TYPE_CHECKING:
    from typing import Self


class _Guess(ClassifierMixin, BaseEstimator):
    """A fitted classifier that has learned nothing."""

    def __init__(self, classes: np.ndarray) -> None:
        self.classes_ = classes

    def predict(self, X: np.ndarray) -> np.ndarray:
        return np.resize(self.classes_, len(X))

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        scores = np.random.default_rng(0).random((len(X), len(self.classes_))) + 0.1
        return scores / scores.sum(axis=1, keepdims=True)

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        scores = self.predict_proba(X)
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores


def usual_steps(n_images: int, n_classes: int, n_axes: int) -> int:
    """Steps where nobody said how many epochs: by classes, or 40 passes in batches of 64.

    Without axes images are vectors, of which an MLP settles sooner.
    """
    n_steps = 180 + 60 * min(n_classes, 17)
    return max(n_steps, 5 * min(n_images, 5000) // 8) if n_axes else n_steps // 3


# Where nobody said how many, of everything where the backbone began with weights of elsewhere.
TUNING_EPOCHS = 15


# Training images that are looked at once the fit has ended, and how far from chance (0) to all of
# them (1) it should have come.
_N_LOOKED_AT = 256
_LEAST_FIT = 0.6


def mean_scores(scores: Sequence[torch.Tensor]) -> torch.Tensor:
    """Logarithms of the mean probabilities of several class scores (n, n_classes).

    A single one stays as it is.
    """
    if len(scores) == 1:
        return scores[0]
    log_p = torch.stack([part.log_softmax(dim=1) for part in scores])
    return log_p.logsumexp(dim=0) - math.log(len(scores))


class BaseImageClassifier(ClassifierMixin, BaseImageEstimator):
    """Common ground of the image classifiers.

    A method supplies its network (`_make_network`), its loss (`_make_criterion`), its batches
    (`_make_batches`) and its class scores (`_score_function`); one that trains in several stages
    lists them (`_stages`).

    Parameters
    ----------
    pretrain
        Label-free training of the backbone before the rest, on the same images: "amimv", "simclr",
        "moco", "byol", "simsiam", "barlow_twins", "vicreg", or an
        :class:`~sklearn_medimb.AMIMVEncoder` or :class:`~sklearn_medimb.SSLEncoder`, which lends
        its parameters (but for backbone, device and input); a fitted one is the start, as in
        `backbone`. Only a first ``fit`` pre-trains. It takes as long as the encoder's own
        `max_epochs` says, by default about 600 steps, often more than all the rest:
        ``pretrain=SSLEncoder("simclr", max_epochs=20)`` is shorter.
    sampler
        Resamples the training rows *after* the inner validation split.
    early_stopping
        Hold out a stratified validation split, stop when `scoring` no longer rises, and keep the
        best epoch's weights.
    validation_fraction
        Share of that split.
    n_iter_no_change
        Epochs without a rise before stopping.
    scoring
        scikit-learn scorer for early stopping.

    Attributes
    ----------
    classes_
        Class labels.
    class_counts_
        Images of each class given to the latest ``fit``, and to ``partial_fit`` since.
    split_seed_
        Seed of the validation split: further fits hold out what the first one did.
    best_score_
        Validation score of the epoch kept; only with early stopping. What follows that epoch, such
        as the head's last course of ``fine_tune="head_first"``, is not in it.
    """

    pretrain: Any = parameter(
        str, BaseImageEncoder, None, default=None, kind="str, encoder or None"
    )
    sampler: Any = parameter(
        None, HasMethods(["fit_resample"]), default=None, kind="imbalanced-learn sampler or None"
    )
    early_stopping: bool = parameter("boolean", default=False)
    validation_fraction: float = parameter(within(0, 1, closed="neither"), default=0.2)
    n_iter_no_change: int = parameter(integers(1), default=10)
    scoring: Any = parameter(
        StrOptions(set(get_scorer_names())),
        callable,
        default="balanced_accuracy",
        kind="str or callable",
    )

    classes_: np.ndarray = learned("ndarray of shape (n_classes,)")
    class_counts_: np.ndarray = learned("ndarray of int of shape (n_classes,)")
    split_seed_: int = learned("int")
    best_score_: float = learned("float")

    # Of a head on a backbone with weights of elsewhere that stays as it is: how many times as many
    # steps, which cost little on what it encoded once; and how much weight decay.
    _patience_when_held = 4
    _decay_when_held: float | None = 2.0

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, *, groups: Any = None) -> Self:
        """Train the classifier.

        Parameters
        ----------
        X : array-like or lazy sequence of n images
            Images in any layout of the package's guide, uint8 or float.
        y : array-like of shape (n,)
            Class labels: numbers or strings, at least two classes.
        groups : array-like of shape (n,), default=None
            Patient of each image: the inner validation split keeps every group whole.

        Returns
        -------
        self : estimator
            The fitted classifier.

        Raises
        ------
        ValueError
            If the input is wrong or ambiguous; the message names the parameter or row to mend.
        """
        return self._fit(X, y, groups=groups)

    # ---------------------------------------------------------------- what a method supplies

    def _make_network(self, trunk: Callable[..., Trunk]) -> nn.Module:
        """Backbone, pooled features, head."""
        known = self._has_known_start
        return SoftmaxNetwork(trunk(), self._make_head, at_all_depths=known, standardised=known)

    def _make_head(self, n_features: int) -> nn.Module:
        """From features to class scores."""
        return nn.Linear(n_features, len(self.classes_))

    def _make_criterion(self, train: TrainingSet, n_steps: int) -> Criterion:
        """What training minimises, in so many steps."""
        raise NotImplementedError

    def _make_batches(self, train: TrainingSet, context: Context) -> Any:
        """Batches of a stage; by default every training row once per epoch."""
        n = len(train.y)
        return self._label_batches(train, lambda rng: shuffled(n, self.batch_size, rng), context)

    def _label_batches(self, train: TrainingSet, plan: Plan, context: Context) -> Batches:
        """Batches by some plan; the target of a row is its one-hot label times its weight."""
        mass = torch.as_tensor(
            train.label_mass(len(self.classes_)), dtype=self.net_.dtype, device=self.net_.device
        )
        return Batches(train.images, train.rows, mass, plan, context)

    def _stages(self, train: TrainingSet, n_epochs: int, context: Context) -> list[Stage]:
        n_steps = self._steps_per_epoch(len(train.rows))
        criterion = self._make_criterion(train, n_epochs * n_steps)
        batches = self._make_batches(train, context)
        return [self._stage(criterion, batches, n_epochs, n_steps)]

    def _score_function(self, *, in_chunks: bool = True) -> Callable[[torch.Tensor], torch.Tensor]:
        """Map from normalised images (n, ...) to class scores (n, n_classes), in torch alone.

        Scores are on a log scale: their softmax is `predict_proba`. An exported graph runs it too,
        for any n: without chunks, whose number would depend on n.
        """
        module = self.net_.module_
        return lambda batch: module.head(module.features(batch))

    def _scores(self, images: Images, rows: np.ndarray | None = None) -> np.ndarray:
        """Class scores of images, or of some rows of them, shape (n, n_classes)."""
        scores = self._map_views(images, self._score_function(), rows)
        return mean_scores(scores.unbind(dim=1)).cpu().numpy().astype(np.float64)

    _validation: tuple[Any, CachedImages] | None = None  # while these images are scored

    def _scores_of(self, X: Any) -> np.ndarray:
        """Class scores of the images of a call; encoded ones may stand for them."""
        if self._validation is not None and X is self._validation[0]:
            return self._scores(self._validation[1])
        return self._scores(self._read(X))

    def _mean_score_function(
        self, *, in_chunks: bool = True
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Class scores whose softmax is the mean of those of all views."""
        views, forward = self._symmetries(), self._score_function(in_chunks=in_chunks)
        return lambda batch: mean_scores([forward(view(batch)) for view in views])

    def _sizes(self) -> dict[str, int]:
        return {**super()._sizes(), "n_classes": len(self.classes_)}

    def _answer(self, images: Images) -> tuple[np.ndarray, int]:
        return self._scores(images), len(self.classes_)

    def _doubts(self, train: TrainingSet) -> str | None:
        """Whether training images, a few of each class, are recognised: a sentence if not."""
        net, frozen = self.net_, self.fine_tune_ == "frozen"
        # How long to train is ours to judge only where it was left to us.
        ours = self.max_epochs == "auto" and net.complete and not net.stopped_by_callback
        classes = np.unique(train.y)
        if not ours or frozen or len(classes) < 2 or distributed.world_size() > 1:
            return None
        each = max(1, _N_LOOKED_AT // len(classes))
        some = [np.unique(train.rows[train.y == k])[:each] for k in classes]
        y = np.repeat(classes, [len(rows) for rows in some])
        right = self._scores(train.images, np.concatenate(some)).argmax(axis=1) == y
        recall, chance = np.mean([right[y == k].mean() for k in classes]), 1 / len(classes)
        if recall - chance >= _LEAST_FIT * (1 - chance):
            return None
        ways = [f"more epochs (max_epochs={2 * self._n_epochs(len(train.rows))})"]
        if self.augment not in (None, "none", "light"):
            ways.append('weaker augmentation (augment="light")')
        if not self._has_known_start:
            ways.append("a backbone that was trained elsewhere")
        return (
            f"{type(self).__name__} has not fitted its own training images (balanced accuracy "
            f"{recall:.2f} on {len(y)} of them; chance is {chance:.2f}). Where classes can be told "
            f"apart, what goes further is {', or '.join(ways)}."
        )

    # ---------------------------------------------------------------- training data

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if isinstance(self.sampler, type):
            raise TypeError(
                f"sampler={self.sampler.__name__} is a class: pass an instance, "
                f"{self.sampler.__name__}()."
            )
        if self.pretrain is not None and self._start is not self.pretrain:
            resolve_encoder(self.pretrain)

    def _pretrainer(self) -> BaseImageEncoder | None:
        """Encoder whose training on the images of this fit comes first."""
        if self.pretrain is None or self._start is self.pretrain:
            return None
        return resolve_encoder(self.pretrain)

    def _pretraining(self, train: TrainingSet, context: Context) -> list[Stage]:
        """Label-free pre-training of the backbone on the images that are about to be learned."""
        encoder = self._pretrainer()
        if encoder is None:
            return []
        stage, trunk = encoder.pretraining(self, train, context), self.net_.module_.trunk
        before, after = (
            partial(trunk.hold, stages_trained(how)) for how in (encoder.fine_tune, self.fine_tune_)
        )
        return [replace(stage, before=before, after=after)]

    def _most_images(self, train: TrainingSet) -> int:
        n_images, encoder = super()._most_images(train), self._pretrainer()
        if encoder is None:
            return n_images
        rows, _ = train.without_labels()
        return max(n_images, encoder._images_per_step(len(rows)))

    def _check_training(  # type: ignore[override]
        self,
        X: Any,
        y: Any,
        *,
        fresh: bool,
        sample_weight: Any = None,
        groups: Any = None,
        classes: Any = None,
    ) -> tuple[TrainingSet, np.ndarray | None]:
        images = self._read(X, reset=fresh).in_memory()
        if y is None:
            raise ValueError(
                f"This {type(self).__name__} estimator requires y to be passed, but the target y "
                "is None."
            )
        y = read_labels(y, advice=self._unlabelled_advice, mixed=self._takes_unlabelled, warn=True)
        check_consistent_length(images.data, y)
        if classes is not None:
            classes = read_labels(classes, name="classes")
        unlabelled = self._unlabelled(y)
        labelled = np.ones(len(y), dtype=bool) if unlabelled is None else ~unlabelled
        if unlabelled is None:
            warn_of_marks(type(self).__name__, y)
        try:
            if y.dtype.kind in "fO":
                assert_all_finite(y[labelled], input_name="y")
            check_classification_targets(y[labelled])
            np.unique(y[labelled])
        except TypeError as error:
            raise ValueError(
                f"y must hold labels of one kind, numbers or strings: {error}"
            ) from error
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

        unlabelled_groups = None
        if unlabelled is not None:
            unlabelled_groups = None if groups is None else groups[unlabelled]
            unlabelled = rows[unlabelled]
            rows, y = rows[labelled], y[labelled]
            groups = None if groups is None else groups[labelled]
            if y.dtype == object:  # mixed with the number -1 so far
                y = np.asarray(y.tolist())

        known = np.unique(y if classes is None else classes)
        if fresh:
            if len(known) < 2:
                raise ValueError(
                    f"{type(self).__name__} needs samples of at least 2 classes in y, but found "
                    f"{len(known)} class: {known.tolist()}."
                )
            self.classes_ = known
            self.image_shape_ = images.image_shape
            self.n_samples_fit_ = len(rows) + (0 if unlabelled is None else len(unlabelled))
        odd = np.setdiff1d(np.concatenate([known, np.unique(y)]), self.classes_)
        if len(odd):
            raise ValueError(
                f"y holds classes {odd.tolist()} that are not among {self.classes_.tolist()}: fit "
                "anew (warm_start=False), or pass every class in the first call of partial_fit "
                "(classes=...)."
            )
        encoded = np.searchsorted(self.classes_, y)
        return TrainingSet(
            images,
            rows,
            encoded,
            sample_weight,
            unlabelled=unlabelled,
            unlabelled_groups=unlabelled_groups,
        ), groups

    # Whether -1 says that an image has no label, beside labels of any kind.
    _takes_unlabelled = False

    # What to do with images that have no label.
    _unlabelled_advice = (
        "leave such images out, or give them the label -1 in AMIMVClassifier, which learns from "
        "unlabelled images too"
    )

    def _unlabelled(self, y: np.ndarray) -> np.ndarray | None:
        """Which rows have no label, for methods that learn from such."""
        return None

    def _holds_out(self) -> bool:
        """Whether epochs are chosen on validation rows."""
        return self.early_stopping

    def _training_rows(
        self,
        data: TrainingSet,
        groups: np.ndarray | None,
        rng: np.random.Generator,
        partial: bool,
    ) -> tuple[TrainingSet, np.ndarray | None]:
        """Hold out the validation rows, then, and only then, resample the others."""
        self.class_counts_ = np.bincount(data.y, minlength=len(self.classes_))
        train, held, split = data, None, rng
        if not self._continues(partial):
            self.split_seed_ = self.random_seed_
        elif (seed := getattr(self, "split_seed_", None)) is not None:  # older files lack it
            split = np.random.default_rng(seed)  # the rows that no earlier fit was trained on
        holds_out = self._holds_out() and not partial
        if groups is None:
            self._warn_of_known_groups(data.images, holds_out)
        if holds_out:
            kept, held = validation_split(data.y, self.validation_fraction, groups, split)
            weight = None if data.weight is None else data.weight[kept]
            unlabelled = data.unlabelled
            if groups is not None:
                if unlabelled is not None and data.unlabelled_groups is not None:
                    # Nor are their patients to be seen without labels.
                    unlabelled = unlabelled[~np.isin(data.unlabelled_groups, groups[held])]
                groups = groups[kept]
            train = replace(
                data,
                rows=data.rows[kept],
                y=data.y[kept],
                weight=weight,
                unlabelled=unlabelled,
                unlabelled_groups=None,
            )
            held = data.rows[held]
        if self.sampler is not None:
            seed = int(rng.integers(2**31 - 1))
            parts = (train.images, train.rows, train.y, train.weight)
            drawn = resample(self.sampler, *parts, seed, classes=self.classes_, groups=groups)
            train = TrainingSet(*drawn, natural=train)
        if train.weight is not None:  # the scale of weights carries no meaning
            train.weight = train.weight * (len(train.weight) / train.weight.sum())
        return train, held

    def _warn_of_known_groups(self, images: Images, holds_out: bool) -> None:
        """Warn where groups would have mattered and someone knows them, but `fit` got none.

        They are known where the images carry them, and where the user has asked that they be
        routed: then the caller forgot them, or routing is off.
        """
        risks = []
        if holds_out:
            risks.append("be on both sides of the validation split")
        if self.sampler is not None and takes_groups(self.sampler):
            risks.append("be mixed with one another")
        if not risks:
            return
        if carries_groups(images):
            why = "X carries them"
        elif self.get_metadata_routing().fit.requests.get("groups"):
            routed = sklearn.get_config()["enable_metadata_routing"]
            why = "its set_fit_request asks for them" + (
                "" if routed else ": metadata routing is off"
            )
        else:
            return
        warnings.warn(
            f"{type(self).__name__}.fit got no groups, although {why}. Images of a patient may "
            f"{' and '.join(risks)}. Pass fit(X, y, groups=...); through a search, call "
            "sklearn.set_config(enable_metadata_routing=True) and set_fit_request(groups=True) "
            "first.",
            stacklevel=2,
        )

    def _best_epoch(
        self, X: Any, y: Any, held: np.ndarray | None, train: TrainingSet
    ) -> BestEpoch | None:
        if held is None:
            return None
        return BestEpoch(self._validation_score(X, y, held, train), self.n_iter_no_change)

    def _validation_score(
        self, X: Any, y: Any, held: np.ndarray, train: TrainingSet
    ) -> Callable[[], float]:
        """Score of the network as it is now, on the held-out rows."""
        X_held, y_held = _safe_indexing(wrap_dataset(X), held), _safe_indexing(y, held)
        scorer = with_labels(check_scoring(self, self.scoring), self.classes_)
        if hasattr(scorer, "_score_func"):  # scikit-learn's: a guess shows what it asks of y
            self._check_scorer(scorer, y_held)
        encoded = None
        if self.fine_tune_ == "frozen":
            encoded = X_held, self._encoded_images(self._read(X_held), np.arange(len(held)))

        def score() -> float:
            self._set_fitted(self._inference_state(train))
            self._validation = encoded
            try:
                with warnings.catch_warnings():  # a class with one sample is never held out
                    warnings.filterwarnings("ignore", "y_pred contains classes not in y_true")
                    warnings.filterwarnings("ignore", "Only one class is present in y_true")
                    value = float(scorer(self, X_held, y_held))
            finally:
                del self._validation
            if np.isnan(value):
                raise self._cannot_score(y_held, "it gave NaN")
            return value

        return score

    def _check_scorer(self, scorer: Any, y_held: Any) -> None:
        """Refuse, before training, a scorer that the validation labels do not suffice for."""
        guess = _Guess(self.classes_)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = float(scorer(guess, np.zeros((len(y_held), 1)), y_held))
        except Exception as error:
            raise self._cannot_score(y_held, f"{error}") from error
        if np.isnan(value) and len(self._absent(y_held)):
            raise self._cannot_score(y_held, "it gives NaN")

    def _absent(self, y_held: Any) -> np.ndarray:
        """Classes without a validation image."""
        held = set(np.asarray(y_held).ravel().tolist())
        return np.array([label not in held for label in self.classes_.tolist()]).nonzero()[0]

    def _cannot_score(self, y_held: Any, why: str) -> ValueError:
        absent = self._absent(y_held)
        lacking = ", ".join(f"{self.classes_[k]!s} (of {self.class_counts_[k]})" for k in absent)
        where = f", which lack the classes {lacking}" if len(absent) else ""
        more = ", or give more images of these classes" if len(absent) else ""
        name = scorer_name(self.scoring).removeprefix("scoring=")
        return ValueError(
            f"scoring={name} cannot be computed on the {len(y_held)} "
            f"validation images{where}: choose another scorer, raise validation_fraction{more}. "
            f"({why})"
        )

    def _n_epochs(self, n_samples: int, *, on_encoded: bool = False) -> int:
        """Epochs to train; "auto" gives small sets enough steps and large ones ten epochs."""
        if self.max_epochs != "auto" and not (on_encoded and self.fine_tune_ == "head_first"):
            return self.max_epochs
        if self._has_known_start and not on_encoded and not self._holds_backbone:
            return TUNING_EPOCHS
        held = self._holds_backbone
        n_axes, n_classes = len(self.image_shape_) - 1, len(self.classes_)
        n_steps = usual_steps(0 if held else n_samples, n_classes, n_axes)
        n_steps *= self._patience_when_held if held else 1
        return max(10, -(-n_steps // self._steps_per_epoch(n_samples)))

    # ---------------------------------------------------------------- inference

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
        scores = self._scores_of(X)
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
        return softmax(self._scores_of(X), axis=1)

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
        return self.classes_[self._scores_of(X).argmax(axis=1)]
