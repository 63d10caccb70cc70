"""A small ViT that learns the built-in digits from a teacher ("A good teacher is patient and consistent", Beyer et al.
2022, arXiv 2106.05237): long training, the same augmented and mixed view for both, no labels.

    ./run.sh train --config=configs/smoke.py --workdir=runs/smoke
    ./run.sh train --config=configs/distill_digits.py:runs/smoke --workdir=runs/student

The word behind the colon is a run, a checkpoint or a weight file of ten classes for images of 28 x 28 pixels.
--config.loss.teacher=None trains the same student on the labels.
"""

import functools

from vit_scaling import config as c
from vit_scaling.data.config import DataConfig
from vit_scaling.data.images.transforms import TransformConfig
from vit_scaling.data.mixing import MixingConfig
from vit_scaling.data.sources import SourceConfig
from vit_scaling.models import vit


def get_config(arg: str | None = None) -> c.Config:
    """Takes the teacher, and `smoke`."""
    arguments = c.arguments(arg, variants=None, default="runs/smoke")
    model = vit.ViTConfig(width=32, depth=2, mlp=128, heads=2, patch=(7, 7), pool="map")
    digits = functools.partial(SourceConfig, "builtin", "mnist")
    config = c.Config(
        model=model,
        data=DataConfig(
            train=digits("train"),
            transform=TransformConfig(size=(28, 28), crop="none", rotate=10.0, scale=0.1, shear=0.1, shift=3.0),
            eval_transform=TransformConfig(size=(28, 28), crop="none"),
            mixing=MixingConfig(mixup=0.2, per="example"),
            batch_size=100,
        ),
        duration=c.Duration(80, "epochs"),
        optim=c.OptimConfig(name="adafactor", lr=2e-3, weight_decay=0.03, head_weight_decay=0.03),
        schedule=c.ScheduleConfig(kind="cosine", warmup=c.Duration(200), cooldown=c.Duration(0)),
        loss=c.LossConfig(teacher=arguments.variant),
        evaluation=c.EvaluationConfig(
            every=c.Duration(10, "epochs"), validation=digits("validation"), test=digits("test")
        ),
        checkpoint=c.CheckpointConfig(every=c.Duration(5, "epochs")),
        log=c.LogConfig(every=c.Duration(20)),
    )
    return c.smoke(config, model) if arguments.smoke else config
