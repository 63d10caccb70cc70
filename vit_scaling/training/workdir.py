"""The folder of a run: whose it is, what ran there, and its result.

config.json      the resolved config; versions, git revision and devices of the first start; what the sets held
starts.jsonl     one row for each start: versions, revision, devices, host, step
lock             who is running here
clock.json       seconds of the run so far by what they were spent on, and the step at which they were noted
metrics.jsonl    one row for each measurement; tensorboard/ has the same
checkpoints/     <step>/ for each one kept; <step>.damaged and <step>.unfinished are never read
compiled/        what XLA compiled, for the next start
result.json      the final numbers, written after the last checkpoint
figure.png       curves, learning rate, predictions
"""

import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from vit_scaling import UserError, __version__, models, paths
from vit_scaling import config as config_lib
from vit_scaling.config import Config
from vit_scaling.data.sources import Source
from vit_scaling.evaluation.sets import changed
from vit_scaling.evaluation.suite import Suite
from vit_scaling.interop import run
from vit_scaling.names import render_table
from vit_scaling.optim import optimizer, schedule
from vit_scaling.parallel import processes, sharding
from vit_scaling.training import identity, telemetry
from vit_scaling.training.step import Program

# What a process that was killed before it wrote config.json may have left.
_BEFORE_CLAIM = {"config.json.tmp", "config.tmp", "lock"}

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# A branch may end otherwise than its trunk, and nothing else.
BRANCH_MAY_CHANGE = (
    *identity.MAY_CHANGE,
    "duration",
    "schedule.cooldown",
    "schedule.cooldown_from",
)


def write_json(path: Path, value: Any) -> None:
    """Writes a file whole or not at all."""
    paths.write(path, json.dumps(value, indent=2) + "\n")


def trunk(config: Config) -> Path | None:
    """Returns the checkpoint from which schedule.cooldown_from branches, or None.

    Raises:
        UserError: it is not a complete checkpoint of a run whose config differs only in how it ends, or the schedule
            cannot branch.
    """
    if config.schedule.cooldown_from is None:
        return None
    origin = paths.place(config.schedule.cooldown_from)
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
    run.require(origin)
    stored = run.record_of(origin)["config"]
    differing = identity.differences(stored, config_lib.to_dict(config), BRANCH_MAY_CHANGE)
    if differing:
        raise UserError(f"a branch differs from its trunk in its cooldown alone, but {differing[0]}")
    return origin


def environment() -> dict[str, Any]:
    """Returns what a process runs with, and must have in common with the others of its run."""
    return {
        "versions": {name: _version(name) for name in PACKAGES}
        | {"vit_scaling": __version__, "python": platform.python_version()},
        "git_revision": _git_revision(),
        "device_kind": jax.devices()[0].device_kind,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # copied into place, without its metadata
        return "unknown"


def agree(config: Config, sets: Mapping[str, Any], weights: str | None = None) -> None:
    """Makes sure that all processes are about to do the same.

    Args:
        config: the resolved config.
        sets: what each data set holds, by its field in the config.
        weights: a digest of the weights that the run starts from.

    Raises:
        UserError: in every process: which of them differs from process 0, and in what.
    """
    own = {"sets": dict(sets), "weights": weights, "config": config_lib.to_dict(config), **environment()}
    answers = processes.gather(identity.differences(processes.tell(own), own, may_change=()))
    for process, differing in enumerate(answers):
        if differing:
            more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise UserError(
                f"process 0 (there) and process {process} (here) are not about to do the same: "
                f"{'; '.join(differing[:3])}{more}"
            )


def check(workdir: Path, config: Config, sets: Mapping[str, Any]) -> None:
    """Checks that the workdir is this experiment's or free; writes nothing.

    Raises:
        UserError: it belongs to another experiment, or to something else, or a data set has changed since.
    """
    if not (workdir / "config.json").exists():
        if workdir.exists() and (not workdir.is_dir() or {path.name for path in workdir.iterdir()} - _BEFORE_CLAIM):
            raise UserError(f"the workdir {workdir} exists and holds no run of this project; name a new one")
        return
    record, resolved = run.read_config(workdir), config_lib.to_dict(config)
    differing = identity.differences(record["config"], resolved)
    if differing:
        more = f", and {len(differing) - 1} more fields differ" if len(differing) > 1 else ""
        raise UserError(
            f"the workdir {workdir} belongs to another config: {differing[0]}{more}; name another --workdir"
        )
    for name, now in sets.items():
        before = record.get("sets", {}).get(name)
        same_config = _at(record["config"], name) == _at(resolved, name)
        if before and same_config and (what := changed(before, now)):
            raise UserError(
                f"{name} {what}: it is not the set with which the run in {workdir} began; restore that set, or name "
                f"another --workdir"
            )


def claim(
    workdir: Path, config: Config, sets: Mapping[str, Any] | None = None, class_names: Sequence[str] | None = None
) -> str:
    """Makes the workdir this experiment's and returns the identity of the run. config.json also names the classes.

    What the first start wrote stays, but for fields that may change (`identity.MAY_CHANGE`) and their sets.

    Raises:
        UserError: as `check`; the workdir is left as it was.
    """
    check(workdir, config, sets or {})
    paths.make_folder(workdir)
    path = workdir / "config.json"
    old = run.read_config(workdir) if path.exists() else {}
    new = (old or {**environment(), **_counts()}) | {"config": config_lib.to_dict(config), "sets": dict(sets or {})}
    new["classes"] = None if class_names is None else list(class_names)
    new.setdefault("run", os.urandom(8).hex())
    if new != old:
        write_json(path, new)
    return new["run"]


def note_start(workdir: Path, step: int) -> None:
    """Appends a row about this start to starts.jsonl."""
    if processes.is_first():
        row = {"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "host": platform.node()}
        paths.append(workdir / "starts.jsonl", json.dumps(row | environment() | _counts()) + "\n")


def _counts() -> dict[str, int]:
    return {"device_count": jax.device_count(), "process_count": jax.process_count()}


def _at(tree: Any, path: str) -> Any:
    """Returns what stands at "a.b" in nested dicts."""
    for part in path.split("."):
        tree = (tree or {}).get(part)
    return tree


def check_space(workdir: Path, program: Program) -> None:
    """Raises UserError where the state does not fit the devices' memory, or one checkpoint the workdir's disk."""
    leaves = jax.tree.leaves(program.state_shape)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    each = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    memory = _memory_per_device()
    if memory and each > memory:
        raise UserError(
            f"parameters and optimizer state take {each / 1e9:,.1f} GB on each device, which has "
            f"{memory / 1e9:,.1f} GB; choose a smaller model or more devices"
        )
    if paths.in_bucket(workdir):
        return
    parent = next(path for path in (workdir.absolute(), *workdir.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if processes.is_first() and free < total:
        raise UserError(
            f"the disk of {workdir} has {free / 1e9:,.1f} GB free and one checkpoint takes up to "
            f"{total / 1e9:,.1f} GB; free some, or name another --workdir"
        )


def _memory_per_device() -> int | None:
    """Returns the bytes of memory of one device, where they are known."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def keep_compilations(workdir: Path) -> None:
    """Lets JAX keep what it compiles in the workdir, unless the user has it kept elsewhere: a restart finds it there.

    Process 0 alone writes to it, and an entry that a crash cut short is compiled again. JAX keeps what took a second or
    more, unless told otherwise; here everything is kept, because the small programs together take a sixth of a start.
    """
    if jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 1.0:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(paths.absolute(workdir / "compiled")))


def past(workdir: Path, total_steps: int) -> dict[str, Any]:
    """Returns what a run left in its workdir, as JSON: {"measured": steps of evaluations, "clock": what clock.json
    says, "finished": whether the last checkpoint and the result are there}. A damaged side file is noted and left out.
    """
    rows = telemetry.read_jsonl(workdir / "metrics.jsonl")
    clock: dict[str, Any] = {"step": 0, "seconds": {}}
    path = workdir / "clock.json"
    try:
        found = json.loads(path.read_text())
        clock = {"step": int(found["step"]), "seconds": {k: float(v) for k, v in found["seconds"].items()}}
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, AttributeError):
        processes.say(f"{path} is damaged; the seconds in the newest checkpoint are used")
    ended = run.complete(workdir / "checkpoints" / str(total_steps))
    return {
        "measured": [row["step"] for row in rows if "loss" not in row],
        "clock": clock,
        "finished": ended and read_result(workdir) is not None,
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
    steps = int(config.duration.amount)
    epochs = steps * config.data.batch_size / len(source)
    axes = ", ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items() if axis != "fold" or size > 1)
    return "\n".join(
        [
            *_parameter_table(config, program),
            "",
            f"parameters: {sum(leaf.size for leaf in jax.tree.leaves(params)):,}",
            f"devices:    {program.mesh.size} x {program.mesh.devices.flat[0].device_kind}; mesh: {axes}",
            f"data:       {len(source):,} examples of {source.num_classes} classes",
            f"run:        {steps:,} steps of {config.data.batch_size} images, {epochs:.1f} epochs",
        ]
    )


def _parameter_table(config: Config, program: Program, width: int = 80) -> list[str]:
    """Returns lines of at most `width` columns, where the rules allow that, with a row for each parameter."""
    ratio = models.width_ratio(config.model)
    rules = {row.path: row for row in optimizer.describe(config.optim, program.state_shape.params, ratio)}
    table = []
    for row in sharding.describe(program.state_shape.params, program.mesh):
        rule = rules[row.path]
        decay = "frozen" if rule.frozen else f"{rule.decay:g}"
        factored = "yes" if rule.factored else "muon" if rule.orthogonalised else "-"
        rate = "-".join(f"x{value:.3g}" for value in sorted(set(rule.rates)))
        shape, size = "x".join(map(str, row.shape)), f"{row.bytes_per_device / 1e6:.3f}"
        table.append((row.path, shape, size, decay, rate, factored, row.split))
    # What is the same for all parameters is said once.
    header = ("parameter", "shape", "MB", "decay", "lr", "factored", "split")
    same = {name: column[0] for name, *column in zip(header, *table, strict=True) if len(set(column)) == 1}
    of_all = "; ".join(f"{name} {value}" for name, value in same.items() if value != "-")
    last = f"MB are per device{'; all parameters: ' if of_all else ''}{of_all}"
    names = [name for name in header if name not in same]
    rows = [[cell for name, cell in zip(header, row, strict=True) if name not in same] for row in table]
    lines = render_table(names, rows).splitlines()
    if max(map(len, lines)) <= width:
        return [*lines, last]
    # Each module has a line of its own, above those of its parameters.
    modules = [path.rpartition("/")[0] for path, *_ in rows]
    rows = [[f"  {path.rpartition('/')[2]}", *cells] for path, *cells in rows]
    first, *lines = render_table(names, rows).splitlines()
    shown = [first]
    for module, before, line in zip(modules, [None, *modules], lines, strict=False):
        shown += [f"{module}/"] if module != before else []
        shown.append(line)
    return [*shown, last]


def finish(
    workdir: Path,
    config: Config,
    source: Source,
    suite: Suite,
    values: Mapping[str, float] | None,
    clock: telemetry.Clock,
) -> None:
    """Writes figure.png and result.json, once the checkpoint of the last step is complete.

    Args:
        values: what the last evaluation measured; None where an earlier process did, whose metrics.jsonl has it.
    """
    steps = int(config.duration.amount)
    end = workdir / "checkpoints" / str(steps)
    values = metrics_of(end) if values is None else dict(values)
    measured_on = next((name for name in ("test", "validation") if f"{name}/accuracy" in values), None)
    accuracy = None if measured_on is None else values[f"{measured_on}/accuracy"]
    try:
        from vit_scaling.training import figure  # matplotlib takes a while to import, which no start waits for

        images, labels, predictions = suite.examples(figure.PREDICTIONS)
        figure.run_figure(
            workdir / "figure.png",
            telemetry.read_jsonl(workdir / "metrics.jsonl"),
            title=f"{workdir.name}: {steps:,} steps"
            + ("" if accuracy is None else f", {100 * accuracy:.1f}% of the {measured_on} set"),
            images=images,
            labels=labels,
            predictions=predictions,
        )
    except Exception as error:  # a picture is never worth a run
        processes.say(f"figure.png could not be drawn: {type(error).__name__}: {error}")
    write_json(
        workdir / "result.json",
        {
            "accuracy": accuracy,
            "step": steps,
            "examples": steps * config.data.batch_size,
            "epochs": steps * config.data.batch_size / len(source),
            "metrics": values,
            "set_sizes": suite.counts,
            "seconds": {name: round(seconds, 1) for name, seconds in clock.seconds.items()},
            "checkpoint": str(end),
            "metrics_file": str(workdir / "metrics.jsonl"),
            "figure": str(workdir / "figure.png"),
        },
    )


def read_result(workdir: Path) -> dict[str, Any] | None:
    """Returns what result.json says; None where it is absent or damaged."""
    try:
        found = json.loads((workdir / "result.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and {"accuracy", "step", "metrics"} <= found.keys() else None


def metrics_of(checkpoint: Path) -> dict[str, float]:
    """Returns what the run of a checkpoint measured at its step; {} if nothing."""
    rows = telemetry.read_jsonl(checkpoint.parent.parent / "metrics.jsonl")
    found: dict[str, float] = {}
    for row in rows:
        if row["step"] == int(checkpoint.name):
            found |= {name: value for name, value in row.items() if "/" in name and value is not None}
    return found
