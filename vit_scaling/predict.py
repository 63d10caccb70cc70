"""Classify images: the most likely classes of every image, from a run or any weights.

    ./run.sh predict --weights=runs/pets photo.jpg
    ./run.sh predict --weights=runs/pets 'holiday/**/*.jpg' \\
        --format=json --output=holiday.jsonl
    ./run.sh predict --weights=weights/dinov2 /data/photos \\
        --top=0 --features=photos.npz

An argument is an image, a folder (all images in it, at any depth) or a pattern. Weights are a run, a checkpoint, or a
weight file or folder of any layout; images are shown as the weights' own evaluation shows them. A file that is corrupt
or cannot be read is named on stderr and passed over; the exit code is then 1.

    --format=json    one object per line:
                     {"file": ..., "predictions": [{"label": ..., "index": ...,
                     "probability": ...}, ...]}
    --format=csv     file,rank,label,index,probability
    --features=FILE  .npz with "files" [N] and "features" float32 [N, width]
"""

import contextlib
import csv
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from absl import flags

from vit_scaling import UserError, cli

_WEIGHTS = flags.DEFINE(
    cli.PathParser(bucket=True, hub=True), "weights", None, "Run, checkpoint, weight file or folder.", required=True
)
_TOP = flags.DEFINE_integer("top", 5, "Classes for each image, the most likely first; 0: none.", 0)
_FORMAT = flags.DEFINE_enum("format", "table", ["table", "csv", "json"], "What is written.")
_OUTPUT = flags.DEFINE(cli.PathParser(), "output", None, "File to write to; default: stdout.")
_SHEET = flags.DEFINE(cli.PathParser(), "sheet", None, "PNG file for a contact sheet of the first 48 images.")
_FEATURES = flags.DEFINE(cli.PathParser(), "features", None, ".npz file for the features that the classifier sees.")
_IMAGE_SIZE = flags.DEFINE_string("image_size", None, "Adapt the weights to this size, HEIGHTxWIDTH or one number.")
_CROP = flags.DEFINE_string("crop", None, "central, square_central, resize or none; default: the weights' own.")
_RESIZE_TO = flags.DEFINE_integer("resize_to", None, "Shorter side before the crop; default: the weights' own.", 1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images at a time.", 1)
_EMA = flags.DEFINE_bool("ema", False, "Of a run: its average of the parameters.")


def main(argv: Sequence[str]) -> None:
    arguments = argv[1:]
    if not arguments:
        raise UserError("name at least one image, folder or pattern; --help shows how")
    if _FEATURES.value and not _FEATURES.value.endswith(".npz"):
        raise UserError(f"--features is {_FEATURES.value!r}; its name must end in .npz")
    if not _TOP.value and not _FEATURES.value:
        raise UserError("--top=0 without --features leaves nothing to do")
    # Heavy imports wait until the flags are known to be good, so that a typo is answered at once.
    from tqdm import tqdm

    from vit_scaling import config as config_lib
    from vit_scaling.evaluation import model, predict
    from vit_scaling.evaluation.features import FeatureWriter
    from vit_scaling.interop import Target
    from vit_scaling.parallel.mesh import MeshConfig
    from vit_scaling.training import initial

    found = predict.Found(arguments)
    size = None if _IMAGE_SIZE.value is None else config_lib.image_size("--image_size", _IMAGE_SIZE.value)
    weights = initial.read(_WEIGHTS.value, Target(image_size=size), ema=_EMA.value)
    if not weights.num_classes and _TOP.value:
        raise UserError(f"{_WEIGHTS.value} has no classifier; write its features with --top=0 --features=FILE.npz")
    run = initial.run_of(_WEIGHTS.value)
    show = predict.eval_transform(weights, run, crop=_CROP.value, resize_to=_RESIZE_TO.value)
    predictions = predict.predict(
        model.freeze(weights, MeshConfig()),
        found,
        show,
        initial.class_names(_WEIGHTS.value, weights),
        top=min(_TOP.value, weights.num_classes),
        batch_size=_BATCH_SIZE.value,
        loss=weights.loss,
        features=_FEATURES.value is not None,
    )

    sheet = predict.Sheet()
    count = failed = 0
    with contextlib.ExitStack() as stack:
        output = sys.stdout
        if _OUTPUT.value:
            output = stack.enter_context(open(_OUTPUT.value, "w", encoding="utf-8", newline=""))
        features = stack.enter_context(FeatureWriter(_FEATURES.value)) if _FEATURES.value else None
        write = _Writer(output, _FORMAT.value)
        for prediction in tqdm(predictions, unit="image", disable=not sys.stderr.isatty()):
            count += 1
            if prediction.error is not None:
                failed += 1  # the loader has logged its name and the reason
                continue
            if _TOP.value:
                write(prediction)
            if features is not None and prediction.features is not None:
                features.add(prediction.file, prediction.features)
            if _SHEET.value:
                sheet.add(prediction)
    if _SHEET.value:
        sheet.write(Path(_SHEET.value))
    if found.left_out:
        print(f"{found.left_out} files of the folders are no images and were left out", file=sys.stderr)
    if failed:
        print(f"{failed} of {count} files could not be used", file=sys.stderr)
        sys.exit(1)


class _Writer:
    """Writes predictions one by one."""

    def __init__(self, output: TextIO, format: str):
        self._output, self._format = output, format
        self._rows = csv.writer(output)
        if format == "csv":
            self._rows.writerow(("file", "rank", "label", "index", "probability"))

    def __call__(self, prediction: Any) -> None:
        if self._format == "json":
            row = {
                "file": prediction.file,
                "predictions": [dataclasses.asdict(likely) for likely in prediction.classes],
            }
            self._output.write(json.dumps(row) + "\n")
        elif self._format == "csv":
            for rank, likely in enumerate(prediction.classes, 1):
                probability = f"{likely.probability:.6f}"
                self._rows.writerow((prediction.file, rank, likely.label, likely.index, probability))
        else:
            classes = ", ".join(f"{likely.label} {likely.probability:.1%}" for likely in prediction.classes)
            self._output.write(f"{prediction.file}: {classes}\n")
        self._output.flush()


if __name__ == "__main__":
    cli.run(main, __doc__, words=True)
