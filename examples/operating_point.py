"""From probabilities to decisions: a promised sensitivity, true frequencies, and refusals.

A network that was taught all classes alike calls half of the doubtful images ill. A clinic wants
to know something else: at which threshold are .9 of the ill found, how sure is that, how many of
the positives are ill where 1 in 50 is, and which images should a person look at? On synthetic
lesions, two images of each patient (or on a ``.npz`` file)::

    python examples/operating_point.py

Half of the patients are set aside first, to see what became of the promise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import StratifiedGroupKFold

from sklearn_medimb import SoftmaxClassifier
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.datasets import load_npz, make_lesions
from sklearn_medimb.decisions import OperatingPoint, PriorShift, SelectiveClassifier
from sklearn_medimb.metrics import scorers

PREVALENCE = 0.02  # where the classifier is to be used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("npz", nargs="?", help="MedMNIST-style archive; default: made lesions")
    parser.add_argument("--sensitivity", type=float, default=0.9, help="to be promised")
    parser.add_argument("--figure", type=Path, default=Path("operating_point.png"))
    args = parser.parse_args()

    if args.npz:
        data = load_npz(args.npz)
    else:
        data = make_lesions(
            [200, 200, 200, 240],
            image_size=16,
            images_per_patient=2,
            difficulty=0.0,
            random_state=0,
        )
    patients = np.arange(len(data.target)) if data.groups is None else data.groups
    ill = np.unique(data.target)[-1]  # the disease: the last class
    names = np.where(data.target == ill, "ill", "well")
    halves = StratifiedGroupKFold(2, shuffle=True, random_state=0)
    known, new = next(halves.split(data.images, names, patients))
    X, y, groups = data.images[known], names[known], patients[known]
    X_new, y_new = data.images[new], names[new]
    print(f"{len(y)} images, {(y == 'ill').sum()} of them ill; {len(y_new)} of new patients")

    clf = SoftmaxClassifier(
        backbone=ConvNet(widths=(16, 32, 32)),
        max_epochs=20,
        class_weight="balanced",
        lr=1e-2,
        augment="none",
        random_state=0,
    )
    common = {"positive": "ill", "prevalence": PREVALENCE, "cv": 4, "random_state": 0}
    point = OperatingPoint(clf, min_sensitivity=args.sensitivity, **common)
    try:
        point.fit(X, y, groups=groups)
    except ValueError as refusal:  # of few patients nothing can be promised
        print(f"\n{refusal}\n")
        point.set_params(confidence=None).fit(X, y, groups=groups)

    print(f"\nthreshold {point.threshold_:.3f}, on patients unseen in cross-validation:")
    for name in ("sensitivity", "specificity", "ppv", "npv"):
        found = getattr(point, f"{name}_")
        print(f"{name:12} {found.score:.3f} [{found.low:.3f}, {found.high:.3f}]")

    scoring = scorers("sensitivity", "specificity", "ppv", positive="ill", prevalence=PREVALENCE)
    print(f"\n{'on new patients':22}" + "".join(f"{name:>12}" for name in scoring))
    for name, one in {"threshold of .5": point.estimator_, "operating point": point}.items():
        scores = [scorer(one, X_new, y_new) for scorer in scoring.values()]
        print(f"{name:22}" + "".join(f"{score:12.3f}" for score in scores))

    # The network is fitted: it is frozen from here on.
    fitted = FrozenEstimator(point.estimator_)
    shifted = PriorShift(fitted, prevalence=PREVALENCE, positive="ill").fit(X, y)
    column = shifted.classes_.tolist().index("ill")
    taught, true = (one.predict_proba(X_new)[:, column] for one in (fitted, shifted))
    row = np.abs(taught - 0.9).argmin()
    print(f"\nwhat was {taught[row]:.2f} is {true[row]:.2f} at the true frequency")

    selective = SelectiveClassifier(clf, coverage=0.8, cv=4, random_state=0)
    selective.fit(X, y, groups=groups)
    decided = selective.accepts(X_new)
    right = selective.predict(X_new) == y_new
    print(
        f"decided {decided.mean():.2f}: {right[decided].mean():.3f} right, all {right.mean():.3f}"
    )

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, other) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    bins = np.linspace(0, 1, 31)
    for side, colour in {"well": "#0072B2", "ill": "#D55E00"}.items():
        left.hist(taught[y_new == side], bins, density=True, alpha=0.6, color=colour, label=side)
    left.axvline(point.threshold_, color="black", linestyle="--", label="operating point")
    left.set(xlabel="probability of ill, new patients", yticks=[])
    left.legend()
    curve = selective.curve_
    other.plot(curve.coverage, curve.error, color="#0072B2")
    other.axvline(0.8, color="black", linestyle="--")
    other.set(xlabel="coverage", ylabel="error among the decided", xlim=(0, 1), ylim=(0, None))
    figure.savefig(args.figure, dpi=150)
    print(f"\nfigure: {args.figure}")


if __name__ == "__main__":
    main()
