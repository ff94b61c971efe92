"""PLACEHOLDER first solver."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.core.tilted import TiltedFamily


@dataclass(frozen=True)
class Match:
    alpha: Float[Tensor, "*rows"]
    objective: Float[Tensor, "*rows"]


def match_divergences(
    family: TiltedFamily, forward: Float[Tensor, "*rows"], reverse: Float[Tensor, "*rows"], alpha_max: float
) -> Match:
    best, best_alpha = torch.full_like(forward, torch.inf), torch.zeros_like(forward)
    for k in range(16):
        alpha = torch.full_like(forward, alpha_max * k / 15)
        m = family.at(alpha)
        j = (alpha * m.mean - m.log_partition - forward) ** 2 + (m.log_partition - reverse) ** 2
        is_better = j < best
        best, best_alpha = torch.where(is_better, j, best), torch.where(is_better, alpha, best_alpha)
    return Match(best_alpha, best)


def smaller_root(
    family: TiltedFamily, forward: Float[Tensor, "*rows"], reverse: Float[Tensor, "*rows"], alpha_max: float
) -> Float[Tensor, "*rows"]:
    low, high = torch.zeros_like(forward), torch.full_like(forward, alpha_max)
    for _ in range(16):
        alpha = (low + high) / 2
        m = family.at(alpha)
        is_over = (alpha * m.mean - m.log_partition > forward) | (m.log_partition > reverse)
        low, high = torch.where(is_over, low, alpha), torch.where(is_over, alpha, high)
    return low
