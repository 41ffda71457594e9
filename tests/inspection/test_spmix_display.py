"""Displays: what is drawn is what the sampler did."""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest

from sklearn_medimb import SPMixDisplay, SPMixSampler


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def problem(sides=(12, 10), channels=3):
    rng = np.random.default_rng(0)
    y = np.repeat(["nevus", "melanoma"], [12, 4])
    return rng.integers(0, 256, (16, *sides, channels), dtype=np.uint8), y


def test_display_shows_the_images_that_the_sampler_made():
    X, y = problem()
    sampler = SPMixSampler(patch_size=4, mix_prob=0.7, random_state=0)
    X_new, _ = sampler.fit_resample(X, y)
    display = SPMixDisplay.from_sampler(sampler, X, y, n_images=3, random_state=1)
    assert display.axes_.shape == (3, 6)
    made = X_new[16:] / 255
    for base, result, ratio in zip(display.base, display.result, display.ratio, strict=True):
        (row,) = np.flatnonzero(np.abs(made - result).max(axis=(1, 2, 3)) <= 0.51 / 255)
        np.testing.assert_allclose(base, X[sampler.sample_indices_[row]] / 255, atol=1e-6)
        np.testing.assert_allclose(ratio[::4, ::4], sampler.ratio_[row])
    assert display.labels == [["melanoma", "nevus"]] * 3
    for column, part in enumerate(["base", "base_saliency", "partner"]):
        shown = display.axes_[0, column].images[0].get_array()
        np.testing.assert_allclose(shown, getattr(display, part)[0])
    assert display.axes_[0, 0].get_ylabel() == "melanoma"
    assert display.axes_[0, 2].get_ylabel() == "nevus"


def test_display_draws_from_an_unfitted_sampler_without_touching_it():
    X, y = problem()
    sampler = SPMixSampler(random_state=0)
    display = SPMixDisplay.from_sampler(sampler, X, y)
    assert display.axes_.shape == (4, 6)
    assert not hasattr(sampler, "ratio_")


@pytest.mark.parametrize(
    ("make", "params", "shape"),
    [
        (lambda X: X[..., 0], {}, (12, 10)),
        (lambda X: X / 7.0 - 3, {}, (12, 10, 3)),
        (lambda X: X.reshape(16, -1), {"image_shape": (12, 10, 3)}, (12, 10, 3)),
        (lambda X: np.moveaxis(X, -1, 1)[:, :2], {"data_format": "channels_first"}, (12, 10)),
        (lambda X: X, {"spatial_dims": 3}, (10, 3)),
    ],
    ids=["gray", "float", "flat", "two channels", "volume"],
)
def test_display_of_any_layout(make, params, shape):
    X, y = problem()
    sampler = SPMixSampler(random_state=0, **params)
    display = SPMixDisplay.from_sampler(sampler, make(X), y, n_images=2)
    assert display.base.shape == (2, *shape)
    assert display.base.min() >= 0
    assert display.base.max() <= 1
    assert display.ratio.shape == (2, *shape[:2])


def test_display_takes_maps_groups_and_axes():
    X, y = problem()
    maps = np.zeros((16, 12, 10))
    maps[:, :6] = 1
    _, axes = plt.subplots(2, 6)
    display = SPMixDisplay.from_sampler(
        SPMixSampler(random_state=0),
        X,
        y,
        maps=maps,
        groups=np.arange(16) // 2,
        n_images=2,
        axes=axes,
    )
    assert display.axes_[1, 4] is axes[1, 4]
    assert display.figure_ is axes[0, 0].figure
    np.testing.assert_array_equal(display.base_saliency, maps[:2])


def test_display_refuses_what_it_cannot_show():
    X, y = problem()
    with pytest.raises(ValueError, match="mixes no image"):
        SPMixDisplay.from_sampler(SPMixSampler(), X[8:], y[8:])
    with pytest.raises(ValueError, match=r"axes has shape \(2, 2\)"):
        SPMixDisplay.from_sampler(SPMixSampler(), X, y, axes=plt.subplots(2, 2)[1])


def test_display_refuses_what_the_sampler_did_not_see():
    X, y = problem()
    sampler = SPMixSampler(random_state=0)
    sampler.fit_resample(X, y, maps=np.ones((16, 12, 10)))
    with pytest.raises(ValueError, match="pass the same maps"):
        SPMixDisplay.from_sampler(sampler, X, y)
    sampler.fit_resample(X, y)
    for rows in (np.arange(14), np.roll(np.arange(16), 5)):
        with pytest.raises(ValueError, match="not the one"):
            SPMixDisplay.from_sampler(sampler, X[rows], y[rows])
    with pytest.raises(ValueError, match="n_images=0"):
        SPMixDisplay.from_sampler(sampler, X, y, n_images=0)
    with pytest.raises(TypeError, match="not a str"):
        SPMixDisplay.from_sampler("SPMix", X, y)


def test_display_shows_the_rarest_class_first():
    X = np.random.default_rng(0).integers(0, 256, (30, 12, 10, 3), dtype=np.uint8)
    y = np.repeat(["a", "b", "c"], [20, 8, 2])
    display = SPMixDisplay.from_sampler(SPMixSampler(random_state=0), X, y, n_images=3)
    assert [own for own, _ in display.labels] == ["c", "b", "c"]


def test_display_without_matplotlib_says_what_to_install(monkeypatch):
    X, y = problem()
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"sklearn_medimb\[plot\]"):
        SPMixDisplay.from_sampler(SPMixSampler(), X, y)
