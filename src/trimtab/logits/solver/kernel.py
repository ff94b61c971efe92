"""The search of `match`, row by row, as machine code for CPUs: numba compiles it at the first call.

The same nodes, intervals, notes and stopping rules as in `match` and `hermite`, which stay the readable reference; the
tests hold the two against each other. What is gained: no tensors of thirty numbers, no float64 copies of the members,
no pass over the vocabulary that is not needed. The members are read as they come and widened in registers.

Nothing here is typed for Python's checkers: numba infers all types, and would trip over a checker's wrappers. Arrays
are C-contiguous; functions run without the interpreter's lock.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, no_type_check

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from trimtab.logits.solver.tolerances import (
    CLOSE_ENOUGH,
    CUT,
    EXPLORED,
    NARROW,
    NARROWEST,
    NO_MOVE,
    RULED_OUT_NATS,
    SMALL_GAIN,
    TINY,
    WORTH,
)

# Sums of exponentials outside this range may have lost tokens at an end of float64: they are made again, shifted.
LOWEST_SUM, HIGHEST_SUM = 1e-100, 1e290

# What is known of a row before its search: log of the strong model's mass, the delta's mean and variance under it, the
# two divergences of base and expert, and the centred delta's plain mean over the vocabulary.
LOG_MASS, CENTRE, SPREAD, FORWARD, REVERSE, PLAIN_MEAN = range(6)

# A node: alpha, A, A' and A''. An interval's notes are those of `match`.
ALPHA, LOG_PARTITION, MEAN, VARIANCE = range(4)
LEFT, PREDICTED, POINT, POSSIBLE, PROBE, FLOOR = range(6)

TINIEST = float(np.finfo(np.float64).tiny)


def _compiled(*relaxed: str) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: machine code that is kept beside the source, or in the user's cache, where either can be written.

    relaxed    which of LLVM's fast-math flags hold
    """
    compiler = partial(numba.njit, nogil=True, error_model="numpy", fastmath=set(relaxed))

    def wrap(function: Callable[..., Any]) -> Any:
        try:
            return compiler(cache=True)(function)
        except RuntimeError:  # there is no place to write to: compiled anew in each process
            return compiler()(function)

    return wrap


# Sums over the vocabulary may be taken in any order (so that they run in vector registers); nothing else is relaxed:
# NaN and infinities keep their meaning.
_summing = _compiled("reassoc", "contract", "nsz")
_exact = _compiled()


@intrinsic
@no_type_check
def _bits(typing_context, number):
    """The 64 bits of a float as an integer."""

    @no_type_check
    def emit(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.int64))

    return types.int64(types.float64), emit


@intrinsic
@no_type_check
def _number(typing_context, bits):
    """The float of 64 bits."""

    @no_type_check
    def emit(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.float64))

    return types.float64(types.int64), emit


LOG2_E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10  # their sum is log 2 to 33 more bits
ROUNDING = 1.5 * 2.0**52  # a small number added to this has its nearest integer in the lowest bits
E2, E3, E4, E5, E6, E7, E8, E9, E10, E11, E12 = (1.0 / math.factorial(k) for k in range(2, 13))


@_compiled("contract")
@no_type_check
def _exp(x):
    """e^x to 3e-16 of itself, without branches, so that a loop over it runs in vector registers.

    Below -708 it is e^-708, about 3e-308, and above 709 it is e^709; NaN stays NaN.
    """
    x = -708.0 if x < -708.0 else x
    x = 709.0 if x > 709.0 else x
    shifted = x * LOG2_E + ROUNDING
    whole = shifted - ROUNDING
    r = x - whole * LN2_HIGH
    r = r - whole * LN2_LOW
    y = E12
    for e in (E11, E10, E9, E8, E7, E6, E5, E4, E3, E2, 1.0, 1.0):
        y = y * r + e
    return y * _number((_bits(shifted) + 1023) << 52)


@_exact
@no_type_check
def _delta(base, expert):
    """One token's delta: 0 where base or expert rule it out."""
    gap = np.float64(expert) - np.float64(base)
    return gap if (base > RULED_OUT_NATS) & (expert > RULED_OUT_NATS) else 0.0


# ---- what is known of a row before its search


@_summing
@no_type_check
def _sums(strong, base, expert, strong_top, base_top, expert_top):
    """Masses of the three distributions, moments of delta (two under strong, one under base and expert each), and
    its sum over tokens.

    Each distribution is read relative to its `top`; base and expert count on the tokens that both allow.
    """
    mass = first = second = base_mass = base_first = expert_mass = expert_first = total = 0.0
    for token in range(strong.shape[0]):
        q, t = np.float64(base[token]), np.float64(expert[token])
        is_shared = (q > RULED_OUT_NATS) & (t > RULED_OUT_NATS)
        delta = t - q if is_shared else 0.0
        total += delta
        p = _exp(np.float64(strong[token]) - strong_top)
        mass += p
        p *= delta
        first += p
        second += p * delta
        p = _exp(q - base_top) if is_shared else 0.0
        base_mass += p
        base_first += p * delta
        p = _exp(t - expert_top) if is_shared else 0.0
        expert_mass += p
        expert_first += p * delta
    return mass, first, second, base_mass, base_first, expert_mass, expert_first, total


@_exact
@no_type_check
def _tops(strong, base, expert):
    """The highest log-probability of each distribution; for base and expert among the tokens that both allow."""
    tops = (-np.inf, -np.inf, -np.inf)
    for token in range(strong.shape[0]):
        q, t = np.float64(base[token]), np.float64(expert[token])
        is_shared = (q > RULED_OUT_NATS) & (t > RULED_OUT_NATS)
        tops = (
            max(tops[0], np.float64(strong[token])),
            max(tops[1], q) if is_shared else tops[1],
            max(tops[2], t) if is_shared else tops[2],
        )
    return tops


@_exact
@no_type_check
def _is_whole(mass):
    """Whether a sum lies where no token that matters can have been lost; not so for NaN."""
    return (mass > LOWEST_SUM) & (mass < HIGHEST_SUM)


@_exact
@no_type_check
def prepare_rows(strong, base, experts, start, stop, row_stats):
    """What is known of the rows start to stop, [expert, batch] counted through, before any search.

    strong, base  [batch, vocab]          log-probabilities, float32 or float64; a constant added to a row cancels
    experts       [expert, batch, vocab]
    row_stats         [expert * batch, 6]     written
    """
    for row in range(start, stop):
        b = row % strong.shape[0]
        p, q, t = strong[b], base[b], experts[row // strong.shape[0], b]
        tops = (0.0, 0.0, 0.0)
        mass, first, second, base_mass, base_first, expert_mass, expert_first, total = _sums(p, q, t, 0.0, 0.0, 0.0)
        # Log-probabilities sum to 1 as they are. Only where a row was moved by a constant are its tops needed.
        is_fine = _is_whole(mass) & ((base_mass == 0.0) | (_is_whole(base_mass) & _is_whole(expert_mass)))
        if not is_fine:
            tops = _tops(p, q, t)
            mass, first, second, base_mass, base_first, expert_mass, expert_first, total = _sums(p, q, t, *tops)
        centre = first / mass
        spread = second / mass - centre * centre
        row_stats[row, LOG_MASS] = math.log(mass) + tops[0]
        row_stats[row, CENTRE] = centre
        # A delta that is nearly constant: the difference of two large numbers would be rounding.
        if spread < 1e-6 * centre * centre:
            spread = _moments(p, q, t, row_stats[row, LOG_MASS], centre, 0.0)[2]
        row_stats[row, SPREAD] = max(spread, 0.0)
        row_stats[row, PLAIN_MEAN] = total / p.shape[0] - centre
        row_stats[row, FORWARD] = row_stats[row, REVERSE] = 0.0
        if base_mass > 0.0 or base_mass != base_mass:
            offset = math.log(expert_mass) + tops[2] - math.log(base_mass) - tops[1]
            forward, reverse = expert_first / expert_mass - offset, offset - base_first / base_mass
            row_stats[row, FORWARD] = 0.0 if forward < 0.0 else forward
            row_stats[row, REVERSE] = 0.0 if reverse < 0.0 else reverse


# ---- the family at one alpha, from the members


@_summing
@no_type_check
def _tilted_sums(strong, base, expert, shift, centre, alpha):
    """Sums of e^(log p + alpha d - shift) times 1, d and d^2, with d centred."""
    mass = first = second = 0.0
    for token in range(strong.shape[0]):
        delta = _delta(base[token], expert[token]) - centre
        p = _exp(np.float64(strong[token]) + alpha * delta - shift)
        mass += p
        p *= delta
        first += p
        second += p * delta
    return mass, first, second


@_exact
@no_type_check
def _highest(strong, base, expert, centre, alpha):
    """The highest log p + alpha d of a row, d centred."""
    top = -np.inf
    for token in range(strong.shape[0]):
        top = max(top, np.float64(strong[token]) + alpha * (_delta(base[token], expert[token]) - centre))
    return top


@_exact
@no_type_check
def _moments(strong, base, expert, log_mass, centre, alpha):
    """A, A' and A'' at alpha."""
    shift = log_mass
    mass, first, second = _tilted_sums(strong, base, expert, shift, centre, alpha)
    if not _is_whole(mass):  # the mass is e^A, at least 1: only a huge delta leads here
        shift = _highest(strong, base, expert, centre, alpha)
        mass, first, second = _tilted_sums(strong, base, expert, shift, centre, alpha)
    mean = first / mass
    variance = second / mass - mean * mean
    return math.log(mass) + shift - log_mass, mean, 0.0 if variance < 0.0 else variance


@_exact
@no_type_check
def evaluate(strong, base, experts, row_stats, alpha, start, stop, moments):
    """A, A' and A'' of the rows start to stop at alpha [expert * batch], into moments [3, expert * batch]."""
    for row in range(start, stop):
        b = row % strong.shape[0]
        values = _moments(
            strong[b],
            base[b],
            experts[row // strong.shape[0], b],
            row_stats[row, LOG_MASS],
            row_stats[row, CENTRE],
            alpha[row],
        )
        moments[0, row], moments[1, row], moments[2, row] = values


@_summing
@no_type_check
def _write_log_probs(strong, base, expert, constant, alpha, fused):
    for token in range(strong.shape[0]):
        fused[token] = np.float64(strong[token]) + alpha * _delta(base[token], expert[token]) - constant


@_exact
@no_type_check
def write_fused(strong, base, experts, row_stats, alpha, expert, start, stop, fused, moved):
    """The distributions of one expert per batch row, and how far they moved.

    alpha    [expert, batch]
    expert   [batch]          which expert is chosen in each row
    distribution      [batch, vocab]   written: log-probabilities of p_alpha, in the type of `strong`
    moved    [2, batch]       written: KL(p_alpha || p) and KL(p || p_alpha)
    """
    for b in range(start, stop):
        who = expert[b]
        row, factor = who * strong.shape[0] + b, alpha[who, b]
        p, q, t, log_mass, centre = (
            strong[b],
            base[b],
            experts[who, b],
            row_stats[row, LOG_MASS],
            row_stats[row, CENTRE],
        )
        log_partition, mean, _ = _moments(p, q, t, log_mass, centre, factor)
        _write_log_probs(p, q, t, log_mass + log_partition + factor * centre, factor, fused[b])
        there, back = factor * mean - log_partition, log_partition
        moved[0, b], moved[1, b] = 0.0 if there < 0.0 else there, 0.0 if back < 0.0 else back


# ---- the family at one alpha, from moments and the few tokens that moments do not hold
#
# With h = alpha_max / 2, c the delta's plain mean and y = d - c, a token's share of Z at alpha = h + b is
#
#     p e^(alpha d) = w e^(b c) e^(b y)     where  w = p e^(h d)  and  |b| <= h
#
# so that any set of tokens is summed once and for all by its moments M_k = sum of w y^k, k = 0 to ORDER:
#
#     Z(alpha) = e^(b c) sum_k b^k M_k / k!      and Z', Z'' likewise
#
# What is left out of a token's Z, Z' and Z'' is at most (1/h + |c|)^2 x^(ORDER + 1) / (ORDER - 1)! e^B, where x = h |y|
# and B = log p + h (d + |y| + |c|): Lagrange's remainder, with w e^(bc) max(1, e^(by)) <= e^B. Tokens for which this is
# at most TRUNCATION / vocab are summed by moments, the others one by one. Because Z >= 1 (the delta is centred), A is
# wrong by at most TRUNCATION to first order, A' by (1 + |A'|) times as much and A'' by 3 (1 + |A'|)^2 + A'' times as
# much. Unlikely tokens, small deltas and tokens that members rule out all qualify: most of a large vocabulary.

ORDER = 16
TRUNCATION = 1e-13
WORTH_MOMENTS = 2048  # in smaller vocabularies one by one is faster
BLOCK = 1024
# log x is bounded from above by its tangents at these points, so that no logarithm is taken.
TOUCHING = (0.35, 0.7, 1.4, 2.8)


@_summing
@no_type_check
def _sort_out(strong, base, expert, log_mass, centre, middle, half, gates, levels, weight, y, is_far):
    """One block of tokens: log p, w, y, and whether moments cannot hold them; w is 0 then."""
    first, second, third, fourth = gates
    for token in range(strong.shape[0]):
        log_prob = np.float64(strong[token]) - log_mass
        delta = _delta(base[token], expert[token]) - centre
        off = delta - middle
        x = half * abs(off)
        bound = log_prob + half * (delta + abs(middle)) + x
        is_held = (bound + (ORDER + 1) / TOUCHING[0] * x <= first) | (bound + (ORDER + 1) / TOUCHING[1] * x <= second)
        is_held |= (bound + (ORDER + 1) / TOUCHING[2] * x <= third) | (bound + (ORDER + 1) / TOUCHING[3] * x <= fourth)
        weight[token] = _exp(log_prob + half * delta) if is_held else 0.0
        levels[token] = log_prob
        y[token] = off
        is_far[token] = not is_held


@_summing
@no_type_check
def _two_moments(weight, y, count):
    """Sums of w and w y; w becomes w y^2."""
    even = odd = 0.0
    for token in range(count):
        w = weight[token]
        even += w
        w *= y[token]
        odd += w
        weight[token] = w * y[token]
    return even, odd


@_exact
@no_type_check
def _gather(strong, base, expert, row_stats, half, log_probs, deltas, moments):
    """Sums most tokens by moments and lists the others; returns how many others.

    known               [6]          what is known of the row
    log_probs, deltas   [vocab + 8]  written: log p and d of the tokens that moments do not hold
    moments             [ORDER + 2]  written: M_k / k!; the last is scratch
    """
    vocab, log_mass, centre, middle = strong.shape[0], row_stats[LOG_MASS], row_stats[CENTRE], row_stats[PLAIN_MEAN]
    levels, weight, y, is_far = np.zeros(BLOCK), np.empty(BLOCK), np.zeros(BLOCK), np.zeros(BLOCK, dtype=np.bool_)
    eights = is_far.view(np.uint64)
    level = math.log(TRUNCATION / vocab) + math.lgamma(ORDER) - 2.0 * math.log(max(1.0, 1.0 / half + abs(middle)))
    gates = (
        level - (ORDER + 1) * (math.log(TOUCHING[0]) - 1.0),
        level - (ORDER + 1) * (math.log(TOUCHING[1]) - 1.0),
        level - (ORDER + 1) * (math.log(TOUCHING[2]) - 1.0),
        level - (ORDER + 1) * (math.log(TOUCHING[3]) - 1.0),
    )
    moments[:] = 0.0
    count = 0
    for start in range(0, vocab, BLOCK):
        size = min(BLOCK, vocab - start)
        part = slice(start, start + size)
        is_far[size:] = False
        _sort_out(
            strong[part], base[part], expert[part], log_mass, centre, middle, half, gates, levels, weight, y, is_far
        )
        for order in range(0, ORDER + 2, 2):
            even, odd = _two_moments(weight, y, size)
            moments[order] += even
            moments[order + 1] += odd
        for eight in range((size + 7) // 8):
            if eights[eight] != 0:  # eight tokens are passed over at a time, or listed without a branch
                for token in range(8 * eight, 8 * eight + 8):
                    log_probs[count], deltas[count] = levels[token], y[token] + middle
                    count += np.int64(is_far[token])
    factorial = 1.0
    for order in range(2, ORDER + 1):
        factorial *= order
        moments[order] /= factorial
    return count


@_summing
@no_type_check
def _listed_sums(log_probs, deltas, shift, alpha):
    """As `_tilted_sums`, of tokens that are listed."""
    mass = first = second = 0.0
    for token in range(log_probs.shape[0]):
        delta = deltas[token]
        p = _exp(log_probs[token] + alpha * delta - shift)
        mass += p
        p *= delta
        first += p
        second += p * delta
    return mass, first, second


@_exact
@no_type_check
def _held_sums(moments, middle, b, shift):
    """As `_tilted_sums`, of tokens that moments hold."""
    value = slope = half_curvature = 0.0
    for order in range(ORDER, -1, -1):
        half_curvature = half_curvature * b + slope
        slope = slope * b + value
        value = value * b + moments[order]
    scale = math.exp(b * middle - shift)
    first = slope + middle * value
    second = 2.0 * half_curvature + middle * (2.0 * slope + middle * value)
    return scale * value, scale * first, scale * second


@_exact
@no_type_check
def _gathered_moments(log_probs, deltas, moments, middle, half, alpha):
    """A, A' and A'' at alpha."""
    shift = 0.0
    mass, first, second = _listed_sums(log_probs, deltas, shift, alpha)
    if not _is_whole(mass) and log_probs.shape[0] > 0 and mass > 1.0:  # see `_moments`
        shift = (log_probs + alpha * deltas).max()
        mass, first, second = _listed_sums(log_probs, deltas, shift, alpha)
    held = _held_sums(moments, middle, alpha - half, shift)
    mass, first, second = mass + held[0], first + held[1], second + held[2]
    mean = first / mass
    variance = second / mass - mean * mean
    return math.log(mass) + shift, mean, 0.0 if variance < 0.0 else variance


@_exact
@no_type_check
def _evaluate(members, row_stats, half, listed, alpha):
    """A, A' and A'' of one row at alpha, from moments where they were taken, else from the members."""
    log_probs, deltas, moments = listed
    if moments.shape[0] > 0:
        return _gathered_moments(log_probs, deltas, moments, row_stats[PLAIN_MEAN], half, alpha)
    strong, base, expert = members
    return _moments(strong, base, expert, row_stats[LOG_MASS], row_stats[CENTRE], alpha)


# ---- A between two nodes: see `hermite`


@_exact
@no_type_check
def _set(node, alpha, log_partition, mean, variance):
    node[ALPHA], node[LOG_PARTITION], node[MEAN], node[VARIANCE] = alpha, log_partition, mean, variance


@_exact
@no_type_check
def _misses(node, forward, reverse):
    """f - forward and g - reverse at a node."""
    return node[ALPHA] * node[MEAN] - node[LOG_PARTITION] - forward, node[LOG_PARTITION] - reverse


@_exact
@no_type_check
def _objective(node, forward, reverse):
    f_miss, g_miss = _misses(node, forward, reverse)
    return f_miss * f_miss + g_miss * g_miss


@_exact
@no_type_check
def _half_slope(node, forward, reverse):
    f_miss, g_miss = _misses(node, forward, reverse)
    return f_miss * node[ALPHA] * node[VARIANCE] + g_miss * node[MEAN]


@_exact
@no_type_check
def _clamp(value, low, high):
    return min(max(value, low), high)


@_exact
@no_type_check
def _interpolate(left, right, at, weights, inside):
    """The interpolated A, A' and A'' at the points `at`, with alpha, into inside [4, point]."""
    width = right[ALPHA] - left[ALPHA]
    per_width = 1.0 / max(width, TINY)
    ends = (left[1], left[2] * width, left[3] * width * width, right[1], right[2] * width, right[3] * width * width)
    count = at.shape[0]
    for point in range(count):
        value = slope = curvature = 0.0
        for end in range(6):
            value += ends[end] * weights[end, point]
            slope += ends[end] * weights[end, count + point]
            curvature += ends[end] * weights[end, 2 * count + point]
        alpha = left[ALPHA] + width * at[point]
        from_left = left[LOG_PARTITION] + left[MEAN] * (alpha - left[ALPHA])
        from_right = right[LOG_PARTITION] - right[MEAN] * (right[ALPHA] - alpha)
        inside[ALPHA, point] = alpha
        inside[LOG_PARTITION, point] = max(value, max(from_left, from_right))
        inside[MEAN, point] = _clamp(slope * per_width, left[MEAN], right[MEAN])
        inside[VARIANCE, point] = max(curvature * per_width * per_width, 0.0)


@_exact
@no_type_check
def _doubt(left, right):
    """How far the interpolated A and A' may be off."""
    width = right[ALPHA] - left[ALPHA]
    mean_gap = right[MEAN] - left[MEAN] - width * (left[VARIANCE] + right[VARIANCE]) / 2
    trapezoid = width * (left[MEAN] + right[MEAN]) / 2 + width * width * (left[VARIANCE] - right[VARIANCE]) / 12
    value_gap = abs(right[LOG_PARTITION] - left[LOG_PARTITION] - trapezoid)
    mean_gap = abs(mean_gap)
    return width * mean_gap / 8 + value_gap / 2, mean_gap / 4 + 2 * value_gap / max(width, TINY)


@_exact
@no_type_check
def _kink(left, right):
    """Where the end tangents of A cross."""
    rise = right[MEAN] - left[MEAN]
    if not rise > 0.0:
        return (left[ALPHA] + right[ALPHA]) / 2
    offset = left[LOG_PARTITION] - right[LOG_PARTITION] + right[MEAN] * right[ALPHA] - left[MEAN] * left[ALPHA]
    return offset / max(rise, TINY)


@_exact
@no_type_check
def _margin(left, right):
    """How much of an interval the next evaluation must cut off."""
    share = 2.0 * _doubt(left, right)[1] / max(right[MEAN] - left[MEAN], TINY)
    return min(share, CUT) * (right[ALPHA] - left[ALPHA])


# ---- intervals: see `match`


@_exact
@no_type_check
def _lowest(alpha, objective, half_slope):
    """The lowest minimum between points, from J and J'/2 there: its J, inf when none, and alpha."""
    predicted, cell = np.inf, 0
    for point in range(alpha.shape[0] - 1):
        lower = min(objective[point], objective[point + 1])
        if half_slope[point] < 0.0 and half_slope[point + 1] >= 0.0 and lower < predicted:
            predicted, cell = lower, point
    width = alpha[cell + 1] - alpha[cell]
    falling, rising = half_slope[cell], half_slope[cell + 1]
    share = _clamp(-falling / max(rising - falling, TINIEST), 0.0, 1.0)
    if predicted < np.inf:
        from_left = objective[cell] + falling * share * width
        from_right = objective[cell + 1] - rising * (1.0 - share) * width
        predicted = min(from_left, from_right)
    return predicted, alpha[cell] + share * width


@_exact
@no_type_check
def _predict(alpha, objective, half_slope, first, final):
    """The lowest J inside an interval, inf when not worth an evaluation, and where; J at its ends is given."""
    last = alpha.shape[0] - 1
    width = alpha[last] - alpha[0]
    if width < NARROW:
        ends = np.array((alpha[0], alpha[last], first, final, half_slope[0], half_slope[last]))
        predicted, point = _lowest(ends[:2], ends[2:4], ends[4:])
    else:
        predicted, point = _lowest(alpha, objective, half_slope)
    from_first, from_final = abs(alpha[0] - point), abs(alpha[last] - point)
    near = min(from_first, from_final)
    if near < 5.0 * CLOSE_ENOUGH:
        falls = min(
            first + 2.0 * min(half_slope[0], 0.0) * from_first, final + 2.0 * min(-half_slope[last], 0.0) * from_final
        )
        predicted = max(predicted, falls)
    if (near < CLOSE_ENOUGH and predicted > min(first, final) - SMALL_GAIN) or width < NARROWEST:
        predicted = np.inf
    return predicted, point


@_exact
@no_type_check
def _appraise(left, right, forward, reverse, at, weights, work, note):
    """The notes on the interval between two nodes; work [6, point] is scratch."""
    inside, objective, half_slope = work[:4], work[4], work[5]
    _interpolate(left, right, at, weights, inside)
    value_doubt, mean_doubt = _doubt(left, right)
    f_doubt = right[ALPHA] * mean_doubt + value_doubt
    possible = np.inf
    for point in range(at.shape[0]):
        f_miss, g_miss = _misses(inside[:, point], forward, reverse)
        objective[point] = f_miss * f_miss + g_miss * g_miss
        half_slope[point] = _half_slope(inside[:, point], forward, reverse)
        f_left, g_left = max(abs(f_miss) - f_doubt, 0.0), max(abs(g_miss) - value_doubt, 0.0)
        possible = min(possible, f_left * f_left + g_left * g_left)
    half_slope[0], half_slope[-1] = _half_slope(left, forward, reverse), _half_slope(right, forward, reverse)
    first, final = _objective(left, forward, reverse), _objective(right, forward, reverse)
    predicted, point = _predict(inside[ALPHA], objective, half_slope, first, final)
    floor = _floor(left, right, forward, reverse)
    width, margin = right[ALPHA] - left[ALPHA], _margin(left, right)
    possible = max(floor, min(possible, min(min(first, final), predicted)))
    note[LEFT], note[PREDICTED], note[FLOOR] = first, predicted, floor
    note[POINT] = _clamp(point, left[ALPHA] + margin, right[ALPHA] - margin)
    note[POSSIBLE] = np.inf if width < NARROWEST else possible
    note[PROBE] = _clamp(_kink(left, right), left[ALPHA] + 0.1 * width, right[ALPHA] - 0.1 * width)


@_exact
@no_type_check
def _floor(left, right, forward, reverse):
    """The squared distance of the targets to the box of both divergences."""
    f_low, g_low = _misses(left, forward, reverse)
    f_high, g_high = _misses(right, forward, reverse)
    below = max(f_low, 0.0) ** 2 + max(g_low, 0.0) ** 2
    return below + min(f_high, 0.0) ** 2 + min(g_high, 0.0) ** 2


@_exact
@no_type_check
def _next(notes, count, best, scale):
    """The interval to split, and where, or a negative interval when the row is settled."""
    promising = unexplored = 0
    for slot in range(1, count):
        if notes[slot, PREDICTED] < notes[promising, PREDICTED]:
            promising = slot
        if notes[slot, POSSIBLE] < notes[unexplored, POSSIBLE]:
            unexplored = slot
    if notes[promising, PREDICTED] < best - WORTH * (scale + best):
        return promising, notes[promising, POINT]
    if notes[unexplored, POSSIBLE] < best - EXPLORED * min(scale, 1.0):
        return unexplored, notes[unexplored, PROBE]
    return -1, 0.0


@_exact
@no_type_check
def _buffers(vocab, half):
    """Room for the gathered tokens of one row and for their moments; none where gathering does not pay."""
    room = vocab if vocab >= WORTH_MOMENTS and half > 0.0 else 0
    return np.empty(room + 8), np.empty(room + 8), np.empty(ORDER + 2)


@_exact
@no_type_check
def _open_row(strong, base, experts, row_stats, row, half, buffers):
    """The members' log-probabilities in a row, and its gathered tokens: empty where gathering does not pay."""
    log_probs, deltas, moments = buffers
    b = row % strong.shape[0]
    members = (strong[b], base[b], experts[row // strong.shape[0], b])
    if log_probs.shape[0] == 8:
        return members, (log_probs[:0], deltas[:0], moments[:0])
    count = _gather(members[0], members[1], members[2], row_stats[row], half, log_probs, deltas, moments)
    return members, (log_probs[:count], deltas[:count], moments)


@_exact
@no_type_check
def match(strong, base, experts, row_stats, targets, alpha_max, evaluations, at, weights, start, stop, found):
    """The alpha with the smallest J in each of the rows start to stop.

    strong, base, experts, row_stats as for `prepare_rows`
    targets      [2, expert * batch]   forward and reverse
    at, weights  of `hermite`: the points of interpolation and the weights of the end values there
    found        [4, expert * batch]   written: alpha, J, floor and the number of evaluations
    """
    left, right = np.empty((evaluations, 4)), np.empty((evaluations, 4))
    notes, work, node, last = np.empty((evaluations, 6)), np.empty((6, at.shape[0])), np.empty(4), np.empty(4)
    half = alpha_max / 2
    buffers = _buffers(strong.shape[1], half)
    for row in range(start, stop):
        members, listed = _open_row(strong, base, experts, row_stats, row, half, buffers)
        forward, reverse = targets[0, row], targets[1, row]
        scale = forward * forward + reverse * reverse  # J(0)
        _set(last, alpha_max, *_evaluate(members, row_stats[row], half, listed, alpha_max))
        _set(left[0], 0.0, 0.0, 0.0, row_stats[row, SPREAD])
        right[0] = last
        at_last, interval, count = _objective(last, forward, reverse), 0, 1
        best = at_last
        while True:
            # The two parts of the interval that was divided last; in the first round both are the whole range.
            for slot in (interval, count - 1):
                _appraise(left[slot], right[slot], forward, reverse, at, weights, work, notes[slot])
                best = min(best, notes[slot, LEFT])
            interval, alpha = _next(notes, count, best, scale)
            if interval < 0 or count == evaluations - 1:
                break
            _set(node, alpha, *_evaluate(members, row_stats[row], half, listed, alpha))
            left[count], right[count], right[interval] = node, right[interval], node
            count += 1
        # Among alphas that differ by rounding only, the smallest: a delta of zero must not move anything.
        alpha, objective, floor, limit = alpha_max, at_last, best, best + WORTH * scale
        for slot in range(count):
            floor = min(floor, notes[slot, FLOOR])
            if notes[slot, LEFT] <= limit and (left[slot, ALPHA] < alpha or objective > limit):
                alpha, objective = left[slot, ALPHA], notes[slot, LEFT]
        found[0, row], found[1, row], found[2, row], found[3, row] = alpha, objective, floor, count + 1


# ---- the smaller root: see `match`


@_exact
@no_type_check
def _excess(node, forward, reverse):
    """By how much the more exceeded divergence is above its target; negative when both are below."""
    f_miss, g_miss = _misses(node, forward, reverse)
    return max(f_miss, g_miss)


@_exact
@no_type_check
def _crossing(left, right, forward, reverse, at, weights, work):
    """Where the excess crosses zero between two nodes, as interpolated, and where best to evaluate next."""
    inside, excess = work[:4], work[4]
    _interpolate(left, right, at, weights, inside)
    for point in range(at.shape[0]):
        excess[point] = _excess(inside[:, point], forward, reverse)
    excess[0], excess[-1] = _excess(left, forward, reverse), _excess(right, forward, reverse)
    first = 0  # the first point above zero; with none, the first point, as `argmax` would have it
    for point in range(at.shape[0]):
        if excess[point] >= 0.0:
            first = point
            break
    cell = max(first, 1) - 1
    low, high = excess[cell], excess[cell + 1]
    share = _clamp(-low / max(high - low, TINIEST), 0.0, 1.0)
    root = inside[ALPHA, cell] + share * (inside[ALPHA, cell + 1] - inside[ALPHA, cell])
    margin = _margin(left, right)
    return root, _clamp(root, left[ALPHA] + margin, right[ALPHA] - margin)


@_exact
@no_type_check
def smaller_root(strong, base, experts, row_stats, targets, alpha_max, evaluations, at, weights, start, stop, found):
    """The largest alpha at which neither divergence exceeds its target in each of the rows start to stop.

    All arguments as for `match`; found [2, expert * batch]: alpha and the number of evaluations.
    """
    left, right, last = np.empty(4), np.empty(4), np.empty(4)
    node, work = np.empty(4), np.empty((6, at.shape[0]))
    half = alpha_max / 2
    buffers = _buffers(strong.shape[1], half)
    for row in range(start, stop):
        members, listed = _open_row(strong, base, experts, row_stats, row, half, buffers)
        forward, reverse = targets[0, row], targets[1, row]
        _set(last, alpha_max, *_evaluate(members, row_stats[row], half, listed, alpha_max))
        _set(left, 0.0, 0.0, 0.0, row_stats[row, SPREAD])
        right[:] = last
        count, root = 2, alpha_max
        if _excess(last, forward, reverse) >= 0.0:
            while True:
                root, point = _crossing(left, right, forward, reverse, at, weights, work)
                near = min(root - left[ALPHA], right[ALPHA] - root)
                if count == evaluations or not near > CLOSE_ENOUGH:
                    break
                _set(node, point, *_evaluate(members, row_stats[row], half, listed, point))
                if _excess(node, forward, reverse) >= 0.0:
                    right[:] = node
                else:
                    left[:] = node
                count += 1
        moves = max(last[LOG_PARTITION], last[ALPHA] * last[MEAN] - last[LOG_PARTITION])
        found[0, row], found[1, row] = root if moves > NO_MOVE else 0.0, count
