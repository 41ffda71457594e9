"""Training that survives a crash: one atomic file per fit, at most one epoch lost."""

from __future__ import annotations

import hashlib
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skorch.callbacks import Callback
from skorch.history import History

from sklearn_medimb.distributed import by_main
from sklearn_medimb.images import Images
from sklearn_medimb.randomness import Draws
from sklearn_medimb.runtime import replacing

FORMAT = 3


def fingerprint(
    estimator: Any,
    device: torch.device,
    start: dict[str, np.ndarray],
    images: Images,
    *labels: np.ndarray | None,
) -> str:
    """Digest of what a fit depends on: class, parameters, device, start weights, training data.

    Parameters that do not change the result (`verbose`, `checkpoint_dir`, ``callbacks``) are left
    out; so is the seed where it is unset: the checkpoint itself carries it.

    Parameters
    ----------
    estimator : estimator
        With its parameters.
    device : torch.device
        Where the fit runs; a checkpoint does not move between kinds of device.
    start : dict of str to ndarray
        Weights that a warm start begins from.
    images : Images
        Training images.
    *labels : ndarray or None
        Classes, weights and groups of the rows.
    """
    digest = hashlib.blake2b(digest_size=16)
    ignored = ("verbose", "checkpoint_dir", "callbacks")
    digest.update(f"{type(estimator).__name__} {device.type}".encode())
    for name, value in sorted(estimator.get_params().items()):
        if name.split("__")[0] not in ignored:
            digest.update(f"{name}={_describe(value)};".encode())
    for name, array in start.items():
        digest.update(name.encode() + array.tobytes())
    digest.update(data_digest(images, *labels).encode())
    return digest.hexdigest()


def data_digest(images: Images, *labels: np.ndarray | None) -> str:
    """Digest of training data.

    Of large arrays and lazy containers an even selection of rows is read; which rows of its source
    a container holds counts too.

    Parameters
    ----------
    images : Images
        Training images.
    *labels : ndarray or None
        Classes, weights and groups of the rows.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((images.data.shape, images.layout, images.dtype)).encode())
    if images.lazy:
        digest.update(np.asarray(getattr(images.data, "rows", ())).tobytes())
    row_bytes = int(np.prod(images.image_shape)) * images.dtype.itemsize
    n_rows = max(1, 2**26 // row_bytes) if images.in_blocks else 16
    rows = np.unique(np.linspace(0, len(images) - 1, n_rows).astype(int))
    for part in np.array_split(rows, -(-len(rows) // 256)):
        digest.update(images.rows(part).contiguous().numpy().tobytes())
    for values in labels:
        digest.update(b"-" if values is None else repr(np.asarray(values).tolist()).encode())
    return digest.hexdigest()


def _describe(value: Any) -> str:
    """Text of a parameter that is the same in every process: no memory addresses."""
    if isinstance(value, torch.nn.Module):
        state = {k: v.detach().cpu().tolist() for k, v in value.state_dict().items()}
        return f"{value!r} {hashlib.blake2b(repr(state).encode()).hexdigest()}"
    weights = getattr(value, "weights_", None)
    if isinstance(weights, dict):  # a fitted estimator to begin with
        digest = hashlib.blake2b()
        for name, array in sorted(weights.items()):
            digest.update(name.encode() + np.asarray(array).tobytes())
        return f"{value!r} {digest.hexdigest()}"
    if isinstance(value, np.random.RandomState):
        return hashlib.blake2b(repr(value.get_state()).encode()).hexdigest()
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


class Checkpoint(Callback):
    """Write the state of a fit after each epoch, and read it back.

    Files are named after the fit's fingerprint, so that the folds of a cross-validation or the
    candidates of a search can share a directory; a finished fit removes its file.

    Parameters
    ----------
    directory : path-like
        Created if missing.
    token : str
        Fingerprint of the fit.
    """

    def __init__(self, directory: str | os.PathLike[str], token: str) -> None:
        self.directory = Path(directory)
        self.token = token
        self.path = self.directory / f"{token}.checkpoint"
        self.state: dict[str, Any] | None = None

    def open(self) -> Checkpoint:
        """Make the directory, and read what an interrupted fit left there.

        Of several processes that train together the first one does both, and tells the others.

        Raises
        ------
        ValueError
            If the file is damaged or was written by another fit.
        """
        self.state = by_main(self._read)
        return self

    def _read(self) -> dict[str, Any] | None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"checkpoint_dir={str(self.directory)!r} cannot be used as a directory: {error}"
            ) from error
        for draft in self.directory.glob(
            f".{self.path.name}.*.tmp"
        ):  # left by a crash while writing
            draft.unlink(missing_ok=True)
        if not self.path.exists():
            return None
        advice = f"Delete {str(self.path)!r}, or set checkpoint_dir to another directory."
        digest, _, content = self.path.read_bytes().partition(b"\n")
        if hashlib.blake2b(content).hexdigest().encode() != digest:
            raise ValueError(f"The checkpoint is damaged. {advice}")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if (state["format"], state["token"]) != (FORMAT, self.token):
            raise ValueError(
                "The checkpoint belongs to another fit (other data, parameters or version). "
                f"{advice}"
            )
        return state

    @property
    def seed(self) -> int | None:
        """Seed of the interrupted fit."""
        return None if self.state is None else self.state["seed"]

    def attach(
        self, *, seed: int, rng: np.random.Generator, generator: torch.Generator, draws: Draws
    ) -> None:
        """Name the sources of randomness that a resumed fit must find again."""
        self.seed_ = seed
        self.rng = rng
        self.generator = generator
        self.draws = draws

    @property
    def stage(self) -> int:
        """Number of the stage that the interrupted fit was in."""
        return 0 if self.state is None else self.state["stage"]

    def begin_stage(self, number: int, net: Any, best: Any | None) -> int:
        """Begin a stage, or put `net` where the interrupted fit was in it.

        Returns
        -------
        n_epochs : int
            Epochs of the stage that are done.
        """
        self.stage_ = number
        self.epochs_before = len(net.history)
        if self.state is None:
            return 0
        state = self.state
        net.module_.load_state_dict(state["module"])
        net.criterion_.load_state_dict(state["criterion"])
        net.optimizer_.load_state_dict(state["optimizer"])
        net.scheduler.load_state_dict(state["scheduler"])
        net.history_ = History(state["history"])
        if best is not None:
            vars(best).update(state["best"])
        self.rng.bit_generator.state = state["numpy"]
        self.generator.set_state(state["generator"])
        self.draws.set_state(state["draws"])
        self.epochs_before = len(net.history) - state["n_epochs"]
        self.state = None
        return state["n_epochs"]

    def save(self, net: Any, best: Any | None) -> None:
        """Write atomically: a crash leaves the old file or the new one, never half of either."""
        state = {
            "format": FORMAT,
            "token": self.token,
            "seed": self.seed_,
            "stage": self.stage_,
            "n_epochs": len(net.history) - self.epochs_before,
            "module": net.module_.state_dict(),
            "criterion": net.criterion_.state_dict(),
            "optimizer": net.optimizer_.state_dict(),
            "scheduler": net.scheduler.state_dict(),
            "history": [plain(row) | {"batches": []} for row in net.history],
            "best": {} if best is None else best.state(),
            "numpy": self.rng.bit_generator.state,
            "generator": self.generator.get_state(),
            "draws": self.draws.get_state(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
        with replacing(self.path) as draft:
            draft.write_bytes(hashlib.blake2b(content).hexdigest().encode() + b"\n" + content)

    def remove(self) -> None:
        """Forget the fit: it is finished, in every process."""
        by_main(lambda: self.path.unlink(missing_ok=True))


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """One epoch of history: its plain numbers and texts, without per-batch records."""
    return {k: v for k, v in row.items() if isinstance(v, (int, float, str))}
