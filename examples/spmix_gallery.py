"""See what SPMixSampler makes: base, partner, saliency, shares and result.

Without an argument, on synthetic lesions; with the path of a MedMNIST-style ``.npz`` file, on its
images. The figure shows four new images of the rarest classes::

    python examples/spmix_gallery.py
    python examples/spmix_gallery.py ph2_dermoscopy.npz --polarity dark
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import matplotlib as mpl
import numpy as np

from sklearn_medimb import SaliencyMap, SPMixDisplay, SPMixSampler
from sklearn_medimb.datasets import load_npz, make_lesions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("npz", nargs="?", help="MedMNIST-style archive; default: make_lesions")
    parser.add_argument("--polarity", choices=["both", "dark", "bright"], default="both")
    parser.add_argument("--figure", type=Path, default=Path("spmix_gallery.png"))
    args = parser.parse_args()
    mpl.use("Agg")

    if args.npz:
        data = load_npz(args.npz)
    else:
        data = make_lesions([60, 25, 8], image_size=96, difficulty=0.3, random_state=0)
    y = np.asarray(data.target_names)[data.target]
    print(f"{len(y)} images: {dict(Counter(y.tolist()))}")

    sampler = SPMixSampler(polarity=args.polarity, random_state=0)
    X_new, y_new = sampler.fit_resample(data.images, y, groups=data.groups)
    print(f"{len(y_new)} images: {dict(Counter(y_new.tolist()))}")
    shares = sampler.ratio_[sampler.ratio_ < 1]  # the others are copies
    print(f"share of the base: {shares.min():.2f} to {shares.max():.2f}")

    maps = SaliencyMap(polarity=args.polarity).fit_transform(X_new[-100:])
    print(f"mean saliency of the newest images: {maps.mean():.2f}")

    display = SPMixDisplay.from_sampler(sampler, data.images, y)
    display.figure_.savefig(args.figure, dpi=150)
    print(f"figure: {args.figure}")


if __name__ == "__main__":
    main()
