"""Recipes compared on the built-in digits at equal budgets: optimizers, and training with and without patch dropout.

    nice python -m benchmarks.recipes FOLDER [--images=10000] [--seeds=3]

A ViT of depth 3 and width 48 (121,498 parameters with its MAP head) sees so many images in batches of 50, with warmup
and a linear decay. The learning rate of each recipe is the best of three for seed 0 by the 500 validation digits; the
test digits are then read once for each of the seeds 1, 2, ... Finished runs are kept in FOLDER/recipes.jsonl; the
same command continues and prints the table. Patch dropout of one half sees more images, for the same training FLOPs.
"""

import argparse
import dataclasses
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

BATCH = 50
MODEL = vit.ViTConfig(width=48, depth=3, mlp=192, heads=3, patch=(7, 7), pool="map", remat="none")
# Three learning rates around the usual one of each optimizer.
RATES = {
    "adafactor": (1e-3, 2e-3, 4e-3),
    "adam": (1e-3, 2e-3, 4e-3),
    "muon": (1e-3, 2e-3, 4e-3),
    "lion": (1e-4, 2e-4, 4e-4),
    "lamb": (5e-3, 1e-2, 2e-2),
}
RECIPES = {name: (name, 0.0) for name in RATES} | {"adafactor, half of the patches": ("adafactor", 0.5)}


def data(split):
    source = open_source(SourceConfig("builtin", "mnist", split))
    rows = [source[i] for i in range(len(source))]
    grey = np.stack([row["image"] for row in rows])
    return np.repeat(grey.reshape(-1, 28, 28, 1), 3, axis=3), np.array([row["label"] for row in rows])


class Trainer:
    """One recipe, compiled once; the learning rate and the seed are arguments."""

    def __init__(self, optimizer_name, patch_dropout, images):
        self.config = dataclasses.replace(MODEL, patch_dropout=patch_dropout)
        cost = [flops.count(each, image_size=(28, 28), num_classes=10).train_flops for each in (MODEL, self.config)]
        self.steps = round(images / BATCH * cost[0] / cost[1])
        optim = optimizer.OptimConfig(name=optimizer_name, weight_decay=0.03, head_weight_decay=0.03)
        multiplier = schedule.create(
            ScheduleConfig(kind="linear", warmup=Duration(20), cooldown=Duration(0)), self.steps
        )
        build = lambda key: models.build(self.config, image_size=(28, 28), num_classes=10, key=key)  # noqa: E731
        graph, shapes, _ = models.split(jax.eval_shape(build, jax.random.key(0)))
        update = optimizer.create(optim, shapes)

        def init(key):
            params = models.split(build(key))[1]
            return params, update.init(params)

        def step(state, number, batch, lr, key):
            def loss(params):
                logits = models.merge(graph, params, {})(to_float(batch[0], MODEL.mean, MODEL.std), key)
                return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

            direction, inner = update.update(jax.grad(loss)(state[0]), state[1], state[0])
            return jax.tree.map(lambda p, d: p - lr * multiplier(number) * d, state[0], direction), inner

        def predict(params, images):
            return models.merge(graph, params, {})(to_float(images, MODEL.mean, MODEL.std)).argmax(-1)

        self.init, self.predict = jax.jit(init), jax.jit(predict)
        self.step = jax.jit(step, donate_argnums=0)

    def error(self, lr, seed, training, judged):
        key = jax.random.key(seed)
        state, rng = self.init(key), np.random.default_rng(seed)
        order = np.concatenate([rng.permutation(len(training[0])) for _ in range(self.steps * BATCH // 4000 + 1)])
        for number in range(self.steps):
            rows = order[number * BATCH : (number + 1) * BATCH]
            batch = tuple(jnp.asarray(column[rows]) for column in training)
            state = self.step(state, jnp.int32(number), batch, jnp.float32(lr), jax.random.fold_in(key, number))
        return float(np.mean(np.asarray(self.predict(state[0], jnp.asarray(judged[0]))) != judged[1]))


def table(lines, seeds):
    rows = []
    for recipe in RECIPES:
        own = [line for line in lines if line["recipe"] == recipe and line["split"] == "test"]
        if len(own) == seeds:
            errors = [100 * line["error"] for line in own]
            spread = f"{statistics.mean(errors):.1f} ± {statistics.stdev(errors):.1f}"
            rows.append((recipe, f"{own[0]['lr']:g}", own[0]["steps"] * BATCH, spread))
    return names.render_table(("recipe", "learning rate", "images seen", "test error, %"), rows, markdown=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = arguments.folder / "recipes.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    training, validation, test = (data(split) for split in ("train", "validation", "test"))
    for recipe, (name, dropped) in RECIPES.items():
        trainer = None

        def measured(split, lr, seed, judged, recipe=recipe, name=name, dropped=dropped):
            nonlocal trainer
            wanted = {"recipe": recipe, "split": split, "lr": lr, "seed": seed}
            for line in lines:
                if wanted.items() <= line.items():
                    return line["error"]
            trainer = trainer or Trainer(name, dropped, arguments.images)
            lines.append(wanted | {"steps": trainer.steps, "error": trainer.error(lr, seed, training, judged)})
            with path.open("a") as file:
                print(json.dumps(lines[-1]), file=file)
            return lines[-1]["error"]

        errors = {lr: measured("validation", lr, 0, validation) for lr in RATES[name]}
        best = min(errors, key=errors.get)
        for seed in range(1, arguments.seeds + 1):
            measured("test", best, seed, test)
    print(table(lines, arguments.seeds))


if __name__ == "__main__":
    main()
