"""Patients stay whole: in the outer split, the search, the validation split and the sampler."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import sklearn
import torch
from imblearn.over_sampling import RandomOverSampler
from imblearn.pipeline import make_pipeline
from sklearn.base import clone
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import UnsetMetadataPassedError
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    StratifiedGroupKFold,
    cross_val_score,
    cross_validate,
)

from sklearn_medimb import AMIMVClassifier, AMIMVEncoder, SoftmaxClassifier, SPMixSampler
from sklearn_medimb._data.images import Images
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.base._classifier import BaseImageClassifier
from sklearn_medimb.inspection import SPMixDisplay
from sklearn_medimb.metrics import metric_interval, scorer_interval
from tests.estimators import CLASSIFIERS, PUBLIC

pytestmark = [
    pytest.mark.filterwarnings("ignore:The features have all but collapsed"),
    pytest.mark.filterwarnings("ignore:In .* steps the thresholds"),
]

# 24 patients with two or three images each, in no order. Each image is of one grey, which is its
# row number: whoever has seen an image has told us which. One patient in four has both classes.
PATIENT = np.random.default_rng(0).permutation(np.repeat(np.arange(24), [2, 3] * 12))
N = len(PATIENT)
X = np.broadcast_to(np.arange(N, dtype=np.uint8)[:, None, None], (N, 8, 8)).copy()
Y = (PATIENT % 3 == 0).astype(int)
Y[[np.flatnonzero(patient == PATIENT)[0] for patient in range(1, 24, 4)]] = 1
GROUPS = np.array([f"patient {number}" for number in PATIENT])


def ids(images: Any) -> list[int]:
    """Row numbers of images."""
    return np.asarray(images).reshape(len(images), -1)[:, 0].astype(int).tolist()


def patients(rows: Any) -> set[str]:
    return set(GROUPS[list(rows)])


class Mixer(SPMixSampler):
    """Keeps books; with ``mix_prob=0`` new images are copies, whose greys still name them."""

    seen: ClassVar[list[tuple[list[int], Any, Mixer]]]

    def fit_resample(self, X, y, *, groups=None, maps=None):
        result = super().fit_resample(X, y, groups=groups, maps=maps)
        Mixer.seen.append((ids(X), groups, self))
        return result


@dataclass
class Fit:
    """Rows that one fit was given, those it read other than to score them, and those it scored."""

    given: set[int]
    read: set[int] = field(default_factory=set)
    held: set[int] = field(default_factory=set)


@dataclass
class Books:
    """What was seen at which level, in the order of events; `score` is for the validation rows."""

    fits: list[Fit] = field(default_factory=list)
    splits: list[tuple[int, list[tuple[set[int], set[int]]]]] = field(default_factory=list)
    is_scoring: bool = False
    score: Any = None


@pytest.fixture
def books(monkeypatch):
    """Spies on splitters, on fits, and on every image that anyone reads."""
    kept = Books()
    Mixer.seen = []
    training_rows, rows_of = BaseImageClassifier._training_rows, Images.rows
    split = StratifiedGroupKFold.split

    def spied_training_rows(self, data, *args):
        rows = data.rows if data.unlabelled is None else np.r_[data.rows, data.unlabelled]
        kept.fits.append(Fit(set(rows_of(data.images, rows)[:, 0, 0, 0].tolist())))
        return training_rows(self, data, *args)

    def spied_rows(self, rows):
        images = rows_of(self, rows)
        if kept.fits and not kept.is_scoring:
            kept.fits[-1].read.update(images[:, 0, 0, 0].tolist())
        return images

    def spied_split(self, X, y=None, groups=None):
        folds = list(split(self, X, y, groups))
        kept.splits.append(
            (self.n_splits, [(set(ids(X[train])), set(ids(X[test]))) for train, test in folds])
        )
        yield from folds

    def score(estimator, X, y):  # a function: of a method `clone` would copy the books
        kept.is_scoring = True
        kept.fits[-1].held.update(ids(X))
        value = balanced_accuracy_score(y, estimator.predict(X))
        kept.is_scoring = False
        return value

    kept.score = score
    monkeypatch.setattr(BaseImageClassifier, "_training_rows", spied_training_rows)
    monkeypatch.setattr(Images, "rows", spied_rows)
    monkeypatch.setattr(StratifiedGroupKFold, "split", spied_split)
    return kept


class Unscored:
    """Predictions after a fit are no part of it: an outer scorer that reads nothing."""

    def __call__(self, estimator, X, y):
        return float(len(y))


def make(name: str, **params: Any) -> Any:
    """A classifier that uses groups at every level it has."""
    common = {
        "backbone": ConvNet(widths=(4,)),
        "max_epochs": 2,
        "batch_size": 16,
        "augment": "none",
        "early_stopping": True,
        "validation_fraction": 0.25,
        "precision": "float32",
        "random_state": 0,
    }
    if name == "AMIMVClassifier":
        encoder = AMIMVEncoder(max_epochs=1, batch_size=16, augment="none")
        common |= {"pretrain": encoder, "fine_tune": "full"}
    return clone(PUBLIC[name](**{**common, **params}))


def assert_whole(fit: Fit) -> None:
    """Demand that a fit has seen all that it was given, and no patient on both sides."""
    assert fit.read
    assert fit.held
    assert not patients(fit.read) & patients(fit.held)
    assert fit.read | fit.held == fit.given


# -------------------------------------------------------------------- one fit


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_no_patient_is_trained_on_and_validated(name, books):
    make(name, scoring=books.score).fit(X, Y, groups=GROUPS)
    (fit,) = books.fits
    assert fit.given == set(range(N))
    assert_whole(fit)


def test_without_groups_patients_do_straddle(books):
    """The data would show it."""
    make("SoftmaxClassifier", scoring=books.score).fit(X, Y)
    (fit,) = books.fits
    assert patients(fit.read) & patients(fit.held)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_sampler_sees_patients_in_training_only(name, books):
    sampler = Mixer(mix_prob=0.0, random_state=0)
    make(name, scoring=books.score, sampler=sampler).fit(X, Y, groups=GROUPS)
    (fit,) = books.fits
    assert_whole(fit)
    ((seen, codes, fitted),) = Mixer.seen
    assert set(seen) == fit.read
    # The sampler numbers them; each number is one patient.
    pairs = set(zip(codes.tolist(), GROUPS[seen], strict=True))
    assert len(pairs) == len(set(codes.tolist())) == len(patients(seen))
    one, other = (codes[rows] for rows in (fitted.sample_indices_, fitted.partner_indices_))
    assert len(one)
    assert (one != other).all()


def test_unlabelled_images_of_validation_patients_are_not_pretrained_on(books):
    some = np.where(np.arange(N) % 3 == 0, -1, Y)
    make("AMIMVClassifier", scoring=books.score).fit(X, some, groups=GROUPS)
    (fit,) = books.fits
    assert fit.given == set(range(N))
    unlabelled = set(np.flatnonzero(some == -1).tolist())
    assert fit.read & unlabelled  # others are
    assert not fit.held & unlabelled
    assert not patients(fit.read) & patients(fit.held)
    left_out = fit.given - fit.read - fit.held
    assert left_out  # and these are the unlabelled images of patients who validate
    assert left_out <= unlabelled
    assert patients(left_out) <= patients(fit.held)


# -------------------------------------------------------------------- through scikit-learn


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_no_patient_straddles_at_any_level_of_a_nested_search(name, books):
    """Outer folds, folds of the search, validation split, sampler: fifteen fits, each looked at."""
    sampler = Mixer(mix_prob=0.0, random_state=0)
    with sklearn.config_context(enable_metadata_routing=True):
        clf = make(name, scoring=books.score, sampler=sampler).set_fit_request(groups=True)
        search = GridSearchCV(
            clf,
            {"lr": [1e-3, 1e-2]},
            cv=StratifiedGroupKFold(2),
            scoring=Unscored(),
            error_score="raise",
        )
        cross_validate(
            search,
            X,
            Y,
            cv=StratifiedGroupKFold(3),
            params={"groups": GROUPS},
            scoring=Unscored(),
            error_score="raise",
        )
    assert [n for n, _ in books.splits] == [3, 2, 2, 2]
    (_, outer), *inner = books.splits
    assert len(books.fits) == len(Mixer.seen) == 3 * (2 * 2 + 1)
    fits = iter(zip(books.fits, Mixer.seen, strict=True))
    for (train, test), (_, folds) in zip(outer, inner, strict=True):
        assert not patients(train) & patients(test)
        # Two candidates on each fold, then the winner on the whole outer training part.
        for given, unseen in [*folds, *folds, (train, test)]:
            fit, (sampled, codes, mixer) = next(fits)
            assert fit.given == given
            assert not patients(given) & patients(unseen)
            assert not patients(given) & patients(test)
            assert_whole(fit)
            assert set(sampled) == fit.read
            pairs = codes[mixer.sample_indices_], codes[mixer.partner_indices_]
            assert (pairs[0] != pairs[1]).all()
    assert set().union(*(test for _, test in outer)) == set(range(N))


def test_search_alone_routes_groups(books):
    with sklearn.config_context(enable_metadata_routing=True):
        clf = make("SoftmaxClassifier", scoring=books.score).set_fit_request(groups=True)
        search = GridSearchCV(
            clf, {"lr": [1e-3, 1e-2]}, cv=StratifiedGroupKFold(2), scoring=Unscored()
        ).fit(X, Y, groups=GROUPS)
    assert len(books.fits) == 5
    for fit in books.fits:
        assert_whole(fit)
    assert search.best_estimator_.best_score_ >= 0


def test_routing_refuses_groups_that_nobody_asked_for():
    with sklearn.config_context(enable_metadata_routing=True):
        clf = make("SoftmaxClassifier")
        with pytest.raises(UnsetMetadataPassedError, match="groups"):
            cross_validate(clf, X, Y, cv=StratifiedGroupKFold(3), params={"groups": GROUPS})


def test_sampler_in_a_pipeline_sees_patients_of_the_training_fold_only(books):
    with sklearn.config_context(enable_metadata_routing=True):
        pipe = make_pipeline(
            Mixer(mix_prob=0.0, random_state=0).set_fit_resample_request(groups=True),
            # Rows that were added have no entry in groups: the split is the sampler's no longer.
            make("SoftmaxClassifier", early_stopping=False).set_fit_request(groups=False),
        )
        cross_validate(
            pipe,
            X,
            Y,
            cv=StratifiedGroupKFold(3),
            params={"groups": GROUPS},
            scoring=Unscored(),
            error_score="raise",
        )
    ((_, folds),) = books.splits
    for (train, test), (seen, groups, mixer), fit in zip(
        folds, Mixer.seen, books.fits, strict=True
    ):
        assert set(seen) == train == fit.given
        assert not patients(fit.given) & patients(test)
        np.testing.assert_array_equal(groups, GROUPS[seen])
        assert (groups[mixer.sample_indices_] != groups[mixer.partner_indices_]).all()


# -------------------------------------------------------------------- known and ignored

IGNORED = r"SoftmaxClassifier\.fit got no groups"


def requesting(**params: Any) -> Any:
    """A classifier whose user has asked for groups while routing was on."""
    with sklearn.config_context(enable_metadata_routing=True):
        return make("SoftmaxClassifier", **params).set_fit_request(groups=True)


def test_search_that_forgets_groups_with_routing_off():
    """The outer split uses them, so that all looks well; the inner one never hears of them."""
    search = GridSearchCV(requesting(), {"lr": [1e-3, 1e-2]}, cv=GroupKFold(2))
    with pytest.warns(UserWarning, match=IGNORED) as caught:
        search.fit(X, Y, groups=GROUPS)
    own = [str(w.message) for w in caught if "got no groups" in str(w.message)]
    assert len(own) == 5
    for words in (
        "metadata routing is off",
        "both sides of the validation split",
        "groups=...",
        "set_config(enable_metadata_routing=True)",
        "set_fit_request(groups=True)",
    ):
        assert words in own[0]
    with pytest.warns(UserWarning, match=IGNORED):
        cross_val_score(requesting(), X, Y, cv=2)


def test_warning_names_what_is_at_stake():
    mixer = SPMixSampler()
    with pytest.warns(UserWarning, match=r"may be mixed with one another\. Pass"):
        requesting(sampler=mixer, early_stopping=False).fit(X, Y)
    with pytest.warns(UserWarning, match="validation split and be mixed with one another"):
        requesting(sampler=mixer).fit(X, Y)
    with sklearn.config_context(enable_metadata_routing=True):
        renamed = make("SoftmaxClassifier").set_fit_request(groups="patients")
    with pytest.warns(UserWarning, match=IGNORED):
        renamed.fit(X, Y)


class Knowing:
    """Images on demand, with their patients."""

    def __init__(self, images: np.ndarray, groups: Any) -> None:
        self.images, self.groups = images, groups
        self.shape, self.ndim, self.dtype = images.shape, images.ndim, images.dtype

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Any) -> Any:
        rows = key[0] if isinstance(key, tuple) else key
        if np.ndim(rows):
            return Knowing(self.images[rows], None)
        return self.images[rows]


class KnowingDataset(torch.utils.data.Dataset):
    """The same as torch has it."""

    def __init__(self) -> None:
        self.groups = GROUPS

    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> np.ndarray:
        return X[row]


@pytest.mark.parametrize("lazy", [Knowing(X, GROUPS), KnowingDataset()], ids=["lazy", "torch"])
@pytest.mark.parametrize("routed", [False, True])
def test_images_that_carry_groups(lazy, routed, books):
    clf = make("SoftmaxClassifier", scoring=books.score)
    with sklearn.config_context(enable_metadata_routing=routed):
        with pytest.warns(UserWarning, match=f"{IGNORED}, although X carries them"):
            clf.fit(lazy, Y)
        clf.fit(lazy, Y, groups=lazy.groups)
    assert_whole(books.fits[-1])


@pytest.mark.parametrize(
    "quiet",
    [
        lambda: requesting(early_stopping=False).fit(X, Y),
        lambda: requesting().fit(X, Y, groups=GROUPS),
        # Repeating rows mixes no patients.
        lambda: requesting(early_stopping=False, sampler=RandomOverSampler()).fit(X, Y),
        # Not asked for, or expressly not wanted.
        lambda: make("SoftmaxClassifier").fit(X, Y),
        lambda: clone(requesting()).set_params(early_stopping=False).fit(X, Y),
        # Neither holds out rows.
        lambda: requesting().partial_fit(X, Y),
        lambda: AMIMVClassifier(
            ConvNet(widths=(4,)), pretrain=None, early_stopping=True, max_epochs=1
        ).fit(Knowing(X, GROUPS), Y),
        # These are not the patients of its images.
        lambda: make("SoftmaxClassifier").fit(Knowing(X, GROUPS[1:]), Y),
        lambda: make("SoftmaxClassifier").fit(Knowing(X, None), Y),
        lambda: make("SoftmaxClassifier").fit(Knowing(X, len), Y),
    ],
    ids=[
        "nothing is held out",
        "passed",
        "rows are repeated",
        "not asked for",
        "cloned",
        "partial_fit",
        "frozen features",
        "other length",
        "None",
        "a function",
    ],
)
def test_no_false_alarm(quiet):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet()


def test_no_false_alarm_with_routing_on():
    with sklearn.config_context(enable_metadata_routing=True), warnings.catch_warnings():
        warnings.simplefilter("error")
        clf = requesting()
        cross_val_score(clf, X, Y, cv=GroupKFold(2), params={"groups": GROUPS})
        clf.fit(X, Y, groups=GROUPS)


def test_groups_that_were_asked_for_and_forgotten():
    with sklearn.config_context(enable_metadata_routing=True):
        clf = requesting()
        with pytest.warns(UserWarning, match="got no groups, although its set_fit_request asks"):
            clf.fit(X, Y)


def test_another_head_needs_no_groups():
    with sklearn.config_context(enable_metadata_routing=True):
        clf = make("MetricTwoStageClassifier").set_fit_request(groups=True)
    clf.fit(X, Y, groups=GROUPS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clf.refit_head(X, Y, rebalance="ncm")


def test_a_refused_request_says_so_itself():
    """scikit-learn lets nobody ask for groups while routing is off."""
    with pytest.raises(RuntimeError, match="enable_metadata_routing"):
        SoftmaxClassifier().set_fit_request(groups=True)


@pytest.mark.parametrize("unknown", [None, np.nan, "", "nan"], ids=repr)
def test_unknown_patients_are_refused_wherever_patients_are_given(unknown):
    groups = np.array(GROUPS, dtype=object)
    groups[3] = unknown
    clf = SoftmaxClassifier(ConvNet((4,)), max_epochs=1, device="cpu")
    y = np.where(np.arange(N) % 7 == 0, -1, Y)
    takers = [
        lambda: SoftmaxClassifier(max_epochs=1).fit(X, Y, groups=groups),
        lambda: clf.set_params(early_stopping=True).fit(X, Y, groups=groups),
        lambda: clf.set_params(sampler=SPMixSampler()).fit(X, Y, groups=groups),
        lambda: AMIMVClassifier(max_epochs=1).fit(X, y, groups=groups),
        lambda: SPMixSampler().fit_resample(X, Y, groups=groups),
        lambda: SPMixDisplay.from_sampler(SPMixSampler(), X, Y, groups=groups),
        lambda: metric_interval(balanced_accuracy_score, Y, Y, groups=groups),
        lambda: scorer_interval(DummyClassifier().fit(X, Y), X, Y, groups=groups),
    ]
    for taker in takers:
        with pytest.raises(ValueError, match="groups has no entry in row 3"):
            taker()
    assert not hasattr(clf, "classes_")
