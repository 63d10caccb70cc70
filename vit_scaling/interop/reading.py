"""From a weight file or a run to `Weights`: recognise the layout, describe the network, check every tensor, convert."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_scaling import UserError, models, names
from vit_scaling.interop import (
    big_vision,
    convert,
    families,
    files,
    hub,
    huggingface,
    native,
    normalisation,
    onnx,
    run,
    timm,
)
from vit_scaling.interop import describe as describing
from vit_scaling.interop.families import FAMILIES, Family
from vit_scaling.interop.layout import Described, Layout, Told
from vit_scaling.interop.normalisation import Normalisation
from vit_scaling.interop.stored import Stored
from vit_scaling.interop.weights import Leaves, Target, Weights, abstract, of_trees
from vit_scaling.models import ModelConfig

LAYOUTS: dict[str, Layout] = {
    "timm": timm.LAYOUT,
    "huggingface": huggingface.LAYOUT,
    "open_clip": huggingface.LAYOUT,
    "big_vision": big_vision.LAYOUT,
}
# The patch embedding of any network, below the names of what wraps it.
_PATCHES = re.compile(
    r"(?P<prefix>(?:(?:module|_orig_mod|model|backbone|encoder|teacher|student|visual|trunk|vision_model|vision_tower|"
    r"vit|deit|dinov2|dinov2_with_registers|dinov3_vit|swin|swinv2|beit)\.)*)"
    r"(?:patch_embed\.proj|embeddings\.patch_embeddings(?:\.projection)?|embeddings\.patch_embedding|conv1)\.weight"
)
# Wrappers beside which lie other networks: a text tower, the other half of a distillation.
_TOWERS = ("visual", "vision_model", "vision_tower", "teacher", "student")
_HEADS = r"(cls_|distillation_)?classifier\..*"


def read(path: str | Path, target: Target, ignore: Sequence[str]) -> Weights:
    """Implements `interop.read`."""
    if (checkpoint := run.find_checkpoint(hub.place(path))) is not None:
        return _read_run(hub.place(path), checkpoint, target.ema).adapted(target)
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
    if (checkpoint := run.find_checkpoint(hub.place(path))) is not None:
        return _of_run(run.record_of(checkpoint))
    tensors, neighbour = files.open_weights(path)
    if native.is_native(neighbour):
        assert neighbour is not None
        return native.read_config(neighbour)[:3]
    _, _, described = describe_tensors(tensors, neighbour, None)
    found = _normalisation(described, files.processor(path))
    config = _settled(described, None)
    if found is not None:
        config = dataclasses.replace(config, mean=found.mean, std=found.std)
    return config, described.image_size, described.num_classes


def describe_tensors(
    tensors: Mapping[str, Stored], neighbour: Mapping[str, Any] | None, trained_size: tuple[int, int] | None
) -> tuple[Family, dict[str, Stored], Described]:
    """Returns (family, tensors under its names, the network that they and what lies beside them describe)."""
    family, named, notes = _recognise(tensors)
    told: Told = LAYOUTS[family.layout].told(neighbour, named, family)
    look = describing.Look(family, named)
    network = describing.swin_transformer if "Swin" in family.name else describing.vision_transformer
    found = network(look, told.fields, trained_size)
    bare = timm.pixels(tensors) if family.layout == "timm" else None
    graph = {key: value for key, value in (neighbour or {}).get(onnx.KEY, {}).items() if key in found.assumed}
    return (
        family,
        named,
        dataclasses.replace(
            found,
            config=dataclasses.replace(found.config, **graph),
            assumed=tuple(field for field in found.assumed if field not in graph),
            unknown=tuple(field for field in found.unknown if field not in graph),
            normalisation=told.normalisation or found.normalisation or bare,
            class_names=told.class_names,
            loss=told.loss,
            notes=notes,
        ),
    )


def _normalisation(described: Described, processor: Mapping[str, Any] | None) -> Normalisation | None:
    """Returns the normalisation that a file's neighbours tell, the more particular one first."""
    told = None if processor is None else normalisation.from_processor(processor)
    return told or described.normalisation


def _of_run(record: Mapping[str, Any]) -> tuple[ModelConfig, tuple[int, int], None]:
    """Returns (model config, image size, None) of what config.json of a run says."""
    height, width = record["config"]["data"]["transform"]["size"]
    return native.model_config(record["config"]["model"]), (height, width), None


def _read_run(path: Path, checkpoint: Any, ema: bool) -> Weights:
    """Returns the weights of a checkpoint, or of the newest intact one of a run.

    Raises:
        UserError: there is none, or the run keeps no average of its parameters.
    """
    record = run.record_of(checkpoint)
    config, image_size, _ = _of_run(record)
    kind = "ema" if ema else "params"
    checkpoint, parts = run.read_arrays(path, (kind, "statistics"))
    if not parts[kind]:
        raise UserError(f"the run of {checkpoint} keeps no average of its parameters; leave ema out")
    weights = of_trees(config, image_size, parts[kind], parts["statistics"])
    classes = record.get("classes")
    assert weights.normalisation is not None
    found, note = normalisation.of_transform(weights.normalisation, record["config"]["data"]["eval_transform"])
    return dataclasses.replace(
        weights,
        normalisation=found,
        class_names=tuple(classes) if classes and len(classes) == weights.num_classes else None,
        loss=record["config"]["loss"]["kind"],
        notes=(note,) if note else (),
    )


def _read_native(tensors: Mapping[str, Stored], header: native.Header) -> Weights:
    config, image_size, num_classes, found, class_names, antialias, loss = header
    _, parameters, statistics = models.split(abstract(config, image_size, num_classes))
    own, running = names.flatten(parameters), names.flatten(statistics)
    shapes = native.named(own, running)
    _account({name: leaf.shape for name, leaf in shapes.items()}, tensors, ())

    def arrays(paths: Mapping[str, Any], prefix: str) -> Leaves:
        return {path: np.asarray(_finite(prefix + path, tensors), np.float32) for path in paths}

    leaves, statistics = arrays(own, ""), arrays(running, native.STATISTICS)
    return Weights(
        config,
        image_size,
        num_classes,
        leaves,
        statistics,
        "vit_scaling",
        False,
        found,
        class_names,
        antialias=antialias,
        loss=loss,
    )


def _read_foreign(
    tensors: Mapping[str, Stored],
    neighbour: Mapping[str, Any] | None,
    processor: Mapping[str, Any] | None,
    target: Target,
    ignore: Sequence[str],
) -> Weights:
    family, named, described = describe_tensors(tensors, neighbour, target.trained_size)
    config = _settled(described, target.config)
    fresh = described.num_classes is None
    classes = described.num_classes or 0
    like = names.flatten(models.split(abstract(config, described.image_size, classes))[1])
    shapes = {path: tuple(leaf.shape) for path, leaf in convert.unstack(like).items()}
    own = {path: shape for path, shape in shapes.items() if not fresh or not path.startswith("head/")}
    entries = convert.entries(family, own, described.prefix)
    _account({entry.theirs: convert.their_shape(entry, shapes) for entry in entries}, named, (*family.ignored, *ignore))
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
    return Weights(
        config,
        described.image_size,
        classes,
        stacked,
        {},
        family.layout,
        fresh,
        found,
        names_,
        assumed,
        family.name,
        described.notes,
        family.layout == "timm" or ("registers" in shapes and family.name == "DINOv2"),
        "sigmoid" if classes == 1 else described.loss,
    )


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


def _unwrapped(tensors: Mapping[str, Stored]) -> tuple[dict[str, Stored], list[str]]:
    """Returns (the tensors without the names of what wraps the network, such as "module.", what was done)."""
    matches = [match for name in tensors if (match := _PATCHES.fullmatch(name))]
    if not matches:
        return dict(tensors), []
    prefix = min((match["prefix"] for match in matches), key=lambda each: ("teacher" not in each, len(each)))
    if not prefix:
        return dict(tensors), []
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    others = [name for name in tensors if not name.startswith(prefix)]
    tower = bool(set(prefix.split(".")) & set(_TOWERS))
    words = [f"{word}." for word in prefix.split(".")[:-1]]
    inner = {name: functools.reduce(str.removeprefix, words, name) for name in others}
    kept = [name for name in others if not tower or re.fullmatch(_HEADS, inner[name])]
    notes = [f"the prefix {prefix} was removed from the names"]
    if left := sorted(set(others) - set(kept)):
        notes.append(f"{len(left)} tensors beside {prefix}* were left out: {', '.join(left[:3])}, ...")
    return named | {inner[name]: tensors[name] for name in kept}, notes


def _recognise(tensors: Mapping[str, Stored]) -> tuple[Family, dict[str, Stored], tuple[str, ...]]:
    """Returns (family, tensors under the names of its table, what was left out)."""
    unwrapped, notes = _unwrapped(tensors)
    for layout in dict.fromkeys(family.layout for family in FAMILIES.values()):
        named = LAYOUTS[layout].canonical(unwrapped)
        for family in FAMILIES.values():
            if family.layout == layout and any(re.fullmatch(family.marker, name) for name in named):
                if layout == "timm":
                    family = timm.variant(family, "fc_norm.weight" in named and "norm.weight" not in named)
                idle = [name for name in named if any(re.fullmatch(each, name) for each in family.ignored)]
                if idle and not all(re.fullmatch(families.BUFFERS, name) for name in idle):
                    notes.append(f"{len(idle)} tensors that are no part of the network were left out: {idle[0]}, ...")
                return family, named, tuple(notes)
    shown = ", ".join(sorted(tensors)[:3]) or "none"
    known = ", ".join(FAMILIES)
    raise UserError(
        f"the tensors' names ({shown}, ...) are of no known network; known are those of "
        f"{known}, and of vit_scaling itself"
    )


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
