"""AMIMV: asymmetric multi-image multi-view self-supervision for imbalanced pools.

Y. K. Sharma, C. R. Kodi, V. Padmanabhan, "A self supervised learning framework for imbalanced
medical imaging datasets", arXiv 2604.01947, 2026; its predecessor MIMV is arXiv 2509.08469, 2025.

An image x is never seen alone: it is superposed on a partner y, drawn without regard to labels, and
online and target branch see the two in different views,

    z1 = q(v1(x)) + q(v2(y)),    z2 = k(v3(x)) + k(v4(y)),

so that a rare image enters about twice as many pairs, each time over a mostly frequent one. What
is known of MIMV is exact; the asymmetric views of AMIMV are a reconstruction.
"""

from __future__ import annotations

import warnings
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import _fit_context, clone
from sklearn.utils._param_validation import HasMethods
from torch import nn

from sklearn_medimb._data.batches import Context
from sklearn_medimb._data.labels import is_mark, read_labels
from sklearn_medimb._parameters import above, learned, one_of, parameter, within
from sklearn_medimb._training.objectives import EncodedViews, Objective, perceptron
from sklearn_medimb._training.stage import Stage, TrainingSet
from sklearn_medimb._training.views import Views
from sklearn_medimb.augment import Augmentation, resolve_augmentation
from sklearn_medimb.base._encoder import ENCODERS, BaseImageEncoder
from sklearn_medimb.base._two_stage import TwoStageClassifier
from sklearn_medimb.rebalance import HEADS, resolve_head

if TYPE_CHECKING:
    from typing import Self

PAIRINGS = ("mimv", "asym_aug", "source_target", "weak_strong")


def thresholded_contrastive(
    z1: torch.Tensor,
    z2: torch.Tensor,
    temperature: float = 0.3,
    thresholds: tuple[float, float] | None = (0.1, 0.9),
    *,
    exact_mimv: bool = False,
) -> torch.Tensor:
    """Contrastive loss that looks away from pairs that are too much or too little alike.

    With S the cosines of all 2 B rows, ``E = exp(S / T)`` and keep = [lo <= abs(S) <= hi],

        rho_u = keep_{u,u'} E_{u,u'} / sum_{v != u} keep_{u,v} E_{u,v},    L = -log mean_u rho_u,

    u' being the other view of u. The log is that of the mean: a positive that is dropped counts as
    0, where a mean of logs would be infinite. Where all are, the loss is constant.

    Parameters
    ----------
    z1, z2 : tensor of shape (B, d)
        Fused projections of the two views, B >= 2.
    temperature : float, default=0.3
        T.
    thresholds : tuple of float or None, default=(0.1, 0.9)
        lo and hi; None keeps everything: -log of the mean softmax.
    exact_mimv : bool, default=False
        The published form, for study: it takes exp(1 / T) off the denominator for a self-similarity
        that hi < 1 has dropped already, and so is NaN or negative in small batches.

    Returns
    -------
    loss : scalar tensor
        At least 0, finite.
    """
    z = F.normalize(torch.cat([z1, z2]))
    cosine = z @ z.T
    n = len(cosine)
    kept = ((cosine - 1) / temperature).exp()  # over exp(1 / T), which cancels
    if thresholds is not None:
        low, high = thresholds
        strength = cosine.abs().clamp(max=1)  # cosines round above it
        kept = kept * ((strength >= low) & (strength <= high))
    positive = kept.diagonal(n // 2).repeat(2)  # S is symmetric
    if exact_mimv:
        return -(positive / (kept.sum(dim=1) - 1)).mean().log()
    itself = torch.eye(n, dtype=torch.bool, device=z.device)
    total = kept.masked_fill(itself, 0).sum(dim=1)
    empty = total == 0
    rho = torch.where(empty, 0, positive / torch.where(empty, 1, total))
    return -rho.mean().clamp_min(1e-8).log()


class AMIMVObjective(Objective):
    """Fuse anchors and partners by addition, in both branches, and contrast the sums.

    Parameters
    ----------
    network : nn.Module
        Has the backbone as `trunk`.
    n_features, projection_dim : int
        Length of features and of projections.
    temperature, thresholds, exact_mimv
        Of the loss.
    momentum : float
        m of the target branch.
    """

    n_skipped: torch.Tensor
    n_steps: torch.Tensor

    def __init__(
        self,
        network: nn.Module,
        n_features: int,
        *,
        projection_dim: int,
        temperature: float,
        thresholds: tuple[float, float] | None,
        exact_mimv: bool,
        momentum: float,
    ) -> None:
        widths = [n_features, n_features, n_features, projection_dim]
        super().__init__(network, perceptron(widths, last_norm=True), momentum)
        self.temperature = temperature
        self.thresholds = thresholds
        self.exact_mimv = exact_mimv
        self.register_buffer("n_skipped", torch.zeros(()))
        self.register_buffer("n_steps", torch.zeros(()))

    def forward(self, encoded: EncodedViews, targets: torch.Tensor) -> torch.Tensor:
        """Loss of a batch."""
        x, y = map(self.projector, encoded.features)
        x_target, y_target = map(self.project_target, encoded.target)
        z1, z2 = x + y, x_target + y_target
        loss = thresholded_contrastive(
            z1, z2, self.temperature, self.thresholds, exact_mimv=self.exact_mimv
        )
        with torch.no_grad():
            self.n_skipped += loss >= -np.log(1e-8) - 1e-3  # no positive was kept
            self.n_steps += 1
        self.terms = {"positive_cosine": F.cosine_similarity(z1.detach(), z2).mean()}
        return loss

    def complaints(self) -> list[str]:
        """Steps without a positive pair, if they were many."""
        n_skipped, n_steps = int(self.n_skipped), int(self.n_steps)
        if n_skipped <= 0.05 * n_steps:
            return []
        message = (
            f"In {n_skipped} of {n_steps} steps the thresholds {self.thresholds} left no positive "
            "pair: widen them, or set thresholds=None."
        )
        return [message]


class AMIMVEncoder(BaseImageEncoder):
    """Label-free encoder by asymmetric multi-image multi-view self-supervision.

    Anchors are fused with uniformly drawn partners, one clean and one augmented, and a slowly
    moving target branch sees the two the other way round, augmented differently [1]_. Labels play
    no part: permuting them changes nothing.

    Parameters
    ----------
    pairing
        Views of anchor x and partner y, n being the clean image. "mimv", the predecessor's [2]_:
        online n(x) and a(y), target a(x) and n(y). "asym_aug": the same with two kinds of hard
        view, a1 in the online and a2 in the target branch. "source_target": online a(x) and a(y),
        target n(x) and n(y) [3]_. "weak_strong": online n(x) and a(y), target a weak view of x and
        n(y). All but "mimv" are readings of AMIMV's abstract, not the paper's text.
    temperature
        T of the loss.
    thresholds
        Absolute cosines that the loss looks at; None keeps all. Cosines of random vectors shrink
        with `projection_dim`, and thresholds cut accordingly.
    momentum
        m of the target branch.
    exact_mimv_loss
        The predecessor's published loss, for study only: NaN or negative in small batches.

    Attributes
    ----------
    n_skipped_steps_
        Steps in which the thresholds left no positive pair: the loss had no gradient, and only
        momentum and weight decay moved the weights.

    See Also
    --------
    AMIMVClassifier : The encoder and a head in one, for images some of which have labels.
    SSLEncoder : SimCLR, MoCo v2, BYOL, SimSiam, Barlow Twins and VICReg on the same engine.

    Notes
    -----
    Of AMIMV the abstract is known: asymmetric augmentation builds multi-image multi-view pairs.
    Fusion, projector, thresholds, temperature and momentum are those of MIMV's code; its loss is
    repaired (self-similarity is left out once, not twice). Crops, colours and schedule are ours.
    Which pairing, thresholds and momentum matters little (``benchmarks/pretraining.py --study
    defaults``); SimCLR is slightly ahead there.
    A classifier of any kind begins with a fitted encoder by ``backbone=encoder``, or trains one
    first by ``pretrain="amimv"``.
    After unpickling, ``partial_fit`` goes on with a new projector: only the encoder is stored.

    References
    ----------
    .. [1] Y. K. Sharma et al., "A self supervised learning framework for imbalanced medical imaging
       datasets", arXiv 2604.01947, 2026.
    .. [2] Y. K. Sharma et al., "Maximally useful and minimally redundant: the key to self
       supervised learning for imbalanced data", arXiv 2509.08469, 2025.
    .. [3] X. Wang et al., "On the importance of asymmetry for Siamese representation learning",
       CVPR 2022.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_medimb import AMIMVEncoder
    >>> X, _ = load_digits(return_X_y=True)
    >>> encoder = AMIMVEncoder(image_shape=(8, 8), max_epochs=1, random_state=0).fit(X[:200])
    >>> encoder.transform(X[200:210]).shape
    (10, 128)
    """

    pairing: str = parameter(one_of(*PAIRINGS), default="asym_aug", search=True)
    temperature: float = parameter(above(0), default=0.3, search=(0.05, 1.0, "log"))
    thresholds: tuple[float, float] | None = parameter(
        tuple, list, None, default=(0.1, 0.9), kind="tuple of float or None"
    )
    momentum: float = parameter(within(0, 1), default=0.9, search=(0.8, 0.999))
    exact_mimv_loss: bool = parameter("boolean", default=False)

    n_skipped_steps_: int = learned("int")

    @classmethod
    def published(cls, **params: Any) -> AMIMVEncoder:
        """Make an encoder with the settings of the predecessor's code.

        ResNet-18, MIMV's views, crops down to .08 of the area, batches of 1024, SGD at 3.0 with
        momentum and a weight decay of 1e-4. With another `batch_size` the rate is scaled with it,
        ``lr = 3.0 * batch_size / 1024``; fewer images than that make smaller batches, for which to
        scale `lr` is left to you. The rate is for weights that begin at random: with weights of
        elsewhere pass a smaller `backbone_lr`.

        What differs: 400 epochs, as a third party reports for AMIMV, where MIMV has 2,000; the
        warm-up takes three tenths of the steps, theirs one; the loss is the repaired one
        (`exact_mimv_loss` has theirs); crops keep the aspect of the image, and their sides, not
        their areas, are drawn evenly; brightness shifts by up to a fifth of the intensity range,
        where theirs is multiplied by .6 to 1.4, colours change in every view, not in four of five,
        and the blur reaches a deviation of 1 pixel, theirs 2; incomplete batches are not dropped.

        Parameters
        ----------
        **params
            Further constructor parameters; they take precedence.

        Returns
        -------
        encoder : AMIMVEncoder
            Not fitted.
        """
        settings: dict[str, Any] = {
            "backbone": "resnet18",
            "backbone_lr": 1.0,
            "ema": None,
            "n_views": 1,
            "pairing": "mimv",
            "augment": "mimv",
            "batch_size": 1024,
            "max_epochs": 400,
            "lr": 3.0 * params.get("batch_size", 1024) / 1024,
            "net_params": {"optimizer": torch.optim.SGD, "optimizer__momentum": 0.9},
        }
        return cls(**{**settings, **params})

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.thresholds is not None:
            numbers = [t for t in self.thresholds if isinstance(t, Real)]
            low, high = numbers if len(numbers) == len(self.thresholds) == 2 else (1.0, 0.0)
            if not 0 <= low < high <= 1:
                raise ValueError(
                    f"thresholds={self.thresholds} must be two numbers, 0 <= lo < hi <= 1, or None."
                )

    def _objective(self, network: nn.Module, n_features: int) -> AMIMVObjective:
        return AMIMVObjective(
            network,
            n_features,
            projection_dim=self.projection_dim,
            temperature=self.temperature,
            thresholds=self.thresholds,
            exact_mimv=self.exact_mimv_loss,
            momentum=self.momentum,
        )

    def _view_set(self) -> Views:
        x, y, clean = 0, 1, Augmentation()
        a1, a2 = self._augmentations()
        if self.pairing == "mimv":
            return Views([(x, clean), (y, a1)], [(x, a1), (y, clean)])
        if self.pairing == "asym_aug":
            if not isinstance(self.augment, tuple):
                a1, a2 = asymmetric(a1)
            return Views([(x, clean), (y, a1)], [(x, a2), (y, clean)])
        if self.pairing == "source_target":
            return Views([(x, a1), (y, a1)], [(x, clean), (y, clean)])
        # A mirror image is another thing where the hard view does not flip.
        flip = getattr(a1, "horizontal_flip", 0.0)
        weak = resolve_augmentation("light").set_params(horizontal_flip=flip)
        return Views([(x, clean), (y, a1)], [(x, weak), (y, clean)])

    def _inference_state(self, train: TrainingSet) -> dict[str, Any]:
        return {"n_skipped_steps_": int(self.net_.criterion_.n_skipped)}


def asymmetric(augment: Any) -> tuple[Any, Any]:
    """Two unlike kinds of one hard view: always blurred; rarely, but with another gamma [1]_.

    References
    ----------
    .. [1] The split is that of J.-B. Grill et al., "Bootstrap your own latent", NeurIPS 2020,
       with gamma in the place of solarisation.
    """
    if not isinstance(augment, Augmentation):
        return augment, augment
    first = clone(augment).set_params(blur_probability=1.0)
    second = clone(augment).set_params(blur_probability=0.1, gamma=max(augment.gamma, 0.4))
    return first, second


ENCODERS["amimv"] = AMIMVEncoder


class AMIMVClassifier(TwoStageClassifier):
    """Label-free pre-training on all images, then a balanced head on those that have a label.

    Rows with ``y = -1`` have no label, as everywhere in scikit-learn: they serve pre-training only.
    Name the ``classes`` in ``fit`` to be told of one that has no labelled image. In a
    cross-validation give test parts without such rows (``cv`` may be an iterable of row numbers):
    scorers count -1 as a class.

    Parameters
    ----------
    pretrain
        Label-free training of the backbone on all images, labelled or not: by name as in
        :class:`~sklearn_medimb.SoftmaxClassifier`, or an :class:`~sklearn_medimb.AMIMVEncoder` or
        :class:`~sklearn_medimb.SSLEncoder`, which lends its parameters (but for backbone, device
        and input). A fitted encoder is taken as it is, here or as `backbone`, and so is a backbone
        that begins with weights of elsewhere, unless an encoder is passed here, to go on from it;
        None leaves the backbone as given.
    class_weight
        Weights of the classes in fine-tuning, by their ratios; a dict also reaches heads that take
        one.
    batch_size
        Labelled images per step.
    head
        What classifies the features: a head by name, as in
        :class:`~sklearn_medimb.MetricTwoStageClassifier`, or any scikit-learn classifier.
    fine_tune
        Whether, and how far, the labelled images train the network further, by cross-entropy,
        before the head is fitted; "frozen": not at all. Epochs, rates, `sampler` and early stopping
        concern this course; the encoder has its own.

    See Also
    --------
    AMIMVEncoder : The encoder alone.
    sklearn.semi_supervised.SelfTrainingClassifier : Makes use of unlabelled rows in another way.

    Notes
    -----
    Binary labels -1 and 1 are read as two classes, with a warning: with one labelled class there
    would be nothing to learn. Features are frozen unless `fine_tune` says otherwise; the
    head decides how rare classes fare, so it is balanced by default.

    References
    ----------
    .. [1] Y. K. Sharma et al., "A self supervised learning framework for imbalanced medical imaging
       datasets", arXiv 2604.01947, 2026.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_medimb import AMIMVClassifier, AMIMVEncoder
    >>> X, y = load_digits(n_class=3, return_X_y=True)
    >>> some = np.where(np.arange(len(y)) % 10 == 0, y, -1)  # one in ten has a label
    >>> clf = AMIMVClassifier(
    ...     pretrain=AMIMVEncoder(max_epochs=1), image_shape=(8, 8), random_state=0
    ... )
    >>> clf.fit(X, some).predict(X[:5]).shape
    (5,)
    """

    pretrain: Any = "amimv"
    head: Any = parameter(
        str,
        HasMethods(["fit", "predict"]),
        default="crt",
        kind="str or classifier",
        search=list(HEADS),
    )
    fine_tune: Any = "frozen"

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, *, groups: Any = None, classes: Any = None) -> Self:
        """Train the encoder on all images and the head on the labelled ones.

        Parameters
        ----------
        X : array-like or lazy sequence of n images
            Images in any layout of the package's guide, uint8 or float.
        y : array-like of shape (n,)
            Class labels, numbers or strings, at least two classes; -1 where there is none (among
            strings: an object array that holds the number -1).
        groups : array-like of shape (n,), default=None
            Patient of each image: the inner validation split keeps every group whole.
        classes : array-like of shape (n_classes,), default=None
            All classes that occur among the images, labelled or not, if that should be checked.

        Returns
        -------
        self : estimator
            The fitted classifier.

        Raises
        ------
        ValueError
            If the input is wrong or ambiguous, or a class occurs only without labels; the message
            names the parameter or row to mend.
        """
        return self._fit(X, y, groups=groups, classes=classes)

    def _check_parameters(self) -> None:
        resolve_head(self.head, "head")
        super()._check_parameters()

    def _check_training(
        self, X: Any, y: Any, *, classes: Any = None, **others: Any
    ) -> tuple[TrainingSet, np.ndarray | None]:
        data, groups = super()._check_training(X, y, **others)
        given = self.classes_ if classes is None else read_labels(classes, name="classes")
        odd = np.setdiff1d(self.classes_, given)
        if len(odd):
            raise ValueError(f"y holds classes {odd.tolist()} that classes={given.tolist()} lacks.")
        missing = np.setdiff1d(given, self.classes_)
        if len(missing):
            raise ValueError(
                f"Classes {missing.tolist()} occur only without labels: label an image of each, or "
                "leave them out of classes."
            )
        return data, groups

    _takes_unlabelled = True
    _unlabelled_advice = "use -1 for images without a label"

    def _unlabelled(self, y: np.ndarray) -> np.ndarray | None:
        unlabelled = is_mark(y)
        texts = [label for label in y[unlabelled].tolist() if isinstance(label, str)]
        if texts:
            raise ValueError(
                f"y holds the text {texts[0]!r}: give strings as dtype object, with the number -1 "
                "where there is no label."
            )
        if y.dtype.kind in "US":
            return None
        values = set(y[~unlabelled].tolist())
        if not values and len(y):
            raise ValueError("y is -1 everywhere: no image has a label to learn from.")
        if unlabelled.any() and values == {1}:
            warnings.warn(
                "y holds -1 and 1 only: they are read as two classes. With -1 for unlabelled "
                "images, at least two classes need labels.",
                stacklevel=2,
            )
            return None
        return unlabelled

    def _pretrainer(self) -> BaseImageEncoder | None:
        # What was trained already is trained further only by an encoder that is given for it.
        trained = self._start is not None or self._has_known_start
        if trained and isinstance(self.pretrain, str):
            return None
        return super()._pretrainer()

    def _holds_out(self) -> bool:
        return self.fine_tune != "frozen" and self.early_stopping

    def _head(self) -> Any:
        return self.head

    def _stage_one_head(self) -> dict[str, Any]:
        # Without fine-tuning the network's own head has learned nothing.
        return {} if self.fine_tune_ == "frozen" else super()._stage_one_head()

    def _stages(self, train: TrainingSet, n_epochs: int, context: Context) -> list[Stage]:
        return [] if self.fine_tune_ == "frozen" else super()._stages(train, n_epochs, context)
