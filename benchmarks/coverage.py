"""Coverage of the laws' 95% intervals in simulation: coefficients, a prediction beyond the runs, the advised size.

    nice python -m benchmarks.coverage FOLDER [--trials=200]

Each trial draws errors of a known law with normal noise, fits the law, and notes which intervals hold the truth. Trials
that have run are kept in FOLDER/coverage.jsonl; the same command continues and prints the table.

Scenarios: error against compute (40 runs, all of them fitted), size and images (36 runs), repeated data (75 runs), each
with 1% noise; the same with two runs 30% too high (of repeated data not the longest ones, which the law would refuse as
overfitting); and 12 designs of size and images with 3 seeds each.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from vit_scaling import laws, names

LEVEL = 0.95
NOISE = 0.01
POWER = {"a": 0.6, "b": 0.35, "c": 0.1, "d": 0.5}
JOINT = {"e": 0.05, "A": 40.0, "alpha": 0.45, "B": 300.0, "beta": 0.4}
REPEATED = {"e": 0.05, "A": 40.0, "alpha": 0.45, "B": 300.0, "beta": 0.4, "C": 3.0, "gamma": 0.1, "delta": 0.35}


def power(x):
    return POWER["c"] + POWER["a"] * (x + POWER["d"]) ** -POWER["b"]


def joint(n, t):
    return 0.05 + 40 * n**-0.45 + 300 * t**-0.4


def repeated(n, t, d):
    h = 40 * n**-0.45 + 300 * t**-0.4 + 3 * n**0.1 * d**-0.35
    return 0.05 + 0.85 * h / (1 + h)


def noisy(error, rng, outliers, among=None):
    error = error * (1 + NOISE * rng.normal(size=len(error)))
    among = np.arange(len(error)) if among is None else np.flatnonzero(among)
    error[rng.choice(among, outliers, replace=False)] *= 1.3
    return error


def of_power(rng, outliers):
    x = np.exp(rng.uniform(np.log(0.2), np.log(3e4), 40))
    law = laws.fit(x, noisy(power(x), rng, outliers), frontier="all")
    low, high = law.band(3e5)
    return law, POWER, {"prediction": (low, power(3e5), high)}


def of_joint(rng, outliers, seeds=1, sizes=6):
    n = np.tile(np.repeat(np.geomspace(1e5, 1e8, sizes), 36 // sizes // seeds), seeds)
    t = np.tile(np.geomspace(1e6, 1e9, 36 // sizes // seeds), sizes * seeds)
    law = laws.fit_joint(n, t, noisy(joint(n, t), rng, outliers))
    low, high = law.band(1e9, 1e10)
    size = (40 * 0.45 / (300 * 0.4) * (1e18 / 6) ** 0.4) ** (1 / 0.85)
    best = law.optimum(1e18).params_interval
    return law, JOINT, {"prediction": (low, joint(1e9, 1e10), high), "advised size": (best.low, size, best.high)}


def of_repeated(rng, outliers):
    n = np.repeat(np.geomspace(1e5, 1e8, 5), 15)
    t = np.tile(np.repeat(np.geomspace(1e6, 1e9, 5), 3), 5)
    d = np.tile([1e5, 1e6, 1e7], 25)
    error = np.minimum(noisy(repeated(n, t, d), rng, outliers, among=t < 9e8), 0.89)
    law = laws.fit_joint(n, t, error, unique=d, chance=0.9)
    sizes = np.geomspace(1e6, 1e10, 40_001)
    size = sizes[np.argmin(repeated(sizes, 1e18 / (6 * sizes), 1e7))]
    (low, high), best = law.band(1e9, 1e10, 1e7), law.optimum(1e18, 1e7).params_interval
    truth = (low, repeated(1e9, 1e10, 1e7), high)
    return law, REPEATED, {"prediction": truth, "advised size": (best.low, size, best.high)}


SCENARIOS = {
    "error against compute": lambda rng: of_power(rng, 0),
    "error against compute, two outliers": lambda rng: of_power(rng, 2),
    "size and images": lambda rng: of_joint(rng, 0),
    "size and images, two outliers": lambda rng: of_joint(rng, 2),
    "size and images, 3 seeds of 12 runs": lambda rng: of_joint(rng, 0, seeds=3, sizes=4),
    "repeated data": lambda rng: of_repeated(rng, 0),
    "repeated data, two outliers": lambda rng: of_repeated(rng, 2),
}


def trial(scenario, seed):
    """Returns {quantity: whether its interval holds the truth} of one simulated table."""
    law, truth, others = SCENARIOS[scenario](np.random.default_rng([seed, list(SCENARIOS).index(scenario)]))
    inside = {name: law.interval(name).low <= value <= law.interval(name).high for name, value in truth.items()}
    return inside | {name: bool(low <= value <= high) for name, (low, value, high) in others.items()}


def table(lines):
    rows = []
    for scenario in SCENARIOS:
        own = [line["inside"] for line in lines if line["scenario"] == scenario]
        if own:
            held = {name: np.mean([each[name] for each in own]) for name in own[0]}
            coefficients = {name: share for name, share in held.items() if " " not in name and name != "prediction"}
            worst = min(coefficients, key=coefficients.get)
            best = max(coefficients, key=coefficients.get)
            spans = f"{coefficients[worst]:.1%} ({worst}) to {coefficients[best]:.1%} ({best})"
            advised = f"{held['advised size']:.1%}" if "advised size" in held else ""
            rows.append((scenario, len(own), spans, f"{held['prediction']:.1%}", advised))
    return names.render_table(("scenario", "trials", "coefficients", "prediction", "advised size"), rows, markdown=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trials", type=int, default=200)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = arguments.folder / "coverage.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(line["scenario"], line["seed"]) for line in lines}
    with path.open("a") as file:
        for seed in range(arguments.trials):
            for scenario in SCENARIOS:
                if (scenario, seed) not in done:
                    lines.append({"scenario": scenario, "seed": seed, "inside": trial(scenario, seed)})
                    print(json.dumps(lines[-1]), file=file, flush=True)
    print(table(lines))


if __name__ == "__main__":
    main()
