"""What two-stage classifiers share: a network trained as the data are, then a rebalanced head."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.utils.validation import check_is_fitted

from sklearn_medimb import losses
from sklearn_medimb._data.batches import Context
from sklearn_medimb._data.images import Images
from sklearn_medimb._data.rows import known_labels
from sklearn_medimb._machine.fitted import all_or_nothing
from sklearn_medimb._machine.runtime import one_thread_in_workers
from sklearn_medimb._parameters import learned, one_of, parameter
from sklearn_medimb._training.criterion import Criterion, LabelCriterion
from sklearn_medimb._training.stage import TrainingSet
from sklearn_medimb.base._classifier import BaseImageClassifier, mean_scores
from sklearn_medimb.losses import LabelLoss, class_weights, of_unit_mean
from sklearn_medimb.rebalance import HEADS, RebalancedHead, resolve_head

STAGE_ONE, STAGE_TWO = "stage one", "stage two"


class TwoStageClassifier(BaseImageClassifier):
    """A network in stage one, a rebalanced head on its frozen features in stage two.

    A method supplies stage one (`_make_criterion`, `_make_batches`, or `_stages`). The head is made
    from the features of the training rows, un-augmented and in evaluation mode: nothing of the
    network changes. Where validation rows decide on the epoch, they are scored with a head too.

    Parameters
    ----------
    class_weight
        Weights of the classes in the cross-entropy of stage one, by their ratios; a dict also
        weighs them in stage two, where a head that takes weights is fitted anew.

    Attributes
    ----------
    head_
        Head of stage two, on features as `transform` gives them.
    class_prior_
        Class shares of stage one, with `sampler` and `class_weight`.
    """

    class_weight: Any = parameter(dict, one_of("balanced"), None, default=None, search=True)

    head_: Any = learned("classifier")
    class_prior_: np.ndarray = learned("ndarray of float of shape (n_classes,)")

    _patience_when_held = 1  # where no feature moves, stage two decides

    def _check_parameters(self) -> None:
        super()._check_parameters()
        resolve_head(self._head())

    def _head(self) -> Any:
        """Head of stage two: a name of ``HEADS`` or a classifier."""
        raise NotImplementedError

    # ---------------------------------------------------------------- stage one

    def _make_criterion(self, train: TrainingSet, n_steps: int) -> Criterion:
        return LabelCriterion(self._label_loss(train))

    def _label_loss(self, train: TrainingSet) -> LabelLoss:
        """Cross-entropy, with the constructor's class weights."""
        mass = train.class_mass(len(self.classes_))
        weight = torch.from_numpy(class_weights(self.class_weight, self.classes_, mass))
        return LabelLoss(losses.cross_entropy, of_unit_mean(weight, torch.from_numpy(mass)))

    def _make_batches(self, train: TrainingSet, context: Context) -> Any:
        self._check_classes(train.y)
        if (rare := np.bincount(train.y) == 1).any():
            warnings.warn(
                f"Classes {self.classes_[rare].tolist()} have one training image: what is learned "
                "of their spread comes from augmentation and from the other classes.",
                stacklevel=6,
            )
        return super()._make_batches(train, context)

    def _check_classes(self, codes: np.ndarray) -> None:
        missing = np.setdiff1d(np.arange(len(self.classes_)), codes)
        if len(missing):
            raise ValueError(
                f"y lacks the classes {self.classes_[missing].tolist()}: a head needs them all."
            )

    def _prior(self, train: TrainingSet) -> np.ndarray:
        """Class shares that the head of stage one has learned: resampled and weighted."""
        mass = train.class_mass(len(self.classes_))
        mass = mass * class_weights(self.class_weight, self.classes_, mass)
        return (mass / mass.sum()).clip(min=1e-12)

    # ---------------------------------------------------------------- stage two

    def _inference_state(self, train: TrainingSet) -> dict[str, Any]:
        """Fit the head to the images as they were before any sampler, each once.

        Repeated or made ones would pass for evidence of how a class spreads; heads rebalance by
        themselves.
        """
        self.class_prior_ = self._prior(train)
        natural = train if train.natural is None else train.natural
        head = self._head_of_images(self._head(), natural.images, natural.rows, natural.y)
        return {"head_": head}

    def _head_of_images(
        self, rebalance: Any, images: Images, rows: np.ndarray, codes: np.ndarray
    ) -> Any:
        """Fit a head to each view of images."""
        features = self._features_in_views(images, rows)
        n, n_views, d = features.shape
        return self._fit_head(
            rebalance, features.reshape(n * n_views, d), np.repeat(codes, n_views)
        )

    def _features(self, images: Images, rows: np.ndarray | None = None) -> np.ndarray:
        """Features in evaluation mode, float64, which the heads work in."""
        features = self._map(images, self.net_.module_.features, rows)
        return features.cpu().numpy().astype(np.float64)

    def _features_in_views(self, images: Images, rows: np.ndarray | None = None) -> np.ndarray:
        """Features of each view that predictions average, (n, n_views, d)."""
        features = self.net_.module_.features
        return self._map_views(images, features, rows).cpu().numpy().astype(np.float64)

    def _stage_one_head(self) -> dict[str, Any]:
        """Linear head that stage one leaves behind, as keywords for a head's fit."""
        head = self.net_.module_.head
        weight, bias = (p.detach().cpu().numpy().astype(float) for p in (head.weight, head.bias))
        n_others = self.net_.module_.n_features - weight.shape[1]  # which it has not read
        weight = np.pad(weight, ((0, 0), (0, n_others)))
        return {"coef_init": weight, "intercept_init": bias, "prior_init": self.class_prior_}

    def _fit_head(
        self,
        rebalance: Any,
        features: np.ndarray,
        codes: np.ndarray,
        start: dict[str, Any] | None = None,
    ) -> Any:
        """Fit a head to frozen features and the caller's labels."""
        head = resolve_head(rebalance)
        params = head.get_params()
        if params.get("random_state", 0) is None:
            head.set_params(random_state=self.random_seed_)
        if isinstance(self.class_weight, dict) and params.get("class_weight", 0) is None:
            head.set_params(class_weight=self.class_weight)
        if start is None:
            start = self._stage_one_head() if isinstance(head, RebalancedHead) else {}
        self._check_classes(codes)
        with known_labels():
            return head.fit(features, self.classes_[codes], **start)

    def refit_head(self, X: Any, y: Any, *, rebalance: Any = None) -> Any:
        """Make another head on the features of the fitted network: stage two alone.

        Parameters
        ----------
        X : array-like or lazy sequence of n images
            The training images, or those of another site.
        y : array-like of shape (n,)
            Their classes: every class of ``classes_``, and no other.
        rebalance : str or classifier, default=None
            As in the constructor, whose choice None takes; the parameter itself stays as it is.

        Returns
        -------
        self : estimator
            With a new ``head_``; the network is untouched.

        Raises
        ------
        ValueError
            If `y` lacks a class or holds an unknown one, or `rebalance` is an unknown name; the
            estimator stays as it was.
        """
        check_is_fitted(self)
        with all_or_nothing(self), one_thread_in_workers():
            data, _ = self._check_training(X, y, fresh=False)
            chosen = self._head() if rebalance is None else rebalance
            self.head_ = self._head_of_images(chosen, data.images, data.rows, data.y)
        return self

    @property
    def stage1_history_(self) -> list[dict[str, Any]]:
        """Epochs of stage one."""
        return [row for row in self.history_ if row.get("stage") == STAGE_ONE]

    @property
    def stage2_history_(self) -> list[dict[str, Any]]:
        """Epochs of stage two, if it trains the network; then what the head says of its fit."""
        epochs = [row for row in self.history_ if row.get("stage") == STAGE_TWO]
        head = {name: getattr(self.head_, f"{name}_", None) for name in ("loss", "n_iter")}
        return [*epochs, {name: value for name, value in head.items() if np.isscalar(value)}]

    def _scores(self, images: Images, rows: np.ndarray | None = None) -> np.ndarray:
        features = self._features_in_views(images, rows)
        n, n_views, _ = features.shape
        scores = head_logits(self.head_, features.reshape(n * n_views, -1))
        parts = torch.from_numpy(scores).unflatten(0, (n, n_views)).unbind(dim=1)
        return mean_scores(parts).numpy()

    def _score_function(self, *, in_chunks: bool = True) -> Callable[[torch.Tensor], torch.Tensor]:
        """For exported graphs: `_scores` asks the head itself, whatever it is, in float64."""
        module = self.net_.module_
        logits = torch_head(self.head_, self.net_.dtype, self.net_.device)
        return lambda batch: logits(module.features(batch))

    # ---------------------------------------------------------------- persistence

    @property
    def _inference_arrays(self) -> tuple[str, ...]:
        linear = isinstance(getattr(self, "head_", None), RebalancedHead)
        names = super()._inference_arrays
        return (*names, "head_coef_", "head_intercept_") if linear else names

    @property
    def head_coef_(self) -> np.ndarray:
        """Class vectors of the head, shape (n_classes, n_features)."""
        return self.head_.coef_

    @head_coef_.setter
    def head_coef_(self, coef: np.ndarray) -> None:
        self.head_.coef_ = _of_shape(coef, self.head_.coef_)

    @property
    def head_intercept_(self) -> np.ndarray:
        """Offsets of the head, shape (n_classes,)."""
        return self.head_.intercept_

    @head_intercept_.setter
    def head_intercept_(self, intercept: np.ndarray) -> None:
        self.head_.intercept_ = _of_shape(intercept, self.head_.intercept_)


def _of_shape(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    if new.shape != old.shape:
        raise ValueError(
            f"weights_ of another network cannot be assigned: its head has shape {new.shape}, not "
            f"{old.shape}."
        )
    return new


def torch_head(
    head: Any, dtype: torch.dtype, device: torch.device | str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`head_logits` as a function of tensors, up to a constant per row; for linear heads only."""
    if isinstance(head, RebalancedHead):
        return head.torch_logits(dtype, device)
    one_vs_rest = getattr(head, "solver", "") == "liblinear" and len(head.classes_) > 2
    if not isinstance(head, LogisticRegression) or one_vs_rest:
        raise ValueError(
            f"The head {head!r} cannot become part of a graph: choose one of {list(HEADS)} or "
            'LogisticRegression(), for instance by refit_head(X, y, rebalance="crt").'
        )
    weight, bias = (
        torch.tensor(array, dtype=dtype, device=device) for array in (head.coef_, head.intercept_)
    )
    if len(head.classes_) == 2:  # one vector, for the log-odds
        weight, bias = (torch.cat([-part, part]) / 2 for part in (weight, bias))
    return partial(F.linear, weight=weight, bias=bias)


def head_logits(head: Any, features: np.ndarray) -> np.ndarray:
    """Class scores of any classifier on a log scale, shape (n, n_classes)."""
    if isinstance(head, RebalancedHead):
        return head.logits(features)
    if hasattr(head, "predict_proba"):
        return np.log(head.predict_proba(features).clip(min=1e-300))
    scores = head.decision_function(features)
    return np.stack([-scores / 2, scores / 2], axis=1) if scores.ndim == 1 else scores
