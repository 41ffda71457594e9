"""A search over the processes of a real Dask cluster on this machine."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time

import joblib
import numpy as np
import pytest
import torch
from sklearn.model_selection import GridSearchCV

from sklearn_medimb import SoftmaxClassifier
from sklearn_medimb.backbones import MLP, ConvNet
from sklearn_medimb.datasets import MappedImages
from tests.helpers import make_blobs

distributed = pytest.importorskip("distributed", reason="needs the extra: dask")
psutil = pytest.importorskip("psutil")

pytestmark = pytest.mark.filterwarnings("default")  # those of Dask's own machinery
GRID = {"lr": [1e-3, 3e-3, 1e-2], "augment": [None, "light"]}


def search(**params):
    common = {"backbone": ConvNet(widths=(8, 16)), "max_epochs": 2, "batch_size": 32}
    return GridSearchCV(SoftmaxClassifier(**common | {"random_state": 0} | params), GRID, cv=2)


@pytest.fixture(scope="module")
def client():
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def test_a_search_over_two_workers_finds_what_a_serial_one_does(client):
    X, y = make_blobs()
    alone = search().fit(X, y)
    with joblib.parallel_config("dask", client=client):
        spread = search().fit(X, y)
    np.testing.assert_array_equal(
        spread.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"]
    )
    assert spread.best_params_ == alone.best_params_
    logs = client.run(lambda dask_worker: len(dask_worker.state.log))
    assert len(logs) == 2
    assert all(logs.values())


@pytest.fixture(scope="module")
def alone():
    """A serial search with one thread of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = search(backbone=MLP((8,), dropout=0.2)).fit(*make_blobs())
    torch.set_num_threads(before)
    return found


@pytest.fixture
def in_one_process(client):
    """The cluster's first worker alone."""
    return {"client": client, "workers": [next(iter(client.run(os.getpid)))]}


@pytest.fixture
def in_this_process():
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield {"client": client}


@pytest.mark.parametrize("where", ["in_this_process", "in_one_process"])
def test_threads_of_one_worker_find_what_a_serial_search_does(where, alone, request):
    """Also in a worker process, whose fits use one thread of torch each."""
    X, y = make_blobs()
    where = request.getfixturevalue(where)
    before, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    with joblib.parallel_config("dask", **where):
        spread = search(backbone=MLP((8,), dropout=0.2)).fit(X, y)
    torch.set_num_threads(before)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(spread.predict_proba(X), alone.predict_proba(X))
    np.testing.assert_array_equal(
        spread.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"]
    )


@pytest.mark.parametrize("kind", ["array", "file"])
def test_the_data_travel_once_to_a_worker_and_not_with_every_task(client, kind, tmp_path):
    """Six fits and a refit; counted at the loopback interface of this machine."""
    X, y = make_blobs((200, 200), size=128)
    if kind == "file":
        np.save(tmp_path / "images.npy", X)
        n_bytes, X = X.nbytes, MappedImages(tmp_path / "images.npy")
        most = 0.25 * n_bytes
    else:
        # Twice to two workers; with every task it would be seven times. What other tests send at
        # the same time passes here too.
        n_bytes, most = X.nbytes, 5 * X.nbytes
    small = torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Conv2d(3, 4, 3))
    grid = GridSearchCV(
        SoftmaxClassifier(small, max_epochs=1, augment=None), {"lr": [1e-3, 3e-3, 1e-2]}, cv=2
    )
    loopback = [name for name in psutil.net_io_counters(pernic=True) if name.startswith("lo")]
    if len(loopback) != 1:
        pytest.skip(f"counts what passes the loopback interface, of which there are {loopback}")

    def sent():
        return psutil.net_io_counters(pernic=True)[loopback[0]].bytes_sent

    with joblib.parallel_config("dask", client=client):
        before = sent()
        grid.fit(X, y)
        travelled = sent() - before
    assert n_bytes > 19e6  # far above what other tests beside this one may send
    assert travelled < most
    assert np.isfinite(grid.cv_results_["mean_test_score"]).all()


# ---------------------------------------------------------------- images on disk


@pytest.fixture
def mapped(tmp_path):
    X, y = make_blobs()
    np.save(tmp_path / "images.npy", X)
    return MappedImages(tmp_path / "images.npy"), X, y


def test_mapped_images_are_those_of_the_array(mapped, tiny):
    lazy, X, y = mapped
    assert lazy.shape == X.shape
    assert lazy.dtype == X.dtype
    rows = np.array([3, 1, 7])
    np.testing.assert_array_equal(lazy[rows].take([2, 0]), X[[7, 3]])
    np.testing.assert_array_equal(lazy[rows][1], X[1])
    np.testing.assert_array_equal(
        SoftmaxClassifier(**tiny).fit(lazy, y).predict_proba(lazy[20:40]),
        SoftmaxClassifier(**tiny).fit(X, y).predict_proba(X[20:40]),
    )


def test_only_the_path_is_pickled(mapped):
    lazy, X, _ = mapped
    lazy[0]  # opens the file
    stored = pickle.dumps(lazy[[4, 5]])
    assert len(stored) < 1000
    np.testing.assert_array_equal(pickle.loads(stored).take([1]), X[[5]])


def test_files_of_something_else_are_refused(tmp_path):
    np.save(tmp_path / "vectors.npy", np.zeros((5, 3)))
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    np.savez(tmp_path / "archive.npy", images=np.zeros((5, 3, 8, 8)))
    (tmp_path / "archive.npy.npz").rename(tmp_path / "archive.npy")
    for name in ("vectors", "text", "objects", "archive"):
        with pytest.raises(ValueError, match=f"{name}.npy.*images"):
            MappedImages(tmp_path / f"{name}.npy")
    with pytest.raises(FileNotFoundError):
        MappedImages(tmp_path / "absent.npy")


def test_bad_rows_of_a_float_file_are_named(tmp_path, tiny):
    X, y = make_blobs()
    X = X.astype(np.float32) / 255
    X[17, 0, 2, 2] = np.nan
    np.save(tmp_path / "images.npy", X)
    with pytest.raises(ValueError, match="NaN: see row 17"):
        SoftmaxClassifier(**tiny).fit(MappedImages(tmp_path / "images.npy"), y)


# ---------------------------------------------------------------- last: it harms the cluster


def test_killing_a_worker_loses_no_finished_trial(client, tmp_path):
    """Its tasks start again elsewhere; what was finished is not computed twice but for those."""
    X, y = make_blobs()
    np.save(tmp_path / "images.npy", X)
    done = tmp_path / "done"
    done.mkdir()

    def note(estimator, X, y):
        (done / f"{time.monotonic_ns()}-{os.getpid()}").touch()
        return float((estimator.predict(X) == y).mean())

    grid = search(max_epochs=4).set_params(scoring=note, refit=False)
    pids = client.run(os.getpid)
    killed = []

    def kill():
        until = time.monotonic() + 120
        while len(list(done.iterdir())) < 4 and time.monotonic() < until:
            time.sleep(0.01)
        killed.append(next(iter(pids.values())))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with joblib.parallel_config("dask", client=client):
        grid.fit(MappedImages(tmp_path / "images.npy"), y)
    killer.join()
    assert killed
    scores = [grid.cv_results_[f"split{fold}_test_score"] for fold in range(2)]
    assert np.isfinite(scores).all()
    # Twelve scores, and again those that were under way or not yet fetched in the killed worker.
    assert 12 <= len(list(done.iterdir())) <= 12 + 8
