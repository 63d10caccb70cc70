"""Sets of ArrayRecord shards that `prepare` wrote, on disk or in a bucket.

The library reads a bucket by itself: one request for each record.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from vit_scaling import UserError, paths
from vit_scaling.data import records
from vit_scaling.data.sources import SourceConfig, make_label, open_source, split_ranges


@dataclasses.dataclass
class Slice:
    """Part of a shard, in the attributes that array_record reads."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def describe_place(slices: Sequence[Any], index: int) -> str:
    """Names a record by its place, without reading: the file may be what is stuck or damaged."""
    for part in slices:
        if index < part.take:
            return f"record {part.skip + index} of {part.filename}"
        index -= part.take
    raise IndexError(index)


class ArrayRecordSource:
    """Shards that `python -m vit_scaling.prepare` wrote; `records.py` describes them."""

    def __init__(self, config: SourceConfig):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        folder = paths.place(config.name)
        manifest = _manifest(config)
        self.config = config
        self.num_classes: int = manifest["num_classes"]
        self.class_names = tuple(manifest["class_names"]) if manifest["class_names"] else None
        self.multi_label: bool = manifest["multi_label"]
        splits = manifest["splits"]
        self._slices: list[Slice] = []
        for split, start, stop in split_ranges(config.split, {name: s["num_examples"] for name, s in splits.items()}):
            for shard in splits[split]["shards"]:
                first, last = max(start, 0), min(stop, shard["num_examples"])
                if first < last:
                    path = str(folder / shard["file"])
                    self._slices.append(Slice(path, first, last - first, shard["num_examples"]))
                start, stop = start - shard["num_examples"], stop - shard["num_examples"]
        self._records = ArrayRecordDataSource(self._slices)

    def __reduce__(self):
        return open_source, (self.config,)

    @staticmethod
    def splits(config: SourceConfig) -> list[str]:
        return list(_manifest(config)["splits"])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        header, image = records.unpack(self._records[index])
        label = header["labels"] if self.multi_label else header["label"]
        return {"image": image, "label": make_label(label, self.num_classes)}

    def id(self, index: int) -> str:
        return describe_place(self._slices, index)


def _manifest(config: SourceConfig) -> dict[str, Any]:
    """Reads the manifest of a prepared set."""
    path = paths.place(config.name) / records.MANIFEST
    if not path.exists():
        raise UserError(
            f"{config.name} holds no {records.MANIFEST}; write a set there with "
            f"`./run.sh prepare --input=IMAGES --output={config.name}`"
        )
    return records.read_manifest(path)
