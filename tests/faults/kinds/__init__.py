"""The kinds of faults. Each is a function (lab, random) -> Verdict, and draws its details from `random`."""

from tests.faults.campaign import Kind
from tests.faults.kinds import disks, files, hostile, numbers, signals

KINDS: dict[str, Kind] = {**signals.KINDS, **files.KINDS, **disks.KINDS, **numbers.KINDS, **hostile.KINDS}

# How often a kind is drawn for each time that another one is.
OFTEN = {
    "kill -9": 3,
    "newest checkpoint damaged": 4,
    "older checkpoint damaged": 2,
    "side file damaged": 3,
    "finished run damaged": 2,
    "no space left (ENOSPC)": 2,
    "hostile image": 3,
    "hostile tar": 2,
    "hostile IDX": 2,
    "hostile table": 3,
    "hostile weights": 3,
    "hostile override": 3,
}
