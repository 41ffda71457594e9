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
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.utils._param_validation import HasMethods, StrOptions
from torch import nn

from sklearn_medimb._data.batches import Batches, BatchSource, Context
from sklearn_medimb._data.plans import pk
from sklearn_medimb._parameters import at_least, integers, learned, one_of, parameter
from sklearn_medimb._training.criterion import Criterion, LabelCriterion
from sklearn_medimb._training.network import BesideStart, Output, Trunk
from sklearn_medimb._training.stage import Stage, TrainingSet
from sklearn_medimb.base._image_estimator import Fit
from sklearn_medimb.base._two_stage import STAGE_ONE, TwoStageClassifier
from sklearn_medimb.metric_losses import METRIC_LOSSES, ClassCenterTriplet, ProxyAnchor
from sklearn_medimb.rebalance import HEADS, BalancedSoftmax, resolve_head


class MetricStageLoss(Criterion):
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


class JoinedBatches(BatchSource):
    """Two plans side by side: each step's rows of the first, then those of the second."""

    def __init__(self, first: Batches, second: Batches) -> None:
        self.first = first
        self.second = second
        self.generator = first.generator

    def orders(self) -> Iterator[tuple[Any, Any]]:
        """Pairs of orders."""
        return zip(self.first.orders(), self.second.orders(), strict=True)

    def make(self, order: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Make both batches and join them."""
        (images, mass), (others, other_mass) = self.first.make(order[0]), self.second.make(order[1])
        return torch.cat([images, others]), torch.cat([mass, other_mass])


class MetricTwoStageClassifier(TwoStageClassifier):
    """Two-stage classifier with a metric loss in stage one.

    Stage one minimises cross-entropy on batches of the data as they are plus a metric loss on
    class-balanced P x K batches [1]_; stage two rebalances the linear head on the frozen features
    [2]_.

    Parameters
    ----------
    metric_loss
        "triplet" (batch-hard, class-balanced), "class_center_triplet" (half the steps "triplet",
        then distances to class centres [3]_), "supcon", "multi_similarity", "proxy_anchor",
        "contrastive", see :mod:`sklearn_medimb.metric_losses`; or any callable that takes unit
        embeddings (n, m) and class codes (n,) and gives a scalar, such as a loss of
        pytorch-metric-learning, or ``functools.partial(supcon, temperature=0.05)``. Modules are
        copied, their parameters trained.
    metric_weight
        beta; 0 is plain decoupling: cRT with ``rebalance="crt"``.
    ce_weight
        Weight of cross-entropy. 0 trains on the metric loss alone; then heads that need a given one
        begin with logistic regression.
    margin
        Margin of the losses that have one. None: "soft" for "triplet" and "class_center_triplet", 1
        for "contrastive", 0.1 for "proxy_anchor".
    mining
        Triplets of "triplet".
    metric_head
        g: a two-layer perceptron, dropped after stage one, or nothing.
    embedding_dim
        Width of the perceptron's output.
    metric_batch
        "balanced" adds a P x K batch to each step, P K more images; "shared" puts the metric loss
        on the instance batch, where rare classes seldom meet.
    p_classes
        P of the P x K batches: classes in each, at most all.
    k_samples
        K of the P x K batches: images of each class.
    rebalance
        Stage two: "crt", "lws", "tau_norm", "ncm", "balanced_softmax", "logit_adjust", "virtual",
        "none", a head of :mod:`sklearn_medimb.rebalance`, or any scikit-learn classifier. The
        paper's is of the kind of "crt". "auto" is "virtual", which was better where classes have
        few images, and balanced softmax on weights of elsewhere, whether they stay as they are or
        are tuned: see the measurements in the documentation. Of an instance, such as
        ``ClassifierRetraining()``, a search reaches ``rebalance__alpha``. Heads that balance give
        probabilities for equally frequent classes.
    keep_start
        Whether stage two, and `transform`, read the features of the weights that the backbone began
        with beside those that it learned, where ``fine_tune="head_first"`` tunes weights of
        elsewhere: a network that was tuned to few images and the one that it was err on different
        ones [4]_. Predictions then take twice as long, and so does each look at validation rows.
        Further fits go on with what the first one chose; of "frozen" ones the head is then trained
        on augmented images. Heads that only adjust the one that was trained with the backbone
        ("lws", "tau_norm", "logit_adjust", "none") would give the start no say: it is not kept.

    Attributes
    ----------
    keeps_start_
        Whether they do.

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
    .. [4] M. Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022: means of both.

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

    metric_loss: Any = parameter(
        StrOptions(set(METRIC_LOSSES)),
        callable,
        default="triplet",
        kind="str or callable",
        search=lambda clf: list(METRIC_LOSSES) if clf.margin is None else None,
    )
    metric_weight: float = parameter(at_least(0), default=0.3, search=(0.03, 3.0, "log"))
    ce_weight: float = parameter(at_least(0), default=1.0, search=[1.0, 0.0])
    margin: Any = parameter(
        at_least(0),
        one_of("soft"),
        None,
        default=None,
        search=lambda clf: None if clf.margin is None else (0.05, 2.0, "log"),
    )
    mining: str = parameter(one_of("hard", "semihard", "all"), default="hard", search=True)
    metric_head: str = parameter(one_of("mlp", "identity"), default="mlp", search=True)
    embedding_dim: int = parameter(integers(1), default=128, search=(32, 512, "log"))
    metric_batch: str = parameter(one_of("balanced", "shared"), default="balanced", search=True)
    p_classes: int = parameter(integers(2), default=8, search=(2, 16))
    k_samples: int = parameter(integers(2), default=4, search=(2, 8))
    rebalance: Any = parameter(
        str,
        HasMethods(["fit", "predict"]),
        default="auto",
        kind="str or classifier",
        search=["auto", *HEADS],
    )
    keep_start: bool = parameter("boolean", default=True, search=[True, False])

    keeps_start_: bool = learned("bool")

    def _head(self) -> Any:
        if self.rebalance != "auto":
            return self.rebalance
        if self._keeps_start:  # twice as many features
            return BalancedSoftmax(alpha=0.3)
        return "balanced_softmax" if self._has_known_start else "virtual"

    def _chosen_fine_tuning(self, fit: Fit) -> str | int:
        chosen = super()._chosen_fine_tuning(fit)
        if fit.previous is None:
            begins = self._has_known_start and self._pretrainer() is None
            tuned = chosen == "head_first" and self._backbone_share > 0
            head = resolve_head(self._head())
            head_reads = not (self.ce_weight and getattr(head, "_keeps_given", False))
            self.keeps_start_ = bool(self.keep_start and begins and tuned and head_reads)
        elif chosen == "frozen" and self._keeps_start:
            return 0  # stages: what one backbone encoded has nothing of the other
        return chosen

    @property
    def _keeps_start(self) -> bool:
        return getattr(self, "keeps_start_", False)  # files before keep_start lack it

    def _make_network(self, trunk: Callable[..., Trunk]) -> nn.Module:
        if not self._keeps_start:
            return super()._make_network(trunk)
        return BesideStart(trunk(), self._make_head, at_all_depths=True, standardised=True)

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

    def _make_criterion(self, train: TrainingSet, n_steps: int) -> Criterion:
        label_loss = self._label_loss(train)
        if self.metric_weight == 0:
            return LabelCriterion(label_loss)
        width, m = self.net_.module_.head.in_features, self.embedding_dim
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

    def _stages(self, train: TrainingSet, n_epochs: int, context: Context) -> list[Stage]:
        (stage,) = super()._stages(train, n_epochs, context)
        return [replace(stage, name=STAGE_ONE)]

    def _make_batches(self, train: TrainingSet, context: Context) -> Any:
        batches = super()._make_batches(train, context)
        if not self._has_metric_batch:
            return batches
        sizes = self._p(), self.k_samples, self._steps_per_epoch(len(train.y))
        return JoinedBatches(batches, batches.with_plan(lambda rng: pk(train.y, *sizes, rng)))
