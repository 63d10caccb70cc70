"""Which mistakes do the tests notice? Realistic ones as patches, each with the tests that must turn red.

`./run.sh mutants` tries all of them and `./run.sh mutants NAME ...` some, each in a copy of the tree. To add one: make
the mistake, `git diff -U1 > tests/mutants/patches/NAME.patch`, undo it, and add NAME and its tests to table.txt.
"""

from pathlib import Path

PATCHES = Path(__file__).parent / "patches"

# Name of the patch -> the tests that must notice it, as pytest takes them.
TABLE = dict(line.split(maxsplit=1) for line in (Path(__file__).parent / "table.txt").read_text().splitlines())
