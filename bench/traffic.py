"""Requests that arrive when they are due, whatever the server does, and what their senders saw.

Arrivals are a Poisson process of a fixed seed. An open loop: a sender does not wait for the answer before, so a slow
server meets a queue, as in life. Times count from when a request was due, not from when it was sent.

Every request asks for as many tokens as the item's own answer has, whatever the model would write: all servers then do
the same work, and a model that knows the task writes what it would have written.
"""

import asyncio
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.harness import Record
from bench.members import load_tokenizer
from trimtab.core.errors import TrimtabError
from trimtab.zoo import load_items

TIME_LIMIT = 300.0  # seconds for one request
END = 1  # the end of the text, which the model writes too


@dataclass(frozen=True)
class Job:
    """One request.

    at_seconds   when it is due, from the start
    tokens       that the answer must have
    """

    prompt: str
    tokens: int
    at_seconds: float


@dataclass(frozen=True)
class Answer:
    """What the sender of a request saw.

    due, sent   seconds from the start
    moments     (seconds from the start, tokens until then), one for each piece that arrived
    """

    due: float
    sent: float
    moments: tuple[tuple[float, int], ...]

    @property
    def first_token_seconds(self) -> float:
        """From when the request was due until its first token."""
        return self.moments[0][0] - self.due

    @property
    def tokens(self) -> int:
        """Tokens of the whole answer."""
        return self.moments[-1][1]

    def token_seconds(self) -> Iterator[float]:
        """For each token after the first piece: the wait for its piece, shared among the tokens that came with it."""
        for (before, had), (now, has) in zip(self.moments, self.moments[1:], strict=False):
            for _ in range(has - had):
                yield (now - before) / (has - had)


def jobs_of(task: str, count: int, rate: float, seed: int) -> list[Job]:
    """Test items of a task, drawn without repetition, as they arrive.

    rate   requests a second on average; infinity: all are due at once
    """
    draw = random.Random(seed)
    items = draw.sample(load_items(task), count)
    tokenizer = load_tokenizer()
    lengths = [len(tokenizer(item.target, add_special_tokens=False)["input_ids"]) + END for item in items]
    return [
        Job(item.prompt, length, at)
        for item, length, at in zip(items, lengths, arrivals(count, rate, draw), strict=True)
    ]


def arrivals(count: int, rate: float, draw: random.Random) -> list[float]:
    """Seconds at which requests are due: gaps are exponential, with mean 1 / rate; the first is due at once."""
    if math.isinf(rate):
        return [0.0] * count
    times = [0.0]
    for _ in range(count - 1):
        times.append(times[-1] + draw.expovariate(rate))
    return times


def send(
    url: str, model: str, jobs: Sequence[Job], most_under_way: int | None = None, key: str = "none"
) -> list[Answer]:
    """Sends the jobs when they are due, and waits for all answers.

    most_under_way   with this, requests that are due wait until fewer are under way
    raises           TrimtabError where one failed: a measurement with holes is none
    """
    return asyncio.run(_send_all(url, model, jobs, most_under_way, key))


async def _send_all(url: str, model: str, jobs: Sequence[Job], most: int | None, key: str) -> list[Answer]:
    from openai import AsyncOpenAI, OpenAIError

    slots = asyncio.Semaphore(most or len(jobs))
    async with AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=TIME_LIMIT) as client:
        start = asyncio.get_running_loop().time()
        try:
            return list(await asyncio.gather(*(_send_one(client, model, job, start, slots) for job in jobs)))
        except OpenAIError as error:
            raise TrimtabError(f"a request failed under load: {error}.", fix="look into the server's log.") from error


async def _send_one(client: Any, model: str, job: Job, start: float, slots: asyncio.Semaphore) -> Answer:
    clock = asyncio.get_running_loop().time
    await asyncio.sleep(max(0.0, start + job.at_seconds - clock()))
    moments: list[tuple[float, int]] = []
    async with slots:
        sent = clock() - start
        stream = await client.completions.create(
            model=model,
            prompt=job.prompt,
            max_tokens=job.tokens,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
            extra_body={"ignore_eos": True},
        )
        async for piece in stream:
            tokens = piece.usage.completion_tokens if piece.usage else 0
            if tokens > (moments[-1][1] if moments else 0):
                moments.append((clock() - start, tokens))
    if not moments or moments[-1][1] != job.tokens:
        raise TrimtabError(
            f"an answer has {moments[-1][1] if moments else 0} tokens.", f"Asked for: {job.tokens}.", "see its log."
        )
    return Answer(job.at_seconds, sent, tuple(moments))


def figures_of(answers: Sequence[Answer], is_open: bool = True) -> Record:
    """Throughput and waiting times of one run.

    is_open   requests were sent when due; False: they waited for their turn here, so times count from their sending
    """
    if not is_open:
        answers = [Answer(answer.sent, answer.sent, answer.moments) for answer in answers]
    seconds = max(answer.moments[-1][0] for answer in answers) - min(answer.due for answer in answers)
    firsts = [answer.first_token_seconds * 1e3 for answer in answers]
    waits = [wait * 1e3 for answer in answers for wait in answer.token_seconds()]
    tokens = sum(answer.tokens for answer in answers)
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "requests_per_second": len(answers) / seconds,
        "tokens": float(tokens),
        "ttft_ms": statistics.median(firsts),
        "ttft_p95_ms": percentile(firsts, 95),
        "itl_ms": statistics.median(waits),
        "itl_p95_ms": percentile(waits, 95),
        "itl_mean_ms": statistics.fmean(waits),
        "sent_late_ms": max(answer.sent - answer.due for answer in answers) * 1e3,
    }


def percentile(values: Sequence[float], percent: int) -> float:
    """Linear between neighbours; of one value, that value."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
