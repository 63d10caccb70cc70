"""What a config needs and costs on a machine that is not here.

The training step that training runs (`step.build`) is compiled for described devices.
"""

import dataclasses
import functools
import math
import re
import time
from typing import Any, ClassVar

import jax
import numpy as np

from vit_scaling import flops
from vit_scaling.config import Config
from vit_scaling.interop import Weights
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.parallel import sharding
from vit_scaling.parallel.chips import GIB
from vit_scaling.planner import machines, program
from vit_scaling.planner.machines import Topology
from vit_scaling.training import step as step_lib


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    arguments: float  # the state and the batch
    outputs: float  # what comes out and does not reuse an argument's memory
    temporaries: float  # activations, gathered parameters, gradients
    program: float
    available: float

    @property
    def needed(self) -> float:
        return self.arguments + self.outputs + self.temporaries + self.program


@dataclasses.dataclass(frozen=True)
class Moved:
    """All collectives of one kind in one step, on one device. Those that leave a slice or node are separate."""

    kind: str
    count: int
    payload: float  # bytes of results
    ici: float  # bytes received over ICI (TPU) or NVLink (GPU)
    dcn: float  # bytes received over DCN, between slices or nodes


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Lower bounds on the seconds of one step of this program, each as if the others cost nothing."""

    compute: float
    memory: float
    ici: float  # ICI within a TPU slice, NVLink within a GPU node
    dcn: float  # between slices or nodes

    @property
    def step(self) -> float:
        return max(dataclasses.astuple(self))

    @property
    def limit(self) -> str:
        """The name of the largest bound."""
        names = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return max(names, key=lambda name: names[name])


@dataclasses.dataclass(frozen=True)
class Plan:
    """One config on one machine. If it does not fit, everything read from the compiled program is None."""

    machine: str
    devices: int
    chips: int
    mesh: dict[str, int]
    batch_size: int
    accumulate: int
    remat: str
    params: int
    state_bytes: int  # of the whole train state, over all devices
    fits: bool
    message: str  # the compiler's own, where it does not fit
    short_by: float | None  # missing bytes per device, if known
    memory: Memory | None
    compile_seconds: float | None
    attention: str | None  # which kernels compute it
    moved: tuple[Moved, ...]
    memory_traffic: float | None  # bytes read and written per device in a step
    model_flops: float  # of one step, over all devices: three forward passes
    executed_flops: float  # including what remat recomputes, and a teacher's forward pass
    bounds: Bounds | None
    mfu_ceiling: float | None
    images: int  # of the whole run
    steps: int
    chip_days: float | None  # of the whole run at the lower bound
    table: tuple[tuple[str, str, str, int], ...]  # parameter, shape, split, bytes per device


def to_dict(plan: Plan) -> dict[str, Any]:
    """Returns the plan as JSON takes it."""
    values = dataclasses.asdict(plan)
    if plan.memory is not None:
        values["memory"]["needed"] = plan.memory.needed
    if plan.bounds is not None:
        values["bounds"] |= {"step": plan.bounds.step, "limit": plan.bounds.limit}
    values["table"] = [
        dict(zip(("path", "shape", "split", "bytes_per_device"), row, strict=True)) for row in plan.table
    ]
    return values


def make(config: Config, machine: Topology, *, num_classes: int, multi_label: bool = False) -> Plan:
    """Returns the plan of a config on a machine, compiled for it.

    Args:
        config: its durations resolved to steps.
        machine: from `machines.topology`.
        num_classes: length of the logits.
        multi_label: whether labels are multi-hot rows.

    Raises:
        UserError: the config cannot work there, or the machine's compiler is not installed.
    """
    devices = machines.describe_devices(machine)
    mesh = mesh_lib.create(config.mesh, devices)
    built = step_lib.build(config, num_classes=num_classes, total_steps=int(config.duration.amount), mesh=mesh)
    plan = functools.partial(_plan, config, machine, mesh, teacher=built.teacher)
    state_bytes = _bytes_per_device(built.state_shape)
    if state_bytes > machine.chip.memory:  # no need to ask the compiler
        message = (
            f"the train state alone takes {state_bytes / GIB:.1f} of {machine.chip.memory / GIB:.2f} GiB on each device"
        )
        short = state_bytes - machine.chip.memory
        return plan(built.state_shape, num_classes, message=message, short_by=short)
    batch = step_lib.batch_shape(config, num_classes, multi_label, mesh)
    lowered = built.train_step.lower(built.state_shape, batch)
    start = time.perf_counter()
    try:
        with _CompilerSettings():
            executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        message = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        return plan(built.state_shape, num_classes, message=message, short_by=_short_by(message))
    seconds = time.perf_counter() - start
    analysis = executable.memory_analysis()
    memory = Memory(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        program=analysis.generated_code_size_in_bytes,
        available=machine.chip.memory,
    )
    boundary = "slice_index" if machine.chip.dims else "process_index"  # of DCN
    slices = np.asarray([getattr(device, boundary, 0) for device in mesh.devices.flat])
    text = executable.as_text()
    moved = program.traffic(text, slices)
    # The TPU's compiler refuses what does not fit; that of GPUs does not.
    short = memory.needed - memory.available
    return plan(
        built.state_shape,
        num_classes,
        memory=memory,
        moved=_summed(moved.collectives),
        traffic=moved.memory_bytes,
        compile_seconds=seconds,
        attention=program.attention(text),
        message="" if short <= 0 else f"the compiled step needs {short / GIB:.1f} GiB more than a device has",
        short_by=short if short > 0 else None,
    )


class _CompilerSettings:
    """Compiles at level O0, without the compilation cache.

    Memory at O0 is within a few percent of that of a run, in a quarter of the time; the full level may move less. JAX's
    cache cannot hold an executable of another platform.
    """

    CHOSEN: ClassVar = {"jax_enable_compilation_cache": False, "jax_optimization_level": "O0"}

    def __enter__(self) -> None:
        self._before = {name: jax.config.values[name] for name in self.CHOSEN}
        self._set(self.CHOSEN)

    def __exit__(self, *error: object) -> None:
        self._set(self._before)

    def _set(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            jax.config.update(name, value)


def _short_by(message: str) -> float | None:
    """Returns the missing bytes, read from the compiler's message."""
    amounts = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", message) or re.search(
        r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", message
    )
    if amounts is None:
        return None
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return float(amounts[1]) * units[amounts[2]] - float(amounts[3]) * units[amounts[4]]


def _summed(collectives: tuple[program.Collective, ...]) -> tuple[Moved, ...]:
    sums: dict[tuple[str, bool], Moved] = {}
    for c in collectives:
        key = (c.kind, c.dcn > 0)
        m = sums.get(key, Moved(c.kind, 0, 0.0, 0.0, 0.0))
        sums[key] = Moved(
            c.kind,
            m.count + c.times,
            m.payload + c.times * c.payload,
            m.ici + c.times * c.ici,
            m.dcn + c.times * c.dcn,
        )
    return tuple(sorted(sums.values(), key=lambda m: -m.ici - m.dcn))


def _bytes_per_device(state: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )


def remat(model_config: Any) -> str:
    """Returns what a model's backward pass recomputes: none, dots or full."""
    return getattr(model_config, "remat", "none")


def with_remat(config: Config, policy: str) -> Config | None:
    """Returns the config with this remat policy, or None where its model has no such choice."""
    if not hasattr(config.model, "remat"):
        return config if policy == remat(config.model) else None
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat=policy))


def _plan(
    config: Config,
    machine: Topology,
    mesh: sharding.Mesh,
    state: Any,
    num_classes: int,
    *,
    teacher: Weights | None = None,
    memory: Memory | None = None,
    moved: tuple[Moved, ...] = (),
    traffic: float | None = None,
    compile_seconds: float | None = None,
    attention: str | None = None,
    message: str = "",
    short_by: float | None = None,
) -> Plan:
    cost = flops.count(config.model, image_size=config.data.transform.size, num_classes=num_classes)
    batch, steps = config.data.batch_size, int(config.duration.amount)
    model_flops = cost.train_flops * batch
    again = cost.train_flops / 3 * batch if remat(config.model) == "full" else 0.0
    if teacher is not None:
        taught = flops.count(teacher.config, image_size=teacher.image_size, num_classes=num_classes)
        again += taught.forward_flops * batch
    bounds = None
    if traffic is not None:
        chip = machine.chip
        bounds = Bounds(
            compute=(model_flops + again) / machine.devices / chip.flops,
            memory=traffic / chip.bandwidth,
            ici=sum(row.ici for row in moved) / chip.ici,
            dcn=sum(row.dcn for row in moved) / chip.dcn,
        )
    return Plan(
        machine=str(machine),
        devices=machine.devices,
        chips=machine.chips,
        mesh=dict(mesh.shape),
        batch_size=batch,
        accumulate=config.optim.accumulate,
        remat=remat(config.model),
        params=cost.params,
        state_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        fits=not message,
        message=message,
        short_by=short_by,
        memory=memory,
        compile_seconds=compile_seconds,
        attention=attention,
        moved=moved,
        memory_traffic=traffic,
        model_flops=model_flops,
        executed_flops=model_flops + again,
        bounds=bounds,
        mfu_ceiling=None if bounds is None else model_flops / machine.devices / machine.chip.flops / bounds.step,
        images=batch * steps,
        steps=steps,
        chip_days=None if bounds is None else bounds.step * steps * machine.chips / 86_400,
        table=tuple((row.path, str(row.shape), row.split, row.bytes_per_device) for row in
                    sharding.describe(state.params, mesh)),
    )  # fmt: skip
