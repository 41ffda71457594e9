"""What the samplers share."""

from __future__ import annotations

from typing import Any

import numpy as np
from imblearn.over_sampling.base import BaseOverSampler

from sklearn_medimb._data.labels import read_labels, warn_of_marks
from sklearn_medimb._machine.fitted import all_or_nothing
from sklearn_medimb._parameters import Declaring, learned, parameter


class CheckedOverSampler(Declaring, BaseOverSampler):
    """A sampler that a refused call leaves as it was.

    Parameters
    ----------
    sampling_strategy
        Which classes grow, and to what size, as in imbalanced-learn: for two classes the wanted
        ratio minority / majority, "minority", "not minority", "not majority" (the same as "auto"),
        "all", a dict from class to number of samples, or a function from y to such a dict.
    random_state
        Seeds the draws.

    Attributes
    ----------
    sampling_strategy_
        Number of new samples of each class that grows.
    n_features_in_
        Values per sample.
    feature_names_in_
        Column names where X was a DataFrame.
    """

    sampling_strategy: Any = parameter(
        *BaseOverSampler._parameter_constraints["sampling_strategy"],
        default="auto",
        kind="float, str, dict or callable",
        search=["auto", "minority"],
    )
    random_state: Any = parameter(
        "random_state", default=None, kind="int, RandomState or None", last=True
    )

    sampling_strategy_: dict[Any, int] = learned("dict")
    n_features_in_: int = learned("int")
    feature_names_in_: Any = learned("ndarray of shape (`n_features_in_`,)")

    __init__ = object.__init__  # as declared, not imbalanced-learn's

    def fit(self, X: Any, y: Any, **params: Any) -> Any:
        """Check the input and how many samples of each class it asks for.

        Parameters
        ----------
        X : array-like of n samples
            As for ``fit_resample``, which does all the work.
        y : array-like of shape (n,)
            Class labels.
        **params
            Not used.

        Returns
        -------
        self : sampler
            With `sampling_strategy_`.
        """
        self._check_labels(y)
        with all_or_nothing(self):
            return super().fit(X, y, **params)

    def fit_resample(self, X: Any, y: Any, **params: Any) -> Any:
        """Append new samples until the classes have the wanted sizes.

        Parameters
        ----------
        X : {array-like, DataFrame, sparse matrix} of shape (n, n_features)
            Samples.
        y : array-like of shape (n,)
            Class labels.
        **params
            Of the method.

        Returns
        -------
        X_resampled : of the type of X, of shape (n_resampled, n_features)
            The resampled data.
        y_resampled : array-like of shape (n_resampled,)
            Their labels.
        """
        self._check_labels(y)
        with all_or_nothing(self):
            return super().fit_resample(X, y, **params)

    def _check_labels(self, y: Any) -> None:
        """Refuse missing labels; the labels themselves stay in the caller's container."""
        shape = np.shape(y)
        if len(shape) == 1 or (len(shape) == 2 and shape[1] == 1):  # else one-hot, or an error
            warn_of_marks(type(self).__name__, read_labels(y))
