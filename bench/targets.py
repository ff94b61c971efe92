"""What was promised of speed and memory, and how far a measurement keeps it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bench import decode, memory, solve
from bench.harness import Case, Spread, cases_of, ratios, spread

MET, IN_THE_MEDIAN, MISSED = "met", "met in the median", "missed"
VERDICTS = (MISSED, IN_THE_MEDIAN, MET)
Found = tuple[str, Spread]  # where it was measured, and the ratio there


@dataclass(frozen=True)
class Target:
    """A ratio that is to be reached.

    claim         what is compared with what
    bench         whose document holds the figures
    limit         the ratio that was promised
    is_at_least   whether the ratio is to be at least the limit; False: at most
    find          all places where the document has it; the worst one counts
    """

    claim: str
    bench: str
    limit: float
    is_at_least: bool
    find: Callable[[list[Case]], Iterator[Found]]

    @property
    def demand(self) -> str:
        """For example ">= 2.00"."""
        return f"{'≥' if self.is_at_least else '≤'} {self.limit:.2f}"

    def worst(self, document: Mapping[str, Any]) -> Found | None:
        """Where the document is farthest from the promise, by verdict and then by median; None: it was not measured."""
        sign = 1.0 if self.is_at_least else -1.0
        found = self.find(cases_of(document))
        return min(found, key=lambda one: (VERDICTS.index(self.verdict(one[1])), sign * one[1].median), default=None)

    def verdict(self, ratio: Spread) -> str:
        """Met where the whole interval keeps the promise, so that a promise is not kept by half of the repeats."""
        if self._keeps(ratio.low if self.is_at_least else ratio.high):
            return MET
        return IN_THE_MEDIAN if self._keeps(ratio.median) else MISSED

    def _keeps(self, ratio: float) -> bool:
        return ratio >= self.limit if self.is_at_least else ratio <= self.limit


# Speed was promised for prompts of the zoo, one at a time, and a strong model that costs so many times a small one.
PROMISED_RATIO = 20


def is_promised(case: Case) -> bool:
    """Whether speed was promised at this point."""
    told = case.settings
    return told.get("batch") == 1 and told.get("ratio", 0) >= PROMISED_RATIO and told.get("prompt") == decode.AS_IT_IS


def _is_step(case: Case) -> bool:
    return case.name.startswith(decode.STEP)


def _where(
    wanted: Callable[[Case], bool], arm: str, reference: str, figure: str | None = None
) -> Callable[[list[Case]], Iterator[Found]]:
    def find(cases: list[Case]) -> Iterator[Found]:
        for case in cases:
            if wanted(case) and arm in case.runs and reference in case.runs:
                yield case.name, spread(ratios(case, arm, reference, figure))

    return find


def _any_memory(cases: list[Case]) -> Iterator[Found]:
    for arm in (memory.OURS, memory.SPECULATED):
        for name, ratio in _where(lambda case: True, arm, memory.SUM)(cases):
            yield f"{name}, {arm}", ratio


TARGETS = (
    Target(
        "Speculated fused tokens/s, over the strong model alone",
        "decode",
        2.0,
        True,
        _where(is_promised, decode.SPECULATED, decode.STRONG),
    ),
    Target(
        "Speculated fused tokens/s, over the strong model with assisted generation",
        "decode",
        1.0,
        True,
        _where(is_promised, decode.SPECULATED, decode.ASSISTED),
    ),
    Target(
        "Speculated fused tokens/s, over the paper's grid as published",
        "decode",
        3.0,
        True,
        _where(is_promised, decode.SPECULATED, decode.GRID),
    ),
    Target(
        "Unspeculated fused step, over the sum of its members' own steps",
        "decode",
        1.05,
        False,
        _where(_is_step, decode.OURS, decode.OWN_STEPS),
    ),
    Target(
        "Small-model part of a step with four LoRA experts, over that with one",
        "decode",
        1.6,
        False,
        _where(lambda case: case.name == decode.SMALL_PART, decode.FOUR_EXPERTS, decode.ONE_EXPERT),
    ),
    Target(
        "The strategy's call at V = 152,000, over a step of a strong model of 1B parameters",
        "solve",
        0.02,
        False,
        _where(lambda case: True, solve.OURS, solve.STEP),
    ),
    Target(
        "The strategy's exact call, over the grid's, everywhere",
        "solve",
        1 / 3,
        False,
        _where(lambda case: True, solve.OURS, solve.GRID),
    ),
    Target(
        "Weights of base and four LoRA experts in the fused model's memory, over base + adapters",
        "memory",
        1.10,
        False,
        _where(
            lambda case: case.name == memory.small_part_of("4 LoRA experts"),
            memory.SMALL_PART,
            memory.PARTS,
            "weights_mib",
        ),
    ),
    Target(
        "Peak memory, over the sum of the members with their caches, everywhere", "memory", 1.10, False, _any_memory
    ),
)
