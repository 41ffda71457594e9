"""compare_methods: the same folds for all, patients whole, nothing done twice."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from imblearn.metrics import geometric_mean_score
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, recall_score
from sklearn.model_selection import GroupKFold, RepeatedKFold, ShuffleSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_medimb import CSSNClassifier, SoftmaxClassifier
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.comparison import common_methods, compare_methods
from sklearn_medimb.datasets import ImageFiles, MappedImages
from sklearn_medimb.decisions import PriorShift
from sklearn_medimb.metrics import metric_interval, paired_difference


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    y = np.repeat(["healthy", "ill"], [90, 30])
    X = rng.normal(size=(120, 6)) + 1.2 * (y == "ill")[:, np.newaxis]
    return X, y, np.arange(120) // 2


def methods():
    return {
        "dummy": DummyClassifier(strategy="prior"),
        "logistic": make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced")),
        "plain": make_pipeline(StandardScaler(), LogisticRegression(C=1e-3)),
    }


@pytest.fixture(autouse=True)
def fits(tmp_path, monkeypatch):
    """Lines that fits of Counting wrote."""
    path = tmp_path / "fits"
    path.touch()
    monkeypatch.setenv("FITS_OF_COUNTING", str(path))
    return lambda: path.read_text().splitlines()


class Counting(ClassifierMixin, BaseEstimator):
    """Notes its fits, in a file: what is kept in a class makes it another one."""

    def __init__(self, shift=0, random_state=None):
        self.shift = shift
        self.random_state = random_state

    def fit(self, X, y, groups=None):
        n_groups = None if groups is None else len(groups)
        with Path(os.environ["FITS_OF_COUNTING"]).open("a") as file:
            file.write(f"{len(X)} {n_groups} {self.random_state}\n")
        self.classes_ = np.unique(y)
        return self

    def predict(self, X):
        if self.shift == "odd":
            return np.full(len(X), "nobody")
        if self.shift:
            raise RuntimeError("out of luck")
        return np.full(len(X), self.classes_[0])


class Spoken(LogisticRegression):
    """Gives `answer` in the place of its probabilities, or of its classes."""

    def __init__(self, answer=0.0):
        super().__init__()
        self.answer = answer

    def fit(self, X, y):
        super().fit(X, y)
        if self.answer == "nobody":
            self.classes_ = np.append(self.classes_[:-1], "nobody")
        return self

    def predict_proba(self, X):
        proba = super().predict_proba(X)
        if self.answer == "nobody":
            return proba
        return proba[:, :1] if self.answer == 1 else proba * self.answer


class CountingWithProbabilities(Counting):
    def predict_proba(self, X):
        return np.full((len(X), len(self.classes_)), 1 / len(self.classes_))


def test_scores_and_differences_are_those_of_the_predictions_of_all_folds(problem):
    X, y, groups = problem
    folds = list(GroupKFold(3).split(X, y, groups))
    found = compare_methods(methods(), X, y, groups=groups, cv=folds, baseline="plain")
    assert set(found.names) == set(methods())
    assert found.names[0] == "logistic"
    assert found.rows.tolist() == list(range(120))
    assert (found.n_images, found.n_patients) == (120, 60)
    for name, estimator in methods().items():
        predicted = cross_val_predict(estimator, X, y, cv=folds)
        np.testing.assert_array_equal(found.predictions[name], predicted)
        proba = cross_val_predict(estimator, X, y, cv=folds, method="predict_proba")
        np.testing.assert_allclose(found.probabilities[name], proba)
        wanted = metric_interval(balanced_accuracy_score, y, predicted, groups=groups)
        np.testing.assert_allclose(found.scores["balanced accuracy"][name], wanted)
    wanted = paired_difference(
        balanced_accuracy_score, y, found.predictions["logistic"], found.predictions["plain"],
        groups=groups, level=0.975,
    )  # fmt: skip  # two comparisons share 5 %
    np.testing.assert_allclose(found.differences["balanced accuracy"]["logistic"], wanted)
    assert found.differences["balanced accuracy"]["plain"] == (0, 0, 0)
    assert found.scores["recall of ill"]["dummy"].score == 0
    for name, of in {
        "balanced accuracy": balanced_accuracy_score,
        "macro F1": partial(f1_score, average="macro"),
        "geometric mean": geometric_mean_score,
        "recall of ill": partial(recall_score, pos_label="ill"),
    }.items():
        for method, predicted in found.predictions.items():
            assert found.scores[name][method].score == pytest.approx(of(y, predicted))


def test_it_prints_as_a_table_and_says_who_leads(problem):
    X, y, groups = problem
    found = compare_methods(methods(), X, y, groups=groups, cv=3)
    text = str(found)
    assert text.splitlines()[1].startswith("logistic")
    assert "120 images of 60 patients, each tested once" in text
    assert found.finding().startswith("logistic leads: .")
    assert "ahead of dummy, +0." in found.finding()
    frame = found.to_frame()
    assert list(frame.index) == found.names
    assert frame.loc["dummy", "balanced accuracy"] == 0.5
    same = compare_methods({"a": LogisticRegression(), "b": LogisticRegression()}, X, y, cv=3)
    assert "no method is ahead of it" in same.finding()
    ax = found.plot()
    assert [label.get_text() for label in ax.get_yticklabels()] == found.names
    assert ax.get_title(loc="left").startswith("logistic leads")
    with pytest.raises(ValueError, match="metric='none'"):
        found.plot("none")
    plt.close("all")


def test_what_was_done_is_not_done_again(problem, tmp_path, fits):
    X, y, groups = problem
    how = {"groups": groups, "cv": 3, "folder": tmp_path / "kept"}
    first = compare_methods({"a": Counting()}, X, y, **how)
    assert len(fits()) == 3
    again = compare_methods({"a": Counting(), "b": Counting(0, random_state=5)}, X, y, **how)
    assert len(fits()) == 6  # the other method alone
    np.testing.assert_array_equal(again.predictions["a"], first.predictions["a"])
    next((tmp_path / "kept").glob("a-*")).write_text("{")
    compare_methods({"a": Counting()}, X, y, **how)
    assert len(fits()) == 7
    X = X.copy()
    X[3, 2] += 1e-9  # other images
    compare_methods({"a": Counting()}, X, y, **how)
    assert len(fits()) == 10
    compare_methods({"a": Counting(False)}, X, y, **how)  # other parameters
    compare_methods({"a": Counting()}, X, y, **{**how, "random_state": 1})  # other folds and seed
    assert len(fits()) == 16


def test_files_that_changed_are_other_images(tmp_path, fits):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{k}.npy" for k in range(8)]
    for path in paths:
        np.save(path, rng.integers(0, 255, (6, 6), dtype=np.uint8))
    y = np.arange(8) % 2

    def run():
        X = ImageFiles(paths)
        compare_methods({"a": Counting()}, X, y, cv=2, folder=tmp_path / "kept")
        return len(fits())

    assert (run(), run()) == (2, 2)
    np.save(paths[3], rng.integers(0, 255, (6, 6), dtype=np.uint8))  # of the same size
    os.utime(paths[3], (1, 1))
    assert run() == 4


CONTAINERS = {
    "list": list,
    "array": lambda paths: np.array(paths, dtype=object)[:, None],
    "column": lambda paths: pytest.importorskip("pandas").Series(paths),
    "table": lambda paths: pytest.importorskip("pandas").DataFrame({"path": paths}),
}


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_files_that_changed_are_other_images_in_any_container(container, tmp_path, fits):
    rng = np.random.default_rng(0)
    paths = [str(tmp_path / f"{k}.npy") for k in range(8)]
    y = np.arange(8) % 2

    def run():
        X = container(paths)
        compare_methods({"a": Counting()}, X, y, cv=2, folder=tmp_path / "kept")
        return len(fits())

    for stamp in (1, 2):
        for path in paths:
            np.save(path, rng.integers(0, 255, (6, 6), dtype=np.uint8))
            os.utime(path, (stamp, stamp))
        assert (run(), run()) == (2 * stamp, 2 * stamp)


def test_tables_of_numbers_are_known_again(tmp_path, fits):
    pd = pytest.importorskip("pandas")
    table = pd.DataFrame({"a": np.arange(12.0), "b": [1, 2, 3] * 4})
    how = {"cv": 2, "folder": tmp_path / "kept"}

    def run(X):
        compare_methods({"a": Counting()}, X, np.arange(12) % 2, **how)
        return len(fits())

    assert (run(table), run(table.copy())) == (2, 2)
    assert run(table.assign(b=4)) == 4
    assert run(table.rename(columns={"a": "c"})) == 6
    assert run(table.astype({"b": float})) == 8


def test_patients_reach_the_fit_and_seeds_are_set(problem, fits):
    X, y, groups = problem
    estimator = Counting()
    compare_methods([estimator], X, y, groups=groups, cv=4, random_state=7)
    sizes, seen, seeds = zip(*map(str.split, fits()), strict=True)
    assert set(seeds) == {"7"}
    assert estimator.random_state is None
    assert seen == sizes
    assert not hasattr(estimator, "classes_")


def test_a_method_that_fails_is_left_out_with_a_warning(problem):
    X, y, _ = problem
    with pytest.warns(UserWarning, match="bad is left out, for it failed in fold 0: RuntimeError"):
        found = compare_methods({"good": Counting(), "bad": Counting(1)}, X, y, cv=3)
    assert found.names == ["good"]
    assert "bad failed: in fold 0: RuntimeError: out of luck" in str(found)
    with pytest.warns(match="left out"), pytest.raises(ValueError, match="Every method failed"):
        compare_methods({"bad": Counting(1)}, X, y, cv=3)
    with pytest.warns(UserWarning, match="'nobody'"), pytest.raises(ValueError, match="baseline"):
        compare_methods({"odd": Counting("odd"), "good": Counting()}, X, y, cv=3)


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (np.nan, r"predict_proba gives \[nan, nan\]"),
        (2.0, "predict_proba gives"),
        (1, r"predict_proba has shape \(40, 1\), not \(40, 2\)"),
        ("nobody", "it knows 'nobody', which y does not hold"),
    ],
)
def test_probabilities_that_are_none_are_no_result(answer, match, problem):
    X, y, _ = problem
    methods = {"good": LogisticRegression(), "bad": Spoken(answer)}
    with pytest.warns(UserWarning, match=match):
        found = compare_methods(methods, X, y, cv=3)
    assert found.names == ["good"]


def test_metrics_that_fail_say_so_before_the_work(problem, fits):
    X, y, _ = problem

    def fails(y_true, y_pred):
        raise RuntimeError("out of luck")

    for metrics, match in (
        ({}, "must be a dict"),
        (["accuracy"], "must be a dict"),
        ({"a": "accuracy"}, "a='accuracy' must give a number"),
        ({"a": fails}, "RuntimeError: out of luck"),
        ({"a": lambda y, p: float("nan")}, "a is nan"),
    ):
        with pytest.raises(ValueError, match=match):
            compare_methods([Counting()], X, y, metrics=metrics)
    with pytest.raises(ValueError, match="level=95"):
        compare_methods([Counting()], X, y, level=95)
    assert fits() == []


def test_names_may_be_anything(problem, tmp_path):
    X, y, _ = problem
    made = {2: DummyClassifier(), "$\\foo$" * 60: LogisticRegression()}
    found = compare_methods(made, X, y, cv=np.int64(3), baseline=2, folder=tmp_path / "kept")
    assert found.baseline == "2"
    assert len(list((tmp_path / "kept").iterdir())) == 6
    found.plot().figure.canvas.draw()
    plt.close("all")
    with pytest.raises(ValueError, match="Two methods are called 2"):
        compare_methods({"2": DummyClassifier(), 2: LogisticRegression()}, X, y)


def test_the_rarest_class_is_one_that_was_tested(problem):
    X, _, _ = problem
    y = np.repeat(["a", "b", "c"], [60, 50, 10])
    rows = np.flatnonzero(y != "c")
    folds = [(np.setdiff1d(np.arange(120), rows[k::2]), rows[k::2]) for k in range(2)]
    found = compare_methods({"one": LogisticRegression()}, X, y, cv=folds)
    assert list(found.scores)[-1] == "recall of b"
    assert found.y_true.tolist() == y[rows].tolist()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"cv": None}, ValueError, "cv=None must be a number, a splitter, or pairs of rows"),
        (
            {"y": np.append(np.arange(119) % 2, 2), "cv": GroupKFold(3)},
            ValueError,
            "leave out classes of one patient",
        ),
        ({"estimators": []}, ValueError, "estimators is empty"),
        ({"estimators": [Counting(), Counting()]}, ValueError, "Two methods are called Counting"),
        ({"estimators": [Counting]}, TypeError, "is no classifier"),
        ({"estimators": {"scale": StandardScaler()}}, TypeError, "scale=.* is no classifier"),
        ({"baseline": "nobody"}, ValueError, "baseline='nobody' must be one of"),
        ({"cv": RepeatedKFold(n_splits=2, n_repeats=2)}, ValueError, "tests row 0 of X twice"),
        ({"cv": ShuffleSplit(4, test_size=0.5, random_state=0)}, ValueError, "twice"),
        ({"cv": [(np.arange(100), np.arange(90, 120))]}, ValueError, "rows that it trains on"),
        ({"cv": [(np.arange(1, 120), [0])]}, ValueError, "tests patients that it trains on"),
        ({"cv": [(np.arange(90), np.arange(90, 120))]}, ValueError, r"no image of \['ill'\]"),
        ({"y": np.zeros(120)}, ValueError, "one class only"),
        ({"y": np.arange(119) % 2}, ValueError, "120 images, y 119 labels"),
        ({"groups": [None] * 120}, ValueError, "groups has no entry in row 0"),
    ],
)
def test_what_makes_no_comparison_is_refused(change, error, match, problem):
    X, y, groups = problem
    given = {"estimators": [Counting()], "X": X, "y": y, "groups": groups, "cv": 3, **change}
    with pytest.raises(error, match=match):
        compare_methods(**given)


def test_networks_on_images_that_stay_on_disk(tmp_path):
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], [24, 12])
    X = rng.integers(0, 90, (36, 1, 10, 10), dtype=np.uint8)
    X[y == 1, :, 3:7, 3:7] += 150
    np.save(tmp_path / "X.npy", X)
    shared = {"backbone": ConvNet(widths=(4, 8)), "max_epochs": 3, "batch_size": 8}
    made = [SoftmaxClassifier(**shared), CSSNClassifier(**shared)]
    how = {"cv": 2, "metrics": {"accuracy": accuracy_score}, "baseline": "CSSNClassifier"}
    lazy = compare_methods(made, MappedImages(tmp_path / "X.npy"), y, **how)
    held = compare_methods(made, X, y, **how)
    for name in lazy.names:
        np.testing.assert_array_equal(lazy.predictions[name], held.predictions[name])
    assert list(lazy.scores) == ["accuracy"]
    assert lazy.baseline == "CSSNClassifier"


def test_common_methods_share_what_they_are_given():
    made = common_methods(backbone="resnet18", max_epochs=7, random_state=3)
    assert len(made) == 14
    assert len({str(method) for method in made.values()}) == 14
    for method in made.values():
        params = method.get_params()
        assert (params["backbone"], params["max_epochs"]) == ("resnet18", 7)


def test_patients_reach_a_classifier_that_is_wrapped(problem, fits):
    X, y, groups = problem
    wrapped = PriorShift(CountingWithProbabilities(), prevalence={"healthy": 0.9, "ill": 0.1})
    compare_methods({"wrapped": wrapped}, X, y, groups=groups, cv=2)
    assert {line.split()[1] for line in fits()} == {line.split()[0] for line in fits()}
