"""Time and memory of local attention's back ends, beside unfold and a 3x3 convolution.

    python -m benchmarks.local_attention                         # the table of docs/local_attention.md
    python -m benchmarks.local_attention --blocks 4 7 8 14       # block sizes, for ops.local.block_size
    python -m benchmarks.local_attention --topology v5e:2x2      # compiled for a described TPU (needs libtpu)

Maps of a ResNet's groups at 224 pixels, k = 7, 8 heads, float32. Candidates take turns. Reported: the fastest call, in
milliseconds of wall time and of CPU time of all threads (less sensitive to other work on the machine), and the
temporary memory of the compiled program.
"""

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vit_scaling.ops import local

MAPS = ((56, 64), (28, 128), (14, 256))
KERNEL, HEADS = 7, 8


def unfold(q: jax.Array, k: jax.Array, v: jax.Array, rel_row: jax.Array, rel_col: jax.Array) -> jax.Array:
    """What other implementations do: copy all neighbors of every pixel, then two small products for each pixel."""
    _, H, W, N, K = q.shape
    h = KERNEL // 2

    def neighbors(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (h, h), (h, h), (0, 0), (0, 0)))
        return jnp.stack([x[:, a : a + H, c : c + W] for a in range(KERNEL) for c in range(KERNEL)], axis=3)

    rows, columns = jnp.broadcast_arrays(rel_row[:, None], rel_col[None, :])
    embedding = jnp.concatenate([rows, columns], axis=-1).reshape(KERNEL**2, N, K)
    logits = jnp.einsum("bhwnd,bhwpnd->bhwnp", q, neighbors(k)) + jnp.einsum("bhwnd,pnd->bhwnp", q, embedding)
    inside = neighbors(jnp.ones((1, H, W, 1, 1)))[..., 0, 0] > 0
    weights = jax.nn.softmax(jnp.where(inside[:, :, :, None], logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhwnp,bhwpnd->bhwnd", weights, neighbors(v))


def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def gradient(function: Callable) -> Callable:
    """Forward and backward pass: the gradient of a sum of squares by every argument."""

    def loss(args: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.sum(jnp.square(function(*args).astype(jnp.float32)))

    return lambda *args: jax.grad(loss)(args)


def inputs(side: int, width: int, batch: int) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    keys = jax.random.split(jax.random.key(0), 7)
    shape = (batch, side, side, HEADS, width // HEADS)
    maps = [jax.random.normal(key, shape) for key in keys[:3]]
    tables = [jax.random.normal(key, (KERNEL, HEADS, width // HEADS // 2)) for key in keys[3:5]]
    image = jax.random.normal(keys[5], (batch, side, side, width))
    return (*maps, *tables), (image, 0.02 * jax.random.normal(keys[6], (3, 3, width, width)))


def measure(side: int, width: int, batch: int, repeats: int, blocks: list[int]) -> None:
    attention_args, convolution_args = inputs(side, width, batch)
    candidates: dict[str, tuple[Callable, tuple[jax.Array, ...]]] = {"unfold": (unfold, attention_args)}
    backend = functools.partial(local.local_attention, kernel_size=KERNEL)
    if blocks:
        for block in blocks:
            candidates[f"blocks of {block}"] = functools.partial(backend, block=block), attention_args
    else:
        for name in ("shifts", "blocks"):
            candidates[name] = functools.partial(backend, backend=name), attention_args
        candidates["3x3 convolution"] = convolution, convolution_args
    compiled = {}
    for name, (function, args) in candidates.items():
        passes = jax.jit(function), jax.jit(gradient(function))
        compiled[name] = [step.lower(*args).compile() for step in passes], args
    expected = np.asarray(compiled["unfold"][0][0](*attention_args))
    clock: dict[tuple[str, int], float] = {}
    cpu: dict[tuple[str, int], float] = {}
    for _ in range(repeats):
        for name, (steps, args) in compiled.items():
            for index, step in enumerate(steps):
                start, cpu_start = time.perf_counter(), time.process_time()
                y = jax.block_until_ready(step(*args))
                elapsed, cpu_elapsed = time.perf_counter() - start, time.process_time() - cpu_start
                clock[name, index] = min(elapsed, clock.get((name, index), elapsed))
                cpu[name, index] = min(cpu_elapsed, cpu.get((name, index), cpu_elapsed))
                if index == 0 and args is attention_args:
                    np.testing.assert_allclose(y, expected, atol=2e-5)
    print(f"\n{side}x{side}x{width}, batch {batch}, block {local.block_size(side, side)}")
    header = f"{'ms':>9}{'CPU ms':>9}{'MiB':>8}{'times':>7}{'CPU':>6}{'memory':>8}"
    print(f"{'':17}{'forward':>47} |{'forward + backward':>47}")
    print(f"{'':17}{header} |{header}")

    def cells(name: str, index: int) -> str:
        memory = {key: compiled[key][0][index].memory_analysis().temp_size_in_bytes / 2**20 for key in (name, "unfold")}
        faster, faster_cpu = (times["unfold", index] / times[name, index] for times in (clock, cpu))
        share = f"1/{memory['unfold'] / memory[name]:.1f}" if memory[name] >= 0.05 else "0"
        milliseconds = f"{clock[name, index] * 1e3:9.1f}{cpu[name, index] * 1e3:9.1f}"
        return f"{milliseconds}{memory[name]:8.1f}{faster:7.1f}{faster_cpu:6.1f}{share:>8}"

    for name in compiled:
        print(f"{name:17}{cells(name, 0)} |{cells(name, 1)}", flush=True)


def compile_for(topology: str, batch: int) -> None:
    """Compiles forward and backward of both back ends that suit a TPU for its devices, the batch split over them."""
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("data", None))
    print(f"{len(devices)} x {devices[0].device_kind}, bfloat16, {batch} images per device; temporary MiB per device")
    for side, width in MAPS:
        head = width // HEADS
        shape = (batch * len(devices), side, side, HEADS, head)
        q = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=split)
        table = jax.ShapeDtypeStruct((KERNEL, HEADS, head // 2), jnp.float32, sharding=whole)
        for backend in ("blocks", "pallas"):
            function = functools.partial(local.local_attention, kernel_size=KERNEL, backend=backend)
            with jax.set_mesh(mesh):
                compiled = jax.jit(gradient(function)).lower(q, q, q, table, table).compile()
            memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
            print(f"{side}x{side}x{width} {backend:8}{memory:10.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4, help="images; with --topology, images per device")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--blocks", type=int, nargs="+", default=[], help="compare these block sizes instead")
    parser.add_argument("--topology", help="compile for this TPU instead, such as v5e:2x2")
    args = parser.parse_args()
    if args.topology:
        compile_for(args.topology, args.batch)
        return
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, float32, k = {KERNEL}, {HEADS} heads")
    for side, width in MAPS:
        measure(side, width, args.batch, args.repeats, args.blocks)


if __name__ == "__main__":
    main()
