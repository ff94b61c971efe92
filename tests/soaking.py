"""The server among random clients for a while: does it leak, keep slots, or break? `serving/http/test_soak.py` asks.

Visitors ask at once, each for something else every time: answers whole and streamed, of any length, with several
choices, stop strings, settings of their own; some leave in the middle, some hang up before their request is complete,
some send what is no request. Afterwards:

    no answer was 500 or above, and none is missing
    the engine runs and keeps nothing: requests running and waiting 0, key-value cache empty
    memory of all its processes is at most 5% above what it was after a warm-up of the same traffic; it is read ten
    times on the way, so that a leak (a line) and caches that fill (a curve that bends) can be told apart
    of too many requests some are refused at once (503, Retry-After), and all others get their answer
"""

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from bench.served import CACHE, HOST, MODEL, RUNNING, WAITING, Server

from bench import served

GROWTH = 1.05  # memory after, over memory before
QUIET_WITHIN = 60.0  # seconds until a server without visitors must have nothing under way
REFUSED_WITHIN = 10.0  # seconds in which one too many must be told so
TIME_LIMIT = 120.0  # seconds for an answer
EXPERTS = ("arithmetic", "facts")
CONTEXT = 256  # tokens that the zoo's models read
SAMPLES = 5  # of the memory of a quiet server; the least counts
LOOKS = 10  # at the memory during the soak
# Of visits, at least. The worker's memory grows in the first minute: oneDNN keeps what it made for each matrix and
# number of rows. (Alone, without a server, 60 matrices of 256 columns times 1 to 160 rows: 477 to 788 MiB; the same
# products three times more: 788.) On two cores a server with vLLM's own limit of tokens in a step had 2067 MiB at its
# start, 2547 after 20 s of visits, 2620 after 40, 2629 after 60, 2654 after 140, 2660 after 200 and after 260: a curve
# that ends. The processes of the API and of the scheduler did not grow.
WARM_UP = 240.0  # seconds


@dataclass(frozen=True)
class Settings:
    """How long, and by how many.

    seconds        of traffic between the two looks at the memory
    warm_up        seconds of the same traffic before: caches fill, code is compiled
    visitors       who ask at the same time
    most_requests  that the server takes at once; 0: it is not filled up
    drafted        tokens that an expert drafts; 0: none
    step_tokens    that a step reads at most; None: vLLM's own limit. Few fill the worker's caches soon (see WARM_UP)
    """

    seconds: float = 600.0
    warm_up: float = WARM_UP
    visitors: int = 16
    most_requests: int = 64
    drafted: int = 3
    step_tokens: int | None = None
    seed: int = 0


@dataclass
class Outcomes:
    """What visitors did and were told.

    statuses   "kind of visit: status" -> how often; 0 for visits that leave on purpose
    wrong      what should not have been, in words; the first few
    """

    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    wrong_count: int = 0

    def blame(self, what: str) -> None:
        """Something that should not have been."""
        self.wrong_count += 1
        if len(self.wrong) < 20:
            self.wrong.append(what[:500])


@dataclass(frozen=True)
class Check:
    """One thing that had to hold."""

    name: str
    found: str
    expected: str
    is_met: bool


# ---- what a visitor asks


def body_of(draw: random.Random, prompts: Sequence[str]) -> dict[str, Any]:
    """A request that must be answered: any length, choices, stops, settings."""
    body: dict[str, Any] = {
        "model": MODEL,
        "prompt": draw.choice(prompts),
        "max_tokens": draw.choice((1, 2, 5, 16, 40, 100)),
        "temperature": draw.choice((0.0, 0.7, 1.5)),
    }
    extras: list[dict[str, Any]] = [
        {"n": draw.randint(2, 4), "temperature": 1.0},
        {"stop": draw.choice(("\n", [".", "####"], "e"))},
        {"logprobs": draw.randint(0, 5)},
        {"seed": draw.randint(0, 1_000_000)},
        {"ignore_eos": True},
        {"echo": True},
        {"prompt": [draw.choice(prompts) for _ in range(draw.randint(2, 4))]},
        {"vllm_xargs": {"alpha": draw.choice((0.0, 0.5, 1.5))}},
        {"vllm_xargs": {"expert": draw.choice(EXPERTS), "trace": 1}},
    ]
    for extra in draw.sample(extras, draw.choice((0, 0, 1, 2))):
        body |= extra
    return body


def malformed(draw: random.Random) -> tuple[bytes, str]:
    """What must be answered with 4xx: (body, what is wrong with it)."""
    good: dict[str, Any] = {"model": MODEL, "prompt": "Q: a", "max_tokens": 2}
    wrong: list[dict[str, Any]] = [
        {"max_tokens": -1},
        {"max_tokens": 10**20},
        {"n": 0},
        {"n": 10**9},
        {"temperature": -3},
        {"model": "../../etc/passwd"},
        {"prompt": None},
        {"prompt": [CONTEXT * [10**9]]},
        {"prompt": "a " * 5000},
        {"vllm_xargs": {"expert": "nobody"}},
        {"vllm_xargs": {"alpha": 1e30}},
        {"stop": 7},
    ]
    if draw.random() < 0.25:
        broken = draw.choice((b"", b"{", b"null", b"[]", b"\xff\x00"))
        return broken, repr(broken)
    chosen = draw.choice(wrong)
    return json.dumps(good | chosen).encode(), str(chosen)[:80]


def error_of(lines: Sequence[str]) -> str:
    """The first piece of a stream that tells of an error, or is none: the status was sent before, and says 200."""
    for line in lines:
        piece = line.removeprefix("data: ")
        if piece == line or piece == "[DONE]":
            continue
        try:
            found = json.loads(piece)
        except ValueError:
            return piece
        if not isinstance(found, dict) or "error" in found:
            return piece
    return ""


class Visitor:
    """Somebody who asks one thing after the other until the time is over."""

    def __init__(
        self, server: Server, client: Any, prompts: Sequence[str], outcomes: Outcomes, draw: random.Random
    ) -> None:
        self.server, self.client, self.prompts, self.outcomes, self.draw = server, client, prompts, outcomes, draw
        self.visits: list[Callable[[], Awaitable[int]]] = [
            *[self.whole] * 4,
            *[self.streamed] * 4,
            *[self.chat] * 2,
            *[self.cancelled] * 3,
            *[self.left] * 3,
            self.hung_up,
            self.nonsense,
        ]

    async def stay(self, until: float) -> None:
        """Outcomes until this moment of the monotonic clock."""
        while time.monotonic() < until:
            visit = self.draw.choice(self.visits)
            name = visit.__name__
            try:
                status = await visit()
            except (OSError, httpx.HTTPError) as error:
                self.outcomes.blame(f"{name}: {type(error).__name__}: {error}")
                continue
            self.outcomes.statuses[f"{name}: {status}"] += 1

    async def whole(self) -> int:
        """One answer in one piece."""
        return await self._answered("/v1/completions", body_of(self.draw, self.prompts))

    async def chat(self) -> int:
        """A chat's turn."""
        body = body_of(self.draw, self.prompts)
        chosen: dict[str, Any] = {name: body[name] for name in ("model", "temperature", "n", "stop") if name in body}
        chosen["max_tokens"] = min(body["max_tokens"], 40)  # the template takes some of the context
        message = {"role": "user", "content": self.draw.choice(self.prompts)}
        return await self._answered("/v1/chat/completions", chosen | {"messages": [message]})

    async def _answered(self, path: str, body: Mapping[str, Any]) -> int:
        answer = await self.client.post(path, json=body)
        if answer.status_code != 200:
            self.outcomes.blame(f"{path} {body}: {answer.status_code} {answer.text}")
        return int(answer.status_code)

    async def streamed(self) -> int:
        """An answer as it is written, to its end."""
        body = body_of(self.draw, self.prompts) | {"stream": True, "stream_options": {"include_usage": True}}
        async with self.client.stream("POST", "/v1/completions", json=body) as answer:
            lines = [line async for line in answer.aiter_lines() if line]
        wrong = error_of(lines)
        if answer.status_code != 200 or wrong or lines[-1:] != ["data: [DONE]"]:
            self.outcomes.blame(f"streamed {body}: {answer.status_code} {wrong or lines[-1:]}")
        return int(answer.status_code)

    async def cancelled(self) -> int:
        """Gives up on an answer after a moment; one that came before must be right."""
        body = body_of(self.draw, self.prompts) | {"max_tokens": 100, "ignore_eos": True}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.draw.uniform(0.01, 1.0)):
                return await self._answered("/v1/completions", body)
        return 0

    async def left(self) -> int:
        """Leaves a stream after a few pieces."""
        body = body_of(self.draw, self.prompts) | {"max_tokens": 100, "ignore_eos": True, "stream": True}
        pieces = self.draw.randint(1, 20)
        async with self.client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                self.outcomes.blame(f"left {body}: {answer.status_code}")
            async for line in answer.aiter_lines():
                wrong = error_of([line])
                if wrong:
                    self.outcomes.blame(f"left {body}: {wrong}")
                pieces -= 1
                if pieces <= 0:
                    break
        return 0

    async def hung_up(self) -> int:
        """Says more than it sends, and goes; or sends all and goes."""
        body = json.dumps(body_of(self.draw, self.prompts)).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode()
        _, writer = await asyncio.open_connection(HOST, self.server.port)
        writer.write((head + body)[: self.draw.randint(1, len(head) + len(body))])
        with contextlib.suppress(OSError):
            await writer.drain()
        await asyncio.sleep(self.draw.uniform(0.0, 0.3))
        writer.close()
        return 0

    async def nonsense(self) -> int:
        """What is no request; must be told so."""
        body, what = malformed(self.draw)
        answer = await self.client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        if not 400 <= answer.status_code < 500:
            self.outcomes.blame(f"malformed, {what}: {answer.status_code} {answer.text}")
        return int(answer.status_code)


# ---- the soak


def visit(server: Server, settings: Settings, seconds: float, seed: int, outcomes: Outcomes) -> None:
    """So many seconds of visits."""
    asyncio.run(_visit(server, settings, seconds, seed, outcomes))


async def _visit(server: Server, settings: Settings, seconds: float, seed: int, outcomes: Outcomes) -> None:
    prompts = prompts_of_zoo()
    until = time.monotonic() + seconds
    async with client_of(server) as client:
        draws = [random.Random(f"{seed}/{number}") for number in range(settings.visitors)]
        await asyncio.gather(*(Visitor(server, client, prompts, outcomes, draw).stay(until) for draw in draws))


def client_of(server: Server) -> httpx.AsyncClient:
    """An HTTP client without limits of its own."""
    return httpx.AsyncClient(base_url=server.root, timeout=TIME_LIMIT, limits=httpx.Limits(max_connections=None))


def prompts_of_zoo() -> list[str]:
    """Prompts of every task: short ones, and long ones of two items."""
    from trimtab.zoo import TASKS, load_items

    items = [item for task in TASKS for item in load_items(task)[:50]]
    return [item.prompt for item in items] + [f"{item.prompt}{item.target}\n{item.prompt}" for item in items[::5]]


def soak(server: Server, settings: Settings, progress: Callable[[str], None]) -> dict[str, Any]:
    """Everything in turn; returns what was found and the checks."""
    outcomes, checks = Outcomes(), list[Check]()
    progress(f"warm-up, {settings.warm_up:g} s")
    visit(server, settings, settings.warm_up, settings.seed, outcomes)
    quiet(server)
    before = memory_of(server)
    looks, left = [(0.0, before)], dict[str, float]()
    for number in range(1, LOOKS + 1):
        progress(f"soak, part {number} of {LOOKS}, {settings.seconds / LOOKS:g} s; {looks[-1][1] / 2**20:.0f} MiB")
        visit(server, settings, settings.seconds / LOOKS, settings.seed + 1 + number, outcomes)
        left = quiet(server)
        looks.append((settings.seconds * number / LOOKS, memory_of(server)))
    after = looks[-1][1]
    for name in (RUNNING, WAITING, CACHE):
        checks.append(Check(f"{name} afterwards", f"{left[name]:g}", "0", left[name] == 0))
    checks.append(memory_check(before, after))
    checks.append(Check("wrong answers", str(outcomes.wrong_count), "0", outcomes.wrong_count == 0))
    if settings.most_requests:
        progress("more requests than it takes")
        checks += fill_up(server, settings.most_requests)
        quiet(server)
    answered = server.process.poll() is None and answers(server)
    checks.append(Check("answers afterwards", "yes" if answered else "no", "yes", answered))
    return {
        "settings": asdict(settings),
        "requests": sum(outcomes.statuses.values()) + outcomes.wrong_count,
        "statuses": dict(sorted(outcomes.statuses.items())),
        "wrong": outcomes.wrong,
        "memory_mib": [[round(seconds, 1), round(found / 2**20, 1)] for seconds, found in looks],
        "checks": [asdict(check) for check in checks],
    }


def quiet(server: Server) -> dict[str, float]:
    """The engine's gauges, as soon as nothing is under way; as they are where that takes too long."""
    end = time.monotonic() + QUIET_WITHIN
    while True:
        found = server.metrics()
        gauges = {name: found[name] for name in (RUNNING, WAITING, CACHE)}
        if not any(gauges.values()) or time.monotonic() > end:
            return gauges
        time.sleep(0.5)


def memory_of(server: Server) -> int:
    """Memory of a quiet server, bytes: the least of some looks."""
    looks = []
    for _ in range(SAMPLES):
        time.sleep(0.5)
        looks.append(server.memory_bytes())
    return min(looks)


def memory_check(before: int, after: int) -> Check:
    """Growth within the target."""
    found = f"{after / before:.3f} of {before / 2**20:.0f} MiB"
    return Check("memory afterwards", found, f"<= {GROWTH}", after <= GROWTH * before)


def fill_up(server: Server, most: int) -> list[Check]:
    """Twice as many as the server takes, then as many as it takes: one too many is told so, and no slot is lost."""
    crowd = asyncio.run(_crowd(server, 2 * most))
    told = Counter(status for status, _, _ in crowd)
    refused = [(seconds, retry) for status, retry, seconds in crowd if status == 503]
    slowest = max((seconds for seconds, _ in refused), default=0.0)
    full = Counter(status for status, _, _ in asyncio.run(_crowd(server, most)))
    is_told = set(told) == {200, 503} and told[200] >= most and all(retry for _, retry in refused)
    return [
        Check(f"{2 * most} at once", str(dict(told)), f"{most} or more 200, others 503 with Retry-After", is_told),
        Check("slowest refusal", f"{slowest:.1f} s", f"<= {REFUSED_WITHIN:g} s", slowest <= REFUSED_WITHIN),
        Check(f"{most} at once", str(dict(full)), "all 200: no slot was lost", set(full) == {200}),
    ]


async def _crowd(server: Server, count: int) -> list[tuple[int, bool, float]]:
    """So many long requests at once: (status, whether there is a Retry-After, seconds)."""
    async with client_of(server) as client:

        async def ask() -> tuple[int, bool, float]:
            started = time.monotonic()
            body = {"model": MODEL, "prompt": "Q: a", "max_tokens": 40, "ignore_eos": True}
            answer = await client.post("/v1/completions", json=body)
            return answer.status_code, "retry-after" in answer.headers, time.monotonic() - started

        return list(await asyncio.gather(*(ask() for _ in range(count))))


def answers(server: Server) -> bool:
    """Whether it still does what it is there for."""
    return [status for status, _, _ in asyncio.run(_crowd(server, 1))] == [200]


def command(directory: Path, settings: Settings) -> list[str]:
    """`trimtab serve`, with a key-value cache that the warm-up fills, so that memory shows what is kept for ever.

    Pages of the key-value cache that were never touched take no memory: there are few.
    """
    words = [served.tool("trimtab"), "serve", str(directory), "--served-model-name", MODEL]
    words += ["--max-requests", str(settings.most_requests), "--speculate", str(settings.drafted)]
    words += ["--draft", EXPERTS[0]] if settings.drafted else []
    words += ["--max-num-batched-tokens", str(settings.step_tokens)] if settings.step_tokens else []
    return [*words, "--max-num-seqs", "32", "--num-gpu-blocks-override", "48"]


def write_fused(directory: Path) -> None:
    """A fused directory of the zoo."""
    from trimtab import FusedCausalLM
    from trimtab.models.opening import quiet_bars

    with quiet_bars():
        fused = FusedCausalLM.from_members("zoo:strong", "zoo:small", {task: f"zoo:small/{task}" for task in EXPERTS})
    fused.save_pretrained(directory)
