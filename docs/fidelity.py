"""Write the tables of `fidelity.md` from `fidelity.csv`: ``python docs/fidelity.py``."""

from __future__ import annotations

import csv
import re
from pathlib import Path

HERE = Path(__file__).parent


def rows() -> list[dict[str, str]]:
    """Rows of the file."""
    with (HERE / "fidelity.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def with_tables(page: str, rows: list[dict[str, str]]) -> str:
    """Fill in the page's tables, one for each paper."""
    pattern = re.compile(r"(<!-- rows of (.+?) -->\n\n).*?(<!-- end -->)", re.S)
    return pattern.sub(lambda m: m[1] + table(m[2], rows) + "\n\n" + m[3], page)


def table(paper: str, rows: list[dict[str, str]]) -> str:
    """Rows of a paper in Markdown."""
    lines = ["| element | source | here | what differs, and why |", "|--|--|--|--|"]
    for row in rows:
        if row["paper"] == paper:
            cells = row["element"], row["source"], here(row), row["deviation"]
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines)


def here(row: dict[str, str]) -> str:
    """What is ours, the setting, and what is tested, as sentences."""
    names = ", ".join(f"`{place.split('::')[1]}`" for place in parts(row["ours"]))
    settings = [setting.partition("): ") for setting in parts(row["setting"])]
    chosen = "; ".join(f"`{a})` ({b})" if b else f"`{a}`" for a, _, b in settings)
    tests = "; ".join(sentence(test) for test in parts(row["test"]))
    return ". ".join(filter(None, [names, chosen, tests and f"Tested: {tests}"]))


def sentence(test: str) -> str:
    """Name of a test as the sentence that it is."""
    if "test_presets.py" in test:
        return "settings of the preset"
    return test.rpartition("::test_")[2].replace("_", " ")


def parts(cell: str) -> list[str]:
    """Entries of a cell that may hold several."""
    return [part for part in cell.split("; ") if part]


if __name__ == "__main__":
    page = HERE / "fidelity.md"
    page.write_text(with_tables(page.read_text(encoding="utf-8"), rows()), encoding="utf-8")
