"""Synthetic lesions: images that need no licence, of a difficulty that one can choose."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
from sklearn.utils import Bunch, check_random_state


class _Kind(NamedTuple):
    """What tells a class: lobes around the border, how deep they are, and spots inside."""

    name: str
    lobes: int
    depth: float
    spots: float


KINDS = (
    _Kind("round", 0, 0.0, 0.0),
    _Kind("oval", 2, 0.30, 0.0),
    _Kind("three-lobed", 3, 0.26, 0.0),
    _Kind("star-shaped", 5, 0.24, 0.0),
    _Kind("spotted", 0, 0.0, 1.0),
    _Kind("oval, spotted", 2, 0.30, 1.0),
    _Kind("three-lobed, spotted", 3, 0.26, 1.0),
    _Kind("star-shaped, spotted", 5, 0.24, 1.0),
)
_BLOCK = 2**21  # pixels at a time


def make_lesions(
    n_samples: int | Sequence[int] = 500,
    *,
    n_classes: int = 5,
    image_size: int = 64,
    spatial_dims: int = 2,
    difficulty: float = 0.5,
    images_per_patient: int = 1,
    skin_range: Any = (0.0, 1.0),
    random_state: Any = None,
) -> Bunch:
    """Draw synthetic skin lesions, or nodules in volumes.

    A lesion has the border and the spots of its class, and a place, size, colour, sharpness and
    smaller irregularities of its own. Around it are skin of some tone, hairs, and the dark corners
    of a dermoscope. Images of a patient share the class, the skin and nearly the lesion, so that
    they must not straddle a split.

    Parameters
    ----------
    n_samples : int or sequence of n_classes ints, default=500
        Images in all, shared out evenly among the classes, or images of each class.
    n_classes : int, default=5
        1 to 8: round, oval, three-lobed, star-shaped, spotted, and the three others with spots.
        Unused where `n_samples` is a sequence.
    image_size : int, default=64
        Side in pixels, at least 8.
    spatial_dims : {2, 3}, default=2
        3 makes gray volumes of `image_size` per side: bright nodules in noise.
    difficulty : float, default=0.5
        From 0, where border and contrast give the class away, to 1, where irregularities are as
        large as what tells the classes.
    images_per_patient : int, default=1
        Images of a patient; the last one of a class may have fewer.
    skin_range : pair of float, or one pair per class, default=(0, 1)
        Range of skin tones, from light (0) to dark (1). Narrow ranges of some classes in training
        and wide ones in test make the background a false clue.
    random_state : int, RandomState or None, default=None
        Seeds everything.

    Returns
    -------
    data : Bunch
        ``images``: uint8 of shape (n, H, W, 3) or (n, D, H, W); ``target``: int of shape (n,);
        ``groups``: patients, int of shape (n,); ``masks``: bool of shape (n, H, W) or
        (n, D, H, W), where the lesion is; ``skin``: tones, float of shape (n,); ``target_names``.

    Raises
    ------
    ValueError
        If a parameter is out of its range.

    Examples
    --------
    >>> from sklearn_medimb.datasets import make_lesions
    >>> data = make_lesions([40, 10, 5], image_size=32, random_state=0)
    >>> data.images.shape, data.target_names
    ((55, 32, 32, 3), ['round', 'oval', 'three-lobed'])
    """
    counts: np.ndarray
    for name, value, least in (
        ("n_classes", n_classes, 1),
        ("image_size", image_size, 8),
        ("images_per_patient", images_per_patient, 1),
        *(("n_samples", n, 0) for n in np.ravel(np.asarray(n_samples, dtype=object))),
    ):
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}.")
    if isinstance(n_samples, Integral):
        if not 1 <= n_classes <= len(KINDS) or n_samples < n_classes:
            raise ValueError(
                f"n_classes={n_classes} must be 1 to {len(KINDS)}, and n_samples={n_samples} no "
                "less."
            )
        counts = np.bincount(np.arange(int(n_samples)) % n_classes)
    else:
        counts = np.asarray(n_samples, dtype=int)
        if not 1 <= len(counts) <= len(KINDS) or (counts < 1).any():
            raise ValueError(
                f"n_samples={n_samples} must hold at least 1 image for each of 1 to {len(KINDS)} "
                "classes."
            )
    if spatial_dims not in (2, 3) or not isinstance(spatial_dims, Integral):
        raise ValueError(f"spatial_dims={spatial_dims!r} must be 2 or 3.")
    is_number = isinstance(difficulty, Real) and not isinstance(difficulty, bool)
    if not is_number or not 0 <= difficulty <= 1:
        raise ValueError(f"difficulty={difficulty!r} must be a number from 0 to 1.")
    tones = np.asarray(skin_range, dtype=float)
    if tones.shape not in ((2,), (len(counts), 2)) or not ((tones >= 0) & (tones <= 1)).all():
        raise ValueError(
            f"skin_range={skin_range} must be a pair of numbers from 0 to 1, or one pair for each "
            f"of the {len(counts)} classes."
        )
    rng = np.random.default_rng(check_random_state(random_state).randint(2**31 - 1))

    target = np.repeat(np.arange(len(counts)), counts)
    within = np.concatenate([np.arange(n) // images_per_patient for n in counts])
    _, patient = np.unique(np.stack([target, within]), axis=1, return_inverse=True)
    low, high = np.broadcast_to(tones, (len(counts), 2))[target].T
    skin = low + (high - low) * rng.random(patient.max() + 1)[patient]

    order = rng.permutation(len(target))
    target, skin = target[order], skin[order]
    patient = rng.permutation(patient.max() + 1)[patient[order]]
    traits = _traits(target, patient, difficulty, spatial_dims, rng)
    sides = (image_size,) * spatial_dims
    channels = (3,) if spatial_dims == 2 else ()
    images = np.empty((len(target), *sides, *channels), dtype=np.uint8)
    masks = np.empty((len(target), *sides), dtype=bool)
    block = max(1, _BLOCK // image_size**spatial_dims)
    for start in range(0, len(target), block):
        part = slice(start, start + block)
        some = {name: trait[part] for name, trait in traits.items()}
        inside, spots = _lesion(some, sides, rng)
        masks[part] = inside > 0.5
        paint = _photograph if spatial_dims == 2 else _scan
        images[part] = paint(inside, spots, some, skin[part], difficulty, rng)
    return Bunch(
        images=images,
        target=target,
        groups=patient,
        masks=masks,
        skin=skin,
        target_names=[kind.name for kind in KINDS[: len(counts)]],
    )


def _traits(
    target: np.ndarray, patient: np.ndarray, difficulty: float, dims: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Draw what each lesion looks like; images of a patient differ by little."""
    n, n_patients = len(target), patient.max() + 1

    def shared(low: float, high: float, wobble: float, *shape: int) -> Any:
        own = rng.uniform(low, high, (n_patients, *shape))[patient]
        return (own + wobble * rng.normal(size=(n, *shape))).astype(np.float32)

    kinds = [KINDS[k] for k in target]
    depth = np.array([kind.depth for kind in kinds]) * (1 - 0.2 * difficulty)
    irregular = 0.01 + 0.05 * difficulty
    return {
        "centre": shared(-0.3, 0.3, 0.05, dims),
        "radius": shared(0.32, 0.52, 0.02),
        "lobes": np.array([kind.lobes for kind in kinds], dtype=np.float32),
        "depth": (depth * rng.uniform(0.8, 1.2, n)).astype(np.float32),
        "turn": shared(0, 2 * np.pi, 0.1),
        # Irregular harmonics 1 to 6, the same for every class.
        "wobble": shared(-irregular, irregular, 0.01, 6)
        / np.sqrt(np.arange(1, 7, dtype=np.float32)),
        "phase": shared(0, 2 * np.pi, 0.05, 6),
        "softness": shared(0.02, 0.07, 0.005).clip(0.01),
        "contrast": shared(0.65, 0.95, 0.02) * (1 - 0.25 * difficulty),
        "spots": np.array([kind.spots for kind in kinds], dtype=np.float32),
        "tint": shared(-1, 1, 0.05, 3),
    }


def _smooth(shape: tuple[int, ...], n: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of unit variance with `cells` cells per side, interpolated linearly: (n, *shape)."""
    noise = rng.standard_normal((n, *[cells + 1] * len(shape)), dtype=np.float32)
    for axis, side in enumerate(shape, 1):
        place = np.linspace(0, cells, side, endpoint=False, dtype=np.float32)
        nearness = np.clip(1 - np.abs(place[:, np.newaxis] - np.arange(cells + 1)), 0, 1)
        noise = np.moveaxis(np.moveaxis(noise, axis, -1) @ nearness.T.astype(np.float32), -1, axis)
    return noise * np.float32(1.5 ** (len(shape) / 2))


def _grid(sides: tuple[int, ...]) -> Sequence[np.ndarray]:
    """Coordinates of the pixels along each axis, from -1 to 1."""
    return np.meshgrid(*[np.linspace(-1, 1, n, dtype=np.float32) for n in sides], indexing="ij")


def _over(values: np.ndarray, dims: int) -> np.ndarray:
    """Shape one number per image to combine with images of `dims` axes."""
    return values.reshape(len(values), *[1] * dims)


def _lesion(
    traits: dict[str, np.ndarray], sides: tuple[int, ...], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """How much each pixel belongs to the lesion, and to its spots: (n, *sides), 0 to 1."""
    dims, n = len(sides), len(traits["radius"])
    places = _grid(sides)
    offsets = [place - _over(traits["centre"][:, axis], dims) for axis, place in enumerate(places)]
    in_plane = offsets[-1] ** 2 + offsets[-2] ** 2
    distance = np.sqrt(sum(offset**2 for offset in offsets))
    angle = np.arctan2(offsets[-2], offsets[-1])
    border = _over(traits["depth"], dims) * np.cos(
        _over(traits["lobes"], dims) * angle + _over(traits["turn"], dims)
    )
    for harmonic in range(6):
        border += _over(traits["wobble"][:, harmonic], dims) * np.cos(
            (harmonic + 1) * angle + _over(traits["phase"][:, harmonic], dims)
        )
    if dims == 3:  # no lobes at the poles
        border *= in_plane / np.maximum(distance**2, 1e-6)
    edge = _over(traits["radius"], dims) * (1 + border)
    inside = 1 / (1 + np.exp(np.clip((distance - edge) / _over(traits["softness"], dims), -30, 30)))
    fine = _smooth(sides, n, max(4, min(12, sides[0] // 4)), rng)
    return inside, inside * _over(traits["spots"], dims) * (fine > 0.8)


def _photograph(
    inside: np.ndarray,
    spots: np.ndarray,
    traits: dict[str, np.ndarray],
    skin: np.ndarray,
    difficulty: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Colour images of lesions on skin, as uint8 of shape (n, H, W, 3)."""
    n, sides = len(inside), inside.shape[1:]
    light, dark = np.array([0.93, 0.76, 0.68]), np.array([0.50, 0.36, 0.29])
    tone = (light + (dark - light) * skin[:, np.newaxis]).astype(np.float32)
    brown = tone * (np.array([0.55, 0.42, 0.38]) + 0.06 * traits["tint"]).astype(np.float32)
    texture = (
        1
        + 0.05 * _smooth(sides, n, 6, rng)
        + 0.03 * rng.standard_normal(inside.shape, dtype=np.float32)
    )
    pigment = 1 + 0.12 * _smooth(sides, n, 8, rng)
    share = (inside * _over(traits["contrast"], 2))[..., np.newaxis]
    images = tone[:, np.newaxis, np.newaxis] * texture[..., np.newaxis] * (1 - share)
    images += brown[:, np.newaxis, np.newaxis] * (pigment * texture)[..., np.newaxis] * share
    images *= 1 - (0.45 * (1 - 0.2 * difficulty)) * spots[..., np.newaxis]

    y, x = _grid(sides)
    images *= _hairs(y, x, n, difficulty, rng)[..., np.newaxis]
    reach = rng.uniform(1.15, 1.5, n).astype(np.float32)
    radius = np.sqrt(y**2 + x**2)
    images *= (1 / (1 + np.exp((radius - _over(reach, 2)) / 0.05)))[..., np.newaxis] * 0.85 + 0.15
    images *= _over(rng.uniform(0.85, 1.1, n).astype(np.float32), 3)
    return np.clip(255 * images, 0, 255).astype(np.uint8)


def _hairs(
    y: np.ndarray, x: np.ndarray, n: int, difficulty: float, rng: np.random.Generator
) -> np.ndarray:
    """Shade of up to six bent hairs an image: (n, H, W)."""
    shade = np.ones((n, *y.shape), dtype=np.float32)
    n_hairs = rng.binomial(6, 0.35 * difficulty, n)
    for hair in range(n_hairs.max(initial=0)):
        rows = np.flatnonzero(n_hairs > hair)
        turn, shift, bend = rng.uniform([0, -0.9, -0.4], [np.pi, 0.9, 0.4], (len(rows), 3)).T
        turn, shift, bend = (_over(part.astype(np.float32), 2) for part in (turn, shift, bend))
        along, across = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
        width = max(1.2 / y.shape[0], 0.012)
        shade[rows] *= 1 - 0.6 * (np.abs(across - shift - bend * along**2) < width)
    return shade


def _scan(
    inside: np.ndarray,
    spots: np.ndarray,
    traits: dict[str, np.ndarray],
    skin: np.ndarray,
    difficulty: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Gray volumes with a bright nodule in tissue, as uint8 of shape (n, D, H, W)."""
    tissue = 0.45 - 0.25 * _over(skin, 3) + 0.05 * _smooth(inside.shape[1:], len(inside), 5, rng)
    noise = (0.03 + 0.03 * difficulty) * rng.standard_normal(inside.shape, dtype=np.float32)
    nodule = 0.5 * _over(traits["contrast"], 3) * inside * (1 - 0.7 * spots)
    return np.clip(255 * (tissue + nodule + noise), 0, 255).astype(np.uint8)
