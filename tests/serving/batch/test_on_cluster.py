"""`--address`: a batch on a Ray cluster that somebody else started, and that outlives it."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from asking import complete, read_rows, texts, write_rows
from trimtab import FusedCausalLM

PROMPTS = ["Q: Where does Ada Moss live?\nA:", "Q: 12+7=\nA:", "Q: Who keeps a cat?\nA:"]
WITHIN = 120.0  # seconds
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "7f" * 32}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def drivers(address: str) -> int:
    """How many drivers a cluster has had, with this one."""
    script = f"import ray; ray.init('{address}', log_to_driver=False); print(ray.get_runtime_context().get_job_id())"
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=WITHIN, env=os.environ | TOKEN
    )
    assert ran.returncode == 0, ran.stderr
    return int.from_bytes(bytes.fromhex(ran.stdout.strip()), "little")


@pytest.fixture(scope="module")
def address():
    """Of a cluster of one node that asks for a token, started as by hand; ended with all that it started."""
    folder = tempfile.mkdtemp(prefix="ray-")  # sockets lie in it: its path must be short
    found = f"127.0.0.1:{free_port()}"
    words = ["start", "--head", "--block", f"--port={found.partition(':')[2]}", "--node-ip-address=127.0.0.1"]
    words += ["--num-cpus=3", "--include-dashboard=false", f"--temp-dir={folder}", "--disable-usage-stats"]
    log = Path(folder) / "said"
    with log.open("w") as said:
        command = [sys.executable, "-m", "ray.scripts.scripts", *words]
        head = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True, env=os.environ | TOKEN)
        try:
            end = time.monotonic() + WITHIN
            while "Ray runtime started" not in log.read_text():
                assert head.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.2)
            yield found
        finally:
            head.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                head.wait(timeout=5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(head.pid, signal.SIGKILL)
            head.wait()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def fused_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster") / "fused"
    FusedCausalLM.from_members("zoo:strong", "zoo:small", {"facts": "zoo:small/facts"}).save_pretrained(folder)
    return folder


def batch(*words, **environment):
    command = [sys.executable, "-m", "trimtab", "batch", *map(str, words), "--engine", "transformers"]
    return subprocess.run(command, capture_output=True, text=True, timeout=WITHIN, env=os.environ | environment)


def test_a_running_cluster_answers_what_this_process_answers_and_outlives_it(address, fused_dir, tmp_path):
    rows = [complete(f"row-{n}", PROMPTS[n % 3], max_tokens=4 + n) for n in range(8)] + ["{no json"]
    source = write_rows(tmp_path / "in.jsonl", rows)
    before = drivers(address)
    ran = batch(fused_dir, source, tmp_path / "out.jsonl", "--address", address, "--workers", "2", "--json", **TOKEN)
    assert ran.returncode == 0, ran.stderr
    assert drivers(address) == before + 2  # it was this cluster that worked, and it is still there
    found = json.loads(ran.stdout)["result"]
    assert (found["rows"], found["failed"], found["computed"]) == (9, 1, 8)
    here = batch(fused_dir, source, tmp_path / "here.jsonl", "--workers", "0")
    assert here.returncode == 0, here.stderr
    ours, theirs = (read_rows(tmp_path / name) for name in ("here.jsonl", "out.jsonl"))
    assert [row["custom_id"] for row in theirs] == [row["custom_id"] for row in ours]
    assert [texts(row) for row in theirs[:8]] == [texts(row) for row in ours[:8]]
    assert theirs[8]["response"]["status_code"] == 400


def test_a_cluster_that_is_not_there_is_told_at_once(fused_dir, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [complete("a", PROMPTS[0], max_tokens=4)])
    nowhere = f"127.0.0.1:{free_port()}"
    started = time.monotonic()
    ran = batch(fused_dir, source, tmp_path / "out.jsonl", "--address", nowhere)
    assert time.monotonic() - started < 60
    assert ran.returncode == 1
    assert ran.stderr.startswith(f"TrimtabError: the cluster at {nowhere} cannot be reached")
    assert "Fix: check --address." in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.thorough
def test_a_cluster_that_asks_for_a_token_is_told_apart(address, fused_dir, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [complete("a", PROMPTS[0], max_tokens=4)])
    ran = batch(fused_dir, source, tmp_path / "out.jsonl", "--address", address, RAY_AUTH_MODE="disabled")
    assert ran.returncode == 1
    assert f"the cluster at {address} cannot be reached" in ran.stderr
    assert "RAY_AUTH_MODE=token" in ran.stderr
    assert "Traceback" not in ran.stderr
