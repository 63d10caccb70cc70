"""Tar shards of images in webdataset's layout, listed without unpacking anything.

A sample's key is its folder and its file name up to the *first* dot; the rest is the field. 000123.jpg is an image, and
000123.cls its label as text (class number or name), or 000123.json an object with "label" or "labels". So photo.v2.jpg
is the field v2.jpg of the sample photo, which is not an image field: it is left out and counted. The files of a sample
need not be adjacent. A shard's split is its name without its numbering: train-0007.tar and
train-000000-of-000002.tar are train; shards may also be in one folder for each split.

Every header's checksum is verified, and a shard must end with the end marker of a tar file. Two shards that were
concatenated are both read. Compressed shards (gzip, Zstandard) can be listed, and prepared; their images cannot be
read at random. Archives with links, devices, absolute names or names that contain .. are refused.
"""

import gzip
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vit_scaling import UserError
from vit_scaling.data.sources.listing import (
    EXTENSIONS,
    MAX_BYTES,
    OTHER_EXTENSIONS,
    SPLITS,
    Listing,
    Place,
    Report,
    find_files,
    number_labels,
    shown,
    split_of_shard,
)
from vit_scaling.data.sources.tables import checked_labels

_BLOCK = 512
_MAX_LABEL_BYTES = 1 << 20
_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.zstd")
_EXPANSION = 100  # images hardly compress: a shard that inflates further is refused


class Shard(NamedTuple):
    """What one shard holds, by key."""

    images: dict[str, tuple[str, Place]]
    labels: dict[str, tuple[list[str], bool]]  # as written, and whether they are a list


def find_shards(folder: str | Path) -> dict[str, str]:
    """Returns {path of a shard relative to the folder: its split}."""
    found = {}
    for name in find_files(folder, _SUFFIXES):
        parent, base = os.path.split(name)
        found[name] = parent if parent.lower() in SPLITS else split_of_shard(base)
    return found


def list_tars(
    folder: str | Path, *, max_bytes: int = MAX_BYTES, on_corrupt: str = "error", expanded: Path | None = None
) -> Listing:
    """Lists the images of a folder's tar shards, which are named `<shard>/<name in the shard>`.

    Args:
        folder: where the shards are.
        max_bytes: larger images are refused.
        on_corrupt: "error" stops at what is damaged or has no label; "skip" leaves it out and reports it.
        expanded: a folder to which compressed shards are decompressed, so that their images can be read.

    Raises:
        UserError: a shard is cut off, damaged or unsafe, or an image has no label; the message gives shard and offset.
    """
    root, report = str(folder), Report()
    splits: dict[str, list[tuple[str, list[str]]]] = {}
    places: dict[str, Place] = {}
    several = set()

    def fail(where: str, message: str) -> None:
        if on_corrupt != "skip":
            raise UserError(f"{shown(where)} {message}")
        report.leave_out("damaged or unlabelled in a shard", f"{where} {message}")

    for name, split in find_shards(folder).items():
        path = os.path.join(root, name)
        if expanded is not None and compression(path):
            path = _expand(path, expanded / f"{name.replace('/', '-')}.tar", fail)
        try:
            shard = _read_shard(path, name, max_bytes, fail, report)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            fail(path, f"cannot be decompressed to its end: {error}")
            continue
        for key, (member, place) in shard.images.items():
            if key not in shard.labels:
                fail(os.path.join(root, name), f"holds {shown(member)} without a label; {shown(key)}.cls or "
                     f"{shown(key)}.json should hold it")  # fmt: skip
                continue
            written, is_list = shard.labels[key]
            several.add(is_list)
            identity = f"{name}/{member}"
            splits.setdefault(split, []).append((identity, written))
            places[identity] = place
    if len(several) > 1:
        raise UserError(f"some images of {shown(root)} have one label and some a list of labels")
    if not splits:
        raise UserError(f"the tar shards of {shown(root)} hold no labelled image" + _and(report))
    listing = number_labels(splits, several == {True}, root, report)
    listing.places = places
    return listing


def _and(report: Report) -> str:
    return "".join(f"; {line}" for line in report.lines())


# ---- one shard -------------------------------------------------------------------------------------------------------


def _read_shard(path: str, name: str, max_bytes: int, fail: Callable[[str, str], None], report: Report) -> Shard:
    shard = Shard({}, {})
    with open_shard(path) as stream:
        for info, offset in _members(stream, path, fail):
            parts = info.name.split("/")
            if not info.isreg() or info.issparse() or info.name.startswith("/") or ".." in parts or "\0" in info.name:
                raise UserError(
                    f"{shown(path)}: {shown(info.name)} at byte {offset} is a link, a device or leaves the archive's "
                    "folder"
                )
            if parts[-1].startswith("."):
                report.ignored.append(f"{name}/{info.name}")
                continue
            stem, _, field = parts[-1].partition(".")
            key, field = "/".join([*parts[:-1], stem]), "." + field.lower()
            if field in EXTENSIONS | OTHER_EXTENSIONS:
                if info.size > max_bytes:
                    fail(path, f"holds {shown(info.name)} with {info.size} bytes, more than {max_bytes}")
                elif key in shard.images:
                    other = shown(shard.images[key][0])
                    fail(path, f"holds {other} and {shown(info.name)}, images of the same key")
                else:
                    shard.images[key] = info.name, Place(path, offset, info.size)
            elif field in (".cls", ".json"):
                label = _read_label(stream, info, offset, field, path, fail)
                if label is not None and shard.labels.setdefault(key, label) != label:
                    fail(path, f"has two different labels for {shown(key)}")
            elif os.path.splitext(field)[1] in EXTENSIONS | OTHER_EXTENSIONS:
                report.leave_out(
                    "the name has several dots, so its field is not an image (the key ends at the first dot)",
                    f"{name}/{info.name}",
                )  # fmt: skip
    return shard


def _members(stream: Any, path: str, fail: Callable[[str, str], None]) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Yields (header, offset of the data) of every file of a tar stream, links and devices included.

    `tarfile` itself takes a damaged header for the end of the archive, without an error.
    """
    size = os.path.getsize(path) if not compression(path) else None
    position, zeros = 0, 0
    extended: dict[str, str] = {}
    while True:
        stream.seek(position)
        block = stream.read(_BLOCK)
        if not block.strip(b"\0"):
            if len(block) < _BLOCK:
                if not zeros:
                    fail(path, f"ends at byte {position} without the end marker of a tar file: it is cut off")
                return
            zeros += 1
            position += _BLOCK
            continue
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            if info.size < 0:
                raise tarfile.HeaderError("its size is negative")
        except (tarfile.HeaderError, ValueError) as error:
            position = _next_header(stream, position, path, str(error), fail)
            zeros = 0
            continue
        if zeros == 1:  # the end marker is two blocks of zeros
            fail(path, f"has a damaged header at byte {position - _BLOCK} (it is zero)")
        zeros = 0
        data = position + _BLOCK
        if info.isdir():
            position = data
            continue
        special = info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE, *_LONG)
        length = info.size if special else int(extended.get("size", info.size))
        if size is not None and data + length > size:
            fail(path, f"is cut off: {shown(info.name)} at byte {position} has {length} bytes and "
                 f"{max(size - data, 0)} are left")  # fmt: skip
            return
        position = data + -(-length // _BLOCK) * _BLOCK
        if special:
            if length > _MAX_LABEL_BYTES:
                fail(path, f"has an extended header of {length} bytes at byte {data - _BLOCK}")
            elif info.type != tarfile.XGLTYPE:
                extended |= _extended(stream.read(length), info)
            continue
        info.name, info.size = extended.get("path", info.name).rstrip("/"), length
        extended = {}
        yield info, data


_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


def _extended(payload: bytes, info: tarfile.TarInfo) -> dict[str, str]:
    """Returns what an extended header says of the next file: its path and its size."""
    if info.type in _LONG:
        name = payload.split(b"\0")[0].decode("utf-8", "surrogateescape")
        return {"path": name} if info.type == tarfile.GNUTYPE_LONGNAME else {}
    fields = {}
    while payload:  # records of the form "LENGTH KEY=VALUE\n"
        length, _, _ = payload.partition(b" ")
        record = payload[: int(length)] if length.isdigit() and 0 < int(length) <= len(payload) else b""
        key, equals, value = record[len(length) + 1 : -1].partition(b"=")
        if not equals:
            break
        if key in (b"path", b"size"):
            fields[key.decode()] = value.decode("utf-8", "surrogateescape")
        payload = payload[int(length) :]
    return fields if fields.get("size", "0").isdecimal() else {}


def _next_header(stream: Any, position: int, path: str, why: str, fail: Callable[[str, str], None]) -> int:
    """Reports a damaged header and returns the position of the next one that is intact."""
    start, position = position, position + _BLOCK
    while block := stream.read(_BLOCK):
        position += _BLOCK
        if block.strip(b"\0"):
            try:
                tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except (tarfile.HeaderError, ValueError):
                continue
            position -= _BLOCK
            break
    fail(path, f"has a damaged header at byte {start} ({why}); {position - start} bytes there cannot be read")
    return position


def _read_label(
    stream: Any, info: tarfile.TarInfo, offset: int, field: str, path: str, fail: Callable[[str, str], None]
) -> tuple[list[str], bool] | None:
    """Returns (labels as written, whether they are a list); None where a JSON object has neither label nor labels."""
    where = f"{path}: {shown(info.name)} at byte {offset}"
    if info.size > _MAX_LABEL_BYTES:
        fail(where, f"has {info.size} bytes, too many for a label")
        return None
    stream.seek(offset)
    data = stream.read(info.size)
    try:
        if field == ".cls":
            label = data.decode().strip()
            if not label or "\n" in label:
                fail(where, "holds no label: it must be one class number or name")
                return None
            return [label], False
        content = json.loads(data)
        if not isinstance(content, dict):
            fail(where, "holds no label: it is not a JSON object")
        elif "labels" in content:
            return checked_labels(content["labels"], True, shown(where)), True
        elif "label" in content:
            return checked_labels(content["label"], False, shown(where)), False
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        fail(where, f"holds no label: {error}")
    except UserError as error:
        fail(where, f"holds no label: {str(error).removeprefix(shown(where)).lstrip(': ')}")
    return None


# ---- compression -----------------------------------------------------------------------------------------------------


def compression(path: str) -> str:
    """Returns how a shard is compressed, by its first bytes: "gzip", "zstd" or "" for not."""
    with open(path, "rb") as stream:
        first = stream.read(4)
    return "gzip" if first[:2] == b"\x1f\x8b" else "zstd" if first == b"\x28\xb5\x2f\xfd" else ""


def open_shard(path: str) -> Any:
    """Opens a shard as a stream of its uncompressed bytes that can seek forward.

    Raises:
        UserError: it is compressed with Zstandard, and the extra that reads that is not installed.
    """
    kind = compression(path)
    if kind == "gzip":
        return gzip.open(path)
    if kind == "zstd":
        try:
            import zstandard
        except ImportError:
            raise UserError(
                f"{shown(path)} is compressed with Zstandard; decompress it, or: pip install 'vit_scaling[zstd]'"
            ) from None
        return zstandard.ZstdDecompressor().stream_reader(open(path, "rb"), read_across_frames=True)
    return open(path, "rb")


def _expand(path: str, target: Path, fail: Callable[[str, str], None]) -> str:
    """Decompresses a shard to `target`, unless that is there already, and returns its path."""
    if target.exists():
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}")
    limit = _EXPANSION * os.path.getsize(path) + (64 << 20)
    try:
        with open_shard(path) as source, temporary.open("wb") as sink:
            while chunk := source.read(1 << 20):
                if sink.tell() + len(chunk) > limit:
                    raise UserError(f"{shown(path)} inflates to more than {_EXPANSION} times its size, as no images do")
                sink.write(chunk)
    except (EOFError, OSError, zlib.error) as error:
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
            raise
        fail(path, f"cannot be decompressed to its end: {error}")
    os.replace(temporary, target)
    return str(target)
