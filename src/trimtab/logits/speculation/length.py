"""How many tokens a draft should have: expected accepted tokens against what reading costs.

With acceptance rate s, a draft of n tokens yields (1 - s^(n+1)) / (1 - s) tokens in the mean, bonus included. It costs
n readings by the drafter, one reading of n + 1 tokens by the others, with probability s^n the drafter's reading of the
last token, which the bonus needs, and the overhead of a round. The length with the most tokens per second wins.

Source: Leviathan et al. 2023, arXiv 2211.17192, Section 3.3; here with measured costs: reading n + 1 tokens at once is
not free on a CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

LONGEST = 16
FIRST = 4  # length of the drafts before costs are known
PRIOR, PRIOR_WEIGHT = 0.8, 5.0  # acceptance before anything was drafted, and the drafted tokens that it counts for
FADE = 0.98  # how much of the acceptance is remembered per drafted token that was judged
RETRY = 24  # rounds without a draft after which one token is drafted, to see whether it pays by now


@dataclass
class Costs:
    """Seconds that one forward takes, by the tokens that it reads in all rows together; learned while decoding."""

    seconds: dict[int, float] = field(default_factory=dict)

    def add(self, tokens: int, seconds: float) -> None:
        """One more measurement. A faster one counts more: what slows a forward down is mostly other work."""
        old = self.seconds.get(tokens, seconds)
        weight = 0.5 if seconds < old else 0.1
        self.seconds[tokens] = (1 - weight) * old + weight * min(seconds, 2 * old)

    def of(self, tokens: int) -> float:
        """Expected seconds for so many tokens: a straight line between measurements, and on from the last two."""
        if tokens in self.seconds or not self.seconds:
            return self.seconds.get(tokens, 0.0)
        sizes = sorted(self.seconds)
        below, above = [n for n in sizes if n < tokens], [n for n in sizes if n > tokens]
        if not below:
            return self.seconds[above[0]]
        if not above and len(below) == 1:
            return self.seconds[below[0]]
        low, high = (below[-1], above[0]) if above else (below[-2], below[-1])
        slope = (self.seconds[high] - self.seconds[low]) / (high - low)
        return self.seconds[low] + max(slope, 0.0) * (tokens - low)

    def is_blind_at(self, tokens: int) -> bool:
        """True if every timing so far is for at least twice as many tokens, so the cost cannot be inferred."""
        return bool(self.seconds) and min(self.seconds) >= 2 * tokens


@dataclass
class AcceptanceHistory:
    """What earlier texts showed of one drafter.

    acceptance    share of drafted tokens that were accepted, of those that were judged
    idle          rounds without a draft since the last one with a draft, where drafts did not seem to pay
    """

    acceptance: float = PRIOR
    idle: int = 0


class DraftLength:
    """Chooses the length of the next draft.

    fixed     a length to keep; None: adapt
    history   what earlier texts showed
    """

    def __init__(self, fixed: int | None = None, history: AcceptanceHistory | None = None) -> None:
        history = history or AcceptanceHistory()
        self._fixed = fixed
        self._judged, self._accepted = PRIOR_WEIGHT, PRIOR_WEIGHT * history.acceptance
        self._idle = history.idle

    @property
    def is_adaptive(self) -> bool:
        """Whether the length is chosen by costs."""
        return self._fixed is None

    @property
    def history(self) -> AcceptanceHistory:
        """The history so far, for the next text."""
        return AcceptanceHistory(self.acceptance, self._idle)

    @property
    def acceptance(self) -> float:
        """Recent share of the judged drafted tokens that were accepted."""
        return self._accepted / self._judged

    def learn(self, accepted: int, judged: int) -> None:
        """Records one round: tokens accepted, of those that were judged."""
        kept = FADE**judged
        self._judged, self._accepted = self._judged * kept + judged, self._accepted * kept + accepted

    def next(self, drafting: float, verifying: Callable[[int], float] | None, overhead: float) -> int:
        """The next draft's length.

        drafting    seconds of one reading by the drafter; 0 for a lookup
        verifying   seconds in which the others read so many tokens per row; None: not known yet
        overhead    seconds of a round outside the forwards
        """
        if self._fixed is not None:
            return self._fixed
        if verifying is None:
            return FIRST
        rates = [self.rate(n, drafting, verifying, overhead) for n in range(LONGEST + 1)]
        best = max(range(len(rates)), key=rates.__getitem__)
        self._idle = 0 if best else self._idle + 1
        return 1 if self._idle and self._idle % RETRY == 0 else best

    def rate(self, length: int, drafting: float, verifying: Callable[[int], float], overhead: float) -> float:
        """Expected tokens per second with drafts of this length."""
        s = min(self.acceptance, 0.999)  # alpha in Leviathan et al., who call our draft length gamma
        tokens = (1 - s ** (length + 1)) / (1 - s)
        seconds = verifying(length + 1) + drafting * (length + s**length) + overhead
        return tokens / max(seconds, 1e-9)
