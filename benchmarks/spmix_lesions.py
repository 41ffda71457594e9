"""SPMix as a sampler of images, against its ablations, on synthetic lesions.

Five kinds of lesion, 300 to 8 images; in training each rarer kind is seen on a narrow range of
skin tones, in test on all. One conv net, augmentation, optimiser and number of steps for every
row; all seeds are reported. "uniform" draws one share per image from SPMix's own range, "random
patches" one per patch: what remains of the method without saliency.

    python benchmarks/spmix_lesions.py [--seeds 0 1 2 3 4]
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from imblearn.over_sampling import RandomOverSampler
from sklearn.metrics import balanced_accuracy_score, recall_score

from sklearn_medimb import SoftmaxClassifier, SPMixSampler
from sklearn_medimb.datasets import make_lesions

COUNTS = (300, 150, 30, 15, 8)
SKIN = ((0, 1), (0, 1), (0.0, 0.3), (0.4, 0.7), (0.7, 1.0))


def random_shares(per_patch: bool, seed: int) -> Any:
    """Random saliency: one number per image, or noise over all its pixels."""
    generator = torch.Generator().manual_seed(seed)

    def detect(images: torch.Tensor) -> torch.Tensor:
        shape = images.shape[2:] if per_patch else [1] * (images.ndim - 2)
        noise = torch.rand(len(images), *shape, generator=generator)
        return noise.expand(-1, *images.shape[2:])

    return detect


def methods(seed: int) -> dict[str, Any]:
    spmix = {"random_state": seed, "patch_size": 4}
    # With merge="pixel" a constant map m gives the share .5 + .5 m, cut at .8: uniform on
    # [.5, .8] where m is uniform on [0, .6].
    uniform = random_shares(False, seed)
    samplers = {
        "oversampling": RandomOverSampler(random_state=seed),
        "SPMix": SPMixSampler(**spmix),
        "SPMix, all mixed": SPMixSampler(mix_prob=1.0, **spmix),
        "SPMix, dark": SPMixSampler(polarity="dark", **spmix),
        "SPMix, base's saliency": SPMixSampler(partner_saliency=False, **spmix),
        "SPMix, floor 0": SPMixSampler(floor=0.0, **spmix),
        "SPMix, any partner": SPMixSampler(partners="any", **spmix),
        "uniform": SPMixSampler(
            saliency=lambda images: 0.6 * uniform(images),
            merge="pixel",
            floor=0.5,
            partner_saliency=False,
            **spmix,
        ),
        "random patches": SPMixSampler(saliency=random_shares(True, seed), **spmix),
    }
    rows = {name: SoftmaxClassifier(sampler=s, random_state=seed) for name, s in samplers.items()}
    plain = {
        "CE": SoftmaxClassifier(random_state=seed),
        "logit adjustment": SoftmaxClassifier(loss="logit_adjusted", random_state=seed),
    }
    return {**plain, **rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--difficulty", type=float, default=0.2)
    args = parser.parse_args()
    scores = defaultdict(list)
    for seed in args.seeds:
        made = {"image_size": 32, "difficulty": args.difficulty}
        train = make_lesions(COUNTS, skin_range=SKIN, random_state=seed, **made)
        test = make_lesions(2000, random_state=1000 + seed, **made)
        for name, classifier in methods(seed).items():
            start = time.perf_counter()
            predicted = classifier.fit(train.images, train.target).predict(test.images)
            accuracy = balanced_accuracy_score(test.target, predicted)
            tail = recall_score(test.target, predicted, average=None)[2:].mean()
            scores[name].append((accuracy, tail))
            took = time.perf_counter() - start
            print(f"{seed} {name:24} {accuracy:.3f} tail {tail:.3f}  {took:.0f} s", flush=True)
    print(f"\n{'':24} balanced accuracy   recall of the three rarest   per seed")
    for name, values in scores.items():
        accuracy, tail = np.array(values).T
        print(
            f"{name:24} {accuracy.mean():.3f} +- {accuracy.std():.3f}      {tail.mean():.3f} +- "
            f"{tail.std():.3f}              " + " ".join(f"{v:.3f}" for v in accuracy)
        )


if __name__ == "__main__":
    main()
