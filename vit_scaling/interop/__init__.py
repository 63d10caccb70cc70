"""Which network does a weight file hold, and how is one written that other libraries load?

    model = interop.load("weights/vit-base")                      # images [B, H, W, 3] to logits
    interop.save(model, "export/vit-base", layout="huggingface")

Start with reading.py: every tensor is accounted for, and one that is missing, left over or of another shape is an error
that names it. The layouts are name maps (timm.py, huggingface.py, big_vision.py); files.py reads untrusted files.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from vit_scaling.interop import reading, weights
from vit_scaling.interop.weights import Target, Weights
from vit_scaling.interop.writing import write
from vit_scaling.models import ModelConfig

__all__ = ["Target", "Weights", "describe", "load", "read", "save", "write"]


def load(
    path: str | Path, model_config: ModelConfig | None = None, *, ignore: Sequence[str] = (), **target: Any
) -> nnx.Module:
    """Returns the model that a weight file or folder holds, ready to call on images [B, H, W, 3] in [-1, 1].

    Args: as `read`; image_size, num_classes and class_map as in `Target`.

    Raises:
        UserError: as `read`.
    """
    return read(path, Target(model_config, **target), ignore=ignore).module()


def read(path: str | Path, target: Target | None = None, *, ignore: Sequence[str] = ()) -> Weights:
    """Reads a weight file or folder, adapted to another image size, window, patch or set of classes where asked.

    Args:
        path: a .safetensors, .npz, .pth or .bin file, or a folder with one; config.json beside it is read.
        target: the network to make of it; None: as the file, its neighbour, names and shapes say.
        ignore: regular expressions of whole names, as errors write them, of tensors that may be left over.

    Raises:
        UserError: the file cannot be read or trusted, is of no known layout, or a tensor is missing, left over, or of
            another shape or type than the network's; the sentence names it.
    """
    return reading.read(path, target or Target(), ignore)


def describe(path: str | Path) -> tuple[ModelConfig, tuple[int, int], int | None]:
    """Returns (model config, image size, classes or None) of a weight file or folder, reading names and shapes only.

    Raises:
        UserError: as `read`.
    """
    return reading.describe(path)


def save(model: nnx.Module, path: str | Path, *, layout: str) -> None:
    """Writes a model as a folder, whole or not at all.

    Args:
        model: a ViT or Swin of this project (layouts "vit_scaling", "stablehlo" and "onnx": any model).
        path: the folder, which must not exist or be empty.
        layout: "huggingface" (transformers' AutoModelForImageClassification loads it), "timm"
            (`timm.create_model("local-dir:FOLDER")`) or "vit_scaling"; or a program with the normalisation inside that
            runs without this package: "stablehlo" (needs JAX) or "onnx" (needs an ONNX runtime).

    Raises:
        UserError: the layout cannot express the model, or something is in the way; nothing is written.
    """
    write(weights.of_module(model), path, layout=layout)
