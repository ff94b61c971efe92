"""What stands before vLLM's server, here before an application that answers everything: hosts, paths, bodies."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from trimtab.serving.guard import STEERED_PATHS, Guard
from trimtab.serving.launch import is_local

XARGS = {"vllm_xargs": {"alpha": 0.5}}


def status_of(
    path="/v1/completions",
    body=None,
    *,
    host="127.0.0.1:8000",
    method="POST",
    key=None,
    root="",
    address="127.0.0.1",
    **told,
):
    """The status that a request is answered with; what comes through is answered with 200.

    address   where the server listens
    told      vLLM's further arguments
    """
    is_local = address in ("127.0.0.1", "localhost", "::1")
    args = SimpleNamespace(**{"host": address, "uds": None, "api_key": [], "trimtab_is_local": is_local} | told)
    headers = [] if host is None else [(b"host", host.encode())]
    headers += [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "root_path": root,
        "headers": headers,
        "app": SimpleNamespace(state=SimpleNamespace(args=args)),
    }
    sent = []

    async def receive():
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    async def send(message):
        sent.append(message)

    async def answer(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    with ThreadPoolExecutor(1) as apart:  # an open browser of other tests keeps a loop in this thread
        apart.submit(lambda: asyncio.run(Guard(answer)(scope, receive, send))).result()
    return sent[0]["status"]


HERE = ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:9", "127.1.2.3:9", "[::1]", "[::1]:8000"]
ELSEWHERE = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "192.168.0.7:8000",
    "[2001:db8::1]:8000",
    "0.0.0.0:8000",
    "",
    None,
]


@pytest.mark.parametrize("listening", ["127.0.0.1", "localhost", "::1"])
@pytest.mark.parametrize("host", HERE)
def test_this_machines_names_are_answered(host: str, listening: str) -> None:
    assert status_of(host=host, address=listening) == 200


@pytest.mark.parametrize("host", ELSEWHERE)
@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/"), ("OPTIONS", "/v1/models")]
)
def test_without_a_key_other_names_are_refused(host, method: str, path: str) -> None:
    assert status_of(path, host=host, method=method) == 403


def test_other_names_are_answered_with_a_key_at_other_addresses_and_at_sockets() -> None:
    assert status_of(host="my.site", api_key=["secret"], key="secret") == 200
    assert status_of(host="my.site", api_key=["secret"]) == 401
    assert status_of(host="my.site", address="0.0.0.0") == 200
    assert status_of(host="my.site", uds="/run/trimtab") == 200
    # A name that this machine gives itself, which stands for a loopback address.
    assert status_of(host="my.site", address="my.site", trimtab_is_local=True) == 200
    assert status_of(host="evil.example", address="my.site", trimtab_is_local=True) == 403


def test_names_of_loopback_addresses_are_known_whatever_they_are_called() -> None:
    assert all(map(is_local, ("127.0.0.1", "127.0.1.1", "localhost", "::1")))
    assert not any(map(is_local, ("0.0.0.0", "::", "192.0.2.1")))
    assert status_of(host="my.site", api_key=[""]) == 403


def test_settings_of_requests_are_refused_where_nobody_reads_them() -> None:
    for path in ("/cohere/v2/chat", "/generative_scoring", "/v1/messages/count_tokens", "/tokenize", "/nowhere"):
        assert status_of(path, XARGS) == 400, path
        assert status_of(path, {"vllm_xargs": {}, "prompt": "vllm_xargs"}) == 200, path
    for path in STEERED_PATHS:
        assert status_of(path, XARGS) == 200, path
        assert status_of(f"/below{path}", XARGS, root="/below") == 200, path
        assert status_of(path, XARGS | {"use_beam_search": True}) == 400, path
