"""Fine-tuning with every learning rate and crop; the best is chosen on the held-out part of the training set.

    python -m vit_scaling.study --config=configs/transfer_sweep.py:weights/vit_b16,cifar10 --workdir=studies/cifar10

Takes what `finetune.py` takes. Killed, it goes on where it was. It ends with a table, <workdir>/table.md: best by
validation accuracy first, with the test set's accuracy, which took no part in the choice.
Learning rates: 0.03 and 0.01 as Scaling Vision Transformers (appendix D), and their neighbours.
"""

import pathlib
import runpy

from vit_scaling.studies.grid import GridConfig

FINETUNE = pathlib.Path(__file__).with_name("finetune.py")


def get_config(arg: str | None = None) -> GridConfig:
    base = runpy.run_path(str(FINETUNE))["get_config"](arg)
    if "smoke" in (arg or "").split(","):
        return GridConfig(base=base, fields=(("optim.lr", (0.01, 0.03)), ("data.transform.crop", ("random",))))
    return GridConfig(
        base=base,
        fields=(("optim.lr", (0.001, 0.003, 0.01, 0.03)), ("data.transform.crop", ("random", "inception"))),
    )
