"""Where the heads of a Gaussian attention network look, on handwritten digits in minutes (arXiv 1911.03584).

    ./run.sh train --config=configs/attention_cnn_digits.py --workdir=runs/heads
    python benchmarks/where_heads_look.py runs/heads/checkpoints/2400 heads.png

The network of configs/attention_cnn_cifar10.py made small: 4 layers of width 32 with 9 heads on 8 x 8 tokens. Takes how
heads look: quadratic (the default) or gaussian; and `smoke`.

Data:     built in.
Expected: 96.4% of 500 test digits after 30 epochs, quadratic (docs/attention_as_convolution.md).
Run by us: quadratic, one seed; `gaussian` as smoke only.
"""

import functools

from vit_scaling import config as c
from vit_scaling.data.config import DataConfig
from vit_scaling.data.images.transforms import TransformConfig
from vit_scaling.data.sources import SourceConfig
from vit_scaling.models.attention_cnn import AttentionCNNConfig


def get_config(arg: str | None = None) -> c.Config:
    arguments = c.arguments(arg, variants=("quadratic", "gaussian"), default="quadratic")
    digits = functools.partial(SourceConfig, "builtin", "mnist")
    config = c.Config(
        model=AttentionCNNConfig(position=arguments.variant, width=32, depth=4, heads=9, mlp=64, dropout=0.0),
        data=DataConfig(
            train=digits("train"),
            transform=TransformConfig(size=(16, 16), crop="random", resize_to=18, resize="area"),
            eval_transform=TransformConfig(size=(16, 16), crop="resize", resize="area"),
            batch_size=50,
        ),
        duration=c.Duration(30, "epochs"),
        # Adam moves a number by at most about the rate in a step, and centers start 2 tokens apart: a tenth of this
        # rate, or of these steps, leaves the heads where they began.
        optim=c.OptimConfig(name="adam", lr=0.003, weight_decay=1e-3, head_weight_decay=1e-3, clip=1.0),
        schedule=c.ScheduleConfig(kind="cosine", warmup=c.Duration(200), cooldown=c.Duration(0)),
        evaluation=c.EvaluationConfig(
            every=c.Duration(5, "epochs"), validation=digits("validation"), test=digits("test")
        ),
        checkpoint=c.CheckpointConfig(every=c.Duration(10, "epochs")),
    )
    tiny = AttentionCNNConfig(position=arguments.variant, width=16, depth=2, heads=4, mlp=32)
    return c.smoke(config, tiny) if arguments.smoke else config
