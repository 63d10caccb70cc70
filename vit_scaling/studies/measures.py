"""What claims need to know of a finished run's weights beyond its evaluation: heads, layers replaced, other windows.

Each function takes the folder of a run and its config, and returns further metrics for `claims.Claim.measure`.
Shapes: B batch, H W image or map, C channels, D width, Z layers, N heads, S shifts.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vit_scaling import UserError, interop
from vit_scaling.config import Config
from vit_scaling.data.sources import Source, open_source
from vit_scaling.evaluation import model as evaluation
from vit_scaling.evaluation.network import to_float
from vit_scaling.evaluation.passes import one_pass
from vit_scaling.interop import Weights
from vit_scaling.models import attention_cnn, spatial, swin
from vit_scaling.models.resnet import Bottleneck, ResNet
from vit_scaling.parallel import mesh as mesh_lib

EARLY = 2  # layers from the first on in which heads are expected on a grid of shifts (arXiv 1911.03584, figure 3)
SHARP = 46.0  # of heads: all of float32's attention lies on one pixel


def heads(folder: Path, config: Config) -> dict[str, float]:
    """Returns where the Gaussian heads of the first two layers look, on average (arXiv 1911.03584, section 4.2).

    "heads/off_grid" is the distance of a center from the nearest whole shift in tokens, 0.38 for centers drawn at
    random; "heads/one_token" the largest share of attention that a head gives to one shift; "heads/shifts" the number
    of different shifts that the heads of a layer are nearest to.
    """
    leaves = interop.read(folder).leaves
    centers_ZN2 = leaves["blocks/attention/centers"][:EARLY].astype(np.float64)
    spreads = leaves["blocks/attention/spreads"][:EARLY]
    precisions_ZN22 = np.asarray(attention_cnn.precisions(jnp.asarray(spreads)), np.float64)
    nearest_ZN2 = np.round(centers_ZN2)
    reach = int(np.abs(nearest_ZN2).max()) + 3
    shifts_S2 = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1).T
    away_ZNS2 = shifts_S2[None, None] - centers_ZN2[:, :, None]
    logits_ZNS = -0.5 * np.einsum("ZNSi,ZNij,ZNSj->ZNS", away_ZNS2, precisions_ZN22, away_ZNS2)
    weights_ZNS = np.exp(logits_ZNS - logits_ZNS.max(-1, keepdims=True))
    weights_ZNS /= weights_ZNS.sum(-1, keepdims=True)
    return {
        "heads/off_grid": float(np.linalg.norm(centers_ZN2 - nearest_ZN2, axis=-1).mean()),
        "heads/one_token": float(weights_ZNS.max(-1).mean()),
        "heads/shifts": float(np.mean([len({tuple(shift) for shift in layer}) for layer in nearest_ZN2])),
    }


def pruned(folder: Path, config: Config) -> dict[str, float]:
    """Returns how many heads `attention_cnn.prunable_heads` names, and what accuracy changes by without them."""
    weights = interop.read(folder)
    assert isinstance(weights.config, attention_cnn.AttentionCNNConfig)
    general = weights.config.position == "gaussian"  # a round Gaussian is never singular
    found = attention_cnn.prunable_heads(jnp.asarray(weights.leaves["blocks/attention/spreads"])) if general else ()
    without = dataclasses.replace(weights, config=dataclasses.replace(weights.config, pruned_heads=found))
    change = _accuracy(without, config) - _accuracy(weights, config) if found else 0.0
    return {"pruned/heads": float(len(found)), "pruned/accuracy_change": change}


def replaced(folder: Path, config: Config) -> dict[str, float]:
    """Replaces every 3 x 3 convolution of a residual network by the attention layer that equals it.

    Returns the number of layers, the share of test images of which the prediction changes, and the largest difference
    of a logit (arXiv 1911.03584, theorem 1).
    """
    original, other, count = interop.load(folder), interop.load(folder), 0
    assert isinstance(other, ResNet)
    for block in [module for _, module in nnx.iter_modules(other) if isinstance(module, Bottleneck)]:
        block.spatial, count = _attention(block.spatial), count + 1
    other.stem, count = _attention(other.stem), count + 1
    logits = jax.jit(lambda images_BHWC: (original(images_BHWC), other(images_BHWC)))
    changed, largest, total = 0, 0.0, 0
    for images_BHWC, real_B in _test_images(config):
        before_BM, after_BM = (np.asarray(rows)[real_B] for rows in logits(to_float(config.model, images_BHWC)))
        changed += int((before_BM.argmax(-1) != after_BM.argmax(-1)).sum())
        largest, total = max(largest, float(np.abs(before_BM - after_BM).max())), total + len(before_BM)
    return {"replaced/layers": float(count), "replaced/changed": changed / total, "replaced/logit": largest}


def _attention(convolution: Any) -> Any:
    if not isinstance(convolution, spatial.Conv) or convolution.kernel.ndim != 4:
        raise UserError("only single convolutions can be replaced; take a network of depth 14 with a convolution stem")
    return Strided(
        attention_cnn.convolution_to_attention(convolution.kernel[...], None, SHARP), stride=convolution.stride
    )


class Strided(nnx.Module):
    """A layer of stride 1 of whose result every `stride`-th row and column is kept."""

    def __init__(self, layer: Any, stride: int):
        self.layer, self.stride = layer, stride

    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 E"]:
        return self.layer(x_BHWC)[:, :: self.stride, :: self.stride]


def activations(folder: Path, config: Config) -> dict[str, float]:
    """Returns by how much activations grow within a Swin's first stage (arXiv 2111.09883, section 3.2 and figure 2).

    "activations/growth" is the deviation of the residual stream after the stage's last pair of blocks over that after
    its first, on one batch of test images.
    """
    model: Any = interop.load(folder)
    stage, rates_P2, blocks = model.stage1, model.drop_path_rates(), model.stage1.blocks
    images_BHWC, _ = next(_test_images(config))
    x_BHWD, deviations = jax.jit(model.tokens)(to_float(config.model, images_BHWC)), []
    for pair in range(model.config.depths[0] // 2):
        stage.blocks = jax.tree.map(lambda leaf, pair=pair: leaf[pair : pair + 1], blocks)
        x_BHWD, _ = jax.jit(functools.partial(stage.trunk, rates_P2=rates_P2[pair : pair + 1], keys_P2=None))(x_BHWD)
        deviations.append(float(jnp.std(x_BHWD)))
    return {"activations/growth": deviations[-1] / deviations[0]}


def other_window(folder: Path, config: Config, window: int) -> dict[str, float]:
    """Returns what accuracy changes by when a Swin trained with one window is used with another, without training.

    V1 resizes its bias tables bicubically, V2 asks its position network for the new offsets (arXiv 2111.09883,
    table 1).
    """
    trained = interop.read(folder)
    assert isinstance(trained.config, swin.SwinConfig)
    target = swin.transfer(trained.config, trained.image_size, window=window)
    change = _accuracy(trained.adapted(interop.Target(config=target)), config) - _accuracy(trained, config)
    return {"window/accuracy_change": change}


def swin_v2(folder: Path, config: Config, window: int) -> dict[str, float]:
    return activations(folder, config) | other_window(folder, config, window)


def _accuracy(weights: Weights, config: Config) -> float:
    model = evaluation.freeze(weights, mesh_lib.MeshConfig())
    transform, size = config.data.eval_transform, _batch_size(config)
    return evaluation.on_set(model, _test_set(config), transform, config.data, size, weights.loss).numbers["top1"]


def _test_images(config: Config) -> Iterator[tuple[Array, np.ndarray]]:
    """Yields uint8 images [B, H, W, 3] and which of them are no padding."""
    mesh, transform = mesh_lib.create(mesh_lib.MeshConfig()), config.data.eval_transform
    for batch in one_pass(_test_set(config), transform, config.data, mesh, _batch_size(config)):
        yield batch["image"], np.asarray(batch["mask"])


def _test_set(config: Config) -> Source:
    assert config.evaluation.test is not None
    return open_source(config.evaluation.test)


def _batch_size(config: Config) -> int:
    return config.evaluation.batch_size or config.data.batch_size
