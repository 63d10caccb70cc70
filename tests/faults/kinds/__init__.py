"""The kinds of faults. Each is a function (lab, random) -> Verdict, and draws its details from `random`."""

from tests.faults.campaign import Kind
from tests.faults.kinds import disks, files, hostile, numbers, signals

KINDS: dict[str, Kind] = {**signals.KINDS, **files.KINDS, **disks.KINDS, **numbers.KINDS, **hostile.KINDS}

# How often a kind is drawn for each time that another one is: no start of the trainer is needed for hostile files.
OFTEN = {
    "kill -9": 2,
    "newest checkpoint damaged": 3,
    "hostile image": 5,
    "hostile tar": 4,
    "hostile IDX": 4,
    "hostile table": 5,
    "hostile weights": 5,
    "hostile override": 4,
}
