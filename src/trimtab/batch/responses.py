"""OpenAI response bodies, as vLLM's server writes them: chat.completion and text_completion."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.batch.requests import Request

LOWEST_LOGPROB = -9999.0  # in place of minus infinity, which JSON cannot hold; vLLM's number


@dataclass(frozen=True)
class TokenScore:
    """The log-probability of a written token, and of the likeliest ones in its place, likeliest first, in nats.

    They are those of the fused distribution, before temperature, penalties and cut-offs.
    """

    token_id: int
    logprob: float
    top: Mapping[int, float]


@dataclass(frozen=True)
class Written:
    """One text.

    num_tokens      generated ones, the end included
    finish_reason   "stop" or "length"
    stop_reason     the stop text or the stop token that ended it; None otherwise
    scores          one per generated token; None if not asked for
    """

    text: str
    num_tokens: int
    finish_reason: str
    stop_reason: str | int | None = None
    scores: Sequence[TokenScore] | None = None


def body_of(
    request: Request, texts: Sequence[Sequence[Written]], prompt_tokens: Sequence[int], model: str, tokenizer: Any
) -> dict[str, Any]:
    """The response to a request.

    texts           per prompt its n texts
    prompt_tokens   per prompt how many tokens it has
    """
    choice = _chat_choice if request.is_chat else _completion_choice
    written = [text for of_prompt in texts for text in of_prompt]
    completion = sum(text.num_tokens for text in written)
    return {
        "id": f"{'chatcmpl' if request.is_chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": "chat.completion" if request.is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": index,
                **choice(text, tokenizer),
                "finish_reason": text.finish_reason,
                "stop_reason": text.stop_reason,
            }
            for index, text in enumerate(written)
        ],
        "usage": {
            "prompt_tokens": sum(prompt_tokens),
            "completion_tokens": completion,
            "total_tokens": sum(prompt_tokens) + completion,
        },
    }


def _chat_choice(written: Written, tokenizer: Any) -> dict[str, Any]:
    logprobs = None
    if written.scores is not None:
        logprobs = {
            "content": [
                {
                    **_token(tokenizer, score.token_id, score.logprob),
                    "top_logprobs": [_token(tokenizer, token_id, logprob) for token_id, logprob in score.top.items()],
                }
                for score in written.scores
            ]
        }
    return {"message": {"role": "assistant", "content": written.text}, "logprobs": logprobs}


def _token(tokenizer: Any, token_id: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([token_id])
    return {"token": text, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(text.encode(errors="replace"))}


def _completion_choice(written: Written, tokenizer: Any) -> dict[str, Any]:
    if written.scores is None:
        return {"text": written.text, "logprobs": None}
    tokens = [tokenizer.decode([score.token_id]) for score in written.scores]
    offsets = [0]
    for token in tokens[:-1]:
        offsets.append(offsets[-1] + len(token))
    return {
        "text": written.text,
        "logprobs": {
            "tokens": tokens,
            "token_logprobs": [max(score.logprob, LOWEST_LOGPROB) for score in written.scores],
            # The written token stands among the likely ones, as the interface has it.
            "top_logprobs": [
                {
                    tokenizer.decode([token_id]): max(logprob, LOWEST_LOGPROB)
                    for token_id, logprob in {**score.top, score.token_id: score.logprob}.items()
                }
                for score in written.scores
            ],
            "text_offset": offsets[: len(tokens)],
        },
    }
