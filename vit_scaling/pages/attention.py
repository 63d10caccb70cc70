"""The attention page: where each head of each layer of a model looks, on some images."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit, softmax

from vit_scaling import UserError, interop, names
from vit_scaling.data import mixing
from vit_scaling.interop import hub
from vit_scaling.interop import run as checkpoints
from vit_scaling.pages import families, images, page, quantize
from vit_scaling.training import initial

SCRIPTS = ("look.js", "panels.js", "attention.js")
MOST_BYTES = 14_900_000  # of a page
TOP = 5  # classes whose probability is shown


@dataclasses.dataclass(frozen=True)
class Written:
    """What was written: the page, how many of the images it shows, and in how many steps its weights are drawn."""

    path: Path
    bytes: int
    images: int
    of: int
    levels: int
    error: float


def write(
    weights: interop.Weights,
    chosen: images.Images,
    path: Path,
    *,
    title: str,
    loss: str = "softmax",
    steps: Sequence[tuple[int, dict[str, Any]]] = (),
) -> Written:
    """Writes the page of a model and images.

    Of the resolutions in `quantize.LEVELS` it takes the finest with which the page is small enough; where none is, it
    shows fewer images.

    Args:
        weights: the model.
        chosen: images of its size.
        title: what the page is called.
        loss: "softmax" or "sigmoid", which says what probability a logit means.
        steps: (step, parameters of the heads' Gaussians) of checkpoints, for an attention-CNN.

    Raises:
        UserError: the model has no attention, or the page of one image is too large.
    """
    model: Any = weights.module()
    inputs = mixing.to_float(jnp.asarray(chosen.pixels), model.config.mean, model.config.std)
    found = families.look(model, inputs)
    logits = np.asarray(model(inputs), np.float32)
    if steps and found.centers is not None:
        each = [families.gaussians(np.asarray(p["centers"]), np.asarray(p["spreads"])) for _, p in steps]
        found.centers, found.covariances = (np.stack(parts) for parts in zip(*each, strict=True))
    count = len(chosen.pixels)
    while True:
        for levels in quantize.LEVELS:
            data, arrays, error = contents(found, chosen, logits, count, levels, loss)
            about = {
                "title": title,
                "model": repr(weights.config),
                "image_size": list(weights.image_size),
                "parameters": sum(int(leaf.size) for leaf in names.flatten(weights.parameters).values()),
                "left_out": chosen.left_out + len(chosen.pixels) - count,
                "steps": [step for step, _ in steps],
            }
            text = page.page(title, SCRIPTS, about | data, arrays)
            if len(text) <= MOST_BYTES:
                page.write(path, text)
                return Written(path, len(text), count, len(chosen.pixels), levels, error)
        if count == 1:
            raise UserError(
                f"the page of one image would be {len(text) / 1e6:.0f} MB, and {MOST_BYTES / 1e6:.1f} MB are the "
                "most; make it of smaller images with --image_size"
            )
        count = max(1, min(count - 1, int(count * MOST_BYTES / len(text))))


def contents(
    found: families.Found, chosen: images.Images, logits: np.ndarray, count: int, levels: int, loss: str
) -> tuple[dict[str, Any], dict[str, np.ndarray], float]:
    """Returns JSON and arrays of the first `count` images, and the largest error as a share of its row's largest."""
    arrays: dict[str, np.ndarray] = {}
    errors: list[float] = []
    places: dict[bytes, str] = {}

    def rows(name: str, values: np.ndarray, signed: bool = False) -> dict[str, Any]:
        part = values[:count]
        packed = quantize.signed(part) if signed else quantize.weights(part, levels)
        arrays[name], arrays[f"{name}.largest"] = packed.entries, packed.largest
        errors.append(packed.error)
        return {"array": name, "largest": f"{name}.largest", "signed": signed, "images": len(part)}

    layers = []
    for number, layer in enumerate(found.layers):
        described: dict[str, Any] = {
            "name": layer.name,
            "grid": list(layer.grid),
            "cell": list(layer.cell),
            "heads": layer.weights.shape[1],
            "entries": layer.weights.shape[3],
            "weights": rows(f"{number}", layer.weights),
            "terms": {name: rows(f"{number}.{name}", term, signed=True) for name, term in layer.terms.items()},
            "distances": [float(value) for value in layer.distances()],
            "lines": layer.lines,
        }
        if layer.places is not None:
            small = layer.places.astype(np.int16 if layer.places.max() < 2**15 else np.int32)
            key = small.tobytes()
            if key not in places:
                places[key] = f"places{len(places)}"
                arrays[places[key]] = small
            described["places"] = places[key]
        if layer.table is not None:
            arrays[f"{number}.table"] = layer.table.astype(np.float32)
            described["table"] = f"{number}.table"
        layers.append(described)
    maps = [
        {"name": name, "by_query": values.shape[2] > 1, "heads": values.shape[1], "entries": values.shape[3]}
        | rows(f"map.{name}", values, signed=name in found.signed)
        for name, values in found.maps.items()
    ]
    if found.filters is not None:
        arrays["filters"] = found.filters
    if found.centers is not None and found.covariances is not None:
        arrays |= {"centers": found.centers.astype(np.float32), "covariances": found.covariances.astype(np.float32)}
    data = {
        "extra": list(found.extra),
        "layers": layers,
        "maps": maps,
        "images": _shown(chosen, logits, count, loss),
        "levels": levels,
        "error": max(errors),
    }
    return data, arrays, max(errors)


def _shown(chosen: images.Images, logits: np.ndarray, count: int, loss: str) -> list[dict[str, Any]]:
    """Returns the first `count` images with their labels and most probable classes; none without a classifier."""
    probabilities = softmax(logits, axis=1) if loss == "softmax" and logits.shape[1] else expit(logits)
    class_names = list(chosen.class_names or ())
    class_names += [str(number) for number in range(len(class_names), logits.shape[1])]
    shown = []
    for i in range(count):
        best = np.argsort(-probabilities[i], kind="stable")[:TOP]
        shown.append(
            {
                "picture": page.picture(chosen.pixels[i]),
                "caption": chosen.captions[i],
                "label": chosen.labels[i],
                "predictions": [[class_names[c], float(probabilities[i, c])] for c in best],
            }
        )
    return shown


def gaussian_steps(workdir: Path, ema: bool) -> list[tuple[int, dict[str, Any]]]:
    """Returns (step, {"centers", "spreads"}) of every checkpoint of an attention-CNN's run, in order.

    Raises:
        UserError: the folder is no run, or its model has no Gaussian heads.
    """
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"--checkpoints=all needs a run as --weights, and {workdir} has no checkpoints/")
    part = "ema" if ema else "params"
    steps = []
    for step in checkpoints.steps(workdir / "checkpoints"):
        tree = checkpoints.read_arrays(workdir / "checkpoints" / str(step), (part,))[1][part]
        attention = tree.get("blocks", {}).get("attention", {})
        if "centers" not in attention:
            raise UserError("--checkpoints=all shows how Gaussian heads moved, and this model has none")
        steps.append((step, {name: np.asarray(attention[name]) for name in ("centers", "spreads")}))
    return steps


def explore(
    weights_path: str,
    choice: str | None,
    path: Path,
    *,
    count: int,
    size: tuple[int, int] | None,
    ema: bool,
    all_steps: bool,
) -> Written:
    """Reads weights and images and writes their page: what the command does.

    Raises:
        UserError: see `initial.read`, `images.read`, `gaussian_steps` and `write`.
    """
    weights = initial.read(weights_path, interop.Target(image_size=size), ema=ema)
    checkpointed = initial.find_checkpoint(hub.place(weights_path))
    run = None if checkpointed is None else initial.record_of(checkpointed)["config"]
    chosen = images.read(choice, count, weights, run)
    steps = gaussian_steps(hub.place(weights_path), ema) if all_steps else []
    title = "/".join(Path(weights_path).absolute().parts[-2:])
    with jax.default_matmul_precision("highest"):
        return write(weights, chosen, path, title=title, loss=weights.loss, steps=steps)
