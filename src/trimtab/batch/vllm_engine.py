"""Requests answered by vLLM on a fused directory, in this process: one `vllm.LLM` per worker.

The engine core runs in the worker's own process, so that a killed worker leaves nothing behind.
"""

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.batch.requests import Sampling
from trimtab.batch.responses import TokenScore, Written
from trimtab.batch.rows import BrokenWorker
from trimtab.batch.worker import Job
from trimtab.core.errors import BadSetting, TrimtabError
from trimtab.models import vocabulary

# Read by vLLM when it is imported. Two workers that bind their threads would bind them to the same processors.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for results
    "VLLM_NO_USAGE_STATS": "1",
}
WHOLE = ("stop", "length")  # how a text ends that is as it was asked for
LONGEST_MESSAGE = 500  # characters of what vLLM says about a request


class VllmEngine:
    """vLLM on the fused model of a directory.

    options   further arguments of `vllm.LLM`
    """

    name = "vllm"
    without: tuple[str, ...] = ()

    def __init__(self, directory: Path, dtype: str | None, options: Mapping[str, Any]) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import torch
        from vllm import LLM

        defaults = {
            "dtype": dtype or "auto",
            # Compiling pays on a GPU; on a CPU it would take longer than most batches.
            "enforce_eager": not torch.cuda.is_available(),
            # Rows without a seed of their own: workers shall not draw alike.
            "seed": secrets.randbits(31),
        }
        self._llm = LLM(str(directory), **{**defaults, **options})
        self.tokenizer = vocabulary.load_tokenizer(directory)
        config = self._llm.llm_engine.model_config
        self.context: int | None = config.max_model_len
        self.vocab_size: int = config.hf_config.vocab_size
        self.defaults: Mapping[str, Any] = config.get_diff_sampling_param()

    def longest_prompt(self, job: Job) -> int:
        """Tokens of the prompt: all members read the same."""
        return len(job.token_ids)

    def write(self, jobs: Sequence[Job]) -> list[list[Written] | Exception]:
        """For each job its n texts; BadSetting for what vLLM refuses, TrimtabError for what it gave up.

        raises    BrokenWorker where the engine fails: what it still held would get into later answers
        """
        refusals = [self._enqueue(job) for job in jobs]
        try:
            outputs = self._llm.wait_for_completion(use_tqdm=False)
        except Exception as error:
            raise _broken(error) from error
        if len(outputs) != refusals.count(None):
            raise BrokenWorker(f"vLLM took {refusals.count(None)} requests and answered {len(outputs)}.")
        found = iter(outputs)
        return [
            _answer(job.sampling, next(found).outputs) if refusal is None else refusal
            for job, refusal in zip(jobs, refusals, strict=True)
        ]

    def _enqueue(self, job: Job) -> BadSetting | None:
        """Hands a job over; returns why vLLM does not take it.

        One at a time, so that a job that is refused leaves the others together: outputs come in the order of those
        that were taken.
        """
        from vllm.exceptions import VLLMClientError

        engine = self._llm.llm_engine
        held = engine.get_num_unfinished_requests()
        try:
            self._llm.enqueue({"prompt_token_ids": list(job.token_ids)}, _params(job.sampling), use_tqdm=False)
        except (VLLMClientError, ValueError, TypeError, OverflowError) as error:
            if engine.get_num_unfinished_requests() != held:  # half taken: it would be waited for without end
                raise _broken(error) from error
            return BadSetting(
                f"vLLM refuses the request: {_cut(str(error))}", "It is checked before anything is written.", "mend it."
            )
        except Exception as error:
            raise _broken(error) from error
        return None


def _broken(error: Exception) -> BrokenWorker:
    return BrokenWorker(f"vLLM failed: {type(error).__name__}: {error}")


def _cut(text: str) -> str:
    """Some of vLLM's messages repeat the whole request."""
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}..."


def _answer(sampling: Sampling, outputs: Sequence[Any]) -> list[Written] | TrimtabError:
    """The texts of a job, or why one of them is not whole."""
    reason = next((output.finish_reason for output in outputs if output.finish_reason not in WHOLE), None)
    if reason is None:
        return [_written(output, sampling) for output in outputs]
    if reason == "error" and sampling.schema is not None:
        return BadSetting(
            "response_format cannot be met: vLLM can make no grammar of it, or one that allows no token.",
            "Expected: a schema that some text follows.",
            "correct it.",
        )
    return TrimtabError(
        f"vLLM ended a text with '{reason}'.", "A whole text ends with 'stop' or 'length'.", "ask for it again."
    )


def _params(sampling: Sampling) -> Any:
    """vLLM's own settings; raises VLLMValidationError, ValueError or TypeError for what it refuses."""
    import json

    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    structured = None
    if sampling.schema is not None:
        structured = StructuredOutputsParams(
            **({"json": json.loads(sampling.schema)} if sampling.schema else {"json_object": True})
        )
    names = (
        "n",
        "max_tokens",
        "min_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "ignore_eos",
        "logprobs",
        "seed",
    )
    penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    return SamplingParams(
        **{name: getattr(sampling, name) for name in (*names, *penalties)},
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        structured_outputs=structured,
    )


def _written(output: Any, sampling: Sampling) -> Written:
    scores = None
    if sampling.logprobs is not None:
        scores = [
            _score(token, found, sampling.logprobs)
            for token, found in zip(output.token_ids, output.logprobs, strict=True)
        ]
    return Written(output.text, len(output.token_ids), output.finish_reason, output.stop_reason, scores)


def _score(token: int, found: Mapping[int, Any], most: int) -> TokenScore:
    """vLLM adds the written token to the likeliest ones; only those of the first ranks were asked for."""
    likely = sorted(found.items(), key=lambda item: item[1].rank)[:most]
    return TokenScore(token, found[token].logprob, {token_id: entry.logprob for token_id, entry in likely})
