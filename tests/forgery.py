"""Files of models that someone with our source has tampered with."""

from __future__ import annotations

import json

import pytest

from sklearn_medimb.persistence._format import digest_of_file

safetensors = pytest.importorskip("safetensors")


def forged(path, edit):
    """Change a file and recompute its digest, as someone with our source could."""
    with safetensors.safe_open(path, framework="numpy") as file:
        stamp = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tree = json.loads(stamp["estimator"])
    edited = edit(tree["estimator"], tensors, stamp)
    stamp["estimator"] = json.dumps(tree) if edited is None else edited
    stamp["digest"] = digest_of_file(stamp, tensors)
    safetensors.numpy.save_file(tensors, path, metadata=stamp)


def set_state(name, value):
    return lambda tree, *_: tree["state"].update({name: value})


def set_class(name):
    return lambda tree, *_: tree.update({"class": name})


def set_param(name, value):
    return lambda tree, *_: tree["params"].update({name: value})
