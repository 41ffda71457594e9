"""The gate of labels: what means "no label" becomes no class, or is warned of."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest

from sklearn_medimb import (
    AMIMVClassifier,
    AMIMVEncoder,
    BalancedBatchSampler,
    BalancedVirtualFeatures,
    MetricTwoStageClassifier,
    SoftmaxClassifier,
    SPMixSampler,
)
from sklearn_medimb._data.labels import is_mark, label_column, read_labels
from sklearn_medimb.datasets import make_long_tailed
from sklearn_medimb.metrics import head_tail_gap, shot_recall
from sklearn_medimb.rebalance import HEADS, resolve_head

RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(60, 5))
IMAGES = RNG.integers(0, 256, (60, 8, 8), dtype=np.uint8)
REST = ["a"] * 30 + ["b"] * 20

READERS = {
    "SPMixSampler": lambda y: SPMixSampler(random_state=0).fit_resample(IMAGES, y),
    "SPMixSampler.fit": lambda y: SPMixSampler().fit(IMAGES, y),
    "BalancedVirtualFeatures": lambda y: BalancedVirtualFeatures().fit_resample(VECTORS, y),
    "BalancedBatchSampler": BalancedBatchSampler,
    "make_long_tailed": lambda y: make_long_tailed(VECTORS, y, 2.0),
    **{name: lambda y, name=name: resolve_head(name).fit(VECTORS, y) for name in HEADS},
}
METRICS = {
    "y_true": lambda y: shot_recall(y, REST + ["a"] * 10, REST),
    "y_pred": lambda y: head_tail_gap(REST + ["a"] * 10, y, REST),
    "train_counts": lambda y: shot_recall(REST, REST, y),
}
MISSING = {"nan": np.nan, "None": None, "NA": pd.NA}


@pytest.mark.parametrize("missing", MISSING.values(), ids=MISSING)
@pytest.mark.parametrize("name", READERS)
def test_missing_labels_are_refused_by_row(name, missing):
    for y in ([*REST[:7], missing, *REST[7:], *["a"] * 9], [missing] * 10 + REST):
        for given in (y, np.array(y, dtype=object), pd.Series(y, dtype=object)):
            with pytest.raises(ValueError, match=r"y has no label in row (7 \(1 rows|0 \(10 rows)"):
                READERS[name](given)


@pytest.mark.parametrize("name", METRICS)
def test_metrics_refuse_missing_labels(name):
    with pytest.raises(ValueError, match=f"{name} has no (entry|label) in row 0"):
        METRICS[name]([None] * 10 + REST)


@pytest.mark.parametrize("name", READERS)
def test_numbers_beside_texts_are_refused(name):
    with pytest.raises(ValueError, match=r"one kind.* row 0 holds -1, row 10 holds 'a'"):
        READERS[name]([-1] * 10 + REST)


@pytest.mark.parametrize("mark", [-1, -1.0, "-1", "-1.0", " -1"])
@pytest.mark.parametrize("name", READERS)
def test_a_mark_beside_two_classes_is_warned_of(name, mark):
    rest = REST if isinstance(mark, str) else [0] * 30 + [1] * 20
    with pytest.warns(UserWarning, match=rf"takes y = {mark} for a class.*AMIMVClassifier"):
        READERS[name]([mark] * 10 + rest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of two classes one may be -1
        READERS[name](np.resize([mark, rest[0], rest[0]], 60))


@pytest.mark.parametrize("mark", [-1, -1.0])
def test_a_classifier_refuses_a_mark_in_a_list_of_texts(mark, tiny):
    with pytest.raises(ValueError, match="one kind"):
        SoftmaxClassifier(**tiny).fit(IMAGES, [mark] * 10 + REST)


@pytest.mark.parametrize("mark", ["-1", "-1.0", -1.0])
def test_a_classifier_warns_of_a_mark_once(mark, tiny):
    y = [mark] * 10 + (REST if isinstance(mark, str) else [0] * 30 + [1] * 20)
    sampler = SPMixSampler(random_state=0)
    with pytest.warns(UserWarning, match="for a class") as caught:
        MetricTwoStageClassifier(**tiny, sampler=sampler, early_stopping=True).fit(IMAGES, y)
    assert len([w for w in caught if "for a class" in str(w.message)]) == 1


@pytest.mark.parametrize("mark", [-1, -1.0])
def test_numbers_mark_unlabelled_images_in_a_list_of_texts(mark, tiny):
    clf = AMIMVClassifier(**tiny, pretrain=AMIMVEncoder(max_epochs=1, batch_size=32))
    assert clf.fit(IMAGES, [mark] * 10 + REST).classes_.tolist() == ["a", "b"]
    assert clf.class_counts_.tolist() == [30, 20]


@pytest.mark.parametrize("mark", ["-1", "-1.0", " -1 "])
def test_texts_that_mark_are_refused(mark, tiny):
    with pytest.raises(ValueError, match=f"text '{mark}'.*number -1"):
        AMIMVClassifier(**tiny).fit(IMAGES, [mark] * 10 + REST)


@pytest.mark.parametrize("mark", [-1, -1.0, "-1", "-1.0"])
def test_a_probe_leaves_marks_out(mark, tiny):
    y = np.arange(60) % 2
    X = IMAGES // 4 + (120 * y[:, None, None]).astype(np.uint8)
    z = [mark if row % 3 == 0 else int(label) for row, label in enumerate(y)]
    if isinstance(mark, str):
        z = [str(label) for label in z]
    missing = np.where(np.arange(60) % 3 == 0, np.nan, y)
    encoder = AMIMVEncoder(max_epochs=1, batch_size=32, random_state=0)
    scores = [encoder.fit(X, labels).history_[-1]["knn_score"] for labels in (z, missing)]
    assert scores[0] == scores[1]


def test_columns_keep_their_kind():
    assert label_column(["a", "b"]).dtype.kind == "U"
    assert label_column([1, "b"]).tolist() == [1, "b"]
    assert label_column([[1], [2]]).tolist() == [1, 2]
    assert read_labels(pd.Series(["a", "b"])).tolist() == ["a", "b"]
    assert read_labels([True, 0, 1.0]).tolist() == [1, 0, 1]
    assert read_labels([-1, "a"], mixed=True).tolist() == [-1, "a"]
    assert read_labels(["nan", "None"]).tolist() == ["nan", "None"]
    assert is_mark(np.array([-1, "-1", "-1.00", "-1x", "1", None], dtype=object)).tolist() == [
        True, True, True, False, False, False,
    ]  # fmt: skip
