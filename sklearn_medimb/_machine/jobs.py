"""Many jobs, each of which leaves a file: a run that was killed goes on where it was."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed

from sklearn_medimb._machine.runtime import replacing

Result = dict[str, Any]


def read_result(path: Path) -> Result | None:
    """Result of a job, if its file is there and whole."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) else None


def run_jobs(
    function: Callable[..., Result],
    jobs: Mapping[Any, tuple[Any, ...]],
    path_of: Callable[[Any], Path] | None = None,
    *,
    needs: Sequence[str] = (),
    facts: Result | None = None,
    show: bool = False,
) -> tuple[dict[Any, Result], dict[Any, str]]:
    """Do what has no file yet, on the present backend of joblib.

    Parameters
    ----------
    function : callable
        Gives the result of a job, a dict that JSON can hold.
    jobs : dict
        Arguments of each job, by its name.
    path_of : callable, default=None
        File of a job; it is written whole or not at all. None keeps nothing.
    needs : sequence of str, default=()
        What a result must hold; a file without it is none.
    facts : dict, default=None
        What each file holds beside the result.
    show : bool, default=False
        Whether to show progress.

    Returns
    -------
    results : dict
        By name, in the order of `jobs`.
    failures : dict
        What was raised, by name: a job that fails does not stop the others.
    """
    found: dict[Any, Result] = {}
    if path_of is not None:
        read = {name: read_result(path_of(name)) for name in jobs}
        found = {
            name: result
            for name, result in read.items()
            if result is not None and set(needs) <= result.keys()
        }
    missing = [name for name in jobs if name not in found]
    finished = Parallel(return_as="generator_unordered")(
        delayed(_outcome)(function, name, jobs[name]) for name in missing
    )
    failures: dict[Any, str] = {}
    for name, result, error in _shown(finished, len(missing)) if show else finished:
        if error is not None:
            failures[name] = error
            continue
        found[name] = result
        if path_of is not None:
            with replacing(path_of(name)) as draft:
                draft.write_text(json.dumps({**result, **(facts or {})}))
    return {name: found[name] for name in jobs if name in found}, failures


def _outcome(
    function: Callable[..., Result], name: Hashable, args: tuple[Any, ...]
) -> tuple[Any, Result, str | None]:
    try:
        return name, function(*args), None
    except Exception as error:  # the caller says so in the end
        return name, {}, f"{type(error).__name__}: {error}"


def _shown(finished: Any, total: int) -> Any:
    from tqdm.auto import tqdm  # installed with skorch

    return tqdm(finished, total=total, unit="job", smoothing=0.05, file=sys.stderr)
