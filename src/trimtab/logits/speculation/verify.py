"""One round of speculative sampling with a fused target: how many drafted tokens stand, and what follows them.

With q_i the law that token i of the draft was drawn from and r_i the fused law there, x_i stands with probability
min(1, r_i(x_i) / q_i(x_i)). The first that does not is replaced by a draw from the residual (r_i - q_i)_+, normalised;
behind a draft that stands as a whole comes a bonus, drawn from the fused law r. What comes out is distributed as if
every token had been drawn from r, whatever q is:

    P(z) = q(z) min(1, r(z)/q(z)) + P(reject) (r(z) - q(z))_+ / sum_v (r(v) - q(v))_+  =  r(z)

since P(reject) = sum_v (r(v) - q(v))_+. The bonus has to come from r: drawn from the strong model it would be wrong.

Source: Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318. All scores are those after the
processors of `generate`; -inf is a token that cannot come.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def draw(scores: Float[Tensor, "row vocab"], do_sample: bool) -> Int[Tensor, " row"]:
    """One token per row: the likeliest, or a draw. [row]"""
    if not do_sample:
        return scores.argmax(dim=-1)
    return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)


def standing(
    draft: Int[Tensor, "row draft"],
    target: Float[Tensor, "row draft vocab"],
    proposal: Float[Tensor, "row draft vocab"] | None,
    do_sample: bool,
) -> Bool[Tensor, "row draft"]:
    """Which drafted tokens would stand, each taken by itself.

    draft      [row, draft]          token ids
    target     [row, draft, vocab]   fused scores at their positions
    proposal   [row, draft, vocab]   scores that they were drawn from; None: they were certain (a lookup)
    do_sample  False: a token stands where it is the fused law's likeliest
    """
    if not do_sample:
        return draft == target.argmax(dim=-1)
    wanted = target.log_softmax(dim=-1).gather(-1, draft.unsqueeze(-1)).squeeze(-1)  # log r(x)
    if proposal is not None:
        wanted = wanted - proposal.log_softmax(dim=-1).gather(-1, draft.unsqueeze(-1)).squeeze(-1)
    return torch.rand_like(wanted) < wanted.exp()


def accepted(stands: Bool[Tensor, "row draft"], lengths: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
    """How many drafted tokens are kept: those before the first that does not stand. [row]

    lengths   [row]   how many of the row's drafted tokens count; the rest is filling
    """
    places = torch.arange(stands.shape[1], device=stands.device)
    return (stands & (places < lengths.unsqueeze(-1))).long().cumprod(dim=-1).sum(dim=-1)


def residual(
    target: Float[Tensor, "row vocab"],
    proposal: Float[Tensor, "row vocab"] | None,
    rejected: Int[Tensor, " row"],
) -> Float[Tensor, "row vocab"]:
    """Scores of the law from which a rejected token is replaced: log (r - q)_+; r itself where that underflows.

    rejected    [row]   the token that did not stand; needed where it was certain
    """
    r = target.softmax(dim=-1)
    if proposal is None:
        rest = r.scatter(-1, rejected.unsqueeze(-1), 0.0)
    else:
        rest = (r - proposal.softmax(dim=-1)).clamp_min(0.0)
    is_empty = rest.sum(dim=-1, keepdim=True) <= 0.0
    return torch.where(is_empty, r, rest).log()
