"""All experts speak at once, for amounts that say what that means.

    static   log p + sum_t alpha_t d_t: proxy-tuning with several experts
    filter   every expert's weight multiplies: each rules tokens out
    product  the geometric mean, mixture the arithmetic mean, of the strong model and all experts

An amount that searches its alpha has no sum: the search would have to cover all of R^T, and the objective depends on
the experts only through two numbers, so that it could not tell which of them should speak.

Source: Liu et al. 2024, arXiv 2401.08565, for static; the others are ours.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from trimtab.logits.strategy.base import Chooser
from trimtab.logits.strategy.step import Step


@dataclass(frozen=True)
class Sum(Chooser):
    """Every expert speaks."""

    is_joint: ClassVar[bool] = True

    def choose(self, step: Step, objective: Float[Tensor, "expert batch"] | None) -> None:
        """All experts in every row."""
        return
