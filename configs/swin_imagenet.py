"""Swin V1 (arXiv 2103.14030) and V2 (arXiv 2111.09883) on ImageNet-1k: the official recipe of 300 epochs.

    ./run.sh train --config=configs/swin_imagenet.py:T --workdir=runs/swin_t
    ./run.sh train --config=configs/swin_imagenet.py:v2-T --workdir=runs/swin_v2_t
    ./run.sh train --config=configs/swin_imagenet.py:v2-B --config.model.window=16 --workdir=runs/swin_v2_b

V1 sees 224 pixels in windows of 7, V2 and T-c24 256 in windows of 8.

Data:     TFDS imagenet2012 in ArrayRecord (`tfds build imagenet2012 --file_format=array_record`).
Expected: T 81.2, S 83.2, B 83.5% top-1; v2-T 81.8, v2-S 83.7, v2-B 84.2 (windows of 16: 82.8, 84.1, 84.6), as
          published by the authors' code. L, v2-L, v2-H and v2-G were trained on ImageNet-22k or more: only shapes here.
Time:     not published for this recipe.
Run by us: no; `smoke` and the compiled step only.

As the published runs but for the filter of the crops, bilinear with antialiasing here and bicubic there, and the value
range of [-1, 1] that all models share here.
"""

import functools

from vit_scaling import config as c
from vit_scaling.data.config import DataConfig
from vit_scaling.data.images.transforms import TransformConfig
from vit_scaling.data.mixing import MixingConfig
from vit_scaling.data.sources import SourceConfig
from vit_scaling.models import swin


def get_config(arg: str | None = None) -> c.Config:
    """Takes a size (T, S, B, L, T-c24, v2-T, v2-S, v2-B, v2-L, v2-H or v2-G; T by default), and `smoke`."""
    arguments = c.arguments(arg, variants=tuple(swin.SIZES), default="T")
    model = swin.variant(arguments.variant, dtype="bfloat16")
    side = 224 if model.window == 7 else 256
    imagenet = functools.partial(SourceConfig, "tfds", "imagenet2012")
    config = c.Config(
        model=model,
        data=DataConfig(
            train=imagenet("train[:99%]"),
            # The recipe names colour jitter of 0.4 too, but the library it was run with leaves that out when there is
            # RandAugment (timm 0.4, data/transforms_factory.py).
            transform=TransformConfig(
                size=(side, side),
                crop="inception_torchvision",
                area=(0.08, 1.0),
                aspect=(3 / 4, 4 / 3),
                resize="antialias",
                flip=0.5,
                randaugment="timm",
                randaugment_layers=2,
                randaugment_magnitude=9.0,
                randaugment_std=0.5,
                erase=0.25,
            ),
            eval_transform=TransformConfig(
                size=(side, side), crop="central", resize_to=side * 256 // 224, resize="antialias"
            ),
            mixing=MixingConfig(mixup=0.8, cutmix=1.0, switch=0.5),
            batch_size=1024,
            workers=16,
        ),
        duration=c.Duration(300, "epochs"),
        # AdamW. Biases, norms and everything that speaks of positions are not decayed (optim.decay_rules).
        optim=c.OptimConfig(
            name="adam", lr=1e-3, moment_dtype="float32", weight_decay=0.05, head_weight_decay=0.05, clip=5.0
        ),
        # From 1e-6 up to 1e-3 and down to 1e-5.
        schedule=c.ScheduleConfig(
            kind="cosine", warmup=c.Duration(20, "epochs"), cooldown=c.Duration(0), start=1e-3, final=1e-2
        ),
        loss=c.LossConfig(kind="softmax", label_smoothing=0.1),
        evaluation=c.EvaluationConfig(
            every=c.Duration(5, "epochs"), validation=imagenet("train[99%:]"), test=imagenet("validation")
        ),
        checkpoint=c.CheckpointConfig(every=c.Duration(1, "epochs")),
    )
    small = swin.SwinConfig(version=model.version, width=8, depths=(2, 2), heads=(1, 2), window=4, dtype="bfloat16")
    return c.smoke(config, small) if arguments.smoke else config
