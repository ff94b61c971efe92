"""Servers in processes of their own: awaited, looked at, ended, and their last words shown."""

import os
import sys
import time

import psutil
import pytest
from bench.served import Cores, on, running, samples_of, share_cores, tree_memory_bytes

from trimtab.core.errors import InputError, TrimtabError

ANSWERS = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; x = bytearray(50_000_000); time.sleep(600)"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        text = b'a:b_total{x="1"} 2.0\\na:b_total{x="2"} 3\\n' if self.path == "/metrics" else b""
        self.send_response(200); self.end_headers(); self.wfile.write(text)
http.server.HTTPServer((sys.argv[2], int(sys.argv[4])), Handler).serve_forever()
"""


def script(text):
    return [sys.executable, "-c", text]


def test_a_server_answers_and_takes_its_children_with_it(tmp_path):
    with running(script(ANSWERS), tmp_path, patience=30) as server:
        assert server.is_healthy()
        assert server.metrics() == {"a:b_total": 5.0}
        child = int(server.last_lines().split()[1])
        end = time.monotonic() + 20
        while tree_memory_bytes(server.process.pid) < 50_000_000 and time.monotonic() < end:
            time.sleep(0.1)
        assert tree_memory_bytes(server.process.pid) > 50_000_000
        assert server.memory_bytes() > tree_memory_bytes(child) > 50_000_000
    assert server.process.returncode is not None
    for _ in range(50):  # nobody waits for an orphan here; it may be listed a moment longer
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.1)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_server_that_dies_or_stays_silent_shows_what_it_said(tmp_path):
    dying = script("import sys; print('no such model'); sys.exit(3)")
    with pytest.raises(TrimtabError, match=r"(?s)ended with code 3 .*no such model"), running(dying, tmp_path / "a"):
        pass
    silent = script("import time; print('loading', flush=True); time.sleep(60)")
    started = time.monotonic()
    with (
        pytest.raises(TrimtabError, match=r"(?s)did not answer at /health within 2 s.*loading"),
        running(silent, tmp_path / "b", patience=2),
    ):
        pass
    assert time.monotonic() - started < 30


def test_a_server_gets_its_threads_and_no_settings_of_its_parent(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_FOREIGN", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "4294967296")  # as the Makefile sets it: memory is never given back
    core = min(os.sched_getaffinity(0))
    told = (
        "import os, sys; print({n: v for n, v in os.environ.items() if n[:4] in ('VLLM', 'OMP_', 'MALL')}); sys.exit(1)"
    )
    with (
        pytest.raises(TrimtabError) as caught,
        running(script(told), tmp_path, Cores((core,), (core,)), {"VLLM_MINE": "2"}),
    ):
        pass
    found = str(caught.value)
    assert "VLLM_FOREIGN" not in found
    assert "MALLOC_" not in found
    assert f"'VLLM_CPU_OMP_THREADS_BIND': '{core}'" in found
    assert "'OMP_NUM_THREADS': '1'" in found
    assert "'VLLM_MINE': '2'" in found


def test_cores_are_shared_between_engine_and_clients():
    cores = sorted(os.sched_getaffinity(0))
    assert share_cores(len(cores)) == Cores(tuple(cores), tuple(cores))
    split = share_cores()
    assert split.engine
    assert split.others
    if len(cores) > 1:
        assert set(split.engine).isdisjoint(split.others)
        assert set(split.engine) | set(split.others) == set(cores)
    with pytest.raises(InputError, match=f"may use {len(cores)} cores"):
        share_cores(len(cores) + 1)
    with on(split.others):
        assert os.sched_getaffinity(0) == set(split.others)
    assert os.sched_getaffinity(0) == set(cores)


def test_samples_keep_their_names_and_labels():
    (one, other) = samples_of('# TYPE x counter\nx_total{a="1 2"} 1.5\n\ny 3e2\n')
    assert (one.name, one.labels, one.value) == ("x_total", {"a": "1 2"}, 1.5)
    assert (other.name, other.labels, other.value) == ("y", {}, 300.0)
