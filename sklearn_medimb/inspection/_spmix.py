"""Pictures of how SPMix mixes."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from sklearn.utils import _safe_indexing, check_random_state

from sklearn_medimb._data.images import as_array, read_images
from sklearn_medimb._data.layout import as_pixels
from sklearn_medimb.inspection._figure import pictures, pyplot
from sklearn_medimb.mixing import expand_ratio, spmix
from sklearn_medimb.over_sampling import SPMixSampler
from sklearn_medimb.saliency import SaliencyMap, as_maps, check_maps


class SPMixDisplay:
    """Rows of base, saliency, partner, saliency, share of the base, and result.

    Make one with :meth:`from_sampler`.

    Parameters
    ----------
    base, partner, result : ndarray of shape (n, H, W) or (n, H, W, C)
        Pictures; of volumes the middle slice.
    base_saliency, partner_saliency : ndarray of shape (n, H, W)
        Values in [0, 1].
    ratio : ndarray of shape (n, H, W)
        Share of the base in each pixel.
    labels : sequence of (label, label), default=None
        Classes of base and partner.

    Attributes
    ----------
    figure_ : matplotlib Figure
        The figure.

    axes_ : ndarray of matplotlib Axes of shape (n, 6)
        The axes.

    References
    ----------
    J. Wei et al., "Saliency-guided and Patch-based Mixup for Long-tailed Skin Cancer Image
    Classification", arXiv 2406.10801, 2024.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn_medimb import SPMixDisplay, SPMixSampler
    >>> rng = np.random.default_rng(0)
    >>> X, y = rng.random((12, 28, 28)), np.repeat([0, 1], [9, 3])
    >>> sampler = SPMixSampler(random_state=0)
    >>> _ = sampler.fit_resample(X, y)
    >>> display = SPMixDisplay.from_sampler(sampler, X, y, n_images=2)
    >>> display.axes_.shape
    (2, 6)
    """

    columns = ("base", "its saliency", "partner", "its saliency", "share of the base", "mixed")

    def __init__(
        self,
        *,
        base: np.ndarray,
        base_saliency: np.ndarray,
        partner: np.ndarray,
        partner_saliency: np.ndarray,
        ratio: np.ndarray,
        result: np.ndarray,
        labels: Any = None,
    ) -> None:
        self.base = base
        self.base_saliency = base_saliency
        self.partner = partner
        self.partner_saliency = partner_saliency
        self.ratio = ratio
        self.result = result
        self.labels = labels

    @classmethod
    def from_sampler(
        cls,
        sampler: SPMixSampler,
        X: Any,
        y: Any,
        *,
        groups: Any = None,
        maps: Any = None,
        n_images: int = 4,
        axes: Any = None,
        random_state: Any = 0,
    ) -> SPMixDisplay:
        """Show some of the images that a sampler made, or would make, of `X`.

        Parameters
        ----------
        sampler : SPMixSampler
            After ``fit_resample(X, y)``, mixed images that it made are shown; else those that it
            would make with ``mix_prob=1``.
        X : array-like or lazy sequence of n images
            The images.
        y : array-like of shape (n,)
            Their classes.
        groups, maps : array-like, default=None
            As in :meth:`SPMixSampler.fit_resample`.
        n_images : int, default=4
            New images to show.
        axes : array-like of matplotlib Axes of shape (n_images, 6), default=None
            Where to draw; None makes a figure.
        random_state : int, RandomState or None, default=0
            Chooses which new images are shown.

        Returns
        -------
        display : SPMixDisplay
            Drawn.

        Raises
        ------
        ValueError
            If the sampler makes no new image.
        """
        if not isinstance(sampler, SPMixSampler):
            raise TypeError(f"sampler must be an SPMixSampler, not a {type(sampler).__name__}.")
        if not isinstance(n_images, Integral) or n_images < 1:
            raise ValueError(f"n_images={n_images!r} must be a whole number above 0.")
        if not hasattr(sampler, "ratio_"):
            sampler = clone(sampler).set_params(mix_prob=1.0)
            sampler.fit_resample(X, y, groups=groups, maps=maps)
        lowest = sampler.ratio_.min(axis=tuple(range(1, sampler.ratio_.ndim)))
        mixed = np.flatnonzero(lowest < 1)  # the others are copies
        if not len(mixed):
            raise ValueError("The sampler mixes no image of y: there is nothing to show.")
        labels = np.asarray(y).ravel()
        grown = labels[sampler.sample_indices_] if len(labels) == sampler.n_samples_ else None
        if grown is None or any(
            (grown == label).sum() != n for label, n in sampler.sampling_strategy_.items()
        ):
            raise ValueError("y is not the one that the sampler was fitted on: pass that X and y.")
        if sampler.maps_given_ and maps is None:
            raise ValueError("The sampler was fitted with maps: pass the same maps.")
        order = check_random_state(random_state).permutation(mixed)
        # The rarest classes first, taking turns.
        sizes = {label: (labels == label).sum() for label in np.unique(grown)}
        turns = np.empty(len(order), dtype=int)
        for label in sizes:
            own = grown[order] == label
            turns[own] = np.arange(own.sum())
        rarity = np.array([sizes[label] for label in grown[order]])
        shown = order[np.lexsort([rarity, turns])][:n_images]
        rows = np.concatenate([sampler.sample_indices_[shown], sampler.partner_indices_[shown]])

        where: dict[str, Any] = {
            "image_shape": sampler.image_shape,
            "data_format": sampler.data_format,
            "spatial_dims": sampler.spatial_dims,
        }
        chosen = as_array(_safe_indexing(X, rows))
        detector = SaliencyMap(
            sampler.saliency,
            polarity=sampler.polarity,
            mask=sampler.mask,
            device=sampler.device,
            **where,
        )
        images = read_images(detector, chosen, reset=True, float_dtype=None, **where)
        pixels = as_pixels(images.rows(np.arange(len(rows)))).float()
        sides = tuple(pixels.shape[2:])
        if maps is None:
            found = torch.as_tensor(detector.fit_transform(chosen)).reshape(-1, *sides)
        else:
            found = as_maps(maps, (len(labels), *sides), "maps")[rows].cpu()
            found = check_maps(found, (len(rows), *sides), "maps", rows)
        ratio = torch.from_numpy(sampler.ratio_[shown]).float()
        base, partner = pixels.chunk(2)
        result = spmix(base, partner, ratio, sampler.patch_size_)
        share = expand_ratio(ratio, sampler.patch_size_, sides)

        low, high = (0, 255) if images.dtype == np.uint8 else (pixels.min(), pixels.max())
        scale = max(float(high) - float(low), 1e-12)
        return cls(
            base=pictures((base - low) / scale),
            base_saliency=pictures(found[: len(shown), None]),
            partner=pictures((partner - low) / scale),
            partner_saliency=pictures(found[len(shown) :, None]),
            ratio=pictures(share[:, None]),
            result=pictures((result - low) / scale),
            labels=labels[rows].reshape(2, -1).T.tolist(),
        ).plot(axes)

    def plot(self, axes: Any = None) -> SPMixDisplay:
        """Draw.

        Parameters
        ----------
        axes : array-like of matplotlib Axes of shape (n, 6), default=None
            Where to draw; None makes a figure.

        Returns
        -------
        display : SPMixDisplay
            This object.
        """
        plt = pyplot(self)
        n = len(self.base)
        if axes is None:
            height, width = self.base.shape[1:3]
            side = 1.75 * min(height / width, 2)
            size = (11.5, n * (side + 0.1) + 0.4)
            _, axes = plt.subplots(n, 6, figsize=size, squeeze=False, layout="constrained")
        axes = np.asarray(axes, dtype=object)
        if axes.shape != (n, 6):
            raise ValueError(f"axes has shape {axes.shape}; it must be {(n, 6)}.")
        parts = (
            (self.base, "gray"),
            (self.base_saliency, "inferno"),
            (self.partner, "gray"),
            (self.partner_saliency, "inferno"),
            (self.ratio, "viridis"),
            (self.result, "gray"),
        )
        for column, (shown, colours) in enumerate(parts):
            axes[0, column].set_title(self.columns[column], fontsize=10)
            for ax, picture in zip(axes[:, column], shown, strict=True):
                ax.imshow(picture, cmap=colours, vmin=0, vmax=1)
                ax.set_xticks([])
                ax.set_yticks([])
        axes[0, 0].figure.colorbar(
            axes[0, 4].images[0], ax=axes.ravel().tolist(), fraction=0.02, label="share of the base"
        )
        for row, (own, other) in enumerate([] if self.labels is None else self.labels):
            axes[row, 0].set_ylabel(str(own), fontsize=9)
            axes[row, 2].set_ylabel(str(other), fontsize=9)
        self.axes_ = axes
        self.figure_ = axes[0, 0].figure
        return self
