"""Batches on Ray: these tests run where Ray Data and vLLM are installed, by `make test-vllm`."""

import os
from importlib.util import find_spec
from pathlib import Path

collect_ignore_glob = [] if find_spec("ray") and find_spec("vllm") else ["test_*.py"]
# Before Ray is imported: what batches set where they start it.
os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # workers import from there, too
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_BACKEND_LOG_LEVEL="fatal")
