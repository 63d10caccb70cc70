"""The plain ViT on ImageNet-21k ("How to train your ViT?", Steiner et al. 2021, arXiv 2106.10270).

    ./run.sh prepare --input=/data/fall11 --output=/data/imagenet21k
    ./run.sh train --config=configs/vit_imagenet21k.py:B/16 --workdir=runs/vit_b16_21k \\
        --config.data.train.name=/data/imagenet21k --config.evaluation.validation.name=/data/imagenet21k

Data:     ImageNet's release of fall 2011, 14,197,122 images in one folder or tar file for each of 21,841 classes, as
          ArrayRecord. Evaluated by few-shot ImageNet-1k, shots from TFDS imagenet2012_subset/10pct.
Expected: nothing is published for exactly this recipe.
Run by us: no; `smoke` and the compiled step only.
"""

import functools

from vit_scaling import config as c
from vit_scaling.data.config import DataConfig
from vit_scaling.data.images.transforms import TransformConfig
from vit_scaling.data.mixing import MixingConfig
from vit_scaling.data.sources import SourceConfig
from vit_scaling.models import vit

# RandAugment's magnitude and mixup by size: more for larger models, as the paper finds. The values are our choice.
AUGMENTATION = {"S": (0.0, 0.0), "B": (10.0, 0.2), "L": (15.0, 0.5)}


def get_config(arg: str | None = None) -> c.Config:
    """Takes a size and patch such as B/16 (the default), and `smoke`."""
    arguments = c.arguments(arg, variants=None, default="B/16")
    model = vit.variant(arguments.variant, pool="gap", position="learned", dtype="bfloat16")
    magnitude, mixup = AUGMENTATION.get(arguments.variant.split("/")[0], AUGMENTATION["B"])
    imagenet21k = functools.partial(SourceConfig, "array_record", "imagenet21k")
    central = TransformConfig(size=(224, 224), crop="central", resize_to=256, resize="area")
    config = c.Config(
        model=model,
        data=DataConfig(
            train=imagenet21k("train[:99%]"),
            transform=TransformConfig(
                size=(224, 224),
                crop="inception",
                flip=0.5,
                randaugment="big_vision",
                randaugment_magnitude=magnitude,
            ),
            eval_transform=central,
            mixing=MixingConfig(mixup=mixup),
            batch_size=4096,
            workers=16,
        ),
        duration=c.Duration(300, "epochs"),
        # The recipe's decay of 1e-4, not multiplied by the learning rate of 1e-3, is 0.1 in AdamW's units.
        optim=c.OptimConfig(name="adam", lr=1e-3, weight_decay=0.1, head_weight_decay=0.1, clip=1.0),
        schedule=c.ScheduleConfig(kind="cosine", warmup=c.Duration(10_000), cooldown=c.Duration(0)),
        loss=c.LossConfig(kind="sigmoid", head_bias=-10.0),
        evaluation=c.EvaluationConfig(
            every=c.Duration(10_000),
            validation=imagenet21k("train[99%:]"),
            fewshot=c.FewShotConfig(
                train=SourceConfig("tfds", "imagenet2012_subset/10pct", "train"),
                test=SourceConfig("tfds", "imagenet2012", "validation"),
                transform=TransformConfig(size=(224, 224), crop="square_central", resize_to=256),
            ),
        ),
        checkpoint=c.CheckpointConfig(every=c.Duration(1_000), permanent=c.Duration(100_000)),
    )
    return c.smoke(config, vit.variant("mu/7", pool="gap")) if arguments.smoke else config
