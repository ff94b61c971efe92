"""One round of speculative sampling with a fused target: how many drafted tokens are accepted, and what follows.

Token i of the draft, x_i, was drawn from q_i; the fused distribution there is r_i. It is accepted with probability
min(1, r_i(x_i) / q_i(x_i)). The first rejected token is replaced by a draw from the residual (r_i - q_i)_+, normalised.
A draft that is accepted as a whole is followed by a bonus token, drawn from r. The text is then distributed as if every
token had been drawn from r, whatever q is:

    P(z) = q(z) min(1, r(z)/q(z)) + P(reject) (r(z) - q(z))_+ / sum_v (r(v) - q(v))_+  =  r(z)

since P(reject) = sum_v (r(v) - q(v))_+. The bonus has to come from r: drawn from the strong model it would be wrong.

Source: Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318. All scores are those after the
processors of `generate`; -inf is an impossible token.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def draw(scores: Float[Tensor, "row vocab"], do_sample: bool) -> Int[Tensor, " row"]:
    """One token per row: the likeliest, or a draw. [row]"""
    if not do_sample:
        return scores.argmax(dim=-1)
    return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)


def acceptance_mask(
    draft: Int[Tensor, "row draft"],
    target: Float[Tensor, "row draft vocab"],
    proposal: Float[Tensor, "row draft vocab"] | None,
    do_sample: bool,
) -> Bool[Tensor, "row draft"]:
    """Which drafted tokens would be accepted, each taken by itself.

    draft      [row, draft]          token ids
    target     [row, draft, vocab]   fused scores at their positions
    proposal   [row, draft, vocab]   scores that they were drawn from; None: they were certain (a lookup)
    do_sample  False: a token is accepted if it is the likeliest of the fused distribution
    """
    if not do_sample:
        return draft == target.argmax(dim=-1)
    wanted = target.log_softmax(dim=-1).gather(-1, draft.unsqueeze(-1)).squeeze(-1)  # log r(x)
    if proposal is not None:
        wanted = wanted - proposal.log_softmax(dim=-1).gather(-1, draft.unsqueeze(-1)).squeeze(-1)
    return torch.rand_like(wanted) < wanted.exp()


def accepted(is_accepted: Bool[Tensor, "row draft"], lengths: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
    """How many drafted tokens are kept: those before the first rejected one. [row]

    lengths   [row]   how many of the row's drafted tokens count; the rest is padding
    """
    indices = torch.arange(is_accepted.shape[1], device=is_accepted.device)
    return (is_accepted & (indices < lengths.unsqueeze(-1))).long().cumprod(dim=-1).sum(dim=-1)


def residual(
    target: Float[Tensor, "row vocab"],
    proposal: Float[Tensor, "row vocab"] | None,
    rejected: Int[Tensor, " row"],
) -> Float[Tensor, "row vocab"]:
    """Scores of the distribution from which a rejected token is replaced: log (r - q)_+; r itself if that underflows.

    rejected    [row]   the rejected token; needed if it was certain
    """
    r = target.softmax(dim=-1)
    if proposal is None:
        rest = r.scatter(-1, rejected.unsqueeze(-1), 0.0)
    else:
        rest = (r - proposal.softmax(dim=-1)).clamp_min(0.0)
    is_empty = rest.sum(dim=-1, keepdim=True) <= 0.0
    return torch.where(is_empty, r, rest).log()
