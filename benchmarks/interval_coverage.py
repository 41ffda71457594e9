"""Coverage and width of the intervals of `metrics`, by simulated studies.

    python benchmarks/interval_coverage.py --studies 500

Each study draws new samples from a known population: predictions of a rare class that are right
with probability p, singly or in patients of two to four images whose outcomes are correlated.
Printed are coverage and mean width, for a recall beside those of Wilson's interval, which is exact
about single samples and knows nothing of patients. Few positives can only give few intervals, so
that no method covers 95 % at every p: the mean over p is what to look at.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
from scipy import stats

from sklearn_medimb.metrics import Interval, metric_interval, paired_difference

RATES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
Study = tuple[Interval, float]


def recall(y: np.ndarray, p: np.ndarray) -> float:
    return float((p[y == 1] == 1).mean())


def balanced_accuracy(y: np.ndarray, p: np.ndarray) -> float:
    return float(((p[y == 1] == 1).mean() + (p[y == 0] == 0).mean()) / 2)


def macro_f1(y: np.ndarray, p: np.ndarray) -> float:
    table = np.bincount(2 * y + p, minlength=4).reshape(2, 2)
    return float(np.mean(2 * np.diag(table) / np.maximum(table.sum(0) + table.sum(1), 1)))


def auc(y: np.ndarray, s: np.ndarray) -> float:
    n = np.bincount(y, minlength=2)
    ranks = stats.rankdata(s)[y == 1].sum()
    return float((ranks - n[1] * (n[1] + 1) / 2) / (n[0] * n[1]))


def patients(rng: np.random.Generator, n: int) -> np.ndarray:
    """Patient of each of n images: two to four of each, the last may have fewer."""
    return np.repeat(np.arange(n), rng.integers(2, 5, n))[:n]


def right(rng: np.random.Generator, p: float, groups: np.ndarray, icc: float) -> np.ndarray:
    """Which images are found: with probability p, and this correlation within a patient."""
    if not icc:
        return rng.random(len(groups)) < p
    scale = (1 - icc) / icc
    skill = rng.beta(p * scale, (1 - p) * scale, groups.max() + 1)
    return rng.random(len(groups)) < skill[groups]


@cache
def interval_of_recall(sizes: tuple[int, ...], hits: tuple[int, ...]) -> Interval:
    """Interval of positives in patients of these sizes, beside ten negatives of ten patients."""
    groups = np.repeat(np.arange(len(sizes) + 10), [*sizes, *[1] * 10])
    y = np.repeat([1, 0], [sum(sizes), 10])
    found = [np.arange(size) < hit for size, hit in zip(sizes, hits, strict=True)]
    p = np.concatenate([*found, np.zeros(10)]).astype(int)
    single = max(sizes) == 1
    return metric_interval(recall, y, p, groups=None if single else groups)


def recalls(rng: np.random.Generator, n: int, p: float, icc: float) -> Study:
    groups = patients(rng, n) if icc else np.arange(n)
    hit = right(rng, p, groups, icc)
    sizes, hits = np.bincount(groups), np.bincount(groups, hit).astype(int)
    order = np.lexsort([hits, sizes])
    return interval_of_recall(tuple(sizes[order].tolist()), tuple(hits[order].tolist())), p


def two_classes(
    metric: Callable[..., float], rng: np.random.Generator, n: int, p: float, icc: float
) -> Study:
    """N of a rare class beside 100 of a common one, of which .9 are right."""
    n_common = 100
    rare, common = (patients(rng, k) if icc else np.arange(k) for k in (n, n_common))
    groups = np.concatenate([rare, common + n])
    y = np.repeat([1, 0], [n, n_common])
    hit = np.concatenate([right(rng, p, rare, icc), right(rng, 0.9, common, icc)])
    if metric is macro_f1:
        tp, fp = n * p, n_common * 0.1
        truth = 2 * tp / (n + tp + fp), 2 * 0.9 * n_common / (1.9 * n_common + n - tp)
    else:
        truth = p, 0.9
    interval = metric_interval(metric, y, np.where(hit, y, 1 - y), groups=groups if icc else None)
    return interval, float(np.mean(truth))


def aucs(rng: np.random.Generator, n: int, p: float, icc: float) -> Study:
    """Normal scores whose area is p; patients share a part of theirs."""
    rare, common = (patients(rng, k) if icc else np.arange(k) for k in (n, 100))
    groups, y = np.concatenate([rare, common + n]), np.repeat([1, 0], [n, 100])
    shared, own = rng.normal(size=(2, n + 100))
    score = np.sqrt(2) * stats.norm.ppf(p) * y
    score += np.sqrt(icc) * shared[groups] + np.sqrt(1 - icc) * own
    return metric_interval(auc, y, score, groups=groups if icc else None), p


def differences(rng: np.random.Generator, n: int, p: float, icc: float) -> Study:
    """Two models of recalls p and .8 p that mostly find the same images of the same patients."""
    groups = patients(rng, n) if icc else np.arange(n)
    a = right(rng, p, groups, icc)
    b = a & right(rng, 0.8, groups, icc)
    y = np.ones(n + 1, dtype=int)
    y[n] = 0
    a, b = (np.append(one, False).astype(int) for one in (a, b))
    groups = np.append(groups, n)
    return paired_difference(recall, y, a, b, groups=groups if icc else None), 0.2 * p


def balanced(*args: Any) -> Study:
    return two_classes(balanced_accuracy, *args)


def macro(*args: Any) -> Study:
    return two_classes(macro_f1, *args)


MEASURES: dict[str, tuple[Callable[..., Study], tuple[int, ...]]] = {
    "recall": (recalls, (5, 10, 20, 50)),
    "balanced accuracy": (balanced, (5, 10)),
    "macro F1": (macro, (5, 10)),
    "ROC AUC": (aucs, (5, 10, 50)),
    "paired difference of recalls": (differences, (10, 20, 50)),
}


def simulate(
    measure: str, n_studies: int, seed: int = 0
) -> Iterator[tuple[int, float, list[tuple[float, float]]]]:
    """For each number of positives and correlation, coverage and mean width at each rate."""
    study, sizes = MEASURES[measure]
    for n in sizes:
        for icc in (0.0, 0.3, 0.6):
            cells = []
            for p in RATES:
                rng = np.random.default_rng([seed, n, round(100 * icc), round(100 * p)])
                drawn = [study(rng, n, p, icc) for _ in range(n_studies)]
                covered = [one.low - 1e-4 <= truth <= one.high + 1e-4 for one, truth in drawn]
                widths = [one.high - one.low for one, _ in drawn]
                cells.append((float(np.mean(covered)), float(np.mean(widths))))
            yield n, icc, cells


def wilson(n: int) -> list[tuple[float, float]]:
    """Exact coverage and mean width of Wilson's interval at each rate, of single samples."""
    hits = np.arange(n + 1)
    ends = np.array([stats.binomtest(k, n).proportion_ci(method="wilson") for k in hits])
    cells = []
    for p in RATES:
        chance = stats.binom.pmf(hits, n, p)
        covered = (ends[:, 0] <= p) & (p <= ends[:, 1])
        cells.append((float(chance @ covered), float(chance @ np.ptp(ends, axis=1))))
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--studies", type=int, default=500)
    parser.add_argument("--measures", nargs="+", default=list(MEASURES), choices=list(MEASURES))
    args = parser.parse_args()

    def row(name: str, cells: list[tuple[float, float]]) -> None:
        shown = " | ".join(f"{covered:.3f} {width:.2f}" for covered, width in cells)
        print(f"| {name} | {np.mean(cells, axis=0)[0]:.3f} | {shown} |", flush=True)

    for measure in args.measures:
        print(f"\n| {measure} | mean | {' | '.join(f'p = {p}' for p in RATES)} |")
        print("|--" * (len(RATES) + 2) + "|")
        for n, icc, cells in simulate(measure, args.studies):
            if measure == "recall" and not icc:
                row(f"{n} positives, Wilson", wilson(n))
            row(f"{n} positives, correlation {icc}" if icc else f"{n} positives", cells)


if __name__ == "__main__":
    main()
