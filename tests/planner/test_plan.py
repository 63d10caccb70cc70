"""Plans: what is read from a compiled program, bounds that real plans must satisfy, and how the search decides.

The TPU programs are compiled by libtpu for chips that are not here. For the same configuration (ViT with MAP head, full
remat, bfloat16, Adafactor, fully sharded, compiled at the same level) big_vision's code needed, in GiB per chip in
November 2026: B/16 on v5e:4x4 at batch 1,024 4.43; G/14 on v5e:16x16 at 4,096 10.56.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import vit_jft
from vit_scaling import UserError, flops
from vit_scaling import config as config_lib
from vit_scaling.config import Config
from vit_scaling.models import vit
from vit_scaling.parallel import mesh as mesh_lib
from vit_scaling.parallel import sharding
from vit_scaling.parallel.chips import GIB
from vit_scaling.parallel.mesh import MeshConfig
from vit_scaling.planner import machines, program, report, search
from vit_scaling.planner import plan as plan_lib
from vit_scaling.planner.plan import Plan
from vit_scaling.training.step import build

ROOT = Path(__file__).parents[2]


def experiment(variant: str, batch_size: int, **model: Any) -> Config:
    """The JFT recipe (MAP head, full remat, bfloat16, Adafactor) at a size and batch."""
    config = vit_jft.get_config(variant)
    config.data.batch_size = batch_size
    config.model = dataclasses.replace(config.model, **model)
    return config_lib.resolve(config, 10**7)


def small(batch_size: int, **model: Any) -> Config:
    return experiment("B/16", batch_size, width=256, depth=2, mlp=1024, heads=4, **model)


# ---- machines --------------------------------------------------------------------------------------------------------


def test_machines_by_description() -> None:
    assert machines.topology("v5p:8x8x8").devices == 512
    assert machines.topology("v3:4x4").devices == 32  # two devices per chip
    assert machines.topology("v5e:16x16", 2).chips == 512
    assert machines.topology("gpu:a100-40gbx16").devices == 16
    for cloud, ours in (
        ("v5litepod-256", "v5e:16x16"),
        ("v6e-8", "v6e:2x4"),
        ("v3-32", "v3:4x4"),
        ("v4-16", "v4:2x2x2"),
    ):
        assert str(machines.topology(cloud)) == ours
    assert str(machines.topology("v5p-1024")) == "v5p:8x8x8"
    assert str(machines.topology("v5e:4x8", 2)) == "2 x v5e:4x8"


@pytest.mark.parametrize(
    ("text", "slices", "sentence"),
    [
        ("v9:2x2", 1, "there is no chip 'v9'; write NAME:SHAPE with one of v2, v3, v4, v5e"),
        ("v5e:3x5", 1, "v5e does not come as '3x5'; its shapes are 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16$"),
        ("v5e:32x32", 1, "v5e does not come as '32x32'"),
        ("v5p:8x4x4", 1, "A <= B <= C, all multiples of 4, up to 8960 chips"),
        ("v5p:4x4", 1, "v5p does not come as '4x4'"),
        ("gpu:h100", 1, "write gpu:NAMExNUMBER, such as gpu:h100x8"),
        ("gpu:q1x8", 1, "one of a100-40gb, a100, h100, h200, b200"),
        ("gpu:h100x8", 2, "has no slices"),
        ("v5e:4x4", 0, "the number of slices is 0"),
    ],
)
def test_machines_that_cannot_be(text: str, slices: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        machines.topology(text, slices)


# ---- reading a program -----------------------------------------------------------------------------------------------

PROGRAM = """HloModule jit_f

%fused (param_0: f32[12,64], param_1: s32[]) -> f32[1,64] {
  %param_0 = f32[12,64]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %view = f32[12,64]{1,0} bitcast(%param_0)
  ROOT %dynamic-slice.1 = f32[1,64]{1,0} dynamic-slice(%view, %param_1, %zero), dynamic_slice_sizes={1,64}
}

%body (carry: (s32[], f32[12,64], bf16[64,64])) -> (s32[], f32[12,64], bf16[64,64]) {
  %carry = (s32[], f32[12,64]{1,0}, bf16[64,64]{1,0}) parameter(0)
  %counter = s32[] get-tuple-element(%carry), index=0
  %stack = f32[12,64]{1,0} get-tuple-element(%carry), index=1
  %kernel = bf16[64,64]{1,0} get-tuple-element(%carry), index=2
  %two = s32[] constant(2)
  %next = s32[] add(%counter, %two)
  %slice = f32[1,64]{1,0} fusion(%stack, %counter), kind=kLoop, calls=%fused
  %fast = f32[1,64]{1,0:T(8,128)S(1)} copy(%slice)
  %gather = bf16[64,64]{1,0} all-gather(%kernel), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  ROOT %out = (s32[], f32[12,64]{1,0}, bf16[64,64]{1,0}) tuple(%next, %stack, %gather)
}

%condition (carry.1: (s32[], f32[12,64], bf16[64,64])) -> pred[] {
  %carry.1 = (s32[], f32[12,64]{1,0}, bf16[64,64]{1,0}) parameter(0)
  %limit = s32[] constant(12)
  %counter.1 = s32[] get-tuple-element(%carry.1), index=0
  ROOT %less = pred[] compare(%counter.1, %limit), direction=LT
}

ENTRY %main (p0: f32[12,64], p1: bf16[64,64]) -> f32[64] {
  %p0 = f32[12,64]{1,0} parameter(0)
  %p1 = bf16[64,64]{1,0} parameter(1)
  %start = s32[] constant(0)
  %init = (s32[], f32[12,64]{1,0}, bf16[64,64]{1,0}) tuple(%start, %p0, %p1)
  %loop = (s32[], f32[12,64]{1,0}, bf16[64,64]{1,0}) while(%init), condition=%condition, body=%body
  %stack.1 = f32[12,64]{1,0} get-tuple-element(%loop), index=1
  %sum = f32[12,64]{1,0} all-reduce(%stack.1), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %alone = f32[12,64]{1,0} all-reduce(%stack.1), replica_groups={{0},{1}}, to_apply=%add
  ROOT %last = f32[12,64]{1,0} copy(%sum)
}
"""


def test_a_program_by_hand() -> None:
    """Loops by their trips, groups in each notation, slices by what they slice; every number counted by hand."""
    found = program.traffic(PROGRAM, slices=np.repeat([0, 1], 4))
    gather, total = found.collectives
    assert (gather.kind, gather.times, gather.payload, gather.group) == ("all-gather", 6, 64 * 64 * 2, 4)
    assert (gather.ici, gather.dcn) == (64 * 64 * 2 * 3 / 4, 0)  # devices 0 to 3 are one slice
    assert (total.kind, total.times, total.payload, total.group) == ("all-reduce", 1, 12 * 64 * 4, 2)
    assert (total.ici, total.dcn) == (0, 12 * 64 * 4)  # devices 0 and 4; twice one half
    # In the loop, six times: a slice of 256 bytes read and written; read again for a copy into another memory; the
    # counter's add (4 + 4 + 4) and the index (4); the gather's 8,192 in and out. Behind it, two all-reduces and a copy.
    inside = 6 * (256 + 256 + 4 + 256 + 12 + 2 * 8192)
    assert found.memory_bytes == inside + 3 * 2 * 12 * 64 * 4


STARTED = """HloModule jit_g

%update (param_0: f32[12,64], param_1: s32[], param_2: f32[64]) -> f32[12,64] {
  %param_0 = f32[12,64]{1,0} parameter(0)
  %param_2 = f32[64]{0} parameter(2)
  %row = f32[1,64]{1,0} bitcast(%param_2)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %new = f32[12,64]{1,0} dynamic-update-slice(%param_0, %row, %param_1, %zero)
}

%body (carry: (s32[], f32[12,64], f32[64])) -> (s32[], f32[12,64], f32[64]) {
  %carry = (s32[], f32[12,64]{1,0}, f32[64]{0}) parameter(0)
  %counter = s32[] get-tuple-element(%carry), index=0
  %stack = f32[12,64]{1,0} get-tuple-element(%carry), index=1
  %value = f32[64]{0} get-tuple-element(%carry), index=2
  %fusion-start = ((f32[12,64]{1,0}, s32[], f32[64]{0}), f32[12,64]{1,0}, u32[]) fusion-start(%stack, %counter, %value), kind=kLoop, calls=%update
  %fusion-done = f32[12,64]{1,0} fusion-done(%fusion-start)
  %gather-start = ((bf16[8]{0}, bf16[2]{0}), (bf16[64]{0}, /*index=1*/bf16[16]{0})) all-gather-start(%value, %value), replica_groups={{0,1,2,3,4,5,6,7}}
  %gather-done = (bf16[64]{0}, bf16[16]{0}) all-gather-done(%gather-start)
  %scatter = bf16[8]{0} reduce-scatter(%value), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %out = (s32[], f32[12,64]{1,0}, f32[64]{0}) tuple(%counter, %fusion-done, %value)
}

ENTRY %main (p0: f32[12,64], p1: f32[64]) -> f32[12,64] {
  %p0 = f32[12,64]{1,0} parameter(0)
  %p1 = f32[64]{0} parameter(1)
  %start = s32[] constant(0)
  %init = (s32[], f32[12,64]{1,0}, f32[64]{0}) tuple(%start, %p0, %p1)
  %loop = (s32[], f32[12,64]{1,0}, f32[64]{0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  ROOT %last = f32[12,64]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_a_program_with_starts_by_hand() -> None:
    """As GPUs have it: instructions in two halves, and loops that say how often they run."""
    found = program.traffic(STARTED, slices=np.repeat([0, 1], 4))
    gather, scatter = found.collectives
    assert (gather.kind, gather.times, gather.payload, gather.group) == ("all-gather", 12, 2 * (64 + 16), 8)
    # Seven eighths of it come from elsewhere: four from the other slice, each device's network bringing a fourth.
    assert gather.dcn == 160 / 2 / 4
    assert gather.ici == 160 * 7 / 8 - gather.dcn
    # Seven sums of 16 bytes come in; from the other slice, four, each device's network again bringing a fourth.
    assert (scatter.dcn, scatter.ici) == (16, 6 * 16)
    # A row of 256 bytes is read and written in place, at an index; what is gathered or summed is read (as float32) and
    # written.
    assert found.memory_bytes == 12 * (256 + 256 + 4 + 2 * 256 + 160 + 256 + 16)


MEGASCALE = """HloModule jit_h

ENTRY %main (p0: bf16[3,8,128]) -> bf16[3,8,128] {
  %p0 = bf16[3,8,128]{2,1,0} parameter(0)
  %after-all = token[] after-all()
  %send = (bf16[3,8,128]{2,1,0}, u32[], token[]) send(%p0, %after-all), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %recv = (bf16[3,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) recv(%after-all), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv-done = (bf16[3,8,128]{2,1,0}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %result = bf16[3,8,128]{2,1,0} get-tuple-element(%recv-done), index=0
}
"""  # noqa: E501


@pytest.mark.parametrize(("slices", "received"), [(2, 6144), (4, 6144 * 1.5)])
def test_traffic_between_slices_by_hand(slices: int, received: float) -> None:
    """libtpu's form of an all-reduce over DCN: of n slices each device receives 2 (n - 1) / n of its 6,144 bytes."""
    (one,) = program.traffic(MEGASCALE, slices=np.repeat(np.arange(slices), 8)).collectives
    assert (one.kind, one.times, one.payload, one.group) == ("all-reduce", 1, 3 * 8 * 128 * 2, slices)
    assert (one.ici, one.dcn) == (0, received)


def test_a_program_of_eight_real_devices() -> None:
    """A loop of five sums over eight devices, compiled here: XLA's own text."""
    mesh = mesh_lib.create(MeshConfig(), jax.devices())

    def f(x: jax.Array) -> jax.Array:
        def body(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
            total = jax.lax.with_sharding_constraint(
                jnp.sum(jnp.sin(x + carry[None]), axis=0), NamedSharding(mesh, PartitionSpec())
            )
            return carry + total, None

        return jax.lax.scan(body, jnp.zeros(128), None, length=5)[0]

    shape = jax.ShapeDtypeStruct((16, 128), jnp.float32, sharding=sharding.batch_sharding(mesh))
    text = jax.jit(f, out_shardings=NamedSharding(mesh, PartitionSpec())).lower(shape).compile().as_text()
    (one,) = program.traffic(text).collectives
    assert (one.kind, one.times, one.payload, one.group) == ("all-reduce", 5, 512, 8)


BRANCHES = """HloModule jit_i

%small (x: f32[64]) -> f32[64] {
  %x = f32[64]{0} parameter(0)
  ROOT %copy.1 = f32[64]{0} copy(%x)
}

%large (y: f32[64]) -> f32[64] {
  %y = f32[64]{0} parameter(0)
  %twice = f32[64]{0} copy(%y)
  ROOT %sum = f32[64]{0} all-reduce(%twice), replica_groups={{0,1}}, to_apply=%add
}

ENTRY %main (index: s32[], p0: f32[64]) -> f32[64] {
  %index = s32[] parameter(0)
  %p0 = f32[64]{0} parameter(1)
  ROOT %one = f32[64]{0} conditional(%index, %p0, %p0, %p0), branch_computations={%small, %large, %small}
}
"""


@pytest.mark.parametrize("largest", [True, False])
def test_of_branches_the_one_that_moves_most_counts(largest: bool) -> None:
    """A copy of 256 bytes, read and written, and in the larger branch a sum of them over two devices, read and written.

    Without the larger branch no collective is left.
    """
    found = program.traffic(BRANCHES if largest else BRANCHES.replace("{%small, %large,", "{%small, %small,"))
    assert [(c.kind, c.times, c.payload) for c in found.collectives] == ([("all-reduce", 1, 256)] if largest else [])
    assert found.memory_bytes == (4 if largest else 2) * 256


def test_no_program() -> None:
    with pytest.raises(ValueError, match="no entry computation"):
        program.traffic("hello")


# ---- real plans, compiled for TPUs -----------------------------------------------------------------------------------

tpu = pytest.mark.skipif(
    machines.compiler(machines.topology("v5e:1x1")) is None, reason="libtpu is made for linux x86-64 alone"
)


@pytest.fixture(scope="module")
def b16() -> Plan:
    return plan_lib.make(experiment("B/16", 1024), machines.topology("v5e:4x4"), num_classes=1000)


@tpu
def test_b16_takes_less_than_half_of_the_incumbents_memory(b16: Plan) -> None:
    assert b16.fits
    assert b16.memory is not None
    assert b16.memory.needed < 4.43 * GIB / 2
    # The state is what it must be: float32 parameters and a bfloat16 momentum, a sixteenth of each. Beside it lie 64
    # images, their colours padded from 3 to 4 and their number to 128 by the chip's tiles.
    state, images = b16.params * 6 / 16, 64 * 224 * 224 * 3
    assert state + images < b16.memory.arguments < 1.15 * state + 8 / 3 * images


@tpu
def test_without_the_constraint_at_each_block_the_bound_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test that proves the one above: XLA then keeps gathered activations."""
    monkeypatch.setattr(vit, "constrain", lambda x: x)
    plan = plan_lib.make(experiment("B/16", 1024), machines.topology("v5e:4x4"), num_classes=1000)
    assert not plan.fits or (plan.memory is not None and plan.memory.needed > 4.43 * GIB / 2)


@tpu
def test_what_a_b16_step_moves(b16: Plan) -> None:
    """Kernels are gathered in bfloat16, forward and backward; gradients are summed once."""
    assert b16.bounds is not None
    kernels = 2 * b16.params
    gathered = sum(m.payload for m in b16.moved if m.kind == "all-gather")
    assert 1.8 * kernels < gathered < 2.6 * kernels
    assert not any(m.dcn for m in b16.moved)
    assert b16.bounds.dcn == 0
    # 105 GFLOPs an image, a third more for remat, on sixteen chips of 197 TFLOP/s.
    assert b16.bounds.compute == pytest.approx(1024 * 105.9e9 * 4 / 3 / 16 / 197e12, rel=0.02)
    assert b16.mfu_ceiling is not None
    assert 0.2 < b16.mfu_ceiling <= 0.75
    assert b16.chip_days == pytest.approx(b16.bounds.step * 10**6 * 16 / 86_400)


@tpu
def test_g14_on_256_chips() -> None:
    """4,096 images at once, where 256 divides no width of the model; and at most half of the incumbent's memory."""
    plan = plan_lib.make(experiment("G/14", 4096), machines.topology("v5e:16x16"), num_classes=29_593)
    assert plan.fits
    assert plan.memory is not None
    assert plan.memory.needed < 10.56 * GIB / 2
    assert plan.mesh == {"replica": 1, "data": 128, "fold": 2, "model": 1}


@tpu
def test_only_replica_crosses_slices() -> None:
    machine = machines.topology("v5e:2x4", 2)
    config = small(64)
    with pytest.raises(ValueError, match=r"mesh.replica is 1 on 2 slices; .* give it a multiple of 2"):
        plan_lib.make(config, machine, num_classes=1000)
    config.mesh = MeshConfig(replica=2)
    plan = plan_lib.make(config, machine, num_classes=1000)
    across = [m for m in plan.moved if m.dcn]
    assert across, "libtpu lowers traffic between slices to send and recv of its megascale runtime"
    assert {m.kind for m in across} <= {"all-reduce", "reduce-scatter"}  # gradients, and no parameter
    # Each of the 8 devices of a slice sums its eighth of the gradients with the other slice, in bfloat16 or float32.
    assert 2 * plan.params / 8 < sum(m.dcn for m in across) < 4 * plan.params / 8
    assert plan.bounds is not None
    assert plan.bounds.dcn == sum(m.dcn for m in across) / machine.chip.dcn
    assert sum(m.payload for m in plan.moved if m.kind == "all-gather") > 2 * plan.params


@tpu
def test_the_cost_of_a_chip_stays_under_weak_scaling() -> None:
    """From 8 to 256 chips, 4 images each: the same FLOPs, and collectives that do not grow with the machine."""
    plans = [
        plan_lib.make(small(4 * machines.topology(text).devices), machines.topology(text), num_classes=1000)
        for text in ("v5e:2x4", "v5e:16x16")
    ]
    assert plans[0].executed_flops / 8 == plans[1].executed_flops / 256
    results = [sum(m.payload for m in plan.moved) for plan in plans]
    assert results[1] < 2 * results[0]  # large machines express a gather as a sum, of twice the traffic


@tpu
def test_what_does_not_fit_says_by_how_much() -> None:
    plan = plan_lib.make(experiment("B/16", 4096, remat="none"), machines.topology("v5e:2x2"), num_classes=1000)
    assert not plan.fits
    assert "exceeds available HBM" in plan.message or "hbm" in plan.message
    assert plan.short_by is not None
    assert plan.short_by > 50 * GIB
    assert "DOES NOT FIT" in report.text(plan)
    assert plan.chip_days is None


@tpu
def test_a_state_that_cannot_fit_is_not_compiled() -> None:
    plan = plan_lib.make(experiment("22B/14", 64), machines.topology("v5e:2x2"), num_classes=1000)
    assert plan.message.startswith("the train state alone takes")
    assert plan.compile_seconds is None


def test_the_state_of_g14_falls_in_proportion() -> None:
    """Between 16 and 256 devices, parameters and optimizer on each fall sixteenfold, within a percent of the state."""
    sizes = []
    for devices in (16, 256):
        mesh = jax.sharding.AbstractMesh(
            mesh_lib.shape(MeshConfig(), devices), mesh_lib.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4
        )
        built = build(experiment("g/14", 1024), num_classes=29_593, total_steps=10**6, mesh=mesh)
        sizes.append(plan_lib._bytes_per_device(built.state_shape))
    assert sizes[0] < 17.5 * sizes[1]
    assert sizes[0] > 12 * sizes[1]


def test_without_its_compiler_a_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "compiler", lambda machine: None)
    for machine, sentence in (
        ("gpu:h100x8", "pip install jax-cuda12-plugin"),
        ("v5e:2x2", r'pip install "jax\[tpu\]"'),
    ):
        with pytest.raises(UserError, match=f"not installed; it comes with: {sentence}"):
            plan_lib.make(small(64), machines.topology(machine), num_classes=1000)


@pytest.mark.skipif(
    machines.compiler(machines.topology("gpu:h100x8")) is None, reason="jax-cuda12-plugin is not installed"
)
def test_gpus_compiled() -> None:
    machine = machines.topology("gpu:h100x16")
    compiled = plan_lib.make(small(256), machine, num_classes=1000)
    assert compiled.memory is not None
    gathered = sum(m.payload for m in compiled.moved if m.kind == "all-gather")
    assert 1.6 * 2 * compiled.params < gathered < 4 * 2 * compiled.params  # bfloat16, forward and backward
    assert all(m.dcn > 0 for m in compiled.moved if m.kind == "all-gather")  # over both nodes
    too_large = plan_lib.make(small(2**17, remat="none"), machines.topology("gpu:a100-40gbx8"), num_classes=1000)
    assert "GiB more than a device has" in too_large.message
    assert not too_large.fits


# ---- search ----------------------------------------------------------------------------------------------------------


def estimate(config: Config, machine: machines.Topology, *, num_classes: int, multi_label: bool = False) -> Plan:
    """Stands in for the compiler: FSDP by arithmetic, so that a search takes no time."""
    sizes = mesh_lib.shape(config.mesh, machine.devices)
    mesh = jax.sharding.AbstractMesh(sizes, mesh_lib.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    state = build(config, num_classes=num_classes, total_steps=int(config.duration.amount), mesh=mesh).state_shape

    def activations(of: Config) -> float:
        return flops.count(of.model, image_size=of.data.transform.size, num_classes=num_classes).activation_bytes

    images = config.data.batch_size / machine.devices * sizes[3]
    params = flops.count(config.model, image_size=config.data.transform.size, num_classes=num_classes).params
    memory = plan_lib.Memory(
        arguments=plan_lib._bytes_per_device(state),
        outputs=0.0,
        temporaries=activations(config) * images / config.optim.accumulate / sizes[3] + 0.2 * params,
        program=0.0,
        available=machine.chip.memory,
    )
    everything = plan_lib.with_remat(config, "none")
    assert everything is not None
    traffic = 2 * activations(everything) * images / sizes[3] + 6 * params
    short = memory.needed - memory.available
    return plan_lib._plan(
        config, machine, mesh, state, num_classes, memory=memory, traffic=traffic,
        message="too large" if short > 0 else "", short_by=short if short > 0 else None,
    )  # fmt: skip


@pytest.fixture
def estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "make", estimate)


@pytest.mark.usefixtures("estimated")
def test_search_recomputes_only_what_it_must() -> None:
    """The policy grows with the batch, which is then taken in microbatches; "full" comes last."""
    machine = machines.topology("gpu:a100-40gbx8")
    best = {
        batch: search.search(experiment("B/16", batch), machine, num_classes=1000)[0] for batch in (256, 4096, 2**16)
    }
    assert all(plan.fits for plan in best.values())
    assert [(plan.remat, plan.accumulate > 1) for plan in best.values()] == [
        ("none", False),
        ("dots", False),
        ("dots", True),
    ]
    # A plan that fits and is not limited by memory traffic is enough; otherwise more recomputation is tried.
    assert len(search.search(experiment("B/16", 256), machine, num_classes=1000)) == 1
    slow = dataclasses.replace(machine, chip=dataclasses.replace(machine.chip, bandwidth=machine.chip.bandwidth / 10))
    tried = search.search(experiment("B/16", 256), slow, num_classes=1000)
    assert {plan.remat for plan in tried} == {"none", "dots", "full"}
    assert all(plan.bounds is not None and plan.bounds.limit == "memory" for plan in tried)
    # Half as many microbatches would not have fitted.
    fewer = plan_lib.with_remat(experiment("B/16", 2**16), "dots")
    assert fewer is not None
    fewer.optim = dataclasses.replace(fewer.optim, accumulate=best[2**16].accumulate // 2)
    assert not estimate(fewer, machine, num_classes=1000).fits


@pytest.mark.usefixtures("estimated")
def test_search_orders_by_images_per_second() -> None:
    found: list[Plan] = []
    machine = machines.topology("gpu:h100x8")
    plans = search.search(experiment("B/16", 256), machine, num_classes=1000, batch_sizes=[1024], found=found.append)
    assert {plan.batch_size for plan in plans} == {256, 1024}
    rates = [search.images_per_second(plan) for plan in plans]
    assert rates == sorted(rates, reverse=True)
    assert len(found) == len(plans)
    with pytest.raises(ValueError, match="13 cannot be divided over"):
        search.search(experiment("B/16", 13), machine, num_classes=1000)


# ---- the command -----------------------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "vit_scaling.plan", *arguments]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=300)


@tpu
def test_the_command(tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    done = command("--config=configs/smoke.py", "--topology=v5litepod-4", f"--output={output}")
    assert done.returncode == 0, done.stderr
    assert "v5e:2x2: 4 chips, 4 devices" in done.stdout
    assert "MFU at most" in done.stdout
    plan = json.loads(output.read_text())
    assert plan["fits"]
    assert plan["params"] == 261_130
    assert plan["bounds"]["limit"] in ("compute", "memory", "ici", "dcn")


def test_a_data_set_that_is_not_here_needs_its_number_of_classes() -> None:
    done = command("--config=configs/vit_jft.py:g/14", "--config.data.train.name=elsewhere", "--topology=v5e:4x4")
    assert done.returncode == 2
    assert "give --num_classes" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("  %a = f32[2] add(%b, %c)", "XLA operations"),
        ('  %a = (bf16[2]) custom-call(%b), custom_call_target="__cudnn$fmhaSoftmax"', "cuDNN's fused attention"),
        (
            '  %a = (bf16[2]) custom-call(%b), custom_call_target="tpu_custom_call", '
            'metadata={op_name="jit(loss)/jit(flash_attention)/pallas_call"}',
            "flash attention (Pallas)",
        ),
        (
            '  %a = (bf16[2]) custom-call(%b), custom_call_target="tpu_custom_call", '
            'metadata={op_name="jit(step)/pallas_call"}',
            "local attention (Pallas)",
        ),
        (
            '  %a = (bf16[2]) custom-call(%b), custom_call_target="__gpu$xla.gpu.triton", '
            'metadata={op_name="jit(step)/pallas_call"}, backend_config={name = "window_attention_forward"}',
            "window attention (Pallas)",
        ),
        (
            '  %a = (bf16[2]) custom-call(%b), custom_call_target="__gpu$xla.gpu.triton", '
            'metadata={op_name="jit(step)/pallas_call"}, backend_config={name = "self_attention_forward"}',
            "short attention (Pallas)",
        ),
        (
            '  %a = (bf16[2]) custom-call(%b), custom_call_target="__gpu$xla.gpu.triton", '
            'metadata={op_name="jit(step)/pallas_call"}, backend_config={name = "layer_norm_forward"}',
            "XLA operations",
        ),
    ],
)
def test_the_plan_names_the_attention_that_it_compiled(call, expected):
    assert program.attention(f"HloModule step\n{call}\n") == expected
