"""Attention-augmented ResNets on ImageNet-1k (Bello et al. 2019, arXiv 1904.09925).

    ./run.sh train --config=configs/aa_resnet_imagenet.py:50 --workdir=runs/aa50

Data:     TFDS imagenet2012 in ArrayRecord (`tfds build imagenet2012 --file_format=array_record`).
Expected: 77.7 (50), 78.7% top-1 (101), as published (Table 2); the plain ResNets have 76.4 and 77.9%.
Recipe:   of the network, the paper's; of the training, our choice after the usual one for ResNets: we have not read
          the paper's appendix.
Run by us: no; `smoke` only.
"""

import functools

from vit_scaling import config as c
from vit_scaling.data.config import DataConfig
from vit_scaling.data.images.transforms import TransformConfig
from vit_scaling.data.sources import SourceConfig
from vit_scaling.models.resnet import ResNetConfig


def get_config(arg: str | None = None) -> c.Config:
    """Takes a depth, 50 (the default) or 101, and `smoke`."""
    arguments = c.arguments(arg, variants=("50", "101"), default="50")
    augmented = functools.partial(ResNetConfig, spatial="augmented", groups=(2, 3, 4), heads=8)
    imagenet = functools.partial(SourceConfig, "tfds", "imagenet2012")
    config = c.Config(
        model=augmented(depth=int(arguments.variant), dtype="bfloat16"),
        data=DataConfig(
            train=imagenet("train[:99%]"),
            transform=TransformConfig(size=(224, 224), crop="inception", flip=0.5),
            eval_transform=TransformConfig(size=(224, 224), crop="central", resize_to=256),
            batch_size=1024,
            workers=16,
        ),
        duration=c.Duration(100, "epochs"),
        # A decay of 1e-4 inside the gradient is amplified tenfold by a momentum of 0.9: 1e-3 in these units.
        optim=c.OptimConfig(name="sgd", lr=0.4, beta1=0.9, weight_decay=1e-3, head_weight_decay=1e-3, clip=None),
        schedule=c.ScheduleConfig(kind="cosine", warmup=c.Duration(5, "epochs"), cooldown=c.Duration(0)),
        loss=c.LossConfig(label_smoothing=0.1),
        evaluation=c.EvaluationConfig(
            every=c.Duration(5, "epochs"), validation=imagenet("train[99%:]"), test=imagenet("validation")
        ),
        checkpoint=c.CheckpointConfig(every=c.Duration(1, "epochs")),
    )
    return c.smoke(config, augmented(depth=14, width=16)) if arguments.smoke else config
