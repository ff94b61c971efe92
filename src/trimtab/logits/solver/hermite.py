"""A(alpha) between two evaluated alphas: the polynomial of degree five through both ends' A, A' and A''.

With the ends known this exactly, the divergences inside an interval can be looked at without touching the vocabulary.
What convexity of A allows is kept: A' between its end values, A'' at least 0, A above its end tangents.
"""

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.logits.solver.tolerances import TINY

# A node is one evaluated alpha of a row: a tensor [4, ...] of alpha, A, A' and A''.
ALPHA, LOG_PARTITION, MEAN, VARIANCE = range(4)


@dataclass(frozen=True)
class Interpolation:
    """The family inside intervals, as interpolated at fixed points, ends included; each [..., point]."""

    alpha: Float[Tensor, "*interval point"]
    log_partition: Float[Tensor, "*interval point"]
    mean: Float[Tensor, "*interval point"]
    variance: Float[Tensor, "*interval point"]


def interpolate(left: Float[Tensor, "jet=4 *interval"], right: Float[Tensor, "jet=4 *interval"]) -> Interpolation:
    """Interpolate between the nodes `left` and `right`, [4, ...], of intervals."""
    at, weights = points(left.dtype, left.device)
    width = right[ALPHA] - left[ALPHA]
    scale = torch.stack([torch.ones_like(width), width, width * width])
    ends = torch.cat([left[1:] * scale, right[1:] * scale]).movedim(0, -1)  # [..., 6]
    value, slope, curvature = (ends @ weights).chunk(3, dim=-1)
    per_width = _reciprocal(width).unsqueeze(-1)
    alpha = left[ALPHA].unsqueeze(-1) + width.unsqueeze(-1) * at
    (alpha_l, value_l, slope_l, _), (alpha_r, value_r, slope_r, _) = left.unsqueeze(-1), right.unsqueeze(-1)
    tangents = torch.maximum(value_l + slope_l * (alpha - alpha_l), value_r - slope_r * (alpha_r - alpha))
    return Interpolation(
        alpha=alpha,
        log_partition=torch.maximum(value, tangents),
        mean=torch.clamp(slope * per_width, slope_l, slope_r),
        variance=(curvature * per_width.square()).clamp_min(0.0),
    )


def error_estimate(
    left: Float[Tensor, "jet=4 *interval"], right: Float[Tensor, "jet=4 *interval"]
) -> tuple[Tensor, Tensor]:
    """How far the interpolated A and A' may be off inside intervals: an estimate, not a bound.

    Two rules of integration are compared with what is known: A' against the trapezoid of A'', A against the corrected
    trapezoid of A'. Both differences vanish fast where A is smooth and are large where it has a kink.
    returns   errors of A and of A', each [...]
    """
    width = right[ALPHA] - left[ALPHA]
    mean_gap = right[MEAN] - left[MEAN] - width * (left[VARIANCE] + right[VARIANCE]) / 2
    trapezoid = width * (left[MEAN] + right[MEAN]) / 2 + width.square() * (left[VARIANCE] - right[VARIANCE]) / 12
    value_gap = right[LOG_PARTITION] - left[LOG_PARTITION] - trapezoid
    value_gap, mean_gap = value_gap.abs(), mean_gap.abs()
    return width * mean_gap / 8 + value_gap / 2, mean_gap / 4 + 2 * value_gap * _reciprocal(width)


def tangent_crossing(
    left: Float[Tensor, "jet=4 *interval"], right: Float[Tensor, "jet=4 *interval"]
) -> Float[Tensor, "*interval"]:
    """Where the end tangents of A cross, [...]: the kink itself where A is nearly two straight lines."""
    rise = right[MEAN] - left[MEAN]
    offset = left[LOG_PARTITION] - right[LOG_PARTITION] + right[MEAN] * right[ALPHA] - left[MEAN] * left[ALPHA]
    return torch.where(rise > 0.0, offset * _reciprocal(rise), (left[ALPHA] + right[ALPHA]) / 2)


def _reciprocal(values: Tensor) -> Tensor:
    return 1.0 / values.clamp_min(TINY)


@cache
def points(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Points in [0, 1] and the weights [6, 3 * point] of the end values there, for the polynomial and two derivatives.

    The points crowd at both ends, where the next minimum usually lies once one end has come close to it.
    """
    crowd = 0.08 * 0.5 ** torch.arange(9, dtype=torch.float64)
    middle = torch.linspace(0.08, 0.92, 12, dtype=torch.float64)[1:-1]
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    at = torch.cat([ends, crowd, middle, 1.0 - crowd]).sort().values
    # Rows: A, h A', h^2 A'' at the left end, then at the right end; columns: powers 0 to 5 of the point.
    coefficients = torch.tensor(
        [
            [1.0, 0.0, 0.0, -10.0, 15.0, -6.0],
            [0.0, 1.0, 0.0, -6.0, 8.0, -3.0],
            [0.0, 0.0, 0.5, -1.5, 1.5, -0.5],
            [0.0, 0.0, 0.0, 10.0, -15.0, 6.0],
            [0.0, 0.0, 0.0, -4.0, 7.0, -3.0],
            [0.0, 0.0, 0.0, 0.5, -1.0, 0.5],
        ],
        dtype=torch.float64,
    )
    power = torch.arange(6, dtype=torch.float64).unsqueeze(-1)
    powers = at**power  # [6, point]
    slopes = power * at ** (power - 1).clamp_min(0.0)
    curvatures = power * (power - 1) * at ** (power - 2).clamp_min(0.0)
    weights = torch.cat([coefficients @ table for table in (powers, slopes, curvatures)], dim=-1)
    return at.to(device, dtype), weights.to(device, dtype)
