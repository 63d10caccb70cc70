"""Measure weights: accuracy, calibration, confusions, few-shot accuracy, speed.

    ./run.sh evaluate --weights=runs/smoke --output=runs/smoke/evaluation
    ./run.sh evaluate --weights=weights/vit_b16 \\
        --data=tfds:imagenet2012:validation --output=DIR

Weights are a run, a checkpoint, or a weight file or folder of any layout. Without --data the run's own test set is
measured. The command writes evaluation.json and evaluation.png (a confusion matrix and a reliability diagram) and
prints a table. Of a backbone without a classifier, --fewshot measures the features alone. With several labels for an
image, a prediction is correct if it is one of them (ReaL).

Classes of the weights and of the set are matched by name. A set with a class that the weights lack is refused unless
--class_map says what to do; its images of other classes are then left out and counted:

    --class_map=common            the classes that both have
    --class_map=kitty=cat,a=b     NAME IN THE SET=NAME OF THE WEIGHTS, ...
    --class_map=map.csv           the same in a table of two columns
    --class_map=number            class i of the set is class i of the weights

The weights choose among all of their classes, whatever the set has.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from absl import flags

from vit_scaling import UserError, cli, paths

_WEIGHTS = flags.DEFINE(
    cli.PathParser(bucket=True, hub=True), "weights", None, "Run, checkpoint, weight file or folder.", required=True
)
_OUTPUT = flags.DEFINE(
    cli.PathParser(bucket=True), "output", None, "Folder for evaluation.json and evaluation.png.", required=True
)
_DATA = flags.DEFINE_string("data", None, "Set to measure, KIND:NAME:SPLIT, such as folder:/data/birds:test.")
_DATA_DIR = flags.DEFINE(cli.PathParser(bucket=True), "data_dir", None, "Where TFDS's sets lie.")
_IMAGE_SIZE = flags.DEFINE_string("image_size", None, "Adapt the weights to this size, HEIGHTxWIDTH or one number.")
_CROP = flags.DEFINE_string("crop", None, "central, square_central, resize or none; default: a run's own, or central.")
_RESIZE_TO = flags.DEFINE_integer("resize_to", None, "Shorter side before the crop; default: size x 256/224.", 1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 100, "Images at a time.", 1)
_WORKERS = flags.DEFINE_integer("workers", 0, "Worker processes that read; 0: threads.", 0)
_ON_CORRUPT = flags.DEFINE_enum("on_corrupt", "error", ["error", "skip"], "What a corrupt image does.")
_CLASS_MAP = flags.DEFINE_string("class_map", "", "common, number, NAME=NAME,... or a .csv file; see above.")
_FEWSHOT = flags.DEFINE_string("fewshot", None, "Set to draw shots from, KIND:NAME:SPLIT; measured on --data.")
_SHOTS = flags.DEFINE_list("shots", ["1", "5", "10", "25"], "Examples of each class.")
_THROUGHPUT = flags.DEFINE_float("throughput", 0.0, "Measure speed for so many seconds.", 0.0)
_EMA = flags.DEFINE_bool("ema", False, "Of a run: its average of the parameters.")


def main(argv: Sequence[str]) -> None:
    del argv
    # Heavy imports wait until the flags are known to be good, so that a typo is answered at once.
    from vit_scaling import config as config_lib
    from vit_scaling.data.loader import DataConfig
    from vit_scaling.data.sources import classes, listing, open_source
    from vit_scaling.evaluation import figure, predict, scores
    from vit_scaling.evaluation import model as measure
    from vit_scaling.interop import Target, hub
    from vit_scaling.parallel.mesh import MeshConfig
    from vit_scaling.training import initial, workdir

    class_map = classes.parse_class_map(_CLASS_MAP.value)
    size = None if _IMAGE_SIZE.value is None else config_lib.image_size("--image_size", _IMAGE_SIZE.value)
    weights = initial.read(_WEIGHTS.value, Target(image_size=size), ema=_EMA.value)
    found = initial.find_checkpoint(hub.place(_WEIGHTS.value))
    run = None if found is None else initial.record_of(found)["config"]
    if not weights.num_classes and _FEWSHOT.value is None:
        raise UserError(
            f"{_WEIGHTS.value} has no classifier; measure its features with --fewshot=KIND:NAME:SPLIT, or fine-tune it"
        )
    source = _source(run)
    transform = predict.eval_transform(weights, run, crop=_CROP.value, resize_to=_RESIZE_TO.value)
    data = DataConfig(workers=_WORKERS.value, on_corrupt=_ON_CORRUPT.value)
    names = initial.class_names(_WEIGHTS.value, weights)
    matched = classes.match(open_source(source), names, weights.num_classes, class_map) if weights.num_classes else None
    model = measure.freeze(weights, MeshConfig())

    report = (
        measure.on_set(model, matched, transform, data, _BATCH_SIZE.value, weights.loss)
        if matched is not None
        else None
    )
    numbers = {} if report is None else dict(report.numbers)
    if _FEWSHOT.value is not None:
        shots = tuple(int(shot) for shot in _SHOTS.value)
        train = _parse("--fewshot", _FEWSHOT.value)
        numbers |= measure.few_shot(model, train, source, transform, data, _BATCH_SIZE.value, shots)
    if _THROUGHPUT.value:
        numbers |= measure.throughput(model, weights, _BATCH_SIZE.value, _THROUGHPUT.value)

    output = paths.place(_OUTPUT.value)
    paths.make_folder(output)
    record: dict[str, Any] = {
        "weights": _WEIGHTS.value,
        "data": dataclasses.asdict(source),
        "transform": dataclasses.asdict(transform),
        "numbers": numbers,
    }
    if isinstance(matched, classes.MatchedSource) and matched.left_out:
        record["left_out_classes"] = matched.left_out
        print(f"the weights lack the classes {listing.summary(matched.left_out)}; their images are left out")
    if report is not None and matched is not None:
        names = names or matched.class_names or tuple(str(label) for label in range(weights.num_classes))
        title = f"{_WEIGHTS.value} on {source.name} {source.split}: {100 * numbers['top1']:.2f}%"
        picture = output / "evaluation.png"
        figure.evaluation_figure(picture, title=title, confusion=report.confusion, names=names, bins=report.bins)
        total = report.confusion.sum(axis=1)
        record["classes"] = {
            name: {
                "accuracy": float(report.confusion[i, i] / total[i]) if total[i] else None,
                "examples": int(total[i]),
            }
            for i, name in enumerate(names)
        }
        record |= {"confusion": report.confusion.tolist(), "calibration": report.bins}
    workdir.write_json(output / "evaluation.json", record)
    if report is None or names is None:
        print("\n".join(f"{name:24s} {value:.4f}" for name, value in numbers.items()))
        print(f"report:  {output / 'evaluation.json'}")
        return
    total = report.confusion.sum(axis=1)
    print("\n".join(scores.parts(numbers, int(numbers["examples"]))))
    rows = [(name, float(report.confusion[i, i] / total[i]), int(total[i])) for i, name in enumerate(names) if total[i]]
    print("lowest accuracies:", *(f"  {line}" for line in scores.worst_classes(rows)), sep="\n")
    print(f"report:  {output / 'evaluation.json'}\npicture: {output / 'evaluation.png'}")


def _parse(flag: str, text: str):
    """Returns the source of KIND:NAME:SPLIT; the name may have colons of its own."""
    from vit_scaling.data.sources import SourceConfig

    # A split may have colons too, within its brackets.
    found = re.fullmatch(r"([^:]+):(.+?):((?:[^:\[\]]|\[[^\]]*\])+)", text)
    if not found:
        raise UserError(f"{flag} is {text!r}; write KIND:NAME:SPLIT, such as builtin:mnist:test")
    kind, name, split = found.groups()
    return SourceConfig(kind, name, split, data_dir=_DATA_DIR.value)


def _source(run: dict[str, Any] | None):
    if _DATA.value is not None:
        return _parse("--data", _DATA.value)
    from vit_scaling.data.sources import SourceConfig

    own = None if run is None else run["evaluation"]["test"] or run["evaluation"]["validation"]
    if own is None:
        raise UserError("--data must be given: these weights name no set of their own")
    return SourceConfig.from_json(own)


if __name__ == "__main__":
    cli.run(main, __doc__)
