"""`curl` as users type it, which routes the key guards, and the limits that stand before vLLM."""

import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from servers import KEY, MOST_REQUESTS

COMPLETION = {"model": "zoo", "prompt": "Q: Who lives in the north?\nA:", "max_tokens": 4, "temperature": 0}
OPEN = {"/", "/health", "/ping"}


def curl(*words: str, stdin: bytes = b"") -> tuple[int, str]:
    """(status, text) of what curl got."""
    command = ["curl", "--silent", "--show-error", "--max-time", "60", "--write-out", "\n%{http_code}", *words]
    ran = subprocess.run(command, input=stdin, capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()
    text, _, status = ran.stdout.decode().rpartition("\n")
    return int(status), text


def test_curl_completes_chats_and_streams(server) -> None:
    said = ["-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {KEY}", "-d"]
    status, text = curl(f"{server.url}/completions", *said, json.dumps(COMPLETION))
    whole = json.loads(text)["choices"][0]["text"]
    assert status == 200
    status, text = curl("-N", f"{server.url}/completions", *said, json.dumps(COMPLETION | {"stream": True}))
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert status == 200
    assert events.pop() == "[DONE]"
    assert "".join(choice["text"] for event in events for choice in json.loads(event)["choices"]) == whole
    chat = {"model": "zoo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
    status, text = curl(f"{server.url}/chat/completions", *said, json.dumps(chat))
    assert status == 200
    assert json.loads(text)["choices"][0]["message"]["role"] == "assistant"


def routes_of(server) -> list[tuple[str, str]]:
    """(method, path) of every route that the server says it has, also those that its description leaves out."""
    log = re.sub(r"\x1b\[[0-9;]*m", "", server.log.read_text())
    found = re.findall(r"Route: (\S+), Methods: ([A-Z, ]+)", log)
    routes = [(method.strip(), path) for path, methods in found for method in methods.split(",")]
    assert len(routes) > 20
    return routes


def test_the_key_guards_every_route_but_the_open_ones(server) -> None:
    for method, path in [*routes_of(server), ("GET", "/metrics/"), ("GET", "//v1/models"), ("POST", "/nowhere")]:
        place = re.sub(r"\{\w+\}", "x", path)
        words = ["--path-as-is", "-X", method, server.root + place]
        body = ["-H", "Content-Type: application/json", "-d", "{}"] if method == "POST" else []
        body = ["--head"] if method == "HEAD" else body
        for key in ([], ["-H", "Authorization: Bearer wrong"], ["-H", f"Authorization: Basic {KEY}"]):
            status, _ = curl(*words, *body, *key)
            assert (status == 401) is (path not in OPEN), (method, path, key, status)


ASKING = ["-H", "Origin: https://elsewhere.example", "-H", "Access-Control-Request-Method: GET"]


@pytest.mark.parametrize(
    "path", ["/metrics", "/metrics/", "/metrics/x", "/metricsx", "/v1/models", "/v1/completions", "/tokenize", "/"]
)
def test_what_a_browser_may_ask_without_a_key_tells_nothing(server, path: str) -> None:
    for words in ([], ASKING[:2], ASKING[2:]):
        status, text = curl("-X", "OPTIONS", *words, server.root + path)
        assert (status, "vllm:" in text) == (401, False), words
    status, text = curl("-X", "OPTIONS", *ASKING, server.root + path)
    assert (status, text) == (400, "Disallowed CORS origin")


def test_metrics_are_at_one_place(server) -> None:
    said = ["-H", f"Authorization: Bearer {KEY}"]
    for method, path in (("GET", "/metrics/x"), ("GET", "/metricsx"), ("OPTIONS", "/metrics"), ("POST", "/metrics")):
        status, text = curl("-X", method, *said, server.root + path)
        assert (status in (404, 405), "vllm:" in text) == (True, False), (method, path)
    status, text = curl(*said, f"{server.root}/metrics")
    assert (status, "vllm:" in text, "trimtab:" in text) == (200, True, True)


def test_with_the_key_guarded_routes_answer(server) -> None:
    for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/v1/steering"):
        assert server.call(path)[0] == 200, path


def test_large_bodies_are_refused_and_the_client_hears_it(server) -> None:
    for size in (9 * 2**20, 30 * 2**20):
        body = json.dumps(COMPLETION | {"prompt": "a" * size}).encode()
        for more in ([], ["-H", "Transfer-Encoding: chunked"]):
            words = ["-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {KEY}", *more]
            status, text = curl(f"{server.url}/completions", *words, "--data-binary", "@-", stdin=body)
            assert (status, "--max-body-mib" in text) == (413, True)
    assert server.call("/v1/completions", COMPLETION)[0] == 200


def test_more_requests_than_allowed_are_told_to_come_back(server) -> None:
    def ask(seed: int):
        return server.call("/v1/completions", COMPLETION | {"max_tokens": 60, "ignore_eos": True, "seed": seed})

    with ThreadPoolExecutor(2 * MOST_REQUESTS) as pool:
        answers = list(pool.map(ask, range(2 * MOST_REQUESTS)))
    codes = {status for status, _ in answers}
    assert codes == {200, 503}
    assert all("--max-requests" in text for status, text in answers if status == 503)
    assert server.call("/v1/completions", COMPLETION)[0] == 200


def test_pages_of_other_sites_are_not_let_in(server) -> None:
    words = ["-X", "OPTIONS", "-H", "Origin: https://elsewhere.example", "-H", "Access-Control-Request-Method: POST"]
    _, text = curl(*words, "-i", f"{server.url}/completions")
    assert "access-control-allow-origin" not in text.lower()


@pytest.mark.parametrize("header", ["X-Long: " + "a" * 100_000, "Authorization: Bearer " + "k" * 100_000])
def test_giant_headers_are_refused(server, header: str) -> None:
    status, _ = curl("-H", header, f"{server.url}/models")
    assert 400 <= status < 500
