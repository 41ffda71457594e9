"""From images to a page: several methods on the same patients, and what the best one looked at.

Without an argument on synthetic lesions, of which the last kind is rare; else on a MedMNIST-style
``.npz`` file, or on a folder with a sub-folder for each class::

    python examples/quickstart.py
    python examples/quickstart.py my_images.npz --positive melanoma
    python examples/quickstart.py scans/ --patients "^(p[0-9]+)_"

Everything is chosen beforehand. Every image is tested once, by a network that has not seen its
patient. The page opens in any browser, without a network.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from sklearn.utils import Bunch

from sklearn_medimb import CSSNClassifier, MetricTwoStageClassifier, SoftmaxClassifier
from sklearn_medimb.comparison import compare_methods
from sklearn_medimb.datasets import from_folder, load_npz, make_lesions
from sklearn_medimb.report import report


def read(args: argparse.Namespace) -> Bunch:
    """Images, labels and patients."""
    if args.data is None:
        data = make_lesions(
            [150, 70, 30, 14], image_size=32, difficulty=0.0, images_per_patient=2, random_state=0
        )
        return Bunch(**data, labels=np.array(data.target_names)[data.target])
    if args.data.is_dir():
        return from_folder(args.data, groups=args.patients, image_size=args.image_size)
    data = load_npz(args.data)
    sides = data.images.shape[1:-1] if data.images.shape[-1] in (1, 3, 4) else data.images.shape[1:]
    if min(sides) > args.image_size:
        data = load_npz(args.data, image_size=args.image_size)
    return Bunch(**data, labels=data.target_names[data.target])


def main() -> None:
    """Compare, print, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path, help=".npz file or folder; default: lesions")
    parser.add_argument("--patients", help="regular expression: the patient in a file's name")
    parser.add_argument("--positive", help="the disease; default: the rarest class")
    parser.add_argument("--prevalence", type=float, help="its share where it is to be used")
    parser.add_argument("--image-size", type=int, default=48, help="pixels a side at most")
    parser.add_argument("--max-images", type=int, default=400)
    parser.add_argument("--page", type=Path, default=Path("quickstart.html"))
    parser.add_argument("--figure", type=Path, help="also the scores alone, as a picture")
    args = parser.parse_args()

    start = time.perf_counter()
    data = read(args)
    X, y, groups = data.images, data.labels, data.groups
    if len(y) > args.max_images:
        if groups is not None:
            keep = np.random.default_rng(0).permutation(np.unique(groups))
            sizes = np.array([(groups == patient).sum() for patient in keep])
            rows = np.flatnonzero(np.isin(groups, keep[sizes.cumsum() <= args.max_images]))
            groups = groups[rows]
        else:
            rows = np.sort(np.random.default_rng(0).permutation(len(y))[: args.max_images])
        X, y = X[rows], y[rows]

    network = {"augment": "medical"}
    methods = {
        "class weights": SoftmaxClassifier(class_weight="balanced", **network),
        "logit adjustment": SoftmaxClassifier(loss="logit_adjusted", **network),
        "metric two-stage": MetricTwoStageClassifier(**network),
        "CSSN": CSSNClassifier(**network),
    }
    found = compare_methods(methods, X, y, groups=groups, cv=2, verbose=1)
    print(found)
    if args.figure:
        found.plot().figure.savefig(args.figure, dpi=120)
    page = report(
        found, X, y, groups=groups, method="CSSN", positive=args.positive,
        prevalence=args.prevalence, min_sensitivity=0.6, title="Four methods compared",
    )  # fmt: skip
    print(
        f"\n{page.save(args.page)} after {time.perf_counter() - start:.0f} s: open it in a browser"
    )


if __name__ == "__main__":
    main()
