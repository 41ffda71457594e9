"""Resizing: Pillow's and torch's values, the same for an image in whatever company."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator

from sklearn_medimb._data.images import read_images
from sklearn_medimb._data.layout import infer_layout
from sklearn_medimb._data.pixel_scale import PixelScale
from sklearn_medimb._data.resize import Resize, _bicubic, axis_weights, resample, resolve_size

SIZES = [
    ((37, 53), (16, 16)),
    ((37, 53), (128, 96)),
    ((5, 200), (64, 63)),
    ((64, 64), (64, 31)),
    ((201, 96), (33, 77)),
    ((300, 211), (33, 77)),
    ((1, 9), (4, 4)),
    ((7, 7), (1, 1)),
]


class Estimator(BaseEstimator):
    """Receives what reading sets."""


def noise(*shape, dtype=np.uint8):
    values = np.random.default_rng(0).integers(0, 256, shape)
    return values.astype(np.uint8) if dtype == np.uint8 else (values / 255).astype(dtype)


def waves(height, width):
    rows, columns = np.mgrid[:height, :width]
    return (127 + 120 * np.sin(rows / 7) * np.cos(columns / 5)).astype(np.uint8)


def one(image, *args):
    return resample(torch.from_numpy(np.ascontiguousarray(image))[None], *args)[0].numpy()


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(("sides", "size"), SIZES)
@pytest.mark.parametrize("make", [noise, waves])
def test_uint8_is_pillows_within_a_grey_level(make, sides, size):
    pillow = pytest.importorskip("PIL.Image")
    image = make(*sides)
    height, width = size
    expected = pillow.fromarray(image).resize((width, height), pillow.Resampling.BICUBIC)
    found = one(image[None], size)[0]
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_colours_are_pillows_too():
    pillow = pytest.importorskip("PIL.Image")
    image = noise(40, 30, 3)
    expected = np.asarray(pillow.fromarray(image).resize((17, 19), pillow.Resampling.BICUBIC))
    found = np.moveaxis(one(np.moveaxis(image, -1, 0), (19, 17)), 0, -1)
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize(("sides", "size"), SIZES)
@pytest.mark.parametrize(("dtype", "atol"), [(np.float32, 1e-5), (np.float64, 1e-12)])
def test_floats_are_torchs_within_the_range_of_each_channel(sides, size, dtype, atol):
    images = torch.from_numpy(noise(2, 3, *sides, dtype=dtype))
    images[:, 1] *= 0.5
    expected = F.interpolate(images, size, mode="bicubic", antialias=True)
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    found = resample(images, size)
    assert found.dtype == images.dtype
    np.testing.assert_allclose(found, expected.clamp(low, high), rtol=0, atol=atol)


def test_volumes_are_resized_axis_by_axis():
    volumes = torch.from_numpy(noise(2, 1, 6, 20, 9, dtype=np.float64))
    planes = F.interpolate(
        volumes.movedim(2, 1).flatten(0, 1), (12, 7), mode="bicubic", antialias=True
    ).unflatten(0, (2, 6))
    through = planes.permute(0, 2, 3, 4, 1)  # depth last
    flat = through.reshape(1, 1, -1, 6)
    expected = F.interpolate(flat, (flat.shape[2], 10), mode="bicubic", antialias=True)
    expected = expected.reshape(2, 1, 12, 7, 10).movedim(-1, 2)
    expected = expected.clamp(
        volumes.amin((2, 3, 4), keepdim=True), volumes.amax((2, 3, 4), keepdim=True)
    )
    np.testing.assert_allclose(resample(volumes, (10, 12, 7)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_the_right_size_is_left_alone(dtype):
    images = torch.from_numpy(noise(2, 1, 8, 9)).to(dtype)
    for aspect in ("stretch", "pad", "crop"):
        assert resample(images, (8, 9), aspect) is images


@pytest.mark.parametrize("aspect", ["stretch", "pad", "crop"])
def test_constant_images_stay_constant(aspect):
    for value in (0, 77, 255):
        assert (one(np.full((1, 13, 40), value, np.uint8), (9, 31), aspect) == value).all()


def test_overshoot_stays_within_the_range_of_the_image():
    edge = np.zeros((1, 8, 8), np.float32)
    edge[..., 4:] = 1.2
    found = one(edge, (31, 31))
    assert found.min() == 0
    assert found.max() == edge.max()
    free = F.interpolate(torch.from_numpy(edge)[None], (31, 31), mode="bicubic", antialias=True)
    assert free.min() < -0.01


# ---------------------------------------------------------------- aspect


def test_crop_is_pillows_box():
    pillow = pytest.importorskip("PIL.Image")
    image = noise(40, 61)
    expected = pillow.fromarray(image).resize(
        (20, 20), pillow.Resampling.BICUBIC, box=(10.5, 0, 50.5, 40)
    )
    found = one(image[None], (20, 20), "crop")[0]
    assert np.abs(found.astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_pad_repeats_the_outermost_pixels_around_the_whole_image():
    image = noise(20, 40)
    inner = one(image[None], (10, 20))[0]
    found = one(image[None], (20, 20), "pad")[0]
    assert np.array_equal(found[5:15], inner)
    assert (found[:5] == inner[0]).all()
    assert (found[15:] == inner[-1]).all()
    wide = one(noise(1, 8, 8), (8, 13), "pad")[0]  # nothing but padding: exact
    assert np.array_equal(wide[:, 2:10], noise(8, 8))


def test_aspects_agree_where_the_ratio_is_kept():
    image = noise(1, 24, 36)
    expected = one(image, (16, 24))
    for aspect in ("pad", "crop"):
        assert np.array_equal(one(image, (16, 24), aspect), expected)


def test_an_extreme_ratio_keeps_a_pixel():
    assert one(noise(1, 2, 900), (8, 8), "pad").shape == (1, 8, 8)
    assert one(noise(1, 2, 900), (8, 8), "crop").shape == (1, 8, 8)


# ---------------------------------------------------------------- company, memory


@pytest.mark.parametrize(
    ("shape", "size"),
    [((3, 37, 53), (16, 16)), ((1, 60, 41), (64, 64)), ((2, 9, 12, 14), (6, 8, 20))],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_an_image_does_not_depend_on_the_others(shape, size, dtype):
    images = torch.from_numpy(noise(13, *shape, dtype=dtype))
    together = resample(images, size)
    for n in (1, 2, 5):
        assert torch.equal(resample(images[:n], size), together[:n])
        assert torch.equal(resample(images[-n:], size), together[-n:])
    last = images.movedim(1, -1).contiguous().movedim(-1, 1)
    assert torch.equal(resample(last, size), together)


def test_weights_are_kept_for_few_sizes():
    for side in range(20, 120):
        axis_weights((side,), (16,), "stretch")
    info = _bicubic.cache_info()
    assert info.currsize <= info.maxsize <= 64


def test_weights_of_inference_serve_training():
    images = torch.rand(1, 1, 11, 11)
    with torch.inference_mode():
        resample(images, (5, 5))
    images.requires_grad_()
    resample(images, (5, 5)).sum().backward()
    assert images.grad.isfinite().all()


# ---------------------------------------------------------------- what may be asked for


@pytest.mark.parametrize(
    "size",
    [0, -3, 4097, True, 2.5, "128", (), (8, 0), (8, 4097), Resize(0), Resize((8, "8")),
     Resize(8, "squash")],
    ids=repr,
)  # fmt: skip
def test_what_is_no_size_is_refused(size):
    with pytest.raises(ValueError, match="image_size"):
        resolve_size(size)


def test_numbers_of_numpy_are_sizes():
    assert resolve_size(np.int64(8)).size == 8
    assert resolve_size(None) is None


# ---------------------------------------------------------------- reading


def read(X, size, **params):
    return read_images(Estimator(), X, reset=True, image_size=size, **params)


def everything(images):
    return images.rows(np.arange(len(images))).numpy()


def of_several_sizes(n=7, dtype=np.uint8, channels=3):
    rng = np.random.default_rng(1)
    return [noise(channels, *rng.integers(9, 30, 2), dtype=dtype) for _ in range(n)]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_list_of_several_sizes(dtype):
    given = of_several_sizes(dtype=dtype)
    images = read(given, 12)
    assert images.image_shape == (3, 12, 12)
    expected = np.stack([one(image, (12, 12)) for image in given])
    assert np.array_equal(everything(images), expected)
    kept = images.in_memory()
    assert not kept.lazy
    assert kept.dtype == dtype
    assert np.array_equal(everything(kept), expected)
    assert kept.peak == images.peak


def test_rows_come_in_their_order_with_repeats():
    given = of_several_sizes()
    picks = np.array([4, 0, 4, 6, 1])
    images = read(given, 12)
    assert torch.equal(images.rows(picks), torch.from_numpy(everything(images))[picks])


def test_small_blocks_give_the_same(monkeypatch):
    array, given = noise(9, 3, 20, 30), of_several_sizes()
    expected = [everything(read(X, 12).in_memory()) for X in (array, given)]
    monkeypatch.setattr("sklearn_medimb._data.images.AT_ONCE", 1)
    for X, whole in zip((array, given), expected, strict=True):
        assert np.array_equal(everything(read(X, 12)), whole)
        assert np.array_equal(everything(read(X, 12).in_memory()), whole)


def test_an_array_of_the_right_size_is_not_copied():
    array = noise(4, 3, 12, 12)
    images = read(array, 12).in_memory()
    assert images.resize is None
    assert np.shares_memory(images.data, array)


@pytest.mark.parametrize("layout", ["last", "gray", "flat", "paired", "volumes"])
def test_every_layout(layout):
    array = noise(3, 2, 3, 10, 14)
    if layout == "paired":
        images = read(array, (8, 9), paired=True)
        expected = np.stack([one(pair.reshape(6, 10, 14), (8, 9)) for pair in array])
    elif layout == "volumes":
        gray = noise(3, 6, 10, 14)
        images = read([gray[0], gray[1][:5], gray[2][:, 1:]], (4, 8, 9), spatial_dims=3)
        parts = (gray[0], gray[1][:5], gray[2][:, 1:])
        expected = np.stack([one(part[None], (4, 8, 9)) for part in parts])
    else:
        plain = array[:, 0]
        expected = np.stack([one(image, (8, 9)) for image in plain])
        X, params = np.moveaxis(plain, 1, -1), {}
        if layout == "gray":
            X, expected = plain[:, 0], expected[:, :1]
        elif layout == "flat":
            X, params = plain.reshape(3, -1), {"image_shape": (3, 10, 14)}
        images = read(X, (8, 9), **params)
    assert np.array_equal(everything(images), expected)


@pytest.mark.parametrize(
    ("shape", "other"),
    [
        ((3, 9, 9), (1, 9, 9)),
        ((9, 9, 3), (9, 8, 4)),
        ((3, 9, 9), (3, 0, 9)),
        ((2, 3, 9, 9), (3, 3, 9, 9)),
    ],
)
def test_a_layout_holds_for_images_that_agree(shape, other):
    layout = infer_layout((1, *shape), paired=len(shape) == 4)
    assert layout.of(shape) == layout
    with pytest.raises(ValueError, match="differ"):
        layout.of(other)


def test_pictures():
    pillow = pytest.importorskip("PIL.Image")
    arrays = [np.moveaxis(image, 0, -1) for image in of_several_sizes()]
    pictures = [pillow.fromarray(image) for image in arrays]
    assert np.array_equal(everything(read(pictures, 12)), everything(read(arrays, 12)))
    pictures[3] = pictures[3].convert("L")
    with pytest.raises(ValueError, match="row 0 is RGB, row 3 is L"):
        read(pictures, 12)


def test_dtypes_beside_one_another_come_to_one_scale():
    given = of_several_sizes()
    mixed = [image / 255 if row % 2 else image for row, image in enumerate(given)]
    floats = [(image / 255).astype(np.float32) for image in given]
    np.testing.assert_allclose(everything(read(mixed, 12)), everything(read(floats, 12)), atol=1e-6)


def test_odd_images_are_named():
    given = of_several_sizes()
    for odd in (given[5][:1], given[5][:, :0]):
        with pytest.raises(ValueError, match=r"Row 5 of X has shape .* image_size"):
            everything(read([*given[:5], odd, *given[6:]], 12))
    with pytest.raises(ValueError, match=r"numbers of axes: .* row 5 has shape"):
        read([*given[:5], given[5][0], *given[6:]], 12)
    broken = [image.astype(float) for image in given]
    broken[5][0, 3, 3] = np.nan
    with pytest.raises(ValueError, match=r"NaN: see row 5"):
        everything(read(broken, 12))


def test_several_sizes_without_a_target_are_refused_by_the_name_of_the_parameter():
    with pytest.raises(ValueError, match=r"different sizes: row 0 .*image_size="):
        read(of_several_sizes(), None)


def test_scales_are_told_apart_by_the_pixels_as_they_were():
    rng = np.random.default_rng(0)
    bright = [rng.random((1, *rng.integers(9, 30, 2))) * 255 for _ in range(8)]
    # Interpolated before, so that no row is made of multiples of 1/255: only many rows show it.
    mixed = [image / 255 if row % 2 else image for row, image in enumerate(bright)]
    with pytest.raises(ValueError, match="mixes images whose scales may differ"):
        everything(read(mixed, 8))
    images = read(bright, 8)
    everything(images)
    assert images.peak == pytest.approx(max(image.max() for image in bright))


def test_a_gate_sees_the_pixels_as_they_were():
    images = read([np.full((1, 9, 9), 0.5), np.full((1, 12, 9), 0.5)], 6)
    images.scale = PixelScale("It", 1.0, 0.5, unit=True)
    everything(images)
    hot = np.full((1, 12, 9), 0.5)
    hot[0, 5, 5] = 1.6  # the resized image stays below 1.5
    assert one(hot, (6, 6)).max() < 1.5
    images = read([np.full((1, 9, 9), 0.5), hot], 6)
    images.scale = PixelScale("It", 1.0, 0.5, unit=True)
    with pytest.raises(ValueError, match="see row 1"):
        everything(images)
