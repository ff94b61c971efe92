"""Is one strategy better than another on the same items, or was it luck?

Source: Fisher 1935, the randomisation test of paired differences: were the two alike, each item's difference could as
well have had the other sign.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_FLIPS_AT_ONCE = 4_000_000


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
