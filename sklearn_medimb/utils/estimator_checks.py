"""Checks of image estimators: what scikit-learn's ``check_estimator`` cannot see.

scikit-learn's own suite feeds feature vectors. This one feeds images: every layout of the axes,
containers that load on demand, rare classes, patients, persistence and random states.

>>> from sklearn_medimb import SoftmaxClassifier
>>> from sklearn_medimb.backbones import ConvNet
>>> from sklearn_medimb.utils.estimator_checks import check_image_estimator
>>> tiny = SoftmaxClassifier(ConvNet(widths=(4, 8)), max_epochs=2, batch_size=8)
>>> check_image_estimator(tiny)  # doctest: +SKIP

The estimator comes as its user configured it, small and fast. The checks set no more than
``random_state``, ``image_shape``, ``image_size``, ``data_format``, ``spatial_dims``,
``early_stopping``, ``scoring``, ``warm_start`` and ``precision``, always on a clone, and leave out
what an estimator does not have.
Checks that compare two computations which round differently ask for float64.
"""

from __future__ import annotations

import importlib
import io
import pickle
import random
import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from functools import partial
from inspect import signature
from numbers import Integral
from typing import Any
from unittest import SkipTest

import joblib
import numpy as np
import torch
from imblearn.base import is_sampler
from sklearn.base import clone, is_classifier
from sklearn.exceptions import NotFittedError, SkipTestWarning
from sklearn.model_selection import PredefinedSplit, cross_val_score, cross_validate
from sklearn.utils import get_tags
from sklearn.utils._testing import raises

from sklearn_medimb._machine.runtime import resolve_device

# The same images in another memory layout are summed in another order: 1e-16, which the training
# of a few epochs amplifies.
ROUNDING = 1e-8

# Colour images: no two axes are equally long, so that every mix-up of axes shows.
N_IMAGES, CHANNELS, HEIGHT, WIDTH = 24, 3, 10, 12

# Pixels of all images that may be in memory at once beyond a training batch.
MAX_PIXELS = 2**18


# -------------------------------------------------------------------- the suite


def check_image_estimator(estimator: Any) -> None:
    """Run every image check on an estimator.

    Parameters
    ----------
    estimator : estimator instance
        As its user configures it, with a tiny network and few epochs: some sixty fits of up to a
        few dozen images follow. It is cloned, never changed.

    Raises
    ------
    Exception
        Whatever the first failing check raises. A check that cannot run here, because an optional
        package is missing, gives a :class:`sklearn.exceptions.SkipTestWarning` instead.

    See Also
    --------
    parametrize_with_image_checks : The same as one pytest test per check.
    sklearn.utils.estimator_checks.check_estimator : scikit-learn's own suite.
    """
    for candidate, check in image_checks(estimator):
        try:
            check(candidate)
        except SkipTest as reason:
            warnings.warn(str(reason), SkipTestWarning, stacklevel=2)


def image_checks(estimator: Any) -> Iterator[tuple[Any, partial[None]]]:
    """Yield every check that applies, each with a fresh clone of the estimator.

    Parameters
    ----------
    estimator : estimator instance
        A classifier, an encoder with ``fit`` and ``transform``, to which the checks of labels do
        not apply, a stateless transformer, spared those of what is learnt as well, or a sampler
        of images.

    Yields
    ------
    estimator : estimator instance
        A clone.
    check : functools.partial
        Called with the clone; ``check.func`` is the public function.
    """
    name = type(estimator).__name__
    if is_sampler(estimator):
        checks = SAMPLER_CHECKS
    elif is_classifier(estimator):
        checks = STATELESS_CHECKS + LEARNING_CHECKS + LABEL_CHECKS
    else:
        checks = STATELESS_CHECKS
        if get_tags(estimator).requires_fit:
            checks += LEARNING_CHECKS
    for check in checks:
        yield clone(estimator), partial(check, name)


def parametrize_with_image_checks(estimators: Iterable[Any]) -> Any:
    """Make one pytest test per estimator and check.

    Parameters
    ----------
    estimators : iterable of estimator instances
        As for :func:`check_image_estimator`.

    Returns
    -------
    decorator : pytest.MarkDecorator
        For a test function with the arguments ``estimator`` and ``check``, whose body is
        ``check(estimator)``.
    """
    import pytest

    return pytest.mark.parametrize(
        ("estimator", "check"),
        [
            pytest.param(candidate, check, id=f"{check.args[0]}-{check.func.__name__}")
            for estimator in estimators
            for candidate, check in image_checks(estimator)
        ],
    )


# -------------------------------------------------------------------- material


def make_images(
    n_images: int = N_IMAGES,
    shape: tuple[int, ...] = (CHANNELS, HEIGHT, WIDTH),
    n_classes: int = 3,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw noisy images whose brightness depends on their class.

    Parameters
    ----------
    n_images : int
        Number of images.
    shape : tuple of int
        Shape of one image.
    n_classes : int
        Classes, which take turns.

    Returns
    -------
    X : ndarray of float32 of shape (n_images, *shape)
        Values between 0 and 1.
    y : ndarray of int of shape (n_images,)
        ``0, 1, ..., n_classes - 1, 0, 1, ...``.
    """
    y = np.arange(n_images) % n_classes
    noise = np.random.default_rng(0).random((n_images, *shape), dtype=np.float32)
    brightness = (y / n_classes).astype(np.float32).reshape(-1, *[1] * len(shape))
    return (noise + brightness) / 2, y


class LazyImages:
    """A container that hands out one image at a time and keeps books about it.

    ``X[i]`` with an integer is an image; ``X[rows]`` and ``X[rows, ...]`` with an index array are
    further such containers, which share the books. Conversion to an array is refused.

    Parameters
    ----------
    images : ndarray of shape (n, ...)
        What it pretends to have on disk.
    fail_after : int, default=None
        Number of reads after which every further one raises an :class:`OSError`.

    Attributes
    ----------
    n_reads : int
        Images handed out so far.
    peak : int
        Largest number of images that lived at the same time.
    was_converted : bool
        Whether someone asked for all of it as an array.
    """

    def __init__(self, images: np.ndarray, fail_after: int | None = None) -> None:
        self._images = images
        self._rows = np.arange(len(images))
        self._books = {"n_reads": 0, "alive": 0, "peak": 0, "was_converted": 0}
        self._fail_after = fail_after
        self.shape = images.shape
        self.ndim = images.ndim
        self.dtype = images.dtype

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, tuple):
            key, ellipsis = key
            assert ellipsis is Ellipsis, "LazyImages is indexed by rows only."
        if isinstance(key, Integral):
            return self._read(self._rows[key])
        view = LazyImages(self._images, self._fail_after)
        view._rows, view._books = self._rows[key], self._books
        view.shape = (len(view), *self.shape[1:])
        return view

    def _read(self, row: int) -> np.ndarray:
        books = self._books
        if self._fail_after is not None and books["n_reads"] >= self._fail_after:
            raise OSError("the disk is gone")
        image = self._images[row].copy()
        books["n_reads"] += 1
        books["alive"] += 1
        books["peak"] = max(books["peak"], books["alive"])
        weakref.finalize(image, self._release)
        return image

    def _release(self) -> None:
        self._books["alive"] -= 1

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        self._books["was_converted"] = 1
        raise AssertionError("A lazy X was converted to an array: read it row by row instead.")

    @property
    def n_reads(self) -> int:
        """Images handed out so far."""
        return self._books["n_reads"]

    @property
    def peak(self) -> int:
        """Largest number of images that lived at the same time."""
        return self._books["peak"]

    @property
    def was_converted(self) -> bool:
        """Whether someone asked for all of it as an array."""
        return bool(self._books["was_converted"])


def _prepare(estimator: Any, **params: Any) -> Any:
    """Clone, with neutral layout parameters, a seed, and those of `params` that it has."""
    layout = {"image_shape": None, "image_size": None, "data_format": "auto", "spatial_dims": None}
    wanted = {"random_state": 0, **layout, **params}
    known = estimator.get_params(deep=False)
    return clone(estimator).set_params(**{k: v for k, v in wanted.items() if k in known})


def _require(estimator: Any, parameter: str) -> None:
    if parameter not in estimator.get_params(deep=False):
        raise SkipTest(f"{type(estimator).__name__} has no parameter {parameter}.")


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SkipTest(f"{module} is not installed.") from error


def _output(estimator: Any, X: Any) -> np.ndarray:
    """Ask an estimator for what it says of images, in numbers, one row each."""
    method = "predict_proba" if hasattr(estimator, "predict_proba") else "transform"
    return np.reshape(getattr(estimator, method)(X), (len(X), -1))


def _output_methods(estimator: Any) -> list[Callable[[Any], np.ndarray]]:
    names = ("predict", "predict_proba", "decision_function", "transform")
    return [getattr(estimator, name) for name in names if hasattr(estimator, name)]


def _on_cpu(estimator: Any) -> bool:
    return resolve_device(getattr(estimator, "device", "cpu")).type == "cpu"


def _assert_equal(actual: Any, expected: Any, message: str) -> None:
    """Bit for bit."""
    np.testing.assert_array_equal(actual, expected, err_msg=message)


def _assert_close(actual: Any, expected: Any, message: str) -> None:
    """Up to rounding in float64."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=ROUNDING, err_msg=message)


def _assert_same_fit(estimator: Any, actual: Any, expected: Any, message: str) -> None:
    """Two fits on the same values: exact, but for GPUs, which sum in an order of their own."""
    (_assert_equal if _on_cpu(estimator) else _assert_close)(actual, expected, message)


def _refusal(match: str, message: str) -> AbstractContextManager[Any]:
    """Demand a ValueError whose text matches `match`; `message` says what is wrong otherwise."""
    return raises(ValueError, match=match, err_msg=message)


# -------------------------------------------------------------------- layouts of X


def check_channel_layouts(name: str, estimator: Any) -> None:
    """Demand one result for channels first, channels last and flattened images.

    How a caller stores the axes says nothing about the images. A difference means that two axes
    are taken for each other somewhere, which still trains, only worse.
    """
    first, y = make_images()
    last = np.moveaxis(first, 1, -1)
    variants: list[tuple[str, np.ndarray, dict[str, Any]]] = [
        ("(n, H, W, C)", last, {}),
        ('data_format="channels_first"', first, {"data_format": "channels_first"}),
        ('data_format="channels_last"', last, {"data_format": "channels_last"}),
        ("flat (C, H, W)", first.reshape(len(y), -1), {"image_shape": first.shape[1:]}),
        ("flat (H, W, C)", last.reshape(len(y), -1), {"image_shape": last.shape[1:]}),
    ]
    expected = _output(_prepare(estimator, precision="float64").fit(first, y), first)
    for what, X, params in variants:
        fitted = _prepare(estimator, precision="float64", **params).fit(X, y)
        message = f"{name} gives other results for {what} than for (n, C, H, W): mind the axes."
        _assert_close(_output(fitted, X), expected, message)


def check_gray_images(name: str, estimator: Any) -> None:
    """Demand one result for (n, H, W) and (n, 1, H, W).

    A missing channel axis means one channel. It must not become a batch of vectors, or be repeated
    to three channels in one case only.
    """
    X, y = make_images(shape=(HEIGHT, WIDTH))
    gray = _prepare(estimator, precision="float64").fit(X, y)
    channel = _prepare(estimator, precision="float64").fit(X[:, None], y)
    message = f"{name} reads (n, H, W) otherwise than (n, 1, H, W): add the channel axis."
    _assert_close(_output(gray, X), _output(channel, X[:, None]), message)
    _assert_close(_output(gray, X[:, None]), _output(gray, X), message)


def check_uint8_images(name: str, estimator: Any) -> None:
    """Demand one result for uint8 images and the same divided by 255.

    Images come from files as uint8 and from pipelines as floats in [0, 1]. A model fitted on one
    and asked about the other must not see values 255 times too large.
    """
    X, y = make_images()
    X = (255 * X).astype(np.uint8)
    scaled = X / 255
    fitted = _prepare(estimator, precision="float64").fit(X, y)
    expected = _output(_prepare(estimator, precision="float64").fit(scaled, y), scaled)
    message = f"{name} reads uint8 images otherwise than floats: divide them by 255, once."
    _assert_close(_output(fitted, X), expected, message)
    _assert_close(_output(fitted, scaled), expected, message)
    _assert_close(_output(fitted, LazyImages(X)), expected, f"Lazy: {message}")
    flat = _prepare(estimator, precision="float64", image_shape=X.shape[1:])
    flat.fit(X.reshape(len(X), -1), y)
    _assert_close(_output(flat, X.reshape(len(X), -1)), expected, f"Flattened: {message}")


def check_pixel_scale_at_predict(name: str, estimator: Any) -> None:
    """Demand a ValueError for images 255 times brighter or darker than those of fit.

    A network that has seen one scale gives the same answer to every image of the other. What is
    read on demand must be checked as it is read.
    """
    X, y = make_images()
    X = (255 * X).astype(np.uint8)
    floats = X.astype(float)
    on_uint8 = _prepare(estimator).fit(X, y)
    on_floats = _prepare(estimator).fit(LazyImages(floats), y)
    cases = {
        "floats from 0 to 255 after uint8": (on_uint8, floats),
        "uint8 after lazy floats from 0 to 255": (on_floats, X),
        "floats in [0, 1] after lazy floats from 0 to 255": (on_floats, X / 255),
    }
    for what, (fitted, asked) in cases.items():
        for images in (asked, LazyImages(asked)):
            for method in _output_methods(fitted):
                message = f"{name}.{method.__name__} must refuse {what} by a ValueError."
                with _refusal("(?i)uint8|float|scale", message):
                    method(images)


def check_image_size_at_predict(name: str, estimator: Any) -> None:
    """Demand a ValueError for images of another size than in fit.

    Networks that pool globally take any size without a word, and their answers are then worthless.
    The number of values may even agree, when height and width are swapped.
    """
    X, y = make_images()
    fitted = _prepare(estimator, data_format="channels_first").fit(X, y)
    wrong = {
        "height and width swapped": X.swapaxes(2, 3),
        "a column less": X[..., 1:],
        "a channel less": X[:, 1:],
    }
    for what, images in wrong.items():
        for method in _output_methods(fitted):
            message = (
                f"{name}.{method.__name__} must refuse images with {what} by a ValueError that "
                f"names the shape seen in fit, {X.shape[1:]}."
            )
            with _refusal(rf"{CHANNELS}, {HEIGHT}, {WIDTH}", message):
                method(images)


def check_volumes(name: str, estimator: Any) -> None:
    """Demand one result for (n, 1, D, H, W) and, with ``spatial_dims=3``, (n, D, H, W).

    Gray volumes without a channel axis have as many axes as colour images, so only the parameter
    tells them apart.
    """
    X, y = make_images(n_images=12, shape=(6, 8, 10))
    _require(estimator, "spatial_dims")
    volume = _prepare(estimator, precision="float64").fit(X[:, None], y)
    gray = _prepare(estimator, precision="float64", spatial_dims=3).fit(X, y)
    message = f"{name} must read (n, D, H, W) with spatial_dims=3 as (n, 1, D, H, W)."
    _assert_close(_output(gray, X), _output(volume, X[:, None]), message)


def check_memory_order(name: str, estimator: Any) -> None:
    """Demand one result for Fortran-ordered, strided, reversed and read-only arrays.

    Slices, transposes and read-only memory maps are ordinary arrays to their owner; none may be
    refused, written to, or read in the order of its memory.
    """
    X, y = make_images()
    expected = _output(_prepare(estimator, precision="float64").fit(X, y), X)
    read_only = X.copy()
    read_only.flags.writeable = False
    variants = {
        "Fortran-ordered": np.asfortranarray(X),
        "strided": np.repeat(X, 2, axis=-1)[..., ::2],
        "reversed": np.ascontiguousarray(X[..., ::-1])[..., ::-1],
        "read-only": read_only,
    }
    for what, images in variants.items():
        fitted = _prepare(estimator, precision="float64").fit(images, y)
        message = f"{name} gives other results for a {what} X: copy it where order matters."
        _assert_close(_output(fitted, images), expected, message)


def check_lists_and_tensors(name: str, estimator: Any) -> None:
    """Demand that lists of images and torch tensors count as arrays.

    That is how images arrive from readers and from torch code; a list is stacked, a tensor read
    without its graph.
    """
    X, y = make_images()
    expected = _output(_prepare(estimator, precision="float64").fit(X, y), X)
    tensor = torch.from_numpy(X)
    variants = {
        "list of arrays": list(X),
        "list of tensors": list(tensor),
        "tensor": tensor,
        "tensor with gradient": tensor.clone().requires_grad_(),
    }
    for what, images in variants.items():
        fitted = _prepare(estimator, precision="float64").fit(images, y)
        message = f"{name} gives other results for a {what} than for the array of the same images."
        _assert_same_fit(fitted, _output(fitted, images), expected, message)


def check_lists_that_mix_scales(name: str, estimator: Any) -> None:
    """Demand that uint8 images among floats in [0, 1] are scaled, or refused by their row.

    Readers give one kind of file as uint8 and another as floats. Stacked as they are, some images
    are 255 times as bright as the others, and training goes on as if nothing were wrong.
    """
    X, y = make_images()
    X = (255 * X).astype(np.uint8)
    scaled = X / 255
    mixed = _mixed_scales(X, scaled)
    expected = _output(_prepare(estimator, precision="float64").fit(scaled, y), scaled)
    with _scaled_or_refused(name):
        fitted = _prepare(estimator, precision="float64").fit(mixed, y)
        message = f"{name} stacks uint8 images and floats as they are: divide the former by 255."
        _assert_same_fit(fitted, _output(fitted, mixed), expected, message)


def _mixed_scales(X: np.ndarray, scaled: np.ndarray) -> list[np.ndarray]:
    return [scaled[row] if row % 5 == 3 else image for row, image in enumerate(X)]


@contextmanager
def _scaled_or_refused(name: str) -> Iterator[None]:
    """Accept a ValueError that names a row."""
    try:
        yield
    except ValueError as error:
        message = f"{name} refuses images on mixed scales without naming the row: {error}"
        if not re.search(r"(?i)\brow\D*\d", str(error)):
            raise AssertionError(message) from error


# -------------------------------------------------------------------- lazy containers


def check_lazy_images_stay_lazy(name: str, estimator: Any) -> None:
    """Demand that a lazy container is never held in memory as a whole.

    Collections larger than memory are why such containers exist. Not even normalisation or
    prediction may hold more images at once than a training batch or a quarter of a million pixels.
    """
    side = 128
    allowed = max(getattr(estimator, "batch_size", 1), MAX_PIXELS // side**2)
    images, y = make_images(n_images=allowed + 8, shape=(side, side))
    X = LazyImages(images)
    fitted = _prepare(estimator).fit(X, y)
    peaks = {"fit": X.peak}
    for method in _output_methods(fitted):
        X = LazyImages(images)
        method(X)
        peaks[method.__name__] = X.peak
    greedy = {method: peak for method, peak in peaks.items() if peak > allowed}
    assert not greedy, (
        f"{name} may hold {allowed} of {len(images)} images of a lazy X in memory at once, but "
        f"held {greedy}: read them in blocks whose size depends on that of the images."
    )


def check_lazy_images_same_as_array(name: str, estimator: Any) -> None:
    """Demand one result for a lazy container and the array behind it.

    Where images are kept says nothing about them; and an image must be met by its own label, in
    whatever order it is read.
    """
    images, y = make_images()
    expected = _output(_prepare(estimator, precision="float64").fit(images, y), images)
    X = LazyImages(images)
    fitted = _prepare(estimator, precision="float64").fit(X, y)
    message = f"{name} gives other results for a lazy X than for the array of the same images."
    _assert_same_fit(fitted, _output(fitted, X), expected, message)
    _assert_same_fit(fitted, _output(fitted, images), expected, message)
    assert not X.was_converted, f"{name} converted a lazy X to an array: read it row by row."


def check_lazy_images_in_cross_validation(name: str, estimator: Any) -> None:
    """Demand that a lazy container goes through cross-validation without being read as a whole.

    scikit-learn cuts it into further containers, which know nothing but what indexing by rows
    gives them.
    """
    images, y = make_images()
    prepared = _prepare(estimator, precision="float64")
    X = LazyImages(images)
    options: dict[str, Any] = {"cv": 2, "error_score": "raise"}
    if not hasattr(prepared, "score"):
        options["scoring"] = lambda fitted, X, _=None: float(_output(fitted, X).mean())
    scores = cross_val_score(prepared, X, y, **options)
    assert not X.was_converted, f"{name} converted a lazy X to an array: read it row by row."
    message = f"{name} has other cross-validation scores for a lazy X than for the array."
    _assert_same_fit(prepared, scores, cross_val_score(prepared, images, y, **options), message)


# -------------------------------------------------------------------- samples


def check_one_image(name: str, estimator: Any) -> None:
    """Demand the same answer for an image alone as among others.

    Otherwise the answer depends on the company, by statistics of the batch or a squeezed axis. The
    tolerance is that of matrix products of another size.
    """
    X, y = make_images()
    fitted = _prepare(estimator, precision="float64").fit(X, y)
    message = f"{name} gives an image another result alone than among others."
    _assert_close(_output(fitted, X[:1]), _output(fitted, X)[:1], message)


def check_sample_order(name: str, estimator: Any) -> None:
    """Demand that the result of permuted images is the permuted result.

    Rows come back in the order in which they were given, however they were batched.
    """
    X, y = make_images()
    fitted = _prepare(estimator, precision="float64").fit(X, y)
    order = np.random.default_rng(0).permutation(len(X))
    for method in _output_methods(fitted):
        result, permuted = method(X), method(X[order])
        message = f"{name}.{method.__name__} does not keep the order of the images."
        same = _assert_close if result.dtype.kind == "f" else _assert_equal
        same(permuted, result[order], message)


def check_non_finite_images(name: str, estimator: Any) -> None:
    """Demand a ValueError that names the row of an image with NaN or infinity.

    One broken file among thousands makes every weight NaN; the message must say which. That holds
    for lazy containers too, which show the image only when it is read.
    """
    X, y = make_images()
    fitted = _prepare(estimator).fit(X, y)
    row = 17
    for value, word in ((np.nan, "NaN"), (np.inf, "inf"), (-np.inf, "inf")):
        broken = X.copy()
        broken[row, 0, 0, 0] = value
        for what, images in (("X", broken), ("a lazy X", LazyImages(broken))):
            message = f"must refuse {value} in {what} by a ValueError with '{word}' and row {row}."
            pattern = rf"(?i){word}.*\b{row}\b"
            if images is broken or get_tags(estimator).requires_fit:  # else fit need not read
                with _refusal(pattern, f"{name}.fit {message}"):
                    _prepare(estimator).fit(images, y)
            with _refusal(pattern, f"{name} {message}"):
                _output(fitted, images)


def check_constant_images(name: str, estimator: Any) -> None:
    """Demand finite results for images without any contrast.

    Black frames and masked channels have standard deviation 0: neither normalisation nor saliency
    may divide by it.
    """
    y = np.arange(12) % 2
    for value in (0.0, 0.5):
        X = np.full((12, CHANNELS, HEIGHT, WIDTH), value, dtype=np.float32)
        fitted = _prepare(estimator).fit(X, y)
        for method in _output_methods(fitted):
            result = method(X)
            assert result.dtype.kind != "f" or np.isfinite(result).all(), (
                f"{name}.{method.__name__} is not finite for images that are {value} everywhere: "
                "guard the division by their standard deviation."
            )


def check_fewer_images_than_batch_size(name: str, estimator: Any) -> None:
    """Demand that a set smaller than one batch trains.

    It is one short batch; a loop that drops the last incomplete batch would learn nothing.
    """
    n_images = max(2, min(6, getattr(estimator, "batch_size", 7) - 1))
    X, y = make_images(n_images=n_images, n_classes=2)
    try:
        result = _output(_prepare(estimator).fit(X, y), X)
    except ValueError as error:
        raise AssertionError(
            f"{name} refuses {n_images} images, fewer than batch_size: make them one batch."
        ) from error
    assert len(result) == n_images
    assert np.isfinite(result).all(), f"{name} is not finite after a fit on {n_images} images."


# -------------------------------------------------------------------- labels


def check_label_types(name: str, estimator: Any) -> None:
    """Demand that labels may be strings or any integers.

    Diagnoses are names and grades are codes with gaps. What they are called must not change the
    probabilities, and predictions are given in the caller's own terms.
    """
    X, y = make_images()
    expected = _prepare(estimator, precision="float64").fit(X, y).predict_proba(X)
    for labels in (
        np.array(["benign", "malignant", "normal"]),
        np.array(["benign", "malignant", "normal"], dtype=object),
        np.array([3, 7, 20]),
    ):
        fitted = _prepare(estimator, precision="float64").fit(X, labels[y])
        _assert_equal(fitted.classes_, labels, f"{name}.classes_ must hold the labels, sorted.")
        proba = fitted.predict_proba(X)
        message = f"{name}: probabilities depend on what the classes are called; encode them."
        _assert_same_fit(fitted, proba, expected, message)
        message = f"{name}.predict must return the labels of y, {labels}, not their codes."
        _assert_equal(fitted.predict(X), labels[proba.argmax(axis=1)], message)


def check_class_with_one_sample(name: str, estimator: Any) -> None:
    """Demand that a class with a single image is kept, with early stopping too.

    The tail of a long-tailed set is that short. The one image belongs to the training part, since
    a class that only validates can never be learned.
    """
    X, y = make_images()
    y = y % 2
    y[5] = 2
    for early_stopping in (False, True):
        fitted = _prepare(estimator, early_stopping=early_stopping).fit(X, y)
        proba = fitted.predict_proba(X)
        _assert_equal(
            fitted.classes_,
            [0, 1, 2],
            f"{name} loses a class with one sample when early_stopping={early_stopping}.",
        )
        assert proba.shape == (len(X), 3)
        assert np.isfinite(proba).all(), f"{name}: a class with one sample makes proba not finite."


def check_class_missing_from_fold(name: str, estimator: Any) -> None:
    """Demand that columns of probabilities follow the classes of the fold that was fitted.

    Rare classes are absent from some training folds. Nothing but ``classes_`` may then say how
    many classes there are.
    """
    X, y = make_images()
    folds = np.where(y == 2, 0, np.arange(len(y)) // 3 % 2)  # all of class 2 is in fold 0
    cv = PredefinedSplit(folds)
    results = cross_validate(
        _prepare(estimator), X, y, cv=cv, return_estimator=True, error_score="raise"
    )
    for fitted, (train, test) in zip(results["estimator"], cv.split(), strict=True):
        classes = np.unique(y[train])
        _assert_equal(fitted.classes_, classes, f"{name}.classes_ must be those of the fold.")
        proba = fitted.predict_proba(X[test])
        assert proba.shape == (len(test), len(classes)), (
            f"{name}.predict_proba has {proba.shape[1]} columns in a fold of {len(classes)} "
            "classes: they must follow classes_."
        )
        message = f"{name}.predict does not follow the columns of predict_proba."
        _assert_equal(fitted.predict(X[test]), classes[proba.argmax(axis=1)], message)


def check_groups_stay_whole(name: str, estimator: Any) -> None:
    """Demand that early stopping never validates on a patient that it trains on.

    Images of one patient are near-copies, so a split through a patient measures memory. A scorer
    that notes which images it is shown tells what was held out.
    """
    _require(estimator, "early_stopping")
    _require(estimator, "scoring")
    X, y = make_images()
    X[:, 0, 0, 0] = np.arange(len(X)) / len(X)  # a mark to know each image by
    groups = np.array([f"patient {row % 8}" for row in range(len(X))])
    y = np.arange(len(X)) % 8 % 2
    shown: list[frozenset[int]] = []

    # A function, which clone leaves as it is: a callable object would be copied with its notes.
    def scoring(_fitted: Any, X_held: Any, _y_held: Any) -> float:
        shown.append(frozenset(np.rint(X_held[:, 0, 0, 0] * len(X)).astype(int).tolist()))
        return 0.0

    for seed in range(2):
        params = {"early_stopping": True, "scoring": scoring, "random_state": seed}
        _prepare(estimator, **params).fit(X, y, groups=groups)
    assert shown, f"{name} never called scoring although early_stopping=True."
    for held in set(shown):
        split = set(groups[list(held)]) & set(np.delete(groups, list(held)))
        assert not split, (
            f"{name} holds out some images of {sorted(split)} and trains on others: pass groups "
            "on to the validation split."
        )


# -------------------------------------------------------------------- persistence


def check_clone(name: str, estimator: Any) -> None:
    """Demand that a clone of a fitted estimator is not fitted, and fits to the same result.

    A clone carries parameters and nothing else; everything that a fit depends on must be among
    them.
    """
    X, y = make_images()
    fitted = _prepare(estimator, precision="float64").fit(X, y)
    copy = clone(fitted)
    with raises(NotFittedError, err_msg=f"A clone of a fitted {name} must not be fitted."):
        _output(copy, X)
    message = f"A clone of {name} fits to another result: hold its state in parameters."
    _assert_same_fit(fitted, _output(copy.fit(X, y), X), _output(fitted, X), message)


def _check_copy(name: str, estimator: Any, how: str, copy: Callable[[Any], Any]) -> None:
    """Demand that a stored estimator answers bit for bit as the original."""
    X, y = make_images()
    fitted = _prepare(estimator).fit(X, y)
    expected = _output(fitted, X)
    loaded = copy(fitted)
    message = f"{name} gives other results after {how}: store all that predict reads."
    _assert_equal(_output(loaded, X), expected, message)
    _assert_equal(_output(fitted, X), expected, f"{how} changed the {name} that was stored.")
    assert str(loaded.get_params()) == str(fitted.get_params()), (
        f"{name} has other parameters after {how}."
    )


def check_pickle(name: str, estimator: Any) -> None:
    """Demand that pickle keeps the results, bit for bit.

    Parallel searches send estimators between processes that way.
    """
    _check_copy(name, estimator, "pickle", lambda fitted: pickle.loads(pickle.dumps(fitted)))  # noqa: S301


def check_joblib(name: str, estimator: Any) -> None:
    """Demand that joblib keeps the results, bit for bit.

    It is how scikit-learn models are usually written to disk, and stores arrays on its own path.
    """

    def copy(fitted: Any) -> Any:
        file = io.BytesIO()
        joblib.dump(fitted, file)
        file.seek(0)
        return joblib.load(file)

    _check_copy(name, estimator, "joblib", copy)


def check_skops(name: str, estimator: Any) -> None:
    """Demand that skops keeps the results and asks for trust in nothing but the package.

    A file from another hospital must not run code. Types of torch or skorch in the fitted
    attributes hide a pickle, and with it any code.
    """
    skops = _import("skops.io")
    own = {"sklearn_medimb", type(estimator).__module__.partition(".")[0]}

    def copy(fitted: Any) -> Any:
        data = skops.dumps(fitted)
        types = skops.get_untrusted_types(data=data)
        foreign = [kind for kind in types if kind.partition(".")[0] not in own]
        assert not foreign, (
            f"A skops file of {name} asks for trust in {foreign}: keep fitted attributes to "
            "numbers, strings and NumPy arrays."
        )
        return skops.loads(data, trusted=types)

    _check_copy(name, estimator, "skops", copy)


def check_safetensors(name: str, estimator: Any) -> None:
    """Demand that ``weights_`` goes through safetensors and, assigned, gives the results back.

    Weights leave scikit-learn that way. They must be NumPy arrays and hold all that predictions
    come from, so that a model fitted otherwise becomes the saved one.
    """
    safetensors = _import("safetensors.numpy")
    X, y = make_images()
    fitted = _prepare(estimator).fit(X, y)
    expected = _output(fitted, X)
    other = _prepare(estimator).set_params(random_state=1).fit(X // 2, y)
    assert not np.array_equal(_output(other, X), expected), (
        f"{name}: two models fitted to different images give the same results."
    )
    other.weights_ = safetensors.load(safetensors.save(fitted.weights_))
    message = f"{name}.weights_ does not hold everything that predictions come from."
    _assert_equal(_output(other, X), expected, message)


# -------------------------------------------------------------------- random states and failures


def check_repeatable(name: str, estimator: Any) -> None:
    """Demand that two fits with the same ``random_state`` agree, at the user's own precision.

    Between them the global generators move on, and the second fit reuses a fitted estimator:
    neither may leave a trace.
    """
    X, y = make_images()
    params = {} if _on_cpu(estimator) else {"precision": "float64"}
    fitted = _prepare(estimator, **params).fit(X, y)
    expected = _output(fitted, X)
    random.random(), np.random.random(), torch.rand(1)  # noqa: NPY002, S311
    message = f"{name} depends on more than random_state: draw from a generator made of it."
    again = _prepare(estimator, **params).fit(X, y)
    _assert_same_fit(fitted, _output(again, X), expected, message)
    message = f"{name} fits otherwise the second time: start anew in each fit."
    _assert_same_fit(fitted, _output(fitted.fit(X, y), X), expected, message)


def check_global_random_state(name: str, estimator: Any) -> None:
    """Demand that the generators of Python, NumPy and torch stay as they were.

    Someone who seeds them owns them: a fit in between must not change the numbers that follow.
    """
    states: dict[str, Callable[[], Any]] = {
        "random": random.getstate,
        "numpy.random": lambda: np.random.get_state(legacy=False)["state"],  # noqa: NPY002
        "torch": lambda: torch.get_rng_state().numpy(),
    }
    if torch.cuda.is_initialized():
        states["torch.cuda"] = lambda: torch.cuda.get_rng_state().numpy()
    X, y = make_images()

    def assert_untouched(step: str, before: dict[str, Any]) -> None:
        for module, state in states.items():
            message = f"{name}.{step} changes the global state of {module}: use one of its own."
            np.testing.assert_equal(state(), before[module], err_msg=message)

    before = {module: state() for module, state in states.items()}
    fitted = _prepare(estimator).fit(X, y)
    assert_untouched("fit", before)
    for method in _output_methods(fitted):
        method(X)
        assert_untouched(method.__name__, before)


def check_failed_fit(name: str, estimator: Any) -> None:
    """Demand that an estimator whose fit failed is not fitted.

    Half-trained weights must not answer. Here the images become unreadable in the middle of
    training, long after the input was found to be in order.
    """
    images, y = make_images()
    prepared = _prepare(estimator)
    _fail_in_training(name, prepared, images, y)
    for method in ("predict", "predict_proba", "transform"):
        if hasattr(prepared, method):
            message = f"{name}.{method} must raise NotFittedError after a fit that failed."
            with raises(NotFittedError, err_msg=message):
                getattr(prepared, method)(images)


def check_failed_refit(name: str, estimator: Any) -> None:
    """Demand that an estimator whose second fit failed is the one that it was before.

    A nightly refit that meets a broken file must leave yesterday's model in service, whether it
    breaks at the door or in the middle of training.
    """
    images, y = make_images()
    fitted = _prepare(estimator, warm_start=False).fit(images, y)
    expected = _output(fitted, images)
    # Other shapes and classes than before, so that anything left behind shows.
    gray, labels = images[:, :1], (y + 1) % 2
    with raises(ValueError, err_msg=f"{name} must refuse NaN by a ValueError."):
        fitted.fit(np.full_like(gray, np.nan), labels)
    _assert_unchanged(name, fitted, images, expected)
    _fail_in_training(name, fitted, gray, labels)
    _assert_unchanged(name, fitted, images, expected)


def check_failed_warm_start(name: str, estimator: Any) -> None:
    """Demand that a warm start which failed leaves the weights where it found them.

    It goes on from the very weights that are in service, so that undoing it takes a copy of them.
    """
    _require(estimator, "warm_start")
    images, y = make_images()
    fitted = _prepare(estimator, warm_start=True).fit(images, y)
    expected = _output(fitted, images)
    _fail_in_training(name, fitted, images, y)
    _assert_unchanged(name, fitted, images, expected)


def _assert_unchanged(name: str, fitted: Any, images: np.ndarray, expected: np.ndarray) -> None:
    """Demand the result of before a failed fit."""
    message = f"{name} is not the model it was before a fit that failed: undo what that fit did."
    try:
        result = _output(fitted, images)
    except (NotFittedError, ValueError) as error:
        raise AssertionError(message) from error
    _assert_equal(result, expected, message)


def _fail_in_training(name: str, estimator: Any, images: np.ndarray, y: np.ndarray) -> None:
    """Let a fit fail half-way: when it has read half as many images as an undisturbed one."""
    undisturbed = LazyImages(images)
    deepcopy(estimator).fit(undisturbed, y)  # a warm start reads less than a fresh one
    X = LazyImages(images, fail_after=undisturbed.n_reads // 2)
    with raises(Exception, err_msg=f"{name}.fit hides that images could not be read: raise."):
        estimator.fit(X, y)


# -------------------------------------------------------------------- samplers of images


def _imbalanced(dtype: type = np.uint8) -> tuple[np.ndarray, np.ndarray]:
    """Colour images of three classes, 14 : 7 : 3, as (n, C, H, W)."""
    X, _ = make_images()
    y = np.repeat([0, 1, 2], [14, 7, 3])
    return (255 * X).astype(dtype) if dtype is np.uint8 else X.astype(dtype), y


def check_sampler_keeps_originals(name: str, sampler: Any) -> None:
    """Demand the originals first, bit for bit, their dtype, and the wanted counts.

    Whatever is appended, the images of the patients must come through as they are, and uint8
    images may not come back as floats of four or eight times their size.
    """
    for dtype in (np.uint8, np.float32, np.float64):
        X, y = _imbalanced(dtype)
        before = X.copy()
        X_new, y_new = _prepare(sampler).fit_resample(X, y)
        _assert_equal(X, before, f"{name} writes to X: copy it first.")
        _assert_equal(X_new[: len(X)], X, f"{name} must give the originals first, unchanged.")
        _assert_equal(y_new[: len(y)], y, f"{name} must give the labels of the originals first.")
        assert X_new.dtype == X.dtype, f"{name} turns {X.dtype} into {X_new.dtype}."
        counts = np.bincount(y_new)
        _assert_equal(counts, [14, 14, 14], f"{name} must grow the classes to equal size.")


def check_sampler_layouts(name: str, sampler: Any) -> None:
    """Demand the same new images for channels first, channels last, flat and gray images."""
    first, y = _imbalanced()
    last = np.moveaxis(first, 1, -1)
    expected = _prepare(sampler).fit_resample(first, y)[0]
    message = f"{name} makes other images for {{}} than for (n, C, H, W): mind the axes."
    found = _prepare(sampler).fit_resample(last, y)[0]
    _assert_equal(np.moveaxis(found, -1, 1), expected, message.format("(n, H, W, C)"))
    flat = _prepare(sampler, image_shape=first.shape[1:])
    found = flat.fit_resample(first.reshape(len(y), -1), y)[0]
    _assert_equal(found.reshape(expected.shape), expected, message.format("flattened images"))
    expected = _prepare(sampler).fit_resample(first[:, :1], y)[0]
    found = _prepare(sampler).fit_resample(first[:, 0], y)[0]
    message = f"{name} reads (n, H, W) otherwise than (n, 1, H, W): add the channel axis."
    _assert_equal(found[:, None], expected, message)


def check_sampler_lists_that_mix_scales(name: str, sampler: Any) -> None:
    """Demand that uint8 images among floats in [0, 1] are scaled, or refused by their row."""
    X, y = _imbalanced()
    expected, _ = _prepare(sampler).fit_resample(X / 255, y)
    with _scaled_or_refused(name):
        found, _ = _prepare(sampler).fit_resample(_mixed_scales(X, X / 255), y)
        message = f"{name} stacks uint8 images and floats as they are: divide the former by 255."
        _assert_equal(found, expected, message)


def check_sampler_lazy_images(name: str, sampler: Any) -> None:
    """Demand the same new images from a lazy container, which stays lazy.

    Only what new images are made of may be read, never all at once, and the result is a container
    that still reads the originals when they are asked for.
    """
    X, y = _imbalanced()
    expected, _ = _prepare(sampler).fit_resample(X, y)
    lazy = LazyImages(X)
    found, _ = _prepare(sampler).fit_resample(lazy, y)
    assert not lazy.was_converted, f"{name} converted a lazy X to an array: read it row by row."
    assert not isinstance(found, np.ndarray), f"{name} must keep a lazy X lazy."
    assert found.shape == expected.shape, f"{name} gives a lazy X the shape {found.shape}."
    images = np.stack([found[row] for row in range(len(found))])
    _assert_equal(images, expected, f"{name} makes other images of a lazy X than of the array.")


def check_sampler_keeps_patients_apart(name: str, sampler: Any) -> None:
    """Demand that ``groups`` keeps the images of a patient from being mixed with one another.

    Such a mix is a third near-copy of what is there twice already.
    """
    if "groups" not in signature(sampler.fit_resample).parameters:
        raise SkipTest(f"{name} takes no groups.")
    X, y = _imbalanced()
    groups = np.arange(len(y)) % 3
    prepared = _prepare(sampler)
    prepared.fit_resample(X, y, groups=groups)
    pairs = groups[prepared.sample_indices_], groups[prepared.partner_indices_]
    assert (pairs[0] != pairs[1]).all(), f"{name} mixes patients with themselves: mind groups."
    message = f"{name} must refuse groups of another length by a ValueError that names them."
    with _refusal("groups", message):
        _prepare(sampler).fit_resample(X, y, groups=groups[1:])


def check_sampler_random_state(name: str, sampler: Any) -> None:
    """Demand that ``random_state`` alone decides, and that the global generators stay as they were.

    Clones and pickles, which searches make, must draw the same.
    """
    X, y = _imbalanced(np.float64)
    global_state = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
    torch_state = torch.get_rng_state()
    prepared = _prepare(sampler)
    expected = prepared.fit_resample(X, y)[0]
    message = f"{name} changes the global state of {{}}: use a generator of its own."
    now = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
    np.testing.assert_equal(now, global_state, err_msg=message.format("numpy.random"))
    assert torch.equal(torch.get_rng_state(), torch_state), message.format("torch")
    np.random.random(), torch.rand(1)  # noqa: NPY002
    copies = (prepared, clone(prepared), pickle.loads(pickle.dumps(prepared)))  # noqa: S301
    for copy in copies:
        found = copy.fit_resample(X, y)[0]
        message = f"{name} depends on more than random_state: draw from a generator made of it."
        _assert_close(found, expected, message)
    other = prepared.set_params(random_state=1).fit_resample(X, y)[0]
    assert not np.array_equal(other, expected), f"{name} ignores random_state."


def check_sampler_rare_and_constant(name: str, sampler: Any) -> None:
    """Demand finite images from a class with one sample and from images without contrast."""
    X, y = _imbalanced(np.float32)
    y[y == 2] = 0
    y[-1] = 2
    for images in (X, np.full_like(X, 0.5)):
        X_new, y_new = _prepare(sampler).fit_resample(images, y)
        counts = np.bincount(y_new)
        _assert_equal(counts, counts.max(), f"{name} loses a class with one sample.")
        assert np.isfinite(X_new).all(), f"{name} makes images that are not finite."


def check_sampler_non_finite_images(name: str, sampler: Any) -> None:
    """Demand a ValueError that names the row of an image with NaN or infinity."""
    X, y = _imbalanced(np.float32)
    for value, word in ((np.nan, "NaN"), (np.inf, "inf")):
        broken = X.copy()
        broken[17, 0, 0, 0] = value
        message = f"{name} must refuse {value} by a ValueError with '{word}' and row 17."
        with _refusal(rf"(?i){word}.*\b17\b", message):
            _prepare(sampler).fit_resample(broken, y)


STATELESS_CHECKS: tuple[Callable[[str, Any], None], ...] = (
    check_channel_layouts,
    check_gray_images,
    check_image_size_at_predict,
    check_volumes,
    check_memory_order,
    check_lists_and_tensors,
    check_lists_that_mix_scales,
    check_lazy_images_stay_lazy,
    check_lazy_images_same_as_array,
    check_lazy_images_in_cross_validation,
    check_one_image,
    check_sample_order,
    check_non_finite_images,
    check_constant_images,
    check_pickle,
    check_joblib,
    check_skops,
    check_repeatable,
    check_global_random_state,
)

LEARNING_CHECKS: tuple[Callable[[str, Any], None], ...] = (
    check_uint8_images,
    check_pixel_scale_at_predict,
    check_fewer_images_than_batch_size,
    check_clone,
    check_safetensors,
    check_failed_fit,
    check_failed_refit,
    check_failed_warm_start,
)

LABEL_CHECKS: tuple[Callable[[str, Any], None], ...] = (
    check_label_types,
    check_class_with_one_sample,
    check_class_missing_from_fold,
    check_groups_stay_whole,
)

SAMPLER_CHECKS: tuple[Callable[[str, Any], None], ...] = (
    check_sampler_keeps_originals,
    check_sampler_layouts,
    check_sampler_lists_that_mix_scales,
    check_sampler_lazy_images,
    check_sampler_keeps_patients_apart,
    check_sampler_random_state,
    check_sampler_rare_and_constant,
    check_sampler_non_finite_images,
)
