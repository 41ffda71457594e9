"""Turn results.csv of compare.py into a page and figures.

    python benchmarks/report.py benchmarks/results.csv [--folder FOLDER] [--out benchmarks]
        [--inner]

Writes ``RESULTS.md`` and ``figures/*.png`` beside it: a chapter for each regime, start and kind of
hardware that the table has test rows of, since ranks and seconds of two kinds are not put together,
and one each on curves and on what ideas add. Where the predictions of a run lie beside the table,
in ``jobs`` or, where FOLDER has the images, in ``predictions.csv``, differences by patients come
from them and are kept in ``differences.csv``, from which they are read where there are none. The
same table gives the same page.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import compare
import differences
import numpy as np
from contestants import ABLATIONS
from differences import Effect
from report_curves import courses, of_curves
from report_figures import curves_figure, rank_figure, ratio_figure, time_figure
from report_ideas import of_ideas
from report_rows import (
    AFTERNOON,
    BASELINE,
    MEASURES,
    PAPERS,
    PLAIN,
    RELATIVES,
    Chapter,
    Table,
    cell_of,
    chapters,
    critical_difference,
    gather,
    means,
    of_collections,
    ranks,
    read,
)
from report_words import (
    INTERVALS,
    SHOWN,
    as_line,
    compared,
    counted,
    footer,
    interval,
    short,
    signed,
    spelt,
    spread,
    states,
)

LEAST, BEST = 0.01, 0.02  # defaults are to lose no more to it, and the best to gain that much
BELOW = 0.02  # what is said to be below the better baseline of a set
ROWS = (
    "Rows: all networks have one backbone, augmentation, optimiser and number of steps. cRT is "
    '`MetricTwoStageClassifier(metric_weight=0, rebalance="crt")`, metric two-stage and LMD the '
    "defaults of `MetricTwoStageClassifier` and `LMDClassifier`, CSSN that of `CSSNClassifier`; "
    "virtual features is `SoftmaxClassifier`, `StandardScaler`, `BalancedVirtualFeatures` and "
    "`LogisticRegression` in a pipeline; SPMix is `SPMixClassifier`, SPMix sampler "
    "`SoftmaxClassifier(sampler=SPMixSampler())`; AMIMV is `AMIMVClassifier`, whose encoder never "
    "sees a label and stays frozen under a balanced linear head. "
    "Balanced softmax and logit adjustment of strength 1 are the same loss under two names."
)
# ---------------------------------------------------------------- page


def page(found: list[Chapter]) -> str:
    """All chapters, after what a user takes from them."""
    lines, ranked = ["# Results", ""], [chapter for chapter in found if chapter.is_ranked]
    for chapter in ranked:
        lines += [advice(chapter), ""]
    for chapter in ranked:
        make = from_scratch if chapter.regime == "scratch" else of_start
        make = of_defaults if chapter.is_defaults else make
        first, *more = make(chapter)
        lines += [f"## {chapter.title}", "", first, *states(chapter), *more, ""]
    for made in (of_curves(found), of_ideas(found)):
        lines += [*made, ""] if made else []
    lines += [
        "## Rerun",
        "",
        "`python benchmarks/compare.py FOLDER --regime frozen --suite core --out results --jobs 2` "
        "(or `pretrained`, or `scratch`), then `python benchmarks/report.py results/results.csv`. "
        "Rows of different kinds of hardware are never ranked together: each has its chapter.",
    ]
    return "\n".join(lines) + "\n"


def advice(chapter: Chapter) -> str:
    """What to take, what it gains and costs, and where it does not help."""
    rows, cells = chapter.rows, sorted({cell_of(row) for row in chapter.rows})
    table = gather(rows, "balanced_accuracy")
    order = ranks(of_collections(rows))
    whole = [name for name in sorted(order, key=order.get) if name not in ABLATIONS]
    clock, unit = chapter.clock
    best, seconds = whole[0], means(gather(rows, clock), cells)
    baselines = [name for name in chapter.references if name in order]
    others = [name for name in baselines if name != best]
    cost = f"{np.median(seconds[best]):.0f} {unit} to fit"
    if others:
        more = ", ".join(f"{name} {np.median(seconds[name]):.0f} s" for name in others)
        cost += f" ({more})"
    n_sets, of_suite = len({data for data, _ in cells}), compare.SUITES[chapter.key].data or ()
    effects = {name: chapter.effect(best, name) for name in others}
    ahead = [name for name, (of, _) in effects.items() if of and of.mean < 0]
    taken, first = f"take {' or '.join([best, *ahead])}", f"{best} is" if ahead else "it is"
    if n_sets < len(of_suite):
        taken, first = f"{n_sets} of {len(of_suite)} sets so far, no advice yet", f"{best} is"
    text = (
        f"**{chapter.title}: {taken}.** Of {len(order)} contestants {first} first by mean rank "
        f"({order[best]:.1f}; mean balanced accuracy {_mean(table, cells, best):.3f}), {cost}."
    )
    if effects:
        gains = [f"over {name} {_worded(*found)}" for name, found in effects.items()]
        text += f" Its gain {'; '.join(gains)}"
        text += " (intervals of 95 %; of the first of many a gain is flattered)."
    if others:
        of = {name: differences.of_sets(rows, name) for name in (best, *others)}
        behind = [
            f"{spelt(data)} ({signed(of[best][data] - max(of[o][data] for o in others))})"
            for data in of[best]
            if of[best][data] < max(of[o][data] for o in others) - BELOW
        ]
        what = "the better of these" if len(others) > 1 else others[0]
        text += (
            f" It is more than {short(BELOW)} below {what} on {', '.join(behind)}."
            if behind
            else f" On no set is it more than {short(BELOW)} below {what}."
        )
    return text + _who_gains(chapter, others or baselines)


def _who_gains(chapter: Chapter, others: list[str]) -> str:
    """Which methods of the papers are shown to be ahead of a baseline; the rest are not."""
    text = ""
    papers = [name for name in PAPERS if name in chapter.contestants]
    for other in others if chapter.regime != "scratch" else []:
        adjusted = chapter.adjusted([(name, other) for name in papers])
        shown = [name for name, _ in adjusted if chapter.is_shown(name, other, adjusted)]
        rest = [name for name in papers if name not in shown]
        if shown:
            text += f" Shown to be ahead of {other}: {', '.join(shown)}"
            text += f"; not shown: {', '.join(rest)}." if rest else "."
        elif rest:
            text += f" None of {', '.join(rest)} is shown to be ahead of {other}."
    return text


def of_start(chapter: Chapter) -> list[str]:
    """Chapter on networks that began with a known start."""
    rows, cells = chapter.rows, sorted({cell_of(row) for row in chapter.rows})
    table = gather(rows, "balanced_accuracy")
    order = ranks(of_collections(rows))
    names, row = sorted(order, key=order.get), rows[0]
    n_train = sorted(int(r["n_train"]) for r in rows)
    lines = [
        f"{counted(names, 'contestant')} on {counted({data for data, _ in cells}, 'set')}, "
        f"{counted({r['seed'] for r in rows}, 'fold')} with patients whole, {n_train[0]} to "
        f"{n_train[-1]} training images of {row['image_size']:.0f} pixels; the start is "
        f"{row['start']}; {row['hardware']}. What was to be compared was written down "
        "before the runs (`benchmarks/registration.md`).",
        "",
    ]
    if chapter.left_out:
        lines += [f"Not run on enough of them: {', '.join(chapter.left_out)}.", ""]
    for kind, title in (("ranks", "Mean ranks"), ("time", "Accuracy and time")):
        lines += [f"![{title}](figures/{kind}-{chapter.name}.png)", ""]
    lines += [*_summary(rows, names, order, cells, chapter), ""]
    lines += _compared(chapter, names)
    lines += ["### Balanced accuracy, each set", "", SPREAD, "", *_by_set(table, cells, names)]
    return [*lines, "", footer(chapter)]


def _compared(chapter: Chapter, names: list[str]) -> list[str]:
    """Tables of differences to each baseline."""
    has, lines = set(chapter.contestants), []
    head = ["", "difference", "interval", "by", "p (Holm)", "by sets", "confirming sets", "shown"]
    for other in (name for name in chapter.references if name in has):
        pairs = [(name, other) for name in names if name != other]
        pairs = [pair for pair in pairs if chapter.effect(*pair)[0]]
        adjusted = chapter.adjusted(pair for pair in pairs if pair[0] in PAPERS)
        lines += [f"### Against {other}", "", as_line(head), "|--" * len(head) + "|"]
        lines += [as_line([pair[0], *compared(chapter, pair, adjusted)]) for pair in pairs]
        lines.append("")
    last = f"{INTERVALS} p is of the first, by Holm over the methods of the papers; {SHOWN}"
    return [*lines, last, ""]


def _by_set(table: Table, cells: list[tuple[str, str]], names: list[str]) -> list[str]:
    """Contestants by sets."""
    heads = [spelt(data) + ("" if cut == "natural" else f" {cut}") for data, cut in cells]
    lines = [as_line(["method", *heads]), "|--" * (len(heads) + 1) + "|"]
    best = {cell: max(np.mean(table[name][cell]) for name in names) for cell in cells}
    for name in names:
        texts = [spread(table[name][cell]) for cell in cells]
        top = [np.mean(table[name][cell]) == best[cell] for cell in cells]
        texts = [f"**{text}**" if is_top else text for text, is_top in zip(texts, top, strict=True)]
        lines.append(as_line([name, *texts]))
    return lines


def _mean(table: Table, cells: list[tuple[str, str]], name: str) -> float:
    return float(np.mean([np.mean(table[name][cell]) for cell in cells]))


def _worded(of: Effect | None, how: str) -> str:
    return "an unknown amount" if of is None else f"{signed(of.mean)} {interval(of)}, by {how}"


SPREAD = (
    "Mean ± standard deviation over seeds, where there are several; the best of a column is bold."
)


def from_scratch(chapter: Chapter) -> list[str]:
    """Chapter on networks that saw no image before."""
    rows = chapter.rows
    table = gather(rows, "balanced_accuracy")
    cells = sorted({cell_of(row) for row in rows})
    scores = of_collections(rows)
    order = ranks(scores)
    sets = sorted({data for data, _ in cells})
    distance = critical_difference(len(order), len(sets))
    names = sorted(order, key=order.get)
    best = names[0]
    alike = [name for name in names if order[name] - order[best] < distance]
    seeds = sorted({int(row["seed"]) for row in rows})
    small = [c for c in cells if 2 < _ratio(rows, c) < 12 and _classes(rows, c) == 2]
    plural = "s" if len(seeds) > 1 else ""
    lines = [
        f"{len(names)} methods on {len(cells)} training sets ({len(sets)} collections, as they "
        f"are and cut to larger imbalance ratios), {len(seeds)} seed{plural}, images of 28 pixels "
        "(volumes: 8), at most 500 of them to train on. Cuts of a collection share images: ranks "
        "and differences are of collections, over whose cuts scores are averaged first; means of "
        "the table below are over training sets.",
        "",
        f"**What does not beat its baseline.** {_losers(scores, names)}By rank, {len(alike)} "
        f"methods cannot be told from the best ({best}) at the 5 % level.{_relatives(chapter)}",
        "",
    ]
    if small:
        chosen = means(table, small)
        top = sorted(chosen, key=lambda name: -chosen[name].mean())[:4]
        winners = ", ".join(f"{name} ({chosen[name].mean():.3f})" for name in top)
        plain = f"; cross-entropy has {chosen[PLAIN].mean():.3f}" if PLAIN in chosen else ""
        sets_used = ", ".join(f"{data.replace('_', ' ')} {cut}" for data, cut in small)
        lines += [
            "**For two classes, a few hundred images and a ratio up to 1 : 12** (here "
            f"{sets_used}) the first are {winners}{plain}. Differences of .02 are within the noise "
            "of a seed: take the first that suits you.",
            "",
        ]
    lines += [*_summary(rows, names, order, cells, chapter), "", ROWS, ""]
    for kind, title in (
        ("ranks", "Mean ranks"),
        ("time", "Accuracy and time"),
        ("ratio", "Gain and imbalance"),
    ):
        lines += [f"![{title}](figures/{kind}-{chapter.name}.png)", ""]
    lines += ["### Balanced accuracy, each training set", "", SPREAD, ""]
    return [*lines, *_details(table, cells, names), "", footer(chapter)]


def of_defaults(chapter: Chapter) -> list[str]:
    """Chapter on classifiers without an argument, beside what an afternoon gives."""
    rows, row = chapter.rows, chapter.rows[0]
    table, cells = gather(rows, "balanced_accuracy"), sorted({cell_of(row) for row in chapter.rows})
    order = ranks(of_collections(rows))
    names = sorted(order, key=order.get)
    lines = [
        f"{counted(names, 'contestant')} on {counted({data for data, _ in cells}, 'set')} as they "
        f"are, {counted({r['seed'] for r in rows}, 'seed')}, images of {row['image_size']:.0f} "
        "pixels (volumes: 16), at most 1,000 of them to train on. Classifiers have no argument but "
        f"the seed, CE and logit adjustment the loss; the {AFTERNOON} (`benchmarks/afternoon.py`) "
        "has its 40 epochs. What was asked is in `benchmarks/registration.md`.",
        "",
    ]
    if chapter.left_out:
        lines += [f"Not run on enough of them: {', '.join(chapter.left_out)}.", ""]
    if AFTERNOON in names:
        lines += [*_beside(chapter, names), ""]
    for kind, title in (("ranks", "Mean ranks"), ("time", "Accuracy and time")):
        lines += [f"![{title}](figures/{kind}-{chapter.name}.png)", ""]
    lines += ["### All measures", "", *_summary(rows, names, order, cells, chapter), ""]
    lines += ["### Balanced accuracy, each set", "", SPREAD, "", *_by_set(table, cells, names)]
    return [*lines, "", footer(chapter)]


def _beside(chapter: Chapter, names: list[str]) -> list[str]:
    """Table of differences to the afternoon's network, and of time as a multiple of its own."""
    rows, alone = chapter.rows, chapter.rows_of("confirmed")
    scores, seconds = of_collections(rows), of_collections(rows, chapter.clock[0])
    gains = {name: float((scores[name] - scores[AFTERNOON]).mean()) for name in names}
    head = ["", "balanced accuracy", "difference", "by patients", "by sets"]
    head += ["sets not chosen on", "time", f"\N{MINUS SIGN}{short(LEAST)} or more"]
    lines = [as_line(head), "|--" * len(head) + "|"]
    for name in names:
        values = [name, f"{scores[name].mean():.3f}"]
        if name != AFTERNOON:
            of_patients = chapter.effects.get((name, AFTERNOON, "all"))
            of_sets, apart = (differences.by_sets(of, name, AFTERNOON) for of in (rows, alone))
            values += [
                signed(gains[name]),
                interval(of_patients) if of_patients else "",
                interval(of_sets) if of_sets else "",
                f"{signed(apart.mean)} {interval(apart)}" if apart else "",
                f"{np.median(seconds[name] / seconds[AFTERNOON]):.2f}",
                "yes" if gains[name] >= -LEAST else "no",
            ]
        lines.append(as_line(values + [""] * (len(head) - len(values))))
    untouched = ", ".join(spelt(data) for data in sorted({row["data"] for row in alone}))
    lines += [
        "",
        f"Differences to the {AFTERNOON}, intervals of 95 %. Sets not chosen on: "
        f"{untouched or 'none'}. Time to fit as a multiple of its own, median of the sets.",
    ]
    if best := max(gains.keys() - {AFTERNOON}, key=gains.get, default=None):
        lines[-1] += f" {best} is the best, {signed(gains[best])}; asked was +{short(BEST)}."
    return lines


def _losers(scores: dict[str, np.ndarray], names: list[str]) -> str:
    """Who is below the baseline, and below plain cross-entropy, as far as these were run."""
    text = ""
    if BASELINE in scores:
        gains = {name: (scores[name] - scores[BASELINE]).mean() for name in names}
        behind = ", ".join(f"{name} ({gain:+.3f})" for name, gain in gains.items() if gain < 0)
        text = (
            f"Against {BASELINE}, the simplest remedy, mean balanced accuracy is lower for "
            f"{behind or 'none'}. "
        )
    if PLAIN in scores:
        worse = [name for name in names if (scores[name] - scores[PLAIN]).mean() < 0]
        below = f"Below plain cross-entropy: {', '.join(worse)}."
        text += f"{below if worse else 'None falls below plain cross-entropy.'} "
    return text


def _relatives(chapter: Chapter) -> str:
    """Each paper's method against its plain relative, where both are there."""
    parts = []
    for name, plain in RELATIVES.items():
        if {name, plain} <= set(chapter.contestants):
            found = differences.by_sets(chapter.rows, name, plain)
            if found is not None:
                parts.append(f"{name} {signed(found.mean)} {interval(found)} ({plain})")
    said = "; ".join(parts)
    return f" Against what they add to (by sets, 95 %, each by itself): {said}." if parts else ""


def _ratio(rows: list[dict[str, Any]], cell: tuple[str, str]) -> float:
    return next(r["imbalance_ratio"] for r in rows if cell_of(r) == cell)


def _classes(rows: list[dict[str, Any]], cell: tuple[str, str]) -> int:
    return int(next(r["n_classes"] for r in rows if cell_of(r) == cell))


def _summary(
    rows: list[dict[str, Any]],
    names: list[str],
    order: dict[str, float],
    cells: list[tuple[str, str]],
    chapter: Chapter,
) -> list[str]:
    """All measures, mean over training sets."""
    columns = {title: means(gather(rows, name), cells) for name, title in MEASURES.items()}
    clock, unit = chapter.clock
    seconds = means(gather(rows, clock), cells)
    predict = means(gather(rows, "predict_seconds"), cells)
    known = {name: chapter.effects.get((name, "", "all")) for name in names}
    intervals = ["interval"] if any(known.values()) else []
    head = ["method", "mean rank", *columns, *intervals, f"fit, median {unit}", "predict"]
    lines = [as_line(head), "|--" * len(head) + "|"]
    for name in names:
        values = [_shown(of[name]) for of in columns.values()]
        if intervals:
            of = known[name]
            values.append(f"{short(of.low)} to {short(of.high)}" if of else "")
        times = [f"{np.median(of[name]):.1f}" for of in (seconds, predict)]
        lines.append(as_line([name, f"{order[name]:.1f}", *values, *times]))
    if intervals:
        lines += ["", "The interval is of balanced accuracy, 95 %, by patients, folds pooled."]
    return lines


def _shown(values: np.ndarray) -> str:
    return f"{np.nanmean(values):.3f}" if np.isfinite(values).any() else ""


def _details(table: Table, cells: list[tuple[str, str]], names: list[str]) -> list[str]:
    """Make one table per collection: methods by cuts."""
    lines = []
    for data in sorted({data for data, _ in cells}):
        cuts = sorted((cut for d, cut in cells if d == data), key=_places)
        lines += [f"#### {spelt(data)}", "", "| method | " + " | ".join(cuts) + " |"]
        lines.append("|--" * (len(cuts) + 1) + "|")
        best = {cut: max(np.mean(table[name][data, cut]) for name in names) for cut in cuts}
        for name in names:
            texts = []
            for cut in cuts:
                text = spread(table[name][data, cut])
                bold = np.mean(table[name][data, cut]) == best[cut]
                texts.append(f"**{text}**" if bold else text)
            lines.append(f"| {name} | " + " | ".join(texts) + " |")
        lines.append("")
    return lines[:-1]


def _places(cut: str) -> int:
    """Order of cuts: as it is, then by ratio."""
    return 0 if cut == "natural" else int(cut.split(":")[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("--folder", type=Path, help="of .npz files that were tested on")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--inner", action="store_true", help="a page of inner rows instead")
    args = parser.parse_args()
    found = chapters(read(args.table), "inner" if args.inner else "test")
    if not found:
        parser.error(f"{args.table} has no rows of this part that contestants share")
    (args.out / "figures").mkdir(parents=True, exist_ok=True)
    answers = compare.remembered(args.table, str(args.folder.resolve())) if args.folder else {}
    answers |= differences.tested(args.table.parent / "jobs")
    know_effects(found, answers, args.table.parent, args.out)
    (args.out / "RESULTS.md").write_text(page(found))
    for chapter in found:
        figures(chapter, args.out / "figures")
    print(f"page: {args.out / 'RESULTS.md'}")


def know_effects(
    found: list[Chapter], answers: differences.Answers, folder: Path, out: Path
) -> None:
    """Differences by patients: of the predictions at hand, else as they were kept."""
    digests = {(of.name, *pair): text for of in found for pair, text in of.digests().items()}
    kept = differences.read(folder / "differences.csv", digests)
    for chapter in found:
        chapter.effects = {key[1:]: of for key, of in kept.items() if key[0] == chapter.name}
        chapter.know_effects(answers)
    known = {(of.name, *key): effect for of in found for key, effect in of.effects.items()}
    if known:
        differences.write(out / "differences.csv", known, digests)


def figures(chapter: Chapter, folder: Path) -> None:
    if chapter.suite == "curves":
        curves_figure(*courses(chapter), folder / f"curves-{chapter.name}.png")
    if not chapter.is_ranked:
        return
    rows, cells = chapter.rows, sorted({cell_of(row) for row in chapter.rows})
    scores = means(gather(rows, "balanced_accuracy"), cells)
    order = ranks(of_collections(rows))
    distance = critical_difference(len(order), len({data for data, _ in cells}))
    rank_figure(order, distance, folder / f"ranks-{chapter.name}.png")
    clock, unit = chapter.clock
    seconds = means(gather(rows, clock), cells)
    time_figure(scores, seconds, unit, folder / f"time-{chapter.name}.png")
    if chapter.regime == "scratch" and not chapter.is_defaults:
        ratio_figure(rows, order, folder / f"ratio-{chapter.name}.png")


if __name__ == "__main__":
    main()
