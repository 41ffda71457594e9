"""Saliency maps of any X."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin, _fit_context

from sklearn_medimb._data.containers import as_list, as_pixel_array
from sklearn_medimb._data.images import Images, read_images, warn_of_flat_images
from sklearn_medimb._data.layout import InputParameters, as_pixels
from sklearn_medimb._data.pixel_scale import to_unit_scale
from sklearn_medimb._machine.fitted import all_or_nothing
from sklearn_medimb._machine.runtime import one_thread_in_workers, pixel_block, resolve_device
from sklearn_medimb._parameters import learned, one_of, parameter
from sklearn_medimb.saliency._detectors import DETECTORS, POLARITIES, Detector, valid_region


def saliency_maps(
    images: torch.Tensor,
    saliency: str | Detector = "fine_grained",
    *,
    polarity: str = "both",
    mask: str | torch.Tensor | None = None,
) -> torch.Tensor:
    """Maps by name or by a callable.

    Parameters
    ----------
    images : tensor of shape (n, C, H, W) or (n, C, D, H, W)
        Floats.
    saliency : {"fine_grained", "spectral_residual", "center"} or callable
        A callable gets `images` and returns maps of shape (n, *spatial) in [0, 1], as a tensor or
        an array: a trained lesion detector, class-activation maps.
    polarity : {"both", "dark", "bright"}, default="both"
        For "fine_grained".
    mask : "auto", tensor of bool of shape (n, *spatial), or None, default=None
        Where images are valid; "auto" finds black borders with :func:`valid_region`. Elsewhere
        saliency is 0.

    Returns
    -------
    maps : tensor of shape (n, *spatial)
        Values in [0, 1], on the device of the images.

    Raises
    ------
    ValueError
        If a callable's maps have another shape, or values outside [0, 1].
    """
    if isinstance(mask, str) and mask != "auto":
        raise ValueError(f'mask={mask!r} must be "auto", a tensor or None.')
    valid = valid_region(images) if isinstance(mask, str) else mask
    if not callable(saliency) and saliency not in DETECTORS:
        raise ValueError(f"saliency={saliency!r} must be one of {sorted(DETECTORS)}, or callable.")
    if not callable(saliency):
        options = {"polarity": polarity} if saliency == "fine_grained" else {}
        return DETECTORS[saliency](images, valid=valid, **options)
    shape = (len(images), *images.shape[2:])
    maps = check_maps(saliency(images), shape, "saliency").to(images)
    return maps if valid is None else maps * valid


def check_maps(
    maps: Any, shape: tuple[int, ...], name: str, rows: Sequence[int] | np.ndarray | None = None
) -> torch.Tensor:
    """Validate given maps: lesion masks (bool, 0 and 1, 0 to 255), or floats in [0, 1].

    Parameters
    ----------
    maps : array-like or tensor
        The maps; a channel axis of length 1 and flattened maps are understood.
    shape : tuple of int
        Wanted shape, (n, *spatial).
    name : str
        The parameter that errors name.
    rows : sequence of int, default=None
        What errors call the maps; None counts them.

    Returns
    -------
    maps : tensor of float
        The maps, on the device where they were.
    """
    maps = as_maps(maps, shape, name)
    whole = not maps.is_floating_point()
    maps = maps.float() if whole else maps
    scale = 255 if whole and maps.numel() and maps.amax() > 1 else 1
    wrong = ~((maps >= 0) & (maps <= scale)).flatten(1).all(dim=1)
    if scale > 1:  # 0 and 1 would hardly count among masks of 0 and 255
        wrong |= maps.flatten(1).amax(dim=1) == 1
    if wrong.any():
        row = int(wrong.nonzero()[0])
        row = row if rows is None else rows[row]
        raise ValueError(
            f"{name} must give finite maps in [0, 1], or masks of bool or whole numbers, all of "
            f"them 0 and 1 or all up to 255: see the map of row {row}."
        )
    return maps / scale if scale > 1 else maps


def as_maps(maps: Any, shape: tuple[int, ...], name: str) -> torch.Tensor:
    """Bring maps to a tensor of the wanted shape; their values stay, if they have one dtype.

    In a list that mixes dtypes each map is read on its own.
    """
    maps = as_list(maps)
    try:
        if not isinstance(maps, (list, tuple, torch.Tensor)):
            maps = torch.from_numpy(np.asarray(maps))
        elif not isinstance(maps, torch.Tensor):
            maps = [torch.from_numpy(as_pixel_array(single)) for single in maps]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be read as numbers: {error}") from error
    if isinstance(maps, list):
        if len({single.dtype for single in maps}) > 1:
            one = (1, *shape[1:])
            maps = [check_maps(m[None], one, name, [row])[0].double() for row, m in enumerate(maps)]
        if len(maps) != shape[0] or len({single.shape for single in maps}) > 1:
            shapes = sorted({tuple(single.shape) for single in maps})
            raise ValueError(
                f"{name} is a list of {len(maps)} maps of the shapes {shapes}; it must be "
                f"{tuple(shape)}."
            )
        maps = torch.stack(maps)
    found, flat = tuple(maps.shape), (shape[0], int(np.prod(shape[1:])))
    if found in (shape, flat, (shape[0], 1, *shape[1:]), (*shape, 1)):
        return maps.reshape(shape)
    raise ValueError(f"{name} has maps of shape {found}; it must be {tuple(shape)}.")


class SaliencyParameters(InputParameters):
    """Where images are salient, and how X holds them.

    Parameters
    ----------
    saliency
        A detector of :mod:`sklearn_medimb.saliency`, or a function from a batch of images (tensor
        of shape ``(n, C, *spatial)``, uint8 as [0, 1]) to maps of shape ``(n, *spatial)`` in
        [0, 1].
    polarity
        For "fine_grained": "dark" where lesions are darker than their surround, "bright" where
        they are brighter.
    mask
        "auto" finds black borders and sets their saliency to 0.
    image_shape
        Shape of one image where X holds flattened ones: ``(H, W)``, ``(C, H, W)``,
        ``(C, D, H, W)``, or with the channels last. Without it the rows of a 2-D X are images of
        height 1, with a warning.

    Attributes
    ----------
    image_shape_
        Shape of one image, ``(C, *spatial)``, or ``(d,)``.
    n_features_in_
        Values per image.
    feature_names_in_
        Column names where X was a DataFrame.
    """

    saliency: str | Detector = parameter(
        one_of(*DETECTORS), callable, default="fine_grained", search=True
    )
    polarity: str = parameter(one_of(*POLARITIES), default="both", search=True)
    mask: str | None = parameter(one_of("auto"), None, default=None, search=[None, "auto"])

    image_shape_: tuple[int, ...] = learned("tuple of int")
    n_features_in_: int = learned("int")
    feature_names_in_: np.ndarray = learned("ndarray of shape (`n_features_in_`,)")

    def _read(self, X: Any, *, reset: bool) -> Images:
        return read_images(
            self,
            X,
            reset=reset,
            image_shape=self.image_shape,
            data_format=self.data_format,
            spatial_dims=self.spatial_dims,
            float_dtype=None,
        )

    def _detect(self, batch: torch.Tensor) -> torch.Tensor:
        return saliency_maps(batch, self.saliency, polarity=self.polarity, mask=self.mask)


class SaliencyMap(TransformerMixin, SaliencyParameters, BaseEstimator):
    """Images to saliency maps, as a stateless transformer.

    Parameters
    ----------
    saliency
        Centre against surround [1]_, the spectral residual [2]_, a Gaussian bump, or a function
        from a batch of images (tensor of shape ``(n, C, *spatial)``) to maps in [0, 1].

    See Also
    --------
    sklearn_medimb.SPMixSampler : Mixes images where neither is salient.

    References
    ----------
    .. [1] S. Montabone and A. Soto, "Human detection using a mobile platform and novel features
       derived from a visual saliency mechanism", Image and Vision Computing 28, 2010.
    .. [2] X. Hou and L. Zhang, "Saliency detection: a spectral residual approach", CVPR 2007.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn_medimb import SaliencyMap
    >>> X = np.full((2, 16, 16), 200, dtype=np.uint8)
    >>> X[0, 6:10, 6:10] = 60  # a dark lesion on one of two images
    >>> maps = SaliencyMap().fit_transform(X)
    >>> maps.shape
    (2, 16, 16)
    >>> bool(maps[0, 7, 7] > 0.5), float(maps[1].max())
    (True, 0.0)
    """

    saliency: str | Detector = parameter(
        one_of(*DETECTORS), callable, default="fine_grained", search=True, positional=True
    )

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any = None) -> SaliencyMap:
        """Check the images; nothing is learnt.

        Parameters
        ----------
        X : array-like or lazy sequence of n images
            Images in any layout of the package's guide.
        y : None
            Ignored.

        Returns
        -------
        self : SaliencyMap
            The transformer.
        """
        with all_or_nothing(self):
            images = self._read(X, reset=True)
            warn_of_flat_images(self, images)
            self.image_shape_ = images.image_shape
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Compute the map of each image.

        Parameters
        ----------
        X : array-like or lazy sequence of n images
            Images in any layout of the package's guide.

        Returns
        -------
        maps : ndarray of shape (n, *spatial), or (n, n_pixels) where X is 2-D
            Values in [0, 1]; float32, or float64 where X is. Images other than uint8 are first
            clipped to their quantiles of 0.5 % and 99.5 %: scans have hot pixels.
        """
        self._validate_params()
        images = self._read(X, reset=False)
        device = resolve_device(self.device)
        maps = maps_of(images, np.arange(len(images)), self._detect, device).numpy()
        return maps.reshape(len(maps), -1) if np.ndim(images.data) == 2 else maps

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.input_tags.three_d_array = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _without_outliers(images: torch.Tensor, share: float = 0.005) -> torch.Tensor:
    """Clip each image to its quantiles: one hot pixel of a scan must not hide the lesion.

    Images of few pixels, whose quantiles are single pixels, stay as they are.
    """
    pixels = images.flatten(1)
    rank = int(pixels.shape[1] * share)
    if rank == 0:
        return images
    low = pixels.topk(rank + 1, largest=False, sorted=False).values.amax(1)
    high = pixels.topk(rank + 1, sorted=False).values.amin(1)
    bounds = (part.view(-1, *[1] * (images.ndim - 1)) for part in (low, high))
    return images.clamp(*bounds)


def maps_of(
    images: Images,
    rows: np.ndarray,
    detect: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    clip: bool | None = None,
) -> torch.Tensor:
    """Apply a function of image batches to some rows, block by block.

    Parameters
    ----------
    images : Images
        Where to read.
    rows : ndarray of int
        The rows.
    detect : callable
        From images ``(n, C, *spatial)``, floats on the device, to a tensor of n rows.
    device : torch.device
        Where to compute.
    dtype : torch.dtype or None, default=None
        Precision of the images; None is float64 for such images, else float32.
    clip : bool or None, default=None
        Whether each image is clipped to its quantiles first; None clips all but uint8.

    Returns
    -------
    results : tensor
        On the CPU, one row per entry of `rows`.
    """
    if dtype is None:
        dtype = torch.float64 if images.dtype == np.float64 else torch.float32
    clip = images.dtype != np.uint8 if clip is None else clip
    block = pixel_block(images.image_shape, device)

    def detected(part: np.ndarray) -> torch.Tensor:
        pixels = as_pixels(to_unit_scale(images.rows(part).to(device), dtype))
        pixels = _without_outliers(pixels) if clip else pixels
        try:
            return detect(pixels).cpu()
        except ValueError as error:
            vast = ~torch.isfinite(pixels.flatten(1).sum(dim=1))
            if not vast.any():
                raise
            row = part[int(vast.nonzero()[0])]
            raise ValueError(
                f"X holds values too large for {pixels.dtype}: see row {row}."
            ) from error

    with torch.no_grad(), one_thread_in_workers():
        parts = [detected(part) for part in np.split(rows, range(block, len(rows), block))]
    return torch.cat(parts)
