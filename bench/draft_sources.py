"""Who should draft, where there are several experts: each rule, with small members read one by one and in one forward.

    recent, mixture, fused      the drafters of `trimtab.logits.speculation.draft`
    ..., one by one             one forward per small member (`one_pass=False`)
    ..., one forward            one forward for all of them (`one_pass=True`)
    auto                        what is chosen where nothing is set

All arms answer the same validation prompts greedily, with drafts of adaptive length: what is chosen by these figures is
not chosen on the test prompts that `bench/decode.py` measures.
"""

from dataclasses import replace
from typing import Any

from bench import decode
from bench.decode import BESIDE, Point, Work, fused_arm
from bench.harness import Arm, Case, Findings, Options, Progress, interleave
from bench.members import MemberFactory, MemberSet, Spec
from trimtab.logits.forward.grouping import OnePass
from trimtab.logits.speculation.draft import CHEAPEST, FUSED, MIXTURE, RECENT
from trimtab.zoo import TUNED_TASKS

RULES = (RECENT, MIXTURE, FUSED)
ONE_BY_ONE, ONE_FORWARD = "one by one", "one forward"
REFERENCE = f"{RECENT}, {ONE_BY_ONE}"


def points(is_quick: bool) -> list[Point]:
    """Two and four experts, adapters and full models."""
    spec = Spec(600_000_000, 20)
    kinds = ((4, False),) if is_quick else ((2, False), (4, False), (2, True), (4, True))
    return [
        Point(
            f"{count} {'LoRA' if is_lora else 'full'} experts",
            replace(spec, experts=TUNED_TASKS[:count], is_lora=is_lora),
            tasks=TUNED_TASKS[:count],
            batches=4 if is_quick else 12,
            repeats=2 if is_quick else 5,
            split="validation",
        )
        for count, is_lora in kinds
    ]


def measure(options: Options, progress: Progress) -> Findings:
    """All points whose name holds `options.only`."""
    chosen = [decode.as_asked(point, options) for point in points(options.is_quick) if options.only in point.name]
    factory, cases = MemberFactory(), []
    for point in chosen:
        progress(f"{point.name}: making members")
        cases.append(case_of(point, factory, progress))
    settings = {"points": [repr(point) for point in chosen]}
    return Findings("Who drafts, of several experts", settings, cases, list(NOTES))


NOTES = [
    "Members: zoo models with silent blocks on top, as in `decode`. Validation prompts. Strategy: dynamic.",
    "Tokens per strong call are counted per row and include the reading of the prompt.",
]


def case_of(point: Point, factory: MemberFactory, progress: Progress) -> Case:
    """All rules of one point."""
    member_sets = {how: _member_set(point, factory, how) for how in (False, True, "auto")}
    arms = {
        f"{rule}, {manner}": _arm(point, member_sets[how], rule)
        for manner, how in ((ONE_BY_ONE, False), (ONE_FORWARD, True))
        for rule in RULES
    }
    arms[CHEAPEST] = _arm(point, member_sets["auto"], CHEAPEST)
    runs = interleave(arms, point.repeats, lambda text: progress(f"{point.name}: {text}"))
    about: tuple[Any, ...] = (point.settings, member_sets["auto"].facts, runs)
    return Case(point.name, "tokens_per_second", "tokens/s", True, REFERENCE, BESIDE, *about)


def _member_set(point: Point, factory: MemberFactory, one_pass: OnePass) -> MemberSet:
    """Members of their own, so that what is learnt of costs in one manner is not lost in the other."""
    member_set = factory.make(point.spec)
    member_set.fused.one_pass = one_pass
    return member_set


def _arm(point: Point, member_set: MemberSet, rule: str) -> Arm:
    return fused_arm(member_set, Work(point, member_set), speculate="auto", speculate_draft=rule)
