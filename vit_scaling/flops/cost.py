"""What a model costs, from its config alone.

Convention: a multiply-add counts as 2 FLOPs; matrix products and convolutions are counted, attention's included;
norms, activations and softmax are not. Training costs three times the forward pass. This is the convention of
Scaling Vision Transformers' Table 2 (Swin's papers count a multiply-add as 1).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from vit_scaling import models, names
from vit_scaling.flops import resnet as flops_resnet
from vit_scaling.flops import swin as flops_swin
from vit_scaling.models import attention_cnn, layers, resnet, swin, vit


class Cost(NamedTuple):
    """The cost of one image; parameters of the whole model, classifier included."""

    params: int
    forward_flops: float
    train_flops: float
    activation_bytes: float  # what the backward pass needs of one image, under the config's remat, about


class Forward(NamedTuple):
    """What each model's own formula gives."""

    flops: float
    activation_bytes: float


def vit_forward(config: vit.ViTConfig, image_size: tuple[int, int], num_classes: int) -> Forward:
    """Counts a ViT. Multiply-adds per token and layer: projections 4D², MLP 2DM (SwiGLU 3DM), attention 2LD."""
    rows, columns = layers.grid_size(image_size, config.patch)
    patches = rows * columns
    prefix = vit.prefix_tokens(config)
    tokens, hidden = patches + prefix, 2 if config.mlp_kind == "swiglu" else 1
    width, mlp = config.width, config.mlp
    block = tokens * (4 * width**2 + (1 + hidden) * width * mlp) + 2 * tokens**2 * width
    macs = config.depth * block + patches * config.patch[0] * config.patch[1] * 3 * width + width * num_classes
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
    return Forward(2.0 * macs, float(config.depth * kept + (inside if config.remat != "none" else 0)))


FORWARD: dict[type, Callable[[Any, tuple[int, int], int], tuple[float, float]]] = {
    vit.ViTConfig: vit_forward,
    swin.SwinConfig: flops_swin.swin_forward,
    resnet.ResNetConfig: flops_resnet.resnet_forward,
    attention_cnn.AttentionCNNConfig: flops_resnet.attention_cnn_forward,
}


def parameters(
    model_config: models.ModelConfig, *, image_size: tuple[int, int], num_classes: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns {path: shape and dtype} of every parameter, without making one."""

    def build() -> Any:
        key = jax.random.key(0)
        return models.split(models.build(model_config, image_size=image_size, num_classes=num_classes, key=key))[1]

    return names.flatten(jax.eval_shape(build))


def count(model_config: models.ModelConfig, *, image_size: tuple[int, int], num_classes: int) -> Cost:
    """Returns parameters, FLOPs and activation memory of a model.

    Args:
        model_config: the config of any model.
        image_size: height and width in pixels.
        num_classes: length of the logits.
    """
    shapes = parameters(model_config, image_size=image_size, num_classes=num_classes)
    forward = Forward(*FORWARD[type(model_config)](model_config, image_size, num_classes))
    return Cost(
        params=sum(leaf.size for leaf in shapes.values()),
        forward_flops=forward.flops,
        train_flops=3 * forward.flops,
        activation_bytes=forward.activation_bytes,
    )
