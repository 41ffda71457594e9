"""The comparison: what is finished is never lost or redone, and the page follows from the table."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MEASURED = {"fit_seconds", "predict_seconds", "peak_mb"}


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


afternoon, contestants = load("afternoon"), load("contestants")
contestants_pretrained = load("contestants_pretrained")
compare, report = load("compare"), load("report")
QUICK = compare.Suite(
    10, 8, 80, 60, 0.1, (0, 1, 2), (None, 10), ("SMOTE + logistic", "balanced forest"), ("lesions",)
)


@pytest.fixture
def quick(monkeypatch):
    """A suite of twelve jobs of some hundredths of a second."""
    monkeypatch.setitem(compare.SUITES, ("scratch", "quick"), QUICK)
    # A job spends most of its time on a fold that keeps patients whole: these are fewer.
    many = compare.make_lesions
    monkeypatch.setattr(compare, "make_lesions", lambda n, **params: many(min(n, 500), **params))
    for method, steps in {
        "SMOTE + logistic": lambda _, smote: [smote, contestants.LogisticRegression(max_iter=50)],
        "balanced forest": lambda seed, _: [
            contestants.BalancedRandomForestClassifier(
                10, sampling_strategy="all", replacement=True, bootstrap=False, random_state=seed
            )
        ],
    }.items():
        monkeypatch.setitem(compare.SCRATCH, method, contestants.classical(steps))


def start(out, *more):
    sys.argv = ["compare.py", "--suite", "quick", "--out", str(out), *more]
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
    tqdm.set_lock(threading.RLock())  # a process that is killed must not hold this one's
    compare.main()


def table(out):
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_twenty_times_the_table_is_that_of_an_undisturbed_run(tmp_path, quick):
    context = multiprocessing.get_context("fork")

    def run(out, patience=None):
        process = context.Process(target=start, args=(out,))
        process.start()
        process.join(patience)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        return process.exitcode

    assert run(tmp_path / "calm") == 0
    wanted = table(tmp_path / "calm")
    assert len(wanted) == 12
    assert len({row["balanced_accuracy"] for row in wanted}) > 6

    out, rng = tmp_path / "killed", np.random.default_rng(0)
    finished: dict[Path, int] = {}
    kills = 0
    while kills < 20:
        # As the jobs get done, kills that come too late start from nothing again.
        kills += run(out, patience=rng.uniform(0.02, 0.5)) == -signal.SIGKILL
        for path, stamp in finished.items():
            assert path.stat().st_mtime_ns == stamp, f"{path.name} was done again"
        finished = {path: path.stat().st_mtime_ns for path in out.glob("jobs/*.json")}
        if len(finished) == 12 and kills < 20:
            for path in out.glob("jobs/*"):
                path.unlink()
            finished = {}
    assert run(out) == 0
    for path, stamp in finished.items():
        assert path.stat().st_mtime_ns == stamp
    assert table(out) == wanted


def test_damaged_result_is_done_again(tmp_path, quick, monkeypatch, capsys):
    args = ["compare.py", "--suite", "quick", "--out", str(tmp_path), "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", args)
    compare.main()
    wanted = table(tmp_path)
    path = sorted(tmp_path.glob("jobs/*.json"))[0]
    path.write_text(path.read_text()[:50])
    (tmp_path / "results.csv").unlink()
    compare.main()
    assert "4 jobs, 3 of them done" in capsys.readouterr().out
    assert table(tmp_path) == wanted


def test_rows_of_an_earlier_table_count_as_done(tmp_path, quick, monkeypatch, capsys):
    args = ["compare.py", "--suite", "quick", "--out", str(tmp_path), "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", args)
    compare.main()
    wanted = table(tmp_path)
    for path in tmp_path.glob("jobs/*"):
        path.unlink()
    monkeypatch.setattr(sys, "argv", [*args, "1"])
    compare.main()
    assert "8 jobs, 4 of them done" in capsys.readouterr().out
    found = table(tmp_path)
    assert len(found) == 8
    assert [row for row in found if row["seed"] == "0"] == wanted


def test_networks_have_the_same_number_of_steps():
    y = np.repeat([0, 1, 2], [90, 30, 6])
    X = np.random.default_rng(0).integers(0, 256, (126, 8, 8), dtype=np.uint8)
    setting = contestants.Setting(0, 2, (90, 30, 6), 0.1)
    steps = {}
    for name in ("CE", "oversampling", "SPMix", "CSSN", "focal"):
        clf = compare.SCRATCH[name](setting)
        sampler = getattr(clf, "sampler", None)
        n = 270 if sampler is not None else 126
        clf.set_params(backbone=compare_backbone()).fit(X, y)
        steps[name] = clf.n_iter_ * clf._steps_per_epoch(n)
    assert max(steps.values()) / min(steps.values()) < 1.25


def compare_backbone():
    from sklearn_medimb.backbones import ConvNet

    return ConvNet(widths=(4, 8))


def test_job_that_fails_does_not_stop_the_others(tmp_path, quick, monkeypatch, capsys):
    def broken(setting):
        raise RuntimeError("out of luck")

    monkeypatch.setitem(compare.SCRATCH, "balanced forest", broken)
    args = ["compare.py", "--suite", "quick", "--out", str(tmp_path), "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", args)
    compare.main()
    assert "-lesions-0-balanced-forest" in (said := capsys.readouterr().err)
    assert "RuntimeError: out of luck" in said
    assert {row["method"] for row in table(tmp_path)} == {"SMOTE + logistic"}


OUTSIDE = """
from sklearn.base import BaseEstimator, ClassifierMixin

class First(ClassifierMixin, BaseEstimator):
    def fit(self, X, y):
        self.classes_ = sorted(set(y))
        return self

    def predict(self, X):
        return [self.classes_[0]] * len(X)

    def decision_function(self, X):
        return X.reshape(len(X), -1)[:, : len(self.classes_)]

class Network(First):
    def __init__(self, backbone=None, spatial_dims=None, max_epochs=0, batch_size=32, lr=1):
        self.backbone = backbone
        self.spatial_dims = spatial_dims
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr

    def fit(self, X, y):
        print(self)
        return super().fit(X, y)

class Needy(First):
    def __init__(self, needed):
        self.needed = needed

class CE(First):
    pass
"""


def test_a_classifier_from_outside_is_a_contestant(tmp_path, quick, monkeypatch, capsys):
    (tmp_path / "my_methods.py").write_text(OUTSIDE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    args = ["compare.py", "--suite", "quick", "--out", "out", "--seeds", "0", "--methods"]
    args += ["SMOTE + logistic", "--method", "my_methods:Network", "--method", "my_methods:First"]
    monkeypatch.setattr(sys, "argv", args)
    compare.main()
    found = table(tmp_path / "out")
    assert [row["method"] for row in found] == 2 * ["First", "Network", "SMOTE + logistic"]
    given = "Network(backbone='auto', max_epochs=16, spatial_dims=2)"
    assert capsys.readouterr().out.count(given) == 2
    compare.main()
    assert "6 jobs, 6 of them done" in capsys.readouterr().out
    for place, match in {
        "my_methods": "'my_methods' is not of the form my_module:MyClassifier",
        "no_module:Network": "no_module cannot be imported: No module named 'no_module'",
        "my_methods:Gone": "my_methods has no class Gone with fit and predict",
        "my_methods:BaseEstimator": "my_methods has no class BaseEstimator with fit and predict",
        "my_methods:Needy": "Needy().get_params() fails: ",
        "my_methods:CE": "CE: a method of the comparison is called so",
        "my_methods:Network": "two classes have the same name",
    }.items():
        monkeypatch.setattr(sys, "argv", [*args, "--method", place])
        with pytest.raises(SystemExit):
            compare.main()
        assert f"argument --method: {match}" in capsys.readouterr().err


def test_splits_keep_patients_whole_and_test_rows_uncut():
    suite = dataclasses.replace(compare.SUITES["scratch", "core"], image_size=10)
    data = compare.load(None, "lesions", suite)
    natural, test = compare.split(data, suite, None, 0)
    for cut in (None, 10, 50):
        train, same_test = compare.split(data, suite, cut, 0)
        np.testing.assert_array_equal(same_test, test)
        assert not set(data.groups[train]) & set(data.groups[test])
        assert len(train) <= suite.max_train + 4
        if cut is not None:
            counts = np.bincount(data.target[train])
            assert counts.max() / counts.min() == pytest.approx(cut, rel=0.35)
    assert not np.array_equal(natural, compare.split(data, suite, None, 1)[0])


@pytest.mark.parametrize("shape", [(10, 10), (10, 10, 3), (6, 6, 6)])
def test_the_afternoon_network_learns_rare_shades(shape):
    """Gray images, colours and volumes; again the same from the same seed."""
    rng = np.random.default_rng(0)
    y = np.repeat(["common", "rare"], [40, 10])
    X = rng.integers(0, 120, (50, *shape)).astype(np.uint8)
    X[y == "rare"] += 60
    setting = contestants.Setting(0, len(shape) if shape[-1] == 6 else 2, (40, 10), 0.4)
    one, two = (compare.SCRATCH["afternoon CNN"](setting).fit(X, y) for _ in range(2))
    assert one.max_epochs == 16
    assert (one.predict(X) == y).mean() > 0.9
    np.testing.assert_array_equal(one.predict_proba(X), two.predict_proba(X))
    np.testing.assert_allclose(one.predict_proba(X).sum(axis=1), 1)


def test_every_method_makes_a_classifier_of_its_own():
    of_start = {"start": contestants_pretrained.STARTS["untrained"], "image_size": 24}
    for regime, make in ((r, make) for r, of in compare.METHODS.items() for make in of.values()):
        more = {} if regime == "scratch" else of_start
        setting = contestants.Setting(0, 2, (30, 6), 0.5, **more)
        one, two = make(setting), make(setting)
        assert one is not two
        assert hasattr(one, "fit")
        assert hasattr(one, "predict")


def test_page_follows_from_the_table_and_says_who_loses(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    skill = {"CE": 0.6, "logit adjustment": 0.8, "CSSN": 0.7, "focal": 0.55}
    rows = [
        {
            "data": data, "cut": cut, "seed": seed, "method": method, "n_classes": 2,
            "imbalance_ratio": 6.0 if cut == "natural" else 50.0,
            "balanced_accuracy": round(score + rng.normal() / 100, 4), "macro_f1": 0.5,
            "macro_auroc": 0.5, "few_recall": 0.5, "calibration_error": "", "fit_seconds": 3.0,
            "predict_seconds": 0.1, "peak_mb": 9, "commit": "abc", "versions": "v", "hardware": "h",
        }
        for data in ("one", "two") for cut in ("natural", 50) for seed in (0, 1, 2)
        for method, score in skill.items()
    ]  # fmt: skip
    path = tmp_path / "results.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    pages = []
    for out in (tmp_path / "a", tmp_path / "b"):
        monkeypatch.setattr(sys, "argv", ["report.py", str(path), "--out", str(out)])
        report.main()
        pages.append((out / "RESULTS.md").read_text())
        assert {p.name for p in out.glob("figures/*")} == {"ranks.png", "time.png", "ratio.png"}
        time.sleep(0.01)
    assert pages[0] == pages[1]
    first = pages[0].split("\n\n")[2]
    assert first.startswith("**What does not beat its baseline.**")
    for name in ("CE (-0.2", "CSSN (-0.1", "focal (-0.2"):
        assert name in first
    assert "Below plain cross-entropy: focal." in first
    assert "logit adjustment (" not in first
    assert "| logit adjustment | 1.0 |" in pages[0]
    assert "the first are logit adjustment (0.8" in pages[0]
    assert report.critical_difference(10, 20) == pytest.approx(3.164 * np.sqrt(110 / 120), abs=0.01)


def test_page_of_methods_without_the_baselines(tmp_path, monkeypatch):
    facts = {"commit": "abc", "versions": "v", "hardware": "h", "fit_seconds": 3.0}
    rows = [
        {
            "data": "one", "cut": cut, "seed": 0, "method": method, "n_classes": 2,
            "imbalance_ratio": ratio, "balanced_accuracy": score, "predict_seconds": 0.1, **facts,
        }
        for cut, ratio in (("natural", 6.0), (50, 50.0))
        for method, score in {"CSSN": 0.7, "focal": 0.6}.items()
    ]  # fmt: skip
    path = tmp_path / "results.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    monkeypatch.setattr(sys, "argv", ["report.py", str(path), "--out", str(tmp_path)])
    report.main()
    page = (tmp_path / "RESULTS.md").read_text()
    assert "the first are CSSN (0.700), focal (0.600). Differences" in page
    assert "Against" not in page
    assert "cross-entropy" not in page


def test_smoke_suite_runs_and_makes_a_page(tmp_path, monkeypatch):
    suite = dataclasses.replace(compare.SUITES["scratch", "smoke"], step_share=0.01)
    monkeypatch.setitem(compare.SUITES, ("scratch", "smoke"), suite)
    monkeypatch.setattr(sys, "argv", ["compare.py", "--suite", "smoke", "--out", str(tmp_path)])
    compare.main()
    rows = table(tmp_path)
    assert len(rows) == len(suite.methods) * len(suite.cuts)
    for row in rows:
        assert 0 <= float(row["balanced_accuracy"]) <= 1
        assert 0 <= float(row["macro_auroc"]) <= 1
        assert row["commit"]
        assert (row["calibration_error"] == "") == (row["method"] == "SMOTE + SVM")
    args = ["report.py", str(tmp_path / "results.csv"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", args)
    report.main()
    assert "| CSSN |" in (tmp_path / "RESULTS.md").read_text()
