"""The paper's rule for several experts: each is tried alone against the summed objective, the best one speaks.

    min over alpha in R^T with one entry non-zero of
        sum_t [KL(P~||P) - KL(Q_t||Q)]^2 + [KL(P||P~) - KL(Q||Q_t)]^2

Source: Fan et al. 2024, arXiv 2406.15480, the objective for several experts and Algorithm 1. For amounts other than
the paper's the same objective picks among what the amount proposes for each expert.
"""

from dataclasses import dataclass

import torch

from trimtab.logits.strategy.base import AlphaAmount, Choice, DistributionAmount, choose, propose
from trimtab.logits.strategy.step import Step


@dataclass(frozen=True)
class JointObjective:
    """The expert whose fused law comes closest to the targets of all experts."""

    def __call__(self, step: Step, amount: AlphaAmount | DistributionAmount) -> Choice:
        """One expert per row; at equal objectives the first."""
        proposal = propose(amount, step, meets_all_targets=True)
        if step.experts.shape[0] == 1:  # nothing to compare
            return choose(proposal, expert=torch.zeros_like(step.who[0]))
        return choose(proposal, expert=proposal.objective().argmin(dim=0))
