"""ResNets of stand-alone self-attention on ImageNet-1k (Ramachandran et al. 2019, arXiv 1906.05909).

    ./run.sh train --config=configs/sasa_imagenet.py:50 --workdir=runs/sasa50
    ./run.sh train --config=configs/sasa_imagenet.py:50,stem=attention --workdir=runs/sasa50_full

The best of Table 3 has convolutions in the first groups: --config.model.groups=3,4

Data:     TFDS imagenet2012 in ArrayRecord (`tfds build imagenet2012 --file_format=array_record`).
Expected: 75.8 (26), 77.1 (38), 77.4% top-1 (50); with the attention stem 74.8, 76.9, 77.6%, as published (Table 1).
Time:     not published; the authors used 128 cores of TPU v3.
Run by us: no; `smoke`, and the same network on small images (docs/local_attention.md).
"""

import functools

from vit_scaling import config as c
from vit_scaling.data.config import DataConfig
from vit_scaling.data.images.transforms import TransformConfig
from vit_scaling.data.sources import SourceConfig
from vit_scaling.models.resnet import ResNetConfig


def get_config(arg: str | None = None) -> c.Config:
    """Takes a depth, 26, 38 or 50 (the default), `stem=attention` for attention in the stem too, and `smoke`."""
    words = (arg or "").split(",")
    stem = "attention" if "stem=attention" in words else "convolution"
    rest = ",".join(word for word in words if word != "stem=attention")
    arguments = c.arguments(rest, variants=("26", "38", "50"), default="50")
    attention = functools.partial(ResNetConfig, spatial="attention", heads=8, kernel_size=7)
    config = recipe(attention(depth=int(arguments.variant), stem=stem, bn_decay=0.9999, dtype="bfloat16"))
    tiny = ResNetConfig(depth=14, width=16, spatial="attention", heads=4, kernel_size=3, stem=stem)
    return c.smoke(config, tiny) if arguments.smoke else config


def recipe(model: ResNetConfig) -> c.Config:
    """SASA, appendix A.2. Inception crops, label smoothing and weight decay are not stated there: our choice."""
    imagenet = functools.partial(SourceConfig, "tfds", "imagenet2012")
    return c.Config(
        model=model,
        data=DataConfig(
            train=imagenet("train[:96%]"),  # 4% of the training set is the paper's validation set
            transform=TransformConfig(size=(224, 224), crop="inception", flip=0.5),
            eval_transform=TransformConfig(size=(224, 224), crop="central", resize_to=256),
            batch_size=4096,
            workers=16,
        ),
        duration=c.Duration(130, "epochs"),
        # A decay of 1e-4 inside the gradient, as SGD recipes have it, is amplified tenfold by a momentum of 0.9: 1e-3
        # in this optimizer's units.
        optim=c.OptimConfig(
            name="nesterov", lr=1.6, beta1=0.9, weight_decay=1e-3, head_weight_decay=1e-3, clip=None, ema=0.9999
        ),
        schedule=c.ScheduleConfig(kind="cosine", warmup=c.Duration(10, "epochs"), cooldown=c.Duration(0)),
        loss=c.LossConfig(label_smoothing=0.1),
        evaluation=c.EvaluationConfig(
            every=c.Duration(5, "epochs"), validation=imagenet("train[96%:]"), test=imagenet("validation")
        ),
        checkpoint=c.CheckpointConfig(every=c.Duration(1, "epochs")),
    )
