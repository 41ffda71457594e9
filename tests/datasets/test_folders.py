"""Folders and tables of image files: what is understood, and what is refused."""

from __future__ import annotations

import pickle
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import GroupKFold, cross_validate

from sklearn_medimb import SoftmaxClassifier
from sklearn_medimb.datasets import ImageFiles, from_folder, from_table
from tests.helpers import SMALL, make_blobs

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def tree(tmp_path):
    """Two classes, one of them in folders of patients; every picture differs."""
    root = tmp_path / "data"
    names = ("benign/p1_a", "benign/p1_b", "benign/deep/p2_a", "malignant/p3_a")
    for count, name in enumerate(names):
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(path, count)
    return root


def picture(path, seed, size=12):
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def break_file(path):
    path.write_bytes(path.read_bytes()[:90])


# ---------------------------------------------------------------- folders


def test_a_class_is_a_folder(tree):
    data = from_folder(tree)
    assert isinstance(data.images, ImageFiles)
    assert data.images.shape == (4, 12, 12)
    assert data.labels.tolist() == ["benign"] * 3 + ["malignant"]
    assert [path.rsplit("/", 1)[1] for path in data.images.paths] == [
        "p2_a.png", "p1_a.png", "p1_b.png", "p3_a.png",
    ]  # fmt: skip
    assert (data.groups, data.table, data.duplicates, data.skipped) == (None, None, [], [])


def test_options_go_to_the_files(tree, tmp_path):
    data = from_folder(str(tree), image_size=8, mode="RGB", cache=tmp_path / "cache")
    assert data.images[1].shape == (8, 8, 3)
    assert list((tmp_path / "cache").glob("*.npy"))


@pytest.mark.parametrize("groups", [r"^(p\d)_", lambda path: path.rsplit("/", 1)[1][:2]])
def test_patients_are_in_the_names(tree, groups):
    assert from_folder(tree, groups=groups).groups.tolist() == ["p2", "p1", "p1", "p3"]


def test_what_systems_leave_behind_is_passed_over(tree):
    for name in ("benign/.DS_Store", "benign/Thumbs.db", "malignant/desktop.ini", ".hidden"):
        (tree / name).write_text("no picture")
    (tree / "__MACOSX").mkdir()
    (tree / "__MACOSX" / "x.png").write_text("no picture")
    (tree / ".cache").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(from_folder(tree).images) == 4


def test_links_are_followed_once(tree, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "b").symlink_to(tree / "benign")
    (linked / "m").symlink_to(tree / "malignant")
    assert from_folder(linked).labels.tolist() == ["b"] * 3 + ["m"]
    (tree / "benign" / "loop").symlink_to(tree / "benign")
    with pytest.raises(ValueError, match="link to a folder that holds it"):
        from_folder(linked)


def test_unicode_names(tmp_path):
    for k, name in enumerate(["gutartig ü", "悪性"]):
        (tmp_path / name).mkdir()
        picture(tmp_path / name / f"große Läsion {k}.png", k)
    assert from_folder(tmp_path).labels.tolist() == ["gutartig ü", "悪性"]


def no_folder(tree):
    return from_folder(tree / "nowhere")


def a_file(tree):
    return from_folder(picture(tree / "x.png", 0))


def empty(tree):
    (tree / "zz").mkdir()
    return from_folder(tree)


def empty_below(tree):
    (tree / "zz" / "deeper").mkdir(parents=True)
    (tree / "zz" / "deeper" / ".DS_Store").write_text("")
    return from_folder(tree)


def flat(tree):
    return from_folder(tree / "malignant")


def splits(tree):
    (tree / "benign").rename(tree / "train")
    (tree / "malignant").rename(tree / "Test")
    return from_folder(tree)


def stray_text(tree):
    (tree / "benign" / "notes.txt").write_text("what was seen")
    return from_folder(tree)


def zero_bytes(tree):
    (tree / "malignant" / "p9_x.png").write_bytes(b"")
    return from_folder(tree)


def dead_link(tree):
    (tree / "malignant" / "x.png").symlink_to(tree / "gone.png")
    return from_folder(tree)


def self_link(tree):
    (tree / "malignant" / "x.png").symlink_to(tree / "malignant" / "x.png")
    return from_folder(tree)


def table_and_groups(tree):
    return from_folder(tree, table=pd.DataFrame(), groups="(p)")


def all_broken(tree):
    for path in tree.rglob("*.png"):
        break_file(path)
    return from_folder(tree, on_error="skip")


BAD_FOLDERS = [
    (no_folder, "nowhere' is no folder"),
    (a_file, "x.png' is no folder"),
    (empty, "zz' holds no files"),
    (empty_below, "zz' holds no files"),
    (flat, "no sub-folders.*pass table="),
    (splits, "which are no classes"),
    (stray_text, r"notes\.txt.*is none of the image files"),
    (zero_bytes, r"p9_x\.png' is empty"),
    (dead_link, r"x\.png' cannot be opened"),
    (self_link, r"x\.png' cannot be opened"),
    (table_and_groups, "name a column in group="),
    (all_broken, "None of 4 files can be read"),
    (lambda tree: from_folder(tree, groups=r"^p\d"), "must have one group.* has 0"),
    (lambda tree: from_folder(tree, groups=r"^(q\d)"), r"not found in the names of 4 of 4 files"),
    (lambda tree: from_folder(tree, groups=lambda path: None), "p2_a.png' has no patient"),
    (lambda tree: from_folder(tree, groups=lambda path: " "), "p2_a.png' has no patient"),
    (lambda tree: from_folder(tree, groups=lambda path: 1.5), "1.5, which is no whole number"),
    (lambda tree: from_folder(tree, on_error="ignore"), "on_error='ignore' must be"),
    (lambda tree: from_folder(tree, mode="HSV"), "mode='HSV' must be"),
]


@pytest.mark.parametrize(("make", "message"), BAD_FOLDERS)
def test_bad_folders_are_refused(tree, make, message):
    with pytest.raises(ValueError, match=message):
        make(tree)


def test_files_beside_the_classes_are_told(tree):
    (tree / "README.txt").write_text("about")
    with pytest.warns(UserWarning, match=r"no class and are left out: README\.txt"):
        assert len(from_folder(tree).images) == 4


def test_pictures_of_a_pixel_are_told(tree):
    picture(tree / "benign" / "dot.png", 9, size=1)
    with pytest.warns(UserWarning, match=r"1 of 5 files are smaller .*dot\.png' \(1, 1\)"):
        data = from_folder(tree)
    with pytest.raises(ValueError, match=r"row 3 \(.*dot\.png'\) has shape \(1, 1\)"):
        SoftmaxClassifier(**SMALL).fit(data.images[::-1], data.labels[::-1])


def test_slices_belong_to_their_file(tree):
    Image.fromarray(np.zeros((12, 12), np.uint8)).save(
        tree / "malignant" / "p4_a.tif", save_all=True,
        append_images=[Image.fromarray(np.full((12, 12), k, np.uint8)) for k in (1, 2)],
    )  # fmt: skip
    (tree / "malignant" / "p4_b.tif").write_bytes((tree / "malignant" / "p4_a.tif").read_bytes())
    with pytest.warns(UserWarning, match="occurs several times"):
        data = from_folder(tree, frames="each")
    assert data.images.shape == (10, 12, 12)
    assert data.labels.tolist() == ["benign"] * 3 + ["malignant"] * 7
    assert data.groups.tolist() == data.images.paths
    assert data.duplicates == [[4, 7]]
    with pytest.warns(UserWarning, match="occurs several times"):
        data = from_folder(tree, frames="each", groups=r"^(p\d)", on_error="skip")
    assert data.groups[-7:].tolist() == ["p3"] + ["p4"] * 6


def test_broken_files_are_left_out_when_asked(tree):
    break_file(tree / "benign" / "p1_a.png")
    (tree / "malignant" / "notes.txt").write_text("what was seen")
    with pytest.warns(UserWarning, match=r"2 of 5 files are left out: .*p1_a\.png.*notes\.txt"):
        data = from_folder(tree, on_error="skip", groups=lambda path: path[-8:-6])
    assert data.labels.tolist() == ["benign", "benign", "malignant"]
    assert data.groups.tolist() == ["p2", "p1", "p3"]
    assert len(data.images.take(np.arange(3))) == 3
    assert [path[-8:] for path, _ in data.skipped] == ["p1_a.png", "otes.txt"]


def test_the_same_picture_under_two_labels_is_told(tree):
    (tree / "malignant" / "again.png").write_bytes((tree / "benign" / "p1_a.png").read_bytes())
    told = r"1 picture has several labels: .*p1_a\.png' \(benign\) = .*again\.png' \(malignant\)"
    with pytest.warns(UserWarning, match=told):
        data = from_folder(tree)
    assert data.duplicates == [[1, 3]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert from_folder(tree, duplicates=False).duplicates == []


def test_the_same_picture_of_two_patients_is_told(tree):
    (tree / "benign" / "p7_a.png").write_bytes((tree / "benign" / "p1_a.png").read_bytes())
    with pytest.warns(UserWarning, match=r"several patients: .*\(p1\) = .*\(p7\)"):
        from_folder(tree, groups=r"^(p\d)")
    with pytest.warns(UserWarning, match="1 picture occurs several times"):
        assert from_folder(tree).duplicates == [[1, 3]]


# ---------------------------------------------------------------- tables

ROWS = [
    ("benign/p1_a.png", "benign", "12"),
    ("benign/p1_b.png", "benign", "12.0"),
    ("benign/deep/p2_a.png", "benign", " 012"),
    ("malignant/p3_a.png", "malignant", "K-3"),
]


def frame(rows=ROWS, columns=("path", "label", "patient")):
    return pd.DataFrame(rows, columns=list(columns))


def text(separator=",", rows=ROWS, header=("path", "label", "patient")):
    return "\n".join(separator.join(row) for row in [header, *rows]) + "\n"


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_as_spreadsheets_write_them(tree, separator, encoding):
    path = tree / "table.csv"
    path.write_text(text(separator), encoding=encoding)
    data = from_table(path, group="patient")
    assert data.labels.tolist() == ["benign"] * 3 + ["malignant"]
    assert data.groups.tolist() == ["12", "12", "012", "K-3"]
    assert data.table["path"].tolist() == [row[0] for row in ROWS]
    assert data.images.shape == (4, 12, 12)


def test_a_folder_with_a_table(tree, tmp_path):
    (tmp_path / "table.csv").write_text(text())
    data = from_folder(tree, table=tmp_path / "table.csv", group="patient")
    again = from_folder(tree, table=frame(), group="patient")
    other = from_table(frame(columns="abc"), path="a", label="b", group="c", root=tree)
    for found in (again, other):
        np.testing.assert_array_equal(found.labels, data.labels)
        np.testing.assert_array_equal(found.groups, data.groups)
        assert found.images.paths == data.images.paths
    assert from_table(frame(), label=None, root=tree).labels is None
    texts = frame()
    texts["label"] = ["0", "1"] * (len(texts) // 2)
    assert from_table(texts, root=tree).labels.tolist() == texts["label"].tolist()


def test_labels_that_are_numbers_stay_numbers(tree):
    rows = [(path, str(k % 2), "1") for k, (path, _, _) in enumerate(ROWS)]
    (tree / "t.csv").write_text(text(rows=rows))
    assert from_table(tree / "t.csv").labels.tolist() == [0, 1, 0, 1]
    rows[0] = (rows[0][0], "01", "1")
    (tree / "t.csv").write_text(text(rows=rows))
    assert from_table(tree / "t.csv").labels.tolist() == ["01", "1", "0", "1"]
    numbers = frame().assign(label=[3, 3, 1, 1])
    assert from_table(numbers, root=tree).labels.tolist() == [3, 3, 1, 1]


@pytest.mark.parametrize("ids", [[12, 12.0, "12", " 12 "], ["12.0", "12", 12, np.int64(12)]])
def test_one_patient_is_one_however_written(tree, ids):
    table = frame().assign(patient=pd.Series(ids, dtype=object))
    assert from_table(table, group="patient", root=tree).groups.tolist() == ["12"] * 4


def test_blank_rows_and_windows_paths(tree):
    lines = text().replace("benign/deep/p2_a", "benign\\deep\\p2_a").splitlines()
    (tree / "t.csv").write_text("\n".join([*lines[:2], "", *lines[2:], ",,", ""]))
    assert len(from_table(tree / "t.csv").images) == 4


def test_extensions_may_be_left_out(tree):
    picture(tree / "1.2.840.7.png", 8)
    (tree / "two.png").write_bytes(b"")
    (tree / "two.json").write_text("{}")
    rows = [(path.removesuffix(".png"), label, "1") for path, label, _ in ROWS]
    table = frame([*rows, ("1.2.840.7", "benign", "1")])
    found = from_table(table, root=tree).images.paths
    assert found[:2] == [str(tree / path) for path, _, _ in ROWS[:2]]
    assert found[-1] == str(tree / "1.2.840.7.png")
    with pytest.raises(ValueError, match=r"1 of 6 files are not there.*two'"):
        from_table(frame([*table.to_numpy().tolist(), ("two", "benign", "1")]), root=tree)


def changed(column, value, row=2):
    def make(tree):
        table = frame()
        table[column] = table[column].astype(object)
        table.loc[row, column] = value
        return from_table(table, group="patient", root=tree)

    return make


def from_text(content, **options):
    def make(tree):
        content_ = content if isinstance(content, bytes) else content.encode()
        (tree / "t.csv").write_bytes(content_)
        return from_table(tree / "t.csv", **options)

    return make


BAD_TABLES = [
    (changed("label", None), r"label='label'.*nothing in row 4"),
    (changed("label", float("nan")), "nothing in row 4"),
    (changed("label", "  "), "nothing in row 4"),
    (changed("label", 3), "mixes texts and"),
    (changed("patient", None, 0), r"group='patient'.*nothing in row 2"),
    (changed("patient", "nan", 0), "nothing in row 2"),
    (changed("patient", "", 3), "nothing in row 5"),
    (changed("patient", 1.5), "Row 4 of the table has patient 1.5"),
    (changed("path", None), "nothing in row 4"),
    (changed("path", 3), "3 is no path"),
    (changed("path", "gone.png"), r"1 of 4 files are not there.*gone\.png' in row 4"),
    (lambda tree: from_table(frame(), label="grade", root=tree),
     r"no column 'grade' among \['path', 'label', 'patient'\]"),
    (lambda tree: from_table(frame(), path="file", root=tree), "no column 'file'"),
    (lambda tree: from_table(frame(), group="id", root=tree), "no column 'id'"),
    (lambda tree: from_table(frame(columns=("path", "label", "label")), root=tree),
     "several columns 'label'"),
    (lambda tree: from_table(frame(rows=[]), root=tree), "table holds no rows"),
    (lambda tree: from_table(frame()), "4 of 4 files are not there.*root="),
    (from_text(""), "cannot be read as a table"),
    (from_text("path,label\n"), "no rows below its header"),
    (from_text("path,label\n\n\n"), "no rows below its header"),
    (from_text("path,label\nbenign/p1_a.png,\n"), "nothing in row 2"),
    (from_text("path,label\n\nbenign/p1_a.png,\n"), "nothing in row 3"),
    (from_text("path,label\na.png,b,c,d\n"), "has 4 entries in row 2, but 2 columns"),
    (from_text("path,label\nä.png,b\n".encode("latin-1")), "no text in UTF-8"),
    (from_text(b"PK\x03\x04rest"), "is a workbook"),
    (from_text(text(";").replace(";", "~")), r"no column 'path' among"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), BAD_TABLES)
def test_bad_tables_are_refused(tree, make, message):
    with pytest.raises(ValueError, match=message):
        make(tree)


def test_rows_of_broken_files_leave_the_table(tree):
    break_file(tree / "benign" / "p1_b.png")
    table = frame(rows=[*ROWS, ("gone.png", "benign", "5")])
    with pytest.warns(UserWarning, match="2 of 5 files are left out"):
        data = from_table(table, group="patient", root=tree, on_error="skip")
    assert data.table["path"].tolist() == [ROWS[k][0] for k in (0, 2, 3)]
    assert data.groups.tolist() == ["12", "012", "K-3"]


def test_tables_of_text_need_pandas(tree, monkeypatch):
    (tree / "t.csv").write_text(text())
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        from_table(tree / "t.csv")
    (tree / "t.csv").unlink()
    assert len(from_folder(tree).images) == 4


# ---------------------------------------------------------------- to the end


def test_from_a_folder_to_predictions(tmp_path):
    X, y = make_blobs()
    for k, (image, label) in enumerate(zip(X, y, strict=True)):
        folder = tmp_path / "data" / f"class {label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.moveaxis(image, 0, -1)).save(folder / f"p{k // 2}_{k}.png")
    data = from_folder(tmp_path / "data", groups=r"^(p\d+)_")
    clf = SoftmaxClassifier(**SMALL)
    scores = cross_validate(
        clf, data.images, data.labels, groups=data.groups, cv=GroupKFold(2),
        scoring="balanced_accuracy", error_score="raise",
    )  # fmt: skip
    assert len(scores["test_score"]) == 2
    clf.fit(data.images, data.labels)
    answers = clf.predict(data.images.paths[:5])
    assert set(answers) <= {"class 0", "class 1", "class 2"}
    order = [int(path.rsplit("_", 1)[1][:-4]) for path in data.images.paths]
    in_memory = SoftmaxClassifier(**SMALL).fit(np.moveaxis(X[order], 1, -1), data.labels)
    np.testing.assert_array_equal(clf.predict_proba(data.images), in_memory.predict_proba(X[order]))
    again = pickle.loads(pickle.dumps(clf))
    np.testing.assert_array_equal(again.predict(data.images.paths[:5]), answers)
