"""A small ViT on 5,000 handwritten digits, on a laptop in minutes: what ./run.sh runs.

./run.sh train --config=configs/smoke.py --workdir=runs/smoke
"""

import functools

from vit_scaling import config as c
from vit_scaling.data.config import DataConfig
from vit_scaling.data.images.transforms import TransformConfig
from vit_scaling.data.mixing import MixingConfig
from vit_scaling.data.sources import SourceConfig
from vit_scaling.models import vit


def get_config(arg: str | None = None) -> c.Config:
    arguments = c.arguments(arg, variants=())
    model = vit.ViTConfig(width=64, depth=4, mlp=256, heads=4, patch=(7, 7), pool="map", position="learned")
    plain = TransformConfig(size=(28, 28), crop="none")
    digits = functools.partial(SourceConfig, "builtin", "mnist")
    config = c.Config(
        model=model,
        data=DataConfig(
            train=digits("train"),
            transform=TransformConfig(size=(28, 28), crop="none", rotate=10.0, scale=0.1, shear=0.1, shift=3.0),
            eval_transform=plain,
            mixing=MixingConfig(),
            batch_size=100,
        ),
        duration=c.Duration(80, "epochs"),
        optim=c.OptimConfig(name="adafactor", lr=2e-3, weight_decay=0.1, head_weight_decay=0.1),
        schedule=c.ScheduleConfig(
            kind="rsqrt",
            warmup=c.Duration(200),
            timescale=c.Duration(1000),
            cooldown=c.Duration(30, "epochs"),
        ),
        evaluation=c.EvaluationConfig(
            every=c.Duration(10, "epochs"),
            validation=digits("validation"),
            test=digits("test"),
            fewshot=c.FewShotConfig(train=digits("train"), test=digits("validation"), transform=plain),
        ),
        checkpoint=c.CheckpointConfig(every=c.Duration(5, "epochs")),
        log=c.LogConfig(every=c.Duration(20)),
    )
    return c.smoke(config, model) if arguments.smoke else config
