"""The plain ViT on ImageNet-1k in 90 epochs ("Better plain ViT baselines", Beyer et al. 2022, arXiv 2205.01580).

    ./run.sh train --config=configs/vit_imagenet.py:S/16 --workdir=runs/vit_s16

Data:     TFDS imagenet2012 in ArrayRecord (`tfds build imagenet2012 --file_format=array_record`).
Expected: S/16 76.5% top-1 after 90 epochs (80% after 300: --config.duration.amount=300), as published.
Time:     published by others for this recipe: 6 to 7 hours on a TPU v3-8, 5 h 41 min on 8 A100-40GB.
Run by us: no; `smoke` and the compiled step only.
"""

import functools

from vit_scaling import config as c
from vit_scaling.data.config import DataConfig
from vit_scaling.data.images.transforms import TransformConfig
from vit_scaling.data.mixing import MixingConfig
from vit_scaling.data.sources import SourceConfig
from vit_scaling.models import vit


def get_config(arg: str | None = None) -> c.Config:
    """Takes a size and patch such as S/16 (the default), and `smoke`."""
    arguments = c.arguments(arg, variants=None, default="S/16")
    model = vit.variant(arguments.variant, pool="gap", position="sincos2d", dtype="bfloat16")
    imagenet = functools.partial(SourceConfig, "tfds", "imagenet2012")
    config = c.Config(
        model=model,
        data=DataConfig(
            train=imagenet("train[:99%]"),
            transform=TransformConfig(size=(224, 224), crop="inception", flip=0.5, randaugment="big_vision"),
            eval_transform=TransformConfig(size=(224, 224), crop="central", resize_to=256, resize="area"),
            mixing=MixingConfig(mixup=0.2),
            batch_size=1024,
            workers=16,
        ),
        duration=c.Duration(90, "epochs"),
        # The recipe's decay of 1e-4, not multiplied by the learning rate of 1e-3, is 0.1 in AdamW's units.
        optim=c.OptimConfig(name="adam", lr=1e-3, weight_decay=0.1, head_weight_decay=0.1, clip=1.0),
        schedule=c.ScheduleConfig(kind="cosine", warmup=c.Duration(10_000), cooldown=c.Duration(0)),
        loss=c.LossConfig(kind="softmax"),
        evaluation=c.EvaluationConfig(
            every=c.Duration(5, "epochs"),
            validation=imagenet("train[99%:]"),
            test=imagenet("validation"),
            fewshot=c.FewShotConfig(
                train=imagenet("train[:65000]"),
                test=imagenet("validation"),
                transform=TransformConfig(size=(224, 224), crop="square_central", resize_to=256),
            ),
        ),
        checkpoint=c.CheckpointConfig(every=c.Duration(1, "epochs")),
    )
    return c.smoke(config, vit.variant("mu/7", pool="gap", position="sincos2d")) if arguments.smoke else config
