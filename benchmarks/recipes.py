"""Recipes compared on the built-in digits at equal budgets: optimizers, and training with and without patch dropout.

    nice python -m benchmarks.recipes FOLDER [--images=10000]

A ViT of depth 3 and width 32 sees so many images in batches of 50, with warmup and a linear decay. Each learning rate
trains three seeds. The rates start with three, a factor of two apart, and the grid grows until the best one, by the
mean error on the 500 validation digits, has a worse one on either side; the table gives the mean and the standard
deviation over the seeds of its error on the 500 test digits. Patch dropout of one half sees more images, for the same
training FLOPs. Finished runs are kept in FOLDER/recipes.jsonl; the same command continues and prints the table.
"""

import argparse
import dataclasses
import functools
import json
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_scaling import flops, models, names
from vit_scaling.data.mixing import to_float
from vit_scaling.data.sources import SourceConfig, open_source
from vit_scaling.models import vit
from vit_scaling.optim import optimizer, schedule
from vit_scaling.optim.schedule import Duration, ScheduleConfig

BATCH, SEEDS = 50, (0, 1, 2)
MODEL = vit.ViTConfig(width=32, depth=3, mlp=128, heads=2, patch=(7, 7), pool="map", remat="none")
# The middle one of the first three learning rates.
START = {"adafactor": 8e-3, "adam": 8e-3, "muon": 8e-3, "lion": 8e-4, "lamb": 2e-2}
RECIPES = {name: (name, 0.0) for name in START} | {"adafactor, half of the patches": ("adafactor", 0.5)}


@functools.cache
def digits(split):
    """Returns the images (N, 28, 28, 3) and the labels (N,) of a split."""
    source = open_source(SourceConfig("builtin", "mnist", split))
    rows = [source[i] for i in range(len(source))]
    grey = np.stack([row["image"] for row in rows])
    return np.repeat(grey.reshape(-1, 28, 28, 1), 3, axis=3), np.array([row["label"] for row in rows])


class Trainer:
    """A network and an optimizer, compiled once; the learning rate and the seed are arguments."""

    def __init__(self, config, optimizer_name, steps):
        self.splits = {split: digits(split) for split in ("train", "validation", "test")}
        self.steps = steps
        optim = optimizer.OptimConfig(name=optimizer_name, weight_decay=0.03, head_weight_decay=0.03)
        multiplier = schedule.create(ScheduleConfig(kind="linear", warmup=Duration(20), cooldown=Duration(0)), steps)
        build = lambda key: models.build(config, image_size=(28, 28), num_classes=10, key=key)  # noqa: E731
        graph, shapes, _ = models.split(jax.eval_shape(build, jax.random.key(0)))
        update = optimizer.create(optim, shapes, models.width_ratio(config))

        def init(key):
            params = models.split(build(key))[1]
            return params, update.init(params)

        def step(state, number, batch, lr, key):
            def loss(params):
                logits = models.merge(graph, params, {})(to_float(batch[0], config.mean, config.std), key)
                return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

            value, grads = jax.value_and_grad(loss)(state[0])
            direction, inner = update.update(grads, state[1], state[0])
            return (jax.tree.map(lambda p, d: p - lr * multiplier(number) * d, state[0], direction), inner), value

        def predict(params, images):
            return models.merge(graph, params, {})(to_float(images, config.mean, config.std)).argmax(-1)

        self.init, self.predict = jax.jit(init), jax.jit(predict)
        self.step = jax.jit(step, donate_argnums=0)

    def train(self, lr, seed):
        """Returns the mean training loss of the last quarter of the steps, and the errors on the other two splits."""
        key = jax.random.key(seed)
        state, rng = self.init(key), np.random.default_rng(seed)
        images, labels = self.splits["train"]
        epochs = self.steps * BATCH // len(labels) + 1
        order = np.concatenate([rng.permutation(len(labels)) for _ in range(epochs)])
        losses = []
        for number in range(self.steps):
            rows = order[number * BATCH : (number + 1) * BATCH]
            batch = jnp.asarray(images[rows]), jnp.asarray(labels[rows])
            state, loss = self.step(state, jnp.int32(number), batch, jnp.float32(lr), jax.random.fold_in(key, number))
            losses.append(loss)
        return {"steps": self.steps, "loss": float(np.mean(losses[-(self.steps // 4) :]))} | {
            split: float(np.mean(np.asarray(self.predict(state[0], self.splits[split][0])) != self.splits[split][1]))
            for split in ("validation", "test")
        }


class Records:
    """Finished runs, one line of JSON each, so that the command can be stopped and started again."""

    def __init__(self, path):
        self.path, self.trainers = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def run(self, recipe, make_trainer, lr, seed):
        """Returns what a run measured: read back, or from a trainer that is made for the recipe's first new run."""
        wanted = {"recipe": recipe, "lr": lr, "seed": seed}
        for line in self.lines:
            if wanted.items() <= line.items():
                return line
        if recipe not in self.trainers:
            self.trainers = {recipe: make_trainer()}
        self.lines.append(wanted | self.trainers[recipe].train(lr, seed))
        with self.path.open("a") as file:
            print(json.dumps(self.lines[-1]), file=file)
        return self.lines[-1]


def enclosed_best(value, start):
    """Returns the grid's values by rate, and the rate with the least, which lies at neither end."""
    found = {lr: value(lr) for lr in (start / 2, start, start * 2)}
    while (best := min(found, key=found.get)) in (min(found), max(found)):
        new = best / 2 if best == min(found) else best * 2
        found[new] = value(new)
    return dict(sorted(found.items())), best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=10_000)
    arguments = parser.parse_args()
    records = Records(arguments.folder / "recipes.jsonl")
    rows = []
    for recipe, (name, dropped) in RECIPES.items():
        config = dataclasses.replace(MODEL, patch_dropout=dropped)
        cost = [flops.count(each, image_size=(28, 28), num_classes=10).train_flops for each in (MODEL, config)]
        steps = round(arguments.images / BATCH * cost[0] / cost[1])

        def results(lr, recipe=recipe, config=config, name=name, steps=steps):
            return [records.run(recipe, lambda: Trainer(config, name, steps), lr, seed) for seed in SEEDS]

        tried, best = enclosed_best(lambda lr: statistics.mean(run["validation"] for run in results(lr)), START[name])
        errors = [100 * run["test"] for run in results(best)]
        spread = f"{statistics.mean(errors):.1f} ± {statistics.stdev(errors):.1f}"
        rows.append((recipe, f"{min(tried):g} to {max(tried):g}", f"{best:g}", f"{steps * BATCH:,}", spread))
    titles = ("recipe", "learning rates tried", "chosen", "images seen", "test error, %")
    print(names.render_table(titles, rows, markdown=True))


if __name__ == "__main__":
    main()
