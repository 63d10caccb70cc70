"""Time and memory of a training step: this package beside a plain Linen ViT, and transformers and timm under torch.

    python -m benchmarks.step                                         # ours and the Linen ViT
    python -m benchmarks.step --reference=reference/bin/python        # a Python that has torch and transformers
    python -m benchmarks.step --models ViT-S/16 --sides ours linen --work gradient
    python -m benchmarks.step --memory                                # compiled memory of each remat policy, no clock
    python -m benchmarks.step --dtype=bfloat16 --batch=256 --calls=10 --models ViT-B/16 \
        --sides ours run torch:compile timm:compile --reference=python  # on a GPU

Work is "step" (forward, backward, clipping by global norm, AdamW), "gradient" (forward and backward) or "forward", of
random images and labels, without drop path. Each side is a process that stays alive; the sides take turns, `--calls`
calls at a time after one that is not timed, so that a change of the machine's speed meets all of them. Printed: the
median of a call, the median over rounds of the other side's time by ours with its least and largest, CPU seconds of
all threads, and the peak memory of each process while it makes steps, on a GPU the GPU's. There the rate of model FLOPs
is also given as a share of what a product of two 8192 x 8192 matrices reaches. Where two sides have the same network,
they run the same weights and their logits must agree before anything is timed. CPU seconds are what to compare on a
machine that has other work.

Sides: "ours" (the config's defaults: scanned, remat "dots"), "ours:none" and so on with another remat policy,
"ours:unrolled"; "run", the training step that `train` runs, from uint8 images; "linen" (ViT only); "torch",
"torch:compile" (transformers' ViT and Swin, with our weights); "timm", "timm:compile" (its own weights: the logits are
not compared). Parameters are float32 on all sides, also where the products are bfloat16.
"""

import argparse
import ctypes
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
# Name: image side, batch unless `--batch` says otherwise.
NETWORKS = {
    "ViT-S/16": (224, 16),
    "ViT-B/16": (224, 8),
    "ViT-L/16": (224, 4),
    "Swin-T": (224, 8),
    "Swin-B": (224, 4),
    "Swin-v2-T": (256, 8),
    "SASA-26": (224, 4),
    "SASA-50": (224, 4),
    "attention-CNN": (32, 16),
    "tiny": (32, 4),  # a ViT for trying this command out
}
DEFAULT = ("ViT-S/16", "ViT-B/16", "Swin-T", "Swin-v2-T", "SASA-26", "attention-CNN")
TIMM = {
    "ViT-S/16": "vit_small_patch16_224",
    "ViT-B/16": "vit_base_patch16_224",
    "ViT-L/16": "vit_large_patch16_224",
    "Swin-T": "swin_tiny_patch4_window7_224",
    "Swin-B": "swin_base_patch4_window7_224",
    "Swin-v2-T": "swinv2_tiny_window8_256",
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
    if network.startswith("SASA-"):
        depth = int(network.removeprefix("SASA-"))
        return resnet.ResNetConfig(depth=depth, spatial="attention", stem="attention", **fields)
    return attention_cnn.AttentionCNNConfig(position="learned+content", dropout=0.0, **fields)


def size_of(job):
    side, batch = NETWORKS[job["network"]]
    return side, job["batch"] or batch


def batch_of(job):
    side, batch = size_of(job)
    random = np.random.default_rng(SEED)
    images = random.uniform(-1, 1, (batch, side, side, 3)).astype(np.float32)
    return images, random.integers(0, CLASSES, batch)


def build(job, config, key):
    from vit_scaling import models

    side, _ = size_of(job)
    return models.build(config, image_size=(side, side), num_classes=CLASSES, key=key)


def parameters_of(job):
    """Returns (graphdef, parameters, batch_stats); the classifier is not zero, so that gradients reach every layer."""
    import jax

    from vit_scaling import models

    config = config_of(job["network"])

    def make(key):
        _, parameters, statistics = models.split(build(job, config, key))
        parameters["head"]["kernel"] = 0.02 * jax.random.normal(key, parameters["head"]["kernel"].shape)
        return parameters, statistics

    graphdef = models.split(jax.eval_shape(lambda key: build(job, config, key), jax.random.key(SEED)))[0]
    return graphdef, *jax.jit(make)(jax.random.key(SEED))


def jax_calls(logits_of, parameters, job):
    """Returns (call, wait, logits): `call()` starts one unit of work, `wait()` ends when all of it is done."""
    import jax
    import jax.numpy as jnp
    import optax

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.05))

    def loss(parameters, images, labels):
        logits = logits_of(parameters, images).astype(jnp.float32)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters, state, images, labels):
        value, gradient = jax.value_and_grad(loss)(parameters, images, labels)
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    forward, gradient = jax.jit(logits_of), jax.jit(jax.value_and_grad(loss))
    images, labels = (jnp.asarray(array) for array in batch_of(job))
    logits = np.asarray(forward(parameters, images), np.float32)
    state = [parameters, optimizer.init(parameters)] if job["work"] == "step" else [parameters]
    last = []

    def call():
        if job["work"] == "forward":
            last[:] = [forward(parameters, images)]
        elif job["work"] == "gradient":
            last[:] = [gradient(parameters, images, labels)]
        else:
            *state[:], value = step(*state, images, labels)
            last[:] = [value]

    return call, lambda: jax.block_until_ready((state, last)), logits


def ours(job, variant):
    graphdef, parameters, statistics_ = parameters_of(job)
    import jax

    from vit_scaling import interop, models

    if variant == "weights":  # written once, for transformers
        interop.save(models.merge(graphdef, parameters, statistics_), job["folder"], layout="huggingface")
        return lambda: None, lambda: None, np.zeros(0)
    fields = {"scan": False} if variant == "unrolled" else {"remat": variant} if variant else {}
    config = config_of(job["network"], dtype=job["dtype"], **fields)
    graphdef = models.split(jax.eval_shape(lambda key: build(job, config, key), jax.random.key(0)))[0]

    def logits_of(parameters, images):
        key = jax.random.key(1) if job["work"] != "forward" else None  # batch normalization by the batch
        return models.merge(graphdef, parameters, statistics_)(images, key)

    return jax_calls(logits_of, parameters, job)


def run(job, variant):
    """The step of `train`: uint8 images, Adam in float32, norms, the guard against what is not finite."""
    import jax

    from vit_scaling import config as config_lib
    from vit_scaling.data.config import DataConfig
    from vit_scaling.data.images.transforms import TransformConfig
    from vit_scaling.data.sources import SourceConfig
    from vit_scaling.parallel import mesh as mesh_lib
    from vit_scaling.training import step as step_lib

    del variant
    side, batch = size_of(job)
    c = config_lib
    config = c.Config(
        model=config_of(job["network"], dtype=job["dtype"]),
        data=DataConfig(
            train=SourceConfig("builtin", "mnist", "train"),  # never opened
            transform=TransformConfig(size=(side, side)),
            eval_transform=TransformConfig(size=(side, side)),
            batch_size=batch,
        ),
        duration=c.Duration(1000),
        optim=c.OptimConfig(name="adam", lr=1e-3),
        schedule=c.ScheduleConfig(kind="constant", warmup=c.Duration(10), cooldown=c.Duration(0)),
        evaluation=c.EvaluationConfig(every=c.Duration(1000)),
        checkpoint=c.CheckpointConfig(every=c.Duration(1000)),
    )
    mesh = mesh_lib.create(config.mesh, jax.devices()[:1])
    program = step_lib.build(config, num_classes=CLASSES, total_steps=1000, mesh=mesh)
    random = np.random.default_rng(SEED)
    images = random.integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    inputs = jax.device_put({"image": images, "label": random.integers(0, CLASSES, batch).astype(np.int32)})
    state = [program.init()]

    def call():
        state[0], _ = program.train_step(state[0], inputs)

    return call, lambda: jax.block_until_ready(state), np.zeros(0)


def linen(job, variant):
    """A ViT as a JAX user would write it with Linen's own layers, unrolled; `variant` "remat" recomputes each block."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    config = config_of(job["network"])
    dtype = jnp.dtype(job["dtype"])
    norm = functools.partial(nn.LayerNorm, epsilon=config.norm_eps, dtype=dtype)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = norm(name="norm1")(x)
            x = x + nn.MultiHeadDotProductAttention(config.heads, dtype=dtype, name="attention")(y, y)
            y = nn.Dense(config.mlp, dtype=dtype, name="up")(norm(name="norm2")(x))
            return x + nn.Dense(config.width, dtype=dtype, name="down")(nn.gelu(y, approximate=False))

    class ViT(nn.Module):
        @nn.compact
        def __call__(self, x):
            patches = nn.Conv(
                config.width, config.patch, strides=config.patch, padding="VALID", dtype=dtype, name="embedding"
            )
            x = patches(x).reshape(len(x), -1, config.width)
            x = x + self.param("position", nn.initializers.zeros, (x.shape[1], config.width)).astype(dtype)
            token = self.param("token", nn.initializers.zeros, (1, config.width)).astype(dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, config.width)), x], axis=1)
            for layer in range(config.depth):
                x = (nn.remat(Block) if variant == "remat" else Block)(name=f"block{layer}")(x)
            return nn.Dense(CLASSES, dtype=dtype, name="head")(norm(name="norm")(x)[:, 0])

    p = parameters_of(job)[1]
    theirs = {name: p[name] for name in ("embedding", "norm", "head")}
    theirs |= {"position": p["position_embedding"], "token": p["class_token"]}
    for layer in range(config.depth):
        block = jax.tree.map(lambda leaf: leaf[layer], p["blocks"])  # noqa: B023
        theirs[f"block{layer}"] = {name: block[name] for name in ("norm1", "attention", "norm2")} | block["mlp"]
    return jax_calls(lambda parameters, images: ViT().apply({"params": parameters}, images), theirs, job)


def torch(job, variant):
    import transformers

    model = transformers.AutoModelForImageClassification.from_pretrained(job["folder"])
    return torch_calls(model, variant, job, lambda output: output.logits)


def timm(job, variant):
    import timm

    call, wait, _ = torch_calls(timm.create_model(TIMM[job["network"]]), variant, job, lambda output: output)
    return call, wait, np.zeros(0)


def torch_calls(model, variant, job, logits_of):
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = batch_of(job)
    model = model.to(device).eval()
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
    labels = torch.from_numpy(labels).to(device)
    half = torch.autocast(device, torch.bfloat16, enabled=job["dtype"] == "bfloat16")
    with torch.no_grad(), half:
        logits = logits_of(model(pixels)).float().cpu().numpy()
    model.train()
    forward = torch.compile(model) if variant == "compile" else model
    fused = {"fused": True} if device == "cuda" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, **fused)

    def call():
        if job["work"] == "forward":
            with torch.no_grad(), half:
                forward(pixels)
            return
        model.zero_grad()
        with half:
            loss = torch.nn.functional.cross_entropy(logits_of(forward(pixels)).float(), labels)
        loss.backward()
        if job["work"] == "step":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return call, torch.cuda.synchronize if device == "cuda" else lambda: None, logits


STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak():
    """Begins the peak of resident memory anew, so that it is that of the steps and not of compiling; on Linux.

    First every side gives back to the system what it has freed, as `train` does after compiling.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    if os.access(FORGET, os.W_OK):
        FORGET.write_text("5")


def peak_memory():
    """Returns the most bytes that this process has held since `forget_peak`: of the GPU's memory, if it has one."""
    if "jax" in sys.modules:
        import jax

        stats = jax.local_devices()[0].memory_stats()
        if stats:
            return stats["peak_bytes_in_use"]
    elif "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        return sys.modules["torch"].cuda.max_memory_allocated()
    if os.access(FORGET, os.W_OK):
        return int(STATUS.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matmul_flops():
    """Returns the FLOPs per second of a product of two bfloat16 matrices of 8192 x 8192 on a GPU; None on a CPU."""
    import jax
    import jax.numpy as jnp

    if jax.default_backend() == "cpu":
        return None
    size, times = 8192, []
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    multiply = jax.jit(lambda a, b: (a @ b, a))
    jax.block_until_ready(multiply(a, b))
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(10):
            product = multiply(a, b)
        jax.block_until_ready(product)
        times.append((time.perf_counter() - start) / 10)
    return 2 * size**3 / statistics.median(times)


def serve(job):
    """Prints one line of JSON when ready, then one for each line that it reads: the cost of a call in a turn."""
    name, _, variant = job["side"].partition(":")
    sides = {"ours": ours, "run": run, "linen": linen, "torch": torch, "timm": timm}
    call, wait, logits = sides[name](job, variant)
    call()
    wait()
    forget_peak()
    print(json.dumps({"logits": np.asarray(logits, np.float64).reshape(-1)[:2000].tolist()}), flush=True)
    for _ in sys.stdin:
        # In a run a step follows another step of the same run, and does not find its memory gone to other processes.
        call()
        wait()
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(job["calls"]):
            call()
        wait()
        seconds, cpu = ((time.perf_counter() - start), (time.process_time() - cpu))
        cost = {"seconds": seconds / job["calls"], "cpu": cpu / job["calls"], "peak": peak_memory()}
        print(json.dumps(cost), flush=True)


class Side:
    """A process that does one unit of work for each line it is sent."""

    def __init__(self, name, network, arguments, folder):
        python = arguments.reference if name.startswith(("torch", "timm")) else sys.executable
        job = {"side": name, "network": network, "folder": str(folder)}
        job |= {key: getattr(arguments, key) for key in ("work", "dtype", "batch", "calls")}
        command = [python, __file__, "--serve", json.dumps(job)]
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = dict(os.environ, PYTHONPATH=path, XLA_PYTHON_CLIENT_PREALLOCATE="false")
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.calls = []

    def wait_until_ready(self):
        self.logits = np.array(self._read()["logits"])

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


def compare(network, arguments, ceiling):
    job = {"network": network, "batch": arguments.batch}
    image_side, batch = size_of(job)
    sides = [name for name in arguments.sides if not name.startswith("linen") or network.startswith(("ViT", "tiny"))]
    if not arguments.reference or network not in TIMM:
        sides = [name for name in sides if not name.startswith(("torch", "timm"))]
    tolerance = 1e-3 if arguments.dtype == "float32" else 0.1
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights"
        if any(name.startswith("torch") for name in sides):
            Side("ours:weights", network, arguments, weights).close()
        running = [Side(name, network, arguments, weights) for name in sides]
        for side in running:
            side.wait_until_ready()
        compared = [side for side in running if side.logits.size]
        for side in compared[1:]:
            difference = np.abs(side.logits - compared[0].logits).max()
            if not difference <= tolerance:
                raise SystemExit(f"{network}: the logits of {side.name} differ from ours by {difference:.1e}")
        for _ in range(arguments.rounds):
            for side in running:
                side.call()
        for side in running:
            side.close()
    print(
        f"\n{network}, {image_side} pixels, batch {batch}, {arguments.dtype}, {arguments.work}, "
        f"{arguments.rounds} rounds of {arguments.calls} calls"
    )
    for side in running:
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(running[0].calls, side.calls, strict=True)]
        seconds = side.median("seconds")
        share = f", {100 * train_flops(job) / seconds / ceiling:.0f}% of the matrix product" if ceiling else ""
        print(
            f"  {side.name:16}{seconds:8.4f} s{batch / seconds:9.1f} images/s{side.median('cpu'):8.3f} CPU s"
            f"{side.median('peak') / 2**30:7.2f} GiB   {statistics.median(ratios):.2f} times ours "
            f"({min(ratios):.2f} to {max(ratios):.2f}){share}",
            flush=True,
        )


def train_flops(job):
    """Returns the model FLOPs of one step: three forward passes."""
    from vit_scaling import flops

    side, batch = size_of(job)
    cost = flops.count(config_of(job["network"]), image_size=(side, side), num_classes=CLASSES)
    return batch * cost.train_flops


def memory(network):
    """Prints what the compiled gradient of each policy allocates and computes; the same on every run."""
    import jax
    import jax.numpy as jnp

    from vit_scaling import models

    job = {"network": network, "batch": None}
    side, batch = size_of(job)
    print(f"\n{network}, {side} pixels, batch {batch}, float32: compiled gradient")
    for policy in POLICIES:
        for scan in (True, False):
            config = config_of(network, remat=policy, scan=scan)
            shapes = jax.eval_shape(lambda key: build(job, config, key), jax.random.key(0))  # noqa: B023
            graphdef, parameters, statistics_ = models.split(shapes)

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
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=DEFAULT)
    parser.add_argument("--sides", nargs="+", default=["ours", "ours:none", "ours:full", "linen", "torch"])
    parser.add_argument("--work", choices=("step", "gradient", "forward"), default="step")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, help="images of a call")
    parser.add_argument("--calls", type=int, default=1, help="calls in a row, which are timed together")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--reference", help="a Python that has torch, transformers and timm")
    parser.add_argument("--memory", action="store_true", help="compiled memory of each remat policy instead")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(json.loads(arguments.serve))
        return
    ceiling = None if arguments.memory else ceiling_of_this_machine()
    if ceiling:
        print(f"a product of two 8192 x 8192 bfloat16 matrices reaches {ceiling / 1e12:.0f} TFLOP/s")
    for network in arguments.models:
        if arguments.memory:
            memory(network)
        else:
            compare(network, arguments, ceiling)


def ceiling_of_this_machine():
    """Measures `matmul_flops` in a process of its own, which gives the GPU's memory back."""
    code = "from benchmarks import step; print(step.matmul_flops())"
    environment = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false")
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, env=environment)
    last = done.stdout.split()[-1]
    return None if last == "None" else float(last)


if __name__ == "__main__":
    main()
