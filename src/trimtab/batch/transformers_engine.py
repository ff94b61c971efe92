"""Requests answered by the transformers engine: `FusedCausalLM.generate`, by drafts where the directory asks for them.

`generate` knows one set of settings and one random state per call, so rows of equal settings are generated together,
and a row that draws with a seed of its own is generated alone: its text depends on nothing else.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from trimtab.batch.requests import TRANSFORMERS_LACKS
from trimtab.batch.responses import TokenScore, Written
from trimtab.batch.stop_strings import StopTexts, first_stop
from trimtab.batch.worker import Job
from trimtab.core.errors import BadSetting, InputError
from trimtab.logits import generation_settings
from trimtab.logits.model import FusedCausalLM
from trimtab.models.prompts import left_padded

# MemberLogProbs of all steps are kept where log-probabilities are asked for: at most this many numbers in one call.
LAW_NUMBERS = 2**27


class TransformersEngine:
    """The fused model of a directory in this process."""

    name = "transformers"
    without: tuple[str, ...] = TRANSFORMERS_LACKS

    def __init__(
        self,
        directory: Path,
        dtype: str | None = None,
        device: str | None = None,
        strategy: Mapping[str, Any] | None = None,
    ) -> None:
        if device is not None:
            _check_device(device)
        options = {"dtype": None if dtype is None else getattr(torch, dtype), "device": device, "strategy": strategy}
        self._fused = FusedCausalLM.from_pretrained(directory, **{k: v for k, v in options.items() if v is not None})
        self.tokenizer = self._fused.tokenizer
        self.context: int | None = self._fused.config.max_position_embeddings
        self.vocab_size: int = self._fused.config.vocab_size
        self.defaults: Mapping[str, Any] = generation_settings.sampling_defaults(self._fused.generation_config)
        # A fresh process starts with torch's one default seed: all workers would draw alike.
        torch.seed()

    def longest_prompt(self, job: Job) -> int:
        """Tokens of the longest rendering that any member reads."""
        if not self._fused.has_own_prompts:
            return len(job.token_ids)
        mask = self._encoded([job])["member_prompt_mask"]  # [1, member, time]
        return int(mask.sum(dim=-1).max())

    def write(self, jobs: Sequence[Job]) -> list[list[Written] | Exception]:
        """For each job its n texts; a group of jobs that fails is tried job by job."""
        found: dict[int, list[Written] | Exception] = {}
        for indices in self._groups(jobs):
            found |= zip(indices, self._attempt([jobs[index] for index in indices]), strict=True)
        return [found[index] for index in range(len(jobs))]

    def _groups(self, jobs: Sequence[Job]) -> list[list[int]]:
        """Places of jobs that can share a call."""
        alike: dict[Any, list[int]] = defaultdict(list)
        for index, job in enumerate(jobs):
            is_seeded = job.sampling.seed is not None and not job.sampling.is_greedy
            # A seed changes nothing where nothing is drawn.
            alike[index if is_seeded else replace(job.sampling, seed=None)].append(index)
        groups = []
        for indices in alike.values():
            size = self._most_at_once(jobs[indices[0]], len(indices))
            groups += [indices[start : start + size] for start in range(0, len(indices), size)]
        return groups

    def _most_at_once(self, job: Job, asked: int) -> int:
        if job.sampling.logprobs is None:
            return asked
        assert job.sampling.max_tokens is not None
        return max(1, LAW_NUMBERS // (job.sampling.n * job.sampling.max_tokens * self.vocab_size))

    def _attempt(self, jobs: list[Job]) -> Sequence[list[Written] | Exception]:
        try:
            return self._generate(jobs)
        except Exception as error:
            if len(jobs) == 1:
                return [error]
            return [self._attempt([job])[0] for job in jobs]

    @torch.inference_mode()
    def _generate(self, jobs: list[Job]) -> list[list[Written]]:
        sampling = jobs[0].sampling
        inputs = self._encoded(jobs)
        width = inputs["input_ids"].shape[1]
        stopping = StoppingCriteriaList()
        if sampling.stop:
            stopping.append(StopTexts(self.tokenizer, sampling.stop, width, sampling.min_tokens))
        options = self._options(jobs[0])
        devices = [self._fused.device] if self._fused.device.type == "cuda" else []
        is_seeded = sampling.seed is not None and not sampling.is_greedy
        with torch.random.fork_rng(devices, enabled=is_seeded):
            if is_seeded:
                torch.manual_seed(sampling.seed)
            output = self._fused.generate(**inputs, stopping_criteria=stopping, **options)
        new_ids = output.sequences[:, width:].tolist()
        written = [self._written(job_ids, jobs[0], output.logits, row) for row, job_ids in enumerate(new_ids)]
        return [written[start : start + sampling.n] for start in range(0, len(written), sampling.n)]

    def _encoded(self, jobs: Sequence[Job]) -> dict[str, Any]:
        if self._fused.has_own_prompts:
            if any(not isinstance(job.prompt, str) and isinstance(job.prompt[0], int) for job in jobs):
                raise BadSetting(
                    "the prompt is token ids, but members render prompts of their own.",
                    "They need the text.",
                    "send the text, or messages.",
                )
            encoded = self._fused.encoder.encode([_plain(job.prompt) for job in jobs], [job.chat for job in jobs])
            return {k: v.to(self._fused.device) if isinstance(v, Tensor) else v for k, v in encoded.items()}
        ids, mask = left_padded([job.token_ids for job in jobs], self._fused.config.pad_token_id or 0)
        return {"input_ids": ids.to(self._fused.device), "attention_mask": mask.to(self._fused.device)}

    def _options(self, job: Job) -> dict[str, Any]:
        sampling = job.sampling
        options: dict[str, Any] = {
            "max_new_tokens": sampling.max_tokens,
            "min_new_tokens": sampling.min_tokens or None,
            "num_return_sequences": sampling.n,
            "repetition_penalty": sampling.repetition_penalty,
            "eos_token_id": self._ends(job) or None,
            "return_dict_in_generate": True,
            "output_logits": sampling.logprobs is not None,
            "do_sample": not sampling.is_greedy,
        }
        if not sampling.is_greedy:
            options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
            # 0 is said only where the directory's settings would take its place.
            options |= {"min_p": sampling.min_p if sampling.min_p or self.defaults.get("min_p") else None}
            # Else measured times choose the lengths of drafts, and with them what is drawn.
            options["repeatable"] = sampling.seed is not None
        return {name: value for name, value in options.items() if value is not None}

    def _ends(self, job: Job) -> list[int]:
        ends = self._fused.generation_config.eos_token_id
        own = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        return list(dict.fromkeys([*own, *job.sampling.stop_token_ids]))

    def _written(self, ids: list[int], job: Job, members: Sequence[Tensor] | None, row: int) -> Written:
        """One text from the tokens of a row, padding behind it included."""
        sampling, ends = job.sampling, set(self._ends(job))
        stopped = first_stop(self.tokenizer, ids, sampling.stop, sampling.min_tokens) if sampling.stop else None
        ended = next((at for at, token in enumerate(ids, start=1) if token in ends), len(ids) + 1)
        kept, text, finish = ids[:ended], self._text(ids), "length"
        reason: str | int | None = None
        if stopped is not None and stopped.tokens < ended:
            kept, finish, reason = ids[: stopped.tokens], "stop", stopped.text
            text = self._text(kept)
            text = text[: len(text) - stopped.behind]
        elif ended <= len(ids):
            text, finish = self._text(ids[: ended - 1]), "stop"
            reason = ids[ended - 1] if ids[ended - 1] in sampling.stop_token_ids else None
        scores = (
            None if members is None else [self._score(members[at][row], token, job) for at, token in enumerate(kept)]
        )
        return Written(text, len(kept), finish, reason, scores)

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _score(self, logits: Tensor, token: int, job: Job) -> TokenScore:
        log_probs = logits.float().log_softmax(dim=-1)  # [vocab]
        likely = log_probs.topk(min(job.sampling.logprobs or 0, len(log_probs)))
        top = dict(zip(likely.indices.tolist(), likely.values.tolist(), strict=True))
        return TokenScore(token, float(log_probs[token]), top)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"device {device} cannot be used: {reason}", fix="leave it out for the CPU.") from error


def _plain(prompt: Any) -> Any:
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
