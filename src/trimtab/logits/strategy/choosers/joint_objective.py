"""The published rule for several experts: each is tried alone against the summed objective, the best one speaks.

    min over alpha in R^T with one entry non-zero of
        sum_t [KL(P~||P) - KL(Q_t||Q)]^2 + [KL(P||P~) - KL(Q||Q_t)]^2

For amounts other than the published ones the same objective picks among the distributions of the single experts.

Source: Fan et al. 2024, arXiv 2406.15480, the objective for several experts and Algorithm 1.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from trimtab.logits.strategy.base import Chooser
from trimtab.logits.strategy.step import Step


@dataclass(frozen=True)
class JointObjective(Chooser):
    """The expert whose fused distribution comes closest to the targets of all experts."""

    uses_objective: ClassVar[bool] = True

    def choose(self, step: Step, objective: Float[Tensor, "expert batch"] | None) -> Int[Tensor, " batch"]:
        """One expert per row; at equal objectives the first."""
        assert objective is not None  # as `uses_objective` asks
        return objective.argmin(dim=0)
