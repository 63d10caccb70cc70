"""Tar shards of images in webdataset's layout, listed without unpacking anything.

Files that share everything up to the first dot of their name belong together: `000123.jpg` is the image, `000123.cls`
its label as text (class index or name), or `000123.json` an object with "label" or "labels". A shard's split is its
name without the number at the end: `train-0007.tar` is train.

Nothing is ever written where an archive says: images are read from their place inside it. An archive with links,
devices, absolute names or names that climb (`..`) is refused all the same, as one that is not what it should be.
"""

import json
import os
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

from vit_scaling import UserError
from vit_scaling.data.sources.listing import EXTENSIONS, Listing, number_labels

_MAX_LABEL_BYTES = 1 << 20


class Place(NamedTuple):
    """Where the bytes of an image lie."""

    path: str
    offset: int = 0
    size: int | None = None  # None: to the end of the file

    def read(self) -> bytes:
        with open(self.path, "rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.size)


def list_tars(paths: list[Path], max_bytes: int) -> tuple[Listing, dict[str, Place]]:
    """Lists the images of tar shards.

    Args:
        paths: the shards.
        max_bytes: larger images are refused.

    Returns:
        The listing, whose files are named `<shard>/<name in the shard>`, and where each of them lies.

    Raises:
        UserError: an archive is cut off, compressed or unsafe, or an image has no label.
    """
    splits: dict[str, list[tuple[str, list[str]]]] = {}
    places: dict[str, Place] = {}
    several = set()
    for path in sorted(paths):
        split = re.sub(r"[-_.]?\d*$", "", path.stem) or "all"
        images, labels = _read_tar(path, max_bytes)
        for key, (name, place) in images.items():
            if key not in labels:
                raise UserError(f"{path}: {name} has no label; {key}.cls or {key}.json should hold it")
            written, is_list = labels[key]
            several.add(is_list)
            identity = f"{path.name}/{name}"
            splits.setdefault(split, []).append((identity, written))
            places[identity] = place
    if len(several) > 1:
        raise UserError(f"some images of {paths[0].parent} have one label and some a list of labels")
    listing = number_labels(splits, several == {True}, where=str(paths[0].parent))
    return listing, places


def _read_tar(path: Path, max_bytes: int) -> tuple[dict[str, tuple[str, Place]], dict[str, tuple[list[str], bool]]]:
    """Returns {key: (name, place)} of a shard's images and {key: (labels as written, whether a list)}."""
    images: dict[str, tuple[str, Place]] = {}
    labels: dict[str, tuple[list[str], bool]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isdir():
                    continue
                parts = member.name.split("/")
                if not member.isreg() or member.name.startswith("/") or ".." in parts or "\0" in member.name:
                    raise UserError(f"{path}: {member.name!r} is a link, a device or leaves the archive's folder")
                stem, _, extension = parts[-1].partition(".")
                key, extension = "/".join([*parts[:-1], stem]), "." + extension.lower()
                if extension in EXTENSIONS:
                    if member.size > max_bytes:
                        raise UserError(f"{path}: {member.name} has {member.size} bytes, more than {max_bytes}")
                    if key in images:
                        raise UserError(f"{path}: {images[key][0]} and {member.name} are images of the same key")
                    images[key] = member.name, Place(str(path), member.offset_data, member.size)
                elif extension in (".cls", ".json"):
                    if member.size > _MAX_LABEL_BYTES:
                        raise UserError(f"{path}: {member.name} has {member.size} bytes, too many for a label")
                    stream = archive.extractfile(member)
                    assert stream is not None
                    label = _read_label(stream.read(), extension, f"{path}: {member.name}")
                    if label is not None:
                        labels[key] = label
            end = archive.offset
    except tarfile.ReadError as error:
        raise UserError(f"{path} cannot be read as an uncompressed tar file: {error}") from None
    if end > os.path.getsize(path):
        raise UserError(f"{path} is cut off: its last file ends behind its own end")
    return images, labels


def _read_label(data: bytes, extension: str, where: str) -> tuple[list[str], bool] | None:
    """Returns (labels as written, whether they are a list); None where a JSON object has neither label nor labels."""
    try:
        if extension == ".cls":
            return [data.decode().strip()], False
        content = json.loads(data)
        if "labels" in content:
            return [str(label) for label in content["labels"]], True
        return ([str(content["label"])], False) if "label" in content else None
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise UserError(f"{where} holds no label: {error}") from None
