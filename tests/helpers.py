"""What several test modules share: images, networks, callbacks and comparisons."""

from __future__ import annotations

import numpy as np
import torch
from skorch.callbacks import Callback
from torch.utils.data import Dataset

from sklearn_medimb._data.batches import Batches, Context, Preprocessor
from sklearn_medimb._data.images import Images
from sklearn_medimb._data.layout import infer_layout
from sklearn_medimb._data.plans import shuffled
from sklearn_medimb._training.callback_state import WATCHERS
from sklearn_medimb._training.network import Trunk
from sklearn_medimb._training.views import ViewBatches
from sklearn_medimb.augment import AUGMENTATIONS
from sklearn_medimb.backbones import ConvNet
from sklearn_medimb.base import _encoder
from sklearn_medimb.base._encoder import EncoderNetwork

CPU = torch.device("cpu")

# Constructor parameters of an estimator that trains in a fraction of a second.
SMALL = {
    "backbone": ConvNet(widths=(4, 8)),
    "batch_size": 16,
    "max_epochs": 2,
    "random_state": 0,
}


def make_blobs(counts=(36, 16, 8), size=12, channels=3, seed=0):
    """Noise images whose class is the corner that holds a bright spot."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    X = rng.integers(0, 90, (len(y), channels, size, size))
    half = size // 2
    for row, label in enumerate(y):
        top, left = (label % 2) * half, (label // 2) * half
        X[row, :, top + 1 : top + half - 1, left + 1 : left + half - 1] += 120
    return X.astype(np.uint8), y


def images_of(array):
    return Images(array, infer_layout(array.shape), array.dtype)


def make_batches(array, *, rows=None, targets=None, plan=None, augment="none", seed=0, n_views=1):
    rows = np.arange(len(array)) if rows is None else rows
    images = images_of(array)
    channels = images.image_shape[0]
    if isinstance(augment, str):
        augment = AUGMENTATIONS[augment]()
    return Batches(
        images,
        rows,
        torch.as_tensor(rows if targets is None else targets),
        plan or (lambda rng: shuffled(len(rows), 4, rng)),
        Context(
            Preprocessor(np.zeros(channels), np.ones(channels), dtype=torch.float32, device=CPU),
            (augment,) * n_views,
            np.random.default_rng(seed),
            torch.Generator().manual_seed(seed),
        ),
    )


def numbered(n=10):
    """Image i holds i everywhere."""
    return np.broadcast_to(np.arange(n, dtype=np.float32)[:, None, None], (n, 8, 8)).copy()


def noise_images(n=10, dtype=np.float32, shape=(3, 8, 8)):
    return np.random.default_rng(0).integers(0, 256, (n, *shape)).astype(dtype)


class CrashAfter(Callback):
    """Raise at the end of an epoch, like a machine that goes down."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_epoch_begin(self, net, **kwargs):
        if len(net.history) == self.epoch + 1:
            raise RuntimeError("power cut")


class EpochsRun(Callback):
    """Which epochs ran in this process."""

    def __init__(self):
        self.epochs = []

    def on_epoch_end(self, net, **kwargs):
        self.epochs.append(len(net.history))


# A fit may end without those that it began with.
WATCHERS.update((CrashAfter, EpochsRun))


class Watch(Callback):
    """A user's callback that hands the net over after each step, or after each epoch."""

    def __init__(self, step=None, epoch=None):
        self.step = step
        self.epoch = epoch

    def on_batch_end(self, net, **kwargs):
        if self.step is not None:
            self.step(net)

    def on_epoch_end(self, net, **kwargs):
        if self.epoch is not None:
            self.epoch(net)


def two_views(shape, seed=0, scale=1.0):
    """Float64 features of a strong and of a weak view."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64)


def same_arrays(one, two):
    return one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)


def snapshot(tensors):
    return [tensor.detach().clone() for tensor in tensors]


def all_equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def backbone_state(estimator):
    return {k: v.numpy() for k, v in estimator.backbone_.state_dict().items()}


def stages(estimator):
    return [row.get("stage", "") for row in estimator.history_]


def small_network(seed=0, channels=1):
    """Float64 backbone with batch normalisation, for 12 x 12 images."""
    torch.manual_seed(seed)
    shape = (channels, 12, 12)
    trunk = Trunk(ConvNet(widths=(4, 8)).build(shape), shape, autocast=None)
    return EncoderNetwork(trunk).double()


class Add:
    """An augmentation that leaves its mark: the images grow by a constant."""

    def __init__(self, value):
        self.value = value

    def draw(self, n, image_shape, generator):
        return {}

    def apply(self, images, params):
        return images + self.value


class Starts(Callback):
    """Hand the net over as each stage begins."""

    def __init__(self, look):
        self.look = look

    def on_train_begin(self, net, **kwargs):
        self.look(net)


class Files:
    """A lazy sequence of images that lie on disk, one file each."""

    def __init__(self, folder, images):
        self.paths = np.array([folder / f"{i}.npy" for i in range(len(images))])
        for path, image in zip(self.paths, images, strict=True):
            np.save(path, image)
        self.shape, self.ndim, self.dtype = images.shape, images.ndim, images.dtype

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, row):
        return np.load(self.paths[row])


class Items(Dataset):
    """A map-style data set whose items are what `form` makes of image and label; counts reads."""

    def __init__(self, images, form=lambda image, label: (image, label)):
        self.images, self.form = images, form
        self.loaded = []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        assert type(row) is int
        self.loaded.append(row)
        return self.form(self.images[row], row % 3)


def spy_on_rows(monkeypatch):
    """Images and training rows of each pre-training to come, as its batches hold them."""
    seen = []

    class Spy(ViewBatches):
        def __init__(self, batches, views):
            seen.append((batches.images, batches.rows))
            super().__init__(batches, views)

    monkeypatch.setattr(_encoder, "ViewBatches", Spy)
    return seen


def values(branch):
    """What images that are constant hold."""
    assert (branch.flatten(1) == branch.flatten(1)[:, :1]).all()
    return branch[:, 0, 0, 0]
