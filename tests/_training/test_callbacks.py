"""Loggers by name, skorch's own callbacks, progress."""

from __future__ import annotations

import fcntl
import os
import pickle
import struct
import sys
import termios
from types import SimpleNamespace

import numpy as np
import pytest
import skorch.callbacks
import torch
from sklearn.base import clone
from sklearn.model_selection import cross_val_score
from skorch.callbacks import Callback, EarlyStopping, EpochScoring, Freezer, Unfreezer

from sklearn_medimb import CSSNClassifier, LMDClassifier, SoftmaxClassifier, SSLEncoder
from sklearn_medimb.backbones import ConvNet
from tests.helpers import make_blobs


def scalars(folder, tag):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    assert tag in events.Tags()["scalars"]
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.mark.parametrize("Classifier", [SoftmaxClassifier, CSSNClassifier, LMDClassifier])
def test_tensorboard_shows_what_the_history_holds(Classifier, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    X, y = make_blobs()
    clf = Classifier(**tiny, callbacks="tensorboard").fit(X, y)
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith(Classifier.__name__)
    losses = {}
    for file in run.iterdir():  # a method of several stages writes several files
        losses.update(scalars(file, "Loss/train_loss"))
    assert [losses[step] for step in sorted(losses)] == pytest.approx(
        [row["train_loss"] for row in clf.history_], rel=1e-6
    )


def test_folds_write_runs_of_their_own_and_prediction_none(tiny, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    X, y = make_blobs()
    clf = SoftmaxClassifier(**tiny, callbacks=["tensorboard"], early_stopping=True)
    cross_val_score(clf, X, y, cv=2)
    assert len(list((tmp_path / "runs").iterdir())) == 2
    fitted = clone(clf).set_params(callbacks=None).fit(X, y).set_params(callbacks="tensorboard")
    pickle.loads(pickle.dumps(fitted)).predict(X)
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_mlflow_gets_parameters_and_every_epoch(tiny, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(tmp_path.as_uri())
    mlflow.set_experiment("lesions")
    try:
        X, y = make_blobs()
        clf = LMDClassifier(**tiny, callbacks="mlflow")
        with mlflow.start_run() as parent:
            clf.fit(X, y)
            assert mlflow.active_run().info.run_id == parent.info.run_id
        client = mlflow.MlflowClient()
        runs = client.search_runs([parent.info.experiment_id])
        (run,) = (run for run in runs if run.info.run_id != parent.info.run_id)
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.run_name == "LMDClassifier"
        assert run.info.status == "FINISHED"
        assert run.data.params["batch_size"] == "16"
        logged = client.get_metric_history(run.info.run_id, "train_loss")
        assert [metric.value for metric in sorted(logged, key=lambda m: m.step)] == pytest.approx(
            [row["train_loss"] for row in clf.history_]
        )
    finally:
        mlflow.set_tracking_uri(None)


def test_a_fit_that_fails_ends_its_run(tiny, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(tmp_path.as_uri())
    mlflow.set_experiment("lesions")

    class Fails(Callback):
        def on_epoch_end(self, net, **kwargs):
            raise RuntimeError("pruned")

    try:
        X, y = make_blobs()
        with pytest.raises(RuntimeError, match="pruned"):
            SoftmaxClassifier(**tiny, callbacks=["mlflow", Fails()]).fit(X, y)
        client = mlflow.MlflowClient()
        (experiment,) = client.search_experiments(filter_string="name = 'lesions'")
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.info.status == "FAILED"
    finally:
        mlflow.set_tracking_uri(None)


def test_unknown_names_are_refused(tiny):
    X, y = make_blobs()
    with pytest.raises(ValueError, match="'wandb' must be one of"):
        SoftmaxClassifier(**tiny, callbacks="wandb").fit(X, y)
    with pytest.raises(TypeError, match="callbacks must hold names or instances"):
        SoftmaxClassifier(**tiny, callbacks=[3]).fit(X, y)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_missing_packages_are_named(name, tiny, monkeypatch):
    import sys

    hidden = {"tensorboard": "torch.utils.tensorboard", "mlflow": "mlflow"}[name]
    monkeypatch.setitem(sys.modules, hidden, None)
    X, y = make_blobs()
    with pytest.raises(ImportError, match=f"pip install {name}"):
        SoftmaxClassifier(**tiny, callbacks=name).fit(X, y)


# ---------------------------------------------------------------- skorch's own callbacks


class Deaf:
    """An object that takes every call and attribute, as the run of some tracking server."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))

    def numbers(self):
        return [float(a) for _, args, _ in self.calls for a in args if isinstance(a, float)]


class FakeWriter(Deaf):
    def add_scalar(self, tag, scalar_value, global_step):
        self.calls.append((tag, (float(scalar_value),), {}))


class FakeMlflow(Deaf):
    def log_metric(self, run, key, value, step):
        self.calls.append((key, (float(value),), {}))


class FakeNeptune(Deaf):
    def __getitem__(self, key):
        return self

    def __setitem__(self, key, value):
        return None

    def append(self, value):
        self.calls.append(("append", (float(value),), {}))


def fake_run(name, monkeypatch):
    """Where a logger of this name can write to."""
    files = SimpleNamespace(File=SimpleNamespace(from_content=lambda text, extension: text))
    monkeypatch.setitem(sys.modules, "neptune", SimpleNamespace(types=files))
    monkeypatch.setitem(sys.modules, "neptune.types", files)
    kinds = {"TensorBoard": FakeWriter, "MlflowLogger": FakeMlflow, "NeptuneLogger": FakeNeptune}
    return kinds.get(name, Deaf)()


def logs_losses(clf, run):
    assert {round(row["train_loss"], 6) for row in clf.history_} <= {
        round(number, 6) for number in run.numbers()
    }


def stopped(clf, _):
    assert clf.n_iter_ == 2


def froze_the_backbone(clf, _):
    fresh = (
        SoftmaxClassifier(**PARAMS, callbacks=[Freezer("trunk.*")])
        .set_params(max_epochs=1)
        .fit(*make_blobs())
    )
    for name, weight in clf.weights_.items():
        if name.startswith("trunk.backbone"):
            assert np.array_equal(weight, fresh.weights_[name]), name
    assert not np.array_equal(clf.weights_["head.weight"], fresh.weights_["head.weight"])


def clipped(clf, _):
    free = SoftmaxClassifier(**PARAMS).fit(*make_blobs())
    assert not np.array_equal(free.weights_["head.weight"], clf.weights_["head.weight"])


def printed(clf, lines):
    assert any("train_loss" in line for line in lines.calls)
    assert len(lines.calls) % (2 + clf.n_iter_) == 0


def shrank(clf, _):
    assert np.abs(clf.weights_["head.weight"]).max() < 1e-2


def timed(clf, _):
    assert all(row["dur"] > 0 for row in clf.history_)


def nothing(clf, _):
    assert clf.n_iter_ == 3


PARAMS = {"backbone": ConvNet(widths=(8, 16)), "max_epochs": 3, "batch_size": 16, "random_state": 0}
SCORES = "early_stopping=True with scoring"


def zero(parameter):
    torch.nn.init.constant_(parameter, 0.0)


def make(name, *args, **kwargs):
    return lambda run: getattr(skorch.callbacks, name)(
        *(run if arg == "run" else arg for arg in args), **kwargs
    )


# What becomes of each: a message of what to use instead, or what shows that it works.
# A number of epochs, of an estimator of one stage; the object that it writes to.
SKORCH = {
    "BatchScoring": [(make("BatchScoring", "accuracy"), SCORES)],
    "Callback": [(make("Callback"), nothing)],
    "Checkpoint": [
        (make("Checkpoint"), "checkpoint_dir"),
        (make("Checkpoint", monitor=None), "persistence.save"),
    ],
    "EarlyStopping": [
        (make("EarlyStopping"), 'monitor="train_loss"'),
        (make("EarlyStopping", "valid_score"), "early_stopping=True"),
        (make("EarlyStopping", "valid_acc"), "early_stopping=True"),
        (make("EarlyStopping", "train_loss", patience=1, threshold=9.0), stopped),
    ],
    "EpochScoring": [
        (make("EpochScoring", "accuracy"), SCORES),
        (make("EpochScoring", "accuracy", on_train=True), SCORES),
    ],
    "EpochTimer": [(make("EpochTimer"), timed)],
    "Freezer": [
        (make("Freezer", "trunk.*"), froze_the_backbone),
        (make("Freezer", "backbone.*"), r"fit no parameter; there are head.bias"),
    ],
    "GradientNormClipping": [(make("GradientNormClipping", 1e-9), clipped)],
    "Initializer": [(make("Initializer", "head.weight", fn=zero), nothing)],
    "InputShapeSetter": [(make("InputShapeSetter"), "shape of X")],
    "LRScheduler": [(make("LRScheduler"), "lr_schedule")],
    "LoadInitState": [(make("LoadInitState", None), "warm_start")],
    "MlflowLogger": [
        (
            make(
                "MlflowLogger",
                SimpleNamespace(info=SimpleNamespace(run_id="")),
                "run",
                create_artifact=False,
            ),
            logs_losses,
        )
    ],
    "NeptuneLogger": [
        (make("NeptuneLogger", "run", close_after_train=False), logs_losses),
        (make("NeptuneLogger", "run"), "close_after_train=False"),
    ],
    "ParamMapper": [
        (make("ParamMapper", "head.*", fn=zero, at=3), nothing),
        (make("ParamMapper", "classifier.*", fn=zero), "fit no parameter"),
    ],
    "PassthroughScoring": [(make("PassthroughScoring", "x"), "history.record")],
    "PrintLog": [
        (make("PrintLog"), "verbose=1"),
        (lambda run: skorch.callbacks.PrintLog(sink=run.calls.append), printed),
    ],
    "ProgressBar": [
        (make("ProgressBar"), "verbose=1"),
        (make("ProgressBar", "count"), nothing),
    ],
    "SacredLogger": [(make("SacredLogger", "run"), logs_losses)],
    "TensorBoard": [(make("TensorBoard", "run"), logs_losses)],
    "TrainEndCheckpoint": [(make("TrainEndCheckpoint"), "persistence.save")],
    "Unfreezer": [(make("Unfreezer", "trunk.*"), nothing)],
    "WandbLogger": [
        (make("WandbLogger", "run"), "save_model=False"),
        (make("WandbLogger", "run", save_model=False), nothing),
    ],
    "WarmRestartLR": [],  # a course of learning rates for LRScheduler, no callback
}
CASES = [(name, i) for name, cases in SKORCH.items() for i in range(len(cases))]


def test_every_callback_of_skorch_is_here():
    assert set(SKORCH) == set(skorch.callbacks.__all__)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_callbacks_of_skorch_work_or_name_what_does(name, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_callback, expected = SKORCH[name][case]
    run = fake_run(name, monkeypatch)
    callback = make_callback(run)
    clf = SoftmaxClassifier(**PARAMS, callbacks=[callback])
    if isinstance(expected, str):
        epochs = []
        clf.callbacks.append(Spy(epochs))
        with pytest.raises(ValueError, match=expected) as caught:
            clf.fit(*make_blobs())
        assert name in str(caught.value)
        assert not epochs
        assert not hasattr(clf, "net_")
    else:
        expected(clf.fit(*make_blobs()), run)
        expected(clf.fit(*make_blobs()), run)  # it is fresh for each fit
        pickle.loads(pickle.dumps(clf.set_params(callbacks=None))).predict(make_blobs()[0])
    assert not list(tmp_path.iterdir())


class Spy(Callback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_batch_begin(self, net, **kwargs):
        self.epochs.append(len(net.history))


@pytest.mark.parametrize(
    ("name", "case"), [(n, i) for n, i in CASES if SKORCH[n][i][1] is logs_losses]
)
def test_loggers_take_estimators_of_several_stages(name, case, monkeypatch):
    run = fake_run(name, monkeypatch)
    callback = SKORCH[name][case][0](run)
    logs_losses(LMDClassifier(**PARAMS, n_rounds=2, callbacks=[callback]).fit(*make_blobs()), run)


def test_subclasses_are_refused_as_their_parents_are(tiny, blobs):
    class Mine(EpochScoring):
        pass

    with pytest.raises(ValueError, match="Mine does not work in SSLEncoder: use early"):
        SSLEncoder(**tiny, callbacks=[Mine("accuracy")]).fit(blobs[0])


def test_validation_scores_can_be_watched(tiny, blobs):
    watch = EarlyStopping("valid_score", lower_is_better=False, patience=1)
    params = {**tiny, "max_epochs": 9, "scoring": lambda *args: 0.5, "callbacks": [watch]}
    assert SoftmaxClassifier(**params, early_stopping=True).fit(*blobs).n_iter_ == 2
    SoftmaxClassifier(**params, early_stopping=True).partial_fit(*blobs)  # holds nothing out
    with pytest.raises(ValueError, match="use early_stopping=True"):
        SoftmaxClassifier(**params).fit(*blobs)
    watch.lower_is_better = True
    with pytest.raises(ValueError, match="use lower_is_better=False"):
        SoftmaxClassifier(**params, early_stopping=True).fit(*blobs)


@pytest.mark.parametrize(
    "read",
    [
        lambda net: net.history[-1, "valid_loss"],
        lambda net: net.history[-1]["valid_loss"],
        lambda net: net.history[:, "valid_loss"],
        lambda net: net.history[-1, "batches", -1, "train_loss"],
    ],
)
def test_a_key_that_the_history_lacks(read, tiny, blobs):
    class Reads(Callback):
        def on_epoch_end(self, net, **kwargs):
            read(net)

    with pytest.raises(
        ValueError, match=r"Reads failed .*\['dur', 'epoch', 'train_loss'\].*early_st"
    ):
        SoftmaxClassifier(**tiny, callbacks=[Reads()]).fit(*blobs)


def test_a_callback_may_have_more_attributes_than_parameters(tiny, blobs):
    class Recorder(Callback):
        def __init__(self):
            self.losses = []

        def on_epoch_end(self, net, **kwargs):
            self.losses.append(net.history[-1, "train_loss"])

    recorder = Recorder()
    clf = SoftmaxClassifier(**tiny, callbacks=[recorder]).fit(*blobs)
    assert recorder.losses == [row["train_loss"] for row in clf.history_]


def test_what_was_frozen_can_thaw(tiny, blobs):
    callbacks = [Freezer("trunk.*", at=1), Unfreezer("trunk.*", at=2)]
    seen = []

    class Watch(Callback):
        def on_epoch_end(self, net, **kwargs):
            state = net.module_.trunk.state_dict()
            seen.append({name: value.clone() for name, value in state.items()})

    SoftmaxClassifier(**tiny, callbacks=[*callbacks, Watch()]).fit(*blobs)
    frozen = SoftmaxClassifier(**tiny, callbacks=[Freezer("trunk.*")]).fit(*blobs)
    start = frozen.net_.module_.trunk.state_dict()
    assert all(torch.equal(seen[0][name], value) for name, value in start.items())
    assert not any(
        torch.equal(seen[1][name], value) for name, value in start.items() if "weight" in name
    )


def test_everything_frozen_is_refused(tiny, blobs):
    with pytest.raises(ValueError, match="nothing to train"):
        SoftmaxClassifier(**tiny, callbacks=[Freezer("*")]).fit(*blobs)


# ---------------------------------------------------------------- progress


@pytest.mark.parametrize("n_epochs", [1, 3, 25])
def test_a_file_gets_lines_now_and_then(n_epochs, tiny, blobs, capsys):
    clf = SoftmaxClassifier(**{**tiny, "max_epochs": n_epochs, "batch_size": 64}, verbose=1)
    clf.fit(*blobs)
    err = capsys.readouterr().err
    assert "\r" not in err
    lines = err.splitlines()
    assert min(n_epochs, 10) <= len(lines) <= 11
    assert f"{n_epochs}/{n_epochs} steps" in lines[-1]
    assert f"loss={clf.history_[-1]['train_loss']:.4f}" in lines[-1]
    assert f"epoch={n_epochs}" in lines[-1]


def test_a_file_gets_the_last_epoch_of_a_fit_that_stops(tiny, blobs, capsys):
    stop = EarlyStopping("train_loss", patience=1, threshold=9.0, sink=skorch.utils.noop)
    params = {**tiny, "max_epochs": 100, "verbose": 1, "callbacks": [stop]}
    SoftmaxClassifier(**params).fit(*blobs)
    assert "epoch=2" in capsys.readouterr().err.splitlines()[-1]


def test_a_terminal_gets_a_bar(tiny, blobs, monkeypatch):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        SoftmaxClassifier(**tiny, verbose=1).fit(*blobs)
        monkeypatch.undo()
        shown = os.read(ours, 2**16).decode()
    os.close(ours)
    assert "\r" in shown
    assert "/12 [" in shown
    assert "loss=" in shown
