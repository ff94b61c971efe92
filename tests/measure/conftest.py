"""A real headless Chromium for the tests that open pages."""

import pytest

from browsing import open_browser


@pytest.fixture(scope="session")
def browser():
    with open_browser() as opened:
        yield opened
