"""A small ViT that learns the built-in digits from a teacher ("A good teacher is patient and consistent", Beyer et al.
2022, arXiv 2106.05237): long training, the same augmented and mixed view for both, no labels.

    ./run.sh train --config=configs/smoke.py --workdir=runs/smoke
    ./run.sh train --config=configs/distill_digits.py:runs/smoke --workdir=runs/student

The word behind the colon is a run, a checkpoint or a weight file of ten classes for images of 28 x 28 pixels; the word
`labels` trains the same student on the labels. The gain shows where labels are few (docs/recipes.md):

    ./run.sh train --config=configs/distill_digits.py:labels --workdir=runs/labels \\
        --config.data.train.split='train[:100]' --config.duration.amount=1600
    ./run.sh train --config=configs/distill_digits.py:runs/smoke --workdir=runs/student --config.duration.amount=40
"""

import dataclasses
import pathlib
import runpy

from vit_scaling import config as c
from vit_scaling.data.mixing import MixingConfig
from vit_scaling.models import vit

SMOKE = pathlib.Path(__file__).with_name("smoke.py")


def get_config(arg: str | None = None) -> c.Config:
    """Takes the teacher, or `labels` for none, and `smoke`."""
    arguments = c.arguments(arg, variants=None, default="runs/smoke")
    model = vit.ViTConfig(width=32, depth=2, mlp=128, heads=2, patch=(7, 7), pool="map")
    config = dataclasses.replace(
        runpy.run_path(str(SMOKE))["get_config"](),
        model=model,
        optim=c.OptimConfig(name="adafactor", lr=2e-3, weight_decay=0.03, head_weight_decay=0.03),
        schedule=c.ScheduleConfig(kind="cosine", warmup=c.Duration(200), cooldown=c.Duration(0)),
        loss=c.LossConfig(teacher=None if arguments.variant == "labels" else arguments.variant),
    )
    config.data.mixing = MixingConfig(mixup=0.2, per="example")
    config.evaluation.fewshot = None
    return c.smoke(config, model) if arguments.smoke else config
