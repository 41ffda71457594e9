"""Images, labels and patients from folders of files and from tables."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.utils import Bunch

from sklearn_medimb._data.files import ImageFiles, broken_files
from sklearn_medimb.datasets._tables import (
    as_labels,
    column,
    patient_ids,
    read_table,
    row_numbers,
)

_IGNORED = {"thumbs.db", "desktop.ini", "__macosx", "dicomdir"}
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "holdout"}
_TINY = 4  # pixels along a side, of which no picture is made
_SHOWN = 5  # of what a message lists


def from_folder(
    folder: str | os.PathLike[str],
    /,
    *,
    groups: str | Callable[[str], Any] | None = None,
    table: Any = None,
    path: str = "path",
    label: str | None = "label",
    group: str | None = None,
    on_error: str = "raise",
    duplicates: bool = True,
    **options: Any,
) -> Bunch:
    """Image files of a folder, with a sub-folder for each class or with a table.

    A class is the name of a sub-folder, and all files in it and below belong to it. Hidden files
    and folders, ``Thumbs.db``, ``desktop.ini``, ``DICOMDIR`` and ``__MACOSX`` are passed over;
    links are followed.

    Parameters
    ----------
    folder : path-like
        The folder.
    groups : str or callable, default=None
        The patient of a file: a regular expression with one group, which is looked for in the
        file's name, or a function of its path, which may look into the file:
        ``lambda path: pydicom.dcmread(path, stop_before_pixels=True).PatientID``. With a table, use
        `group`.
    table : DataFrame or path-like, default=None
        Says which files there are and what they show, by paths within the folder; sub-folders are
        then no classes. See :func:`from_table`.
    path, label, group : str
        Columns of the table.
    on_error : {"raise", "skip"}, default="raise"
        "skip" decodes each file once and leaves those out that are broken, with a warning; their
        labels, patients and rows of the table go with them. With "raise" headers are looked at, and
        a file whose pixels are broken names itself when it is read.
    duplicates : bool, default=True
        Whether files of the same content are looked for. Only files of the same size are read for
        that.
    **options
        What :class:`ImageFiles` takes: ``mode``, ``image_size``, ``window``, ``spacing``,
        ``frames``, ``cache``.

    Returns
    -------
    data : :class:`~sklearn.utils.Bunch`
        ``images``, an :class:`ImageFiles`; ``labels`` (n,) of str, or int where a table has whole
        numbers, or None; ``groups`` (n,) of str or None; ``table``, the rows of the images, or
        None; ``duplicates``, lists of rows that are the same picture; ``skipped``, pairs of a path
        and what is wrong with it. With ``frames="each"`` slices have what their file has; where no
        patient is told, the files are the groups, and `duplicates` has their first slices.

    Raises
    ------
    ValueError
        If there is nothing to read, a class has no files, a file is broken, or patients are not
        told.

    Warns
    -----
    UserWarning
        If the same picture has several labels or patients, or occurs several times; if files are
        left out, or have sides of less than four pixels.

    Examples
    --------
    >>> import tempfile, pathlib, numpy as np
    >>> from sklearn_medimb.datasets import from_folder
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for k, name in enumerate(["benign/p1_a", "benign/p1_b", "malignant/p2_a"]):
    ...     (folder / name).parent.mkdir(exist_ok=True)
    ...     np.save(folder / name, np.full((8, 8), k, dtype=np.uint8))
    >>> data = from_folder(folder, groups="^(p[0-9]+)_")
    >>> data.images.shape, data.labels.tolist(), data.groups.tolist()
    ((3, 8, 8), ['benign', 'benign', 'malignant'], ['p1', 'p1', 'p2'])
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder.")
    if table is not None:
        if groups is not None:
            raise ValueError("groups= is for folders without a table: name a column in group=.")
        return from_table(
            table, path=path, label=label, group=group, root=root, on_error=on_error,
            duplicates=duplicates, **options,
        )  # fmt: skip
    classes = {entry.name: entry for entry in _entries(root) if entry.is_dir()}
    if not classes:
        raise ValueError(
            f"{str(folder)!r} holds no sub-folders, one for each class: pass table=, which says "
            "what its files show."
        )
    if {name.lower() for name in classes} <= _SPLITS:
        raise ValueError(
            f"{str(folder)!r} holds {sorted(classes)}, which are no classes: read each of them."
        )
    if beside := [entry.name for entry in _entries(root) if not entry.is_dir()]:
        warnings.warn(
            f"{str(folder)!r} holds files that belong to no class and are left out: "
            f"{_listed(beside)}.",
            stacklevel=2,
        )
    paths, labels = [], []
    for name, inside in classes.items():
        files = list(_files(inside))
        if not files:
            raise ValueError(f"The class folder {str(inside)!r} holds no files: remove it.")
        paths += files
        labels += [name] * len(files)
    patients = None if groups is None else patient_ids(*_patients(paths, groups))
    return _gathered(paths, np.array(labels), patients, None, on_error, duplicates, options)


def from_table(
    table: Any,
    *,
    path: str = "path",
    label: str | None = "label",
    group: str | None = None,
    root: str | os.PathLike[str] | None = None,
    on_error: str = "raise",
    duplicates: bool = True,
    **options: Any,
) -> Bunch:
    """Image files that a table lists, with their labels and patients.

    Parameters
    ----------
    table : DataFrame or path-like
        A row for each image; or a text file with a header: separated by commas, semicolons, tabs or
        bars, UTF-8 or UTF-16, with or without a byte-order mark.
    path : str, default="path"
        Column of the files. What comes after a dot may be left out where only one file has the
        rest for its name.
    label : str or None, default="label"
        Column of the classes. Those of a text file are numbers if all are whole numbers.
    group : str, default=None
        Column of the patients. They become texts: 12, 12.0, "12" and " 12 " are one patient, "012"
        is another.
    root : path-like, default=None
        What relative paths are relative to: the folder of the text file, or the current one for a
        DataFrame.
    on_error : {"raise", "skip"}, default="raise"
        As in :func:`from_folder`.
    duplicates : bool, default=True
        As in :func:`from_folder`.
    **options
        What :class:`ImageFiles` takes.

    Returns
    -------
    data : :class:`~sklearn.utils.Bunch`
        As :func:`from_folder` gives it.

    Raises
    ------
    ValueError
        If a column is missing, or an entry in one: the message has the row as a spreadsheet counts
        it. Also as in :func:`from_folder`.
    """
    frame = read_table(table)
    numbers = row_numbers(frame, table)
    if root is None:
        root = Path() if frame is table else Path(table).parent
    names = column(frame, path, "path", numbers)
    paths = _completed([_within(Path(root), name) for name in names])
    absent = [k for k, found in enumerate(paths) if not Path(found).exists()]
    if absent and on_error != "skip":
        raise ValueError(
            f"path={path!r}: {len(absent)} of {len(paths)} files are not there; the first is "
            f"{paths[absent[0]]!r} in row {numbers[absent[0]]} (the header is row 1). Paths are "
            f"relative to root={str(root)!r}."
        )
    labels = None
    if label is not None:
        entries = column(frame, label, "label", numbers)
        labels = as_labels(entries, from_file=frame is not table)
    patients = None
    if group is not None:
        places = [f"Row {number} of the table" for number in numbers]
        patients = patient_ids(column(frame, group, "group", numbers), places)
    return _gathered(paths, labels, patients, frame, on_error, duplicates, options)


# ---------------------------------------------------------------- files


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, in order, without what systems leave there."""
    found = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in found if path.name.lower() not in _IGNORED)


def _files(folder: Path, above: tuple[Any, ...] = ()) -> Iterator[str]:
    """All files of a folder and below."""
    status = folder.stat()
    here = status.st_dev, status.st_ino
    if here in above:
        raise ValueError(f"{str(folder)!r} is a link to a folder that holds it: remove the link.")
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _files(entry, (*above, here))
        else:
            yield str(entry)


def _within(root: Path, name: Any) -> str:
    """Path of a file that a table names."""
    if not isinstance(name, (str, os.PathLike)):
        raise ValueError(f"path: {name!r} is no path.")
    found = root / name
    if "\\" in str(name) and not found.exists():  # a table that was made on Windows
        found = root / str(name).replace("\\", "/")
    return str(found)


def _completed(paths: list[str]) -> list[str]:
    """Paths with the extensions that a table leaves out."""
    known: dict[Path, dict[str, list[str]]] = {}

    def complete(path: Path) -> str:
        if path.exists() or not path.parent.is_dir():
            return str(path)
        if path.parent not in known:
            names = known[path.parent] = defaultdict(list)
            for entry in _entries(path.parent):
                for dot in re.finditer(r"\.", entry.name):
                    names[entry.name[: dot.start()]].append(str(entry))
        found = known[path.parent].get(path.name, [])
        return found[0] if len(found) == 1 else str(path)

    return [complete(Path(path)) for path in paths]


def _patients(
    paths: Sequence[str], groups: str | Callable[[str], Any]
) -> tuple[list[Any], Sequence[str]]:
    """What `groups` makes of each path, and what errors call it."""
    places = [repr(path) for path in paths]
    if callable(groups):
        return [groups(path) for path in paths], places
    try:
        pattern = re.compile(groups)
    except re.error as error:
        raise ValueError(f"groups={groups!r} is no regular expression: {error}.") from error
    if pattern.groups != 1:
        raise ValueError(
            f"groups={groups!r} must have one group, the patient, but has {pattern.groups}."
        )
    found = [pattern.search(Path(path).name) for path in paths]
    if lacking := [path for path, match in zip(paths, found, strict=True) if match is None]:
        raise ValueError(
            f"groups={groups!r} is not found in the names of {len(lacking)} of {len(paths)} files: "
            f"{_listed(lacking)}."
        )
    return [match[1] for match in found if match is not None], places


def _gathered(
    paths: list[str],
    labels: np.ndarray | None,
    groups: np.ndarray | None,
    table: Any,
    on_error: str,
    duplicates: bool,
    options: dict[str, Any],
) -> Bunch:
    """What both readers give."""
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error={on_error!r} must be "raise" or "skip".')
    skipped: list[tuple[str, str]] = []
    if on_error == "skip":
        broken = broken_files(paths, **{k: v for k, v in options.items() if k != "cache"})
        skipped = [(paths[k], why) for k, why in broken.items()]
        kept = np.array([k for k in range(len(paths)) if k not in broken], dtype=int)
        if not len(kept):
            raise ValueError(f"None of {len(paths)} files can be read: {skipped[0][1]}")
        if skipped:
            warnings.warn(
                f"{len(skipped)} of {len(paths)} files are left out: "
                f"{_listed([why for _, why in skipped], '; ')}",
                stacklevel=3,
            )
        paths = [paths[k] for k in kept]
        labels = None if labels is None else labels[kept]
        groups = None if groups is None else groups[kept]
        table = None if table is None else table.iloc[kept]
    images = ImageFiles(paths, **options)
    sizes = zip(images.paths, images.sizes, strict=True)
    if tiny := dict.fromkeys(f"{path!r} {size}" for path, size in sizes if min(size[-2:]) < _TINY):
        warnings.warn(
            f"{len(tiny)} of {len(paths)} files are smaller than {_TINY} pixels: "
            f"{_listed(list(tiny))}.",
            stacklevel=3,
        )
    same = _duplicates(paths) if duplicates else []
    _warn_of_duplicates(same, paths, labels, groups)
    if options.get("frames") == "each":  # what belongs to a file belongs to its slices
        groups = np.array(paths) if groups is None else groups
        labels = None if labels is None else labels[images.files]
        groups = groups[images.files]
        table = None if table is None else table.iloc[images.files]
        same = [np.searchsorted(images.files, files).tolist() for files in same]
    return Bunch(
        images=images, labels=labels, groups=groups, table=table, duplicates=same, skipped=skipped
    )


def _duplicates(paths: Sequence[str]) -> list[list[int]]:
    """Rows whose files have the same content, in lists."""
    by_size = defaultdict(list)
    for row, path in enumerate(paths):
        by_size[Path(path).stat().st_size].append(row)
    rows = [row for several in by_size.values() if len(several) > 1 for row in several]

    def digest(row: int) -> bytes:
        found = hashlib.blake2b(digest_size=16)
        with Path(paths[row]).open("rb") as file:
            while block := file.read(2**20):
                found.update(block)
        return found.digest()

    by_content = defaultdict(list)
    with ThreadPoolExecutor() as pool:
        for row, found in zip(rows, pool.map(digest, rows), strict=True):
            by_content[found].append(row)
    return sorted(sorted(several) for several in by_content.values() if len(several) > 1)


def _warn_of_duplicates(
    same: list[list[int]],
    paths: Sequence[str],
    labels: np.ndarray | None,
    groups: np.ndarray | None,
) -> None:
    for what, values in (("labels", labels), ("patients", groups)):
        odd = [rows for rows in same if values is not None and len(set(values[rows])) > 1]
        if odd and values is not None:
            told = [
                " = ".join(f"{paths[row]!r} ({values[row]})" for row in rows[:_SHOWN])
                for rows in odd
            ]
            warnings.warn(
                f"{len(odd)} {'picture has' if len(odd) == 1 else 'pictures have'} several {what}: "
                f"{_listed(told, '; ')}.",
                stacklevel=4,
            )
            return
    if same:
        told = [" = ".join(repr(paths[row]) for row in rows[:_SHOWN]) for rows in same]
        warnings.warn(
            f"{len(same)} {'picture occurs' if len(same) == 1 else 'pictures occur'} several "
            f"times: {_listed(told, '; ')}.",
            stacklevel=4,
        )


def _listed(entries: Sequence[str], between: str = ", ") -> str:
    """Some entries, and how many more there are."""
    more = len(entries) - _SHOWN
    return between.join(entries[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
