"""An own set, as configs name it: its splits, found or made, and the sizes that follow from its number of images."""

import dataclasses
import math
import sys

from vit_scaling import UserError
from vit_scaling.data import sources
from vit_scaling.data.sources import SourceConfig, holdout

HELD_OUT = 0.1
NAMES = {
    "train": ("train", "training", "ilsvrc2012_img_train"),
    "validation": ("validation", "val", "valid", "dev", "ilsvrc2012_img_val"),
    "test": ("test", "testing"),
}


@dataclasses.dataclass(frozen=True)
class OwnSet:
    """The splits of a set, and how many images and classes the training split has."""

    train: SourceConfig
    validation: SourceConfig
    test: SourceConfig | None
    images: int
    num_classes: int


def find(text: str) -> OwnSet:
    """Returns the splits of the set that a user names: PATH or KIND:NAME (`sources.parse`).

    A set without a validation split gives a tenth of its training images (`holdout.divide` says how they are chosen);
    a set without names of splits is all training images; the test split is optional. What was found is printed to
    stderr.

    Raises:
        UserError: there is no such set, or its splits have other names.
    """
    named = sources.parse(text)
    splits = sources.list_splits(named)
    found = {use: next((split for split in splits if split.lower() in names), None) for use, names in NAMES.items()}
    if found["train"] is None and len(splits) == 1:
        found["train"] = splits[0]
    if found["train"] is None:
        raise UserError(f"the set {text} has the splits {', '.join(splits)}; call one of them train, or keep only one")

    def part(split: str | None) -> SourceConfig | None:
        return None if split is None else dataclasses.replace(named, split=split)

    train, validation, test = part(found["train"]), part(found["validation"]), part(found["test"])
    assert train is not None
    made = validation is None
    if validation is None:
        sides = [
            SourceConfig("holdout", name=named.name, split=side, parts=(train,), weights=(1 - HELD_OUT, HELD_OUT))
            for side in holdout.PARTS
        ]
        train, validation = sides
    opened, held_out = sources.open_source(train), sources.open_source(validation)
    _say(
        f"{text}: {len(opened):,} training images of {opened.num_classes} classes, {len(held_out):,} for validation "
        + (f"({holdout.describe(len(opened) + len(held_out))})" if made else f"({found['validation']})")
        + (", no test split" if test is None else f", test split {found['test']}")
    )
    return OwnSet(train, validation, test, len(opened), opened.num_classes)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How a run follows from its number of images."""

    batch_size: int
    steps: int
    warmup: int
    workers: int


def sizes(images: int, epochs: float, most: int, least_steps: int = 100) -> Sizes:
    """Returns batch size, steps and warmup for a training set, and prints why.

    Args:
        images: of the training set.
        epochs: to train for.
        most: the recipe's batch size, which is not exceeded.
        least_steps: for the smallest sets, however many epochs that is.

    Raises:
        UserError: `epochs` is not a positive number.
    """
    if not 0 < epochs < math.inf:
        raise UserError(f"epochs is {epochs:g} and must be a positive number")
    batch_size = 8
    while batch_size * 2 <= min(most, images // 20):  # at least 20 steps in an epoch
        batch_size *= 2
    batch_size = min(batch_size, images)
    steps = max(round(epochs * images / batch_size), least_steps)
    warmup = min(max(steps // 10, 1), 500)
    _say(
        f"batch {batch_size}: the largest power of two from 8 to {most} that leaves 20 steps in an epoch of {images:,} "
        f"images, or the least; "
        f"{steps:,} steps: {steps * batch_size / images:.0f} epochs; warmup {warmup}: a tenth of them, at most 500"
    )
    return Sizes(batch_size, steps, warmup, workers=0 if images < 20_000 else 8)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)
