"""What would be read, without writing a set: counts, every image decoded if asked for, and a sheet of examples."""

import collections
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from vit_scaling.data.images import codec
from vit_scaling.data.prepare.inputs import Input, Item, Record, name_of
from vit_scaling.data.sources.listing import Label, shown

_TILE, _COLUMNS, _MAX_ROWS = 72, 8, 100  # of a sheet, in pixels, images and classes


def count_classes(content: Input) -> dict[str, collections.Counter[int]]:
    """Returns for each split the number of images of each class; reads the records where only they know."""
    counts = {}
    for split, items in content.splits.items():
        known = content.class_counts(split)
        counts[split] = collections.Counter() if known is None else known
        if known is None:
            for item in tqdm(items, unit="img", desc=f"labels of {split}", disable=None):
                label = item.read(0)[1]
                if label == -1:
                    content.report.leave_out("unlabelled (label -1)", item.id)
                counts[split].update(label if isinstance(label, list) else [label] * (label >= 0))
    return counts


def decode_all(content: Input, max_bytes: int) -> list[str]:
    """Decodes every image and returns a sentence for each that is corrupt or unlabelled."""
    problems = []
    items = [item for items in content.splits.values() for item in items]
    for item in tqdm(items, unit="img", desc="checking", disable=None):
        try:
            image, _ = item.read(max_bytes)
            if isinstance(image, bytes):
                codec.decode(image)
        except (codec.CorruptImageError, PermissionError, FileNotFoundError) as error:
            problems.append(f"{shown(item.id)} is corrupt: {error}")
    return problems


def write_sheet(content: Input, path: Path, max_bytes: int) -> None:
    """Writes a PNG with the first images of each class in a row, and the class's name before them."""
    rows = sorted(_examples(content).items())[:_MAX_ROWS]
    sheet = Image.new("RGB", (160 + _COLUMNS * _TILE, max(len(rows), 1) * _TILE), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (number, items) in enumerate(rows):
        name = name_of(content, number).encode("latin-1", "replace").decode("latin-1")
        draw.text((4, row * _TILE + _TILE // 2 - 6), f"{number} {shown(name)}"[:24], fill="black")
        for column, item in enumerate(items):
            try:
                image, _ = item.read(max_bytes)
                pixels = codec.decode(image) if isinstance(image, bytes) else image
            except (codec.CorruptImageError, OSError):
                pixels = np.full((8, 8, 3), (255, 0, 0), np.uint8)  # red: cannot be decoded
            tile = Image.fromarray(pixels.squeeze()).convert("RGB")
            tile.thumbnail((_TILE - 4, _TILE - 4))
            sheet.paste(tile, (160 + column * _TILE + 2, row * _TILE + 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")


def _examples(content: Input) -> dict[int, list[Item]]:
    """Returns a few items of each class, spread over the first split that has it."""
    chosen: dict[int, list[Item]] = {}
    for items in content.splits.values():
        order = np.random.default_rng(0).permutation(len(items))
        for index in order if len(items) < 100_000 else order[:10_000]:
            for label in _labels(items[index]):
                if len(chosen.setdefault(label, [])) < _COLUMNS:
                    chosen[label].append(items[index])
    return chosen


def _labels(item: Item) -> Iterator[int]:
    label: Label = item.read(0)[1] if isinstance(item.image, Record) and item.label is None else item.label or 0
    yield from label if isinstance(label, list) else [label]
