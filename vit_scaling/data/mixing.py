"""Augmentation of a whole batch, on the device: normalisation, mixup and cutmix.

Everything here runs inside the jitted step on the global batch. A batch is mixed with itself shifted by one example,
which costs one small exchange between neighbours however the batch is sharded, and the random numbers belong to the
batch and not to a device: the result does not depend on the mesh. Label smoothing belongs to the loss.

Legend: B batch, H W image height and width, C classes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from vit_scaling import UserError

GRANULARITIES = ("batch", "example")


@dataclasses.dataclass
class MixingConfig:
    """Mixup and cutmix. Zero turns either off; with both on, each draw uses one of them."""

    mixup: float = 0.0
    """alpha of the Beta(alpha, alpha) from which mixup's coefficient is drawn (arXiv 1710.09412); 0: no mixup."""
    cutmix: float = 0.0
    """alpha of cutmix's coefficient (arXiv 1905.04899), the share of the image that stays; 0: no cutmix."""
    switch: float = 0.5
    """Probability of cutmix where both are on."""
    probability: float = 1.0
    """Probability that a draw mixes at all."""
    per: str = "batch"
    """"batch": one coefficient (and box) for the whole batch; "example": one for each example."""


Channels = tuple[float, float, float]


def to_float(
    images_BHWC: UInt8[Array, "B H W C"] | Float[Array, "B H W C"],
    mean: Channels = (0.5, 0.5, 0.5),
    std: Channels = (0.5, 0.5, 0.5),
) -> Float[Array, "B H W C"]:
    """Maps images to what a model sees: float32 (image / 255 - mean) / std, channel by channel.

    Args:
        images_BHWC: values from 0 to 255.
        mean, std: of the model's config; the default maps to [-1, 1].
    """
    scale, offset = [255.0 * s for s in std], [m / s for m, s in zip(mean, std, strict=True)]
    return images_BHWC.astype(jnp.float32) / _compact(scale) - _compact(offset)


def _compact(values: list[float]) -> float | np.ndarray:
    """Returns one number where all are equal, else float32 [1, 1, 1, C]."""
    return values[0] if len(set(values)) == 1 else np.array(values, np.float32).reshape(1, 1, 1, -1)


def validate(config: MixingConfig) -> None:
    """Raises ValueError, naming the field, if `config` cannot be meant."""
    for name in ("mixup", "cutmix"):
        if (value := getattr(config, name)) < 0:
            raise UserError(
                f"mixing.{name} is the parameter of a Beta distribution and cannot be {value}; 0 turns it off"
            )
    for name in ("switch", "probability"):
        if not 0 <= (value := getattr(config, name)) <= 1:
            raise UserError(f"mixing.{name} is a probability and cannot be {value}; give a number from 0 to 1")
    if config.per not in GRANULARITIES:
        raise UserError(f"mixing.per is {config.per!r}; choose one of {', '.join(GRANULARITIES)}")


def mix(
    config: MixingConfig,
    key: Key[Array, ""] | Array,
    images_BHWX: Float[Array, "B H W X"],
    targets_BC: Float[Array, "B C"],
) -> tuple[Float[Array, "B H W X"], Float[Array, "B C"]]:
    """Mixes every example with the one before it in the batch (the first with the last).

    Args:
        config: which mixing, how strong, how often.
        key: a JAX random key; equal keys give equal results on any mesh.
        images_BHWX: float32 images of any number of channels.
        targets_BC: float32 targets, for instance one-hot.

    Returns:
        Images and targets of the same shapes: own * weight + neighbour * (1 - weight). Mixup's weight is one number
        for the image; cutmix's is 0 inside a box and 1 outside it, and its target weight is the share outside.

    Raises:
        UserError: a field of `config` is out of range.
    """
    validate(config)
    if not config.mixup and not config.cutmix:
        return images_BHWX, targets_BC
    B, H, W, _ = images_BHWX.shape
    draws = B if config.per == "example" else 1
    key_apply, key_switch, key_mixup, key_cutmix, key_y, key_x = jax.random.split(key, 6)

    # Per draw (leading axis of length `draws`): the share that stays, and where in the image it stays.
    keep = jnp.ones((draws, 1), jnp.float32)
    keep_HW = jnp.ones((draws, 1, 1, 1), jnp.float32)
    if config.mixup:
        keep = jax.random.beta(key_mixup, config.mixup, config.mixup, (draws, 1), jnp.float32)
        keep_HW = keep[:, :, None, None]
    if config.cutmix:
        ratio = jax.random.beta(key_cutmix, config.cutmix, config.cutmix, (draws, 1), jnp.float32)
        side = jnp.sqrt(1.0 - ratio)
        inside_H = _span(key_y, side, H)
        inside_W = _span(key_x, side, W)
        outside_HW = 1.0 - inside_H[:, :, None] * inside_W[:, None, :]
        outside = outside_HW.mean(axis=(1, 2))[:, None]  # the box may be clipped at the border: count what is left
        share = config.switch if config.mixup else 1.0
        use_cutmix = jax.random.bernoulli(key_switch, share, (draws, 1))
        keep = jnp.where(use_cutmix, outside, keep)
        keep_HW = jnp.where(use_cutmix[:, :, None, None], outside_HW[..., None], keep_HW)
    apply = jax.random.bernoulli(key_apply, config.probability, (draws, 1))
    keep = jnp.where(apply, keep, 1.0)
    keep_HW = jnp.where(apply[:, :, None, None], keep_HW, 1.0)

    # Pixel by pixel one product each: where the weight is exactly 0 or 1 the result is exactly one of the two images.
    images = images_BHWX * keep_HW + jnp.roll(images_BHWX, 1, axis=0) * (1.0 - keep_HW)
    targets = targets_BC * keep + jnp.roll(targets_BC, 1, axis=0) * (1.0 - keep)
    return images, targets


def _span(key: Array, side: Float[Array, "draws 1"], length: int) -> Float[Array, "draws length"]:
    """Returns 1 where a pixel lies in a span of `side` * length around a uniform centre, cut at the border, else 0."""
    centre = jax.random.uniform(key, side.shape, jnp.float32)
    position = (jnp.arange(length, dtype=jnp.float32)[None, :] + 0.5) / length
    return (jnp.abs(position - centre) < side / 2).astype(jnp.float32)
