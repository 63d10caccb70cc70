"""Weights of one network for another image size, patch, window or set of classes.

Shapes: R C rows and columns of a patch, H W grid, D width, M classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from vit_scaling import UserError
from vit_scaling.models import ModelConfig, flexi, layers, swin, vit
from vit_scaling.ops import windows

# What must be equal, for its parameters mean something else in another network.
VIT_FIELDS = (
    *("width", "depth", "mlp", "heads", "position", "registers", "qk_norm", "parallel"),
    *("qkv_bias", "key_bias", "proj_bias", "mlp_bias", "norm_bias", "qk_norm_bias", "gelu", "norm_eps", "layerscale"),
    *("layerscale_mlp", "mlp_kind", "norm", "pre_norm"),
)


def adapt(
    leaves: Mapping[str, np.ndarray],
    config: ModelConfig,
    image_size: tuple[int, int],
    *,
    target: ModelConfig,
    target_image_size: tuple[int, int],
    antialias: bool = False,
) -> dict[str, np.ndarray]:
    """Returns the parameters of a network for another patch, window, image size or pooling; the rest as it is.

    ViT: positions are resampled to the new grid, square or not (bicubic); patch kernels by the pseudo-inverse of the
    resizing (FlexiViT); a class token is dropped where the target takes the mean; so are pre-logits. Swin: see
    `adapt_swin`.

    Args:
        leaves: {path: array} of `config` built for `image_size`.
        config: what they belong to.
        image_size: height and width in pixels that they were trained at.
        target: the config to adapt to.
        target_image_size: height and width in pixels of the new images.
        antialias: whether a ViT's positions are resampled as timm does; see `resize_positions`.

    Raises:
        UserError: the networks differ in a field that no resizing bridges.
    """
    if type(config) is not type(target):
        raise UserError(f"weights of a {type(config).__name__} cannot become those of a {type(target).__name__}")
    if isinstance(config, swin.SwinConfig) and isinstance(target, swin.SwinConfig):
        return _adapt_swin(leaves, config, image_size, target, target_image_size)
    if isinstance(config, vit.ViTConfig) and isinstance(target, vit.ViTConfig):
        return _adapt_vit(leaves, config, image_size, target, target_image_size, antialias)
    if (config, image_size) != (target, target_image_size):
        raise UserError(f"weights of a {type(config).__name__} can only be used as they were trained")
    return dict(leaves)


def _adapt_swin(
    leaves: Mapping[str, np.ndarray],
    config: swin.SwinConfig,
    image_size: tuple[int, int],
    target: swin.SwinConfig,
    target_image_size: tuple[int, int],
) -> dict[str, np.ndarray]:
    _same(config, target, ("shifted", "patch_norm", "gelu", "norm_eps"))
    if any(windows.rules_differ(*grid, target.window) for grid in swin.stage_grids(target, target_image_size)):
        _same(config, target, ("shift_rule",))
    trained = config.pretrained_windows or swin.stage_windows(config, image_size)
    used = target.pretrained_windows or swin.stage_windows(target, target_image_size)
    if config.version == 2 and trained != used:
        raise UserError(
            f"these weights of a Swin V2 were trained in windows of {trained}; its positions need to know: "
            f"set model.pretrained_windows to {trained}"
        )
    return adapt_swin(leaves, config, image_size, target=target, target_image_size=target_image_size)


def adapt_swin(
    leaves: Mapping[str, np.ndarray],
    config: swin.SwinConfig,
    image_size: tuple[int, int],
    *,
    target: swin.SwinConfig,
    target_image_size: tuple[int, int],
) -> dict[str, np.ndarray]:
    """Returns the parameters of a Swin for another window or image size: position tables resized, the rest as it is.

    Args: as `adapt`; `target` is the same network but for its window.

    Raises:
        UserError: the configs differ in more than their window.
    """
    for field in ("version", "width", "depths", "heads", "patch", "mlp_ratio", "absolute_position", "extra_norm_every"):
        ours, theirs = getattr(config, field), getattr(target, field)
        if ours != theirs:
            raise UserError(f"weights of a Swin with {field} {ours} cannot become one with {field} {theirs}")
    windows_after = swin.stage_windows(target, target_image_size)
    adapted = dict(leaves)
    for path, leaf in leaves.items():
        if path.endswith("/relative_position_bias_table"):
            window = windows_after[int(path.removeprefix("stage").split("/")[0]) - 1]
            adapted[path] = np.stack([windows.resize_table(np.asarray(table), window) for table in leaf])
        elif path == "position_embedding":
            old, new = swin.stage_grids(config, image_size)[0], swin.stage_grids(target, target_image_size)[0]
            adapted[path] = resize_positions(np.asarray(leaf), old, new)
    return adapted


def _adapt_vit(
    leaves: Mapping[str, np.ndarray],
    config: vit.ViTConfig,
    image_size: tuple[int, int],
    target: vit.ViTConfig,
    target_image_size: tuple[int, int],
    antialias: bool,
) -> dict[str, np.ndarray]:
    numeric = config.layerscale is not None and target.layerscale is not None
    _same(config, target, [field for field in VIT_FIELDS if not (field == "layerscale" and numeric)])
    leaves = dict(leaves)
    if config.pool != target.pool:
        if (config.pool, target.pool) != ("token", "gap"):
            raise UserError(
                f"weights of a ViT that pools by {config.pool!r} cannot pool by {target.pool!r}; only a class token "
                f"can be left out, for the mean"
            )
        del leaves["class_token"]
    if target.pre_logits and not config.pre_logits:
        raise UserError("model.pre_logits is true, and the weights have no such layer")
    if not target.pre_logits:
        leaves = {path: leaf for path, leaf in leaves.items() if not path.startswith("pre_logits/")}
    if "position_embedding" in leaves:
        old, new = layers.grid_size(image_size, config.patch), layers.grid_size(target_image_size, target.patch)
        positions = np.asarray(leaves["position_embedding"])
        if config.patches:  # as they were resized in training
            leaves["position_embedding"] = np.asarray(flexi.resize_positions(jnp.asarray(positions), old, new))
        else:
            leaves["position_embedding"] = resize_positions(positions, old, new, antialias)
    leaves["embedding/kernel"] = resize_patch(np.asarray(leaves["embedding/kernel"]), target.patch)
    return leaves


def _same(config: Any, target: Any, fields: Sequence[str]) -> None:
    for field in fields:
        ours, theirs = getattr(config, field), getattr(target, field)
        if ours != theirs:
            raise UserError(f"the weights' model.{field} is {ours!r}, and {theirs!r} is asked for; set it to {ours!r}")


def resize_positions(
    positions_LD: Float[np.ndarray, "L D"], old: tuple[int, int], new: tuple[int, int], antialias: bool = False
) -> Float[np.ndarray, "new_L D"]:
    """Returns the absolute position embedding of a grid resampled to another by bicubic interpolation.

    Without antialiasing it is what transformers' ViT, DeiT and DINOv2 and the official code of DINO do; with it, what
    timm and transformers' DINOv2 with registers do (PyTorch's interpolate with antialias=False and True).
    """
    if old == new:
        return positions_LD
    weights = antialiased_weights if antialias else windows.cubic_weights
    rows, columns = (weights(before, after) for before, after in zip(old, new, strict=True))
    resized = np.einsum("ay,bx,yxD->abD", rows, columns, positions_LD.reshape(*old, -1))
    return resized.reshape(-1, positions_LD.shape[1]).astype(positions_LD.dtype)


def antialiased_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Returns the matrix that resamples `old` points to `new` ones by cubic convolution (a = -0.5) with antialiasing.

    The kernel is as much wider as the points become fewer, and weights beyond the edges are shared out, as by Pillow.
    """
    scale = max(old / new, 1.0)
    center = (np.arange(new) + 0.5) * old / new - 0.5
    d = np.abs(np.arange(old)[None] - center[:, None]) / scale
    near = (1.5 * d - 2.5) * d * d + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    weights = np.where(d <= 1, near, np.where(d < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


def resize_patch(kernel: Float[np.ndarray, "R C 3 D"], patch: tuple[int, int]) -> Float[np.ndarray, "R2 C2 3 D"]:
    """Returns the kernel whose tokens of resized patches are nearest to the old kernel's tokens of the patches.

    In float64; see `flexi.kernel_weights`.
    """
    old = kernel.shape[:2]
    if old == tuple(patch):
        return kernel
    rows, columns = (flexi.kernel_weights(a, b) for a, b in zip(old, patch, strict=True))
    return np.einsum("ar,bc,rcxD->abxD", rows, columns, kernel.astype(np.float64)).astype(kernel.dtype)


def classes(
    leaves: Mapping[str, np.ndarray], num_classes: int, class_map: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """Returns {"head/kernel", "head/bias"} of a classifier for other classes.

    Args:
        leaves: {path: array} with the old classifier.
        num_classes: of the new classifier.
        class_map: for each new class the old one that it was; None starts afresh, from zero.

    Raises:
        UserError: the map is of another length, or names a class that there was not.
    """
    kernel, bias = leaves["head/kernel"], leaves["head/bias"]
    width, old = kernel.shape
    if class_map is not None:
        index = list(class_map)
        if len(index) != num_classes:
            raise UserError(
                f"the class map has {len(index)} entries, one for each of {num_classes} new classes are needed"
            )
        if wrong := [number for number in index if not 0 <= number < old]:
            raise UserError(f"the class map names class {wrong[0]}; the weights have classes 0 to {old - 1}")
        kernel, bias = kernel[:, index], bias[index]
    elif num_classes != old:
        kernel, bias = np.zeros((width, num_classes), np.float32), np.zeros(num_classes, np.float32)
    return {"head/kernel": kernel, "head/bias": bias}
