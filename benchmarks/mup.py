"""Does muP carry a learning rate over to wider networks? The coordinate check and a sweep, on the built-in digits.

    nice python -m benchmarks.mup FOLDER [--steps=100] [--seeds=1] [--optimizers=adam,adafactor,muon]

Coordinate check: the root mean square by which three steps change the tokens after the last block and the logits of 16
digits, at widths 16, 64 and 256, without muP and with a base width of 16.

Sweep: ViTs of depth 2 and widths 32, 64 and 128, without muP and with a base width of 32, each at learning rates a
factor of two apart: three at first, and more until the best, by the training loss of the last quarter of the steps
(the mean over the seeds), has a worse one on either side. Test errors at the widest: three seeds, with the rate that
is best at width 32. FOLDER/mup.jsonl keeps finished runs and the same command continues; FOLDER/mup.png shows all.
"""

import argparse
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks import recipes
from vit_scaling import models, names
from vit_scaling.models import vit
from vit_scaling.optim import optimizer

CHECKED, SWEPT = (16, 64, 256), (32, 64, 128)
CHECK_RATE, START = 5e-3, 8e-3


def network(width, base_width, *, depth, head_dim):
    sizes = {"width": width, "depth": depth, "mlp": 2 * width, "heads": width // head_dim, "patch": (14, 14)}
    return vit.ViTConfig(**sizes, pool="gap", base_width=base_width, remat="none")


def changes(images, labels, *, name, lr, width, base_width):
    """Returns the root mean square of what three steps change in the last block's tokens, and in the logits.

    Args:
        images: [16, 28, 28, 3] in [-1, 1].
        labels: [16].
        name: of the optimizer.
        lr: learning rate.
        width: of the network.
        base_width: of muP, or None without it.
    """
    config = network(width, base_width, depth=1, head_dim=8)
    build = lambda: models.build(config, image_size=(28, 28), num_classes=10, key=jax.random.key(0))  # noqa: E731
    graph, shapes, _ = models.split(jax.eval_shape(build))
    optim = optimizer.OptimConfig(name=name, weight_decay=0.0, head_weight_decay=0.0, moment_dtype="float32", clip=None)
    update = optimizer.create(optim, shapes, models.width_ratio(config))

    def step(carry, _):
        params, state = carry

        def loss(params):
            model = models.merge(graph, params, {})
            seen = model.encode(images), model(images)
            return optax.softmax_cross_entropy_with_integer_labels(seen[1], labels).mean(), seen

        grads, seen = jax.grad(loss, has_aux=True)(params)
        direction, state = update.update(grads, state, params)
        return (jax.tree.map(lambda p, d: p - lr * d, params, direction), state), seen

    @jax.jit
    def run():
        params = models.split(build())[1]
        _, seen = jax.lax.scan(step, (params, update.init(params)), None, length=4)
        return [jnp.sqrt(jnp.mean(jnp.square(x[3] - x[0]))) for x in seen]

    return [float(x) for x in run()]


class Check:
    """The coordinate check of one width, as a trainer of one run."""

    def __init__(self, name, width, base_width):
        self.fields = {"name": name, "width": width, "base_width": base_width}

    def train(self, lr, seed):
        del seed
        images, labels = (jnp.asarray(column[:16]) for column in recipes.digits("train"))
        tokens, logits = changes(images.astype(jnp.float32) / 127.5 - 1, labels, lr=lr, **self.fields)
        return {"tokens": tokens, "logits": logits}


def sweep(records, name, width, base_width, *, steps, seeds):
    """Returns {learning rate: mean training loss}, and the best rate."""
    config = network(width, base_width if width != base_width else None, depth=2, head_dim=16)
    kind = "muP" if config.base_width else "SP"

    def loss(lr):
        runs = (
            records.run(f"{name}, {kind}, width {width}", lambda: recipes.Trainer(config, name, steps), lr, seed)
            for seed in range(seeds)
        )
        return statistics.mean(run["loss"] for run in runs)

    return recipes.enclosed_best(loss, START)


def errors(records, name, width, base_width, lr, steps):
    config = network(width, base_width, depth=2, head_dim=16)
    recipe = f"{name}, {'muP' if base_width else 'SP'}, width {width}"
    runs = [
        records.run(recipe, lambda: recipes.Trainer(config, name, steps), lr, seed)["test"] for seed in recipes.SEEDS
    ]
    return f"{100 * statistics.mean(runs):.1f} ± {100 * statistics.stdev(runs):.1f}"


def _ticks(axis, places):
    axis.set_xlim(places[0] / 1.2, places[-1] * 1.2)
    axis.set_xticks(places, [f"{place:g}" for place in places], fontsize="small")
    axis.xaxis.set_minor_locator(NullLocator())


def plot(checks, sweeps):
    optimizers = list(dict.fromkeys(name for name, _, _ in checks))
    figure = Figure(figsize=(3.2 * len(optimizers), 7.6), layout="constrained")
    axes = figure.subplots(3, len(optimizers), squeeze=False)
    for column, name in enumerate(optimizers):
        for kind, style in (("SP", "--"), ("muP", "-")):
            for what, colour in (("tokens", "#33658a"), ("logits", "#b5651d")):
                values = [checks[name, kind, width][what] for width in CHECKED]
                axes[0, column].plot(CHECKED, values, style, marker="o", color=colour, label=f"{what}, {kind}")
            for width, colour in zip(SWEPT, ("#9ec5e8", "#33658a", "#14213d"), strict=True):
                losses, best = sweeps[name, kind, width]
                axis = axes[1 if kind == "SP" else 2, column]
                axis.plot(list(losses), list(losses.values()), marker=".", color=colour, label=f"width {width}")
                axis.plot(best, losses[best], "o", markersize=9, markerfacecolor="none", color=colour)
                axis.set(xscale="log", xlabel="learning rate", title=f"{name}, {kind}")
        axes[0, column].set(
            xscale="log", yscale="log", ylim=(0.02, 2), xlabel="width", title=f"{name}: change in 3 steps"
        )
        _ticks(axes[0, column], CHECKED)
        tried = [sweeps[name, kind, width][0] for kind in ("SP", "muP") for width in SWEPT]
        losses = [loss for one in tried for loss in one.values()]
        margin = 0.05 * (max(losses) - min(losses))
        for row in (1, 2):
            axes[row, column].set_ylim(min(losses) - margin, max(losses) + margin)
            _ticks(axes[row, column], sorted({lr for one in tried for lr in one}))
    axes[0, 0].set_ylabel("root mean square")
    axes[1, 0].set_ylabel("training loss")
    axes[2, 0].set_ylabel("training loss")
    axes[0, 0].legend(fontsize="small")
    axes[1, 0].legend(fontsize="small")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--optimizers", type=lambda text: text.split(","), default=["adam", "adafactor", "muon"])
    arguments = parser.parse_args()
    records = recipes.Records(arguments.folder / "mup.jsonl")
    checks, sweeps, rows = {}, {}, []
    for name in arguments.optimizers:
        for kind, base in (("SP", None), ("muP", CHECKED[0])):
            for width in CHECKED:
                make = lambda name=name, width=width, base=base: Check(name, width, base)  # noqa: E731
                checks[name, kind, width] = records.run(f"check: {name}, {kind}, width {width}", make, CHECK_RATE, 0)
        for kind, base in (("SP", None), ("muP", SWEPT[0])):
            for width in SWEPT:
                sweeps[name, kind, width] = sweep(
                    records, name, width, base, steps=arguments.steps, seeds=arguments.seeds
                )
            best = [sweeps[name, kind, width][1] for width in SWEPT]
            test = errors(records, name, SWEPT[-1], base, best[0], arguments.steps)
            rows.append((name, kind, *(f"{lr:g}" for lr in best), test))
    plot(checks, sweeps).savefig(arguments.folder / "mup.png", dpi=150)
    ratio = lambda name, kind, what: checks[name, kind, CHECKED[-1]][what] / checks[name, kind, CHECKED[0]][what]  # noqa: E731
    print(f"change in three steps at width {CHECKED[-1]} over that at width {CHECKED[0]}")
    table = [
        (name, kind, *(f"{ratio(name, kind, what):.2f}" for what in ("tokens", "logits")))
        for name in arguments.optimizers
        for kind in ("SP", "muP")
    ]
    print(names.render_table(("optimizer", "", "tokens", "logits"), table, markdown=True))
    best = [f"best rate, width {width}" for width in SWEPT]
    titles = ("optimizer", "", *best, f"test error at width {SWEPT[-1]} with the rate of width {SWEPT[0]}, %")
    print(names.render_table(titles, rows, markdown=True))


if __name__ == "__main__":
    main()
