"""What the user's callbacks remember, so that a resumed fit goes on as they would have.

skorch's callbacks forget when training begins: a patience starts anew. So a checkpoint holds what
they have noted down as plain data. What they keep in other objects is out of its reach, and must
stay as it was.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from skorch.callbacks import (
    Callback,
    EpochTimer,
    MlflowLogger,
    NeptuneLogger,
    PrintLog,
    ProgressBar,
    SacredLogger,
    TensorBoard,
    WandbLogger,
)

from sklearn_medimb._training.digests import digest_of

#: Callbacks that only write down what happens; subclasses may do more.
WATCHERS: set[type] = {
    Callback, EpochTimer, MlflowLogger, NeptuneLogger, PrintLog, ProgressBar, SacredLogger,
    TensorBoard, WandbLogger,
}  # fmt: skip


def counts(callback: Any) -> bool:
    """Whether a callback may take part in the training: all may but names and `WATCHERS`."""
    return not isinstance(callback, str) and type(callback) not in WATCHERS


class CallbackState:
    """The data that one callback has noted down.

    Of its attributes these are numbers, texts, tensors, and lists, tuples and dicts of such. A
    callback with the methods ``state_dict`` and ``load_state_dict`` decides by itself.

    Parameters
    ----------
    callback : Callback
        Of the user; ``on_train_begin`` is behind it.
    """

    def __init__(self, callback: Any) -> None:
        self.callback = callback
        self.name = type(callback).__name__
        own = (getattr(callback, name, None) for name in ("state_dict", "load_state_dict"))
        self.decides = all(callable(method) for method in own)
        self.others = {} if self.decides else self._read()[1]

    def _read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Attributes that are data, and what tells whether the others have changed."""
        data, others = {}, {}
        for name, value in vars(self.callback).items():
            try:
                data[name] = _as_data(value)
            except TypeError:
                is_file = isinstance(value, io.IOBase)
                others[name] = id(value) if is_file else digest_of(value, f"{self.name}.{name}")
        return data, others

    def get(self) -> dict[str, Any]:
        """State for the checkpoint.

        Raises
        ------
        ValueError
            If something else than data has changed; the message says what to do.
        """
        if self.decides:
            return {"state": _as_data(self.callback.state_dict())}
        data, others = self._read()
        odd = [name for name in others if others[name] != self.others.get(name)]
        if odd:
            raise ValueError(
                f"checkpoint_dir: {self.name}.{odd[0]} in callbacks changes in training, and a "
                "checkpoint holds plain data alone: numbers, texts, tensors, lists, tuples, dicts. "
                f"Keep such in attributes, give {self.name} the methods state_dict() and "
                "load_state_dict(state), or set checkpoint_dir=None."
            )
        return data

    def set(self, state: dict[str, Any]) -> None:
        """Go on from the state of an interrupted fit."""
        if self.decides:
            self.callback.load_state_dict(state["state"])
            return
        for name, value in state.items():
            own = vars(self.callback).get(name)
            if type(own) is type(value) is list:  # the user may look at it
                own[:] = value
            elif type(own) is type(value) is dict:
                own.clear()
                own.update(value)
            else:
                setattr(self.callback, name, value)

    def check(self, state: Any) -> None:
        """Refuse a state that this callback cannot have written."""
        fits = isinstance(state, dict) and all(isinstance(name, str) for name in state)
        if self.decides:
            fits = fits and state.keys() == {"state"}
        else:
            kind = type(self.callback)
            fits = fits and not state.keys() & self.others.keys()
            fits = fits and not any(callable(getattr(kind, name, None)) for name in state)
        if not fits:
            raise ValueError(f"callbacks holds no state of {self.name}")


def _as_data(value: Any) -> Any:
    """Plain data, NumPy's numbers as Python's.

    Raises
    ------
    TypeError
        If it is something else.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) in (type(None), bool, int, float, str, torch.Tensor):
        return value.detach() if isinstance(value, torch.Tensor) else value
    if type(value) in (list, tuple):
        return type(value)(map(_as_data, value))
    if type(value) in (dict, OrderedDict) and all(type(key) in (int, str) for key in value):
        return {key: _as_data(item) for key, item in value.items()}
    raise TypeError(f"{type(value).__name__} is no plain data")
