"""Where pixels go: flips, affine maps, boxes."""

from __future__ import annotations

from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from sklearn_medimb.augment._passes import addcmul

# Flips and the axis they reverse, counted from the last.
FLIPS = {"horizontal_flip": -1, "vertical_flip": -2, "depth_flip": -3}


def geometry(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the draws for a batch those that move pixels: for masks and maps of the same images.

    Parameters
    ----------
    params : dict of str to Tensor
        What `draw` returned.

    Returns
    -------
    params : dict of str to Tensor
        A part of it. Affine maps are in units of half sides, so that the maps may be coarser.
    """
    return {name: value for name, value in params.items() if name in {"affine", *FLIPS}}


def affine_matrix(
    spatial: tuple[int, ...],
    angles: Tensor | None,
    shear: Tensor | None,
    step: Tensor | None,
    shift: Tensor,
    side: Tensor,
) -> Tensor:
    """Compose one affine map per image, from places in the output to places in the input.

    Places are in the coordinates of the sampling grid: x, y, z for W, H, D, from -1 at one
    border to 1 at the other.

    Parameters
    ----------
    spatial : tuple of int
        Sides of the image, (H, W) or (D, H, W).
    angles : Tensor of shape (n, 3) or None
        Angles in radians in the planes x-y, x-z and y-z; the last two are for volumes only. In
        the first, a positive angle turns the picture counterclockwise.
    shear : Tensor of shape (n, 1) or None
        Shear along x, in radians.
    step : Tensor of shape (n, 1) or None
        What one pixel of the output spans in the input: the inverse of the magnification.
    shift : Tensor of shape (n, d)
        Place in the input of the centre of the output.
    side : Tensor of shape (n, 3)
        Negative for an axis to flip.

    Returns
    -------
    affine : Tensor of shape (n, d, d + 1)
        Linear part and, in the last column, shift.
    """
    sides = spatial[::-1]
    dims = len(sides)
    eye = torch.eye(dims, device=shift.device)
    one, zero = eye[0, :2]
    if angles is None:
        affine = torch.cat([eye.expand(len(shift), dims, dims), shift[:, :, None]], dim=2)
    else:
        # Products of matrices would be rounded to TF32 where a user allows it, so that theirs is
        # written out. The entries are cosines and sines, of either sign.
        turn = torch.polar(one, angles[:, : 2 * dims - 3])
        back = torch.conj_physical(turn)
        (cos, sin), (_, minus) = (torch.view_as_real(z).unbind(dim=2) for z in (turn, back))
        if dims == 2:
            rows = [cos, minus, shift[:, :1], sin, cos, shift[:, 1:]]
        else:
            # The turn in x-z, then that in y-z.
            pair = torch.view_as_real(turn)[:, 1, :, None] * torch.view_as_real(back)[:, 2, None]
            cc, cs, sc, ss = pair.flatten(1).split(1, dim=1)
            (_, c2, c3), (_, _, s3), (_, m2, _) = (x.split(1, dim=1) for x in (cos, sin, minus))
            x, y, z = shift.split(1, dim=1)
            rows = [c2, zero.expand_as(c2), m2, x, ss, c3, cs, y, sc, s3, cc, z]
        affine = torch.cat(rows, dim=1).reshape(-1, dims, dims + 1)
        if dims == 3:
            # Before them that in x-y: it mixes the first two columns, as complex numbers.
            torch.view_as_complex(affine.reshape(-1, 3, 2, 2))[:, :, 0].mul_(back[:, :1])
    linear = affine[:, :, :dims]
    if shear is not None:
        linear[:, :, 1].addcmul_(linear[:, :, 0], torch.tan(shear))
    # So far in pixels: a step of 1 in the grid is half a side, of its own length for each axis.
    for axis, length in enumerate(sides):
        if length != sides[0]:
            linear[:, axis].mul_(sides[0] / length)
            linear[:, :, axis].mul_(length / sides[0])
    if step is not None:
        linear.mul_(step[:, :, None])
    return affine.mul_(torch.copysign(one, side[:, :dims, None]))


def warp(images: Tensor, affine: Tensor) -> Tensor:
    # The grid is a sum of one vector per axis. Kept as planes it takes a single pass over its
    # full size, which is many times faster than multiplying every point by its matrix.
    dims = affine.shape[1]
    columns = affine.reshape(len(affine), dims, dims + 1, *[1] * dims).unbind(dim=2)
    linspace = partial(torch.linspace, device=affine.device, dtype=affine.dtype)
    centres = {side: linspace(1 / side - 1, 1 - 1 / side, side) for side in set(images.shape[2:])}
    grid = columns[-1]
    for axis in reversed(range(dims)):
        place = centres[images.shape[-1 - axis]].reshape(-1, *[1] * axis)
        grid = addcmul(grid, place, columns[axis])
    return F.grid_sample(
        images,
        grid.movedim(1, -1),
        mode="bilinear",
        padding_mode="reflection",
        align_corners=False,
    )


def in_boxes(boxes: Tensor, spatial: tuple[int, ...]) -> Tensor:
    # Bounds are whole numbers, so that the middle of a pixel is in the box or not.
    middle = torch.arange(0.5, max(spatial), device=boxes.device)
    hit = middle.clamp(boxes[:, :, :1], boxes[:, :, 1:]) == middle
    planes = [
        hit[:, axis, :side].reshape(-1, 1, *[1] * axis, side, *[1] * (len(spatial) - 1 - axis))
        for axis, side in enumerate(spatial)
    ]
    return reduce(torch.logical_and, planes)
