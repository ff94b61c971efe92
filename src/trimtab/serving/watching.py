"""In the API process: every request's own settings are checked before the engine sees it, and the tokens of traced ones
are remembered, so that their traces can be told token by token."""

from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind

from trimtab.core.errors import InputError
from trimtab.logits.strategy import Strategy
from trimtab.serving.requests import TRACE_KEY, read_settings
from trimtab.serving.traces import REQUESTS_KEPT
from trimtab.serving.worker import key_of


@dataclass
class Watched:
    """What a traced request has said so far.

    prompt_tokens   how many tokens its prompt has
    choices         {number of the choice: token ids}
    """

    prompt_tokens: int = 0
    choices: dict[int, list[int]] = field(default_factory=dict)


class SteeredEngine:
    """vLLM's engine client, with settings per request."""

    def __init__(self, engine: Any, strategy: Strategy) -> None:
        """
        engine     an `EngineClient`; its `generate` is wrapped, since everything that serves holds this object already
        strategy   the directory's, with the names of its experts
        """
        self.engine = engine
        self.strategy = strategy
        self._watched: OrderedDict[str, Watched] = OrderedDict()
        self._generate = engine.generate
        engine.generate = self.generate

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any) -> Any:
        """As the engine's; raises VLLMValidationError, which is answered with 400, for settings that cannot be.

        No generator itself: it raises when called, before the answer to a streaming request has begun.
        """
        try:
            asked = read_settings(getattr(sampling_params, "extra_args", None), self.strategy)
        except InputError as error:
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from error
        if asked.trace is not None:
            sampling_params = sampling_params.clone()
            sampling_params.extra_args = {**sampling_params.extra_args, "trace": TRACE_KEY + request_id}
        outputs = self._generate(prompt, sampling_params, request_id, *args, **kwargs)
        if getattr(sampling_params, "structured_outputs", None) is not None:
            outputs = _blame_grammar(outputs)
        if asked.trace is not None:
            is_new_only = sampling_params.output_kind == RequestOutputKind.DELTA
            outputs = _watch(outputs, self._watched_anew(request_id), is_new_only)
        return outputs

    def _watched_anew(self, request_id: str) -> Watched:
        watched = self._watched[request_id] = Watched()
        while len(self._watched) > REQUESTS_KEPT:
            self._watched.popitem(last=False)
        return watched

    async def trace(self, response_id: str, timeout: float) -> list[dict[str, Any]]:
        """The choices of a traced response so far: [{"request", "index", "tokens": [...]}]; empty if it is unknown.

        response_id   the `id` of an answer, which stands for one request per prompt
        timeout       seconds to wait for the workers
        """
        found = []
        for request, watched in list(self._watched.items()):
            if request != response_id and not _is_part(request, response_id):
                continue
            for index, token_ids in sorted(watched.choices.items()):
                key = key_of(TRACE_KEY + request, f"{index}_")
                answers = await self.engine.collective_rpc(
                    "trimtab_trace", timeout=timeout, args=(key, watched.prompt_tokens - 1)
                )
                steps: list[dict[str, Any]] = max(answers, key=len, default=[])
                tokens = [
                    {"token_id": token, "token": self._text(token), **step}
                    for token, step in zip(token_ids, steps, strict=False)  # the engine is ahead of what was sent
                ]
                found.append({"request": request, "index": index, "tokens": tokens})
        return found

    def _text(self, token: int) -> str:
        tokenizer = self.engine.renderer.tokenizer
        return str(token) if tokenizer is None else str(tokenizer.decode([token]))


def _is_part(request: str, response_id: str) -> bool:
    """Whether a request is one prompt of a response: its id, and the prompt's number."""
    head, _, number = request.rpartition("-")
    return head == response_id and number.isdigit()


async def _blame_grammar(outputs: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Tells the client whose grammar allows no text; vLLM 0.32 would answer 500."""
    async for output in outputs:
        if any(choice.finish_reason == "error" for choice in output.outputs):
            raise VLLMValidationError(
                "the structured output cannot be met: its grammar allows no token here.",
                parameter="structured_outputs",
            )
        yield output


async def _watch(outputs: AsyncIterator[Any], watched: Watched, is_new_only: bool) -> AsyncIterator[Any]:
    async for output in outputs:
        watched.prompt_tokens = watched.prompt_tokens or len(output.prompt_token_ids or ())
        for choice in output.outputs:
            said = watched.choices.get(choice.index, []) if is_new_only else []
            watched.choices[choice.index] = said + list(choice.token_ids)
        yield output
