"""
Search overnight: stop, go on, or share the work
================================================

Trials that do badly in their first epochs or folds are pruned. The study lives in a file, here a
temporary one. In a lasting place it goes on where it was when the script is started again, killed
or not; started twice, both processes work on it (then without a seed of the sampler, or both begin
with the same trials).
"""

# %%
# Two kinds of synthetic lesions, one in five of the rare kind.

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState
from sklearn.base import clone
from sklearn.model_selection import StratifiedGroupKFold, cross_val_score

from sklearn_medimb import SoftmaxClassifier
from sklearn_medimb.datasets import make_lesions
from sklearn_medimb.tuning import OptunaPruning, search_space, suggest

N_FOLDS, N_EPOCHS, N_TRIALS = 2, 16, 10
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)

data = make_lesions((240, 1, 1, 60), image_size=16, difficulty=0.0, random_state=0)
kept = np.isin(data.target, (0, 3))  # round ones and star-shaped ones
X, y = data.images[kept], data.target[kept]
groups = np.arange(len(y))  # patients

# %%
# Every estimator knows its search space. The objective trains clones, fold by fold.

clf = SoftmaxClassifier(max_epochs=N_EPOCHS, early_stopping=True, random_state=0)
space = search_space(clf)
del space["mixup_alpha"]  # it matters with mixup only: too few trials for that
for name, distribution in space.items():
    print(f"{name:16} {distribution}")


def objective(trial):
    """Mean score over folds, or pruned before."""
    candidate = clone(clf).set_params(**suggest(trial, space))
    candidate.set_params(callbacks=[OptunaPruning(trial)])
    return cross_val_score(
        candidate, X, y, groups=groups, params={"groups": groups},
        cv=StratifiedGroupKFold(N_FOLDS, shuffle=True, random_state=0),
        scoring="balanced_accuracy", error_score="raise",  # else a pruned fold becomes NaN
    ).mean()  # fmt: skip


# %%
# The storage may be this file, a journal, or a PostgreSQL server that many machines share. Trials
# that were running when a process was killed are told as failed, and queued anew.

folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
optuna.logging.set_verbosity(optuna.logging.WARNING)
study = optuna.create_study(
    study_name="search", load_if_exists=True, direction="maximize",
    storage=f"sqlite:///{Path(folder.name) / 'study.db'}",
    sampler=optuna.samplers.TPESampler(n_startup_trials=8, seed=0),
    pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=N_EPOCHS // 2),
)  # fmt: skip
for lost in study.get_trials(states=[TrialState.RUNNING]):
    study.tell(lost.number, state=TrialState.FAIL)
    study.enqueue_trial(lost.params)
study.optimize(objective, n_trials=N_TRIALS)

# %%
# What it found.

trials = study.get_trials(states=ENDED)
complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
print(f"{len(trials)} trials, {len(trials) - len(complete)} of them pruned")
print(f"best balanced accuracy {study.best_value:.3f}, in trial {study.best_trial.number}")
for name, value in study.best_params.items():
    print(f"  {name:16} {value}")
importances = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())

# %%
# Each epoch of each fold is reported; what is below the median of the others is given up.

fig, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
numbers, values = zip(*((t.number, t.value) for t in complete), strict=True)
a.scatter(numbers, values, s=14, label="one trial")
best = np.maximum.accumulate(values)
a.plot(numbers, best, color="#D55E00", label="best so far", drawstyle="steps-post")
a.set(xlabel="trial", ylabel="balanced accuracy", title="history")
a.legend(loc="lower right")

for state, colour in zip(ENDED, ("#0072B2", "#E69F00"), strict=True):
    label = f"{state.name.lower()} trials"
    for trial in (t for t in trials if t.state is state):
        steps = list(trial.intermediate_values.items())
        b.plot(*zip(*steps, strict=True), color=colour, alpha=0.6, label=label)
        label = None
b.set(xlabel="epochs so far, all folds", ylabel="validation score", title="reports, pruning")
b.legend(loc="upper left")

names, shares = list(importances)[::-1], list(importances.values())[::-1]
c.barh(names, shares, color="#0072B2")
c.set(xlabel="share", title="importance")

first = names[-1]
d.scatter([trial.params[first] for trial in complete], values, s=14)
if getattr(complete[0].distributions[first], "log", False):
    d.set_xscale("log")
d.set(xlabel=first, ylabel="balanced accuracy", title="slice")
plt.show()
folder.cleanup()
