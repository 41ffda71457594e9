"""SPMix in the network on real medical images, against what else balances classes.

    python benchmarks/spmix_real.py FOLDER [--seeds 0 1 2] [--jobs 2] [--validate]

FOLDER holds ``ph2_dermoscopy.npz`` (melanoma against the rest), ``wbc_two_sites.npz``,
``herlev_papsmear.npz`` and ``dr_maculopathy.npz`` (grades). Images of 32 pixels; a quarter is the
test fold, drawn by the seed, patients whole. All rows share backbone, augmentation, optimiser,
batch size and number of steps; their seconds are printed beside the scores. ``--validate`` scores
settings of SPMix on validation rows of the training part instead.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold

from sklearn_medimb import SoftmaxClassifier, SPMixClassifier
from sklearn_medimb.datasets import load_npz

SETS = ("ph2_dermoscopy", "wbc_two_sites", "herlev_papsmear", "dr_maculopathy")
METHODS: dict[str, Callable[..., Any]] = {
    "class-balanced sampling": lambda **p: SPMixClassifier(mix_prob=0.0, **p),
    "mixup": lambda **p: SoftmaxClassifier(mixup="mixup", **p),
    "balanced mixup": lambda **p: SoftmaxClassifier(mixup="balanced", **p),
    "logit adjustment": lambda **p: SoftmaxClassifier(loss="logit_adjusted", **p),
    "SPMix": SPMixClassifier,
    "SPMix, images": lambda **p: SPMixClassifier(level="image", **p),
    "SPMix, published pairing": lambda **p: SPMixClassifier(
        pairing="code", loss="balanced_softmax", **p
    ),
    "SPMix + GPaCo": lambda **p: SPMixClassifier(contrast="gpaco", **p),
}
SETTINGS: dict[str, Callable[..., Any]] = {
    "class-balanced sampling": METHODS["class-balanced sampling"],
    **{
        f"layer {layer}": lambda layer=layer, **p: SPMixClassifier(mix_layer=layer, **p)
        for layer in "0123"
    },
    "floor 0": lambda **p: SPMixClassifier(floor=0.0, **p),
    "floor .7": lambda **p: SPMixClassifier(floor=0.7, **p),
    "cap .7": lambda **p: SPMixClassifier(cap=0.7, **p),
    "cap .95": lambda **p: SPMixClassifier(cap=0.95, **p),
    "mix_prob 1": lambda **p: SPMixClassifier(mix_prob=1.0, **p),
}


def load(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, classes and patients."""
    data = load_npz(folder / f"{name}.npz", image_size=32)
    y = data.target
    if name == "ph2_dermoscopy":
        y = (y == 2).astype(int)
    if name == "dr_maculopathy":
        with np.load(folder / f"{name}.npz", allow_pickle=False) as archive:
            y = archive["grade"].astype(int)
    return data.images, y, np.arange(len(y)) if data.groups is None else data.groups


def run(folder: Path, name: str, seed: int, method: str, validate: bool) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    X, y, groups = load(folder, name)

    def parts(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        folds = StratifiedGroupKFold(4, shuffle=True, random_state=seed)
        a, b = next(folds.split(rows, y[rows], groups[rows]))
        return rows[a], rows[b]

    train, test = parts(np.arange(len(y)))
    if validate:
        train, test = parts(train)
    n_steps = 180 + 60 * len(np.unique(y))
    epochs = -(-n_steps // -(-len(train) // 64))
    make = (SETTINGS if validate else METHODS)[method]
    start = time.perf_counter()
    fitted = make(max_epochs=epochs, random_state=seed).fit(X[train], y[train])
    seconds = time.perf_counter() - start
    score = balanced_accuracy_score(y[test], fitted.predict(X[test]))
    return {"set": name, "seed": seed, "method": method, "score": score, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("spmix_real.jsonl"))
    args = parser.parse_args()
    methods = args.methods or list(SETTINGS if args.validate else METHODS)

    lines = args.out.read_text().splitlines() if args.out.exists() else []
    key = ("set", "seed", "method")
    done = {tuple(row[k] for k in key): row for row in map(json.loads, lines)}
    wanted = [(name, seed, m) for seed in args.seeds for name in args.sets for m in methods]
    tasks = (
        delayed(run)(args.folder, *job, validate=args.validate) for job in wanted if job not in done
    )
    for row in Parallel(args.jobs, return_as="generator_unordered")(tasks):
        done[tuple(row[k] for k in key)] = row
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(*row.values(), flush=True)

    table: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    seconds: dict[str, list[float]] = defaultdict(list)
    for job in wanted:
        table[job[2]][job[0]].append(done[job]["score"])
        seconds[job[2]].append(done[job]["seconds"])
    print("\n" + " " * 26 + "".join(f"{name:>18}" for name in (*args.sets, "mean", "s per fit")))
    for method, sets in table.items():
        cells = [f"{np.mean(v):.3f} +- {np.std(v):.3f}" for v in sets.values()]
        cells.append(f"{np.mean([np.mean(v) for v in sets.values()]):.3f}")
        cells.append(f"{np.mean(seconds[method]):.0f}")
        print(f"{method:26}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    main()
