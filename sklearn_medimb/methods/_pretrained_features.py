"""Features of a network that was trained elsewhere: the first thing to try."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from joblib import Memory
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    _fit_context,
)
from sklearn.utils._param_validation import HasMethods
from sklearn.utils.validation import check_is_fitted, check_memory
from torch import nn

from sklearn_medimb._data.batches import Context
from sklearn_medimb._parameters import Declaring, learned, parameter
from sklearn_medimb._training.network import SoftmaxNetwork, Trunk
from sklearn_medimb._training.stage import Stage, TrainingSet
from sklearn_medimb.base._encoder import BaseImageEncoder
from sklearn_medimb.base._shared import SharedParameters

_SHARED = SharedParameters._declared


class UntrainedEncoder(BaseImageEncoder):
    """A backbone as it is given: nothing of it is trained.

    Parameters
    ----------
    at_all_depths
        Whether features come from three depths of the backbone, or from its end alone.
    """

    at_all_depths: bool = parameter("boolean", default=True)

    def _make_network(self, trunk: Callable[..., Trunk]) -> nn.Module:
        return SoftmaxNetwork(trunk(), lambda _: nn.Identity(), at_all_depths=self.at_all_depths)

    def _stages(self, train: TrainingSet, n_epochs: int, context: Context) -> list[Stage]:
        return []

    def in_views(self, X: Any) -> np.ndarray:
        """Features of each view, (n, n_views, d)."""
        parts = self._map_views(self._read(X), self.net_.module_.features)
        return torch.stack(parts, dim=1).cpu().numpy()


class PretrainedFeatures(
    Declaring, ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator
):
    """Features of a network that was trained elsewhere, for any classifier that follows.

    The baseline of every method here: a logistic regression on these. Nothing is learned from the
    images, nor from their labels; ``fit`` makes the network for their size. So images of all folds
    have the same features, and `memory` computes them once.

    Parameters
    ----------
    backbone
        As in :class:`~sklearn_medimb.SoftmaxClassifier`; of "auto" the weights are random.
    image_size
        Size that images come to.
    normalize
        Channels, as there. "data" takes the statistics of the images of ``fit``.
    n_views
        Views of an image whose features are averaged, as there.
    augment
        Says which views are of the same thing: "medical" flips both ways and turns, "light" only
        left and right, "none" nothing.
    at_all_depths
        Whether features come from three depths of a convolutional network, the means and the
        spreads of their maps, or from its end alone.
    memory
        Where features are kept, as in :class:`~sklearn.pipeline.Pipeline`.
    image_shape
        Shape of one image where X holds flattened ones.
    data_format
        Where the channel axis is.
    spatial_dims
        3 reads 4-D X as gray volumes.
    device
        "auto" takes a CUDA GPU where there is one.
    precision
        "auto" runs image networks in bfloat16 where the hardware does natively.
    random_state
        Of random weights.

    Attributes
    ----------
    encoder_
        What encodes images.
    n_features_in_
        Values per image.

    See Also
    --------
    sklearn_medimb.SoftmaxClassifier : ``fine_tune="frozen"`` trains a network's head on such
        features, other values the network itself.
    sklearn_medimb.BalancedVirtualFeatures : A sampler for features.

    Examples
    --------
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> from sklearn_medimb import PretrainedFeatures
    >>> from sklearn_medimb.backbones import ResNet
    >>> from sklearn_medimb.datasets import make_lesions
    >>> data = make_lesions([12, 6], image_size=32, random_state=0)
    >>> features = PretrainedFeatures(ResNet(depth=10, weights=None), random_state=0)
    >>> pipeline = make_pipeline(features, StandardScaler(), LogisticRegression())
    >>> pipeline.fit(data.images, data.target).predict(data.images).shape
    (18,)
    """

    backbone: Any = replace(_SHARED["backbone"], default="efficientnet_lite0")
    image_size: Any = _SHARED["image_size"]
    normalize: Any = _SHARED["normalize"]
    n_views: Any = _SHARED["n_views"]
    augment: Any = _SHARED["augment"]
    at_all_depths: bool = parameter("boolean", default=True, search=True)
    memory: Any = parameter(
        str, HasMethods(["cache"]), None, default=None, kind="str, Memory or None"
    )
    image_shape: Any = _SHARED["image_shape"]
    data_format: str = _SHARED["data_format"]
    spatial_dims: int | None = _SHARED["spatial_dims"]
    device: Any = _SHARED["device"]
    precision: str = _SHARED["precision"]
    random_state: Any = _SHARED["random_state"]

    encoder_: UntrainedEncoder = learned("estimator")
    n_features_in_: int = learned("int")

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any = None) -> PretrainedFeatures:
        """Make the network for images of this kind.

        Parameters
        ----------
        X : array-like or lazy sequence of n images
            Images in any layout of the package's README, uint8 or float.
        y : object
            Not used.

        Returns
        -------
        self : transformer
            The fitted transformer.

        Raises
        ------
        ValueError
            If the input is wrong or ambiguous.
        ImportError
            If the weights are in a package that is not installed.
        """
        names = UntrainedEncoder._declared.keys() & self._declared.keys()
        encoder = UntrainedEncoder(**{name: getattr(self, name) for name in names})
        self.encoder_ = encoder.fit(X)
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(encoder, name):
                setattr(self, name, getattr(encoder, name))
        return self

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
        memory: Memory = check_memory(self.memory)
        return memory.cache(_features)(self.encoder_, X)

    @property
    def _n_features_out(self) -> int:
        return self.encoder_._n_features_out


def _features(encoder: UntrainedEncoder, X: Any) -> np.ndarray:
    return encoder.in_views(X)
