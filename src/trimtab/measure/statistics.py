"""Intervals, tests and gaps for everything that is computed from item scores: means, averages over tasks, ratios.

Sources: the percentile bootstrap, Efron 1979; the randomisation test of paired differences, Fisher 1935. The same items
are drawn for every condition, so that statistics which compare conditions (a ratio, a difference) keep the pairing.

Two figures say how near a combined model comes to the tuned one; they differ, so each is named. `ratio_to_ceiling` is
what Fan et al. 2024 (arXiv 2406.15480) call "closes the gap by": a ratio of averages, generous where the small model
alone is good. `gap_recovered` is the performance gap recovered, PGR, of Burns et al. 2023 (arXiv 2312.09390, section
3): 0 is the small model alone, 1 the ceiling.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.measure.records import Points

MAX_FLIPS_AT_ONCE = 4_000_000
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Interval:
    """Where a statistic lies in 95% of the draws."""

    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """A statistic with its interval; `value` is None where it has no meaning, and `reason` then says why."""

    value: float | None
    interval: Interval | None = None
    reason: str = ""


def interval_of(draws: Float[Tensor, " draw"], level: float = 0.95) -> Interval:
    """The middle `level` share of the draws.

    draws    [draw]   values of one statistic, none of them NaN
    returns  the two quantiles, linear between neighbours
    """
    tail = (1.0 - level) / 2
    low, high = draws.double().quantile(torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist()
    return Interval(low, high)


def measured(draws: Float[Tensor, " draw"]) -> Measured:
    """A statistic from its draws, entry 0 being the value itself."""
    return Measured(float(draws[0]), interval_of(draws[1:]))


def resample(
    points: Points, generator: torch.Generator, num_draws: int = 2000
) -> dict[str, dict[str, Float[Tensor, " draw"]]]:
    """Draw each task's items with replacement, `num_draws` times, and keep every condition's mean.

    points   condition -> task -> [item]; conditions may lack tasks, but agree in the items of those they have
    returns  condition -> task -> [1 + draw] in float64; entry 0 is the plain mean
    """
    means: dict[str, dict[str, Tensor]] = {name: {} for name in points}
    for task in dict.fromkeys(task for tasks in points.values() for task in tasks):
        names = [name for name in points if task in points[name]]
        scores = torch.stack([points[name][task].double() for name in names], dim=1)  # [item, condition]
        num_items = scores.shape[0]
        picks = torch.randint(num_items, (num_draws, num_items), generator=generator)
        shares = torch.zeros(num_draws + 1, num_items, dtype=torch.float64)
        shares[0] = 1.0 / num_items
        shares[1:].scatter_add_(1, picks, torch.full(picks.shape, 1.0 / num_items, dtype=torch.float64))
        for name, drawn in zip(names, (shares @ scores).unbind(dim=1), strict=True):
            means[name][task] = drawn
    return means


def weighted(means: Mapping[str, Tensor], shares: Mapping[str, float]) -> Float[Tensor, " draw"]:
    """The average over tasks of one condition's means, task -> [1 + draw]; `shares` sum to 1.   [1 + draw]"""
    return torch.stack([share * means[task] for task, share in shares.items()]).sum(dim=0)


def ratio_to_ceiling(fused: Float[Tensor, " draw"], ceiling: Float[Tensor, " draw"]) -> Measured:
    """fused / ceiling; None where the ceiling itself scores nothing.

    fused, ceiling  [1 + draw]   averages over tasks, entry 0 the plain one (see `resample`)
    """
    if not (ceiling > 0).all():
        return Measured(None, reason="the ceiling scores 0 in some draws of the items")
    return measured(fused / ceiling)


def gap_recovered(
    fused: Float[Tensor, " draw"],
    expert: Float[Tensor, " draw"],
    ceiling: Float[Tensor, " draw"],
    min_gap: float = 1.0,
) -> Measured:
    """(fused - expert) / (ceiling - expert), where there is a gap to recover.

    fused, expert, ceiling  [1 + draw]   averages over tasks, entry 0 the plain one; points of 100
    min_gap                 points by which the ceiling must exceed the expert, else the quotient is noise
    returns                 value None below `min_gap`; no interval where over 2.5% of the draws have no gap at all
    """
    gap = ceiling - expert
    if float(gap[0]) < min_gap:
        reason = f"the ceiling exceeds the expert by {float(gap[0]):.1f} points, less than {min_gap:g}"
        return Measured(None, reason=reason)
    value = float((fused - expert)[0] / gap[0])
    has_gap = gap[1:] > 0
    if float(has_gap.double().mean()) < 0.975:
        return Measured(value, reason="no interval: in over 2.5% of the draws the ceiling does not exceed the expert")
    return Measured(value, interval_of(((fused - expert)[1:] / gap[1:])[has_gap]))


@dataclass(frozen=True)
class Paired:
    """first - second, in the unit of the scores, and how often chance alone gives as much."""

    difference: float
    p_value: float
    num_items: int
    num_wins: int
    num_losses: int


def paired_test(
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    shares: Mapping[str, float],
    generator: torch.Generator,
    num_flips: int = 10_000,
) -> Paired:
    """Two-sided sign-flip test of an average over tasks of the mean difference on the same items.

    first, second  task -> [item]   scores of the two, in the same order of items
    shares         task -> its weight in the average; they sum to 1
    returns        p_value >= 1 / (num_flips + 1); 1 where no item differs
    """
    differences = {task: first[task].double() - second[task].double() for task in shares}
    weights = torch.cat([shares[task] * d / d.numel() for task, d in differences.items()])  # sums to the statistic
    observed = float(weights.sum())
    moved = weights[weights != 0]
    counts = {"num_wins": int((moved > 0).sum()), "num_losses": int((moved < 0).sum())}
    if not len(moved):
        return Paired(observed, 1.0, len(weights), **counts)
    at_least = 0
    for start in range(0, num_flips, max(1, MAX_FLIPS_AT_ONCE // len(moved))):
        size = min(num_flips - start, max(1, MAX_FLIPS_AT_ONCE // len(moved)))
        signs = torch.randint(2, (size, len(moved)), generator=generator).double() * 2 - 1
        # A hair of tolerance: sums of the same terms in another order must count as equal.
        at_least += int(((signs @ moved).abs() >= abs(observed) - 1e-12).sum())
    return Paired(observed, (at_least + 1) / (num_flips + 1), len(weights), **counts)
