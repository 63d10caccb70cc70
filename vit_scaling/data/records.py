"""The record and the manifest that `prepare` writes and `sources` reads.

A data set is a folder of ArrayRecord shards, `<split>-<shard>-of-<shards>.array_record`, and one `manifest.json`.
A record stands on its own:

    4 bytes   b"VSR1"
    4 bytes   length of the header, little endian
    header    JSON in UTF-8: {"id": "cat/1.jpg", "label": 3} or {"id": "7", "labels": [1, 5]}, and {"shape": [28, 28]}
              where the image is raw uint8 values and not an encoded file
    rest      the image: an encoded file (JPEG, PNG, ...) as it was, or raw values

The manifest gives, for the whole set, {"format", "num_classes", "class_names", "multi_label", "left_out"} and for every
split the number of examples, the number in each class, what was left out, and each shard's name, number of records,
bytes and SHA-256.
"""

import json
import struct
from typing import Any

import numpy as np

from vit_scaling import UserError

FORMAT = "vit_scaling records 1"
MANIFEST = "manifest.json"
MAGIC = b"VSR1"


def pack(identity: str, label: int | list[int], image: bytes | np.ndarray) -> bytes:
    """Returns the record of one image.

    Args:
        identity: names the record in messages, for instance its path below the input folder.
        label: class index, or the list of the class indices that are present (multi-label).
        image: an encoded file, or a uint8 array [H, W] or [H, W, C] to be stored raw.
    """
    header: dict[str, Any] = {"id": identity}
    header |= {"labels": label} if isinstance(label, list) else {"label": label}
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise UserError(f"record {identity!r}: a raw image must be uint8, not {image.dtype}")
        header["shape"] = list(image.shape)
        image = image.tobytes()
    text = json.dumps(header, separators=(",", ":")).encode()
    return MAGIC + struct.pack("<I", len(text)) + text + image


def unpack(record: bytes) -> tuple[dict[str, Any], bytes | np.ndarray]:
    """Returns (header, image) of a record: the inverse of `pack`.

    Raises:
        UserError: the bytes are not such a record.
    """
    if record[:4] != MAGIC:
        raise UserError(f"not a record of this project: it begins with {record[:4]!r} and not with {MAGIC!r}")
    try:
        start = 8 + struct.unpack_from("<I", record, 4)[0]
        header = json.loads(record[8:start])
        image: bytes | np.ndarray = record[start:]
        if "shape" in header:
            image = np.frombuffer(record, np.uint8, offset=start).reshape(header["shape"])
    except (ValueError, struct.error, TypeError) as error:
        raise UserError(f"the record's header is damaged: {error}") from None
    return header, image


def read_manifest(path: Any) -> dict[str, Any]:
    """Returns the manifest of a prepared set.

    Args:
        path: the file, a pathlib or epath path.

    Raises:
        UserError: it is damaged, or of another format.
    """
    try:
        manifest = json.loads(path.read_text())
        found = manifest.get("format")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if found != FORMAT:
        raise UserError(f"{path} is of format {found!r}, not {FORMAT!r}")
    if missing := {"num_classes", "class_names", "multi_label", "splits"} - set(manifest):
        raise UserError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}")
    return manifest
