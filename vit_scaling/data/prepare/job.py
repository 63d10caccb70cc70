"""One job of preparing a set: what it reads, which shards it writes, and how it goes on after a kill."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vit_scaling import UserError
from vit_scaling.data import records, sources
from vit_scaling.data import workers as children
from vit_scaling.data.images import codec
from vit_scaling.data.prepare import shards, tars
from vit_scaling.data.prepare.shards import Item, Work
from vit_scaling.data.sources import listing as files

JOB = ".prepare.jsonl"  # the job, then a line for each finished shard; gone when the manifest is there


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
        UserError: the folder is none of these, or something in it is refused.
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
        UserError: bad input, or `output` holds another job's files.
        CorruptImageError: naming the image, if `work.on_corrupt` is "error"; finished shards stay.
    """
    if (output / records.MANIFEST).exists():
        raise UserError(f"{output} already holds a prepared set; delete it or name another --output")
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
        raise UserError(
            "a writing process died (out of memory?); the same command goes on, with fewer --workers"
        ) from None
    except ValueError as error:
        raise UserError(str(error)) from None  # from another process: its traceback says nothing here
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
            raise UserError(
                f"{output} holds shards without a manifest that no run of prepare left there; clear it first"
            )
        journal.write_text(json.dumps(job) + "\n")
        return {}
    first, *lines = journal.read_text().splitlines()
    if json.loads(first) != job:
        changed = [name for name, value in job.items() if json.loads(first).get(name) != value]
        raise UserError(
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
