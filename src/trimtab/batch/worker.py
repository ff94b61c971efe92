"""The worker that answers OpenAI requests: the same reading, limits and response bodies, whatever engine writes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from trimtab.batch.requests import Prompt, Request, Sampling, read_request
from trimtab.batch.responses import Written, body_of
from trimtab.core.errors import BadSetting, ContextTooLong, UnknownName
from trimtab.models.conversations import ChatArguments, warn_of_unread
from trimtab.models.prompts import NOTHING_ASKED, PromptForm, empty_prompt
from trimtab.serving.http.defaults import PLAIN_TEMPLATE


@dataclass(frozen=True)
class Job:
    """One prompt to go on from.

    prompt     as the request gives it; token_ids: what members without a prompt of their own read
    sampling   with max_tokens made definite
    chat       how a conversation is rendered
    """

    prompt: Prompt
    token_ids: tuple[int, ...]
    sampling: Sampling
    chat: ChatArguments = NOTHING_ASKED


@runtime_checkable
class Engine(Protocol):
    """What writes texts.

    name         as --engine says it
    without      request fields that it cannot follow
    tokenizer    the fused model's
    context      tokens that all members can read; None: no limit is known
    vocab_size   tokens that are fused
    defaults     what requests get where they say nothing, from the directory's generation_config.json
    """

    name: str
    without: tuple[str, ...]
    tokenizer: Any
    context: int | None
    vocab_size: int
    defaults: Mapping[str, Any]

    def longest_prompt(self, job: Job) -> int:
        """Tokens of the longest rendering that any member reads."""
        ...

    def write(self, jobs: Sequence[Job]) -> list[list[Written] | Exception]:
        """For each job its n texts, or why there are none."""
        ...


class Answering:
    """A worker for `run`: {"url", "body"} in, an OpenAI response body out.

    model_names   what requests may call the model; the first is its own name

    Conversations for a tokenizer without a chat template are written as `trimtab serve` writes them.
    """

    def __init__(self, engine: Engine, model_names: Sequence[str]) -> None:
        self._engine = engine
        self._names = tuple(model_names)
        if engine.tokenizer.chat_template is None:
            engine.tokenizer.chat_template = PLAIN_TEMPLATE.read_text(encoding="utf-8")

    def __call__(self, contents: Sequence[Mapping[str, Any]]) -> list[Any]:
        """A response body per request, or what is wrong with it."""
        prepared: list[tuple[Request, list[Job]] | Exception] = []
        for content in contents:
            try:
                request = read_request(content, self._engine.without, self._engine.name, self._engine.defaults)
                prepared.append((request, self._jobs(request)))
            except Exception as error:  # the row's own, whatever it is: the others are still written together
                prepared.append(error)
        jobs = [job for found in prepared if not isinstance(found, Exception) for job in found[1]]
        texts = iter(self._engine.write(jobs) if jobs else [])
        return [
            found if isinstance(found, Exception) else self._answer(*found, [next(texts) for _ in found[1]])
            for found in prepared
        ]

    def _answer(self, request: Request, jobs: list[Job], texts: list[list[Written] | Exception]) -> Any:
        failure = next((found for found in texts if isinstance(found, Exception)), None)
        if failure is not None:
            return failure
        written = [found for found in texts if not isinstance(found, Exception)]
        lengths = [len(job.token_ids) for job in jobs]
        return body_of(request, written, lengths, request.model or self._names[0], self._engine.tokenizer)

    def _jobs(self, request: Request) -> list[Job]:
        """One job per prompt; raises for a model of another name, and for prompts that cannot be gone on from."""
        if request.model is not None and request.model not in self._names:
            raise UnknownName(
                f"the model '{request.model}' is not the one that runs.",
                f"Here the model is called {', '.join(self._names)}.",
                f"leave model out, or run the batch with --model-name {request.model}.",
            )
        return [self._job(prompt, request) for prompt in request.prompts]

    def _job(self, prompt: Prompt, request: Request) -> Job:
        sampling, usual = request.sampling, self._engine.defaults.get("max_tokens")
        ids = self._token_ids(prompt, request.chat)
        self._check_known("stop_token_ids", sampling.stop_token_ids)
        job = Job(prompt, ids, sampling, request.chat)
        used, context = self._engine.longest_prompt(job), self._engine.context
        if context is None and sampling.max_tokens is None and usual is None:
            raise BadSetting(
                "max_tokens is missing.",
                "The members state no longest text, so there is no default.",
                "set max_tokens.",
            )
        most = sampling.max_tokens or usual if context is None else context - used
        if most is None or most < max(1, sampling.max_tokens or 1):
            wanted = "" if sampling.max_tokens is None else f", and {sampling.max_tokens} new tokens are asked for"
            raise ContextTooLong(
                f"the prompt has {used} tokens{wanted}.",
                f"The members can read {context} tokens in all.",
                "shorten the prompt, or ask for fewer tokens.",
            )
        length = sampling.max_tokens or min(most, usual or most)
        if sampling.min_tokens > length:
            raise BadSetting(
                f"min_tokens is {sampling.min_tokens}, but there can be {length} tokens at most.", fix="lower it."
            )
        return replace(job, sampling=replace(sampling, max_tokens=length))

    def _token_ids(self, prompt: Prompt, chat: ChatArguments) -> tuple[int, ...]:
        """The tokens of a prompt: those given, a text's, or a conversation's in the chat template."""
        if isinstance(prompt, tuple) and isinstance(prompt[0], int):
            self._check_known("prompt", prompt)
            return prompt
        rendered = prompt if isinstance(prompt, str) else list(prompt)
        form = PromptForm()
        if not isinstance(prompt, str):
            warn_of_unread(chat, [form.template_for(self._engine.tokenizer, chat) or ""])
        ids = tuple(form.render(self._engine.tokenizer, rendered, chat))
        if not ids:
            raise empty_prompt("the prompt has no tokens.")
        return ids

    def _check_known(self, name: str, token_ids: Iterable[Any]) -> None:
        beyond = next((token for token in token_ids if token >= self._engine.vocab_size), None)
        if beyond is not None:
            raise BadSetting(
                f"{name} holds token {beyond}.", f"The model knows {self._engine.vocab_size} tokens.", "correct it."
            )
