"""One browser serves all tests of the pages; without one they are skipped, and the last line of the run says so."""

from collections.abc import Iterator

import pytest

from tests.pages.browser import Browser, find


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    program = find()
    if program is None:
        pytest.skip("no Chromium")
    driven = Browser(program)
    yield driven
    driven.close()
