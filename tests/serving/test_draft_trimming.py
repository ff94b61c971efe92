"""Trimmed drafts: texts stay as they were, and every token that is kept may become text."""

import pytest
from hypothesis import given
from hypothesis import strategies as some

from trimtab.serving.vllm.draft_trimming import trimmed

END, OTHER_END = 0, 1
TOKENS = some.lists(some.integers(0, 5), max_size=8)


def text_with(draft, truth, room):
    """What one round of verification adds to a text whose next tokens are `truth`; how many drafts are accepted."""
    differs = [own != theirs for own, theirs in zip(draft, truth, strict=False)]
    accepted = differs.index(True) if True in differs else len(draft)
    added = truth[: accepted + 1][:room]
    ends = [at for at, token in enumerate(added) if token in (END, OTHER_END)]
    return (added[: ends[0] + 1] if ends else added), accepted


@given(draft=TOKENS, truth=some.lists(some.integers(0, 5), min_size=9, max_size=9), room=some.integers(1, 12))
def test_the_text_is_that_of_the_whole_draft(draft, truth, room) -> None:
    cut = trimmed(draft, room, {END, OTHER_END})
    assert cut == draft[: len(cut)]
    assert text_with(cut, truth, room)[0] == text_with(draft, truth, room)[0]


@given(draft=TOKENS, behind=some.integers(2, 5), room=some.integers(1, 12))
def test_every_token_that_is_left_may_become_text(draft, behind, room) -> None:
    cut = trimmed(draft, room, {END, OTHER_END})
    added, accepted = text_with(cut, [*cut, behind], room)
    assert accepted == len(cut)
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
    assert trimmed([3, 0, 4, 1], room, ends) == left
