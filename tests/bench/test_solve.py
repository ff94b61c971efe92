"""The solver's bench on points small enough for a test: every arm runs, and arms do what their names say."""

import dataclasses

import pytest
import torch
from bench.harness import Options

from bench import solve
from trimtab.core.divergence import entropy_nats
from trimtab.logits.solver import compiled
from trimtab.logits.solver.tilted import TiltedFamily

SMALL = solve.Point(solve.PEAKED, 400, 5)


def case_at(point, monkeypatch, slow_numbers=1 << 20):
    monkeypatch.setattr(solve, "RECORD_SECONDS", 1e-4)
    monkeypatch.setattr(solve, "SLOW_NUMBERS_QUICK", slow_numbers)
    return solve.solve_case(point, repeats=2, is_quick=True, progress=lambda text: None)


def test_every_arm_is_timed_and_the_worst_point_is_told(monkeypatch):
    case = case_at(SMALL, monkeypatch)
    assert set(case.runs) == {solve.OURS, solve.SEARCH, solve.PLAIN, solve.GRID, solve.SOFTMAX}
    assert all(record["microseconds"] > 0 for records in case.runs.values() for record in records)
    case.runs[solve.OURS], case.runs[solve.GRID] = [{"microseconds": 2.0}], [{"microseconds": 8.0}]
    slower = dataclasses.replace(case, name="slower", runs=case.runs | {solve.GRID: [{"microseconds": 4.0}]})
    assert solve.notes([case]) == ["The exact call takes at most 0.250 of the grid's time, at " + SMALL.name + "."]
    assert solve.notes([case, slower]) == ["The exact call takes at most 0.500 of the grid's time, at slower."]
    step = dataclasses.replace(
        case,
        name="1B step",
        runs={solve.STEP: [{"microseconds": 80.0}]}
        | {arm: [{"microseconds": time}] for arm, time in ((solve.OURS, 2.0), (solve.SEARCH, 0.4))},
    )
    assert solve.notes([step]) == ["Of a strong model's step, 1B step: the whole call takes 2.50%, its search 0.50%."]


def test_slow_arms_see_the_first_rows_and_say_so(monkeypatch):
    case = case_at(SMALL, monkeypatch, slow_numbers=2 * 400)
    assert case.facts["rows_of_slow_arms"] == 2


def test_the_plain_arm_runs_without_compiled_code(monkeypatch):
    seen = []
    monkeypatch.setattr(
        TiltedFamily, "tilt", lambda self, *rest, to=TiltedFamily.tilt: seen.append(1) or to(self, *rest)
    )
    arms = solve.arms_of([solve.draw_log_probs(SMALL, 0)], rows=5)
    arms[solve.OURS](0)
    assert not seen
    arms[solve.PLAIN](0)
    assert seen
    assert compiled.is_available()


@pytest.mark.parametrize("vocab", [8_000, 32_000, 152_000])
def test_peaked_distributions_have_the_entropy_that_is_claimed(vocab):
    entropy = torch.cat(
        [entropy_nats(solve.draw_log_probs(solve.Point(solve.PEAKED, vocab, 4), i)[0]) for i in range(2)]
    )
    assert 1.0 < entropy.median() < 4.5


def test_draws_differ_and_repeat():
    first, again, other = (solve.draw_log_probs(SMALL, draw)[0] for draw in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_numba_the_plain_arm_is_the_reference(monkeypatch):
    monkeypatch.setattr(compiled, "is_available", lambda: False)
    case = case_at(SMALL, monkeypatch)
    assert case.reference == solve.PLAIN
    assert set(case.left_out) == {solve.OURS, solve.SEARCH}


def test_a_part_of_a_name_picks_points(monkeypatch):
    monkeypatch.setattr(solve, "points", lambda is_quick: [SMALL, solve.Point(solve.FLAT, 400, 5)])
    monkeypatch.setattr(solve, "RECORD_SECONDS", 1e-4)
    findings = solve.measure(Options(only="flat", repeats=1), lambda text: None)
    assert [case.name for case in findings.cases] == ["flat, V 400, batch 5"]
