"""Fitted estimators as files that hold data alone.

One safetensors file: every array under a plain name, so that other tools read the weights, and one
JSON text with the rest, parameters included. Nothing in it is code, and reading it runs none:
classes are looked up in a fixed list, networks are rebuilt from the parameters. A class of one's
own is read where the caller trusts it.

>>> from sklearn_medimb.persistence import load, save
>>> save(classifier, "classifier.safetensors")  # doctest: +SKIP
>>> classifier = load("classifier.safetensors")  # doctest: +SKIP
>>> classifier = load("own.safetensors", trusted=[MyClassifier])  # doctest: +SKIP

A file is neither secret nor signed: its digest finds damage, but whoever writes files can write one
that loads, with weights and parameters of their choice. It fetches nothing, calls no function that
the file names, and takes little more memory than the file, and the start that it names, are long.

Imports `_data`, `_machine`, `backbones`, `base`, `rebalance`.
"""

from __future__ import annotations

from sklearn_medimb.persistence._files import load, save

__all__ = ["load", "save"]
