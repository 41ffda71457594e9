"""Making sets long-tailed, and reading archives."""

from __future__ import annotations

import pickle
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sklearn_medimb.datasets import load_npz, make_lesions, make_long_tailed

# ---------------------------------------------------------------- make_long_tailed


def problem(counts, seed=0):
    y = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    return np.arange(len(y))[:, None], y


class Lazy:
    """Images that refuse to be loaded; slices stay lazy."""

    def __init__(self, rows):
        self.rows = np.asarray(rows)
        self.shape, self.ndim, self.dtype = (len(self.rows), 8, 8), 3, np.dtype(np.uint8)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        key = key[0] if isinstance(key, tuple) else key
        if np.ndim(key) == 0:
            raise AssertionError("an image was loaded")
        return Lazy(self.rows[key])


@pytest.mark.parametrize("ratio", [1, 2.0, 10, 50])
@pytest.mark.parametrize("n_classes", [2, 3, 5, 8])
def test_exponential_profile(n_classes, ratio):
    X, y = problem([200] * n_classes)
    _, tail = make_long_tailed(X, y, ratio, random_state=0)
    expected = [200 * ratio ** (-k / (n_classes - 1)) for k in range(n_classes)]
    np.testing.assert_allclose(np.bincount(tail), expected, atol=0.5001)


@pytest.mark.parametrize("ratio", [1, 4, 25])
@pytest.mark.parametrize("n_classes", [2, 4, 5])
def test_step_profile(n_classes, ratio):
    X, y = problem([100] * n_classes)
    _, tail = make_long_tailed(X, y, ratio, "step", random_state=0)
    counts = np.bincount(tail)
    head = [k for k in range(n_classes) if k / (n_classes - 1) < 0.5]
    assert set(counts[head]) == {100}
    assert set(counts[len(head) :]) == {100 / ratio}


def test_the_documented_example():
    from sklearn.datasets import load_digits

    X, y = load_digits(n_class=4, return_X_y=True)
    _, tail = make_long_tailed(X, y, imbalance_ratio=8, random_state=0)
    counts = np.sort(np.bincount(tail))[::-1]
    assert counts[0] / counts[-1] == pytest.approx(8, rel=0.05)


@pytest.mark.parametrize("kind", ["exponential", "step"])
@pytest.mark.parametrize("seed", range(10))
def test_a_subset_without_repeats(kind, seed):
    rng = np.random.default_rng(seed)
    X, y = problem(rng.integers(1, 60, rng.integers(2, 7)), seed)
    got, tail, rows = make_long_tailed(X, y, 7.0, kind, seed, return_indices=True)
    assert np.all(np.diff(rows) > 0)
    np.testing.assert_array_equal(got, X[rows])
    np.testing.assert_array_equal(tail, y[rows])
    assert set(tail) == set(y)


def test_as_large_as_possible():
    """Some class is used up."""
    for counts in ([60, 30, 20], [100, 5, 40], [10, 10, 10]):
        X, y = problem(counts)
        _, tail = make_long_tailed(X, y, 4.0, random_state=0)
        left = np.bincount(y) - np.bincount(tail)
        assert left.min() == 0


@pytest.mark.parametrize("kind", ["exponential", "step"])
def test_n_samples(kind):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        X, y = problem(rng.integers(5, 60, rng.integers(2, 7)), seed)
        ratio = rng.uniform(1, 8)
        most = len(make_long_tailed(X, y, ratio, kind, 0)[1])
        for n in (most // 2, most - 1, most):
            if n < len(set(y)):
                continue
            _, tail = make_long_tailed(X, y, ratio, kind, 0, n_samples=n)
            assert len(tail) == n
            assert set(tail) == set(y)


def test_class_order():
    X, y = problem([50, 50, 50])
    _, tail = make_long_tailed(X, y, 5, random_state=0, class_order=[2, 0, 1])
    counts = np.bincount(tail)
    assert counts[2] > counts[0] > counts[1]
    assert counts[2] == 5 * counts[1]


def test_frequent_classes_stay_the_head():
    X, y = problem([30, 90, 60])
    counts = np.bincount(make_long_tailed(X, y, 5, random_state=0)[1])
    assert counts[1] > counts[2] > counts[0]


def test_random_state():
    X, y = problem([50, 50, 50])
    one, two, other = (make_long_tailed(X, y, 5, random_state=s)[0] for s in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


def test_containers_keep_their_type():
    X, y = problem([40, 40])
    _, _, rows = make_long_tailed(X, y, 5, random_state=0, return_indices=True)
    frame, series = pd.DataFrame(X, columns=["a"]), pd.Series(np.array(["n", "t"])[y])
    got, tail = make_long_tailed(frame, series, 5, random_state=0)
    assert isinstance(got, pd.DataFrame)
    assert isinstance(tail, pd.Series)
    np.testing.assert_array_equal(got["a"], rows)
    np.testing.assert_array_equal(tail.index, rows)
    listed, labels = make_long_tailed(X.tolist(), y.tolist(), 5, random_state=0)
    assert listed == X[rows].tolist()
    assert labels == y[rows].tolist()


def test_lazy_images_are_not_loaded():
    X, y = problem([40, 40])
    got, _, rows = make_long_tailed(Lazy(X[:, 0]), y, 5, random_state=0, return_indices=True)
    assert isinstance(got, Lazy)
    np.testing.assert_array_equal(got.rows, rows)


# ---------------------------------------------------------------- load_npz


def images(n, shape=(8, 8), dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape)).astype(dtype)


def medmnist(path, shape=(8, 8), **more):
    """An archive as MedMNIST stores them: labels (n, 1)."""
    arrays = {}
    for i, (name, n) in enumerate({"train": 9, "val": 4, "test": 6}.items()):
        arrays[f"{name}_images"] = images(n, shape, seed=i)
        arrays[f"{name}_labels"] = (np.arange(n) % 3)[:, None].astype(np.uint8)
    arrays.update(more)
    np.savez(path, **arrays)
    return arrays


def test_all_splits(tmp_path):
    stored = medmnist(tmp_path / "a.npz")
    data = load_npz(tmp_path / "a.npz")
    names = ("train", "val", "test")
    np.testing.assert_array_equal(
        data.images, np.concatenate([stored[f"{name}_images"] for name in names])
    )
    np.testing.assert_array_equal(
        data.target, np.concatenate([stored[f"{name}_labels"][:, 0] for name in names])
    )
    assert data.images.dtype == np.uint8
    assert data.target.dtype == np.int64
    assert data.target.ndim == 1
    assert data.split.tolist() == ["train"] * 9 + ["val"] * 4 + ["test"] * 6
    assert data.target_names.tolist() == ["0", "1", "2"]
    assert data.groups is None


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_one_split(tmp_path, split):
    stored = medmnist(tmp_path / "a.npz")
    data = load_npz(str(tmp_path / "a.npz"), split)
    np.testing.assert_array_equal(data.images, stored[f"{split}_images"])
    np.testing.assert_array_equal(data.target, stored[f"{split}_labels"][:, 0])
    assert set(data.split) == {split}
    assert len(data.split) == len(data.target)


def test_some_splits(tmp_path):
    np.savez(tmp_path / "a.npz", val_images=images(4), val_labels=[0, 1, 1, 0])
    assert load_npz(tmp_path / "a.npz").split.tolist() == ["val"] * 4
    with pytest.raises(ValueError, match=r"split='train'.*\['val_images', 'val_labels'\]"):
        load_npz(tmp_path / "a.npz", "train")


def test_no_splits(tmp_path):
    X = images(4, (8, 8, 3), np.float32)
    np.savez(
        tmp_path / "a.npz",
        images=X,
        labels=[1, 0, 1, 1],
        class_names=["benign", "malignant"],
        groups=["p1", "p1", "p2", "p3"],
    )
    data = load_npz(tmp_path / "a.npz")
    np.testing.assert_array_equal(data.images, X)
    assert data.images.dtype == np.float32
    assert data.target_names[data.target].tolist() == ["malignant", "benign"] + ["malignant"] * 2
    assert data.groups.tolist() == ["p1", "p1", "p2", "p3"]
    assert data.split is None
    with pytest.raises(ValueError, match='has no splits: use split="all"'):
        load_npz(tmp_path / "a.npz", "train")


def test_groups_of_splits(tmp_path):
    groups = {f"{name}_groups": np.arange(n) for name, n in (("train", 9), ("val", 4), ("test", 6))}
    medmnist(tmp_path / "a.npz", **groups)
    expected = np.concatenate([np.arange(9), np.arange(4), np.arange(6)])
    np.testing.assert_array_equal(load_npz(tmp_path / "a.npz").groups, expected)
    np.testing.assert_array_equal(load_npz(tmp_path / "a.npz", "val").groups, np.arange(4))


def averaged(X, size, colour):
    """Mean over the area of each new pixel, one by one; areas of uneven sizes share a border."""
    sides = X.shape[1:-1] if colour else X.shape[1:]
    out = np.empty((len(X), *[size] * len(sides), *X.shape[1 + len(sides) :]))
    for place in np.ndindex(*[size] * len(sides)):
        area = tuple(
            slice(i * side // size, -(-(i + 1) * side // size))
            for i, side in zip(place, sides, strict=True)
        )
        axes = tuple(range(1, 1 + len(sides)))
        out[(slice(None), *place)] = X[(slice(None), *area)].astype(float).mean(axis=axes)
    return out


def save_splits(path, train, test, **more):
    np.savez(
        path / "a.npz",
        train_images=train,
        train_labels=np.arange(len(train)) % 2,
        test_images=test,
        test_labels=np.arange(len(test)) % 2,
        **more,
    )
    return path / "a.npz"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_splits_of_two_dtypes_come_on_one_scale(tmp_path, dtype):
    whole = np.random.default_rng(0).integers(0, 256, (7, 5, 5), dtype=np.uint8)
    path = save_splits(tmp_path, whole[:4], (whole[4:] / 255).astype(dtype))
    images = load_npz(path).images
    assert images.dtype == dtype
    np.testing.assert_array_equal(images, (whole / 255).astype(dtype))
    assert load_npz(path, "train").images.dtype == np.uint8


@pytest.mark.parametrize(
    ("scale", "dtypes"),
    [
        (255, (np.uint8, np.float32)),
        (255, (np.uint8, np.int64)),
        (255, (np.uint8, np.uint16)),
        (1 / 255, (np.float32, np.float32)),
        (1 / 255, (np.float64, np.float32)),
        (257, (np.int64, np.uint16)),
        (257, (np.uint16, np.uint16)),
    ],
)
def test_splits_of_two_scales_are_refused(tmp_path, scale, dtypes):
    whole = np.random.default_rng(0).integers(1, 256, (7, 5, 5))
    train, test = whole[:4].astype(dtypes[0]), (whole[4:] * scale).astype(dtypes[1])
    path = save_splits(tmp_path, train, test)
    with pytest.raises(ValueError, match=r"train_images of .* test_images of .* one split"):
        load_npz(path)
    assert len(load_npz(path, "test").images) == 3


def test_a_bright_pixel_or_a_blank_split_is_no_other_scale(tmp_path):
    images = np.random.default_rng(0).random((7, 8, 8))
    images[0, 0, 0] = 100
    assert load_npz(save_splits(tmp_path, images[:4], images[4:])).images.shape == (7, 8, 8)
    images[4:] = 0
    assert load_npz(save_splits(tmp_path, images[:4], images[4:])).images.shape == (7, 8, 8)


def test_groups_of_some_splits_only(tmp_path):
    whole = np.zeros((7, 5, 5), dtype=np.uint8)
    path = save_splits(tmp_path, whole[:4], whole[4:], train_groups=np.arange(4))
    with pytest.raises(ValueError, match=r"'train_groups'.*not .'test_groups'.*one split"):
        load_npz(path)
    np.testing.assert_array_equal(load_npz(path, "train").groups, np.arange(4))
    assert load_npz(path, "test").groups is None


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
@pytest.mark.parametrize("size", [1, 3, 4, 8])
@pytest.mark.parametrize(
    "shape", [(8, 8), (8, 12), (8, 8, 3), (9, 8, 1), (8, 8, 8), (8, 9, 10, 3)], ids=str
)
def test_image_size_averages_areas(tmp_path, shape, size, dtype):
    X = images(3, shape, dtype)
    np.savez(tmp_path / "a.npz", images=X, labels=[0, 1, 0])
    got = load_npz(tmp_path / "a.npz", image_size=size).images
    colour = shape[-1] in (1, 3)
    expected = averaged(X, size, colour)
    assert got.shape == expected.shape
    assert got.dtype == dtype
    tolerance = 0.5001 if np.dtype(dtype).kind in "ui" else 1e-3
    assert np.abs(got - expected).max() <= tolerance


def test_more_images_than_a_block(tmp_path):
    X = images(300)
    np.savez(tmp_path / "a.npz", images=X, labels=np.arange(300) % 2)
    got = load_npz(tmp_path / "a.npz", image_size=4).images
    assert np.abs(got - averaged(X, 4, colour=False)).max() <= 0.5001


def test_image_size_beyond_the_images(tmp_path):
    medmnist(tmp_path / "a.npz", shape=(8, 12))
    with pytest.raises(ValueError, match=r"image_size=9 exceeds.*\(8, 12\)"):
        load_npz(tmp_path / "a.npz", image_size=9)


WRONG = {
    "no images": ({"labels": [0, 1]}, r"neither images and labels.*\['labels'\]"),
    "no labels": ({"train_images": images(2)}, "images without labels"),
    "no labels in one split": (
        {"train_images": images(2), "train_labels": [0, 1], "val_images": images(2)},
        "images without labels",
    ),
    "several labels": (
        {"images": images(2), "labels": np.eye(2, dtype=int)},
        "has 2 labels per image",
    ),
    "fewer labels": ({"images": images(3), "labels": [0, 1]}, r"labels|\b3\b.*\b2\b"),
    "fewer groups": (
        {"images": images(3), "labels": [0, 1, 0], "groups": [1, 2]},
        "groups",
    ),
    "fewer names": (
        {"images": images(3), "labels": [0, 1, 2], "class_names": ["a"]},
        "class_names",
    ),
    "fractional labels": ({"images": images(3), "labels": [0.5, 1.0, 2.0]}, "labels"),
    "negative labels": ({"images": images(3), "labels": [0, 1, -1]}, "labels"),
    "labels of text": ({"images": images(3), "labels": ["a", "b", "a"]}, "labels"),
    "empty": ({"images": images(0), "labels": np.zeros((0, 1), int)}, r"a\.npz.*(no|0) images"),
    "splits of other sizes": (
        {
            "train_images": images(2),
            "train_labels": [0, 1],
            "val_images": images(2, (6, 6)),
            "val_labels": [0, 1],
        },
        "train.*val|images",
    ),
    "objects": (
        {"images": np.array([{}] * 3, dtype=object), "labels": [0, 1, 0]},
        "no .npz archive of plain arrays",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_archive(tmp_path, case):
    arrays, match = WRONG[case]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=match):
        load_npz(tmp_path / "a.npz")


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("how", ["in an array", "as the file"])
def test_nothing_is_executed(tmp_path, how):
    bomb, path = Bomb(tmp_path / "executed"), tmp_path / "a.npz"
    if how == "as the file":
        path.write_bytes(pickle.dumps(bomb))
    else:
        np.savez(path, images=images(1), labels=np.array([bomb], dtype=object))
    with pytest.raises(ValueError, match=r"no \.npz archive of plain arrays"):
        load_npz(path)
    assert not (tmp_path / "executed").exists()


DAMAGE = {
    "empty": lambda data: b"",
    "text": lambda data: b"hello world",
    "head only": lambda data: data[:10],
    "half": lambda data: data[: len(data) // 2],
    "tail missing": lambda data: data[:-10],
    "signature": lambda data: b"\x55" * 8 + data[8:],
    "start of the data": lambda data: data[:60] + b"\x55" * 8 + data[68:],
    "middle of the data": lambda data: data[:400] + b"\x55" * 8 + data[408:],
    "directory": lambda data: data[:-30] + b"\x55" * 8 + data[-22:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_archive(tmp_path, damage):
    """Refused, and the file is closed: it can be replaced at once."""
    path = tmp_path / "a.npz"
    np.savez_compressed(path, images=images(30), labels=np.arange(30) % 2)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(ValueError, match=r"path='.*a.npz' is no .npz archive"):
        load_npz(path)


def member(shape, dtype="|u1", data=b"", version=1):
    """A .npy file whose header says anything."""
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(header)) + header + data


HEADERS = {
    "negative": member((-3, 4, 4), data=bytes(48)),
    "two negative": member((-3, -4, 4), data=bytes(48)),
    "larger": member((10**6, 4, 4), data=bytes(48)),
    "absurd": member((10**30, 4, 4), data=bytes(48)),
    "of no bytes": member((10**18, 0, 4)),
    "smaller": member((2, 4, 4), data=bytes(48)),
    "no shape": member("'ab'"),
    "objects": member((3,), "|O", bytes(24)),
    "structure": member((3, 4, 4), [("a", "|u1")], bytes(48)),
    "another version": member((3, 4, 4), data=bytes(48), version=9),
    "no array": b"text",
    "a number": member((), data=b"1"),
    "texts": member((3, 4, 4), "<U1", bytes(192)),
    "complex numbers": member((3, 4, 4), "<c8", bytes(384)),
}


@pytest.mark.parametrize("name", ["images", "labels"])
@pytest.mark.parametrize("header", HEADERS)
def test_headers_that_are_wrong(tmp_path, header, name):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for other, data in (
            ("images", member((3, 4, 4), data=bytes(48))),
            ("labels", member((3,), data=b"\0\1\0")),
        ):
            archive.writestr(f"{other}.npy", HEADERS[header] if other == name else data)
    with pytest.raises(ValueError, match=r"a\.npz"):
        load_npz(tmp_path / "a.npz")


BOMB = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from sklearn_medimb.datasets import load_npz
Path("/proc/self/clear_refs").write_text("5")
def memory(name):
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if name in x]
    return int(line.split()[1]) / 1024
before = memory("VmRSS")
for path in sys.argv[2:]:
    try:
        print(len(load_npz(path).images))
    except ValueError as error:
        print(error)
print(memory("VmHWM") - before)
"""


def test_a_bomb_does_not_fill_the_memory(tmp_path):
    """Neither in a member that is not needed, nor in one that is."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process is measured on Linux")
    n = 2**20
    good = {"train_images": member((3, 4, 4), data=bytes(48)),
            "train_labels": member((3,), data=b"\0\1\0")}  # fmt: skip
    for name in ("other", "test_images", "train_images"):
        with zipfile.ZipFile(
            tmp_path / name, "w", zipfile.ZIP_DEFLATED, compresslevel=1
        ) as archive:
            for other, data in good.items():
                if other != name:
                    archive.writestr(f"{other}.npy", data)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                file.write(member((300, 1024, 1024)))
                for _ in range(300):
                    file.write(bytes(n))
    command = [sys.executable, "-c", BOMB, str(Path(__file__).parents[2])]
    paths = [str(tmp_path / name) for name in ("other", "train_images")]
    done = subprocess.run([*command, *paths], check=True, capture_output=True, text=True).stdout
    first, second, growth = done.splitlines()
    assert first == "3"
    assert re.search(
        r"train_images cannot be read \(its \d+ bytes would become 314572800\)", second
    )
    assert float(growth) < 256
    assert len(load_npz(tmp_path / "test_images", "train").images) == 3


@pytest.mark.parametrize(
    ("shape", "size"), [((6, 16), 4), ((6, 16, 3), 4), ((6, 2, 2, 2, 2, 2), 2), ((6, 0, 4), 1)]
)
def test_what_has_no_sides_is_not_reduced(tmp_path, shape, size):
    np.savez(tmp_path / "a.npz", images=np.zeros(shape, np.uint8), labels=np.arange(6) % 2)
    if shape == (6, 16, 3):  # gray images, 16 by 3
        size = 9
    with pytest.raises(ValueError, match="image_size"):
        load_npz(tmp_path / "a.npz", image_size=size)
    if len(shape) == 2:
        assert load_npz(tmp_path / "a.npz").images.shape == shape


@pytest.mark.parametrize("dtype", [">u2", ">f4", "<u2", "?", "<i8"])
def test_numbers_of_every_kind_are_reduced(tmp_path, dtype):
    given = np.arange(6 * 16).reshape(6, 4, 4).astype(dtype)
    np.savez(tmp_path / "a.npz", images=given, labels=np.arange(6) % 2)
    got = load_npz(tmp_path / "a.npz", image_size=2).images
    expected = given.astype(float).reshape(6, 2, 2, 2, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(got, np.rint(expected) if given.dtype.kind in "ui" else expected)


def test_labels_beyond_all_classes(tmp_path):
    np.savez(tmp_path / "a.npz", images=images(3), labels=[0, 1, 10**12])
    with pytest.raises(ValueError, match="labels up to 1000000000000"):
        load_npz(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"image_size": True}, "image_size=True"),
        ({"n_samples": True}, "n_samples=True"),
        ({"n_samples": [True, 4]}, "n_samples=True"),
        ({"n_samples": [2.5, 4]}, "n_samples=2.5"),
        ({"n_samples": 8.0}, "n_samples=8.0"),
        ({"n_samples": "8"}, "n_samples='8'"),
        ({"n_classes": True}, "n_classes=True"),
        ({"n_classes": 2.5}, "n_classes=2.5"),
        ({"images_per_patient": True}, "images_per_patient=True"),
        ({"difficulty": True}, "difficulty=True"),
        ({"spatial_dims": 2.0}, "spatial_dims=2.0"),
    ],
)
def test_numbers_of_lesions_that_are_none(params, name):
    with pytest.raises(ValueError, match=name):
        make_lesions(**{"n_samples": 10, "image_size": 8, **params})


@pytest.mark.parametrize("ratio", [True, "4", None, [2]])
def test_an_imbalance_ratio_that_is_no_number(ratio):
    with pytest.raises(ValueError, match="imbalance_ratio="):
        make_long_tailed(*problem([40, 40]), ratio)


def test_a_number_of_samples_that_is_none():
    with pytest.raises(ValueError, match="n_samples=True"):
        make_long_tailed(*problem([40, 40]), n_samples=True)


@pytest.mark.parametrize("size", [True, np.True_])
def test_an_image_size_that_is_no_number(tmp_path, size):
    np.savez(tmp_path / "a.npz", images=images(3), labels=[0, 1, 0])
    with pytest.raises(ValueError, match=r"image_size=.*True"):
        load_npz(tmp_path / "a.npz", image_size=size)


def test_single_array(tmp_path):
    np.save(tmp_path / "a.npy", images(3))
    with pytest.raises(ValueError, match=r"no \.npz archive"):
        load_npz(tmp_path / "a.npy")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.npz"):
        load_npz(tmp_path / "missing.npz")


# ---------------------------------------------------------------- make_lesions


def test_lesions_have_the_wanted_counts_shapes_and_names():
    data = make_lesions([7, 4, 2], image_size=20, random_state=0)
    assert data.images.shape == (13, 20, 20, 3)
    assert data.images.dtype == np.uint8
    np.testing.assert_array_equal(np.bincount(data.target), [7, 4, 2])
    assert data.target_names == ["round", "oval", "three-lobed"]
    assert data.masks.shape == (13, 20, 20)
    even = make_lesions(17, n_classes=8, image_size=8, random_state=0)
    assert sorted(np.bincount(even.target)) == [2] * 7 + [3]
    volumes = make_lesions(5, image_size=12, spatial_dims=3, random_state=0)
    assert volumes.images.shape == volumes.masks.shape == (5, 12, 12, 12)


def test_lesions_are_seeded_and_leave_the_global_generator():
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    one, two, other = (make_lesions(9, image_size=16, random_state=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.images, two.images)
    np.testing.assert_array_equal(one.groups, two.groups)
    assert not np.array_equal(one.images, other.images)
    np.testing.assert_array_equal(state, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_lesions_are_darker_and_nodules_brighter_than_their_surround(spatial_dims):
    size = 48 if spatial_dims == 2 else 20
    data = make_lesions(
        20, image_size=size, spatial_dims=spatial_dims, difficulty=0, random_state=0
    )
    gray = data.images.mean(axis=-1) if spatial_dims == 2 else data.images.astype(float)
    middle = np.zeros(data.masks.shape[1:], bool)
    middle[(slice(size // 5, -size // 5),) * spatial_dims] = True
    for image, mask in zip(gray, data.masks, strict=True):
        assert 0.01 < mask.mean() < 0.5
        contrast = image[mask].mean() - image[middle & ~mask].mean()
        assert contrast < -15 if spatial_dims == 2 else contrast > 15


def test_lesions_of_a_class_have_its_border_and_spots():
    data = make_lesions([60] * 5, image_size=48, difficulty=0, random_state=0)

    def eccentricity(mask):
        rows = np.argwhere(mask)
        values = np.linalg.eigvalsh(np.cov(rows.T))
        return values[1] / values[0]

    def texture(image, mask):
        return image.mean(axis=-1)[mask].std()

    elongated = np.array([eccentricity(mask) for mask in data.masks])
    rough = np.array([texture(*pair) for pair in zip(data.images, data.masks, strict=True)])
    by_class = [np.median(elongated[data.target == k]) for k in range(5)]
    assert by_class[1] > max(by_class[k] for k in (0, 2, 3, 4)) + 0.2
    rough = [np.median(rough[data.target == k]) for k in range(5)]
    assert rough[4] > 1.4 * max(rough[:4])


def test_images_of_a_patient_share_class_skin_and_nearly_the_lesion():
    data = make_lesions([22, 9], image_size=24, images_per_patient=4, random_state=0)
    patients, sizes = np.unique(data.groups, return_counts=True)
    assert sorted(sizes) == [1, 2, 4, 4, 4, 4, 4, 4, 4]
    overlap_within, overlap_between = [], []
    for patient in patients:
        rows = np.flatnonzero(data.groups == patient)
        assert len(set(data.target[rows])) == len(set(data.skin[rows])) == 1
        for other in range(len(data.target)):
            if other == rows[0]:
                continue
            a, b = data.masks[rows[0]], data.masks[other]
            iou = (a & b).sum() / (a | b).sum()
            (overlap_within if other in rows else overlap_between).append(iou)
    assert np.mean(overlap_within) > np.mean(overlap_between) + 0.2
    alone = make_lesions(10, image_size=8, random_state=0)
    assert len(set(alone.groups)) == 10


def test_skin_ranges_are_kept():
    data = make_lesions(
        [40, 40], image_size=16, skin_range=[(0, 0.2), (0.8, 1)], difficulty=0, random_state=0
    )
    assert data.skin[data.target == 0].max() <= 0.2
    assert data.skin[data.target == 1].min() >= 0.8
    light, dark = (data.images[data.target == k].mean() for k in (0, 1))
    assert light > dark + 30


def test_difficulty_hides_the_lesions():
    contrasts = []
    for difficulty in (0, 1):
        data = make_lesions(60, image_size=32, difficulty=difficulty, random_state=0)
        gray = data.images.mean(axis=-1)
        contrasts.append(gray[~data.masks].mean() - gray[data.masks].mean())
    assert contrasts[0] > contrasts[1] + 3


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_samples": 2}, "n_samples=2"),
        ({"n_classes": 9}, "n_classes=9"),
        ({"n_samples": [3, 0]}, "at least 1 image"),
        ({"n_samples": [1] * 9}, "1 to 8 classes"),
        ({"image_size": 4}, "image_size=4"),
        ({"image_size": 16.0}, "image_size=16.0"),
        ({"images_per_patient": 0}, "images_per_patient=0"),
        ({"spatial_dims": 1}, "spatial_dims=1"),
        ({"difficulty": 1.5}, "difficulty=1.5"),
        ({"difficulty": None}, "difficulty=None"),
        ({"skin_range": (0, 2)}, "skin_range"),
        ({"skin_range": [(0, 1)] * 3}, "skin_range"),
    ],
)
def test_lesions_refuse_wrong_parameters(params, message):
    with pytest.raises(ValueError, match=message):
        make_lesions(**params)
