"""Drafts cut where their text ends: the texts stay as they were, and no shorter cut would do."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as some

from trimtab.serving.vllm.draft_trimming import mend_draft_lengths, useful

END, OTHER_END = 0, 1
TOKENS = some.lists(some.integers(0, 5), max_size=8)


def text_with(draft, truth, room):
    """What one round of verification adds to a text whose next tokens are `truth`, and how much of the draft stood."""
    stood = next((at for at, (own, theirs) in enumerate(zip(draft, truth, strict=False)) if own != theirs), len(draft))
    added = truth[: stood + 1][:room]
    ends = [at for at, token in enumerate(added) if token in (END, OTHER_END)]
    return (added[: ends[0] + 1] if ends else added), stood


@given(draft=TOKENS, truth=some.lists(some.integers(0, 5), min_size=9, max_size=9), room=some.integers(1, 12))
def test_the_text_is_that_of_the_whole_draft(draft, truth, room) -> None:
    cut = useful(draft, room, {END, OTHER_END})
    assert cut == draft[: len(cut)]
    assert text_with(cut, truth, room)[0] == text_with(draft, truth, room)[0]


@given(draft=TOKENS, behind=some.integers(2, 5), room=some.integers(1, 12))
def test_every_token_that_is_left_may_become_text(draft, behind, room) -> None:
    cut = useful(draft, room, {END, OTHER_END})
    added, stood = text_with(cut, [*cut, behind], room)
    assert stood == len(cut)
    assert added[: len(cut)] == cut


@pytest.mark.parametrize(
    ("room", "ends", "left"),
    [
        (9, {None}, [3, 0, 4, 1]),
        (9, {None, 0}, [3, 0]),
        (9, {1}, [3, 0, 4, 1]),
        (3, {None}, [3, 0]),
        (1, {0}, []),
        (0, {0}, []),
    ],
)
def test_room_and_ends_cut(room, ends, left) -> None:
    assert useful([3, 0, 4, 1], room, ends) == left


def runner_of(is_async=False, model=3.0):
    """A class of model runners: one request is known, of nine tokens at most, and one is gone."""
    params = SimpleNamespace(eos_token_id=END, stop_token_ids=[OTHER_END], max_tokens=9)

    class Runner:
        use_async_scheduling = is_async
        requests = {"known": SimpleNamespace(sampling_params=params, output_token_ids=[5, 5])}  # noqa: RUF012

        def get_model(self):
            return model

        def take_draft_token_ids(self):
            return SimpleNamespace(req_ids=["known", "gone"], draft_token_ids=[[3, OTHER_END, 4], [3, END, 4]])

    return Runner


def taken(runner):
    return runner().take_draft_token_ids().draft_token_ids


def test_drafts_of_known_requests_for_our_models_are_cut_once() -> None:
    runner = runner_of()
    mend_draft_lengths(runner, float)
    once = runner.take_draft_token_ids
    mend_draft_lengths(runner, float)
    assert runner.take_draft_token_ids is once
    assert taken(runner) == [[3, OTHER_END], [3, END, 4]]


@pytest.mark.parametrize("others", [{"model": "another"}, {"is_async": True}])
def test_drafts_of_others_stay(others) -> None:
    runner = runner_of(**others)
    mend_draft_lengths(runner, float)
    assert taken(runner) == [[3, OTHER_END, 4], [3, END, 4]]
