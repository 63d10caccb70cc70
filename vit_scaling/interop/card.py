"""The model card that stands beside every export: what the weights are, from what, and what was measured.

A card travels to other machines, so it names files and folders without the folders that they lie in.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import vit_scaling
from vit_scaling import flops
from vit_scaling.interop import imagenet21k
from vit_scaling.interop.weights import Weights

CARD = "README.md"

USE = {
    "huggingface": (
        "from transformers import AutoModelForImageClassification\n\n"
        'model = AutoModelForImageClassification.from_pretrained("FOLDER")  # normalised pixels [B, 3, H, W]'
    ),
    "timm": (
        "import timm\n\n"
        'model = timm.create_model("local-dir:FOLDER", pretrained=True)  # normalised pixels [B, 3, H, W]'
    ),
    "vit_scaling": (
        'from vit_scaling import interop\n\nmodel = interop.load("FOLDER")  # normalised pixels [B, H, W, 3]'
    ),
    "stablehlo": (
        "import jax\nimport numpy as np\nfrom jax import export\n\n"
        'program = export.deserialize(bytearray(open("FOLDER/model.stablehlo", "rb").read()))\n'
        'weights = dict(np.load("FOLDER/weights.npz"))\n'
        "logits = jax.jit(program.call)(weights, images)  # RGB pixels from 0 to 255 [B, H, W, 3]; see serving.json"
    ),
    "onnx": (
        "import onnxruntime\n\n"
        'session = onnxruntime.InferenceSession("FOLDER/model.onnx")\n'
        '(logits,) = session.run(None, {"images": images})  # RGB pixels from 0 to 255 [B, H, W, 3]; see serving.json'
    ),
}
# The folders at the start of a path from the root, a home, a variable or the folder above; addresses with :// stay.
_FOLDERS = re.compile(r"(?<![\w./~$}-])(?:/(?!/)|~[^/,]*/|(?:\.\./)+|\$\{?\w+\}?/)(?:[^/,:=]+/)*")
# What the Hub calls the library that loads an export.
LIBRARIES = {"huggingface": "transformers", "timm": "timm"}


def card(
    weights: Weights,
    *,
    layout: str,
    source: str,
    command: Sequence[str],
    run: Mapping[str, Any] | None = None,
    trained_by: Sequence[str] | None = None,
    metrics: Mapping[str, float] | None = None,
    starts: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Returns a model card in Markdown.

    Args:
        weights: what is exported.
        layout: of the export.
        source: the file, folder or checkpoint that they came from.
        command: the words of the command that wrote the export.
        run: config.json of the run that trained them, where there was one.
        trained_by: the words of that run's command, where they are known.
        metrics: what that run measured at its end, by name.
        starts: rows of that run's starts.jsonl; what the later ones ran with is quoted too.
    """
    cost = flops.count(weights.config, image_size=weights.image_size, num_classes=weights.num_classes)
    height, width = weights.image_size
    task = "image-classification" if weights.num_classes else "image-feature-extraction"
    lines = [
        *("---", f"library_name: {LIBRARIES.get(layout, 'vit_scaling')}", f"pipeline_tag: {task}", "---", ""),
        f"# {type(weights.config).__name__.removesuffix('Config')}, {cost.params / 1e6:.1f} million parameters",
        "",
        f"Written by vit_scaling {vit_scaling.__version__} from `{_name(source)}`.",
        "",
        "| | |",
        "|---|---|",
        f"| images | {height} x {width} pixels, RGB, (pixels / 255 - mean) / std |",
        f"| normalisation | {weights.normalisation or 'not known'} |",
        f"| classes | {_classes(weights)} |",
        f"| probabilities | {weights.loss} of the logits |",
        f"| parameters | {cost.params:,} |",
        f"| forward pass | {cost.forward_flops / 1e9:.2f} GFLOP an image (a multiply-add is two) |",
        "",
        "## Use",
        "```python",
        USE[layout],
        "```",
        "",
        "## Model",
        "```",
        repr(weights.config),
        "```",
        "",
        "## Data",
        *_data(run, trained_by, starts),
        "",
        "## Measured",
        *_measured(metrics),
        "",
        "## How it was written",
        "```",
        portable(command),
        "```",
    ]
    return "\n".join(lines) + "\n"


def portable(command: Sequence[str]) -> str:
    """Returns a command as a shell reads it, without the folders of this machine."""
    return shlex.join(_FOLDERS.sub("", word) for word in command)


def _environment(row: Mapping[str, Any]) -> str:
    revision = f", revision {row['git_revision']}" if row.get("git_revision") else ""
    return f"JAX {row['versions']['jax']}, {row['device_count']} x {row['device_kind']}{revision}"


def _name(path: str) -> str:
    """Returns the last part of a local path; an address such as hf://OWNER/NAME whole."""
    return path if "://" in path else Path(path).name


def _classes(weights: Weights) -> str:
    if not weights.num_classes:
        return "none: a backbone, whose features feed a classifier of your own"
    known = imagenet21k.NUMBERINGS.get(weights.num_classes)
    if known:
        return f"{weights.num_classes:,}, {known}"
    return f"{weights.num_classes}{' (a fresh classifier: train it first)' if weights.fresh_head else ''}"


def _data(
    run: Mapping[str, Any] | None, trained_by: Sequence[str] | None, starts: Sequence[Mapping[str, Any]]
) -> list[str]:
    if run is None:
        return ["Not recorded: the weights came from a file, not from a run of this project."]
    config = run["config"]
    duration, sets = config["duration"], config["data"]["train"]
    sets = " and ".join(_set(part) for part in sets.get("parts") or [sets])
    start = (config.get("init") or {}).get("path")
    lines = [
        f"Trained on {sets}, {duration['amount']:g} "
        f"{duration['unit']} of {config['data']['batch_size']} images"
        + (f", starting from `{_name(start)}`" if start else "")
        + f"; seed {config['seed']}, {_environment(run)}.",
        *(f"Continued from step {row['step']:,} with {_environment(row)}." for row in starts[1:]),
        "",
        f"Optimizer {config['optim']['name']}, learning rate {config['optim']['lr']:g}, "
        f"{config['schedule']['kind']} schedule, loss {config['loss']['kind']}.",
    ]
    return [*lines, "", "```", portable(trained_by), "```"] if trained_by else lines


def _set(source: Mapping[str, Any]) -> str:
    name = source["name"] if source["kind"] in ("builtin", "tfds") else _name(source["name"])
    return f"`{source['kind']}` `{name}`, split `{source['split']}`"


def _measured(metrics: Mapping[str, float] | None) -> list[str]:
    if not metrics:
        return ["Nothing was measured by the run that wrote this; `python -m vit_scaling.evaluate` measures."]
    return ["| | |", "|---|---|", *(f"| {name} | {value:.4f} |" for name, value in sorted(metrics.items()))]
