"""What there is to compare."""

from __future__ import annotations

from functools import partial
from typing import Any

from imblearn.over_sampling import RandomOverSampler

from sklearn_medimb.methods import (
    CSSNClassifier,
    LMDClassifier,
    MetricTwoStageClassifier,
    SoftmaxClassifier,
    SPMixClassifier,
)


def common_methods(**params: Any) -> dict[str, Any]:
    """The methods of this package and the classical remedies for imbalance, by name.

    Parameters
    ----------
    **params
        What all networks share, such as ``backbone="efficientnet_lite0", image_size=128``.

    Returns
    -------
    estimators : dict from str to classifier
        Not fitted; the plain network comes first.

    Examples
    --------
    >>> from sklearn_medimb.comparison import common_methods
    >>> list(common_methods(max_epochs=20))[:3]
    ['cross-entropy', 'class weights', 'over-sampling']
    """
    softmax = partial(SoftmaxClassifier, **params)
    return {
        "cross-entropy": softmax(),
        "class weights": softmax(class_weight="balanced"),
        "over-sampling": softmax(sampler=RandomOverSampler()),
        "focal loss": softmax(loss="focal"),
        "class-balanced loss": softmax(loss="class_balanced"),
        "LDAM": softmax(loss="ldam"),
        "balanced softmax": softmax(loss="balanced_softmax"),
        "logit adjustment": softmax(loss="logit_adjusted"),
        "balanced mixup": softmax(mixup="balanced"),
        "cRT": MetricTwoStageClassifier(**params, metric_weight=0, rebalance="crt"),
        "metric two-stage": MetricTwoStageClassifier(**params),
        "CSSN": CSSNClassifier(**params),
        "LMD": LMDClassifier(**params),
        "SPMix": SPMixClassifier(**params),
    }
