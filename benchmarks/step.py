"""Time and memory of a training step: this package beside a plain Linen ViT and transformers under torch.

    python -m benchmarks.step                                         # ours and the Linen ViT
    python -m benchmarks.step --reference=reference/bin/python        # a Python that has torch and transformers
    python -m benchmarks.step --models ViT-S/16 --sides ours linen --work gradient
    python -m benchmarks.step --memory                                # compiled memory of each remat policy, no clock

Work is "step" (forward, backward, clipping by global norm, AdamW), "gradient" (forward and backward) or "forward", of
random images and labels in float32, without drop path. Each side is a process that stays alive; the sides take turns,
one call at a time, so that a change of the machine's speed meets all of them. Printed: the median of a call, the
median over rounds of the other side's time by ours with its least and largest, CPU seconds of all threads, and the peak
resident memory of each process. Where two sides have the same network, they run the same weights and their logits must
agree before anything is timed. CPU seconds are what to compare on a machine that has other work.

Sides: "ours" (the config's defaults: scanned, remat "dots"), "ours:none" and so on with another remat policy,
"ours:unrolled"; "linen" (ViT only); "torch", "torch:compile" (ViT and Swin).
"""

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CLASSES, SEED = 1000, 0
# Name: image side, batch.
NETWORKS = {
    "ViT-S/16": (224, 16),
    "ViT-B/16": (224, 8),
    "Swin-T": (224, 8),
    "Swin-v2-T": (256, 8),
    "SASA-26": (224, 4),
    "attention-CNN": (32, 16),
    "tiny": (32, 4),  # a ViT for trying this command out
}
POLICIES = ("none", "dots", "full")


def config_of(network, **fields):
    from vit_scaling.models import attention_cnn, resnet, swin, vit

    token = {"pool": "token", "gelu": "exact", "norm_eps": 1e-12}  # transformers' ViT
    if network == "tiny":
        return vit.ViTConfig(32, 2, 64, 2, (8, 8), **token, **fields)
    if network.startswith("ViT-"):
        return vit.variant(network.removeprefix("ViT-"), **token, **fields)
    if network.startswith("Swin-"):
        return swin.variant(network.removeprefix("Swin-"), drop_path=0.0, **fields)
    if network == "SASA-26":
        return resnet.ResNetConfig(depth=26, spatial="attention", stem="attention", **fields)
    return attention_cnn.AttentionCNNConfig(position="learned+content", dropout=0.0, **fields)


def batch_of(side, batch):
    random = np.random.default_rng(SEED)
    images = random.uniform(-1, 1, (batch, side, side, 3)).astype(np.float32)
    return images, random.integers(0, CLASSES, batch)


def parameters_of(network, side):
    """Returns (graphdef, parameters, batch_stats); the classifier is not zero, so that gradients reach every layer."""
    import jax

    from vit_scaling import models

    def make(key):
        build = models.build(config_of(network), image_size=(side, side), num_classes=CLASSES, key=key)
        _, parameters, statistics = models.split(build)
        parameters["head"]["kernel"] = 0.02 * jax.random.normal(key, parameters["head"]["kernel"].shape)
        return parameters, statistics

    graphdef = models.split(
        jax.eval_shape(
            lambda key: models.build(config_of(network), image_size=(side, side), num_classes=CLASSES, key=key),
            jax.random.key(SEED),
        )
    )[0]
    return graphdef, *jax.jit(make)(jax.random.key(SEED))


def jax_calls(logits_of, parameters, work, images, labels):
    """Returns (call, logits): `call()` does one unit of work and waits for it."""
    import jax
    import jax.numpy as jnp
    import optax

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.05))

    def loss(parameters, images, labels):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits_of(parameters, images), labels))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters, state, images, labels):
        value, gradient = jax.value_and_grad(loss)(parameters, images, labels)
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    forward, gradient = jax.jit(logits_of), jax.jit(jax.value_and_grad(loss))
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    logits = np.asarray(forward(parameters, images))
    state = [parameters, optimizer.init(parameters)]

    def call():
        if work == "forward":
            jax.block_until_ready(forward(parameters, images))
        elif work == "gradient":
            jax.block_until_ready(gradient(parameters, images, labels))
        else:
            *state[:], value = step(*state, images, labels)
            jax.block_until_ready((state, value))

    return call, logits


def ours(network, variant, work, folder):
    side, batch = NETWORKS[network]
    graphdef, parameters, statistics_ = parameters_of(network, side)
    import jax

    from vit_scaling import interop, models

    if variant == "weights":  # written once, for transformers
        interop.save(models.merge(graphdef, parameters, statistics_), folder, layout="huggingface")
        return lambda: None, np.zeros(0)
    fields = {"scan": False} if variant == "unrolled" else {"remat": variant} if variant else {}
    config = config_of(network, **fields)
    build = lambda key: models.build(config, image_size=(side, side), num_classes=CLASSES, key=key)  # noqa: E731
    graphdef = models.split(jax.eval_shape(build, jax.random.key(0)))[0]

    def logits_of(parameters, images):
        key = jax.random.key(1) if work != "forward" else None  # batch normalization by the batch
        return models.merge(graphdef, parameters, statistics_)(images, key)

    return jax_calls(logits_of, parameters, work, *batch_of(side, batch))


def linen(network, variant, work, folder):
    """A ViT as a JAX user would write it with Linen's own layers, unrolled; `variant` "remat" recomputes each block."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    config = config_of(network)
    norm = functools.partial(nn.LayerNorm, epsilon=config.norm_eps)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = norm(name="norm1")(x)
            x = x + nn.MultiHeadDotProductAttention(config.heads, name="attention")(y, y)
            y = nn.Dense(config.mlp, name="up")(norm(name="norm2")(x))
            return x + nn.Dense(config.width, name="down")(nn.gelu(y, approximate=False))

    class ViT(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(config.width, config.patch, strides=config.patch, padding="VALID", name="embedding")(x)
            x = x.reshape(len(x), -1, config.width)
            x = x + self.param("position", nn.initializers.zeros, (x.shape[1], config.width))
            token = self.param("token", nn.initializers.zeros, (1, config.width))
            x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, config.width)), x], axis=1)
            for layer in range(config.depth):
                x = (nn.remat(Block) if variant == "remat" else Block)(name=f"block{layer}")(x)
            return nn.Dense(CLASSES, name="head")(norm(name="norm")(x)[:, 0])

    side, batch = NETWORKS[network]
    p = parameters_of(network, side)[1]
    theirs = {name: p[name] for name in ("embedding", "norm", "head")}
    theirs |= {"position": p["position_embedding"], "token": p["class_token"]}
    for layer in range(config.depth):
        block = jax.tree.map(lambda leaf: leaf[layer], p["blocks"])  # noqa: B023
        theirs[f"block{layer}"] = {name: block[name] for name in ("norm1", "attention", "norm2")} | block["mlp"]
    apply = lambda parameters, images: ViT().apply({"params": parameters}, images)  # noqa: E731
    return jax_calls(apply, theirs, work, *batch_of(side, batch))


def torch(network, variant, work, folder):
    import torch
    import transformers

    side, batch = NETWORKS[network]
    images, labels = batch_of(side, batch)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    pixels, labels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)
    with torch.no_grad():
        logits = model(pixels).logits.numpy()
    model.train()
    run = torch.compile(model) if variant == "compile" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)

    def call():
        if work == "forward":
            with torch.no_grad():
                run(pixels)
            return
        model.zero_grad()
        torch.nn.functional.cross_entropy(run(pixels).logits, labels).backward()
        if work == "step":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return call, logits


def serve(side, network, work, folder):
    """Prints one line of JSON when ready, then one for each line that it reads: the cost of one call."""
    name, _, variant = side.partition(":")
    call, logits = {"ours": ours, "linen": linen, "torch": torch}[name](network, variant, work, folder)
    call()
    print(json.dumps({"logits": np.asarray(logits, np.float64).reshape(-1)[:2000].tolist()}), flush=True)
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        call()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak}), flush=True)


class Side:
    """A process that does one unit of work for each line it is sent."""

    def __init__(self, name, network, arguments, folder):
        python = arguments.reference if name.startswith("torch") else sys.executable
        command = [python, __file__, "--serve", json.dumps([name, network, arguments.work, str(folder)])]
        environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[1]))
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.logits = np.array(self._read()["logits"])
        self.calls = []

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}; its error is above")
        return json.loads(line) if line.startswith("{") else self._read()

    def call(self):
        print(file=self.process.stdin, flush=True)
        self.calls.append(self._read())

    def close(self):
        self.process.stdin.close()
        self.process.wait()

    def median(self, field):
        return statistics.median(call[field] for call in self.calls)


def compare(network, arguments):
    sides = [name for name in arguments.sides if not name.startswith("linen") or network.startswith(("ViT", "tiny"))]
    if not arguments.reference or network in ("SASA-26", "attention-CNN"):
        sides = [name for name in sides if not name.startswith("torch")]
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights"
        if any(name.startswith("torch") for name in sides):
            Side("ours:weights", network, arguments, weights).close()
        running = [Side(name, network, arguments, weights) for name in sides]
        for side in running[1:]:
            difference = np.abs(side.logits - running[0].logits).max()
            if difference > 1e-3:
                raise SystemExit(f"{network}: the logits of {side.name} differ from ours by {difference:.1e}")
        for _ in range(arguments.rounds):
            for side in running:
                side.call()
        for side in running:
            side.close()
    image_side, batch = NETWORKS[network]
    print(f"\n{network}, {image_side} pixels, batch {batch}, {arguments.work}, {arguments.rounds} rounds")
    for side in running:
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(running[0].calls, side.calls, strict=True)]
        seconds = side.median("seconds")
        print(
            f"  {side.name:16}{seconds:8.3f} s{batch / seconds:9.1f} images/s{side.median('cpu'):8.3f} CPU s"
            f"{side.median('peak') / 2**30:7.2f} GiB   {statistics.median(ratios):.2f} times ours "
            f"({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


def memory(network):
    """Prints what the compiled gradient of each policy allocates and computes; the same on every run."""
    import jax
    import jax.numpy as jnp

    from vit_scaling import models

    side, batch = NETWORKS[network]
    print(f"\n{network}, {side} pixels, batch {batch}, float32: compiled gradient")
    for policy in POLICIES:
        for scan in (True, False):
            config = config_of(network, remat=policy, scan=scan)
            build = lambda key: models.build(config, image_size=(side, side), num_classes=CLASSES, key=key)  # noqa: B023, E731
            graphdef, parameters, statistics_ = models.split(jax.eval_shape(build, jax.random.key(0)))

            def loss(parameters, statistics_, images):
                logits = models.merge(graphdef, parameters, statistics_)(images, jax.random.key(0))  # noqa: B023
                return jnp.mean(jnp.square(logits))

            images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)
            compiled = jax.jit(jax.grad(loss)).lower(parameters, statistics_, images).compile()
            temporary, flops = compiled.memory_analysis().temp_size_in_bytes, compiled.cost_analysis()["flops"]
            form = "scanned" if scan else "unrolled"
            print(f"  {policy:5}{form:9}{temporary / 2**20:9.0f} MiB temporary{flops / 1e9:9.1f} GFLOPs", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=[name for name in NETWORKS if name != "tiny"])
    parser.add_argument("--sides", nargs="+", default=["ours", "ours:none", "ours:full", "linen", "torch"])
    parser.add_argument("--work", choices=("step", "gradient", "forward"), default="step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--reference", help="a Python that has torch and transformers")
    parser.add_argument("--memory", action="store_true", help="compiled memory of each remat policy instead")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*json.loads(arguments.serve))
        return
    for network in arguments.models:
        if arguments.memory:
            memory(network)
        else:
            compare(network, arguments)


if __name__ == "__main__":
    main()
