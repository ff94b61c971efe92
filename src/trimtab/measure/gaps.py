"""Two ways to say how near a fused model comes to the tuned strong one; they differ, so each is named.

`ratio_to_ceiling` is what Fan et al. 2024 (arXiv 2406.15480) call "closes the gap by": a ratio of averages, generous
where the expert alone is good. `gap_recovered` is the performance gap recovered, PGR, of Burns et al. 2023
(arXiv 2312.09390, section 3): 0 is the expert alone, 1 the ceiling.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from trimtab.measure.intervals import Interval, interval_of


@dataclass(frozen=True)
class Measured:
    """A statistic with its interval; `value` is None where it has no meaning, and `reason` then says why."""

    value: float | None
    interval: Interval | None = None
    reason: str = ""


def measured(draws: Float[Tensor, " draw"]) -> Measured:
    """A statistic from its draws, entry 0 being the value itself."""
    return Measured(float(draws[0]), interval_of(draws[1:]))


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
