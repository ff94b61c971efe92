"""The surest expert speaks: the one of lowest entropy at this position.

Source: ours; an expert that was tuned on what is being asked tends to be sure of the next token, one that was not, not.
It looks at one position alone, so it holds for scoring, beams and speculation as well.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core.divergence import entropy_nats
from trimtab.logits.strategy.base import Chooser
from trimtab.logits.strategy.step import Step


@dataclass(frozen=True)
class Confident(Chooser):
    """The expert of lowest entropy, asked to meet its own targets."""

    def choose(self, step: Step, objective: Float[Tensor, "expert batch"] | None) -> Int[Tensor, " batch"]:
        """One expert per row; at equal entropies the first."""
        return entropy_nats(step.experts).argmin(dim=0)
