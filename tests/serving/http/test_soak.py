"""The server among random clients, against a server of their own.

`make soak` asks for ten minutes (TRIMTAB_SOAK_SECONDS), with drafts and vLLM's own limit of tokens in a step.
"""

import asyncio
import os
import random
import sys

import pytest
from bench.served import running

from soaking import Outcomes, Settings, Visitor, client_of, command, soak, write_fused

SECONDS = float(os.environ.get("TRIMTAB_SOAK_SECONDS", "20"))
# See soaking.WARM_UP: after 30 s most of it is over.
SHORT = Settings(seconds=SECONDS, warm_up=30, visitors=8, most_requests=24, drafted=0, step_tokens=64)
SETTINGS = SHORT if SECONDS < 100 else Settings(seconds=SECONDS)


@pytest.fixture(scope="module")
def lone_server(tmp_path_factory):
    """Its cache is small, so that the warm-up touches all of it."""
    folder = tmp_path_factory.mktemp("soak")
    write_fused(folder / "zoo")
    with running(command(folder / "zoo", SETTINGS), folder, more={"OMP_NUM_THREADS": "1"}) as server:
        yield server


@pytest.mark.thorough
def test_random_clients_leave_nothing_behind(lone_server, capfd):
    with capfd.disabled():
        found = soak(lone_server, SETTINGS, lambda text: sys.stderr.write(f"soak: {text}\n"))
    assert [check for check in found["checks"] if not check["is_met"]] == [], found["wrong"]
    visits = {name.partition(":")[0] for name in found["statuses"]}
    assert visits == {"whole", "streamed", "chat", "cancelled", "left", "hung_up", "nonsense"}


# Fails at once; called with "late", in the middle of what it streams.
BROKEN = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    held = bytearray(1)
    def do_GET(self):
        self.answer(200, b"vllm:num_requests_running 1\\nvllm:num_requests_waiting 0\\nvllm:kv_cache_usage_perc 0.5\\n")
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        Handler.held += b"x" * 200_000
        if b'"stream":' not in body or sys.argv[1] != "late":
            return self.answer(500, b"{}")
        self.answer(200, b'data: {"choices": []}\\n\\ndata: {"error": {"code": 500}}\\n\\ndata: [DONE]\\n\\n')
    def answer(self, status, text):
        self.send_response(status); self.send_header("Content-Length", str(len(text))); self.end_headers()
        self.wfile.write(text)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer((sys.argv[-3], int(sys.argv[-1])), Handler).serve_forever()
"""


@pytest.mark.thorough
def test_a_broken_server_fails_every_check(tmp_path, monkeypatch):
    monkeypatch.setattr("soaking.QUIET_WITHIN", 1.0)
    with running([sys.executable, "-c", BROKEN], tmp_path) as server:
        found = soak(server, Settings(seconds=3, warm_up=1, visitors=4, most_requests=4), lambda text: None)
    met = {check["name"]: check["is_met"] for check in found["checks"]}
    assert met.pop("vllm:num_requests_waiting afterwards")
    assert met.pop("slowest refusal")  # there was none
    assert not any(met.values()), found["checks"]
    assert len(met) == 7
    assert any("500" in what for what in found["wrong"])


@pytest.mark.parametrize(("words", "says"), [(["at once"], ": 500"), (["late"], '{"error": {"code": 500}}')])
def test_a_failure_is_seen_by_every_kind_of_visit(tmp_path, words, says):
    async def visit(server, name):
        outcomes = Outcomes()
        async with client_of(server) as client:
            visitor = Visitor(server, client, ["Q: a"], outcomes, random.Random(7))
            visitor.draw.uniform = lambda low, high: 60.0  # no visitor loses patience
            visitor.draw.randint = lambda low, high: high
            await getattr(visitor, name)()
        return outcomes

    with running([sys.executable, "-c", BROKEN, *words], tmp_path) as server:
        for name in ("streamed", "left") if words == ["late"] else ("whole", "chat", "streamed", "cancelled", "left"):
            outcomes = asyncio.run(visit(server, name))
            assert outcomes.wrong_count == 1, name
            assert says in outcomes.wrong[0], name
