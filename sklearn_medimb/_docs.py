"""Text of the constructor parameters and attributes that every classifier shares."""

from __future__ import annotations

from typing import TypeVar

_SHARED = {
    "backbone": """\
backbone : str, Backbone, nn.Module or class, default="auto"
        Network that encodes images: "auto" (an MLP for vectors, a small conv net for images, a
        ResNet-18 for 5,000 images or more of at least 48 pixels), a name from
        ``sklearn_medimb.backbones.BACKBONES``, "monai:<name>", "timm:<name>", a spec such as
        ``ResNet(depth=18)`` whose parameters are searchable as ``backbone__depth``, or any
        ``nn.Module``, class or instance.""",
    "training": """\
max_epochs : int or "auto", default="auto"
        Passes over the training images. "auto" aims at 180 steps and 60 more per class, up to
        17 classes (a third of that for vectors), and at least 10 epochs.

    lr : float, default=2e-3
        Peak learning rate of AdamW.

    weight_decay : float, default=1e-2
        Decoupled weight decay.

    lr_schedule : {{"one_cycle", "cosine", "constant"}}, default="one_cycle"
        Course of the learning rate.

    augment : {{"none", "light", "medical", "strong"}}, Augmentation or None, default="medical"
        Random changes of each training image; see :mod:`sklearn_medimb.augment`. "medical" flips
        both ways: choose "light" or "none" where left and right or up and down carry the class.
        Feature vectors are never augmented.

    sampler : imbalanced-learn sampler or None, default=None
        Resamples the training rows *after* the inner validation split.

    early_stopping : bool, default=False
        Hold out a stratified validation split, stop when `scoring` no longer rises, and keep the
        best epoch's weights.

    validation_fraction : float, default=0.2
        Share of that split.

    n_iter_no_change : int, default=10
        Epochs without a rise before stopping.

    scoring : str or callable, default="balanced_accuracy"
        scikit-learn scorer for early stopping.

    callbacks : list of skorch callbacks or None, default=None
        Cloned before use.

    checkpoint_dir : path-like or None, default=None
        Write the state after each epoch. After a crash, ``fit`` with the same parameters and data
        resumes there; a finished fit removes its file. Fits can share the directory.

    image_shape : tuple of int or None, default=None
        Shape of one image where X holds flattened ones: ``(H, W)``, ``(C, H, W)``,
        ``(C, D, H, W)``.

    data_format : {{"auto", "channels_first", "channels_last"}}, default="auto"
        Where the channel axis is.

    spatial_dims : {{2, 3}} or None, default=None
        3 reads 4-D X as gray volumes ``(n, D, H, W)``.

    device : str or torch.device, default="auto"
        "auto" takes a CUDA GPU where there is one.

    precision : {{"auto", "float32", "bf16", "float64"}}, default="auto"
        "auto" runs the backbone of image networks in bfloat16 where the hardware does natively.

    compile : bool, default=False
        Pass the network through ``torch.compile``.

    warm_start : bool, default=False
        Whether a further ``fit`` goes on from the present weights.

    net_params : dict or None, default=None
        Further keywords for the :class:`skorch.NeuralNet` inside, such as
        ``{{"optimizer": torch.optim.SGD}}``.

    random_state : int, RandomState or None, default=None
        Seeds everything; the global generators stay untouched.

    verbose : int, default=0
        1 shows a progress bar with loss, validation score and time left.""",
    "attributes": """\
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
        "uint8", or the largest training value of float images: guards against images that are 255
        times too bright at predict.

    best_score_ : float
        Validation score of the epoch kept; only with early stopping.

    random_seed_ : int
        Seed drawn from `random_state`.

    n_samples_fit_ : int
        Images given to the first ``fit``.

    n_features_in_ : int
        Values per image.

    feature_names_in_ : ndarray of shape (n_features_in_,)
        Column names where X was a DataFrame.""",
}

T = TypeVar("T", bound=type)


def shared_parameters(cls: T) -> T:
    """Fill the placeholders of a class docstring with the shared text."""
    if cls.__doc__ is not None:
        cls.__doc__ = cls.__doc__.format(
            **{name: text.replace("{{", "{").replace("}}", "}") for name, text in _SHARED.items()}
        )
    return cls
