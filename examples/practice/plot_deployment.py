"""
From training to the ward
=========================

A fitted CSSN, bank of supports included, is stored as one safetensors file, which runs nothing
when it is loaded, and as an ONNX graph from pixels to class probabilities, which needs no Python.
"""

# %%
# A classifier of three kinds of lesions.

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.metrics import balanced_accuracy_score

from sklearn_medimb import CSSNClassifier
from sklearn_medimb.datasets import make_lesions
from sklearn_medimb.onnx import export_onnx
from sklearn_medimb.persistence import load, save

train = make_lesions([120, 60, 40], image_size=32, difficulty=0.0, random_state=0)
test = make_lesions(90, n_classes=3, image_size=32, difficulty=0.0, random_state=1)
clf = CSSNClassifier(max_epochs=20, random_state=0).fit(train.images, train.target)
expected = clf.predict_proba(test.images)
score = balanced_accuracy_score(test.target, clf.predict(test.images))
print(f"balanced accuracy: {score:.3f}")

# %%
# One file, without code.

folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "lesions.safetensors"
save(clf, path)
same = np.array_equal(load(path).predict_proba(test.images), expected)
print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB; predictions after load equal: {same}")

# %%
# A damaged one is refused, instead of predicting something else.

damaged = path.with_name("damaged.safetensors")
damaged.write_bytes(path.read_bytes()[:-100])
try:
    load(damaged)
except ValueError as error:
    print(f"a truncated file is refused: {str(error).split(': ', 1)[1]}")

# %%
# A graph that any runtime of ONNX runs: ``pip install "sklearn_medimb[onnx]" onnxruntime``.

graph = path.with_suffix(".onnx")
export_onnx(clf, graph)
print(f"{graph.name}: {graph.stat().st_size / 1e6:.1f} MB")
try:
    import onnxruntime
except ImportError:
    print("onnxruntime is not installed")
    proba = expected
else:
    session = onnxruntime.InferenceSession(graph)
    pixels = test.images.transpose(0, 3, 1, 2).astype(np.float32)
    (proba,) = session.run(None, {session.get_inputs()[0].name: pixels})
    same = (proba.argmax(axis=1) == expected.argmax(axis=1)).mean()
    print(f"same classes as here: {same:.0%}")

# %%
# The probabilities of both, image by image.

figure, ax = plt.subplots(figsize=(4, 4), layout="constrained")
for column, name in enumerate(train.target_names[:3]):
    ax.scatter(expected[:, column], proba[:, column], s=12, label=name)
ax.axline((0, 0), slope=1, color="black", linewidth=0.6)
ax.set(xlabel="probability here", ylabel="probability of the graph", aspect="equal")
ax.legend()
plt.show()
folder.cleanup()
