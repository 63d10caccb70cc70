"""Several sources read as one."""

import bisect
import itertools
from typing import Any

from vit_scaling import UserError
from vit_scaling.data.sources import Source, SourceConfig, open_source


class MixtureSource:
    """Several sources of the same classes. Training reads them by weight; indexing, one part after the other."""

    def __init__(self, config: SourceConfig):
        if not config.parts or len(config.parts) != len(config.weights):
            raise UserError(f"a mixture needs as many weights as parts: {len(config.weights)} and {len(config.parts)}")
        if not all(weight > 0 for weight in config.weights):
            raise UserError(f"a mixture's weights must be positive, not {config.weights}; leave a part out instead")
        self.parts = [open_source(part) for part in config.parts]
        self.weights = config.weights
        first = self.parts[0]
        for part, part_config in zip(self.parts, config.parts, strict=True):
            if (part.num_classes, part.multi_label) != (first.num_classes, first.multi_label) or (
                part.class_names and first.class_names and part.class_names != first.class_names
            ):
                raise UserError(
                    f"a mixture's parts must have the same classes: {config.parts[0].name!r} has {first.num_classes}, "
                    f"{part_config.name!r} has {part.num_classes}, or they are named or combined differently"
                )
        self.num_classes = first.num_classes
        self.class_names = first.class_names
        self.multi_label = first.multi_label
        self.starts = list(itertools.accumulate([len(part) for part in self.parts[:-1]], initial=0))

    @staticmethod
    def splits(config: SourceConfig) -> list[str]:
        raise UserError("a mixture has no splits of its own; name one of its parts")

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def _locate(self, index: int) -> tuple[Source, int]:
        number = bisect.bisect_right(self.starts, index) - 1
        return self.parts[number], index - self.starts[number]

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, index = self._locate(index)
        return part[index]

    def id(self, index: int) -> str:
        part, index = self._locate(index)
        return part.id(index)
