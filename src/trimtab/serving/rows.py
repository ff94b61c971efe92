"""Members' logits in, fused log-probabilities out: what an engine asks for at each step. The strategies are those of
the transformers engine."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.logits.reading import CHUNK_NUMBERS
from trimtab.logits.strategy import Strategy


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
    rows = logits[0].shape[0]
    at_once = max(1, CHUNK_NUMBERS // (vocab_size * len(body_of)))
    if rows <= at_once:
        return _fuse(logits, body_of, strategy, vocab_size)
    fused = torch.empty((rows, vocab_size), device=logits[0].device)
    for start in range(0, rows, at_once):
        piece = slice(start, start + at_once)
        fused[piece] = _fuse([scores[piece] for scores in logits], body_of, strategy, vocab_size)
    return fused


def _fuse(logits: Sequence[Tensor], body_of: Sequence[int], strategy: Strategy, vocab_size: int) -> Tensor:
    laws = [scores[:, :vocab_size].float().log_softmax(dim=-1) for scores in logits]
    strong, base, *experts = (laws[body] for body in body_of)
    stacked = torch.stack(experts) if experts else strong.new_empty((0, *strong.shape))
    return strategy(strong, base, stacked).log_probs
