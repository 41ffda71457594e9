"""The contract of a backbone: the recipe that builds it, and how its output is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as F
from sklearn.base import BaseEstimator
from torch import Tensor, are_deterministic_algorithms_enabled, cat, nn, stack

from sklearn_medimb._pages import Documented
from sklearn_medimb.backbones._weights import load_weights

_KINDS = {0: "vectors (d,)", 2: "2-D images (C, H, W)", 3: "3-D images (C, D, H, W)"}


class Start(NamedTuple):
    """What a network was trained on elsewhere, before it comes here.

    Attributes
    ----------
    mean, std : tuple of float, or None
        Of each channel: it expects (x - mean) / std, x on the scale from 0 to 1. None where the
        source does not say it.
    image_size : int or None
        Side of the images, in pixels.
    digest : str
        Which weights these are: their source, and the sha256 of its file as far as it is known.
    """

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    image_size: int | None
    digest: str


class Backbone(Documented, BaseEstimator):
    """Recipe of a network trunk; the network itself is made by `build`.

    A subclass stores its parameters in ``__init__``, untouched, and implements ``_build``.
    Being a scikit-learn object it can be cloned, pickled and searched (``backbone__depth``).
    Every subclass takes ``weights``, the path of a local file of weights, or None.

    Attributes
    ----------
    spatial_dims : tuple of int
        Class attribute: the numbers of spatial axes the network can work on; 0 is for vectors.
    gains_from_tuning : bool
        Class attribute: whether weights of elsewhere are worth tuning on a few hundred images, as
        those of convolutional networks are, and those of large transformers hardly.
    """

    spatial_dims: ClassVar[tuple[int, ...]] = (2, 3)
    gains_from_tuning: ClassVar[bool] = True
    weights: Any = None

    @property
    def start(self) -> Start | None:
        """What the network was trained on; None for random weights and unknown files."""
        return None

    @property
    def has_start(self) -> bool:
        """Whether there is a `start`; unlike that, it looks nothing up."""
        return self.start is not None

    def build(self, input_shape: Sequence[int]) -> nn.Module:
        """Make a network for one kind of input.

        Parameters
        ----------
        input_shape : sequence of int
            Shape of one sample: (C, H, W), (C, D, H, W), or (d,) for vectors, in pixels.

        Returns
        -------
        module : torch.nn.Module
            Its initial weights are drawn from torch's default generator, inside of a fit from that
            of the fit, unless ``weights`` names a file.

        Raises
        ------
        ValueError
            For a parameter or an ``input_shape`` the network cannot use; the text names it.
        FileNotFoundError
            If ``weights`` names no file.
        """
        channels, *spatial = check_input_shape(input_shape)
        if len(spatial) not in self.spatial_dims:
            able = ", ".join(_KINDS[k] for k in self.spatial_dims)
            raise ValueError(
                f"backbone {type(self).__name__} works on {able} only: input_shape="
                f"{tuple(input_shape)}."
            )
        module = self._build(channels, tuple(spatial))
        if self.weights is not None:
            self._load(module)
        return module

    def installed_weights(self) -> dict[str, Tensor] | None:
        """Weights of the `start` as published, from an installed package which is checked.

        None where there is no such package: nothing is fetched.
        """
        return None

    def described(self, module: nn.Module) -> Backbone:
        """Recipe that makes a network like this one, weights apart, from nothing but itself."""
        return self

    def check_described(self) -> None:
        """Refuse what a recipe from a file may not ask for; the package's own only build."""

    def _build(self, channels: int, spatial: tuple[int, ...]) -> nn.Module:
        raise NotImplementedError(f"{type(self).__name__} must implement _build.")

    def _load(self, module: nn.Module) -> None:
        load_weights(module, self.weights)


def as_features(output: Tensor) -> Tensor:
    """Read the output of a backbone as one vector per sample.

    Parameters
    ----------
    output : Tensor
        (n, d) features, (n, 1+L, C) class token and patch tokens, or a map (n, C, H, W) or
        (n, C, D, H, W).

    Returns
    -------
    features : Tensor of shape (n, d)
        The features, the class token, or the spatial mean of the map.

    Raises
    ------
    ValueError
        If the output has none of these shapes.
    """
    _check_output(output)
    if output.ndim == 2:
        return output
    return output[:, 0] if output.ndim == 3 else output.flatten(2).mean(-1)


def as_tokens(output: Tensor, max_tokens: int | None = None) -> Tensor:
    """Read the output of a backbone as a sequence of tokens, the class token first.

    Tokens stay as they are. The places of a map become tokens in raster order, and their mean
    the class token. Features are cut into L groups of neighbours, L the largest divisor of d
    from 4 to 16, with the mean group as class token.

    Parameters
    ----------
    output : Tensor
        As in :func:`as_features`.
    max_tokens : int or None, default=None
        Largest L. Longer sequences are shortened by adaptive average pooling; the class token
        is that of the full sequence. Maps are pooled to the grid of :func:`pooled_grid`, token
        sequences likewise on their square grid if L is a square, all else along the sequence.

    Returns
    -------
    tokens : Tensor of shape (n, 1+L, C)
        Class token, then patch tokens.

    Raises
    ------
    ValueError
        If the output has none of the shapes of the contract, or d no divisor from 4 to 16.
    """
    _check_output(output)
    if max_tokens is not None:
        check_int(max_tokens, "max_tokens")
    # Everything becomes a class token (n, C) and a grid (n, C, *sides) of patch tokens.
    if output.ndim == 2:
        groups = output.unflatten(1, (_n_groups(output.shape[1]), -1))
        first, grid = groups.mean(1), groups.transpose(1, 2)
    elif output.ndim == 3:
        first, grid = output[:, 0], output[:, 1:].transpose(1, 2)
        side = math.isqrt(grid.shape[2])
        if side > 0 and side**2 == grid.shape[2]:
            grid = grid.unflatten(2, (side, side))
    else:
        first, grid = output.flatten(2).mean(-1), output

    sides = tuple(grid.shape[2:])
    if max_tokens is not None and math.prod(sides) > max_tokens:
        pooled = pooled_grid(sides, max_tokens)
        if are_deterministic_algorithms_enabled():  # torch's has no such gradient on CUDA
            for axis, size in enumerate(pooled, 2):
                grid = _pooled_along(grid, axis, size)
        else:
            pools: tuple[Callable[..., Tensor], ...] = (
                F.adaptive_avg_pool1d,
                F.adaptive_avg_pool2d,
                F.adaptive_avg_pool3d,
            )
            grid = pools[len(sides) - 1](grid, pooled)
    return cat([first[:, None], grid.flatten(2).transpose(1, 2)], 1)


def _pooled_along(grid: Tensor, axis: int, size: int) -> Tensor:
    """Adaptive average pooling of one axis."""
    side = grid.shape[axis]
    if side == size:
        return grid
    if side % size == 0:
        return grid.unflatten(axis, (size, -1)).mean(axis + 1)
    windows = ((i * side // size, -(-(i + 1) * side // size)) for i in range(size))
    return stack([grid.narrow(axis, a, b - a).mean(axis) for a, b in windows], axis)


def pooled_grid(sides: Sequence[int], max_tokens: int) -> tuple[int, ...]:
    r"""Give the finest grid of about the same aspect with at most ``max_tokens`` places.

    All sides :math:`s_i` are scaled by one factor and rounded down, never under 1:
    :math:`g_i = \max(1, \lfloor t s_i \rfloor)` with the largest :math:`t \le 1` for which
    :math:`\prod g_i` is at most ``max_tokens``: 6x6 and 16 give 4x4, 16x22 and 16 give 3x5.

    Parameters
    ----------
    sides : sequence of int
        Sides of the full grid.
    max_tokens : int
        Largest number of places.

    Returns
    -------
    grid : tuple of int
        Sides of the smaller grid.
    """
    # The product changes only where t makes some side whole, t = k/s; integers keep it exact.
    # It never falls as t grows, so the largest product allowed belongs to the largest t.
    grids = (tuple(max(1, side * k // s) for side in sides) for s in sides for k in range(1, s + 1))
    return max((g for g in grids if math.prod(g) <= max_tokens), key=math.prod)


def _n_groups(d: int) -> int:
    for groups in range(16, 3, -1):
        if d % groups == 0:
            return groups
    raise ValueError(
        f"backbone returns {d} features, which fold into no 4 to 16 equal tokens; give it an "
        "output width with such a divisor (a multiple of 16 is best)."
    )


def _check_output(output: Tensor) -> None:
    if isinstance(output, Tensor) and output.ndim in (2, 3, 4, 5):
        return
    shape = getattr(output, "shape", None)
    what = type(output).__name__ if shape is None else f"shape {tuple(shape)}"
    raise ValueError(
        "backbone must return a tensor of shape (n, d), (n, 1+L, C), (n, C, H, W) or "
        f"(n, C, D, H, W); it returned {what}."
    )


def check_input_shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    """Return ``input_shape`` as a tuple of 1, 3 or 4 ints of at least 1, or raise ValueError."""
    shape = check_ints(input_shape, "input_shape")
    if len(shape) not in (1, 3, 4):
        raise ValueError(f"input_shape={shape}: expected (d,), (C, H, W) or (C, D, H, W).")
    return shape


def check_int(value: Any, name: str) -> int:
    """Return ``value`` as an int of at least 1, or raise a ValueError that names it."""
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1:
        return int(value)
    raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")


def check_ints(value: Any, name: str) -> tuple[int, ...]:
    """Return ``value`` as a tuple of ints of at least 1, or raise a ValueError that names it."""
    if isinstance(value, str) or not hasattr(value, "__iter__") or not (items := tuple(value)):
        raise ValueError(f"{name} must be a sequence of integers of at least 1, got {value!r}.")
    return tuple(check_int(item, name) for item in items)


def check_rate(value: Any, name: str) -> float:
    """Return ``value`` as a float in [0, 1), or raise a ValueError that names it."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if is_number and 0 <= value < 1:
        return float(value)
    raise ValueError(f"{name} must be a number in [0, 1), got {value!r}.")


def check_option(value: Any, name: str, options: Sequence[Any]) -> Any:
    """Return ``value`` if it is one of ``options``, or raise a ValueError that names it."""
    if any(value is option or value == option for option in options):
        return value
    raise ValueError(f"{name} must be one of {list(options)}, got {value!r}.")
