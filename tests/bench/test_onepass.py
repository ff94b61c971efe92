"""The bench of joint forwards on the bare zoo: arms read what their names say."""

import pytest
from bench.harness import Options
from bench.onepass import FULL, LORA, ONE_PASS, ONE_PASS_ONE, SEPARATE, SEPARATE_ONE, Point

from bench import onepass


@pytest.mark.parametrize("kind", [LORA, FULL])
def test_arms_are_groups_apart_and_joint(kind):
    case = onepass.step_case(Point(kind, 2, 0, 3), repeats=2, progress=lambda text: None)
    assert set(case.runs) == {SEPARATE, ONE_PASS, SEPARATE_ONE, ONE_PASS_ONE}
    assert all(record[onepass.FIGURE] > 0 for records in case.runs.values() for record in records)
    assert case.facts["groups"] == [{LORA: "adapters", FULL: "stacked"}[kind]]
    fused = onepass.fused_model(Point(kind, 2, 0, 1), 2)
    apart, joint = onepass.groups_of(fused)
    assert [group.runs for group in apart] == [(1,), (2,), (3,)]
    assert [group.runs for group in joint] == [(1, 2, 3)]


def test_a_stepper_steps_after_the_same_past():
    groups, _ = onepass.groups_of(onepass.fused_model(Point(FULL, 1, 0, 1), 1))
    stepper = onepass.Stepper(groups, 2)
    for repeat in range(2):
        stepper(repeat)
        assert [cache.get_seq_length() for cache in stepper._caches] == [onepass.PAST] * 2


def test_members_are_as_large_as_asked():
    fused = onepass.fused_model(Point(LORA, 1, 3_000_000, 1), 1)
    assert onepass.bytes_of(fused.members.base.model) == pytest.approx(12_000_000, rel=0.05)


def test_cases_can_be_picked(monkeypatch, tmp_path):
    monkeypatch.setattr(onepass, "PRODUCT_PARAMETERS", 3_000_000)
    asked = Options(is_quick=True, output=tmp_path, repeats=1, only="products: 5")
    (case,) = onepass.measure(asked, lambda text: None).cases
    assert case.name == "products: 5 tokens, 3M, float32"
    assert set(case.runs) == {onepass.TORCH, onepass.QUICK}
