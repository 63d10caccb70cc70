"""Pretrain a model, or go on where a run stopped.

    python -m vit_scaling.train --config=configs/vit_imagenet.py:S/16 --workdir=runs/s16
    python -m vit_scaling.train --config=configs/vit_imagenet.py:S/16,smoke --workdir=runs/try --config.optim.lr=3e-4

Every field of the config can be overridden by --config.<field>=<value>; unknown fields and wrong types are refused.
The same command, given again, continues from the newest checkpoint in the workdir and ends with the same numbers as a
run that was never stopped.

On several hosts the same command runs once on each. Cloud TPU, Slurm and Open MPI say by themselves who is who; else
--coordinator=HOST:PORT --num_processes=N --process_id=I do.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from vit_scaling import cli

_CONFIG = cli.define_config()
_START_PROCESSES = cli.define_processes()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics, figure and result.", required=True)


def main(argv: Sequence[str]) -> None:
    del argv
    # Heavy imports wait until the flags are known to be good, so that a typo is answered at once.
    from vit_scaling.parallel import processes
    from vit_scaling.training import loop

    _START_PROCESSES()
    result = loop.train(_CONFIG.value, Path(_WORKDIR.value))
    if "accuracy" not in result or not processes.is_first():
        return
    workdir = Path(_WORKDIR.value)
    for name, value in sorted(result["metrics"].items()):
        print(f"{name:24s} {value:.4f}")
    if result["accuracy"] is not None:
        print(f"accuracy: {100 * result['accuracy']:.2f}%")
    print(f"result:     {workdir / 'result.json'}")
    print(f"metrics:    {result['metrics_file']} and {workdir / 'tensorboard'}")
    print(f"figure:     {result['figure']}")
    print(f"checkpoint: {result['checkpoint']}")


if __name__ == "__main__":
    cli.run(main, __doc__)
