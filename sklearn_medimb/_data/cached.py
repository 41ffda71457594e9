"""Images as a network that does not change leaves them: encoded once, for every epoch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch

from sklearn_medimb._data.images import Images


class CachedImages(Images):
    """What a frozen network makes of some rows of images, in a few views of each.

    It stands where :class:`Images` would. It is made when it is first asked for, and lies on the
    device of the network.

    Parameters
    ----------
    images : Images
        The images themselves.
    rows : ndarray of int
        Those that will be asked for.
    encode : callable
        ``encode(rows)`` gives a tensor (n, n_views, ...) with an entry for each row and view.
    n_views : int
        Number of views; the first is the image as it is.
    others : CachedImages or None, default=None
        Further rows of the same images: those that it has come from there.
    """

    def __init__(
        self,
        images: Images,
        rows: np.ndarray,
        encode: Callable[[np.ndarray], torch.Tensor],
        n_views: int,
        others: CachedImages | None = None,
    ) -> None:
        self.__dict__.update(vars(images))
        self.images = images
        self.known = np.unique(rows)
        self.encode = encode
        self.n_views = n_views
        self.others = others
        self.view = 0
        self._views: torch.Tensor | None = None

    @property
    def views(self) -> torch.Tensor:
        """All of them: (n, n_views, ...)."""
        if self._views is None:
            self._views = self._encoded()
        return self._views

    def _encoded(self) -> torch.Tensor:
        if self.others is None:
            return self.encode(self.known)
        there = np.isin(self.known, self.others.known)
        parts = [self.others.in_every_view(self.known[there])]
        if not there.all():
            parts.append(self.encode(self.known[~there]))
        order = np.argsort(np.concatenate([self.known[there], self.known[~there]]))
        return torch.cat(parts)[torch.from_numpy(order).to(parts[0].device)]

    def rows(self, rows: np.ndarray) -> torch.Tensor:
        """Some rows as they are, (n, ...)."""
        return self.views[self.places(rows), self.view]

    def in_view(self, view: int) -> CachedImages:
        """Give the same images where another view stands for what they are."""
        assert self.views is not None  # made once, for all
        other = copy.copy(self)
        other.view = view
        return other

    def in_every_view(self, rows: np.ndarray) -> torch.Tensor:
        """Some rows in all views, (n, n_views, ...)."""
        return self.views[self.places(rows)]

    def forget(self) -> None:
        """Encode them anew when they are next asked for."""
        self._views = None

    def places(self, rows: np.ndarray) -> torch.Tensor:
        """Where rows are among the views, on their device."""
        return torch.from_numpy(np.searchsorted(self.known, rows)).to(self.views.device)

    def conclude(self) -> None:
        """Refuse lazy images, all of them read by now, that are on a darker scale throughout."""
        self.images.conclude()
