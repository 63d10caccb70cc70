"""From a weight file to `Weights`: recognise the layout, describe the network, check every tensor, convert."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_scaling import UserError, models, names
from vit_scaling.interop import big_vision, convert, files, huggingface, native, normalisation, onnx, timm
from vit_scaling.interop.layout import Described, Layout
from vit_scaling.interop.normalisation import Normalisation
from vit_scaling.interop.stored import Stored
from vit_scaling.interop.weights import Leaves, Target, Weights, abstract
from vit_scaling.models import ModelConfig

LAYOUTS: tuple[Layout, ...] = (timm.LAYOUT, huggingface.LAYOUT, big_vision.LAYOUT)

PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "teacher.", "student.", "visual.trunk.")


def read(path: str | Path, target: Target, ignore: Sequence[str]) -> Weights:
    """Implements `interop.read`."""
    tensors, neighbour = files.open_weights(path, target.ema)
    if native.is_native(neighbour):
        assert neighbour is not None
        weights = _read_native(tensors, native.read_config(neighbour))
    else:
        weights = _read_foreign(tensors, neighbour, files.processor(path), target, ignore)
        if target.image_size is None:
            # The graph of an ONNX file may resample its positions to its input's grid.
            target = dataclasses.replace(target, image_size=(neighbour or {}).get(onnx.KEY, {}).get("input_size"))
    return weights.adapted(target)


def describe(path: str | Path) -> tuple[ModelConfig, tuple[int, int], int | None]:
    """Implements `interop.describe`."""
    tensors, neighbour = files.open_weights(path)
    if native.is_native(neighbour):
        assert neighbour is not None
        return native.read_config(neighbour)[:3]
    layout, named = _recognise(tensors)
    described = _described(layout, named, neighbour, None)
    found = _normalisation(described, files.processor(path))
    config = _settled(described, None)
    if found is not None:
        config = dataclasses.replace(config, mean=found.mean, std=found.std)
    return config, described.image_size, described.num_classes


def _described(
    layout: Layout, named: Mapping[str, Stored], neighbour: Mapping[str, Any] | None, trained_size: Any
) -> Described:
    """Returns what the layout makes of a file; what the graph of an ONNX file tells is not assumed."""
    described = layout.describe(named, neighbour, trained_size)
    told = {field: value for field, value in (neighbour or {}).get(onnx.KEY, {}).items() if field in described.assumed}
    return dataclasses.replace(
        described,
        config=dataclasses.replace(described.config, **told),
        assumed=tuple(field for field in described.assumed if field not in told),
        unknown=tuple(field for field in described.unknown if field not in told),
    )


def _normalisation(described: Described, processor: Mapping[str, Any] | None) -> Normalisation | None:
    """Returns the normalisation that a file's neighbours tell, the more particular one first."""
    told = None if processor is None else normalisation.from_processor(processor)
    return told or described.normalisation


def _read_native(tensors: Mapping[str, Stored], header: native.Header) -> Weights:
    config, image_size, num_classes, found, class_names = header
    _, parameters, statistics = models.split(abstract(config, image_size, num_classes))
    own, running = names.flatten(parameters), names.flatten(statistics)
    shapes = native.named(own, running)
    _account({name: leaf.shape for name, leaf in shapes.items()}, tensors, ())

    def arrays(paths: Mapping[str, Any], prefix: str) -> Leaves:
        return {path: np.asarray(_finite(prefix + path, tensors), np.float32) for path in paths}

    leaves, statistics = arrays(own, ""), arrays(running, native.STATISTICS)
    return Weights(config, image_size, num_classes, leaves, statistics, "vit_scaling", False, found, class_names)


def _read_foreign(
    tensors: Mapping[str, Stored],
    neighbour: Mapping[str, Any] | None,
    processor: Mapping[str, Any] | None,
    target: Target,
    ignore: Sequence[str],
) -> Weights:
    layout, named = _recognise(tensors)
    described = _described(layout, named, neighbour, target.trained_size)
    config = _settled(described, target.config)
    if described.num_classes is None and target.num_classes is None:
        raise UserError("the weights have no classifier; give num_classes, and it starts from zero")

    fresh = described.num_classes is None
    classes = described.num_classes or 1
    like = names.flatten(models.split(abstract(config, described.image_size, classes))[1])
    shapes = {path: tuple(leaf.shape) for path, leaf in convert.unstack(like).items()}
    entries = layout.entries(config, described.prefix_rows, not fresh)
    _account({entry.theirs: convert.their_shape(entry, shapes) for entry in entries}, named, (*layout.ignored, *ignore))
    leaves: Leaves = {}
    for entry in entries:
        leaves |= convert.to_ours(entry, _finite(entry.theirs, named), shapes)
    for name in [name for name in leaves if name.endswith("+")]:
        leaves[name.removesuffix("+")] = leaves[name.removesuffix("+")] + leaves.pop(name)
    if fresh:
        leaves |= {path: np.zeros(shapes[path], np.float32) for path in ("head/kernel", "head/bias")}
    found = target.normalisation or _normalisation(described, processor)
    if found is not None:
        config = dataclasses.replace(config, mean=found.mean, std=found.std)
    names_ = described.class_names if described.class_names and len(described.class_names) == classes else None
    stacked = convert.stack(leaves, like)
    assumed = described.assumed
    return Weights(config, described.image_size, classes, stacked, {}, layout.name, fresh, found, names_, assumed)


def _settled(described: Described, hint: ModelConfig | None) -> ModelConfig:
    """Returns the described model, with what its file does not say taken from the user's config.

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


def _without_prefix(tensors: Mapping[str, Stored]) -> Mapping[str, Stored]:
    """Returns the tensors without the names of wrappers that the patch embedding's begins with, such as "module."."""
    for patch in (name for name in tensors if re.search(r"(^|\.)(patch_embed\.proj|projection)\.weight$", name)):
        prefix = ""
        while part := next((p for p in PREFIXES if patch.removeprefix(prefix).startswith(p)), None):
            prefix += part
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _recognise(tensors: Mapping[str, Stored]) -> tuple[Layout, dict[str, Stored]]:
    tensors = _without_prefix(tensors)
    for layout in LAYOUTS:
        named = layout.canonical(tensors)
        if named is not None:
            return layout, named
    shown = ", ".join(sorted(tensors)[:3]) or "none"
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise UserError(f"the tensors' names ({shown}, ...) are of no known layout; known are {known} and vit_scaling")


def _account(wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Stored], ignored: Sequence[str]) -> None:
    """Raises UserError unless the file has what is wanted, of that shape and of floats, and nothing else."""
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


def _list(found: Sequence[str]) -> str:
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"{found[0]!r}{more}"


def _finite(name: str, tensors: Mapping[str, Stored]) -> np.ndarray:
    array = tensors[name].read()
    if not np.isfinite(array.astype(np.float32)).all():
        raise UserError(f"the tensor {name!r} holds numbers that are not finite; the file is damaged or overflowed")
    return array
