"""Which networks are there, and how do they become arrays and back? Start reading in vit.py and layers.py.

Flax NNX serves as a pytree only: modules name parameters and hold them, and jax.jit, grad, scan and checkpoint do the
rest, so the train state is a nested dict whose paths serve decay, sharding, checkpoints and weight import alike.
"""

from collections.abc import Collection
from typing import Any

from flax import nnx
from jaxtyping import PRNGKeyArray

from vit_scaling import UserError
from vit_scaling.models import attention_cnn, resnet, spatial, swin, vit

MODELS: dict[type, Any] = {
    vit.ViTConfig: vit.ViT,
    swin.SwinConfig: swin.Swin,
    resnet.ResNetConfig: resnet.ResNet,
    attention_cnn.AttentionCNNConfig: attention_cnn.AttentionCNN,
}

ModelConfig = vit.ViTConfig | swin.SwinConfig | resnet.ResNetConfig | attention_cnn.AttentionCNNConfig


def build(model_config: ModelConfig, *, image_size: tuple[int, int], num_classes: int, key: PRNGKeyArray) -> nnx.Module:
    """Builds and initializes the model that a config describes.

    Args:
        model_config: the config of any model in `MODELS`.
        image_size: height and width in pixels of the images that it will see.
        num_classes: length of the logits.
        key: random key of the initialization.

    Returns:
        A module: `model(images [B, H, W, 3] in [-1, 1], key=None)` gives logits [B, num_classes]; a key means training.
        `model.features(images)` gives [B, D], `model.attention_maps(images)` the attention of every layer.

    Raises:
        UserError: the config cannot work; the sentence names the field.
    """
    if type(model_config) not in MODELS:
        known = ", ".join(config.__name__ for config in MODELS)
        raise UserError(f"no model belongs to a config of type {type(model_config).__name__}; the types are {known}")
    model = MODELS[type(model_config)](model_config, image_size=image_size, num_classes=num_classes, key=key)
    model.image_size = tuple(image_size)  # what its positions and windows belong to; an export says it
    return model


def width_ratio(model_config: ModelConfig) -> float:
    """Returns the width over that at which the learning rate was chosen, for muP; 1 for a model without muP."""
    return vit.width_ratio(model_config) if isinstance(model_config, vit.ViTConfig) else 1.0


def split(model: nnx.Module) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Returns (graphdef, parameters, batch_stats): a hashable structure and two nested dicts of arrays."""
    graphdef, parameters, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)  # type: ignore[misc]
    return graphdef, nnx.to_pure_dict(parameters), nnx.to_pure_dict(statistics)


def merge(graphdef: Any, parameters: dict[str, Any], statistics: dict[str, Any]) -> Any:
    """Returns the module again, holding these arrays (or tracers)."""
    return nnx.merge(graphdef, parameters, statistics)


def freeze_statistics(model: nnx.Module, frozen: Collection[str]) -> None:
    """Makes every batch norm whose parameters are all frozen keep its running statistics, and normalize by them.

    Args:
        frozen: paths of the parameters that are not trained.
    """
    for path, module in nnx.iter_modules(model):
        if isinstance(module, spatial.BatchNorm):
            prefix = "".join(f"{part}/" for part in path)
            module.frozen = {f"{prefix}scale", f"{prefix}bias"} <= set(frozen)


def statistics(model: nnx.Module) -> dict[str, Any]:
    """Returns the batch_stats that a module holds: after a training call, the updated ones."""
    return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
