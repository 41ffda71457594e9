"""Loggers by name: each fit is a run of its own."""

from __future__ import annotations

import pickle

import pytest
from sklearn.base import clone
from sklearn.model_selection import cross_val_score
from skorch.callbacks import Callback

from sklearn_medimb import CSSNClassifier, LMDClassifier, SoftmaxClassifier

from .conftest import make_blobs


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
