"""What speculation did in one generation: how much was drafted, how much of it was accepted, and what it cost."""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

# Each thread's last report per model. They are not kept on the model, which can be copied, as a thread's own cannot.
_OF_THREAD = threading.local()
COUNTS = ("rounds", "drafted", "accepted", "emitted")  # what is shown of a report, and can be summed


@dataclass
class SpeculationReport:
    """Counts over all rows of one generation.

    reason      why nothing was drafted; None when speculation was on
    rounds      readings by the strong model, the prompt's included
    row_rounds  the same, counted for each row that was read
    drafted     tokens that were drafted and judged, or dropped with a rejected one before them
    accepted    drafted tokens that the text keeps
    emitted     tokens generated
    lengths     {length of the draft: rounds}
    drafters    {which drafter: rounds}
    calls       {member: forwards}, the prompt's included; members read together count once each
    seconds     {member: seconds in its forwards}, shared evenly by members that are read together
    overhead    seconds spent outside the members' forwards
    """

    reason: str | None = None
    rounds: int = 0
    row_rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    drafters: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    overhead: float = 0.0

    @property
    def is_on(self) -> bool:
        """Whether the speculative decoder ran."""
        return self.reason is None

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that were accepted; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_round(self) -> float | None:
        """Tokens per row and reading of the strong model; None before the first round."""
        return self.emitted / self.row_rounds if self.row_rounds else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        if not self.is_on:
            return {"on": False, "reason": self.reason}
        plain = {name: getattr(self, name) for name in COUNTS}
        shares = {"acceptance": self.acceptance, "tokens_per_round": self.tokens_per_round}
        tables = {"lengths": {str(n): rounds for n, rounds in sorted(self.lengths.items())}}
        tables |= {"drafters": dict(self.drafters), "calls": dict(self.calls)}
        return {"on": True} | plain | shares | tables


def summed(reports: Sequence[SpeculationReport]) -> dict[str, Any]:
    """What several generations did together, for JSON.

    returns   generations: how many; drafted_in: of them, those with speculation on; reasons: {why not: generations};
              rounds, drafted, accepted, emitted, acceptance of those with speculation on
    """
    on = [report for report in reports if report.is_on]
    all_of = SpeculationReport()
    for name in COUNTS:
        setattr(all_of, name, sum(getattr(report, name) for report in on))
    return {
        "generations": len(reports),
        "drafted_in": len(on),
        "reasons": dict(Counter(report.reason for report in reports if not report.is_on)),
        **{name: getattr(all_of, name) for name in COUNTS},
        "acceptance": all_of.acceptance,
    }


def note_report(model: Any, report: SpeculationReport) -> None:
    """Keeps a report as the last one of this thread and model."""
    if not hasattr(_OF_THREAD, "reports"):
        _OF_THREAD.reports = WeakKeyDictionary()
    _OF_THREAD.reports[model] = report


def last_report(model: Any) -> SpeculationReport | None:
    """The last report of this thread and model; None if there is none."""
    reports: WeakKeyDictionary[Any, SpeculationReport] | None = getattr(_OF_THREAD, "reports", None)
    return None if reports is None else reports.get(model)
