"""Hyperparameter search with Optuna: search spaces, and pruning across the folds of a trial.

A study's objective trains clones of one estimator, and gives up a trial that does badly::

    def objective(trial):
        candidate = clone(clf).set_params(**suggest(trial, search_space(clf)))
        candidate.set_params(callbacks=[OptunaPruning(trial)], early_stopping=True)
        scores = cross_val_score(candidate, X, y, scoring="balanced_accuracy", error_score="raise")
        return scores.mean()

    study = optuna.create_study(
        storage="sqlite:///search.db", study_name="lesions", load_if_exists=True,
        direction="maximize",
    )
    study.optimize(objective, n_trials=50)

``optuna_integration.OptunaSearchCV(clf, search_space(clf))`` needs no objective. The study above
outlives its process: run it again and it goes on, run it twice and both share the work (a
``JournalStorage`` instead of SQLite where the file is on a network). A trial that was running when
its process died stays RUNNING; once no process is at work, give its parameters another go with
``study.enqueue_trial(trial.params)``, as ``examples/practice/plot_optuna_search.py`` does.

Imports `base`.
"""

from __future__ import annotations

from numbers import Real
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sklearn.frozen import FrozenEstimator
from skorch.callbacks import Callback

from sklearn_medimb.base import BaseImageEstimator

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial

__all__ = ["OptunaPruning", "search_space", "suggest"]

# ---------------------------------------------------------------- search spaces


def search_space(estimator: Any) -> dict[str, BaseDistribution]:
    """Ranges in which to search the hyperparameters of an estimator.

    The parameters of a space go together in any combination and suit SQLite. Some matter only
    beside a certain value of another (`mixup_alpha` with ``mixup="mixup"``): drop what a study need
    not try, ``del space["loss"]``, or add to it, as to any dict.

    Parameters
    ----------
    estimator : estimator, sampler or class
        A classifier, encoder, sampler, head or transformer of this package, or what holds some: a
        pipeline of scikit-learn or imbalanced-learn, a meta-estimator. Of a class the defaults
        count.

        Objects of the package among the parameters (``sampler=SPMixSampler()``,
        ``rebalance=ClassifierRetraining()``, ``backbone=ResNet()``, ``augment=Augmentation()``) add
        their own spaces, as ``"sampler__cap"``; so do the steps of a pipeline. Whatever else is
        set to an object, or to a value outside its range, was chosen on purpose and stays.

    Returns
    -------
    space : dict of str to optuna.distributions.BaseDistribution
        By the names that ``set_params`` takes; for `suggest`, ``OptunaSearchCV`` or
        ``study.ask``.

    Raises
    ------
    TypeError
        If `estimator` neither is nor holds anything of this package with parameters to search.

    Examples
    --------
    >>> from sklearn_medimb import ClassifierRetraining
    >>> from sklearn_medimb.tuning import search_space
    >>> for name, distribution in search_space(ClassifierRetraining).items():
    ...     print(name, distribution)
    alpha FloatDistribution(high=10.0, log=True, low=0.001, step=None)
    class_weight CategoricalDistribution(choices=(None, 'balanced'))
    """
    if isinstance(estimator, type) and hasattr(estimator, "_search_space"):
        estimator = estimator()
    known = hasattr(estimator, "get_params") and not isinstance(estimator, type)
    if not known or not (space := _collect(estimator)):
        raise TypeError(
            f"{estimator!r} has no search space: pass an estimator, sampler, head, backbone or "
            "loss of this package, or of a class whose parameters say search=..., or a pipeline "
            "or meta-estimator that holds one."
        )
    return {name: _distribution(values) for name, values in space.items()}


def _collect(holder: Any) -> dict[str, Any]:
    """Ranges of an object and of what it holds."""
    ranges = getattr(holder, "_search_space", {})
    table = {k: v(holder) if callable(v) else v for k, v in ranges.items()}
    table = {k: row for k, row in table.items() if row is not None}
    space: dict[str, Any] = {}
    for name, value in holder.get_params().items():
        if "__" in name:
            continue
        if hasattr(value, "get_params") and not isinstance(value, type):
            if not _is_start(name, value):
                space |= {f"{name}__{inner}": row for inner, row in _collect(value).items()}
        elif name in table and _holds(table[name], value):
            space[name] = table[name]
    if isinstance(holder, BaseImageEstimator):  # an encoder works on the backbone of its host
        space = {k: v for k, v in space.items() if not k.startswith("pretrain__backbone__")}
    return space


def _is_start(name: str, value: Any) -> bool:
    """Whether training only begins with `value`, so that its parameters do nothing."""
    if isinstance(value, BaseImageEstimator) and name in ("backbone", "pretrain"):
        return value.__sklearn_is_fitted__()
    return isinstance(value, FrozenEstimator)


def _holds(values: Any, value: Any) -> bool:
    """Whether a row of a table contains a value; "auto" stands for one of the numbers."""
    if not isinstance(value, str | Real | None):
        return False
    if isinstance(values, list):
        return value in values
    return value == "auto" or (isinstance(value, Real) and values[0] <= value <= values[1])


def _distribution(values: Any) -> BaseDistribution:
    from optuna import distributions

    if isinstance(values, list):
        return distributions.CategoricalDistribution(values)
    low, high, *scale = values
    if isinstance(low, int):
        return distributions.IntDistribution(low, high, log=bool(scale))
    return distributions.FloatDistribution(low, high, log=bool(scale))


def suggest(trial: Trial, space: dict[str, BaseDistribution]) -> dict[str, Any]:
    """Let a trial choose from a search space, in the objective of a study.

    Parameters
    ----------
    trial : optuna.trial.Trial
        The running trial.
    space : dict of str to optuna.distributions.BaseDistribution
        As `search_space` gives it.

    Returns
    -------
    params : dict
        For ``set_params``.

    Examples
    --------
    >>> import optuna
    >>> from sklearn_medimb import TauNormalization
    >>> from sklearn_medimb.tuning import search_space, suggest
    >>> trial = optuna.trial.FixedTrial({"tau": 0.5, "alpha": 0.1})
    >>> TauNormalization().set_params(**suggest(trial, search_space(TauNormalization)))
    TauNormalization(tau=0.5)
    """
    from optuna.distributions import CategoricalDistribution, IntDistribution

    params: dict[str, Any] = {}
    for name, values in space.items():
        options: Any = values
        if isinstance(values, CategoricalDistribution):
            params[name] = trial.suggest_categorical(name, values.choices)
            continue
        ask = trial.suggest_int if isinstance(values, IntDistribution) else trial.suggest_float
        params[name] = ask(name, options.low, options.high, step=options.step, log=options.log)
    return params


# ---------------------------------------------------------------- pruning


class OptunaPruning(Callback):
    """Report each epoch to an Optuna trial, and end the trial where its pruner says so.

    The folds of a cross-validation are fits of clones of one callback: clones share the trial and
    what its folds have reached. In epoch e of a fold the trial hears the mean over the folds so
    far of the monitored value at epoch e, where a fold that stopped earlier counts with its last
    value. The step of the report is the number of epochs trained so far in all folds, from 1.

    Parameters
    ----------
    trial : optuna.trial.Trial
        The running trial; one callback per trial.
    monitor : str, default="valid_score"
        Name in the history; "valid_score", the default, comes with ``early_stopping=True``,
        "knn_score" with an encoder that is shown classes. Whether more is better is the study's
        `direction`. Courses of training without validation, such as pre-training, report no
        "valid_score".

    Raises
    ------
    optuna.TrialPruned
        From ``fit``: where the trial should be pruned, and at the beginning of any later fit of
        the same trial. ``cross_val_score`` takes it for a failed fold and returns NaN unless it is
        called with ``error_score="raise"``.
    ValueError
        From ``fit``: if the history lacks `monitor`, or in another process than the trial's.

    Notes
    -----
    A mean over folds needs one process: the folds of a trial run one after another (``n_jobs=None``
    in ``cross_val_score``), trials side by side, as processes that share a study. A pickled copy
    has no trial: a fitted estimator can be stored with its callback, not fitted again.

    Examples
    --------
    >>> import optuna
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.model_selection import cross_val_score
    >>> from sklearn_medimb import SoftmaxClassifier
    >>> from sklearn_medimb.tuning import OptunaPruning
    >>> X, y = load_iris(return_X_y=True)
    >>> def objective(trial):
    ...     clf = SoftmaxClassifier(
    ...         lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True), max_epochs=2, random_state=0,
    ...         early_stopping=True, callbacks=[OptunaPruning(trial)])
    ...     return cross_val_score(clf, X, y, cv=2, error_score="raise").mean()
    >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
    >>> study = optuna.create_study(direction="maximize")
    >>> study.optimize(objective, n_trials=1)
    >>> list(study.trials[0].intermediate_values)
    [1, 2, 3, 4]
    """

    def __init__(self, trial: Trial | None, monitor: str = "valid_score") -> None:
        self.trial = trial
        self.monitor = monitor
        self.shared_ = SimpleNamespace(folds=[], pruned=False)
        self.fold_: list[float] = []

    def __sklearn_clone__(self) -> OptunaPruning:
        copied = type(self)(self.trial, self.monitor)
        copied.shared_ = self.shared_
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> OptunaPruning:
        return self.__sklearn_clone__()

    def __reduce__(self) -> Any:
        # Another process would report the same steps again, of its own folds only.
        return type(self), (None, self.monitor)

    def on_train_begin(self, net: Any, X: Any = None, y: Any = None, **kwargs: Any) -> None:
        """End at once where there is nothing to report to."""
        if self.trial is None:
            raise ValueError(
                "OptunaPruning has lost its trial on the way to another process, where folds could "
                "not be averaged: run the folds one after another (n_jobs=None), and trials in "
                "several processes that share a study."
            )
        if self.shared_.pruned:
            self._prune("An earlier fold was pruned.")

    def on_epoch_end(self, net: Any, *args: Any, **kwargs: Any) -> None:
        """Report the mean over the folds; ask whether to go on."""
        row = net.history[-1]
        if self.monitor not in row:
            names = [k for k, v in row.items() if isinstance(v, float) and k != "dur"]
            raise ValueError(
                f"monitor={self.monitor!r} is not in the history, which has {sorted(names)}."
            )
        folds = self.shared_.folds
        if not self.fold_:
            folds.append(self.fold_)
        self.fold_.append(float(row[self.monitor]))
        reached = [fold[: len(self.fold_)][-1] for fold in folds]
        step = sum(map(len, folds))
        assert self.trial is not None
        self.trial.report(sum(reached) / len(reached), step)
        if self.trial.should_prune():
            self.shared_.pruned = True
            self._prune(f"Pruned in fold {len(folds)}, epoch {len(self.fold_)}.")

    def _prune(self, message: str) -> None:
        from optuna import TrialPruned

        raise TrialPruned(message)
