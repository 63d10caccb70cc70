"""Exams for the laws on published measurements. Each takes the path of a file; the files are public.

    python -m benchmarks.laws curves FILE.csv       # columns task, model, examples_seen, error, training
    python -m benchmarks.laws chinchilla FILE.csv   # columns params, training_flops, loss

curves: few-shot error of vision models against images seen (Alabdulmohsin, Neyshabur and Zhai, arXiv 2209.06640). Each
law is fitted to the rows with training = 1 and judged by the root mean square of log predicted error minus log error on
the rest. M1, M2 and M4 are that paper's laws, fitted here by least squares of log errors from several starts.

chinchilla: the points read off figure 4 of arXiv 2203.15556 by Besiroglu et al. (arXiv 2404.10102), whose fit leaves
the five largest losses out, as is done here. Published: their coefficients with 95% intervals.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from vit_scaling import names
from vit_scaling.laws import curve, joint, power_law

# Error of guessing, by the first part of a task's name: Birds-200, CIFAR-100, Caltech-101, ImageNet.
CHANCE = {"bird": 1 - 1 / 200, "c": 1 - 1 / 100, "cal": 1 - 1 / 102, "inet": 1 - 1 / 1000}
# arXiv 2404.10102: value and 95% interval.
CHINCHILLA = {
    "A": (482.0, 285, 744),
    "B": (2085.0, 1042, 5810),
    "e": (1.817, 1.769, 1.871),
    "alpha": (0.348, 0.317, 0.373),
    "beta": (0.366, 0.331, 0.415),
}


def main(argv):
    if len(argv) != 3 or argv[1] not in ("curves", "chinchilla") or not Path(argv[2]).is_file():
        sys.exit("usage: python -m benchmarks.laws curves|chinchilla FILE.csv")
    with open(argv[2]) as file:
        rows = list(csv.DictReader(file))
    print({"curves": curves, "chinchilla": chinchilla}[argv[1]](rows))


def curves(rows):
    """Returns a table: mean and median of the error of prediction for each law."""
    points = defaultdict(list)
    for row in rows:
        key = row["task"], row["model"]
        points[key].append((float(row["examples_seen"]), min(float(row["error"]), 1.0), int(row["training"])))
    laws = {"M1": m1, "M2": m2, "M4": m4, "laws.fit": saturating, "laws.fit_curve": learning_curve}
    misses = {name: [] for name in laws}
    for (task, _), own in points.items():
        x, y, training = np.array(sorted(own)).T
        seen = training == 1
        for name, law in laws.items():
            predicted = law(x[seen], y[seen], CHANCE[task.split("_")[0]])(x[~seen])
            misses[name].append(np.sqrt(np.mean(np.log(predicted / y[~seen]) ** 2)))
    lines = [
        (name, f"{np.mean(miss):.4f}", f"{np.median(miss):.4f}", f"{np.mean(np.array(miss) < misses['M2']):.0%}")
        for name, miss in misses.items()
    ]
    return names.render_table(("law", "mean", "median", "better than M2"), lines)


def m1(x, y, chance):
    slope, intercept = np.polyfit(np.log(x), np.log(y), 1)
    return lambda to: np.exp(intercept + slope * np.log(to))


def m2(x, y, chance):
    law = lambda p, to: p[2] + np.exp(p[0]) * (to / x.max()) ** -p[1]  # noqa: E731
    starts = [(np.log(y.min()), b, c * y.min()) for b in (0.2, 0.7) for c in (0.01, 0.5)]
    return log_squares(law, x, y, starts, (-12, 1e-3, 0), (5, 5, y.min()))


def m4(x, y, chance):
    """(E - c) / (chance - E)^alpha = beta x^-b, solved for E by bisection; the chance level is fitted too."""

    def law(p, to):
        h = np.exp(p[0]) * (to / x.max()) ** -p[1]
        low, high = np.full(len(to), p[2]), np.full(len(to), p[4])
        for _ in range(45):
            middle = (low + high) / 2
            above = middle - p[2] > h * np.maximum(p[4] - middle, 1e-300) ** p[3]
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        return np.maximum((low + high) / 2, 1e-12)

    starts = [(-1, b, c * y.min(), a, chance) for b in (0.3, 0.8) for c in (0.1, 0.7) for a in (0.5, 2.0)]
    lower, upper = (-12, 1e-3, 0, 0, max(y.max(), 0.9 * chance) - 1e-6), (9, 5, y.min(), 10, 1 + 1e-6)
    return log_squares(law, x, y, starts, lower, upper)


def log_squares(law, x, y, starts, lower, upper):
    """Returns the law with the coefficients of least squared difference of log errors."""
    lower, upper = np.array(lower, float), np.array(upper, float)
    fits = [
        least_squares(
            lambda p: np.log(law(p, x) / y),
            np.clip(start, lower + 1e-9, upper - 1e-9),
            bounds=(lower, upper),
            max_nfev=150,
        )
        for start in starts
    ]
    best = min(fits, key=lambda fit: fit.cost).x
    return lambda to: law(best, to)


def saturating(x, y, chance):
    return power_law.fit(x, y, frontier="all", bootstrap=2).predict


def learning_curve(x, y, chance):
    return curve.fit(x, y, bootstrap=2).predict


def chinchilla(rows):
    """Returns a table: each coefficient of E = e + A N^-alpha + B D^-beta beside the published one."""
    n, compute, loss = np.array([[float(row[c]) for c in ("params", "training_flops", "loss")] for row in rows]).T
    keep = np.sort(np.argsort(-loss, kind="stable")[5:])
    n, compute, loss = n[keep], compute[keep], loss[keep]
    law = joint.fit(n, compute / (6 * n), loss)
    lines = []
    for name, (value, low, high) in CHINCHILLA.items():
        ours, (from_, to) = getattr(law, name), law.interval(name)
        verdict = "inside" if low <= ours <= high else "outside"
        spans = f"{from_:.4g} to {to:.4g}", f"{low:g} to {high:g}"
        lines.append(
            (name, f"{ours:.4g}", spans[0], f"{value:g}", *spans[1:], verdict, f"{(to - from_) / (high - low):.2f}")
        )
    header = ("coefficient", "ours", "our 95% interval", "published", "its interval", "verdict", "ratio of widths")
    return f"{len(loss)} points\n" + names.render_table(header, lines)


if __name__ == "__main__":
    main(sys.argv)
