"""Convert images on disk to sharded ArrayRecord with a manifest, which any config reads as kind="array_record".

    ./run.sh prepare --input=IMAGES --output=SET
    ./run.sh prepare --input=SHARDS --output=SET --shorter_side=512
    ./run.sh prepare --input=/usr/share/datasets/fashion-mnist --output=SET
    ./run.sh prepare --input=IMAGES --output=SET --exclude=EVALUATION
    ./run.sh prepare --output=SET --verify

The input is a folder of class folders, images with a table of labels, tar shards in webdataset's layout, or IDX
files. --exclude leaves out near-duplicates of other images; --verify re-reads a prepared set. The images of a split are
shuffled once, by a fixed rule. A run that was killed continues when the same command is given again: finished shards
stay, nothing is written twice or lost. The listing is held in memory, about 300 bytes for each image.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from vit_scaling import UserError, cli
from vit_scaling.data.prepare.shards import Work

_INPUT = flags.DEFINE_string("input", None, "Folder of images, of tar shards or of IDX files.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder of the prepared set.", required=True)
_VERIFY = flags.DEFINE_bool("verify", False, "Re-read the set in --output and change nothing.")
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "Processes that write shards; 0: none but this.", 0)
_SHARD_EXAMPLES = flags.DEFINE_integer("shard_examples", 5_000, "Images in a shard.", 1)
_EXCLUDE = flags.DEFINE_multi_string("exclude", [], "Evaluation images, as --input or prepared; may be repeated.")
_DEFAULT = Work()
_ON_CORRUPT = flags.DEFINE_enum("on_corrupt", _DEFAULT.on_corrupt, ["error", "skip"], "What a corrupt image does.")
_SHORTER_SIDE = flags.DEFINE_integer("shorter_side", _DEFAULT.shorter_side, "Shrink the shorter side to this.", 0)
_LONGER_SIDE = flags.DEFINE_integer("longer_side", _DEFAULT.longer_side, "Shrink the longer side to this.", 0)
_QUALITY = flags.DEFINE_integer("quality", _DEFAULT.quality, "JPEG quality of what shrinks.", 1, 100)
_MAX_BYTES = flags.DEFINE_integer("max_bytes", _DEFAULT.max_bytes, "Larger files are refused.", 1)
_DISTANCE = flags.DEFINE_integer("distance", _DEFAULT.distance, "Bits of the hash between near-duplicates.", 0, 63)


def main(argv: Sequence[str]) -> None:
    del argv
    from tqdm import tqdm

    from vit_scaling.data import records
    from vit_scaling.data.prepare import shards
    from vit_scaling.data.prepare.job import prepare

    output = Path(_OUTPUT.value)
    if _VERIFY.value:
        with tqdm(unit="img", desc=f"verifying {output}", disable=None) as progress:
            counts = shards.verify(output, progress.update)
        print(f"{output} is complete: " + ", ".join(f"{split} {count:,}" for split, count in counts.items()))
        return
    if _INPUT.value is None:
        raise UserError("--input is missing: name a folder of images, of tar shards or of IDX files")
    work = Work(
        on_corrupt=_ON_CORRUPT.value,
        shorter_side=_SHORTER_SIDE.value,
        longer_side=_LONGER_SIDE.value,
        quality=_QUALITY.value,
        max_bytes=_MAX_BYTES.value,
        distance=_DISTANCE.value,
    )
    prepare(
        Path(_INPUT.value),
        output,
        work=work,
        shard_examples=_SHARD_EXAMPLES.value,
        workers=_WORKERS.value,
        exclude=[Path(folder) for folder in _EXCLUDE.value],
    )
    manifest = json.loads((output / records.MANIFEST).read_text())
    print(f"Wrote {output / records.MANIFEST}: {manifest['num_classes']} classes")
    for split, content in manifest["splits"].items():
        left_out = f"{len(content['corrupt'])} corrupt, {len(content['near_duplicates'])} near-duplicates left out"
        print(f"  {split}: {content['num_examples']:,} images in {len(content['shards'])} shards; {left_out}")


if __name__ == "__main__":
    cli.run(main, __doc__)
