"""What a crash leaves behind: journals cut at every byte, damaged lines, other runs, two runs at once."""

import os

import pytest

from trimtab.batch import journal as journals
from trimtab.batch.rows import Outcome, RowError
from trimtab.core.errors import InputError, TrimtabError

ABOUT = {"input": "3 rows", "model": "m"}
OUTCOMES = [
    Outcome("a", {"text": "one\ntwo \u2028 é"}),
    Outcome("b", error=RowError("BadSetting", "n is 0.", is_input=True)),
    Outcome("c\ud800", [1, 2.5, None]),
]
IDS = [outcome.id for outcome in OUTCOMES]


OPENED = []


@pytest.fixture
def path(tmp_path):
    yield tmp_path / "out.jsonl.part"
    while OPENED:
        OPENED.pop().close()


def open_journal(*args):
    OPENED.append(journals.open_journal(*args))
    return OPENED[-1]


def filled(path, outcomes=OUTCOMES):
    journal = open_journal(path, ABOUT)
    for outcome in outcomes:
        journal.append([outcome])
    journal.close()
    return path.read_bytes()


def test_what_was_appended_comes_back_in_any_order(path):
    filled(path)
    journal = open_journal(path, ABOUT, "resume")
    assert list(journal.done) == IDS
    assert list(journal.outcomes(IDS[::-1])) == OUTCOMES[::-1]
    assert journal.dropped == 0
    assert path.read_bytes().isascii()


def test_a_journal_cut_at_any_byte_keeps_its_whole_lines_and_can_be_gone_on_with(path):
    whole = filled(path)
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        journal = open_journal(path, ABOUT, "resume")
        kept = sum(end <= cut for end in ends[1:])
        assert list(journal.done) == IDS[:kept]
        assert journal.dropped == (cut > 0 and cut not in ends)
        journal.append(OUTCOMES[kept:])
        assert list(journal.outcomes(IDS)) == OUTCOMES
        journal.close()
        assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", [b"\0" * 40, b'{"id": 5, "value": 1}', b'{"value": 1}', b"[]", b"\xff"])
def test_a_damaged_line_costs_its_own_row_only(path, damage):
    lines = filled(path).split(b"\n")
    path.write_bytes(b"\n".join([*lines[:2], damage, *lines[3:]]))
    journal = open_journal(path, ABOUT, "resume")
    assert list(journal.done) == [IDS[0], IDS[2]]
    assert journal.dropped == 1
    journal.append([OUTCOMES[1]])
    assert list(journal.outcomes(IDS)) == OUTCOMES


def test_without_resume_or_force_an_earlier_run_is_left_alone(path):
    before = filled(path)
    with pytest.raises(InputError, match="pass --resume to go on with it, or --force"):
        open_journal(path, ABOUT)
    assert path.read_bytes() == before
    journal = open_journal(path, ABOUT, "force")
    assert not journal.done


@pytest.mark.parametrize("changed", [{"input": "4 rows"}, {"model": "other"}, {"more": 1}])
def test_another_run_is_not_gone_on_with(path, changed):
    before = filled(path)
    with pytest.raises(InputError, match=f"belongs to another run: {next(iter(changed))} was"):
        open_journal(path, ABOUT | changed, "resume")
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ['{"some": "json"}\n', '{"some": "json"}', "half of a download", "\n"])
def test_a_file_that_is_no_journal_is_left_alone(path, text):
    path.write_text(text)
    with pytest.raises(InputError, match="is no journal of this version"):
        open_journal(path, ABOUT, "resume")
    assert path.read_text() == text


def test_settings_that_json_writes_in_another_way_are_the_same_settings(path):
    about = ABOUT | {"options": {"sizes": (1, 2), 3: None}}
    open_journal(path, about).close()
    open_journal(path, about, "resume").close()
    with pytest.raises(InputError, match="belongs to another run: options was"):
        open_journal(path, about | {"options": {"sizes": (1, 3), 3: None}}, "resume")


@pytest.mark.parametrize("mode", ["resume", "force"])
def test_one_run_at_a_time_writes_a_journal(path, mode):
    filled(path)
    first = open_journal(path, ABOUT, "resume")
    with pytest.raises(InputError, match="is written by another run"):
        open_journal(path, ABOUT, mode)
    assert list(first.done) == IDS
    first.close()
    open_journal(path, ABOUT, mode).close()


def test_a_journal_in_no_folder_is_an_error_of_the_input(tmp_path):
    with pytest.raises(InputError, match="cannot be written: No such file or directory"):
        open_journal(tmp_path / "missing" / "out.part", ABOUT)


def test_a_full_disk_is_told_with_what_to_do(path):
    journal = open_journal(path, ABOUT)
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, journal._file.fileno())
    os.close(full)
    with pytest.raises(TrimtabError, match=r"cannot be written: No space left.*\n.*\n.*--resume"):
        journal.append(OUTCOMES)
    assert not journal.done
    OPENED.clear()  # the full disk cannot be synced either
    journal._file.close()
