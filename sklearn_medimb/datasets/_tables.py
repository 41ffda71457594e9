"""Tables of images: reading them, and their columns."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from sklearn_medimb._data.rows import missing_entries

_SEPARATORS = ",;\t|"


def read_table(table: Any) -> Any:
    """Give a DataFrame, or read one from a text file; entries of a file stay as they are written.

    The separator is the one that the header has most of: comma, semicolon, tab or bar.

    Raises
    ------
    ValueError
        If the file is no text, or has no rows.
    """
    if hasattr(table, "iloc") and hasattr(table, "columns"):
        if not len(table):
            raise ValueError("table holds no rows.")
        return table
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError("Tables of files need the package pandas: pip install pandas.") from error
    path = Path(table)
    content = path.read_bytes()
    if content[:4] in (b"PK\x03\x04", b"\xd0\xcf\x11\xe0"):
        raise ValueError(
            f"{str(path)!r} is a workbook: save the sheet as CSV (UTF-8), or pass what "
            "pandas.read_excel makes of it."
        )
    is_wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        text = content.decode("utf-16" if is_wide else "utf-8-sig")
    except UnicodeError as error:
        raise ValueError(f"{str(path)!r} is no text in UTF-8: save it as CSV (UTF-8).") from error
    first = re.sub('"[^"]*"', "", text.partition("\n")[0])
    separator = max(_SEPARATORS, key=first.count)
    try:
        header, *rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as a table: {error}.") from error
    header = [name.strip() for name in header]
    numbered = {k: row for k, row in enumerate(rows, start=2) if any(map(str.strip, row))}
    for number, row in numbered.items():
        if any(map(str.strip, row[len(header) :])):
            raise ValueError(
                f"{str(path)!r} has {len(row)} entries in row {number}, but {len(header)} columns."
            )
    if not numbered:
        raise ValueError(f"{str(path)!r} holds no rows below its header.")
    filled = [(row + [""] * len(header))[: len(header)] for row in numbered.values()]
    return pd.DataFrame(filled, columns=header, index=list(numbered))


def row_numbers(table: Any, given: Any) -> list[int]:
    """Rows as a spreadsheet counts them: the header is row 1."""
    return list(table.index) if table is not given else list(range(2, len(table) + 2))


def column(table: Any, name: str, what: str, numbers: Sequence[int]) -> list[Any]:
    """Entries of a column.

    Raises
    ------
    ValueError
        If there is no such column, or several, or an entry says nothing.
    """
    columns = list(table.columns)
    if columns.count(name) != 1:
        how_often = "no column" if name not in columns else "several columns"
        raise ValueError(f"{what}={name!r}: the table has {how_often} {name!r} among {columns}.")
    values = table[name]
    entries = [entry.strip() if isinstance(entry, str) else entry for entry in values.tolist()]
    said = {"", "nan", "<na>", "nat"} | ({"none"} if what == "group" else set())
    blank = [isinstance(entry, str) and entry.lower() in said for entry in entries]
    missing = np.flatnonzero(missing_entries(values) | np.array(blank))
    if len(missing):
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{what}={name!r}: the column says nothing in row {numbers[missing[0]]}{others} (the "
            "header is row 1)."
        )
    return entries


def as_labels(entries: list[Any], *, from_file: bool) -> np.ndarray:
    """Labels as an array; texts of whole numbers become numbers where a file has no others."""
    if all(isinstance(entry, str) for entry in entries):
        whole = from_file and all(re.fullmatch(r"-?(0|[1-9]\d{0,8})", entry) for entry in entries)
        return np.array(entries, dtype=int if whole else str)
    kinds = {type(entry) for entry in entries}
    if str in kinds:
        raise ValueError(f"label: the column mixes texts and {kinds - {str}}: write all as texts.")
    return np.array(entries)


def patient_ids(entries: Sequence[Any], places: Sequence[str]) -> np.ndarray:
    """Patients as texts: 12, 12.0, "12", "12.0" and " 12 " are one; "012" is another.

    Parameters
    ----------
    entries : sequence
        Numbers, texts or dates.
    places : sequence of str
        What errors call each of them.

    Raises
    ------
    ValueError
        If one says nothing, or is a number that is not whole.
    """
    missing = missing_entries(np.array([*entries, None], dtype=object), texts=True)[:-1]
    if missing.any():
        raise ValueError(
            f"{places[int(missing.argmax())]} has no patient: give each unknown one of its own."
        )
    ids = []
    for entry, place in zip(entries, places, strict=True):
        if isinstance(entry, Real) and not isinstance(entry, (bool, np.bool_)):
            if not float(entry).is_integer():
                raise ValueError(f"{place} has patient {entry}, which is no whole number.")
            ids.append(f"{entry:.0f}")
            continue
        text = str(entry).strip()
        ids.append(re.sub(r"^(\d+)\.0+$", r"\1", text))
    return np.array(ids, dtype=str)
