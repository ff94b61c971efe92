"""vLLM's engine client in the API process, with settings per request.

It checks each request's settings before the engine gets it, and keeps the tokens of traced requests, so that a trace
can name them.
"""

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind

from trimtab.core.errors import InputError
from trimtab.logits.strategy.fusion import Strategy
from trimtab.serving.requests import SEVERAL, TRACE_KEY, read_settings
from trimtab.serving.traces import POSITIONS_KEPT, REQUESTS_KEPT
from trimtab.serving.vllm.speculative_config import is_least_kept_too_long

SECONDS_FOR_ENGINE = 10.0  # how long a scrape or a trace waits for the workers
PART = re.compile(r"[-_][0-9]+")


@dataclass
class TracedRequest:
    """The tokens of a traced request so far.

    request         vLLM's id; a client may choose it, so two requests may have the same
    key             ours, under which the workers keep its steps; random, so that no client can choose or guess it
    prompt_tokens   how many tokens its prompt has
    choices         {number of the choice: token ids}, at most `POSITIONS_KEPT` of all choices
    lengths         {number of the choice: how many tokens it has}, those that are not kept included
    """

    request: str
    key: str = field(default_factory=lambda: TRACE_KEY + uuid4().hex)
    prompt_tokens: int = 0
    choices: dict[int, list[int]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)

    def add(self, index: int, token_ids: Sequence[int], is_new_only: bool) -> None:
        """Keeps the tokens of a choice, given those that are new, or all so far, as far as there is room."""
        kept = self.choices.setdefault(index, [])
        before = self.lengths.get(index, 0)
        new = token_ids if is_new_only else token_ids[before:]
        self.lengths[index] = before + len(new)
        room = POSITIONS_KEPT - sum(map(len, self.choices.values()))
        if len(kept) == before:  # nothing is left out yet
            kept.extend(new[: max(0, room)])


class SteeredEngine:
    """vLLM's engine client, with settings per request."""

    def __init__(self, engine: Any, strategy: Strategy) -> None:
        """
        engine     an `EngineClient`; its `generate` is wrapped, since everything that serves holds this object already
        strategy   the directory's, with the names of its experts
        """
        self.engine = engine
        self.strategy = strategy
        self._traced: deque[TracedRequest] = deque(maxlen=REQUESTS_KEPT)
        self._drafts = engine.vllm_config.speculative_config is not None
        self._generate, self._check_admission = engine.generate, engine.check_admission
        engine.generate, engine.check_admission = self.generate, self.check_admission

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """As the engine's; raises VLLMValidationError (400) for a request that no queue could take, however empty.

        vLLM would tell the client to try again later (503), before it looks whether so many choices are allowed.
        """
        most = self.engine.scheduler_config.max_num_queued_reqs
        if most is not None and n > max(most, 1):
            raise VLLMValidationError(
                f"more choices were asked for than the {most} that may be under way for all requests together; see "
                "VLLM_MAX_N_SEQUENCES and --max-num-queued-reqs.",
                parameter="n",
            )
        self._check_admission(n, request_id)

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any) -> Any:
        """As the engine's; raises VLLMValidationError, which is answered with 400, for settings that cannot be.

        No generator itself: it raises when called, before the answer to a streaming request has begun.
        """
        try:
            asked = read_settings(getattr(sampling_params, "extra_args", None), self.strategy)
        except InputError as error:
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from error
        self._check_beside_drafts(sampling_params)
        traced = None if asked.trace is None else TracedRequest(request_id)
        if traced is not None:
            sampling_params = sampling_params.clone()
            mark = traced.key + (SEVERAL if sampling_params.n > 1 else "")
            sampling_params.extra_args = {**sampling_params.extra_args, "trace": mark}
        outputs = self._generate(prompt, sampling_params, request_id, *args, **kwargs)
        if getattr(sampling_params, "structured_outputs", None) is not None:
            outputs = _name_grammar(outputs)
        if traced is not None:
            self._traced.append(traced)
            outputs = _record(outputs, traced, sampling_params.output_kind == RequestOutputKind.DELTA)
        return outputs

    def _check_beside_drafts(self, sampling_params: Any) -> None:
        """Raises VLLMValidationError for what vLLM would answer wrongly, and without a word, beside drafts."""
        least, most = getattr(sampling_params, "min_tokens", 0), getattr(sampling_params, "max_tokens", None)
        if self._drafts and is_least_kept_too_long(least, most):
            raise VLLMValidationError(
                "min_tokens is kept for too long where small members draft; leave it out, let it be max_tokens, or "
                "start the server with --speculate 0.",
                parameter="min_tokens",
            )

    async def ask_workers(self, method: str, *args: Any) -> list[Any]:
        """What every worker answers; raises TimeoutError where that takes more than `SECONDS_FOR_ENGINE`.

        vLLM gets no time limit: with one process it ignores it, and with several it would leave late answers in their
        queues, and the next call would take them for its own. So the time limit is kept here.
        """
        asked = self.engine.collective_rpc(method, timeout=None, args=args)
        answers: list[Any] = await asyncio.wait_for(asked, SECONDS_FOR_ENGINE)
        return answers

    async def trace(self, response_id: str) -> list[dict[str, Any]]:
        """The choices of a traced response so far: [{"request", "index", "tokens": [...], "is_whole"}].

        response_id   the `id` of an answer, which stands for one request per prompt. Of several answers with this id
                      all are told, the earliest first
        returns       empty if the response is unknown; is_whole: whether `tokens` has all that was said, which it has
                      not where there was no room to keep it
        raises        TimeoutError as `ask_workers`
        """
        asked = [
            (traced, index, list(token_ids), traced.lengths[index])  # as they are now: the texts may go on meanwhile
            for traced in self._traced
            if traced.request == response_id or _is_part(traced.request, response_id)
            for index, token_ids in sorted(traced.choices.items())
        ]
        if not asked:
            return []
        indices = [(traced.key, index, traced.prompt_tokens - 1) for traced, index, _, _ in asked]
        answers = await self.ask_workers("trimtab_traces", indices)
        kept = max(answers, key=lambda steps: sum(map(len, steps)))  # processes that get no logits keep nothing
        found = []
        for (traced, index, token_ids, said), steps in zip(asked, kept, strict=True):
            tokens = [
                {"token_id": token, "token": self._text(token), **step}
                for token, step in zip(token_ids, steps, strict=False)  # the engine is ahead of what was sent
            ]
            is_whole = len(tokens) == said
            found.append({"request": traced.request, "index": index, "tokens": tokens, "is_whole": is_whole})
        return found

    def _text(self, token: int) -> str:
        tokenizer = self.engine.renderer.tokenizer
        return str(token) if tokenizer is None else str(tokenizer.decode([token]))


def _is_part(request: str, response_id: str) -> bool:
    """Whether a request is one prompt of a response: its id, and the prompt's number.

    vLLM names the prompts of a completion ID-0, ID-1, those of chats in a batch and the turns of a response ID_0, ID_1.
    """
    return request.startswith(response_id) and PART.fullmatch(request, len(response_id)) is not None


async def _name_grammar(outputs: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Raises a client error if the grammar allows no text; vLLM would answer 500."""
    async for output in outputs:
        if any(choice.finish_reason == "error" for choice in output.outputs):
            raise VLLMValidationError(
                "the structured output cannot be met: its grammar allows no token here.",
                parameter="structured_outputs",
            )
        yield output


async def _record(outputs: AsyncIterator[Any], traced: TracedRequest, is_new_only: bool) -> AsyncIterator[Any]:
    async for output in outputs:
        traced.prompt_tokens = traced.prompt_tokens or len(output.prompt_token_ids or ())
        for choice in output.outputs:
            traced.add(choice.index, choice.token_ids, is_new_only)
        yield output
