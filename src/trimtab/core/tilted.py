"""The tilted family p_a = p exp(a d) / Z(a): everything that logit arithmetic with one delta can reach.

With A(a) = log Z(a), A'(a) and A''(a) the mean and the variance of d under p_a,

    KL(p_a || p) = a A'(a) - A(a)        slope  a A''(a)       >= 0 for a >= 0
    KL(p || p_a) = A(a) - a A'(0)        slope  A'(a) - A'(0)  >= 0 for a >= 0

so both divergences grow with a. Here d is centred first, d := d - A'(0): the laws p_a stay the same and A'(0) = 0,
so that KL(p || p_a) is A(a) itself and nothing cancels for small a.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, linalg


@dataclass(frozen=True)
class Moments:
    """The family at one alpha per row: alpha, and A, A' and A'' of the centred delta there, each [...]."""

    alpha: Float[Tensor, "*rows"]
    log_partition: Float[Tensor, "*rows"]
    mean: Float[Tensor, "*rows"]
    variance: Float[Tensor, "*rows"]

    @property
    def kl_nats(self) -> Float[Tensor, "*rows"]:
        """KL(p_a || p)."""
        return (self.alpha * self.mean - self.log_partition).clamp_min(0.0)

    @property
    def reverse_kl_nats(self) -> Float[Tensor, "*rows"]:
        """KL(p || p_a)."""
        return self.log_partition.clamp_min(0.0)


class TiltedFamily:
    """One family per row, evaluated at one alpha per row; counts its evaluations.

    strong  [batch, vocab]       log-probabilities of p
    delta   [..., batch, vocab]  d, finite everywhere, 0 where p is 0
    """

    def __init__(self, strong: Float[Tensor, "batch vocab"], delta: Float[Tensor, "*expert batch vocab"]) -> None:
        wide = wide_type(strong)
        self.strong = strong.to(wide).log_softmax(dim=-1)
        delta = delta.to(wide)
        self.delta = delta - linalg.vecdot(self.strong.softmax(dim=-1), delta).unsqueeze(-1)
        self.evaluations = 0

    def at(self, alpha: Float[Tensor, "*expert batch"]) -> Moments:
        """A, A' and A'' at alpha, all [..., batch]; costs one pass over the vocabulary."""
        self.evaluations += 1
        tilted = (alpha.unsqueeze(-1) * self.delta).add_(self.strong)
        probs = tilted.softmax(dim=-1)
        # The most likely token's unnormalised minus its normalised log-probability is A: cheaper than a log-sum-exp.
        log_partition = tilted.amax(dim=-1) - probs.amax(dim=-1).log()
        mean = linalg.vecdot(probs, self.delta)
        variance = linalg.vecdot(probs.mul_(self.delta), self.delta) - mean.square()
        return Moments(alpha, log_partition, mean, variance.clamp_min(0.0))

    def law(self, alpha: Float[Tensor, "expert batch"], expert: Tensor) -> Float[Tensor, "batch vocab"]:
        """Log-probabilities of p_a for one expert per row.

        alpha    [expert, batch]
        expert   [batch]          which expert speaks in each row
        returns  [batch, vocab]
        """
        delta = take_expert(self.delta, expert)
        return (self.strong + take_expert(alpha, expert).unsqueeze(-1) * delta).log_softmax(dim=-1)


def take_expert(values: Tensor, expert: Tensor) -> Tensor:
    """The rows of one expert per batch row: [expert, batch, ...] and indices [batch] give [batch, ...]."""
    return values[expert, torch.arange(expert.shape[0], device=expert.device)]


def wide_type(like: Tensor) -> torch.dtype:
    """The widest floating type of the device that holds `like`: float64, or float32 where there is nothing wider."""
    return torch.float32 if like.device.type == "mps" else torch.float64
