"""Engines as users start them: in a process of their own, compiled, members shared by two processes."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from engines import expected, until_end
from separately import MARK

import tiny
from bench import served
from on_disk import save_adapter, save_models
from trimtab import FusedCausalLM
from trimtab.serving.vllm.speculative_config import speculative_config

HERE = Path(__file__).parent
PROMPTS = ["Where does Ada live?", "Q: 12+7", "a", "The quick brown fox (a small one) sleeps.", "Zz?" * 7]


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """A base with an adapter: two bodies of one configuration. The directory, and the transformers engine of it."""
    folder = tmp_path_factory.mktemp("processes")
    save_models(folder, strong=tiny.make(seed=0, width=128), base=tiny.make(seed=1))
    save_adapter(folder)
    fused = FusedCausalLM.from_members(
        str(folder / "strong"), str(folder / "base"), {"facts": str(folder / "adapter")}, strategy="static"
    )
    fused.save_pretrained(folder / "fused")
    return folder, fused


@pytest.fixture(scope="module")
def wanted(members):
    prompts = [members[1].tokenizer(text)["input_ids"] for text in PROMPTS]
    return prompts, expected(members[1], prompts)


def started(folder, prompts, timeout=500, **options):
    """What an engine of its own says to these prompts, and what it wrote meanwhile."""
    job = {"directory": str(folder / "fused"), "options": options, "prompts": prompts, "max_tokens": 24}
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CACHE_ROOT": str(folder / "compiled"),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # one node of memory may hold two processes then
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # of functions that tests send to the workers
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    log = folder / f"{len(list(folder.glob('*.log')))}.log"  # a file, so that an engine that hangs is heard as well
    job_file = folder / "job.json"
    job_file.write_text(json.dumps(job))
    words = [sys.executable, str(HERE / "separately.py"), str(job_file)]
    with served.session(words, log, env=environment) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout)
        written, code = log.read_text(), process.poll()
    assert code == 0, f"{'no end' if code is None else 'ended'} after {timeout} s or less:\n{written[-3000:]}"
    said = [line for line in written.splitlines() if line.startswith(MARK)]
    assert said, written[-3000:]
    return json.loads(said[0].removeprefix(MARK)), written


def check(members, found, wanted):
    assert [until_end(members[1], ids) for ids in found["tokens"]] == wanted


@pytest.mark.thorough
@pytest.mark.slow
def test_compiled_in_a_process_of_its_own_each_member_keeping_code_of_its_own(members, wanted):
    prompts, tokens = wanted
    found, log = started(members[0], prompts)
    check(members, found, tokens)
    # A base and an adapter on it say the same, but call other key-value caches: one file for both would be a mistake.
    kept = re.findall(r"saved AOT compiled function to (\S+)", log)
    assert len(set(kept)) == len(kept) == 3
    assert all(Path(file).is_file() for file in kept)
    # Nothing was there to be read, so what was read would be another member's.
    assert "Directly load AOT compilation" not in log
    assert "due to a load failure" not in log


@pytest.mark.alone
@pytest.mark.slow
def test_members_shared_by_two_processes_with_an_adapter_drafting(members, wanted):
    prompts, tokens = wanted
    drafting = speculative_config(members[0] / "fused", "facts", tokens=2)
    options = {"tensor_parallel_size": 2, "enforce_eager": True, "speculative_config": drafting}
    found, _ = started(members[0], prompts, **options)
    check(members, found, tokens)
    # Where only the first process gathers logits, the second one gets none, and does not wait for ever.
    assert found["gathered"] == [[2, tiny.VOCAB], None]
