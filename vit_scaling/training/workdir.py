"""The folder of a run: whose it is, what was run there, and what came of it.

config.json      the resolved config, versions, git revision, device
clock.json       seconds of the run so far by what they went into, and the step at which they were noted
metrics.jsonl    one row for each measurement; tensorboard/ has the same
checkpoints/     <step>/ for each one kept
compiled/        what XLA compiled, for the next start
result.json      the final numbers
figure.png       curves, learning rate, predictions
"""

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from vit_scaling import UserError, __version__
from vit_scaling import config as config_lib
from vit_scaling.config import Config
from vit_scaling.data.sources import Source
from vit_scaling.evaluation.suite import Suite
from vit_scaling.names import render_table
from vit_scaling.optim import optimizer, schedule
from vit_scaling.parallel import processes, sharding
from vit_scaling.training import checkpoint, figure, telemetry
from vit_scaling.training.step import Program

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# A branch may end otherwise than its trunk, and nothing else.
BRANCH_MAY_CHANGE = (
    *config_lib.MAY_CHANGE,
    "duration",
    "schedule.cooldown",
    "schedule.cooldown_from",
)


def write_json(path: Path, value: Any) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


def trunk(config: Config) -> Path | None:
    """Returns the checkpoint from which schedule.cooldown_from branches, or None.

    Raises:
        UserError: it is not a complete checkpoint of a run whose config differs only in how it ends, or the schedule
            cannot branch.
    """
    if config.schedule.cooldown_from is None:
        return None
    origin = Path(config.schedule.cooldown_from)
    if schedule.needs_total(config.schedule):
        raise UserError(
            f"schedule.cooldown_from needs a schedule that does not know its end, rsqrt or constant; "
            f"{config.schedule.kind} depends on the total number of steps"
        )
    record = origin.parent.parent / "config.json"
    if not record.exists():
        raise UserError(
            f"schedule.cooldown_from is {str(origin)!r}; name a checkpoint of a run, <workdir>/checkpoints/<step>"
        )
    checkpoint.require(origin)
    stored = json.loads(record.read_text())["config"]
    differing = config_lib.differences(stored, config_lib.to_dict(config), BRANCH_MAY_CHANGE)
    if differing:
        raise UserError(f"a branch differs from its trunk in its cooldown alone, but {differing[0]}")
    return origin


def environment() -> dict[str, Any]:
    """Returns what a process runs with, and must have in common with the others of its run."""
    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"vit_scaling": __version__, "python": platform.python_version()},
        "git_revision": _git_revision(),
        "device_kind": jax.devices()[0].device_kind,
    }


def agree(config: Config, examples: Mapping[str, int]) -> None:
    """Makes sure that all processes are about to do the same.

    Args:
        config: the resolved config.
        examples: how many each source holds, by its name.

    Raises:
        UserError: in every process: which of them differs from process 0, and in what.
    """
    own = {"examples": dict(examples), "config": config_lib.to_dict(config), **environment()}
    answers = processes.gather(config_lib.differences(processes.tell(own), own, may_change=()))
    for process, differing in enumerate(answers):
        if differing:
            more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise UserError(
                f"process 0 (there) and process {process} (here) are not about to do the same: "
                f"{'; '.join(differing[:3])}{more}"
            )


def claim(workdir: Path, config: Config, class_names: Sequence[str] | None = None) -> None:
    """Makes the workdir this experiment's; its config.json also holds the names of the classes.

    Raises:
        UserError: it belongs to another one, or to something else; it is left as it was.
    """
    record = workdir / "config.json"
    resolved = config_lib.to_dict(config)
    if record.exists():
        differing = config_lib.differences(json.loads(record.read_text())["config"], resolved)
        if differing:
            more = f", and {len(differing) - 1} more fields differ" if len(differing) > 1 else ""
            raise UserError(
                f"the workdir {workdir} belongs to another config: {differing[0]}{more}; name another --workdir"
            )
    elif workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise UserError(f"the workdir {workdir} exists and holds no run of this project; name a new one")
    workdir.mkdir(parents=True, exist_ok=True)
    counts = {"device_count": jax.device_count(), "process_count": jax.process_count()}
    classes = None if class_names is None else list(class_names)
    write_json(record, {"config": resolved, "classes": classes, **environment(), **counts})


def keep_compilations(workdir: Path) -> None:
    """Lets JAX keep what it compiles in the workdir, unless the user has it kept elsewhere: a restart finds it there.

    Process 0 alone writes to it, and an entry that a crash cut short is compiled again.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str((workdir / "compiled").absolute()))


def past(workdir: Path) -> dict[str, Any]:
    """Returns what a run left in its workdir, as JSON: {"checkpoints": steps, "measured": steps of evaluations,
    "clock": what clock.json says, "finished": whether there is a result}."""
    rows = telemetry.read_jsonl(workdir / "metrics.jsonl")
    clock = workdir / "clock.json"
    return {
        "checkpoints": checkpoint.steps(workdir / "checkpoints"),
        "measured": [row["step"] for row in rows if "loss" not in row],
        "clock": json.loads(clock.read_text()) if clock.exists() else {"step": 0, "seconds": {}},
        "finished": (workdir / "result.json").exists(),
    }


def note_clock(workdir: Path, step: int, clock: telemetry.Clock) -> None:
    """Writes clock.json, for the process that goes on from here."""
    if processes.is_first():
        write_json(workdir / "clock.json", {"step": step, "seconds": clock.seconds})


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # installed without its repository


def describe(config: Config, program: Program, source: Source) -> str:
    """Returns what a person wants to see before a run: each parameter with its rules, the data, the devices."""
    params = program.state_shape.params
    rules = {row.path: row for row in optimizer.describe(config.optim, params)}
    table = []
    for row in sharding.describe(params, program.mesh):
        rule = rules[row.path]
        decay = "frozen" if rule.frozen else f"{rule.decay:g}"
        factored = "yes" if rule.factored else "-"
        rate = "-".join(f"x{value:.3g}" for value in sorted(set(rule.rates)))
        table.append((row.path, row.shape, decay, rate, factored, row.split, f"{row.bytes_per_device / 1e6:.3f}"))
    steps = int(config.duration.amount)
    epochs = steps * config.data.batch_size / len(source)
    axes = ", ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items() if axis != "fold" or size > 1)
    return "\n".join(
        [
            render_table(("parameter", "shape", "decay", "lr", "factored", "split over", "MB per device"), table),
            "",
            f"parameters: {sum(leaf.size for leaf in jax.tree.leaves(params)):,}",
            f"devices:    {program.mesh.size} x {program.mesh.devices.flat[0].device_kind}; mesh: {axes}",
            f"data:       {len(source):,} examples of {source.num_classes} classes",
            f"run:        {steps:,} steps of {config.data.batch_size} images, {epochs:.1f} epochs",
        ]
    )


def finish(
    workdir: Path, config: Config, source: Source, suite: Suite, values: Mapping[str, float], clock: telemetry.Clock
) -> None:
    """Writes result.json and figure.png; the checkpoint of the last step comes after them."""
    if not processes.is_first():
        return
    steps = int(config.duration.amount)
    accuracy = next((values[name] for name in ("test/accuracy", "validation/accuracy") if name in values), None)
    images, labels, predictions = suite.examples(figure.PREDICTIONS)
    figure.run_figure(
        workdir / "figure.png",
        telemetry.read_jsonl(workdir / "metrics.jsonl"),
        title=f"{workdir.name}: {steps:,} steps"
        + ("" if accuracy is None else f", {100 * accuracy:.1f}% of the test set"),
        images=images,
        labels=labels,
        predictions=predictions,
    )
    write_json(
        workdir / "result.json",
        {
            "accuracy": accuracy,
            "step": steps,
            "examples": steps * config.data.batch_size,
            "epochs": steps * config.data.batch_size / len(source),
            "metrics": dict(values),
            "seconds": {name: round(seconds, 1) for name, seconds in clock.seconds.items()},
            "checkpoint": str(workdir / "checkpoints" / str(steps)),
            "metrics_file": str(workdir / "metrics.jsonl"),
            "figure": str(workdir / "figure.png"),
        },
    )


def read_result(workdir: Path) -> dict[str, Any]:
    """Returns what result.json says."""
    return json.loads((workdir / "result.json").read_text())


def metrics_of(checkpoint: Path) -> dict[str, float]:
    """Returns what the run of a checkpoint measured at its step; {} if nothing."""
    rows = telemetry.read_jsonl(checkpoint.parent.parent / "metrics.jsonl")
    found: dict[str, float] = {}
    for row in rows:
        if row["step"] == int(checkpoint.name):
            found |= {name: value for name, value in row.items() if "/" in name and value is not None}
    return found
