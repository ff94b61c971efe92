"""Tests of the vLLM plug-in. Those in `engine/` need vLLM: `make test-vllm` collects them in its own environment."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("vllm") else ["engine"]
