"""What a row of an OpenAI batch file asks for: read, checked, and made definite. Fields that would change the output
and are not known here are refused, never ignored.

The form is that of `vllm run-batch` and of OpenAI's batches: {"custom_id", "method", "url", "body"}.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from math import inf
from typing import Any

from trimtab.batch.rows import as_json
from trimtab.core.errors import BadSetting
from trimtab.models.conversations import ChatArguments, checked_messages

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
URLS = (CHAT, COMPLETIONS)
INT64 = 2**63
MOST_TEXTS = 128  # n, as in OpenAI's interface
MOST_LOGPROBS = 20
COMPLETION_TOKENS = 16  # max_tokens of a completion that names none, as in OpenAI's interface

Prompt = str | tuple[int, ...] | tuple[dict[str, Any], ...]  # a text, token ids, or a conversation


@dataclass(frozen=True)
class Sampling:
    """How texts are drawn; rows of which all this is equal can be generated together.

    max_tokens   None: as many as the context holds
    temperature  0 takes the likeliest token
    top_k        0: all tokens
    logprobs     how many likely tokens are reported at each step; None: no log-probabilities at all
    schema       JSON schema that the text must follow, as text; "" for any JSON object; None: no such demand
    """

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    schema: str | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0


@dataclass(frozen=True)
class Request:
    """A checked request: its prompts (chat: one conversation, and how it is rendered) and how to go on from each."""

    is_chat: bool
    model: str | None
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    chat: ChatArguments = field(default_factory=ChatArguments)


# name -> (type, lowest, highest); a lowest bound in OPEN is not reached.
NUMBERS: dict[str, tuple[type, float, float]] = {
    "n": (int, 1, MOST_TEXTS),
    "min_tokens": (int, 0, inf),
    "temperature": (float, 0, 1e6),
    "top_p": (float, 0, 1),
    "top_k": (int, -1, inf),
    "min_p": (float, 0, 1),
    "repetition_penalty": (float, 0, 1e6),
    "presence_penalty": (float, -2, 2),
    "frequency_penalty": (float, -2, 2),
    "seed": (int, -INT64, INT64 - 1),
}
COLDEST = 1e-6  # temperatures that are not 0: logits divided by less than that may be beyond float32
LENGTHS = ("max_tokens", "max_completion_tokens")
OPEN = ("top_p", "repetition_penalty")
OWN = {
    CHAT: (
        *("messages", "max_completion_tokens", "top_logprobs"),
        *("tools", "documents", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"),
    ),
    COMPLETIONS: ("prompt",),
}
SHARED = (*NUMBERS, "max_tokens", "model", "stop", "stop_token_ids", "ignore_eos", "logprobs", "response_format")
# Fields that may stand there, and the values at which they change nothing (None never does).
ANY: tuple[Any, ...] = ()
IDLE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"), ANY),
    **dict.fromkeys(("request_id", "session_id", "cache_salt", "priority", "parallel_tool_calls"), ANY),
    **dict.fromkeys(("stream", "echo", "use_beam_search", "include_stop_str_in_output"), (False,)),
    **dict.fromkeys(("continue_final_message", "return_token_ids", "watermarking"), (False,)),
    **dict.fromkeys(("tools", "functions", "bad_words", "documents", "allowed_token_ids", "modalities"), ([],)),
    **dict.fromkeys(("logit_bias", "chat_template_kwargs"), ({},)),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens", "add_generation_prompt"), (True,)),
    "tool_choice": ("none", "auto"),  # what the model writes is its text, calls of tools included
    "function_call": ("none",),
    **dict.fromkeys(("suffix", "stream_options", "prompt_logprobs", "structured_outputs", "chat_template"), ("",)),
    "length_penalty": (1,),
    "best_of": (1,),
}


MESSAGE = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")


# What `generate` of transformers cannot follow as vLLM does.
TRANSFORMERS_LACKS = ("presence_penalty", "frequency_penalty", "ignore_eos", "response_format")


def read_request(
    content: Mapping[str, Any],
    without: Collection[str] = (),
    engine: str = "",
    defaults: Mapping[str, Any] | None = None,
) -> Request:
    """The request of a row's {"url", "body"}.

    without   fields that the engine cannot follow
    engine    its name, for messages
    defaults  numbers for what a request leaves out, see `sampling_defaults`
    raises    BadSetting, naming field, value, and what to do
    """
    url, body = content["url"], content["body"]
    check_fields(url, body)
    for name in without:
        if body.get(name) is not None and body[name] not in (0, False) and not _is_plain_format(body[name]):
            raise BadSetting(
                f"{name} is {_shown(body[name])}, which the {engine} engine cannot follow.",
                "It would change the text, so it is not ignored.",
                "leave it out, or run the batch with --engine vllm.",
            )
    is_chat = url == CHAT
    given = {**(defaults or {}), **{name: value for name, value in body.items() if value is not None}}
    numbers = {name: _number(name, given[name]) for name in NUMBERS if name in given}
    if numbers.get("top_k") == -1:
        numbers["top_k"] = 0
    if numbers.get("seed") == -1:  # vLLM's word for none
        del numbers["seed"]
    sampling = Sampling(
        **numbers,
        max_tokens=_length(body, is_chat),
        stop=_stops(body.get("stop")),
        stop_token_ids=_token_ids("stop_token_ids", body.get("stop_token_ids") or []),
        ignore_eos=_flag(body, "ignore_eos"),
        logprobs=_logprobs(body, is_chat),
        schema=_schema(body.get("response_format")),
    )
    if sampling.is_greedy and sampling.n > 1:
        raise BadSetting(
            f"n is {sampling.n} at temperature 0.", "All texts would be the same.", "set a temperature, or n to 1."
        )
    prompts = (_messages(body.get("messages")),) if is_chat else _prompts(body.get("prompt"))
    return Request(is_chat, _model(body.get("model")), prompts, sampling, _chat(body) if is_chat else ChatArguments())


def _chat(body: Mapping[str, Any]) -> ChatArguments:
    """How the conversation is rendered, with the fields and defaults of vLLM: by default a new turn is opened."""
    values = body.get("chat_template_kwargs") or {}
    if not isinstance(values, dict):
        raise BadSetting(f"chat_template_kwargs is {_shown(values)}.", 'Expected: {"NAME": VALUE}.', "correct it.")
    opens = body.get("add_generation_prompt")
    asked: dict[str, Any] = {
        "add_generation_prompt": True if opens is None else _flag(body, "add_generation_prompt"),
        "continue_final_message": _flag(body, "continue_final_message"),
    }
    for name in ("tools", "documents"):
        listed = body.get(name) or []
        if not isinstance(listed, list) or not all(isinstance(part, dict) for part in listed):
            raise BadSetting(f"{name} is {_shown(listed)}.", "Expected: a list of objects.", "correct it.")
        asked |= {name: listed} if listed else {}
    return ChatArguments.of({**asked, **values})


def check_fields(url: str, body: Mapping[str, Any]) -> None:
    """Raises BadSetting for a field that is unknown, or known and not offered."""
    known = (*SHARED, *OWN[url])
    for name, value in body.items():
        if name in known or value is None or (name in IDLE and (IDLE[name] == ANY or value in IDLE[name])):
            continue
        if name in IDLE:
            raise BadSetting(
                f"{name} is {_shown(value)}, which trimtab does not offer in batches.",
                "It would change the answer, so it is not ignored.",
                "leave it out.",
            )
        near = get_close_matches(name, (*known, *IDLE), n=1)
        raise BadSetting(
            f"{url} knows no field '{name}'.",
            "A field that is not known may change the answer, so it is not ignored.",
            f"did you mean '{near[0]}'?" if near else "leave it out.",
        )


def _shown(value: Any) -> str:
    text = as_json(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_plain_format(value: Any) -> bool:
    return bool(value == {"type": "text"})


def _number(name: str, value: Any) -> Any:
    kind, low, high = NUMBERS[name]
    is_kind = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not is_kind or not low <= value <= high or (name in OPEN and value == low):
        noun = "a whole number" if kind is int else "a number"
        bounds = f"{'above' if name in OPEN else 'of at least'} {low:g}" + (f", at most {high:g}" if high < inf else "")
        raise BadSetting(f"{name} is {_shown(value)}.", f"Expected: {noun} {bounds}.", "correct it, or leave it out.")
    if name == "temperature" and 0 < value < COLDEST:
        raise BadSetting(f"temperature is {value}.", f"Expected: 0, or at least {COLDEST:g}.", "0 is greedy.")
    return kind(value)


def _model(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise BadSetting(f"model is {_shown(value)}.", "Expected: a name.", "correct it, or leave it out.")
    return value


def _length(body: Mapping[str, Any], is_chat: bool) -> int | None:
    given = {name: body[name] for name in LENGTHS if body.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BadSetting(f"{name} is {_shown(value)}.", "Expected: a whole number of at least 1.", "correct it.")
    # The newer name wins, as in vLLM.
    default = None if is_chat else COMPLETION_TOKENS
    return given.get("max_completion_tokens", given.get("max_tokens", default))


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise BadSetting(
            f"stop is {_shown(value)}.", "Expected: a text, or a list of texts, none empty.", "correct it."
        )
    return tuple(stops)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in value):
        raise BadSetting(f"{name} is {_shown(value)}.", "Expected: a list of token ids.", "correct it.")
    return tuple(value)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name) or False
    if not isinstance(value, bool):
        raise BadSetting(f"{name} is {_shown(value)}.", "Expected: true or false.", "correct it.")
    return value


def _logprobs(body: Mapping[str, Any], is_chat: bool) -> int | None:
    """Chat says {"logprobs": true, "top_logprobs": k}, completions say {"logprobs": k}."""
    if is_chat and not _flag(body, "logprobs"):
        if body.get("top_logprobs"):
            raise BadSetting(
                f"top_logprobs is {_shown(body['top_logprobs'])} without logprobs.",
                "Log-probabilities were not asked for.",
                'add "logprobs": true.',
            )
        return None
    name = "top_logprobs" if is_chat else "logprobs"
    count = body.get(name)
    if count is None:
        return 0 if is_chat else None
    if type(count) is not int or not 0 <= count <= MOST_LOGPROBS:
        raise BadSetting(f"{name} is {_shown(count)}.", f"Expected: 0 to {MOST_LOGPROBS}.", "correct it.")
    return count


def _schema(value: Any) -> str | None:
    if value is None or _is_plain_format(value):
        return None
    if value == {"type": "json_object"}:
        return ""
    schema = value.get("json_schema") if isinstance(value, dict) and value.get("type") == "json_schema" else None
    if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
        raise BadSetting(
            f"response_format is {_shown(value)}.",
            'Expected: {"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": '
            '{"schema": {...}}}.',
            "correct it.",
        )
    return as_json(schema["schema"])


def _prompts(value: Any) -> tuple[Prompt, ...]:
    """A text, several, a list of token ids, or several of those."""
    is_ids = isinstance(value, list) and bool(value) and all(type(token) is int for token in value)
    prompts = [value] if isinstance(value, str) or is_ids else value
    if not isinstance(prompts, list) or not prompts:
        raise BadSetting(f"prompt is {_shown(value)}.", "Expected: a text, or a list of token ids.", "add a prompt.")
    return tuple(_prompt(prompt) for prompt in prompts)


def _prompt(prompt: Any) -> Prompt:
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt:
        return _token_ids("prompt", prompt)
    raise BadSetting(f"a prompt is {_shown(prompt)}.", "Expected: a text of at least one token.", "fill it.")


def _messages(value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise BadSetting(
            f"messages is {_shown(value)}.", 'Expected: [{"role": ..., "content": ...}, ...].', "add a message."
        )
    return tuple(_message(message) for message in value)


def _message(message: Any) -> dict[str, Any]:
    (found,) = checked_messages([message])
    more = [name for name in found if name not in MESSAGE and found[name] not in (None, [])]
    if more:
        raise BadSetting(
            f"a message of the {found['role']} has {', '.join(more)}.",
            f"Members read texts. Known: {', '.join(MESSAGE)}.",
            "leave it out.",
        )
    calls = found.get("tool_calls") or []
    if found.get("content") is None and not calls:
        raise BadSetting("the content of a message is null.", "Expected: a text.", "fill it.")
    kept = {name: value for name, value in found.items() if value not in (None, []) or name == "content"}
    return kept | ({"tool_calls": [_call(call) for call in calls]} if calls else {})


def _call(call: Any) -> Any:
    """A tool call as templates read it: OpenAI's interface writes the arguments as a text of JSON."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadSetting(f"a tool call is {_shown(call)}.", 'Expected: {"function": {"name": ...}}.', "correct it.")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(arguments or "{}")}}
    except ValueError as error:
        raise BadSetting(
            f"the arguments of a tool call are no JSON: {_shown(arguments)}.", fix="correct it."
        ) from error
