"""Command: images on disk to sharded ArrayRecord with a manifest, which any config reads as kind="array_record".

    python -m vit_scaling.prepare --input=/usr/share/datasets/fashion-mnist --output=data/fashion_mnist

The input is a folder of IDX files (the MNIST family). `data/records.py` describes what is written.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
from absl import app, flags
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from vit_scaling.data import files, records

_INPUT = flags.DEFINE_string("input", None, "Folder of IDX files.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write shards and manifest to.", required=True)
_SHARD_EXAMPLES = flags.DEFINE_integer("shard_examples", 10_000, "Examples in a shard.", lower_bound=1)


def prepare_idx(folder: Path, output: Path, shard_examples: int) -> None:
    """Writes every split of a folder of IDX files, in an order that is shuffled once and for all."""
    manifest = {"format": records.FORMAT, "num_classes": 0, "class_names": None, "multi_label": False, "splits": {}}
    output.mkdir(parents=True, exist_ok=True)
    for split, (images, labels) in files.read_idx_folder(folder).items():
        order = np.random.default_rng(0).permutation(len(labels))
        starts = range(0, len(order), shard_examples)
        shards = []
        for number, start in enumerate(tqdm(starts, desc=split, unit="shard")):
            file = f"{split}-{number:05d}-of-{len(starts):05d}.array_record"
            chosen = order[start : start + shard_examples]
            writer = ArrayRecordWriter(str(output / f".{file}"), "group_size:1")
            for index in chosen:
                writer.write(records.pack(f"{split}/{index}", int(labels[index]), images[index]))
            writer.close()
            os.replace(output / f".{file}", output / file)
            data = (output / file).read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            shards.append({"file": file, "num_examples": len(chosen), "bytes": len(data), "sha256": digest})
        manifest["num_classes"] = max(manifest["num_classes"], int(labels.max()) + 1)
        manifest["splits"][split] = {"num_examples": len(order), "shards": shards}
    temporary = output / f".{records.MANIFEST}"
    temporary.write_text(json.dumps(manifest, indent=1))
    os.replace(temporary, output / records.MANIFEST)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    prepare_idx(Path(_INPUT.value), Path(_OUTPUT.value), _SHARD_EXAMPLES.value)
    print(f"Wrote {_OUTPUT.value}/{records.MANIFEST}")


if __name__ == "__main__":
    app.run(main)
