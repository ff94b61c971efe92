"""Tests of the vLLM plug-in. Those in `engine/` need vLLM: `make test-vllm` collects them in its own environment."""

from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
collect_ignore = [] if find_spec("vllm") else ["engine"]


def pytest_itemcollected(item) -> None:
    """For `--dist loadgroup`: what shares an engine or a server runs in one process."""
    if item.path.is_relative_to(HERE):
        place = item.path.relative_to(HERE)
        item.add_marker(pytest.mark.xdist_group("http" if place.parts[0] == "http" else str(place)))


def pytest_collection_finish(session) -> None:
    """pytest-xdist 3.8 leaves groups out without a word under pytest 9.2: then every server starts twice."""
    if getattr(session.config.option, "loadgroup", False):
        loose = [item.nodeid for item in session.items if "@" not in item.nodeid]
        if loose:
            raise pytest.UsageError(f"'--dist loadgroup' groups nothing: {loose[0]}, and {len(loose) - 1} more")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Drafters are written to a cache of this run's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
