"""What mixing costs in a training step, and what AMIMV's engine costs over a bare PyTorch loop.

Prints ratios from one run:

- a step of SPMixClassifier over one of SoftmaxClassifier, 64 x 64 x 3, the small conv net, batches
  of 64, the default augmentation; and what the saliency of a training set costs once,
- images per second of AMIMVEncoder over those of a bare loop that does the same: same backbone,
  projector, views, precision, optimiser and schedule (5,000 images of 32 x 32 x 3, 128 anchors).
"""

from __future__ import annotations

import copy
import time

import numpy as np
import torch
from busy import DEVICE, N_EPOCHS, Course, make_images, watched
from sklearn.base import clone
from torch import nn

from sklearn_medimb import AMIMVEncoder, SaliencyMap, SoftmaxClassifier, SPMixClassifier
from sklearn_medimb.augment import resolve_augmentation
from sklearn_medimb.backbones import ConvNet, as_features


def mixing() -> None:
    X, y = make_images(640, 64)
    common = {"backbone": ConvNet(), "max_epochs": N_EPOCHS, "random_state": 0}
    rows: dict[str, list[Course]] = {}
    for _ in range(3):  # in turns, so that a slower moment of the machine meets all
        for name, made in {
            "plain": SoftmaxClassifier(**common),
            "tokens": SPMixClassifier(**common),
            "images": SPMixClassifier(level="image", **common),
            "all mixed": SPMixClassifier(mix_prob=1.0, **common),
        }.items():
            rows.setdefault(name, []).extend(watched(made, X, y))
    plain = min(course.step for course in rows["plain"])
    for name, courses in rows.items():
        best = min(courses, key=lambda course: course.step)
        print(f"{name:10} {best.step / plain:.2f} x plain, {best.told()}", flush=True)
    start = time.perf_counter()
    SaliencyMap().transform(X)
    took = time.perf_counter() - start
    print(
        f"saliency of 640 images, once: {1e3 * took:.0f} ms = {took / plain:.1f} plain steps",
        flush=True,
    )


def projector() -> list[nn.Module]:
    """Three linear layers with batch normalisation."""
    layers = [(nn.Linear(128, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU()) for _ in range(3)]
    return [layer for triple in layers for layer in triple][:-1]


def thresholded_contrastive(z1: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
    """Minus the log of the mean share of the other view among what is neither like nor unlike."""
    z = nn.functional.normalize(torch.cat([z1, z2]))
    cosine = z @ z.T
    strength = cosine.abs()
    kept = ((cosine - 1) / 0.3).exp() * ((strength >= 0.1) & (strength <= 0.9))
    positive = kept.diagonal(len(z1)).repeat(2)
    return -(positive / kept.sum(dim=1).clamp(min=1e-12)).mean().clamp(min=1e-12).log()


def bare_amimv(X: np.ndarray, n_epochs: int, autocast: torch.dtype | None) -> float:
    """Seconds of AMIMV written as one loop."""
    torch.manual_seed(0)
    backbone = ConvNet().build(X.shape[1:]).to(DEVICE, memory_format=torch.channels_last)
    online = nn.ModuleList([backbone, nn.Sequential(*projector())]).to(DEVICE)
    target = copy.deepcopy(online).requires_grad_(False)
    augment = resolve_augmentation("contrastive")
    a1 = clone(augment).set_params(blur_probability=1.0)
    a2 = clone(augment).set_params(blur_probability=0.1, gamma=max(augment.gamma, 0.4))
    generator = torch.Generator(DEVICE).manual_seed(0)
    rng = np.random.default_rng(0)
    images = torch.from_numpy(X).to(DEVICE)
    optimizer = torch.optim.AdamW(online.parameters(), lr=2e-3, weight_decay=1e-4, fused=True)
    n, size = len(X), 128
    n_steps = n_epochs * -(-n // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, total_steps=n_steps, cycle_momentum=False
    )

    def encode(nets: nn.ModuleList, batch: torch.Tensor) -> torch.Tensor:
        batch = batch.sub_(0.5).div_(0.29).contiguous(memory_format=torch.channels_last)
        with torch.autocast(DEVICE.type, autocast, enabled=autocast is not None):
            features = nets[0](batch)
        return nets[1](as_features(features.float()))

    start = time.perf_counter()
    online.train(), target.train()
    for _ in range(n_epochs):
        for rows in np.array_split(rng.permutation(n), -(-n // size)):
            with torch.no_grad():
                old, new = list(target.parameters()), list(online.parameters())
                torch._foreach_lerp_(old, new, 0.1)
            picks = np.concatenate([rows, rng.integers(n, size=len(rows))])
            x, y = images[torch.from_numpy(picks).to(DEVICE)].float().div_(255).chunk(2)
            first, second = encode(online, torch.cat([x, a1(y, generator)])).chunk(2)
            with torch.no_grad():
                third, fourth = encode(target, torch.cat([a2(x, generator), y])).chunk(2)
            loss = thresholded_contrastive(first + second, third + fourth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def pretraining() -> None:
    (X, _), n_epochs = make_images(5_000, 32), 2
    fitted = AMIMVEncoder(ConvNet(), max_epochs=1, random_state=0).fit(X[:256])
    autocast = fitted.net_.module_.trunk.autocast  # the precision that it takes by itself
    bare_amimv(X[:256], 1, autocast)
    ratios = []
    for _ in range(6):
        bare = bare_amimv(X, n_epochs, autocast)
        encoder = AMIMVEncoder(ConvNet(), max_epochs=n_epochs, random_state=0)
        start = time.perf_counter()
        encoder.fit(X)
        took = time.perf_counter() - start
        ratios.append(bare / took)
    print(
        f"AMIMV: {n_epochs * len(X) / took:.0f} images/s, {np.median(ratios):.2f} "
        f"({min(ratios):.2f}-{max(ratios):.2f}) x a bare loop of the same computation"
    )
    (course,) = watched(AMIMVEncoder(ConvNet(), max_epochs=N_EPOCHS, random_state=0), X)
    print(f"       {course.told()}")


def main() -> None:
    mixing()
    pretraining()


if __name__ == "__main__":
    main()
