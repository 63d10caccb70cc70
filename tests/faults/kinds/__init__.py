"""The kinds of faults. Each is a function (lab, random) -> Verdict, and draws its details from `random`."""

from tests.faults.campaign import Kind
from tests.faults.kinds import disks, files, hostile, numbers, signals

KINDS: dict[str, Kind] = {**signals.KINDS, **files.KINDS, **disks.KINDS, **numbers.KINDS, **hostile.KINDS}
