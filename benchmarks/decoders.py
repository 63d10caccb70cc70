"""Compares this project's decoders with Pillow on every file of some folders that looks like an image.

    python -m benchmarks.decoders FOLDER ... [--all]

Reads with both, turns upright, composites alpha on white, and prints for each format how many files are equal, agree
within the tolerance, differ, or are refused by one or both; then each file that differs or is refused here alone, with
the reason. Tolerance: for JPEG a mean difference of 3 grey levels (the inverse DCT and the chroma upsampling are the
fast ones), for 16-bit files and lossy WebP 1, else none. Sets to try: the tests of Pillow's source distribution,
and Debian's sources of exiv2, libimage-exiftool-perl and libpng1.6. A process of its own decodes each file once more,
and the file that raised its memory most is named.
"""

import argparse
import collections
import contextlib
import io
import os
import resource
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vit_scaling.data.images import codec

OUTCOMES = ("equal", "close", "differs", "refused here", "refused by Pillow", "refused by both")


def by_pillow(data: bytes) -> np.ndarray:
    """Returns the first frame, upright, on white, as uint8 RGB."""
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16") or (image.mode == "I" and opened.format in ("PNG", "PPM")):
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return np.asarray(image.convert("RGB"))


def compare(data: bytes) -> tuple[str, str]:
    """Returns (outcome, reason) of one file."""
    ours = theirs = None
    reason = ""
    try:
        ours = codec.decode(data)
    except codec.CorruptImageError as error:
        reason = str(error)
    try:
        theirs = by_pillow(data)
    except Exception as error:
        reason = reason or f"Pillow: {error}"
    if ours is None or theirs is None:
        both = "refused by both" if ours is theirs else "refused here" if ours is None else "refused by Pillow"
        return both, reason
    if ours.shape != theirs.shape:
        return "differs", f"{ours.shape[0]} x {ours.shape[1]} pixels here, {theirs.shape[0]} x {theirs.shape[1]} there"
    difference = np.abs(ours.astype(np.int16) - theirs)
    if not difference.any():
        return "equal", ""
    allowed = 3.0 if codec.format_of(data[:32]) == "jpeg" else 1.0
    mean = float(difference.mean())
    return "close" if mean <= allowed else "differs", f"mean difference {mean:.2f}, largest {difference.max()}"


def memory(data: bytes) -> int:
    """Returns the KiB by which decoding raises the peak memory of a copy of this process."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with contextlib.suppress(codec.CorruptImageError):
            codec.decode(data)
        os.write(writer, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    if status or not text:
        raise RuntimeError(f"decoding ended its process with status {status}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--all", action="store_true", help="list what both refuse, too")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    table: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    notes: collections.Counter[str] = collections.Counter()
    largest = 0, ""
    for path in sorted(path for folder in arguments.folders for path in folder.rglob("*")):
        if not path.is_file():
            continue
        data = path.read_bytes()
        if (format := codec.format_of(data[:32])) is None:
            continue
        largest = max(largest, (memory(data), os.fspath(path)))
        outcome, reason = compare(data)
        notes.update(note.kind for note in codec.take_notes())
        table[format][outcome] += 1
        if outcome in ("differs", "refused here", "refused by Pillow") or arguments.all:
            print(f"{outcome}: {os.fspath(path)}: {reason}")
    print(f"\n{'format':10s}" + "".join(f"{outcome:>19s}" for outcome in OUTCOMES))
    for format, counts in sorted(table.items()):
        print(f"{format:10s}" + "".join(f"{counts[outcome]:19d}" for outcome in OUTCOMES))
    print(f"notes: {dict(notes)}; most memory above the idle process: {largest[0] / 1024:.0f} MiB for {largest[1]}")


if __name__ == "__main__":
    main()
