"""A small ViT on Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): 70,000 images, the larger set for one machine.

    apt-get install dataset-fashion-mnist     # or: tfds build fashion_mnist --file_format=array_record
    ./run.sh prepare --input=/usr/share/datasets/fashion-mnist --output=data/fashion_mnist
    ./run.sh train --config=configs/vit_fashion_mnist.py --workdir=runs/fashion

With the TFDS set instead: --config=configs/vit_fashion_mnist.py:tfds

Data:     train 57,000 and validation 3,000 of the 60,000 training images; test 10,000.
Expected: 86.9% of the test set.
Time:     11 min 44 s on 2 x86-64 cores that had other work too; more epochs fit into 15 minutes of a free machine.
Run by us: yes, see docs/results.md.
"""

import functools

from vit_scaling import config as c
from vit_scaling.data.config import DataConfig
from vit_scaling.data.images.transforms import TransformConfig
from vit_scaling.data.sources import SourceConfig
from vit_scaling.models import vit


def get_config(arg: str | None = None) -> c.Config:
    """Takes `tfds` to read TFDS's copy instead of data/fashion_mnist, and `smoke`."""
    arguments = c.arguments(arg, variants=("array_record", "tfds"), default="array_record")
    name = "fashion_mnist" if arguments.variant == "tfds" else "data/fashion_mnist"
    fashion = functools.partial(SourceConfig, arguments.variant, name)
    plain = TransformConfig(size=(28, 28), crop="none")
    config = c.Config(
        model=vit.ViTConfig(width=64, depth=4, mlp=256, heads=4, patch=(7, 7), pool="map"),
        data=DataConfig(
            train=fashion("train[:95%]"),
            transform=TransformConfig(size=(28, 28), crop="pad", pad=2, flip=0.5),
            eval_transform=plain,
            batch_size=100,
        ),
        duration=c.Duration(7, "epochs"),
        optim=c.OptimConfig(name="adafactor", lr=2e-3, weight_decay=0.1, head_weight_decay=0.1),
        schedule=c.ScheduleConfig(
            kind="rsqrt", warmup=c.Duration(500), timescale=c.Duration(2000), cooldown=c.Duration(3, "epochs")
        ),
        evaluation=c.EvaluationConfig(
            every=c.Duration(1, "epochs"),
            validation=fashion("train[95%:]"),
            test=fashion("test"),
            fewshot=c.FewShotConfig(train=fashion("train[:20%]"), test=fashion("train[95%:]"), transform=plain),
        ),
        checkpoint=c.CheckpointConfig(every=c.Duration(1, "epochs")),
    )
    return c.smoke(config, config.model) if arguments.smoke else config
