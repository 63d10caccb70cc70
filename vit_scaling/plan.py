"""Compile a config for a machine that is not here: does it fit, how fast could it be, what would the run cost?

    ./run.sh plan --config=configs/vit_jft.py:G/14 --topology=v5p:8x8x8
    ./run.sh plan --config=configs/vit_imagenet.py:B/16 --topology=v5e:16x16 \\
        --slices=2 --search
    ./run.sh plan --config=configs/vit_imagenet.py:L/16 --topology=v5litepod-256

The train step of the run itself is compiled, without the machine: for TPUs by libtpu (./run.sh install tpu), for GPUs
by XLA's CUDA plugin (pip install jax-cuda12-plugin). Peaks are the published ones; a bound says what this program
cannot beat, not what it will take.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

from absl import flags

from vit_scaling import UserError, cli, paths

_CONFIG = cli.define_config()
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "The machine: v5e:4x4, v5litepod-16, v5p:8x8x8, gpu:h100x8.", required=True
)
_SLICES = flags.DEFINE_integer("slices", 1, "Slices of this shape, joined by the data-center network.", lower_bound=1)
_SEARCH = flags.DEFINE_bool("search", False, "Try mesh shapes, remat policies and --batch_sizes; print the best.")
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", [], "Batch sizes that --search tries beside the config's own.")
_NUM_CLASSES = flags.DEFINE_integer("num_classes", None, "Length of the logits, where the data set is not here.")
_EXAMPLES = flags.DEFINE_integer("examples", None, "Training examples, where the data set is not here.")
_MULTI_LABEL = flags.DEFINE_bool("multi_label", False, "Labels are multi-hot rows, where the data set is not here.")
_PRICE = flags.DEFINE_float(
    "price_per_chip_hour", None, "Price of one chip for an hour, in any currency; the plan gives the run's.", 0.0
)
_OUTPUT = flags.DEFINE(
    cli.PathParser(bucket=True), "output", None, "A file for the plan, or for all plans of a search, as JSON."
)


def main(argv: Sequence[str]) -> None:
    del argv
    from vit_scaling import config as config_lib
    from vit_scaling.parallel import interrupts
    from vit_scaling.planner import machines, report, search
    from vit_scaling.planner import plan as plan_lib

    interrupts.exit_on_interrupt()
    cli.need_config(_CONFIG.value)
    machine = machines.topology(_TOPOLOGY.value, _SLICES.value)
    examples, num_classes, multi_label = _data(_CONFIG.value)
    config = config_lib.resolve(_CONFIG.value, examples)
    if machine.slices > 1 and config.mesh.replica == 1:
        config.mesh.replica = machine.slices
    if not _SEARCH.value:
        plan = plan_lib.make(config, machine, num_classes=num_classes, multi_label=multi_label)
        print(report.text(plan, _PRICE.value))
        _write(plan_lib.to_dict(plan))
        return

    tried = []

    def found(plan: plan_lib.Plan) -> None:
        tried.append(plan)
        print(report.row(plan), flush=True)
        _write([plan_lib.to_dict(plan) for plan in tried])

    print(report.header(), flush=True)
    plans = search.search(
        config,
        machine,
        num_classes=num_classes,
        batch_sizes=[_positive(text) for text in _BATCH_SIZES.value],
        multi_label=multi_label,
        found=found,
    )
    _write([plan_lib.to_dict(plan) for plan in plans])
    print(
        f"\n{'the best' if plans[0].fits else 'none fits; the first tried'}:\n\n{report.text(plans[0], _PRICE.value)}"
    )


def _data(config: Any) -> Any:
    """Returns what the training set is: from flags, from the set itself, or from what is known of it.

    Raises:
        UserError: the number of classes, or that of examples which durations in epochs need, is unknown.
    """
    from vit_scaling.data.sources import known

    if _EXAMPLES.value is not None and _NUM_CLASSES.value is not None:
        return known.Known(_EXAMPLES.value, _NUM_CLASSES.value, _MULTI_LABEL.value)
    found = known.describe(config.data.train)
    examples, num_classes = _EXAMPLES.value or found.examples, _NUM_CLASSES.value or found.num_classes
    unknown = ["--num_classes"] * (num_classes is None) + ["--examples"] * (examples is None and cli.in_epochs(config))
    if unknown:
        raise UserError(f"the training set {config.data.train.name!r} is not here; give {' and '.join(unknown)}")
    # Durations in steps and examples are the same for any number of examples.
    return known.Known(examples or 2**40, num_classes, found.multi_label or _MULTI_LABEL.value)


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise UserError(f"--batch_sizes has {text!r}; give positive numbers, such as 1024,4096")
    return int(text)


def _write(value: object) -> None:
    if _OUTPUT.value is not None:
        path = paths.place(_OUTPUT.value)
        paths.make_folder(path.parent)
        paths.write(path, json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    # Before JAX, which config files import: no device is needed and none is to be taken.
    os.environ["JAX_PLATFORMS"] = "cpu"
    cli.run(main, __doc__)
