"""ViT-g/14 and G/14 as Scaling Vision Transformers pretrained them (Zhai et al. 2022, sections 3 and appendix B).

    ./run.sh train --config=configs/vit_jft.py:g/14 --workdir=runs/vit_g14 \\
        --config.data.train.kind=array_record --config.data.train.name=/data/jft --config.data.workers=16

Data:     JFT-3B is not public; any ArrayRecord or TFDS set of that kind serves (many classes, one or several labels an
          image). Evaluated by few-shot ImageNet, TFDS imagenet2012.
Expected: on JFT-3B, 10-shot ImageNet of about 84% for g/14 and 84.86% for G/14, as published.
Time:     published: G/14 took 27,500 TPUv3 core-days (of the paper's Figure 2).
Run by us: no; `smoke` and the compiled step only.

One run, many durations: train a trunk with --config.schedule.cooldown.amount=0, keep permanent checkpoints, and branch
    --config.schedule.cooldown_from=runs/trunk/checkpoints/120000 --config.schedule.cooldown.amount=50000
"""

import functools

from vit_scaling import config as c
from vit_scaling.data.config import DataConfig
from vit_scaling.data.images.transforms import TransformConfig
from vit_scaling.data.sources import SourceConfig
from vit_scaling.models import vit

# As in docs/plans.md: the papers'. All smaller models used 4,096.
BATCH_SIZES = {"g": 16_384, "G": 32_768, "22B": 65_536}


def get_config(arg: str | None = None) -> c.Config:
    """Takes a size and patch such as g/14 (the default) or G/14, and `smoke`."""
    arguments = c.arguments(arg, variants=None, default="g/14")
    model = vit.variant(arguments.variant, pool="map", position="learned", dtype="bfloat16", remat="full")
    imagenet = functools.partial(SourceConfig, "tfds", "imagenet2012")
    config = c.Config(
        model=model,
        data=DataConfig(
            train=SourceConfig(kind="array_record", name="jft"),
            transform=TransformConfig(size=(224, 224), crop="inception", flip=0.5),
            eval_transform=TransformConfig(size=(224, 224), crop="central", resize_to=256, resize="area"),
            batch_size=BATCH_SIZES.get(arguments.variant.split("/")[0], 4096),
            workers=16,
        ),
        duration=c.Duration(1_000_000),
        optim=c.OptimConfig(name="adafactor", lr=8e-4, weight_decay=0.03, head_weight_decay=3.0, clip=1.0),
        schedule=c.ScheduleConfig(
            kind="rsqrt", warmup=c.Duration(10_000), timescale=c.Duration(10_000), cooldown=c.Duration(50_000)
        ),
        loss=c.LossConfig(kind="sigmoid", head_bias=-10.0),
        evaluation=c.EvaluationConfig(
            every=c.Duration(10_000),
            fewshot=c.FewShotConfig(
                train=imagenet("train[:65000]"),
                test=imagenet("validation"),
                transform=TransformConfig(size=(224, 224), crop="square_central", resize_to=256),
            ),
            batch_size=4096,
        ),
        checkpoint=c.CheckpointConfig(every=c.Duration(5_000), permanent=c.Duration(50_000)),
    )
    return c.smoke(config, vit.variant("mu/7", pool="map")) if arguments.smoke else config
