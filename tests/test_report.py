"""The page says what was measured, and nothing in it runs or is fetched."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import recall_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from sklearn_medimb import CSSNClassifier, SoftmaxClassifier
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.comparison import compare_methods
from sklearn_medimb.metrics import metric_interval
from sklearn_medimb.report import report

NAMES = np.array(["<script>alert(1)</script>", "ill & weak"])


def flat(X):
    return X.reshape(len(X), -1) / 255


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], [60, 30])
    X = rng.integers(0, 90, (90, 1, 10, 10), dtype=np.uint8)
    X[y == 1, :, 3:7, 3:7] += rng.integers(0, 150, (30, 1, 1, 1), dtype=np.uint8)
    return X, NAMES[y], np.arange(90) // 2


@pytest.fixture(scope="module")
def found(problem):
    X, y, groups = problem
    shared = {"backbone": ConvNet(widths=(4, 8)), "max_epochs": 2, "batch_size": 16}
    methods = {
        "logistic": make_pipeline(FunctionTransformer(flat), LogisticRegression()),
        "plain": SoftmaxClassifier(**shared),
        "CSSN": CSSNClassifier(**shared),
    }
    return compare_methods(methods, X, y, groups=groups, cv=3)


class Tags(HTMLParser):
    """Tags in their order, and attributes."""

    def __init__(self, page):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("method", ["logistic", "plain", "CSSN"])
def test_the_page_is_whole_and_nothing_in_it_runs_or_is_fetched(method, found, problem, tmp_path):
    X, y, groups = problem
    made = report(
        found, X, y, groups=groups, method=method, title="A & <b>", notes=["<i>two</i> are alike"],
        not_for=["<u>children</u>"], min_sensitivity=0.5, confidence=0.8,
    )  # fmt: skip
    tags = Tags(made.html)
    assert not tags.open
    names = {tag for tag, _ in tags.seen}
    assert not names & {"script", "link", "iframe", "i", "b", "u"}
    pictures = [attrs for tag, attrs in tags.seen if tag == "img"]
    assert len(pictures) == {"logistic": 4, "plain": 7, "CSSN": 7}[method]
    for attrs in pictures:
        assert attrs["src"].startswith("data:image/png;base64,")
        assert attrs["alt"]
    assert "http" not in re.sub(r'src="[^"]*"', "", made.html)
    assert "45 patients with 2 to 2 images" in made.html
    assert "&lt;i&gt;two&lt;/i&gt; are alike" in made.html
    path = made.save(tmp_path / "page.html")
    assert path.read_text(encoding="utf-8") == made.html
    assert "MB of HTML" in repr(made)
    assert "srcdoc=" in made._repr_html_()


def test_figures_are_those_of_the_comparison(found, problem):
    X, y, groups = problem
    made = report(found, X, y, groups=groups, min_sensitivity=0.5, prevalence=0.02)
    for scores in found.scores.values():
        for score, low, high in scores.values():
            assert f"{score:.2f} [{low:.2f}, {high:.2f}]" in made.html
    point = made.operating_point
    proba = found.probabilities[found.names[0]][:, 1]
    ill = y == NAMES[1]
    hit = proba[ill] >= point.threshold_
    wanted = metric_interval(recall_score, ill, proba >= point.threshold_, groups=groups)
    assert point.sensitivity_.score == pytest.approx(hit.mean())
    np.testing.assert_allclose(point.sensitivity_, wanted, atol=0.01)
    assert point.sensitivity_.score >= 0.5
    assert "2 % ill" in made.html


def test_what_cannot_be_promised_is_said(found, problem):
    X, y, groups = problem
    made = report(found, X, y, groups=groups, min_sensitivity=0.99, confidence=0.999)
    assert made.operating_point is None
    assert "No threshold is given" in made.html


def test_without_patients_the_page_warns(problem):
    X, y, _ = problem
    methods = {"logistic": make_pipeline(FunctionTransformer(flat), LogisticRegression())}
    made = report(compare_methods(methods, X, y, cv=2), X, y, min_sensitivity=0.5)
    assert "Nobody said which images are of the same patient" in made.html
    assert "it is not known which images are of one patient" in made.html


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"method": "nobody"}, "method='nobody' must be one of"),
        ({"y": np.arange(90) % 2}, "must be what was compared on"),
        ({"groups": None}, "groups must be what the comparison was given"),
    ],
)
def test_other_data_are_refused(change, match, found, problem):
    X, y, groups = problem
    with pytest.raises(ValueError, match=match):
        report(found, **{"X": X, "y": y, "groups": groups, **change})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"positive": "typo"}, "positive='typo'"),
        ({"positive": NAMES.tolist()}, "not all"),
        ({"prevalence": 5}, "prevalence=5"),
        ({"min_sensitivity": 95}, "min_sensitivity"),
        ({"confidence": 95}, "confidence"),
        ({"y": slice(None, None, -1)}, "in the same order"),
        ({"X": slice(9)}, "in the same order"),
        ({"groups": np.arange(90)}, "groups must be"),
    ],
)
def test_what_makes_no_sense_is_no_finding(change, match, found, problem):
    data = dict(zip(("X", "y", "groups"), problem, strict=True))
    for name, part in change.items():
        change = {**change, name: data[name][part]} if isinstance(part, slice) else change
    with pytest.raises(ValueError, match=match):
        report(found, **{**data, **change}, method="logistic")


def test_a_threshold_without_a_promise_says_so(found, problem):
    X, y, groups = problem
    how = {"confidence": None, "notes": "one note", "not_for": "one use"}
    page = report(found, X, y, groups=groups, method="logistic", **how)
    assert page.operating_point.threshold_ > 0
    assert "nothing is promised" in page.html
    assert '<p class="warn">one note</p>' in page.html
    assert "<li>one use</li>" in page.html


@pytest.mark.parametrize("kind", ["vectors", "vectors compared", "a network without places"])
def test_what_has_no_picture_has_a_page(kind):
    rng = np.random.default_rng(0)
    y = np.arange(36) % 3 == 0
    X = rng.normal(size=(36, 5))
    made = {"max_epochs": 1, "batch_size": 8}
    methods = {"one": (CSSNClassifier if "compared" in kind else SoftmaxClassifier)(**made)}
    if "network" in kind:
        X, methods = rng.normal(size=(36, 1, 6, 6)), {"one": SoftmaxClassifier("mlp", **made)}
    page = report(compare_methods(methods, X, y, cv=2), X, y)
    assert "There is no picture: " in page.html


def test_labels_that_matplotlib_would_read_and_many_of_them():
    names = np.array(["$\\foo$", "_a", "long " * 60, *(f"class {k}" for k in range(20))])
    y = np.tile(names, 4)
    X = np.random.default_rng(0).normal(size=(len(y), 6))
    page = report(compare_methods({"one": LogisticRegression()}, X, y, cv=2), X, y)
    assert "$\\foo$" in page.html
