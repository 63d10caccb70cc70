"""What the host costs a training step, and what a checkpoint costs the steps around it.

    python -m benchmarks.overhead                     # one device and eight (of the CPU)
    python -m benchmarks.overhead --megabytes 1 16 64

Host: a model so small that its step is almost empty is trained by the loop's own parts, from a set in memory. Printed
is the host's time for each step, of which an accelerator hides what it computes longer.

Checkpoints: a state of the given size is saved as `train` saves. "save" is the time until the checkpoint is complete;
"stall" is how long the loop waits before it goes on, also as a share of the save. "restore" reads it and verifies it.
"digest" is the part of each that computes the digests of the arrays. The state is random, which hardly compresses.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS, WARMUP, ROUNDS = 300, 50, 5


def empty_config(devices):
    from vit_scaling import config as c
    from vit_scaling.data.config import DataConfig
    from vit_scaling.data.images.transforms import TransformConfig
    from vit_scaling.data.sources import SourceConfig
    from vit_scaling.models import vit

    plain = TransformConfig(size=(28, 28), crop="none")
    return c.Config(
        model=vit.ViTConfig(width=8, depth=1, mlp=8, heads=1, patch=(28, 28), pool="gap"),
        data=DataConfig(
            train=SourceConfig("builtin", "mnist", "train"),
            transform=plain,
            eval_transform=plain,
            batch_size=devices,
            threads=1,
        ),
        duration=c.Duration(STEPS),
        optim=c.OptimConfig(name="sgd", lr=1e-3),
        schedule=c.ScheduleConfig(kind="constant", warmup=c.Duration(0), cooldown=c.Duration(0)),
        evaluation=c.EvaluationConfig(every=c.Duration(STEPS)),
        checkpoint=c.CheckpointConfig(every=c.Duration(STEPS)),
        log=c.LogConfig(every=c.Duration(50)),
    )


def host():
    """Prints the milliseconds of the loop's steps in this process, which has as many devices as it was started with."""
    import jax

    from vit_scaling.training import loop, step_log

    times = []
    dispatched = step_log.StepLog.dispatched

    def timed(self, step, metrics):
        times.append(time.perf_counter())
        return dispatched(self, step, metrics)

    step_log.StepLog.dispatched = timed
    with tempfile.TemporaryDirectory() as folder:
        loop.train(empty_config(jax.device_count()), Path(folder) / "run")
    steps = [1e3 * (after - before) for before, after in zip(times[WARMUP:], times[WARMUP + 1 :], strict=False)]
    quartiles = statistics.quantiles(steps, n=4)
    print(
        f"{jax.device_count()} devices: {quartiles[1]:.2f} ms for each step (quartiles {quartiles[0]:.2f} and "
        f"{quartiles[2]:.2f}), the step itself included"
    )


def checkpoints(megabytes):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from vit_scaling.interop import run
    from vit_scaling.parallel import mesh as mesh_lib
    from vit_scaling.training import checkpoint, step

    config = empty_config(1)
    mesh = mesh_lib.create(config.mesh, jax.devices()[:1])
    program = step.build(config, num_classes=10, total_steps=STEPS, mesh=mesh)
    state = program.init()
    random = np.random.default_rng(0)
    state.opt_state = [jnp.asarray(random.standard_normal((2**18, megabytes // 8), np.float32)) for _ in range(8)]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    run.digests(state)  # compiles
    times = {"save": [], "stall": [], "restore": [], "digest": []}

    def timed(name, function, begin=None):
        begin = time.perf_counter() if begin is None else begin
        function()
        times[name].append(time.perf_counter() - begin)
        return begin

    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS):
            path = Path(folder) / str(number)
            keeper = checkpoint.Checkpoints(path, keep=1, permanent=0)
            state.step = jnp.int32(1)
            begin = timed("stall", lambda: keeper.save(1, state, {}))  # noqa: B023
            timed("save", keeper.close, begin)
            timed("restore", lambda: jax.block_until_ready(checkpoint.restore(path / "1", shapes)[0]))  # noqa: B023
            timed("digest", lambda: run.digests(state))
    save, stall, restore, digest = (statistics.median(each) for each in times.values())
    print(
        f"{megabytes:5} MB: save {save:.3f} s, stall {stall:.3f} s ({100 * stall / save:.0f}% of the save), restore "
        f"{restore:.3f} s, digest {digest:.3f} s ({100 * digest / save:.1f}% of the save, "
        f"{100 * digest / restore:.1f}% of the restore)"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--host", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.host:
        host()
        return
    for devices in (1, 8):
        environment = dict(os.environ, JAX_NUM_CPU_DEVICES=str(devices), JAX_PLATFORMS="cpu")
        command = [sys.executable, "-m", "benchmarks.overhead", "--host"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        print(done.stdout.splitlines()[-1], flush=True)
    for megabytes in arguments.megabytes:
        checkpoints(megabytes)


if __name__ == "__main__":
    main()
