"""Pretrain or fine-tune a model, or continue a run that was stopped.

    ./run.sh train --config=configs/vit_imagenet.py:S/16 --workdir=runs/s16
    ./run.sh train --config=configs/vit_imagenet.py:S/16,smoke \\
        --workdir=runs/try --config.optim.lr=3e-4
    ./run.sh train --config=configs/vit_imagenet.py:S/16 --print_config

Every field of the config can be overridden; unknown fields and wrong types are refused. The same command, given again,
continues from the newest checkpoint in the workdir and ends with the same numbers as a run that was never stopped.

On several hosts run the same command once on each. Cloud TPU, Slurm and Open MPI tell the processes how to find each
other; elsewhere give --coordinator=HOST:PORT --num_processes=N --process_id=I.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from vit_scaling import UserError, cli, paths

_CONFIG = cli.define_config()
_START_PROCESSES = cli.define_processes()
_WORKDIR = flags.DEFINE(
    cli.PathParser(bucket=True), "workdir", None, "Folder for checkpoints, metrics, figure and result."
)
_PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "Print the resolved config as JSON and stop.")


def main(argv: Sequence[str]) -> None:
    del argv
    if _PRINT_CONFIG.value:
        print(_resolved(_CONFIG.value))
        return
    if not _WORKDIR.value:
        raise UserError("--workdir must be given; --help says what it is")
    # Heavy imports wait until the flags are known to be good, so that a typo is answered at once.
    from vit_scaling.evaluation import scores
    from vit_scaling.pages import report
    from vit_scaling.parallel import processes
    from vit_scaling.training import loop

    cli.need_config(_CONFIG.value)
    _START_PROCESSES()
    workdir = paths.place(_WORKDIR.value)
    program = cli.PROGRAM if Path(sys.argv[0]).name == cli.PROGRAM else "./run.sh"
    with report.Reporter(workdir, [program, "train", *sys.argv[1:]]) as reporter:
        result = loop.train(_CONFIG.value, workdir, reporter)
    if "accuracy" not in result or not processes.is_first():
        return
    for line in scores.lines(result["metrics"], result.get("set_sizes")):
        print(line)
    if result["accuracy"] is not None:
        print(f"accuracy: {100 * result['accuracy']:.2f}%")
    print(f"result:     {workdir / 'result.json'}")
    print(f"metrics:    {result['metrics_file']} and {workdir / 'tensorboard'}")
    print(f"figure:     {result['figure']}")
    print(f"checkpoint: {result['checkpoint']}")
    print(f"report:     {workdir / report.PAGE}")


def _resolved(config: Any) -> str:
    """Returns the config as a run writes it to config.json, durations in steps where the training set is known."""
    from vit_scaling import config as config_lib
    from vit_scaling.data.sources import known

    cli.need_config(config)
    examples = known.describe(config.data.train).examples
    if examples is None and cli.in_epochs(config):
        print("the training set is not here: durations are shown as given and not in steps", file=sys.stderr)
    else:
        config = config_lib.resolve(config, examples or 2**40)
    return json.dumps(config_lib.to_dict(config), indent=2)


if __name__ == "__main__":
    cli.run(main, __doc__)
