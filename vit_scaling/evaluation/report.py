"""Everything that a set says about a classifier, from its logits: accuracies, calibration, confusions.

Shapes: N examples, M classes, K classes of the labels (which must be M).
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import expit, logsumexp, softmax

from vit_scaling import UserError

BINS = 15


class Report(NamedTuple):
    """Numbers by name, and tables.

    numbers: "top1", "top5", "loss", "calibration_error", "mean_class_accuracy", "examples", "left_out".
    confusion: counts [M, M], rows labels and columns predictions; an image of several labels counts in each of them,
        unless its prediction is one of them: then in that alone.
    bins: of the calibration, those that are not empty: "confidence", "accuracy", "share".
    """

    numbers: dict[str, float]
    confusion: np.ndarray
    bins: list[dict[str, float]]


def report(
    logits_NM: Float[np.ndarray, "N M"], labels: Int[np.ndarray, "N"] | Float[np.ndarray, "N K"], *, loss: str
) -> Report:
    """Returns what logits and labels say.

    With several labels an image, a prediction is right if it is one of them, and images without any are left out:
    the protocol of ReaL (Beyer et al. 2020, arXiv 2006.07159). The calibration error is the mean gap between confidence
    and accuracy over 15 equal bins of confidence (Guo et al. 2017, arXiv 1706.04599).

    Args:
        logits_NM: a row for each image.
        labels: a class an image, or multi-hot rows.
        loss: "softmax" or "sigmoid", which the model was trained with: it says what probability a logit means.

    Raises:
        UserError: no image has a label, or a label is none of the model's classes.
    """
    classes = logits_NM.shape[1]
    if labels.ndim == 1 and len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(f"a label is {labels.max()}, and the model has the classes 0 to {classes - 1}")
    if labels.ndim == 2 and labels.shape[1] != classes:
        raise UserError(f"the labels are of {labels.shape[1]} classes, the model has {classes}")
    hot_NM = np.eye(classes)[labels] if labels.ndim == 1 else (labels > 0).astype(np.float64)
    labelled = hot_NM.any(axis=1)
    if not labelled.any():
        raise UserError("no image of the set has a label")
    left_out = int((~labelled).sum())
    logits_NM, hot_NM = logits_NM[labelled].astype(np.float64), hot_NM[labelled]
    order_NM = np.argsort(-logits_NM, axis=1, kind="stable")
    rows = np.arange(len(logits_NM))
    prediction = order_NM[:, 0]
    right = hot_NM[rows, prediction] > 0
    top5 = np.take_along_axis(hot_NM, order_NM[:, :5], axis=1).any(axis=1)
    if loss == "softmax":
        confidence = softmax(logits_NM, axis=1)[rows, prediction]
        share_NM = hot_NM / hot_NM.sum(axis=1, keepdims=True)
        each = logsumexp(logits_NM, axis=1) - (share_NM * logits_NM).sum(axis=1)
    else:
        confidence = expit(logits_NM[rows, prediction])
        each = (np.logaddexp(0, logits_NM) - hot_NM * logits_NM).sum(axis=1)
    bins = _bins(confidence, right)
    # One row of the table for each image: of its labels, the one that was predicted or all of them.
    counted_NM = np.where(right[:, None], np.eye(classes)[prediction], hot_NM)
    confusion = (counted_NM.T @ np.eye(classes)[prediction]).astype(np.int64)
    total = confusion.sum(axis=1)
    numbers = {
        "top1": right.mean(),
        "top5": top5.mean(),
        "loss": each.mean(),
        "calibration_error": sum(row["share"] * abs(row["confidence"] - row["accuracy"]) for row in bins),
        "mean_class_accuracy": (np.diag(confusion)[total > 0] / total[total > 0]).mean(),
        "examples": len(logits_NM),
        "left_out": left_out,
    }
    return Report({name: float(value) for name, value in numbers.items()}, confusion, bins)


def _bins(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, float]]:
    number = np.minimum((confidence * BINS).astype(int), BINS - 1)
    rows: list[dict[str, Any]] = []
    for index in range(BINS):
        members = number == index
        if members.any():
            means = {"confidence": confidence[members].mean(), "accuracy": right[members].mean()}
            rows.append({name: float(value) for name, value in means.items()} | {"share": float(members.mean())})
    return rows
