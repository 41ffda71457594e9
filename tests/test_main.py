"""The command line: from a folder to a model, predictions, a comparison and a page."""

from __future__ import annotations

import csv
import io
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from sklearn_medimb import __main__ as cli
from sklearn_medimb.__main__ import main
from sklearn_medimb.persistence import load

pillow = pytest.importorskip("PIL.Image")
pytest.importorskip("safetensors")

SMALL = ["--image-size", "12", "--param", "max_epochs=1", "--param", "batch_size=8"]


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Two classes of gray pictures, two of each patient, and a table of them."""
    folder = tmp_path_factory.mktemp("data") / "scans"
    rng = np.random.default_rng(0)
    rows = ["file;finding;patient"]
    for i in range(36):
        name = "melanoma" if i % 3 == 0 else "nevus"
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 90, (14, 14), dtype=np.uint8)
        if name == "melanoma":
            pixels[4:10, 4:10] += 120
        path = folder / name / f"p{i // 6}{i % 3}_{i}.png"
        pillow.fromarray(pixels).save(path)
        rows.append(f"{path.relative_to(folder)};{name};{i // 6}{i % 3}")
    (folder.parent / "scans.csv").write_text("\ufeff" + "\n".join(rows))
    return folder


def run(*args):
    return main([str(arg) for arg in args])


TABLE = ["--table", "{scans}.csv", "--path", "file"]
PATIENTS = ["--patients", "^p([0-9]+)_"]


def test_train_and_predict(scans, tmp_path, capsys):
    out = tmp_path / "model"
    assert run("train", scans, *PATIENTS, *SMALL, "--method", "crt", "--out", out) == 0
    said = capsys.readouterr().out
    assert "36 images of 12 x 12, uint8" in said
    assert "nevus: 24 images\n  melanoma: 12 images\n18 patients" in said
    clf = load(out / "model.safetensors")
    assert clf.classes_.tolist() == ["melanoma", "nevus"]
    assert clf.image_shape_[-2:] == (12, 12)
    (scans / "melanoma" / ".hidden").write_text("nothing")
    assert run("predict", out, scans / "melanoma", "--out", tmp_path / "p.csv") == 0
    (scans / "melanoma" / ".hidden").unlink()
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    paths = [row["path"] for row in rows]
    wanted = clf.predict_proba(paths)
    found = np.array([[row["p(melanoma)"], row["p(nevus)"]] for row in rows], dtype=float)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert [row["predicted"] for row in rows] == clf.predict(paths).tolist()
    capsys.readouterr()
    assert run("predict", out, paths[0]) == 0
    assert capsys.readouterr().out.startswith("path,predicted,p(melanoma),p(nevus)\n")


def test_a_dry_run_writes_nothing(scans, tmp_path, capsys):
    for command in ("train", "compare", "report"):
        out = tmp_path / command
        how = ["--table", scans.parent / "scans.csv", "--path", "file", "--label", "finding"]
        assert (
            run(command, scans, *how, "--group", "patient", *SMALL, "--dry-run", "--out", out) == 0
        )
        said = capsys.readouterr().out
        assert "18 patients" in said
        assert "would" in said
    assert not list(tmp_path.iterdir())


def test_a_report_from_one_line(scans, tmp_path, capsys):
    args = ["report", scans, *PATIENTS, *SMALL, "--methods", "cross-entropy", "cssn", "--folds", 2]
    args += ["--positive", "melanoma", "--min-sensitivity", 0.5, "--out", tmp_path / "page.html"]
    assert run(*args) == 0
    page = (tmp_path / "page.html").read_text()
    assert "A decision: melanoma or not" in page
    assert "18 patients with 2 to 2 images" in page
    kept = sorted((tmp_path / "page_folds").iterdir())
    assert len(kept) == 4
    times = [path.stat().st_mtime_ns for path in kept]
    assert run(*args) == 0  # nothing is fitted again
    assert [path.stat().st_mtime_ns for path in kept] == times


def test_a_comparison_of_an_archive(tmp_path, capsys):
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], [20, 10])
    X = rng.integers(0, 255, (30, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=X, labels=y, class_names=["well", "ill"])
    out = tmp_path / "out"
    how = ["--methods", "logit-adjustment", "focal-loss", "--folds", 2]
    assert run("compare", tmp_path / "a.npz", *SMALL, *how, "--out", out) == 0
    said = capsys.readouterr().out
    assert "no patients" in said
    assert "each tested once" in said
    with (out / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {"logit-adjustment", "focal-loss"}
    assert (out / "comparison.png").stat().st_size > 1000


def test_advice_from_one_line(scans, capsys):
    assert run("recommend", scans, *PATIENTS, *SMALL, "--budget", "1 s") == 0
    said = capsys.readouterr().out
    assert "18 patients" in said
    assert "Take " in said
    assert run("recommend", scans, *PATIENTS, *SMALL, "--dry-run") == 0
    assert "Take " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["recommend", "{scans}", "--budget", "soon"], "budget='soon'"),
        (["train", "nowhere", "--out", "m"], "'nowhere' is no folder"),
        (["train", "{scans}", "--method", "magic", "--out", "m"], r"Unknown methods \['magic'\]"),
        (["train", "{scans}", "--param", "lr", "--out", "m"], "--param 'lr' is not of the form"),
        (["train", "{scans}", "--param", "speed=3", "--out", "m"], "speed"),
        (["train", "{scans}", "--param", "lr=fast", "--out", "m"], "lr"),
        (["train", "{scans}", "--group", "patient", "--out", "m"], "it needs --table"),
        (["train", "{scans}", "--table", "{scans}.csv", "--out", "m"], "'path'"),
        (["train", "{scans}", *TABLE, "--label", "none", "--out", "m"], "'none'"),
        (
            ["report", "{scans}", "--positive", "x", "--methods", "crt", "--folds", "2"],
            "--positive",
        ),
        (["train", "{scans}", *TABLE, "--label", "finding", *PATIENTS, "--out", "m"], "--group"),
        (["report", "{scans}", "--positive", "melanoma", "nevus"], "names all classes"),
        (["report", "{scans}", "--show", "lmd", "--methods", "crt"], "--show lmd"),
        (["compare", "{scans}", "--patients", "^(p"], "groups='\\^\\(p'"),
        (["predict", "nowhere", "{scans}"], "nowhere"),
        (["compare", "{scans}", "--folds", "1", "--methods", "crt"], "n_splits=1"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(args, match, scans, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = [arg.replace("{scans}", str(scans)) for arg in args]
    small = [] if args[0] == "predict" else SMALL
    assert main([*args, *small]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(match, error), error
    assert not (tmp_path / "m").exists()


def test_what_a_report_lacks_is_said_before_the_work(scans, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert run("report", scans, *SMALL, "--positive", "x", "--out", out) == 2
    assert not list(tmp_path.iterdir())  # no fold was done
    for name, value in (("--prevalence", 2), ("--min-sensitivity", 95)):
        with pytest.raises(SystemExit):
            run("report", scans, name, value)
        assert f"{value} does not lie between 0 and 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [("train", "safetensors", "persistence"), ("report", "matplotlib", "plot")],
)
def test_a_package_that_the_end_needs_is_missed_before_the_work(
    command, package, extra, scans, tmp_path, monkeypatch, capsys
):
    find = cli.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == package else find(name))
    assert run(command, scans, "--out", tmp_path / "out") == 2
    said = capsys.readouterr()
    assert f'{package} is not installed: pip install "sklearn_medimb[{extra}]"' in said.err
    assert not said.out
    assert not list(tmp_path.iterdir())


def test_a_place_for_the_model_is_found_before_the_work(scans, tmp_path, capsys):
    (tmp_path / "taken").write_text("something")
    assert run("train", scans, *SMALL, "--out", tmp_path / "taken" / "m") == 2
    assert not any("step" in text for text in capsys.readouterr())


def test_parameters_are_those_of_the_method(scans, tmp_path, capsys):
    args = ["train", scans, "--method", "lmd", "--param", "n_rounds=7", "--dry-run", "--out", "m"]
    assert run(*args) == 0
    assert "LMDClassifier(n_rounds=7, " in capsys.readouterr().out


def test_names_of_any_bytes_and_a_reader_that_left(scans, tmp_path, monkeypatch):
    odd = tmp_path / "n\udce6vus 1.png"  # a byte that is no text in UTF-8
    odd.write_bytes((sorted((scans / "nevus").iterdir())[0]).read_bytes())
    args = ["train", scans, *SMALL, "--method", "cross-entropy", "--out", tmp_path / "model"]
    assert run(*args) == 0
    out = tmp_path / "new" / "p.csv"
    assert run("predict", tmp_path / "model", odd, "--out", out) == 0
    assert os.fsencode(odd) in out.read_bytes()
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", plain)
    assert run("predict", tmp_path / "model", odd) == 0
    assert b"n\\udce6vus 1.png" in plain.buffer.getvalue()
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    assert run("predict", tmp_path / "model", odd) == 141
    sys.stdout.close()  # which writes what is left


def test_it_is_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "sklearn_medimb", "train", "nowhere", "--out", "m"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
