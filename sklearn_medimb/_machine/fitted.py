"""Fitted attributes: all of a fit, or all of the one before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def all_or_nothing(estimator: Any) -> Iterator[None]:
    """Give an estimator its fitted attributes back if the block fails.

    Parameters
    ----------
    estimator : estimator
        Whose attributes the block sets. It must set them anew and not change what they hold.
    """

    def fitted() -> dict[str, Any]:
        names = [k for k in vars(estimator) if k.endswith("_") and not k.startswith("_")]
        return {name: vars(estimator)[name] for name in names}

    before = fitted()
    try:
        yield
    except BaseException:
        for name in fitted():
            delattr(estimator, name)
        vars(estimator).update(before)
        raise
