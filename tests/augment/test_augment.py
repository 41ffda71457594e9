import math
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch.utils._python_dispatch import TorchDispatchMode

from sklearn_medimb.augment import (
    AUGMENTATIONS,
    Augmentation,
    _intensity,
    _passes,
    resolve_augmentation,
    symmetries,
)
from sklearn_medimb.augment._geometry import affine_matrix

RANGES = {name: interval for name, (interval,) in Augmentation._parameter_constraints.items()}

SHAPES = [
    (1, 12, 9),
    (2, 9, 12),
    (3, 8, 8),
    (6, 7, 5),
    (1, 6, 8, 7),
    (2, 5, 5, 5),
    (3, 4, 5, 6),
]

# One setting per operation, each certain to act.
SINGLE = {
    "horizontal_flip": {"horizontal_flip": 1.0},
    "vertical_flip": {"vertical_flip": 1.0},
    "rotation": {"rotation": 40.0},
    "shear": {"shear": 20.0},
    "scale": {"scale": 0.5},
    "translate": {"translate": 0.3},
    "crop": {"crop": 0.5},
    "blur": {"blur": 1.5, "blur_probability": 1.0},
    "saturation": {"saturation": 0.8},
    "hue": {"hue": 0.4},
    "grayscale": {"grayscale": 1.0},
    "gamma": {"gamma": 0.5},
    "contrast": {"contrast": 0.5},
    "brightness": {"brightness": 0.5},
    "noise": {"noise": 0.2, "noise_probability": 1.0},
    "cutout": {"cutout": 0.9, "cutout_probability": 1.0},
}
EVERYTHING = {
    **{key: value for options in SINGLE.values() for key, value in options.items()},
    "horizontal_flip": 0.5,
    "vertical_flip": 0.5,
    "depth_flip": 0.5,
    "tilt": 10.0,
    "grayscale": 0.5,
}
COLOURS = {"saturation": 0.8, "hue": 0.4, "grayscale": 0.3}
# Most kernels that drawing and applying a preset may take, of images and of volumes.
KERNELS = {
    "light": (22, 28),
    "medical": (29, 35),
    "chest": (29, 35),
    "strong": (54, 62),
    "contrastive": (40, 42),
    "mimv": (40, 42),
}
LUMA = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(n, shape, seed=1, dtype=torch.float32):
    return 200 * torch.rand((n, *shape), generator=seeded(seed), dtype=dtype) - 50


def smooth_images(n, height, width):
    y = torch.linspace(0, 2, height)[:, None]
    x = torch.linspace(0, 3, width)[None]
    phase = torch.arange(n)[:, None, None, None]
    return torch.sin(x + phase) + torch.cos(2 * y) * x + torch.zeros(n, 1, 1, 1)


def affine(spatial, n=1, *, angles=(), shear=0.0, zoom=1.0, shift=None, sign=None):
    """Build the map of one known warp, repeated n times."""
    dims = len(spatial)

    def rows(values):
        return torch.tensor([values]).repeat(n, 1)

    angles = [math.radians(angle) for angle in angles] + [0.0] * (3 - len(angles))
    return affine_matrix(
        spatial,
        angles=rows(angles),
        shear=rows([math.radians(shear)]),
        step=rows([1 / zoom]),
        shift=rows(shift or [0.0] * dims),
        side=rows(sign or [1.0] * dims),
    )


def hue_matrix(turns):
    """Rotate colours about the grey axis."""
    waves = [[math.cos(2 * math.pi * (turns + (j - i) / 3)) for j in range(3)] for i in range(3)]
    return (1 + 2 * torch.tensor(waves)) / 3


# Interface


def test_every_parameter_has_a_range_and_defaults_lie_in_it():
    params = Augmentation().get_params()
    assert list(params) == sorted(RANGES)
    assert all(value in RANGES[name] for name, value in params.items())


def test_defaults_are_the_identity():
    augment = Augmentation()
    images = random_images(3, (2, 5, 4))
    assert augment.is_identity
    assert augment.draw(3, (2, 5, 4), seeded()) == {}
    assert torch.equal(augment(images, seeded()), images)


@pytest.mark.parametrize("options", SINGLE.values(), ids=SINGLE)
def test_each_operation_changes_images_and_is_not_the_identity(options):
    augment = Augmentation(**options)
    images = random_images(4, (3, 9, 9))
    before = images.clone()
    out = augment(images, seeded())
    assert torch.equal(images, before), "the input was written to"
    assert not augment.is_identity
    assert torch.isfinite(out).all()
    # A blur may be drawn too narrow to reach the next pixel.
    assert (out != images).flatten(1).any(dim=1).sum() >= 3


@pytest.mark.parametrize("name", ["blur", "noise", "cutout"])
def test_probability_zero_switches_off(name):
    augment = Augmentation(**{name: 0.5, f"{name}_probability": 0.0})
    assert augment.is_identity
    assert augment.draw(2, (1, 4, 4), seeded()) == {}


@pytest.mark.parametrize("name", ["blur", "noise", "cutout"])
def test_images_that_are_not_selected_are_unchanged(name):
    augment = Augmentation(**{name: 0.9, f"{name}_probability": 0.5})
    images = random_images(64, (2, 8, 8))
    changed = (augment(images, seeded()) != images).flatten(1).any(dim=1)
    assert 15 < changed.sum() < 49


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_at_once_on_any_shape(shape, dtype):
    augment = Augmentation(**EVERYTHING)
    images = random_images(5, shape, dtype=dtype)
    before = images.clone()
    params = augment.draw(5, shape, seeded())
    out = augment.apply(images, params)
    assert out.shape == images.shape
    assert out.dtype == dtype
    assert torch.isfinite(out).all()
    assert not torch.equal(out, images)
    assert torch.equal(images, before), "the input was written to"
    assert all(value.dtype == torch.float32 and len(value) == 5 for value in params.values())


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 7), (3, 5, 1), (1, 1, 1, 1), (2, 3, 1, 5)])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_tiny_and_odd_sizes(n, shape):
    images = random_images(n, shape)
    out = Augmentation(**EVERYTHING)(images, seeded())
    assert out.shape == images.shape
    assert torch.isfinite(out).all()


def test_double_precision_agrees_with_single():
    augment = Augmentation(**EVERYTHING)
    images = random_images(4, (2, 9, 11), dtype=torch.float64)
    params = augment.draw(4, (2, 9, 11), seeded())
    single = augment.apply(images.float(), params)
    torch.testing.assert_close(single.double(), augment.apply(images, params), rtol=0, atol=5e-2)


@pytest.mark.parametrize("options", [EVERYTHING, COLOURS], ids=["everything", "colours"])
def test_channels_last_is_preserved_and_gives_the_same_values(options):
    augment = Augmentation(**options)
    images = random_images(3, (3, 8, 6))
    params = augment.draw(3, (3, 8, 6), seeded())
    out = augment.apply(images.to(memory_format=torch.channels_last), params)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, augment.apply(images, params))
    assert augment.apply(images, params).is_contiguous()


@pytest.mark.parametrize("channels", [2, 3])
def test_gradients_flow_and_are_finite(channels):
    images = random_images(3, (channels, 6, 6))
    images[1] = 4.0
    images.requires_grad_()
    Augmentation(**EVERYTHING)(images, seeded()).square().sum().backward()
    assert torch.isfinite(images.grad).all()
    assert images.grad[0].abs().sum() > 0


# Kernels


class Kernels(TorchDispatchMode):
    """Record operations, but for views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [result.alias_info for result in func._schema.returns]
        name = func.overloadpacket.__name__
        # A constant of Python made a tensor is "lifted": on the host, from where it must be sent.
        if "lift" in name or not any(alias and not alias.is_write for alias in aliases):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def kernels(augment, shape):
    images, generator = random_images(4, shape), seeded()
    with Kernels() as recorded:
        augment(images, generator)
    return recorded.names


@pytest.fixture
def fuse(monkeypatch):
    """Let passes be fused, as on a GPU, or not."""

    def switch(fused):
        for module in (_passes, _intensity):
            monkeypatch.setattr(module, "is_fused", lambda images: fused)

    return switch


@pytest.mark.parametrize("preset", KERNELS)
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 4, 8, 8)], ids=["images", "volumes"])
def test_presets_take_few_kernels(preset, shape, fuse):
    fuse(True)
    assert len(kernels(resolve_augmentation(preset), shape)) <= KERNELS[preset][len(shape) - 3]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shape", [(3, 9, 7), (3, 4, 5, 6)])
@pytest.mark.parametrize("options", [EVERYTHING, COLOURS | {"hue": 0.0}, {"vertical_flip": 0.5}])
def test_nothing_comes_from_the_host_or_goes_there(options, shape, fused, fuse):
    fuse(fused)
    names = set(kernels(Augmentation(**options), shape))
    assert not {name for name in names if name.startswith("lift")}
    assert not names & {"scalar_tensor", "_local_scalar_dense", "nonzero", "masked_select", "index"}


@pytest.mark.parametrize("shape", [(3, 9, 7), (1, 4, 5, 6)])
@pytest.mark.parametrize("off", [(), ("gamma",), ("contrast",), ("gamma", "contrast"), ("tilt",)])
def test_fewer_kernels_give_the_same(shape, off, fuse):
    options = {k: v for k, v in EVERYTHING.items() if k not in off}
    augment, results = Augmentation(**options), []
    params = augment.draw(5, shape, seeded())
    for fused in (False, True):
        fuse(fused)
        images = random_images(5, shape, dtype=torch.float64)
        images[1] = 4.0
        images.requires_grad_()
        out = augment.apply(images, params)
        out.square().sum().backward()
        results.append((out.detach(), images.grad))
    for several, single in zip(*results, strict=True):
        torch.testing.assert_close(single, several, rtol=1e-9, atol=1e-9)


def test_what_is_compact_can_be_drawn_for_an_epoch():
    compact = {name for name in AUGMENTATIONS if AUGMENTATIONS[name]().is_compact}
    assert compact == set(AUGMENTATIONS) - {"strong"}
    assert AUGMENTATIONS["strong"]().set_params(noise_probability=0.0).is_compact
    for name in compact:
        params = AUGMENTATIONS[name]().draw(20_000, (3, 64, 64), seeded())
        assert sum(value[0].numel() for value in params.values()) < 30
        first = AUGMENTATIONS[name]().draw(5, (3, 64, 64), seeded())
        first.pop("colour", None)  # drawn after all the others
        assert all(torch.equal(params[key][:5], value) for key, value in first.items())


# Randomness


def test_replay_and_same_draw_for_all_channels():
    augment = Augmentation(**EVERYTHING)
    images = random_images(6, (1, 10, 9))
    params = augment.draw(6, (1, 10, 9), seeded())
    copies = {name: value.clone() for name, value in params.items()}
    out = augment.apply(images, params)
    assert torch.equal(out, augment.apply(images, params))
    assert all(torch.equal(params[name], copies[name]) for name in params)
    stacked = augment.apply(images.repeat(1, 3, 1, 1), params)
    # Three equal channels are grey, which a change of colour keeps but for rounding.
    torch.testing.assert_close(stacked, out.repeat(1, 3, 1, 1), rtol=0, atol=1e-3)


def test_same_seed_same_result_and_no_global_state():
    augment = Augmentation(**EVERYTHING)
    images = random_images(4, (1, 8, 8))
    state = torch.get_rng_state()
    first, second, third = (augment(images, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_generator_moves_on():
    augment, generator = Augmentation(rotation=30), seeded()
    images = random_images(4, (1, 8, 8))
    assert not torch.equal(augment(images, generator), augment(images, generator))


@pytest.mark.parametrize(
    "options", [v for k, v in SINGLE.items() if not k.endswith(("flip", "grayscale"))]
)
def test_draws_differ_within_a_batch(options):
    images = random_images(1, (3, 9, 9)).repeat(5, 1, 1, 1)
    out = Augmentation(**options)(images, seeded()).flatten(1)
    different = (out[:, None] != out[None]).any(dim=2)
    # Boxes may coincide, by chance; nothing else does.
    assert different.sum() >= (20 if "cutout" not in options else 14)


def test_order_of_the_batch_is_kept():
    images = torch.arange(8.0).reshape(8, 1, 1, 1) * 100 + random_images(8, (1, 6, 6)) / 100
    out = AUGMENTATIONS["strong"]()(images, seeded())
    assert torch.equal((out.mean((1, 2, 3)) / 100).round(), torch.arange(8.0))


def test_draws_depend_neither_on_the_batch_size_nor_on_other_operations():
    small = Augmentation(rotation=20, contrast=0.3).draw(3, (1, 8, 8), seeded())
    large = Augmentation(rotation=20, contrast=0.3, blur=1, cutout=0.2, gamma=0.2).draw(
        7, (1, 8, 8), seeded()
    )
    assert all(torch.equal(small[name], large[name][:3]) for name in small)


@pytest.mark.parametrize("colours", [{name: value} for name, value in COLOURS.items()] + [COLOURS])
def test_colours_leave_all_other_draws_as_they_are(colours):
    others = {name: value for name, value in EVERYTHING.items() if name not in COLOURS}
    without = Augmentation(**others).draw(5, (3, 6, 6), seeded())
    params = Augmentation(**others, **colours).draw(5, (3, 6, 6), seeded())
    assert "noise" in without
    assert params.keys() - without.keys() == {"colour"}
    assert all(torch.equal(params[name], value) for name, value in without.items())


def test_draws_without_colours_take_the_same_numbers_as_ever():
    generator, expected = seeded(), seeded()
    Augmentation(gamma=0.1, noise=0.1).draw(3, (3, 4, 5), generator)
    tone = torch.rand((3, 30), generator=expected)[:, 15]
    torch.randn((3, 1, 4, 5), generator=expected)
    assert torch.equal(generator.get_state(), expected.get_state())
    gamma = Augmentation(gamma=0.1, hue=0.1).draw(3, (3, 4, 5), seeded())["gamma"]
    torch.testing.assert_close(gamma, torch.exp(0.1 * (2 * tone - 1)))


def test_draws_fill_their_documented_ranges():
    n = 2000
    params = Augmentation(
        gamma=0.5, contrast=0.3, brightness=0.2, horizontal_flip=0.25, scale=1.0
    ).draw(n, (1, 4, 4), seeded())
    for name, low, high in [
        ("gamma", math.exp(-0.5), math.exp(0.5)),
        ("contrast", 0.7, 1.3),
        ("brightness", -0.2, 0.2),
    ]:
        assert low <= params[name].min() < low + 0.01
        assert high - 0.01 < params[name].max() <= high
    step = params["affine"][:, 0, 0]
    assert abs((step < 0).float().mean() - 0.25) < 0.04
    assert 0.5 - 1e-6 <= step.abs().min() < 0.51
    assert 1.97 < step.abs().max() <= 2 + 1e-6
    assert abs((step.abs() > 1).float().mean() - 0.5) < 0.05


# Geometry


@pytest.mark.parametrize(
    ("name", "axis"), [("horizontal_flip", -1), ("vertical_flip", -2), ("depth_flip", -3)]
)
def test_flips_are_exact(name, axis):
    images = random_images(64, (2, 4, 5, 3))
    augment = Augmentation(**{name: 0.5})
    params = augment.draw(64, images.shape[1:], seeded())
    out = augment.apply(images, params)
    flipped = params[name].bool()
    assert 15 < flipped.sum() < 49
    assert torch.equal(out[flipped], images[flipped].flip(axis))
    assert torch.equal(out[~flipped], images[~flipped])


def test_all_flips_together_are_exact():
    images = random_images(2, (3, 4, 5, 6))
    augment = Augmentation(horizontal_flip=1, vertical_flip=1, depth_flip=1)
    assert torch.equal(augment(images, seeded()), images.flip((-1, -2, -3)))


def test_depth_flip_and_tilt_leave_2d_images_alone():
    images = random_images(3, (1, 5, 6))
    assert torch.equal(Augmentation(depth_flip=1.0, tilt=30)(images, seeded()), images)


@pytest.mark.parametrize("shape", [(2, 7, 6), (1, 5, 6, 4)])
def test_flips_within_a_warp_agree_with_exact_flips(shape):
    images = random_images(16, shape)
    flips = {"horizontal_flip": 0.5, "vertical_flip": 0.5, "depth_flip": 0.5}
    # A shift too small to see makes the flips part of the affine map.
    warped = Augmentation(**flips, translate=1e-7)(images, seeded())
    torch.testing.assert_close(warped, Augmentation(**flips)(images, seeded()), rtol=0, atol=1e-2)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 7, 7), (1, 5, 6, 6)])
def test_rotation_by_a_right_angle_of_a_square_is_rot90(shape):
    images = random_images(2, shape)
    params = {"affine": affine(shape[1:], 2, angles=[90.0])}
    torch.testing.assert_close(
        Augmentation().apply(images, params), torch.rot90(images, 1, (-2, -1)), rtol=0, atol=1e-2
    )


@pytest.mark.parametrize(("height", "width"), [(6, 12), (13, 7)])
def test_rotation_by_a_right_angle_is_true_in_pixels(height, width):
    images = random_images(2, (1, height, width))
    out = Augmentation().apply(images, {"affine": affine((height, width), 2, angles=[90.0])})
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    centre = (..., slice(top, top + side), slice(left, left + side))
    expected = torch.rot90(images[centre], 1, (-2, -1))
    torch.testing.assert_close(out[centre], expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize(("plane", "axes"), [(1, (-3, -1)), (2, (-3, -2))])
def test_tilt_turns_a_volume_out_of_its_plane(plane, axes):
    images = random_images(1, (1, 6, 6, 6))
    angles = [0.0, 0.0, 0.0]
    angles[plane] = 90.0
    out = Augmentation().apply(images, {"affine": affine((6, 6, 6), angles=angles)})
    torch.testing.assert_close(out, torch.rot90(images, 1, axes), rtol=0, atol=1e-2)


def test_tilt_is_drawn_for_volumes():
    images = random_images(2, (1, 6, 6, 6))
    assert not torch.equal(Augmentation(tilt=20)(images, seeded()), images)


def test_warp_agrees_with_sampling_pixel_by_pixel():
    height, width, angle, zoom, shear = 21, 15, 25.0, 1.6, 10.0
    shift = (0.2, -0.1)
    image = smooth_images(1, height, width)
    matrix = affine((height, width), angles=[angle], zoom=zoom, shear=shear, shift=list(shift))
    out = Augmentation().apply(image, {"affine": matrix})[0, 0]

    cos, sin, tan = (
        math.cos(math.radians(angle)),
        math.sin(math.radians(angle)),
        math.tan(math.radians(shear)),
    )
    compared = 0
    for row in range(height):
        for col in range(width):
            y, x = row - (height - 1) / 2, col - (width - 1) / 2
            x = x + tan * y
            x, y = (cos * x - sin * y) / zoom, (sin * x + cos * y) / zoom
            x = x + shift[0] * width / 2 + (width - 1) / 2
            y = y + shift[1] * height / 2 + (height - 1) / 2
            if not (0 <= x < width - 1 and 0 <= y < height - 1):
                continue
            i, j = int(y), int(x)
            b, a = y - i, x - j
            p = image[0, 0, i : i + 2, j : j + 2]
            expected = (1 - b) * ((1 - a) * p[0, 0] + a * p[0, 1]) + b * (
                (1 - a) * p[1, 0] + a * p[1, 1]
            )
            assert out[row, col] == pytest.approx(expected.item(), abs=1e-4)
            compared += 1
    assert compared > 150


def test_translation_moves_by_whole_pixels():
    images = random_images(2, (1, 8, 10))
    params = {"affine": affine((8, 10), 2, shift=[2 * 3 / 10, -2 * 2 / 8])}
    out = Augmentation().apply(images, params)
    torch.testing.assert_close(out[..., 2:, :7], images[..., :6, 3:], rtol=0, atol=1e-2)


def test_translation_and_crop_stay_within_their_bounds():
    shift = Augmentation(translate=0.1).draw(500, (1, 8, 8), seeded())["affine"][:, :, 2]
    assert 0.19 < shift.abs().max() <= 0.2
    matrix = Augmentation(crop=0.4).draw(500, (1, 8, 8), seeded())["affine"]
    kept, centre = matrix[:, 0, 0], matrix[:, :, 2]
    assert 0.4 - 1e-6 <= kept.min() < 0.42
    assert 0.98 < kept.max() <= 1
    # The window ends at the border of the image at most, and sometimes almost there.
    assert (kept[:, None] + centre.abs()).max() <= 1 + 1e-6
    assert (kept[:, None] + centre.abs()).max() > 0.99


def test_crop_shows_an_enlarged_window():
    images = smooth_images(1, 32, 32)
    params = {"affine": affine((32, 32), zoom=2.0, shift=[0.5, -0.5])}
    out = Augmentation().apply(images, params)
    window = images[..., :16, 16:]
    expected = torch.nn.functional.interpolate(
        window, scale_factor=2, mode="bilinear", align_corners=False
    )
    inner = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(out[inner], expected[inner], rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 12, 9), (3, 6, 8, 7)])
def test_warps_leave_some_images_alone(shape):
    """The others are flipped at most, and all that is drawn besides stays as it was."""
    always, seldom = (
        Augmentation(**EVERYTHING, warp_probability=share).draw(400, shape, seeded(3))
        for share in (1.0, 0.25)
    )
    dims = len(shape) - 1
    size = seldom["affine"][:, :, :dims].diagonal(dim1=1, dim2=2).abs()
    unmoved = (size == 1).all(1) & (seldom["affine"][:, :, -1] == 0).all(1)
    assert 0.68 < unmoved.float().mean() < 0.82
    torch.testing.assert_close(seldom["affine"][~unmoved], always["affine"][~unmoved])
    for name in always.keys() - {"affine"}:
        torch.testing.assert_close(seldom[name], always[name])


def test_what_is_not_warped_keeps_its_pixels():
    options = {"rotation": 15.0, "scale": 0.2, "translate": 0.1}
    images, _, out = drawn((2, 20, 17), n=200, warp_probability=0.5, **options)
    same = (out - images).abs().flatten(1).amax(1) < 1e-3  # of 200
    assert 70 < same.sum() < 130
    images, params, out = drawn((2, 20, 17), horizontal_flip=1.0, warp_probability=0.0, **options)
    assert set(params) == {"horizontal_flip"}
    assert torch.equal(out, images.flip(-1))


def test_rotation_stays_within_its_bound():
    matrix = Augmentation(rotation=30).draw(1000, (1, 8, 8), seeded())["affine"]
    angle = torch.rad2deg(torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0]))
    assert angle.min() == pytest.approx(-30, abs=0.5)
    assert angle.max() == pytest.approx(30, abs=0.5)
    assert angle.abs().max() <= 30 + 1e-4


@pytest.mark.parametrize("spatial", [(8, 8), (6, 9), (7, 7, 7), (4, 5, 6), (3, 8, 8)])
@pytest.mark.parametrize("off", ["none", "shear", "scale", "crop", "rotation", "tilt"])
def test_affine_maps_are_the_products_of_their_steps(spatial, off):
    options = {"rotation": 70, "tilt": 25, "shear": 30, "scale": 0.4, "translate": 0.2, "crop": 0.6}
    options.pop(off, None)
    flips = {"horizontal_flip": 0.4, "vertical_flip": 0.5, "depth_flip": 0.6}
    params = Augmentation(**options, **flips).draw(9, (1, *spatial), seeded())
    full = {"rotation": 0, "tilt": 0, "shear": 0, "scale": 0, "translate": 0, "crop": 1} | options
    dims, table = len(spatial), torch.rand((9, 30), generator=seeded()).double().numpy()
    half = np.diag(spatial[::-1]) / 2
    for u, matrix in zip(table, params["affine"], strict=True):
        either = 2 * u - 1
        linear = np.eye(dims)
        linear[0, 1] = math.tan(math.radians(full["shear"] * either[6]))
        planes = [(0, 1), (0, 2), (1, 2)][: 1 if dims == 2 else 3]
        limits = [full["rotation"], full["tilt"], full["tilt"]]
        for (i, j), limit, number in zip(planes, limits, either[3:6], strict=False):
            cos, sin = (f(math.radians(limit * number)) for f in (math.cos, math.sin))
            turn = np.eye(dims)
            turn[[i, i, j, j], [i, j, i, j]] = cos, -sin, sin, cos
            linear = turn @ linear
        kept = 1 - (1 - full["crop"]) * u[11]
        linear = np.linalg.inv(half) @ linear @ half * kept / (1 + full["scale"]) ** either[7]
        shift = 2 * full["translate"] * either[8 : 8 + dims] + (1 - kept) * either[12 : 12 + dims]
        sign = [-1.0 if u[i] < flips[name] else 1.0 for i, name in enumerate(flips)][:dims]
        expected = np.diag(sign) @ np.c_[linear, shift]
        np.testing.assert_allclose(matrix.double().numpy(), expected, atol=3e-6)


# Intensity


def drawn(shape=(2, 7, 8), n=6, **options):
    augment = Augmentation(**options)
    images = random_images(n, shape, dtype=torch.float64)
    params = augment.draw(n, shape, seeded())
    return images, params, augment.apply(images, params)


@pytest.mark.parametrize("shape", [(2, 7, 8), (1, 4, 5, 6)])
def test_contrast_brightness_and_gamma_follow_their_formulas(shape):
    images, params, out = drawn(shape, gamma=0.7, contrast=0.5, brightness=0.3)
    for i, image in enumerate(images):
        low, high = image.min(), image.max()
        expected = low + (high - low) * ((image - low) / (high - low)) ** params["gamma"][i]
        for channel in expected:
            mean = channel.mean()
            channel.copy_(mean + params["contrast"][i] * (channel - mean))
        expected += params["brightness"][i] * (high - low)
        torch.testing.assert_close(out[i], expected, rtol=0, atol=1e-4)


def test_gamma_alone_keeps_the_extremes():
    images, params, out = drawn(gamma=0.7)
    torch.testing.assert_close(out.amin((1, 2, 3)), images.amin((1, 2, 3)))
    torch.testing.assert_close(out.amax((1, 2, 3)), images.amax((1, 2, 3)))
    darker = params["gamma"] > 1
    assert ((out.mean((1, 2, 3)) < images.mean((1, 2, 3))) == darker).all()


def test_contrast_alone_keeps_the_mean_and_scales_the_spread():
    images, params, out = drawn(contrast=0.5)
    torch.testing.assert_close(out.mean((2, 3)), images.mean((2, 3)))
    ratio = out.std((2, 3)) / images.std((2, 3))
    expected = params["contrast"].double()[:, None].expand_as(ratio)
    torch.testing.assert_close(ratio, expected)


def test_brightness_alone_shifts_by_a_fraction_of_the_range():
    images, params, out = drawn(brightness=0.5)
    for i in range(len(images)):
        shift = params["brightness"][i].double() * (images[i].max() - images[i].min())
        torch.testing.assert_close(out[i], images[i] + shift)


@pytest.mark.parametrize("shape", [(2, 9, 7), (1, 5, 6, 7)])
def test_blur_is_a_gaussian_convolution(shape):
    images, params, out = drawn(shape, n=3, blur=1.2, blur_probability=1.0)
    kernels = params["blur"].double()
    reach = kernels.shape[1] // 2
    steps = torch.arange(-reach, reach + 1, dtype=torch.float64)
    for image, kernel, result in zip(images, kernels, out, strict=True):
        # The width follows from the ratio of the two central weights.
        sigma = (-0.5 / torch.log(kernel[reach + 1] / kernel[reach])).sqrt()
        assert 0 < sigma <= 1.2
        weights = torch.exp(-0.5 * (steps / sigma) ** 2)
        weights /= weights.sum()
        expected = image
        for axis in range(1, image.ndim):
            index = torch.arange(image.shape[axis])
            expected = sum(
                weight
                * expected.index_select(axis, (index + int(step)).clamp(0, image.shape[axis] - 1))
                for weight, step in zip(weights, steps, strict=True)
            )
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-3)


def test_blur_has_the_drawn_widths():
    kernels = Augmentation(blur=2.0, blur_probability=1.0).draw(500, (1, 4, 4), seeded())["blur"]
    assert kernels.shape[1] == 13
    torch.testing.assert_close(kernels.sum(1), torch.ones(500))
    width = (kernels * torch.arange(-6, 7) ** 2).sum(1).sqrt()
    assert width.max() == pytest.approx(2.0, abs=0.06)
    assert width.min() < 0.1


def slow_colour(image, saturation, turns, drop):
    """Change the colours of one image, one step after the other."""

    def luma(image):
        return torch.einsum("c,c...->...", LUMA, image)[None]

    image = luma(image) + saturation * (image - luma(image))
    angle, axis = 2 * math.pi * turns, torch.full((3,), 3**-0.5, dtype=image.dtype)
    along = axis.reshape(-1, *[1] * (image.ndim - 1)).expand_as(image)
    image = (  # Rodrigues' formula
        math.cos(angle) * image
        + math.sin(angle) * torch.cross(along, image, dim=0)
        + (1 - math.cos(angle)) * (along * image).sum(0, keepdim=True) * along
    )
    return luma(image).expand_as(image) if drop else image


@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 3, 4, 5)])
@pytest.mark.parametrize("off", ["none", *COLOURS])
def test_colours_follow_their_formulas(shape, off):
    options = COLOURS | {off: 0.0} if off in COLOURS else COLOURS
    augment = Augmentation(**options)
    images = random_images(12, shape, dtype=torch.float64)
    out = augment.apply(images, augment.draw(12, shape, seeded()))
    generator = seeded()
    torch.rand((12, 30), generator=generator)
    u = torch.rand((12, 3), generator=generator).tolist()
    for image, result, (saturation, turn, drop) in zip(images, out, u, strict=True):
        expected = slow_colour(
            image,
            1 + options["saturation"] * (2 * saturation - 1),
            options["hue"] * (2 * turn - 1),
            drop < options["grayscale"],
        )
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


def test_colour_matrices_keep_grey_and_saturation_fills_its_range():
    matrices = Augmentation(**COLOURS).draw(500, (3, 4, 4), seeded())["colour"]
    torch.testing.assert_close(matrices.sum(2), torch.ones(500, 3))
    images, params, out = drawn((3, 4, 4), n=2000, saturation=1.0)
    # The trace is a mean of 3, of the identity, and 1, of the luma, weighted by the factor.
    factor = (params["colour"].diagonal(dim1=1, dim2=2).sum(1) - 1) / 2
    assert -1e-6 < factor.min() < 0.01
    assert 1.99 < factor.max() < 2 + 1e-6
    before, after = (torch.einsum("c,bcij->bij", LUMA, batch) for batch in (images, out))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)


def test_hue_turns_colours_about_the_grey_axis():
    images, params, out = drawn((3, 6, 6), n=2000, hue=0.5)
    torch.testing.assert_close(out.mean(1), images.mean(1), rtol=0, atol=1e-4)
    torch.testing.assert_close(out.std(1), images.std(1), rtol=0, atol=1e-4)
    # The trace of a rotation is one and twice its cosine: up to half a turn, either way.
    cosine = (params["colour"].diagonal(dim1=1, dim2=2).sum(1) - 1) / 2
    assert cosine.min() < -0.99
    assert cosine.max() > 0.99
    assert abs((params["colour"][:, 0, 1] < params["colour"][:, 1, 0]).float().mean() - 0.5) < 0.05
    few = Augmentation(hue=0.1).draw(2000, (3, 6, 6), seeded())["colour"]
    assert ((few.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).min() == pytest.approx(
        math.cos(0.2 * math.pi), abs=0.01
    )


def test_a_third_of_a_turn_makes_red_green_and_green_blue():
    images = random_images(2, (3, 4, 4))
    matrices = torch.stack([hue_matrix(1 / 3), hue_matrix(-1 / 3)])
    out = Augmentation().apply(images, {"colour": matrices})
    torch.testing.assert_close(out[0], images[0, [2, 0, 1]], rtol=0, atol=1e-3)
    torch.testing.assert_close(out[1], images[1, [1, 2, 0]], rtol=0, atol=1e-3)


def test_grayscale_gives_the_luma_in_all_channels_to_the_selected_images():
    images, _, out = drawn((3, 5, 6), grayscale=1.0)
    luma = torch.einsum("c,bcij->bij", LUMA, images)
    torch.testing.assert_close(out[:, 0], luma, rtol=0, atol=1e-4)
    assert torch.equal(out, out[:, :1].expand_as(out))
    images, _, out = drawn((3, 5, 6), n=64, grayscale=0.5)
    grey = (out == out[:, :1]).flatten(1).all(1)
    assert 15 < grey.sum() < 49
    assert torch.equal(out[~grey], images[~grey])


@pytest.mark.parametrize("shape", [(3, 6, 5), (3, 4, 5, 6)])
def test_greys_in_three_channels_stay_as_they_are(shape):
    images = random_images(20, (1, *shape[1:])).repeat(1, *shape[:1], *[1] * (len(shape) - 1))
    out = Augmentation(**COLOURS)(images, seeded())
    torch.testing.assert_close(out, images, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 5, 6), (2, 5, 6), (4, 5, 6), (4, 3, 5, 6), (1, 3, 3, 3)])
def test_images_without_three_channels_ignore_colour(shape):
    images = random_images(4, shape)
    assert torch.equal(Augmentation(**COLOURS)(images, seeded()), images)
    others = {"rotation": 20, "gamma": 0.4, "noise": 0.1}
    expected = Augmentation(**others)(images, seeded())
    assert torch.equal(Augmentation(**others, **COLOURS)(images, seeded()), expected)


def test_gamma_clips_colours_to_the_extremes():
    images = torch.tensor([1.0, 1.0, 0.0]).reshape(1, 3, 1, 1).repeat(1, 1, 3, 3)
    matrices = hue_matrix(1 / 6)[None]
    turned = Augmentation().apply(images, {"colour": matrices})
    torch.testing.assert_close(turned[0, :, 0, 0], torch.tensor([1 / 3, 4 / 3, 1 / 3]))
    params = {"colour": matrices, "gamma": torch.tensor([2.0])}
    out = Augmentation().apply(images, params)
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([1 / 9, 1.0, 1 / 9]))
    blue = Augmentation().apply(1 - images, params)
    torch.testing.assert_close(blue[0, :, 0, 0], torch.tensor([4 / 9, 0.0, 4 / 9]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 6, 5), (3, 4, 5, 6)])
def test_colours_keep_dtype_layout_and_input(shape, dtype):
    last = torch.channels_last if len(shape) == 3 else torch.channels_last_3d
    images = random_images(4, shape).to(dtype).to(memory_format=last)
    before = images.clone()
    augment = Augmentation(**COLOURS, gamma=0.4, contrast=0.3)
    params = augment.draw(4, shape, seeded())
    out = augment.apply(images, params)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=last)
    assert torch.equal(images, before), "the input was written to"
    assert torch.equal(out, augment.apply(images, params))
    assert torch.equal(out[2:], augment.apply(images[2:], {k: v[2:] for k, v in params.items()}))


def test_noise_has_the_drawn_spread_of_the_range_of_the_image():
    images, params, out = drawn((2, 40, 40), n=40, noise=0.3, noise_probability=1.0)
    added = out - images
    span = images.amax((1, 2, 3)) - images.amin((1, 2, 3))
    fraction = added[:, 0].flatten(1).std(1) / span
    torch.testing.assert_close(fraction, params["noise"].double().flatten(1).std(1))
    assert 0.27 < fraction.max() < 0.32
    assert fraction.min() < 0.05
    assert (added.mean((1, 2, 3)).abs() < 0.04 * span).all()
    torch.testing.assert_close(added[:, 0], added[:, 1])
    assert abs(torch.corrcoef(added[:2, 0].flatten(1))[0, 1]) < 0.1


@pytest.mark.parametrize("shape", [(2, 10, 14), (1, 6, 8, 7)])
def test_cutout_fills_one_box_with_the_mean_of_each_channel(shape):
    images, params, out = drawn(shape, n=20, cutout=0.5, cutout_probability=1.0)
    for image, result, box in zip(images, out, params["cutout"].int().tolist(), strict=True):
        expected = image.clone()
        area = 1
        for side, (start, stop) in zip(shape[1:], box, strict=True):
            assert 0 <= start < stop <= side
            assert stop - start <= math.ceil(0.5 * side)
            area *= stop - start
        where = (slice(None), *(slice(*bounds) for bounds in box))
        expected[where] = image.flatten(1).mean(1).reshape(-1, *[1] * (image.ndim - 1))
        assert (result != image).sum() == shape[0] * area
        torch.testing.assert_close(result, expected)


def test_cutout_reaches_everywhere():
    images, _, out = drawn((1, 8, 8), n=300, cutout=0.3, cutout_probability=1.0)
    assert (out != images).any(dim=0).all()


@pytest.mark.parametrize("value", [0.0, -1000.0, 3.7])
@pytest.mark.parametrize("channels", [2, 3])
def test_a_constant_image_stays_constant(value, channels):
    images = torch.full((4, channels, 6, 6), value)
    out = Augmentation(**EVERYTHING)(images, seeded())
    torch.testing.assert_close(out, images)


@pytest.mark.parametrize(("preset", "channels"), [("strong", 1), ("contrastive", 3), ("mimv", 3)])
def test_effects_do_not_depend_on_the_scale_of_the_intensities(preset, channels):
    augment = AUGMENTATIONS[preset]()
    images = random_images(4, (channels, 12, 12), dtype=torch.float64)
    params = augment.draw(4, (channels, 12, 12), seeded())
    scaled = augment.apply(30 * images - 1000, params)
    torch.testing.assert_close(
        scaled, 30 * augment.apply(images, params) - 1000, rtol=1e-4, atol=1e-2
    )


# Errors


@pytest.mark.parametrize("name", list(RANGES))
@pytest.mark.parametrize("value", [-0.1, 1e6, float("nan"), "much", None, True])
def test_bad_values_are_reported_when_drawing(name, value):
    augment = Augmentation(**{name: value})
    with pytest.raises(ValueError, match=rf"^{name} must be a number in \[.*\], got"):
        augment.draw(2, (1, 4, 4), seeded())


def test_bad_shapes_and_generators():
    augment = Augmentation(rotation=10)
    with pytest.raises(ValueError, match="image_shape"):
        augment.draw(2, (4, 4), seeded())
    with pytest.raises(TypeError, match="generator"):
        augment.draw(2, (1, 4, 4), None)
    params = augment.draw(2, (1, 4, 4), seeded())
    with pytest.raises(ValueError, match="affine was drawn for 2 images, got 3"):
        augment.apply(torch.rand(3, 1, 4, 4), params)
    with pytest.raises(ValueError, match="floating-point"):
        augment.apply(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), params)
    with pytest.raises(ValueError, match="images must be"):
        augment.apply(torch.rand(2, 4, 4), params)


# Presets


@pytest.mark.parametrize("name", list(AUGMENTATIONS))
@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 6, 6, 6)])
def test_presets_change_images_but_none_does_not(name, shape):
    augment = resolve_augmentation(name)
    images = random_images(8, shape)
    out = augment(images, seeded())
    assert isinstance(augment, Augmentation)
    assert augment.is_identity == (name == "none")
    changed = (out != images).flatten(1).any(dim=1)
    assert changed.all() if name != "none" else not changed.any()
    assert torch.isfinite(out).all()


def test_presets_are_new_each_time():
    resolve_augmentation("light").set_params(rotation=90)
    assert resolve_augmentation("light").rotation == 10


@pytest.mark.parametrize("shape", [(1, 24, 24), (1, 12, 12, 12)])
def test_chest_is_medical_without_mirror_images(shape):
    images = torch.zeros(300, *shape)
    images[..., :4] = 1.0  # a bright left edge

    def share_on_the_right(preset):
        out = resolve_augmentation(preset)(images, seeded())
        halves = [half.flatten(1).mean(dim=1) for half in out.tensor_split(2, dim=-1)]
        return float((halves[1] > halves[0]).float().mean())

    assert share_on_the_right("chest") == 0
    assert 0.4 < share_on_the_right("medical") < 0.6
    chest, medical = (resolve_augmentation(preset).get_params() for preset in ("chest", "medical"))
    differing = {name for name in chest if chest[name] != medical[name]}
    assert differing == {"horizontal_flip", "vertical_flip", "depth_flip"}
    assert len(symmetries(resolve_augmentation("chest"), shape, 8)) == 1


@pytest.mark.parametrize("sides", [(4, 4), (4, 5), (3, 4, 4), (4, 4, 3)])
def test_symmetries_are_flips_and_turns_in_order(sides):
    images = random_images(2, (1, *sides))
    x, y, z = -1, -2, -3
    flips = [(x,), (y,), (z,), (x, y), (x, z), (y, z), (x, y, z)]
    flipped = [images.flip(axes) for axes in flips if -min(axes) <= len(sides)]
    turned = []
    if sides[x] == sides[y]:
        quarter, three = (torch.rot90(images, k, (y, x)) for k in (1, 3))
        turned = [quarter, three, quarter.flip(x), quarter.flip(y)]
    n = len(sides)
    expected = [images, *flipped[:n], *turned[:1], *flipped[n:], *turned[1:]]
    for most in range(1, len(expected) + 3):
        views = symmetries(resolve_augmentation("medical"), (1, *sides), most)
        assert len(views) == min(most, len(expected))
        assert all(torch.equal(f(images), e) for f, e in zip(views, expected, strict=False))


def test_resolve_augmentation():
    class Own:
        def draw(self, n, image_shape, generator):
            return {}

        def apply(self, images, params):
            return images

    own, augment = Own(), Augmentation(rotation=3)
    assert resolve_augmentation(own) is own
    assert resolve_augmentation(augment) is augment
    assert resolve_augmentation(None).is_identity
    with pytest.raises(ValueError, match=r"augment must be one of 'none', 'light'.*'heavy'"):
        resolve_augmentation("heavy")
    for bad in (3, Augmentation, object()):
        with pytest.raises(TypeError, match=r"augment must be one of 'none', 'light'"):
            resolve_augmentation(bad)


def test_clone_pickle_and_params_round_trip():
    augment = Augmentation(**EVERYTHING)
    images = random_images(3, (1, 8, 8))
    expected = augment(images, seeded())
    for copy in (
        clone(augment),
        pickle.loads(pickle.dumps(augment)),
        pickle.loads(pickle.dumps(augment, 0).replace(b"._augmentation\n", b"\n")),  # as of old
        Augmentation(**augment.get_params()),
    ):
        assert copy.get_params() == augment.get_params()
        assert torch.equal(copy(images, seeded()), expected)


# Devices


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_the_device():
    augment = Augmentation(**EVERYTHING)
    images = random_images(4, (3, 16, 16)).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    augment(images, generator)
    try:
        torch.cuda.set_sync_debug_mode("error")
        params = augment.draw(4, images.shape[1:], generator)
        out = augment.apply(images, params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    params = {name: value.cpu() for name, value in params.items()}
    torch.testing.assert_close(out.cpu(), augment.apply(images.cpu(), params), rtol=0, atol=0.05)
