"""Features of a network that was trained elsewhere: the first thing to try."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.base import _fit_context
from sklearn.utils.validation import check_is_fitted
from torch import nn

from sklearn_medimb._data.batches import Context
from sklearn_medimb._parameters import parameter
from sklearn_medimb._training.network import SoftmaxNetwork, Trunk
from sklearn_medimb._training.stage import Stage, TrainingSet
from sklearn_medimb.base._image_estimator import BaseImageEstimator, Fit

if TYPE_CHECKING:
    from typing import Self

# What it takes of the parameters that all share; the others are for training.
_SHARED = {
    "backbone", "image_size", "normalize", "n_views", "augment", "image_shape", "data_format",
    "spatial_dims", "device", "precision", "random_state", "memory",
}  # fmt: skip
_OF_TRAINING = sorted(BaseImageEstimator._declared.keys() - _SHARED)


class PretrainedFeatures(BaseImageEstimator, without=_OF_TRAINING):
    """Features of a network that was trained elsewhere, for any classifier that follows [1]_.

    The baseline of every method here: a logistic regression on these. Nothing is learned from the
    images, nor from their labels; ``fit`` makes the network for their size, and where nothing is
    known of its start it takes their channel statistics. So with weights of elsewhere an image has
    the same features in every fold, and images may be transformed once, before they are split.

    Parameters
    ----------
    backbone
        As in :class:`~sklearn_medimb.SoftmaxClassifier`. "efficientnet_lite0" has the weights of
        ImageNet, from an installed package, and works on images of 32 pixels or more. Of "auto",
        and of recipes without weights, these are random.
    n_views
        Views of an image whose features are averaged: as it is, flipped, turned by quarters, as far
        as `augment` says that these change nothing. "auto" is 4 where `backbone` begins with
        weights of elsewhere, else 1.
    augment
        Says which views are of the same thing: "medical" flips both ways and turns, "light" flips
        left and right alone, "chest" and "none" say it of nothing.
    at_all_depths
        Whether features come from three depths of a convolutional network, the means and the
        spreads of their maps, or from its end alone.
    memory
        Folder, or joblib's object for one, where features are kept: the same images are encoded
        once, by whatever copy of the transformer, or by a classifier with ``fine_tune="frozen"``
        that asks for the same. Blocks of them are known by every pixel (about a second per
        gigabyte), the network by every weight. Nothing is ever deleted. joblib writes pickles: take
        a folder that you alone write to.
    random_state
        Of random weights.

    Attributes
    ----------
    history_
        Empty.
    n_iter_
        0: nothing is trained.
    fine_tune_
        "frozen".

    See Also
    --------
    sklearn_medimb.SoftmaxClassifier : ``fine_tune="frozen"`` trains a head on such features in one
        go, other values the network itself.
    sklearn_medimb.BalancedVirtualFeatures : A sampler for features.

    References
    ----------
    .. [1] Sharif Razavian, A., Azizpour, H., Sullivan, J., & Carlsson, S. "CNN features
       off-the-shelf: an astounding baseline for recognition." CVPR workshops, 2014.

    Examples
    --------
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> from sklearn_medimb import PretrainedFeatures
    >>> from sklearn_medimb.backbones import ConvNet
    >>> from sklearn_medimb.datasets import make_lesions
    >>> data = make_lesions([12, 6], image_size=32, random_state=0)
    >>> features = PretrainedFeatures(ConvNet(widths=(8, 16)), random_state=0)  # or its default
    >>> pipeline = make_pipeline(features, StandardScaler(), LogisticRegression())
    >>> pipeline.fit(data.images, data.target).predict(data.images).shape
    (18,)
    """

    backbone: Any = "efficientnet_lite0"
    at_all_depths: bool = parameter("boolean", default=True, search=True)

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any = None) -> Self:
        """Make the network for images of this kind.

        Parameters
        ----------
        X : array-like or lazy sequence of n images
            Images in any layout of the package's guide, uint8 or float; one is enough.
        y : object
            Not used.

        Returns
        -------
        self : transformer
            The fitted transformer.

        Raises
        ------
        ValueError
            If the input is wrong or ambiguous, or the network cannot read images of this kind.
        ImportError
            If the weights are in a package that is not installed.
        """
        return self._fit(X, y)

    def transform(self, X: Any) -> np.ndarray:
        """Features of images, averaged over views.

        Parameters
        ----------
        X : array-like or lazy sequence of n images
            In any layout that ``fit`` accepts.

        Returns
        -------
        features : ndarray of float of shape (n, n_features_out)
            Their features.
        """
        return self.transform_views(X).mean(axis=1)

    def transform_views(self, X: Any) -> np.ndarray:
        """Features of each view: rows to train on, whose predictions can be averaged.

        Parameters
        ----------
        X : array-like or lazy sequence of n images
            In any layout that ``fit`` accepts.

        Returns
        -------
        features : ndarray of float of shape (n, n_views, n_features_out)
            The first view is the image as it is.
        """
        check_is_fitted(self)
        return self._encode_once(self._read(X)).cpu().numpy()

    # ---------------------------------------------------------------- a fit without training

    def _check_training(  # type: ignore[override]
        self, X: Any, y: Any, *, fresh: bool
    ) -> tuple[TrainingSet, None]:
        images = self._read(X, reset=fresh)
        self.image_shape_ = images.image_shape
        self.n_samples_fit_ = n = len(images)
        return TrainingSet(images, np.arange(n), np.full(n, -1)), None

    def _chosen_fine_tuning(self, fit: Fit) -> str:
        return "frozen"

    def _n_epochs(self, n_samples: int, *, on_encoded: bool = False) -> int:
        return 0

    def _stages(self, train: TrainingSet, n_epochs: int, context: Context) -> list[Stage]:
        return []

    def _make_network(self, trunk: Callable[..., Trunk]) -> nn.Module:
        return SoftmaxNetwork(trunk(), lambda _: nn.Identity(), at_all_depths=self.at_all_depths)
