"""Plans of eight models for four machines, each at its paper's batch: the tables and the picture of docs/plans.md.

    python benchmarks/plans.py --output=plans.json                    # compiles for TPUs, on any machine with libtpu
    python benchmarks/plans.py --output=plans.json --table            # prints the tables of what is there

Every plan is written as it is made; called again, those that are there are kept.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX: no device is needed

from vit_scaling import config as config_lib
from vit_scaling.config import Config
from vit_scaling.parallel.chips import GIB
from vit_scaling.planner import machines, search
from vit_scaling.planner import plan as plan_lib

CONFIGS = Path(__file__).parent.parent / "configs"
MACHINES = (("v5e:4x4", 1), ("v5e:16x16", 1), ("v5p:8x8x8", 1), ("v5e:16x16", 2))

# Name, batch of its paper, classes, and where the config is from. B, L and So400m: Scaling ViT's recipe at 4,096; g and
# G grew to 16,384 and 32,768 there; ViT-22B: 65,536 (arXiv 2302.05442, section 3); Swin-L on ImageNet-22k: 4,096
# (arXiv 2103.14030, appendix A2.2); SASA: 4,096 (arXiv 1906.05909, appendix).
MODELS = {
    "ViT-B/16": (4096, 1000, "vit_jft", "B/16"),
    "ViT-L/16": (4096, 1000, "vit_jft", "L/16"),
    "So400m/14": (4096, 1000, "vit_jft", "So400m/14"),
    "ViT-g/14": (16384, 29593, "vit_jft", "g/14"),
    "ViT-G/14": (32768, 29593, "vit_jft", "G/14"),
    "ViT-22B/14": (65536, 29593, "vit_jft", "22B/14"),
    "Swin-L": (4096, 21841, "swin_imagenet", "L"),
    "SASA-50": (4096, 1000, "sasa_imagenet", "50"),
}

# The incumbent on the same work: GiB per chip at its peak, compiled at the same level; None: it did not fit.
INCUMBENT = (
    ("B/16", "v5e:4x4", 1024, 1000, 4.43),
    ("L/16", "v5e:4x4", 1024, 1000, 6.51),
    ("So400m/14", "v5e:4x4", 1024, 1000, 8.64),
    ("B/16", "v5e:4x4", 4096, 1000, None),
    ("B/16", "v5e:16x16", 4096, 1000, None),
    ("L/16", "v5e:16x16", 4096, 1000, None),
    ("G/14", "v5e:16x16", 4096, 29593, 10.56),
    ("G/14", "v5p:8x8x8", 4096, 29593, 12.37),
)
WEAK = (("v5e:2x4", 8), ("v5e:4x4", 16), ("v5e:8x8", 64), ("v5e:16x16", 256), ("v5p:8x8x8", 512))


def experiment(file: str, variant: str, batch_size: int) -> Config:
    """Returns a config of configs/ at this batch, its durations in steps."""
    spec = importlib.util.spec_from_file_location(file, CONFIGS / f"{file}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(variant)
    config.data.batch_size = batch_size
    if variant.startswith("22B"):
        options = {"parallel": True, "qk_norm": True, "qkv_bias": False, "norm_bias": False}
        config.model = dataclasses.replace(config.model, **options)
    return config_lib.resolve(config, 14_000_000)


def work():
    """Yields (key, function that makes the plans of it)."""
    for variant, topology, batch, classes, _ in INCUMBENT:
        yield (
            f"incumbent {variant} {topology} {batch}",
            lambda v=variant, t=topology, b=batch, c=classes: [
                plan_lib.make(experiment("vit_jft", v, b), machines.topology(t), num_classes=c)
            ],
        )
    for topology, devices in WEAK:
        yield (
            f"weak {devices}",
            lambda t=topology, d=devices: [
                plan_lib.make(experiment("vit_jft", "L/16", 16 * d), machines.topology(t), num_classes=1000)
            ],
        )
    for topology, _ in (("v5e:4x4", 16), ("v5e:8x8", 64), ("v5e:16x16", 256)):
        yield (
            f"g {topology}",
            lambda t=topology: [
                plan_lib.make(experiment("vit_jft", "g/14", 1024), machines.topology(t), num_classes=29593)
            ],
        )
    for name, (batch, classes, file, variant) in MODELS.items():
        for topology, slices in MACHINES:
            machine = machines.topology(topology, slices)
            yield (
                f"model {name} | {machine}",
                lambda f=file, v=variant, b=batch, m=machine, c=classes: search.search(
                    experiment(f, v, b), m, num_classes=c
                ),
            )


def tables(found: dict) -> str:
    lines = ["| model | batch | chip shape | ours, GiB per chip | incumbent, GiB per chip |", "|---|---|---|---|---|"]
    for variant, topology, batch, _, theirs in INCUMBENT:
        plans = found.get(f"incumbent {variant} {topology} {batch}")
        if plans:
            need = plans[0]["memory"]["needed"] / GIB if plans[0]["fits"] else None
            ours = "does not fit" if need is None else f"{need:.2f}"
            lines.append(f"| {variant} | {batch} | {topology} | {ours} | {theirs or 'does not fit'} |")
    lines += [
        "",
        "| model, batch | machine | mesh | microbatches | remat | GiB per chip | lower bound on the step "
        "| upper bound on MFU |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for key, plans in found.items():
        if not key.startswith("model"):
            continue
        best = plans[0]
        name, machine = key.removeprefix("model ").split(" | ")
        mesh = best["mesh"]
        shape = f"{mesh['replica']} x {mesh['data'] * mesh['fold']} x {mesh['model']}"
        head = f"| {name}, {best['batch_size']} | {machine} | {shape} | {best['accumulate']} | {best['remat']} |"
        if not best["fits"]:
            least = min((p for p in plans if p["short_by"]), key=lambda p: p["short_by"], default=None)
            short = f"short by {least['short_by'] / GIB:.1f} at least" if least else best["message"][:80]
            lines.append(f"{head} {short} | - | - |")
            continue
        limit, ms = best["bounds"]["limit"], 1e3 * best["bounds"]["step"]
        bound = f"{ms:,.{0 if ms > 100 else 1}f} ms, {limit}"
        lines.append(f"{head} {best['memory']['needed'] / GIB:.2f} | {bound} | {100 * best['mfu_ceiling']:.0f}% |")
    lines += [
        "",
        "| chips | batch | GFLOPs per chip | MB received by collectives, per chip | GiB per chip |",
        "|---|---|---|---|---|",
    ]
    for _, devices in WEAK:
        plans = found.get(f"weak {devices}")
        if plans:
            p = plans[0]
            wire = sum(m["ici"] + m["dcn"] for m in p["moved"]) / 1e6
            flops = p["executed_flops"] / devices / 1e9
            need = p["memory"]["needed"] / GIB
            lines.append(f"| {devices} | {p['batch_size']} | {flops:,.0f} | {wire:,.0f} | {need:.2f} |")
    lines += ["", "| ViT-g/14, batch 1,024 | state, MB per chip | in all, GiB per chip |", "|---|---|---|"]
    for topology in ("v5e:4x4", "v5e:8x8", "v5e:16x16"):
        plans = found.get(f"g {topology}")
        if plans and plans[0]["fits"]:
            memory = plans[0]["memory"]
            lines.append(f"| {topology} | {memory['arguments'] / 1e6:.1f} | {memory['needed'] / GIB:.3f} |")
    return "\n".join(lines)


def picture(found: dict, path: Path) -> None:
    """Draws what weak scaling costs per chip."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [(d, found[f"weak {d}"][0]) for _, d in WEAK if f"weak {d}" in found]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    count = [d for d, _ in rows]
    axes[0].plot(count, [p["executed_flops"] / d / 1e12 for d, p in rows], "o-")
    axes[0].set(ylabel="TFLOPs per chip and step", xlabel="chips")
    wire = [sum(m["ici"] + m["dcn"] for m in p["moved"]) / 1e9 for _, p in rows]
    axes[1].plot(count, wire, "o-", color="C1")
    axes[1].set(ylabel="GB received per chip and step", xlabel="chips")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(count, [str(c) for c in count])
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.suptitle("ViT-L/16, 16 images per chip, fully sharded: work is constant, communication bounded")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of all plans")
    parser.add_argument("--table", action="store_true", help="compile nothing; print the tables")
    parser.add_argument("--picture", type=Path, help="draw weak scaling into this PNG")
    parser.add_argument("--only", default="", help="only what begins so: incumbent, weak, g, model")
    arguments = parser.parse_args()
    found = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for key, make in work():
        if arguments.table or key in found or not key.startswith(arguments.only):
            continue
        start = time.perf_counter()
        try:
            found[key] = [plan_lib.to_dict(plan) for plan in make()]
        except ValueError as error:
            print(f"{key}: {error}", flush=True)
            continue
        print(f"{key}: {len(found[key])} plans in {time.perf_counter() - start:.0f} s", flush=True)
        arguments.output.write_text(json.dumps(found))
    print(tables(found))
    if arguments.picture:
        picture(found, arguments.picture)


if __name__ == "__main__":
    main()
