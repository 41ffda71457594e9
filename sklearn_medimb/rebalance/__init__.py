"""Stage two of two-stage methods: rebalanced linear heads on features.

Decoupling [1]_ trains a network on the data as they are, then rebalances its classifier with the
features frozen. Each head here is a small scikit-learn classifier on features, for use behind any
encoder, and what ``rebalance=`` of a two-stage estimator names:

==================  ==================================  ==========================================
name                class                               head
==================  ==================================  ==========================================
"crt"               `ClassifierRetraining`              fitted anew, all classes weighing the same
"lws"               `LearnableWeightScaling`            one factor per class on the given logits
"tau_norm"          `TauNormalization`                  class vectors divided by their norms
"ncm"               `NearestClassMean`                  cosine with the class means
"balanced_softmax"  `BalancedSoftmax`                   fitted anew, with the class prior added
"logit_adjust"      `LogitAdjustment`                   given logits minus the log of the prior
"virtual"           `VirtualFeatureCalibration`         fitted to Gaussians of the classes
"none"              ``LogitAdjustment(tau=0)``          the given head as it is
==================  ==================================  ==========================================

"Given" is the head of stage one, ``coef_init`` and ``intercept_init`` of ``fit``. Without them a
head that needs one begins with multinomial logistic regression.

With the features frozen every one of these problems is small and convex. They are solved to their
minimum instead of by a few epochs of gradient steps: no learning rate, no sampling noise. Sampling
classes at equal rates has, in expectation, the loss that weighs classes equally; that is minimised.

References
----------
.. [1] B. Kang et al., "Decoupling representation and classifier for long-tailed recognition",
   ICLR 2020.

Imports `_data`, `_machine`, `_parameters`, `losses`, `over_sampling`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sklearn.base import clone

from sklearn_medimb.rebalance._base import RebalancedHead
from sklearn_medimb.rebalance._heads import (
    BalancedSoftmax,
    ClassifierRetraining,
    LearnableWeightScaling,
    LogitAdjustment,
    NearestClassMean,
    TauNormalization,
)
from sklearn_medimb.rebalance._virtual import VirtualFeatureCalibration

__all__ = [
    "HEADS",
    "BalancedSoftmax",
    "ClassifierRetraining",
    "LearnableWeightScaling",
    "LogitAdjustment",
    "NearestClassMean",
    "RebalancedHead",
    "TauNormalization",
    "VirtualFeatureCalibration",
    "resolve_head",
]

HEADS: dict[str, Callable[[], RebalancedHead]] = {
    "crt": ClassifierRetraining,
    "lws": LearnableWeightScaling,
    "tau_norm": TauNormalization,
    "ncm": NearestClassMean,
    "balanced_softmax": BalancedSoftmax,
    "logit_adjust": LogitAdjustment,
    "virtual": VirtualFeatureCalibration,
    "none": lambda: LogitAdjustment(tau=0.0),
}
"""Heads by name."""


def resolve_head(rebalance: Any, name: str = "rebalance") -> Any:
    """Turn what a user may pass as `rebalance` into an unfitted head.

    Parameters
    ----------
    rebalance : str or classifier
        A name of ``HEADS``, or any scikit-learn classifier on features.
    name : str, default="rebalance"
        What errors call it.

    Returns
    -------
    head : classifier
        A new one, not fitted.

    Raises
    ------
    ValueError
        If the name is unknown.
    TypeError
        If it is no classifier.
    """
    if isinstance(rebalance, str):
        if rebalance not in HEADS:
            raise ValueError(f"{name}={rebalance!r} must be one of {list(HEADS)}.")
        return HEADS[rebalance]()
    scores = hasattr(rebalance, "predict_proba") or hasattr(rebalance, "decision_function")
    if isinstance(rebalance, type) or not (hasattr(rebalance, "fit") and scores):
        raise TypeError(
            f"{name}={rebalance!r} must be one of {list(HEADS)} or a scikit-learn classifier "
            "with predict_proba or decision_function, such as ClassifierRetraining(alpha=1.0)."
        )
    return clone(rebalance)
