"""All experts speak at once, for amounts that say what that means.

    static   log p + sum_t alpha_t d_t: proxy-tuning with several experts
    filter   every expert's weight multiplies: each rules tokens out
    product  the geometric mean, mixture the arithmetic mean, of the strong model and all experts

An amount that searches its alpha has no sum: the search would have to cover all of R^T, and the objective depends on
the experts only through two numbers, so that it could not tell which of them should speak.

Source: Liu et al. 2024, arXiv 2401.08565, for static; the others are ours.
"""

from dataclasses import dataclass

import torch

from trimtab.logits.strategy.base import AlphaAmount, Choice, JointAmount
from trimtab.logits.strategy.step import Step


@dataclass(frozen=True)
class Sum:
    """Every expert speaks."""

    def __call__(self, step: Step, amount: JointAmount) -> Choice:
        """All experts in every row."""
        alpha = amount.alphas(step, step.deltas) if isinstance(amount, AlphaAmount) else None
        return Choice(amount.joint_log_probs(step), alpha, torch.ones_like(step.who, dtype=torch.bool))
