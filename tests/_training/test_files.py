"""Files under threads, kills and full disks: the old one, the new one, or an error."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import resource
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from joblib import Parallel, delayed

from sklearn_medimb import SoftmaxClassifier
from sklearn_medimb._machine.runtime import replacing
from sklearn_medimb._training.checkpoint import Checkpoint
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.onnx import export_onnx
from sklearn_medimb.persistence import _files, load, save
from tests.helpers import CrashAfter, make_blobs

FORK = multiprocessing.get_context("fork")
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
X, Y = make_blobs((12, 8, 4))
SMALL = {
    "backbone": ConvNet(widths=(4, 8)),
    "max_epochs": 3,
    "batch_size": 16,
    "random_state": 0,
    "precision": "float32",
}


@pytest.fixture(scope="module")
def fitted():
    return SoftmaxClassifier(**SMALL).fit(X, Y)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def full_disk(n_bytes):
    """No file can be longer than that, as on a disk with no more room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# -------------------------------------------------------------------- one path, many writers


def test_many_threads_write_to_one_path(tmp_path):
    """Each leaves a whole file, whoever comes last."""
    path = tmp_path / "file"

    def write(number):
        for _ in range(20):
            with replacing(path) as draft:
                draft.write_bytes(bytes([number]) * 5000)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    content = path.read_bytes()
    assert content == content[:1] * 5000
    assert names_in(tmp_path) == ["file"]


def test_threads_save_estimators_to_one_path(fitted, tmp_path):
    pytest.importorskip("safetensors")
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: save(fitted, tmp_path / "model"), range(6)))
    assert np.array_equal(load(tmp_path / "model").predict_proba(X), fitted.predict_proba(X))
    assert names_in(tmp_path) == ["model"]


def hang_in_save(clf, path):
    def hang(draft, trusted):
        (draft.parent / "of a library").write_bytes(b"its own draft")
        time.sleep(600)

    _files.read_file = hang  # what save does last
    save(clf, path)


@forks
def test_what_a_killed_save_left_is_removed_and_a_living_one_s_stays(fitted, tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "model"
    save(fitted, path)
    before = path.read_bytes()
    writers = [FORK.Process(target=hang_in_save, args=(fitted, path)) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        until = time.monotonic() + 60
        while len(list(tmp_path.rglob("of a library"))) < 2:
            assert all(writer.is_alive() for writer in writers)
            assert time.monotonic() < until
            time.sleep(0.01)
        writers[0].kill()
        writers[0].join()
        assert path.read_bytes() == before
        assert len(names_in(tmp_path)) == 3
        save(fitted, path)
        assert len(names_in(tmp_path)) == 2
        assert len(list(tmp_path.rglob("of a library"))) == 1
    finally:
        for writer in writers:
            writer.kill()
            writer.join()
    assert np.array_equal(load(path).predict_proba(X), fitted.predict_proba(X))
    save(fitted, path)
    assert names_in(tmp_path) == ["model"]


def test_names_with_wildcards_are_names(tmp_path):
    other = tmp_path / ".a.0.tmp"
    other.mkdir()
    with replacing(tmp_path / "[a]*") as draft:
        draft.write_bytes(b"new")
    assert names_in(tmp_path) == [".a.0.tmp", "[a]*"]


@pytest.mark.parametrize("kind", ["save", "onnx", "checkpoint"])
def test_a_full_disk_names_the_file_and_leaves_the_old_one(kind, fitted, tmp_path):
    path = tmp_path / "model.onnx"
    if kind == "checkpoint":
        clf = SoftmaxClassifier(**SMALL, checkpoint_dir=tmp_path)
        path, write = tmp_path, lambda: clf.fit(X, Y)
    elif kind == "onnx":
        pytest.importorskip("onnxscript")
        path.write_bytes(b"old")
        write = lambda: export_onnx(fitted, path)  # noqa: E731
    else:
        pytest.importorskip("safetensors")
        path.write_bytes(b"old")
        write = lambda: save(fitted, path)  # noqa: E731
    with full_disk(1000), pytest.raises(OSError, match=str(path)):
        write()
    if kind == "checkpoint":
        assert not names_in(tmp_path)
        return
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["model.onnx"]
    write()
    assert path.stat().st_size > 1000


def test_a_folder_that_is_missing_is_named(fitted, tmp_path):
    with (
        pytest.raises(FileNotFoundError, match=r"absent', for 'model', is no directory"),
        replacing(tmp_path / "absent" / "model"),
    ):
        pass


# -------------------------------------------------------------------- one checkpoint, many fits


def fit_with_checkpoints(folder):
    clf = SoftmaxClassifier(**SMALL, checkpoint_dir=folder)
    return clf.fit(X, Y).predict_proba(X)


def test_threads_share_a_checkpoint_directory(fitted, tmp_path):
    """The same fit several times at once: none takes another one's file away."""
    alone = SoftmaxClassifier(**SMALL)
    fits = [SoftmaxClassifier(**SMALL, checkpoint_dir=tmp_path) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for clf in pool.map(lambda clf: clf.fit(X, Y), fits):
            assert clf.n_iter_ == 3
    assert alone.fit(X, Y).n_iter_ == 3
    assert not names_in(tmp_path)


def test_processes_share_a_checkpoint_directory(fitted, tmp_path):
    for answer in Parallel(2)(delayed(fit_with_checkpoints)(tmp_path) for _ in range(4)):
        np.testing.assert_allclose(answer, fitted.predict_proba(X), rtol=1e-5)
    assert not names_in(tmp_path)


def test_a_checkpoint_that_another_fit_removes_is_none(tmp_path, monkeypatch):
    path = tmp_path / "token.checkpoint"
    path.write_bytes(b"x")
    read = type(path).read_bytes

    def removed_before(self):
        self.unlink(missing_ok=True)
        return read(self)

    monkeypatch.setattr(type(path), "read_bytes", removed_before)
    assert Checkpoint(tmp_path, "token").open().state is None


# -------------------------------------------------------------------- foreign checkpoints


def interrupted(folder, **params):
    clf = SoftmaxClassifier(**{**SMALL, **params}, checkpoint_dir=folder)
    with pytest.raises(RuntimeError, match="power cut"):
        clf.set_params(callbacks=[CrashAfter(2)]).fit(X, Y)
    return clf.set_params(callbacks=None), next(folder.iterdir())


def write(path, content):
    path.write_bytes(hashlib.blake2b(content).hexdigest().encode() + b"\n" + content)


def packed(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def compressed(content):
    """The same archive; a reader would unpack it to whatever size its author chose."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return buffer.getvalue()


FOREIGN = {
    "empty": lambda content: b"",
    "text": lambda content: b"import os",
    "half": lambda content: content[: len(content) // 2],
    "a list": lambda content: packed([1, 2]),
    "a tensor": lambda content: packed(torch.ones(2)),
    "an empty dict": lambda content: packed({}),
    "a module": lambda content: packed(torch.nn.Linear(1, 1)),
    "zip of others": lambda content: b"PK\x05\x06" + bytes(18),
    "compressed": compressed,
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_foreign_content_with_a_valid_digest_is_refused(change, tmp_path):
    clf, path = interrupted(tmp_path)
    content = path.read_bytes().partition(b"\n")[2]
    write(path, change(content))
    with pytest.raises(ValueError, match=r"does not hold what .*Delete .*checkpoint_dir"):
        clf.fit(X, Y)
    write(path, content)
    assert clf.fit(X, Y).n_iter_ == 3


def set_to(value, *keys):
    def edit(state):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return edit


def first(state, part, change):
    name = next(iter(state[part]))
    state[part][name] = change(state[part][name])


EDITS = {
    "stage 99": set_to(99, "stage"),
    "stage -1": set_to(-1, "stage"),
    "stage of text": set_to("0", "stage"),
    "stage True": set_to(True, "stage"),
    "seed of text": set_to("0", "seed"),
    "no epochs": set_to(0, "n_epochs"),
    "99 epochs": set_to(99, "n_epochs"),
    "-1 epochs": set_to(-1, "n_epochs"),
    "no history": set_to([], "history"),
    "history of numbers": set_to([1, 2], "history"),
    "history of a text": set_to("ab", "history"),
    "module of numbers": set_to([1], "module"),
    "no weights": set_to({}, "module"),
    "weight of another shape": lambda s: first(s, "module", lambda w: w[:1]),
    "weight of another dtype": lambda s: first(s, "module", lambda w: w.double()),
    "weight that is a number": lambda s: first(s, "module", lambda w: 1.0),
    "criterion of another": set_to({"more": torch.ones(2)}, "criterion"),
    "optimizer of another": set_to({"state": {}, "param_groups": []}, "optimizer"),
    "moments of another shape": set_to(torch.ones(3), "optimizer", "state", 0, "exp_avg"),
    "moments missing": set_to({"step": torch.tensor(1.0)}, "optimizer", "state", 0),
    "moments of no weight": set_to({"step": torch.tensor(1.0)}, "optimizer", "state", 99),
    "rate of text": set_to("fast", "optimizer", "param_groups", 0, "lr"),
    "another kind of steps": set_to(True, "optimizer", "param_groups", 0, "amsgrad"),
    "scheduler with a method": set_to(1, "scheduler", "step"),
    "scheduler of text": set_to("0", "scheduler", "last_epoch"),
    "best of another": set_to({"score": 1}, "best"),
    "callbacks that are none": set_to([{"a": 1}], "callbacks"),
    "callbacks of text": set_to("ab", "callbacks"),
    "trained weights of another": set_to({"a": 1}, "trained"),
    "trained weights of text": set_to("a", "trained"),
    "generator of another": set_to({"bit_generator": "MT19937"}, "numpy"),
    "generator of text": set_to("ab", "generator"),
    "generator of another size": set_to(torch.zeros(3, dtype=torch.uint8), "generator"),
    "more than there is": set_to(1, "more"),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_state_of_another_form_is_refused(edit, tmp_path):
    clf, path = interrupted(tmp_path)
    content = path.read_bytes().partition(b"\n")[2]
    state = torch.load(io.BytesIO(content), weights_only=True)
    edit(state)
    write(path, packed(state))
    with pytest.raises(ValueError, match=r"checkpoint does not hold .*Delete .*checkpoint_dir"):
        clf.fit(X, Y)
    assert not hasattr(clf, "net_")
    write(path, content)
    assert clf.fit(X, Y).n_iter_ == 3


@pytest.mark.parametrize("name", ["format", "token"])
def test_a_file_that_lacks_its_stamp_is_refused(name, tmp_path):
    clf, path = interrupted(tmp_path)
    state = torch.load(io.BytesIO(path.read_bytes().partition(b"\n")[2]), weights_only=True)
    write(path, packed({k: v for k, v in state.items() if k != name}))
    with pytest.raises(ValueError, match=r"KeyError.*Delete"):
        clf.fit(X, Y)
    write(path, packed({**state, name: "other"}))
    with pytest.raises(ValueError, match=r"another fit .*Delete"):
        clf.fit(X, Y)


@pytest.mark.parametrize("optimizer", ["SGD", "Adagrad", "Adafactor", "RMSprop", "NAdam"])
def test_other_optimisers_resume(optimizer, tmp_path):
    net_params = {"optimizer": getattr(torch.optim, optimizer)}
    whole = SoftmaxClassifier(**SMALL, net_params=net_params).fit(X, Y)
    clf, _ = interrupted(tmp_path, net_params=net_params)
    assert np.array_equal(clf.fit(X, Y).predict_proba(X), whole.predict_proba(X))


def numpy_score(estimator, X, y):
    return np.float64(estimator.score(X, y))


def test_scores_of_numpy_resume(tmp_path):
    params = {"early_stopping": True, "scoring": numpy_score}
    whole = SoftmaxClassifier(**SMALL, **params).fit(X, Y)
    clf, _ = interrupted(tmp_path, **params)
    assert clf.fit(X, Y).history_[-1]["valid_score"] == whole.history_[-1]["valid_score"]
