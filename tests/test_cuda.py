"""Every estimator on a CUDA device: a real one, or on machines without one a simulated one.

So what only a GPU runs is run everywhere: the device and its precision, the estimate of memory and
the queue, the copy of the training images on the device, uploads, generators, and what happens when
memory runs out. What the simulation cannot show is in :mod:`tests.simulated_cuda`.
"""

from __future__ import annotations

import gc
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from joblib import Parallel, delayed

from sklearn_medimb import AMIMVEncoder, CSSNClassifier, SoftmaxClassifier, SSLEncoder
from sklearn_medimb._data.batches import Batches
from sklearn_medimb._machine import gpu_queue
from sklearn_medimb._machine.runtime import resolve_device
from sklearn_medimb._training.callbacks import SaveCheckpoint
from sklearn_medimb._training.network import Trunk
from sklearn_medimb._training.replays import ReplayedSteps
from sklearn_medimb.backbones import ConvNet, ViT
from sklearn_medimb.persistence import load, save
from tests.estimators import DEFAULTS, PUBLIC, TRAINED
from tests.helpers import make_blobs
from tests.simulated_cuda import CudaTensor, SimulatedCuda

REAL = torch.cuda.is_available()
simulated = pytest.mark.skipif(REAL, reason="looks into the simulation")

# What makes a fit short, one row per public estimator; all else is as by default. None is for
# those that have no device: heads and samplers of vectors.
SHORT: dict[str, dict | None] = {
    "AMIMVClassifier": {
        "pretrain": AMIMVEncoder(max_epochs=1),
        "fine_tune": "full",
        "max_epochs": 1,
    },
    "AMIMVEncoder": {"max_epochs": 1},
    "BalancedSoftmax": None,
    "BalancedVirtualFeatures": None,
    "CSSNClassifier": {"max_epochs": 1},
    "ClassifierRetraining": None,
    "LMDClassifier": {"max_epochs": 1, "n_rounds": 2},
    "LearnableWeightScaling": None,
    "LogitAdjustment": None,
    "MetricTwoStageClassifier": {"max_epochs": 1},
    "NearestClassMean": None,
    "PretrainedFeatures": DEFAULTS["PretrainedFeatures"],
    "SPMixClassifier": {"max_epochs": 1},
    "SPMixSampler": {},
    "SSLEncoder": {"max_epochs": 1},
    "SaliencyMap": {},
    "SoftmaxClassifier": {"max_epochs": 1},
    "TauNormalization": None,
    "VirtualFeatureCalibration": None,
}
NETWORKS = [name for name, params in SHORT.items() if params]

pytestmark = [
    pytest.mark.filterwarnings("ignore:The features have all but collapsed"),
    pytest.mark.filterwarnings("ignore:In .* steps the thresholds"),
]


@pytest.fixture
def cuda():
    with nullcontext() if REAL else SimulatedCuda() as device:
        yield device


@pytest.fixture
def reserved(monkeypatch, tmp_path):
    """Bytes that fits reserve of the device."""
    found, reserve = [], gpu_queue.MemoryQueue.reserve

    def spy(queue, n_bytes):
        found.append(n_bytes)
        return reserve(queue, n_bytes)

    monkeypatch.setattr(gpu_queue.MemoryQueue, "reserve", spy)
    monkeypatch.setattr(gpu_queue.tempfile, "gettempdir", lambda: str(tmp_path))
    return found


@pytest.fixture(scope="module")
def images():
    return make_blobs(size=28)


@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def make(name, **params):
    return PUBLIC[name](**{**SHORT[name], "random_state": 0, **params})


def outcome(estimator, X):
    """Class probabilities, or features."""
    return getattr(estimator, "predict_proba", estimator.transform)(X)


def test_every_estimator_has_a_short_configuration():
    missing, stale = set(PUBLIC) - set(SHORT), set(SHORT) - set(PUBLIC)
    assert not missing, f"{sorted(missing)} are public: give each a row in SHORT of this file."
    assert not stale, f"{sorted(stale)} are no longer public: remove their rows from SHORT."
    with_device = {name for name, cls in PUBLIC.items() if "device" in cls().get_params()}
    assert with_device == {name for name, params in SHORT.items() if params is not None}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fit_runs_on_the_device_and_its_model_anywhere(
    name, cuda, reserved, images, monkeypatch, tmp_path
):
    """By default: nothing but the number of epochs is given."""
    X, y = images
    resident, make_resident = [], Batches._resident_copy
    monkeypatch.setattr(
        Batches, "_resident_copy", lambda b: resident.append(make_resident(b)) or resident[-1]
    )
    estimator = make(name).fit(X, y)

    assert estimator.net_.device == "cuda"
    module = estimator.net_.module_
    state = [*module.parameters(), *module.buffers()]
    assert {tensor.device.type for tensor in state} == {"cuda"}
    assert all(copy.device.type == "cuda" and copy.dtype == torch.uint8 for copy in resident)
    assert bool(resident) == (name in TRAINED)
    assert len(reserved) == 1
    if not REAL:
        assert module.trunk.autocast == torch.bfloat16
        assert cuda.most_used <= reserved[0] - gpu_queue.OVERHEAD
    on_device = outcome(estimator, X)
    assert isinstance(on_device, np.ndarray)
    if hasattr(estimator, "partial_fit"):
        pickle.loads(pickle.dumps(estimator)).partial_fit(X, y)
    save(estimator, tmp_path / "model.safetensors")
    np.testing.assert_allclose(
        outcome(load(tmp_path / "model.safetensors"), X), on_device, 0.05, 0.02
    )

    pickled = pickle.dumps(estimator.set_params(device="cpu"))
    save(estimator, tmp_path / "model.safetensors")
    with without(cuda):
        for model in (pickle.loads(pickled), load(tmp_path / "model.safetensors")):
            assert model.net_.device == "cpu"
            assert type(next(model.net_.module_.parameters())) is torch.nn.Parameter
            np.testing.assert_allclose(outcome(model, X), on_device, 0.05, 0.02)


def without(cuda):
    """The machine as it is: without the simulated device."""
    return nullcontext() if REAL else cuda.paused()


@pytest.mark.parametrize("name", [name for name, params in SHORT.items() if params == {}])
def test_stateless_work_on_images_gives_the_same_on_the_device(name, cuda, images):
    X, y = images
    results = []
    for device in ("cuda", "cpu"):
        estimator = PUBLIC[name](device=device)
        if hasattr(estimator, "fit_resample"):
            estimator.set_params(random_state=0)
            results.append(estimator.fit_resample(X, y)[0].astype(float) / 255)
        else:
            results.append(estimator.fit(X).transform(X))
    np.testing.assert_allclose(*results, atol=2e-2)
    if not REAL:
        assert cuda.most_used > 0


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("encoder", ["given", "trained first"])
def test_pretraining_and_fitted_starts(name, encoder, cuda, images):
    X, y = images
    if encoder == "given":
        start = SSLEncoder(max_epochs=1, random_state=0).fit(X)
        estimator = make(name, backbone=pickle.loads(pickle.dumps(start)))
    elif "pretrain" not in PUBLIC[name]().get_params():
        pytest.skip("an encoder has no pretrain=")
    else:
        estimator = make(name, pretrain=SSLEncoder("moco", max_epochs=1))
    assert np.isfinite(outcome(estimator.fit(X, y), X)).all()


@simulated
@pytest.mark.parametrize("name", TRAINED)
def test_no_step_waits_for_the_device(name, cuda, images, monkeypatch):
    """More steps, and no more synchronisations; one for each recording that is proved."""
    X, y = images
    waits = []
    monkeypatch.setattr(ReplayedSteps, "_is_same", lambda *_: True)
    for batch_size in (30, 10):
        params = {"batch_size": batch_size}
        if name == "AMIMVClassifier":
            params["pretrain"] = AMIMVEncoder(max_epochs=1, batch_size=batch_size)
        cuda.waits.clear()
        make(name, **params).fit(X, y)
        waits.append(list(cuda.waits))
    assert len(waits[0]) == len(waits[1]), waits


@pytest.mark.parametrize("shape", ["images", "volumes"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_fit_is_repeated_to_the_bit_by_torchs_switch(name, shape, cuda, deterministic):
    """No estimator needs a kernel of which CUDA has no deterministic one."""
    X, y = make_blobs((12, 6, 4), size=48)
    X = X if shape == "images" else np.stack([X[..., ::3, ::3]] * 16, axis=2)
    backbone = ConvNet(widths=(4, 8))  # more places than CSSN has tokens
    first, second = (make(name, backbone=backbone).fit(X, y).weights_ for _ in range(2))
    assert all(np.array_equal(first[key], second[key]) for key in first)


@simulated
@pytest.mark.parametrize("Classifier", [SoftmaxClassifier, CSSNClassifier])
def test_a_fit_that_runs_out_of_memory_goes_on_in_parts(Classifier, images):
    X, y = images
    # No batch normalisation, whose statistics would be those of the parts.
    backbone = ViT(patch_size=7, width=32, depth=2, n_heads=2, drop_path=0.0)
    params = {"backbone": backbone, "max_epochs": 2, "precision": "float64", "random_state": 0}
    with SimulatedCuda() as plenty:
        plain = Classifier(**params).fit(X, y)
        losses = [row["train_loss"] for row in plain.history_]
        del plain
    with SimulatedCuda(memory=int(0.7 * plenty.most_used)) as scarce:
        with pytest.warns(UserWarning, match="Memory ran out in a training step"):
            frugal = Classifier(**params).fit(X, y)
        assert scarce.most_used <= scarce.memory
        assert frugal.net_.module_.trunk.micro_batch is not None
        assert [row["train_loss"] for row in frugal.history_] == pytest.approx(losses, rel=1e-9)


@simulated
def test_prediction_that_runs_out_of_memory_goes_on_in_smaller_blocks(images):
    X, y = images
    with SimulatedCuda() as plenty:
        clf = SoftmaxClassifier(max_epochs=1, random_state=0, precision="float32").fit(X, y)
        pickled = pickle.dumps(clf)
        gc.collect()
        before = plenty.used
        plenty.most_used = before
        expected = clf.predict_proba(X)
        need = plenty.most_used - before
    with SimulatedCuda() as scarce:
        clf = pickle.loads(pickled)
        scarce.memory = scarce.used + need // 3
        np.testing.assert_allclose(clf.predict_proba(X), expected, atol=1e-6)
        scarce.memory = scarce.used + 100
        with pytest.raises(torch.OutOfMemoryError):
            clf.predict_proba(X)


def test_a_resumed_fit_on_the_device_equals_an_undisturbed_one(cuda, images, tmp_path, monkeypatch):
    X, y = images
    params = {"max_epochs": 3, "random_state": 0}
    plain = SoftmaxClassifier(**params).fit(X, y)
    saved = SaveCheckpoint.on_epoch_end

    def crash(callback, net, **kwargs):
        saved(callback, net, **kwargs)
        raise RuntimeError("power cut")

    clf = SoftmaxClassifier(checkpoint_dir=tmp_path, **params)
    monkeypatch.setattr(SaveCheckpoint, "on_epoch_end", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        clf.fit(X, y)
    monkeypatch.undo()
    resumed = clf.fit(X, y)
    assert len(resumed.history_) == 3
    for name, weight in plain.weights_.items():
        np.testing.assert_allclose(
            resumed.weights_[name], weight, *((1e-3, 1e-4) if REAL else (0, 0))
        )


def test_the_random_state_of_the_device_is_untouched(cuda, images):
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    params = {"backbone": ViT(patch_size=7, width=32, depth=1, n_heads=2, drop_path=0.3)}
    SoftmaxClassifier(max_epochs=1, random_state=0, **params).fit(*images)
    assert torch.equal(torch.cuda.get_rng_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


@simulated
def test_more_processes_than_gpus_are_told(cuda, monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"cuda:1.* 1 CUDA GPUs; start one process on each"):
        resolve_device("auto")


def test_a_fit_whose_need_cannot_be_measured_waits_until_it_is_alone(
    cuda, reserved, images, monkeypatch
):
    """Others have left no room for a single image."""

    def too_full(trunk):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Trunk, "activation_bytes", too_full)
    SoftmaxClassifier(max_epochs=1, random_state=0).fit(*images)
    assert reserved == [gpu_queue.ALL_MEMORY + gpu_queue.OVERHEAD]


# ---------------------------------------------------------------- the simulation itself


@pytest.fixture
def gpu():
    if REAL:
        pytest.skip("looks into the simulation")
    with SimulatedCuda() as device:
        yield device


def test_devices_do_not_mix(gpu):
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    for mix in (
        lambda: there + here,
        lambda: here.mul_(there),
        lambda: torch.cat([there, here]),
        lambda: F.linear(there, here.unsqueeze(0)),
        lambda: here[torch.tensor([1], device="cuda")],
        lambda: F.cross_entropy(there.unsqueeze(0), torch.tensor([1])),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    assert (there + torch.tensor(2.0)).sum().item() == 9
    assert there[torch.tensor([1])].device.type == "cuda"
    assert there.to("cpu").device.type == there.cpu().device.type == "cpu"
    assert here.to(there).device == there.device
    assert torch.tensor([1.0], device="cuda").is_cuda


def test_a_tensor_of_the_device_is_no_array(gpu):
    for convert in (np.asarray, lambda t: t.numpy(), lambda t: t.detach().numpy()):
        with pytest.raises(TypeError, match="can't convert cuda"):
            convert(torch.ones(3, device="cuda"))
    with pytest.raises(RuntimeError, match="pin"):
        torch.ones(3, device="cuda").pin_memory()


def test_waiting_is_seen(gpu):
    there = torch.ones(3, device="cuda")
    there.mul_(2).add_(torch.tensor(1.0))
    torch.ones(3).pin_memory().to("cuda", non_blocking=True)
    assert gpu.waits == []
    for wait in (
        lambda: there.sum().item(),
        lambda: float(there[0]),
        lambda: bool(there.any()),
        lambda: there[there > 0],
        lambda: there.nonzero(),
        lambda: there.cpu(),
        lambda: torch.ones(2).to("cuda"),
        lambda: torch.tensor([1.0], device="cuda"),
        lambda: there.tolist(),
        lambda: there.copy_(torch.ones(3)),
        torch.cuda.synchronize,
    ):
        gpu.waits.clear()
        wait()
        assert gpu.waits


def test_memory_is_counted_and_runs_out(gpu):
    gc.collect()
    before = gpu.used
    large = torch.zeros(1000, device="cuda")
    view = large[:10]
    assert gpu.used - before == 4000
    del large
    assert gpu.used - before == 4000
    del view
    assert gpu.used == before
    gpu.memory = before + 5000
    with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA out of memory"):
        torch.ones(1000, device="cuda") * 2
    gc.collect()
    assert gpu.used == before


def test_noise_comes_from_generators_of_the_device(gpu):
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        torch.rand(3, device="cuda", generator=torch.Generator())
    state = torch.get_rng_state()
    F.dropout(torch.ones(99, device="cuda"))
    assert torch.equal(torch.get_rng_state(), state)
    generator = torch.Generator("cuda").manual_seed(1)
    first = torch.rand(3, device="cuda", generator=generator)
    assert generator.device.type == "cuda"
    assert torch.equal(first, torch.rand(3, device="cuda", generator=generator.manual_seed(1)))


def test_gradients_and_precision_are_those_of_the_device(gpu):
    layer = torch.nn.Linear(3, 2).to("cuda")
    assert isinstance(layer.weight, torch.nn.Parameter)
    with torch.autocast("cuda", torch.bfloat16):
        output = layer(torch.rand(4, 3, device="cuda"))
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert isinstance(layer.weight.grad, CudaTensor)


def test_outside_nothing_is_simulated():
    if not REAL:
        assert not torch.cuda.is_available()
        with SimulatedCuda():
            assert torch.cuda.is_available()
            pickled = pickle.dumps(torch.ones(2, device="cuda"))
        assert not torch.cuda.is_available()
        with pytest.raises(RuntimeError, match="deserialize object on a CUDA device"):
            pickle.loads(pickled)


@simulated
def test_fits_in_threads_use_the_device(blobs):
    X, y = blobs
    params = {"backbone": ConvNet(widths=(4, 8)), "max_epochs": 1, "batch_size": 16}
    with SimulatedCuda():
        fitted = Parallel(n_jobs=2, backend="threading")(
            delayed(SoftmaxClassifier(**params, random_state=seed).fit)(X, y) for seed in (0, 1)
        )
        assert all(clf.net_.device.startswith("cuda") for clf in fitted)
        alone = SoftmaxClassifier(**params, random_state=1).fit(X, y)
        np.testing.assert_allclose(fitted[1].predict_proba(X), alone.predict_proba(X), atol=1e-6)
