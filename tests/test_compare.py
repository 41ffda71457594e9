"""The comparison: what is finished is never lost or redone, and the page follows from the table."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold, check_cv
from tqdm import tqdm

from sklearn_medimb.metrics import paired_difference

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MEASURED = {"fit_seconds", "fit_cpu_seconds", "predict_seconds", "peak_mb"}


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


afternoon, contestants = load("afternoon"), load("contestants")
contestants_pretrained, differences = load("contestants_pretrained"), load("differences")
compare = load("compare")
for name in ("rows", "words", "figures", "curves", "ideas"):
    load(f"report_{name}")
report, report_rows = load("report"), sys.modules["report_rows"]
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
        monkeypatch.setitem(compare.METHODS["scratch"], method, contestants.classical(steps))


def start(out, *more):
    sys.argv = ["compare.py", "--suite", "quick", "--out", str(out), *more]
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
    tqdm.set_lock(threading.RLock())  # a process that is killed must not hold this one's
    compare.main()


def table(out):
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def told(out):
    """What files of jobs say of the images tested and what was predicted for them."""
    return {
        key: {what: of[what] for what in (*differences.IMAGES, "predicted")}
        for key, of in differences.tested(out / "jobs").items()
    }


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
    wanted, known = table(tmp_path), told(tmp_path)
    for path in tmp_path.glob("jobs/*"):
        path.unlink()
    monkeypatch.setattr(sys, "argv", [*args, "1"])
    compare.main()
    assert "8 jobs, 4 of them done" in capsys.readouterr().out
    found = table(tmp_path)
    assert len(found) == 8
    assert [row for row in found if row["seed"] == "0"] == wanted
    assert len(known) == 4
    assert compare.remembered(tmp_path / "results.csv", "") == known | told(tmp_path)


def test_networks_have_the_same_number_of_steps():
    y = np.repeat([0, 1, 2], [90, 30, 6])
    X = np.random.default_rng(0).integers(0, 256, (126, 8, 8), dtype=np.uint8)
    setting = contestants.Setting(0, 2, (90, 30, 6), 0.1)
    steps = {}
    for name in ("CE", "oversampling", "SPMix", "CSSN", "focal"):
        clf = compare.METHODS["scratch"][name](setting)
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

    monkeypatch.setitem(compare.METHODS["scratch"], "balanced forest", broken)
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


@pytest.mark.parametrize(("cut", "inner"), [(None, False), (10, False), (None, True)])
def test_smaller_parts_are_within_larger_ones_and_of_the_same_shares(cut, inner):
    suite = dataclasses.replace(compare.SUITES["scratch", "core"], image_size=10)
    data = compare.load(None, "lesions", suite)
    whole, test = compare.split(data, suite, cut, 0, inner=inner)
    n, larger = np.bincount(data.target[whole]), whole
    for size in (200, 100, 50):
        train, same_test = compare.split(data, suite, cut, 0, size=size, inner=inner)
        np.testing.assert_array_equal(same_test, test)
        assert set(train) < set(larger)
        counts = np.bincount(data.target[train])
        shares = np.maximum(size * n / n.sum(), np.minimum(compare.MIN_RAREST, n))
        np.testing.assert_allclose(counts, shares, atol=0.5)
        # Of a class all images of its patients, but for the last of them.
        for k in np.unique(data.target):
            of = data.groups[train[data.target[train] == k]]
            all_of = data.groups[whole[data.target[whole] == k]]
            lacking = [who for who in np.unique(of) if (of == who).sum() < (all_of == who).sum()]
            assert len(lacking) <= 1
        larger = train
    assert set(train) != set(compare.split(data, suite, cut, 1, size=50, inner=inner)[0])


def test_sizes_and_cuts_are_not_crossed_and_leave_a_fifth_out(monkeypatch, tmp_path, few_lesions):
    suite = replaced(
        monkeypatch, "frozen", cuts=(None, 5), sizes=(20, 40, 70), methods=("CE",), max_train=80
    )
    run_regime(monkeypatch, tmp_path, "frozen")
    found = {(row["cut"], row["size"]): int(row["n_train"]) for row in table(tmp_path)}
    n = found["natural", "all"]
    assert 50 < n < 87
    assert found == {
        ("natural", "all"): n, ("5", "all"): found["5", "all"],
        ("natural", "20"): pytest.approx(20, abs=3), ("natural", "40"): pytest.approx(40, abs=3),
    }  # fmt: skip
    assert suite.drawn == [(None, None), (5, None), (None, 20), (None, 40), (None, 70)]
    job = compare.Job("frozen", "smoke", "", "test", "one", 50, None, 0, "CE", "h")
    assert job.slug == "frozen-smoke-test-one-50-0-CE-h"
    assert dataclasses.replace(job, cut=None, size=50).slug != job.slug
    assert tuple(field.name for field in dataclasses.fields(job)) == differences.KEY


def test_results_of_before_there_were_sizes_are_not_done_again(
    tmp_path, monkeypatch, few_lesions, capsys
):
    replaced(monkeypatch, "frozen", methods=("CE",))
    run_regime(monkeypatch, tmp_path, "frozen")
    wanted = table(tmp_path)
    path = next(tmp_path.glob("jobs/*.json"))
    result = json.loads(path.read_text())
    assert result.pop("size") == "all"
    path.write_text(json.dumps(result))
    (tmp_path / "results.csv").unlink()
    for _ in range(2):  # from the file, then from the table
        run_regime(monkeypatch, tmp_path, "frozen")
        assert "1 jobs, 1 of them done" in capsys.readouterr().out.splitlines()
        assert table(tmp_path) == wanted
    assert len(differences.tested(tmp_path / "jobs")) == 1


def test_few_labels_are_a_tenth_and_three_of_each_class():
    told = []

    class Asked(contestants.AMIMVClassifier):
        def fit(self, X, y):
            told.append(y)
            return super().fit(X, y)

    y = np.repeat([0, 1, 2], [90, 14, 2])
    X = np.random.default_rng(0).integers(0, 256, (len(y), 8, 8), dtype=np.uint8)
    setting, methods = contestants.Setting(0, 2, (90, 14, 2), None), compare.METHODS["scratch"]
    whole = methods["AMIMV, a tenth labelled"](setting)
    quick = {"backbone": compare_backbone(), "max_epochs": 1}
    quick["pretrain"] = contestants.AMIMVEncoder(max_epochs=1)
    assert whole.estimator.get_params()["pretrain"] == "amimv"
    for seed in (0, 0, 1):
        of = {**whole.estimator.get_params(), **quick}
        clf = contestants.FewLabels(Asked(**of), seed).fit(X, y)
    np.testing.assert_array_equal(clf.classes_, [0, 1, 2])
    for of in told:
        np.testing.assert_array_equal(np.bincount(of[of >= 0]), [9, 3, 2])
        np.testing.assert_array_equal(of[of >= 0], y[of >= 0])
    np.testing.assert_array_equal(told[0], told[1])
    assert (told[0] != told[2]).any()
    # Without pre-training the labelled images train the network, and the others do nothing.
    left = methods["AMIMV, a tenth labelled - pretraining"](setting)
    left.set_params(estimator__backbone=compare_backbone(), estimator__max_epochs=1)
    alone = told[0] >= 0
    proba = contestants.clone(left.estimator).fit(X[alone], y[alone]).predict_proba(X)
    np.testing.assert_array_equal(left.fit(X, y).predict_proba(X), proba)
    assert left.estimator_.n_iter_ == 1
    assert left.estimator_.fine_tune_ == "full"


def test_ideas_are_left_out_and_nothing_else(monkeypatch, tmp_path):
    """CSSN has no auxiliary classifier of two classes, and is not run again without it there."""
    suite = compare.SUITES["scratch", "ideas"]
    setting, methods = contestants.Setting(0, 2, (30, 20, 6), suite.step_share), compare.METHODS
    for part in set(contestants.ABLATIONS) & set(suite.methods):
        whole, params = contestants.ABLATIONS[part]
        one, other = (methods["scratch"][name](setting).get_params() for name in (part, whole))
        changed = {name: one[name] for name in one if str(one[name]) != str(other.get(name))}
        assert changed.pop("estimator", None) is None or part.startswith("AMIMV")
        assert changed == params
        assert whole in suite.methods
    rng = np.random.default_rng(0)
    for n in (2, 3):
        images, y = rng.integers(0, 255, (80, 12, 12), dtype=np.uint8), np.arange(80) % n
        np.savez(tmp_path / f"{n}.npz", images=images, labels=y)
    asked = []
    monkeypatch.setattr(compare, "run_all", lambda *given: asked.append(given) or [])
    args = ["compare.py", str(tmp_path), "--suite", "ideas", "--data", "2", "3"]
    monkeypatch.setattr(sys, "argv", [*args, "--out", str(tmp_path)])
    compare.main()
    listed = [(job.data, job.method) for job in compare.jobs(*asked[0])]
    wanted = [(data, method) for _ in suite.seeds for data in "23" for method in suite.methods]
    assert listed == [each for each in wanted if each != ("2", "CSSN - auxiliary")]


@pytest.mark.parametrize("shape", [(10, 10), (10, 10, 3), (6, 6, 6)])
def test_the_afternoon_network_learns_rare_shades(shape):
    """Gray images, colours and volumes; again the same from the same seed."""
    rng = np.random.default_rng(0)
    y = np.repeat(["common", "rare"], [40, 10])
    X = rng.integers(0, 120, (50, *shape)).astype(np.uint8)
    X[y == "rare"] += 60
    setting = contestants.Setting(0, len(shape) if shape[-1] == 6 else 2, (40, 10), 0.4)
    one, two = (compare.METHODS["scratch"]["afternoon CNN"](setting).fit(X, y) for _ in range(2))
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
        names = {p.name for p in out.glob("figures/*")}
        assert names == {f"{kind}-scratch-core.png" for kind in ("ranks", "time", "ratio")}
        time.sleep(0.01)
    assert pages[0] == pages[1]
    advice, first = (pages[0].split("\n\n")[k] for k in (1, 4))
    assert advice.startswith(
        "**From scratch: take logit adjustment.** Of 4 contestants it is first"
    )
    assert first.startswith("**What does not beat its baseline.**")
    for name in ("CE (-0.2", "CSSN (-0.1", "focal (-0.2"):
        assert name in first
    assert "Below plain cross-entropy: focal." in first
    assert "logit adjustment (" not in first
    assert "| logit adjustment | 1.0 |" in pages[0]
    assert "the first are logit adjustment (0.8" in pages[0]
    assert report.critical_difference(10, 20) == pytest.approx(3.164 * np.sqrt(110 / 120), abs=0.01)


def test_the_first_by_rank_is_not_advised_alone_where_a_baseline_has_the_higher_mean(
    tmp_path, monkeypatch
):
    cells = [(data, "natural") for data in compare.SETS]
    of = {"CSSN": dict.fromkeys(cells, 0.7), "logit adjustment": dict.fromkeys(cells, 0.68)}
    of["logit adjustment"][cells[0]] = 0.99
    rows = scratch_rows(of, regime="pretrained", start="efficientnet_lite0")
    advice = page_of(rows, tmp_path / "a", tmp_path, monkeypatch).split("\n\n")[1]
    assert "start: take CSSN or logit adjustment.** Of 2 contestants CSSN is first" in advice
    assert "Its gain over logit adjustment \N{MINUS SIGN}.014" in advice


def scratch_rows(scores, *, suite="core", seeds=(0, 1), **more):
    """Rows from scratch; scores by contestant, of each (set, cut)."""
    return [
        {
            "regime": "scratch", "suite": suite, "start": "", "rows": "test", "data": data,
            "cut": cut, "size": "all", "seed": seed, "method": method, "hardware": "h",
            "n_train": 100, "n_classes": 2, "imbalance_ratio": 20.0, "image_size": 32,
            "balanced_accuracy": score, "fit_seconds": 9.0, "predict_seconds": 0.1,
            "commit": "abc", "versions": "v", **more,
        }
        for seed in seeds for method, of in scores.items() for (data, cut), score in of.items()
    ]  # fmt: skip


@pytest.mark.parametrize("n_sets", [3, 9])
def test_nothing_is_advised_before_all_sets_of_a_suite_were_run(n_sets, tmp_path, monkeypatch):
    cells = [(data, "natural") for data in compare.SETS[:n_sets]]
    of = {"CSSN": dict.fromkeys(cells, 0.7), "logit adjustment": dict.fromkeys(cells, 0.6)}
    rows = scratch_rows(of, regime="pretrained", start="efficientnet_lite0")
    advice = page_of(rows, tmp_path / "a", tmp_path, monkeypatch).split("\n\n")[1]
    if n_sets == 9:
        assert "start: take CSSN.** Of 2 contestants it is first" in advice
    else:
        assert (
            "start: 3 of 9 sets so far, no advice yet.** Of 2 contestants CSSN is first" in advice
        )


def test_cuts_of_a_collection_count_as_one_set(tmp_path, monkeypatch):
    """They share images: four cuts of one that is easy are no four sets."""
    cells = [*(("one", cut) for cut in ("natural", 10, 50, 100)), ("two", "natural"), ("3", 10)]
    rows = scratch_rows(
        {
            "CSSN": dict(zip(cells, (0.9, 0.9, 0.9, 0.9, 0.5, 0.6), strict=True)),
            "oversampling": dict(zip(cells, (0.6, 0.8, 0.6, 0.8, 0.6, 0.8), strict=True)),
        }
    )
    drawn = {}
    monkeypatch.setattr(
        report, "rank_figure", lambda order, distance, _: drawn.update(order, distance=distance)
    )
    monkeypatch.setattr(report, "time_figure", lambda *_: None)
    monkeypatch.setattr(report, "ratio_figure", lambda *_: None)
    report.figures(report.chapters(rows)[0], tmp_path)
    assert drawn["distance"] == report.critical_difference(2, 3)
    assert drawn["CSSN"] == pytest.approx(5 / 3)
    page = page_of(rows, tmp_path / "a", tmp_path, monkeypatch)
    assert "| oversampling | 1.3 | 0.700 |" in page
    gain = np.array([0.2, -0.1, -0.2])
    half = 4.3027 * gain.std(ddof=1) / 3**0.5
    low, high = (report.signed(gain.mean() + side) for side in (-half, half))
    assert f"each by itself): CSSN \N{MINUS SIGN}.033 [{low}, {high}] (oversampling)." in page


def test_page_says_that_contestants_were_run_at_different_states(tmp_path, monkeypatch):
    cells = dict.fromkeys([("one", "natural"), ("two", "natural")], 0.5)
    rows = scratch_rows(dict.fromkeys(("CE", "focal", "LMD"), cells))
    for row in rows:  # as long as all of a draw are of one state they may be compared
        row["commit"] = f"abc{row['seed']}"
    assert "states of the code" not in page_of(rows, tmp_path / "a", tmp_path, monkeypatch)
    for row in rows:
        row["commit"] = "def-dirty" if row["method"] == "LMD" else "abc"
    said = page_of(rows, tmp_path / "a", tmp_path, monkeypatch).split("\n\n")[4]
    wanted = "Contestants were run at 2 states of the code: LMD at def-dirty; CE, focal at abc. "
    assert said.startswith(wanted)
    rows[0]["commit"] = "new"
    many = [{**row, "method": f"{row['method']} {k}"} for row in rows for k in range(4)]
    said = page_of(many, tmp_path / "a", tmp_path, monkeypatch).split("\n\n")[4]
    assert "3 states of the code: CE 0, CE 1, CE 2, CE 3 at abc, new; " in said
    assert "; the others at " in said


def test_seconds_are_of_the_processor_where_all_rows_have_them(tmp_path, monkeypatch):
    cells = dict.fromkeys([("one", "natural"), ("two", "natural")], 0.5)
    rows = scratch_rows(dict.fromkeys(("CE", "focal"), cells), fit_cpu_seconds=4.0)
    page = page_of(rows, tmp_path / "a", tmp_path, monkeypatch)
    assert "4 s of a core to fit" in page
    assert "| fit, median s of a core | predict |" in page
    assert "8 fits, 0.0 hours of a core; h; v; abc." in page
    for what, value in (("fit_cpu_seconds", ""), ("hardware", "2 cores x86_64, some GPU")):
        row = rows[0] if what == "fit_cpu_seconds" else None
        other = [{**r, what: value} if row in (r, None) else r for r in rows]
        page = page_of(other, tmp_path / "a", tmp_path, monkeypatch)
        assert "9 s to fit" in page
        assert "| fit, median s | predict |" in page
        assert "of a core" not in page


def test_defaults_stand_beside_the_network_of_an_afternoon(tmp_path, monkeypatch):
    cells = [(data, "natural") for data in ("busi", "lesions", "covid_cxr")]
    scores = {
        "CSSN": (0.8, 0.7, 0.66), "CE": (0.5, 0.6, 0.6), "afternoon CNN": (0.7, 0.65, 0.6),
        "logit adjustment": (0.7, 0.64, 0.59),
    }  # fmt: skip
    of = {name: dict(zip(cells, values, strict=True)) for name, values in scores.items()}
    rows = scratch_rows(of, suite="defaults", fit_cpu_seconds=4.0)
    for row in rows:
        row["fit_cpu_seconds"] *= 1.5 if row["method"] == "CSSN" else 1
    page = page_of(rows, tmp_path / "a", tmp_path, monkeypatch)
    title = "From scratch, as they are, beside an afternoon's CNN"
    assert f"## {title}\n" in page
    advice = page.split("\n\n")[1]
    assert advice.startswith(f"**{title}: take CSSN.** Of 4 contestants")
    assert "6 s of a core to fit (afternoon CNN 4 s). Its gain over afternoon CNN +.070" in advice
    found = {line.split(" | ")[0][2:]: line.split(" | ") for line in page.splitlines()[8:20]}
    ahead = found["CSSN"]
    by_sets, alone = (
        differences.by_sets([r for r in rows if r["data"] in kept], "CSSN", "afternoon CNN")
        for kept in ({"busi", "lesions", "covid_cxr"}, {"lesions", "covid_cxr"})
    )
    assert ahead[1:4] == ["0.720", "+.070", ""]
    assert ahead[4] == report.interval(by_sets)
    assert ahead[5] == f"+.055 {report.interval(alone)}"
    assert ahead[6:] == ["1.50", "yes |"]
    assert found["CE"][-1] == "no |"
    assert found["logit adjustment"][-1] == "yes |"
    assert "Sets not chosen on: covid cxr, lesions." in page
    assert "CSSN is the best, +.070; asked was +.02." in page
    monkeypatch.undo()
    drawn = []
    for kind in ("rank", "time", "ratio"):
        monkeypatch.setattr(report, f"{kind}_figure", lambda *args: drawn.append(args[-1].name))
    chapter = report.chapters(rows)[0]
    report.figures(chapter, tmp_path)
    assert drawn == ["ranks-scratch-defaults.png", "time-scratch-defaults.png"]
    assert all(f"figures/{name}" in page for name in drawn)
    assert ("CE", "afternoon CNN") in chapter.pairs()


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
    assert compare.remembered(tmp_path / "results.csv", "") == told(tmp_path)


# ---------------------------------------------------------------- with a start


def run_regime(monkeypatch, out, regime, *more):
    args = ["compare.py", *more, "--regime", regime, "--suite", "smoke", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", args)
    compare.main()
    return {row["method"]: row for row in table(out) if row["regime"] == regime}


def answers(out, regime):
    found = [compare.read_result(path) for path in out.glob("jobs/*.json")]
    return {of["method"]: of["tested"] for of in found if of["regime"] == regime}


def replaced(monkeypatch, regime, **params):
    suite = dataclasses.replace(compare.SUITES[regime, "smoke"], **params)
    monkeypatch.setitem(compare.SUITES, (regime, "smoke"), suite)
    return suite


@pytest.fixture
def few_lesions(monkeypatch):
    many = compare.make_lesions
    monkeypatch.setattr(compare, "make_lesions", lambda n, **params: many(min(n, 300), **params))


@pytest.mark.parametrize(("regime", "tuned"), [("frozen", "frozen"), ("pretrained", "full")])
def test_regimes_with_a_start_run_and_make_a_page(
    tmp_path, monkeypatch, few_lesions, regime, tuned
):
    suite = replaced(monkeypatch, regime, fine_tune=tuned)
    rows = run_regime(monkeypatch, tmp_path, regime)
    assert set(rows) == set(suite.methods)
    for row in rows.values():
        assert 0 <= float(row["balanced_accuracy"]) <= 1
        assert (row["start"], row["rows"], row["n_classes"]) == ("untrained", "test", "5")
        assert "tested" not in row
    found = answers(tmp_path, regime)
    for part, (whole, _) in contestants.ABLATIONS.items():  # a switch that switches nothing is none
        if part in found and part not in contestants.OF_TUNED:  # "full" keeps no start
            assert found[part]["scores"] != found[whole]["scores"], part
    assert all(of["rows"] == found["CE"]["rows"] for of in found.values())
    args = ["report.py", str(tmp_path / "results.csv"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", args)
    report.main()
    page = (tmp_path / "RESULTS.md").read_text()
    titles = [line for line in page.splitlines() if line.startswith("## ")]
    assert titles[1:] == ["## What each method's own idea adds", "## Rerun"]
    assert "(smoke): take" in page
    assert "### Against logit adjustment" in page
    assert "From scratch" not in page


def test_with_a_start_what_is_done_is_kept_by_kind_of_hardware(
    tmp_path, monkeypatch, few_lesions, capsys
):
    methods = ["--methods", "CE", "frozen LR"]
    run_regime(monkeypatch, tmp_path, "frozen", *methods)
    path = next(tmp_path.glob("jobs/*-CE-*.json"))
    path.unlink()
    run_regime(monkeypatch, tmp_path, "frozen", *methods)
    assert "2 jobs, 2 of them done" in capsys.readouterr().out
    assert not path.exists()
    here = compare.circumstances()
    monkeypatch.setattr(compare, "circumstances", lambda: {**here, "hardware": "another"})
    run_regime(monkeypatch, tmp_path, "frozen", *methods)
    assert "2 jobs, 0 of them done" in capsys.readouterr().out
    assert sorted(row["hardware"] == "another" for row in table(tmp_path)) == 2 * [False] + 2 * [
        True
    ]


def test_the_default_of_tuning_runs(tmp_path, monkeypatch, few_lesions):
    both = "metric two-stage", "metric two-stage - start"
    methods = "--methods", "one view", "10 epochs", *both
    rows = run_regime(monkeypatch, tmp_path, "pretrained", *methods)
    found = answers(tmp_path, "pretrained")
    assert found[both[0]]["scores"] != found[both[1]]["scores"]
    assert rows["one view"]["fine_tune"] == "head_first"
    more = int(rows["10 epochs"]["n_epochs"]) - int(rows["one view"]["n_epochs"])
    assert more == 10 - compare.SUITES["pretrained", "smoke"].max_epochs


def test_ideas_that_a_frozen_start_leaves_out_change_nothing_there():
    """The metric, the relations and the E-step shape features, which stay."""
    data = compare.make_lesions([20, 12, 8, 8, 8], image_size=24, random_state=0)
    start = contestants_pretrained.STARTS["untrained"]
    setting = contestants.Setting(0, 2, (20, 12, 8, 8, 8), 1, start, 24, "frozen", 1)
    for part, (whole, _) in contestants.ABLATIONS.items():
        if part in compare.FROZEN or part.startswith("AMIMV"):
            continue
        one, other = (
            compare.TUNED[name](setting).fit(data.images, data.target).predict_proba(data.images)
            for name in (part, whole)
        )
        np.testing.assert_array_equal(one, other, err_msg=part)


def patients_and_images(folder, *, swapped=()):
    """A file of three classes and two images a patient, of which some have each other's class."""
    folder.mkdir()
    rng, y = np.random.default_rng(0), np.repeat([0, 1, 2], [60, 30, 20])
    images = (rng.integers(0, 90, (110, 24, 24)) + 60 * y[:, None, None]).astype(np.uint8)
    y[list(swapped)] = y[list(swapped)[::-1]]
    np.savez(folder / "own.npz", images=images, labels=y, groups=np.arange(110) // 2)
    return str(folder)


@pytest.fixture
def run_of_own(tmp_path, monkeypatch):
    """Folder of images, and a run of two methods on one fold of them, its test and inner rows."""
    replaced(monkeypatch, "frozen", cuts=(None, 4), sizes=(30,))
    folder, out = patients_and_images(tmp_path / "images"), tmp_path / "out"
    given = (folder, "--data", "own", "--methods", "CE", "logit adjustment")
    run_regime(monkeypatch, out, "frozen", *given)
    run_regime(monkeypatch, out, "frozen", *given, "--inner")
    return folder, out


def effects_of(out, monkeypatch, *more):
    monkeypatch.setattr(report, "figures", lambda chapter, folder: None)
    argv = ["report.py", str(out / "results.csv"), "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", argv)
    (out / "differences.csv").unlink(missing_ok=True)
    report.main()
    path = out / "differences.csv"
    return path.read_text() if path.exists() else ""


def test_predictions_outlast_the_files_of_the_jobs(tmp_path, run_of_own, monkeypatch):
    folder, out = run_of_own
    wanted = told(out)
    assert {(key[3], *key[5:7]) for key in wanted} == {
        ("test", "natural", "all"), ("test", "4", "all"), ("test", "natural", "30"),
        ("inner", "natural", "all"), ("inner", "natural", "30"),
    }  # fmt: skip
    assert compare.remembered(out / "results.csv", folder) == wanted
    effects = effects_of(out, monkeypatch)
    assert ",logit adjustment,," in effects
    page = (out / "RESULTS.md").read_text()
    (out / "jobs").rename(tmp_path / "gone")
    assert effects_of(out, monkeypatch) == ""
    assert effects_of(out, monkeypatch, "--folder", folder) == effects
    assert (out / "RESULTS.md").read_text() == page
    # Neither classes nor patients are kept.
    with (out / "predictions.csv").open() as file:
        assert csv.DictReader(file).fieldnames == [*differences.KEY, "tested", "predicted"]
    # Images are the same, and two patients that were tested have each other's class.
    tested = next(of for key, of in wanted.items() if key[3] == "test")
    first, last = min(tested["rows"]), max(tested["rows"])
    other = patients_and_images(tmp_path / "other", swapped=(first, last))
    with pytest.raises(ValueError, match="other has other images of own than"):
        compare.remembered(out / "results.csv", other)


def test_a_job_run_anew_replaces_what_was_predicted(run_of_own, monkeypatch):
    folder, out = run_of_own
    table, short = out / "results.csv", (out / "predictions.csv").read_text()
    before = effects_of(out, monkeypatch)
    path = next(out.glob("jobs/*-test-own-0-CE-*.json"))
    result = json.loads(path.read_text())
    result["tested"]["predicted"], result["balanced_accuracy"] = result["tested"]["true"], 1.0
    path.write_text(json.dumps(result))
    # Before it is gathered the file of the job wins.
    assert compare.remembered(table, folder) != told(out)
    effects = effects_of(out, monkeypatch, "--folder", folder)
    assert effects == effects_of(out, monkeypatch) != before
    monkeypatch.setattr(sys, "argv", ["compare.py", "--table", "--out", str(out)])
    compare.main()
    assert compare.remembered(table, folder) == told(out)
    # Of another run than the table they are refused, and of none there are none.
    (out / "predictions.csv").write_text(short)
    with pytest.raises(ValueError, match="are of two runs of"):
        compare.remembered(table, folder)
    del result["tested"]
    path.write_text(json.dumps(result))
    compare.write_table(out)
    assert len(compare.remembered(table, folder)) == len(told(out)) == 9


@pytest.mark.parametrize("codes", [[3], [12], [0, 1, 0], [0, 11, 9]])
def test_predictions_as_text_come_back(codes):
    images = {"rows": [4, 5, 6][: len(codes)], "patients": [0] * len(codes), "true": codes}
    short = differences.in_short({**images, "predicted": codes})
    assert differences.in_full(short, images) == {**images, "predicted": codes}
    for what in images:
        other = {**images, what: [*images[what][:-1], 7]}
        assert differences.in_full(short, other) is None
    assert differences.in_full(short, {what: of * 2 for what, of in images.items()}) is None


def test_inner_rows_never_touch_the_test_rows(tmp_path, monkeypatch):
    """What the images of the test rows hold makes no difference."""
    suite = replaced(monkeypatch, "frozen", cuts=(None,))
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], [60, 30, 20])
    archive = {
        "images": (rng.integers(0, 90, (110, 24, 24)) + 60 * y[:, None, None]).astype(np.uint8),
        "labels": y,
        "groups": np.arange(110) // 2,
    }
    outcome = {}
    for what in ("as it is", "spoilt"):
        folder = tmp_path / what
        folder.mkdir()
        if what == "spoilt":
            data = compare.load(str(tmp_path / "as it is"), "own", suite)
            test = data.rows[compare.split(data, suite, None, 1)[1]]
            assert 20 < len(test) < 60
            archive["images"][test] = rng.integers(0, 256, (len(test), 24, 24))
        np.savez(folder / "own.npz", **archive)
        given = (str(folder), "--data", "own", "--seeds", "1", "--methods", "CE")
        for more in ((), ("--inner",)):
            out = folder / f"out{len(more)}"
            row = run_regime(monkeypatch, out, "frozen", *given, *more)["CE"]
            outcome[what, row["rows"]] = answers(out, "frozen")["CE"]["scores"]
            if more:
                tested = set(answers(out, "frozen")["CE"]["rows"])
                assert not tested & set(answers(folder / "out0", "frozen")["CE"]["rows"])
    assert outcome["as it is", "inner"] == outcome["spoilt", "inner"]
    assert outcome["as it is", "test"] != outcome["spoilt", "test"]


def test_folds_with_a_start_keep_patients_whole_and_test_each_image_once(few_lesions):
    suite = dataclasses.replace(compare.SUITES["frozen", "smoke"], max_test=900)
    data = compare.load(None, "lesions", suite)
    assert 180 < len(data.target) < 220
    tested = []
    for seed in compare.FOLDS:
        train, test = compare.split(data, suite, None, seed)
        fitted, scored = compare.split(data, suite, None, seed, inner=True)
        assert set(fitted) | set(scored) == set(train)
        for a, b in ((train, test), (fitted, scored)):
            assert not set(data.groups[a]) & set(data.groups[b])
        assert len(train) <= suite.max_train + 4
        tested += test.tolist()
    assert sorted(tested) == list(range(len(data.target)))


def run_watched(monkeypatch, method):
    """Classifier of a job on a frozen start, and images, classes and patients it was given."""
    made, make = [], compare.FROZEN[method]
    monkeypatch.setitem(compare.FROZEN, method, lambda s: made.append(make(s)) or made[-1])
    suite = replaced(monkeypatch, "frozen", cuts=(None,))
    job = compare.Job("frozen", "smoke", "untrained", "test", "lesions", None, None, 0, method, "h")
    with warnings.catch_warnings():
        compare.run(job, None)
    data = compare.load(None, "lesions", suite)
    train, _ = compare.split(data, suite, None, 0)
    assert len(np.unique(data.groups[train])) < len(train)
    return made[0], data.images[train], data.target[train], data.groups[train]


@pytest.mark.parametrize("method", ["frozen LR", "frozen SVM", "frozen virtual features"])
def test_searches_of_a_baseline_keep_patients_whole(few_lesions, monkeypatch, method):
    made, _, y, patients = run_watched(monkeypatch, method)
    folds = list(check_cv(made[-1].cv, y, classifier=True).split(y, y))
    assert sorted(np.concatenate([scored for _, scored in folds])) == list(range(len(y)))
    for fitted, scored in folds:
        assert not set(patients[fitted]) & set(patients[scored])


def test_fits_of_an_ensemble_keep_patients_whole(few_lesions, monkeypatch):
    given, cls = [], contestants_pretrained.SoftmaxClassifier
    fit = cls.fit
    monkeypatch.setattr(cls, "fit", lambda clf, X, y: given.append(X) or fit(clf, X, y))
    _, X, _, patients = run_watched(monkeypatch, "logit adjustment, 5-fold ensemble")
    left_out = []
    for part in given:
        known = {image.tobytes() for image in part}
        inside = np.array([image.tobytes() in known for image in X])
        assert inside.sum() == len(part)
        assert not set(patients[inside]) & set(patients[~inside])
        left_out += np.flatnonzero(~inside).tolist()
    assert len(given) == 5
    assert sorted(left_out) == list(range(len(X)))


def test_images_of_as_many_patients_are_split_as_ever():
    y = np.repeat([0, 1], [12, 6])
    for patients in (None, tuple(range(18))):
        setting = contestants.Setting(3, 2, (12, 6), None, patients=patients)
        for given, usual in [
            (setting.folds(), StratifiedKFold(3)),
            (setting.folds(5, 3), StratifiedKFold(5, shuffle=True, random_state=3)),
        ]:
            for one, other in zip(given.split(y, y), usual.split(y, y), strict=True):
                np.testing.assert_array_equal(one[1], other[1])


@pytest.mark.parametrize(
    ("more", "match"),
    {
        ("--regime", "frozen", "--methods", "focal"): "argument --methods: 'focal' is none of",
        ("--regime", "frozen", "--suite", "levers"): "argument --suite: frozen has no levers",
        ("--start", "resnet18"): "argument --start: scratch has none",
        ("--regime", "pretrained", "--seeds", "3"): "argument --seeds: these are folds, [0, 1, 2]",
    }.items(),
)
def test_what_a_regime_does_not_have_is_refused(monkeypatch, capsys, more, match):
    monkeypatch.setattr(sys, "argv", ["compare.py", *more])
    with pytest.raises(SystemExit):
        compare.main()
    assert match in capsys.readouterr().err


def test_five_fits_vote_also_where_one_saw_no_image_of_a_class():
    X = np.array([[0.0], [0.1], [0.2], [0.9], [1.0], [1.1], [0.05], [0.95], [0.15], [5.0]])
    y = np.array(["a", "a", "a", "b", "b", "b", "a", "b", "a", "rare"])
    head = contestants.LogisticRegression(C=100)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    with pytest.warns(UserWarning, match="least populated class"):
        clf = contestants_pretrained.FoldEnsemble(head, folds).fit(X, y)
    assert sorted(len(member.classes_) for member in clf.members_) == [2, 3, 3, 3, 3]
    np.testing.assert_allclose(clf.predict_proba(X).sum(axis=1), 1)
    assert (clf.predict(X) == y).all()


# ---------------------------------------------------------------- report of several regimes


def made_rows(scores, *, regime="frozen", hardware="h", seeds=(0, 1, 2)):
    """Rows of a table; scores by contestant, one for each set."""
    sets = ("busi", "brain_tumor_mri", "herlev_papsmear", "covid_cxr")
    return [
        {
            "regime": regime, "suite": "core", "start": "net", "rows": "test", "data": data,
            "cut": "natural", "size": "all", "seed": seed, "method": method, "hardware": hardware,
            "n_train": 100, "n_classes": 2, "imbalance_ratio": 6.0, "image_size": 128,
            "balanced_accuracy": score, "macro_f1": score, "macro_auroc": score,
            "few_recall": score, "calibration_error": 0.1, "fit_seconds": 3.0,
            "predict_seconds": 0.1, "commit": "abc", "versions": "v",
        }
        for seed in seeds for method, of in scores.items()
        for data, score in zip(sets, of, strict=False)
    ]  # fmt: skip


def page_of(rows, folder, out, monkeypatch, *more):
    folder.mkdir(exist_ok=True)
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    monkeypatch.setattr(report, "figures", lambda chapter, folder: None)
    argv = ["report.py", str(folder / "results.csv"), "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", argv)
    report.main()
    return (out / "RESULTS.md").read_text()


def test_hardware_kinds_are_ranked_apart(tmp_path, monkeypatch):
    cpu = made_rows({"logit adjustment": (0.5, 0.6), "CE": (0.4, 0.7), "LMD": (0.6, 0.8)})
    gpu = made_rows({"logit adjustment": (0.9, 0.9), "CE": (0.8, 0.7)}, hardware="gpu")
    inner = [{**row, "rows": "inner", "balanced_accuracy": 1.0} for row in cpu[:1]]
    page = page_of(cpu + gpu + inner, tmp_path / "a", tmp_path, monkeypatch)
    one, two = page.split("\n## On a frozen start, ")[1:]
    assert one.startswith("gpu")
    assert "| logit adjustment | 1.0 | 0.900" in one
    assert "| CE | 2.0 | 0.750" in one
    assert "LMD" not in one
    assert "| LMD | 1.0 | 0.700" in two
    assert "| logit adjustment | 2.5 | 0.550" in two
    assert "| CE | 2.5 | 0.550" in two
    assert "From scratch" not in page
    assert "Tuning" not in page
    page = page_of(cpu + inner, tmp_path / "a", tmp_path / "b", monkeypatch, "--inner")
    assert "## On a frozen start, inner rows\n\n1 contestant on 1 set, 1 fold" in page


def test_a_contestant_with_few_runs_is_left_out_by_name(tmp_path, monkeypatch):
    rows = made_rows({"logit adjustment": (0.5, 0.6), "CE": (0.4, 0.7)})
    rows += made_rows({"full": (0.9,)}, seeds=(0,))
    page = page_of(rows, tmp_path / "a", tmp_path, monkeypatch)
    assert "Not run on enough of them: full." in page
    assert "| full |" not in page


def predictions(folder, rows, right):
    """Files of jobs: 30 patients with two images each, of which a share `right` is found."""
    (folder / "jobs").mkdir(parents=True)
    for k, row in enumerate(rows):
        true = np.tile([0, 0, 1], 20)
        wrong = np.random.default_rng(int(row["seed"])).random(60) > right[row["method"]]
        tested = {
            "rows": list(range(60)), "patients": np.repeat(np.arange(30), 2).tolist(),
            "true": true.tolist(), "predicted": np.where(wrong, 1 - true, true).tolist(),
        }  # fmt: skip
        result = {**row, "tested": tested}
        (folder / "jobs" / f"{k}.json").write_text(json.dumps(result))


def test_page_is_the_same_without_the_predictions_it_came_from(tmp_path, monkeypatch):
    right = {"logit adjustment": 0.6, "LMD": 0.9, "CSSN": 0.61, "frozen LR, views + depths": 0.5}
    rows = made_rows({name: 4 * (share,) for name, share in right.items()})
    predictions(tmp_path / "a", rows, right)
    page = page_of(rows, tmp_path / "a", tmp_path / "a", monkeypatch)
    assert page == page_of(rows, tmp_path / "a", tmp_path / "a", monkeypatch)
    assert "Shown to be ahead of logit adjustment: LMD; not shown: CSSN." in page
    assert "by patients" in page.split("\n\n")[1]
    # What the sets say that defaults were chosen on is shown by the others, or not at all.
    some = [row for row in rows if row["data"] in report_rows.CHOSEN_ON]
    said = page_of(some, tmp_path / "a", tmp_path / "c", monkeypatch)
    assert "None of LMD, CSSN is shown" in said or "None of CSSN, LMD is shown" in said
    assert page_of(rows, tmp_path / "a", tmp_path / "a", monkeypatch) == page
    other = tmp_path / "b"
    other.mkdir()
    kept = (tmp_path / "a" / "differences.csv").read_text()
    (other / "differences.csv").write_text(kept)
    assert page_of(rows, other, other, monkeypatch) == page
    assert (other / "differences.csv").read_text() == kept
    # Of another table they are not.
    for row in rows:
        row["balanced_accuracy"] += 0.01 * (row["method"] == "LMD")
    (other / "differences.csv").write_text(kept)
    advice = page_of(rows, other, other, monkeypatch).split("\n\n")[1]
    assert "by sets" in advice
    assert "by patients" not in advice


def test_differences_by_patients_are_those_of_paired_difference(tmp_path):
    right = {"logit adjustment": 0.6, "LMD": 0.9}
    rows = [row for row in made_rows(dict.fromkeys(right, (0.5,))) if row["seed"] == 0]
    predictions(tmp_path, rows, right)
    pair = ("LMD", "logit adjustment")
    found = differences.by_patients(
        rows, differences.tested(tmp_path / "jobs"), [pair, pair[:1] * 2], {"all": {"busi"}}
    )
    one, other = (compare.read_result(tmp_path / "jobs" / f"{k}.json")["tested"] for k in (1, 0))
    assert found["LMD", "", "all"].mean == pytest.approx(
        balanced_accuracy_score(one["true"], one["predicted"])
    )
    wanted = paired_difference(
        balanced_accuracy_score, one["true"], one["predicted"], other["predicted"],
        groups=one["patients"], random_state=0,
    )  # fmt: skip
    ahead = found["LMD", "logit adjustment", "all"]
    assert ahead.mean == pytest.approx(wanted.score)
    assert ahead.low == pytest.approx(wanted.low, abs=0.05)
    assert ahead.high == pytest.approx(wanted.high, abs=0.05)
    assert ahead.p < 0.01
    assert found["LMD", "LMD", "all"] == (0, 0, 0, 1)


def curve_rows():
    """Two methods on four sets: the small ones are easy, and lack the largest part."""
    rows, level = [], {"busi": 0.5, "covid_cxr": 0.6, "brain_tumor_mri": 0.8, "dementia_mri": 0.9}
    points = {
        ("natural", "all"): 0,
        ("natural", 50): -0.2,
        ("natural", 200): -0.1,
        (5, "all"): -0.3,
    }
    for (cut, size), change in points.items():
        sets = ("busi", "covid_cxr", "dementia_mri") if size == 200 else level
        for k, data in enumerate(sets):
            for method, more in (("logit adjustment", 0), ("LMD", 0.05 if size == 50 else -0.01)):
                score = round(level[data] + change + more + 0.01 * k * (change < 0), 4)
                facts = {"data": data, "cut": cut, "size": size, "balanced_accuracy": score}
                rows.append({**made_rows({method: (0,)}, seeds=(0,))[0], **facts})
    return [{**row, "suite": "curves"} for row in rows]


def test_curves_are_of_the_changes_that_sets_have(tmp_path, monkeypatch):
    """Means over the sets of each size would fall where the easy ones drop out."""
    rows = curve_rows()
    page = page_of(rows, tmp_path / "a", tmp_path, monkeypatch)
    chapter, *_ = report.chapters(report.read(tmp_path / "a" / "results.csv"))
    by_size, by_ratio = report.courses(chapter)
    assert by_size.places == [50, 200, 400]
    assert by_size.ticks == ["50\n(4)", "200\n(3)", "all\n(4)"]
    assert by_ratio.ticks == ["as they are\n(4)", "1 : 5\n(4)"]
    assert by_ratio.places == [2.5, 5]
    x, y, low, high = by_size.lines["logit adjustment"].T
    np.testing.assert_array_equal(x, [50, 200, 400])
    np.testing.assert_allclose(y, [0.7 - 0.185, 0.7 - 0.09, 0.7])
    half = 3.1824 * np.std([0, 0.01, 0.02, 0.03], ddof=1) / 2
    np.testing.assert_allclose((high - low) / 2, [half, 4.3027 * 0.01 / 3**0.5, 0], atol=1e-5)
    assert page.count("## How much with how many images, and how imbalanced") == 1
    assert (
        "**logit adjustment changes** from 50 images to all by +.185 "
        f"[{report.signed(0.185 - half)}, {report.signed(0.185 + half)}] (4 sets); from 200 images "
        "to all by +.090 [" in page
    )
    assert "First by mean: LMD (50 images); " in page
    behind = "-.010".replace("-", "\N{MINUS SIGN}")
    assert "Of 4 points, the interval of the difference to logit adjustment excludes 0 for " in page
    assert f"LMD ahead at 1 (+.050 to +.050); LMD behind at 3 ({behind} to {behind})." in page
    same = f"{behind} [{behind}, {behind}]"
    assert f"| LMD | +.050 [+.050, +.050] | {same} | {same} |" in page
    assert "take" not in page  # nobody is ranked
    monkeypatch.undo()
    report.figures(chapter, tmp_path)
    assert [p.name for p in tmp_path.glob("*.png")] == ["curves-frozen-curves-net.png"]


def idea_rows(gain, *, n_classes=3):
    """Pairs on thirteen sets: seven of them confirm."""
    confirm = ["covid_cxr", "iq_othnccd_ct", "dr_maculopathy", "ph2_dermoscopy"]
    sets = [
        *confirm,
        "brain_tumor_mri",
        "adrenalmnist3d",
        "lesions",
        *sorted(report_rows.AUGMENTED),
    ]
    rows = []
    for method, of in gain.items():
        for k, data in enumerate(sets):
            score = 0.6 + of(k, data in report_rows.AUGMENTED)
            rows += scratch_rows({method: {(data, "natural"): round(score, 4)}}, suite="ideas")
    return [{**row, "n_classes": n_classes} for row in rows]


def test_an_idea_is_shown_by_all_sets_and_by_the_confirming_ones_alone(tmp_path, monkeypatch):

    def wave(k):
        return 0.002 * (k % 3)

    rows = idea_rows(
        {
            "LMD": lambda k, _: 0.05 + wave(k), "LMD - relations": lambda *_: 0.0,
            "LMD - E-step": lambda k, _: 0.09 + wave(k + 1),
            # Ahead over all sets by those that its defaults may have been chosen on.
            "SPMix": lambda k, chosen: 0.15 * chosen + wave(k), "SPMix uniform": lambda *_: 0.005,
            "CSSN": lambda k, _: wave(k), "CSSN - auxiliary": lambda k, _: wave(k + 1),
        }
    )  # fmt: skip
    # What two classes say of CSSN, and what only one of a pair was run on, is left out.
    two = [row["data"] == "busi" and row["method"].startswith("CSSN") for row in rows]
    for row in itertools.compress(rows, two):
        row.update(n_classes=2, balanced_accuracy=0.9 if row["method"] == "CSSN" else 0.1)
    lacking = ("LMD - relations", "lesions", 1)
    rows = [row for row in rows if (row["method"], row["data"], row["seed"]) != lacking]
    page = page_of(rows, tmp_path / "a", tmp_path, monkeypatch)
    said = page.split("\n\n")[2]
    assert said.startswith("**Shown to add:** LMD against LMD - relations from scratch +.05")
    assert "These are 1 of 4 pairs, of 1 of 3 methods." in said
    assert "Of CSSN, SPMix no idea is shown to add anything." in said
    assert "Behind what is left of it, p < 0.05: LMD against LMD - E-step from scratch" in said
    cells = [line.split(" | ") for line in page.splitlines() if line.startswith("| From scratch")]
    found = {tuple(line[1:3]): line[3:] for line in cells}
    assert {pair: line[0] for pair, line in found.items()} == {
        ("CSSN", "CSSN - auxiliary"): "12", ("LMD", "LMD - relations"): "13",
        ("LMD", "LMD - E-step"): "13", ("SPMix", "SPMix uniform"): "13",
    }  # fmt: skip
    assert float(found["SPMix", "SPMix uniform"][4]) < 0.05  # and yet
    assert [line[-1] for line in found.values()] == ["no |", "yes |", "no |", "no |"]
    assert abs(float(found["CSSN", "CSSN - auxiliary"][1].replace("\N{MINUS SIGN}", "-"))) < 0.005
    assert "take" not in page


def test_two_classes_do_not_shrink_a_ranking(tmp_path, monkeypatch):
    """What is not run there, since nothing is left out, stands in no rank and in its own table."""
    scores = {"logit adjustment": 0.5, "CSSN": 0.7, "CSSN - auxiliary": 0.6}
    rows = made_rows({name: 4 * (score,) for name, score in scores.items()})
    rows = [{**row, "n_classes": 2 if row["data"] == "busi" else 3} for row in rows]
    kept = [row for row in rows if row["n_classes"] > 2 or row["method"] != "CSSN - auxiliary"]
    page = page_of(kept, tmp_path / "a", tmp_path, monkeypatch)
    assert "2 contestants on 4 sets" in page
    assert "Not run on enough of them: CSSN - auxiliary." in page
    row = "| On a frozen start | CSSN | CSSN - auxiliary | 3 | +.100 |"
    assert row in page
    page = page_of(rows, tmp_path / "b", tmp_path, monkeypatch)  # as older tables have it
    assert "3 contestants on 4 sets" in page
    assert row in page


def test_statistics_on_numbers_done_by_hand():
    assert differences.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "c": 0.06, "b": 0.06}
    )
    scores = {"a": np.array([0.9, 0.5, 0.7]), "b": np.array([0.8, 0.5, 0.9]), "c": np.zeros(3)}
    assert report.ranks(scores) == pytest.approx({"a": 4.5 / 3, "b": 4.5 / 3, "c": 3.0})
    rows = made_rows({"a": (0.5, 0.7, 0.9, 0.6), "b": (0.4, 0.6, 0.7, 0.6)})
    found = differences.by_sets(rows, "a", "b")
    gain = np.array([0.1, 0.1, 0.2, 0.0])
    half = 3.1824 * gain.std(ddof=1) / 2
    assert found[:3] == pytest.approx((0.1, 0.1 - half, 0.1 + half), abs=1e-4)


def test_defaults_are_those_of_the_package():
    """Beside them the afternoon CNN, with its 40 epochs."""
    suite = compare.SUITES["scratch", "defaults"]
    setting = contestants.Setting(0, 2, (20, 12, 8), suite.step_share)
    for name in suite.methods:
        made = contestants.METHODS[name](setting)
        if name == "afternoon CNN":
            assert made.max_epochs == 40
            continue
        usual = type(made)().get_params()
        changed = {k for k, v in made.get_params().items() if v != usual.get(k)}
        assert changed <= {"random_state", "spatial_dims", "loss"}
