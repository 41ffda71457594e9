"""Search spaces, pruning across folds, and studies that outlive their process."""

from __future__ import annotations

import copy
import math
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import optuna
import pytest
from imblearn.over_sampling import RandomOverSampler
from imblearn.pipeline import make_pipeline as make_imblearn_pipeline
from optuna.distributions import CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import FitFailedWarning
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_medimb import (
    AMIMVClassifier,
    AMIMVEncoder,
    BalancedBatchSampler,
    BalancedVirtualFeatures,
    ClassifierRetraining,
    LMDClassifier,
    MetricTwoStageClassifier,
    NearestClassMean,
    SoftmaxClassifier,
    SPMixClassifier,
    SPMixSampler,
)
from sklearn_medimb.augment import Augmentation
from sklearn_medimb.backbones import MLP, ConvNet, HybridViT, ResNet, ViT
from sklearn_medimb.losses import FocalLoss
from sklearn_medimb.methods import Contrast
from sklearn_medimb.rebalance import RebalancedHead
from sklearn_medimb.tuning import OptunaPruning, search_space, suggest
from tests.estimators import PUBLIC, by_default
from tests.helpers import make_blobs

optuna.logging.set_verbosity(optuna.logging.WARNING)

HELD = {"MLP": MLP, "ResNet": ResNet, "ViT": ViT, "HybridViT": HybridViT, "Augment": Augmentation}

# Every other constructor parameter has a range: a new one needs a decision.
NOT_SEARCHED = {
    "seeds and the machine": {
        "random_state", "device", "precision", "compile", "verbose", "checkpoint_dir", "memory",
    },
    "the layout of X": {"image_shape", "data_format", "spatial_dims"},
    "budgets, and how epochs are chosen": {
        "max_epochs", "early_stopping", "validation_fraction", "n_iter_no_change", "scoring",
        "pair_view",
    },
    "what a user builds around": {"callbacks", "warm_start", "net_params", "backbone_lr"},
    "known of the images, or by auto of the start": {
        "image_size", "normalize", "fine_tune", "layer_decay", "ema", "n_views",
    },
    "another method": {"backbone", "pretrain", "sampler", "contrast", "stages"},
    "tuples, and names of the backbone's layers": {"thresholds", "mix_layer"},
    "for study only: NaN in small batches": {"exact_mimv_loss"},
}  # fmt: skip
# Parameters that a default forbids are searched where it is set.
VARIANTS = {
    "SPMixClassifier": [SPMixClassifier(contrast=Contrast()), SPMixClassifier(contrast="supcon")],
    "MetricTwoStageClassifier": [MetricTwoStageClassifier(margin=0.3)],
}


@pytest.fixture
def vectors():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], [20, 12, 8])
    return rng.normal(size=(40, 5)) + y[:, None], y


def clf_on_vectors(**params):
    return SoftmaxClassifier(**{"max_epochs": 1, "random_state": 0, **params})


def draws(space, n, seed=0):
    """Points of a space, at random."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [study.ask(space).params for _ in range(n)]


def contains(distribution, value):
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    return distribution.low <= value <= distribution.high


# ---------------------------------------------------------------- spaces


@pytest.mark.parametrize("name", PUBLIC)
def test_every_parameter_is_searched_or_left_out_for_a_reason(name):
    made = [PUBLIC[name](), *VARIANTS.get(name, [])]
    searched = {key.split("__")[0] for e in made for key in search_space(e)} - {"contrast"}
    params = set(made[0].get_params(deep=False))
    left_out = set().union(*NOT_SEARCHED.values())
    assert searched <= params
    assert not searched & left_out
    assert not params - searched - left_out, "give it search=..., or a reason here"


def test_left_out_parameters_exist():
    params = set().union(*(cls().get_params(deep=False) for cls in PUBLIC.values()))
    assert set().union(*NOT_SEARCHED.values()) <= params


@pytest.mark.parametrize("name", [*PUBLIC, *HELD])
def test_class_and_default_instance_have_the_same_space_around_the_defaults(name):
    cls = {**PUBLIC, **HELD}[name]
    space, defaults = search_space(cls), cls().get_params()
    assert space == search_space(cls())
    for parameter, distribution in space.items():
        given = defaults[parameter] != "auto" or isinstance(distribution, CategoricalDistribution)
        assert not given or contains(distribution, defaults[parameter]), parameter


@pytest.mark.parametrize("name", PUBLIC)
def test_any_point_of_a_space_is_valid(name):
    for estimator in [PUBLIC[name](), *VARIANTS.get(name, [])]:
        for params in draws(search_space(estimator), 30):
            candidate = clone(estimator).set_params(**params)
            candidate._validate_params()
            if hasattr(candidate, "_check_parameters"):
                candidate._check_parameters()


@pytest.mark.parametrize("name", PUBLIC)
def test_a_point_of_a_space_fits(name, vectors):
    X, y = vectors
    estimator = by_default(name)
    estimator.set_params(**draws(search_space(estimator), 1)[0])
    small = {"max_epochs": 1, "n_per_class": 50, "n_rounds": 2, "random_state": 0}
    estimator.set_params(**{k: v for k, v in small.items() if k in estimator.get_params()})
    if name == "AMIMVClassifier":
        estimator.set_params(pretrain=AMIMVEncoder(max_epochs=1))
    if name in ("SPMixClassifier", "SPMixSampler", "SaliencyMap"):
        X, y = make_blobs((12, 6), size=16)
    if hasattr(estimator, "fit_resample"):
        assert len(estimator.fit_resample(X, y)[1]) >= len(y)
    else:
        estimator.fit(X, y)


@pytest.mark.parametrize("backbone", [ResNet(width=16), ViT(depth=2), HybridViT(depth=2)])
def test_backbones_and_augmentations_fit(backbone):
    X, y = make_blobs((6, 6), size=8)
    clf = clf_on_vectors(backbone=backbone, augment=Augmentation())
    space = search_space(clf)
    assert {name.split("__")[0] for name in space if "__" in name} == {"backbone", "augment"}
    (params,) = draws({k: v for k, v in space.items() if "__" in k}, 1)
    params |= {"backbone__width": 16} if isinstance(backbone, ResNet) else {"backbone__depth": 2}
    clf.set_params(**params).fit(X, y)


def test_spaces_can_be_stored():
    for cls in PUBLIC.values():
        for distribution in search_space(cls).values():
            for choice in getattr(distribution, "choices", ()):
                assert choice is None or type(choice) in (bool, int, float, str)


def test_objects_of_the_package_add_their_own_spaces():
    clf = MetricTwoStageClassifier(
        sampler=SPMixSampler(), rebalance=ClassifierRetraining(), pretrain=AMIMVEncoder()
    )
    space = search_space(clf)
    assert space["sampler__cap"] == search_space(SPMixSampler)["cap"]
    assert {"rebalance__alpha", "pretrain__temperature", "lr"} <= set(space)
    assert "rebalance" not in space  # a name would take the object's place
    for params in draws(space, 5):
        clone(clf).set_params(**params)


def test_what_was_chosen_on_purpose_stays():
    clf = MetricTwoStageClassifier(
        metric_loss=math.dist, rebalance=LogisticRegression(), class_weight={0: 2}, lr=5e-6
    )
    space = search_space(clf)
    assert not {"metric_loss", "rebalance", "class_weight", "lr"} & set(space)
    assert "weight_decay" in space
    assert "augment" not in search_space(SoftmaxClassifier(augment=lambda images: images))


def test_a_start_has_nothing_to_search(vectors):
    fitted = clf_on_vectors().fit(*vectors)
    plain = set(search_space(SoftmaxClassifier))
    for start in (fitted, FrozenEstimator(fitted), ConvNet()):
        assert set(search_space(SoftmaxClassifier(backbone=start))) == plain
    encoder = AMIMVEncoder(max_epochs=1).fit(vectors[0])
    assert set(search_space(SoftmaxClassifier(pretrain=encoder))) == plain
    unfitted = AMIMVEncoder(backbone=ResNet())  # its backbone gives way to the classifier's
    assert not any("depth" in name for name in search_space(SoftmaxClassifier(pretrain=unfitted)))


def test_pipelines_and_meta_estimators_prefix():
    pipe = make_imblearn_pipeline(
        StandardScaler(), BalancedVirtualFeatures(), "passthrough", ClassifierRetraining()
    )
    space = search_space(pipe)
    assert {name.split("__")[0] for name in space} == {
        "balancedvirtualfeatures", "classifierretraining",
    }  # fmt: skip
    pipe.set_params(**draws(space, 1)[0])
    nested = Pipeline([("outer", make_pipeline(SoftmaxClassifier(sampler=SPMixSampler())))])
    assert "outer__softmaxclassifier__sampler__cap" in search_space(nested)
    assert "estimator__lr" in search_space(CalibratedClassifierCV(SoftmaxClassifier()))


def test_parameters_that_exclude_each_other():
    plain, gpaco = search_space(SPMixClassifier), search_space(SPMixClassifier(contrast=Contrast()))
    ours = {"contrast__weight", "contrast__key_momentum"}
    assert "loss" in plain
    assert not ours & set(plain)
    assert {*ours, "class_weight", "post_hoc_tau"} <= set(gpaco)
    assert "loss" not in gpaco
    assert "loss" not in search_space(SPMixClassifier(contrast="gpaco"))
    assert "loss__gamma" in search_space(SoftmaxClassifier(loss=FocalLoss()))
    soft = search_space(MetricTwoStageClassifier(margin="soft"))
    assert not {"margin", "metric_loss"} & set(soft)
    assert "loss" in search_space(SPMixClassifier(contrast="supcon"))


def test_a_subclass_has_the_space_of_its_parent():
    class Mine(NearestClassMean):
        pass

    assert search_space(Mine()) == search_space(NearestClassMean)


@pytest.mark.parametrize(
    "unknown",
    [
        LogisticRegression, LogisticRegression(), make_pipeline(StandardScaler()), "softmax", None,
        BalancedBatchSampler, RebalancedHead, ConvNet(),
    ],
)  # fmt: skip
def test_unknown_objects_are_refused_with_what_is_known(unknown):
    with pytest.raises(TypeError, match=r"no search space: pass an estimator.*search=.*pipeline"):
        search_space(unknown)


def test_suggest_draws_from_the_space_as_it_is():
    space = search_space(LMDClassifier)
    study = optuna.create_study()
    trial = study.ask()
    params = suggest(trial, space)
    assert list(params) == list(space)
    assert trial.distributions == space
    assert trial.params == params


# ---------------------------------------------------------------- pruning


class RecordingTrial:
    """Stands in for a trial: remembers the reports, prunes at a given step."""

    def __init__(self, prune_at=None):
        self.reports = []
        self.prune_at = prune_at

    def report(self, value, step):
        self.reports.append((step, value))

    def should_prune(self):
        return self.reports[-1][0] == self.prune_at


class FakeNet:
    def __init__(self):
        self.history = []


def train(callback, values):
    """One fold: a clone of the callback sees these values."""
    callback, net = clone(clone(callback), safe=False), FakeNet()
    callback.initialize().on_train_begin(net)
    for value in values:
        net.history.append({"valid_score": value})
        callback.on_epoch_end(net)


def test_the_trial_hears_the_mean_over_the_folds_so_far():
    trial = RecordingTrial()
    callback = OptunaPruning(trial)
    for values in ([0.2, 0.6, 0.4], [0.4], [0.6, 0.8, 0.7, 0.9]):
        train(callback, values)
    assert [step for step, _ in trial.reports] == list(range(1, 9))
    expected = [0.2, 0.6, 0.4]
    expected += [(0.2 + 0.4) / 2]
    expected += [(0.2 + 0.4 + 0.6) / 3, (0.6 + 0.4 + 0.8) / 3, (0.4 + 0.4 + 0.7) / 3]
    expected += [(0.4 + 0.4 + 0.9) / 3]  # two folds stopped before
    assert np.allclose([value for _, value in trial.reports], expected)


def test_once_pruned_later_fits_end_at_once():
    trial = RecordingTrial(prune_at=3)
    callback = OptunaPruning(trial)
    train(callback, [0.5, 0.5])
    with pytest.raises(optuna.TrialPruned, match="fold 2, epoch 1"):
        train(callback, [0.5])
    with pytest.raises(optuna.TrialPruned, match="earlier fold"):
        train(callback, [0.5])
    assert len(trial.reports) == 3


def test_copies_share_the_trial_and_the_folds():
    callback = OptunaPruning(RecordingTrial(), monitor="train_loss")
    clf = clf_on_vectors(callbacks=[callback])
    for copied in (clone(clf).callbacks[0], copy.deepcopy(callback)):
        assert copied is not callback
        assert copied.trial is callback.trial
        assert copied.monitor == "train_loss"
        assert copied.shared_ is callback.shared_


def test_folds_of_a_cross_validation_are_averaged(vectors):
    trial = RecordingTrial()
    clf = clf_on_vectors(max_epochs=2, early_stopping=True, callbacks=[OptunaPruning(trial)])
    pipe = make_imblearn_pipeline(RandomOverSampler(random_state=0), clf)
    cross_val_score(pipe, *vectors, cv=3, error_score="raise")
    assert [step for step, _ in trial.reports] == [1, 2, 3, 4, 5, 6]
    train_folds = clf.callbacks[0].shared_.folds
    assert len(train_folds) == 3
    assert trial.reports[-1][1] == pytest.approx(np.mean([fold[1] for fold in train_folds]))


def test_stages_of_one_fit_are_one_fold(vectors):
    trial = RecordingTrial()
    pretrain = AMIMVEncoder(max_epochs=2)
    scored = {"pretrain": pretrain, "fine_tune": "full", "max_epochs": 3, "early_stopping": True}
    AMIMVClassifier(**scored, callbacks=[OptunaPruning(trial)]).fit(*vectors)
    assert len(trial.reports) == 3  # no validation score while it pre-trains
    trial = RecordingTrial()
    callback = OptunaPruning(trial, monitor="train_loss")
    clf_on_vectors(pretrain=pretrain, callbacks=[callback]).fit(*vectors)
    assert len(trial.reports) == 3
    assert len(callback.shared_.folds) == 1


def test_an_encoder_is_pruned_by_its_probe(vectors):
    trial = RecordingTrial(prune_at=2)
    encoder = AMIMVEncoder(max_epochs=3, callbacks=[OptunaPruning(trial, monitor="knn_score")])
    with pytest.raises(optuna.TrialPruned):
        encoder.fit(*vectors)
    assert not hasattr(encoder, "net_")


def test_missing_monitor_is_named_with_what_there_is(vectors):
    clf = clf_on_vectors(callbacks=[OptunaPruning(RecordingTrial())])
    with pytest.raises(ValueError, match=r'early_stopping=True.*"valid_score".*"train_loss"'):
        clf.fit(*vectors)
    clf = clf_on_vectors(callbacks=[OptunaPruning(RecordingTrial(), monitor="f1")])
    with pytest.raises(ValueError, match=r"monitor='f1' is not .* \['train_loss'\]\.$"):
        clf.fit(*vectors)


def test_pruned_folds_become_nan_unless_errors_are_raised(vectors):
    clf = clf_on_vectors(callbacks=[OptunaPruning(RecordingTrial(1), monitor="train_loss")])
    with pytest.raises(optuna.TrialPruned):
        cross_val_score(clone(clf), *vectors, cv=2, error_score="raise")
    trial = RecordingTrial(2)
    clf = clf_on_vectors(callbacks=[OptunaPruning(trial, monitor="train_loss")])
    with pytest.warns(FitFailedWarning, match="TrialPruned"):
        scores = cross_val_score(clf, *vectors, cv=3)
    assert np.isnan(scores).tolist() == [False, True, True]
    assert len(trial.reports) == 2


def test_the_trial_does_not_travel_to_other_processes(vectors):
    trial = optuna.create_study().ask()  # its storage could not be pickled
    clf = clf_on_vectors(callbacks=[OptunaPruning(trial, monitor="train_loss")])
    sent = pickle.loads(pickle.dumps(clf))  # as cross_val_score(n_jobs=2) does
    with pytest.raises(ValueError, match=r"another process.*n_jobs=None"):
        cross_val_score(sent, *vectors, cv=2, error_score="raise")


def test_a_fitted_estimator_can_be_stored_with_its_callback(vectors):
    clf = clf_on_vectors(callbacks=[OptunaPruning(RecordingTrial(), monitor="train_loss")])
    loaded = pickle.loads(pickle.dumps(clf.fit(*vectors)))
    assert np.array_equal(loaded.predict(vectors[0]), clf.predict(vectors[0]))
    assert loaded.callbacks[0].monitor == "train_loss"


def test_a_study_prunes_its_bad_trials(vectors):
    X, y = vectors

    def objective(trial):
        clf = clf_on_vectors(
            lr=trial.suggest_categorical("lr", [1e-2, 1e-7]),
            max_epochs=4,
            early_stopping=True,
            callbacks=[OptunaPruning(trial)],
        )
        return cross_val_score(clf, X, y, cv=2, error_score="raise").mean()

    pruner = optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=2)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    for lr in (1e-2, 1e-2, 1e-7):
        study.enqueue_trial({"lr": lr})
    study.optimize(objective, n_trials=3)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "PRUNED"]
    assert len(study.trials[2].intermediate_values) < 8


# ---------------------------------------------------------------- OptunaSearchCV


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.filterwarnings("ignore:.optuna.terminator:FutureWarning")  # optuna-integration's own
def test_optuna_search_cv_alone_and_through_a_pipeline(vectors):
    integration = pytest.importorskip("optuna_integration")
    clf = clf_on_vectors()
    pipe = make_imblearn_pipeline(StandardScaler(), RandomOverSampler(random_state=0), clf)
    for estimator, prefix in ((clf, ""), (pipe, "softmaxclassifier__")):
        space = search_space(estimator)
        assert all(name.startswith(prefix) for name in space)
        search = integration.OptunaSearchCV(
            estimator, space, cv=2, n_trials=2, random_state=0, error_score="raise"
        ).fit(*vectors)
        assert set(search.best_params_) == set(space)
        best = search.best_estimator_.get_params()
        assert all(best[name] == value for name, value in search.best_params_.items())
        assert search.predict(vectors[0]).shape == (40,)


# ---------------------------------------------------------------- storage

STORAGES = {
    "sqlite": lambda folder: f"sqlite:///{folder / 'study.db'}",
    "journal": lambda folder: JournalStorage(JournalFileBackend(str(folder / "study.log"))),
    "postgresql": lambda folder: (folder / "url").read_text(),
}

N_EACH = 5
WORKER = """
import sys, time
from pathlib import Path
import sklearn_medimb.tuning
assert "optuna" not in sys.modules
from tests import test_tuning

def run(trial):
    if trial.number == 0:
        print("begins", flush=True)
    value = test_tuning.objective(trial)
    if len(study.get_trials(states=[test_tuning.TrialState.COMPLETE])) >= 2 * test_tuning.N_EACH:
        print("hangs", flush=True)
        time.sleep(600)
    return value

study = test_tuning.open_study(sys.argv[1], Path(sys.argv[2]))
study.optimize(run)
"""


def objective(trial):
    trial.set_user_attr("process", os.getpid())
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 20)
    X = rng.normal(size=(40, 5)) + y[:, None]
    clf = clf_on_vectors(early_stopping=True, callbacks=[OptunaPruning(trial)])
    space = {k: v for k, v in search_space(clf).items() if k in ("loss", "lr", "weight_decay")}
    return clf.set_params(**suggest(trial, space)).fit(X, y).best_score_


def open_study(kind, folder):
    return optuna.create_study(
        storage=STORAGES[kind](folder), study_name="s", load_if_exists=True, direction="maximize",
        sampler=optuna.samplers.RandomSampler(), pruner=optuna.pruners.NopPruner(),
    )  # fmt: skip


@contextmanager
def postgresql_server():
    """A PostgreSQL server of our own, behind a socket in a temporary folder; gives its URL."""
    pytest.importorskip("psycopg2", reason="needs a driver: pip install psycopg2-binary")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin")) if os.name == "posix" else []
    where = os.pathsep.join([*map(str, reversed(found)), os.environ.get("PATH", "")])
    initdb, pg_ctl = shutil.which("initdb", path=where), shutil.which("pg_ctl", path=where)
    if initdb is None or pg_ctl is None:
        pytest.skip("needs PostgreSQL's initdb and pg_ctl")
    with tempfile.TemporaryDirectory() as folder:
        as_user = {}
        if os.getuid() == 0:  # PostgreSQL refuses to run as root
            as_user = {"user": "nobody", "cwd": "/"}
            shutil.chown(folder, "nobody")
        data = f"{folder}/data"

        def run(*command):
            done = subprocess.run(command, capture_output=True, text=True, **as_user)
            assert done.returncode == 0, done.stdout + done.stderr

        run(initdb, "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync")
        options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
        run(pg_ctl, "-D", data, "-w", "-l", f"{folder}/log", "-o", options, "start")
        try:
            yield f"postgresql+psycopg2://postgres@/postgres?host={folder}"
        finally:
            run(pg_ctl, "-D", data, "-m", "immediate", "stop")


@pytest.fixture
def shared_folder(kind, tmp_path):
    if kind != "postgresql":
        yield tmp_path
        return
    with postgresql_server() as url:
        (tmp_path / "url").write_text(url)
        yield tmp_path


@pytest.mark.parametrize("kind", STORAGES)
def test_two_processes_share_a_study_and_one_killed_loses_nothing(kind, shared_folder):
    study = open_study(kind, shared_folder)
    command = [sys.executable, "-W", "ignore", "-c", WORKER, kind, shared_folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        try:
            assert worker.stdout.readline() == "begins\n"
            study.optimize(objective, n_trials=N_EACH)
            assert worker.stdout.readline() == "hangs\n"  # in the middle of a trial
        finally:
            worker.kill()

    shared = study.trials
    assert [trial.number for trial in shared] == list(range(len(shared)))
    finished = study.get_trials(states=[TrialState.COMPLETE])
    processes = [trial.user_attrs["process"] for trial in finished]
    assert processes.count(os.getpid()) == N_EACH
    assert processes.count(worker.pid) == len(finished) - N_EACH >= N_EACH
    assert len({trial.params["lr"] for trial in finished}) == len(finished)

    resumed = open_study(kind, shared_folder)
    (interrupted,) = resumed.get_trials(states=[TrialState.RUNNING])
    resumed.tell(interrupted.number, state=TrialState.FAIL)
    resumed.enqueue_trial(interrupted.params)
    resumed.optimize(objective, callbacks=[MaxTrialsCallback(len(finished) + 3)])

    after = open_study(kind, shared_folder).trials
    assert [trial.number for trial in after] == list(range(len(shared) + 3))
    complete = [trial for trial in after if trial.state is TrialState.COMPLETE]
    assert [trial for trial in complete if trial.number < len(shared)] == finished
    assert after[len(shared)].params == interrupted.params  # what was cut off ran again
