"""Convert images on disk to sharded ArrayRecord with a manifest, which any config reads as kind="array_record".

    ./run.sh prepare --input=IMAGES --list --sheet=classes.png
    ./run.sh prepare --input=IMAGES --check
    ./run.sh prepare --input=IMAGES --output=SET
    ./run.sh prepare --input=SHARDS --output=SET --shorter_side=512
    ./run.sh prepare --input=IMAGES --output=SET --exclude=EVALUATION
    ./run.sh prepare --output=SET --verify

The input is a folder of class folders, images with a table of labels, tar shards in webdataset's layout, parquet files
of Hugging Face datasets, IDX files, a prepared set, or KIND:NAME such as tfds:cifar10. --list shows what would be read
and what is left out, and why; --check decodes every image too; neither writes anything but the --sheet. --exclude
leaves out near-duplicates of other images; --verify re-reads a prepared set. The images of a split are shuffled once,
by a fixed rule. An interrupted run continues when the same command is given again: finished shards stay, and nothing
is written twice or lost. The listing is held in memory, about 300 bytes for each image.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from vit_scaling import UserError, cli, paths
from vit_scaling.data.prepare.shards import Work

_INPUT = flags.DEFINE_string("input", None, "A folder of images, tar shards, parquet or IDX files, or KIND:NAME.")
_OUTPUT = flags.DEFINE(cli.PathParser(bucket=True), "output", None, "Folder of the set, local or in a bucket.")
_LIST = flags.DEFINE_bool("list", False, "Show what of --input would be read, and write nothing.")
_CHECK = flags.DEFINE_bool("check", False, "The same, and decode every image.")
_SHEET = flags.DEFINE(cli.PathParser(), "sheet", None, "With --list or --check: a PNG with a few images of each class.")
_STRICT = flags.DEFINE_bool("strict", False, "Refuse an input of which anything that looks like data is left out.")
_VERIFY = flags.DEFINE_bool("verify", False, "Re-read the set in --output and change nothing.")
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "Processes that write shards; 0: none but this.", 0)
_SHARD_EXAMPLES = flags.DEFINE_integer("shard_examples", 5_000, "Images in a shard.", 1)
_EXCLUDE = flags.DEFINE_multi_string("exclude", [], "Evaluation images, as --input; may be repeated.")
_DATA_DIR = flags.DEFINE(cli.PathParser(bucket=True), "data_dir", None, "TFDS: the folder of its data sets.")
_LABEL = flags.DEFINE_string("label", "", "TFDS, parquet: the feature or column that holds the label.")
_DEFAULT = Work()
_ON_CORRUPT = flags.DEFINE_enum(
    "on_corrupt", _DEFAULT.on_corrupt, ["error", "skip"], "What a corrupt image or a damaged shard does."
)
_SHORTER_SIDE = flags.DEFINE_integer("shorter_side", _DEFAULT.shorter_side, "Shrink the shorter side to this.", 0)
_LONGER_SIDE = flags.DEFINE_integer("longer_side", _DEFAULT.longer_side, "Shrink the longer side to this.", 0)
_QUALITY = flags.DEFINE_integer("quality", _DEFAULT.quality, "JPEG quality of what shrinks.", 1, 100)
_MAX_BYTES = flags.DEFINE_integer("max_bytes", _DEFAULT.max_bytes, "Larger files are refused.", 1)
_DISTANCE = flags.DEFINE_integer("distance", _DEFAULT.distance, "Bits of the hash between near-duplicates.", 0, 63)


def main(argv: Sequence[str]) -> None:
    del argv
    from vit_scaling.data import sources
    from vit_scaling.data.prepare.job import prepare

    if _VERIFY.value:
        _verify(_output())
        return
    if _INPUT.value is None:
        raise UserError(
            "--input is missing: name a folder of images, of tar shards, parquet or IDX files, or KIND:NAME"
        )
    if re.match(r"\w+://", _INPUT.value):
        raise UserError(f"--input={_INPUT.value} is in a bucket; prepare reads local files: copy it here first")
    config = sources.parse(_INPUT.value)
    config.data_dir, config.label = _DATA_DIR.value, _LABEL.value
    if _LIST.value or _CHECK.value:
        _show(config)
        return
    if _SHEET.value:
        raise UserError("--sheet needs --list or --check")
    output = _output()
    work = Work(
        on_corrupt=_ON_CORRUPT.value,
        shorter_side=_SHORTER_SIDE.value,
        longer_side=_LONGER_SIDE.value,
        quality=_QUALITY.value,
        max_bytes=_MAX_BYTES.value,
        distance=_DISTANCE.value,
    )
    manifest = prepare(
        config,
        output,
        work=work,
        shard_examples=_SHARD_EXAMPLES.value,
        workers=_WORKERS.value,
        exclude=[sources.parse(text) for text in _EXCLUDE.value],
        strict=_STRICT.value,
    )
    _report(manifest, output)


def _output() -> Path:
    if not _OUTPUT.value:
        raise UserError("--output is missing: name the folder of the prepared set")
    return paths.place(_OUTPUT.value)


def _show(config: object) -> None:
    """Prints what an input holds, and with --check whether its images decode."""
    from vit_scaling.data.prepare import check
    from vit_scaling.data.prepare.inputs import describe, list_input
    from vit_scaling.data.prepare.job import refuse_left_out

    content = list_input(config, max_bytes=_MAX_BYTES.value, on_corrupt=_ON_CORRUPT.value)  # type: ignore[arg-type]
    print("\n".join(describe(content, check.count_classes(content))))
    if _SHEET.value:
        check.write_sheet(content, Path(_SHEET.value), _MAX_BYTES.value)
        print(f"Wrote {_SHEET.value}")
    if _STRICT.value:
        refuse_left_out(content)
    if _CHECK.value and (problems := check.decode_all(content, _MAX_BYTES.value)):
        print("\n".join(problems[:100]))
        total = sum(map(len, content.splits.values()))
        raise UserError(
            f"{len(problems):,} of {total:,} images are corrupt; prepare leaves them out with --on_corrupt=skip"
        )


def _verify(output: Path) -> None:
    from tqdm import tqdm

    from vit_scaling.data.prepare import shards

    with tqdm(unit="img", desc=f"verifying {output}", disable=None) as progress:
        counts = shards.verify(output, progress.update)
    print(f"{output} is complete: " + ", ".join(f"{split} {count:,}" for split, count in counts.items()))


def _report(manifest: dict, output: Path) -> None:
    """Prints what was written, what was left out, and how the set is read."""
    from vit_scaling.data import records
    from vit_scaling.data.sources.listing import shown, summary

    print(f"Wrote {output / records.MANIFEST}: {manifest['num_classes']:,} classes")
    names = manifest["class_names"] or [str(number) for number in range(manifest["num_classes"])]
    for split, content in manifest["splits"].items():
        left_out = f"{len(content['corrupt'])} corrupt, {len(content['near_duplicates'])} near-duplicates"
        left_out += f", {len(content['unlabelled'])} unlabelled" if content["unlabelled"] else ""
        print(f"  {split}: {content['num_examples']:,} images in {len(content['shards'])} shards; {left_out} left out")
        for reason in ("corrupt", "unlabelled"):
            if content[reason]:
                print(f"    {reason}: {summary(content[reason])}")
        rows = [f"{shown(names[int(number)])} {count:,}" for number, count in content["classes"].items()]
        print("    " + ", ".join(rows[:50]) + (f", and {len(rows) - 50:,} more classes" if len(rows) > 50 else ""))
    for reason, files in manifest["left_out"].items():
        print(f"  left out {summary(files)}: {reason}")
    print(f"Train on it: --config.data.train.kind=array_record --config.data.train.name={output}")


if __name__ == "__main__":
    cli.run(main, __doc__)
