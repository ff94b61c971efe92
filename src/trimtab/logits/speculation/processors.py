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
    """Applies the processors to fused or drafted laws.

    places    [row] of the call's batch that each row stands at: some processors go by it
    batch     rows of the call's batch
    ends      tokens that end a text: nobody is asked about positions behind one
    """

    def __init__(self, processors: Any, batch: int, ends: Collection[int]) -> None:
        self._processors, self._ends = processors, frozenset(ends)
        self._batch = batch
        self._is_free = all(isinstance(processor, POSITION_FREE) for processor in processors)
        self._is_row_wise = all(isinstance(processor, (*POSITION_FREE, *ROW_WISE)) for processor in processors)

    def __call__(
        self,
        log_probs: Float[Tensor, "row kept vocab"],
        texts: Sequence[Sequence[int]],
        places: Sequence[int],
        draft: Int[Tensor, "row draft"] | None = None,
        start: int = 0,
    ) -> Float[Tensor, "row kept vocab"]:
        """Processed scores of the positions behind each text and each drafted token.

        log_probs   [row, kept, vocab]   kept positions, the first behind the texts and `start` drafted tokens
        texts       per row the tokens so far, as `generate` would hand them over: left padding included
        draft       [row, start + kept - 1 or more] drafted tokens; None: one position, behind the texts
        """
        if len(self._processors) == 0:
            return log_probs
        rows, kept, vocab = log_probs.shape
        if self._is_free:
            flat = log_probs.reshape(rows * kept, vocab).clone()
            ids = torch.zeros((rows * kept, 1), dtype=torch.long, device=flat.device)
            return self._processors(ids, flat).view(rows, kept, vocab)  # type: ignore[no-any-return]
        drafted: list[list[int]] = [[]] * rows if draft is None else draft.tolist()
        scores = [
            [self._at(log_probs[row, at], texts[row], drafted[row][: start + at], places[row]) for at in range(kept)]
            for row in range(rows)
        ]
        return torch.stack([torch.stack(row) for row in scores])

    def _at(
        self, law: Float[Tensor, " vocab"], text: Sequence[int], drafted: Sequence[int], place: int
    ) -> Float[Tensor, " vocab"]:
        """One position of one row. A processor that is not known to go by the row alone sees a whole batch of copies,
        so that it finds the row where it expects it."""
        if self._ends.intersection(drafted):
            return law  # never reached: a grammar would not know what to say there
        copies = 1 if self._is_row_wise else self._batch
        ids = torch.tensor([[*text, *drafted]], device=law.device).expand(copies, -1)
        scores = self._processors(ids, law.expand(copies, -1).clone())
        return scores[0 if copies == 1 else place]  # type: ignore[no-any-return]
