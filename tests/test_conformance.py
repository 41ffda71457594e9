"""Every public estimator keeps scikit-learn's contract and the package's own."""

from __future__ import annotations

import inspect
import sys
import warnings
from fractions import Fraction
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from imblearn.base import BaseSampler
from imblearn.utils.estimator_checks import estimator_checks_generator
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import SkipTestWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

from sklearn_medimb import (
    AMIMVClassifier,
    AMIMVEncoder,
    SaliencyMap,
    SoftmaxClassifier,
    SPMixSampler,
)
from sklearn_medimb._data.containers import is_lazy
from sklearn_medimb._data.images import check_pixel_range, read_images
from sklearn_medimb.utils import estimator_checks
from sklearn_medimb.utils.estimator_checks import (
    LazyImages,
    check_image_estimator,
    image_checks,
    make_images,
    parametrize_with_image_checks,
)
from tests.estimators import PUBLIC, SHARED, TINY, by_default


def default_estimators(samplers: bool = False) -> list[BaseEstimator]:
    """Defaults, as the checks ask: arithmetic in float64, draws that can be repeated."""
    made = []
    for name, cls in PUBLIC.items():
        known = cls().get_params()
        # scikit-learn demands agreement to 1e-9 between weighted and repeated rows.
        params = {"precision": "float64"} if "precision" in known else {}
        if issubclass(cls, BaseSampler):
            params["random_state"] = 0
        elif samplers:
            continue
        made.append(by_default(name, **params))
    return made


def tiny_estimators() -> list[BaseEstimator]:
    return [PUBLIC[name](**tiny) for name, tiny in TINY.items() if tiny is not None]


def test_every_estimator_has_a_tiny_configuration():
    public = set(PUBLIC)
    assert public, "sklearn_medimb.__all__ names no estimator."
    missing, stale = public - set(TINY), set(TINY) - public
    assert not missing, (
        f"{sorted(missing)} are public: give each a row in TINY of tests/estimators.py."
    )
    assert not stale, f"{sorted(stale)} are no longer public: remove their rows from TINY."


# Checks that ask how well an estimator learns. All others are as strict after a few epochs.
JUDGING = {
    "check_class_weight_classifiers",
    "check_classifiers_classes",
    "check_classifiers_predictions",
    "check_classifiers_train",
}


def brief(estimator: BaseEstimator, check: partial) -> BaseEstimator:
    """As long a training as a check needs: the default of hundreds of steps is for judgement."""
    params = {"max_epochs": 3}
    if check.func.__name__ in JUDGING:
        params = {"max_epochs": 8, "precision": "auto"}
    if check.func.__name__ == "check_classifiers_train" and not check.keywords:
        params = {"precision": "auto"}  # once for each estimator, all is as by default
    if isinstance(estimator, AMIMVClassifier):
        params["pretrain"] = AMIMVEncoder(max_epochs=3)
    known = estimator.get_params(deep=False)
    return clone(estimator).set_params(**{k: v for k, v in params.items() if k in known})


@pytest.mark.filterwarnings("ignore:.* reads the rows of a 2-D X as images of height 1")
@parametrize_with_checks(default_estimators())
def test_scikit_learn_checks(estimator, check):
    check(brief(estimator, check))


@pytest.mark.filterwarnings("ignore:.*sparse columns")
@pytest.mark.filterwarnings("ignore:.* reads the rows of a 2-D X as images of height 1")
@pytest.mark.parametrize(
    ("estimator", "check"),
    [
        pytest.param(*case, id=f"{type(sampler).__name__}-{case[1].func.__name__}")
        for sampler in default_estimators(samplers=True)
        for case in estimator_checks_generator(sampler)
    ],
)
def test_imbalanced_learn_checks(estimator, check):
    check(estimator)


# A handful of tiny or constant images gives encoders little to tell apart.
@pytest.mark.filterwarnings("ignore:The features have all but collapsed")
@pytest.mark.filterwarnings("ignore:In .* steps the thresholds")
@pytest.mark.filterwarnings("ignore:Classes .* have one training image")
@parametrize_with_image_checks(tiny_estimators())
def test_image_checks(estimator, check):
    check(estimator)


# -------------------------------------------------------------------- the suite itself


def all_checks() -> set:
    return {
        function
        for name, function in inspect.getmembers(estimator_checks, inspect.isfunction)
        if name.startswith("check_")
        and function.__module__ == estimator_checks.__name__
        and function is not check_image_estimator
    }


def test_suite_runs_every_check_once():
    classifier, sampler = SoftmaxClassifier(**SHARED), SPMixSampler()
    ran = [check.func for made in (classifier, sampler) for _, check in image_checks(made)]
    assert len(ran) == len(set(ran))
    assert set(ran) == all_checks(), "List each check in one of the tuples of the suite."


def test_suite_spares_what_has_no_labels_or_learns_nothing():
    class Encoder(BaseEstimator):
        def fit(self, X, y=None):
            return self

    stateless = set(estimator_checks.STATELESS_CHECKS)
    learning = set(estimator_checks.LEARNING_CHECKS)
    assert {check.func for _, check in image_checks(Encoder())} == stateless | learning
    assert {check.func for _, check in image_checks(SaliencyMap())} == stateless


def test_check_image_estimator_runs_all_and_warns_of_skipped_ones(monkeypatch):
    ran = []
    functions = {name: getattr(estimator_checks, name) for name in ("check_pickle", "check_skops")}

    def spied(function):
        return lambda name, estimator: ran.append(function) or function(name, estimator)

    checks = tuple(map(spied, functions.values()))
    monkeypatch.setattr(estimator_checks, "STATELESS_CHECKS", checks)
    monkeypatch.setattr(estimator_checks, "LEARNING_CHECKS", ())
    monkeypatch.setattr(estimator_checks, "LABEL_CHECKS", ())
    monkeypatch.setitem(sys.modules, "skops.io", None)
    estimator = SoftmaxClassifier(**SHARED)
    with pytest.warns(SkipTestWarning, match=r"skops\.io is not installed"):
        check_image_estimator(estimator)
    assert ran == list(functions.values())
    assert not hasattr(estimator, "classes_")


def test_lazy_images_keep_books():
    images, _ = make_images(n_images=6)
    X = LazyImages(images)
    view = X[np.array([4, 2, 0]), ...][1:]
    assert view.shape == (2, *images.shape[1:])
    np.testing.assert_array_equal(view[1], images[0])
    assert (X.n_reads, X.peak) == (1, 1)
    kept = [X[0], X[1]]
    for _ in range(3):
        X[2]
    assert (X.n_reads, X.peak) == (6, 3)
    del kept
    assert not X.was_converted
    with pytest.raises(AssertionError, match="converted"):
        np.asarray(view)
    assert X.was_converted
    with pytest.raises(IndexError):
        X[6]
    broken = LazyImages(images, fail_after=2)
    with pytest.raises(OSError, match="disk"):
        list(broken[np.arange(6)])


# One broken estimator for each check: a check that no mutant fails would check nothing.


class Mutant(SoftmaxClassifier):
    """Sound until a subclass breaks it; `breaks` names the check that must notice."""

    breaks: ClassVar[str]


class ReadsChannelsLastAsFirst(Mutant):
    breaks: ClassVar[str] = "check_channel_layouts"

    def _read(self, X, *, reset=False):
        if X.shape[-1] == 3:
            X = X.reshape(len(X), 3, *X.shape[1:3])
        return super()._read(X, reset=reset)


class RepeatsGray(Mutant):
    breaks: ClassVar[str] = "check_gray_images"

    def _read(self, X, *, reset=False):
        return super()._read(np.stack([X] * 3, axis=1) if X.ndim == 3 else X, reset=reset)


class ForgetsToDivide(Mutant):
    breaks: ClassVar[str] = "check_uint8_images"

    def _read(self, X, *, reset=False):
        if not reset:
            self.pixel_range_ = None  # or the other scale would be refused
        return super()._read(X.astype(float), reset=reset)


class TakesAnyScale(Mutant):
    breaks: ClassVar[str] = "check_pixel_scale_at_predict"

    def _read(self, X, *, reset=False):
        if not reset:
            self.pixel_range_ = None
        return super()._read(X, reset=reset)


class TakesAnySize(Mutant):
    breaks: ClassVar[str] = "check_image_size_at_predict"

    def _read(self, X, *, reset=False):
        return super()._read(
            X if reset else np.resize(X, (len(X), *self.image_shape_)), reset=reset
        )


class IgnoresSpatialDims(Mutant):
    breaks: ClassVar[str] = "check_volumes"

    def _read(self, X, *, reset=False):
        images = read_images(self, X, reset=reset, float_dtype=np.float64)
        check_pixel_range(self, images, reset=reset)
        return images


class ReadsInMemoryOrder(Mutant):
    breaks: ClassVar[str] = "check_memory_order"

    def _read(self, X, *, reset=False):
        return super()._read(X.ravel(order="K").reshape(X.shape), reset=reset)


class ReversesLists(Mutant):
    breaks: ClassVar[str] = "check_lists_and_tensors"

    def _read(self, X, *, reset=False):
        return super()._read(X[::-1] if isinstance(X, list) else X, reset=reset)


class StacksLists(Mutant):
    breaks: ClassVar[str] = "check_lists_that_mix_scales"

    def _read(self, X, *, reset=False):
        return super()._read(np.stack(X) / 300 if isinstance(X, list) else X, reset=reset)


class Materialises(Mutant):
    breaks: ClassVar[str] = "check_lazy_images_stay_lazy"

    def _read(self, X, *, reset=False):
        return super()._read(np.stack(list(X)) if is_lazy(X) else X, reset=reset)


class MixesUpLazyRows(Mutant):
    breaks: ClassVar[str] = "check_lazy_images_same_as_array"

    def _read(self, X, *, reset=False):
        return super()._read(X[np.arange(len(X))[::-1]] if is_lazy(X) else X, reset=reset)


class ConvertsAtPredict(Mutant):
    breaks: ClassVar[str] = "check_lazy_images_in_cross_validation"

    def predict(self, X):
        return super().predict(np.asarray(X))


class ScalesByBatch(Mutant):
    breaks: ClassVar[str] = "check_one_image"

    def predict_proba(self, X):
        return super().predict_proba(X - X.mean(axis=0))


class SortsResults(Mutant):
    breaks: ClassVar[str] = "check_sample_order"

    def predict_proba(self, X):
        return np.sort(super().predict_proba(X), axis=0)


class SwallowsNaN(Mutant):
    breaks: ClassVar[str] = "check_non_finite_images"

    def _read(self, X, *, reset=False):
        return super()._read(X if is_lazy(X) else np.nan_to_num(X), reset=reset)


class DividesByContrast(Mutant):
    breaks: ClassVar[str] = "check_constant_images"

    def predict_proba(self, X):
        with np.errstate(all="ignore"):
            return super().predict_proba(X) * (X.std() / X.std())


class NeedsAFullBatch(Mutant):
    breaks: ClassVar[str] = "check_fewer_images_than_batch_size"

    def fit(self, X, y, **params):
        if len(X) < self.batch_size:
            raise ValueError("No batch is complete.")
        return super().fit(X, y, **params)


class CloneLosesTheSeed(Mutant):
    breaks: ClassVar[str] = "check_clone"

    def __sklearn_clone__(self):
        params = {"random_state": 1} if hasattr(self, "classes_") else {}
        return type(self)(**{**self.get_params(deep=False), **params})


class StoresRounded(Mutant):
    breaks: ClassVar[str] = "check_pickle"

    def __getstate__(self):
        state = super().__getstate__()
        if "_weights" in state:
            state["_weights"] = {key: value.round(1) for key, value in state["_weights"].items()}
        return state


class StoresRoundedToDisk(StoresRounded):
    breaks: ClassVar[str] = "check_joblib"


class HoldsAForeignObject(Mutant):
    breaks: ClassVar[str] = "check_skops"

    def fit(self, X, y, **params):
        self.share_ = Fraction(1, 2)
        return super().fit(X, y, **params)


class IgnoresAssignedWeights(Mutant):
    breaks: ClassVar[str] = "check_safetensors"

    @property
    def weights_(self):
        return super().weights_

    @weights_.setter
    def weights_(self, weights):
        pass


class DrawsFromTheGlobalGenerator(Mutant):
    breaks: ClassVar[str] = "check_repeatable"

    def fit(self, X, y, **params):
        self.random_state = np.random.randint(2**31 - 1)  # noqa: NPY002
        return super().fit(X, y, **params)


class SeedsTheGlobalGenerator(Mutant):
    breaks: ClassVar[str] = "check_global_random_state"

    def fit(self, X, y, **params):
        torch.manual_seed(0)
        return super().fit(X, y, **params)


class KeepsAHalfTrainedModel(Mutant):
    breaks: ClassVar[str] = "check_failed_fit"

    def fit(self, X, y, **params):
        try:
            return super().fit(X, y, **params)
        except ValueError:
            vars(self).update(vars(clone(self).fit(X._images, y)))
            raise


class LosesTheOldModel(Mutant):
    breaks: ClassVar[str] = "check_failed_refit"

    def fit(self, X, y, **params):
        for name in [name for name in vars(self) if name.endswith("_")]:
            delattr(self, name)
        return super().fit(X, y, **params)


class LosesTheOldModelWhenWarm(LosesTheOldModel):
    breaks: ClassVar[str] = "check_failed_warm_start"


class PredictsCodes(Mutant):
    breaks: ClassVar[str] = "check_label_types"

    def predict(self, X):
        return np.searchsorted(self.classes_, super().predict(X))


class DropsRareClasses(Mutant):
    breaks: ClassVar[str] = "check_class_with_one_sample"

    def fit(self, X, y, **params):
        keep = np.bincount(y)[y] > 1
        return super().fit(X[keep], y[keep], **params)


class AlwaysThreeColumns(Mutant):
    breaks: ClassVar[str] = "check_class_missing_from_fold"

    def predict_proba(self, X):
        proba = super().predict_proba(X)
        return np.pad(proba, [(0, 0), (0, 3 - proba.shape[1])])


class IgnoresGroups(Mutant):
    breaks: ClassVar[str] = "check_groups_stay_whole"

    def fit(self, X, y, groups=None):
        return super().fit(X, y)


class BrokenSampler(SPMixSampler):
    """Sound until a subclass breaks it."""

    breaks: ClassVar[str]


class ShufflesOriginals(BrokenSampler):
    breaks: ClassVar[str] = "check_sampler_keeps_originals"

    def fit_resample(self, X, y, **params):
        X, y = super().fit_resample(X, y, **params)
        return X[::-1], y[::-1]


class MixesFlatRows(BrokenSampler):
    breaks: ClassVar[str] = "check_sampler_layouts"

    def fit_resample(self, X, y, **params):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            flat, y = super().fit_resample(X.reshape(len(X), -1), y, **params)
        return flat.reshape(-1, *X.shape[1:]), y


class StacksListsOfImages(BrokenSampler):
    breaks: ClassVar[str] = "check_sampler_lists_that_mix_scales"

    def fit_resample(self, X, y, **params):
        return super().fit_resample(np.stack(X) / 300, y, **params)


class StacksLazyImages(BrokenSampler):
    breaks: ClassVar[str] = "check_sampler_lazy_images"

    def fit_resample(self, X, y, **params):
        return super().fit_resample(np.stack([X[i] for i in range(len(X))]), y, **params)


class MixesPatientsWithThemselves(BrokenSampler):
    breaks: ClassVar[str] = "check_sampler_keeps_patients_apart"

    def _pairs(self, y, groups, rng):
        return super()._pairs(y, np.arange(len(y)), rng)


class DrawsPairsFromTheGlobalGenerator(BrokenSampler):
    breaks: ClassVar[str] = "check_sampler_random_state"

    def _pairs(self, y, groups, rng):
        return super()._pairs(y, groups, np.random.default_rng(np.random.randint(9)))  # noqa: NPY002


class DividesMixesByContrast(BrokenSampler):
    breaks: ClassVar[str] = "check_sampler_rare_and_constant"

    def fit_resample(self, X, y, **params):
        with np.errstate(all="ignore"):
            contrast = X.std() / X.std()
        X, y = super().fit_resample(X, y, **params)
        return (X * contrast).astype(X.dtype), y


class MixesNaN(BrokenSampler):
    breaks: ClassVar[str] = "check_sampler_non_finite_images"

    def fit_resample(self, X, y, **params):
        return super().fit_resample(np.nan_to_num(X), y, **params)


def mutants(cls: type) -> list[type]:
    return [m for sub in cls.__subclasses__() for m in (sub, *mutants(sub))]


MUTANTS = mutants(Mutant) + mutants(BrokenSampler)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_checks_notice_broken_estimators(mutant):
    check = getattr(estimator_checks, mutant.breaks)
    # The message names the estimator, or is that of the container which someone converted.
    with pytest.raises(AssertionError, match=f"{mutant.__name__}|lazy X was converted"):
        check(mutant.__name__, mutant(**(SHARED if issubclass(mutant, Mutant) else {})))


def test_every_check_has_a_mutant():
    broken = {mutant.breaks for mutant in MUTANTS}
    assert broken == {check.__name__ for check in all_checks()}
