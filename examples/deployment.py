"""From training to the ward: one file without code, and a network that runs without Python.

    python examples/deployment.py [--folder .]

A fitted CSSN, bank of supports included, is stored as one safetensors file, which runs nothing
when it is loaded, and as an ONNX graph from pixels to class probabilities.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from sklearn.metrics import balanced_accuracy_score

from sklearn_medimb import CSSNClassifier
from sklearn_medimb.datasets import make_lesions
from sklearn_medimb.onnx import export_onnx
from sklearn_medimb.persistence import load, save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path())
    args = parser.parse_args()

    train = make_lesions([120, 60, 40], image_size=32, difficulty=0.0, random_state=0)
    test = make_lesions(90, n_classes=3, image_size=32, difficulty=0.0, random_state=1)
    clf = CSSNClassifier(max_epochs=20, random_state=0).fit(train.images, train.target)
    expected = clf.predict_proba(test.images)
    score = balanced_accuracy_score(test.target, clf.predict(test.images))
    print(f"balanced accuracy: {score:.3f}")

    path = args.folder / "lesions.safetensors"
    save(clf, path)
    same = np.array_equal(load(path).predict_proba(test.images), expected)
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB; predictions after load equal: {same}")

    damaged = args.folder / "damaged.safetensors"
    damaged.write_bytes(path.read_bytes()[:-100])
    try:
        load(damaged)
    except ValueError as error:
        print(f"a truncated file is refused: {str(error).split(': ', 1)[1]}")
    damaged.unlink()

    graph = args.folder / "lesions.onnx"
    export_onnx(clf, graph)
    try:
        import onnxruntime
    except ImportError:
        print(f"{graph.name}: {graph.stat().st_size / 1e6:.1f} MB (onnxruntime is not installed)")
        return
    session = onnxruntime.InferenceSession(graph)
    pixels = test.images.transpose(0, 3, 1, 2).astype(np.float32)
    (proba,) = session.run(None, {session.get_inputs()[0].name: pixels})
    print(
        f"{graph.name}: {graph.stat().st_size / 1e6:.1f} MB; same classes as here: "
        f"{(proba.argmax(axis=1) == expected.argmax(axis=1)).mean():.0%}"
    )


if __name__ == "__main__":
    main()
