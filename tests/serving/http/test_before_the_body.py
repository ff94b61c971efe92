"""What is answered before a body has come: to clients that stall, and to those that have no key. Over real sockets."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import uvicorn
from servers import KEY, MOST_REQUESTS

from trimtab.serving.http import middleware
from trimtab.serving.http.middleware import MEBIBYTE, Guard

COMPLETION = {"model": "zoo", "prompt": "Q: a", "max_tokens": 1}


def stalled(port: int, path: str, *, method="POST", key: str | None = None) -> socket.socket:
    """A connection whose request promises a body of 8 MiB, and sends five bytes of it."""
    words = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    words += [f"Content-Length: {8 * MEBIBYTE}"] + ([f"Authorization: Bearer {key}"] if key else [])
    client = socket.create_connection(("127.0.0.1", port), timeout=10)
    client.sendall("\r\n".join([*words, "", '{"a":']).encode())
    return client


def status_of(client: socket.socket) -> int:
    """The status that comes; raises TimeoutError where nothing does."""
    return int(client.recv(1000).split()[1])


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/ping", 200),
        ("GET", "/health", 200),
        ("POST", "/health", 401),
        ("PUT", "/ping", 401),
        ("POST", "/", 401),
        ("POST", "/v1/completions", 401),
        ("OPTIONS", "/v1/completions", 401),
    ],
)
def test_without_a_key_no_body_is_awaited(server, method: str, path: str, status: int) -> None:
    with stalled(server.port, path, method=method) as client:
        assert status_of(client) == status


def test_bodies_that_are_still_coming_are_requests_under_way(server) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(MOST_REQUESTS):
            stack.enter_context(stalled(server.port, "/v1/completions", key=KEY))
        for attempt in range(100):  # the server may take a while to hear of them all
            status, text = server.call("/v1/completions", COMPLETION)
            if status == 503:
                break
            if attempt % 20 == 19:  # one was refused while the request of an earlier test was under way
                stack.enter_context(stalled(server.port, "/v1/completions", key=KEY))
            time.sleep(0.1)
        assert (status, "--max-requests" in text) == (503, True)
        assert server.call("/ping", has_key=False)[0] == 200
    for _ in range(50):  # the server hears a little later that they have gone
        if (status := server.call("/v1/completions", COMPLETION)[0]) == 200:
            break
        time.sleep(0.1)
    assert status == 200


@contextlib.contextmanager
def guarded():
    """The port of a guard, with room for one request, before an application that answers all requests alike."""

    async def answer(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    limits = {"trimtab_max_body_mib": 8.0, "trimtab_max_requests": 1}
    args = SimpleNamespace(host="127.0.0.1", uds=None, api_key=[KEY], trimtab_is_local=True, **limits)
    before = Guard(answer)

    async def app(scope, receive, send):
        await before(scope | {"app": SimpleNamespace(state=SimpleNamespace(args=args))}, receive, send)

    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def test_a_body_that_does_not_come_is_given_up_and_its_place_is_free_again(monkeypatch) -> None:
    monkeypatch.setattr(middleware, "READ_WITHIN", 5.0)
    with guarded() as port:
        with stalled(port, "/v1/completions", key=KEY) as client, stalled(port, "/x", key=KEY) as second:
            assert status_of(second) == 503  # there is room for one
            assert status_of(client) == 408
            assert client.recv(1000) == b"" or client.recv(1000) == b""  # the rest of the answer; then it is closed
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            body = json.dumps(COMPLETION)
            words = ["POST /v1/completions HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {KEY}"]
            client.sendall("\r\n".join([*words, f"Content-Length: {len(body)}", "", body]).encode())
            assert status_of(client) == 200
