"""The bench of draft_sources on the bare zoo: arms draft as their names say, and answer the same."""

import pytest
from bench.decode import Point
from bench.harness import Options
from bench.members import MemberFactory, Spec

from bench import draft_sources
from trimtab.zoo import load_items

SPEC = Spec(12_000_000, 2, ("arithmetic", "facts"), small_parameters=1_000_000)


@pytest.mark.slow
def test_arms_draft_by_their_rules_and_answer_the_same(monkeypatch):
    point = Point("two", SPEC, tasks=SPEC.experts, output=6, batches=2, repeats=1, split="validation")
    monkeypatch.setattr(draft_sources, "points", lambda is_quick: [point])
    kept, plain = [], draft_sources.fused_arm

    def watched(member_set, work, **settings):
        answer = plain(member_set, work, **settings)

        def watching(repeat):
            record = answer(repeat)
            kept.append(
                (settings["speculate_draft"], member_set.fused.one_pass, member_set.fused.last_speculation.drafters)
            )
            return record

        return watching

    monkeypatch.setattr(draft_sources, "fused_arm", watched)
    (case,) = draft_sources.measure(Options(is_quick=True), lambda text: None).cases
    assert set(case.runs) == {
        f"{rule}, {manner}" for rule in draft_sources.RULES for manner in ("one by one", "one forward")
    } | {"auto"}
    assert {(rule, one_pass) for rule, one_pass, _ in kept} >= {("recent", False), ("fused", True), ("auto", "auto")}
    for rule, _, drafted in kept:
        allowed = {"recent": {"arithmetic", "facts"}, "mixture": {"mixture"}, "fused": {"fused"}}.get(rule)
        assert allowed is None or set(drafted) <= allowed, rule
    assert {records[0]["tokens"] for records in case.runs.values()} == {12.0}


def test_prompts_are_not_those_of_the_test_split():
    (point,) = draft_sources.points(is_quick=True)
    work = draft_sources.Work(point, MemberFactory().make(SPEC))
    first = work.batches(0)[0]["input_ids"]
    prompt = load_items(point.tasks[0], "validation")[0].prompt
    assert work._member_set.tokenizer.decode(first[0], skip_special_tokens=True).strip() == prompt.strip()
    assert all(point.split == "validation" for point in draft_sources.points(is_quick=False))
