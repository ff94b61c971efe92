"""Mixture: the weighted arithmetic mean of the strong model's and the expert's probabilities.

    P~(v) = (1 - weight) P(v) + weight Q_1(v)

The base is not used: a plain ensemble, for comparison. Together, the experts share the weight evenly.
A token is possible where one of them allows it, also where the strong model alone would not.

Source: Stone 1961, "The Opinion Pool".
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.core.settings import setting
from trimtab.logits.strategy.base import Amount
from trimtab.logits.strategy.step import Step


@dataclass(frozen=True)
class Mixture(Amount):
    """An arithmetic mean."""

    is_joint: ClassVar[bool] = True
    uses_base: ClassVar[bool] = False

    weight: float = setting(0.5, "the experts' share: 0 is the strong model, 1 the expert", "share", low=0.0, high=1.0)

    def log_probs(self, step: Step) -> Float[Tensor, "expert batch vocab"]:
        """The mean of the strong model and each expert alone."""
        return self._mean(step.strong.expand_as(step.experts), step.completed_experts)

    def joint_log_probs(self, step: Step) -> Float[Tensor, "batch vocab"]:
        """The mean of the strong model and all experts."""
        return self._mean(step.strong, step.completed_experts.logsumexp(dim=0) - math.log(step.experts.shape[0]))

    def _mean(self, strong: Tensor, expert: Tensor) -> Tensor:
        if self.weight in (0.0, 1.0):  # log 0 has no place below
            return (expert if self.weight else strong).log_softmax(dim=-1)
        scores = torch.logaddexp(strong + math.log1p(-self.weight), expert + math.log(self.weight))
        return scores.log_softmax(dim=-1)
