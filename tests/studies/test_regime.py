"""What the regime's demands make of known scores."""

from dataclasses import replace

import pytest

from trimtab.studies.regime.criteria import Criterion, TaskRegime, as_markdown, criteria, is_transferable

GOOD = TaskRegime(
    task="a",
    items=100,
    base=5.0,
    base_few_shot=20.0,
    base_forced=30.0,
    expert=60.0,
    mixed=50.0,
    strong=10.0,
    few_shot=40.0,
    forced=80.0,
    ceiling=95.0,
)
LOW = replace(GOOD, task="low", few_shot=40.0, forced=50.0)  # latent skill below the expert's
REGIMES = [*(replace(GOOD, task=f"t{i}") for i in range(4)), LOW]


def judged(regimes: list[TaskRegime], pair: str = "far") -> dict[str, Criterion]:
    return {criterion.name: criterion for criterion in criteria(pair, regimes)}


def test_latent_skill_is_the_better_of_two_measures() -> None:
    assert GOOD.latent == 80.0
    assert replace(GOOD, few_shot=90.0).latent == 90.0
    assert replace(GOOD, forced=None).latent == 40.0
    assert replace(GOOD, few_shot=None, forced=None).latent is None
    assert replace(GOOD, few_shot=None, forced=None).latent_gain is None
    assert GOOD.latent_gain == 20.0
    assert GOOD.room == 35.0
    assert GOOD.lead == 50.0
    assert replace(GOOD, strong=85.0, base=40.0).lead == 45.0


def test_all_demands_are_met_where_all_is_well() -> None:
    assert all(criterion.is_met for criterion in judged(REGIMES).values())
    assert is_transferable("far", REGIMES)


@pytest.mark.parametrize(
    ("name", "change", "figure"),
    [
        ("Room", {"expert": 92.0}, "t0 +3.0"),
        ("Knowledge", {"base_forced": 76.0}, "t0 +4.0"),
        ("Poor formats", {"strong": 48.0}, "t0 48.0 of 95.0"),
        ("Latent skill", {"forced": 61.0}, "t0 +1.0"),
    ],
)
def test_a_demand_that_fails_is_said_with_its_figures(name: str, change: dict[str, float], figure: str) -> None:
    spoilt = [replace(regime, **change) if regime.task != "low" else regime for regime in REGIMES]
    found = judged(spoilt)[name]
    assert not found.is_met
    assert "**NOT MET**" in found.verdict
    assert figure in found.verdict.partition("fails on")[2]
    assert f"- {found.verdict}" in as_markdown({"far": spoilt}).splitlines()


def test_one_poorly_hidden_format_is_enough_to_fail() -> None:
    found = judged([*REGIMES[1:], replace(GOOD, task="x", strong=60.0)])["Poor formats"]
    assert not found.is_met
    assert "4 of 5 tasks" in found.figures


def test_both_kinds_need_one_above_and_one_below() -> None:
    above = [replace(GOOD, task=f"t{i}") for i in range(5)]
    level = replace(GOOD, task="level", forced=60.5, few_shot=59.0)
    assert not judged(above)["Both kinds"].is_met
    assert not judged([*above, level])["Both kinds"].is_met
    assert judged([*above, level])["Both kinds"].figures == "5 above, 0 below, 1 level"
    assert judged([*above, LOW])["Both kinds"].is_met
    assert not judged([LOW, LOW])["Both kinds"].is_met


def test_the_close_pair_asks_for_less_room() -> None:
    near = [replace(regime, expert=92.5) for regime in REGIMES[:3]] + [replace(GOOD, expert=94.0)] * 2
    assert is_transferable("close", near)
    assert not is_transferable("far", near)
    assert "at least 3 tasks" in judged(near, "close")["Room"].demand


def test_the_table_shows_a_dash_where_nothing_was_measured() -> None:
    (row,) = [
        line for line in as_markdown({"far": [replace(GOOD, few_shot=None)]}).splitlines() if line.startswith("| a |")
    ]
    assert row == "| a | 100 | 5.0 | 20.0 | 30.0 | 60.0 | 50.0 | 10.0 | – | 80.0 | 95.0 | 35.0 | 20.0 |"
