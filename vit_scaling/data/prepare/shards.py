"""One shard of a prepared set: its images are checked, shrunk if asked, and compared with evaluation images.

A near-duplicate is an image whose perceptual hash differs in few bits from that of an evaluation image. The hash
compares the 63 lowest frequencies of a 32 x 32 grey copy, without the mean, with their median. It survives another
size, another compression and small changes of brightness, but no crop or mirror.
"""

import collections
import contextlib
import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from vit_scaling import UserError, paths
from vit_scaling.data import records
from vit_scaling.data.images import codec
from vit_scaling.data.prepare.inputs import Item
from vit_scaling.data.sources.listing import MAX_BYTES, shown

LEFT_OUT = ("corrupt", "near_duplicates", "unlabelled")
"""Why an image of the listing is not in its shard."""


@dataclasses.dataclass
class Work:
    """What is done to every image."""

    on_corrupt: str = "error"
    """error: a corrupt image stops the run; skip: it is left out and named in the manifest."""
    shorter_side: int = 0
    """Larger images shrink to this length of the shorter side and become JPEG; 0: no limit."""
    longer_side: int = 0
    """The same for the longer side."""
    quality: int = 95
    """JPEG quality of what shrinks."""
    max_bytes: int = MAX_BYTES
    """Larger files count as corrupt."""
    distance: int = 4
    """Images within so many bits of an excluded image's hash are near-duplicates."""


def write_shard(path: Path, items: list[Item], work: Work, excluded: np.ndarray) -> dict[str, Any]:
    """Writes `items` in their order to a new shard and returns its entry of the manifest.

    The shard appears under its name only when it is complete.

    Args:
        path: the shard's file, local or in a bucket.
        items: what it should hold.
        work: what is done to each image.
        excluded: uint64 [n], the hashes of evaluation images; near-duplicates of them are left out.

    Raises:
        CorruptImageError: naming the image, if `work.on_corrupt` is "error".
    """
    cv2.setNumThreads(1)  # shards are written in parallel
    left_out: dict[str, list[str]] = {reason: [] for reason in LEFT_OUT}
    classes: collections.Counter[int] = collections.Counter()
    count = 0
    with paths.new_file(path) as file:
        with contextlib.closing(ArrayRecordWriter(str(file), "group_size:1")) as writer:
            for item in items:
                try:
                    image, label, reason = prepare_image(item, work, excluded)
                except (codec.CorruptImageError, PermissionError, FileNotFoundError) as error:
                    if work.on_corrupt != "skip":
                        raise codec.CorruptImageError(
                            f"{shown(item.id)} is corrupt: {error}; with --on_corrupt=skip the same command continues"
                        ) from None
                    left_out["corrupt"].append(item.id)
                    continue
                if reason:
                    left_out[reason].append(item.id)
                    continue
                writer.write(records.pack(item.id, label, image))
                classes.update(label if isinstance(label, list) else [label])
                count += 1
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        entry = {"file": path.name, "num_examples": count, "bytes": file.stat().st_size, "sha256": digest}
    return entry | {"classes": {str(number): n for number, n in sorted(classes.items())}} | left_out


def prepare_image(item: Item, work: Work, excluded: np.ndarray) -> tuple[bytes | np.ndarray, int | list[int], str]:
    """Returns (what a record stores, label, why the image is left out or "").

    Raises:
        CorruptImageError: the image cannot be decoded, or is too large.
    """
    data, label = item.read(work.max_bytes)
    if label == -1:
        return data, label, "unlabelled"
    pixels = codec.decode(data) if isinstance(data, bytes) else data
    if len(excluded) and _is_near(pixels, work, excluded):
        return data, label, "near_duplicates"
    return (_shrink(data, pixels, work) if isinstance(data, bytes) else data), label, ""


def _shrink(data: bytes, pixels: np.ndarray, work: Work) -> bytes:
    """Returns an image within the limits on its sides: the file as it was, or a smaller JPEG."""
    height, width = pixels.shape[:2]
    ratio = 1.0
    if work.shorter_side:
        ratio = min(ratio, work.shorter_side / min(height, width))
    if work.longer_side:
        ratio = min(ratio, work.longer_side / max(height, width))
    if ratio == 1.0:
        return data
    size = max(round(width * ratio), 1), max(round(height * ratio), 1)
    pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=work.quality, colorsubsampling="420")


def perceptual_hash(pixels: np.ndarray) -> np.uint64:
    """Returns the 64-bit hash of a uint8 image [H, W] or [H, W, 3] (the head of this file)."""
    grey = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    shrinks = min(grey.shape) >= 32
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    low = cv2.dct(small.astype(np.float32))[:8, :8].ravel()
    low[0] = 0
    return np.packbits(low > np.median(low[1:])).view(">u8")[0].astype(np.uint64)


def _is_near(pixels: np.ndarray, work: Work, excluded: np.ndarray) -> bool:
    return int(np.bitwise_count(excluded ^ perceptual_hash(pixels)).min()) <= work.distance


def verify(folder: Path, report: Callable[[int], Any] = id) -> dict[str, int]:
    """Re-reads a prepared set: every checksum, every record, every image, every label; no image twice.

    Args:
        folder: where the manifest lies.
        report: is called with the number of examples after each shard.

    Returns:
        {split: number of examples}.

    Raises:
        UserError: the first thing that is wrong, with the shard and the record.
    """
    if not (folder / records.MANIFEST).exists():
        raise UserError(f"{folder} holds no {records.MANIFEST}: there is nothing to verify")
    manifest = records.read_manifest(folder / records.MANIFEST)
    counts = {}
    for split, content in manifest["splits"].items():
        seen: set[str] = set()
        for shard in content["shards"]:
            path = folder / shard["file"]
            if not path.exists():
                raise UserError(f"{path} is missing")
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if digest != shard["sha256"]:
                raise UserError(f"{path} is damaged: its SHA-256 is {digest}, and the manifest says {shard['sha256']}")
            reader = ArrayRecordReader(str(path))
            number = reader.num_records()
            if number != shard["num_examples"]:
                raise UserError(f"{path} holds {number} records, and the manifest says {shard['num_examples']}")
            for index in range(number):
                header, image = records.unpack(reader.read([index])[0])
                identity = header["id"]
                where = f"{path} record {index} ({identity})"
                labels = header["labels"] if manifest["multi_label"] else [header["label"]]
                if not all(0 <= label < manifest["num_classes"] for label in labels):
                    raise UserError(f"{where} has label {labels}, and there are {manifest['num_classes']} classes")
                if identity in seen:
                    raise UserError(f"{where} is there twice")
                seen.add(identity)
                if isinstance(image, bytes):
                    try:
                        codec.decode(image)
                    except codec.CorruptImageError as error:
                        raise UserError(f"{where} is corrupt: {error}") from None
            reader.close()
            report(number)
        counts[split] = len(seen)
        if len(seen) != content["num_examples"]:
            raise UserError(
                f"split {split} holds {len(seen)} examples, and the manifest says {content['num_examples']}"
            )
    return counts
