"""Members' logits in, fused log-probabilities out: what an engine asks for at each step. The strategies are those of
the transformers engine."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.logits.reading import CHUNK_NUMBERS
from trimtab.logits.speculation.draft import Drafter
from trimtab.logits.strategy import Strategy

Law = Callable[[Sequence[Tensor]], Tensor]  # members' log-probabilities, each [row, vocab] -> [row, vocab]


def fuse_rows(
    logits: Sequence[Float[Tensor, "row _"]], body_of: Sequence[int], strategy: Strategy, vocab_size: int
) -> Float[Tensor, "row vocab"]:
    """Fused log-probabilities of the next token, float32.

    logits      [row, tokens of that body] of each body, the strong one first, all on one device; a NaN stays one
    body_of     for strong, base and each expert: its place in `logits`
    vocab_size  tokens that are fused; what bodies score beyond is padding, and cut
    returns     [row, vocab_size]

    Nothing here waits for the device: no value of a tensor decides what is run.
    """

    def fuse(laws: Sequence[Tensor]) -> Tensor:
        strong, base, *experts = laws
        stacked = torch.stack(experts) if experts else strong.new_empty((0, *strong.shape))
        return strategy(strong, base, stacked).log_probs

    return _by_rows(logits, body_of, fuse, vocab_size)


def draft_rows(
    logits: Sequence[Float[Tensor, "row _"]], body_of: Sequence[int], drafter: Drafter, vocab_size: int
) -> Float[Tensor, "row vocab"]:
    """A drafter's log-probabilities of the next token, float32; arguments as in `fuse_rows`.

    body_of     for each of the drafter's members: its place in `logits`
    """
    return _by_rows(logits, body_of, drafter.law, vocab_size)


def _by_rows(logits: Sequence[Tensor], body_of: Sequence[int], law: Law, vocab_size: int) -> Tensor:
    """What `law` makes of the members' log-probabilities, some rows at a time: temporaries stay small."""
    rows = logits[0].shape[0]
    at_once = max(1, CHUNK_NUMBERS // (vocab_size * len(body_of)))
    if rows <= at_once:
        return law(_laws(logits, body_of, vocab_size))
    made = torch.empty((rows, vocab_size), device=logits[0].device)
    for start in range(0, rows, at_once):
        piece = slice(start, start + at_once)
        made[piece] = law(_laws([scores[piece] for scores in logits], body_of, vocab_size))
    return made


def _laws(logits: Sequence[Tensor], body_of: Sequence[int], vocab_size: int) -> list[Tensor]:
    laws = [scores[:, :vocab_size].float().log_softmax(dim=-1) for scores in logits]
    return [laws[body] for body in body_of]
