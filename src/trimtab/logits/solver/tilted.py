"""The tilted family p_a = p exp(a d) / Z(a): everything that logit arithmetic with one delta can reach.

With A(a) = log Z(a), A'(a) and A''(a) the mean and the variance of d under p_a,

    KL(p_a || p) = a A'(a) - A(a)        slope  a A''(a)       >= 0 for a >= 0
    KL(p || p_a) = A(a) - a A'(0)        slope  A'(a) - A'(0)  >= 0 for a >= 0

so both divergences grow with a. Here d is centred first, d := d - A'(0): p_a stays the same distribution, A'(0) = 0,
so that KL(p || p_a) is A(a) itself and nothing cancels for small a.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, linalg

# On a CPU the vocabulary is walked in slices of this many numbers: larger temporaries go back to the system after
# every operation, and the page faults then cost several times the arithmetic.
CPU_SLICE = 1 << 17


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
        return self.alpha * self.mean - self.log_partition

    @property
    def reverse_kl_nats(self) -> Float[Tensor, "*rows"]:
        """KL(p || p_a)."""
        return self.log_partition


@dataclass(frozen=True)
class Tilt:
    """One tilted distribution per row, and how far it moved.

    log_probs        [batch, vocab]   normalised
    kl_nats          [batch]          KL(p_a || p)
    reverse_kl_nats  [batch]          KL(p || p_a)
    """

    log_probs: Float[Tensor, "batch vocab"]
    kl_nats: Float[Tensor, " batch"]
    reverse_kl_nats: Float[Tensor, " batch"]


class TiltedFamily:
    """One family per row, evaluated at one alpha per row; counts its evaluations.

    strong  [batch, vocab]              log-probabilities of p; a constant added to a row cancels
    delta   [batch, vocab] or [expert, batch, vocab]    d, finite everywhere
    """

    strong: Float[Tensor, "batch vocab"]
    delta: Float[Tensor, "*expert batch vocab"]

    def __init__(self, strong: Float[Tensor, "batch vocab"], delta: Float[Tensor, "*expert batch vocab"]) -> None:
        wide = wide_type(strong)
        self.strong = torch.empty(strong.shape, dtype=wide, device=strong.device)
        self.delta = torch.empty(delta.shape, dtype=wide, device=delta.device)
        for piece in row_slices(strong):
            self.strong[piece] = strong[piece].to(wide).log_softmax(dim=-1)
            probs = self.strong[piece].softmax(dim=-1)
            # A token that p rules out plays no part; a delta of 0 there keeps the sums free of it.
            part = delta[..., piece, :].to(wide).masked_fill(self.strong[piece] == -torch.inf, 0.0)
            self.delta[..., piece, :] = part.sub_(linalg.vecdot(probs, part).unsqueeze(-1))
        self._count = [0]

    @property
    def evaluations(self) -> int:
        """How often the family was evaluated: passes over the vocabulary."""
        return self._count[0]

    def at(self, alpha: Float[Tensor, "*expert batch"]) -> Moments:
        """A, A' and A'' at alpha, one number per row; costs one pass over the vocabulary."""
        self._count[0] += 1
        parts = [
            _moments(alpha_part, strong, delta)
            for alpha_part, strong, delta in self._slices(alpha.reshape(-1 if alpha.numel() else 1, alpha.shape[-1]))
        ]
        log_partition, mean, variance = torch.cat(parts, dim=-1).view(3, *alpha.shape)
        return Moments(alpha, log_partition, mean, variance)

    def _slices(self, alpha: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The rows in order, in pieces."""
        for alphas, delta in zip(alpha, self.delta.reshape(len(alpha), *self.strong.shape), strict=True):
            for piece in row_slices(self.strong):
                yield alphas[piece], self.strong[piece], delta[piece]

    def take(self, row: Int[Tensor, " row"]) -> "TiltedFamily":
        """Some rows as a family of their own, `row` [row] counting through [expert, batch]; evaluations are shared."""
        some = object.__new__(TiltedFamily)
        some.strong = self.strong[row % self.strong.shape[0]]
        some.delta = self.delta.reshape(-1, self.delta.shape[-1])[row]
        some._count = self._count
        return some

    def tilt(self, alpha: Float[Tensor, "expert batch"], expert: Int[Tensor, " batch"]) -> Tilt:
        """The distribution p_a of one expert per row, and how far it moved.

        alpha    [expert, batch]
        expert   [batch]          which expert is chosen in each row
        """
        factor, log_probs, moments = take_expert(alpha, expert), torch.empty_like(self.strong), []
        for piece in row_slices(self.strong):
            strong = self.strong[piece]
            delta = self.delta[expert[piece], torch.arange(*piece.indices(len(expert)), device=expert.device)]
            moments.append(_moments(factor[piece], strong, delta))
            shift = factor[piece].unsqueeze(-1) * delta
            log_probs[piece] = shift.add_(strong).sub_(moments[-1][0].unsqueeze(-1))
        found = Moments(factor, *torch.cat(moments, dim=-1))
        return Tilt(log_probs, found.kl_nats.clamp_min(0.0), found.reverse_kl_nats.clamp_min(0.0))


def _moments(alpha: Tensor, strong: Tensor, delta: Tensor) -> Tensor:
    """A, A' and A'' stacked, [3, row], of rows [row, vocab] at alpha [row]."""
    tilted = (alpha.unsqueeze(-1) * delta).add_(strong)
    probs = tilted.softmax(dim=-1)
    # The likeliest token's unnormalised minus its normalised log-probability is A: cheaper than a log-sum-exp.
    log_partition = tilted.amax(dim=-1) - probs.amax(dim=-1).log()
    mean = linalg.vecdot(probs, delta)
    variance = linalg.vecdot(probs.mul_(delta), delta) - mean.square()
    return torch.stack([log_partition, mean, variance.clamp_min(0.0)])


def take_expert(values: Tensor, expert: Tensor) -> Tensor:
    """The rows of one expert per batch row: [expert, batch, ...] and indices [batch] give [batch, ...]."""
    return values[expert, torch.arange(expert.shape[0], device=expert.device)]


def row_slices(rows: Tensor) -> Iterator[slice]:
    """Slices through [row, vocab]: small ones on a CPU, all rows at once elsewhere."""
    count, vocab = rows.shape
    size = max(1, CPU_SLICE // vocab) if rows.device.type == "cpu" else max(1, count)
    for start in range(0, max(1, count), size):  # an empty batch is one empty slice
        yield slice(start, start + size)


def wide_type(like: Tensor) -> torch.dtype:
    """The widest floating type of the device that holds `like`: float64, or float32 where there is nothing wider."""
    return torch.float32 if like.device.type == "mps" else torch.float64
