"""vLLM in this process, one engine at a time, and the transformers engine beside it."""

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine runs in this process: its errors come as they are
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

import pytest


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """On the CPU an engine binds threads to cores; tests share the machine."""
    import torch

    torch.set_num_threads(1)
