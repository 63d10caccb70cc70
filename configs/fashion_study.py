"""How far to scale on Fashion-MNIST (Xiao et al. 2017): 6 sizes, 4 durations and 4 data sizes on two cores.

    apt-get install dataset-fashion-mnist
    python -m vit_scaling.study --config=configs/fashion_study.py --workdir=studies/fashion

24 trunks, 96 cooldowns and 12 comparisons of other seeds; sizes from 9,370 to 1.2 million parameters. `:smoke` is a
study of the same kind on the built-in digits that takes a minute or two; its numbers mean nothing.

The learning rate was chosen at depth 4 and carries to the other widths by muP.
"""

import functools

from vit_scaling import config as c
from vit_scaling.data.config import DataConfig
from vit_scaling.data.images.transforms import TransformConfig
from vit_scaling.data.sources import SourceConfig
from vit_scaling.models import vit
from vit_scaling.studies.scaling import Comparison, Dial, StudyConfig


def get_config(arg: str | None = None) -> StudyConfig:
    arguments = c.arguments(arg, variants=())
    plain = TransformConfig(size=(28, 28), crop="none")
    fashion = functools.partial(SourceConfig, "idx", "/usr/share/datasets/fashion-mnist")
    base = c.Config(
        model=vit.ViTConfig(patch=(7, 7), pool="map", position="learned", base_width=64),
        data=DataConfig(
            train=fashion("train"),
            transform=plain,  # no augmentation: the number of different images is what is studied
            eval_transform=plain,
            batch_size=100,
        ),
        duration=c.Duration(1),
        optim=c.OptimConfig(name="adafactor", lr=2e-3, weight_decay=0.03, head_weight_decay=3.0),
        schedule=c.ScheduleConfig(
            kind="rsqrt",
            warmup=c.Duration(5_000, "examples"),
            timescale=c.Duration(20_000, "examples"),
        ),
        evaluation=c.EvaluationConfig(
            every=c.Duration(1),
            test=fashion("test"),
            fewshot=c.FewShotConfig(train=fashion("train[:10%]"), test=fashion("test"), transform=plain, shots=(10,)),
            batch_size=500,
        ),
        checkpoint=c.CheckpointConfig(every=c.Duration(1)),
        log=c.LogConfig(every=c.Duration(10_000, "examples")),
    )
    sizes, fractions, images = (1, 2, 3, 4, 5, 7), (0.05, 0.15, 0.4, 1.0), (12_500, 40_000, 100_000, 200_000)
    repeated = [(size, count, seed) for size in (1, 3, 5) for count in images[1::2] for seed in (1, 2)]
    if arguments.smoke:
        digits = functools.partial(SourceConfig, "builtin", "mnist")
        base.data.train, base.data.batch_size = digits("train"), 20
        base.evaluation = c.EvaluationConfig(every=c.Duration(1), test=digits("test[:100]"), batch_size=100)
        base.schedule.warmup = c.Duration(2)
        sizes, fractions, images, repeated = (1, 2), (0.25, 1.0), (100, 200), [(2, 200, 1)]
    return StudyConfig(
        base=base,
        sizes=sizes,
        fractions=fractions,
        images=images,
        chance=0.9,
        dial=Dial(width_per_layer=16, head_dim=16, reference=4, lr_power=0.0),
        comparisons=tuple(Comparison(f"seed{seed}", size, count, (("seed", seed),)) for size, count, seed in repeated),
    )
