"""Time of a Swin training step: this package, transformers under torch in the same run, and the cost of the shift.

    python -m venv reference
    reference/bin/pip install torch==2.13.0 transformers==5.23.0
    python -m benchmarks.swin --reference=reference/bin/python

One step is forward and backward: cross-entropy of random images and labels, float32, no drop path. Each side runs in a
process of its own, and the processes alternate. Reported: the fastest of all repetitions. On a machine with other work,
compare CPU seconds, which count all threads.
"""

import argparse
import json
import subprocess
import sys
import time

SIDES = {1: 224, 2: 256}
WIDTH, DEPTHS, HEADS, CLASSES = 96, (2, 2, 6, 2), (3, 6, 12, 24), 1000


def fastest(step, repetitions):
    """Returns the least (seconds, CPU seconds of all threads) of a step."""
    seconds, cpu_seconds = [], []
    for _ in range(repetitions):
        start, cpu_start = time.perf_counter(), time.process_time()
        step()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return min(seconds), min(cpu_seconds)


def ours(version, batch, repetitions, shifted):
    import jax
    import jax.numpy as jnp

    from vit_scaling import models
    from vit_scaling.models import swin

    side = SIDES[version]
    config = swin.variant("T" if version == 1 else "v2-T", drop_path=0.0, shifted=shifted)
    build = lambda key: models.build(config, image_size=(side, side), num_classes=CLASSES, key=key)  # noqa: E731
    graphdef, _, _ = models.split(jax.eval_shape(build, jax.random.key(0)))
    parameters = jax.jit(lambda key: models.split(build(key))[1])(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (batch, side, side, 3))
    labels = jax.random.randint(jax.random.key(2), (batch,), 0, CLASSES)

    def loss(parameters, images, labels):
        log_probabilities = jax.nn.log_softmax(models.merge(graphdef, parameters, {})(images))
        return -jnp.mean(jnp.take_along_axis(log_probabilities, labels[:, None], axis=1))

    step = jax.jit(jax.value_and_grad(loss))
    run = lambda: jax.block_until_ready(step(parameters, images, labels))  # noqa: E731
    run()
    return fastest(run, repetitions)


def theirs(version, batch, repetitions):
    import torch
    import transformers

    side = SIDES[version]
    fields = {"image_size": side, "embed_dim": WIDTH, "depths": DEPTHS, "num_heads": HEADS, "num_labels": CLASSES}
    fields |= {"window_size": {1: 7, 2: 8}[version], "drop_path_rate": 0.0}
    if version == 1:
        model = transformers.SwinForImageClassification(transformers.SwinConfig(**fields))
    else:
        model = transformers.Swinv2ForImageClassification(transformers.Swinv2Config(**fields))
    model.train()
    images, labels = torch.randn(batch, 3, side, side), torch.randint(0, CLASSES, (batch,))

    def run():
        model.zero_grad()
        model(images, labels=labels).loss.backward()

    run()
    return fastest(run, repetitions)


def child(python, side, arguments):
    command = [python, __file__, "--batch", str(arguments.batch), "--repetitions", str(arguments.repetitions)]
    output = subprocess.run([*command, "--side", json.dumps(side)], check=True, capture_output=True, text=True)
    return json.loads(output.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", help="a Python that has torch and transformers")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=3, help="in each process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side, in turns")
    parser.add_argument("--versions", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        name, version = json.loads(arguments.side)
        run = {"ours": lambda *a: ours(*a, True), "unshifted": lambda *a: ours(*a, False), "theirs": theirs}[name]
        print(json.dumps(run(version, arguments.batch, arguments.repetitions)))
        return
    sides = {"ours": sys.executable, "unshifted": sys.executable}
    sides |= {"theirs": arguments.reference} if arguments.reference else {}
    for version in arguments.versions:
        best = {name: (float("inf"), float("inf")) for name in sides}
        for _ in range(arguments.rounds):
            for name, python in sides.items():
                best[name] = tuple(map(min, best[name], child(python, (name, version), arguments)))
        print(f"Swin V{version}-T, {SIDES[version]} pixels, batch {arguments.batch}, forward and backward")
        for name, (seconds, cpu_seconds) in best.items():
            print(f"  {name:10s} {seconds:7.2f} s, {cpu_seconds:7.2f} CPU s, {arguments.batch / seconds:6.2f} images/s")
        shift = [100 * (shifted / plain - 1) for shifted, plain in zip(best["ours"], best["unshifted"], strict=True)]
        print(f"  the shift costs {shift[0]:+.1f}% of the time, {shift[1]:+.1f}% of the CPU time")
        if "theirs" in best:
            ratio = [theirs / ours for theirs, ours in zip(best["theirs"], best["ours"], strict=True)]
            print(f"  transformers under torch takes {ratio[0]:.2f} times our time, {ratio[1]:.2f} times our CPU time")


if __name__ == "__main__":
    main()
