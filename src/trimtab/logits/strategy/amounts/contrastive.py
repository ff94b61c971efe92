"""Contrastive Decoding: the strong model against the small base, among the strong model's plausible tokens.

    score(v) = (1 + beta) log P(v) - beta log Q(v)   where  P(v) >= plausibility * max P;   -inf elsewhere

No expert is used: it shows what the contrast of sizes alone can do. A token that the base rules out keeps the strong
model's score, log P(v).

Source: Li et al. 2023, "Contrastive Decoding", arXiv 2210.15097, in the form of O'Brien and Lewis 2023, "Contrastive
Decoding Improves Reasoning in Large Language Models", arXiv 2309.09117 (beta 0.5, plausibility 0.1). Their expert is
our strong model, their amateur our base; the masks use log-probabilities instead of raw logits, which changes nothing.
"""

import math
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
class Contrastive(Amount):
    """Strong against base."""

    is_joint: ClassVar[bool] = True
    uses_experts: ClassVar[bool] = False

    contrast: float = setting(
        0.5,
        "beta in the paper: how much of strong minus base is added; 0 leaves only the mask",
        "factor",
        low=0.0,
        high=10.0,
    )
    plausibility: float = setting(
        0.1,
        "alpha in the paper: a token needs this share of the likeliest token's probability",
        "share",
        low=0.0,
        high=1.0,
    )

    def joint_log_probs(self, step: Step) -> Float[Tensor, "batch vocab"]:
        """The contrasted distribution; the experts are not looked at."""
        floor = step.strong.amax(dim=-1, keepdim=True) + (
            math.log(self.plausibility) if self.plausibility else -math.inf
        )
        gap = torch.where(step.base > RULED_OUT_NATS, step.strong - step.base, 0.0)
        scores = step.strong + self.contrast * gap
        return torch.where(step.strong >= floor, scores, -torch.inf).log_softmax(dim=-1)
