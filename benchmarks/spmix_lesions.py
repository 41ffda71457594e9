"""SPMix as a sampler of images and inside the network, with ablations, on synthetic lesions.

Five kinds of lesion, 300 to 8 images; in training each rarer kind is seen on a narrow range of
skin tones, in test on all. One conv net, augmentation, optimiser and number of steps for every
row; all seeds are reported. Two rows show what remains of the method without saliency: one share
per new image, drawn evenly from SPMix's range, and SPMix's own shares with their patches shuffled.

    python benchmarks/spmix_lesions.py [--seeds 0 1 2 3 4] [--rows "in the network: SPMix" ...]
    python benchmarks/spmix_lesions.py --pictures shapes

``shapes`` are simpler pictures: faint lesions on textured skin, without hairs or dark corners.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from imblearn.over_sampling import RandomOverSampler
from scipy.ndimage import zoom
from sklearn.metrics import balanced_accuracy_score, recall_score
from sklearn.utils import Bunch

from sklearn_medimb import SoftmaxClassifier, SPMixClassifier, SPMixSampler
from sklearn_medimb.datasets import make_lesions
from sklearn_medimb.saliency import SaliencyMap

COUNTS = (300, 150, 30, 15, 8)
SKIN = ((0, 1), (0, 1), (0.0, 0.3), (0.4, 0.7), (0.7, 1.0))


class OneShare(SPMixSampler):
    """One share per new image, drawn from the range of SPMix: mixup that keeps the base's label."""

    def _ratio(self, s_t: torch.Tensor, s_h: torch.Tensor) -> torch.Tensor:
        ratio = super()._ratio(s_t, s_h)
        drawn = torch.rand(len(ratio), generator=torch.Generator().manual_seed(self.random_state))
        return (0.5 + 0.3 * drawn).view(-1, 1, 1).expand_as(ratio).to(ratio)


class ShuffledPatches(SPMixSampler):
    """SPMix's own shares in a random place: the same amounts, and no saliency."""

    def _ratio(self, s_t: torch.Tensor, s_h: torch.Tensor) -> torch.Tensor:
        ratio = super()._ratio(s_t, s_h)
        flat = ratio.flatten(1)
        drawn = torch.rand(flat.shape, generator=torch.Generator().manual_seed(self.random_state))
        return flat.gather(1, drawn.argsort(dim=1)).view_as(ratio)


class OneShareInside(SPMixClassifier):
    """One share per image, drawn from the range of SPMix, inside the network."""

    def _ratio(self, s_t: torch.Tensor, s_h: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        ratio = super()._ratio(s_t, s_h, grid)
        drawn = torch.rand(len(ratio), dtype=ratio.dtype)  # from the generator of the fit
        return (0.5 + 0.3 * drawn).view(-1, 1, 1).expand_as(ratio)


def make_shapes(
    counts: Sequence[int], *, skin_range: Any = (0, 1), contrast: float = 0.12, seed: int
) -> Bunch:
    """Draw gray images of 32 x 32: five faint shapes, darker than the textured skin around them."""
    rng = np.random.default_rng(seed)
    target = np.repeat(np.arange(5), counts)
    n = len(target)

    def draw(low: Any, high: Any) -> np.ndarray:
        return rng.uniform(low, high, n)[:, np.newaxis, np.newaxis]

    low, high = np.broadcast_to(skin_range, (5, 2))[target].T
    axis = (np.arange(32) + 0.5) / 16 - 1
    y, x, turn, size = draw(-0.25, 0.25), draw(-0.25, 0.25), draw(0, 2 * np.pi), draw(0.3, 0.5)
    x, y = (axis - x) / size, (axis[:, np.newaxis] - y) / size
    u, v = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    inside = np.choose(
        target[:, np.newaxis, np.newaxis],
        [
            radius < 1,
            np.hypot(u / 1.4, v / 0.7) < 1,
            np.maximum(abs(u), abs(v)) < 0.87,
            radius < 1 + 0.35 * np.cos(5 * angle),
            (np.minimum(abs(u), abs(v)) < 0.4) & (np.maximum(abs(u), abs(v)) < 1.1),
        ],
    )
    coarse = zoom(rng.standard_normal((n, 6, 6)), (1, 32 / 6, 32 / 6), order=1)
    texture = 0.05 * coarse + 0.03 * rng.standard_normal(inside.shape)
    images = 0.85 - 0.5 * draw(low, high) + texture - contrast * inside
    order = rng.permutation(n)
    return Bunch(images=np.clip(255 * images, 0, 255).astype(np.uint8)[order], target=target[order])


def methods(seed: int) -> dict[str, Any]:
    spmix = {"random_state": seed, "patch_size": 4}
    samplers = {
        "oversampling": RandomOverSampler(random_state=seed),
        "SPMix": SPMixSampler(**spmix),
        "SPMix, all mixed": SPMixSampler(mix_prob=1.0, **spmix),
        "SPMix, dark": SPMixSampler(polarity="dark", **spmix),
        "SPMix, base's saliency": SPMixSampler(partner_saliency=False, **spmix),
        "SPMix, floor 0": SPMixSampler(floor=0.0, **spmix),
        "SPMix, any partner": SPMixSampler(partners="any", **spmix),
        "one share per image": OneShare(**spmix),
        "shuffled patches": ShuffledPatches(**spmix),
    }
    rows = {name: SoftmaxClassifier(sampler=s, random_state=seed) for name, s in samplers.items()}
    plain = {
        "CE": SoftmaxClassifier(random_state=seed),
        "logit adjustment": SoftmaxClassifier(loss="logit_adjusted", random_state=seed),
    }
    inside = {
        "class-balanced batches": SPMixClassifier(mix_prob=0.0),
        "SPMix": SPMixClassifier(),
        "one share per image": OneShareInside(),
        "SPMix, dark": SPMixClassifier(saliency=SaliencyMap(polarity="dark")),
        "SPMix, first stage": SPMixClassifier(mix_layer="0"),
        "SPMix, second stage": SPMixClassifier(mix_layer="1"),
        "SPMix, all mixed": SPMixClassifier(mix_prob=1.0),
        "SPMix, floor 0": SPMixClassifier(floor=0.0),
        "SPMix, images": SPMixClassifier(level="image"),
        "SPMix, published pairing": SPMixClassifier(pairing="code", loss="balanced_softmax"),
    }
    inside = {
        f"in the network: {name}": made.set_params(random_state=seed)
        for name, made in inside.items()
    }
    return {**plain, **rows, **inside}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--rows", nargs="+", help="only these rows")
    parser.add_argument("--pictures", choices=("lesions", "shapes"), default="lesions")
    parser.add_argument("--difficulty", type=float, default=0.2)
    args = parser.parse_args()
    scores = defaultdict(list)
    for seed in args.seeds:
        made = {"image_size": 32, "difficulty": args.difficulty}
        if args.pictures == "shapes":
            train = make_shapes(COUNTS, skin_range=SKIN, seed=seed)
            test = make_shapes([400] * 5, seed=1000 + seed)
        else:
            train = make_lesions(COUNTS, skin_range=SKIN, random_state=seed, **made)
            test = make_lesions(2000, random_state=1000 + seed, **made)
        for name, classifier in methods(seed).items():
            if args.rows and name not in args.rows:
                continue
            start = time.perf_counter()
            predicted = classifier.fit(train.images, train.target).predict(test.images)
            accuracy = balanced_accuracy_score(test.target, predicted)
            tail = recall_score(test.target, predicted, average=None)[2:].mean()
            scores[name].append((accuracy, tail))
            took = time.perf_counter() - start
            print(f"{seed} {name:40} {accuracy:.3f} tail {tail:.3f}  {took:.0f} s", flush=True)
    print(f"\n{'':40} balanced accuracy   recall of the three rarest   per seed")
    for name, values in scores.items():
        accuracy, tail = np.array(values).T
        print(
            f"{name:40} {accuracy.mean():.3f} +- {accuracy.std():.3f}      {tail.mean():.3f} +- "
            f"{tail.std():.3f}              " + " ".join(f"{v:.3f}" for v in accuracy)
        )


if __name__ == "__main__":
    main()
