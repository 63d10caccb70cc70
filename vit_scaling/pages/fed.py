"""What the network is fed: the training images of some steps of a run, before and after mixing, with their labels."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from vit_scaling import UserError
from vit_scaling import config as config_lib
from vit_scaling.config import Config
from vit_scaling.data import loader, mixing
from vit_scaling.data.images.transforms import transform
from vit_scaling.data.sources import Source, open_source
from vit_scaling.optim import losses
from vit_scaling.pages import page


def batch(config: Config, source: Source, step: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Returns the batch that step `step` + 1 of a run trains on, and its images and targets after mixing.

    Args:
        config: of the run.
        source: its training set.
        step: how many steps were made before, from 0.

    Returns:
        {"image": uint8 [B, H, W, 3], "label"} as the loader gives them; images [B, H, W, 3] uint8 and targets [B, C]
        as the network and the loss see them, images rounded to bytes.
    """
    batches = loader.train_batches(
        source, transform(config.data.transform, train=True), config.data, seed=config.seed, start_step=step
    )
    try:
        plain = next(iter(batches))
    finally:
        batches.close()
    # The keys of training/step.py: one for each step, and of it the first half for mixing.
    steps_key = jax.random.split(jax.random.key(config.seed))[1]
    mix_key = jax.random.split(jax.random.fold_in(steps_key, step))[0]
    images = mixing.to_float(jnp.asarray(plain["image"]), config.model.mean, config.model.std)
    targets = losses.targets(jnp.asarray(plain["label"]), source.num_classes)
    images, targets = mixing.mix(config.data.mixing, mix_key, images, targets)
    mean, std = (np.asarray(values, np.float32) for values in (config.model.mean, config.model.std))
    mixed = np.clip(np.rint(255 * (np.asarray(images) * std + mean)), 0, 255).astype(np.uint8)
    return plain, mixed, np.asarray(targets)


def write(workdir: Path, steps: Sequence[int], count: int, path: Path, *, seed: int | None = None) -> Path:
    """Writes the page of a run's training images, and a PNG of them beside it, whose path is returned.

    Args:
        workdir: of the run.
        steps: how many steps were made before each batch, from 0.
        count: images of each batch, the first ones.
        path: of the page.
        seed: of order, augmentation and mixing; the run's own without one.

    Raises:
        UserError: the folder holds no run, or a step is not one of it.
    """
    record = workdir / "config.json"
    if not record.exists():
        raise UserError(f"{workdir} holds no run of this project: it has no config.json")
    config = config_lib.from_dict(json.loads(record.read_text())["config"])
    own_seed = config.seed
    config = config if seed is None else dataclasses.replace(config, seed=seed)
    total = int(config.duration.amount)
    if wrong := [step for step in steps if not 0 <= step < total]:
        raise UserError(f"--steps has {wrong[0]}; the run has the steps 0 to {total - 1}")
    source = open_source(config.data.train)
    class_names = source.class_names or tuple(str(number) for number in range(source.num_classes))
    shown: list[dict[str, Any]] = []
    strips = []
    for step in steps:
        plain, mixed, targets = batch(config, source, step)
        one_hot = np.asarray(losses.targets(jnp.asarray(plain["label"]), source.num_classes))
        for i in range(min(count, len(mixed))):
            shown.append(
                {
                    "step": step,
                    "before": page.picture(plain["image"][i]),
                    "after": page.picture(mixed[i]),
                    "label": _labels(one_hot[i], class_names),
                    "target": _labels(targets[i], class_names),
                }
            )
        rows = [np.concatenate(list(part[:count]), axis=1) for part in (plain["image"], mixed)]
        strips.append(np.concatenate(rows))
    data = {
        "title": workdir.name,
        "seed": config.seed,
        "own_seed": own_seed,
        "batch_size": config.data.batch_size,
        "mixing": config.data.mixing.mixup > 0 or config.data.mixing.cutmix > 0,
        "images": shown,
    }
    page.write(path, page.page(f"{workdir.name}: training images", ("fed.js",), data, {}))
    picture = path.with_suffix(".png")
    encoded = cv2.imencode(".png", np.concatenate(strips)[..., ::-1])[1]
    picture.write_bytes(encoded.tobytes())
    return picture


def _labels(target: np.ndarray, class_names: Sequence[str]) -> list[list[Any]]:
    """Returns [[name, share], ...] of the classes with a share, largest first."""
    order = [int(c) for c in np.argsort(-target, kind="stable") if target[c] > 0]
    return [[class_names[c], float(target[c])] for c in order]
