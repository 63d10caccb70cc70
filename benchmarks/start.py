"""From the command to the first step: how long, and what it goes into.

    python -m benchmarks.start                          # configs/smoke.py: cold and warm cache, and a restart
    python -m benchmarks.start --compile                # ViT-L/16: tracing and compiling, scanned and unrolled

Each start is a process of its own, as `./run.sh train` makes one. "cold" has an empty compilation cache, "warm" that of
the start before, and "restart" continues from a checkpoint with a warm cache. The three take turns. Printed are medians
of wall seconds and, last, the CPU seconds of the process, which are what to compare on a machine that has other work.
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PHASES = ("imports", "sets", "state", "compile", "evaluation", "step")
KINDS = ("cold", "warm", "restart")


def since_the_process_began():
    """Returns the seconds since the kernel started this process."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def child(config, workdir, save):
    """Trains up to the first step and prints where the time went; with `save`, stops as a signal stops it."""
    sys.argv[0] = "vit-scaling"  # by which cli.py knows that the process is the command
    from vit_scaling import cli
    from vit_scaling.training import loop, step_log

    marks = {"imports": since_the_process_began()}

    def marked(name, function):
        def wrapped(*args, **kwargs):
            value = function(*args, **kwargs)
            marks[name] = since_the_process_began()
            return value

        return wrapped

    def first_step(self, step, metrics):
        import jax

        jax.block_until_ready(metrics)
        marks["step"] = since_the_process_began()
        if save:
            os.kill(os.getpid(), signal.SIGTERM)
            return dispatched(self, step, metrics)
        print(json.dumps({"marks": marks, "cpu": time.process_time()}), flush=True)
        os._exit(0)

    loop._set_up = marked("sets", loop._set_up)
    loop._first_state = marked("state", loop._first_state)
    loop.StepLog.__init__ = marked("compile", loop.StepLog.__init__)
    loop.Suite.measure = marked("evaluation", loop.Suite.measure)
    dispatched, step_log.StepLog.dispatched = step_log.StepLog.dispatched, first_step
    loop.train(cli.load_config(config), Path(workdir))


def start(config, workdir, cache, save=False):
    command = [sys.executable, "-m", "benchmarks.start", "--child", json.dumps([config, str(workdir), save])]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(cache)),
    )
    if save:
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"marks"')]
    if not lines:
        raise SystemExit(f"the start failed:\n{done.stderr[-2000:]}")
    result = json.loads(lines[-1])
    ends = [result["marks"].get(phase) for phase in PHASES]
    seconds, last = {}, 0.0
    for phase, end in zip(PHASES, ends, strict=True):
        seconds[phase] = 0.0 if end is None else end - last  # a restart between evaluations makes none
        last = last if end is None else end
    return seconds | {"in all": last, "CPU": result["cpu"]}


def starts(config, rounds):
    results = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        start(config, root / "saved", root / "cache", save=True)  # fills the cache and leaves a checkpoint
        for number in range(rounds):
            results["cold"].append(start(config, root / f"cold{number}", root / f"cache{number}"))
            results["warm"].append(start(config, root / f"warm{number}", root / "cache"))
            results["restart"].append(start(config, root / "saved", root / "cache"))
    columns = (*PHASES, "in all", "CPU")
    print(f"{config}, {rounds} rounds, median seconds")
    print(f"{'':10}" + "".join(f"{name:>12}" for name in columns))
    for kind, rows in results.items():
        print(f"{kind:10}" + "".join(f"{statistics.median(row[name] for row in rows):12.2f}" for name in columns))


def compile_large():
    import jax

    from benchmarks import step as step_benchmark
    from vit_scaling import models

    for scan in (True, False):
        config = step_benchmark.config_of("ViT-L/16", scan=scan)
        job = {"network": "ViT-L/16", "batch": 1}
        shapes = jax.eval_shape(lambda key: step_benchmark.build(job, config, key), jax.random.key(0))  # noqa: B023
        graphdef, parameters, _ = models.split(shapes)
        images = jax.ShapeDtypeStruct((1, 224, 224, 3), "float32")

        def loss(parameters, images):
            return models.merge(graphdef, parameters, {})(images, jax.random.key(0)).mean()  # noqa: B023

        times = [time.process_time()]
        traced = jax.jit(jax.grad(loss)).trace(parameters, images)
        times.append(time.process_time())
        lowered = traced.lower()
        times.append(time.process_time())
        lowered.compile()
        times.append(time.process_time())
        trace, lower, compiling = (b - a for a, b in itertools.pairwise(times))
        form = "scanned" if scan else "unrolled"
        print(f"ViT-L/16 gradient, {form}: trace {trace:.2f}, lower {lower:.2f}, compile {compiling:.2f} CPU seconds")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/smoke.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="compile times of ViT-L/16 instead")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*json.loads(arguments.child))
    elif arguments.compile:
        compile_large()
    else:
        starts(arguments.config, arguments.rounds)


if __name__ == "__main__":
    main()
