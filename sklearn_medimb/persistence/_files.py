"""`save` and `load`."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

import sklearn_medimb
from sklearn_medimb._machine.runtime import replacing
from sklearn_medimb.persistence._format import (
    FORMAT,
    MAX_TEXT,
    digest_of_file,
    is_outside,
    name_of,
    safetensors_library,
    trusted_classes,
)
from sklearn_medimb.persistence._reading import read_file, reason
from sklearn_medimb.persistence._writing import Writer


def save(estimator: Any, path: str | os.PathLike[str], *, whole: bool = False) -> None:
    """Write a fitted estimator to one file, without pickle.

    Parameters
    ----------
    estimator : estimator
        Fitted, of this package or a class of one's own. Parameters and head may hold other
        estimators: those of this package, the linear and naive Bayes models of scikit-learn, the
        samplers of imbalanced-learn, and one's own.
    path : str or path-like
        File to write, by custom ``*.safetensors``. An older one is replaced at once, when the new
        one is complete and was read back; until then, and in case of an error, it stays.
    whole : bool, default=False
        Whether the weights of a backbone that stayed frozen, or of a start that stays beside a
        tuned one, are written even if they are, to the bit, those of an installed package, as of
        "efficientnet_lite0". Otherwise the file names them by their digest, and `load` needs that
        package.

    Raises
    ------
    sklearn.exceptions.NotFittedError
        If the estimator is not fitted.
    ValueError
        If a parameter or attribute is no data: a function, a module, a callback, an object that is
        no estimator; if a class of one's own is not at the top level of a module; or if parameters
        were changed after ``fit`` so that the weights do not fit.
    ImportError
        If safetensors is not installed.
    OSError
        If the file cannot be written, such as on a full disk.

    See Also
    --------
    load : Reads the file.
    sklearn_medimb.onnx.export_onnx : Predictions without this package.

    Notes
    -----
    A fitted estimator that training began with (``backbone=encoder`` or ``pretrain=encoder``) is
    stored as its parameters: predictions, ``partial_fit`` and warm starts do without its weights,
    a ``fit`` from the start asks for them. Pickle and joblib keep everything. Paths among the
    parameters (``checkpoint_dir``, ``weights``) are written as they are. The state of the optimiser
    is not stored, nor is it in a pickle.

    A class of one's own is written as the name of its module and its own, and `load` must be told
    to trust it. One that a program defines in itself (``__main__``) has no module to be found by:
    there `load` takes the class only.
    """
    safetensors = safetensors_library()
    if not isinstance(estimator, BaseEstimator) or name_of(type(estimator)) is None:
        if is_outside(type(estimator)):
            raise ValueError(
                f"{type(estimator).__qualname__} is not, or no longer, at the top level of its "
                "module, by which a file could name it: move it there, or fit anew."
            )
        raise ValueError(
            f"{type(estimator).__name__} is no estimator of sklearn_medimb: save the one inside "
            "(best_estimator_, a step of a pipeline), or use pickle or joblib."
        )
    check_is_fitted(estimator)
    writer = Writer(estimator, by_digest=not whole)
    tree = writer.estimator(estimator, "", "all")
    stamp = {
        "sklearn_medimb": sklearn_medimb.__version__,
        "sklearn_medimb_format": str(FORMAT),
        "estimator": json.dumps(tree, allow_nan=False, separators=(",", ":")),
    }
    if len(stamp["estimator"]) > MAX_TEXT:
        raise ValueError(
            f"{type(estimator).__name__} has {len(stamp['estimator'])} characters of parameters "
            f"and history beside its arrays; a file takes {MAX_TEXT}. Shorten history_, or use "
            "pickle or joblib."
        )
    stamp["digest"] = digest_of_file(stamp, writer.tensors)
    with replacing(Path(path)) as draft:
        try:
            safetensors.numpy.save_file(writer.tensors, draft, metadata=stamp)
        except safetensors.SafetensorError as error:
            raise OSError(f"{os.fspath(path)} cannot be written: {error}") from error
        try:
            read_file(draft, writer.outside)
        except Exception as error:
            raise ValueError(
                f"{type(estimator).__name__} cannot be restored from a file: {reason(error)}"
            ) from error


def load(path: str | os.PathLike[str], *, trusted: Iterable[type | str] = ()) -> Any:
    """Read an estimator that `save` wrote; nothing in the file is executed.

    Parameters
    ----------
    path : str or path-like
        The file.
    trusted : list of class or str, default=()
        What the file may name from outside of this package: classes, or names of modules, which
        are imported; a package stands for what its ``__init__`` holds of its own classes. They
        must be estimators (subclasses of :class:`sklearn.base.BaseEstimator`) or optimisers of
        torch. A file makes them with parameters and attributes of its choice, so trust only those
        that do no harm by them.

    Returns
    -------
    estimator : estimator
        It predicts what the saved one did, on whatever device this machine has, and can be trained
        further.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    TypeError
        If `trusted` is no list, or holds what no file can.
    ValueError
        If it was not written by `save`, is damaged, does not describe an estimator of this
        version, or names a class that is not trusted; the message begins with the path.
    ImportError
        If safetensors, or a package that the file needs, is not installed, or a module in
        `trusted` cannot be imported.

    Warns
    -----
    UserWarning
        If another version (major or minor) of the package wrote it: predictions may differ.
    """
    safetensors_library()
    classes = trusted_classes(trusted)
    if not Path(path).exists():
        raise FileNotFoundError(f"{os.fspath(path)}: there is no such file.")
    try:
        estimator, version = read_file(Path(path), classes)
    except ImportError as error:
        raise ImportError(f"{os.fspath(path)}: {error}", name=error.name) from error
    except Exception as error:  # a file can be wrong in ways that nobody has thought of
        raise ValueError(f"{os.fspath(path)}: {reason(error)}") from error
    if version.split(".")[:2] != sklearn_medimb.__version__.split(".")[:2]:
        warnings.warn(
            f"{os.fspath(path)} was written by sklearn_medimb {version}; this is "
            f"{sklearn_medimb.__version__}, which may predict otherwise: check it, then save anew.",
            stacklevel=2,
        )
    return estimator
