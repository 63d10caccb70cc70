"""Weights from elsewhere and for elsewhere.

    model = interop.load("weights/vit-base")                      # [B, H, W, 3] in [-1, 1] to logits
    interop.save(model, "export/vit-base", layout="huggingface")

Every tensor is accounted for: one that is missing, left over or of another shape is an error that names it. The layouts
are name maps (timm.py, huggingface.py, big_vision.py); files.py reads without trust.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from vit_scaling import UserError, models
from vit_scaling import names as paths
from vit_scaling.interop import big_vision, convert, files, huggingface, native, timm
from vit_scaling.interop.files import Stored
from vit_scaling.interop.layout import Described, Layout
from vit_scaling.models import ModelConfig, adapt, layers, swin, vit

LAYOUTS: tuple[Layout, ...] = (timm.LAYOUT, huggingface.LAYOUT, big_vision.LAYOUT)
EXPORTS = ("huggingface", "timm", "vit_scaling")


@dataclasses.dataclass
class Weights:
    """A network's arrays on the host, and what they belong to."""

    config: ModelConfig
    image_size: tuple[int, int]
    num_classes: int
    parameters: dict[str, Any]  # nested dict of float32 arrays
    statistics: dict[str, Any]
    layout: str  # of the file that they came from
    fresh_head: bool  # whether the classifier is new and zero

    def module(self) -> nnx.Module:
        """Returns the model, ready to be called."""
        return models.merge(models.split(self.abstract())[0], *self._arrays())

    def abstract(self) -> nnx.Module:
        """Returns the model with shapes in place of arrays."""
        return _abstract(self.config, self.image_size, self.num_classes)

    def _arrays(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return jax.tree.map(jax.numpy.asarray, self.parameters), jax.tree.map(jax.numpy.asarray, self.statistics)


def load(
    path: str | Path,
    model_config: ModelConfig | None = None,
    *,
    image_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    class_map: Sequence[int] | None = None,
    ignore: Sequence[str] = (),
) -> nnx.Module:
    """Returns the model that a weight file or folder holds, ready to call on images [B, H, W, 3] in [-1, 1].

    Args: as `read`.

    Raises:
        UserError: as `read`.
    """
    weights = read(
        path, model_config, image_size=image_size, num_classes=num_classes, class_map=class_map, ignore=ignore
    )
    return weights.module()


def read(
    path: str | Path,
    model_config: ModelConfig | None = None,
    *,
    image_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    class_map: Sequence[int] | None = None,
    ignore: Sequence[str] = (),
) -> Weights:
    """Reads a weight file or folder, for another image size, window, patch or set of classes where asked.

    Args:
        path: a .safetensors, .npz, .pth or .bin file, or a folder with one; config.json beside it is read.
        model_config: the network to make of it; None: as the file, its neighbour, names and shapes say. It also tells
            what they cannot (heads of an unusual ViT, GELU and norm_eps of a file without config.json).
        image_size: height and width in pixels to adapt to; None: those the weights were trained at.
        num_classes: of the classifier; another number than the file's starts it afresh, from zero.
        class_map: for each new class the file's class that it was, instead of a fresh classifier.
        ignore: regular expressions of whole names, as errors write them, of tensors that may be left over.

    Raises:
        UserError: the file cannot be read or trusted, is of no known layout, or a tensor is missing, left over, or of
            another shape or type than the network's; the sentence names it.
    """
    tensors, neighbour = files.open_weights(path)
    if native.is_native(neighbour):
        assert neighbour is not None
        weights = _read_native(tensors, *native.read_config(neighbour))
    else:
        weights = _read_foreign(tensors, neighbour, model_config, image_size, num_classes, ignore)
    return adapted(weights, model_config, image_size=image_size, num_classes=num_classes, class_map=class_map)


def adapted(
    weights: Weights,
    model_config: ModelConfig | None,
    *,
    image_size: tuple[int, int] | None,
    num_classes: int | None,
    class_map: Sequence[int] | None,
) -> Weights:
    """Returns the weights for another network, image size or set of classes; what is None stays as it is.

    Raises:
        UserError: no resizing leads there.
    """
    target = model_config or _config_for(weights, image_size)
    target_size = image_size or weights.image_size
    parameters = adapt.adapt(
        weights.parameters, weights.config, weights.image_size, target=target, target_image_size=target_size
    )
    head = weights.num_classes
    if num_classes is not None or class_map is not None:
        head = num_classes if num_classes is not None else len(class_map or ())
        parameters["head"] = adapt.classes(parameters, head, class_map)
    fresh = class_map is None and (weights.fresh_head or head != weights.num_classes)
    return dataclasses.replace(
        weights, config=target, image_size=target_size, num_classes=head, parameters=parameters, fresh_head=fresh
    )


def describe(path: str | Path) -> tuple[ModelConfig, tuple[int, int], int | None]:
    """Returns (model config, image size, classes or None) of a weight file or folder, reading names and shapes only.

    Raises:
        UserError: as `read`.
    """
    tensors, neighbour = files.open_weights(path)
    if native.is_native(neighbour):
        assert neighbour is not None
        return native.read_config(neighbour)
    layout, named = _recognise(tensors)
    described = layout.describe(named, neighbour, None)
    return _settled(described, None), described.image_size, described.num_classes


def _config_for(weights: Weights, image_size: tuple[int, int] | None) -> ModelConfig:
    """Returns the config of the same network at another image size."""
    if isinstance(weights.config, swin.SwinConfig) and image_size not in (None, weights.image_size):
        return swin.transfer(weights.config, weights.image_size, window=weights.config.window)
    return weights.config


def _abstract(config: ModelConfig, image_size: tuple[int, int], num_classes: int) -> nnx.Module:
    def build() -> nnx.Module:
        return models.build(config, image_size=image_size, num_classes=num_classes, key=jax.random.key(0))

    return jax.eval_shape(build)


def _read_native(
    tensors: Mapping[str, Stored], config: ModelConfig, image_size: tuple[int, int], num_classes: int
) -> Weights:
    _, parameters, statistics = models.split(_abstract(config, image_size, num_classes))
    like = paths.flatten(parameters) | {
        native.STATISTICS + path: leaf for path, leaf in paths.flatten(statistics).items()
    }
    _account({name: leaf.shape for name, leaf in like.items()}, tensors, ())
    read = {name: np.asarray(_finite(name, tensors[name].read()), np.float32) for name in like}
    own = {name: leaf for name, leaf in read.items() if not name.startswith(native.STATISTICS)}
    running = {name.removeprefix(native.STATISTICS): leaf for name, leaf in read.items() if name not in own}
    return Weights(
        config, image_size, num_classes, paths.unflatten(own), paths.unflatten(running), "vit_scaling", False
    )


def _read_foreign(
    tensors: Mapping[str, Stored],
    neighbour: Mapping[str, Any] | None,
    hint: ModelConfig | None,
    image_size: tuple[int, int] | None,
    num_classes: int | None,
    ignore: Sequence[str],
) -> Weights:
    layout, named = _recognise(tensors)
    described = layout.describe(named, neighbour, image_size)
    config = _settled(described, hint)
    if described.num_classes is None and num_classes is None:
        raise UserError("the weights have no classifier; give num_classes, and it starts from zero")

    classes = described.num_classes or 1
    like = paths.flatten(models.split(_abstract(config, described.image_size, classes))[1])
    shapes = {path: tuple(leaf.shape) for path, leaf in convert.unstack(like).items()}
    entries = layout.entries(config, described.class_row, described.num_classes is not None)
    wanted = {entry.theirs: convert.their_shape(entry, shapes) for entry in entries}
    _account(wanted, named, (*layout.ignored, *ignore))
    leaves: dict[str, np.ndarray] = {}
    for entry in entries:
        for name, leaf in convert.to_ours(entry, _finite(entry.theirs, named[entry.theirs].read()), shapes).items():
            leaves[name] = leaf
    for name in [name for name in leaves if name.endswith("+")]:
        leaves[name.removesuffix("+")] = leaves[name.removesuffix("+")] + leaves.pop(name)
    if described.num_classes is None:
        leaves |= {path: np.zeros(shapes[path], np.float32) for path in ("head/kernel", "head/bias")}
    parameters = paths.unflatten(convert.stack(leaves, like))
    fresh = described.num_classes is None
    return Weights(config, described.image_size, classes, parameters, {}, layout.name, fresh)


def _settled(described: Described, hint: ModelConfig | None) -> ModelConfig:
    """Returns the described model, with what its file does not tell taken from the user's config.

    Raises:
        UserError: there is none, and no usual value either.
    """
    config = described.config
    if type(hint) is type(config):
        told = {field: getattr(hint, field) for field in described.assumed}
        return dataclasses.replace(config, **told)
    if described.unknown:
        raise UserError(
            f"neither names nor shapes of the weights tell model.{described.unknown[0]}; put their config.json beside "
            f"them, or give the model config"
        )
    return config


def _recognise(tensors: Mapping[str, Stored]) -> tuple[Layout, dict[str, Stored]]:
    for layout in LAYOUTS:
        named = layout.canonical(tensors)
        if named is not None:
            return layout, named
    shown = ", ".join(sorted(tensors)[:3]) or "none"
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise UserError(f"the tensors' names ({shown}, ...) are of no known layout; known are {known} and vit_scaling")


def _account(
    wanted: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Stored],
    ignored: Sequence[str],
) -> None:
    """Raises ValueError unless the file has what is wanted, of that shape and of floats, and nothing else."""
    if missing := [name for name in wanted if name not in tensors]:
        raise UserError(f"the weights lack the tensor {_list(missing)}")
    left = [
        name for name in tensors if name not in wanted and not any(re.fullmatch(pattern, name) for pattern in ignored)
    ]
    if left:
        raise UserError(f"the model has no place for the tensor {_list(left)}; ignore it by a pattern if it may go")
    for name, shape in wanted.items():
        stored = tensors[name]
        if stored.shape != shape:
            raise UserError(f"the tensor {name!r} has the shape {stored.shape}; the model needs {shape}")
        if stored.dtype not in files.FLOATS:
            raise UserError(f"the tensor {name!r} is of type {stored.dtype}; weights are {', '.join(files.FLOATS)}")


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]!r}{more}"


def _finite(name: str, array: np.ndarray) -> np.ndarray:
    if not np.isfinite(array.astype(np.float32)).all():
        raise UserError(f"the tensor {name!r} holds numbers that are not finite; the file is damaged or overflowed")
    return array


def save(model: nnx.Module, path: str | Path, *, layout: str) -> None:
    """Writes a model as a folder with model.safetensors and config.json, whole or not at all.

    Args:
        model: a ViT or Swin of this project (layout "vit_scaling": any model).
        path: the folder, which must not exist or be empty.
        layout: "huggingface" (transformers' AutoModelForImageClassification loads it), "timm"
            (`timm.create_model("local-dir:FOLDER")`) or "vit_scaling".

    Raises:
        UserError: the layout cannot express the model, or something is in the way; nothing is written.
    """
    write(weights_of(model), path, layout=layout)


def weights_of(model: nnx.Module) -> Weights:
    """Returns the arrays of a model, on the host.

    Raises:
        UserError: it is no model of this project.
    """
    config: Any = getattr(model, "config", None)
    size: Any = getattr(model, "image_size", None)
    if type(config) not in models.MODELS or size is None:
        raise UserError(f"a {type(model).__name__} is no model that models.build or interop.load made")
    parameters, statistics = jax.tree.map(np.asarray, models.split(model)[1:])
    classes = parameters["head"]["kernel"].shape[1]
    return Weights(config, size, classes, parameters, statistics, layout="vit_scaling", fresh_head=False)


def write(weights: Weights, path: str | Path, *, layout: str, texts: Mapping[str, str] | None = None) -> None:
    """Writes weights as `save` does, with further text files beside them.

    Raises:
        UserError: as `save`.
    """
    if layout not in EXPORTS:
        raise UserError(f"layout is {layout!r}; choose one of {', '.join(EXPORTS)}")
    if layout == "vit_scaling":
        config = native.write_config(weights.config, weights.image_size, weights.num_classes)
        tensors = native.tensors(weights.parameters, weights.statistics)
    else:
        tensors, config = _foreign(weights, next(known for known in LAYOUTS if known.name == layout))
    beside = dict(texts or {})
    if layout == "huggingface":
        beside["preprocessor_config.json"] = json.dumps(huggingface.processor(weights.image_size), indent=2) + "\n"
    files.write_folder(path, tensors, config, beside)


def _foreign(weights: Weights, layout: Layout) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    assert layout.neighbour is not None
    config = layout.neighbour(weights.config, weights.image_size, weights.num_classes)
    leaves = paths.flatten(weights.parameters)
    class_row = False
    if isinstance(weights.config, vit.ViTConfig):
        class_row = weights.config.pool == "token" and not weights.config.registers
        if weights.config.position != "learned":
            # Fixed positions, or none, become a table of theirs.
            grid, width = layers.grid_size(weights.image_size, weights.config.patch), weights.config.width
            table = layers.sincos2d(*grid, width) if weights.config.position == "sincos2d" else np.zeros((1, width))
            leaves["position_embedding"] = np.broadcast_to(np.asarray(table, np.float32), (grid[0] * grid[1], width))
    own = convert.unstack({path: np.asarray(leaf) for path, leaf in leaves.items()})
    tensors = {entry.theirs: convert.to_theirs(entry, own) for entry in layout.entries(weights.config, class_row, True)}
    if layout is huggingface.LAYOUT:
        tensors = {huggingface.file_name(config["model_type"], name): tensor for name, tensor in tensors.items()}
    return tensors, config
