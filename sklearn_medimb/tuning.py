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
``study.enqueue_trial(trial.params)``, as ``examples/optuna_search.py`` does.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sklearn.frozen import FrozenEstimator
from skorch.callbacks import Callback

from sklearn_medimb.augment import Augmentation
from sklearn_medimb.backbones import MLP, HybridViT, ResNet, ViT
from sklearn_medimb.base._image_estimator import BaseImageEstimator
from sklearn_medimb.base._one_stage import LOSSES
from sklearn_medimb.methods._amimv import AMIMVClassifier, AMIMVEncoder
from sklearn_medimb.methods._cssn import CSSNClassifier
from sklearn_medimb.methods._lmd import LMDClassifier
from sklearn_medimb.methods._metric_two_stage import MetricTwoStageClassifier
from sklearn_medimb.methods._self_supervised import SSLEncoder
from sklearn_medimb.methods._softmax import SoftmaxClassifier
from sklearn_medimb.methods._spmix import SPMixClassifier
from sklearn_medimb.metric_losses import METRIC_LOSSES
from sklearn_medimb.over_sampling import BalancedVirtualFeatures, SPMixSampler
from sklearn_medimb.rebalance import (
    HEADS,
    BalancedSoftmax,
    ClassifierRetraining,
    LearnableWeightScaling,
    LogitAdjustment,
    NearestClassMean,
    TauNormalization,
    VirtualFeatureCalibration,
)
from sklearn_medimb.saliency import SaliencyMap

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial

__all__ = ["OptunaPruning", "search_space", "suggest"]

# ---------------------------------------------------------------- the tables

# A list holds choices; a tuple a range of floats or integers, both ends included, on a log scale
# where it says so. Left out are seeds, the machine, the layout of X, budgets (`max_epochs`,
# `n_iter_no_change`, and CSSN's `pair_view`, which multiplies them), what tuples express
# (`thresholds`, `widths`), and what makes another method of an estimator (`backbone`, `pretrain`,
# `sampler`, `contrast`, LMD's `stages`): give an instance that has it.

_OPTIMISER: dict[str, Any] = {
    "lr": (2e-4, 2e-2, "log"),
    "weight_decay": (1e-5, 1e-1, "log"),
    "lr_schedule": ["one_cycle", "cosine", "constant"],
}
_TRAINING = {
    **_OPTIMISER,
    "batch_size": (16, 128, "log"),
    "augment": ["none", "light", "medical", "strong"],
}
_PRETRAINING = {
    **_OPTIMISER,
    "batch_size": (32, 256, "log"),
    "augment": ["strong", "contrastive", "mimv"],
    "projection_dim": (64, 512, "log"),
}
_CLASS_WEIGHT = {"class_weight": [None, "balanced"]}
_LOSS = {
    "loss": list(LOSSES),
    "focal_gamma": (0.5, 5.0),
    "beta": [0.9, 0.99, 0.999, 0.9999],
    "max_margin": (0.1, 1.0),
    "tau": (0.0, 2.0),
    "reweight_after": ["auto", None, 0.5, 0.8],
}
_ONE_STAGE = {**_TRAINING, **_CLASS_WEIGHT, **_LOSS, "post_hoc_tau": (0.0, 2.0)}
_CONTRAST = {
    "w_con": (0.01, 1.0, "log"),
    "gamma": (0.1, 2.0),
    "temperature": (0.05, 1.0, "log"),
    "queue_size": ["auto", 0, 1024, 8192],
    "projection_dim": (64, 512, "log"),
    "projection_hidden": (256, 4096, "log"),
    "key_momentum": [None, 0.9, 0.99, 0.999],
}
_SALIENCY = {
    "saliency": ["fine_grained", "spectral_residual", "center"],
    "polarity": ["both", "dark", "bright"],
    "mask": [None, "auto"],
}
_MIXING = {
    **_SALIENCY,
    "cap": (0.5, 1.0),
    "floor": [None, 0.0, 0.25, 0.5],
    "mix_prob": (0.0, 1.0),
    "merge": ["patch", "pixel"],
    "partner_saliency": [True, False],
}
_GAUSSIANS = {
    "covariance": ["shrunk", "full", "diag", "tied"],
    "eps": (1e-3, 1.0, "log"),
}
_PENALTY = {"alpha": (1e-3, 10.0, "log")}
_M_STEP = {
    **_GAUSSIANS,
    **_PENALTY,
    "m_step": ["analytic", "sampled"],
    "n_per_class": (500, 20_000, "log"),
}
_TRANSFORMER = {
    "width": [96, 192, 384],
    "depth": (2, 12),
    "mlp_ratio": (2, 4),
    "dropout": (0.0, 0.3),
    "drop_path": (0.0, 0.3),
}

_SPACES: dict[type, dict[str, Any]] = {
    SoftmaxClassifier: {
        **_ONE_STAGE,
        "mixup": [None, "mixup", "balanced"],
        "mixup_alpha": (0.05, 2.0, "log"),
    },
    CSSNClassifier: {
        **_TRAINING,
        "lam": (0.3, 10.0, "log"),
        "soft_ratio": (0.0, 1.0),
        "class_loss_weight": (0.01, 0.9),
        "class_link": ["affine", "double_sigmoid"],
        "reference": ["none", "self"],
        "n_tokens": (4, 64, "log"),
        "scorer_hidden": (64, 512, "log"),
        "dropout": (0.0, 0.5),
        "pair_weighting": ["balanced", None],
        "aux_weight": ["auto", 0.0, 0.5, 2.0],
        "decision": ["auto", "patch", "combined"],
        "n_support": (3, 30),
        "support_strategy": ["random", "all", "medoid"],
        "n_support_draws": (1, 10),
        "symmetric": [False, True],
        "head_lr": [None, 5e-4, 2e-3, 5e-3],
        "batch_size": ["auto", 16, 32, 64],
    },
    MetricTwoStageClassifier: {
        **_TRAINING,
        **_CLASS_WEIGHT,
        "metric_loss": list(METRIC_LOSSES),
        "metric_weight": (0.03, 3.0, "log"),
        "ce_weight": [1.0, 0.0],
        "margin": (0.05, 2.0, "log"),
        "mining": ["hard", "semihard", "all"],
        "metric_head": ["mlp", "identity"],
        "embedding_dim": (32, 512, "log"),
        "metric_batch": ["balanced", "shared"],
        "p_classes": (2, 16),
        "k_samples": (2, 8),
        "rebalance": list(HEADS),
    },
    LMDClassifier: {
        **_TRAINING,
        **_CLASS_WEIGHT,
        **_M_STEP,
        "batch_relation_weight": (0.0, 3.0),
        "channel_relation_weight": (0.0, 3.0),
        "consistency_weight": (0.0, 3.0),
        "relation_start": (0.0, 0.5),
        "ema_decay": [0.9, 0.99, 0.999],
        "teacher_mode": ["train", "eval"],
        "n_rounds": (1, 20),
        "gce_q": (0.0, 1.0),
        "fdc": ["margin", "paper", None],
        "fdc_weight": (0.005, 0.5, "log"),
        "fdc_margin": (0.25, 4.0, "log"),
        "e_step_lr": (1e-5, 1e-3, "log"),
    },
    SPMixClassifier: {
        **_ONE_STAGE,
        **_MIXING,
        **_CONTRAST,
        "pairing": ["paper", "code"],
        "level": ["token", "image"],
    },
    AMIMVClassifier: {
        **_TRAINING,
        **_CLASS_WEIGHT,
        "head": list(HEADS),
        "fine_tune": [False, True],
    },
    AMIMVEncoder: {
        **_PRETRAINING,
        "pairing": ["asym_aug", "mimv", "source_target", "weak_strong"],
        "temperature": (0.05, 1.0, "log"),
        "momentum": (0.8, 0.999),
    },
    SSLEncoder: {
        **_PRETRAINING,
        "method": ["simclr", "moco", "byol", "simsiam", "barlow_twins", "vicreg"],
        "temperature": (0.05, 1.0, "log"),
        "momentum": (0.9, 0.999),
    },
    SPMixSampler: {
        **_MIXING,
        "sampling_strategy": ["auto", "minority"],
        "patch_size": ["auto", 4, 8, 16],
        "partners": ["head", "majority", "other", "any"],
    },
    BalancedVirtualFeatures: {
        **_GAUSSIANS,
        "sampling_strategy": ["auto", "minority"],
        "replace": [False, True],
        "n_per_class": [None, 500, 2000, 5000],
    },
    SaliencyMap: _SALIENCY,
    ClassifierRetraining: {**_PENALTY, **_CLASS_WEIGHT},
    LearnableWeightScaling: _PENALTY,
    TauNormalization: {**_PENALTY, "tau": (0.0, 2.0)},
    NearestClassMean: {"temperature": (0.01, 1.0, "log")},
    BalancedSoftmax: {**_PENALTY, **_CLASS_WEIGHT},
    LogitAdjustment: {**_PENALTY, "tau": (0.0, 2.0)},
    VirtualFeatureCalibration: {**_M_STEP, **_CLASS_WEIGHT},
    Augmentation: {
        "horizontal_flip": [0.0, 0.5],
        "vertical_flip": [0.0, 0.5],
        "rotation": (0.0, 180.0),
        "shear": (0.0, 15.0),
        "scale": (0.0, 0.3),
        "translate": (0.0, 0.2),
        "crop": (0.4, 1.0),
        "blur": (0.0, 2.0),
        "saturation": (0.0, 0.4),
        "hue": (0.0, 0.1),
        "gamma": (0.0, 0.5),
        "contrast": (0.0, 0.5),
        "brightness": (0.0, 0.5),
        "noise": (0.0, 0.1),
        "cutout": (0.0, 0.4),
    },
    MLP: {"activation": ["relu", "gelu", "tanh"], "dropout": (0.0, 0.5)},
    ResNet: {"depth": [18, 34, 50], "width": (16, 64, "log")},
    ViT: _TRANSFORMER,
    HybridViT: {**_TRANSFORMER, "resnet_depth": [18, 34, 50], "n_stages": (2, 4)},
}

# Parameters that other values of the estimator forbid: what a space offers must go together.
_ONLY_WHERE: dict[type, dict[str, Callable[[Any], bool]]] = {
    SPMixClassifier: {
        **dict.fromkeys(_CONTRAST, lambda clf: clf.contrast is not None),
        **dict.fromkeys(_LOSS, lambda clf: clf.contrast != "gpaco"),  # which is the loss then
    },
    MetricTwoStageClassifier: {
        "margin": lambda clf: clf.margin is not None,
        "metric_loss": lambda clf: clf.margin is None,  # not every loss has one
    },
}


# ---------------------------------------------------------------- search spaces


def search_space(estimator: Any) -> dict[str, BaseDistribution]:
    """Ranges in which to search the hyperparameters of an estimator.

    The parameters of a space go together in any combination and suit SQLite. Some matter only
    beside a certain value of another (`focal_gamma` with ``loss="focal"``): drop what a study need
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
    if isinstance(estimator, type) and estimator in _SPACES:
        estimator = estimator()
    known = hasattr(estimator, "get_params") and not isinstance(estimator, type)
    if not known or not (space := _collect(estimator)):
        names = ", ".join(cls.__name__ for cls in _SPACES)
        raise TypeError(
            f"{estimator!r} has no search space: pass a class or an instance of {names}, or a "
            "pipeline or meta-estimator that holds one."
        )
    return {name: _distribution(values) for name, values in space.items()}


def _collect(holder: Any) -> dict[str, Any]:
    """Table rows of an object and of what it holds."""
    cls = next((cls for cls in type(holder).__mro__ if cls in _SPACES), type(holder))
    forbidden = {name for name, goes in _ONLY_WHERE.get(cls, {}).items() if not goes(holder)}
    table = {k: row for k, row in _SPACES.get(cls, {}).items() if k not in forbidden}
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
    """Whether a row of a table contains a value."""
    if not isinstance(value, str | Real | None):
        return False
    if isinstance(values, list):
        return value in values
    return isinstance(value, Real) and values[0] <= value <= values[1]


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
