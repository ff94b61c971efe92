"""What stands before vLLM's server, here before an application that answers everything: hosts, paths, bodies."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from trimtab.serving.http.launch import is_local
from trimtab.serving.http.middleware import STEERED_PATHS, Guard
from trimtab.serving.requests import names_of_settings

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
    headers=(),
    **told,
):
    """The status that a request is answered with; what comes through is answered with 200.

    body      as JSON, or bytes as they are
    address   where the server listens
    headers   further ones
    told      vLLM's further arguments
    """
    is_local = address in ("127.0.0.1", "localhost", "::1")
    args = SimpleNamespace(**{"host": address, "uds": None, "api_key": [], "trimtab_is_local": is_local} | told)
    headers = [*headers, *([] if host is None else [(b"host", host.encode())])]
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
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return {"type": "http.request", "body": content, "more_body": False}

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


SETTINGS = {"alpha", "expert", "trace", "alpha_max", "alpha_step", "beta", "contrast", "plausibility", "weight"}


def test_settings_beside_their_place_are_refused_where_they_would_be_overlooked() -> None:
    assert {*SETTINGS, "experts"} == set(names_of_settings())
    for path in STEERED_PATHS:
        for wrong in ({"experts": ["facts"]}, *({name: 1} for name in SETTINGS)):
            assert status_of(path, wrong) == 400, (path, wrong)
            assert status_of(path, wrong | XARGS) == 400, (path, wrong)
            assert status_of(path, {"vllm_xargs": wrong}) == 200, (path, wrong)
        for nothing in ({"alpha": None}, {"trace": False}, {"trace": 0}, {"trace": "false"}):
            assert status_of(path, {"prompt": ["expert"], "metadata": {"weight": 1}} | nothing) == 200, path
        assert status_of(path, {"alpha": 0}) == 400, path
    assert status_of("/tokenize", {"alpha": 0.5}) == 200


def test_settings_of_requests_are_refused_where_nobody_reads_them() -> None:
    for path in ("/cohere/v2/chat", "/generative_scoring", "/v1/messages/count_tokens", "/tokenize", "/nowhere"):
        assert status_of(path, XARGS) == 400, path
        assert status_of(path, {"vllm_xargs": {}, "prompt": "vllm_xargs"}) == 200, path
    for path in STEERED_PATHS:
        assert status_of(path, XARGS) == 200, path
        assert status_of(f"/below{path}", XARGS, root="/below") == 200, path
        assert status_of(path, XARGS | {"use_beam_search": True}) == 400, path
    path = min(STEERED_PATHS)
    for on in (1, "true", "yes", "On"):
        assert status_of(path, XARGS | {"use_beam_search": on}) == 400, on
    for off in (None, 0, "false", "No", "off", "0"):
        assert status_of(path, XARGS | {"use_beam_search": off}) == 200, off


ESCAPED = json.dumps(XARGS).replace("s", r"\u0073").encode()


ENCODED = [json.dumps(XARGS).encode(name) for name in ("utf-16", "utf-32-be")]


@pytest.mark.parametrize("body", [ESCAPED, *ENCODED], ids=["escaped", "utf-16", "utf-32-be"])
def test_settings_of_requests_are_found_however_they_are_written(body: bytes) -> None:
    assert json.loads(body) == XARGS
    assert status_of("/tokenize", body) == 400
    assert status_of("/v1/completions", body) == 200


def test_conversations_of_a_batch_are_as_many_as_prompts_of_a_completion() -> None:
    def ask(count: int, **told) -> int:
        body = {"messages": [[{"role": "user", "content": "a"}]] * count}
        assert status_of("/v1/chat/completions", body, **told) == 200
        return status_of("/v1/chat/completions/batch", body, **told)

    assert (ask(1), ask(64), ask(65)) == (200, 200, 400)
    assert (ask(2, trimtab_max_prompts=2), ask(3, trimtab_max_prompts=2)) == (200, 400)
    assert status_of("/below/v1/chat/completions/batch", {"messages": ["a"] * 65}, root="/below") == 400
    for body in ({"messages": "a" * 65}, {"messages": None}, [], b"{"):
        assert status_of("/v1/chat/completions/batch", body) == 200  # the server says what is wrong with it


PREFLIGHT = ((b"origin", b"https://my.site"), (b"access-control-request-method", b"POST"))


def test_only_questions_of_browsers_about_origins_need_no_key() -> None:
    told = {"method": "OPTIONS", "api_key": ["secret"]}
    for path in ("/metrics", "/v1/completions", "/health"):
        assert status_of(path, headers=PREFLIGHT, **told) == 200
        for headers in ((), PREFLIGHT[:1], PREFLIGHT[1:]):
            assert status_of(path, headers=headers, **told) == 401
            assert status_of(path, headers=headers, key="secret", **told) == 200
    assert status_of("/metrics", headers=PREFLIGHT, method="GET", api_key=["secret"]) == 401


def test_open_paths_are_open_to_be_read_alone() -> None:
    for path in ("/", "/health", "/ping"):
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE"):
            is_open = method in ("GET", "HEAD") or (method, path) == ("POST", "/ping")
            assert status_of(path, method=method, api_key=["secret"]) == (200 if is_open else 401), (method, path)
