"""What a ViT costs: multiply-adds of its matrix products, and what its backward pass keeps."""

import dataclasses

from vit_scaling.models import layers
from vit_scaling.models.vit import ViTConfig, feature_width, kept_patches, prefix_tokens


def vit_forward(
    config: ViTConfig, image_size: tuple[int, int], num_classes: int, *, training: bool = False
) -> tuple[float, float]:
    """Returns (FLOPs, bytes of activations) of the forward pass of one image, in training without dropped patches.

    Multiply-adds per token and layer: projections 4D², MLP 2DM (SwiGLU 3DM), attention 2LD.
    """
    rows, columns = layers.grid_size(image_size, config.patch)
    embedded = rows * columns
    patches = kept_patches(config, embedded) if training else embedded
    prefix = prefix_tokens(config)
    tokens, hidden = patches + prefix, 2 if config.mlp_kind == "swiglu" else 1
    width, mlp = config.width, config.mlp
    block = tokens * (4 * width**2 + (1 + hidden) * width * mlp) + 2 * tokens**2 * width
    macs = (
        config.depth * block
        + embedded * config.patch[0] * config.patch[1] * 3 * width
        + feature_width(config) * num_classes
    )
    if config.pool == "map":
        # Keys and values of every token; query, output, MLP and attention of the one probe.
        context = tokens if config.pool_prefix else patches
        macs += context * 2 * width**2 + 2 * width**2 + 2 * width * mlp + 2 * context * width
    macs += width**2 if config.pre_logits else 0
    size = 2 if config.dtype == "bfloat16" else 4
    entry = tokens * width * size
    # Inputs of both norms, their outputs, q, k, v, attended values: 8 widths; hidden units before and after GELU, or
    # of SwiGLU's gate, its other half and their product; attention weights in float32 and in the dtype of the model.
    inside = 8 * entry + (1 + hidden) * tokens * mlp * size + config.heads * tokens**2 * (4 + size)
    kept = {"none": inside, "dots": 6 * entry + hidden * tokens * mlp * size, "full": entry}[config.remat]
    return 2.0 * macs, float(config.depth * kept + (inside if config.remat != "none" else 0))


def vit_training(config: ViTConfig, image_size: tuple[int, int], num_classes: int) -> tuple[float, float]:
    """Returns (FLOPs, bytes of activations) of a training step's forward pass of one image.

    Of a FlexiViT the FLOPs are the mean over its patch sizes, and the activations those of the smallest patches.
    """
    sizes = [(side, side) for side in config.patches] or [config.patch]
    costs = [
        vit_forward(dataclasses.replace(config, patch=size), image_size, num_classes, training=True) for size in sizes
    ]
    return sum(cost for cost, _ in costs) / len(costs), max(kept for _, kept in costs)
