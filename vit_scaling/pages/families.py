"""What each family of models has to show: every attention layer in one form, and what is its own.

Shapes: B images, N heads, Q queries of a layer's grid, S keys that a query's row holds, H W grid, Z layers, k kernel
size, n tokens of a window, T checkpoints.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_scaling import UserError, models
from vit_scaling.models import attention_cnn, resnet, spatial, swin, vit
from vit_scaling.ops import windows

UNSEEN = -1
FILTERS = 28  # principal components of the patch embedding that are drawn, as in Dosovitskiy et al. 2021, figure 7


@dataclasses.dataclass
class Layer:
    """The attention of one layer.

    Attributes:
        name: as the page shows it.
        grid: height and width of the queries' and keys' map.
        cell: height and width of one cell of the map, in pixels of the image.
        weights: [B, N, Q, S] float32. Where it does not depend on the image, B is 1.
        extra: how many rows, and entries of each row, come before the map's cells: class token and registers.
        places: [Q, S] int16, the cell that each entry stands for; UNSEEN where the query cannot see it. None: entry
            `extra` + i is cell i.
        lines: how the page outlines windows on the image: (window, shift) in cells.
        terms: further logits by name, [B, N, Q, S], float32: what the weights are made of.
        table: [N, rows, columns] float32, a bias by offset.
    """

    name: str
    grid: tuple[int, int]
    cell: tuple[float, float]
    weights: np.ndarray
    extra: int = 0
    places: np.ndarray | None = None
    lines: tuple[int, int] | None = None
    terms: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    table: np.ndarray | None = None

    def spread(self, rows: np.ndarray) -> np.ndarray:
        """Returns rows [..., Q, S] as maps [..., Q, H W], with NaN where a query cannot see."""
        cells = math.prod(self.grid)
        if self.places is None:
            return rows[..., self.extra :]
        maps = np.full((*rows.shape[:-1], cells), np.nan, np.float32)
        for query, places in enumerate(self.places):
            seen = places != UNSEEN
            maps[..., query, places[seen]] = rows[..., query, seen]
        return maps

    def distances(self) -> np.ndarray:
        """Returns how far each head looks, in pixels: the mean over images and queries of the mean distance, [N]."""
        H, W = self.grid
        y, x = (axis.reshape(-1) for axis in np.mgrid[:H, :W])
        distance = np.hypot((y[:, None] - y) * self.cell[0], (x[:, None] - x) * self.cell[1]).astype(np.float32)
        rows = self.weights[:, :, self.extra :]
        if self.places is None:
            rows = rows[..., self.extra :]
        else:
            seen = self.places != UNSEEN
            distance = np.where(
                seen, np.take_along_axis(distance, np.where(seen, self.places, 0).astype(int), axis=1), 0
            )
        share = np.maximum(rows.sum(axis=-1), 1e-30)
        return (np.einsum("bnqs,qs->bnq", rows, distance) / share).mean(axis=(0, 2))


@dataclasses.dataclass
class Found:
    """Everything that a model shows of some images.

    Attributes:
        layers: in the order of the network.
        extra: names of the tokens before the map's: "class token", "register 1", ...
        maps: maps by name that belong to no layer, [B, N, Q, S] or [B, N, 1, S]; of shape Q by the query.
        signed: those of them that have signs, between -1 and 1.
        filters: [F, h, w, 3] uint8.
        centers: [T, Z, N, 2] and
        covariances: [T, Z, N, 2, 2] of Gaussian heads, in cells, rows first; T is 1 unless checkpoints are given.
    """

    layers: list[Layer]
    extra: tuple[str, ...] = ()
    maps: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    signed: tuple[str, ...] = ()
    filters: np.ndarray | None = None
    centers: np.ndarray | None = None
    covariances: np.ndarray | None = None


def look(model: Any, images: Any) -> Found:
    """Returns what a model shows of images [B, H, W, 3], as the model sees them.

    Raises:
        UserError: the model has no attention.
    """
    families = (
        (vit.ViTConfig, _vit),
        (swin.SwinConfig, _swin),
        (resnet.ResNetConfig, _resnet),
        (attention_cnn.AttentionCNNConfig, _attention_cnn),
    )
    for config_class, function in families:
        if isinstance(model.config, config_class):
            return function(model, images)
    raise UserError(f"no page can be made of a {type(model.config).__name__}")


def computed(model: Any, images: Any, function: Callable[[Any, Any], Any]) -> Any:
    """Returns function(model, images), compiled as one program, with NumPy arrays."""
    graphdef, parameters, statistics = models.split(model)
    call = jax.jit(lambda p, s, x: function(models.merge(graphdef, p, s), x))
    return jax.tree.map(np.asarray, call(parameters, statistics, images))


def _vit(model: Any, images: Any) -> Found:
    maps, tokens, probed = computed(model, images, _vit_arrays)
    grid = images.shape[1] // model.config.patch[0], images.shape[2] // model.config.patch[1]
    cells = math.prod(grid)
    extra = maps.shape[-1] - cells
    registers = model.config.registers
    names = (*["class token"] * (extra - registers), *(f"register {number + 1}" for number in range(registers)))
    cell = (float(model.config.patch[0]), float(model.config.patch[1]))
    layers = [Layer(f"layer {z + 1}", grid, cell, weights, extra) for z, weights in enumerate(maps)]
    found = Found(layers, names, filters=filters(np.asarray(model.embedding.kernel[...])))
    found.maps["rollout"] = rollout(maps)[:, None]
    found.maps["similarity of features"] = cosines(tokens[:, extra:])[:, None]
    found.signed = ("similarity of features",)
    if getattr(model, "position_embedding", None) is not None:
        positions = np.asarray(model.position_embedding[...])[-cells:]
        found.maps["similarity of position embeddings"] = cosines(positions[None])[:, None]
        found.signed += ("similarity of position embeddings",)
    if probed is not None:
        found.maps["attention of the MAP probe"] = probed[..., -cells:]
    if names[:1] == ("class token",):
        found.maps["attention of the class token, last layer"] = maps[-1][:, :, :1, extra:]
    return found


def _vit_arrays(model: Any, images: Any) -> tuple[Any, Any, Any]:
    """Returns (attention, tokens after the last norm, attention of the MAP probe or None)."""
    tokens = model.encode(images).astype(jnp.float32)
    probed = None
    if model.pool is not None:
        probe = jnp.broadcast_to(model.pool.probe[...][None], (tokens.shape[0], 1, tokens.shape[2]))
        cells = (images.shape[1] // model.config.patch[0]) * (images.shape[2] // model.config.patch[1])
        read = tokens if getattr(model.config, "pool_prefix", False) else tokens[:, -cells:]
        probed = model.pool.attention.weights(probe, context_BSD=read)
    return model.attention_maps(images), tokens, probed


def rollout(maps: np.ndarray) -> np.ndarray:
    """Returns [B, L, L]: attention through all layers, with half of each for its residual branch.

    Abnar and Zuidema 2020 (arXiv 2005.00928), section 3; heads are averaged.

    Args:
        maps: [Z, B, N, L, L].
    """
    through = np.eye(maps.shape[-1], dtype=np.float32)[None]
    for layer in maps:
        through = (0.5 * layer.mean(axis=1) + 0.5 * np.eye(maps.shape[-1], dtype=np.float32)) @ through
    return through


def cosines(rows: np.ndarray) -> np.ndarray:
    """Returns the cosine of each pair of rows [..., L, D], [..., L, L]."""
    unit = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
    return np.clip(unit @ np.swapaxes(unit, -1, -2), -1, 1).astype(np.float32)


def filters(kernel: np.ndarray) -> np.ndarray:
    """Returns the first principal components of a patch embedding [h, w, 3, D] as uint8 pictures [F, h, w, 3]."""
    h, w, channels, width = kernel.shape
    rows = kernel.reshape(-1, width).T.astype(np.float64)
    parts = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)[2][:FILTERS].reshape(-1, h, w, channels)
    reach = np.abs(parts).max(axis=(1, 2, 3), keepdims=True)
    return np.rint(127.5 + 127.5 * parts / np.maximum(reach, 1e-12)).astype(np.uint8)


def _swin(model: Any, images: Any) -> Found:
    config, size = model.config, (images.shape[1], images.shape[2])
    grids = swin.stage_grids(config, size)
    layers = []
    for s, stage in enumerate(computed(model, images, lambda model, images: model.attention_maps(images))):
        own = getattr(model, f"stage{s + 1}")
        H, W = grids[s]
        window, shift = windows.window_and_shift(H, W, own.window, config.shift_rule)
        shift = shift if config.shifted else 0
        cell = (float(config.patch * 2**s),) * 2
        for number, weights in enumerate(np.asarray(stage, np.float32)):
            odd = number % 2
            block = own.blocks.shifted if odd else own.blocks.plain
            attention = _layer(block.attention, number // 2)
            moved = shift if odd else 0
            kind = f"shifted by {moved}" if moved else "plain"
            rows, places = of_windows(weights, (H, W), window, moved, config.shift_rule)
            table = np.asarray(attention.bias_table(), np.float32)
            side = math.isqrt(len(table))
            layers.append(
                Layer(
                    f"stage {s + 1}, block {number + 1} ({kind})",
                    (H, W),
                    cell,
                    rows,
                    places=places,
                    lines=(window, moved),
                    table=table.T.reshape(-1, side, side),
                )
            )
    return Found(layers)


def _layer(stack: Any, index: int) -> Any:
    """Returns one of the layers that lie stacked in a module."""
    return jax.tree.map(lambda leaf: leaf[index], stack)


def of_windows(
    weights: np.ndarray, grid: tuple[int, int], window: int, shift: int, rule: str = "official"
) -> tuple[np.ndarray, np.ndarray]:
    """Returns ([B, N, H W, n], places [H W, n]) of attention in windows [B, G, N, n, n]: each query's row.

    What a query must not see, padding and other regions of a shifted window, has no place.
    """
    H, W = grid
    places = windows.places(H, W, window, shift, rule)
    regions = windows.regions(H, W, window, shift, rule) if shift else np.zeros_like(places)
    B, _, N, n, _ = weights.shape
    rows = np.zeros((B, N, H * W, n), np.float32)
    seen = np.full((H * W, n), UNSEEN, np.int16)
    for g in range(len(places)):
        here = np.flatnonzero(places[g] >= 0)
        rows[:, :, places[g, here]] = weights[:, g][:, :, here]
        for i in here:
            seen[places[g, i]] = np.where((regions[g] == regions[g, i]) & (places[g] >= 0), places[g], UNSEEN)
    return np.where(seen == UNSEEN, np.float32(0), rows), seen


def _resnet(model: Any, images: Any) -> Found:
    layers = []
    for name, (weights, parts) in computed(model, images, _resnet_arrays).items():
        group, layer = name.split("/")
        title = f"group {group}, {'non-local' if layer == 'nonlocal' else f'block {layer}'}"
        if parts is not None:
            B, H, W, N, k, _ = weights.shape
            rows = weights.reshape(B, H * W, N, k * k).swapaxes(1, 2)
            content, row, column = parts
            position = (row[..., :, None] + column[..., None, :]).reshape(B, H * W, N, k * k).swapaxes(1, 2)
            places = of_neighbours((H, W), k)
            terms = {"content": content.reshape(B, H * W, N, k * k).swapaxes(1, 2), "position": position}
            terms = {term: centered(values, places) for term, values in terms.items()}
        else:
            if weights.ndim == 5:  # the non-local block has one head
                weights = weights[:, None]
            B, N, H, W = weights.shape[:4]
            rows, places, terms = weights.reshape(B, N, H * W, H * W), None, {}
        cell = images.shape[1] / H, images.shape[2] / W
        layers.append(Layer(title, (H, W), cell, rows, places=places, terms=terms))
    if not layers:
        raise UserError("this network has convolutions only (spatial='convolution'): there is no attention to show")
    return Found(layers)


def _resnet_arrays(model: Any, images: Any) -> dict[str, tuple[Any, Any]]:
    """Returns {name of a layer: (its attention, its terms where it is local)}."""
    return {
        name: (module.weights(x_BHWC), module.terms(x_BHWC) if isinstance(module, spatial.LocalAttention) else None)
        for name, (module, x_BHWC) in model.attention_layers(images).items()
    }


def of_neighbours(grid: tuple[int, int], kernel: int) -> np.ndarray:
    """Returns [H W, k k]: the cell of each neighbour, UNSEEN outside the image."""
    H, W = grid
    y, x = (axis.reshape(-1, 1) for axis in np.mgrid[:H, :W])
    a, c = (axis.reshape(1, -1) - kernel // 2 for axis in np.mgrid[:kernel, :kernel])
    inside = (y + a >= 0) & (y + a < H) & (x + c >= 0) & (x + c < W)
    return np.where(inside, (y + a) * W + x + c, UNSEEN).astype(np.int16)


def centered(logits: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Returns logits [B, N, Q, S] less their mean over what is seen, which the softmax ignores; 0 where nothing is."""
    seen = places != UNSEEN
    mean = (logits * seen).sum(axis=-1) / np.maximum(seen.sum(axis=-1), 1)
    return np.where(seen, logits - mean[..., None], 0).astype(np.float32)


def _attention_cnn(model: Any, images: Any) -> Found:
    by_position = model.config.position in ("quadratic", "gaussian", "learned")  # the same for every image
    shown = images[:1] if by_position else images
    maps = computed(model, shown, lambda model, images: model.attention_maps(images))
    grid = images.shape[1] // 2, images.shape[2] // 2
    layers = [Layer(f"layer {z + 1}", grid, (2.0, 2.0), weights) for z, weights in enumerate(maps)]
    found = Found(layers)
    if model.config.position in ("quadratic", "gaussian"):
        attention = model.blocks.attention
        centers, covariances = gaussians(np.asarray(attention.centers[...]), np.asarray(attention.spreads[...]))
        found.centers, found.covariances = centers[None], covariances[None]
    return found


def gaussians(centers: np.ndarray, spreads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns centers [Z, N, 2] and covariances [Z, N, 2, 2] of heads; a singular precision is widened to 1e6 cells."""
    precision = np.asarray(attention_cnn.precisions(jnp.asarray(spreads)), np.float64)
    values, vectors = np.linalg.eigh(precision)
    inverse = 1 / np.maximum(values, 1e-12)
    return centers, np.einsum("...ij,...j,...kj->...ik", vectors, np.minimum(inverse, 1e12), vectors)
