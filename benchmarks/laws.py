"""Exams for the laws on published measurements. Each takes the path of a file; the files are public.

    python -m benchmarks.laws curves FILE.csv       # columns task, model, examples_seen, error, training
    python -m benchmarks.laws chinchilla FILE.csv   # columns params, training_flops, loss
    python -m benchmarks.laws jft FILE.csv          # columns tpuv3_core_days, inet10_err, inet5_err, ft_err_fig
    python -m benchmarks.laws repeated FILE.csv     # columns params, images, unique, error, or those of the jft file

curves: few-shot error of vision models against images seen (Alabdulmohsin, Neyshabur and Zhai, arXiv 2209.06640). Each
law is fitted to the rows with training = 1 and judged by the root mean square of log predicted error minus log error on
the rest. M1, M2 and M4 are that paper's laws, fitted here by least squares of log errors from several starts.

chinchilla: the points read off figure 4 of arXiv 2203.15556 by Besiroglu et al. (arXiv 2404.10102), whose fit leaves
the five largest losses out, as is done here. Published: their coefficients with 95% intervals.

jft: the runs of Scaling Vision Transformers (arXiv 2106.04560, figure 2): the law of the frontier beside the printed
one, and how it extrapolates.

repeated: runs that saw images repeatedly. Three laws are fitted without some runs and judged by those: that of repeated
data (arXiv 2605.09189), the same without a limit and with a penalty that grows with repetition, e + A N^-alpha +
B T^-beta + C N^gamma (T / D)^delta (after the idea of arXiv 2605.01640), and E(N, T), which ignores D.
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
# Printed in figures 2 and 9 of arXiv 2106.04560: a, b, c, d of the error as a fraction.
PRINTED = {
    "inet10_err": (0.63, 0.32, 0.12, 0.52),
    "inet5_err": (0.68, 0.32, 0.14, 0.67),
    "ft_err_fig": (0.26, 0.35, 0.09, 0.01),
}
# arXiv 2404.10102: value and 95% interval.
CHINCHILLA = {
    "A": (482.0, 285, 744),
    "B": (2085.0, 1042, 5810),
    "e": (1.817, 1.769, 1.871),
    "alpha": (0.348, 0.317, 0.373),
    "beta": (0.366, 0.331, 0.415),
}


def main(argv):
    exams = {"curves": curves, "chinchilla": chinchilla, "jft": jft, "repeated": repeated_data}
    if len(argv) != 3 or argv[1] not in exams or not Path(argv[2]).is_file():
        sys.exit(f"usage: python -m benchmarks.laws {'|'.join(exams)} FILE.csv")
    with open(argv[2]) as file:
        rows = list(csv.DictReader(file))
    print(exams[argv[1]](rows))


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


def jft(rows):
    """Returns a table: the fitted law of each error beside the printed one, and its extrapolation."""
    lines = []
    for column, printed in PRINTED.items():
        own = [row for row in rows if row[column]]
        x = np.array([float(row["tpuv3_core_days"]) for row in own])
        y = np.array([float(row[column]) / 100 for row in own])
        law = power_law.fit(x, y)
        a, b, c, d = printed
        span = np.geomspace(law.compute[0], law.compute[-1], 200)
        apart = np.abs(c + a * (span + d) ** -b - law.predict(span)).max()
        half = power_law.extrapolate(x, y, up_to=np.sqrt(x.min() * x.max()))
        ours = ", ".join(f"{getattr(law, name):.3f}" for name in "abcd")
        misses = (f"{100 * each.mean_error:+.2f}, {100 * each.max_error:.2f}" for each in (law.extrapolation, half))
        lines.append((column, len(own), ours, ", ".join(map(str, printed)), f"{100 * apart:.2f}", *misses))
    header = ("error", "runs", "our a, b, c, d", "printed", "farthest apart, points")
    header += ("last fifth: mean miss, largest", "upper half of log compute")
    return names.render_table(header, lines)


def repeated_data(rows):
    """Returns a table: error of prediction of each law for some held-out sets of runs."""
    alike = (("params", "params_M"), ("images", "images_seen"), ("unique", "data_images"), ("error", "inet10_err"))
    keys = [next(name for name in pair if name in rows[0]) for pair in alike]
    n, t, d, y = np.array([[float(row[key]) for key in keys] for row in rows if row[keys[3]]]).T
    y = y / 100 if np.max(y) > 1 else y
    chance = 0.999 if "inet10_err" in rows[0] else 0.9
    overfit = np.array([np.any((n == n[i]) & (d == d[i]) & (t < t[i]) & (y < y[i] / 1.05)) for i in range(len(y))])
    sets = {
        "the longest runs": t == t.max(),
        "the two longest": t >= np.unique(t)[-2],
        "the largest size": n == n.max(),
        "the most different images": d == d.max(),
        "every fifth run": np.arange(len(y)) % 5 == 4,
    }
    kinds = {"repeated data": bounded_law, "additive penalty": additive_law, "E(N, T)": plain_law}
    lines = []
    for name, held in sets.items():
        seen, held = ~held & ~overfit, held & ~overfit
        if len(np.unique(d[seen])) < 2 or len(np.unique(n[seen])) < 3:
            continue
        misses = []
        for law in kinds.values():
            predicted = law(n[seen], t[seen], d[seen], y[seen], chance)(n[held], t[held], d[held])
            misses.append(f"{np.sqrt(np.mean(np.log(predicted / y[held]) ** 2)):.3f}")
        lines.append((name, int(held.sum()), *misses))
    left = f"{overfit.sum()} of {len(y)} runs left out: the error had been 5% lower after fewer images\n"
    return left + names.render_table(("held out", "runs", *kinds), lines)


def bounded_law(n, t, d, y, chance):
    return joint.fit(n, t, y, unique=d, chance=chance, bootstrap=2).predict


def plain_law(n, t, d, y, chance):
    law = joint.fit(n, t, y, bootstrap=2)
    return lambda n, t, d: law.predict(n, t)


def additive_law(n, t, d, y, chance):
    units = [np.exp(np.log(each).mean()) for each in (n, t, d)]

    def law(p, n, t, d):
        e, a, alpha, b, beta, c, gamma, delta = np.exp(p)
        n, t, repeats = n / units[0], t / units[1], (t / units[1]) / (d / units[2])
        return e + a * n**-alpha + b * t**-beta + c * n**gamma * repeats**delta

    starts = [
        np.log([y.min() / 2, scale, alpha, scale, beta, scale, 0.1, delta])
        for scale in (0.03, 0.2) for alpha in (0.2, 0.7) for beta in (0.2, 0.7) for delta in (0.1, 0.5)
    ]  # fmt: skip
    fits = [
        least_squares(lambda p: law(p, n, t, d) / y - 1, start, bounds=(-20, 3), loss="soft_l1", f_scale=0.1)
        for start in starts
    ]
    best = min(fits, key=lambda fit: fit.cost).x
    return lambda n, t, d: law(best, n, t, d)


if __name__ == "__main__":
    main(sys.argv)
