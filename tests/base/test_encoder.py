"""What label-free encoders share: views, monitors, pre-training, and starts for classifiers."""

from __future__ import annotations

import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from imblearn.over_sampling import SMOTE, RandomOverSampler
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch.callbacks import Callback, EarlyStopping
from skorch.history import History

from sklearn_medimb import (
    AMIMVClassifier,
    AMIMVEncoder,
    CSSNClassifier,
    LMDClassifier,
    MetricTwoStageClassifier,
    SoftmaxClassifier,
    SPMixClassifier,
    SSLEncoder,
)
from sklearn_medimb._training.monitors import Monitor, effective_rank, feature_std, knn_score
from sklearn_medimb._training.objectives import encode, perceptron
from sklearn_medimb._training.views import ViewBatches, Views
from sklearn_medimb.augment import Augmentation
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.base._encoder import ENCODERS, PRETRAINING, resolve_encoder
from sklearn_medimb.methods import Contrast
from tests.helpers import (
    SMALL,
    Add,
    CrashAfter,
    Files,
    Starts,
    all_equal,
    backbone_state,
    make_batches,
    make_blobs,
    noise_images,
    numbered,
    same_arrays,
    small_network,
    snapshot,
    spy_on_rows,
    stages,
    values,
)

# One row per public image classifier: what makes it small, and train its backbone.
CLASSIFIERS = {
    AMIMVClassifier: {"pretrain": None, "fine_tune": "full"},
    CSSNClassifier: {},
    LMDClassifier: {"n_rounds": 2},
    MetricTwoStageClassifier: {},
    SPMixClassifier: {},
    SoftmaxClassifier: {},
}
EACH = pytest.mark.parametrize("Classifier", CLASSIFIERS, ids=lambda cls: cls.__name__)
EACH_NAME = pytest.mark.parametrize("name", sorted(ENCODERS))


def small(Classifier, **params):
    return Classifier(**{**SMALL, **CLASSIFIERS[Classifier], **params})


def pretrainer(**params):
    return SSLEncoder(**{"max_epochs": 2, "batch_size": 16, **params})


@pytest.fixture(scope="module")
def data():
    return make_blobs()


@pytest.fixture(scope="module")
def encoder(data):
    return AMIMVEncoder(**SMALL, projection_dim=16).fit(data[0])


@pytest.fixture(scope="module")
def classifier(data):
    return SoftmaxClassifier(**SMALL).fit(*data)


@pytest.fixture
def seen_rows(monkeypatch):
    return spy_on_rows(monkeypatch)


# ---------------------------------------------------------------- views


def test_views_come_stacked_with_those_of_one_image_in_its_place():
    views = Views([(0, Augmentation()), (0, Add(100))], [(0, Add(1000))])
    rows = []
    for branches, targets in ViewBatches(make_batches(numbered(10)), views):
        x = targets.float()
        assert torch.equal(values(branches["online"]), torch.cat([x, x + 100]))
        assert torch.equal(values(branches["target"]), x + 1000)
        rows += targets.tolist()
    assert sorted(rows) == list(range(10))


def test_without_target_views_there_is_no_target_branch():
    views = Views([(0, Augmentation()), (0, Augmentation())], [])
    branches, _ = next(iter(ViewBatches(make_batches(numbered(10)), views)))
    assert branches.keys() == {"online"}
    online = torch.rand(6, 1, 12, 12).double()
    features, target = encode(small_network(), {"online": online}, 2, 0)
    assert [view.shape for view in features] == [(3, 8)] * 2
    assert target == []


def test_a_partner_is_the_same_image_in_both_branches():
    views = Views([(0, Add(0)), (1, Add(100))], [(1, Add(1000)), (0, Add(0))])
    for branches, targets in ViewBatches(make_batches(numbered(50)), views):
        x, y = values(branches["online"]).chunk(2)
        y_target, x_target = values(branches["target"]).chunk(2)
        assert torch.equal(x, targets.float())
        assert torch.equal(x_target, x)
        assert torch.equal(y_target - 1000, y - 100)


def partners(n_epochs, rows=None, n=12):
    """Anchors and partners of some epochs, one row per step of four anchors."""
    batches = make_batches(numbered(n), rows=rows)
    views = ViewBatches(batches, Views([(0, Augmentation())], [(1, Augmentation())]))
    pairs = [
        (values(branches["online"]), values(branches["target"]))
        for _ in range(n_epochs)
        for branches, _ in views
    ]
    return (torch.stack(part).int().numpy() for part in zip(*pairs, strict=True))


def test_partners_are_uniform_with_replacement_and_may_be_the_anchor():
    anchors, drawn = partners(1000)  # 12,000 anchors
    table = np.zeros((12, 12))
    np.add.at(table, (anchors.ravel(), drawn.ravel()), 1)
    assert table.sum() == 12_000
    expected = 12_000 / 144
    chi_square = ((table - expected) ** 2 / expected).sum()
    assert 80 < chi_square < 200  # 132 degrees of freedom
    assert np.diag(table).mean() == pytest.approx(expected, rel=0.1)  # itself as often as others
    # Four of twelve, with replacement: all unlike in 57 % of the steps.
    unlike = np.mean([len(set(step)) == 4 for step in drawn.tolist()])
    assert unlike == pytest.approx(11 * 10 * 9 / 12**3, abs=0.03)


def test_partners_come_from_the_training_rows_only():
    _, drawn = partners(50, rows=np.array([7, 2, 9, 4]))
    assert set(drawn.ravel().tolist()) == {2, 4, 7, 9}


def test_of_vectors_a_view_has_entries_from_other_rows_of_the_batch():
    X = np.random.default_rng(0).random((64, 40)).astype(np.float32)
    batches = make_batches(X, plan=lambda rng: [np.arange(64)])
    batches.preprocess.mean, batches.preprocess.std = torch.zeros(40), torch.ones(40)
    views = ViewBatches(batches, Views([(0, Augmentation())], [(0, Add(100))]))
    ((branches, _),) = views
    clean, corrupted = branches["online"].numpy(), branches["target"].numpy()
    assert np.array_equal(clean, X)
    assert np.mean(corrupted != X) == pytest.approx(0.3, abs=0.03)
    for column in range(40):
        assert np.isin(corrupted[:, column], X[:, column]).all()


def test_perceptron_has_norms_between_its_layers_and_after_the_last_if_asked():
    def kinds(network):
        return [type(layer).__name__ for layer in network]

    hidden = ["Linear", "BatchNorm1d", "ReLU"]
    assert kinds(perceptron([4, 5, 6, 2], last_norm=False)) == [*hidden, *hidden, "Linear"]
    normed = perceptron([4, 5, 2], last_norm=True, affine=False)
    assert kinds(normed) == [*hidden, "Linear", "BatchNorm1d"]
    assert [m.bias is None for m in normed if isinstance(m, torch.nn.Linear)] == [True, True]
    assert normed[-1].weight is None
    assert normed(torch.rand(3, 4)).shape == (3, 2)


@pytest.mark.parametrize("name", ["moco", "barlow_twins", "vicreg"])
def test_no_batch_has_a_single_image(name, data):
    encoder = ENCODERS[name]().set_params(**{**SMALL, "batch_size": 2})
    assert np.isfinite(encoder.fit(data[0][:5]).history_[-1]["train_loss"])


# ---------------------------------------------------------------- monitors


def test_feature_std_is_one_for_isotropic_and_zero_for_constant_features():
    rng = np.random.default_rng(0)
    assert feature_std(rng.normal(size=(5000, 32))) == pytest.approx(1, abs=0.01)
    assert feature_std(np.tile(rng.normal(size=32), (50, 1))) == pytest.approx(0, abs=1e-12)
    assert feature_std(np.zeros((50, 32))) == 0
    # Lengths do not count, directions do.
    assert feature_std(rng.lognormal(size=(50, 1)) * np.ones((50, 32))) == pytest.approx(0)
    halves = np.repeat([[1.0, 0.0], [-1.0, 0.0]], 25, axis=0)
    assert feature_std(halves) == pytest.approx(math.sqrt(2) / 2)


def test_effective_rank_counts_the_directions_of_known_matrices():
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.normal(size=(40, 6)) - rng.normal(size=(40, 6)).mean(axis=0))
    left -= left.mean(axis=0)
    left, _ = np.linalg.qr(left)
    right, _ = np.linalg.qr(rng.normal(size=(8, 6)))
    for k in (1, 2, 6):
        assert effective_rank(left[:, :k] @ right[:, :k].T + 5) == pytest.approx(k)
    weighted = left[:, :2] * [3, 1] @ right[:, :2].T  # shares 3/4 and 1/4
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(weighted) == pytest.approx(math.exp(entropy))
    assert effective_rank(np.ones((9, 4))) == 0


def test_knn_score_is_one_for_separable_and_chance_for_random_features():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], [40, 30, 10])
    assert knn_score(np.eye(3)[y] + 0.01 * rng.normal(size=(80, 3)), y) == 1
    noise = [knn_score(rng.normal(size=(80, 3)), y) for _ in range(20)]
    assert np.mean(noise) == pytest.approx(1 / 3, abs=0.05)
    # Rows are not their own neighbours, and rare classes weigh as much as others.
    assert knn_score(np.eye(2)[[0, 0, 0, 0, 1]] + 0.1, np.array([0, 0, 0, 0, 1]), 1) == 0.5
    assert knn_score(np.eye(2), np.array([0, 1])) == 0


class Quiet:
    """A criterion that has nothing to say."""

    def complaints(self):
        return []


def watched(y, n_epochs, look=None):
    """Numbers of the epochs that a monitor looked at, and the rows of each look."""
    rng, rows = np.random.default_rng(0), []

    def embed(picked):
        rows.append(picked)
        return rng.normal(size=(len(picked), 4)) if look is None else look(picked)

    net = SimpleNamespace(history=History(), criterion_=Quiet())
    monitor = Monitor(embed, np.asarray(y), n_epochs)
    for _ in range(n_epochs):
        net.history.new_epoch()
        monitor.on_epoch_end(net)
    monitor.on_train_end(net)
    return [i for i, row in enumerate(net.history, 1) if "feature_std" in row], rows, net.history


@pytest.mark.parametrize(("n_epochs", "every"), [(1, 1), (100, 1), (101, 2), (250, 3), (1000, 10)])
def test_a_hundred_epochs_are_watched_at_most_and_the_last_one_always(n_epochs, every):
    epochs, rows, _ = watched(np.full(5, -1), n_epochs)
    assert epochs == sorted({*range(every, n_epochs + 1, every), n_epochs})
    assert len(rows) == len(epochs) <= 101


@pytest.mark.filterwarnings("ignore:The features have all but collapsed")
def test_monitors_look_at_some_rows_and_probe_those_whose_class_is_known():
    y = np.where(np.arange(3000) % 3 == 0, -1, np.arange(3000) % 2)
    _, (rows,), history = watched(y, 1)
    assert len(rows) == 256 + 1000
    assert len(set(rows[:256])) == 256
    assert rows[:256].min() == 0
    assert rows[:256].max() == 2999
    assert (y[rows[256:]] >= 0).all()
    assert history[-1, "knn_score"] == pytest.approx(0.5, abs=0.1)
    exact = watched(y, 1, look=lambda picked: np.eye(2)[y[picked]])[2]
    assert exact[-1, "knn_score"] == 1
    for unknown in (np.full(9, -1), np.zeros(9, dtype=int)):  # fewer than two classes
        _, (rows,), history = watched(unknown, 1)
        assert rows.tolist() == list(range(9))
        assert "knn_score" not in history[-1]


def test_the_history_has_the_monitors_of_each_epoch(data):
    X, y = data
    encoder = AMIMVEncoder(**{**SMALL, "max_epochs": 3}).fit(X, y)
    names = {"train_loss", "train_positive_cosine", "feature_std", "effective_rank", "knn_score"}
    assert all(names < row.keys() for row in encoder.history_)
    features = encoder.transform(X).astype(float)
    order = np.argsort(y, kind="stable")
    assert encoder.history_[-1]["feature_std"] == pytest.approx(feature_std(features), rel=1e-4)
    assert encoder.history_[-1]["effective_rank"] == pytest.approx(
        effective_rank(features), rel=1e-4
    )
    assert encoder.history_[-1]["knn_score"] == knn_score(features[order], y[order])
    assert len({row["feature_std"] for row in encoder.history_}) == 3


def test_long_trainings_are_watched_at_every_other_epoch_and_at_their_end():
    X = np.random.default_rng(0).normal(size=(8, 6))
    encoder = SSLEncoder(max_epochs=101, projection_dim=8, random_state=0).fit(X)
    seen = [row["epoch"] for row in encoder.history_ if "feature_std" in row]
    assert seen == [*range(2, 101, 2), 101]


@pytest.mark.parametrize(
    ("y", "scored"),
    [
        (None, False),
        (np.array(["a", "b"] * 30), True),
        (np.where(np.arange(60) % 3, np.arange(60) % 2, -1), True),
        (np.linspace(0, 1, 60), False),  # no classes
        (np.where(np.arange(60) % 3, np.nan, 1.0), False),
        (np.where(np.arange(60) % 2, 1, -1), False),  # one class, and unknown ones
        (np.zeros(60), False),
        (np.array(["a", "b", -1] * 20, dtype=object), True),
    ],
    ids=["none", "text", "some-unknown", "numbers", "nan", "one-class", "constant", "text-and-1"],
)
def test_labels_give_a_knn_score_where_they_are_classes(y, scored, data):
    encoder = SSLEncoder(**{**SMALL, "max_epochs": 1}).fit(data[0], y)
    assert ("knn_score" in encoder.history_[-1]) == scored


def test_labels_of_another_number_than_images_are_refused(data):
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        SSLEncoder(**SMALL).fit(data[0], np.zeros(7))


def test_collapsed_features_are_announced():
    images = np.full((20, 12, 12), 7, dtype=np.uint8)
    with pytest.warns(UserWarning, match=r"all but collapsed \(feature_std=.*effective_rank=0\)"):
        SSLEncoder(**SMALL).fit(images)
    y = np.arange(20) % 2
    with pytest.warns(UserWarning, match="all but collapsed"):
        SoftmaxClassifier(**SMALL, pretrain=pretrainer()).fit(images, y)


def test_two_images_have_not_collapsed(data):
    SSLEncoder(**SMALL).fit(data[0][[0, 1]])


# ---------------------------------------------------------------- a fitted estimator as the start


def starting_points(encoder, classifier):
    given = {"encoder": encoder, "classifier": classifier}
    return given | {f"frozen {name}": FrozenEstimator(value) for name, value in given.items()}


@EACH
@pytest.mark.parametrize("which", ["encoder", "classifier", "frozen encoder", "frozen classifier"])
def test_training_begins_with_the_backbone_and_the_normalisation_of_a_fitted_estimator(
    Classifier, which, data, encoder, classifier
):
    X, y = data
    given = classifier if "classifier" in which else encoder
    before, began = given.weights_, []

    def look(net):
        if not began:
            state = net.module_.trunk.backbone.state_dict()
            began.append({k: v.clone().numpy() for k, v in state.items()})

    clf = small(
        Classifier,
        backbone=starting_points(encoder, classifier)[which],
        callbacks=[Starts(look)],
    ).fit(X[:40] // 2, y[:40])  # other statistics than the encoder's images
    assert same_arrays(began[0], backbone_state(given))
    assert np.array_equal(clf.pixel_mean_, given.pixel_mean_)
    assert np.array_equal(clf.pixel_std_, given.pixel_std_)
    assert not same_arrays(backbone_state(clf), backbone_state(given))  # it was trained on
    assert same_arrays(given.weights_, before)


def test_an_encoder_begins_with_any_fitted_estimator_too(data, encoder, classifier):
    for given in (encoder, classifier, FrozenEstimator(classifier)):
        began = []
        look = Starts(lambda net, began=began: began.append(snapshot(net.module_.parameters())))
        again = SSLEncoder(**{**SMALL, "backbone": given}, callbacks=[look]).fit(data[0])
        start = given.estimator if isinstance(given, FrozenEstimator) else given
        assert all_equal(began[0], start.backbone_.parameters())
        assert np.array_equal(again.pixel_mean_, start.pixel_mean_)


@EACH
def test_a_classifier_with_a_start_survives_clone_search_and_pickle(Classifier, data, encoder):
    X, y = data
    before = encoder.weights_
    clf = small(Classifier, backbone=encoder, max_epochs=1)
    fitted = clone(clf).fit(X, y)
    loaded = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(loaded.predict_proba(X), fitted.predict_proba(X))
    assert np.array_equal(clone(loaded).fit(X, y).predict_proba(X), fitted.predict_proba(X))
    search = GridSearchCV(clf, {"lr": [1e-2]}, cv=2, error_score="raise").fit(X, y)
    assert np.array_equal(search.best_estimator_.pixel_mean_, encoder.pixel_mean_)
    assert same_arrays(encoder.weights_, before)


@EACH
def test_a_fitted_encoder_as_pretrain_is_the_start_and_not_trained_again(Classifier, data, encoder):
    X, y = data
    before = encoder.weights_
    one = small(Classifier, pretrain=encoder, max_epochs=1).fit(X, y)
    two = clone(one).set_params(pretrain=None, backbone=encoder).fit(X, y)
    assert PRETRAINING not in stages(one)
    assert np.array_equal(one.predict_proba(X), two.predict_proba(X))
    loaded = pickle.loads(pickle.dumps(one))
    assert np.array_equal(loaded.predict_proba(X), one.predict_proba(X))
    assert same_arrays(encoder.weights_, before)


def test_backbone_comes_before_a_fitted_pretrain(data, encoder, classifier):
    """The one is the start then, the other lends its parameters."""
    began = []
    clf = small(SoftmaxClassifier, backbone=classifier, pretrain=encoder)
    clf.set_params(callbacks=[Starts(lambda net: began.append(snapshot(net.module_.parameters())))])
    clf.fit(*data)
    assert all_equal(began[0][:-2], classifier.backbone_.parameters())
    assert stages(clf) == [PRETRAINING] * 2 + [""] * 2
    assert len(encoder.history_) == 2


def test_a_search_over_parameters_of_a_fitted_encoder_leaves_it_alone(data, encoder):
    copied = pickle.loads(pickle.dumps(encoder))
    search = GridSearchCV(
        small(SoftmaxClassifier, pretrain=copied), {"pretrain__momentum": [0.5, 0.6]}, cv=2
    )
    search.fit(*data)
    assert copied.momentum == encoder.momentum


@EACH
@pytest.mark.parametrize("frozen", [False, True])
def test_an_unfitted_estimator_is_no_start(Classifier, frozen, data):
    given = AMIMVEncoder()
    given = FrozenEstimator(given) if frozen else given
    with pytest.raises(ValueError, match=r"backbone=AMIMVEncoder\(\.\.\.\) is not fitted: fit it"):
        small(Classifier, backbone=given).fit(*data)


def test_a_start_for_other_images_is_refused(data, encoder):
    X, y = data
    clf = small(SoftmaxClassifier, backbone=encoder)
    for other in (X[:, :1], np.stack([X] * 4, axis=2)):
        with pytest.raises(ValueError, match="AMIMVEncoder was fitted on images of shape"):
            clf.fit(other, y)
    assert clf.fit(np.repeat(X, 2, axis=-1), y).image_shape_ == (3, 12, 24)  # the size is free


def test_a_start_for_pixels_255_times_brighter_or_darker_is_refused(data, encoder):
    X, y = data
    with pytest.raises(ValueError, match="AMIMVEncoder was fitted on uint8"):
        small(SoftmaxClassifier, backbone=encoder).fit(X.astype(float), y)
    small(SoftmaxClassifier, backbone=encoder, max_epochs=1).fit(X / 255, y)
    bright = SSLEncoder(**{**SMALL, "max_epochs": 1}).fit(X.astype(float))
    for params in ({"backbone": bright}, {"pretrain": bright}):
        with pytest.raises(ValueError, match="SSLEncoder was fitted on floats up to"):
            small(SoftmaxClassifier, **params).fit(X, y)


@pytest.mark.parametrize("parameter", ["backbone", "pretrain", "frozen backbone"])
def test_a_fit_from_another_start_does_not_resume(parameter, data, tmp_path):
    X, y = data
    one, two = (AMIMVEncoder(**SMALL).fit(images) for images in (X, X[::-1]))
    if parameter == "frozen backbone":
        parameter, one, two = "backbone", FrozenEstimator(one), FrozenEstimator(two)
    with pytest.raises(RuntimeError, match="power cut"):
        small(
            SoftmaxClassifier,
            **{parameter: one},
            checkpoint_dir=tmp_path,
            callbacks=[CrashAfter(1)],
        ).fit(X, y)
    afresh = small(SoftmaxClassifier, **{parameter: two}, checkpoint_dir=tmp_path).fit(X, y)
    expected = small(SoftmaxClassifier, **{parameter: two}).fit(X, y)
    assert np.array_equal(afresh.predict_proba(X), expected.predict_proba(X))


@pytest.mark.parametrize("which", ["backbone", "pretrain", "pretrain now"])
def test_calibration_of_a_trained_start_does_not_warn(which, data, encoder):
    params = {which.split()[0]: pretrainer() if which == "pretrain now" else encoder}
    LMDClassifier(**{**SMALL, **params}, stages="icc", n_rounds=1).fit(*data)


# ---------------------------------------------------------------- pretrain=


@EACH_NAME
def test_every_name_pre_trains_a_classifier(name, data):
    X, y = data
    pretrain = ENCODERS[name]().set_params(max_epochs=2, batch_size=16)
    clf = SoftmaxClassifier(**SMALL, pretrain=pretrain).fit(X, y)
    assert stages(clf) == [PRETRAINING] * 2 + [""] * 2
    assert all({"feature_std", "knn_score"} <= row.keys() for row in clf.history_[:2])
    assert not any("feature_std" in row for row in clf.history_[2:])
    assert clf.n_iter_ == 4
    plain = SoftmaxClassifier(**SMALL).fit(X, y)
    assert not np.array_equal(clf.predict_proba(X), plain.predict_proba(X))
    assert clf.weights_.keys() == plain.weights_.keys()  # what only pre-training needs is gone


@EACH
def test_every_classifier_pre_trains(Classifier, data):
    X, y = data
    pretrain = AMIMVEncoder(ConvNet(widths=(3,)), max_epochs=2, batch_size=16)
    clf = small(Classifier, pretrain=pretrain, max_epochs=1).fit(X, y)
    assert stages(clf)[:2] == [PRETRAINING] * 2
    assert PRETRAINING not in stages(clf)[2:]
    assert len(stages(clf)) > 2
    assert clf.transform(X).shape == (60, 8)  # its own backbone
    assert clf.predict_proba(X).shape == (60, 3)
    assert not hasattr(pretrain, "net_")
    assert not hasattr(pretrain, "image_shape_")
    loaded = pickle.loads(pickle.dumps(clf))
    assert np.array_equal(loaded.predict_proba(X), clf.predict_proba(X))


def test_pre_training_moves_the_backbone_and_no_head(data):
    states = []

    def look(net):
        states.append({k: v.clone().numpy() for k, v in net.module_.state_dict().items()})

    params = {"pretrain": pretrainer(max_epochs=1), "callbacks": [Starts(look)]}
    SoftmaxClassifier(**SMALL, **params).fit(*data)
    before, after = states
    for name in before:
        assert np.array_equal(before[name], after[name]) == name.startswith("head."), name


def test_a_name_stands_for_the_encoder_with_its_defaults(data, monkeypatch):
    monkeypatch.setattr(AMIMVEncoder, "_auto_steps", 8)
    monkeypatch.setattr(AMIMVEncoder, "_auto_epochs", 2)
    X, y = data
    one = SoftmaxClassifier(**SMALL, pretrain="amimv").fit(X, y)
    two = SoftmaxClassifier(**SMALL, pretrain=AMIMVEncoder()).fit(X, y)
    assert stages(one) == [PRETRAINING] * 8 + [""] * 2  # one step an epoch
    assert np.array_equal(one.predict_proba(X), two.predict_proba(X))


@EACH
def test_an_unknown_name_is_answered_with_the_names(Classifier, data):
    names = ", ".join(sorted(ENCODERS))
    with pytest.raises(ValueError, match=f"pretrain='simlcr' is unknown; the names are {names}"):
        small(Classifier, pretrain="simlcr").fit(*data)
    assert names == "amimv, barlow_twins, byol, moco, simclr, simsiam, vicreg"


def test_wrong_parameters_of_an_encoder_are_refused_before_training(data):
    with pytest.raises(ValueError, match="'momentum' parameter of SSLEncoder"):
        small(SoftmaxClassifier, pretrain=pretrainer(momentum=2)).fit(*data)
    with pytest.raises(ValueError, match=r"thresholds=\(0.9, 0.1\)"):
        small(SoftmaxClassifier, pretrain=AMIMVEncoder(thresholds=(0.9, 0.1))).fit(*data)
    with pytest.raises(ValueError, match="'pretrain' parameter of SoftmaxClassifier"):
        small(SoftmaxClassifier, pretrain=ConvNet()).fit(*data)


def test_resolve_encoder_takes_parameters_and_leaves_the_encoder(encoder):
    resolved = resolve_encoder(encoder)
    assert resolved is not encoder
    assert not hasattr(resolved, "net_")
    assert resolved.projection_dim == 16
    assert resolve_encoder("byol").method == "byol"


@pytest.mark.parametrize("sampler", [RandomOverSampler(), SMOTE(k_neighbors=3)])
def test_pre_training_sees_natural_rows_each_once(sampler, data, seen_rows):
    X, y = data
    SoftmaxClassifier(**SMALL, pretrain=pretrainer(), sampler=sampler).fit(X, y)
    ((images, rows),) = seen_rows
    assert np.array_equal(images.data, X)
    assert rows.tolist() == list(range(60))


@pytest.mark.parametrize("sampler", [None, RandomOverSampler()])
def test_pre_training_does_not_see_the_validation_rows(sampler, data, seen_rows):
    X, y = data
    held = []

    def scoring(estimator, X_held, y_held):
        held.append({image.tobytes() for image in X_held})
        return 0.5

    params = {"early_stopping": True, "scoring": scoring, "sampler": sampler}
    SoftmaxClassifier(**SMALL, pretrain=pretrainer(), **params).fit(X, y)
    ((_, rows),) = seen_rows
    assert len(rows) == 48
    assert len(set(rows.tolist())) == 48
    assert {X[row].tobytes() for row in range(60) if row not in rows} == held[0]


def test_early_stopping_ignores_pre_training(data):
    scores = iter([0.5, 0.9, 0.1, 0.1])
    clf = SoftmaxClassifier(
        **{**SMALL, "max_epochs": 9}, pretrain=pretrainer(max_epochs=4), early_stopping=True,
        n_iter_no_change=2, scoring=lambda *args: next(scores),
    ).fit(*data)  # fmt: skip
    assert stages(clf) == [PRETRAINING] * 4 + [""] * 4
    assert not any("valid_score" in row for row in clf.history_[:4])
    assert [row["valid_score"] for row in clf.history_[4:]] == [0.5, 0.9, 0.1, 0.1]
    assert clf.best_score_ == 0.9


def test_callbacks_that_watch_the_validation_score_wait_for_it(data):
    stopper = EarlyStopping(monitor="valid_score", lower_is_better=False, patience=1)
    clf = SoftmaxClassifier(
        **{**SMALL, "max_epochs": 9}, pretrain=pretrainer(), early_stopping=True,
        scoring=lambda *args: 0.5, callbacks=[stopper],
    ).fit(*data)  # fmt: skip
    assert stages(clf) == [PRETRAINING] * 2 + [""] * 2


def test_a_callback_that_ends_pre_training_does_not_end_the_fit(data):
    stopper = EarlyStopping(monitor="train_loss", patience=1, threshold=10.0)
    clf = SoftmaxClassifier(
        **{**SMALL, "max_epochs": 5}, pretrain=pretrainer(max_epochs=9), callbacks=[stopper]
    ).fit(*data)
    assert stages(clf) == [PRETRAINING] * 2 + [""] * 2


@EACH
def test_a_crash_in_or_after_pre_training_resumes_to_the_same_result(Classifier, data, tmp_path):
    X, y = data
    params = {"pretrain": AMIMVEncoder(max_epochs=2, batch_size=16), "max_epochs": 1}
    whole = small(Classifier, **params).fit(X, y)
    params["checkpoint_dir"] = tmp_path
    # In the stage, and as the next one begins.
    for epoch in (1, 2) if Classifier is LMDClassifier else (1,):
        with pytest.raises(RuntimeError, match="power cut"):
            small(Classifier, **params, callbacks=[CrashAfter(epoch)]).fit(X, y)
        resumed = small(Classifier, **params).fit(X, y)
        assert same_arrays(resumed.weights_, whole.weights_)
        assert np.array_equal(resumed.predict_proba(X), whole.predict_proba(X))
        for row, wanted in zip(resumed.history_, whole.history_, strict=True):
            assert row | {"dur": 0} == wanted | {"dur": 0}
        assert not list(tmp_path.iterdir())


def test_a_warm_start_does_not_pre_train_again(data):
    clf = SoftmaxClassifier(**SMALL, pretrain=pretrainer(), warm_start=True).fit(*data).fit(*data)
    assert stages(clf) == [PRETRAINING] * 2 + [""] * 4
    clf.set_params(warm_start=False).fit(*data)
    assert stages(clf) == [PRETRAINING] * 2 + [""] * 2


def test_epochs_and_augmentation_of_pre_training_are_searchable(data):
    clf = SoftmaxClassifier(**SMALL, pretrain=pretrainer())
    grid = {"pretrain__max_epochs": [1, 3], "pretrain__augment": ["light", "mimv"]}
    search = GridSearchCV(clf, grid, cv=2, error_score="raise").fit(*data)
    n_epochs = search.best_params_["pretrain__max_epochs"]
    assert stages(search.best_estimator_) == [PRETRAINING] * n_epochs + [""] * 2
    assert clf.pretrain.max_epochs == 2


def test_relations_of_lmd_count_its_own_epochs_after_pre_training(data):
    params = {**SMALL, "max_epochs": 3, "relation_start": 0.67, "n_rounds": 2}
    clf = LMDClassifier(**params, pretrain=pretrainer()).fit(*data)
    assert stages(clf) == [PRETRAINING] * 2 + ["stage one"] * 3 + ["stage two"]
    begun = ["train_batch_relation" in row for row in clf.history_]
    assert begun == [False] * 4 + [True, False]
    assert len(clf.stage1_history_) == 3


def copies(data, Classifier, **params):
    """Largest difference of the network and its moving copy at the first step of the main stage."""
    seen = []

    class Look(Callback):
        def on_batch_begin(self, net, **kwargs):
            if net.stage == PRETRAINING or seen:
                return
            loss = net.criterion_
            copy = loss.teacher if hasattr(loss, "teacher") else loss.key_encoder["network"]
            pairs = zip(copy.parameters(), net.module_.parameters(), strict=True)
            seen.append(max((a - b).abs().max().item() for a, b in pairs))

    Classifier(**SMALL, **params, callbacks=[Look()]).fit(*data)
    return seen[0]


@pytest.mark.parametrize(
    ("Classifier", "params"),
    [
        (SPMixClassifier, {"contrast": Contrast(key_momentum=0.999)}),
        (LMDClassifier, {"relation_start": 0, "stages": "rrl"}),
    ],
)
@pytest.mark.parametrize("pretrain", [None, pretrainer()])
def test_key_encoders_and_teachers_begin_as_copies_of_the_network(
    Classifier, params, pretrain, data
):
    assert copies(data, Classifier, **params, pretrain=pretrain) == 0


def test_an_encoder_lends_its_optimiser_and_weight_decay(data):
    seen = []

    def look(net):
        optimiser = net.optimizer_
        seen.append((type(optimiser), optimiser.param_groups[0]["weight_decay"], net.lr))

    sgd = {"optimizer": torch.optim.SGD, "optimizer__momentum": 0.9}
    pretrain = pretrainer(net_params=sgd, weight_decay=0.125, lr=0.25)
    params = {"pretrain": pretrain, "weight_decay": 0.5, "callbacks": [Starts(look)]}
    SoftmaxClassifier(**SMALL, **params).fit(*data)
    assert seen == [(torch.optim.SGD, 0.125, 0.25), (torch.optim.AdamW, 0.5, 2e-3)]


def test_pairs_cannot_be_pre_trained_on_and_the_message_says_so(data):
    X, y = data
    pairs = np.stack([X, X[::-1]], axis=1)
    clf = CSSNClassifier(**SMALL, reference="paired", pretrain=pretrainer())
    with pytest.raises(ValueError, match="paired"):
        clf.fit(pairs, y)


# ---------------------------------------------------------------- in company


def test_features_feed_any_classifier_in_a_pipeline(data):
    X, y = data
    encoder = AMIMVEncoder(**SMALL)
    model = make_pipeline(encoder, StandardScaler(), LogisticRegression(class_weight="balanced"))
    proba = model.fit(X, y).predict_proba(X)
    assert proba.shape == (60, 3)
    alone = clone(encoder).fit(X)
    assert np.array_equal(model[0].transform(X), alone.transform(X))
    names = model[:-1].get_feature_names_out()
    assert names.tolist() == [f"amimvencoder{i}" for i in range(8)]


@pytest.mark.parametrize("which", ["files", "dataset"])
def test_images_on_disk_and_data_sets_pre_train_like_arrays(which, data, tmp_path):
    X, y = data
    lazy = Files(tmp_path, X)
    if which == "dataset":
        lazy = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(y))
    params = {**SMALL, "pretrain": pretrainer()}
    expected = SoftmaxClassifier(**params).fit(X, y)
    assert same_arrays(SoftmaxClassifier(**params).fit(lazy, y).weights_, expected.weights_)


def test_clean_views_are_the_images_and_hard_ones_are_not():
    array = noise_images(12)
    views = Views([(0, Augmentation())], [(0, Augmentation(noise=0.5, noise_probability=1))])
    for branches, targets in ViewBatches(make_batches(array), views):
        originals = torch.from_numpy(array[targets.numpy()])
        assert torch.equal(branches["online"], originals)
        assert not (branches["target"] == originals).flatten(1).all(dim=1).any()
