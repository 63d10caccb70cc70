"""The run that is disturbed: --config=tests/faults/small.py. Eight steps of a tiny network, a checkpoint every two."""

from tests import tiny
from vit_scaling import config as c


def get_config(arg: str | None = None) -> c.Config:
    model = tiny.model(pool="gap", depth=1, width=8, mlp=8, heads=1, scan=False, remat="none")  # to trace quickly
    return tiny.config(
        model=model,
        optim=c.OptimConfig(name="adam", lr=3e-3, ema=0.9),
        checkpoint=c.CheckpointConfig(every=c.Duration(2), keep=2, best="validation/accuracy"),
        mesh=c.MeshConfig(),
    )
