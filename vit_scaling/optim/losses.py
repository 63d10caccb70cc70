"""Classification losses: each sums or normalizes over classes and averages over the batch.

Shapes: B batch, M classes.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vit_scaling import UserError

KINDS = ("softmax", "sigmoid")


@dataclasses.dataclass
class LossConfig:
    """Which loss, of the labels or of a teacher's predictions, and how the classifier's bias starts.

    Scaling ViT (section 3.3) trains with sigmoid and head_bias -10 (-6.9 for ImageNet-1k), so that at step 0 every
    class is as unlikely as it is in the data.
    """

    kind: str = "softmax"  # softmax | sigmoid
    label_smoothing: float = 0.0  # softmax: share of a target spread over all classes
    head_bias: float = 0.0  # initial value of every logit's bias
    # Distillation (Beyer et al. 2022, arXiv 2106.05237): weights, as of init.path, whose predictions for the same
    # augmented and mixed images take the place of the labels.
    teacher: str | None = None
    teacher_labels: str = (
        "soft"  # soft: its probabilities, so the gradient is the KL divergence's; hard: its best class
    )
    temperature: float = 1.0  # soft: the logits of both are divided by it


def check(config: LossConfig) -> None:
    """Raises UserError, in one sentence, for a field that cannot work."""
    if config.kind not in KINDS:
        raise UserError(f"loss.kind is {config.kind!r}; choose one of {', '.join(KINDS)}")
    if not 0 <= config.label_smoothing < 1:
        raise UserError(f"loss.label_smoothing is {config.label_smoothing}; it must be at least 0 and below 1")
    if not math.isfinite(config.head_bias):
        raise UserError(f"loss.head_bias is {config.head_bias}; it must be a finite number")
    if config.teacher_labels not in ("soft", "hard"):
        raise UserError(f"loss.teacher_labels is {config.teacher_labels!r}; choose soft or hard")
    if not 0 < config.temperature < math.inf:
        raise UserError(f"loss.temperature is {config.temperature}; it must be a positive number")
    if config.temperature != 1 and (config.teacher is None or config.teacher_labels == "hard"):
        raise UserError(
            f"loss.temperature is {config.temperature}; it is for soft labels of a loss.teacher: set it to 1"
        )
    if config.teacher is not None and config.label_smoothing:
        raise UserError("loss.label_smoothing has no meaning for a teacher's labels; set it to 0")
    if config.kind == "sigmoid" and config.label_smoothing:
        raise UserError("loss.label_smoothing has no meaning for the sigmoid loss; set it to 0 or use softmax")


def targets(labels: Int[Array, "B"] | Float[Array, "B M"], num_classes: int) -> Float[Array, "B M"]:
    """Returns one-hot rows for class numbers; rows that already are multi-hot or soft pass through."""
    return labels.astype(jnp.float32) if labels.ndim == 2 else jax.nn.one_hot(labels, num_classes)


def teacher_targets(config: LossConfig, logits_BM: Float[Array, "B M"]) -> Float[Array, "B M"]:
    """Returns the targets that a teacher's logits give."""
    if config.teacher_labels == "hard":
        return jax.nn.one_hot(jnp.argmax(logits_BM, axis=-1), logits_BM.shape[-1])
    probabilities = jax.nn.sigmoid if config.kind == "sigmoid" else jax.nn.softmax
    return probabilities(logits_BM / config.temperature)


def softmax_cross_entropy(
    logits_BM: Float[Array, "B M"], targets_BM: Float[Array, "B M"], label_smoothing: float = 0.0
) -> Float[Array, "B"]:
    """Returns -sum_M target log softmax(logits), targets moved towards uniform by `label_smoothing`.

    Targets of several classes count as a distribution: they are divided by their sum.
    """
    targets_BM = targets_BM / jnp.maximum(jnp.sum(targets_BM, axis=-1, keepdims=True), 1.0)
    targets_BM = targets_BM * (1 - label_smoothing) + label_smoothing / logits_BM.shape[-1]
    return -jnp.sum(targets_BM * jax.nn.log_softmax(logits_BM), axis=-1)


def sigmoid_cross_entropy(logits_BM: Float[Array, "B M"], targets_BM: Float[Array, "B M"]) -> Float[Array, "B"]:
    """Returns the binary cross-entropy of every class, summed over classes (Scaling ViT, section 3.3)."""
    log_p_BM, log_not_p_BM = jax.nn.log_sigmoid(logits_BM), jax.nn.log_sigmoid(-logits_BM)
    return -jnp.sum(targets_BM * log_p_BM + (1 - targets_BM) * log_not_p_BM, axis=-1)


def loss(config: LossConfig, logits_BM: Float[Array, "B M"], targets_BM: Float[Array, "B M"]) -> Float[Array, "B"]:
    """Returns the loss of each example that `config` names."""
    if config.kind == "sigmoid":
        return sigmoid_cross_entropy(logits_BM, targets_BM)
    return softmax_cross_entropy(logits_BM, targets_BM, config.label_smoothing)
