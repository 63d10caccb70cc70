"""One job of preparing a set: what it reads, which shards it writes, and how it continues after an interruption."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import shutil
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vit_scaling import TransientError, UserError, paths
from vit_scaling.data import records
from vit_scaling.data import workers as children
from vit_scaling.data.images import codec
from vit_scaling.data.prepare import shards
from vit_scaling.data.prepare.inputs import Input, Item, list_input
from vit_scaling.data.prepare.shards import LEFT_OUT, Work
from vit_scaling.data.sources import SourceConfig

JOB = ".prepare.jsonl"  # the job, then a line for each finished shard; deleted when the manifest is written
EXPANDED = ".expanded"  # compressed tar shards, decompressed; deleted with it


def prepare(
    config: SourceConfig,
    output: Path,
    *,
    work: Work,
    shard_examples: int,
    workers: int,
    exclude: list[SourceConfig],
    strict: bool = False,
) -> dict[str, Any]:
    """Writes every split of a set to `output`, local or in a bucket, or continues an interrupted run of the same job.

    `on_corrupt` may differ from the interrupted run's, and `max_bytes` may be larger: neither changes a record that is
    written already.

    Returns:
        The manifest.

    Raises:
        UserError: bad input, something is left out and `strict`, or `output` holds another job's files.
        CorruptImageError: naming the image, if `work.on_corrupt` is "error"; finished shards stay.
        TransientError: a writing process died.
    """
    if (output / records.MANIFEST).exists():
        raise UserError(f"{output} already holds a prepared set; delete it or name another --output")
    expanded = paths.temporary_folder() if paths.in_bucket(output) else output / EXPANDED
    content = list_input(config, max_bytes=work.max_bytes, on_corrupt=work.on_corrupt, expanded=expanded)
    if strict:
        refuse_left_out(content)
    plan = list(_plan(content, output, shard_examples))
    excluded = hash_images(exclude)
    done = _resume(output, _fingerprint(content, work, shard_examples, excluded))
    total = sum(len(items) for _, items in plan)
    written = sum(len(items) for path, items in plan if path.name in done)
    progress = tqdm(total=total, initial=written, unit="img", desc=str(output), disable=None)
    with progress:
        for entry, items in _write(plan, work, excluded, workers, done):
            paths.append(output / JOB, json.dumps(entry) + "\n")
            done[entry["file"]] = entry
            progress.update(len(items))
    manifest = _write_manifest(content, plan, done, output)
    (output / JOB).unlink()
    shutil.rmtree(expanded, ignore_errors=True)
    return manifest


def refuse_left_out(content: Input) -> None:
    """Raises UserError if the listing left anything out."""
    if content.report.left_out:
        lines = [line for line in content.report.lines() if line.startswith("left out")]
        raise UserError(f"--strict allows nothing to be left out: {'; '.join(lines)}")


def hash_images(configs: list[SourceConfig]) -> np.ndarray:
    """Returns the perceptual hashes, uint64 [n], of all images of the given sets."""
    hashes = []
    for config in configs:
        items = [item for items in list_input(config).splits.values() for item in items]
        for item in tqdm(items, unit="img", desc=f"hashes of {config.name}", disable=None):
            with contextlib.suppress(codec.CorruptImageError):  # it cannot be evaluated on either
                image, _ = item.read(Work.max_bytes)
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
    """Yields (entry of the manifest, items) of every shard that is not done, as they are written."""
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
        raise TransientError(
            "a writing process died (out of memory?); the same command continues, if need be with fewer --workers"
        ) from None
    except UserError as error:
        raise error from None  # from another process: its traceback says nothing here
    finally:
        pool.shutdown(cancel_futures=True)


def _fingerprint(content: Input, work: Work, shard_examples: int, excluded: np.ndarray) -> dict[str, Any]:
    """What makes two runs the same job."""
    listing = hashlib.sha256()
    for split, items in content.splits.items():
        for item in items:
            listing.update(f"{split}\n{item.id}\n{item.label}\n".encode("utf-8", "surrogateescape"))
    return {
        "listing": listing.hexdigest(),
        "excluded": hashlib.sha256(excluded.tobytes()).hexdigest(),
        "shard_examples": shard_examples,
        **dataclasses.asdict(work),
    }


def _resume(output: Path, job: dict[str, Any]) -> dict[str, dict]:
    """Returns the entries of the shards that an earlier run of the same job finished, or starts the journal."""
    paths.make_folder(output)
    journal = output / JOB
    if not journal.exists():
        if any(output.glob("*.array_record")):
            raise UserError(
                f"{output} holds shards without a manifest that no run of prepare left there; clear it first"
            )
        paths.write(journal, json.dumps(job) + "\n")
        return {}
    first, *lines = journal.read_text().splitlines()
    try:
        earlier = json.loads(first)
    except json.JSONDecodeError:
        raise UserError(f"{journal} is damaged; delete {output} and start again") from None
    done = {}
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # the line that was being written when the run was killed
            entry = json.loads(line)
            path = output / entry["file"]
            if path.exists() and paths.size(path) == entry["bytes"]:
                done[entry["file"]] = entry
    _compare(earlier, job, output, done)
    paths.write(journal, "".join(json.dumps(line) + "\n" for line in [job, *done.values()]))
    return done


def _compare(earlier: dict[str, Any], job: dict[str, Any], output: Path, done: dict[str, dict]) -> None:
    """Raises UserError unless an interrupted job can be continued as `job`."""
    corrupt = [identity for entry in done.values() for identity in entry["corrupt"]]
    changed = [name for name, value in job.items() if earlier.get(name) != value]
    if "on_corrupt" in changed:
        changed.remove("on_corrupt")
        if corrupt and job["on_corrupt"] == "error":
            raise UserError(
                f"{output} holds an unfinished run that left out {corrupt[0]} as corrupt; continue with "
                "--on_corrupt=skip, or delete it"
            )
    if "max_bytes" in changed and job["max_bytes"] > earlier.get("max_bytes", 0) and not corrupt:
        changed.remove("max_bytes")
    if changed:
        raise UserError(
            f"{output} holds an unfinished run that differs in {', '.join(changed)}; finish it with the same flags, "
            "or delete it"
        )


def _write_manifest(
    content: Input, plan: list[tuple[Path, list[Item]]], done: dict[str, dict], output: Path
) -> dict[str, Any]:
    splits: dict[str, Any] = {
        split: {
            "num_examples": 0,
            "classes": collections.Counter(),
            **{reason: [] for reason in LEFT_OUT},
            "shards": [],
        }
        for split in content.splits
    }
    for path, _ in plan:
        entry = dict(done[path.name])
        split = splits[path.name.rsplit("-", 3)[0]]
        split["num_examples"] += entry["num_examples"]
        split["classes"].update({int(number): count for number, count in entry.pop("classes").items()})
        for reason in LEFT_OUT:
            split[reason] += entry.pop(reason)
        split["shards"].append(entry)
    for split in splits.values():
        split["classes"] = {str(number): split["classes"][number] for number in sorted(split["classes"])}
    manifest = {
        "format": records.FORMAT,
        "num_classes": content.num_classes,
        "class_names": content.class_names,
        "multi_label": content.multi_label,
        "left_out": content.report.left_out,
        "splits": splits,
    }
    paths.write(output / records.MANIFEST, json.dumps(manifest, indent=1))
    return json.loads(json.dumps(manifest))
