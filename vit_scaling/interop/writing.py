"""From `Weights` to a folder that this project, transformers or timm load."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_scaling import UserError
from vit_scaling.interop import convert, files, huggingface, native, normalisation, timm
from vit_scaling.interop.layout import Layout
from vit_scaling.interop.normalisation import Normalisation
from vit_scaling.interop.weights import Weights
from vit_scaling.models import layers, vit

LAYOUTS: dict[str, Layout | None] = {"huggingface": huggingface.LAYOUT, "timm": timm.LAYOUT, "vit_scaling": None}


def write(weights: Weights, path: str | Path, *, layout: str, texts: Mapping[str, str] | None = None) -> None:
    """Writes weights as `interop.save` does, with further text files beside them.

    Raises:
        UserError: as `interop.save`.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout is {layout!r}; choose one of {', '.join(LAYOUTS)}")
    foreign = LAYOUTS[layout]
    found = weights.known_normalisation()
    if foreign is None:
        config, tensors = native.write_config(weights), native.named(weights.leaves, weights.running)
    else:
        tensors, config = _foreign(weights, foreign, found)
    beside = dict(texts or {})
    if layout == "huggingface":
        processor = normalisation.processor(found, weights.image_size)
        beside["preprocessor_config.json"] = json.dumps(processor, indent=2) + "\n"
    files.write_folder(path, tensors, config, beside)


def _foreign(weights: Weights, layout: Layout, found: Normalisation) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns (tensors, config.json) of another library's folder."""
    assert layout.neighbour is not None
    config = layout.neighbour(weights.config, weights.image_size, weights.num_classes, found, weights.class_names)
    leaves, model = dict(weights.leaves), weights.config
    prefix_rows = 0
    if isinstance(model, vit.ViTConfig):
        has_class = vit.prefix_tokens(model) > model.registers
        prefix_rows = int(has_class and not model.registers)
        if vit.rotary_positions(model):
            raise UserError(f"{layout.name} has no such network: model.position is {model.position!r}")
        if model.position != "learned":
            # Fixed positions, or none, become a table of theirs.
            grid, width = layers.grid_size(weights.image_size, model.patch), model.width
            table = layers.sincos2d(*grid, width) if model.position == "sincos2d" else np.zeros((1, width))
            leaves["position_embedding"] = np.broadcast_to(np.asarray(table, np.float32), (grid[0] * grid[1], width))
            model = dataclasses.replace(model, position="learned")
    own = convert.unstack(leaves)
    tensors = {entry.theirs: convert.to_theirs(entry, own) for entry in layout.entries(model, prefix_rows, True)}
    if layout is huggingface.LAYOUT:
        tensors = {huggingface.file_name(config["model_type"], name): tensor for name, tensor in tensors.items()}
    return tensors, config
