"""What a model costs, computed from its config alone.

Convention: a multiply-add counts as 2 FLOPs; matrix products and convolutions are counted, attention's included;
norms, activations and softmax are not. Training costs three times the forward pass. This is the convention of
Scaling Vision Transformers' Table 2 (Swin's papers count a multiply-add as 1).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from vit_scaling import UserError, models, names
from vit_scaling.flops.attention_cnn import attention_cnn_forward
from vit_scaling.flops.resnet import resnet_forward
from vit_scaling.flops.swin import swin_forward
from vit_scaling.flops.vit import vit_forward, vit_training
from vit_scaling.models.attention_cnn import AttentionCNNConfig
from vit_scaling.models.resnet import ResNetConfig
from vit_scaling.models.swin import SwinConfig
from vit_scaling.models.vit import ViTConfig


class Cost(NamedTuple):
    """The cost of one image; parameters of the whole model, classifier included."""

    params: int
    forward_flops: float
    train_flops: float
    activation_bytes: float  # what the backward pass needs of one image, under the config's remat, about


# Of each family: (config, image size, classes) to (FLOPs, bytes of activations) of the forward pass of one image.
FORWARD: dict[type, Callable[[Any, tuple[int, int], int], tuple[float, float]]] = {
    ViTConfig: vit_forward,
    SwinConfig: swin_forward,
    ResNetConfig: resnet_forward,
    AttentionCNNConfig: attention_cnn_forward,
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

    Raises:
        UserError: the family of the model has no formula here.
    """
    if type(model_config) not in FORWARD:
        raise UserError(
            f"{type(model_config).__name__} has no formula for its FLOPs; add one to FORWARD in flops/cost.py"
        )
    shapes = parameters(model_config, image_size=image_size, num_classes=num_classes)
    forward_flops, activation_bytes = FORWARD[type(model_config)](model_config, image_size, num_classes)
    trained_flops = forward_flops
    if isinstance(model_config, ViTConfig):
        trained_flops, activation_bytes = vit_training(model_config, image_size, num_classes)
    return Cost(
        params=sum(leaf.size for leaf in shapes.values()),
        forward_flops=forward_flops,
        train_flops=3 * trained_flops,
        activation_bytes=activation_bytes,
    )
