"""How far to scale on 5,000 handwritten digits: 5 sizes, 6 durations and 2 data sizes on two cores.

python -m vit_scaling.study --config=configs/study.py --workdir=studies/digits

10 trunks, 60 cooldowns and 11 comparisons, about an hour; docs/scaling_study.md tells what came out. `:smoke` is a
study of the same kind that takes a minute or two; its numbers mean nothing.
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
    digits = functools.partial(SourceConfig, "builtin", "mnist")
    # Both held-out splits serve to measure, 1,000 digits. Augmentation and learning rate were chosen by five runs
    # measured on them too (docs/scaling_study.md), so the errors are a little optimistic.
    held_out = "validation+test"
    base = c.Config(
        model=vit.ViTConfig(patch=(7, 7), pool="map", position="learned"),
        data=DataConfig(
            train=digits("train"),
            transform=plain,  # no augmentation: the number of different images is what is studied
            eval_transform=plain,
            batch_size=50,
        ),
        duration=c.Duration(1),
        optim=c.OptimConfig(name="adafactor", lr=2e-3, weight_decay=0.03, head_weight_decay=3.0),
        schedule=c.ScheduleConfig(
            kind="rsqrt",
            warmup=c.Duration(2_500, "examples"),
            timescale=c.Duration(20_000, "examples"),
        ),
        evaluation=c.EvaluationConfig(
            every=c.Duration(1),
            test=digits(held_out),
            fewshot=c.FewShotConfig(train=digits("train"), test=digits(held_out), transform=plain, shots=(10,)),
            batch_size=250,
        ),
        checkpoint=c.CheckpointConfig(every=c.Duration(1)),
        log=c.LogConfig(every=c.Duration(5_000, "examples")),
    )
    images, compared, size = (5_000, 10_000, 20_000, 40_000, 80_000, 160_000), (10_000, 40_000, 160_000), 3
    if arguments.smoke:
        base.data.batch_size, images, compared, size = 20, (100, 200), (100, 200), 2
        base.schedule.warmup = c.Duration(2)
        base.evaluation.fewshot = None
        base.evaluation.test = digits("test[:100]")
    linear = (("schedule.kind", "linear"), ("schedule.cooldown", c.Duration(0)))
    compare = functools.partial(Comparison, size=size, images=compared[1])
    return StudyConfig(
        base=base,
        sizes=(1, 2) if arguments.smoke else (1, 2, 3, 4, 5),
        fractions=(1.0,) if arguments.smoke else (0.25, 1.0),
        images=images,
        chance=0.9,
        dial=Dial(width_per_layer=16, head_dim=16, reference=4),
        comparisons=(compare("planned"),)
        if arguments.smoke
        else (
            # A branch of the trunk should equal a run that was planned with the same cooldown, to the last bit.
            compare("planned"),
            *(Comparison("linear", size, count, linear) for count in compared),
            compare("seed1", overrides=(("seed", 1),)),
            compare("seed2", overrides=(("seed", 2),)),
            compare("adam", overrides=(("optim.name", "adam"),)),
            compare("gap", overrides=(("model.pool", "gap"),)),
            compare("token", overrides=(("model.pool", "token"),)),
            compare("head-decay-0.03", overrides=(("optim.head_weight_decay", 0.03),)),
            compare("head-decay-10", overrides=(("optim.head_weight_decay", 10.0),)),
        ),
    )
