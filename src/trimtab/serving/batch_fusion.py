"""Members' logits in, fused logits out: what an engine asks for at each step. The strategies are those of the
transformers engine."""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.logits.forward.reader import CHUNK_NUMBERS, zero_point_of
from trimtab.logits.speculation.draft import Drafter
from trimtab.logits.strategy.fusion import Strategy

Combine = Callable[[Sequence[Tensor]], Tensor]  # members' log-probabilities, each [row, vocab] -> [row, vocab]


def fuse_rows(
    logits: Sequence[Float[Tensor, "row _"]], body_of: Sequence[int], strategy: Strategy, vocab_size: int
) -> Float[Tensor, "row vocab"]:
    """Fused logits of the next token, float32: fused log-probabilities plus the strong model's log-sum-exp.

    An engine's penalties look at the sign of a logit, so they need the strong model's zero point.

    logits      [row, tokens of that body] of each body, the strong one first, all on one device; a NaN stays one
    body_of     for strong, base and each expert: its index in `logits`
    vocab_size  tokens that are fused; what bodies score beyond is padding, and cut
    returns     [row, vocab_size]

    Nothing here waits for the device: no value of a tensor decides what is run.
    """

    log_probs = _by_rows(logits, body_of, lambda members: strategy(*parted(members)).log_probs, vocab_size)
    return log_probs + zero_points(logits[0], vocab_size)


def draft_rows(
    logits: Sequence[Float[Tensor, "row _"]], body_of: Sequence[int], drafter: Drafter, vocab_size: int
) -> Float[Tensor, "row vocab"]:
    """A drafter's log-probabilities of the next token, float32; arguments as in `fuse_rows`.

    body_of     for each of the drafter's members: its index in `logits`
    """
    return _by_rows(logits, body_of, drafter.log_probs, vocab_size)


def _by_rows(logits: Sequence[Tensor], body_of: Sequence[int], combine: Combine, vocab_size: int) -> Tensor:
    """What `combine` makes of the members' log-probabilities, some rows at a time: temporaries stay small."""
    made = [combine(members) for _, members in member_log_probs(logits, body_of, vocab_size)]
    return made[0] if len(made) == 1 else torch.cat(made)


def zero_points(strong: Float[Tensor, "row _"], vocab_size: int) -> Float[Tensor, "row 1"]:
    """What is added to fused log-probabilities so that they have the zero point of the strong model's logits."""
    return zero_point_of(strong[:, :vocab_size].float())


def member_log_probs(
    logits: Sequence[Tensor], body_of: Sequence[int], vocab_size: int
) -> Iterator[tuple[slice, list[Float[Tensor, "piece vocab"]]]]:
    """Members' log-probabilities from bodies' logits, some rows at a time; arguments as in `fuse_rows`."""
    rows = logits[0].shape[0]
    at_once = max(1, CHUNK_NUMBERS // (vocab_size * len(body_of)))
    for start in range(0, max(rows, 1), at_once):
        piece = slice(start, min(start + at_once, rows))
        members = [scores[piece, :vocab_size].float().log_softmax(dim=-1) for scores in logits]
        yield piece, [members[body] for body in body_of]


def parted(members: Sequence[Float[Tensor, "row vocab"]]) -> tuple[Tensor, Tensor, Tensor]:
    """The distributions of strong, base and experts as strategies take them; experts [expert, row, vocab]."""
    strong, base, *experts = members
    return strong, base, torch.stack(experts) if experts else strong.new_empty((0, *strong.shape))
