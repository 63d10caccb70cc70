"""From `Weights` to a folder that this project, transformers or timm load."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from vit_scaling import UserError
from vit_scaling.interop import convert, files, huggingface, native, normalisation, serving, timm
from vit_scaling.interop.normalisation import Normalisation
from vit_scaling.interop.weights import Weights
from vit_scaling.models import layers, swin, vit

LAYOUTS = ("huggingface", "timm", "vit_scaling")


def write(
    weights: Weights,
    path: str | Path,
    *,
    layout: str,
    texts: Mapping[str, str] | None = None,
    input_type: str = serving.INPUT_TYPES[0],
    accept_norm_eps: bool = False,
) -> None:
    """Writes weights as `interop.save` does, with further text files beside them.

    Args:
        input_type: of the pixels that a "stablehlo" or "onnx" program takes; other layouts hold no program.
        accept_norm_eps: whether timm's epsilon of the norms may take the place of one that timm cannot express.

    Raises:
        UserError: as `interop.save`.
    """
    if layout in serving.LAYOUTS:
        serving.write(weights, path, layout=layout, input_type=input_type, texts=texts or {})
        return
    if layout not in LAYOUTS:
        raise UserError(f"layout is {layout!r}; choose one of {', '.join((*LAYOUTS, *serving.LAYOUTS))}")
    found = weights.known_normalisation()
    if layout == "timm":
        weights = _with_epsilon(weights, accept_norm_eps)
    if layout == "vit_scaling":
        config, tensors = native.write_config(weights), native.named(weights.leaves, weights.running)
    else:
        tensors, config = _foreign(weights, layout, found)
    beside = dict(texts or {})
    if layout == "huggingface":
        if weights.loss == "sigmoid" and weights.num_classes > 1:
            config["problem_type"] = "multi_label_classification"
        processor = normalisation.processor(found, weights.image_size)
        beside["preprocessor_config.json"] = json.dumps(processor, indent=2) + "\n"
    files.write_folder(path, tensors, config, beside)


def _with_epsilon(weights: Weights, accepted: bool) -> Weights:
    """Returns the weights with the epsilon that timm's networks of this kind have.

    Raises:
        UserError: it is another one and was not accepted; the sentence says what it changes.
    """
    config = weights.config
    if not isinstance(config, vit.ViTConfig | swin.SwinConfig) or timm.nearest_epsilon(config) == config.norm_eps:
        return weights
    epsilon = timm.nearest_epsilon(config)
    other = dataclasses.replace(weights, config=dataclasses.replace(config, norm_eps=epsilon))
    if not accepted:
        images = np.random.default_rng(0).standard_normal((2, *weights.image_size, 3)).astype(np.float32)
        networks: list[Any] = [weights.module(), other.module()]
        one, two = (np.asarray(network.features(jnp.asarray(images))) for network in networks)
        kernel = weights.leaves["head/kernel"]
        one, two = (values @ kernel if kernel.size else values for values in (one, two))
        raise UserError(
            f"timm cannot express model.norm_eps {config.norm_eps:g}; with its {epsilon:g} the "
            f"{'logits' if kernel.size else 'features'} of two images of noise change by up to "
            f"{np.abs(one - two).max():.1e} (standard deviation {one.std():.1e}): accept that with --accept_norm_eps"
        )
    return other


def _foreign(weights: Weights, layout: str, found: Normalisation) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns (tensors, config.json) of another library's folder."""
    library = {"huggingface": huggingface, "timm": timm}[layout]
    config = library.neighbour(weights.config, weights.image_size, weights.num_classes, found, weights.class_names)
    leaves, model = dict(weights.leaves), weights.config
    prefix: tuple[str, ...] = ()
    if isinstance(model, vit.ViTConfig):
        # timm gives the class token beside registers no row of the position table; transformers does.
        if "class_token" in leaves and (not model.registers or layout == "huggingface"):
            prefix = ("class_token",)
        rotary = vit.rotary_positions(model)
        if rotary and config.get("model_type") != "dinov3_vit":
            raise UserError(f"{layout} has no such network: model.position is {model.position!r}")
        if model.position != "learned" and not rotary:
            # Fixed positions, or none, become a table of theirs.
            grid, width = layers.grid_size(weights.image_size, model.patch), model.width
            table = layers.sincos2d(*grid, width) if model.position == "sincos2d" else np.zeros((1, width))
            leaves["position_embedding"] = np.broadcast_to(np.asarray(table, np.float32), (grid[0] * grid[1], width))
    if not weights.num_classes:
        leaves = {path: leaf for path, leaf in leaves.items() if not path.startswith("head/")}
    own = convert.unstack(leaves)
    shapes = {path: leaf.shape for path, leaf in own.items()}
    tensors = {
        entry.theirs: convert.to_theirs(entry, own)
        for entry in convert.entries(library.family_of(model, config), shapes, prefix)
    }
    if layout == "huggingface":
        tensors |= huggingface.idle_tensors(config)
        tensors = {huggingface.file_name(config, name): tensor for name, tensor in tensors.items()}
    return tensors, config
