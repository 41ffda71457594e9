"""Metric learning in stage one of a two-stage framework.

C. Zeng et al., "Learning discriminative representation via metric learning for imbalanced medical
image classification", arXiv 2207.06975, 2022.

The abstract states the idea: two-stage methods train a feature extractor and then rebalance the
classifier; a metric loss in stage one makes the features of fine-grained classes more
discriminative. Which loss, weight and networks the authors used it does not say, and no code is
public. So this is a family: losses of the same group's closest papers and the common ones, by name,
in the framework of B. Kang et al. (ICLR 2020).

Symbols: v = f(x) features, h the linear head, e = g(v) / |g(v)| the embedding, beta the weight of
the metric loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from sklearn.base import _fit_context
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
from torch import nn

from sklearn_medimb._data.batches import Batches
from sklearn_medimb._data.plans import pk
from sklearn_medimb._training.network import Output
from sklearn_medimb._training.stage import Stage, TrainingSet
from sklearn_medimb.base._docs import shared_parameters
from sklearn_medimb.base._two_stage import STAGE_ONE, TwoStageClassifier
from sklearn_medimb.losses import LabelStageLoss
from sklearn_medimb.metric_losses import METRIC_LOSSES, ClassCenterTriplet, ProxyAnchor


class MetricStageLoss(nn.Module):
    """``ce_weight CE(h(v), y) + beta L_metric(e, y)``.

    Holds what only stage one needs: the projection g and the parameters of the metric loss.

    Parameters
    ----------
    label_loss : nn.Module
        (logits, one-hot masses) to a scalar.
    metric : callable
        (embeddings, classes) to a scalar.
    projection : nn.Module
        g.
    ce_weight, metric_weight : float
        Weights of the two terms.
    n_metric : int or None
        Rows at the end of a batch that the metric term reads, and cross-entropy does not; None:
        both read all rows.
    """

    def __init__(
        self,
        label_loss: nn.Module,
        metric: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        projection: nn.Module,
        *,
        ce_weight: float,
        metric_weight: float,
        n_metric: int | None,
    ) -> None:
        super().__init__()
        self.label_loss = label_loss
        self.metric = metric
        self.projection = projection
        self.ce_weight = ce_weight
        self.metric_weight = metric_weight
        self.n_metric = n_metric
        self.terms: dict[str, torch.Tensor] = {}

    def forward(self, output: Output, mass: torch.Tensor) -> torch.Tensor:
        """Loss of a batch: instance rows first, P x K rows last."""
        n = len(mass) - (self.n_metric or 0)
        start = 0 if self.n_metric is None else n
        e = F.normalize(self.projection(output.features[start:]))
        metric = self.metric(e, mass[start:].argmax(dim=1))
        if not isinstance(metric, torch.Tensor) or metric.numel() != 1:
            raise TypeError(f"metric_loss must return a scalar tensor, got {metric!r}.")
        ce = self.label_loss(output.logits[:n], mass[:n])
        self.terms = {"ce": ce, "metric": metric}
        return self.ce_weight * ce + self.metric_weight * metric


class JoinedBatches:
    """Two plans side by side: each step's rows of the first, then those of the second."""

    def __init__(self, first: Batches, second: Batches) -> None:
        self.first = first
        self.second = second

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for (images, mass), (others, other_mass) in zip(self.first, self.second, strict=True):
            yield torch.cat([images, others]), torch.cat([mass, other_mass])


@shared_parameters
class MetricTwoStageClassifier(TwoStageClassifier):
    """Two-stage classifier with a metric loss in stage one.

    Stage one minimises cross-entropy on batches of the data as they are plus a metric loss on
    class-balanced P x K batches [1]_; stage two rebalances the linear head on the frozen features
    [2]_.

    Parameters
    ----------
    {backbone}

    {pretrain}

    metric_loss : str or callable, default="triplet"
        "triplet" (batch-hard, class-balanced), "class_center_triplet" (half the steps "triplet",
        then distances to class centres [3]_), "supcon", "multi_similarity", "proxy_anchor",
        "contrastive", see :mod:`sklearn_medimb.metric_losses`; or any callable that takes unit
        embeddings (n, m) and class codes (n,) and gives a scalar, such as a loss of
        pytorch-metric-learning, or ``functools.partial(supcon, temperature=0.05)``. Modules are
        copied, their parameters trained.

    metric_weight : float, default=0.3
        beta; 0 is plain decoupling: cRT with ``rebalance="crt"``.

    ce_weight : float, default=1.0
        Weight of cross-entropy. 0 trains on the metric loss alone; then heads that need a given
        one begin with logistic regression.

    margin : float, "soft" or None, default=None
        Margin of the losses that have one. None: "soft" for "triplet" and "class_center_triplet", 1
        for "contrastive", 0.1 for "proxy_anchor".

    mining : {{"hard", "semihard", "all"}}, default="hard"
        Triplets of "triplet".

    metric_head : {{"mlp", "identity"}}, default="mlp"
        g: a two-layer perceptron, dropped after stage one, or nothing.

    embedding_dim : int, default=128
        Width of the perceptron's output.

    metric_batch : {{"balanced", "shared"}}, default="balanced"
        "balanced" adds a P x K batch to each step, P K more images; "shared" puts the metric loss
        on the instance batch, where rare classes seldom meet.

    p_classes, k_samples : int, default=8, 4
        P (at most the number of classes) and K.

    rebalance : str or classifier, default="virtual"
        Stage two: "crt", "lws", "tau_norm", "ncm", "balanced_softmax", "logit_adjust", "virtual",
        "none", a head of :mod:`sklearn_medimb.rebalance`, or any scikit-learn classifier. The
        paper's is of the kind of "crt"; "virtual" was better where classes have few images. Of
        an instance, such as ``ClassifierRetraining()``, a search reaches ``rebalance__alpha``.
        Heads that balance give probabilities for equally frequent classes.

    class_weight : dict, "balanced" or None, default=None
        Weights of the classes in the cross-entropy of stage one, by their ratios; a dict also
        weighs them in stage two, where a head is fitted anew.

    batch_size : int, default=64
        Instance rows per step.

    {training}

    Attributes
    ----------
    {attributes}

    head_ : classifier
        Head of stage two, on features as `transform` gives them.

    class_prior_ : ndarray of shape (n_classes,)
        Class shares of stage one, with `sampler` and `class_weight`.

    stage1_history_ : list of dict
        Epochs of stage one, with the terms of the loss.

    stage2_history_ : list of dict
        Balanced training loss and iterations of the head.

    See Also
    --------
    sklearn_medimb.LMDClassifier : Relations in stage one, iterated calibration in stage two.
    sklearn_medimb.SoftmaxClassifier : The baseline.

    Notes
    -----
    Embeddings have `embedding_dim` numbers, for losses that ask. With early stopping, epochs are
    scored with the rebalanced head; ``refit_head(X, y)`` then lets a head learn from the validation
    images too.

    There is no `sample_weight`: on P x K batches weights have no exact meaning. Heads that take
    weights can be fitted to ``transform(X)``.

    References
    ----------
    .. [1] C. Zeng et al., "Learning discriminative representation via metric learning for
       imbalanced medical image classification", arXiv 2207.06975, 2022. Its abstract gives the
       idea; the loss and all settings are ours.
    .. [2] B. Kang et al., "Decoupling representation and classifier for long-tailed recognition",
       ICLR 2020.
    .. [3] K. Chen et al., "PCCT: progressive class-center triplet loss for imbalanced medical image
       classification", arXiv 2207.04793, 2022.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_medimb import MetricTwoStageClassifier
    >>> X, y = load_digits(n_class=3, return_X_y=True)
    >>> clf = MetricTwoStageClassifier(image_shape=(8, 8), max_epochs=3, random_state=0)
    >>> clf.fit(X[:300], y[:300]).predict(X[300:]).shape
    (237,)
    >>> clf.refit_head(X[:300], y[:300], rebalance="ncm").head_
    NearestClassMean()
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **TwoStageClassifier._parameter_constraints,
        "rebalance": [str, HasMethods(["fit", "predict"])],
        "metric_loss": [StrOptions(set(METRIC_LOSSES)), callable],
        "metric_weight": [Interval(Real, 0, None, closed="left")],
        "ce_weight": [Interval(Real, 0, None, closed="left")],
        "margin": [Interval(Real, 0, None, closed="left"), StrOptions({"soft"}), None],
        "mining": [StrOptions({"hard", "semihard", "all"})],
        "metric_head": [StrOptions({"mlp", "identity"})],
        "embedding_dim": [Interval(Integral, 1, None, closed="left")],
        "metric_batch": [StrOptions({"balanced", "shared"})],
        "p_classes": [Interval(Integral, 2, None, closed="left")],
        "k_samples": [Interval(Integral, 2, None, closed="left")],
    }

    def __init__(
        self,
        backbone: Any = "auto",
        *,
        pretrain: Any = None,
        metric_loss: Any = "triplet",
        metric_weight: float = 0.3,
        ce_weight: float = 1.0,
        margin: Any = None,
        mining: str = "hard",
        metric_head: str = "mlp",
        embedding_dim: int = 128,
        metric_batch: str = "balanced",
        p_classes: int = 8,
        k_samples: int = 4,
        rebalance: Any = "virtual",
        class_weight: Any = None,
        max_epochs: Any = "auto",
        batch_size: int = 64,
        lr: float = 2e-3,
        weight_decay: float = 1e-2,
        lr_schedule: str = "one_cycle",
        augment: Any = "medical",
        sampler: Any = None,
        early_stopping: bool = False,
        validation_fraction: float = 0.2,
        n_iter_no_change: int = 10,
        scoring: Any = "balanced_accuracy",
        callbacks: list[Any] | None = None,
        checkpoint_dir: Any = None,
        image_shape: tuple[int, ...] | None = None,
        data_format: str = "auto",
        spatial_dims: int | None = None,
        device: Any = "auto",
        precision: str = "auto",
        compile: bool = False,
        warm_start: bool = False,
        net_params: dict[str, Any] | None = None,
        random_state: Any = None,
        verbose: Any = 0,
    ) -> None:
        self.backbone = backbone
        self.pretrain = pretrain
        self.metric_loss = metric_loss
        self.metric_weight = metric_weight
        self.ce_weight = ce_weight
        self.margin = margin
        self.mining = mining
        self.metric_head = metric_head
        self.embedding_dim = embedding_dim
        self.metric_batch = metric_batch
        self.p_classes = p_classes
        self.k_samples = k_samples
        self.rebalance = rebalance
        self.class_weight = class_weight
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.lr_schedule = lr_schedule
        self.augment = augment
        self.sampler = sampler
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.scoring = scoring
        self.callbacks = callbacks
        self.checkpoint_dir = checkpoint_dir
        self.image_shape = image_shape
        self.data_format = data_format
        self.spatial_dims = spatial_dims
        self.device = device
        self.precision = precision
        self.compile = compile
        self.warm_start = warm_start
        self.net_params = net_params
        self.random_state = random_state
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, *, groups: Any = None) -> MetricTwoStageClassifier:
        """Train both stages.

        Parameters
        ----------
        X : array-like or lazy sequence of n images
            Images in any layout of the package's README, uint8 or float.
        y : array-like of shape (n,)
            Class labels: numbers or strings, at least two classes.
        groups : array-like of shape (n,), default=None
            Patient of each image: the inner validation split keeps every group whole.

        Returns
        -------
        self : MetricTwoStageClassifier
            The fitted classifier.

        Raises
        ------
        ValueError
            If the input is wrong or ambiguous; the message names the parameter or row to mend.
        """
        return self._fit(X, y, groups=groups)

    def _head(self) -> Any:
        return self.rebalance

    def _stage_one_head(self) -> dict[str, Any]:
        return super()._stage_one_head() if self.ce_weight else {}  # it was not trained

    # ---------------------------------------------------------------- stage one

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if isinstance(self.metric_loss, type):
            name = self.metric_loss.__name__
            raise TypeError(f"metric_loss={name} is a class: pass an instance, {name}().")
        if self.ce_weight == 0 and self.metric_weight == 0:
            raise ValueError("ce_weight and metric_weight are both 0: nothing to train on.")
        with_margin = ["triplet", "class_center_triplet"]
        if self.margin != "soft":
            with_margin += ["contrastive", "proxy_anchor"]
        if self.margin is not None and self.metric_loss not in with_margin:
            raise ValueError(
                f"margin={self.margin!r} is for metric_loss in {with_margin}, not for "
                f"{self.metric_loss!r}: set margin=None."
            )

    def _make_criterion(self, train: TrainingSet, n_steps: int) -> nn.Module:
        label_loss = self._label_loss(train)
        if self.metric_weight == 0:
            return LabelStageLoss(label_loss)
        width, m = self.net_.module_.n_features, self.embedding_dim
        projection: nn.Module = nn.Identity()
        if self.metric_head == "mlp":
            projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, m))
        return MetricStageLoss(
            label_loss,
            self._metric(width if self.metric_head == "identity" else m, n_steps),
            projection,
            ce_weight=self.ce_weight,
            metric_weight=self.metric_weight,
            n_metric=self._p() * self.k_samples if self.metric_batch == "balanced" else None,
        )

    def _metric(self, width: int, n_steps: int) -> Callable[..., torch.Tensor]:
        """Make the metric loss."""
        n_classes = len(self.classes_)
        margin = {} if self.margin is None else {"margin": self.margin}
        if not isinstance(self.metric_loss, str):
            return copy.deepcopy(self.metric_loss)
        if self.metric_loss == "class_center_triplet":
            margin = {"margin": "soft", **margin}
            return ClassCenterTriplet(n_classes, width, switch=n_steps // 2, **margin)
        if self.metric_loss == "proxy_anchor":
            return ProxyAnchor(n_classes, width, **margin)
        options: dict[str, Any] = {}
        if self.metric_loss in ("triplet", "contrastive"):
            options |= margin
        if self.metric_loss == "triplet":
            options["mining"] = self.mining
        return partial(METRIC_LOSSES[self.metric_loss], **options)

    def _p(self) -> int:
        return min(self.p_classes, len(self.classes_))

    def _images_per_step(self, n_samples: int) -> int:
        n_images = super()._images_per_step(n_samples)
        return n_images + self._p() * self.k_samples if self._has_metric_batch else n_images

    @property
    def _has_metric_batch(self) -> bool:
        return self.metric_weight > 0 and self.metric_batch == "balanced"

    def _stages(self, train: TrainingSet, n_epochs: int, **common: Any) -> list[Stage]:
        (stage,) = super()._stages(train, n_epochs, **common)
        stage.name = STAGE_ONE
        return [stage]

    def _make_batches(self, train: TrainingSet, **common: Any) -> Any:
        batches = super()._make_batches(train, **common)
        if not self._has_metric_batch:
            return batches
        sizes = self._p(), self.k_samples, self._steps_per_epoch(len(train.y))
        return JoinedBatches(batches, batches.with_plan(lambda rng: pk(train.y, *sizes, rng)))
