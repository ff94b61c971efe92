"""Tests of the vLLM plug-in. Those in `engine/` need vLLM: `make test-vllm` collects them in its own environment."""

from importlib.util import find_spec

import pytest

collect_ignore = [] if find_spec("vllm") else ["engine"]


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Drafters are written to a cache of this run's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
