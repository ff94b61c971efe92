"""The alpha at which a tilted family has moved as far from the strong model as tuning moved the small one.

    match_divergences   argmin over [0, alpha_max] of  J(a) = [f(a) - forward]^2 + [g(a) - reverse]^2
    smaller_root        the largest alpha in [0, alpha_max] with  f(a) <= forward  and  g(a) <= reverse

with f(a) = KL(p_a || p) and g(a) = KL(p || p_a). Both grow with a. So on an interval between two evaluated alphas the
pair (f, g) stays inside a box, and the box's distance to the targets bounds J from below: branch and bound.

J can have several local minima. Boxes cannot overlook one, but they shrink slowly around a minimum that misses the
targets. Therefore each interval also carries an interpolation of A (see `hermite`): it says where the minimum should
lie, and how much lower J could be if the interpolation were as wrong as its own error estimate.

This is the plain version, for any device. On CPUs `kernel` does the same row by row in machine code, many times faster,
where numba can be had (`trimtab.logits.solver.compiled.is_available` tells). The first call on a machine compiles it,
which takes some ten seconds; `trimtab.logits.solver.compiled.warm_up` does so beforehand.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.logits.solver.compiled import CompiledFamily
from trimtab.logits.solver.hermite import (
    ALPHA,
    LOG_PARTITION,
    MEAN,
    VARIANCE,
    error_estimate,
    interpolate,
    tangent_crossing,
)
from trimtab.logits.solver.tilted import TiltedFamily
from trimtab.logits.solver.tolerances import (
    CLOSE_ENOUGH,
    CUT,
    EVALUATIONS,
    EXPLORED,
    NARROW,
    NARROWEST,
    NO_MOVE,
    SMALL_GAIN,
    TINY,
    WORTH,
)

# What is noted about an interval: J at its left end, the lowest J that the interpolation predicts inside (inf when
# nothing there is worth an evaluation) and where, the lowest J that its estimated error leaves possible, the alpha that
# would tell most about the interval, and the box's lower bound.
LEFT, PREDICTED, POINT, POSSIBLE, PROBE, FLOOR = range(6)


@dataclass(frozen=True)
class Match:
    """The best alpha of every row.

    alpha      [...]  in [0, alpha_max]
    objective  [...]  J there, nats squared
    floor      [...]  no alpha in [0, alpha_max] has a J below this: a proof, if often a loose one
    """

    alpha: Float[Tensor, "*rows"]
    objective: Float[Tensor, "*rows"]
    floor: Float[Tensor, "*rows"]


def match_divergences(
    family: TiltedFamily | CompiledFamily,
    forward: Float[Tensor, "*rows"],
    reverse: Float[Tensor, "*rows"],
    alpha_max: float,
    evaluations: int = EVALUATIONS,
) -> Match:
    """The alpha in [0, alpha_max] with the smallest J, in every row at once.

    forward      [...]  target of KL(p_a || p) in nats, finite, one per row of the family
    reverse      [...]  target of KL(p || p_a)
    evaluations  at most so many passes over the vocabulary, at least 3; rows that are settled earlier cost no more on
                 a CPU, where asking is free; elsewhere all are made, and nothing is copied back to the host
    returns      Match; at equal J the smallest alpha, so 0 for a delta of 0

    What is guaranteed: alpha lies in the range, its J is exact, at most J(0) and J(alpha_max), and `floor` is a true
    lower bound. Never NaN for finite targets. A row's result does not depend on the other rows.

    That no other local minimum is lower by more than 1e-6 is not proven but measured. The search stops when the
    interpolation's error estimates rule it out, and the tests compare with dense scans over distributions that were
    made to mislead it.
    """
    if isinstance(family, CompiledFamily):
        return Match(*family.match(forward, reverse, alpha_max, evaluations))
    shape = forward.shape
    targets = torch.stack([forward.reshape(-1), reverse.reshape(-1)]).to(family.delta.dtype)  # [2, row]
    rows = torch.arange(targets.shape[1], device=targets.device)
    results = targets.new_empty(3, targets.shape[1])  # alpha, J, floor
    last = _node(family, torch.full_like(targets[0], alpha_max).view(shape))
    slots = evaluations - 1
    left, right = last.new_zeros(2, 4, targets.shape[1], slots)
    notes = torch.full_like(left[:1], torch.inf).repeat(6, 1, 1)
    left[..., 0], right[..., 0] = _node(family, torch.zeros_like(targets[0]).view(shape)), last
    notes[..., 0] = _appraise(left[..., 0], right[..., 0], targets)
    for slot in range(1, slots):
        interval, alpha, is_open = _next(left, notes, targets, last)
        if targets.device.type == "cpu":
            still = is_open.nonzero().squeeze(-1)
            if len(still) == 0:
                break
            if len(still) <= 0.7 * len(rows):
                results[:, rows] = _settle(left, notes, targets, last)
                rows, targets, last, family = rows[still], targets[:, still], last[:, still], family.take(still)
                left, right, notes = left[:, still], right[:, still], notes[:, still]
                interval, alpha, shape = interval[still], alpha[still], still.shape
        _split(left, right, notes, slot, interval, _node(family, alpha.view(shape)), targets)
    results[:, rows] = _settle(left, notes, targets, last)
    alpha, objective, floor = results.view(3, *forward.shape)
    return Match(alpha, objective, floor)


def _next(left: Tensor, notes: Tensor, targets: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which interval to split, at which alpha, and whether the row needs it; each [row]."""
    scale = targets.square().sum(dim=0)  # J(0)
    best = torch.minimum(notes[LEFT].amin(dim=-1), _objective(last, targets))
    predicted, promising = notes[PREDICTED].min(dim=-1)
    possible, unexplored = notes[POSSIBLE].min(dim=-1)
    is_promising = predicted < best - WORTH * (scale + best)
    is_open = is_promising | (possible < best - EXPLORED * scale.clamp_max(1.0))
    interval = torch.where(is_promising, promising, unexplored)
    note = torch.where(is_promising, POINT, PROBE)
    alpha = notes[note, torch.arange(len(note), device=note.device), interval]
    # A settled row is evaluated where it was before: nothing changes, whatever its neighbours still need.
    return interval, torch.where(is_open, alpha, _at(left, interval)[ALPHA]), is_open


def _split(
    left: Tensor, right: Tensor, notes: Tensor, slot: int, interval: Tensor, node: Tensor, targets: Tensor
) -> None:
    """Divide an interval per row at `node`: its left part stays in place, its right part goes to `slot`. In place."""
    lefts = torch.stack([_at(left, interval), node], dim=1)  # [4, part, row]
    rights = torch.stack([node, _at(right, interval)], dim=1)
    appraisal = _appraise(lefts, rights, targets)
    index = interval.expand(6, -1).unsqueeze(-1)
    right.scatter_(2, index[:4], node.unsqueeze(-1))
    notes.scatter_(2, index, appraisal[:, 0].unsqueeze(-1))
    left[..., slot], right[..., slot], notes[..., slot] = node, rights[:, 1], appraisal[:, 1]


def _at(book: Tensor, interval: Tensor) -> Tensor:
    """One interval per row, `interval` [row], of a book [what, row, slot]: [what, row]."""
    return book.gather(2, interval.expand(book.shape[0], -1).unsqueeze(-1)).squeeze(-1)


def _settle(left: Tensor, notes: Tensor, targets: Tensor, last: Tensor) -> Tensor:
    """The best evaluated alpha, J there, and the proven lower bound: [3, row]."""
    objectives = torch.cat([notes[LEFT], _objective(last, targets).unsqueeze(-1)], dim=-1)
    alphas = torch.cat([left[ALPHA], last[ALPHA].unsqueeze(-1)], dim=-1)
    best = objectives.amin(dim=-1)
    # Among alphas that differ by rounding only, the smallest: a delta of zero must not move anything.
    ties = objectives <= (best + WORTH * targets.square().sum(dim=0)).unsqueeze(-1)
    alpha, which = torch.where(ties, alphas, torch.inf).min(dim=-1)
    objective = objectives.gather(-1, which.unsqueeze(-1)).squeeze(-1)
    return torch.stack([alpha, objective, torch.minimum(notes[FLOOR].amin(dim=-1), best)])


def _appraise(left: Tensor, right: Tensor, targets: Tensor) -> Tensor:
    """The notes on intervals between the nodes `left` and `right` [4, ..., row]: [6, ..., row]."""
    inside = interpolate(left, right)
    f_miss = inside.alpha * inside.mean - inside.log_partition - targets[0].unsqueeze(-1)
    g_miss = inside.log_partition - targets[1].unsqueeze(-1)
    half_slope = f_miss * inside.alpha * inside.variance + g_miss * inside.mean
    half_slope[..., 0], half_slope[..., -1] = _half_slope(left, targets), _half_slope(right, targets)
    ends = torch.stack([_objective(left, targets), _objective(right, targets)], dim=-1)
    predicted, point = _predict(inside.alpha, f_miss.square() + g_miss.square(), half_slope, ends)
    floor = _floor(left, right, targets)
    possible = torch.minimum(_possible(left, right, f_miss, g_miss), torch.minimum(ends.amin(dim=-1), predicted))
    width = right[ALPHA] - left[ALPHA]
    possible = torch.maximum(floor, possible).masked_fill(width < NARROWEST, torch.inf)
    margin = _margin(left, right)
    point = torch.clamp(point, left[ALPHA] + margin, right[ALPHA] - margin)
    probe = torch.clamp(tangent_crossing(left, right), left[ALPHA] + 0.1 * width, right[ALPHA] - 0.1 * width)
    return torch.stack([ends[..., 0], predicted, point, possible, probe, floor])


def _predict(alpha: Tensor, objective: Tensor, half_slope: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest J inside intervals, inf when not worth an evaluation, and where.

    alpha, objective, half_slope  [..., point]  interpolated; the slopes at both ends are exact
    ends                          [..., 2]      exact J at both ends
    """
    predicted, point = _lowest(alpha, objective, half_slope)
    # Where the interpolation is down to rounding, in narrow intervals and close to an end, the exact slopes say more.
    end_alphas, end_slopes = (torch.stack([x[..., 0], x[..., -1]], dim=-1) for x in (alpha, half_slope))
    narrow_predicted, narrow_point = _lowest(end_alphas, ends, end_slopes)
    width = alpha[..., -1] - alpha[..., 0]
    predicted = torch.where(width < NARROW, narrow_predicted, predicted)
    point = torch.where(width < NARROW, narrow_point, point)
    distance = (end_alphas - point.unsqueeze(-1)).abs()  # [..., 2]
    inward = torch.stack([end_slopes[..., 0], -end_slopes[..., 1]], dim=-1)
    falls = (ends + 2.0 * inward.clamp_max(0.0) * distance).amin(dim=-1)
    near = distance.amin(dim=-1)
    predicted = torch.where(near < 5.0 * CLOSE_ENOUGH, torch.maximum(predicted, falls), predicted)
    is_idle = (near < CLOSE_ENOUGH) & (predicted > ends.amin(dim=-1) - SMALL_GAIN) | (width < NARROWEST)
    return predicted.masked_fill(is_idle, torch.inf), point


def _possible(left: Tensor, right: Tensor, f_miss: Tensor, g_miss: Tensor) -> Tensor:
    """The lowest J inside intervals if the interpolation is as wrong as it may be, from its misses [..., point]."""
    value_doubt, mean_doubt = error_estimate(left, right)
    f_doubt = (right[ALPHA] * mean_doubt + value_doubt).unsqueeze(-1)
    f_left = (f_miss.abs() - f_doubt).clamp_min(0.0)
    g_left = (g_miss.abs() - value_doubt.unsqueeze(-1)).clamp_min(0.0)
    return (f_left.square() + g_left.square()).amin(dim=-1)


def _floor(left: Tensor, right: Tensor, targets: Tensor) -> Tensor:
    """The squared distance of the targets to the box [f(left), f(right)] x [g(left), g(right)]."""
    low, high = torch.stack(_misses(left, targets)), torch.stack(_misses(right, targets))
    return (low.clamp_min(0.0).square() + high.clamp_max(0.0).square()).sum(dim=0)


def _lowest(alpha: Tensor, objective: Tensor, half_slope: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest minimum inside intervals, from J and J'/2 at points [..., point]: its J, inf when none, and alpha."""
    is_turn = (half_slope[..., :-1] < 0.0) & (half_slope[..., 1:] >= 0.0)
    lower = torch.minimum(objective[..., :-1], objective[..., 1:])
    predicted, cell = torch.where(is_turn, lower, torch.inf).min(dim=-1, keepdim=True)
    start, width = alpha.gather(-1, cell), alpha.diff(dim=-1).gather(-1, cell)
    falling, rising = half_slope.gather(-1, cell), half_slope.gather(-1, cell + 1)
    share = (-falling / (rising - falling).clamp_min(torch.finfo(alpha.dtype).tiny)).clamp(0.0, 1.0)
    from_left = objective.gather(-1, cell) + falling * share * width
    from_right = objective.gather(-1, cell + 1) - rising * (1.0 - share) * width
    predicted = torch.where(predicted == torch.inf, torch.inf, torch.minimum(from_left, from_right))
    return predicted.squeeze(-1), (start + share * width).squeeze(-1)


def _node(family: TiltedFamily, alpha: Tensor) -> Tensor:
    """The family evaluated at alpha, as a node [4, row]."""
    moments = family.at(alpha)
    parts = (alpha, moments.log_partition, moments.mean, moments.variance)
    return torch.stack([part.reshape(-1) for part in parts])


def _misses(node: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """f - forward and g - reverse at nodes [4, ..., row, ...]; targets broadcast."""
    return (
        node[ALPHA] * node[MEAN] - node[LOG_PARTITION] - targets[0],
        node[LOG_PARTITION] - targets[1],
    )


def _objective(node: Tensor, targets: Tensor) -> Tensor:
    f_miss, g_miss = _misses(node, targets)
    return f_miss.square() + g_miss.square()


def _half_slope(node: Tensor, targets: Tensor) -> Tensor:
    """J'/2 at nodes."""
    f_miss, g_miss = _misses(node, targets)
    return f_miss * node[ALPHA] * node[VARIANCE] + g_miss * node[MEAN]


def smaller_root(
    family: TiltedFamily | CompiledFamily,
    forward: Float[Tensor, "*rows"],
    reverse: Float[Tensor, "*rows"],
    alpha_max: float,
    evaluations: int = EVALUATIONS,
) -> Float[Tensor, "*rows"]:
    """The largest alpha in [0, alpha_max] at which neither divergence exceeds its target, in every row at once.

    forward      [...]  target of KL(p_a || p) in nats, finite, one per row of the family
    reverse      [...]  target of KL(p || p_a)
    evaluations  at most so many passes over the vocabulary, at least 2; fewer on a CPU when all rows are settled
    returns      [...]  the smaller of the two roots, to 1e-5; alpha_max where neither target is reached; 0 where no
                 alpha in the range moves the distribution at all

    Both divergences grow with alpha, so max(f - forward, g - reverse) changes its sign once and is bracketed
    throughout.
    """
    if isinstance(family, CompiledFamily):
        return family.smaller_root(forward, reverse, alpha_max, evaluations)[0]
    targets = torch.stack([forward.reshape(-1), reverse.reshape(-1)]).to(family.delta.dtype)  # [2, row]
    last = right = _node(family, torch.full_like(targets[0], alpha_max).view(forward.shape))
    left = _node(family, torch.zeros_like(targets[0]).view(forward.shape))
    for _ in range(evaluations - 2):
        root, point = _crossing(left, right, targets)
        near = torch.minimum(root - left[ALPHA], right[ALPHA] - root)
        is_open = (near > CLOSE_ENOUGH) & (_excess(right, targets) >= 0.0)
        if targets.device.type == "cpu" and not bool(is_open.any()):
            break
        node = _node(family, torch.where(is_open, point, left[ALPHA]).view(forward.shape))
        is_over = (_excess(node, targets) >= 0.0) & is_open
        left, right = torch.where(is_over, left, node), torch.where(is_over, node, right)
    root = torch.where(_excess(last, targets) < 0.0, last[ALPHA], _crossing(left, right, targets)[0])
    moves = torch.maximum(last[LOG_PARTITION], last[ALPHA] * last[MEAN] - last[LOG_PARTITION])
    return torch.where(moves > NO_MOVE, root, 0.0).view(forward.shape)


def _excess(node: Tensor, targets: Tensor) -> Tensor:
    """By how much the more exceeded divergence is above its target; negative when both are below."""
    return torch.maximum(*_misses(node, targets))


def _crossing(left: Tensor, right: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Where the excess crosses zero between two nodes, as interpolated, and where best to evaluate next."""
    inside = interpolate(left, right)
    excess = torch.maximum(
        inside.alpha * inside.mean - inside.log_partition - targets[0].unsqueeze(-1),
        inside.log_partition - targets[1].unsqueeze(-1),
    )
    excess[..., 0], excess[..., -1] = _excess(left, targets), _excess(right, targets)
    cell = (excess >= 0.0).to(torch.int8).argmax(dim=-1, keepdim=True).clamp_min(1) - 1
    low, high = excess.gather(-1, cell), excess.gather(-1, cell + 1)
    share = (-low / (high - low).clamp_min(torch.finfo(low.dtype).tiny)).clamp(0.0, 1.0)
    root = (inside.alpha.gather(-1, cell) + share * inside.alpha.diff(dim=-1).gather(-1, cell)).squeeze(-1)
    margin = _margin(left, right)
    return root, torch.clamp(root, left[ALPHA] + margin, right[ALPHA] - margin)


def _margin(left: Tensor, right: Tensor) -> Tensor:
    """How much of an interval the next evaluation must cut off: the more, the less the interval is understood."""
    _, mean_doubt = error_estimate(left, right)
    share = (2.0 * mean_doubt / (right[MEAN] - left[MEAN]).clamp_min(TINY)).clamp_max(CUT)
    return share * (right[ALPHA] - left[ALPHA])
