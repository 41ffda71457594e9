"""Where an image catches the eye: pure functions from images to maps in [0, 1].

Images are tensors of shape ``(n, C, H, W)`` or ``(n, C, D, H, W)``, maps ``(n, H, W)`` or
``(n, D, H, W)``. Everything is batched, on the device of the images, and free of scale: ``a x + b``
has the map of ``x``, so uint8, [0, 1] and Hounsfield units need no rescaling. A constant image has
nothing salient: its map is zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, TransformerMixin, _fit_context
from sklearn.utils._param_validation import StrOptions

from sklearn_medimb._data.images import (
    INPUT_CONSTRAINTS,
    Images,
    as_list,
    as_pixel_array,
    as_pixels,
    read_images,
    to_unit_scale,
    warn_of_flat_images,
)
from sklearn_medimb._machine.runtime import one_thread_in_workers, pixel_block, resolve_device

Detector = Callable[..., torch.Tensor]

LUMA = (0.299, 0.587, 0.114)
POLARITIES = ("both", "dark", "bright")
RADII = (12, 24, 48, 28, 56, 112)  # pixels, for images whose shorter side has 450


def intensity(images: torch.Tensor) -> torch.Tensor:
    """Gray images of shape ``(n, *spatial)``: luma of three channels, else the mean over them."""
    if images.shape[1] != 3:
        return images.mean(dim=1)
    red, green, blue = images.unbind(dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def _over_pixels(reduce: Callable[..., torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Reduce each image to one number, shaped to combine with the images."""
    return reduce(images, tuple(range(1, images.ndim)), keepdim=True)


def _over_maximum(maps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Divide each map by its maximum; one that never exceeds `noise` is rounding only: zero."""
    top = _over_pixels(torch.amax, maps)
    return torch.where(top > noise, maps / top, 0)


def _rounding(gray: torch.Tensor) -> torch.Tensor:
    """What arithmetic on these intensities cannot resolve, per image."""
    return 64 * torch.finfo(gray.dtype).eps * _over_pixels(torch.amax, gray.abs())


def _in_blocks(detect: Detector) -> Detector:
    """Check the input of a detector, and give it as many images at a time as stay in cache."""

    @wraps(detect)
    def detect_all(
        images: torch.Tensor, *, valid: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        shape = (len(images), *images.shape[2:])
        if images.ndim not in (4, 5):
            raise ValueError(
                f"images has shape {tuple(images.shape)}; it must be (n, C, H, W) or "
                "(n, C, D, H, W)."
            )
        if valid is not None and tuple(valid.shape) != shape:
            raise ValueError(f"valid has shape {tuple(valid.shape)}; it must be {shape}.")
        if images.dtype not in (torch.float32, torch.float64):
            images = images.float()
        block = pixel_block(tuple(images.shape[1:]), images.device)
        parts = images.split(block)
        masks = [None] * len(parts) if valid is None else valid.split(block)
        maps = []
        for part, mask in zip(parts, masks, strict=True):
            if not torch.isfinite(part.sum()):  # in cache, and no mask of booleans
                raise ValueError("images holds NaN or infinity.")
            maps.append(detect(part, valid=mask, **options))
        return torch.cat(maps)

    return detect_all


def _filled(gray: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Give pixels outside the valid region the mean of those inside, so that nothing leaks in."""
    if valid is None:
        return gray
    inside = valid.to(gray.dtype)
    total = _over_pixels(torch.sum, inside).clamp(min=1)
    return torch.where(valid, gray, _over_pixels(torch.sum, gray * inside) / total)


# ---------------------------------------------------------------- detectors


@_in_blocks
def fine_grained(
    images: torch.Tensor,
    *,
    polarity: str = "both",
    reference_size: float | None = 450.0,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Centre against surround, at six scales [1]_.

    After a slight blur each pixel g is compared with m_r, the mean over the box of radius r around
    it, itself left out:

        On = sum_r max(0, g - m_r),  Off = sum_r max(0, m_r - g),
        map = min(1, On / max(On) + Off / max(Off)).

    Parameters
    ----------
    images : tensor of shape (n, C, H, W) or (n, C, D, H, W)
        Floats on any scale.
    polarity : {"both", "dark", "bright"}, default="both"
        "dark" keeps Off alone (lesions darker than their surround), "bright" On alone.
    reference_size : float or None, default=450
        The published radii, 12 to 112 pixels, belong to images whose shorter side has this many.
        They are scaled with ``min(H, W)``, along the depth with ``min(D, H, W)``, to 1 at least.
        None takes them as they are.
    valid : tensor of bool, shape (n, *spatial), default=None
        Pixels outside enter no mean and no maximum, and have saliency 0; in the blur the mean of
        those inside stands for them.

    Returns
    -------
    maps : tensor of shape (n, *spatial)
        Values in [0, 1].

    References
    ----------
    .. [1] S. Montabone and A. Soto, "Human detection using a mobile platform and novel features
       derived from a visual saliency mechanism", Image and Vision Computing 28, 2010. Here boxes
       are symmetric and all arithmetic is float; OpenCV's integer version correlates above .99.
    """
    if polarity not in POLARITIES:
        raise ValueError(f"polarity={polarity!r} must be one of {POLARITIES}.")
    gray = intensity(images)
    noise = _rounding(gray)
    gray = _filled(gray, valid)
    gray = gray - _over_pixels(torch.mean, gray)  # sums around zero round less
    for axis in range(1, gray.ndim):
        gray = _blur(_blur(gray, axis), axis)
    inside = torch.ones_like(gray[:1]) if valid is None else valid.to(gray.dtype)
    if valid is not None:
        gray = gray * inside

    radii = _radii(gray.shape[1:], reference_size)
    reach = tuple(max(along) for along in zip(*radii, strict=True))
    sums, counts = _BoxSums(gray, reach), _BoxSums(inside, reach)
    magnitude, signed = torch.zeros_like(gray), torch.zeros_like(gray)
    for radius, times in Counter(radii).items():
        n_pixels = counts(radius)
        # g - m = (n g - sum over the box) / (n - 1)
        share = times / (n_pixels - 1).clamp_(min=1)
        difference = torch.addcmul(gray * (n_pixels * share), sums(radius), share, value=-1)
        signed += difference
        magnitude += difference.abs_()
    if valid is not None:
        magnitude, signed = magnitude * inside, signed * inside
    # max(0, d) = (|d| + d) / 2, whose half the maximum takes out.
    maps = torch.zeros_like(gray)
    if polarity != "dark":
        maps += _over_maximum(magnitude + signed, noise)
    if polarity != "bright":
        maps += _over_maximum(magnitude - signed, noise)
    return maps.clamp_(max=1)


def _radii(sides: Sequence[int], reference_size: float | None) -> list[tuple[int, ...]]:
    """The six radii along each axis."""
    in_plane = min(sides[-2:])
    shorter = [min(in_plane, side) for side in sides[:-2]] + [in_plane] * 2
    return [
        tuple(
            min(
                side,
                radius
                if reference_size is None
                else max(1, round(radius * short / reference_size)),
            )
            for side, short in zip(sides, shorter, strict=True)
        )
        for radius in RADII
    ]


class _BoxSums:
    """Sums over boxes of any radius up to `reach`, cut at the edges, from one integral image."""

    def __init__(self, values: torch.Tensor, reach: tuple[int, ...]) -> None:
        self.sides = values.shape[1:]
        self.reach = reach
        for axis in range(1, values.ndim):
            values = _running_sum(values, axis)
        # Zeros before and the last value after stand in for boxes that leave the image.
        before = [pad for r in reversed(reach) for pad in (r + 1, 0)]
        after = [pad for r in reversed(reach) for pad in (0, r)]
        self.integral = F.pad(F.pad(values, before)[None], after, mode="replicate")[0]

    def __call__(self, radius: tuple[int, ...]) -> torch.Tensor:
        sums = self.integral
        for axis, (side, reach, r) in enumerate(
            zip(self.sides, self.reach, radius, strict=True), 1
        ):
            sums = sums.narrow(axis, reach + r + 1, side) - sums.narrow(axis, reach - r, side)
        return sums


def _running_sum(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Cumulative sum; torch's has no deterministic kernel on CUDA."""
    if not values.is_cuda:
        return values.cumsum(axis)
    side = values.shape[axis]
    until = torch.ones(side, side, dtype=values.dtype, device=values.device).triu()
    return (values.movedim(axis, -1) @ until).movedim(-1, axis)


def _blur(images: torch.Tensor, axis: int) -> torch.Tensor:
    """Binomial blur (1, 2, 1) / 4 along an axis, mirrored at the edge pixels."""
    side = images.shape[axis]
    edge = min(1, side - 1)
    first, last = images.narrow(axis, edge, 1), images.narrow(axis, side - 1 - edge, 1)
    wide = torch.cat([first, images, last], dim=axis)
    outer = wide.narrow(axis, 0, side) + wide.narrow(axis, 2, side)
    return outer.mul_(0.25).add_(images, alpha=0.5)


@_in_blocks
def spectral_residual(
    images: torch.Tensor, *, size: int = 64, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """What is unexpected in the log amplitude spectrum [1]_.

    With A the log amplitudes of the image at `size` pixels a side, the residual is
    ``R = A - mean of A over 3 x 3 frequencies``, and the map ``|IFFT(exp(R) exp(i phase))|``,
    blurred (sigma 8, five pixels wide), squared, and divided by its maximum.

    Parameters
    ----------
    images : tensor of shape (n, C, H, W) or (n, C, D, H, W)
        Floats on any scale.
    size : int, default=64
        Side of the spectrum.
    valid : tensor of bool, shape (n, *spatial), default=None
        Pixels outside are set to the mean of those inside, and have saliency 0.

    Returns
    -------
    maps : tensor of shape (n, *spatial)
        Values in [0, 1].

    References
    ----------
    .. [1] X. Hou and L. Zhang, "Saliency detection: a spectral residual approach", CVPR 2007.
    """
    if size < 3:
        raise ValueError(f"size={size} must be at least 3.")
    gray = intensity(images)
    noise = _rounding(gray)
    gray = _filled(gray, valid)
    low = _over_pixels(torch.amin, gray)
    contrast = _over_pixels(torch.amax, gray) - low
    gray = (gray - low) / torch.where(contrast > noise, contrast, 1)

    mode = "bilinear" if gray.ndim == 3 else "trilinear"
    axes = tuple(range(1, gray.ndim))
    small = F.interpolate(gray[:, None], size=[size] * len(axes), mode=mode)[:, 0]
    spectrum = torch.fft.fftn(small, dim=axes)
    amplitude = spectrum.abs().clamp(min=torch.finfo(gray.dtype).eps)
    expected = amplitude.log()
    offsets = torch.arange(-2, 3, dtype=gray.dtype, device=gray.device)
    window = torch.exp(-(offsets**2) / (2 * 8.0**2))
    for axis in axes:
        expected = _convolve(expected, window.new_full((3,), 1 / 3), axis)
    maps = torch.fft.ifftn(spectrum / expected.exp(), dim=axes).abs()
    for axis in axes:
        maps = _convolve(maps, window / window.sum(), axis)
    maps = F.interpolate(maps.square()[:, None], size=gray.shape[1:], mode=mode)[:, 0]
    maps = maps if valid is None else maps * valid
    return torch.where(contrast > noise, _over_maximum(maps, torch.zeros_like(contrast)), 0)


def _convolve(images: torch.Tensor, window: torch.Tensor, axis: int) -> torch.Tensor:
    """Convolve along an axis of at least three pixels, mirrored at the edge pixels."""
    n, side = len(window) // 2, images.shape[axis]
    places = torch.arange(-n, side + n, device=images.device).abs()
    places = side - 1 - (side - 1 - places).abs()
    wide = images.index_select(axis, places)
    parts = (wide.narrow(axis, k, side) * weight for k, weight in enumerate(window))
    return sum(parts, torch.zeros_like(images))


@_in_blocks
def center(images: torch.Tensor, *, valid: torch.Tensor | None = None) -> torch.Tensor:
    """A fixed prior: lesions are photographed in the middle.

    Parameters
    ----------
    images : tensor of shape (n, C, H, W) or (n, C, D, H, W)
        Floats; only their shape matters, and whether they are constant.
    valid : tensor of bool, shape (n, *spatial), default=None
        Pixels outside have saliency 0.

    Returns
    -------
    maps : tensor of shape (n, *spatial)
        A Gaussian bump: 1 in the middle, exp(-2) half-way along each edge.
    """
    gray = intensity(images)
    square = torch.zeros_like(gray[0])
    for axis, side in enumerate(square.shape):
        place = (torch.arange(side, dtype=gray.dtype, device=gray.device) * 2 + 1 - side) / side
        square += place.square().view(-1, *[1] * (square.ndim - 1 - axis))
    contrast = _over_pixels(torch.amax, gray) - _over_pixels(torch.amin, gray)
    maps = torch.where(contrast > _rounding(gray), torch.exp(-2 * square), 0)
    return maps if valid is None else maps * valid


DETECTORS: dict[str, Detector] = {
    "fine_grained": fine_grained,
    "spectral_residual": spectral_residual,
    "center": center,
}


# ---------------------------------------------------------------- any source of maps


def valid_region(images: torch.Tensor, threshold: float = 0.05) -> torch.Tensor:
    """Field of view: everything but black borders, as fundus cameras and dermoscopes leave them.

    Parameters
    ----------
    images : tensor of shape (n, C, *spatial)
        Floats.
    threshold : float, default=0.05
        Share of an image's intensity range, from its minimum, that counts as black.

    Returns
    -------
    valid : tensor of bool, shape (n, *spatial)
        False where, along some axis, only black lies between a pixel and an edge of the image. A
        constant image is valid as a whole.
    """
    gray = intensity(images)
    low, high = _over_pixels(torch.amin, gray), _over_pixels(torch.amax, gray)
    bright = (gray > low + threshold * (high - low)).to(torch.uint8)
    valid = torch.ones_like(bright)
    for axis in range(1, gray.ndim):
        valid *= bright.cummax(axis).values
        valid *= bright.flip(axis).cummax(axis).values.flip(axis)
    return valid.bool() | (low == high)


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


class SaliencyMap(TransformerMixin, BaseEstimator):
    """Images to saliency maps, as a stateless transformer.

    Parameters
    ----------
    saliency : {"fine_grained", "spectral_residual", "center"} or callable, default="fine_grained"
        Centre against surround [1]_, the spectral residual [2]_, a Gaussian bump, or a function
        from a batch of images (tensor of shape ``(n, C, *spatial)``) to maps in [0, 1].

    polarity : {"both", "dark", "bright"}, default="both"
        For "fine_grained": which outliers count.

    mask : {"auto"} or None, default=None
        "auto" finds black borders and sets their saliency to 0.

    image_shape : tuple of int or None, default=None
        Shape of one image where X holds flattened ones: ``(H, W)``, ``(C, H, W)``,
        ``(C, D, H, W)``, or with the channels last. Without it the rows of a 2-D X are images of
        height 1, with a warning.

    data_format : {"auto", "channels_first", "channels_last"}, default="auto"
        Where the channel axis is.

    spatial_dims : {2, 3} or None, default=None
        3 reads 4-D X as gray volumes ``(n, D, H, W)``.

    device : str or torch.device, default="auto"
        "auto" takes a CUDA GPU where there is one.

    Attributes
    ----------
    image_shape_ : tuple of int
        Shape of one image, ``(C, *spatial)``.

    n_features_in_ : int
        Values per image.

    feature_names_in_ : ndarray of shape (n_features_in_,)
        Column names where X was a DataFrame.

    See Also
    --------
    sklearn_medimb.over_sampling.SPMixSampler : Mixes images where neither is salient.

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

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "saliency": [StrOptions(set(DETECTORS)), callable],
        "polarity": [StrOptions({"both", "dark", "bright"})],
        "mask": [StrOptions({"auto"}), None],
        **INPUT_CONSTRAINTS,
        "device": [str, torch.device],
    }

    def __init__(
        self,
        saliency: str | Detector = "fine_grained",
        *,
        polarity: str = "both",
        mask: str | None = None,
        image_shape: Sequence[int] | None = None,
        data_format: str = "auto",
        spatial_dims: int | None = None,
        device: str | torch.device = "auto",
    ) -> None:
        self.saliency = saliency
        self.polarity = polarity
        self.mask = mask
        self.image_shape = image_shape
        self.data_format = data_format
        self.spatial_dims = spatial_dims
        self.device = device

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any = None) -> SaliencyMap:
        """Check the images; nothing is learnt.

        Parameters
        ----------
        X : array-like or lazy sequence of n images
            Images in any layout of the package's README.
        y : None
            Ignored.

        Returns
        -------
        self : SaliencyMap
            The transformer.
        """
        images = self._read(X, reset=True)
        warn_of_flat_images(self, images)
        self.image_shape_ = images.image_shape
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Compute the map of each image.

        Parameters
        ----------
        X : array-like or lazy sequence of n images
            Images in any layout of the package's README.

        Returns
        -------
        maps : ndarray of shape (n, *spatial), or (n, n_pixels) where X is 2-D
            Values in [0, 1]; float32, or float64 where X is. Images other than uint8 are first
            clipped to their quantiles of 0.5 % and 99.5 %: scans have hot pixels.
        """
        self._validate_params()
        images = self._read(X, reset=False)
        maps = maps_of(
            images,
            np.arange(len(images)),
            lambda batch: saliency_maps(
                batch, self.saliency, polarity=self.polarity, mask=self.mask
            ),
            resolve_device(self.device),
        ).numpy()
        return maps.reshape(len(maps), -1) if np.ndim(images.data) == 2 else maps

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
    if pixels.shape[1] * share < 1:
        return images
    rank = int(pixels.shape[1] * share)
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

    def read(part: np.ndarray) -> torch.Tensor:
        pixels = as_pixels(to_unit_scale(images.rows(part).to(device), dtype))
        return _without_outliers(pixels) if clip else pixels

    def detected(part: np.ndarray) -> torch.Tensor:
        pixels = read(part)
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
