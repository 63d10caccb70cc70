"""The endless order in which training reads a source: from a position to the index of a record.

A source is shuffled anew in every epoch. Each part of a mixture is shuffled separately, and the parts are interleaved
as evenly as their weights allow: of the first n records, each part gives its share, to within the number of parts.

The shuffle is a permutation that is computed for one place at a time, Grain's `index_shuffle`: nothing is stored,
however large the source, and any position costs the same. Seeds and interleaving are derived here, not by Grain's
pipelines, which may change; a run that is continued with a later version must see the same order, and a test compares
it with what earlier versions drew.
"""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol, runtime_checkable

import numpy as np
from grain.experimental import index_shuffle

from vit_scaling.data.sources import Source
from vit_scaling.data.sources.mixture import MixtureSource


@runtime_checkable
class Order(Protocol):
    """An endless sequence of record indices at random access."""

    def __getitem__(self, position: int) -> int: ...


def endless(source: Source, seed: int) -> Order:
    """Returns the order of `source`: a pure function of `seed`, its length and, of a mixture, its parts and weights."""
    if not isinstance(source, MixtureSource):
        return _Shuffled(0, len(source), seed)
    parts = []
    for number, (start, part) in enumerate(zip(source.starts, source.parts, strict=True)):
        part_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        parts.append(_Shuffled(start, len(part), part_seed))
    return _Interleaved(parts, source.weights)


class _Shuffled:
    """The numbers from `start` on, `count` of them, again and again, in another order every time."""

    def __init__(self, start: int, count: int, seed: int):
        self._start = start
        self._count = count
        self._seed = int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self._count)
        seed = (self._seed + epoch) % 2**32
        return self._start + index_shuffle(place, max_index=self._count - 1, seed=seed, rounds=4)


class _Interleaved:
    """Takes from several orders by weight."""

    def __init__(self, orders: Sequence[Order], weights: Sequence[float]):
        exact = [Fraction(str(weight)) for weight in weights]  # 0.1 is meant as a tenth
        unit = math.lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * unit) for weight in exact]
        left = list(itertools.accumulate(reversed(whole)))[::-1]
        self._parts = list(zip(orders, left, [*left[1:], 0], strict=True))

    def __getitem__(self, position: int) -> int:
        # Each part in turn keeps its share of the places that come to it and passes on the others: of the first n,
        # floor(n * weight of all parts behind it / that weight and its own).
        for order, weight, behind in self._parts:
            passed_on = position * behind // weight
            if (position + 1) * behind // weight == passed_on:
                return order[position - passed_on]
            position = passed_on
        raise AssertionError("the last part keeps every place")
