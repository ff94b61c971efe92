"""The surest expert speaks: the one of lowest entropy at this position.

Source: ours; an expert that was tuned on what is being asked tends to be sure of the next token, one that was not, not.
It looks at the position's laws alone, so it holds for scoring, beams and speculation as well.
"""

from dataclasses import dataclass

from trimtab.core.divergence import entropy_nats
from trimtab.logits.strategy.base import AlphaAmount, Choice, DistributionAmount, let_speak
from trimtab.logits.strategy.step import Step


@dataclass(frozen=True)
class Confident:
    """The expert of lowest entropy, asked to meet its own targets."""

    def __call__(self, step: Step, amount: AlphaAmount | DistributionAmount) -> Choice:
        """One expert per row; at equal entropies the first."""
        return let_speak(amount, step, expert=entropy_nats(step.experts).argmin(dim=0))
