"""The chapter on what each method's own idea adds."""

from __future__ import annotations

from report_rows import LEVEL, Chapter
from report_words import (
    INTERVALS,
    SHOWN,
    as_line,
    compared,
    counted,
    footer,
    interval,
    signed,
    states,
)

TITLE = "## What each method's own idea adds"
HEAD = ("a method", "less what is left of it", "sets", "difference", "interval", "by")
MORE = ("p (Holm)", "by sets", "confirming sets", "shown")


def of_ideas(found: list[Chapter]) -> list[str]:
    """Each method against what is left of it without its idea, in all regimes."""
    found = [chapter for chapter in found if chapter.ideas]
    if not found:
        return []
    head = ["", *HEAD, *MORE]
    table, told = [as_line(head), "|--" * len(head) + "|"], []
    for chapter in found:
        adjusted = chapter.adjusted(chapter.ideas)
        for pair, rows in chapter.ideas.items():
            of, _ = chapter.effect(*pair)
            if of is None:
                continue
            sets = len({row["data"] for row in rows})
            table.append(
                as_line([chapter.title, *pair, f"{sets}", *compared(chapter, pair, adjusted)])
            )
            is_behind = of.mean < 0 and adjusted[pair] < LEVEL
            told.append((chapter, pair, chapter.is_shown(*pair, adjusted), is_behind))
    lines = [
        TITLE,
        "",
        _said(told),
        "",
        "A method less what is left of it without its own idea, everything else being the same, on "
        "the training sets, seeds and test images of both. Of two classes CSSN has no auxiliary "
        "classifier: it is read on sets of more. What was to be compared was written down before "
        "the runs (`benchmarks/registration.md`).",
        "",
        *table,
        "",
        f"{INTERVALS} p is of the first, by Holm over the pairs of a regime; {SHOWN}",
    ]
    for chapter in (chapter for chapter in found if not chapter.is_ranked):
        lines += [*states(chapter), "", f"{chapter.title}, ideas: {footer(chapter)}"]
    return lines


def _said(told: list[tuple[Chapter, tuple[str, str], bool, bool]]) -> str:
    """What is shown, of which methods nothing is, and what is behind."""
    methods = {pair[0] for _, pair, _, _ in told}
    gains, losses = (
        [_gain(chapter, pair) for chapter, pair, *is_so in told if is_so[k]] for k in (0, 1)
    )
    shown = {pair[0] for _, pair, is_shown, _ in told if is_shown}
    rest = ", ".join(sorted(methods - shown))
    pairs = counted(told, "pair")
    if not gains:
        text = f"**No own idea is shown to add anything:** none of {pairs}, of {rest}."
    else:
        text = (
            f"**Shown to add:** {'; '.join(gains)}. These are {len(gains)} of {pairs}, of "
            f"{len(shown)} of {counted(methods, 'method')}."
        )
        text += f" Of {rest} no idea is shown to add anything." if rest else ""
    if losses:
        text += f" Behind what is left of it, p < {LEVEL}: {'; '.join(losses)}."
    return text


def _gain(chapter: Chapter, pair: tuple[str, str]) -> str:
    of, how = chapter.effect(*pair)
    where = chapter.title[0].lower() + chapter.title[1:]
    return f"{pair[0]} against {pair[1]} {where} {signed(of.mean)} {interval(of)}, by {how}"
