"""The runner on plain functions: every row once, failures alone, finished rows kept."""

import random
from contextlib import closing

import pytest

from trimtab.batch.journal import open_journal
from trimtab.batch.rows import BrokenWorker, Outcome, Row
from trimtab.batch.runner import Counts, InProcess, about, run
from trimtab.core.errors import BadSetting, InputError, TrimtabError

ROWS = [Row(f"r{number}", {"number": number}) for number in range(10)]


class Doubling:
    """Doubles numbers; refuses, breaks or answers nonsense where a row says so. Remembers what it was given."""

    def __init__(self):
        self.given = []

    def __call__(self, contents):
        self.given += [content["number"] for content in contents]
        if any(content.get("do") == "raise" for content in contents):
            raise ZeroDivisionError("this row divides by zero")
        if any(content.get("do") == "break" for content in contents):
            raise BrokenWorker("the engine is gone.")
        return [self.answer(content) for content in contents]

    def answer(self, content):
        nonsense = {"nan": float("nan"), "object": object(), "refuse": BadSetting("n is 0.", "At least 1.", "mend it.")}
        return nonsense[content["do"]] if "do" in content else content["number"] * 2


@pytest.fixture
def journal(tmp_path):
    with closing(open_journal(tmp_path / "part", about(ROWS, {}))) as journal:
        yield journal


def answers(journal, rows=ROWS):
    return {outcome.id: outcome.value for outcome in journal.outcomes([row.id for row in rows])}


@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
def test_every_row_is_answered_once_whatever_the_batches_are(journal, batch_size):
    worker, seen = Doubling(), []
    counts = run(ROWS, lambda: worker, journal, InProcess(batch_size), lambda done, total: seen.append((done, total)))
    assert counts == Counts(rows=10, kept=0, computed=10, failed=0)
    assert answers(journal) == {f"r{number}": 2 * number for number in range(10)}
    assert worker.given == list(range(10))
    assert seen[0] == (0, 10)
    assert seen[-1] == (10, 10)
    assert len(seen) == 1 + -(-10 // batch_size)


@pytest.mark.parametrize(
    ("do", "kind", "is_input"),
    [
        ("raise", "ZeroDivisionError", False),
        ("nan", "ValueError", False),
        ("object", "TypeError", False),
        ("refuse", "BadSetting", True),
    ],
)
def test_a_bad_row_fails_alone(journal, do, kind, is_input):
    rows = [*ROWS[:4], Row("r4", {"number": 4, "do": do}), *ROWS[5:]]
    assert run(rows, Doubling, journal, InProcess(5)).failed == 1
    outcomes = list(journal.outcomes([row.id for row in rows]))
    assert [outcome.value for outcome in outcomes] == [0, 2, 4, 6, None, 10, 12, 14, 16, 18]
    error = outcomes[4].error
    assert (error.kind, error.is_input) == (kind, is_input)
    if do == "raise":
        assert "divides by zero (test_runner.py, line " in error.message


def test_a_broken_worker_ends_the_run_and_what_was_finished_is_kept(journal):
    rows = [*ROWS[:6], Row("r6", {"number": 6, "do": "break"}), *ROWS[7:]]
    with pytest.raises(BrokenWorker):
        run(rows, Doubling, journal, InProcess(2))
    assert list(journal.done) == ["r0", "r1", "r2", "r3", "r4", "r5"]


def test_a_run_that_was_stopped_goes_on_where_it_was_and_does_nothing_twice(journal):
    worker = Doubling()

    def stops(done, total):
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(ROWS, lambda: worker, journal, InProcess(2), stops)
    shuffled = random.Random(3).sample(ROWS, len(ROWS))
    assert run(shuffled, lambda: worker, journal, InProcess(4)) == Counts(rows=10, kept=4, computed=6, failed=0)
    assert sorted(worker.given) == list(range(10))
    assert run(ROWS, lambda: pytest.fail("nothing is left to do"), journal) == Counts(10, 10, 0, 0)
    assert answers(journal) == {f"r{number}": 2 * number for number in range(10)}


@pytest.mark.parametrize("values", [[1], [1, 2, 3]])
def test_a_worker_whose_values_do_not_match_the_rows_ends_the_run(journal, values):
    with pytest.raises(TrimtabError, match=f"gave {len(values)} values for 2 rows") as raised:
        run(ROWS, lambda: lambda contents: values, journal, InProcess(2))
    assert not isinstance(raised.value, InputError)
    assert not journal.done


def test_a_worker_that_gives_no_list_or_nests_without_end_fails_its_rows_alone(journal):
    endless = []
    endless.append(endless)
    deep = []
    for _ in range(100_000):
        deep = [deep]
    answers = {0: None, 1: [endless], 2: [deep]}
    run(ROWS, lambda: lambda contents: answers.get(contents[0]["number"], [7]), journal, InProcess(1))
    outcomes = list(journal.outcomes([row.id for row in ROWS]))
    kinds = [outcome.error and outcome.error.kind for outcome in outcomes]
    assert kinds == ["TypeError", "ValueError", "RecursionError"] + [None] * 7


def test_ids_must_be_unique_and_the_journals(journal):
    with pytest.raises(InputError, match="two rows have the id 'r1'"):
        run([ROWS[1], ROWS[1]], Doubling, journal)
    run(ROWS, Doubling, journal)
    with pytest.raises(InputError, match="holds row 'r0', which is not among the rows"):
        run(ROWS[1:], Doubling, journal)


def test_a_run_is_known_by_its_rows_in_any_order_and_by_its_settings():
    same = about(ROWS[::-1], {"alpha": 1})
    assert about(ROWS, {"alpha": 1}) == same
    assert about(ROWS, {"alpha": 2}) != same
    assert about(ROWS[1:], {"alpha": 1}) != same
    assert about([*ROWS[:-1], Row("r9", {"number": 8})], {"alpha": 1}) != same
    assert about([*ROWS[:-1], Row("r10", {"number": 9})], {"alpha": 1}) != same


def test_a_digest_does_not_depend_on_the_order_of_keys():
    assert Row("a", {"x": 1, "y": [1, 2]}).digest == Row("b", {"y": [1, 2], "x": 1}).digest
    assert Row("a", {"x": 1, "y": [1, 2]}).digest != Row("a", {"x": 1, "y": [2, 1]}).digest


def test_an_executor_may_finish_rows_in_any_order(journal):
    def backwards(rows, make_worker):
        worker = make_worker()
        for row in reversed(rows):
            yield [Outcome(row.id, worker([row.content])[0])]

    run(ROWS, Doubling, journal, backwards)
    assert list(answers(journal)) == [row.id for row in ROWS]
