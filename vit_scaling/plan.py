"""Know before you pay: would this config fit that machine, how fast could it be, what would the run cost?

    python -m vit_scaling.plan --config=configs/vit_jft.py:G/14 --topology=v5p:8x8x8 --num_classes=29593
    python -m vit_scaling.plan --config=configs/vit_imagenet.py:B/16 --topology=v5e:16x16 --slices=2 --search
    python -m vit_scaling.plan --config=configs/vit_imagenet.py:L/16 --topology=gpu:h100x64

The train step of the run itself is compiled, without the machine: for TPUs by libtpu (pip install "jax[tpu]"), for GPUs
by XLA's CUDA plugin (pip install jax-cuda12-plugin); without that plugin GPUs are planned by arithmetic. Peaks are the
vendors' published ones; a bound says what this program cannot beat, not what it will take.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from vit_scaling import UserError, cli

_CONFIG = cli.define_config()
_TOPOLOGY = flags.DEFINE_string("topology", None, "The machine: v5e:4x4, v5p:8x8x8, gpu:h100x8.", required=True)
_SLICES = flags.DEFINE_integer("slices", 1, "Slices of this shape, joined by the slow network.", lower_bound=1)
_SEARCH = flags.DEFINE_bool("search", False, "Try mesh shapes, remat policies and --batch_sizes; print the best.")
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", [], "Batch sizes that --search tries beside the config's own.")
_NUM_CLASSES = flags.DEFINE_integer("num_classes", None, "Length of the logits, where the data set is not here.")
_EXAMPLES = flags.DEFINE_integer("examples", None, "Training examples, where the data set is not here.")
_MULTI_LABEL = flags.DEFINE_bool("multi_label", False, "Labels are multi-hot rows, where the data set is not here.")
_OUTPUT = flags.DEFINE_string("output", None, "A file for the plan, or for all plans of a search, as JSON.")

# Whole training sets that a config may name on a machine that does not hold them: examples, classes.
_KNOWN = {"imagenet2012": (1_281_167, 1000), "cifar10": (50_000, 10), "cifar100": (50_000, 100)}


def main(argv: Sequence[str]) -> None:
    del argv
    from vit_scaling import config as config_lib
    from vit_scaling.parallel import chips
    from vit_scaling.planner import plan as plan_lib
    from vit_scaling.planner import report, search

    machine = chips.topology(_TOPOLOGY.value, _SLICES.value)
    config = _CONFIG.value
    if not isinstance(config, config_lib.Config):
        raise UserError("--config names no single run; a study's runs are planned one at a time")
    examples, num_classes, multi_label = _data(config)
    config = config_lib.resolve(config, examples)
    if machine.slices > 1 and config.mesh.replica == 1:
        config.mesh.replica = machine.slices
    if not _SEARCH.value:
        plan = plan_lib.make(config, machine, num_classes=num_classes, multi_label=multi_label)
        print(report.text(plan))
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
    print(f"\n{'the best' if plans[0].fits else 'none fits; the first tried'}:\n\n{report.text(plans[0])}")


def _data(config: Any) -> tuple[int, int, bool]:
    """Returns (examples, classes, multi-label) of the training set, from flags, the set itself or what is known."""
    if _EXAMPLES.value is not None and _NUM_CLASSES.value is not None:
        return _EXAMPLES.value, _NUM_CLASSES.value, _MULTI_LABEL.value
    from vit_scaling.data.sources import open_source

    try:
        source = open_source(config.data.train)
        examples, num_classes, multi_label = len(source), source.num_classes, source.multi_label
    except ValueError as error:
        if config.data.train.name in _KNOWN:
            (examples, num_classes), multi_label = _KNOWN[config.data.train.name], _MULTI_LABEL.value
        else:
            # Durations in epochs need the number of examples; others are the same for any.
            in_epochs = "epochs" in json.dumps(_units(config))
            if _NUM_CLASSES.value is None or (in_epochs and _EXAMPLES.value is None):
                flag = "--num_classes and --examples" if in_epochs else "--num_classes"
                raise UserError(f"the training set is not here ({error}); give {flag}") from None
            examples, num_classes, multi_label = 2**40, _NUM_CLASSES.value, _MULTI_LABEL.value
    return _EXAMPLES.value or examples, _NUM_CLASSES.value or num_classes, multi_label


def _units(config: Any) -> list[str]:
    durations = (config.duration, config.schedule.warmup, config.schedule.cooldown, config.schedule.timescale)
    return [d.unit for d in (*durations, config.evaluation.every, config.checkpoint.every, config.log.every)]


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise UserError(f"--batch_sizes has {text!r}; give positive numbers, such as 1024,4096")
    return int(text)


def _write(value: object) -> None:
    if _OUTPUT.value is not None:
        path = Path(_OUTPUT.value)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    # Before JAX, which config files import: no device is needed and none is to be taken.
    os.environ["JAX_PLATFORMS"] = "cpu"
    cli.run(main, __doc__)
