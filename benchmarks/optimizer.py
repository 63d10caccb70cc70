"""State and update time of our optimizers beside optax's AdamW and Adafactor.

    python -m benchmarks.optimizer                     # bytes of ViT-g/14, abstractly; time of an update on ViT-B/16
    python -m benchmarks.optimizer --time Ti/16 --rounds 3

Bytes come from `jax.eval_shape`: no array is made. An update is the optimizer alone, under jit with donated state, from
fixed gradients; the optimizers take turns, and the median over rounds counts, in seconds of the clock and of all
threads' CPU. The last column is the median over rounds of that time by ours, with its least and largest.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import optax

from vit_scaling import flops, names
from vit_scaling.models import vit
from vit_scaling.optim import optimizer

IMAGE_SIZE, CLASSES = (224, 224), 1000


def optimizers(params):
    """Returns {name: transformation of gradients}; decay and clipping are left out of all."""
    config = {"clip": None, "weight_decay": 0.0, "head_weight_decay": 0.0}
    ours = {
        f"ours: {name}, {dtype} first moment": optimizer.OptimConfig(name=name, moment_dtype=dtype, **config)
        for name, dtype in (
            ("adafactor", "bfloat16"),
            ("adafactor", "float32"),
            ("adam", "bfloat16"),
            ("muon", "bfloat16"),
            ("lamb", "bfloat16"),
            ("lion", "bfloat16"),
        )
    }
    return {name: optimizer.create(config, params) for name, config in ours.items()} | {
        "optax.adamw": optax.scale_by_adam(),
        "optax.adamw, bfloat16 first moment": optax.scale_by_adam(mu_dtype=jnp.bfloat16),
        "optax.adafactor, no first moment": optax.adafactor(learning_rate=1.0, multiply_by_parameter_scale=False),
        "optax.adafactor, momentum 0.9": optax.adafactor(
            learning_rate=1.0, multiply_by_parameter_scale=False, momentum=0.9, dtype_momentum=jnp.bfloat16
        ),
    }


def shapes_of(variant):
    config = vit.variant(variant, pool="map")
    return names.unflatten(flops.parameters(config, image_size=IMAGE_SIZE, num_classes=CLASSES))


def size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def print_bytes(variant):
    params = shapes_of(variant)
    print(f"ViT-{variant}, MAP head, {CLASSES} classes: parameters {size(params) / 2**30:.3f} GiB")
    for name, transformation in optimizers(params).items():
        state = size(jax.eval_shape(transformation.init, params))
        print(f"  {name:40}{state / 2**30:8.3f} GiB of state{state / size(params):8.3f} of the parameters", flush=True)


def print_times(variant, rounds):
    shapes = shapes_of(variant)
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))
    params, grads = (
        jax.tree.map(lambda leaf, s=scale: s * jnp.ones(leaf.shape, leaf.dtype), shapes) for scale in (1.0, 1e-3)
    )
    grads = jax.tree.map(lambda leaf: leaf * jax.random.normal(next(keys), leaf.shape), grads)
    states, steps, seconds = {}, {}, {}
    for name, transformation in optimizers(shapes).items():
        update = lambda grads, state, params, t=transformation: t.update(grads, state, params)  # noqa: E731
        steps[name] = jax.jit(update, donate_argnums=1)
        states[name] = jax.block_until_ready(steps[name](grads, transformation.init(params), params))[1]
        seconds[name] = []
    for _ in range(rounds):
        for name, step in steps.items():
            start, cpu = time.perf_counter(), time.process_time()
            states[name] = jax.block_until_ready(step(grads, states[name], params))[1]
            seconds[name].append((time.perf_counter() - start, time.process_time() - cpu))
    print(f"one update of ViT-{variant}, {rounds} rounds, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    base = next(iter(seconds.values()))
    for name, calls in seconds.items():
        clock, cpu = (statistics.median(column) for column in zip(*calls, strict=True))
        ratios = [call[0] / ours[0] for call, ours in zip(calls, base, strict=True)]
        spread = f"{statistics.median(ratios):.2f} times ours ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"  {name:40}{clock * 1e3:9.1f} ms{cpu * 1e3:9.1f} CPU ms   {spread}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", default="g/14", help="the ViT whose state is counted")
    parser.add_argument("--time", default="B/16", help="the ViT whose update is timed")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print_bytes(arguments.bytes)
    print_times(arguments.time, arguments.rounds)


if __name__ == "__main__":
    main()
