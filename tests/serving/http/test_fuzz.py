"""Under attack: no answer of 500 or above, no crash, nothing fetched; schemathesis, and cases of our own."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench.served import RUNNING
from servers import KEY

SECONDS = int(os.environ.get("TRIMTAB_FUZZ_SECONDS", "20"))  # of schemathesis; a soak asks for more
PROMPT = {"model": "zoo", "prompt": "Q: a", "max_tokens": 2}
CHAT = {"model": "zoo", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
HUGE = 10**20
RAW = [b"", b"null", b"[]", b'"x"', b"1", b"{", b"\xff\xfe\x00", b"\x00" * 100, b"[" * 50_000, b'{"a":' * 50_000]


def check_alive(server) -> None:
    assert server.process.poll() is None
    status, text = server.call("/v1/completions", PROMPT)
    assert (status, bool(json.loads(text)["choices"])) == (200, True)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/responses"])
def test_bodies_that_are_no_requests(server, path: str) -> None:
    for body in RAW:
        status, text = server.call(path, body)
        assert 400 <= status < 500, (body[:40], status, text[:200])
    status, _ = server.call(path, b"model=zoo", **{"Content-Type": "application/x-www-form-urlencoded"})
    assert 400 <= status < 500
    check_alive(server)


WRONG = [
    {"n": n} for n in (-1, 0, 257, HUGE, "x", None, 1.5, [1])
] + [
    {"max_tokens": count} for count in (-1, 256, HUGE, 1e30, "x", {})
] + [
    {"temperature": -1}, {"temperature": HUGE}, {"top_p": 0}, {"top_p": 2}, {"top_k": -5}, {"min_p": 7},
    {"presence_penalty": HUGE}, {"repetition_penalty": 0}, {"seed": HUGE}, {"seed": -HUGE}, {"logprobs": 10_000},
    {"logit_bias": {"99999999": 1}}, {"logit_bias": {"a": 1}}, {"stop": [""]}, {"stop": ["a"] * 10_000},
    {"stop_token_ids": [HUGE]}, {"stop_token_ids": [-1]}, {"allowed_token_ids": []}, {"allowed_token_ids": [99999]},
    {"prompt_logprobs": HUGE}, {"truncate_prompt_tokens": -7}, {"min_tokens": 99}, {"priority": HUGE},
    {"vllm_xargs": "x"}, {"vllm_xargs": {"expert": "nobody"}}, {"vllm_xargs": {"expert": "a" * 100_000}},
    {"vllm_xargs": {"experts": ["facts"] * 10_000, "alpha": "1"}}, {"vllm_xargs": {"alpha": HUGE}},
    {"vllm_xargs": {"alpha": {"facts": 1}}}, {"vllm_xargs": {"__class__": 1}}, {"vllm_xargs": {"alpha_max": -1}},
    {"vllm_xargs": {"alpha": {"$import": "os"}}}, {"vllm_xargs": {"amount": "grid"}},
    {"structured_outputs": {"regex": "((((a*)*)*"}}, {"structured_outputs": {"json": "{"}},
    {"structured_outputs": {"grammar": "root ::= root"}}, {"response_format": {"type": "nonsense"}},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: json.dumps(wrong)[:60])
def test_wrong_values_are_the_clients_fault(server, wrong) -> None:
    for path, body in (("/v1/completions", PROMPT), ("/v1/chat/completions", CHAT)):
        status, text = server.call(path, body | wrong)
        assert status < 500, text[:500]
        assert status == 400 or "vllm_xargs" not in wrong, text[:500]


def test_wrong_values_left_the_server_alive(server) -> None:
    check_alive(server)


PROMPTS = [
    "\x00a\x00",
    "",
    "a" * 1_000_000,
    "\u202e\U0001f600" * 300,
    [],
    [[]],
    [1] * 100_000,
    [99_999_999],
    [-1],
    [None],
    ["a", 1],
    {"a": 1},
    ["a"] * 300,
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: repr(prompt)[:30])
def test_odd_prompts(server, prompt) -> None:
    status, text = server.call("/v1/completions", PROMPT | {"prompt": prompt, "max_tokens": 1})
    assert status < 500, text[:500]
    status, text = server.call("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": prompt}]})
    assert status < 500, text[:500]
    check_alive(server)


def test_lone_surrogates_and_ten_mebibytes(server) -> None:
    status, _ = server.call("/v1/completions", b'{"model": "zoo", "prompt": "\\ud800", "max_tokens": 1}')
    assert status < 500
    assert server.call("/v1/completions", PROMPT | {"prompt": "a" * (10 * 2**20)})[0] == 413
    assert server.call("/v1/completions", PROMPT | {"prompt": "a " * (3 * 2**20)})[0] == 400  # beyond any context
    check_alive(server)


def test_conversations_of_a_batch_are_counted(server) -> None:
    turns = CHAT["messages"]
    for count, status in ((1, 200), (65, 400), (10_000, 400)):
        found, text = server.call("/v1/chat/completions/batch", CHAT | {"messages": [turns] * count})
        assert (found, "VLLM_MAX_COMPLETION_PROMPTS" in text) == (status, status == 400), text[:300]
    check_alive(server)


def test_an_earlier_answer_without_parts_is_the_clients_fault(server) -> None:
    answer = {"id": "a", "type": "message", "role": "assistant", "status": "completed"}
    part = {"type": "output_text", "text": "Ada", "annotations": []}
    for content, expected in (([], 400), ([part], 200)):
        question = {"role": "user", "content": "Who?"}
        asked = {"model": "zoo", "input": [question, answer | {"content": content}, question], "max_output_tokens": 2}
        status, text = server.call("/v1/responses", asked)
        assert (status, "leave the message out" in text) == (expected, expected == 400), text[:300]
    check_alive(server)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "zoo/../zoo", "zoo\x00", "..%2f..", "", "a" * 10_000]
)
def test_names_of_models_are_names_alone(server, name: str) -> None:
    for path, body in (("/v1/completions", PROMPT), ("/v1/chat/completions", CHAT), ("/tokenize", {"prompt": "a"})):
        status, text = server.call(path, body | {"model": name})
        assert status in (400, 404) or name == "", text[:300]
        assert "root:" not in text


@pytest.mark.parametrize(
    "path", ["/v1/models/../../etc/passwd", "/../etc/passwd", "/v1/traces/..%2f..%2fetc", "/%00", "//"]
)
def test_paths_lead_nowhere(server, path: str) -> None:
    status, text = server.call(path)
    assert 400 <= status < 500
    assert "root:" not in text


def asked(part):
    """{route: a request in its own shape, with this part of a message}; vLLM keeps those to /.../render shut (403)."""
    messages = [{"role": "user", "content": [part]}]
    chat, answer = CHAT | {"messages": messages}, {"model": "zoo", "input": messages, "max_output_tokens": 1}
    return {
        "/v1/chat/completions": chat,
        "/v1/chat/completions/batch": CHAT | {"messages": [messages]},
        "/invocations": chat,
        "/tokenize": {"model": "zoo", "messages": messages},
        "/v1/messages": chat,
        "/v1/messages/count_tokens": chat,
        "/v1/responses": answer,
    }


def media(route: str, url: str) -> list[dict]:
    """Parts of a message that stand for media at an address, as a route writes them."""
    if route.startswith("/v1/responses"):
        return [{"type": "input_image", "detail": "auto", "image_url": url}, {"type": "input_file", "file_url": url}]
    if route.startswith("/v1/messages"):
        return [{"type": kind, "source": {"type": "url", "url": url}} for kind in ("image", "document")]
    return [{"type": kind, kind: {"url": url}} for kind in ("image_url", "audio_url", "video_url")]


def test_addresses_in_requests_are_never_fetched(server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(1)
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/x.png"
        for route in asked(None):
            kind = "input_text" if route.startswith("/v1/responses") else "text"
            assert server.call(route, asked({"type": kind, "text": "a"})[route])[0] == 200, route  # the shape is right
            for part in media(route, url):
                status, text = server.call(route, asked(part)[route])
                assert 400 <= status < 500, (route, part, status, text[:300])
        with pytest.raises(TimeoutError):
            trap.accept()
        with socket.create_connection(trap.getsockname()):
            trap.accept()[0].close()  # it does hear


def test_templates_of_requests_are_not_run(server) -> None:
    status, _ = server.call("/v1/chat/completions", CHAT | {"chat_template": "{{ ''.__class__.__mro__ }}"})
    assert 400 <= status < 500


def test_routes_that_resize_or_abort_are_closed(server) -> None:
    for path in ("/scale_elastic_ep", "/is_scaling_elastic_ep", "/inference/v1/abort_requests", "/v1/systemone"):
        assert server.call(path, {"request_ids": ["x"], "new_data_parallel_size": 2})[0] in (404, 405)


def test_clients_that_leave_in_the_middle_leave_nothing_behind(server) -> None:
    body = json.dumps(PROMPT | {"max_tokens": 200, "stream": True, "ignore_eos": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    )
    for cut in (10, len(body)):
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:cut])
                if cut == len(body):
                    client.recv(100)
    check_alive(server)
    for _ in range(50):  # the engine hears of it a little later
        running = server.metrics()[RUNNING]
        if not running:
            break
        time.sleep(0.2)
    assert running == 0


def test_schemathesis_finds_no_server_error(server, tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{server.root}/openapi.json"]
    command += ["--header", f"Authorization: Bearer {KEY}", "--checks", "not_a_server_error", "--mode", "all"]
    command += ["--phases", "fuzzing", "--max-examples", "8" if SECONDS < 100 else "200", "--max-time", str(SECONDS)]
    command += ["--continue-on-failure", "--suppress-health-check", "all", "--request-timeout", "60", "--no-color"]
    ran = subprocess.run([*command, "--warnings", "off"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert "passed" in ran.stdout
    check_alive(server)
