"""The seed alone decides, in any thread and process; the caller's generators stay theirs."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import joblib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from imblearn.base import BaseSampler
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from torch import nn
from torch.utils.checkpoint import checkpoint

from sklearn_medimb import SoftmaxClassifier
from sklearn_medimb._machine.randomness import (
    Draws,
    current_draws,
    drawing_from,
    may_draw,
    redirected,
)
from sklearn_medimb._machine.runtime import one_thread_in_workers
from sklearn_medimb._training.network import Trunk
from sklearn_medimb.backbones import MLP, ConvNet, ViT
from sklearn_medimb.base._image_estimator import BaseImageEstimator
from tests.estimators import PUBLIC, TINY, taken
from tests.helpers import make_blobs

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The features have all but collapsed"),
    pytest.mark.filterwarnings("ignore:.* have one (training image|row)"),
]

VIT = {"patch_size": 4, "width": 16, "depth": 2, "n_heads": 2}


class Foreign(nn.Module):
    """A network that knows torch's default generators only, and draws from them in every way."""

    def __init__(self, in_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 8, 3)
        nn.init.orthogonal_(self.conv.weight)
        self.shift = nn.Parameter(torch.randn(8, 1, 1))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.leaky = nn.RReLU()

    def forward(self, images):
        x = F.dropout2d(self.leaky(self.conv(images) + self.shift), 0.3, self.training)
        if self.training:
            x = x * torch.rand_like(x) + 0.1 * torch.randn(8, 1, 1)
        x = self.block(x.flatten(2).transpose(1, 2))
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.1 if self.training else 0.0)


NETWORKS = {
    "convolutions": ConvNet(widths=(8,)),
    "perceptron with dropout": MLP((16,), dropout=0.2),
    "transformer with dropout and drop path": ViT(**VIT, dropout=0.1, drop_path=0.2),
    "torch's dropout": nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout2d(0.2)),
    "class of modules": Foreign,
}


def global_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


@contextmanager
def someone_draws():
    """Another thread of the caller draws from torch and NumPy all the while; numbers it got."""
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    numbers: list = []
    done = threading.Event()

    def draw():
        while not done.is_set():
            numbers.append((torch.rand(1).item(), np.random.random()))  # noqa: NPY002
            time.sleep(1e-3)  # let the fits have the interpreter

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert len(numbers) > 20
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = zip(torch.rand(len(numbers)).tolist(), np.random.random(len(numbers)), strict=True)  # noqa: NPY002
    assert numbers == list(expected)


def small(**params):
    return SoftmaxClassifier(**{"max_epochs": 2, "batch_size": 16, "random_state": 0, **params})


def fitted_weights(_=None, **params):
    return small(**params).fit(*make_blobs()).weights_


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(found[name], value), name


# ---------------------------------------------------------------- threads


@pytest.mark.parametrize("name", NETWORKS)
def test_fits_in_three_threads_equal_the_serial_one(name):
    fit = partial(fitted_weights, backbone=NETWORKS[name])
    before = global_states()
    alone = fit()
    assert global_states() == before
    with someone_draws(), ThreadPoolExecutor(3) as threads:
        fits = list(threads.map(fit, range(9)))
    for weights in fits:
        assert_same(weights, alone)


def prepared(name):
    """An estimator that takes images or, of samplers and heads, what they take."""
    X, y = make_blobs((12, 8, 6))
    params = dict(TINY[name] or {})
    cls = PUBLIC[name]
    if issubclass(cls, BaseImageEstimator):
        params["backbone"] = ViT(**VIT, dropout=0.1, drop_path=0.2)
    known = cls().get_params()
    if "random_state" in known:
        params["random_state"] = 0
    if "dropout" in known:
        params["dropout"] = 0.1
    if TINY[name] is None:
        X = X[:, 0, ::2, ::2].reshape(len(X), -1).astype(float)
    return cls(**params), X, y


def result(estimator, X, y):
    """What an estimator makes of images."""
    if isinstance(estimator, BaseSampler):
        return estimator.fit_resample(X, y)[0]
    fitted = estimator.fit(X, y)
    return answer(fitted, X)


def answer(fitted, X):
    return fitted.predict_proba(X) if hasattr(fitted, "predict_proba") else fitted.transform(X)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_estimator_does_in_threads_what_it_does_alone(name):
    estimator, X, y = prepared(name)
    alone = result(clone(estimator), X, y)
    before = global_states()
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda _: result(clone(estimator), X, y), range(3)))
    assert global_states() == before
    for one in found:
        assert np.array_equal(one, alone)


def test_a_search_in_threads_with_a_search_inside():
    X, y = make_blobs()
    inner = GridSearchCV(
        small(backbone=MLP((8,), dropout=0.3)), {"lr": [1e-3, 1e-2]}, cv=2, n_jobs=2
    )
    before = global_states()
    alone = cross_val_score(inner.set_params(n_jobs=None), X, y, cv=3)
    with joblib.parallel_config("threading"):
        spread = cross_val_score(inner.set_params(n_jobs=2), X, y, cv=3, n_jobs=2)
    assert global_states() == before
    assert np.array_equal(spread, alone)


def test_trials_of_a_study_in_threads():
    optuna = pytest.importorskip("optuna")
    X, y = make_blobs()

    def objective(trial):
        rate = trial.suggest_categorical("rate", [0.1, 0.3])
        clf = small(backbone=MLP((8,), dropout=rate)).fit(X, y)
        return float(clf.predict_proba(X)[0, 0])

    values = []
    for n_jobs in (1, 2):
        study = optuna.create_study(sampler=optuna.samplers.GridSampler({"rate": [0.1, 0.3]}))
        study.optimize(objective, n_trials=2, n_jobs=n_jobs)
        values.append({trial.params["rate"]: trial.value for trial in study.trials})
    assert values[0] == values[1]
    assert len(values[0]) == 2


def test_a_fit_inside_a_fit_leaves_the_outer_one_as_it_was():
    """A sampler that fits a network, while the outer fit is about to draw its weights."""

    class Cleaned(BaseSampler):
        _sampling_type = "clean-sampling"
        inner = False

        def _fit_resample(self, X, y):
            if self.inner:
                fitted_weights(backbone=Foreign)
            return X, y

    class Cleaning(Cleaned):
        inner = True

    kinds = (Cleaned(), Cleaning())
    plain, nested = (fitted_weights(backbone=Foreign, sampler=sampler) for sampler in kinds)
    assert_same(nested, plain)
    assert current_draws() is None


def test_a_failed_fit_leaves_no_draws_behind():
    class Failing(nn.Module):
        def forward(self, images):
            raise RuntimeError("broken")

    with pytest.raises(ValueError, match="broken"):
        fitted_weights(backbone=Failing())
    assert current_draws() is None
    before = torch.get_rng_state()
    torch.rand(1)
    assert not torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- processes


def fork(function):
    """What a function returns in a forked child of a process that has used two threads of torch."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    child = context.Process(target=lambda: theirs.send(function()))
    with two_threads():
        child.start()
    try:
        assert mine.poll(60), "hangs in a forked child"
        return mine.recv()
    finally:
        child.kill()
        child.join()


@contextmanager
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.rand(500, 500) @ torch.rand(500, 500)
    try:
        yield
    finally:
        torch.set_num_threads(before)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


@pytest.fixture
def one_thread():
    """What a fit gives to the bit depends on the number of threads that add its numbers up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@needs_fork
@pytest.mark.filterwarnings("ignore:The features have all but collapsed")
@pytest.mark.filterwarnings("ignore:In .* steps the thresholds")
@pytest.mark.parametrize("name", PUBLIC)
def test_every_estimator_works_in_a_forked_child(name, one_thread):
    estimator, X, y = prepared(name)
    if isinstance(estimator, BaseImageEstimator):
        short = taken(type(estimator), {"max_epochs": 1})
        estimator.set_params(backbone=ConvNet(widths=(64, 128)), **short)
    if not isinstance(estimator, BaseSampler):
        estimator.fit(X, y)
    stored = pickle.dumps(estimator)

    def work():
        found = pickle.loads(stored)
        if isinstance(found, BaseSampler):
            return result(clone(found), X, y)
        if hasattr(found, "weights_"):
            found.weights_ = found.weights_
        return answer(found, X)

    assert np.array_equal(fork(work), work())


@needs_fork
@pytest.mark.filterwarnings("ignore:backbone=Sequential")  # a few steps
def test_networks_are_copied_and_trained_in_a_forked_child(one_thread):
    X, y = make_blobs()
    clf = small(backbone=ConvNet(widths=(64, 256)), max_epochs=1).fit(X, y)

    def work():
        again = clone(clf).set_params(backbone=clf.backbone_)
        return again.fit(X, y).predict_proba(X)

    assert np.array_equal(fork(work), work())


@needs_fork
def test_a_plain_fork_computes_with_one_thread():
    """os.fork leaves no trace that multiprocessing would know of."""
    with two_threads():
        child = os.fork()
        if not child:
            torch.rand(500, 500) @ torch.rand(500, 500)
            os._exit(7 if torch.get_num_threads() == 1 else 1)
        assert torch.get_num_threads() == 2
    deadline = time.monotonic() + 60
    ended = status = 0
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended, "hangs"
    assert os.waitstatus_to_exitcode(status) == 7


def test_a_spawned_process_fits_what_the_parent_does(one_thread):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert_same(pool.apply(fitted_weights), fitted_weights())


@pytest.mark.parametrize("backend", ["loky", "multiprocessing"])
def test_worker_processes_fit_what_the_parent_does(backend, one_thread):
    fit = partial(fitted_weights, backbone=NETWORKS["transformer with dropout and drop path"])
    alone = fit()
    for weights in joblib.Parallel(2, backend=backend)(joblib.delayed(fit)() for _ in range(2)):
        assert_same(weights, alone)


def test_threads_of_a_worker_process_keep_to_one_thread_each():
    def fits_in_two_threads():
        torch.set_num_threads(2)
        both_in, both_out = threading.Barrier(2), threading.Barrier(2)

        def fit(_):
            with one_thread_in_workers():
                both_in.wait(20)
                inside = torch.get_num_threads()
                both_out.wait(20)
            return inside, torch.get_num_threads()

        with ThreadPoolExecutor(2) as threads:
            list(threads.map(lambda _: (time.sleep(0.01), torch.get_num_threads()), range(2)))
            return list(threads.map(fit, range(2))), torch.get_num_threads()

    ((first, second), own) = joblib.Parallel(2)(
        joblib.delayed(fits_in_two_threads)() for _ in range(2)
    )[0]
    assert first == second == (1, 2)
    assert own == 2


# ---------------------------------------------------------------- code from outside


def test_networks_that_cannot_draw_are_trained_without_a_detour():
    own = (ConvNet().build((3, 12, 12)), ViT(dropout=0.1, drop_path=0.1).build((3, 16, 16)))
    torchs = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.0), nn.LSTM(4, 4))
    assert not may_draw(*own, torchs, nn.TransformerEncoderLayer(8, 2, dropout=0.0))
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda module, inputs, output: F.dropout(output))
    drawing = (
        nn.Dropout(0.1), nn.RReLU(), nn.FractionalMaxPool2d(2, output_size=2), Foreign(3), hooked,
        nn.TransformerEncoderLayer(8, 2, dropout=0.1), nn.LSTM(4, 4, 2, dropout=0.1),
        nn.MultiheadAttention(8, 2, dropout=0.1),
    )  # fmt: skip
    assert all(may_draw(nn.Sequential(module)) for module in drawing)


ONES = torch.ones(4, 6)
OPERATIONS = {
    "rand": lambda: torch.rand(3),
    "rand, out": lambda: torch.rand(3, out=torch.empty(3)),
    "randn": lambda: torch.randn(3, dtype=torch.float64),
    "randint": lambda: torch.randint(9, (3,)),
    "randint from": lambda: torch.randint(3, 9, (3,)),
    "randperm": lambda: torch.randperm(9),
    "randperm, out": lambda: torch.randperm(9, out=torch.empty(9, dtype=torch.long)),
    "rand_like": lambda: torch.rand_like(ONES),
    "randn_like": lambda: torch.randn_like(ONES, dtype=torch.float64),
    "randint_like": lambda: torch.randint_like(ONES, 9),
    "randint_like from": lambda: torch.randint_like(ONES, 3, 9),
    "normal of numbers": lambda: torch.normal(0.0, 1.0, (3,)),
    "normal of tensors": lambda: torch.normal(ONES, ONES),
    "bernoulli": lambda: torch.bernoulli(ONES / 2),
    "multinomial": lambda: torch.multinomial(ONES, 2),
    "poisson": lambda: torch.poisson(ONES),
    "binomial": lambda: torch.binomial(9 * ONES, ONES / 2),
    "in place": lambda: [
        getattr(torch.empty(3), name)(*args)
        for name, args in {
            "uniform_": (), "normal_": (), "random_": (9,), "exponential_": (), "cauchy_": (),
            "log_normal_": (), "geometric_": (0.5,), "bernoulli_": (0.5,),
        }.items()
    ],
    "distributions": lambda: torch.distributions.Dirichlet(torch.ones(3)).sample(),
    "gamma": lambda: torch.distributions.Gamma(1.0, 1.0).sample(),
    "dropout": lambda: F.dropout(ONES),
    "fused dropout": lambda: torch.native_dropout(ONES, 0.5, True),
    "alpha_dropout": lambda: F.alpha_dropout(ONES, training=True),
    "rrelu": lambda: F.rrelu(-ONES, training=True),
    "gumbel_softmax": lambda: F.gumbel_softmax(ONES),
    "fractional pooling": lambda: F.fractional_max_pool2d(ONES[None], 2, output_size=2),
    "attention": lambda: F.scaled_dot_product_attention(
        ONES[None], ONES[None], ONES[None], dropout_p=0.5
    ),
    "attention of a layer": lambda: nn.MultiheadAttention(6, 2, dropout=0.5)(
        ONES, ONES, ONES, need_weights=False
    ),
    "recurrent layers": lambda: nn.LSTM(6, 4, 2, dropout=0.5)(ONES),
    "initial weights": lambda: nn.init.trunc_normal_(torch.empty(3)),
    "inference": lambda: torch.inference_mode()(F.dropout)(ONES),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_without_a_generator_take_that_of_the_fit(name):
    def values():
        with drawing_from(Draws(3, torch.device("cpu"))), redirected():
            return flat(OPERATIONS[name]())

    before = torch.get_rng_state()
    first, second = values(), values()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    torch.manual_seed(3)  # on a CPU one seed gives one stream, whoever draws from it
    if name != "fused dropout":
        assert torch.equal(flat(OPERATIONS[name]()), first)
    torch.set_rng_state(before)


def flat(values):
    tensors = [values] if isinstance(values, torch.Tensor) else values
    parts = [flat(t) if not isinstance(t, torch.Tensor) else t for t in tensors if t is not None]
    return torch.cat([part.detach().double().flatten() for part in parts])


def test_fused_dropout_has_the_gradient_of_its_mask():
    x = torch.rand(50, 40, requires_grad=True)
    with drawing_from(Draws(3, torch.device("cpu"))), redirected():
        y, kept = torch.native_dropout(x, 0.25, True)
    assert torch.allclose(y, x * kept / 0.75)
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.03)
    y.sum().backward()
    assert torch.allclose(x.grad, kept / 0.75)


IN_PARTS = "CompositeImplicitAutograd"  # made of operations that are redirected each


def test_every_random_operation_of_torch_can_be_given_a_generator_or_is_refused():
    """A new operation that draws must not slip past."""
    from sklearn_medimb._machine.randomness import _OWN_WAYS, _is_random, _rate, _taking_generator

    # Tagged, but they draw nothing, or are no operations of a forward pass on a tensor.
    others = {"aten::_fill_mem_eff_dropout_mask_", "aten::_nested_tensor_softmax_with_shape"}
    for name in torch._C._dispatch_get_all_op_names():
        space, _, rest = name.partition("::")
        operation, _, overload = rest.partition(".")
        if space != "aten" or name in others:
            continue
        func = getattr(getattr(torch.ops.aten, operation), overload or "default", None)
        if func is None or not _is_random(func):
            continue
        assert (
            _taking_generator(func) is not None
            or func._overloadpacket in _OWN_WAYS
            or torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), IN_PARTS)
            or _rate(func, {"dropout_p": 0.5, "dropout": 0.5}) == 0.5  # refused by this
        ), name


def test_dropout_in_a_kernel_that_takes_no_generator_is_refused():
    q = torch.rand(1, 2, 4, 8)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with drawing_from(Draws(0, torch.device("cpu"))), redirected():
        assert torch.isfinite(fused(q, q, q)[0]).all()
        with pytest.raises(RuntimeError, match=r"_flash_attention_for_cpu.* set the dropout"):
            fused(q, q, q, 0.1)


class Checkpointing(nn.Module):
    """A network that computes its activations twice, by itself."""

    def __init__(self, rate, use_reentrant):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.rate, self.use_reentrant = rate, use_reentrant

    def part(self, x):
        return F.dropout(F.relu(self.conv(x)).square(), self.rate, self.training)

    def forward(self, images):
        if self.use_reentrant:
            images = images.requires_grad_()
        return checkpoint(
            self.part, images, use_reentrant=self.use_reentrant, preserve_rng_state=False
        )


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_second_passes_of_a_foreign_network_must_not_draw_anew(use_reentrant):
    assert fitted_weights(backbone=Checkpointing(0.0, use_reentrant))
    with pytest.raises(RuntimeError, match="switch off its checkpointing of activations"):
        fitted_weights(backbone=Checkpointing(0.2, use_reentrant))


def test_noise_on_gradients_is_drawn_from_the_fit():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, images):
            maps = self.conv(images)
            if maps.requires_grad:
                maps.register_hook(lambda gradient: gradient + 0.1 * torch.randn_like(gradient))
            return maps

    before = global_states()
    assert_same(fitted_weights(backbone=Noisy), fitted_weights(backbone=Noisy))
    assert global_states() == before


@pytest.mark.parametrize("name", ["transformer with dropout and drop path", "torch's dropout"])
def test_the_second_pass_over_a_part_draws_what_the_first_did(name):
    like = NETWORKS[name]
    backbone = (like.build((3, 12, 12)) if isinstance(like, ViT) else like).double()
    images = torch.rand(12, 3, 12, 12, dtype=torch.float64)
    gradients = []
    for in_parts in (False, True):
        trunk = Trunk(backbone, (3, 12, 12), autocast=None).train()
        trunk.micro_batch = 4 if in_parts else None
        backbone.zero_grad()
        with drawing_from(Draws(0, torch.device("cpu"))), redirected(name == "torch's dropout"):
            parts = [images] if in_parts else images.tensor_split(3)
            torch.cat([trunk(part) for part in parts]).square().sum().backward()
            after = torch.rand(1, generator=current_draws().generators["cpu"])
        gradients.append([p.grad.clone() for p in backbone.parameters()] + [after])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_a_step_that_ran_out_of_memory_is_taken_again_with_the_same_draws(monkeypatch):
    X, y = make_blobs()
    seen = []
    backward = torch.Tensor.backward

    def failing(self, *args, **kwargs):
        seen.append(current_draws().get_state()["cpu"])
        if len(seen) == 1:
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        return backward(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", failing)
    with pytest.warns(UserWarning, match="Memory ran out"):
        small(backbone=MLP((64,), dropout=0.2), batch_size=60, augment=None).fit(X, y)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("name", ["transformer with dropout and drop path", "class of modules"])
def test_a_resumed_fit_draws_what_the_undisturbed_one_does(name, tmp_path):
    from skorch.callbacks import Callback

    class Crash(Callback):
        def on_epoch_begin(self, net, **kwargs):
            if len(net.history) == 2:
                raise OSError("power failure")

    X, y = make_blobs()
    clf = small(backbone=NETWORKS[name], checkpoint_dir=tmp_path, max_epochs=3)
    with pytest.raises(OSError, match="power failure"):
        clone(clf).set_params(callbacks=[Crash()]).fit(X, y)
    assert len(list(tmp_path.iterdir())) == 1
    torch.rand(5)
    resumed = clf.fit(X, y)
    assert_same(resumed.weights_, fitted_weights(backbone=NETWORKS[name], max_epochs=3))


def test_data_sets_augmentations_losses_and_optimisers_of_the_caller_draw_from_the_fit():
    class Jittered(torch.utils.data.Dataset):
        def __init__(self, X):
            self.X = X

        def __len__(self):
            return len(self.X)

        def __getitem__(self, i):
            return torch.from_numpy(self.X[i]).float() / 255 + 0.01 * torch.rand(1)

    class Noise:
        def draw(self, n, shape, generator):
            return {"size": torch.rand(n, 1, 1, 1)}

        def apply(self, images, params):
            return images + params["size"] * torch.randn_like(images)

    class Langevin(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            for group in self.param_groups:
                for weight in group["params"]:
                    weight.data += 1e-3 * torch.randn_like(weight)
            return loss

    X, y = make_blobs()
    params = {
        "backbone": ConvNet(widths=(8,)),
        "augment": Noise(),
        "net_params": {"optimizer": Langevin},
    }

    def fit(_=None):
        return small(**params).fit(Jittered(X), y).weights_

    torch.manual_seed(1)
    alone = fit()
    torch.manual_seed(2)
    assert_same(fit(), alone)


def test_a_compiled_network_draws_what_it_draws_otherwise(monkeypatch):
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled(module, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backbone = NETWORKS["transformer with dropout and drop path"]
    before = torch.get_rng_state()
    found = fitted_weights(backbone=backbone, compile=True, precision="float32")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    assert_same(found, fitted_weights(backbone=backbone, precision="float32"))


def test_reading_a_model_draws_nothing_from_the_caller():
    clf = small(backbone=Foreign).fit(*make_blobs())
    stored, before = pickle.dumps(clf), global_states()
    pickle.loads(stored)
    clone(clf)
    clf.transform(make_blobs()[0])
    assert global_states() == before
