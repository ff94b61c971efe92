"""Algorithm 1 of Dynamic Logits Fusion as published: every alpha of a grid is tried, the best is kept.

Slow and plain on purpose: it is what the exact amount `dynamic` is measured against.

Source: Fan et al. 2024, arXiv 2406.15480, Algorithm 1 (0 to 2 in steps of 0.1, one expert at a time, objective summed
over the experts when the chooser is `joint_objective`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.core.divergence import kl_nats
from trimtab.core.errors import BadSetting
from trimtab.core.settings import setting
from trimtab.logits.solver.deltas import DeltaTargets
from trimtab.logits.strategy.base import Amount
from trimtab.logits.strategy.step import Step


@dataclass(frozen=True)
class Grid(Amount):
    """The best alpha of a grid."""

    has_alpha: ClassVar[bool] = True

    alpha_max: float = setting(2.0, "the largest alpha of the grid", "factor", low=0.0, high=10.0)
    alpha_step: float = setting(0.1, "the distance between two alphas of the grid", "factor", low=0.001, high=10.0)

    def __post_init__(self) -> None:
        if 0.0 < self.alpha_max < self.alpha_step:
            raise BadSetting(
                f"alpha_step is {self.alpha_step:g}, but alpha_max is {self.alpha_max:g}.",
                "A step is at most as wide as the grid: the first one would already lead out of it.",
                f"for example alpha_step={max(self.alpha_max / 10, 0.001):g}, or a larger alpha_max.",
            )

    def candidates(self) -> list[float]:
        """The grid: 0, alpha_step, 2 alpha_step, ... and alpha_max, also where the last step to it is a short one."""
        steps = self.alpha_max / self.alpha_step
        # A hair more than alpha_max, or 2.0 / 0.1 would now and then end one step early.
        points = [i * self.alpha_step for i in range(int(steps + 1e-9) + 1)]
        return [*points, self.alpha_max] if steps - (len(points) - 1) > 1e-9 else points

    def alphas(self, step: Step, deltas: DeltaTargets) -> Float[Tensor, "expert batch"]:
        """The best grid point for each expert alone. [expert, batch]"""
        return torch.stack([self._search(deltas, expert) for expert in range(deltas.forward.shape[1])])

    def _search(self, deltas: DeltaTargets, expert: int) -> Float[Tensor, " batch"]:
        """Algorithm 1's inner loop: one expert's best alpha, in every row; at equal objectives the smallest."""
        strong, delta = deltas.family.strong, deltas.family.delta[expert]  # [batch, vocab]
        best_alpha = torch.zeros_like(deltas.forward[0, expert])
        best_objective = torch.full_like(best_alpha, torch.inf)
        for alpha in self.candidates():
            fused = (strong + alpha * delta).log_softmax(dim=-1)
            objective = torch.zeros_like(best_alpha)
            for forward, reverse in zip(deltas.forward[:, expert], deltas.reverse[:, expert], strict=True):
                objective += (kl_nats(fused, strong) - forward) ** 2 + (kl_nats(strong, fused) - reverse) ** 2
            is_better = objective < best_objective
            best_alpha = torch.where(is_better, alpha, best_alpha)
            best_objective = torch.where(is_better, objective, best_objective)
        return best_alpha
