"""Dynamic Logits Fusion: the strong model moves as far from itself as tuning moved the small one, at every step.

    alpha = argmin over [0, alpha_max] of  [KL(P~||P) - KL(Q_1||Q)]^2 + [KL(P||P~) - KL(Q||Q_1)]^2

Source: Fan et al. 2024, "On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion", arXiv 2406.15480.
The paper walks a grid (see the amount `grid`); here the same minimum is solved for exactly.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from trimtab.core.settings import setting
from trimtab.logits.solver.deltas import DeltaTargets
from trimtab.logits.solver.match import match_divergences
from trimtab.logits.strategy.base import Amount
from trimtab.logits.strategy.step import Step


@dataclass(frozen=True)
class Dynamic(Amount):
    """The paper's alpha, solved exactly."""

    has_alpha: ClassVar[bool] = True

    alpha_max: float = setting(2.0, "the largest alpha that may be chosen", "factor", low=0.0, high=10.0)

    def alphas(self, step: Step, deltas: DeltaTargets) -> Float[Tensor, "expert batch"]:
        """The minimiser of the (summed) objective for each expert alone. [expert, batch]"""
        # A sum of squared distances to several targets is, up to a constant, that to their mean: f and g are all that
        # alpha changes. So the summed objective needs no search of its own.
        return match_divergences(
            deltas.family, deltas.forward.mean(dim=0), deltas.reverse.mean(dim=0), self.alpha_max
        ).alpha
