"""Import published weights, export ours, and show what a file holds.

    ./run.sh weights show   --input=PATH
    ./run.sh weights import --input=PATH --output=weights/vit_b16
    ./run.sh weights export --input=runs/b16 --output=export/b16 \\
        --layout=huggingface
    ./run.sh weights push   --input=runs/b16 --repo=OWNER/NAME

PATH is a weight file or folder (safetensors, .npz, .pth, .onnx; timm, Hugging Face, official Swin, vision_transformer
and big_vision names), a run or checkpoint of this project, or hf://OWNER/NAME[@REVISION]. `import` writes this
project's own folder, from which configs/finetune.py starts; `export` writes one that transformers or timm load, or
(--layout=stablehlo, --layout=onnx) a program that classifies pixels without this package; `push` writes the same to a
repository of the Hugging Face Hub. All write a model card, and adapt the weights to --image_size, --num_classes or
--classes on the way. What is written is complete or absent.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from vit_scaling import UserError, cli, paths

COMMANDS = ("import", "export", "push", "show")
LAYOUTS = ("huggingface", "timm", "vit_scaling", "stablehlo", "onnx")
INPUT_TYPES = ("uint8", "float32")

_INPUT = flags.DEFINE(
    cli.PathParser(bucket=True, hub=True), "input", None, "Weight file or folder, run or checkpoint.", required=True
)
_OUTPUT = flags.DEFINE(cli.PathParser(bucket=True), "output", None, "New folder to write (import, export).")
_REPO = flags.DEFINE_string("repo", None, "push: OWNER/NAME or OWNER/NAME@BRANCH on the Hugging Face Hub.")
_PUBLIC = flags.DEFINE_bool("public", False, "push: whether a new repository is one that everyone can read.")
_LAYOUT = flags.DEFINE_enum("layout", "huggingface", LAYOUTS, "Whose names an export has, or which program.")
_INPUT_TYPE = flags.DEFINE_enum("input_type", "uint8", INPUT_TYPES, "Of a program: type of its pixels, from 0 to 255.")
_IMAGE_SIZE = flags.DEFINE_string("image_size", None, "Adapt to this size, HEIGHTxWIDTH or one number.")
_NUM_CLASSES = flags.DEFINE_integer("num_classes", None, "Adapt to so many classes: a fresh classifier.", 1)
_CLASSES = flags.DEFINE(
    cli.PathParser(), "classes", None, "File with one number a line: for each new class the old one."
)
_TRAINED_SIZE = flags.DEFINE_string(
    "trained_size", None, "Size the weights were trained at, where the file leaves it open."
)
_NORMALISATION = flags.DEFINE_string(
    "normalisation", None, "half, imagenet, clip, none, or three means and three stds."
)
_IGNORE = flags.DEFINE_multi_string("ignore", [], "Pattern of tensors that may be left over; may be repeated.")
_ACCEPT_NORM_EPS = flags.DEFINE_bool(
    "accept_norm_eps", False, "Whether timm's epsilon of the norms may replace one that it cannot express."
)
_FOLD = flags.DEFINE_bool(
    "fold_normalisation", False, "Whether mean and std become part of the patch kernel, for pixels in [0, 1]."
)
_EMA = flags.DEFINE_bool("ema", False, "Of a run: its average of the parameters.")


def main(argv: Sequence[str]) -> None:
    command = argv[1]
    if command in ("import", "export") and not _OUTPUT.value:
        raise UserError(f"weights {command} needs --output, a new folder")
    if command == "push" and (not _REPO.value or _OUTPUT.value):
        raise UserError("weights push needs --repo=OWNER/NAME, and no --output")
    # Heavy imports wait until the flags are known to be good, so that a typo is answered at once.
    from vit_scaling import config as config_lib
    from vit_scaling import interop
    from vit_scaling.interop import hub, normalisation, picture
    from vit_scaling.training import initial

    if command == "push":
        hub.check(str(_REPO.value))
    weights = initial.read(
        _INPUT.value,
        interop.Target(
            image_size=config_lib.image_size("--image_size", _IMAGE_SIZE.value) if _IMAGE_SIZE.value else None,
            num_classes=_NUM_CLASSES.value,
            class_map=_class_map(_CLASSES.value),
            trained_size=(
                config_lib.image_size("--trained_size", _TRAINED_SIZE.value) if _TRAINED_SIZE.value else None
            ),
            normalisation=normalisation.named(_NORMALISATION.value) if _NORMALISATION.value else None,
        ),
        ignore=_IGNORE.value,
        ema=_EMA.value,
    )
    weights = weights.folded() if _FOLD.value else weights
    if command == "show":
        print(f"{picture.table(weights)}\n\n{picture.picture(weights, _asked())}")
        return
    if _NUM_CLASSES.value is None and _CLASSES.value is None:
        weights = dataclasses.replace(weights, class_names=initial.class_names(_INPUT.value, weights))
    layout = "vit_scaling" if command == "import" else _LAYOUT.value
    for note in weights.notes:
        print(f"note: {note}")
    if command == "push":
        with tempfile.TemporaryDirectory(prefix="vit_scaling-") as folder:
            _write(weights, Path(folder) / "weights", layout)
            print(f"pushed to {hub.push(Path(folder) / 'weights', str(_REPO.value), public=_PUBLIC.value)}")
        return
    output = paths.place(str(_OUTPUT.value))
    _write(weights, output, layout)
    if command == "import":
        config = f"configs/finetune.py:{output},DATA"
        print(f"fine-tune it: ./run.sh train --config={config} --workdir=DIR")


def _write(weights: Any, output: Path, layout: str) -> None:
    """Writes a folder with its model card, and prints what is in it."""
    from vit_scaling import interop
    from vit_scaling.interop import card, hub, serving
    from vit_scaling.pages import runs
    from vit_scaling.training import initial, telemetry, workdir

    found = initial.find_checkpoint(hub.place(_INPUT.value))
    # A checkpoint is named by a number: the run says which one.
    source = _INPUT.value if found is None else f"{found.parts[-3]}, step {found.name}"
    starts = [] if found is None else telemetry.read_jsonl(found.parent.parent / "starts.jsonl")
    text = card.card(
        weights,
        layout=layout,
        source=source,
        command=["python", "-m", "vit_scaling.weights", *sys.argv[1:]],
        run=None if found is None else initial.record_of(found),
        trained_by=None if found is None else runs.command_of(found.parent.parent),
        metrics=None if found is None else workdir.metrics_of(found),
        starts=[row for row in starts if row["step"] < int(found.name)] if found is not None else [],
    )
    interop.write(
        weights,
        output,
        layout=layout,
        texts={card.CARD: text},
        input_type=_INPUT_TYPE.value,
        accept_norm_eps=_ACCEPT_NORM_EPS.value,
    )
    print(f"wrote {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
    if layout in serving.LAYOUTS:
        print(serving.summary(output))


def _asked() -> str:
    asked = (_IMAGE_SIZE, _NUM_CLASSES, _CLASSES, _TRAINED_SIZE, _NORMALISATION, _IGNORE)
    return ", ".join(f"--{flag.name}={flag.value}" for flag in asked if flag.value)


def _class_map(path: str | None) -> list[int] | None:
    if path is None:
        return None
    try:
        lines = Path(path).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes={path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.isdecimal():
            raise UserError(f"--classes={path} must hold one class number per line; line {number} is {line!r}")
    if not lines:
        raise UserError(f"--classes={path} is empty; it must hold the old number of each new class, one per line")
    return [int(line) for line in lines]


if __name__ == "__main__":
    cli.run(main, __doc__, COMMANDS)
