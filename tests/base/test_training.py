"""The training floor: precision, early stopping, callbacks, checkpoints, threads, persistence."""

from __future__ import annotations

import copy
import io
import os
import pickle
import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from joblib import Parallel, delayed
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import balanced_accuracy_score, log_loss, make_scorer, roc_auc_score
from skorch.callbacks import Callback, EarlyStopping, Freezer

from sklearn_medimb import CSSNClassifier, LMDClassifier, SoftmaxClassifier
from sklearn_medimb._data.rows import validation_split
from sklearn_medimb._machine.runtime import has_native_bf16, resolve_precision
from sklearn_medimb._training.callback_state import WATCHERS
from sklearn_medimb._training.net import SCHEDULES, learning_rate_factor
from sklearn_medimb._training.network import Trunk
from sklearn_medimb.augment import Augmentation
from sklearn_medimb.backbones import ConvNet
from tests.estimators import SUPERVISED
from tests.helpers import CrashAfter, EpochsRun, make_blobs

EACH = pytest.mark.parametrize("Classifier", SUPERVISED.values(), ids=SUPERVISED)
CPU = torch.device("cpu")


class TestPrecision:
    @EACH
    @pytest.mark.parametrize("precision", ["float32", "bf16", "float64"])
    def test_weights_and_backbone_arithmetic(self, Classifier, precision, tiny, blobs):
        clf = Classifier(**tiny, precision=precision).fit(*blobs)
        module = clf.net_.module_
        dtype = torch.float64 if precision == "float64" else torch.float32
        assert {p.dtype for p in module.parameters()} == {dtype}
        inner = []
        module.trunk.backbone.register_forward_hook(lambda m, a, out: inner.append(out.dtype))
        clf.predict(blobs[0])
        assert inner[0] == (torch.bfloat16 if precision == "bf16" else dtype)

    def test_auto_takes_bf16_only_for_images_on_hardware_that_has_it(self):
        expected = torch.bfloat16 if has_native_bf16(CPU) else None
        assert resolve_precision("auto", CPU, 3) == (torch.float32, expected)
        assert resolve_precision("auto", CPU, 1) == (torch.float32, None)

    def test_bf16_predictions_are_close_to_float32(self, tiny, blobs):
        X, y = blobs
        params = {**tiny, "max_epochs": 20, "augment": "none"}
        one = SoftmaxClassifier(**params, precision="float32").fit(X, y)
        two = SoftmaxClassifier(**params, precision="bf16").fit(X, y)
        assert np.abs(one.predict_proba(X) - two.predict_proba(X)).mean() < 0.1


class TestSchedule:
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_course(self, schedule):
        course = np.array([learning_rate_factor(schedule, step, 100) for step in range(120)])
        assert course.max() == pytest.approx(1, abs=1e-3)
        if schedule == "one_cycle":
            assert course[0] == pytest.approx(1 / 25)
            assert 28 <= course.argmax() <= 31
        if schedule != "constant":
            assert course[99] < 1e-3
            assert np.array_equal(course[100:], course[[99] * 20])

    def test_net_follows_it(self, tiny, blobs):
        seen = []

        class Watch(Callback):
            def on_batch_begin(self, net, **kwargs):
                seen.append(net.optimizer_.param_groups[0]["lr"])

        SoftmaxClassifier(**tiny, lr=0.1, callbacks=[Watch()]).fit(*blobs)
        expected = [0.1 * learning_rate_factor("one_cycle", step, 12) for step in range(12)]
        assert seen == pytest.approx(expected)


class TestEarlyStopping:
    @EACH
    def test_keeps_the_best_epoch_and_stops(self, Classifier, tiny, blobs):
        X, y = blobs
        scripted = iter([0.2, 0.5, 0.9, 0.9, 0.4, 0.3, 0.1, 0.1])
        snapshots = []

        def scoring(estimator, X_held, y_held):
            snapshots.append(estimator.weights_)
            return next(scripted)

        one_stage = {"stages": "rrl"} if Classifier is LMDClassifier else {}
        clf = Classifier(
            **{**tiny, **one_stage, "max_epochs": 8},
            early_stopping=True,
            n_iter_no_change=3,
            scoring=scoring,
        ).fit(X, y)
        assert clf.n_iter_ == 6
        assert clf.best_score_ == 0.9
        assert [row["valid_score"] for row in clf.history_] == [0.2, 0.5, 0.9, 0.9, 0.4, 0.3]
        for name, value in clf.weights_.items():  # equal scores: the later epoch
            assert np.array_equal(value, snapshots[3][name]), name

    @EACH
    def test_scores_held_out_rows_only(self, Classifier, tiny, blobs):
        X, y = blobs
        held = []
        clf = Classifier(
            **tiny, early_stopping=True, validation_fraction=0.25,
            scoring=lambda e, X_held, y_held: held.append((X_held, y_held)) or 0.0,
        ).fit(X, y)  # fmt: skip
        assert np.bincount(held[0][1]).tolist() == [9, 4, 2]
        if Classifier is CSSNClassifier:
            rows = {image.tobytes() for image in held[0][0]}
            assert not any(X[i].tobytes() in rows for i in clf.support_indices_)


def always_nan(estimator, X, y, weight):
    return float("nan")


class TestScoringWithoutAClass:
    """The class with one image is never held out."""

    X, y = make_blobs((20, 10, 1))

    def fit(self, tiny, scoring, **params):
        steps = []

        class Count(Callback):
            def on_batch_begin(self, net, **kwargs):
                steps.append(1)

        clf = SoftmaxClassifier(
            **tiny, early_stopping=True, scoring=scoring, callbacks=[Count()], **params
        )
        return clf, steps

    @pytest.mark.parametrize(
        ("scoring", "name"),
        [
            ("roc_auc_ovr", "scoring='roc_auc_ovr'"),
            ("average_precision", "scoring='average_precision'"),
            (
                make_scorer(roc_auc_score, response_method="predict_proba", multi_class="ovr"),
                "make_scorer(roc_auc_score",
            ),
        ],
    )
    def test_scorers_that_need_all_are_refused_before_training(self, scoring, name, tiny):
        clf, steps = self.fit(tiny, scoring)
        match = (
            rf"{re.escape(name)}.* cannot be computed on the 6 validation images, which lack the "
            r"classes 2 \(of 1\): choose another scorer, raise validation_fraction, or give more"
        )
        with pytest.raises(ValueError, match=match):
            clf.fit(self.X, self.y)
        assert not steps

    @pytest.mark.parametrize(
        "scoring",
        [
            "neg_log_loss",
            "neg_brier_score",
            "top_k_accuracy",
            "roc_auc_ovo",
            "roc_auc_ovr_weighted",
        ],
    )
    def test_scorers_are_told_all_classes(self, scoring, tiny):
        clf, _ = self.fit(tiny, scoring)
        assert np.isfinite(clf.fit(self.X, self.y).best_score_)

    def test_the_loss_counts_the_class_that_is_absent(self, tiny):
        seen = []

        class Watched(SoftmaxClassifier):
            def predict_proba(self, X):
                seen.append((X, super().predict_proba(X)))
                return seen[-1][1]

        clf = Watched(**tiny, early_stopping=True, scoring="neg_log_loss").fit(self.X, self.y)
        rows = {image.tobytes(): label for image, label in zip(self.X, self.y, strict=True)}
        losses = [
            log_loss([rows[image.tobytes()] for image in X], proba, labels=[0, 1, 2])
            for X, proba in seen
        ]
        assert clf.best_score_ == pytest.approx(-min(losses))

    def test_other_needs_and_nan_are_told(self, tiny, blobs):
        clf, steps = self.fit(tiny, "f1")
        with pytest.raises(ValueError, match=r"scoring='f1' cannot be .* multiclass"):
            clf.fit(*blobs)
        assert not steps
        clf, _ = self.fit(tiny, partial(always_nan, weight=1))
        with pytest.raises(ValueError, match=r"^scoring=always_nan cannot .*it gave NaN"):
            clf.fit(*blobs)


class TestCallbacks:
    @EACH
    def test_user_callbacks_are_cloned(self, Classifier, tiny, blobs):
        callback = EarlyStopping(monitor="train_loss", patience=1, threshold=10.0)
        before = copy.deepcopy(vars(callback))
        clf = Classifier(**{**tiny, "max_epochs": 9}, callbacks=[callback]).fit(*blobs)
        assert clf.n_iter_ < 9
        assert vars(callback) == before

    def test_keyboard_interrupt_keeps_what_was_learned(self, tiny, blobs):
        # A signal arrives in the training step, not from a callback's own decision.
        clf = SoftmaxClassifier(**{**tiny, "max_epochs": 50})
        interrupt_in_step(clf, epoch=2)
        with pytest.warns(UserWarning, match="interrupted"):
            clf.fit(*blobs)
        assert clf.predict(blobs[0]).shape == (60,)
        assert clf.n_iter_ == 2

    @EACH
    def test_scikit_learn_callbacks_see_every_epoch(self, Classifier, tiny, blobs):
        callback_module = pytest.importorskip("sklearn.callback")
        monitor = callback_module.ScoringMonitor(scoring="balanced_accuracy")
        clf = Classifier(**tiny)
        clf.set_callbacks(monitor)
        clf.fit(*blobs)
        log = monitor.get_logs().data_as_pandas
        n_epochs = 3 + 4 if Classifier is LMDClassifier else 3  # of both stages
        assert len(log) == 1 + n_epochs == 1 + clf.n_iter_  # the fit and its epochs
        assert log["balanced_accuracy"].between(0, 1).all()
        assert log["balanced_accuracy"].iloc[0] == balanced(clf, *blobs)  # of the final model

    def test_diverging_training_says_so(self, tiny, blobs):
        with pytest.raises(ValueError, match="lower lr"):
            SoftmaxClassifier(**tiny, lr=1e30, lr_schedule="constant").fit(*blobs)


def balanced(clf, X, y):
    return balanced_accuracy_score(y, clf.predict(X))


def interrupt_in_step(clf, epoch):
    """Make the given classifier's net receive Ctrl-C inside a step of some epoch."""
    make = clf._make_net

    def make_and_wrap(*args, **kwargs):
        net = make(*args, **kwargs)
        step = net.train_step

        def train_step(batch, **params):
            if len(net.history) == epoch:
                raise KeyboardInterrupt
            return step(batch, **params)

        net.train_step = train_step
        return net

    clf._make_net = make_and_wrap


class TestVerbose:
    @EACH
    def test_progress_bar_shows_loss_score_and_time_left(self, Classifier, tiny, blobs, capsys):
        Classifier(**tiny, verbose=1, early_stopping=True).fit(*blobs)
        err = capsys.readouterr().err
        assert Classifier.__name__ in err
        assert "loss=" in err
        assert "score=" in err
        assert "<" in err  # tqdm's "elapsed<remaining"

    def test_silent_by_default(self, tiny, blobs, capsys):
        SoftmaxClassifier(**tiny).fit(*blobs)
        out = capsys.readouterr()
        assert out.out == out.err == ""


class WatchedStopping(EarlyStopping):
    """It stops as EarlyStopping does."""


class Noting(Callback):
    """Its rate depends on what it has seen: in numbers, a tensor and a list."""

    def __init__(self):
        self.losses = []

    def on_train_begin(self, net, **kwargs):
        self.best, self.total = np.float64(np.inf), torch.zeros(2)

    def on_epoch_end(self, net, **kwargs):
        loss = net.history[-1, "train_loss"]
        self.losses.append(loss)
        self.best, self.total = np.float64(min(self.best, loss)), self.total + loss
        net.optimizer_.param_groups[0]["weight_decay"] = float(self.total.sum()) + sum(self.losses)


class Deciding(Callback):
    """It keeps a set, and says how."""

    def __init__(self):
        self.seen = set()

    def state_dict(self):
        return {"seen": sorted(self.seen)}

    def load_state_dict(self, state):
        self.seen = set(state["seen"])

    def on_epoch_end(self, net, **kwargs):
        self.seen.add(len(net.history))
        net.optimizer_.param_groups[0]["weight_decay"] = 1 / len(self.seen)


class Scaling(Callback):
    """It changes the weights after an epoch."""

    def on_epoch_end(self, net, **kwargs):
        with torch.no_grad():
            net.module_.head.weight *= 0.9


STATEFUL = {
    "patience": lambda: EarlyStopping(monitor="train_loss", patience=3, threshold=0.3),
    "patience, best weights": lambda: WatchedStopping(
        monitor="train_loss", patience=3, threshold=0.3, load_best=True
    ),
    "notes": Noting,
    "a state of its own": Deciding,
    "weights": Scaling,
    "freezer": lambda: Freezer("trunk.*", at=2),
}


class TestCallbacksOfAResumedFit:
    @pytest.mark.parametrize("crash", [2, 3])
    @pytest.mark.parametrize("name", STATEFUL)
    def test_go_on_as_they_would_have(self, name, crash, tiny, blobs, tmp_path):
        X, y = blobs
        params = {**tiny, "max_epochs": 8, "lr": 0.03, "lr_schedule": "constant"}
        whole = SoftmaxClassifier(**params, callbacks=[STATEFUL[name]()]).fit(X, y)
        params["checkpoint_dir"] = tmp_path
        with pytest.raises(RuntimeError, match="power cut"):
            SoftmaxClassifier(**params, callbacks=[STATEFUL[name](), CrashAfter(crash)]).fit(X, y)
        assert len(list(tmp_path.iterdir())) == 1
        ran = EpochsRun()
        resumed = SoftmaxClassifier(**params, callbacks=[STATEFUL[name](), ran])
        resumed.fit(X, y)
        assert resumed.n_iter_ == whole.n_iter_
        assert (whole.n_iter_ < 8) == name.startswith("patience")
        assert np.array_equal(resumed.predict_proba(X), whole.predict_proba(X))
        assert not list(tmp_path.iterdir())

    def test_what_is_no_data_must_stay(self, tiny, blobs, tmp_path):
        class Curriculum(Callback):
            def __init__(self, augmentation):
                self.augmentation = augmentation

            def on_epoch_begin(self, net, **kwargs):
                self.augmentation.rotation += 1.0

        clf = SoftmaxClassifier(**tiny, callbacks=[Curriculum(Augmentation(rotation=1.0))])
        clf.fit(*blobs)
        with pytest.raises(ValueError, match=r"Curriculum\.augmentation .*state_dict.*=None"):
            clf.set_params(checkpoint_dir=tmp_path).fit(*blobs)
        assert not list(tmp_path.iterdir())

    def test_an_open_file_and_what_stays_are_no_matter(self, tiny, blobs, tmp_path):
        class Writes(Callback):
            def __init__(self, path):
                self.path = path

            def on_train_begin(self, net, **kwargs):
                self.file, self.kinds = self.path.open("w"), {"a", "b"}

            def on_epoch_end(self, net, **kwargs):
                self.file.write("epoch\n")

            def on_train_end(self, net, **kwargs):
                self.file.close()

        path = tmp_path / "log.txt"
        SoftmaxClassifier(
            **tiny, checkpoint_dir=tmp_path / "checkpoints", callbacks=[Writes(path)]
        ).fit(*blobs)
        assert path.read_text() == "epoch\n" * 3


class TestCheckpoint:
    @EACH
    @pytest.mark.parametrize("stopping", [False, True])
    def test_resumed_fit_equals_uninterrupted_fit(
        self, Classifier, stopping, tiny, blobs, tmp_path
    ):
        X, y = blobs
        params = {**tiny, "max_epochs": 6, "augment": "strong", "early_stopping": stopping}
        whole = Classifier(**params).fit(X, y)
        with pytest.raises(RuntimeError, match="power cut"):
            Classifier(**params, checkpoint_dir=tmp_path, callbacks=[CrashAfter(4)]).fit(X, y)
        assert len(list(tmp_path.iterdir())) == 1
        epochs = []

        class Count(Callback):
            def on_epoch_end(self, net, **kwargs):
                epochs.append(len(net.history))

        WATCHERS.add(Count)
        resumed = Classifier(**params, checkpoint_dir=tmp_path, callbacks=[Count()]).fit(X, y)
        assert epochs[0] == 5  # four epochs were not repeated
        assert np.array_equal(resumed.predict_proba(X), whole.predict_proba(X))
        assert [r["train_loss"] for r in resumed.history_] == [
            r["train_loss"] for r in whole.history_
        ]
        assert not list(tmp_path.iterdir())

    def test_warm_start_resumes_its_own_epochs(self, tiny, blobs, tmp_path):
        X, y = blobs
        params = {**tiny, "checkpoint_dir": tmp_path, "warm_start": True}
        whole = SoftmaxClassifier(**params).fit(X, y).fit(X, y)
        clf = SoftmaxClassifier(**params).fit(X, y)
        clf.set_params(callbacks=[CrashAfter(5)])
        with pytest.raises(RuntimeError, match="power cut"):
            clf.fit(X, y)
        clf.set_params(callbacks=None).fit(X, y)
        assert clf.n_iter_ == 6
        assert np.array_equal(clf.predict_proba(X), whole.predict_proba(X))

    def test_ctrl_c_keeps_the_checkpoint(self, tiny, blobs, tmp_path):
        clf = SoftmaxClassifier(**tiny, checkpoint_dir=tmp_path)
        interrupt_in_step(clf, epoch=2)
        with pytest.warns(UserWarning, match="interrupted"):
            clf.fit(*blobs)
        assert len(list(tmp_path.iterdir())) == 1

    def test_user_callbacks_see_the_validation_score(self, tiny, blobs):
        stopper = EarlyStopping(monitor="valid_score", lower_is_better=False, patience=1)
        params = {**tiny, "max_epochs": 9, "early_stopping": True, "callbacks": [stopper]}
        clf = SoftmaxClassifier(**params, scoring=lambda *args: 0.5).fit(*blobs)
        assert clf.n_iter_ < 9
        assert clf.best_score_ == 0.5

    def test_unseeded_fit_resumes_its_own_seed(self, tiny, blobs, tmp_path):
        params = {**tiny, "random_state": None, "checkpoint_dir": tmp_path}
        with pytest.raises(RuntimeError, match="power cut"):
            SoftmaxClassifier(**params, callbacks=[CrashAfter(2)]).fit(*blobs)
        (path,) = tmp_path.iterdir()
        content = path.read_bytes().partition(b"\n")[2]
        seed = torch.load(io.BytesIO(content), weights_only=True)["seed"]
        assert SoftmaxClassifier(**params).fit(*blobs).random_seed_ == seed

    def test_other_data_or_parameters_start_afresh(self, tiny, blobs, tmp_path):
        X, y = blobs
        crashing = SoftmaxClassifier(**tiny, checkpoint_dir=tmp_path, callbacks=[CrashAfter(2)])
        with pytest.raises(RuntimeError, match="power cut"):
            crashing.fit(X, y)
        assert SoftmaxClassifier(**tiny, checkpoint_dir=tmp_path).fit(X + 1, y).n_iter_ == 3
        other = {**tiny, "lr": 1e-4}
        assert SoftmaxClassifier(**other, checkpoint_dir=tmp_path).fit(X, y).n_iter_ == 3
        assert len(list(tmp_path.iterdir())) == 1  # the crashed fit can still resume

    def test_no_half_written_file_is_ever_visible(self, tiny, blobs, tmp_path, monkeypatch):
        X, y = blobs
        params = {**tiny, "checkpoint_dir": tmp_path}
        with pytest.raises(RuntimeError, match="power cut"):
            SoftmaxClassifier(**params, callbacks=[CrashAfter(2)]).fit(X, y)
        (path,) = tmp_path.iterdir()
        before = path.read_bytes()

        def full(descriptor):
            raise OSError("disk full")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="disk full"):
            SoftmaxClassifier(**params).fit(X, y)
        assert path.read_bytes() == before


class TestWarmStartAndPartialFit:
    def test_warm_start_goes_on_from_present_weights(self, tiny, blobs):
        X, y = blobs
        clf = SoftmaxClassifier(**tiny, warm_start=True).fit(X, y)
        first = clf.history_[-1]["train_loss"]
        clf.fit(X, y)
        assert clf.n_iter_ == 6
        assert clf.history_[-1]["train_loss"] < first
        cold = SoftmaxClassifier(**tiny).fit(X, y).fit(X, y)
        assert cold.n_iter_ == 3

    def test_partial_fit_trains_one_epoch_a_call(self, tiny):
        X, y = make_blobs((60, 40))
        clf = SoftmaxClassifier(**{**tiny, "augment": "none"})
        for _ in range(10):
            for rows in np.array_split(np.arange(100), 2):
                clf.partial_fit(X[rows], y[rows], classes=[0, 1])
        assert clf.n_iter_ == 20
        assert clf.score(X, y) > 0.9

    def test_partial_fit_draws_new_augmentations_each_time(self, tiny, blobs):
        seen = []

        class Recording(Augmentation):
            def draw(self, n, image_shape, generator):
                params = super().draw(n, image_shape, generator)
                seen.append(next(iter(params.values())).clone())
                return params

        clf = SoftmaxClassifier(**tiny, augment=Recording(rotation=90))
        clf.partial_fit(*blobs).partial_fit(*blobs)
        half = len(seen) // 2
        assert not torch.equal(seen[0], seen[half])

    def test_partial_fit_after_fit_keeps_learning(self, tiny, blobs):
        X, y = blobs
        clf = SoftmaxClassifier(**tiny).fit(X, y)
        before = clf.weights_
        clf.partial_fit(X, y)
        assert clf.net_.optimizer_.param_groups[0]["lr"] == clf.lr
        assert any(not np.array_equal(before[k], v) for k, v in clf.weights_.items())

    def test_portions_obey_what_was_set_between_them(self, tiny, blobs):
        clf = SoftmaxClassifier(**tiny).partial_fit(*blobs)
        before = clf.net_.module_.head.weight.detach().clone()
        clf.set_params(lr=1e-9, weight_decay=0.7).partial_fit(*blobs)
        moved = (clf.net_.module_.head.weight - before).abs().max()
        assert 0 < moved < 1e-6
        assert {group["weight_decay"] for group in clf.net_.optimizer_.param_groups} == {0.7}

    def test_the_prior_is_that_of_all_portions(self, tiny, blobs):
        X, y = blobs
        clf = SoftmaxClassifier(**tiny)
        for label, n in ((0, 4), (1, 3), (0, 6)):
            rows = np.flatnonzero(y == np.unique(y)[label])[:n]
            clf.partial_fit(X[rows], y[rows], classes=np.unique(y))
        wanted = [10, 3, *[1] * (len(clf.classes_) - 2)]
        np.testing.assert_allclose(clf.class_prior_, np.array(wanted) / sum(wanted))
        assert clf.class_counts_[:2].tolist() == [10, 3]

    def test_partial_fit_survives_pickling(self, tiny, blobs):
        X, y = blobs
        clf = pickle.loads(pickle.dumps(SoftmaxClassifier(**tiny).partial_fit(X, y)))
        assert clf.partial_fit(X, y).n_iter_ >= 1


class TestPersistence:
    @EACH
    def test_pickle_holds_arrays_only_and_is_small(self, Classifier, tiny, blobs):
        clf = Classifier(**tiny).fit(*blobs)
        state = clf.__getstate__()
        assert "net_" not in state
        tensors = [k for k, v in state.items() if isinstance(v, (torch.Tensor, torch.nn.Module))]
        assert not tensors
        assert len(pickle.dumps(clf)) < 0.6 * len(pickle.dumps(clf.net_))

    @EACH
    def test_loads_without_the_weights_file_it_started_from(
        self, Classifier, tiny, blobs, tmp_path
    ):
        path = tmp_path / "start.pt"
        torch.save(ConvNet(widths=(8, 16)).build((3, 12, 12)).state_dict(), path)
        params = {**tiny, "backbone": ConvNet(widths=(8, 16), weights=str(path))}
        clf = Classifier(**params).fit(*blobs)
        saved = pickle.dumps(clf)
        path.unlink()
        loaded = pickle.loads(saved)
        assert np.array_equal(loaded.predict_proba(blobs[0]), clf.predict_proba(blobs[0]))

    def test_model_from_an_absent_gpu_loads_on_the_cpu(self, tiny, blobs):
        clf = SoftmaxClassifier(**tiny).fit(*blobs)
        clf.device = "cuda:7"
        with pytest.warns(UserWarning, match="using the CPU"):
            loaded = pickle.loads(pickle.dumps(clf))
        assert np.array_equal(loaded.predict(blobs[0]), clf.predict(blobs[0]))

    @EACH
    def test_weights_carry_everything_that_prediction_needs(self, Classifier, tiny, blobs):
        X, y = blobs
        one = Classifier(**tiny).fit(X, y)
        two = Classifier(**{**tiny, "random_state": 1}).fit(X // 2, y)
        assert not np.array_equal(one.decision_function(X), two.decision_function(X))
        two.weights_ = one.weights_
        assert np.array_equal(one.decision_function(X), two.decision_function(X))

    def test_weights_of_another_network_are_refused(self, tiny, blobs):
        one = SoftmaxClassifier(**tiny).fit(*blobs)
        two = SoftmaxClassifier(**{**tiny, "backbone": "vit"}).fit(*blobs)
        before = two.predict_proba(blobs[0])
        with pytest.raises(ValueError, match="weights_"):
            two.weights_ = one.weights_
        assert np.array_equal(two.predict_proba(blobs[0]), before)

    @EACH
    def test_weights_are_assigned_all_or_none(self, Classifier, tiny, blobs):
        X, y = blobs
        one = Classifier(**tiny).fit(X, y)
        two = Classifier(**{**tiny, "random_state": 1}).fit(X // 2, y)
        before, proba = one.weights_, one.predict_proba(X)
        network = next(name for name in before if name.startswith("trunk") and "weight" in name)
        counter = next((name for name in before if "num_batches" in name), network)
        for name in {network, counter, *one._inference_arrays}:
            own = before[name]
            spoils = {
                "complex": own + 1j,
                "objects": own.astype(object),
                "texts": own.astype(str),
                "longer": np.concatenate([np.atleast_1d(own)] * 2),
                "deeper": own[np.newaxis],
                "of the other kind": own.astype(int if own.dtype.kind == "f" else float),
            }
            if own.dtype.kind == "f":
                spoils["NaN"] = np.full_like(own, np.nan)
                spoils["infinite"] = np.full_like(own, np.inf)
            if name in ("pixel_mean_", "pixel_std_"):
                spoils["seven channels"] = np.ones(7)
            if name == "pixel_std_":
                spoils |= {"zero": 0 * own, "negative": -own}
            if name == "support_codes_":
                spoils |= {"a class too many": own + 1, "a class too few": 0 * own}
            for what, spoilt in spoils.items():
                with pytest.raises(ValueError, match="weights_"):
                    one.weights_ = {**two.weights_, name: spoilt}
                kept = one.weights_
                assert all(np.array_equal(kept[k], v) for k, v in before.items()), (name, what)
        assert np.array_equal(one.predict_proba(X), proba)
        for other in ({}, {network: before[network]}, {**before, "more": np.ones(1)}):
            with pytest.raises(ValueError, match="weights_"):
                one.weights_ = other
        one.weights_ = {k: v.astype(np.float64) if v.dtype.kind == "f" else v
                        for k, v in two.weights_.items()}  # fmt: skip
        assert np.array_equal(one.predict_proba(X), two.predict_proba(X))

    def test_an_assignment_that_is_interrupted_changes_nothing(self, tiny, blobs, monkeypatch):
        X, y = blobs
        one = SoftmaxClassifier(**tiny).fit(X, y)
        two = SoftmaxClassifier(**{**tiny, "random_state": 1}).fit(X // 2, y)
        before, load = one.weights_, one._load
        calls = []

        def interrupted(weights):
            load(weights)
            calls.append(weights)
            if len(calls) == 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(one, "_load", interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.weights_ = two.weights_
        for key, value in one.weights_.items():
            assert np.array_equal(value, before[key]), key

    def test_editing_weights_does_not_edit_the_model(self, tiny, blobs):
        clf = SoftmaxClassifier(**tiny).fit(*blobs)
        before = clf.predict_proba(blobs[0])
        for value in clf.weights_.values():
            value[...] = 0
        assert np.array_equal(clf.predict_proba(blobs[0]), before)


class TestThreads:
    def test_one_thread_in_worker_processes(self, tiny):
        def threads_during_fit():
            torch.set_num_threads(2)
            seen = []

            class Watch(Callback):
                def on_batch_end(self, net, **kwargs):
                    seen.append(torch.get_num_threads())

            X, y = make_blobs()
            SoftmaxClassifier(**tiny, callbacks=[Watch()]).fit(X, y)
            return set(seen), torch.get_num_threads()

        during, after = Parallel(n_jobs=2)(delayed(threads_during_fit)() for _ in range(2))[0]
        assert during == {1}
        assert after == 2

    def test_trunk_probe_restores_training_mode(self):
        trunk = Trunk(torch.nn.Dropout(), (4,), autocast=None).train()
        trunk.probe()
        assert trunk.training


class TestLoop:
    def test_no_number_is_read_from_the_device_inside_an_epoch(self, tiny, blobs, monkeypatch):
        inside, reads = [False], []
        item = torch.Tensor.item

        def spying(self):
            if inside[0]:
                reads.append(1)
            return item(self)

        class Mark(Callback):
            def on_batch_begin(self, net, **kwargs):
                inside[0] = True

            def on_batch_end(self, net, **kwargs):
                inside[0] = False

        monkeypatch.setattr(torch.Tensor, "item", spying)
        for Classifier in (SoftmaxClassifier, CSSNClassifier):
            Classifier(**tiny, callbacks=[Mark()]).fit(*blobs)
        assert not reads

    def test_augmentation_reaches_training_and_not_prediction(self, tiny, blobs):
        X, y = blobs
        plain = SoftmaxClassifier(**tiny, augment="none").fit(X, y)
        strong = SoftmaxClassifier(**tiny, augment="strong").fit(X, y)
        assert not np.allclose(plain.predict_proba(X), strong.predict_proba(X))
        assert np.array_equal(strong.predict_proba(X), strong.predict_proba(X))

    def test_net_params_reach_skorch(self, tiny, blobs):
        clf = SoftmaxClassifier(
            **tiny, net_params={"optimizer": torch.optim.SGD, "optimizer__momentum": 0.9}
        ).fit(*blobs)
        assert isinstance(clf.net_.optimizer_, torch.optim.SGD)
        assert clf.net_.optimizer_.param_groups[0]["momentum"] == 0.9

    def test_vectors_do_not_feel_the_rows_beside_them(self):
        X, y = np.random.default_rng(0).normal(size=(300, 5)), np.arange(300) % 2
        clf = SoftmaxClassifier(max_epochs=2, random_state=0).fit(X, y)
        assert np.array_equal(clf.predict_proba(X)[:7], clf.predict_proba(X[:7]))


BLIND = {"backbone": ConvNet((1,)), "augment": "strong", "random_state": 0}
NOISE = np.random.default_rng(0).integers(0, 255, (30, 12, 12), dtype=np.uint8)
NAMES = np.repeat(["a", "b", "c"], 10)


class TestEnoughSteps:
    """Passes where nobody said how many, and a word where they were not enough."""

    @pytest.mark.parametrize(
        ("n", "epochs"),
        [(64, 300), (640, 40), (1500, 40), (5000, 40), (10_000, 20), (100_000, 10)],
    )
    def test_epochs_of_two_classes(self, n, epochs):
        """300 steps of 64, else 40 passes of up to 5,000 images, else 10."""
        clf = SoftmaxClassifier().set_params(batch_size=64)
        clf.classes_, clf.image_shape_, clf.fine_tune_ = np.arange(2), (1, 8, 8), "full"
        assert clf._n_epochs(n) == epochs

    def test_a_fit_that_does_not_fit_says_so_once(self):
        match = r"not fitted.* 30 of them.*max_epochs=720.*augment=.*trained elsewhere"
        with pytest.warns(ConvergenceWarning, match=match) as told:
            SoftmaxClassifier(**BLIND).fit(NOISE, NAMES)
        assert len(told) == 1
        assert told[0].filename == __file__

    def test_and_others_say_nothing(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            SoftmaxClassifier(**BLIND, max_epochs=1).fit(NOISE, NAMES)  # as was asked for
            stopped = SoftmaxClassifier(**BLIND, early_stopping=True, n_iter_no_change=2)
            assert stopped.fit(NOISE, NAMES).n_iter_ < 300
            X = NOISE.copy()
            X[NAMES == "b"], X[NAMES == "c"] = 100, 200
            seeing = BLIND | {"augment": "none", "backbone": ConvNet((8,))}
            SoftmaxClassifier(**seeing).fit(X, NAMES)

    def test_said_as_an_error_it_leaves_the_fit(self, monkeypatch):
        monkeypatch.setattr(SoftmaxClassifier, "_n_epochs", lambda *args, **kwargs: 1)
        clf = SoftmaxClassifier(**BLIND)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ConvergenceWarning, match="max_epochs=2"):
                clf.fit(NOISE, NAMES)
        assert clf.predict(NOISE).shape == (30,)


@pytest.mark.parametrize("random_state", [0, None])
def test_further_fits_validate_on_rows_that_none_was_trained_on(
    random_state, tiny, blobs, monkeypatch
):
    X, y = blobs
    seen = []

    def split(*args):
        found = validation_split(*args)
        seen.append(found[1].tolist())
        return found

    monkeypatch.setattr("sklearn_medimb.base._classifier.validation_split", split)
    params = {**tiny, "early_stopping": True, "warm_start": True, "random_state": random_state}
    clf = SoftmaxClassifier(**params).fit(X, y)
    clf = pickle.loads(pickle.dumps(clf)).fit(X, y)
    clf.fit(X, y)
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2]
