"""A file is there whole, or as it was."""

import pytest

from trimtab.core.files import write_whole


def test_text_is_there_whole_in_folders_that_were_not(tmp_path):
    file = tmp_path / "new" / "page.md"
    for text in ("Größe\n", "α\n" * 1000):
        write_whole(file, text)
        assert file.read_text(encoding="utf-8") == text
        assert list(file.parent.iterdir()) == [file]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    file = tmp_path / "page.md"
    write_whole(file, "before")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "x" * 100_000 + "\ud800")
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "page.md").symlink_to(tmp_path / "real.md")
    write_whole(tmp_path / "page.md", "text")
    assert (tmp_path / "page.md").is_symlink()
    assert (tmp_path / "real.md").read_text() == "text"
