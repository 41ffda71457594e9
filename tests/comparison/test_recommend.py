"""recommend: what evidence, budget and start decide, and what is refused."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import pickle
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.utils.validation import check_is_fitted

from sklearn_medimb import AMIMVClassifier, AMIMVEncoder, SoftmaxClassifier
from sklearn_medimb._training.network import Trunk
from sklearn_medimb.backbones import ConvNet, EfficientNetLite, ResNet, Start
from sklearn_medimb.base._classifier import usual_steps
from sklearn_medimb.comparison import _candidates as candidates
from sklearn_medimb.comparison import _compare, common_methods, recommend
from sklearn_medimb.comparison._advice import as_seconds, in_words, reason
from sklearn_medimb.comparison._reading import read
from sklearn_medimb.comparison._rule import Expected, Row, choose, evidence, expected, work
from sklearn_medimb.comparison._trial import short_list


class Started(ConvNet):
    """A small network that passes for one with weights of elsewhere, best left as it is."""

    gains_from_tuning = False

    @property
    def start(self):
        return Start(mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3), image_size=8, digest="test")


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def problem():
    """Where it is bright, one in four on the right: a network that flips and averages is blind."""
    rng = np.random.default_rng(0)
    y = np.repeat(["left", "right"], [36, 12])
    X = rng.integers(0, 120, (48, 8, 8), dtype=np.uint8)
    X[y == "left", :, :2] += 130
    X[y == "right", :, -2:] += 130
    return X, y, np.arange(48) // 2


def rows(scores, *, regime="scratch", seconds=1.0, n_sets=3, **about):
    """A bench where each method has one score everywhere, and where it took so long."""
    facts = {"n_train": 200, "n_classes": 2, "imbalance_ratio": 5.0, **about}
    each = seconds if isinstance(seconds, dict) else dict.fromkeys(scores, seconds)
    sides = {"side": 28, "spatial_dims": 2}
    return [
        Row(regime, f"{facts['n_train']}-{k}", "natural", name, **facts, **sides, score=score,
            seconds=each[name])
        for k in range(n_sets)
        for name, score in scores.items()
    ]  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    """Put other evidence in the place of the package's."""
    return lambda *tables: monkeypatch.setattr(
        candidates, "evidence", lambda: [*itertools.chain(*tables)]
    )


@pytest.fixture
def installed(monkeypatch):
    """Have weights of ImageNet installed, or not."""

    def found(are_there):
        find = importlib.util.find_spec
        there = lambda name: object() if are_there else None  # noqa: E731
        monkeypatch.setattr(
            importlib.util, "find_spec",
            lambda name, *a: there(name) if "efficientnet" in name else find(name, *a),
        )  # fmt: skip

    return found


# ---------------------------------------------------------------- the rule


def test_near_sets_weigh_most_and_one_set_counts_as_one_however_often_it_is_cut():
    few = rows({"logit adjustment": 0.5, "LMD": 0.7, "CSSN": 0.6}, n_train=100)
    many = rows({"logit adjustment": 0.8, "LMD": 0.6, "CSSN": 0.7}, n_train=5000)
    near_few = expected(few + many, 110, 2, 5.0)
    near_many = expected(few + many, 4500, 2, 5.0)
    assert near_few["LMD"].score > near_few["CSSN"].score
    assert near_many["LMD"].score < near_many["CSSN"].score < near_many["logit adjustment"].score
    assert abs(near_few["logit adjustment"].score - 0.5) < 0.1

    again = [row._replace(data=few[0].data, cut=str(k)) for k in range(20) for row in few[:3]]
    both = expected(few + again + many, 700, 2, 5.0)
    assert both["LMD"].score == pytest.approx(expected(few + many, 700, 2, 5.0)["LMD"].score)


def test_a_hand_made_mean():
    """One set at no distance weighs 1, and the mean of all sets another 1."""
    known = rows({"logit adjustment": 0.6, "LMD": 0.7}, n_sets=1)
    far = rows({"logit adjustment": 0.6, "LMD": 0.5}, n_train=10**9, n_sets=3)
    found = expected(known + far, 200, 2, 5.0)
    everywhere = (0.1 - 3 * 0.1) / 4
    assert found["LMD"].score == pytest.approx(0.6 + (0.1 + everywhere) / 2)


def test_methods_with_too_few_sets_have_no_evidence():
    table = rows({"logit adjustment": 0.6}) + rows({"LMD": 0.9}, n_sets=2)
    assert set(expected(table, 200, 2, 5.0)) == {"logit adjustment"}
    assert expected(rows({"LMD": 0.9}), 200, 2, 5.0) == {}


def test_what_is_level_must_be_much_cheaper():
    scores = {"a": 0.700, "b": 0.698, "c": 0.690}
    assert choose(scores, {"a": 10, "b": 6, "c": 1}) == "a"
    assert choose(scores, {"a": 10, "b": 5, "c": 1}) == "b"
    assert choose(scores | {"b": 0.7}, {"a": 10, "b": 9, "c": 1}) == "b"


def test_evidence_names_what_can_be_made():
    assert {row.method for row in evidence()} <= set(candidates.METHODS)
    assert {"scratch", "frozen", "pretrained"} == {row.regime for row in evidence()}
    by_key = {(row.regime, row.data, row.cut, row.method) for row in evidence()}
    assert len(by_key) == len(evidence())


# ---------------------------------------------------------------- budget and cost


@pytest.mark.parametrize(
    ("budget", "seconds"),
    [("2 minutes", 120), ("30 s", 30), ("1 hour", 3600), (" 1.5h", 5400), ("45 seconds", 45),
     ("1 min", 60), (".5 Minutes", 30), (7, 7), (np.float32(2.5), 2.5), ("10 secs", 10),
     ("2 hr", 7200), ("3 hrs", 10800), ("5 m", 300)],
)  # fmt: skip
def test_budgets_in_words(budget, seconds):
    assert as_seconds(budget) == seconds


@pytest.mark.parametrize(
    "budget",
    [
        "",
        "soon",
        "2",
        "minutes",
        "-1 min",
        "2 fortnights",
        0,
        -3,
        np.nan,
        np.inf,
        "0 s",
        "500 ms",
        True,
        None,
    ],
)
def test_wrong_budgets_are_refused(budget, problem):
    X, y, _ = problem
    with pytest.raises((ValueError, TypeError), match="budget="):
        recommend(X, y, budget=budget, start=False)


def test_times_in_words():
    found = [in_words(seconds) for seconds in (0.42, 12, 200, 5400, 36_000, 720_000)]
    assert found == ["0.4 s", "12 s", "3 min", "1.5 h", "10 h", "200 h"]


def test_amimv_has_as_many_steps_without_labels_as_with(bench):
    X = np.zeros((640, 8, 8), dtype=np.uint8)
    bench(rows({"logit adjustment": 0.5, "AMIMV": 0.9}))
    encoder = recommend(X, np.arange(640) % 2, start=False, budget="9 hours").estimator.pretrain
    assert encoder.max_epochs * 640 // 32 == usual_steps(640, 2, 2) == 400


def test_a_smaller_budget_changes_the_choice(problem):
    X, y, _ = problem
    rich, poor = (recommend(X, y, start=False, budget=budget) for budget in (3600, 1))
    assert rich.seconds > 1 >= poor.seconds
    assert poor.method == "balanced forest" != rich.method
    assert {row["method"] for row in poor.table if row["note"] == "over the budget"}
    assert f"With more time: {rich.table[0]['method']}" in poor.reason
    assert "With more time" not in rich.reason
    with pytest.raises(ValueError, match=r"budget=.*balanced forest needs about"):
        recommend(X, y, start=False, budget=1e-6)


@pytest.mark.parametrize(("n", "epochs", "shape"), [(640, "auto", (64,)), (70, 3, (8, 8))])
def test_steps_are_those_of_a_fit(problem, n, epochs, shape):
    X = np.resize(problem[0], (n, *shape)).astype(float) / 255
    clf = SoftmaxClassifier(backbone="mlp", max_epochs=epochs, random_state=0)
    clf.fit(X, np.arange(n) % 2)
    n_steps = clf.n_iter_ * -(-n // 64)
    given = None if epochs == "auto" else epochs
    assert work("cross-entropy", "scratch", n, 2, shape, given) == pytest.approx(
        6e-7 * n_steps * min(n, 64) * (64 + 300)
    )


def test_estimates_grow_with_the_work(problem):
    X, y, _ = problem
    small = recommend(X, y, start=False)
    big = recommend(np.repeat(np.repeat(X, 8, 1), 8, 2), y, start=False)
    seconds = ({row["method"]: row["seconds"] for row in one.table} for one in (small, big))
    small_, big_ = seconds
    assert all(big_[name] > 4 * small_[name] for name in small_ if name != "balanced forest")
    short = recommend(X, y, start=False, max_epochs=1)
    assert max(row["seconds"] for row in short.table) < 1


def test_an_estimate_holds_roughly(problem):
    """Loosely: the machine of the tests may be another one, and busy."""
    X = np.repeat(np.repeat(problem[0], 4, 1), 4, 2)
    advice = recommend(X, problem[1], start=False, max_epochs=20, random_state=0)
    start = time.process_time()
    advice.estimator.fit(X, problem[1])
    assert advice.seconds / 10 < time.process_time() - start < 10 * advice.seconds


# ---------------------------------------------------------------- starts


def test_a_start_that_is_not_installed_is_said(problem, installed):
    X, y, _ = problem
    installed(False)
    advice = recommend(X, y)
    assert advice.regime == "scratch"
    assert 'pip install "sklearn_medimb[pretrained]"' in str(advice)
    assert advice.estimator.get_params().get("backbone") == "auto"
    assert "pip" not in str(recommend(X, y, start=False))
    with pytest.raises(ImportError, match="start='efficientnet_lite0'"):
        recommend(X, y, start="efficientnet_lite0")


@pytest.mark.parametrize("start", [None, "efficientnet_lite0", EfficientNetLite()])
def test_a_start_is_tuned_where_the_budget_allows_else_frozen_else_left_out(
    problem, installed, start
):
    X, y, _ = problem
    installed(True)
    found = {
        budget: recommend(X, y, start=start, budget=budget) for budget in ("1 hour", "9 s", "1 s")
    }
    tuned, frozen, scratch = found.values()
    assert [one.regime for one in found.values()] == ["pretrained", "frozen", "scratch"]
    params = [one.estimator.get_params(deep=False) for one in (tuned, frozen)]
    assert "head_first" in params[0].values()
    assert "frozen" in params[1].values() or frozen.method == candidates.FROZEN_LR
    assert "efficientnet_lite0" in tuned.reason or "EfficientNetLite" in tuned.reason
    assert any("takes longer" in note for note in frozen.notes)
    assert scratch.method == "balanced forest"


def test_a_forest_takes_the_column_of_a_table_that_it_is_advised_for():
    pd = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (16, 16), dtype=np.uint8) for _ in range(60)]
    y = np.repeat([0, 1], [48, 12])
    for X in (pd.DataFrame({"image": images}), pd.Series(images)):
        advice = recommend(X, y, budget=2, start=False, random_state=0)
        assert advice.method == "balanced forest"
        found = advice.estimator.fit(X, y).predict_proba(X)
        np.testing.assert_array_equal(
            found, clone(advice.estimator).fit(np.stack(images), y).predict_proba(np.stack(images))
        )


def test_many_images_are_tuned_on_a_cpu_where_the_time_allows(installed):
    installed(True)
    X, y = np.zeros((2000, 8, 8), dtype=np.uint8), np.arange(2000) % 2
    found = [recommend(X, y, device="cpu", budget=budget) for budget in ("10 minutes", "1 hour")]
    assert [one.regime for one in found] == ["frozen", "pretrained"]
    assert "Tuning takes longer than 10 min." in found[0].notes


def test_volumes_and_vectors_have_no_start(problem, installed):
    installed(True)
    X, y, _ = problem
    volumes = recommend(np.repeat(X[:, None], 8, axis=1), y, spatial_dims=3)
    vectors = recommend(X.reshape(48, -1).astype(float), y)
    assert {volumes.regime, vectors.regime} == {"scratch"}
    assert "no start for volumes" in str(volumes)
    assert "no start for feature vectors" in str(vectors)
    with pytest.raises(ValueError, match=r"start='efficientnet_lite0' reads images of 2 axes"):
        recommend(np.repeat(X[:, None], 8, axis=1), y, spatial_dims=3, start="efficientnet_lite0")


def test_starts_of_other_kinds(problem, tmp_path):
    X, y, _ = problem
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU())
    encoder = AMIMVEncoder(max_epochs=1, random_state=0).fit(X)
    for start in (net, encoder, ResNet(weights=tmp_path / "w.pt")):
        advice = recommend(X, y, start=start, budget="1 hour")
        assert advice.regime == "pretrained"
        assert advice.estimator.get_params(deep=False)["backbone"] is start
        assert "of this start" in str(advice)
        size = None if start is encoder else 128
        assert advice.estimator.get_params(deep=False)["image_size"] == size

    several = [np.resize(image, (8 + k % 3, 9)) for k, image in enumerate(X)]
    advice = recommend(several, y, start=encoder, budget="1 hour")
    assert advice.estimator.get_params(deep=False)["image_size"] == (8, 8)  # which it knows

    class BestFrozen(ResNet):
        gains_from_tuning = False

    advice = recommend(X, y, start=BestFrozen(weights=tmp_path / "w.pt"), budget="1 hour")
    assert advice.regime == "frozen"


@pytest.mark.parametrize(
    ("start", "message"),
    [("efficientnet", "start='efficientnet' is unknown"), ("resnet18", "no weights of elsewhere"),
     (True, "start=True"), (3, "start=3"), ("auto", "start='auto'")],
)  # fmt: skip
def test_wrong_starts_are_refused(problem, start, message):
    with pytest.raises((ValueError, TypeError), match=message):
        recommend(*problem[:2], start=start)


@pytest.mark.parametrize("start", [AMIMVEncoder(), SoftmaxClassifier()])
def test_starts_that_are_not_fitted_are_refused(problem, start):
    with pytest.raises(NotFittedError, match=rf"start={type(start).__name__}\(...\) is not fitted"):
        recommend(*problem[:2], start=start)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("params", "message"),
    [({"augment": "xx"}, "augment must be"), ({"fine_tune": True}, "fine_tune"),
     ({"image_size": (0, 8)}, "image_size="), ({"callbacks": 3}, "callbacks"),
     ({"pretrain": "simclr"}, "pretrain= is nothing that all"), ({"sampler": None}, "sampler= is"),
     ({"loss": "focal"}, "loss= is"), ({"class_weight": "balanced"}, "class_weight= is")],
)  # fmt: skip
def test_wrong_parameters_are_refused_before_anything_is_read(problem, params, message):
    with pytest.raises((ValueError, TypeError), match=message):
        recommend([], problem[1], start=False, **params)


def test_labels_that_no_classifier_takes_are_refused(problem):
    X, y, _ = problem
    with pytest.raises(ValueError, match="continuous"):
        recommend(X, np.linspace(0, 1, 48), start=False)
    with pytest.raises(ValueError, match=r"y without -1 must hold labels of one kind"):
        recommend(X, np.array([-1, 1, *y[2:]], dtype=object), start=False)


def test_wrong_input_is_refused(problem):
    X, y, groups = problem
    ask = {"start": False}
    with pytest.raises(ValueError, match="groups has shape"):
        recommend(X, y, groups[:-1], **ask)
    with pytest.raises(ValueError, match="48 images, y 47 labels"):
        recommend(X, y[:-1], **ask)
    with pytest.raises(ValueError, match="y has no label in row 3"):
        recommend(X, [None if k == 3 else label for k, label in enumerate(y)], **ask)
    with pytest.raises(ValueError, match="one class only"):
        recommend(X, np.zeros(48), **ask)
    bad = X.astype(float)
    bad[5, 0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        recommend(bad, y, **ask)
    with pytest.raises(ValueError, match="backbone: start= says"):
        recommend(X, y, backbone="resnet18")
    with pytest.raises(TypeError, match="no_such"):
        recommend(X, y, no_such=1, **ask)
    for name, value in (("max_epochs", 0), ("batch_size", -1), ("lr", "fast")):
        with pytest.raises(ValueError, match=f"'{name}' parameter"):
            recommend(X, y, **{name: value}, **ask)
    with pytest.raises(TypeError, match="try_out='yes'"):
        recommend(X, y, try_out="yes", **ask)
    with pytest.raises(ValueError, match="seed"):
        recommend(X, y, random_state="a", **ask)
    with pytest.raises(ValueError, match="device="):
        recommend(X, y, device="no such device", **ask)


@pytest.mark.parametrize(("groups", "what"), [(None, "images"), (True, "patients")])
def test_a_trial_needs_images_and_patients_of_each_class(problem, groups, what):
    X, y, _ = problem
    if groups is None:
        y = np.where(np.arange(48) < 2, "rare", y)
    else:
        groups = np.where(y == "right", 40 + np.arange(48) % 2, np.arange(48))
    with pytest.raises(ValueError, match=rf"try_out=True: class .* has 2 {what}"):
        recommend(X, y, groups, try_out=True, start=False, max_epochs=1)
    recommend(X, y, groups, start=False)
    with pytest.raises(ValueError, match="class 1 of y has 1 image, and"):
        recommend(X, np.eye(48, dtype=int)[0], start=False, try_out=True)


def test_a_trial_beyond_the_budget_is_refused(problem):
    X, y, _ = problem
    with pytest.raises(ValueError, match=r"budget=1 is too little to try two methods out"):
        recommend(X, y, budget=1, try_out=True, start=False)


# ---------------------------------------------------------------- the trial


def test_a_trial_finds_what_is_better_here(problem, bench):
    X, y, groups = problem
    bench(rows({"logit adjustment": 0.5, "cross-entropy": 0.9, "balanced forest": 0.6}))
    ask = {"start": False, "max_epochs": 1, "lr": 1e-9, "random_state": 0}  # no network learns
    assert recommend(X, y, groups, **ask).method == "cross-entropy"
    advice = recommend(X, y, groups, try_out=True, **ask)
    assert advice.method == "balanced forest"
    assert advice.score == advice.comparison.scores["balanced accuracy"]["balanced forest"].score
    inner = {row["method"]: row["inner"] for row in advice.table}
    assert inner["balanced forest"] > inner["cross-entropy"] + 0.2
    assert "tried out on 3 folds of whole patients" in advice.reason
    assert f"{advice.score:.2f} (evidence: 0.60)" in advice.reason
    for train, test in advice.comparison.folds:
        assert not set(groups[train]) & set(groups[test])


def test_a_trial_that_guesses_says_so(problem, bench):
    X, y, groups = problem
    ask = {"start": False, "try_out": True, "max_epochs": 1, "lr": 1e-9, "random_state": 0}
    bench(rows({"logit adjustment": 0.9, "cross-entropy": 0.8}))
    blind = recommend(X, y, groups, **ask)
    assert blind.score < 0.55
    assert "hardly better than guessing" in blind.reason
    bench(rows({"logit adjustment": 0.9, "balanced forest": 0.8}))
    sees = recommend(X, y, groups, **ask)
    assert sees.score > 0.9
    assert "guessing" not in sees.reason


def test_a_trial_has_as_many_methods_as_the_budget_allows(problem, bench):
    X, y, _ = problem
    names = ["logit adjustment", "cross-entropy", "focal loss", "LDAM", "class weights"]
    bench(rows(dict(zip(names, [0.5, 0.6, 0.7, 0.8, 0.9], strict=True))))
    cost = recommend(X, y, start=False, max_epochs=1).seconds
    for budget, tried in ((5.5 * cost, 2), (100 * cost, 4)):
        advice = recommend(X, y, start=False, max_epochs=1, try_out=True, budget=budget)
        assert sorted(advice.comparison.names) == sorted(names[-tried:])


def test_a_trial_falls_back_to_a_cheaper_way(problem, bench):
    """Two trials and a fit take as long as five fits."""
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU())
    scores = {"logit adjustment": 0.5, "cross-entropy": 0.6}
    bench(rows(scores, regime="pretrained", seconds=1e9), rows(scores, regime="frozen"))
    ask = {"start": net, "image_size": 8, "max_epochs": 1, "random_state": 0}
    table = recommend(*problem[:2], **ask, budget="1000000 h").table
    tuning = table[0]["seconds"]
    advice = recommend(*problem[:2], **ask, budget=1.1 * tuning, try_out=True)
    assert advice.regime == "frozen"
    assert len(advice.comparison.names) == 2
    assert f"Trying out tuning takes longer than {in_words(1.1 * tuning)}" in str(advice)
    assert recommend(*problem[:2], **ask, budget=1.1 * tuning).regime == "pretrained"


def test_a_dear_first_method_leaves_room_for_a_second():
    listed = {
        name: {"score": score, "seconds": seconds}
        for name, score, seconds in [("a", 0.9, 30), ("b", 0.8, 12), ("c", 0.7, 10)]
    }
    names = [short_list(listed, budget) for budget in (110, 109, 56, 55, 10**6)]
    assert names == [["a", "c"], ["b", "c"], ["b", "c"], [], ["a", "b", "c"]]


@pytest.mark.parametrize(("score", "guesses"), [(0.66, True), (0.67, False)])
def test_the_score_of_a_trial_is_flattered_and_noise_is_guessing(problem, score, guesses):
    """Of 36 and 12 images, guessing has an error of .083."""
    data = read(*problem[:2], None, {})
    row = {"method": "LMD", "score": 0.9, "inner": score, "seconds": 1.0, "fits": True}
    way = candidates.Way("scratch", (8, 8), {"LMD": Expected(0.9, 0.1)}, {}, [row])
    told = [
        reason("LMD", way, dict.fromkeys(names, score), data, 9, None)
        for names in (("LMD", "CSSN", "SPMix"), ("LMD",))
    ]
    assert "flattered as the best of 3" in told[0]
    assert "flattered" not in told[1]
    assert all(("hardly better than guessing" in text) == guesses for text in told)


def test_the_inner_search_of_a_frozen_start_says_that_it_splits_patients(problem, bench):
    X, y, groups = problem
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU())
    bench(rows({"logit adjustment": 0.5, candidates.FROZEN_SVM: 0.9}, regime="frozen"))
    ask = {"start": net, "image_size": 8, "random_state": 0}
    assert "patients whole" not in str(recommend(X, y, **ask))
    advice = recommend(X, y, groups, **ask)
    assert "Its inner search, of C, does not keep patients whole" in str(advice)
    splits = []

    class Watched(StratifiedGroupKFold):
        def split(self, X, y=None, groups=None):
            splits.append(groups)
            return super().split(X, y, groups)

    clf = advice.estimator.set_params(gridsearchcv__cv=Watched(3))  # what it says works
    clf.fit(X, y, gridsearchcv__groups=groups)
    np.testing.assert_array_equal(splits[0], groups)


@pytest.fixture
def encodings(monkeypatch):
    """Of each fit of a trial, how many images the backbone encoded."""
    found, encoded, encode, fit = [], [], Trunk._encode, _compare.fitted_on

    def watched_fit(rows, *args):
        encoded.clear()
        made = fit(rows, *args)
        found.append(sum(encoded))
        return made

    def watched(trunk, images):
        if images.any():  # blank ones tell shapes
            encoded.append(len(images))
        return encode(trunk, images)

    monkeypatch.setattr(Trunk, "_encode", watched)
    monkeypatch.setattr(_compare, "fitted_on", watched_fit)
    return found


@pytest.mark.parametrize("first", ["logit adjustment", candidates.FROZEN_LR])
def test_methods_of_a_trial_encode_the_images_of_a_fold_once(
    problem, bench, encodings, tmp_path, first
):
    X, y, groups = problem
    X = np.where(X == 0, 1, X)[..., None].repeat(3, axis=3)
    names = ["logit adjustment", "LMD", candidates.FROZEN_LR, candidates.FROZEN_SVM]
    bench(rows(dict.fromkeys(names, 0.5) | {first: 0.9}, regime="frozen"))
    ask = {"start": Started(widths=(4, 8)), "image_size": 8, "max_epochs": 1, "random_state": 0}
    found = {}
    for memory in (None, tmp_path):
        encodings.clear()
        advice = recommend(
            X, y, groups, **ask, try_out=True, budget="1 hour", device="cpu", memory=memory
        )
        assert advice.regime == "frozen"
        assert sorted(advice.comparison.names) == sorted(names)
        of_fold = [4 * len(train) for train, _ in advice.comparison.folds]  # in four views
        assert encodings == of_fold + (9 * [0] if memory else 3 * of_fold)
        found[memory] = {name: advice.comparison.predictions[name].tolist() for name in names}
    assert found[None] == found[tmp_path]


def test_methods_that_need_the_same_of_a_frozen_start_share_it(problem, encodings, tmp_path):
    X, y, _ = problem
    X = np.where(X == 0, 1, X)[..., None].repeat(3, axis=3)
    how = {"backbone": Started(widths=(4, 8)), "fine_tune": "frozen", "max_epochs": 1}
    methods = common_methods(**how, random_state=0, memory=tmp_path)
    for clf in methods.values():
        _compare.fitted_on(np.arange(48), clf, X, y, None)
    own = {name for name, n in zip(methods, encodings, strict=True) if n}
    assert own == {next(iter(methods)), "CSSN", "SPMix"}
    assert sum(encodings) == 3 * 4 * 48


# ---------------------------------------------------------------- unlabelled images


def test_unlabelled_images_lead_to_amimv_only_by_evidence(problem, bench):
    X, y, _ = problem
    y = np.where(np.arange(48) % 3 == 0, -1, (y == "right").astype(int))
    advice = recommend(X, y, start=False)
    assert advice.method != "AMIMV"
    assert "16 images without a label (-1) are left out" in str(advice)
    assert "32 labelled images" in advice.reason
    bench(rows({"logit adjustment": 0.5, "AMIMV": 0.8}))
    advice = recommend(X, y, start=False)
    assert isinstance(advice.estimator, AMIMVClassifier)
    assert "serve its pre-training" in str(advice)
    two = recommend(X, np.where(y == 0, -1, 1), start=False)  # then -1 is a class
    assert "48 labelled images" in two.reason


def test_strings_beside_the_number_minus_one(problem, bench):
    X, y, _ = problem
    y = np.array([-1] * 6 + [*y[6:]], dtype=object)
    bench(rows({"logit adjustment": 0.5, "AMIMV": 0.8}))
    for labels in (y, y.tolist()):
        advice = recommend(X, labels, start=False, max_epochs=1)
        assert "42 labelled images" in advice.reason
        assert "6 images without a label" in str(advice)
    assert list(advice.estimator.fit(X, y).classes_) == ["left", "right"]
    tried = recommend(X, y, start=False, max_epochs=1, try_out=True, budget="1 hour")
    assert list(tried.comparison.classes) == ["left", "right"]


def test_a_trial_leaves_unlabelled_images_out(problem):
    X, y, groups = problem
    y = np.where(np.arange(48) % 3 == 0, -1, (y == "right").astype(int))
    advice = recommend(X, y, groups, start=False, try_out=True, max_epochs=1, budget="1 hour")
    assert advice.comparison.n_images == 32
    assert set(advice.comparison.classes) == {0, 1}


# ---------------------------------------------------------------- what comes back


def test_the_estimator_is_not_fitted_and_behaves(problem):
    X, y, groups = problem
    for budget in ("1 hour", 1):
        advice = recommend(X, y, groups, budget=budget, start=False, random_state=3, max_epochs=1)
        made = advice.estimator
        with pytest.raises(NotFittedError):
            check_is_fitted(made[-1] if hasattr(made, "steps") else made)
        assert repr(clone(made)) == repr(made)
        assert set(make_pipeline(clone(made)).fit(X, y).predict(X)) <= {"left", "right"}
        seeds = [v for k, v in made.get_params().items() if k.split("__")[-1] == "random_state"]
        assert set(seeds) == {3}


@pytest.mark.parametrize(
    ("regime", "method"),
    [("scratch", candidates.AMIMV), ("scratch", candidates.VIRTUAL), ("scratch", candidates.FOREST),
     ("frozen", candidates.FROZEN_LR), ("frozen", candidates.FROZEN_SVM), ("frozen", "LMD"),
     ("pretrained", "logit adjustment")],
)  # fmt: skip
def test_each_kind_of_candidate_trains(problem, bench, regime, method):
    X, y, _ = problem
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU())
    bench(rows({"logit adjustment": 0.5, method: 0.9}, regime=regime))  # and of no other
    given = {"start": False} if regime == "scratch" else {"start": net, "image_size": 8}
    advice = recommend(X, y, max_epochs=1, random_state=0, budget="1 hour", **given)
    assert (advice.regime, advice.method) == (regime, method)
    assert set(clone(advice.estimator).fit(X, y).predict(X)) <= {"left", "right"}


def test_table_text_and_frame_agree(problem):
    advice = recommend(*problem, start=False, budget=3600)
    frame = advice.to_frame()
    assert list(frame["method"]) == [row["method"] for row in advice.table]
    assert frame["score"].is_monotonic_decreasing
    chosen = frame[frame["method"] == advice.method].iloc[0]
    assert chosen["score"] == advice.score
    assert chosen["seconds"] == advice.seconds
    text = str(advice)
    assert text.startswith(f"Take {advice.method}, from scratch.")
    assert "the rarest (right) with 12 (1 : 3)" in text
    assert "24 patients" in text
    marked = [line for line in text.splitlines() if line.endswith("<- this one")]
    assert len(marked) == 1
    assert marked[0].startswith(advice.method)
    assert f"{advice.score:.3f}" in marked[0]
    for name in common_methods():
        assert name in text


def test_advice_pickles(problem):
    advice = recommend(*problem, start=False, budget=1)
    again = pickle.loads(pickle.dumps(advice))
    assert str(again) == str(advice)
    assert set(again.estimator.fit(*problem[:2]).predict(problem[0])) == {"left", "right"}


class Lazy:
    """Images on demand, which announce the size of the first."""

    dtype = np.dtype(np.uint8)

    def __init__(self, images):
        self.images, self.n_reads = images, 0
        self.shape = (len(images), *images[0].shape)
        self.ndim = len(self.shape)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        self.n_reads += 1
        return self.images[row]


class Items(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return self.images[row], 0


def as_files(images, folder):
    for k, image in enumerate(images):
        np.save(folder / f"{k:03}", image)
    return sorted(folder.glob("*.npy"))


@pytest.mark.parametrize("kind", ["list", "files", "lazy", "data set"])
@pytest.mark.parametrize(
    ("shapes", "size", "text"),
    [([(12, 12), (300, 200)], 128, "images of any size, brought to 128 x 128"),
     ([(300, 200), (12, 12)], 128, "images of any size, brought to 128 x 128"),
     ([(20, 30), (22, 30), (24, 30)], 30, "images of any size, brought to 30 x 30")],
)  # fmt: skip
def test_all_containers_are_looked_at_alike(problem, tmp_path, kind, shapes, size, text):
    images = [np.resize(image, shapes[k % len(shapes)]) for k, image in enumerate(problem[0][:12])]
    make = {"list": list, "lazy": Lazy, "data set": Items, "files": lambda x: as_files(x, tmp_path)}
    advice = recommend(make[kind](images), np.arange(12) % 2, start=False, budget="10 hours")
    assert advice.estimator.get_params()["image_size"] == size
    assert text in advice.reason
    assert "balanced forest" not in {row["method"] for row in advice.table}


def test_of_many_images_a_sample_is_read():
    X = Lazy(np.zeros((500, 8, 8), dtype=np.uint8))
    advice = recommend(X, np.arange(500) % 2, start=False)
    assert X.n_reads <= 64
    assert advice.estimator.get_params()["image_size"] == (8, 8)  # the others may be larger


@pytest.mark.parametrize(
    ("shape", "params", "size"),
    [((8, 8), {}, None), ((128, 20), {}, None), ((150, 140), {}, (128, 119)),
     ((1, 20, 300), {}, (9, 128)), ((1, 64, 64, 10), {}, (32, 32, 5)),
     ((300, 2), {}, (128, 1)), ((32, 32, 8), {"spatial_dims": 3}, None)],
)  # fmt: skip
def test_large_images_keep_the_ratio_of_their_sides(shape, params, size):
    X = np.zeros((8, *shape), dtype=np.uint8)
    advice = recommend(X, np.arange(8) % 2, start=False, budget="10 hours", **params)
    assert advice.estimator.get_params()["image_size"] == size
    if size is not None:
        assert f"brought to {' x '.join(map(str, size))}" in advice.reason
    else:
        assert "brought" not in advice.reason


# ---------------------------------------------------------------- its tables


def load():
    spec = importlib.util.spec_from_file_location("evidence_script", BENCHMARKS / "evidence.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_the_table_follows_from_those_of_the_bench(tmp_path):
    script = load()
    script.write(script.cells(script.TABLES), tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_text() == script.OUT.read_text()


def bench_row(script, **more):
    return {
        "regime": "frozen", "suite": "core", **script.USUAL, "data": "busi", "cut": "natural",
        "seed": 0, "method": "logit adjustment", "n_train": 90, "n_classes": 3,
        "imbalance_ratio": 2.0, "balanced_accuracy": 0.5, "fit_seconds": 9.0, **more,
    }  # fmt: skip


def write_rows(rows, path):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("order", [1, -1])
def test_what_may_not_stand_beside_the_rest_is_no_evidence(tmp_path, order):
    """Other suites, parts of the images, another start, inner rows, other kinds of hardware."""
    script = load()
    rows = [bench_row(script, method=method) for method in ("logit adjustment", "LMD")]
    odd = [
        {"suite": "curves"}, {"size": 50}, {"start": "resnet18"}, {"rows": "inner"},
        {"hardware": f"{script.USUAL['hardware']}, GPU"}, {"hardware": "64 cores x86_64"},
        {"hardware": "64 cores x86_64", "seed": 1}, {"hardware": "2 cores aarch64"},
    ]  # fmt: skip
    other = {"balanced_accuracy": 0.9, "n_train": 50, "fit_seconds": 1.0}
    rows += [{**of, **other, **what} for of in rows for what in odd]
    ideas = {"regime": "scratch", "suite": "ideas", "start": ""}
    rows += [{**of, **other, **ideas} for of in rows[:2]]
    found = script.cells([write_rows(rows[::order], tmp_path / "results.csv")])
    assert [cell.about.method for cell in found] == ["LMD", "logit adjustment"]
    for cell in found:
        assert (cell.about.score, cell.about.n_train, cell.about.seconds) == (0.5, 90, 9.0)
        assert cell.by_seed == {"0": 0.5}


def test_tables_that_disagree_or_have_nothing_of_use_are_refused(tmp_path, monkeypatch, capsys):
    script = load()
    one = write_rows([bench_row(script)], tmp_path / "one.csv")
    other = write_rows([bench_row(script, balanced_accuracy=0.9)], tmp_path / "other.csv")
    with pytest.raises(ValueError, match="two rows of frozen busi natural logit adjustment, seed"):
        script.cells([one, other])
    foreign = write_rows([bench_row(script, hardware="64 cores")], tmp_path / "foreign.csv")
    out = tmp_path / "out.csv"
    monkeypatch.setattr(sys, "argv", ["evidence.py", str(foreign), "--out", str(out)])
    with pytest.raises(SystemExit):
        script.main()
    assert "argument tables: no row" in capsys.readouterr().err
    assert not out.exists()


def test_regret_of_a_hand_made_bench(monkeypatch):
    script = load()
    cells = [
        script.Cell(row, {"0": row.score + noise, "1": row.score - noise})
        for scores, n in (({"logit adjustment": 0.6, "LMD": 0.7, "CSSN": 0.5}, 100),
                          ({"logit adjustment": 0.6, "LMD": 0.5, "CSSN": 0.64}, 10**6))
        for row in rows(scores, n_train=n)
        for noise in [0.1 if row.method == "CSSN" else 0.0]
    ]  # fmt: skip
    always = script.regrets(cells, lambda *_: "logit adjustment")
    np.testing.assert_allclose(sorted(always[:, 0]), [0.04] * 3 + [0.1] * 3)
    # Of the large sets CSSN seems best by seed 0, and is .06 behind by seed 1; by this none is.
    np.testing.assert_allclose(sorted(always[:, 1]), [-0.03] * 3 + [0.1] * 3)
    near = script.regrets(cells, script.nearest)
    np.testing.assert_allclose(near[:, 0], 0, atol=1e-9)
    asked = []
    script.regrets(cells, lambda others, own: (asked.append((others, own)), "LMD")[1])
    assert all(own.data not in {row.data for row in others} for others, own in asked)
