"""`trimtab serve`, or `serve` of another command, as the tests of the served model start it."""

import contextlib
from pathlib import Path

from bench import served

KEY = "a-key-of-the-tests"
MOST_REQUESTS = 48  # more than any test needs, few enough to be exceeded
# As users have it: the development environment's own plug-in is left out.
ENVIRONMENT = {"VLLM_PLUGINS": "trimtab", "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def serving(directory: Path, folder: Path, *words: str, key: str | None = KEY):
    """`trimtab serve` once it answers; stopped afterwards."""
    keys = [] if key is None else ["--api-key", key]
    command = [served.tool("trimtab"), "serve", str(directory), *keys, *words]
    with served.running(command, folder, more=ENVIRONMENT, key=key) as server:
        yield server
