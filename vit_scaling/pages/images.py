"""Which images a page shows, as the model sees them, and what is known of each."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from vit_scaling import UserError, interop, paths
from vit_scaling.data.images.transforms import transform
from vit_scaling.data.sources import SourceConfig, open_source
from vit_scaling.evaluation import predict

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jxl")


@dataclasses.dataclass
class Images:
    """Images for a model.

    Attributes:
        pixels: [B, H, W, 3] uint8.
        captions: of each image.
        labels: names of their classes in the set that they come from, which may order its classes in another way than
            the model does; None where they are not known.
        class_names: of the model's classes, by which predictions are named; None if they are not known.
        left_out: images of the set or the folder that are not shown.
    """

    pixels: np.ndarray
    captions: list[str]
    labels: list[str | None]
    class_names: tuple[str, ...] | None
    left_out: int


def read(choice: str | None, count: int, weights: interop.Weights, run: dict[str, Any] | None) -> Images:
    """Reads the images that --images names.

    Args:
        choice: "builtin", a folder of image files, or KIND:NAME:SPLIT; None: the set that the run was measured on, or
            builtin.
        count: how many, the first ones.
        weights: the model, whose image size and preprocessing the images get.
        run: the config of the weights' run as a dict, where they are of one.

    Raises:
        UserError: there is no such folder or set, or it holds no image.
    """
    prepare = transform(predict.eval_transform(weights, run), train=False)
    class_names = weights.class_names or _class_names(run)
    if choice is not None and choice != "builtin" and ":" not in choice:
        folder = paths.local(choice)
        files = _files(folder)
        chosen = files[:count]
        pixels = []
        for file in chosen:
            try:
                pixels.append(prepare({"image": file.read_bytes(), "label": np.int32(0)}, None)["image"])
            except (ValueError, OSError) as error:
                raise UserError(f"{file} cannot be read as an image: {error}") from None
        captions = [str(file.relative_to(folder)) if folder.is_dir() else file.name for file in chosen]
        return Images(np.stack(pixels), captions, [None] * len(chosen), class_names, len(files) - len(chosen))
    source = open_source(_source(choice, run))
    examples = [prepare(source[index], None) for index in range(min(count, len(source)))]
    names = source.class_names or tuple(map(str, range(source.num_classes)))
    labels = [None if source.multi_label else names[int(example["label"])] for example in examples]
    captions = [source.id(index) for index in range(len(examples))]
    stacked = np.stack([example["image"] for example in examples])
    return Images(stacked, captions, labels, class_names, len(source) - len(examples))


def _files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise UserError(f"--images is {str(folder)!r}; name a folder of images, builtin, or KIND:NAME:SPLIT")
    found = sorted(
        Path(parent) / name
        for parent, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(ENDINGS) and not name.startswith(".")
    )
    if not found:
        raise UserError(f"--images={folder} holds no image file ({', '.join(ENDINGS)})")
    return found


def _source(choice: str | None, run: dict[str, Any] | None) -> SourceConfig:
    if choice is None and run is not None:
        own = run["evaluation"]["test"] or run["evaluation"]["validation"]
        if own is not None:
            return SourceConfig.from_json(own)
    if choice in (None, "builtin"):
        return SourceConfig("builtin", "mnist", "test")
    found = re.fullmatch(r"([^:]+):(.+?):((?:[^:\[\]]|\[[^\]]*\])+)", str(choice))
    if not found:
        raise UserError(f"--images is {choice!r}; name a folder of images, builtin, or KIND:NAME:SPLIT")
    kind, name, split = found.groups()
    return SourceConfig(kind, name, split)


def _class_names(run: dict[str, Any] | None) -> tuple[str, ...] | None:
    """Returns the names of a run's classes, where its training set is at hand."""
    try:
        return None if run is None else open_source(SourceConfig.from_json(run["data"]["train"])).class_names
    except (UserError, ImportError, OSError, TypeError):
        return None
