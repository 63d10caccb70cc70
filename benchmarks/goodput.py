"""Useful share of long runs under failures: measures checkpoints and restarts here, tabulates and draws.

    python benchmarks/goodput.py measure  # on this machine: seconds and bytes of a checkpoint, and of restarts
    python benchmarks/goodput.py table --blocking=5 --writing=60 --restart=600 --figure=docs/images/goodput.png

Rates are failures per chip and hour; the default is that of Llama 3's run (arXiv 2407.21783, section 3.3.4).
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks import goodput_model as goodput

ROOT = Path(__file__).parent.parent
LLAMA_3 = 419 / (16_384 * 54 * 24)
CHIPS = (256, 4096, 16_384)


def measure() -> None:
    """Prints what a checkpoint of a ViT-S/16 and its Adafactor costs here, and what a restart of the smoke run does."""
    import jax

    from configs import vit_imagenet
    from vit_scaling.config import resolve
    from vit_scaling.parallel import mesh as mesh_lib
    from vit_scaling.training import checkpoint
    from vit_scaling.training.step import build

    config = resolve(vit_imagenet.get_config("S/16"), 1_281_167)
    mesh = mesh_lib.create(config.mesh)
    program = build(config, num_classes=1000, total_steps=int(config.duration.amount), mesh=mesh)
    state = jax.block_until_ready(program.init())
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    with tempfile.TemporaryDirectory() as folder:
        for step in (1, 2):  # the first also imports and makes folders
            writer = checkpoint.Checkpoints(Path(folder) / "checkpoints", keep=2, permanent=0)
            start = time.perf_counter()
            writer.save(step, state, {})
            blocking = time.perf_counter() - start
            writer.close()
            written = time.perf_counter() - start
        start = time.perf_counter()
        jax.block_until_ready(checkpoint.restore(Path(folder) / "checkpoints" / "2", program.state_shape)[0].params)
        restored = time.perf_counter() - start
        print(f"checkpoint of {size / 1e6:.0f} MB: stops steps for {blocking:.2f} s, complete after {written:.2f} s")
        print(f"restored in {restored:.2f} s")
        for name in ("first start", "start with kept compilations", "and once more"):
            seconds = _start(Path(folder) / "run")
            print(f"{name}: {seconds:.1f} s from the command to the first step")


def _start(workdir: Path) -> float:
    """Starts ./run.sh's own run, stops it once it steps, and returns the seconds until its first new row."""
    rows = workdir / "metrics.jsonl"
    clock = workdir / "clock.json"

    def step() -> int:
        return json.loads(clock.read_text())["step"] if clock.exists() else 0

    before = step()
    command = [sys.executable, "-m", "vit_scaling.train", "--config=configs/smoke.py", f"--workdir={workdir}"]
    start = time.perf_counter()
    with subprocess.Popen(
        [*command, "--config.log.every.amount=1"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and (not rows.exists() or step() <= before):
            time.sleep(0.05)
        seconds = time.perf_counter() - start
        process.send_signal(signal.SIGTERM)
    if process.returncode:
        sys.exit(f"the run ended with code {process.returncode}")
    return seconds


def table(costs: goodput.Costs, rate: float, figure: Path | None) -> None:
    """Prints a row for each number of chips, and draws the share by the period."""
    print("| chips | hours between failures | best period, min (Young, Daly) | useful share | simulated | every hour |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for chips in CHIPS:
        mean = goodput.between_failures(chips, rate)
        best = goodput.best_period(costs, mean)
        young, daly = goodput.young(costs, mean) / 60, goodput.daly(costs, mean) / 60
        shares = [
            goodput.useful_share(best, costs, mean),
            goodput.simulate(best, costs, mean),
            goodput.useful_share(3600.0, costs, mean),
        ]
        percent = " | ".join(f"{100 * share:.2f}%" for share in shares)
        print(f"| {chips:,} | {mean / 3600:.1f} | {best / 60:.1f} ({young:.1f}, {daly:.1f}) | {percent} |")
    if figure is None:
        return
    _, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    periods = np.geomspace(30, 12 * 3600, 200)
    for chips, colour in zip(CHIPS, ("tab:green", "tab:blue", "tab:red"), strict=True):
        mean = goodput.between_failures(chips, rate)
        best = goodput.best_period(costs, mean)
        axes.plot(periods / 60, [100 * goodput.useful_share(p, costs, mean) for p in periods], color=colour)
        some = np.geomspace(60, 12 * 3600, 14)
        simulated = [100 * goodput.simulate(p, costs, mean) for p in some]
        axes.plot(some / 60, simulated, "o", color=colour, markersize=3)
        top = 100 * goodput.useful_share(best, costs, mean)
        axes.plot(
            best / 60,
            top,
            "*",
            color=colour,
            markersize=13,
            label=f"{chips:,} chips: {top:.1f}% at {best / 60:.0f} min",
        )
    axes.set(
        xscale="log", xlabel="minutes of steps between checkpoints", ylabel="useful share of time, %", ylim=(50, 100.5)
    )
    axes.set_xticks([1, 3, 10, 30, 100, 300], ["1", "3", "10", "30", "100", "300"])
    axes.grid(alpha=0.3)
    axes.legend(title="best (star); dots are simulated", loc="lower center")
    figure.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(figure, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "table"])
    parser.add_argument("--blocking", type=float, default=5.0, help="seconds for which a checkpoint stops the steps")
    parser.add_argument("--writing", type=float, default=60.0, help="seconds until it is complete after that")
    parser.add_argument("--restart", type=float, default=600.0, help="seconds from a failure to the next step")
    parser.add_argument("--rate", type=float, default=LLAMA_3, help="failures per chip and hour")
    parser.add_argument("--figure", type=Path, help="where to draw")
    arguments = parser.parse_args()
    if arguments.what == "measure":
        sys.path.insert(0, str(ROOT))
        measure()
    else:
        table(goodput.Costs(arguments.blocking, arguments.writing, arguments.restart), arguments.rate, arguments.figure)


if __name__ == "__main__":
    main()
