"""Saliency maps: invariances, the slow formula, degenerate images, the transformer."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from sklearn_medimb import SaliencyMap
from sklearn_medimb.saliency import (
    DETECTORS,
    center,
    fine_grained,
    intensity,
    saliency_maps,
    spectral_residual,
    valid_region,
)
from sklearn_medimb.saliency._detectors import RADII
from sklearn_medimb.utils.estimator_checks import LazyImages

SHAPES = [(1, 20, 24), (3, 17, 9), (2, 6, 8, 7), (1, 1, 12), (4, 1, 1)]


def noise(n, *shape, seed=0, dtype=torch.float64):
    return torch.rand(n, *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def blurred(gray):
    """Binomial 3 x 3 blur, twice, mirrored at the edge pixels: by hand."""
    for _ in range(2):
        wide = np.pad(gray, 1, mode="reflect")
        h, w = gray.shape
        gray = sum(
            (2 - abs(i - 1)) * (2 - abs(j - 1)) / 16 * wide[i : i + h, j : j + w]
            for i in range(3)
            for j in range(3)
        )
    return gray


def slow_fine_grained(gray, radii, inside, polarity):
    """Pixel by pixel, straight from the definition."""
    inside = inside.astype(bool)
    gray = blurred(np.where(inside, gray, gray[inside].mean()))
    h, w = gray.shape
    on, off = np.zeros_like(gray), np.zeros_like(gray)
    for r in radii:
        for y in range(h):
            for x in range(w):
                box = np.s_[max(y - r, 0) : y + r + 1, max(x - r, 0) : x + r + 1]
                n = inside[box].sum() - 1
                mean = ((gray * inside)[box].sum() - gray[y, x]) / n if n > 0 else gray[y, x]
                on[y, x] += max(0, gray[y, x] - mean)
                off[y, x] += max(0, mean - gray[y, x])
    on, off = (part * inside / (part * inside).max() for part in (on, off))
    return {"both": np.minimum(on + off, 1), "dark": off, "bright": on}[polarity]


@pytest.mark.parametrize("polarity", ["both", "dark", "bright"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reference_size", [450.0, 30.0, None])
def test_fine_grained_is_its_definition(polarity, masked, reference_size):
    images = noise(2, 3, 14, 11)
    valid = torch.ones(2, 14, 11, dtype=torch.bool)
    if masked:
        valid[0, :3] = False
        valid[1, :, 8:] = False
    scale = 1 if reference_size is None else 11 / reference_size
    radii = [max(1, round(r * scale)) for r in RADII]
    maps = fine_grained(
        images,
        polarity=polarity,
        reference_size=reference_size,
        valid=valid if masked else None,
    )
    for image, mask, found in zip(images, valid, maps, strict=True):
        gray = np.einsum("chw,c->hw", image.numpy(), [0.299, 0.587, 0.114])
        wanted = slow_fine_grained(gray, radii, mask.numpy(), polarity)
        np.testing.assert_allclose(found.numpy(), wanted, atol=1e-12)


def test_radii_follow_the_shorter_side():
    from sklearn_medimb.saliency._detectors import _radii

    assert [r[0] for r in _radii((224, 300), 450.0)] == [6, 12, 24, 14, 28, 56]
    assert [r[1] for r in _radii((28, 28), 450.0)] == [1, 1, 3, 2, 3, 7]
    assert [r[0] for r in _radii((450, 600), None)] == list(RADII)
    thin = _radii((16, 450, 450), 450.0)
    assert thin[5] == (4, 112, 112)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DETECTORS)
def test_maps_lie_in_the_unit_interval(name, shape):
    images = noise(5, *shape, dtype=torch.float32)
    before = images.clone()
    maps = DETECTORS[name](images)
    assert maps.shape == (5, *shape[1:])
    assert maps.dtype == images.dtype
    assert ((maps >= 0) & (maps <= 1)).all()
    if np.prod(shape[1:]) > 1 and name != "center":
        assert torch.allclose(maps.flatten(1).amax(1), torch.ones(5))
    torch.testing.assert_close(images, before, rtol=0, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0, -2.0e4, 4095.1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DETECTORS)
def test_constant_image_has_nothing_salient(name, shape, value):
    for dtype in (torch.float32, torch.float64):
        assert not DETECTORS[name](torch.full((2, *shape), value, dtype=dtype)).any()


@pytest.mark.parametrize("shape", [(1, 20, 24), (3, 17, 9), (2, 6, 8, 7)])
@pytest.mark.parametrize(("a", "b"), [(3.0, 7.0), (255.0, 0.0), (0.01, -5.0)])
@pytest.mark.parametrize("name", DETECTORS)
def test_scale_and_offset_do_not_matter(name, shape, a, b):
    images = noise(3, *shape)
    torch.testing.assert_close(
        DETECTORS[name](a * images + b), DETECTORS[name](images), rtol=0, atol=1e-9
    )


def test_fine_grained_sees_negatives_alike_and_swaps_polarity():
    images = noise(3, 1, 15, 18)
    torch.testing.assert_close(fine_grained(-images), fine_grained(images), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        fine_grained(-images, polarity="dark"),
        fine_grained(images, polarity="bright"),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("shape", [(1, 20, 24), (3, 17, 9), (2, 6, 8, 7)])
@pytest.mark.parametrize("detect", [fine_grained, center])
def test_flips_and_transposition_commute(detect, shape):
    images = noise(3, *shape)
    maps = detect(images)
    for axis in range(1, maps.ndim):
        flipped = detect(images.flip(axis + 1))
        torch.testing.assert_close(flipped, maps.flip(axis), rtol=0, atol=1e-12)
    turned = detect(images.transpose(-1, -2))
    torch.testing.assert_close(turned, maps.transpose(-1, -2), rtol=0, atol=1e-12)


def test_blocks_do_not_matter(monkeypatch):
    images = noise(7, 1, 12, 12)
    valid = images[:, 0] > 0.1
    whole = {name: detect(images, valid=valid) for name, detect in DETECTORS.items()}
    monkeypatch.setattr("sklearn_medimb.saliency._detectors.pixel_block", lambda *_: 2)
    for name, detect in DETECTORS.items():
        torch.testing.assert_close(detect(images, valid=valid), whole[name], rtol=0, atol=1e-12)


def dark_square():
    image = torch.full((1, 1, 48, 48), 0.8, dtype=torch.float64)
    image[..., 20:30, 22:32] = 0.2
    return image


def test_dark_square_stands_out():
    maps = fine_grained(dark_square(), polarity="dark")[0]
    assert maps[20:30, 22:32].mean() > maps[:10].mean() + 0.5
    both = fine_grained(dark_square())[0]
    assert both[20:30, 22:32].mean() > both[:10].mean() + 0.3
    assert not (fine_grained(dark_square(), polarity="bright")[0, 22:28, 24:30] > 0.1).any()


def test_spectral_residual_is_its_definition():
    image = noise(1, 1, 64, 64)[0, 0]
    gray = (image - image.min()) / (image.max() - image.min())
    spectrum = np.fft.fft2(gray.numpy())
    log_amplitude = np.log(np.abs(spectrum))
    wide = np.pad(log_amplitude, 1, mode="reflect")
    mean = sum(wide[i : i + 64, j : j + 64] for i in range(3) for j in range(3)) / 9
    residual = np.exp(log_amplitude - mean + 1j * np.angle(spectrum))
    maps = np.abs(np.fft.ifft2(residual))
    weights = np.exp(-(np.arange(-2, 3) ** 2) / 128)
    weights = np.outer(weights, weights) / weights.sum() ** 2
    wide = np.pad(maps, 2, mode="reflect")
    maps = sum(weights[i, j] * wide[i : i + 64, j : j + 64] for i in range(5) for j in range(5))
    maps = maps**2
    found = spectral_residual(image[None, None])[0].numpy()
    np.testing.assert_allclose(found, maps / maps.max(), atol=1e-9)


def test_center_is_a_bump():
    maps = center(noise(2, 1, 101, 51))
    assert maps[0].argmax() == 50 * 51 + 25
    assert maps[0, 50, 25] == 1
    assert maps[0, 0, 25].item() == pytest.approx(np.exp(-2 * (100 / 101) ** 2))


# ---------------------------------------------------------------- masks


def fundus(n=2, size=40):
    """A bright disc with a dark spot, in a black frame."""
    grid = torch.linspace(-1, 1, size, dtype=torch.float64)
    radius = (grid[:, None] ** 2 + grid**2).sqrt()
    disc = (radius < 0.8).double()
    disc[18:22, 18:22] = 0  # as black as the frame, but inside
    image = disc * (0.6 + 0.05 * noise(1, size, size)[0])
    return image.expand(n, 3, size, size), radius < 0.8


def test_valid_region_is_the_disc_with_what_it_encloses():
    images, disc = fundus()
    assert torch.equal(valid_region(images)[0], disc)
    assert valid_region(torch.full((1, 3, 8, 8), 0.4)).all()
    volume = torch.zeros(1, 1, 5, 7, 9)
    volume[..., 1:4, 2:5, 3:6] = 1
    assert torch.equal(valid_region(volume), volume[:, 0].bool())


@pytest.mark.parametrize("name", DETECTORS)
def test_mask_keeps_the_frame_out(name):
    images, disc = fundus()
    maps = saliency_maps(images, name, mask="auto")
    assert not maps[:, ~disc].any()
    assert maps[:, disc].any()
    given = saliency_maps(images, name, mask=disc.expand(2, -1, -1))
    torch.testing.assert_close(given, maps, rtol=0, atol=0)


def test_mask_gives_the_lesion_back_its_contrast():
    images, disc = fundus()
    ring = disc.clone()
    ring[14:26, 14:26] = False
    spot = np.s_[0, 18:22, 18:22]
    framed, masked = (saliency_maps(images, mask=mask) for mask in (None, "auto"))
    assert (
        masked[spot].mean() / masked[0, ring].mean() > framed[spot].mean() / framed[0, ring].mean()
    )


# ---------------------------------------------------------------- callables


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda x: x[:, 0], lambda x: x[:, 0]),
        (lambda x: x[:, 0].numpy(), lambda x: x[:, 0]),
        (lambda x: x[:, 0] > 0.5, lambda x: (x[:, 0] > 0.5).double()),
        (lambda x: (x[:, 0] * 255).byte(), lambda x: (x[:, 0] * 255).byte() / 255),
        (lambda x: (x[:, 0] > 0.5).byte(), lambda x: (x[:, 0] > 0.5).double()),
    ],
)
def test_callables_give_maps_in_any_form(make, wanted):
    images = noise(3, 1, 6, 5)
    found = saliency_maps(images, make)
    torch.testing.assert_close(found, wanted(images).double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda x: x[:, :, 1:],
            r"saliency has maps of shape \(3, 1, 5, 5\); it must be \(3, 6, 5\)",
        ),
        (lambda x: 2 * x[:, 0] + 1, r"\[0, 1\].*row 0"),
        (lambda x: torch.where(torch.arange(3)[:, None, None] == 1, torch.nan, x[:, 0]), "row 1"),
    ],
)
def test_wrong_maps_of_callables_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        saliency_maps(noise(3, 1, 6, 5), make)


def test_intensity_is_luma_for_three_channels_and_the_mean_else():
    images = noise(2, 3, 4, 4)
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    torch.testing.assert_close(intensity(images), torch.einsum("nchw,c->nhw", images, weights))
    other = noise(2, 5, 4, 4)
    torch.testing.assert_close(intensity(other), other.mean(1))


# ---------------------------------------------------------------- the transformer


def test_transformer_reads_every_layout_alike():
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (6, 12, 10, 3), dtype=np.uint8)
    maps = SaliencyMap().fit_transform(X)
    assert maps.shape == (6, 12, 10)
    assert maps.dtype == np.float32
    wanted = fine_grained(torch.from_numpy(X).movedim(-1, 1).float()).numpy()
    np.testing.assert_allclose(maps, wanted, atol=1e-5)
    first = np.ascontiguousarray(np.moveaxis(X, -1, 1))
    np.testing.assert_array_equal(SaliencyMap().fit_transform(first), maps)
    flat = SaliencyMap(image_shape=(12, 10, 3)).fit_transform(X.reshape(6, -1))
    np.testing.assert_array_equal(flat, maps.reshape(6, -1))
    np.testing.assert_array_equal(SaliencyMap().fit_transform(LazyImages(X)), maps)
    np.testing.assert_array_equal(SaliencyMap().fit_transform(list(X)), maps)
    np.testing.assert_array_equal(SaliencyMap().fit_transform(torch.from_numpy(X)), maps)


@pytest.mark.parametrize("dtype", [bool, np.int16, np.uint16, np.float16, np.float32, np.float64])
def test_transformer_takes_any_number(dtype):
    X = (np.random.default_rng(0).random((3, 9, 9)) > 0.5).astype(dtype)
    maps = SaliencyMap().fit_transform(X)
    np.testing.assert_allclose(maps, SaliencyMap().fit_transform(X.astype(np.float64)), atol=1e-5)


def test_transformer_reads_volumes_and_needs_no_fit():
    X = np.random.default_rng(0).random((2, 6, 7, 8))
    transformer = SaliencyMap(spatial_dims=3)
    np.testing.assert_array_equal(transformer.transform(X), transformer.fit(X).transform(X))
    assert transformer.transform(X).shape == X.shape


@pytest.mark.parametrize(
    ("params", "X", "message"),
    [
        ({}, np.where(np.eye(8) > 0, np.nan, 1.0)[None].repeat(2, 0), "NaN.*row 0"),
        ({}, np.zeros((2, 8, 7, 6)), "data_format"),
        ({"saliency": "sobel"}, np.zeros((2, 8, 8)), "'saliency' parameter"),
        ({"polarity": "grey"}, np.zeros((2, 8, 8)), "'polarity' parameter"),
        ({"mask": "black"}, np.zeros((2, 8, 8)), "'mask' parameter"),
        ({"image_shape": (3, 3)}, np.zeros((2, 8)), "image_shape"),
        ({}, np.zeros((0, 8, 8)), "0 sample"),
    ],
)
def test_transformer_refuses_wrong_input(params, X, message):
    transformer = SaliencyMap(**params)
    with pytest.raises(ValueError, match=message):
        transformer.fit(X)
    assert not hasattr(transformer, "image_shape_")


def test_transformer_refuses_another_size_than_it_was_fitted_on():
    transformer = SaliencyMap().fit(np.zeros((2, 8, 8)))
    with pytest.raises(ValueError, match="fitted on images of shape"):
        transformer.transform(np.zeros((2, 8, 9)))


# ---------------------------------------------------------------- against OpenCV


def photographs():
    """Crops of the photographs that scikit-learn ships, and dermoscopy where it is at hand."""
    pytest.importorskip("PIL", reason="pillow reads the photographs")
    crops = [
        photo[y : y + 130, x : x + 150]
        for photo in load_sample_images().images
        for y in range(0, 380, 140)
        for x in range(0, 600, 155)
    ]
    folder = os.environ.get("MEDIMB_DATA")
    if folder is not None:
        with np.load(Path(folder) / "ph2_dermoscopy.npz", allow_pickle=False) as archive:
            crops += list(archive["images"][::8])
    # OpenCV truncates to integers, which drowns the faint contrast of an empty sky.
    return [np.ascontiguousarray(crop) for crop in crops if crop.std() > 20]


@pytest.mark.parametrize(
    ("detect", "name", "over_images"),
    [
        (partial(fine_grained, reference_size=None), "StaticSaliencyFineGrained_create", np.min),
        (spectral_residual, "StaticSaliencySpectralResidual_create", np.median),
    ],
    ids=["fine_grained", "spectral_residual"],
)
def test_maps_correlate_with_opencv(detect, name, over_images):
    cv2 = pytest.importorskip("cv2", reason="opencv-contrib-python-headless is not installed")
    if not hasattr(cv2, "saliency"):
        pytest.skip("this OpenCV has no contrib modules")
    images = photographs()
    assert len(images) >= 20
    theirs = getattr(cv2.saliency, name)()
    correlations = []
    for image in images:
        found = detect(torch.from_numpy(image).movedim(-1, 0)[None].float())[0]
        _, wanted = theirs.computeSaliency(image[..., ::-1].copy())
        correlations.append(np.corrcoef(found.ravel(), wanted.ravel())[0, 1])
    assert over_images(correlations) >= 0.99


# ---------------------------------------------------------------- what the outside does not see


@pytest.mark.parametrize("name", DETECTORS)
def test_what_lies_outside_the_mask_has_no_influence(name):
    images = noise(2, 3, 20, 16)
    valid = torch.ones(2, 20, 16, dtype=torch.bool)
    valid[:, :5] = False
    black, white = (torch.where(valid[:, None], images, value) for value in (0.0, 9.0))
    one, two = (DETECTORS[name](part, valid=valid) for part in (black, white))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-9)
    assert one[:, 5:].any()


def test_masked_rim_does_not_hide_a_faint_lesion():
    images, disc = fundus()
    images = torch.where(disc, 0.5 + 0.01 * noise(1, 40, 40)[0], torch.zeros(40, 40)).expand(
        1, 3, 40, 40
    )
    images = images.clone()
    images[..., 16:24, 16:24] -= 0.08
    maps = fine_grained(images, polarity="dark", valid=disc[None])[0]
    eroded = disc.clone()
    eroded[1:-1, 1:-1] = disc[:-2, 1:-1] & disc[2:, 1:-1] & disc[1:-1, :-2] & disc[1:-1, 2:]
    assert maps[17:23, 17:23].mean() > 3 * maps[disc & ~eroded].mean()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_refuse_what_is_not_finite(name, value):
    images = noise(2, 1, 8, 8)
    images[1, 0, 3, 3] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        DETECTORS[name](images)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: fine_grained(x, polarity="drak"), "polarity='drak'"),
        (lambda x: fine_grained(x[0]), "images has shape"),
        (
            lambda x: fine_grained(x, valid=torch.ones(1, 8, 8).bool()),
            r"valid has shape \(1, 8, 8\)",
        ),
        (lambda x: spectral_residual(x, size=2), "size=2"),
        (lambda x: saliency_maps(x, "sobel"), "saliency='sobel'"),
        (lambda x: saliency_maps(x, mask="black"), "mask='black'"),
    ],
)
def test_functions_refuse_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(noise(3, 1, 8, 8))


def test_functions_take_integers_and_half_precision():
    images = (255 * noise(2, 1, 12, 12)).byte()
    wanted = fine_grained(images.float())
    assert torch.equal(fine_grained(images), wanted)
    torch.testing.assert_close(fine_grained(images.bfloat16()), wanted, rtol=0, atol=1e-5)


def test_hot_pixel_of_a_scan_does_not_hide_the_lesion():
    rng = np.random.default_rng(0)
    X = rng.normal(100, 5, (1, 48, 48))
    X[0, 20:28, 20:28] -= 40
    hot = X.copy()
    hot[0, 3, 3] = 4000
    plain, with_hot = (SaliencyMap(polarity="dark").fit_transform(part)[0] for part in (X, hot))
    assert with_hot[21:27, 21:27].mean() > 0.8 * plain[21:27, 21:27].mean()


def test_callables_may_use_gradients():
    """Class-activation maps need them."""
    images = noise(3, 2, 6, 5)
    layer = torch.nn.Conv2d(2, 1, 3, padding=1).double()

    def gradients(batch):
        with torch.enable_grad():
            batch = batch.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(layer(batch).square().sum(), batch)
        return gradient.abs().sum(1) / gradient.abs().sum(1).max()

    X = images.numpy()
    maps = SaliencyMap(gradients, data_format="channels_first").fit_transform(X)
    np.testing.assert_allclose(maps, gradients(images).numpy(), atol=1e-6)


@pytest.mark.parametrize("param", [{"saliency": "sobel"}, {"polarity": "drak"}, {"mask": "black"}])
def test_transform_without_fit_checks_the_parameters(param):
    with pytest.raises(ValueError, match=next(iter(param))):
        SaliencyMap(**param).transform(np.zeros((2, 8, 8)))


def test_polarity_and_mask_reach_the_detector():
    X = np.full((1, 40, 40), 0.5)
    X[0, 10:16, 10:16], X[0, 26:32, 26:32] = 0.2, 0.8
    dark, bright = (SaliencyMap(polarity=p).fit_transform(X)[0] for p in ("dark", "bright"))
    assert dark[12, 12] > 0.5 > dark[28, 28]
    assert bright[28, 28] > 0.5 > bright[12, 12]
    framed = np.zeros((1, 40, 40))
    framed[:, 8:32, 8:32] = X[:, 8:32, 8:32]
    maps = SaliencyMap(mask="auto").fit_transform(framed)[0]
    assert not maps[:8].any()
    assert SaliencyMap().fit_transform(framed)[0][:8].any()


def test_flat_rows_without_a_shape_are_warned_of():
    with pytest.warns(UserWarning, match="images of height 1: set image_shape"):
        SaliencyMap().fit(np.random.default_rng(0).random((3, 16)))
