"""From a folder of images to a model, predictions, a comparison or a report, without Python.

    python -m sklearn_medimb train scans/ --table t.csv --group patient --method cssn --out model
    python -m sklearn_medimb predict model new_scans/ --out predictions.csv
    python -m sklearn_medimb recommend scans/ --budget "5 minutes"
    python -m sklearn_medimb compare scans/ --out comparison
    python -m sklearn_medimb report scans/ --positive melanoma --prevalence 0.02 --out report.html

Imports `_data`, `comparison`, `datasets`, `persistence`, `report`.
"""

from __future__ import annotations

import argparse
import ast
import csv
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.utils import Bunch

from sklearn_medimb._data.rows import group_codes
from sklearn_medimb.comparison import Comparison, common_methods, compare_methods, recommend
from sklearn_medimb.datasets import from_folder, from_table, load_npz
from sklearn_medimb.persistence import load, save
from sklearn_medimb.report import report

MODEL = "model.safetensors"
DEFAULT_METHODS = ("cross-entropy", "logit-adjustment", "crt", "metric-two-stage", "cssn", "lmd")


# ---------------------------------------------------------------- data


def read(args: argparse.Namespace) -> Bunch:
    """Images, labels and patients of a folder, a table or an .npz file."""
    source = Path(args.data)
    if source.suffix == ".npz":
        if any(given is not None for given in (args.table, args.group, args.patients)):
            raise ValueError(
                "--table, --group and --patients are for files; an .npz file holds its labels and "
                "groups."
            )
        data = load_npz(source, image_size=None)
        images = data.images
        return Bunch(
            images=images, labels=data.target_names[data.target], groups=data.groups, duplicates=[],
            skipped=[],
        )  # fmt: skip
    how: dict[str, Any] = {
        "image_size": args.image_size or None,
        "mode": args.mode,
        "on_error": args.on_error,
        "cache": args.cache,
    }
    if args.patients is not None and (source.is_file() or args.table is not None):
        raise ValueError("--patients is for folders without a table: name a column in --group.")
    columns = {"path": args.path, "label": args.label, "group": args.group}
    if source.is_file():
        return from_table(source, **columns, **how)
    if args.table is not None:
        return from_folder(source, table=args.table, **columns, **how)
    if args.group is not None:
        raise ValueError("--group names a column: it needs --table. For file names, --patients.")
    return from_folder(source, groups=args.patients, **how)


def describe(data: Bunch) -> str:
    """What was understood."""
    labels, counts = np.unique(data.labels, return_counts=True)
    shape = " x ".join(map(str, data.images.shape[1:]))
    lines = [f"{len(data.labels)} images of {shape}, {data.images.dtype}"]
    lines += [
        f"  {label}: {n} images"
        for label, n in sorted(zip(labels.tolist(), counts, strict=True), key=lambda pair: -pair[1])
    ]
    if data.groups is None:
        lines.append("no patients: images of one patient may lie on both sides of a split")
    else:
        lines.append(f"{len(np.unique(group_codes(data.groups, data.labels)))} patients")
    for rows in data.duplicates or ():
        names = [data.images.path_of(row) for row in rows]
        lines.append(f"the same picture: {', '.join(names)}")
    lines += [f"left out: {path}: {why}" for path, why in data.skipped or ()]
    return "\n".join(lines)


def chosen(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Methods by name, with the parameters that were given."""
    params = parameters(args)
    shared = {"backbone": args.backbone, "random_state": args.seed}
    made = {slug(name): method for name, method in common_methods(**shared).items()}
    if unknown := [name for name in names if name not in made]:
        raise ValueError(f"Unknown methods {unknown}: choose among {', '.join(made)}.")
    return {name: made[name].set_params(**params) for name in names}


def parameters(args: argparse.Namespace) -> dict[str, Any]:
    """What --param says."""
    params: dict[str, Any] = {}
    for text in args.param:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--param {text!r} is not of the form name=value.")
        params[name] = value
        with suppress(ValueError, SyntaxError):
            params[name] = ast.literal_eval(value)
    return params


def slug(name: str) -> str:
    """Name of a method on the command line."""
    return name.lower().replace(" ", "-")


# ---------------------------------------------------------------- commands


def ask_for(package: str, extra: str) -> None:
    """Miss what the end of a command needs before its work, which would be in vain."""
    if find_spec(package) is None:
        raise ImportError(f'{package} is not installed: pip install "sklearn_medimb[{extra}]".')


def train(args: argparse.Namespace) -> None:
    """Fit a method to all images, and write the model."""
    ask_for("safetensors", "persistence")
    data = read(args)
    (estimator,) = chosen(args, [args.method]).values()
    print(describe(data))
    if args.dry_run:
        print(f"would train {estimator}")
        return
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)  # before the work, which would be in vain
    try:
        estimator.set_params(verbose=1)
        estimator.fit(data.images, data.labels, groups=data.groups)
        save(estimator, out / MODEL)
    finally:
        with suppress(OSError):  # it holds something
            out.rmdir()
    print(f"wrote {out / MODEL}")


def predict(args: argparse.Namespace) -> None:
    """Write class and probabilities of each image."""
    estimator = load(Path(args.model) / MODEL if Path(args.model).is_dir() else args.model)
    paths = list(files(args.images))
    if not paths:
        raise ValueError(f"{args.images} holds no files.")
    if args.out is not None:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    proba = estimator.predict_proba(paths)
    names = [str(label) for label in estimator.classes_]
    rows = [
        [path, names[p.argmax()], *(f"{value:.6f}" for value in p)]
        for path, p in zip(paths, proba, strict=True)
    ]
    with written(args.out) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "predicted", *(f"p({name})" for name in names)])
        writer.writerows(rows)


def files(places: Sequence[str]) -> Iterator[str]:
    """Files, and those in folders, in order; hidden ones are passed over."""
    for place in map(Path, places):
        if place.is_dir():
            for path in sorted(place.rglob("*")):
                parts = path.relative_to(place).parts
                if path.is_file() and not any(part.startswith(".") for part in parts):
                    yield str(path)
        elif place.exists():
            yield str(place)
        else:
            raise ValueError(f"{str(place)!r} is neither a file nor a folder.")


@contextmanager
def written(path: str | Path | None) -> Iterator[Any]:
    """A text file, or standard output."""
    if path is None:
        yield sys.stdout
        return
    # Names of files may be bytes that are no text: they stay as they are.
    with Path(path).open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        yield file
    print(f"wrote {path}")


def compared(
    args: argparse.Namespace, folder: Path, check: Callable[[Bunch], Any] = lambda _: None
) -> tuple[Bunch, Comparison] | None:
    """Read, check and compare; None where only what was understood is asked for."""
    data, methods = read(args), chosen(args, args.methods)
    print(describe(data), flush=True)
    check(data)
    if args.dry_run:
        print(f"would compare {', '.join(methods)} in {args.folds} folds")
        return None
    found = compare_methods(
        methods, data.images, data.labels, groups=data.groups, cv=args.folds, n_jobs=args.jobs,
        folder=folder, random_state=args.seed, verbose=1,
    )  # fmt: skip
    print(found)
    return data, found


def compare(args: argparse.Namespace) -> None:
    """Compare methods; write a table and a figure."""
    out = Path(args.out)
    if (both := compared(args, out / "folds")) is None:
        return
    found = both[1]
    rows = found.records()
    with written(out / "comparison.csv") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with suppress(ImportError):  # without matplotlib there is the table
        found.plot().figure.savefig(out / "comparison.png", dpi=150)
        print(f"wrote {out / 'comparison.png'}")


def advise(args: argparse.Namespace) -> None:
    """Say which method to take."""
    data = read(args)
    print(describe(data), flush=True)
    if args.dry_run:
        return
    start = None if args.backbone == "auto" else args.backbone
    print(
        recommend(
            data.images, data.labels, data.groups, budget=args.budget, start=start,
            try_out=args.try_out, random_state=args.seed, **parameters(args),
        )
    )  # fmt: skip


def make_report(args: argparse.Namespace) -> None:
    """Compare methods; write a page about it."""
    ask_for("matplotlib", "plot")
    out = Path(args.out)
    folder = out.with_name(f"{out.stem}_folds")
    if args.show not in (None, *args.methods):
        raise ValueError(f"--show {args.show}: the methods are {', '.join(args.methods)}.")
    if (both := compared(args, folder, lambda data: disease(args, data))) is None:
        return
    data, found = both
    positive = disease(args, data)
    notes = [
        f"The same picture: {', '.join(Path(data.images.path_of(row)).name for row in rows)}."
        for rows in data.duplicates or ()
    ]
    page = report(
        found, data.images, data.labels, groups=data.groups, method=args.show, positive=positive,
        prevalence=args.prevalence, min_sensitivity=args.min_sensitivity, title=args.title,
        notes=notes,
    )  # fmt: skip
    page.save(out)
    print(f"wrote {out}")


def disease(args: argparse.Namespace, data: Bunch) -> list[Any] | None:
    """Labels that --positive names."""
    if args.positive is None:
        return None
    known = {str(label): label for label in np.unique(data.labels).tolist()}
    if strangers := [name for name in args.positive if name not in known]:
        raise ValueError(f"--positive {strangers}: the classes are {list(known)}.")
    if set(args.positive) == set(known):
        raise ValueError("--positive names all classes: nothing is left to tell it from.")
    return [known[name] for name in args.positive]


# ---------------------------------------------------------------- the command line


def share(text: str) -> float:
    """A number between 0 and 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie between 0 and 1")
    return value


def parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    top = argparse.ArgumentParser(
        prog="python -m sklearn_medimb", description="Imbalanced medical image classification."
    )
    commands = top.add_subparsers(required=True, metavar="command")

    data = argparse.ArgumentParser(add_help=False)
    data.add_argument(
        "data", help="folder with a sub-folder for each class, a table of paths, or an .npz file"
    )
    data.add_argument("--table", help="CSV that says what the files of the folder show")
    data.add_argument("--path", default="path", help="its column of paths")
    data.add_argument("--label", default="label", help="its column of classes")
    data.add_argument("--group", help="its column of patients")
    data.add_argument(
        "--patients", metavar="REGEX", help="patient in the name of a file: one group"
    )
    data.add_argument("--image-size", type=int, default=128, help="pixels a side; 0: as they are")
    data.add_argument("--mode", choices=("auto", "L", "RGB"), default="auto")
    data.add_argument("--on-error", choices=("raise", "skip"), default="raise")
    data.add_argument("--cache", metavar="FOLDER", help="keep decoded images there")
    data.add_argument("--backbone", default="auto", help='such as "efficientnet_lite0"')
    data.add_argument(
        "--param", action="append", default=[], metavar="NAME=VALUE", help="of the methods"
    )
    data.add_argument("--seed", type=int, default=0)
    data.add_argument("--dry-run", action="store_true", help="say what was understood, and stop")

    many = argparse.ArgumentParser(add_help=False)
    many.add_argument("--methods", nargs="+", default=DEFAULT_METHODS, metavar="METHOD")
    many.add_argument("--folds", type=int, default=5)
    many.add_argument("--jobs", type=int, help="processes")

    one = commands.add_parser("train", parents=[data], help="fit a method to all images")
    one.add_argument("--method", default="cssn", metavar="METHOD")
    one.add_argument("--out", required=True, help="folder of the model")
    one.set_defaults(run=train)

    ask = commands.add_parser("predict", help="class and probabilities of images")
    ask.add_argument("model", help="folder of the model")
    ask.add_argument("images", nargs="+", help="files and folders")
    ask.add_argument("--out", help="CSV; standard output if none")
    ask.set_defaults(run=predict)

    table = commands.add_parser("compare", parents=[data, many], help="methods on the same folds")
    table.add_argument("--out", default="comparison", help="folder of table, figure and folds")
    table.set_defaults(run=compare)

    which = commands.add_parser("recommend", parents=[data], help="which method to take, and why")
    which.add_argument("--budget", default="2 minutes", help='of a fit, such as "1 hour"')
    which.add_argument("--try-out", action="store_true", help="compare the first ones before")
    which.set_defaults(run=advise)

    page = commands.add_parser("report", parents=[data, many], help="a page about a comparison")
    page.add_argument("--show", metavar="METHOD", help="in detail; the best one if none")
    page.add_argument("--positive", nargs="+", metavar="CLASS", help="the disease")
    page.add_argument("--prevalence", type=share, help="share of the ill where it is to be used")
    page.add_argument("--min-sensitivity", type=share, default=0.95)
    page.add_argument("--title", default="Comparison of classifiers")
    page.add_argument("--out", default="report.html")
    page.set_defaults(run=make_report)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    argv : sequence of str, default=None
        Arguments; None takes those of the process.

    Returns
    -------
    code : int
        0; 2 where what was given is wrong, with a line on standard error; 130 if interrupted; 141
        if nobody reads on.
    """
    for stream in (sys.stdout, sys.stderr):  # a locale may lack letters of names
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = _shown
        try:
            args.run(args)
            sys.stdout.flush()
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:  # as of "| head"; what is left has nowhere to go at the exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except (ValueError, TypeError, ImportError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


def _shown(message: Any, category: type, *_: Any, **__: Any) -> None:
    """A line for each warning, without the place in the code."""
    if not issubclass(category, (DeprecationWarning, PendingDeprecationWarning)):
        print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
