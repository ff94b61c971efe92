"""Shapes in annotations are compared with the real tensors while tests run, and only then."""

import os
from collections import Counter

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jaxtyping
import pytest

jaxtyping.install_import_hook("trimtab", "beartype.beartype")

pytest_plugins = ["shared_members"]  # after the hook: it imports the package

# Comparing shapes doubles the time of generation, whose steps call hundreds of small functions. A test function is
# compared for its first parameters only; TRIMTAB_COMPARE_ALL_SHAPES=1 compares always.
COMPARED_CASES = 2
_cases: Counter[str] = Counter()


def pytest_runtest_setup(item) -> None:
    name = item.nodeid.partition("[")[0]
    _cases[name] += 1
    is_compared = _cases[name] <= COMPARED_CASES or os.environ.get("TRIMTAB_COMPARE_ALL_SHAPES") == "1"
    jaxtyping.config.update("jaxtyping_disable", not is_compared)


@pytest.fixture(scope="session")
def browser():
    """A real headless Chromium for the tests that open pages; playwright allows one per process."""
    from browsing import open_browser

    with open_browser() as opened:
        yield opened
