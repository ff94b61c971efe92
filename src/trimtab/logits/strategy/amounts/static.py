"""Constant-weight fusion, strong + alpha * (expert - base).

Source: Liu et al. 2024, "Tuning Language Models by Proxy", arXiv 2401.08565, and Mitchell et al. 2024, "An Emulator
for Fine-tuning Large Language Models using Small Language Models", arXiv 2310.12962, both with alpha = 1; other values
after section 6.2 of the former.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.core.errors import BadSetting
from trimtab.core.settings import setting
from trimtab.logits.solver.deltas import DeltaTargets
from trimtab.logits.strategy.base import Amount
from trimtab.logits.strategy.step import Step


@dataclass(frozen=True)
class Static(Amount):
    """A fixed alpha per expert, the same at every step."""

    has_alpha: ClassVar[bool] = True
    is_joint: ClassVar[bool] = True

    alpha: float | dict[str, float] = setting(
        1.0,
        "how much of each expert's delta is added: one number for all experts, or one per name; 0 gives the strong "
        "model back, 1 is proxy-tuning",
        "factor",
        low=-10.0,
        high=10.0,
    )

    def check_names(self, names: tuple[str, ...]) -> None:
        """Raise BadSetting unless alphas given by name name exactly the experts."""
        if isinstance(self.alpha, dict) and set(self.alpha) != set(names):
            example = ",".join(f"{name}=1" for name in names) or "one number for all"
            raise BadSetting(
                f"alpha names the experts {', '.join(self.alpha)}.",
                f"Expected: {', '.join(names) or 'experts with names'}.",
                f"alpha={example}.",
            )

    def narrowed(self, names: tuple[str, ...]) -> "Static":
        """Alphas by name only of these experts."""
        if not isinstance(self.alpha, dict):
            return self
        return replace(self, alpha={name: alpha for name, alpha in self.alpha.items() if name in names})

    def alphas(self, step: Step, deltas: DeltaTargets) -> Float[Tensor, "expert batch"]:
        """The alphas as set. [expert, batch]"""
        if not isinstance(self.alpha, dict):
            return torch.full_like(deltas.forward[0], self.alpha)
        self.check_names(step.names)
        alphas = torch.zeros_like(deltas.forward[0])
        for index, name in enumerate(step.names):  # a table of alphas would be a copy to the device at every step
            alphas = torch.where(step.who == index, self.alpha[name], alphas)
        return alphas

    def joint_log_probs(self, step: Step) -> Float[Tensor, "batch vocab"]:
        """log p + sum_t alpha_t d_t, normalised: proxy-tuning with several experts."""
        family = step.deltas.family
        shift = (self.alphas(step, step.deltas).unsqueeze(-1) * family.delta).sum(dim=0)
        return (family.strong + shift).log_softmax(dim=-1)
