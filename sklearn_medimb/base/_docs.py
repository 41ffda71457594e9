"""Text of the parameters and attributes that estimators share."""

from __future__ import annotations

from typing import TypeVar

_BACKBONE = """\
backbone : str, Backbone, nn.Module or class, default="auto"
        Network that encodes images: "auto" (an MLP for vectors, a small conv net for images, a
        ResNet-18 for 5,000 images or more of at least 48 pixels), a name from
        ``sklearn_medimb.backbones.BACKBONES``, "monai:<name>", "timm:<name>", a spec such as
        ``ResNet(depth=18)`` whose parameters are searchable as ``backbone__depth``, any
        ``nn.Module``, class or instance, or a fitted estimator of this package, whose weights and
        normalisation are the start. Parameters of a module with ``requires_grad=False`` stay as
        they are, and so do the running statistics of layers that are frozen; a
        :class:`~sklearn.frozen.FrozenEstimator` only keeps its estimator fitted in clones."""

_PRETRAIN = """\
pretrain : str, encoder or None, default=None
        Label-free training of the backbone before the rest, on the same images: "amimv", "simclr",
        "moco", "byol", "simsiam", "barlow_twins", "vicreg", or an :class:`AMIMVEncoder` or
        :class:`SSLEncoder`, which lends its parameters (but for backbone, device and input); a
        fitted one is the start, as in `backbone`. Only a first ``fit`` pre-trains. It takes as long
        as the encoder's own `max_epochs` says, by default about 600 steps, often more than all the
        rest: ``pretrain=SSLEncoder("simclr", max_epochs=20)`` is shorter."""

_PRETRAIN_AMIMV = """\
pretrain : str, encoder or None, default="amimv"
        Label-free training of the backbone on all images, labelled or not: by name as in
        ``ENCODERS``, or an :class:`AMIMVEncoder` or :class:`SSLEncoder`, which lends its parameters
        (but for backbone, device and input). A fitted encoder is taken as it is, here or as
        `backbone`; None leaves the backbone as given."""

# Parameters of training, by name: encoders have no labels to hold out or resample.
_TRAINING = {
    "max_epochs": """\
max_epochs : int or "auto", default="auto"
        Passes over the training images. "auto" aims at 180 steps and 60 more per class, up to
        17 classes (a third of that for vectors), and at least 10 epochs.""",
    "lr": """\
lr : float, default=2e-3
        Peak learning rate of AdamW.""",
    "weight_decay": """\
weight_decay : float, default=1e-2
        Decoupled weight decay.""",
    "lr_schedule": """\
lr_schedule : {{"one_cycle", "cosine", "constant"}}, default="one_cycle"
        Course of the learning rate.""",
    "augment": """\
augment : {{"none", "light", "medical", "strong"}}, Augmentation or None, default="medical"
        Random changes of each training image; see :mod:`sklearn_medimb.augment`. "medical" flips
        both ways: choose "light" or "none" where left and right or up and down carry the class.
        Feature vectors are never augmented.""",
    "sampler": """\
sampler : imbalanced-learn sampler or None, default=None
        Resamples the training rows *after* the inner validation split.""",
    "early_stopping": """\
early_stopping : bool, default=False
        Hold out a stratified validation split, stop when `scoring` no longer rises, and keep the
        best epoch's weights.""",
    "validation_fraction": """\
validation_fraction : float, default=0.2
        Share of that split.""",
    "n_iter_no_change": """\
n_iter_no_change : int, default=10
        Epochs without a rise before stopping.""",
    "scoring": """\
scoring : str or callable, default="balanced_accuracy"
        scikit-learn scorer for early stopping.""",
    "callbacks": """\
callbacks : str, list or None, default=None
        skorch callbacks, cloned before use, and names: "tensorboard" writes each fit below
        ``runs/``, "mlflow" logs it as a run of the tracking server that is set. Of skorch's own,
        those for which a parameter here does the same are refused, by the name of that.""",
    "checkpoint_dir": """\
checkpoint_dir : path-like or None, default=None
        Write the state after each epoch. After a crash, ``fit`` with the same parameters and data
        resumes there; a finished fit removes its file. Fits can share the directory, also the same
        fit several times at once. What tells fits apart is the content of everything that decides
        on the result: code of functions, state of objects (where that cannot be read, ``fit``
        refuses), callbacks unless they only read ``net.history``, every pixel (about a second per
        gigabyte; lazy images are read once for it).""",
    "image_shape": """\
image_shape : tuple of int or None, default=None
        Shape of one image where X holds flattened ones: ``(H, W)``, ``(C, H, W)``,
        ``(C, D, H, W)``.""",
    "data_format": """\
data_format : {{"auto", "channels_first", "channels_last"}}, default="auto"
        Where the channel axis is.""",
    "spatial_dims": """\
spatial_dims : {{2, 3}} or None, default=None
        3 reads 4-D X as gray volumes ``(n, D, H, W)``.""",
    "device": """\
device : str or torch.device, default="auto"
        "auto" takes a CUDA GPU where there is one.""",
    "precision": """\
precision : {{"auto", "float32", "bf16", "float64"}}, default="auto"
        "auto" runs the backbone of image networks in bfloat16 where the hardware does natively.""",
    "compile": """\
compile : bool, default=False
        Pass the network through ``torch.compile``. Training steps of networks from elsewhere that
        may draw random numbers (dropout) are not compiled.""",
    "warm_start": """\
warm_start : bool, default=False
        Whether a further ``fit`` goes on from the present weights.""",
    "net_params": """\
net_params : dict or None, default=None
        Further keywords for the :class:`skorch.NeuralNet` inside, such as
        ``{{"optimizer": torch.optim.SGD}}``.""",
    "random_state": """\
random_state : int, RandomState or None, default=None
        Seeds everything, to the bit for the same number of torch's threads, in whatever thread or
        process; worker processes use one. The global generators stay untouched, but for NumPy's
        where this is None.""",
    "verbose": """\
verbose : int, default=0
        1 shows a progress bar with loss, validation score and time left, or a few lines where the
        output is no terminal.""",
}

_LABELLED = (
    "sampler", "early_stopping", "validation_fraction", "n_iter_no_change", "scoring",
)  # fmt: skip

_ENCODER = {
    "max_epochs": """\
max_epochs : int or "auto", default="auto"
        Passes over the training images. "auto" aims at 600 steps, and at least 20 epochs.""",
    "batch_size": """\
batch_size : int, default=128
        Anchors per step.""",
    "weight_decay": """\
weight_decay : float, default=1e-4
        Decoupled weight decay.""",
    "augment": """\
augment : str, Augmentation or a pair of these, default="contrastive"
        Hard views; a pair gives the two kinds of a method that has two. "contrastive" flips both
        ways. Of feature vectors a view has three in ten entries from other rows.""",
}

_ATTRIBUTES = """\
classes_ : ndarray of shape (n_classes,)
        Class labels.

    class_counts_ : ndarray of int of shape (n_classes,)
        Images of each class given to the first ``fit``.

    net_ : skorch.NeuralNet
        The trained net; ``net_.module_`` is the network.

    backbone_ : torch.nn.Module
        Copy of the trained backbone, on the CPU.

    weights_ : dict of str to ndarray
        The network's weights and the other arrays behind predictions (but for a head that is not
        this package's); can be assigned to.

    history_ : list of dict
        Per epoch: number, seconds (``dur``), ``train_loss``, where the loss has several terms
        ``train_<term>``, where training has several stages ``stage``, and with early stopping
        ``valid_score``.

    n_iter_ : int
        Epochs trained.

    image_shape_ : tuple of int
        Shape of one image, ``(C, *spatial)``, or ``(d,)`` for vectors.

    pixel_mean_, pixel_std_ : ndarray of shape (C,)
        Normalisation of each channel, from the training images; uint8 counts as [0, 1].

    pixel_range_ : str, float or None
        "uint8", or the largest absolute value of float images: guards against images that are 255
        times too bright or too dark later on, lazy ones included.

    best_score_ : float
        Validation score of the epoch kept; only with early stopping.

    random_seed_ : int
        Seed drawn from `random_state`.

    n_samples_fit_ : int
        Images given to the first ``fit``.

    n_features_in_ : int
        Values per image.

    feature_names_in_ : ndarray of shape (n_features_in_,)
        Column names where X was a DataFrame."""

_ENCODER_HISTORY = """\
history_ : list of dict
        Per epoch: number, seconds (``dur``), ``train_loss`` and further ``train_<term>``, the
        collapse monitors ``feature_std`` (1: features fill the sphere, 0: collapsed) and
        ``effective_rank``, and with labels ``knn_score``."""


_LABELLED_ATTRIBUTES = ("classes_", "class_counts_", "best_score_")


def _joined(entries: dict[str, str], leave_out: tuple[str, ...] = ()) -> str:
    return "\n\n    ".join(text for name, text in entries.items() if name not in leave_out)


_attributes = {text.split(" :")[0].strip(): text.strip() for text in _ATTRIBUTES.split("\n\n")}
_SHARED = {
    "backbone": _BACKBONE,
    "pretrain": _PRETRAIN,
    "pretrain_amimv": _PRETRAIN_AMIMV,
    "training": _joined(_TRAINING),
    "attributes": _joined(_attributes),
    "encoder_training": _joined(_TRAINING | _ENCODER, _LABELLED),
    "encoder_attributes": _joined(
        _attributes | {"history_": _ENCODER_HISTORY}, _LABELLED_ATTRIBUTES
    ),
}

T = TypeVar("T", bound=type)


def shared_parameters(cls: T) -> T:
    """Fill the placeholders of a class docstring with the shared text."""
    if cls.__doc__ is not None:
        cls.__doc__ = cls.__doc__.format(
            **{name: text.replace("{{", "{").replace("}}", "}") for name, text in _SHARED.items()}
        )
    return cls
