"""One `trimtab serve` on the zoo, with a key and the chat page, for all tests; beside it the transformers engine."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from servers import MOST_REQUESTS, serving

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

# Without drafts, so that metrics count one step per token; another server drafts.
OPTIONS = ["--page", "--speculate", "0", "--max-num-seqs", "64", "--max-requests", str(MOST_REQUESTS)]


@pytest.fixture(scope="session")
def fused():
    """The same members in the transformers engine, in this process."""
    import torch

    from trimtab import FusedCausalLM

    torch.set_num_threads(1)
    experts = {"math": "zoo:small/arithmetic", "facts": "zoo:small/facts"}
    return FusedCausalLM.from_members("zoo:strong", "zoo:small", experts)


@pytest.fixture(scope="session")
def directory(fused, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("served") / "zoo"
    fused.save_pretrained(directory)
    return directory


@pytest.fixture(scope="package")
def server(directory, tmp_path_factory):
    with serving(directory, tmp_path_factory.mktemp("server"), *OPTIONS) as served:
        yield served
        assert served.process.poll() is None, f"the server died:\n{served.last_lines()}"
