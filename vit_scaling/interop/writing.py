"""From `Weights` to a folder that this project, transformers or timm load."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_scaling import UserError
from vit_scaling.interop import convert, files, huggingface, native, normalisation, serving, timm
from vit_scaling.interop.normalisation import Normalisation
from vit_scaling.interop.weights import Weights
from vit_scaling.models import layers, vit

LAYOUTS = ("huggingface", "timm", "vit_scaling")


def write(
    weights: Weights,
    path: str | Path,
    *,
    layout: str,
    texts: Mapping[str, str] | None = None,
    input_type: str = serving.INPUT_TYPES[0],
) -> None:
    """Writes weights as `interop.save` does, with further text files beside them.

    Args:
        input_type: of the pixels that a "stablehlo" or "onnx" program takes; other layouts hold no program.

    Raises:
        UserError: as `interop.save`.
    """
    if layout in serving.LAYOUTS:
        serving.write(weights, path, layout=layout, input_type=input_type, texts=texts or {})
        return
    if layout not in LAYOUTS:
        raise UserError(f"layout is {layout!r}; choose one of {', '.join((*LAYOUTS, *serving.LAYOUTS))}")
    found = weights.known_normalisation()
    if layout == "vit_scaling":
        config, tensors = native.write_config(weights), native.named(weights.leaves, weights.running)
    else:
        tensors, config = _foreign(weights, layout, found)
    beside = dict(texts or {})
    if layout == "huggingface":
        processor = normalisation.processor(found, weights.image_size)
        beside["preprocessor_config.json"] = json.dumps(processor, indent=2) + "\n"
    files.write_folder(path, tensors, config, beside)


def _foreign(weights: Weights, layout: str, found: Normalisation) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns (tensors, config.json) of another library's folder."""
    library = {"huggingface": huggingface, "timm": timm}[layout]
    config = library.neighbour(weights.config, weights.image_size, weights.num_classes, found, weights.class_names)
    leaves, model = dict(weights.leaves), weights.config
    prefix: tuple[str, ...] = ()
    if isinstance(model, vit.ViTConfig):
        if "class_token" in leaves and not model.registers:
            prefix = ("class_token",)
        if vit.rotary_positions(model):
            raise UserError(f"{layout} has no such network: model.position is {model.position!r}")
        if model.position != "learned":
            # Fixed positions, or none, become a table of theirs.
            grid, width = layers.grid_size(weights.image_size, model.patch), model.width
            table = layers.sincos2d(*grid, width) if model.position == "sincos2d" else np.zeros((1, width))
            leaves["position_embedding"] = np.broadcast_to(np.asarray(table, np.float32), (grid[0] * grid[1], width))
    own = convert.unstack(leaves)
    shapes = {path: leaf.shape for path, leaf in own.items()}
    tensors = {
        entry.theirs: convert.to_theirs(entry, own)
        for entry in convert.entries(library.family_of(model, config), shapes, prefix)
    }
    if layout == "huggingface":
        tensors = {huggingface.file_name(config["model_type"], name): tensor for name, tensor in tensors.items()}
    return tensors, config
