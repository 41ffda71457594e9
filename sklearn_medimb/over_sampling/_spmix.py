"""SPMix as a sampler of images."""

from __future__ import annotations

import warnings
from numbers import Integral
from typing import Any

import numpy as np
import torch
from imblearn.utils import check_target_type
from sklearn.utils import check_consistent_length, check_random_state, column_or_1d

from sklearn_medimb._data.containers import ExtendedImages, holds_images
from sklearn_medimb._data.files import wrap_dataset
from sklearn_medimb._data.images import Images, as_array, warn_of_flat_images
from sklearn_medimb._data.layout import as_pixels
from sklearn_medimb._data.rows import group_codes
from sklearn_medimb._machine.runtime import one_thread_in_workers, pixel_block, resolve_device
from sklearn_medimb._parameters import integers, learned, one_of, parameter, within
from sklearn_medimb.mixing import patch_means, spmix, spmix_ratio
from sklearn_medimb.over_sampling._base import CheckedOverSampler
from sklearn_medimb.saliency import as_maps, check_maps, maps_of
from sklearn_medimb.saliency._maps import SaliencyParameters


class SPMixSampler(SaliencyParameters, CheckedOverSampler):
    """Over-sampling with saliency-guided patch mixup.

    A new image is one of a rare class whose unremarkable patches are mixed with those of a partner,
    usually of a more frequent class: ``r base + (1 - r) partner`` with a share r per patch that is
    high where either image is salient [1]_. It keeps the label of its base. This is the image form
    of the method; inside a network the authors mix patch tokens.

    The share never exceeds `cap`, so ``1 - cap`` of the partner enters everywhere, its lesion
    included.

    Parameters
    ----------
    cap
        Upper bound of the base's share, the paper's alpha.
    floor
        Share of the base where nothing is salient; None is 0.5 with ``merge="patch"`` and 0 with
        ``merge="pixel"``.
    mix_prob
        Share of the new images that are mixed; the others are copies of their base, so that a
        network meets rare classes unmixed too, as it will at predict.
    patch_size
        Sides of a patch in pixels; "auto" lays about 14 patches along the shorter side, as
        published for 224 pixels.
    merge
        Merge the two saliency maps patch by patch, as the authors' code does, or pixel by pixel,
        as the paper's formula does; see :func:`sklearn_medimb.mixing.spmix_ratio`.
    partner_saliency
        False looks at the base's saliency alone.
    partners
        Where a partner is drawn from: images of classes more frequent than the base's, of the most
        frequent class, of all other classes, or all images. Where "head" or "majority" leave none,
        all other classes serve, and where these are all of the base's patient, the other patients
        of its own class. An image is never its own partner.

    Attributes
    ----------
    sample_indices_
        Row of X that each new image is based on. The images of a class take turns. The patients
        of the result are ``np.concatenate([groups, groups[sampler.sample_indices_]])``.
    partner_indices_
        Row of X that it was mixed with; of no consequence for copies.
    ratio_
        Share of the base in each patch; 1 for copies.
    patch_size_
        Sides of a patch in pixels, one per spatial axis.
    n_samples_
        Images given.
    maps_given_
        Whether saliency was given with them.

    See Also
    --------
    BalancedVirtualFeatures : Over-sampling of embeddings.
    sklearn_medimb.SPMixDisplay : Shows bases, partners, maps, shares and results.

    Notes
    -----
    Place it in ``sampler=`` of an image classifier, which applies it after its validation split, or
    in an ``imblearn.pipeline.Pipeline``. Labels stay hard; originals come first, bit for bit.
    The paper does not name its saliency detector. Fine-grained saliency fits its wording and the
    published statistics of its maps; on synthetic lesions it separates lesion from background,
    which the spectral residual does not.
    There (``benchmarks/spmix_lesions.py``) a floor of 0.5 and half of the new images unmixed are
    better than a floor of 0 and mixing all; saliency is slightly better than random shares;
    oversampling without mixing is as good.

    References
    ----------
    .. [1] J. Wei et al., "Saliency-guided and Patch-based Mixup for Long-tailed Skin Cancer Image
       Classification", arXiv 2406.10801, 2024.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn_medimb import SPMixSampler
    >>> rng = np.random.default_rng(0)
    >>> X = rng.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    >>> y = np.array(["nevus"] * 20 + ["melanoma"] * 4)
    >>> sampler = SPMixSampler(random_state=0)
    >>> X_new, y_new = sampler.fit_resample(X, y)
    >>> X_new.shape, X_new.dtype, (y_new == "melanoma").sum().item()
    ((40, 16, 16, 3), dtype('uint8'), 20)
    >>> set(y[sampler.sample_indices_].tolist()), set(y[sampler.partner_indices_].tolist())
    ({'melanoma'}, {'nevus'})
    """

    cap: float = parameter(within(0, 1), default=0.8, search=(0.5, 1.0))
    floor: float | None = parameter(within(0, 1), None, default=None, search=[None, 0.0, 0.25, 0.5])
    mix_prob: float = parameter(within(0, 1), default=0.5, search=(0.0, 1.0))
    patch_size: int | tuple[int, ...] | str = parameter(
        integers(1), tuple, list, one_of("auto"), default="auto", search=["auto", 4, 8, 16]
    )
    merge: str = parameter(one_of("patch", "pixel"), default="patch", search=True)
    partner_saliency: bool = parameter("boolean", default=True, search=[True, False])
    partners: str = parameter(
        one_of("head", "majority", "other", "any"), default="head", search=True
    )

    sample_indices_: np.ndarray = learned("ndarray of int of shape (n_new,)")
    partner_indices_: np.ndarray = learned("ndarray of int of shape (n_new,)")
    ratio_: np.ndarray = learned("ndarray of float of shape (n_new, *grid)")
    patch_size_: tuple[int, ...] = learned("tuple of int")
    n_samples_: int = learned("int")
    maps_given_: bool = learned("bool")

    def fit_resample(  # type: ignore[override]
        self, X: Any, y: Any, *, groups: Any = None, maps: Any = None
    ) -> Any:
        """Append mixed images until the classes have the wanted sizes.

        Parameters
        ----------
        X : array-like or lazy sequence of n images
            Images in any layout of the package's guide, uint8 or float.
        y : array-like of shape (n,)
            Class labels.
        groups : array-like of shape (n,), default=None
            Patient of each image: none is mixed with itself.
        maps : array-like of shape (n, *spatial), default=None
            Saliency of each image in place of `saliency`: lesion masks, class-activation maps.
            bool, whole numbers up to 255, or floats in [0, 1]. They cannot pass through an
            estimator's ``sampler=``.

        Returns
        -------
        X_resampled : array of shape (n + n_new, ...)
            The images given, then the new ones, in the layout and dtype of X: whole numbers are
            rounded. Of a lazy X only bases and partners are read, anew for each block of new
            images; the result is lazy, with the new images in memory.
        y_resampled : ndarray of shape (n + n_new,)
            Their labels.

        Raises
        ------
        ValueError
            If the input is wrong or ambiguous, there is one class only, or `groups` leaves an
            image without a partner.
        """
        X = wrap_dataset(X)
        if holds_images(X) or not isinstance(X, (list, tuple)):
            X = as_array(X)  # a list of images comes back as one array
        return super().fit_resample(X, y, groups=groups, maps=maps)

    def _check_X_y(self, X: Any, y: Any) -> tuple[Images, np.ndarray, bool]:  # noqa: N802
        y, binarize_y = check_target_type(y, indicate_one_vs_all=True)
        if hasattr(X, "sparse"):  # a DataFrame of sparse columns
            X = X.sparse.to_dense()
        images = self._read(X, reset=True)
        y = column_or_1d(y)
        check_consistent_length(images.data, y)
        warn_of_flat_images(self, images)
        self.image_shape_ = images.image_shape
        return images, y, binarize_y

    def _fit_resample(
        self, images: Images, y: np.ndarray, groups: Any = None, maps: Any = None
    ) -> tuple[Any, np.ndarray]:
        rng = np.random.default_rng(check_random_state(self.random_state).randint(2**31 - 1))
        sides = tuple(as_pixels(torch.empty(1, *images.image_shape)).shape[2:])
        self.patch_size_ = self._patch_size(sides)
        if maps is not None:
            maps = as_maps(maps, (len(y), *sides), "maps")
        codes = np.arange(len(y)) if groups is None else group_codes(groups, y)
        bases, partners = self._pairs(y, codes, rng)
        mixed = rng.random(len(bases)) < self.mix_prob
        n_kept = 0 if images.lazy else len(y)  # lazy images stay where they are
        out = np.empty((n_kept + len(bases), *images.data.shape[1:]), dtype=images.dtype)
        if n_kept:
            out[:n_kept] = images.data
        with torch.no_grad(), one_thread_in_workers():
            self._copy(out[n_kept:], images, bases, np.flatnonzero(~mixed))
            self.ratio_ = self._mix(
                out[n_kept:], images, bases, partners, np.flatnonzero(mixed), maps, sides
            )
        self.sample_indices_ = bases
        self.partner_indices_ = partners
        self.n_samples_ = len(y)
        self.maps_given_ = maps is not None
        return ExtendedImages(images.data, out) if images.lazy else out, np.concatenate(
            [y, y[bases]]
        )

    def _patch_size(self, sides: tuple[int, ...]) -> tuple[int, ...]:
        """Sides of a patch along each axis."""
        if isinstance(self.patch_size, str):
            side = max(1, round(min(sides[-2:]) / 14))
            return tuple(min(side, s) for s in sides)
        given = self.patch_size
        patches = tuple(given) if isinstance(given, (tuple, list)) else (given,) * len(sides)
        if len(patches) != len(sides) or not all(
            isinstance(side, Integral) and side > 0 for side in patches
        ):
            raise ValueError(
                f"patch_size={self.patch_size} must hold a whole number above 0 for each spatial "
                f"axis of the images, {sides}."
            )
        if any(p > s for p, s in zip(patches, sides, strict=True)):
            warnings.warn(
                f"patch_size={self.patch_size} is larger than the images, {sides}: along that "
                "axis there is one patch.",
                stacklevel=2,
            )
        return tuple(min(p, s) for p, s in zip(patches, sides, strict=True))

    def _pairs(
        self, y: np.ndarray, groups: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the base and of the partner of each new image."""
        _, codes, counts = np.unique(y, return_inverse=True, return_counts=True)
        size = counts[codes]  # of the class of each row
        bases, partners = [np.empty(0, dtype=np.intp)], [np.empty(0, dtype=np.intp)]
        for label, n_new in self.sampling_strategy_.items():
            members = np.flatnonzero(y == label)
            if n_new > 50 * len(members):
                warnings.warn(
                    f"Each of the {len(members)} images of class {label} becomes the base of "
                    f"about {n_new // len(members)} new ones: sampling_strategy could ask for "
                    "fewer.",
                    stacklevel=2,
                )
            # The images of a class take turns, in an order drawn anew each time.
            rounds = np.tile(members, (-(-n_new // len(members)), 1))
            drawn = rng.permuted(rounds, axis=1).ravel()[:n_new]
            other, everything = y != label, np.ones(len(y), dtype=bool)
            preferred = {
                "head": size > len(members),
                "majority": other & (size == counts.max()),
                "other": other,
                "any": everything,
            }[self.partners]
            bases.append(drawn)
            partners.append(_partners(drawn, [preferred, other, everything], groups, rng))
        return np.concatenate(bases), np.concatenate(partners)

    def _copy(self, out: np.ndarray, images: Images, bases: np.ndarray, where: np.ndarray) -> None:
        """Fill the places `where` of `out` with their bases."""
        block = pixel_block(images.image_shape, torch.device("cpu"))
        for start in range(0, len(where), block):
            part = where[start : start + block]
            rows, own = np.unique(bases[part], return_inverse=True)
            pixels = images.layout.restore(images.rows(rows).numpy())
            out[part] = pixels.reshape(-1, *out.shape[1:])[own]

    def _mix(
        self,
        out: np.ndarray,
        images: Images,
        bases: np.ndarray,
        partners: np.ndarray,
        where: np.ndarray,
        maps: torch.Tensor | None,
        sides: tuple[int, ...],
    ) -> np.ndarray:
        """Fill the places `where` of `out` with mixes; return the ratios of all."""
        device = resolve_device(self.device)
        patch = self.patch_size_
        whole = images.dtype.kind in "bui"
        wide = images.dtype.itemsize > (2 if whole else 4)
        dtype = torch.float64 if wide else torch.float32
        grid = [-(-side // p) for side, p in zip(sides, patch, strict=True)]
        ratios = np.ones((len(bases), *grid), dtype=np.float64 if wide else np.float32)
        if not len(where):
            return ratios

        # Saliency of each image that takes part, once; of patches where these are all that counts.
        pool = patch if self.merge == "patch" else 1

        def detect(batch: torch.Tensor) -> torch.Tensor:
            return patch_means(self._detect(batch), pool)

        pairs = np.concatenate([bases[where], partners[where]])
        used, places = np.unique(pairs, return_inverse=True)
        if maps is None:
            scores = maps_of(images, used, detect, device)
        else:
            scores = patch_means(check_maps(maps[used], (len(used), *sides), "maps", used), pool)
        s_t, s_h = torch.from_numpy(places).chunk(2)

        block = pixel_block(images.image_shape, device)
        for start in range(0, len(where), block):
            some = slice(start, start + block)
            part = where[some]
            ratio = spmix_ratio(
                scores[s_t[some]].to(device, dtype),
                scores[s_h[some]].to(device, dtype),
                1 if self.merge == "patch" else patch,
                cap=self.cap,
                floor=self.floor,
                merge=self.merge,
                partner_saliency=self.partner_saliency,
            )
            pair = np.concatenate([bases[part], partners[part]])
            rows, own = np.unique(pair, return_inverse=True)
            pixels = as_pixels(images.rows(rows).to(device).to(dtype))
            x_t, x_h = pixels[torch.from_numpy(own).to(device)].chunk(2)
            mixed = spmix(x_t, x_h, ratio, patch).cpu().numpy()
            if whole:
                mixed = np.rint(mixed)
            out[part] = images.layout.restore(mixed).reshape(-1, *out.shape[1:])
            ratios[part] = ratio.cpu().numpy()
        return ratios

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = False
        tags.input_tags.three_d_array = True
        tags.sampler_tags.sample_indices = True
        return tags


def _partners(
    bases: np.ndarray, pools: list[np.ndarray], groups: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Draw each base a partner of another patient from the first pool that has one.

    Pools are masks of the rows, in order of preference; bases and partners are rows.
    """
    partners = np.full(len(bases), -1, dtype=np.intp)
    for pool in pools:
        rows = np.flatnonzero(pool)
        rows = rows[np.argsort(groups[rows], kind="stable")]
        lone = np.flatnonzero(partners < 0)
        # The rows of a base's own patient are adjacent: draw among the others, and step over them.
        own = groups[bases[lone]]
        first = np.searchsorted(groups[rows], own, side="left")
        n_own = np.searchsorted(groups[rows], own, side="right") - first
        n_others = len(rows) - n_own
        draw = (rng.random(len(lone)) * n_others).astype(np.intp)
        draw += np.where(draw >= first, n_own, 0)
        found = n_others > 0
        partners[lone[found]] = rows[draw[found]]
    if (partners < 0).any():
        raise ValueError("groups names a single patient: no image has a partner of another one.")
    return partners
