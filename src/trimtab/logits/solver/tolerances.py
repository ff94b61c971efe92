"""What counts as close, narrow, rounding or impossible, for the plain search and the compiled one alike.

Compiled code keeps these numbers: touch `kernel.py` when one changes, or numba finds its old machine code again.
"""

# Below this log-probability a token counts as ruled out: far below what float32 probabilities can hold, and it keeps
# masks made of the lowest finite number (as common as -inf) from acting as opinions.
RULED_OUT_NATS = -1e4

# Instead of a width or a slope of zero in a denominator; its inverse square still fits into float32.
TINY = 1e-18

EVALUATIONS = 16  # passes over the vocabulary that a search may take

WORTH = 1e-13  # a predicted gain below this share of J(0) is rounding
CLOSE_ENOUGH = 2e-6  # an alpha this close to an evaluated one is not evaluated again ...
SMALL_GAIN = 1e-8  # ... unless J is so steep that it would fall by more than this
NARROW = 1e-3  # in an interval narrower than this only the exact slopes at its ends are believed
NARROWEST = 1e-7  # an interval narrower than this is not divided
CUT = 0.3  # where the interpolation is not to be trusted, an evaluation cuts off this share of the interval
NO_MOVE = 1e-12  # divergences below this, in nats, are rounding: the distribution has not moved
EXPLORED = 5e-7  # intervals that could not lower J by more than this (times J(0) if that is below 1) are left alone
