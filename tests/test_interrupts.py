"""Ctrl-C, wherever it arrives: nothing that was cut short passes for complete."""

from __future__ import annotations

import signal
from contextlib import contextmanager

import numpy as np
import pytest
from joblib import Parallel, delayed
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.utils.validation import check_is_fitted
from skorch.callbacks import Callback

from sklearn_medimb import LMDClassifier, MetricTwoStageClassifier, SoftmaxClassifier
from sklearn_medimb._training.callbacks import BestEpoch, SaveCheckpoint, SklearnCallbacks
from sklearn_medimb._training.net import Net
from tests.estimators import TRAINED, WITH_ALL_STAGES
from tests.helpers import make_blobs


def test_every_estimator_is_here():
    assert set(WITH_ALL_STAGES) == set(TRAINED)


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


def at_batch(wanted, act=press_ctrl_c):
    """A callback of the user during which something happens, and the stage of each batch."""
    stages = []

    class Watch(Callback):
        def on_batch_end(self, net, **kwargs):
            stages.append(net.stage)
            if len(stages) == wanted:
                act()

    return Watch(), stages


@contextmanager
def at_step(wanted):
    """Ctrl-C in a step of training; gives the stages of the steps."""
    stages, plain = [], Net.train_step_single

    def train_step_single(net, batch, **params):
        stages.append(net.stage)
        if len(stages) == wanted:
            press_ctrl_c()
        return plain(net, batch, **params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Net, "train_step_single", train_step_single)
        yield stages


@pytest.mark.parametrize("name", WITH_ALL_STAGES)
def test_in_the_last_batch_of_any_stage(name, blobs, tmp_path):
    with at_step(None) as stages:
        whole = WITH_ALL_STAGES[name]().fit(*blobs)
    ends = [i for i, stage in enumerate(stages, 1) if [stage] != stages[i : i + 1]]
    names = [stages[end - 1] for end in ends]
    assert len(ends) == len(set(stages)) == len({row.get("stage") for row in whole.history_})
    for number, end in enumerate(ends):
        cut = WITH_ALL_STAGES[name]().set_params(checkpoint_dir=tmp_path)
        with at_step(end) as seen, pytest.warns(UserWarning, match="interrupted"):
            cut.fit(*blobs)
        assert len(seen) == end  # no further stage
        assert set(seen) == set(names[: number + 1])
        assert np.isfinite(cut.transform(blobs[0])).all()
        assert len(list(tmp_path.iterdir())) == 1
        with at_step(None) as seen:
            resumed = WITH_ALL_STAGES[name]().set_params(checkpoint_dir=tmp_path).fit(*blobs)
        assert len(stages) - end < len(seen) <= len(stages) - end + 2  # one epoch again
        assert not list(tmp_path.iterdir())
        assert resumed.n_iter_ == whole.n_iter_
        for key, array in whole.weights_.items():
            assert np.array_equal(resumed.weights_[key], array), (key, names[number])


def test_in_a_callback_of_the_user(tiny, blobs, tmp_path):
    # Which may also end a training, by raising the same exception.
    watch, _ = at_batch(12)
    clf = SoftmaxClassifier(**tiny, checkpoint_dir=tmp_path, callbacks=[watch])
    with pytest.warns(UserWarning, match="interrupted in epoch 3 of 3;"):
        clf.fit(*blobs)
    assert len(list(tmp_path.iterdir())) == 1


PLACES = {  # where else the signal may arrive, once something was learned
    "after the last epoch": (Callback, "on_train_end"),
    "while validation rows are scored": (BestEpoch, "on_epoch_end"),
    "while a checkpoint is written": (SaveCheckpoint, "on_epoch_end"),
    "in a callback of scikit-learn": (SklearnCallbacks, "on_epoch_end"),
    "between stages": (LMDClassifier, "_run_stage"),
}


@pytest.mark.parametrize("place", PLACES)
def test_outside_of_a_step(place, tiny, blobs, tmp_path, monkeypatch):
    params = {**tiny, "n_rounds": 3, "early_stopping": True, "checkpoint_dir": tmp_path}
    cls, method = PLACES[place]
    plain, calls = getattr(cls, method), []

    def late(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 2:
            press_ctrl_c()
        return plain(self, *args, **kwargs)

    whole = LMDClassifier(**params, callbacks=[Callback()]).fit(*blobs)
    monkeypatch.setattr(cls, method, late)
    with pytest.warns(UserWarning, match="interrupted"):
        cut = LMDClassifier(**params, callbacks=[Callback()]).fit(*blobs)
    assert cut.predict(blobs[0]).shape == (60,)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    resumed = LMDClassifier(**params).fit(*blobs)
    assert np.array_equal(resumed.predict_proba(blobs[0]), whole.predict_proba(blobs[0]))


@pytest.mark.parametrize("method", ["_normalise", "_fit_head", "_check_training"])
def test_without_which_there_is_no_estimator(method, tiny, blobs, tmp_path, monkeypatch):
    def interrupted(self, *args, **kwargs):
        press_ctrl_c()

    monkeypatch.setattr(MetricTwoStageClassifier, method, interrupted)
    clf = MetricTwoStageClassifier(**tiny, checkpoint_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        clf.fit(*blobs)
    with pytest.raises(NotFittedError):
        check_is_fitted(clf)
    assert len(list(tmp_path.iterdir())) == (method == "_fit_head")  # nothing trained is lost
    monkeypatch.undo()
    whole = MetricTwoStageClassifier(**tiny).fit(*blobs)
    again = clf.fit(*blobs)
    assert np.array_equal(again.predict_proba(blobs[0]), whole.predict_proba(blobs[0]))


def test_while_a_head_is_refitted(tiny, blobs, monkeypatch):
    clf = MetricTwoStageClassifier(**tiny).fit(*blobs)
    before = clf.predict_proba(blobs[0])
    monkeypatch.setattr(clf, "_fit_head", lambda *args: press_ctrl_c())
    with pytest.raises(KeyboardInterrupt):
        clf.refit_head(*blobs, rebalance="ncm")
    assert np.array_equal(clf.predict_proba(blobs[0]), before)


def test_in_partial_fit(tiny, blobs):
    watch, seen = at_batch(7)
    clf = SoftmaxClassifier(**tiny, callbacks=[watch]).partial_fit(*blobs)
    before = clf.weights_
    with pytest.warns(UserWarning, match="interrupted"):
        clf.partial_fit(*blobs)
    assert len(seen) == 7
    assert clf.n_iter_ == 2
    assert any(not np.array_equal(before[k], v) for k, v in clf.weights_.items())


def test_a_callback_that_stops_in_the_last_epoch_ends_its_stage_alone(tiny, blobs, tmp_path):
    class Stop(Callback):
        def on_epoch_end(self, net, **kwargs):
            if len(net.history) == 3:
                raise KeyboardInterrupt

    clf = LMDClassifier(**tiny, n_rounds=3, checkpoint_dir=tmp_path, callbacks=[Stop()]).fit(*blobs)
    assert len(clf.stage1_history_) == 3
    assert clf.n_iter_ == 5
    assert not list(tmp_path.iterdir())


def test_nothing_learned_is_no_estimator(tiny, blobs, monkeypatch):
    monkeypatch.setattr(SoftmaxClassifier, "_run_stage", lambda *args: press_ctrl_c())
    clf = SoftmaxClassifier(**tiny)
    with pytest.raises(KeyboardInterrupt):
        clf.fit(*blobs)
    assert not hasattr(clf, "classes_")


def test_a_search_ends(tiny, blobs):
    # An estimator that was cut short must not be scored as one of the candidates.
    watch, seen = at_batch(3)
    search = GridSearchCV(SoftmaxClassifier(**tiny, callbacks=[watch]), {"lr": [1e-3, 1e-2]}, cv=2)
    with pytest.raises(KeyboardInterrupt):
        search.fit(*blobs)
    assert len(seen) == 3
    assert not hasattr(search, "best_score_")


def test_a_study_ends(tiny, blobs):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    watch, seen = at_batch(3)

    def objective(trial):
        return SoftmaxClassifier(**tiny, callbacks=[watch]).fit(*blobs).score(*blobs)

    study = optuna.create_study()
    with pytest.raises(KeyboardInterrupt):
        study.optimize(objective, n_trials=3)
    assert len(seen) == 3
    assert not study.get_trials(states=[optuna.trial.TrialState.COMPLETE])


def test_a_worker_process_does_not_go_on(tiny):
    def fit():  # Ctrl-C in a terminal reaches every worker, too
        watch, seen = at_batch(3)
        try:
            SoftmaxClassifier(**tiny, callbacks=[watch]).fit(*make_blobs())
        except KeyboardInterrupt:
            return len(seen)

    assert Parallel(n_jobs=2)(delayed(fit)() for _ in range(2)) == [3, 3]


def test_the_handler_of_the_caller_stays(tiny, blobs):
    heard = []
    before = signal.signal(signal.SIGINT, lambda *args: heard.append(args))
    try:
        ours = signal.getsignal(signal.SIGINT)
        watch, _ = at_batch(2)
        clf = SoftmaxClassifier(**tiny, callbacks=[watch]).fit(*blobs)  # whose choice is to go on
        assert len(heard) == 1
        assert clf.n_iter_ == 3
        assert signal.getsignal(signal.SIGINT) is ours
    finally:
        signal.signal(signal.SIGINT, before)
