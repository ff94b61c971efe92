"""Product of experts: the normalised weighted geometric mean of the strong model and the expert.

    P~(v)  proportional to  P(v)^(1 - weight) Q_1(v)^weight

The base is not used: a plain ensemble, for comparison. Together, the experts share the weight evenly. A token that one
of them rules out is ruled out, unless nothing would be left: then the strong model decides alone.

Source: Hinton 2002, "Training Products of Experts by Minimizing Contrastive Divergence"; as decoding of several tuned
models Shi et al. 2024, arXiv 2406.18853.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.core.settings import setting
from trimtab.logits.strategy.base import Amount
from trimtab.logits.strategy.step import Step


@dataclass(frozen=True)
class Product(Amount):
    """A geometric mean."""

    is_joint: ClassVar[bool] = True
    uses_base: ClassVar[bool] = False

    weight: float = setting(0.5, "the experts' share: 0 is the strong model, 1 the expert", "share", low=0.0, high=1.0)

    def log_probs(self, step: Step) -> Float[Tensor, "expert batch vocab"]:
        """The mean of the strong model and each expert alone."""
        return self._mean(step.strong.expand_as(step.experts), step.completed_experts)

    def joint_log_probs(self, step: Step) -> Float[Tensor, "batch vocab"]:
        """The mean of the strong model and all experts."""
        return self._mean(step.strong, step.completed_experts.mean(dim=0))

    def _mean(self, strong: Tensor, expert: Tensor) -> Tensor:
        # A weight of zero must not meet a log-probability of -inf.
        if self.weight in (0.0, 1.0):
            return (expert if self.weight else strong).log_softmax(dim=-1)
        scores = (1.0 - self.weight) * strong + self.weight * expert
        is_impossible = (scores == -torch.inf).all(dim=-1, keepdim=True)
        return torch.where(is_impossible, strong, scores).log_softmax(dim=-1)
