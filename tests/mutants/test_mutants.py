"""The list of mistakes stays usable: every patch applies, and every test that it names exists."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.mutants import PATCHES, TABLE

ROOT = Path(__file__).parents[2]


def test_the_table_and_the_patches_are_the_same() -> None:
    assert TABLE.keys() == {path.stem for path in PATCHES.glob("*.patch")}
    assert len(TABLE) >= 20


@pytest.mark.parametrize("name", TABLE)
def test_a_mistake_can_still_be_made_and_its_tests_exist(name: str) -> None:
    check = ["git", "apply", "-C1", "--check", str(PATCHES / f"{name}.patch")]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"make the mistake again in today's code (tests/mutants/__init__.py): {done.stderr}"
    for test in TABLE[name].split():
        path, _, function = test.partition("::")
        assert (ROOT / path).is_file(), path
        if function:
            name_of_function = function.partition("[")[0]
            assert re.search(rf"^def {name_of_function}\(", (ROOT / path).read_text(), re.MULTILINE), test
