"""The order of training: a permutation every epoch, exact weights, and the same in every version."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_scaling.data import order
from vit_scaling.data.sources import SourceConfig
from vit_scaling.data.sources import mixture as mixture_module
from vit_scaling.data.sources.mixture import MixtureSource


class Counted:
    """A source of so many records and nothing else."""

    num_classes, class_names, multi_label = 1, None, False

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        raise AssertionError("the order reads nothing")

    def id(self, index):
        return str(index)


@pytest.fixture
def mixture(monkeypatch):
    """Makes a mixture of sources of these sizes, with these weights."""

    def make(sizes, weights):
        parts = {str(number): Counted(size) for number, size in enumerate(sizes)}
        monkeypatch.setattr(mixture_module, "open_source", lambda config: parts[config.name])
        names = tuple(SourceConfig(name=name) for name in parts)
        return MixtureSource(SourceConfig("mixture", parts=names, weights=weights))

    return make


def stretch(sequence, start, count):
    return [sequence[position] for position in range(start, start + count)]


@settings(deadline=None)
@given(count=st.integers(10, 300), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 10**9))
def test_every_epoch_is_a_permutation_of_all_records(count, seed, epoch):
    records = stretch(order.endless(Counted(count), seed), epoch * count, count)
    assert sorted(records) == list(range(count))


def test_epochs_and_seeds_differ():
    epochs = [tuple(stretch(order.endless(Counted(20), 0), 20 * epoch, 20)) for epoch in range(50)]
    seeds = [tuple(stretch(order.endless(Counted(20), seed), 0, 20)) for seed in range(50)]
    assert len({*epochs, *seeds}) == 99  # the first of each is the same


def test_the_order_is_that_of_all_earlier_versions(mixture):
    """Written down: a run that is continued with a later version must not see another order."""
    single = order.endless(Counted(10), 7)
    assert stretch(single, 0, 20) == [7, 9, 0, 8, 4, 2, 5, 6, 3, 1, 6, 0, 4, 2, 7, 9, 1, 5, 8, 3]
    large = order.endless(Counted(1281167), 42)
    assert [large[position] for position in (0, 1, 1281166, 1281167, 10**12)] == [237990, 12732, 664434, 698229, 657293]
    mixed = order.endless(mixture([10, 30], (3.0, 1.0)), 9)
    assert stretch(mixed, 0, 12) == [3, 9, 6, 30, 1, 7, 5, 31, 0, 4, 2, 11]


def test_weights_are_exact_and_even(mixture):
    """After n records each part has given its share to within as many as there are parts, after a period exactly."""
    weights = (0.5, 0.3, 0.3)
    mixed = mixture([5000, 6000, 7000], weights)
    given = [mixed.parts.index(mixed._locate(index)[0]) for index in stretch(order.endless(mixed, 0), 0, 3300)]
    for n in range(1, 3301):
        for part, weight in enumerate(weights):
            share = n * Fraction(str(weight)) / Fraction("1.1")
            assert abs(given[:n].count(part) - share) < (3 if n % 11 else 1e-9)


def test_the_parts_of_a_mixture_keep_their_epochs_and_differ(mixture):
    mixed = order.endless(mixture([8, 8], (1.0, 1.0)), 5)
    first, second = ([i for i in stretch(mixed, 0, 64) if start <= i < start + 8] for start in (0, 8))
    for records, start in ((first, 0), (second, 8)):
        epochs = [records[at : at + 8] for at in range(0, 32, 8)]
        assert all(sorted(epoch) == list(range(start, start + 8)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [i + 8 for i in first] != second
