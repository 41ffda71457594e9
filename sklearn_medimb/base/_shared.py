"""What every estimator takes and learns, each declared once."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.frozen import FrozenEstimator
from sklearn.utils._param_validation import HasMethods
from torch import nn

from sklearn_medimb._data.layout import InputParameters
from sklearn_medimb._data.resize import MAX_SIDE, Resize
from sklearn_medimb._parameters import (
    Declaring,
    above,
    at_least,
    integers,
    learned,
    one_of,
    parameter,
    within,
)
from sklearn_medimb._training.net import SCHEDULES, Net
from sklearn_medimb.backbones import Backbone

try:
    from sklearn.callback import CallbackSupportMixin
except ImportError:  # scikit-learn < 1.9

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stand-in: this scikit-learn has no callbacks."""


class Companions(Declaring):
    """What goes along with training, before how X holds images in every signature.

    Parameters
    ----------
    callbacks
        skorch callbacks, cloned before use, and names: "tensorboard" writes each fit below
        ``runs/``, "mlflow" logs it as a run of the tracking server that is set. Of skorch's own,
        those for which a parameter here does the same are refused, by the name of that.
    checkpoint_dir
        Write the state after each epoch. After a crash, ``fit`` with the same parameters and data
        resumes there; a finished fit removes its file. Fits can share the directory, also the same
        fit several times at once. What tells fits apart is the content of everything that decides
        on the result: code of functions, state of objects (where that cannot be read, ``fit``
        refuses), callbacks but for skorch's own loggers and progress bars, every pixel (about a
        second per gigabyte; lazy images are read once for it). Of callbacks, attributes that are
        numbers, texts, tensors, or lists, tuples and dicts of these are kept, or what a method
        ``state_dict`` gives; where others change in training, ``fit`` refuses.
    memory
        Folder, or joblib's object for one, where what a backbone that stays as it is makes of
        training images is kept: with ``fine_tune="frozen"``, and in the first course of
        "head_first", the same images are encoded once, by whatever fit or method asks for the same.
        Blocks of them are known by every pixel (about a second per gigabyte), the backbone by every
        weight; parameters of the head, the loss and the labels do not matter. Other training rows
        are encoded anew, and nothing is ever deleted. Predictions keep nothing. joblib writes
        pickles: take a folder that you alone write to.
    """

    callbacks: Any = parameter(str, list, None, default=None, last=True)
    checkpoint_dir: Any = parameter(
        str, os.PathLike, None, default=None, kind="path-like or None", last=True
    )
    memory: Any = parameter(
        *(str, os.PathLike, HasMethods(["cache"]), None),
        default=None,
        kind="path-like, joblib.Memory or None",
        last=True,
    )


class SharedParameters(
    InputParameters,
    Companions,
    CallbackSupportMixin,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    BaseEstimator,
):
    """Parameters and fitted attributes of classifiers and encoders alike.

    Parameters
    ----------
    backbone
        Network that encodes images: "auto" (an MLP for vectors, a small conv net for images, a
        ResNet-18 for 5,000 images or more of at least 48 pixels), a name from
        ``sklearn_medimb.backbones.BACKBONES``, "monai:<name>", "timm:<name>", "hf:<repository or
        local folder>" with its weights, a spec such as ``ResNet(depth=18)`` whose parameters are
        searchable as ``backbone__depth``, any ``nn.Module``, class or instance, or a fitted
        estimator of this package, whose weights and normalisation are the start: weights of
        elsewhere, if it began with such. Parameters of a module with ``requires_grad=False`` stay
        as they are, and so do the running statistics of layers that are frozen; a
        :class:`~sklearn.frozen.FrozenEstimator` only keeps its estimator fitted in clones.
    image_size
        Size that all images come to, in ``fit`` and later on, so that X may hold images of several
        sizes: one number, one for each spatial axis, or a
        :class:`~sklearn_medimb.datasets.Resize`, which can also pad or crop where sides have
        another ratio. Antialiased bicubic, as in Pillow. None: images have one size, and keep it.
    normalize
        Mean and standard deviation by which channels are normalised. "auto": those that a backbone
        with weights of elsewhere was trained with, where images are uint8 or floats in [0, 1], and
        else those of the training images, which is "data". "imagenet", or numbers of your own, one
        or one per channel, on the scale [0, 1].
    fine_tune
        What is trained of a backbone that was trained before. "full": everything. "frozen": no
        weight and no running statistic of it; it encodes each training image once, in `n_views`
        views, and epochs run on that: a hundred times faster. "head_first": that, then everything
        (A. Kumar et al., ICLR 2022); `max_epochs` counts the latter. Where the backbone began with
        weights of elsewhere a linear head is then trained once more, on images as they are: those
        that everything learned from were augmented. n: its last n stages. "auto" is "full", but
        where `backbone` begins with weights of elsewhere, as "efficientnet_lite0" does: there it is
        "head_first" on a GPU, and for as many pixels as a CPU tunes in about ten minutes (500
        images of 224 pixels, 1,500 of 128), "frozen" for more of them and for transformers.
    n_views
        Views of an image that predictions average: as it is, flipped, turned by quarters, as far as
        `augment` says that these change nothing (both flips for quarter turns, of square images);
        at most 8. Frozen backbones learn from the same views. "auto" is 4 where `backbone` begins
        with weights of elsewhere, else 1.
    max_epochs
        Passes over the training images. "auto" aims at 180 steps and 60 more per class, up to 17
        classes (a third of that for vectors), or at 5 steps for each 8 of up to 5,000 images where
        these are more, and at least 10 epochs; it is 15 through a backbone that begins with weights
        of elsewhere, and four times as many steps on what such a frozen one encoded. A fit so long
        warns (``ConvergenceWarning``) where training images themselves are not recognised.
    batch_size
        Images per step.
    lr
        Peak learning rate of AdamW.
    backbone_lr
        Learning rate of the backbone as a share of `lr`. "auto" is 0.3 where it begins with weights
        of elsewhere, else 1.
    layer_decay
        By how much each stage of the backbone learns more slowly than the one after it; 0.65 to 0.8
        are usual for transformers that were trained before, as is
        ``callbacks=[skorch.callbacks.GradientNormClipping(1.0)]``, which works in every stage.
    ema
        Share of the old in the running mean of the weights, as it is after many steps; predictions,
        also on validation rows, are those of the mean. None keeps the weights of the last step;
        "auto" does so too, but is 0.98 where a backbone with weights of elsewhere is tuned.
    weight_decay
        Decoupled weight decay. "auto" is 2 for a head on what a frozen backbone that begins with
        weights of elsewhere encoded, and else 0.01.
    lr_schedule
        Course of the learning rate.
    augment
        Random changes of each training image; see :mod:`sklearn_medimb.augment`. "medical" flips
        both ways, "light" left and right; "chest" does what "medical" does but never flips: for
        images whose left is not their right, such as chest films. Feature vectors are never
        augmented.
    precision
        "auto" runs the backbone of image networks in bfloat16 where the hardware does natively.
    compile
        Pass the network through ``torch.compile``. Training steps of networks from elsewhere that
        may draw random numbers (dropout) are not compiled.
    warm_start
        Whether a further ``fit`` goes on from the present weights.
    net_params
        Further keywords for the :class:`skorch.NeuralNet` inside, such as ``{"optimizer":
        torch.optim.SGD}``.
    random_state
        Seeds everything, to the bit for the same number of torch's threads, in whatever thread or
        process; worker processes use one. The global generators stay untouched, but for NumPy's
        where this is None.
    verbose
        1 shows a progress bar with loss, validation score and time left, or a few lines where the
        output is no terminal.

    Attributes
    ----------
    net_
        The trained net; ``net_.module_`` is the network.
    history_
        Per epoch: number, seconds (``dur``), ``train_loss``, where the loss has several terms
        ``train_<term>``, where training has several stages ``stage``, and with early stopping
        ``valid_score``.
    n_iter_
        Epochs trained.
    image_shape_
        Shape of one image, ``(C, *spatial)``, or ``(d,)`` for vectors; with `image_size` of one
        that has this size.
    input_shape_
        The same of the first image of X as it was given, before `image_size`.
    file_options_
        How files were read, where X was :class:`~sklearn_medimb.datasets.ImageFiles` or paths: so
        paths are read afterwards, too. Else None.
    pixel_mean_
        Mean of each channel in the training images; uint8 counts as [0, 1].
    pixel_std_
        Standard deviation of each channel, likewise.
    fine_tune_
        What was trained of the backbone: `fine_tune`, with "auto" resolved.
    pixel_range_
        "uint8", or the largest absolute value of float images: guards against images that are 255
        times too bright or too dark later on, lazy ones included.
    random_seed_
        Seed drawn from `random_state`.
    n_samples_fit_
        Images given to the first ``fit``.
    n_features_in_
        Values per image, before `image_size`.
    feature_names_in_
        Column names where X was a DataFrame.
    """

    backbone: Any = parameter(
        str,
        nn.Module,
        Backbone,
        type,
        FrozenEstimator,
        default="auto",
        kind="str, Backbone, nn.Module or class",
        positional=True,
    )
    image_size: Any = parameter(
        integers(1, MAX_SIDE),
        tuple,
        list,
        Resize,
        None,
        default=None,
        kind="int, tuple of int, Resize or None",
    )
    normalize: Any = parameter(
        one_of("auto", "data", "imagenet"),
        tuple,
        list,
        default="auto",
        kind='{"auto", "data", "imagenet"} or (mean, std)',
    )
    fine_tune: Any = parameter(
        integers(1),
        one_of("auto", "full", "head_first", "frozen"),
        default="auto",
        kind='{"auto", "full", "head_first", "frozen"} or int',
    )
    n_views: Any = parameter(integers(1), one_of("auto"), default="auto", kind='int or "auto"')
    max_epochs: Any = parameter(integers(1), one_of("auto"), default="auto")
    batch_size: Any = parameter(integers(1), default=64, search=(16, 128, "log"))
    lr: float = parameter(above(0), default=2e-3, search=(2e-4, 2e-2, "log"))
    backbone_lr: Any = parameter(at_least(0), one_of("auto"), default="auto")
    layer_decay: float = parameter(within(0, 1, closed="right"), default=1.0)
    ema: Any = parameter(
        within(0, 1), one_of("auto"), None, default="auto", kind='float, "auto" or None'
    )
    weight_decay: Any = parameter(
        at_least(0), one_of("auto"), default="auto", search=(1e-5, 1e-1, "log")
    )
    lr_schedule: str = parameter(one_of(*SCHEDULES), default="one_cycle", search=True)
    augment: Any = parameter(
        str,
        None,
        HasMethods(["draw", "apply"]),
        default="medical",
        kind='{"none", "light", "medical", "chest", "strong"}, Augmentation or None',
        search=["none", "light", "medical", "chest", "strong"],
    )

    # ---------------------------------------------------------------- the machine

    precision: str = parameter(
        one_of("auto", "float32", "bf16", "float64"), default="auto", last=True
    )
    compile: bool = parameter("boolean", default=False, last=True)
    warm_start: bool = parameter("boolean", default=False, last=True)
    net_params: dict[str, Any] | None = parameter(dict, None, default=None, last=True)
    random_state: Any = parameter(
        "random_state", default=None, kind="int, RandomState or None", last=True
    )
    verbose: Any = parameter("verbose", default=0, last=True)

    # ---------------------------------------------------------------- what is learned

    net_: Net = learned("skorch.NeuralNet")
    history_: list[dict[str, Any]] = learned("list of dict")
    n_iter_: int = learned("int")
    image_shape_: tuple[int, ...] = learned("tuple of int")
    input_shape_: tuple[int, ...] = learned("tuple of int")
    file_options_: dict[str, Any] | None = learned("dict or None")
    pixel_mean_: np.ndarray = learned("ndarray of float of shape (n_channels,)", predicts=True)
    pixel_std_: np.ndarray = learned("ndarray of float of shape (n_channels,)", predicts=True)
    pixel_range_: str | float | None = learned("str, float or None")
    fine_tune_: str | int = learned("str or int")
    random_seed_: int = learned("int")
    n_samples_fit_: int = learned("int")
    n_features_in_: int = learned("int")
    feature_names_in_: np.ndarray = learned("ndarray of shape (`n_features_in_`,)")


# Any fitted estimator of the package can be the start of another one.
_START = SharedParameters._own["backbone"]
SharedParameters._own["backbone"] = replace(_START, allowed=(*_START.allowed, SharedParameters))
SharedParameters._parameter_constraints["backbone"].append(SharedParameters)
