"""A short part of the campaign: one fault of each of a few kinds, drawn with a fixed seed, and none is lost."""

import errno
import json
import random
from pathlib import Path

import pytest

from tests.faults import campaign, kinds, starts

SHORT = ("kill -9", "newest checkpoint damaged")
CHEAP = ("hostile image", "hostile tar", "hostile IDX", "hostile table", "hostile override")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> campaign.Lab:
    return campaign.Lab(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("kind", [*SHORT, *CHEAP])
def test_nothing_is_lost(lab: campaign.Lab, kind: str) -> None:
    for number in range(3 if kind in CHEAP else 1):
        verdict = kinds.KINDS[kind](lab, random.Random(f"suite {kind} {number}"))
        assert verdict.answer in ("equal", "refused"), verdict


def test_a_full_disk_is_one_sentence_that_names_the_intact_checkpoint(lab: campaign.Lab) -> None:
    """Code 1, so that launchers start again; and once there is space, the run ends as if nothing had happened."""
    workdir = lab.half()
    before = campaign.complete(workdir)
    ended = lab.start(workdir, inside=starts.Inside(files=(starts.WRITES, errno.ENOSPC, 30, 10**9))).wait()
    assert ended.code == 1
    said = [line for line in ended.error.splitlines() if line.startswith("error: ")]
    assert said == [f"error: the disk of {workdir} is full; checkpoint {lab.newest} is intact"]
    assert "Traceback" not in ended.error
    verdict = campaign.judge(lab, workdir, "", "", first=ended, before=before)
    assert verdict.answer == "refused", verdict


def test_a_clock_that_jumps_changes_nothing(lab: campaign.Lab) -> None:
    """By a year, some readings after the start."""
    workdir = lab.new()
    ended = lab.start(workdir, inside=starts.Inside(clock=(365 * 86400.0, 200))).wait()
    assert ended.code == 0, ended.error
    assert campaign.compare(lab, workdir, "", "").answer == "equal"


def test_a_difference_is_seen(lab: campaign.Lab) -> None:
    """The judge itself: a run with another seed, and one that ends in a traceback, are lost."""
    workdir = lab.new()
    other = lab.start(workdir, "--config.seed=1").wait(campaign.DEADLINE)
    assert other.code == 0
    assert campaign.compare(lab, workdir, "", "").answer == "lost"
    assert campaign.compare(lab, lab.whole, "", "").answer == "equal"


def test_what_is_a_clear_refusal() -> None:
    assert not starts.Ended(1, "Traceback (most recent call last):\nerror: x\n").is_clear
    assert not starts.Ended(-9, "error: x\n").is_clear
    assert not starts.Ended(1, "").is_clear
    assert starts.Ended(2, "a warning\nerror: x\n").is_clear


def test_a_checkpoint_that_changed_or_vanished_is_seen() -> None:
    assert campaign.changed({"2": "a", "4": "b"}, {"2": "a", "4": "b"}) is None
    assert campaign.changed({"2": "a", "4": "b"}, {"4": "b", "6": "c"}) is None  # retention
    assert campaign.changed({"2": "a"}, {"2": "b"}) == "checkpoint 2 has changed"
    assert campaign.changed({"2": "a", "4": "b"}, {"2": "a"}) == "checkpoint 4 is gone"
    assert campaign.changed({"4": "b"}, {}) == "checkpoint 4 is gone"


class NoLab:
    """Stands in for a Lab where no run is made."""

    def clear(self) -> None:
        pass


def test_a_campaign_goes_on_where_it_stopped(tmp_path: Path) -> None:
    seen: list[float] = []

    def fault(lab: object, draw: random.Random) -> campaign.Verdict:
        seen.append(draw.random())
        return campaign.Verdict("a", str(seen[-1]), "equal")

    record, made = tmp_path / "faults.jsonl", {"a": fault, "b": fault}
    how = {"minutes": 1.0, "record": record}
    campaign.run(NoLab(), made, 7, most=3, **how)  # type: ignore[arg-type]
    campaign.run(NoLab(), made, 7, most=5, **how)  # type: ignore[arg-type]
    drawn = [row["detail"] for row in map(json.loads, record.read_text().splitlines())]
    assert len(seen) == 5
    again = campaign.run(NoLab(), made, 7, most=5, minutes=1.0, record=tmp_path / "whole.jsonl")  # type: ignore[arg-type]
    assert [verdict.detail for verdict in again] == drawn


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
