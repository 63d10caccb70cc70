"""The kernels for NVIDIA GPUs beside what runs where they do not: time on the device, memory traffic and rounding.

    python -m benchmarks.gpu_kernels                         # on a GPU: attention, window attention, layer norm
    python -m benchmarks.gpu_kernels --only=norm --rounds=3
    python -m benchmarks.gpu_kernels --interpret             # anywhere: the same kernels on small arrays, results only

Each case is a forward and a backward pass in bfloat16. The two sides take turns; a round adds up the time of all of a
side's programs on the device by JAX's profiler, so what Python takes to start them does not count. "bytes" is the time
to read each input and write each result once at 3 TB/s. Rounding is the distance of result and gradients from the same
computation in float32, relative to its norm; the largest counts.
"""

import argparse
import collections
import glob
import statistics
import tempfile

import jax
import jax.numpy as jnp

from vit_scaling.models import layers
from vit_scaling.ops import attention, attention_pallas, kernels, norm_pallas, windows, windows_pallas

RATE = 3e12  # bytes per second
CALLS = 5


def normal(seed, shape, dtype="bfloat16", scale=1.0):
    return (scale * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


def attention_case(batch, tokens, heads, interpret):
    """Returns (kernel, other side, inputs of both), the last input a float32 parameter."""

    def plain(qkv, bias, attend):
        qkv = (qkv.astype(jnp.float32) + bias[None, None]).astype(qkv.dtype)
        return attend(*(qkv[..., i, :] for i in range(3)))

    attend = attention.cudnn if kernels.platform() == "gpu" else attention.attention
    shape = (batch, tokens, heads, 3, 64)
    return (
        lambda qkv, bias: attention_pallas.self_attention(qkv, bias, tokens, interpret),
        lambda qkv, bias: plain(qkv, bias, attend if qkv.dtype == jnp.bfloat16 else exact_attention),
        (normal(0, shape), normal(1, shape[2:], "float32", 0.5)),
    )


def exact_attention(q, k, v):
    return jnp.swapaxes(attention.attention_weights(q, k) @ jnp.swapaxes(v, 1, 2), 1, 2)


def window_case(batch, grid, heads, interpret):
    window, shift = 7, 3 if grid > 7 else 0

    def cut(q, k, v, bias):
        parts = (windows.split(x.reshape(*x.shape[:3], -1), window, shift) for x in (q, k, v))
        q, k, v = (x.reshape(*x.shape[:3], heads, 32) for x in parts)
        regions = windows.regions(grid, grid, window, shift) if shift else None
        y, _ = windows.window_attention(q, k, v, bias, regions)
        return windows.join(y.reshape(*y.shape[:3], -1), grid, grid, shift).reshape(batch, grid, grid, heads, 32)

    def fused(q, k, v, bias):
        return windows_pallas.window_attention(q, k, v, bias, window, (shift, shift), windows.MASKED, interpret)

    q, k, v = (normal(i, (batch, grid, grid, heads, 32), scale=0.3 if i == 0 else 1.0) for i in range(3))
    return fused, cut, (q, k, v, normal(3, (heads, window**2, window**2), "float32"))


def norm_case(batch, rows, width, interpret):
    def plain(x, scale, bias):
        y = layers._normalize(x, 1e-6) * scale[None, None] + bias[None, None]
        return y.astype(x.dtype)

    inputs = normal(0, (batch, rows, width)), normal(1, (width,), "float32"), normal(2, (width,), "float32")
    return lambda x, scale, bias: norm_pallas.layer_norm(x, scale, bias, 1e-6, interpret), plain, inputs


# By kind: how a case is made, its shapes, and small ones for `--interpret`.
CASES = {
    "attention": (attention_case, [(128, 197, 16), (128, 256, 12), (256, 64, 6)], [(1, 37, 2)]),
    "windows": (window_case, [(128, 56, 4), (128, 28, 8), (128, 14, 16), (128, 7, 32)], [(1, 14, 2)]),
    "norm": (norm_case, [(128, 198, 1024), (128, 196, 768), (128, 3136, 128)], [(2, 37, 96)]),
}


def both_ways(function):
    """Returns the function's result and gradients, for inputs and the result's gradient."""

    @jax.jit
    def run(inputs, g):
        y, pull = jax.vjp(function, *inputs)
        return y, *pull(g.astype(y.dtype))

    return run


def rounding(results, expected):
    distances = (
        jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b) for a, b in zip(results, expected, strict=True)
    )
    return max(float(distance) for distance in distances)


def device_seconds(run, *args):
    """Returns the time of a call's programs on the GPU."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(CALLS):
                results = run(*args)
            jax.block_until_ready(results)
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        planes = [plane for plane in jax.profiler.ProfileData.from_file(path).planes if "GPU" in plane.name]
        nanoseconds = collections.Counter()
        for plane in planes:
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    nanoseconds[plane.name] += sum(event.duration_ns for event in line.events)
    return sum(nanoseconds.values()) * 1e-9 / CALLS


def compare(name, kernel, other, inputs, rounds):
    g = normal(9, jax.eval_shape(kernel, *inputs).shape)
    sides = [both_ways(kernel), both_ways(other)]
    results = [side(inputs, g) for side in sides]
    with jax.default_matmul_precision("highest"):
        exact = sides[1](tuple(x.astype(jnp.float32) for x in inputs), g.astype(jnp.float32))
    errors = [rounding(result, exact) for result in results]
    text = f"{name:36}rounding {errors[0]:.1e}, the other's {errors[1]:.1e}"
    if rounds:
        times = [[device_seconds(side, inputs, g) for side in sides] for _ in range(rounds)]
        ratios = [theirs / ours for ours, theirs in times]
        ours, theirs = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        floor = 1e3 * sum(x.nbytes for x in (*inputs, *inputs, g, *results[0])) / RATE
        text += (
            f"; {ours:.3f} ms, the other {theirs:.3f} ms, {statistics.median(ratios):.2f} times as long "
            f"({min(ratios):.2f} to {max(ratios):.2f}); bytes {floor:.3f} ms"
        )
    print(text, flush=True)
    return errors


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=CASES, default=list(CASES), help="the kernels to run; default: all"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side; default: 7")
    parser.add_argument("--interpret", action="store_true", help="small arrays, on any device, without times")
    arguments = parser.parse_args(argv)
    if not arguments.interpret and not kernels.runs_on_gpu("a kernel", jnp.dtype("bfloat16")):
        parser.error("there is no NVIDIA GPU here that these kernels are made for; --interpret checks their results")
    errors = []
    for kind in arguments.only:
        make, shapes, small = CASES[kind]
        for shape in small if arguments.interpret else shapes:
            case = make(*shape, arguments.interpret)
            name = f"{kind} {'x'.join(map(str, shape))}"
            errors.append(compare(name, *case, 0 if arguments.interpret else arguments.rounds))
    return errors


if __name__ == "__main__":
    main()
