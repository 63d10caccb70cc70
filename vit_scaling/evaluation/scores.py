"""Measured numbers as people read them: accuracy with its interval, a deviation beside its mean, shots in order."""

import math
import re
from collections.abc import Mapping, Sequence

SHOTS = re.compile(r"(\d+)shot(_std)?")
_PERCENT = ("accuracy", "top1", "top5", "mean_class_accuracy", "calibration_error", "mfu")
_COUNTS = ("examples", "left_out", "batch_size", "runs")


def interval(share: float, count: int) -> tuple[float, float]:
    """Returns Wilson's 95% interval of a share that `count` examples gave."""
    z = 1.959964
    centre, scale = share + z * z / (2 * count), 1 + z * z / count
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def lines(values: Mapping[str, float], examples: Mapping[str, int] | None = None) -> list[str]:
    """Returns one line for each set of numbers named "SET/NAME", in the order of the sets.

    Args:
        values: "validation/accuracy", "validation/loss", "fewshot/10shot", "fewshot/10shot_std", ...
        examples: how many each set has, by its name, for the interval of its accuracy.
    """
    groups: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        group, _, short = name.rpartition("/")
        groups.setdefault(group, {})[short] = value
    width = max(map(len, groups), default=0)
    return [
        f"{group:{width}s}  {', '.join(parts(found, (examples or {}).get(group.removesuffix('_ema'))))}"
        for group, found in groups.items()
    ]


def parts(values: Mapping[str, float], count: int | None = None) -> list[str]:
    """Returns the numbers of one set as words, shots last and in order."""
    found = [f"{name} {number(name, value, count)}" for name, value in values.items() if not SHOTS.fullmatch(name)]
    shots = sorted({int(match[1]) for name in values if (match := SHOTS.fullmatch(name))})
    for shot in shots:
        mean, deviation = values.get(f"{shot}shot", math.nan), values.get(f"{shot}shot_std")
        found.append(f"{shot}-shot {100 * mean:.2f}%" + ("" if deviation is None else f" ± {100 * deviation:.2f}"))
    return found


def number(name: str, value: float, count: int | None = None) -> str:
    """Returns one number in the form that its name asks for; with a count, an accuracy has its interval."""
    if name in _COUNTS:
        return f"{value:,.0f}"
    if name not in _PERCENT:
        return f"{value:.4g}"
    text = f"{100 * value:.2f}%"
    if count and name in ("accuracy", "top1") and 0 <= value <= 1:
        low, high = interval(value, count)
        text += f" (n = {count:,}, 95%: {100 * low:.1f} to {100 * high:.1f})"
    return text


def worst_classes(rows: Sequence[tuple[str, float, int]], show: int = 5) -> list[str]:
    """Returns a short table of the classes with the lowest accuracy, from (name, accuracy, examples) of each class."""
    shown = sorted(rows, key=lambda row: row[1])[:show]
    width = max((len(row[0][:40]) for row in shown), default=0)
    return [
        f"{name[:40]:{width}s}  {100 * accuracy:6.2f}%  of {examples:,} {'example' if examples == 1 else 'examples'}"
        for name, accuracy, examples in shown
    ]
