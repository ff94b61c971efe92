"""Intervals for everything that is computed from item scores: means, averages over tasks, ratios, gaps.

Source: Efron 1979, the percentile bootstrap. The same items are drawn for every column, so that statistics which
compare columns (a ratio, a difference) keep the pairing and do not look noisier than they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Table = Mapping[str, Mapping[str, Tensor]]  # column -> task -> [item], every column on the same items of a task


@dataclass(frozen=True)
class Interval:
    """Where a statistic lies in 95% of the draws."""

    low: float
    high: float


def interval_of(draws: Float[Tensor, " draw"], level: float = 0.95) -> Interval:
    """The middle `level` share of the draws.

    draws    [draw]   values of one statistic, none of them NaN
    returns  the two quantiles, linear between neighbours
    """
    tail = (1.0 - level) / 2
    low, high = draws.double().quantile(torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist()
    return Interval(low, high)


@dataclass(frozen=True)
class Draws:
    """Task means of every column under resampled items: column -> task -> [1 + draw]; entry 0 is the plain mean."""

    means: Mapping[str, Mapping[str, Tensor]]

    def average(self, column: str, tasks: Sequence[str]) -> Float[Tensor, " draw"]:
        """Mean over tasks of a column's task means, each task with the same weight.   [1 + draw]"""
        return torch.stack([self.means[column][task] for task in tasks]).mean(dim=0)


def resample(table: Table, generator: torch.Generator, num_draws: int = 2000) -> Draws:
    """Draw each task's items with replacement, `num_draws` times, and keep every column's mean.

    table    column -> task -> [item]; columns may lack tasks, but agree in the items of those they have
    returns  means in float64
    """
    means: dict[str, dict[str, Tensor]] = {column: {} for column in table}
    for task in dict.fromkeys(task for tasks in table.values() for task in tasks):
        columns = [column for column in table if task in table[column]]
        scores = torch.stack([table[column][task].double() for column in columns], dim=1)  # [item, column]
        num_items = scores.shape[0]
        picks = torch.randint(num_items, (num_draws, num_items), generator=generator)
        shares = torch.zeros(num_draws + 1, num_items, dtype=torch.float64)
        shares[0] = 1.0 / num_items
        shares[1:].scatter_add_(1, picks, torch.full(picks.shape, 1.0 / num_items, dtype=torch.float64))
        for column, drawn in zip(columns, (shares @ scores).unbind(dim=1), strict=True):
            means[column][task] = drawn
    return Draws(means)
