"""A small Swin on 5,000 handwritten digits, for comparison with the ViT of smoke.py: its recipe and its compute.

    ./run.sh train --config=configs/swin_digits.py --workdir=runs/swin_digits
    ./run.sh train --config=configs/swin_digits.py:v2 --workdir=runs/swin_v2_digits

Patches of 4 pixels make a grid of 7 x 7 tokens, padded to windows of 4: about 3.2 million multiply-adds an image, where
the ViT has about 3.5.
Run by us: yes, see docs/swin.md.
"""

import dataclasses
import pathlib
import runpy

from vit_scaling import config as c
from vit_scaling.models.swin import SwinConfig

SMOKE = pathlib.Path(__file__).with_name("smoke.py")


def get_config(arg: str | None = None) -> c.Config:
    """Takes v1 (the default) or v2, and `smoke`."""
    arguments = c.arguments(arg, variants=("v1", "v2"), default="v1")
    version = 2 if arguments.variant == "v2" else 1
    model = SwinConfig(version=version, width=32, depths=(2, 2), heads=(2, 4), window=4, patch=4, drop_path=0.0)
    config = dataclasses.replace(runpy.run_path(str(SMOKE))["get_config"](), model=model)
    return c.smoke(config, model) if arguments.smoke else config
