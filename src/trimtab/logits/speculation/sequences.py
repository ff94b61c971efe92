"""The texts of a batch while they grow: each row keeps its own length, ends by itself, and may be streamed."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)

# These can be asked about one row of a batch. Others may keep account of all rows, by their places.
ROW_WISE = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)


def batch_wise_among(stopping: Sequence[Any]) -> str | None:
    """The name of the first criterion that may only be asked about a whole batch; None: each can do with a row."""
    return next((type(criteria).__name__ for criteria in stopping if not _is_row_wise(criteria)), None)


def _is_row_wise(criteria: Any) -> bool:
    """Known to be, or a criterion of ours that says so itself."""
    return isinstance(criteria, ROW_WISE) or getattr(criteria, "is_row_wise", False)


def _is_foreseeable(criteria: Any) -> bool:
    """Whether it goes by the text alone: it may then be asked about texts that are only drafted.

    Others may go by time or scores, or keep account of the steps; they are asked only where they declare
    `looks_back = False`, as processors are.
    """
    return isinstance(criteria, StopStringCriteria) or not getattr(criteria, "looks_back", True)


class Rows:
    """What was emitted for each row of the call, and which rows still go on.

    texts     per row of the call: token ids of the prompt (with its padding) and of what was emitted
    ends      tokens that end a text
    active    the rows that go on, as places in `texts`, in the order of the members' caches
    scores    per row of the call and token: scores and logits [vocab]; None where they are not kept
    """

    def __init__(
        self,
        prompts: Int[Tensor, "row time"],
        stopping: Sequence[Any],
        streamer: Any,
        keeps_scores: bool,
        shows_scores: bool = False,
    ) -> None:
        """`shows_scores`: whether stopping criteria are shown the scores, as they are where the caller wants them."""
        self.texts: list[list[int]] = prompts.tolist()
        self.active = list(range(len(prompts)))
        self.device = prompts.device
        self.scores: list[list[tuple[Tensor, Tensor]]] | None = [[] for _ in prompts] if keeps_scores else None
        self._shows_scores = keeps_scores and shows_scores
        self._streamer = streamer
        self.ends = {int(i) for c in stopping if isinstance(c, EosTokenCriteria) for i in c.eos_token_id.tolist()}
        limits = [criteria.max_length for criteria in stopping if isinstance(criteria, MaxLengthCriteria)]
        self._max_length = min(limits, default=None)
        # Everything else is asked after each token, as `generate` does.
        self._others = [c for c in stopping if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)]
        self._foreseeable = [c for c in self._others if _is_foreseeable(c)]

    @property
    def current(self) -> list[list[int]]:
        """The texts of the rows that go on."""
        return [self.texts[index] for index in self.active]

    def room(self) -> int | None:
        """Tokens that the row with most room may still emit; None: no limit is known."""
        if self._max_length is None:
            return None
        return int(self._max_length) - min(len(text) for text in self.current)

    def within(
        self, reach: Int[Tensor, " row"], draft: Int[Tensor, "row draft"], start: int = 0
    ) -> Int[Tensor, " row"]:
        """Behind how many drafted tokens each active row can still go on: `reach`, or fewer. [row]

        A text goes on behind no token that ends it, and behind none that fills its room. Ends by criteria that go by
        more than the text cannot be foreseen.

        reach   [row]          behind how many drafted tokens a text can come for all that is known
        draft   [row, draft]   token ids
        start   how many of them were looked at before
        """
        limits = zip(self.current, draft.tolist(), reach.tolist(), strict=True)
        return reach.new_tensor([self._going(text, drafted, start, most) for text, drafted, most in limits])

    def _going(self, text: list[int], drafted: list[int], start: int, most: int) -> int:
        if self._max_length is not None:
            most = min(most, self._max_length - len(text) - 1)
        for count in range(start + 1, min(most, len(drafted)) + 1):
            if self._is_foreseen_end([*text, *drafted[:count]]):
                return count - 1
        return most

    def _is_foreseen_end(self, text: list[int]) -> bool:
        return text[-1] in self.ends or self._is_ended_by(self._foreseeable, text, None)

    def emit(self, tokens: Sequence[Sequence[int]], log_probs: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> list[int]:
        """Appends each active row's new tokens up to where it ends.

        tokens    per active row
        distributions      per active row and token its scores and logits; empty if not asked for
        returns   which of the active rows go on, as places among them
        """
        going = []
        for at, index in enumerate(self.active):
            is_done = self._extend(index, tokens[at], log_probs[at] if self.scores is not None else ())
            if not is_done:
                going.append(at)
        self.active = [self.active[at] for at in going]
        return going

    def _extend(self, index: int, tokens: Sequence[int], log_probs: Sequence[tuple[Tensor, Tensor]]) -> bool:
        """Appends tokens to one row until it ends; whether it did."""
        text, is_done = self.texts[index], False
        for at, token in enumerate(tokens):
            text.append(token)
            if self.scores is not None:
                self.scores[index].append(log_probs[at])
            is_done = self._is_done(text, index)
            if self._streamer is not None:
                self._streamer.put(torch.tensor([token]))
            if is_done:
                break
        return is_done

    def _is_done(self, text: list[int], index: int) -> bool:
        if text[-1] in self.ends or (self._max_length is not None and len(text) >= self._max_length):
            return True
        return self._is_ended_by(self._others, text, self._shown(index))

    def _is_ended_by(self, stopping: Sequence[Any], text: list[int], scores: tuple[Tensor, ...] | None) -> bool:
        if not stopping:
            return False
        ids = torch.tensor([text], device=self.device)
        return any(bool(torch.as_tensor(criteria(ids, scores)).any()) for criteria in stopping)

    def _shown(self, index: int) -> tuple[Tensor, ...] | None:
        """A row's scores so far, [1, vocab] each, as transformers hands them to stopping criteria."""
        if self.scores is None or not self._shows_scores:
            return None
        return tuple(scores.unsqueeze(0) for scores, _ in self.scores[index])

    def finish(self, pad_id: int) -> Int[Tensor, "row time"]:
        """All texts, filled up with padding on the right."""
        if self._streamer is not None:
            self._streamer.end()
        longest = max(len(text) for text in self.texts)
        padded = [text + [pad_id] * (longest - len(text)) for text in self.texts]
        return torch.tensor(padded, device=self.device)

    def log_probs(self, pad_id: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Scores and logits of every step, [row, vocab] each; where a row has ended, the padding is certain."""
        assert self.scores is not None
        steps = max(len(row) for row in self.scores)
        some = next(log_probs for row in self.scores for log_probs, _ in row)
        ended = torch.full_like(some, -torch.inf)
        ended[pad_id] = 0.0
        filled = [row + [(ended, ended)] * (steps - len(row)) for row in self.scores]
        scores, logits = (tuple(torch.stack([row[s][i] for row in filled]) for s in range(steps)) for i in (0, 1))
        return scores, logits
