"""The smallest experiment that uses every part; the tests of step, loop and sharding share it."""

import dataclasses
import functools
from typing import Any

import numpy as np

from vit_scaling import config as c
from vit_scaling.data.config import DataConfig
from vit_scaling.data.images.transforms import TransformConfig
from vit_scaling.data.mixing import MixingConfig
from vit_scaling.data.sources import SourceConfig
from vit_scaling.models import vit

digits = functools.partial(SourceConfig, "builtin", "mnist")


def model(**fields: Any) -> vit.ViTConfig:
    defaults = {"width": 16, "depth": 2, "mlp": 32, "heads": 2, "patch": (14, 14), "pool": "map", "drop_path": 0.2}
    return vit.ViTConfig(**(defaults | fields))


def config(steps: int = 8, **fields: Any) -> c.Config:
    """A run of `steps` steps of 16 digits, with augmentation, mixup and drop path on."""
    plain = TransformConfig(size=(28, 28), crop="none")
    whole = c.Config(
        model=model(),
        data=DataConfig(
            train=digits("train[:100]"),  # 6.25 steps an epoch: any stop is in the middle of one
            transform=TransformConfig(size=(28, 28), crop="pad", pad=3, rotate=10.0),
            eval_transform=plain,
            mixing=MixingConfig(mixup=0.2),
            batch_size=16,
            threads=1,
        ),
        duration=c.Duration(steps),
        optim=c.OptimConfig(lr=3e-3, ema=0.9),
        schedule=c.ScheduleConfig(kind="rsqrt", warmup=c.Duration(2), timescale=c.Duration(2), cooldown=c.Duration(2)),
        evaluation=c.EvaluationConfig(every=c.Duration(4), validation=digits("validation[:40]")),
        checkpoint=c.CheckpointConfig(every=c.Duration(4)),
        log=c.LogConfig(every=c.Duration(1)),
        mesh=c.MeshConfig(replica=1, data=1, model=1),
    )
    return dataclasses.replace(whole, **fields)


def batch(size: int = 16, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        "image": generator.integers(0, 256, (size, 28, 28, 3), dtype=np.uint8),
        "label": generator.integers(0, 10, (size,), dtype=np.int32),
    }
