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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node, ids) -> None:
    """pytest-xdist 3.8 leaves groups out without a word under pytest 9.2: then every server starts twice."""
    loose = [name for name in ids if name.startswith("tests/serving/") and "@" not in name.rpartition("]")[2]]
    if node.config.getoption("dist") == "loadgroup" and loose:
        raise pytest.UsageError(
            f"'--dist loadgroup' groups nothing: '{loose[0]}' has no group, nor have {len(loose) - 1} others. "
            "Expected: a group behind each name. Install pytest as constraints-vllm.txt says."
        )


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Drafters are written to a cache of this run's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
