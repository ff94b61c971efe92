"""The cautious alpha: the largest one at which neither divergence exceeds its target.

    alpha = max { a in [0, alpha_max] :  KL(P_a||P) <= KL(Q_1||Q)  and  KL(P||P_a) <= KL(Q||Q_1) }

Both divergences grow with alpha, so this is the smaller of the two roots between which the paper's least-squares
compromise lies: never farther from the strong model than the published rule.

Source: ours, after Fan et al. 2024, arXiv 2406.15480.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from trimtab.core.settings import setting
from trimtab.logits.solver.deltas import DeltaTargets
from trimtab.logits.solver.match import smaller_root
from trimtab.logits.strategy.base import Amount
from trimtab.logits.strategy.step import Step


@dataclass(frozen=True)
class Cautious(Amount):
    """The smaller of the two roots."""

    has_alpha: ClassVar[bool] = True

    alpha_max: float = setting(2.0, "the largest alpha that may be chosen", "factor", low=0.0, high=10.0)

    def alphas(self, step: Step, deltas: DeltaTargets) -> Float[Tensor, "expert batch"]:
        """The smaller root for each expert alone, against the mean of its targets. [expert, batch]"""
        return smaller_root(deltas.family, deltas.forward.mean(dim=0), deltas.reverse.mean(dim=0), self.alpha_max)
