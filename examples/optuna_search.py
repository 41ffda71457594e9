"""Search a classifier's hyperparameters with Optuna; stop, go on, or share the work.

Trials that do badly in their first epochs or folds are pruned. With ``--study`` the search lives in
a file: start it again and it goes on where it was, killed or not; start it twice and both
processes work on it. ``--retry`` repeats the trials that were running when a process was killed::

    python examples/optuna_search.py --study lesions.db --trials 40
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import matplotlib as mpl
import numpy as np
import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState
from sklearn.base import clone
from sklearn.model_selection import StratifiedGroupKFold, cross_val_score

from sklearn_medimb import SoftmaxClassifier
from sklearn_medimb.datasets import load_npz, make_lesions
from sklearn_medimb.tuning import OptunaPruning, search_space, suggest

N_FOLDS, N_EPOCHS = 2, 8
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("npz", nargs="?", help="MedMNIST-style archive; default: lesions")
    parser.add_argument("--study", type=Path, help="SQLite file; default: a temporary one")
    parser.add_argument("--trials", type=int, default=20, help="in all, over all processes")
    parser.add_argument("--retry", action="store_true", help="first run what a killed process left")
    parser.add_argument("--figure", type=Path, default=Path("optuna_search.png"))
    args = parser.parse_args()

    if args.npz:
        data = load_npz(args.npz)
        X, y, groups = data.images, data.target, data.groups
    else:
        data = make_lesions((240, 1, 1, 60), image_size=16, difficulty=0.0, random_state=0)
        kept = np.isin(data.target, (0, 3))  # round ones and, one in five, star-shaped ones
        X, y, groups = data.images[kept], data.target[kept], None
    groups = np.arange(len(y)) if groups is None else groups  # patients

    clf = SoftmaxClassifier(max_epochs=N_EPOCHS, early_stopping=True, random_state=0)
    space = search_space(clf)
    del space["mixup_alpha"]  # it matters with mixup only: too few trials for that

    def objective(trial: optuna.Trial) -> float:
        candidate = clone(clf).set_params(**suggest(trial, space))
        candidate.set_params(callbacks=[OptunaPruning(trial)])
        return cross_val_score(
            candidate, X, y, groups=groups, params={"groups": groups},
            cv=StratifiedGroupKFold(N_FOLDS, shuffle=True, random_state=0),
            scoring="balanced_accuracy", error_score="raise",  # else a pruned fold becomes NaN
        ).mean()  # fmt: skip

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        study = optuna.create_study(
            study_name="search", load_if_exists=True, direction="maximize",
            storage=f"sqlite:///{args.study or Path(folder) / 'study.db'}",
            # A seed would have processes that share a study begin with the same trials.
            sampler=optuna.samplers.TPESampler(n_startup_trials=8, seed=None if args.study else 0),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=N_EPOCHS // 2),
        )  # fmt: skip
        if args.retry:
            for lost in study.get_trials(states=[TrialState.RUNNING]):
                study.tell(lost.number, state=TrialState.FAIL)
                study.enqueue_trial(lost.params)
        if len(study.get_trials(states=ENDED)) < args.trials:
            study.optimize(objective, callbacks=[MaxTrialsCallback(args.trials, states=ENDED)])
        report(study, args.figure)


def report(study: optuna.Study, path: Path) -> None:
    """Print and draw what the search has found."""
    trials = study.get_trials(states=ENDED)
    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    print(f"{len(trials)} trials, {len(trials) - len(complete)} of them pruned")
    print(f"best balanced accuracy {study.best_value:.3f}, in trial {study.best_trial.number}")
    for name, value in study.best_params.items():
        print(f"  {name:16} {value}")
    importances = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    fig, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    numbers, values = zip(*((t.number, t.value) for t in complete), strict=True)
    a.scatter(numbers, values, s=14, label="one trial")
    a.plot(
        numbers,
        np.maximum.accumulate(values),
        color="tab:red",
        label="best so far",
        drawstyle="steps-post",
    )
    a.set(xlabel="trial", ylabel="balanced accuracy", title="history")
    a.legend(loc="lower right")

    for state, colour in zip(ENDED, ("tab:blue", "tab:orange"), strict=True):
        label = f"{state.name.lower()} trials"
        for trial in (t for t in trials if t.state is state):
            steps = list(trial.intermediate_values.items())
            b.plot(*zip(*steps, strict=True), color=colour, alpha=0.6, label=label)
            label = None
    b.set(xlabel="epochs so far, all folds", ylabel="validation score", title="reports, pruning")
    b.legend(loc="upper left")

    names, shares = list(importances)[::-1], list(importances.values())[::-1]
    c.barh(names, shares)
    c.set(xlabel="share", title="importance")

    first = names[-1]
    d.scatter([trial.params[first] for trial in complete], values, s=14)
    if getattr(complete[0].distributions[first], "log", False):
        d.set_xscale("log")
    d.set(xlabel=first, ylabel="balanced accuracy", title="slice")
    fig.savefig(path, dpi=150)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
