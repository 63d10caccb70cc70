"""What is known of a set: from the set itself, or for published sets that are not on this machine from a table."""

import re
from typing import NamedTuple

from vit_scaling import UserError
from vit_scaling.data.sources import SourceConfig, open_source

# Examples and classes of whole training sets, from TFDS's catalogue; ImageNet-21k's release of fall 2011 from
# image-net.org; JFT-3B's classes from big_vision's g/14 config.
PUBLISHED: dict[str, tuple[int | None, int]] = {
    "imagenet2012": (1_281_167, 1000),
    "imagenet21k": (14_197_122, 21_841),
    "cifar10": (50_000, 10),
    "cifar100": (50_000, 100),
    "oxford_iiit_pet": (3_680, 37),
    "oxford_flowers102": (1_020, 102),
    "jft": (None, 29_593),
}


class Known(NamedTuple):
    """A set's examples, classes and whether it has several labels for each image; None for what is not known."""

    examples: int | None
    num_classes: int | None
    multi_label: bool = False


def describe(train: SourceConfig) -> Known:
    """Returns what is known of a training set, whether or not it is on this machine."""
    try:
        source = open_source(train)
    except UserError:
        examples, classes = PUBLISHED.get(train.name, (None, None))
        if examples and (part := re.fullmatch(r"train\[:(\d+)%\]", train.split)):
            examples = round(examples * int(part[1]) / 100)
        return Known(examples, classes)
    return Known(len(source), source.num_classes, source.multi_label)
