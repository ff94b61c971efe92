"""Servers and other commands in sessions of their own, for benches and tests: started, awaited, asked, ended."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from trimtab.core.errors import InputError, TrimtabError

HOST = "127.0.0.1"
STARTED_WITHIN, STOPPED_WITHIN = 300.0, 60.0  # seconds
TIME_LIMIT = 120.0  # seconds, of one request
SHOWN_LINES = 40  # of the log, when something fails
MODEL = "model"  # what every server calls what it serves
RUNNING, WAITING, CACHE = "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"
BETWEEN_TOKENS = "vllm:inter_token_latency_seconds"  # a histogram, by the clock of the engine's process
DRAFTED, ACCEPTED = "vllm:spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_accepted_tokens_total"


@dataclass(frozen=True)
class Cores:
    """Who computes where, so that clients do not take the engine's time.

    engine   cores of the threads that run the model
    others   cores of HTTP, vLLM's scheduler and the clients; the engine's too where the machine has no more
    """

    engine: tuple[int, ...]
    others: tuple[int, ...]


def share_cores(threads: int | None = None) -> Cores:
    """All cores but one for the engine, unless told how many; raises InputError for more than there are."""
    cores = sorted(os.sched_getaffinity(0))
    count = max(1, len(cores) - 1) if threads is None else threads
    if not 1 <= count <= len(cores):
        raise InputError(
            f"{count} threads were asked for.", f"This process may use {len(cores)} cores.", "--threads N."
        )
    return Cores(tuple(cores[:count]), tuple(cores[count:] or cores))


@contextlib.contextmanager
def on(cores: Sequence[int]) -> Iterator[None]:
    """This process on these cores, for as long as the context lasts."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Server:
    """A running server that speaks OpenAI's API and vLLM's metrics."""

    def __init__(self, port: int, process: "subprocess.Popen[bytes]", log: Path, key: str | None = None) -> None:
        """
        key   sent with requests; None: none is
        """
        self.root = f"http://{HOST}:{port}"
        self.url = f"{self.root}/v1"
        self.port = port
        self.process = process
        self.log = log
        self.key = key
        self._client = httpx.Client(base_url=self.root, timeout=TIME_LIMIT, trust_env=False)

    def close(self) -> None:
        """Closes connections; the process goes on."""
        self._client.close()

    def call(self, path: str, body: Any = None, has_key: bool = True, **headers: str) -> tuple[int, str]:
        """(status, text) of one request: GET, or POST of a body, as JSON or as the bytes that it is.

        raises    httpx.HTTPError where no answer comes
        """
        sent = {"Content-Type": "application/json"} | headers
        if has_key and self.key is not None:
            sent["Authorization"] = f"Bearer {self.key}"
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        method, target = "GET" if body is None else "POST", {"target": path.encode()}  # as it is, "/../" too
        answer = self._client.request(method, "/", content=content, headers=sent, extensions=target)
        return answer.status_code, answer.text

    def ask(self, path: str, body: Any = None, **headers: str) -> Any:
        """The JSON of an answer with status 200; raises TrimtabError for any other."""
        status, text = self.call(path, body, True, **headers)
        if status != 200:
            raise TrimtabError(f"{path} was answered with {status}: {text[:2000]}", fix="look into the server's log.")
        return json.loads(text)

    def is_healthy(self) -> bool:
        """Whether /health answers 200."""
        try:
            return self.call("/health", has_key=False)[0] == 200
        except httpx.HTTPError:
            return False

    def samples(self) -> list[Any]:
        """All samples of /metrics, each with `name`, `labels` and `value`; raises TrimtabError without an answer."""
        try:
            status, text = self.call("/metrics")
        except httpx.HTTPError as error:
            raise TrimtabError(f"a server does not answer at /metrics: {error}.", fix="look into its log.") from error
        if status != 200:
            raise TrimtabError(f"/metrics was answered with {status}: {text[:200]}", fix="look into its log.")
        return samples_of(text)

    def metrics(self) -> dict[str, float]:
        """Sums over labels of all that /metrics counts: {"vllm:num_requests_running": 0.0, ...}."""
        sums: dict[str, float] = {}
        for sample in self.samples():
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        return sums

    def memory_bytes(self) -> int:
        """Memory of the process and its children; what they share counts once (PSS)."""
        return tree_memory_bytes(self.process.pid)

    def last_lines(self) -> str:
        """The end of what it logged."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-SHOWN_LINES:])


def samples_of(text: str) -> list[Any]:
    """The samples of Prometheus' text format."""
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def tree_memory_bytes(pid: int) -> int:
    """PSS of a process and all its children; one that ends meanwhile counts nothing."""
    root = psutil.Process(pid)
    total = 0
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return total


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def tool(name: str) -> str:
    """A command of this Python's environment; raises InputError where it is missing."""
    found = Path(sys.executable).with_name(name)
    if not found.exists():
        raise InputError(
            f"there is no command '{name}' beside {sys.executable}.",
            "The servers run in the environment of the vLLM plug-in.",
            "`make venv-vllm`, then .venv-vllm/bin/python -m bench serving.",
        )
    return str(found)


@contextlib.contextmanager
def session(words: Sequence[Any], log: Path, **options: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """A command in a session of its own, asked to end with the context and then ended with all that it started.

    words     the command
    log       file of what it says
    options   of subprocess.Popen
    """
    with _ended_by_sigterm(), log.open("wb") as stream:
        process = subprocess.Popen(words, stdout=stream, stderr=stream, start_new_session=True, **options)
        try:
            yield process
        finally:
            stop(process)


@contextlib.contextmanager
def running(
    words: Sequence[str],
    folder: Path,
    cores: Cores | None = None,
    more: Mapping[str, str] | None = None,
    patience: float = STARTED_WITHIN,
    key: str | None = None,
) -> Iterator[Server]:
    """A server, from its first answer at /health until the context ends.

    words      the command, without host and port
    folder     where it runs and logs
    cores      None: wherever the kernel likes
    more       environment variables, beside those of `environment`
    patience   seconds until it must answer
    key        sent with requests
    raises     TrimtabError with the end of its log where it dies or does not answer in time; where something fails
               later, the end of its log is shown on stderr
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), folder / "server.log"
    command = [*words, "--host", HOST, "--port", str(port)]
    with session(command, log, env=environment(cores) | dict(more or {}), cwd=folder) as process:
        if cores is not None:
            os.sched_setaffinity(process.pid, cores.others)  # inherited; the engine binds its threads itself
        with contextlib.closing(Server(port, process, log, key)) as server:
            _await(server, command, patience)
            try:
                yield server
            except Exception:
                print(f"The end of the server's log:\n{server.last_lines()}", file=sys.stderr)
                raise


def environment(cores: Cores | None) -> dict[str, str]:
    """The environment of a server or an engine whose model computes on these cores; None: wherever the kernel likes."""
    # Servers run as their users run them: none of the caller's settings for vLLM, threads, and glibc's allocator, which
    # with high thresholds never gives memory back.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "OMP_", "MALLOC_"))}
    bound = "nobind" if cores is None else ",".join(map(str, cores.engine))
    threads = {} if cores is None else {"OMP_NUM_THREADS": str(len(cores.engine))}
    return kept | threads | {
        "VLLM_CPU_OMP_THREADS_BIND": bound,
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the members of the benches have short contexts
        "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """A bench that is told to end stops its server first: SIGTERM alone would skip every `finally`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _await(server: Server, command: Sequence[str], patience: float) -> None:
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise _failure(server, command, f"ended with code {server.process.returncode} before it answered")
        if server.is_healthy():
            return
        time.sleep(0.25)
    raise _failure(server, command, f"did not answer at /health within {patience:g} s")


def _failure(server: Server, command: Sequence[str], what: str) -> TrimtabError:
    return TrimtabError(
        f"`{' '.join(command)}` {what}.", f"The end of its log:\n{server.last_lines()}", "mend what it says there."
    )


def stop(process: "subprocess.Popen[bytes]", patience: float = STOPPED_WITHIN) -> None:
    """Asks a server to end, and ends it and all that it started where it does not."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its session: children that outlived it, too
    process.wait()
