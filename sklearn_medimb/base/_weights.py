"""Copies, files, assigned weights: what a fitted estimator is as data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from skorch.history import History

from sklearn_medimb._data.images import Images
from sklearn_medimb._data.layout import Layout
from sklearn_medimb._machine.randomness import seeded
from sklearn_medimb._machine.runtime import resolve_device
from sklearn_medimb._parameters import array_form
from sklearn_medimb.base._networks import MakesNetworks, whole_recipe


class KeepsWeights(MakesNetworks):
    """Part of :class:`BaseImageEstimator`: what it learned, as arrays."""

    def __sklearn_clone__(self) -> Any:
        """Clone; a fitted estimator to begin with stays fitted, and shares what it learned."""
        copied = super().__sklearn_clone__()
        for name, value in self.get_params(deep=False).items():
            if isinstance(value, KeepsWeights) and value._was_fitted:
                kept = object.__new__(type(value))
                kept.__dict__.update(vars(value))  # its parameters can be set; nothing is trained
                setattr(copied, name, kept)
        return copied

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "net_")

    # ---------------------------------------------------------------- what predictions come from

    @property
    def _inference_arrays(self) -> tuple[str, ...]:
        """Fitted arrays that prediction needs beside the network's weights."""
        return tuple(name for name, entry in self._learned.items() if entry.predicts)

    def _sizes(self) -> dict[str, int]:
        """Sizes that fitted arrays must have, by letter."""
        return {"n_channels": self.image_shape_[0]}

    def _answer(self, images: Images) -> tuple[np.ndarray, int]:
        """What predictions come from, and how many numbers it has per image."""
        module = self.net_.module_
        return self._map(images, module.features).cpu().numpy(), module.n_features

    def _check_learned(self, *, tries: bool = True) -> None:
        """Refuse fitted arrays that do not fit together: there must be an answer for blank input.

        Parameters
        ----------
        tries : bool, default=True
            Whether to ask for that answer, which takes memory and time.

        Raises
        ------
        ValueError
            If one has another size or kind of numbers, or is not finite.
        """
        sizes = self._sizes()
        for name, attribute in self._learned.items():
            form = array_form(attribute)
            if form is None or name not in vars(self):
                continue
            (kinds, size, n_axes), array = form, vars(self)[name]
            sizes.setdefault(size, len(array))
            if array.ndim != n_axes or array.dtype.kind not in kinds or len(array) != sizes[size]:
                raise ValueError(f"{name} has shape {array.shape} and dtype {array.dtype}.")
        arrays = {name: torch.tensor(getattr(self, name)) for name in self._inference_arrays}
        for name, value in (self.net_.module_.state_dict() | arrays).items():
            if value.is_floating_point() and not value.isfinite().all():
                raise ValueError(f"the weights {name} are not finite.")
        if not (self.pixel_std_ > 0).all():
            raise ValueError("pixel_std_ must be above 0.")
        if self.compile or not tries:  # an answer would compile the network now
            return
        shape = self.image_shape_
        blank = Images(np.zeros((1, *shape), np.float32), Layout(shape), np.dtype(np.float32))
        answer, n_numbers = self._answer(blank)
        check_answer(answer, (1, n_numbers))

    def _network_weights(self) -> dict[str, np.ndarray]:
        state = self.net_.module_.state_dict()
        return {
            name: np.array(value.detach().cpu().numpy(), order="C") for name, value in state.items()
        }

    @property
    def weights_(self) -> dict[str, np.ndarray]:
        """Arrays behind predictions by name, but for a head of another package; can be set."""
        check_is_fitted(self)
        extra = {name: np.array(getattr(self, name), order="C") for name in self._inference_arrays}
        return {**self._network_weights(), **extra}

    @weights_.setter
    def weights_(self, weights: dict[str, np.ndarray]) -> None:
        check_is_fitted(self)
        weights = {name: np.array(value) for name, value in weights.items()}
        network = self._network_weights()
        arrays = {name: getattr(self, name) for name in self._inference_arrays}
        kinds = {"u": "i"}  # whole numbers are whole numbers

        def differs(name: str, own: np.ndarray) -> bool:
            new = weights[name]
            # A bank may hold another number of supports; `_check_learned` knows what may vary.
            same = new.shape == own.shape if name in network else new.shape[1:] == own.shape[1:]
            return not same or len({kinds.get(a.dtype.kind, a.dtype.kind) for a in (own, new)}) > 1

        expected = network | arrays
        odd = set(weights) ^ set(expected)
        odd |= {name for name, own in expected.items() if name in weights and differs(name, own)}
        if odd:
            raise ValueError(
                f"weights_ of another network cannot be assigned: {sorted(odd)[:5]} differ."
            )
        try:
            self._set_fitted({name: weights.pop(name) for name in arrays})
            self._load(weights)
            self._check_learned()
        except BaseException as error:
            self._set_fitted(arrays)
            self._load(network)
            if not isinstance(error, Exception):
                raise
            raise ValueError(f"weights_ cannot be assigned: {error}") from error

    def _load(self, weights: dict[str, np.ndarray]) -> None:
        state = {name: torch.tensor(value) for name, value in weights.items()}
        self.net_.module_.load_state_dict(state)
        self.net_.module_.eval()

    def _set_fitted(self, attributes: dict[str, Any]) -> None:
        for name, value in attributes.items():
            setattr(self, name, value)

    # ---------------------------------------------------------------- pickles

    def __getstate__(self) -> dict[str, Any]:
        """Parameters, scalars and arrays: no tensor, no device, nothing that skops cannot audit."""
        state = super().__getstate__()
        if "net_" in state:
            state = {k: v for k, v in state.items() if k != "net_"}
            state["_weights"] = self._network_weights()
            if made_from := self._parameters_of(self.net_):  # set_params came after the fit
                state["_made_from"] = made_from
            if "backbone" not in made_from:
                state["backbone"] = whole_recipe(self.backbone, self.net_)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild the network, on whatever device this machine has."""
        state = dict(state)
        weights = state.pop("_weights", None)
        made_from = state.pop("_made_from", {})
        super().__setstate__(state)
        if weights is None:
            return
        device = resolve_device(self.device, fall_back=True)
        present = {name: getattr(self, name) for name in made_from}
        self.__dict__.update(made_from)
        try:
            with seeded(0, device):
                self.net_ = self._make_net(device, pretrained=False)
        finally:
            self.__dict__.update(present)
        self._load(weights)
        self.net_.history_ = History(getattr(self, "history_", []))


def check_answer(answer: np.ndarray, shape: tuple[int, int]) -> None:
    """Refuse an answer for blank input that has another shape or is not finite."""
    if answer.shape != shape or not np.isfinite(answer).all():
        raise ValueError(f"its answer for blank input has shape {answer.shape}, or is not finite.")
