"""The slow reference of the attention page: full maps of every query, cell by cell, straight from `attention_maps`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_scaling import interop, models, names
from vit_scaling.data import mixing
from vit_scaling.models import attention_cnn, resnet, swin, vit
from vit_scaling.ops import windows
from vit_scaling.pages import families, images

SIZE = (28, 28)
# One tiny model of each family. Sizes do not divide windows and strides, so that padding and borders are there.
MODELS: dict[str, Any] = {
    "vit": vit.ViTConfig(width=16, depth=2, mlp=16, heads=2, patch=(7, 7), pool="token", registers=1),
    "vit_map": vit.ViTConfig(width=16, depth=2, mlp=16, heads=2, patch=(7, 7), pool="map", registers=1),
    "swin": swin.SwinConfig(width=8, depths=(2, 2), heads=(2, 2), window=3, patch=4),
    "swin_v2": swin.SwinConfig(version=2, width=8, depths=(2,), heads=(2,), window=4, patch=4),
    "sasa": resnet.ResNetConfig(
        depth=14, width=8, spatial="attention", heads=2, kernel_size=3, stem="small", groups=(4,)
    ),
    "augmented": resnet.ResNetConfig(
        depth=14, width=8, spatial="augmented", heads=2, stem="small", groups=(4,), nonlocal_after=(3,)
    ),
    "attention_cnn": attention_cnn.AttentionCNNConfig(position="gaussian", width=8, depth=2, heads=3, mlp=8),
}


def weights(name: str, num_classes: int = 4) -> interop.Weights:
    """Returns a model with random weights; nothing of it is compiled."""
    config, generator = MODELS[name], np.random.default_rng(2)
    build = functools.partial(models.build, config, image_size=SIZE, num_classes=num_classes, key=jax.random.key(1))
    _, parameters, statistics = models.split(jax.eval_shape(build))

    def fill(path: str, leaf: Any) -> np.ndarray:
        noise = generator.normal(0, 1, leaf.shape).astype(np.float32)
        if path.endswith(("scale", "spreads", "variance")):  # near the value of a fresh model
            start = np.eye(2, dtype=np.float32) if path.endswith("spreads") else np.float32(1)
            return start + 0.1 * np.abs(noise)
        return noise if path.endswith("centers") else 0.3 * noise

    leaves = {path: fill(path, leaf) for path, leaf in names.flatten(parameters).items()}
    running = {path: fill(path, leaf) for path, leaf in names.flatten(statistics).items()}
    return interop.Weights(config, SIZE, num_classes, leaves, running, "vit_scaling", False)


def pictures(count: int = 2, class_names: tuple[str, ...] | None = None) -> images.Images:
    generator = np.random.default_rng(3)
    pixels = generator.integers(0, 256, (count, *SIZE, 3), dtype=np.uint8)
    return images.Images(
        pixels, [f"picture {i}" for i in range(count)], [str(i % 4) for i in range(count)], class_names, 0
    )


def inputs(chosen: images.Images, config: Any) -> jax.Array:
    return mixing.to_float(jnp.asarray(chosen.pixels), config.mean, config.std)


def dense(model: Any, images_BHWC: Any) -> list[np.ndarray]:
    """Returns [B, N, Q, H W] of each layer, Q the queries of the map; NaN is what a query cannot see."""
    maps = families.computed(model, images_BHWC, lambda model, images: model.attention_maps(images))
    config = model.config
    if isinstance(config, vit.ViTConfig):
        cells = 16
        return [np.asarray(layer)[:, :, -cells:, -cells:] for layer in maps]
    if isinstance(config, attention_cnn.AttentionCNNConfig):
        return [np.asarray(layer) for layer in maps]
    if isinstance(config, swin.SwinConfig):
        return [
            _swin(np.asarray(block), grid, own, number % 2)
            for stage, grid, own in zip(
                maps, swin.stage_grids(config, SIZE), swin.stage_windows(config, SIZE), strict=True
            )
            for number, block in enumerate(stage)
        ]
    return [_resnet(np.asarray(layer)) for layer in maps.values()]


def _swin(block: np.ndarray, grid: tuple[int, int], window: int, shifted: int) -> np.ndarray:
    (H, W), (B, _, N, n, _) = grid, block.shape
    side, shift = windows.window_and_shift(H, W, window)
    shift = shift if shifted else 0
    full = np.full((B, N, H * W, H * W), np.nan, np.float32)
    across = -(-W // side)
    rows, columns = -(-H // side) * side, across * side

    def cell(g: int, i: int) -> tuple[int, int]:
        """Where token i of window g stood before the roll."""
        y, x = (g // across) * side + i // side, (g % across) * side + i % side
        return (y + shift) % rows, (x + shift) % columns

    def region(g: int, i: int) -> tuple[bool, bool]:
        """Which part of the last row and column of windows a token is in; the others are whole."""
        y, x = (g // across) * side + i // side, (g % across) * side + i % side
        return (y >= rows - shift, x >= columns - shift) if shift else (False, False)

    for g in range(block.shape[1]):
        for i in range(n):
            for j in range(n):
                (y, x), (v, u) = cell(g, i), cell(g, j)
                if max(y, v) < H and max(x, u) < W and region(g, i) == region(g, j):
                    full[:, :, y * W + x, v * W + u] = block[:, g, :, i, j]
    return full


def _resnet(layer: np.ndarray) -> np.ndarray:
    if layer.ndim == 5:  # non-local: [B, H, W, H, W]
        B, H, W = layer.shape[:3]
        return layer.reshape(B, 1, H * W, H * W)
    if layer.shape[2:4] == layer.shape[4:]:  # augmented: [B, N, H, W, H, W]
        B, N, H, W = layer.shape[:4]
        return layer.reshape(B, N, H * W, H * W)
    B, H, W, N, k, _ = layer.shape
    full = np.full((B, N, H * W, H * W), np.nan, np.float32)
    for y in range(H):
        for x in range(W):
            for a in range(k):
                for c in range(k):
                    v, u = y + a - k // 2, x + c - k // 2
                    if 0 <= v < H and 0 <= u < W:
                        full[:, :, y * W + x, v * W + u] = layer[:, y, x, :, a, c]
    return full


@functools.cache  # the tests of one file share what is compiled
def looked(name: str) -> tuple[Any, Any, families.Found]:
    """Returns (model, its input images, what a page shows of them)."""
    model: Any = weights(name).module()
    images_BHWC = inputs(pictures(), model.config)
    return model, images_BHWC, families.look(model, images_BHWC)


@functools.cache
def expected_of(name: str) -> list[np.ndarray]:
    return dense(*looked(name)[:2])
