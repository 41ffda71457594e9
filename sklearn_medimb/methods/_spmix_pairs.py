"""SPMix's batches: which images meet, and how much of each stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sklearn_medimb._data.batches import Batches, BatchSource
from sklearn_medimb.augment import geometry


class Partners:
    """Draws partners for the bases of a batch: first a class, then another image of this class.

    Images of the batch are encoded anyway, so that as partners they cost nothing. Of a class that
    the batch lacks, an image of the training set is brought along: a class is a partner as often as
    it is to be, however small the batch.

    Parameters
    ----------
    rows : ndarray of int of shape (n,)
        Image of each training row; a sampler may have repeated one.
    y : ndarray of int of shape (n,)
        Class of each training row.
    class_share : ndarray of shape (n_classes,)
        How often each class is to be a partner; classes that `y` lacks are left out.
    """

    def __init__(self, rows: np.ndarray, y: np.ndarray, class_share: np.ndarray) -> None:
        self.rows = rows
        self.y = y
        self.by_class = np.argsort(y, kind="stable")
        self.count = np.bincount(y, minlength=len(class_share))
        self.start = np.cumsum(self.count) - self.count
        share = np.where(self.count > 0, class_share, 0.0)
        self.share = share / share.sum()
        images, where = np.unique(rows, return_index=True)
        self.n_images = np.bincount(y[where], minlength=len(class_share))
        self.exist = len(images) > 1

    def draw(
        self, picks: np.ndarray, n_mixed: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw each of the first rows of a batch another image.

        Parameters
        ----------
        picks : ndarray of int of shape (B,)
            Training rows of the batch.
        n_mixed : int
            Rows that need a partner.
        rng : numpy.random.Generator
            Source of randomness.

        Returns
        -------
        partners : ndarray of int of shape (n_mixed,)
            Positions in the batch, or beyond its end among `others`; never of the same image.
        others : ndarray of int of shape (n_others,)
            Training rows that the batch lacks.
        """
        rows, y = self.rows[picks], self.y[picks]
        own, own_label = rows[:n_mixed], y[:n_mixed]
        label = _redrawn(
            lambda n, _: rng.choice(len(self.share), n, p=self.share),
            # The only image of its class has to look elsewhere.
            lambda drawn, i: (drawn == own_label[i]) & (self.n_images[drawn] == 1),
            n_mixed,
        )
        order, count = np.argsort(y, kind="stable"), np.bincount(y, minlength=len(self.share))
        start = np.cumsum(count) - count
        _, image, n_copies = np.unique(rows, return_inverse=True, return_counts=True)
        n_own = np.where(label == own_label, n_copies[image[:n_mixed]], 0)
        here, away = np.flatnonzero(count[label] > n_own), np.flatnonzero(count[label] <= n_own)
        k, j = label[here], label[away]
        partners = np.empty(n_mixed, dtype=np.intp)
        partners[here] = _redrawn(
            lambda _, i: order[start[k[i]] + rng.integers(count[k[i]])],
            lambda drawn, i: rows[drawn] == own[here[i]],
            len(here),
        )
        others = _redrawn(
            lambda _, i: self.by_class[self.start[j[i]] + rng.integers(self.count[j[i]])],
            lambda drawn, i: self.rows[drawn] == own[away[i]],
            len(away),
        )
        partners[away] = len(picks) + np.arange(len(away))
        return partners, others


def _redrawn(
    draw: Callable[[int, np.ndarray], np.ndarray],
    refuse: Callable[[np.ndarray, np.ndarray], np.ndarray],
    n: int,
) -> np.ndarray:
    """Draw n numbers, and those that are refused again, until none is."""
    drawn, pending = np.empty(n, dtype=np.intp), np.arange(n)
    while len(pending):
        drawn[pending] = draw(len(pending), pending)
        pending = pending[refuse(drawn[pending], pending)]
    return drawn


class MixedViews(BatchSource):
    """Batches of B images, of which the first m are to be mixed with others.

    Each view is augmented afresh, and the saliency maps are moved as their images are. A batch has
    ``images`` (views B, ...), ``others`` (views e, ...) where partners come from outside of it,
    ``partners`` (m,), positions among the B + e of a view, and the shares of the mix, ``ratio``
    (views m, *grid).

    Parameters
    ----------
    batches : Batches
        Rows, plan, views.
    partners : Partners
        Of the training rows.
    maps : tensor of uint8, shape (n, *fine)
        Saliency of each training row.
    mix_prob : float
        Share of the images that are mixed.
    ratio : callable
        Saliency maps of bases and partners to shares on the grid of the mix.
    apart : bool
        Whether the second view comes as ``key_images`` and so on, for a key encoder.
    """

    def __init__(
        self,
        batches: Batches,
        partners: Partners,
        maps: torch.Tensor,
        *,
        mix_prob: float,
        ratio: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        apart: bool,
    ) -> None:
        self.batches = batches
        self.partners = partners
        self.maps = maps
        self.mix_prob = mix_prob
        self.ratio = ratio
        self.apart = apart
        self.generator = batches.generator

    def orders(self) -> Iterator[dict[str, Any]]:
        """Rows of each step, the partners of the first ones, and what each view does to them."""
        batches = self.batches
        drawn = [self._with_partners(picks) for picks in batches.plan(batches.rng)]
        plan = [picks for picks, _, _ in drawn]
        steps = zip(drawn, batches.gathered(plan), batches.drawn(plan), strict=True)
        for (_, size, partners), order, views in steps:
            more = {} if partners is None else {"partners": batches.upload(partners)}
            yield order | more | {"size": size, "views": views}

    def _with_partners(self, picks: np.ndarray) -> tuple[np.ndarray, int, np.ndarray | None]:
        """Rows of a step, how many of them are bases, and where the partners of the first lie."""
        rng, size, n_mixed = self.batches.rng, len(picks), 0
        if self.mix_prob and self.partners.exist:
            picks = rng.permutation(picks)
            n_mixed = int(self.mix_prob * size + rng.random())
        if not n_mixed:
            return picks, size, None
        partners, others = self.partners.draw(picks, n_mixed, rng)
        return np.concatenate([picks, others]), size, partners

    def make(self, order: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Make both views of a batch, or one after the other."""
        images, targets = self.batches.taken(order)
        views = [
            self._view(images, order, augment, params)
            for augment, params in zip(self.batches.views, order["views"], strict=True)
        ]
        if self.apart:
            first, second = views
            batch = first | {f"key_{name}": value for name, value in second.items()}
        else:
            batch = {
                name: torch.cat([view[name] for view in views]) if len(views) > 1 else value
                for name, value in views[0].items()
            }
        if "partners" in order:
            batch["partners"] = order["partners"]
        return batch, targets[: order["size"]]

    def _view(
        self, images: torch.Tensor, order: dict[str, Any], augment: Any, params: Any
    ) -> dict[str, torch.Tensor]:
        """Augmented images, and the shares of the mix from maps moved alike."""
        size, params = order["size"], self.batches.in_step(images, augment, params)
        images = self.batches.preprocess.normalise(self.batches.moved(images, augment, params))
        view = {"images": images[:size]}
        if len(images) > size:
            view["others"] = images[size:]
        if "partners" in order:
            partners = order["partners"]
            maps = self.maps[order["index"]].to(self.batches.preprocess.dtype) / 255
            if moves := geometry(params):
                maps = augment.apply(maps.unsqueeze(1), moves)[:, 0]
            view["ratio"] = self.ratio(maps[: len(partners)], maps[partners])
        return view


def pooled(maps: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    """Means of maps (n, *spatial) over the cells of a grid."""
    if tuple(maps.shape[1:]) == tuple(grid):
        return maps
    pool: Any = F.adaptive_avg_pool2d if len(grid) == 2 else F.adaptive_avg_pool3d
    return pool(maps.unsqueeze(1), grid)[:, 0]
