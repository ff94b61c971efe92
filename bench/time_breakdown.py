"""Where the seconds of speculated decoding go, point by point, and what the members' steps cost beside each other."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench import decode, targets
from bench.harness import Case, Record, cases_of

HEADS = ("strong", "small", "other", "tokens a strong reading", "ms a reading alone", "ms a reading with drafts")
RATIO = "measured_ratio"  # the fact of a case: what a step of the strong model cost, in steps of a small one


def seconds_rows(cases: Sequence[Case]) -> Iterator[str]:
    """A table of shares: one row per case in which the strong model decodes alone, and fused with drafts."""
    both = [case for case in cases if {decode.STRONG, decode.SPECULATED} <= set(case.runs) and _is_timed(case)]
    if not both:
        return
    yield (
        f"Where the seconds of '{decode.SPECULATED}' go, over all repeats: the shares of the strong model, of the "
        "small models and of the rest; and how long one forward of the strong model takes."
    )
    yield ""
    yield f"| | {' | '.join(HEADS)} |"
    yield f"|---|{'---:|' * len(HEADS)}"
    for case in both:
        yield f"| {case.name} | {' | '.join(_cells(case))} |"
    yield ""


def _is_timed(case: Case) -> bool:
    return all("strong_calls" in record for arm in (decode.STRONG, decode.SPECULATED) for record in case.runs[arm])


def _cells(case: Case) -> Iterator[str]:
    alone, drafted = case.runs[decode.STRONG], case.runs[decode.SPECULATED]
    for who in ("strong", "small", "other"):
        yield f"{_sum(drafted, f'{who}_seconds') / _sum(drafted, 'seconds'):.2f}"
    yield f"{_sum(drafted, 'tokens') / case.settings['batch'] / _sum(drafted, 'strong_calls'):.1f}"
    for records in (alone, drafted):
        yield f"{1e3 * _sum(records, 'strong_seconds') / _sum(records, 'strong_calls'):.0f}"


def _sum(records: Sequence[Record], figure: str) -> float:
    return sum(record[figure] for record in records)


def costs(documents: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A sentence on the members' costs wherever speed was promised; nothing where decoding was not measured.

    documents   bench -> what it found
    """
    cases = cases_of(documents["decode"]) if "decode" in documents else []
    found = [case.facts[RATIO] for case in cases if targets.is_promised(case) and RATIO in case.facts]
    if found:
        yield (
            f"The targets of speed are for a strong model whose step costs {targets.PROMISED_RATIO} times a small "
            f"member's. Measured, it costs {min(found):.0f} to {max(found):.0f} times as much."
        )
        yield ""
