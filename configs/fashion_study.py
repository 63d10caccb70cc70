"""How far to scale on Fashion-MNIST (Xiao et al. 2017): 6 sizes, 4 durations and 4 data sizes on two cores.

    apt-get install dataset-fashion-mnist
    python -m vit_scaling.study --config=configs/fashion_study.py --workdir=studies/fashion

24 trunks, 96 cooldowns and 19 comparisons; sizes from 9,370 to 1.2 million parameters; about an hour. What came out is
in docs/scaling_study.md. `:smoke` is a study of the same kind on the built-in digits that takes a minute or two; its
numbers mean nothing.

The recipe is that of study.py. Of the learning rates 0.001, 0.002, 0.004 and 0.008, 0.002 was best at depth 4 after
30,000 images; it carries to the other widths by muP, which runs with half and twice the rate check at three of them.
"""

import dataclasses
import functools
import pathlib
import runpy

from vit_scaling import config as c
from vit_scaling.data.sources import SourceConfig
from vit_scaling.studies.scaling import Comparison, StudyConfig

DIGITS = pathlib.Path(__file__).with_name("study.py")
SEEDS = {seed: (("seed", seed),) for seed in (1, 2)}


def get_config(arg: str | None = None) -> StudyConfig:
    smoke = c.arguments(arg, variants=()).smoke
    study: StudyConfig = runpy.run_path(str(DIGITS))["get_config"](arg)
    study.base.model.base_width = 64
    study.dial = dataclasses.replace(study.dial, lr_power=0.0)
    if smoke:
        return dataclasses.replace(study, fractions=(0.25, 1.0), comparisons=(Comparison("seed1", 2, 200, SEEDS[1]),))
    fashion = functools.partial(SourceConfig, "idx", "/usr/share/datasets/fashion-mnist")
    base = study.base
    base.data = dataclasses.replace(base.data, train=fashion("train"), batch_size=100)
    base.schedule.warmup = c.Duration(5_000, "examples")
    assert base.evaluation.fewshot is not None
    base.evaluation.fewshot.train, base.evaluation.fewshot.test = fashion("train[:10%]"), fashion("test")
    base.evaluation.test, base.evaluation.batch_size = fashion("test"), 500
    base.log.every = c.Duration(10_000, "examples")
    # What the learning rate rests on: half and twice of it, at three widths.
    rates = [(f"rate-{factor:g}", (("optim.lr", factor * base.optim.lr),)) for factor in (0.5, 2.0)]
    return dataclasses.replace(
        study,
        sizes=(1, 2, 3, 4, 5, 7),
        fractions=(0.05, 0.15, 0.4, 1.0),
        images=(15_000, 30_000, 60_000, 120_000),
        comparisons=(
            *(Comparison(name, size, 30_000, change) for size in (2, 4, 7) for name, change in rates),
            *(
                Comparison(f"seed{seed}", size, images, change)
                for size in (1, 3, 5)
                for images in (30_000, 120_000)
                for seed, change in SEEDS.items()
            ),
            Comparison("planned", 3, 60_000),
        ),
    )
