"""BalancedVirtualFeatures: moments, equivariance, degenerate classes, and the card's experiment."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from imblearn.pipeline import make_pipeline
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GridSearchCV

from sklearn_medimb import BalancedVirtualFeatures, SoftmaxClassifier
from sklearn_medimb.over_sampling._virtual_features import ClassGaussians
from tests.gaussians import KINDS, long_tailed_gaussians, moments, problem


@pytest.mark.parametrize("eps", [0.0, 1e-2, 0.5])
@pytest.mark.parametrize("d", [3, 20, 60])  # fewer features than rows in a class, in all, and more
@pytest.mark.parametrize("covariance", KINDS)
def test_factor_is_the_documented_covariance(covariance, d, eps):
    X, y = problem((30, 12, 4, 1), d)
    gaussians = ClassGaussians(X, y, covariance=covariance, eps=eps)
    means, sigmas = moments(X, y, covariance, eps)
    np.testing.assert_allclose(gaussians.means, means)
    for k, sigma in enumerate(sigmas):
        rows, noise = gaussians.factor(k)
        assert len(rows) <= d
        found = rows.T @ rows + np.diag(np.broadcast_to(noise, d))
        np.testing.assert_allclose(found, sigma, atol=1e-9 * np.trace(sigma))
        np.testing.assert_allclose(gaussians.covariance(k), found, atol=1e-9 * np.trace(sigma))
        product = gaussians.times(k)(means)
        np.testing.assert_allclose(product, means @ found, atol=1e-9 * np.trace(sigma))
        values = np.linalg.eigvalsh(found)
        variances = np.diag(moments(X, y, "tied", 0)[1][0])
        smallest = eps if covariance == "full" else eps * variances.min()
        assert values.min() >= smallest - 1e-9 * max(values.max(), 1)


@pytest.mark.parametrize("covariance", KINDS)
@pytest.mark.parametrize("d", [6, 60])
def test_draws_have_these_moments(covariance, d):
    X, y = problem(d=d)
    n = 40_000
    sampler = BalancedVirtualFeatures(
        replace=True, n_per_class=n, covariance=covariance, random_state=0
    )
    V, labels = sampler.fit_resample(X, y)
    means, sigmas = moments(X, y, covariance, 1e-2)
    np.testing.assert_allclose(sampler.means_, means)
    for k, (mean, sigma) in enumerate(zip(means, sigmas, strict=True)):
        drawn = V[labels == k]
        assert len(drawn) == n
        trace = np.trace(sigma)
        assert np.linalg.norm(drawn.mean(0) - mean) < 5 * np.sqrt(trace / n)
        error = np.linalg.norm(np.cov(drawn.T) - sigma)
        assert error < 3 * trace / np.sqrt(n)


def test_draws_are_normal():
    X, y = problem(d=6)
    V, labels = BalancedVirtualFeatures(
        replace=True, n_per_class=50_000, random_state=0
    ).fit_resample(X, y)
    drawn = V[labels == 1]
    standard = (drawn - drawn.mean(0)) / drawn.std(0)
    assert abs((standard**3).mean(0)).max() < 0.06
    assert abs((standard**4).mean(0) - 3).max() < 0.15


def test_full_covariance_is_affine_equivariant():
    X, y = problem(d=6)
    rng = np.random.default_rng(1)
    A, b = rng.normal(size=(6, 6)), rng.normal(size=6)
    options = {"replace": True, "covariance": "full", "eps": 0.0, "n_per_class": 40_000}
    one = BalancedVirtualFeatures(**options, random_state=0).fit_resample(X, y)[0]
    two = BalancedVirtualFeatures(**options, random_state=0).fit_resample(X @ A.T + b, y)[0]
    for k in range(3):
        part = slice(40_000 * k, 40_000 * (k + 1))
        moved = one[part] @ A.T + b
        scale = np.sqrt(np.trace(np.cov(two[part].T)))
        assert np.linalg.norm(moved.mean(0) - two[part].mean(0)) < 0.05 * scale
        assert np.linalg.norm(np.cov(moved.T) - np.cov(two[part].T)) < 0.05 * scale**2
    # With fewer rows than features the coefficients are the same: equal to rounding.
    few, labels = problem((4, 3), d=6)
    one = BalancedVirtualFeatures(**options, random_state=0).fit_resample(few, labels)[0]
    two = BalancedVirtualFeatures(**options, random_state=0).fit_resample(few @ A.T + b, labels)[0]
    np.testing.assert_allclose(two, one @ A.T + b, atol=1e-8)


def test_class_without_variance_is_drawn_at_its_mean():
    X, y = problem()
    X[y == 2] = X[y == 2][0]
    sampler = BalancedVirtualFeatures(replace=True, covariance="full", eps=0.0, random_state=0)
    V, labels = sampler.fit_resample(X, y)
    np.testing.assert_allclose(V[labels == 2], np.tile(X[y == 2][0], (1000, 1)), rtol=1e-12)
    assert V[labels == 1].std() > 0.5


def test_singular_covariance_without_eps_is_drawn_all_the_same():
    X, y = problem(d=4)
    X = np.hstack([X, X[:, :1] + X[:, 1:2]])
    sampler = BalancedVirtualFeatures(replace=True, covariance="full", eps=0.0, random_state=0)
    V, _ = sampler.fit_resample(X, y)
    np.testing.assert_allclose(V[:, 4], V[:, 0] + V[:, 1], atol=1e-6)


def test_shrinkage_falls_with_the_size_of_the_class():
    X, y = problem((400, 40, 4, 1), d=10)
    sampler = BalancedVirtualFeatures(random_state=0)
    with pytest.warns(UserWarning, match=r"Classes \[3\] have one row"):
        sampler.fit_resample(X, y)
    np.testing.assert_allclose(sampler.shrinkage_, [10 / 410, 10 / 50, 10 / 14, 1])
    for covariance, share in (("full", 0), ("diag", 0), ("tied", 1)):
        sampler.set_params(covariance=covariance)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sampler.fit_resample(X, y)
        np.testing.assert_array_equal(sampler.shrinkage_, np.full(4, share))


@pytest.mark.filterwarnings("ignore:Classes")
@pytest.mark.parametrize("covariance", KINDS)
def test_classes_of_one_row_give_finite_draws(covariance):
    X, y = problem((1, 1, 1), d=5)
    V, labels = BalancedVirtualFeatures(
        replace=True, covariance=covariance, random_state=0
    ).fit_resample(X, y)
    assert np.isfinite(V).all()
    np.testing.assert_array_equal(np.bincount(labels), [1000, 1000, 1000])


# ---------------------------------------------------------------- as a sampler


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int32, np.uint8])
def test_dtype_is_kept_and_originals_come_first(dtype):
    X, y = problem()
    X = (10 * X + 100).clip(0, 250).astype(dtype)
    before = X.copy()
    X_new, y_new = BalancedVirtualFeatures(random_state=0).fit_resample(X, y)
    assert X_new.dtype == dtype
    np.testing.assert_array_equal(X, before)
    np.testing.assert_array_equal(X_new[: len(X)], X)
    np.testing.assert_array_equal(np.bincount(y_new), [30, 30, 30])
    assert abs(X_new[len(X) :].astype(float).mean() - X[y > 0].astype(float).mean()) < 20


@pytest.mark.parametrize(
    ("strategy", "counts"),
    [
        ("auto", [30, 30, 30]),
        ("not minority", [30, 30, 4]),
        (lambda y: {2: 9}, [30, 12, 9]),
        ("minority", [30, 12, 30]),
        ("all", [30, 30, 30]),
        ({1: 40}, [30, 40, 4]),
    ],
)
def test_sampling_strategy_is_met_exactly(strategy, counts):
    X, y = problem()
    _, y_new = BalancedVirtualFeatures(sampling_strategy=strategy).fit_resample(X, y)
    np.testing.assert_array_equal(np.bincount(y_new), counts)


def test_replacement_gives_virtual_rows_only():
    X, y = problem((1200, 50))
    V, labels = BalancedVirtualFeatures(replace=True, random_state=0).fit_resample(X, y)
    np.testing.assert_array_equal(np.bincount(labels), [1200, 1200])
    assert not (V[:, None, 0] == X[:, 0]).any()
    sampler = BalancedVirtualFeatures(replace=True, n_per_class=7)
    names = np.array(["b", "a"])[y]
    V, labels = sampler.fit_resample(X, names)
    assert V.shape == (14, 6)
    assert sorted(labels) == ["a"] * 7 + ["b"] * 7
    assert sampler.sampling_strategy_ == {"a": 7, "b": 7}


def test_balanced_input_gains_nothing():
    X, y = problem((9, 9))
    X_new, y_new = BalancedVirtualFeatures().fit_resample(X, y)
    np.testing.assert_array_equal(X_new, X)
    np.testing.assert_array_equal(y_new, y)


def test_random_state_decides_everything():
    X, y = problem()
    one, two, other = (
        BalancedVirtualFeatures(random_state=seed).fit_resample(X, y)[0] for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, two)
    assert not np.allclose(one, other)


def test_block_size_decides_nothing_but_the_draws(monkeypatch):
    X, y = problem()
    monkeypatch.setattr("sklearn_medimb.over_sampling._virtual_features._BLOCK", 12)
    V, labels = BalancedVirtualFeatures(
        replace=True, n_per_class=1001, random_state=0
    ).fit_resample(X, y)
    assert V.shape == (3003, 6)
    for k in range(3):
        spread = np.sqrt(np.trace(np.cov(V[labels == k].T)))
        assert np.linalg.norm(V[labels == k].mean(0) - X[y == k].mean(0)) < 0.2 * spread


@pytest.mark.parametrize("container", [sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array])
def test_sparse_rows_come_back_sparse(container):
    X, y = problem()
    X[:, 3] = 0
    dense = BalancedVirtualFeatures(covariance="full", eps=0, random_state=0).fit_resample(X, y)[0]
    found = BalancedVirtualFeatures(covariance="full", eps=0, random_state=0).fit_resample(
        container(X), y
    )[0]
    assert sparse.issparse(found)
    assert found.format == container(X).format
    np.testing.assert_allclose(found.toarray(), dense, atol=1e-9)


def test_dataframe_keeps_its_columns():
    X, y = problem()
    frame = pd.DataFrame(X, columns=list("abcdef"))
    sampler = BalancedVirtualFeatures(random_state=0)
    X_new, y_new = sampler.fit_resample(frame, pd.Series(y, name="class"))
    assert X_new.columns.tolist() == list("abcdef")
    assert y_new.name == "class"
    assert sampler.feature_names_in_.tolist() == list("abcdef")


def test_between_an_encoder_and_a_classifier_in_a_search():
    X, y = problem((60, 20, 8), d=10)
    pipeline = make_pipeline(
        PCA(5), BalancedVirtualFeatures(random_state=0), LogisticRegression(max_iter=500)
    )
    search = GridSearchCV(
        pipeline,
        {
            "balancedvirtualfeatures__covariance": KINDS,
            "balancedvirtualfeatures__replace": [False, True],
        },
        cv=2,
        error_score="raise",
    ).fit(X, y)
    assert search.predict(X).shape == y.shape
    assert search.best_estimator_[1].means_.shape == (3, 5)


def test_between_a_network_and_a_classifier_on_images(tiny):
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], [40, 12])
    X = rng.integers(0, 120, (52, 8, 8, 3)).astype(np.uint8) + (
        100 * y[:, None, None, None]
    ).astype(np.uint8)
    pipeline = make_pipeline(
        SoftmaxClassifier(**tiny),
        BalancedVirtualFeatures(replace=True, n_per_class=50, random_state=0),
        LogisticRegression(max_iter=500),
    )
    grid = {"balancedvirtualfeatures__covariance": ["shrunk", "full"]}
    search = GridSearchCV(pipeline, grid, cv=2, scoring="balanced_accuracy", error_score="raise")
    search.fit(X, y)
    assert search.best_estimator_[0].pixel_range_ == "uint8"
    assert search.best_score_ > 0.8


def test_columns_of_whole_numbers_are_rounded_and_bools_stay_bools():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], [3000, 1000])
    frame = pd.DataFrame(
        {
            "age": rng.normal(60, 10, 4000),
            "smoker": rng.random(4000) < 0.3,
            "nodes": rng.poisson(5, 4000),
        }
    )
    found, _ = BalancedVirtualFeatures(random_state=0).fit_resample(frame, y)
    drawn = found.iloc[4000:]
    assert found.dtypes.tolist() == frame.dtypes.tolist()
    assert abs(drawn["smoker"].mean() - 0.33) < 0.08
    assert abs(drawn["nodes"].mean() - frame["nodes"].mean()) < 0.2


@pytest.mark.parametrize("covariance", ["shrunk", "diag", "tied"])
def test_noise_follows_the_scale_of_each_feature(covariance):
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(200, 4)) * [1, 1, 1000, 0], np.repeat([0, 1], [150, 50])
    found, _ = BalancedVirtualFeatures(covariance=covariance, random_state=0).fit_resample(X, y)
    spread = found[200:].std(axis=0)
    np.testing.assert_allclose(spread / [1, 1, 1000, 1], [1, 1, 1, 0], atol=0.3)


BAD = {
    "NaN": ({}, {"X": np.full((9, 2), np.nan)}, "NaN"),
    "infinity": ({}, {"X": np.full((9, 2), np.inf)}, "infinity"),
    "one class": ({}, {"y": np.zeros(9)}, "more than 1 class"),
    "images": ({}, {"X": np.zeros((9, 4, 4))}, "dim 3"),
    "short y": ({}, {"y": [0, 1]}, "inconsistent numbers"),
    "negative eps": ({"eps": -1}, {}, "'eps' parameter"),
    "unknown covariance": ({"covariance": "own"}, {}, "'covariance' parameter"),
    "no rows": ({"replace": True, "n_per_class": 0}, {}, "'n_per_class' parameter"),
    "absent class": ({"sampling_strategy": {7: 9}}, {}, "not present"),
}


@pytest.mark.parametrize(("params", "call", "message"), BAD.values(), ids=BAD)
def test_bad_input_gets_a_clear_error(params, call, message):
    X, y = np.arange(18.0).reshape(9, 2), np.repeat([0, 1], [6, 3])
    sampler = BalancedVirtualFeatures(**params)
    with pytest.raises(ValueError, match=message):
        sampler.fit_resample(**{"X": X, "y": y, **call})
    assert not hasattr(sampler, "means_")


# ---------------------------------------------------------------- the experiment of section 8


def test_virtual_features_beat_plain_training_and_shrinkage_the_own_covariance():
    plain, own, shrunk = [], [], []
    for seed in range(3):
        X, y, X_test, y_test = long_tailed_gaussians(seed)

        def score(X, y, X_test=X_test, y_test=y_test):
            head = LogisticRegression(C=0.1, max_iter=300).fit(X, y)
            return balanced_accuracy_score(y_test, head.predict(X_test))

        plain.append(score(X, y))
        for scores, covariance in ((own, "full"), (shrunk, "shrunk")):
            sampler = BalancedVirtualFeatures(
                replace=True, covariance=covariance, n_per_class=500, random_state=seed
            )
            scores.append(score(*sampler.fit_resample(X, y)))
    assert np.mean(shrunk) >= np.mean(plain) + 0.05
    assert np.mean(own) >= np.mean(plain) + 0.05
    assert np.mean(shrunk) >= np.mean(own)
