"""Classifies images that have no labels: from files to the most likely classes, in order, however many there are.

weights = initial.read("runs/pets")
show = predict.eval_transform(weights, initial.run_of("runs/pets"))
for prediction in predict.predict(model.freeze(weights, MeshConfig()), files, show, names):
    print(prediction.file, prediction.classes)
"""

import contextlib
import dataclasses
import glob
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw

from vit_scaling import UserError, paths
from vit_scaling.data import loader
from vit_scaling.data.config import DataConfig
from vit_scaling.data.images import codec
from vit_scaling.data.images.transforms import Transform, TransformConfig, transform
from vit_scaling.data.sources.listing import Place
from vit_scaling.evaluation.model import Frozen
from vit_scaling.interop import Weights
from vit_scaling.interop.normalisation import Normalisation
from vit_scaling.parallel import sharding

_FIRST_BYTES = 32
_CHUNK = 4096  # files whose names are held at a time
_PRIVATE = ("__MACOSX", "@eaDir")


@dataclasses.dataclass(frozen=True)
class Likely:
    """One class that an image may belong to."""

    label: str
    index: int
    probability: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the model says about one file.

    Attributes:
        file: as it was given, or its path below the folder that was given.
        classes: the most likely first; empty where the image is corrupt.
        features: float32 [D], where they were asked for.
        error: why the file was passed over; None for an image.
    """

    file: str
    classes: tuple[Likely, ...] = ()
    features: np.ndarray | None = None
    error: str | None = None


class Found:
    """The image files that arguments name: files, folders with all that is in them, or patterns.

    In a folder the content decides what an image is; hidden files and folders, and those of macOS archives and of
    Synology, are passed over. Files of a folder come in the order of their paths. Each iteration walks through the
    folders again and keeps no list, however many files they hold.

    Attributes:
        left_out: files of the folders that the last iteration left out because they are no images.

    Raises:
        UserError: nothing has that name or matches that pattern, there is no image at all, or, in an iteration, a
            folder cannot be read.
    """

    def __init__(self, arguments: Sequence[str]):
        self.left_out = 0
        self._matches: list[str] = []
        for argument in arguments:
            matches = (
                [argument] if os.path.exists(argument) else sorted(glob.glob(paths.expand(argument), recursive=True))
            )
            if not matches:
                raise UserError(f"there is no file, folder or match for {argument!r}")
            self._matches += matches
        if next(iter(self), None) is None:
            raise UserError(f"no images are in {', '.join(arguments)} ({self.left_out} other files)")

    def __iter__(self) -> Iterator[str]:
        self.left_out = 0
        for match in self._matches:
            if not os.path.isdir(match):
                yield match
                continue
            for path in _walk(match):
                if _is_image(path):
                    yield path
                else:
                    self.left_out += 1


def _walk(folder: str) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise UserError(f"the folder {error.filename} cannot be read: {error.strerror}") from None

    for root, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _PRIVATE)
        yield from (os.path.join(root, name) for name in sorted(names) if not name.startswith("."))


def _is_image(path: str) -> bool:
    """Whether a regular file begins as an image does; one that cannot be read counts, so that it is reported."""
    if not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as stream:
            return codec.format_of(stream.read(_FIRST_BYTES)) is not None
    except OSError:
        return True


def eval_transform(weights: Weights, run: Mapping[str, Any] | None = None, **override: Any) -> TransformConfig:
    """Returns the transform that belongs to weights: how their own evaluation shows an image to the model.

    Normalisation is not part of it: the model's config holds mean and std, and `mixing.to_float` applies them.

    Args:
        weights: as read, for the image size.
        run: the "config" of a run's config.json, whose evaluation transform is taken, at the weights' image size; None
            for other weights, whose files may say how they are evaluated; where they do not, the shorter side is
            resized to 256/224 of the size before the central crop.
        override: fields of `TransformConfig`, such as crop and resize_to; those that are None are ignored.

    Raises:
        UserError: the weights' file names a crop that is not implemented, and `override` has none.
    """
    size = weights.image_size
    given = {name: value for name, value in override.items() if value is not None}
    mode = None if weights.normalisation is None else weights.normalisation.crop_mode
    if run is None and "crop" not in given and mode not in (None, "center", "squash"):
        raise UserError(
            f"the weights' file asks for crop_mode {mode!r}, which is not implemented; give --crop=central or another"
        )
    fields = _published(weights.normalisation, size) if run is None else _of_run(run, size)
    return TransformConfig(**fields | {"size": tuple(size)} | given)


def _of_run(run: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    own = run["data"]["eval_transform"]
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in own.items()}
    if tuple(fields["size"]) != tuple(size):
        fields["resize_to"] = max(size) * fields["resize_to"] // max(fields["size"])
    # An image that already has the size stays as it is.
    return fields | {"crop": "resize" if fields["crop"] == "none" else fields["crop"]}


def _published(found: Normalisation | None, size: tuple[int, int]) -> dict[str, Any]:
    """Returns how the authors of a published file evaluate it, as far as the file says."""
    filters = {"bilinear": "antialias", "bicubic": "bicubic", "lanczos": "lanczos"}
    fields: dict[str, Any] = {"crop": "central", "resize": "area", "resize_to": max(size) * 256 // 224}
    if found is None:
        return fields
    fields["resize"] = filters.get(found.interpolation or "", "area")
    if found.crop_ratio:
        fields["resize_to"] = max(int(max(size) / found.crop_ratio), max(size))
    if found.crop_mode == "squash":
        return fields | {"crop": "square_central" if found.crop_ratio and found.crop_ratio < 1 else "resize"}
    if found.of_timm:
        fields["crop"] = "central_torchvision"
    return fields


def predict(
    model: Frozen,
    files: Iterable[str],
    transform_config: TransformConfig,
    names: Sequence[str] | None,
    *,
    top: int = 5,
    batch_size: int = 64,
    loss: str = "softmax",
    features: bool = False,
) -> Iterator[Prediction]:
    """Yields one prediction for each file, in order; a file that cannot be used has an `error` and no classes.

    Args:
        model: as `model.freeze` puts it on the devices.
        files: paths; they are taken some thousand at a time.
        transform_config: as `eval_transform` gives it.
        names: of the classes; None: their numbers.
        top: how many classes each prediction has; 0 runs no classifier.
        batch_size: images at a time; rounded up to a multiple of the devices.
        loss: of the training: "softmax" makes probabilities of one class, "sigmoid" of each class by itself.
        features: also give what the classifier sees.
    """
    devices = model.network.mesh.size
    on = sharding.batch_sharding(model.network.mesh)
    shard = loader.Shard(*sharding.batch_parts(on))
    show, data = transform(transform_config, train=False), DataConfig(on_corrupt="skip")
    remaining = iter(files)
    while chunk := list(itertools.islice(remaining, _CHUNK)):
        batch_size = -(-min(batch_size, len(chunk)) // devices) * devices
        reader = _Reader(chunk, show)
        batches = loader.eval_batches(reader, reader, data, batch_size=batch_size, shard=shard)
        with contextlib.closing(batches):
            yield from _predictions(model, loader.to_device(batches, on, ahead=1), reader, names, top, loss, features)


def _predictions(
    model: Frozen,
    batches: Iterator[dict[str, jax.Array]],
    reader: "_Reader",
    names: Sequence[str] | None,
    top: int,
    loss: str,
    features: bool,
) -> Iterator[Prediction]:
    position = 0
    for batch in batches:
        logits = jax.device_get(model.logits(batch["image"])) if top else None
        seen = (
            jax.device_get(model.network.features(model.params, model.batch_stats, batch["image"]))
            if features
            else None
        )
        mask = np.asarray(jax.device_get(batch["mask"]))
        for row in range(min(len(mask), len(reader) - position)):
            file = reader.id(position)
            if not mask[row]:
                yield Prediction(file, error=reader.errors.pop(position))
            else:
                classes = () if logits is None else _likely(np.asarray(logits[row], np.float64), names, top, loss)
                yield Prediction(file, classes, None if seen is None else np.asarray(seen[row]))
            position += 1


class _Reader:
    """Source and transform in one, so that the reason for passing a file over is kept, by index; labels are all 0."""

    num_classes, multi_label = 1, False
    class_names: tuple[str, ...] | None = None

    def __init__(self, files: Sequence[str], convert: Transform):
        self._files, self._convert, self.size = files, convert, convert.size
        self.errors: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": index, "label": np.int32(0)}

    def id(self, index: int) -> str:
        return self._files[index]

    def __call__(self, record: dict[str, Any], rng: Any, out: np.ndarray | None = None) -> dict[str, Any]:
        index = record["image"]
        try:
            data = Place(self._files[index]).read()  # never from a device or a pipe, and at most 100 MB
            return self._convert({"image": data, "label": record["label"]}, rng, out)
        except (OSError, UserError) as error:
            self.errors[index] = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            raise codec.CorruptImageError(self.errors[index]) from None


def _likely(logits: np.ndarray, names: Sequence[str] | None, top: int, loss: str) -> tuple[Likely, ...]:
    if loss == "sigmoid":
        probabilities = np.exp(-np.logaddexp(0, -logits))
    else:
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
    order = np.argsort(-logits, kind="stable")[:top]
    return tuple(Likely(names[i] if names else str(i), int(i), float(probabilities[i])) for i in order)


class Sheet:
    """A contact sheet: the first images with their most likely class."""

    def __init__(self, count: int = 48, side: int = 128, columns: int = 8):
        self._count, self._side, self._columns = count, side, columns
        self._tiles: list[tuple[Image.Image, str]] = []

    def add(self, prediction: Prediction) -> None:
        """Adds an image while there is space."""
        if len(self._tiles) >= self._count or prediction.error is not None:
            return
        image = Image.fromarray(codec.decode(Path(prediction.file).read_bytes()))
        image.thumbnail((self._side, self._side))
        best = prediction.classes[0] if prediction.classes else None
        self._tiles.append((image, f"{best.label} {best.probability:.0%}" if best else ""))

    def write(self, path: Path) -> None:
        """Writes the sheet as PNG."""
        columns = max(min(self._columns, len(self._tiles)), 1)
        width, height = self._side + 8, self._side + 24
        sheet = Image.new("RGB", (columns * width, max(-(-len(self._tiles) // columns), 1) * height), "white")
        draw = ImageDraw.Draw(sheet)
        for number, (image, text) in enumerate(self._tiles):
            left, top = number % columns * width, number // columns * height
            sheet.paste(image, (left + (width - image.width) // 2, top + (self._side - image.height) // 2 + 2))
            draw.text((left + 4, top + self._side + 6), text[: self._side // 6], fill="black")
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, "PNG")
