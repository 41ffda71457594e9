"""Predictions without this package: classifiers as ONNX graphs.

>>> from sklearn_medimb.onnx import export_onnx
>>> export_onnx(classifier, "classifier.onnx")  # doctest: +SKIP
>>> session = onnxruntime.InferenceSession("classifier.onnx")  # doctest: +SKIP
>>> (proba,) = session.run(None, {"images": X.astype("float32")})  # doctest: +SKIP

Imports `_data`, `_machine`, `base`.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from sklearn.utils.validation import check_is_fitted
from torch import nn

import sklearn_medimb
from sklearn_medimb._data.batches import Preprocessor
from sklearn_medimb._data.images import Images
from sklearn_medimb._data.layout import Layout
from sklearn_medimb._data.resize import axis_weights, combine, resized_shape, resolve_size
from sklearn_medimb._machine.runtime import replacing
from sklearn_medimb.base._classifier import BaseImageClassifier


def export_onnx(
    classifier: Any,
    path: str | os.PathLike[str],
    *,
    image_shape: Sequence[int] | None = None,
) -> None:
    """Write what ``predict_proba`` computes as an ONNX graph.

    The graph has one input and one output:

    - "images", float32 of shape (n, C, *spatial), or (n, d) for vectors, any n: pixel values on
      the scale of the training images, neither normalised nor resized (`image_size`). Of a
      classifier fitted to uint8 images they count from 0 to 255. Pairs (``reference="paired"`` of
      CSSN) lie in the channels, (n, 2 C, *spatial). Flattened images, and those with the channels
      last, are to be brought to that shape.
    - "probabilities", float32 of shape (n, n_classes), in the order of ``classes_``.

    Its metadata hold JSON texts: "classes", "image_shape" (C, *spatial), "pixels" ("0 to 255" or
    "as in training"), "estimator" and "sklearn_medimb", the version.

    Parameters
    ----------
    classifier : classifier of this package, or of a class that extends one
        Fitted. A head of stage two must be one of :mod:`sklearn_medimb.rebalance` or a
        ``LogisticRegression``.
    path : str or path-like
        File to write; an older one is replaced when the new one is complete.
    image_shape : tuple of int, default=None
        (C, *spatial) of the images that the graph takes, of a classifier with `image_size`; None
        is the shape of the first image of ``fit``, ``input_shape_``.

    Raises
    ------
    TypeError
        If it is no image classifier.
    sklearn.exceptions.NotFittedError
        If it is not fitted.
    ValueError
        If its head cannot become part of a graph, or its backbone only for one number of images;
        or if a class of one's own predicts otherwise than by its ``_score_function``; if it does
        not take images of `image_shape`.
    ImportError
        If onnx or onnxscript is not installed.

    See Also
    --------
    sklearn_medimb.persistence.save : A file from which the estimator itself comes back.

    Notes
    -----
    The graph computes in float32. Where ``predict_proba`` runs the backbone in bfloat16 the two
    agree to about two digits, else to five or more. The support bank of CSSN is part of the graph.
    With onnxruntime, for uint8 images X of shape (n, H, W, C)::

        session = onnxruntime.InferenceSession(path)
        pixels = X.transpose(0, 3, 1, 2).astype(np.float32)
        (proba,) = session.run(None, {"images": pixels})
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch's exporter is written in it)
    except ImportError as error:
        raise ImportError(
            'ONNX files need the packages onnx and onnxscript: pip install "sklearn_medimb[onnx]".'
        ) from error
    if not isinstance(classifier, BaseImageClassifier):
        raise TypeError(f"{type(classifier).__name__} is no image classifier of sklearn_medimb.")
    check_is_fitted(classifier)
    shape = _input_shape(classifier, image_shape)
    copied = _on_cpu(classifier)
    graph = _Graph(copied, shape).eval()
    if not _predicts(graph, copied, shape):
        raise ValueError(
            f"{type(classifier).__name__} overrides predict_proba, or changes what _score_function "
            "gives, and a graph holds no more than that function: make the change there."
        )
    blank = torch.zeros(2, *shape)
    with warnings.catch_warnings():  # of torch to its own developers
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            graph,
            (blank,),
            dynamo=True,
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes={"images": {0: torch.export.Dim("n")}},
            verbose=False,
        )
    model = program.model_proto
    if not model.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise ValueError(
            "The backbone makes a graph for one number of images only: where it takes len(x), it "
            "must take x.shape[0]."
        )
    facts = {
        "classes": classifier.classes_.tolist(),
        "image_shape": list(shape),
        "pixels": "0 to 255" if classifier.pixel_range_ == "uint8" else "as in training",
        "estimator": type(classifier).__name__,
        "sklearn_medimb": sklearn_medimb.__version__,
    }
    onnx.helper.set_model_props(model, {name: json.dumps(fact) for name, fact in facts.items()})
    onnx.checker.check_model(model)
    with replacing(Path(path)) as draft:
        onnx.save(model, draft)


class _Graph(nn.Module):
    """From pixels to class probabilities."""

    def __init__(self, classifier: Any, shape: tuple[int, ...]) -> None:
        super().__init__()
        net = classifier.net_
        self.network = net.module_  # so that its weights belong to the graph
        self.prepare = Preprocessor(
            classifier.pixel_mean_,
            classifier.pixel_std_,
            dtype=net.dtype,
            device=torch.device("cpu"),
        )
        self.whole = classifier.pixel_range_ == "uint8"
        self.divisor = 255.0 if self.whole else 1.0
        self.weights: list[torch.Tensor | None] = []
        resize = resolve_size(classifier.image_size)
        if resize is not None and shape != classifier.image_shape_:
            matrices = axis_weights(shape[1:], classifier.image_shape_[1:], resize.aspect)
            self.weights = [None if m is None else torch.from_numpy(m) for m in matrices]
        self.scores = classifier._mean_score_function(in_chunks=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Probabilities (n, n_classes) of images (n, C, *spatial)."""
        images = images.to(self.prepare.dtype)
        if self.weights:
            images = combine(images, self.weights, whole=self.whole)
        images = images / self.divisor
        return self.scores(self.prepare.normalise(images)).softmax(dim=1).float()


def _input_shape(classifier: Any, given: Sequence[int] | None) -> tuple[int, ...]:
    """Shape of an image that the graph takes."""
    resize, fitted = resolve_size(classifier.image_size), classifier.image_shape_
    known = fitted if resize is None else getattr(classifier, "input_shape_", fitted)
    shape = known if given is None else tuple(given)
    good = all(isinstance(side, Integral) and int(side) > 0 for side in shape)
    if good and len(shape) == len(fitted) and resized_shape(shape, resize) == fitted:
        return tuple(int(side) for side in shape)
    raise ValueError(
        f"Images of shape {shape} do not come to {fitted}, as those in fit, by image_size="
        f"{classifier.image_size}: set image_shape, or image_size, to what fits."
    )


def _predicts(graph: _Graph, classifier: Any, shape: tuple[int, ...]) -> bool:
    """Whether the graph and the classifier give the same probabilities: tried on noise."""
    if type(classifier).predict_proba is not BaseImageClassifier.predict_proba:
        return False
    mean, std = (
        part.reshape(-1, *[1] * (len(shape) - 1))
        for part in (classifier.pixel_mean_, classifier.pixel_std_)
    )
    noise = np.random.default_rng(0).standard_normal((2, *shape))
    pixels = (mean + std * noise).astype(np.float32)
    if graph.whole:
        pixels = (255 * pixels).clip(0, 255).astype(np.uint8)
    resize = resolve_size(classifier.image_size)
    scores = classifier._scores(Images(pixels, Layout(shape), pixels.dtype, resize=resize))
    with torch.inference_mode():
        found = graph(torch.from_numpy(pixels.astype(np.float32)))
    return np.allclose(found, softmax(scores, axis=1), atol=1e-2)


def _on_cpu(classifier: Any) -> Any:
    """Copy of a fitted classifier on the CPU, uncompiled, in float32."""
    state = classifier.__getstate__()
    copied = object.__new__(type(classifier))
    copied.__setstate__({**state, "device": "cpu", "compile": False, "precision": "float32"})
    return copied
