"""The logits processors and warpers of `generate`, applied after fusion to all positions of a draft at once."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.generation import logits_process as known

# These look at the scores alone, so that all positions can go through them together.
POSITION_FREE = (
    known.TemperatureLogitsWarper,
    known.TopKLogitsWarper,
    known.TopPLogitsWarper,
    known.MinPLogitsWarper,
    known.TypicalLogitsWarper,
    known.EpsilonLogitsWarper,
    known.EtaLogitsWarper,
    known.SuppressTokensLogitsProcessor,
    known.InfNanRemoveLogitsProcessor,
    known.LogitNormalization,
)
# These look at the tokens before the position, each row for itself. (The repetition penalty and
# the n-grams of the prompt do not belong here: they hold something for each row of the batch.)
ROW_WISE = (
    known.NoRepeatNGramLogitsProcessor,
    known.NoBadWordsLogitsProcessor,
    known.SequenceBiasLogitsProcessor,
    known.MinLengthLogitsProcessor,
    known.MinNewTokensLengthLogitsProcessor,
    known.ForcedBOSTokenLogitsProcessor,
    known.ForcedEOSTokenLogitsProcessor,
    known.ExponentialDecayLengthPenalty,
    known.SuppressTokensAtBeginLogitsProcessor,
)
# These remember what they saw at the last call, or call a model by themselves: a draft would confuse them.
STATEFUL = tuple(
    getattr(known, name)
    for name in (
        "SynthIDTextWatermarkLogitsProcessor",
        "UnbatchedClassifierFreeGuidanceLogitsProcessor",
        "ClassifierFreeGuidanceLogitsProcessor",
        "DiaEOSDelayPatternLogitsProcessor",
    )
    if hasattr(known, name)
)


def stateful_among(processors: Sequence[Any]) -> str | None:
    """The name of the first processor that may not be asked about drafted positions; None: all may.

    Processors that are not transformers' own may keep account of the steps (grammars do); they are asked only where
    they declare `looks_back = False`.
    """
    for processor in processors:
        is_known = type(processor).__module__ == known.__name__ and not isinstance(processor, STATEFUL)
        if not is_known and getattr(processor, "looks_back", True):
            return type(processor).__name__
    return None


class Scorer:
    """Applies the processors to fused or drafted distributions.

    places    [row] of the call's batch that each row stands at: some processors go by it
    batch     rows of the call's batch
    ends      tokens that end a text: processors are not called on positions after one

    is_choosy   whether a processor may have no answer to a text that cannot come; `reach` then has to be exact
    """

    def __init__(self, processors: Any, batch: int, ends: Collection[int]) -> None:
        self._processors, self._ends = processors, frozenset(ends)
        self._batch = batch
        self._is_free = all(isinstance(processor, POSITION_FREE) for processor in processors)
        of_row = (*POSITION_FREE, *ROW_WISE)
        self._is_row_wise = all(isinstance(p, of_row) or _is_prefix(p) for p in processors)
        # The ones that are known to look at a row have an answer to any text.
        self.is_choosy = not all(isinstance(p, of_row) for p in processors)
        self._of_place: dict[int, Any] = {}

    def __call__(
        self,
        log_probs: Float[Tensor, "row kept vocab"],
        texts: Sequence[Sequence[int]],
        indices: Sequence[int],
        draft: Int[Tensor, "row draft"] | None = None,
        start: int = 0,
        reach: Int[Tensor, " row"] | None = None,
    ) -> Float[Tensor, "row kept vocab"]:
        """Processed scores of the positions after each text and each drafted token.

        Unreachable positions are left unprocessed: processors may raise on impossible prefixes. A position is
        unreachable after an end, after a drafted token that the scores before it rule out, or beyond `reach`.

        log_probs   [row, kept, vocab]   kept positions, the first behind the texts and `start` drafted tokens
        texts       per row the tokens so far, as `generate` would hand them over: left padding included
        draft       [row, start + kept - 1 or more] drafted tokens; None: one position, behind the texts
        reach       [row] behind how many drafted tokens a text can come; None: behind all of them
        """
        if len(self._processors) == 0:
            return log_probs
        rows, kept, vocab = log_probs.shape
        if self._is_free:
            flat = log_probs.reshape(rows * kept, vocab).clone()
            ids = torch.zeros((rows * kept, 1), dtype=torch.long, device=flat.device)
            return self._processors(ids, flat).view(rows, kept, vocab)  # type: ignore[no-any-return]
        drafted: list[list[int]] = [[]] * rows if draft is None else draft.tolist()
        most = [start + kept] * rows if reach is None else reach.tolist()
        return torch.stack(
            [self._row(log_probs[row], texts[row], drafted[row], indices[row], start, most[row]) for row in range(rows)]
        )

    def _row(
        self,
        rows: Float[Tensor, "kept vocab"],
        text: Sequence[int],
        drafted: Sequence[int],
        index: int,
        start: int,
        reach: int,
    ) -> Float[Tensor, "kept vocab"]:
        scores: list[Tensor] = []
        for count, log_probs in enumerate(rows, start):
            if scores and self.is_choosy and is_ruled_out(scores[-1], drafted[count - 1]):
                reach = min(reach, count - 1)
            is_reached = count <= reach and not self._ends.intersection(drafted[:count])
            scores.append(self._at(log_probs, text, drafted[:count], index) if is_reached else log_probs)
        return torch.stack(scores)

    def reach(
        self,
        reach: Int[Tensor, " row"],
        scores: Float[Tensor, "row vocab"],
        tokens: Int[Tensor, " row"],
        drafted: int,
    ) -> Int[Tensor, " row"]:
        """How far texts can come, for `reach` above, when these tokens follow so many drafted ones."""
        if not self.is_choosy:
            return reach
        is_out = scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) == -torch.inf
        return torch.where(is_out, reach.clamp_max(drafted), reach)

    def drawable(self, scores: Float[Tensor, "row vocab"]) -> Float[Tensor, "row vocab"]:
        """Scores to draft from: where processors leave no token at all, any may be drafted."""
        if self._is_free:
            return scores
        return torch.where(scores.amax(dim=-1, keepdim=True) == -torch.inf, 0.0, scores)

    def _at(
        self, log_probs: Float[Tensor, " vocab"], text: Sequence[int], drafted: Sequence[int], index: int
    ) -> Float[Tensor, " vocab"]:
        """One position of one row. A processor that is not known to go by the row alone sees a whole batch of copies,
        so that it finds the row where it expects it."""
        copies = 1 if self._is_row_wise else self._batch
        ids = torch.tensor([[*text, *drafted]], device=log_probs.device).expand(copies, -1)
        scores = self._for(index)(ids, log_probs.expand(copies, -1).clone())
        return scores[0 if copies == 1 else index]  # type: ignore[no-any-return]

    def _for(self, index: int) -> Any:
        """The processors as they are asked about one row: what is allowed is asked about that row alone.

        A function that says what may follow a prefix would else be asked about this text in the other rows, too, where
        it can be one that it forbids.
        """
        if not any(_is_prefix(processor) for processor in self._processors):
            return self._processors
        if index not in self._of_place:
            self._of_place[index] = type(self._processors)([_about_row(p, index) for p in self._processors])
        return self._of_place[index]


def _is_prefix(processor: Any) -> bool:
    return type(processor) is known.PrefixConstrainedLogitsProcessor


def _about_row(processor: Any, index: int) -> Any:
    if not _is_prefix(processor):
        return processor
    allowed = processor._prefix_allowed_tokens_fn
    return known.PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(index, ids), num_beams=1)


def is_ruled_out(scores: Float[Tensor, " vocab"], token: int) -> bool:
    """Whether a token cannot come, while others can."""
    return bool(scores[token] == -torch.inf) and bool(scores.amax() > -torch.inf)
