"""A short part of the campaign: one fault of each of a few kinds, drawn with a fixed seed, and none is lost."""

import random

import pytest

from tests.faults import campaign, kinds

SHORT = ("kill -9", "newest checkpoint damaged", "side file damaged", "hostile override")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> campaign.Lab:
    return campaign.Lab(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("kind", SHORT)
def test_nothing_is_lost(lab: campaign.Lab, kind: str) -> None:
    verdict = kinds.KINDS[kind](lab, random.Random(f"suite {kind}"))
    assert verdict.answer in ("equal", "refused"), verdict


def test_a_difference_is_seen(lab: campaign.Lab) -> None:
    """The judge itself: a run with another seed, and one that ends in a traceback, are lost."""
    workdir = lab.new()
    other = lab.start(workdir, "--config.seed=1").wait(campaign.DEADLINE)
    assert other.code == 0
    assert campaign.outcome(workdir) != lab.reference
    assert not campaign.Ended(1, "Traceback (most recent call last):\nerror: x\n").is_clear
    assert not campaign.Ended(-9, "error: x\n").is_clear
    assert not campaign.Ended(1, "").is_clear
    assert campaign.Ended(2, "a warning\nerror: x\n").is_clear


def test_the_table_counts_by_kind() -> None:
    verdicts = [
        campaign.Verdict("a", "", "equal"),
        campaign.Verdict("a", "", "lost"),
        campaign.Verdict("b", "", "refused"),
    ]
    rows = [line.split() for line in campaign.table(verdicts).splitlines()]
    assert rows == [
        ["kind", "tried", "equal", "refused", "lost"],
        ["a", "2", "1", "0", "1"],
        ["b", "1", "0", "1", "0"],
        ["all", "3", "1", "1", "1"],
    ]
