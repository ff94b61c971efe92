"""One decoding step as the strategies see it: all members' next-token distributions at one position."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.logits.solver.deltas import DeltaTargets, measure_deltas
from trimtab.logits.solver.tilted import take_expert


@dataclass(frozen=True)
class Step:
    """All members' log-probabilities at one position of every row.

    strong, base  [batch, vocab]
    experts       [expert, batch, vocab]
    who           [expert, batch]         index of the expert at each position of the axis; matters once narrowed
    names         names of all experts, in the order of `who`; empty where they have none
    """

    strong: Float[Tensor, "batch vocab"]
    base: Float[Tensor, "batch vocab"]
    experts: Float[Tensor, "expert batch vocab"]
    who: Int[Tensor, "expert batch"]
    names: tuple[str, ...] = ()

    @cached_property
    def deltas(self) -> DeltaTargets:
        """Every expert's delta, with its own targets."""
        return measure_deltas(self.strong, self.base, self.experts)

    @property
    def completed_experts(self) -> Float[Tensor, "expert batch vocab"]:
        """The experts' distributions, completed by the strong model's where no small member knows a token.

        An average with the strong model then leaves such tokens to the strong model alone.
        """
        is_unknown = (self.base == -torch.inf) & (self.experts == -torch.inf).all(dim=0)
        unknown_mass = self.strong.exp().masked_fill(~is_unknown, 0.0).sum(dim=-1, keepdim=True).clamp_max(1.0)
        return torch.where(is_unknown, self.strong, self.experts + torch.log1p(-unknown_mass))

    def narrow(self, expert: Int[Tensor, " batch"]) -> "Step":
        """The same step with one expert per row, given by its index `expert` [batch]: the others cost nothing."""
        experts, who = take_expert(self.experts, expert).unsqueeze(0), take_expert(self.who, expert).unsqueeze(0)
        return Step(self.strong, self.base, experts, who, self.names)
