"""What a config would need and cost on a machine that is not here.

The train step is the one that training runs (`step.build`), compiled for described devices. For GPUs whose compiler is
not installed it is arithmetic, and says so.
"""

import dataclasses
import math
import re
import time
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from vit_scaling import flops
from vit_scaling.config import Config
from vit_scaling.parallel import chips, sharding
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.parallel.chips import GIB, Topology
from vit_scaling.planner import program
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
    """All collectives of one kind in one step, on one device; those that leave a slice, or a node, apart."""

    kind: str
    count: int
    payload: float  # bytes of results
    links: float  # bytes received over the fast network
    slow: float  # and over the slow one


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Seconds that one step of this program takes at least, each as if the others cost nothing."""

    compute: float
    memory: float
    fast_network: float
    slow_network: float

    @property
    def step(self) -> float:
        return max(dataclasses.astuple(self))

    @property
    def limit(self) -> str:
        """What a step waits for."""
        names = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return max(names, key=lambda name: names[name]).replace("_", " ")


@dataclasses.dataclass(frozen=True)
class Plan:
    """One config on one machine. Where it does not fit, what was to be read from the program is None."""

    machine: str
    devices: int
    chips: int
    how: str  # compiled | arithmetic
    mesh: dict[str, int]
    batch_size: int
    accumulate: int
    remat: str
    params: int
    state_bytes: int  # of the whole train state, over all devices
    fits: bool
    message: str  # the compiler's own, where it does not fit
    short_by: float | None  # bytes of a device's memory that are missing, where they are known
    memory: Memory | None
    compile_seconds: float | None
    moved: tuple[Moved, ...]
    memory_traffic: float | None  # bytes a device reads and writes in a step
    model_flops: float  # of one step, over all devices: three forward passes
    executed_flops: float  # with what remat computes again
    bounds: Bounds | None
    mfu_ceiling: float | None
    images: int  # of the whole run
    steps: int
    chip_days: float | None  # of the whole run at the ceiling
    table: tuple[tuple[str, str, str, int], ...]  # parameter, shape, split, bytes a device


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
    """Returns the plan of a config on a machine: compiled, or by arithmetic for GPUs whose compiler is not installed.

    Args:
        config: its durations resolved to steps.
        machine: from `chips.topology`.
        num_classes: length of the logits.
        multi_label: whether labels are multi-hot rows.

    Raises:
        ValueError: the config cannot work there, or libtpu is not installed.
    """
    if machine.chip.dims or chips.compiler(machine):
        return _compiled(config, machine, num_classes, multi_label)
    return _arithmetic(config, machine, num_classes)


# ---- compiled --------------------------------------------------------------------------------------------------------


def _compiled(config: Config, machine: Topology, num_classes: int, multi_label: bool) -> Plan:
    devices = chips.describe_devices(machine)
    mesh = mesh_lib.create(config.mesh, devices)
    built = step_lib.build(config, num_classes=num_classes, total_steps=int(config.duration.amount), mesh=mesh)
    state_bytes = _bytes_a_device(built.state_shape)
    if state_bytes > machine.chip.memory:  # no need to ask the compiler
        message = (
            f"the train state alone takes {state_bytes / GIB:.1f} of {machine.chip.memory / GIB:.2f} GiB on each device"
        )
        short = state_bytes - machine.chip.memory
        return _plan(config, machine, mesh, built.state_shape, num_classes, message=message, short_by=short)
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
        return _plan(
            config, machine, mesh, built.state_shape, num_classes, message=message, short_by=_short_by(message)
        )
    seconds = time.perf_counter() - start
    analysis = executable.memory_analysis()
    memory = Memory(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        program=analysis.generated_code_size_in_bytes,
        available=machine.chip.memory,
    )
    boundary = "slice_index" if machine.chip.dims else "process_index"  # what the slow network lies between
    slices = np.asarray([getattr(device, boundary, 0) for device in mesh.devices.flat])
    moved = program.traffic(executable.as_text(), slices)
    # The TPU's compiler refuses what does not fit; that of GPUs does not.
    short = memory.needed - memory.available
    return _plan(
        config,
        machine,
        mesh,
        built.state_shape,
        num_classes,
        memory=memory,
        moved=_summed(moved.collectives),
        traffic=moved.memory_bytes,
        compile_seconds=seconds,
        message="" if short <= 0 else f"the compiled step needs {short / GIB:.1f} GiB more than a device has",
        short_by=short if short > 0 else None,
    )


class _CompilerSettings:
    """How plans are compiled: at the compiler's fastest level, with nothing cached.

    Memory at O0 is within a few percent of what a run gets, for a quarter of the time; the full level may move less. An
    executable of another platform cannot be kept in JAX's cache.
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
    """Returns the bytes that are missing, from the compiler's message."""
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
        key = (c.kind, c.slow > 0)
        m = sums.get(key, Moved(c.kind, 0, 0.0, 0.0, 0.0))
        sums[key] = Moved(
            c.kind,
            m.count + c.times,
            m.payload + c.times * c.payload,
            m.links + c.times * c.links,
            m.slow + c.times * c.slow,
        )
    return tuple(sorted(sums.values(), key=lambda m: -m.links - m.slow))


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def _arithmetic(config: Config, machine: Topology, num_classes: int) -> Plan:
    """Fully sharded data parallelism by its textbook costs: good to tens of percent, and not a compiler's word."""
    sizes = mesh_lib.shape(config.mesh, machine.devices)
    mesh = AbstractMesh(sizes, mesh_lib.AXES, axis_types=(AxisType.Auto,) * len(sizes))
    built = step_lib.build(config, num_classes=num_classes, total_steps=int(config.duration.amount), mesh=mesh)
    state = built.state_shape
    cost = flops.count(config.model, image_size=config.data.transform.size, num_classes=num_classes)
    shards = math.prod(mesh.shape[axis] for axis in sharding.STORAGE_AXES)
    model, replicas = mesh.shape["model"], mesh.shape["replica"]
    images = config.data.batch_size / (shards * replicas)
    size = 2 if getattr(config.model, "dtype", "float32") == "bfloat16" else 4
    params = cost.params / model  # on the devices that gather them
    passes = 2 * config.optim.accumulate  # forward and backward, in each part of a batch
    activations = cost.activation_bytes * images / config.optim.accumulate / model
    shard_bytes = _bytes_a_device(state)
    memory = Memory(
        arguments=shard_bytes + images * math.prod(config.data.transform.size) * 3,
        outputs=0.0,
        # Gradients lie as the parameters do; two layers are gathered at a time, here a tenth of the model.
        temporaries=activations + 4 * params / shards + 0.1 * params * size,
        program=0.0,
        available=machine.chip.memory,
    )
    nodes = math.ceil(machine.devices / machine.chip.largest)
    moved = []
    if shards > 1:
        moved.append(("all-gather", passes, params * size))
        moved.append(("reduce-scatter", config.optim.accumulate, params * 4))
    if replicas > 1:
        moved.append(("all-reduce", 1, 2 * params / shards * 4))
    # Every GPU of a node fetches a part over its own network card; the node's links spread the parts.
    outside = (nodes - 1) / nodes / machine.chip.largest
    rows = [
        Moved(kind, count, count * payload, count * payload * (1 - outside), count * payload * outside)
        for kind, count, payload in moved
    ]
    # Every intermediate result is written and read again for its gradient, and under full remat written twice.
    plain = with_remat(config, "none") or config
    all_activations = flops.count(
        plain.model, image_size=config.data.transform.size, num_classes=num_classes
    ).activation_bytes
    passes_over = 3 if remat(config.model) == "full" else 2
    traffic = passes_over * all_activations * images / model + 3 * params * size + 3 * shard_bytes
    short = memory.needed - memory.available
    return _plan(
        config,
        machine,
        mesh,
        state,
        num_classes,
        memory=memory,
        moved=tuple(rows),
        traffic=traffic,
        how="arithmetic",
        message="" if short <= 0 else f"by arithmetic {short / GIB:.1f} GiB too much for a device",
        short_by=short if short > 0 else None,
    )


def _bytes_a_device(state: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )


# ---- both ------------------------------------------------------------------------------------------------------------


def remat(model_config: Any) -> str:
    """Returns what a model's backward pass recomputes: none, dots or full."""
    value = getattr(model_config, "remat", "none")
    return ("full" if value else "none") if isinstance(value, bool) else value


def with_remat(config: Config, policy: str) -> Config | None:
    """Returns the config with this remat policy, or None where its model has no such choice."""
    value = getattr(config.model, "remat", None)
    if value is None:
        return config if policy == remat(config.model) else None
    if isinstance(value, bool):
        if policy == "dots":
            return None
        return dataclasses.replace(config, model=dataclasses.replace(config.model, remat=policy == "full"))  # type: ignore[arg-type]
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat=policy))  # type: ignore[arg-type]


def _plan(
    config: Config,
    machine: Topology,
    mesh: sharding.Mesh,
    state: Any,
    num_classes: int,
    *,
    memory: Memory | None = None,
    moved: tuple[Moved, ...] = (),
    traffic: float | None = None,
    compile_seconds: float | None = None,
    message: str = "",
    short_by: float | None = None,
    how: str = "compiled",
) -> Plan:
    cost = flops.count(config.model, image_size=config.data.transform.size, num_classes=num_classes)
    batch, steps = config.data.batch_size, int(config.duration.amount)
    model_flops = cost.train_flops * batch
    again = cost.forward_flops * batch if remat(config.model) == "full" else 0.0
    bounds = None
    if traffic is not None:
        chip = machine.chip
        bounds = Bounds(
            compute=(model_flops + again) / machine.devices / chip.flops,
            memory=traffic / chip.bandwidth,
            fast_network=sum(row.links for row in moved) / chip.fast,
            slow_network=sum(row.slow for row in moved) / chip.slow,
        )
    return Plan(
        machine=str(machine),
        devices=machine.devices,
        chips=machine.chips,
        how=how,
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
