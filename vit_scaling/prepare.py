"""Command: images on disk to sharded ArrayRecord with a manifest, which any config reads as kind="array_record".

    python -m vit_scaling.prepare --input=IMAGES --output=SET                        class folders, or tables of labels
    python -m vit_scaling.prepare --input=SHARDS --output=SET --shorter_side=512     tar shards, webdataset's layout
    python -m vit_scaling.prepare --input=/usr/share/datasets/fashion-mnist --output=SET    IDX files
    python -m vit_scaling.prepare --input=IMAGES --output=SET --exclude=EVALUATION   without near-duplicates of those
    python -m vit_scaling.prepare --output=SET --verify                              re-read everything

`data/files.py` and `data/tars.py` describe the inputs, `data/records.py` what is written. The images of a split are
shuffled once, by a fixed rule. A run that was killed continues when the same command is given again: finished shards
stay, nothing is written twice or lost. The listing is held in memory, some 300 bytes an image.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from vit_scaling import cli
from vit_scaling.data import children, codec, files, records, shards, sources, tars
from vit_scaling.data.shards import Item, Work

JOB = ".prepare.jsonl"  # the job, then a line for each finished shard; gone when the manifest is there

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


@dataclasses.dataclass
class Input:
    """Everything that an input folder holds, listed."""

    class_names: tuple[str, ...] | None
    num_classes: int
    multi_label: bool
    splits: dict[str, list[Item]]


def list_input(folder: Path, max_bytes: int = Work.max_bytes) -> Input:
    """Lists a folder of IDX files, of tar shards, or of images.

    Raises:
        ValueError: the folder is none of these, or something in it is refused.
    """
    if any(folder.glob("*-idx?-ubyte*")):
        arrays = files.read_idx_folder(folder)
        splits = {
            split: [Item(f"{split}/{i}", int(label), image) for i, (image, label) in enumerate(zip(*pair, strict=True))]
            for split, pair in arrays.items()
        }
        return Input(None, max(item.label for items in splits.values() for item in items) + 1, False, splits)  # type: ignore[operator]
    archives = sorted(folder.glob("*.tar"))
    if archives:
        listing, places = tars.list_tars(archives, max_bytes)
    else:
        listing = files.list_folder(folder)
        names = [file for rows in listing.splits.values() for file, _ in rows]
        places = {file: tars.Place(str(folder / file)) for file in names}
    splits = {
        split: [Item(file, label, places[file]) for file, label in rows] for split, rows in listing.splits.items()
    }
    return Input(listing.class_names, listing.num_classes, listing.multi_label, splits)


def prepare(folder: Path, output: Path, *, work: Work, shard_examples: int, workers: int, exclude: list[Path]) -> None:
    """Writes every split of `folder` to `output`, or continues a run of the same job that was stopped.

    Raises:
        ValueError: bad input, or `output` holds another job's files.
        CorruptImageError: naming the image, if `work.on_corrupt` is "error"; finished shards stay.
    """
    if (output / records.MANIFEST).exists():
        raise ValueError(f"{output} already holds a prepared set; delete it or name another --output")
    content = list_input(folder, work.max_bytes)
    plan = list(_plan(content, output, shard_examples))
    excluded = hash_images(exclude)
    done = _resume(output, _fingerprint(content, work, shard_examples, excluded))
    progress = tqdm(total=sum(len(items) for _, items in plan), unit="img", desc=str(output), disable=None)
    with progress, (output / JOB).open("a") as journal:
        for entry, items in _write(plan, work, excluded, workers, done):
            if entry["file"] not in done:
                journal.write(json.dumps(entry) + "\n")
                journal.flush()
                os.fsync(journal.fileno())
            done[entry["file"]] = entry
            progress.update(len(items))
    _write_manifest(content, plan, done, output)
    (output / JOB).unlink()


def hash_images(folders: list[Path]) -> np.ndarray:
    """Returns the perceptual hashes, uint64 [n], of all images of the given inputs or prepared sets."""
    hashes = []
    for folder in folders:
        if (folder / records.MANIFEST).exists():
            splits = json.loads((folder / records.MANIFEST).read_text())["splits"]
            source = sources.open_source(sources.SourceConfig("array_record", str(folder), "+".join(splits)))
            images: Iterator[Any] = (source[i]["image"] for i in range(len(source)))
            total = len(source)
        else:
            items = [item for items in list_input(folder).splits.values() for item in items]
            images = (item.image if isinstance(item.image, np.ndarray) else item.image.read() for item in items)
            total = len(items)
        for image in tqdm(images, total=total, unit="img", desc=f"hashes of {folder}", disable=None):
            with contextlib.suppress(codec.CorruptImageError):  # an evaluation image that nobody can see
                hashes.append(shards.perceptual_hash(codec.decode(image) if isinstance(image, bytes) else image))
    return np.array(hashes, np.uint64)


def _plan(content: Input, output: Path, shard_examples: int) -> Iterator[tuple[Path, list[Item]]]:
    """Yields every shard's path and its items."""
    for split, items in content.splits.items():
        order = np.random.default_rng(0).permutation(len(items))
        count = -(-len(items) // shard_examples)
        for number in range(count):
            chosen = order[number * shard_examples : (number + 1) * shard_examples]
            yield output / f"{split}-{number:05d}-of-{count:05d}.array_record", [items[i] for i in chosen]


def _write(
    plan: list[tuple[Path, list[Item]]], work: Work, excluded: np.ndarray, workers: int, done: dict[str, dict]
) -> Iterator[tuple[dict, list[Item]]]:
    """Yields (entry of the manifest, items) of every shard: the finished ones, then the others as they are written."""
    for path, items in plan:
        if path.name in done:
            yield done[path.name], items
    left = [(path, items) for path, items in plan if path.name not in done]
    if not workers:
        for path, items in left:
            yield shards.write_shard(path, items, work, excluded), items
        return
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, spawn, initializer=children.end_with_parent)
    try:
        running = {pool.submit(shards.write_shard, path, items, work, excluded): items for path, items in left}
        for future in concurrent.futures.as_completed(running):
            yield future.result(), running[future]
    except BrokenProcessPool:
        raise ValueError(
            "a writing process died (out of memory?); the same command goes on, with fewer --workers"
        ) from None
    except ValueError as error:
        raise ValueError(str(error)) from None  # from another process: its traceback says nothing here
    finally:
        pool.shutdown(cancel_futures=True)


def _fingerprint(content: Input, work: Work, shard_examples: int, excluded: np.ndarray) -> dict[str, Any]:
    """What makes two runs the same job."""
    listing = hashlib.sha256()
    for split, items in content.splits.items():
        for item in items:
            listing.update(f"{split}\n{item.id}\n{item.label}\n".encode())
    return {
        "listing": listing.hexdigest(),
        "excluded": hashlib.sha256(excluded.tobytes()).hexdigest(),
        "shard_examples": shard_examples,
        **dataclasses.asdict(work),
    }


def _resume(output: Path, job: dict[str, Any]) -> dict[str, dict]:
    """Returns the entries of the shards that an earlier run of the same job finished, or starts the journal."""
    output.mkdir(parents=True, exist_ok=True)
    journal = output / JOB
    if not journal.exists():
        if any(output.glob("*.array_record")):
            raise ValueError(
                f"{output} holds shards without a manifest that no run of prepare left there; clear it first"
            )
        journal.write_text(json.dumps(job) + "\n")
        return {}
    first, *lines = journal.read_text().splitlines()
    if json.loads(first) != job:
        changed = [name for name, value in job.items() if json.loads(first).get(name) != value]
        raise ValueError(
            f"{output} holds an unfinished run that differs in {', '.join(changed)}; delete it or finish that"
        )
    done = {}
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # the line that was being written when the run was killed
            entry = json.loads(line)
            path = output / entry["file"]
            if path.exists() and path.stat().st_size == entry["bytes"]:
                done[entry["file"]] = entry
    with journal.open("w") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in [job, *done.values()])
    return done


def _write_manifest(content: Input, plan: list[tuple[Path, list[Item]]], done: dict[str, dict], output: Path) -> None:
    splits: dict[str, Any] = {
        split: {"num_examples": 0, "corrupt": [], "near_duplicates": [], "shards": []} for split in content.splits
    }
    for path, _ in plan:
        entry = dict(done[path.name])
        split = splits[path.name.rsplit("-", 3)[0]]
        split["num_examples"] += entry["num_examples"]
        split["corrupt"] += entry.pop("corrupt")
        split["near_duplicates"] += entry.pop("near_duplicates")
        split["shards"].append(entry)
    manifest = {
        "format": records.FORMAT,
        "num_classes": content.num_classes,
        "class_names": content.class_names,
        "multi_label": content.multi_label,
        "splits": splits,
    }
    temporary = output / f".{records.MANIFEST}"
    temporary.write_text(json.dumps(manifest, indent=1))
    os.replace(temporary, output / records.MANIFEST)


def main(argv: Sequence[str]) -> None:
    del argv
    output = Path(_OUTPUT.value)
    if _VERIFY.value:
        with tqdm(unit="img", desc=f"verifying {output}", disable=None) as progress:
            counts = shards.verify(output, progress.update)
        print(f"{output} is whole: " + ", ".join(f"{split} {count:,}" for split, count in counts.items()))
        return
    if _INPUT.value is None:
        raise ValueError("--input is missing: name a folder of images, of tar shards or of IDX files")
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
