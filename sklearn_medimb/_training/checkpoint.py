"""Training that survives a crash: one atomic file per fit, at most one epoch lost."""

from __future__ import annotations

import hashlib
import io
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skorch.callbacks import Callback
from skorch.history import History

from sklearn_medimb._data.images import Images
from sklearn_medimb._machine.distributed import by_main
from sklearn_medimb._machine.randomness import Draws
from sklearn_medimb._machine.runtime import replacing, resolve_precision
from sklearn_medimb._training.callback_state import CallbackState, counts
from sklearn_medimb._training.digests import digest_of

FORMAT = 5


def fingerprint(
    estimator: Any, device: torch.device, start: dict[str, np.ndarray], data: str
) -> str:
    """Digest of what a fit depends on: class, parameters, machine, start weights, training data.

    Parameters that do not change the result (`verbose`, `checkpoint_dir`, `memory`, loggers and
    progress bars among the callbacks) are left out; so is the seed where it is unset: the
    checkpoint itself carries it.

    Parameters
    ----------
    estimator : estimator
        With its parameters.
    device : torch.device
        Where the fit runs; a checkpoint does not move between kinds of device.
    start : dict of str to ndarray
        Weights that a warm start begins from.
    data : str
        `data_digest` of the training data.

    Raises
    ------
    ValueError
        If a parameter is an object whose state cannot be read.
    """
    params = estimator.get_params(deep=False)
    for name in ("verbose", "checkpoint_dir", "memory"):
        params.pop(name, None)
    given = params["callbacks"] or ()
    params["callbacks"] = [callback for callback in given if counts(callback)]
    machine = (
        *(torch.__version__, device.type),
        *resolve_precision(estimator.precision, device, len(estimator.image_shape_)),
    )
    digest = hashlib.blake2b(data.encode(), digest_size=16)
    classes = getattr(estimator, "classes_", None)
    digest.update(digest_of((type(estimator), classes, machine, start), "estimator"))
    for name, value in sorted(params.items()):
        digest.update(name.encode() + digest_of(value, name))
    return digest.hexdigest()


def data_digest(images: Images, *labels: np.ndarray | None) -> str:
    """Digest of training data: every pixel, in about a second per gigabyte.

    Parameters
    ----------
    images : Images
        Training images; lazy ones are read once.
    *labels : ndarray or None
        Rows, classes, weights and groups.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((images.data.shape, images.layout, images.dtype)).encode())
    step = max(1, 2**24 // (math.prod(images.image_shape) * images.dtype.itemsize))
    for start in range(0, len(images), step):
        rows = np.arange(start, min(start + step, len(images)))
        block = images.rows(rows) if images.lazy else images.data[rows[0] : rows[-1] + 1]
        pixels: Any = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
        digest.update(pixels)
    digest.update(digest_of(labels, "groups"))
    return digest.hexdigest()


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
        self.users: dict[str, Any] | None = None  # what is for the user's callbacks to go on from
        self.user_states: list[CallbackState] = []

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
        try:
            digest, _, content = self.path.read_bytes().partition(b"\n")
        except FileNotFoundError:  # also where the same fit has just finished in another process
            return None
        if hashlib.blake2b(content).hexdigest().encode() != digest:
            raise ValueError(f"The checkpoint is damaged. {self._advice}")
        with self._expecting("what this package writes"):
            state = _unpacked(content)
            same = (state["format"], state["token"]) == (FORMAT, self.token)
        if not same:
            raise ValueError(
                "The checkpoint belongs to another fit (other data, parameters or version). "
                f"{self._advice}"
            )
        with self._expecting("what this package writes"):
            _check_form([state[name] for name in ("seed", "stage", "n_epochs")], [0, 0, 0])
        return state

    @property
    def _advice(self) -> str:
        return f"Delete {str(self.path)!r}, or set checkpoint_dir to another directory."

    @contextmanager
    def _expecting(self, what: str) -> Iterator[None]:
        """Refuse a file that is whole and yet wrong, in whatever way that shows."""
        try:
            yield
        except Exception as error:
            # Those of torch advise to load what is not safe.
            detail = f": {error}" if isinstance(error, (ValueError, KeyError)) else ""
            raise ValueError(
                f"The checkpoint does not hold {what} ({type(error).__name__}{detail}). "
                f"{self._advice}"
            ) from error

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

    def first_stage(self, n_epochs: Sequence[int]) -> int:
        """Number of the stage that the interrupted fit was in.

        Parameters
        ----------
        n_epochs : sequence of int
            Epochs of each stage of this fit.

        Raises
        ------
        ValueError
            If there is no such stage, or no such epoch in it.
        """
        if self.state is None:
            return 0
        stage, n_done = self.state["stage"], self.state["n_epochs"]
        with self._expecting("a state of this fit"):
            if not (0 <= stage < len(n_epochs) and 0 < n_done <= n_epochs[stage]):
                raise ValueError(f"epoch {n_done} of stage {stage} does not exist")
        return stage

    def begin_stage(self, number: int, net: Any, best: Any | None) -> int:
        """Begin a stage, or put `net` where the interrupted fit was in it.

        Returns
        -------
        n_epochs : int
            Epochs of the stage that are done.

        Raises
        ------
        ValueError
            If what the file holds is not of the form that this fit writes.
        """
        self.stage_ = number
        self.epochs_before = len(net.history)
        if self.state is None:
            return 0
        state = self.state
        with self._expecting("a state of this fit"):
            self._check(state, net, best)
            net.module_.load_state_dict(state["module"])
            net.criterion_.load_state_dict(state["criterion"])
            if net.average is not None:
                net.average.load_state_dict(state["average"])
            net.optimizer_.load_state_dict(state["optimizer"])
            net.scheduler.load_state_dict(state["scheduler"])
            net.history_ = History(state["history"])
            if best is not None:
                vars(best).update(state["best"])
            self.rng.bit_generator.state = state["numpy"]
            self.generator.set_state(state["generator"])
            self.draws.set_state(state["draws"])
        self.epochs_before = len(net.history) - state["n_epochs"]
        self.users = {name: state[name] for name in ("callbacks", "trained")}
        self.state = None
        return state["n_epochs"]

    def begin_callbacks(self, net: Any) -> None:
        """Put the user's callbacks, and what they froze, where the interrupted fit was.

        Training has begun for them: what they forget then is forgotten.

        Raises
        ------
        ValueError
            If what the file holds was not written by such callbacks.
        """
        self.user_states = [CallbackState(user) for user in net.user_callbacks if counts(user)]
        if self.users is None:
            return
        found, trained = self.users["callbacks"], self.users["trained"]
        with self._expecting("a state of this fit"):
            for own, state in zip(self.user_states, found, strict=True):
                own.check(state)
            for own, state in zip(self.user_states, found, strict=True):
                own.set(state)
        for name, parameter in net.module_.named_parameters():
            parameter.requires_grad_(bool(trained[name]))
        self.users = None

    def _check(self, state: dict[str, Any], net: Any, best: Any | None) -> None:
        """Compare a state with the one that would be written now; what grows is told apart."""
        own = self._state(net, best)
        for row in state["history"]:
            _check_form(row, plain(row) | {"batches": []}, "history")
        if state["n_epochs"] > len(state["history"]):
            raise ValueError("history has too few rows")
        own["history"] = state["history"]
        found = state["optimizer"]["state"]
        moments = _moments(net.optimizer_)
        # Weights that are not trained have none.
        own["optimizer"]["state"] = {n: moments[n] for n in found} if moments else found
        if not isinstance(state["callbacks"], list):  # each looks at its own
            raise ValueError("callbacks is no list")
        own["callbacks"] = state["callbacks"]
        if best is not None and state["best"]["weights"]:
            own["best"]["weights"] = own["module"]
        _check_form(state, own)

    def _state(self, net: Any, best: Any | None) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "token": self.token,
            "seed": self.seed_,
            "stage": self.stage_,
            "n_epochs": len(net.history) - self.epochs_before,
            "module": net.module_.state_dict(),
            "criterion": net.criterion_.state_dict(),
            "average": {} if net.average is None else net.average.state_dict(),
            "optimizer": net.optimizer_.state_dict(),
            "scheduler": net.scheduler.state_dict(),
            "history": [plain(row) | {"batches": []} for row in net.history],
            "best": {} if best is None else best.state(),
            "callbacks": [user.get() for user in self.user_states],
            "trained": _trained(net),
            "numpy": self.rng.bit_generator.state,
            "generator": self.generator.get_state(),
            "draws": self.draws.get_state(),
        }

    def save(self, net: Any, best: Any | None) -> None:
        """Write atomically: a crash leaves the old file or the new one, never half of either."""
        buffer = io.BytesIO()
        torch.save(self._state(net, best), buffer)
        content = buffer.getvalue()
        with replacing(self.path) as draft:
            draft.write_bytes(hashlib.blake2b(content).hexdigest().encode() + b"\n" + content)

    def remove(self) -> None:
        """Forget the fit: it is finished, in every process."""
        by_main(lambda: self.path.unlink(missing_ok=True))


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """One epoch of history: its plain numbers and texts, without per-batch records."""
    return {k: v for k, v in row.items() if isinstance(v, (int, float, str))}


def _unpacked(content: bytes) -> dict[str, Any]:
    """What `torch.save` wrote; nothing in it is executed, and it takes no more than its size."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise ValueError("its parts are compressed")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _check_form(found: Any, own: Any, place: str = "it") -> None:
    """Refuse a value of another form than one's own: type, names, number of items, shape."""
    if isinstance(own, torch.Tensor):
        form: Any = (torch.Tensor, own.shape, own.dtype)
        fits = isinstance(found, torch.Tensor) and (found.shape, found.dtype) == form[1:]
    elif isinstance(own, dict):
        fits = isinstance(found, dict) and found.keys() == own.keys()
        form = (dict, *own)
    elif isinstance(own, (list, tuple)):
        fits = type(found) is type(own) and len(found) == len(own)
        form = (type(own), len(own))
    elif isinstance(own, (int, float)) and not isinstance(own, bool):
        fits, form = isinstance(found, (int, float)) and not isinstance(found, bool), "a number"
    else:
        fits, form = found == own, own
    if not fits:
        raise ValueError(f"{place} is not {form}")
    if isinstance(own, (dict, list, tuple)):
        for key in own if isinstance(own, dict) else range(len(own)):
            _check_form(found[key], own[key], str(key))


def _trained(net: Any) -> dict[str, int]:
    """Which weights are trained: callbacks may freeze some, and thaw them."""
    return {name: int(p.requires_grad) for name, p in net.module_.named_parameters()}


def _moments(optimizer: torch.optim.Optimizer) -> dict[int, Any]:
    """Form of what an optimiser of this kind keeps of each weight; {} if it does not tell."""
    groups = [dict(group) for group in optimizer.param_groups]
    for group in groups:
        group["params"] = [torch.zeros_like(weight) for weight in group["params"]]
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    kind: Any = type(optimizer)
    twin = kind(groups)
    try:
        twin.step()
    except (RuntimeError, TypeError):  # one for sparse gradients, or that evaluates the loss itself
        return {}
    return twin.state_dict()["state"]
