"""The mixing ratio and the mix: bounds, invariances, the slow formula, tokens and pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sklearn_medimb.mixing import expand_ratio, patch_means, spmix, spmix_ratio
from sklearn_medimb.saliency import fine_grained


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def slow_patch_means(maps, patch):
    """Patch by patch over the mirrored map."""
    sides = maps.shape[1:]
    lack = [-s % p for s, p in zip(sides, patch, strict=True)]
    wide = np.pad(maps, [(0, 0), *[(0, n) for n in lack]], mode="reflect")
    grid = [s // p for s, p in zip(wide.shape[1:], patch, strict=True)]
    out = np.empty((len(maps), *grid))
    for place in np.ndindex(*grid):
        box = tuple(slice(g * p, (g + 1) * p) for g, p in zip(place, patch, strict=True))
        out[(slice(None), *place)] = wide[(slice(None), *box)].reshape(len(maps), -1).mean(1)
    return out


GEOMETRIES = [
    ((12, 8), (4, 4)),
    ((13, 9), (4, 4)),
    ((7, 11), (3, 2)),
    ((5, 6, 9), (2, 3, 4)),
    ((9, 9), (1, 1)),
]


@pytest.mark.parametrize(("sides", "patch"), GEOMETRIES)
def test_patch_means_are_their_definition(sides, patch):
    maps = noise(3, *sides)
    np.testing.assert_allclose(patch_means(maps, patch), slow_patch_means(maps.numpy(), patch))


@pytest.mark.parametrize(("cap", "floor"), [(0.8, 0.5), (1.0, 0.0), (0.3, 0.5), (0.0, 0.0)])
@pytest.mark.parametrize(("sides", "patch"), GEOMETRIES)
def test_patch_ratio_is_its_definition(sides, patch, cap, floor):
    s_t, s_h = noise(3, *sides), noise(3, *sides, seed=1)
    scores = []
    for maps in (s_t, s_h):
        score = slow_patch_means(maps.numpy(), patch).reshape(3, -1)
        low, high = score.min(1, keepdims=True), score.max(1, keepdims=True)
        scores.append(floor + (1 - floor) * (score - low) / (high - low))
    wanted = np.minimum(cap, np.maximum(*scores))
    found = spmix_ratio(s_t, s_h, patch, cap=cap, floor=floor)
    np.testing.assert_allclose(found.flatten(1), wanted, atol=1e-12)
    assert found.min() >= min(floor, cap)
    assert found.max() <= cap


@pytest.mark.parametrize(("sides", "patch"), GEOMETRIES[:4])
def test_pixel_ratio_is_the_formula_of_the_paper(sides, patch):
    s_t, s_h = noise(3, *sides), noise(3, *sides, seed=1)
    found = spmix_ratio(s_t, s_h, patch, merge="pixel")
    wanted = slow_patch_means(np.minimum(0.8, np.maximum(s_t.numpy(), s_h.numpy())), patch)
    np.testing.assert_allclose(found, wanted)
    means = [patch_means(maps.clamp(max=0.8), patch) for maps in (s_t, s_h)]
    assert (found >= torch.maximum(*means) - 1e-12).all()
    assert (found > torch.maximum(*means) + 1e-3).any()


def test_ratio_is_symmetric_unless_it_looks_at_the_tail_alone():
    s_t, s_h = noise(3, 12, 12), noise(3, 12, 12, seed=1)
    for merge in ("patch", "pixel"):
        one, two = spmix_ratio(s_t, s_h, 4, merge=merge), spmix_ratio(s_h, s_t, 4, merge=merge)
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    alone = spmix_ratio(s_t, s_h, 4, partner_saliency=False)
    torch.testing.assert_close(alone, spmix_ratio(s_t, s_t, 4))
    assert not torch.allclose(alone, spmix_ratio(s_t, s_h, 4))


@pytest.mark.parametrize("merge", ["patch", "pixel"])
def test_ratio_rises_with_normalised_saliency(merge):
    s_t, s_h = noise(3, 12, 12), noise(3, 12, 12, seed=1)
    options = {"merge": merge, "normalize": False}
    more = spmix_ratio((s_t + 0.2).clamp(max=1), s_h, 4, **options)
    assert (more >= spmix_ratio(s_t, s_h, 4, **options)).all()


def test_stretching_forgets_scale_and_offset():
    s_t, s_h = noise(3, 12, 12), noise(3, 12, 12, seed=1)
    torch.testing.assert_close(spmix_ratio(0.3 * s_t + 0.1, 0.5 * s_h, 4), spmix_ratio(s_t, s_h, 4))


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("cap", "floor"), [(0.8, 0.5), (0.3, 0.5)])
def test_constant_maps_give_the_floor_everywhere(value, cap, floor):
    maps = torch.full((2, 12, 12), value)
    ratio = spmix_ratio(maps, maps, 4, cap=cap, floor=floor)
    torch.testing.assert_close(ratio, torch.full((2, 3, 3), min(floor, cap)))


def test_faint_maps_are_not_stretched():
    faint = 0.5 + 1e-4 * noise(2, 12, 12)
    torch.testing.assert_close(
        spmix_ratio(faint, faint, 4), torch.full((2, 3, 3), 0.5, dtype=torch.float64)
    )
    assert spmix_ratio(faint, faint, 4, min_contrast=0).std() > 0.05


def test_extremes_are_the_partner_and_the_base():
    x_t, x_h = noise(2, 3, 12, 12), noise(2, 3, 12, 12, seed=1)
    maps = noise(2, 12, 12, seed=2)
    none = spmix_ratio(maps, maps, 4, cap=0)
    assert torch.equal(spmix(x_t, x_h, none, 4), x_h)
    ones = torch.ones(2, 12, 12, dtype=torch.float64)
    full = spmix_ratio(ones, ones, 4, cap=1, normalize=False)
    assert torch.equal(spmix(x_t, x_h, full, 4), x_t)


@pytest.mark.parametrize(("sides", "patch"), GEOMETRIES)
def test_mix_is_its_definition(sides, patch):
    x_t, x_h = noise(2, 3, *sides), noise(2, 3, *sides, seed=1)
    copies = x_t.clone(), x_h.clone()
    ratio = spmix_ratio(x_t.mean(1), x_h.mean(1), patch)
    mixed = spmix(x_t, x_h, ratio, patch)
    for place in np.ndindex(*sides):
        cell = (slice(None), *[p // q for p, q in zip(place, patch, strict=True)])
        share = ratio[cell][:, None]
        at = (slice(None), slice(None), *place)
        torch.testing.assert_close(mixed[at], share * x_t[at] + (1 - share) * x_h[at])
    assert (mixed >= torch.minimum(x_t, x_h) - 1e-12).all()
    assert (mixed <= torch.maximum(x_t, x_h) + 1e-12).all()
    assert torch.equal(spmix(x_t, x_t, ratio, patch), x_t)
    assert torch.equal(x_t, copies[0])
    assert torch.equal(x_h, copies[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mix_keeps_the_dtype_of_the_pictures(dtype):
    x = noise(2, 3, 8, 8).to(dtype)
    assert spmix(x, x, noise(2, 2, 2), 4).dtype == dtype


def test_expanded_ratio_is_constant_in_each_patch():
    ratio = noise(2, 3, 4)
    wide = expand_ratio(ratio, (3, 5), (8, 17))
    assert wide.shape == (2, 8, 17)
    assert torch.equal(wide[:, 3:6, 5:10], ratio[:, 1:2, 1:2].expand(2, 3, 5))
    assert torch.equal(wide[:, 6:, 15:], ratio[:, 2:, 3:].expand(2, 2, 2))


@pytest.mark.parametrize("bias", [False, True])
def test_mixing_pictures_commutes_with_a_linear_patch_embedding(bias):
    x_t, x_h = noise(2, 3, 12, 8), noise(2, 3, 12, 8, seed=1)
    weight = noise(7, 3, 4, 4, seed=2)
    b = noise(7, seed=3) if bias else None
    ratio = spmix_ratio(fine_grained(x_t), fine_grained(x_h), 4)

    def tokens(x):
        return F.conv2d(x, weight, b, stride=4).flatten(2).transpose(1, 2)

    torch.testing.assert_close(
        tokens(spmix(x_t, x_h, ratio, 4)), spmix(tokens(x_t), tokens(x_h), ratio)
    )

    def overlapping(x):  # a stem that looks beyond its patch, as hybrids do
        return F.conv2d(x, weight, b, stride=4, padding=2)[:, :, 1:, 1:].flatten(2).transpose(1, 2)

    grid = overlapping(spmix(x_t, x_h, ratio, 4))
    mixed = spmix(overlapping(x_t), overlapping(x_h), ratio)
    assert (grid - mixed).abs().max() > 1e-3


def test_gradients_flow_to_both_and_to_the_ratio():
    x_t, x_h = noise(2, 6, 5).requires_grad_(), noise(2, 6, 5, seed=1).requires_grad_()
    ratio = noise(2, 3, 2).requires_grad_()
    spmix(x_t, x_h, ratio).sum().backward()
    torch.testing.assert_close(x_t.grad, ratio.detach().flatten(1)[..., None].expand(2, 6, 5))
    torch.testing.assert_close(x_h.grad, 1 - x_t.grad)
    assert ratio.grad.abs().sum() > 0


def test_flipping_pictures_flips_the_ratio_and_colours_leave_it():
    x_t, x_h = noise(2, 3, 12, 8), noise(2, 3, 12, 8, seed=1)

    def ratio(a, b):
        return spmix_ratio(fine_grained(a), fine_grained(b), 4)

    plain = ratio(x_t, x_h)
    torch.testing.assert_close(ratio(x_t.flip(3), x_h.flip(3)), plain.flip(2))
    torch.testing.assert_close(ratio(1 - 0.5 * x_t, 2 * x_h + 1), plain)


def lesions(n, seed, place):
    """Dark, blurred discs at a place on textured skin."""
    rng = torch.Generator().manual_seed(seed)
    grid = torch.linspace(-1, 1, 56)
    distance = ((grid[:, None] - place[0]) ** 2 + (grid - place[1]) ** 2).sqrt()
    inside = distance < 0.3
    skin = 0.7 + 0.03 * torch.randn(n, 1, 56, 56, generator=rng)
    return skin - 0.35 * torch.sigmoid((0.3 - distance) / 0.03), inside


def test_lesions_are_kept_and_background_is_borrowed():
    tail, inside = lesions(20, 0, (-0.4, -0.4))
    head, inside_head = lesions(20, 1, (0.4, 0.4))
    ratio = spmix_ratio(fine_grained(tail), fine_grained(head), 4)
    wide = expand_ratio(ratio, 4, (56, 56)).mean(0)
    background = wide[~(inside | inside_head)].mean()
    assert wide[inside].mean() >= background + 0.05
    assert wide[inside_head].mean() >= background + 0.05


def test_mix_is_linear_in_each_picture():
    a, b, c = (noise(2, 3, 8, 8, seed=seed) for seed in range(3))
    ratio = noise(2, 2, 2, seed=3)
    torch.testing.assert_close(
        spmix(2 * a + b, c, ratio, 4) - spmix(b, c, ratio, 4),
        2 * spmix(a, torch.zeros_like(c), ratio, 4),
    )


def test_nan_maps_are_not_taken_for_empty_ones():
    maps = noise(2, 8, 8)
    maps[0, 0, 0] = torch.nan
    assert spmix_ratio(maps, maps, 4)[0].isnan().any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: spmix_ratio(m, m, 4, merge="Patch"), "merge='Patch'"),
        (lambda m: spmix_ratio(m, m[:1], 4), "differ in shape"),
        (lambda m: spmix_ratio(m, m, (4,)), r"patch_size=\(4,\)"),
        (lambda m: spmix_ratio(m, m, 0), "patch_size=0"),
        (lambda m: spmix(m[:, None], m[:, None], m[:, :3, :3], 4), r"grid of \(3, 3\)"),
    ],
)
def test_functions_refuse_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(noise(2, 8, 8))


def test_patch_size_may_be_a_numpy_integer():
    maps = noise(2, 8, 8)
    torch.testing.assert_close(patch_means(maps, np.int64(4)), patch_means(maps, 4))
