"""Starting `trimtab serve`, or `vllm serve`, and talking to it with the standard library alone."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

KEY = "a-key-of-the-tests"
MOST_REQUESTS = 48  # more than any test needs, few enough to be exceeded
STARTED_WITHIN = 300  # seconds; other work on the machine may hold the start up


class Served:
    """A running server."""

    def __init__(self, port: int, process: subprocess.Popen, log: Path) -> None:
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"
        self.process = process
        self.log = log
        self.key = KEY

    def call(self, path: str, body=None, key: str | None = KEY, **headers: str):
        """(status, text) of one request; `body` as JSON, or bytes as they are."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} | headers
        if key is not None:
            sent["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.root + path, data=data, headers=sent)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def ask(self, path: str, body=None, **headers: str):
        """The JSON that a request is answered with; it must succeed."""
        status, text = self.call(path, body, **headers)
        assert status == 200, text
        return json.loads(text)

    def metrics(self) -> dict[str, float]:
        """{a line of /metrics up to its value: the value}."""
        status, text = self.call("/metrics")
        assert status == 200
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def script(name: str) -> Path:
    """A command of this environment."""
    return Path(sys.executable).with_name(name)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(directory: Path, folder: Path, *words: str, tool: str = "trimtab", key: str | None = KEY):
    """`trimtab serve`, or `serve` of another command, once it answers; stopped afterwards."""
    port, log = free_port(), folder / "serve.log"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "INFO"}
    keys = [] if key is None else ["--api-key", key]
    command = [script(tool), "serve", directory, "--port", str(port), *keys, *words]
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env=environment, cwd=folder, start_new_session=True
        )
    served = Served(port, process, log)
    try:
        _await(served)
        yield served
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise


def _await(served: Served) -> None:
    end = time.monotonic() + STARTED_WITHIN
    while time.monotonic() < end:
        assert served.process.poll() is None, served.log.read_text()[-4000:]
        try:
            if served.call("/health", key=None)[0] == 200:
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no answer after {STARTED_WITHIN} s:\n{served.log.read_text()[-4000:]}")
