"""The posterior filter: the expert rules tokens out, the strong model ranks what is left.

Think of the base as a mixture of styles, Q = sum_s q(s) Q(.|s), and of tuning as choosing one, Q_1 = Q(.|s*). By Bayes'
rule q(s*|v) = c Q_1(v)/Q(v) with c = q(s*), a posterior and so at most 1; and the strong model in that style is
P(v|s*), proportional to P(v) q(s*|v). With l = log c + log Q_1 - log Q the fused distribution is

    P~(v)  proportional to  P(v) exp(min(0, l) + beta max(0, l))

What exceeds the cap is not style but belief that tuning sharpened; its share beta passes. beta = 1 is proxy-tuning.
c is estimated at every position by the overlap sum_v min(Q(v), Q_1(v)).

Source: ours.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.core.settings import setting
from trimtab.logits.solver.tolerances import RULED_OUT_NATS
from trimtab.logits.strategy.base import Amount
from trimtab.logits.strategy.step import Step


@dataclass(frozen=True)
class Filter(Amount):
    """A bounded weight per token, from Bayes' rule."""

    is_joint: ClassVar[bool] = True

    beta: float = setting(
        0.0, "share of what exceeds the cap that passes: 0 caps, 1 is proxy-tuning", "share", low=0.0, high=1.0
    )

    def log_probs(self, step: Step) -> Float[Tensor, "expert batch vocab"]:
        """P~ for each expert alone."""
        return (step.strong + self.log_weights(step)).log_softmax(dim=-1)

    def joint_log_probs(self, step: Step) -> Float[Tensor, "batch vocab"]:
        """Every expert rules tokens out: their weights multiply."""
        return (step.strong + self.log_weights(step).sum(dim=0)).log_softmax(dim=-1)

    def log_weights(self, step: Step) -> Float[Tensor, "expert batch vocab"]:
        """min(0, l) + beta max(0, l), per token; 0 where base or expert rule the token out."""
        is_shared = (step.base > RULED_OUT_NATS) & (step.experts > RULED_OUT_NATS)
        overlap = torch.minimum(step.base.exp(), step.experts.exp()).sum(dim=-1, keepdim=True)
        # No overlap at all: the cap is a constant then, and a constant cancels; it only must not be -inf.
        excess = overlap.clamp_min(torch.finfo(overlap.dtype).tiny).log() + torch.where(
            is_shared, step.experts - step.base, 0.0
        )
        return torch.where(is_shared, excess.clamp_max(0.0) + self.beta * excess.clamp_min(0.0), 0.0)
